"""The engine with models whose layers have states: in slots beside the pages, through preemption, samples and beams."""

import dataclasses
import functools
import random

import numpy as np
import pytest
from engines import assert_clean
from golden import GOLDEN
from runs import run
from tiny_model import counted_compilations

from jfa_models import LLM, BeamSearchParams, Engine, SamplingParams, from_pretrained

NAMES = ("mamba2", "granitemoehybrid", "granitemoehybrid_moe", "qwen3_next")
VOCAB = 96
TIE = 1e-3
SMALL = dict(max_num_seqs=4, page_size=4, num_pages=17, max_num_batched_tokens=16, max_model_len=48)


@functools.cache
def loaded(name):
    return from_pretrained(GOLDEN / name, dtype="float32")


def drawn(rng, count):
    """Random prompts, which often share a prefix, and greedy params with a random max_tokens for each."""
    stems = [[rng.randrange(3, VOCAB) for _ in range(9)] for _ in range(3)]
    prompts = [
        [*rng.choice([*stems, []])[: rng.randint(1, 9)], *(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 14)))]
        for _ in range(count)
    ]
    return prompts, [SamplingParams(temperature=0, max_tokens=rng.randint(1, 12), ignore_eos=True) for _ in prompts]


def results(engine, prompts, params):
    ids = [engine.add_request(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    found = {result.request_id: result for result in engine.run()}
    return [found[i] for i in ids]


def assert_same(got, want):
    """The same tokens, up to a tie that rounding may decide; want has log-probabilities."""
    for one, other in zip(got, want, strict=True):
        ours, theirs = one.outputs[0].token_ids, other.outputs[0].token_ids
        if ours != theirs:
            same = next(i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y)
            likely = other.outputs[0].logprobs[same]
            assert ours[same] in likely and likely[theirs[same]].logprob - likely[ours[same]].logprob < TIE


def alone(model, prompts, params):
    return model.generate(prompts, [dataclasses.replace(one, logprobs=20) for one in params], max_batch=32)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_generate(name):
    model = loaded(name)
    prompts, params = drawn(random.Random(0), 20)
    prompts[3] = prompts[3][:1]  # one token: its first step is one of decoding
    engine = Engine(model, **SMALL)
    assert_same(results(engine, prompts, params), alone(model, prompts, params))
    metrics = engine.metrics()
    assert metrics.prefix_hits == 0
    assert (metrics.preemptions > 0) == (name != "mamba2")  # it has no pages to run out of
    assert_clean(engine)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(run(name, 40, quick=name in ("mamba2", "qwen3_next"), soak=True) for name in NAMES),
        *(run(name, 200, quick=False, soak=True) for name in ("granitemoehybrid", "qwen3_next")),
    ],
)
def test_random_arrivals_samples_beams_and_aborts(name, count):
    rng = random.Random(1)
    model = loaded(name)
    prompts, params = drawn(rng, count)
    want = alone(model, prompts, params)
    engine = Engine(model, **SMALL)
    left, got, aborted = list(range(count)), {}, set()
    while left or engine.has_unfinished:
        for _ in range(min(len(left), rng.choice([0, 0, 1, 3]))):
            i = left.pop()
            engine.add_request(prompts[i], params[i], request_id=str(i), priority=rng.choice([0, 0, 0, 1]))
            if rng.random() < 0.05:
                aborted.add(str(i))
        if rng.random() < 0.05:
            beams = BeamSearchParams(beam_width=3, max_tokens=6)
            engine.add_request(prompts[0], rng.choice([SamplingParams(n=3, max_tokens=9, seed=1), beams]))
        if aborted and rng.random() < 0.2:
            engine.abort(rng.choice(sorted(aborted)))
        for result in engine.step():
            got[result.request_id] = result
        engine._scheduler.pools.pools[0].allocator.check()
    ended = [i for i in range(count) if got[str(i)].outputs[0].finish_reason != "abort"]
    assert len(ended) >= 0.8 * count
    assert_same([got[str(i)] for i in ended], [want[i] for i in ended])
    assert_clean(engine)


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
@pytest.mark.parametrize("company", [0, 6])
def test_samples_of_a_prompt_have_the_probabilities_of_a_full_forward_pass(name, company):
    model = loaded(name)
    prompts, params = drawn(random.Random(2), 1 + company)
    params[0] = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=10, ignore_eos=True, logprobs=0)
    found = results(Engine(model, **SMALL), prompts, params)[0]
    for output in found.outputs:
        logits = np.asarray(model.logits(np.array([[*prompts[0], *output.token_ids]]))[0], np.float64)
        logprobs = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[len(prompts[0]) - 1 : -1]
        drawn_ones = logprobs[np.arange(10), list(output.token_ids)]
        assert output.cumulative_logprob == pytest.approx(drawn_ones.sum(), abs=1e-3)
    assert len({tuple(one.token_ids) for one in found.outputs}) == 3


@pytest.mark.parametrize("name", ["mamba2", "granitemoehybrid"])
@pytest.mark.parametrize("company", [0, 6])
def test_beams_are_those_of_a_search_without_a_cache(name, company):
    model = loaded(name)
    prompts, params = drawn(random.Random(3), 1 + company)
    params[0] = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    found = results(Engine(model, **SMALL), prompts, params)[0]
    live = [((), 0.0)]
    for _ in range(5):
        rows = np.array([[*prompts[0], *tokens] for tokens, _ in live])
        logits = np.asarray(model.logits(rows)[:, -1], np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        candidates = [
            (total + logprobs[row, token], (*tokens, token))
            for row, (tokens, total) in enumerate(live)
            for token in range(VOCAB)
        ]
        live = [(tokens, total) for total, tokens in sorted(candidates, reverse=True)[:3]]
    assert [tuple(one.token_ids) for one in found.outputs] == [tokens for tokens, _ in live]
    for output, (_, total) in zip(found.outputs, live, strict=True):
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_nothing_compiles_after_warm_up():
    engine = Engine(loaded("granitemoehybrid"), **SMALL)
    prompts, params = drawn(random.Random(4), 12)
    params[0] = SamplingParams(n=3, max_tokens=6, seed=0)
    params[1] = BeamSearchParams(beam_width=3, max_tokens=4)
    engine.warm_up(params)
    with counted_compilations() as compiled:
        results(engine, prompts, params)
    assert not compiled


def test_a_batch_of_many_prompts_through_llm():
    llm = LLM(GOLDEN / "mamba2", dtype="float32", max_num_seqs=4)
    prompts, params = drawn(random.Random(5), 9)
    found = llm.generate(prompts, params)
    assert_same(found, alone(loaded("mamba2"), prompts, params))


def test_the_states_count_in_the_memory_of_the_cache():
    engine = Engine(loaded("qwen3_next"), **SMALL)
    cache = engine._launcher.cache
    assert cache.states.num_rows == SMALL["max_num_seqs"]
    assert cache.num_bytes > cache.states.num_bytes > 0
