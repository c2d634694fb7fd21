"""Batches beside the output: whose rows they are of, what a change of them changes, and which are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from clear_datasets import Clear
from clear_datasets.stages import Stages, _batches
from tests.conftest import Scripted

ROWS = {"question": [f"Where is {i}?" for i in range(9)], "answer": ["the Alps", "Rome", "Oslo"] * 3}


@dataclass(frozen=True)
class Writing(Scripted):
    """Writes its candidates itself."""

    def with_writer(self, writer: str) -> Writing:
        return self


CLEAR = Clear(engine=Writing(yes=("Alps",)), writer="w")


def test_other_rows_of_equal_number_get_scores_of_their_own(tmp_path):
    first, second = (Dataset.from_dict({**ROWS, "answer": answers}) for answers in (["the Alps"] * 9, ["Rome"] * 9))
    before = Stages(tmp_path / "shared", 4).score(first, CLEAR)
    found = Stages(tmp_path / "shared", 4).score(second, CLEAR)
    assert found.to_list() == Stages(tmp_path / "fresh", 4).score(second, CLEAR).to_list()
    assert found["clear_confidence"][:] != before["clear_confidence"][:]


def test_scores_that_were_changed_are_other_rows_for_the_next_stage(tmp_path):
    rows, stages = Dataset.from_dict(ROWS), Stages(tmp_path, 4)
    for _ in range(2):
        stages.correct(stages.score(rows, CLEAR), CLEAR)
    [proposed] = tmp_path.glob("propose-*")  # the same files are the same rows
    [file] = tmp_path.glob("score-*/*4-*8.parquet")
    kept = pq.read_table(file)
    place = kept.column_names.index("clear_confidence")
    changed = pa.array([0.125, *kept["clear_confidence"].to_pylist()[1:]], pa.float32())
    pq.write_table(kept.set_column(place, kept.schema.field(place), changed), file)
    scored = stages.score(rows, CLEAR)
    assert scored[4]["clear_confidence"] == 0.125
    stages.correct(scored, CLEAR)
    assert {*tmp_path.glob("propose-*")} > {proposed}


@pytest.mark.parametrize(
    "first, end, known, size, spans",
    [
        (0, 9, {}, 4, [(0, 4), (4, 8), (8, 9)]),
        (3, 9, {}, 64, [(3, 9)]),
        (0, 9, {0: 9}, 4, [(0, 9)]),
        (0, 9, {0: 2, 2: 4}, 4, [(0, 2), (2, 4), (4, 8), (8, 9)]),
        (0, 9, {3: 6}, 64, [(0, 3), (3, 6), (6, 9)]),  # a part first, and then the whole
        (0, 3, {0: 9}, 64, [(0, 3)]),  # the whole first, of which a batch ends behind the part
        (3, 6, {0: 9, 2: 4, 5: 7}, 64, [(3, 6)]),
        (3, 6, {0: 4, 4: 6, 6: 9}, 64, [(3, 4), (4, 6)]),
        (0, 9, {0: 4, 2: 6, 6: 9}, 64, [(0, 4), (4, 6), (6, 9)]),  # one that overlaps is asked for what it has behind
    ],
)
def test_which_batches_are_taken_and_asked(first, end, known, size, spans):
    assert list(_batches(first, end, known, size)) == spans


def test_a_part_of_a_whole_that_is_there_has_its_own_rows(tmp_path):
    rows = Dataset.from_dict(ROWS)
    whole = Stages(tmp_path, 64).score(rows, CLEAR).to_list()
    parts = [Stages(tmp_path, 64, shard=(i, 3)).score(rows, CLEAR).to_list() for i in range(3)]
    assert parts == [whole[:3], whole[3:6], whole[6:]]
    assert {f.name for f in Path(tmp_path).glob("score-*/*")} == {
        f"{a:09}-{b:09}.parquet" for a, b in [(0, 9), (0, 3), (3, 6), (6, 9)]
    }
