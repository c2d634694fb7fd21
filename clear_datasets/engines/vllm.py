"""vLLM in this process: the engine for GPUs. Its CPU build runs the same code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, Queued
from clear_datasets.engines.chats import Chats
from clear_datasets.engines.checkpoint import adapter_of, commit_of, holds, snapshot, stamp
from clear_datasets.engines.labels import Labels
from clear_datasets.engines.planning import Request, plan
from clear_datasets.engines.vllm_process import LOADED, load

_WHERE = {  # options that say where and how fast a model runs, not what it says
    "block_size", "cpu_offload_gb", "data_parallel_size", "disable_log_stats", "distributed_executor_backend",
    "enable_chunked_prefill", "enable_lora", "enable_prefix_caching", "enforce_eager", "max_lora_rank", "max_loras",
    "max_num_batched_tokens", "max_num_seqs", "pipeline_parallel_size", "swap_space", "tensor_parallel_size",
}  # fmt: skip
_TOP = 20  # log-probabilities that vLLM gives at most, where it cannot be asked for those of the labels


@dataclass(frozen=True, init=False)
class VLLM(Queued):
    """Continuous batching with `vllm`, in this process.

    All that is asked about a batch goes into one queue, in which requests with a common beginning (a row's passage and
    question) are neighbours, so that vLLM's prefix cache has it once; `n` samples are one request. vLLM holds at most
    1,024 requests at a time, however many are asked.

    Engines that differ in nothing but their adapter share the weights: one writes with it, another judges without. The
    first adapter starts vLLM anew, unless it was started for adapters: ``enable_lora=True, max_lora_rank=16``.

    Args:
        model: Hub id, local folder, or a ``.gguf`` file (converted once into the cache folder).
        revision: Branch, tag or commit of a Hub model.
        adapter: A folder with a LoRA adapter that is applied to the model.
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take.
        max_model_len: Tokens of prompt and answer; by default what the model can, or as many as a GPU has memory for.
        **options: Passed to ``vllm.LLM``: ``tensor_parallel_size=2``, ``dtype="float16"``, ...

    Raises:
        ValueError: An option is a token; ``HF_TOKEN`` is its place.

    Examples:
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
    adapter_stamp: str = field(default="", repr=False)

    def __init__(
        self,
        model: str | os.PathLike[str],
        revision: str | None = None,
        adapter: str | os.PathLike[str] | None = None,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        **options: Any,
    ) -> None:
        if isinstance(options.get("hf_token"), str):
            raise ValueError("hf_token would be in the hash and on the card: set HF_TOKEN, or hf auth login")
        model, adapter = os.fspath(model), None if adapter is None else os.fspath(adapter)
        values = {
            "model": model,
            "revision": revision,
            "adapter": adapter,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "options": tuple(sorted(options.items())),
            "stamp": stamp(model),  # another engine once the files have changed
            "adapter_stamp": (stamp(adapter) or adapter) if adapter else "",
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        return hash((self.model, self.revision, self.adapter, self.stamp, self.adapter_stamp))  # options may be dicts

    @property
    def gpus(self) -> int:
        """See `Engine.gpus`."""
        options = dict(self.options)
        return int(options.get("tensor_parallel_size", 1)) * int(options.get("pipeline_parallel_size", 1))

    def with_writer(self, writer: str) -> VLLM:
        """See `Engine.with_writer`; an adapter shares the loaded model."""
        adapter = adapter_of(writer)
        model, revision = (self.model, self.revision) if adapter else (writer, None)
        memory, length = self.gpu_memory_utilization, self.max_model_len
        return VLLM(model, revision, adapter, memory, length, **dict(self.options))

    @property
    def identity(self) -> str:
        """See `Engine.identity`: how the work is spread and where it runs changes nothing."""
        model = self.stamp or commit_of(self.model, self.revision)
        told = [option for option in self.options if option[0] not in _WHERE]
        folder = Path(self.model) if self.stamp else snapshot(self.model, self.revision)
        if self.max_model_len and folder and holds(folder, "long_factor", "config.json"):
            told.append(("max_model_len", self.max_model_len))  # by which vLLM chooses the factors of every prompt
        return repr(("VLLM", model, self.adapter_stamp, told))

    @property
    def weights(self) -> tuple[Any, ...]:
        """What engines that share a loaded model have in common."""
        options = repr(self.options)
        return (self.model, self.revision, self.gpu_memory_utilization, self.max_model_len, options, self.stamp)

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`: one queue, so that all that is asked about a row shares its beginning."""
        loaded = load(self)
        requests, known = plan(asks, loaded.chats, spare=1)  # vLLM writes a token after all that it reads
        masses = known.empty(len(asks.choose))
        generated: list[list[str]] = [[] for _ in asks.generate]
        cut: list[list[bool]] = [[] for _ in asks.generate]
        read = [np.empty(0, np.float32) for _ in asks.read]
        stems = [len(known.stems)] * len(asks.choose)  # to be read
        again: list[Request] = []
        ordered = sorted(requests, key=lambda r: r.ids)  # neighbours share their beginnings
        settings = _Settings(asks, known, loaded.chats)
        for request, output in loaded.run(((r, settings.of(r)) for r in ordered), self):
            position = request.position
            if request.kind == "choose":
                known.add(masses, position, request.stem, _Sparse(output.outputs[0].logprobs[0]))
                stems[position] -= 1
                if not stems[position]:
                    asks.tell("choose", position, known.probabilities(masses[position : position + 1])[0])
            elif request.kind == "generate":
                drawn = sorted(output.outputs, key=lambda o: o.index)
                generated[position] = [_text(loaded.chats, o.token_ids) for o in drawn] * asks.times
                cut[position] = [o.finish_reason == "length" for o in drawn] * asks.times
                asks.tell("generate", position, (generated[position], cut[position]))
            elif _unread(request, output):
                again.append(request)
            else:
                read[position] = _tail(request, output)
                asks.tell("read", position, read[position])
        for request, output in loaded.run(((r, settings.of(r, cached=False)) for r in again), self):
            read[request.position] = _tail(request, output)
            asks.tell("read", request.position, read[request.position])
        return Answers(generated, known.probabilities(masses), read, cut)

    def close(self) -> None:
        """End vLLM's processes and free the memory; the next call loads anew."""
        loaded = LOADED.pop(self.weights, None)
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
    said = [t for t in tokens if t not in chats.ends]  # vLLM leaves the last one there
    text: str = chats.tokenizer.decode(said, skip_special_tokens=True)
    return text.strip()


def _unread(request: Request, output: Any) -> bool:
    """Whether the response was in the prefix cache: of what it holds there are no logits."""
    return bool(
        output.num_cached_tokens >= len(request.ids) - request.tail or len(output.prompt_logprobs) <= request.tail
    )


def _tail(request: Request, output: Any) -> npt.NDArray[np.float32]:
    said = zip(request.ids[-request.tail :], output.prompt_logprobs[-request.tail :], strict=True)
    return np.array([found[token].logprob for token, found in said], dtype=np.float32)
