"""Streams go through every step, and come out as datasets do; what is read twice is asked once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from clear_datasets import Clear, above, curated, decide, restore, threshold
from tests.conftest import Scripted
from tests.engines.test_cache import Counting

ROOT = Path(__file__).parent.parent
GAMMA = 0.5


def rows() -> Any:
    for i in range(30):
        yield {"question": "" if i % 10 == 9 else f"Where is {i}?", "answer": f"at {i}", "id": i}


def clear_with(engine: Scripted) -> Clear:
    return Clear(engine=engine, writer="w", gamma=GAMMA)


def steps(ds: Any, clear: Clear, gamma: float) -> Any:
    for step in (clear.score, clear.propose, clear.prefer, decide(gamma, 0.3)):
        ds = ds.map(step, batched=True, batch_size=7)
    return ds


class Writing(Counting):
    """Writes candidates, too."""

    def with_writer(self, writer: str) -> Counting:
        return self


@pytest.fixture
def engine() -> Writing:
    Counting.asked.clear()
    return Writing(yes=tuple(f"at {i}" for i in range(0, 30, 3)))


def test_a_stream_comes_out_as_a_dataset_does(engine):
    clear = clear_with(engine)
    wanted = steps(Dataset.from_generator(rows), clear, GAMMA)
    stream = steps(IterableDataset.from_generator(rows), clear, GAMMA)
    np.testing.assert_equal(list(stream), wanted.to_list())
    assert set(wanted["clear_decision"]) == {"keep", "drop", "replace"}
    np.testing.assert_equal(list(curated(stream)), curated(wanted).to_list())
    source = {row["id"]: row for row in rows()}
    assert all(row == source[row["id"]] for row in restore(curated(stream)))


def test_the_median_of_a_stream_takes_a_first_pass_which_asks_all(engine):
    stream = IterableDataset.from_generator(rows).map(clear_with(engine).score, batched=True, batch_size=7)
    gamma = threshold(stream)
    asked = dict(engine.asked)
    assert gamma == threshold(Dataset.from_list(list(stream)))
    kept = list(stream.filter(above(gamma)))
    assert len([row for row in kept if row["question"]]) == 9  # the others tie with the median
    assert engine.asked == asked


def test_memory_is_flat():
    command = [sys.executable, "scripts/benchmark_overhead.py", "--stream", "--cache", "--one"]
    small, large = (
        json.loads(subprocess.run([*command, str(n)], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for n in (1_000, 8_000)
    )
    assert large["anonymous_memory_mib"] < small["anonymous_memory_mib"] + 20
