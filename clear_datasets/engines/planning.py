"""What is asked as requests, and which go into which forward pass: shared beginnings once, like with like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from clear_datasets.engines import Asks, Kind
from clear_datasets.engines.chats import Chats
from clear_datasets.engines.labels import Labels

_MIN_SHARED = 16  # tokens; a shorter common beginning is not worth a pass of its own
HELD = 8  # how many times the tokens of a forward pass the sequences of a window may hold while they are written
_ENOUGH = 8  # a forward pass of this part of the budget is fast; a larger one is not worth padding
_LOGITS = 8  # a token whose logits are read weighs as much as this many that are not: the vocabulary is large


@dataclass(frozen=True)
class Request:
    """Tokens to read, and what is wanted after them."""

    ids: list[int]
    kind: Kind
    position: int  # in the list of its kind
    draws: int = 0  # samples to draw
    first: int = 0  # number of the first of them
    room: int = 0  # tokens of a sample at most
    stem: tuple[int, ...] = ()  # choose: the tokens of a label that `ids` ends with
    tail: int = 0  # read: how many of the last ids are the response


def plan(asks: Asks, chats: Chats, spare: int = 0) -> tuple[list[Request], Labels]:
    """The requests that a batch of questions comes to, and the spellings of its labels.

    `spare` tokens are kept free behind each text that is read.

    Raises:
        PromptError: Some prompts cannot be answered; see `Engine.answer`.
    """
    known = Labels(asks.labels, chats.tokenizer)
    targets = [chats.response(text) for _, text in asks.read]
    limits = asks.limits
    reserve = limits + [known.depth] * len(asks.choose) + [len(t) + spare for t in targets]
    encoded = iter(chats.encode([*asks.generate, *asks.choose, *(p for p, _ in asks.read)], reserve))
    samples = enumerate(zip(asks.draws, asks.firsts, limits, strict=True))
    requests = [Request(next(encoded), "generate", i, *sample) for i, sample in samples]
    requests = [request for request in requests if request.draws]  # the others are asked only whether they could be
    for i in range(len(asks.choose)):
        ids = next(encoded)
        requests += [Request([*ids, *stem], "choose", i, stem=stem) for stem in known.stems]
    requests += [Request(next(encoded) + t, "read", i, tail=len(t)) for i, t in enumerate(targets)]
    return requests, known


@dataclass
class Run:
    """Requests whose first ``shared`` tokens are the same."""

    shared: int
    requests: list[Request]


def _common(a: list[int], b: list[int]) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: slices compare in C
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def group(requests: list[Request], share: bool) -> list[Run]:
    """Group requests by their common beginning: neighbours in sorted order, cut where they share much less."""
    ordered = sorted(requests, key=lambda r: r.ids)
    common = [
        min(_common(a.ids, b.ids), len(a.ids) - a.tail - 1, len(b.ids) - b.tail - 1) for a, b in pairwise(ordered)
    ]
    runs: list[Run] = []
    for i, request in enumerate(ordered):
        shared = common[i - 1] if i else 0
        beside = max(common[i - 2] if i > 1 else 0, common[i] if i < len(common) else 0)
        if share and shared >= _MIN_SHARED and 2 * shared >= beside:
            runs[-1].shared = min(runs[-1].shared, shared)
            runs[-1].requests.append(request)
        else:
            runs.append(Run(len(request.ids) - request.tail - 1 if share else 0, [request]))
    return runs


def _holds(request: Request) -> int:
    """Tokens whose keys and values a request holds while it is written."""
    return request.draws * (len(request.ids) + request.room)


def _parts(request: Request, most: int) -> Iterator[Request]:
    """A request in parts that hold at most so many tokens, or draw one sample each; numbers tell the samples."""
    draws = max(1, most // (len(request.ids) + request.room))
    if request.draws <= draws:  # none, of what is read
        yield request
        return
    for done in range(0, request.draws, draws):
        yield replace(request, first=request.first + done, draws=min(draws, request.draws - done))


def _pieces(run: Run, most: int) -> Iterator[Run]:
    """A run in parts that hold at most so many tokens: all prompts may share the beginning of the chat template."""
    part: list[Request] = []
    held = 0
    for request in (part for whole in run.requests for part in _parts(whole, most)):
        if part and held + _holds(request) > most:
            yield Run(run.shared, part)
            part, held = [], 0
        part.append(request)
        held += _holds(request)
    yield Run(run.shared, part)


def windows(runs: list[Run], budget: int) -> Iterator[list[Run]]:
    """Split the runs, longest first, into windows that fit one forward pass and one decoding batch."""
    window: list[Run] = []
    held = 0
    pieces = [piece for run in runs for piece in _pieces(run, HELD * budget)]
    for run in sorted(pieces, key=lambda r: (-r.shared, -max(len(q.ids) for q in r.requests))):
        holds = sum(map(_holds, run.requests))
        if window and (
            (len(window) + 1) * window[0].shared > budget
            or 2 * run.shared < window[0].shared
            or held + holds > HELD * budget
        ):
            yield window
            window, held = [], 0
        window.append(run)
        held += holds
    if window:
        yield window


def chunks(rows: list[tuple[int, Request, list[int]]], budget: int) -> Iterator[list[tuple[int, Request, list[int]]]]:
    """Split rows (run, request, tokens after the shared ones) into forward passes: like with like, little padding."""
    chunk: list[tuple[int, Request, list[int]]] = []
    widest = 0
    for row in sorted(rows, key=lambda r: (r[1].kind, r[1].tail // _LOGITS, len(r[2]))):
        width = max(len(row[2]), _LOGITS * (row[1].tail + 1))
        if chunk and (
            row[1].kind != chunk[0][1].kind
            or (len(chunk) + 1) * max(widest, width) > budget
            or (len(row[2]) != len(chunk[-1][2]) and len(chunk) * widest * _ENOUGH >= budget)
        ):
            yield chunk
            chunk, widest = [], 0
        chunk.append(row)
        widest = max(widest, width)
    if chunk:
        yield chunk
