"""Questions about many rows as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from clear_datasets import BSDetector, Example
from clear_datasets.asking import ask
from clear_datasets.engines import Answers, Asks, Messages, PromptError
from tests.conftest import Scripted


@dataclass(frozen=True)
class Counting(Scripted):
    """Notes what it is asked to write."""

    asked: list[tuple[str, int]] = field(default_factory=list, compare=False)

    def answer(self, asks: Asks) -> Answers:
        self.asked.extend((p[-1]["content"], limit) for p, limit in zip(asks.generate, asks.limits, strict=True))
        return super().answer(asks)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_samples_of_a_prompt_serve_every_response_to_it():
    texts, responses = ["Where?", "Who?", "Where?"], ["Rome", "Ada", "Oslo and Rome"]
    examples = [Example(say(t), r) for t, r in zip(texts, responses, strict=True)]
    engine, estimator = Counting(answers=(("Where?", "Oslo"), ("Who?", "Ada"))), BSDetector(alpha=1)
    found = estimator(examples, engine)
    limits = [limit for _, limit in engine.asked]
    assert limits == [estimator.limit("Oslo and Rome"), estimator.limit("Ada")]
    alone = [estimator([example], engine).confidence[0] for example in examples]
    assert found.confidence.tolist() == alone
    assert alone[0] < alone[2]


def test_a_refused_prompt_is_refused_for_every_row_of_it():
    texts, errors = ["long" * 10, "Where?", "long" * 10, "Who?"], [""] * 4
    engine = Counting(answers=(("Where?", "Rome"), ("Who?", "Ada")), limit=20)

    def about(i: int) -> Asks:
        return Asks([say(texts[i])], choose=[say(texts[i] + "!" * (18 * (i == 3)))], labels=("Yes", "No"))

    found = ask(engine, errors, about)
    assert [bool(error) for error in errors] == [True, False, True, True]
    assert {i: answers.generated for i, answers in found.items()} == {1: [["Rome"]]}
    assert found[1].chosen.shape == (1, 2)


class Mute(Counting):
    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        reasons = {i: "" for i, p in enumerate(prompts) if "Who?" in p[-1]["content"]}
        if reasons:
            raise PromptError(reasons)
        return super().choose(prompts, labels)


def test_a_refusal_without_a_reason_gets_one():
    errors = ["", ""]
    found = ask(Mute(), errors, lambda i: Asks(choose=[say(("Where?", "Who?")[i])], labels=("Yes", "No")))
    assert list(found) == [0]
    assert errors == ["", "the engine refuses this prompt, and gives no reason"]


class Narrow(Scripted):
    """Refuses only to write to one prompt."""

    def generate(self, prompts: Sequence[Messages], **how: Any) -> list[list[str]]:
        if reasons := {i: "no room" for i, p in enumerate(prompts) if "Who?" in p[-1]["content"]}:
            raise PromptError(reasons)
        return super().generate(prompts, **how)


def test_a_refusal_is_that_of_its_prompt_where_others_lack_fewer_samples():
    with pytest.raises(PromptError) as caught:
        Narrow().answer(Asks([say(t) for t in ("Where?", "Who?", "When?")], 8, 1.0, first=[5, 0, 5]))
    assert caught.value.reasons == {1: "no room"}
