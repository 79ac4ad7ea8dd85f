"""Named cases of attention with a BlockMask: small, odd, and each for a reason; and those that cover a tile's paths."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jfa import BlockMask
from jfa.block_mask import BLOCK

from .cases import Case, Truth, truth_of

BLOCKS = dict(block_q=16, block_kv=16)
TQ, TK = 37, 53
SHAPE = (2, TQ, TK, 4, 2, 16)


def _sparse_array(q, k, random):
    """A twentieth of the keys, a whole tile and no tile at all; three rows see nothing."""
    mask = random.random((q.shape[0], q.shape[2], q.shape[1], k.shape[1])) < 0.05
    mask[:, :, :16, 16:32], mask[0, 1], mask[1, :, 3:6] = True, False, False
    return BlockMask.from_array(mask, **BLOCKS)


def _all_tiles(q, k, random):
    n, m = (-(-x.shape[1] // 16) for x in (q, k))
    return BlockMask.from_tiles(np.ones((n, m), bool), q.shape[1], k.shape[1], **BLOCKS)


def packed(random: np.random.Generator, b: int, t: int) -> np.ndarray:
    """i32[b, t]: ids of packed segments."""
    return np.sort(random.integers(0, 4, (b, t)), axis=1)


_ODD = dict(is_causal=True, query_offset=[16, 3], key_value_seq_lengths=[53, 20], query_seq_lengths=[30, 37])
CASES = {
    "array_per_row_and_head": Case(shape=SHAPE, block_mask=_sparse_array, value_head_dim=24),
    "window_and_sinks": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.sliding_window(TQ, TK, (9, 0), sinks=3, **BLOCKS),
        sinks=True,
    ),
    "segments": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.from_segments(packed(random, 2, TQ), packed(random, 2, TK), **BLOCKS),
    ),
    "bigbird": Case(
        shape=(1, TQ, TK, 4, 1, 40),
        block_mask=lambda q, k, random: BlockMask.bigbird(TQ, TK, heads=4, window=1, num_random=1, **BLOCKS),
        value_head_dim=16,
        bias=(1, 1, 1, TK),
    ),
    "vertical_slash": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.vertical_slash(
            np.array([[[1]]]), np.array([[[0, 20]]]), TQ, TK, **BLOCKS
        ),
        options=dict(is_causal=True, scale=-0.3),
    ),
    "top_k": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.top_k(q, k, 2, is_causal=True, **BLOCKS),
        options=dict(is_causal=True),
    ),
    "function_of_rows_and_heads": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.from_function(
            lambda b, h, q, k: (q // 7 + k // 5 + h) % (3 + b) == 0, TQ, TK, batch=2, heads=4, block_q=16, block_kv=32
        ),
        bias=(2, 4, TQ, 1),
        alibi=True,
    ),
    "tiles_with_lengths_and_offsets": Case(shape=SHAPE, block_mask=_all_tiles, options=_ODD),
    "one_query": Case(
        shape=(2, 1, TK, 4, 2, 16), block_mask=_all_tiles, options=dict(is_causal=True, query_offset=[52, 9])
    ),
    "everything": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.sliding_window(TQ, TK, (20, 7), sinks=3, **BLOCKS),
        options=_ODD | dict(logits_soft_cap=3.0),
        bias=(1, 4, TQ, TK),
        sinks=True,
        alibi_per_row=True,
    ),
    "tiles_that_are_no_power_of_two": Case(
        shape=SHAPE,
        block_mask=lambda q, k, random: BlockMask.from_array(
            random.random((1, 4, TQ, TK)) < 0.1, block_q=10, block_kv=7
        ),
    ),
    "segments_besides_the_mask": Case(
        shape=(2, TQ, TQ, 4, 2, 16),
        block_mask=_all_tiles,
        options=dict(is_causal=True)
        | {f"{name}_segment_ids": [[0] * 16 + [1] * 5 + [2] * 16, [4] * 37] for name in ("query", "key_value")},
    ),
}
ON_GPUS = tuple(name for name in CASES if name != "tiles_that_are_no_power_of_two")


@functools.cache
def truth(name: str, dtype: str) -> Truth:
    """Seeded inputs of a case of CASES in a dtype, and the expected results."""
    return truth_of(CASES[name], dtype, seed=list(CASES).index(name))


def _kinds_of_tiles(q, k, random):
    """Tiles that are whole, partial and hidden, others for each of two heads; the second one has a row without any."""
    mask = random.random((1, 2, q.shape[1], k.shape[1])) < 0.3
    mask[:, 0, :BLOCK, :BLOCK] = mask[:, :, BLOCK:, -9:] = True
    mask[:, 0, BLOCK:, BLOCK : 2 * BLOCK] = mask[:, 1, :BLOCK] = False
    return BlockMask.from_array(mask)


def tile_cases(head_dim: int, *, quick: bool) -> Mapping[str, Case]:
    """Cases that cover all paths of a kernel's tile, in tiles of a mask of the default size, which kernels divide."""
    few, several = BLOCK + 9, 2 * BLOCK + 37  # queries and keys: one and two whole tiles, and part of another

    def window(q: Any, k: Any, random: Any) -> BlockMask:
        return BlockMask.sliding_window(q.shape[1], k.shape[1], (BLOCK // 2, 0), sinks=4)

    kinds = {"kinds_of_tiles": Case(shape=(1, few, several, 2, 1, head_dim), block_mask=_kinds_of_tiles)}
    if quick:
        return kinds
    return kinds | {
        "window_sinks_and_lengths": Case(
            shape=(2, few, several, 2, 2, head_dim * 5 // 8),
            block_mask=window,
            sinks=True,
            options=dict(
                is_causal=True,
                query_offset=[20, 0],
                key_value_seq_lengths=[several - 40, 17],
                query_seq_lengths=[few, 20],
            ),
        ),
    }
