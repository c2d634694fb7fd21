"""Parts of a dataset, scored by commands of their own, are one whole again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from clear_datasets import BSDetector, Clear, decide, threshold
from clear_datasets.engines.openai import OpenAI
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from clear_datasets.files import write, write_folder
from clear_datasets.reading import load
from clear_datasets.stages import Stages, train_writer
from tests.conftest import Scripted
from tests.test_cli import ROWS, command, here, tiny  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory) -> Path:  # noqa: F811
    """A folder with the three parts, named against their order, and the whole."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    for i, name in enumerate("cba"):
        done = here("score", folder / "train.jsonl", "-o", folder / f"part-{name}.parquet", "-m", tiny, "-k", "1",
                    "--shard", f"{i}/3", CLEAR_CACHE=str(folder / "answers"))  # fmt: skip
        assert done.returncode == 0, done.stderr
    done = here("score", folder / "train.jsonl", "-o", folder / "whole.parquet", "-m", tiny, "-k", "1",
                CLEAR_CACHE=str(folder / "none"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "9 from an earlier run" in done.stderr  # the parts share the folder of the whole
    return folder


@pytest.fixture
def parts(scored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "parts"))


def test_parts_are_joined_in_the_order_of_the_source(parts):
    assert command("merge", parts / "part-*.parquet", "-o", parts / "joined.jsonl")[0] == 0
    assert command("merge", *sorted(parts.glob("part-?.parquet")), "-o", parts / "joined.parquet")[0] == 0
    whole, joined = (Dataset.from_parquet(str(parts / f"{name}.parquet")) for name in ("whole", "joined"))
    assert repr(joined.to_list()) == repr(whole.to_list())
    assert [len(Dataset.from_parquet(str(parts / f"part-{name}.parquet"))) for name in "cba"] == [3, 3, 3]
    assert threshold(joined) == threshold(whole)


def test_curate_takes_the_scores_that_are_there(parts, tiny, monkeypatch):  # noqa: F811
    command("merge", parts / "part-*.parquet", "-o", parts / "joined.parquet")
    out = parts / "curated.jsonl"
    code, said = command("curate", parts / "joined.parquet", "-o", out, "-m", tiny, "--scored")
    assert code == 1
    assert "was scored with confidence BSDetector(" in said
    assert "give the options of clear-datasets score again" in said
    code, said = command("curate", parts / "whole.parquet", "-o", out, "-m", "other", "-k", "1", "--scored")
    assert (code, "was scored with model" in said) == (1, True), said
    for name in ("", "a", "b"):
        (parts / name).mkdir(exist_ok=True)
        (parts / name / "checkpoint").symlink_to(tiny)
    monkeypatch.chdir(parts)
    known, absolute = parts / "joined.parquet.settings.json", str(parts / "a" / "checkpoint")
    made = json.loads(known.read_text())
    for before, now in (("checkpoint", "./checkpoint"), ("./checkpoint", "checkpoint"), ("checkpoint", absolute)):
        known.write_text(json.dumps(made | {"model": before}))
        code, said = command("curate", "joined.parquet", "-o", out, "-m", now, "-k", "1", "--scored")
        assert code == 0, said
    for before, now in (("a/checkpoint", "b/checkpoint"), ("checkpoint", "org/checkpoint")):
        known.write_text(json.dumps(made | {"model": before}))
        code, said = command("curate", "joined.parquet", "-o", out, "-m", now, "-k", "1", "--scored")
        assert (code, f"was scored with model {before}, not {now}" in said) == (1, True), said
    known.write_text(json.dumps(made))
    relative = os.path.relpath(tiny)  # the same folder
    code, said = command("curate", parts / "joined.parquet", "-o", out, "-m", relative, "-k", "1", "--scored")
    assert code == 0, said
    whole = Dataset.from_parquet(str(parts / "whole.parquet"))
    gamma = threshold(whole)
    kept = [{k: r[k] for k in ROWS[0]} for r in whole if not r["clear_confidence"] <= gamma]
    assert [json.loads(line) for line in out.read_text().splitlines()] == kept
    code, said = command("curate", parts / "train.jsonl", "-o", out, "-m", tiny, "--scored")
    assert (code, "has no scores: leave --scored out" in said) == (1, True)


def test_scores_are_not_written_where_decisions_are(parts, tiny):  # noqa: F811
    out = parts / "whole.parquet"
    code, said = command("curate", out, "-o", parts / "curated.parquet", "-m", tiny, "-k", "1", "--scored")
    assert code == 0, said
    before = (parts / "curated.parquet").read_bytes()
    again = ["merge", parts / "part-*.parquet"], ["score", parts / "train.jsonl", "-m", tiny, "-k", "1"]
    for arguments in again:
        code, said = command(*arguments, "-o", parts / "curated.parquet")
        assert (code, "is of curate, as" in said) == (2, True), said
    assert (parts / "curated.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p / "part-b.parquet").unlink(), "no part for --shard 1/3; expected one"),
        (lambda p: shutil.copy(p / "part-b.parquet", p / "part-d.parquet"), "part-d.parquet.shard.json is not there"),
        (lambda p: [shutil.copy(p / f"part-b.parquet{end}", p / f"part-d.parquet{end}") for end in ("", ".shard.json")],
         "2 parts for --shard 1/3; expected one"),
        (lambda p: edit(p / "part-b.parquet.shard.json", settings={"model": "m"}), "are not parts of one whole"),
        (lambda p: edit(p / "part-b.parquet.shard.json", rows=8), "their rows are"),
        (lambda p: [edit(p / f"part-{n}.parquet.shard.json", rows=8) for n in "abc"], "have 9 rows, the source had 8"),
        (lambda p: shorter(p / "part-b.parquet", p / "part-c.parquet"), "part-c.parquet has 4 rows, --shard 0/3 has 3"),
    ],
)  # fmt: skip
def test_what_is_not_one_whole_is_refused(change, message, parts):
    change(parts)
    code, said = command("merge", parts / "part-*.parquet", "-o", parts / "joined.parquet")
    assert (code, message in said) == (1, True), said
    assert not (parts / "joined.parquet").exists()


def shorter(less: Path, more: Path) -> None:
    """A row of one part in another."""
    one, other = (Dataset.from_parquet(str(file)) for file in (less, more))
    write(concatenate_datasets([other, one.select([0])]), more)
    write(one.select([1, 2]), less)


def test_parts_of_rows_that_changed_in_between_are_refused(parts, tiny):  # noqa: F811
    (parts / "train.jsonl").write_text("\n".join(map(json.dumps, reversed(ROWS))))
    code, said = command("score", parts / "train.jsonl", "-o", parts / "part-b.parquet", "-m", tiny, "-k", "1",
                         "--shard", "1/3")  # fmt: skip
    assert code == 0, said
    code, said = command("merge", parts / "part-*.parquet", "-o", parts / "joined.parquet")
    assert (code, "are of other rows: was SRC changed between them?" in said) == (1, True), said


def test_parts_of_a_model_that_changed_in_between_are_told(parts):
    edit(parts / "part-b.parquet.shard.json", model_state="other")
    code, said = command("merge", parts / "part-*.parquet", "-o", parts / "joined.parquet")
    assert code == 0, said
    assert "the files of the model differ, or their times do" in " ".join(said.split())


def test_a_part_says_nothing_of_rows_that_could_not_be_written(parts, tiny, monkeypatch):  # noqa: F811
    def fail(rows: Dataset, out: Path) -> None:
        raise OSError(28, "disk full")

    out = parts / "part-b.parquet"
    before = out.read_bytes()
    monkeypatch.setattr("clear_datasets.cli.write", fail)
    code, said = command("score", parts / "train.jsonl", "-o", out, "-m", tiny, "-k", "1", "--shard", "2/3")
    assert (code, "disk full" in said) == (1, True), said
    assert out.read_bytes() == before
    code, said = command("merge", parts / "part-*.parquet", "-o", parts / "joined.parquet")
    assert (code, "part-b.parquet.shard.json is not there" in said) == (1, True), said


def test_parts_in_json_whose_types_differ_are_one_whole(parts):
    for name, talk in zip("cba", [[{"role": "user"}], None, [{"role": "user", "tool": {"x": 1}}]], strict=True):
        file = parts / f"part-{name}.jsonl"
        rows = Dataset.from_parquet(str(parts / f"part-{name}.parquet")).to_list()
        more = {"n": 1 if name == "c" else 0.5, "talk": talk, "late": None if name == "c" else "x"}
        file.write_text("\n".join(json.dumps({**row, **more}) for row in rows))
        shutil.copy(parts / f"part-{name}.parquet.shard.json", f"{file}.shard.json")
    code, said = command("merge", parts / "part-*.jsonl", "-o", parts / "joined.jsonl")
    assert code == 0, said
    joined = [json.loads(line) for line in (parts / "joined.jsonl").read_text().splitlines()]
    assert [{k: r[k] for k in ROWS[0]} for r in joined] == ROWS
    assert [r["n"] for r in joined[::3]] == [1, 0.5, 0.5]
    assert joined[8]["talk"][0]["tool"] == {"x": 1}
    assert [r["late"] for r in joined[::3]] == [None, "x", "x"]


def test_a_batch_that_lost_its_rows_is_scored_again(parts, tiny):  # noqa: F811
    arguments = (
        "score",
        parts / "train.jsonl",
        "-o",
        parts / "whole.parquet",
        "-m",
        tiny,
        "-k",
        "1",
        "--batch-size",
        "3",
    )
    shutil.rmtree(parts / "clear_stages")
    assert command(*arguments)[0] == 0
    whole = (parts / "whole.parquet").read_bytes()
    (batch,) = (parts / "clear_stages").glob("score-*/000000003-000000006.parquet")
    for rest in (b"", batch.read_bytes()[:100]):
        batch.write_bytes(rest)
        code, said = command(*arguments)
        assert code == 0, said
        assert "6 from an earlier run" in said
        assert (parts / "whole.parquet").read_bytes() == whole


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_parts_in_json_are_told_from_what_stands_beside_them(parts):
    for name in "abc":
        load(str(parts / f"part-{name}.parquet"), None, None, None, None).to_json(parts / f"p-{name}.json", lines=False)
        shutil.copy(parts / f"part-{name}.parquet.shard.json", parts / f"p-{name}.json.shard.json")
    code, said = command("merge", parts / "p-*.json", "-o", parts / "joined.jsonl")
    assert code == 0, said
    joined = [json.loads(line) for line in (parts / "joined.jsonl").read_text().splitlines()]
    assert [{k: r[k] for k in ROWS[0]} for r in joined] == ROWS


def test_rows_without_a_score_in_json_are_not_fine_tuned_on(monkeypatch):
    taken: list[Dataset] = []
    monkeypatch.setattr("clear_datasets.finetune.finetune", lambda rows, *_, **__: taken.append(rows))
    scores = [None, float("nan"), 0.9, 0.1]
    rows = Dataset.from_list([{**r, "clear_confidence": s} for r, s in zip(ROWS[:4], scores, strict=True)])
    train_writer(rows.map(decide(0.5), batched=True), Clear("m").with_writer("w"))
    assert taken[0]["question"][:] == [ROWS[2]["question"]]


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/3", "a/b", "1/0"])
def test_a_part_that_there_cannot_be_is_refused(shard, parts):
    code, said = command("score", parts / "train.jsonl", "-o", parts / "x.parquet", "-m", "m", f"--shard={shard}")
    assert (code, f"--shard is {shard!r}; expected one of 0/N to N-1/N" in said) == (2, True), said


def test_replicas_are_a_number(parts):
    code, said = command("score", parts / "train.jsonl", "-o", parts / "x.parquet", "-m", "m", "--replicas", "all")
    assert (code, "--replicas is 'all'; expected a number of engines, or auto" in said) == (2, True), said


def test_more_parts_than_rows_and_nothing_to_join(parts):
    code, said = command("score", parts / "train.jsonl", "-o", parts / "x.parquet", "-m", "m", "--shard", "0/10")
    assert (code, "--shard 0/10 of 9 rows is empty" in said) == (1, True), said
    code, said = command("merge", parts / "nothing-*.parquet", "-o", parts / "joined.parquet")
    assert (code, "no file matches" in said) == (1, True)


def test_parts_cover_the_rows():
    for rows in (8, 9, 100):
        for of in (1, 3, 8):
            spans = [Stages(Path("x"), 1, (i, of)).part(rows) for i in range(of)]
            assert [i for a, b in spans for i in range(a, b)] == list(range(rows))


def test_a_folder_of_files_of_one_kind_is_a_dataset(parts):
    rows = Dataset.from_list(ROWS)
    write_folder(rows, parts / "all", rows=4)
    assert sorted(f.name for f in (parts / "all").iterdir()) == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert load(str(parts / "all"), None, None, None, None).to_list() == ROWS
    (parts / "all" / "README.md").write_text("other files are left alone")
    assert len(load(str(parts / "all"), None, None, None, 5)) == 5
    (parts / "all" / "more.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"with \.jsonl and \.parquet files: give its files"):
        load(str(parts / "all"), None, None, None, None)
    (parts / "none").mkdir()
    with pytest.raises(ValueError, match="with no data files"):
        load(str(parts / "none"), None, None, None, None)


def test_settings_that_change_no_answer_and_notes_beside_a_model_go_on_with_the_batches(tmp_path, tiny, capsys):  # noqa: F811
    """What the errors of an engine advise, smaller batches, say, must not cost what is done."""
    rows = Dataset.from_list(ROWS)
    stages = Stages(tmp_path / "stages", 4)

    def mark(clear: Clear, rows: Dataset = rows) -> str:
        return stages.planned(rows, clear.score, "score", 4)[0]

    for one, other in (
        (OpenAI("m", "http://localhost/v1"), OpenAI("m", "http://localhost/v1", concurrency=2)),
        (VLLM("m"), VLLM("m", gpu_memory_utilization=0.5, max_model_len=1024)),
        (Transformers(tiny), Transformers(tiny, batch_tokens=512)),
    ):
        assert mark(Clear(engine=one)) == mark(Clear(engine=other))
        assert mark(Clear(engine=one)) != mark(Clear(engine=one, confidence=BSDetector(k=3)))
    assert mark(Clear(engine=VLLM("m"))) != mark(Clear(engine=VLLM("other")))
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    before = mark(Clear(str(model)))
    for note in ("README.md", ".gitattributes"):
        (model / note).write_text("a model")
    (model / "runs").mkdir()
    assert mark(Clear(str(model))) == before
    (model / "config.json").touch()
    assert mark(Clear(str(model))) != before
    stages.score(rows, Clear(engine=Scripted(), cache=False))
    assert "of no use here" not in capsys.readouterr().err
    stages.score(rows, Clear(engine=Scripted(), confidence=BSDetector(k=3), cache=False))
    said = " ".join(capsys.readouterr().err.split())
    assert "stages has batches of other rows, files or settings, which are of no use here" in said


def test_rows_that_were_refused_are_asked_again_where_that_is_wanted(tmp_path):
    rows = Dataset.from_list([{"question": "x" * (900 * (i == 5) + 1), "answer": "y"} for i in range(8)])
    refusing, mended = Clear(engine=Scripted(limit=800), cache=False), Clear(engine=Scripted(limit=8_000), cache=False)
    found = Stages(tmp_path, 4).score(rows, refusing)
    assert [i for i, e in enumerate(found["clear_error"]) if e] == [5]
    marks = [Stages(tmp_path, 4).planned(rows, clear.score, "score", 4)[1] for clear in (refusing, mended)]
    marks[0].rename(marks[1])  # of a server nothing tells that it takes more now
    assert Stages(tmp_path, 4).score(rows, mended)["clear_error"][5]
    untouched = marks[1] / "000000000-000000004.parquet"
    before = untouched.stat().st_mtime_ns
    assert not any(Stages(tmp_path, 64, retry=True).score(rows, mended)["clear_error"])
    assert untouched.stat().st_mtime_ns == before
    assert not any(Stages(tmp_path, 4).score(rows, mended)["clear_error"])


def test_parts_by_different_engines_are_said_to_be(parts):
    beside = parts / "part-a.parquet.shard.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"engine": "VLLM"}))
    code, said = command("merge", parts / "part-*.parquet", "-o", parts / "joined.parquet")
    assert code == 0
    assert "is by Transformers" in said
    assert "by VLLM: had one of them no GPU?" in " ".join(said.split())
