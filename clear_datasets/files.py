"""Datasets to files, chosen by their endings: what `reading` took in comes out as it was."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.infer_format import is_media
from clear_datasets.json_columns import decoded, has_json
from clear_datasets.reading import LOADERS, is_folder_of_files

if TYPE_CHECKING:
    from datasets import Dataset


def check_out(out: Path, src: str, *beside: Path) -> None:
    """Refuse what `write` could not write or should not replace, before anything is paid for.

    Args:
        out: What is to be written.
        src: Where the rows come from: a file, a folder or a glob, or a dataset of the Hub.
        beside: What else is written.

    Raises:
        ValueError: OUT has no name or an unknown ending, a folder stands for a file or a file for a folder, the folder
            holds other things than a dataset, or OUT is SRC or one of its files, or would be one at the next run.
    """
    _check_name(out)
    if out.suffix and out.suffix not in LOADERS:
        raise ValueError(
            f"cannot write {out.suffix} files: end OUT in {', '.join(LOADERS)}, or give a folder without an ending"
        )
    if any(_matches(made, src) for made in (out, *beside, out.with_name("clear_stages") / "score" / "0.parquet")):
        raise ValueError(f"SRC, {src}, means {out} or what is kept beside it, too: give an OUT in another folder")
    if not out.exists():
        return
    if Path(src).exists() and out.samefile(src):
        raise ValueError(f"OUT is SRC, {out}: give another OUT, the source stays as it is")
    if out.is_dir() == bool(out.suffix):
        raise ValueError(f"{out} is a {'folder' if out.is_dir() else 'file'} already: give another OUT")
    if out.is_dir():
        names = {f.name for f in out.iterdir() if f.suffix != ".arrow"}
        if names - {"dataset_info.json", "state.json"} or ("dataset_info.json" not in names and any(out.iterdir())):
            raise ValueError(f"{out} is a folder with other things in it: give another OUT")


def _check_name(out: Path) -> None:
    if not out.name:  # nothing could be written beside it, and renamed
        raise ValueError(f"OUT, {out}, has no name: give a file or a new folder, as {out / 'curated.jsonl'}")


def check_columns(ds: Dataset, out: Path) -> None:
    """Refuse lists and objects in CSV, which would be texts that nobody reads back, and bytes and images in JSON.

    Raises:
        ValueError: OUT is a CSV or JSON file, and a column holds them.
    """
    holds = {".csv": _is_flat, ".jsonl": _is_json, ".json": _is_json}.get(out.suffix)
    wrong = [repr(name) for name, feature in ds.features.items() if holds and not holds(feature)]
    if wrong:
        raise ValueError(
            f"column{'s' * (len(wrong) > 1)} {', '.join(wrong)} would not be read back from {out.suffix[1:].upper()}: "
            f"end OUT, {out}, in {'.jsonl or ' * (holds is _is_flat)}.parquet"
        )


def _is_flat(feature: Any) -> bool:
    from datasets import ClassLabel, Value

    return isinstance(feature, Value | ClassLabel)


def _is_json(feature: Any) -> bool:
    """Whether JSON has values of a feature; times are texts in it."""
    if isinstance(feature, Mapping):
        return all(map(_is_json, feature.values()))
    if hasattr(feature, "feature"):
        return _is_json(feature.feature)
    dtype = getattr(feature, "dtype", None) or ""
    return not (is_media(feature) or re.match("(large_)?binary|duration|decimal", dtype))


def check_folder(out: Path | None, src: str | None, kept: Path) -> None:
    """Refuse a folder that `write_folder` should not replace, before anything is paid for.

    Args:
        out: What is to be written; None for nothing but `kept`.
        src: Where the rows come from; None where they are in memory.
        kept: The folder of what is done so far.

    Raises:
        ValueError: OUT has no name, is no folder, or holds other things than such rows, the source, or what is done
            so far; or the source would take one of both for rows at the next run.
    """
    made = [kept / "score" / "0.parquet", *([out / "train-00000-of-00001.parquet"] if out else [])]
    if src is not None and (also := [file for file in made if _matches(file, src)]):
        raise ValueError(
            f"the source, {src}, means {also[0]}, too, which the next run would take for rows: give other folders"
        )
    if out is None:
        return
    _check_name(out)
    taken = [] if src is None else [Path(f) for f in ([src] if Path(src).exists() else glob(src, recursive=True))]
    if any((f if f.is_dir() else f.parent).resolve() == out.resolve() for f in taken):
        raise ValueError(f"OUT, {out}, is where the rows come from: give another one, the source stays as it is")
    if Path(os.path.abspath(kept)).is_relative_to(os.path.abspath(out)):
        raise ValueError(f"{kept}, where batches are kept, is inside of OUT, {out}: give another OUT, as {out}/rows")
    if out.exists() and (not out.is_dir() or not all(map(_is_scored, out.iterdir()))):
        raise ValueError(f"{out} is there, with other things than rows that were scored before: give another OUT")


def _is_scored(file: Path) -> bool:
    """Whether `write_folder` may have written a file; the Hub names others so, too."""
    import pyarrow.parquet as pq

    with suppress(ValueError, OSError):
        return fnmatch(file.name, "train-?????-of-?????.parquet") and "clear_error" in pq.read_schema(file).names
    return False


def _matches(file: Path, pattern: str) -> bool:
    """Whether a glob, or a folder of files, means a file, be it there or not."""
    if is_folder_of_files(Path(pattern)):
        return file.suffix in LOADERS and file.parent.resolve() == Path(pattern).resolve()
    if Path(pattern).exists() or not any(c in pattern for c in "*?["):
        return False
    wanted, parts = Path(os.path.abspath(pattern)).parts, Path(os.path.abspath(file)).parts
    if "**" in wanted:
        return fnmatch(str(Path(*parts)), str(Path(*wanted)).replace("/**/", "/*"))
    return len(parts) == len(wanted) and all(map(fnmatch, parts, wanted))


def write(ds: Dataset, out: Path) -> None:
    """Write beside OUT, then rename: a reader never sees half a file, and OUT stays as it was where writing fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _beside(out) as part:
        if out.suffix in (".jsonl", ".json"):
            _write_json(ds, part, array=out.suffix == ".json")
        elif out.suffix == ".csv":
            check_columns(ds, out)
            ds.to_csv(part, index=False, quoting=csv.QUOTE_NONNUMERIC if _has_returns(ds) else csv.QUOTE_MINIMAL)
        elif out.suffix == ".parquet":
            with _Enduring(part.open("wb", buffering=0)) as f:
                ds.to_parquet(f)
                f.check()
        else:
            ds.save_to_disk(part)


def write_folder(ds: Dataset, out: Path, rows: int = 100_000) -> None:
    """The same into a folder of Parquet files of so many rows, which any program reads."""
    out.parent.mkdir(parents=True, exist_ok=True)
    count = max(1, math.ceil(len(ds) / rows))
    with _beside(out) as part:
        part.mkdir()
        for i in range(count):
            write(
                ds.select(range(i * rows, min((i + 1) * rows, len(ds)))), part / f"train-{i:05}-of-{count:05}.parquet"
            )


def write_text(file: Path, text: str) -> None:
    """The same for a small file."""
    with _beside(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    mine = secrets.token_hex(4)  # process numbers are those of others in other containers
    part, old = (out.with_name(f".{out.name}.{mine}{end}") for end in ("", ".old"))
    try:
        yield part
        if out.is_dir():  # a dataset and nothing else: see check_out and check_folder
            out.rename(old)
        elif part.is_file():
            _to_disk(part)
        part.replace(out)
    except OSError as error:
        raise OSError(
            f"cannot write {out} ({error.strerror or error}): what was there before stays; "
            "once this is mended, the same command goes on from what was answered"
        ) from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (part, old):
            if left.is_dir():
                shutil.rmtree(left)
            left.unlink(missing_ok=True)


def _has_returns(ds: Dataset) -> bool:
    """Whether a text holds a carriage return, which ends a row unless it is quoted; Python quotes it from 3.13 on."""
    import pyarrow.compute as pc
    from pyarrow.types import is_large_string, is_string

    texts = (c for c in ds.data.columns if is_string(c.type) or is_large_string(c.type))
    return any(pc.any(pc.match_substring(column, "\r")).as_py() for column in texts)


def _to_disk(file: Path) -> None:
    """Before the rename: a machine that loses its power would keep the new name, and nothing under it."""
    with file.open("r+b") as f:
        os.fsync(f.fileno())


class _Enduring(io.BufferedWriter):
    """A file that says in the end what went wrong: a write that fails makes pyarrow abort the process."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def check(self) -> None:
        """Raise what went wrong."""
        self.flush()
        if self.error is not None:
            raise self.error


def _write_json(ds: Dataset, file: Path, array: bool) -> None:
    """As `Dataset.to_json` does, which goes through pandas: that rounds numbers, and makes 1.0 of 1 beside null."""
    with file.open("w", encoding="utf-8", errors="backslashreplace") as f:  # which is how JSON writes half a surrogate
        f.write("[\n" if array else "")
        for i, row in enumerate(_rows(ds)):
            f.write(",\n" if array and i else "")
            f.write(json.dumps(_without_nan(row), ensure_ascii=False, default=_plain))
            f.write("" if array else "\n")
        f.write("\n]\n" if array else "")


def _rows(ds: Dataset) -> Iterator[dict[str, Any]]:
    """The rows with values of any JSON as they are stored."""
    columns = {name: feature for name, feature in ds.features.items() if has_json(feature)}
    for table in ds.with_format("arrow").iter(1000):
        for row in table.to_pylist():
            yield row | {name: decoded(row[name], feature) for name, feature in columns.items()}


def _without_nan(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(_without_nan, value))
    return None if isinstance(value, float) and math.isnan(value) else value


def _plain(value: Any) -> str:
    if not hasattr(value, "isoformat"):
        raise TypeError(f"JSON has no {type(value).__name__}: end OUT in .parquet")
    return str(value.isoformat())
