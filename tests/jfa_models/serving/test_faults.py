"""What a server does when something goes wrong: clients that leave or do not read, steps that fail, full queues."""

import json
import signal
import socket
import threading
import time

import httpx2 as httpx
import openai
import pytest
from engines import assert_clean
from servers import new_engine, serving

from jfa_models.decoding.params import SamplingParams

LONG = {"prompt": "hi", "max_tokens": 900, "temperature": 0, "stream": True}
SHORT = {"prompt": "hi", "max_tokens": 5, "temperature": 0}
PATIENCE = 60  # seconds that a test waits for what must come


@pytest.fixture
def served(model):
    with serving(new_engine(model), max_waiting=2) as served:
        yield served
        wait_for(lambda: not served.engine.has_unfinished)
    assert_clean(served.engine)


def wait_for(holds):
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def held(served):
    """Stops the engine's steps while the body of a `with` statement runs."""
    return served.engine._step_lock


class Raw:
    """A connection that sends bytes as they are."""

    def __init__(self, served, body, *, length=None):
        self.socket = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        self.socket.sendall(head.encode() + f"{length or len(data)}\r\n\r\n".encode() + data)

    def read(self, size=65536):
        return self.socket.recv(size)

    def close(self):
        self.socket.close()


def test_a_client_that_leaves_frees_its_place(served):
    leaving = [Raw(served, LONG) for _ in range(3)]
    for one in leaving:
        assert b"200 OK" in one.read(200)
        one.close()
    waiting = Raw(served, LONG | {"stream": False})  # one that has no answer yet
    wait_for(lambda: served.runner.num_sequences)
    waiting.close()
    wait_for(lambda: not served.runner.num_sequences and not served.engine.has_unfinished)
    assert served.engine.metrics().generated_tokens < 4 * 900


def test_half_a_body_harms_nobody(model):
    with serving(new_engine(model), body_timeout=0.2) as served:
        half = Raw(served, SHORT, length=1000)
        assert httpx.post(f"{served.url}/v1/completions", json=SHORT).status_code == 200
        assert b"408" in half.read()
        half.close()
        gone = Raw(served, SHORT, length=1000)
        gone.close()
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_full_queue_says_when_to_come_back(served):
    with held(served):
        streams = [Raw(served, LONG) for _ in range(6)]  # 4 run and 2 wait
        wait_for(lambda: served.runner.num_sequences == 6)
        answer = httpx.post(f"{served.url}/v1/completions", json=SHORT)
        assert answer.status_code == 429 and "is the limit" in answer.json()["error"]["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    for one in streams:
        one.close()
    wait_for(lambda: not served.runner.num_sequences)
    assert httpx.post(f"{served.url}/v1/completions", json=SHORT).status_code == 200


def test_a_step_that_fails_ends_its_requests_and_no_others(served, monkeypatch, model):
    want = model.generate("hi", SamplingParams(temperature=0, max_tokens=5))[0].outputs[0].text
    advance = model.steps.advance
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    for number in range(20):
        fails_at = [number % 5]

        def failing(*arguments, fails_at=fails_at, **options):
            fails_at[0] -= 1
            if fails_at[0] < 0:
                raise RuntimeError("RESOURCE_EXHAUSTED: planted")
            return advance(*arguments, **options)

        monkeypatch.setattr(model.steps, "advance", failing)
        if number % 2:
            with pytest.raises(openai.APIError, match="planted"):
                list(client.completions.create(model="tiny", **LONG))
        else:
            answer = httpx.post(f"{served.url}/v1/completions", json=SHORT | {"max_tokens": 50})
            assert answer.status_code == 500 and "RESOURCE_EXHAUSTED: planted" in answer.text
        monkeypatch.setattr(model.steps, "advance", advance)
        wait_for(lambda number=number: served.runner.num_resets == number + 1)
        assert client.completions.create(model="tiny", **SHORT).choices[0].text == want
    health = httpx.get(f"{served.url}/health").json()
    assert health == {"status": "ok", "resets": 20, "last_failure": "RuntimeError: RESOURCE_EXHAUSTED: planted"}
    client.close()


def test_an_engine_that_cannot_be_reset_is_not_healthy(served, monkeypatch, model):
    reset, advance, can_reset = served.engine.reset, model.steps.advance, threading.Event()

    def broken(*arguments, **options):
        raise RuntimeError("planted")

    def failing_reset():
        if not can_reset.is_set():
            raise RuntimeError("no device")
        reset()

    monkeypatch.setattr(served.engine, "reset", failing_reset)
    monkeypatch.setattr(model.steps, "advance", broken)
    assert httpx.post(f"{served.url}/v1/completions", json=SHORT).status_code == 500
    wait_for(lambda: served.runner.problem)
    assert httpx.get(f"{served.url}/health").status_code == httpx.get(f"{served.url}/ready").status_code == 503
    assert httpx.post(f"{served.url}/v1/completions", json=SHORT).status_code == 503
    monkeypatch.setattr(model.steps, "advance", advance)
    can_reset.set()
    wait_for(lambda: not served.runner.problem)
    assert httpx.post(f"{served.url}/v1/completions", json=SHORT).status_code == 200


def test_a_deadline_ends_a_request(served):
    with held(served):
        answer = httpx.post(f"{served.url}/v1/completions", json=SHORT | {"timeout": 0.05})
    assert answer.status_code == 504 and "took more than 0.05 s" in answer.json()["error"]["message"]


def test_a_slow_reader_stops_nobody_and_is_cut_off(model):
    engine = new_engine(model)
    with serving(engine, stall_timeout=0.3) as served:
        # 32 choices with log-probabilities: more than all buffers on the way hold
        slow = Raw(served, LONG | {"n": 32, "temperature": 1, "seed": 1, "logprobs": 20, "max_tokens": 400})
        wait_for(lambda: served.runner.num_sequences)
        assert httpx.post(f"{served.url}/v1/completions", json=SHORT | {"priority": -1}, timeout=60).status_code == 200
        wait_for(lambda: not served.runner.num_sequences)
        wait_for(lambda: not served.process.server_state.connections)
        slow.close()
    assert_clean(engine)


def test_shutting_down_finishes_what_runs_and_refuses_the_rest(model):
    with serving(new_engine(model), max_waiting=8) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            streams = [client.completions.create(model="tiny", **LONG | {"max_tokens": 300}) for _ in range(4)]
            texts = [next(stream).choices[0].text for stream in streams]
            with held(served):
                waiting = Raw(served, SHORT)
                wait_for(lambda: served.runner.num_sequences == 5)
                served.process.handle_exit(signal.SIGTERM, None)
                assert b"503" in waiting.read(100)
                waiting.close()
                late = httpx.post(f"{served.url}/v1/completions", json=SHORT)
                assert late.status_code == 503 and "shutting down" in late.text
                assert httpx.get(f"{served.url}/ready").status_code == 503
            reasons = [[chunk.choices[0].finish_reason for chunk in stream][-1] for stream in streams]
            assert reasons == ["length"] * 4 and all(texts)
            wait_for(lambda: served.process.should_exit)


def test_after_the_grace_streams_say_that_they_were_cut(model):
    with serving(new_engine(model), grace=0.05) as served:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="tiny", **LONG)
            next(stream)
            served.process.handle_exit(signal.SIGTERM, None)
            with pytest.raises(openai.APIError, match="shut down before the answer was complete"):
                list(stream)
