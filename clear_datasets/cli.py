"""``clear-datasets``: score and curate from the command line."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from clear_datasets.files import check_out, load, write

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear
    from clear_datasets.formats import Format

_EXAMPLES = """Examples:

  clear-datasets score train.jsonl -o scored.jsonl --model Qwen/Qwen2.5-7B-Instruct

  clear-datasets curate 'data/*.parquet' -o curated.parquet --model ./checkpoint --keep 0.6

  clear-datasets curate tatsu-lab/alpaca --split train -o curated/ --model Qwen/Qwen2.5-7B-Instruct

  clear-datasets curate train.jsonl -o curated.jsonl --model Qwen/Qwen2.5-7B-Instruct --correct

Exit codes: 0 done, 1 wrong input or settings, 2 wrong usage, 3 no row could be scored."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_console = Console(stderr=True)


class _Failed(StrEnum):
    keep = "keep"
    drop = "drop"
    error = "raise"


_Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Hub id, file or glob (.jsonl .json .csv .parquet), or folder.")
]
_Out = Annotated[
    Path, typer.Option("--output", "-o", help="Where to write: .jsonl, .json, .csv, .parquet, or a folder.")
]
_Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, local folder or .gguf file.", envvar="CLEAR_MODEL")]
_ModelRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
_Split = Annotated[str | None, typer.Option(help="Split of a Hub dataset or folder (default: its only one).")]
_Config = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
_Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub dataset.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Take the first N rows only.")]
_BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Rows handed to the engine at a time (default: 1,000 on a GPU, else 64).")
]
_Prompt = Annotated[str | None, typer.Option(help="Column of the prompt, where it is not recognised.")]
_Input = Annotated[str | None, typer.Option(help="Column that follows the prompt.")]
_Response = Annotated[str | None, typer.Option(help="Column of the target.")]
_Context = Annotated[str | None, typer.Option(help="Column of a passage that goes before the prompt.")]
_System = Annotated[str | None, typer.Option(help="Column of the system message.")]
_K = Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples a row.")]


@app.callback(epilog=_EXAMPLES)
def main() -> None:
    """Curate instruction-tuning data with the very LLM that is going to be fine-tuned (CLEAR)."""


@app.command(epilog=_EXAMPLES)
def score(
    src: _Source,
    out: _Out,
    model: _Model,
    model_revision: _ModelRevision = None,
    split: _Split = None,
    config: _Config = None,
    revision: _Revision = None,
    limit: _Limit = None,
    batch_size: _BatchSize = None,
    prompt: _Prompt = None,
    input: _Input = None,
    context: _Context = None,
    response: _Response = None,
    system: _System = None,
    samples: _K = 5,
) -> None:
    """Add confidence columns to every row of SRC."""
    from clear_datasets import BSDetector, Clear

    with _clear_errors(2):
        check_out(out, src)
    with _clear_errors():
        rows = load(src, split, config, revision, limit)
        form = _format(rows, prompt, response, input, context, system)
        clear = Clear(model, model_revision, format=form, confidence=BSDetector(k=samples))
        scored = _mapped(rows, clear.score, "scoring", batch_size)
        write(scored, out)
        _summary(scored, out, clear, None)


@app.command(epilog=_EXAMPLES)
def curate(
    src: _Source,
    out: _Out,
    model: _Model,
    keep: Annotated[float, typer.Option(min=0, max=1, help="Share of the scored rows to keep.")] = 0.5,
    gamma: Annotated[float | None, typer.Option(help="A fixed threshold in place of --keep.")] = None,
    failed: Annotated[_Failed, typer.Option(help="What becomes of rows without a score.")] = _Failed.keep,
    model_revision: _ModelRevision = None,
    split: _Split = None,
    config: _Config = None,
    revision: _Revision = None,
    limit: _Limit = None,
    batch_size: _BatchSize = None,
    prompt: _Prompt = None,
    input: _Input = None,
    context: _Context = None,
    response: _Response = None,
    system: _System = None,
    samples: _K = 5,
    correct: Annotated[bool, typer.Option("--correct", help="Replace targets by better candidates, too.")] = False,
    writer: Annotated[
        str | None, typer.Option(help="Adapter or model that writes candidates; by default MODEL is fine-tuned.")
    ] = None,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Preference above which a candidate replaces.")] = 0.8,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often to write candidates, by a model trained on the last round.")
    ] = 1,
) -> None:
    """Keep the rows of SRC whose confidence is above a threshold.

    OUT has the kept rows in SRC's own columns. Every row with its scores and decision stands beside it, in
    OUT.audit.parquet. With --correct, MODEL is fine-tuned on the kept rows (into OUT.writer), and the other rows get
    its answer where MODEL itself is sure that it is better. A run that was broken off begins the stage anew that it
    was in; fine-tuning goes on from its last checkpoint.
    """
    from clear_datasets import BSDetector, Clear, curated, decide, threshold

    with _clear_errors(2):
        check_out(out, src)
        if not correct and (writer or rounds > 1):
            raise ValueError("--writer and --rounds go with --correct")
        if writer and rounds > 1:
            raise ValueError("each of --rounds trains a writer: leave out --writer")
    with _clear_errors():
        rows = load(src, split, config, revision, limit)
        form = _format(rows, prompt, response, input, context, system)
        clear = Clear(model, model_revision, format=form, confidence=BSDetector(k=samples))
        scored = _mapped(rows, clear.score, "scoring", batch_size)
        audit = out.with_name(out.name + ".audit.parquet")
        if all(scored["clear_error"][:]):
            write(scored, audit)
            _summary(scored, audit, clear, None)
        cut = threshold(scored, keep) if gamma is None else gamma
        decided = scored.map(decide(cut, eta, failed=failed.value), batched=True)
        for number in range(rounds if correct else 0):
            folder = out.with_name(f"{out.name}.writer" + (f"{number + 1}" if rounds > 1 else ""))
            decided = _corrected(scored, decided, clear.with_writer(writer or folder, cut), writer is None, batch_size)
            decided = decided.map(decide(cut, eta, failed=failed.value), batched=True)
        write(decided, audit)
        write(curated(decided, form).select_columns(rows.column_names), out)
        _summary(decided, out, clear, cut)


def _corrected(scored: Dataset, decided: Dataset, clear: Clear, train: bool, batch_size: int | None) -> Dataset:
    """The scored rows with candidates and preferences, of a writer that is trained on the rows decided for so far."""
    from clear_datasets import curated

    assert clear.writer is not None
    if train:
        from clear_datasets.finetune import finetune

        replace(clear, writer=None).close()  # its memory is needed
        rows = curated(decided, clear.format).filter(lambda error: not error, input_columns="clear_error")
        _console.print(f"fine-tuning on {len(rows):,} rows, into {clear.writer}")
        finetune(rows, clear.model, clear.writer, revision=clear.revision, format=clear.format)
    proposed = _mapped(scored, clear.propose, "writing candidates", batch_size)
    return _mapped(proposed, clear.prefer, "judging candidates", batch_size)


def _format(rows: Dataset, prompt: str | None, response: str | None, input: str | None, context: str | None,
            system: str | None) -> Format | None:  # fmt: skip
    """The format of named columns; those that are not named are inferred, all of them where none is."""
    from clear_datasets.formats import Columns, infer_rows

    named = {"prompt": prompt, "response": response, "input": input, "context": context, "system": system}
    given: dict[str, Any] = {name: column for name, column in named.items() if column}
    for option, column in given.items():
        if column not in rows.column_names:
            raise ValueError(f"--{option}: there is no column {column!r}; found {', '.join(rows.column_names)}")
    if not given:
        return None
    if prompt and response:
        return Columns(**given)
    form = infer_rows(rows[:1000])
    if not isinstance(form, Columns):
        raise ValueError(f"the columns hold a chat ({form}): --{', --'.join(given)} cannot be set on it")
    return replace(form, **given)


def _mapped(rows: Dataset, method: Callable[..., dict[str, Any]], what: str, batch_size: int | None) -> Dataset:
    """`rows.map(method)` with a progress bar; what was done before with the same settings comes from the cache."""
    import torch
    from datasets.fingerprint import Hasher
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    batch_size = batch_size or (1000 if torch.cuda.device_count() else 64)
    started = time.monotonic()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False))  # fmt: skip
    with Progress(*columns, console=_console) as progress:
        task = progress.add_task("score", total=len(rows), speed="loading the model")
        done = 0

        def step(batch: dict[str, list[Any]]) -> dict[str, Any]:
            nonlocal done
            added = method(batch)
            done += len(added["clear_error"])
            speed = f"{done / (time.monotonic() - started):.2f} rows/s"
            progress.update(task, completed=done, speed=speed)
            return added

        fingerprint = Hasher.hash((rows._fingerprint, method, batch_size))
        result = rows.map(step, batched=True, batch_size=batch_size, new_fingerprint=fingerprint)
        if not done:
            progress.update(task, speed="from the cache")
        progress.update(task, completed=len(rows))
    return result


def _summary(ds: Dataset, out: Path, clear: Clear, gamma: float | None) -> None:
    import numpy as np
    from rich.markup import escape
    from rich.table import Table

    from clear_datasets.formats import infer_rows

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
    _console.print(table)
    form = clear.format or infer_rows(ds[:1000])
    least = Table("row", "confidence", "prompt ends", "target", title="least confident", title_justify="left")
    for i in np.flatnonzero(scored)[np.argsort(confidence[scored], kind="stable")[:5]]:
        example = form.read(ds[int(i)])
        prompt = example.prompt[-1]["content"]
        least.add_row(
            str(i), f"{confidence[i]:.3f}", escape(_short(prompt, last=True)), escape(_short(example.response))
        )
    _console.print(least)
    for error, count in Counter(e for e in ds["clear_error"][:] if e).most_common(5):
        _console.print(f"failed, {count} rows: {escape(_short(error, 200))}")
    _console.print(f"wrote {escape(str(out))}")
    if not scored.any():
        _fail("no row could be scored", 3)


def _short(text: str, size: int = 60, last: bool = False) -> str:
    text = " ".join(text.split())
    if len(text) <= size:
        return text
    return "…" + text[-size:] if last else text[:size] + "…"


@contextmanager
def _clear_errors(code: int = 1) -> Iterator[None]:
    """Wrong input ends in one line and an exit code, not in a traceback (which CLEAR_DEBUG=1 shows)."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read at the import, by transformers too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from datasets import disable_progress_bars
    from datasets.exceptions import DatasetsError

    from clear_datasets.engines import EngineError

    disable_progress_bars()
    try:
        yield
    except (ValueError, OSError, TypeError, ImportError, DatasetsError, EngineError) as error:
        if os.environ.get("CLEAR_DEBUG"):
            raise
        _fail(str(error) or type(error).__name__, code)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)


def _fail(message: str, code: int) -> NoReturn:
    print(f"clear-datasets: {message}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
