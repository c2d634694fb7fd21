"""Servers that answer late, half, or nonsense: an error within a bounded time, and what was answered stays."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from clear_datasets import BSDetector, Clear
from clear_datasets.engines import EngineError
from clear_datasets.engines.cache import close_stores

pytest.importorskip("openai")

from clear_datasets.engines import openai as module
from clear_datasets.engines.openai import OpenAI
from tests.engines.test_openai import Reply, ask, content, failed, said, server

__all__ = ["server"]  # a fixture

ROWS = {"question": [f"Where is {i}?" for i in range(6)], "answer": [f"at {i}" for i in range(6)]}
JSON, HTML = {"Content-Type": "application/json"}, {"Content-Type": "text/html"}


def completion(**choice: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "x"}
    choices = [{"index": 0, "finish_reason": "stop", "message": message, "logprobs": None, **choice}]
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}


NONSENSE: dict[str, Reply] = {
    "a page": (200, b"<html>Welcome to the proxy</html>", HTML),
    "a page that claims to be JSON": (200, b"<html>Welcome</html>", JSON),
    "half of JSON": (200, json.dumps(completion()).encode()[:40], JSON),
    "nothing": (200, b"", JSON),
    "bytes": (200, b"\xff\xfe\x00\x80", JSON),
    "null": (200, None, JSON),
    "a list": (200, [1, 2], JSON),
    "a number": (200, 7, JSON),
    "an error with the status of success": (200, {"error": {"message": "overloaded"}}, JSON),
    "no choices": (200, {**completion(), "choices": []}, JSON),
    "null for choices": (200, {**completion(), "choices": None}, JSON),
    "numbers for choices": (200, {**completion(), "choices": [1]}, JSON),
    "a text for choices": (200, {**completion(), "choices": "abc"}, JSON),
    "no message": (200, completion(message=None), JSON),
    "a number for the text": (200, completion(message={"role": "assistant", "content": 7}), JSON),
    "parts for the text": (200, completion(message={"role": "assistant", "content": [{"text": "x"}]}), JSON),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_reply_of_nonsense_is_a_clear_error(server, kind):
    server.reply = lambda body: NONSENSE[kind]
    engine = OpenAI("m", server.url, api_key="k", retries=0, deadline=20)
    began = time.monotonic()
    for asking in (lambda: engine.generate([ask("Where?")]), lambda: engine.choose([ask("Where?")], ["Yes", "No"])):
        with pytest.raises(EngineError, match=r"127\.0\.0\.1.*(no chat completion|without any answer)") as caught:
            asking()
        assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("logprobs", [
    {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": None}]},
    {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": [{"token": None, "logprob": -1.0}]}]},
    {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": [{"token": "Yes", "logprob": "high"}]}]},
    {"content": [None]},
    {"content": 5},
])  # fmt: skip
def test_log_probabilities_of_nonsense_are_a_clear_error(server, logprobs):
    server.reply = lambda body: (200, completion(logprobs=logprobs), JSON)
    with pytest.raises(EngineError, match="no chat completion"):
        OpenAI("m", server.url, api_key="k").choose([ask("Right?")], ["Yes", "No"])


def test_one_reply_without_an_answer_does_not_make_a_server_one_without_log_probabilities(server):
    replies = iter([NONSENSE["no choices"], said("x", logprobs={"Yes": 0.9, "No": 0.1})({})])
    server.reply = lambda body: next(replies)
    engine = OpenAI("m", server.url, api_key="k")
    with pytest.raises(EngineError, match="without any answer"):
        engine.choose([ask("Right?")], ["Yes", "No"])
    np.testing.assert_allclose(engine.choose([ask("Right?")], ["Yes", "No"]), [[0.9, 0.1]], rtol=1e-5)


def test_no_text_is_an_empty_answer_and_half_a_character_is_replaced(server):
    texts = iter([None, "caf\ud83d", "fine"])
    server.reply = lambda body: (200, completion(message={"role": "assistant", "content": next(texts)}), JSON)
    clear = Clear(engine=OpenAI("m", server.url, api_key="k", concurrency=1), writer="w")
    ds = Dataset.from_dict({name: values[:3] for name, values in ROWS.items()}).map(clear.propose, batched=True)
    assert ds["clear_candidate"][:] == ["", "caf?", "fine"]


def always(reply: Reply) -> Callable[[dict[str, Any]], Reply]:
    return lambda body: reply


BODY = json.dumps(completion()).encode()
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Reply], str]] = {
    "500": (always(failed(500, "broken")), "broken"),
    "503 and a page": (always((503, b"<html>Bad gateway</html>", HTML)), "Bad gateway|503"),
    "429 and the seconds to wait": (always(failed(429, "slow down", **{"Retry-After": "1"})), "slow down"),
    "429 and an hour to wait": (always(failed(429, "quota used up", **{"Retry-After": "3600"})), "quota used up"),
    "half a body": (always((200, BODY[:50], {**JSON, "Content-Length": str(len(BODY))})), "fails for m"),
    "403": (always(failed(403, "this key may not")), "this key may not"),
    "404": (always(failed(404, "The model m does not exist")), "does not exist"),
    "late": (lambda body: time.sleep(6) or said("late")(body), "fails for m|deadline of 3 s"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_fails_again_and_again_ends(server, kind):
    server.reply, reason = FAULTS[kind]
    began = time.monotonic()
    with pytest.raises(EngineError, match=reason):
        OpenAI("m", server.url, api_key="k", retries=1, deadline=3).generate([ask("Where?")])
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("kind", ["500", "503 and a page", "429 and the seconds to wait", "half a body"])
def test_what_fails_once_is_tried_again(server, kind):
    seen: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> Reply:
        seen[content(body)] += 1
        return FAULTS[kind][0](body) if seen[content(body)] == 1 else said("fine")(body)

    server.reply = reply
    assert OpenAI("m", server.url, api_key="k").generate([ask("a"), ask("b")]) == [["fine"], ["fine"]]
    assert set(seen.values()) == {2}


@pytest.mark.parametrize("reply", [failed(500, "broken"), NONSENSE["a page"], failed(401, "no such key")])
def test_what_was_answered_before_a_fault_is_kept_on_disk(server, reply, monkeypatch):
    fine = said("at 1", logprobs={"Yes": 0.6, "No": 0.3})
    server.reply = lambda body: reply if len(server.asked) == 12 else fine(body)
    clear = Clear(engine=OpenAI("m", server.url, "k", concurrency=1, retries=0), confidence=BSDetector(k=2))
    with pytest.raises(EngineError):
        clear.score(ROWS)
    assert len(server.asked) == 12
    close_stores()
    monkeypatch.setattr(module, "_PAID", {})  # as in another process
    server.reply, server.asked = fine, []
    found = clear.score(ROWS)
    assert len(server.asked) == 3 * 6 - 11  # two samples in one request, and two questions, for each row
    assert not any(found["clear_error"])
    np.testing.assert_array_equal(found["clear_confidence"], Clear(
        engine=clear.engine, confidence=clear.confidence, cache=False).score(ROWS)["clear_confidence"])  # fmt: skip


def test_a_server_that_is_gone(tmp_path):
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9/v1 fails for m"):
        Clear(engine=OpenAI("m", "http://127.0.0.1:9/v1", "k", retries=1)).score(ROWS)
    assert time.monotonic() - began < 10
