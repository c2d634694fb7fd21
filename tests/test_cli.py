from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Image, load_from_disk
from typer.testing import CliRunner

from clear_datasets import Columns
from clear_datasets.cli import app
from clear_datasets.engines.transformers import Transformers
from clear_datasets.options import format_of
from tests.conftest import make_tiny

ROWS = [{"question": f"Where is {i}?", "answer": f"at {i}"} for i in range(8)] + [{"question": "", "answer": "x"}]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clear_datasets.cli", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "150", **environment}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def here(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, which is faster; raises what would end in a traceback."""
    done = CliRunner().invoke(app, [*map(str, arguments)], env=environment)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def command(*arguments: str | Path) -> tuple[int, str]:
    """Its code and what it says."""
    done = here(*arguments)
    return done.returncode, done.stderr


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """A model that spreads its probability evenly, so that "Yes" and "No" hold more than the 1% that a score needs."""
    folder = tmp_path_factory.mktemp("even")
    return str(make_tiny(folder, ends=5, initializer_range=0.05, max_position_embeddings=4096))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_curate_writes_the_kept_rows_and_an_audit_of_all(source, tiny, tmp_path):
    out = tmp_path / "new" / "curated.jsonl"
    done = run("curate", source, "-o", out, "--model", tiny, "--samples", "2", "--keep", "0.5")
    assert done.returncode == 0, done.stderr
    kept, audit = lines(out), Dataset.from_parquet(str(out) + ".audit.parquet").to_list()
    assert [{k: r[k] for k in ROWS[0]} for r in audit] == ROWS
    assert kept == [r for r, a in zip(ROWS, audit, strict=True) if a["clear_decision"] == "keep"]
    scored = [a for a in audit if not a["clear_error"]]
    assert audit[8]["clear_error"] == "column 'question' is empty"
    assert sum(a["clear_decision"] == "keep" for a in scored) == len(scored) // 2
    for piece in ("kept", "dropped", "failed", "rows/s", "least confident", "confidence 0.4 to 0.5", "wrote"):
        assert piece in done.stderr
    beside = ["clear_stages", "curated.jsonl", "curated.jsonl.audit.parquet", "curated.jsonl.settings.json"]
    assert sorted(p.name for p in out.parent.iterdir()) == beside


def test_curate_corrects_with_a_writer_that_it_fine_tunes_or_is_given(source, tiny, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    out = tmp_path / "curated.jsonl"
    settings = ("--model", tiny, "--samples", "2", "--correct", "--eta", "0")  # all candidates are taken
    done = run("curate", source, "-o", out, *settings)
    assert done.returncode == 0, done.stderr
    audit = Dataset.from_parquet(str(out) + ".audit.parquet").to_list()
    assert [{k: r[k] for k in ROWS[0]} for r in audit] == ROWS
    decisions = [a["clear_decision"] for a in audit]
    wanted = [
        {**r, "answer": a["clear_candidate"]} if a["clear_decision"] == "replace" else r
        for r, a in zip(ROWS, audit, strict=True)
        if a["clear_decision"] != "drop"
    ]
    assert lines(out) == wanted
    assert "replace" in decisions
    assert all(not a["clear_candidate"] for a in audit if a["clear_decision"] == "keep")
    folder = tmp_path / "curated.jsonl.writer"
    assert (folder / "adapter_config.json").is_file()
    again = here("curate", source, "-o", out, *settings)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("9 from an earlier run") == 3
    assert lines(out) == wanted
    audit_as_source = tmp_path / "curated.jsonl.audit.parquet"  # its candidates are not this run's
    plain = here("curate", audit_as_source, "-o", tmp_path / "plain.jsonl", "--model", tiny, "--samples", "2")
    assert plain.returncode == 0, plain.stderr
    assert {r["answer"] for r in lines(tmp_path / "plain.jsonl")} <= {r["answer"] for r in ROWS}
    over = here("curate", audit_as_source, "-o", out, *settings)
    assert (over.returncode, "OUT is SRC" in over.stderr) == (2, True)
    given = here("curate", source, "-o", tmp_path / "two.jsonl", *settings, "--writer", folder)
    assert given.returncode == 0, given.stderr
    assert lines(tmp_path / "two.jsonl") == wanted
    rounds = here("curate", source, "-o", tmp_path / "three.jsonl", *settings, "--rounds", "2")
    assert rounds.returncode == 0, rounds.stderr
    assert "fine-tuning on 4 rows" in rounds.stderr
    assert f"fine-tuning on {len(wanted) - 1} rows" in rounds.stderr  # one has no score
    assert (tmp_path / "three.jsonl.writer2" / "adapter_config.json").is_file()
    wrong = here("curate", source, "-o", out, "--model", tiny, "--writer", folder)
    assert (wrong.returncode, "go with --correct" in wrong.stderr) == (2, True)
    wrong = here("curate", source, "-o", out, *settings, "--writer", folder, "--finetune")
    assert (wrong.returncode, "leave out --writer" in wrong.stderr) == (2, True)


def test_rows_that_the_writer_agrees_with_are_kept_where_that_is_asked_for(tiny, tmp_path):
    questions = [f"Where is {i}?" for i in range(6)]
    said = Transformers(tiny).generate([[{"role": "user", "content": q}] for q in questions], max_tokens=256)
    answers = [text if i % 2 and 0 < len(text) < 20 else "Rome" for i, [text] in enumerate(said)]
    rows = [{"question": q, "answer": a} for q, a in zip(questions, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = ("--model", tiny, "--samples", "1", "--correct", "--writer", tiny, "--gamma", "1", "--eta", "1")
    done = here("curate", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl", *settings, "--keep-agreed")
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "out.jsonl") == [r for r in rows if r["answer"] != "Rome"] != []
    done = here("curate", tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl", *settings)
    assert done.stderr.count("6 from an earlier run") == 3, done.stderr  # a decision costs nothing
    assert lines(tmp_path / "out.jsonl") == []


def test_a_run_that_is_killed_goes_on_behind_the_last_batch(source, tiny, tmp_path):
    out = tmp_path / "scored.jsonl"
    arguments = ("score", source, "-o", out, "--model", tiny, "--samples", "2", "--batch-size", "1")
    command = [sys.executable, "-m", "clear_datasets.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("clear_stages/*/*.parquet"))) < 3:
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("clear_stages/*/*.parquet")}
    assert 3 <= len(done) < len(ROWS)
    again = here(*arguments[:-1], "4")  # in larger batches, behind those that are done
    assert again.returncode == 0, again.stderr
    assert f"{len(done)} from an earlier run" in again.stderr
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert len(list(tmp_path.glob("clear_stages/*/*.parquet"))) < len(ROWS)
    (tmp_path / "fresh[1]").mkdir()
    fresh = here(*arguments[:3], tmp_path / "fresh[1]" / "scored.jsonl", *arguments[4:])
    assert fresh.returncode == 0, fresh.stderr
    assert lines(out) == lines(tmp_path / "fresh[1]" / "scored.jsonl")
    others = (*arguments[4:-1], "4")
    for cache in ((), ("--no-cache",)):  # where answers are kept changes no score
        curated = here("curate", *arguments[1:3], tmp_path / "curated.jsonl", *others, *cache)
        assert "9 from an earlier run" in curated.stderr
    other = here(*arguments[:7], "3", *arguments[8:])  # other settings: nothing of it is taken
    assert other.returncode == 0, other.stderr
    assert "earlier run" not in other.stderr


def test_estimate_counts_every_stage_of_all_rows(source, tiny, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    arguments = ("estimate", source, "--model", tiny, "--samples", "2", "--correct", "--price-per-hour", "3600")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    table = [[cell.strip() for cell in row.split("│")[1:-1]] for row in done.stdout.splitlines() if "│" in row]
    costs = {row[0]: row[1:] for row in table}
    assert list(costs) == ["score", "fine-tune", "propose", "prefer", "in all"]
    hours, minutes, seconds = map(int, costs["in all"][2].split(":"))
    assert float(costs["in all"][3].replace(",", "")) == pytest.approx(3600 * hours + 60 * minutes + seconds, abs=1)
    written = {stage: int(cost[1].replace(",", "")) for stage, cost in costs.items()}
    assert written["fine-tune"] == 0 < written["propose"]
    assert written["score"] >= 2 * 8  # two samples of the eight rows that can be asked
    few = here(*arguments, "--keep", "0.01")  # of so few rows that is none
    assert few.returncode == 0, few.stderr
    assert not list(tmp_path.glob("clear_stages"))


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet", ""])
def test_score_reads_and_writes_every_kind_of_file(tiny, tmp_path, ending):
    ds = Dataset.from_list(ROWS[:2])
    source, out = tmp_path / f"in{ending}", tmp_path / f"out{ending}"
    writers = {
        ".jsonl": ds.to_json,
        ".json": lambda p: ds.to_json(p, lines=False),
        ".csv": ds.to_csv,
        ".parquet": ds.to_parquet,
    }
    writers.get(ending, ds.save_to_disk)(str(source))
    done = here("score", source, "-o", out, "--model", tiny, "--samples", "1")
    assert done.returncode == 0, done.stderr
    again = here("score", out, "-o", tmp_path / "again.jsonl", "--model", tiny, "--samples", "1", "--limit", "1")
    assert again.returncode == 0, again.stderr
    assert "clear_confidence" in lines(tmp_path / "again.jsonl")[0]


TYPED = [
    {
        "question": "When?",
        "answer": "2024-01-05",
        "n": 1,
        "x": 0.1234567890123456,
        "at": "2024-01-05T10:00:00Z",
        "tags": [],
    },
    {
        "question": "Who?",
        "answer": "1999-12-31",
        "n": None,
        "x": 1e-300,
        "at": "2024-01-06T10:00:00Z",
        "tags": ["é", "2"],
    },
]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_comes_out_as_it_went_in(tiny, tmp_path, ending):
    source, out = tmp_path / f"in{ending}", tmp_path / f"out{ending}"
    source.write_text(json.dumps(TYPED) if ending == ".json" else "\n".join(map(json.dumps, TYPED)))
    done = here("score", source, "-o", out, "--model", tiny, "--samples", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text()) if ending == ".json" else lines(out)
    assert [{k: r[k] for k in TYPED[0]} for r in found] == TYPED
    assert [r["clear_error"] for r in found] == ["", ""]


def test_csv_comes_out_as_it_went_in(tiny, tmp_path):
    source, out = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text("question,answer,note\nIs there any?,None,\nWhich one?,N/A,null\n")
    done = here("score", source, "-o", out, "--model", tiny, "--samples", "1")
    assert done.returncode == 0, done.stderr
    with out.open() as f:
        found = list(csv.DictReader(f))
    assert [(r["answer"], r["note"], r["clear_error"]) for r in found] == [("None", "", ""), ("N/A", "null", "")]


def test_globs_and_splits(source, tiny, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps(ROWS[0]))
    done = here("score", tmp_path / "*.jsonl", "-o", tmp_path / "out.parquet", "--model", tiny, "--samples", "1")
    assert done.returncode == 0, done.stderr
    assert len(Dataset.from_parquet(str(tmp_path / "out.parquet"))) == 10
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "splits")
    done = here(
        "score", tmp_path / "splits", "-o", tmp_path / "test", "--model", tiny, "--split", "test", "--samples", "1"
    )
    assert done.returncode == 0, done.stderr
    assert len(load_from_disk(str(tmp_path / "test"))) == 1
    done = here("score", tmp_path / "splits", "-o", tmp_path / "test", "--model", tiny)
    assert (done.returncode, "has the splits train, test: choose one with --split" in done.stderr) == (1, True)


def test_columns_can_be_named(tiny, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"q": "Where?", "a": "here"}))
    arguments = ("score", source, "-o", tmp_path / "out.jsonl", "--model", tiny, "--samples", "1")
    done = here(*arguments)
    assert (done.returncode, "found the columns 'q', 'a'" in done.stderr) == (1, True)
    assert here(*arguments, "--prompt", "q", "--response", "a").returncode == 0
    done = here(*arguments, "--prompt", "q", "--response", "b")
    assert (done.returncode, "--response: there is no column 'b'; found q, a" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    "source, arguments, code, message",
    [
        ("absent.jsonl", [], 1, "no file matches"),
        ("train.txt", [], 1, "train.txt"),
        ("train.jsonl", ["-o", "out.xlsx"], 2, "cannot write .xlsx files"),
        ("train.jsonl", ["-o", "full"], 2, "other things in it"),
        ("train.jsonl", ["-o", "arrows"], 2, "other things in it"),
        ("train.jsonl", ["-o", "train.jsonl"], 2, "OUT is SRC"),
        ("*.jsonl", ["-o", "out.jsonl"], 2, "give an OUT in another folder"),
        ("**/*.parquet", ["-o", "out.jsonl"], 2, "give an OUT in another folder"),
        (".", ["-o", "out.jsonl"], 2, "give an OUT in another folder"),
        ("./*.json", ["-o", "out.jsonl", "--keep", "0.5"], 2, "give an OUT in another folder"),
        ("./*.json", ["-o", "out.jsonl", "--shard", "0/2"], 2, "give an OUT in another folder"),
        ("train.jsonl", ["-o", "plain"], 2, "plain is a file already"),
        ("train.jsonl", ["--split", "test"], 1, "leave --split out"),
        ("train.jsonl", ["--config", "en"], 1, "--config and --revision are of Hub datasets"),
        ("train.jsonl", ["--keep", "2"], 2, "keep"),
        ("empty.jsonl", [], 3, "no row could be scored"),
        ("empty.jsonl", ["--keep", "0.5"], 3, "no row could be scored"),
        ("broken.jsonl", [], 1, "clear-datasets:"),
    ],
)
def test_wrong_input_ends_in_one_line_and_a_code(source, arguments, code, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "train.txt").write_text("text")
    (tmp_path / "broken.jsonl").write_text('{"question": "Where?"\n{')
    (tmp_path / "empty.jsonl").write_text(json.dumps({"question": "", "answer": "x"}))
    (tmp_path / "plain").write_text("mine")
    (tmp_path / "arrows").mkdir()
    (tmp_path / "arrows" / "mine.arrow").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "dataset_info.json").write_text("{}")
    (tmp_path / "full" / "mine.txt").write_text("mine")
    out = [] if "-o" in arguments else ["-o", "out.jsonl"]
    command = "curate" if "--keep" in arguments else "score"
    done = here(command, source, "--model", tiny, "--samples", "1", *out, *arguments)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert (tmp_path / "full" / "mine.txt").exists()
    assert (tmp_path / "arrows" / "mine.arrow").exists()


def test_a_model_that_is_not_there(source, tmp_path):
    done = here("score", source, "-o", tmp_path / "out.jsonl", "--model", tmp_path / "no-model")
    assert done.returncode == 1
    assert "no-model" in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_calibrate_says_what_finds_noise(tiny, tmp_path):
    rows = [{"question": f"Where is {i}?", "answer": f"at place number {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = tmp_path / "page.html"
    done = run("calibrate", tmp_path / "rows.jsonl", "--model", tiny, "-k", "2", "--noise", "swap", "-o", page)
    assert done.returncode == 0, done.stderr
    for piece in ("direct, Jaccard: similarity", "direct, Jaccard: reflection", "--keep", "gamma="):
        assert piece in done.stdout
    assert "What finds noise in these rows" in page.read_text()
    for page in (tmp_path / "rows.jsonl", tmp_path / "no folder" / "page.html"):
        done = here("calibrate", tmp_path / "rows.jsonl", "--model", tiny, "-o", page)
        assert (done.returncode, "cannot write" in done.stderr) == (2, True)
    done = here("calibrate", tmp_path / "rows.jsonl", "--model", tiny, "--noise", "typos")
    assert (done.returncode, "there is no noise typos" in done.stderr) == (1, True)


def test_solutions_are_compared_by_their_results(tiny, tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"question": f"{i} and 1?", "answer": f"{i}+1 = {i + 1}"} for i in range(4)] + [
        {"question": "How many?", "answer": "Some."}
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = here("score", tmp_path / "rows.jsonl", "-o", tmp_path / "out.parquet", "--model", tiny, "--math", "-k", "2")
    assert done.returncode == 0, done.stderr
    errors = Dataset.from_parquet(str(tmp_path / "out.parquet"))["clear_error"][:]
    assert [bool(e) for e in errors] == [False] * 4 + [True]
    assert "cannot compare" in errors[4]


def test_help_has_examples():
    for command in ([], ["score"], ["curate"]):
        done = here(*command, "--help")
        assert done.returncode == 0
        assert "clear-datasets curate" in done.stdout


def test_answers_are_kept_unless_that_is_not_wanted(source, tiny, tmp_path, answers):
    for number, option in enumerate(("--no-cache", "--cache")):
        out = tmp_path / str(number) / "scored.jsonl"  # with stages of its own
        done = here("score", source, "-o", out, "--model", tiny, "--samples", "2", option)
        assert done.returncode == 0, done.stderr
        assert bool(list(answers.iterdir())) == (option == "--cache")


def test_columns_that_belong_to_a_named_prompt_go_along(tiny, tmp_path):
    rows = [{"instruction": "Add.", "input": f"{i} + {i}", "output": f"{2 * i}"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = []
    for name, named in (("a", ()), ("b", ("--prompt", "instruction", "--response", "output"))):
        out = tmp_path / name / "scored.jsonl"
        code, said = command("score", tmp_path / "rows.jsonl", "-o", out, "--model", tiny, "--samples", "1", *named)
        assert code == 0, said
        scores.append([r["clear_confidence"] for r in lines(out)])
    assert scores[0] == scores[1]
    columns = json.loads((tmp_path / "b" / "scored.jsonl.settings.json").read_text())["columns"]
    assert columns == {"prompt": "instruction", "input": "input", "response": "output"}


def test_a_named_column_may_be_none():
    rows = Dataset.from_dict({"context": ["The Rhine."], "question": ["Where?"], "answer": ["here"]})
    named = format_of(rows, "question", "answer", None, None, None)
    assert named == Columns("question", "answer", context="context")
    assert format_of(rows, "question", "answer", None, "", None) == Columns("question", "answer")
    assert format_of(rows, None, None, None, "", None) == Columns("question", "answer")
    assert format_of(rows, "question", "context", None, None, None) == Columns("question", "context")
    assert format_of(rows, "answer", "question", None, None, None) == Columns("answer", "question")
    alpaca = Dataset.from_dict({"instruction": ["Add."], "input": ["1 + 1"], "output": ["2"]})
    assert format_of(alpaca, None, "input", None, None, None) == Columns("instruction", "input")
    assert format_of(rows, "context", None, None, None, None) == Columns("context", "answer")
    with pytest.raises(ValueError, match="--context: there is no column 'passage'; found context, question, answer"):
        format_of(rows, "question", "answer", None, "passage", None)


def test_chats_are_not_written_into_csv(tiny, tmp_path):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
    code, said = command("curate", tmp_path / "rows.jsonl", "-o", tmp_path / "out.csv", "--model", tiny)
    assert (code, "column 'messages' would not be read back from CSV" in said) == (1, True), said
    assert not (tmp_path / "clear_stages").exists()  # nothing was asked


def test_a_column_that_was_left_out_stays_out_of_the_page(tiny, tmp_path):
    pytest.importorskip("vl_convert")
    rows = [{"context": "It is the Rhine.", "question": f"Where is {i}?", "answer": "here"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, named in (("with", ()), ("without", ("--context", ""))):
        columns = ("--prompt", "question", "--response", "answer", *named)
        code, said = command(
            "score", tmp_path / "rows.jsonl", "-o", tmp_path / name, "--model", tiny, "-k", "1", *columns
        )
        assert code == 0, said
        assert command("report", tmp_path / name)[0] == 0
        assert ("It is the Rhine." in (tmp_path / f"{name}.html").read_text()) == (name == "with")


def test_settings_are_those_of_the_rows_that_are_there(source, tiny, tmp_path, monkeypatch):
    arguments = ("score", source, "-o", tmp_path / "out.jsonl", "--model", tiny, "-k", "1")
    assert command(*arguments)[0] == 0
    assert (tmp_path / "out.jsonl.settings.json").exists()

    def fail(rows: Dataset, out: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("clear_datasets.cli.write", fail)
    code, said = command(*arguments)
    assert (code, "No space left on device" in said) == (1, True), said
    assert not (tmp_path / "out.jsonl.settings.json").exists()


def test_images_beside_the_texts_are_not_decoded(tiny, tmp_path):
    broken = [{"bytes": b"no image", "path": None}] * len(ROWS)
    rows = Dataset.from_list(ROWS).add_column("image", broken).cast_column("image", Image())
    rows.to_parquet(tmp_path / "rows.parquet")
    out = tmp_path / "curated.parquet"
    done = here("curate", tmp_path / "rows.parquet", "-o", out, "-m", tiny, "-k", "1")
    assert done.returncode == 0, done.stderr
    assert "least confident" in done.stderr
    assert Dataset.from_parquet(str(out)).with_format("arrow")[0]["image"].to_pylist() == broken[:1]
    done = here("score", tmp_path / "rows.parquet", "-o", tmp_path / "scored.jsonl", "-m", "not loaded")
    assert (done.returncode, "column 'image' would not be read back from JSONL" in done.stderr) == (1, True)
    pytest.importorskip("vl_convert")
    done = here("report", out)
    assert done.returncode == 0, done.stderr
    assert "Where is" in (tmp_path / "curated.parquet.html").read_text(encoding="utf-8")


def test_without_the_packages_that_train_nothing_is_scored(source, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("clear_datasets.cli.find_spec", lambda name: None)
    done = here("curate", source, "-o", tmp_path / "out.jsonl", "-m", tiny, "--correct")
    assert (done.returncode, '"clear-datasets[train]"' in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "clear_stages").exists()
    done = here("estimate", source, "-m", tiny, "--correct")
    assert (done.returncode, '"clear-datasets[train]"' in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (("--gamma", "60"), "less than or equal to 1"),
        (("--gamma", "-0.1"), "greater than or equal to 0"),
        (("--gamma", "nan"), "--gamma"),
        (("--gamma", "0.4", "--keep", "0.5"), "--gamma 0.4 is a threshold in place of --keep 0.5: give one of them"),
        (("--eta", "0.8"), "--preference and --eta go with --correct"),
        (("--preference", "confidence"), "--preference and --eta go with --correct"),
        (("--gamma", "0", "--keep-agreed"), "go with --correct"),
    ],
)
def test_options_that_would_do_nothing_are_refused(source, tiny, tmp_path, options, message):
    code, said = command("curate", source, "-o", tmp_path / "out.jsonl", "--model", tiny, *options)
    assert (code, message in " ".join(said.split())) == (2, True), said
    assert not (tmp_path / "clear_stages").exists()
    code, said = command("estimate", source, "--model", tiny, "--preference", "pairwise")
    assert (code, "--writer, --rounds and --preference go with --correct" in said) == (2, True), said


def test_settings_are_those_that_were_used_and_no_row_left_is_said(source, tiny, tmp_path):
    few = ("--model", tiny, "--samples", "1")
    for number, (options, left, known) in enumerate([
        ((), 5, {"failed": "keep"}),  # one of them without a score
        (("--keep", "1"), 9, {"failed": "keep"}),
        (("--gamma", "1", "--failed", "drop"), 0, {"failed": "drop", "gamma": 1.0}),
        (("--gamma", "0"), 9, {"gamma": 0.0}),
        (("--correct", "--writer", tiny, "--preference", "pairwise"), 5, {"eta": 0.8}),
        (("--correct", "--writer", tiny, "--eta", "1"), 5, {"eta": 1.0}),
    ]):  # fmt: skip
        out = tmp_path / f"{number}.jsonl"
        code, said = command("curate", source, "-o", out, *few, *options)
        assert code == 0, said
        assert len(lines(out)) == left
        assert ("has no rows, as no confidence is above 1.0000" in " ".join(said.split())) == (not left)
        settings = json.loads((tmp_path / f"{number}.jsonl.settings.json").read_text())
        assert known.items() <= settings.items()
        assert ("eta" in settings) == ("--correct" in options)
        assert ("Pairwise" in settings["preference"]) == ("pairwise" in options)
        assert number == 0 or "9 from an earlier run" in said  # whatever the preference, scores are the same
