"""How far two responses agree, from 0 (not at all) to 1 (they say the same)."""

from __future__ import annotations

import os
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from clear_datasets import prompts
from clear_datasets.asking import ask
from clear_datasets.encoders import encoder_of
from clear_datasets.engines import Asks, Engine
from clear_datasets.engines.cache import Cached
from clear_datasets.engines.checkpoint import commit_of, stamp

Pairs = Sequence[tuple[str, str]]
Scores = npt.NDArray[np.float32]


class Similarity(Protocol):
    """How far the two texts of each pair agree.

    One whose class says ``total = True`` compares a response with any text, or with none, not even with itself: then
    it is known before a sample is drawn whether a row will have a score (see `clear_datasets.adaptive`), as long as
    the samples do not all end before they answer.
    """

    def __call__(self, pairs: Pairs, engine: Engine) -> Scores:
        """float32 [len(pairs)] in [0, 1]; nan where the two cannot be compared."""
        ...


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text, without punctuation or articles; Han, kana and emoji one by one.

    A text of articles or of punctuation alone keeps them: "A" may be the letter of a choice, "+" a sign. Beside words,
    signs count for nothing: "x == y" and "x != y" are the same two, so code and formulas want another similarity. So
    do Thai, Lao, Khmer and Burmese, which put no spaces between words: what stands between two spaces is one.

    Examples:
        >>> words("The answer: 1,200 (approx.)"), words("A."), words("-5"), words("AI技术")
        (['answer', '1200', 'approx'], ['a'], ['-5'], ['ai', '技', '术'])
    """
    text = _THOUSANDS.sub(lambda n: n[0].replace(",", ""), _digits(unicodedata.normalize("NFC", text).lower()))
    text = re.sub(r"^([^\w.]*)\.(?=\d)", r"\g<1>0.", text)  # an answer; within a text, ".5" is "5" as measured
    every = _WORD.findall(text) or text.split()
    return [w for w in every if w not in ("a", "an", "the")] or every


def _digits(text: str) -> str:
    """Numbers of any script, and with the sign of minus, as Python reads them."""
    return re.sub(r"(?![0-9])\d", lambda digit: str(unicodedata.decimal(digit[0])), text).translate(_SIGNS)


_SIGNS = str.maketrans("\u2212\uff0d\uff0e", "--.")  # minus; full-width minus and point
_THOUSANDS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!\d)")  # "1876,1877" is two numbers
_MARKS = "".join(
    c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M"
)  # vowels of Hindi, Thai
_HAN = r"\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # and kana
_EMOJI = r"\u2600-\u27bf\U0001f000-\U0001faff"
_WORD = re.compile(rf"(?<!\w)-?\d+(?:\.\d+)?|\d+(?:\.\d+)?|[{_HAN}{_EMOJI}]|[^\W\d{_HAN}](?:[^\W{_HAN}]|[{_MARKS}])*")


@dataclass(frozen=True)
class Jaccard:
    """Shared words of two texts over all their words. No model; for short answers.

    Examples:
        >>> Jaccard()([("the Alps", "In the Alps.")], engine=None)
        array([0.5], dtype=float32)
    """

    total: ClassVar[bool] = True

    def __call__(self, pairs: Pairs, engine: Engine | None) -> Scores:
        """See `Similarity`."""
        scores = []
        for a, b in pairs:
            left, right = set(words(a)), set(words(b))
            scores.append(len(left & right) / len(left | right) if left | right else 1.0)
        return np.asarray(scores, dtype=np.float32)


@dataclass(frozen=True)
class FinalAnswer:
    """1 where two solutions come to the same result, 0 where they do not: for mathematics, whatever the way to it.

    The result is the number on the last line of the kind "#### 18". Without such a line math-verify (``pip install
    "clear-datasets[math]"``) finds it, boxed, behind "answer" or "=", or as the last number. It is compared as a
    number, to six decimals, or as an expression. A second text without a result scores 0, a first one without a
    result nan: no sample can speak for such a target.

    Examples:
        >>> FinalAnswer()([("5 + 3 = 8 eggs.", "She has 8."), ("#### 8", "The answer is 9.")], engine=None)
        array([1., 0.], dtype=float32)

    References:
        https://github.com/huggingface/Math-Verify
    """

    total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if find_spec("math_verify") is None:  # said before a sample is paid for
            raise ImportError('FinalAnswer needs math-verify: pip install "clear-datasets[math]"')

    def __call__(self, pairs: Pairs, engine: Engine | None) -> Scores:
        """See `Similarity`."""
        results = {text: _result(text) for text in sorted({text for pair in pairs for text in pair})}
        same = {(a, b): _same(results[a], results[b]) for a, b in set(pairs)}
        return np.asarray([same[pair] for pair in pairs], dtype=np.float32)


_SECONDS = 3  # for one expression: "9^9^9^9" has no end
_LAST_LINE = re.compile(r"^####([^\w\n]{0,9}\d[\d.,/]{0,30}(?: [a-z]{1,30})?[^\w\n]{0,9})$", re.M)  # and no heading


def _result(text: str) -> list[Any]:
    """The last result of a text as an expression and as it is written; none of them where there is none."""
    from math_verify import parse
    from math_verify.errors import TimeoutException

    if threading.current_thread() is not threading.main_thread():
        raise ValueError(
            "FinalAnswer bounds the time of each comparison by a signal, which reaches a process's main thread alone; "
            f"this is {threading.current_thread().name}: score in the main thread, or in a process of its own"
        )
    text = _digits((_LAST_LINE.findall(text) or [text])[-1])
    try:
        found: list[Any] = parse(text, parsing_timeout=_SECONDS, raise_on_error=True)
    except (Exception, TimeoutException):  # it parses what anybody wrote, and fails in many ways
        return []
    return found


def _same(first: list[Any], second: list[Any]) -> float:
    from math_verify import verify
    from math_verify.errors import TimeoutException

    if not first or not second:
        return 0.0 if first else float("nan")
    try:
        return float(verify(first, second, timeout_seconds=_SECONDS, raise_on_error=True))
    except (Exception, TimeoutException):
        return float(str(first[-1]) == str(second[-1]))


@dataclass(frozen=True)
class LLM:
    """The same model is asked whether two answers say the same: the mean probability of "Yes" over both orders."""

    def __call__(self, pairs: Pairs, engine: Engine) -> Scores:
        """See `Similarity`."""
        unique = sorted({pair for a, b in pairs for pair in ((a, b), (b, a))})
        asked = [prompts.same(a, b) for a, b in unique]
        found = ask(engine, [""] * len(unique), lambda i: Asks(choose=[asked[i]], labels=("Yes", "No")))
        answers = {pair: float(found[i].chosen[0, 0]) if i in found else np.nan for i, pair in enumerate(unique)}
        return np.asarray([1.0 if a == b else (answers[a, b] + answers[b, a]) / 2 for a, b in pairs], dtype=np.float32)


class _Encoded:
    """What `NLI` and `Embedding` share: their encoder is known by its files, or by its commit on the Hub."""

    model: str | os.PathLike[str]
    revision: str | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", os.fspath(self.model))

    @property
    def state(self) -> str:
        model = os.fspath(self.model)
        return stamp(model) or commit_of(model, self.revision)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stamp": self.state}  # one that was retrained in its place compares anew


@dataclass(frozen=True)
class NLI(_Encoded):
    """One minus the probability that two texts contradict each other, the mean of both orders (BSDetector, s_i).

    Texts that are longer than the encoder takes (512 tokens a pair, mostly) are compared by their beginnings.

    Args:
        model: A sequence-classification checkpoint with a label "contradiction": Hub id or local folder.
        revision: Branch, tag or commit of a Hub model.
        device: ``"cuda"``, ``"mps"`` or ``"cpu"``; by default the first of them that is there.
        batch_size: Pairs in one forward pass.

    References:
        Chen and Mueller 2024, arXiv 2308.16175 (observed consistency).
    """

    model: str | os.PathLike[str] = "microsoft/deberta-large-mnli"
    revision: str | None = None
    device: str | None = None
    batch_size: int = 64

    def __call__(self, pairs: Pairs, engine: Engine | None) -> Scores:
        """See `Similarity`."""
        unique = sorted({pair for a, b in pairs for pair in ((a, b), (b, a))}, key=lambda p: (len(p[0]) + len(p[1]), p))
        agree = dict(zip(unique, _once(engine, self, unique, self._agree), strict=True))
        return np.asarray([(agree[a, b] + agree[b, a]) / 2 for a, b in pairs], dtype=np.float32)

    def _agree(self, pairs: Pairs) -> list[float]:
        """One minus the probability that the second text contradicts the first."""
        encoder = encoder_of(self.model, self.revision, self.device, "AutoModelForSequenceClassification")
        names = {str(name).lower(): int(i) for i, name in encoder.model.config.id2label.items()}
        found = [i for name, i in names.items() if "contradict" in name]
        if len(found) != 1:
            raise ValueError(
                f"{self.model} has the labels {', '.join(names)}; NLI needs one named contradiction: "
                "give a checkpoint trained on MNLI, or set id2label in its config"
            )

        def read(part: Pairs) -> list[float]:
            logits = encoder([a for a, _ in part], [b for _, b in part]).logits.float()
            agree: list[float] = (1 - logits.softmax(-1)[:, found[0]]).tolist()
            return agree

        return encoder.in_parts(pairs, self.batch_size, read)


@dataclass(frozen=True)
class Embedding(_Encoded):
    """Cosine of two sentence embeddings (mean of the last hidden states), cut off at 0.

    Texts that are longer than the encoder takes (512 tokens, mostly) are compared by their beginnings.

    Args:
        model: A sentence-embedding checkpoint: Hub id or local folder.
        revision: Branch, tag or commit of a Hub model.
        device: ``"cuda"``, ``"mps"`` or ``"cpu"``; by default the first of them that is there.
        batch_size: Texts in one forward pass.
    """

    model: str | os.PathLike[str] = "sentence-transformers/all-MiniLM-L6-v2"
    revision: str | None = None
    device: str | None = None
    batch_size: int = 256

    def __call__(self, pairs: Pairs, engine: Engine | None) -> Scores:
        """See `Similarity`."""
        unique = sorted(set(pairs))
        cosine = dict(zip(unique, _once(engine, self, unique, self._cosine), strict=True))
        return np.asarray([cosine[pair] for pair in pairs], dtype=np.float32)

    def _cosine(self, pairs: Pairs) -> list[float]:
        encoder = encoder_of(self.model, self.revision, self.device, "AutoModel")
        unique = sorted({text for pair in pairs for text in pair}, key=lambda t: (len(t), t))

        def read(part: Sequence[str]) -> list[Any]:
            out, mask = encoder(list(part), None, mask=True)
            mean = (out.last_hidden_state.float() * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            unit = mean / mean.norm(dim=-1, keepdim=True).clamp(min=1e-9)
            return list(unit.cpu().numpy())

        vectors = dict(zip(unique, encoder.in_parts(unique, self.batch_size, read), strict=True))
        return [float(np.clip(vectors[a] @ vectors[b], 0, 1)) for a, b in pairs]


def _once(
    engine: Engine | None, encoder: NLI | Embedding, pairs: Pairs, compare: Callable[[Pairs], list[float]]
) -> list[float]:
    """The scores of some pairs; those that the engine's cache knows are not compared again."""
    if not isinstance(engine, Cached):
        return compare(pairs)
    return engine.similar(f"{type(encoder).__name__} {encoder.state}", pairs, compare)
