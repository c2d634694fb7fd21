"""Stages whose batches are done by replicas of the model, which Ray Data places and replaces."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from clear_datasets.engines import EngineError
from clear_datasets.engines.cache import COUNTS
from clear_datasets.formats import Chat, Columns
from clear_datasets.infer_format import without_media
from clear_datasets.replicas import Replica, Work, block, raised, refused
from clear_datasets.stages import Span, Stages, Step, batch_size_on
from clear_datasets.terminal import console

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets.engines import Engine

Replicas = int | Literal["auto"]
_DEATHS = 2  # workers that a batch may cost in a row
_EACH = 4  # batches a replica at least: the last ones end about together
_VAIN = 3  # rounds in a row in which no batch was done: with fewer rows each, one of them may be the workers' end
_SILENCE = 600.0  # seconds without a batch, after which it is said what is free


@dataclass(frozen=True)
class RayStages(Stages):
    """Stages whose batches are done by replicas.

    Args:
        folder: See `Stages`, as `shard`.
        batch_size: Of it; 0 for what suits rows and replicas.
        replicas: How many.
        gpus: Of each; None for what the engine takes.
        address: Of the cluster.
    """

    batch_size: int = 0

    replicas: Replicas = "auto"
    gpus: float | None = None
    address: str | None = None

    def run(self, rows: Dataset, step: Step, name: str, title: str) -> Dataset:
        """See `Stages.run`; batches are small enough that each replica gets several."""
        first, end = self.part(len(rows))
        if not self.planned(rows, step, name, end - first)[-1]:  # no cluster is needed to read what is there
            return super().run(rows, step, name, title)
        engine = step.__self__.engine  # type: ignore[attr-defined]
        _check_share(engine, self.gpus)
        with _cluster(self.address):
            replicas, gpus = _fitting(self.replicas, engine.gpus if engine else 1, self.gpus)
            size = self.batch_size or max(
                1, min(batch_size_on(gpus > 0), math.ceil((end - first) / (_EACH * replicas)))
            )
            return super(RayStages, replace(self, batch_size=size, replicas=replicas, gpus=gpus)).run(
                rows, step, name, title
            )

    def answered(self, rows: Dataset, batches: list[Span], step: Step, mark: str) -> Iterator[tuple[Span, Dataset]]:
        """See `Stages.answered`: as replicas are done with them, once more where an engine failed.

        A batch on which workers die in two rounds is halved until the row is found that is their end: it gets a reason.
        """
        form = step.__self__.format  # type: ignore[attr-defined]
        if form is None or isinstance(form, Chat | Columns):  # images and sounds need not travel
            rows = without_media(rows)
        left, deadly, done, vain = set(batches), set[Span](), 0, 0
        while left:
            found = _Round(left)
            before = done
            for span, added in found.run(rows, self, step, mark):
                done += 1
                left.remove(span)
                yield span, added
            vain = 0 if done > before else vain + 1
            if vain and (not found.died or vain > _VAIN):
                raise found.error
            for span in found.died & deadly:
                left.remove(span)
                if span[1] - span[0] > 1:
                    middle = sum(span) // 2
                    halves = {(span[0], middle), (middle, span[1])}
                    left, deadly = left | halves, deadly | halves
                elif done:  # others were, by the same workers
                    yield span, refused(rows.select([span[0]]), step, mark, f"{1 + _DEATHS} workers died on this row")
                else:
                    raise found.error
            deadly |= found.died


class _Round:
    """All batches that are left, once.

    Attributes:
        died: Those on which workers died.
        error: What went wrong last.
    """

    def __init__(self, left: set[Span]) -> None:
        self.left, self.died, self.told = sorted(left), set[Span](), set[str]()
        first, end = min(left)[0], max(left)[1]
        self.error: Exception = EngineError(f"the workers that had rows {first:,} to {end:,} died")

    def run(self, rows: Dataset, stages: RayStages, step: Step, mark: str) -> Iterator[tuple[Span, Dataset]]:
        """The batches that get done, as soon as they are."""
        import ray

        assert stages.replicas != "auto"  # `RayStages.run` has filled it in
        replicas = min(stages.replicas, len(self.left))
        work = Work.of(step, mark, 0 if stages.gpus else math.ceil(replicas / _machines()))
        failed, seen = Counter[str](), set[Span]()  # failures of each replica since it was last done with a batch
        try:
            for by, span, added in _asked(rows, self.left, work, replicas, stages.gpus):
                seen.add(span)
                if not isinstance(added, Exception):
                    failed.pop(by, None)
                    yield span, added
                    continue
                if isinstance(added, ValueError | TypeError):  # of the settings, on any machine
                    raise added
                self.error, failed[by] = added, failed[by] + 1
                self._tell(span, added)
                if len(failed) >= min(replicas, _room(stages.gpus or 0.0)) and min(failed.values()) > 2:
                    raise added
        except ray.exceptions.RayActorError as problem:  # too many have died: the others of the round were not tried
            said = [line.strip() for line in str(problem).splitlines() if "Error:" in line]
            self.error = EngineError("; ".join([str(self.error), *said[-1:]]))
            return
        self.died = set(self.left) - seen
        if self.died:
            self._tell(min(self.died), EngineError("the workers that had these rows died"))

    def _tell(self, span: Span, error: Exception) -> None:
        if str(error) not in self.told:
            self.told.add(str(error))
            console.print(f"rows {span[0]:,} to {span[1]:,}: {error}; they are left for the end", markup=False)


def _asked(
    rows: Dataset, batches: list[Span], work: Work, replicas: int, gpus: float | None
) -> Iterator[tuple[str, Span, Dataset | Exception]]:
    """By which replica each batch is done, or what went wrong with it; those on which workers died are missing.

    Raises:
        RayActorError: More workers died than a few rows are the end of.
    """
    import ray.data
    from datasets import Dataset

    with _quiet(4 * replicas), _noting_silence() as noted:
        blocks = ray.data.from_arrow_refs([ray.put(block(rows, *batch)) for batch in batches])
        # What waits behind a long batch is done last, while others have none; short ones must not wait for the next.
        pool = ray.data.ActorPoolStrategy(size=replicas, max_tasks_in_flight_per_actor=1 if gpus else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of max_task_retries, which has no other name yet
            done = blocks.map_batches(
                Replica, fn_constructor_args=(work,), batch_size=None, batch_format="pyarrow", num_cpus=1,
                num_gpus=gpus or None, compute=pool, max_task_retries=_DEATHS,
            )  # fmt: skip
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            noted()
            for found in table.to_pylist():
                COUNTS.asked, COUNTS.known = COUNTS.asked + found["asked"], COUNTS.known + found["known"]
                span, kind = (found["start"], found["end"]), found["error"]
                added = raised(kind, found["text"]) if kind else Dataset.from_buffer(found["rows"])
                yield found["by"], span, added


def _fitting(replicas: Replicas, usual: int, gpus: float | None) -> tuple[int, float]:
    """How many replicas, of how many GPUs each."""
    import ray

    has = ray.cluster_resources()
    cpus, all_gpus = int(has.get("CPU", 0)), has.get("GPU", 0)
    if gpus is None:
        gpus = float(usual) if all_gpus else 0.0
    fit = _room(gpus)
    if not fit:
        raise ValueError(
            f"the cluster has {cpus} CPUs and {all_gpus:g} GPUs, a replica takes 1 and {gpus:g}: add machines, or "
            "give a smaller gpus_per_replica"
        )
    if replicas == "auto":
        return (fit if gpus else min(fit, _machines())), gpus
    if replicas > fit:
        warnings.warn(
            f"{replicas} replicas are asked for, the cluster has room for {fit}: the others wait until it grows",
            stacklevel=2,
        )
    return replicas, gpus


def _room(gpus: float) -> int:
    """How many replicas of so many GPUs the cluster has room for, if it does nothing else."""
    import ray

    has = ray.cluster_resources()
    cpus = int(has.get("CPU", 0))
    return min(cpus, int(has.get("GPU", 0) // gpus)) if gpus else cpus


def _machines() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _check_share(engine: Engine | None, gpus: float | None) -> None:
    """Refuse replicas that share a GPU, each with an engine that takes most of it."""
    from clear_datasets.engines.vllm import VLLM

    takes = getattr(VLLM if engine is None else engine, "gpu_memory_utilization", 0.0)
    if gpus and gpus < takes:
        raise ValueError(
            f"gpus_per_replica is {gpus:g}, and the engine takes {takes:g} of a GPU's memory: give "
            f"Clear(engine=VLLM(..., gpu_memory_utilization={0.9 * gpus:.2g})), or Transformers(...)"
        )


@contextmanager
def _noting_silence() -> Iterator[Callable[[], None]]:
    """Say what the cluster has free where no batch comes; gives a function that is called for each that does."""
    import ray

    ended, last = threading.Event(), [time.monotonic()]

    def watch() -> None:
        while not ended.wait(_SILENCE):
            if (silent := time.monotonic() - last[0]) >= _SILENCE:
                free = ray.available_resources()
                console.print(
                    f"no batch was done for {silent / 60:.0f} minutes; free are {free.get('CPU', 0):g} CPUs and "
                    f"{free.get('GPU', 0):g} GPUs of the cluster. `ray status` says what waits for room; a worker that "
                    "hangs is replaced once its process is killed"
                )

    def note() -> None:
        last[0] = time.monotonic()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield note
    finally:
        ended.set()
        thread.join()


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """The cluster of this process, or one that ends with the work."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of a user's runs
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except ConnectionError as error:
        raise OSError(f"no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _quiet(deaths: int) -> Iterator[None]:
    """No bars and reports of Ray Data's beside ours, and no end of the run because of few batches."""
    from ray.data import DataContext

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    old, level = (context.enable_progress_bars, context.max_errored_blocks), log.level
    context.enable_progress_bars, context.max_errored_blocks = False, deaths  # what is lost is seen to be missing
    log.setLevel(logging.CRITICAL)  # what was lost is said by us, without its traceback
    try:
        yield
    finally:
        context.enable_progress_bars, context.max_errored_blocks = old
        log.setLevel(level)
