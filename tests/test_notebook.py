"""The notebook runs from its first cell to its last, on a CPU, with a tiny model and a few rows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import make_tiny

ROOT = Path(__file__).parent.parent


def run(folder: Path, model: str, rows: int) -> str:
    """Run the notebook in a folder with other parameters; what its cells print."""
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    (folder / "data").mkdir()
    lines = (ROOT / "scripts" / "data" / "demo.jsonl").read_text().splitlines()[:rows]
    (folder / "data" / "rows.jsonl").write_text("\n".join(lines) + "\n")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4)
    [parameters] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    known = {line.partition(" = ")[0] for line in parameters.source.splitlines() if " = " in line}
    own = {"MODEL": model, "DATA": "data", "ROWS": rows, "EPOCHS": 1, "REPO": "",
           "COLUMNS": {"prompt": "question", "context": "context", "response": "answer"}}  # fmt: skip
    assert known == set(own)
    parameters.source = "\n".join(f"{name} = {value!r}" for name, value in own.items())
    client.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", ()) if o.output_type == "stream")


def test_the_notebook_has_no_outputs_and_opens_in_colab():
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    assert "/blob/main/notebooks/quickstart.ipynb)" in "".join(notebook["cells"][0]["source"])


def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("altair")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # It says "Yes" and "No" often enough for a score.
    model = make_tiny(tmp_path / "tiny", ends=5, initializer_range=0.05, max_position_embeddings=4096)
    said = run(tmp_path, str(model), 4)
    assert "2 of 4 rows are kept" in said
    assert (tmp_path / "report.html").stat().st_size > 100_000
    curated = [json.loads(line) for line in (tmp_path / "curated.jsonl").read_text().splitlines()]
    assert 2 <= len(curated) <= 4
    assert set(curated[0]) == {"question", "context", "answer"}
