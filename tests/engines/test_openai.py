"""The OpenAI engine against a small server on loopback that fails the way servers do."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from datasets.fingerprint import Hasher

from clear_datasets import BSDetector, Clear
from clear_datasets.engines import Asks, EngineError, PromptError
from clear_datasets.engines.cache import cached

pytest.importorskip("openai")

from clear_datasets.engines.openai import OpenAI

Reply = tuple[int, Any, dict[str, str]]


class Server:
    """A server whose replies a test sets; it counts what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = said("fine")
        self.asked: list[dict[str, Any]] = []
        self.under_way, self.most = 0, 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.asked.append({**body, "key": self.headers["Authorization"]})
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                status, answer, headers = outer.reply(body)
                with outer.lock:
                    outer.under_way -= 1
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = "Content-Length" in headers  # half a body

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def said(*texts: str, logprobs: dict[str, float] | None = None) -> Callable[[dict[str, Any]], Reply]:
    """A reply of these texts, one for each of n in turn."""

    def reply(body: dict[str, Any]) -> Reply:
        top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in (logprobs or {}).items()]
        first = {"token": "x", "logprob": 0.0, "bytes": None, "top_logprobs": top}
        choices = [
            {
                "index": i,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": texts[i % len(texts)]},
                "logprobs": {"content": [first]} if logprobs else None,
            }
            for i in range(body.get("n", 1))
        ]
        return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}, {}

    return reply


def failed(status: int, message: str, **headers: str) -> Reply:
    return status, {"error": {"message": message, "type": "x", "code": None}}, headers


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.http.shutdown()


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def content(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def test_many_requests_are_under_way_but_never_more_than_said(server):
    def slow(body):
        time.sleep(0.2)
        return said(content(body) + " ")(body)

    server.reply = slow
    engine = OpenAI("m", server.url, api_key="k", concurrency=8)
    texts = [str(i) for i in range(60)]
    assert engine.generate([ask(t) for t in texts]) == [[t] for t in texts]
    assert 4 < server.most <= 8
    assert {a["temperature"] for a in server.asked} == {0.0}
    assert {a["top_p"] for a in server.asked} == {1.0}


def test_n_answers_even_from_a_server_that_gives_one(server):
    numbers = iter(range(100))
    server.reply = lambda body: said(str(next(numbers)))({**body, "n": 1})
    [texts] = OpenAI("m", server.url, api_key="k").generate([ask("Who?")], n=3, temperature=1.0)
    assert texts == ["0", "1", "2"]


def test_label_probabilities_come_from_the_log_probabilities_of_one_token(server):
    server.reply = said("x", logprobs={"Yes": 0.3, " Yes": 0.1, "No": 0.2, " no": 0.2, "Maybe": 0.2})
    found = OpenAI("m", server.url, api_key="k").choose([ask("Right?")], ["Yes", "No"])
    np.testing.assert_allclose(found, [[0.4 / 0.6, 0.2 / 0.6]], rtol=1e-5)
    assert server.asked[0]["max_tokens"] == 1
    assert server.asked[0]["top_logprobs"] == 20
    server.reply = said("x", logprobs={"Perhaps": 0.9})
    assert np.isnan(OpenAI("m", server.url, api_key="k").choose([ask("Right?")], ["Yes", "No"])).all()


def test_a_server_without_log_probabilities_is_asked_20_times_and_that_is_said_once(server):
    server.reply = said("Yes.", "Yes, it is", "No", "Who knows")
    engine = OpenAI("silent", server.url, api_key="k")
    with pytest.warns(UserWarning, match="counted in 20 answers"):
        found = engine.choose([ask("Right?"), ask("Sure?")], ["Yes", "No"])
    np.testing.assert_allclose(found, [[2 / 3, 1 / 3]] * 2, rtol=1e-5)
    server.reply = said("Answer: B", "Correct.", "B.", "(B)", "Certainly", "A", "B, surely")
    [shares] = engine.choose([ask("Which?")], ["A", "B", "C"])
    np.testing.assert_allclose(shares, [1 / 3, 2 / 3, 0], atol=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.choose([ask("Really?")], ["Yes", "No"])


@pytest.mark.parametrize("status", [429, 503])
def test_what_fails_for_load_is_tried_again_when_the_server_says(server, status):
    seen: Counter[str] = Counter()

    def busy(body):
        seen[content(body)] += 1
        if seen[content(body)] == 1:
            return failed(status, "slow down", **{"Retry-After": "1"})
        return said("fine")(body)

    server.reply = busy
    started = time.monotonic()
    assert OpenAI("m", server.url, api_key="k").generate([ask("a"), ask("b")]) == [["fine"], ["fine"]]
    assert time.monotonic() - started >= 1
    assert set(seen.values()) == {2}


def overloaded(code: int = 502) -> Reply:
    """As OpenRouter says it: the status is that of success."""
    return 200, {"id": "1", "error": {"message": "Provider\nreturned error", "code": code}, "user_id": "u"}, {}


def test_an_error_with_the_status_of_success_is_tried_again(server):
    seen: Counter[str] = Counter()

    def busy(body):
        seen[content(body)] += 1
        return overloaded() if seen[content(body)] == 1 else said("x", logprobs={"Yes": 0.6, "No": 0.2})(body)

    server.reply = busy
    found = OpenAI("m", server.url, api_key="k").answer(Asks([ask("a")], choose=[ask("b")], labels=("Yes", "No")))
    assert found.generated == [["x"]]
    np.testing.assert_allclose(found.chosen, [[0.75, 0.25]], rtol=1e-5)
    assert seen == {"a": 2, "b": 2}


def test_an_error_with_the_status_of_success_that_stays_is_quoted(server):
    server.reply = lambda body: overloaded()
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"127\.0\.0\.1.* without any answer: Provider returned error$"):
        OpenAI("m", server.url, api_key="k", retries=2).generate([ask("a")])
    assert len(server.asked) == 3
    assert time.monotonic() - started >= 1.5  # pauses of 0.5 and 1


@pytest.mark.parametrize("status", [400, 403, 404])
def test_a_model_whose_log_probabilities_are_refused_is_counted(server, status):
    def strict(body):
        if "logprobs" in body:
            return failed(status, "You are not allowed to request logprobs from this model")
        return said("Yes", "Yes", "No")(body)

    server.reply = strict
    engine = OpenAI("m", server.url, api_key="k")
    with pytest.warns(UserWarning, match="no log-probabilities: labels are counted in 20 answers"):
        found = engine.choose([ask("Right?")], ["Yes", "No"])
    np.testing.assert_allclose(found, [[14 / 20, 6 / 20]], rtol=1e-5)
    server.asked.clear()
    engine.choose([ask("Sure?")], ["Yes", "No"])
    assert not any("logprobs" in asked for asked in server.asked)
    server.reply = lambda body: failed(403, "this key may not")
    with pytest.raises(EngineError, match="this key may not"):
        OpenAI("other", server.url, api_key="k").choose([ask("Right?")], ["Yes", "No"])


def test_a_refused_prompt_is_named_and_the_others_are_paid_once(server):
    def refusing(body):
        return failed(400, "maximum context length is 512 tokens") if content(body) == "long" else said("ok")(body)

    server.reply = refusing
    engine = OpenAI("m", server.url, api_key="k")
    engine.generate([ask("first")])
    server.asked.clear()
    with pytest.raises(PromptError) as caught:
        engine.answer(Asks([ask("a"), ask("long"), ask("b")], 1, 0.0, 8))
    assert list(caught.value.reasons) == [1]
    assert "maximum context length" in caught.value.reasons[1]
    assert engine.answer(Asks([ask("a"), ask("b")], 1, 0.0, 8)).generated == [["ok"], ["ok"]]
    assert Counter(content(a) for a in server.asked) == {"a": 1, "b": 1, "long": 1}


def test_samples_that_a_refusal_interrupted_are_not_given_for_later_ones(server):
    numbers = iter(range(1000))

    def refusing(body):
        if content(body).startswith("long"):
            return failed(400, "the prompt is too long")
        return said(*(f"no {next(numbers)}" for _ in range(body.get("n", 1))))(body)

    server.reply = refusing
    rows = {"prompt": ["long", "a", "b"], "response": ["x", "y", "z"]}
    engine = OpenAI("m", server.url, api_key="k", concurrency=1)
    prompts = [ask(p) for p in rows["prompt"][1:]]
    for k in (2, 4):
        Clear(engine=engine, confidence=BSDetector(k=k, beta=1, samples="plain")).score(rows)
    found = cached(engine, None).answer(Asks(prompts, 4, 1.0, 256)).generated
    assert len({text for texts in found for text in texts}) == 8


def test_rows_that_alone_are_left_over_because_they_are_refused_stay_refused(server):
    fine = said("ok", logprobs={"Yes": 0.6, "No": 0.3})
    server.reply = lambda body: failed(400, "too long") if "long" in content(body) else fine(body)
    rows = {"prompt": [*(f"long {i}" for i in range(8)), "a", "b"], "response": ["x"] * 10}
    clear = Clear(engine=OpenAI("m", server.url, api_key="k"))
    first = clear.score(rows)
    again = clear.score(rows)
    assert again["clear_error"] == first["clear_error"]
    assert [bool(error) for error in again["clear_error"]] == [True] * 8 + [False] * 2


@pytest.mark.parametrize("what", ["temperature", "max_tokens"])
def test_settings_that_a_server_refuses_are_no_bad_rows(server, what):
    def strict(body):
        return failed(400, f"{what} is too much") if body[what] > 1 else said("ok")(body)

    server.reply = strict
    engine = OpenAI("m", server.url, api_key="k")
    with pytest.raises(EngineError, match=f"refuses all of 20 requests to m alike.*{what} is too much"):
        engine.generate([ask(str(i)) for i in range(20)], temperature=1.5)
    server.reply = lambda body: failed(400, "no") if content(body) != "Hello" else failed(401, "Incorrect API key")
    with pytest.raises(EngineError, match="Incorrect API key"):
        engine.generate([ask(str(i)) for i in range(20)])


def test_what_a_server_does_not_take_is_left_out_and_remembered(server):
    def strict(body):
        unknown = next((x for x in ("logprobs", "chat_template_kwargs") if x in body), "")
        unknown = unknown or ("n" if body.get("n", 1) > 1 else "")
        if unknown:
            return failed(422, f"Extra inputs are not permitted: {unknown}")
        return failed(400, "no system role") if body["messages"][0]["role"] == "system" else said("Yes")(body)

    server.reply = strict
    engine = OpenAI("m", server.url, api_key="k", concurrency=1)
    prompt = [{"role": "system", "content": "Be brief."}, *ask("Right?")]
    with pytest.warns(UserWarning, match="no log-probabilities"):
        np.testing.assert_allclose(engine.choose([prompt], ["Yes", "No"]), [[1, 0]])
    server.asked.clear()
    assert engine.generate([prompt], n=3, temperature=1.0) == [["Yes"] * 3]
    assert [content(a) for a in server.asked] == ["Be brief.\n\nRight?"] * 3  # none was refused


def test_a_request_that_is_refused_for_every_row_is_an_error_not_bad_rows(server):
    server.reply = lambda body: failed(400, "Unsupported value: temperature")
    rows = {"prompt": [str(i) for i in range(30)], "response": ["x"] * 30}
    with pytest.raises(EngineError, match=r"refuses all of \d+ requests to m alike.*Unsupported value: temperature"):
        Clear(engine=OpenAI("m", server.url, api_key="k")).score(rows)


def test_a_wrong_key_ends_the_batch_and_the_right_one_goes_on(server):
    server.reply = lambda body: failed(401, "Incorrect API key")
    with pytest.raises(EngineError, match="Incorrect API key"):
        OpenAI("m", server.url, api_key="wrong", retries=0).generate([ask(str(i)) for i in range(200)])
    assert len(server.asked) <= 64
    server.reply = said("fine")
    assert OpenAI("m", server.url, api_key="right").generate([ask("a")]) == [["fine"]]
    assert server.asked[-1]["key"] == "Bearer right"


def test_what_was_answered_before_a_failure_is_not_asked_again(server):
    server.reply = lambda body: failed(500, "broken") if content(body) == "7" else said("ok")(body)
    engine = OpenAI("m", server.url, api_key="k", concurrency=1, retries=0)
    prompts = [ask(str(i)) for i in range(10)]
    with pytest.raises(EngineError, match="broken"):
        engine.generate(prompts)
    server.reply = said("ok")
    assert engine.generate([ask("another batch")]) == [["ok"]]  # as when a map begins anew
    assert engine.generate(prompts) == [["ok"]] * 10
    assert Counter(content(a) for a in server.asked) == {
        **{str(i): 1 for i in range(10)}, "7": 2, "another batch": 1
    }  # fmt: skip


def test_a_server_that_is_not_there_or_says_nothing(server, monkeypatch):
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:9/v1 fails for m"):
        OpenAI("m", "http://127.0.0.1:9/v1", api_key="k", retries=0).generate([ask("a")])
    server.reply = lambda body: time.sleep(3) or said("late")(body)
    with pytest.raises(EngineError, match=r"fails for m|deadline of 1 s"):
        OpenAI("m", server.url, api_key="k", deadline=1.0, retries=0).generate([ask("a")])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.reply = said("fine")
    assert OpenAI("m", server.url).generate([ask("a")]) == [["fine"]]  # a server of one's own needs no key
    with pytest.raises(EngineError, match="OPENAI_API_KEY"):
        OpenAI("m").generate([ask("a")])


def test_a_key_is_in_no_state(server, monkeypatch):
    engine = OpenAI("m", server.url, api_key="sk-secret")
    assert b"sk-secret" not in pickle.dumps(engine)
    assert "sk-secret" not in repr(Clear(engine=engine))
    assert Hasher.hash(Clear(engine=engine)) == Hasher.hash(Clear(engine=OpenAI("m", server.url, api_key="other")))
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    pickle.loads(pickle.dumps(engine)).generate([ask("a")])
    assert server.asked[-1]["key"] == "Bearer from the environment"
    server.reply = lambda body: failed(401, f"Key expected. Received={engine.api_key}")
    with pytest.raises(EngineError, match=r"Received=\*\*\*") as caught:
        engine.generate([ask("b")])
    assert "sk-secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "address, shown",
    [
        ("http://user:sk-secret@host/v1", "http://***@host/v1"),
        ("https://sk-secret@host/v1", "https://***@host/v1"),
        ("https://user:sk-sec/ret@host/v1", "https://***@host/v1"),
        ("https://sk-sec?ret:x@host/v1", "https://***@host/v1"),
        ("user:sk-secret@host/v1", "***@host/v1"),
        ("https://host/v1?key=sk-secret", "https://host/v1?***"),
        ("https://host/v1#sk-secret", "https://host/v1#***"),
        ("host:8000/v1", "host:8000/v1"),
        ("http://host/v1 ", "http://host/v1 "),
        ("", ""),
    ],
)
def test_an_address_with_a_secret_is_refused_without_saying_it(address, shown, monkeypatch):
    def refused() -> ValueError:
        with pytest.raises(ValueError, match=r"expected http:// or https://.*api_key= or OPENAI_API_KEY") as caught:
            OpenAI("m", address)
        return caught.value

    for piece in ("sk-sec", "ret@", "user"):
        assert piece not in str(refused()).partition(";")[0]
    assert f"base_url is {shown!r};" in str(refused())
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    if address:  # an empty variable is none
        for call in (lambda: OpenAI("m").identity, lambda: OpenAI("m", api_key="k").generate([ask("a")])):
            with pytest.raises(ValueError, match="OPENAI_BASE_URL is") as caught:
                call()
            assert f"OPENAI_BASE_URL is {shown!r};" in str(caught.value)


@pytest.mark.parametrize("address", ["http://[::1]:8000/v1", "HTTPS://host", "https://host/a@b/v1/", "http://1.2.3.4/"])
def test_an_address_without_a_secret_is_taken(address, monkeypatch):
    assert OpenAI("m", address).base_url == address
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    assert address in OpenAI("m").identity


def test_inside_a_running_event_loop(server):
    async def cell():
        return OpenAI("m", server.url, api_key="k").generate([ask("a")])

    assert asyncio.run(cell()) == [["fine"]]


def test_rows_are_scored_without_log_probabilities_of_their_targets(server):
    def reply(body):
        right = "4" if "2 + 2" in str(body["messages"]) else "Rome"
        likely = {"Yes": 0.9, "No": 0.1} if f"answer: {right}" in str(body["messages"]) else {"Yes": 0.2, "No": 0.8}
        return said(right, logprobs=likely)(body)

    server.reply = reply
    rows = {"prompt": ["2 + 2?", "2 + 2?", "Capital?"], "response": ["4", "5", "Rome"]}
    scored = Clear(engine=OpenAI("m", server.url, api_key="k"), confidence=BSDetector(k=2)).score(rows)
    np.testing.assert_allclose(scored["clear_consistency"], [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(scored["clear_confidence"], [0.97, 0.06, 0.97], atol=1e-5)
