"""Rows from files, chosen by their endings, from folders and from the Hub, as they are there."""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from glob import escape, glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.apply import OURS
from clear_datasets.json_columns import encoded, has_json

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SETTINGS, SHARD = ".settings.json", ".shard.json"  # how names of what is kept beside a file end
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z")
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test",
           "evaluation": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")  # fmt: skip
_PIECE = 10 << 20  # bytes that the loader of JSON reads at a time
_QUOTED = r"^\".*\"$|^\[.*\]$|^\{.*\}$"  # JSON in one line, as the loader writes it
_TIME = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?Z?$"  # as the loader writes one


def load(src: str, split: str | None, config: str | None, revision: str | None, limit: int | None) -> Dataset:
    """Rows of a Hub dataset, of files that match a glob, of a `save_to_disk` folder, or of a folder of files.

    Raises:
        FileNotFoundError: No file matches.
        ValueError: There is a choice of splits, files of several kinds or types, no row, or an option that SRC does not
            have.
    """
    import datasets

    path = Path(src)
    if is_folder_of_files(path):
        src = str(Path(escape(src)) / f"*{_ending_of_files(path)}")
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


def is_folder_of_files(path: Path) -> bool:
    """A folder that `save_to_disk` has not written."""
    return path.is_dir() and not any((path / f"dataset_{name}.json").exists() for name in ("info", "dict"))


def _ending_of_files(folder: Path) -> str:
    """That of the files of a folder: of one kind, of one split, and all that it has."""
    found = [f for f in folder.iterdir() if not (f.name.startswith(".") or f.name == "clear_stages" or is_beside(f))]
    files = [f for f in found if f.suffix in LOADERS and f.is_file()]
    kinds = sorted({f.suffix for f in files})
    splits = sorted({_split_of(f.name) for f in files} - {""})
    packed = sorted(f.name for f in found if f.suffix in _PACKED and Path(f.stem).suffix in LOADERS)
    what = (
        f"without a saved dataset, and with {' and '.join(kinds) or 'no data'} files" if len(kinds) != 1
        else f"with files of the splits {' and '.join(splits)}" if len(splits) > 1
        else f"with {packed[0]}, which is packed" if packed
        else ""
    )  # fmt: skip
    if what:
        some = f"{splits[0] if len(splits) > 1 else ''}*{(kinds or ['.parquet'])[0]}"
        raise ValueError(f"{folder} is a folder {what}: give its files, as in '{folder}/{some}'")
    if deeper := sorted(d.name for d in found if d.is_dir() and any(d.rglob(f"*{kinds[0]}"))):
        warnings.warn(f"{folder / deeper[0]} has {kinds[0]} files, too, which are not read", stacklevel=3)
    return kinds[0]


def is_beside(file: Path) -> bool:
    """Whether a file says what made the one beside it."""
    names = (file.name.removesuffix(end) for end in (SETTINGS, SHARD) if file.name.endswith(end))
    return any(name and file.with_name(name).exists() for name in names)


def _split_of(name: str) -> str:
    """The split that `datasets` takes a file for by its name; "" for none."""
    found = next((_SPLITS[word] for word in re.split(r"[-._ 0-9]+", name.lower()) if word in _SPLITS), "")
    sharded = re.match(r"(\w+)-\d{5}-of-\d{5}", name)
    return sharded[1] if found and sharded else found  # train_sft and train_gen are two


def _load_files(src: str) -> Dataset:
    files = [src] if Path(src).is_file() else [f for f in sorted(glob(src, recursive=True)) if not is_beside(Path(f))]
    kinds = {Path(f).suffix for f in files}
    if not files:
        raise FileNotFoundError(f"no file matches {src}")
    if len(kinds) > 1 or not kinds <= set(LOADERS):
        raise ValueError(f"{src} matches {', '.join(sorted(kinds))} files; expected one of {', '.join(LOADERS)}")
    kind, files = LOADERS[kinds.pop()], [os.path.abspath(f) for f in files]
    return _load_json(files) if kind == "json" else _load_csv(files) if kind == "csv" else _loaded(kind, files)


def _loaded(kind: str, files: Sequence[str], **options: Any) -> Dataset:
    import datasets

    with explained(files):  # the loader takes each name for a pattern
        return datasets.load_dataset(kind, data_files=[escape(f) for f in files], split="train", **options)


@contextmanager
def explained(files: Sequence[str]) -> Iterator[None]:
    """Say why files cannot be read, and which: `datasets` says neither."""
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # the last, of an empty file
        cause = (isinstance(error, DatasetGenerationError) and error.__cause__) or error
        why, kind = " ".join(str(cause).split()), OSError if isinstance(cause, OSError) else ValueError
        why = "there are no rows" if not why or "corresponds to no data" in why else why
        raise kind(f"cannot read {', '.join(files[:3])}{', ...' * (len(files) > 3)}: {why}") from error


def _load_csv(files: Sequence[str]) -> Dataset:
    """CSV has no types: all cells are texts, "007" and "None", too, and answers that are numbers; not so our columns.

    Raises:
        ValueError: A file is no CSV, or the files have not the same columns.
    """
    from datasets import Features, Value

    names, *others = map(_csv_columns, files)
    for file, found in zip(files[1:], others, strict=True):
        if set(found) != set(names):
            raise ValueError(f"{files[0]} has the columns {', '.join(names)}, {file} has {', '.join(found)}")
    types = {name: OURS.get(name, "string") for name in names}
    first = {"bool": "string", "int32": "float32"}  # pandas has no empty bool or int
    features = Features({name: Value(first.get(kind, kind)) for name, kind in types.items()})
    rows = _loaded("csv", files, features=features, keep_default_na=False, na_values=[""])
    wanted = Features({name: Value(kind) for name, kind in types.items()})
    return rows if wanted == features else rows.cast(wanted)


def _csv_columns(file: str) -> list[str]:
    import pandas as pd  # type: ignore[import-untyped]

    try:
        found = pd.read_csv(file, nrows=1)
    except ValueError as error:
        raise ValueError(f"cannot read {file}: {error}; expected CSV in UTF-8, names of columns first") from error
    # pandas takes what is too much for names of rows, and moves the rest.
    if not isinstance(found.index, pd.RangeIndex):
        raise ValueError(
            f"cannot read {file}: its first row has more cells than the {len(found.columns)} names of columns: "
            "expected as many; a cell with a comma stands in quotes"
        )
    return list(found.columns)


def _load_json(files: Sequence[str]) -> Dataset:
    """By the loader of datasets, but where it writes values anew: see `_is_written_anew`.

    Raises:
        ValueError: A file is no JSON, its rows are no objects, or a column is of several types.
    """
    from datasets import Dataset, Features

    rows = _loaded("json", files)
    if not _is_written_anew(rows, files):
        return rows
    known = tuple((f, os.path.getsize(f), os.stat(f).st_mtime_ns) for f in files)  # into the name of the cache
    features = _texts(rows.features)
    with explained(files):
        for row in (row for file in files for row in _json_values(file)):
            features = _widened(features, row)
        features = Features(features)
        again: Dataset = Dataset.from_generator(
            _json_rows, features=features, gen_kwargs={"files": known, "features": features}
        )
    return again


def _is_written_anew(rows: Dataset, files: Sequence[str]) -> bool:
    """Whether the loader made times of texts, rounded numbers (of an array), or took texts for JSON.

    It does the last where a column is of several types. It knows types by pieces of 10 MB: where a later piece is the
    first to have times or several types, texts stand there as it wrote them for the sake of the former ones.
    """
    if _texts(rows.features) != rows.features or has_json(rows.features) or any(map(_is_array, files)):
        return True
    pieces = len(files) > 1 or os.path.getsize(files[0]) > _PIECE
    return _has_texts(rows, f"{_TIME}|{_QUOTED}" if pieces else _TIME)


def load_as_one(files: Sequence[Path]) -> Dataset:
    """The rows of JSON files as if they stood in one, so that their types are those of all of them."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "rows.jsonl"
        with whole.open("w", encoding="utf-8") as f:
            for file in files:
                f.writelines(json.dumps(row) + "\n" for row in _json_values(str(file)))
        return _load_json([str(whole)])


def _texts(feature: Any) -> Any:
    """A feature with texts in place of times, as JSON has none."""
    from datasets import Value

    if isinstance(feature, Value):
        return Value("string") if feature.dtype.startswith(("timestamp", "date", "time")) else feature
    if isinstance(feature, Mapping):
        return {name: _texts(inner) for name, inner in feature.items()}
    return type(feature)(_texts(feature.feature)) if hasattr(feature, "feature") else feature


def _widened(feature: Any, value: Any) -> Any:
    """A feature with any JSON in place of texts where a value is no text."""
    import datasets

    if value is None:
        return feature
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _widened(inner, value.get(name)) for name, inner in feature.items()}
    if hasattr(feature, "feature") and isinstance(value, list):
        return type(feature)(reduce(_widened, value, feature.feature))
    return datasets.Json() if feature == datasets.Value("string") and not isinstance(value, str) else feature


def _has_texts(rows: Dataset, pattern: str) -> bool:
    """Whether a text, be it in a list or an object, has a pattern."""
    import pyarrow.compute as pc

    return any(
        pc.any(pc.match_substring_regex(texts, pattern)).as_py()
        for column in rows.data.columns
        for chunk in column.chunks
        for texts in _text_arrays(chunk)
    )


def _text_arrays(array: Any) -> Iterator[Any]:
    from pyarrow import types

    if types.is_string(array.type) or types.is_large_string(array.type):
        yield array
    elif types.is_struct(array.type):
        for inner in array.flatten():
            yield from _text_arrays(inner)
    elif types.is_list(array.type) or types.is_large_list(array.type):
        yield from _text_arrays(array.flatten())


def _is_array(file: str) -> bool:
    with open(file, encoding="utf-8-sig") as f:
        return f.read(4096).lstrip().startswith("[")


def _json_rows(files: Sequence[tuple[str, int, int]], features: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of files, with all columns of `features`."""
    for file, *_ in files:
        for row in _json_values(file):
            if not isinstance(row, dict):
                raise ValueError(f"a row of {file} is {json.dumps(row)[:50]}; expected an object")
            yield {name: encoded(row.get(name), feature) for name, feature in features.items()}


def _json_values(file: str) -> Iterator[Any]:
    """The rows of an array or of lines."""
    with open(file, encoding="utf-8-sig", newline="\n") as f:
        if _is_array(file):
            yield from json.load(f)
            return
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} of {file}: {error}") from error
