"""Scores of uqlm for given answers; benchmark_peers.py runs it in .venv-uqlm.

    .venv-uqlm/bin/python scripts/peers_uqlm.py --rows rows.json --out scores.json --url http://127.0.0.1:8211/v1

The ensemble is the package's own BSDetector. Where the folder of models lacks the NLI model that it compares with, the
package's cosine similarity of sentence embeddings takes that one's place and weight. `--judge` is one LLM judge alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

NLI = "microsoft/deberta-large-mnli"
WEIGHTS = [0.7 * 0.8, 0.7 * 0.2, 0.3]  # similarity, equality, judge: those of the package's own ensemble
MAX_TOKENS = 512  # as TLM's; without a limit a small model at temperature 1 may run on for thousands of tokens


def chat_model(url: str, model: str, most: int) -> Any:
    from langchain_openai import ChatOpenAI

    gate = asyncio.Semaphore(most)

    class Gated(ChatOpenAI):
        """At most so many requests at a time: uqlm sends those of all rows at once."""

        async def _agenerate(self, *given: Any, **settings: Any) -> Any:
            async with gate:
                return await super()._agenerate(*given, **settings)

    # The judge's temperature; samples are drawn at uqlm's sampling temperature, 1.
    return Gated(model=model, base_url=url, api_key="none", temperature=0.0, max_tokens=MAX_TOKENS)


def ensemble(llm: Any) -> tuple[Any, str]:
    from uqlm import UQEnsemble

    similarity = "noncontradiction" if Path(NLI).is_dir() else "cosine_sim"
    # use_best would put another answer into the place of the one that is to be scored.
    return UQEnsemble(llm, [similarity, "exact_match", llm], weights=WEIGHTS, use_best=False), similarity


async def score_ensemble(scorer: Any, prompts: list[str], answers: list[str], samples: int) -> list[dict[str, Any]]:
    drawn = await scorer.generate_candidate_responses(prompts, num_responses=samples)
    found = await scorer.score(prompts, answers, sampled_responses=drawn, show_progress_bars=False)
    names = {name: name for name in scorer.component_names} | {"ensemble_scores": "score"}
    return [{names[n]: found.data[n][i] for n in names} for i in range(len(prompts))]


async def score_judge(panel: Any, prompts: list[str], answers: list[str], _: int) -> list[dict[str, Any]]:
    found = await panel.score(prompts, answers, show_progress_bars=False)
    return [{"score": score} for score in found.data["judge_1"]]


async def score_rows(score: Any, scorer: Any, rows: list[dict[str, Any]], samples: int) -> list[dict[str, Any]]:
    """In halves where a request fails: uqlm gives up the whole batch for it."""
    prompts = ["\n\n".join(m["content"] for m in row["messages"]) for row in rows]  # it takes no chats with a judge
    try:
        return await score(scorer, prompts, [row["response"] for row in rows], samples)
    except Exception as error:
        if len(rows) == 1:
            return [{"score": None, "reason": f"{type(error).__name__}: {error}"[:200]}]
    half = len(rows) // 2
    return [each for part in (rows[:half], rows[half:]) for each in await score_rows(score, scorer, part, samples)]


async def run(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from uqlm import LLMPanel

    llm = chat_model(args.url, args.model, args.concurrency)
    scorer, similarity = (LLMPanel([llm]), "") if args.judge else ensemble(llm)
    started = time.perf_counter()
    every = await score_rows(score_judge if args.judge else score_ensemble, scorer, rows, args.samples)
    seconds = time.perf_counter() - started

    def column(name: str) -> list[float | None]:
        values = [each.get(name) for each in every]
        return [None if v is None or math.isnan(v) else float(v) for v in values]

    scores, unread = column("score"), "the judge's answers could not be read"
    missing = {i: every[i].get("reason", unread) for i, score in enumerate(scores) if score is None}
    parts = {name: column(name) for name in ([] if args.judge else scorer.component_names)}
    found = {"scores": scores, "reasons": missing, "parts": parts, "seconds": seconds}
    return found if args.judge else found | {"similarity": similarity}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="served")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--judge", action="store_true", help="one LLM judge instead of the ensemble")
    parser.add_argument("--models", type=Path, default=Path(__file__).parents[1] / ".venv-uqlm/models")
    args = parser.parse_args()
    rows, out = json.loads(args.rows.read_text()), args.out.resolve()
    if args.models.is_dir():
        os.chdir(args.models)  # a folder by the name of a Hub id is taken for it, and the ensemble lets name no other
    found = asyncio.run(run(args, rows))
    packages = ("uqlm", "langchain-openai", "openai", "sentence-transformers", "transformers", "torch")
    out.write_text(json.dumps(found | {"versions": {name: version(name) for name in packages}}))


if __name__ == "__main__":
    main()
