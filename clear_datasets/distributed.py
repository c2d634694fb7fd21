"""The same steps on Ray Data: replicas of the model on the GPUs of a machine or a cluster."""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from clear_datasets.files import check_folder, write_folder
from clear_datasets.ray_stages import RayStages, Replicas
from clear_datasets.reading import load

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear


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
