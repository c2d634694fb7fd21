"""Which format rows are in, by the names of their columns and the keys of their turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from clear_datasets.formats import Chat, Columns, Format, FormatError, Row

if TYPE_CHECKING:
    from datasets import Dataset

_KNOWN: tuple[tuple[tuple[str, ...], Chat | Columns], ...] = (
    (("messages",), Chat("messages")),
    (("conversations",), Chat("conversations", role="from", content="value")),
    (("prompt", "response"), Columns("prompt", "response")),
    (("prompt", "completion"), Columns("prompt", "completion")),
    (("instruction", "input", "output"), Columns("instruction", "output", input="input")),
    (("instruction", "output"), Columns("instruction", "output")),
    (("context", "question", "answer"), Columns("question", "answer", context="context")),
    (("question", "answer"), Columns("question", "answer")),
)


# Columns that may belong to the prompt, whether a format reads them or not.
_AROUND = ("choices", "context", "documents", "functions", "history", "input", "options", "passage", "system",
           "system_prompt", "tools")  # fmt: skip

_TURN = ({"role", "content"}, {"from", "value"})  # keys of a turn


def infer(columns: Mapping[str, Any]) -> Format:
    """The format of a dataset, by the names of its columns.

    Args:
        columns: ``ds.features``, or one row.

    Raises:
        FormatError: No known set of columns is there.

    Warns:
        UserWarning: Columns that may belong to the prompt are not read; once for the same ones.

    Examples:
        >>> infer({"question": "Who?", "answer": "Ada"})
        Columns(prompt='question', response='answer', input=None, context=None, system=None)
    """
    for names, known in _KNOWN:
        if all(name in columns for name in names):
            form = known
            if isinstance(known, Chat) and (keys := _keys(columns[known.column])):
                form = Chat(known.column, "from", "value") if _TURN[1] <= keys else Chat(known.column)
            if "system" in columns:
                form = replace(form, system="system")
            _warn_of(tuple(name for name in _AROUND if name in columns and name not in vars(form).values()))
            return form
    sets = "; ".join(", ".join(names) for names, _ in _KNOWN)
    raise FormatError(
        f"found the columns {', '.join(map(repr, columns)) or '(none)'}, and know: {sets}. Name yours: "
        "--prompt and --response, or "
        'Clear(format=Columns(prompt="...", response="...")) or Clear(format=Chat("...", role="...", content="..."))'
    )


@cache
def _warn_of(unread: tuple[str, ...]) -> None:
    if unread:
        warnings.warn(
            f"the model is not told what the columns hold: {', '.join(unread)}. If it belongs to the prompt, name the "
            "column (--context, or Columns(context=...)), or write it into the prompt; Clear(format=...) says that it "
            "does not",
            stacklevel=3,
        )


def infer_rows(rows: Mapping[str, Sequence[Any]]) -> Format:
    """The format of some rows, by the first value of a column that is a chat as most are: bad rows change no others."""
    return infer(_Firsts(rows))


def infer_dataset(ds: Dataset) -> Format:
    """The format of a dataset, by its first 1,000 rows."""
    return infer_rows(without_media(ds)[:1000])


def of_each(given: Format | None, rows: Dataset | Mapping[str, Sequence[Any]]) -> Callable[[Row], Format]:
    """Tells the format of a row: what is given, else that of most rows, or another one that a batch of its like has."""
    if given is not None:
        return lambda row: given
    most = infer_rows(rows) if isinstance(rows, Mapping) else infer_dataset(rows)

    def own(row: Row) -> Format:
        try:
            most.read(row)
        except FormatError:
            return infer(row)
        return most

    return own


def without_media(ds: Dataset) -> Dataset:
    """Plain rows, without columns of images, sounds and the like, which reading a row would decode."""
    return ds.with_format(None).select_columns([name for name, feature in ds.features.items() if not is_media(feature)])


def is_media(feature: Any) -> bool:
    """Whether a column is of images, sounds or the like, or of lists of them."""
    while hasattr(feature, "feature"):  # a list of them
        feature = feature.feature
    return hasattr(feature, "embed_storage")


class _Lazily(Mapping[str, Any]):
    """Values by column, read when asked for: what is not looked at is neither decoded nor written anew."""

    def __init__(self, columns: Mapping[str, Sequence[Any]]) -> None:
        self.columns = columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __contains__(self, name: object) -> bool:
        return name in list(self.columns)


class _Firsts(_Lazily):
    def __getitem__(self, name: str) -> Any:
        values = self.columns[name]
        chats = [(v, _TURN[1] <= _keys(v)) for v in values if any(keys <= _keys(v) for keys in _TURN)]
        most = 2 * sum(second for _, second in chats) > len(chats)
        return next((v for v, second in chats if second == most), values[0] if len(values) else None)


class RowOf(_Lazily):
    """Row `number` of a batch.

    Examples:
        >>> RowOf({"question": ["Who?", "Where?"]}, 1)["question"]
        'Where?'
    """

    def __init__(self, columns: Mapping[str, Sequence[Any]], number: int) -> None:
        super().__init__(columns)
        self.number = number

    def __getitem__(self, name: str) -> Any:
        return self.columns[name][self.number]


def _keys(turns: Any) -> set[str]:
    """The keys of the turns of a chat, from a feature (a List of a struct) or a value (a list of dicts)."""
    inner = getattr(turns, "feature", turns)
    if isinstance(inner, list):
        inner = inner[0] if inner else {}
    return set(inner) if isinstance(inner, Mapping) else set()
