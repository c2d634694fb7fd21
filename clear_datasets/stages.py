"""Steps over whole datasets from the command line: each batch is kept beside the output, and never asked again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.confidence import BSDetector
from clear_datasets.files import write
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
        batch_size: Rows handed to the engine at a time; another one goes on with the batches that are there.
    """

    folder: Path
    batch_size: int

    def run(self, rows: Dataset, step: Step, name: str, title: str) -> Dataset:
        """``rows.map(step)``; batches that were done before with the same rows and settings are read from files."""
        from datasets import Dataset, concatenate_datasets
        from datasets.fingerprint import Hasher

        mark = Hasher.hash((rows._fingerprint, step))
        folder = self.folder / f"{name}-{mark}"
        folder.mkdir(parents=True, exist_ok=True)
        known = {int(start): int(end) for start, _, end in (f.stem.partition("-") for f in folder.glob("*.parquet"))}
        files: list[Path] = []
        end = 0
        with progress(title, len(rows)) as advance:
            while (start := end) < len(rows):  # batches that are there may have been of another size
                end = known.get(start) or min([start + self.batch_size, len(rows), *(s for s in known if s > start)])
                file = folder / f"{start:09}-{end:09}.parquet"
                if start not in known:
                    added = rows.select(range(start, end)).map(
                        step, batched=True, batch_size=None, remove_columns=rows.column_names, keep_in_memory=True,
                        load_from_cache_file=False, new_fingerprint=mark,
                    )  # fmt: skip
                    write(added, file)
                files.append(file)
                advance(end - start, start in known)
        added = Dataset.from_parquet([escape(str(file)) for file in files])
        left = rows.remove_columns([c for c in rows.column_names if c in added.column_names])
        whole = concatenate_datasets([left, added], axis=1)
        # That of concatenate_datasets differs from run to run; settings alone do not tell scores that were drawn anew.
        whole._fingerprint = Hasher.hash((mark, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]))
        return whole

    def score(self, rows: Dataset, clear: Clear) -> Dataset:
        """`Clear.score` on all rows."""
        clear = replace(clear, preference=None, writer=None, gamma=None)  # whatever these are, scores are the same
        return self.run(rows, clear.score, "score", "scoring")

    def correct(self, scored: Dataset, clear: Clear) -> Dataset:
        """`Clear.propose` and `Clear.prefer` on all rows."""
        writing = replace(clear, preference=None, confidence=BSDetector())
        proposed = self.run(scored, writing.propose, "propose", "writing candidates")
        judging = replace(clear, preference=clear.judge, confidence=BSDetector())
        return self.run(proposed, judging.prefer, "prefer", "judging candidates")


def usual_batch_size() -> int:
    """Rows that keep the engine of this machine busy, and are not many to ask again."""
    import torch

    return 1000 if torch.cuda.device_count() else 64


def train_writer(decided: Dataset, clear: Clear) -> None:
    """Fine-tune the model on the rows that are decided for, into the place of the writer."""
    from clear_datasets import curated
    from clear_datasets.finetune import finetune

    assert clear.writer is not None
    rows = curated(decided, clear.format).filter(lambda c: not math.isnan(c), input_columns="clear_confidence")
    console.print(f"fine-tuning on {len(rows):,} rows, into {clear.writer}")
    finetune(rows, clear.model, clear.writer, revision=clear.revision, format=clear.format)
