"""The methods of benchmark_peers.py, and where they run."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import subprocess
import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_engines import serving
from datasets import Dataset

from clear_datasets import BSDetector, Clear, infer
from clear_datasets.engines import Engine, Messages, PromptError
from clear_datasets.engines.openai import OpenAI
from clear_datasets.engines.vllm import VLLM
from clear_datasets.engines.vllm_process import load
from clear_datasets.formats import Example

ROOT = Path(__file__).parents[1]
OURS = "clear_server"  # on the server that the others ask
COUNTED = {  # vLLM's counters; a request for several samples is as many sequences
    "requests": "request_params_n_count",
    "sequences": "request_success_total",
    "prompt_tokens": "prompt_tokens_total",
    "cached_prompt_tokens": "prefix_cache_hits_total",
    "generated_tokens": "generation_tokens_total",
}
RATING = """Here are a question and an answer that somebody gave to it.

Question:
{prompt}

Answer:
{response}

How good is the answer? Reply with one digit: 1 if it is wrong, 5 if it is right and complete, or a digit in between."""


@dataclass
class Found:
    """What a method says of the rows, in their order; nan where it says nothing, and why."""

    scores: Sequence[float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Sequence[float | None]] = field(default_factory=dict)
    seconds: float | None = None  # by the method's own clock
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Bench:
    """The rows, and the places where methods run: each starts when it is first wanted."""

    model: str
    dtype: str
    concurrency: int
    stack: contextlib.ExitStack
    rows: Dataset | None = None
    confidence: BSDetector = field(default_factory=BSDetector)

    @property
    def examples(self) -> list[Example]:
        read = infer(self.rows.features).read
        return [read(row) for row in self.rows]

    @cached_property
    def engine(self) -> VLLM:
        engine = self.stack.enter_context(VLLM(self.model, dtype=self.dtype, disable_log_stats=False))
        Clear(engine=engine, cache=False).score(self.rows[:2])  # warms up
        return engine

    @cached_property
    def url(self) -> str:
        url = self.stack.enter_context(serving(VLLM(self.model, dtype=self.dtype)))
        Clear(engine=OpenAI("served", url), cache=False).score(self.rows[:2])
        return url

    @property
    def server(self) -> OpenAI:
        return OpenAI("served", self.url, concurrency=self.concurrency)

    def reset(self, place: str) -> None:
        if place == "engine":
            load(self.engine).llm.reset_prefix_cache()
        elif place == "server":
            address = f"{self.url.removesuffix('/v1')}/reset_prefix_cache"
            urllib.request.urlopen(urllib.request.Request(address, method="POST"))

    def counters(self, place: str) -> Counter[str]:
        if place == "engine":
            from prometheus_client import generate_latest

            text = generate_latest().decode()
        elif place == "server":
            text = urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/metrics").read().decode()
        else:
            return Counter()
        found = re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", text, flags=re.MULTILINE)
        return Counter({name: sum(float(v) for n, v in found if n == of) for name, of in COUNTED.items()})


def ours(bench: Bench, engine: Engine) -> Found:
    scored = Clear(engine=engine, confidence=bench.confidence, cache=False).score(bench.rows[:])
    parts = {part: scored[f"clear_{part}"] for part in ("consistency", "reflection")}
    return Found(scored["clear_confidence"], {str(i): e for i, e in enumerate(scored["clear_error"]) if e}, parts)


def peer(bench: Bench, package: str, *options: str) -> Found:
    """A package in an environment of its own: rows and scores go through files."""
    with tempfile.TemporaryDirectory() as folder:
        rows, out = Path(folder) / "rows.json", Path(folder) / "scores.json"
        rows.write_text(json.dumps([{"messages": e.prompt, "response": e.response} for e in bench.examples]))
        command = [f"{ROOT}/.venv-{package}/bin/python", f"{ROOT}/scripts/peers_{package}.py", *options]
        command += ["--rows", str(rows), "--out", str(out), "--url", bench.url]
        subprocess.run([*command, "--concurrency", str(bench.concurrency)], check=True)
        found = json.loads(out.read_text())
    known = {name: found.pop(name) for name in ("scores", "reasons", "parts", "seconds") if name in found}
    return Found(**known, notes=found)


def judge(bench: Bench) -> Found:
    """What a judge says from 1 to 5, weighed by the probabilities of the digits: those before any temperature."""
    prompts = [[*e.prompt[:-1], {"role": "user", "content": asked(e)}] for e in bench.examples]
    scores = bench.server.choose(prompts, ("1", "2", "3", "4", "5")) @ np.arange(1.0, 6.0)
    return Found(scores, {str(i): "no digit was likely" for i in np.flatnonzero(np.isnan(scores))})


def asked(example: Example) -> str:
    return RATING.format(prompt=example.prompt[-1]["content"], response=example.response)


def losses(engine: VLLM, pairs: list[tuple[Messages, str]], reasons: dict[str, str]) -> list[float]:
    """Mean loss of the tokens of each response, without the one that ends it."""
    every, left = [math.nan] * len(pairs), list(range(len(pairs)))
    while left:
        try:
            read = engine.logprobs(*zip(*(pairs[i] for i in left), strict=True))
        except PromptError as error:
            reasons |= {str(left[i]): reason for i, reason in error.reasons.items()}
            left = [i for position, i in enumerate(left) if position not in error.reasons]
            continue
        for i, values in zip(left, read, strict=True):
            every[i] = -float(values[:-1].mean())
        break
    return every


def logprob(bench: Bench) -> Found:
    reasons: dict[str, str] = {}
    pairs = [(e.prompt, e.response) for e in bench.examples]
    return Found([-loss for loss in losses(bench.engine, pairs, reasons)], reasons)


def ifd(bench: Bench) -> Found:
    """Instruction-following difficulty: how much of the response's loss is left once the model knows the prompt.

    It is high where the prompt does not help to say the response, as with a wrong one, hence the minus. (Data selection
    by it keeps the highest below 1, which are the difficult ones.) The ratio of losses is Li et al. 2024, arXiv
    2308.12032; the ratio of perplexities is of the same authors' arXiv 2402.00530.
    """
    examples, reasons = bench.examples, dict[str, str]()
    alone: Messages = [{"role": "user", "content": ""}]
    pairs = [(prompt, e.response) for e in examples for prompt in (e.prompt, alone)]
    found = np.array(losses(bench.engine, pairs, reasons)).reshape(-1, 2)
    reasons = {str(int(i) // 2): reason for i, reason in reasons.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        return Found(-found[:, 0] / found[:, 1], reasons, {"perplexities": -np.exp(found[:, 0] - found[:, 1])})


def length(bench: Bench) -> Found:
    return Found([-len(e.response) for e in bench.examples])


def chance(bench: Bench) -> Found:
    generator = random.Random(0)
    return Found([generator.random() for _ in bench.examples])


METHODS: dict[str, tuple[str, Callable[[Bench], Found]]] = {
    OURS: ("server", lambda bench: ours(bench, bench.server)),
    "clear_vllm": ("engine", lambda bench: ours(bench, bench.engine)),
    "tlm_high": ("server", lambda bench: peer(bench, "tlm", "--preset", "high")),
    "tlm_best": ("server", lambda bench: peer(bench, "tlm", "--preset", "best")),
    "uqlm_ensemble": ("server", lambda bench: peer(bench, "uqlm")),
    "uqlm_judge": ("server", lambda bench: peer(bench, "uqlm", "--judge")),
    "judge_1_to_5": ("server", judge),
    "token_logprob": ("engine", logprob),
    "ifd": ("engine", ifd),
    "length": ("", length),
    "random": ("", chance),
}
