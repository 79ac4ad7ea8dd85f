"""Rotation of new queries and keys, and the write of keys and values into a cache, as one kernel.

A decode step on a GPU spends much of its time on launches: XLA takes one for the rotation, one for each array of the
cache, and three more to quantize. Only the triton backend has the kernel; with the others, a model's rotation and the
write of a cache are operations of their own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int, Shaped

from jfa import backends
from jfa.backends.interface import WriteBackend
from jfa.device import probe
from jfa.quant import QuantizedArray
from jfa.rules import compiled, with_default_rules
from jfa.types import DeviceInfo, Implementation, WriteOperands

Slots = Shaped[Array, "rows slots *heads"] | QuantizedArray  # of a layer of a cache: in rows, or in pages

_MAX_TOKENS = 256  # a longer step is a prefill chunk, whose products XLA does not merge: qkv would be a copy


def serves(
    qkv: Float[Array, "n heads*d"], keys: Slots, values: Slots, *, head_dim: int, implementation: Implementation | None
) -> bool:
    """Whether rotate_and_write supports a call, and a step is faster with it. Arrays, or their shapes."""
    device = probe()
    backend = backends.write(implementation, device)
    if backend is None or not 0 < qkv.shape[0] <= _MAX_TOKENS:
        return False
    of_cache = [_leaf(x) for x in (keys, values)]
    if any(kind != AxisType.Manual for x in of_cache for kind in jax.typeof(x).sharding.mesh.axis_types):
        return False  # the kernel has no rule for an array that is divided
    angles: Any = jax.ShapeDtypeStruct((qkv.shape[0], head_dim // 2), jnp.float32)
    return backend.why_not(WriteOperands(qkv, angles, angles, angles, *of_cache), head_dim, device) is None


@with_default_rules
def rotate_and_write(
    qkv: Float[Array, "n heads*d"],
    cos: Float[Array, "n half"],
    sin: Float[Array, "n half"],
    slots: Int[Array, " n"],
    keys: Slots,
    values: Slots,
    *,
    head_dim: int,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "n hq d"], Slots, Slots]:
    """Rotated queries, and a layer of a cache with the new tokens. Donate the cache: it is updated in place.

    Quantized caches get the numbers and scales of quant.quantize.

    Args:
      qkv: of each token, the heads of its queries, of its keys and of its values, side by side.
      cos, sin: f32; columns i and half + i of queries and keys are rotated by angle i, those from 2 half on are not.
      slots: index among all slots of the layer; negative, or out of bounds: the token is not written.
      keys, values: floats, or quantized to int8 or fp8.
      implementation: "triton", or None; serves(...) must be True.
    """
    device = probe()
    backend = backends.write(implementation, device)
    assert backend is not None, "serves(...) is False"
    hkv = _leaf(keys).size // (_leaf(keys).shape[0] * _leaf(keys).shape[1] * head_dim)
    operands = WriteOperands(
        qkv,
        cos.astype(jnp.float32),
        sin.astype(jnp.float32),
        slots.astype(jnp.int32),
        *(_flat(_leaf(x), hkv * head_dim) for x in (keys, values)),
        *(_flat(x.scales, hkv) if isinstance(x, QuantizedArray) else None for x in (keys, values)),
    )
    q, k, v, *scales = _run(_Plan(backend=backend, head_dim=head_dim, device=device), operands)
    of_scales = iter(scales)
    return q, _like(keys, k, of_scales), _like(values, v, of_scales)


def _leaf(x: Slots) -> Array:
    return x.values if isinstance(x, QuantizedArray) else x


def _flat(x: Array, width: int) -> Array:
    return x.reshape(-1, width)


def _like(old: Slots, numbers: Array, scales: Iterator[Array]) -> Slots:
    if not isinstance(old, QuantizedArray):
        return numbers.reshape(old.shape)
    values, scale = numbers.reshape(old.values.shape), next(scales).reshape(old.scales.shape)
    return dataclasses.replace(old, values=values, scales=scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: WriteBackend
    head_dim: int
    device: DeviceInfo


@compiled
@with_default_rules
def _run(plan: _Plan, operands: WriteOperands) -> tuple[Array, ...]:
    with jax.named_scope("jfa.rotate_and_write.triton"):
        return plan.backend.run(operands, plan.head_dim, plan.device)
