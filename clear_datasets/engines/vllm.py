"""vLLM in this process: the engine for GPUs. Its CPU build runs the same code."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, Engine, EngineError, Messages
from clear_datasets.engines.chats import Chats
from clear_datasets.engines.checkpoint import from_gguf, stamp
from clear_datasets.engines.labels import Labels
from clear_datasets.engines.planning import Request, plan

_IN_FLIGHT = 1024  # requests that vLLM holds: enough for its largest batch, few enough for the memory
_TOP = 20  # log-probabilities that vLLM gives at most, where it cannot be asked for those of the labels
_WATCH = 1.0  # seconds between two looks at the engine's process

_LOADED: dict[tuple[Any, ...], _Loaded] = {}


@dataclass(frozen=True, init=False)
class VLLM(Engine):
    """Continuous batching with `vllm`, in this process.

    All that is asked about a batch goes into one queue, in which requests with a common beginning (a row's passage and
    question) are neighbours, so that vLLM's prefix cache has it once; `n` samples are one request. vLLM holds at most
    1,024 requests at a time, however many are asked.

    Engines that differ in nothing but their adapter share the weights: one writes with it, another judges without.

    Args:
        model: Hub id, local folder, or a ``.gguf`` file (converted once into the cache folder).
        revision: Branch, tag or commit of a Hub model.
        adapter: A folder with a LoRA adapter that is applied to the model.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take.
        max_model_len: Tokens of prompt and answer; by default what the model can.
        **options: Passed to ``vllm.LLM``: ``tensor_parallel_size=2``, ``dtype="float16"``, ...

    Example:
        >>> VLLM("Qwen/Qwen2.5-7B-Instruct", tensor_parallel_size=2).options
        (('tensor_parallel_size', 2),)
    """

    model: str
    revision: str | None = None
    adapter: str | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    stamp: str = field(default="", repr=False)

    def __init__(
        self,
        model: str,
        revision: str | None = None,
        adapter: str | None = None,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        **options: Any,
    ) -> None:
        values = {
            "model": model,
            "revision": revision,
            "adapter": adapter,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "options": tuple(sorted(options.items())),
            "stamp": stamp(model) + (stamp(adapter) if adapter else ""),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash(repr((self._weights, self.adapter, self.stamp)))  # an option may be a dict

    @property
    def _weights(self) -> tuple[Any, ...]:
        """What engines that share a loaded model have in common."""
        options = repr(self.options)
        return (self.model, self.revision, self.gpu_memory_utilization, self.max_model_len, options, stamp(self.model))

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

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`: one queue, so that all that is asked about a row shares its beginning."""
        loaded = _load(self)
        requests, known = plan(asks, loaded.chats)
        masses = known.empty(len(asks.choose))
        generated: list[list[str]] = [[] for _ in asks.generate]
        read = [np.empty(0, np.float32) for _ in asks.read]
        again: list[Request] = []
        ordered = sorted(requests, key=lambda r: r.ids)  # neighbours share their beginnings
        settings = _Settings(asks, known, loaded.chats)
        for request, output in loaded.run(((r, settings.of(r)) for r in ordered), self.adapter):
            if request.kind == "choose":
                known.add(masses, request.position, request.stem, _Sparse(output.outputs[0].logprobs[0]))
            elif request.kind == "generate":
                texts = [_text(loaded.chats, o.token_ids) for o in sorted(output.outputs, key=lambda o: o.index)]
                generated[request.position] = texts * (asks.n // request.draws)
            elif output.num_cached_tokens >= len(request.ids) - request.tail:
                again.append(request)  # of what the prefix cache holds there are no logits
            else:
                read[request.position] = _tail(request, output)
        for request, output in loaded.run(((r, settings.of(r, cached=False)) for r in again), self.adapter):
            read[request.position] = _tail(request, output)
        return Answers(generated, known.probabilities(masses), read)

    def close(self) -> None:
        """End vLLM's processes and free the memory; the next call loads anew."""
        loaded = _LOADED.pop(self._weights, None)
        if loaded is not None:
            loaded.close()

    def __enter__(self) -> VLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Settings:
    """Sampling parameters of each request: all explicit, none left to the model's generation config."""

    def __init__(self, asks: Asks, known: Labels, chats: Chats) -> None:
        self.asks, self.known = asks, known
        self.stops = sorted(chats.ends)

    def of(self, request: Request, cached: bool = True) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        common: dict[str, Any] = {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        common |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        if request.kind == "generate":
            return SamplingParams(
                n=request.draws,
                temperature=self.asks.temperature,
                max_tokens=request.room,
                stop_token_ids=self.stops,
                **common,
            )
        if request.kind == "choose":
            wanted = self.known.after(request.stem)
            exact = hasattr(SamplingParams, "logprob_token_ids") and len(wanted) <= 128
            which = {"logprob_token_ids": wanted} if exact else {"logprobs": _TOP}
            return SamplingParams(temperature=0.0, max_tokens=1, **which, **common)
        # By default vLLM reads a prompt anew whose log-probabilities are wanted; only those of its end are, here.
        return SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, skip_reading_prefix_cache=not cached, **common
        )


class _Sparse(dict[int, float]):
    """Probabilities by token id, of those that vLLM gave."""

    def __init__(self, logprobs: dict[int, Any]) -> None:
        super().__init__({token: float(np.exp(found.logprob)) for token, found in logprobs.items()})

    def __missing__(self, token: int) -> float:
        return 0.0  # less than the twentieth


def _text(chats: Chats, tokens: Sequence[int]) -> str:
    text: str = chats.tokenizer.decode(list(tokens), skip_special_tokens=True)
    return text.strip()


def _tail(request: Request, output: Any) -> npt.NDArray[np.float32]:
    said = zip(request.ids[-request.tail :], output.prompt_logprobs[-request.tail :], strict=True)
    return np.array([found[token].logprob for token, found in said], dtype=np.float32)


class _Loaded:
    """A vLLM engine of this process."""

    def __init__(self, config: VLLM) -> None:
        import vllm
        from transformers import AutoTokenizer

        source = str(from_gguf(Path(config.model))) if config.model.endswith(".gguf") else config.model
        options = _defaults() | {"gpu_memory_utilization": config.gpu_memory_utilization} | dict(config.options)
        self.lora = config.adapter is not None or bool(options.get("enable_lora"))
        self.llm = vllm.LLM(
            source,
            revision=config.revision,
            max_model_len=config.max_model_len,
            generation_config="vllm",
            enable_prefix_caching=True,
            enable_lora=self.lora,
            **options,
        )
        trusted = bool(options.get("trust_remote_code"))
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=trusted)
        model = self.llm.llm_engine.model_config
        self.chats = Chats.of(tokenizer, model.max_model_len, _stated_ends(source, config.revision, model))
        self.adapters: dict[str, Any] = {}
        self.numbers = itertools.count()
        self.pid = os.getpid()
        threading.Thread(target=_watch, args=(self.llm.llm_engine.engine_core,), daemon=True).start()

    @property
    def dead(self) -> bool:
        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        return bool(getattr(resources, "engine_dead", False))

    def run(self, requests: Iterator[tuple[Request, Any]], adapter: str | None) -> Iterator[tuple[Request, Any]]:
        """Each request and its output, as they are finished."""
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, lora = self.llm.llm_engine, self._adapter(adapter)
        flying: dict[str, Request] = {}
        try:
            while True:
                for request, settings in itertools.islice(requests, _IN_FLIGHT - len(flying)):
                    key = str(next(self.numbers))
                    flying[key] = request
                    engine.add_request(key, {"prompt_token_ids": request.ids}, settings, lora_request=lora)
                if not flying:
                    return
                for output in engine.step():
                    if output.finished and output.request_id in flying:  # others were given up before
                        yield flying.pop(output.request_id), output
        except EngineDeadError as error:
            raise EngineError(
                f"vLLM's engine process ended while {len(flying)} requests were under way (killed, or out of memory? "
                "its own messages stand above); the next call starts a fresh one"
            ) from error
        finally:
            if flying and not self.dead:
                engine.abort_request(list(flying))

    def _adapter(self, folder: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if folder is None:
            return None
        key = folder + stamp(folder)
        if key not in self.adapters:
            number = len(self.adapters) + 1
            self.adapters[key] = LoRARequest(f"adapter-{number}", number, folder)
        return self.adapters[key]

    def close(self) -> None:
        import torch

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _load(config: VLLM) -> _Loaded:
    """The engine of a configuration, loaded at the first call in this process, and again where it died."""
    loaded = _LOADED.get(config._weights)
    if loaded is not None and loaded.pid != os.getpid():
        del _LOADED[config._weights]  # the parent's, which a fork brought along
    elif loaded is not None and (loaded.dead or (config.adapter and not loaded.lora)):
        config.close()
    if config._weights not in _LOADED:
        _LOADED[config._weights] = _Loaded(config)
    return _LOADED[config._weights]


@atexit.register
def _close_all() -> None:
    for loaded in _LOADED.values():
        if loaded.pid == os.getpid():
            loaded.close()
    _LOADED.clear()


def _watch(client: Any) -> None:
    """Wake whoever waits for an engine that died: vLLM's own client would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    resources, outputs = getattr(client, "resources", None), getattr(client, "outputs_queue", None)
    if resources is None or outputs is None:
        return  # it runs in this very process
    del client
    pause = threading.Event()
    while not resources.engine_dead:
        pause.wait(_WATCH)
    outputs.put(EngineDeadError())


def _defaults() -> dict[str, Any]:
    """Options for this machine; the CPU build needs its threads and its memory named before it starts."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}-{cores[-1]}")  # alone it takes one of two
    return {"block_size": 32, "enforce_eager": True}


def _stated_ends(source: str, revision: str | None, model: Any) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source, revision=revision).eos_token_id
    except OSError:  # it has no such file
        return getattr(model.hf_text_config, "eos_token_id", None)
