"""Named cases of attention that every leg (oracle, reference, kernels) runs: small, odd, and each for a reason."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
from numerics import rounded_plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes, and the options of jfa.dot_product_attention by name."""

    shape: tuple[int, int, int, int, int, int]  # batch, tq, tk, hq, hkv, head_dim
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    bias: tuple[int, int, int, int] | None = None
    mask: tuple[int, int, int, int] | None = None

    @property
    def needs_scores(self) -> bool:
        """Whether it reads an array of the scores' shape, which the Triton kernel does not do yet."""
        return self.bias is not None or self.mask is not None


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
}

_ORACLE_NAMES = {
    "is_causal": "causal",
    "local_window_size": "window",
    "logits_soft_cap": "softcap",
    "query_seq_lengths": "q_len",
    "key_value_seq_lengths": "kv_len",
    "query_offset": "q_offset",
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """The inputs of a case, the oracle's answer, and that of the plain formula in the dtype's rounding."""

    arrays: tuple  # q, k, v
    options: dict[str, Any]  # of jfa.dot_product_attention, arrays included
    out: np.ndarray
    lse: np.ndarray
    plain_out: np.ndarray
    plain_lse: np.ndarray


@functools.cache
def truth(name: str, dtype: str) -> Truth:
    """Seeded inputs of a case in a dtype, and what should come out."""
    case = CASES[name]
    b, tq, tk, hq, hkv, d = case.shape
    random = np.random.default_rng(list(CASES).index(name))
    shapes = ((b, tq, hq, d), (b, tk, hkv, d), (b, tk, hkv, d))
    q, k, v = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    options = {key: np.asarray(x, np.int32) if isinstance(x, list) else x for key, x in case.options.items()}
    if case.bias:
        options["bias"] = jnp.asarray(random.standard_normal(case.bias), dtype)
    if case.mask:
        options["mask"] = random.random(case.mask) < 0.6
    named = {_ORACLE_NAMES.get(key, key): x for key, x in options.items()}
    named.setdefault("scale", d**-0.5)
    if isinstance(named.get("window"), int):
        named["window"] = (named["window"],) * 2
    out, lse = oracle.attention(q, k, v, **named)
    plain_out, plain_lse = rounded_plain(q, k, v, dtype=jnp.dtype(dtype), **named)
    return Truth((q, k, v), options, out, lse, plain_out, plain_lse)
