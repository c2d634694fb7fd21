"""Steps over whole datasets from the command line: each batch is kept beside the output, and never asked again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.terminal import console, progress

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear

Step = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Stages:
    """Stages of the outputs of one folder, which share what they have in common.

    Args:
        folder: Gets a folder for each stage, with the columns that it added, one Parquet file a batch.
        batch_size: Rows handed to the engine at a time.
    """

    folder: Path
    batch_size: int

    def run(self, rows: Dataset, step: Step, name: str, title: str) -> Dataset:
        """``rows.map(step)``; batches that were done before with the same rows and settings are read from files."""
        from datasets import Dataset, concatenate_datasets
        from datasets.fingerprint import Hasher

        mark = Hasher.hash((rows._fingerprint, step, self.batch_size))
        folder = self.folder / f"{name}-{mark}"
        folder.mkdir(parents=True, exist_ok=True)
        files: list[Path] = []
        with progress(title, len(rows)) as advance:
            for start in range(0, len(rows), self.batch_size):
                part = rows.select(range(start, min(start + self.batch_size, len(rows))))
                file = folder / f"{start:09}.parquet"
                known = file.exists()
                if not known:
                    added = part.map(
                        step, batched=True, batch_size=None, remove_columns=part.column_names, keep_in_memory=True,
                        load_from_cache_file=False, new_fingerprint=mark,
                    )  # fmt: skip
                    unfinished = file.with_suffix(f".part{os.getpid()}")
                    added.to_parquet(str(unfinished))
                    unfinished.rename(file)
                files.append(file)
                advance(len(part), known)
        added = Dataset.from_parquet([escape(str(file)) for file in files])
        left = rows.remove_columns([c for c in rows.column_names if c in added.column_names])
        whole = concatenate_datasets([left, added], axis=1)
        # That of concatenate_datasets differs from run to run; settings alone do not tell scores that were drawn anew.
        whole._fingerprint = Hasher.hash((mark, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]))
        return whole

    def score(self, rows: Dataset, clear: Clear) -> Dataset:
        """`Clear.score` on all rows."""
        return self.run(rows, clear.score, "score", "scoring")

    def correct(self, scored: Dataset, clear: Clear) -> Dataset:
        """`Clear.propose` and `Clear.prefer` on all rows."""
        proposed = self.run(scored, clear.propose, "propose", "writing candidates")
        return self.run(proposed, clear.prefer, "prefer", "judging candidates")


def usual_batch_size() -> int:
    """Rows that keep the engine of this machine busy, and are not many to ask again."""
    import torch

    return 1000 if torch.cuda.device_count() else 64


def train_writer(decided: Dataset, clear: Clear) -> None:
    """Fine-tune the model on the rows that are decided for, into the place of the writer."""
    from clear_datasets import curated
    from clear_datasets.finetune import finetune

    assert clear.writer is not None
    replace(clear, writer=None).close()  # its memory is needed
    rows = curated(decided, clear.format).filter(lambda error: not error, input_columns="clear_error")
    console.print(f"fine-tuning on {len(rows):,} rows, into {clear.writer}")
    finetune(rows, clear.model, clear.writer, revision=clear.revision, format=clear.format)
