"""Steps over whole datasets from the command line: each batch is kept beside the output, and never asked again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.confidence import BSDetector
from clear_datasets.decide import is_score
from clear_datasets.files import write
from clear_datasets.reading import explained
from clear_datasets.terminal import console, progress

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear

Step = Callable[..., dict[str, Any]]
Span = tuple[int, int]  # the first row and the one behind the last


@dataclass(frozen=True)
class Stages:
    """Stages of the outputs of one folder, which share what they have in common.

    Args:
        folder: Gets a folder for each stage, with the columns that it added, one Parquet file a batch.
        batch_size: Rows handed to the engine at a time; another one goes on with the batches that are there.
        shard: Which part of the rows to take, and of how many; the parts share the folder of the whole.
        retry: Whether batches with rows that were refused are done anew.
    """

    folder: Path
    batch_size: int
    shard: tuple[int, int] = (0, 1)
    retry: bool = False

    def run(self, rows: Dataset, step: Step, name: str, title: str) -> Dataset:
        """``rows.map(step)``; batches that were done before with the same rows and settings are read from files."""
        from datasets import Dataset, concatenate_datasets
        from datasets.fingerprint import Hasher

        mark, folder, batches, left = self.planned(rows, step, name, self.batch_size)
        if not folder.exists() and any(self.folder.glob(f"{name}-*")):
            console.print(
                f"{self.folder} has batches of other rows, files or settings, which are of no use here", markup=False
            )
        folder.mkdir(parents=True, exist_ok=True)
        first, end = self.part(len(rows))
        with progress(title, end - first) as advance:
            advance(end - first - sum(b - a for a, b in left), True)
            there = set(batches) - set(left)
            for (a, b), added in self.answered(rows, left, step, mark):
                write(added, _file(folder, a, b))
                there.add((a, b))
                advance(b - a, False)
        files = [_file(folder, *batch) for batch in sorted(there)]
        with explained(list(map(str, files))):
            added = Dataset.from_parquet([escape(os.path.abspath(file)) for file in files])
        taken = rows if end - first == len(rows) else rows.select(range(first, end))
        others = taken.remove_columns([c for c in rows.column_names if c in added.column_names])
        whole = concatenate_datasets([others, added], axis=1)
        # That of concatenate_datasets differs from run to run; settings alone do not tell scores that were drawn anew.
        whole._fingerprint = Hasher.hash((mark, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]))
        return whole

    def planned(self, rows: Dataset, step: Step, name: str, size: int) -> tuple[str, Path, list[Span], list[Span]]:
        """The mark of a step on rows, the folder of its batches, these, and which of them are not there."""
        from datasets.fingerprint import Hasher

        clear: Clear = step.__self__  # type: ignore[attr-defined]
        # Where answers are kept changes none, nor does how an engine makes them: its identity is in the state.
        state = {**clear.__getstate__(), "cache": None, "engine": None}
        mark = Hasher.hash((rows._fingerprint, type(clear), step.__name__, state))
        folder = self.folder / f"{name}-{mark}"
        known = dict(_whole(folder))
        batches = list(_batches(*self.part(len(rows)), known, size))
        done = {span for span in known.items() if not (self.retry and _refused(_file(folder, *span)))}
        return mark, folder, batches, [batch for batch in batches if batch not in done]

    def part(self, rows: int) -> tuple[int, int]:
        """Where the shard begins and ends.

        Raises:
            ValueError: It has no rows.

        Examples:
            >>> Stages(Path("stages"), 64, shard=(1, 3)).part(10)
            (3, 6)
        """
        number, of = self.shard
        first, end = rows * number // of, rows * (number + 1) // of
        if first == end:
            raise ValueError(f"--shard {number}/{of} of {rows} rows is empty: take fewer shards")
        return first, end

    def answered(self, rows: Dataset, batches: list[Span], step: Step, mark: str) -> Iterator[tuple[Span, Dataset]]:
        """What the step adds to each batch of rows, in any order; in smaller ones if need be."""
        for start, end in batches:
            yield (start, end), added_by(rows.select(range(start, end)), step, mark)

    def score(self, rows: Dataset, clear: Clear) -> Dataset:
        """`Clear.score` on all rows."""
        clear = replace(
            clear, preference=None, writer=None, gamma=None, adaptive=False
        )  # scores are those of all samples
        return self.run(rows, clear.score, "score", "scoring")

    def correct(self, scored: Dataset, clear: Clear) -> Dataset:
        """`Clear.propose` and `Clear.prefer` on all rows."""
        writing = replace(clear, preference=None, confidence=BSDetector())
        proposed = self.run(scored, writing.propose, "propose", "writing candidates")
        judging = replace(clear, preference=clear.judge, confidence=BSDetector())
        return self.run(proposed, judging.prefer, "prefer", "judging candidates")


def added_by(rows: Dataset, step: Step, mark: str) -> Dataset:
    """The columns that a step adds to rows, as one batch."""
    added: Dataset = rows.map(
        step, batched=True, batch_size=None, remove_columns=rows.column_names, keep_in_memory=True,
        load_from_cache_file=False, new_fingerprint=mark,
    )  # fmt: skip
    return added


def _batches(first: int, end: int, known: Mapping[int, int], size: int) -> Iterator[Span]:
    """The rows from first to end in batches; those that are there may have been of another size."""
    known = {a: b for a, b in known.items() if first <= a and b <= end}
    while first < end:
        behind = known.get(first) or min([first + size, end, *(a for a in known if a > first)])
        yield first, behind
        first = behind


def _whole(folder: Path) -> Iterator[Span]:
    """The batches that are there; not those that a machine that lost its power has left without their rows."""
    import pyarrow.parquet as pq

    for file in folder.glob("*.parquet"):
        start, end = map(int, file.stem.split("-"))
        with suppress(OSError, ValueError):  # Arrow's are of both
            if pq.read_metadata(file).num_rows == end - start:
                yield start, end


def _refused(file: Path) -> bool:
    """Whether a row of the batch has a reason in place of an answer."""
    import pyarrow.parquet as pq

    return any(pq.read_table(file, columns=["clear_error"])["clear_error"].to_pylist())


def _file(folder: Path, start: int, end: int) -> Path:
    return folder / f"{start:09}-{end:09}.parquet"


def batch_size_on(gpu: bool) -> int:
    """Rows that keep an engine busy, and are not many to ask again."""
    return 1000 if gpu else 64


def usual_batch_size() -> int:
    """The same of this machine."""
    import torch

    return batch_size_on(torch.cuda.device_count() > 0)


def train_writer(decided: Dataset, clear: Clear) -> None:
    """Fine-tune the model on the rows that are decided for, into the place of the writer."""
    from clear_datasets import curated
    from clear_datasets.finetune import finetune

    assert clear.writer is not None
    rows = curated(decided, clear.format).filter(is_score, input_columns="clear_confidence")
    console.print(f"fine-tuning on {len(rows):,} rows, into {clear.writer}")
    finetune(rows, clear.model, clear.writer, revision=clear.revision, format=clear.format)
