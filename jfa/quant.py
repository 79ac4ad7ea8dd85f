"""Quantized arrays with a scale for each vector, used by KV caches, kernels and weights.

Quantization is symmetric. The scale of a vector is its absolute maximum divided by the largest number of the kind:

  int8  integers from -127 to 127
  fp8   float8_e4m3fn, up to 448
  int4  sixteen levels, -7.5, -6.5 ... 7.5, two per byte: element i in the low half of byte i, element i + d / 2 in the
        high half, so that a kernel unpacks a row into two contiguous halves

Scales are rounded to bfloat16 before the division, so that this rounding adds no error.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

# kind: (dtype of the stored numbers, the largest number)
KINDS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0), "int4": (jnp.uint8, 7.5)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """Quantized vectors along the last axis, each with a scale.

    Attributes:
      values: int8, float8_e4m3fn, or uint8 with two 4-bit numbers per byte.
      scales: one per vector; the shape is that of values without the last axis.
    """

    values: Shaped[Array, "*n stored"]
    scales: Float[Array, "*n"]

    @property
    def kind(self) -> str:
        """The key in KINDS: "int8", "fp8" or "int4"."""
        return kind_of(self.values.dtype)

    @property
    def num_bytes(self) -> int:
        """Total size in bytes, including scales."""
        return sum(x.size * x.dtype.itemsize for x in (self.values, self.scales))


def kind_of(dtype: DTypeLike) -> str:
    """The kind whose numbers are stored in this dtype.

    Raises:
      ValueError: no kind uses this dtype.
    """
    name = jnp.dtype(dtype).name
    for kind, (stored, _) in KINDS.items():
        if name == jnp.dtype(stored).name:
            return kind
    known = ", ".join(f"{jnp.dtype(stored).name} ({kind})" for kind, (stored, _) in KINDS.items())
    raise ValueError(f"quantized numbers are stored as {known}; got {name}")


def stored_size(kind: str, d: int) -> int:
    """The size of the last axis in which d elements are stored.

    Raises:
      ValueError: int4 and d is odd.
    """
    if kind != "int4":
        return d
    if d % 2:
        raise ValueError(f"int4 stores two numbers per byte, so a vector must have an even length, got {d}")
    return d // 2


def width(values: Any, scales: Any) -> int:
    """The number of elements of a stored vector; scales None: values are floats, not quantized."""
    doubled = scales is not None and kind_of(values.dtype) == "int4"
    return values.shape[-1] * (2 if doubled else 1)


def quantize(x: Float[Array, "*n d"], kind: str) -> QuantizedArray:
    """Quantizes to the nearest numbers of a kind. A vector that contains NaN or infinity is dequantized to NaN.

    Args:
      kind: "int8", "fp8" or "int4".

    Raises:
      ValueError: unknown kind, or int4 with an odd last axis.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"quantize takes a float array, got {x.dtype}")
    dtype, largest = KINDS[kind]
    half = stored_size(kind, x.shape[-1])
    top = float(jnp.finfo(x.dtype).max)
    x = x.astype(jnp.float32)
    scales = (jnp.abs(x).max(-1, initial=0.0) / largest).astype(jnp.bfloat16)
    # if its scale were rounded up, the largest number of x's dtype would be dequantized to infinity; with the lower 16
    # bits cleared, the bound is exact in bfloat16
    bound = np.float32(top / largest).view(np.uint32) & np.uint32(0xFFFF0000)
    scales = jnp.where(jnp.isfinite(scales), jnp.minimum(scales, bound.view(np.float32).astype(scales.dtype)), jnp.nan)
    divisor = scales.astype(jnp.float32)[..., None]
    x = jnp.clip(x / jnp.where(divisor == 0.0, 1.0, divisor), -largest, largest)
    if kind == "fp8":
        values = x
    elif kind == "int8":
        values = jnp.round(x)
    else:
        # no level represents NaN: the scale is NaN instead
        levels = jnp.clip(jnp.floor(jnp.where(jnp.isnan(x), 0.0, x) + 8.0), 0, 15).astype(jnp.uint8)
        values = levels[..., :half] | (levels[..., half:] << 4)
    return QuantizedArray(values=values.astype(dtype), scales=scales)


def rotation(d: int) -> np.ndarray:
    """A symmetric orthogonal float32 [d, d]: Hadamard blocks of the largest power of two that divides d.

    It spreads an outlier over its block, so that quantization loses less of the other numbers. The dot product of two
    vectors does not change if both are rotated. Source: QuaRot, arXiv:2404.00456, section 3.
    """
    size = d & -d
    block = np.ones((1, 1), np.float32)
    while len(block) < size:
        block = np.block([[block, block], [block, -block]])
    return np.kron(np.eye(d // size, dtype=np.float32), block / np.float32(math.sqrt(size)))


def dequantize(x: QuantizedArray, dtype: DTypeLike = jnp.float32) -> Float[Array, "*n d"]:
    """The numbers times their scales, rounded once to dtype."""
    return (numbers(x.values) * x.scales[..., None].astype(jnp.float32)).astype(dtype)


def numbers(values: Shaped[Array, "*n stored"]) -> Float[Array, "*n d"]:
    """Stored numbers as float32, without their scales."""
    kind = kind_of(values.dtype)
    if kind == "int4":
        # duplicate the bytes, then shift: on a CPU twice as fast as concatenating two unpacked halves (bench/LOG.md)
        shift = np.repeat(np.array([0, 4], np.uint8), values.shape[-1])
        return ((jnp.concatenate([values, values], axis=-1) >> shift) & 15).astype(jnp.float32) - 7.5
    return _from_fp8(values) if kind == "fp8" else values.astype(jnp.float32)


def on_bits(function: Callable[..., Array], *arrays: Array) -> Array:
    """function(*arrays), for a function that only moves elements (gather, scatter, pad) and computes nothing.

    XLA on a CPU cannot move 8-bit floats: it converts the whole array to float16 and back. There they are moved as
    uint8 instead, which still copies the array that a scatter updates.
    """
    dtype = arrays[0].dtype
    if dtype != jnp.float8_e4m3fn:
        return function(*arrays)

    def as_bytes(*arrays):
        return lax.bitcast_convert_type(function(*(lax.bitcast_convert_type(x, jnp.uint8) for x in arrays)), dtype)

    return lax.platform_dependent(*arrays, cpu=as_bytes, default=function)


def _from_fp8(values: Shaped[Array, "*n d"]) -> Float[Array, "*n d"]:
    """astype(float32) by bit operations and selects: on a CPU three times as fast as XLA's own conversion."""
    bits = lax.bitcast_convert_type(values, jnp.int8).astype(jnp.int32)
    low = bits & 0x7F  # 4 bits of exponent, 3 of mantissa; all ones: NaN
    normal = lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)  # exponent bias 7 becomes 127
    size = jnp.where(low < 8, low.astype(jnp.float32) * 2.0**-9, normal)
    size = jnp.where(low == 0x7F, jnp.nan, size)
    return jnp.where(bits < 0, -size, size)
