"""BlockMask and jfa.block_sparse_attention: masks against plain arrays, the op on every backend against the oracle."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

import jfa
from jfa import BlockMask
from jfa_bench.truth import sparse_cases
from jfa_bench.truth.cases import GRADIENTS
from jfa_bench.truth.numerics import assert_within, limit
from jfa_bench.truth.sparse_cases import BLOCKS, CASES, TK, TQ, packed

CONFIG = {"triton": jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1)}
PRODUCTS = 3  # consecutive products of a gradient, as in test_attention_gradients.py
QUICK = {
    "xla": {
        "array_per_row_and_head": "float32",
        "window_and_sinks": "bfloat16",
        "segments_besides_the_mask": "float32",
        "bigbird": "float32",
        "function_of_rows_and_heads": "float32",
        "tiles_with_lengths_and_offsets": "float16",
        "everything": "float32",
        "tiles_that_are_no_power_of_two": "bfloat16",
    },
    "triton": {
        "array_per_row_and_head": "bfloat16",
        "everything": "float32",
        "segments_besides_the_mask": "bfloat16",
    },
    "reference": {"everything": "float32"},
}
RUNS = [
    run(
        name,
        dtype,
        backend,
        quick=QUICK[backend].get(name) == dtype,
        soak=backend == "triton" or dtype != "float32",  # an interpreted kernel takes seconds
    )
    for name in CASES
    for backend in QUICK
    for dtype in ("float32", "bfloat16", "float16")
    if backend != "triton" or name in sparse_cases.ON_GPUS
]


class Truth:
    """A case in a dtype: its differentiable arrays by name, its mask, and (exact, rounded to the dtype) results."""

    def __init__(self, name: str, dtype: str):
        known = sparse_cases.truth(name, dtype)
        self.arrays: dict[str, Any] = dict(zip(("query", "key", "value"), known.arrays, strict=True))
        self.arrays |= {key: known.options[key] for key in GRADIENTS if key in known.options}
        self.options = {key: x for key, x in known.options.items() if key not in self.arrays}
        self.mask = self.options.pop("block_mask")
        self.out, self.lse = (known.out, known.plain_out), (known.lse, known.plain_lse)
        self.d_out, self.d_lse, self.gradients = known.d_out, known.d_lse, known.gradients


truth = functools.cache(Truth)


@functools.cache
def program(known, backend):
    """(arrays, mask) -> ((out, lse), gradients of sum(out * d_out) + sum(lse * d_lse) by name)."""
    options = known.options | dict(implementation=backend, config=CONFIG.get(backend), return_residual=True)

    def loss(arrays, mask):
        out, lse = jfa.block_sparse_attention(**arrays, block_mask=mask, **options)
        seen = jnp.where(jnp.isfinite(lse), lse * known.d_lse, 0.0)
        return (out.astype(jnp.float32) * known.d_out.astype(jnp.float32)).sum() + seen.sum(), (out, lse)

    @jax.jit
    def call(arrays, mask):
        (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(arrays, mask)
        return results, gradients

    return call


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle_forward_and_backward(name, dtype, backend):
    known = truth(name, dtype)
    (out, lse), gradients = program(known, backend)(known.arrays, known.mask)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert_within(out, known.out[0], limit(*known.out, out.dtype))
    assert_within(lse, known.lse[0], limit(*known.lse, lse.dtype))
    for argument, (want, plain) in known.gradients.items():
        allowed = limit(want, plain, jnp.dtype(dtype), products=PRODUCTS)
        assert_within(gradients[argument], want, allowed)


def test_rows_without_keys_give_zeros_and_minus_infinity():
    known = truth("array_per_row_and_head", "float32")
    out, lse = jfa.block_sparse_attention(**known.arrays, block_mask=known.mask, return_residual=True)
    assert not np.asarray(out)[0, :, 1].any() and np.isneginf(np.asarray(lse)[0, :, 1]).all()
    assert not np.asarray(out)[1, 3:6].any() and np.isneginf(np.asarray(lse)[1, 3:6]).all()


@pytest.mark.parametrize("backend", QUICK)
def test_what_is_not_visible_may_be_nan(backend):
    """Keys and values of tiles that nothing visits, keys that nothing sees in visited tiles, queries without keys."""
    known = truth("window_and_sinks", "float32")
    mask = np.zeros((1, 4, TQ, TK), bool)
    mask[:, :, :20, 32:40] = mask[:, :2, 16:, :10] = True  # key head 1 has no visible key before 32
    dirty = {key: np.array(x) for key, x in known.arrays.items()}
    dirty["query"][:, 20:, 2:] = np.nan
    for name, poison in (("key", np.nan), ("value", np.inf)):
        dirty[name][:, 10:32] = dirty[name][:, 40:] = dirty[name][:, :32, 1] = poison
    block_mask = BlockMask.from_array(mask, **BLOCKS)
    clean, got = (program(known, backend)(arrays, block_mask) for arrays in (known.arrays, dirty))
    for want, x in zip(jax.tree.leaves(clean), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_tiles_that_others_visit_are_not_loaded(backend):
    """Each query tile visits the key tile of its own number: NaN in one key tile stays in one query tile."""
    known = truth("window_and_sinks", "float32")
    arrays = known.arrays | dict(key=known.arrays["key"].at[:, 16:32].set(jnp.nan))
    mask = BlockMask.from_tiles(np.eye(3, 4, dtype=bool), TQ, TK, **BLOCKS)
    (out, _), gradients = program(known, backend)(arrays, mask)
    for x in (out, gradients["query"], gradients["value"]):
        hit = np.isnan(np.asarray(x)).any((0, 2, 3))
        assert hit[16:32].all() and not hit[:16].any() and not hit[32:].any()


def test_work_is_proportional_to_the_tiles_that_are_visited(changing_kernels):
    """Counts the products: as many as visits, and those of one uneven round at most."""
    turns = []

    def counted(module):
        untouched = module.dot

        def dot(*args):
            jax.debug.callback(lambda: turns.append(1))
            return untouched(*args)

        changing_kernels.setattr(module, "dot", dot)

    from jfa.kernels.xla import block_sparse

    counted(block_sparse)
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, 256, 2, 16)), jnp.float32)
    tiles = random.random((1, 2, 16, 16)) < np.array([0.1, 0.5])[:, None, None]
    mask = BlockMask.from_tiles(tiles, 256, 256, **BLOCKS)
    causal = int((tiles & np.tri(16, dtype=bool)).sum())
    for is_causal, visits in ((False, int(tiles.sum())), (True, causal)):
        turns.clear()
        jax.block_until_ready(jfa.block_sparse_attention(x, x, x, mask, is_causal=is_causal))
        jax.effects_barrier()
        lanes, longest = block_sparse._MOST_LANES, int(tiles.sum(-1).max())
        assert visits <= len(turns) // 2 * lanes <= visits + lanes * longest


def test_memory_is_linear_in_the_sequence_length():
    """Forward and backward at length 32768 within 2 GB; the scores of 8 heads would take 34 GB."""
    row = jax.ShapeDtypeStruct((1, 32768, 8, 64), jnp.float32)
    mask = BlockMask.sliding_window(32768, 32768, (1024, 0), sinks=4)

    def loss(q, k, v, mask):
        return jfa.block_sparse_attention(q, k, v, mask, is_causal=True).sum()

    used = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(row, row, row, mask).compile().memory_analysis()
    assert used.temp_size_in_bytes + used.argument_size_in_bytes + used.output_size_in_bytes < 2e9


def test_a_mask_is_an_argument_of_a_jitted_function():
    known = truth("bigbird", "float32")
    traced = []

    @jax.jit
    def call(mask, arrays):
        traced.append(1)
        return jfa.block_sparse_attention(**arrays, block_mask=mask)

    for seed in (0, 1):
        mask = BlockMask.bigbird(TQ, TK, heads=4, window=1, num_global=0, num_random=1, seed=seed, **BLOCKS)
        mask = dataclasses.replace(mask, q=known.mask.q)  # lists of one width; xla does not read the transposed ones
        want = jfa.dot_product_attention(**known.arrays, mask=mask.to_array(), implementation="reference")
        np.testing.assert_allclose(call(mask, known.arrays), want, atol=2e-6)
    assert len(traced) == 1


def test_the_choice_of_tiles_and_attention_in_one_program():
    known = truth("top_k", "float32")

    @jax.jit
    def call(arrays):
        mask = BlockMask.top_k(arrays["query"], arrays["key"], 2, is_causal=True, **BLOCKS)
        return jfa.block_sparse_attention(**arrays, block_mask=mask, is_causal=True)

    assert_within(call(known.arrays), known.out[0], limit(*known.out, jnp.float32))


def test_no_batch_axis_and_vmap():
    known = truth("top_k", "float32")
    q, k, v = (known.arrays[name] for name in ("query", "key", "value"))
    mask = BlockMask.sliding_window(TQ, TK, 5, **BLOCKS)
    want = jfa.block_sparse_attention(q, k, v, mask)
    np.testing.assert_allclose(jfa.block_sparse_attention(q[0], k[0], v[0], mask), want[0], atol=1e-6)
    got = jax.vmap(lambda q, k, v: jfa.block_sparse_attention(q, k, v, mask))(q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_empty_batch():
    x = jnp.ones((0, 20, 2, 16))
    assert jfa.block_sparse_attention(x, x, x, BlockMask.sliding_window(20, 20, 3, **BLOCKS)).shape == x.shape


# --- masks


@pytest.mark.parametrize(("tq", "tk"), [(37, 53), (5, 7)])
def test_masks_of_positions_are_exact(tq, tk):
    random = np.random.default_rng(0)
    q, k = np.ogrid[:tq, :tk]
    array = random.random((2, 3, tq, tk)) < 0.05
    q_ids, kv_ids = packed(random, 2, tq), packed(random, 2, tk)
    masks = {
        "array": (BlockMask.from_array(array, **BLOCKS), array),
        "matrix": (BlockMask.from_array(array[0, 0], block_q=8, block_kv=24), array[:1, :1]),
        "function": (
            BlockMask.from_function(lambda b, h, q, k: (q + h * k) % 5 == 0, tq, tk, heads=2, **BLOCKS),
            np.stack([(q + 0 * k) % 5 == 0, (q + k) % 5 == 0])[None],
        ),
        "window": (BlockMask.sliding_window(tq, tk, 4, **BLOCKS), abs(q - k) <= 4),
        "half_open": (BlockMask.sliding_window(tq, tk, (None, 2), **BLOCKS), k <= q + 2),
        "sinks": (
            BlockMask.sliding_window(tq, tk, (9, 0), sinks=17, **BLOCKS),
            ((k >= q - 9) & (k <= q)) | (k < 17),
        ),
        "segments": (
            BlockMask.from_segments(q_ids, kv_ids, **BLOCKS),
            (q_ids[:, :, None] == kv_ids[:, None])[:, None],
        ),
        "unsorted_segments": (
            BlockMask.from_segments(q_ids[0, ::-1] % 2, kv_ids[0] % 2, **BLOCKS),
            (q_ids[0, ::-1] % 2)[:, None] == kv_ids[0] % 2,
        ),
    }
    for name, (mask, want) in masks.items():
        found = np.asarray(mask.to_array())
        np.testing.assert_array_equal(found, np.broadcast_to(want, found.shape), err_msg=name)
        check_lists(mask, found)


def check_lists(mask: BlockMask, array: np.ndarray):
    """The lists name the tiles in which something is visible, whole ones first, in both directions."""
    b, h, tq, tk = array.shape
    n, m = -(-tq // mask.block_q), -(-tk // mask.block_kv)
    whole = np.zeros((b, h, n * mask.block_q, m * mask.block_kv), bool)
    whole[:, :, :tq, :tk] = array
    some = whole.reshape(b, h, n, mask.block_q, m, mask.block_kv).any((3, 5))
    for visits, want in ((mask.kv, some), (mask.q, some.swapaxes(2, 3))):
        num, lists, kinds = (np.asarray(x) for x in (visits.num_visited, visits.indices, visits.kinds))
        assert lists.shape[3] == max(1, num.max())
        for place in np.ndindex(num.shape):
            assert sorted(lists[place][: num[place]]) == np.flatnonzero(want[place]).tolist()
            assert (kinds[place][: visits.num_whole[place]] == 0).all()
            assert kinds[place][visits.num_whole[place] : num[place]].all()
    assert int(mask.num_tiles) == some.sum() and float(mask.density) == pytest.approx(some.mean())


def test_equal_partial_tiles_are_stored_once():
    mask = BlockMask.sliding_window(2048, 2048, (200, 0), sinks=4, block_q=64, block_kv=64)
    # whole, the diagonal, two at the far edge of the window; the first column: sinks alone, and with each of these
    assert len(mask.tiles) == 8
    assert int(mask.num_tiles) < 32 * 6


def test_bigbird():
    mask = BlockMask.bigbird(160, 160, window=3, num_global=1, num_random=2, heads=2, **BLOCKS)
    grid = np.asarray(mask.grid())[0] == 0
    i, j = np.ogrid[:10, :10]
    fixed = (abs(i - j) <= 1) | (i < 1) | (j < 1)
    assert grid[:, fixed].all() and (grid & ~fixed).sum(-1)[:, 1:].tolist() == [[2] * 9] * 2
    assert (grid[0] != grid[1]).any()
    again = BlockMask.bigbird(160, 160, window=3, num_global=1, num_random=2, heads=2, **BLOCKS)
    np.testing.assert_array_equal(again.grid()[0] == 0, grid)


def test_vertical_slash_visits_the_tiles_that_lines_cross():
    vertical, slash = np.array([[[1, 40], [25, 25]]]), np.array([[[0], [21]]])
    q, k = np.ogrid[:TQ, :TK]
    lines = [(np.isin(k, vertical[0, h]) | np.isin(q - k, slash[0, h])) & (k <= q) for h in range(2)]

    def make(vertical, slash):
        return BlockMask.vertical_slash(vertical, slash, TQ, TK, **BLOCKS)

    want = np.stack([np.asarray(BlockMask.from_array(line, **BLOCKS).grid())[0, 0] >= 0 for line in lines])
    for mask in (make(vertical, slash), jax.jit(make)(vertical, slash)):
        np.testing.assert_array_equal(np.asarray(mask.grid())[0] >= 0, want)


@pytest.mark.parametrize("is_causal", [False, True])
def test_top_k_chooses_by_the_products_of_means(is_causal):
    random = np.random.default_rng(3)
    q, k = (jnp.asarray(random.standard_normal((2, 53, h, 16)), jnp.float32) for h in (4, 2))
    make = functools.partial(BlockMask.top_k, k=2, is_causal=is_causal, **BLOCKS)
    means = [[np.asarray(x[:, i : i + 16]).mean(1) for i in range(0, 53, 16)] for x in (q, k)]
    want = np.zeros((2, 4, 4, 4), bool)
    for b, h, i in np.ndindex(2, 4, 4):
        scores = [means[0][i][b, h] @ means[1][j][b, h // 2] for j in range(4)]
        if is_causal:
            scores = [np.inf if j == i else scores[j] for j in range(i + 1)]
        want[b, h, i, np.argsort(scores)[::-1][:2]] = True
    for mask in (make(q, k), jax.jit(make)(q, k)):
        np.testing.assert_array_equal(np.asarray(mask.grid()) >= 0, want)
        assert mask.kv.indices.shape[3] == 2


def test_top_k_of_another_number_for_each_tile_of_queries():
    random = np.random.default_rng(4)
    q, k = (jnp.asarray(random.standard_normal((1, 53, 2, 16)), jnp.float32) for _ in range(2))
    found = BlockMask.top_k(q, k, np.array([1, 3, 2, 4]), **BLOCKS).grid() >= 0
    for i, each in enumerate([1, 3, 2, 4]):
        np.testing.assert_array_equal(found[:, :, i], BlockMask.top_k(q, k, each, **BLOCKS).grid()[:, :, i] >= 0)


def test_tiles_from_a_traced_grid():
    grid = np.random.default_rng(0).random((1, 2, 3, 4)) < 0.4
    make = functools.partial(BlockMask.from_tiles, tq=TQ, tk=TK, **BLOCKS)
    np.testing.assert_array_equal(jax.jit(make)(grid).to_array(), make(grid).to_array())
    np.testing.assert_array_equal(make(grid).to_array(), grid.repeat(16, 2).repeat(16, 3)[:, :, :TQ, :TK])
