"""Whether what `calibrate` predicts and fits holds on other rows and on noise that it has not seen.

    python scripts/benchmark_calibrate.py --model 0.5b --out docs/benchmarks/calibrate.json

Calibrates on rows that no other figure is reported on, with one kind of noise; then scores other rows with other
noise, among it wrong solutions of real models, with the weights as they are by default and with the fitted ones. A run
that was broken off goes on behind the last calibration or the last scored rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from datasets import Dataset
from get_model import MODELS, fetch
from this_run import this_run

from clear_datasets import BSDetector, Clear, calibrate, infer
from clear_datasets import noise as makers
from clear_datasets.engines import default_engine
from clear_datasets.intervals import bootstrap, share
from clear_datasets.noise import auroc

DATA = Path(__file__).parent / "data"
FRACTION = 0.2
FITS = {  # file, half, rows, noise that is put in
    "SQuAD, swapped targets": ("squad", "choose", 200, "swap"),
    "SQuAD, wrong sentences": ("squad", "choose", 200, "wrong_sentence"),
    "GSM8K, swapped solutions": ("gsm8k_short", None, 120, "swap"),
    "GSM8K, wrong numbers": ("gsm8k_short", None, 120, "wrong_number"),
}
TESTS = {  # None: the noise that is there, wrong solutions of real models
    "SQuAD, swapped targets": ("squad", "report", 203, "swap"),
    "SQuAD, wrong sentences": ("squad", "report", 203, "wrong_sentence"),
    "GSM8K, errors of real models": ("gsm8k", "report", 100, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="0.5b or 1.5b (scripts/get_model.py), or any other model")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    model = str(fetch(args.model)) if args.model in MODELS else args.model
    result = json.loads(args.out.read_text()) if args.out.exists() else {"fits": {}, "tests": {}}
    if result.get("model", Path(model).name) != Path(model).name:
        raise SystemExit(f"{args.out} is of {result['model']}: give another --out")
    result |= {**this_run(), "model": Path(model).name}
    for name, (file, half, count, kind) in FITS.items():
        if name not in result["fits"]:
            result["fits"][name] = fit(model, rows_of(file, half, count), kind)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, (file, half, count, kind) in TESTS.items():
        if set(FITS) - set(result["tests"].get(name, {}).get("fitted", ())):
            rows = rows_of(file, half, count)
            noisy = makers.MAKERS[kind](rows, FRACTION, 1) if kind else rows
            result["tests"][name] = test(model, noisy, result["fits"])
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def rows_of(file: str, half: str | None, count: int) -> Dataset:
    rows = Dataset.from_json(str(DATA / f"{file}.jsonl"))
    if half:
        rows = rows.filter(lambda h: h == half, input_columns="half").remove_columns("half")
    return rows.select(range(min(count, len(rows))))


def fit(model: str, rows: Dataset, kind: str) -> dict[str, Any]:
    found = calibrate(Clear(model), rows, noise=[kind], fraction=FRACTION, rows=len(rows))
    estimator = found.clear.confidence
    assert isinstance(estimator, BSDetector)
    return {
        "rows": len(rows), "alpha": estimator.alpha, "beta": estimator.beta,
        "signals": {name: rounded(value) for name, value in found.signals.items()},
        "recall at the median": rounded(min(found.thresholds, key=lambda t: abs(t.kept - 0.5)).recall),
        "notes": found.notes,
    }  # fmt: skip


def test(model: str, rows: Dataset, fits: dict[str, Any]) -> dict[str, Any]:
    """AUROC with each fit's weights less that with the default's, and the recall of wrong rows at the median."""
    examples = [infer(rows.features).read(row) for row in rows]
    found = BSDetector()(examples, default_engine(model))
    good = np.array([not n for n in rows["noise"]])

    def scores(alpha: float, beta: float) -> npt.NDArray[np.float64]:
        parts = ((alpha * beta, found.similarity), ((1 - alpha) * beta, found.agreement), (1 - beta, found.reflection))
        return sum((w * p.astype(float) for w, p in parts if w), np.zeros(len(good)))

    def figures(values: npt.NDArray[np.float64]) -> dict[str, Any]:
        return {
            "auroc": rounded(bootstrap(lambda d: auroc(values[d].tolist(), good[d].tolist()), len(good))),
            "recall at the median": rounded(share(values[~good] <= np.nanmedian(values))),
        }

    usual = scores(0.5, 0.7)
    result = {"rows": len(rows), "wrong": int((~good).sum()), **figures(usual), "fitted": {}}
    for name, one in fits.items():
        own = scores(one["alpha"], one["beta"])

        def gain(d: npt.NDArray[np.int64], own: npt.NDArray[np.float64] = own) -> float:
            return auroc(own[d].tolist(), good[d].tolist()) - auroc(usual[d].tolist(), good[d].tolist())

        result["fitted"][name] = {**figures(own), "gain": rounded(bootstrap(gain, len(good)))}
    return result


def rounded(values: Any) -> list[float]:
    return [round(float(v), 3) for v in values]


def table(result: dict[str, Any]) -> str:
    """In Markdown: every fit on every other rows."""
    lines = ["| calibrated on | weights alpha, beta | tested on | AUROC by default | AUROC, fitted less default | "
             "recall at the median, predicted | measured |", "|" + "---|" * 7]  # fmt: skip
    for name, fitted in result["fits"].items():
        for rows, tested in result["tests"].items():
            own = tested["fitted"][name]
            figures = [shown(tested["auroc"]), shown(own["gain"], "+")]
            figures += [shown(of["recall at the median"]) for of in (fitted, own)]
            cells = [name, f"{fitted['alpha']}, {fitted['beta']}", rows, *figures]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(values: list[float], sign: str = "") -> str:
    value, low, high = (f"{v:{sign}.3f}" for v in values)
    return f"{value} ({low} to {high})"


if __name__ == "__main__":
    main()
