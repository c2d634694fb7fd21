"""The same steps on Ray Data: replicas of the model on the GPUs of a machine or a cluster."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clear_datasets.engines import EngineError
from clear_datasets.engines.cache import COUNTS
from clear_datasets.files import check_folder, write_folder
from clear_datasets.reading import load
from clear_datasets.replicas import Replica, Work, block, raised
from clear_datasets.stages import Span, Stages, Step, batch_size_on

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear

Replicas = int | Literal["auto"]
_DEATHS = 2  # workers that a batch may cost in a row
_EACH = 4  # batches a replica at least: the last ones end about together


def score(
    ds: Dataset | str,
    clear: Clear,
    *,
    replicas: Replicas = "auto",
    gpus_per_replica: float | None = None,
    address: str | None = None,
    folder: str | os.PathLike[str] = "clear_stages",
    batch_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Dataset:
    """`Clear.score` on all rows, by replicas of the model that Ray places on the GPUs it has.

    The columns, and the order of the rows, are those of ``ds.map(clear.score, batched=True)`` with all samples:
    ``adaptive=True`` is left out, with a warning, as the batches are kept for any threshold. Each batch is written
    into `folder` as soon as it is there: the same call goes on from these, after the process, a worker or the head of
    the cluster was killed. A worker that dies is replaced, and its batch done anew; what it had asked is in the cache
    of answers of its machine.

    Args:
        ds: A dataset, or the name of one: Hub id, files as a glob, or a folder of Parquet files.
        clear: The steps.
        replicas: How many engines; "auto" takes all GPUs, or a replica on each machine where there are none.
        gpus_per_replica: By default what the engine takes, and none where the cluster has none; 0.5 lets two share one.
        address: Of a cluster, as ``ray.init`` takes it: "auto", "10.0.0.1:6379", "ray://...". By default the cluster
            that this process is part of or ``RAY_ADDRESS`` names, else one is started on this machine.
        folder: Where batches are kept. It is on the machine that calls this: workers need no shared file system.
        batch_size: Rows of a batch: by default 1,000 on GPUs and 64 else, or fewer, so that each replica gets four.
        out: Where to write the result, too: a folder that gets Parquet files of 100,000 rows, in place of such files
            that were written before.

    Returns:
        The rows with the columns of `Clear.score`.

    Raises:
        ImportError: Ray is not installed.
        ValueError: The cluster has not the GPUs or CPUs for one replica, or `out` holds other things.
        EngineError: An engine failed on every batch that was left; those that are done are kept.

    Examples:
        >>> from clear_datasets import Clear
        >>> scored = score("data/*.parquet", Clear("Qwen/Qwen2.5-7B-Instruct"), replicas=8)  # doctest: +SKIP
    """
    rows, stages = _prepared(ds, replicas, gpus_per_replica, address, folder, batch_size, out)
    if clear.adaptive and clear.gamma is not None:
        warnings.warn(
            "adaptive=True is left out: here every row gets all its samples, as batches are kept for any threshold; "
            "ds.map(clear.score, batched=True) stops rows early",
            stacklevel=2,
        )
    return _written(stages.score(rows, clear), out)


def correct(
    ds: Dataset | str,
    clear: Clear,
    *,
    replicas: Replicas = "auto",
    gpus_per_replica: float | None = None,
    address: str | None = None,
    folder: str | os.PathLike[str] = "clear_stages",
    batch_size: int | None = None,
    out: str | os.PathLike[str] | None = None,
) -> Dataset:
    """`Clear.propose` and `Clear.prefer` on all rows that are scored, in the same way as `score`.

    Args:
        ds: Scored rows, or the name of a dataset of them.
        clear: The steps, with a writer (`Clear.with_writer`), which all machines have to find by its name.
        replicas: See `score`, as the others.
        gpus_per_replica: See `score`.
        address: See `score`.
        folder: See `score`.
        batch_size: See `score`.
        out: See `score`.

    Returns:
        The rows with candidates and preferences; ``decide(gamma, eta)`` comes next.

    Raises:
        ValueError: There is no writer; or as `score`.
    """
    if clear.writer is None:
        raise ValueError("no model writes candidates: clear = clear.with_writer('folder of an adapter or model')")
    rows, stages = _prepared(ds, replicas, gpus_per_replica, address, folder, batch_size, out)
    return _written(stages.correct(rows, clear), out)


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
        engine = getattr(getattr(step, "__self__", None), "engine", None)
        with _cluster(self.address):
            replicas, gpus = _fitting(self.replicas, engine.gpus if engine else 1, self.gpus)
            size = self.batch_size or max(
                1, min(batch_size_on(gpus > 0), math.ceil((end - first) / (_EACH * replicas)))
            )
            return super(RayStages, replace(self, batch_size=size, replicas=replicas, gpus=gpus)).run(
                rows, step, name, title
            )

    def answered(self, rows: Dataset, batches: list[Span], step: Step, mark: str) -> Iterator[tuple[Span, Dataset]]:
        """See `Stages.answered`: as replicas are done with them, once more where an engine failed."""
        left, work = set(batches), Work.of(step, mark)
        while left:
            assert self.replicas != "auto"  # `run` has filled it in
            before, in_a_row = len(left), 0
            error: Exception = EngineError(f"the workers that had rows {min(left)[0]} to {max(left)[1]} died")
            for span, added in _asked(rows, sorted(left), work, min(self.replicas, len(left)), self.gpus):
                if isinstance(added, Exception):
                    error, in_a_row = added, in_a_row + 1
                    if not isinstance(error, EngineError | OSError) or in_a_row > 2 * self.replicas:
                        raise error
                else:
                    in_a_row = 0
                    left.remove(span)
                    yield span, added
            if len(left) == before:
                raise error


def _asked(
    rows: Dataset, batches: list[Span], work: Work, replicas: int, gpus: float | None
) -> Iterator[tuple[Span, Dataset | Exception]]:
    """Each batch as soon as it is done, or what went wrong with it; those on which workers died are missing."""
    import ray.data
    from datasets import Dataset

    with _quiet():
        blocks = ray.data.from_arrow_refs([ray.put(block(rows, *batch)) for batch in batches])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of max_task_retries, which has no other name yet
            done = blocks.map_batches(
                Replica, fn_constructor_args=(work,), batch_size=None, batch_format="pyarrow", num_cpus=1,
                num_gpus=gpus or None, compute=ray.data.ActorPoolStrategy(size=replicas), max_task_retries=_DEATHS,
            )  # fmt: skip
        for table in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for found in table.to_pylist():
                COUNTS.asked, COUNTS.known = COUNTS.asked + found["asked"], COUNTS.known + found["known"]
                span, kind = (found["start"], found["end"]), found["error"]
                yield span, raised(kind, found["text"]) if kind else Dataset.from_buffer(found["rows"])


def _fitting(replicas: Replicas, usual: int, gpus: float | None) -> tuple[int, float]:
    """How many replicas, of how many GPUs each."""
    import ray

    has = ray.cluster_resources()
    cpus, all_gpus = int(has.get("CPU", 0)), has.get("GPU", 0)
    if gpus is None:
        gpus = float(usual) if all_gpus else 0.0
    fit = min(cpus, int(all_gpus // gpus)) if gpus else cpus
    if not fit:
        raise ValueError(
            f"the cluster has {cpus} CPUs and {all_gpus:g} GPUs, a replica takes 1 and {gpus:g}: add machines, or "
            "give a smaller gpus_per_replica"
        )
    if replicas == "auto":
        return (fit if gpus else min(fit, sum(node["Alive"] for node in ray.nodes()))), gpus
    if replicas > fit:
        warnings.warn(
            f"{replicas} replicas are asked for, the cluster has room for {fit}: the others wait until it grows",
            stacklevel=2,
        )
    return replicas, gpus


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
def _quiet() -> Iterator[None]:
    """No bars and reports of Ray Data's beside ours, and no end of the run because of one batch."""
    from ray.data import DataContext

    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    old, level = (context.enable_progress_bars, context.max_errored_blocks), log.level
    context.enable_progress_bars, context.max_errored_blocks = False, -1  # a batch that was lost is seen to be missing
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.max_errored_blocks = old
        log.setLevel(level)


def check(replicas: Replicas) -> None:
    """Say what is missing before anything is loaded.

    Raises:
        ImportError: Ray is not installed.
        ValueError: `replicas` is no number of engines.
    """
    if replicas != "auto" and replicas < 1:
        raise ValueError(f"the number of replicas is {replicas}; expected 1 at least, or 'auto'")
    if find_spec("ray") is None:
        raise ImportError('Ray is not installed: pip install "clear-datasets[ray]"')


def _prepared(
    ds: Dataset | str, replicas: Replicas, gpus: float | None, address: str | None,
    folder: str | os.PathLike[str], batch_size: int | None, out: str | os.PathLike[str] | None,
) -> tuple[Dataset, RayStages]:  # fmt: skip
    check(replicas)
    check_folder(None if out is None else Path(out), ds if isinstance(ds, str) else None, Path(folder))
    rows = load(ds, None, None, None, None) if isinstance(ds, str) else ds.with_format(None)
    return rows, RayStages(Path(folder), batch_size or 0, replicas=replicas, gpus=gpus, address=address)


def _written(rows: Dataset, out: str | os.PathLike[str] | None) -> Dataset:
    if out is not None:
        write_folder(rows, Path(out))
    return rows
