"""The same steps on a real Ray cluster on this machine: equal columns, whatever dies."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from clear_datasets import NLI, BSDetector, ByConfidence, Clear, decide
from clear_datasets.engines import Answers, Asks, EngineError
from clear_datasets.engines.openai import OpenAI
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from clear_datasets.files import write_folder
from clear_datasets.stages import Stages, added_by
from tests.conftest import Scripted, make_tiny

ray = pytest.importorskip("ray", reason='Ray is not installed: pip install "clear-datasets[ray]"')
from clear_datasets import distributed, ray_stages  # noqa: E402
from clear_datasets.ray_stages import RayStages  # noqa: E402
from clear_datasets.replicas import Replica, Work, block, raised  # noqa: E402

ROWS = Dataset.from_list([{"question": f"Where is {i}?" * (i != 11), "answer": f"at {i}"} for i in range(48)])


@dataclass(frozen=True)
class Working(Scripted):
    """Takes time for each row, and notes in a file who answered; some rows are its end, always or the first times."""

    folder: str = ""
    delay: float = 0.0
    deadly: str = ""
    failing: str = ""
    wrong: str = ""
    often: int = 1_000

    def answer(self, asks: Asks) -> Answers:
        text = repr(asks.generate)
        with (Path(self.folder) / "answered").open("a") as f:
            f.write(f"{os.getpid()} {len(asks.generate)}\n")
        time.sleep(self.delay * len(asks.generate))
        for piece, end in ((self.deadly, self.die), (self.failing, self.fail), (self.wrong, self.refuse)):
            if piece and piece in text and self.again(piece):
                end()
        return super().answer(asks)

    def with_writer(self, writer: str) -> Working:
        return self

    def again(self, piece: str) -> bool:
        with (Path(self.folder) / "times").open("a+") as f:
            f.write(f"{piece}\n")
            f.seek(0)
            return Counter(f.read().split("\n"))[piece] <= self.often

    def die(self) -> None:
        os._exit(1)

    def fail(self) -> None:
        raise EngineError("the engine ended")

    def refuse(self) -> None:
        raise ValueError("no such setting")


def answered(folder: Path) -> list[tuple[int, int]]:
    file = folder / "answered"
    return [tuple(map(int, line.split())) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else they wait for all other tests
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture
def wanted() -> list[dict[str, Any]]:
    return ROWS.map(Clear(engine=Scripted(), cache=False).score, batched=True).to_list()


def score(engine: Working, folder: Path, rows: Dataset | str = ROWS, **how: Any) -> Dataset:
    options: dict[str, Any] = {"replicas": 2, "batch_size": 4, **how}
    return distributed.score(rows, Clear(engine=engine, cache=False), folder=folder / "stages", **options)


def test_rows_come_in_order_from_and_to_files_and_what_is_done_is_not_asked_again(tmp_path, wanted):
    engine = Working(folder=str(tmp_path))
    write_folder(ROWS, tmp_path / "rows", rows=20)
    found = score(engine, tmp_path, str(tmp_path / "rows"), out=tmp_path / "scored", replicas=3)
    np.testing.assert_equal(found.to_list(), wanted)
    assert found[11]["clear_error"] == "column 'question' is empty"
    assert found.features == Clear.features(ROWS.features)
    assert [f.name for f in (tmp_path / "scored").iterdir()] == ["train-00000-of-00001.parquet"]
    np.testing.assert_equal(Dataset.from_parquet(str(tmp_path / "scored" / "*.parquet")).to_list(), wanted)
    asked = answered(tmp_path)
    assert len(asked) == 12
    assert os.getpid() not in {pid for pid, _ in asked}
    np.testing.assert_equal(score(engine, tmp_path, str(tmp_path / "rows"), replicas="auto").to_list(), wanted)
    assert answered(tmp_path) == asked


@pytest.fixture
def inside(monkeypatch) -> None:
    """The batches are done in this process."""

    def asked(rows: Dataset, batches: list[tuple[int, int]], work: Work, *_: Any) -> Iterator[Any]:
        return (("", batch, added_by(rows.select(range(*batch)), work.step, work.mark)) for batch in batches)

    monkeypatch.setattr(ray_stages, "_asked", asked)


def test_adaptive_sampling_is_left_out_and_said_to_be(tmp_path, wanted, inside):
    clear = Clear(engine=Working(folder=str(tmp_path)), cache=False, gamma=0.6, adaptive=True)
    with pytest.warns(UserWarning, match="adaptive=True is left out"):
        found = distributed.score(ROWS, clear, replicas=2, batch_size=20, folder=tmp_path / "stages")
    np.testing.assert_equal(found.to_list(), wanted)


def test_candidates_and_preferences_are_those_of_map(tmp_path, wanted):
    clear = Clear(engine=Working(folder=str(tmp_path)), cache=False)
    scored = Dataset.from_list(wanted)
    with pytest.raises(ValueError, match="no model writes candidates"):
        distributed.correct(scored, clear)
    clear = clear.with_writer("w", gamma=0.6)
    found = distributed.correct(scored, clear, replicas=2, batch_size=20, folder=tmp_path / "stages")
    plain = scored.map(clear.propose, batched=True).map(clear.prefer, batched=True)
    np.testing.assert_equal(found.to_list(), plain.to_list())
    assert "replace" in set(found.map(decide(0.6, 0.0), batched=True)["clear_decision"])


def test_a_worker_that_is_killed_is_replaced_and_its_rows_are_done_anew(tmp_path, wanted):
    killed: list[int] = []

    def kill() -> None:
        while len(found := answered(tmp_path)) < 4:
            time.sleep(0.05)
        killed.append(found[-1][0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    found = score(Working(folder=str(tmp_path), delay=0.1), tmp_path)
    thread.join()
    np.testing.assert_equal(found.to_list(), wanted)
    by = Counter(pid for pid, _ in answered(tmp_path))
    assert len(by) >= 2
    assert by[killed[0]] <= 4
    assert sum(rows for _, rows in answered(tmp_path)) <= 47 + 2 * 4  # what was under way, and what waited behind it


@pytest.fixture
def rounds(monkeypatch) -> Callable[..., list[list[tuple[int, int]]]]:
    """What replicas say of batches is scripted: of which a round has had which, in the order of rounds."""
    had: list[list[tuple[int, int]]] = []

    def script(told: Callable[[int, list[tuple[int, int]]], Iterator[Any]]) -> list[list[tuple[int, int]]]:
        def asked(rows: Dataset, batches: list[tuple[int, int]], *_: Any) -> Iterator[Any]:
            had.append(batches)
            return told(len(had), batches)

        monkeypatch.setattr(ray_stages, "_asked", asked)
        return had

    return script


def done(batch: tuple[int, int], by: str = "one") -> tuple[str, tuple[int, int], Dataset]:
    return by, batch, ROWS.select(range(*batch))


def answer(batches: Sequence[tuple[int, int]], replicas: int = 4) -> list[tuple[int, int]]:
    stages = RayStages(Path("stages"), 4, replicas=replicas, gpus=0.0)
    step = Clear(engine=Scripted(), cache=False).score
    return [span for span, _ in stages.answered(ROWS, list(batches), step, "mark")]


BATCHES = [(0, 4), (4, 8), (8, 12), (12, 16)]
BROKEN = EngineError("CUDA error: uncorrectable ECC error encountered")


def test_one_broken_replica_is_not_the_end_while_others_load(rounds):
    def told(number, batches):
        if number == 1:
            yield from (("broken", batch, BROKEN) for batch in [BATCHES[0]] * 50)
        yield from map(done, batches if number > 1 else batches[1:])

    had = rounds(told)
    assert sorted(answer(BATCHES)) == BATCHES
    assert had == [BATCHES, BATCHES[:1]]


def test_replicas_that_all_fail_and_fail_again_end_the_run(rounds):
    told = [(by, BATCHES[0], BROKEN) for _ in range(3) for by in ("one", "two", "three", "four")]
    had = rounds(lambda number, batches: iter([*told, *map(done, BATCHES)]))
    with pytest.raises(EngineError, match="ECC"):
        answer(BATCHES)
    assert had == [BATCHES]
    told = [*told[:8], done(BATCHES[1], "two"), *told[8:]]  # one of them was done with a batch in between
    had = rounds(lambda number, batches: iter(told if number == 1 else map(done, batches)))
    had.clear()
    assert sorted(answer(BATCHES)) == BATCHES
    assert had == [BATCHES, [BATCHES[0], *BATCHES[2:]]]


@pytest.mark.parametrize(
    "error", [OSError("no checkpoint here"), RuntimeError("KeyError: 'x'"), ImportError("no vllm")]
)
def test_what_may_be_the_fault_of_a_machine_is_tried_again(error, rounds):
    had = rounds(lambda n, batches: iter([("one", batches[0], error)] if n == 1 else map(done, batches)))
    with pytest.raises(type(error)):
        answer(BATCHES[:1])  # with nothing done in between it is not
    had.clear()
    rounds(lambda n, batches: iter([("one", batches[0], error), done(batches[1])] if n == 1 else map(done, batches)))
    assert sorted(answer(BATCHES[:2])) == BATCHES[:2]
    rounds(lambda n, batches: iter([done(batches[0]), ("one", batches[1], TypeError("of the settings"))]))
    with pytest.raises(TypeError):
        answer(BATCHES[:2])


def test_workers_that_always_die_end_the_run(rounds):
    had = rounds(lambda n, batches: iter(()))
    with pytest.raises(EngineError, match="the workers that had rows 0 to 16 died"):
        answer(BATCHES)
    assert [len(batches) for batches in had] == [4, 4, 8, 16]


def test_a_row_on_which_workers_die_is_found_and_gets_a_reason(rounds):
    had = rounds(lambda n, batches: iter(done(batch) for batch in batches if not batch[0] <= 5 < batch[1]))
    stages, step = RayStages(Path("stages"), 4, replicas=4, gpus=0.0), Clear(engine=Scripted(), cache=False).score
    found = dict(stages.answered(ROWS, BATCHES, step, "mark"))
    assert sorted(found) == [(0, 4), (4, 5), (5, 6), (6, 8), (8, 12), (12, 16)]
    assert found[5, 6]["clear_error"][:] == ["3 workers died on this row"]
    assert np.isnan(found[5, 6]["clear_confidence"][0])
    assert had == [BATCHES, [(4, 8)], [(4, 6), (6, 8)], [(4, 5), (5, 6)]]


def test_a_row_that_is_the_end_of_its_workers_gets_a_reason_and_the_others_their_scores(tmp_path, wanted):
    engine, rows = Working(folder=str(tmp_path), deadly="Where is 1?"), ROWS.select(range(4))
    found = score(engine, tmp_path, rows, batch_size=1).to_list()
    assert found[1].pop("clear_error") == "3 workers died on this row"
    assert np.isnan(found[1]["clear_confidence"])
    np.testing.assert_equal([found[0], *found[2:]], [wanted[0], *wanted[2:4]])
    asked = answered(tmp_path)
    np.testing.assert_equal(score(engine, tmp_path, rows, batch_size=2).to_list()[2:], wanted[2:4])
    assert answered(tmp_path) == asked  # what is known of it is kept


def test_what_fails_always_is_said_and_all_else_is_kept(tmp_path, wanted):
    with pytest.raises(EngineError, match="the engine ended"):
        score(Working(folder=str(tmp_path), failing="Where is 5?"), tmp_path)
    done = {f.name for f in (tmp_path / "stages").rglob("*.parquet")}
    assert "000000004-000000008.parquet" not in done
    assert len(done) == 11
    before = sum(rows for _, rows in answered(tmp_path))
    assert before == 47 + 4
    marked = next((tmp_path / "stages").iterdir())
    again = Clear(engine=Working(folder=str(tmp_path)), cache=False)
    stages = Stages(tmp_path / "stages", 4)
    marked.rename(stages.planned(ROWS, again.score, "score", 4)[1])  # as if the fault were no setting of the engine
    np.testing.assert_equal(stages.score(ROWS, again).to_list(), wanted)
    assert sum(rows for _, rows in answered(tmp_path)) - before == 4


def test_a_folder_with_other_things_is_refused_before_anything_is_asked(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out, message in (("mine", "with other things than rows"), (".", "where batches are kept, is inside of OUT")):
        with pytest.raises(ValueError, match=message):
            score(Working(folder=str(tmp_path)), tmp_path, out=tmp_path / out)
    assert not answered(tmp_path)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_too_small_a_cluster_is_refused_and_a_small_one_warned_of(tmp_path, inside):
    engine = Working(folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"has 4 CPUs and 0 GPUs, a replica takes 1 and 1"):
        score(engine, tmp_path, gpus_per_replica=1)
    with pytest.raises(ValueError, match="the number of replicas is 0; expected 1 at least, or 'auto'"):
        score(engine, tmp_path, replicas=0)
    with pytest.warns(UserWarning, match="9 replicas are asked for, the cluster has room for 4"):
        score(engine, tmp_path, ROWS.select(range(4)), replicas=9, batch_size=None)
    assert len(answered(tmp_path)) == 4  # a batch each, were there so many


@pytest.mark.parametrize(
    "cpus, gpus, machines, asked, fits",
    [
        (64, 8, 1, ("auto", 1, None), (8, 1.0)),
        (64, 8, 1, ("auto", 4, None), (2, 4.0)),  # tensor_parallel_size=4
        (64, 8, 1, ("auto", 1, 0.5), (16, 0.5)),
        (4, 8, 1, ("auto", 1, None), (4, 1.0)),
        (64, 8, 4, ("auto", 0, None), (4, 0.0)),  # clients of a server
        (64, 0, 4, ("auto", 1, None), (4, 0.0)),
        (64, 8, 2, (3, 1, None), (3, 1.0)),
    ],
)
def test_replicas_take_what_the_cluster_has(cpus, gpus, machines, asked, fits, monkeypatch):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus, "GPU": gpus})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * machines + [{"Alive": False}])
    assert ray_stages._fitting(*asked) == fits


def test_engines_that_do_not_fit_a_share_of_a_gpu_are_refused(tmp_path):
    for engine in (None, VLLM("m")):
        clear = Clear("m", engine=engine, cache=False)
        with pytest.raises(ValueError, match=r"gpus_per_replica is 0.5, and the engine takes 0.9 of a GPU's memory"):
            distributed.score(ROWS, clear, gpus_per_replica=0.5, folder=tmp_path)


def test_a_replica_that_fails_again_and_again_ends_its_process(tmp_path, monkeypatch):
    slept, ended = [], []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.chdir(tmp_path)
    engine = Working(folder=str(tmp_path), failing="Where is 5?", often=3)
    replica = Replica(Work.of(Clear(engine=engine, cache=False).score, "mark"))
    found = [replica(block(ROWS, 4, 8)).to_pylist()[0] for _ in range(4)]
    assert [one["error"] for one in found] == ["EngineError"] * 3 + [""]
    assert re.fullmatch(r"the engine ended \(on .*: more is in Ray's logs\)", found[0]["text"])
    assert isinstance(raised(found[0]["error"], found[0]["text"]), EngineError)
    assert len(Dataset.from_buffer(found[3]["rows"])) == 4
    wrong = Replica(Work.of(Clear(engine=replace(engine, failing="", wrong="Where is 6?"), cache=False).score, "mark"))
    found_wrong = wrong(block(ROWS, 4, 8)).to_pylist()[0]
    assert (found_wrong["error"], found_wrong["text"]) == ("ValueError", "no such setting")
    assert [s for s in slept if s >= 1][:4] == [1.0, 2.0, 4.0, 30.0]
    assert ended == [1]  # before the fourth, which a new process would have


def test_images_do_not_travel(tmp_path, rounds):
    from datasets import Image

    rows = ROWS.add_column("image", [None] * len(ROWS)).cast_column("image", Image())
    seen: list[list[str]] = []

    def asked(rows: Dataset, batches: list[tuple[int, int]], *_: Any) -> Iterator[Any]:
        seen.append(rows.column_names)
        return map(done, batches)

    rounds(lambda n, batches: iter(()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_stages, "_asked", asked)
        [*RayStages(tmp_path, 4, replicas=1, gpus=0.0).answered(rows, BATCHES, Clear("m").score, "mark")]
        own = Clear("m", format=Own())
        [*RayStages(tmp_path, 4, replicas=1, gpus=0.0).answered(rows, BATCHES, own.score, "mark")]
    assert seen == [["question", "answer"], ["question", "answer", "image"]]  # a format of one's own may read any


@dataclass(frozen=True)
class Own:
    def read(self, row: Any) -> Any: ...


def test_it_is_said_when_no_batch_comes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray_stages, "_SILENCE", 0.2)
    with ray_stages._noting_silence() as noted:
        noted()
        time.sleep(0.7)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"no batch was done for 0 minutes; free are [0-4] CPUs and 0 GPUs of the cluster\.", said)


def test_a_real_model_gives_the_scores_of_one_process(tiny, tmp_path):
    rows = ROWS.select(range(12))
    clear = Clear(engine=Transformers(tiny, dtype="float32"))
    found = distributed.score(rows, clear, replicas=2, batch_size=3, folder=tmp_path / "stages")
    plain = rows.map(clear.score, batched=True, batch_size=3)
    for column in ("clear_confidence", "clear_consistency", "clear_reflection"):
        np.testing.assert_allclose(found[column][:], plain[column][:], atol=1e-5)
    assert found["clear_error"][:] == plain["clear_error"][:]


def test_files_are_found_from_where_the_caller_is(tiny, tmp_path, monkeypatch):
    """Ray's workers are where Ray was started."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "checkpoint").symlink_to(tiny)
    monkeypatch.chdir(tmp_path / "project")
    rows = ROWS.select(range(4))
    found = distributed.score(rows, Clear("checkpoint"), replicas=2, batch_size=2, folder="stages")
    assert found["clear_error"][:] == [""] * 4
    work = Work.of(Clear("checkpoint").with_writer("adapter").score, "mark")
    assert work.local == ("checkpoint",)
    served = Clear(
        engine=OpenAI("checkpoint", "http://localhost/v1"), confidence=BSDetector(similarity=NLI("checkpoint"))
    )
    assert Work.of(served.score, "mark").local == ("checkpoint",)  # the encoder
    judging = replace(served, preference=ByConfidence(served.confidence), confidence=BSDetector())
    assert Work.of(judging.prefer, "mark").local == ("checkpoint",)
    assert Work.of(replace(served, confidence=BSDetector()).score, "mark").local == ()
    (tmp_path / "home" / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home")
    work.begin()  # not with the folder of that name that is here
    assert Path.cwd() == tmp_path / "project"
    with pytest.raises(ImportError, match=r"clear-datasets is .*, 0.0.9 where the run began"):
        replace(work, release="0.0.9").begin()
    lost = replace(work, folder=str(tmp_path / "not there"))
    monkeypatch.chdir(tmp_path)  # as on another machine
    with pytest.raises(OSError, match=r"checkpoint is on the machine that calls, in .*not there, and not on"):
        lost.begin()


SCRIPT = """
import sys
from datasets import Dataset
from clear_datasets import Clear, distributed
from tests.test_distributed import ROWS, Working
folder, address = sys.argv[1:]
engine = Working(folder=folder, delay=0.2)
found = distributed.score(ROWS, Clear(engine=engine, cache=False), replicas=2, batch_size=4, folder=folder + "/stages",
                          address=address)
found.to_parquet(folder + "/scored.parquet")
"""


def run(arguments: Sequence[str | Path], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **environment}
    return subprocess.run(
        [*map(str, arguments)], check=False, env=environment, capture_output=True, text=True, timeout=240
    )


def head(port: int, folder: Path) -> None:
    """Start the head of a cluster."""
    command = [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}", "--num-cpus=2",
               "--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats"]  # fmt: skip
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr


def processes(folder: Path) -> list[int]:
    """All that belongs to the cluster of a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in command and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def end(folder: Path) -> None:
    """Kill the cluster of a folder."""
    while found := processes(folder):
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_head_of_a_cluster_is_killed_and_the_same_command_goes_on(tmp_path_factory, tmp_path, wanted):
    folder = Path("/tmp") / f"clear{os.getpid()}"  # sockets have short names
    port = 20_000 + os.getpid() % 10_000
    command = [sys.executable, "-c", SCRIPT, tmp_path, f"127.0.0.1:{port}"]
    environment = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "PYTHONPATH": str(Path(__file__).parent.parent)}
    try:
        head(port, folder)
        thread = threading.Thread(target=lambda: ended.append(run(command, **environment)))
        ended: list[subprocess.CompletedProcess[str]] = []
        thread.start()
        while len(answered(tmp_path)) < 5:
            time.sleep(0.1)
            assert thread.is_alive(), ended
        end(folder)
        thread.join()
        assert ended[0].returncode != 0
        assert not (tmp_path / "scored.parquet").exists()
        done = len([*(tmp_path / "stages").rglob("*.parquet")])
        assert done
        head(port, folder)
        before = len(answered(tmp_path))
        again = run(command, **environment)
        assert again.returncode == 0, again.stderr
        assert len(answered(tmp_path)) - before == 12 - done
        np.testing.assert_equal(Dataset.from_parquet(str(tmp_path / "scored.parquet")).to_list(), wanted)
        end(folder)
        (tmp_path / "scored.parquet").unlink()
        assert run(command, **environment).returncode == 0  # all is done, and no cluster is asked for
        np.testing.assert_equal(Dataset.from_parquet(str(tmp_path / "scored.parquet")).to_list(), wanted)
    finally:
        end(folder)


SBATCH = """#!/bin/bash
for script; do :; done
last=$(sed -n 's/^#SBATCH --array=0-//p' "$script")
for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i bash -e "$script" || exit 1; done
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_commands_of_the_page_run_as_they_stand(tmp_path):
    """In order, on few rows, with a tiny model under the name of the page, and a SLURM that runs task after task."""
    ray.shutdown()  # "auto" would be the cluster of the other tests
    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    folder = Path("/tmp") / f"clear{os.getpid()}"
    make_tiny(tmp_path / "Qwen" / "Qwen2.5-7B-Instruct", ends=5, max_position_embeddings=2048, initializer_range=0.05)
    ROWS.to_json(tmp_path / "train.jsonl")
    (tmp_path / "bin").mkdir()
    for name in ("ray", "clear-datasets"):
        (tmp_path / "bin" / name).symlink_to(Path(sys.executable).with_name(name))
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RAY_TMPDIR": str(folder)}
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 6
    try:
        for block in blocks:
            done = subprocess.run(["bash", "-e", "-c", block], check=False, cwd=tmp_path, env=environment,
                                  capture_output=True, text=True, timeout=240)  # fmt: skip
            assert done.returncode == 0, f"{block}\n{done.stderr}"
    finally:
        end(folder)
    whole, parts = (Dataset.from_parquet(str(tmp_path / file)) for file in ("out/scored.parquet", "scored.parquet"))
    assert whole["question"][:] == parts["question"][:] == ROWS["question"][:]
    np.testing.assert_allclose(whole["clear_confidence"][:], parts["clear_confidence"][:], atol=1e-5)
    kept = [Dataset.from_parquet(str(tmp_path / file)) for file in ("out/curated.parquet", "curated.parquet")]
    assert kept[0].to_list() == kept[1].to_list()
    assert kept[0].column_names == ROWS.column_names
