"""An engine that follows that of another process: the same requests in the same steps. Here both are in one process."""

import json
import queue
import socket
import threading

import pytest
from engines import assert_clean

from jfa_models import BeamSearchParams, Engine, LanguageModel, SamplingParams, StructuredOutputsParams, processes
from jfa_models.engine import relay
from jfa_models.model.config import DecoderConfig
from jfa_models.model.rope import RopeConfig

CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=8,
    context_length=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
)
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=5, stop_token_ids=[9], logit_bias={3: -100.0, 7: 1.5}),
    SamplingParams(temperature=0.7, top_p=0.9, n=2, seed=4, max_tokens=6, logprobs=2, prompt_logprobs=1),
    BeamSearchParams(beam_width=2, max_tokens=4),
]


@pytest.fixture
def two(monkeypatch):
    """Two engines, of which the second follows the first on a thread; and what ended the thread."""
    model, told, ended = LanguageModel.random(CONFIG, dtype="float32"), queue.Queue(), queue.Queue()
    monkeypatch.setattr(processes, "count", lambda: 2)
    follower_thread = threading.local()

    def of_first(value):
        if getattr(follower_thread, "is_follower", False):
            return told.get(timeout=60)
        told.put(found := value())
        return found

    monkeypatch.setattr(processes, "of_first", of_first)
    monkeypatch.setattr(processes, "smallest", lambda value: value)
    first, second = (Engine(model, num_pages=20, page_size=4, max_num_seqs=3) for _ in range(2))

    def run():
        follower_thread.is_follower = True
        try:
            ended.put(relay.follow(second, "127.0.0.1"))
        except BaseException as error:
            ended.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    leader = relay.Leader(first, "127.0.0.1")
    yield first, second, leader, ended
    for other in leader._others:
        other.close()
    thread.join(60)
    assert not thread.is_alive()


def test_both_engines_take_the_same_steps(two):
    first, second, leader, ended = two
    leader.warm_up([PARAMS[0]])
    for i, params in enumerate(PARAMS * 2):
        first.add_request([5, 6, 7 + i], params, request_id=f"r{i}", priority=i % 2)
    first.step()
    first.abort("r3")
    tokens = leader.num_bytes
    results = {result.request_id: result for result in first.run()}
    assert tokens < leader.num_bytes < 10_000
    leader.stop()
    assert ended.get(timeout=60) is None
    assert results["r3"].outputs[0].finish_reason == "abort" and len(results) == 6
    one, other = first.metrics(), second.metrics()
    assert (one.steps, one.generated_tokens, one.prompt_tokens) == (
        other.steps,
        other.generated_tokens,
        other.prompt_tokens,
    )
    for engine in (first, second):
        engine.on_received = None
        assert_clean(engine)


def test_a_follower_ends_with_the_first_process(two):
    _, _, leader, ended = two
    for other in leader._others:
        other.close()
    with pytest.raises(RuntimeError, match="the first process has ended: start all again"):
        raise ended.get(timeout=60)


def test_the_first_process_ends_with_a_follower(two):
    _, _, leader, ended = two
    leader.stop()
    assert ended.get(timeout=60) is None
    with pytest.raises(RuntimeError, match=r"another process has ended .*: start all again"):
        leader._tell("step", [])


def test_only_own_processes_are_let_in(monkeypatch):
    monkeypatch.setattr(relay, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        with socket.create_connection(listening.getsockname()) as stranger:
            stranger.sendall(b"not the token at all")
            with pytest.raises(RuntimeError, match=r"another process has not connected within 0.5 s"):
                relay._accepted(listening, "x" * 20)


@pytest.mark.parametrize("params", [*PARAMS, SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]))])
def test_params_arrive_as_they_were(params):
    assert relay._params(json.loads(json.dumps(relay._fields(params)))) == params
