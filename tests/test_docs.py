"""The figures of README and docs are those of docs/benchmarks/*.json, beside the commands that made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
README = (ROOT / "README.md").read_text()
ENTRIES = json.loads((ROOT / "docs" / "benchmarks" / "auroc.json").read_text())


def short(value: float) -> str:
    return f"{value:.3f}".lstrip("0")


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['task']}-{e['model'].split('-')[2]}-{e['rows']}")
def test_the_table_of_confidence_is_that_of_the_results(entry):
    shown = [
        short(entry["scores"][name]["auroc"][0])
        for name in ("default: consistency", "default: reflection", "direct, jaccard only: consistency",
                     "target length, shorter is better", "mean token log-probability of the target")
        if name in entry["scores"]
    ]  # fmt: skip
    score, low, high = map(short, entry["scores"]["default: confidence"]["auroc"])
    line = next((x for x in PAGE.splitlines() if f"**{score}** ({low} to {high})" in x), "")
    assert [cell for cell in map(str.strip, line.split("|")) if cell in shown] == shown, f"{score}: {line or 'no line'}"
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if "target length, shorter is better" in entry["scores"]:
        assert cells[7] == short(entry["scores"]["target length, shorter is better"]["auroc"][0])
    assert f"| {' | '.join([*cells[:4], cells[7]])} |" in README.splitlines()  # there with the length alone


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e['task']}-{e['model'].split('-')[2]}-{e['rows']}")
def test_every_result_names_the_one_run_that_made_it(entry):
    assert sorted(name for run in entry["runs"] for name in run["scores"]) == sorted(entry["scores"])
    assert all(run["command"] and run["machine"] and run["date"] for run in entry["runs"])


@pytest.mark.parametrize(
    ("task", "model", "least"),
    [
        ("squad_other_answer", "0.5b", 0.92),
        ("squad_wrong_sentence", "0.5b", 0.90),
        ("squad_other_answer", "1.5b", 0.96),
    ],
)
def test_the_default_finds_wrong_targets(task, model, least):
    entry = next(e for e in ENTRIES if e["task"] == task and model in e["model"])
    assert entry["half"] == "report"
    assert entry["rows"] >= 200
    assert entry["scores"]["default: confidence"]["auroc"][0] >= least


FORMS = {
    "SQuAD, answers to another question": "squad_other_answer",
    "SQuAD, wrong sentences": "squad_wrong_sentence",
    "ARC": "arc",
    "GSM8K": "gsm8k",
}


@pytest.mark.parametrize("rows", FORMS)
@pytest.mark.parametrize("form", ["direct", "reasoned"])
def test_the_table_of_the_forms_is_that_of_the_results(rows, form):
    scores = next(e["scores"] for e in ENTRIES if e["task"] == FORMS[rows] and "0.5b" in e["model"])
    names = [f"{form}, {s}{' only' * (form == 'direct')}: consistency" for s in ("jaccard", "embedding", "llm")]
    names.append("default: reflection" if form == "direct" else "reasoned, jaccard: reflection")
    expected = [short(scores[name]["auroc"][0]) if name in scores else "not measured" for name in names]
    assert f"| {rows} | {form} | {' | '.join(expected)} |" in PAGE.splitlines()


ENGINES = json.loads((ROOT / "docs" / "benchmarks" / "engines.json").read_text())


def test_vllm_loses_little_time_and_reads_little_twice():
    found = [e for e in ENGINES if e["compared"] == "score on vLLM with the floor"]
    assert found
    for entry in found:
        assert len(entry["pairs"]) >= 5
        assert entry["time_over_floor"]["median"] <= 1.05
        tokens = entry["tokens_per_row"]
        assert tokens["prefilled"] <= 1.3 * tokens["each distinct prompt once"]


def test_vllm_and_transformers_agree():
    [entry] = [e for e in ENGINES if e["compared"] == "vLLM with Transformers"]
    assert entry["label_prompts"] >= 200
    assert entry["most_that_a_label_differs"] <= 0.02
    assert abs(entry["auroc"]["vllm"] - entry["auroc"]["transformers"]) <= 0.02


def test_the_page_says_of_the_engines_what_was_measured():
    [floor] = [e for e in ENGINES if e["compared"] == "score on vLLM with the floor"]
    ratio, tokens = floor["time_over_floor"], floor["tokens_per_row"]
    times = f"{ratio['median']:.2f} times as long ({ratio['least']:.2f} to {ratio['most']:.2f}"
    counts = (
        f"Of {tokens['each distinct prompt once']:,.0f} prompt tokens a row, {tokens['prefilled']:.0f} are computed"
    )
    [each] = [e for e in ENGINES if e["compared"] == "score on every engine"]
    rates = [
        f"| {each['rows_per_second'][name]:.2f} ({low:.2f} to {high:.2f}) |"
        for name, (low, high) in each["least_and_most"].items()
    ]
    assert all(shown in PAGE for shown in (times, counts, *rates))
    assert f"`score` takes {ratio['median']:.2f} times as long as plain `vllm.LLM.generate`" in README


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "benchmarks").glob("reproduce_*.json")), ids=lambda f: f.stem)
def test_the_page_says_what_curation_gained(file, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from reproduce_report import tables

    result, shown = json.loads(file.read_text()), PAGE.splitlines()
    assert all(line in shown for line in tables(result).splitlines())
    assert result["runs"][-1]["command"] in shown
    if file.stem == "reproduce_squad":
        assert tables(result).partition("\n\n")[0] in README


def test_the_docs_say_how_far_calibrate_holds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_calibrate import table

    result = json.loads((ROOT / "docs" / "benchmarks" / "calibrate.json").read_text())
    shown = (ROOT / "docs" / "calibrate.md").read_text()
    assert table(result) in shown
    assert result["command"] in shown


@pytest.mark.parametrize("fitted", ["SQuAD, swapped targets", "SQuAD, wrong sentences"])
@pytest.mark.parametrize("tested", ["SQuAD, swapped targets", "SQuAD, wrong sentences"])
def test_calibrate_predicts_on_squad_what_the_median_finds_on_other_rows(fitted, tested):
    result = json.loads((ROOT / "docs" / "benchmarks" / "calibrate.json").read_text())
    predicted = result["fits"][fitted]["recall at the median"][0]
    measured = result["tests"][tested]["fitted"][fitted]["recall at the median"][0]
    assert abs(predicted - measured) <= 0.1


def test_the_docs_say_which_faults_were_survived(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from fault_test import table

    found = json.loads((ROOT / "docs" / "benchmarks" / "faults.json").read_text())
    shown = (ROOT / "docs" / "reliability.md").read_text()
    assert table(found) in shown
    assert all(entry["command"] in shown for entry in found)
    assert {(entry["engine"], entry["processes"]) for entry in found} >= {
        ("transformers", 1), ("transformers", 2), ("vllm", 1)
    }  # fmt: skip
    for entry in found:
        assert entry["rows lost"] == 0
        assert entry["asked twice"] <= entry["at most"]
        assert entry["kills"] >= (5 if entry["engine"] == "vllm" else 20)


def test_the_docs_say_what_the_cache_costs():
    found = json.loads((ROOT / "docs" / "benchmarks" / "cache.json").read_text())
    shown = (ROOT / "docs" / "reliability.md").read_text()
    ratio, rate = found["score on vLLM"]["time with the cache over time without"], found["look-ups"]
    assert ratio["median"] <= 1.03
    assert rate["looked up a second"] >= 20_000
    assert f"{ratio['median']:.3f} times as long ({ratio['least']:.3f} to {ratio['most']:.3f}" in shown
    assert f"{rate['looked up a second']:,} a second" in shown
    assert found["command"] in shown


def test_the_docs_say_that_a_long_stream_takes_no_more_memory():
    found = json.loads((ROOT / "docs" / "benchmarks" / "stream.json").read_text())
    shown = (ROOT / "docs" / "reliability.md").read_text()
    small, large = found["runs"]
    assert (small["rows"], large["rows"]) == (10_000, 1_000_000)
    assert large["anonymous_memory_mib"] <= 1.1 * small["anonymous_memory_mib"]
    for piece in (f"{large['rows_per_second']:,} rows/s, {large['anonymous_memory_mib']} MiB", found["command"],
                  f"{small['anonymous_memory_mib']} MiB with 10,000 rows"):  # fmt: skip
        assert piece in shown


def test_the_docs_say_what_adaptive_sampling_saves(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from benchmark_adaptive import table

    found = json.loads((ROOT / "docs" / "benchmarks" / "adaptive.json").read_text())
    shown = (ROOT / "docs" / "adaptive.md").read_text()
    assert table(found) in shown
    for task in found["tasks"]:
        assert task["command"] in shown
        assert task["equal decisions"] == task["rows"]
        assert task["threshold is that of all samples"]
    squad = next(t for t in found["tasks"] if t["task"] == "squad_wrong_sentence")
    assert squad["share of tokens saved"]["sampled"] >= 0.4
    solutions = next(t for t in found["tasks"] if t["task"] == "gsm8k")["runs"]["k = 5"]["auroc"]
    line = "| the same, by `BSDetector.math()` | wrong solutions of real models | 0.5B | **{}** ({} to {}) |"
    for text in (README, PAGE):
        assert line.format(*map(short, solutions)) in text


def test_the_docs_say_what_replicas_gain(monkeypatch):
    pytest.importorskip("simpy")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from simulate_scale import tables

    found = json.loads((ROOT / "docs" / "benchmarks" / "scale.json").read_text())
    shown = (ROOT / "docs" / "scale.md").read_text()
    assert all(part in shown for part in tables(found).split("\n\n"))
    assert all(found[part]["command"] in shown for part in ("check", "simulation"))
    for run in found["check"]["runs"]:
        assert abs(run["simulated / real"] - 1) <= 0.1
        assert run["speed-up per replica"] >= 0.9


def test_the_page_says_how_others_score(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from peers_report import brief, filled, table

    entries = json.loads((ROOT / "docs" / "benchmarks" / "peers.json").read_text())
    assert brief(entries) in (ROOT / "README.md").read_text()
    solutions = next(e for e in entries if e["task"] == "gsm8k")["methods"]["clear_server"]["parts"]["consistency"]
    assert f"for {solutions.count(0)} of the {len(solutions)} rows none of five samples" in PAGE
    assert filled(PAGE, README, entries) == (PAGE, README)
    for entry in entries:
        assert table(entry) in PAGE
        assert all(found["command"] in PAGE for found in entry["methods"].values())
