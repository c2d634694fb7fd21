"""Answers that were paid for are asked once, whatever happens to the process or to the file."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sqlite3
import stat
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher

from clear_datasets import BSDetector, Clear, Embedding, Jaccard, decide, threshold
from clear_datasets.engines import Answers, Asks, Messages, PromptError
from clear_datasets.engines.cache import COUNTS, Cached, close_stores, store_of
from clear_datasets.engines.checkpoint import snapshot
from clear_datasets.engines.database import transaction
from clear_datasets.engines.store import NAME, Store
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from clear_datasets.stages import Stages
from tests.conftest import Scripted, make_tiny
from tests.test_cli import here, run

ROWS = {"question": [f"Where is {i}?" for i in range(20)], "answer": [f"at {i}" for i in range(20)]}
SCORES = ("clear_confidence", "clear_consistency", "clear_reflection")


@dataclass(frozen=True)
class Counting(Scripted):
    """Counts what it is asked, in this process."""

    asked: ClassVar[Counter[str]] = Counter()

    def generate(self, prompts: Sequence[Messages], *, n: int = 1, **how: Any) -> list[list[str]]:
        self.asked["samples"] += n * len(prompts)
        return super().generate(prompts, n=n, **how)

    def choose(self, prompts: Sequence[Messages], labels: Sequence[str]) -> np.ndarray:
        self.asked["labels"] += len(prompts)
        return super().choose(prompts, labels)

    def logprobs(self, prompts: Sequence[Messages], responses: Sequence[str]) -> list[np.ndarray]:
        self.asked["texts"] += len(prompts)
        return super().logprobs(prompts, responses)


@pytest.fixture
def asked():
    Counting.asked.clear()
    return Counting.asked


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    for name in SCORES:
        np.testing.assert_array_equal(left[name], right[name])  # to the last bit
    assert left["clear_error"] == right["clear_error"]


def test_the_same_again_asks_nothing(asked):
    clear = Clear(engine=Counting())
    first = clear.score(ROWS)
    assert asked == {"samples": 100, "labels": 40, "texts": 40}
    close_stores()  # as a new process would find it
    same(first, clear.score(ROWS))
    assert asked == {"samples": 100, "labels": 40, "texts": 40}
    clear.score({name: [*values, values[0][::-1]] for name, values in ROWS.items()})
    assert asked == {"samples": 105, "labels": 42, "texts": 42}


def test_what_changes_no_question_asks_nothing(asked):
    clear = Clear(engine=Counting())
    ds = Dataset.from_dict(ROWS)
    ds.map(clear.score, batched=True)
    asked.clear()
    for estimator in (BSDetector(alpha=0.1), BSDetector(beta=0.2), BSDetector(similarity=Jaccard()), BSDetector(k=3)):
        scored = ds.map(replace(clear, confidence=estimator).score, batched=True)
    for gamma, eta in ((threshold(scored), 0.8), (0.1, 0.2)):
        scored.map(decide(gamma, eta), batched=True)
    assert not asked
    more = ds.map(replace(clear, confidence=BSDetector(k=8)).score, batched=True)
    assert asked == {"samples": 3 * 20}
    assert not any(more["clear_error"])


def test_a_preference_by_confidence_takes_the_samples_of_the_score(asked):
    clear = Clear(engine=Counting(), writer="w")
    batch = {**ROWS, "clear_candidate": [f"to {i}" for i in range(20)]}
    clear.score(batch)
    asked.clear()
    clear.prefer(batch)
    assert asked == {"labels": 40, "texts": 40}  # of the candidates, which are no longer than the targets


@pytest.mark.parametrize("change", [{"k": 8}, {"alpha": 0.0}, {"samples": "reasoned", "reflection": "reasoned"}])
def test_scores_are_those_without_a_cache(tiny, change):
    engine = Transformers(tiny, dtype="float32")
    estimator = BSDetector(**{"k": 5, "max_tokens": 16, **change})
    plain = Clear(engine=engine, confidence=estimator, cache=False).score(ROWS)
    clear = Clear(engine=engine, confidence=replace(estimator, k=5))
    clear.score({name: values[:7] for name, values in ROWS.items()})
    clear.score(ROWS)
    clear = Clear(engine=engine, confidence=estimator)
    found = clear.score(ROWS)
    for name in SCORES:  # other rows beside a row change its last bits in any batch
        np.testing.assert_allclose(found[name], plain[name], atol=1e-5)
    same(found, clear.score(ROWS))


def test_samples_at_temperature_0_and_which_are_cut_off_are_known(tiny, user):
    engine = Cached(Transformers(tiny, dtype="float32"))
    asks = Asks([user("Who?"), user("Where?")], n=3, max_tokens=[4, 60], choose=[user("Is it?")], labels=("Yes", "No"))
    first = engine.answer(asks)
    assert first.cut == engine.engine.answer(asks).cut
    assert len(set(first.generated[0])) == 1
    before = COUNTS.asked
    second = engine.answer(asks)
    assert COUNTS.asked == before
    assert (second.generated, second.cut) == (first.generated, first.cut)
    np.testing.assert_array_equal(first.chosen, second.chosen)


def test_a_refused_prompt_does_not_lose_the_others(asked, user):
    engine = Cached(Counting(limit=40))
    good, bad = user("Who?"), user("x" * 100)
    asks = Asks([good, bad, bad], read=[(good, "me"), (bad, "me"), (good, "me")])
    with pytest.raises(PromptError) as caught:
        engine.answer(asks)
    assert sorted(caught.value.reasons) == [4]  # the inherited `answer` reads first
    with pytest.raises(PromptError) as caught:
        engine.answer(replace(asks, read=[]))
    assert sorted(caught.value.reasons) == [1, 2]
    assert engine.answer(Asks([good])).generated == engine.engine.answer(Asks([good])).generated


def test_equal_questions_of_a_batch_are_asked_once(asked, user):
    engine = Cached(Counting())
    asks = Asks(choose=[user("a"), user("b"), user("a")], labels=("Yes", "No"), read=[(user("a"), "x")] * 3)
    assert len(engine.answer(asks).read) == 3
    assert asked == {"labels": 2, "texts": 1}


class Broken(Counting):
    """Is interrupted after it has told some answers."""

    def answer(self, asks: Asks) -> Answers:
        for position in range(len(asks.generate))[:4]:
            asks.tell("generate", position, (["so far"], [False]))
        raise KeyboardInterrupt


def test_what_was_told_before_an_interrupt_is_kept(asked, user, caplog):
    asks = Asks([user(f"{i}") for i in range(6)])
    with pytest.raises(KeyboardInterrupt):
        Cached(Broken()).answer(asks)
    assert "all answers so far are kept" in caplog.text
    known = COUNTS.known
    with pytest.raises(KeyboardInterrupt):
        Cached(Broken()).answer(asks)
    assert COUNTS.known == known + 4


def test_no_cache(asked, answers):
    for _ in range(2):
        Clear(engine=Counting(), cache=False).score(ROWS)
    assert asked["labels"] == 80
    assert not list(answers.iterdir())


def test_a_folder_of_ones_own(asked, tmp_path, answers):
    clear = Clear(engine=Counting(), cache=tmp_path / "here")
    clear.score(ROWS)
    assert stat.S_IMODE((tmp_path / "here" / NAME).stat().st_mode) == 0o600
    assert not list(answers.iterdir())
    asked.clear()
    pickle.loads(pickle.dumps(clear)).score(ROWS)
    assert not asked


def test_where_answers_are_kept_is_no_setting_of_the_scores(tmp_path):
    assert Clear("m", cache="here") == Clear("m")
    rows = Dataset.from_dict(ROWS)
    found = [Stages(tmp_path, 4).planned(rows, Clear("m", cache=c).score, "score", 4)[0] for c in (None, "here", False)]
    assert len(set(found)) == 1  # nor of the batches that the command line keeps
    clear = Clear(engine=Counting())
    before = Hasher.hash(clear.score)
    clear.score(ROWS)
    assert Hasher.hash(clear.score) == before


def test_a_model_that_was_trained_in_its_place_is_asked_anew(tmp_path):
    folder = str(make_tiny(tmp_path / "model"))
    before = Transformers(folder, dtype="float32")
    first = Clear(engine=before).score(ROWS)
    moved = tmp_path / "moved"
    os.rename(folder, moved)
    asked = COUNTS.asked
    same(first, Clear(engine=Transformers(str(moved), dtype="float32")).score(ROWS))  # the same files elsewhere
    assert COUNTS.asked == asked
    time.sleep(0.01)
    make_tiny(moved, ends=5)
    again = Clear(engine=Transformers(str(moved), dtype="float32")).score(ROWS)
    assert COUNTS.asked > asked
    assert again["clear_consistency"].tolist() != first["clear_consistency"].tolist()


def test_a_model_of_the_hub_is_known_by_its_commit(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, commit in (("org/a", "1" * 40), ("org/b", "2" * 40)):
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
    assert "org/a@" + "1" * 40 in Transformers("org/a").identity
    assert "org/b@" + "2" * 40 in Transformers("org/b", seed=1).identity
    assert "org/none@v2" in Transformers("org/none", "v2").identity
    steps = [Clear("org/a"), Clear("m").with_writer("org/b"), Clear(engine=Transformers("org/a")),
             Clear(engine=Transformers("m")).with_writer("org/b")]  # fmt: skip
    before = [Hasher.hash(clear.score) for clear in steps]
    assert [Hasher.hash(clear.score) for clear in steps] == before
    for name in ("org/a", "org/b"):  # pushed anew, and fetched by another process
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (folder / "snapshots" / ("3" * 40)).mkdir()
        (folder / "snapshots" / ("3" * 40) / "config.json").write_text("{}")
        (folder / "refs" / "main").write_text("3" * 40)
    snapshot.cache_clear()
    assert all(Hasher.hash(clear.score) != b for clear, b in zip(steps, before, strict=True))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for kind in (Transformers, VLLM):
        engines = [
            kind(name, adapter=adapter) for name in ("org/a", "org/b") for adapter in (None, f"{tmp_path}/adapter")
        ]
        assert len({engine.identity for engine in engines}) == 4
        missing = kind("org/a", adapter="not/there").identity
        assert missing not in (kind("org/a").identity, kind("org/a", adapter="not/yet").identity)


def test_a_similarity_by_an_encoder_is_computed_once(tiny, monkeypatch):
    pairs, seen = [("a", "b"), ("b", "a"), ("a", "b")], []
    monkeypatch.setattr(Embedding, "_cosine", lambda self, pairs: seen.extend(pairs) or [0.25] * len(pairs))
    engine = Cached(Counting())
    for similarity in (Embedding(tiny), Embedding(tiny), Embedding(tiny, revision="other")):
        assert similarity(pairs, engine).tolist() == [0.25] * 3
    assert len(seen) == 2
    assert Embedding(tiny)(pairs, Counting()).tolist() == [0.25] * 3
    assert len(seen) == 4


def test_comparisons_are_kept_as_they_come(asked):
    pairs, seen = [(str(i), "b") for i in range(600)], []

    def compare(part):
        if len(seen) == 2:
            raise MemoryError("killed")
        seen.append(len(part))
        return [0.5] * len(part)

    engine = Cached(Counting())
    with pytest.raises(MemoryError):
        engine.similar("e", pairs, compare)
    close_stores()
    left = []
    assert engine.similar("e", pairs, lambda part: left.extend(part) or [0.25] * len(part)) == [0.5] * 512 + [0.25] * 88
    assert left == pairs[512:]


def test_one_temperature_written_in_two_ways_is_asked_once(asked):
    Clear(engine=Counting(), confidence=BSDetector(temperature=1)).score(ROWS)
    asked.clear()
    Clear(engine=Counting(), confidence=BSDetector(temperature=1.0)).score(ROWS)
    assert not asked


def test_all_that_an_answer_depends_on_is_asked_anew(asked, user):
    engine, who = Cached(Counting()), user("Who?")
    asks = [
        Asks([who], **how)
        for how in ({"max_tokens": 8}, {"max_tokens": 16}, {"temperature": 1.0}, {"temperature": 0.5})
    ]
    asks += [Asks(choose=[who], labels=labels) for labels in (("Yes", "No"), ("No", "Yes"))]
    asks += [Asks(read=[(who, response)]) for response in ("me", "you")]
    for number, one in enumerate(asks, start=1):
        engine.answer(one)
        assert asked.total() == number
    for one in asks:
        engine.answer(one)
    assert asked.total() == len(asks)


@pytest.mark.parametrize(("kind", "journal"), [("nfs4", "delete"), ("lustre", "delete"), ("ext4", "wal")])
def test_file_systems_of_several_machines_have_no_log_in_shared_memory(asked, tmp_path, monkeypatch, kind, journal):
    folder = tmp_path / "share" / "answers"
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path / 'share'} {kind} rw 0 0\n"
    (tmp_path / "mounts").write_text(mounts)
    monkeypatch.setattr("clear_datasets.engines.database._MOUNTS", tmp_path / "mounts")
    first = Clear(engine=Counting(), cache=str(folder)).score(ROWS)
    close_stores()
    with sqlite3.connect(folder / NAME) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == (journal,)
    asked.clear()
    same(first, Clear(engine=Counting(), cache=str(folder)).score(ROWS))
    assert not asked


def damage(kind: str, file: Any) -> None:
    if kind == "nonsense":
        file.write_bytes(os.urandom(100_000))
    elif kind == "cut in half":
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "overwritten":
        with file.open("r+b") as f:
            f.seek(4096)
            f.write(os.urandom(file.stat().st_size - 4096))
    elif kind == "of another program":
        file.unlink()
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE theirs (x)")
    else:
        with sqlite3.connect(file) as connection:
            connection.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("kind", ["nonsense", "cut in half", "overwritten", "of another program", "newer"])
def test_a_file_that_cannot_be_used_is_set_aside(asked, answers, kind):
    clear = Clear(engine=Counting())
    first = clear.score(ROWS)
    store_of().put([(os.urandom(16), 0, os.urandom(500)) for _ in range(500)])
    store_of().prune(0)  # into the file, out of its log
    close_stores()
    damage(kind, answers / NAME)
    before = (answers / NAME).read_bytes()
    with pytest.warns(UserWarning, match="set aside as answers.sqlite.aside-"):
        same(first, clear.score(ROWS))
    [aside] = [f for f in answers.glob("*.aside-*") if not f.name.endswith(("-wal", "-shm"))]
    if kind not in ("of another program", "newer"):  # which SQLite closes with a log of its own
        assert aside.read_bytes() == before
    assert stat.S_IMODE((answers / NAME).stat().st_mode) == 0o600
    close_stores()
    asked.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(first, clear.score(ROWS))
    assert not asked


def test_what_was_not_used_for_longest_makes_room(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEAR_CACHE_GB", "0.02")
    store, now = Store(tmp_path), time.time()
    items = [(i.to_bytes(16, "big"), 0, b"#" + os.urandom(10_000)) for i in range(4000)]
    for i in range(0, 4000, 100):
        monkeypatch.setattr(time, "time", lambda i=i: now + i)
        store.put(items[i : i + 100])
        assert len(store.get([items[0][0]])) == 1  # is used all the time
        monkeypatch.setattr(time, "time", lambda i=i: now + i + 200_000)
        store.get([items[0][0]])
    found = store.info()
    assert found.size < 1.3 * found.limit
    assert store.get([items[0][0], items[-1][0]]).keys() == {items[0][0], items[-1][0]}
    assert not store.get([items[1][0]])
    monkeypatch.setenv("CLEAR_CACHE_GB", "much")
    with pytest.raises(ValueError, match="CLEAR_CACHE_GB is 'much'"):
        Store(tmp_path)


def test_the_command_line_shows_and_deletes(asked, answers):
    Clear(engine=Counting()).score(ROWS)
    close_stores()
    shown = run("cache", "info")
    assert shown.returncode == 0, shown.stderr
    assert f"180 answers in {answers / NAME}" in shown.stdout
    with sqlite3.connect(answers / NAME) as connection:
        connection.execute("UPDATE answers SET used = used - 40 * 86400 WHERE number > 0")
    assert "deleted 80 answers" in here("cache", "prune", "--older-than", "30d").stdout
    wrong = here("cache", "prune", "--older-than", "a month")
    assert (wrong.returncode, "expected a number of hours, days or weeks" in wrong.stderr) == (2, True)
    assert "deleted 100 answers" in here("cache", "clear", "--yes").stdout
    assert "0 answers in" in here("cache", "info").stdout
    asked.clear()
    Clear(engine=Counting()).score(ROWS)
    assert asked["samples"] == 100


def test_prune_leaves_what_was_used_within_the_time(tmp_path, monkeypatch):
    store, now = Store(tmp_path), time.time()
    used = {b"twice": (13, 11), b"twice within an hour": (12.5, 11.75), b"once": (13.1,)}  # hours ago
    for key, times in used.items():
        for ago in times:
            monkeypatch.setattr(time, "time", lambda ago=ago: now - 3600 * ago)
            store.get([key])
            store.put([(key, 0, b"#")])
    store.close()
    assert "deleted 1 answers" in run("cache", "prune", "--older-than", "12h", "--folder", tmp_path).stdout
    assert set(Store(tmp_path).get(used)) == {b"twice", b"twice within an hour"}


def write_much(folder: Any, seed: int) -> int:
    store = Store(folder)
    for i in range(50):
        store.put([((1000 * i + j).to_bytes(16, "big"), seed % 2, b"#" * 100) for j in range(20)])
        store.get([(1000 * i + j).to_bytes(16, "big") for j in range(20)])
    store.close()
    return len(store.database._said)


def begin_at_once(folder: Any, barrier: Any) -> None:
    warnings.simplefilter("error")
    for i in range(100):
        barrier.wait(60)
        Store(folder / str(i)).put([(b"key", 0, b"value")])


def test_a_new_file_that_another_process_is_making_is_not_taken_for_a_foreign_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    processes = [context.Process(target=begin_at_once, args=(tmp_path, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert not list(tmp_path.glob("*/*aside*"))


def test_many_processes_share_a_file(tmp_path):
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        assert sum(pool.map(write_much, [tmp_path / "new"] * 8, range(8))) == 0
    assert Store(tmp_path / "new").info().answers == 2000


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_share_the_answers(tiny, start, monkeypatch):
    import multiprocess

    ds = Dataset.from_dict(ROWS)
    clear = Clear(engine=Transformers(tiny, dtype="float32"), confidence=BSDetector(k=2, max_tokens=8))
    one = ds.map(clear.score, batched=True, load_from_cache_file=False)
    monkeypatch.setattr(multiprocess, "Pool", multiprocess.get_context(start).Pool)
    asked = store_of().info().answers
    two = ds.map(clear.score, batched=True, num_proc=2, load_from_cache_file=False)
    same(one[:], two[:])
    assert store_of().info().answers == asked


def test_it_is_said_once_that_answers_are_known(asked, caplog, monkeypatch):
    monkeypatch.setattr(COUNTS, "known", 0)
    clear = Clear(engine=Counting(), confidence=BSDetector(k=4))
    clear.score(ROWS)
    assert not caplog.text
    for _ in range(2):
        replace(clear, confidence=BSDetector(k=5)).score(ROWS)
    assert caplog.text.count("160 of 180 answers are known from") == 1


def test_a_commit_that_fails_leaves_no_lock_behind(tmp_path):
    writer, reader = (sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None, timeout=0) for _ in range(2))
    writer.execute("CREATE TABLE t (x)")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM t").fetchall()
    with pytest.raises(sqlite3.OperationalError, match="locked"), transaction(writer):
        writer.execute("INSERT INTO t VALUES (1)")
    reader.execute("COMMIT")
    with transaction(writer):
        writer.execute("INSERT INTO t VALUES (2)")
    assert reader.execute("SELECT x FROM t").fetchall() == [(2,)]


@pytest.mark.parametrize("where", ["argument", "environment"])
def test_a_folder_in_the_home_is_there(asked, tmp_path, monkeypatch, where):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLEAR_CACHE", "~/answers" if where == "environment" else str(tmp_path / "unused"))
    monkeypatch.chdir(tmp_path)
    Clear(engine=Counting(), cache="~/answers" if where == "argument" else None).score(ROWS)
    assert (tmp_path / "home" / "answers" / NAME).is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    close_stores()
