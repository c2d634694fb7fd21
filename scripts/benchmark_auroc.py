"""How well confidence, its parts and plain baselines tell right from wrong targets.

    python scripts/benchmark_auroc.py --model MODEL --task squad_other_answer --out docs/benchmarks/auroc.json

Rows come from scripts/data (its README names sources and licences), from the half that the defaults were not chosen
on. Each estimator is run through ``ds.map(clear.score, batched=True)``; answers that two of them share are asked once,
and the first estimator's rows/s is measured before anything is shared. An entry of the same model and task in the
output file is replaced, others stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset

from clear_datasets import LLM, BSDetector, Clear, Embedding, Jaccard, infer, noise
from clear_datasets.engines import Engine, Messages
from clear_datasets.engines.checkpoint import load
from clear_datasets.engines.transformers import Transformers
from clear_datasets.noise import auroc

DATA = Path(__file__).parent / "data"
TASKS = {
    "squad_wrong_sentence": lambda ds: noise.wrong_sentence(ds, fraction=0.5, seed=1),
    "squad_other_answer": lambda ds: noise.other_answer(ds, fraction=0.5, seed=1),
    "gsm8k": lambda ds: ds,
    "arc": lambda ds: ds,
}


class Recorder(Engine):
    """An engine that remembers its answers and counts tokens."""

    def __init__(self, engine: Transformers) -> None:
        self.engine, self.known, self.tokens = engine, {}, {"prompt": 0, "generated": 0}

    def generate(
        self, prompts: Sequence[Messages], *, n: int = 1, temperature: float = 0.0, max_tokens: int = 512
    ) -> list[list[str]]:
        return self.answer(prompts, (), (), n=n, temperature=temperature, max_tokens=max_tokens)[0]

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        return self.answer((), prompts, labels)[1]

    def answer(self, generate, choose, labels, *, n=1, temperature=0.0, max_tokens=512):
        drawn = [repr((p, n, temperature, max_tokens)) for p in generate]
        read = [repr((p, tuple(labels))) for p in choose]
        new = [i for i, key in enumerate(drawn) if key not in self.known]
        ask = [i for i, key in enumerate(read) if key not in self.known]
        settings = {"n": n, "temperature": temperature, "max_tokens": max_tokens}
        texts, chosen = self.engine.answer([generate[i] for i in new], [choose[i] for i in ask], labels, **settings)
        self.known.update(zip([drawn[i] for i in new], texts, strict=True))
        self.known.update(zip([read[i] for i in ask], chosen, strict=True))
        checkpoint = load(self.engine)
        prompts = [generate[i] for i in new] + [choose[i] for i in ask]
        self.tokens["prompt"] += sum(map(len, checkpoint.encode(prompts, [0] * len(prompts))))
        self.tokens["generated"] += sum(
            len(ids) for t in texts for ids in checkpoint.tokenizer(t, add_special_tokens=False)["input_ids"]
        )
        return [self.known[k] for k in drawn], np.array([self.known[k] for k in read]).reshape(len(read), len(labels))


def token_logprob(rows: Dataset, engine: Transformers) -> list[float]:
    """Mean log-probability of the target's tokens, given the prompt."""
    checkpoint, form, means = load(engine), infer(rows.features), []
    for row in rows:
        example = form.read(row)
        ids = checkpoint.encode([example.prompt], [0])[0]
        target = checkpoint.tokenizer.encode(example.response, add_special_tokens=False)
        with torch.inference_mode():
            logits = checkpoint.model(torch.tensor([ids + target], device=checkpoint.device)).logits[0].float()
        logprobs = logits[len(ids) - 1 : -1].log_softmax(-1)
        means.append(float(logprobs.gather(1, torch.tensor(target, device=checkpoint.device)[:, None]).mean()))
    return means


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
    default = BSDetector()
    every = {"default": default}
    similarities = {"jaccard": Jaccard(), "llm": LLM()}
    if args.embedding:
        similarities["embedding"] = Embedding(args.embedding)
    for name, similarity in similarities.items():
        every[f"direct, {name}"] = BSDetector(similarity=similarity)
    if args.reasoned:
        for name, similarity in similarities.items():
            every[f"reasoned, {name}"] = BSDetector(similarity=similarity, samples="reasoned", reflection="reasoned")
    return every


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--rows", type=int, help="the first N rows only")
    parser.add_argument("--half", choices=["choose", "report"], default="report")
    parser.add_argument("--reasoned", action="store_true", help="the reasoned form too")
    parser.add_argument("--embedding", help="a sentence-embedding checkpoint for the embedding similarity")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    rows = Dataset.from_json(str(DATA / f"{args.task.split('_')[0]}.jsonl"))
    rows = rows.filter(lambda r: r["half"] == args.half)
    rows = TASKS[args.task](rows.select(range(min(args.rows or len(rows), len(rows)))))
    good = [not n for n in rows["noise"]]
    targets = [infer(rows.features).read(r).response for r in rows]
    engine = Transformers(args.model)
    recorder = Recorder(engine)
    load(engine)
    scores: dict[str, dict[str, object]] = {}
    cost: dict[str, dict[str, float]] = {}
    for name, estimator in estimators(args).items():
        before, started = dict(recorder.tokens), time.perf_counter()
        batch = rows[:]
        scored = Clear(engine=recorder, confidence=estimator).score(batch)
        seconds = time.perf_counter() - started
        asked = {f"{k}_tokens_per_row": round((v - before[k]) / len(rows), 1) for k, v in recorder.tokens.items()}
        if asked["prompt_tokens_per_row"]:
            cost[name] = {"rows_per_second": round(len(rows) / seconds, 3), **asked}
        for part in ("confidence", "consistency", "reflection"):
            scores[f"{name}: {part}"] = measure(scored[f"clear_{part}"], good)
        print(name, json.dumps({p: scores[f"{name}: {p}"] for p in ("confidence", "consistency", "reflection")}),
              json.dumps(cost.get(name)), flush=True)  # fmt: skip
    scores["target length, shorter is better"] = measure([-len(t) for t in targets], good)
    scores["mean token log-probability of the target"] = measure(token_logprob(rows, engine), good)
    entry = {
        "task": args.task,
        "model": Path(args.model).stem,
        "half": args.half,
        "rows": len(rows),
        "wrong": len(rows) - sum(good),
        "scores": scores,
        "cost": cost,
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(entry, indent=1))
    if args.out:
        entries = json.loads(args.out.read_text()) if args.out.exists() else []
        entries = [e for e in entries if (e["task"], e["model"], e["half"]) != (entry["task"], entry["model"], args.half)]
        args.out.write_text(json.dumps([*entries, entry], indent=1) + "\n")


if __name__ == "__main__":
    main()
