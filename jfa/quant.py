"""Quantized arrays, used by KV caches, kernels and weights: vectors with a scale for each, or for each group of one.

Our own quantization is symmetric. The scale of a vector is its absolute maximum divided by the largest number of the
kind:

  int8  integers from -127 to 127
  fp8   float8_e4m3fn, up to 448
  int4  sixteen levels, -7.5, -6.5 ... 7.5, two per byte: element i in the low half of byte i, element i + d / 2 in the
        high half, so that a kernel unpacks a row into two contiguous halves

Scales are rounded to bfloat16 before the division, so that this rounding adds no error. Weights of checkpoints are held
as they were quantized: in groups along the last axis, with a zero point or a minimum for each.
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
from jaxtyping import Array, Float, Int, Shaped

from jfa.types import ProductOperands, ProductSpec

Leaf = Any  # a JAX array, or a NumPy array of a weight on the host

# kind: (dtype of the stored numbers, the largest number)
KINDS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0), "int4": (jnp.uint8, 7.5)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedArray:
    """Quantized vectors along the last axis: element = (number - zero) * scale + minimum.

    Attributes:
      values: the numbers: int8, float8_e4m3fn, or uint8 with two 4-bit numbers per byte, from 0 to 15. In each group of
        g elements (a whole vector, without groups), element i is in the low half of byte i, element i + g / 2 in the
        high half of the same byte.
      scales: one per vector; the shape is that of values without the last axis. With group_size one per group:
        [*n, groups].
      zeros: integers in the dtype of values, of the shape of scales. None: no zero points; 4-bit numbers are then the
        levels -7.5 to 7.5, unless there are minima.
      minima: floats of the shape of scales; None: no minima. Not together with zeros.
      group_size: elements per group; the last group of a vector may be shorter, but not if the numbers have 4 bits.
        None: one scale per vector.
      rounds_inputs: how many int8 numbers represent an element of the other factor in jfa.quantized_matmul, which then
        multiplies integers: 1, or 2 for the precision of 16 bits. 0: the other factor is not rounded.
    """

    values: Shaped[Leaf, "*n stored"]
    scales: Float[Leaf, "*n"] | Float[Leaf, "*n groups"]
    zeros: Int[Leaf, "*n groups"] | None = None
    minima: Float[Leaf, "*n groups"] | None = None
    group_size: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    rounds_inputs: int = dataclasses.field(default=0, metadata=dict(static=True))

    @property
    def kind(self) -> str:
        """The key in KINDS: "int8", "fp8" or "int4"."""
        return kind_of(self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that it stands for."""
        return (*self.values.shape[:-1], width(self.values, self.scales))

    @property
    def num_bytes(self) -> int:
        """Total size in bytes, including scales."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


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
    bound = jnp.asarray(largest_scale(x.dtype, kind), jnp.bfloat16)
    x = x.astype(jnp.float32)
    scales = (jnp.abs(x).max(-1, initial=0.0) / largest).astype(jnp.bfloat16)
    scales = jnp.where(jnp.isfinite(scales), jnp.minimum(scales, bound), jnp.nan)
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


def largest_scale(dtype: DTypeLike, kind: str) -> float:
    """The largest scale of vectors in a dtype, exact in bfloat16.

    If its scale were rounded up, the largest number of the dtype would be dequantized to infinity.
    """
    bound = np.float32(float(jnp.finfo(dtype).max) / KINDS[kind][1]).view(np.uint32) & np.uint32(0xFFFF0000)
    return float(bound.view(np.float32))


def quantize_weight(
    x: Float[np.ndarray, "*n d"], kind: str, *, group_size: int | None = None, symmetric: bool = True
) -> QuantizedArray:
    """Quantizes a weight on the host, in groups along its last axis or with one scale per row; leaves are NumPy arrays.

    int8 and fp8 as in this module's head, with float32 scales for whole rows, else bfloat16. int4 has the integers -8
    to 7 around a zero point, as published checkpoints do: symmetric, it is 8; otherwise the numbers from a group's
    smallest to its largest are spread over 0 to 15.

    Raises:
      ValueError: unknown kind, a group_size that does not divide the last axis, or numbers that are not finite.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    d = x.shape[-1]
    group = d if group_size is None else group_size
    if group < 1 or d % group or (kind == "int4" and group % 2):
        even = "an even number" if kind == "int4" else "a number"
        raise ValueError(f"group_size must be {even} that divides the width {d} of the weight, got {group}")
    *n, _ = x.shape
    x = np.asarray(x, np.float32).reshape(*n, d // group, group)
    scale_dtype = np.dtype(jnp.float32 if group_size is None else jnp.bfloat16)
    dtype, largest = KINDS[kind]
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    with np.errstate(over="ignore", invalid="ignore"):
        if kind != "int4":
            scales = np.maximum(-low, high) / largest
        elif symmetric:  # the side of the larger magnitude gets the eighth number
            scales = np.where(-low > high, -low, -high) / 8
        else:
            scales = (high - low) / 15
        scales = scales.astype(scale_dtype)
    if not np.isfinite(scales).all():
        raise ValueError("a weight with NaN, infinity or numbers near the largest float32 cannot be quantized")
    divisor = np.where(scales == 0, 1, scales).astype(np.float32)
    zeros = None
    if kind == "int4":
        zeros = np.full(scales.shape, 8, np.uint8)
        if not symmetric:
            zeros = np.clip(np.rint(-low / divisor), 0, 15).astype(np.uint8)
        levels = np.clip(np.rint(x / divisor[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
        values = levels[..., : group // 2] | (levels[..., group // 2 :] << 4)
    else:
        values = np.clip(x / divisor[..., None], -largest, largest)
        values = (np.rint(values) if kind == "int8" else values).astype(dtype)
    values = values.reshape(*n, stored_size(kind, d))
    if group_size is None and zeros is None:
        return QuantizedArray(values=values, scales=scales[..., 0])
    return QuantizedArray(values=values, scales=scales, zeros=zeros, group_size=group)


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
    """The elements in float32, rounded once to dtype."""
    if x.values.dtype == jnp.uint8:
        return joined(dequantized_halves(x, dtype), x.group_size)
    found = numbers(x.values)
    return _scaled(x, found, lambda field: per_element(field, x.group_size, found.shape[-1])).astype(dtype)


def dequantized_halves(
    x: QuantizedArray, dtype: DTypeLike = jnp.float32
) -> tuple[Float[Array, "*n stored"], Float[Array, "*n stored"]]:
    """dequantize of packed 4-bit numbers, without their order: all lower halves of bytes, and all upper ones.

    For a product with `halves`: on a CPU it takes longer to put a group's numbers in order than to multiply them.
    """
    half = _half(x.values, x.group_size)
    grouped = x.values.reshape(*x.values.shape[:-1], x.values.shape[-1] // half, half)
    first = 7.5 if x.zeros is None and x.minima is None else 0.0  # levels

    def of_groups(field: Array) -> Array:
        return field[..., None] if x.group_size is not None else field.reshape(*x.values.shape[:-1], 1, 1)

    low, high = (
        _scaled(x, part.astype(jnp.float32) - first, of_groups).astype(dtype).reshape(x.values.shape)
        for part in (grouped & 15, grouped >> 4)
    )
    return low, high


def halves(
    x: Shaped[Array, "*n d"], group_size: int | None
) -> tuple[Shaped[Array, "*n half"], Shaped[Array, "*n half"]]:
    """The elements that packed numbers have in the lower halves of their bytes, and those in the upper ones."""
    *n, d = x.shape
    half = d // 2 if group_size is None else group_size // 2
    grouped = x.reshape(*n, d // (2 * half), 2, half)
    low, high = (grouped[..., i, :].reshape(*n, d // 2) for i in (0, 1))
    return low, high


def joined(
    parts: tuple[Shaped[Array, "*n half"], Shaped[Array, "*n half"]], group_size: int | None
) -> Shaped[Array, "*n d"]:
    """The inverse of `halves`."""
    *n, stored = parts[0].shape
    half = _half(parts[0], group_size)
    grouped = [part.reshape(*n, stored // half, half) for part in parts]
    return jnp.concatenate(grouped, axis=-1).reshape(*n, 2 * stored)


def _half(values: Shaped[Array, "*n stored"], group_size: int | None) -> int:
    """The bytes of a group of packed numbers."""
    return max(values.shape[-1], 1) if group_size is None else group_size // 2


def _scaled(x: QuantizedArray, found: Float[Array, "..."], shaped: Callable[[Array], Array]) -> Float[Array, "..."]:
    """Numbers with the scales, zeros and minima of x, which are brought to their shape."""
    if x.zeros is not None:
        found = found - shaped(x.zeros).astype(jnp.float32)
    found = found * shaped(x.scales).astype(jnp.float32)
    return found if x.minima is None else found + shaped(x.minima).astype(jnp.float32)


def rounded_rows(x: Float[Array, "n d"], terms: int) -> tuple[Int[Array, "terms n d"], Float[Array, "terms n 1"]]:
    """Rows as sums of int8 numbers with float32 scales, for products of integers.

    The scale of the first term is a row's absolute maximum / 127; a second one holds what rounding to the first leaves.
    A row with NaN or infinity has the scale NaN.
    """
    x = x.astype(jnp.float32)
    scales = jnp.abs(x).max(-1, keepdims=True, initial=0.0) / 127.0
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    rest = jnp.where(jnp.isnan(scales), 0.0, x / jnp.where(scales == 0.0, 1.0, scales))
    values = [jnp.round(rest)]
    if terms == 2:
        values.append(jnp.round((rest - values[0]) * 254.0))
    factors = jnp.array([1.0, 1.0 / 254.0][:terms], jnp.float32)
    return jnp.stack(values).astype(jnp.int8), scales * factors[:, None, None]


def weight_of(operands: ProductOperands, spec: ProductSpec) -> QuantizedArray:
    """The weight of a product as an array."""
    return QuantizedArray(
        values=operands.values,
        scales=operands.scales,
        zeros=operands.zeros,
        minima=operands.minima,
        group_size=spec.group_size,
        rounds_inputs=spec.rounds_inputs,
    )


def per_element(x: Shaped[Array, "..."], group_size: int | None, d: int) -> Shaped[Array, "*n d"]:
    """Scales, zeros or minima, repeated for each of the d elements of a vector; without groups as [*n, 1]."""
    if group_size is None:
        return x[..., None]
    if d % group_size == 0:  # a broadcast, which XLA fuses; a repeat is a gather
        wide = jnp.broadcast_to(x[..., None], (*x.shape, group_size))
        return wide.reshape(*x.shape[:-1], d)
    return jnp.repeat(x, group_size, axis=-1)[..., :d]


def numbers(values: Shaped[Array, "*n stored"]) -> Float[Array, "*n d"]:
    """Stored numbers as float32, without scales; 4-bit numbers, without groups, as levels."""
    kind = kind_of(values.dtype)
    if kind == "int4":
        # duplicate the bytes, then shift: on a CPU faster than to put unpacked halves beside each other (bench/LOG.md)
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
