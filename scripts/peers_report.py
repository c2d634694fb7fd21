"""The tables of docs/benchmarks/peers.json: ``python scripts/peers_report.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = {
    "clear_vllm": "**clear_datasets**, vLLM in the process",
    "clear_server": "**clear_datasets**, the server",
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


def table(entry: dict[str, Any]) -> str:
    """What each method found on the rows of an entry, and what it took."""
    lines = [
        "| method | AUROC | less ours | rows/s | requests a row | prompt tokens (cached) | written | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in entry["methods"].items():
        score, low, high = found["auroc"]
        less = "{:+.3f} ({:+.3f} to {:+.3f})".format(*found["auroc_less_ours"]) if name != "clear_vllm" else ""
        rate = f"{found['rows_per_second']:.3f}" if "rows_per_second" in found else ""
        asked = ["", "", ""]
        if found.get("requests_per_row"):
            read, known = found["prompt_tokens_per_row"], found["cached_prompt_tokens_per_row"]
            numbers = found["requests_per_row"], found["generated_tokens_per_row"]
            asked = [f"{numbers[0]:.0f}", f"{read:,.0f} ({known:,.0f})", f"{numbers[1]:.0f}"]
        cells = [NAMES[name], f"{score:.3f} ({low:.3f} to {high:.3f})", less, rate, *asked, str(found["unscored"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for each in json.loads((Path(__file__).parents[1] / "docs" / "benchmarks" / "peers.json").read_text()):
        print(f"{each['task']}, {each['rows']} rows, {each['model']}\n\n{table(each)}\n")
