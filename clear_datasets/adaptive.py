"""Samples as far as they matter: a row stops once no outcome of those it lacks can change its decision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from clear_datasets import prompts
from clear_datasets.confidence import BSDetector, Confidence, Scores
from clear_datasets.decide import bracket
from clear_datasets.engines import Engine
from clear_datasets.engines.cache import Cached
from clear_datasets.engines.store import Item, Store
from clear_datasets.formats import Example

if TYPE_CHECKING:
    from clear_datasets import Clear
    from clear_datasets.decide import AnyDataset

    D = TypeVar("D", bound=AnyDataset)

ROUNDS = (1, 2, 3, 5)  # samples after which rows are looked at, before all k: the later, the less one of them tells
_PARTS = ("confidence", "consistency", "reflection", "similarity", "agreement", "compared")


def rounds_of(k: int) -> tuple[int, ...]:
    """Numbers of samples after which rows are looked at.

    Examples:
        >>> rounds_of(8), rounds_of(2)
        ((1, 2, 3, 5, 8), (1, 2))
    """
    return (*(r for r in ROUNDS if r < k), k)


@dataclass(frozen=True)
class Bounded(Confidence):
    """Confidence from the samples that were drawn, and what it may be after all.

    Attributes:
        least: float32 [examples], no more than the confidence after all samples; that itself where all are drawn.
        most: float32 [examples], no less.
        drawn: int64 [examples], samples drawn.
    """

    least: Scores
    most: Scores
    drawn: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Adaptive:
    """An estimator that samples a row until its confidence is surely outside of ``[low, high]``.

    Decisions at any gamma in ``[low, high]`` are those after all k samples, as long as these begin with the samples
    that were drawn here, which the cache of answers sees to.

    *Bounds.* ``C = beta * (alpha * s + (1 - alpha) * r) + (1 - beta) * S``; s is the mean of the similarities that are
    numbers. Say that j of k samples are drawn, l = k - j lack, and n >= 1 of the j could be compared, with the mean m.
    Of the l, any l' <= l will be comparable, their similarities in [0, 1] with the sum T in [0, l'].
    Then ``s = (n m + T) / (n + l')``:

    - ``s >= n m / (n + l)``, as T >= 0 and l' <= l.
    - ``s <= (n m + l') / (n + l')``, which rises with l', as n m <= n: ``s <= (n m + l) / (n + l)``.

    r is a constant where the engine reads log-probabilities; else it is a mean of k numbers in [0, 1], for which the
    same holds with n = j and l' = l. S is a constant. The weights are not negative, so the bounds add up: C after k
    samples lies in ``[C_j - down, C_j + up]``, with ``down = beta * (alpha m l / (n + l) + (1 - alpha) r l / k)``
    and up is the same with 1 - m and 1 - r; the second term is there only where r comes from samples. Neither is
    negative, so C_j, which stands in the column, lies there as well: compared with a gamma outside of the bounds it
    gives the decision of all samples. Where n = 0 nothing is known of C, not even whether it is a number: such a row
    goes on. One that lacks r or S has no score, whatever its samples: it stops.

    *Rounding.* All terms are in [0, 1] and float32; each of the j + 7 operations that make C_j of the similarities (a
    sum, a division, three products with rounded weights, two sums) errs by at most 2^-24, and so with k. Bounds that
    are (k + 8) 2^-22 wider hold for what either run computes. Rows with all their samples are bounded by C itself.

    *The threshold that keeps a share of the rows.* Let x be the scores after all samples, x(p) and x(p+1) the two that
    `threshold` takes the middle of, both in [low, high] by `bracket`. Rows that stopped below have x < low, and their
    estimates x' < low; those that stopped above have x > high and x' > high; the others x' = x. So for each t in
    [low, high] as many x' as x are below t, and as many at most t: x'(p) = x(p), x'(p+1) = x(p+1), gamma is the same,
    and as it lies in [low, high] so are the decisions. (Where all are kept, gamma is just below x(1), and no row stops
    below.) Each bracket holds these two scores, and so does what several of them share.

    Args:
        detector: What is estimated; its similarity has to stay in [0, 1].
        low: The least that gamma may be.
        high: The most.
        rounds: Numbers of samples after which rows are looked at. A row without a score yet goes on to all k; one with
            a score not beyond the last of these. By default 1, 2, 3, 5, then all.

    Raises:
        TypeError: The estimator is no `BSDetector`: of others no bounds are known.

    Examples:
        >>> Adaptive(BSDetector(k=8), 0.4, 0.4).rounds
        (1, 2, 3, 5, 8)
    """

    detector: BSDetector
    low: float
    high: float
    rounds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.detector, BSDetector):
            raise TypeError(f"adaptive sampling knows the bounds of BSDetector alone; got {type(self.detector)}")
        rounds = tuple(min(r, self.detector.k) for r in self.rounds) or rounds_of(self.detector.k)
        object.__setattr__(self, "rounds", rounds)

    def __call__(self, examples: Sequence[Example], engine: Engine) -> Bounded:
        """See `Estimator`. Rows of one prompt share their samples, and stop together: the last of them decides."""
        prompt = [repr(prompts.sample(e.prompt, self.detector.samples)) for e in examples]
        rounds = self.rounds if self.detector.samples_needed(engine) else (self.detector.k,)
        drawn = np.zeros(len(examples), dtype=np.int64)
        rows = list(range(len(examples)))
        whole: Confidence | None = None
        known = engine if isinstance(engine, Cached) else _Remembering(engine)
        for samples in dict.fromkeys((*rounds, self.detector.k)):
            # A run with fewer samples; of what an earlier round asked nothing is asked again.
            found = replace(self.detector, k=samples)([examples[i] for i in rows], known)
            whole = whole or found
            for part in _PARTS:
                getattr(whole, part)[rows] = getattr(found, part)
            for i, error in zip(rows, found.errors, strict=True):
                whole.errors[i] = error
            drawn[rows] = samples
            least, most = self._bounds(whole, drawn, engine)
            going = self._may_get_a_score(whole)
            if samples < rounds[-1]:
                going |= (least <= self.high) & (most >= self.low)
            asked = {prompt[i] for i in np.flatnonzero(going)}
            rows = [i for i in rows if prompt[i] in asked]
            if not rows:
                break
        assert whole is not None
        return Bounded(**vars(whole), least=least, most=most, drawn=drawn)

    def _bounds(self, found: Confidence, drawn: npt.NDArray[np.int64], engine: Engine) -> tuple[Scores, Scores]:
        """The least and the most that confidence may be after all samples."""
        detector, score = self.detector, found.confidence.astype(np.float64)
        left = detector.k - drawn
        if not left.any() or not detector.samples_needed(engine):
            return found.confidence.copy(), found.confidence.copy()
        s, r = found.similarity.astype(np.float64), found.agreement.astype(np.float64)
        of_s = detector.beta * detector.alpha * left / np.maximum(found.compared + left, 1)
        sampled = not (detector.reads and engine.reads)
        of_r = detector.beta * (1 - detector.alpha) * left / detector.k * sampled
        margin = np.where(left, (detector.k + 8) * 2.0**-22, 0)
        least = score - of_s * s - of_r * r - margin
        most = score + of_s * (1 - s) + of_r * (1 - r) + margin
        return least.astype(np.float32), most.astype(np.float32)

    def _may_get_a_score(self, found: Confidence) -> npt.NDArray[np.bool_]:
        """Rows that lack a score only because no sample could be compared so far."""
        refused = np.isnan(found.agreement) | (np.isnan(found.reflection) & (self.detector.beta < 1))
        return np.isnan(found.confidence) & ~refused


def score_to_keep(ds: D, clear: Clear, keep: float = 0.5, **how: Any) -> D:
    """``ds.map(clear.score, batched=True)``, with no more samples than the threshold that keeps a share of rows needs.

    Passes over the rows: the first draws one sample of each, and brackets the threshold; each further one draws more of
    the rows that may lie within, and narrows it. The cache of answers has what earlier passes drew.
    `threshold` with the same share, and the decisions at it, are those of all samples, see `Adaptive`. Other thresholds
    are refused where a row is not known well enough for them.

    Args:
        ds: A dataset, or a stream, which is read once a pass.
        clear: The steps, with the cache of answers.
        keep: Share of the scored rows to keep, in [0, 1].
        how: For ``ds.map``, as ``batch_size``.

    Returns:
        The dataset with the columns of `Clear.score` and with ``clear_least`` and ``clear_most``, what the confidence
        may be after all samples.

    Raises:
        ValueError: `keep` is out of range, or the cache is off.
        TypeError: The estimator is no `BSDetector`.

    Examples:
        >>> from clear_datasets import Clear
        >>> from datasets import Dataset
        >>> score_to_keep(Dataset.from_dict({}), Clear(cache=False))
        Traceback (most recent call last):
        ValueError: the passes take up the samples of earlier ones from the cache of answers: leave Clear(cache=...) on
    """
    if clear.cache is False:
        raise ValueError(
            "the passes take up the samples of earlier ones from the cache of answers: leave Clear(cache=...) on"
        )
    low, high = -math.inf, math.inf
    whole = Adaptive(clear.confidence, low, high)  # type: ignore[arg-type]  # it checks that
    for number in range(1, len(whole.rounds) + 1):
        estimator = replace(whole, low=low, high=high, rounds=whole.rounds[:number])
        step = replace(clear, confidence=estimator, gamma=None, adaptive=False).score
        scored = cast("D", ds.map(step, batched=True, **how))
        found = bracket(scored, keep)
        if not found.unsure:
            break
        low, high = max(low, found.low), min(high, found.high)
    return scored


class _Memory(Store):
    """The answers of one batch."""

    def __init__(self) -> None:
        self.path = Path("earlier rounds")
        self.values: dict[bytes, dict[int, bytes]] = {}

    def get(self, keys: Iterable[bytes]) -> dict[bytes, dict[int, bytes]]:
        return {key: self.values[key] for key in keys if key in self.values}

    def put(self, items: Iterable[Item]) -> None:
        for key, number, value in items:
            self.values.setdefault(key, {})[number] = value


@dataclass(frozen=True)
class _Remembering(Cached):
    """An engine without a cache, for one batch: each round asks for the samples that an earlier one lacks."""

    memory: Store = field(default_factory=_Memory)

    @property
    def store(self) -> Store:
        return self.memory

    @property
    def identity(self) -> str:
        return "the only engine"
