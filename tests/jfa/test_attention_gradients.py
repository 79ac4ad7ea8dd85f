"""Gradients on every backend, compared with the oracle's, which are checked by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

import jfa
from jfa_bench.truth import oracle
from jfa_bench.truth.cases import CASES, truth
from jfa_bench.truth.numerics import assert_within, limit

TILES = {
    "reference": None,
    "xla": jfa.BlockConfig(block_q=16, block_kv=16, widen=True),
    "triton": jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1),
}
PRODUCTS = 3  # consecutive products: the scores, their cotangent and the gradient
# interpreted kernels take seconds each: combinations of options are tested on the cheaper backends
ON_TRITON = (
    "more_queries_than_keys",
    "gqa",
    "head_dim_40",
    "both_windows",
    "cached_chunk",
    "lengths_with_empty_rows",
    "soft_cap",
    "negative_scale",
    "bias",
    "bias_per_key",
    "bias_per_head",
    "mask_per_head",
    "wide_values",
    "sinks_and_window",
    "alibi",
    "segments_window_and_lengths",
    "dropout",
    "everything",
)
# in these cases, the scores are too large for the rounded formula to be meaningful, or all weights are equal
WITHOUT = ("steep_scale",)
# cases with an option that no other of these has; all cases run with -m exhaustive, their second dtype in the longest
# run
QUICK = {
    "xla": set(ON_TRITON) | {"offset_and_window", "narrow_values", "broadcast_dropout", "one_query_each", "mask"},
    "triton": {
        *("gqa", "head_dim_40", "both_windows", "cached_chunk", "lengths_with_empty_rows", "soft_cap", "bias_per_key"),
        *("bias_per_head", "mask_per_head", "wide_values", "sinks_and_window", "segments_window_and_lengths"),
        *("dropout", "everything"),
    },
    "reference": {"gqa", "everything"},
}


def dtypes_of(i: int, backend: str) -> tuple[str, ...]:
    """The dtypes of the case with this number; quick runs use the first."""
    if backend == "reference":
        return ("float32",)
    return ("float32", ("bfloat16", "float16")[i % 2])[i // 2 % 2 :]


def of_case(i: int, name: str, dtype: str, backend: str):
    is_first = dtype == dtypes_of(i, backend)[0]
    return run(name, dtype, backend, quick=name in QUICK[backend] and is_first, soak=not is_first)


RUNS = [
    of_case(i, name, dtype, backend)
    for i, name in enumerate(name for name in CASES if name not in WITHOUT)
    for backend in TILES
    for dtype in dtypes_of(i, backend)
    if backend != "triton" or name in ON_TRITON
    # test_export.py compares the float32 gradients of xla in every case
    if backend != "xla" or dtype != "float32" or name in QUICK["xla"]
]


def gradients(name, dtype, backend, **more):
    """The gradients of sum(out * d_out) + sum(lse * d_lse), by the names in cases.GRADIENTS."""
    known = truth(name, dtype)
    arrays = dict(zip(("query", "key", "value"), known.arrays, strict=True))
    arrays |= {key: known.options[key] for key in ("bias", "sinks", "alibi_slopes") if key in known.options}
    options = {key: x for key, x in known.options.items() if key not in arrays}
    options |= dict(implementation=backend, config=TILES[backend], return_residual=True) | more

    def loss(arrays):
        out, lse = jfa.dot_product_attention(**arrays, **options)
        seen = jnp.where(jnp.isfinite(lse), lse * known.d_lse, 0.0)
        return (out.astype(jnp.float32) * known.d_out.astype(jnp.float32)).sum() + seen.sum()

    return jax.jit(jax.grad(loss))(arrays)


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_gradients_agree_with_the_oracle(name, dtype, backend):
    check(gradients(name, dtype, backend), name, dtype)


@pytest.mark.parametrize("name", ["gqa", "cached_chunk", "both_windows", "dropout"])
def test_gradients_from_bfloat16_products(name):
    tiles = jfa.BlockConfig(block_q=8, block_kv=16)
    check(gradients(name, "bfloat16", "xla", config=tiles), name, "bfloat16")


@pytest.mark.parametrize("name", sorted(QUICK["xla"]))
def test_gradients_of_some_heads_at_a_time(name):
    config = jfa.BlockConfig(block_q=16, block_kv=24, widen=True, heads=2)
    check(gradients(name, "float32", "xla", config=config), name, "float32")


def check(got, name, dtype):
    wanted = truth(name, dtype).gradients
    assert set(got) == set(wanted)
    for argument, (want, plain) in wanted.items():
        assert got[argument].shape == want.shape
        assert_within(got[argument], want, limit(want, plain, jnp.dtype(dtype), products=PRODUCTS))


@pytest.mark.parametrize("argument", ["q", "k", "v", "bias", "sinks", "alibi_slopes"])
def test_gradients_of_the_oracle_agree_with_finite_differences(argument):
    known = truth("everything", "float32")
    q, k, v = (np.asarray(x, np.float64) for x in known.arrays)
    inputs = dict(known.named, q=q, k=k, v=v)
    x = np.asarray(inputs[argument], np.float64)
    step = np.random.default_rng(0).standard_normal(x.shape)

    def loss(size):
        out, lse = oracle.attention(**(inputs | {argument: x + size * step}))
        return (out * known.d_out).sum() + np.where(np.isfinite(lse), lse * known.d_lse, 0.0).sum()

    width = 1e-5
    slope = (loss(width) - loss(-width)) / (2 * width)
    gradient = oracle.gradients(**inputs, d_out=known.d_out, d_lse=known.d_lse)[argument]
    np.testing.assert_allclose((gradient * step).sum(), slope, rtol=1e-6)


def test_tokens_past_the_lengths_do_not_change_gradients():
    clean = truth("lengths_with_empty_rows", "float32")
    dirty = [np.array(x) for x in clean.arrays]
    for row in range(3):
        dirty[0][row, clean.options["query_seq_lengths"][row] :] = np.nan
        dirty[1][row, clean.options["key_value_seq_lengths"][row] :] = np.nan
        dirty[2][row, clean.options["key_value_seq_lengths"][row] :] = np.nan
    for backend, config in TILES.items():

        def loss(*arrays, backend=backend, config=config):
            return jfa.dot_product_attention(*arrays, implementation=backend, config=config, **clean.options).sum()

        for got, want in zip(
            jax.grad(loss, argnums=(0, 1, 2))(*dirty), jax.grad(loss, argnums=(0, 1, 2))(*clean.arrays), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_the_gradient_of_a_single_head_bias():
    q, kv = jnp.ones((1, 20, 1, 16)), jnp.ones((1, 37, 1, 16))
    options = dict(implementation="triton", config=TILES["triton"])
    grad = jax.grad(lambda bias: jfa.dot_product_attention(q, kv, kv, bias, **options).sum())
    # equal values: no weight matters
    np.testing.assert_allclose(grad(jnp.zeros((1, 1, 20, 37))), 0, atol=1e-6)


def test_the_gradient_of_one_query_per_row_that_several_programs_computed():
    q, k, v = (np.random.default_rng(0).normal(size=(2, t, h, 16)).astype("f4") for t, h in ((1, 4), (40, 2), (40, 2)))
    split = jfa.PagedConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1, num_splits=3)
    options = dict(is_causal=True, query_offset=[39, 20], key_value_seq_lengths=[40, 21], return_residual=True)

    def loss(arrays, **how):
        out, lse = jfa.dot_product_attention(*arrays, **options, **how)
        return (out**2).sum() + lse.sum()

    got = jax.grad(loss)((q, k, v), implementation="triton", config=split)
    for one, want in zip(got, jax.grad(loss)((q, k, v), implementation="reference"), strict=True):
        np.testing.assert_allclose(one, want, atol=1e-5)


def test_float16_gradients_have_no_intermediate_overflow():
    random = np.random.default_rng(0)
    x, d_out = (jnp.asarray(random.standard_normal((1, 20, 1, 64)), jnp.float32) for _ in range(2))
    arrays = [(factor * x).astype(jnp.float16) for factor in (1, 0.1, 100)]

    def gradients(backend):
        options = dict(implementation=backend, config=TILES[backend])
        _, pull = jax.vjp(lambda *a: jfa.dot_product_attention(*a, **options), *arrays)
        return pull((300 * d_out).astype(jnp.float16))

    for got, want in zip(gradients("triton"), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=0.02 * float(jnp.abs(want).max()))


def test_a_nan_bias_under_a_mask_has_no_effect():
    q, k, v = truth("mask", "float32").arrays
    mask = jnp.ones((1, 1, 20, 37), bool).at[..., 3].set(False).at[:, :, 2].set(False)
    bias = jnp.where(mask, 0.1, jnp.nan)

    def gradients(backend):
        options = dict(mask=mask, logits_soft_cap=2.0, implementation=backend, config=TILES[backend])
        return jax.grad(lambda *a: jfa.dot_product_attention(*a, **options).sum(), argnums=(0, 1, 2, 3))(q, k, v, bias)

    for backend in ("reference", "xla"):
        assert all(jnp.isfinite(x).all() for x in gradients(backend))


def test_memory_is_linear_in_the_sequence_length():
    """Forward and backward pass at length 32768 within 4 GB; the scores of 8 heads would take 34 GB."""
    row = jax.ShapeDtypeStruct((1, 32768, 8, 64), jnp.float32)

    def loss(q, k, v):
        return jfa.dot_product_attention(q, k, v, is_causal=True, implementation="xla").sum()

    used = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(row, row, row).compile().memory_analysis()
    assert used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes < 4e9


def test_gradients_with_float64_as_the_default_dtype():
    with jax.enable_x64(True):
        got = gradients("causal", "float32", "xla")
    for argument, want in gradients("causal", "float32", "xla").items():
        assert got[argument].dtype == jnp.float32
        np.testing.assert_allclose(got[argument], want, atol=1e-6)
