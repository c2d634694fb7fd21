"""Label probabilities from next-token probabilities, over every way a tokenizer spells a label, or from texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_MIN_MASS = 0.01  # labels that together hold less were not what the model wanted to say


class Labels:
    """The spellings of some labels in one tokenizer: ``"Yes"`` and ``" Yes"``, each one or more tokens.

    A spelling's probability is the product of its tokens' probabilities, each read after the tokens before it (its
    stem). A spelling that another label continues ("A" and "AB") counts without that continuation.
    """

    def __init__(self, labels: Sequence[str], tokenizer: Any) -> None:
        self.size = len(labels)
        spelled = [
            {tuple(tokenizer.encode(form, add_special_tokens=False)) for form in (label, " " + label)}
            for label in labels
        ]
        self._spellings = [(i, s) for i, forms in enumerate(spelled) for s in sorted(forms)]
        self.stems = sorted({s[:end] for _, s in self._spellings for end in range(len(s))})
        self.depth = max((len(s) for _, s in self._spellings), default=0)
        self._known = {
            s: i for i, s in enumerate(sorted({s[: e + 1] for _, s in self._spellings for e in range(len(s))}))
        }

    def empty(self, rows: int) -> npt.NDArray[np.float64]:
        """Room for the conditional probabilities of `rows` prompts."""
        return np.ones((rows, len(self._known)))

    @property
    def tokens(self) -> list[int]:
        """All tokens of the spellings."""
        return sorted({tokens[-1] for tokens in self._known})

    def after(self, stem: tuple[int, ...]) -> list[int]:
        """The tokens that may follow a stem."""
        return [tokens[-1] for tokens in self._known if tokens[:-1] == stem]

    def add(self, masses: npt.NDArray[np.float64], row: int, stem: tuple[int, ...], probabilities: Any) -> None:
        """Note the next token's probabilities, those of `tokens` at least, of a prompt followed by a stem."""
        for tokens, column in self._known.items():
            if tokens[:-1] == stem:
                masses[row, column] = probabilities[tokens[-1]]

    def probabilities(self, masses: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """float32 [rows, labels], renormalised; nan where the labels together have less than 1% of the mass."""
        joint = {
            s: np.prod([masses[:, self._known[s[: e + 1]]] for e in range(len(s))], axis=0) for _, s in self._spellings
        }
        totals = np.zeros((len(masses), self.size))
        for label, spelling in self._spellings:
            longer = {s for other, s in self._spellings if other != label and s[: len(spelling)] == spelling != s}
            totals[:, label] += np.clip(joint[spelling] - sum(joint[s] for s in longer), 0, None)
        mass = totals.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(mass >= _MIN_MASS, totals / mass, np.nan).astype(np.float32)


def shares(found: dict[str, float], labels: Sequence[str], whole: bool = True) -> list[float]:
    """Probabilities of labels out of those of tokens (whole) or of texts that begin with a label, renormalised."""
    totals = dict.fromkeys(labels, 0.0)
    for text, probability in found.items():
        said = text.strip()
        owners = [label for label in labels if (label.startswith(said) if whole else _begins(said, label))]
        exact = [label for label in owners if label == said]
        if said and len(exact or owners) == 1:  # a token that begins several labels tells nothing
            totals[(exact or owners)[0]] += probability
        elif owners and not whole:
            totals[max(owners, key=len)] += probability
    mass = sum(totals.values())
    return [total / mass if mass >= _MIN_MASS else float("nan") for total in totals.values()]


def _begins(text: str, label: str) -> bool:
    return re.match(re.escape(label) + r"(?!\w)", text) is not None  # "Answer: B" does not say "A"
