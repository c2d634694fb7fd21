"""Disks that are full, folders that cannot be written, models that are not there, memory that does not suffice."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from typer.testing import CliRunner, Result

from clear_datasets import BSDetector, Clear, report
from clear_datasets.cli import app
from clear_datasets.engines import EngineError
from clear_datasets.engines.cache import close_stores, store_of
from clear_datasets.engines.transformers import Transformers
from tests.conftest import make_tiny
from tests.engines.test_cache import ROWS, Counting, asked, same
from tests.hub.server import Hub
from tests.test_cli import run

__all__ = ["asked"]  # a fixture


@dataclass
class Disk:
    """A small file system of its own."""

    folder: Path

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes."""
        free = os.statvfs(self.folder)
        with (self.folder / "filler").open("wb") as f:
            f.write(b"0" * max(0, free.f_bavail * free.f_frsize - left))

    def make_room(self) -> None:
        (self.folder / "filler").unlink()


def mount(*arguments: str | Path) -> None:
    done = subprocess.run(["mount", *map(str, arguments)], check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount")
    mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", folder)
    yield Disk(folder)
    close_stores()
    subprocess.run(["umount", str(folder)], check=False)


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny(tmp_path_factory.mktemp("even"), ends=5, initializer_range=0.05, max_position_embeddings=4096))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten rows with a long column that no model is asked about."""
    rows = [{"question": f"Where is {i}?", "answer": f"at {i}", "note": os.urandom(20_000).hex()} for i in range(10)]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


def refused(result: Result, *pieces: str) -> None:
    """One line that says what is wrong, and no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    last = result.stderr.strip().split("\n")[-1]
    assert last.startswith("clear-datasets: ")
    for piece in pieces:
        assert piece in last
    assert "Traceback" not in result.output


def left_in(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and "clear_stages" not in f.parts}


@pytest.mark.parametrize("command, name, left", [
    ("score", "out.jsonl", 0),  # no room for a batch
    ("score", "out.jsonl", 100_000),  # room for all batches, none for OUT
    ("score", "out", 100_000),
    ("curate", "out.jsonl", 100_000),  # a Parquet file is the first that it writes
])  # fmt: skip
def test_a_full_disk_leaves_what_was_there_and_the_same_command_goes_on(command, name, left, disk, source, even):
    out = disk.folder / name
    if out.suffix:
        out.write_text("old")
    else:
        Dataset.from_dict({"old": [1]}).save_to_disk(out)
    before = left_in(disk.folder)
    arguments = (command, source, "-o", out, "--model", even, "--samples", "1", "--batch-size", "4")
    disk.fill(left)
    result = cli(*arguments)
    refused(result, "No space left on device", str(disk.folder))
    assert left_in(disk.folder) == before | {"filler"}
    assert (out.read_text() == "old") if out.suffix else (load_from_disk(out)["old"][:] == [1])
    assert not [f for f in disk.folder.rglob(".*") if f.name != ".cache"]
    known = store_of().info().answers
    assert known == (50 if left else 20)  # of all rows, or of the batch that could not be written: 5 a row
    disk.make_room()
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    assert store_of().info().answers == 50
    assert ("answers from the cache" in result.stderr) == (not left)
    assert len(out.read_text().splitlines() if out.suffix else load_from_disk(out)) == (
        5 if command == "curate" else 10
    )


LARGE = """
import os, sys
from pathlib import Path
from datasets import Dataset
from clear_datasets.files import write
try:
    write(Dataset.from_dict({"text": [os.urandom(2000).hex() for _ in range(2000)]}), Path(sys.argv[1]))
except OSError as error:
    print(error)
"""


def test_a_parquet_file_that_does_not_fit_is_an_error_and_no_abort(disk):
    out = disk.folder / "out.parquet"
    out.write_text("old")
    done = subprocess.run([sys.executable, "-c", LARGE, str(out)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "cannot write" in done.stdout
    assert "No space left on device" in done.stdout
    assert left_in(disk.folder) == {"out.parquet"}
    assert out.read_text() == "old"


def test_a_page_that_does_not_fit(disk, tmp_path):
    pytest.importorskip("vl_convert")
    scored = Dataset.from_dict({**ROWS, **Clear(engine=Counting()).score(ROWS)})
    page = disk.folder / "page.html"
    page.write_text("old")
    disk.fill(1000)
    with pytest.raises(OSError, match=r"cannot write .*page\.html \(No space left on device\)"):
        report(scored, page)
    assert left_in(disk.folder) == {"page.html", "filler"}
    assert page.read_text() == "old"


@pytest.mark.parametrize("left", [0, 50_000], ids=["from the beginning", "in the middle"])
def test_a_full_disk_of_the_cache_ends_no_run(left, disk, asked):
    clear = Clear(engine=Counting(), cache=disk.folder / "answers")
    if left:
        clear.score({name: values[:5] for name, values in ROWS.items()})
    disk.fill(left and 4096)
    many = {"question": [f"{q} {i}" for i in range(20) for q in ROWS["question"]], "answer": ROWS["answer"] * 20}
    with pytest.warns(UserWarning, match="cannot use the cache of answers"):
        found = clear.score(many)
    same(found, replace(clear, cache=False).score(many))
    disk.make_room()
    clear.score({"question": ["Where?"], "answer": ["here"]})  # writes what had to wait, too
    close_stores()
    asked.clear()
    same(found, clear.score(many))
    assert not asked


def test_a_read_only_cache_answers_what_it_knows(tmp_path, asked):
    folder, seen = tmp_path / "answers", tmp_path / "seen"
    clear = Clear(engine=Counting(), cache=folder)
    first = clear.score({name: values[:5] for name, values in ROWS.items()})
    close_stores()
    seen.mkdir()
    mount("--bind", folder, seen)
    try:
        mount("-o", "remount,ro,bind", seen)
        asked.clear()
        with pytest.warns(UserWarning, match="is read-only: what is asked now is not kept"):
            found = replace(clear, cache=seen).score(ROWS)
        assert asked == {"samples": 75, "labels": 30, "texts": 30}
        same({n: v[:5] for n, v in found.items()}, first)
    finally:
        close_stores()
        subprocess.run(["umount", str(seen)], check=False)


def test_a_read_only_folder_without_a_cache(tmp_path, asked):
    tmp_path.joinpath("seen").mkdir()
    mount("--bind", tmp_path / "seen", tmp_path / "seen")
    try:
        mount("-o", "remount,ro,bind", tmp_path / "seen")
        with pytest.warns(UserWarning, match="cannot use the cache of answers"):
            found = Clear(engine=Counting(), cache=tmp_path / "seen" / "answers").score(ROWS)
        assert not any(found["clear_error"])
    finally:
        close_stores()
        subprocess.run(["umount", str(tmp_path / "seen")], check=False)


def changed(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def written(name: str, content: bytes | int | None) -> Callable[[Path], None]:
    """Replace a file by other bytes or by its first ones, or remove it."""

    def change(folder: Path) -> None:
        old = (folder / name).read_bytes()
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(old[:content] if isinstance(content, int) else content)

    return change


CHECKPOINTS = {
    "weights cut in half": (written("model.safetensors", 50_000), "not fully covered"),
    "weights of nonsense": (written("model.safetensors", b"\xff" * 5000), "header"),
    "empty weights": (written("model.safetensors", b""), "header"),
    "no weights": (written("model.safetensors", None), "no file named model.safetensors"),
    "a garbled config": (written("config.json", b"\0garbage{"), "not a valid JSON file"),
    "a config of another shape": (written("config.json", b"[1]"), "must be a mapping"),
    "an empty config": (written("config.json", b"{}"), "Unrecognized model"),
    "no config": (written("config.json", None), "Unrecognized model"),
    "a wrong type in the config": (changed(hidden_size="big"), "hidden_size"),
    "another size": (changed(hidden_size=128), "mismatched"),
    "more layers than weights": (changed(num_hidden_layers=3), "lacks 9 of its weights"),
    "an unknown architecture": (changed(model_type="nosuch"), "nosuch"),
    "no tokenizer": (written("tokenizer.json", None), "tokenizer"),
    "a garbled tokenizer": (written("tokenizer.json", b"{"), "line 1"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_broken_checkpoint_says_what_is_wrong(name, tiny, tmp_path):
    damage, reason = CHECKPOINTS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    damage(folder)
    with pytest.raises(EngineError, match=reason) as caught:
        Clear(engine=Transformers(str(folder), dtype="float32")).score(ROWS)
    assert f"cannot load the model {folder}: " in str(caught.value)
    assert "is the folder a whole checkpoint" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_checkpoint_from_the_command_line_and_a_whole_one_goes_on(even, source, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "out.jsonl"
    shutil.copytree(even, folder)
    written("model.safetensors", 5000)(folder)
    arguments = ("score", source, "-o", out, "--model", folder, "--samples", "1")
    refused(cli(*arguments), "cannot load the model", "whole checkpoint")
    shutil.copytree(even, folder, dirs_exist_ok=True)
    assert cli(*arguments).exit_code == 0
    assert len(out.read_text().splitlines()) == 10


def test_a_tokenizer_without_a_chat_template_works(tmp_path):
    folder = make_tiny(tmp_path, template=None, ends=5, initializer_range=0.05)
    found = Clear(engine=Transformers(str(folder), dtype="float32"), confidence=BSDetector(k=1)).score(ROWS)
    assert not any(found["clear_error"])


@pytest.mark.parametrize("model, offline, reason", [
    ("org/none", "0", "org/none"),
    ("org/gated", "0", "gated"),
    ("org/none", "1", "connect"),
])  # fmt: skip
def test_a_model_of_the_hub_that_cannot_be_had(model, offline, reason, hub: Hub, source, tmp_path):
    hub.gated.add("org/gated")
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    began = time.monotonic()
    done = run("score", source, "-o", tmp_path / "out.jsonl", "--model", model, **settings)
    assert time.monotonic() - began < 60
    assert done.returncode == 1
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith(f"clear-datasets: cannot load the model {model}: ")
    assert reason in last
    assert "HF_TOKEN" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


SHORT = """
import resource, sys, torch, transformers
from transformers import LlamaForCausalLM
from clear_datasets import BSDetector, Clear
from clear_datasets.engines.transformers import Transformers
torch.set_num_threads(1)
torch.ones(300, 300) @ torch.ones(300, 300)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
engine = Transformers(sys.argv[1], dtype="float32", batch_tokens=10**6)
ask = [[{"role": "user", "content": "Where? " * int(sys.argv[3])}]]
if sys.argv[3] != "1":
    engine.choose(ask[:0] + [[{"role": "user", "content": "Where?"}]], ["Yes", "No"])  # loads it
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
try:
    engine.choose(ask, ["Yes", "No"])
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
@pytest.mark.parametrize("room, words, reason", [
    (60, 1, "EngineError cannot load the model"), (30, 5000, "EngineError there is too little memory for one request"),
])  # fmt: skip
def test_no_free_memory(room, words, reason, tmp_path):
    assert resource.RLIMIT_AS
    folder = make_tiny(
        tmp_path, hidden_size=1024, intermediate_size=4096, num_attention_heads=16, max_position_embeddings=10**6
    )
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(folder), str(room), str(words)],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.startswith(reason), done.stdout + done.stderr
    assert "memory" in done.stdout


def test_a_cache_that_works_says_nothing(asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not np.isnan(Clear(engine=Counting()).score(ROWS)["clear_confidence"]).any()
