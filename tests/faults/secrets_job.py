"""All that writes something, once, with a server's key and a token of the Hub: a program for test_secrets.py.

python -m tests.faults.secrets_job FOLDER URL: the key comes from stdin, or, where that is empty, from the environment.
"""

from __future__ import annotations

import json
import logging
import pickle
import sys
import traceback
import warnings
from pathlib import Path

from datasets import load_dataset
from datasets.fingerprint import Hasher

from clear_datasets import BSDetector, Clear, curated, decide, push_to_hub, report, threshold
from clear_datasets.engines.openai import OpenAI
from clear_datasets.files import write
from clear_datasets.results import audit_file, keep_settings
from clear_datasets.stages import Stages


def main(folder: Path, url: str, key: str | None) -> None:
    logging.basicConfig(level=logging.DEBUG)  # of everybody, to stderr
    warnings.simplefilter("always")

    def engine(model: str) -> OpenAI:
        return OpenAI(model, url, api_key=key, concurrency=4, retries=1)

    clear = Clear("tiny", engine=engine("tiny"), confidence=BSDetector(k=2)).with_writer("writer")
    rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    ds = rows
    for step in (clear.score, clear.propose, clear.prefer):
        ds = ds.map(step, batched=True, batch_size=4)
    gamma = threshold(ds)
    ds = ds.map(decide(gamma), batched=True)
    scored = Stages(folder / "clear_stages", 4).score(rows, clear)  # as the command line does
    out = folder / "curated.jsonl"
    write(curated(ds), out)
    write(ds, audit_file(out))
    write(scored, folder / "scored.csv")
    keep_settings(out, clear, rows, gamma=gamma)
    report(ds, folder / "report.html")
    push_to_hub(curated(ds), "me/x", audit=ds, clear=clear, settings={"gamma": gamma})
    (folder / "clear.pickle").write_bytes(pickle.dumps(clear) + pickle.dumps(clear.engine) + pickle.dumps(clear.score))
    (folder / "hashes.json").write_text(json.dumps([Hasher.hash(x) for x in (clear, clear.engine, clear.score)]))
    print(clear, clear.engine, clear.engine.identity if clear.engine else "", gamma)
    for model in ("refused", "broken"):  # the server repeats the key
        try:
            rows.map(Clear(engine=engine(model), cache=False).score, batched=True)
        except Exception as error:
            print(repr(error))
            traceback.print_exc()
            logging.exception("it fails")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.stdin.read() or None)
