"""Kill a real ``ds.map(clear.score, batched=True)`` at random moments, run it again, and count what was lost.

    python scripts/fault_test.py --kills 20
    python scripts/fault_test.py --kills 20 --num-proc 2
    python scripts/fault_test.py --kills 20 --model 0.5b --rows 40
    python scripts/fault_test.py --kills 5 --engine vllm          # kills vLLM's own process

Each kill is SIGKILL to the process and all its workers (with ``--engine vllm``: to vLLM's engine process), at a random
moment of its work, and now and then while it loads. Then the same command runs again; a run that comes to its end
before all kills are done begins anew with an empty cache. At the end the columns must be those of an undisturbed run.
Each request is noted in a file when the model gets it, so that those that it got twice are known. It fails where a row
is lost or changed, or where more requests were asked twice than one window for each kill and process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from this_run import this_run

ROOT = Path(__file__).parent.parent
WINDOW = {"transformers": 256, "vllm": 1024}  # requests that are under way, or whose answers are not written yet
COLUMNS = ("clear_confidence", "clear_consistency", "clear_reflection")
STARTING = 300  # seconds that a process may take until its first request


def child(args: argparse.Namespace) -> None:
    """The command that is killed."""
    import datasets
    from datasets import Dataset

    from clear_datasets import BSDetector, Clear

    datasets.disable_progress_bars()
    ds = Dataset.from_json(str(args.folder / "rows.jsonl"), cache_dir=str(args.cache / "datasets"))
    engine = noting(args)
    estimator = BSDetector(k=3, max_tokens=24) if args.model == "tiny" else BSDetector()
    clear = Clear(engine=engine, confidence=estimator, cache=args.cache)
    workers = args.num_proc if args.num_proc > 1 else None
    scored = ds.map(clear.score, batched=True, batch_size=args.batch_size, num_proc=workers)
    scored.to_parquet(args.cache / "scored.parquet")


def noting(args: argparse.Namespace) -> Any:
    """The engine, which notes each request when the model gets it."""
    file = os.open(args.cache / "requests.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(requests: Any) -> None:
        os.write(file, "".join(f"{r.kind} {hash((*r.ids, r.tail))}\n" for r in requests).encode())

    if args.engine == "vllm":
        from clear_datasets.engines import vllm

        settings = vllm._Settings.of

        def of(self: Any, request: Any, cached: bool = True) -> Any:
            note([request] if cached else [])  # what is read anew for its log-probabilities is the same request
            return settings(self, request, cached)

        vllm._Settings.of = of  # type: ignore[method-assign]
        return vllm.VLLM(args.path, dtype="float32")
    from clear_datasets.engines.transformers import Transformers

    window = Transformers._window

    def noted(self: Any, runs: Any, *more: Any) -> Any:
        note([request for run in runs for request in run.requests])
        return window(self, runs, *more)

    Transformers._window = noted  # type: ignore[method-assign]
    return Transformers(args.path, dtype="float32")


class Forked(multiprocessing.get_context("fork").Process):  # type: ignore[misc]
    """The command in a process that begins where all is imported, which takes longer than the rest of a life."""

    def __init__(self, args: argparse.Namespace, log: int) -> None:
        super().__init__(target=self._live, args=(args, log))
        self.start()
        with suppress(OSError):  # it ended already
            os.setpgid(self.pid, self.pid)  # here, too: it is killed with its workers, be it ever so early

    @staticmethod
    def _live(args: argparse.Namespace, log: int) -> None:
        os.setpgid(0, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        child(args)

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode


class Life:
    """One process that runs the command."""

    def __init__(self, args: argparse.Namespace, cache: Path) -> None:
        self.cache, self.engine, self.after = cache, args.engine, args.after
        cache.mkdir(exist_ok=True)
        self.log = (cache / "output.log").open("ab")
        self.before = self.requests()
        self.started = time.monotonic()
        if args.engine == "transformers":
            self.process: Any = Forked(argparse.Namespace(**{**vars(args), "cache": cache}), self.log.fileno())
            return
        command = [sys.executable, __file__, "--child", "--cache", cache, "--folder", args.folder, "--path", args.path]
        for name in ("model", "engine", "num_proc", "batch_size"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )

    def requests(self) -> int:
        file = self.cache / "requests.log"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def working(self) -> bool:
        """Wait for its first requests; False where it came to its end without as many."""
        while self.requests() < self.before + self.after:
            if self.process.poll() is not None:
                return False
            if time.monotonic() - self.started > STARTING:
                raise SystemExit(f"no {self.after} requests within {STARTING} s; see {self.cache}/output.log")
            time.sleep(0.02)
        return True

    def kill(self) -> None:
        import psutil

        if self.engine == "vllm":
            children = psutil.Process(self.process.pid).children(recursive=True)
            for one in [c for c in children if "EngineCore" in c.name() or "EngineCore" in " ".join(c.cmdline())]:
                one.kill()
            self.process.wait(timeout=STARTING)  # it says that the engine ended
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process.wait():
            text = (self.cache / "output.log").read_text()
            raise SystemExit(f"the command failed with {self.process.returncode}:\n{text[-3000:]}")


def rows(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    if args.model == "tiny":
        for i in range(args.rows):
            yield {"question": f"Which number comes after {i}?", "answer": f"It is {i + 1}."}
        return
    for line in (ROOT / "scripts" / "data" / "squad.jsonl").read_text().splitlines()[: args.rows]:
        row = json.loads(line)
        yield {name: row[name] for name in ("context", "question", "answer")}


def scores(cache: Path) -> dict[str, Any]:
    from datasets import Dataset

    return dict(Dataset.from_parquet(str(cache / "scored.parquet"), cache_dir=str(cache / "read"))[:])


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Rows that are lost, or whose columns are others than those of the undisturbed run."""
    lost = [row for row in wanted["question"] if row not in set(found["question"])]
    apart = np.zeros(len(wanted["question"]))
    for name in COLUMNS if not lost else ():
        a, b = (np.asarray(x[name], dtype=float) for x in (found, wanted))
        apart = np.maximum(apart, np.where(np.isnan(a) & np.isnan(b), 0, np.nan_to_num(np.abs(a - b), nan=1)))
    same = found["clear_error"] == wanted["clear_error"] and found["question"] == wanted["question"]
    return {"rows lost": len(lost), "order and errors alike": same, "most that a score differs": float(apart.max()),
            "rows that differ by more than .00001": int((apart > 1e-5).sum())}  # fmt: skip


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| killed | model | rows | kills | requests of an undisturbed run | asked twice | of them for each kill | "
             "rows lost | rows changed |", "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for e in entries:
        vllm = e["engine"] == "vllm"
        what = "vLLM's own process" if vllm else "the process" if e["processes"] == 1 else "both worker processes"
        changed = "drawn anew in each run" if vllm else e["rows that differ by more than .00001"]
        cells = (what, e["model"], e["rows"], e["kills"], e["requests of an undisturbed run"], e["asked twice"],
                 e["asked twice for each kill"], e["rows lost"], changed)  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--model", default="tiny", choices=["tiny", "0.5b"])
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--rows", type=int, default=0, help="default: 400 with the tiny model, 40 with 0.5b")
    parser.add_argument("--num-proc", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=0, help="rows that map hands over (default: a quarter)")
    parser.add_argument("--after", type=int, default=1, help="requests of a life before it is killed at work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    for name in ("child", "cache", "folder", "path"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **(
            {"action": "store_true"} if name == "child" else {"type": str if name == "path" else Path}
        ))  # fmt: skip
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.child:
        return child(args)
    args.rows = args.rows or (400 if args.model == "tiny" else 40)
    args.batch_size = args.batch_size or max(1, args.rows // 4)
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        found = run(args)
    print(json.dumps(found, indent=1))
    if args.out:
        old = json.loads(args.out.read_text()) if args.out.exists() else []
        same = ("model", "engine", "processes")
        kept = [e for e in old if any(e[k] != found[k] for k in same)]
        args.out.write_text(json.dumps([*kept, {**found, **this_run()}], indent=1) + "\n")
    exact = args.engine == "transformers"  # vLLM draws other samples in each run
    if found["rows lost"] or not found["order and errors alike"] or found["asked twice"] > found["at most"] or (
        exact and found["rows that differ by more than .00001"]
    ):  # fmt: skip
        sys.exit("rows were lost or changed, or more was asked twice than one window for each kill and process")


def run(args: argparse.Namespace) -> dict[str, Any]:
    args.path = model(args)
    (args.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(args)))
    undisturbed = Life(args, args.folder / "undisturbed")
    undisturbed.working()
    loading, started = time.monotonic() - undisturbed.started, time.monotonic()
    undisturbed.end()
    working = time.monotonic() - started
    wanted, chance = scores(undisturbed.cache), random.Random(args.seed)
    kills, cycle, twice, each = 0, 0, 0, list[dict[str, Any]]()
    while True:
        cache = args.folder / f"cycle{cycle}"
        life = Life(args, cache)
        if kills < args.kills and chance.random() < 0.15:  # while it loads
            time.sleep(chance.uniform(0.1, loading))
        elif life.working() and kills < args.kills:
            time.sleep(chance.uniform(0, working * min(1, 3 / args.kills)))
        if kills < args.kills and life.process.poll() is None:
            life.kill()
            kills += 1
            print(f"kill {kills}: {life.requests() - life.before} requests in this life", file=sys.stderr, flush=True)
            continue
        life.end()
        asked = Counter((cache / "requests.log").read_text().splitlines())
        twice += sum(count - 1 for count in asked.values())
        each.append(differences(scores(cache), wanted))
        cycle += 1
        if kills >= args.kills:
            break
    size, most = undisturbed.requests(), WINDOW[args.engine] * args.num_proc * kills
    return {
        "model": args.model, "engine": args.engine, "processes": args.num_proc, "rows": args.rows, "kills": kills,
        "runs to the end": cycle, "requests of an undisturbed run": size, "asked twice": twice, "at most": most,
        "asked twice for each kill": round(twice / kills, 1),
        **{name: all(e[name] for e in each) if isinstance(each[0][name], bool) else max(e[name] for e in each)
           for name in each[0]},
    }  # fmt: skip


def model(args: argparse.Namespace) -> str:
    sys.path.insert(0, str(ROOT))
    if args.model == "tiny":
        from tests.conftest import make_tiny

        return str(make_tiny(args.folder / "tiny", ends=2))
    from get_model import fetch

    from clear_datasets.engines.checkpoint import source_of

    return source_of(str(fetch(args.model)))


if __name__ == "__main__":
    main()
