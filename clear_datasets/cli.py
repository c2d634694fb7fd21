"""``clear-datasets``: score and curate from the command line."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clear_datasets import results
from clear_datasets.files import check_out, load, write
from clear_datasets.terminal import clear_errors, console, cost_table, summary

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets.formats import Format
    from clear_datasets.stages import Stages

_EXAMPLES = """Examples:

  clear-datasets score train.jsonl -o scored.jsonl --model Qwen/Qwen2.5-7B-Instruct

  clear-datasets curate 'data/*.parquet' -o curated.parquet --model ./checkpoint --keep 0.6

  clear-datasets curate tatsu-lab/alpaca --split train -o curated/ --model Qwen/Qwen2.5-7B-Instruct

  clear-datasets curate train.jsonl -o curated.jsonl --model Qwen/Qwen2.5-7B-Instruct --correct

  clear-datasets report curated.jsonl

  clear-datasets push curated.jsonl me/train-curated

  clear-datasets estimate train.jsonl --model Qwen/Qwen2.5-7B-Instruct --correct --price-per-hour 2.5

Exit codes: 0 done, 1 wrong input or settings, 2 wrong usage, 3 no row could be scored."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class _Failed(StrEnum):
    keep = "keep"
    drop = "drop"
    error = "raise"


class _Judge(StrEnum):
    confidence = "confidence"
    pairwise = "pairwise"
    reasoned = "reasoned"


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
_Keep = Annotated[float, typer.Option(min=0, max=1, help="Share of the scored rows to keep.")]
_Correct = Annotated[bool, typer.Option("--correct", help="Replace targets by better candidates, too.")]
_Writer = Annotated[str | None, typer.Option(help="Adapter or model that writes candidates.")]
_Rounds = Annotated[
    int, typer.Option(min=1, help="How often to write candidates, by a model trained on the last round.")
]
_JUDGING = "How MODEL judges candidates: by its confidence in each, or which is better, without or with reasons."
_Preference = Annotated[_Judge, typer.Option(help=_JUDGING)]


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

    with clear_errors(2):
        check_out(out, src)
    with clear_errors():
        rows = load(src, split, config, revision, limit)
        form = _format(rows, prompt, response, input, context, system)
        clear = Clear(model, model_revision, format=form, confidence=BSDetector(k=samples))
        scored = _stages(out, batch_size).score(rows, clear)
        write(scored, out)
        summary(scored, out, clear, None)


@app.command(epilog=_EXAMPLES)
def curate(
    src: _Source,
    out: _Out,
    model: _Model,
    keep: _Keep = 0.5,
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
    correct: _Correct = False,
    writer: _Writer = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tune MODEL to write them (the default without --writer).")
    ] = False,
    preference: _Preference = _Judge.confidence,
    eta: Annotated[float, typer.Option(min=0, max=1, help="Preference above which a candidate replaces.")] = 0.8,
    keep_agreed: Annotated[
        bool, typer.Option("--keep-agreed", help="Keep less confident rows whose target the writer repeats.")
    ] = False,
    rounds: _Rounds = 1,
) -> None:
    """Keep the rows of SRC whose confidence is above a threshold.

    OUT has the kept rows in SRC's own columns. Every row with its scores and decision stands beside it, in
    OUT.audit.parquet. With --correct, MODEL is fine-tuned on the kept rows (into OUT.writer), and the other rows get
    its answer where MODEL itself is sure that it is better. A run that was broken off goes on behind the last batch
    that was done (clear_stages, beside OUT) or the last checkpoint of fine-tuning.
    """
    from clear_datasets import BSDetector, Clear, curated, decide, threshold
    from clear_datasets.preference import by_name
    from clear_datasets.stages import train_writer

    with clear_errors(2):
        audit = results.audit_file(out)
        check_out(out, src)
        check_out(audit, src)
        if not correct and (writer or finetune or keep_agreed or rounds > 1):
            raise ValueError("--writer, --finetune, --keep-agreed and --rounds go with --correct")
        if writer and (finetune or rounds > 1):
            raise ValueError("--finetune and each of --rounds train a writer: leave out --writer")
    with clear_errors():
        rows = load(src, split, config, revision, limit)
        form = _format(rows, prompt, response, input, context, system)
        clear = Clear(
            model,
            model_revision,
            format=form,
            confidence=BSDetector(k=samples),
            preference=by_name(preference, samples),
        )
        stages = _stages(out, batch_size)
        scored = stages.score(rows, clear)
        older = ("candidate", "agreed", "preference", "position_bias", "decision")  # of an audit as SRC
        scored = scored.remove_columns([c for c in scored.column_names if c in {f"clear_{name}" for name in older}])
        if all(scored["clear_error"][:]):
            write(scored, audit)
            summary(scored, audit, clear, None)
        cut = threshold(scored, keep) if gamma is None else gamma
        decision = decide(cut, eta, agreed="keep" if keep_agreed else "drop", failed=failed.value)
        decided = scored.map(decision, batched=True)
        for number in range(rounds if correct else 0):
            folder = out.with_name(f"{out.name}.writer" + (f"{number + 1}" if rounds > 1 else ""))
            correcting = clear.with_writer(writer or folder, cut)
            if writer is None:
                train_writer(decided, correcting)
            decided = stages.correct(scored, correcting).map(decision, batched=True)
        write(decided, audit)
        write(curated(decided, form).select_columns([c for c in rows.column_names if c in decided.column_names]), out)
        more = {"eta": eta, "keep_agreed": keep_agreed, "rounds": rounds} if correct else {}
        results.keep_settings(out, clear, rows, gamma=cut, failed=failed.value, **more)
        summary(decided, out, clear, cut)


@app.command(epilog=_EXAMPLES)
def estimate(
    src: _Source,
    model: _Model,
    correct: _Correct = False,
    writer: _Writer = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of the machine, in any currency.")] = None,
    probe: Annotated[int, typer.Option(min=2, help="Rows to run; on a GPU, let it have as many as a batch.")] = 50,
    keep: _Keep = 0.5,
    rounds: _Rounds = 1,
    preference: _Preference = _Judge.confidence,
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
    """Say what `curate` will take: tokens, time and money, from a run on a few random rows of SRC."""
    from clear_datasets import BSDetector, Clear
    from clear_datasets.estimate import estimate
    from clear_datasets.preference import by_name
    from clear_datasets.stages import usual_batch_size

    with clear_errors(2):
        if not correct and (writer or rounds > 1):
            raise ValueError("--writer and --rounds go with --correct")
    with clear_errors():
        rows = load(src, split, config, revision, limit)
        form = _format(rows, prompt, response, input, context, system)
        clear = Clear(
            model,
            model_revision,
            format=form,
            confidence=BSDetector(k=samples),
            preference=by_name(preference, samples),
        )
        clear = clear.with_writer(writer) if writer else clear
        console.print(f"running {min(probe, len(rows)):,} of {len(rows):,} rows")
        size = batch_size or usual_batch_size()
        costs = estimate(rows, clear, correct=correct, keep=keep, probe=probe, batch_size=size, rounds=rounds)
        cost_table(costs, len(rows), price_per_hour)


app.command(epilog=_EXAMPLES)(results.report)
app.command(epilog=_EXAMPLES)(results.push)


def _stages(out: Path, batch_size: int | None) -> Stages:
    from clear_datasets.stages import Stages, usual_batch_size

    return Stages(out.parent / "clear_stages", batch_size or usual_batch_size())


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


if __name__ == "__main__":
    app()
