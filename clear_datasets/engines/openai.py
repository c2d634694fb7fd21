"""Any server that speaks OpenAI's chat completions: `vllm serve` and others, and hosted models."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, Engine, EngineError, Messages, PromptError
from clear_datasets.engines.chats import without_system

_TOP = 20  # log-probabilities that servers give at most
_MIN_MASS = 0.01  # labels that together hold less were not what the model wanted to say
_COUNTED = 20  # answers that a label's probability is counted from, where there are no log-probabilities
_REFUSED = (400, 413, 422)  # by which a server says that one prompt cannot be answered

_LOOPS: dict[int, asyncio.AbstractEventLoop] = {}
_CLIENTS: dict[tuple[Any, ...], Any] = {}
_PAID: dict[OpenAI, dict[str, Any]] = {}  # answers of a batch that was refused for some of its prompts
_SAID: set[OpenAI] = set()

T = TypeVar("T")
_Job = Callable[[], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class OpenAI(Engine):
    """Chat completions of an OpenAI-compatible server, many at a time.

    Such servers give log-probabilities of what they write, not of a text they are given: `BSDetector` then takes the
    share of samples that equal the response for its agreement, as the paper does. A label's probability comes from the
    log-probabilities of one written token; where a server gives none, from 20 answers.

    Args:
        model: The server's name for it.
        base_url: Of the server, up to ``/v1``; ``OPENAI_BASE_URL``, else OpenAI itself, by default.
        api_key: ``OPENAI_API_KEY`` by default. It is in no state and no hash: worker processes of
            ``ds.map(num_proc=...)`` have it from the environment.
        concurrency: Requests that are under way at a time.
        retries: How often a request is repeated that failed for the server's load, its limits or the network; pauses
            grow, and are as long as the server asks, up to two minutes.
        deadline: Seconds after which a request is given up, repetitions included.

    Raises:
        EngineError: The server cannot be reached or refuses the key; from every method.

    Example:
        >>> OpenAI("gpt-4o-mini", api_key="secret")
        OpenAI(model='gpt-4o-mini', base_url=None, concurrency=64, retries=8, deadline=600.0)
    """

    reads: ClassVar[bool] = False

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False, compare=False)
    concurrency: int = field(default=64, compare=False)
    retries: int = field(default=8, compare=False)
    deadline: float = field(default=600.0, compare=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.deadline <= 0:
            raise ValueError(
                f"concurrency={self.concurrency}, retries={self.retries}, deadline={self.deadline}; "
                "expected at least 1, 0, and more than 0 seconds"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "api_key": None}  # neither in a hash of datasets nor in a pickle

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
        """Not given by such servers.

        Raises:
            EngineError: Always, but for an empty batch.
        """
        if prompts:
            raise EngineError(
                "a server of chat completions gives no log-probabilities of a given text: use Transformers or VLLM, "
                "or BSDetector(alpha=1), which does without"
            )
        return []

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`: all that is asked about a batch at once."""
        read = self.logprobs([p for p, _ in asks.read], [r for _, r in asks.read])
        jobs: list[tuple[str, _Job]] = []
        draws = asks.n if asks.temperature > 0 else 1
        for prompt, limit in zip(asks.generate, asks.limits, strict=True):
            key = repr((prompt, draws, asks.temperature, limit))
            jobs.append((key, partial(self._write, prompt, draws, asks.temperature, limit)))
        jobs += [(repr((p, tuple(asks.labels))), partial(self._weigh, p, asks.labels)) for p in asks.choose]
        found = _wait(self._all(jobs))
        written, weighed = found[: len(asks.generate)], found[len(asks.generate) :]
        chosen = np.array(weighed, dtype=np.float32).reshape(len(asks.choose), len(asks.labels))
        return Answers([texts * (asks.n // draws) for texts in written], chosen, read)

    async def _all(self, jobs: list[tuple[str, _Job]]) -> list[Any]:
        """Results of all jobs in their order, `concurrency` at a time."""
        import openai

        paid = _PAID.get(self, {})
        results: dict[int, Any] = {}
        reasons: dict[int, str] = {}
        failures: list[Exception] = []
        queue = iter(enumerate(jobs))

        async def work() -> None:
            for position, (key, job) in queue:
                if failures:
                    return  # what is under way is waited for, as it is paid
                try:
                    async with asyncio.timeout(self.deadline):
                        results[position] = paid[key] if key in paid else await job()
                except openai.APIStatusError as error:
                    if error.status_code in _REFUSED:
                        reasons[position] = f"the server refuses this prompt: {_message(error)}"
                    else:
                        failures.append(error)
                except Exception as error:
                    failures.append(error)

        try:
            await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(jobs)))))
        finally:
            if len(results) < len(jobs):
                _PAID[self] = paid | {jobs[i][0]: result for i, result in results.items()}
            else:
                _PAID.pop(self, None)
        if failures:
            error = self._failure(failures[0])
            raise error from (failures[0] if error is not failures[0] else None)
        if reasons:
            raise PromptError(reasons)
        return [results[i] for i in range(len(jobs))]

    async def _ask(self, prompt: Messages, settings: dict[str, Any]) -> Any:
        import openai

        create = partial(self._client().chat.completions.create, model=self.model, **settings)
        try:
            return await create(messages=list(prompt))
        except openai.BadRequestError:
            if prompt[0]["role"] != "system" or len(prompt) < 2:
                raise
        return await create(messages=without_system(prompt))  # its chat template may have no such role

    async def _write(self, prompt: Messages, n: int, temperature: float, limit: int) -> list[str]:
        texts: list[str] = []
        while len(texts) < n:  # some servers give one answer a request, whatever n is
            settings = {self._limit: limit, "n": n - len(texts), "temperature": temperature, "top_p": 1.0}
            reply = await self._ask(prompt, settings)
            if not reply.choices:
                raise EngineError(f"{self._where} gave a reply without any answer")
            texts += [(choice.message.content or "").strip() for choice in reply.choices]
        return texts[:n]

    async def _weigh(self, prompt: Messages, labels: Sequence[str]) -> list[float]:
        import openai

        # At temperature 1 it does not matter whether a server gives probabilities before or after it.
        settings = {self._limit: 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": _TOP}
        if self not in _SAID:
            try:
                reply = await self._ask(prompt, settings)
                given = reply.choices[0].logprobs if reply.choices else None
                if given is not None:  # without content, the model refused to answer
                    top = given.content[0].top_logprobs if given.content else []
                    return _shares({t.token: float(np.exp(t.logprob)) for t in top}, labels)
            except openai.BadRequestError as error:
                if "logprobs" not in str(error):
                    raise
            if self not in _SAID:
                _SAID.add(self)
                warnings.warn(
                    f"{self.model} gives no log-probabilities: labels are counted in {_COUNTED} answers", stacklevel=2
                )
        texts = await self._write(prompt, _COUNTED, 1.0, 8)
        said = Counter(text.lstrip(" \n*\"'") for text in texts)
        return _shares({text: count / _COUNTED for text, count in said.items()}, labels, whole=False)

    @property
    def _limit(self) -> str:
        """OpenAI's own models want the newer name; other servers may not know it."""
        return "max_completion_tokens" if self._where == "OpenAI" else "max_tokens"

    @property
    def _where(self) -> str:
        return self.base_url or os.environ.get("OPENAI_BASE_URL") or "OpenAI"

    def _client(self) -> Any:
        import openai

        key = (os.getpid(), self._where, self.api_key or os.environ.get("OPENAI_API_KEY"), self.retries, self.deadline)
        if key not in _CLIENTS:
            try:
                _CLIENTS[key] = openai.AsyncOpenAI(
                    base_url=self.base_url, api_key=self.api_key, max_retries=self.retries, timeout=self.deadline
                )
            except openai.OpenAIError as error:
                raise EngineError(f"no API key: set OPENAI_API_KEY, or give api_key= ({error})") from error
        return _CLIENTS[key]

    def _failure(self, error: Exception) -> Exception:
        import openai

        if isinstance(error, TimeoutError):
            return EngineError(
                f"{self._where} gave no answer within the deadline of {self.deadline:.0f} s: is it up, and fast enough?"
            )
        if isinstance(error, openai.APIError):
            return EngineError(
                f"{self._where} fails for {self.model}: {_message(error)}; answers so far are kept for the next call"
            )
        return error


def _message(error: Any) -> str:
    body = getattr(error, "body", None)
    return str((body.get("message") if isinstance(body, dict) else None) or error)


def _shares(found: dict[str, float], labels: Sequence[str], whole: bool = True) -> list[float]:
    """Probabilities of labels out of those of tokens (whole) or of texts that begin with a label, renormalised."""
    totals = dict.fromkeys(labels, 0.0)
    for text, probability in found.items():
        said = text.strip()
        owners = [label for label in labels if (label.startswith(said) if whole else said.startswith(label))]
        exact = [label for label in owners if label == said]
        if said and len(exact or owners) == 1:  # a token that begins several labels tells nothing
            totals[(exact or owners)[0]] += probability
        elif owners and not whole:
            totals[max(owners, key=len)] += probability
    mass = sum(totals.values())
    return [total / mass if mass >= _MIN_MASS else float("nan") for total in totals.values()]


def _wait(job: Coroutine[Any, Any, T]) -> T:
    """Run to the end in a thread of its own: a notebook's event loop is running already in this one."""
    pid = os.getpid()
    if pid not in _LOOPS:
        _LOOPS[pid] = asyncio.new_event_loop()
        threading.Thread(target=_LOOPS[pid].run_forever, daemon=True, name="clear_datasets OpenAI").start()
    future = asyncio.run_coroutine_threadsafe(job, _LOOPS[pid])
    try:
        return future.result()
    except BaseException:
        future.cancel()  # an interrupt stops what is under way
        raise
