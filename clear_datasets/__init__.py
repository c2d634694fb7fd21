"""Curate instruction-tuning data with the very LLM that is going to be fine-tuned.

``ds.map(clear_datasets.score, batched=True)`` works as it stands: the module's `score`, `propose` and `prefer` are
those of a default `Clear()`.
"""

from __future__ import annotations

from typing import Any

from clear_datasets.adaptive import score_to_keep
from clear_datasets.apply import curated, restore
from clear_datasets.calibrate import calibrate
from clear_datasets.confidence import BSDetector
from clear_datasets.decide import above, decide, threshold
from clear_datasets.formats import Chat, Columns, Example
from clear_datasets.hub import push_to_hub
from clear_datasets.infer_format import infer
from clear_datasets.preference import ByConfidence, Pairwise
from clear_datasets.report import plot, report
from clear_datasets.similarity import LLM, NLI, Embedding, FinalAnswer, Jaccard
from clear_datasets.steps import Clear

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "NLI",
    "BSDetector",
    "ByConfidence",
    "Chat",
    "Clear",
    "Columns",
    "Embedding",
    "Example",
    "FinalAnswer",
    "Jaccard",
    "Pairwise",
    "above",
    "calibrate",
    "curated",
    "decide",
    "infer",
    "plot",
    "prefer",
    "propose",
    "push_to_hub",
    "report",
    "restore",
    "score",
    "score_to_keep",
    "threshold",
]


def __getattr__(name: str) -> Any:
    if name in ("score", "propose", "prefer", "close"):  # made when asked for, so that CLEAR_MODEL is read then
        return getattr(Clear(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
