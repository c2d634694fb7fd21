"""How well a confidence finds noise in one's own rows, and weights that find it better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clear_datasets import noise as makers
from clear_datasets.apply import OURS
from clear_datasets.confidence import BSDetector, Confidence
from clear_datasets.formats import Format, FormatError
from clear_datasets.infer_format import infer_dataset, without_media
from clear_datasets.intervals import FEW, Interval, auroc_of_all, bootstrap, interval, rarer, share

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets.steps import Clear

Scores = npt.NDArray[np.float64]

NOISES = ("swap", "truncate", "wrong_sentence", "wrong_number")  # by default
_FOLDS = 5
_GRID = tuple(round(0.1 * i, 1) for i in range(11))
_NAMES = {"s": "similarity", "r": "agreement", "f": "reflection"}


@dataclass(frozen=True)
class Threshold:
    """What a threshold would do to rows like these.

    Attributes:
        gamma: The threshold.
        kept: Share of the rows above it.
        recall: Share of the wrong rows that are not kept, with its 95% interval (Wilson's).
        precision: Share of the rows that are not kept that are wrong, likewise.
    """

    gamma: float
    kept: float
    recall: Interval
    precision: Interval


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` has found.

    Attributes:
        clear: The steps, with the weights that were fitted where these are better.
        gamma: A threshold for `decide`: where recall less the share of right rows that are lost is greatest.
        signals: The AUROC of each signal, 0.5 is chance.
        thresholds: What a threshold would do, for keeping a tenth to nine tenths of the rows; equal ones once.
        rows: The rows with their noise and their scores, for `report`.
        notes: What was found, in words.
    """

    clear: Clear
    gamma: float
    signals: dict[str, Interval]
    thresholds: list[Threshold]
    rows: Dataset
    notes: list[str]


def calibrate(
    clear: Clear,
    ds: Dataset,
    *,
    noise: Sequence[str] = NOISES,
    fraction: float = 0.2,
    rows: int = 200,
    among: Sequence[BSDetector] = (),
    seed: int = 0,
) -> Calibration:
    """Put known noise into a sample of one's own rows, and see which signals find it.

    A small model's signals can be worse than chance. No labels are needed: targets are made wrong on purpose, and the
    rest is taken to be right, so that noise that is there already makes every figure a little too low. A signal whose
    AUROC may be chance gets no weight. The others' weights are fitted in five folds, and taken only where they are
    better than those of `clear` beyond the interval, on rows that they were not fitted on.

    Args:
        clear: The steps to calibrate.
        ds: Rows in any format that `Clear.score` takes.
        noise: Names of the makers of `clear_datasets.noise`; what the rows do not allow is left out.
        fraction: Share of the rows to make wrong.
        rows: How many rows to take.
        among: More estimators to try: other forms, other similarities.
        seed: Of the choice of rows and noise.

    Raises:
        TypeError: The estimator is not `BSDetector`.
        ValueError: None of the rows can be read or scored, or none of the makers can be used on them.
    """
    if not isinstance(clear.confidence, BSDetector):
        raise TypeError(f"weights are fitted of BSDetector's parts; {type(clear.confidence).__name__} has none")
    if unknown := [kind for kind in noise if kind not in makers.MAKERS]:
        raise ValueError(f"there is no noise {', '.join(unknown)}; known are {', '.join(makers.MAKERS)}")
    form = clear.format or infer_dataset(ds.with_format(None))
    notes: list[str] = []
    sample = _noisy(_readable(ds, form, rows, seed, notes), noise, fraction, seed, form, notes)
    examples, good = [form.read(row) for row in without_media(sample)], np.array([not kind for kind in sample["noise"]])
    if good.all() or not good.any():
        raise ValueError(f"{len(good)} rows with fraction={fraction} have {(~good).sum()} wrong ones: take more rows")
    engine = clear._base(None)
    signals: dict[str, Interval] = {}
    estimators = enumerate((clear.confidence, *among), start=1)
    tried = [_Tried(e, _whole(e)(examples, engine), good, seed, number) for number, e in estimators]
    for one in tried:
        signals |= one.signals
        if lacking := int(np.isnan(one.found.confidence).sum()):
            notes.append(f"{lacking} of {len(good)} rows have no score of {one.name}: they tell nothing for it")
    own = tried[0].without_the_useless(notes)
    best = max(tried, key=lambda one: one.fitted_auroc)
    gain = _difference(best.out_of_fold, tried[0].scores(*own), good, seed)
    better = gain[1] > 0 and best.rarer >= FEW
    chosen, weights = (best, best.weights) if better else (tried[0], own)
    notes.append(
        f"weights alpha={weights[0]}, beta={weights[1]} of {chosen.name}"
        + (f": better by {gain[0]:.3f} ({gain[1]:.3f} to {gain[2]:.3f}) of AUROC on rows they were not fitted on"
           if better else ", as fitted ones were not better beyond the interval")
    )  # fmt: skip
    scores = chosen.scores(*weights)
    if np.isnan(scores).all():
        raise ValueError(f"no row has a score: {'; '.join(notes)}")
    signals["confidence, as it is now"] = interval(scores, good, seed)
    if len(kinds := sorted({kind for kind in sample["noise"] if kind})) > 1:  # one may be found, and another not at all
        for kind in kinds:
            rows_of = np.array([noise in ("", kind) for noise in sample["noise"]])
            signals[f"confidence, as it is now: {kind}"] = interval(scores[rows_of], good[rows_of], seed)
    fitted = replace(clear, confidence=replace(chosen.estimator, alpha=weights[0], beta=weights[1]))
    return Calibration(
        fitted, _gamma(scores, good), signals, _thresholds(scores, good),
        _scored(sample, scores, chosen, weights[0]), notes,
    )  # fmt: skip


def _readable(ds: Dataset, form: Format, rows: int, seed: int, notes: list[str]) -> Dataset:
    """Random rows, without columns of an earlier scoring."""
    sample = ds.with_format(None).remove_columns([name for name in ds.column_names if name in OURS])
    sample = sample.shuffle(seed=seed).select(range(min(rows, len(ds))))
    reasons: dict[int, str] = {}
    for i, row in enumerate(without_media(sample)):
        try:
            form.read(row)
        except FormatError as error:
            reasons[i] = str(error)
    if len(reasons) == len(sample):
        raise ValueError(f"none of the {len(sample)} rows can be read; the first: {reasons.get(0, 'there is none')}")
    if reasons:
        notes.append(f"without {len(reasons)} of {len(sample)} rows; the first one: {next(iter(reasons.values()))}")
    return sample.select([i for i in range(len(sample)) if i not in reasons])


def _noisy(
    sample: Dataset, kinds: Sequence[str], fraction: float, seed: int, form: Format, notes: list[str]
) -> Dataset:
    """An equal part of the rows for each maker that they allow."""
    from datasets import concatenate_datasets

    left = list(kinds)
    while left:
        parts: list[Dataset] = []
        try:
            for i, kind in enumerate(left):
                parts.append(makers.MAKERS[kind](sample.shard(len(left), i), fraction, seed, format=form))
            return concatenate_datasets(parts)
        except (ValueError, KeyError) as error:
            notes.append(f"without {left.pop(len(parts))}: {error}")  # the others share its rows
    raise ValueError(f"none of the noises {', '.join(kinds)} can be put into these rows: {'; '.join(notes)}")


def _whole(estimator: BSDetector) -> BSDetector:
    """The same, with all parts asked for."""
    alpha = estimator.alpha if 0 < estimator.alpha < 1 else 0.5
    return replace(estimator, alpha=alpha, beta=estimator.beta if 0 < estimator.beta < 1 else 0.7)


class _Tried:
    """An estimator's parts on the rows, and the weights that suit them."""

    def __init__(
        self, estimator: BSDetector, found: Confidence, good: npt.NDArray[np.bool_], seed: int, number: int
    ) -> None:
        self.estimator, self.found, self.good, self.seed = estimator, found, good, seed
        self.name = f"{estimator.samples}, {type(estimator.similarity).__name__}" + (
            f" ({number})" if number > 1 else ""
        )
        self.rarer = rarer(found.confidence, good)
        self.parts = {"s": found.similarity, "r": found.agreement, "f": found.reflection}
        if all(np.isnan(part).all() for part in self.parts.values()):
            raise ValueError(f"none of the rows could be scored: {next((e for e in found.errors if e), 'no reason')}")
        self.signals = {f"{self.name}: {_NAMES[p]}": interval(v, good, seed) for p, v in self.parts.items()}
        whole = self.scores(estimator.alpha, estimator.beta)
        self.signals[f"{self.name}: confidence"] = interval(whole, good, seed)
        self.useless = {p for p in self.parts if not self.signals[f"{self.name}: {_NAMES[p]}"][1] > 0.5}
        self.weights = self._best(np.ones(len(good), dtype=bool))
        self.out_of_fold = np.full(len(good), np.nan)
        for fold in self._folds():
            self.out_of_fold[fold] = self.scores(*self._best(~fold))[fold]
        self.fitted_auroc = auroc_of_all(self.out_of_fold, good)

    def scores(self, alpha: float, beta: float) -> Scores:
        """Confidence by other weights; a part without weight does not matter, be it nan."""
        weights = {"s": alpha * beta, "r": (1 - alpha) * beta, "f": 1 - beta}
        total: Scores = np.zeros(len(self.good))
        for part, weight in weights.items():
            total = total + weight * self.parts[part] if weight else total
        return total

    def without_the_useless(self, notes: list[str]) -> tuple[float, float]:
        """The estimator's own weights, those of signals that tell nothing set to 0."""
        alpha, beta = self.estimator.alpha, self.estimator.beta
        for part in sorted(self.useless):
            value, low, high = self.signals[f"{self.name}: {_NAMES[part]}"]
            notes.append(
                f"{_NAMES[part]} of {self.name} tells nothing here: AUROC {value:.3f} ({low:.3f} to {high:.3f})"
            )
        if self.useless == set(self.parts):
            few = f"{self.rarer} rows of a kind are few" if self.rarer < FEW else ""
            notes.append(f"no signal tells anything here: {few or 'do not use the scores of this model on these rows'}")
            return alpha, beta
        if {"s", "r"} <= self.useless:
            return alpha, 0.0
        alpha = 0.0 if "s" in self.useless else 1.0 if "r" in self.useless else alpha
        return alpha, 1.0 if "f" in self.useless else beta

    def _best(self, rows: npt.NDArray[np.bool_]) -> tuple[float, float]:
        """Weights of the greatest AUROC on some rows; of equal ones the nearest to the estimator's own."""
        alphas = [a for a in _GRID if not ("s" in self.useless and a > 0) and not ("r" in self.useless and a < 1)]
        betas = [b for b in _GRID if not ("f" in self.useless and b < 1) and not ({"s", "r"} <= self.useless and b > 0)]
        own = self.estimator.alpha, self.estimator.beta
        pairs = [(a, b) for a in alphas or (own[0],) for b in betas or (own[1],)]

        def worth(weights: tuple[float, float]) -> tuple[float, float]:
            auroc = auroc_of_all(self.scores(*weights)[rows], self.good[rows])
            return round(auroc, 4), -abs(weights[0] - own[0]) - abs(weights[1] - own[1])

        return max(pairs, key=worth)

    def _folds(self) -> list[npt.NDArray[np.bool_]]:
        """Fifths of the rows, each with its share of wrong ones."""
        order = np.random.default_rng(self.seed).permutation(len(self.good))
        order = order[np.argsort(self.good[order], kind="stable")]
        number = np.empty(len(order), dtype=int)
        number[order] = np.arange(len(order)) % _FOLDS
        return [number == fold for fold in range(_FOLDS)]


def _difference(ours: Scores, theirs: Scores, good: npt.NDArray[np.bool_], seed: int) -> Interval:
    def gain(rows: npt.NDArray[Any]) -> float:
        return auroc_of_all(ours[rows], good[rows]) - auroc_of_all(theirs[rows], good[rows])

    return bootstrap(gain, len(good), seed)


def _gamma(scores: Scores, good: npt.NDArray[np.bool_]) -> float:
    known = ~np.isnan(scores)
    values = np.unique(scores[known])
    cuts = (values[:-1] + values[1:]) / 2 if len(values) > 1 else values
    worth = [np.mean(scores[known & ~good] <= cut) - np.mean(scores[known & good] <= cut) for cut in cuts]
    return float(cuts[int(np.argmax(worth))])


def _thresholds(scores: Scores, good: npt.NDArray[np.bool_]) -> list[Threshold]:
    known = ~np.isnan(scores)
    values, wrong = scores[known], ~good[known]
    found = []
    for gamma in dict.fromkeys(float(np.quantile(values, 1 - kept)) for kept in _GRID[1:-1]):
        out = values <= gamma
        found.append(Threshold(gamma, float(1 - out.mean()), share(out[wrong]), share(wrong[out])))
    return found


def _scored(sample: Dataset, scores: Scores, chosen: _Tried, alpha: float) -> Dataset:
    added: dict[str, npt.NDArray[Any]] = {"clear_confidence": scores, "clear_consistency": chosen.scores(alpha, 1.0),
             "clear_reflection": chosen.found.reflection}  # fmt: skip
    rows = sample
    for name, values in added.items():
        rows = rows.add_column(name, values.astype(np.float32))
    return rows
