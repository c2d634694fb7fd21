"""What ``ds.map`` hands to a step, in any format of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def beside(table: Any, added: dict[str, Any]) -> Any:
    """A table with more columns: what `map` is not given back of a table is lost."""
    import pyarrow as pa

    for name, values in added.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, pa.array(values))
    return table


class Batch(Mapping[str, list[Any]]):
    """The columns of a batch as plain lists, whatever the format of the dataset.

    A column is read when it is asked for: `map` would decode an image that is looked at, and store it anew.
    """

    def __init__(self, batch: Any) -> None:
        if hasattr(batch, "to_pydict"):  # with_format("arrow")
            batch = batch.to_pydict()
        elif not isinstance(batch, Mapping):  # pandas has nan for null, and cannot give the columns back as they were
            raise TypeError(
                f"the batch is a {type(batch).__name__}: use ds.with_format(None).map(clear.score, batched=True)"
            )
        self.batch, self.known = batch, dict[str, list[Any]]()
        table = getattr(batch, "pa_table", None)
        self.size = table.num_rows if table is not None else len(next(iter(self.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.known:
            self.known[name] = _plain(_checked(self.batch[name], name))
        return self.known[name]

    def __contains__(self, name: object) -> bool:
        return name in self.batch

    def __iter__(self) -> Iterator[str]:
        return iter(self.batch)

    def __len__(self) -> int:
        return len(self.batch)


def _checked(values: Any, name: str) -> Any:
    one = isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__")
    if one or (len(values) and all(map(_is_turn, values))):  # one chat, all of it turns
        raise TypeError(f"column {name!r} holds one value, not a batch: use ds.map(clear.score, batched=True)")
    return values


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and any(
        isinstance(value.get(role), str) and isinstance(value.get(text), str)
        for role, text in (("role", "content"), ("from", "value"))
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # arrays of numpy, torch and jax
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return list(value) if value and isinstance(value[0], str | int | float) else [_plain(v) for v in value]
    return value
