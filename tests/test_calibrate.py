"""calibrate: noise in one's own rows, and weights that find it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, concatenate_datasets

from clear_datasets import BSDetector, Clear, Columns, decide, noise
from clear_datasets.calibrate import calibrate
from clear_datasets.engines import Messages
from clear_datasets.intervals import interval
from tests.conftest import Scripted

N = 150
ROWS = Dataset.from_dict(
    {
        "question": [f"What is {i}?" for i in range(N)],
        "answer": [f"thing{i} kind{i} and{i} more{i}" for i in range(N)],
    }
)
KNOWS = tuple((f"What is {i}?", ROWS["answer"][i]) for i in range(N) if i % 3)  # the right answer, to two of three


@dataclass(frozen=True)
class Contrary(Scripted):
    """Calls wrong targets right, and right ones wrong."""

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        texts = ["\n".join(m["content"] for m in p) for p in prompts]
        right = [any(q in t and a in t for q, a in zip(ROWS["question"], ROWS["answer"], strict=True)) for t in texts]
        first = np.where(right, 0.1, 0.9).astype(np.float32)
        return np.stack([first, *[(1 - first) / (len(labels) - 1)] * (len(labels) - 1)], axis=1)


def test_signals_that_tell_nothing_have_no_weight_and_are_named():
    found = calibrate(Clear(engine=Scripted(answers=KNOWS)), ROWS, noise=["swap"], rows=N)
    assert found.signals["direct, Jaccard: similarity"][1] > 0.7
    assert found.signals["direct, Jaccard: reflection"][0] == found.signals["direct, Jaccard: agreement"][0] == 0.5
    assert (found.clear.confidence.alpha, found.clear.confidence.beta) == (1, 1)
    assert found.clear.confidence.k == 5
    np.testing.assert_allclose(found.rows["clear_consistency"][:], found.rows["clear_confidence"][:])  # beta is 1
    named = "\n".join(found.notes)
    assert "reflection of direct, Jaccard tells nothing" in named
    assert "agreement of direct, Jaccard tells nothing" in named
    assert "similarity of" not in named


def test_a_signal_that_is_worse_than_chance_loses_its_weight():
    clear = Clear(engine=Contrary(answers=KNOWS), confidence=BSDetector(beta=0.3))
    before = calibrate(clear, ROWS, noise=["swap"], rows=N).signals
    assert before["direct, Jaccard: reflection"][0] == 0
    assert before["direct, Jaccard: confidence"][0] < 0.5 < 0.75 < before["confidence, as it is now"][0]


def test_a_model_that_knows_nothing_is_said_to_know_nothing():
    found = calibrate(Clear(engine=Scripted(answers=())), ROWS, noise=["swap"], rows=N)
    assert all(low <= 0.5 for _, low, _ in found.signals.values())
    named = "\n".join(found.notes)
    for part in ("similarity", "agreement", "reflection"):
        assert f"{part} of direct, Jaccard tells nothing" in named
    assert "do not use the scores of this model on these rows" in named


def test_samples_that_tell_nothing_leave_reflection_alone():
    class Judge(Contrary):
        def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
            return super().choose(prompts, labels)[:, ::-1]  # and says so, for once

    found = calibrate(Clear(engine=Judge(answers=())), ROWS, noise=["swap"], rows=N)
    assert found.clear.confidence.beta == 0
    assert found.signals["confidence, as it is now"][0] == found.signals["direct, Jaccard: reflection"][0] == 1


def test_what_is_predicted_for_a_threshold_holds_on_other_rows():
    clear = Clear(engine=Scripted(answers=KNOWS))
    found = calibrate(clear, ROWS, noise=["swap", "truncate"], rows=N, fraction=0.3)
    assert {n for n in found.rows["noise"] if n} == {"swap", "truncate"}
    others = noise.swap(ROWS, 0.3, seed=7).map(found.clear.score, batched=True)
    kinds = {name: found.signals[f"confidence, as it is now: {name}"] for name in ("swap", "truncate")}
    assert min(v[0] for v in kinds.values()) <= found.signals["confidence, as it is now"][0]
    assert max(v[0] for v in kinds.values()) >= found.signals["confidence, as it is now"][0]
    least = found.thresholds[0]
    count = sum(n != "" for n in found.rows["noise"])
    assert least.kept < 0.4
    assert least.recall == pytest.approx((1, 1 / (1 + 1.96**2 / count), 1))  # all of them, which is no certainty
    decided = others.map(decide(found.gamma), batched=True)
    wrong = [d != "keep" for d, n in zip(decided["clear_decision"], decided["noise"], strict=True) if n]
    right = [d != "keep" for d, n in zip(decided["clear_decision"], decided["noise"], strict=True) if not n]
    assert np.mean(wrong) - np.mean(right) > 0.5


def test_more_estimators_are_tried_and_taken_only_where_they_are_better():
    clear = Clear(engine=Scripted(answers=KNOWS), confidence=BSDetector(similarity=_nothing))
    found = calibrate(clear, ROWS, noise=["swap"], rows=N, among=[BSDetector()])
    assert found.clear.confidence.similarity == BSDetector().similarity
    assert "better by" in found.notes[-1]
    same = calibrate(Clear(engine=Scripted(answers=KNOWS)), ROWS, noise=["swap"], rows=N, among=[BSDetector(k=9)])
    assert {"direct, Jaccard: similarity", "direct, Jaccard (2): similarity"} <= set(same.signals)
    assert same.clear.confidence.k == 5
    assert "not better beyond the interval" in same.notes[-1]


class _Mine:
    """An estimator that has no parts."""


def test_rows_that_cannot_be_read_and_scores_of_earlier_runs_do_not_matter():
    clear = Clear(engine=Scripted(answers=KNOWS))
    empty = Dataset.from_dict({"question": ["", "Who?"], "answer": ["x", None]})
    rows = concatenate_datasets([ROWS, empty]).map(clear.score, batched=True)
    found = calibrate(clear, rows, noise=["swap"], rows=N + 2)
    assert found.notes[0].startswith(f"without 2 of {N + 2} rows; the first one: column")
    assert len(found.rows) == N


def _nothing(pairs, engine):
    return np.full(len(pairs), 0.5, dtype=np.float32)


def test_noise_that_the_rows_do_not_allow_is_left_out():
    found = calibrate(Clear(engine=Scripted(answers=KNOWS)), ROWS, noise=["wrong_sentence", "swap"], rows=60)
    assert found.notes[0].startswith("without wrong_sentence: ")
    with pytest.raises(ValueError, match="none of the noises wrong_sentence, corrupt_json"):
        calibrate(Clear(engine=Scripted()), ROWS, noise=["wrong_sentence", "corrupt_json"])
    with pytest.raises(ValueError, match="none of the rows could be scored: the prompt has"):
        calibrate(Clear(engine=Scripted(limit=3)), ROWS, noise=["swap"])
    with pytest.raises(ValueError, match="there is no noise typos; known are wrong_sentence, other_answer, swap"):
        calibrate(Clear(engine=Scripted()), ROWS, noise=["swap", "typos"])
    with pytest.raises(TypeError, match="_Mine has none"):
        calibrate(Clear(engine=Scripted(), confidence=_Mine()), ROWS)
    with pytest.raises(ValueError, match="have 0 wrong ones"):
        calibrate(Clear(engine=Scripted()), ROWS, noise=["swap"], rows=20, fraction=0.01)
    named = Dataset.from_dict({"q": ROWS["question"], "a": ROWS["answer"]})
    form = Columns("q", "a")
    assert calibrate(Clear(engine=Scripted(answers=KNOWS), format=form), named, noise=["swap"]).gamma > 0


def test_a_passage_of_another_name_gets_its_noise():
    passages = [f"Nothing is known of {i} there. {row['answer']}." for i, row in enumerate(ROWS)]
    named = Dataset.from_dict({"q": ROWS["question"], "a": ROWS["answer"], "passage": passages})
    clear = Clear(engine=Scripted(answers=KNOWS), format=Columns("q", "a", context="passage"))
    found = calibrate(clear, named, noise=["wrong_sentence"], rows=N)
    wrong = {row["a"] for row in found.rows if row["noise"]}
    assert len(wrong) == N // 5
    assert all(text.startswith("Nothing is known of") for text in wrong)


def test_an_estimator_that_scores_few_rows_is_not_taken_for_a_good_one():
    def few(pairs, engine):
        return np.array([float(a == b) if "thing1" in a else np.nan for a, b in pairs], dtype=np.float32)

    own, some = BSDetector(k=1), BSDetector(k=1, samples="plain", similarity=few, alpha=1.0)
    found = calibrate(Clear(engine=Scripted(answers=KNOWS), confidence=own), ROWS, noise=["swap"], rows=N, among=[some])
    assert found.signals["plain, function (2): similarity"][0] > found.signals["direct, Jaccard: similarity"][0]
    assert found.clear.confidence.similarity == own.similarity
    assert not np.isnan(found.rows["clear_confidence"][:]).any()
    assert "of 150 rows have no score of plain, function (2): they tell nothing for it" in "\n".join(found.notes)


def test_two_wrong_rows_in_their_place_prove_nothing():
    answers = tuple((q, a) for q, a in zip(ROWS["question"], ROWS["answer"], strict=True))
    found = calibrate(Clear(engine=Scripted(answers=answers)), ROWS, noise=["swap"], rows=20, fraction=0.1)
    value, low, high = found.signals["direct, Jaccard: similarity"]
    assert (value, high) == (1, 1)
    assert low == pytest.approx(2 / (2 + 1.96**2))
    assert "no signal tells anything here: 2 rows of a kind are few" in found.notes
    scores, good = np.arange(20.0), np.ones(20, dtype=bool)
    good[[0, 2]] = False  # one pair in the wrong order does not make it surer
    assert interval(scores, good)[1] == pytest.approx(2 / (2 + 1.96**2))
    assert interval(np.arange(200.0), np.arange(200) > 90)[1] == pytest.approx(91 / (91 + 1.96**2))
    assert "similarity of direct, Jaccard tells nothing here: AUROC 1.000" in "\n".join(found.notes)


def test_auroc_counts_ties_half_whatever_the_number_of_rows():
    draw = np.random.default_rng(0)
    scores, good = draw.integers(0, 9, 300) / 8, draw.random(300) < 0.3
    scores[:9] = np.nan
    right, wrong = scores[good & ~np.isnan(scores)], scores[~good & ~np.isnan(scores)]
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    assert noise.auroc(scores, good) == pytest.approx(np.mean(pairs))
    many = draw.random(1_000_000)
    assert noise.auroc(many, many > 0.5) == 1
    assert np.isnan(noise.auroc([0.1, 0.2], [True, True]))


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type for any JSON")
def test_chats_are_told_by_their_values_as_they_are_when_they_are_scored():
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in ROWS
    ]
    chats = Dataset.from_dict({"conversations": turns}, features=Features({"conversations": List(datasets.Json())}))
    clear = Clear(engine=Scripted(answers=KNOWS))
    assert not any(chats.map(clear.score, batched=True)["clear_error"][:])
    found = calibrate(clear, chats, noise=["swap"], rows=N)
    assert len(found.rows) == N
    assert found.signals["direct, Jaccard: similarity"][1] > 0.7


def test_rows_of_which_none_can_be_read_are_refused_with_the_reason():
    empty = Dataset.from_dict({"question": ["", ""], "answer": ["x", "y"]})
    with pytest.raises(ValueError, match="none of the 2 rows can be read; the first: column 'question' is empty"):
        calibrate(Clear(engine=Scripted()), empty)
    with pytest.raises(ValueError, match="none of the 0 rows can be read"):
        calibrate(Clear(engine=Scripted()), empty.select([]))
