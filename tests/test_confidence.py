from __future__ import annotations

import math
import pickle
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest

from clear_datasets import BSDetector, Example, Jaccard
from clear_datasets.adaptive import Adaptive
from clear_datasets.engines import Asks, PromptError
from clear_datasets.similarity import NLI
from tests.conftest import Scripted


def example(question, response):
    return Example([{"role": "user", "content": question}], response)


RHINE = example("A passage on the Rhine.\n\nWhere does it rise?", "the Alps")


def test_direct_form_sums_similarity_likelihood_and_reflection():
    engine = Scripted(answers=(("Where does it rise?", "Alps, mostly"),), yes=("Rhine.\n\nWhere does it rise?",))
    found = BSDetector(alpha=0.6, beta=0.8, k=3)([RHINE], engine)
    similarity = 1 / 2  # alps of alps, mostly
    # Scripted log-probabilities: -0.1 a token to the whole prompt, -2 to a part of it; two words and the end.
    agreement = 1 / (1 + math.exp(-3 * 1.9 / 3))
    assert found.consistency[0] == pytest.approx(0.6 * similarity + 0.4 * agreement, abs=1e-6)
    assert found.reflection[0] == pytest.approx((0.9 + 0.9) / 2)
    assert found.confidence[0] == pytest.approx(0.8 * found.consistency[0] + 0.2 * found.reflection[0])
    assert found.errors == [""]
    assert {a.dtype for a in (found.confidence, found.consistency, found.reflection)} == {np.dtype("float32")}


@pytest.mark.parametrize("order", [("A passage on the Rhine.", "Where does it rise?"), ("Rise where?", "The Rhine.")])
def test_what_one_part_of_the_prompt_makes_as_likely_has_no_gain_wherever_it_stands(order):
    for likely in order:
        engine = Scripted(yes=(likely,))
        found = BSDetector(alpha=0, beta=1)([example("\n\n".join(order), "It rises.")], engine)
        assert found.confidence[0] == pytest.approx(0.5)


def test_the_papers_form_takes_answers_behind_their_explanations_and_counts_equal_ones():
    engine = Scripted(
        answers=(
            ("Check step by step", "It may be."),
            ("Are you really sure", "It is so."),
            ("Where does it rise?", "Snow melts. Answer: The Alps."),
        ),
        yes=("It is so.",),
    )
    settings = BSDetector(alpha=0.8, beta=0.7, similarity=Jaccard(), samples="reasoned", reflection="reasoned")
    found = settings([RHINE, example("Where does it rise?", "the North Sea")], engine)
    np.testing.assert_allclose(found.consistency, [1.0, 0.0], atol=1e-6)
    # P(correct) + P(not sure) / 2, after the first explanation and after the second
    reflection = (0.2 + 0.4 / 2 + 0.9 + 0.05 / 2) / 2
    np.testing.assert_allclose(found.reflection, [reflection] * 2, atol=1e-6)
    np.testing.assert_allclose(found.confidence, [0.7 + 0.3 * reflection, 0.3 * reflection], atol=1e-6)


def test_plain_samples_answer_the_rows_own_prompt_and_their_result_is_compared():
    pytest.importorskip("math_verify")
    engine = Scripted(answers=(("Reply with", "7"), ("How many eggs?", "5 and 3 make 8.")), yes=("How many eggs?",))
    settings = BSDetector.math()
    found = settings([example("How many eggs?", "3+5 = 8\n#### 8"), example("How many eggs?", "#### 9"),
                      example("How many eggs?", "Some.")], engine)  # fmt: skip
    np.testing.assert_allclose(found.similarity, [1, 0, math.nan])
    np.testing.assert_allclose(found.confidence, [0.7 + 0.3 * 0.9, 0.3 * 0.9, math.nan], atol=1e-6)
    assert found.errors == ["", "", "the similarity cannot compare the response with the model's own answers"]
    reading = replace(settings, alpha=0)([example("How many eggs?", "#### 8")], engine)
    assert reading.agreement[0] == pytest.approx(1 / (1 + math.exp(-3 * 1.9 / 3)))  # of the plain prompt over none


@pytest.mark.parametrize("result", ["2 + 2 = 4\n#### 4", "so it is $\\boxed{4}$"])
def test_solutions_are_told_of_the_form_that_compares_their_results(result):
    pytest.importorskip("math_verify")
    solutions = [example("What is 2 + 2?", result), example("What is 1 + 1?", result), RHINE]
    with pytest.warns(UserWarning, match=r"BSDetector\.math\(\)"):
        BSDetector(k=1)(solutions, Scripted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BSDetector(k=1)([*solutions, RHINE], Scripted())  # not most of them
        BSDetector.math(k=1)(solutions, Scripted())


def test_paper_is_the_papers_configuration():
    paper = BSDetector.paper()
    assert (paper.k, paper.temperature, paper.alpha, paper.beta) == (5, 1.0, 0.8, 0.7)
    assert (paper.samples, paper.reflection) == ("reasoned", "reasoned")
    assert paper.similarity == NLI("microsoft/deberta-large-mnli")


@pytest.mark.parametrize("form", ["direct", "reasoned"])
def test_one_long_example_fails_alone_and_leaves_the_others_as_they_were(form):
    settings = BSDetector(similarity=Jaccard(), samples=form, reflection=form)
    short = [example(f"Question {i}?", f"{i}") for i in range(4)]
    alone = settings(short, Scripted())
    mixed = settings([*short[:2], example("x" * 20_000, "y"), *short[2:]], Scripted())
    assert "20" in mixed.errors[2]
    assert "the limit is 10000" in mixed.errors[2]
    assert mixed.errors[:2] + mixed.errors[3:] == [""] * 4
    for part in ("confidence", "consistency", "reflection"):
        values = getattr(mixed, part)
        assert math.isnan(values[2])
        assert np.delete(values, 2).tobytes() == getattr(alone, part).tobytes()


def test_a_response_that_is_too_long_in_one_of_its_questions_only():
    response = "y" * 9_950  # fits as an answer, not inside the reflection question
    found = BSDetector()([example("Why?", response), example("Why?", "no")], Scripted())
    assert "the limit is 10000" in found.errors[0]
    assert found.errors[1] == ""
    assert not math.isnan(found.confidence[1])


@dataclass(frozen=True)
class Unsure(Scripted):
    def choose(self, prompts, labels):
        return np.full((len(prompts), len(labels)), np.nan, dtype=np.float32)


@dataclass(frozen=True)
class Blind:
    def __call__(self, pairs, engine):
        return np.full(len(pairs), np.nan, dtype=np.float32)


def test_missing_parts_give_nan_and_a_reason():
    found = BSDetector()([RHINE], Unsure())
    assert math.isnan(found.confidence[0])
    assert not math.isnan(found.consistency[0])
    assert "none of its labels" in found.errors[0]
    found = BSDetector(similarity=Blind())([RHINE], Scripted())
    assert math.isnan(found.confidence[0])
    assert "similarity cannot compare" in found.errors[0]


@dataclass(frozen=True)
class Counting(Scripted):
    def answer(self, asks):
        COUNTED.append((len(asks.generate), len(asks.choose), len(asks.read)))
        return super().answer(asks)


COUNTED: list[tuple[int, int, int]] = []


@pytest.mark.parametrize(
    "settings, asked",
    [
        ({}, (1, 2, 3)),
        ({"alpha": 1.0}, (1, 2, 0)),
        ({"alpha": 0.0}, (0, 2, 3)),
        ({"beta": 1.0}, (1, 0, 3)),
        ({"beta": 0.0}, (0, 2, 0)),
    ],
)
def test_what_has_no_weight_is_not_asked_for(settings, asked):
    COUNTED.clear()
    found = BSDetector(**settings)([RHINE], Counting())
    assert [tuple(map(sum, zip(*COUNTED, strict=True)))] == [asked]
    assert found.errors == [""]
    assert 0 <= found.confidence[0] <= 1


def test_the_papers_form_asks_in_three_batches():
    COUNTED.clear()
    BSDetector(samples="reasoned", reflection="reasoned")([RHINE, example("Who?", "Ada")], Counting())
    assert COUNTED == [(2, 0, 0), (4, 0, 0), (0, 4, 0)]  # samples; two explanations a row; two verdicts a row


@dataclass(frozen=True)
class Dear(Scripted):
    def generate(self, prompts, **settings):
        raise AssertionError("paid for what the other questions refuse")


def test_engines_refuse_before_they_write_and_the_reasons_come_through_processes():
    asks = Asks(generate=[RHINE.prompt], choose=[example("x" * 20_000, "").prompt, RHINE.prompt], labels=["Yes", "No"])
    with pytest.raises(PromptError, match="1 prompts cannot be answered; the first, number 1") as found:
        Dear().answer(asks)
    assert pickle.loads(pickle.dumps(found.value)).reasons == found.value.reasons


@dataclass(frozen=True)
class Overflowing(Scripted):
    def logprobs(self, prompts, responses):
        return [np.full(3, np.nan, dtype=np.float32)] * len(prompts)


def test_probabilities_that_are_not_numbers_are_not_blamed_on_the_similarity():
    assert "dtype='float32'" in BSDetector()([RHINE], Overflowing()).errors[0]


@dataclass(frozen=True)
class Rambling(Scripted):
    """Says one letter, which is a token, up to the limit."""

    def generate(self, prompts, *, n=1, temperature=0.0, max_tokens=512):
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        return [["x" * limit] * n for limit in limits]


def test_samples_are_cut_off_once_they_cannot_be_the_response():
    seen = []

    def similarity(pairs, engine):
        seen.extend((response, len(sample)) for response, sample in pairs)
        return np.ones(len(pairs), dtype=np.float32)

    rows = [example("Why?", "the Alps"), example("Who?", "東京"), example("How?", "y" * 1000)]
    BSDetector(k=1, similarity=similarity)(rows, Rambling())
    assert seen == [("the Alps", 40), ("東京", 38), ("y" * 1000, 256)]
    seen.clear()
    BSDetector(k=1, similarity=similarity, samples="reasoned")(rows, Rambling())
    assert [size for _, size in seen] == [256] * 3


def test_nothing_in_nothing_out():
    found = BSDetector()([], Scripted())
    assert found.errors == []
    assert found.confidence.shape == (0,)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"alpha": 2}, "alpha is 2"),
        ({"temperature": -1}, "temperature=-1"),
        ({"k": 0}, "k=0"),
        ({"samples": "long"}, "samples is 'long'; expected 'direct' or 'plain' or 'reasoned'"),
        ({"reflection": "plain"}, "reflection is 'plain'; expected 'direct' or 'reasoned'"),
    ],
)
def test_settings_are_checked(settings, match):
    with pytest.raises(ValueError, match=match):
        BSDetector(**settings)


def test_both_forms_run_on_a_real_engine(tiny):
    from clear_datasets.engines.transformers import Transformers

    engine = Transformers(tiny, dtype="float32")
    rows = [example(f"Passage.\n\nQuestion {i}?", f"answer {i}") for i in range(3)]
    direct = BSDetector(k=2, max_tokens=8)(rows, engine)
    assert all((0 <= c <= 1) or e for c, e in zip(direct.confidence, direct.errors, strict=True))
    assert ((direct.consistency >= 0) & (direct.consistency <= 1)).all()
    assert direct.consistency.tobytes() == BSDetector(k=2, max_tokens=8)(rows, engine).consistency.tobytes()


class Twice(Jaccard):
    """Compares both ways, and gives both."""

    def __call__(self, pairs, engine):
        return np.repeat(super().__call__(pairs, engine), 2)


def test_a_similarity_with_too_many_numbers_is_refused():
    with pytest.raises(ValueError, match=r"Twice.* gave 4 numbers for 2 pairs; expected one each"):
        BSDetector(k=2, similarity=Twice())([RHINE], Scripted())
    with pytest.raises(ValueError, match=r"Twice.* gave 2 numbers for 1 pairs"):
        Adaptive(BSDetector(k=2, similarity=Twice()), 0.5, 0.5)([RHINE], Scripted())


@dataclass(frozen=True)
class Unread(Scripted):
    """As a server: log-probabilities are not given."""

    reads = False


def test_a_similarity_without_weight_is_not_asked():
    def dear(pairs, engine):
        raise AssertionError("asked")

    settings = BSDetector(alpha=0.0, beta=0.6, k=4, similarity=dear)
    engine = Unread(answers=(("rise?", "the Alps"),))
    found = settings([RHINE, example("Where does it rise?", "at sea")], engine)
    assert found.consistency.tolist() == [1, 0]  # equal samples alone
    assert found.errors == ["", ""]
    reasoned = replace(settings, samples="reasoned")([RHINE], Scripted(answers=(("rise?", "So. Answer: the Alps"),)))
    assert reasoned.consistency.tolist() == [1]
    bounded = Adaptive(settings, 0.3, 0.3)([RHINE, example("Where does it rise?", "at sea")], engine)
    assert not np.isnan(bounded.least).any()
    assert bounded.most[1] < 0.3 < bounded.least[0]


@dataclass(frozen=True)
class HalfOverflowing(Scripted):
    """The probabilities of the second part of a prompt are no numbers."""

    def logprobs(self, prompts, responses):
        return [np.full(3, np.nan if i == 2 else -1.0, dtype=np.float32) for i in range(len(prompts))]


def test_what_is_no_number_in_any_part_gives_no_score():
    found = BSDetector()([RHINE], HalfOverflowing())
    assert math.isnan(found.confidence[0])
    assert "not numbers: try dtype='float32'" in found.errors[0]
