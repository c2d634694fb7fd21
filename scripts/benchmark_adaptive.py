"""What adaptive sampling saves at the median cut, and what each sample is worth.

    python scripts/benchmark_adaptive.py --model 0.5b --out docs/benchmarks/adaptive.json

One full run with k = 8 fills a cache of answers. From it alone come the runs with k = 1, 2, 3, 5 and 8 and the adaptive
one, whose samples are the first of those of the full run; tokens are counted as they are asked for. Tasks and rows are
those of benchmark_auroc.py; solutions of GSM8K are sampled and compared as `BSDetector.math` does. It fails where a
decision or the threshold differs. A cache that is kept (`--cache`) lets a run that was ended go on. Solutions are many
tokens, of which vLLM writes more at a time (`--engine vllm`, also its CPU build).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from benchmark_auroc import DATA, TASKS, measure
from datasets import Dataset
from get_model import MODELS, fetch
from this_run import this_run

from clear_datasets import BSDetector, Clear, above, score_to_keep, threshold
from clear_datasets.engines.cache import Cached, close_stores
from clear_datasets.engines.chats import Chats, tokenizer_of
from clear_datasets.engines.checkpoint import source_of
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from clear_datasets.estimate import Metered
from clear_datasets.steps import SCORES_REVISION

SAMPLES = (1, 2, 3, 5, 8)


class Replayed(Metered):
    """The answers of the full run, as an engine that counts the tokens of what it is asked for.

    Beginnings that prompts share count in each of them; a prompt that is asked again for more samples, too.
    """

    identity = "replayed"


def evaluate(task: str, args: argparse.Namespace, full: Cached, chats: Chats, folder: str) -> dict[str, Any]:
    rows = Dataset.from_json(str(DATA / f"{task.partition('_')[0]}.jsonl"))
    rows = rows.filter(lambda r: r["half"] == args.half)
    rows = TASKS[task](rows.select(range(min(args.rows or len(rows), len(rows)))))
    good = [not noise for noise in rows["noise"]]
    detector = BSDetector.math(k=max(SAMPLES)) if task == "gsm8k" else BSDetector(k=max(SAMPLES))
    Clear(engine=full.engine, cache=full.folder, confidence=detector).score(rows[:])

    def run(name: str, estimator: BSDetector, adaptive: bool = False) -> tuple[Dataset, dict[str, Any]]:
        engine = Replayed(full, chats)
        clear = Clear(engine=engine, cache=f"{folder}/{task}-{name}", confidence=estimator)
        how: dict[str, Any] = {"keep_in_memory": True, "load_from_cache_file": False, "new_fingerprint": name}
        scored = score_to_keep(rows, clear, **how) if adaptive else rows.map(clear.score, batched=True, **how)
        tokens = {"prompt": engine.tokens[0], "sampled": engine.tokens[1]}
        return scored, {"tokens": tokens, **measure(scored["clear_confidence"], good)}

    found = dict(runs(run, detector))
    every, fewer = found[f"k = {max(SAMPLES)}"], found["adaptive"]
    gammas = [threshold(scored) for scored, _ in (every, fewer)]
    decisions = [above(gamma)(scored[:]) for gamma, (scored, _) in zip(gammas, (every, fewer), strict=True)]
    saved = {kind: 1 - fewer[1]["tokens"][kind] / max(every[1]["tokens"][kind], 1) for kind in ("prompt", "sampled")}
    return {
        "task": task, "half": args.half, "rows": len(rows), "wrong": len(rows) - sum(good),
        "scores_revision": SCORES_REVISION, **this_run(),
        "threshold is that of all samples": gammas[0] == gammas[1],
        "equal decisions": sum(a == b for a, b in zip(*decisions, strict=True)),
        "share of tokens saved": {kind: round(share, 3) for kind, share in saved.items()},
        "runs": {name: told for name, (_, told) in found.items()},
    }  # fmt: skip


def runs(run: Any, detector: BSDetector) -> Iterator[tuple[str, Any]]:
    for k in SAMPLES:
        yield f"k = {k}", run(str(k), replace(detector, k=k))
    yield "adaptive", run("adaptive", detector, adaptive=True)


def table(result: dict[str, Any]) -> str:
    """For the docs: sampled tokens a row and AUROC by the number of samples, and what adaptive sampling saves."""
    names = [*(f"k = {k}" for k in SAMPLES), "adaptive"]
    lines = [f"| rows | {' | '.join(names)} | sampled tokens saved | prompt tokens saved | equal decisions |"]
    lines.append("|" + "---|" * (len(names) + 4))
    for task in result["tasks"]:
        cells = []
        for name in names:
            run = task["runs"][name]
            auroc = f", {run['auroc'][0]:.3f}" if name != "adaptive" else ""
            cells.append(f"{run['tokens']['sampled'] / task['rows']:.1f}{auroc}")
        saved = [f"{100 * task['share of tokens saved'][kind]:.0f}%" for kind in ("sampled", "prompt")]
        equal = f"{task['equal decisions']} of {task['rows']}"
        lines.append(f"| {task['task']}, {task['rows']} | {' | '.join([*cells, *saved, equal])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--task", choices=TASKS, nargs="+", default=["squad_wrong_sentence", "gsm8k", "arc"])
    parser.add_argument("--rows", type=int, help="the first N rows only")
    parser.add_argument("--half", choices=["choose", "report"], default="report")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--cache", help="folder that keeps the answers of the full run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    result: dict[str, Any] = {"model": Path(model).name.removesuffix(".gguf"), "tasks": []}
    if args.out and args.out.exists():  # tasks of earlier runs stay
        result["tasks"] = [t for t in json.loads(args.out.read_text())["tasks"] if t["task"] not in args.task]
    with tempfile.TemporaryDirectory() as folder:
        engine = VLLM(model, dtype="float32") if args.engine == "vllm" else Transformers(model)
        chats = Chats.of(tokenizer_of(source_of(model)), sys.maxsize, None)
        full = Cached(engine, args.cache or f"{folder}/full")
        for task in args.task:
            result["tasks"].append(evaluate(task, args, full, chats, folder))
            print(json.dumps(result["tasks"][-1], indent=1), flush=True)
            if args.out:  # at once: a run that is ended keeps what it has
                args.out.write_text(json.dumps(result, indent=1) + "\n")
        close_stores()
    if any(t["equal decisions"] < t["rows"] or not t["threshold is that of all samples"] for t in result["tasks"]):
        sys.exit("expected the threshold and the decisions of all samples")


if __name__ == "__main__":
    main()
