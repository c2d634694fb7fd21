"""Time and money of 10^5 to 10^9 rows on 1 to 1,000 GPUs, with failures: a simulation, and what it is checked against.

    python scripts/simulate_scale.py --check --out docs/benchmarks/scale.json
    python scripts/simulate_scale.py --seconds-per-row 0.02 --loading 60 --price 2.5

A replica loads the model, takes a batch at a time, and now and then dies: its batch goes back, what it had asked of it
is asked again (but for `--kept` of it, which is in the cache of its machine), and it loads anew. The caller writes the
batches one by one. With `--check`, real runs of `clear_datasets.distributed.score` on a local Ray cluster, whose engine
waits for a fixed time a row, with 1 to 4 workers: the cost of a batch is taken from the run with one, the time to start
from each (they share the cores of one machine). It fails where the simulation is off by a tenth, or a replica adds less
than 0.9 of one.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simpy
from this_run import this_run

ROWS, DELAY, BATCH = 7_200, 0.05, 40  # of the real runs
SIZES, GPUS = (10**5, 10**6, 10**7, 10**8, 10**9), (1, 8, 64, 1000)


@dataclass(frozen=True)
class Costs:
    """Seconds, and dollars an hour."""

    row: float
    loading: float
    batch: float = 0.0  # of a replica, beside its rows
    writing: float = 0.01  # of the caller, a batch
    failing: float = math.inf  # mean time between the failures of a replica
    back: float = 60.0  # until a replica that died starts anew
    kept: float = 0.5  # share of a lost batch whose answers are known
    price: float = 0.0


def simulate(rows: int, replicas: int, batch: int, costs: Costs, seed: int = 0) -> dict[str, float]:
    """Hours, dollars and failures of a run."""
    environment, chance = simpy.Environment(), random.Random(seed)
    left = [min(batch, rows - start) for start in range(0, rows, batch)]
    caller, state = simpy.Resource(environment), {"failures": 0, "busy": 0.0, "done": 0}
    everything = environment.event()

    def replica() -> Iterator[Any]:
        yield environment.timeout(costs.loading)
        life = chance.expovariate(1 / costs.failing) if math.isfinite(costs.failing) else math.inf
        while left:
            size = left.pop()
            needs = size * costs.row + costs.batch
            if needs > life:
                yield environment.timeout(life)
                state["failures"] += 1
                state["busy"] += life
                left.append(max(1, round(size - costs.kept * size * life / needs)))
                yield environment.timeout(costs.back + costs.loading)
                life = chance.expovariate(1 / costs.failing)
                continue
            life -= needs
            yield environment.timeout(needs)
            state["busy"] += needs
            environment.process(written())

    def written() -> Iterator[Any]:
        with caller.request() as turn:
            yield turn
            yield environment.timeout(costs.writing)
        state["done"] += 1
        if state["done"] == batches:
            everything.succeed()

    batches = len(left)
    for _ in range(replicas):
        environment.process(replica())
    environment.run(everything)
    hours = environment.now / 3600
    found = {"hours": hours, "dollars": hours * replicas * costs.price, "failures": state["failures"]}
    return found | {"busy": state["busy"] / environment.now / replicas}


def real_run(replicas: int) -> dict[str, float]:
    """Seconds of a real run, and of it until the first batch was there."""
    import datasets
    from benchmark_overhead import Constant, rows

    from clear_datasets import Clear, distributed

    @dataclass(frozen=True)
    class Waiting(Constant):
        """Takes a fixed time for each row."""

        def answer(self, asks: Any) -> Any:
            time.sleep(DELAY * len(asks.generate))
            return super().answer(asks)

    ds = datasets.Dataset.from_list(list(rows(ROWS)))
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        clear = Clear(engine=Waiting(), cache=False)
        distributed.score(ds, clear, replicas=replicas, batch_size=BATCH, folder=folder)
        seconds = time.time() - started
        first = min(file.stat().st_mtime for file in Path(folder).rglob("*.parquet")) - started
    return {"replicas": replicas, "seconds": round(seconds, 1), "until the first batch": round(first, 1)}


def check() -> dict[str, Any]:
    """Real runs with 1 to 4 workers, and what the simulation says of them."""
    import datasets
    import ray

    datasets.disable_progress_bars()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    real_run(4)  # so that no later run is the first to read the packages from the disk
    runs = [real_run(replicas) for replicas in (1, 2, 3, 4)]
    ray.shutdown()
    return compared(runs)


def compared(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Beside each run what the simulation says of it, by its own start and the costs of a batch with one worker."""
    batches, first = math.ceil(ROWS / BATCH), "until the first batch"
    overhead = (runs[0]["seconds"] - runs[0][first]) / (batches - 1) - BATCH * DELAY
    for run in runs:
        count = int(run["replicas"])
        loading = run[first] - BATCH * DELAY - overhead
        said = simulate(ROWS, count, BATCH, Costs(DELAY, loading, overhead))["hours"] * 3600
        run["simulated seconds"] = round(said, 1)
        run["simulated / real"] = round(said / run["seconds"], 3)
        run["speed-up per replica"] = round(runs[0]["seconds"] / run["seconds"] / count, 3)
        working = [r["seconds"] - r[first] + BATCH * DELAY for r in (runs[0], run)]
        run["without the start"] = round(working[0] / working[1] / count, 3)
    return {"rows": ROWS, "batch": BATCH, "seconds a row": DELAY, "seconds a batch beside its rows": round(overhead, 4),
            "runs": runs}  # fmt: skip


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Hours and dollars by rows and GPUs."""
    costs = Costs(args.seconds_per_row, args.loading, writing=args.writing, failing=args.failing * 3600,
                  kept=args.kept, price=args.price)  # fmt: skip
    found = []
    for rows in SIZES:
        for gpus in GPUS:
            batch = min(args.batch, max(1, math.ceil(rows / (4 * gpus))))
            result = simulate(rows, gpus, batch, costs)
            found.append({"rows": rows, "gpus": gpus, **{name: round(value, 2) for name, value in result.items()}})
            print(f"{rows:>13,} rows {gpus:>5,} GPUs {result['hours']:>12,.1f} h {result['dollars']:>14,.0f} $ "
                  f"{result['failures']:>7,} failures, busy {result['busy']:.2f}", flush=True)  # fmt: skip
    return found


def tables(result: dict[str, Any]) -> str:
    """For the docs: the runs that the simulation was checked against, and what it says."""
    lines = ["| workers | seconds | simulated | until the first batch | speed-up per worker | without the start |"]
    lines.append("|---|---|---|---|---|---|")
    for run in result["check"]["runs"]:
        said = f"{run['simulated seconds']} ({run['simulated / real']:.2f})"
        start, speed = run["until the first batch"], [run["speed-up per replica"], run["without the start"]]
        lines.append(f"| {run['replicas']} | {run['seconds']} | {said} | {start} | {speed[0]:.2f} | {speed[1]:.2f} |")
    lines += ["", f"| rows | {' | '.join(f'{gpus:,} replicas' for gpus in GPUS)} |", "|" + "---|" * (len(GPUS) + 1)]
    for rows in SIZES:
        found = [run for run in result["simulation"]["table"] if run["rows"] == rows]
        cells = [f"{run['hours']:,.1f} h, {run['failures']:,.0f} lost, {run['busy']:.2f}" for run in found]
        lines.append(f"| {rows:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds-per-row", type=float, help="of one replica, as clear-datasets estimate says")
    parser.add_argument("--loading", type=float, default=60, help="seconds until a replica has loaded its model")
    parser.add_argument("--writing", type=float, default=0.02, help="seconds of the caller for each batch")
    parser.add_argument("--failing", type=float, default=1000, help="hours between the failures of one replica")
    parser.add_argument("--kept", type=float, default=0.5, help="share of a lost batch that is in a cache")
    parser.add_argument("--batch", type=int, default=1000, help="rows of a batch at most")
    parser.add_argument("--price", type=float, default=2.5, help="dollars of a GPU for an hour")
    parser.add_argument("--check", action="store_true", help="run the real thing, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {}
    if args.check:
        import ray

        result["check"] = {**check(), **this_run(f"ray {ray.__version__}")}
        print(json.dumps(result["check"], indent=1), flush=True)
    if args.seconds_per_row:
        result["simulation"] = {
            **{k: v for k, v in vars(args).items() if k not in ("out", "check")},
            **this_run(),
            "table": table(args),
        }
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(known | result, indent=1) + "\n")
    for run in result.get("check", {}).get("runs", []):
        if abs(run["simulated / real"] - 1) > 0.1 or run["speed-up per replica"] < 0.9:
            sys.exit(f"expected a simulation within a tenth, and 0.9 of a replica for each: {run}")


if __name__ == "__main__":
    main()
