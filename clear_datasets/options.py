"""The options that commands share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear
    from clear_datasets.formats import Columns, Format
    from clear_datasets.stages import Stages


AROUND = ("input", "context", "system")  # columns that may stand around the prompt; "" names none


class Failed(StrEnum):
    """What becomes of rows without a score."""

    keep = "keep"
    drop = "drop"
    error = "raise"


class Judge(StrEnum):
    """How candidates are judged."""

    confidence = "confidence"
    pairwise = "pairwise"
    reasoned = "reasoned"


Source = Annotated[
    str, typer.Argument(metavar="SRC", help="Hub id, file or glob (.jsonl .json .csv .parquet), or folder.")
]
Out = Annotated[
    Path, typer.Option("--output", "-o", help="Where to write: .jsonl, .json, .csv, .parquet, or a folder.")
]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, local folder or .gguf file.", envvar="CLEAR_MODEL")]
ModelRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Split = Annotated[str | None, typer.Option(help="Split of a Hub dataset or folder (default: its only one).")]
Config = Annotated[str | None, typer.Option(help="Configuration of a Hub dataset.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub dataset.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take the first N rows only.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Rows handed to the engine at a time (default: 1,000 on a GPU, else 64).")
]
Prompt = Annotated[str | None, typer.Option(help="Column of the prompt, where it is not recognised.")]
Input = Annotated[str | None, typer.Option(help="Column that follows the prompt; '' for none.")]
Response = Annotated[str | None, typer.Option(help="Column of the target.")]
Context = Annotated[str | None, typer.Option(help="Column of a passage that goes before the prompt; '' for none.")]
System = Annotated[str | None, typer.Option(help="Column of the system message; '' for none.")]
Samples = Annotated[int, typer.Option("--samples", "-k", min=1, help="Samples a row.")]
Math = Annotated[bool, typer.Option("--math", help="Targets are solutions that end in a result: it alone is compared.")]
_ANSWERS = (
    "Take answers that were paid for before, and keep new ones. Batches of score and curate (clear_stages) are taken "
    "and kept either way."
)
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help=_ANSWERS)]
Replicas = Annotated[
    str | None, typer.Option(metavar="N", help="Engines on the GPUs of a Ray cluster: a number, or auto for all GPUs.")
]
Ray = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="The cluster: auto, host:port, or local (default: RAY_ADDRESS, else local)."),
]
Shard = Annotated[
    str | None, typer.Option(metavar="I/N", help="Take the I-th of N parts of the rows, from 0/N on; merge joins them.")
]
Retry = Annotated[
    bool,
    typer.Option(
        "--retry-failed", help="Ask again about rows that a run before this one has a reason for, not a score."
    ),
]
Keep = Annotated[float | None, typer.Option(min=0, max=1, help="Share of the scored rows to keep (default: 0.5).")]
Correct = Annotated[bool, typer.Option("--correct", help="Replace targets by better candidates, too.")]
Writer = Annotated[str | None, typer.Option(help="Adapter or model that writes candidates.")]
Rounds = Annotated[
    int, typer.Option(min=1, help="How often to write candidates, by a model trained on the last round.")
]
_JUDGING = (
    "How MODEL judges candidates: by its confidence in each (the default), or which is better, without or with reasons."
)
Preference = Annotated[Judge | None, typer.Option(help=_JUDGING)]


def format_of(rows: Dataset, prompt: str | None, response: str | None, input: str | None, context: str | None,
              system: str | None) -> Format | None:  # fmt: skip
    """The format of named columns; those that are not named are inferred, all of them where none is."""
    from clear_datasets.formats import Columns, FormatError
    from clear_datasets.infer_format import infer_dataset

    named = {"prompt": prompt, "response": response, "input": input, "context": context, "system": system}
    given: dict[str, Any] = {n: c or None for n, c in named.items() if c is not None and (c or n in AROUND)}
    for option, column in given.items():
        if column and column not in rows.column_names:
            raise ValueError(f"--{option}: there is no column {column!r}; found {', '.join(rows.column_names)}")
    if not given:
        return None
    if prompt and response:
        with suppress(FormatError):
            form = infer_dataset(rows)
            if isinstance(form, Columns) and form.prompt == prompt:  # with what belongs to it
                return _with(form, given)
        return Columns(**given)
    form = infer_dataset(rows)
    if not isinstance(form, Columns):
        raise ValueError(f"the columns hold a chat ({form}): --{', --'.join(given)} cannot be set on it")
    return _with(form, given)


def _with(form: Columns, given: Mapping[str, Any]) -> Columns:
    """Columns of which some are named: none that is the prompt or the target now stands around the prompt as well."""
    new = replace(form, **given)
    none: dict[str, Any] = {n: None for n in AROUND if n not in given and getattr(new, n) in (new.prompt, new.response)}
    return replace(new, **none)


def steps(
    model: str, revision: str | None, form: Format | None, samples: int, math: bool, judge: Judge | None = None,
    cache: bool = True,
) -> Clear:  # fmt: skip
    """The steps that these options stand for."""
    from clear_datasets import BSDetector, Clear
    from clear_datasets.preference import by_name

    estimator = BSDetector.math(samples) if math else BSDetector(k=samples)
    preference = by_name(judge or Judge.confidence, estimator)
    return Clear(
        model, revision, format=form, confidence=estimator, preference=preference, cache=None if cache else False
    )


def stages(
    out: Path, batch_size: int | None, replicas: str | None, ray: str | None, retry: bool, shard: str | None = None
) -> Stages:
    """Where and how the stages of OUT run."""
    from clear_datasets.stages import Stages, usual_batch_size

    folder, part = out.parent / "clear_stages", _part(shard) if shard else (0, 1)
    if replicas is None and ray is None:
        return Stages(folder, batch_size or usual_batch_size(), part, retry)
    from clear_datasets.distributed import check
    from clear_datasets.ray_stages import RayStages

    if replicas not in (None, "auto") and not str(replicas).isdecimal():
        raise ValueError(f"--replicas is {replicas!r}; expected a number of engines, or auto")
    count: int | Literal["auto"] = "auto" if replicas in (None, "auto") else int(str(replicas))
    check(count)
    return RayStages(folder, batch_size or 0, part, retry, replicas=count, address=ray)


def _part(shard: str) -> tuple[int, int]:
    number, _, of = shard.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise ValueError(f"--shard is {shard!r}; expected one of 0/N to N-1/N, as 0/8 to 7/8")
    return int(number), int(of)
