"""``clear-datasets``: score and curate from the command line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clear_datasets import cache_commands, merging, options, results
from clear_datasets.apply import OURS
from clear_datasets.files import check_columns, check_out, write
from clear_datasets.reading import load
from clear_datasets.terminal import calibration_tables, clear_errors, console, cost_table, summary

if TYPE_CHECKING:
    from datasets import Dataset

_EXAMPLES = """Examples:

  clear-datasets score train.jsonl -o scored.jsonl --model Qwen/Qwen2.5-7B-Instruct

  clear-datasets curate 'data/*.parquet' -o curated.parquet --model ./checkpoint --keep 0.6

  clear-datasets curate tatsu-lab/alpaca --split train -o curated/ --model Qwen/Qwen2.5-7B-Instruct

  clear-datasets curate train.jsonl -o curated.jsonl --model Qwen/Qwen2.5-7B-Instruct --correct

  clear-datasets calibrate train.jsonl --model Qwen/Qwen2.5-7B-Instruct -o calibration.html

  clear-datasets report curated.jsonl

  clear-datasets push curated.jsonl me/train-curated

  clear-datasets score 'data/*.parquet' -o scored.parquet --model Qwen/Qwen2.5-7B-Instruct --replicas 8

  clear-datasets score train.jsonl -o part-3.parquet --model Qwen/Qwen2.5-7B-Instruct --shard 3/8

  clear-datasets merge 'part-*.parquet' -o scored.parquet

  clear-datasets cache prune --older-than 30d

  clear-datasets estimate train.jsonl --model Qwen/Qwen2.5-7B-Instruct --correct --price-per-hour 2.5

Exit codes: 0 done, 1 wrong input or settings, 2 wrong usage, 3 no row could be scored."""

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(epilog=_EXAMPLES)
def main() -> None:
    """Curate instruction-tuning data with the very LLM that is going to be fine-tuned (CLEAR)."""


@app.command(epilog=_EXAMPLES)
def score(
    src: options.Source,
    out: options.Out,
    model: options.Model,
    model_revision: options.ModelRevision = None,
    split: options.Split = None,
    config: options.Config = None,
    revision: options.Revision = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    prompt: options.Prompt = None,
    input: options.Input = None,
    context: options.Context = None,
    response: options.Response = None,
    system: options.System = None,
    samples: options.Samples = 5,
    math: options.Math = False,
    cache: options.Cache = True,
    replicas: options.Replicas = None,
    ray: options.Ray = None,
    shard: options.Shard = None,
    retry: options.Retry = False,
) -> None:
    """Add confidence columns to every row of SRC."""
    with clear_errors(2):
        check_out(out, src, results.shard_file(out) if shard else results.settings_file(out))
        results.check_no_audit(out)
        stages = options.stages(out, batch_size, replicas, ray, retry, shard)
    with clear_errors():
        rows = load(src, split, config, revision, limit)
        check_columns(rows, out)
        form = options.format_of(rows, prompt, response, input, context, system)
        clear = options.steps(model, model_revision, form, samples, math, cache=cache)
        scored = stages.score(rows, clear)
        results.forget(out)
        write(scored, out)
        if shard:
            merging.keep_shard(out, clear, stages, rows)
        else:
            results.keep_settings(out, clear, rows)
        summary(scored, out, clear, None)


@app.command(epilog=_EXAMPLES)
def curate(
    src: options.Source,
    out: options.Out,
    model: options.Model,
    keep: options.Keep = None,
    gamma: Annotated[float | None, typer.Option(min=0, max=1, help="A fixed threshold in place of --keep.")] = None,
    failed: Annotated[options.Failed, typer.Option(help="What becomes of rows without a score.")] = options.Failed.keep,
    model_revision: options.ModelRevision = None,
    split: options.Split = None,
    config: options.Config = None,
    revision: options.Revision = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    prompt: options.Prompt = None,
    input: options.Input = None,
    context: options.Context = None,
    response: options.Response = None,
    system: options.System = None,
    samples: options.Samples = 5,
    math: options.Math = False,
    cache: options.Cache = True,
    correct: options.Correct = False,
    writer: options.Writer = None,
    finetune: Annotated[
        bool, typer.Option("--finetune", help="Fine-tune MODEL to write them (the default without --writer).")
    ] = False,
    preference: options.Preference = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Preference above which a candidate replaces (default: 0.8).")
    ] = None,
    keep_agreed: Annotated[
        bool, typer.Option("--keep-agreed", help="Keep less confident rows whose target the writer repeats.")
    ] = False,
    rounds: options.Rounds = 1,
    replicas: options.Replicas = None,
    ray: options.Ray = None,
    scored: Annotated[bool, typer.Option("--scored", help="SRC has scores already, as merge has made it.")] = False,
    retry: options.Retry = False,
) -> None:
    """Keep the rows of SRC whose confidence is above a threshold.

    OUT has the kept rows in SRC's own columns. Every row with its scores and decision stands beside it, in
    OUT.audit.parquet. With --correct, MODEL is fine-tuned on the kept rows (into OUT.writer), and the other rows get
    its answer where MODEL itself is sure that it is better. A run that was broken off goes on from its last answer, or
    from the last checkpoint of fine-tuning.
    """
    from clear_datasets import curated, decide, threshold
    from clear_datasets.stages import train_writer

    with clear_errors(2):
        audit = results.audit_file(out)
        check_out(out, src, results.settings_file(out))
        check_out(audit, src)
        if not correct and (writer or finetune or keep_agreed or rounds > 1 or preference or eta is not None):
            raise ValueError("--writer, --finetune, --keep-agreed, --rounds, --preference and --eta go with --correct")
        if gamma is not None and keep is not None:
            raise ValueError(f"--gamma {gamma} is a threshold in place of --keep {keep}: give one of them")
        keep, eta = 0.5 if keep is None else keep, 0.8 if eta is None else eta
        _check_training(correct, writer)
        stages = options.stages(out, batch_size, replicas, ray, retry)
        if writer and (finetune or rounds > 1):
            raise ValueError("--finetune and each of --rounds train a writer: leave out --writer")
    with clear_errors():
        rows = load(src, split, config, revision, limit)
        check_columns(rows, out)
        form = options.format_of(rows, prompt, response, input, context, system)
        clear = options.steps(model, model_revision, form, samples, math, preference, cache=cache)
        if scored:
            results.check_scored_by(src, clear)
        whole = _with_scores(rows, src) if scored else stages.score(rows, clear)
        older = ("candidate", "agreed", "preference", "position_bias", "decision")  # of an audit as SRC
        whole = whole.remove_columns([c for c in whole.column_names if c in {f"clear_{name}" for name in older}])
        if all(whole["clear_error"][:]):
            results.forget(out)
            write(whole, audit)
            summary(whole, audit, clear, None)
        cut = threshold(whole, keep) if gamma is None else gamma
        decision = decide(cut, eta, agreed="keep" if keep_agreed else "drop", failed=failed.value)
        decided = whole.map(decision, batched=True)
        for number in range(rounds if correct else 0):
            folder = out.with_name(f"{out.name}.writer" + (f"{number + 1}" if rounds > 1 else ""))
            correcting = clear.with_writer(writer or folder, cut)
            if writer is None:
                train_writer(decided, correcting)
            decided = stages.correct(whole, correcting).map(decision, batched=True)
        own = [c for c in rows.column_names if not (scored and c in OURS)]
        results.forget(out)
        write(decided, audit)
        left = curated(decided, form).select_columns([c for c in own if c in decided.column_names])
        write(left, out)
        more = {"eta": eta, "keep_agreed": keep_agreed, "rounds": rounds} if correct else {}
        results.keep_settings(out, clear, rows, gamma=cut, failed=failed.value, **more)
        summary(decided, out, clear, cut)
        if not len(left):
            console.print(
                f"{out} has no rows, as no confidence is above {cut:.4f}: lower --gamma, or raise --keep", markup=False
            )


@app.command(epilog=_EXAMPLES)
def estimate(
    src: options.Source,
    model: options.Model,
    correct: options.Correct = False,
    writer: options.Writer = None,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Of the machine, in any currency.")] = None,
    probe: Annotated[int, typer.Option(min=2, help="Rows to run; on a GPU, let it have as many as a batch.")] = 50,
    keep: options.Keep = None,
    rounds: options.Rounds = 1,
    preference: options.Preference = None,
    model_revision: options.ModelRevision = None,
    split: options.Split = None,
    config: options.Config = None,
    revision: options.Revision = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = None,
    prompt: options.Prompt = None,
    input: options.Input = None,
    context: options.Context = None,
    response: options.Response = None,
    system: options.System = None,
    samples: options.Samples = 5,
    math: options.Math = False,
) -> None:
    """Say what `curate` will take: tokens, time and money, from a run on a few random rows of SRC."""
    from clear_datasets.estimate import estimate
    from clear_datasets.stages import usual_batch_size

    with clear_errors(2):
        if not correct and (writer or rounds > 1 or preference):
            raise ValueError("--writer, --rounds and --preference go with --correct")
        _check_training(correct, writer)
    with clear_errors():
        rows = load(src, split, config, revision, limit)
        form = options.format_of(rows, prompt, response, input, context, system)
        clear = options.steps(model, model_revision, form, samples, math, preference)
        clear = clear.with_writer(writer) if writer else clear
        console.print(f"running {min(probe, len(rows)):,} of {len(rows):,} rows")
        size = batch_size or usual_batch_size()
        share = 0.5 if keep is None else keep
        costs = estimate(rows, clear, correct=correct, keep=share, probe=probe, batch_size=size, rounds=rounds)
        cost_table(costs, len(rows), price_per_hour)


@app.command(epilog=_EXAMPLES)
def calibrate(
    src: options.Source,
    model: options.Model,
    page: Annotated[Path | None, typer.Option("--output", "-o", help="Write it as a page, too (.html).")] = None,
    rows: Annotated[int, typer.Option(min=20, help="How many rows of SRC to take.")] = 200,
    noise: Annotated[
        list[str] | None, typer.Option(help="swap, truncate, wrong_sentence, ...; may be given several times.")
    ] = None,
    fraction: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the rows to make wrong.")] = 0.2,
    model_revision: options.ModelRevision = None,
    split: options.Split = None,
    config: options.Config = None,
    revision: options.Revision = None,
    limit: options.Limit = None,
    prompt: options.Prompt = None,
    input: options.Input = None,
    context: options.Context = None,
    response: options.Response = None,
    system: options.System = None,
    samples: options.Samples = 5,
    math: options.Math = False,
    cache: options.Cache = True,
) -> None:
    """Say whether MODEL's confidence finds wrong targets in SRC, from rows that are made wrong on purpose."""
    from clear_datasets import report
    from clear_datasets.calibrate import NOISES, calibrate

    with clear_errors(2):
        if page is not None and (page.suffix not in (".html", ".htm") or not page.parent.is_dir()):
            raise ValueError(f"cannot write {page}: -o takes a page, like calibration.html, in a folder that is there")
        if page is not None and find_spec("vl_convert") is None:
            raise ImportError('-o needs vl-convert: pip install "clear-datasets[report]"')
    with clear_errors():
        found = load(src, split, config, revision, limit)
        form = options.format_of(found, prompt, response, input, context, system)
        clear = options.steps(model, model_revision, form, samples, math, cache=cache)
        console.print(f"running {min(rows, len(found)):,} of {len(found):,} rows")
        calibration = calibrate(clear, found, noise=noise or NOISES, fraction=fraction, rows=rows)
        calibration_tables(calibration)
        if page is not None:
            title = f"Calibration on {Path(src).name}"
            report(calibration.rows, page, calibration=calibration, format=form, title=title)
            console.print(f"wrote {page}")


app.command(epilog=_EXAMPLES)(results.report)
app.command(epilog=_EXAMPLES)(results.push)
app.command(epilog=_EXAMPLES)(merging.merge)
app.add_typer(cache_commands.app, name="cache")


def _check_training(correct: bool, writer: str | None) -> None:
    """Refuse to fine-tune without the packages for it, before rows are asked for.

    Raises:
        ImportError: One of them is not installed.
    """
    if correct and writer is None and not (find_spec("trl") and find_spec("peft")):
        raise ImportError('--correct fine-tunes MODEL, with trl and peft: pip install "clear-datasets[train]"')


def _with_scores(rows: Dataset, src: str) -> Dataset:
    if not {"clear_confidence", "clear_error"} <= {*rows.column_names}:
        raise ValueError(f"{src} has no scores: leave --scored out, or give what score or merge has written")
    return rows


if __name__ == "__main__":
    app()
