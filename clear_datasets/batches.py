"""What ``ds.map`` hands to a step, in any format of a dataset."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from clear_datasets.json_columns import decoded, encoded, has_json


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

    A column is read when it is asked for, from what is stored: what is read of the batch itself `map` stores anew, an
    image in another coding, and a text among values of any JSON as the JSON that it may hold.
    """

    def __init__(self, batch: Any) -> None:
        from datasets import Features
        from datasets.formatting.formatting import LazyBatch

        self.batch, self.known = batch, dict[str, list[Any]]()
        self.table: Any = None
        self.names: Collection[str] = batch
        if hasattr(batch, "to_pydict"):  # with_format("arrow")
            self.table, self.features, self.names = batch, Features.from_arrow_schema(batch.schema), batch.column_names
        elif isinstance(batch, LazyBatch):  # not a row, whose table looks the same
            self.table, self.features = batch.pa_table, batch.formatter.features
        elif not isinstance(batch, Mapping):  # pandas has nan for null, and cannot give the columns back as they were
            raise TypeError(
                f"the batch is a {type(batch).__name__}: use ds.with_format(None) first, as "
                "ds.with_format(None).map(clear.score, batched=True)"
            )
        self.size = self.table.num_rows if self.table is not None else len(next(iter(self.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.known:
            stored = self.table is not None and name in getattr(self.batch, "keys_to_format", self.names)
            self.known[name] = _plain(_checked(self._decoded(name) if stored else self.batch[name], name))
        return self.known[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def replaced(self, changes: Mapping[int, Mapping[str, Any]]) -> dict[str, list[Any]]:
        """The columns that some rows change, for `map` to store; all other rows have what is stored of them.

        Args:
            changes: The new values of a row, by its number.
        """
        found: dict[str, list[Any]] = {}
        for i, values in changes.items():
            for name, value in values.items():
                if self.table is None:  # a stream stores nothing
                    found.setdefault(name, list(self[name]))[i] = value
                else:
                    found.setdefault(name, self.table[name].to_pylist())[i] = encoded(value, self.features[name])
        return found

    def _decoded(self, name: str) -> Any:
        stored, feature = self.table[name].to_pylist(), self.features[name]
        if has_json(feature):
            return [decoded(value, feature) for value in stored]
        return self.features.decode_column(stored, name)


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
