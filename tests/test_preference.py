"""Which of two responses is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from clear_datasets import BSDetector, ByConfidence, Example, Pairwise
from clear_datasets.engines import Messages, PromptError
from clear_datasets.engines.transformers import Transformers
from tests.conftest import Scripted


@dataclass(frozen=True)
class Judge(Scripted):
    """Sure of what holds `good`; of two such, or none, it says what `else_` gives to first, second and tie."""

    good: str = "Alps"
    else_: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        rows = []
        for prompt in prompts:
            text = prompt[-1]["content"]
            if "endless" in text:
                raise PromptError({i: "too long" for i, p in enumerate(prompts) if "endless" in p[-1]["content"]})
            first, second = (part.split("\n")[0] for part in text.split(" answer: ")[1:])
            sure = {(True, False): (0.9, 0.1, 0.0), (False, True): (0.1, 0.9, 0.0)}
            rows.append(sure.get((self.good in first, self.good in second), self.else_))
        return np.array(rows, dtype=np.float32).reshape(len(prompts), 3)


def examples(*responses: str) -> list[Example]:
    return [Example([{"role": "user", "content": "Where does it rise?"}], r) for r in responses]


def test_a_better_candidate_is_preferred_and_a_worse_one_is_not():
    found = Pairwise()(examples("Berlin", "the Alps", "Rome"), ["the Alps", "Berlin", "Paris"], Judge())
    np.testing.assert_allclose(found.preference, [0.9, 0.1, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.position_bias, [0, 0, 0], atol=1e-6)
    assert found.errors == ["", "", ""]


def test_a_verdict_that_flips_with_the_order_is_a_tie():
    found = Pairwise()(examples("Rome"), ["Paris"], Judge(else_=(0.95, 0.05, 0.0)))
    np.testing.assert_allclose(found.preference, [0.5], atol=1e-6)
    np.testing.assert_allclose(found.position_bias, [0.9], atol=1e-6)


def test_a_row_that_cannot_be_judged_has_a_reason():
    found = Pairwise()(examples("Berlin", "endless", "Rome"), ["the Alps"] * 3, Judge())
    np.testing.assert_allclose(found.preference, [0.9, np.nan, 0.9], atol=1e-6)
    assert found.errors == ["", "too long", ""]
    nothing = Pairwise()(examples("Rome"), ["Paris"], Judge(else_=(np.nan, np.nan, np.nan)))
    assert "none of its labels" in nothing.errors[0]
    assert Pairwise()([], [], Judge()).errors == []
    with pytest.raises(ValueError, match="2 candidates for 1 examples"):
        Pairwise()(examples("a"), ["b", "c"], Judge())


def test_exchanged_responses_give_the_complement(tiny):
    engine, pairs = Transformers(tiny, dtype="float32"), [("the Alps", "Rome"), ("4", "5"), ("größer", "日本語, 🙂")]
    there = Pairwise()(examples(*(a for a, _ in pairs)), [b for _, b in pairs], engine)
    back = Pairwise()(examples(*(b for _, b in pairs)), [a for a, _ in pairs], engine)
    assert not np.isnan(there.preference).all()
    np.testing.assert_allclose(there.preference, 1 - back.preference, atol=1e-4)
    np.testing.assert_allclose(there.position_bias, back.position_bias, atol=1e-4)


@dataclass(frozen=True)
class Reasoner(Judge):
    """Explains, and says which; asked whether a verdict is right, it is sure when that is its own."""

    def generate(self, prompts, *, n=1, temperature=0.0, max_tokens=512):
        return [[f"Because. Answer: {self._verdict(p[-1]['content'])}"] * n for p in prompts]

    def choose(self, prompts, labels):
        sure = [self._verdict(p[-3]["content"]) in p[-3]["content"].split("Proposed answer: ")[1] for p in prompts]
        return np.array([[0.9, 0.1, 0.0] if s else [0.1, 0.9, 0.0] for s in sure], dtype=np.float32)

    def _verdict(self, text: str) -> str:
        first, second = (self.good in part.split("\n")[0] for part in text.split(" answer: ")[1:3])
        return "First" if first > second else "Second" if second > first else "Tie"


def test_the_reasoned_form_has_the_confidence_of_bsdetector_in_each_verdict():
    reasoned = Pairwise(BSDetector(k=2, samples="reasoned", reflection="reasoned"))
    found = reasoned(examples("Berlin", "the Alps", "Rome"), ["the Alps", "Berlin", "Paris"], Reasoner())
    high, low = 0.7 * 1 + 0.3 * 0.9, 0.7 * 0 + 0.3 * 0.1  # of the verdict that it gives, and of the other one
    better = 0.5 + (high**2 - low**2) / 2
    np.testing.assert_allclose(found.preference, [better, 1 - better, 0.5], atol=1e-6)
    assert found.errors == ["", "", ""]


def test_by_confidence_compares_what_each_is_worth_by_itself():
    engine = Scripted(answers=(("Where", "the Alps"),), yes=("the Alps",), limit=200)
    found = ByConfidence()(
        examples("Berlin", "the Alps", "Rome", "x" * 300), ["the Alps", "Berlin", "Paris", "y"], engine
    )
    assert found.preference[0] > 0.9
    np.testing.assert_allclose(found.preference[1], 1 - found.preference[0], atol=1e-6)
    np.testing.assert_allclose(found.preference[2], 0.5, atol=0.01)
    assert np.isnan(found.preference[3])
    assert "the limit is 200" in found.errors[3]
    assert found.position_bias[:3].tolist() == [0, 0, 0]
