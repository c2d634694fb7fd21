"""Loading a causal language model and its tokenizer, once a process, from a Hub id, a folder or a GGUF file."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.engines import EngineError, hint_at_ranks
from clear_datasets.engines.chats import DATE, Chats, tokenizer_of
from clear_datasets.engines.gguf import from_gguf, head_holds

if TYPE_CHECKING:
    import torch

    from clear_datasets.engines.transformers import Transformers

_LOADED: dict[Transformers, Checkpoint] = {}
_PARENT_HAD_TORCH: list[bool] = []  # not empty in a process that was forked from one with torch

_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")  # where chat templates are kept
_SHORT = ("out of memory", "allocate memory", "not enough memory", "can't start new thread")


def _after_fork() -> None:
    if "torch" in sys.modules:
        _PARENT_HAD_TORCH.append(True)
    for config in [c for c, checkpoint in _LOADED.items() if checkpoint.device.type != "cpu"]:
        del _LOADED[config]  # memory of a GPU does not come along; loading anew says so


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass
class Checkpoint:
    """A model in memory, and how a chat becomes its tokens."""

    model: Any
    chats: Chats
    device: torch.device
    pad: int
    shares_prefix: bool
    budget: int | None = None  # tokens of a forward pass, where it was found that no more fit the memory


def after_fork() -> None:
    """Make torch usable in a process that was forked from one with torch."""
    if _PARENT_HAD_TORCH:
        import torch

        torch.set_num_threads(1)  # the parent's OpenMP threads did not come along, and would be waited for for ever


def load(config: Transformers) -> Checkpoint:
    """The checkpoint of an engine's configuration, loaded at the first call in this process."""
    after_fork()
    if config not in _LOADED:
        with loading(config.model):
            _LOADED[config] = _load(config)
    return _LOADED[config]


@contextmanager
def loading(model: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever goes wrong while a model is loaded ends in an `EngineError` of one line: it goes wrong in many ways."""
    try:
        yield
    except (EngineError, ImportError, FileNotFoundError):  # they say how to mend it
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if short_of_memory(error):
            mend = "there is too little memory for it: free some, or take a smaller model"
        elif "engine core" in reason.lower():  # vLLM's error of its own process, which has said what is wrong
            mend = (
                "vLLM's own messages stand above; if they speak of memory, give a smaller max_model_len, "
                "or a gpu_memory_utilization that fits what is free"
            )
        elif os.path.exists(model):
            mend = "is the folder a whole checkpoint, with all of its files as they were saved?"
        else:
            mend = "expected a folder that is there, or the id of a Hub model that you have access to (HF_TOKEN)"
        if len(reason) > 600:  # what is wrong stands at the beginning, what to do about it at the end
            reason = f"{reason[:300]} … {reason[-300:]}"
        raise EngineError(f"cannot load the model {model}: {reason.removesuffix('.')}; {mend}") from error


def short_of_memory(error: Exception) -> bool:
    """Whether an error is for want of memory: of the device, of this machine, or of what a process may have."""
    return isinstance(error, MemoryError) or any(piece in str(error).lower() for piece in _SHORT)


def unload(config: Transformers | None = None) -> None:
    """Free what `load` holds, of one configuration or of all."""
    for other in [config] if config is not None else list(_LOADED):
        _LOADED.pop(other, None)
    free_memory()


def free_memory() -> None:
    """Give memory that nothing holds any more back, a GPU's as well."""
    gc.collect()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        sys.modules["torch"].cuda.empty_cache()


def _load(config: Transformers) -> Checkpoint:
    import torch
    from transformers import AutoModelForCausalLM

    source = source_of(config.model)
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    device = torch.device(config.device or best_device())
    if device.type == "cuda":
        hint_at_ranks()
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else fast_dtype(device)
    tokenizer = tokenizer_of(source, **options)
    model, found = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):  # which would be drawn at random
        raise ValueError(f"the checkpoint lacks {len(missing)} of its weights, among them {missing[0]}")
    if config.adapter:
        model = _peft().PeftModel.from_pretrained(model, config.adapter).merge_and_unload()
    try:
        model = model.to(device).eval()
    except torch.OutOfMemoryError:
        if not _LOADED:
            raise
        unload()  # the model that the step before this one asked
        model = model.to(device).eval()
    text = model.config.get_text_config()
    limit = int(_trained_length(text) or tokenizer.model_max_length)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return Checkpoint(
        model=model,
        chats=Chats.of(tokenizer, limit, model.generation_config.eos_token_id),
        device=device,
        pad=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        # Padding between two parts of a prompt is masked in full attention; other layers would count it in.
        shares_prefix=kinds == {"full_attention"} and not getattr(text, "sliding_window", None),
    )


def _trained_length(text: Any) -> int | None:
    """Positions that a model knows; up to where longrope changes its factors, for all that is in the batch with it."""
    known: int | None = getattr(text, "max_position_embeddings", None)
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one, or one for each type of layer
        if known and isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            known = min(known, rope.get("original_max_position_embeddings", known))
    return known


def source_of(model: str | os.PathLike[str]) -> str:
    """What `transformers` loads of a model: its folder or Hub id, or that which a ``.gguf`` file was converted into."""
    name = os.fspath(model)
    return str(from_gguf(Path(name))) if name.endswith(".gguf") else name


def stated_ends(source: str, revision: str | None, config: Any) -> Any:
    """The ``eos_token_id`` of a model's generation config, or of its own where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(source, revision=revision).eos_token_id
    except OSError:  # it has no such file
        return getattr(config, "eos_token_id", None)


def adapter_of(writer: str) -> str | None:
    """The local folder of a LoRA adapter, fetched where it is one of the Hub; None for a whole checkpoint."""
    if os.path.exists(writer):
        return writer if (Path(writer) / "adapter_config.json").is_file() else None
    return _hub_adapter(writer)


@lru_cache  # it is asked for each batch
def _hub_adapter(writer: str) -> str | None:
    from huggingface_hub import constants, file_exists, snapshot_download, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        there = isinstance(try_to_load_from_cache(writer, "adapter_config.json"), str)
    else:
        there = file_exists(writer, "adapter_config.json")
    return snapshot_download(writer) if there else None


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError('a LoRA adapter needs peft: pip install "clear-datasets[train]"') from error
    return peft


def stamp(model: str) -> str:
    """Digest of the names, sizes and times of a local model's files, to tell a retrained one; "" for a Hub id.

    Notes beside them, hidden files and folders are no part of it: a model card may be written later.
    """
    path = Path(model)
    files = sorted(filter(_is_of_model, path.iterdir())) if path.is_dir() else [path] if path.is_file() else []
    seen: list[Any] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    seen += _dated(path)
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16] if seen else ""


def _is_of_model(file: Path) -> bool:
    return file.is_file() and file.suffix != ".md" and not file.name.startswith(".")


def _dated(folder: Path) -> list[str]:
    """The date that a model is told whose chat template asks for it; before, it was that of the day."""
    word = "strftime_now"
    asks = head_holds(folder, word.encode()) if folder.is_file() else holds(folder, word, *_TEMPLATES)
    return [f"on {DATE}"] if asks else []


def holds(folder: Path, word: str, *names: str) -> bool:
    """Whether one of these small files of a folder has a word in it."""
    files = [folder / name for name in names]
    return any(word in file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def best_device() -> str:
    """The fastest kind of device on this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: emulated, it is four times slower than float32 (docs/log.md)."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        cpu: Any = torch.cpu
        fast = any(getattr(cpu, f, bool)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if fast else torch.float32
    return torch.float16


def commit_of(model: str, revision: str | None) -> str:
    """The commit of a Hub model's or adapter's revision, as `transformers` finds it; else what was asked for."""
    folder = snapshot(model, revision)
    if folder is None:
        return f"{model}@{revision or ''}"
    return " ".join([f"{model}@{folder.name}", *_dated(folder)])


@lru_cache  # once a process: a model that is changed on the Hub meanwhile is loaded already
def snapshot(model: str, revision: str | None) -> Path | None:
    """The folder of a Hub model's or adapter's small files in the Hub's cache; None where it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def fetch(name: str) -> Path | None:
        with suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):  # loading it will say why
            return Path(hf_hub_download(model, name, revision=revision)).parent
        return None

    folder = fetch("config.json") or fetch("adapter_config.json")
    if folder and not any((folder / name).is_file() for name in _TEMPLATES):  # it was never loaded
        for name in _TEMPLATES:
            fetch(name)
    return folder
