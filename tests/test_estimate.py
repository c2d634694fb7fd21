"""estimate in Python; the command is tested in test_cli.py."""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import pytest
from datasets import Dataset, Features, List

from clear_datasets import BSDetector, Clear
from clear_datasets.engines import EngineError
from clear_datasets.engines.transformers import Transformers
from clear_datasets.estimate import estimate
from tests.conftest import Scripted

FEW = BSDetector(k=1, max_tokens=4)


ROWS = Dataset.from_dict({"question": [f"Where is {i}?" for i in range(12)], "answer": [f"at {i}" for i in range(12)]})


@dataclass(frozen=True)
class Served(Scripted):
    """A server, which has a name of its own for its model."""

    model: str = "served"


def test_tokens_are_counted_by_the_model_of_the_engine(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAR_MODEL", str(tmp_path / "another one"))
    [cost] = estimate(ROWS, Clear(engine=Transformers(tiny), confidence=FEW))
    [same] = estimate(ROWS, Clear(tiny, confidence=FEW))
    assert (cost.prompt_tokens, cost.written_tokens) == (same.prompt_tokens, same.written_tokens)
    with pytest.raises(EngineError, match="cannot load the model served: "):
        estimate(ROWS, Clear(engine=Served(), confidence=FEW))
    [cost] = estimate(ROWS, Clear(tiny, engine=Served(), confidence=FEW))  # the checkpoint that it serves
    assert cost.prompt_tokens == same.prompt_tokens


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type for any JSON")
def test_chats_are_told_by_their_values_as_they_are_when_they_are_scored(tiny):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in ROWS
    ]
    chats = Dataset.from_dict({"conversations": turns}, features=Features({"conversations": List(datasets.Json())}))
    costs, wanted = (estimate(rows, Clear(tiny, confidence=FEW), correct=True)[:2] for rows in (chats, ROWS))
    assert [c.stage for c in costs] == ["score", "fine-tune"]
    assert [c.prompt_tokens for c in costs] == [c.prompt_tokens for c in wanted]
