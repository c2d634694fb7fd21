"""What reproduce.py found, as figures and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from reproduce_tasks import Task

ARMS = {
    "clean": "all rows, each with its right target: more than curation can reach",
    "original": "all rows",
    "random": "as many random rows as the filter keeps",
    "random_length": "the same, with the lengths of the targets that the filter keeps (none where all have one length)",
    "filter": "the rows above the median confidence (Auto-Filter)",
    "correct": "the same, and rows whose targets are replaced (Auto-Correct; the model of `filter` writes candidates)",
    "agreed": "the same, and rows whose targets the model of `filter` repeats (ours; the paper drops them)",
}


def each(task: Task, test: Dataset, said: list[str]) -> dict[str, np.ndarray]:
    """Every figure of the task, of every answer."""
    measured = [task.measure(s, r) for s, r in zip(said, test["references"], strict=True)]
    return {name: np.array([m[name] for m in measured]) for name in measured[0]}


def figures(task: Task, test: Dataset, said: list[str]) -> dict[str, float]:
    """Their means."""
    return {name: round(float(values.mean()), 4) for name, values in each(task, test, said).items()}


def differences(task: Task, test: Dataset, seeds: list[str], work: Path) -> dict[str, Any]:
    """Each arm less `original`, and less `filter`: mean over seeds, and 95% bootstrap interval over the test rows."""
    draws = np.random.default_rng(0).integers(0, len(test), (2000, len(test)))
    said: dict[str, list[dict[str, np.ndarray]]] = {}
    for seed in seeds:
        for arm in ARMS:
            if (file := work / seed / f"{arm}.answers.json").exists():
                said.setdefault(arm, []).append(each(task, test, json.loads(file.read_text())))
    found: dict[str, Any] = {"original": {}, "filter": {}}
    for less, gained in found.items():
        for arm in [a for a in said if a != less and len(said[a]) == len(said.get(less, []))]:
            for name in said[arm][0]:
                gains = np.mean([a[name] - b[name] for a, b in zip(said[arm], said[less], strict=True)], axis=0)
                low, high = np.percentile(gains[draws].mean(axis=1), [2.5, 97.5])
                gained.setdefault(arm, {})[name] = [round(float(x), 3) for x in (gains.mean(), low, high)]
    return found


def tables(result: dict[str, Any]) -> str:
    """In Markdown: the arms, and what was done to the rows."""
    return "\n".join([*_arms(result), "", *_curation(result)])


def _arms(result: dict[str, Any]) -> list[str]:
    """Mean over the seeds (least and most of them), and gains with their 95% intervals."""
    seeds, names = list(result["seeds"].values()), list(result["base"])
    lines = [
        _line("fine-tuned on", "rows", "wrong targets", *names, *(f"{names[0]}, less {x}" for x in result["less"]))
    ]
    lines.append("|" + "---|" * (len(names) + 5))
    lines.append(_line("nothing (zero-shot)", "", "", *(f"{result['base'][name]:.3f}" for name in names), "", ""))
    for arm in [a for a in ARMS if all(a in s["arms"] for s in seeds)]:
        of = [s["arms"][arm] for s in seeds]
        cells = [f"{np.mean([a[k] for a in of]):.0f}" for k in ("rows", "wrong")]
        cells += [_spread([a[name] for a in of]) for name in names]
        for gained in result["less"].values():
            gain = gained.get(arm, {}).get(names[0])
            cells.append(f"{gain[0]:+.3f} ({gain[1]:+.3f} to {gain[2]:+.3f})" if gain else "")
        lines.append(_line(arm, *cells))
    return lines


def _curation(result: dict[str, Any]) -> list[str]:
    """How many targets were right, by the task's main figure, before and after."""
    lines = [_line("seed", "AUROC", "kept, wrong of them", "replaced", "right before", "right after",
                   "candidate longer", "preferred of candidates", "agreed", "right of them")]  # fmt: skip
    lines.append("|" + "---|" * 10)
    for seed, found in result["seeds"].items():
        if (c := found.get("curation")) is None:
            continue
        kept = f"{c['decisions']['keep']}, {c['wrong targets']['keep']}"
        rights = [_first(c[f"{what} rows"]) for what in ("targets of replaced", "candidates of replaced")]
        longer = c["longer among replaced"]
        lines.append(
            _line(seed, f"{c['auroc']:.3f}", kept, c["decisions"]["replace"], *rights, "" if longer is None else longer,
                  f"{c['preferred']} of {c['candidates']}", c["agreed"], _first(c["targets of agreed rows"]))
        )  # fmt: skip
    return lines if len(lines) > 2 else []


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _spread(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return f"{np.mean(values):.3f}" + (f" ({low} to {high})" if len(values) > 1 else "")


def _first(right: dict[str, float]) -> str:
    return f"{next(iter(right.values())):.2f}" if right else ""
