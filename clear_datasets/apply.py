"""Decisions applied to a dataset, and undone: no model is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from clear_datasets.batches import Batch
from clear_datasets.decide import DECISIONS_REVISION, is_empty
from clear_datasets.formats import Format, FormatError
from clear_datasets.infer_format import RowOf, of_each

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    D = TypeVar("D", Dataset, DatasetDict)

OURS = {  # our columns, and their types
    "clear_confidence": "float32", "clear_consistency": "float32", "clear_reflection": "float32",
    "clear_least": "float32", "clear_most": "float32", "clear_drawn": "int32", "clear_error": "string",
    "clear_candidate": "string", "clear_agreed": "bool", "clear_preference": "float32",
    "clear_position_bias": "float32", "clear_decision": "string", "clear_original": "string",
}  # fmt: skip


def curated(ds: D, format: Format | None = None) -> D:
    """Apply the decisions: leave out the rows to drop, put the candidates into the rows to replace.

    Where candidates are there, a replaced row has its former target in ``clear_original``, "" in all others; `restore`
    puts it back. Everything else stays as it was.

    Args:
        ds: A dataset with decisions; see `decide`.
        format: Where rows keep their target; inferred from the columns by default.

    Raises:
        ValueError: There is no column ``clear_decision``.

    Warns:
        UserWarning: Rows to replace have no target that can be read; they stay as they are.
    """
    for split in ds.values() if isinstance(ds, Mapping) else [ds]:
        if not (is_empty(split) or _has(split, "clear_decision")):
            raise ValueError("no column 'clear_decision': run ds = ds.map(decide(gamma), batched=True) first")
    step = _Replace(format)

    def apply(split: Any) -> Any:
        if not _has(split, "clear_decision"):  # nor any row
            return split
        left = split.filter(_stays, input_columns="clear_decision")
        return _mapped(left, step, "clear_original") if _has(left, "clear_candidate") else left

    return cast("D", unformatted(ds, apply))


def restore(ds: D, format: Format | None = None) -> D:
    """The source rows again: former targets in their places, and no column of ours.

    Rows that `curated` left out are not in its result; they are in the dataset that `decide` made.

    Args:
        ds: What `curated` made.
        format: As for `curated`.

    Examples:
        >>> from datasets import Dataset
        >>> from clear_datasets import decide
        >>> ds = Dataset.from_dict({"question": ["2 + 2?"], "answer": ["5"], "clear_confidence": [0.1],
        ...     "clear_candidate": ["4"], "clear_preference": [0.9]})
        >>> done = curated(ds.map(decide(0.5), batched=True))
        >>> done["answer"][:], restore(done)["answer"][:]
        (['4'], ['5'])
    """
    step = _Restore(format)

    def undo(split: Any) -> Any:
        names = split.column_names or next(iter(split), ())  # a stream may not tell before its first row
        ours = [name for name in names if name in OURS]
        # Of a stream remove_columns takes texts for JSON where both may stand.
        changes = not is_empty(split) and ("clear_original" in names or not hasattr(split, "__len__"))
        return _mapped(split, step, remove=ours) if changes else split.remove_columns(ours)

    return cast("D", unformatted(ds, undo))


def _has(split: Any, column: str) -> bool:
    return split.column_names is None or column in split.column_names  # a stream may not tell


def _mapped(split: Any, step: Callable[..., dict[str, Any]], new: str = "", remove: Sequence[str] = ()) -> Any:
    """`split.map(step)` with the schema as it was, and a new column of text or without some columns."""
    from datasets import Value

    features = split.features and split.features.copy()
    if features is not None and new:
        features[new] = Value("string")
    for name in remove if features is not None else ():
        del features[name]
    if is_empty(split):  # which map leaves as it is
        return split.add_column(new, [], feature=Value("string")) if new and not _has(split, new) else split
    return split.map(step, batched=True, features=features, remove_columns=list(remove))


def unformatted(ds: Any, change: Callable[[Any], Any]) -> Any:
    """The change on each split, without its format, which would hide or transform columns, and with it again."""
    if isinstance(ds, Mapping):
        kind: Any = type(ds)
        return kind({name: unformatted(split, change) for name, split in ds.items()})
    if formatting := getattr(ds, "_formatting", None):  # of a stream, which says it nowhere else
        return change(ds.with_format(None)).with_format(formatting.format_type)
    old = getattr(ds, "format", None)  # not of streams
    if not old or not old["type"]:
        return change(ds)
    changed = change(ds.with_format(None))
    columns = None if set(old["columns"]) == set(ds.column_names) else set(old["columns"]) & set(changed.column_names)
    rest = {"output_all_columns": old["output_all_columns"], **old["format_kwargs"]}
    return changed.with_format(old["type"], columns=columns and sorted(columns), **rest)


@dataclass(frozen=True)
class _Replace:
    format: Format | None
    revision: int = DECISIONS_REVISION

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = Batch(batch)
        if "clear_candidate" not in columns:  # of a stream that did not tell
            return {}
        form_of = of_each(self.format, columns)
        before = columns["clear_original"] if "clear_original" in columns else [""] * columns.size
        originals = [original or "" for original in before]  # of an earlier round, which stay
        changes: dict[int, dict[str, Any]] = {}
        unread: list[str] = []
        for i, decision in enumerate(columns["clear_decision"]):
            if decision == "replace" and (candidate := columns["clear_candidate"][i]):
                row = RowOf(columns, i)
                try:
                    own = form_of(row)
                    originals[i] = originals[i] or own.read(row).response
                except FormatError as error:
                    unread.append(str(error))
                    continue
                changes[i] = own.write(row, candidate)
        if unread:
            warnings.warn(
                f"{len(unread)} rows to replace stay as they are, as no target can be read ({unread[0]}): give the "
                "format that they were scored with, as curated(ds, format=clear.format)",
                stacklevel=2,
            )
        return {"clear_original": originals, **columns.replaced(changes)}


@dataclass(frozen=True)
class _Restore:
    format: Format | None
    revision: int = DECISIONS_REVISION

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        columns = Batch(batch)
        if "clear_original" not in columns:
            return {}
        form_of = of_each(self.format, columns)
        rows = {i: RowOf(columns, i) for i, original in enumerate(columns["clear_original"]) if original}
        return columns.replaced({i: form_of(row).write(row, row["clear_original"]) for i, row in rows.items()})


def _stays(decision: str) -> bool:
    return decision != "drop"
