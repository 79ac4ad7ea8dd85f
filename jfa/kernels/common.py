"""What kernels of several dialects share: sizes of a call, outputs, terms of the backward pass, tiles of segments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jfa.block_mask import extremes
from jfa.types import Operands


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a call, in elements."""

    b: int
    tq: int
    tk: int
    hq: int
    hkv: int
    d: int
    dv: int

    @classmethod
    def of(cls, operands: Operands) -> "Shape":
        b, tq, hq, d = operands.q.shape
        return cls(b=b, tq=tq, tk=operands.k.shape[1], hq=hq, hkv=operands.k.shape[2], d=d, dv=operands.v.shape[3])

    @property
    def g(self) -> int:
        """Query heads per key head."""
        return self.hq // self.hkv


def output(shape: tuple[int, ...], dtype: Any, *, like: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a kernel's output; inside shard_map it varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def row_terms(operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array) -> tuple[Array, ...]:
    """(d_out, lse, delta, cotangent of the sinks or None) that a backward pass needs of each row.

    Rows that saw no key have no gradient: their d_out is 0 and their lse inf, and their q may contain anything.
    """
    empty = lse == -jnp.inf
    delta = jnp.where(empty, 0.0, (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1))
    d_out = jnp.where(empty[..., None], 0, d_out)
    d_sinks: Any = None
    if operands.sinks is not None:
        # lse gives the weights without the sink, which scales the weights of a row by `left`. Scale the cotangent
        # instead, so that no factor exceeds 1, however large the sink
        sinks = operands.sinks.astype(jnp.float32)
        left = jnp.where(empty, 0.0, jax.nn.sigmoid(jnp.where(empty, 0.0, lse) - sinks))
        d_sinks = -((1.0 - left) * delta).sum((0, 1)).astype(operands.sinks.dtype)
        d_out, delta = (d_out * left[..., None]).astype(d_out.dtype), delta * left
    delta = delta - jnp.where(empty, 0.0, d_lse)
    return d_out, jnp.where(empty, jnp.inf, lse), delta, d_sinks  # exp(score - inf) = 0


def tiles_in_common(
    first: Int[Array, "b t"], second: Int[Array, "b u"], block: int, other_block: int
) -> Int[Array, "b n 2"]:
    """For each tile of `first`, the range [from, to) of tiles of `second` that may contain one of its segments."""
    low, high = extremes(first, block)
    other_low, other_high = extremes(second, other_block)
    meets = (other_low[:, None] <= high[:, :, None]) & (other_high[:, None] >= low[:, :, None])
    num = meets.shape[2]
    begin = jnp.where(meets.any(2), meets.argmax(2), 0)
    end = jnp.where(meets.any(2), num - jnp.flip(meets, 2).argmax(2), 0)
    return jnp.stack([begin, end], axis=2).astype(jnp.int32)
