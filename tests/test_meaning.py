"""Scores of a real model mean something: right targets of real rows score higher than wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from clear_datasets import BSDetector, Clear, above, noise, threshold
from clear_datasets.noise import auroc

pytestmark = pytest.mark.model
DATA = Path(__file__).parent.parent / "scripts" / "data"


@pytest.fixture(scope="module")
def rows():
    return Dataset.from_json(str(DATA / "squad.jsonl")).filter(lambda r: r["half"] == "choose").select(range(100, 116))


@pytest.fixture(scope="module")
def scored(rows, half_billion):
    return noise.other_answer(rows, fraction=0.5).map(Clear(half_billion).score, batched=True)


def test_wrong_answers_score_lower(scored):
    assert scored["clear_error"][:] == [""] * 16
    good = [not n for n in scored["noise"]]
    assert auroc(scored["clear_confidence"], good) > 0.8
    assert auroc(scored["clear_consistency"], good) > 0.8


def test_half_of_the_rows_hold_most_of_the_right_ones(scored):
    kept = scored.filter(above(threshold(scored)))
    assert len(kept) == 8
    assert sum(not n for n in kept["noise"]) >= 6


def test_copied_sentences_are_found_where_the_instruction_comes_first(rows, half_billion):
    noisy = noise.wrong_sentence(rows.select(range(12)), fraction=0.5)
    alpaca = noisy.rename_columns({"question": "instruction", "context": "input", "answer": "output"})
    scored = alpaca.map(Clear(half_billion, confidence=BSDetector(alpha=0, beta=1)).score, batched=True)
    assert auroc(scored["clear_confidence"], [not n for n in scored["noise"]]) > 0.75


def test_a_gguf_file_is_converted_once(half_billion):
    from clear_datasets.engines.gguf import from_gguf

    folder = from_gguf(Path(half_billion))
    before = sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    assert from_gguf(Path(half_billion)) == folder
    assert sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir()) == before
    assert not list(folder.parent.glob("unfinished-*"))
