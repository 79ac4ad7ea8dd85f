"""Paged attention: oracle, reference, kernels; each case on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import run

import jfa
from jfa_bench.truth.numerics import assert_within, limit
from jfa_bench.truth.paged_cases import CASES, PagedCase, truth, truth_of

TILES = {
    "reference": None,
    "xla": jfa.BlockConfig(block_q=16, block_kv=16, widen=True),
    "triton": jfa.PagedConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1, num_splits=1),
}
# float16 and bfloat16 differ only in rounding, so half of the cases run in each; an interpreted kernel takes seconds,
# and most of what float32 could show on it is covered by the 16-bit dtype
DTYPES = {name: ("float32", ("bfloat16", "float16")[i % 2]) for i, name in enumerate(CASES)}
IN_FLOAT32 = ("ragged", "head_dim_80", "int8_odd", "int4_odd", "chunks_and_tokens")
NOT_QUICK_ON_TRITON = {"one_row", "pages_of_one", "window_of_itself", "mqa_16", "soft_cap", "int8", "int4", "prefill"}


def is_quick(i: int, name: str, dtype: str, backend: str) -> bool:
    match backend:
        case "reference":
            return dtype == "float32"
        case "xla":
            return dtype == DTYPES[name][i // 2 % 2]
    return dtype != "float32" and name not in NOT_QUICK_ON_TRITON


RUNS = [
    run(name, dtype, backend, quick=is_quick(i, name, dtype, backend))
    for i, name in enumerate(CASES)
    for dtype in DTYPES[name]
    for backend in TILES
    if backend != "triton" or dtype != "float32" or name in IN_FLOAT32
]


def attend(name, dtype, backend, **more):
    known = truth(name, dtype)
    options = known.options | dict(implementation=backend, config=TILES[backend], return_residual=True) | more
    return jax.jit(functools.partial(getattr(jfa, known.op), **options))(*known.arrays)


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle_despite_nan_in_unused_slots(name, dtype, backend):
    known = truth(name, dtype)
    out, lse = attend(name, dtype, backend)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize("name", ["narrow_values", "int4_keys_fp8_values", "float_keys_int8_values"])
def test_pages_may_have_an_axis_of_heads(name):
    q, *pages, table, kv_len = truth(name, "float32").arrays
    by_head = [x.reshape(*x.shape[:2], CASES[name].heads[1], -1) for x in pages]
    want = attend(name, "float32", "xla")
    for arrays in (by_head, [pages[0], by_head[1]], [by_head[0], pages[1]]):
        options = truth(name, "float32").options | dict(implementation="xla", config=TILES["xla"], return_residual=True)
        got = jfa.paged_decode_attention(q, *arrays, table, kv_len, **options)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("backend", TILES)
def test_without_queries_rows_or_pages_the_output_is_empty_or_zero(backend):
    q, pages = jnp.ones((3, 2, 16)), jnp.ones((2, 4, 1, 16))
    for n, b, p in ((0, 0, 1), (0, 2, 1), (3, 0, 1), (3, 2, 0)):
        start = jnp.zeros(b + 1, jnp.int32)
        out, lse = jfa.ragged_paged_attention(
            *(q[:n], pages, pages, jnp.zeros((b, p), jnp.int32), jnp.zeros(b, jnp.int32), start),
            implementation=backend,
            return_residual=True,
        )
        assert out.shape == (n, 2, 16) and not out.any() and np.isneginf(lse).all() and lse.shape == (n, 2)
    out = jfa.paged_decode_attention(
        q[:0], pages, pages, jnp.zeros((0, 1), int), jnp.zeros(0, int), implementation=backend
    )
    assert out.shape == (0, 2, 16)


@pytest.mark.parametrize("backend", TILES)
def test_queries_of_no_row_give_zeros(backend):
    out, lse = jfa.ragged_paged_attention(
        *(jnp.ones((4, 1, 16)), jnp.ones((2, 4, 1, 16)), jnp.ones((2, 4, 1, 16)), jnp.array([[1]]), jnp.array([3])),
        jnp.array([1, 3]),
        implementation=backend,
        config=TILES[backend],
        return_residual=True,
    )
    np.testing.assert_array_equal(out[:, 0, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(np.isneginf(lse[:, 0]), [True, False, False, True])


@pytest.mark.parametrize("backend", TILES)
def test_gradients_are_refused(backend):
    known = truth("one_row", "float32")

    def loss(q):
        return jfa.paged_decode_attention(q, *known.arrays[1:], implementation=backend).sum()

    with pytest.raises(jfa.UnsupportedError, match="not differentiable: train with dot_product_attention"):
        jax.grad(loss)(known.arrays[0])


@pytest.mark.parametrize("backend", TILES)
def test_a_tree_reads_no_page_before_its_windows(backend):
    name, dtype = "tree_with_narrow_window", "bfloat16"
    known, case = truth(name, dtype), CASES[name]
    q, k, v, table, *lengths = known.arrays
    assert case.queries is not None
    k, v = (pages.at[0].set(jnp.nan) for pages in (k, v))
    released = table.copy()
    for row, (length, new) in enumerate(zip(case.kv_len, case.queries, strict=True)):
        released[row, : max(0, length - new - case.options["local_window_size"]) // case.page_size] = 0
    assert (released != table).any()
    call = functools.partial(jfa.ragged_paged_attention, implementation=backend, config=TILES[backend], **known.options)
    out = jax.jit(call)(q, k, v, released, *lengths)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))


@pytest.mark.parametrize("backend", TILES)
def test_a_mask_of_chains_is_causal(backend):
    known = truth("chunk_with_window", "bfloat16")
    queries = CASES["chunk_with_window"].queries
    assert queries is not None
    chains = np.zeros((sum(queries), 64), bool)
    for first, new in zip(np.cumsum([0, *queries]), queries, strict=False):
        chains[first : first + new, :new] = np.tri(new, dtype=bool)
    want = attend("chunk_with_window", "bfloat16", backend)
    for mask in (chains, np.zeros_like(chains)):
        got = attend("chunk_with_window", "bfloat16", backend, tree_mask=mask)
        for one, other in zip(got, want, strict=True):
            assert_within(one, other, limit(known.out, known.plain_out, one.dtype))


@pytest.mark.parametrize(
    ("name", "num_splits"),
    [
        *((name, 3) for name in ("ragged", "sinks", "window", "int8", "chunks_and_tokens", "chunk_with_sinks")),
        ("tree_of_many_tokens", 3),
        *((name, 19) for name in ("sinks", "int4_keys_fp8_values")),  # more parts than are merged at a time
    ],
)
def test_split_kv_gives_the_same_result(name, num_splits):
    known = truth(name, "bfloat16")
    config = dataclasses.replace(TILES["triton"], num_splits=num_splits)
    out, lse = attend(name, "bfloat16", "triton", config=config)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@st.composite
def drawn_cases(draw) -> PagedCase:
    """A case of any shape, pages and options that make sense together."""
    hkv, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 8, 16]))
    kv_len = draw(st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 40, 61]), min_size=1, max_size=4))
    ragged = draw(st.booleans())
    options: dict = {}
    if draw(st.booleans()):
        options["local_window_size"] = draw(st.integers(0, 70))
    if draw(st.booleans()):
        options["logits_soft_cap"] = draw(st.floats(0.5, 20))
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-0.5, 0.5))
    queries = tuple(draw(st.integers(0, length)) for length in kv_len) if ragged else None
    trees = None
    if queries is not None and max(queries) > 0 and draw(st.booleans()):
        trees = tuple(
            tuple(draw(st.integers(-1, token - 1)) for token in range(new)) if draw(st.booleans()) else None
            for new in queries
        )
    return PagedCase(
        kv_len=tuple(kv_len),
        queries=queries,
        trees=trees,
        mask_width=None if trees is None else max(1, *(len(parents or ()) for parents in trees)),
        padding=draw(st.integers(0, 3)) if ragged else 0,
        heads=(hkv * group, hkv),
        head_dim=draw(st.sampled_from([8, 16, 40])),
        value_head_dim=draw(st.sampled_from([None, 8, 24])),
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
        pages=draw(st.sampled_from([None, "int8", "fp8", "int4", "float32", "bfloat16"])),
        sinks=draw(st.booleans()),
        options=options,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=drawn_cases())
def test_random_shapes_and_options_agree_with_the_oracle(dtype, backend, case):
    known = truth_of(case, dtype, seed=1)
    options = known.options | dict(implementation=backend, config=TILES[backend], return_residual=True)
    out, lse = jax.jit(functools.partial(getattr(jfa, known.op), **options))(*known.arrays)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))
