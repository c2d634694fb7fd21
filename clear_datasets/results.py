"""``clear-datasets report`` and ``push``: what `score` and `curate` have written, looked at and published."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clear_datasets import options
from clear_datasets.files import write_text
from clear_datasets.reading import SETTINGS, SHARD, load
from clear_datasets.terminal import clear_errors, console, visible

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear

_Made = Annotated[Path, typer.Argument(metavar="OUT", help="What score or curate has written.")]


def report(
    out: _Made,
    page: Annotated[Path | None, typer.Option("--output", "-o", help="The page (default: OUT.html).")] = None,
    gamma: Annotated[float | None, typer.Option(help="Where the threshold stands at first.")] = None,
    eta: Annotated[float | None, typer.Option(min=0, max=1, help="The same of preferences.")] = None,
    prompt: options.Prompt = None,
    response: options.Response = None,
) -> None:
    """Write a page on which rows and thresholds can be looked at; it needs no network."""
    from clear_datasets.report import report as write

    with clear_errors():
        rows, settings = _audit(out), kept_settings(out)
        gamma = settings.get("gamma") if gamma is None else gamma
        eta = settings.get("eta", 0.8) if eta is None else eta
        known = settings.get("columns", {})
        more = [known.get(name, "" if known else None) for name in options.AROUND]
        form = options.format_of(rows, prompt or known.get("prompt"), response or known.get("response"), *more)
        file = write(
            rows, page or out.with_name(out.name + ".html"), gamma=gamma, eta=eta, format=form, title=out.name,
            agreed="keep" if settings.get("keep_agreed") else "drop", failed=settings.get("failed", "keep"),
        )  # fmt: skip
        console.print(f"wrote {file}")


def push(
    out: _Made,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    source: Annotated[str | None, typer.Option(help="Hub id of the source, for the card.")] = None,
) -> None:
    """Push curated rows, all rows with their scores, and a card that says what was done, to the Hub."""
    from clear_datasets import Clear, Columns
    from clear_datasets.hub import of_the_hub, push_to_hub

    with clear_errors():
        rows, settings = load(str(out), None, None, None, None), kept_settings(out)
        audit = _audit(out)
        if "clear_decision" not in audit.column_names:
            raise ValueError(f"{out} has no decisions: run clear-datasets curate first")
        _check_whole(out, rows, audit)
        known, columns = settings.pop("source", None), settings.pop("columns", None)
        clear = Clear(settings.get("model", ""), format=Columns(**columns)) if columns else None
        try:
            address = push_to_hub(
                rows, repo, audit, clear=clear, settings=settings, source=source or known,
                private=private or None, split=split, revision=revision,
            )  # fmt: skip
        except Exception as error:
            if isinstance(error, OSError) or not of_the_hub(error):
                raise
            raise OSError(
                f"the push broke off ({str(error) or type(error).__name__}): the Hub shows what it showed before, and "
                "the same command goes on from what was uploaded"
            ) from error
        print(visible(address))


def _check_whole(out: Path, rows: Dataset, audit: Dataset) -> None:
    """Refuse an audit of other rows than those of OUT: of a run that was ended between the two."""
    beside = audit_file(out)
    if not beside.exists():  # OUT has the decisions itself
        return
    left = sum(decision != "drop" for decision in audit["clear_decision"][:])
    if len(rows) != left:
        raise ValueError(
            f"{out} has {len(rows):,} rows, and {beside.name} keeps {left:,}: run clear-datasets curate again, which "
            "asks nothing twice, or publish rows that were changed by hand with push_to_hub"
        )
    if not settings_file(out).exists():
        raise ValueError(
            f"{out} has no {settings_file(out).name} beside it, which curate writes last: copy it along, or run "
            "clear-datasets curate again, which asks nothing twice"
        )


def forget(out: Path) -> None:
    """Delete what says what made OUT: a run that ends while OUT is written leaves nothing said of other rows."""
    for file in (settings_file(out), shard_file(out)):
        file.unlink(missing_ok=True)


def keep_settings(out: Path, clear: Clear, rows: Dataset, **more: Any) -> None:
    """Write beside OUT what made it: the card of `push` says so."""
    from clear_datasets.card import last_part

    arguments = [name + is_ + last_part(value) for name, is_, value in map(_split, sys.argv[1:])]
    command = shlex.join(["clear-datasets", *arguments])
    write_text(settings_file(out), as_json({**made_by(clear, rows), **more, "command": command}))


def made_by(clear: Clear, rows: Dataset) -> dict[str, Any]:
    """Model, estimator, columns and source of what is written."""
    from clear_datasets.card import settings_of
    from clear_datasets.formats import Columns
    from clear_datasets.hub import source_of

    made = settings_of(clear)
    if source := source_of([rows]):
        made["source"] = source
    if isinstance(clear.format, Columns):
        made["columns"] = {name: column for name, column in asdict(clear.format).items() if column}
    return made


def as_json(record: Mapping[str, Any]) -> str:
    """A record as it is kept beside OUT."""
    return json.dumps(record, indent=1, default=str) + "\n"


def check_scored_by(src: str, clear: Clear) -> None:
    """Refuse another model or estimator than SRC was scored with, where what made it is kept beside it.

    Raises:
        ValueError: The model or the estimator is another one.
    """
    from clear_datasets.card import settings_of

    known, given = kept_settings(Path(src)), settings_of(clear)
    for name in ("model", "revision", "confidence") if known else ():
        if known.get(name) != given.get(name) and not (name == "model" and _same_folder(known, clear)):
            raise ValueError(
                f"{src} was scored with {name} {known.get(name)}, not {given.get(name)}: give the options of "
                "clear-datasets score again, or leave --scored out"
            )


def _same_folder(known: Mapping[str, Any], clear: Clear) -> bool:
    """Whether two names may be those of one folder: of an absolute one no more than its last part is kept."""
    names = [Path(str(known.get("model", ""))), Path(clear.model)]
    bare = any(len(name.parts) == 1 or name.is_absolute() for name in names)
    return bare and names[0].name == names[1].name and names[1].exists()


def check_no_audit(out: Path) -> None:
    """Refuse to write scores where `curate` has left decisions.

    Raises:
        ValueError: Its audit is there: `report` and `push` would take it for what OUT is.
    """
    if audit_file(out).exists():
        raise ValueError(f"{out} is of curate, as {audit_file(out)} is there: give another OUT, or delete both")


def kept_settings(out: Path) -> dict[str, Any]:
    """What was kept beside OUT; nothing where nothing was."""
    file = settings_file(out)
    found: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return dict(found)


def _split(argument: str) -> tuple[str, str, str]:
    """Name, sign and value of --name=value; of another argument itself as the value."""
    name, is_, value = argument.partition("=")
    return (name, is_, value) if is_ and name.startswith("--") else ("", "", argument)


def settings_file(out: Path) -> Path:
    """Where is kept what made OUT."""
    return out.parent / f"{out.name}{SETTINGS}"  # of a folder without a name, too


def shard_file(out: Path) -> Path:
    """Where ``score --shard`` keeps which part of the rows OUT is."""
    return out.parent / f"{out.name}{SHARD}"


def audit_file(out: Path) -> Path:
    """Where `curate` keeps all rows with their scores and decisions."""
    return out.parent / f"{out.name}.audit.parquet"


def _audit(out: Path) -> Dataset:
    """All rows with their scores: beside OUT, or OUT itself."""
    beside = audit_file(out)
    rows = load(str(beside if beside.exists() else out), None, None, None, None)
    if "clear_confidence" not in rows.column_names:
        raise ValueError(
            f"the rows of {out} have no scores, and {beside.name} is not there: give what curate has written"
        )
    return rows
