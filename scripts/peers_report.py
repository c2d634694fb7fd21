"""docs/benchmarks/peers.json as tables, put into README and docs/benchmarks.md: ``python scripts/peers_report.py``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NAMES = {
    "clear_server": "**clear_datasets**, by the server",
    "clear_vllm": "**clear_datasets**, vLLM in the process",
    "tlm_high": "TLM, preset high",
    "tlm_best": "TLM, preset best",
    "uqlm_ensemble": "uqlm, ensemble (BSDetector's)",
    "uqlm_judge": "uqlm, judge",
    "judge_1_to_5": "a grade from 1 to 5",
    "token_logprob": "mean token log-probability",
    "ifd": "IFD",
    "length": "length of the target",
    "random": "random",
}
HEAD = [
    "method", "rows", "AUROC", "less ours", "rows/s", "time over ours",
    "requests a row", "prompt tokens (cached)", "written", "failed",
]  # fmt: skip


def table(entry: dict[str, Any]) -> str:
    """What each method found on the rows of an entry, and what it took."""
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for name, told in entry["methods"].items():
        found = told["summary"]
        less = found.get("auroc_less_ours")
        over = found.get("seconds_over_ours")
        asked = ["", "", ""]
        if found.get("requests_per_row"):
            read, known = found["prompt_tokens_per_row"], found["cached_prompt_tokens_per_row"]
            numbers = found["requests_per_row"], found["generated_tokens_per_row"]
            asked = [f"{numbers[0]:.0f}", f"{read:,.0f} ({known:,.0f})", f"{numbers[1]:.0f}"]
        cells = [
            NAMES[name], str(found["rows"]), "{:.3f} ({:.3f} to {:.3f})".format(*found["auroc"]),
            "{:+.3f} ({:+.3f} to {:+.3f})".format(*less) if less else "",
            f"{found['rows_per_second']:.3f}" if "rows_per_second" in found else "",
            SPREAD[over["least"] < over["most"]].format(**over) if over else "",
            *asked, str(found["unscored"]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SPREAD = {False: "{median:.1f}", True: "{median:.1f} ({least:.1f} to {most:.1f})"}  # of several blocks
BRIEF = {
    "clear_server": "clear_datasets, by a server",
    "clear_vllm": "in the process",
    "tlm_high": "TLM",
    "uqlm_ensemble": "uqlm",
    "uqlm_judge": "uqlm's judge",
    "judge_1_to_5": "a grade",
}
TASKS = {
    "squad_wrong_sentence": "SQuAD, wrong sentences",
    "gsm8k": "GSM8K, wrong solutions",
    "arc": "ARC, wrong letters",
}


def brief(entries: list[dict[str, Any]]) -> str:
    """AUROC and time of the methods that ask the model, for the README."""
    lines = [f"| rows | {' | '.join(BRIEF.values())} |", "|---" * (len(BRIEF) + 1) + "|"]
    for entry in entries:
        cells = []
        for name in BRIEF:
            found = entry["methods"].get(name, {}).get("summary")
            over = f" ({found['seconds_over_ours']['median']:.1f})" if found and "seconds_over_ours" in found else ""
            cells.append(f"{found['auroc'][0]:.2f}{over}".removeprefix("0") if found else "")
        lines.append(f"| {TASKS[entry['task']]}, {sizes(entry)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sizes(entry: dict[str, Any]) -> int:
    """Rows that were scored so far."""
    return max(told["summary"]["rows"] for told in entry["methods"].values())


def filled(page: str, readme: str, entries: list[dict[str, Any]]) -> tuple[str, str]:
    """Both texts with the tables, numbers of rows and commands of the entries; what is said of them stays."""
    for entry in entries:
        head = f"{TASKS[entry['task']]}, {sizes(entry)} of {entry['rows']} rows so far:"
        page = _put(
            rf"{TASKS[entry['task']]}, \d+ of \d+ rows so far:\n\n(\|.*\n)+", f"{head}\n\n{table(entry)}\n", page
        )
        for command in {told["command"] for told in entry["methods"].values()}:
            page = _put(re.escape(re.sub(r" --rows \d+", "", command)) + r"( --rows \d+)?\n", f"{command}\n", page)
    return page, _put(r"\| rows \| clear_datasets, by a server.*\n(\|.*\n)+", f"{brief(entries)}\n", readme)


def _put(pattern: str, new: str, text: str) -> str:
    found, count = re.subn(pattern, lambda _: new, text)
    if not count:
        raise ValueError(f"nothing in the page matches {pattern}")
    return found


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    files = root / "docs" / "benchmarks.md", root / "README.md"
    every = json.loads((root / "docs" / "benchmarks" / "peers.json").read_text())
    for file, text in zip(files, filled(*(f.read_text() for f in files), every), strict=True):
        file.write_text(text)
