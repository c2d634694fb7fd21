"""The card of a curated dataset: what was done to the rows, in words and figures."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import DatasetCard

    from clear_datasets import Clear

IMAGE = "clear_confidence.png"
_BEGIN, _END = (
    "<!-- clear_datasets: begin -->",
    "<!-- clear_datasets: end; what stands outside of these marks is kept -->",
)
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")
_SHOWN, _EXAMPLES = 400, 3  # characters of a text; rows of a decision
_DECISIONS = {"keep": "Kept", "replace": "Replaced", "drop": "Dropped"}


@dataclass(frozen=True)
class Body:
    """What does not depend on the repository.

    Attributes:
        values: For the template.
        image: PNG; empty where there are no scores.
        data: Fields of the card's YAML.
    """

    values: Mapping[str, Any]
    image: bytes
    data: Mapping[str, Any]


def card(rows: Mapping[str, Dataset], left: int, clear: Clear | None, settings: Mapping[str, Any], source: str) -> Body:
    """What is said of rows with decisions, of all splits.

    Args:
        rows: All rows, or those that were left where no others are known.
        left: How many rows are left.
        clear: The steps that made them.
        settings: More of what they were made with.
        source: Hub id of the source, or "".
    """
    from datasets import concatenate_datasets
    from huggingface_hub import DatasetCard
    from huggingface_hub.errors import HfHubHTTPError

    from clear_datasets.report import plot

    whole = concatenate_datasets([part.with_format(None) for part in rows.values()])
    counts = _counts(whole)
    image = BytesIO()
    if scored := "clear_confidence" in whole.column_names:
        plot(whole).save(image, format="png", scale_factor=2)
    data: dict[str, Any] = {
        "tags": ["clear", "data-curation", *(["synthetic"] if counts["replaced"] else [])],
        "annotations_creators": ["machine-generated"],
        "size_categories": [_SIZES[min(len(_SIZES) - 1, max(0, len(str(left)) - 3))]],
    }
    if source:
        data["source_datasets"] = [source]
        try:
            theirs = DatasetCard.load(source).data
            data |= {name: theirs.get(name) for name in ("license", "language") if theirs.get(name)}
        except (HfHubHTTPError, OSError, ValueError):  # it has no card
            pass
    more = dict(settings)
    values = {
        "total": f"{len(whole):,}",
        "left": f"{left:,}",
        "source": source,
        "counts": {name: f"{count:,}" for name, count in counts.items()},
        "replaced": counts["replaced"],
        "image": IMAGE if scored else "",
        "audited": "clear_decision" in whole.column_names,
        "command": more.pop("command", ""),
        "code": _code(clear, more, source, next(iter(rows))) if clear and source and "gamma" in more else "",
        "settings": {_cell(name): _cell(value) for name, value in {**settings_of(clear), **more}.items()},
        "examples": _examples(whole, clear),
    }
    return Body(values, image.getvalue(), data)


def merged(old: DatasetCard, body: Body, configs: Mapping[str, Sequence[Mapping[str, str]]], repo: str) -> str:
    """The card of a repository with ours in it; what its owner wrote, other configs and other fields stay.

    Args:
        old: The card as it is.
        body: What is to be said.
        configs: Data files of each of our configs.
        repo: Its name.
    """
    from huggingface_hub import DatasetCard
    from jinja2 import Environment, StrictUndefined

    source = files("clear_datasets").joinpath("card.md.jinja").read_text()
    template = Environment(undefined=StrictUndefined).from_string(source)  # of Markdown: texts are escaped by _text
    ours = f"{_BEGIN}\n\n{template.render(**body.values, name=repo.rpartition('/')[2])}\n\n{_END}"
    before, mark, rest = old.text.partition(_BEGIN)
    behind = rest.partition(_END)[2] if mark else ""
    text = f"{before.rstrip()}\n\n{ours}\n{behind.strip()}".strip()
    data = dict(old.data.to_dict())  # type: ignore[no-untyped-call]
    for name, value in body.data.items():
        both = isinstance(value, list) and name not in ("size_categories", "annotations_creators")
        data[name] = list(dict.fromkeys([*_list(data.get(name)), *value])) if both else value
    theirs = [c for c in data.get("configs") or [] if c.get("config_name") not in configs]
    data["configs"] = [*({"config_name": c, "data_files": list(f)} for c, f in configs.items()), *theirs]
    # Sizes and features of older rows would be compared with the new ones.
    infos = [i for i in _list(data.pop("dataset_info", None)) if i.get("config_name", "default") not in configs]
    if infos:
        data["dataset_info"] = infos
    empty = DatasetCard("")
    empty.data = type(empty.data)(**data)
    return f"---\n{empty.data.to_yaml()}\n---\n\n{text}\n"


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _counts(rows: Dataset) -> dict[str, int]:
    import numpy as np

    scores = np.asarray(rows["clear_confidence"][:] if "clear_confidence" in rows.column_names else [], dtype=float)
    if "clear_decision" in rows.column_names:
        decisions = rows["clear_decision"][:]
        counts = {
            name: decisions.count(d) for name, d in (("kept", "keep"), ("dropped", "drop"), ("replaced", "replace"))
        }
    else:
        replaced = sum(map(bool, rows["clear_original"][:])) if "clear_original" in rows.column_names else 0
        counts = {"kept": len(rows) - replaced, "replaced": replaced}
    return {**counts, "without a score": int(np.isnan(scores).sum())}


def settings_of(clear: Clear | None) -> dict[str, Any]:
    """Every setting by its name, those of parts by the name of the part."""
    if clear is None:
        return {}
    found: dict[str, Any] = {}
    for field in fields(clear):
        value = getattr(clear, field.name)
        if value is None or (field.name == "writer" and not value):
            continue
        if is_dataclass(value):
            value = _repr(value)
        elif isinstance(value, str) and os.path.isabs(value):
            value = Path(value).name  # no folders of this machine
        found[field.name] = value
    return found


def _code(clear: Clear, settings: Mapping[str, Any], source: str, split: str) -> str:
    """Lines of Python that do it again."""
    import clear_datasets

    usual = type(clear)("")
    own = {f.name: getattr(clear, f.name) for f in fields(clear) if f.init and f.name != "model"}
    given = [f"{name}={_repr(value)}" for name, value in own.items() if value != getattr(usual, name)]
    steps = ["score", *(["propose", "prefer"] if clear.writer else [])]
    cuts = [repr(settings[name]) for name in ("gamma", "eta") if name in settings]
    lines = [
        f"ds = load_dataset({source!r}, split={split!r})",
        f"clear = Clear({', '.join([_repr(clear.model), *given])})",
        *(f"ds = ds.map(clear.{step}, batched=True)" for step in steps),
        f"ds = ds.map(decide({', '.join(cuts)}), batched=True)",
        "ds = curated(ds)",
    ]
    ours = [n for n in clear_datasets.__all__ if re.search(rf"(?<!\.)\b{n}\(", "\n".join(lines))]
    others = {type(v).__qualname__: type(v).__module__ for v in own.values() if is_dataclass(v)}
    imports = [
        f"from clear_datasets import {', '.join(ours)}",
        *(f"from {module} import {name}" for name, module in others.items() if name not in ours),
        "from datasets import load_dataset",
    ]
    return "\n".join([*imports, "", *lines])


def _repr(value: Any) -> str:
    """Without folders of this machine."""
    return re.sub(r"(?<=')(/|[A-Za-z]:\\)[^']*[/\\]", "", repr(value))


def _examples(rows: Dataset, clear: Clear | None) -> dict[str, list[dict[str, str]]]:
    """A few rows of each decision: of those kept and dropped the least confident."""
    import numpy as np

    from clear_datasets.formats import infer_rows

    if "clear_decision" not in rows.column_names or not len(rows):
        return {}
    form = (clear.format if clear else None) or infer_rows(rows[:1000])
    scores = np.asarray(rows["clear_confidence"][:], dtype=float)
    decisions = np.array(rows["clear_decision"][:])
    found: dict[str, list[dict[str, str]]] = {}
    for decision, title in _DECISIONS.items():
        chosen = np.flatnonzero((decisions == decision) & ~np.isnan(scores))
        chosen = chosen[np.argsort(scores[chosen], kind="stable")][:_EXAMPLES]
        found[title] = [_example(form.read(rows[int(i)]), rows[int(i)]) for i in chosen]
    return {title: shown for title, shown in found.items() if shown}


def _example(example: Any, row: Mapping[str, Any]) -> dict[str, str]:
    candidate = row.get("clear_candidate", "") if row["clear_decision"] == "replace" else ""
    return {
        "confidence": f"{row['clear_confidence']:.3f}",
        "prompt": _text(example.prompt[-1]["content"]),
        "target": _text(example.response),
        "former": candidate,
        "candidate": _text(candidate),
    }


def _text(text: str) -> str:
    """Harmless in HTML and in Markdown, and short."""
    short = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
    return (
        html.escape(re.sub(r"\n\s*\n", "\n", short)).replace("`", "&#96;").replace("[", "&#91;").replace("$", "&#36;")
    )


def _cell(value: Any) -> str:
    return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ").replace("[", "&#91;")
