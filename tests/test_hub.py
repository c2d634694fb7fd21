"""push_to_hub with the real clients, against a Hub on loopback."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import httpx
import numpy as np
import PIL.Image
import pytest
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import OfflineModeIsEnabled

from clear_datasets import NLI, BSDetector, Clear, Columns, curated, decide, threshold
from clear_datasets.card import settings_of
from clear_datasets.engines.vllm import VLLM
from clear_datasets.hub import _again as hub_again
from tests.conftest import make_tiny
from tests.hub.server import Fault, File, Repo
from tests.test_cli import command, run

pytest.importorskip("altair")

NAN = float("nan")


@pytest.fixture
def client(hub, tmp_path, monkeypatch) -> Iterator[Callable[..., Any]]:
    """Calls in a process whose clients know this Hub: they read its address when they are imported."""
    for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_writer", "HF_HUB_DISABLE_XET": "1",
                        "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda call, *arguments, **named: pool.submit(call, *arguments, **named).result()


def decided(n: int = 12) -> Dataset:
    rows = {
        "question": [f"Where is {i}?" for i in range(n)],
        "answer": [f"at {i}" for i in range(n)],
        "clear_confidence": [NAN, *np.linspace(0, 1, n - 1)],
        "clear_error": ["column 'question' is empty", *[""] * (n - 1)],
        "clear_candidate": ["", "", "here", *[""] * (n - 3)],
        "clear_preference": [NAN, NAN, 0.9, *[NAN] * (n - 3)],
    }
    return Dataset.from_dict(rows).map(decide(0.5), batched=True)


def push(rows: Any, repo: str = "me/x", **options: Any) -> str:
    from clear_datasets.hub import push_to_hub

    return push_to_hub(curated(rows), repo, audit=rows, **options)


def load(repo: str = "me/x", config: str = "default", revision: str | None = None) -> Any:
    from datasets import load_dataset

    return load_dataset(repo, config, revision=revision, download_mode="force_redownload")


def test_what_was_pushed_is_loaded_and_the_card_says_what_was_done(hub, client):
    rows = decided()
    address = client(push, rows, clear=Clear("org/model", revision="v2"), settings={"gamma": 0.5, "command": "clear x"})
    assert address == f"{hub.url}/datasets/me/x/commit/{hub.repos['me/x'].branches['main']}"
    kept = client(load)
    assert list(kept) == ["train"]
    assert kept["train"].to_list() == [{k: r[k] for k in ("question", "answer")} for r in curated(rows)]
    audit = client(load, config="audit")["train"]
    assert audit.features == rows.features
    np.testing.assert_equal(audit.to_dict(), rows.to_dict())
    card = hub.text("me/x", "README.md")
    for piece in ("| kept | 6 |", "| dropped | 5 |", "| replaced | 1 |", "| without a score | 1 |", "org/model",
                  "| v2 |", "| gamma | 0.5 |", "clear x", "arXiv:2403.12776", "- synthetic", "machine-generated",
                  "- n<1K", "<pre>here</pre>", "(clear_confidence.png)"):  # fmt: skip
        assert piece in card
    assert len(hub.repos["me/x"].messages) == 2  # the Hub's own, and one


class Mine:
    """An estimator of one's own."""


def made_again(card: str, folder: str) -> list[dict[str, Any]]:
    """What the lines of Python on a card make."""
    os.chdir(folder)
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    return names["ds"].to_list()


def test_the_lines_on_the_card_make_the_same_rows_again(hub, client, tmp_path):
    model = make_tiny(tmp_path / "model", ends=5, initializer_range=0.05)
    rows = Dataset.from_dict({"q": [f"Where is {i}?" for i in range(8)], "a": [f"at {i}" for i in range(8)]})
    client(rows.push_to_hub, "org/rows", "named", split="test")
    rows = client(load, "org/rows", "named")["test"]
    clear = Clear(str(model), format=Columns("q", "a"), confidence=BSDetector(k=2))
    rows = rows.map(clear.score, batched=True)
    gamma = np.float64(threshold(rows, 0.4))
    rows = rows.map(decide(gamma, failed="drop"), batched=True)
    client(push, rows, clear=clear, settings={"gamma": gamma, "failed": "drop"})
    card = hub.text("me/x", "README.md")
    assert "from clear_datasets import BSDetector, Clear, Columns, Jaccard, curated, decide\n" in card
    assert str(tmp_path) not in card
    assert client(made_again, card, str(tmp_path)) == curated(rows).to_list()
    client(push, rows.select(range(6)), "me/y", clear=clear, settings={"gamma": gamma})  # lines would take all rows
    client(push, rows, "me/z", clear=clear.with_writer("adapter"), settings={"gamma": gamma})
    client(push, rows, "me/w", clear=Clear(format=clear.format, confidence=Mine()), settings={"gamma": gamma})
    for other in ("me/y", "me/z", "me/w"):
        card = hub.text(other, "README.md")
        assert "| gamma |" in card
        assert "```python" not in card
    assert "| confidence | Mine |" in card
    assert "BSDetector's" not in card


def test_folders_of_this_machine_are_not_on_the_card():
    engine = VLLM("/home/d'angelo/models/x/", options=1, tokenizer="C:/Users/me/t")
    found = settings_of(
        Clear("m", engine=engine, writer=r"C:\Users\me\w", confidence=BSDetector(similarity=NLI("/srv/nli")))
    )
    assert "model" not in found
    assert found["writer"] == "w"
    text = str(found)
    for piece in ("angelo", "Users", "/srv", "/home"):
        assert piece not in text
    for piece in ("'x'", "'t'", "'nli'"):
        assert piece in text


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ConnectionResetError("cut"), True),
        (OfflineModeIsEnabled("offline"), False),
        (OSError("disk full"), False),
        (RuntimeError("xet: no route"), True),
        (ValueError("wrong"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error, again, monkeypatch):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(type(error)):
        hub_again(fail)
    assert (len(calls) > 1) == again


def test_splits_stay_and_a_second_push_replaces_the_first(hub, client):
    both = DatasetDict(train=decided(12), test=decided(6))
    client(push, both, private=True, scores=True)
    assert hub.repos["me/x"].private
    assert {name: len(part) for name, part in client(load).items()} == {"train": 7, "test": 4}
    assert "clear_confidence" in client(load)["test"].column_names
    more = DatasetDict({name: part.add_column("new", ["x"] * len(part)) for name, part in both.items()})
    client(push, more, max_shard_size=200)
    assert "audit/train-00000-of-00001.parquet" not in hub.files("me/x")
    found = client(load, config="audit")
    assert found["train"].to_dict()["new"] == ["x"] * 12
    assert found["test"].features == more["test"].features
    client(push, decided(20), split="test", revision="other")
    for config in ("default", "audit"):
        found = client(load, config=config, revision="other")
        assert list(found) == ["train", "test"]
        assert len(found["test"]) == (20 if config == "audit" else 11)
    assert len(client(load, revision="other")["train"]) == 7
    assert {name: len(part) for name, part in client(load).items()} == {"train": 7, "test": 4}


@pytest.mark.parametrize("configs", ["", "configs:\n- config_name: default\n  data_files: data/*.parquet\n"])
def test_splits_that_a_card_names_in_another_way_stay(hub, client, configs):
    client(push, decided())
    repo, old = hub.repos["me/x"], "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"  # a name of older pushes
    tree, text = dict(repo.commits[repo.branches["main"]]), f"---\nlicense: mit\n{configs}---\n"
    tree[old] = tree.pop("data/train-00000-of-00001.parquet")
    tree["README.md"] = type(tree["README.md"])(len(text), "0", text.encode())
    repo.commit("main", tree, "by hand")
    client(push, decided(6), split="test")
    assert {name: len(part) for name, part in client(load).items()} == {"train": 7, "test": 4}


def test_the_owners_text_and_other_configs_stay(hub, client):
    client(push, decided())
    theirs = "---\nlicense: mit\nconfigs:\n- config_name: raw\n  data_files: raw.csv\ntags:\n- mine\n---\nMy words.\n\n"
    repo = hub.repos["me/x"]

    def write() -> None:
        tree = dict(repo.commits[repo.branches["main"]])
        text = theirs + hub.text("me/x", "README.md").partition("---\n\n")[2] + "\nMore of them."
        tree["README.md"] = type(tree["README.md"])(len(text), "0", text.encode())
        repo.commit("main", tree, "by hand")

    write()
    hub.faults.append(Fault("POST", "/commit/main", before=write))  # and once more, just before the next commit
    client(push, decided(6))
    card = hub.text("me/x", "README.md")
    for piece in ("license: mit", "config_name: raw", "- mine", "- clear", "config_name: audit", "| kept | 3 |"):
        assert piece in card
    assert card.count("My words.") == 1
    assert card.index("My words.") < card.index("<!-- clear_datasets: begin") < card.index("More of them.")
    assert "| kept | 6 |" not in card
    assert len(client(load)["train"]) == 4


def source(hub: Any, card: str) -> None:
    """A repository of somebody else's, with a card."""
    found = hub.repos["org/rows"] = Repo()
    found.commit("main", {"README.md": File(len(card), "0", card.encode())}, "by them")


def test_the_sources_licence_and_languages_are_carried_over(hub, client):
    source(
        hub,
        "---\nlicense: other\nlicense_name: theirs\nlicense_link: https://x.org\nlanguage:\n- de\n---\nTheir words.\n",
    )
    hub.faults.append(Fault("HEAD", "/datasets/org/rows/", 1, 503))  # a licence is not lost to a busy moment
    client(push, decided(), source="org/rows")
    card = hub.text("me/x", "README.md")
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "theirs", "https://x.org")
    assert (data["language"], data["source_datasets"]) == (["de"], ["org/rows"])
    assert "Their words" not in card
    assert "[org/rows](https://huggingface.co/datasets/org/rows)" in card


def test_a_licence_that_the_owner_wrote_stays(hub, client):
    source(hub, "---\nlicense: mit\n---\n")
    client(push, decided())
    repo = hub.repos["me/x"]
    tree = dict(repo.commits[repo.branches["main"]])
    text = hub.text("me/x", "README.md").replace("---\n", "---\nlicense: cc-by-4.0\n", 1)
    tree["README.md"] = File(len(text), "0", text.encode())
    repo.commit("main", tree, "by hand")
    client(push, decided(), source="org/rows")
    assert "license: cc-by-4.0\n" in hub.text("me/x", "README.md")
    assert "mit" not in hub.text("me/x", "README.md").split("---\n")[1]


@pytest.mark.parametrize("card", ["", "---\nlicense: [mit\n---\n"])
def test_a_source_without_a_card_that_can_be_read_does_not_stop_a_push(hub, client, card):
    source(hub, card)
    if not card:
        hub.repos["org/rows"].commit("main", {}, "without a card")
    client(push, decided(), source="org/rows")
    client(push, decided(), "me/y", source="org/gone")
    assert "license" not in hub.text("me/x", "README.md") + hub.text("me/y", "README.md")


def test_a_source_is_found_by_its_name_in_the_cache(hub, client):
    text = "---\nlicense: mit\n---\n"
    for name in ("org/OpenOrca", "org/other"):
        repo = hub.repos[name] = Repo()
        repo.commit("main", {"README.md": File(len(text), "0", text.encode())}, "by them")
    client(push, decided(), source="org/open_orca")
    data = yaml.safe_load(hub.text("me/x", "README.md").split("---\n")[1])
    assert (data["license"], data["source_datasets"]) == ("mit", ["org/OpenOrca"])


def push_alone(rows: Any) -> str:
    from clear_datasets.hub import push_to_hub

    return push_to_hub(curated(rows), "me/x")


def test_without_an_audit_the_card_says_nothing_of_one(hub, client):
    client(push_alone, decided())
    card = hub.text("me/x", "README.md")
    for piece in ("| kept | 6 |", "| replaced | 1 |", "Target before\n<pre>at 2</pre>\nTarget now\n<pre>here</pre>"):
        assert piece in card
    for piece in ("dropped |", "config `audit`"):
        assert piece not in card
    client(push, decided())
    card = hub.text("me/x", "README.md")
    for piece in ("| dropped | 5 |", "config `audit`", "Target before\n<pre>at 2</pre>\nTarget now\n<pre>here</pre>"):
        assert piece in card


def test_three_examples_of_each_decision_are_on_the_card_and_long_ones_are_short(hub, client):
    n = 24
    rows = Dataset.from_dict({
        "question": [f"Where is {i}? " + "word " * 200 + "Say it." for i in range(n)],
        "answer": [f"at {i}" for i in range(n)],
        "clear_confidence": np.linspace(0, 1, n, dtype="float32"),
        "clear_error": [""] * n,
        "clear_candidate": [f"now {i}" if i < 6 else "" for i in range(n)],
        "clear_preference": [0.9 if i < 6 else NAN for i in range(n)],
        "clear_position_bias": [0.25 if i < 6 else NAN for i in range(n)],
    })  # fmt: skip
    client(push, rows.map(decide(0.5), batched=True))
    card = hub.text("me/x", "README.md")
    kept, replaced, dropped = (card.partition(f"### {title}\n")[2].partition("\n##")[0]
                               for title in ("Kept", "Replaced", "Dropped"))  # fmt: skip
    for part, shown in ((kept, (12, 13, 14)), (replaced, (0, 1, 2)), (dropped, (6, 7, 8))):  # the least confident
        assert [int(i) for i in re.findall(r"<pre>Where is (\d+)\?", part)] == list(shown)
        prompts = re.findall(r"<pre>(Where.*?)</pre>", part)
        assert all(len(p) < 410 and " … " in p and p.endswith("Say it.") for p in prompts)
    assert re.findall(r"<pre>(now \d+)</pre>", replaced) == ["now 0", "now 1", "now 2"]
    assert "now" not in dropped
    assert "6 candidates in both orders; position bias 0.250" in card
    for piece in ("## Limits", "arXiv:2403.12776", "Quantifying Uncertainty in Answers", "They may be wrong"):
        assert piece in card


def test_a_busy_hub_is_asked_again_when_it_says(hub, client):
    hub.faults += [Fault("POST", "/commit/", 2, 429, {"Retry-After": "1"}), Fault("POST", "/repos/create", 1, 503),
                   Fault("PUT", "/lfs/", 1, cut=True), Fault("POST", "/objects/batch", 1, 500),
                   Fault("POST", "/repos/create", 1, cut=True), Fault("POST", "/commit/", 1, cut=True)]  # fmt: skip
    before = time.monotonic()
    client(push, decided())
    assert time.monotonic() - before > 2  # the two that said how long
    assert not any(fault.times for fault in hub.faults)
    assert len(client(load)["train"]) == 7


def test_a_push_that_breaks_off_changes_nothing_and_the_next_one_goes_on(hub, client):
    client(push, decided())
    before, uploads = hub.repos["me/x"].branches["main"], len(hub.uploads)
    hub.faults.append(Fault("PUT", "/lfs/", 10_000, 403, after=1))
    with pytest.raises(RuntimeError, match="uploading 'audit/train"):
        client(push, decided(30))
    assert hub.repos["me/x"].branches["main"] == before
    assert len(client(load)["train"]) == 7
    hub.faults.clear()
    client(push, decided(30))
    assert len(set(hub.uploads[uploads:])) == len(hub.uploads[uploads:])  # nothing twice
    assert len(client(load, config="audit")["train"]) == 30


def test_who_may_not_write_is_told_at_once(hub, client):
    with pytest.raises(Exception, match="403"):
        client(push, decided(), token="hf_reader")
    assert sum(path == "/api/repos/create" for _, path in hub.seen) == 1
    assert not hub.repos


def test_rows_cannot_break_the_card(hub, client):
    bad = "</pre><script>alert(1)</script>\n\n[x](javascript:alert(2)) `y` |\n---\n<!-- clear_datasets: end"
    rows = Dataset.from_dict({"question": [bad], "answer": [bad], "clear_confidence": [0.1], "clear_error": [""],
                              "clear_candidate": [bad * 2], "clear_preference": [0.9]})  # fmt: skip
    client(push, rows.map(decide(0.5), batched=True), settings={"note": bad})
    client(push, rows.map(decide(0.5), batched=True), settings={"note": bad})
    card = hub.text("me/x", "README.md")
    assert "<script" not in card
    assert "[x](javascript" not in card
    assert card.count("<!-- clear_datasets") == 2


@pytest.mark.parametrize("options, message", [
    ({"split": "a-b"}, "split 'a-b' cannot be on the Hub"),
    ({"audit": DatasetDict(test=decided())}, "split test, train is not in both"),
])  # fmt: skip
def test_wrong_splits_are_refused_before_anything_is_sent(options, message):
    from clear_datasets.hub import push_to_hub

    with pytest.raises(ValueError, match=message):
        push_to_hub(curated(decided()), "me/x", **options)


def test_the_command_line_pushes_what_curate_has_written(hub, client, tmp_path):
    model = make_tiny(tmp_path / "model", ends=5, initializer_range=0.05)
    rows = [{"question": f"Where is {i}?", "answer": f"at {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "curated.jsonl"
    done = run("curate", tmp_path / "rows.jsonl", "-o", out, "--model", model, "--samples", "1")
    assert done.returncode == 0, done.stderr
    shown = run("report", out)
    assert shown.returncode == 0, shown.stderr
    assert "<title>curated.jsonl</title>" in (tmp_path / "curated.jsonl.html").read_text()
    done = run("push", out, "me/x", "--private", "--source", "org/rows")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/datasets/me/x/commit/{hub.repos['me/x'].branches['main']}"
    assert hub.repos["me/x"].private
    assert client(load)["train"].to_list() == [json.loads(line) for line in out.read_text().splitlines()]
    assert len(client(load, config="audit")["train"]) == 6
    card = hub.text("me/x", "README.md")
    for piece in ("| model | model |", "| gamma |", "| confidence | BSDetector(", "datasets/org/rows", "- org/rows",
                  "clear-datasets curate rows.jsonl -o curated.jsonl --model model --samples 1"):  # fmt: skip
        assert piece in card
    assert str(tmp_path) not in card
    wrong = run("push", tmp_path / "rows.jsonl", "me/x")
    assert (wrong.returncode, "have no scores" in wrong.stderr) == (1, True)
    refused = run("push", out, "me/x", HF_TOKEN="hf_reader")
    assert (refused.returncode, "403" in refused.stderr) == (1, True)


def test_columns_that_were_named_stay_named(hub, client, tmp_path):
    model = make_tiny(tmp_path / "model", ends=5, initializer_range=0.05)
    rows = [{"q": f"Where is {i}?", "a": f"at {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, named = tmp_path / "curated.jsonl", ("--prompt", "q", "--response", "a")
    done = run("curate", tmp_path / "rows.jsonl", "-o", out, f"--model={model}", "--samples", "1", *named)
    assert done.returncode == 0, done.stderr
    for arguments in (("report", out), ("push", out, "me/x")):
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
    assert "Where is 0?" in (tmp_path / "curated.jsonl.html").read_text()
    card = hub.text("me/x", "README.md")
    assert "<pre>Where is" in card
    assert "--model=model --samples 1 --prompt q --response a" in card
    assert str(tmp_path) not in card


def test_300_megabytes_in_several_files(hub, client, tmp_path):
    texts = [os.urandom(500_000).hex() for _ in range(4)]
    Dataset.from_dict({"question": ["Who?"] * 300, "answer": texts * 75}).save_to_disk(tmp_path / "rows")
    client(push_folder, str(tmp_path / "rows"))
    assert sum("data/" in name for name in hub.files("me/x")) == 4
    found = client(load)["train"]
    assert found["answer"][:8] == texts * 2
    assert len(found) == 300


def push_folder(folder: str) -> str:
    from datasets import load_from_disk

    from clear_datasets.hub import push_to_hub

    return push_to_hub(load_from_disk(folder), "me/x", max_shard_size=100_000_000)


def test_a_card_that_cannot_be_read_is_not_replaced(hub, client):
    client(push, decided())
    before = hub.text("me/x", "README.md")
    hub.faults.append(Fault("HEAD", "/datasets/me/x/resolve/.*README", 10_000, 403))
    with pytest.raises(Exception, match="locate the file on the Hub"):
        client(push, decided(6))
    assert hub.text("me/x", "README.md") == before
    assert len(hub.repos["me/x"].messages) == 2  # of the first push


def push_images(folder: str) -> str:
    """Rows with images of other files, and how many files they come in."""
    from datasets import Image

    names = sorted(os.path.join(folder, name) for name in os.listdir(folder))
    rows = decided(len(names)).add_column("image", names).cast_column("image", Image())
    return push(rows, max_shard_size=1_000_000)


def test_images_count_in_the_size_of_a_file(hub, client, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (400, 400, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")  # of 480 kB
    client(push_images, str(tmp_path / "images"))
    assert sum("audit/" in name for name in hub.files("me/x")) == 3
    found = client(load, config="audit")["train"]
    assert [image.size for image in found["image"]] == [(400, 400)] * 6


def test_settings_of_a_push_are_without_folders_of_this_machine(hub, client):
    settings = {"data": "/home/ann/rows.jsonl", "command": "clear x /home/ann/rows.jsonl --writer='/home/ann/w' -k 1/2"}
    client(push, decided(), settings=settings)
    card = hub.text("me/x", "README.md")
    assert "clear x rows.jsonl --writer='w' -k 1/2" in card
    assert "| data | rows.jsonl |" in card
    assert "/home" not in card


@pytest.mark.parametrize("error", [httpx.ConnectError("no route"), RuntimeError("xet: no route")])
def test_a_push_that_is_out_of_reach_ends_in_one_line(error, tmp_path, monkeypatch):
    out = tmp_path / "curated.parquet"
    rows = decided()
    rows.to_parquet(tmp_path / "curated.parquet.audit.parquet")
    curated(rows).to_parquet(out)
    code, said = command("push", out, "me/x")
    assert (code, "has no curated.parquet.settings.json beside it, which curate writes last" in said) == (1, True), said
    (tmp_path / "curated.parquet.settings.json").write_text("{}")

    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("clear_datasets.hub.push_to_hub", fail)
    code, said = command("push", out, "me/x")
    assert (code, "the push broke off (" in said, "Traceback" in said) == (1, True, False), said
    curated(rows).select(range(3)).to_parquet(out)
    code, said = command("push", out, "me/x")
    assert (code, "has 3 rows, and curated.parquet.audit.parquet keeps 7" in said) == (1, True), said


def test_some_rows_of_a_split_are_pushed_under_its_name(hub, client):
    client(push_part, "train[:8]")
    assert {name: len(part) for name, part in client(load).items()} == {"train": 8}
    with pytest.raises(ValueError, match=r"split 'train\[:2\]\+test' cannot be on the Hub.*; give split='train', say"):
        client(push_part, "train[:2]+test")
    assert {name: len(part) for name, part in client(load, config="audit").items()} == {"train": 8}
    client(push_part, "train[:2]+test", split="few")
    assert len(client(load)["few"]) == 5


def push_part(which: str, **options: Any) -> str:
    """Rows that `load_dataset` took out of splits."""
    from datasets import load_dataset

    DatasetDict(train=decided(12), test=decided(3)).push_to_hub("org/rows")
    rows = load_dataset("org/rows", split=which)
    return push(rows.map(lambda row: {"clear_decision": "keep"}), **options)


def test_columns_of_unknown_names_are_shown_by_the_format_alone(hub, client):
    rows = decided().rename_columns({"question": "q", "answer": "a"})
    form = Columns("q", "a")
    client(push_with, rows, form, None)
    card = hub.text("me/x", "README.md")
    for piece in ("| kept | 6 |", "| replaced | 1 |", "(clear_confidence.png)\n\n## How it was made", "## Limits"):
        assert piece in card
    assert "## Rows" not in card
    assert client(load)["train"]["a"][:] == curated(rows, form)["a"][:]
    client(push_with, rows, form, Clear("m", format=form))
    card = hub.text("me/x", "README.md")
    assert "## Rows\n\n### Kept" in card
    assert "<pre>Where is 7?</pre>" in card
    known = rows.add_column("question", [""] * len(rows)).add_column("answer", [""] * len(rows))
    client(push_with, known, form, None)  # these are not what was scored
    assert "## Rows" not in hub.text("me/x", "README.md")


def push_with(rows: Any, form: Columns, clear: Clear | None) -> str:
    from clear_datasets.hub import push_to_hub

    return push_to_hub(curated(rows, form), "me/x", audit=rows, clear=clear)
