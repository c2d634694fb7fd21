from __future__ import annotations

import io
import math
import pickle
import sys
import warnings

import datasets
import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, Features, Image, IterableDatasetDict, Value
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st

from clear_datasets import Chat, Clear, Columns, above, curated, decide, restore, threshold
from clear_datasets.apply import OURS
from clear_datasets.batches import Batch
from tests.conftest import Scripted

NAN = float("nan")


def scored(values, errors=None):
    return Dataset.from_dict(
        {"id": list(range(len(values))), "clear_confidence": values, "clear_error": errors or [""] * len(values)}
    )


@given(
    values=st.lists(st.floats(0, 1, width=32) | st.just(NAN), min_size=1, max_size=30).filter(
        lambda v: any(not math.isnan(x) for x in v)
    ),
    keep=st.floats(0, 1),
)
def test_threshold_keeps_the_share_asked_and_only_ties_make_it_fewer(values, keep):
    finite = [v for v in values if not math.isnan(v)]
    gamma = threshold(scored(values), keep)
    kept = [v for v in finite if v > gamma]
    wanted = round(keep * len(finite))
    assert len(kept) <= wanted
    if len(set(finite)) == len(finite):
        assert len(kept) == wanted
    assert all(v in kept for v in finite if kept and v > min(kept))


def test_the_default_threshold_is_the_median():
    assert threshold(scored([0.25, 0.75, 0.5, 1.0, NAN])) == 0.625
    odd = {n: threshold(scored([i / 8 for i in range(n)])) for n in (3, 5, 7)}
    assert odd == {3: 0.5 / 8, 5: 2.5 / 8, 7: 2.5 / 8}  # beside it: 2 of 3 are kept, 2 of 5, 4 of 7
    splits = DatasetDict(train=scored([0.0, 0.25]), test=scored([0.5, 1.0]))
    assert threshold(splits) == 0.375
    assert threshold(IterableDatasetDict({name: part.to_iterable_dataset() for name, part in splits.items()})) == 0.375


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: threshold(scored([0.5]), keep=1.5), ValueError, "keep is 1.5"),
        (lambda: threshold(scored([NAN])), ValueError, "none of the rows has a score"),
        (
            lambda: threshold(Dataset.from_dict({"a": [1]})),
            ValueError,
            r"no column 'clear_confidence' among 'a'.*map\(",
        ),
        (lambda: threshold(scored([NAN]).to_iterable_dataset()), ValueError, "none of the rows has a score"),
        (
            lambda: threshold(Dataset.from_dict({"a": [1]}).to_iterable_dataset()),
            ValueError,
            r"no column 'clear_confidence' among 'a'.*map\(",
        ),
        (lambda: above(0.5, failed="loose"), ValueError, "failed is 'loose'; expected one of keep, drop, raise"),
        (lambda: curated(scored([0.5])), ValueError, "no column 'clear_decision'"),
        (lambda: Dataset.from_dict({"a": [1]}).filter(above(0.5)), ValueError, "no column 'clear_confidence'"),
        (lambda: scored([NAN], ["empty"]).filter(above(0.5, failed="raise")), ValueError, r"no score \(empty\)"),
        (lambda: scored([0.5]).map(decide(0.5)), TypeError, "batched=True"),
        (lambda: decide(NAN), ValueError, "gamma is nan, a threshold of confidence; expected a number from 0 to 1"),
        (lambda: above(60), ValueError, "gamma is 60, a threshold of confidence; expected a number from 0 to 1"),
        (lambda: above(NAN, column="mine"), ValueError, "gamma is nan"),
        (lambda: threshold(scored([])), ValueError, "the dataset has no rows"),
        (lambda: threshold(scored([0.5]).select([]).map(Clear().score, batched=True)), ValueError, "has no rows"),
        (
            lambda: scored([0.5]).with_format("pandas").map(decide(0.5), batched=True),
            TypeError,
            r"DataFrame: use ds.with_format\(None\)",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("failed, ids", [("keep", [1, 2]), ("drop", [1])])
@pytest.mark.parametrize("batched", [False, True])
def test_above_filters_and_failed_says_what_becomes_of_rows_without_a_score(failed, ids, batched):
    ds = scored([0.5, 0.75, NAN])
    assert ds.filter(above(0.5, failed=failed), batched=batched)["id"][:] == ids
    assert [r["id"] for r in ds.to_iterable_dataset().filter(above(0.5, failed=failed))] == ids


@pytest.mark.parametrize("kind", ["dataset", "dict", "stream"])
def test_decide_and_curated(kind):
    ds = scored([0.5, 0.75, NAN])
    ds = {"dataset": ds, "dict": DatasetDict(train=ds), "stream": ds.to_iterable_dataset()}[kind]
    decided = ds.map(decide(0.6), batched=True)
    first = decided["train"] if kind == "dict" else decided
    assert [r["clear_decision"] for r in first] == ["drop", "keep", "keep"]
    left = curated(decided)
    assert [r["id"] for r in (left["train"] if kind == "dict" else left)] == [1, 2]
    assert [r["clear_decision"] for r in first] == ["drop", "keep", "keep"]


@pytest.mark.parametrize("values", [[None, 0.5, 0.75], np.array([np.nan, 0.5, 0.75], dtype=np.float32)])
def test_scores_as_files_and_streams_give_them(values):
    assert above(0.6)({"clear_confidence": values[0], "clear_error": "empty"}) is True
    assert above(0.6)({"clear_confidence": values[1], "clear_error": None}) is False
    errors = np.array(["empty", "", ""]) if isinstance(values, np.ndarray) else ["empty", "", ""]
    batch = {"clear_confidence": values, "clear_error": errors}
    assert decide(0.6)(batch) == {"clear_decision": ["keep", "drop", "keep"]}


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow"])
def test_every_format_of_a_dataset_is_decided_and_filtered_the_same(kind):
    ds = Dataset.from_dict({**CORRECTED, "clear_agreed": [False, False, True, False, False, False]})
    wanted = ds.map(decide(0.5, agreed="keep"), batched=True)["clear_decision"][:]
    decided = ds.with_format(kind).map(decide(0.5, agreed="keep"), batched=True)
    assert decided.with_format(None)["clear_decision"][:] == wanted
    assert decided.column_names == [*ds.column_names, "clear_decision"]
    kept = ds.with_format(kind).filter(above(0.5), batched=True).with_format(None)
    assert kept["clear_candidate"][:] == ds.filter(above(0.5))["clear_candidate"][:]


def test_thresholds_of_all_and_none_and_of_other_scales_are_taken():
    ds = scored([0.0, 1.0])
    assert ds.filter(above(threshold(ds, 1)))["id"][:] == [0, 1]
    assert [len(ds.filter(above(gamma))) for gamma in (-1, 1.1)] == [2, 0]
    assert len(ds.filter(above(-60, column="id"))) == 2


def test_steps_pickle():
    for step in (above(0.5), decide(0.5)):
        assert pickle.loads(pickle.dumps(step)) == step


CORRECTED = {
    "clear_confidence": [0.9, 0.1, 0.2, NAN, 0.3, 0.9],
    "clear_candidate": ["better", "better", "other", "better", "", "better"],
    "clear_preference": [0.5, 0.9, 0.8, 0.9, NAN, 0.9],
}


@pytest.mark.parametrize("correct, wanted", [
    ("low", ["keep", "replace", "drop", "keep", "drop", "keep"]),
    ("all", ["keep", "replace", "drop", "keep", "drop", "replace"]),
])  # fmt: skip
def test_a_row_is_replaced_only_where_its_candidate_is_confidently_better(correct, wanted):
    ds = Dataset.from_dict(CORRECTED)
    assert ds.map(decide(0.5, correct=correct), batched=True)["clear_decision"][:] == wanted
    assert "replace" not in ds.map(decide(0.5, eta=0.95, correct=correct), batched=True)["clear_decision"][:]
    with pytest.raises(ValueError, match=r"candidates have no preference.*clear\.prefer"):
        ds.remove_columns("clear_preference").map(decide(0.5), batched=True)
    with pytest.raises(ValueError, match="correct is 'most'"):
        decide(0.5, correct="most")
    with pytest.raises(ValueError, match="eta is 80"):
        decide(0.5, eta=80)


@pytest.mark.parametrize("agreed, wanted", [
    ("drop", ["keep", "drop", "drop", "replace", "drop", "drop"]),
    ("keep", ["keep", "keep", "drop", "replace", "drop", "drop"]),
])  # fmt: skip
def test_rows_that_the_writer_agrees_with_are_kept_where_that_is_asked_for(agreed, wanted):
    ds = Dataset.from_dict({"clear_confidence": [0.9, 0.1, 0.1, 0.1, NAN, 0.1],
                            "clear_candidate": ["", "", "", "new", "", "not judged"],
                            "clear_preference": [NAN, NAN, NAN, 0.9, NAN, NAN],
                            "clear_agreed": [False, True, False, False, True, False]})  # fmt: skip
    assert ds.map(decide(0.5, agreed=agreed, failed="drop"), batched=True)["clear_decision"][:] == wanted
    with pytest.raises(ValueError, match="agreed is True"):
        decide(0.5, agreed=True)


TURNS = [
    [{"from": "human", "value": f"What is {i}?", "weight": None}, {"from": "gpt", "value": f" {i}\n", "weight": 0.5}]
    for i in range(6)
]
SOURCES = {
    "columns": ({"prompt": list("abcdef"), "response": [f" {c} é\r\n" for c in "abcdef"], "n": range(6)}, None),
    "named": ({"q": list("abcdef"), "a": list("uvwxyz")}, Columns("q", "a")),
    "completions": (
        {
            "prompt": [[{"role": "user", "content": c}] for c in "abcdef"],
            "completion": [[{"role": "assistant", "content": c, "name": None}] for c in "uvwxyz"],
        },
        None,
    ),
    "chat": ({"conversations": TURNS, "id": list("abcdef")}, None),
    "named chat": ({"talk": TURNS}, Chat("talk", role="from", content="value")),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", SOURCES)
def test_replaced_rows_hold_the_candidate_and_every_change_can_be_undone(name, stream):
    columns, form = SOURCES[name]
    source = Dataset.from_dict({k: list(v) for k, v in columns.items()})
    ds = Dataset.from_dict({**source.to_dict(), **CORRECTED}).cast(
        Features({**source.features, **Dataset.from_dict(CORRECTED).features})
    )
    decided = ds.map(decide(0.5), batched=True, batch_size=2)
    if stream:
        decided = decided.to_iterable_dataset()
    done = curated(decided, form)
    rows, kept = list(done), [0, 1, 3, 5]
    assert [str(r).count("better") for r in rows] == [1, 2, 1, 1]  # in the candidate, and in the row
    assert [bool(r["clear_original"]) for r in rows] == [False, True, False, False]
    assert done.features == decided.features | {"clear_original": done.features["clear_original"]}
    back = restore(done, form)
    assert list(back) == list(source.select(kept))
    assert back.features == source.features
    splits = DatasetDict(train=curated(ds.map(decide(0.5), batched=True), form))
    assert list(restore(splits, form)["train"]) == list(back)


@pytest.mark.parametrize("kind", ["numpy", "arrow"])
@pytest.mark.parametrize("first", [False, True])
def test_formatted_streams_of_chats_are_replaced_and_restored(kind, first):
    columns = {"conversations": TURNS, **CORRECTED, "clear_preference": [0.5, 0.9, 0.7, 0.9, NAN, 0.9]}
    stream = Dataset.from_dict(columns).to_iterable_dataset()
    stream = (
        stream.with_format(kind).map(decide(0.5), batched=True) if first
        else stream.map(decide(0.5), batched=True).with_format(kind)
    )  # fmt: skip
    done = curated(stream)
    assert [row["conversations"][-1]["value"] for row in plain(done)] == [" 0\n", "better", " 3\n", " 5\n"]
    assert [row["conversations"] for row in plain(restore(done))] == [TURNS[i] for i in (0, 1, 3, 5)]


def plain(stream):
    """The rows, in no format."""
    batches = [Batch(row if hasattr(row, "to_pydict") else {k: [v] for k, v in row.items()}) for row in stream]
    return [{name: values[0] for name, values in batch.items()} for batch in batches]


def test_a_row_to_replace_that_cannot_be_read_is_warned_of():
    columns = {"question": ["Where?"], "answer": ["here"], "q": ["What?"], "a": [""]}
    ds = Dataset.from_dict({**columns, **{name: values[1:2] for name, values in CORRECTED.items()}})
    decided = ds.map(decide(0.5), batched=True)
    with pytest.warns(UserWarning, match=r"1 rows to replace stay .*column 'a' is empty.*format=clear\.format"):
        assert curated(decided, Columns("q", "a"))["answer"][:] == ["here"]
    assert curated(decided)["answer"][:] == ["better"]


def test_rows_without_candidates_are_left_as_they_are():
    ds = scored([0.1, 0.9]).map(decide(0.5), batched=True)
    assert curated(ds).column_names == ds.column_names
    assert restore(curated(ds)).to_dict() == {"id": [1]}


def test_originals_stay_through_a_second_round():
    ds = Dataset.from_dict({"question": ["a", "b"], "answer": ["1", "2"], **{k: v[1:3] for k, v in CORRECTED.items()}})
    source = ds.select_columns(["question", "answer"]).to_dict()
    once = curated(ds.map(decide(0.5, eta=0.5), batched=True))
    assert once["answer"][:] == ["better", "other"]
    assert restore(curated(once)).to_dict() == source
    columns = {"clear_candidate": ["best", ""], "clear_preference": [0.9, NAN], "clear_confidence": [0.1, 0.9]}
    again = once.map(lambda _, i: {k: v[i] for k, v in columns.items()}, with_indices=True)
    twice = curated(again.map(decide(0.5), batched=True))
    assert twice["answer"][:] == ["best", "other"]
    assert restore(twice).to_dict() == source


def test_formats_empty_splits_and_other_columns_stay():
    ds = Dataset.from_dict({"question": ["a"], "answer": ["1"], "clear_text": ["mine"]})
    ds = ds.map(lambda _: {k: v[1] for k, v in CORRECTED.items()}).map(decide(0.5), batched=True)
    assert restore(curated(ds)).to_dict() == {"question": ["a"], "answer": ["1"], "clear_text": ["mine"]}
    numbers = curated(ds.with_format("numpy", columns=["clear_confidence"]))
    assert (numbers.format["type"], numbers.format["columns"]) == ("numpy", ["clear_confidence"])
    shout = curated(ds.with_transform(lambda batch: {"answer": [a.upper() for a in batch["answer"]]}))
    assert shout[0] == {"answer": "BETTER"}
    both = curated(DatasetDict(train=ds, test=ds.select([])))
    assert both["train"].features == both["test"].features


def test_images_are_neither_decoded_nor_stored_anew():
    image = PIL.Image.new("RGB", (8, 8), (200, 30, 30))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=40)
    raw = {"bytes": buffer.getvalue() + b"end", "path": "a.jpg"}  # any coder would leave the end out
    columns = {"prompt": ["a"], "response": ["1"], **{k: v[1:2] for k, v in CORRECTED.items()}}
    ds = Dataset.from_dict({**columns, "image": [raw]}).cast_column("image", Image())
    scored = ds.remove_columns("clear_confidence").map(Clear(engine=Scripted()).score, batched=True)
    done = curated(ds.map(decide(0.5), batched=True))
    assert done["response"][:] == ["better"]
    for each in (scored, done, restore(done)):
        assert each.features["image"] == Image()
        assert each.with_format("arrow")[:]["image"].to_pylist() == [raw]


def test_a_stream_decides_as_a_dataset_does(tmp_path):
    rows = Dataset.from_dict({"question": [f"Where is {i}?" for i in range(9)], "answer": ["here"] * 9})
    scored = rows.map(Clear(engine=Scripted()).score, batched=True)
    stream = rows.to_iterable_dataset().map(Clear(engine=Scripted()).score, batched=True)
    assert len(list(stream.filter(above(threshold(stream, 1.0))))) == 9
    assert len(scored.filter(above(threshold(scored, 1.0)))) == 9
    value = np.float32(0.6)  # a little more than 0.6
    assert above(0.6)({"clear_confidence": value}) == above(0.6)({"clear_confidence": float(value)}) == True  # noqa: E712
    batch = {"clear_confidence": [np.float32(0.1)], "clear_candidate": ["x"], "clear_preference": [value]}
    assert decide(0.5, 0.6)(batch)["clear_decision"] == ["replace"]


def test_a_split_without_rows_stays_one():
    rows = Dataset.from_dict({"question": [f"Where is {i}?" for i in range(6)], "answer": ["here"] * 6})
    both = DatasetDict(train=rows, test=rows.select([]))
    found = both.map(Clear(engine=Scripted()).score, batched=True)
    gamma = threshold(found)
    assert gamma == threshold(found["train"])
    kept = curated(found.map(decide(gamma), batched=True))
    assert len(kept["train"]) == sum(c > gamma for c in found["train"]["clear_confidence"])
    assert kept["test"].to_list() == []
    with pytest.raises(ValueError, match="the dataset has no rows"):
        threshold(DatasetDict(test=rows.select([])))


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 4 gives all turns the keys of both shapes")
def test_chats_of_two_shapes_are_replaced_and_restored_each_in_its_own():
    turns = [("role", "content", "user", "assistant")] * 3 + [("from", "value", "human", "gpt")] * 2
    chats = [[{r: u, c: "Who?"}, {r: a, c: f"old {i}"}] for i, (r, c, u, a) in enumerate(turns)]
    columns = {"clear_confidence": [0.1] * 5, "clear_candidate": ["new"] * 5, "clear_preference": [0.9] * 5}
    ds = Dataset.from_dict(
        {"messages": chats, **columns},
        Features({"messages": [datasets.Json()], **{name: Value(OURS[name]) for name in columns}}),
    )
    done = curated(ds.map(decide(0.5), batched=True))
    for (_, content, *_), chat in zip(turns, done["messages"], strict=True):
        assert chat[-1][content] == "new"
    assert done["clear_original"][:] == [f"old {i}" for i in range(5)]
    assert restore(done)["messages"][:] == chats


def test_decisions_of_an_older_release_are_not_taken_from_a_cache(monkeypatch):
    steps = (above(0.5), decide(0.5))
    before = [Hasher.hash(step) for step in steps]
    assert before == [Hasher.hash(step) for step in (above(0.5), decide(0.5))]
    monkeypatch.setattr(sys.modules["clear_datasets.decide"], "DECISIONS_REVISION", 0)
    assert not set(before) & {Hasher.hash(step) for step in (above(0.5), decide(0.5))}


def test_scores_that_tie_at_the_threshold_are_warned_of():
    with pytest.warns(UserWarning, match="0 of 10 rows lie above 1, where 5 are to: the others tie with it"):
        assert threshold(Dataset.from_dict({"clear_confidence": [1.0] * 6 + [0.2, 0.4, 0.6, 0.8]})) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert threshold(Dataset.from_dict({"clear_confidence": [0.1, 0.5, 0.5, 0.9]}), keep=0.25) == 0.7
        threshold(Dataset.from_dict({"clear_confidence": [0.5] * 9}), keep=1.0)


@pytest.mark.parametrize("column", ["clear_consistency", "clear_reflection"])
def test_what_is_not_known_of_stopped_rows_is_no_threshold_either(column):
    ds = Dataset.from_dict(
        {"clear_confidence": [0.2, 0.8], column: [0.3, 0.9], "clear_least": [0.1, 0.8], "clear_most": [0.3, 0.8]}
    )
    with pytest.raises(ValueError, match=f"stopped rows before their {column} was known"):
        threshold(ds, column=column)
    with pytest.raises(ValueError, match=f"stopped rows before their {column} was known"):
        ds.filter(above(0.5, column=column))
    assert threshold(ds.select([1]), keep=1, column=column) < 0.9
    assert threshold(ds.rename_column(column, "mine"), column="mine") == 0.6
