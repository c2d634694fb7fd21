"""The card of a curated dataset: what was done to the rows, in words and figures."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.resources import files
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from huggingface_hub import DatasetCard

    from clear_datasets import Clear
    from clear_datasets.formats import Format

IMAGE = "clear_confidence.png"
EMPTY = "---\n{}\n---\n"  # a card without the YAML block would be warned of
_BEGIN, _END = (
    "<!-- clear_datasets: begin -->",
    "<!-- clear_datasets: end; what stands outside of these marks is kept -->",
)
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "n>1B")
_LICENCE = ("license", "license_name", "license_link")
_SHOWN, _EXAMPLES = 400, 3  # characters of a text; rows of a decision
_FOLDER = r"""(?<![^\s='"])(?:[/\\~]|[A-Za-z]:[/\\])[^\s'"]*"""  # in a command
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


def card(
    rows: Mapping[str, Dataset],
    left: int,
    clear: Clear | None,
    settings: Mapping[str, Any],
    source: str,
    theirs: Mapping[str, Any],
    audited: bool,
) -> Body:
    """What is said of rows with decisions, of all splits.

    Args:
        rows: All rows, or those that were left where no others are known.
        left: How many rows are left.
        clear: The steps that made them.
        settings: More of what they were made with.
        source: Hub id of the source, or "".
        theirs: The YAML of the source's card.
        audited: Whether they are all rows, with the targets that they had.
    """
    from datasets import concatenate_datasets

    from clear_datasets.confidence import BSDetector
    from clear_datasets.report import plot

    whole = concatenate_datasets([part.with_format(None) for part in rows.values()])
    counts = _counts(whole, audited)
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
        data |= {name: theirs[name] for name in (*_LICENCE, "language") if theirs.get(name)}
    more = {
        n: last_part(value) if isinstance(value, str) and n != "command" else value for n, value in settings.items()
    }
    values = {
        "total": f"{len(whole):,}",
        "left": f"{left:,}",
        "source": source,
        "counts": {name: f"{count:,}" for name, count in counts.items()},
        "replaced": counts["replaced"],
        "judge": _judge(whole),
        "image": IMAGE if scored else "",
        "audited": audited,
        "command": re.sub(_FOLDER, lambda found: last_part(found[0]), str(more.pop("command", ""))),
        "code": _code(clear, more, source, rows) if clear else "",
        "detector": clear is None or isinstance(clear.confidence, BSDetector),
        "settings": {_cell(name): _cell(value) for name, value in {**settings_of(clear), **more}.items()},
        "examples": _examples(whole, clear, audited),
    }
    return Body(values, image.getvalue(), data)


def merged(old: DatasetCard, body: Body, configs: Mapping[str, Sequence[Mapping[str, Any]]], repo: str) -> str:
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
    theirs_to_say = _LICENCE if data.get("license") else ()
    for name, value in body.data.items():
        if name in theirs_to_say:
            continue
        both = isinstance(value, list) and name not in ("size_categories", "annotations_creators")
        data[name] = list(dict.fromkeys([*as_list(data.get(name)), *value])) if both else value
    theirs = [c for c in data.get("configs") or [] if c.get("config_name") not in configs]
    data["configs"] = [*({"config_name": c, "data_files": list(f)} for c, f in configs.items()), *theirs]
    # Sizes and features of older rows would be compared with the new ones.
    infos = [i for i in as_list(data.pop("dataset_info", None)) if i.get("config_name", "default") not in configs]
    if infos:
        data["dataset_info"] = infos
    empty = DatasetCard(EMPTY)
    empty.data = type(empty.data)(**data)
    return f"---\n{empty.data.to_yaml()}\n---\n\n{text}\n"


def as_list(value: Any) -> list[Any]:
    """What YAML may hold once, several times or not at all."""
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _counts(rows: Dataset, audited: bool) -> dict[str, int]:
    import numpy as np

    scores = np.asarray(rows["clear_confidence"][:] if "clear_confidence" in rows.column_names else [], dtype=float)
    if "clear_decision" in rows.column_names:
        decisions = rows["clear_decision"][:]
        names = {"kept": "keep", **({"dropped": "drop"} if audited else {}), "replaced": "replace"}
        counts = {name: decisions.count(decision) for name, decision in names.items()}
    else:
        replaced = sum(map(bool, rows["clear_original"][:])) if "clear_original" in rows.column_names else 0
        counts = {"kept": len(rows) - replaced, "replaced": replaced}
    return {**counts, "without a score": int(np.isnan(scores).sum())}


def _judge(rows: Dataset) -> str:
    """How many candidates were judged in both orders, and how far the verdicts followed the place."""
    import numpy as np

    column = "clear_position_bias"
    bias = np.asarray(rows[column][:] if column in rows.column_names else [], dtype=float)
    bias = bias[~np.isnan(bias)]
    if not bias.any():  # ByConfidence judges each response by itself
        return ""
    return f"{len(bias):,} candidates in both orders; position bias {bias.mean():.3f}"


def settings_of(clear: Clear | None) -> dict[str, Any]:
    """Every setting by its name, those of parts by the name of the part."""
    if clear is None:
        return {}
    found = {field.name: getattr(clear, field.name) for field in fields(clear) if field.compare}
    if clear.engine is not None and hasattr(clear.engine, "model"):
        found.pop("model")  # the engine's own is what runs
    return {name: _shown(value) for name, value in found.items() if value is not None and value != ""}


def origin(part: Dataset) -> tuple[str, str, str]:
    """Hub id as `in_cache` has it, configuration and commit that rows were loaded from; "" where they were not.

    A dataset says so in the names of its cache files alone: owner___name/configuration/version/commit/.
    """
    for file in part.cache_files:
        names = re.split(r"[/\\]", file["filename"])[-5:-1]
        if len(names) == 4 and "___" in names[0] and re.fullmatch("[0-9a-f]{40}", names[3]):
            return names[0].replace("___", "/", 1), names[1], names[3]
    return "", "", ""


def in_cache(repo: str) -> str:
    """How the cache of `datasets` writes a Hub id.

    Examples:
        >>> in_cache("Open-Orca/OpenOrca")
        'Open-Orca/open_orca'
    """
    from datasets.naming import camelcase_to_snakecase

    owner, slash, name = repo.rpartition("/")
    return f"{owner}{slash}{camelcase_to_snakecase(name)}"


def _code(clear: Clear, settings: Mapping[str, Any], source: str, rows: Mapping[str, Dataset]) -> str:
    """Lines of Python that do it again.

    There are none where they would not: for some rows of a split, other sources than the Hub, a model that was trained
    on the way, and parts that are not ours.
    """
    import clear_datasets

    part, *others = rows.values()
    (known, config, commit), split = origin(part), str(part.split or "")
    of_source = known and (known, config) == (in_cache(source), part.info.config_name)
    infos = dict(part.info.splits or {}) if of_source else {}
    whole = split in infos and infos[split].num_examples == len(part)
    if others or not whole or clear.writer or clear.engine or not _ours(clear) or "gamma" not in settings:
        return ""
    usual = type(clear)(clear.model)
    given = [
        f"{f.name}={_shown(value) if is_dataclass(value) else repr(_shown(value))}"
        for f in fields(clear)
        if f.name != "model" and f.compare and (value := getattr(clear, f.name)) != getattr(usual, f.name)
    ]
    choices = [f"{name}={settings[name]!r}" for name in ("correct", "agreed", "failed") if name in settings]
    where = [repr(source), *([repr(config)] if config != "default" else [])]
    lines = [
        f"ds = load_dataset({', '.join(where)}, split={split!r}, revision={commit!r})",
        f"clear = Clear({', '.join([repr(_shown(clear.model)), *given])})",
        "ds = ds.map(clear.score, batched=True)",
        f"ds = ds.map(decide({', '.join([repr(float(settings['gamma'])), *choices])}), batched=True)",
        "ds = curated(ds)",
    ]
    named = [n for n in clear_datasets.__all__ if re.search(rf"(?<!\.)\b{n}\(", "\n".join(lines))]
    return "\n".join(
        [f"from clear_datasets import {', '.join(named)}", "from datasets import load_dataset", "", *lines]
    )


def _ours(value: Any) -> bool:
    """Whether Python reads what `repr` says of it, with the public names of this package."""
    import clear_datasets

    if is_dataclass(value):
        named = getattr(clear_datasets, type(value).__name__, None) is type(value)
        return named and all(_ours(getattr(value, f.name)) for f in fields(value))
    return type(value) in (str, int, float, bool, type(None))


def _shown(value: Any) -> Any:
    """A setting without folders of this machine; parts as Python writes them."""
    if isinstance(value, str):
        return last_part(value)
    if not is_dataclass(value):
        return value if isinstance(value, (int, float)) else type(value).__name__
    text = repr(value)
    for path in _texts(value):
        text = text.replace(repr(path), repr(last_part(path)))
    return text


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        yield from (text for f in fields(value) for text in _texts(getattr(value, f.name)))
    elif isinstance(value, (tuple, list)):
        yield from (text for inner in value for text in _texts(inner))


def last_part(text: str) -> str:
    """The last part of an absolute path; another text as it is."""
    if re.match(r"[/\\~]|[A-Za-z]:[/\\]", text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return text


def _examples(rows: Dataset, clear: Clear | None, audited: bool) -> dict[str, list[dict[str, str]]]:
    """A few rows of each decision: of those kept and dropped the least confident; none in columns of unknown names."""
    import numpy as np

    from clear_datasets.formats import FormatError
    from clear_datasets.infer_format import of_each, without_media

    if "clear_decision" not in rows.column_names or not len(rows):
        return {}
    rows = without_media(rows)
    scores = np.asarray(rows["clear_confidence"][:], dtype=float)
    decisions = np.array(rows["clear_decision"][:])
    found: dict[str, list[dict[str, str]]] = {}
    try:
        form_of = of_each(clear.format if clear else None, rows)
        for decision, title in _DECISIONS.items():
            chosen = np.flatnonzero((decisions == decision) & ~np.isnan(scores))
            chosen = chosen[np.argsort(scores[chosen], kind="stable")][:_EXAMPLES]
            found[title] = [_example(row, form_of(row), audited) for row in (rows[int(i)] for i in chosen)]
    except FormatError:
        return {}
    return {title: shown for title, shown in found.items() if shown}


def _example(row: Mapping[str, Any], form: Format, audited: bool) -> dict[str, str]:
    example = form.read(row)
    former, now = example.response, row.get("clear_candidate") or ""
    if not audited:  # curated by now
        former, now = row.get("clear_original") or former, former
    replaced = now if row["clear_decision"] == "replace" else ""
    return {
        "confidence": f"{row['clear_confidence']:.3f}",
        "prompt": _text(example.prompt[-1]["content"]),
        "target": _text(former if replaced else example.response),
        "candidate": _text(replaced),
    }


def _text(text: str) -> str:
    """Harmless in HTML and in Markdown, and short."""
    short = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
    return (
        html.escape(re.sub(r"\n\s*\n", "\n", short)).replace("`", "&#96;").replace("[", "&#91;").replace("$", "&#36;")
    )


def _cell(value: Any) -> str:
    return html.escape(str(value), quote=False).replace("|", "\\|").replace("\n", " ").replace("[", "&#91;")
