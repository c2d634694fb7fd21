"""Known noise, put into clean data: to measure how well a confidence finds it.

Every maker takes a dataset and gives a copy in which a share of the targets is wrong. Column ``noise`` names the
noise of a row ("" for untouched rows), column ``noise_original`` holds the target that was there. Equal seeds make
equal noise.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clear_datasets.apply import unformatted
from clear_datasets.batches import Batch
from clear_datasets.formats import Format
from clear_datasets.infer_format import RowOf, infer_dataset, without_media

if TYPE_CHECKING:
    from datasets import Dataset

# Gives the wrong targets that would do for a row, by its position; none means that the row cannot be made wrong.
_Wrong = Callable[[int], Sequence[str]]
_NUMBER = r"[0-9](?:[0-9.,]*[0-9])?"


def wrong_sentence(
    ds: Dataset, fraction: float = 0.2, seed: int = 0, *, context: str | None = None, format: Format | None = None
) -> Dataset:
    """Replace targets by a sentence of the row's own passage that does not hold the target (SQuAD-N and DROP-N).

    The sentence is longer than the answers it replaces: report how well length alone finds it.

    Args:
        ds: Clean rows.
        fraction: Share of all rows to make wrong, in [0, 1].
        seed: Seed of the choice of rows and sentences.
        context: Column of the passage; by default that of the format, else "context".
        format: How to read a row; inferred from the columns by default.

    Returns:
        The rows in their order, with the columns ``noise`` and ``noise_original``.

    Raises:
        ValueError: Fewer rows can be made wrong than are to be.

    Examples:
        >>> from datasets import Dataset
        >>> passage = "The river is long. It rises in the Alps. Nobody swims in it."
        >>> ds = Dataset.from_dict({"context": [passage], "question": ["Where does it rise?"], "answer": ["the Alps"]})
        >>> wrong_sentence(ds, fraction=1)[0]["answer"]
        'Nobody swims in it.'

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (experiments).
    """
    passages, targets = _passages(ds, context, format), _targets(ds, format)

    def wrong(i: int) -> list[str]:
        sentences = (s.strip() for s in re.split(r"(?<=[.!?])\s+", passages[i] or ""))
        return [s for s in sentences if len(s.split()) > 3 and _plain(targets[i]) not in _plain(s)]

    return _replace(ds, "wrong_sentence", wrong, fraction, seed, format)


def other_answer(
    ds: Dataset, fraction: float = 0.2, seed: int = 0, *, context: str | None = None, format: Format | None = None
) -> Dataset:
    """Replace targets by the target of another row on the same passage: right in form and length, wrong in content.

    Args:
        ds: Clean rows, some of which share a passage.
        fraction: Share of all rows to make wrong, in [0, 1].
        seed: Seed of the choice of rows and answers.
        context: Column of the passage; by default that of the format, else "context".
        format: How to read a row; inferred from the columns by default.

    Returns:
        The rows in their order, with the columns ``noise`` and ``noise_original``.

    Raises:
        ValueError: Fewer rows can be made wrong than are to be.
    """
    passages, targets = _passages(ds, context, format), _targets(ds, format)
    beside: dict[str, list[str]] = {}
    for passage, target in zip(passages, targets, strict=True):
        beside.setdefault(passage, []).append(target)

    def wrong(i: int) -> list[str]:
        mine = _plain(targets[i])
        return [t for t in beside[passages[i]] if _plain(t) not in mine and mine not in _plain(t)]

    return _replace(ds, "other_answer", wrong, fraction, seed, format)


def swap(ds: Dataset, fraction: float = 0.2, seed: int = 0, *, format: Format | None = None) -> Dataset:
    """Exchange targets between rows at random (Emails-N).

    Args:
        ds: Clean rows.
        fraction: Share of all rows to make wrong, in [0, 1].
        seed: Seed of the choice of rows and their partners.
        format: How to read a row; inferred from the columns by default.

    Returns:
        The rows in their order, with the columns ``noise`` and ``noise_original``.

    Raises:
        ValueError: Too few different targets to exchange.

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (experiments).
    """
    targets = _targets(ds, format)
    rows = random.Random(seed).sample(range(len(ds)), _wanted(ds, fraction))
    said: dict[str, str] = {}  # "No." for "no" would be no noise
    same = {target: said.setdefault(_plain(target) or target, target) for target in sorted({*targets})}
    counts = Counter(same[targets[i]] for i in rows)
    longest = max(counts.values(), default=0)
    if longest * 2 > len(rows):
        raise ValueError(f"{len(rows)} rows are to exchange targets but {longest} of them have the same one")
    # With equal targets side by side, a shift by the longest block of equals gives each row another target.
    places = {t: place for place, t in enumerate(random.Random(seed).sample(sorted(counts), len(counts)))}
    rows.sort(key=lambda i: places[same[targets[i]]])
    partner = {i: targets[rows[(p + longest) % len(rows)]] for p, i in enumerate(rows)}
    return _replace(ds, "swap", lambda i: [partner[i]] if i in partner else [], fraction, seed, format)


def truncate(ds: Dataset, fraction: float = 0.2, seed: int = 0, *, format: Format | None = None) -> Dataset:
    """Cut targets off at a word between a quarter and three quarters of their length.

    Args:
        ds: Clean rows; targets of fewer than four words are left alone.
        fraction: Share of all rows to make wrong, in [0, 1].
        seed: Seed of the choice of rows and places.
        format: How to read a row; inferred from the columns by default.

    Returns:
        The rows in their order, with the columns ``noise`` and ``noise_original``.

    Raises:
        ValueError: Fewer rows can be made wrong than are to be.
    """
    targets = _targets(ds, format)

    def wrong(i: int) -> list[str]:
        ends = [m.end() for m in re.finditer(r"\S+", targets[i])]
        if len(ends) < 4:
            return []
        return [targets[i][:end] for end in ends[len(ends) // 4 : 3 * len(ends) // 4]]

    return _replace(ds, "truncate", wrong, fraction, seed, format)


def corrupt_json(ds: Dataset, fraction: float = 0.2, seed: int = 0, *, format: Format | None = None) -> Dataset:
    """Break JSON targets: a bracket, a quote, a comma or a colon is missing, so that they no longer parse.

    Args:
        ds: Clean rows; targets that are not a JSON object or array are left alone.
        fraction: Share of all rows to make wrong, in [0, 1].
        seed: Seed of the choice of rows and characters.
        format: How to read a row; inferred from the columns by default.

    Returns:
        The rows in their order, with the columns ``noise`` and ``noise_original``.

    Raises:
        ValueError: Fewer rows can be made wrong than are to be.
    """
    targets = _targets(ds, format)

    def wrong(i: int) -> list[str]:
        if not isinstance(_parsed(targets[i]), dict | list):
            return []
        broken = (targets[i][: m.start()] + targets[i][m.end() :] for m in re.finditer(r'[{}\[\]",:]', targets[i]))
        return [b for b in broken if _parsed(b) is None]

    return _replace(ds, "corrupt_json", wrong, fraction, seed, format)


def wrong_number(ds: Dataset, fraction: float = 0.2, seed: int = 0, *, format: Format | None = None) -> Dataset:
    """Change a digit of the target's last number, wherever that number stands in it: a slip, as models make them.

    Args:
        ds: Clean rows; targets without a digit are left alone.
        fraction: Share of all rows to make wrong, in [0, 1].
        seed: Seed of the choice of rows and digits.
        format: How to read a row; inferred from the columns by default.

    Returns:
        The rows in their order, with the columns ``noise`` and ``noise_original``.

    Raises:
        ValueError: Fewer rows can be made wrong than are to be.

    Examples:
        >>> from datasets import Dataset
        >>> ds = Dataset.from_dict({"question": ["6 times 7?"], "answer": ["6 * 7 = 42. It is 42."]})
        >>> wrong_number(ds, fraction=1)[0]["answer"]
        '6 * 7 = 46. It is 46.'
    """
    targets = _targets(ds, format)

    def wrong(i: int) -> list[str]:
        pieces = re.split(f"({_NUMBER})", targets[i])  # every second one is a number
        if len(pieces) == 1:
            return []
        last = pieces[-2]
        others = [last[:p] + d + last[p + 1 :] for p, c in enumerate(last) for d in _digits(c, p == 0 < len(last) - 1)]
        return ["".join(other if piece == last else piece for piece in pieces) for other in others]

    return _replace(ds, "wrong_number", wrong, fraction, seed, format)


MAKERS = {m.__name__: m for m in (wrong_sentence, other_answer, swap, truncate, corrupt_json, wrong_number)}


def _targets(ds: Dataset, format: Format | None) -> list[str]:
    read = (format or infer_dataset(ds)).read
    return [read(row).response for row in without_media(ds)]


def _passages(ds: Dataset, context: str | None, format: Format | None) -> Sequence[str]:
    column = context or getattr(format or infer_dataset(ds), "context", None) or "context"
    passages: Sequence[str] = without_media(ds)[column]
    return passages


def _replace(ds: Dataset, name: str, wrong: _Wrong, fraction: float, seed: int, format: Format | None) -> Dataset:
    """Give a random share of the rows one of their wrong targets."""
    form, generator, wanted = format or infer_dataset(ds), random.Random(seed), _wanted(ds, fraction)
    chosen: dict[int, str] = {}
    for i in generator.sample(range(len(ds)), len(ds)):
        if len(chosen) == wanted:
            break
        if candidates := wrong(i):
            chosen[i] = generator.choice(candidates)
    if len(chosen) < wanted:
        raise ValueError(f"{wanted} of {len(ds)} rows are to get {name}, but only {len(chosen)} can: lower fraction")

    def write(batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        columns = Batch(batch)
        changes = {i: form.write(RowOf(columns, i), chosen[row]) for i, row in enumerate(rows) if row in chosen}
        names = [name if row in chosen else "" for row in rows]
        targets = [form.read(RowOf(columns, i)).response for i in range(len(rows))]
        return {**columns.replaced(changes), "noise": names, "noise_original": targets}

    def put(plain: Dataset) -> Dataset:
        return plain.map(write, batched=True, with_indices=True, load_from_cache_file=False)

    return unformatted(ds, put)


def _digits(old: str, leading: bool) -> str:
    """The digits that may stand for another one; none for what is no digit."""
    return "0123456789"[leading:].replace(old, "") if old in "0123456789" else ""


def _wanted(ds: Dataset, fraction: float) -> int:
    if "noise" in ds.column_names:
        raise ValueError("the dataset has a column 'noise' already: a second noise would hide which rows are right")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}, the share of rows to make wrong; expected a number from 0 to 1")
    return round(fraction * len(ds))


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def auroc(scores: Sequence[float], good: Sequence[bool]) -> float:
    """Probability that a good row scores higher than a bad one; ties count half. Rows with nan do not count.

    Examples:
        >>> auroc([0.9, 0.4, 0.6, 0.1], [True, True, False, False])
        0.75
    """
    import numpy as np

    values, kinds = np.asarray(scores, dtype=float), np.asarray(good, dtype=bool)
    kinds, values = kinds[~np.isnan(values)], values[~np.isnan(values)]
    right, wrong = values[kinds], np.sort(values[~kinds])
    if not len(right) or not len(wrong):
        return float("nan")
    below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")  # twice, ties once
    return float(below.mean() / (2 * len(wrong)))
