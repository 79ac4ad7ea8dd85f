"""The parts of a decoder that are not attention. Modules hold parameters only; weights lie [out, in] as on disk."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jfa_models.config import DecoderConfig

_normal = jax.nn.initializers.normal(0.02)


class Linear(nnx.Module):
    """x weight^T + bias."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs.params(), (out_features, in_features), dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, dtype)) if bias else None

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        y = _times_rows(x, self.weight[...])
        return y if self.bias is None else y + self.bias[...]


class Embedding(nnx.Module):
    """Token id to vector, and, where the head is tied, vector to logits."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(_normal(rngs.params(), (vocab_size, hidden_size), dtype))

    def __call__(self, tokens: Int[Array, "*b"]) -> Float[Array, "*b hidden"]:
        return self.weight[...][tokens]

    def attend(self, x: Float[Array, "*b hidden"]) -> Float[Array, "*b vocab"]:
        return _times_rows(x, self.weight[...])


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32, returned in the dtype of x.

    Source: arXiv:1910.07467.
    """

    def __init__(self, size: int, *, eps: float, dtype: DTypeLike):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: Float[Array, "*b size"]) -> Float[Array, "*b size"]:
        wide = x.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return wide.astype(x.dtype) * self.scale[...]


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)).

    Source: arXiv:2002.05202.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden, inner = config.hidden_size, config.intermediate_size
        linear = functools.partial(Linear, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate = linear(hidden, inner)
        self.up = linear(hidden, inner)
        self.down = linear(inner, hidden)

    def __call__(self, x: Float[Array, "*b hidden"]) -> Float[Array, "*b hidden"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def _times_rows(x: Float[Array, "*b in"], weight: Float[Array, "out in"]) -> Float[Array, "*b out"]:
    """x weight^T. Contracting the last axis of both reads the weight as it lies; no transposed copy is made."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
