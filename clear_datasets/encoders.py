"""Encoder models that compare texts: loaded once a process, often beside a language model that has most of a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from clear_datasets.engines.checkpoint import after_fork, best_device, free_memory, loading, short_of_memory, stamp

T = TypeVar("T")
U = TypeVar("U")


class Encoder:
    """An encoder model and its tokenizer, called on texts or pairs of texts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, first: list[str], second: list[str] | None, mask: bool = False) -> Any:
        """What the model says, and which of the tokens are none of the padding where `mask` is set."""
        import torch

        limit = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings - 2)
        batch = self.tokenizer(
            first, second, padding=True, truncation="longest_first", max_length=limit, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            out = self.model(**batch)
        return (out, batch["attention_mask"]) if mask else out

    def in_parts(self, items: Sequence[T], size: int, read: Callable[[Sequence[T]], list[U]]) -> list[U]:
        """What `read` says of each item: `size` at a time, fewer where memory is short, and at last on the CPU."""
        found: list[U] = []
        held = size
        while len(found) < len(items):
            part = items[len(found) : len(found) + held]
            try:
                found += read(part)
                continue
            except (MemoryError, RuntimeError) as error:
                if not short_of_memory(error) or (len(part) == 1 and self.model.device.type == "cpu"):
                    raise
            if len(part) > 1:  # not in the handler: what it handles still holds the memory
                held = len(part) // 2
                free_memory()
            else:
                held = size
                self.to_cpu()
        return found

    def to(self, device: str) -> Encoder:
        """Move it to a device; where that has too little memory, it stays on the CPU."""
        try:
            self.model.to(device)
            return self
        except (MemoryError, RuntimeError) as error:
            if device == "cpu" or not short_of_memory(error):
                raise
        self.to_cpu()
        return self

    def to_cpu(self) -> None:
        """Leave the GPU to the language model."""
        warnings.warn(
            f"the GPU has too little memory left for {self.model.name_or_path}, which compares on the CPU, slowly: say "
            'device="cpu" from the start, or leave it room, by gpu_memory_utilization=0.8 of VLLM, say',
            stacklevel=2,
        )
        self.model.to("cpu")
        free_memory()


def encoder_of(model: str | os.PathLike[str], revision: str | None, device: str | None, auto: str) -> Encoder:
    """The encoder of a checkpoint, by a class of `transformers`, loaded once a process and state of its files."""
    after_fork()
    name = os.fspath(model)
    return _loaded(name, revision, device, auto, stamp(name))


@lru_cache(maxsize=4)
def _loaded(model: str, revision: str | None, device: str | None, auto: str, state: str) -> Encoder:
    import transformers

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    with loading(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
        loaded = getattr(transformers, auto).from_pretrained(model, **options)
        return Encoder(loaded.eval(), tokenizer).to(device or best_device())


def close_encoders() -> None:
    """Free the memory of the encoders in this process; the next comparison loads them anew."""
    _loaded.cache_clear()
    free_memory()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_loaded.cache_clear)  # memory of a GPU does not come along
