"""Attention by the plain formula, with all scores in memory: the reference that kernels are tested against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jfa import dropout
from jfa.types import AttentionSpec, Operands


def attention(operands: Operands, *, spec: AttentionSpec) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """softmax(softcap(scale * q k^T + bias)) v over the visible keys, and the natural log-sum-exp of the scores.

    Sinks are added to the softmax's denominator but not to the log-sum-exp; dropout is applied after the softmax.

    Inputs are cast to float32 and the output is rounded once, to the dtype of q. A row that sees no key returns zeros
    and -inf. Differentiable in forward and reverse mode.

    Source: arXiv:1706.03762, section 3.2.1; log-sum-exp: arXiv:2307.08691, section 3.1.1.
    """
    q, k, v, bias, *_ = operands
    b, tq, hq, d = q.shape
    tk, hkv, g = k.shape[1], k.shape[2], operands.group_size
    visible = _visible(operands, spec)
    # keys and values that no query sees may contain anything, and 0 * NaN is NaN: replace them by zeros
    seen = visible.reshape(b, hkv, g, tq, tk).any(axis=(2, 3)).swapaxes(1, 2)[..., None]
    sees = visible.any(axis=3).swapaxes(1, 2)[..., None]
    q = jnp.where(sees, q.astype(jnp.float32), 0.0).reshape(b, tq, hkv, g, d)
    k = jnp.where(seen, k.astype(jnp.float32), 0.0)
    v = jnp.where(seen, v.astype(jnp.float32), 0.0)
    scores = spec.sm_scale * jnp.einsum("bqhgd,bkhd->bhgqk", q, k, precision="highest").reshape(b, hq, tq, tk)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if operands.alibi_slopes is not None:
        distance = jnp.abs(_position(operands) - jnp.arange(tk)).astype(jnp.float32)
        scores = scores - operands.alibi_slopes.astype(jnp.float32)[:, :, None, None] * distance
    if spec.softcap is not None:
        # a bias may be NaN at masked positions, which would make the derivative of tanh NaN
        scores = spec.softcap * jnp.tanh(jnp.where(visible, scores, 0.0) / spec.softcap)
    scores = jnp.where(visible, scores, -jnp.inf)
    m = jax.lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    p = jnp.exp(scores - jnp.where(m == -jnp.inf, 0.0, m))
    l = p.sum(-1, keepdims=True)
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    p = p / l
    if operands.sinks is not None:
        sink = operands.sinks.astype(jnp.float32)[:, None, None]
        with_sink = jnp.logaddexp(jnp.where(empty, 0.0, m + jnp.log(l)), sink)
        p = jnp.exp(scores - with_sink)
    if operands.dropout_seed is not None:
        batch, head = jnp.arange(b)[:, None, None, None], jnp.arange(hq)[:, None, None]
        seed = dropout.row_seed(operands.dropout_seed, batch, head, broadcast=spec.broadcast_dropout)
        kept = dropout.keep(seed, jnp.arange(tq)[:, None], jnp.arange(tk), rate=spec.dropout_rate)
        p = jnp.where(kept, p / (1.0 - spec.dropout_rate), 0.0)
    p = p.reshape(b, hkv, g, tq, tk)
    out = jnp.einsum("bhgqk,bkhd->bqhgd", p, v, precision="highest").reshape(b, tq, hq, v.shape[3])
    lse = jnp.where(empty, -jnp.inf, m + jnp.log(l))
    return out.astype(operands.q.dtype), lse[..., 0].swapaxes(1, 2)


def _visible(operands: Operands, spec: AttentionSpec) -> Bool[Array, "b hq tq tk"]:
    b, tq, hq, _ = operands.q.shape
    tk = operands.k.shape[1]
    row = jnp.arange(tq)[None, None, :, None]
    key = jnp.arange(tk)[None, None, None, :]
    position = _position(operands)
    visible = jnp.ones((b, hq, tq, tk), bool)
    if spec.left is not None:
        visible &= key >= position - spec.left
    if spec.right is not None:
        visible &= key <= position + spec.right
    if operands.q_len is not None:
        visible &= row < operands.q_len[:, None, None, None]
    if operands.kv_len is not None:
        visible &= key < operands.kv_len[:, None, None, None]
    if operands.mask is not None:
        visible &= operands.mask
    if operands.q_segments is not None and operands.kv_segments is not None:
        visible &= operands.q_segments[:, None, :, None] == operands.kv_segments[:, None, None, :]
    return visible


def _position(operands: Operands) -> Int[Array, "#b 1 tq 1"]:
    """The position of each query among the keys."""
    row = jnp.arange(operands.q.shape[1])[None, None, :, None]
    return row if operands.q_offset is None else row + operands.q_offset[:, None, None, None]
