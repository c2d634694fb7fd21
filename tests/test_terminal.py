"""Text of the data is shown in the terminal; it does not act there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from datasets import Dataset

from clear_datasets import Clear
from clear_datasets.terminal import fail, progress, summary, visible
from tests.conftest import make_tiny
from tests.test_cli import here, run

ACTS = ["\x1b[2J", "\x1b]0;title\x07", "\x9b2J", "\x1b]8;;x:y\x1b\\", "a\rb", "\x08\x08", "\u202ecba", "\u2067x"]


@pytest.mark.parametrize("text", ACTS)
def test_a_summary_shows_what_would_act(text, capsys):
    rows = {"question": [text, "[red]:bomb:"], "answer": [f"x{text}x", "[/red]"], "clear_confidence": [0.1, 0.9],
            "clear_error": [f"the server says {text}", ""], "clear_decision": ["drop", "keep"]}  # fmt: skip
    summary(Dataset.from_dict(rows), Path(f"out{text}"), Clear(f"model{text}"), 0.5)
    shown = capsys.readouterr().err
    assert not set(shown) & set("\x1b\x9b\x07\x08\r\u202e\u2067")
    assert shown.count(visible(text)) >= (4 if "\r" not in text else 2)  # a line break in a text is a space
    assert "[red]:bomb:" in shown
    with pytest.raises(typer.Exit):
        fail(f"no such file: {text}", 1)
    assert capsys.readouterr().err == f"clear-datasets: no such file: {visible(text)}\n"


def test_harmless_text_stays_as_it_is():
    text = "naïve 日本語 שלום مرحبا 👩‍👩‍👧 é\u200f\tx\ny\\x1b"
    assert visible(text) == text
    assert visible("\ud800") == "\\ud800"  # half a pair; no stream takes it


def test_the_command_line_shows_rows_and_names_of_files_that_would_act(tmp_path):
    model = make_tiny(tmp_path / "model", ends=5, initializer_range=0.05, max_position_embeddings=4096)
    rows = [{"question": f"Where {text}?", "answer": f"here {text}"} for text in ACTS]
    (tmp_path / "rows\x1b[2J.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for colour in ({}, {"FORCE_COLOR": "1"}):
        out = tmp_path / "out.jsonl"
        arguments = ("score", tmp_path / "rows\x1b[2J.jsonl", "-o", out, "--model", model, "--samples", "1")
        done = run(*arguments, **colour) if colour else here(*arguments)
        assert done.returncode == 0, done.stderr
        assert "\\x1b" in done.stderr
        assert ("\x1b" in done.stderr) == bool(colour)  # its own colours
        for text in ("\x1b[2J", "\x1b]", "\x9b", "\x07", "\u202e", "\u2067"):
            assert text not in done.stderr
        assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == [r["answer"] for r in rows]
    for command in (
        ("score", tmp_path / "no\x1b[2J.jsonl", "-o", out, "--model", model),
        ("push", tmp_path / "rows\x1b[2J.jsonl", "me/x"),
        ("cache", "info", "--folder", tmp_path / "answers\x1b[2J"),
    ):
        done = here(*command)
        assert "\\x1b[2J" in done.stdout + done.stderr
        assert "\x1b" not in done.stdout + done.stderr


def test_a_log_without_a_terminal_shows_how_far_a_run_is(capsys, monkeypatch):
    monkeypatch.setattr("clear_datasets.terminal._NEWS", 0.0)
    with progress("scoring", 2_000) as advance:
        advance(1_000, False)
        assert "scoring: 1,000 of 2,000 rows, " in capsys.readouterr().err
