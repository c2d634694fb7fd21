"""What Ray's workers do: batches that come as bytes, by an engine of their own."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clear_datasets.engines import EngineError
from clear_datasets.engines.cache import COUNTS
from clear_datasets.formats import FormatError
from clear_datasets.stages import Step, added_by

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from clear_datasets import Clear

# As a caller of `Clear.score` has them; the first that an error is one of is its name.
_ERRORS = (EngineError, FormatError, ValueError, TypeError, ImportError, OSError)


@dataclass(frozen=True)
class Work:
    """What a replica does.

    Attributes:
        step: Of `Clear`.
        mark: See `added_by`.
        folder: Where the caller is.
        local: Files and folders of the caller that the step names.
    """

    step: Step
    mark: str
    folder: str
    local: tuple[str, ...]

    @classmethod
    def of(cls, step: Step, mark: str) -> Work:
        """The work of a step, told by the process that calls."""
        clear: Clear = step.__self__  # type: ignore[attr-defined]
        engine, judge = clear.engine, getattr(clear.preference, "confidence", None)
        serves = engine is not None and not hasattr(engine, "adapter")  # by names of its own
        encoders = [getattr(estimator, "similarity", None) for estimator in (clear.confidence, judge)]
        parts = encoders if serves else [clear, engine, *encoders]
        names = [getattr(part, name, None) for part in parts for name in ("model", "writer", "adapter")]
        return cls(step, mark, os.getcwd(), tuple(n for n in names if isinstance(n, str) and n and os.path.exists(n)))

    def begin(self) -> None:
        """Go where the caller is if that is how files are found: Ray's workers are where Ray was started."""
        if not all(map(os.path.exists, self.local)) and os.path.isdir(self.folder):
            os.chdir(self.folder)
        if missing := [name for name in self.local if not os.path.exists(name)]:  # a Hub id may be of the same name
            raise OSError(
                f"{missing[0]} is on the machine that calls, in {self.folder}, and not on {socket.gethostname()}: put "
                "it where all machines see it, or name one of the Hub"
            )


class Replica:
    """An actor's class; its engine is in the table of the actor's process."""

    def __init__(self, work: Work) -> None:
        from datasets import disable_progress_bars

        disable_progress_bars()
        self.work, self.failed = work, 0

    def __call__(self, given: pa.Table) -> pa.Table:
        """What the step adds to a batch, or what went wrong, beside what `block` has made of it."""
        import pyarrow as pa
        from datasets import Dataset

        (found,) = given.to_pylist()
        asked, known = COUNTS.asked, COUNTS.known
        rows, error = b"", ("", "")
        try:
            self.work.begin()
            added = added_by(Dataset.from_buffer(found["rows"]), self.work.step, self.work.mark)
            rows, self.failed = _bytes(added, 0, len(added)), 0
        except Exception as problem:  # raised by the caller, which knows how others fare
            error, self.failed = _named(problem), self.failed + 1
            time.sleep(min(2**self.failed, 60) / 2)  # a broken machine shall not eat up what others could do
        found |= {"rows": rows, "error": error[0], "text": error[1]}
        found |= {"asked": COUNTS.asked - asked, "known": COUNTS.known - known}
        return pa.Table.from_pylist([found])


def block(rows: Dataset, start: int, end: int) -> pa.Table:
    """A batch as one row: no type that a dataset may have is left to Ray."""
    import pyarrow as pa

    return pa.table({"start": [start], "end": [end], "rows": [_bytes(rows, start, end)]})


def _bytes(rows: Dataset, start: int, end: int) -> bytes:
    import pyarrow as pa

    table = rows.with_format("arrow")[start:end].replace_schema_metadata(rows.features.arrow_schema.metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def raised(kind: str, text: str) -> Exception:
    """An error of a worker, by its name and text: no object of it travels."""
    return {e.__name__: e for e in _ERRORS}.get(kind, RuntimeError)(text)


def _named(problem: Exception) -> tuple[str, str]:
    """The first of the errors that it is one of, and what it says."""
    for kind in _ERRORS:
        if isinstance(problem, kind):
            return kind.__name__, str(problem)
    return "RuntimeError", f"{type(problem).__name__}: {problem}"
