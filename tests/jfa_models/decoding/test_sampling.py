"""Sampling: filters match a sorting float64 oracle, tokens their distribution, and no row depends on the others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jfa_models.decoding import sampling
from jfa_models.decoding.params import SamplingParams, check_token_ids
from jfa_models.decoding.sampling import finished_by_id, sample, sampling_rows, update

EOS = 2
VOCAB = 12  # of the property test
USES_ALL = SamplingParams(  # in every batch, so that all batches have the same arrays: one compilation
    temperature=0.7, top_k=3, repetition_penalty=1.5, logit_bias={1: 1.0}, min_tokens=4, logprobs=3
)

run_sample = jax.jit(sample)


def rows_of(*params, vocab_size, prompt_ids=None):
    prompt_ids = prompt_ids or [[0]] * len(params)
    return sampling_rows(params, vocab_size=vocab_size, prompt_ids=prompt_ids, eos_token_ids=[EOS])


def tokens_of(logits, *params, step=0):
    logits = jnp.asarray(logits)
    rows = rows_of(*params, vocab_size=logits.shape[-1])
    return np.asarray(run_sample(logits, rows, jnp.full(len(params), step)).token).tolist()


def softmax(x):
    """Float64 probabilities of the finite entries."""
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def oracle_logits(logits, params, prompt, output):
    """Bias, ban and penalties, token by token."""
    x = np.asarray(logits, np.float64).copy()
    for token_id, bias in params.logit_bias or ():
        x[token_id] += bias
    if len(output) < params.min_tokens:
        x[[EOS, *params.stop_token_ids]] = -np.inf
    for token_id in {*prompt, *output}:
        penalty = params.repetition_penalty
        x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id in set(output):
        x[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
    return x


def oracle_distribution(x, params, top_p):
    """Temperature, min_p, top_k and top_p with a sort, in float64; ties at an edge are kept."""
    x = x / params.temperature
    p = softmax(x)
    x = np.where(p < params.min_p * p.max() * (1 - 1e-9), -np.inf, x)
    if params.top_k > 0:
        x = np.where(x < np.sort(x)[::-1][min(params.top_k, len(x)) - 1], -np.inf, x)
    p = softmax(x)
    order = np.argsort(-p, kind="stable")
    mass_before = np.cumsum(p[order]) - p[order]
    edge = p[order][mass_before < top_p].min()
    return softmax(np.where(p < edge * (1 - 1e-9), -np.inf, x))


@jax.jit
def distribution(logits, rows, num_generated):
    """The distribution from which `sample` samples."""
    x = sampling._penalized(logits, rows, num_generated)
    weights = sampling._token_weights(x, x.max(-1), rows)
    return weights / weights.sum(-1, keepdims=True)


quarters = st.integers(-24, 24).map(lambda n: n / 4)  # exact in float32, and ties are common
token_ids = st.integers(0, VOCAB - 1)
any_fields = st.fixed_dictionaries(
    dict(
        temperature=st.sampled_from([0.5, 1.0, 2.0]),
        top_k=st.integers(0, VOCAB + 2),
        top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
        min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -1.0]),
        repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
        logit_bias=st.none() | st.dictionaries(token_ids, quarters, max_size=3),
        min_tokens=st.sampled_from([0, 3]),
        stop_token_ids=st.lists(token_ids.filter(lambda token_id: token_id != EOS), max_size=1),
    )
)
any_row = st.tuples(
    st.lists(quarters, min_size=VOCAB, max_size=VOCAB),
    any_fields,
    st.lists(token_ids, max_size=5),
    st.lists(token_ids, max_size=5),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(any_row, min_size=3, max_size=3))
def test_distribution_is_that_of_a_sorting_oracle(cases):
    logits = np.asarray([case[0] for case in cases] + [[0.0] * VOCAB], np.float32)
    params = [SamplingParams(**case[1]) for case in cases] + [dataclasses.replace(USES_ALL, stop_token_ids=[5])]
    rows = rows_of(*params, vocab_size=VOCAB, prompt_ids=[case[2] for case in cases] + [[0]])
    outputs = [case[3] for case in cases] + [[]]
    for step in range(5):
        token = jnp.asarray([(output + [0] * 5)[step] for output in outputs])
        rows = update(rows, token, jnp.asarray([step < len(output) for output in outputs]))
    num_generated = jnp.asarray([len(output) for output in outputs])
    got = np.asarray(distribution(logits, rows, num_generated))[:, :VOCAB]
    for row, (row_logits, _, prompt, output) in enumerate(cases):
        row_params = params[row]
        x = oracle_logits(row_logits, row_params, prompt, output)
        # Where the mass of some tokens equals top_p up to rounding, the next one may be kept or dropped.
        wanted = [oracle_distribution(x, row_params, row_params.top_p * factor) for factor in (1 - 1e-5, 1 + 1e-5)]
        errors = [np.abs(got[row] - want).max() for want in wanted]
        # Tokens below 2**-26 of the likeliest may be dropped; none that is filtered out may be kept.
        kept_alike = [((want > 0) | (got[row] == 0)).all() and (got[row] > 0)[want > 1e-6].all() for want in wanted]
        assert any(alike and error < 1e-5 for alike, error in zip(kept_alike, errors, strict=True)), (got[row], wanted)


FILTERS = {
    "none": SamplingParams(seed=1),
    "temperature": SamplingParams(temperature=2.5, seed=2),
    "top_k": SamplingParams(top_k=5, seed=3),
    "top_p": SamplingParams(top_p=0.8, seed=4),
    "min_p": SamplingParams(min_p=0.05, seed=5),
}


@pytest.mark.parametrize("name", FILTERS)
def test_sampled_tokens_follow_the_distribution(name):
    num_draws, vocab_size = 20_000, 300  # more than two blocks of the inverse CDF, and not a multiple of one
    logits = np.random.default_rng(0).normal(0, 2, vocab_size).astype(np.float32)
    rows = rows_of(FILTERS[name], vocab_size=vocab_size)
    rows = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_draws, *leaf.shape[1:])), rows)
    token = run_sample(jnp.broadcast_to(logits, (num_draws, vocab_size)), rows, jnp.arange(num_draws)).token
    want = oracle_distribution(logits.astype(np.float64), FILTERS[name], FILTERS[name].top_p) * num_draws
    got = np.bincount(token, minlength=vocab_size)
    assert got[want == 0].sum() == 0
    # Cells with few expected samples are pooled, as the chi-square test requires.
    is_common = want >= 10
    got = np.append(got[is_common], got[~is_common].sum())
    want = np.append(want[is_common], max(want[~is_common].sum(), 1e-9))
    degrees = len(want) - 1
    chi_square = ((got - want) ** 2 / want).sum()
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees), f"{chi_square=} with {degrees} degrees of freedom"


def test_every_token_of_weight_one_is_sampled_and_none_of_weight_zero():
    weights = np.zeros(4 * sampling.DRAW_BLOCK, np.int32)
    weights[[5, 6, 127, 128, 300, 511]] = 1  # so few points that every edge of the inverse CDF is hit
    num_draws = 1000
    keys = np.random.default_rng(7).integers(0, 2**32, (num_draws, 2), np.uint32)
    drawn = sampling._draw(jnp.tile(weights, (num_draws, 1)), jnp.asarray(keys), jnp.zeros(num_draws, jnp.int32))
    assert set(drawn.tolist()) == set(np.flatnonzero(weights).tolist())


def test_high_half_of_a_64_bit_product_is_exact():
    x, y = np.random.default_rng(8).integers(0, 2**32, (2, 1000), np.uint64)
    x[:3], y[:3] = 2**32 - 1, [2**32 - 1, 1, 2**31]
    got = sampling._high_half_of_product(jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32))
    np.testing.assert_array_equal(got, (x * y) >> np.uint64(32))


def test_samples_of_different_seeds_are_independent():
    num_rows = 4000
    rows = rows_of(*[SamplingParams(seed=seed) for seed in range(num_rows)], vocab_size=4)
    token = run_sample(jnp.zeros((num_rows, 4)), rows, jnp.zeros(num_rows, jnp.int32)).token
    counts = np.bincount(token, minlength=4)
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(num_rows * 3 / 16)


MIXED = {
    "greedy": SamplingParams(temperature=0, max_tokens=99),
    "plain": SamplingParams(seed=11),
    "filters": SamplingParams(seed=12, temperature=0.8, top_k=40, top_p=0.9, min_p=0.001),
    "penalties": SamplingParams(seed=13, presence_penalty=0.3, frequency_penalty=0.7, repetition_penalty=1.3),
    "greedy_penalties": SamplingParams(temperature=0, frequency_penalty=1.7, repetition_penalty=1.1, logprobs=2),
    "bias": SamplingParams(seed=14, logit_bias={7: 3.0, 999: -100.0}, min_tokens=6, top_k=300, stop_token_ids=[7, 8]),
}


def generate(params, prompts, logits_per_step):
    """Tokens [steps, b] from given logits [steps, b, vocab]; `update` runs inside the loop, as decoding runs it."""

    def step(rows, inputs):
        index, logits = inputs
        sampled = sample(logits, rows, jnp.full(logits.shape[0], index))
        return update(rows, sampled.token, jnp.ones(logits.shape[0], bool)), sampled.token

    rows = rows_of(*params, vocab_size=logits_per_step.shape[-1], prompt_ids=prompts)
    steps = jnp.arange(logits_per_step.shape[0])
    return np.asarray(jax.jit(lambda rows, logits: lax.scan(step, rows, (steps, logits))[1])(rows, logits_per_step))


def test_a_row_samples_the_same_tokens_by_itself_and_in_a_mixed_batch():
    random = np.random.default_rng(1)
    logits = jnp.asarray(random.normal(0, 2, (16, len(MIXED), 1000)), jnp.float32)
    prompts = random.integers(0, 1000, (len(MIXED), 200)).tolist()
    params = list(MIXED.values())
    together = generate(params, prompts, logits)
    for row, name in enumerate(MIXED):
        alone = generate([params[row]], [prompts[row]], logits[:, row : row + 1])
        assert alone[:, 0].tolist() == together[:, row].tolist(), name


def test_tokens_are_determined_by_the_seed():
    logits = np.zeros((3, 5000), np.float32)
    one, same, other = tokens_of(logits, SamplingParams(seed=5), SamplingParams(seed=5), SamplingParams(seed=6))
    assert one == same != other
    assert tokens_of(logits[:1], SamplingParams(seed=5)) == [one]
    assert tokens_of(logits[:1], SamplingParams(seed=5), step=1) != [one]


def test_a_row_without_a_seed_samples_by_its_request_id():
    keys = [
        sampling_rows(
            [SamplingParams()] * len(request_ids),
            vocab_size=3,
            prompt_ids=[[0]] * len(request_ids),
            eos_token_ids=[],
            default_seed=seed,
            request_ids=request_ids,
        ).key.tolist()
        for seed, request_ids in [(0, [0, 1]), (0, [1]), (1, [1])]
    ]
    assert keys[0][1] == keys[1][0] != keys[0][0]
    assert keys[2][0] != keys[1][0]


EXTREMES = {  # name: (logits, params, the allowed tokens)
    "greedy_takes_the_first_of_ties": ([1.0, 3.0, 3.0], SamplingParams(temperature=0), {1}),
    "one_token": ([-7.0], SamplingParams(top_k=1, top_p=0.1), {0}),
    "one_finite_logit": ([-np.inf, -np.inf, -5.0, -np.inf], SamplingParams(), {2}),
    "one_hot": ([0.0, 1e30, 0.0], SamplingParams(), {1}),
    "lowest": ([-1e38, -3e38, -3e38], SamplingParams(), {0}),
    "no_finite_logit": ([-np.inf, -np.inf], SamplingParams(), {-1}),
    "no_finite_logit_filtered": ([-np.inf, -np.inf], SamplingParams(top_k=1, top_p=0.5), {-1}),
    "nan_is_never_drawn": ([np.nan, 1.0, np.nan, 1.0], SamplingParams(top_p=0.99), {1, 3}),
    "nan_is_never_the_best": ([np.nan, 1.0, 2.0], SamplingParams(temperature=0), {2}),
    "only_nan": ([np.nan, np.nan], SamplingParams(), {-1}),
    "only_nan_and_a_bias": ([np.nan, np.nan], SamplingParams(logit_bias={1: 5.0}, min_tokens=2), {-1}),
    "only_nan_greedy": ([np.nan, np.nan], SamplingParams(temperature=0), {-1}),
    "infinite": ([0.0, np.inf, 1.0], SamplingParams(top_k=2), {1}),
    "penalty_overflows": ([3e38, 1.0], SamplingParams(repetition_penalty=0.5, top_p=0.9), {0}),
    "all_equal_top_k_keeps_ties": ([0.0] * 8, SamplingParams(top_k=2), set(range(8))),
    "all_equal_top_p_keeps_ties": ([0.0] * 8, SamplingParams(top_p=1e-9), set(range(8))),
    "top_k_above_vocab": ([0.0] * 8, SamplingParams(top_k=10**9), set(range(8))),
    "top_k_above_finite": ([0.0, 0.0, -np.inf, -np.inf], SamplingParams(top_k=3), {0, 1}),
    "top_k_minus_one_keeps_all": ([0.0] * 8, SamplingParams(top_k=-1), set(range(8))),
    "top_p_tiny": ([0.0, 0.1, 0.05], SamplingParams(top_p=1e-9), {1}),
    "cold": ([0.0, 0.1, 0.05], SamplingParams(temperature=1e-4), {1}),
    "cold_and_huge": ([1e30, -1e30, 1e29], SamplingParams(temperature=1e-4), {0}),
    "nearly_zero_is_greedy": ([0.0, 1e-7], SamplingParams(temperature=1e-9), {1}),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_logits_give_an_allowed_token(name):
    logits, params, allowed = EXTREMES[name]
    num_rows, vocab_size = 64, 1 if name == "one_token" else 8  # the same width where possible: fewer compilations
    padded = np.full((num_rows, vocab_size), -np.inf, np.float32)
    padded[:, : len(logits)] = logits
    rows = [dataclasses.replace(params, seed=seed) for seed in range(num_rows)]
    assert set(tokens_of(padded, *rows)) == allowed


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=lambda d: d.__name__)
def test_half_precision_logits_are_cast_to_float32(dtype):
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 3, (2, 500)), dtype)
    params = SamplingParams(seed=3, top_k=100, top_p=0.9, logprobs=2), SamplingParams(temperature=0)
    rows = rows_of(*params, vocab_size=500)
    low, high = (run_sample(x, rows, jnp.zeros(2, jnp.int32)) for x in (logits, logits.astype(jnp.float32)))
    for got, want in zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True):
        np.testing.assert_array_equal(got, want)


def test_logprobs_are_those_of_the_raw_logits():
    logits = np.random.default_rng(3).normal(0, 3, (2, 50)).astype(np.float32)
    logits[0, 4] = -np.inf
    params = SamplingParams(seed=1, logprobs=3, temperature=0.1, logit_bias={9: 100.0}), SamplingParams(temperature=0)
    got = run_sample(logits, rows_of(*params, vocab_size=50), jnp.zeros(2, jnp.int32))
    want = np.log(np.stack([softmax(row) for row in logits.astype(np.float64)]) + 1e-300)
    order = np.argsort(-logits, axis=-1)[:, : sampling.MAX_LOGPROBS]
    assert got.token.tolist() == [9, order[1, 0]]
    assert got.rank.tolist() == [1 + (logits[0] > logits[0, 9]).sum(), 1]
    np.testing.assert_array_equal(got.top_ids, order)
    np.testing.assert_allclose(got.top_logprobs, np.take_along_axis(want, order, -1), atol=1e-5)
    np.testing.assert_allclose(got.logprob, [want[0, 9], want[1, order[1, 0]]], atol=1e-5)


def test_logprobs_zero_reports_only_the_sampled_token():
    rows = rows_of(SamplingParams(temperature=0, logprobs=0), vocab_size=3)
    got = run_sample(jnp.asarray([[0.0, 1.0, -jnp.inf]]), rows, jnp.zeros(1, jnp.int32))
    assert got.top_ids.shape == got.top_logprobs.shape == (1, 0)
    np.testing.assert_allclose(got.logprob, [np.log(np.e / (1 + np.e))], rtol=1e-6)


def test_logprob_of_a_row_without_a_finite_logit_is_minus_infinity():
    rows = rows_of(SamplingParams(logprobs=2), vocab_size=3)
    got = run_sample(jnp.full((1, 3), -jnp.inf), rows, jnp.zeros(1, jnp.int32))
    assert got.logprob.tolist() == [-np.inf] and got.top_logprobs.tolist() == [[-np.inf] * 3]


def test_infinite_logit_has_all_the_probability():
    rows = rows_of(SamplingParams(logprobs=2), vocab_size=3)
    got = run_sample(jnp.asarray([[0.0, jnp.inf, jnp.nan]]), rows, jnp.zeros(1, jnp.int32))
    assert got.token.tolist() == [1] and got.logprob.tolist() == [0.0] and got.top_ids[0, 0] == 1


def test_end_and_stop_tokens_are_banned_before_min_tokens_and_then_finish():
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1])
    ignoring = SamplingParams(temperature=0, min_tokens=2, ignore_eos=True)
    logits = [[0.0, 5.0, 9.0, 1.0]] * 2
    rows = rows_of(params, ignoring, vocab_size=4)
    assert tokens_of(logits, params, ignoring, step=1) == [3, EOS]
    assert tokens_of(logits, params, ignoring, step=2) == [EOS, EOS]
    for token, want in [(EOS, [True, False]), (1, [True, False]), (3, [False, False])]:
        assert finished_by_id(rows, jnp.full(2, token)).tolist() == want


def test_stop_ids_are_padded_to_a_few_widths():
    few = rows_of(SamplingParams(stop_token_ids=[5, 4, EOS]), SamplingParams(ignore_eos=True), vocab_size=9)
    assert few.stop_ids.tolist() == [[2, 4, 5] + [-1] * 5, [-1] * 8]
    many = rows_of(SamplingParams(stop_token_ids=range(9)), vocab_size=9)
    assert many.stop_ids.tolist() == [[*range(9)] + [-1] * 7]


def test_update_counts_the_tokens_of_active_rows_only():
    rows = rows_of(*[SamplingParams(presence_penalty=1.0)] * 3, vocab_size=4)
    rows = update(rows, jnp.asarray([1, 2, 3]), jnp.asarray([True, False, True]))
    rows = update(rows, jnp.asarray([1, 2, 0]), jnp.asarray([True, True, False]))
    assert rows.output_counts.tolist() == [[0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_arrays_that_no_row_uses_are_none():
    rows = rows_of(SamplingParams(temperature=0, top_k=3, top_p=0.5), vocab_size=4)
    assert (rows.greedy, rows.truncates, rows.num_logprobs) == (True, False, None)
    assert (rows.min_tokens, rows.logit_bias, rows.prompt_seen, rows.output_counts) == (None, None, None, None)
    assert update(rows, jnp.zeros(1, jnp.int32), jnp.ones(1, bool)) is rows
    assert rows_of(SamplingParams(frequency_penalty=1.0), vocab_size=4).prompt_seen is None


REFUSED = {  # name: (fields, the whole message)
    "n": ({"n": 0}, "n must be an integer from 1 to 10000, got 0; use 1 for one continuation"),
    "prompt_logprobs": (
        {"prompt_logprobs": 21},
        "prompt_logprobs must be an integer from 0 to 20, got 21; use None for no log-probabilities",
    ),
    "temperature": (
        {"temperature": -0.5},
        "temperature must be a finite number >= 0, got -0.5; use 0 for greedy, 0.7 to 1 for sampling",
    ),
    "temperature_nan": (
        {"temperature": float("nan")},
        "temperature must be a finite number >= 0, got nan; use 0 for greedy, 0.7 to 1 for sampling",
    ),
    "temperature_infinite": (
        {"temperature": float("inf")},
        "temperature must be a finite number >= 0, got inf; use 0 for greedy, 0.7 to 1 for sampling",
    ),
    "temperature_text": (
        {"temperature": "hot"},
        "temperature must be a finite number >= 0, got 'hot'; use 0 for greedy, 0.7 to 1 for sampling",
    ),
    "top_p_zero": ({"top_p": 0}, "top_p must be a number in (0, 1], got 0; use 1 to keep all tokens"),
    "top_p_above_one": ({"top_p": 1.5}, "top_p must be a number in (0, 1], got 1.5; use 1 to keep all tokens"),
    "min_p": ({"min_p": -0.1}, "min_p must be a number in [0, 1], got -0.1; use 0 to keep all tokens"),
    "presence": ({"presence_penalty": 3}, "presence_penalty must be a number in [-2, 2], got 3; use 0 for none"),
    "frequency": ({"frequency_penalty": -3}, "frequency_penalty must be a number in [-2, 2], got -3; use 0 for none"),
    "repetition": (
        {"repetition_penalty": 0},
        "repetition_penalty must be a number in (0, 1000], got 0; use 1 for none",
    ),
    "top_k": ({"top_k": -2}, "top_k must be an integer >= -1, got -2; use 0 to keep all tokens"),
    "top_k_float": ({"top_k": 1.5}, "top_k must be an integer >= -1, got 1.5; use 0 to keep all tokens"),
    "top_k_bool": ({"top_k": True}, "top_k must be an integer >= -1, got True; use 0 to keep all tokens"),
    "max_tokens": (
        {"max_tokens": 0},
        "max_tokens must be an integer from 1 to 2147483647, got 0; use None for as many as the context allows",
    ),
    "min_tokens": ({"min_tokens": -1}, "min_tokens must be an integer >= 0, got -1; use 0 for no minimum"),
    "min_above_max": (
        {"min_tokens": 9, "max_tokens": 5},
        "min_tokens must be at most max_tokens, got 9 and 5; lower min_tokens or raise max_tokens",
    ),
    "logprobs": (
        {"logprobs": 21},
        "logprobs must be an integer from 0 to 20, got 21; use None for no log-probabilities",
    ),
    "seed": (
        {"seed": -2},
        "seed must be an integer from 0 to 18446744073709551615, got -2; use None to let the engine choose a seed",
    ),
    "ignore_eos": ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1; use False to end at eos"),
    "stop_kind": ({"stop": 5}, "stop must be a string or a list of strings, got 5"),
    "stop_array": ({"stop": np.array(3)}, "stop must be a string or a list of strings, got 3"),
    "seed_float": (
        {"seed": -1.0},
        "seed must be an integer from 0 to 18446744073709551615, got -1.0; use None to let the engine choose a seed",
    ),
    "stop_mapping": ({"stop": {"a": 1}}, "stop must be a string or a list of strings, got {'a': 1}"),
    "stop_bytes": ({"stop": b"a"}, "stop must be a string or a list of strings, got b'a'"),
    "stop_token_ids_kind": ({"stop_token_ids": 5}, "stop_token_ids must be a list of token ids, got 5"),
    "stop_token_ids_text": ({"stop_token_ids": "ab"}, "stop_token_ids must be a list of token ids, got 'ab'"),
    "logit_bias_kind": ({"logit_bias": 5}, "logit_bias must be a mapping from token ids to numbers, got 5"),
    "logit_bias_ids": ({"logit_bias": [1]}, "logit_bias must be a mapping from token ids to numbers, got [1]"),
    "logit_bias_text": ({"logit_bias": "ab"}, "logit_bias must be a mapping from token ids to numbers, got 'ab'"),
    "stop": ({"stop": ["a", ""]}, "stop must contain non-empty strings, got ''; omit it, or use stop_token_ids"),
    "stop_id": (
        {"stop_token_ids": [-1]},
        "stop_token_ids must be an integer from 0 to 2147483647, got -1; use ids from the model's vocabulary",
    ),
    "bias_key": (
        {"logit_bias": {"a": 1.0}},
        "logit_bias must be an integer from 0 to 2147483647, got 'a'; its keys are token ids",
    ),
    "bias_value": (
        {"logit_bias": {3: float("-inf")}},
        "logit_bias of token 3 must be a number in [-100, 100], got -inf; -100 practically bans a token",
    ),
}


@pytest.mark.parametrize("array", [np.array, jnp.array])
def test_lists_may_be_arrays(array):
    want = SamplingParams(stop_token_ids=[1, 2], logit_bias={1: 2.0, 3: 4.0})
    assert SamplingParams(stop_token_ids=array([1, 2]), logit_bias=array([[1, 2], [3, 4]])) == want
    assert SamplingParams(stop_token_ids=[1, 2], logit_bias=[(1, 2), (3, 4)]) == want


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_out_of_range_is_refused(name):
    fields, message = REFUSED[name]
    with pytest.raises(ValueError) as refusal:
        SamplingParams(**fields)
    assert str(refusal.value) == message


@pytest.mark.parametrize("name", ["skip_special_tokens", "include_stop_str_in_output", "spaces_between_special_tokens"])
def test_a_flag_must_be_a_truth_value(name):
    assert getattr(SamplingParams(**{name: False}), name) is False
    with pytest.raises(ValueError, match=f"{name} must be True or False, got None; "):
        SamplingParams(**{name: None})


def test_no_stop_may_be_none_as_in_vllm():
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


ELSEWHERE = {
    "best_of": "SamplingParams has no best_of: use n, and take the continuation with the largest cumulative_logprob",
    "bad_words": "SamplingParams has no bad_words: use logit_bias of -100 for token ids",
    "guided_decoding": "SamplingParams has no guided_decoding: use structured_outputs",
    "use_beam_search": "SamplingParams has no use_beam_search: use BeamSearchParams",
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_parameters_of_vllm_that_are_missing_say_what_to_use(name):
    with pytest.raises(ValueError, match=ELSEWHERE[name]):
        SamplingParams(**{name: 1})
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=1)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(
        ValueError, match=r"stop_token_ids must contain ids from 0 to 9, the model's vocabulary, got \[10\]"
    ):
        check_token_ids(SamplingParams(stop_token_ids=[3, 10]), vocab_size=10)
    with pytest.raises(ValueError, match=r"logit_bias must contain ids from 0 to 9, .* got \[11, 12\]; use ids from"):
        rows_of(SamplingParams(logit_bias={12: 1.0, 11: 1.0}), vocab_size=10)


def test_batches_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="one entry per request, got 1, 2 and 1; give each prompt its own"):
        rows_of(SamplingParams(), vocab_size=3, prompt_ids=[[0], [1]])


def test_equal_params_compare_and_hash_equal():
    one = SamplingParams(stop="END", stop_token_ids=[4, 5], logit_bias={9: 1, 3: -2.5})
    same = SamplingParams(stop=["END"], stop_token_ids=(4, 5), logit_bias=((3, -2.5), (9, 1.0)))
    assert one == same and hash(one) == hash(same)
    assert (one.stop, one.stop_token_ids, one.logit_bias) == (("END",), (4, 5), ((3, -2.5), (9, 1.0)))
    assert dataclasses.replace(one, seed=1).logit_bias == one.logit_bias


def test_samples_are_the_same_with_x64_enabled():
    random = np.random.default_rng(3)
    logits = random.normal(size=(1, 300)).astype(np.float32)
    for params in (
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.9, top_k=50),
        SamplingParams(seed=3, min_p=0.1),
    ):
        want = [tokens_of(logits, params, step=step) for step in range(5)]
        with jax.enable_x64(True):
            assert [tokens_of(jnp.asarray(logits), params, step=step) for step in range(5)] == want
