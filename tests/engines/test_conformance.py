"""What every engine does alike: the same tests on the scripted one, Transformers, vLLM, and a server on loopback."""

from __future__ import annotations

import pickle
import signal
import threading
import time

import numpy as np
import pytest

from clear_datasets import BSDetector, ByConfidence, Clear, Example, Pairwise
from clear_datasets.engines import Asks, PromptError
from clear_datasets.engines.cache import Cached

PASSAGE = "The river rises in the Alps and ends in the North Sea; nobody swims in it in winter. " * 2
TEXTS = ["Who?", PASSAGE + "Where does it rise?", "2 + 2 = ?", PASSAGE + "Where does it end?", "größer, 日本語, 🙂"]


@pytest.fixture(scope="module")
def prompts():
    return [[{"role": "user", "content": t}] for t in TEXTS]


def test_answers_come_in_the_order_asked_and_repeat_at_temperature_0(engine, prompts):
    found = engine.generate(prompts, max_tokens=8)
    assert found == engine.generate(prompts, max_tokens=8)
    assert found[::-1] == engine.generate(prompts[::-1], max_tokens=8)
    assert [len(texts) for texts in found] == [1] * len(TEXTS)
    assert len({texts[0] for texts in found}) > 2
    assert all(text == text.strip() for [text] in found)


def test_n_samples_of_each_prompt(engine, prompts):
    found = engine.generate(prompts, n=3, temperature=1.0, max_tokens=[4, 8, 12, 4, 8])
    assert [len(texts) for texts in found] == [3] * len(TEXTS)
    greedy = engine.generate(prompts, n=3, max_tokens=4)
    assert all(len(texts) == 3 and len(set(texts)) == 1 for texts in greedy)
    with pytest.raises(ValueError, match="2 numbers for 5 prompts"):
        engine.generate(prompts, max_tokens=[1, 2])


def test_labels_share_the_probability(engine, prompts):
    found = engine.choose(prompts, ["Yes", "No"])
    assert found.shape == (len(TEXTS), 2)
    assert found.dtype == np.float32
    known = ~np.isnan(found).any(axis=1)
    assert known.any()
    np.testing.assert_allclose(found[known].sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_allclose(engine.choose(prompts[::-1], ["Yes", "No"])[::-1], found, atol=0.02)
    swapped = engine.choose(prompts, ["No", "Yes"])
    if type(engine).__name__ != "Scripted":  # whose first label is the right one
        np.testing.assert_allclose(swapped[known][:, ::-1], found[known], atol=0.02)


def test_labels_that_begin_alike(engine, prompts):
    found = engine.choose(prompts, ["Yes", "Yesterday", "No"])
    known = ~np.isnan(found).any(axis=1)
    assert known.any()
    np.testing.assert_allclose(found[known].sum(axis=1), 1, rtol=1e-4)
    assert (found[known] >= 0).all()


def test_an_empty_batch(engine):
    assert engine.generate([]) == []
    assert engine.choose([], ["Yes", "No"]).shape == (0, 2)
    answers = engine.answer(Asks())
    assert answers.generated == []
    assert answers.read == []


def test_texts_that_are_cut_off_are_marked(engine, prompts):
    if type(engine).__name__ == "Scripted":
        pytest.skip("it says whole words, whatever the limit")
    short = engine.answer(Asks(prompts[:2], 2, 0.0, 1)).cut
    assert short == [[True, True], [True, True]]
    found = engine.answer(Asks(prompts, 20, 1.0, 256))
    whole = [not c for cut in found.cut for c in cut]
    assert [len(cut) for cut in found.cut] == [20] * len(prompts)
    assert any(whole)


def test_prompts_that_are_too_long_are_named_and_the_rest_can_be_asked(engine, prompts):
    long = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(PromptError) as caught:
        engine.generate([prompts[0], long, prompts[2]], max_tokens=8)
    assert list(caught.value.reasons) == [1]
    assert "600" in caught.value.reasons[1] or "512" in caught.value.reasons[1]
    with pytest.raises(PromptError) as caught:
        engine.answer(Asks([prompts[0]], 1, 0.0, 8, [prompts[0], long], ["Y", "N"]))
    assert list(caught.value.reasons) == [2]
    assert engine.generate([prompts[0], prompts[2]], max_tokens=8) == [
        engine.generate([p], max_tokens=8)[0] for p in (prompts[0], prompts[2])
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_a_sample_a_prompt_is_only_looked_at(engine, prompts, temperature):
    found = Cached(engine).answer(Asks(prompts, 0, temperature, 8, prompts[:1], ["Yes", "No"]))
    assert found.generated == [[]] * len(prompts)
    assert len(found.chosen) == 1
    assert engine.generate(prompts[:2], n=0, temperature=temperature, max_tokens=8) == [[], []]
    if engine.reads:  # a server is asked nothing
        long = [{"role": "user", "content": "x" * 600}]
        with pytest.raises(PromptError) as caught:
            Cached(engine).answer(Asks([prompts[0], long], 0, temperature, 8))
        assert list(caught.value.reasons) == [1]


def test_log_probabilities_of_a_response(engine, prompts):
    if not engine.reads:
        pytest.skip("a server of chat completions gives no log-probabilities of a given text")
    responses = ["Alps", "", "5", "in the North Sea", "日本"]
    found = engine.logprobs(prompts, responses)
    assert all(x.dtype == np.float32 and (x <= 0).all() for x in found)
    for mine, prompt, response in zip(found, prompts, responses, strict=True):
        np.testing.assert_allclose(engine.logprobs([prompt], [response])[0], mine, atol=0.05)  # now cached, maybe


def test_a_batch_of_all_kinds_scores_rows(engine):
    rows = {"prompt": TEXTS, "response": ["Alps", "the Alps", "4", "in the North Sea", "y" * 2000]}
    scored = Clear(engine=engine, confidence=BSDetector(k=2, max_tokens=8)).score(rows)
    assert [bool(e) for e in scored["clear_error"][:4]] == [bool(np.isnan(c)) for c in scored["clear_confidence"][:4]]
    assert scored["clear_error"][4]  # too long
    assert np.isnan(scored["clear_confidence"][4])
    assert not all(scored["clear_error"][:4])


def test_exchanged_responses_are_preferred_the_other_way_round(engine, prompts):
    if type(engine).__name__ == "Scripted":
        pytest.skip("its first label is the right one, whatever stands there")
    pairs = [(p, a, b) for p, a, b in zip(prompts, ["Alps", "4", "x"], ["Rome", "5", "y"], strict=False)]
    there = Pairwise()([Example(p, a) for p, a, _ in pairs], [b for *_, b in pairs], engine)
    back = Pairwise()([Example(p, b) for p, _, b in pairs], [a for _, a, _ in pairs], engine)
    assert not np.isnan(there.preference).all()
    np.testing.assert_allclose(there.preference, 1 - back.preference, atol=0.02)


def test_exchanged_responses_are_compared_with_the_same_samples(engine, prompts):
    examples = [Example(prompts[0], "Alps"), Example(prompts[0], "a river, in the north of Italy")]
    judge = ByConfidence(BSDetector(beta=1))
    found = judge(examples, [example.response for example in reversed(examples)], engine)
    assert found.errors == ["", ""]
    np.testing.assert_allclose(found.preference[0], 1 - found.preference[1], atol=1e-5)


def test_an_engine_is_its_configuration(engine, prompts):
    before = pickle.dumps(engine)
    engine.generate(prompts[:1], max_tokens=2)
    assert pickle.dumps(engine) == before
    assert pickle.loads(before) == engine
    assert hash(pickle.loads(before)) == hash(engine)


def test_an_interrupt_stops_the_batch_and_the_next_one_is_answered(engine, prompts):
    if type(engine).__name__ == "Scripted":
        pytest.skip("it answers at once")
    wanted = engine.generate(prompts, max_tokens=8)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        started, main = time.monotonic(), threading.main_thread().ident
        threading.Timer(0.5, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            [engine.generate(prompts, n=50, temperature=1.0, max_tokens=250) for _ in range(1000)]
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 60
    assert engine.generate(prompts, max_tokens=8) == wanted


def test_a_model_without_a_chat_template(bare, prompts):
    found = bare.generate(prompts, max_tokens=8)
    assert found == bare.generate(prompts, max_tokens=8)
    assert len({texts[0] for texts in found}) > 2


def test_a_chat_template_without_a_system_role(strict):
    user = {"role": "user", "content": "Who?"}
    with_system, without = strict.generate([[{"role": "system", "content": "Be brief."}, user], [user]], max_tokens=8)
    joined = strict.generate([[{"role": "user", "content": "Be brief.\n\nWho?"}]], max_tokens=8)
    assert with_system == joined[0]
    assert with_system != without
