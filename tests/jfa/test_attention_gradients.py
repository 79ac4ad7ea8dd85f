"""Gradients: the reference by finite differences of the oracle, the kernels by the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from attention_cases import CASES, truth
from numerics import assert_within

import jfa

GRADIENT_CASES = [
    "causal",
    "more_queries_than_keys",
    "gqa",
    "both_windows",
    "cached_chunk",
    "lengths_with_empty_rows",
    "soft_cap",
    "bias",
    "bias_per_key",
    "bias_per_head",
    "mask_per_head",
]


def gradients(name, dtype, backend, config):
    known = truth(name, dtype)
    options = dict(known.options)
    bias = options.pop("bias", None)
    random = np.random.default_rng(5)
    d_out = jnp.asarray(random.standard_normal(known.out.shape), jnp.float32)
    d_lse = jnp.asarray(random.standard_normal(known.lse.shape), jnp.float32)

    def loss(q, k, v, bias):
        out, lse = jfa.dot_product_attention(
            q, k, v, bias, implementation=backend, config=config, return_residual=True, **options
        )
        return (out * d_out).sum() + jnp.where(jnp.isfinite(lse), lse * d_lse, 0.0).sum()

    arrays = (*known.arrays, bias)
    which = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return jax.jit(jax.grad(loss, argnums=which))(*arrays)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_xla_gradients_are_those_of_the_reference(name):
    want = gradients(name, "float32", "reference", None)
    got = gradients(name, "float32", "xla", jfa.BlockConfig(block_q=16, block_kv=16, widen=True))
    for x, y in zip(got, want, strict=True):
        assert_within(x, y, 32 * float(jnp.finfo(jnp.float32).eps) * max(1.0, float(jnp.abs(y).max())))


def test_bfloat16_gradients_stay_within_the_rounding_of_their_products():
    want = gradients("gqa", "float32", "reference", None)
    got = gradients("gqa", "bfloat16", "xla", jfa.BlockConfig(block_q=16, block_kv=16))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.bfloat16
        assert_within(x, y, 4 * float(jnp.finfo(jnp.bfloat16).eps) * max(1.0, float(jnp.abs(y).max())))


def test_the_triton_forward_is_differentiable():
    want = gradients("gqa", "float32", "reference", None)
    got = gradients("gqa", "float32", "triton", jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1))
    for x, y in zip(got, want, strict=True):
        assert_within(x, y, 32 * float(jnp.finfo(jnp.float32).eps) * max(1.0, float(jnp.abs(y).max())))


def test_reference_gradient_is_the_slope_of_the_oracle():
    q, k, v = (np.asarray(x, np.float64) for x in truth("gqa", "float32").arrays)
    [dq, *_] = jax.grad(lambda q: jfa.dot_product_attention(q, k, v, is_causal=True, implementation="reference").sum())(
        jnp.asarray(q, jnp.float32)
    )[None]
    step = np.zeros_like(q)
    at, width = (1, 17, 3, 5), 1e-5
    step[at] = width
    options = dict(scale=CASES["gqa"].shape[-1] ** -0.5, causal=True)
    slope = oracle.attention(q + step, k, v, **options)[0].sum() - oracle.attention(q - step, k, v, **options)[0].sum()
    np.testing.assert_allclose(dq[at], slope / (2 * width), rtol=1e-4)


def test_forward_mode_works_on_the_reference():
    q, k, v = truth("causal", "float32").arrays
    direction = jnp.ones_like(q)

    def attend(q):
        return jfa.dot_product_attention(q, k, v, is_causal=True, implementation="reference")

    _, tangent = jax.jvp(attend, (q,), (direction,))
    _, pull = jax.vjp(attend, q)
    np.testing.assert_allclose(tangent.sum(), (pull(jnp.ones_like(q))[0] * direction).sum(), rtol=1e-4)


def test_nothing_past_the_lengths_reaches_a_gradient():
    clean = truth("lengths_with_empty_rows", "float32")
    dirty = [np.array(x) for x in clean.arrays]
    for row in range(3):
        dirty[0][row, clean.options["query_seq_lengths"][row] :] = np.nan
        dirty[1][row, clean.options["key_value_seq_lengths"][row] :] = np.nan
        dirty[2][row, clean.options["key_value_seq_lengths"][row] :] = np.nan
    for backend, config in (("reference", None), ("xla", jfa.BlockConfig(block_q=16, block_kv=16, widen=True))):

        def loss(*arrays, backend=backend, config=config):
            return jfa.dot_product_attention(*arrays, implementation=backend, config=config, **clean.options).sum()

        for got, want in zip(
            jax.grad(loss, argnums=(0, 1, 2))(*dirty), jax.grad(loss, argnums=(0, 1, 2))(*clean.arrays), strict=True
        ):
            np.testing.assert_array_equal(got, want)


def test_memory_is_linear_in_the_length():
    """Forward and backward at 32768 within 4 GB; the scores of 8 heads alone would be 34 GB."""
    row = jax.ShapeDtypeStruct((1, 32768, 8, 64), jnp.float32)

    def loss(q, k, v):
        return jfa.dot_product_attention(q, k, v, is_causal=True, implementation="xla").sum()

    used = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(row, row, row).compile().memory_analysis()
    assert used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes < 4e9


def test_gradients_where_the_default_is_float64():
    config = jfa.BlockConfig(block_q=16, block_kv=16, widen=True)
    with jax.enable_x64(True):
        got = gradients("causal", "float32", "xla", config)
    for x, y in zip(got, gradients("causal", "float32", "xla", config), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=1e-6)
