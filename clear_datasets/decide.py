"""From confidence to a decision on each row: arithmetic on columns, no model is called."""

from __future__ import annotations

import math
import warnings
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt

from clear_datasets.batches import Batch, beside

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

Failed = Literal["keep", "drop", "raise"]
_FAILED = ("keep", "drop", "raise")
BOUNDS = ("clear_least", "clear_most")
DECISIONS_REVISION = 2  # raised whenever equal settings decide, or apply a decision, otherwise than before


def threshold(
    ds: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    keep: float = 0.5,
    column: str = "clear_confidence",
) -> float:
    """The gamma above which a share `keep` of the scored rows lies: 0.5 gives the median, as in the CLEAR paper.

    Of n scored rows ``round(keep * n)`` lie above it, fewer where rows tie, as those that tie with gamma do not; it is
    the middle between the last of them and the next row. Halves are rounded to the even number: of an odd number of
    rows 0.5 keeps the row in the middle where that makes the kept ones even (2 of 3, 2 of 5, 4 of 7), so that gamma is
    beside the median. Rows that could not be scored (nan) do not count. The splits of a DatasetDict share one gamma. A
    stream is read to its end once, which scores it; three numbers of each of its rows stay in memory, 24 bytes. When it
    is read again, its answers come from the cache.

    Args:
        ds: A scored dataset, or a stream that is scored as it is read.
        keep: Share of the scored rows to keep, in [0, 1].
        column: Column of the confidence.

    Returns:
        Gamma, for `above` and `decide`.

    Raises:
        ValueError: `keep` is out of range, the column is not there, or no row has a score; or adaptive sampling stopped
            rows that may lie on either side.

    Examples:
        >>> from datasets import Dataset
        >>> threshold(Dataset.from_dict({"clear_confidence": [0.1, 0.9, 0.4, 0.6, float("nan")]}))
        0.5

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (Auto-Filter).
    """
    between = bracket(ds, keep, column)
    if not between.scored:
        raise ValueError(f"none of the rows has a score in {column!r}; clear_error says why for each")
    if between.unsure:
        raise ValueError(
            f"{between.unsure} rows that adaptive sampling stopped may lie on either side of this cut: "
            f"ds = score_to_keep(ds, clear, keep={keep}) samples them further"
        )
    if (wanted := round(keep * between.scored)) == between.scored:
        return float(np.nextafter(between.low, -np.inf))
    if between.above < 0.9 * wanted:
        warnings.warn(
            f"{between.above:,} of {between.scored:,} rows lie above {between.high:.4g}, where {wanted:,} are to: the "
            "others tie with it. More samples (k), or an estimator of finer steps, tell them apart",
            stacklevel=2,
        )
    return (between.low + between.high) / 2


@dataclass(frozen=True)
class Bracket:
    """What is known of a threshold before all samples are there.

    Attributes:
        low: The least that the higher of the rows below the threshold may have.
        high: The most that the lowest of the rows above it may have.
        unsure: How many rows are neither known to the end nor surely outside of ``[low, high]``.
        scored: How many rows have a score.
        above: How many surely lie above the middle.
    """

    low: float
    high: float
    unsure: int
    scored: int
    above: int


def bracket(
    ds: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    keep: float = 0.5,
    column: str = "clear_confidence",
) -> Bracket:
    """Between what the two scores lie that `threshold` takes the middle of, whatever the samples that lack.

    Proof: with rows in any order, ``least[i] <= score[i] <= most[i]``. To raise any of the scores lowers no order
    statistic, so the p-th lowest score lies between the p-th lowest of the least and the p-th lowest of the most. Where
    no row is unsure, both scores and all decisions are those of all samples, see `clear_datasets.adaptive`.

    Args:
        ds: A scored dataset, or a stream that is scored as it is read.
        keep: Share of the scored rows to keep, in [0, 1].
        column: Column of the confidence.

    Examples:
        >>> from datasets import Dataset
        >>> bracket(Dataset.from_dict({"clear_confidence": [0.1, 0.5, 0.9], "clear_least": [0.0, 0.3, 0.8],
        ...     "clear_most": [0.2, 0.6, 1.0]}), keep=0.4)
        Bracket(low=0.3, high=1.0, unsure=2, scored=3, above=1)
    """
    if not column.startswith("clear_"):
        return bracket_of(columns_of(ds, (column,)), keep)
    values = columns_of(ds, (column, *BOUNDS))
    if column != "clear_confidence" and np.any(values[1] < values[2]):
        raise ValueError(_STOPPED.format(column))
    return bracket_of(values if column == "clear_confidence" else values[:1], keep)


def bracket_of(values: npt.NDArray[np.float64], keep: float) -> Bracket:
    """The same of the columns themselves: float64 [1 or 3, rows]."""
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}, the share of rows to keep; expected a number from 0 to 1")
    whole = values[:, ~np.isnan(values[0])]
    least, most = whole[min(1, len(whole) - 1)], whole[-1]  # of one column alone, itself
    size = whole.shape[1]
    if not size:
        return Bracket(math.nan, math.nan, 0, 0, 0)
    kept = round(keep * size)
    below, over = max(size - kept - 1, 0), min(size - kept, size - 1)
    low, high = np.partition(least, below)[below], np.partition(most, over)[over]
    unsure = (least < most) & (least <= high) & (most >= low)
    return Bracket(float(low), float(high), int(unsure.sum()), size, int((least > (low + high) / 2).sum()))


def columns_of(ds: Any, names: Sequence[str]) -> npt.NDArray[np.float64]:
    """Columns of numbers, [names, rows of all splits]; of ours, those that are not there are as the first one.

    Raises:
        ValueError: There is no column of the first name, or no row.
    """
    splits = [s for s in (ds.values() if isinstance(ds, Mapping) else [ds]) if not is_empty(s)]
    if not splits:
        raise ValueError("the dataset has no rows: there is no score to go by")
    found = [_values(split, names) if hasattr(split, "__len__") else _read(split, names) for split in splits]
    return np.concatenate(found, axis=1)


def is_empty(split: Any) -> bool:
    """Whether a split is known to have no rows: `map` adds no column to it."""
    return hasattr(split, "__len__") and not len(split)


def _values(split: Dataset, names: Sequence[str]) -> npt.NDArray[np.float64]:
    names = _found(names, split.column_names)
    table = split.select_columns(sorted({*names})).with_format("arrow")[:]
    return np.stack([np.asarray(table[name].to_numpy(), dtype=np.float64) for name in names])


def _read(stream: Iterable[Mapping[str, Any]], names: Sequence[str]) -> npt.NDArray[np.float64]:
    values = {name: array("d") for name in names}
    for row in stream:
        for name, known in zip(names, _found(names, row), strict=True):
            values[name].append(np.nan if row[known] is None else row[known])
    return np.stack([np.asarray(values[name], dtype=np.float64) for name in names])


def _found(names: Sequence[str], columns: Collection[str]) -> list[str]:
    """The names, with that of the score in place of what adaptive sampling would have added."""
    if names[0] not in columns:
        raise ValueError(_MISSING.format(names[0], ", ".join(map(repr, columns))))
    return [name if name in columns else names[0] for name in names]


_STOPPED = (
    "adaptive sampling stopped rows before their {} was known, as it goes by the confidence: score without adaptive"
)
_MISSING = "no column {!r} among {}: run ds = ds.map(clear.score, batched=True) first"


@dataclass(frozen=True)
class above:  # noqa: N801 - used as a function: ds.filter(above(gamma))
    """A predicate for ``ds.filter``: whether a row's confidence is above gamma.

    A row without a score is kept: nan means that nothing confident is known about it. One that adaptive sampling
    stopped is refused where it may lie on either side of gamma.

    Args:
        gamma: The threshold; see `threshold`.
        failed: What becomes of rows without a score: "keep", "drop" or "raise".
        column: Column of the confidence.

    Raises:
        ValueError: `failed` is none of those above, or gamma is no number or far from [0, 1].

    Examples:
        >>> from datasets import Dataset
        >>> ds = Dataset.from_dict({"clear_confidence": [0.1, 0.9, float("nan")]})
        >>> ds.filter(above(0.5))["clear_confidence"][:]
        [0.9, nan]
    """

    gamma: float
    failed: Failed = "keep"
    column: str = "clear_confidence"
    revision: int = field(default=DECISIONS_REVISION, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "revision", DECISIONS_REVISION)  # into the pickled state: ds.map sees no code
        if self.failed not in _FAILED:
            raise ValueError(f"failed is {self.failed!r}; expected one of {', '.join(_FAILED)}")
        # A little beyond them keeps all or none; columns of others have scales of their own.
        if math.isnan(self.gamma) or (self.column == "clear_confidence" and not -1 <= self.gamma <= 2):
            raise ValueError(f"gamma is {self.gamma}, a threshold of confidence; expected a number from 0 to 1")

    def __call__(self, row: Any) -> bool | list[bool]:
        """Whether a row stays; a list of it for a batch."""
        row = row if isinstance(row, Mapping) else Batch(row)
        if self.column not in row:
            raise ValueError(f"no column {self.column!r} in the row: run ds.map(clear.score, batched=True) first")
        value, error = row[self.column], row.get("clear_error")
        if self.column.startswith("clear_") and BOUNDS[0] in row:
            least, most = (np.asarray(row[name], dtype=np.float64) for name in BOUNDS)
            if self.column != "clear_confidence" and np.any(least < most):
                raise ValueError(_STOPPED.format(self.column))
            if self.column == "clear_confidence" and np.any((least <= self.gamma) & (self.gamma < most)):
                raise ValueError(
                    f"adaptive sampling stopped a row that may lie on either side of {self.gamma}: score with "
                    f"Clear(gamma={self.gamma}, adaptive=True), which samples it further, or without adaptive"
                )
        if not np.ndim(value):
            return self._keeps(value, error)
        return [self._keeps(v, e) for v, e in zip(value, [""] * len(value) if error is None else error, strict=True)]

    def _keeps(self, confidence: float | None, error: Any) -> bool:
        if is_score(confidence):
            return float(confidence) > self.gamma  # else numpy rounds gamma where a score is its own float32
        if self.failed == "raise":
            raise ValueError(f"a row has no score ({error or 'no reason given'}); failed='keep' or 'drop' goes on")
        return self.failed == "keep"


def decide(
    gamma: float,
    eta: float = 0.8,
    *,
    correct: Literal["low", "all"] = "low",
    agreed: Literal["drop", "keep"] = "drop",
    failed: Failed = "keep",
    column: str = "clear_confidence",
) -> Callable[..., Any]:
    """A step for ``ds.map(..., batched=True)`` that adds ``clear_decision``: "keep", "drop" or "replace".

    A row above gamma is kept. One at or below it is replaced where there is a candidate (`Clear.propose`) whose
    preference (`Clear.prefer`) is above eta, and dropped otherwise; without candidates none is replaced. A row without
    a score is never replaced: nothing confident is known about it.

    Args:
        gamma: The threshold of confidence; see `threshold`.
        eta: The threshold of preference, 0.8 in the paper.
        correct: "low" replaces at or below gamma alone; "all" wherever the candidate is preferred.
        agreed: What becomes of rows at or below gamma whose target the writer repeats (``clear_agreed``): "drop", as in
            the paper, or "keep". It tells something only of rows that the writer was not trained on.
        failed: What becomes of rows without a score: "keep", "drop" or "raise".
        column: Column of the confidence.

    Raises:
        ValueError: A setting is none of those above, or gamma is no number or far from [0, 1].

    Examples:
        >>> from datasets import Dataset
        >>> from clear_datasets import curated
        >>> ds = Dataset.from_dict({"question": ["Where?"] * 3, "answer": ["right", "wrong", "odd"],
        ...     "clear_confidence": [0.9, 0.1, 0.2], "clear_candidate": ["", "better", "other"],
        ...     "clear_preference": [float("nan"), 0.9, 0.5]})
        >>> curated(ds.map(decide(0.5), batched=True))["answer"][:]
        ['right', 'better']

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (Auto-Filter and Auto-Correct).
    """
    if correct not in ("low", "all"):
        raise ValueError(f"correct is {correct!r}; expected 'low' or 'all'")
    if agreed not in ("drop", "keep"):
        raise ValueError(f"agreed is {agreed!r}; expected 'drop' or 'keep'")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, a threshold of probabilities; expected a number from 0 to 1")
    return _Decide(above(gamma, failed, column), eta, correct, agreed)


@dataclass(frozen=True)
class _Decide:
    keeps: above
    eta: float
    correct: str
    agreed: str

    def __call__(self, batch: Any) -> Any:
        kept = self.keeps(batch)
        if isinstance(kept, bool):
            raise TypeError("decide() works on batches: ds.map(decide(gamma), batched=True)")
        columns = Batch(batch)
        decisions = ["keep" if k else "drop" for k in kept]
        scores = columns[self.keeps.column]
        if self.agreed == "keep" and "clear_agreed" in columns:
            for i, same in enumerate(columns["clear_agreed"]):
                decisions[i] = "keep" if same and is_score(scores[i]) else decisions[i]
        if "clear_candidate" in columns:
            if "clear_preference" not in columns:
                raise ValueError("candidates have no preference: run ds = ds.map(clear.prefer, batched=True) first")
            preferences = columns["clear_preference"]
            for i, candidate in enumerate(columns["clear_candidate"]):
                sure = is_score(scores[i]) and is_score(preferences[i]) and float(preferences[i]) > self.eta
                if candidate and sure and (decisions[i] == "drop" or self.correct == "all"):
                    decisions[i] = "replace"
        added = {"clear_decision": decisions}
        return added if isinstance(batch, Mapping) else beside(batch, added)


def is_score(value: float | None) -> TypeGuard[float]:
    """Whether there is one: nan says that there is none, and JSON files hold null for nan."""
    return value is not None and not math.isnan(value)
