"""From confidence to a decision on each row: arithmetic on columns, no model is called."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

    AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict

Failed = Literal["keep", "drop", "raise"]
_FAILED = ("keep", "drop", "raise")


def threshold(
    ds: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    keep: float = 0.5,
    column: str = "clear_confidence",
) -> float:
    """The gamma above which a share `keep` of the scored rows lies: 0.5 gives the median, as in the CLEAR paper.

    Rows that could not be scored (nan) do not count. Rows that tie with gamma are not above it, so fewer than asked may
    be kept, never more. The splits of a DatasetDict share one gamma. A stream is read to its end once, which scores it;
    of its rows eight bytes each stay in memory. When it is read again, its answers come from the cache.

    Args:
        ds: A scored dataset, or a stream that is scored as it is read.
        keep: Share of the scored rows to keep, in [0, 1].
        column: Column of the confidence.

    Returns:
        Gamma, for `above` and `decide`.

    Raises:
        ValueError: `keep` is out of range, the column is not there, or no row has a score.

    Examples:
        >>> from datasets import Dataset
        >>> threshold(Dataset.from_dict({"clear_confidence": [0.1, 0.9, 0.4, 0.6, float("nan")]}))
        0.5

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (Auto-Filter).
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}, the share of rows to keep; expected a number from 0 to 1")
    splits: list[Any] = list(ds.values()) if isinstance(ds, Mapping) else [ds]
    values = [_values(split, column) if hasattr(split, "__len__") else _read(split, column) for split in splits]
    scores = np.sort(np.concatenate(values))
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        raise ValueError(f"none of the rows has a score in {column!r}; clear_error says why for each")
    kept = round(keep * len(scores))
    if kept == len(scores):
        return float(np.nextafter(scores[0], -np.inf))
    above_cut = scores[len(scores) - kept] if kept else scores[-1]
    return float((scores[len(scores) - kept - 1] + above_cut) / 2)


def _values(split: Dataset, column: str) -> npt.NDArray[np.float64]:
    if column not in split.column_names:
        raise ValueError(_MISSING.format(column, ", ".join(map(repr, split.column_names))))
    table = split.select_columns(column).with_format("arrow")[:]
    return np.asarray(table[column].to_numpy(), dtype=np.float64)


def _read(stream: Iterable[Mapping[str, Any]], column: str) -> npt.NDArray[np.float64]:
    values = array("d")
    for row in stream:
        if column not in row:
            raise ValueError(_MISSING.format(column, ", ".join(map(repr, row))))
        values.append(np.nan if row[column] is None else row[column])
    return np.asarray(values, dtype=np.float64)


_MISSING = "no column {!r} among {}: run ds = ds.map(clear.score, batched=True) first"


@dataclass(frozen=True)
class above:  # noqa: N801 - used as a function: ds.filter(above(gamma))
    """A predicate for ``ds.filter``: whether a row's confidence is above gamma.

    A row without a score is kept: nan means that nothing confident is known about it.

    Args:
        gamma: The threshold; see `threshold`.
        failed: What becomes of rows without a score: "keep", "drop" or "raise".
        column: Column of the confidence.

    Examples:
        >>> from datasets import Dataset
        >>> ds = Dataset.from_dict({"clear_confidence": [0.1, 0.9, float("nan")]})
        >>> ds.filter(above(0.5))["clear_confidence"][:]
        [0.9, nan]
    """

    gamma: float
    failed: Failed = "keep"
    column: str = "clear_confidence"

    def __post_init__(self) -> None:
        if self.failed not in _FAILED:
            raise ValueError(f"failed is {self.failed!r}; expected one of {', '.join(_FAILED)}")

    def __call__(self, row: Mapping[str, Any]) -> bool | list[bool]:
        """Whether a row stays; a list of it for a batch."""
        if self.column not in row:
            raise ValueError(f"no column {self.column!r} in the row: run ds.map(clear.score, batched=True) first")
        value, error = row[self.column], row.get("clear_error")
        if not np.ndim(value):
            return self._keeps(value, error)
        return [self._keeps(v, e) for v, e in zip(value, [""] * len(value) if error is None else error, strict=True)]

    def _keeps(self, confidence: float | None, error: Any) -> bool:
        if confidence is not None and not np.isnan(confidence):  # JSON files hold null for nan
            return bool(confidence > self.gamma)
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
) -> Callable[..., dict[str, list[str]]]:
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
        ValueError: A setting is none of those above.

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

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[str]]:
        kept = self.keeps(batch)
        if isinstance(kept, bool):
            raise TypeError("decide() works on batches: ds.map(decide(gamma), batched=True)")
        decisions = ["keep" if k else "drop" for k in kept]
        scores = batch[self.keeps.column]
        if self.agreed == "keep" and "clear_agreed" in batch:
            for i, same in enumerate(batch["clear_agreed"]):
                decisions[i] = "keep" if same and _known(scores[i]) else decisions[i]
        if "clear_candidate" in batch:
            if "clear_preference" not in batch:
                raise ValueError("candidates have no preference: run ds = ds.map(clear.prefer, batched=True) first")
            preferences = batch["clear_preference"]
            for i, candidate in enumerate(batch["clear_candidate"]):
                confident = candidate and _known(scores[i]) and _known(preferences[i]) and preferences[i] > self.eta
                if confident and (decisions[i] == "drop" or self.correct == "all"):
                    decisions[i] = "replace"
        return {"clear_decision": decisions}


def _known(value: float | None) -> bool:
    return value is not None and not np.isnan(value)  # JSON files hold null for nan
