"""Oracle, reference, kernels: each case on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

import jfa
from jfa.device import describe
from jfa.kernels.xla import flash
from jfa_bench.truth.cases import CASES, Case, truth, truth_of
from jfa_bench.truth.numerics import assert_within, limit

TILES = {
    "reference": None,
    "xla": jfa.BlockConfig(block_q=16, block_kv=16, widen=True),
    "triton": jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1),
}
ELEMENTWISE = jfa.BlockConfig(block_q=8, block_kv=16, widen=True, elementwise=True)
WHOLE = ("causal", "both_windows", "cached_chunk", "bias", "dropout", "segments_and_gqa", "ragged_tiles")
STRIPS = jfa.BlockConfig(block_q=16, block_kv=16, widen=True, heads=1, strips=2)
# float16 and bfloat16 differ only in rounding, so half of the cases run in each. An interpreted kernel takes seconds:
# the quick runs skip cases on triton whose options are also in another case, and run xla in one dtype of each case.
# What only differs in dtype from a quick run is left to the longest run.
DTYPES = {name: ("float32", ("bfloat16", "float16")[i % 2]) for i, name in enumerate(CASES)}
NOT_QUICK_ON_TRITON = {
    *("square", "ragged_tiles", "causal", "mqa", "left_window", "window_of_itself", "zero_scale", "steep_scale"),
    *("queries_before_all_keys", "bias", "narrow_values", "sinks", "segments_and_gqa", "dropout_and_bias"),
}


def is_quick(i: int, name: str, dtype: str, backend: str) -> bool:
    match backend:
        case "reference":
            return dtype == "float32"
        case "xla":
            return dtype == DTYPES[name][i // 2 % 2]
    return name not in NOT_QUICK_ON_TRITON and (dtype == "float32") == (i % 8 == 0)


def is_soak(i: int, name: str, dtype: str, backend: str) -> bool:
    other = DTYPES[name][dtype == "float32"]
    return not is_quick(i, name, dtype, backend) and is_quick(i, name, other, backend)


RUNS = [
    run(name, dtype, backend, quick=is_quick(i, name, dtype, backend), soak=is_soak(i, name, dtype, backend))
    for i, name in enumerate(CASES)
    for dtype in DTYPES[name]
    for backend in TILES
    if backend != "triton" or dtype != "float32" or i % 4 == 0
]


def attend(name, dtype, backend, **more):
    known = truth(name, dtype)
    options = known.options | dict(implementation=backend, config=TILES[backend], return_residual=True) | more
    # compiled as one program: compiling its operations one by one takes several times as long
    return jax.jit(functools.partial(jfa.dot_product_attention, **options))(*known.arrays)


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle(name, dtype, backend):
    known = truth(name, dtype)
    out, lse = attend(name, dtype, backend)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize(("name", "heads"), [*((name, 2) for name in CASES), *((name, None) for name in WHOLE)])
def test_strips_and_some_heads_at_a_time_give_the_same_result(name, heads):
    known = truth(name, "float32")
    out, lse = attend(name, "float32", "xla", config=dataclasses.replace(STRIPS, heads=heads))
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize(
    ("shape", "strips", "heads", "backward_heads"),
    [
        ((2, 300, 330, 4, 2, 16), 2, None, None),  # all heads fit
        ((1, 270, 270, 32, 32, 16), 2, 24, 10),  # 16 and 8 at a time
        ((3, 256, 256, 12, 4, 16), 2, 8, None),  # one row at a time; all of them
        ((40, 40, 200, 6, 2, 16), 1, 13, 13),  # too few queries for strips; 5 rows
    ],
)
def test_tiles_that_a_cpu_gets(shape, strips, heads, backward_heads):
    b, tq, tk, hq, hkv, d = shape
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (b, t, h, d)) for key, t, h in zip(keys, (tq, tk, tk), (hq, hkv, hkv), strict=True)
    )
    operands = jfa.types.Operands(q, k, v)
    config = flash.default_config(operands, describe("cpu", "cpu"))
    assert (config.strips, config.heads) == (strips, heads)
    assert flash.backward_config(operands, config, describe("cpu", "cpu")).heads == backward_heads

    def loss(implementation, config):
        attend = functools.partial(
            jfa.dot_product_attention, is_causal=True, implementation=implementation, config=config
        )
        return jax.jit(jax.value_and_grad(lambda *arrays: (attend(*arrays) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

    for got, want in zip(*map(jax.tree.leaves, (loss("xla", config), loss("reference", None))), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_all_heads_at_once_where_they_may_be_on_several_devices():
    shape = jax.ShapeDtypeStruct((4, 512, 32, 64), jnp.float32)
    operands, cpu = jfa.types.Operands(shape, shape, shape), describe("cpu", "cpu")
    assert flash.default_config(operands, cpu).heads == 24
    assert flash.default_config(operands, dataclasses.replace(cpu, num_devices=2)).heads is None
    bias = jax.ShapeDtypeStruct((1, 1, 512, 512), jnp.float32)
    assert flash.default_config(operands._replace(bias=bias), cpu).heads is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["one_query_each", "cached_chunk", "gqa", "mask"])
@pytest.mark.parametrize("config", [None, jfa.BlockConfig(block_q=8, block_kv=16), ELEMENTWISE], ids=str)
def test_other_tiles_give_the_same_result(name, dtype, config):
    known = truth(name, dtype)
    out, lse = attend(name, dtype, "xla", config=config)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


ONE_QUERY = {
    "causal": Case(
        shape=(4, 1, 70, 6, 2, 16),
        options=dict(is_causal=True, query_offset=[69, 30, 3, 0], key_value_seq_lengths=[70, 31, 0, 40]),
    ),
    "everything": Case(
        shape=(3, 1, 53, 3, 1, 40),
        value_head_dim=24,
        options=dict(
            local_window_size=(20, 5),
            query_offset=[40, 3, 52],
            key_value_seq_lengths=[43, 53, 10],  # the last query's window starts past its keys
            logits_soft_cap=3.0,
        ),
        sinks=True,
    ),
    "no_option": Case(shape=(2, 1, 33, 2, 2, 16)),
}


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("name", ONE_QUERY)
def test_one_query_per_row_may_be_shared_out_over_programs(name, num_splits):
    dtype = {"no_option": "float32"}.get(name, "bfloat16")
    known = truth_of(ONE_QUERY[name], dtype, seed=0)
    tiles = jfa.PagedConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1, num_splits=num_splits)
    options = known.options | dict(implementation="triton", config=tiles, return_residual=True)
    call = functools.partial(jfa.dot_product_attention, **options)
    q, k, v = (np.array(x) for x in known.arrays)
    for row, length in enumerate(known.options.get("key_value_seq_lengths", ())):
        k[row, length:], v[row, length:] = np.nan, np.inf
    assert "name=paged_decode_attention" in str(jax.make_jaxpr(call)(q, k, v))
    out, lse = jax.jit(call)(q, k, v)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize("backend", TILES)
def test_rows_without_keys_give_zeros_and_minus_infinity(backend):
    out, lse = attend("lengths_with_empty_rows", "float32", backend)
    assert not np.asarray(out)[0].any() and np.isneginf(np.asarray(lse)[0]).all()
    assert not np.asarray(out)[1, 7:].any() and not np.asarray(out)[2].any()


@pytest.mark.parametrize("backend", TILES)
def test_tokens_past_the_lengths_are_not_read(backend):
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
def test_repeated_calls_are_bit_identical(backend):
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
def test_agrees_with_jax_nn(is_causal, window):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, 24, h, 16)), jnp.float32) for h in (4, 2, 2))
    bias = jnp.asarray(random.standard_normal((1, 4, 24, 24)), jnp.float32)
    options = dict(is_causal=is_causal, local_window_size=window, key_value_seq_lengths=jnp.array([24, 20], jnp.int32))
    ours, our_lse = jfa.dot_product_attention(q, k, v, bias, return_residual=True, **options)
    theirs, their_lse = jax.nn.dot_product_attention(q, k, v, bias, return_residual=True, **options)
    seen = np.isfinite(np.asarray(our_lse))
    np.testing.assert_allclose(np.asarray(ours)[seen], np.asarray(theirs)[seen], atol=2e-6)
    np.testing.assert_allclose(np.asarray(our_lse)[seen], np.asarray(their_lse)[seen], atol=2e-6)


def test_the_default_on_a_cpu_is_xla_and_its_default_tiles_agree():
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
def test_with_float64_as_the_default_dtype(backend):
    with jax.enable_x64(True):
        out, lse = attend("cached_chunk", "float32", backend)
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_array_equal(out, attend("cached_chunk", "float32", backend)[0])


@pytest.mark.parametrize("config", [None, ELEMENTWISE], ids=["default", "elementwise"])
def test_nan_in_one_of_several_heads_stays_there(config):
    key = jnp.ones((1, 9, 2, 16)).at[0, 3, 0].set(jnp.nan)  # key head 0, which query heads 0 and 1 read
    out = jfa.dot_product_attention(jnp.ones((1, 1, 4, 16)), key, jnp.ones((1, 9, 2, 16)), config=config)
    assert jnp.isnan(out).any((0, 1, 3)).tolist() == [True, True, False, False]


@pytest.mark.parametrize("backend", TILES)
def test_offsets_and_windows_beyond_all_keys(backend):
    x = truth("causal", "float32").arrays
    options = dict(implementation=backend, config=TILES[backend])
    far = jfa.dot_product_attention(*x, is_causal=True, query_offset=2**31 - 1, local_window_size=2**40, **options)
    np.testing.assert_array_equal(far, jfa.dot_product_attention(*x, query_offset=2**29 - 1, is_causal=True, **options))
    np.testing.assert_allclose(far, jfa.dot_product_attention(*x, **options), atol=1e-6)


@pytest.mark.parametrize("backend", TILES)
def test_numbers_may_be_jax_arrays(backend):
    known = truth("soft_cap", "float32")
    options = dict(is_causal=True, implementation=backend, config=TILES[backend], scale=jnp.float32(0.25))
    out = jfa.dot_product_attention(*known.arrays, logits_soft_cap=jnp.float32(2.0), **options)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))


@pytest.mark.parametrize("kind", ["int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_lengths_and_offsets_of_every_integer_type(kind, make):
    q, k, v = truth("cached_chunk", "float32").arrays
    with jax.enable_x64(kind.endswith("64")):
        got = jfa.dot_product_attention(q, k, v, is_causal=True, query_offset=make(np.array(17, kind)))
    np.testing.assert_array_equal(got, jfa.dot_product_attention(q, k, v, is_causal=True, query_offset=17))


def test_a_list_of_traced_lengths():
    q, k, v = (x[:1] for x in truth("cached_chunk", "float32").arrays)
    got = jax.jit(lambda n: jfa.dot_product_attention(q, k, v, key_value_seq_lengths=[n]))(5)
    want = jfa.dot_product_attention(q, k, v, key_value_seq_lengths=[5])
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("backend", TILES)
@pytest.mark.parametrize("hidden", [-1e10, float(jnp.finfo(jnp.float32).min), -jnp.inf])
def test_a_bias_that_masks_keys(backend, hidden):
    q, k, v = truth("bias_per_key", "float32").arrays
    bias = jnp.zeros((1, 1, 1, 37)).at[..., :32].set(hidden)
    options = dict(implementation=backend, config=TILES[backend])
    out = jfa.dot_product_attention(q, k, v, bias, **options)
    mask = jnp.arange(37)[None, None, None] >= 32
    np.testing.assert_allclose(out, jfa.dot_product_attention(q, k, v, mask=mask, **options), atol=2e-6)
    if hidden != -jnp.inf:  # all weights are equal: the output is the mean of the values
        all_hidden = jnp.full((1, 1, 1, 37), hidden)
        mean = jnp.broadcast_to(v.mean(1, keepdims=True), (*v.shape[:1], 20, *v.shape[2:])).repeat(2, 2)
        np.testing.assert_allclose(jfa.dot_product_attention(q, k, v, all_hidden, **options), mean, atol=2e-6)


@pytest.mark.parametrize("backend", TILES)
def test_keys_seen_only_by_the_padding_of_a_tile_may_be_nan(backend):
    """Three queries with a cache: the padding rows of a tile of sixteen queries would see later keys."""
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, n, 2, 16)), jnp.float32) for n in (3, 20, 20))
    dirty_k, dirty_v = k.at[:, 7:].set(jnp.nan), v.at[:, 7:].set(jnp.inf)

    def gradients(k, v):
        options = dict(is_causal=True, query_offset=4, implementation=backend, config=TILES[backend])
        return jax.value_and_grad(
            lambda *x: jnp.square(jfa.dot_product_attention(*x, **options)).sum(), argnums=(0, 1, 2)
        )(q, k, v)

    for got, want in zip(jax.tree.leaves(gradients(dirty_k, dirty_v)), jax.tree.leaves(gradients(k, v)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_16_bit_sinks_are_converted_exactly():
    q, k, v = truth("sinks", "float32").arrays
    sinks = jnp.asarray([10.3, -2.0, 0.1, 4.7], jnp.bfloat16)
    options = dict(implementation="triton", config=TILES["triton"])
    got = jfa.dot_product_attention(q, k, v, sinks=sinks, **options)
    np.testing.assert_array_equal(got, jfa.dot_product_attention(q, k, v, sinks=sinks.astype(jnp.float32), **options))
