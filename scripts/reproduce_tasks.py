"""The tasks of reproduce.py: where their rows come from, which noise they get, and how answers are measured."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, load_dataset

from clear_datasets.infer_format import infer_rows
from clear_datasets.reading import load

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Rows, noise and measure.

    Attributes:
        measure: From an answer and the right ones, each figure of the task in [0, 1]; the first one is its main one.
        shape: From a row of the Hub or of a file, the columns that are trained on and `references`, the right answers;
            None for a row to leave out.
        hub: Arguments of load_dataset, and the name of the test split.
        noise: The noise of the paper, or swapped targets.
        max_tokens: Length of an answer.
    """

    measure: Callable[[str, list[str]], dict[str, float]]
    shape: Callable[[Row], dict[str, Any] | None]
    hub: tuple[tuple[str, ...], str] | None = None
    noise: str = "swap"
    max_tokens: int = 64

    def rows(self, files: list[str], test: int) -> tuple[Dataset, Dataset]:
        """Training and test rows: of two files, of one that is split, or of the Hub where no file is given."""
        if not files and self.hub is None:
            raise SystemExit("this task has no dataset on the Hub: give --data FILE")
        if not files and self.hub:
            (name, *config), split = self.hub
            parts = [load_dataset(name, *config, split=s) for s in ("train", split)]
        elif len(files) > 2:
            raise SystemExit(f"expected a file of training rows and one of test rows; found {len(files)} files")
        else:
            parts = [_read(file) for file in files]
        shaped = [self._shaped(part) for part in parts]
        if len(shaped) == 1:
            halves = shaped[0].train_test_split(test_size=test, seed=0)
            shaped = [halves["train"], halves["test"]]
        asked = shaped[1].shuffle(seed=0).select(range(test)) if len(shaped[1]) > test else shaped[1]
        known = {_beginning(row) for row in asked}
        return shaped[0].filter(lambda row: _beginning(row) not in known), asked

    def _shaped(self, rows: Dataset) -> Dataset:
        made = [new for row in rows if (new := self.shape(row)) is not None]
        if not made:
            raise SystemExit(f"none of the {len(rows)} rows has the columns of this task; found {rows.column_names}")
        return Dataset.from_list(made)


def _read(file: str) -> Dataset:
    return load(file, None, None, None, None)


def _beginning(row: Row) -> str:
    """The passage of a row, or else its prompt: what training and test rows should not share."""
    return row.get("context") or infer_rows({k: [v] for k, v in row.items()}).read(row).prompt[-1]["content"]


def plain(text: str) -> str:
    """Lower case, without punctuation, articles and spaces too many: the rules of SQuAD's evaluation."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def text(answer: str, references: list[str]) -> dict[str, float]:
    """Exact match and F1 of words, by SQuAD's rules; the best of the references counts.

    References:
        Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1.
    """
    said = plain(answer)
    return {
        "exact match": max(float(said == plain(r)) for r in references),
        "F1": max(_f1(said.split(), plain(r).split()) for r in references),
    }


def _f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return 0.0
    return 2 * sum((Counter(said) & Counter(right)).values()) / (len(said) + len(right))


def number(answer: str, references: list[str]) -> dict[str, float]:
    """Whether the first number behind "####", or else the last of all, is that of a reference."""
    said = _number(answer)
    return {"accuracy": float(said is not None and any(said == _number(r) for r in references))}


def _number(answer: str) -> float | None:
    before, mark, behind = answer.partition("####")
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", behind if mark else before)
    return float(found[0 if mark else -1].replace(",", "")) if found else None


def letter(answer: str, references: list[str]) -> dict[str, float]:
    """Whether the letter that an answer begins with, or that it says the answer is, is that of a reference."""
    # "A" and a space may begin a sentence; "B" and a space do not.
    found = re.match(r"\W*(?:([B-H])(?!\w)|(A)(?=[.,:)\]*\n]|\s*$))", answer)
    found = found or re.search(r"(?:answer|option)(?: is)?\W*([A-H])\b", answer, re.IGNORECASE)
    return {"accuracy": float(found is not None and next(filter(None, found.groups())) in references)}


def record(answer: str, references: list[str]) -> dict[str, float]:
    """For JSON objects: F1 of all fields, whether the topic (or else the first field) is right, whether it parses."""
    said, figures = _object(answer), []
    for reference in references:
        right = _object(reference) or {}
        first = "topic" if "topic" in right else next(iter(right), "")
        fields = {k: (plain(str((said or {}).get(k, ""))), plain(str(v))) for k, v in right.items()}
        overlap = [_f1(a.split(), b.split()) if a != b else 1.0 for a, b in fields.values()]
        same = said is not None and len(set(fields[first])) == 1 if fields else said == right
        figures.append((sum(overlap) / len(overlap) if overlap else float(said == right), float(same)))
    best = max(figures)
    return {"F1": best[0], "first field": best[1], "valid JSON": float(said is not None)}


def _object(answer: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(answer)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _passage(row: Row) -> dict[str, Any] | None:
    """Rows of SQuAD and DROP, of the Hub or with an `answer`; None without an answer, or (DROP) with several in one."""
    spans = (row.get("answers_spans") or {}).get("spans") or []
    found = row.get("answer") or (row.get("answers") or {}).get("text") or (spans if len(set(spans)) == 1 else [])
    passage = row.get("context") or row.get("passage")
    if not found or not passage or not row.get("question"):
        return None
    references = list(dict.fromkeys([found] if isinstance(found, str) else found))
    return {"context": passage, "question": row["question"], "answer": references[0], "references": references}


def _solution(row: Row) -> dict[str, Any] | None:
    if not row.get("question") or not row.get("answer"):
        return None
    return {"question": row["question"], "answer": row["answer"], "references": [row["answer"]]}


def _choice(row: Row) -> dict[str, Any] | None:
    options, right = (
        row.get("options") or (row.get("choices") or {}).get("text"),
        row.get("answer") or row.get("answerKey"),
    )
    if not options or not right:
        return None
    options = json.loads(options) if isinstance(options, str) else options
    if right in "1234567":  # some rows of ARC have numbers in place of letters
        right = string.ascii_uppercase[int(right) - 1]
    lines = [row["question"], *(f"{c}. {o}" for c, o in zip(string.ascii_uppercase, options, strict=False))]
    return {"question": "\n".join(lines), "answer": right, "references": [right]}


def _email(row: Row) -> dict[str, Any]:
    if len(row) != 2:
        raise SystemExit(f"expected two columns, the email and its JSON target; found {', '.join(row)}")
    email, target = row.values()
    if not {"topic", "reply"} <= set(_object(target) or {}):
        raise SystemExit(f'expected targets like {{"topic": ..., "reply": ...}}; found {target[:80]!r}')
    asked = "Give the topic of this email and a reply to it, as JSON with the fields topic and reply.\n\n" + email
    return {"prompt": asked, "response": target, "references": [target]}


def _any(row: Row) -> dict[str, Any]:
    return {**row, "references": [infer_rows({name: [value] for name, value in row.items()}).read(row).response]}


def any_file(file: str) -> Task:
    """Rows of any format that `infer` knows; figures of JSON objects where the first target is one."""
    is_object = _object(_any(_read(file)[0])["references"][0]) is not None
    return Task(record if is_object else text, _any, max_tokens=512)


TASKS = {
    "squad": Task(text, _passage, (("rajpurkar/squad",), "validation"), "wrong_sentence"),
    "drop": Task(text, _passage, (("ucinlp/drop",), "validation"), "wrong_sentence"),
    "gsm8k": Task(number, _solution, (("openai/gsm8k", "main"), "test"), max_tokens=320),
    "arc": Task(letter, _choice, (("allenai/ai2_arc", "ARC-Challenge"), "test"), max_tokens=16),
    "emails": Task(record, _email, max_tokens=512),
}
