"""Fine-tuning between the stages, on the tiny model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from clear_datasets import Clear
from clear_datasets.engines.checkpoint import load
from clear_datasets.engines.transformers import Transformers
from tests.conftest import make_tiny

pytest.importorskip("trl")
pytest.importorskip("peft")

from clear_datasets.finetune import finetune

ROWS = Dataset.from_dict({"question": [f"Who is {i}?" for i in range(8)], "answer": ["Yes, No"] * 8})
FAST = {"num_train_epochs": 20, "learning_rate": 2e-2, "save_steps": 5, "logging_steps": 1}


def test_a_writer_learns_the_responses_and_the_base_stays_as_it_was(tiny, tmp_path):
    base = Transformers(tiny, dtype="float32")
    prompts = [[{"role": "user", "content": q}] for q in ROWS["question"]]
    before = base.generate(prompts, max_tokens=8)
    said = base.logprobs(prompts, ROWS["answer"][:])
    out = finetune(ROWS, tiny, tmp_path / "adapter", **FAST)
    state = max(Path(out).glob("checkpoint-*"), key=lambda p: p.stat().st_mtime) / "trainer_state.json"
    first = json.loads(state.read_text())["log_history"][0]["loss"]
    assert first == pytest.approx(-np.concatenate(said).mean(), rel=0.02)  # of the response and its end alone
    clear = Clear(engine=base).with_writer(out)
    wrong = Dataset.from_dict({**ROWS.to_dict(), "answer": ["Tie"] * 8})
    assert wrong.map(clear.propose, batched=True)["clear_candidate"][:] == ["Yes, No"] * 8
    assert ROWS.map(clear.propose, batched=True)["clear_candidate"][:] == [""] * 8  # it is the target
    assert base.generate(prompts, max_tokens=8) == before


def test_a_run_goes_on_from_its_last_checkpoint_and_is_not_repeated(tiny, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finetune(ROWS, tiny, whole, **FAST)
    program = "import sys; from tests.test_finetune import *; finetune(ROWS, *sys.argv[1:], **FAST)"
    with subprocess.Popen([sys.executable, "-c", program, tiny, str(broken)], cwd=Path(__file__).parents[1]) as run:
        while run.poll() is None and not (broken / "checkpoint-5" / "trainer_state.json").is_file():
            time.sleep(0.01)
        os.kill(run.pid, signal.SIGKILL)
    assert not (broken / "adapter_model.safetensors").exists()
    (broken / "checkpoint-999").mkdir()  # broken off while it was written
    for file in broken.glob("checkpoint-*/trainer_state.json"):
        state = json.loads(file.read_text())
        file.write_text(json.dumps({**state, "log_history": [{"step": 0, "mark": 1}, *state["log_history"]]}))
    finetune(ROWS, tiny, broken, **FAST)
    last = json.loads((broken / "checkpoint-20" / "trainer_state.json").read_text())
    assert last["log_history"][0] == {"step": 0, "mark": 1}  # it went on from one of those
    mine, theirs = (Transformers(tiny, dtype="float32").with_writer(str(f)) for f in (whole, broken))
    prompts = [[{"role": "user", "content": q}] for q in ROWS["question"]]
    for a, b in zip(mine.logprobs(prompts, ["Yes, No"] * 8), theirs.logprobs(prompts, ["Yes, No"] * 8), strict=True):
        np.testing.assert_allclose(a, b, atol=0.05)
    written = (broken / "adapter_model.safetensors").stat().st_mtime_ns
    finetune(ROWS, tiny, broken, **{**FAST, "save_steps": 10, "disable_tqdm": True})  # the weights would be the same
    assert (broken / "adapter_model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="a run with other rows, options: give another folder"):
        finetune(ROWS.select([0]), tiny, broken, **{**FAST, "num_train_epochs": 1})


def test_a_batch_of_long_rows_is_read_in_parts_and_engines_make_room(tmp_path):
    model = str(make_tiny(tmp_path / "model", max_position_embeddings=2048))
    engine = Transformers(model, dtype="float32")
    loaded = load(engine)
    rows = Dataset.from_dict({"question": ["Who?"] * 16, "answer": ["a b c d e f " * n for n in [1] * 15 + [50]]})
    out = Path(finetune(rows, model, tmp_path / "out", max_steps=2, save_steps=1))
    assert load(engine) is not loaded
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert (state["train_batch_size"], state["epoch"]) == (4, 1)  # two steps of two parts of four
    finetune(rows, model, out, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=8)  # the same
    with pytest.raises(ValueError, match="a run with other options"):
        finetune(rows, model, out, max_steps=2, per_device_train_batch_size=4)


def test_a_gguf_file_is_trained_as_the_folder_that_it_was_converted_into(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()[:16]
    shutil.copytree(tiny, tmp_path / "clear_datasets" / "models" / f"model-{digest}")
    out = finetune(ROWS, str(file), tmp_path / "out", **FAST)
    wrong = {**ROWS.to_dict(), "answer": ["Tie"] * 8}
    assert Clear(str(file)).with_writer(out).propose(wrong)["clear_candidate"] == ["Yes, No"] * 8


def test_what_cannot_be_trained_on(tiny, tmp_path):
    some = Dataset.from_dict({"question": ["Who?", ""], "answer": ["Ada", "x"]})
    with pytest.warns(UserWarning, match="1 of 2 rows are left out; the first one: .column 'question' is empty"):
        out = finetune(some, tiny, tmp_path / "all", lora=None, max_steps=1)
    assert Transformers(out, dtype="float32").generate([[{"role": "user", "content": "Who?"}]], max_tokens=2)
    with pytest.raises(ValueError, match="none of the 1 rows can be read"):
        finetune(some.select([1]), tiny, tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="files of something else"):
        finetune(ROWS, tiny, tmp_path / "other")


def test_a_model_may_be_given_as_a_path(tiny, tmp_path):
    out = finetune(ROWS, Path(tiny), tmp_path / "out", max_steps=1)
    written = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    assert finetune(ROWS, tiny, tmp_path / "out", max_steps=1) == out
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == written  # it is the same run
