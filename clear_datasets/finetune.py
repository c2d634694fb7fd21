"""Fine-tuning between the stages, with TRL and PEFT; every other step takes what any tool has trained."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clear_datasets.encoders import close_encoders
from clear_datasets.engines import PromptError
from clear_datasets.engines.chats import Chats, tokenizer_of
from clear_datasets.engines.checkpoint import best_device, fast_dtype, source_of, stamp, stated_ends, unload
from clear_datasets.formats import Example, Format, FormatError
from clear_datasets.infer_format import RowOf, infer_rows

if TYPE_CHECKING:
    from datasets import Dataset

LORA: Mapping[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
EPOCHS, BATCH = 3, 8  # by default
_TOKENS = 4096  # read at a time: the logits of 4,096 tokens and 150,000 words take 2.5 GB in float32
_RUN = "clear_finetune.json"  # what the run in a folder was started with, and whether it is done
_SAME_WEIGHTS = {  # options that may change from start to start
    "dataloader_num_workers", "dataloader_pin_memory", "disable_tqdm", "gradient_checkpointing", "logging_steps",
    "report_to", "save_steps", "save_total_limit",
}  # fmt: skip


def finetune(
    ds: Dataset,
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    format: Format | None = None,
    lora: Mapping[str, Any] | None = LORA,
    **options: Any,
) -> str:
    """Fine-tune a model on the responses of a dataset, in the model's own chat template.

    The loss is that of the response alone. Engines of this process are closed first: their memory is needed. A run that
    was broken off goes on from its last checkpoint when it is called again with the same rows and settings; one that is
    done is not repeated.

    Args:
        ds: Rows in any format that `Clear.score` takes; those that cannot be read are left out, with a warning.
        model: Hub id, local folder or ``.gguf`` file.
        out: Folder for the adapter (or the model, without `lora`) and the checkpoints on the way.
        revision: Branch, tag or commit of a Hub model.
        format: Where rows keep prompt and target; inferred from the columns by default.
        lora: Settings of ``peft.LoraConfig``; None trains all weights.
        **options: Of ``trl.SFTConfig``. By default 3 epochs in batches of 8, learning rate 2e-4 (all weights: 1e-5, as
            in the paper), a checkpoint every tenth of the way, and no row is cut off (``max_length=None``). A batch of
            long rows is read in parts (``gradient_accumulation_steps``), 4,096 tokens at a time or else row by row.
            A model's own code runs with ``trust_remote_code=True`` alone.

    Returns:
        `out`, for `Clear.with_writer`.

    Raises:
        ImportError: trl or peft are not installed.
        ValueError: No row can be read, the folder holds a run with other rows or settings, or an option is a token.

    References:
        Chen and Mueller 2024, arXiv 2403.12776 (fine-tuning on the filtered rows, before Auto-Correct).
    """
    try:
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise ImportError(f'fine-tuning needs trl and peft ({error}): pip install "clear-datasets[train]"') from error
    import torch

    if taken := sorted({"output_dir", "completion_only_loss"} & set(options)):
        raise ValueError(
            f"{' and '.join(taken)} cannot be set: out is the folder, and the loss is that of the response"
        )
    if taken := sorted({"hub_token", "token"} & {*options, *(options.get("model_init_kwargs") or {})}):
        raise ValueError(f"{' and '.join(taken)} would be written into {out}: set HF_TOKEN, or hf auth login")
    folder, model, device = Path(out), os.fspath(model), best_device()
    trust = bool(options.get("trust_remote_code"))
    on_cpu, on_cuda = device == "cpu", device == "cuda"  # of a third kind, "mps", torch.cuda tells nothing
    source = source_of(model)
    tokenizer = tokenizer_of(source, revision, trust)
    rows = _tokens(ds, format, tokenizer, source, revision, trust)
    loading = {"revision": revision, "dtype": "float32" if lora is None or on_cpu else "auto"}
    settings = {
        "num_train_epochs": EPOCHS,
        **_parts(max(map(len, rows["input_ids"])), options),
        "learning_rate": 2e-4 if lora is not None else 1e-5,
        "max_length": None,
        "save_steps": 0.1,
        "save_total_limit": 2,
        "dataloader_pin_memory": on_cuda,
        "gradient_checkpointing": not on_cpu,  # saves memory, of which a CPU has plenty, for a third more time
        "logging_steps": 10,
        "report_to": "none",
        "bf16": on_cuda and not options.get("fp16") and fast_dtype(torch.device("cuda")) == torch.bfloat16,
        **options,
        "model_init_kwargs": {**loading, **(options.get("model_init_kwargs") or {})},
    }
    telling = {name: value for name, value in settings.items() if name not in _SAME_WEIGHTS}
    telling["batch"] = telling.pop("per_device_train_batch_size") * telling.pop("gradient_accumulation_steps")
    run: dict[str, Any] = {"rows": _digest(rows), "model": model, "revision": revision, "stamp": stamp(model)}
    run |= {"lora": repr(sorted(lora.items())) if lora is not None else None, "options": repr(sorted(telling.items()))}
    if _done(folder, run):
        return str(folder)
    _close_engines()
    settings["model_init_kwargs"] = {"trust_remote_code": trust, **settings["model_init_kwargs"]}
    trainer = SFTTrainer(
        model=source,
        args=SFTConfig(output_dir=str(folder), completion_only_loss=True, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora is not None else None,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RUN).write_text(json.dumps({**run, "done": False}))
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        trainer.save_model(str(folder))
        (folder / _RUN).write_text(json.dumps({**run, "done": True}))
    finally:
        trainer.accelerator.free_memory()
        del trainer  # the memory of a GPU is needed for what comes next
        gc.collect()
        if on_cuda:
            torch.cuda.empty_cache()
    return str(folder)


def _close_engines() -> None:
    unload()
    close_encoders()
    if "clear_datasets.engines.vllm_process" in sys.modules:  # which needs vLLM
        sys.modules["clear_datasets.engines.vllm_process"].close_all()
    gc.collect()


def _done(folder: Path, run: dict[str, Any]) -> bool:
    """Whether this very run was done already; refuses a folder of anything else."""
    file = folder / _RUN
    if file.is_file():
        old = json.loads(file.read_text())
        changed = [name for name, value in run.items() if old.get(name) != value]
        if changed and (old["done"] or any(folder.glob("checkpoint-*"))):
            raise ValueError(
                f"{folder} holds a run with other {', '.join(changed)}: give another folder, or delete this one"
            )
        return bool(old["done"])
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds files of something else: give another folder")
    return False


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole: its state is written last."""
    whole = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    for broken in set(folder.glob("checkpoint-*")) - set(whole):
        shutil.rmtree(broken)
    return str(max(whole, key=lambda p: int(p.name.rpartition("-")[2]))) if whole else None


def _tokens(
    ds: Dataset, format: Format | None, tokenizer: Any, source: str, revision: str | None, trust: bool
) -> Dataset:
    """Token ids as the engines make them, and which of them the loss is of; rows that cannot be read are left out."""
    from datasets import Features, List, Value
    from transformers import AutoConfig

    text = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust).get_text_config()
    limit = int(getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length)
    step = _Tokens(format, Chats.of(tokenizer, limit, stated_ends(source, revision, text)))
    features = Features({"input_ids": List(Value("int32")), "completion_mask": List(Value("int8"))})
    rows = ds.with_format(None).map(
        step, batched=True, remove_columns=ds.column_names, features=features, load_from_cache_file=False
    )
    if not len(rows):
        raise ValueError(f"none of the {len(ds)} rows can be read: see what clear.score says of them")
    if len(rows) < len(ds):
        warnings.warn(
            f"{len(ds) - len(rows)} of {len(ds)} rows are left out; the first one: {step.reasons[0]!r}", stacklevel=3
        )
    return rows


def _parts(longest: int, options: Mapping[str, Any]) -> dict[str, int]:
    """Rows in memory at a time, and how many times that many make a batch."""
    if {"per_device_train_batch_size", "gradient_accumulation_steps"} & set(options):
        return {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    rows = next((n for n in (BATCH, BATCH // 2, BATCH // 4) if n * longest <= _TOKENS), 1)
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": BATCH // rows}


def _digest(rows: Dataset) -> str:
    """Of the tokens, as fingerprints of datasets differ between equal ones."""
    digest = hashlib.sha256()
    for batch in rows.iter(1000):
        digest.update(json.dumps(batch).encode())
    return digest.hexdigest()[:16]


class _Tokens:
    def __init__(self, format: Format | None, chats: Chats) -> None:
        self.format, self.chats = format, chats
        self.reasons: list[str] = []

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        form = self.format or infer_rows(batch)
        examples: list[Example] = []
        for i in range(len(batch[next(iter(batch))])):
            try:
                examples.append(form.read(RowOf(batch, i)))
            except FormatError as error:
                self.reasons.append(str(error))
        responses = [self.chats.response(e.response) for e in examples]
        try:
            prompts = self.chats.encode([e.prompt for e in examples], list(map(len, responses)))
        except PromptError as error:
            self.reasons += error.reasons.values()
            kept = [i for i in range(len(examples)) if i not in error.reasons]
            examples, responses = [examples[i] for i in kept], [responses[i] for i in kept]
            prompts = self.chats.encode([e.prompt for e in examples], list(map(len, responses)))
        pairs = list(zip(prompts, responses, strict=True))
        return {
            "input_ids": [p + r for p, r in pairs],
            "completion_mask": [[0] * len(p) + [1] * len(r) for p, r in pairs],
        }
