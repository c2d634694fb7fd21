"""Makes the rows of benchmark_peers.py, scripts/data/peers_*.jsonl, of files with more of the same kind.

    python scripts/peers_rows.py FOLDER

FOLDER has squad.jsonl (context, question, answer), gsm8k_model_solutions.jsonl (question, and by model a solution with
is_correct) and arc_noisy.jsonl (question, options, answer, answer_noisy30); scripts/data/README.md names the sources.
Questions and passages that the defaults were chosen on are left out.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from benchmark_auroc import DATA, TASKS
from datasets import Dataset

ROWS = 400  # of a task, or as many as there are
LONGEST = 900  # characters of a passage


def rows_of(task: str, every: list[dict[str, Any]]) -> Dataset:
    chosen = Dataset.from_json(str(DATA / f"{task.partition('_')[0]}.jsonl")).filter(lambda r: r["half"] == "choose")
    texts = ("context", "question")
    seen = {text for name in texts if name in chosen.column_names for text in chosen[name]}
    every = [row for row in every if row["question"] not in seen]
    random.Random(1).shuffle(every)
    made = [r for r in MAKERS[task](every) if seen.isdisjoint(r[name] for name in texts if name in r)]
    made = [r for r in made if len(r.get("context", "")) <= LONGEST]
    return TASKS[task](Dataset.from_list(made[:ROWS]))


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


MAKERS = {"squad_wrong_sentence": list, "gsm8k": solutions, "arc": letters}
FILES = {
    "squad_wrong_sentence": "squad.jsonl",
    "gsm8k": "gsm8k_model_solutions.jsonl",
    "arc": "arc_noisy.jsonl",
}


if __name__ == "__main__":
    for name, file in FILES.items():
        made = rows_of(name, [json.loads(line) for line in (Path(sys.argv[1]) / file).read_text().splitlines()])
        lines = [json.dumps(row, ensure_ascii=False) for row in made.to_list()]
        (DATA / f"peers_{name.partition('_')[0]}.jsonl").write_text("\n".join(lines) + "\n")
