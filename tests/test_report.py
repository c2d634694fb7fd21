"""The report, driven in a real browser."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from clear_datasets import Clear, decide
from clear_datasets.calibrate import Calibration, Threshold
from clear_datasets.report import plot, report
from tests.test_cli import run

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

NAN = float("nan")
BAD = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt=1'> [x](javascript:alert(1))"


def judged(n: int) -> Dataset:
    draw = np.random.default_rng(0)
    scores, better = draw.random(n).astype("float32"), draw.random(n).astype("float32")
    scores[1] = NAN
    has = np.arange(n) % 3 == 0
    return Dataset.from_dict({
        "question": [f"Where is {i}? {BAD}" for i in range(n)],
        "answer": [f"at place number {i}" for i in range(n)],
        "clear_confidence": scores,
        "clear_consistency": scores[::-1].copy(),
        "clear_reflection": draw.random(n).astype("float32"),
        "clear_error": ["", "column 'question' is empty", *[""] * (n - 2)],
        "clear_candidate": [f"at the place {i}" if x else "" for i, x in enumerate(has)],
        "clear_preference": np.where(has, better, NAN).astype("float32"),
        "clear_position_bias": np.where(has, 0.25, NAN).astype("float32"),
        "noise": ["swap" if s < 0.2 else "" for s in scores],
        "noise_original": [""] * n,
    })  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no browser is installed: apt-get install chromium")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a report, and collects what goes wrong and what it asks of a network."""
    problems: list[str] = []

    def open_(rows: Dataset, scheme: str = "light", **options):
        file = report(rows, tmp_path / "report.html", **options)
        page = browser.new_page(color_scheme=scheme, accept_downloads=True)
        page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on(
            "request", lambda r: problems.append(r.url) if not r.url.startswith(("file:", "data:", "blob:")) else None
        )
        page.goto(Path(file).as_uri())
        page.wait_for_selector("#chart svg")
        return page

    yield open_
    assert problems == []


def numbers(text: str) -> list[int]:
    return [int(word.replace(",", "")) for word in text.replace(";", " ").split() if word.replace(",", "").isdigit()]


def wanted(rows: Dataset, gamma: float, eta: float) -> list[int]:
    counts = Counter(rows.map(decide(gamma, eta), batched=True)["clear_decision"])
    return [counts["keep"], counts["drop"], counts["replace"], 1]


def test_sliders_show_what_decide_would_do(opened):
    rows = judged(400)
    page = opened(rows, gamma=0.5)
    assert numbers(page.inner_text("#counts")) == wanted(rows, 0.5, 0.8)
    page.fill("#gamma-number", "0.3333")
    assert numbers(page.inner_text("#counts")) == wanted(rows, 0.3333, 0.8)
    page.fill("#eta-number", "0.1")
    assert numbers(page.inner_text("#counts")) == wanted(rows, 0.3333, 0.1)
    page.focus("#gamma")
    before = float(page.input_value("#gamma"))
    page.keyboard.press("ArrowRight")  # by the keyboard alone
    after = float(page.input_value("#gamma"))
    assert after == pytest.approx(before + 0.001, abs=2e-4)
    assert numbers(page.inner_text("#counts")) == wanted(rows, after, 0.1)
    scores = np.array(rows["clear_confidence"][:], dtype=float)
    above, below = (
        float(page.inner_text(f"#{s} li:first-child .label").rpartition(" ")[2]) for s in ("above", "below")
    )
    assert below <= after < above
    assert above == pytest.approx(np.nanmin(scores[scores > after]), abs=1e-4)
    noisy = np.array([bool(n) for n in rows["noise"]])
    out = ~np.isnan(scores) & (scores <= after)
    assert numbers(page.inner_text("#noise")) == [noisy.sum(), (noisy & out).sum(), out.sum()]
    assert "column 'question' is empty" in page.inner_text("#failures")
    assert "0.250 on average" in page.inner_text("#judge")


def test_the_candidates_on_either_side_of_eta_are_shown_with_their_changes(opened):
    rows = judged(400)
    page = opened(rows, gamma=0.5)
    scores, better = (np.array(rows[f"clear_{name}"][:], dtype=float) for name in ("confidence", "preference"))
    open_ = (scores <= 0.5) & ~np.isnan(better)
    for eta in (0.8, 0.3):
        page.fill("#eta-number", str(eta))
        for place, wanted_ in (
            ("above", np.sort(better[open_ & (better > eta)])[:5]),
            ("below", np.sort(better[open_ & (better <= eta)])[::-1][:5]),
        ):
            labels = page.locator(f"#eta-{place} .label").all_inner_texts()
            assert [float(label.rpartition(" ")[2]) for label in labels] == pytest.approx(wanted_, abs=1e-4)
            for label, text in zip(labels, page.locator(f"#eta-{place} li").all_inner_texts(), strict=True):
                i = int(label.split()[1].rstrip(","))
                assert f"Where is {i}?" in text
            assert page.inner_text(f"#eta-{place} li:first-child ins") == "the "
            assert page.inner_text(f"#eta-{place} li:first-child del") == "number "
    page.fill("#eta-number", "1")
    assert page.inner_text("#eta-above") == "none"
    page.fill("#gamma-number", "0.05")
    assert len(page.locator("#eta-below li").all()) == min(5, (~np.isnan(better) & (scores <= 0.05)).sum())


@pytest.mark.parametrize("rules", [{"failed": "drop"}, {"agreed": "keep"}, {"correct": "all", "agreed": "keep"}])
def test_decisions_follow_the_rules_that_were_given(opened, rules):
    rows = judged(200)
    rows = rows.add_column("clear_agreed", [i % 3 == 1 for i in range(200)])
    page = opened(rows, gamma=0.5, **rules)
    counts = Counter(rows.map(decide(0.5, **rules), batched=True)["clear_decision"])
    assert numbers(page.inner_text("#counts")) == [counts["keep"], counts["drop"], counts["replace"], 1]


def test_the_command_shows_the_rules_that_curate_has_kept(tmp_path):
    judged(20).to_parquet(tmp_path / "rows.parquet")
    settings = {"gamma": 0.3, "eta": 0.9, "keep_agreed": True, "failed": "drop"}
    (tmp_path / "rows.parquet.settings.json").write_text(json.dumps(settings))
    done = run("report", tmp_path / "rows.parquet")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "rows.parquet.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert (data["gamma"], data["eta"]) == (0.3, 0.9)
    assert data["rules"] == {"correct": "low", "agreed": "keep", "failed": "drop"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(opened, scheme):
    rows = judged(60)
    cuts = [Threshold(0.25, 0.8, (0.9, 0.8, 1.0), (0.5, 0.4, 0.6))]
    found = Calibration(Clear("m"), 0.25, {"direct, Jaccard: similarity": (0.75, 0.7, 0.8)}, cuts, rows, ["a note"])
    page = opened(rows, scheme, calibration=found)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.eval_on_selector("#body .text", "e => e.clientWidth") > 300  # and no column of single letters


def test_candidates_that_were_judged_by_themselves_have_no_position_bias(opened):
    rows = judged(30)
    no_bias = [NAN if np.isnan(b) else 0.0 for b in rows["clear_position_bias"]]
    rows = rows.remove_columns("clear_position_bias").add_column("clear_position_bias", no_bias)
    assert "10 candidates were judged, each by itself" in opened(rows).inner_text("#judge")


def test_long_prompts_are_short_at_the_cut_and_whole_in_the_table(opened):
    long = "Here it begins. " + "word " * 300 + "What is asked?"
    page = opened(Dataset.from_dict({"question": [long], "answer": ["x"], "clear_confidence": [0.5]}), gamma=0.4)
    cut = page.inner_text("#above .text >> nth=0")
    assert len(cut) < 520
    assert cut.startswith("Here it begins.")
    assert cut.endswith("What is asked?")
    assert page.inner_text("#body .text >> nth=0") == long
    assert page.inner_text("#below") == "none"


def test_texts_that_are_cut_off_say_so_also_in_the_download(opened):
    rows = {"question": ["Where?", "x" * 3000], "answer": ["y" * 3000, "here"], "clear_confidence": [0.2, 0.9]}
    page = opened(Dataset.from_dict(rows), gamma=0.5)
    assert "Long texts are cut off" in page.inner_text("#sampled")
    with page.expect_download() as download:
        page.click("#download")
    lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert {line["row"]: line["cut"] for line in lines} == {0: ["target"], 1: ["prompt"]}
    assert "cut off" not in opened(judged(10)).inner_text("#sampled")


def test_what_calibrate_found_is_shown(opened):
    rows = judged(50)
    cuts = [Threshold(0.25, 0.8, (0.9, 0.8, 1.0), (0.5, 0.4, 0.6))]
    found = Calibration(Clear("m"), 0.25, {f"signal {BAD}": (0.75, 0.7, 0.8)}, cuts, rows, [f"a note {BAD}"])
    page = opened(rows, calibration=found)
    assert page.input_value("#gamma-number") == "0.25"
    cells = page.locator("#signals tbody td").all_inner_texts()
    assert cells == [f"signal {BAD}", "0.750 (0.70 to 0.80)"]
    cells = page.locator("#thresholds tbody td").all_inner_texts()
    assert cells == ["80%", "0.250", "0.90 (0.80 to 1.00)", "0.50 (0.40 to 0.60)"]
    assert f"a note {BAD}" in page.inner_text("main")
    assert "gamma = 0.2500 is recommended" in page.inner_text("main")
    assert page.evaluate("window.hurt") is None


def test_search_sort_filter_and_download(opened):
    rows = judged(400)
    page = opened(rows, gamma=0.5)
    page.fill("#search", "number 39")
    assert page.inner_text("#found") == "14 rows"  # 39, 139, 239, 339, and 390 to 399
    page.click("#heads button:text-is('row')")
    assert page.inner_text("#body tr:first-child td") == "39"
    page.click("#heads button:text-is('row')")
    assert page.inner_text("#body tr:first-child td") == "399"
    assert page.get_attribute("#heads th:first-child", "aria-sort") == "descending"
    page.fill("#search", "")
    page.select_option("#decision", "replace")
    decisions = rows.map(decide(0.5), batched=True)["clear_decision"][:]
    with page.expect_download() as download:
        page.click("#download")
    lines = [json.loads(line) for line in Path(download.value.path()).read_text().splitlines()]
    assert [line["row"] for line in lines] == [i for i in range(399, -1, -1) if decisions[i] == "replace"]
    first = lines[0]
    assert (first["prompt"], first["target"]) == (rows[first["row"]]["question"], rows[first["row"]]["answer"])
    assert page.inner_text("#body tr:first-child ins") == "the "
    assert page.inner_text("#body tr:first-child del") == "number "
    page.select_option("#decision", "")
    page.click("#next")
    assert page.inner_text("#page") == "page 2 of 8"
    page.select_option("#signal", "consistency")
    assert "consistency" in page.get_attribute("#chart", "aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_data_does_nothing_and_every_control_has_a_name(opened, scheme):
    page = opened(judged(30), scheme, title=BAD)
    assert page.evaluate("window.hurt") is None
    assert page.title() == BAD
    assert not page.query_selector("main img, main a")
    nameless = "e => !e.labels?.length && !e.getAttribute('aria-label') && !e.textContent.trim()"
    assert page.eval_on_selector_all("input, select, button", f"all => all.filter({nameless}).length") == 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(22, 24, 27)") == (scheme == "dark")


def test_rows_without_candidates_and_without_a_known_format(opened):
    rows = Dataset.from_dict({"q": ["Where?"] * 3, "clear_confidence": [0.1, 0.5, 0.9]})
    with pytest.raises(ValueError, match="found the columns"):
        report(rows, "unused.html")
    scored = Dataset.from_dict(
        {"question": ["Where?"] * 3, "answer": ["a", "b", ""], "clear_confidence": [0.1, 0.5, 0.9]}
    )
    page = opened(scored)
    assert not page.is_visible("#eta")
    assert page.inner_text("#counts").startswith("2 kept")
    with pytest.raises(ValueError, match="no column 'clear_confidence'"):
        report(rows.remove_columns("clear_confidence"), "unused.html")


@pytest.mark.parametrize("show", [report, plot])
def test_several_splits_are_refused_with_the_call_for_one(show, tmp_path):
    splits = DatasetDict(train=judged(3), test=judged(3))
    with pytest.raises(
        TypeError, match=rf"DatasetDict of train, test; expected one split: {show.__name__}\(ds\['train'"
    ):
        show(splits, tmp_path / "report.html")


def test_100_000_rows_open_in_3_seconds(opened):
    rows = judged(100_000)
    opened(judged(10)).close()  # the browser is warm
    page = opened(rows)
    times = []
    for _ in range(3):  # the least of them: the machine may be busy with something else
        page.reload()
        timing = "performance.timing.domContentLoadedEventEnd - performance.timing.navigationStart"
        times.append(page.evaluate(timing) / 1000)
    assert min(times) < 3, times
    assert "2,000 of 100,000 rows" in page.inner_text("#sampled")
    assert numbers(page.inner_text("#counts"))[0] == pytest.approx(50_000, abs=1)


def test_a_figure_for_notebooks(tmp_path):
    rows = judged(50).map(decide(0.5), batched=True)
    plot(rows, gamma=0.5).save(str(tmp_path / "plot.png"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = json.dumps(plot(rows).to_dict())
    assert all(f'"{decision}"' in shown for decision in ("keep", "drop", "replace"))
    with pytest.raises(ValueError, match="no column 'clear_confidence'"):
        plot(rows.remove_columns("clear_confidence"))


def test_a_noise_column_of_ones_own_is_a_column_like_others(opened):
    rows = judged(40).remove_columns(["noise_original", "noise"]).add_column("noise", list(range(40)))
    page = opened(rows, gamma=0.5)
    assert page.locator("#above li").count()


@pytest.mark.parametrize("show", [report, plot])
def test_streams_are_refused_with_the_way_out(show, tmp_path):
    stream = judged(3).to_iterable_dataset()
    with pytest.raises(TypeError, match=r"got a stream \(IterableDataset\).*: ds = Dataset.from_list\(list\(ds\)"):
        show(stream, tmp_path / "report.html")
    show(Dataset.from_list(list(stream), features=stream.features), *[tmp_path / "report.html"] * (show is report))
