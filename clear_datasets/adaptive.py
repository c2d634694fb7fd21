"""Samples as far as they matter: a row stops once no outcome of those it lacks can change its decision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from clear_datasets import prompts
from clear_datasets.asking import ask
from clear_datasets.confidence import BSDetector, Confidence, Scores
from clear_datasets.decide import BOUNDS, Bracket, bracket_of, columns_of
from clear_datasets.engines import Asks, Engine
from clear_datasets.engines.cache import Cached
from clear_datasets.engines.store import Item, Store
from clear_datasets.formats import Example

if TYPE_CHECKING:
    from clear_datasets import Clear
    from clear_datasets.decide import AnyDataset

    D = TypeVar("D", bound=AnyDataset)

_OWN = {"batched", "function", "input_columns", "remove_columns", "with_indices"}  # of ``ds.map``: not for each pass
_NAMES = {"cache_file_name", "cache_file_names", "new_fingerprint"}  # of a result, as which a pass would take the first
_PARTS = ("confidence", "consistency", "reflection", "similarity", "agreement", "compared")
NUMBERS = ("clear_confidence", *BOUNDS, "clear_drawn")  # what a pass goes by


def rounds_of(k: int) -> tuple[int, ...]:
    """Numbers of samples after which rows are looked at: three times, as each round reads the prompts anew.

    Examples:
        >>> rounds_of(8), rounds_of(5), rounds_of(2)
        ((3, 6, 8), (2, 4, 5), (1, 2))
    """
    step = math.ceil(k / 3)
    return (*range(step, k, step), k)


@dataclass(frozen=True)
class Bounded(Confidence):
    """Confidence from the samples that were drawn, and what it may be after all.

    Attributes:
        least: float32 [examples], no more than the confidence after all samples; that itself where all are drawn.
            A row without a confidence that has bounds may get one.
        most: float32 [examples], no less.
        drawn: int32 [examples], samples drawn.
    """

    least: Scores
    most: Scores
    drawn: npt.NDArray[np.int32]

    @classmethod
    def earlier(cls, batch: Mapping[str, Any], rows: Sequence[int]) -> Bounded:
        """What an earlier pass has left in the columns of a batch, of some rows: all but parts of consistency."""
        numbers = {
            name: np.asarray(batch[name], dtype=np.float32)[list(rows)]
            for name in (*NUMBERS, "clear_consistency", "clear_reflection")
        }
        confidence, least, most, drawn, consistency, reflection = numbers.values()
        found = Confidence.of(confidence, [batch["clear_error"][i] for i in rows])
        parts = {**vars(found), "consistency": consistency, "reflection": reflection}
        return cls(**parts, least=least, most=most, drawn=drawn.astype(np.int32))


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

    *No sample yet.* r and S are of one forward pass. Where r is read and the similarity is ``total``, C lies between
    ``beta (1 - alpha) r + (1 - beta) S`` and that plus alpha beta, as s is in [0, 1]; the middle stands in the column.
    Whether the row can be sampled at all is asked, too (``n=0``), and one whose response cannot be compared goes on.

    *Rounding.* All terms are in [0, 1] and float32; each of the j + 7 operations that make C_j of the similarities (a
    sum, a division, three products with rounded weights, two sums) errs by at most 2^-24, and so with k. Bounds that
    are (k + 8) 2^-22 wider hold for what either run computes. Rows with all their samples are bounded by C itself.

    *The threshold that keeps a share of the rows.* Let x be the scores after all samples, x(p) and x(p+1) the two that
    `threshold` takes the middle of, both in [low, high] by `bracket`. Rows that stopped below have x < low, and their
    estimates x' < low; those that stopped above have x > high and x' > high; the others x' = x. So for each t in
    [low, high] as many x' as x are below t, and as many at most t: x'(p) = x(p), x'(p+1) = x(p+1), gamma is the same,
    and as it lies in [low, high] so are the decisions. (Where all are kept, gamma is just below x(1), and no row stops
    below.) It does not matter which rows are sampled in which order, until none is left within.

    Args:
        detector: What is estimated; its similarity has to stay in [0, 1].
        low: The least that gamma may be.
        high: The most.
        rounds: Numbers of samples after which rows are looked at, see `rounds_of`; all k in the end.
        onwards: Whether an earlier pass has left bounds in the columns, from which rows go on by one round.

    Raises:
        TypeError: The estimator is no `BSDetector`: of others no bounds are known.

    Examples:
        >>> Adaptive(BSDetector(k=8), 0.4, 0.4).rounds
        (3, 6, 8)
    """

    detector: BSDetector
    low: float
    high: float
    rounds: tuple[int, ...] = ()
    onwards: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.detector, BSDetector):
            raise TypeError(f"adaptive sampling knows the bounds of BSDetector alone; got {type(self.detector)}")
        rounds = tuple(r for r in self.rounds if r < self.detector.k)
        object.__setattr__(self, "rounds", (*rounds, self.detector.k) if rounds else rounds_of(self.detector.k))

    def __call__(self, examples: Sequence[Example], engine: Engine, earlier: Bounded | None = None) -> Bounded:
        """See `Estimator`; rows of one prompt share their samples, and go on together."""
        known = engine if isinstance(engine, Cached) else _Remembering(engine)
        seen: dict[str, int] = {}
        asked = (repr(prompts.sample(e.prompt, self.detector.samples)) for e in examples)
        prompt = np.array([seen.setdefault(text, len(seen)) for text in asked], dtype=np.int64)
        found = self._begun(examples, known) if earlier is None else earlier
        while (going := self._going(found, prompt)).any():
            drawn = np.zeros(len(prompt), dtype=np.int32)
            np.maximum.at(drawn, prompt, found.drawn)
            after = np.array(
                [next(r for r in self.rounds if r > d) if d < self.detector.k else d for d in drawn[prompt]]
            )
            for samples in sorted({*after[going].tolist()}):
                self._draw(examples, known, found, np.flatnonzero(going & (after == samples)), samples)
            if earlier is not None:
                break
        return found

    def _going(self, found: Bounded, prompt: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Rows that may lie within, or may get a score, and those that share a prompt with one of them."""
        within = (found.least <= self.high) & (found.most >= self.low)
        unknown = np.isnan(found.confidence) & ~np.isnan(found.least)
        return np.isin(prompt, prompt[(found.drawn < self.detector.k) & (within | unknown)])

    def _begun(self, examples: Sequence[Example], engine: Engine) -> Bounded:
        """The first look: without a sample where that tells something, else after the first round."""
        detector, size = self.detector, len(examples)
        parts = vars(Confidence.of(np.full(size, np.nan), [""] * size)).items()
        found = Bounded(**{name: part.copy() for name, part in parts}, least=np.full(size, np.nan, np.float32),
                        most=np.full(size, np.nan, np.float32), drawn=np.zeros(size, np.int32))  # fmt: skip
        needed, total = detector.samples_needed(engine), getattr(detector.similarity, "total", False)
        if not (needed and total and detector.reads and engine.reads):
            self._draw(examples, engine, found, np.arange(size), self.rounds[0] if needed else detector.k)
            return found
        read = replace(detector, alpha=0.0)(examples, engine)
        for name in ("confidence", "consistency", "reflection", "agreement"):
            getattr(found, name)[:] = getattr(read, name)
        found.errors[:] = read.errors
        self._refuse_what_cannot_be_sampled(examples, engine, found)
        fixed = read.confidence.astype(np.float64) - detector.beta * detector.alpha * read.agreement
        found.least[:], found.most[:] = fixed - self._margin, fixed + detector.beta * detector.alpha + self._margin
        found.consistency[:] = detector.alpha / 2 + (1 - detector.alpha) * read.agreement
        found.confidence[:] = fixed + detector.beta * detector.alpha / 2
        alone = detector.compared([(e.response, e.response) for e in examples], engine)
        found.confidence[np.isnan(alone)] = np.nan
        for values in (found.least, found.most, found.confidence, found.consistency):
            values[[bool(e) for e in found.errors]] = np.nan
        return found

    def _refuse_what_cannot_be_sampled(self, examples: Sequence[Example], engine: Engine, found: Bounded) -> None:
        detector = self.detector

        def question(i: int) -> Asks:
            own = prompts.sample(examples[i].prompt, detector.samples)
            limit = detector.limit(examples[i].response)
            return Asks([own], n=0, temperature=detector.temperature, max_tokens=[limit])

        ask(engine, found.errors, question)

    def _draw(
        self, examples: Sequence[Example], engine: Engine, found: Bounded, rows: npt.NDArray[np.int64], samples: int
    ) -> None:
        """So many samples of some rows, and what is known then."""
        # A run with fewer samples; of what an earlier round asked nothing is asked again.
        more = replace(self.detector, k=samples)([examples[i] for i in rows], engine)
        for part in _PARTS:
            getattr(found, part)[rows] = getattr(more, part)
        for i, error in zip(rows, more.errors, strict=True):
            found.errors[i] = error
        found.drawn[rows] = samples
        found.least[rows], found.most[rows] = self._bounds(more, samples, engine)

    @property
    def _margin(self) -> float:
        return float((self.detector.k + 8) * 2.0**-22)

    def _bounds(self, found: Confidence, drawn: int, engine: Engine) -> tuple[Scores, Scores]:
        """The least and the most that confidence may be after all samples."""
        detector, score = self.detector, found.confidence.astype(np.float64)
        left = detector.k - drawn
        if not left or not detector.samples_needed(engine):
            return found.confidence.copy(), found.confidence.copy()
        s, r = found.similarity.astype(np.float64), found.agreement.astype(np.float64)
        s = s if detector.alpha else np.zeros_like(s)  # not asked for
        of_s = detector.beta * detector.alpha * left / np.maximum(found.compared + left, 1)
        of_r = detector.beta * (1 - detector.alpha) * left / detector.k * (not (detector.reads and engine.reads))
        least = score - of_s * s - of_r * r - self._margin
        most = score + of_s * (1 - s) + of_r * (1 - r) + self._margin
        # No sample could be compared so far: nothing is known. One that was refused, or lacks r or S, stays without.
        refused = np.isnan(r) | (np.isnan(found.reflection) & (detector.beta < 1))
        unknown = np.isnan(score) & ~refused
        return np.where(unknown, 0, least).astype(np.float32), np.where(unknown, 1, most).astype(np.float32)


def score_to_keep(ds: D, clear: Clear, keep: float = 0.5, **how: Any) -> D:
    """``ds.map(clear.score, batched=True)``, with no more samples than the threshold that keeps a share of rows needs.

    Passes over the rows: the first reads each once, without a sample where that tells something (see `Adaptive`); each
    further one guesses the threshold, and draws more of the rows that may lie on either side of the guess. It ends when
    none is left that may lie on either side of the threshold itself. The cache of answers has what earlier passes drew.
    `threshold` with the same share, and the decisions at it, are those of all samples, see `Adaptive`. Other thresholds
    are refused where a row is not known well enough for them.

    Args:
        ds: A dataset, or a stream, which is read once a pass.
        clear: The steps, with the cache of answers.
        keep: Share of the scored rows to keep, in [0, 1].
        how: For ``ds.map``, as ``batch_size``; not what each pass has of its own, as ``remove_columns``.

    Returns:
        The dataset with the columns of `Clear.score`, with ``clear_least`` and ``clear_most``, what the confidence may
        be after all samples, and ``clear_drawn``, how many were drawn.

    Raises:
        ValueError: `keep` is out of range, or the cache is off.
        TypeError: The estimator is no `BSDetector`, or an option of ``ds.map`` does not go with several passes.

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
    if taken := sorted(_OWN & {*how}):
        raise TypeError(
            f"{' and '.join(taken)} cannot be set: each pass over the rows goes on from what the one before has added; "
            "call ds.map(...) with it before or behind score_to_keep"
        )
    if (taken := sorted(_NAMES & {*how})) and how.get("load_from_cache_file") is not False:
        raise TypeError(
            f"{' and '.join(taken)} needs load_from_cache_file=False here: else each pass finds the result of the first"
        )
    whole = Adaptive(clear.confidence, math.inf, -math.inf)  # type: ignore[arg-type]  # it checks that
    scored = ds
    while True:
        step = replace(clear, confidence=whole, gamma=None, adaptive=False).score
        scored = cast("D", scored.map(step, batched=True, **how))
        values = columns_of(scored, NUMBERS)
        found = bracket_of(values[:3], keep)
        unknown = np.isnan(values[0]) & ~np.isnan(values[1])
        if not found.unsure and not unknown.any():
            return scored
        guess = _guess(values[:, ~np.isnan(values[0])], found, keep)
        whole = replace(whole, low=guess, high=guess, onwards=True)
        if not (unknown.any() or ((values[1] <= guess) & (values[2] >= guess) & (values[3] < whole.detector.k)).any()):
            whole = replace(whole, low=found.low, high=found.high)


def _guess(values: npt.NDArray[np.float64], found: Bracket, keep: float) -> float:
    """Where the threshold is likely to be: rows are sampled until each is surely above or below, then looked at again.

    Each row is taken for where its own samples and one average one put it within its bounds; before any is drawn, for
    the least that it may be: that is below half of the rows, so that at first only half are sampled.
    """
    _, least, most, drawn = values
    width = most - least
    own = np.divide(values[0] - least, width, out=np.zeros_like(width), where=width > 0)  # the mean of its similarities
    every = float(np.average(own, weights=drawn * (width > 0))) if (drawn * (width > 0)).any() else 0.0
    likely = np.sort(least + width * (drawn * own + every) / (drawn + 1))
    place = min(len(likely) - round(keep * len(likely)), len(likely) - 1)
    return float(np.clip(likely[max(place - 1, 0) : place + 1].mean(), found.low, found.high))


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
