"""Speculation in the engine: a request's tokens are those without it, whatever drafts, and nothing compiles."""

import dataclasses
import functools
import random

import jax
import numpy as np
import pytest
from engines import assert_clean, assert_same
from flax import nnx
from random_adapters import random_adapter
from runs import run as run_of
from scipy.stats import chi2
from tiny_model import byte_tokenizer, counted_compilations, sentence_piece_tokenizer, sharp_decoder, tiny_config

from jfa_models import LLM, BeamSearchParams, Engine, LanguageModel, SamplingParams
from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.speculation import SpeculativeConfig
from jfa_models.model.config import ExpertsConfig

CONFIG = tiny_config(num_layers=3, context_length=128)
WINDOWS = dataclasses.replace(CONFIG, windows=(16, None, 8))
GEMMA = dataclasses.replace(
    WINDOWS, attention_soft_cap=20.0, logits_soft_cap=30.0, qk_norm=True, post_norms=True, scale_embeddings=True
)
MIXTURE = dataclasses.replace(
    CONFIG, experts=ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=16), qkv_bias=True
)
GREEDY = SamplingParams(temperature=0, max_tokens=24)
SMALL = dict(max_num_seqs=4, page_size=4, num_pages=65, max_num_batched_tokens=32)
METHODS = ("ngram", "draft_model", "self", "lookahead", "staged")


@functools.cache
def language_model(config=CONFIG):
    return LanguageModel(
        decoder=(decoder := sharp_decoder(config)),
        params=tuple(jax.tree.leaves(nnx.split(decoder)[1])),
        tokenizer=byte_tokenizer(),
    )


@functools.cache
def draft_model():
    """A model whose greedy tokens are often those of language_model: its first layers, under another window."""
    return language_model(dataclasses.replace(CONFIG, windows=(12, None, None))).with_layers(2)


def speculation(method, **options):
    by_model = {"num_speculative_tokens": 5, "confidence_threshold": 0.0}
    own = {
        "ngram": {"num_speculative_tokens": 5, "prompt_lookup_min": 1},
        "draft_model": {"model": draft_model(), **by_model},
        "self": {"num_layers": 2, **by_model},
        "lookahead": {"num_speculative_tokens": 11, "window_size": 2, "ngram_size": 3},
        "staged": {"num_layers": 2, **by_model, "num_speculative_tokens": 9, "prompt_lookup_min": 1},
    }
    return {"method": method, "adaptive": False} | own[method] | options


def run(engine, *requests, **options):
    """The results of (prompt, params), in their order."""
    ids = [engine.add_request(prompt, params, number=i, **options) for i, (prompt, params) in enumerate(requests)]
    results = {result.request_id: result for result in engine.run()}
    return [results[i] for i in ids]


SAMPLED = [
    SamplingParams(temperature=1, seed=5, max_tokens=20),
    SamplingParams(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=6, max_tokens=20, logprobs=3),
    SamplingParams(temperature=0.7, presence_penalty=0.5, frequency_penalty=0.3, seed=7, max_tokens=20),
    SamplingParams(temperature=0, repetition_penalty=1.3, logit_bias={80: 2.0}, max_tokens=20, logprobs=0),
    SamplingParams(temperature=0.5, min_tokens=9, stop_token_ids=[77, 78, 90], seed=8, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=1, n=3, seed=9, max_tokens=12, logprobs=20),
]


IN_CI = ("lookahead",)


# test_random_requests compares every method with windows as well, and prompt lookup in CI
@pytest.mark.parametrize(
    ("config", "method"),
    [
        *(run_of("full", method, quick=method in IN_CI, soak=method not in IN_CI) for method in METHODS),
        *(run_of("windows", method, quick=False, soak=True) for method in ("self", "lookahead", "staged")),
    ],
)
def test_every_option_gives_the_tokens_without_speculation(config, method):
    model = language_model(CONFIG if config == "full" else WINDOWS)
    requests = [(f"{'abc ' * i}and then {i}", one) for i, one in enumerate([GREEDY, *SAMPLED])]
    without = Engine(model, **SMALL)
    engine = Engine(model, speculative_config=speculation(method), **SMALL)
    wants_all = [(prompt, dataclasses.replace(one, logprobs=20)) for prompt, one in requests]
    for result, want in zip(run(engine, *requests), run(without, *wants_all), strict=True):
        assert_same(result, want)
    counts = engine.metrics().speculation[method]
    assert 0 < counts.accepted < counts.proposed
    assert counts.tokens_per_step == 1 + counts.accepted / counts.drafts > 1
    assert engine.metrics().steps < without.metrics().steps
    assert_clean(engine)


def test_a_model_that_drafts_for_itself_is_always_right():
    model = language_model()
    engine = Engine(model, speculative_config=speculation("draft_model", model=model), **SMALL)
    params = [GREEDY, *SAMPLED[:2], dataclasses.replace(GREEDY, max_tokens=30)]
    run(engine, *((f"prompt {i}", one) for i, one in enumerate(params)))
    counts = engine.metrics().speculation["draft_model"]
    assert counts.accepted == counts.proposed > 60


@pytest.mark.parametrize(
    "method", [run_of("ngram", quick=True), *(run_of(x, quick=False, soak=True) for x in METHODS if x != "ngram")]
)
@pytest.mark.parametrize(
    ("seed", "engines", "count"), [run_of(0, 1, 20, quick=True), run_of(1, 5, 40, quick=False, soak=True)]
)
def test_random_requests(method, seed, engines, count, few_programs_before):
    """Arrivals, aborts and preemption over shared prefixes, in pools of several sizes, dtypes and windows.

    The longest runs have 1,000 requests together.
    """
    rng = random.Random(seed)
    for place in range(engines):
        model = language_model((CONFIG, WINDOWS, CONFIG, GEMMA, MIXTURE)[place])
        options = dict(
            max_num_seqs=rng.choice([1, 2, 5, 16]),
            page_size=rng.choice([2, 4, 16]),
            kv_dtype="int8" if place == 2 else None,
            enable_prefix_caching=rng.random() < 0.7,
            max_num_batched_tokens=32,
        )
        options["num_pages"] = 1 + -(-rng.choice([140, 260]) // options["page_size"])
        adaptive = rng.random() < 0.3
        engine = Engine(model, speculative_config=speculation(method, adaptive=adaptive), **options)
        prefixes = ["".join(rng.choices("abcd", k=rng.randrange(1, 40))) for _ in range(5)]
        alone, waiting, aborted = {}, {}, set()
        for number in range(count):
            params = rng.choice([GREEDY, *SAMPLED])
            prompt = rng.choice(prefixes) + str(rng.randrange(20))
            request = engine.add_request(prompt, params, number=number, priority=rng.randrange(2))
            alone[request] = prompt, dataclasses.replace(params, logprobs=20), number
            waiting[request] = None
            for _ in range(rng.randrange(6)):
                for result in engine.step():
                    waiting[result.request_id] = result
            if rng.random() < 0.1:
                aborted.add(name := rng.choice(list(waiting)))
                engine.abort(name)
        waiting |= {result.request_id: result for result in engine.run()}
        assert_clean(engine)
        without = Engine(model, **options | dict(num_pages=400, max_num_seqs=16))
        ids = {without.add_request(p, one, number=n): name for name, (p, one, n) in alone.items()}
        for result in without.run():
            name = ids[result.request_id]
            assert waiting[name].error is None
            assert name in aborted or all(one.finish_reason != "abort" for one in waiting[name].outputs)
            if options["kv_dtype"] is None:  # rounding of pages depends on how they are filled
                assert_same(waiting[name], result)


@pytest.mark.parametrize("method", [run_of(name, quick=name == "ngram", soak=True) for name in METHODS])
def test_nothing_compiles_after_warm_up(method):
    model = language_model()
    engine = Engine(model, speculative_config=speculation(method), **SMALL | dict(max_num_seqs=2))
    params = [GREEDY, SAMPLED[0], SAMPLED[2]]
    engine.warm_up(params)
    with counted_compilations() as count:
        run(engine, *((f"{'ab' * i} and {i}", one) for i, one in enumerate(params * 3)))
    assert not count


def test_beams_and_speculation_share_steps():
    model = language_model()
    beams = BeamSearchParams(beam_width=2, max_tokens=12)
    got, want = (
        run(Engine(model, speculative_config=given, **SMALL), ("abab", beams), ("cdcd cdcd", GREEDY))
        for given in (speculation("ngram"), None)
    )
    for one, other in zip(got, want, strict=True):
        assert [x.token_ids for x in one.outputs] == [x.token_ids for x in other.outputs]


@pytest.mark.parametrize("method", [run_of("ngram", quick=True), run_of("self", quick=False, soak=True)])
def test_adapters_keep_their_own_tokens(method):
    model = LanguageModel(decoder=language_model().decoder, params=language_model().params, tokenizer=byte_tokenizer())
    model.load_adapter("a", random_adapter(model, 0, rank=2, strength=0.5, targets="all-linear"))
    engine, without = Engine(model, speculative_config=speculation(method), **SMALL), Engine(model, **SMALL)
    requests = [("abc abc", GREEDY), ("def", GREEDY)]
    for adapter in ("a", None, "a"):
        got, want = run(engine, *requests, adapter=adapter), run(without, *requests, adapter=adapter)
        assert [x.outputs[0].token_ids for x in got] == [x.outputs[0].token_ids for x in want]


@pytest.mark.exhaustive
@pytest.mark.soak
def test_the_second_choices_of_a_draft_model_are_drafts():
    """The more tokens a tree may have, the more of them are others than the draft model's first choice."""
    model, steps = language_model(), []
    for length, method in ((5, "self"), (9, "staged"), (24, "staged")):
        given = speculation(method, num_speculative_tokens=length, confidence_threshold=0.02)
        engine = Engine(model, speculative_config=given, **SMALL | dict(max_num_seqs=1))
        run(engine, *((f"prompt {i}", dataclasses.replace(GREEDY, max_tokens=40)) for i in range(4)))
        steps.append(engine.metrics().steps)
    assert steps[0] > steps[1] >= steps[2], steps


def test_a_tree_has_the_likeliest_tokens():
    from jfa_models.decoding.steps import Proposed
    from jfa_models.engine.draft_model import tree_of

    found = Proposed(
        token=np.array([5, 6, 7]),
        odds=np.array([0.5, 0.9, 0.1]),
        others=np.array([[5, 8], [6, 5], [9, 7]]),
        other_odds=np.array([[0.5, 0.3], [0.9, 0.05], [0.6, 0.1]]),
    )
    tree = tree_of(found, 5, None)
    # 0.5, 0.45, 0.3, 0.27, 0.045
    assert [tree.text(node) for node in range(5)] == [[5], [5, 6], [8], [5, 6, 9], [5, 6, 7]]
    assert len(tree_of(found, 9, None)) == 6
    assert not tree_of(jax.tree.map(lambda x: x[:0], found), 9, None)


def test_a_draft_below_the_threshold_is_cut():
    model = language_model()
    proposed = []
    for threshold in (0.0, 0.05, 1.0):
        engine = Engine(model, speculative_config=speculation("self", confidence_threshold=threshold), **SMALL)
        run(engine, ("abc and then 1", GREEDY), ("x", GREEDY))
        proposed.append(engine.metrics().speculation["self"].proposed)
    assert proposed[0] > proposed[1] > proposed[2] == 0


def test_reset_starts_over():
    engine = Engine(language_model(), speculative_config=speculation("draft_model"), **SMALL)
    first = run(engine, ("abc abc", GREEDY))[0].outputs
    engine.add_request("other", GREEDY)
    engine.step()
    engine.reset()
    assert engine.metrics().speculation["draft_model"].proposed == 0
    assert run(engine, ("abc abc", GREEDY))[0].outputs == first


def test_the_pool_leaves_room_for_the_pages_of_the_draft_model(monkeypatch):
    from jfa_models.engine import engine as module

    monkeypatch.setattr(module, "HOST_CACHE_BYTES", 200_000)
    options = dict(max_num_seqs=4, page_size=4)
    alone = Engine(language_model(), **options)
    engine = Engine(language_model(), speculative_config=speculation("self"), **options)
    draft = engine._speculator._proposer._cache
    assert engine._launcher.cache.num_bytes + draft.num_bytes <= 200_000 < 1.3 * alone._launcher.cache.num_bytes
    assert engine.num_slots == pytest.approx(alone.num_slots * 3 / 5, rel=0.05)  # two layers more than three


def test_llm_speculates():
    llm = LLM(language_model(), speculative_config={"method": "ngram"}, max_num_seqs=4, num_pages=40)
    assert llm.generate("abc abc abc", GREEDY)[0].outputs[0].finish_reason == "length"
    assert "ngram" in llm.engine.metrics().speculation


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "eagle"},
            "the method of speculation must be one of ngram, draft_model, self, lookahead, staged, got 'eagle'",
        ),
        ({}, "speculative_config needs a method: ngram, draft_model, self, lookahead, staged"),
        ("ngram", 'speculative_config must be a mapping such as {"method": "ngram"}, got \'ngram\''),
        ({"method": "ngram", "k": 3}, "speculative_config has no option k; its options are method, num_spec"),
        (
            {"method": "ngram", "num_speculative_tokens": 0},
            "num_speculative_tokens must be an integer from 1 to 64, got 0",
        ),
        ({"method": "ngram", "num_layers": 2}, "num_layers=2 has no effect on the method 'ngram', whose options are"),
        ({"method": "ngram", "prompt_lookup_min": 0}, "prompt_lookup_min must be an integer >= 1, got 0"),
        ({"method": "ngram", "prompt_lookup_min": 6}, "prompt_lookup_max must be an integer from 6 to 32, got 5"),
        ({"method": "ngram", "adaptive": 1}, "adaptive must be True or False, got 1"),
        ({"method": "self"}, "num_layers must be an integer >= 1, got None"),
        ({"method": "self", "num_layers": 3}, "num_layers must be less than 3, the layers of the model, got 3"),
        (
            {"method": "self", "num_layers": 1, "confidence_threshold": 2},
            "confidence_threshold must be a number in [0, 1]",
        ),
        ({"method": "ngram", "window_size": 3}, "window_size=3 has no effect on the method 'ngram'"),
        ({"method": "lookahead", "window_size": 0}, "window_size must be an integer from 1 to 64, got 0"),
        ({"method": "lookahead", "ngram_size": 1}, "ngram_size must be an integer from 2 to 64, got 1"),
        (
            {"method": "lookahead", "window_size": 10, "num_speculative_tokens": 30},
            "window_size=10 x (ngram_size=4 - 1) = 30 tokens leaves no drafts of num_speculative_tokens=30: give more",
        ),
        ({"method": "staged"}, 'the method "staged" needs either model (a folder, a repository or a LanguageModel) or'),
        ({"method": "staged", "model": "x", "num_layers": 2}, "got model='x' and num_layers=2"),
        ({"method": "staged", "num_layers": 3}, "num_layers must be less than 3, the layers of the model, got 3"),
        ({"method": "draft_model"}, 'the method "draft_model" needs model: a folder, a repository or a LanguageModel'),
    ],
)
def test_faulty_options(given, message):
    with pytest.raises(ValueError) as caught:
        Engine(language_model(), speculative_config=given, **SMALL)
    assert message in str(caught.value)


def test_a_draft_model_needs_the_same_vocabulary():
    model = language_model()
    other = LanguageModel(decoder=model.decoder, params=model.params, tokenizer=sentence_piece_tokenizer())
    with pytest.raises(ValueError, match=r"token 0 is '<unk>' in it, and '<\|bos\|>' in the model"):
        Engine(model, speculative_config={"model": other})
    small = dataclasses.replace(CONFIG, vocab_size=100)
    without = LanguageModel.random(small)
    with pytest.raises(ValueError, match="it has 100 tokens, and the model 272"):
        Engine(LanguageModel.random(CONFIG), speculative_config={"method": "draft_model", "model": without})


def test_a_model_alone_means_a_draft_model():
    assert SpeculativeConfig.of({"model": "folder"}).method == "draft_model"


# The distribution of tokens, against that without speculation.

VOCAB = 12


def p_value(counts, others):
    """That two samples differ as much by chance: a two-sample chi-square test over the cells with enough in them."""
    seen = counts + others > 10
    counts, others = counts[seen], others[seen]
    a, b = np.sqrt(others.sum() / counts.sum()), np.sqrt(counts.sum() / others.sum())
    return float(chi2.sf(((a * counts - b * others) ** 2 / (counts + others)).sum(), seen.sum() - 1))


def chains(params, drafts, seed, *, rows=256, rounds=80, accept=None, branches=1):
    """How often each pair of first tokens comes, where logits depend on the token before: with drafts, or one by one.

    accept: replaces the rule by which a sampled token is compared with a draft. branches: different drafts of the first
    token, in one tree.
    """
    from jfa_models.decoding.sampling import slot_rows
    from jfa_models.decoding.steps import Batch, Slots, _verify

    rng = np.random.default_rng(3)
    table = rng.normal(0, 0.8, (VOCAB, VOCAB)).astype(np.float32)
    pairs, rng = np.zeros((VOCAB, VOCAB), np.int64), np.random.default_rng(seed)
    verify = jax.jit(_verify)

    def step(last, drafted, numbers, generated, counts):
        t = drafted.shape[1] + 1
        tokens = np.concatenate([last[:, None], drafted], 1).astype(np.int32)
        seeds = [np.random.SeedSequence([seed, int(n)]) for n in numbers]
        sampling = slot_rows([params] * rows, seeds, vocab_size=VOCAB, eos_token_ids=())
        slots = Slots(
            last_token=np.zeros(rows, np.int32),
            prompt_seen=np.zeros((rows, VOCAB), bool),
            output_counts=counts,
            logit_bias=np.tile(np.linspace(-0.5, 0.5, VOCAB, dtype=np.float32), (rows, 1)),
        )
        batch = Batch(
            tokens=tokens.reshape(-1),
            query_start=np.arange(0, rows * t + 1, t, dtype=np.int32),
            slot=np.arange(rows, dtype=np.int32),
            last=None,
            tree_mask=None if branches == 1 else np.tile(DraftTree(range(t - 1), [-1] * (t - 1)).seen(t), (rows, 1)),
        )
        slots, sampled = verify(
            slots, table[tokens.reshape(-1)], sampling, batch, np.ones(rows, bool), np.full(rows, generated, np.int32)
        )
        return np.asarray(sampled.token).reshape(rows, t), slots.output_counts

    for number in range(rounds):
        numbers = np.arange(rows) + number * rows
        last, counts = np.zeros(rows, np.int32), np.zeros((rows, VOCAB), np.int32)
        drafted = np.zeros((rows, 0), np.int64)
        if drafts is not None:
            drafted = np.stack([rng.choice(VOCAB, branches, p=drafts, replace=False) for _ in range(rows)])
        sampled, counts = step(last, drafted, numbers, 0, counts)
        first = sampled[:, 0].copy()
        second, _ = step(first, np.zeros((rows, 0), np.int64), numbers, 1, counts)
        second = second[:, 0]
        if drafts is not None:
            if accept is not None:
                first = accept(first, drafted[:, 0], table, rng)
            for branch in range(branches):
                second = np.where(first == drafted[:, branch], sampled[:, 1 + branch], second)
        np.add.at(pairs, (first, second), 1)
    return pairs


DISTRIBUTIONS = {
    "temperature": SamplingParams(temperature=0.8),
    "top_k": SamplingParams(temperature=1, top_k=5),
    "top_p": SamplingParams(temperature=1, top_p=0.8),
    "min_p": SamplingParams(temperature=1, min_p=0.1),
    "penalties": SamplingParams(temperature=1, presence_penalty=0.7, frequency_penalty=0.5),
    "repetition": SamplingParams(temperature=1, repetition_penalty=1.5),
    "bias": SamplingParams(temperature=1, logit_bias={3: 1.0}),
    "min_tokens": SamplingParams(temperature=1, min_tokens=2, stop_token_ids=[1, 4]),
}
LIKELY = 0.6 ** np.arange(VOCAB) / (0.6 ** np.arange(VOCAB)).sum()


@pytest.mark.parametrize("option", [run_of(name, quick=name in ("temperature", "penalties")) for name in DISTRIBUTIONS])
def test_the_distribution_is_that_without_drafts(option):
    """20,480 pairs with drafts, and as many without from other seeds: 143 cells or fewer."""
    params = DISTRIBUTIONS[option]
    assert p_value(chains(params, LIKELY, 1), chains(params, None, 2)) > 1e-4


@pytest.mark.parametrize("option", [run_of(name, quick=name == "penalties", soak=True) for name in DISTRIBUTIONS])
def test_the_distribution_is_that_without_trees(option):
    params = DISTRIBUTIONS[option]
    assert p_value(chains(params, LIKELY, 1, branches=4), chains(params, None, 2)) > 1e-4


def test_a_wrong_rule_of_acceptance_is_noticed():
    """Drafts that are accepted by their probability, with the residual left as it was, come too often."""

    def accept(sampled, drafted, table, rng):
        likely = np.exp(table[0]) / np.exp(table[0]).sum()
        return np.where(rng.random(len(drafted)) < likely[drafted], drafted, sampled)

    params = SamplingParams(temperature=1)
    assert p_value(chains(params, LIKELY, 1, accept=accept), chains(params, None, 2)) < 1e-12
