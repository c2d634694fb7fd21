"""Figures with their 95% intervals: how sure an AUROC or a share of so many rows is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from clear_datasets.noise import auroc

Interval = tuple[float, float, float]  # a figure, and the least and the most that it may be, with 95%
FEW = 10  # rows of a kind, of which an interval by rows drawn anew is too narrow
_DRAWS = 1000


def interval(scores: npt.ArrayLike, good: npt.NDArray[np.bool_], seed: int = 0) -> Interval:
    """AUROC with its 95% bootstrap interval, which Wilson's bounds widen where rows drawn anew would hardly vary."""
    values = np.asarray(scores, dtype=float)
    found = bootstrap(lambda rows: auroc(values[rows].tolist(), good[rows].tolist()), len(good), seed)
    few = rarer(values, good)
    if few and (few < FEW or found[0] in (0.0, 1.0)):
        (_, low, _), (_, _, high) = share(np.ones(few, dtype=bool)), share(np.zeros(few, dtype=bool))
        return found[0], min(found[1], low), max(found[2], high)
    return found


def auroc_of_all(scores: npt.NDArray[np.float64], good: npt.NDArray[np.bool_]) -> float:
    """AUROC in which a row without a score ties with all others: it tells nothing, and no row is left out."""
    known = ~np.isnan(scores)
    pairs = (known & good).sum() * (known & ~good).sum() / max(good.sum() * (~good).sum(), 1)
    return float(0.5 + pairs * (auroc(scores.tolist(), good.tolist()) - 0.5)) if pairs else 0.5


def bootstrap(figure: Callable[[npt.NDArray[np.int64]], float], size: int, seed: int = 0) -> Interval:
    """A figure of all rows, and its 95% interval over rows drawn anew; `figure` takes their positions."""
    draws = np.random.default_rng(seed).integers(0, size, (_DRAWS, size))
    found = [figure(rows) for rows in draws]
    low, high = np.nanpercentile(found, [2.5, 97.5]) if not np.isnan(found).all() else (float("nan"),) * 2
    return float(figure(np.arange(size))), float(low), float(high)


def share(hits: npt.NDArray[np.bool_]) -> Interval:
    """A share with its 95% interval by Wilson's score: 40 of 40 is no certainty, as drawn anew it would be."""
    if not len(hits):
        return (float("nan"),) * 3
    n, p, z = len(hits), float(hits.mean()), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def rarer(scores: npt.NDArray[np.floating[Any]], good: npt.NDArray[np.bool_]) -> int:
    """Rows with a score of the kind, right or wrong, that has fewer."""
    known = good[~np.isnan(scores)]
    return int(min(known.sum(), (~known).sum()))
