"""The embedded default: any causal language model that `transformers` loads, on a CPU or a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, EngineError, PromptError, Queued
from clear_datasets.engines.checkpoint import Checkpoint, adapter_of, commit_of, load, short_of_memory, stamp, unload
from clear_datasets.engines.decoding import Draw, State, Writing, uniform
from clear_datasets.engines.labels import Labels
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
        batch_tokens: Tokens in one forward pass; by default 4,096 on a CPU and 32,768 on a GPU. Where the GPU's memory
            runs short, what is under way begins anew in batches of half the size, which grow again in later calls.
        seed: Where samples begin.
        trust_remote_code: Whether a model may run the code that comes with it.
        adapter: A folder with a LoRA adapter that is merged into the model (needs `peft`).
    """

    model: str | os.PathLike[str]
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_tokens: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    adapter: str | None = None
    stamp: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        model, adapter = os.fspath(self.model), None if self.adapter is None else os.fspath(self.adapter)
        files = stamp(model) + ((stamp(adapter) or adapter) if adapter else "")  # another engine once they have changed
        for name, value in {"model": model, "adapter": adapter, "stamp": files}.items():
            object.__setattr__(self, name, value)

    @property
    def identity(self) -> str:
        """See `Engine.identity`."""
        commit = "" if os.path.exists(self.model) else commit_of(os.fspath(self.model), self.revision)
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
                f"there is too little memory for one request to {self.model}: free some, set a smaller batch_tokens "
                "(on CUDA it was halved down to one sequence), shorten the longest rows, or take a smaller model; what "
                "was answered is kept"
            ) from error

    def _answer(self, asks: Asks, checkpoint: Checkpoint) -> Answers:
        import torch

        requests, known = plan(asks, checkpoint.chats)
        found, share = _Found(asks, checkpoint, known), checkpoint.shares_prefix
        usual = self.batch_tokens or (_CPU_TOKENS if checkpoint.device.type == "cpu" else _GPU_TOKENS)
        budget = start = usual if checkpoint.budget is None else checkpoint.budget
        rest = list(windows(group(requests, share), budget))
        while rest or found.waiting:
            last, short = not rest, False
            window = [] if last else rest.pop(0)
            try:
                with torch.inference_mode():
                    found.take(list(self._window(window, checkpoint, asks, known.tokens, budget)))
                    window = []
                    found.draw(2 * HELD * budget, last)  # what two windows hold
            except torch.OutOfMemoryError:
                if not budget:  # it was one sequence alone
                    checkpoint.budget = None  # there may be more memory next time
                    raise
                short = True
            if short:  # not in the handler: what it handles still holds the memory
                warnings.warn(f"{checkpoint.device} ran short of memory: smaller batches for a while", stacklevel=2)
                again = group(found.restart(), share)
                torch.cuda.empty_cache()
                budget = checkpoint.budget = budget // 2
                rest = list(windows([*window, *chain.from_iterable(rest), *again], budget))
            found.tell()
        if budget == start:  # nothing was short: it may have been one long row, or another program
            checkpoint.budget = None if 2 * budget >= usual else 2 * budget or 1
        return found.answers()

    def _window(
        self, window: list[Run], checkpoint: Checkpoint, asks: Asks, wanted: list[int], budget: int
    ) -> Iterator[tuple[Request, Any]]:
        """A `Writing`, next-token probabilities of the wanted, or the log-probabilities of a response, by kind."""
        import torch

        beginning = State(checkpoint)
        if window and window[0].shared:
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
                draws = [Draw(q, s, uniform(q.ids, s, self.seed, q.room)) for _, q, s in drawn]
                rows = [i for i, _, _ in drawn]
                state.take(rows)
                yield requests[0], Writing(state, draws, asks.temperature, logits[rows, -1])
            elif requests[0].kind == "choose":
                found = torch.softmax(logits[:, -1], dim=-1)[:, wanted].tolist()  # all the vocabulary would fill memory
                yield from ((q, dict(zip(wanted, row, strict=True))) for q, row in zip(requests, found, strict=True))
            else:
                for request, row in zip(requests, logits, strict=True):
                    yield request, _logprobs(row[-request.tail - 1 : -1], request.ids[-request.tail :])


class _Found:
    """What is known of a batch, told as soon as it is; the samples of a prompt once all of them are drawn.

    Attributes:
        waiting: Samples that are under way.
    """

    def __init__(self, asks: Asks, checkpoint: Checkpoint, known: Labels) -> None:
        self.asks, self.checkpoint, self.known = asks, checkpoint, known
        self.masses = known.empty(len(asks.choose))
        self.stems = [len(known.stems)] * len(asks.choose)  # to be read
        self.read = [np.empty(0, np.float32) for _ in asks.read]
        self.open: dict[int, dict[int, Draw]] = {}  # by prompt and number
        self.draws = asks.draws
        self.texts: list[list[str]] = [[] for _ in asks.generate]
        self.cut: list[list[bool]] = [[] for _ in asks.generate]
        self.broken: set[int] = set()
        self.waiting: list[Writing] = []

    def take(self, results: list[tuple[Request, Any]]) -> None:
        """Note what a window gave."""
        before = len(self.asks.generate)
        for request, result in results:
            position = request.position
            if isinstance(result, Writing):
                self.waiting.append(result)
                for draw in result.draws:
                    self.open.setdefault(draw.request.position, {})[draw.number] = draw
            elif _is_broken(result):
                self.broken.add(position + before + (len(self.asks.choose) if request.kind == "read" else 0))
            elif request.kind == "choose":
                self.known.add(self.masses, position, request.stem, result)
                self.stems[position] -= 1
                if not self.stems[position]:
                    [shares] = self.known.probabilities(self.masses[position : position + 1])
                    self.asks.tell("choose", position, shares)
            else:
                self.read[position] = result
                self.asks.tell("read", position, result)

    def draw(self, most: int, last: bool) -> None:
        """Draw the samples that wait, once there are enough or they are the last."""
        if not self.checkpoint.shares_prefix:
            for writing in self.waiting:
                writing.write()
            self.waiting = []
            return
        full = sum(len(w.draws) * w.state.width for w in self.waiting) >= most
        if last or full or sum(len(w.draws) for w in self.waiting) >= _JOINED:
            self.waiting = _together(self.waiting, last, most)

    def restart(self) -> list[Request]:
        """Give up the samples that are under way, and their memory; what asks for them anew.

        Nothing is rescued: layers may be half changed by then, and a copy would take the memory that is lacking.
        """
        self.waiting = []
        undone = [draw for draws in self.open.values() for draw in draws.values() if not draw.done]
        for draw in undone:
            del self.open[draw.request.position][draw.number]
        return [replace(draw.request, first=draw.number, draws=1) for draw in undone]

    def tell(self) -> None:
        """Take the texts of prompts whose samples are all drawn."""
        whole = [p for p, d in self.open.items() if len(d) == self.draws[p] and all(x.done for x in d.values())]
        tokenizer = self.checkpoint.chats.tokenizer
        for position in whole:
            draws = [draw for _, draw in sorted(self.open.pop(position).items())]
            if any(draw.broken for draw in draws):
                self.broken.add(position)
                continue
            texts = [tokenizer.decode(draw.tokens, skip_special_tokens=True).strip() for draw in draws]
            cut = [len(draw.tokens) == len(draw.uniform) for draw in draws]
            self.texts[position], self.cut[position] = texts * self.asks.times, cut * self.asks.times
            self.asks.tell("generate", position, (self.texts[position], self.cut[position]))

    def answers(self) -> Answers:
        """All of it.

        Raises:
            PromptError: The model has no numbers for some prompts; their samples were not told.
        """
        if self.broken:
            raise PromptError(dict.fromkeys(sorted(self.broken), _NO_NUMBERS))
        return Answers(self.texts, self.known.probabilities(self.masses), self.read, self.cut)


def _is_broken(result: Any) -> bool:
    return bool(np.isnan(list(result.values()) if isinstance(result, dict) else result).any())


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
    for writing in waiting:
        if writing.logits is not None:
            writing.draw()
    going = []
    for alike in _alike([w for w in waiting if w.draws], most):
        joined = Writing.join(alike) if len(alike) > 1 else alike[0]
        joined.write(0 if last else len(joined.draws) // _REST)
        going += [joined] if joined.draws else []
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
