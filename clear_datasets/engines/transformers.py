"""The embedded default: any causal language model that `transformers` loads, on a CPU or a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, EngineError, PromptError, Queued
from clear_datasets.engines.checkpoint import Checkpoint, adapter_of, commit_of, load, short_of_memory, stamp, unload
from clear_datasets.engines.decoding import Draw, State, Writing, uniform
from clear_datasets.engines.planning import HELD, Request, Run, chunks, group, plan, windows

if TYPE_CHECKING:
    import torch

_CPU_TOKENS, _GPU_TOKENS = 4096, 32768  # tokens in one forward pass
_READ = 512  # tokens of a response whose logits are held at a time
_NO_NUMBERS = "the model's logits are not numbers: try dtype='float32'"  # float16 ends at 65,504
_REST, _JOINED = 4, 64  # samples wait until so many can be drawn together; the last quarter of them waits again


@dataclass(frozen=True)
class Transformers(Queued):
    """Batched inference with `transformers`.

    Requests are sorted by length; a beginning that prompts share (a row's passage and question, say) is computed once;
    ``n`` samples of a prompt share its prefill. A sample is a function of its prompt, its number and ``seed``: other
    rows in the batch do not change it.

    Args:
        model: Hub id, local folder, or a ``.gguf`` file (converted once into the cache folder).
        revision: Branch, tag or commit of a Hub model.
        dtype: ``"auto"`` is bfloat16 where the hardware multiplies it fast, else float32 on a CPU and float16 on
            other devices.
        device: ``"cuda"``, ``"mps"`` or ``"cpu"``; by default the first of them that is there.
        batch_tokens: Tokens in one forward pass; by default 4,096 on a CPU and 32,768 on a GPU. A batch that does
            not fit the GPU's memory is halved until it does.
        seed: Where samples begin.
        trust_remote_code: Whether a model may run the code that comes with it.
        adapter: A folder with a LoRA adapter that is merged into the model (needs `peft`).
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_tokens: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    adapter: str | None = None
    stamp: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        files = stamp(self.model) + ((stamp(self.adapter) or self.adapter) if self.adapter else "")
        object.__setattr__(self, "stamp", files)  # another engine once the files have changed

    @property
    def identity(self) -> str:
        """See `Engine.identity`."""
        commit = "" if os.path.exists(self.model) else commit_of(self.model, self.revision)
        own_code = ["its own code"] if self.trust_remote_code else []
        return repr(("Transformers", commit, self.stamp, self.dtype, self.seed, *own_code))

    def with_writer(self, writer: str) -> Transformers:
        """See `Engine.with_writer`; the weights are loaded a second time."""
        adapter = adapter_of(writer)
        return replace(self, adapter=adapter) if adapter else replace(self, model=writer, revision=None, adapter=None)

    def close(self) -> None:
        """See `Engine.close`."""
        unload(self)

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`: one queue, so that all that is asked about a row shares its beginning."""
        checkpoint = load(self)
        try:
            return self._answer(asks, checkpoint)
        except (MemoryError, RuntimeError) as error:
            if not short_of_memory(error):
                raise
            raise EngineError(
                f"there is too little memory for one request to {self.model}: free some, shorten the longest rows, or "
                "take a smaller model; what was answered is kept"
            ) from error

    def _answer(self, asks: Asks, checkpoint: Checkpoint) -> Answers:
        requests, known = plan(asks, checkpoint.chats)
        masses = known.empty(len(asks.choose))
        read = [np.empty(0, np.float32) for _ in asks.read]
        stems = [len(known.stems)] * len(asks.choose)  # to be read
        samples, broken = _Samples(asks, checkpoint), set[int]()
        behind = len(asks.generate) + len(asks.choose)
        waiting: list[Writing] = []
        budget = self.batch_tokens or (_CPU_TOKENS if checkpoint.device.type == "cpu" else _GPU_TOKENS)
        most = 2 * HELD * budget  # what two windows hold
        for window in windows(group(requests, checkpoint.shares_prefix), budget):
            for request, result in self._window(window, checkpoint, asks, known.tokens, budget):
                position = request.position
                if _is_broken(result):
                    broken.add(position + (behind if request.kind == "read" else len(asks.generate)))
                elif request.kind == "choose":
                    known.add(masses, position, request.stem, result)
                    stems[position] -= 1
                    if not stems[position]:
                        asks.tell("choose", position, known.probabilities(masses[position : position + 1])[0])
                elif request.kind == "read":
                    read[position] = result
                    asks.tell("read", position, result)
                else:
                    samples.add(result.draws)
                    if checkpoint.shares_prefix:
                        waiting.append(result)
                    else:
                        _finish(result, 0)
            full = sum(len(w.draws) * w.state.width for w in waiting) >= most
            if full or sum(len(w.draws) for w in waiting) >= _JOINED:
                waiting = _together(waiting, False, most)
            samples.tell(waiting)
        samples.tell(_together(waiting, True, most))
        if broken := broken | samples.broken:
            raise PromptError(dict.fromkeys(sorted(broken), _NO_NUMBERS))
        return Answers(samples.texts, known.probabilities(masses), read, samples.cut)

    def _window(
        self, window: list[Run], checkpoint: Checkpoint, asks: Asks, wanted: list[int], budget: int
    ) -> Iterator[tuple[Request, Any]]:
        """Results of a window; where a GPU has too little memory for it, those of its halves."""
        import torch

        try:
            with torch.inference_mode():
                yield from list(self._forward(window, checkpoint, asks, wanted, budget))
                return
        except torch.OutOfMemoryError:
            pieces = [Run(run.shared, [q]) for run in window for q in run.requests] if len(window) == 1 else window
            if len(pieces) == 1:
                raise
        torch.cuda.empty_cache()
        for half in (pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]):
            yield from self._window(half, checkpoint, asks, wanted, budget // 2)

    def _forward(
        self, window: list[Run], checkpoint: Checkpoint, asks: Asks, wanted: list[int], budget: int
    ) -> Iterator[tuple[Request, Any]]:
        """A `Writing`, next-token probabilities of the wanted, or the log-probabilities of a response, by kind."""
        import torch

        beginning = State(checkpoint)
        if window[0].shared:
            beginning.forward([run.requests[0].ids[: run.shared] for run in window])
        for chunk in chunks([(i, q, q.ids[r.shared :]) for i, r in enumerate(window) for q in r.requests], budget):
            state = beginning.select([i for i, _, _ in chunk])
            requests = [q for _, q, _ in chunk]
            if requests[0].tail > _READ and len(chunk) == 1:
                yield requests[0], _read(state, chunk[0][2], requests[0].tail)
                continue
            logits = state.forward([tokens for _, _, tokens in chunk], keep=max(q.tail for q in requests) + 1)
            if requests[0].kind == "generate":
                drawn = [(i, q, q.first + s) for i, q in enumerate(requests) for s in range(q.draws)]
                draws = [Draw(q.position, s, uniform(q.ids, s, self.seed, q.room)) for _, q, s in drawn]
                rows = [i for i, _, _ in drawn]
                yield requests[0], Writing(state.select(rows), draws, asks.temperature, logits[rows, -1])
            elif requests[0].kind == "choose":
                found = torch.softmax(logits[:, -1], dim=-1)[:, wanted].tolist()  # all the vocabulary would fill memory
                yield from ((q, dict(zip(wanted, row, strict=True))) for q, row in zip(requests, found, strict=True))
            else:
                for request, row in zip(requests, logits, strict=True):
                    yield request, _logprobs(row[-request.tail - 1 : -1], request.ids[-request.tail :])


class _Samples:
    """What was drawn, as texts, told as soon as all samples of a prompt are finished.

    Attributes:
        texts: [prompts][samples], in their order.
        cut: Whether they are cut off at their limit, likewise.
        broken: Positions of the prompts whose samples the model has no numbers for; they are not told.
    """

    def __init__(self, asks: Asks, checkpoint: Checkpoint) -> None:
        self.asks, self.tokenizer = asks, checkpoint.chats.tokenizer
        self.open: dict[int, list[Draw]] = {}
        self.draws = asks.draws
        self.broken: set[int] = set()
        self.texts: list[list[str]] = [[] for _ in asks.generate]
        self.cut: list[list[bool]] = [[] for _ in asks.generate]

    def add(self, draws: list[Draw]) -> None:
        """Note samples that are being drawn."""
        for draw in draws:
            self.open.setdefault(draw.position, []).append(draw)

    def tell(self, waiting: list[Writing]) -> None:
        """Take the texts of prompts whose samples are all drawn, and none among those that wait."""
        unfinished = {draw.position for writing in waiting for draw in writing.draws}
        for position in [p for p, d in self.open.items() if p not in unfinished and len(d) == self.draws[p]]:
            draws = sorted(self.open.pop(position), key=lambda draw: draw.number)
            if any(draw.broken for draw in draws):
                self.broken.add(position)
                continue
            texts = [self.tokenizer.decode(draw.tokens, skip_special_tokens=True).strip() for draw in draws]
            cut = [len(draw.tokens) == len(draw.uniform) for draw in draws]
            self.texts[position], self.cut[position] = texts * self.asks.times, cut * self.asks.times
            self.asks.tell("generate", position, (self.texts[position], self.cut[position]))


def _is_broken(result: Any) -> bool:
    """Whether what was found for a request holds what is no number; of samples it is known later."""
    values = list(result.values()) if isinstance(result, dict) else [] if isinstance(result, Writing) else result
    return bool(np.isnan(values).any())


def _logprobs(logits: torch.Tensor, said: list[int]) -> npt.NDArray[np.float32]:
    import torch

    wanted = torch.tensor(said, device=logits.device)[:, None]
    found: npt.NDArray[np.float32] = logits.log_softmax(-1).gather(1, wanted)[:, 0].cpu().numpy()
    return found


def _read(state: State, tokens: list[int], tail: int) -> npt.NDArray[np.float32]:
    """Log-probabilities of a long response, the last `tail` tokens, in pieces: all logits would fill the memory."""
    start = len(tokens) - tail - 1
    if start:
        state.forward([tokens[:start]])
    pieces = []
    for first in range(start, len(tokens) - 1, _READ):
        said = tokens[first + 1 : first + 1 + _READ]
        pieces.append(_logprobs(state.forward([tokens[first : first + len(said)]], keep=len(said))[0], said))
    return np.concatenate(pieces)


def _together(waiting: list[Writing], last: bool, most: int) -> list[Writing]:
    """Draw the samples of several forward passes in few batches, until few of them are left or none.

    A step is almost as slow for one sample as for many, and each window has a few long ones. No batch holds more than
    `most` tokens, padding included, unless one pass does.
    """
    import torch

    try:
        with torch.inference_mode():
            for writing in waiting:
                if writing.logits is not None:
                    writing.draw()
        groups = _alike([w for w in waiting if w.draws], most)
    except torch.OutOfMemoryError:
        groups, last = [[w] for w in waiting], True
    going = []
    for alike in groups:
        joined = None
        try:
            with torch.inference_mode():
                joined = Writing.join(alike) if len(alike) > 1 else alike[0]
        except torch.OutOfMemoryError:
            pass
        if joined is None:  # not in the handler: what it handles still holds the memory
            torch.cuda.empty_cache()
        for part in alike if joined is None else [joined]:
            _finish(part, 0 if last or joined is None else len(part.draws) // _REST)
            going += [part] if part.draws else []
    return going


def _alike(waiting: list[Writing], most: int) -> list[list[Writing]]:
    """Groups that hold at most so many tokens once they are padded to their longest."""
    groups: list[list[Writing]] = []
    for writing in sorted(waiting, key=lambda w: -w.state.width):
        if groups and sum(len(w.draws) for w in [*groups[-1], writing]) * groups[-1][0].state.width <= most:
            groups[-1].append(writing)
        else:
            groups.append([writing])
    return groups


def _finish(writing: Writing, until: int) -> None:
    import torch

    try:
        with torch.inference_mode():
            writing.write(until)
            return
    except torch.OutOfMemoryError:
        if len(writing.draws) < 2:
            raise
    torch.cuda.empty_cache()  # not in the handler: what it handles still holds the memory
    for half in writing.halves():
        _finish(half, 0)
    writing.draws = []
