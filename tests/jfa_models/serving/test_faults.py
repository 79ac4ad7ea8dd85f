"""What a server does when something goes wrong: clients that leave or do not read, steps that fail, full queues."""

import contextlib
import functools
import json
import signal
import socket
import threading

import httpx2
import openai
import pytest
from engines import assert_clean
from running import PATIENCE
from servers import new_engine, serving

from jfa_models.decoding.params import SamplingParams

LONG = {"prompt": "hi", "max_tokens": 900, "temperature": 0, "stream": True}
SHORT = {"prompt": "hi", "max_tokens": 5, "temperature": 0}

get = functools.partial(httpx2.get, timeout=PATIENCE)
post = functools.partial(httpx2.post, timeout=PATIENCE)


@pytest.fixture
def served(model):
    with serving(new_engine(model), max_waiting=2) as served:
        yield served
        served.wait(lambda: not served.engine.has_unfinished)
    assert_clean(served.engine)


@contextlib.contextmanager
def few_steps(served, monkeypatch, requests, *, count=8):
    """Sends requests that start together; the engine runs some steps, and no more until go_on() or the block's end.

    Yields the connections, and go_on.
    """
    advance, permits = served.engine.model.steps.advance, threading.Semaphore(0)

    def gated(*arguments, **options):
        permits.acquire()
        return advance(*arguments, **options)

    monkeypatch.setattr(served.engine.model.steps, "advance", gated)
    with served.engine._step_lock:
        clients = [Raw(served, request) for request in requests]
        served.wait(lambda: served.runner.num_sequences == len(requests))
    permits.release(count)

    def go_on():
        permits.release(1_000_000)

    try:
        yield clients, go_on
    finally:
        go_on()
        for client in clients:
            client.close()


class Raw:
    """A connection that sends bytes as they are, and closes at the end of a `with` statement."""

    def __init__(self, served, body, *, length=None):
        self.socket = socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])))
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\nContent-Length: "
        self.socket.sendall(head.encode() + f"{length or len(data)}\r\n\r\n".encode() + data)

    def read(self, size=65536):
        return self.socket.recv(size)

    def rest(self):
        """What is sent until the server closes the connection."""
        return b"".join(iter(self.read, b""))

    def close(self):
        self.socket.close()


def test_a_client_that_leaves_frees_its_place(served, monkeypatch):
    with few_steps(served, monkeypatch, [LONG, LONG, LONG, LONG | {"stream": False}]) as (clients, _):
        for one in clients[:3]:
            assert b"200 OK" in one.read(200)
        for one in clients:
            one.close()
        served.wait(lambda: not served.runner.num_sequences)
    served.wait(lambda: not served.engine.has_unfinished)
    assert served.engine.metrics().generated_tokens < 4 * 20


def test_half_a_body_harms_nobody(model):
    with serving(new_engine(model), body_timeout=1.0) as served:
        half = Raw(served, SHORT, length=1000)
        assert post(f"{served.url}/v1/completions", json=SHORT).status_code == 200
        assert b"408" in half.read()
        half.close()
        gone = Raw(served, SHORT, length=1000)
        gone.close()
        assert get(f"{served.url}/health").status_code == 200


def test_a_full_queue_says_when_to_come_back(served, monkeypatch):
    with few_steps(served, monkeypatch, [LONG] * 6):  # 4 run and 2 wait
        answer = post(f"{served.url}/v1/completions", json=SHORT)
        assert answer.status_code == 429 and "is the limit" in answer.json()["error"]["message"]
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    served.wait(lambda: not served.runner.num_sequences)
    assert post(f"{served.url}/v1/completions", json=SHORT).status_code == 200


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
            answer = post(f"{served.url}/v1/completions", json=SHORT | {"max_tokens": 50})
            assert answer.status_code == 500 and "RESOURCE_EXHAUSTED: planted" in answer.text
        monkeypatch.setattr(model.steps, "advance", advance)
        served.wait(lambda number=number: served.runner.num_resets == number + 1)
        assert client.completions.create(model="tiny", **SHORT).choices[0].text == want
    health = get(f"{served.url}/health").json()
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
    assert post(f"{served.url}/v1/completions", json=SHORT).status_code == 500
    served.wait(lambda: served.runner.problem)
    assert get(f"{served.url}/health").status_code == get(f"{served.url}/ready").status_code == 503
    assert post(f"{served.url}/v1/completions", json=SHORT).status_code == 503
    monkeypatch.setattr(model.steps, "advance", advance)
    can_reset.set()
    served.wait(lambda: not served.runner.problem)
    assert post(f"{served.url}/v1/completions", json=SHORT).status_code == 200


def test_a_server_that_compiles_says_so(model, monkeypatch):
    compiled = threading.Event()
    engine = new_engine(model)
    monkeypatch.setattr(engine, "warm_up", lambda params: compiled.wait(PATIENCE))
    with serving(engine, warm_up=[SamplingParams()], waits=False) as served:
        assert get(f"{served.url}/ready").json() == {"status": "compiling"}
        answer = post(f"{served.url}/v1/completions", json=SHORT)
        assert answer.status_code == 503 and "compiles" in answer.text and answer.headers["retry-after"]
        compiled.set()
        served.wait(lambda: served.runner.is_ready)
        assert post(f"{served.url}/v1/completions", json=SHORT).status_code == 200


def test_a_deadline_ends_a_request(served):
    with served.engine._step_lock:  # no step runs
        answer = post(f"{served.url}/v1/completions", json=SHORT | {"timeout": 0.05})
    assert answer.status_code == 504 and "took more than 0.05 s" in answer.json()["error"]["message"]


def test_a_slow_reader_stops_nobody_and_is_cut_off(model):
    engine = new_engine(model)
    with serving(engine, stall_timeout=0.3) as served:
        # 32 choices with log-probabilities: more than all buffers on the way hold
        slow = Raw(served, LONG | {"n": 32, "temperature": 1, "seed": 1, "logprobs": 20, "max_tokens": 400})
        served.wait(lambda: served.runner.num_sequences)
        assert post(f"{served.url}/v1/completions", json=SHORT | {"priority": -1}).status_code == 200
        served.wait(lambda: not served.runner.num_sequences)
        served.wait(lambda: not served.process.server_state.connections)
        slow.close()
    assert_clean(engine)


def test_shutting_down_finishes_what_runs_and_refuses_the_rest(model, monkeypatch):
    with serving(new_engine(model), max_waiting=8) as served:
        with few_steps(served, monkeypatch, [LONG] * 4) as (clients, go_on):
            served.wait(lambda: all(ticket.has_begun for ticket in served.runner._tickets.values()))
            waiting = Raw(served, SHORT)
            served.wait(lambda: served.runner.num_sequences == 5)
            served.process.handle_exit(signal.SIGTERM, None)
            assert b"503" in waiting.rest()
            waiting.close()
            late = post(f"{served.url}/v1/completions", json=SHORT)
            assert late.status_code == 503 and "shutting down" in late.text
            assert get(f"{served.url}/ready").status_code == 503
            go_on()
            answers = [one.rest() for one in clients]
        assert all(b'"finish_reason":"length"' in one and b"[DONE]" in one for one in answers)
        served.thread.join(PATIENCE)
        assert not served.thread.is_alive()


def test_after_the_grace_streams_say_that_they_were_cut(model, monkeypatch):
    with serving(new_engine(model), grace=0.01) as served:
        with few_steps(served, monkeypatch, [LONG]) as ([client], _):
            assert b"200 OK" in client.read(200)
            served.process.handle_exit(signal.SIGTERM, None)
            answer = client.rest()
    assert b"shut down before the answer was complete" in answer and b"[DONE]" not in answer
