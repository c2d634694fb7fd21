"""A key and a token are planted, used, and then looked for in everything that was written."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher

from clear_datasets import Clear
from clear_datasets.engines.vllm import VLLM
from tests.hub.server import TOKENS, Hub
from tests.test_cli import run

pytest.importorskip("openai")
pytest.importorskip("altair")

from clear_datasets.engines.openai import OpenAI
from tests.engines.test_openai import Reply, Server, content, failed, said

KEYS, TOKEN = ("sk-planted-first-5up3r", "sk-planted-other-53cr37"), "hf_planted70k3n"
WORD = "Samarkand"  # of the data: it has to be found where a secret must not be
ROOT = Path(__file__).parents[2]


def job(folder: Path, server: Server, hub: Hub, key: str, how: str) -> bytes:
    """Run all that writes something; what it said."""
    for name in ("home", "answers", "tmp"):
        (folder / name).mkdir(exist_ok=True)
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "CLEAR_CACHE": str(folder / "answers"),
                   "TMPDIR": str(folder / "tmp"), "HF_DEBUG": "1", "OPENAI_LOG": "debug",
                   "OPENAI_API_KEY": key if how == "environment" else ""}  # fmt: skip
    environment.pop("HF_DATASETS_CACHE", None)
    command = [sys.executable, "-m", "tests.faults.secrets_job", str(folder), server.url]
    given = key.encode() if how == "argument" else b""
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, input=given)
    assert done.returncode == 0, done.stderr[-5000:].decode()
    return done.stdout + done.stderr


def scripted(server: Server) -> None:
    """Answers, but for two models: one's prompts are refused, the other's server is broken; both repeat the key."""

    def reply(body: dict[str, Any]) -> Reply:
        words = f"key {server.asked[-1]['key']} has no access; headers: Authorization: {server.asked[-1]['key']}"
        if body["model"] == "refused" and WORD in content(body):
            return failed(400, words)
        if body["model"] == "broken":
            return failed(500, words)
        text = f"to {WORD}" if body["model"] == "writer" else "there"
        return said(text, logprobs={"Yes": 0.6, "No": 0.4})(body)

    server.reply = reply


def contents(folder: Path, hub: Hub, output: bytes) -> Iterator[tuple[str, bytes]]:
    """All that was written or sent to the Hub: files as they are, what is compressed as text, output, commits."""
    yield "output", output
    for file in folder.rglob("*"):
        if file.is_file():
            yield str(file.relative_to(folder)), file.read_bytes()
            if file.read_bytes()[:4] == b"PAR1":  # those of the Hub have a hash for a name
                table = pq.read_table(file)
                yield f"{file.relative_to(folder)} (columns)", repr((table.to_pydict(), table.schema.metadata)).encode()
    for name, repo in hub.repos.items():
        for commit in repo.commits.values():
            yield from ((f"{name}/{path}", f.content or b"") for path, f in commit.items())
        yield f"{name} (commits)", repr((repo.messages, [*repo.branches])).encode()


def forms(secret: str) -> list[bytes]:
    """A secret as it is, and in base64 wherever it begins."""
    plain = secret.encode()
    return [plain, *(base64.b64encode(b"\0" * i + plain)[4 if i else 0 : -4] for i in range(3))]


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    scripted(one)
    yield one
    one.http.shutdown()


def test_no_secret_is_in_anything_that_is_written(server, hub, tmp_path, monkeypatch):
    monkeypatch.setitem(TOKENS, TOKEN, True)
    rows = [{"question": f"Where is {WORD} {i}?", "answer": f"there {i % 3}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"question": "And?", "answer": "there"}])))
    output = job(tmp_path, server, hub, KEYS[0], "environment")
    assert {a["key"] for a in server.asked} == {f"Bearer {KEYS[0]}"}  # it was used
    assert hub.repos["me/x"].messages[-1].startswith("Curated")  # and so was the token
    assert KEYS[0] not in repr([{n: v for n, v in a.items() if n != "key"} for a in server.asked])
    for piece in (b"DEBUG", b"fails for broken", b"key Bearer ***"):
        assert piece in output
    hashes, asked = json.loads((tmp_path / "hashes.json").read_text()), len(server.asked)
    found = list(contents(tmp_path, hub, output))
    output = job(tmp_path, server, hub, KEYS[1], "argument")  # another key: nothing is asked again but what failed
    assert {(a["model"], a["key"]) for a in server.asked[asked:]} == {("broken", f"Bearer {KEYS[1]}")}
    assert json.loads((tmp_path / "hashes.json").read_text()) == hashes
    found += contents(tmp_path, hub, output)
    leaks = [name for name, data in found for s in (*KEYS, TOKEN) for form in forms(s) if form in data]
    assert not leaks
    # The search would have seen them: it sees the data, in every kind of file.
    seen = " ".join(name for name, data in found if WORD.encode() in data)
    for place in (".arrow", "answers.sqlite", "(columns)", "report.html", "curated.jsonl", "scored.csv",
                  "README.md", "lfs/"):  # fmt: skip
        assert place in seen, place
    assert "clear_stages" in " ".join(name for name, _ in found)
    assert {"curated.jsonl.settings.json", "clear.pickle", "output"} <= {name for name, _ in found}


def test_a_refused_row_says_why_without_the_key(server):
    rows = {"question": [f"Where is {WORD}?", "Who?"], "answer": ["there", "there"]}
    clear = Clear(engine=OpenAI("refused", server.url, api_key=KEYS[0], retries=0))
    errors = Dataset.from_dict(rows).map(clear.score, batched=True)["clear_error"][:]
    assert errors[0].startswith("the server refuses this prompt: key Bearer *** has no access")
    assert errors[1] == ""
    assert KEYS[0] not in errors[0]


def test_a_push_that_is_refused_does_not_say_the_token(hub, tmp_path, monkeypatch):
    rows = {"question": ["Who?"] * 4, "answer": ["me"] * 4, "clear_confidence": [0.1, 0.2, 0.3, 0.4],
            "clear_error": [""] * 4, "clear_decision": ["drop", "drop", "keep", "keep"]}  # fmt: skip
    Dataset.from_dict(rows).to_parquet(tmp_path / "out.parquet")
    address = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "h")}
    # With a traceback, in which the line is that is said without.
    done = run("push", tmp_path / "out.parquet", "me/x", HF_TOKEN=TOKEN, CLEAR_DEBUG="1", HF_DEBUG="1", **address)
    assert done.returncode == 1
    assert "401" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert not hub.repos


def test_another_key_is_the_same_engine(monkeypatch):
    def state() -> list[str]:
        return [Hasher.hash(x) for x in (OpenAI("m"), Clear(engine=OpenAI("m")), Clear(engine=OpenAI("m")).score)]

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    none = state()
    monkeypatch.setenv("OPENAI_API_KEY", KEYS[0])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert state() == none
    assert OpenAI("m", api_key=KEYS[0]) == OpenAI("m", api_key=KEYS[1])
    assert hash(OpenAI("m", api_key=KEYS[0])) == hash(OpenAI("m", api_key=KEYS[1]))


def test_a_token_is_no_option(tmp_path):
    with pytest.raises(ValueError, match="set HF_TOKEN") as caught:
        VLLM("m", hf_token=TOKEN)
    assert TOKEN not in str(caught.value)
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from clear_datasets.finetune import finetune

    for options in ({"hub_token": TOKEN}, {"model_init_kwargs": {"token": TOKEN}}):
        with pytest.raises(ValueError, match="set HF_TOKEN") as caught:
            finetune(Dataset.from_dict({"question": ["a"], "answer": ["b"]}), "m", tmp_path / "out", **options)
        assert TOKEN not in str(caught.value)
    assert not (tmp_path / "out").exists()
