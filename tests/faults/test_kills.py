"""Real processes that are killed, and run again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clear_datasets.engines.cache import close_stores, store_of
from tests.conftest import make_tiny
from tests.test_cli import here

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("options", [("--kills", "2"), ("--kills", "1", "--num-proc", "2")], ids=" ".join)
def test_killed_runs_lose_nothing(options, tmp_path):
    out = tmp_path / "found.json"
    # 25 requests a batch. A life that is killed has asked for 60 at least: without the cache all are asked twice.
    size = ["--rows", "80", "--batch-size", "5", "--after", "60"]
    command = [sys.executable, "scripts/fault_test.py", *size, *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=420)
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = json.loads(out.read_text())
    assert found["rows lost"] == 0
    assert found["rows that differ by more than .00001"] == 0
    assert found["requests of an undisturbed run"] == 16 * 25
    assert found["asked twice"] <= 25 * found["processes"] * found["kills"]  # the batch that is under way


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_ended_goes_on_from_its_answers(tmp_path, answers, sign):
    """In the midst of a batch, of which nothing is beside OUT yet."""
    model = make_tiny(tmp_path / "model", ends=2)
    rows = [{"question": f"Where is {i}?", "answer": f"at {i}"} for i in range(160)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "scored.jsonl"
    command = [sys.executable, "-m", "clear_datasets.cli", "score", str(tmp_path / "rows.jsonl"), "-o", str(out)]
    command += ["--model", str(model), "--batch-size", "160"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job may ignore it
    options: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "preexec_fn": heard}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        end = time.monotonic() + 120
        while stored() < 100 and time.monotonic() < end:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, sign)
        said = process.communicate(timeout=60)[1]
    known = stored()
    assert known >= 100
    assert not out.exists()
    if sign == signal.SIGINT:
        assert process.returncode == 130
        last = said.strip().splitlines()[-1]
        assert last == "clear-datasets: interrupted; what was answered is kept, and the same command goes on from there"
    done = here(*command[3:])
    assert done.returncode == 0, done.stderr
    [taken] = re.findall(r"([\d,]+) answers from the cache", done.stderr)
    assert int(taken.replace(",", "")) >= known
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question"] for row in scored] == [row["question"] for row in rows]
    assert known < stored()


def stored() -> int:
    """Answers in the file, as another process sees it."""
    close_stores()
    return store_of().info().answers if store_of().path.exists() else 0
