"""What dot_product_attention refuses, and with which message."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa

Q = jnp.ones((2, 5, 6, 16))
KV = jnp.ones((2, 7, 3, 16))
FLASH = jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1)

WRONG = {
    "rank": (dict(query=Q[0, 0]), r"query must be \[batch, length, heads, head_dim\].* got shape \(6, 16\)"),
    "dtype": (dict(query=Q.astype(jnp.int32)), "query must be float16, bfloat16 or float32, got int32"),
    "dtypes": (dict(key=KV.astype(jnp.bfloat16)), "must share one dtype, got float32, bfloat16 and float32"),
    "value_shape": (dict(value=KV[:, :6]), r"same shape except .* got \(2, 7, 3, 16\) and \(2, 6, 3, 16\)"),
    "batch": (dict(query=Q[:1]), "same batch size, got 1 and 2"),
    "head_dim": (dict(query=Q[..., :8]), "same head_dim, got 8 and 16"),
    "no_head_dim": (dict(query=Q[..., :0], key=KV[..., :0], value=KV[..., :0]), "head_dim must be at least 1"),
    "heads": (dict(query=Q[:, :, :4]), "multiple of the number of key heads, got 4 and 3; repeat or drop"),
    "bias_shape": (dict(bias=jnp.ones((2, 6, 5, 6))), r"= \[2, 6, 5, 7\], got \[2, 6, 5, 6\]"),
    "bias_dtype": (
        dict(bias=jnp.ones((5, 7), bool)),
        "must be a float array, got bool; pass a boolean mask as mask",
    ),
    "bias_float64": (dict(bias=jnp.ones((5, 7), jnp.int8)), "bias must be float16, bfloat16 or float32, got int8"),
    "mask_dtype": (dict(mask=jnp.ones((5, 7))), "mask must be boolean, got float32; pass an additive mask as bias"),
    "mask_rank": (dict(mask=jnp.ones((1, 2, 6, 5, 7), bool)), "mask must broadcast to"),
    "lengths_dtype": (
        dict(key_value_seq_lengths=jnp.ones(2)),
        "key_value_seq_lengths must contain integers, got float32",
    ),
    "lengths_shape": (dict(query_seq_lengths=jnp.ones(3, int)), r"one integer per batch row, shape \(2,\), got \(3,\)"),
    "offset": (dict(query_offset=jnp.ones((2, 1), int)), "query_offset must contain one integer per batch row"),
    "window": (dict(local_window_size=(-1, 0)), r"both must be >= 0, or None for all .* got \(-1, 0\)"),
    "window_kind": (dict(local_window_size=(1, 2, 3)), r"a pair \(left, right\) of ints or None, got \(1, 2, 3\)"),
    "window_float": (dict(local_window_size=2.5), r"a pair \(left, right\) of ints or None, got 2.5"),
    "mixed_rank": (dict(query=Q[0]), r"query must be .* key and value all without batch\), got shape \(5, 6, 16\)"),
    "scale": (dict(scale=float("nan")), "scale must be a finite number, got nan"),
    "soft_cap": (dict(logits_soft_cap=0.0), "logits_soft_cap must be a finite number > 0, got 0.0"),
    "implementation": (dict(implementation="cudnn"), "one of reference, xla, triton, tpu, mosaic_gpu, got 'cudnn'"),
    "sinks_shape": (dict(sinks=jnp.ones(3)), r"sinks must contain one number per query head, shape \(6,\), got \(3,\)"),
    "slopes_shape": (
        dict(alibi_slopes=jnp.ones((3, 6))),
        r"one number per query head, shape \(6,\), or per row and query head, shape \(2, 6\), got \(3, 6\)",
    ),
    "slopes_dtype": (dict(alibi_slopes=jnp.ones(6, int)), "alibi_slopes must be float16, bfloat16 or float32, got int"),
    "half_of_the_segments": (
        dict(query_segment_ids=jnp.ones((2, 5), int)),
        "key_value_segment_ids is missing: pass the segment ids of both queries and keys, or neither",
    ),
    "segments_shape": (
        dict(query_segment_ids=jnp.ones((2, 5), int), key_value_segment_ids=jnp.ones((2, 5), int)),
        r"key_value_segment_ids must contain one integer per position, shape \(2, 7\), got \(2, 5\)",
    ),
    "segments_dtype": (
        dict(query_segment_ids=jnp.ones((2, 5)), key_value_segment_ids=jnp.ones((2, 7), int)),
        "query_segment_ids must contain integers, got float32",
    ),
    "segments_of_64_bits": (
        dict(query_segment_ids=np.full((2, 5), 2**40), key_value_segment_ids=np.ones((2, 7), int)),
        "query_segment_ids must fit into 32 bits, got 1099511627776 to 1099511627776; number the documents from 0",
    ),
    "negative_dropout": (dict(dropout_rate=-0.1), r"dropout_rate must be >= 0 and < 1, got -0\.1"),
    "dropout_of_all": (
        dict(dropout_rate=1.0, dropout_key=jax.random.key(0)),
        "dropout_rate must be >= 0 and < 1, got 1.0",
    ),
    "dropout_without_key": (dict(dropout_rate=0.1), r"dropout_rate=0.1 needs a dropout_key: jax.random.key\(seed\)"),
    "config_kind": (dict(implementation="xla", config=FLASH), "xla backend takes a BlockConfig, got a FlashConfig"),
    "config_none": (dict(implementation="reference", config=FLASH), "reference backend takes no config"),
}


UNSERVED = {
    "tpu": (
        dict(implementation="tpu", bias=jnp.ones((5, 7))),
        "implementation='tpu': the TPU kernel has no bias yet; leave it None to let jfa choose",
    ),
    "mosaic": (dict(implementation="mosaic_gpu"), "the Mosaic GPU kernel is not implemented yet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_arguments_raise_value_error(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jfa.dot_product_attention(**(dict(query=Q, key=KV, value=KV) | given))


@pytest.mark.parametrize("name", UNSERVED)
def test_a_requested_backend_that_does_not_support_the_call_says_why(name):
    given, message = UNSERVED[name]
    with pytest.raises(jfa.UnsupportedError, match=message):
        jfa.dot_product_attention(Q, KV, KV, **(dict(implementation="triton") | given))


@pytest.mark.parametrize("head_dim", [8, 320])
def test_head_dims_that_the_kernel_does_not_support(head_dim):
    x = jnp.ones((1, 4, 1, head_dim))
    with pytest.raises(jfa.UnsupportedError, match=f"head_dim must be 16 to 256, got {head_dim}"):
        jfa.dot_product_attention(x, x, x, implementation="triton")
    assert jfa.dot_product_attention(x, x, x).shape == x.shape  # without a requested backend, jfa uses xla


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_q=48), "block_q must be a power of two of at least 16, .* got 48"),
        (dict(block_kv=8), "block_kv must be a power of two of at least 16, .* got 8"),
        (dict(num_warps=3), "num_warps must be 1, 2, 4, 8 or 16, got 3"),
        (dict(num_stages=0), "num_stages must be >= 1, got 0"),
        (dict(block_d=24), "block_d must be a power of two of at least 16, .* got 24"),
    ],
)
def test_invalid_tiles(fields, message):
    with pytest.raises(ValueError, match=message):
        jfa.FlashConfig(**(dict(block_q=16, block_kv=16, num_warps=4, num_stages=1) | fields))


def test_invalid_blocks():
    with pytest.raises(ValueError, match="block_q and block_kv must be >= 1, got 0 and 4"):
        jfa.BlockConfig(block_q=0, block_kv=4)
    with pytest.raises(ValueError, match="strips and heads must be >= 1, got 1 and 0; heads=None means all"):
        jfa.BlockConfig(block_q=4, block_kv=4, heads=0)


def test_without_a_backend_the_error_has_every_reason(monkeypatch):
    monkeypatch.setattr("jfa.backends.PREFERENCE", {"cpu": ("triton",)})
    message = "no backend supports this call on cpu:\n  triton: the head_dim of value must be 16 to 256, got 8"
    with pytest.raises(jfa.UnsupportedError, match=message):
        jfa.dot_product_attention(Q, KV, KV[..., :8])
