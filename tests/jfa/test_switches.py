"""The ops, the caches and decoders under JAX's global switches that check or change what arithmetic means."""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import run
from tiny_model import sharp_decoder, tiny_config

import jfa
from jfa import quant
from jfa_models import LLM, LanguageModel, SamplingParams

B, T, HQ, HKV, D = 2, 12, 4, 2, 16
IMPLEMENTATIONS = ("reference", "xla", "triton")


def no_promotion():
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_rank_promotion("raise"))
    stack.enter_context(jax.numpy_dtype_promotion("strict"))
    return stack


SWITCHES = {
    "no_promotion": no_promotion,
    "x64": lambda: jax.enable_x64(True),
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "leaks": jax.checking_leaks,
    "nans": lambda: jax.debug_nans(True),
    "highest": lambda: jax.default_matmul_precision("highest"),
}
CASES = [
    run(switch, implementation, quick=switch == "no_promotion")
    for switch in SWITCHES
    for implementation in IMPLEMENTATIONS
]


def random(seed, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def options():
    """As many options as go together; a dropout key of the implementation in force."""
    return dict(
        is_causal=True,
        local_window_size=(6, 0),
        bias=random(3, 1, HQ, T, T, dtype=jnp.float32),
        sinks=random(4, HQ, dtype=jnp.float32),
        alibi_slopes=jnp.abs(random(5, HQ, dtype=jnp.float32)),
        query_seq_lengths=jnp.array([T, 7], jnp.int32),
        key_value_seq_lengths=jnp.array([T, 7], jnp.int32),
        query_segment_ids=jnp.zeros((B, T), jnp.int32),
        key_value_segment_ids=jnp.zeros((B, T), jnp.int32),
        query_offset=jnp.array([0, 1], jnp.int32),
        logits_soft_cap=5.0,
    )


@functools.cache
def without(computed, *args):
    """computed(*args) under no switch: once for all switches."""
    return computed(*args)


def attention_and_gradients(implementation, default_keys=False):
    """default_keys: with a dropout key of the implementation in force, not always of the same."""
    q, k, v = random(0, B, T, HQ, D), random(1, B, T, HKV, D), random(2, B, T, HKV, D)
    given = options()

    dropout_key = jax.random.key(1, impl=None if default_keys else "threefry2x32")

    def loss(q, k, v, bias, sinks, slopes):
        traced = given | dict(bias=bias, sinks=sinks, alibi_slopes=slopes)
        out, lse = jfa.dot_product_attention(
            q,
            k,
            v,
            implementation=implementation,
            return_residual=True,
            dropout_rate=0.1,
            dropout_key=dropout_key,
            **traced,
        )
        return out.astype(jnp.float32).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum()

    arrays = (q, k, v, given["bias"], given["sinks"], given["alibi_slopes"])
    return jax.block_until_ready(jax.value_and_grad(loss, argnums=tuple(range(6)))(*arrays))


@pytest.mark.parametrize(("switch", "implementation"), CASES)
def test_attention_and_its_gradients(switch, implementation):
    want = without(attention_and_gradients, implementation)
    with SWITCHES[switch]():
        got = attention_and_gradients(implementation)
        if switch == "rbg":  # the keys of the others are the same as above
            found = jax.tree.leaves(attention_and_gradients(implementation, default_keys=True))
            assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found)
    if switch != "highest":
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
            np.testing.assert_allclose(one, other, atol=0.03 * np.abs(other).max())


def block_sparse_attention_and_gradients(implementation):
    q, k, v = random(0, B, T, HQ, D), random(1, B, T, HKV, D), random(2, B, T, HKV, D)
    given = {key: x for key, x in options().items() if "window" not in key and "segment" not in key and key != "mask"}

    def loss(q, k, v, bias, sinks, slopes):
        mask = jfa.BlockMask.top_k(q, k, 1, block_q=16, block_kv=16)
        traced = given | dict(bias=bias, sinks=sinks, alibi_slopes=slopes)
        out = jfa.block_sparse_attention(q, k, v, mask, implementation=implementation, **traced)
        return out.astype(jnp.float32).sum() + mask.to_array().sum(dtype=jnp.float32)

    arrays = (q, k, v, given["bias"], given["sinks"], given["alibi_slopes"])
    return jax.block_until_ready(jax.value_and_grad(loss, argnums=tuple(range(6)))(*arrays))


@pytest.mark.parametrize(
    ("switch", "implementation"),
    [run(*case.values, quick=case.values == ("no_promotion", "xla"), soak=True) for case in CASES],
)
def test_block_sparse_attention_and_its_gradients(switch, implementation):
    want = without(block_sparse_attention_and_gradients, implementation)
    with SWITCHES[switch]():
        got = block_sparse_attention_and_gradients(implementation)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, atol=0.03 * np.abs(other).max())


def attention_over_pages(implementation, kind):
    cache = jfa.PagedKVCache.create(
        num_layers=1,
        num_pages=9,
        page_size=4,
        batch=2,
        pages_per_seq=4,
        num_kv_heads=HKV,
        head_dim=D,
        dtype="float32",
        kv_dtype=kind,
    )
    cache = dataclasses.replace(cache, page_tables=(jnp.arange(1, 9, dtype=jnp.int32).reshape(2, 4),))
    new = random(1, 2, 5, HKV, D, dtype=jnp.float32), random(2, 2, 5, HKV, D, dtype=jnp.float32)
    cache = cache.write(0, *new).advance(jnp.array([5, 3], jnp.int32))
    common = dict(kv_len=cache.kv_len, implementation=implementation, logits_soft_cap=4.0, **cache.arguments(0))
    q = cache.rotated(random(0, 6, HQ, D, dtype=jnp.float32))
    query_start = jnp.array([0, 4, 6], jnp.int32)
    out = jfa.paged_decode_attention(q[:2], sinks=random(4, HQ, dtype=jnp.float32), **common)
    return jax.device_get((out, jfa.ragged_paged_attention(q, query_start=query_start, **common)))


@pytest.mark.parametrize(("switch", "implementation"), CASES)
@pytest.mark.parametrize("kind", [None, "int4"])
def test_attention_over_pages(switch, implementation, kind):
    want = without(attention_over_pages, implementation, kind)
    with SWITCHES[switch]():
        got = attention_over_pages(implementation, kind)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=1e-2)


@functools.cache
def tiny():
    decoder = sharp_decoder(tiny_config(num_layers=1, context_length=64))
    return LanguageModel(decoder=decoder, params=tuple(jax.tree.leaves(nnx.split(decoder)[1])))


def generation():
    model = tiny()
    params = SamplingParams(temperature=0.7, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1, max_tokens=4)
    llm = LLM(model, page_size=4, num_pages=40, max_num_seqs=2)
    results = [*model.generate([[70, 71, 72]], params), *llm.generate([[70, 71, 72]], params)]
    return [result.outputs[0].token_ids for result in results]


@pytest.mark.parametrize("switch", [run(switch, quick=switch == "no_promotion") for switch in SWITCHES])
def test_generation(switch):
    want = without(generation)
    with SWITCHES[switch]():
        assert generation() == want


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_infinities_of_masked_scores_stay_inside(implementation):
    """Without jit, under a switch that reports every infinity; a row without keys has one by contract: its residual."""
    q, pages = random(0, B, T, HQ, D), random(1, 5, 4, HKV, D)

    def attend(q):
        return jfa.dot_product_attention(q, q, q, is_causal=True, implementation=implementation)

    with jax.debug_infs(True):
        jax.block_until_ready(attend(q))
        if implementation != "reference":  # JAX differentiates the plain formula, one operation after the other
            jax.block_until_ready(jax.grad(lambda q: attend(q).astype(jnp.float32).sum())(q))
        table, kv_len = jnp.array([[1, 2], [3, 4]]), jnp.array([7, 2])
        jfa.paged_decode_attention(q[:, 0], pages, pages, table, kv_len, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_calls_of_equal_shapes_are_lowered_once(implementation):
    """As in the layers of a model, where tracing each of them takes most of the time of a start."""
    q, pages = random(0, B, T, HQ, D), random(1, 5, 4, HQ, D)
    weight = quant.quantize_weight(np.ones((D, D), np.float32), "int8")
    table, kv_len = jnp.array([[1, 2], [3, 4]]), jnp.array([7, 2])

    def layers(q):
        for _ in range(3):
            q = jfa.dot_product_attention(q, q, q, implementation=implementation)
            q = jfa.quantized_matmul(q, weight, implementation=implementation)
        return q.astype(jnp.float32).sum()

    def over_pages(q):
        for _ in range(3):
            q = jfa.paged_decode_attention(q, pages, pages, table, kv_len, implementation=implementation)
        return q

    text = jax.jit(jax.value_and_grad(layers)).lower(q).as_text() + jax.jit(over_pages).lower(q[:, 0]).as_text()
    # attention and product, forward and backward, and attention over pages
    assert len(re.findall(r"func private @(_run|_backward|_computed)(_\d+)?\(", text)) == 5
    assert len(re.findall(r"call @(_run|_backward|_computed)(_\d+)?\(", text)) == 15


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_compiled_op_transfers_nothing(implementation):
    q, k = random(0, B, T, HQ, D), random(1, B, T, HKV, D)

    @jax.jit
    def gradient(q, k):
        return jax.grad(lambda q: jfa.dot_product_attention(q, k, k, implementation=implementation).sum())(q)

    want = gradient(q, k)
    with jax.transfer_guard("disallow"):
        got = gradient(q, k)
    np.testing.assert_array_equal(got, want)
