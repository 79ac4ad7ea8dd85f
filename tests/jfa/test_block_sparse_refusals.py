"""What BlockMask and block_sparse_attention refuse, and with which message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa
from jfa import BlockMask

Q = jnp.ones((2, 5, 6, 16))
KV = jnp.ones((2, 7, 3, 16))
MASK = BlockMask.sliding_window(5, 7, 2, block_q=16, block_kv=16)
ODD_TILES = BlockMask.sliding_window(5, 7, 2, block_q=24, block_kv=16)
TRITON = dict(implementation="triton")

WRONG = {
    "lengths": (
        dict(block_mask=BlockMask.sliding_window(4096, 4096, 2)),
        "block_mask has tiles of 128 by 128 for 4096 queries and 4096 keys, got 5 and 7; make it for these lengths, or "
        "pad query, key and value and pass key_value_seq_lengths",
    ),
    "heads": (
        dict(block_mask=BlockMask.from_array(np.ones((2, 4, 5, 7), bool))),
        "block_mask is for 2 batch rows and 4 heads, got 2 rows and 6 query heads; make it for these numbers, or for 1",
    ),
    "batch": (
        dict(block_mask=BlockMask.from_array(np.ones((3, 1, 5, 7), bool))),
        "for 3 batch rows and 1 heads, got 2",
    ),
    "array": (
        dict(block_mask=np.ones((5, 7), bool)),
        "block_mask must be a jfa.BlockMask, got a ndarray; make it with BlockMask.from_array or another",
    ),
    "rank": (dict(query=Q[0, 0]), r"query must be \[batch, length, heads, head_dim\].* got shape \(6, 16\)"),
    "bias": (dict(bias=jnp.ones((2, 6, 5, 6))), r"= \[2, 6, 5, 7\], got \[2, 6, 5, 6\]"),
    "soft_cap": (dict(logits_soft_cap=0.0), "logits_soft_cap must be a finite number > 0, got 0.0"),
    "implementation": (dict(implementation="flex"), "one of reference, xla, triton, tpu, mosaic_gpu, got 'flex'"),
    "config": (
        dict(implementation="xla", config=jfa.BlockConfig(block_q=16, block_kv=16)),
        "the xla backend takes no config, got a BlockConfig",
    ),
    "config_of_triton": (
        dict(config=jfa.BlockConfig(block_q=16, block_kv=16)) | TRITON,
        "the triton backend takes a FlashConfig, got a BlockConfig",
    ),
}
UNSERVED = {
    "tiles": (
        dict(block_mask=ODD_TILES) | TRITON,
        "the mask's block_q must be a power of two of at least 16, the smallest matrix tile, got 24; leave it None",
    ),
    "head_dim": (dict(query=Q[..., :8], key=KV[..., :8]) | TRITON, "head_dim must be 16 to 256, got 8"),
    "tpu": (dict(implementation="tpu"), "there is no TPU kernel for block-sparse attention yet"),
}
MASKS = {
    "no_queries": (lambda: BlockMask.sliding_window(0, 7, 2), "tq must be an integer >= 1, got 0"),
    "no_block": (lambda: BlockMask.from_array(MASK.to_array(), block_kv=0), "block_kv must be an integer >= 1, got 0"),
    "array_dtype": (
        lambda: BlockMask.from_array(np.ones((5, 7))),
        r"mask must be a boolean array \[batch, heads, queries, keys\], got float64 of shape \(5, 7\)",
    ),
    "array_rank": (lambda: BlockMask.from_array(np.ones(7, bool)), r"got bool of shape \(7,\)"),
    "window": (lambda: BlockMask.sliding_window(5, 7, (-1, 0)), r"window and sinks must be >= 0, got \(-1, 0\) and 0"),
    "window_of_three": (
        lambda: BlockMask.sliding_window(5, 7, (1, 2, 3)),
        r"a pair \(left, right\) .*, got \(1, 2, 3\)",
    ),
    "window_of_half": (lambda: BlockMask.sliding_window(5, 7, 2.5), "window must be an integer or .*, got 2.5 and 0"),
    "sinks": (lambda: BlockMask.sliding_window(5, 7, 2, sinks=-1), "window and sinks must be >= 0, got 2 and -1"),
    "segments": (
        lambda: BlockMask.from_segments(np.ones((2, 5), int), np.ones((3, 7), int)),
        r"key_value_segment_ids must contain one integer per position, shape \(2, positions\), got int64 .* \(3, 7\)",
    ),
    "segments_dtype": (lambda: BlockMask.from_segments(np.ones(5)), "query_segment_ids must .*, got float64 of shape"),
    "tiles": (
        lambda: BlockMask.from_tiles(np.ones((2, 2), bool), 300, 200),
        r"300 queries and 200 keys in tiles of 128 by 128 need a boolean grid \[.., .., 3, 2\], got bool .* \(2, 2\)",
    ),
    "bigbird": (
        lambda: BlockMask.bigbird(300, 300, window=2),
        "window must be an odd number of tiles, num_global and num_random must be >= 0, got 2, 1 and 1",
    ),
    "top_k_of_a_half": (lambda: BlockMask.top_k(Q, KV, 0.5), "k must be 1 to 1, .*, got 0.5"),
    "top_k": (lambda: BlockMask.top_k(Q, KV, 2), "k must be 1 to 1, the number of tiles of 7 keys, .*, got 2"),
    "top_k_of_other_tiles": (
        lambda: BlockMask.top_k(Q, KV, np.array([1, 1])),
        r"for all 1 tiles of queries or for each one, got \[1 1\]",
    ),
    "traced_array": (
        lambda: jax.jit(BlockMask.from_array)(np.ones((5, 7), bool)),
        "mask is traced: make an exact BlockMask outside of jit and pass it as an argument",
    ),
    "traced_segments": (lambda: jax.jit(BlockMask.from_segments)(np.ones(5, int)), "query_segment_ids is traced"),
}


def call(given):
    return jfa.block_sparse_attention(**(dict(query=Q, key=KV, value=KV, block_mask=MASK) | given))


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_raise_value_error(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(given)


@pytest.mark.parametrize("name", UNSERVED)
def test_a_requested_backend_that_does_not_support_the_call_says_why(name):
    given, message = UNSERVED[name]
    with pytest.raises(jfa.UnsupportedError, match=message):
        call(given)


def test_tiles_that_a_kernel_does_not_support_use_another_backend(monkeypatch):
    monkeypatch.setattr("jfa.backends.PREFERENCE", {"cpu": ("triton", "xla")})
    assert call(dict(block_mask=ODD_TILES)).shape == Q.shape


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_cannot_be_made(name):
    make, message = MASKS[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_symbolic_batch_size():
    [b] = jax.export.symbolic_shape("b")
    q, kv = (jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype) for x in (Q, KV))
    with pytest.raises(ValueError, match=r"block_sparse_attention needs static shapes, got .*; export each shape"):
        jax.export.export(jax.jit(lambda q, kv: jfa.block_sparse_attention(q, kv, kv, MASK)))(q, kv)
