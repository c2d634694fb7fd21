"""scripts/benchmark_peers.py with what asks no model: blocks, going on, and figures that can be worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def command(out: Path, *methods: str, rows: int = 400) -> list[str]:
    first = [sys.executable, "scripts/benchmark_peers.py", "--model", "any", "--task", "squad_wrong_sentence"]
    return [*first, "--rows", str(rows), "--block", "150", "--methods", *methods, "--out", str(out)]


def compare(out: Path, *methods: str, rows: int = 400) -> dict[str, dict]:
    subprocess.run(command(out, *methods, rows=rows), cwd=ROOT, check=True)
    (entry,) = json.loads(out.read_text())
    assert (entry["rows"], entry["good"].count(0)) == (400, entry["wrong"])
    return entry["methods"]


def test_a_run_goes_on_where_it_ended(tmp_path):
    told = compare(tmp_path / "at_once.json", "length")
    assert [block["rows"] for block in told["length"]["blocks"]] == [150, 150, 100]
    assert told["length"]["summary"]["rows"] == 400
    assert told["length"]["summary"]["auroc"][0] > 0.9  # a sentence is longer than an answer
    out = tmp_path / "peers.json"
    assert compare(out, "length", rows=100)["length"]["scores"] == told["length"]["scores"][:150]  # a whole block
    again = compare(out, "length", "random")
    assert list(again) == ["length", "random"]
    assert again["length"]["scores"] == told["length"]["scores"]
    assert again["length"]["blocks"] == told["length"]["blocks"]
    assert again["length"]["summary"] == told["length"]["summary"]
    compare(out, "length", "random")
    assert json.loads(out.read_text())[0]["methods"] == again  # all was there


def test_rows_of_other_settings_do_not_go_into_one_figure(tmp_path):
    out = tmp_path / "peers.json"
    before = compare(out, "length", rows=100)
    other = [*command(out, "length"), "--concurrency", "8"]
    done = subprocess.run(other, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "has rows of length with " in done.stderr
    assert json.loads(out.read_text())[0]["methods"] == before


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_peers

    return benchmark_peers


def test_a_method_beside_ours(peers):
    good = [True, True, False, False]
    blocks = [{"rows": 2, "seconds": 1.0, "requests": 6}, {"rows": 2, "seconds": 3.0, "requests": 6}]
    ours = {"scores": [4.0, 3.0, 2.0, 1.0], "blocks": blocks}
    slow = [{"rows": 2, "seconds": 10.0, "requests": 20}, {"rows": 2, "seconds": 6.0, "requests": 21}]
    theirs = {"scores": [4.0, 1.0, None, 2.0], "parts": {"judge": [1.0, 1.0, 0.0, 0.0]}, "blocks": slow}
    found = peers.summary(theirs, ours, good)
    assert (found["rows"], found["unscored"], found["auroc"][0]) == (4, 1, 0.5)
    assert found["auroc_of_parts"]["judge"][0] == 1.0
    assert found["auroc_less_ours"][0] == -0.5  # of the three rows that both score
    assert found["seconds_over_ours"] == {"median": 6.0, "least": 2.0, "most": 10.0}
    assert (found["rows_per_second"], found["requests_per_row"]) == (0.25, 10.25)
    assert "auroc_less_ours" not in peers.summary(ours, ours, good)
