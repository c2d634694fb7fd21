"""Which of two responses is better: asked in both orders, as judges favour a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from clear_datasets import prompts
from clear_datasets.asking import ask
from clear_datasets.confidence import BSDetector, Estimator
from clear_datasets.engines import Asks, Engine, Messages
from clear_datasets.formats import Example

Scores = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Preferred:
    """How sure a model is that candidates are better than responses.

    Attributes:
        preference: float32 [examples] in [0, 1]; 0.5 is a tie, nan where it is not known.
        position_bias: float32 [examples] in [-1, 1], how far the verdicts favour what stands first (1) or second (-1).
        errors: Why an example has no preference; "" where it has one.
    """

    preference: Scores
    position_bias: Scores
    errors: list[str]


class Preference(Protocol):
    """Which of two responses is better, and how sure."""

    def __call__(self, examples: Sequence[Example], candidates: Sequence[str], engine: Engine) -> Preferred:
        """Judge each candidate against the response of its example.

        Args:
            examples: Prompts and responses.
            candidates: A text for each.
            engine: The base model.

        Returns:
            Preferences and reasons, in the order of the examples; the two exchanged give 1 - preference.
        """
        ...


@dataclass(frozen=True)
class Pairwise:
    """A pairwise judgement by the base model, and the confidence in it.

    The model is asked which of two responses is better, first, second or tie, in both orders. With c and t, the
    confidence that the candidate is better and that the target is, in each order:
    ``preference = 1/2 + (c1 * c2 - t1 * t2) / 2``. What is preferred in one order alone counts as a tie, and the two
    exchanged give 1 - preference.

    *Direct*, without `confidence`: c and t are the probabilities of the labels, from one forward pass each. *Reasoned*:
    they are BSDetector's confidence that the verdict answers the question, as in the paper:
    ``Pairwise(BSDetector(samples="reasoned", reflection="reasoned"))``.

    Args:
        confidence: The estimator of the reasoned form.

    Examples:
        >>> Pairwise().confidence is None
        True

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (Auto-Correct); the combination of both orders is ours.
    """

    confidence: Estimator | None = None

    def __call__(self, examples: Sequence[Example], candidates: Sequence[str], engine: Engine) -> Preferred:
        """See `Preference`."""
        if len(examples) != len(candidates):
            raise ValueError(f"{len(candidates)} candidates for {len(examples)} examples; expected one for each")
        asked = [
            [prompts.better(e.prompt, *pair) for pair in ((e.response, c), (c, e.response))]
            for e, c in zip(examples, candidates, strict=True)
        ]
        verdicts, errors = self._direct(asked, engine) if self.confidence is None else self._reasoned(asked, engine)
        (t1, c1), (c2, t2) = verdicts[:, 0].T, verdicts[:, 1].T
        preference = 0.5 + (c1 * c2 - t1 * t2) / 2
        for i in np.flatnonzero(np.isnan(preference)).tolist():
            errors[i] = errors[i] or "the model answers the question which is better with none of its labels"
        return Preferred(preference, (t1 - c1 + c2 - t2) / 2, errors)

    def _direct(self, asked: list[list[Messages]], engine: Engine) -> tuple[Scores, list[str]]:
        """Probabilities of first and second, float32 [examples, orders, 2]."""
        errors = [""] * len(asked)
        verdicts = np.full((len(asked), 2, 2), np.nan, dtype=np.float32)
        for i, answers in ask(engine, errors, lambda i: Asks(choose=asked[i], labels=prompts.BETTER)).items():
            verdicts[i] = answers.chosen[:, :2]
        return verdicts, errors

    def _reasoned(self, asked: list[list[Messages]], engine: Engine) -> tuple[Scores, list[str]]:
        """The same as BSDetector's confidence in either verdict."""
        assert self.confidence is not None
        questions = [Example(p, label) for pair in asked for p in pair for label in prompts.BETTER[:2]]
        found = self.confidence(questions, engine)
        errors = [next((e for e in found.errors[4 * i : 4 * i + 4] if e), "") for i in range(len(asked))]
        return found.confidence.reshape(len(asked), 2, 2), errors


def by_name(name: str, estimator: BSDetector) -> Preference:
    """The preference that a command line names, with the estimator that scores."""
    if name == "confidence":
        return ByConfidence(estimator)
    reasoned = BSDetector(k=estimator.k, samples="reasoned", reflection="reasoned")
    return Pairwise(reasoned if name == "reasoned" else None)


@dataclass(frozen=True)
class ByConfidence:
    """What either response is worth by itself, taken for a chance of being right.

    With c and t, BSDetector's confidence in candidate and target: ``preference = c (1 - t) / (c (1 - t) + t (1 - c))``,
    the chance that the candidate is right where one of them is. Both are compared with the same samples; exchanged in
    one batch (with `Transformers`, in any) they give 1 - preference. The default, as models of 0.5B and 1.5B parameters
    are never sure which answer of a pair is better (docs/log.md).

    Args:
        confidence: The estimator.

    Examples:
        >>> ByConfidence().confidence == BSDetector()
        True

    References:
        Chen and Mueller 2024, arXiv 2308.16175: one set of samples serves every response to a prompt. As a preference
        it is ours.
    """

    confidence: Estimator = field(default_factory=BSDetector)

    def __call__(self, examples: Sequence[Example], candidates: Sequence[str], engine: Engine) -> Preferred:
        """See `Preference`; there are no places, and no bias for them."""
        both = [
            e for pair in zip(examples, candidates, strict=True) for e in (pair[0], Example(pair[0].prompt, pair[1]))
        ]
        found = self.confidence(both, engine)
        target, candidate = found.confidence.reshape(-1, 2).T
        errors = [a or b for a, b in zip(found.errors[::2], found.errors[1::2], strict=True)]
        better, worse = candidate * (1 - target), target * (1 - candidate)
        total = better + worse
        preference = np.where(total == 0, 0.5, better / np.where(total == 0, 1, total)).astype(np.float32)
        return Preferred(preference, np.where(np.isnan(preference), np.nan, 0).astype(np.float32), errors)
