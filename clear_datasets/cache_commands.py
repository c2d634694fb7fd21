"""``clear-datasets cache``: look at the answers that were paid for, and make room."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from clear_datasets.terminal import clear_errors, visible

app = typer.Typer(no_args_is_help=True, help="Look at the answers that are kept, and make room.")

_Folder = Annotated[
    Path | None, typer.Option(help="Folder of the answers (default: CLEAR_CACHE, else beside the Hub's cache).")
]
_SECONDS = {"h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


@app.command()
def info(folder: _Folder = None) -> None:
    """Say how many answers are kept, where, and how much room they take."""
    from clear_datasets.engines.cache import store_of

    with clear_errors():
        found = store_of(folder).info()
        print(visible(f"{found.answers:,} answers in {found.path}"))
        print(f"{_size(found.size)} of at most {_size(found.limit)} (CLEAR_CACHE_GB)")
        if found.oldest is not None:
            print(f"the oldest was used {_day(found.oldest)}")


@app.command()
def prune(
    older_than: Annotated[str, typer.Option(help="Not used for so long, to the hour: 12h, 30d, 8w.")],
    folder: _Folder = None,
) -> None:
    """Delete answers that were not used for a while."""
    from clear_datasets.engines.cache import store_of

    with clear_errors(2):
        match = re.fullmatch(r"(\d+)([hdw])", older_than)
        if match is None:
            raise ValueError(f"--older-than is {older_than!r}; expected a number of hours, days or weeks: 12h, 30d, 8w")
    with clear_errors():
        gone = store_of(folder).prune(time.time() - int(match[1]) * _SECONDS[match[2]])
        print(f"deleted {gone:,} answers that were not used since {older_than} ago")


@app.command()
def clear(
    folder: _Folder = None, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False
) -> None:
    """Delete all answers; what needs them is asked, and paid for, anew."""
    from clear_datasets.engines.cache import store_of

    with clear_errors():
        store = store_of(folder)
        if not yes:
            typer.confirm(f"delete {store.info().answers:,} answers in {visible(str(store.path))}?", abort=True)
        print(f"deleted {store.prune():,} answers")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def _day(when: float) -> str:
    return time.strftime("on %Y-%m-%d", time.localtime(when))
