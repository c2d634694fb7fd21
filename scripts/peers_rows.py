"""Rows for benchmark_peers.py: the report half of scripts/data, or as many as are wanted of a larger file."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from benchmark_auroc import DATA, TASKS
from datasets import Dataset


def rows_of(task: str, rows: int | None, file: Path | None, longest: int) -> Dataset:
    kind = task.partition("_")[0]
    shipped = Dataset.from_json(str(DATA / f"{kind}.jsonl"))
    if file is None:
        found = shipped.filter(lambda r: r["half"] == "report")
        return TASKS[task](found.select(range(min(rows or len(found), len(found)))))
    chosen = shipped.filter(lambda r: r["half"] == "choose")
    texts = ("context", "question")
    seen = {text for name in texts if name in chosen.column_names for text in chosen[name]}
    every = [row for row in map(json.loads, file.read_text().splitlines()) if row["question"] not in seen]
    random.Random(1).shuffle(every)
    made = [r for r in MAKERS[kind](every) if seen.isdisjoint(r[name] for name in texts if name in r)]
    if kind == "squad":
        made = [r for r in made if len(r["context"]) <= longest]
    if "other_answer" in task:
        made = siblings(made)
    if rows is not None and len(made) < rows:
        raise SystemExit(f"{task}: {file.name} has {len(made)} rows that nothing was chosen on, not {rows}")
    return TASKS[task](Dataset.from_list(made[:rows]))


def siblings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose passage has another row, side by side: a wrong answer comes from there."""
    counts = Counter(r["context"] for r in rows)
    place = {context: i for i, context in enumerate(dict.fromkeys(r["context"] for r in rows))}
    return sorted((r for r in rows if counts[r["context"]] > 1), key=lambda r: place[r["context"]])


def solutions(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One model's solution to a question: right and wrong ones in turn, without questions that lack the kind."""
    generator, made = random.Random(1), []
    for row in questions:
        right = len(made) % 2 == 0
        wanted = [name for name, each in row.items() if isinstance(each, dict) and each["is_correct"] == right]
        if wanted:
            name = generator.choice(wanted)
            answer, noise = row[name]["solution"], "" if right else "model_error"
            made.append({"question": row["question"], "answer": answer, "model": name, "noise": noise})
    return made


def letters(questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions with their options and a letter, of which three in ten are wrong."""
    made = []
    for row in questions:
        options = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(row["options"])]
        made.append({
            "question": "\n".join([row["question"], *options]),
            "answer": row["answer_noisy30"],
            "noise": "wrong_letter" if row["answer_noisy30"] != row["answer"] else "",
            "noise_original": row["answer"],
        })  # fmt: skip
    return made


MAKERS = {"squad": list, "gsm8k": solutions, "arc": letters}
