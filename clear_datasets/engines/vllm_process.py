"""vLLM's engine process: started once, watched, shared by engines that differ in their adapter alone, and ended."""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.engines import EngineError, hint_at_ranks
from clear_datasets.engines.chats import Chats, tokenizer_of
from clear_datasets.engines.checkpoint import loading, source_of, stated_ends
from clear_datasets.engines.guard import Guard
from clear_datasets.engines.planning import Request

if TYPE_CHECKING:
    from clear_datasets.engines.vllm import VLLM

IN_FLIGHT = 1024  # requests that vLLM holds: enough for its largest batch, few enough for the memory
_WATCH = 1.0  # seconds between two looks at the engine's process
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of LoRA adapters, that vLLM can be started for

LOADED: dict[tuple[Any, ...], Loaded] = {}


class Loaded:
    """A vLLM engine of this process."""

    def __init__(self, config: VLLM) -> None:
        import vllm.platforms

        source = source_of(config.model)
        on_cpu = vllm.platforms.current_platform.is_cpu()
        options: dict[str, Any] = {
            "revision": config.revision,
            # -1 is what the GPU's memory has room for: with None, too little for the whole length ends in an error.
            "max_model_len": config.max_model_len or (None if on_cpu else -1),
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            # By vLLM's own a second process would repeat the samples of the first.
            "seed": int.from_bytes(os.urandom(4)) >> 1,
            **(_cpu_options(config) if on_cpu else {}),
            **({"enable_lora": True, "max_lora_rank": _rank(config.adapter)} if config.adapter else {}),
            **dict(config.options),
        }
        self.rank = options.get("max_lora_rank", 16) if options.get("enable_lora") else 0
        self.llm: Any = None
        self.guard = Guard()
        try:
            with loading(config.model):
                with self.guard.watching():
                    self.llm = vllm.LLM(source, **options)
                self._describe(source, options)
        except BaseException:
            self.close()
            raise
        self.adapters: dict[str, Any] = {}
        self.numbers = itertools.count()
        self.lock = threading.Lock()  # vLLM gives any output to whoever asks next
        self.pid = os.getpid()
        threading.Thread(target=_watch, args=(self.llm.llm_engine.engine_core,), daemon=True).start()

    def _describe(self, source: str, options: dict[str, Any]) -> None:
        trust = bool(options.get("trust_remote_code"))
        tokenizer = tokenizer_of(options.get("tokenizer") or source, options["revision"], trust)
        model = self.llm.llm_engine.model_config
        self.chats = Chats.of(
            tokenizer, model.max_model_len, stated_ends(source, options["revision"], model.hf_text_config)
        )

    @property
    def dead(self) -> bool:
        """Whether any of its processes ended."""
        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        return bool(getattr(resources, "engine_dead", False)) or not all(p.is_alive() for p in self._processes)

    @property
    def _processes(self) -> list[Any]:
        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        return list(getattr(getattr(resources, "engine_manager", None), "processes", ()))

    def run(self, requests: Iterator[tuple[Request, Any]], config: VLLM) -> Iterator[tuple[Request, Any]]:
        """Each request and its output, as they are finished."""
        with self.lock:
            yield from self._run(requests, config)

    def _run(self, requests: Iterator[tuple[Request, Any]], config: VLLM) -> Iterator[tuple[Request, Any]]:
        from vllm.v1.engine.exceptions import EngineDeadError

        engine, lora = self.llm.llm_engine, self._adapter(config)
        flying: dict[str, Request] = {}
        try:
            while True:
                for request, settings in itertools.islice(requests, IN_FLIGHT - len(flying)):
                    key = str(next(self.numbers))
                    flying[key] = request
                    engine.add_request(key, {"prompt_token_ids": request.ids}, settings, lora_request=lora)
                if not flying:
                    return
                for output in engine.step():
                    if (
                        any(o.finish_reason in ("abort", "error") for o in output.outputs)
                        and output.request_id in flying
                    ):
                        raise EngineDeadError
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

    def _adapter(self, config: VLLM) -> Any:
        from vllm.lora.request import LoRARequest

        if config.adapter is None:
            return None
        key = config.adapter + config.adapter_stamp
        if key not in self.adapters:
            number = len(self.adapters) + 1
            self.adapters[key] = LoRARequest(f"adapter-{number}", number, config.adapter)
        return self.adapters[key]

    def close(self) -> None:
        """End its processes and free the memory."""
        import torch

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        self.guard.close()
        self.llm = None
        gc.collect()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def load(config: VLLM) -> Loaded:
    """The engine of a configuration, loaded at the first call in this process, and again where it died."""
    for key in [k for k, other in LOADED.items() if other.pid != os.getpid()]:
        del LOADED[key]  # the parent's, which a fork brought along
    loaded = LOADED.get(config.weights)
    if loaded is not None and (loaded.dead or (config.adapter and _rank(config.adapter) > loaded.rank)):
        config.close()
    if config.weights not in LOADED:
        with _deaf():  # an interrupt waits: half an import, or an engine that nobody knows, could not be used or ended
            hint_at_ranks(config.gpus)
            _make_room(config)
            LOADED[config.weights] = Loaded(config)
    return LOADED[config.weights]


def _make_room(config: VLLM) -> None:
    """Close the engines, oldest first, whose shares of the GPU's memory leave too little for another one."""
    from vllm.platforms import current_platform

    while not current_platform.is_cpu() and LOADED:
        if sum(share for _, _, share, *_ in LOADED) + config.gpu_memory_utilization <= 1:
            return
        LOADED.pop(next(iter(LOADED))).close()


@atexit.register
def close_all() -> None:
    """End all engines of this process."""
    for loaded in LOADED.values():
        if loaded.pid == os.getpid():
            loaded.close()
    LOADED.clear()


def _watch(client: Any) -> None:
    """Wake whoever waits for an engine that died: vLLM's own client would wait for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    resources, outputs = getattr(client, "resources", None), getattr(client, "outputs_queue", None)
    if resources is None or outputs is None:
        return  # it runs in this very process
    calls = getattr(client, "utility_results", {})
    del client
    pause = threading.Event()
    while not resources.engine_dead:
        pause.wait(_WATCH)
    outputs.put(EngineDeadError())
    for future in list(calls.values()):
        with contextlib.suppress(Exception):  # it may be done
            future.set_exception(EngineDeadError())


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """An interrupt waits for the end. Processes that are started within never hear it: this one tells them to stop."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # it would unblock the signal, later
    late: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    # A blocked signal reaches another thread, of which a notebook has several, and Python raises it in this one.
    handler = signal.signal(signal.SIGINT, lambda number, _: late.append(number)) if main else None
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if main:
            signal.signal(signal.SIGINT, handler or signal.default_int_handler)
    if late:
        signal.raise_signal(signal.SIGINT)


def _rank(adapter: str) -> int:
    """The rank that vLLM is started with for a LoRA adapter."""
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"no LoRA adapter in {adapter}: expected a folder with adapter_config.json, as PEFT saves it"
        )
    config = json.loads(file.read_text())
    needed = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if needed > _RANKS[-1]:
        raise ValueError(f"the adapter in {adapter} has rank {needed}; vLLM takes {_RANKS[-1]} at most: merge it")
    return next(rank for rank in _RANKS if rank >= needed)


def _cpu_options(config: VLLM) -> dict[str, Any]:
    """Of the CPU build, which also needs its threads and its memory named before it starts."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    if hasattr(os, "sched_getaffinity") and dict(config.options).get("tensor_parallel_size", 1) == 1:
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)  # left alone it takes one of two
    return {"block_size": 32, "enforce_eager": True}
