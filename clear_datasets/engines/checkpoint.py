"""Loading a causal language model and its tokenizer, once a process, from a Hub id, a folder or a GGUF file."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.engines import Messages, PromptError

if TYPE_CHECKING:
    import torch

    from clear_datasets.engines.transformers import Transformers

_LOADED: dict[Transformers, Checkpoint] = {}
_PARENT_HAD_TORCH: list[bool] = []  # not empty in a process that was forked from one with torch


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
    tokenizer: Any
    device: torch.device
    limit: int  # tokens of prompt and answer together
    ends: frozenset[int]  # tokens that end an answer
    pad: int
    end: int  # the token that ends an answer in the chat template
    shares_prefix: bool

    def response(self, text: str) -> list[int]:
        """Token ids of an answer and its end."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return [*ids, self.end]

    def encode(self, prompts: Sequence[Messages], reserve: Sequence[int]) -> list[list[int]]:
        """Token ids of each prompt, up to where the answer begins; `reserve` tokens each are kept free for it.

        Raises:
            PromptError: Some prompts leave too little room, or the chat template refuses them.
        """
        texts: list[str] = []
        reasons: dict[int, str] = {}
        for position, prompt in enumerate(prompts):
            try:
                texts.append(render(self.tokenizer, prompt))
            except Exception as error:  # templates raise what they like: jinja2 errors, TypeError, ...
                reasons[position] = f"the chat template refuses this prompt: {error}"
                texts.append("")
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.tokenizer.chat_template)["input_ids"]
        for position, (tokens, room) in enumerate(zip(ids, reserve, strict=True)):
            if len(tokens) + room > self.limit:
                reasons.setdefault(
                    position,
                    f"the prompt has {len(tokens):,} tokens and {room:,} are kept for the answer, "
                    f"but the model takes {self.limit:,}: shorten the row, or use a model with a longer context",
                )
        if reasons:
            raise PromptError(reasons)
        return ids


# Models that think aloud first would say neither a label nor an answer; other templates ignore the setting.
_ANSWERING = {"add_generation_prompt": True, "enable_thinking": False}


def render(tokenizer: Any, messages: Messages) -> str:
    """The text of a chat, by the tokenizer's chat template, or plainly where it has none."""
    if not tokenizer.chat_template:
        turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
        return "\n\n".join([*turns, "Assistant:"])
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, **_ANSWERING)
    except Exception:
        if not messages or messages[0]["role"] != "system" or len(messages) < 2:
            raise
        # Some templates have no system role; its text then opens the first turn.
        first = {**messages[1], "content": messages[0]["content"] + "\n\n" + messages[1]["content"]}
        text = tokenizer.apply_chat_template([first, *messages[2:]], tokenize=False, **_ANSWERING)
    return text


def after_fork() -> None:
    """Make torch usable in a process that was forked from one with torch."""
    if _PARENT_HAD_TORCH:
        import torch

        torch.set_num_threads(1)  # the parent's OpenMP threads did not come along, and would be waited for for ever


def load(config: Transformers) -> Checkpoint:
    """The checkpoint of an engine's configuration, loaded at the first call in this process."""
    after_fork()
    if config not in _LOADED:
        _LOADED[config] = _load(config)
    return _LOADED[config]


def _load(config: Transformers) -> Checkpoint:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(from_gguf(Path(config.model))) if config.model.endswith(".gguf") else config.model
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    device = torch.device(config.device or best_device())
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else _fast_dtype(device)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).to(device).eval()
    ends = {tokenizer.eos_token_id}
    stated = model.generation_config.eos_token_id
    ends.update(stated if isinstance(stated, list) else [stated])
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        device=device,
        limit=int(getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length),
        ends=frozenset(e for e in ends if e is not None),
        pad=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        end=_end_of_turn(tokenizer, ends),
        # Padding between two parts of a prompt is masked in full attention; other layers would count it in.
        shares_prefix=kinds == {"full_attention"} and not getattr(text, "sliding_window", None),
    )


def _end_of_turn(tokenizer: Any, ends: set[int | None]) -> int:
    """The token by which the chat template ends an answer: not every tokenizer's eos token is."""
    if tokenizer.chat_template:
        said = "Seven"
        chat = [{"role": "user", "content": "Say a number."}, {"role": "assistant", "content": said}]
        _, found, after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(said)
        for token in tokenizer.encode(after, add_special_tokens=False) if found else ():
            if token in ends:
                return int(token)
    return int(tokenizer.eos_token_id if tokenizer.eos_token_id is not None else max(e for e in ends if e is not None))


def stamp(model: str) -> str:
    """Digest of the names, sizes and times of a local model's files, to tell a retrained one; "" for a Hub id."""
    path = Path(model)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16] if seen else ""


def best_device() -> str:
    """The fastest kind of device on this machine."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it: emulated, it is four times slower than float32 (docs/log.md)."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        cpu: Any = torch.cpu
        fast = any(getattr(cpu, f, bool)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return torch.bfloat16 if fast else torch.float32
    return torch.float16


def cache_folder() -> Path:
    """Where converted models are kept: ``CLEAR_CACHE``, else ``clear_datasets`` beside the Hub's own cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("CLEAR_CACHE") or Path(HF_HOME) / "clear_datasets")


def from_gguf(file: Path) -> Path:
    """Convert a GGUF file into a checkpoint folder, once; later calls return the folder that is there.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"no GGUF file at {file}: give the path of a .gguf file, a checkpoint folder or a Hub id"
        )
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    folder = cache_folder() / "models" / f"{file.stem}-{digest}"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
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
