"""BSDetector: how confident a model is that a response, whoever wrote it, answers a prompt well."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, get_args

import numpy as np
import numpy.typing as npt

from clear_datasets import prompts
from clear_datasets.asking import ask
from clear_datasets.engines import Answers, Asks, Engine
from clear_datasets.formats import Example
from clear_datasets.hints import hint_at_length, hint_at_results
from clear_datasets.prompts import Form
from clear_datasets.similarity import NLI, FinalAnswer, Jaccard, Similarity, words

Scores = npt.NDArray[np.float32]

_SCALE = 3.0  # nats; chosen with alpha on rows that no figure is reported on, see docs/log.md
_SILENT = (
    "no sample says an answer: each is cut off before it, or ends within its thoughts. More max_tokens give room; a "
    "model that thinks first needs BSDetector(samples='plain', beta=1, max_tokens=4096)"
)


@dataclass(frozen=True)
class Confidence:
    """Confidence of some examples and its parts.

    Attributes:
        confidence: float32 [examples], beta * consistency + (1 - beta) * reflection; nan where a part is missing.
        consistency: float32 [examples], how far the model's own answers agree with the response.
        reflection: float32 [examples], what the model says of the response when it is asked.
        errors: Why an example has no confidence; "" where it has one.
        similarity: float32 [examples], the part of consistency that comes from the samples, s; nan where not asked for.
        agreement: float32 [examples], its other part, r; nan where not asked for.
        compared: int32 [examples], how many samples could be compared with the response.
    """

    confidence: Scores
    consistency: Scores
    reflection: Scores
    errors: list[str]
    similarity: Scores
    agreement: Scores
    compared: npt.NDArray[np.int32]

    @classmethod
    def of(cls, confidence: npt.ArrayLike, errors: Sequence[str]) -> Confidence:
        """A confidence without parts, as an estimator of one's own may have it.

        Args:
            confidence: [examples] in [0, 1]; nan where there is none.
            errors: Why an example has none; "" where it has one.

        Examples:
            >>> Confidence.of([0.5, float("nan")], ["", "too long"]).consistency
            array([nan, nan], dtype=float32)
        """
        scores, none = np.asarray(confidence, dtype=np.float32), np.full(len(errors), np.nan, dtype=np.float32)
        if scores.shape != none.shape:
            raise ValueError(f"scores of shape {scores.shape} for {len(errors)} examples; expected one for each")
        return cls(scores, none, none, list(errors), none, none, np.zeros(len(errors), dtype=np.int32))


class Estimator(Protocol):
    """How confident a model is that each response is right. `BSDetector` is one."""

    def __call__(self, examples: Sequence[Example], engine: Engine) -> Confidence:
        """Scores and reasons, in the order of the examples."""
        ...


@dataclass(frozen=True)
class BSDetector:
    """Observed consistency and self-reflection, and their weighted sum, asked of the model that is to be fine-tuned.

    ``confidence = beta * consistency + (1 - beta) * reflection``. Each question has two forms.

    *Direct*, the default: `k` samples without explanation; ``consistency = alpha * s + (1 - alpha) * r``. There s is
    the mean similarity of the response to the samples, and r tells how much likelier the whole prompt makes the
    response than what is left of it without its question: ``r = logistic((log p(response | prompt) -
    log p(response | rest)) / 3)``. Where no label names the question it may be the first paragraph or the last, and the
    smaller one of two gains counts (`prompts.incomplete`). r is for the share of samples that equal the response, which
    p estimates without sampling; the difference takes out what the passage alone makes likely.
    Reflection is the probability of "Yes" when the model is asked whether the response is correct, the mean over both
    orders of the labels. All of it but the samples is one forward pass. An engine that gives no log-probabilities of a
    given text (`OpenAI`) has r from its samples, as in the reasoned form.

    *Reasoned*, the paper's: explanation first, then the answer, for the samples and for each of two questions of
    reflection, with the verdicts correct, incorrect and not sure at 1, 0 and 1/2; r is the share of samples that equal
    the response. Verdicts are probabilities of their letters, where the paper samples one letter.

    *Plain*, for samples alone: the row's own prompt with nothing added, where targets are solutions whose reasoning the
    samples need as well (`BSDetector.math`); the rest is as in the direct form.

    A part whose weight is 0 is not asked for: ``alpha=0`` does without samples, ``beta=1`` without reflection. Models
    of 0.5B parameters cannot judge, and lose by reflection: .003 of AUROC on SQuAD, .016 with the passage last.

    The default was chosen on rows that are not reported on (docs/log.md). On others, with 0.5B parameters on
    two cores, it has an AUROC of .930 on SQuAD rows with another question's answer and .955 with a wrong sentence, at
    0.57 rows/s; five samples compared by Jaccard alone .851 and .821; reflection alone .526 and .519
    (docs/benchmarks/auroc.json). Its limit: r compares whole responses, so that in a long one the gain of its right
    parts hides a small mistake.

    Args:
        alpha: Weight of the similarity within consistency, in [0, 1].
        beta: Weight of consistency within confidence, in [0, 1].
        k: Samples a row.
        temperature: Of the samples.
        similarity: How far two responses agree.
        samples: Form of the samples, "direct", "plain" or "reasoned".
        reflection: Form of the reflection, "direct" or "reasoned".
        max_tokens: After which a sample or an explanation is cut off; a direct sample sooner, at 32 tokens more than
            the response has bytes. No response has more tokens than bytes: what runs on so far is another answer. A
            sample that is cut off before its answer (within ``<think>``, or a reasoned one before its mark) is not
            compared; one that is cut off within it is compared as far as it goes.

    Raises:
        ValueError: A setting is out of its range.

    Examples:
        >>> BSDetector(k=8).k
        8

    References:
        Chen and Mueller 2024, "Quantifying Uncertainty in Answers from any Language Model and Enhancing their
        Trustworthiness", arXiv 2308.16175 (observed consistency, self-reflection, and their sum).
    """

    alpha: float = 0.5
    beta: float = 0.7
    k: int = 5
    temperature: float = 1.0
    similarity: Similarity = field(default_factory=Jaccard)
    samples: Form = "direct"
    reflection: Form = "direct"
    max_tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, a weight; expected a number from 0 to 1")
        if self.k < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"k={self.k}, max_tokens={self.max_tokens}, temperature={self.temperature}; "
                "expected at least 1, 1 and 0"
            )
        for name, forms in (("samples", get_args(Form)), ("reflection", ("direct", "reasoned"))):
            if getattr(self, name) not in forms:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(map(repr, forms))}")

    @property
    def reads(self) -> bool:
        """Whether any weight is on how likely the response itself is."""
        return self.beta > 0 and self.alpha < 1 and self.samples != "reasoned"

    def samples_needed(self, engine: Engine) -> bool:
        """Whether any sample has a weight: sampling is the cost."""
        return self.beta > 0 and (self.alpha > 0 or not self.reads or not engine.reads)

    def limit(self, response: str) -> int:
        """Tokens after which a sample is cut off that is to be compared with a response.

        Examples:
            >>> BSDetector().limit("the Alps")
            40
        """
        return min(self.max_tokens, 32 + len(response.encode())) if self.samples == "direct" else self.max_tokens

    def compared(self, pairs: Sequence[tuple[str, str]], engine: Engine) -> Scores:
        """How far the two texts of each pair agree, by the similarity.

        Raises:
            ValueError: It gives more or fewer numbers than there are pairs.
        """
        found = self.similarity(pairs, engine) if pairs else np.zeros(0, dtype=np.float32)
        if len(found) != len(pairs):
            raise ValueError(f"{self.similarity} gave {len(found)} numbers for {len(pairs)} pairs; expected one each")
        return found

    @classmethod
    def paper(cls) -> BSDetector:
        """The configuration of the paper."""
        return cls(alpha=0.8, beta=0.7, similarity=NLI(), samples="reasoned", reflection="reasoned")

    @classmethod
    def math(cls, k: int = 5, max_tokens: int = 512) -> BSDetector:
        """For targets that reason towards a result: samples on the row's own prompt, of which the result is compared.

        Needs math-verify (``pip install "clear-datasets[math]"``).

        Args:
            k: Samples a row.
            max_tokens: After which a sample is cut off; of what is cut off, the last number counts.

        Examples:
            >>> BSDetector.math().similarity
            FinalAnswer()
        """
        return cls(alpha=1.0, k=k, similarity=FinalAnswer(), samples="plain", max_tokens=max_tokens)

    def __call__(self, examples: Sequence[Example], engine: Engine) -> Confidence:
        """Estimate the confidence of each example.

        Args:
            examples: Prompts and responses.
            engine: The model that is asked.

        Returns:
            Scores and reasons, in the order of the examples. An example that cannot be answered (over-long, say) has
            nan and a reason; the others are as if it were not there.
        """
        if self.samples == "direct" and not isinstance(self.similarity, FinalAnswer):
            hint_at_results([example.response for example in examples])
        run = _Run(self, examples, engine)
        first = run.ask(run.questions)
        long = [self.limit(e.response) == self.max_tokens for e in examples]  # others are cut off sooner on purpose
        cut = [c and long[i] for i, answers in first.items() for cuts in answers.cut for c in cuts]
        hint_at_length(cut, self.max_tokens)
        consistency, similarity, agreement, compared = run.consistency(first)
        reflection = run.direct_reflection(first) if self.reflection == "direct" else run.reasoned_reflection()
        parts = [(self.beta, consistency), (1 - self.beta, reflection)]  # a part without weight is not asked for
        total = sum((np.float32(w) * part for w, part in parts if w), np.zeros(len(examples), dtype=np.float32))
        for i in np.flatnonzero(np.isnan(total)).tolist():
            run.errors[i] = run.errors[i] or (
                "the model's probabilities are not numbers: try dtype='float32'"
                if i in first and any(np.isnan(x).any() for x in first[i].read)
                else _SILENT
                if i in run.silent
                else "the model answers the reflection question with none of its labels: "
                "BSDetector(beta=1) does without it"
                if self.beta < 1 and np.isnan(reflection[i])
                else "the similarity cannot compare the response with the model's own answers"
            )
        return Confidence(total, consistency, reflection, run.errors, similarity, agreement, compared)


class _Run:
    """One batch on its way through the phases; a row that cannot be answered leaves it with a reason."""

    def __init__(self, settings: BSDetector, examples: Sequence[Example], engine: Engine) -> None:
        self.settings, self.examples, self.engine = settings, examples, engine
        self.errors = [""] * len(examples)
        self.silent: set[int] = set()  # rows of whose samples none says an answer

    def ask(self, asks_of: Callable[[int], Asks]) -> dict[int, Answers]:
        """Ask all rows that are left, in one batch; the answers by row."""
        return ask(self.engine, self.errors, asks_of)

    def questions(self, i: int) -> Asks:
        """The samples of a row, and in the direct form all that one forward pass tells."""
        settings, (prompt, response) = self.settings, (self.examples[i].prompt, self.examples[i].response)
        own, *parts = (prompts.sample(p, settings.samples) for p in (prompt, *prompts.incomplete(prompt)))
        reads = settings.reads and self.engine.reads
        reflects = settings.beta < 1 and settings.reflection == "direct"
        needed = settings.samples_needed(self.engine)
        return Asks(
            generate=[own] if needed else [],
            n=settings.k,
            temperature=settings.temperature,
            max_tokens=[settings.limit(response)] * needed,
            choose=prompts.reflect(prompt, response) if reflects else [],
            labels=prompts.LABELS if reflects else (),
            read=[(p, response) for p in (own, *parts)] if reads else [],
        )

    def direct_reflection(self, first: dict[int, Answers]) -> Scores:
        """The mean probability of "Yes" over both orders of the labels."""
        scores = np.full(len(self.examples), np.nan, dtype=np.float32)
        for i, answers in first.items():
            scores[i] = answers.chosen[:, 0].mean() if len(answers.chosen) else np.nan
        return scores

    def reasoned_reflection(self) -> Scores:
        """The mean of P(correct) + P(not sure) / 2 over the questions, each after an explanation of its own."""
        scores = np.full(len(self.examples), np.nan, dtype=np.float32)
        if self.settings.beta == 1:
            return scores
        asked = {i: prompts.consider(e.prompt, e.response) for i, e in enumerate(self.examples)}
        reasons = self.ask(lambda i: Asks(generate=asked[i], max_tokens=self.settings.max_tokens))
        judged = {
            i: [prompts.verdict(question, texts[0]) for question, texts in zip(asked[i], a.generated, strict=True)]
            for i, a in reasons.items()
        }
        for i, answers in self.ask(lambda i: Asks(choose=judged[i], labels=prompts.VERDICTS)).items():
            right, _, unsure = answers.chosen.T
            scores[i] = (right + unsure / 2).mean()
        return scores

    def consistency(self, first: dict[int, Answers]) -> tuple[Scores, Scores, Scores, npt.NDArray[np.int32]]:
        """Alpha * mean similarity to the samples + (1 - alpha) * agreement, for each row; the two; samples compared."""
        settings, size = self.settings, len(self.examples)
        scores, means, agreements = (np.full(size, np.nan, dtype=np.float32) for _ in range(3))
        compared = np.zeros(size, dtype=np.int32)
        if settings.beta == 0:
            return scores, means, agreements, compared
        responses = {i: prompts.answer_of(e.response, "plain") or e.response for i, e in enumerate(self.examples)}
        samples = {i: prompts.answers_of(answers, settings.samples) for i, answers in first.items()}
        self.silent = {i for i, said in samples.items() if said and set(said) == {None}}
        pairs = [(responses[i], s) for i in first for s in samples[i] if settings.alpha and s is not None]
        similar = iter(settings.compared(pairs, self.engine))
        for i, answers in first.items():
            agreement = (
                _calibrated(*answers.read)
                if answers.read
                else float(np.mean([s is not None and words(s) == words(responses[i]) for s in samples[i]]))
            )
            near = [np.nan if s is None else next(similar) for s in samples[i] if settings.alpha]
            agreements[i], compared[i] = agreement, np.count_nonzero(~np.isnan(near))
            if compared[i]:
                means[i] = np.nanmean(np.array(near, dtype=np.float32))
                scores[i] = settings.alpha * means[i] + (1 - settings.alpha) * agreement
            elif not near and i not in self.silent:
                scores[i] = agreement
        return scores, means, agreements, compared


def _calibrated(whole: npt.NDArray[np.float32], *parts: npt.NDArray[np.float32]) -> float:
    """How much likelier the whole prompt makes the response than any part does, as a probability; 0.5: no likelier."""
    gain = float(whole.sum() - np.max([part.sum() for part in parts]))  # which nan passes, wherever it stands
    return 0.5 + 0.5 * math.tanh(gain / _SCALE / 2)  # the logistic function, without overflow
