"""What the steps cost beside the model: rows/s and memory of ``ds.map(clear.score, batched=True)``, scripted engine.

    python scripts/benchmark_overhead.py --out docs/benchmarks/overhead.json

The engine answers at once from a constant, so that all time is this package's and `datasets`'. Each run is a process of
its own. Peak memory counts pages of the mapped Arrow file, which the system takes back at need; anonymous memory, read
at the end (Linux), does not. It fails below 5,000 rows/s (median), and where anonymous memory grows by a tenth.
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
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clear_datasets import Clear
from clear_datasets.engines import Engine, Messages


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


def run(size: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    ds = datasets.Dataset.from_generator(rows, gen_kwargs={"size": size})
    started = time.perf_counter()
    scored = ds.map(Clear(engine=Constant(), cache=False).score, batched=True, load_from_cache_file=False)
    seconds = time.perf_counter() - started
    assert not any(scored["clear_error"][:10])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = Path("/proc/self/status").read_text()
    anonymous = int(status.split("RssAnon:")[1].split()[0]) / 1024
    memory = {"peak_memory_mib": round(peak), "anonymous_memory_mib": round(anonymous)}
    print(json.dumps({"rows": size, "rows_per_second": round(size / seconds), **memory}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return run(args.one)
    results = []
    for size in [s for s in args.sizes for _ in range(args.repeats)]:
        command = [sys.executable, __file__, "--one", str(size)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(results[-1], flush=True)
    if args.out:
        entry = {
            "runs": results,
            "command": "python scripts/benchmark_overhead.py",
            "machine": f"{platform.machine()}, no GPU used, Python {platform.python_version()}",
            "date": datetime.date.today().isoformat(),
        }
        args.out.write_text(json.dumps(entry, indent=1) + "\n")
    speed = statistics.median(r["rows_per_second"] for r in results)
    memory = [r["anonymous_memory_mib"] for r in results]
    if speed < 5000 or max(memory) > 1.1 * min(memory):
        sys.exit(f"{speed:,.0f} rows/s and {min(memory)} to {max(memory)} MiB; expected 5,000 rows/s and flat memory")


if __name__ == "__main__":
    main()
