"""How well confidence, its parts and plain baselines tell right from wrong targets.

    python scripts/benchmark_auroc.py --model 0.5b --task squad_other_answer --out docs/benchmarks/auroc.json

Rows come from scripts/data (its README names sources and licences), from the half that the defaults were not chosen
on. Answers that two estimators or tasks share are asked once; rows/s are measured before anything is shared, so they
stand with the first task, for the default, math, and the first reasoned estimator. The output file has an entry for
each model, task, half and number of rows; a run replaces the scores that it makes, and adds a line on itself to `runs`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from get_model import MODELS, fetch
from this_run import this_run

from clear_datasets import LLM, BSDetector, Clear, Embedding, Jaccard, infer, noise
from clear_datasets.engines import Answers, Asks, Engine, Queued
from clear_datasets.engines.checkpoint import load
from clear_datasets.engines.transformers import Transformers
from clear_datasets.estimate import Metered
from clear_datasets.noise import auroc
from clear_datasets.steps import SCORES_REVISION

DATA = Path(__file__).parent / "data"
ALPACA = {"question": "instruction", "context": "input", "answer": "output"}
TASKS = {
    "squad_other_answer": lambda ds: noise.other_answer(ds, fraction=0.5, seed=1),
    "squad_wrong_sentence": lambda ds: noise.wrong_sentence(ds, fraction=0.5, seed=1),
    "squad_other_answer_passage_last": lambda ds: noise.other_answer(ds, fraction=0.5, seed=1).rename_columns(ALPACA),
    "squad_wrong_sentence_passage_last": lambda ds: noise.wrong_sentence(ds, 0.5, seed=1).rename_columns(ALPACA),
    "gsm8k": lambda ds: ds,
    "arc": lambda ds: ds,
}


class Recorder(Queued):
    """An engine that remembers its answers and counts the tokens of those that it has to ask for."""

    def __init__(self, engine: Transformers) -> None:
        self.engine, self.known = Metered(engine, load(engine).chats), {}

    def answer(self, asks: Asks) -> Answers:
        limits = asks.limits
        keys = {
            "generate": [repr((p, asks.n, asks.temperature, m)) for p, m in zip(asks.generate, limits, strict=True)],
            "choose": [repr((p, tuple(asks.labels))) for p in asks.choose],
            "read": [repr(pair) for pair in asks.read],
        }
        new = {kind: [i for i, key in enumerate(of) if key not in self.known] for kind, of in keys.items()}
        rest = replace(asks, **{kind: [getattr(asks, kind)[i] for i in new[kind]] for kind in keys})
        rest = replace(rest, max_tokens=[limits[i] for i in new["generate"]])
        answers = self.engine.answer(rest)
        for kind, found in (("generate", answers.generated), ("choose", answers.chosen), ("read", answers.read)):
            self.known.update(zip([keys[kind][i] for i in new[kind]], found, strict=True))
        every = {kind: [self.known[key] for key in of] for kind, of in keys.items()}
        chosen = np.array(every["choose"], dtype=np.float32).reshape(len(asks.choose), len(asks.labels))
        return Answers(every["generate"], chosen, every["read"])


def token_logprob(rows: Dataset, engine: Engine) -> list[float]:
    """Mean log-probability of the target's tokens, given the prompt."""
    examples = [infer(rows.features).read(row) for row in rows]
    return [float(x[:-1].mean()) for x in engine.logprobs([e.prompt for e in examples], [e.response for e in examples])]


def measure(scores: Sequence[float], good: Sequence[bool], resamples: int = 2000) -> dict[str, object]:
    """AUROC and area under precision-recall (the wrong rows are what is looked for), with 95% bootstrap intervals."""
    values, kinds = np.asarray(scores, dtype=float), np.asarray(good)
    random = np.random.default_rng(0)
    draws = [random.integers(0, len(values), len(values)) for _ in range(resamples)]
    result: dict[str, object] = {"unscored": int(np.isnan(values).sum())}
    for name, area in (("auroc", auroc), ("auprc", auprc)):
        if np.isnan(area(values, kinds)):
            continue
        spread = [area(values[d], kinds[d]) for d in draws]
        low, high = np.nanpercentile(spread, [2.5, 97.5])
        result[name] = [round(float(x), 3) for x in (area(values, kinds), low, high)]
    return result


def auprc(scores: np.ndarray, good: np.ndarray) -> float:
    """Average precision of finding the wrong rows from the lowest score up; tied rows count as one step."""
    known = ~np.isnan(scores)
    values, wrong = scores[known], ~good[known]
    if not wrong.any():
        return float("nan")
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) > 0, True)  # the last row of each tie
    found, seen = np.cumsum(wrong[order])[last], np.arange(1, len(values) + 1)[last]
    return float(np.sum(np.diff(found, prepend=0) / wrong.sum() * found / seen))


def estimators(args: argparse.Namespace) -> dict[str, BSDetector]:
    similarities = {"jaccard": Jaccard(), "llm": LLM()}
    if args.embedding:
        similarities["embedding"] = Embedding(args.embedding)
    every = {"default": BSDetector()} if "default" in args.forms else {}
    every |= {"math": BSDetector.math()} if "math" in args.forms else {}
    for form in [f for f in args.forms if f in ("direct", "reasoned")]:
        for name in args.similarities:
            if form == "reasoned":
                # The paper's form and weights, with the similarities that there are.
                every[f"{form}, {name}"] = replace(BSDetector.paper(), similarity=similarities[name])
            else:
                every[f"{form}, {name} only"] = BSDetector(similarity=similarities[name], alpha=1.0)
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--task", choices=TASKS, nargs="+", required=True)
    parser.add_argument("--rows", type=int, help="the first N rows only")
    parser.add_argument("--half", choices=["choose", "report"], default="report")
    forms = ["baselines", "default", "direct", "reasoned", "math"]
    parser.add_argument("--forms", nargs="*", choices=forms, default=forms[:3])
    parser.add_argument("--similarities", nargs="*", choices=["jaccard", "embedding", "llm"], default=["jaccard"])
    parser.add_argument("--embedding", help="a sentence-embedding checkpoint for the embedding similarity")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    datasets.disable_progress_bars()
    engine = Transformers(model)
    recorder = Recorder(engine)
    load(engine)
    run = {"scores_revision": SCORES_REVISION, **this_run()}
    name = Path(model).name.removesuffix(".gguf")
    for task in args.task:
        for found in evaluate(task, args, recorder):
            entry = {"model": name, **found, "runs": [{**run, "scores": list(found["scores"])}]}
            if args.out:  # at once: a run that is ended keeps what it has
                write(args.out, entry)
        print(json.dumps(entry, indent=1), flush=True)


def write(out: Path, entry: dict[str, Any]) -> None:
    """Put an entry into the output file; what an earlier run found there and this one did not make stays."""
    entries = json.loads(out.read_text()) if out.exists() else []
    same = [e for e in entries if all(e[k] == entry[k] for k in ("task", "model", "half", "rows"))]
    for old in same:
        runs = [{**r, "scores": [s for s in r["scores"] if s not in entry["scores"]]} for r in old["runs"]]
        cost = {k: v for k, v in old["cost"].items() if f"{k}: confidence" not in entry["scores"]}
        entry = {**entry, "scores": old["scores"] | entry["scores"], "cost": cost | entry["cost"],
                 "runs": [*(r for r in runs if r["scores"]), *entry["runs"]]}  # fmt: skip
    out.write_text(json.dumps([*(e for e in entries if e not in same), entry], indent=1) + "\n")


def evaluate(task: str, args: argparse.Namespace, recorder: Recorder) -> Iterator[dict[str, Any]]:
    """All estimators and baselines on the rows of a task: what is known after each."""
    rows = Dataset.from_json(str(DATA / f"{task.partition('_')[0]}.jsonl"))
    rows = rows.filter(lambda r: r["half"] == args.half)
    rows = TASKS[task](rows.select(range(min(args.rows or len(rows), len(rows)))))
    good = [not n for n in rows["noise"]]
    targets = [infer(rows.features).read(r).response for r in rows]
    scores: dict[str, dict[str, object]] = {}
    cost: dict[str, dict[str, float]] = {}
    known = {
        "task": task,
        "half": args.half,
        "rows": len(rows),
        "wrong": len(rows) - sum(good),
        "scores": scores,
        "cost": cost,
    }
    if "baselines" in args.forms:
        scores["target length, shorter is better"] = measure([-len(t) for t in targets], good)
        scores["mean token log-probability of the target"] = measure(token_logprob(rows, recorder.engine), good)
        yield known
    for name, estimator in estimators(args).items():
        before, started = list(recorder.engine.tokens), time.perf_counter()
        scored = Clear(engine=recorder, confidence=estimator, cache=False).score(rows[:])
        seconds = time.perf_counter() - started
        counts = zip(("prompt", "generated"), recorder.engine.tokens, before, strict=True)
        asked = {f"{kind}_tokens_per_row": round((now - then) / len(rows), 1) for kind, now, then in counts}
        if task == args.task[0] and name in ("default", "math", f"reasoned, {args.similarities[0]}"):
            cost[name] = {"rows_per_second": round(len(rows) / seconds, 3), **asked}
        for part in ("confidence", "consistency", "reflection"):
            scores[f"{name}: {part}"] = measure(scored[f"clear_{part}"], good)
        print(
            task, name, round(seconds), json.dumps({k: v for k, v in scores.items() if k.startswith(name)}), flush=True
        )
        yield known


if __name__ == "__main__":
    main()
