"""Datasets from and to files, chosen by their endings. What goes in comes out as it was."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_OPTIONS = {"csv": {"keep_default_na": False, "na_values": [""]}}  # "None" and "N/A" are answers


def load(src: str, split: str | None, config: str | None, revision: str | None, limit: int | None) -> Dataset:
    """Rows of a Hub dataset, of files that match a glob, of a `save_to_disk` folder, or of a folder of files.

    Raises:
        FileNotFoundError: No file matches.
        ValueError: There is a choice of splits, files of several kinds, no row, or an option that SRC does not have.
    """
    import datasets

    path = Path(src)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        kinds = sorted({f.suffix for f in path.iterdir() if f.suffix in LOADERS})
        if len(kinds) != 1:
            raise ValueError(
                f"{src} is a folder without a saved dataset, and with {' and '.join(kinds) or 'no data'} files: "
                f"give its files, as in '{src}/*.parquet'"
            )
        src = str(Path(escape(src)) / f"*{kinds[0]}")
        path = Path(src)
    local = path.exists() or path.suffix in LOADERS or any(c in src for c in "*?[")
    if local and (config or revision):
        raise ValueError(f"--config and --revision are of Hub datasets; {src} is none")
    if path.is_dir():
        loaded = datasets.load_from_disk(src)
    elif local:
        loaded = _load_files(src)
    else:
        loaded = datasets.load_dataset(src, config, revision=revision)
    if isinstance(loaded, dict):
        if split is None and len(loaded) > 1:
            raise ValueError(f"{src} has the splits {', '.join(loaded)}: choose one with --split")
        if split is not None and split not in loaded:
            raise ValueError(f"{src} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split or next(iter(loaded))]
    elif split:
        raise ValueError(f"{src} has no splits: leave --split out")
    if not len(loaded):
        raise ValueError(f"{src} has no rows")
    taken: Dataset = loaded.with_format(None).select(range(min(limit or len(loaded), len(loaded))))
    return taken


def _load_files(src: str) -> Dataset:
    import datasets

    files = [src] if Path(src).is_file() else sorted(glob(src, recursive=True))
    kinds = {Path(f).suffix for f in files}
    if not files:
        raise FileNotFoundError(f"no file matches {src}")
    if len(kinds) > 1 or not kinds <= set(LOADERS):
        raise ValueError(f"{src} matches {', '.join(sorted(kinds))} files; expected one of {', '.join(LOADERS)}")
    kind = LOADERS[kinds.pop()]
    loaded: Dataset = datasets.load_dataset(kind, data_files=files, split="train", **_OPTIONS.get(kind, {}))
    if kind == "json" and ((texts := _texts(loaded.features)) != loaded.features or any(map(_is_array, files))):
        known = [(f, os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files]  # into the name of the cache
        loaded = datasets.Dataset.from_generator(
            _json_rows, features=datasets.Features(texts), gen_kwargs={"files": known, "names": [list(texts)]}
        )
    return loaded


def _texts(feature: Any) -> Any:
    """A feature with texts in place of times: JSON has none, but the loader takes texts like dates for them."""
    from datasets import Value

    if isinstance(feature, Value):
        return Value("string") if feature.dtype.startswith(("timestamp", "date", "time")) else feature
    if isinstance(feature, Mapping):
        return {name: _texts(inner) for name, inner in feature.items()}
    return type(feature)(_texts(feature.feature)) if hasattr(feature, "feature") else feature


def _is_array(file: str) -> bool:
    """Whether a file is one JSON array: the loader of datasets 4 reads it by pandas, which rounds numbers."""
    with open(file, encoding="utf-8-sig") as f:
        return f.read(4096).lstrip().startswith("[")


def _json_rows(files: Sequence[tuple[str, int, int]], names: Sequence[list[str]]) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        text = Path(file).read_text(encoding="utf-8-sig")
        rows = json.loads(text) if _is_array(file) else map(json.loads, filter(str.strip, text.split("\n")))
        for row in rows:
            yield {name: row.get(name) for name in names[0]}


def check_out(out: Path, src: str) -> None:
    """Refuse what `write` could not write or should not replace, before anything is paid for.

    Raises:
        ValueError: The ending is unknown, a folder stands for a file or a file for a folder, the folder holds other
            things than a dataset, or OUT is SRC or one of its files.
    """
    if out.suffix and out.suffix not in LOADERS:
        raise ValueError(
            f"cannot write {out.suffix} files: end OUT in {', '.join(LOADERS)}, or give a folder without an ending"
        )
    if any(_matches(made, src) for made in (out, out.with_name("clear_stages") / "score" / "0.parquet")):
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


def _matches(file: Path, pattern: str) -> bool:
    """Whether a glob means a file, be it there or not."""
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
            ds.to_csv(part, index=False)
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
    part, old = (out.with_name(f".{out.name}.{os.getpid()}{end}") for end in ("", ".old"))
    try:
        yield part
        if out.is_dir():  # a dataset and nothing else: see check_out
            out.rename(old)
        part.rename(out)
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
    with file.open("w", encoding="utf-8") as f:
        f.write("[\n" if array else "")
        for i, row in enumerate(ds.with_format(None)):
            # JSON has no nan.
            values = {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in row.items()}
            f.write(",\n" if array and i else "")
            f.write(json.dumps(values, ensure_ascii=False, default=_plain) + ("" if array else "\n"))
        f.write("\n]\n" if array else "")


def _plain(value: Any) -> str:
    if not hasattr(value, "isoformat"):
        raise TypeError(f"JSON has no {type(value).__name__}: end OUT in .parquet")
    return str(value.isoformat())
