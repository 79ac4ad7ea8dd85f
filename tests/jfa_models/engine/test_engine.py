"""The engine on a tiny model: the output of a request does not depend on other requests or preemption."""

import dataclasses
import functools
import itertools
import queue
import random
import threading

import jax
import numpy as np
import pytest
from engines import assert_clean
from flax import nnx
from runs import run as run_of
from tiny_model import PRINTABLE, byte_tokenizer, counted_compilations, sharp_decoder, tiny_config

from jfa_models import BeamSearchParams, Engine, LanguageModel, SamplingParams
from jfa_models.checkpoints.load import quantized
from jfa_models.decoding.language_model import named_leaves
from jfa_models.decoding.options import CacheOptions

CONFIG = tiny_config(num_layers=2, context_length=128)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
TIE = 1e-3
SMALL = dict(max_num_seqs=4, page_size=4, num_pages=33, max_num_batched_tokens=32)


@functools.cache
def language_model(kv_dtype=None, quantization=None):
    """The model; its `generate` uses pages of this dtype."""
    decoder = sharp_decoder(CONFIG)
    params = dict(zip(named_leaves(decoder), jax.tree.leaves(nnx.split(decoder)[1]), strict=True))
    if quantization is not None:
        for name, x in params.items():
            if x.ndim == 2:
                params[name] = quantized(name, x.shape, [(slice(None), np.asarray(x))], quantization)
    return LanguageModel(
        decoder=decoder,
        params=tuple(params.values()),
        tokenizer=byte_tokenizer(),
        cache_options=CacheOptions(kind="paged" if kv_dtype else "contiguous", kv_dtype=kv_dtype),
    )


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def shared(model):
    """An engine for tests that leave it empty."""
    return Engine(model, **SMALL)


@pytest.fixture
def engine(shared):
    yield shared
    assert_clean(shared)


def run(engine, *requests, **options):
    """The results of (prompt, params), in their order."""
    ids = [engine.add_request(prompt, params, **options) for prompt, params in requests]
    results = {result.request_id: result for result in engine.run()}
    return [results[i] for i in ids]


def assert_same(got, want, tie=TIE):
    """The same tokens and texts, up to a tie that rounding may decide; want has the log-probabilities."""
    for one, other in zip(got, want, strict=True):
        ours, theirs = one.outputs[0].token_ids, other.outputs[0].token_ids
        if ours == theirs:
            assert one.outputs[0].text == other.outputs[0].text
            assert one.outputs[0].finish_reason == other.outputs[0].finish_reason
            continue
        same = next(i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y)
        likely = other.outputs[0].logprobs[same]
        assert ours[same] in likely, (one.request_id, same, ours, theirs)
        assert likely[theirs[same]].logprob - likely[ours[same]].logprob < tie, (one.request_id, same, ours, theirs)


def alone(model, prompts, params, **options):
    """The results of `generate`, with log-probabilities."""
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    return model.generate(prompts, [dataclasses.replace(one, logprobs=20) for one in params], **options)


def drawn(rng, count, *, longest=24, most=16):
    """Random prompts, which often share a prefix, and greedy params with a random max_tokens for each."""
    stems = [[rng.randrange(3, 250) for _ in range(12)] for _ in range(3)]
    prompts = []
    for _ in range(count):
        stem = rng.choice([*stems, []])[: rng.randint(1, 12)]
        prompts.append([*stem, *(rng.randrange(3, 250) for _ in range(rng.randint(1, longest - 12)))])
    params = [SamplingParams(temperature=0, max_tokens=rng.randint(1, most), ignore_eos=True) for _ in prompts]
    return prompts, params


@pytest.mark.parametrize("caching", [True, False])
def test_greedy_tokens_are_those_of_generate(model, caching):
    prompts, params = drawn(random.Random(0), 24)
    engine = Engine(model, **SMALL | dict(num_pages=20), enable_prefix_caching=caching)
    got = run(engine, *zip(prompts, params, strict=True))
    assert_same(got, alone(model, prompts, params))
    metrics = engine.metrics()
    assert metrics.preemptions > 0 and (metrics.prefix_hits > 0) == caching
    assert metrics.finished_requests == 24 and metrics.generated_tokens == sum(one.max_tokens for one in params)
    assert metrics.prompt_tokens == sum(map(len, prompts))
    assert_clean(engine)


@pytest.mark.parametrize(
    ("kv_dtype", "quantization", "seed", "count", "tie"),
    [
        run_of(None, None, 0, 600, TIE, quick=False, soak=True),
        run_of(None, None, 5, 120, TIE, quick=True),
        # The engine does not see what pages and weights hold: one kind with a number in a byte, and one with two. The
        # rounding of another batch size may change a number in a page by one quantization step.
        run_of("int8", "int8", 6, 200, 0.05, quick=False, soak=True),
        run_of("int4", "int4", 7, 200, 0.5, quick=False, soak=True),
        run_of(None, "int8-dynamic", 8, 60, TIE, quick=False, soak=True),
    ],
)
def test_random_arrivals_and_aborts(kv_dtype, quantization, seed, count, tie):
    """Random arrivals, priorities, samples, beams and aborts over a pool that holds four requests."""
    rng = random.Random(seed)
    model = language_model(kv_dtype, quantization)
    prompts, params = drawn(rng, count)
    want = alone(model, prompts, params, max_batch=64)
    engine = Engine(model, **SMALL | dict(num_pages=14, max_num_seqs=5), max_model_len=40, kv_dtype=kv_dtype)
    left, got, aborted, extras = list(range(count)), {}, set(), 0
    while left or engine.has_unfinished:
        for _ in range(min(len(left), rng.choice([0, 0, 1, 3]))):
            i = left.pop()
            engine.add_request(prompts[i], params[i], request_id=str(i), priority=rng.choice([0, 0, 0, 1]))
            if rng.random() < 0.05:
                aborted.add(str(i))
        if rng.random() < 0.02:
            beams = BeamSearchParams(beam_width=3, max_tokens=6)
            extra = rng.choice([SamplingParams(n=3, max_tokens=9, seed=1), beams])
            engine.add_request(prompts[0], extra)
            extras += 1
        if aborted and rng.random() < 0.2:
            engine.abort(rng.choice(sorted(aborted)))
        for result in engine.step():
            got[result.request_id] = result
        engine._scheduler.pools.pools[0].allocator.check()
    assert len(got) == count + extras
    ended = [i for i in range(count) if got[str(i)].outputs[0].finish_reason != "abort"]
    assert len(ended) >= 0.9 * count
    assert_same([got[str(i)] for i in ended], [want[i] for i in ended], tie)
    assert engine.metrics().preemptions > count / 50
    assert_clean(engine)


def test_sampled_tokens_do_not_depend_on_other_requests(model, engine):
    kinds = [
        dict(temperature=1.3, seed=5, top_k=60, top_p=0.95, min_p=0.01),
        dict(temperature=0.0),
        dict(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2, seed=1),
        dict(temperature=0.0, logit_bias={40: 3.0}, min_tokens=4, stop_token_ids=[40]),
        dict(temperature=1.0, seed=9, logprobs=2),
    ]
    params = [SamplingParams(max_tokens=14, **kind) for kind in kinds]
    prompts = ["Hi", "a longer prompt", "x", "seven c", "another"]
    want = model.generate(prompts, params)
    got = run(engine, *zip(prompts, params, strict=True))
    assert [one.outputs[0].token_ids for one in got] == [one.outputs[0].token_ids for one in want]
    for one, other in zip(got[4].outputs[0].logprobs, want[4].outputs[0].logprobs, strict=True):
        assert one.keys() == other.keys()
        assert all(one[i].logprob == pytest.approx(other[i].logprob, abs=1e-4) for i in one)
    assert got[0].outputs[0].logprobs is None


def test_penalties_are_the_same_after_a_preemption(model):
    params = SamplingParams(temperature=0.7, seed=2, max_tokens=20, frequency_penalty=0.8, repetition_penalty=1.3)
    prompts = ["abcdefgh", "ijklmnop", "qrstuvwx"]
    engine = Engine(model, **SMALL | dict(num_pages=12), max_model_len=40)
    got = run(engine, *((prompt, params) for prompt in prompts))
    assert engine.metrics().preemptions > 0
    want = model.generate(prompts, params)
    assert [one.outputs[0].token_ids for one in got] == [one.outputs[0].token_ids for one in want]


def test_samples_of_a_prompt_differ_and_the_first_is_that_of_n_1(model, engine):
    params = SamplingParams(temperature=1.5, seed=3, max_tokens=10, n=6)
    [six] = run(engine, ("many ways on", params))
    [one] = model.generate("many ways on", dataclasses.replace(params, n=1))
    assert six.outputs[0].token_ids == one.outputs[0].token_ids
    assert [output.index for output in six.outputs] == list(range(6))
    assert len({output.token_ids for output in six.outputs}) == 6
    assert run(engine, ("many ways on", params))[0].outputs == six.outputs


def test_a_finished_sample_takes_no_token_of_the_step_launched_ahead(model, engine):
    """The other samples of its request continue, so the request itself is not finished."""
    stops = PRINTABLE[::3]
    params = SamplingParams(temperature=1.5, seed=5, max_tokens=12, n=6, stop_token_ids=stops)
    [six] = run(engine, ("some end early", params))
    assert len({len(output.token_ids) for output in six.outputs}) > 2, "the samples should end at different steps"
    for output in six.outputs:
        *before, last = output.token_ids
        assert not set(before) & set(stops) and (last in stops) == (output.finish_reason == "stop")


def brute_force(model, prompt, params):
    """The rules of beam search with the logits of whole sequences."""
    live, ended = [((), 0.0)], []
    ids = model.prompt_ids(prompt)
    for length in range(1, params.max_tokens + 1):
        logits = np.asarray(model.logits(np.array([[*ids, *tokens] for tokens, _ in live]))[:, -1], np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logprobs -= logits.max(1, keepdims=True)
        candidates = [
            (total + logprobs[row, token], (*tokens, token))
            for row, (tokens, total) in enumerate(live)
            for token in np.argsort(-logprobs[row])[: 2 * params.beam_width].tolist()
        ]
        candidates.sort(reverse=True)
        for total, tokens in candidates[: params.beam_width]:
            if tokens[-1] in model.eos_token_ids:
                ended.append((total / length**params.length_penalty, tokens))
        live = [(tokens, total) for total, tokens in candidates if tokens[-1] not in model.eos_token_ids]
        live = live[: params.beam_width]
    ended += [(total / params.max_tokens**params.length_penalty, tokens) for tokens, total in live]
    return sorted(ended, reverse=True)[: params.beam_width]


@pytest.mark.parametrize("num_pages", [33, 10])
def test_beams_are_those_of_a_search_without_a_cache(model, num_pages):
    params = BeamSearchParams(beam_width=4, max_tokens=7)
    engine = Engine(model, **SMALL | dict(num_pages=num_pages), max_model_len=24)
    company = [("other", GREEDY), ("one more", GREEDY)]
    prompt = "where to go"
    found, *others = run(engine, (prompt, params), *company)
    want = brute_force(model, prompt, params)
    assert [output.token_ids for output in found.outputs] == [tokens for _, tokens in want]
    for output, (score, tokens) in zip(found.outputs, want, strict=True):
        assert output.cumulative_logprob == pytest.approx(score * len(tokens), abs=1e-3)
        assert output.finish_reason == "length" and len(output.text) == 7
    assert_same(others, alone(model, [prompt for prompt, _ in company], GREEDY))
    assert (engine.metrics().preemptions > 0) == (num_pages == 10)
    assert_clean(engine)


def test_beams_share_their_prompt(model):
    engine = Engine(model, **SMALL | dict(max_num_seqs=6))
    engine.add_request("a prompt of thirty-two characters"[:32], BeamSearchParams(beam_width=6, max_tokens=6))
    most = 0
    while engine.has_unfinished:
        engine.step()
        most = max(most, engine._scheduler.pools.num_held)
    assert most <= 8 + 6 * 2 < 6 * 8


def test_prompt_logprobs_are_those_of_a_full_forward_pass(model, engine):
    prompt = model.prompt_ids("a prompt that takes several chunks of thirty-two tokens")
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    for _ in range(2):  # the second finds nothing of the prompt in the cache
        [result] = run(engine, (prompt, params))
        assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == len(prompt)
        logits = np.asarray(model.logits(np.array([prompt]))[0], np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        logprobs -= logits.max(1, keepdims=True)
        for place, entries in enumerate(result.prompt_logprobs[1:], start=1):
            assert prompt[place] in entries and 2 <= len(entries) <= 3
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(logprobs[place - 1, token], abs=2e-3)
                assert entry.rank == 1 + (logits[place - 1] > logits[place - 1, token]).sum()
    [alone] = run(engine, ("x", params))
    assert alone.prompt_logprobs == (None,)


KINDS = [
    dict(temperature=0.0),
    dict(temperature=0.9),
    dict(temperature=0.7, top_k=9, top_p=0.8, seed=4),
    dict(temperature=0.0, logprobs=3),
    dict(temperature=0.0, presence_penalty=1.0),
    dict(temperature=1.0, min_tokens=2, stop="e"),
    dict(temperature=0.0, prompt_logprobs=1),
    dict(temperature=0.0, stop_token_ids=range(250, 262)),
]


@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(KINDS[:3], id="few"),
        pytest.param(KINDS, id="all", marks=(pytest.mark.exhaustive, pytest.mark.soak)),
    ],
)
def test_nothing_compiles_after_warm_up(model, kinds):
    rng = random.Random(7)
    engine = Engine(model, **SMALL | dict(num_pages=24, max_num_seqs=3, max_num_batched_tokens=40), max_model_len=48)
    beams = [BeamSearchParams()] if kinds is KINDS else []
    engine.warm_up([*(SamplingParams(**kind) for kind in kinds), *beams])
    with counted_compilations() as compilations:
        for _ in range(500):
            params = SamplingParams(**rng.choice(kinds), max_tokens=rng.randint(2, 12), n=rng.choice([1, 1, 1, 2, 4]))
            engine.add_request([rng.randrange(3, 250) for _ in range(rng.randint(1, 30))], params)
            if rng.random() < 0.5:
                engine.step()
        assert len(list(engine.run())) > 400
        for _ in beams:
            run(engine, ("beams", BeamSearchParams(beam_width=3, max_tokens=4)))
    assert not compilations
    assert_clean(engine)


def test_no_step_copies_the_pool(model, engine):
    run(engine, ("Hi", GREEDY))
    before = engine._launcher.cache
    engine.add_request("Hi", GREEDY)
    engine.step()
    assert all(x.is_deleted() for x in (*before.k, *before.v))
    list(engine.run())


def test_a_stop_string_across_tokens_ends_a_request(model, engine):
    [whole] = run(engine, ("Hi", GREEDY))
    text = whole.outputs[0].text
    [cut] = run(engine, ("Hi", dataclasses.replace(GREEDY, stop=text[3:6])))
    assert cut.outputs[0].text == text[:3] and cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].stop_reason == text[3:6] and len(cut.outputs[0].token_ids) == 6


def test_a_stream_grows_while_other_requests_run(model, engine):
    other = engine.add_request("other", GREEDY)
    texts = [result.outputs[0].text for result in engine.stream("Hi", GREEDY)]
    assert len(texts) == GREEDY.max_tokens and all(b.startswith(a) for a, b in itertools.pairwise(texts))
    assert texts[-1] == model.generate("Hi", GREEDY)[0].outputs[0].text
    assert other not in engine._results.requests  # it finished meanwhile


@pytest.mark.parametrize("begun", [True, False])
def test_a_stream_that_is_closed_aborts_its_request(engine, begun):
    stream = engine.stream("Hi", GREEDY)
    if begun:
        next(stream)
    stream.close()
    assert list(engine.run()) == [] and not engine.has_unfinished
    *_, last = stream
    assert last.outputs[0].finish_reason == "abort" and len(last.outputs[0].token_ids) < GREEDY.max_tokens


def test_streams_may_be_read_in_any_order_and_keep_the_results_of_others(model, engine):
    streams = [engine.stream(prompt, GREEDY, request_id="again") for prompt in ("Hi",)]
    streams += [engine.stream("Yo", GREEDY)]
    plain = [engine.add_request(prompt, GREEDY) for prompt in ("one", "two")]
    first, second = [list(stream) for stream in streams]
    assert len(first) == len(second) == GREEDY.max_tokens
    assert second[-1].outputs == model.generate("Yo", GREEDY)[0].outputs
    for result in engine.run():
        assert result.request_id == plain.pop(0)
        break
    assert [result.request_id for result in engine.run()] == plain
    assert list(engine.stream("Hi", GREEDY, request_id="again"))[-1].outputs == first[-1].outputs


def test_streams_of_several_threads(model, engine):
    prompts = ["one", "two", "three", "four", "five"]
    found = {}

    def read(prompt):
        found[prompt] = list(engine.stream(prompt, GREEDY))

    threads = [threading.Thread(target=read, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for prompt, want in zip(prompts, model.generate(prompts, GREEDY), strict=True):
        assert len(found[prompt]) == GREEDY.max_tokens and found[prompt][-1].outputs == want.outputs


def test_abort_ends_a_request_in_any_state(engine):
    running = [engine.add_request(f"prompt {i}", GREEDY) for i in range(4)]
    waiting = engine.add_request("waits", GREEDY)
    beams = engine.add_request("beams", BeamSearchParams(beam_width=2, max_tokens=4), priority=-1)
    fresh = engine.add_request("fresh", GREEDY, request_id="mine")
    engine.abort(fresh)
    early = [result for _ in range(3) for result in engine.step()]
    for one in (running[0], waiting, beams, "unknown"):
        engine.abort(one)
    results = {result.request_id: result for result in (*early, *engine.run())}
    reasons = {i: [output.finish_reason for output in result.outputs] for i, result in results.items()}
    assert reasons[running[0]] == reasons[waiting] == reasons["mine"] == ["abort"]
    assert reasons[beams] in (["abort"], ["abort"] * 2)
    assert all(reasons[i] == ["length"] for i in running[1:])


def test_a_callback_that_raises_ends_only_its_request(model, engine):
    def angry(result):
        if len(result.outputs[0].token_ids) == 3:
            raise ZeroDivisionError("no more")

    first = engine.add_request("Hi", GREEDY, on_output=angry)
    second = engine.add_request("Hi", GREEDY)
    results = {result.request_id: result for result in engine.run()}
    assert results[first].outputs[0].finish_reason == "error"
    assert results[first].error == "on_output raised ZeroDivisionError('no more')"
    assert results[second].outputs == model.generate("Hi", GREEDY)[0].outputs and results[second].error is None


def test_a_late_abort_does_not_affect_the_next_request_with_that_id(engine):
    for _ in range(2):
        [result] = [run(engine, ("Hi", GREEDY), request_id="mine")[0]]
        assert result.outputs[0].finish_reason == "length"
        engine.abort("mine")


def test_an_error_in_detokenization_ends_only_its_request(model, engine, monkeypatch):
    bad = engine.add_request("Hi", GREEDY)
    good = engine.add_request("Yo", GREEDY)
    monkeypatch.setattr(engine._results.requests[bad].completions[0], "take", lambda token: 1 / 0)
    results = {result.request_id: result for result in engine.run()}
    assert results[bad].error == "ZeroDivisionError('division by zero')"
    assert results[good].outputs == model.generate("Yo", GREEDY)[0].outputs


@pytest.mark.parametrize(("part", "where"), [("_launcher", "launch"), ("_results", "collect")])
def test_after_an_interrupted_step_the_engine_refuses_calls_until_reset(model, monkeypatch, part, where):
    engine = Engine(model, **SMALL)
    engine.add_request("Hi", GREEDY)
    engine.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(getattr(engine, part), where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(engine.run())
    for call in (engine.step, lambda: engine.add_request("Hi", GREEDY), lambda: list(engine.run())):
        with pytest.raises(
            RuntimeError, match="a step was interrupted, so the contents of the cache are unknown: call reset"
        ):
            call()
    engine.reset()
    assert_same(run(engine, ("Hi", GREEDY)), alone(model, ["Hi"], GREEDY))


def test_mean_times_exclude_requests_without_tokens(model):
    now = [0.0]
    engine = Engine(model, **SMALL, clock=lambda: now[0])
    for i in range(3):
        engine.add_request("aborted", GREEDY, request_id=f"{i}")
        engine.abort(f"{i}")
    engine.add_request("Hi", SamplingParams(temperature=1.0, n=4, max_tokens=5, ignore_eos=True))
    while engine.has_unfinished:
        now[0] += 1.0
        engine.step()
    metrics = engine.metrics()
    assert (metrics.time_to_first_token, metrics.time_per_output_token) == (2.0, 1.0)
    assert metrics.finished_requests == 4 and metrics.generated_tokens == 20


def test_metrics_use_the_engine_s_clock(model):
    now = [100.0]
    engine = Engine(model, **SMALL, clock=lambda: now[0])
    engine.add_request("Hi", dataclasses.replace(GREEDY, max_tokens=3))
    results = []
    while not results:
        now[0] += 1.0
        results = engine.step()
    times = results[0].metrics
    assert (times.arrival, times.first_token, times.finished) == (100.0, 102.0, 104.0)
    metrics = engine.metrics()
    assert (metrics.time_to_first_token, metrics.time_per_output_token) == (2.0, 1.0)
    assert metrics.cache_use == 0.0 and metrics.steps == 3


NOT_FINITE = {
    "greedy": GREEDY,
    "samples": SamplingParams(n=2, seed=3, max_tokens=4, logprobs=1, min_tokens=2),
    "beams": BeamSearchParams(beam_width=2, max_tokens=4),
}


@pytest.mark.parametrize("name", [run_of(name, quick=name == "samples") for name in NOT_FINITE])
def test_logits_that_are_not_finite_end_only_their_request(model, name):
    params = [jax.numpy.full_like(x, jax.numpy.nan) if x.ndim == 1 else x for x in model.params]
    engine = Engine(
        LanguageModel(decoder=sharp_decoder(model.config), params=tuple(params), tokenizer=model.tokenizer), **SMALL
    )
    engine.add_request("Hi", NOT_FINITE[name])
    [result] = engine.run()
    assert {one.finish_reason for one in result.outputs} == {"error"}
    assert result.error.startswith("the logits are not finite") and not engine.has_unfinished
    if name == "samples":
        [streamed] = engine.stream("Hi", NOT_FINITE[name])
        assert streamed.error == result.error
    assert engine.metrics().running == 0


def test_an_idle_engine_waits_for_more_requests(model):
    engine = Engine(model, **SMALL, max_wait_ms=10_000)
    for prompt in ("one", "two", "three"):
        engine.add_request(prompt, GREEDY)
    timer = threading.Timer(0.05, engine.add_request, ("four", GREEDY))
    timer.start()
    engine.step()  # four requests fill the rows, so the wait ends long before its timeout
    assert engine.metrics().running == 4
    list(engine.run())
    timer.join()

    class Inbox(queue.SimpleQueue):
        def get(self, block=True, timeout=None):
            assert not self.empty(), f"the engine waits {timeout} s for requests after its only one was aborted"
            return super().get(block, timeout)

    engine._inbox = Inbox()
    one = engine.add_request("five", GREEDY)
    engine.abort(one)
    engine.step()


def test_reset_forgets_everything(model, engine):
    engine.add_request("Hi", GREEDY)
    engine.step()
    engine.reset()
    assert not engine.has_unfinished
    assert_same(run(engine, ("Hi", GREEDY)), alone(model, ["Hi"], GREEDY))


REFUSED_REQUESTS = {
    "too_long": (
        "x" * 100,
        GREEDY,
        "the prompt has 100 tokens and max_tokens is 12, together more than max_model_len=48 (the model's context is "
        "128, the pool holds 128 tokens); shorten the prompt, lower max_tokens, or give the engine more pages",
    ),
    "empty": ([], GREEDY, "the prompt is empty: pass at least one token"),
    "unknown_token": ([300], GREEDY, "token ids must be 0 to 271, got 300"),
    "beams_too_long": ("x" * 40, BeamSearchParams(max_tokens=20), "the prompt has 40 tokens and max_tokens is 20"),
    "stop_token": ("x", SamplingParams(stop_token_ids=[272]), "stop_token_ids must contain ids from 0 to 271"),
}


@pytest.mark.parametrize("case", REFUSED_REQUESTS)
def test_a_request_that_can_never_be_served_is_refused_at_once(model, case):
    engine = Engine(model, **SMALL, max_model_len=48)
    prompt, params, message = REFUSED_REQUESTS[case]
    with pytest.raises(ValueError) as error:
        engine.add_request(prompt, params)
    assert str(error.value).startswith(message) and not engine.has_unfinished


def test_a_request_larger_than_the_pool_is_refused(model):
    engine = Engine(model, **SMALL | dict(num_pages=5))
    assert engine.max_model_len == 16
    with pytest.raises(ValueError, match="the pool holds 16 tokens"):
        engine.add_request("x" * 10, GREEDY)
    assert len(run(engine, ("x" * 10, dataclasses.replace(GREEDY, max_tokens=None)))[0].outputs[0].token_ids) <= 6


def test_a_priority_must_be_an_integer(engine):
    with pytest.raises(ValueError, match=r"priority must be an integer \(smaller values run first\), got None"):
        engine.add_request("x", GREEDY, priority=None)


def test_an_id_is_used_once(engine):
    chosen = [engine.add_request("x", GREEDY, request_id=f"request-{next(engine._numbers) + 2}") for _ in range(2)]
    assert engine.add_request("x", GREEDY) not in chosen
    engine.add_request("x", GREEDY, request_id="mine")
    with pytest.raises(ValueError, match="request id 'mine' is in use; wait for that request or choose another id"):
        engine.add_request("x", GREEDY, request_id="mine")


def test_warm_up_does_not_disturb_requests(engine):
    engine.add_request("x", GREEDY)
    with pytest.raises(RuntimeError, match="warm_up needs an idle engine: call it before or after all requests"):
        engine.warm_up()


REFUSED_ENGINES = {
    "max_model_len": (dict(max_model_len=129), "max_model_len must be from 1 to 128, the model's context, got 129"),
    "max_wait_ms": (dict(max_wait_ms=-1), "max_wait_ms must be at least 0, got -1"),
    "kv_dtype": (dict(kv_dtype="int3"), "kv_dtype must be one of int8, fp8, int4, or None"),
    "page_size": (dict(page_size=0), "num_pages must be >= 2, since page 0 is never used, and page_size >= 1, got"),
    "num_pages": (dict(num_pages=1), "num_pages must be >= 2"),
    "max_num_seqs": (dict(max_num_seqs=0), "max_num_seqs must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED_ENGINES)
def test_invalid_options_of_an_engine_are_refused(model, case):
    options, message = REFUSED_ENGINES[case]
    with pytest.raises(ValueError) as error:
        Engine(model, **SMALL | options)
    assert str(error.value).startswith(message)


WINDOWS = {"some": (6, None), "all": (6, 6)}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_release_pages_while_a_request_runs(name):
    """Prompts of several chunks, samples that share pages, and a pool too small for all: tokens are generate's."""
    decoder = sharp_decoder(dataclasses.replace(CONFIG, windows=WINDOWS[name]))
    model = LanguageModel(decoder=decoder, params=tuple(jax.tree.leaves(nnx.split(decoder)[1])))
    engine = Engine(
        model, max_num_seqs=4, page_size=4, num_pages=33 if None in WINDOWS[name] else 21, max_num_batched_tokens=16
    )
    assert engine.max_model_len == 128
    rng = random.Random(3)
    prompts = [[rng.randrange(CONFIG.vocab_size) for _ in range(n)] for n in (70, 5, 90, 33, 90, 70)]
    prompts[4][:60] = prompts[2][:60]  # two prompts share a prefix
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=20)
    sampled = SamplingParams(n=3, temperature=1.0, max_tokens=20, ignore_eos=True, seed=1)
    ids = [engine.add_request(prompt, params) for prompt in prompts]
    several = engine.add_request(prompts[0], sampled)
    ended, most = {}, 0
    while engine.has_unfinished:
        ended |= {result.request_id: result for result in engine.step()}
        most = max(most, engine._scheduler.pools.pools[-1 if name == "all" else 0].allocator.num_held)
    # a window of 6 is in up to 3 pages of 4; a step's tokens and copies of shared pages are added
    assert most <= 4 * 4 + 16 // 4
    assert_same([ended[i] for i in ids], model.generate(prompts, params))
    assert len({output.token_ids for output in ended[several].outputs}) > 1
    assert_clean(engine)


@pytest.mark.parametrize("name", WINDOWS)
def test_a_known_prefix_longer_than_the_pool_of_a_window(name):
    """Tokens that have left the window are not looked up; the visible part of the prefix is found."""
    decoder = sharp_decoder(dataclasses.replace(CONFIG, windows=WINDOWS[name]))
    model = LanguageModel(decoder=decoder, params=tuple(jax.tree.leaves(nnx.split(decoder)[1])))
    engine = Engine(model, max_num_seqs=1, page_size=4, max_num_batched_tokens=8)
    prompt = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 60).tolist()
    for length in (24, 60, 60):
        [result] = run(engine, (prompt[:length], GREEDY))
        assert_same([result], model.generate([prompt[:length]], dataclasses.replace(GREEDY, logprobs=20)))
    assert engine._scheduler.pools.hit_tokens == 24 + 56
