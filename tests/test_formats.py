from __future__ import annotations

import copy
import warnings

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from clear_datasets import Chat, Columns, infer
from clear_datasets.formats import FormatError
from clear_datasets.infer_format import _warn_of

USER = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}
FIVE = {"role": "assistant", "content": "5"}

# format, row, the prompt's texts, the response, what write(row, "4") changes
READABLE = [
    (Columns(), {"prompt": "2 + 2?", "response": "5"}, ["2 + 2?"], "5", {"response": "4"}),
    (
        Columns("instruction", "output", input="input"),
        {"instruction": "Add.", "input": "2 + 2", "output": "5"},
        ["Add.\n\n2 + 2"], "5", {"output": "4"},
    ),
    (
        Columns("instruction", "output", input="input"),
        {"instruction": "Add 2 and 2.", "input": "", "output": "5"},
        ["Add 2 and 2."], "5", {"output": "4"},
    ),
    (
        Columns("instruction", "output", input="input"),
        {"instruction": "Add 2 and 2.", "input": None, "output": "5"},
        ["Add 2 and 2."], "5", {"output": "4"},
    ),
    (
        Columns("question", "answer", context="context"), {"context": "Sums.", "question": "2 + 2?", "answer": "5"},
        ["Sums.\n\n2 + 2?"], "5", {"answer": "4"},
    ),
    (
        Columns("question", "answer", context="context"), {"context": "", "question": "2 + 2?", "answer": "5"},
        ["2 + 2?"], "5", {"answer": "4"},
    ),
    (
        Columns("q", "a", system="s"), {"q": "2 + 2?", "a": "5", "s": "Be brief.", "id": 7},
        ["Be brief.", "2 + 2?"], "5", {"a": "4"},
    ),
    (
        Columns("prompt", "completion"), {"prompt": [SYSTEM, USER], "completion": [FIVE]},
        ["Be brief.", "2 + 2?"], "5", {"completion": [{"role": "assistant", "content": "4"}]},
    ),
    (
        Chat("messages"), {"messages": [{"role": "developer", "content": "Be brief."}, USER, FIVE]},
        ["Be brief.", "2 + 2?"], "5",
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, {"role": "assistant", "content": "4"}]},
    ),
    (
        Chat("messages"), {"messages": [SYSTEM, USER, FIVE]},
        ["Be brief.", "2 + 2?"], "5", {"messages": [SYSTEM, USER, {"role": "assistant", "content": "4"}]},
    ),
    (
        Chat("messages"), {"messages": [USER, FIVE, {"role": "user", "content": "Sure?"}]},
        ["2 + 2?"], "5",
        {"messages": [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Sure?"}]},
    ),
    (
        Chat("conversations", role="from", content="value"),
        {"conversations": [{"from": "human", "value": "2 + 2?", "w": 1}, {"from": "gpt", "value": "5", "w": 0}]},
        ["2 + 2?"], "5",
        {"conversations": [{"from": "human", "value": "2 + 2?", "w": 1}, {"from": "gpt", "value": "4", "w": 0}]},
    ),
    (
        Chat("conversations", role="from", content="value"),
        {"conversations": {"from": ["human", "gpt"], "value": ["2 + 2?", "5"]}},
        ["2 + 2?"], "5", {"conversations": {"from": ["human", "gpt"], "value": ["2 + 2?", "4"]}},
    ),
    (
        Chat("conversations", role="from", content="value", system="system"),
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "5"}]},
        ["Be brief.", "2 + 2?"], "5",
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
    ),
    (
        Chat("messages", system="persona"), {"persona": "Be long.", "messages": [SYSTEM, USER, FIVE]},
        ["Be brief.", "2 + 2?"], "5", {"messages": [SYSTEM, USER, {"role": "assistant", "content": "4"}]},
    ),
    (
        Chat("messages", system="persona"), {"persona": None, "messages": [USER, FIVE]},
        ["2 + 2?"], "5", {"messages": [USER, {"role": "assistant", "content": "4"}]},
    ),
    (
        Chat("dialog", role="who", content="says", user="Kim", assistant="Helper"),
        {"dialog": [{"who": "Kim", "says": "2 + 2?"}, {"who": "Helper", "says": "5"}]},
        ["2 + 2?"], "5", {"dialog": [{"who": "Kim", "says": "2 + 2?"}, {"who": "Helper", "says": "4"}]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("form, row, prompt, response, written", READABLE)
def test_read_and_write(form, row, prompt, response, written):
    before = copy.deepcopy(row)
    example = form.read(row)
    assert [m["content"] for m in example.prompt] == prompt
    assert {m["role"] for m in example.prompt} <= {"system", "user"}
    assert example.response == response
    assert form.write(row, "4") == written
    assert form.read({**row, **written}).response == "4"
    assert row == before


UNREADABLE = [
    (Columns(), {"prompt": "", "response": "x"}, "'prompt' is empty"),
    (Columns("q", "a", context="c"), {"c": "A passage.", "q": " ", "a": "x"}, "'q' is empty"),
    (Columns(), {"prompt": "x", "response": "  \n"}, "'response' is empty"),
    (Columns(), {"prompt": "x", "response": None}, "'response' holds nothing; expected text"),
    (Columns(), {"prompt": 3, "response": "x"}, "'prompt' holds a int"),
    (Columns(), {"prompt": "x", "answer": "x"}, "no column 'response'; found 'prompt', 'answer'"),
    (Columns(), {"prompt": "\ud83d", "response": "x"}, "half a surrogate pair"),
    (Columns(), {"prompt": [USER], "response": [USER]}, "expected one from the assistant"),
    (Columns(), {"prompt": [], "response": "x"}, "holds no message"),
    (Chat(system="persona"), {"messages": [USER, FIVE]}, "no column 'persona'; found 'messages'"),
    (Chat(system="system"), {"system": "Be brief.", "messages": [FIVE]}, "no text before the last assistant turn"),
    (Chat(system="system"), {"system": 3, "messages": [USER, FIVE]}, "column 'system' holds a int; expected text"),
    (Chat(), {"messages": [USER]}, "has 1 turns and none of the assistant"),
    (Chat(), {"messages": []}, "has 0 turns"),
    (Chat(), {"messages": None}, "holds nothing; expected a list of turns"),
    (Chat(), {"messages": {"role": None, "content": None}}, "holds a dict; expected a list"),
    (Chat(), {"messages": {"role": ["user"], "content": ["x", "y"]}}, r"lists of \[1, 2\] turns"),
    (Chat(), {"messages": [USER, {"role": ["gpt"], "content": "5"}]}, "whose 'role' is"),
    (Columns(), {"prompt": [{"role": "tool", "content": "4"}], "response": "x"}, "whose role is 'tool'"),
    (Chat(), {"messages": [FIVE]}, "no text before the last assistant turn"),
    (Chat(), {"messages": [USER, {**FIVE, "content": ""}]}, "the last assistant turn of 'messages' is empty"),
    (Chat(), {"messages": [USER, {"role": "tool", "content": "4"}, FIVE]}, "whose 'role' is 'tool'"),
    (Chat(), {"messages": [{**USER, "content": [{"type": "image"}]}, FIVE]}, "turn 0 of 'messages' holds a list"),
    (Chat(), {"messages": [USER, {**FIVE, "tool_calls": [{"name": "add"}]}]}, "calls tools"),
]  # fmt: skip


@pytest.mark.parametrize("form, row, reason", UNREADABLE)
def test_what_cannot_be_read_says_why(form, row, reason):
    with pytest.raises(FormatError, match=reason):
        form.read(row)


INFERRED = [
    (["prompt", "response"], Columns("prompt", "response")),
    (["prompt", "completion", "id"], Columns("prompt", "completion")),
    (["instruction", "input", "output", "text"], Columns("instruction", "output", input="input")),
    (["instruction", "output"], Columns("instruction", "output")),
    (["system", "instruction", "output"], Columns("instruction", "output", system="system")),
    (["question", "answer"], Columns("question", "answer")),
    (["answer", "question", "context"], Columns("question", "answer", context="context")),
]


@pytest.mark.parametrize("names, form", INFERRED)
def test_infer_from_features_and_from_a_row(names, form):
    assert infer(Features({n: Value("string") for n in names})) == form
    assert infer(dict.fromkeys(names, "x")) == form


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("role, content", [("role", "content"), ("from", "value")])
def test_infer_chats_by_their_keys(column, role, content):
    turns = [{role: "user", content: "2 + 2?"}, {role: "assistant", content: "5"}]
    ds = Dataset.from_dict({column: [turns]})
    for source in (ds.features, ds[0], Features({column: List({role: Value("string"), content: Value("string")})})):
        form = infer(source)
        assert form.read(ds[0]).response == "5"


def test_the_system_column_of_a_chat_is_read():
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "5"}]
    ds = Dataset.from_dict({"conversations": [turns] * 2, "system": ["Answer in French.", ""]})
    for source in (ds.features, ds[0]):
        assert [len(infer(source).read(row).prompt) for row in ds] == [2, 1]
    assert infer(ds.features).read(ds[0]).prompt[0] == {"role": "system", "content": "Answer in French."}


@pytest.mark.parametrize(
    "names, unread",
    [
        (["question", "options", "answer"], "options"),
        (["instruction", "input", "output", "history"], "history"),
        (["prompt", "response", "input", "system", "tools"], "input, tools"),
        (["context", "question", "answer", "id", "source"], None),
        (["instruction", "input", "output"], None),
    ],
)
def test_columns_that_may_belong_to_the_prompt_are_named_once(names, unread):
    _warn_of.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            infer(dict.fromkeys(names, "x"))
    assert [str(w.message).partition(": ")[2].partition(".")[0] for w in found] == ([unread] if unread else [])


def test_infer_names_what_was_found_what_is_known_and_the_way_out():
    with pytest.raises(FormatError, match=r"'foo', 'bar'.*messages.*instruction, input, output.*Columns\(prompt="):
        infer({"foo": "x", "bar": "y"})


@given(prompt=st.text(), response=st.text(), other=st.text(min_size=1))
def test_any_text_is_read_as_it_is_or_refused(prompt, response, other):
    row = {"prompt": prompt, "response": response}
    try:
        example = Columns().read(row)
    except FormatError:
        assert not prompt.strip() or not response.strip()
    else:
        assert (example.prompt[0]["content"], example.response) == (prompt, response)
        assert {**row, **Columns().write(row, other)} == {"prompt": prompt, "response": other}
