"""Answers that were paid for are not asked again: an engine that remembers what another one answered."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clear_datasets.engines import KINDS, Answers, Asks, Engine, Kind, PromptError, Queued
from clear_datasets.engines.store import Store

ASKING_REVISION = 3  # raised whenever an engine makes other tokens of equal messages
_WINDOW, _SECONDS = 256, 2.0  # answers, or seconds, after which what is known is written
_CUT = {None: b"?", False: b".", True: b"/"}  # first byte of a sample: whether it is cut off
_FLAGS = {byte: flag for flag, byte in _CUT.items()}

_STORES: dict[tuple[int, str], Store] = {}  # those of a parent process stay there, unused: SQLite files take no fork
_log = logging.getLogger("clear_datasets")


@dataclass
class Counts:
    """Answers that were asked of engines by this process, and those that were known."""

    asked: int = 0
    known: int = 0


COUNTS = Counts()


def cache_folder() -> Path:
    """Where answers are kept: ``CLEAR_CACHE``, else ``clear_datasets/answers`` beside the Hub's own cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("CLEAR_CACHE") or Path(HF_HOME) / "clear_datasets" / "answers")


def store_of(folder: str | os.PathLike[str] | None = None) -> Store:
    """The answers in a folder, "~" being the home, opened once a process."""
    key = os.getpid(), os.path.abspath(os.path.expanduser(folder or cache_folder()))
    if key not in _STORES:
        _STORES[key] = Store(Path(key[1]))
    return _STORES[key]


def close_stores() -> None:
    """Close the files of this process; the next answer opens them anew."""
    for key in [key for key in _STORES if key[0] == os.getpid()]:
        _STORES.pop(key).close()


@dataclass(frozen=True)
class Cached(Queued):
    """An engine whose answers are kept on disk, and asked only once.

    An answer is known by the engine's `identity` (model, its commit or the state of its files, what else changes what
    it says), the messages, the settings of the sampling, and the number of the sample: five samples are the first five
    of eight. Answers are written while the batch is under way, every two seconds or every 256 of them, so that a
    process that is killed loses these at most. What is refused is not kept.

    Args:
        engine: The one that is asked.
        folder: Of the file; see `cache_folder`.

    Examples:
        >>> from clear_datasets.engines.transformers import Transformers
        >>> Cached(Transformers("m")).engine.model
        'm'
    """

    engine: Engine
    folder: str | None = None

    @property
    def store(self) -> Store:
        """Where the answers are."""
        return store_of(self.folder)

    @property
    def reads(self) -> bool:  # type: ignore[override]
        """See `Engine.reads`."""
        return self.engine.reads

    @property
    def gpus(self) -> int:
        """See `Engine.gpus`."""
        return self.engine.gpus

    @property
    def identity(self) -> str:
        """See `Engine.identity`."""
        return self.engine.identity

    def with_writer(self, writer: str) -> Cached:
        """See `Engine.with_writer`."""
        return replace(self, engine=self.engine.with_writer(writer))

    def close(self) -> None:
        """See `Engine.close`."""
        self.engine.close()

    def answer(self, asks: Asks) -> Answers:
        """See `Engine.answer`: what is not known is asked, in one batch."""
        store = self.store
        batch = _Batch(asks, self.identity, store)
        if batch.missing:
            with _Keeping(store, batch) as keeping:
                try:
                    batch.take(self.engine.answer(replace(batch.left, tell=keeping.tell)), keeping.tell)
                except PromptError as error:
                    raise PromptError(batch.outer(error.reasons)) from None
        return batch.answers()

    def similar(
        self,
        identity: str,
        pairs: Sequence[tuple[str, str]],
        compare: Callable[[Sequence[tuple[str, str]]], Sequence[float]],
    ) -> list[float]:
        """How far two texts agree, by something dear; pairs that were compared before are known.

        Args:
            identity: What the comparison depends on.
            pairs: Texts.
            compare: Compares some of the pairs, at most 256 at a time.
        """
        store = self.store
        keys = [_key("similar", identity, list(pair)) for pair in pairs]
        known: dict[bytes, Any] = {key: _read(values[0])[0] for key, values in store.get(keys).items()}
        left = list({key: pair for key, pair in zip(keys, pairs, strict=True) if key not in known}.items())
        COUNTS.known += len(known)
        COUNTS.asked += len(left)
        for start in range(0, len(left), _WINDOW):
            part = left[start : start + _WINDOW]
            found = compare([pair for _, pair in part])
            known |= {key: value for (key, _), value in zip(part, found, strict=True)}
            store.put([(key, 0, _written([known[key]])) for key, _ in part])
        return [float(known[key]) for key in keys]


def cached(engine: Engine, cache: bool | str | os.PathLike[str] | None) -> Engine:
    """The engine with its answers kept: in a folder, in the usual one (None or True), or not at all (False)."""
    if cache is False:
        return engine
    return Cached(engine, None if cache is None or cache is True else os.fspath(cache))


@dataclass
class _Item:
    """Something that is asked: its kind, its position in its list, and how many answers it has, known ones included."""

    kind: Kind
    position: int
    key: bytes
    wanted: int = 1


class _Batch:
    """What is asked, what of it is known, and what is left to ask: each question once.

    Attributes:
        missing: What is left to ask.
        left: The same for the engine.
    """

    def __init__(self, asks: Asks, identity: str, store: Store) -> None:
        self.asks = asks
        self.items = [*_items(asks, identity)]
        self.values: dict[bytes, dict[int, Any]] = {
            key: {number: _read(value) for number, value in values.items()}
            for key, values in store.get(item.key for item in self.items).items()
        }
        each = {item.key: item for item in self.items}.values()
        self.missing = [item for item in each if self._known(item) < item.wanted or not item.wanted]
        asked = sum(item.wanted - self._known(item) for item in self.missing)
        known = sum(item.wanted for item in each) - asked
        if known and not COUNTS.known:
            _log.warning("%d of %d answers are known from %s, and not asked again", known, known + asked, store.path)
        COUNTS.known += known
        COUNTS.asked += asked
        written, weighed, read = ([i for i in self.missing if i.kind == kind] for kind in KINDS)
        limits = asks.limits
        self.left = replace(
            asks,
            generate=[asks.generate[i.position] for i in written],
            n=asks.distinct,
            max_tokens=[limits[i.position] for i in written],
            first=[self._known(i) for i in written],
            choose=[asks.choose[i.position] for i in weighed],
            read=[asks.read[i.position] for i in read],
        )
        self.missing = [*written, *weighed, *read]  # in the order of the engine's positions
        self.of_kind = {"generate": written, "choose": weighed, "read": read}

    def _known(self, item: _Item) -> int:
        """How many of its answers are known, from the first one on without a gap."""
        numbers = self.values.get(item.key, {})
        return next((n for n in range(item.wanted) if n not in numbers), item.wanted)

    def note(self, kind: Kind, position: int, value: Any) -> Iterator[tuple[bytes, int, bytes]]:
        """Take an answer of the engine's; gives what is to be stored."""
        item = self.of_kind[kind][position]
        known = self.values.setdefault(item.key, {})
        if self._known(item) == item.wanted:
            return  # it was told before
        values = list(zip(*value, strict=True)) if kind == "generate" else [value]
        for number, one in enumerate(values, start=self._known(item)):
            known[number] = one
            yield item.key, number, _written(one)

    def take(self, answers: Answers, tell: Callable[[Kind, int, Any], None]) -> None:
        """Take what the engine has not told on the way."""
        for position, texts in enumerate(answers.generated):
            tell("generate", position, (texts, answers.cut[position] if answers.cut else [None] * len(texts)))
        for position, row in enumerate(answers.chosen):
            tell("choose", position, row)
        for position, values in enumerate(answers.read):
            tell("read", position, values)

    def outer(self, reasons: dict[int, str]) -> dict[int, str]:
        """Reasons of the engine's positions as reasons of the positions that were asked."""
        refused = {self.missing[position].key: reason for position, reason in reasons.items()}
        return {i: refused[item.key] for i, item in enumerate(self.items) if item.key in refused}

    def answers(self) -> Answers:
        """All answers, in the order in which they were asked."""
        asks, of = self.asks, {kind: [self.values[i.key] for i in self.items if i.kind == kind] for kind in KINDS}
        drawn = [[values[n] for n in range(first, asks.distinct)] * asks.times
                 for values, first in zip(of["generate"], asks.firsts, strict=True)]  # fmt: skip
        knows = all(cut is not None for samples in drawn for _, cut in samples)
        chosen = np.array([values[0] for values in of["choose"]], dtype=np.float32)
        return Answers(
            [[text for text, _ in samples] for samples in drawn],
            chosen.reshape(len(asks.choose), len(asks.labels)),
            [values[0] for values in of["read"]],
            [[cut for _, cut in samples] for samples in drawn] if knows else [],
        )


class _Keeping:
    """Stores answers as they come; what ended the batch, the last of them are stored, too."""

    def __init__(self, store: Store, batch: _Batch) -> None:
        self.store, self.batch = store, batch
        self.items: list[tuple[bytes, int, bytes]] = []
        self.last = time.monotonic()
        self.lock = threading.Lock()  # a server's answers come in another thread

    def tell(self, kind: Kind, position: int, value: Any) -> None:
        """See `Asks.tell`."""
        with self.lock:
            self.items += self.batch.note(kind, position, value)
            if len(self.items) >= _WINDOW or time.monotonic() - self.last > _SECONDS:
                self._write()

    def _write(self) -> None:
        items, self.items, self.last = self.items, [], time.monotonic()
        self.store.put(items)

    def __enter__(self) -> _Keeping:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self.lock:
            self._write()
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            _log.warning("interrupted; all answers so far are kept: the same again asks for what is missing alone")


def _items(asks: Asks, identity: str) -> Iterator[_Item]:
    for i, (prompt, limit) in enumerate(zip(asks.generate, asks.limits, strict=True)):
        yield _Item(
            "generate", i, _key("generate", identity, list(prompt), float(asks.temperature), limit), asks.distinct
        )
    for i, prompt in enumerate(asks.choose):
        yield _Item("choose", i, _key("choose", identity, list(prompt), list(asks.labels)))
    for i, (prompt, response) in enumerate(asks.read):
        yield _Item("read", i, _key("read", identity, list(prompt), response))


def _key(*parts: Any) -> bytes:
    text = json.dumps([ASKING_REVISION, *parts], sort_keys=True)  # in ASCII, whatever the text
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _written(value: Any) -> bytes:
    """A sample and whether it is cut off, or numbers, as bytes that begin with what they are."""
    if isinstance(value, tuple):
        text, cut = value
        assert isinstance(text, str)
        return _CUT[None if cut is None else bool(cut)] + text.encode(errors="surrogatepass")
    return b"#" + np.asarray(value, dtype=np.float32).tobytes()


def _read(value: bytes) -> tuple[str, bool | None] | npt.NDArray[np.float32]:
    if value[:1] == b"#":
        return np.frombuffer(value[1:], dtype=np.float32).copy()
    return value[1:].decode(errors="surrogatepass"), _FLAGS[value[:1]]
