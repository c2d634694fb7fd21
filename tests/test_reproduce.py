"""scripts/reproduce.py: its measures, and a whole run with the tiny model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from tests.conftest import make_tiny

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """Lets the scripts be imported."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tasks():
    import reproduce_tasks

    return reproduce_tasks


@pytest.mark.parametrize(
    "task, answer, references, figures",
    [
        ("squad", "The  Denver Broncos.", ["Denver Broncos"], {"exact match": 1, "F1": 1}),
        ("squad", "in Denver", ["Denver", "Santa Clara"], {"exact match": 0, "F1": pytest.approx(2 / 3)}),
        ("squad", "", ["Denver"], {"exact match": 0, "F1": 0}),
        ("drop", "4", ["14"], {"exact match": 0, "F1": 0}),
        ("gsm8k", "2 + 2 = 4, so\n#### 1,004.0", ["She has 1004\n#### 1004"], {"accuracy": 1}),
        ("gsm8k", "#### 7 (3 + 4)", ["#### 7"], {"accuracy": 1}),
        ("gsm8k", "It is -3.", ["#### 3"], {"accuracy": 0}),
        ("gsm8k", "I do not know", ["#### 3"], {"accuracy": 0}),
        ("arc", "B. Leaves", ["B"], {"accuracy": 1}),
        ("arc", "**C**", ["C"], {"accuracy": 1}),
        ("arc", "The answer is D.", ["D"], {"accuracy": 1}),
        ("arc", "B Leaves", ["B"], {"accuracy": 1}),
        ("arc", "Answer: C", ["C"], {"accuracy": 1}),
        ("arc", "Bees need it", ["B"], {"accuracy": 0}),
        ("arc", "A plant needs light", ["A"], {"accuracy": 0}),
        ("emails", '{"topic": "Rent", "reply": "I pay now"}', ['{"topic": "rent", "reply": "I pay later"}'],
         {"F1": pytest.approx((1 + 2 / 3) / 2), "first field": 1, "valid JSON": 1}),
        ("emails", '{"topic": "rent", "reply": ', ['{"topic": "rent", "reply": "yes"}'],
         {"F1": 0, "first field": 0, "valid JSON": 0}),
    ],
)  # fmt: skip
def test_measures(tasks, task, answer, references, figures):
    assert tasks.TASKS[task].measure(answer, references) == figures


@pytest.mark.parametrize(
    "task, row, shaped",
    [
        ("squad", {"context": "c", "question": "q", "answers": {"text": ["x", "y", "x"]}}, ("x", ["x", "y"])),
        ("squad", {"context": "c", "question": "q", "answer": "x"}, ("x", ["x"])),
        ("drop", {"passage": "c", "question": "q", "answers_spans": {"spans": ["7"]}}, ("7", ["7"])),
        ("arc", {"question": "q", "choices": {"text": ["u", "v"]}, "answerKey": "2"}, ("B", ["B"])),
        ("arc", {"question": "q", "options": '["u", "v"]', "answer": "A"}, ("A", ["A"])),
    ],
)
def test_rows_of_the_hub_and_of_files(tasks, task, row, shaped):
    found = tasks.TASKS[task].shape(row)
    assert (found["answer"], found["references"]) == shaped


def test_rows_without_an_answer_and_with_several_in_one_are_left_out(tasks):
    shape = tasks.TASKS["drop"].shape
    assert shape({"passage": "c", "question": "q", "answers_spans": {"spans": ["x", "y"]}}) is None
    assert shape({"context": "c", "question": "q", "answers": {"text": []}}) is None
    assert tasks.TASKS["arc"].shape({"question": "q"}) is None


def test_no_passage_is_in_training_and_test_rows(tasks, tmp_path):
    rows = [{"context": f"c{i // 3}", "question": f"q{i}", "answer": "x"} for i in range(60)]
    Dataset.from_list(rows).to_json(str(tmp_path / "rows.jsonl"))
    train, test = tasks.TASKS["squad"].rows([str(tmp_path / "rows.jsonl")], 10)
    assert len(test) == 10
    assert train
    assert not set(train["context"]) & set(test["context"])


def test_random_rows_of_the_same_lengths():
    from reproduce import same_lengths

    draw = random.Random(0)
    of = [draw.randrange(1, 200) for _ in range(400)]
    wanted = sorted(of)[:100] + sorted(of)[-20:]  # many short ones and a few long ones
    chosen = same_lengths(of, wanted, random.Random(1))
    assert len(set(chosen)) == len(wanted)
    assert abs(np.mean([of[i] for i in chosen]) - np.mean(wanted)) < 5
    assert chosen != same_lengths(of, wanted, random.Random(2))


def reproduce(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "reproduce.py"), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


@pytest.fixture
def here(monkeypatch):
    """The same within this process, which is faster."""
    from reproduce import main

    def call(*arguments: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
        main()

    return call


def test_a_run_of_all_arms_goes_on_where_it_was_broken_off(here, tmp_path, capsys):
    pytest.importorskip("trl")
    model = make_tiny(tmp_path / "tiny", ends=5, max_position_embeddings=2048, initializer_range=0.05)
    rows = Dataset.from_list(
        [{"prompt": f"Topic of mail {i}?", "response": json.dumps({"topic": f"t{i}", "n": i})} for i in range(30)]
    )
    rows.to_json(str(tmp_path / "rows.jsonl"))
    out = tmp_path / "result.json"
    arguments = ("--task", tmp_path / "rows.jsonl", "--model", model, "--seeds", "1", "--rows", "20", "--test", "8",
                 "--epochs", "1", "--preference", "confidence", "--eta", "0.4", "--out", out)  # fmt: skip
    first = reproduce(*arguments, "--arms", "filter")
    assert first.returncode == 0, first.stderr
    done = {p: p.stat().st_mtime_ns for p in tmp_path.glob("result.work/1/**/*.parquet")}
    assert [p.parent.name.partition("-")[0] for p in sorted(done)] == ["1", "score"]
    assert json.loads(out.read_text())["less"] == {"original": {}, "filter": {}}
    here(*arguments, "--arms", "clean,original,random,filter,correct,agreed")
    said = capsys.readouterr().out
    assert "fine-tuning filter" not in said
    assert said.count("train_runtime") == 5
    assert {p: p.stat().st_mtime_ns for p in done} == done
    result = json.loads(out.read_text())
    arms, curation = result["seeds"]["1"]["arms"], result["seeds"]["1"]["curation"]
    assert set(arms) == {"clean", "original", "random", "random_length", "filter", "correct", "agreed"}
    assert (arms["clean"]["rows"], arms["clean"]["wrong"]) == (20, 0)
    assert arms["agreed"]["rows"] == arms["correct"]["rows"] + curation["agreed"]
    assert arms["original"]["rows"] == 20
    assert arms["original"]["wrong"] == sum(curation["wrong targets"].values()) == 4
    assert arms["random"]["rows"] == arms["random_length"]["rows"] == arms["filter"]["rows"]
    assert arms["correct"]["rows"] == curation["decisions"]["keep"] + curation["decisions"]["replace"]
    assert set(result["base"]) == {"F1", "first field", "valid JSON"}
    assert len(result["runs"]) == 2
    assert "| correct |" in said
    gain, low, high = result["less"]["original"]["filter"]["F1"]
    assert low <= gain <= high
    assert gain == pytest.approx(arms["filter"]["F1"] - arms["original"]["F1"], abs=0.001)
    out.unlink()  # the scored rows of these settings are still there
    with pytest.raises(SystemExit, match="was made with other noise: "):
        here(*arguments, "--noise", "0.4")
    rows.select(range(29)).to_json(str(tmp_path / "rows.jsonl"))
    with pytest.raises(SystemExit, match="was made with other content: "):
        here(*arguments)


def test_targets_of_one_length_have_no_arm_of_matched_length(here, tmp_path):
    pytest.importorskip("trl")
    model = make_tiny(tmp_path / "tiny", ends=5, max_position_embeddings=2048, initializer_range=0.05)
    rows = [{"question": f"Letter {i}?", "options": ["a", "b"], "answer": "AB"[i % 2]} for i in range(20)]
    Dataset.from_list(rows).to_json(str(tmp_path / "rows.jsonl"))
    out = tmp_path / "result.json"
    here("--task", "arc", "--data", tmp_path / "rows.jsonl", "--model", model, "--seeds", "1", "--rows", "12", "--test",
         "4", "--epochs", "1", "--arms", "random", "--out", out)  # fmt: skip
    assert set(json.loads(out.read_text())["seeds"]["1"]["arms"]) == {"random"}
