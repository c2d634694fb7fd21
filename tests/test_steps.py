from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets.fingerprint import Hasher

import clear_datasets
from clear_datasets import BSDetector, ByConfidence, Chat, Clear, Columns, Pairwise, decide
from clear_datasets.engines.transformers import Transformers
from clear_datasets.engines.vllm import VLLM
from clear_datasets.formats import FormatError
from tests.conftest import Scripted, make_tiny

ROWS = {"question": ["Where?", "Who?", "", "When?"], "answer": ["Alps", "Ada", "x", None], "id": [1, 2, 3, 4]}
ADDED = ["clear_confidence", "clear_consistency", "clear_reflection", "clear_error"]
CLEAR = Clear(engine=Scripted(answers=(("Where?", "Alps"),), yes=("Alps",)))


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_score_adds_typed_columns_and_changes_none(batch_size):
    ds = Dataset.from_dict(ROWS)
    scored = ds.map(CLEAR.score, batched=True, batch_size=batch_size)
    assert scored.column_names == [*ds.column_names, *ADDED]
    assert scored.select_columns(ds.column_names)[:] == ds[:]
    assert scored.features == Clear.features(ds.features)
    confidence = scored["clear_confidence"][:]
    assert confidence[0] > confidence[1]
    assert [math.isnan(c) for c in confidence] == [False, False, True, True]
    assert scored["clear_error"][:] == [
        "", "", "column 'question' is empty", "column 'answer' holds nothing; expected text",
    ]  # fmt: skip


def test_a_first_batch_without_any_score_does_not_fix_the_types():
    ds = Dataset.from_dict({"prompt": ["", "", "Where?"], "response": ["", "", "Alps"]})
    scored = ds.map(CLEAR.score, batched=True, batch_size=1)
    assert scored.features["clear_confidence"] == Value("float32")
    assert not math.isnan(scored[2]["clear_confidence"])


def test_splits_and_streams():
    ds = Dataset.from_dict(ROWS)
    alone = ds.map(CLEAR.score, batched=True)[:]
    splits = DatasetDict(train=ds, test=ds.select([0])).map(CLEAR.score, batched=True)
    assert str(splits["train"][:]) == str(alone)
    stream = ds.to_iterable_dataset().map(CLEAR.score, batched=True, batch_size=2, features=Clear.features(ds.features))
    assert stream.features == Clear.features(ds.features)
    np.testing.assert_array_equal([r["clear_confidence"] for r in stream], alone["clear_confidence"])


def test_formats_are_inferred_or_named():
    chat = Dataset.from_dict(
        {"talk": [[{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Alps"}]]}
    )
    with pytest.raises(FormatError, match="found the columns 'talk'"):
        chat.map(CLEAR.score, batched=True)
    assert chat.map(replace(CLEAR, format=Chat("talk")).score, batched=True)[0]["clear_error"] == ""
    flat = Dataset.from_dict({"q": ["Where?"], "a": ["Alps"]})
    assert flat.map(replace(CLEAR, format=Columns("q", "a")).score, batched=True)[0]["clear_error"] == ""


def test_without_batched_the_error_says_so():
    with pytest.raises(TypeError, match="batched=True"):
        Dataset.from_dict(ROWS).map(CLEAR.score)


@pytest.mark.parametrize("stream", [False, True])
def test_without_batched_a_chat_says_so_too(stream):
    chat = Dataset.from_dict({"messages": [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]})
    with pytest.raises(TypeError, match="batched=True"):
        list((chat.to_iterable_dataset() if stream else chat).map(CLEAR.score))


@pytest.mark.parametrize("kind", [None, "numpy", "torch", "arrow"])
def test_every_format_of_a_dataset_gives_the_same_scores(kind):
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Alps"}]
    sources = (
        {**ROWS, "tags": [["a"], [], ["b", "c"], []]},
        {"messages": [turns, [], [{"role": "system", "content": "Hm."}, *turns]], "vector": [[1.0], [2.0], [3.0, 4.0]]},
    )
    for source in sources:
        ds = Dataset.from_dict(source)
        scored = ds.with_format(kind).map(CLEAR.score, batched=True, batch_size=2).with_format(None)
        assert str(scored[:]) == str(ds.map(CLEAR.score, batched=True)[:])


def test_data_frames_are_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"DataFrame: use ds.with_format\(None\)"):
        Dataset.from_dict(ROWS).with_format("pandas").map(CLEAR.score, batched=True)


def hash_elsewhere(code: str) -> str:
    program = (
        f"from clear_datasets import *\nfrom datasets.fingerprint import Hasher\nprint(Hasher.hash(({code}).score))"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_equal_settings_hash_equal_across_processes_and_others_do_not(tiny):
    code = f"Clear({tiny!r}, confidence=BSDetector(k=2))"
    clear = Clear(tiny, confidence=BSDetector(k=2))
    assert Hasher.hash(clear.score) == hash_elsewhere(code)
    others = [
        Clear(tiny), Clear(tiny, "main", confidence=BSDetector(k=2)), Clear(tiny, confidence=BSDetector(k=2, beta=0.5)),
        Clear(tiny, confidence=BSDetector(k=2), format=Columns()),
        Clear(tiny, confidence=BSDetector(k=2), engine=Transformers(tiny, seed=1)),
    ]  # fmt: skip
    assert len({Hasher.hash(c.score) for c in [clear, *others]}) == 6


def test_a_model_retrained_in_its_place_changes_the_hash(tmp_path):
    make_tiny(tmp_path)
    kept = Clear(str(tmp_path))
    before = Hasher.hash(kept.score), Transformers(str(tmp_path))
    make_tiny(tmp_path, hidden_size=64)
    assert Hasher.hash(Clear(str(tmp_path)).score) == Hasher.hash(kept.score) != before[0]
    assert Transformers(str(tmp_path)) != before[1]


def test_an_empty_first_chat_does_not_hide_the_keys_of_the_others():
    chats = [[], [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Alps"}]]
    scored = Dataset.from_dict({"conversations": chats}).map(CLEAR.score, batched=True)
    assert scored["clear_error"][:] == ["column 'conversations' has 0 turns and none of the assistant", ""]


def test_columns_that_are_always_empty_do_not_hide_them_either():
    chats = [[], [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Alps"}]]
    ds = Dataset.from_dict({"conversations": chats, "tools": [None, None]})
    assert [bool(e) for e in ds.map(CLEAR.score, batched=True)["clear_error"][:]] == [True, False]


def test_a_raised_revision_of_the_scores_changes_the_hash(monkeypatch):
    before = Hasher.hash(Clear("m").score)
    monkeypatch.setattr("clear_datasets.steps.SCORES_REVISION", 10_000)
    assert Hasher.hash(Clear("m").score) != before


def test_a_second_map_comes_from_the_cache_and_another_model_or_prompt_does_not(tiny, tmp_path, user):
    ds = Dataset.from_dict({"question": ["Where?", "Who?"], "answer": ["Alps", "Ada"]})
    ds.save_to_disk(tmp_path / "ds")
    ds = Dataset.load_from_disk(str(tmp_path / "ds"))
    settings = BSDetector(k=1, max_tokens=4)
    first = ds.map(Clear(tiny, confidence=settings).score, batched=True)
    again = ds.map(Clear(tiny, confidence=settings).score, batched=True)
    assert first.cache_files == again.cache_files != []
    for other in (
        Clear(tiny, confidence=replace(settings, samples="reasoned", reflection="reasoned", k=1)),
        Clear(tiny, confidence=settings, format=Columns("answer", "question")),
        Clear(tiny, confidence=settings, engine=Transformers(tiny, dtype="float64")),
    ):
        assert ds.map(other.score, batched=True).cache_files != first.cache_files


def test_worker_processes_give_the_same_scores(tiny):
    ds = Dataset.from_dict({"question": [f"Where is {i}?" for i in range(6)], "answer": [f"at {i}" for i in range(6)]})
    clear = Clear(engine=Transformers(tiny, dtype="float32", device="cpu"), confidence=BSDetector(k=2, max_tokens=4))
    two = ds.map(clear.score, batched=True, num_proc=2, with_rank=True)
    one = ds.map(clear.score, batched=True)
    np.testing.assert_allclose(two["clear_consistency"][:], one["clear_consistency"][:], atol=1e-4)


def test_the_modules_own_score_is_that_of_a_default_clear(tiny, monkeypatch):
    monkeypatch.setenv("CLEAR_MODEL", tiny)
    assert clear_datasets.score.__self__ == Clear(tiny)
    ds = Dataset.from_dict({"question": ["Where?"], "answer": ["Alps"]})
    scored = ds.map(clear_datasets.score, batched=True)
    assert "clear_confidence" in scored.column_names
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        clear_datasets.scores  # noqa: B018


def test_importing_the_package_loads_no_model_library():
    program = "import sys, clear_datasets; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_features_are_the_sources_and_the_added_ones():
    features = Clear.features(Features({"question": Value("string")}))
    assert list(features) == ["question", *ADDED]


@dataclass(frozen=True)
class Tunable(Scripted):
    """An engine whose writer answers with the name of the adapter."""

    def with_writer(self, writer):
        return Scripted(answers=(("Where?", writer), ("Who?", "Ada")), limit=100 if writer == "the Andes" else 30)


def test_an_answer_that_is_cut_off_is_no_candidate(tiny):
    rows = {"question": ["Where does it rise?"], "answer": ["the Alps"]}
    proposed = Clear(tiny).with_writer(tiny).propose(rows)  # a random model goes on and on
    assert proposed == {
        "clear_candidate": [""],
        "clear_agreed": [False],
        "clear_error": ["no candidate: the answer is cut off at 256 tokens"],
    }


def test_candidates_are_proposed_for_rows_at_or_below_gamma_and_judged_by_the_base_model():
    rows = {
        "question": ["Where?", "Where?", "Who?", "Who?" + " really" * 10, "Where?", ""],
        "answer": ["Rome", "Rome", "Ada ", "Grace", "Oslo", "x"],
        "clear_confidence": [0.2, 0.9, 0.1, 0.1, 0.5, math.nan],
        "clear_error": ["", "", "", "", "", "column 'question' is empty"],
    }
    engine = Tunable(yes=("Which answer is better",))  # the first label is likely
    clear = Clear(engine=engine, preference=Pairwise()).with_writer("the Alps", gamma=0.5)
    ds = Dataset.from_dict(rows)
    proposed = ds.map(clear.propose, batched=True, batch_size=4)
    assert proposed["clear_candidate"][:] == ["the Alps", "", "", "", "the Alps", ""]
    assert proposed["clear_agreed"][:] == [False, False, True, False, False, False]  # "Ada ", but for the space
    assert proposed.features["clear_agreed"] == Value("bool")
    errors = ["", "", "", "no candidate: the prompt has 74 characters, the limit is 30", "", rows["clear_error"][5]]
    assert proposed["clear_error"][:] == errors
    known = Clear(engine=engine, gamma=0.5).with_writer("the Alps")  # which keeps the threshold that is there
    assert ds.map(known.propose, batched=True)["clear_candidate"][:] == proposed["clear_candidate"][:]
    assert known.with_writer("the Alps", gamma=0.1).gamma == 0.1
    everything = Dataset.from_dict(rows).map(Clear(engine=engine).with_writer("the Alps").propose, batched=True)
    assert everything["clear_candidate"][:] == ["the Alps", "the Alps", "", "", "the Alps", ""]
    other = proposed.map(clear.with_writer("the Andes", gamma=0.5).propose, batched=True)  # it reads longer prompts
    assert other["clear_candidate"][:] == ["the Andes", "", "", "Ada", "the Andes", ""]
    assert other["clear_error"][:] == [*[""] * 5, rows["clear_error"][5]]
    judged = proposed.map(clear.prefer, batched=True, batch_size=1)
    np.testing.assert_allclose(judged["clear_preference"][:], [0.5, *[math.nan] * 3, 0.5, math.nan])
    np.testing.assert_allclose(judged["clear_position_bias"][:], [0.85, *[math.nan] * 3, 0.85, math.nan], rtol=1e-6)
    assert judged.features["clear_preference"] == judged.features["clear_position_bias"] == Value("float32")
    assert judged.select_columns(["question", "answer", "clear_confidence"])[0] == {
        "question": "Where?", "answer": "Rome", "clear_confidence": 0.2
    }  # fmt: skip


def test_by_default_the_estimator_that_scores_judges_candidates():
    rows = {"question": ["Where?", "Who?"], "answer": ["Rome", "Ada"], "clear_candidate": ["the Alps", "Grace"]}
    engine, estimator = Scripted(answers=(("Where?", "the Alps"), ("Who?", "Ada"))), BSDetector(k=2, alpha=1)
    judged = Clear(engine=engine, confidence=estimator).prefer(rows)
    same = Clear(engine=engine, preference=ByConfidence(estimator)).prefer(rows)
    np.testing.assert_array_equal(judged["clear_preference"], same["clear_preference"])
    assert judged["clear_preference"][0] > 0.5 > judged["clear_preference"][1]


def test_steps_say_which_one_is_missing():
    ds = Dataset.from_dict({"question": ["Where?"], "answer": ["Rome"]})
    for step, message in (
        (CLEAR.propose, "no model writes candidates"),
        (CLEAR.with_writer("a", gamma=0.5).propose, "no column 'clear_confidence'"),
        (CLEAR.prefer, "no column 'clear_candidate'"),
    ):
        with pytest.raises(ValueError, match=message):
            ds.map(step, batched=True)
    with pytest.raises(TypeError, match="Scripted runs one model alone"):
        ds.map(CLEAR.with_writer("a").propose, batched=True)


def test_a_writer_that_was_trained_again_writes_anew(tiny, tmp_path):
    clear = Clear("m").with_writer(tmp_path)
    before = Hasher.hash(clear.propose)
    assert before == Hasher.hash(Clear("m").with_writer(str(tmp_path)).propose)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert Hasher.hash(clear.propose) != before


LATER = ("clear_candidate", "clear_agreed", "clear_preference", "clear_position_bias")


@pytest.mark.parametrize("kind", [None, "numpy", "arrow"])
def test_another_model_does_not_take_over_the_candidates_of_an_earlier_one(kind):
    ds = Dataset.from_dict({"question": ["Where?", "Who?"], "answer": ["Rome", "Ada"]})
    first = Clear(engine=Tunable(answers=(("Where?", "the Alps"),), yes=("the Alps",))).with_writer("the Alps")
    ds = ds.map(first.score, batched=True).map(first.propose, batched=True).map(first.prefer, batched=True)
    assert ds.map(decide(1.0), batched=True)["clear_decision"][:] == ["replace", "drop"]  # the usual way
    assert ds["clear_agreed"][:] == [False, True]
    second = Clear(engine=Tunable(answers=(("Where?", "Rome"),), yes=("Rome",))).with_writer("the Andes")
    again = ds.with_format(kind).map(second.score, batched=True).with_format(None)
    assert {**again.features} == {**ds.features}
    rows = again.select_columns([*LATER])[:]
    assert (rows["clear_candidate"], rows["clear_agreed"]) == (["", ""], [False, False])
    assert np.isnan([rows["clear_preference"], rows["clear_position_bias"]]).all()
    assert again.map(decide(1.0), batched=True)["clear_decision"][:] == ["drop", "drop"]
    other = ds.with_format(kind).map(second.propose, batched=True).with_format(None)
    assert other["clear_candidate"][:] == ["the Andes", ""]
    assert np.isnan(other["clear_preference"][:]).all()  # they are of the first model's candidates
    assert {**other.features} == {**ds.features}


def test_rows_without_candidates_get_no_columns_of_them():
    scored = Dataset.from_dict(ROWS).map(CLEAR.score, batched=True)
    assert not {*LATER} & {*scored.column_names}
    assert not {*LATER[2:]} & {*scored.map(Clear(engine=Tunable()).with_writer("w").propose, batched=True).features}


def test_a_model_may_be_given_as_a_path(tiny):
    detector = BSDetector(k=1, max_tokens=4)
    one, other = Clear(Path(tiny), confidence=detector), Clear(tiny, confidence=detector)
    assert (one, hash(one.model), repr(one)) == (other, hash(other.model), repr(other))
    assert Hasher.hash(one.score) == Hasher.hash(other.score)
    rows = {"question": ["Where?"], "answer": ["Alps"]}
    assert str(one.score(rows)) == str(other.score(rows))
    assert Clear("m", writer=Path("out/adapter")) == Clear("m", writer=os.path.join("out", "adapter"))


def test_the_model_is_that_of_the_engine_whatever_clear_model_says(monkeypatch):
    engine = VLLM("org/model", "v2")
    before = Hasher.hash(Clear(engine=engine).score)
    monkeypatch.setenv("CLEAR_MODEL", "org/other")
    clear = Clear(engine=engine)
    assert (clear.model, clear.revision) == ("org/model", "v2")
    assert Hasher.hash(clear.score) == before
    assert clear == Clear("org/model", "v2", engine=engine)
    assert repr(clear).startswith("Clear(model='org/model', revision='v2', engine=VLLM(")
    assert Clear("org/base", engine=engine).model == "org/base"  # of a server, say, that has names of its own
    assert Clear("org/base", engine=engine).revision is None
    assert Clear().model == Clear(engine=Scripted()).model == "org/other"


def test_adaptive_samples_without_a_threshold_are_refused():
    clear = Clear(engine=Tunable(), adaptive=True)
    with pytest.raises(ValueError, match=r"adaptive=True .* Clear\(gamma=...\), or call ds = score_to_keep"):
        Dataset.from_dict(ROWS).map(clear.score, batched=True)
    scored = Dataset.from_dict(ROWS).map(clear.with_writer("the Alps", gamma=0.5).score, batched=True)
    assert "clear_drawn" in scored.column_names
    assert "clear_candidate" in scored.map(clear.with_writer("the Alps").propose, batched=True).column_names


@pytest.mark.parametrize(
    "how, message",
    [
        ({"with_indices": True}, "rank is a list; expected a number, as by with_rank=True: leave with_indices out"),
        ({"input_columns": ["question"]}, "got a list; .* leave input_columns=.* out"),
        ({"input_columns": ["question", "answer"]}, "got a list; .* leave input_columns=.* out"),
    ],
)
def test_other_arguments_of_map_are_named(how, message):
    ds = Dataset.from_dict({**ROWS, "clear_candidate": ["a", "b", "", ""]})
    clear = CLEAR.with_writer("a")
    for step in (clear.score, clear.propose, clear.prefer):
        with pytest.raises(TypeError, match=message):
            ds.map(step, batched=True, **how)


def test_rows_of_either_shape_of_chat_are_scored_in_one_batch_as_alone():
    shapes = [
        ("from", "value", "human", "gpt"),
        ("from", "value", "human", "gpt"),
        ("role", "content", "user", "assistant"),
    ]
    chats = [
        [{key: user, text: f"Where is {i}?"}, {key: model, text: "here"}]
        for i, (key, text, user, model) in enumerate(shapes)
    ]
    clear = Clear(engine=Scripted(), cache=False)
    found = clear.score({"conversations": chats})
    assert found["clear_error"] == [""] * 3
    for i, chat in enumerate(chats):
        assert clear.score({"conversations": [chat]})["clear_confidence"][0] == found["clear_confidence"][i]


def test_candidates_of_a_model_that_thinks_first_are_what_it_says_then():
    class Writing(Scripted):
        def with_writer(self, writer):
            return self

    engine = Writing(answers=(("capital", "<think>Rome? No.</think>\nParis"), ("river", "<think>It is")))
    batch = {"question": ["The capital?", "The river?"], "answer": ["Rome", "Seine"], "clear_confidence": [0.1, 0.1]}
    found = Clear(engine=engine, cache=False, writer="w", gamma=0.5).propose(batch)
    assert found["clear_candidate"] == ["Paris", ""]
