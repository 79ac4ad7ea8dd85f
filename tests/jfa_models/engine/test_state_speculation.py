"""Speculation with models whose layers have states: what was refused leaves no trace in them."""

import dataclasses
import functools
import itertools
import random

import numpy as np
import pytest
from engines import assert_clean, assert_same
from golden import GOLDEN
from random_adapters import random_adapter
from runs import run
from tiny_model import counted_compilations, folder_with_text

from jfa_models import LLM, BeamSearchParams, Engine, SamplingParams, StructuredOutputsParams, from_pretrained
from jfa_models.decoding.draft_tree import DraftTree

NAMES = ("mamba2", "granitemoehybrid", "qwen3_next")
VOCAB = 96
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0.8, top_k=9, seed=1, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1, n=3, seed=2, max_tokens=10, ignore_eos=True),
]
SMALL = dict(max_num_seqs=4, page_size=4, num_pages=25, max_num_batched_tokens=16, max_model_len=48)
LENGTH = 3


@functools.cache
def loaded(name):
    return from_pretrained(GOLDEN / name, dtype="float32")


def speculation(method, **options):
    given = {"method": method, "num_speculative_tokens": LENGTH, "adaptive": False}
    of_model = {"confidence_threshold": 0.0}
    own = {"ngram": {"prompt_lookup_min": 1}, "self": {"num_layers": 1, **of_model}, "draft_model": of_model}
    return given | own[method] | options


class Told:
    """Drafts the tokens that come, known from an engine without drafts, with a wrong one at some place or none."""

    def __init__(self, texts, seed):
        self.texts = texts  # of (request id, number of its continuation)
        self.rng = random.Random(seed)

    def gains(self, one):
        return [1.0] * LENGTH

    def draft(self, lengths):
        drafts = {}
        for one, length in lengths.items():
            start = one.num_tokens - one.num_prompt
            tokens = list(self.texts[one.request.id, one.order[2]][start : start + length])
            place = self.rng.randrange(LENGTH + 1)
            tokens[place : place + 1] = [(token + 1) % VOCAB for token in tokens[place : place + 1]]
            drafts[one] = DraftTree(tokens)
        return drafts

    def judge(self, one, draft, path, sampled):
        pass

    def warm_up(self, params):
        pass


def drawn(rng, count):
    """Requests, with prompts that often share a prefix or are equal."""
    stems = [[rng.randrange(3, VOCAB) for _ in range(16)] for _ in range(3)]
    found = []
    for _ in range(count):
        stem = rng.choice([*stems, []])[: rng.choice([5, 8, 16])]
        prompt = [*stem, *(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 12)))]
        found.append((rng.choice(found)[0] if found and rng.random() < 0.1 else prompt, rng.choice(PARAMS)))
    return found


def results(engine, requests, **options):
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(prompt, params, request_id=str(i), number=i, **options)
    found = {result.request_id: result for result in engine.run()}
    return [found[str(i)] for i in range(len(requests))]


def without_drafts(model, requests):
    """Their results with log-probabilities, from an engine with room for all."""
    roomy = dict(max_num_seqs=8, page_size=16, num_pages=65, max_num_batched_tokens=32, max_model_len=64)
    engine = Engine(model, **roomy, enable_prefix_caching=False)
    return results(engine, [(prompt, dataclasses.replace(one, logprobs=20)) for prompt, one in requests])


def told(engine, want, seed):
    """The engine, with drafts that are right as often as wrong."""
    texts = {(x.request_id, i): one.token_ids for x in want for i, one in enumerate(x.outputs)}
    engine._speculator._proposer = Told(texts, seed)
    return engine


QUICK = {("granitemoehybrid", 4)}
SIZES = sorted(itertools.product(NAMES, (1, 4, 16)))


@pytest.mark.parametrize(("name", "page_size"), [run(*given, quick=given in QUICK, soak=True) for given in SIZES])
def test_whatever_is_refused_the_tokens_are_those_without_drafts(name, page_size):
    model, requests = loaded(name), drawn(random.Random(page_size), 14)
    want = without_drafts(model, requests)
    sizes = SMALL | dict(page_size=page_size, num_pages=1 + -(-64 // page_size))
    engine = told(Engine(model, **sizes, speculative_config=speculation("ngram")), want, 1)
    for got, other in zip(results(engine, requests), want, strict=True):
        assert_same(got, other)
    metrics, counts = engine.metrics(), engine.metrics().speculation["ngram"]
    assert 0.2 * counts.proposed < counts.accepted < 0.8 * counts.proposed
    assert metrics.prefix_hits > 0
    assert (metrics.preemptions > 0) == (name != "mamba2")  # it has no pages to run out of
    assert_clean(engine)


@pytest.mark.parametrize("name", [run(name, quick=name == "mamba2", soak=True) for name in NAMES])
@pytest.mark.parametrize("mistake", ["all stay", "none stays"])
def test_states_that_do_not_go_back_are_noticed(name, mistake, monkeypatch):
    model, requests = loaded(name), [(prompt, GREEDY) for prompt, _ in drawn(random.Random(3), 6)]
    want = without_drafts(model, requests)
    engine = told(Engine(model, **SMALL, speculative_config=speculation("ngram")), want, 1)
    enter = model.steps.enter

    def wrong(params, cache, pending, batch, token):
        following = np.append(batch.tokens[1:], -1)
        return enter(params, cache, pending, batch, following if mistake == "all stay" else np.full_like(following, -1))

    monkeypatch.setattr(model.steps, "enter", wrong)
    with pytest.raises(AssertionError):
        for got, other in zip(results(engine, requests), want, strict=True):
            assert_same(got, other)


DRAFTS = {"states": "mamba2", "both": "granitemoehybrid", "attention": "llama3_tiny"}


@pytest.mark.parametrize(
    ("name", "method", "draft"),
    [
        *(run(name, "ngram", None, quick=False, soak=True) for name in NAMES),
        *(run(name, "self", None, quick=False, soak=True) for name in NAMES),
        run("mamba2", "draft_model", "attention", quick=False, soak=True),
        run("llama3_tiny", "draft_model", "states", quick=False, soak=True),
        run("qwen3_next", "draft_model", "both", quick=False, soak=True),
        run("granitemoehybrid", "draft_model", "attention", quick=False, soak=True),
    ],
)
@pytest.mark.parametrize("count", [run(10, quick=True), run(60, quick=False, soak=True)])
def test_random_arrivals_and_aborts(name, method, draft, count, few_programs_before):
    rng = random.Random(f"{name} {method} {draft} {count}")
    model, requests = loaded(name), drawn(rng, count)
    want = without_drafts(model, requests)
    options = {} if draft is None else {"model": loaded(DRAFTS[draft])}
    config = speculation(method, **options, adaptive=rng.random() < 0.3)
    engine = Engine(model, **SMALL, speculative_config=config, num_state_snapshots=rng.choice([1, 3, 16]))
    left, got, aborted = list(range(count)), {}, set()
    while left or engine.has_unfinished:
        for _ in range(min(len(left), rng.choice([0, 0, 1, 3]))):
            prompt, params = requests[i := left.pop()]
            engine.add_request(prompt, params, request_id=str(i), number=i, priority=rng.choice([0, 0, 0, 1]))
            if rng.random() < 0.05:
                aborted.add(str(i))
        if aborted and rng.random() < 0.2:
            engine.abort(rng.choice(sorted(aborted)))
        for result in engine.step():
            got[result.request_id] = result
        for pool in engine._scheduler.pools.pools:
            pool.allocator.check()
    for other in want:
        assert_same(got[other.request_id], other)
        assert other.request_id in aborted or got[other.request_id].outputs[0].finish_reason == "length"
    assert config["adaptive"] or engine.metrics().speculation[method].proposed > 0
    assert_clean(engine)


@pytest.mark.parametrize("name", [run(name, quick=name == "mamba2", soak=True) for name in NAMES])
def test_a_draft_model_goes_on_after_what_was_refused(name):
    """It drafts its greedy tokens after the text, of which penalties refuse some."""
    model = loaded(name)
    engine = Engine(model, **SMALL | dict(num_pages=65), speculative_config=speculation("draft_model", model=model))
    draft, seen = engine._speculator._proposer.draft, []

    def recorded(lengths):
        drafts = draft(lengths)
        seen.extend((list(one.tokens), drafts[one].tokens) for one in lengths)
        return drafts

    engine._speculator._proposer.draft = recorded
    requests = [(list(range(10 + i, 22)), dataclasses.replace(PARAMS[2], max_tokens=24)) for i in range(4)]
    for got, other in zip(results(engine, requests), without_drafts(model, requests), strict=True):
        assert_same(got, other)
    counts = engine.metrics().speculation["draft_model"]
    assert 0.2 * counts.proposed < counts.accepted < 0.9 * counts.proposed
    alone = model.generate([text for text, _ in seen], dataclasses.replace(GREEDY, max_tokens=LENGTH), max_batch=32)
    same = [
        list(one.outputs[0].token_ids[: len(tokens)]) == tokens for one, (_, tokens) in zip(alone, seen, strict=True)
    ]
    assert len(seen) > 20 and np.mean(same) > 0.95  # rounding may decide ties


@pytest.mark.parametrize("name", [run("mamba2", quick=True), run("granitemoehybrid", quick=False, soak=True)])
@pytest.mark.parametrize("method", [run("ngram", quick=True), run("self", quick=False, soak=True)])
def test_nothing_compiles_after_warm_up(name, method):
    model = from_pretrained(GOLDEN / name, dtype="float32", max_adapters=1, max_rank=2)
    model.load_adapter("a", random_adapter(model, 0, rank=2))
    engine = Engine(model, **SMALL | dict(max_num_seqs=2), speculative_config=speculation(method))
    requests = drawn(random.Random(4), 8)
    engine.warm_up(PARAMS)
    with counted_compilations() as compiled:
        results(engine, requests)
        results(engine, requests, adapter="a")
    assert not compiled
    assert engine.metrics().speculation[method].proposed > 0


def test_beams_and_drafts_share_steps():
    model = loaded("mamba2")
    beams = BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True)
    requests = [([5, 6, 7], beams), (list(range(10, 20)), GREEDY)]
    want = results(Engine(model, **SMALL), requests)
    alone = without_drafts(model, requests[1:])
    engine = told(Engine(model, **SMALL, speculative_config=speculation("ngram")), want, 1)
    got = results(engine, requests)
    assert [one.token_ids for one in got[0].outputs] == [one.token_ids for one in want[0].outputs]
    assert_same(got[1], alone[0])
    assert engine.metrics().speculation["ngram"].accepted > 0


def test_tokens_that_a_grammar_forces_enter_the_states(tmp_path):
    """A form that leaves one possibility for most tokens: they are verified as drafts, without any speculation."""
    model = from_pretrained(folder_with_text(GOLDEN / "mamba2", tmp_path / "mamba2"), dtype="float32")
    params = dataclasses.replace(
        GREEDY, ignore_eos=False, max_tokens=24, structured_outputs=StructuredOutputsParams(regex="(abc=def;){2}")
    )
    requests = [([5 + i, 6, 7], params) for i in range(3)]
    engine = Engine(model, **SMALL)
    for got, other in zip(results(engine, requests), model.generate(*zip(*requests, strict=True)), strict=True):
        assert got.outputs[0].token_ids == other.outputs[0].token_ids
    assert engine.metrics().speculation["grammar"].accepted > 10


def test_llm_speculates():
    llm = LLM(GOLDEN / "mamba2", dtype="float32", max_num_seqs=4, speculative_config={"method": "ngram"})
    prompt = [5, 6, 7, 8] * 3
    [got], [want] = llm.generate([prompt], GREEDY), without_drafts(loaded("mamba2"), [(prompt, GREEDY)])
    assert_same(got, want)
    assert "ngram" in llm.engine.metrics().speculation


# Memory


def cache_bytes(engine):
    return engine._launcher.cache.num_bytes - engine._launcher.cache.states.num_bytes


def test_what_states_need_takes_no_room_from_the_pages_of_a_host(monkeypatch):
    monkeypatch.setattr("jfa_models.engine.engine.HOST_CACHE_BYTES", 100_000)
    model, sizes = loaded("granitemoehybrid"), dict(max_num_seqs=64, max_model_len=64)
    plain, engine = Engine(model, **sizes), Engine(model, **sizes, speculative_config=speculation("ngram"))
    assert cache_bytes(engine) == cache_bytes(plain) > 50_000


def test_a_device_has_room_for_what_is_pending(monkeypatch):
    from jfa_models.engine import engine as module

    model, sizes = loaded("granitemoehybrid"), dict(max_num_seqs=16, max_model_len=64, num_state_snapshots=0)
    limit = Engine(model, **sizes)._launcher.cache.num_bytes
    monkeypatch.setattr(module, "_room", lambda device, state_bytes: limit)
    engine = Engine(model, **sizes, speculative_config=speculation("ngram"))
    config, cache = model.config, engine._launcher.cache
    pending = 2 * 16 * (1 + LENGTH) * len(config.state_layers) * config.states.inputs * 4
    assert limit - cache_bytes(engine) / cache.num_pages[0] < cache.num_bytes + pending <= limit


# What is refused


@pytest.mark.parametrize("method", ["lookahead", "staged"])
def test_trees_are_refused_with_one_sentence(method):
    given = {"method": method} | ({"num_layers": 1} if method == "staged" else {})
    message = (
        f"speculative_config: the drafts of the method {method!r} are trees, which the states of a mamba2 model cannot "
        "follow; use ngram, draft_model, self"
    )
    with pytest.raises(ValueError) as caught:
        Engine(loaded("mamba2"), speculative_config=given)
    assert str(caught.value) == message
    given = {"method": "staged", "model": loaded("mamba2")}
    with pytest.raises(ValueError, match="'staged' are trees, which the states of a mamba2 model cannot follow"):
        Engine(loaded("llama3_tiny"), speculative_config=given)
