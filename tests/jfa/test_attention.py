"""Oracle, reference, kernels: each case on every backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa
from jfa_bench.cases import CASES, truth
from jfa_bench.numerics import assert_within, limit

TILES = {
    "reference": None,
    "xla": jfa.BlockConfig(block_q=16, block_kv=16, widen=True),
    "triton": jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1),
}
# float16 and bfloat16 differ in rounding alone, so half of the cases run in each
DTYPES = {name: ("float32", ("bfloat16", "float16")[i % 2]) for i, name in enumerate(CASES)}
RUNS = [
    pytest.param(name, dtype, backend, id=f"{name}-{dtype}-{backend}")
    for name in CASES
    for dtype in DTYPES[name]
    for backend in TILES
]


def attend(name, dtype, backend, **more):
    known = truth(name, dtype)
    options = known.options | dict(implementation=backend, config=TILES[backend], return_residual=True) | more
    return jfa.dot_product_attention(*known.arrays, **options)


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle(name, dtype, backend):
    known = truth(name, dtype)
    out, lse = attend(name, dtype, backend)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["one_query_each", "cached_chunk", "gqa", "mask"])
def test_packed_heads_give_the_same(name, dtype):
    known = truth(name, dtype)
    out, lse = attend(name, dtype, "xla", config=jfa.BlockConfig(block_q=8, block_kv=16, widen=True, packed=True))
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize("backend", TILES)
def test_rows_without_keys_give_zeros_and_minus_infinity(backend):
    out, lse = attend("lengths_with_empty_rows", "float32", backend)
    assert not np.asarray(out)[0].any() and np.isneginf(np.asarray(lse)[0]).all()
    assert not np.asarray(out)[1, 7:].any() and not np.asarray(out)[2].any()


@pytest.mark.parametrize("backend", TILES)
def test_nothing_past_the_lengths_is_read(backend):
    clean = truth("lengths_with_empty_rows", "float32")
    q, k, v = (np.array(x) for x in clean.arrays)
    for row in range(3):
        q[row, clean.options["query_seq_lengths"][row] :] = np.nan
        k[row, clean.options["key_value_seq_lengths"][row] :] = np.nan
        v[row, clean.options["key_value_seq_lengths"][row] :] = np.inf
    options = clean.options | dict(implementation=backend, config=TILES[backend])
    out = jfa.dot_product_attention(q, k, v, **options)
    np.testing.assert_array_equal(out, jfa.dot_product_attention(*clean.arrays, **options))


@pytest.mark.parametrize("backend", TILES)
def test_float16_extremes_do_not_overflow_the_scores(backend):
    big = jnp.full((1, 20, 1, 16), 200.0, jnp.float16)  # a score is 200 * 200 * 16 / 4, above the largest float16
    out = jfa.dot_product_attention(big, big, big, implementation=backend, config=TILES[backend])
    np.testing.assert_array_equal(out, big)


@pytest.mark.parametrize("backend", TILES)
def test_bit_identical_on_repetition(backend):
    first, again = (attend("cached_chunk", "bfloat16", backend)[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("backend", TILES)
def test_no_batch_axis(backend):
    known = truth("gqa", "float32")
    q, k, v = (x[0] for x in known.arrays)
    options = dict(is_causal=True, implementation=backend, config=TILES[backend], return_residual=True)
    out, lse = jfa.dot_product_attention(q, k, v, **options)
    assert out.shape == q.shape and lse.shape == q.shape[:2]
    assert_within(out, known.out[0], limit(known.out, known.plain_out, out.dtype))


@pytest.mark.parametrize("backend", TILES)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=["no_rows", "no_queries", "no_keys"])
def test_empty_input(backend, shape):
    b, tq, tk = shape
    q, kv = jnp.ones((b, tq, 2, 16)), jnp.ones((b, tk, 2, 16))
    out, lse = jfa.dot_product_attention(q, kv, kv, implementation=backend, return_residual=True)
    assert out.shape == q.shape and not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 3, (5, 2)])
def test_means_what_jax_nn_means(is_causal, window):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, 24, h, 16)), jnp.float32) for h in (4, 2, 2))
    bias = jnp.asarray(random.standard_normal((1, 4, 24, 24)), jnp.float32)
    options = dict(is_causal=is_causal, local_window_size=window, key_value_seq_lengths=jnp.array([24, 20], jnp.int32))
    ours, our_lse = jfa.dot_product_attention(q, k, v, bias, return_residual=True, **options)
    theirs, their_lse = jax.nn.dot_product_attention(q, k, v, bias, return_residual=True, **options)
    seen = np.isfinite(np.asarray(our_lse))
    np.testing.assert_allclose(np.asarray(ours)[seen], np.asarray(theirs)[seen], atol=2e-6)
    np.testing.assert_allclose(np.asarray(our_lse)[seen], np.asarray(their_lse)[seen], atol=2e-6)


def test_chosen_on_a_cpu_is_xla_and_its_default_tiles_agree():
    known = truth("ragged_tiles", "bfloat16")
    out = jax.jit(lambda *arrays: jfa.dot_product_attention(*arrays))(*known.arrays)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))


def test_vmap_of_the_blockwise_op():
    random = np.random.default_rng(1)
    q = jnp.asarray(random.standard_normal((3, 2, 20, 2, 16)), jnp.float32)
    lengths = jnp.array([[20, 3], [7, 20], [1, 0]], jnp.int32)

    def attend_one(q, lengths):
        return jfa.dot_product_attention(q, q, q, key_value_seq_lengths=lengths, config=TILES["xla"])

    np.testing.assert_allclose(
        jax.vmap(attend_one)(q, lengths),
        jnp.stack([attend_one(*one) for one in zip(q, lengths, strict=True)]),
        atol=1e-6,
    )


@pytest.mark.parametrize("backend", TILES)
def test_where_the_default_is_float64(backend):
    with jax.enable_x64(True):
        out, lse = attend("cached_chunk", "float32", backend)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_array_equal(out, attend("cached_chunk", "float32", backend)[0])


def test_packed_heads_do_not_poison_each_other():
    key = jnp.ones((1, 9, 2, 16)).at[0, 3, 0].set(jnp.nan)  # key head 0, which query heads 0 and 1 read
    out = jfa.dot_product_attention(jnp.ones((1, 1, 4, 16)), key, jnp.ones((1, 9, 2, 16)))
    assert jnp.isnan(out).any((0, 1, 3)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", TILES)
def test_offsets_and_windows_beyond_all_keys(backend):
    x = truth("causal", "float32").arrays
    options = dict(implementation=backend, config=TILES[backend])
    far = jfa.dot_product_attention(*x, is_causal=True, query_offset=2**31 - 1, local_window_size=2**40, **options)
    np.testing.assert_array_equal(far, jfa.dot_product_attention(*x, query_offset=2**29 - 1, is_causal=True, **options))
    np.testing.assert_allclose(far, jfa.dot_product_attention(*x, **options), atol=1e-6)


@pytest.mark.parametrize("backend", TILES)
def test_numbers_may_be_arrays_of_jax(backend):
    known = truth("soft_cap", "float32")
    options = dict(is_causal=True, implementation=backend, config=TILES[backend], scale=jnp.float32(0.25))
    out = jfa.dot_product_attention(*known.arrays, logits_soft_cap=jnp.float32(2.0), **options)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
