"""``score --shard`` and ``clear-datasets merge``: parts of the rows, and the whole of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clear_datasets import options
from clear_datasets.files import check_out, write, write_text
from clear_datasets.reading import is_beside, load, load_as_one
from clear_datasets.results import as_json, check_no_audit, forget, made_by, settings_file, shard_file
from clear_datasets.terminal import clear_errors, console

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear
    from clear_datasets.stages import Stages


def keep_shard(out: Path, clear: Clear, stages: Stages, rows: Dataset) -> None:
    """Write beside OUT which part of the rows it is, for `merge`."""
    from clear_datasets.engines import default_engine
    from clear_datasets.stages import Stages

    number, of = stages.shard
    alone = type(stages) is Stages  # else other machines have engines of their own
    engine = type(clear.engine or default_engine(os.fspath(clear.model), clear.revision)).__name__ if alone else None
    record = {"shard": number, "of": of, "rows": len(rows), "digest": _digest(rows), "settings": made_by(clear, rows),
              "model_state": clear.__getstate__()["stamp"], "engine": engine}  # fmt: skip
    write_text(shard_file(out), as_json(record))


def _digest(rows: Dataset) -> str:
    """Of 1,000 rows from all over, which other rows, or these in another order, do not have."""
    from clear_datasets.infer_format import without_media

    spread = {i * len(rows) // 1000 for i in range(1000)}
    taken = without_media(rows).select(sorted(spread))
    return hashlib.sha256(json.dumps(taken[:], default=str).encode()).hexdigest()[:16]


def merge(
    parts: Annotated[
        list[str], typer.Argument(metavar="PARTS", help="What score --shard has written: files or globs.")
    ],
    out: options.Out,
) -> None:
    """Join the parts that `score --shard` has written, in their order: all of them, and each once."""
    from datasets import concatenate_datasets

    with clear_errors(2):
        check_no_audit(out)
        for pattern in parts:
            check_out(out, pattern, settings_file(out))
    with clear_errors():
        found = {f for p in parts for f in ([p] if Path(p).exists() else glob(p)) if not is_beside(Path(f))}
        files = sorted(map(Path, found))
        known = {file: _shard(file) for file in files}
        ordered = sorted(files, key=lambda file: known[file]["shard"])
        _check_shards(ordered, known, parts)
        loaded = [load(str(file), None, None, None, None) for file in ordered]
        _check_rows(ordered, [len(part) for part in loaded], known[ordered[0]]["rows"])
        try:
            whole = concatenate_datasets(loaded)
        except (ValueError, TypeError):
            if not {file.suffix for file in ordered} <= {".json", ".jsonl"}:
                raise
            whole = load_as_one(ordered)  # JSON has no types: each part has those of its own rows
        forget(out)
        write(whole, out)
        write_text(settings_file(out), as_json(known[ordered[0]]["settings"]))
        console.print(f"wrote {out}: {len(whole):,} rows of {len(files)} parts")


def _check_shards(files: list[Path], known: Mapping[Path, Mapping[str, Any]], parts: list[str]) -> None:
    if not files:
        raise FileNotFoundError(f"no file matches {' '.join(parts)}")
    first = known[files[0]]
    for file in files:
        for name in ("of", "rows", "settings"):
            if known[file][name] != first[name]:
                raise ValueError(
                    f"{files[0]} and {file} are not parts of one whole: their {name} are {first[name]} and "
                    f"{known[file][name]}"
                )
        if _differ(known[file], first, "digest"):
            raise ValueError(
                f"{files[0]} and {file} are of other rows: was SRC changed between them? score --shard again"
            )
        if _differ(known[file], first, "model_state"):
            console.print(
                f"{files[0]} and {file}: the files of the model differ, or their times do, as those of copies"
            )
        if _differ(known[file], first, "engine"):
            console.print(
                f"{files[0]} is by {first['engine']}, {file} by {known[file]['engine']}: had one of them no GPU?"
            )
    numbers = [known[file]["shard"] for file in files]
    for number in range(first["of"]):
        if (count := numbers.count(number)) != 1:
            raise ValueError(
                f"{'no part' if not count else f'{count} parts'} for --shard {number}/{first['of']}; expected one"
            )


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return len({one.get(name), other.get(name)} - {None}) > 1  # parts of older releases have none


def _check_rows(files: list[Path], found: list[int], rows: int) -> None:
    from clear_datasets.stages import Stages

    if sum(found) != rows:
        raise ValueError(f"the parts have {sum(found):,} rows, the source had {rows:,}: score --shard again")
    for i, (file, number) in enumerate(zip(files, found, strict=True)):
        first, end = Stages(file.parent, number, shard=(i, len(files))).part(rows)
        if number != (due := end - first):
            raise ValueError(f"{file} has {number:,} rows, --shard {i}/{len(files)} has {due:,}: score it again")


def _shard(file: Path) -> dict[str, Any]:
    beside = shard_file(file)
    if not beside.is_file():
        raise ValueError(
            f"{beside} is not there, which score --shard wrote: is {file} a part, and was it copied along?"
        )
    found: dict[str, Any] = json.loads(beside.read_text())
    return found
