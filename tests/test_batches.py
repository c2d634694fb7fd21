"""What a step reads of a batch, and what is stored of the batch then."""

from __future__ import annotations

import json

import datasets
import pytest
from datasets import Dataset, Features, List, Value

from clear_datasets import Clear, curated, decide, noise, restore
from tests.conftest import Scripted

pytestmark = pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 4 has no type for any JSON")

TARGETS = ["4", '{"a": 1}', "old", " null", '"quoted"']
NUMBER = 0.1234567890123456  # which datasets reads as ...501


def stored(**columns: list) -> Dataset:
    """Chats and flat targets among values of any JSON, which are stored as such."""
    turns = [
        [{"role": role, "content": json.dumps(text), "n": json.dumps([NUMBER])} for role, text in
         (("user", f"What is {i}?"), ("assistant", target))]
        for i, target in enumerate(TARGETS)
    ]  # fmt: skip
    turn = {"role": Value("string"), "content": datasets.Json(), "n": datasets.Json()}
    added = Dataset.from_dict(columns)
    chats = Dataset.from_dict(
        {"messages": turns, "answer": list(map(json.dumps, TARGETS)), **columns},
        Features({"messages": List(turn), "answer": datasets.Json(), **added.features}),
    )
    return chats


def chats_of(ds: Dataset) -> list:
    """The chats as they are stored."""
    return ds.with_format("arrow")[:]["messages"].to_pylist()


def replaced(target: str) -> Dataset:
    """With the target of the third row replaced."""
    ds = stored(clear_confidence=[0.9, 0.9, 0.1, 0.9, 0.9], clear_candidate=["", "", target, "", ""],
                clear_preference=[0.9] * 5)  # fmt: skip
    return ds.map(decide(0.5), batched=True)


@pytest.mark.parametrize("kind", [None, "numpy", "arrow"])
def test_texts_that_may_be_json_are_read_as_texts_and_stay_as_they_are_stored(kind):
    ds = stored()
    scored = ds.with_format(kind).map(Clear(engine=Scripted()).score, batched=True).with_format(None)
    assert scored["clear_error"][:] == [""] * 5
    assert chats_of(scored) == chats_of(ds)
    assert scored.features["messages"] == ds.features["messages"]


@pytest.mark.parametrize("target", ["NEW", "42", '["x"]'])
def test_a_replaced_row_among_texts_that_may_be_json_changes_no_other(target):
    ds = replaced(target)
    done = curated(ds)
    assert [chat[-1]["content"] for chat in done["messages"]] == [*TARGETS[:2], target, *TARGETS[3:]]
    before, after = chats_of(ds), chats_of(done)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True, True]
    assert after[2][0] == before[2][0]
    assert chats_of(restore(done)) == before
    assert restore(done)["answer"][:] == TARGETS


def test_a_candidate_that_may_be_json_is_a_text():
    ds = Dataset.from_dict(
        {"question": ["How many?"] * 2, "answer": ['"7"', "null"]},
        Features({"question": Value("string"), "answer": datasets.Json()}),
    )
    for name, values in {"clear_decision": ["replace", "keep"], "clear_candidate": ["42", ""]}.items():
        ds = ds.add_column(name, values)
    assert curated(ds)["answer"][:] == ["42", None]
    assert restore(curated(ds))["answer"][:] == ["7", None]


def test_streams_of_texts_that_may_be_json_are_replaced_and_restored_too():
    stream = curated(replaced("42").to_iterable_dataset())
    assert [row["messages"][-1]["content"] for row in stream] == [*TARGETS[:2], "42", *TARGETS[3:]]
    back = list(restore(stream))
    assert [row["messages"][-1]["content"] for row in back] == [row["answer"] for row in back] == TARGETS
    assert set(back[0]) == {"messages", "answer"}
    scored = stored(clear_confidence=[0.5] * 5).to_iterable_dataset()  # of which nothing was replaced
    assert list(restore(scored)) == back


def test_noise_among_texts_that_may_be_json_changes_no_other_row():
    ds = stored()
    noisy = noise.swap(ds, 0.4)
    assert sorted(chat[-1]["content"] for chat in noisy["messages"]) == sorted(TARGETS)
    for before, after, name in zip(chats_of(ds), chats_of(noisy), noisy["noise"], strict=True):
        assert (before == after) == (name == "")
