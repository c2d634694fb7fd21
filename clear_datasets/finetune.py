"""Fine-tuning between the stages, with TRL and PEFT; every other step takes what any tool has trained."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.engines.checkpoint import best_device, from_gguf, stamp
from clear_datasets.formats import Format, FormatError, infer_rows

if TYPE_CHECKING:
    from datasets import Dataset

LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
_RUN = "clear_finetune.json"  # what the run in a folder was started with, and whether it is done


def finetune(
    ds: Dataset,
    model: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    format: Format | None = None,
    lora: Mapping[str, Any] | None = LORA,
    **options: Any,
) -> str:
    """Fine-tune a model on the responses of a dataset, in the model's own chat template.

    The loss is that of the response alone. A run that was broken off goes on from its last checkpoint when it is called
    again with the same rows and settings; one that is done is not repeated.

    Args:
        ds: Rows in any format that `Clear.score` takes; those that cannot be read are left out, with a warning.
        model: Hub id, local folder or ``.gguf`` file.
        out: Folder for the adapter (or the model, without `lora`) and the checkpoints on the way.
        revision: Branch, tag or commit of a Hub model.
        format: Where rows keep prompt and target; inferred from the columns by default.
        lora: Settings of ``peft.LoraConfig``; None trains all weights.
        **options: Of ``trl.SFTConfig``. By default 3 epochs in batches of 8, learning rate 2e-4 (all weights: 1e-5, as
            in the paper), a checkpoint every tenth of the way, and no row is cut off (``max_length=None``).

    Returns:
        `out`, for `Clear.with_writer`.

    Raises:
        ImportError: trl or peft are not installed.
        ValueError: No row can be read, or the folder holds a run with other rows or settings.

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (fine-tuning on the filtered rows, before Auto-Correct).
    """
    try:
        from peft import LoraConfig
        from transformers.trainer_utils import get_last_checkpoint
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ImportError(f'fine-tuning needs trl and peft ({error}): pip install "clear-datasets[train]"') from error

    folder, on_cpu = Path(out), best_device() == "cpu"
    rows = _pairs(ds, format)
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-4 if lora is not None else 1e-5,
        "max_length": None,
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "bf16": not on_cpu and _bfloat16(),
        **options,
    }
    run: dict[str, Any] = {"rows": _digest(rows), "model": model, "revision": revision, "stamp": stamp(model)}
    run |= {"lora": dict(lora) if lora is not None else None, "options": repr(sorted(settings.items()))}
    if _before(folder, run):
        return str(folder)
    source = str(from_gguf(Path(model))) if model.endswith(".gguf") else model
    trainer = SFTTrainer(
        model=source,
        args=SFTConfig(
            output_dir=str(folder),
            completion_only_loss=True,
            model_init_kwargs={"revision": revision, "dtype": "float32" if lora is None or on_cpu else "auto"},
            **settings,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora is not None else None,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    trainer.save_model(str(folder))
    (folder / _RUN).write_text(json.dumps({**run, "done": True}))
    return str(folder)


def _before(folder: Path, run: dict[str, Any]) -> bool:
    """Whether this very run was done already; notes that it is begun where it was not."""
    file = folder / _RUN
    if file.is_file():
        old = json.loads(file.read_text())
        changed = [name for name, value in run.items() if old.get(name) != value]
        if changed:
            raise ValueError(
                f"{folder} holds a run with other {', '.join(changed)}: give another folder, or delete this one"
            )
        return bool(old["done"])
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files of something else: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**run, "done": False}))
    return False


def _pairs(ds: Dataset, format: Format | None) -> Dataset:
    """Prompts and completions as messages, of the rows that can be read."""
    from datasets import Features, List, Value

    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": List(message), "completion": List(message)})
    step = _Pair(format)
    rows = ds.with_format(None).map(step, batched=True, remove_columns=ds.column_names, features=features)
    if not len(rows):
        raise ValueError(f"none of the {len(ds)} rows can be read: see what clear.score says of them")
    if len(rows) < len(ds):
        warnings.warn(f"{len(ds) - len(rows)} of {len(ds)} rows cannot be read and are left out", stacklevel=3)
    return rows


def _digest(rows: Dataset) -> str:
    """Of the texts, as fingerprints of datasets differ between equal ones."""
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()[:16]


class _Pair:
    def __init__(self, format: Format | None) -> None:
        self.format = format

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        form = self.format or infer_rows(batch)
        pairs: dict[str, list[Any]] = {"prompt": [], "completion": []}
        for i in range(len(next(iter(batch.values()), []))):
            try:
                example = form.read({name: values[i] for name, values in batch.items()})
            except FormatError:
                continue
            pairs["prompt"].append([dict(m) for m in example.prompt])
            pairs["completion"].append([{"role": "assistant", "content": example.response}])
        return pairs


def _bfloat16() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
