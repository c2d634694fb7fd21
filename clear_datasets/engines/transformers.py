"""The embedded default: any causal language model that `transformers` loads, on a CPU or a GPU."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import Answers, Asks, Engine, Messages
from clear_datasets.engines.checkpoint import Checkpoint, load
from clear_datasets.engines.labels import Labels

if TYPE_CHECKING:
    import torch

_MIN_SHARED = 16  # tokens; a shorter common beginning is not worth a pass of its own
_CPU_TOKENS, _GPU_TOKENS = 4096, 32768  # tokens in one forward pass
_LOGITS = 8  # a token whose logits are read weighs as much as this many that are not: the vocabulary is large
_DECODE = 8  # how many times that many tokens the sequences of one decoding batch may hold


@dataclass(frozen=True)
class Transformers(Engine):
    """Batched inference with `transformers`.

    Requests are sorted by length; a beginning that prompts share (a row's passage and question, say) is computed once;
    ``n`` samples of a prompt share its prefill. A sample is a function of its prompt, its number and ``seed``: other
    rows in the batch do not change it.

    Args:
        model: Hub id, local folder, or a ``.gguf`` file (converted once into the cache folder).
        revision: Branch, tag or commit of a Hub model.
        dtype: ``"auto"`` is bfloat16 where the hardware multiplies it fast, else float32.
        device: ``"cuda"``, ``"mps"`` or ``"cpu"``; by default the first of them that is there.
        batch_tokens: Tokens in one forward pass; by default 4,096 on a CPU and 32,768 on a GPU. A batch that does
            not fit the GPU's memory is halved until it does.
        seed: Where samples begin.
        trust_remote_code: Whether a Hub model may run its own code.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    batch_tokens: int | None = None
    seed: int = 0
    trust_remote_code: bool = False

    def generate(
        self, prompts: Sequence[Messages], *, n: int = 1, temperature: float = 0.0, max_tokens: int = 512
    ) -> list[list[str]]:
        """See `Engine.generate`."""
        return self.answer(Asks(prompts, n, temperature, max_tokens)).generated

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> npt.NDArray[np.float32]:
        """See `Engine.choose`."""
        return self.answer(Asks(choose=prompts, labels=labels)).chosen

    def logprobs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[npt.NDArray[np.float32]]:
        """See `Engine.logprobs`."""
        return self.answer(Asks(read=list(zip(prompts, responses, strict=True)))).read

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`: one queue, so that all that is asked about a row shares its beginning."""
        checkpoint = load(self)
        known = Labels(asks.labels, checkpoint.tokenizer)
        targets = [checkpoint.response(text) for _, text in asks.read]
        reserve = [asks.max_tokens] * len(asks.generate) + [known.depth] * len(asks.choose) + [len(t) for t in targets]
        encoded = iter(checkpoint.encode([*asks.generate, *asks.choose, *(p for p, _ in asks.read)], reserve))
        draws = asks.n if asks.temperature > 0 else 1  # at temperature 0 every sample is the same
        requests = [_Request(next(encoded), "generate", i, draws) for i in range(len(asks.generate))]
        for i in range(len(asks.choose)):
            ids = next(encoded)
            requests += [_Request([*ids, *stem], "choose", i, stem=stem) for stem in known.stems]
        requests += [_Request(next(encoded) + t, "read", i, tail=len(t)) for i, t in enumerate(targets)]
        masses = known.empty(len(asks.choose))
        answers = Answers(
            [[] for _ in asks.generate], np.empty(0, np.float32), [np.empty(0, np.float32) for _ in asks.read]
        )
        budget = self.batch_tokens or (_CPU_TOKENS if checkpoint.device.type == "cpu" else _GPU_TOKENS)
        for window in _windows(_runs(requests, checkpoint.shares_prefix), budget, asks.max_tokens):
            for request, result in _answer_window(window, checkpoint, asks, self.seed, budget):
                if request.kind == "generate":
                    answers.generated[request.position] = result * (asks.n // draws)
                elif request.kind == "choose":
                    known.add(masses, request.position, request.stem, result)
                else:
                    answers.read[request.position] = result
        answers.chosen = known.probabilities(masses)
        return answers


@dataclass(frozen=True)
class _Request:
    ids: list[int]
    kind: Literal["generate", "choose", "read"]
    position: int  # in the list of its kind
    draws: int = 0  # samples to draw
    stem: tuple[int, ...] = ()  # choose: the tokens of a label that `ids` ends with
    tail: int = 0  # read: how many of the last ids are the response


@dataclass
class _Run:
    """Requests whose first ``shared`` tokens are the same."""

    shared: int
    requests: list[_Request]


def _common(a: list[int], b: list[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: slices compare in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _runs(requests: list[_Request], share: bool) -> list[_Run]:
    """Group requests by their common beginning: neighbours in sorted order, cut where they share much less."""
    ordered = sorted(requests, key=lambda r: r.ids)
    common = [
        min(_common(a.ids, b.ids), len(a.ids) - a.tail - 1, len(b.ids) - b.tail - 1) for a, b in pairwise(ordered)
    ]
    runs: list[_Run] = []
    for i, request in enumerate(ordered):
        shared = common[i - 1] if i else 0
        beside = max(common[i - 2] if i > 1 else 0, common[i] if i < len(common) else 0)
        if share and shared >= _MIN_SHARED and 2 * shared >= beside:
            runs[-1].shared = min(runs[-1].shared, shared)
            runs[-1].requests.append(request)
        else:
            runs.append(_Run(len(request.ids) - request.tail - 1 if share else 0, [request]))
    return runs


def _windows(runs: list[_Run], budget: int, max_tokens: int) -> Iterator[list[_Run]]:
    """Split the runs, longest first, into windows that fit one forward pass and one decoding batch."""
    window: list[_Run] = []
    held = 0
    for run in sorted(runs, key=lambda r: (-r.shared, -max(len(q.ids) for q in r.requests))):
        holds = sum(q.draws * (len(q.ids) + max_tokens) for q in run.requests)
        if window and ((len(window) + 1) * max(window[0].shared, 1) > budget or held + holds > _DECODE * budget):
            yield window
            window, held = [], 0
        window.append(run)
        held += holds
    if window:
        yield window


def _chunks(
    rows: list[tuple[int, _Request, list[int]]], budget: int
) -> Iterator[list[tuple[int, _Request, list[int]]]]:
    """Split rows (run, request, tokens after the shared ones) into forward passes: like with like, little padding."""
    chunk: list[tuple[int, _Request, list[int]]] = []
    for row in sorted(rows, key=lambda r: (r[1].kind, r[1].tail, len(r[2]))):
        width = max(len(row[2]), len(chunk[-1][2]) if chunk else 0, _LOGITS * (row[1].tail + 1))
        if chunk and (row[1].kind != chunk[0][1].kind or (len(chunk) + 1) * width > budget):
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _answer_window(
    window: list[_Run], checkpoint: Checkpoint, asks: Asks, seed: int, budget: int
) -> Iterator[tuple[_Request, Any]]:
    """Results of a window; where a GPU has too little memory for it, those of its halves."""
    import torch

    try:
        with torch.inference_mode():
            yield from list(_forward_window(window, checkpoint, asks, seed, budget))
            return
    except torch.OutOfMemoryError:
        pieces = [_Run(run.shared, [q]) for run in window for q in run.requests] if len(window) == 1 else window
        if len(pieces) == 1:
            raise
    torch.cuda.empty_cache()
    for half in (pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]):
        yield from _answer_window(half, checkpoint, asks, seed, budget // 2)


def _forward_window(
    window: list[_Run], checkpoint: Checkpoint, asks: Asks, seed: int, budget: int
) -> Iterator[tuple[_Request, Any]]:
    import torch

    beginning = _State(checkpoint)
    if window[0].shared:
        beginning.forward([run.requests[0].ids[: run.shared] for run in window])
    for chunk in _chunks([(i, q, q.ids[r.shared :]) for i, r in enumerate(window) for q in r.requests], budget):
        state = beginning.select([i for i, _, _ in chunk])
        requests = [q for _, q, _ in chunk]
        logits = state.forward([tokens for _, _, tokens in chunk], keep=max(q.tail for q in requests) + 1)
        if requests[0].kind == "generate":
            yield from _decode(state, logits[:, -1], requests, asks, seed)
        elif requests[0].kind == "choose":
            yield from zip(requests, torch.softmax(logits[:, -1], dim=-1).cpu().numpy(), strict=True)
        else:
            for request, row in zip(requests, logits, strict=True):
                said = torch.tensor(request.ids[-request.tail :], device=row.device)
                logprobs = row[-request.tail - 1 : -1].log_softmax(-1).gather(1, said[:, None])[:, 0]
                yield request, logprobs.cpu().numpy()


def _decode(
    state: _State, logits: torch.Tensor, requests: list[_Request], asks: Asks, seed: int
) -> Iterator[tuple[_Request, list[str]]]:
    """Sample until every sequence has ended; sequences that have ended leave the batch."""
    import torch

    drawn = [(i, q, s) for i, q in enumerate(requests) for s in range(q.draws)]
    logits, state = logits[[i for i, _, _ in drawn]], state.select([i for i, _, _ in drawn])
    written: list[list[int]] = [[] for _ in drawn]
    uniform = np.stack([_uniform(q.ids, s, seed, asks.max_tokens) for _, q, s in drawn])
    alive = list(range(len(drawn)))
    for step in range(asks.max_tokens):
        tokens = _pick(logits, asks.temperature, torch.from_numpy(uniform[alive, step])).tolist()
        going = [i for i, token in enumerate(tokens) if token not in state.checkpoint.ends]
        for i in going:
            written[alive[i]].append(tokens[i])
        if not going or step + 1 == asks.max_tokens:
            break
        state = state.select(going)
        alive = [alive[i] for i in going]
        logits = state.forward([[tokens[i]] for i in going])[:, -1]
    texts = iter(state.checkpoint.tokenizer.batch_decode(written, skip_special_tokens=True))
    yield from ((q, [next(texts).strip() for _ in range(q.draws)]) for q in requests)


def _pick(logits: torch.Tensor, temperature: float, uniform: torch.Tensor) -> torch.Tensor:
    """Greedy at temperature 0, else the token at which the cumulative distribution passes `uniform`."""
    import torch

    if not temperature:
        return logits.argmax(-1)
    cumulative = torch.softmax(logits / temperature, dim=-1).cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class _State:
    """Sequences that a model has read so far: their keys and values, and which places hold padding."""

    def __init__(self, checkpoint: Checkpoint, cache: Any = None, mask: torch.Tensor | None = None) -> None:
        self.checkpoint, self.cache, self.mask = checkpoint, cache, mask

    def forward(self, rows: list[list[int]], keep: int = 1) -> torch.Tensor:
        """Read more tokens, padded on the left; float32 [rows, keep, vocabulary], the logits after the last ones."""
        import torch

        width = max(map(len, rows))
        device, pad = self.checkpoint.device, self.checkpoint.pad
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        before = 0 if self.mask is None else self.mask.sum(-1, keepdim=True)
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=-1)
        out = self.checkpoint.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=(before + mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        self.cache = out.past_key_values
        logits: torch.Tensor = out.logits[:, -keep:].float()
        return logits

    def select(self, rows: list[int]) -> _State:
        """The state of some sequences, each as often as it is named; this state stays as it is."""
        import torch

        if self.mask is None:
            return _State(self.checkpoint)
        index = torch.tensor(rows, device=self.checkpoint.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        if rows != list(range(len(self.mask))):
            cache.reorder_cache(index)  # makes new tensors, so that the layers of `self` keep theirs
        return _State(self.checkpoint, cache, self.mask[index])


def _uniform(ids: list[int], sample: int, seed: int, size: int) -> npt.NDArray[np.float32]:
    """Random numbers that belong to a prompt and a sample number, whatever the batch."""
    key = hashlib.blake2b(np.asarray([seed, sample, *ids], dtype=np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).random(size, dtype=np.float32)
