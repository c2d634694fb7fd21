"""Adaptive sampling decides as all samples do, and asks for fewer."""

from __future__ import annotations

import math
import tracemalloc
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Value
from datasets.fingerprint import Hasher
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_datasets import BSDetector, Clear, above, curated, decide, score_to_keep, threshold
from clear_datasets.adaptive import Adaptive
from clear_datasets.decide import bracket
from clear_datasets.engines import Asks, PromptError
from clear_datasets.engines.cache import COUNTS, Cached, close_stores
from clear_datasets.engines.transformers import Transformers
from clear_datasets.formats import Example
from tests.conftest import Scripted, _text
from tests.engines.test_cache import Counting

NAN = math.nan


@dataclass(frozen=True)
class Numbered(Scripted):
    """Its samples tell their number by marks of exclamation, and of some prompts and numbers they say "same"."""

    same: tuple[tuple[bool, ...], ...] = ()  # [prompts][k]
    unsure: tuple[str, ...] = ()
    mute: tuple[int, ...] = ()  # prompts that it refuses to write to

    def _generated(self, asks):
        groups = [int(_text(p).partition("?")[0].removeprefix("Q")) for p in asks.generate]
        if refused := {i: "no room" for i, group in enumerate(groups) if group in self.mute}:
            raise PromptError(refused)
        return [
            [("same " if self.same[group][i] else "other ") + "!" * (i + 1) for i in range(first, asks.n)]
            for group, first in zip(groups, asks.firsts, strict=True)
        ]

    def choose(self, prompts, labels):
        found = super().choose(prompts, labels)
        found[[any(u in _text(p) for u in self.unsure) for p in prompts]] = NAN
        return found


@dataclass(frozen=True)
class Server(Numbered):
    reads: ClassVar[bool] = False


@dataclass(frozen=True)
class Table:
    """Similarity by the row, which is the number of question marks of the response, and the number of the sample."""

    values: tuple[tuple[float, ...], ...]  # [rows][k]

    def __call__(self, pairs, engine):
        return np.array([self.values[r.count("?")][s.count("!") - 1] for r, s in pairs], dtype=np.float32)


@dataclass(frozen=True)
class Total(Table):
    total: ClassVar[bool] = True


@st.composite
def runs(draw):
    """Rows of which some share a prompt, an engine, and an estimator."""
    k, rows = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    groups = draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))
    value = st.floats(0, 1, width=32) | st.sampled_from([0.0, 1.0, NAN])
    weight = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])
    similarity = draw(st.sampled_from([Table, Total]))
    values = st.tuples(*[value] * k)
    if similarity is Total:
        values = st.tuples(*[st.floats(0, 1, width=32)] * k) | st.just((NAN,) * k)
    table = draw(st.lists(values, min_size=rows, max_size=rows))
    engine = draw(st.sampled_from([Numbered, Server]))(
        yes=tuple(draw(st.sets(st.sampled_from(["Q0?", "Q1?", "Q2?", "same ?"])))),
        unsure=tuple(draw(st.sets(st.sampled_from(["Q3?", "same ????"]), max_size=1))),
        same=tuple(draw(st.tuples(*[st.booleans()] * k)) for _ in range(4)),
        limit=draw(st.sampled_from([250, 10_000])),
        mute=draw(st.sampled_from([(), (), (1,)])),
    )
    form = draw(st.sampled_from(["direct", "plain", "reasoned"]))
    detector = BSDetector(draw(weight), draw(weight), k, similarity=similarity(tuple(table)), samples=form)
    examples = [
        Example([{"role": "user", "content": f"Q{group}?"}], "same " + "?" * i + " " * draw(st.sampled_from([0, 200])))
        for i, group in enumerate(groups)
    ]
    return examples, engine, detector


@settings(max_examples=150)
@given(run=runs(), gamma=st.floats(-0.1, 1.1) | st.integers(0, 5), rounds=st.sampled_from([(), (1,), (1, 2), (3,)]))
def test_bounds_hold_and_decisions_are_those_of_all_samples(run, gamma, rounds):
    examples, engine, detector = run
    full = detector(examples, engine)
    if isinstance(gamma, int):  # exactly the confidence of a row
        gamma = float(np.nan_to_num(full.confidence[gamma % len(examples)]))
    found = Adaptive(detector, gamma, gamma, rounds)(examples, engine)
    assert found.errors == full.errors
    scored = ~np.isnan(full.confidence)
    assert (scored == ~np.isnan(found.confidence)).all()
    least, most, estimate, score = (
        x[scored].astype(float) for x in (found.least, found.most, found.confidence, full.confidence)
    )
    assert ((least <= score) & (score <= most) & (least <= estimate) & (estimate <= most)).all()
    sure = (least > gamma) | (most <= gamma)
    assert ((estimate > gamma) == (score > gamma))[sure].all()
    if not rounds:
        assert sure.all()
    assert (estimate == score)[found.drawn[scored] == detector.k].all()


def dataset(examples):
    return Dataset.from_dict({"prompt": [e.prompt[0]["content"] for e in examples],
                              "response": [e.response for e in examples]})  # fmt: skip


@settings(max_examples=40)
@given(run=runs(), keep=st.floats(0, 1) | st.just(0.5))
def test_the_threshold_and_its_decisions_are_those_of_all_samples(run, keep):
    examples, engine, detector = run
    clear = Clear(engine=engine, confidence=detector)
    ds = dataset(examples)
    fewer, full = score_to_keep(ds, clear, keep), ds.map(clear.score, batched=True)
    np.testing.assert_array_equal(np.isnan(fewer["clear_confidence"][:]), np.isnan(full["clear_confidence"][:]))
    assert fewer["clear_error"][:] == full["clear_error"][:]
    if all(full["clear_error"][:]):
        with pytest.raises(ValueError, match="none of the rows has a score"):
            threshold(fewer, keep)
        return
    gamma = threshold(full, keep)
    assert threshold(fewer, keep) == gamma
    decisions = [x.map(decide(gamma), batched=True)["clear_decision"][:] for x in (fewer, full)]
    assert decisions[0] == decisions[1]


@given(
    rows=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3).map(sorted), min_size=1, max_size=12),
    keep=st.floats(0, 1),
    other=st.randoms(),
)
def test_rows_outside_of_a_bracket_may_be_anything_that_they_may_be(rows, keep, other):
    least, score, most = ([row[i] / 12 for row in rows] for i in range(3))
    columns = {"clear_confidence": score, "clear_least": least, "clear_most": most}
    gamma = threshold(Dataset.from_dict({"clear_confidence": score}), keep)
    found = bracket(Dataset.from_dict(columns), keep)
    assert found.low <= gamma <= found.high or round(keep * len(rows)) == len(rows)
    stopped = [u < found.low or low > found.high for low, u in zip(least, most, strict=True)]
    guesses = [low + other.random() * (u - low) for low, u in zip(least, most, strict=True)]
    for name, partial in (("clear_confidence", guesses), ("clear_least", least), ("clear_most", most)):
        columns[name] = [p if stop else x for p, stop, x in zip(partial, stopped, score, strict=True)]
    fewer = Dataset.from_dict(columns)
    assert threshold(fewer, keep) == gamma
    assert above(gamma)(fewer[:]) == [x > gamma for x in score]


ROWS = {"question": [f"Where is {i}?" for i in range(20)], "answer": [f"at {i}" for i in range(20)]}


@dataclass(frozen=True)
class Graded(Counting):
    """Says what the rows say, and is the surer of it the later they come."""

    answers: tuple[tuple[str, str], ...] = tuple((f"Where is {i}?", f"at {i}") for i in range(20))

    def logprobs(self, prompts, responses):
        found = super().logprobs(prompts, responses)
        asked = [_text(p).startswith("Where") for p in prompts]
        surer = [(int(r.removeprefix("at ")) - 10) * 0.2 if a else 0.0 for a, r in zip(asked, responses, strict=True)]
        return [values + np.float32(more) for values, more in zip(found, surer, strict=True)]


FEW = BSDetector(alpha=0.2, k=8)


@pytest.fixture
def asked():
    Counting.asked.clear()
    return Counting.asked


@pytest.mark.parametrize("cache", [None, False])
def test_rows_that_are_sure_ask_for_no_more_samples(asked, cache):
    clear = Clear(engine=Graded(), gamma=0.5, adaptive=True, confidence=FEW, cache=cache)
    found = clear.score(ROWS)
    assert 20 <= asked["samples"] < 20 * 8 / 2
    assert (asked["labels"], asked["texts"]) == (40, 40)  # once, whatever the rounds
    once = asked["samples"]
    full = replace(clear, adaptive=False).score(ROWS)
    assert asked["samples"] == once + 20 * 8 - (once if cache is None else 0)
    assert above(0.5)(found) == above(0.5)(full)


def test_a_threshold_needs_fewer_samples_than_all_in_every_kind_of_dataset(asked):
    ds = Dataset.from_dict(ROWS)
    clear = Clear(engine=Graded(), confidence=FEW)
    scored = score_to_keep(ds, clear, batch_size=7)
    assert asked["samples"] < 20 * 8 * 0.6
    assert scored.features == Clear.features(ds.features, adaptive=True)
    once = asked.copy()
    stream = score_to_keep(ds.to_iterable_dataset(), clear, batch_size=7)
    splits = score_to_keep(DatasetDict(a=ds.select(range(7)), b=ds.select(range(7, 20))), clear)
    assert threshold(scored) == threshold(stream) == threshold(splits)
    assert asked == once
    full = ds.map(clear.score, batched=True, batch_size=7)
    assert threshold(scored) == threshold(full)
    kept = [curated(x.map(decide(threshold(full)), batched=True))["question"][:] for x in (scored, full)]
    assert kept[0] == kept[1]


def test_a_threshold_that_rows_are_not_known_well_enough_for_is_refused(asked):
    clear = Clear(engine=Graded(), gamma=0.99, adaptive=True, confidence=FEW)
    scored = Dataset.from_dict(ROWS).map(clear.score, batched=True)
    with pytest.raises(ValueError, match=r"rows that adaptive sampling stopped .* keep=0.5"):
        threshold(scored)
    middle = float(np.median(scored["clear_confidence"][:]))
    with pytest.raises(ValueError, match="adaptive sampling stopped a row that may lie on either side"):
        scored.filter(above(middle))
    with pytest.raises(ValueError, match="adaptive sampling stopped a row that may lie on either side"):
        scored.map(decide(middle), batched=True)
    assert len(scored.filter(above(0.99))) == 0
    again = scored.map(replace(clear, adaptive=False).score, batched=True)
    assert again["clear_least"][:] == again["clear_confidence"][:] == again["clear_most"][:]
    assert len(again.filter(above(threshold(again)))) == 10


@pytest.mark.parametrize("form", ["direct", "reasoned"])
def test_samples_are_the_first_of_all_also_of_rows_that_share_a_prompt(tiny, form):
    """Also where the rows' limits differ: the longest one's is that of all, whichever of them goes on."""
    ds = Dataset.from_dict({
        "question": [f"Where is {i // 2}?" for i in range(12)],
        "answer": [f"at {i}" + " and so on" * (i % 2) for i in range(12)],
    })  # fmt: skip
    detector = BSDetector(k=6, max_tokens=20, samples=form, beta=1)
    clear = Clear(engine=Transformers(tiny, dtype="float32"), confidence=detector)
    before = COUNTS.asked
    fewer = score_to_keep(ds, clear)
    drawn = COUNTS.asked - before
    full = ds.map(clear.score, batched=True)
    every = COUNTS.asked - before
    assert every == 6 * 6 + (len(ds) * 2 if form == "direct" else 0)  # none was drawn anew
    assert drawn <= every
    gamma = threshold(full)
    assert threshold(fewer) == gamma
    assert above(gamma)(fewer[:]) == above(gamma)(full[:])


def test_settings_and_state():
    plain = Clear("m", gamma=0.5)
    adaptive = replace(plain, adaptive=True)
    assert Hasher.hash(plain.score) != Hasher.hash(adaptive.score) != Hasher.hash(replace(adaptive, gamma=0.6).score)
    assert adaptive.judge == plain.judge  # preferences are of all samples
    with pytest.raises(TypeError, match="the bounds of BSDetector alone"):
        Adaptive(lambda examples, engine: None, 0, 1)
    with pytest.raises(ValueError, match="leave Clear"):
        score_to_keep(Dataset.from_dict(ROWS), replace(plain, cache=False))


def test_a_first_batch_without_any_score_does_not_fix_the_types():
    ds = Dataset.from_dict({"prompt": ["", "Where?"], "response": ["", "Alps"]})
    scored = ds.map(Clear(engine=Scripted(), gamma=0.5, adaptive=True).score, batched=True, batch_size=1)
    assert scored.features["clear_least"] == Value("float32")
    assert math.isnan(scored[0]["clear_most"])


def test_a_cached_engine_gives_the_samples_that_are_asked_for(asked, user):
    engine = Cached(Numbered(same=((True, False, True),)))
    asks = Asks([user("Q0?")], n=3, temperature=1.0)
    assert engine.answer(replace(asks, first=[1])).generated == [["other !!", "same !!!"]]
    close_stores()
    assert engine.answer(asks).generated == [["same !", "other !!", "same !!!"]]


def test_one_long_prompt_takes_no_memory_for_every_row():
    prompts = ["x" * 400_000, *(f"Q{i}?" for i in range(199))]
    examples = [Example([{"role": "user", "content": p}], "same ?") for p in prompts]
    adaptive = Adaptive(BSDetector(k=3), 0.5, 0.5)
    tracemalloc.start()
    found = adaptive(examples, Scripted())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 50_000_000  # not 200 * 400,000 * 4
    assert [bool(e) for e in found.errors] == [True] + [False] * 199


@pytest.mark.parametrize(
    "how, message",
    [
        ({"remove_columns": ["question"]}, "remove_columns cannot be set: each pass over the rows goes on from"),
        ({"input_columns": ["question"]}, "input_columns cannot be set"),
        ({"with_indices": True, "batched": True}, "batched and with_indices cannot be set"),
        ({"new_fingerprint": "x"}, "new_fingerprint needs load_from_cache_file=False here"),
        ({"cache_file_name": "x.arrow"}, "cache_file_name needs load_from_cache_file=False here"),
    ],
)
def test_what_does_not_go_with_several_passes_is_refused_before_the_first(asked, how, message):
    with pytest.raises(TypeError, match=message):
        score_to_keep(Dataset.from_dict(ROWS), Clear(engine=Graded(), confidence=FEW), **how)
    assert not asked


def test_a_result_may_be_named_where_no_pass_takes_it_for_its_own(tmp_path):
    Dataset.from_dict(ROWS).save_to_disk(tmp_path / "rows")
    ds, clear = Dataset.load_from_disk(str(tmp_path / "rows")), Clear(engine=Graded(), confidence=FEW)
    wanted = score_to_keep(ds, clear)
    for how in ({"new_fingerprint": "x"}, {"cache_file_name": str(tmp_path / "x.arrow")}):
        scored = score_to_keep(ds, clear, load_from_cache_file=False, **how)
        assert scored[:] == wanted[:]
        assert threshold(scored) == threshold(wanted)
