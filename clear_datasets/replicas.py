"""What Ray's workers do: batches that come as bytes, by an engine of their own."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clear_datasets.engines import Answers, Asks, Engine, EngineError, PromptError
from clear_datasets.engines.cache import COUNTS
from clear_datasets.formats import FormatError
from clear_datasets.stages import Step, added_by

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from clear_datasets import Clear

# As a caller of `Clear.score` has them; the first that an error is one of is its name.
_ERRORS = (EngineError, FormatError, ValueError, TypeError, ImportError, OSError)
_FAILURES = 3  # of a replica in a row, after which its process ends, and Ray starts another one
_PAUSE = 30.0  # seconds before that


@dataclass(frozen=True)
class Work:
    """What a replica does.

    Attributes:
        step: Of `Clear`.
        mark: See `added_by`.
        folder: Where the caller is.
        local: Files and folders of the caller that the step names.
        beside: How many replicas share the CPUs of a machine; 0 where they work on GPUs.
        release: Of this package, which makes the columns.
    """

    step: Step
    mark: str
    folder: str
    local: tuple[str, ...]
    beside: int = 0
    release: str = ""

    @classmethod
    def of(cls, step: Step, mark: str, beside: int = 0) -> Work:
        """The work of a step, told by the process that calls."""
        clear: Clear = step.__self__  # type: ignore[attr-defined]
        engine, judge = clear.engine, getattr(clear.preference, "confidence", None)
        serves = engine is not None and not hasattr(engine, "adapter")  # by names of its own
        encoders = [getattr(estimator, "similarity", None) for estimator in (clear.confidence, judge)]
        parts = encoders if serves else [clear, engine, *encoders]
        names = [getattr(part, name, None) for part in parts for name in ("model", "writer", "adapter")]
        local = tuple(name for name in names if isinstance(name, str) and name and os.path.exists(name))
        return cls(step, mark, os.getcwd(), local, beside, _release())

    def begin(self) -> None:
        """Go where the caller is if that is how files are found: Ray's workers are where Ray was started."""
        if self.release != (here := _release()):
            raise ImportError(f"clear-datasets is {here} on {socket.gethostname()}, {self.release} where the run began")
        if os.path.isdir(self.folder):  # first of all: what is here may have files of the same names
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
        self.work, self.failed, self.name = work, 0, _own_name()
        if work.beside:
            _take_cores(work.beside)

    def __call__(self, given: pa.Table) -> pa.Table:
        """What the step adds to a batch, or what went wrong, beside what `block` has made of it."""
        import pyarrow as pa
        from datasets import Dataset

        if self.failed >= _FAILURES:  # what is broken in the process, a GPU's context, say, a new one may not have
            time.sleep(_PAUSE)
            os._exit(1)
        (found,) = given.to_pylist()
        asked, known = COUNTS.asked, COUNTS.known
        rows, error = b"", ("", "")
        try:
            self.work.begin()
            added = added_by(Dataset.from_buffer(found["rows"]), self.work.step, self.work.mark)
            rows, self.failed = _bytes(added, 0, len(added)), 0
        except Exception as problem:  # raised by the caller, which knows how others fare
            error, self.failed = _named(problem), self.failed + 1
            time.sleep(2**self.failed / 2)  # a broken machine shall not eat up what others could do
        found |= {"rows": rows, "error": error[0], "text": error[1], "by": self.name}
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


def refused(rows: Dataset, step: Step, mark: str, reason: str) -> Dataset:
    """What the step adds to rows that an engine refuses."""
    clear: Clear = step.__self__  # type: ignore[attr-defined]
    engine = _Refusing(reason)  # type: ignore[abstract]  # nothing but `answer` is called
    return added_by(rows, getattr(replace(clear, engine=engine, cache=False), step.__name__), mark)


@dataclass(frozen=True)
class _Refusing(Engine):
    """One that gives a reason in place of every answer."""

    reason: str

    def answer(self, asks: Asks) -> Answers:
        raise PromptError(dict.fromkeys(range(len(asks.generate) + len(asks.choose) + len(asks.read)), self.reason))

    def with_writer(self, writer: str) -> _Refusing:
        return self


def raised(kind: str, text: str) -> Exception:
    """An error of a worker, by its name and text: no object of it travels."""
    return {e.__name__: e for e in _ERRORS}.get(kind, RuntimeError)(text)


def _named(problem: Exception) -> tuple[str, str]:
    """The first of the errors that it is one of, and what it says; of what may be the machine's fault, which it is."""
    name = next((kind.__name__ for kind in _ERRORS if isinstance(problem, kind)), "")
    text = str(problem) if name else f"{type(problem).__name__}: {problem}"
    where = (
        "" if isinstance(problem, ValueError | TypeError) else f" (on {socket.gethostname()}: more is in Ray's logs)"
    )
    return name or "RuntimeError", text + where


def _release() -> str:
    from clear_datasets import __version__
    from clear_datasets.steps import SCORES_REVISION

    return f"{__version__}, scores revision {SCORES_REVISION}"


def _own_name() -> str:
    """Of the replica, whatever process it is in."""
    import ray

    actor: str | None = ray.get_runtime_context().get_actor_id()
    return actor or ""


def _take_cores(beside: int) -> None:
    """Use this replica's share of the machine: Ray lets each work with one thread."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // beside)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported, and by vLLM's processes
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
