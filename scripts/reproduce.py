"""The paper's experiment: does a model that is fine-tuned on curated rows answer better?

    python scripts/reproduce.py --task squad --model Qwen/Qwen2.5-1.5B-Instruct --seeds 3 --out squad.json

Puts known noise into training rows, fine-tunes the same base model with the same number of steps on each arm, and asks
each of them, at temperature 0, clean test rows.

Prints a table and writes the figures to OUT; scored rows, adapters and answers are kept in OUT.work. A run that was
broken off goes on behind the last batch or checkpoint when it is started again with the same settings.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from get_model import MODELS, fetch
from reproduce_report import ARMS, differences, each, figures, tables
from reproduce_tasks import TASKS, Task, any_file
from this_run import this_run

from clear_datasets import BSDetector, Clear, above, curated, decide, infer, noise, threshold
from clear_datasets.engines import Engine, default_engine
from clear_datasets.engines.checkpoint import stamp
from clear_datasets.finetune import finetune
from clear_datasets.options import Judge
from clear_datasets.preference import by_name
from clear_datasets.stages import Stages, usual_batch_size
from clear_datasets.steps import CANDIDATES_REVISION, PREFERENCES_REVISION, SCORES_REVISION


def main() -> None:
    args = arguments()
    task = TASKS.get(args.task) or any_file(args.task)
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    datasets.disable_progress_bars()
    work = args.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    pool, test = task.rows([*([] if args.task in TASKS else [args.task]), *(args.data or [])], args.test)
    result = begin(args, work / "settings.json", Hasher.hash([pool.to_list(), test.to_list(), stamp(model)]))
    for seed in range(1, args.seeds + 1):
        arms = Seed(args, task, model, pool, seed, work / str(seed))
        found = result["seeds"].setdefault(str(seed), {"arms": {}})
        if {"correct", "agreed"} & set(args.arms):
            found["curation"] = arms.curation()
        chosen = arms.chosen()
        for arm in chosen:
            arms.tune(arm)
        engine = default_engine(model)
        if "base" not in result:
            result["base"] = figures(task, test, answers(engine, task, test, work / "base.json"))
        for arm in chosen:
            tuned = engine.with_writer(str(arms.folder / arms.adapter(arm)))
            said = answers(tuned, task, test, arms.folder / f"{arm}.answers.json")
            rows = arms.rows(arm)
            found["arms"][arm] = {"rows": len(rows), "wrong": wrong(task, rows), **figures(task, test, said)}
            print(f"seed {seed}, {arm}: {json.dumps(found['arms'][arm])}", flush=True)
        result["less"] = differences(task, test, list(result["seeds"]), work)
        write(args.out, result)
    print(tables(result))


def arguments() -> argparse.Namespace:
    arms = "arms:\n" + "\n".join(f"  {name:<15}{what}" for name, what in ARMS.items())
    whole = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=arms, formatter_class=whole)
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or a file of rows")
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="training rows, and test rows, in place of the Hub's")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS), help="with commas between")
    parser.add_argument("--noise", type=float, default=0.2, help="share of training rows with a wrong target")
    parser.add_argument("--kind", choices=noise.MAKERS, help="of noise (default: the task's own)")
    parser.add_argument("--seeds", type=int, default=3, help="how often, each time with other rows, noise and weights")
    parser.add_argument("--rows", type=int, default=2000, help="for training, the wrong ones among them")
    parser.add_argument("--test", type=int, default=500, help="clean rows to ask")
    parser.add_argument("--epochs", type=float, default=2, help="over all rows; every arm has that number of steps")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--eta", type=float, default=0.8, help="preference above which a candidate replaces")
    parser.add_argument(
        "--preference",
        choices=[str(judge) for judge in Judge],
        default="confidence",
        help="how candidates are judged",
    )
    parser.add_argument("--math", action="store_true", help="targets are solutions: their result alone is compared")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    args = parser.parse_args()
    if unknown := set(args.arms) - set(ARMS):
        parser.error(f"--arms: {', '.join(sorted(unknown))}; expected some of {', '.join(ARMS)}")
    args.arms = [a for a in ARMS if a in args.arms or (a == "random_length" and "random" in args.arms)]
    return args


def begin(args: argparse.Namespace, kept: Path, content: str) -> dict[str, Any]:
    """What an earlier run with the same settings, rows and model found, or an empty result."""
    settings = {k: v for k, v in vars(args).items() if k not in ("arms", "seeds", "out") and (k != "math" or v)}
    settings |= {"kind": args.kind or (TASKS[args.task].noise if args.task in TASKS else "swap")}
    settings |= {"content": content, "revisions": [SCORES_REVISION, CANDIDATES_REVISION, PREFERENCES_REVISION]}
    new = {"settings": settings, "runs": [], "seeds": {}}
    old = json.loads(args.out.read_text()) if args.out.exists() else new
    before = json.loads(kept.read_text()) if kept.exists() else old["settings"]
    if before != settings:
        other = [k for k in settings if before.get(k) != settings[k]]
        raise SystemExit(f"{kept.parent} was made with other {', '.join(other)}: give another --out, or delete both")
    write(kept, settings)
    return {**old, "runs": [*old["runs"], this_run()]}


def write(file: Path, content: Any) -> None:
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.rename(file)


class Seed:
    """Rows and adapters of one seed; every stage is kept in a folder, and made once."""

    def __init__(
        self, args: argparse.Namespace, task: Task, model: str, pool: Dataset, seed: int, folder: Path
    ) -> None:
        self.args, self.task, self.model, self.seed, self.folder = args, task, model, seed, folder
        folder.mkdir(exist_ok=True)
        estimator = BSDetector.math() if args.math else BSDetector()
        self.clear = Clear(model, confidence=estimator, preference=by_name(args.preference, estimator))
        self.noisy = self._noisy(pool)
        self.stages = Stages(folder / "stages", usual_batch_size())
        self.scored = self.stages.score(self.noisy, self.clear)
        self.gamma = threshold(self.scored)
        self.kept = self.scored.filter(above(self.gamma, failed="drop"))
        self.steps = round(args.epochs * len(self.noisy) / args.batch)

    def _noisy(self, pool: Dataset) -> Dataset:
        file = self.folder / "noisy.parquet"
        if not file.exists():
            chosen = pool.shuffle(seed=self.seed).select(range(min(self.args.rows, len(pool))))
            noisy = noise.MAKERS[self.args.kind or self.task.noise](chosen, fraction=self.args.noise, seed=self.seed)
            noisy.to_parquet(str(file.with_suffix(".part")))
            file.with_suffix(".part").rename(file)
        return Dataset.from_parquet(escape(str(file)))

    def chosen(self) -> list[str]:
        """The arms; one that is matched in length is `random` where all targets have one length."""
        alike = len(set(lengths(self.noisy))) == 1
        return [arm for arm in self.args.arms if not (alike and arm == "random_length")]

    def rows(self, arm: str) -> Dataset:
        if arm == "original":
            return self.noisy
        if arm == "clean":
            form = infer(self.noisy.features)
            return self.noisy.map(lambda row: form.write(row, row["noise_original"]))
        if arm == "filter":
            return self.kept
        if arm in ("correct", "agreed"):
            return curated(self.decided("keep" if arm == "agreed" else "drop"))
        draw = random.Random(f"{arm} {self.seed}")  # the noise was drawn with the number alone
        if arm == "random":
            return self.noisy.select(sorted(draw.sample(range(len(self.noisy)), len(self.kept))))
        return self.noisy.select(same_lengths(lengths(self.noisy), lengths(self.kept), draw))

    @cached_property
    def judged(self) -> Dataset:
        """The scored rows with candidates and preferences; the arm `filter` is trained for it."""
        self.tune("filter")
        clear = self.clear.with_writer(str(self.folder / "filter"), self.gamma)
        judged = self.stages.correct(self.scored, clear)
        clear.close()
        return judged

    def decided(self, agreed: Literal["keep", "drop"]) -> Dataset:
        """The same with decisions."""
        return self.judged.map(decide(self.gamma, self.args.eta, agreed=agreed, failed="drop"), batched=True)

    def adapter(self, arm: str) -> str:
        """Where the weights of an arm are: without a row more, `agreed` is `correct`, and that is `filter`."""
        for more, less in (("agreed", "correct"), ("correct", "filter")):
            if arm == more and len(self.rows(more)) == len(self.rows(less)):
                arm = less
        return arm

    def tune(self, arm: str) -> None:
        name = self.adapter(arm)
        rows = self.rows(arm).select_columns(self.noisy.column_names)
        if not (self.folder / name / "adapter_config.json").exists():
            print(f"seed {self.seed}: fine-tuning {name} on {len(rows)} rows", flush=True)
        finetune(
            rows, self.model, self.folder / name, seed=self.seed, max_steps=self.steps, learning_rate=self.args.rate,
            per_device_train_batch_size=self.args.batch, save_steps=0.25, save_total_limit=1, disable_tqdm=True,
        )  # fmt: skip

    def curation(self) -> dict[str, Any]:
        """What was dropped and replaced, against the truth that the noise makers kept."""
        decided = self.decided("drop")
        form = infer(self.noisy.features)
        noisy = np.array([bool(n) for n in decided["noise"]])
        decisions = np.array(decided["clear_decision"][:])
        targets, candidates = [form.read(r).response for r in decided], decided["clear_candidate"][:]
        judged = np.array([bool(c) for c in candidates])
        agreed = np.array(decided["clear_agreed"][:])
        replaced = decisions == "replace"
        preference = np.array(decided["clear_preference"][:], dtype=float)
        longer = np.array([len(c) > len(t) for c, t in zip(candidates, targets, strict=True)])

        measured = {
            "targets": each(self.task, decided, targets),
            "candidates": each(self.task, decided, candidates),
        }

        def right(of: str, rows: np.ndarray) -> dict[str, float]:
            return {k: round(float(v[rows].mean()), 3) for k, v in measured[of].items()} if rows.any() else {}

        above = {eta: judged & (preference > eta) for eta in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9)}
        best = next(iter(measured["candidates"].values()))[judged] == 1
        counts = {d: int((decisions == d).sum()) for d in ("keep", "drop", "replace")}
        return {
            "auroc": round(noise.auroc(decided["clear_confidence"][:], list(~noisy)), 3),
            "decisions": counts,
            "wrong targets": {d: int((noisy & (decisions == d)).sum()) for d in counts},
            "candidates": int(judged.sum()),
            "agreed": int(agreed.sum()),
            "targets of agreed rows": right("targets", agreed),
            "preferred": int((preference > 0.5).sum()),
            "longer among candidates": round(float(longer[judged].mean()), 3) if judged.any() else None,
            "longer among replaced": round(float(longer[replaced].mean()), 3) if replaced.any() else None,
            "targets of replaced rows": right("targets", replaced),
            "candidates of replaced rows": right("candidates", replaced),
            "candidates of all judged rows": right("candidates", judged),
            "targets of all judged rows": right("targets", judged),
            "auroc of preference for right candidates": round(
                noise.auroc(preference[judged].tolist(), best.tolist()), 3
            ),
            "candidates above eta": {eta: {"rows": int(r.sum()), **right("candidates", r)} for eta, r in above.items()},
        }


def lengths(rows: Dataset) -> list[int]:
    form = infer(rows.features)
    return [len(form.read(row).response) for row in rows]


def same_lengths(of: list[int], wanted: list[int], draw: random.Random, strata: int = 10) -> list[int]:
    """Positions of random rows that have as many lengths in each tenth of all lengths as the wanted ones."""
    edges = np.quantile(of, np.linspace(0, 1, strata + 1)[1:-1])
    places, counts = np.digitize(of, edges), np.bincount(np.digitize(wanted, edges), minlength=strata)
    return sorted(i for s in range(strata) for i in draw.sample(np.flatnonzero(places == s).tolist(), int(counts[s])))


def answers(engine: Engine, task: Task, test: Dataset, file: Path) -> list[str]:
    """What a model says to the test rows at temperature 0; asked once."""
    if not file.exists():
        form = infer(test.features)
        said = engine.generate([form.read(row).prompt for row in test], max_tokens=task.max_tokens)
        write(file, [text for [text] in said])
        engine.close()
    found: list[str] = json.loads(file.read_text())
    return found


def wrong(task: Task, rows: Dataset) -> int:
    """Rows whose target is not right by the task's main figure; a reply in other words counts among them."""
    form = infer(rows.features)
    return sum(next(iter(task.measure(form.read(row).response, row["references"]).values())) < 1 for row in rows)


if __name__ == "__main__":
    main()
