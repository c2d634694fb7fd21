"""Whatever stands in the columns: no row raises anything but its reason, and what was decided can be undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from clear_datasets import Chat, Clear, Columns, curated, decide, restore
from clear_datasets.formats import Format, FormatError
from clear_datasets.infer_format import infer_rows
from tests.conftest import Scripted

NAMES = ("role", "content", "from", "value", "tool_calls")
ROLES = ("user", "assistant", "system", "developer", "human", "gpt", "tool", "Kim")
TEXT = st.text(max_size=20) | st.text(st.characters(categories=["Cs", "Cc", "Cf", "Zs"]), max_size=4)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | TEXT, inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(ROLES) | ANY, "content": TEXT | ANY, "from": st.sampled_from(ROLES), "value": TEXT,
    "tool_calls": ANY,
})  # fmt: skip
CHAT = st.lists(TURN, max_size=4) | st.lists(TURN | ANY, max_size=3) | st.fixed_dictionaries(
    {"role": st.lists(st.sampled_from(ROLES), max_size=3), "content": st.lists(TEXT, max_size=3)}) | ANY  # fmt: skip
FORMATS: list[Format] = [
    Columns(), Columns("response", "prompt", input="input", context="context", system="system"),
    Chat(), Chat("messages", role="from", content="value"), Chat("messages", user="Kim", assistant="tool"),
]  # fmt: skip
COLUMNS = ("prompt", "response", "input", "context", "system")
ROW = st.fixed_dictionaries({}, optional={"messages": CHAT, **dict.fromkeys(COLUMNS, TEXT | CHAT)})


@pytest.mark.parametrize("form", FORMATS, ids=str)
@given(row=ROW)
@settings(max_examples=200)
def test_a_row_is_read_and_written_or_refused(form, row):
    before = repr(row)
    try:
        example = form.read(row)
    except FormatError as refused:
        reason = str(refused)
    else:
        assert example.response.strip()
        assert all(m.keys() == {"role", "content"} and isinstance(m["content"], str) for m in example.prompt)
        assert form.read({**row, **form.write(row, "new")}) == type(example)(example.prompt, "new")
        reason = ""
    assert len(reason) < 500
    assert repr(row) == before


GOOD = {"prompt": "Where?", "response": "here"}
TALK = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "here"}]


@pytest.mark.parametrize("good, strategies", [
    (GOOD, {"prompt": TEXT | CHAT, "response": TEXT | CHAT}),
    ({"messages": TALK}, {"messages": CHAT}),  # its format is named: a bad row has one vote against one
], ids=["columns", "chat"])  # fmt: skip
@given(data=st.data())
@settings(max_examples=100)
def test_any_values_leave_a_good_row_as_it_is(good, strategies, data):
    clear = Clear(engine=Scripted(yes=("here",)), format=Chat() if "messages" in good else None, cache=False)
    alone = clear.score({name: [value] for name, value in good.items()})
    size, place = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 1))
    batch = {name: data.draw(st.lists(values, min_size=size, max_size=size)) for name, values in strategies.items()}
    for name, value in good.items():
        batch[name].insert(place, value)
    found = clear.score(batch)
    np.testing.assert_array_equal(found["clear_confidence"][place], alone["clear_confidence"][0])
    assert not found["clear_error"][place]
    for score, error in zip(found["clear_confidence"].tolist(), found["clear_error"], strict=True):
        assert (score != score) == bool(error)
        error.encode()


@given(values=st.lists(CHAT, max_size=4))
def test_the_format_is_inferred_from_any_values(values):
    assert isinstance(infer_rows({"messages": values}), Chat)
    assert isinstance(infer_rows({"question": values, "answer": values}), Columns)


PLAIN = st.sampled_from(["", "here", "there", " "]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCORE = st.none() | st.just(float("nan")) | st.floats(0, 1, width=32)
DECIDED = st.fixed_dictionaries({
    "clear_confidence": SCORE, "clear_candidate": st.none() | PLAIN, "clear_preference": SCORE,
    "clear_agreed": st.none() | st.booleans(), "clear_error": st.none() | PLAIN,
})  # fmt: skip
OURS = {"clear_confidence": Value("float32"), "clear_candidate": Value("string"), "clear_preference": Value("float32"),
        "clear_agreed": Value("bool"), "clear_error": Value("string"), "clear_decision": Value("string")}  # fmt: skip
TEXTS = {"prompt": Value("string"), "response": Value("string")}
TURNS = {"messages": [{"role": Value("string"), "content": Value("string")}]}


def source_of(chat: bool) -> st.SearchStrategy[dict[str, Any]]:
    if not chat:
        return st.fixed_dictionaries({"prompt": st.none() | PLAIN, "response": st.none() | PLAIN})
    turn = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": st.none() | PLAIN})
    return st.fixed_dictionaries({"messages": st.none() | st.lists(turn, max_size=4)})


@pytest.mark.parametrize("chat", [False, True])
@given(data=st.data())
@settings(max_examples=50)
def test_whatever_was_decided_can_be_undone(chat, data):
    by_hand = data.draw(st.booleans())
    rows = [
        {**row, **ours}
        for row, ours in data.draw(st.lists(st.tuples(source_of(chat), DECIDED), min_size=1, max_size=6))
    ]
    features = Features({**(TURNS if chat else TEXTS), **OURS})
    decisions = st.sampled_from(["keep", "drop", "replace", "", None])
    ds = Dataset.from_list(
        [{**row, "clear_decision": data.draw(decisions) if by_hand else ""} for row in rows], features
    )
    names, scores = ([n for n in ds.column_names if n not in OURS]), ds["clear_confidence"][:]
    if not by_hand:
        step = decide(
            data.draw(st.floats(0, 1)), data.draw(st.floats(0, 1)), correct=data.draw(st.sampled_from(["low", "all"]))
        )
        ds = ds.map(step, batched=True)
        for decision, score in zip(ds["clear_decision"][:], scores, strict=True):
            assert (
                decision in ("keep", "drop", "replace") if score is not None and score == score else decision == "keep"
            )
    left = ds.select([i for i, decision in enumerate(ds["clear_decision"][:]) if decision != "drop"])
    done = curated(ds)
    for row, old in zip(done, left, strict=True):
        same = {n: row[n] for n in names} == {n: old[n] for n in names}
        assert same or (old["clear_decision"] == "replace" and old["clear_candidate"] and row["clear_original"])
    assert restore(done).to_list() == left.select_columns(names).to_list()
