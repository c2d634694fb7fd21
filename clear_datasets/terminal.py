"""What the command line says: progress, a summary, and errors in one line."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear
    from clear_datasets.calibrate import Calibration
    from clear_datasets.estimate import Cost

_NEWS = 60.0  # seconds between two lines of progress in a log

# What a terminal obeys, or what reorders a line: all controls but tab and newline, and bidirectional overrides.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Text of the data that a terminal only shows: an escape sequence as the characters that it is made of.

    Examples:
        >>> print(visible("\x1b[2J"))
        \x1b[2J
    """
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class _Console(Console):
    """One on which no text of the data acts; rich removes some controls, but not the escape character."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See rich: called on each text that is printed, cells of tables too, before it gets its own colours."""
        return super().render_str(visible(text), **options)


console = _Console(stderr=True, emoji=False)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, bool], None]]:
    """A progress bar; gives a function that is told how many rows are done, and whether they were known before."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    from clear_datasets.engines.cache import COUNTS

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
               TimeElapsedColumn())  # fmt: skip
    started, asked, kept, before = time.monotonic(), 0, 0, COUNTS.known
    told = started
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, speed="loading the model")

        def advance(rows: int, known: bool) -> None:
            nonlocal asked, kept, told
            asked, kept = (asked, kept + rows) if known else (asked + rows, kept)
            spent, left = time.monotonic() - started, total - asked - kept
            said = [f"{asked / spent:.2f} rows/s"] if asked else []
            said += [f"{clock(spent * left / asked)} left"] if asked and left else []
            said += [f"{kept:,} from an earlier run"] if kept else []
            answers = COUNTS.known - before
            said += [f"{answers:,} answers from the cache"] if answers else []
            bar.update(task, advance=rows, speed=", ".join(said))
            if not console.is_terminal and time.monotonic() - told >= _NEWS:  # a log shows no bar before its end
                told = time.monotonic()
                console.print(f"{title}: {asked + kept:,} of {total:,} rows, {', '.join(said)}", highlight=False)

        yield advance


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def summary(ds: Dataset, out: Path, clear: Clear, gamma: float | None) -> None:
    """What became of the rows, how their confidence is spread, and the least confident of them."""
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    from clear_datasets.formats import FormatError
    from clear_datasets.infer_format import of_each, without_media

    confidence = np.asarray(ds["clear_confidence"][:], dtype=float)
    scored = ~np.isnan(confidence)
    table = Table(title=f"{len(ds):,} rows with {Path(clear.model).name}", title_justify="left", show_header=False)
    if gamma is not None:
        decisions = ds["clear_decision"][:]
        table.add_row("kept", f"{decisions.count('keep'):,}")
        if "clear_candidate" in ds.column_names:
            table.add_row("replaced", f"{decisions.count('replace'):,}")
        table.add_row("dropped", f"{decisions.count('drop'):,}")
        table.add_row("gamma", f"{gamma:.4f}")
    table.add_row("failed", f"{int((~scored).sum()):,}")
    counts, _ = np.histogram(confidence[scored], bins=10, range=(0, 1))
    for i, count in enumerate(counts):
        bar = "█" * round(30 * count / max(counts.max(), 1))
        table.add_row(f"confidence {i / 10:.1f} to {(i + 1) / 10:.1f}", f"{bar} {count}")
    console.print(table)
    rows, form_of = without_media(ds), of_each(clear.format, ds)
    least = Table("row", "confidence", "prompt ends", "target", title="least confident", title_justify="left")
    for i in np.flatnonzero(scored)[np.argsort(confidence[scored], kind="stable")[:5]]:
        row = rows[int(i)]
        try:
            example = form_of(row).read(row)
        except FormatError:  # of a row that came with a score
            continue
        prompt = example.prompt[-1]["content"]
        least.add_row(
            str(i), f"{confidence[i]:.3f}", escape(_short(prompt, last=True)), escape(_short(example.response))
        )
    console.print(least)
    for error, count in Counter(e for e in ds["clear_error"][:] if e).most_common(5):
        console.print(f"{count:,} row{'s' * (count > 1)}: {escape(_short(error, 200))}")
    console.print(f"wrote {escape(str(out))}")
    if not scored.any():
        fail("no row could be scored", 3)


def cost_table(costs: Sequence[Cost], rows: int, price_per_hour: float | None) -> None:
    """Tokens, time and money of each stage and in all, to standard output."""
    from rich.table import Table

    from clear_datasets.estimate import Cost

    fields = ("prompt_tokens", "written_tokens", "seconds")
    whole = Cost("in all", *(sum(getattr(c, f) for c in costs) for f in fields))
    money = price_per_hour is not None
    table = Table("stage", "prompt tokens", "written tokens", "time", *["money"] * money, title=f"{rows:,} rows, about",
                  title_justify="left")  # fmt: skip
    for cost in [*costs, whole]:
        price = [f"{cost.seconds / 3600 * price_per_hour:,.2f}"] if price_per_hour is not None else []
        tokens = f"{cost.prompt_tokens:,}", f"{cost.written_tokens:,}"
        table.add_row(cost.stage, *tokens, clock(cost.seconds), *price)
    _Console().print(table)


def calibration_tables(found: Calibration) -> None:
    """How well each signal finds noise, and what thresholds would do, to standard output."""
    from rich.markup import escape
    from rich.table import Table

    out = _Console(emoji=False)
    signals = Table("signal", "AUROC", "95% interval", title="what finds the noise", title_justify="left")
    for name, (value, low, high) in found.signals.items():
        signals.add_row(escape(name), f"{value:.3f}", f"{low:.3f} to {high:.3f}")
    cuts = Table("--keep", "gamma", "wrong rows found", "95% interval", "wrong among those not kept",
                 title="what a threshold does", title_justify="left")  # fmt: skip
    for t in found.thresholds:
        recall, low, high = t.recall
        cuts.add_row(
            f"{t.kept:.2f}", f"{t.gamma:.4f}", f"{recall:.2f}", f"{low:.2f} to {high:.2f}", f"{t.precision[0]:.2f}"
        )
    out.print(signals, cuts)
    for note in found.notes:
        out.print(escape(note))
    out.print(f"gamma={found.gamma:.4f} finds most for the right rows that it loses")
    out.print("wrong rows are those that were made wrong here: how many stand in the data is not known")


def _short(text: str, size: int = 60, last: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= size:
        return text
    return "…" + text[-size:] if last else text[:size] + "…"


@contextmanager
def clear_errors(code: int = 1) -> Iterator[None]:
    """Wrong input ends in one line and an exit code, not in a traceback (which CLEAR_DEBUG=1 shows)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read at the import, by transformers too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError

    from clear_datasets.engines import EngineError

    disable_progress_bars()
    log = logging.getLogger("clear_datasets")
    level = log.level
    log.setLevel(logging.ERROR)  # what it would say of an interrupt is said below, of known answers by the progress
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # for trl's authors
    try:
        yield
    except (ValueError, OSError, TypeError, ImportError, DatasetsError, EngineError) as error:
        if os.environ.get("CLEAR_DEBUG"):
            raise
        fail(str(error) or type(error).__name__, code)
    except KeyboardInterrupt:
        fail("interrupted; what was answered is kept, and the same command goes on from there", 130)
    finally:
        log.setLevel(level)


def fail(message: str, code: int) -> NoReturn:
    """End with a line and an exit code."""
    print(visible(f"clear-datasets: {message}"), file=sys.stderr)
    raise typer.Exit(code)
