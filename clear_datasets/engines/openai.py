"""Any server that speaks OpenAI's chat completions: `vllm serve` and others, and hosted models."""

from __future__ import annotations

import asyncio
import os
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, EngineError, Messages, PromptError, Queued, untold
from clear_datasets.engines.chats import without_system
from clear_datasets.engines.labels import shares
from clear_datasets.engines.server import check_address, error_in, patiently, wait_for

_TOP = 20  # log-probabilities that servers give at most
_COUNTED = 20  # answers that a label's probability is counted from, where there are no log-probabilities
_REFUSED = (400, 413, 422)  # by which a server says that one prompt cannot be answered
_ALL = 20  # so many requests refused with the same words: it is not the prompts

_CLIENTS: dict[tuple[Any, ...], Any] = {}
_PAID: dict[OpenAI, dict[str, Any]] = {}  # of a batch that was refused in part, where nobody was told of its answers
_SERVERS: dict[OpenAI, _Server] = {}

_Job = Callable[[], Coroutine[Any, Any, Any]]


@dataclass
class _Server:
    """What a server was found to take, and to refuse: a system role, several answers, log-probabilities, ..."""

    has: set[str] = field(default_factory=set)
    lacks: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class OpenAI(Queued):
    """Chat completions of an OpenAI-compatible server, many at a time.

    Such servers give log-probabilities of what they write, not of a text they are given: `BSDetector` then takes the
    share of samples that equal the response for its agreement, as the paper does. A label's probability comes from the
    log-probabilities of one written token; where a server gives none, from 20 answers.

    Args:
        model: The server's name for it.
        base_url: Of the server, up to ``/v1``; ``OPENAI_BASE_URL``, else OpenAI itself, by default. It is printed, and
            so takes neither a password nor a query.
        api_key: ``OPENAI_API_KEY`` by default; servers of your own may need none. It is in no state and no hash: worker
            processes of ``ds.map(num_proc=...)`` have it from the environment.
        concurrency: Requests that are under way at a time.
        retries: How often a request is repeated that failed for the server's load, its limits or the network. Pauses
            grow to 8 seconds, or are as long as the server asks; one that asks for over two minutes is not waited for.
        deadline: Seconds after which a request is given up, repetitions included.

    Raises:
        EngineError: The server cannot be reached or refuses the key; from every method.
        ValueError: The address is none, or may hold a secret; ``OPENAI_BASE_URL`` is read at the first call.

    Examples:
        >>> OpenAI("gpt-4o-mini", api_key="secret")
        OpenAI(model='gpt-4o-mini', base_url=None, concurrency=64, retries=12, deadline=600.0)
    """

    reads: ClassVar[bool] = False

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False, compare=False)
    concurrency: int = field(default=64, compare=False)
    retries: int = field(default=12, compare=False)
    deadline: float = field(default=600.0, compare=False)

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.retries < 0 or self.deadline <= 0:
            raise ValueError(
                f"concurrency={self.concurrency}, retries={self.retries}, deadline={self.deadline}; "
                "expected at least 1, 0, and more than 0 seconds"
            )
        if self.base_url is not None:
            check_address(self.base_url, "base_url")

    @property
    def gpus(self) -> int:
        """See `Engine.gpus`."""
        return 0

    @property
    def identity(self) -> str:
        """See `Engine.identity`: of a server no more is known than its address and its name for a model."""
        return repr(("OpenAI", self._where, self.model))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "api_key": None}  # neither in a hash of datasets nor in a pickle

    def with_writer(self, writer: str) -> OpenAI:
        """See `Engine.with_writer`: the server's name for it, as in ``vllm serve --lora-modules NAME=FOLDER``."""
        return replace(self, model=writer)

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
        for prompt, first, draws, limit in zip(asks.generate, asks.firsts, asks.draws, asks.limits, strict=True):
            key = repr((prompt, first, draws, asks.temperature, limit))
            jobs.append((key, partial(self._write, prompt, draws, asks.temperature, limit)))
        jobs += [(repr((p, tuple(asks.labels))), partial(self._weigh, p, asks.labels)) for p in asks.choose]
        size = len(asks.generate)

        def tell(position: int, result: Any) -> None:
            if position < size:
                asks.tell("generate", position, tuple(zip(*result * asks.times, strict=True)))
            else:
                asks.tell("choose", position - size, result)

        paid = _PAID.setdefault(self, {}) if asks.tell is untold else {}
        try:
            found = wait_for(self._all(jobs, tell, paid))
        except PromptError as error:
            alike = len(error.reasons) == len(jobs) >= _ALL and len(set(error.reasons.values())) == 1
            if alike and not wait_for(self._takes(asks)):  # else these are left over, as others are known
                raise EngineError(
                    f"{self._where} refuses all of {len(jobs)} requests to {self.model} alike: {error.reasons[0]}"
                ) from None
            raise
        chosen = np.array(found[size:], dtype=np.float32).reshape(len(asks.choose), len(asks.labels))
        written = [texts * asks.times for texts in found[:size]]
        cut = [[c for _, c in texts] for texts in written]
        return Answers([[text for text, _ in texts] for texts in written], chosen, read, cut)

    async def _all(
        self, jobs: list[tuple[str, _Job]], tell: Callable[[int, Any], None], paid: dict[str, Any]
    ) -> list[Any]:
        """Results of all jobs in their order, `concurrency` at a time; each is told as soon as it is there."""
        import openai

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
                    tell(position, results[position])
                except openai.APIStatusError as error:
                    if error.status_code in _REFUSED:
                        reasons[position] = f"the server refuses this prompt: {self._message(error)}"
                    else:
                        failures.append(error)
                except Exception as error:
                    failures.append(error)

        try:
            await asyncio.gather(*(work() for _ in range(min(self.concurrency, len(jobs)))))
        finally:
            if len(results) < len(jobs):
                paid |= {jobs[i][0]: result for i, result in results.items()}
        if failures:
            raise self._failure(failures[0]) from None  # a server may have put the key into its words
        if reasons:
            raise PromptError(reasons)
        for key, _ in jobs:
            paid.pop(key, None)
        return [results[i] for i in range(len(jobs))]

    async def _takes(self, asks: Asks) -> bool:
        """Whether the server takes a prompt that nothing is wrong with, asked as these are."""
        import openai

        hello: Messages = [{"role": "user", "content": "Hello"}]
        try:
            async with asyncio.timeout(self.deadline):
                if asks.choose:
                    await self._weigh(hello, asks.labels)
                else:
                    await self._write(hello, max(asks.draws), asks.temperature, max(asks.limits))
        except (openai.APIError, TimeoutError) as error:
            if getattr(error, "status_code", 0) in _REFUSED:
                return False
            raise self._failure(error) from None
        return True

    async def _ask(self, prompt: Messages, settings: dict[str, Any]) -> Any:
        """A completion; what a server may not take is left out where that helps."""
        import openai

        server = _SERVERS.setdefault(self, _Server())
        system = prompt[0]["role"] == "system" and len(prompt) > 1
        features = {"thinking": self._own, "system": system, "n": settings.get("n", 1) > 1}
        used = {feature for feature, wanted in features.items() if wanted} - server.lacks
        unsure = sorted(used - server.has)
        refusals: list[openai.APIStatusError] = []
        client = self._client()
        for without in ([], *([each] for each in unsure), *([unsure] if len(unsure) > 1 else [])):
            taken = used - set(without)
            joined = system and "system" not in taken
            request = {**settings, "messages": without_system(prompt) if joined else list(prompt)}
            if "n" not in taken:
                request.pop("n", None)
            if "thinking" in taken:  # a model that thinks first would say neither a label nor an answer
                request["extra_body"] = {"chat_template_kwargs": {"enable_thinking": False}}
            try:
                with self._understanding():
                    create = partial(client.chat.completions.create, model=self.model, **request)
                    reply = await patiently(create, error_in, self.retries)
                    if not reply.choices:
                        said = self._hidden(error_in(reply) or "no choices")
                        raise EngineError(f"{self._where} gave a reply without any answer: {said}")
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refusals.append(error)
            else:
                server.has |= taken
                server.lacks |= set(without)
                return reply
        raise refusals[0]

    async def _write(self, prompt: Messages, n: int, temperature: float, limit: int) -> list[tuple[str, bool]]:
        """Texts, and whether they are cut off at the limit."""
        texts: list[tuple[str, bool]] = []
        while len(texts) < n:  # some servers give one answer a request, whatever n is
            settings = {self._limit: limit, "n": n - len(texts), "temperature": temperature, "top_p": 1.0}
            reply = await self._ask(prompt, settings)
            with self._understanding():
                texts += [(_said(c.message.content), c.finish_reason == "length") for c in reply.choices]
        return texts[:n]

    async def _weigh(self, prompt: Messages, labels: Sequence[str]) -> list[float]:
        import openai

        # At temperature 1 it does not matter whether a server gives probabilities before or after it.
        settings = {self._limit: 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": _TOP}
        server = _SERVERS.setdefault(self, _Server())
        if "logprobs" not in server.lacks:
            try:
                reply = await self._ask(prompt, settings)
                with self._understanding():
                    given = reply.choices[0].logprobs
                    if given is not None:  # without content, the model refused to answer
                        top = given.content[0].top_logprobs if given.content else []
                        return shares({t.token: float(np.exp(t.logprob)) for t in top}, labels)
            except openai.APIStatusError as error:
                if error.status_code >= 500 or "logprobs" not in str(error):
                    raise
            if "logprobs" not in server.lacks:
                server.lacks.add("logprobs")
                warnings.warn(
                    f"{self.model} gives no log-probabilities: labels are counted in {_COUNTED} answers", stacklevel=2
                )
        texts = await self._write(prompt, _COUNTED, 1.0, 8)
        said = Counter(text.lstrip(" \n*\"'(") for text, _ in texts)
        return shares({text: count / _COUNTED for text, count in said.items()}, labels, whole=False)

    @contextmanager
    def _understanding(self) -> Iterator[None]:
        """What is no chat completion, but a page of a proxy, say, ends in a clear error."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise EngineError(
                f"{self._where} gave a reply that is no chat completion ({type(error).__name__}: {str(error)[:100]}): "
                "is the address right, up to /v1, and does a server of chat completions stand behind it?"
            ) from None

    @property
    def _own(self) -> bool:
        """Whether it is a server of one's own, or of anybody but OpenAI."""
        return self._where != "OpenAI"

    @property
    def _limit(self) -> str:
        """OpenAI's own models want the newer name; other servers may not know it."""
        return "max_tokens" if self._own else "max_completion_tokens"

    @property
    def _where(self) -> str:
        stated = os.environ.get("OPENAI_BASE_URL")
        if not self.base_url and stated:
            check_address(stated, "OPENAI_BASE_URL")
        return self.base_url or stated or "OpenAI"

    def _client(self) -> Any:
        import openai

        secret = self._key or ("none" if self._own else "")
        if not secret:
            raise EngineError("no API key: set OPENAI_API_KEY, or give api_key=")
        key = (os.getpid(), self._where, secret, self.retries, self.deadline)
        if key not in _CLIENTS:
            _CLIENTS[key] = openai.AsyncOpenAI(
                base_url=self.base_url, api_key=secret, max_retries=self.retries, timeout=self.deadline
            )
        return _CLIENTS[key]

    @property
    def _key(self) -> str:
        return self.api_key or os.environ.get("OPENAI_API_KEY") or ""

    def _failure(self, error: Exception) -> Exception:
        import openai

        if isinstance(error, TimeoutError):
            return EngineError(
                f"{self._where} gave no answer within the deadline of {self.deadline:.0f} s: is it up, and fast enough?"
            )
        if isinstance(error, openai.APIError):
            return EngineError(f"{self._where} fails for {self.model}: {self._message(error)}; answers so far are kept")
        return error

    def _message(self, error: Any) -> str:
        body = getattr(error, "body", None)
        return self._hidden(str((body.get("message") if isinstance(body, dict) else None) or error))

    def _hidden(self, text: str) -> str:
        return text.replace(self._key, "***") if len(self._key) >= 8 else text  # some servers repeat it


def _said(content: str | None) -> str:
    """The text of an answer; half a surrogate pair, which JSON can hold, is in no column and no tokenizer."""
    return (content or "").strip().encode(errors="replace").decode()
