"""What a run will take: all stages on a few rows, counted and timed."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.engines import Answers, Asks, Engine, Queued, default_engine
from clear_datasets.engines.chats import Chats, tokenizer_of
from clear_datasets.engines.checkpoint import loading, source_of

if TYPE_CHECKING:
    from datasets import Dataset

    from clear_datasets import Clear

_STEPS = 3  # of fine-tuning that are timed, beyond the first


@dataclass(frozen=True)
class Cost:
    """What a stage of a run takes.

    Attributes:
        stage: "score", "fine-tune", "propose" or "prefer".
        prompt_tokens: Tokens sent, or trained on; beginnings that prompts share are counted in each of them.
        written_tokens: Tokens sampled.
        seconds: Time, with the loading of the model.
    """

    stage: str
    prompt_tokens: int
    written_tokens: int
    seconds: float


def estimate(
    rows: Dataset,
    clear: Clear,
    *,
    correct: bool = False,
    keep: float = 0.5,
    probe: int = 50,
    batch_size: int = 64,
    rounds: int = 1,
) -> list[Cost]:
    """Run every stage on a few random rows, and extrapolate to all.

    With a writer (`Clear.with_writer`) its candidates are counted; without one, fine-tuning is, from a few steps of it.
    On a GPU a small probe does not fill the batches, so that the time is too long: let it have `batch_size` rows.

    Args:
        rows: All rows, in any format that `Clear.score` takes.
        clear: The steps. Tokens are counted by the tokenizer of its model: with a server, name the checkpoint that it
            serves, ``Clear("Qwen/Qwen2.5-7B-Instruct", engine=OpenAI(...))``.
        correct: Auto-Correct, too.
        keep: Share of the rows above the threshold.
        probe: How many rows to run.
        batch_size: Rows handed to the engine at a time.
        rounds: How often to write candidates; rows that later rounds train on beyond the kept ones are not counted.

    Returns:
        A cost for each stage.

    Raises:
        ValueError: None of the probe's rows can be scored.
        EngineError: There is no such model.
    """
    from clear_datasets import above, threshold

    sample = rows.with_format(None).shuffle(seed=0).select(range(min(probe, len(rows))))
    with loading(clear.model):
        chats = Chats.of(tokenizer_of(source_of(clear.model), clear.revision), sys.maxsize, None)
    engine = Metered(clear.engine or default_engine(os.fspath(clear.model), clear.revision), chats)
    base, scale = replace(clear, engine=engine, writer=None, cache=False), len(rows) / len(sample)

    def stage(name: str, step: Callable[..., Any], of: Dataset, used: Engine, times: int = 1) -> tuple[Dataset, Cost]:
        started = time.monotonic()
        used.generate([[{"role": "user", "content": "Hello"}]], max_tokens=1)
        loading, before = time.monotonic() - started, tuple(engine.tokens)
        started = time.monotonic()
        done = of.map(
            step, batched=True, batch_size=batch_size, keep_in_memory=True, load_from_cache_file=False,
            new_fingerprint=name,
        )  # fmt: skip
        seconds = loading + scale * (time.monotonic() - started)
        read, written = (round(times * scale * (now - b)) for now, b in zip(engine.tokens, before, strict=True))
        return done, Cost(name, read, written, times * seconds)

    scored, cost = stage("score", base.score, sample, engine)
    costs = [cost]
    if not correct:
        return costs
    with tempfile.TemporaryDirectory() as folder:
        gamma, writer = threshold(scored, keep), clear.writer
        if writer is None:
            writer = str(Path(folder) / "writer")
            sound, kept = (scored.filter(above(cut, failed="drop")) for cut in (-1, gamma))
            kept = (kept if len(kept) else sound).select_columns(rows.column_names)  # a small share may have none here
            costs.append(_tuning(kept, clear, chats, round(keep * scale * len(sound)), writer, rounds))
        proposing = base.with_writer(writer, gamma)
        proposed, cost = stage("propose", proposing.propose, scored, engine.with_writer(writer), rounds)
        _, judging = stage("prefer", base.prefer, proposed, engine, rounds)
        return [*costs, cost, judging]


def _tuning(kept: Dataset, clear: Clear, chats: Chats, training: int, writer: str, rounds: int) -> Cost:
    """The cost of fine-tuning on as many rows like the kept ones, by that of a few steps."""
    from clear_datasets.finetune import BATCH, EPOCHS, finetune
    from clear_datasets.infer_format import of_each, without_media

    whole = kept.select([i % len(kept) for i in range(max(len(kept), BATCH * (1 + _STEPS)))])  # no batch is short
    model: dict[str, Any] = {"revision": clear.revision, "format": clear.format, "save_strategy": "no"}
    seconds = []
    for steps, out in ((1, writer + "1"), (1 + _STEPS, writer)):
        started = time.monotonic()
        with redirect_stdout(sys.stderr):  # where the trainer's figures belong
            finetune(whole, clear.model, out, max_steps=steps, **model)
        seconds.append(time.monotonic() - started)
    step = (seconds[1] - seconds[0]) / _STEPS
    rows = without_media(kept)
    form_of = of_each(clear.format, rows)
    examples = [form_of(row).read(row) for row in rows]
    tokens = sum(map(len, chats.encode([e.prompt for e in examples], [0] * len(examples))))
    tokens += sum(len(chats.response(e.response)) for e in examples)
    every, scale = EPOCHS * math.ceil(training / BATCH), training / len(kept)
    return Cost("fine-tune", round(rounds * EPOCHS * scale * tokens), 0, rounds * (seconds[0] + (every - 1) * step))


class Metered(Queued):
    """An engine that counts its tokens.

    Attributes:
        tokens: Of prompts and of answers so far.
    """

    def __init__(self, engine: Engine, chats: Chats, tokens: list[int] | None = None) -> None:
        self.engine, self.chats, self.tokens = engine, chats, [0, 0] if tokens is None else tokens

    @property
    def reads(self) -> bool:  # type: ignore[override]
        """See `Engine.reads`."""
        return self.engine.reads

    def with_writer(self, writer: str) -> Metered:
        """See `Engine.with_writer`; counts into the same tokens."""
        return Metered(self.engine.with_writer(writer), self.chats, self.tokens)

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`."""
        answers = self.engine.answer(asks)
        # A prompt of which nothing is drawn is not read.
        written = [prompt for prompt, draws in zip(asks.generate, asks.draws, strict=True) if draws]
        prompts = [*written, *asks.choose, *(p for p, _ in asks.read)]
        self.tokens[0] += sum(map(len, self.chats.encode(prompts, [0] * len(prompts))))
        self.tokens[0] += sum(len(self.chats.response(r)) for _, r in asks.read)
        self.tokens[1] += sum(len(self.chats.response(text)) for texts in answers.generated for text in texts)
        return answers
