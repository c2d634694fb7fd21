"""A look at scored rows: a page with a threshold to move, and a figure for notebooks and cards."""

from __future__ import annotations

import base64
import html
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from clear_datasets.decide import Failed, threshold
from clear_datasets.files import write_text
from clear_datasets.formats import Format, FormatError
from clear_datasets.infer_format import of_each, without_media

if TYPE_CHECKING:
    import altair
    from datasets import Dataset

    from clear_datasets.calibrate import Calibration

_SIGNALS = ("confidence", "consistency", "reflection", "preference", "position_bias")
_LONGEST = 2000  # characters of a text on the page
_COLOURS = {"keep": "#4c78a8", "replace": "#e9a13b", "drop": "#c44e52", "scored": "#4c78a8"}


def plot(ds: Dataset, gamma: float | None = None) -> altair.LayerChart:
    """How confident the model is in the targets: a histogram, by decision where there are decisions.

    Args:
        ds: Scored rows.
        gamma: A threshold to mark.

    Returns:
        A chart that a notebook shows, and that saves itself as PNG, SVG or HTML.

    Raises:
        ImportError: altair is not installed.
        TypeError: `ds` has several splits, or is a stream.
        ValueError: The rows have no scores.
    """
    _check_one(ds, "plot(ds[{!r}])")
    try:
        import altair as alt
    except ImportError as error:
        raise ImportError(f'plot() needs altair ({error}): pip install "clear-datasets[report]"') from error
    if "clear_confidence" not in ds.column_names:
        raise ValueError("no column 'clear_confidence': run ds = ds.map(clear.score, batched=True) first")
    scores = _numbers(ds, "confidence").astype(float)
    decisions = np.array(ds["clear_decision"][:] if "clear_decision" in ds.column_names else ["scored"] * len(ds))
    bars = []
    for decision in dict.fromkeys(decisions.tolist()):
        counts, edges = np.histogram(scores[(decisions == decision) & ~np.isnan(scores)], bins=40, range=(0, 1))
        bars += [
            {"from": float(a), "to": float(b), "rows": int(n), "decision": decision}
            for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)
            if n
        ]
    shown = [decision for decision in _COLOURS if decision in decisions]
    base = (
        alt.Chart(alt.InlineData(values=bars))
        .mark_bar()
        .encode(
            x=alt.X("from:Q", bin="binned", title="confidence", scale=alt.Scale(domain=[0, 1])),
            x2="to:Q",
            y=alt.Y("rows:Q", title="rows", stack=True),
            color=alt.Color(
                "decision:N",
                title=None,
                scale=alt.Scale(domain=shown, range=[_COLOURS[decision] for decision in shown]),
            ),
            tooltip=["decision:N", "rows:Q", "from:Q", "to:Q"],
        )
    )
    marks = [{"gamma": gamma}] if gamma is not None else []
    rule = alt.Chart(alt.InlineData(values=marks)).mark_rule(strokeDash=[4, 4]).encode(x="gamma:Q")
    return alt.LayerChart(layer=[base, rule]).properties(width=480, height=220)


def report(
    ds: Dataset,
    out: str | os.PathLike[str],
    *,
    gamma: float | None = None,
    eta: float = 0.8,
    correct: Literal["low", "all"] = "low",
    agreed: Literal["drop", "keep"] = "drop",
    failed: Failed = "keep",
    format: Format | None = None,
    texts: int = 2000,
    title: str = "Curated rows",
    calibration: Calibration | None = None,
) -> str:
    """Write a page that shows scored rows, and what a threshold would keep, drop and replace as it is moved.

    One file, which asks nothing of a network: distribution of the confidence and its parts, rows on either side of the
    cuts, changes of replaced targets word by word, reasons of failures, and, where the noise is known, precision
    and recall. All figures are of all rows; their texts are those of `texts` rows, spread evenly over the confidence.

    Args:
        ds: Scored rows; with candidates and preferences, these are shown, too.
        out: An HTML file.
        gamma: Where the threshold stands at first; by default that of the calibration, else the median.
        eta: The same of preferences.
        correct: As for `decide`.
        agreed: As for `decide`.
        failed: As for `decide`; "raise" shows as "keep".
        format: Where rows keep prompt and target; inferred from the columns by default.
        texts: How many rows are on the page with their texts.
        title: Of the page.
        calibration: What `calibrate` has found; its signals and thresholds are shown, too.

    Returns:
        `out`.

    Raises:
        ImportError: vl-convert-python is not installed.
        TypeError: `ds` has several splits, or is a stream.
        ValueError: The rows have no scores.
    """
    _check_one(ds, "report(ds[{!r}], ...)")
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(f'report() needs vl-convert ({error}): pip install "clear-datasets[report]"') from error
    from jinja2 import Environment

    rows = ds.with_format(None)
    numbers = {name: _numbers(rows, name) for name in _SIGNALS if f"clear_{name}" in rows.column_names}
    if "confidence" not in numbers:
        raise ValueError("no column 'clear_confidence': run ds = ds.map(clear.score, batched=True) first")
    columns = {name: _packed(values) for name, values in numbers.items()}
    if {"noise", "noise_original"} <= set(rows.column_names):
        columns["noisy"] = _packed(np.array([bool(n) for n in rows["noise"]], dtype=np.uint8))
    if "clear_agreed" in rows.column_names:
        columns["agreed"] = _packed(np.array(rows["clear_agreed"][:], dtype=np.uint8))
    errors = Counter(e for e in rows["clear_error"] if e) if "clear_error" in rows.column_names else Counter()
    order = np.argsort(numbers["confidence"], kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(texts, len(order))).round().astype(int))]
    if gamma is None:
        gamma = calibration.gamma if calibration else threshold(rows)
    data = {
        "columns": columns,
        "gamma": gamma,
        "eta": eta,
        "rules": {"correct": correct, "agreed": agreed, "failed": failed},
        "rows": _texts(rows, sorted(chosen.tolist()), format),
        "failures": errors.most_common(20),
        "about": f"{len(rows):,} row{'s' * (len(rows) != 1)}",
    }
    folder = files("clear_datasets").joinpath("page")
    page = Environment().from_string(
        folder.joinpath("page.html.jinja").read_text(encoding="utf-8")
    )  # what is of the data is escaped
    whole = page.render(
        title=html.escape(title),
        calibration=calibration,
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
        library=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script"),
        data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    )
    write_text(Path(out), whole)
    return os.fspath(out)


def _check_one(ds: Any, call: str) -> None:
    if isinstance(ds, Mapping):
        names = [str(name) for name in ds] or ["train"]
        raise TypeError(f"got a {type(ds).__name__} of {', '.join(names)}; expected one split: {call.format(names[0])}")
    if not hasattr(ds, "__len__"):
        raise TypeError(
            f"got a stream ({type(ds).__name__}), which is read row by row; expected a Dataset, which has all of them: "
            "ds = Dataset.from_list(list(ds), features=ds.features)"
        )


def _numbers(rows: Dataset, name: str) -> npt.NDArray[np.float32]:
    return np.asarray(rows.select_columns(f"clear_{name}").with_format("arrow")[:][0].to_numpy(), dtype=np.float32)


def _packed(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(values.tobytes()).decode()


def _texts(rows: Dataset, chosen: list[int], format: Format | None) -> list[dict[str, Any]]:
    if not chosen:
        return []
    rows = without_media(rows)
    form_of = of_each(format, rows)
    return [{"i": i, **_shown(row, form_of)} for i, row in zip(chosen, rows.select(chosen), strict=True)]


def _shown(row: Mapping[str, Any], form_of: Callable[[Mapping[str, Any]], Format]) -> dict[str, Any]:
    try:
        example = form_of(row).read(row)
        prompt, target = example.prompt[-1]["content"], example.response
    except FormatError:
        prompt, target = json.dumps({k: v for k, v in row.items() if not k.startswith("clear_")}, default=str), ""
    made = "noise" if "noise_original" in row else ""  # by clear_datasets.noise; a column of one's own may be anything
    more = {name: row.get(column) for name, column in
            (("candidate", "clear_candidate"), ("error", "clear_error"), ("noise", made))}  # fmt: skip
    texts = {"prompt": prompt, "target": target, **{name: text for name, text in more.items() if text}}
    shown = {name: text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …" for name, text in texts.items()}
    cut = [name for name, text in texts.items() if len(text) > _LONGEST]
    return {**shown, "cut": cut} if cut else shown
