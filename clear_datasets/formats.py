"""Where a row keeps its prompt and its target: flat columns, or a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, Protocol

from clear_datasets.engines import Messages

Row = Mapping[str, Any]


class FormatError(ValueError):
    """A row, or a set of columns, that a format cannot read."""


@dataclass(frozen=True)
class Example:
    """What a row asks, and the target that it gives."""

    prompt: Messages
    response: str


class Format(Protocol):
    """How to read a row, and how to put another response into it."""

    def read(self, row: Row) -> Example:
        """The example that a row holds.

        Raises:
            FormatError: The row has no usable prompt or response; the text says which and why.
        """
        ...

    def write(self, row: Row, response: str) -> dict[str, Any]:
        """The changed columns only, in the row's own shape; `row` itself is left as it is."""
        ...


@dataclass(frozen=True)
class Columns:
    r"""Flat rows: a column for the prompt and one for the response.

    `prompt` and `response` may also hold message lists, as in conversational prompt/completion datasets.

    Args:
        prompt: Column of the prompt.
        response: Column of the target.
        input: Column with more of the prompt, set after it; left out where it is empty.
        context: Column of a passage, set before the prompt; left out where it is empty.
        system: Column of the system message; left out where it is empty.

    Examples:
        >>> alpaca = Columns(prompt="instruction", input="input", response="output")
        >>> row = {"instruction": "Translate to French.", "input": "cat", "output": "chat"}
        >>> alpaca.read(row).prompt
        [{'role': 'user', 'content': 'Translate to French.\n\ncat'}]
        >>> alpaca.write(row, "le chat")
        {'output': 'le chat'}
    """

    prompt: str = "prompt"
    response: str = "response"
    input: str | None = None
    context: str | None = None
    system: str | None = None

    def read(self, row: Row) -> Example:
        """See `Format.read`."""
        turns: list[dict[str, str]] = []
        if self.system and (system := _text(row, self.system, empty=True)):
            turns.append({"role": "system", "content": system})
        if isinstance(row.get(self.prompt), list):
            turns += [_message(m, self.prompt) for m in row[self.prompt]]
            if not turns or not turns[-1]["content"].strip():
                raise FormatError(f"column {self.prompt!r} holds no message")
        else:
            around = [_text(row, column, empty=True) if column else "" for column in (self.context, self.input)]
            parts = [around[0], _text(row, self.prompt), around[1]]
            turns.append({"role": "user", "content": "\n\n".join(p for p in parts if p)})
        if not isinstance(row.get(self.response), list):
            return Example(turns, _text(row, self.response))
        replies = [_message(m, self.response) for m in row[self.response]]
        if len(replies) != 1 or replies[0]["role"] != "assistant" or not replies[0]["content"].strip():
            raise FormatError(
                f"column {self.response!r} holds {len(replies)} messages; expected one from the assistant"
            )
        return Example(turns, replies[0]["content"])

    def write(self, row: Row, response: str) -> dict[str, Any]:
        """See `Format.write`."""
        if isinstance(row[self.response], list):
            return {self.response: [{**row[self.response][0], "content": response}]}
        return {self.response: response}


_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Chat:
    """Rows that hold a chat. The last assistant turn is the target, the turns before it are the prompt.

    Args:
        column: Column of the chat.
        role: Key of a turn's speaker.
        content: Key of a turn's text.
        user: A name of the user beside "user" and "human".
        assistant: A name of the assistant beside "assistant", "gpt", "chatgpt", "model" and "bot".
        system: Column of the system message of chats that have none among their turns; left out where it is empty.

    Examples:
        >>> sharegpt = Chat("conversations", role="from", content="value")
        >>> row = {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "5"}]}
        >>> sharegpt.read(row)
        Example(prompt=[{'role': 'user', 'content': '2 + 2?'}], response='5')
        >>> sharegpt.write(row, "4")["conversations"][1]
        {'from': 'gpt', 'value': '4'}
    """

    column: str = "messages"
    role: str = "role"
    content: str = "content"
    user: str = "user"
    assistant: str = "assistant"
    system: str | None = None

    def read(self, row: Row) -> Example:
        """See `Format.read`."""
        turns = self._turns(row)
        target = self._target(turns)
        if turns[target].get("tool_calls"):
            raise FormatError(f"column {self.column!r}: the last assistant turn calls tools; only text can be scored")
        prompt = [
            {"role": self._speaker(t), "content": _string(t.get(self.content), f"turn {i} of {self.column!r}", True)}
            for i, t in enumerate(turns[:target])
        ]
        if not any(m["content"].strip() for m in prompt):
            raise FormatError(f"column {self.column!r} has no text before the last assistant turn")
        system = _text(row, self.system, empty=True) if self.system else ""
        if system and all(m["role"] != "system" for m in prompt):
            prompt.insert(0, {"role": "system", "content": system})
        return Example(prompt, _string(turns[target].get(self.content), f"the last assistant turn of {self.column!r}"))

    def write(self, row: Row, response: str) -> dict[str, Any]:
        """See `Format.write`."""
        turns = [dict(t) for t in self._turns(row)]
        turns[self._target(turns)][self.content] = response
        if isinstance(row[self.column], Mapping):  # a datasets Sequence of structs reads as a struct of lists
            return {self.column: {key: [t[key] for t in turns] for key in row[self.column]}}
        return {self.column: turns}

    def _turns(self, row: Row) -> Sequence[Mapping[str, Any]]:
        value = row.get(self.column)
        if isinstance(value, Mapping) and all(isinstance(v, list) for v in value.values()):
            if len(sizes := {len(v) for v in value.values()}) > 1:
                raise FormatError(f"column {self.column!r} has lists of {sorted(sizes)} turns; expected one length")
            value = [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
        if not isinstance(value, list) or not all(isinstance(t, Mapping) for t in value):
            raise FormatError(f"column {self.column!r} holds {_kind(value)}; expected a list of turns")
        return value

    def _target(self, turns: Sequence[Mapping[str, Any]]) -> int:
        for i in range(len(turns) - 1, -1, -1):
            if self._speaker(turns[i]) == "assistant":
                return i
        raise FormatError(f"column {self.column!r} has {len(turns)} turns and none of the assistant")

    def _speaker(self, turn: Mapping[str, Any]) -> str:
        name = turn.get(self.role)
        if name == self.user:
            return "user"
        if name == self.assistant:
            return "assistant"
        if not isinstance(name, str) or name not in _ROLES:
            raise FormatError(
                f"column {self.column!r} has a turn whose {self.role!r} is {brief(name)}; "
                f"known are {', '.join(_ROLES)}: name yours with Chat(..., role=, content=, user=, assistant=)"
            )
        return _ROLES[name]


def _message(message: Any, column: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or "role" not in message:
        raise FormatError(
            f"column {column!r} holds {_kind(message)} in its list; expected messages with role and content"
        )
    role = "system" if message["role"] == "developer" else message["role"]
    if role not in ("system", "user", "assistant"):
        raise FormatError(
            f"column {column!r} has a message whose role is {brief(role)}; known are system, user, assistant"
        )
    return {"role": role, "content": _string(message.get("content"), f"a message of {column!r}", True)}


def _text(row: Row, column: str, empty: bool = False) -> str:
    if column not in row:
        raise FormatError(f"there is no column {column!r}; found {', '.join(map(repr, row))}")
    if row[column] is None and empty:
        return ""
    return _string(row[column], f"column {column!r}", empty)


def _string(value: Any, where: str, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{where} holds {_kind(value)}; expected text")
    if not empty and not value.strip():
        raise FormatError(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where} holds half a surrogate pair, which no tokenizer takes") from None
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
