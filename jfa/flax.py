"""Use jfa's attention in the attention layers of Flax, NNX or Linen."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from jfa.ops import dot_product_attention
from jfa.types import UnsupportedError


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: object = None,
    module: object | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = True,
    qk_attn_weights_einsum: object | None = None,
    attn_weights_value_einsum: object | None = None,
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    implementation=None,
) -> Array:
    """The attention_fn of a Flax layer: nnx.MultiHeadAttention(..., attention_fn=jfa.flax.attention_fn).

    Also works with flax.linen.MultiHeadDotProductAttention. Use functools.partial to set the keyword-only options,
    which have the same meaning as in jfa.dot_product_attention.

    Args:
      query, key, value: [batch..., length, heads, head_dim], any number of batch axes; key and value may have fewer
        heads.
      bias, mask: broadcast to [batch..., heads, query length, key length]; in a numeric mask, nonzero means True.
      broadcast_dropout: drop the same weights in all batch rows and heads.
      dtype: dtype of the computation and the output; None: the promoted dtype of query, key and value.
      precision: any that asks for no more than jfa's kernels always give: products of float32 inputs have float32
        precision, those of 16-bit inputs are exact and summed in float32.
      force_fp32_for_softmax: has no effect; the softmax is always computed in float32.

    Raises:
      ValueError: active dropout without a dropout_rng, or other batch axes in key or value than in query.
      UnsupportedError: sow_weights (the weights are never stored), a custom einsum, or another precision.
    """
    if not _is_met(precision):
        raise UnsupportedError(
            f"precision={precision} is not supported: products have float32 precision, those of 16-bit numbers are "
            "summed in float32; use precision=None"
        )
    if module is not None:
        raise UnsupportedError("sow_weights is not supported: the attention weights are never stored; set it to False")
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise UnsupportedError(
            "custom einsum classes are not supported: a kernel computes the products; do not set them in the layer"
        )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    for name, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim or x.shape[:-3] != batch:
            raise ValueError(
                f"query, key and value must have the same batch axes before [length, heads, head_dim], got "
                f"{list(query.shape)} and {name} {list(x.shape)}; repeat with jnp.broadcast_to"
            )

    def one_batch_axis(x: Array) -> Array:
        """[batch..., ., ., .] -> [prod(batch), ., ., .]; axes of ones stay one."""
        x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
        if len(batch) > 1 and x.shape[:-3] != batch and math.prod(x.shape[:-3]) > 1:
            x = jnp.broadcast_to(x, batch + x.shape[-3:])
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    out = dot_product_attention(
        *(one_batch_axis(x) for x in (query, key, value)),
        bias=None if bias is None else one_batch_axis(bias),
        mask=None if mask is None else one_batch_axis(jnp.asarray(mask).astype(bool)),
        scale=scale,
        is_causal=is_causal,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        implementation=implementation,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=0.0 if deterministic else dropout_rate,
        dropout_key=dropout_rng,
        broadcast_dropout=broadcast_dropout,
    )
    return out.reshape(*batch, *out.shape[1:])


def _is_met(precision: object) -> bool:
    """Whether float32 products, or exact products of 16-bit numbers summed in float32, are as precise as this."""
    if isinstance(precision, tuple | list):
        return len(precision) == 2 and not any(isinstance(one, tuple | list) or not _is_met(one) for one in precision)
    if isinstance(precision, str):
        precision = jax.lax.DotAlgorithmPreset.__members__.get(precision, precision)
    if isinstance(precision, jax.lax.DotAlgorithmPreset):
        return "F64" not in precision.name
    if precision is None or isinstance(precision, jax.lax.Precision):
        return True
    try:
        return isinstance(precision, str) and jax.lax.Precision(precision) is not None
    except ValueError:
        return False
