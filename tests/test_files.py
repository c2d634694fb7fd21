"""Rows from files and to files: what goes in comes out, and nothing is overwritten that was not written here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, Features, Image, Value

from clear_datasets import threshold
from clear_datasets.files import check_columns, check_folder, check_out, write, write_folder, write_text
from clear_datasets.reading import load

ODD = {
    "question": ["When?", "How many?"],
    "answer": ["2024-01-05", "1999-12-31"],
    "n": [1, 2],
    "x": [0.1234567890123456, 1e-300],
    "at": ["2024-01-05T10:00:00Z", "2024-01-06T10:00:00Z"],
    "tags": [["é"], ["2", "3"]],
}
LINES = [json.dumps(dict(zip(ODD, row, strict=True)), ensure_ascii=False) for row in zip(*ODD.values(), strict=True)]


def rows(src: Path | str) -> Dataset:
    return load(str(src), None, None, None, None)


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_several_json_files_come_out_as_they_went_in(ending, tmp_path):
    for name, line in zip("ab", LINES, strict=True):
        (tmp_path / f"{name}{ending}").write_text(f"[{line}]" if ending == ".json" else line + "\n")
    write(rows(tmp_path / f"*{ending}"), tmp_path / "out" / "all.jsonl")
    assert (tmp_path / "out" / "all.jsonl").read_text().splitlines() == LINES  # as texts: 1 is not 1.0


@pytest.mark.parametrize("several", [False, True])
def test_texts_like_dates_stay_texts_wherever_they_stand(several, tmp_path):
    line = json.dumps({"question": "What? " * 200, "answer": "%s"}) + "\n"
    parts = [line % "42" * 9_000, line % "2024-01-05" * 9_000]  # of more than the 10 MB that the loader takes at a time
    for name, part in zip("ab", parts if several else ["".join(parts)], strict=False):
        (tmp_path / f"{name}.jsonl").write_text(part)
    found = rows(tmp_path / "*.jsonl")
    assert found["answer"][:] == ["42"] * 9_000 + ["2024-01-05"] * 9_000


def test_times_before_other_texts_are_refused_with_the_reason(tmp_path):
    for name, answer in zip("ab", ["2024-01-05", "42"], strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"answer": answer}))
    with pytest.raises(ValueError, match=r"cannot read .*a\.jsonl, .*b\.jsonl: Failed to parse string: '42'"):
        rows(tmp_path / "*.jsonl")


def test_an_object_over_several_lines_is_a_row(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"question": "Who?", "answer": "4"}, indent=1))
    assert rows(tmp_path / "a.json").to_list() == [{"question": "Who?", "answer": "4"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"question": "Who?"}\n\n{"question": \n', r"cannot read .*a\.jsonl: JSON parse error"),
        ("a.jsonl", '{"question": "Who?"}\n["x"]\n', r"cannot read .*a\.jsonl: .*from object to string"),
        ("a.jsonl", '{"at": "2024-01-05"}\n3\n', r"cannot read .*a\.jsonl: JSON parse error"),
        ("a.csv", "question,answer\n", r"cannot read .*a\.csv: there are no rows"),
        ("a.jsonl", "\n", r"cannot read .*a\.jsonl: there are no rows"),
        ("a.jsonl", "", r"cannot read .*a\.jsonl: there are no rows"),
        ("a.json", "[]", r"cannot read .*a\.json: there are no rows"),
        ("a.json", "[1, 2]", r"a row of .*a\.json is 1; expected an object"),
        ("a.csv", "", r"a\.csv: .*expected CSV in UTF-8"),
        ("a.csv", b"question,\xff\n", r"a\.csv: .*expected CSV in UTF-8"),
        ("a.parquet", "no such thing", r"cannot read .*a\.parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(name, text, message, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / name)


TOOLS = [
    {"messages": [{"role": "user", "content": "Sum?"}, {"role": "assistant", "content": "3", "tool": {"x": 1}}]},
    {"messages": [{"role": "user", "content": "At?"}, {"role": "assistant", "content": "5", "tool": {"y": ["a"]}}]},
    {"messages": [{"role": "user", "content": "On?"}, {"role": "assistant", "content": "7", "tool": {"x": "z"}}]},
]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type for any JSON")
def test_objects_of_any_kind_stay_as_they_are(tmp_path):
    lines = list(map(json.dumps, TOOLS))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    write(rows(tmp_path / "in.jsonl"), tmp_path / "out.jsonl")
    assert list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())) == TOOLS


MIXED = [
    {"question": "A?", "answer": "4", "meta": {"a": 1}, "x": 0.1234567890123456},
    {"question": "B?", "answer": 5, "meta": {"b": [0.1234567890123456, {"c": "null"}]}, "x": 1e-300},
    {"question": "C?", "answer": "[1]", "meta": {"a": "2"}, "x": 2.0},
    {"question": "D?", "answer": '"quoted"', "meta": None, "x": 0.1},
    {"question": "E?", "answer": "\ud83d", "meta": {}, "x": None},
]
PARTS = [
    [{"type": "text", "text": "Sum?"}], "4", '{"a": 1}', " é\n", "\ud83d",
]  # fmt: skip
CHATS = [
    {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": target}]}
    for part, target in zip(PARTS, [*PARTS[1:], "x"], strict=True)
]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type for any JSON")
@pytest.mark.parametrize("wanted", [MIXED, CHATS])
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_texts_in_columns_of_several_types_stay_texts(wanted, ending, tmp_path):
    lines = list(map(json.dumps, wanted))
    (tmp_path / f"in{ending}").write_text("\n".join(lines) if ending == ".jsonl" else f"[{', '.join(lines)}]")
    found = rows(tmp_path / f"in{ending}")
    write(found, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text().splitlines() == [
        json.dumps(row, ensure_ascii=False).replace("\ud83d", "\\ud83d") for row in wanted
    ]
    read = [row["messages"][1]["content"] if "messages" in row else row["answer"] for row in found]
    assert read[:3] == [row["messages"][1]["content"] if "messages" in row else row["answer"] for row in wanted[:3]]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type for any JSON")
@pytest.mark.parametrize("several", [False, True])
def test_columns_that_are_of_several_types_late_are_read_as_they_are(several, tmp_path):
    first = {"messages": [{"role": "user", "content": "What? " * 400}, {"role": "assistant", "content": "4"}]}
    parts = [[first] * (10 if several else 5_000), CHATS]  # of more than the 10 MB that the loader takes at a time
    texts = ["".join(json.dumps(row) + "\n" for row in part) for part in parts]
    for name, text in zip("ab", texts if several else ["".join(texts)], strict=False):
        (tmp_path / f"{name}.jsonl").write_text(text)
    write(rows(tmp_path / "*.jsonl"), tmp_path / "out.jsonl")
    assert list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())) == parts[0] + parts[1]


def test_nan_is_null_in_json_wherever_it_stands(tmp_path):
    nan = float("nan")
    ds = Dataset.from_dict({"m": [{"x": nan, "y": 1.5}], "v": [[nan, 2.0]], "c": [nan]})
    for name in ("out.jsonl", "out.json"):
        write(ds, tmp_path / name)
        assert "NaN" not in (tmp_path / name).read_text()
        assert rows(tmp_path / name).to_list() == [{"m": {"x": None, "y": 1.5}, "v": [None, 2.0], "c": None}]


def test_an_out_without_a_name_is_refused():
    for out in (".", "/", ""):
        with pytest.raises(ValueError, match=r"OUT, .*, has no name: give a file or a new folder, as .*curated\.jsonl"):
            check_out(Path(out), "train.jsonl")
        with pytest.raises(ValueError, match="has no name"):
            check_folder(Path(out), None, Path("/kept"))


def test_rows_without_some_columns_and_wider_numbers_are_read(tmp_path):
    lines = [{"question": "Who?", "n": 1, "more": {"z": 1, "a": "x"}}, {"question": "When?", "n": 2.5, "tags": ["é"]}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(map(json.dumps, lines)))
    found = rows(tmp_path / "a.jsonl")
    assert found.column_names == ["question", "n", "more", "tags"]
    assert [list(more or ()) for more in found["more"]] == [["z", "a"], []]
    assert found["tags"][:] == [None, ["é"]]
    assert found["n"][:] == [1.0, 2.5]


CSV = "id,question,answer,sure,note\n007,How many?,42,true,1.50\n008,Is it?,,false,\n"


def test_csv_has_texts_alone_and_our_columns_have_their_types(tmp_path):
    (tmp_path / "in.csv").write_text(CSV)
    found = rows(tmp_path / "in.csv")
    assert found["answer"][:] == ["42", None]
    write(found, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == CSV
    more = {"clear_confidence": [0.5, float("nan")], "clear_error": ["", ""], "clear_agreed": [True, None],
            "clear_drawn": [3, None]}  # fmt: skip
    for name, values in more.items():
        found = found.add_column(name, values)
    write(found, tmp_path / "scored.csv")
    again = rows(tmp_path / "scored.csv")
    assert again["clear_confidence"][:] == [0.5, None]
    assert (again["clear_agreed"][:], again["clear_drawn"][:]) == ([True, None], [3, None])
    assert threshold(again) == 0.5
    assert {again.features[name].dtype for name in ("id", "note", "clear_error")} == {"string"}
    assert again.features["clear_confidence"] == Value("float32")


def test_csv_files_of_other_columns_are_refused_and_the_order_does_not_matter(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nWho?,Ada\n")
    (tmp_path / "b.csv").write_text("answer,question\n7,How many?\n")
    assert rows(tmp_path / "*.csv")["answer"][:] == ["Ada", "7"]
    (tmp_path / "c.csv").write_text("question,answer,note\nWho?,Ada,x\n")
    with pytest.raises(ValueError, match=r"a\.csv has the columns .*c\.csv has question, answer, note"):
        rows(tmp_path / "*.csv")


def test_names_with_brackets_are_names(tmp_path, monkeypatch):
    folder = tmp_path / "runs[1]"
    folder.mkdir()
    for name in ("a.jsonl", "b[1].jsonl"):
        (folder / name).write_text(json.dumps({"question": name, "answer": "x"}))
    monkeypatch.chdir(folder)
    assert rows("*.jsonl")["question"][:] == ["a.jsonl", "b[1].jsonl"]
    assert rows("b[1].jsonl")["question"][:] == ["b[1].jsonl"]
    assert len(rows(folder)) == 2


def test_a_folder_is_replaced_only_where_it_holds_such_rows(tmp_path):
    out, kept = tmp_path / "out", tmp_path / "stages"
    ds = Dataset.from_dict({**ODD, "clear_error": ["", ""]})
    check_folder(out, None, kept)
    write_folder(ds, out, rows=1)
    check_folder(out, None, kept)
    write_folder(ds, out)
    assert [f.name for f in out.iterdir()] == ["train-00000-of-00001.parquet"]
    for source in (out, out / "*.parquet", tmp_path / "**" / "*.parquet", out / "train-00000-of-00001.parquet"):
        with pytest.raises(ValueError, match=r"is where the rows come from|which the next run would take for rows"):
            check_folder(out, str(source), kept)
    with pytest.raises(ValueError, match=r"means .*stages.*0\.parquet, too"):
        check_folder(None, str(tmp_path / "**" / "*.parquet"), kept)
    check_folder(None, str(tmp_path / "data" / "*.parquet"), kept)
    with pytest.raises(ValueError, match="where batches are kept, is inside of OUT"):
        check_folder(out, None, out / "clear_stages")
    theirs = tmp_path / "data" / "train-00000-of-00001.parquet"  # as the Hub names them
    write(Dataset.from_dict(ODD), theirs)
    with pytest.raises(ValueError, match="with other things than rows"):
        check_folder(theirs.parent, None, kept)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="with other things than rows"):
        check_folder(out, None, kept)
    with pytest.raises(ValueError, match="with other things than rows"):
        check_folder(out / "mine.txt", None, kept)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"], r"splits test and train: .*/test\*\.jsonl"),
        (["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"], "splits train_gen and train_sft: "),
        (["my-train.jsonl", "my_dev.jsonl"], "files of the splits train and validation"),
        (["a.jsonl", "b.jsonl.gz"], r"with b\.jsonl\.gz, which is packed: give its files"),
    ],
)  # fmt: skip
def test_a_folder_of_which_some_would_be_mixed_or_left_out_is_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "rows" / name).write_text(LINES[0] + "\n")
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / "rows")


def test_a_folder_of_one_split_is_read_whole(tmp_path):
    for name in ("train-1.jsonl", "train-2.jsonl", "contest.jsonl", ".hidden.jsonl.gz"):
        (tmp_path / name).write_text(LINES[0] + "\n")
    (tmp_path / "figures").mkdir()
    (tmp_path / "clear_stages").mkdir()
    (tmp_path / "clear_stages" / "0.jsonl").write_text(LINES[0] + "\n")
    assert len(rows(tmp_path)) == 3
    (tmp_path / "figures" / "a.jsonl").write_text(LINES[0] + "\n")
    with pytest.warns(UserWarning, match=r"figures has \.jsonl files, too, which are not read"):
        assert len(rows(tmp_path)) == 3


def test_what_stands_beside_a_file_is_not_taken_for_rows(tmp_path):
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(f"[{LINES[0]}]")
    for name in ("a.json.settings.json", "b.json.shard.json"):
        (tmp_path / name).write_text(json.dumps({"model": "m"}))
    (tmp_path / "of.settings.json").write_text(f"[{LINES[0]}]")  # of nothing
    assert len(rows(tmp_path)) == len(rows(tmp_path / "*.json")) == 3


def test_lists_are_not_written_into_csv(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(LINES))
    with pytest.raises(
        ValueError, match=r"column 'tags' would not be read back from CSV: end OUT, .*a\.csv, in \.jsonl"
    ):
        write(rows(tmp_path / "a.jsonl"), tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()


def test_a_carriage_return_in_csv_ends_no_row(tmp_path):
    wanted = {"question": ["a\rb", "c, d", "e\r\nf", None, 'say "x"'], "answer": ["007", "1\r", "2", "x", None]}
    write(Dataset.from_dict(wanted), tmp_path / "a.csv")
    assert rows(tmp_path / "a.csv").to_dict() == wanted


@pytest.mark.parametrize("first", ["1,2,3,", "Who?,Ada, of course,x"])
def test_csv_whose_first_row_has_too_many_cells_is_refused(first, tmp_path):
    (tmp_path / "a.csv").write_text(f"question,answer,note\n{first}\n4,5,6\n")
    with pytest.raises(ValueError, match=r"a\.csv: its first row has more cells than the 3 names"):
        rows(tmp_path / "a.csv")


@pytest.mark.parametrize("feature", [Image(), [Value("binary")], {"price": Value("decimal128(5, 2)")}])
def test_what_json_does_not_have_is_refused_before_it_is_written(feature, tmp_path):
    ds = Dataset.from_dict({"question": [], "x": []}, Features({"question": Value("string"), "x": feature}))
    with pytest.raises(ValueError, match=r"column 'x' would not be read back from JSONL: end OUT, .*, in \.parquet"):
        check_columns(ds, tmp_path / "a.jsonl")
    check_columns(ds, tmp_path / "a.parquet")


def test_bytes_in_json_end_in_an_error(tmp_path):
    with pytest.raises(TypeError, match=r"JSON has no bytes: end OUT in \.parquet"):
        write(Dataset.from_dict({"raw": [b"no JSON"]}), tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "folder"])
def test_what_is_written_is_on_the_disk_before_it_gets_its_name(name, tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, Path.replace

    def synced(f: int) -> None:
        fsync(f)
        seen.append(("on the disk", os.fstat(f).st_ino, os.fstat(f).st_size))

    def renamed(self: Path, target: Path) -> Path:
        if self.is_file():
            seen.append((target.name, self.stat().st_ino, self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    out, ds = tmp_path / name, Dataset.from_dict({"question": ["Who?"], "answer": ["Ada"]})
    if name == "folder":
        write_folder(ds, out)
    elif name == "a.txt":
        write_text(out, "Who?")
    else:
        write(ds, out)
    [file] = out.iterdir() if name == "folder" else [out]
    stat = file.stat()
    assert seen == [("on the disk", stat.st_ino, stat.st_size), (file.name, stat.st_ino, stat.st_size)]
