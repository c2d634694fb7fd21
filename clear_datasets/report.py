"""A look at scored rows: a figure for notebooks and cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import altair
    from datasets import Dataset

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
        ValueError: The rows have no scores.
    """
    try:
        import altair as alt
    except ImportError as error:
        raise ImportError(f'plot() needs altair ({error}): pip install "clear-datasets[report]"') from error
    import numpy as np

    if "clear_confidence" not in ds.column_names:
        raise ValueError("no column 'clear_confidence': run ds = ds.map(clear.score, batched=True) first")
    scores = np.asarray(ds.with_format(None)["clear_confidence"][:], dtype=float)
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
            x=alt.X("from:Q", title="confidence", scale=alt.Scale(domain=[0, 1])),
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
