"""A curated dataset on the Hub: its rows, all rows with their scores, and a card that says what was done."""

from __future__ import annotations

import fnmatch
import math
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from clear_datasets.apply import OURS
from clear_datasets.card import EMPTY, IMAGE, Body, as_list, card, in_cache, merged, origin
from clear_datasets.files import write

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from huggingface_hub import CommitOperationAdd, DatasetCard, HfApi

    from clear_datasets import Clear

    Splits = dict[str, Dataset]

T = TypeVar("T")
_TRIES, _LONGEST = 8, 60.0  # attempts, and seconds between two of them at most
_BUSY = (408, 409, 412, 425, 429, 500, 502, 503, 504)


def push_to_hub(
    curated: Dataset | DatasetDict,
    repo_id: str,
    audit: Dataset | DatasetDict | None = None,
    *,
    clear: Clear | None = None,
    settings: Mapping[str, Any] | None = None,
    source: str | None = None,
    scores: bool = False,
    private: bool | None = None,
    split: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    max_shard_size: int = 500_000_000,
) -> str:
    """Push curated rows, all rows with scores and decisions, and a card, in one commit.

    Config ``default`` holds the curated rows in the source's own columns, config ``audit`` every row with what was
    found and decided. Before that commit nothing changes: a push that breaks off leaves the old revision as it was,
    and the next one does not upload again what is there. Other configs of the repository stay, other splits of these
    two (of the same columns, else they cannot be loaded together), and what its owner wrote into the card. What a busy
    Hub refuses (412, 429, 5xx) is tried again.

    Args:
        curated: What `curated` made.
        repo_id: ``owner/name``; made where it is not there.
        audit: What `decide` made, before `curated`.
        clear: The steps, whose settings go into the card; where columns have names of their own, rows are shown there
            by its ``format`` alone.
        settings: More of them, by name: gamma, eta, a command, ...
        source: Hub id of the source; known where the rows were loaded from there. Its licence and languages go along.
        scores: Keep our columns among the curated rows, too.
        private: Whether a new repository is private.
        split: Name of the split of a Dataset; by default the one that it was loaded from, else "train".
        revision: Branch; made where it is not there.
        token: Of an account that may write; by default the one of ``hf auth login``.
        max_shard_size: Bytes of rows in a file, before they are compressed.

    Returns:
        The address of the commit.

    Raises:
        ValueError: The name of a split is not one that the Hub takes, or the splits of both are not the same.
        HfHubHTTPError: The Hub refuses, for want of rights, say.
        ImportError: Altair or vl-convert is not installed, by which the card's figure is drawn.

    Examples:
        >>> push_to_hub(curated(ds), "me/train-clear", audit=ds)  # doctest: +SKIP
        'https://huggingface.co/datasets/me/train-clear/commit/...'
    """
    from huggingface_hub import HfApi

    rows = {"default": _splits(curated, split), **({"audit": _splits(audit, split)} if audit is not None else {})}
    if other := set(rows["default"]) ^ set(rows.get("audit", rows["default"])):
        raise ValueError(f"split {', '.join(sorted(other))} is not in both, curated and audit: give the same splits")
    whole = rows.get("audit", rows["default"])
    left = sum(map(len, rows["default"].values()))
    api = HfApi(token=token, library_name="clear_datasets")
    source = _found(api, source or source_of(whole.values()))
    body = card(whole, left, clear, settings or {}, source, _yaml_of(api, source), audited="audit" in rows)
    rows["default"] = {name: _plain(part, scores) for name, part in rows["default"].items()}
    repo = _again(lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)).repo_id
    if revision is not None:
        _again(lambda: api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True))
    with tempfile.TemporaryDirectory() as folder:
        files = [_uploaded(api, repo, revision, *file) for file in _files(rows, max_shard_size, Path(folder))]
    return _again(lambda: _commit(api, repo, revision, files, rows, body))


def _found(api: HfApi, source: str) -> str:
    """The Hub id that a name in the cache of `datasets` stands for, which writes OpenOrca as open_orca."""
    owner = source.rpartition("/")[0]
    if not owner or _again(lambda: api.repo_exists(source, repo_type="dataset")):
        return source
    same = [d.id for d in _again(lambda: list(api.list_datasets(author=owner))) if in_cache(d.id) == source]
    if len(same) == 1:
        return same[0]
    warnings.warn(
        f"the Hub shows no dataset {source}: the card has neither its licence nor its languages; source='owner/name' "
        "(--source) names another one", stacklevel=3,
    )  # fmt: skip
    return source


def _yaml_of(api: HfApi, source: str) -> dict[str, Any]:
    """What the source's card says in its YAML; nothing where there is no card that may be read."""
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    from yaml import YAMLError  # type: ignore[import-untyped]

    if not source:
        return {}
    try:
        file = _again(lambda: api.hf_hub_download(source, "README.md", repo_type="dataset"))
        return dict(DatasetCard.load(file).data.to_dict())
    except LocalEntryNotFoundError:  # out of reach: a push without the licence would say that there is none
        raise
    except (EntryNotFoundError, RepositoryNotFoundError, ValueError, YAMLError):
        return {}


def _splits(ds: Dataset | DatasetDict, split: str | None) -> Splits:
    if isinstance(ds, Mapping):
        if split is not None:
            raise ValueError(f"split is {split!r}, but there are the splits {', '.join(ds)}: they keep their names")
        found = dict(ds)
    else:
        found = {split or re.sub(r"^([\w.]+)\[[^][]*\]$", r"\1", str(ds.split or "train")): ds}  # of "train[:10%]", too
    for name in found:
        if not re.fullmatch(r"\w+(\.\w+)*", name):
            mend = "" if isinstance(ds, Mapping) else "; give split='train', say"
            raise ValueError(f"split {name!r} cannot be on the Hub: expected letters, digits and underscores{mend}")
    return found


def _plain(part: Dataset, scores: bool) -> Dataset:
    part = part.with_format(None)
    return part if scores else part.remove_columns([name for name in part.column_names if name in OURS])


def _files(rows: Mapping[str, Splits], largest: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """Name in the repository, and a file that may be removed once the next one is asked for."""
    for config, splits in rows.items():
        for split, found in splits.items():
            part = _embedded(found)  # whole, as its size is not known before
            size = part.data.nbytes * len(part) / max(part.data.num_rows, 1)
            count = max(1, math.ceil(size / largest))
            for i in range(count):
                file = folder / "rows.parquet"
                write(part.shard(count, i, contiguous=True), file)
                yield f"{_folder(config)}/{split}-{i:05}-of-{count:05}.parquet", file


def _folder(config: str) -> str:
    return "data" if config == "default" else config  # as datasets has it


def _embedded(part: Dataset) -> Dataset:
    """Images and sounds in the rows, in place of paths of this machine."""
    from datasets.features.features import require_storage_embed
    from datasets.table import embed_table_storage

    if not any(require_storage_embed(feature) for feature in part.features.values()):
        return part
    return part.with_format("arrow").map(embed_table_storage, batched=True, batch_size=100).with_format(None)


def _uploaded(api: HfApi, repo: str, revision: str | None, name: str, file: Path) -> CommitOperationAdd:
    """The content is on the Hub after this, and belongs to no commit yet."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, str(file))
    _again(lambda: api.preupload_lfs_files(repo, [operation], repo_type="dataset", revision=revision))
    return operation


def _commit(
    api: HfApi, repo: str, revision: str | None, files: list[CommitOperationAdd], rows: Mapping[str, Splits], body: Body
) -> str:
    """All or nothing, upon the commit whose card was read."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    there = api.dataset_info(repo, revision=revision)
    try:
        old = DatasetCard.load(api.hf_hub_download(repo, "README.md", repo_type="dataset", revision=there.sha))
    except LocalEntryNotFoundError:  # out of reach: a new card would take the place of the owner's
        raise
    except EntryNotFoundError:
        old = DatasetCard(EMPTY)
    ours, new = tuple(f"{_folder(c)}/{s}-" for c in rows for s in rows[c]), {f.path_in_repo for f in files}
    gone = [f.rfilename for f in there.siblings or () if f.rfilename.startswith(ours) and f.rfilename not in new]
    others = [f.rfilename for f in there.siblings or () if not f.rfilename.startswith(ours)]
    configs = {config: _data_files(old, config, rows[config], others) for config in rows}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *files,
        *([CommitOperationAdd(IMAGE, body.image)] if body.image else []),
        CommitOperationAdd("README.md", merged(old, body, configs, repo).encode()),
        *map(CommitOperationDelete, gone),
    ]
    done = api.create_commit(
        repo, operations, commit_message="Curated with clear_datasets", repo_type="dataset", revision=revision,
        parent_commit=there.sha,
    )  # fmt: skip
    return str(done.commit_url)


def _data_files(card: DatasetCard, config: str, pushed: Iterable[str], others: list[str]) -> list[dict[str, Any]]:
    """Those of a config: of the splits that are pushed, and of those that other files of the repository belong to."""
    folder = _folder(config)
    known = next((c.get("data_files") for c in card.data.get("configs") or [] if c.get("config_name") == config), None)
    if known is None:  # found by their names, as datasets does
        names = (re.fullmatch(rf"{folder}/([\w.]+)-\d{{5}}-of-\d{{5}}[^/]*\.\w+", file) for file in others)
        known = [{"split": name[1], "path": f"{folder}/{name[1]}-*"} for name in names if name]
    elif isinstance(known, str) or all(isinstance(f, str) for f in known):
        known = [{"split": "train", "path": known}]
    paths: dict[str, Any] = {}
    for entry in known:
        patterns = as_list(entry["path"])
        if files := sorted({file for pattern in patterns for file in fnmatch.filter(others, pattern)}):
            new = [f"{folder}/{split}-00000-of-00001.parquet" for split in pushed]
            both = any(fnmatch.filter(new, pattern) for pattern in patterns)  # it would take what is pushed as well
            paths[entry["split"]] = files if both else entry["path"]
    paths |= {split: f"{folder}/{split}-*" for split in pushed}
    return [{"split": split, "path": path} for split, path in paths.items()]


def _again(call: Callable[[], T]) -> T:
    """A call to the Hub, repeated while it is busy or out of reach, after as long as it asks for or ever longer."""
    for tried in range(_TRIES):
        try:
            return call()
        except Exception as error:
            wait = _wait(error, 2**tried * random.uniform(0.5, 1))
            if tried + 1 == _TRIES or wait is None:
                raise
            time.sleep(min(_LONGEST, wait))
    raise AssertionError("not reached")


def _wait(error: Exception, usual: float) -> float | None:
    """Seconds after which another try may succeed; None where none will, be it refused or an error of this machine."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    for seen in _causes(error):
        if isinstance(seen, OfflineModeIsEnabled):
            return None
        if (response := getattr(seen, "response", None)) is not None:
            after = response.headers.get("Retry-After", "")
            busy = response.status_code in _BUSY
            return None if not busy else float(after) if after.isdigit() else usual
        kinds = {kind.__name__ for kind in type(seen).__mro__}  # of httpx, or httpx2 with huggingface_hub 2
        if kinds & {"TransportError", "ConnectionError", "TimeoutError"}:
            return usual
        if type(seen) is RuntimeError and seen.__cause__ is seen.__context__ is None:
            return usual  # older hf_xet says no more of a network that fails
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def of_the_hub(error: Exception) -> bool:
    """Whether the Hub refused, or was out of reach: its clients have exceptions of many kinds for that."""
    refused = any(getattr(cause, "response", None) is not None for cause in _causes(error))
    return refused or _wait(error, 0) is not None


def source_of(parts: Iterable[Dataset]) -> str:
    """The Hub id that rows were loaded from, "" where it was none."""
    return next((known for known, *_ in map(origin, parts) if known), "")
