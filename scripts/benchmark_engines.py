"""Rows/s of `score` on vLLM against the floor: the very same requests handed to plain `vllm.LLM.generate`.

    python scripts/benchmark_engines.py --model 0.5b --out docs/benchmarks/engines.json

Both run in one process, in turn, with an empty prefix cache. Tokens are vLLM's own counters. `trie` counts what all
requests of the batch have in common once: no engine can read less. On a GPU nvidia-smi is asked for its utilisation,
twice a second.

With `--others`, rows/s of the same rows on each engine, in turn: vLLM, Transformers, and OpenAI on a server of the
same model on loopback. With `--agree`, the rows are scored by vLLM and Transformers: how far labels' probabilities are
apart, and the AUROC of either.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from get_model import MODELS, fetch
from this_run import this_run

from clear_datasets import Clear, noise, prompts
from clear_datasets.engines.checkpoint import source_of
from clear_datasets.engines.openai import OpenAI
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from clear_datasets.engines.vllm_process import load
from clear_datasets.infer_format import infer_rows
from clear_datasets.steps import SCORES_REVISION

DATA = Path(__file__).parent / "data"


def counters(llm: Any) -> dict[str, float]:
    names = ("prefix_cache_queries", "prefix_cache_hits", "prompt_tokens", "generation_tokens")
    found = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    return {name: float(found.get(f"vllm:{name}") or 0) for name in names}


def trie(requests: list[list[int]]) -> int:
    """Tokens of all prompts, with what several begin with counted once."""
    total, last = 0, []
    for ids in sorted(requests):
        common = next((i for i, (a, b) in enumerate(zip(ids, last, strict=False)) if a != b), min(len(ids), len(last)))
        total, last = total + len(ids) - common, ids
    return total


SMI = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=500"]


def timed(llm: Any, job: Any) -> dict[str, float]:
    llm.reset_prefix_cache()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = SMI + ([f"--id={visible}"] if visible else [])
    smi = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if shutil.which(SMI[0]) else None
    before, started = counters(llm), time.perf_counter()
    job()
    found = {"seconds": round(time.perf_counter() - started, 2)}
    found |= {name: value - before[name] for name, value in counters(llm).items()}
    if smi is not None:
        smi.terminate()
        busy = [float(line) for line in smi.communicate()[0].split()]
        found["gpu_utilisation"] = round(statistics.mean(busy) / 100, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--agree", action="store_true", help="compare with Transformers instead")
    what.add_argument("--others", action="store_true", help="time every engine instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    rows = Dataset.from_json(str(DATA / "squad.jsonl")).filter(lambda r: r["half"] == "report")
    batch = noise.other_answer(rows, fraction=0.5, seed=1)[: args.rows]
    if args.others:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; three engines share the memory
    with VLLM(model, dtype=args.dtype, disable_log_stats=False) as engine:
        if args.others:
            found = others(engine, batch, args.pairs)
        else:
            found = agree(engine, batch) if args.agree else compare(engine, batch, args.pairs)
    print(json.dumps(found, indent=1))
    import vllm

    entry = {
        "model": Path(model).name.removesuffix(".gguf"),
        "compared": "vLLM with Transformers"
        if args.agree
        else "score on every engine"
        if args.others
        else "score on vLLM with the floor",
        "rows": len(batch["noise"]),
        "scores_revision": SCORES_REVISION,
        **this_run(f"vllm {vllm.__version__}"),
        **found,
    }
    if args.out:
        old = json.loads(args.out.read_text()) if args.out.exists() else []
        same = ("model", "compared", "rows", "machine")
        args.out.write_text(
            json.dumps([*(e for e in old if any(e[k] != entry[k] for k in same)), entry], indent=1) + "\n"
        )


def agree(engine: VLLM, batch: dict[str, list[Any]], resamples: int = 2000) -> dict[str, Any]:
    """Labels' probabilities and AUROC on both engines; the rows of a resample are the same for both."""
    plain = Transformers(engine.model, engine.revision, dtype=dict(engine.options)["dtype"])
    read = infer_rows(batch).read
    examples = [read({name: column[i] for name, column in batch.items()}) for i in range(len(batch["noise"]))]
    asked = [p for e in examples for p in prompts.reflect(e.prompt, e.response)]
    labels = [each.choose(asked, prompts.LABELS) for each in (engine, plain)]
    values = [
        np.asarray(Clear(engine=e, cache=False).score(batch)["clear_confidence"], dtype=float) for e in (engine, plain)
    ]
    good = np.array([not n for n in batch["noise"]])
    random = np.random.default_rng(0)
    draws = [random.integers(0, len(good), len(good)) for _ in range(resamples)]
    apart = [noise.auroc(values[0][d], good[d]) - noise.auroc(values[1][d], good[d]) for d in draws]
    return {
        "label_prompts": len(asked),
        "most_that_a_label_differs": round(float(np.nanmax(np.abs(labels[0] - labels[1]))), 4),
        "auroc": {
            "vllm": round(noise.auroc(values[0], good), 3),
            "transformers": round(noise.auroc(values[1], good), 3),
        },
        "auroc_difference": [round(float(x), 3) for x in np.percentile(apart, [2.5, 50, 97.5])],
    }


def median(results: list[dict[str, dict[str, float]]], name: str, which: str = "score") -> float:
    return statistics.median(r[which][name] for r in results)


def compare(engine: VLLM, batch: dict[str, list[Any]], pairs: int) -> dict[str, Any]:
    clear, loaded = Clear(engine=engine, cache=False), load(engine)
    sent: list[tuple[Any, Any]] = []
    run = loaded.run

    def recorded(requests: Any, config: VLLM) -> Any:
        every = list(requests)
        sent.extend(every)
        return run(iter(every), config)

    loaded.run = recorded  # type: ignore[method-assign]
    clear.score(batch)  # also warms up
    loaded.run = run  # type: ignore[method-assign]
    asked, settings = [{"prompt_token_ids": r.ids} for r, _ in sent], [s for _, s in sent]
    size = len(next(iter(batch.values())))
    results = []
    for number in range(pairs):
        both = {
            "score": lambda: clear.score(batch),
            "floor": lambda: loaded.llm.generate(asked, settings, use_tqdm=False),
        }
        order = list(both) if number % 2 else list(both)[::-1]
        results.append({name: timed(loaded.llm, both[name]) for name in order})
        print(json.dumps(results[-1]), flush=True)
    ratios = sorted(r["score"]["seconds"] / r["floor"]["seconds"] for r in results)
    least = trie([r.ids for r, _ in sent])
    once = sum(len(ids) for ids in {tuple(r.ids) for r, _ in sent})
    seconds = median(results, "seconds")
    hits, prompts_read = median(results, "prefix_cache_hits"), median(results, "prompt_tokens")
    return {
        "rows_per_second": round(size / seconds, 3),
        "floor_rows_per_second": round(size / median(results, "seconds", "floor"), 3),
        "generated_tokens_per_second": round(median(results, "generation_tokens") / seconds, 1),
        "gpu_utilisation": median(results, "gpu_utilisation") if "gpu_utilisation" in results[0]["score"] else None,
        "time_over_floor": {
            "median": round(statistics.median(ratios), 3), "least": round(ratios[0], 3), "most": round(ratios[-1], 3)
        },
        "tokens_per_row": {
            "each distinct prompt once": round(once / size, 1),
            "trie": round(least / size, 1),
            "prefilled": round((prompts_read - hits) / size, 1),  # some requests do not look into the cache
            "generated": round(median(results, "generation_tokens") / size, 1),
        },
        "prefix_cache_hit_rate": round(hits / prompts_read, 3),
        "pairs": results,
    }  # fmt: skip


def others(engine: VLLM, batch: dict[str, list[Any]], rounds: int) -> dict[str, Any]:
    """Rows/s on each engine; each scores the first rows once before, to load."""
    with serving(engine) as url:
        every: dict[str, Any] = {
            "vllm": engine,
            "transformers": Transformers(engine.model, engine.revision, dtype=dict(engine.options)["dtype"]),
            "openai": OpenAI("served", url),
        }
        for each in every.values():
            Clear(engine=each, cache=False).score({name: column[:2] for name, column in batch.items()})
        results: list[dict[str, float]] = []
        for number in range(rounds):
            results.append({})
            for name in list(every)[:: 1 if number % 2 else -1]:
                load(engine).llm.reset_prefix_cache()
                root = url.removesuffix("/v1")
                urllib.request.urlopen(urllib.request.Request(f"{root}/reset_prefix_cache", method="POST"))
                started = time.perf_counter()
                Clear(engine=every[name], cache=False).score(batch)
                results[-1][name] = round(time.perf_counter() - started, 2)
            print(json.dumps(results[-1]), flush=True)
    size = len(batch["noise"])
    rates = {name: sorted(size / r[name] for r in results) for name in every}
    return {
        "rows_per_second": {name: round(statistics.median(found), 3) for name, found in rates.items()},
        "least_and_most": {name: [round(found[0], 3), round(found[-1], 3)] for name, found in rates.items()},
        "seconds": results,
    }


@contextlib.contextmanager
def serving(engine: VLLM) -> Iterator[str]:
    """A vLLM server of the engine's model on loopback; its address."""
    port = 8211
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        source_of(engine.model),
    ]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "served", "--block-size", "32"]
    command += ["--generation-config", "vllm", "--enforce-eager", "--dtype", dict(engine.options)["dtype"]]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    own = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    with subprocess.Popen(command, env={**os.environ, **own}, stdout=sys.stderr) as process:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            time.sleep(1)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
