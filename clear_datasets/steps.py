"""Clear: the steps that ``ds.map`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clear_datasets.confidence import BSDetector
from clear_datasets.engines import Engine, default_engine, use_rank
from clear_datasets.engines.checkpoint import stamp
from clear_datasets.formats import Example, Format, FormatError, infer

if TYPE_CHECKING:
    from datasets import Features

SCORES_REVISION = 3  # raised whenever equal settings give other scores than before; see CHANGELOG.md
DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"

_COLUMNS = ("clear_confidence", "clear_consistency", "clear_reflection")


@dataclass(frozen=True)
class Clear:
    """Curation of a dataset with the model that is going to be fine-tuned on it.

    Nothing is loaded before the first row is scored. The state is the configuration alone: equal ones hash equal in
    every process, so ``ds.map`` finds its cache, and different ones do not.

    Args:
        model: Hub id, local folder or ``.gguf`` file; ``CLEAR_MODEL``, else Qwen2.5-1.5B-Instruct by default.
        revision: Branch, tag or commit of a Hub model.
        engine: What runs the model; the default is chosen for the machine.
        format: Where rows keep prompt and target; inferred from the columns by default.
        confidence: The estimator.

    Example:
        >>> clear = Clear("Qwen/Qwen2.5-7B-Instruct", confidence=BSDetector(k=8))
        >>> clear.confidence.k
        8

    References:
        Chen and Mueller 2024, "Automated Data Curation for Robust Language Model Fine-Tuning", arXiv 2403.12776.
    """

    model: str = field(default_factory=lambda: os.environ.get("CLEAR_MODEL", DEFAULT_MODEL))
    revision: str | None = None
    engine: Engine | None = field(default=None, kw_only=True)
    format: Format | None = field(default=None, kw_only=True)
    confidence: BSDetector = field(default_factory=BSDetector, kw_only=True)
    scores_revision: int = field(default=SCORES_REVISION, init=False, repr=False)
    stamp: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        # Into the pickled state, so that caches made by an older revision of the scores are not taken for this one's.
        object.__setattr__(self, "scores_revision", SCORES_REVISION)
        object.__setattr__(self, "stamp", stamp(self.model))  # a model that was retrained in its place scores anew

    def score(self, batch: Mapping[str, list[Any]], rank: int | None = None) -> dict[str, Any]:
        """A step for ``ds.map(clear.score, batched=True)``: how confident the model is that each target is right.

        Args:
            batch: Columns of a batch of rows.
            rank: Number of the worker process, from ``with_rank=True``: GPU `rank` is used.

        Returns:
            The new columns: ``clear_confidence``, ``clear_consistency`` and ``clear_reflection``, float32 in [0, 1] or
            nan; ``clear_error``, why a row has no score ("" where it has one).

        Raises:
            FormatError: The columns are not known; see `infer`.
            TypeError: The step was called on a row: ``batched=True`` is missing.

        References:
            BSDetector: Chen and Mueller 2024, arXiv 2308.16175.
        """
        if rank is not None:
            use_rank(rank)
        rows = _rows(batch)
        examples, errors = self._read(rows)
        sound = [i for i, example in enumerate(examples) if example is not None]
        scores: dict[str, npt.NDArray[np.float32]] = {c: np.full(len(rows), np.nan, dtype=np.float32) for c in _COLUMNS}
        if sound:
            engine = self.engine or default_engine(self.model, self.revision)
            found = self.confidence([e for e in examples if e is not None], engine)
            for name, values in zip(_COLUMNS, (found.confidence, found.consistency, found.reflection), strict=True):
                scores[name][sound] = values
            for i, error in zip(sound, found.errors, strict=True):
                errors[i] = error
        return {**scores, "clear_error": errors}

    @staticmethod
    def features(features: Features) -> Features:
        """The schema that `score` leaves behind, for ``ds.map(clear.score, batched=True, features=...)``.

        Streams have no schema of their own after a map; with this they do.

        Example:
            >>> from datasets import Features, Value
            >>> Clear.features(Features({"question": Value("string")}))["clear_confidence"]
            Value('float32')
        """
        from datasets import Features, Value

        return Features({**features, **{name: Value("float32") for name in _COLUMNS}, "clear_error": Value("string")})

    def _read(self, rows: list[dict[str, Any]]) -> tuple[list[Example | None], list[str]]:
        examples: list[Example | None] = []
        errors = [""] * len(rows)
        # An empty chat does not show its keys: infer from a row that is full, if there is one.
        full = next((r for r in rows if all(v is not None and v != [] for v in r.values())), rows[0] if rows else {})
        form = (self.format or infer(full)) if rows else None
        for i, row in enumerate(rows):
            assert form is not None
            try:
                examples.append(form.read(row))
            except FormatError as error:
                examples.append(None)
                errors[i] = str(error)
        return examples, errors


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = {name: batch[name] for name in batch}
    for name, values in columns.items():
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise TypeError(f"column {name!r} holds one value, not a batch: use ds.map(clear.score, batched=True)")
    lists = {
        name: values.tolist() if isinstance(values, np.ndarray) else list(values) for name, values in columns.items()
    }
    size = len(next(iter(lists.values()), []))
    return [{name: values[i] for name, values in lists.items()} for i in range(size)]
