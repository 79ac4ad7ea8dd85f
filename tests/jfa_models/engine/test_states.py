"""The engine with models whose layers have states: in slots beside the pages, through preemption, samples and beams.

Prefixes are reused from snapshots of states; test_scheduler.py checks which ones there are.
"""

import dataclasses
import functools
import random

import numpy as np
import pytest
from engines import assert_clean
from golden import GOLDEN
from random_adapters import random_adapter
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
    """Random prompts, which often share a prefix or are equal, and greedy params with a random max_tokens for each."""
    stems = [[rng.randrange(3, VOCAB) for _ in range(18)] for _ in range(3)]
    prompts = [
        [*rng.choice([*stems, []])[: rng.choice([5, 9, 16, 18])], *(rng.randrange(3, VOCAB) for _ in range(length))]
        for length in (rng.choice([1, 2, rng.randint(1, 14)]) for _ in range(count))
    ]
    prompts = [rng.choice(prompts) if rng.random() < 0.1 else prompt for prompt in prompts]
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


@pytest.mark.parametrize("name", [run(name, quick=name != "granitemoehybrid_moe", soak=True) for name in NAMES])
def test_greedy_tokens_are_those_of_generate(name):
    model = loaded(name)
    prompts, params = drawn(random.Random(0), 20)
    prompts[3] = prompts[3][:1]  # one token: its first step is one of decoding
    engine = Engine(model, **SMALL)
    assert_same(results(engine, prompts, params), alone(model, prompts, params))
    metrics = engine.metrics()
    assert metrics.prefix_hits > 0
    assert (metrics.preemptions > 0) == (name != "mamba2")  # it has no pages to run out of
    assert_clean(engine)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(run(name, 40, quick=name == "mamba2", soak=True) for name in NAMES),
        *(run(name, 200, quick=False, soak=True) for name in ("granitemoehybrid", "qwen3_next")),
    ],
)
def test_random_arrivals_samples_beams_and_aborts(name, count):
    rng = random.Random(f"{name} {count}")
    model = loaded(name)
    prompts, params = drawn(rng, count)
    want = alone(model, prompts, params)
    engine = Engine(model, **SMALL, num_state_snapshots=rng.choice([1, 3, 16]))
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
        engine._scheduler.pools.snapshots.check()
    ended = [i for i in range(count) if got[str(i)].outputs[0].finish_reason != "abort"]
    assert len(ended) >= 0.8 * count
    assert_same([got[str(i)] for i in ended], [want[i] for i in ended])
    assert engine.metrics().prefix_hits > 0
    assert_clean(engine)


ROOMY = dict(max_num_seqs=4, page_size=4, num_pages=65, max_num_batched_tokens=32, max_model_len=64)


def computed_for(engine, prompt, max_tokens=6, **options):
    """A prompt's greedy tokens, and how many of its tokens had to be computed."""
    before = engine._scheduler.pools.hit_tokens
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(prompt, params, **options)
    [found] = engine.run()
    return found, len(prompt) - (engine._scheduler.pools.hit_tokens - before)


@pytest.mark.parametrize("name", [run(name, quick=name in ("mamba2", "qwen3_next"), soak=True) for name in NAMES])
def test_a_system_prompt_is_computed_twice_and_a_chat_once(name):
    model, rng = loaded(name), random.Random(6)
    engine = Engine(model, **ROOMY)
    system = [rng.randrange(3, VOCAB) for _ in range(18)]
    prompts = [[*system, *(rng.randrange(3, VOCAB) for _ in range(7))] for _ in range(4)]
    asked = [computed_for(engine, prompt) for prompt in prompts]
    assert [computed for _, computed in asked] == [25, 25, 9, 9]
    for i in range(3):
        prompts.append([*prompts[-1], *asked[-1][0].outputs[0].token_ids, 5 + i, 6 + i])
        asked.append(computed_for(engine, prompts[-1]))
    assert [computed for _, computed in asked[4:]] == [9, 9, 9]  # the answer, and what follows it
    params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)] * len(prompts)
    assert_same([found for found, _ in asked], alone(model, prompts, params))
    assert engine.metrics().prefix_hits * engine.metrics().prefix_tokens == pytest.approx(16 * 2 + 24 + 32 + 40)
    assert_clean(engine)


@pytest.mark.parametrize(
    ("name", "page_size", "num_state_snapshots"),
    [
        *(run(*given, quick=True) for given in (("mamba2", 4, 0), ("mamba2", 1, 1), ("mamba2", 4, 2))),
        run("qwen3_next", 4, 1, quick=False, soak=True),
    ],
)
def test_few_snapshots_give_fewer_hits_and_the_same_tokens(name, page_size, num_state_snapshots):
    model, rng = loaded(name), random.Random(7)
    engine = Engine(model, **ROOMY | dict(page_size=page_size), num_state_snapshots=num_state_snapshots)
    assert engine._launcher.cache.states.num_rows == ROOMY["max_num_seqs"] + num_state_snapshots
    first, second = ([rng.randrange(3, VOCAB) for _ in range(8)] for _ in range(2))
    prompts = [first, first, second, first, first[:4], first[:5]]
    asked = [computed_for(engine, prompt) for prompt in prompts]
    again = 1 if page_size == 1 else 4  # a prompt of two pages: the last token is always computed
    if num_state_snapshots == 0:
        assert [computed for _, computed in asked] == [len(prompt) for prompt in prompts]
    else:
        assert [computed for _, computed in asked[:4]] == [8, again, 8, 8 if num_state_snapshots == 1 else again]
    params = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)] * len(prompts)
    assert_same([found for found, _ in asked], alone(model, prompts, params))
    assert_clean(engine)


def test_states_of_one_adapter_serve_no_other():
    model = from_pretrained(GOLDEN / "granitemoehybrid", dtype="float32", max_adapters=2, max_rank=4)
    for name, seed in (("a", 1), ("b", 2)):
        model.load_adapter(name, random_adapter(model, seed, rank=4))
    engine = Engine(model, **ROOMY)
    prompt, texts = list(range(10, 30)), set()
    for adapter in (None, "a", "b"):
        first, computed = computed_for(engine, prompt, adapter=adapter)
        again, computed_again = computed_for(engine, prompt, adapter=adapter)
        assert (computed, computed_again) == (20, 4)
        assert first.outputs[0].token_ids == again.outputs[0].token_ids
        texts.add(tuple(first.outputs[0].token_ids))
    assert len(texts) == 3
    assert_clean(engine)


@pytest.mark.parametrize("value", [-1, 1.5, True, "8"])
def test_refuses_a_number_of_snapshots(value):
    with pytest.raises(ValueError, match=f"num_state_snapshots must be an integer >= 0, got {value!r}; it is"):
        Engine(loaded("mamba2"), num_state_snapshots=value)


def test_refuses_pages_of_no_tokens_without_attention_too():
    with pytest.raises(ValueError, match="page_size is the number of tokens per page and must be >= 1, got 0"):
        Engine(loaded("mamba2"), **SMALL | dict(page_size=0))


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
        results(engine, prompts, params)  # from snapshots
    assert not compiled
    assert engine.metrics().prefix_hits > 0


def test_a_batch_of_many_prompts_through_llm():
    llm = LLM(GOLDEN / "mamba2", dtype="float32", max_num_seqs=4)
    prompts, params = drawn(random.Random(5), 9)
    found = llm.generate(prompts, params)
    assert_same(found, alone(loaded("mamba2"), prompts, params))


def test_the_states_count_in_the_memory_of_the_cache():
    engine = Engine(loaded("qwen3_next"), **SMALL)
    cache = engine._launcher.cache
    assert cache.states.num_rows == SMALL["max_num_seqs"] + 16
    assert cache.num_bytes > cache.states.num_bytes > 0


@pytest.mark.parametrize("name", ["mamba2", "qwen3_next"])
def test_states_take_no_room_from_the_pages_of_a_host(name, monkeypatch):
    monkeypatch.setattr("jfa_models.engine.engine.HOST_CACHE_BYTES", 100_000)
    engine = Engine(loaded(name), max_num_seqs=64, num_state_snapshots=64, max_model_len=64)
    cache = engine._launcher.cache
    assert cache.states.num_bytes > 100_000 >= cache.num_bytes - cache.states.num_bytes
    assert engine.max_model_len == 64 and engine._scheduler.pools.num_pages >= 4
