"""Every Python block of the README and the docs runs as it stands, from the first one of its page to the last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = """
import re, subprocess, sys

page, after = sys.argv[1:]
text, names = open(page).read(), {"__name__": "__main__"}
for block in re.finditer(r"^```python\\n(.*?)^```", text, re.M | re.S):
    code = "\\n" * text.count("\\n", 0, block.start(1)) + block[1]
    if '"__main__"' in code:  # a script
        open("script.py", "w").write(code)
        subprocess.run([sys.executable, "script.py"], check=True)
    else:
        exec(compile(code, page, "exec"), names)
    exec(after, names)
"""
SCORES = """
from datasets import Dataset
rows = Dataset.from_json("train.jsonl").select(range(4)).map(clear.score, batched=True)
reasons = [e for e in rows["clear_error"] if e]
if type(clear.engine).__name__ == "Pipeline":  # a tiny model says Yes or No by chance
    reasons = [e for e in reasons if "none of its labels" not in e]
assert not reasons, reasons
"""


@pytest.fixture
def run(tmp_path, hub):
    """Run a page in a folder with the model and the rows that the pages name; what it says, and the Hub."""
    pytest.importorskip("trl")
    pytest.importorskip("altair")
    make_tiny(tmp_path / "Qwen" / "Qwen2.5-7B-Instruct", ends=5, max_position_embeddings=2048, initializer_range=0.05)
    lines = (ROOT / "scripts" / "data" / "demo.jsonl").read_text().splitlines()[:24]
    rows = [{k: row[k] for k in ("context", "question", "answer")} for row in map(json.loads, lines)]
    text = "".join(json.dumps({**row, "options": ["yes", "no"]}) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(text)
    named = "".join(json.dumps({"q": r["question"], "a": r["answer"], "persona": ""}) + "\n" for r in rows)
    (tmp_path / "mine.jsonl").write_text(named)
    (tmp_path / "run.py").write_text(RUN)
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    settings |= {"HF_HOME": "home", "CLEAR_MODEL": "Qwen/Qwen2.5-7B-Instruct", "PYTHONWARNINGS": "ignore"}

    def run(page: Path, after: str = "") -> None:
        command = [sys.executable, "run.py", str(page), after]
        env = os.environ | settings
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"

    return run


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=lambda p: p.name)
def test_every_block_runs(run, page):
    run(page, SCORES if page.name == "extend.md" else "")
