"""Questions about many rows as one batch for the engine, and the answers by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from clear_datasets.engines import KINDS, Answers, Asks, Engine, PromptError


def ask(engine: Engine, errors: list[str], asks_of: Callable[[int], Asks]) -> dict[int, Answers]:
    """Ask about all rows without an error, in one batch; the answers by row. What is refused gets its reason.

    Args:
        engine: Whom to ask.
        errors: Why a row is not asked, "" for those that are; rows that are refused get their reason.
        asks_of: What is asked about a row; alike in all rows but for the prompts and their limits.
    """
    while left := [i for i, error in enumerate(errors) if not error]:
        batch = _Batch([asks_of(i) for i in left])
        try:
            return dict(zip(left, batch.split(engine.answer(batch.asks)), strict=True))
        except PromptError as error:
            for position, reason in error.reasons.items():
                for row in batch.owners[position]:
                    errors[left[row]] = reason or "the engine refuses this prompt, and gives no reason"
    return {}


class _Batch:
    """What is asked about all rows, each prompt once: as in BSDetector, its samples serve every response to it.

    Attributes:
        asks: For the engine.
        owners: The rows that each of its positions belongs to; of samples, those that want the longest.
    """

    def __init__(self, each: Sequence[Asks]) -> None:
        self.each = each
        joined: dict[str, Any] = {part: [p for asks in each for p in getattr(asks, part)] for part in KINDS}
        rows = {part: [i for i, asks in enumerate(each) for _ in getattr(asks, part)] for part in KINDS}
        limits = [limit for asks in each for limit in asks.limits]
        seen: dict[str, int] = {}
        self.place = [seen.setdefault(repr(p), len(seen)) for p in joined["generate"]]
        self.owners: list[list[int]] = [[] for _ in seen]
        longest = [0] * len(seen)  # long enough for each of its rows
        for i, place in enumerate(self.place):
            longest[place] = max(longest[place], limits[i])
        for i, place in enumerate(self.place):
            if limits[i] == longest[place]:  # whoever wants less may be answered without them
                self.owners[place].append(rows["generate"][i])
        self.owners += [[row] for part in KINDS[1:] for row in rows[part]]
        distinct = dict(zip(self.place, joined["generate"], strict=True))
        joined["generate"] = [distinct[place] for place in range(len(seen))]
        self.asks = replace(each[0], max_tokens=longest, **joined)

    def split(self, answers: Answers) -> list[Answers]:
        """The answers of each row, out of those to all of them."""
        generated = [answers.generated[place] for place in self.place]
        cut = [answers.cut[place] for place in self.place] if answers.cut else []
        ends = {part: list(accumulate((len(getattr(a, part)) for a in self.each), initial=0)) for part in KINDS}
        return [
            Answers(
                generated[ends["generate"][i] : ends["generate"][i + 1]],
                answers.chosen[ends["choose"][i] : ends["choose"][i + 1]],
                answers.read[ends["read"][i] : ends["read"][i + 1]],
                cut[ends["generate"][i] : ends["generate"][i + 1]],
            )
            for i in range(len(self.each))
        ]
