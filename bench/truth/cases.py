"""Named attention cases for the oracle, the reference and the kernels: small, odd, and each for a reason."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfa import BlockMask

from . import oracle
from .numerics import rounding_to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes, and the options of jfa.dot_product_attention by name; arrays are generated from a seed.

    With a block_mask, of jfa.block_sparse_attention.
    """

    shape: tuple[int, int, int, int, int, int]  # batch, tq, tk, hq, hkv, head_dim
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    value_head_dim: int | None = None
    bias: tuple[int, int, int, int] | None = None
    mask: tuple[int, int, int, int] | None = None
    sinks: bool = False
    alibi: bool = False
    alibi_per_row: bool = False  # slopes [b, hq], steeper in each row than in the one before
    segments: int = 0  # documents packed into each row; 0: no segments
    dropout_rate: float = 0.0
    block_mask: Callable[[Any, Any, np.random.Generator], BlockMask] | None = None  # of query, key and random numbers


CASES = {
    "square": Case(shape=(1, 32, 32, 2, 2, 16)),
    "ragged_tiles": Case(shape=(2, 37, 53, 2, 2, 16)),
    "causal": Case(shape=(1, 37, 37, 2, 2, 16), options=dict(is_causal=True)),
    "more_queries_than_keys": Case(shape=(1, 40, 21, 2, 1, 16), options=dict(is_causal=True)),
    "gqa": Case(shape=(2, 33, 33, 6, 2, 16), options=dict(is_causal=True)),
    "mqa": Case(shape=(1, 20, 35, 5, 1, 32)),
    "head_dim_40": Case(shape=(1, 19, 23, 2, 1, 40), options=dict(is_causal=True)),
    "head_dim_80": Case(shape=(1, 19, 23, 2, 2, 80)),
    "head_dim_256": Case(shape=(1, 17, 33, 1, 1, 256), options=dict(is_causal=True)),
    "left_window": Case(shape=(1, 50, 50, 2, 2, 16), options=dict(is_causal=True, local_window_size=(9, 0))),
    "both_windows": Case(shape=(1, 45, 61, 2, 1, 16), options=dict(local_window_size=(20, 3))),
    "window_of_itself": Case(shape=(1, 20, 20, 1, 1, 16), options=dict(local_window_size=0)),
    "one_query_each": Case(shape=(3, 1, 70, 4, 2, 16), options=dict(is_causal=True, query_offset=[69, 0, 33])),
    "cached_chunk": Case(
        shape=(2, 18, 64, 4, 2, 16),
        options=dict(is_causal=True, query_offset=[40, 3], key_value_seq_lengths=[58, 21]),
    ),
    "offset_and_window": Case(
        shape=(2, 21, 64, 2, 1, 16),
        options=dict(is_causal=True, query_offset=[35, 0], local_window_size=(7, 2)),
    ),
    "lengths_with_empty_rows": Case(
        shape=(3, 20, 40, 2, 2, 16),
        options=dict(query_seq_lengths=[20, 7, 0], key_value_seq_lengths=[0, 33, 40]),
    ),
    "soft_cap": Case(shape=(1, 20, 40, 2, 2, 16), options=dict(logits_soft_cap=2.0, is_causal=True)),
    "negative_scale": Case(shape=(1, 20, 20, 2, 2, 16), options=dict(scale=-0.3, is_causal=True)),
    "zero_scale": Case(shape=(1, 20, 20, 2, 2, 16), options=dict(scale=0.0, is_causal=True)),
    "steep_scale": Case(shape=(1, 20, 40, 1, 1, 16), options=dict(scale=30.0)),
    "queries_before_all_keys": Case(shape=(1, 20, 20, 1, 1, 16), options=dict(is_causal=True, query_offset=[-5])),
    "bias": Case(shape=(2, 20, 37, 4, 2, 16), bias=(2, 4, 20, 37)),
    "bias_per_key": Case(shape=(2, 20, 37, 4, 2, 16), bias=(1, 1, 1, 37), options=dict(is_causal=True)),
    "bias_per_head": Case(shape=(2, 20, 37, 4, 2, 16), bias=(1, 4, 1, 1), options=dict(logits_soft_cap=3.0)),
    "mask": Case(shape=(2, 20, 37, 4, 2, 16), mask=(2, 1, 20, 37)),
    "mask_per_head": Case(shape=(1, 20, 37, 4, 2, 16), mask=(1, 4, 1, 37), bias=(1, 4, 20, 1)),
    "wide_values": Case(shape=(1, 19, 23, 2, 1, 16), value_head_dim=40, options=dict(is_causal=True)),
    "narrow_values": Case(shape=(1, 19, 23, 2, 1, 48), value_head_dim=32),
    "sinks": Case(shape=(1, 20, 37, 4, 2, 16), sinks=True, options=dict(is_causal=True, query_offset=[17])),
    "sinks_and_window": Case(
        shape=(2, 20, 37, 4, 2, 16),
        sinks=True,
        options=dict(is_causal=True, local_window_size=(5, 0), query_offset=[17, -3]),
    ),
    "alibi": Case(shape=(1, 20, 37, 4, 2, 16), alibi=True, options=dict(is_causal=True, query_offset=[17])),
    "alibi_both_ways_with_soft_cap": Case(shape=(1, 20, 37, 2, 2, 16), alibi=True, options=dict(logits_soft_cap=4.0)),
    "segments": Case(shape=(2, 50, 50, 2, 2, 16), segments=4, options=dict(is_causal=True)),
    "segments_and_gqa": Case(shape=(2, 37, 37, 4, 2, 16), segments=3),
    "segments_window_and_lengths": Case(
        shape=(2, 50, 50, 2, 1, 16),
        segments=3,
        options=dict(local_window_size=(6, 2), key_value_seq_lengths=[50, 31], query_seq_lengths=[41, 50]),
    ),
    "dropout": Case(shape=(2, 37, 37, 4, 2, 16), dropout_rate=0.3, options=dict(is_causal=True)),
    "dropout_and_bias": Case(shape=(1, 20, 37, 2, 1, 16), dropout_rate=0.5, bias=(1, 2, 1, 37)),
    "broadcast_dropout": Case(shape=(2, 20, 37, 2, 2, 16), dropout_rate=0.4, options=dict(broadcast_dropout=True)),
    "everything": Case(
        shape=(2, 21, 40, 4, 2, 24),
        value_head_dim=16,
        bias=(1, 4, 1, 40),
        mask=(2, 1, 21, 40),
        sinks=True,
        alibi=True,
        segments=2,
        dropout_rate=0.2,
        options=dict(is_causal=True, logits_soft_cap=3.0, query_offset=[19, 5], local_window_size=(30, 4)),
    ),
    "left_unlimited": Case(shape=(1, 45, 61, 2, 1, 16), options=dict(local_window_size=(None, 3), query_offset=[7])),
    "right_unlimited": Case(shape=(1, 45, 61, 2, 1, 16), options=dict(local_window_size=(4, None))),
    "both_unlimited": Case(shape=(1, 20, 37, 2, 1, 16), options=dict(local_window_size=(None, None))),
    "alibi_per_row": Case(shape=(3, 20, 37, 4, 2, 16), alibi_per_row=True, options=dict(is_causal=True)),
    "alibi_of_one_row": Case(shape=(1, 20, 37, 2, 1, 16), alibi_per_row=True, bias=(1, 2, 1, 37)),
}

_ORACLE_NAMES = {
    "is_causal": "causal",
    "local_window_size": "window",
    "logits_soft_cap": "softcap",
    "query_seq_lengths": "q_len",
    "key_value_seq_lengths": "kv_len",
    "query_offset": "q_offset",
    "query_segment_ids": "q_segments",
    "key_value_segment_ids": "kv_segments",
}


# The differentiable arguments of jfa.dot_product_attention: their names there and in the oracle.
GRADIENTS = {
    "query": "q",
    "key": "k",
    "value": "v",
    "bias": "bias",
    "sinks": "sinks",
    "alibi_slopes": "alibi_slopes",
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """The inputs of a case, the oracle's result, and that of the plain formula with the dtype's rounding."""

    arrays: tuple  # q, k, v
    options: dict[str, Any]  # of the op, including arrays
    out: np.ndarray
    lse: np.ndarray
    plain_out: np.ndarray
    plain_lse: np.ndarray
    d_out: np.ndarray  # cotangent of out, in the dtype
    d_lse: np.ndarray
    named: dict[str, Any]  # the options with the oracle's names
    op: str  # of jfa

    @functools.cached_property
    def gradients(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The gradients by name in GRADIENTS: (of the oracle, of the plain formula)."""
        rounding = rounding_to(self.arrays[0].dtype)
        q, k, v = self.arrays
        exact = oracle.gradients(q, k, v, self.d_out, self.d_lse, **self.named)
        plain = oracle.gradients(q, k, v, self.d_out, self.d_lse, **self.named, rounding=rounding)
        return {name: (exact[short], plain[short]) for name, short in GRADIENTS.items() if short in exact}


@functools.cache
def truth(name: str, dtype: str) -> Truth:
    """Seeded inputs of a case of CASES in a dtype, and the expected results."""
    return truth_of(CASES[name], dtype, seed=list(CASES).index(name))


def truth_of(case: Case, dtype: str, *, seed: int) -> Truth:
    """Seeded inputs of a case in a dtype, and the expected results."""
    b, tq, tk, hq, hkv, d = case.shape
    dv = case.value_head_dim or d
    random = np.random.default_rng(seed)
    shapes = ((b, tq, hq, d), (b, tk, hkv, d), (b, tk, hkv, dv))
    q, k, v = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    options = {key: np.asarray(x, np.int32) if isinstance(x, list) else x for key, x in case.options.items()}
    block_mask = case.block_mask and case.block_mask(q, k, random)
    if case.bias:
        options["bias"] = jnp.asarray(random.standard_normal(case.bias), dtype)
    if case.mask:
        options["mask"] = random.random(case.mask) < 0.6
    if case.sinks:
        options["sinks"] = jnp.asarray(random.standard_normal(hq) * 2, jnp.float32)
    if case.alibi or case.alibi_per_row:
        slopes = 2.0 ** -np.arange(1, hq + 1)
        options["alibi_slopes"] = jnp.asarray(
            np.arange(1, b + 1)[:, None] * slopes if case.alibi_per_row else slopes, jnp.float32
        )
    if case.segments:
        # query and key documents end at different positions, and no query sees the last key document
        options["query_segment_ids"] = _packed(random, b, tq, case.segments)
        options["key_value_segment_ids"] = _packed(random, b, tk, case.segments + 1)
    named: dict[str, Any] = {_ORACLE_NAMES.get(key, key): x for key, x in options.items()}
    if case.dropout_rate:
        key = jax.random.key(seed)
        options |= {"dropout_rate": case.dropout_rate, "dropout_key": key}
        # the same words that ops.dot_product_attention generates from a key
        seed_words = np.asarray(jax.random.bits(key, (2,), jnp.uint32))
        named |= {"dropout_rate": case.dropout_rate, "dropout_seed": seed_words}
    if block_mask is not None:
        options["block_mask"], named["mask"] = block_mask, np.asarray(block_mask.to_array())
    named.setdefault("scale", d**-0.5)
    if isinstance(named.get("window"), int):
        named["window"] = (named["window"],) * 2
    out, lse = oracle.attention(q, k, v, **named)
    plain_out, plain_lse = oracle.attention(q, k, v, **named, rounding=rounding_to(q.dtype))
    d_out = np.asarray(jnp.asarray(random.standard_normal(out.shape), dtype))
    d_lse = random.standard_normal(lse.shape).astype(np.float32)
    op = "dot_product_attention" if block_mask is None else "block_sparse_attention"
    return Truth((q, k, v), options, out, lse, plain_out, plain_lse, d_out, d_lse, named, op)


def _packed(random: np.random.Generator, batch: int, length: int, documents: int) -> np.ndarray:
    """i32[batch, length]: the segment ids of packed documents of random lengths."""
    return np.sort(random.integers(0, documents, (batch, length)), axis=1).astype(np.int32)
