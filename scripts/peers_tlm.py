"""Scores of cleanlab's TLM (trustworthy-llm) for given answers; benchmark_peers.py runs it in .venv-tlm.

.venv-tlm/bin/python scripts/peers_tlm.py --rows rows.json --out scores.json --url http://127.0.0.1:8211/v1
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


def limit_requests(most: int) -> None:
    """At most so many requests at a time: TLM itself sends all of a row at once."""
    from tlm.utils import completion_utils

    gate, plain = asyncio.Semaphore(most), completion_utils.acompletion

    async def gated(**settings: Any) -> Any:
        async with gate:
            return await plain(**settings)

    completion_utils.acompletion = gated


async def score_all(rows: list[dict[str, Any]], preset: str, model: str, most: int) -> dict[str, Any]:
    from tlm import TLM
    from tlm.config.schema import Config

    limit_requests(most)
    tlm, gate = TLM(Config(quality_preset=preset)), asyncio.Semaphore(most)
    scores: list[float | None] = [None] * len(rows)
    reasons: dict[int, str] = {}

    async def score(position: int, row: dict[str, Any]) -> None:
        answer = {"chat_completion": {"choices": [{"message": {"role": "assistant", "content": row["response"]}}]}}
        async with gate:
            try:
                # Its public `score` waits for one row before it begins another.
                found = await tlm._async_inference(response=answer, messages=row["messages"], model=model)
            except Exception as error:
                reasons[position] = f"{type(error).__name__}: {error}"[:200]
                return
        score = found["trustworthiness_score"]
        if score is None or math.isnan(score):
            reasons[position] = "no request of this row gave a score"
        else:
            scores[position] = float(score)

    started = time.perf_counter()
    await asyncio.gather(*(score(i, row) for i, row in enumerate(rows)))
    return {"scores": scores, "reasons": reasons, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", default="served")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--preset", choices=["base", "low", "medium", "high", "best"], default="high")
    args = parser.parse_args()
    model = f"openai/{args.model}"
    # Reflections and comparisons take model, key and address from the environment alone.
    os.environ |= {"DEFAULT_MODEL": model, "DEFAULT_PROVIDER": "openai", "DEFAULT_API_KEY": "none"}
    os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": args.url, "OPENAI_API_BASE": args.url}
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would look for prices on the network
    found = asyncio.run(score_all(json.loads(args.rows.read_text()), args.preset, model, args.concurrency))
    found["versions"] = {name: version(name) for name in ("trustworthy-llm", "litellm", "openai")}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
