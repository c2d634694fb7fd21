"""Clear: the steps that ``ds.map`` takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clear_datasets import prompts
from clear_datasets.adaptive import Adaptive, Bounded
from clear_datasets.apply import OURS
from clear_datasets.asking import ask
from clear_datasets.batches import Batch, beside
from clear_datasets.confidence import BSDetector, Estimator
from clear_datasets.decide import BOUNDS
from clear_datasets.encoders import close_encoders
from clear_datasets.engines import Asks, Engine, default_engine, use_rank
from clear_datasets.engines.cache import cached
from clear_datasets.engines.checkpoint import commit_of, stamp
from clear_datasets.formats import Example, Format, FormatError
from clear_datasets.infer_format import RowOf, of_each
from clear_datasets.preference import ByConfidence, Preference

if TYPE_CHECKING:
    from datasets import Features

SCORES_REVISION = 7  # raised whenever equal settings give other scores than before; see CHANGELOG.md
DEFAULT_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"

CANDIDATES_REVISION = 6  # the same of candidates
PREFERENCES_REVISION = 3  # and of preferences
_CANDIDATE = 256  # tokens of a candidate at least, before it is cut off
_COLUMNS = ("clear_confidence", "clear_consistency", "clear_reflection")
_JUDGED = ("clear_preference", "clear_position_bias")


@dataclass(frozen=True)
class Clear:
    """Curation of a dataset with the model that is going to be fine-tuned on it.

    Nothing is loaded before the first row is scored. The state is the configuration alone: equal ones hash equal in
    every process, so ``ds.map`` finds its cache, and different ones do not.

    Args:
        model: Hub id, local folder or ``.gguf`` file; by default that of the engine, else ``CLEAR_MODEL``, else
            Qwen2.5-1.5B-Instruct. Beside an engine it is what is fine-tuned, and whose tokens are counted: for a
            server, the checkpoint that it serves.
        revision: Branch, tag or commit of a Hub model.
        engine: What runs the model; the default is chosen for the machine.
        format: Where rows keep prompt and target; inferred from the columns by default.
        confidence: The estimator.
        preference: Which of two responses is better; by default `ByConfidence` with the estimator of `confidence`.
        writer: A LoRA adapter or a checkpoint that writes candidates; see `with_writer`.
        gamma: The confidence at or below which rows get a candidate; None for all.
        adaptive: Whether `score` stops sampling a row once its decision at gamma is sure; needs gamma, see
            `score_to_keep` for one that is not known yet.
        cache: Folder of the answers that were paid for, which no run asks again: by default ``CLEAR_CACHE``, else
            ``clear_datasets/answers`` beside the Hub's own cache. False keeps none.

    Examples:
        >>> clear = Clear("Qwen/Qwen2.5-7B-Instruct", confidence=BSDetector(k=8))
        >>> clear.confidence == BSDetector(k=8)
        True

    References:
        Chen and Mueller 2024, "Automated Data Curation for Robust Language Model Fine-Tuning", arXiv 2403.12776.
    """

    model: str | os.PathLike[str] = field(default=None)  # type: ignore[assignment]  # that of the engine, if it has one
    revision: str | None = None
    engine: Engine | None = field(default=None, kw_only=True)
    format: Format | None = field(default=None, kw_only=True)
    confidence: Estimator = field(default_factory=BSDetector, kw_only=True)
    preference: Preference | None = field(default=None, kw_only=True)
    writer: str | None = field(default=None, kw_only=True)
    gamma: float | None = field(default=None, kw_only=True)
    adaptive: bool = field(default=False, kw_only=True)
    cache: bool | str | os.PathLike[str] | None = field(default=None, kw_only=True, compare=False)
    scores_revision: int = field(default=SCORES_REVISION, init=False, repr=False)

    def __post_init__(self) -> None:
        # Into the pickled state, so that caches made by an older revision of the scores are not taken for this one's.
        own: dict[str, Any] = {"scores_revision": SCORES_REVISION}
        if self.model is None:
            own["model"] = os.environ.get("CLEAR_MODEL", DEFAULT_MODEL)
            if isinstance(model := getattr(self.engine, "model", None), str):
                own |= {"model": model, "revision": self.revision or getattr(self.engine, "revision", None)}
        paths = {name: getattr(self, name) for name in ("model", "writer", "cache")}
        own |= {name: os.fspath(path) for name, path in paths.items() if isinstance(path, os.PathLike)}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        model = self.engine.identity if self.engine else self._state_of(os.fspath(self.model), self.revision)
        own: dict[str, Any] = {"stamp": model, "writer_stamp": ""}
        if self.writer:  # the scores of others stay, whatever becomes of candidates
            revisions = (CANDIDATES_REVISION, PREFERENCES_REVISION)
            own = {**own, "writer_stamp": self._state_of(self.writer, None), "revisions": revisions}
        return {**self.__dict__, **own}  # a model that was retrained in its place scores anew

    def _state_of(self, model: str, revision: str | None) -> str:
        """The state of a model's files, or its commit on the Hub where it is not what a server calls it."""
        loads = self.engine is None or hasattr(self.engine, "adapter")
        return stamp(model) or (commit_of(model, revision) if loads else "")

    def with_writer(self, writer: str | os.PathLike[str], gamma: float | None = None) -> Clear:
        """The same, with a model that writes candidates: this one, fine-tuned on the rows that were kept.

        Args:
            writer: A LoRA adapter or a checkpoint, as a local folder or Hub id; a server's name for it with `OpenAI`.
            gamma: Rows whose confidence is at or below it get a candidate; by default as here, where None is all rows.

        Examples:
            >>> Clear("m").with_writer("out/adapter", gamma=0.4).writer
            'out/adapter'
        """
        return replace(self, writer=os.fspath(writer), gamma=self.gamma if gamma is None else gamma)

    @property
    def judge(self) -> Preference:
        """The preference, or that by default."""
        return self.preference or ByConfidence(self.confidence)

    def score(self, batch: Any, rank: int | None = None) -> Any:
        """A step for ``ds.map(clear.score, batched=True)``: how confident the model is that each target is right.

        Args:
            batch: Columns of a batch of rows, in any format of a dataset but those of pandas and polars.
            rank: Number of the worker process, from ``with_rank=True``: its share of the GPUs is used.

        Returns:
            The new columns, or the table with them where the dataset's format is Arrow: ``clear_confidence``,
            ``clear_consistency`` and ``clear_reflection``, float32 in [0, 1] or nan; ``clear_error``, why a row has no
            score ("" where it has one). Of adaptive sampling also ``clear_least`` and ``clear_most``, what the
            confidence may be after all samples, and ``clear_drawn``, int32, how many were drawn. Candidates and
            preferences of an earlier run are blank after it: `propose` and `prefer` again ask nothing that is known.

        Raises:
            FormatError: The columns are not known; see `infer`.
            TypeError: The step was called on a row (``batched=True`` is missing), on a DataFrame, or by a map with
                ``input_columns`` or ``with_indices``.
            ValueError: Samples are to be adaptive, and there is no gamma.

        References:
            BSDetector: Chen and Mueller 2024, arXiv 2308.16175.
        """
        columns, estimator = _columns_of(batch), self._estimator()
        examples, errors = self._read(columns)
        sound = [i for i, example in enumerate(examples) if example is not None]
        bounded = isinstance(estimator, Adaptive) or BOUNDS[0] in columns  # those of an earlier run are of no use now
        names = (*_COLUMNS, *BOUNDS) if bounded else _COLUMNS
        scores = {name: np.full(len(errors), np.nan, dtype=np.float32) for name in names}
        drawn = np.zeros(len(errors), dtype=np.int32)
        if sound:
            known = {"earlier": Bounded.earlier(columns, sound)} if getattr(estimator, "onwards", False) else {}
            found = estimator([e for e in examples if e is not None], self._base(rank), **known)
            for name in names:
                scores[name][sound] = getattr(found, name.removeprefix("clear_"), found.confidence)
            for i, error in zip(sound, found.errors, strict=True):
                errors[i] = error
            if bounded:
                drawn[sound] = getattr(found, "drawn", getattr(estimator, "k", 0))
        old = {name: values for name, values in _blank(len(errors)).items() if name in columns}  # of other scores
        added = {**scores, **({"clear_drawn": drawn} if bounded else {}), "clear_error": errors, **old}
        return added if isinstance(batch, Mapping) else beside(batch, added)

    def propose(self, batch: Any, rank: int | None = None) -> Any:
        """A step for ``ds.map(clear.propose, batched=True)``: what the fine-tuned model would answer in a row's place.

        Args:
            batch: Columns of a batch of scored rows.
            rank: Number of the worker process, as for `score`.

        Returns:
            ``clear_candidate``, "" where there is none: the row is above gamma or has no score, or the candidate is
            empty or the target itself; ``clear_agreed``, whether it is the target; and ``clear_error``, which says why
            none could be written, or that it was cut off at the limit of its length (256 tokens, or 64 more than half
            the bytes of the target). Preferences of earlier candidates are blank after it.

        Raises:
            ValueError: There is no writer (`with_writer`), or the rows have no confidence that gamma is compared with.

        References:
            Chen and Mueller 2024, arXiv 2403.12776 (Auto-Correct, step 1).
        """
        if self.writer is None:
            raise ValueError("no model writes candidates: clear = clear.with_writer('folder of an adapter or model')")
        columns = _columns_of(batch)
        examples, errors = self._read(columns)
        wanted = [i for i, example in enumerate(examples) if example is not None and self._low(columns, i)]
        blank, reasons = _blank(len(errors)), [""] * len(wanted)
        added = {name: values for name, values in blank.items() if name not in _JUDGED or name in columns}

        def question(j: int) -> Asks:
            example = examples[wanted[j]]
            assert example is not None
            return Asks([example.prompt], max_tokens=[max(_CANDIDATE, 64 + len(example.response.encode()) // 2)])

        if wanted:
            found = ask(self._base(rank).with_writer(self.writer), reasons, question)
            for j, answers in found.items():
                example, [[text]] = examples[wanted[j]], answers.generated
                text = (
                    prompts.answer_of(text, "plain") or ""
                ).strip()  # without the thoughts of a model that thinks first
                if answers.cut and answers.cut[0][0]:
                    reasons[j] = f"the answer is cut off at {question(j).limits[0]} tokens"
                elif example is not None and text == example.response.strip():
                    added["clear_agreed"][wanted[j]] = True
                else:
                    added["clear_candidate"][wanted[j]] = text
        return self._added(batch, columns, added, "no candidate", wanted, reasons)

    def prefer(self, batch: Any, rank: int | None = None) -> Any:
        """A step for ``ds.map(clear.prefer, batched=True)``: how sure the base model is that a candidate is better.

        Args:
            batch: Columns of a batch of rows with candidates; see `propose`.
            rank: Number of the worker process, as for `score`.

        Returns:
            ``clear_preference``, float32 in [0, 1], nan where there is no candidate; ``clear_position_bias``, float32
            in [-1, 1], how far the verdict favoured what stood first; and ``clear_error``, which says why a candidate
            could not be judged.

        Raises:
            ValueError: The rows have no column ``clear_candidate``.

        References:
            Chen and Mueller 2024, arXiv 2403.12776 (Auto-Correct, steps 2 and 3).
        """
        columns = _columns_of(batch)
        if "clear_candidate" not in columns:
            raise ValueError("no column 'clear_candidate': run ds = ds.map(clear.propose, batched=True) first")
        examples, errors = self._read(columns)
        pairs = {i: (e, columns["clear_candidate"][i]) for i, e in enumerate(examples) if e is not None}
        judged = [i for i, (_, candidate) in pairs.items() if candidate]
        added = {name: values for name, values in _blank(len(errors)).items() if name in _JUDGED}
        reasons: list[str] = []
        if judged:
            found = self.judge([pairs[i][0] for i in judged], [pairs[i][1] for i in judged], self._base(rank))
            added["clear_preference"][judged] = found.preference
            added["clear_position_bias"][judged] = found.position_bias
            reasons = found.errors
        return self._added(batch, columns, added, "no preference", judged, reasons)

    def _estimator(self) -> Estimator:
        """That of the scores, which stops at gamma where samples are adaptive."""
        if not self.adaptive:
            return self.confidence
        if self.gamma is None:
            raise ValueError(
                "adaptive=True stops rows that are sure at gamma, and there is none: give Clear(gamma=...), or call "
                "ds = score_to_keep(ds, clear, keep=0.5), which finds the one that keeps a share"
            )
        return Adaptive(self.confidence, self.gamma, self.gamma)  # type: ignore[arg-type]  # it checks that

    def _base(self, rank: int | None) -> Engine:
        if rank is not None:
            if not isinstance(rank, int):
                raise TypeError(
                    f"rank is a {type(rank).__name__}; expected a number, as by with_rank=True: leave with_indices out"
                )
            use_rank(rank, self.engine.gpus if self.engine else 1)
        return cached(self.engine or default_engine(os.fspath(self.model), self.revision), self.cache)

    def _low(self, columns: Batch, i: int) -> bool:
        if self.gamma is None:
            return True
        if "clear_confidence" not in columns:
            raise ValueError("no column 'clear_confidence': run ds = ds.map(clear.score, batched=True) first")
        value = columns["clear_confidence"][i]
        return value is not None and value <= self.gamma

    @staticmethod
    def _added(
        batch: Any, columns: Batch, added: dict[str, Any], what: str, rows: list[int], reasons: list[str]
    ) -> Any:
        """The new columns, with reasons beside those that rows have already."""
        errors = [e or "" for e in columns["clear_error"]] if "clear_error" in columns else [""] * columns.size
        errors = [e.partition(f"{what}: ")[0].removesuffix("; ") for e in errors]  # what an earlier round said of it
        for i, reason in zip(rows, reasons, strict=True):
            if reason:
                errors[i] = "; ".join(e for e in (errors[i], f"{what}: {reason}") if e)
        added = {**added, "clear_error": errors}
        return added if isinstance(batch, Mapping) else beside(batch, added)

    def close(self) -> None:
        """Free the memory of the models in this process, for fine-tuning, say; the next step loads them anew."""
        base = self._base(None)
        base.close()
        if self.writer is not None:
            base.with_writer(self.writer).close()
        close_encoders()

    @staticmethod
    def features(features: Features, adaptive: bool = False) -> Features:
        """The schema that `score` leaves behind, for ``ds.map(clear.score, batched=True, features=...)``.

        Streams have no schema of their own after a map; with this they do.

        Args:
            features: Those of the rows.
            adaptive: Whether the samples are adaptive.

        Examples:
            >>> from datasets import Features, Value
            >>> Clear.features(Features({"question": Value("string")}))["clear_confidence"]
            Value('float32')
        """
        from datasets import Features, Value

        if features is None:
            raise ValueError(
                "there are no features: this stream has no schema; give one, Features({...}), of its columns"
            )
        added = (*_COLUMNS, *((*BOUNDS, "clear_drawn") if adaptive else ()), "clear_error")
        return Features({**features, **{name: Value(OURS[name]) for name in added}})

    def _read(self, batch: Batch) -> tuple[list[Example | None], list[str]]:
        form_of = of_each(self.format, batch) if batch.size else None
        examples: list[Example | None] = []
        errors = [""] * batch.size
        for i in range(batch.size):
            assert form_of is not None
            row = RowOf(batch, i)
            try:
                examples.append(form_of(row).read(row))
            except FormatError as error:
                examples.append(None)
                errors[i] = str(error)
        return examples, errors


def _columns_of(batch: Any) -> Batch:
    if not (isinstance(batch, Mapping) or hasattr(batch, "columns")):  # as tables and data frames have them
        raise TypeError(
            f"got a {type(batch).__name__}; expected the columns of a batch: leave input_columns=[...] out of ds.map, "
            "and name columns by Clear(format=Columns(...))"
        )
    return Batch(batch)


def _blank(size: int) -> dict[str, Any]:
    """The columns of `propose` and `prefer` where there is no candidate."""
    judged = {name: np.full(size, np.nan, dtype=np.float32) for name in _JUDGED}
    return {"clear_candidate": [""] * size, "clear_agreed": np.zeros(size, dtype=bool), **judged}
