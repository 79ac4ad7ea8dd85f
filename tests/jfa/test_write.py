"""Rotation and write as one kernel, against the rotation in jnp and the write of a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa
from jfa import quant, write_ops
from jfa_bench.proof import aot

HQ, HKV, D = 6, 2, 40


def new_tokens(n, dtype, *, half=D // 2):
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = (jax.random.normal(keys[0], (n, (HQ + 2 * HKV) * D)) * 3).astype(dtype).at[0, HQ * D : (HQ + 1) * D].set(0)
    angle = jax.random.normal(keys[1], (n, half)) * 4
    return qkv, jnp.cos(angle), jnp.sin(angle)


def rotated(qkv, cos, sin):
    """q, k, v [n, heads, D]."""
    heads, half = qkv.reshape(len(qkv), -1, D), cos.shape[1]
    a, b, rest = jnp.split(heads[:, : HQ + HKV].astype(jnp.float32), (half, 2 * half), axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    both = jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(qkv.dtype)
    return both[:, :HQ], both[:, HQ:], heads[:, HQ + HKV :]


def garbage(cache):
    """The cache with numbers everywhere, so that what must not be written is seen."""

    def fill(x):
        return quant.on_bits(lambda x: x, (jnp.arange(x.size) % 7 + 1).reshape(x.shape).astype(x.dtype))

    return dataclasses.replace(cache, k=jax.tree.map(fill, cache.k), v=jax.tree.map(fill, cache.v))


def paged(kv_dtype, dtype):
    cache = jfa.PagedKVCache.create(
        num_layers=1,
        num_pages=[9],
        page_size=4,
        batch=4,
        pages_per_seq=3,
        num_kv_heads=HKV,
        head_dim=D,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    table = jnp.array([[3, 1, 0], [2, 4, 5], [7, 0, 0], [8, 6, 0]], jnp.int32)  # 0: no page
    cache = dataclasses.replace(cache, page_tables=(table,), kv_len=jnp.array([3, 11, 4, 0], jnp.int32))
    return garbage(cache)


def same(one, other):
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(want).view(np.uint8))


def close(got, want):
    """Equal but for the last place of float32: XLA on a CPU fuses products and sums."""
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-6, atol=1e-6)


def write(tokens, slots, cache):
    how = dict(head_dim=D, implementation="triton")
    assert write_ops.serves(tokens[0], cache.k[0], cache.v[0], **how)
    q, *kv = write_ops.rotate_and_write(*tokens, slots, cache.k[0], cache.v[0], **how)
    return q, cache.holding(0, *kv)


@pytest.mark.parametrize(
    ("kv_dtype", "dtype", "half"),
    [(None, "bfloat16", D // 2), ("int8", "bfloat16", D // 2), ("int8", "float16", 12), ("fp8", "bfloat16", 16)],
)
def test_pages_get_what_the_cache_writes(kv_dtype, dtype, half):
    cache, tokens = paged(kv_dtype, dtype), new_tokens(8, dtype, half=half)
    lengths = jnp.array([2, 2, 1, 0])  # over a page's end, past the capacity, to no page, padding
    q, k, v = rotated(*tokens)
    of_rows = (x.reshape(4, 2, HKV, D) for x in (k, v))
    got_q, got = write(tokens, cache.slots(0, 2, lengths), cache)
    close(got_q, q)
    same(got, cache.write(0, *of_rows, lengths))
    query_start = jnp.array([1, 3, 4, 4, 6])
    _, got = write(tokens, cache.ragged_slots(0, 8, query_start), cache)
    same(got, cache.write_ragged(0, k, v, query_start))


@pytest.mark.parametrize(("window", "kv_len"), [(None, [3, 8, 10]), (8, [3, 8, 21])])
def test_slots_of_rows_get_what_the_cache_writes(window, kv_len):
    cache = jfa.KVCache.create(
        num_layers=1, batch=3, capacity=10, num_kv_heads=HKV, head_dim=D, dtype="bfloat16", windows=[window]
    )
    cache = garbage(dataclasses.replace(cache, kv_len=jnp.array(kv_len, jnp.int32)))
    tokens = new_tokens(6, "bfloat16")
    q, k, v = rotated(*tokens)
    got_q, got = write(tokens, cache.slots(0, 2).reshape(-1), cache)
    close(got_q, q)
    same(got, cache.write(0, k.reshape(3, 2, HKV, D), v.reshape(3, 2, HKV, D)))


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_numbers_between_two_are_rounded_as_quantize_does(kv_dtype):
    largest = quant.KINDS[kv_dtype][1]
    cache = paged(kv_dtype, "float32")
    numbers = np.random.default_rng(0).integers(-8 * int(largest), 8 * int(largest), (8, (HQ + 2 * HKV), D)) / 16
    numbers[..., 0] = largest  # a scale of 1: half of the others are in the middle of two integers, or of two floats
    numbers[1] *= 2.0**-9
    numbers[1, :, 0] = largest
    tokens = jnp.asarray(numbers.reshape(8, -1), jnp.float32), jnp.ones((8, D // 2)), jnp.zeros((8, D // 2))
    _, k, v = rotated(*tokens)
    _, got = write(tokens, cache.slots(0, 2), cache)
    same(got, cache.write(0, k.reshape(4, 2, HKV, D), v.reshape(4, 2, HKV, D)))


def test_a_vector_with_nan_or_infinity_has_a_scale_of_nan():
    cache, (qkv, *angles) = paged("int8", "bfloat16"), new_tokens(8, "bfloat16")
    qkv = qkv.at[0, HQ * D + 3].set(jnp.nan).at[1, -1].set(jnp.inf)
    slots = cache.slots(0, 2)
    _, got = write((qkv, *angles), slots, cache)
    k, v = (x.scales.reshape(-1, HKV) for x in (got.k[0], got.v[0]))
    assert jnp.isnan(k[slots[0]]).tolist() == [True, False] and not jnp.isnan(v[slots[0]]).any()
    assert jnp.isnan(v[slots[1]]).tolist() == [False, True] and not jnp.isnan(k[slots[1]]).any()


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kv_dtype", [None, "int8", "fp8"])
def test_it_is_one_kernel_on_every_architecture(arch, kv_dtype):
    cache, tokens = paged(kv_dtype, "bfloat16"), new_tokens(8, "bfloat16")
    [kernel] = aot.lower(lambda *x: write(x[:3], x[3], x[4]), *tokens, cache.slots(0, 2), cache, arch=arch)
    assert (kernel.name, kernel.grid, kernel.num_warps) == ("rotate_and_write", (8, HKV, 1), 1)


def test_other_calls_are_left_to_xla():
    qkv = jax.ShapeDtypeStruct((8, (HQ + 2 * HKV) * D), jnp.bfloat16)

    def serves(qkv=qkv, kv_dtype=None, implementation="triton"):
        pages = paged(kv_dtype, "bfloat16").k[0]
        return write_ops.serves(qkv, pages, pages, head_dim=D, implementation=implementation)

    assert serves() and serves(kv_dtype="int8")
    assert not serves(kv_dtype="int4") and not serves(implementation=None) and not serves(implementation="xla")
    assert not serves(qkv=jax.ShapeDtypeStruct((257, qkv.shape[1]), jnp.bfloat16))
    with aot.target("gfx942"):
        assert serves(implementation=None) and not serves(implementation="xla")
    with aot.target("v5e"):
        assert not serves(implementation=None)
