"""Engines: language models that answer whole batches."""

from __future__ import annotations

import importlib.util
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

Messages = Sequence[dict[str, str]]
"""A chat: dicts with the keys ``role`` and ``content``, as every chat template takes them."""

Kind = Literal["generate", "choose", "read"]
"""What is asked of a prompt: samples, probabilities of labels, log-probabilities of a response."""

KINDS: tuple[Kind, ...] = get_args(Kind)


class PromptError(ValueError):
    """Some prompts of a batch cannot be answered; the answers to the others are not returned.

    Attributes:
        reasons: Position of each such prompt in the batch, and what is wrong with it.
    """

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons
        first = min(reasons)
        super().__init__(f"{len(reasons)} prompts cannot be answered; the first, number {first}: {reasons[first]}")

    def __reduce__(self) -> tuple[type[PromptError], tuple[dict[int, str]]]:
        return PromptError, (self.reasons,)  # by its reasons, not its text, from one process to another


class EngineError(RuntimeError):
    """An engine ended in the middle of its work, or cannot be reached; nothing is known of the batch."""


def untold(kind: Kind, position: int, value: Any) -> None:
    """Nobody is told of an answer before the batch is done."""


@dataclass(frozen=True)
class Asks:
    """Everything that is asked about a batch of rows: the arguments of `generate`, `choose` and `logprobs`.

    With ``n=0`` nothing is generated, and prompts that could not be answered are refused all the same.

    Attributes:
        first: For each prompt to generate from, how many of its `n` samples are known already: it gets the others.
        tell: Called with each answer as soon as it is there, by engines that can: its kind, its position in the list of
            that kind, and ``(texts, whether each is cut off)`` or an array.
    """

    generate: Sequence[Messages] = ()
    n: int = 1
    temperature: float = 0.0
    max_tokens: int | Sequence[int] = 512
    choose: Sequence[Messages] = ()
    labels: Sequence[str] = ()
    read: Sequence[tuple[Messages, str]] = ()
    first: Sequence[int] = ()
    tell: Callable[[Kind, int, Any], None] = field(default=untold, repr=False)

    @property
    def firsts(self) -> list[int]:
        """`first` of each prompt to generate from."""
        return list(self.first) or [0] * len(self.generate)

    @property
    def draws(self) -> list[int]:
        """How many samples to draw of each prompt."""
        return [self.n - first if self.temperature > 0 else self.distinct for first in self.firsts]

    @property
    def distinct(self) -> int:
        """How many samples of a prompt may differ: at temperature 0 one stands for all."""
        return self.n if self.temperature > 0 else min(self.n, 1)

    @property
    def times(self) -> int:
        """How often each sample that is drawn stands in the answers."""
        return 1 if self.temperature > 0 else self.n

    @property
    def limits(self) -> list[int]:
        """`max_tokens` of each prompt to generate from."""
        limits = [self.max_tokens] * len(self.generate) if isinstance(self.max_tokens, int) else list(self.max_tokens)
        if len(limits) != len(self.generate):
            raise ValueError(
                f"max_tokens has {len(limits)} numbers for {len(self.generate)} prompts; give one for each"
            )
        return limits


@dataclass
class Answers:
    """What `generate`, `choose` and `logprobs` returned, and which of the texts are `cut` off at their limit.

    An engine that does not know which are leaves `cut` empty.
    """

    generated: list[list[str]]
    chosen: npt.NDArray[np.float32]
    read: list[npt.NDArray[np.float32]]
    cut: list[list[bool]] = field(default_factory=list)


class Engine(Protocol):
    """A language model that answers whole batches. Results come in the order of the prompts.

    An engine is its configuration: it compares, hashes and pickles by it. Weights are loaded at the first call and
    belong to the process. A new engine writes `generate`, `choose` and `logprobs`, and has `answer` by
    subclassing this.

    Attributes:
        reads: Whether it has `logprobs`; servers of chat completions do not.
    """

    reads: ClassVar[bool] = True

    @property
    def gpus(self) -> int:
        """How many GPUs it takes, where there are any; none where another machine answers."""
        return 1

    @property
    def identity(self) -> str:
        """What its answers depend on: those of an engine with the same are taken for its own. By default, all of it."""
        from datasets.fingerprint import Hasher

        return f"{type(self).__qualname__} {Hasher.hash(self)}"

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int | Sequence[int] = 512,
    ) -> list[list[str]]:
        """Write ``n`` answers to each prompt.

        Args:
            prompts: Chats that end with a user turn.
            n: Answers to each.
            temperature: 0 takes the likeliest token each time.
            max_tokens: Tokens after which an answer is cut off: one number for all prompts, or one for each.

        Returns:
            ``[len(prompts)][n]`` texts.

        Raises:
            PromptError: Some prompts cannot be answered (too long, say); the reasons are by position.
        """
        ...

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> npt.NDArray[np.float32]:
        """Probability of each label as the next thing said, from one forward pass a prompt.

        Args:
            prompts: Chats that end with a user turn.
            labels: What may be said.

        Returns:
            float32 ``[len(prompts), len(labels)]``, renormalised over the labels; a row of nan where the labels
            together have less than 1% of the probability mass.

        Raises:
            PromptError: Some prompts cannot be answered (too long, say); the reasons are by position.
        """
        ...

    def logprobs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of each token of a given response, and of the end after it, from one forward pass.

        Args:
            prompts: Chats that end with a user turn.
            responses: The text that is said to each.

        Returns:
            For each prompt, float32 ``[tokens of the response + 1]``, natural logarithm.

        Raises:
            PromptError: Some prompts cannot be answered (too long, say); the reasons are by position.
        """
        ...

    def with_writer(self, writer: str) -> Engine:
        """The same engine with a LoRA adapter on its model, or with another checkpoint.

        Args:
            writer: A local folder, a Hub id, or what a server calls it.
        """
        raise TypeError(f"{type(self).__name__} runs one model alone; give it a method with_writer(path)")

    def close(self) -> None:
        """Free the memory that it holds in this process; the next call loads anew."""

    def answer(self, asks: Asks) -> Answers:
        """All that is asked about a batch; engines that gain from having it in one queue override this.

        Raises:
            PromptError: Some prompts cannot be answered; positions count through all lists of `asks` in their order.
        """
        before = len(asks.generate)
        try:  # the dear part comes last: what is refused is refused before it
            chosen = self.choose(asks.choose, asks.labels) if asks.choose else np.zeros((0, 0), dtype=np.float32)
            before += len(asks.choose)
            read = self.logprobs([p for p, _ in asks.read], [r for _, r in asks.read]) if asks.read else []
            before = 0
            generated = self._generated(asks)
        except PromptError as error:
            raise PromptError({before + i: reason for i, reason in error.reasons.items()}) from None
        return Answers(generated, chosen, read)

    def _generated(self, asks: Asks) -> list[list[str]]:
        """The samples that are not known, of all prompts that lack as many of them in one call."""
        generated: list[list[str]] = [[] for _ in asks.generate]
        firsts, limits = asks.firsts, asks.limits
        for first in sorted(set(firsts)):
            lacking = [i for i, known in enumerate(firsts) if known == first]
            try:
                texts = self.generate(
                    [asks.generate[i] for i in lacking], n=asks.n - first, temperature=asks.temperature,
                    max_tokens=[limits[i] for i in lacking],
                )  # fmt: skip
            except PromptError as error:
                raise PromptError({lacking[i]: reason for i, reason in error.reasons.items()}) from None
            for i, found in zip(lacking, texts, strict=True):
                generated[i] = found
        return generated


class Queued(Engine):
    """An engine that has all in one queue: it writes `answer`, and has `generate`, `choose` and `logprobs` by it."""

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int | Sequence[int] = 512,
    ) -> list[list[str]]:
        """See `Engine.generate`."""
        return self.answer(Asks(prompts, n, temperature, max_tokens)).generated

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> npt.NDArray[np.float32]:
        """See `Engine.choose`."""
        return self.answer(Asks(choose=prompts, labels=labels)).chosen

    def logprobs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """See `Engine.logprobs`."""
        return self.answer(Asks(read=list(zip(prompts, responses, strict=True)))).read

    @abstractmethod
    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`."""


def default_engine(model: str, revision: str | None = None) -> Engine:
    """The engine that suits this machine: `VLLM` where it is installed and a GPU is there, else `Transformers`."""
    import torch

    # Not is_available, which asks the driver: no process that is forked afterwards could use the GPU.
    if torch.cuda.device_count() and importlib.util.find_spec("vllm"):
        from clear_datasets.engines.vllm import VLLM

        return VLLM(model, revision)
    from clear_datasets.engines.transformers import Transformers

    return Transformers(model, revision)


_RANKS: dict[int, int] = {}  # of this process: at most one


def use_rank(rank: int, gpus: int = 1) -> None:
    """Give this process the GPUs of its rank, for ``ds.map(..., num_proc=n, with_rank=True)``; none without GPUs.

    Raises:
        ValueError: There are fewer GPUs than that.
    """
    import torch

    count = torch.cuda.device_count()
    if not count or not gpus or os.getpid() in _RANKS:
        return
    if (rank + 1) * gpus > count:
        raise ValueError(
            f"rank {rank} has no GPU left: this machine has {count}, and each process takes {gpus}; "
            f"expected num_proc={count // gpus} at most"
        )
    _RANKS[os.getpid()] = rank
    visible = [d for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d] or [str(i) for i in range(count)]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.set_device(rank * gpus)
    else:  # vLLM's own processes see nothing but the environment
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[rank * gpus : (rank + 1) * gpus])
    cache = os.environ.get("VLLM_CACHE_ROOT") or os.path.expanduser("~/.cache/vllm")
    os.environ["VLLM_CACHE_ROOT"] = f"{cache}/rank{rank}"  # processes that compile at once would overwrite each other


def hint_at_ranks(gpus: int = 1) -> None:
    """Say that there are more GPUs than this process uses."""
    import torch

    if (count := torch.cuda.device_count()) >= 2 * gpus and os.getpid() not in _RANKS:
        warnings.warn(
            f"this machine has {count} GPUs, of which this process uses {gpus}; ds.map(clear.score, batched=True, "
            f"num_proc={count // gpus}, with_rank=True) takes all, after clear.close() and "
            "multiprocess.set_start_method('spawn', force=True)",
            stacklevel=2,
        )
