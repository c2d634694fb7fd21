"""Datasets from and to files, chosen by their endings."""

from __future__ import annotations

import os
import shutil
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load(src: str, split: str | None, config: str | None, revision: str | None, limit: int | None) -> Dataset:
    """Rows of a Hub dataset, of files that match a glob, or of a `save_to_disk` folder.

    Raises:
        FileNotFoundError: No file matches.
        ValueError: There is a choice of splits, files of several kinds, or no row.
    """
    import datasets

    path = Path(src)
    if path.is_dir() and not (path / "dataset_info.json").exists() and not (path / "dataset_dict.json").exists():
        raise ValueError(f"{src} is a folder without a saved dataset: give its files, as in '{src}/*.parquet'")
    if path.is_dir():
        loaded = datasets.load_from_disk(src)
    elif path.suffix in LOADERS or any(c in src for c in "*?["):
        files = sorted(glob(src, recursive=True))
        kinds = {Path(f).suffix for f in files}
        if not files:
            raise FileNotFoundError(f"no file matches {src}")
        if len(kinds) > 1 or not kinds <= set(LOADERS):
            raise ValueError(f"{src} matches {', '.join(sorted(kinds))} files; expected one of {', '.join(LOADERS)}")
        loaded = datasets.load_dataset(LOADERS[kinds.pop()], data_files=files, split="train")
    else:
        loaded = datasets.load_dataset(src, config, revision=revision)
    if isinstance(loaded, dict):
        if split is None and len(loaded) > 1:
            raise ValueError(f"{src} has the splits {', '.join(loaded)}: choose one with --split")
        if split is not None and split not in loaded:
            raise ValueError(f"{src} has no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split or next(iter(loaded))]
    if not len(loaded):
        raise ValueError(f"{src} has no rows")
    taken: Dataset = loaded.select(range(min(limit or len(loaded), len(loaded))))
    return taken


def check_out(out: Path) -> None:
    """Refuse what `write` could not write or should not replace, before anything is paid for.

    Raises:
        ValueError: The ending is unknown, or the folder holds more than a dataset.
    """
    if out.suffix and out.suffix not in LOADERS:
        raise ValueError(
            f"cannot write {out.suffix} files: end OUT in {', '.join(LOADERS)}, or give a folder without an ending"
        )
    if out.is_dir():
        names = {f.name for f in out.iterdir() if f.suffix != ".arrow"}
        if names - {"dataset_info.json", "state.json"}:
            raise ValueError(f"{out} is a folder with other things in it: give another OUT")


def write(ds: Dataset, out: Path) -> None:
    """Write beside OUT, then rename: a reader never sees half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.suffix in (".jsonl", ".json"):
            # A JSON array is written in one piece, or not at all.
            size = max(len(ds), 1) if out.suffix == ".json" else None
            ds.to_json(part, lines=out.suffix == ".jsonl", batch_size=size, force_ascii=False)
        elif out.suffix == ".csv":
            ds.to_csv(part, index=False)
        elif out.suffix == ".parquet":
            ds.to_parquet(part)
        else:
            ds.save_to_disk(part)
            if out.is_dir():  # a dataset and nothing else: see check_out
                shutil.rmtree(out)
        part.rename(out)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
