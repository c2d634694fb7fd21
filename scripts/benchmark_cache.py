"""What the cache of answers costs, and how fast it answers.

    .venv-vllm/bin/python scripts/benchmark_cache.py --model 0.5b --out docs/benchmarks/cache.json

Pairs: `score` on vLLM with a new, empty cache, and without one, in turn, with an empty prefix cache. Look-ups: 100,000
stored answers (label probabilities, of prompts as long as SQuAD's), asked in batches of 1,000 of an engine that fails
when it is asked; keys are made and values read, as in any run. It fails above 3% or below 20,000 look-ups a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from get_model import MODELS, fetch
from this_run import this_run

from clear_datasets import Clear, noise
from clear_datasets.engines import Engine, Messages
from clear_datasets.engines.cache import Cached, close_stores

DATA = Path(__file__).parent / "data"
STORED = 100_000


@dataclass(frozen=True)
class Once(Engine):
    """Answers while it may."""

    open: bool

    @property
    def identity(self) -> str:
        return "once"

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        assert self.open
        return np.full((len(prompts), len(labels)), 0.5, dtype=np.float32)


def look_ups(repeats: int = 5) -> dict[str, Any]:
    passage = "The exhibition opened in the spring and was visited by people from all over the country. " * 8
    prompts = [[{"role": "user", "content": f"{passage} When did exhibition {i} open?"}] for i in range(STORED)]
    batches = [prompts[i : i + 1000] for i in range(0, STORED, 1000)]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for batch in batches:
            Cached(Once(True), folder).choose(batch, ("Yes", "No"))
        stored = STORED / (time.perf_counter() - started)
        rates = []
        for _ in range(repeats):
            close_stores()
            started = time.perf_counter()
            for batch in batches:
                Cached(Once(False), folder).choose(batch, ("Yes", "No"))
            rates.append(STORED / (time.perf_counter() - started))
        close_stores()
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    return {
        "answers": STORED, "looked up a second": round(statistics.median(rates)),
        "least and most": [round(min(rates)), round(max(rates))], "stored a second": round(stored),
        "bytes an answer": round(size / STORED),
    }  # fmt: skip


def cost(model: str, rows: int, pairs: int) -> dict[str, Any]:
    from clear_datasets.engines.vllm import VLLM
    from clear_datasets.engines.vllm_process import load

    report = Dataset.from_json(str(DATA / "squad.jsonl")).filter(lambda r: r["half"] == "report")
    batch = noise.other_answer(report, fraction=0.5, seed=1)[:rows]
    seconds: list[dict[str, float]] = []
    with VLLM(model, dtype="float32") as engine, tempfile.TemporaryDirectory() as folder:
        llm = load(engine).llm
        Clear(engine=engine, cache=False).score(batch)  # warms up
        for number in range(pairs):
            caches: dict[str, Any] = {"with": f"{folder}/{number}", "without": False}
            seconds.append({})
            for name in list(caches)[:: 1 if number % 2 else -1]:
                llm.reset_prefix_cache()
                started = time.perf_counter()
                Clear(engine=engine, cache=caches[name]).score(batch)
                seconds[-1][name] = round(time.perf_counter() - started, 2)
            print(json.dumps(seconds[-1]), flush=True)
        close_stores()
    ratios = sorted(s["with"] / s["without"] for s in seconds)
    return {
        "rows": rows, "seconds": seconds, "time with the cache over time without": {
            "median": round(statistics.median(ratios), 3), "least": round(ratios[0], 3), "most": round(ratios[-1], 3)
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="0.5b or 1.5b (scripts/get_model.py), or any other; without one, look-ups only")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"look-ups": look_ups()}
    print(json.dumps(found, indent=1), flush=True)
    if args.model:
        model = str(fetch(args.model)) if args.model in MODELS else args.model
        found |= {"model": Path(model).name.removesuffix(".gguf"), "score on vLLM": cost(model, args.rows, args.pairs)}
    found |= this_run()
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    ratio = found["score on vLLM"]["time with the cache over time without"]["median"] if args.model else 1
    if ratio > 1.03 or found["look-ups"]["looked up a second"] < 20_000:
        sys.exit("expected at most 1.03 times the time, and 20,000 look-ups a second")


if __name__ == "__main__":
    main()
