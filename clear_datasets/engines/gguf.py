"""GGUF files, as checkpoints that `transformers` and vLLM load."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from clear_datasets.engines import EngineError

_HEAD = 1 << 26  # bytes of a file that hold its metadata and the names of its tensors


def model_folder() -> Path:
    """Where converted models are kept: ``clear_datasets`` beside the Hub's own cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "clear_datasets"


def from_gguf(file: Path) -> Path:
    """Convert a GGUF file into a checkpoint folder, once; later calls return the folder that is there.

    Raises:
        EngineError: The model would see its positions unscaled.
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"no GGUF file at {file}: give the path of a .gguf file, a checkpoint folder or a Hub id"
        )
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    _check_positions(file)
    folder = model_folder() / "models" / f"{file.stem}-{digest}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}  # None would ask at the terminal
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **options)
        model.hf_quantizer, model.is_quantized = None, False  # plain weights by now; saving refuses otherwise
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def head_holds(file: Path, *words: bytes) -> bool:
    """Whether one of the words stands in the metadata of a file, or among the names of its tensors."""
    seen = file.stat()
    return _head_holds(file, seen.st_size, seen.st_mtime_ns, *words)


@lru_cache
def _head_holds(file: Path, size: int, changed: int, *words: bytes) -> bool:
    with file.open("rb") as f:
        head = f.read(_HEAD)
    return any(word in head for word in words)


def _check_positions(file: Path) -> None:
    """Refuse a GGUF file whose scaled positions `transformers` would drop without a word, as of Llama-3.1."""
    if not head_holds(file, b"rope_freqs.weight", b"rope_factors_long.weight"):
        return
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]  # one for each kind of layers, or one
    if all(kind.get("rope_type", "default") == "default" for kind in kinds):
        raise EngineError(
            f"{file.name} scales its positions by a tensor (rope_freqs or rope_factors) that transformers does not "
            "read, so that the model would see others: take its safetensors checkpoint, by its Hub id or its folder"
        )
