"""What the steps cost beside the model: rows/s and memory of ``ds.map(clear.score, batched=True)``, scripted engine.

    python scripts/benchmark_overhead.py --out docs/benchmarks/overhead.json

The engine answers at once from a constant, so that all time is this package's and `datasets`'. Each run is a process of
its own. Peak memory counts pages of the mapped Arrow file, which the system takes back at need; anonymous memory, read
at the end (Linux), does not. It fails below 5,000 rows/s (median), and where anonymous memory grows by a tenth.

With `--stream`, an IterableDataset goes through `score`, `threshold` (a first pass), `score` again and `decide`, to its
end; with `--gamma` that is the threshold, and there is one pass; with `--cache` all answers are stored.

    python scripts/benchmark_overhead.py --stream --gamma 0.48 --sizes 10000 1000000 --repeats 1 --out FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clear_datasets import Clear, decide, threshold
from clear_datasets.engines import Engine, Messages
from clear_datasets.engines.cache import COUNTS


@dataclass(frozen=True)
class Constant(Engine):
    def generate(
        self,
        prompts: Sequence[Messages],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int | Sequence[int] = 512,
    ) -> list[list[str]]:
        return [["in the year 1876", "1876", "about 1876", "in 1877", "1876."][:n]] * len(prompts)

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        return np.full((len(prompts), len(labels)), 1 / max(len(labels), 1), dtype=np.float32)

    def logprobs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[np.ndarray]:
        return [np.full(4, -1.0, dtype=np.float32)] * len(prompts)


def rows(size: int) -> Iterator[dict[str, str]]:
    passage = "The exhibition opened in the spring and was visited by people from all over the country. " * 8
    for i in range(size):
        yield {
            "context": f"{i}: {passage}",
            "question": f"When did exhibition {i} open?",
            "answer": f"in {1800 + i % 99}",
        }


def run(size: int, stream: bool, cache: bool, gamma: float | None) -> None:
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        clear = Clear(engine=Constant(), cache=folder if cache else False)
        started = time.perf_counter()
        found = streamed(size, clear, gamma) if stream else mapped(size, clear)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        status = Path("/proc/self/status").read_text()
        anonymous = int(status.split("RssAnon:")[1].split()[0]) / 1024
        memory = {"peak_memory_mib": round(peak), "anonymous_memory_mib": round(anonymous)}
        stored = sum(file.stat().st_size for file in Path(folder).iterdir())
        more = {"asked": COUNTS.asked, "known": COUNTS.known, "cache_mib": round(stored / 2**20)} if cache else {}
        print(json.dumps({"rows": size, "rows_per_second": round(size / seconds), **memory, **found, **more}))


def mapped(size: int, clear: Clear) -> dict[str, int]:
    import datasets

    ds = datasets.Dataset.from_generator(rows, gen_kwargs={"size": size})
    scored = ds.map(clear.score, batched=True, load_from_cache_file=False)
    assert not any(scored["clear_error"][:10])
    return {}


def streamed(size: int, clear: Clear, gamma: float | None) -> dict[str, int]:
    import datasets

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"size": size})
    scored = stream.map(clear.score, batched=True)
    gamma = threshold(scored) if gamma is None else gamma
    decided = scored.map(decide(gamma), batched=True)
    return {"kept": sum(row["clear_decision"] == "keep" for row in decided)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--stream", action="store_true", help="a stream, in two passes, in place of a dataset")
    parser.add_argument("--gamma", type=float, help="a fixed threshold: the stream is read once")
    parser.add_argument("--cache", action="store_true", help="store all answers")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run(args.one, args.stream, args.cache, args.gamma)
    chosen = [f"--{name}" for name in ("stream", "cache") if getattr(args, name)]
    chosen += [] if args.gamma is None else ["--gamma", str(args.gamma)]
    results = []
    for size in [s for s in args.sizes for _ in range(args.repeats)]:
        command = [sys.executable, __file__, "--one", str(size), *chosen]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(results[-1], flush=True)
    if args.out:
        entry = {
            "runs": results,
            "command": " ".join(["python scripts/benchmark_overhead.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, no GPU used, Python {platform.python_version()}",
            "date": datetime.date.today().isoformat(),
        }
        args.out.write_text(json.dumps(entry, indent=1) + "\n")
    speed = statistics.median(r["rows_per_second"] for r in results)
    memory = [r["anonymous_memory_mib"] for r in results]
    if (speed < 5000 and not chosen) or max(memory) > 1.1 * min(memory):
        sys.exit(f"{speed:,.0f} rows/s and {min(memory)} to {max(memory)} MiB; expected 5,000 rows/s and flat memory")


if __name__ == "__main__":
    main()
