"""Stored numbers of quantized arrays as inputs of a matrix product, in the fewest instructions.

Three steps, each of them exact: `widened` casts them, in few instructions also on a GPU without a direct conversion;
the product's sums are corrected by `bias` times the sum of the other input; and the scales are multiplied by `unit`.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, UInt8, UInt32

from jfa.kernels.triton._primitives import spread, truncated, widened_fp8, with_nan

WITHOUT_FP8_CASTS = ("sm_80", "sm_86")  # architectures for which Triton casts no fp8
INT4_ZERO = 7.5  # the level of a 4-bit number of 0 is minus this

# 128 and 1024, whose mantissas' low bits are units: the upper byte of a number from 0 to 255 in a 16-bit dtype's places
_UPPER = {"bfloat16": 0x43, "float16": 0x64}


def widened(x: Array, *, dtype: Any, fp8_by_bits: bool, nan: bool, words: bool) -> tuple[Array, ...]:
    """Stored numbers in the dtype of a product: one array, or the low and the high half of each byte.

    nan: whether NaN is cast right; without, and by bits, it becomes a number. That is harmless where quant.quantize
    has given a vector with NaN a scale of NaN. words: whether four bytes of 4-bit numbers are unpacked together.
    """
    if x.dtype == jnp.uint8 and dtype == jnp.float32:
        return tuple(half.astype(jnp.float32) - INT4_ZERO for half in (x & 15, x >> 4))
    if x.dtype == jnp.uint8:
        low, high = _halves_by_words(x, dtype) if words else _halves(x, dtype)
        return (low - 1031, high - 1031) if dtype == jnp.float16 else (low, high)
    if x.dtype == jnp.int8 and dtype == jnp.bfloat16:
        return (truncated(x.astype(jnp.float32)),)
    if x.dtype == jnp.int8 and dtype == jnp.float16:
        # 1024 + 128 + x: the lower byte of x + 128 is that of x with its first bit inverted
        bits = lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16)
        return (lax.bitcast_convert_type(bits ^ jnp.uint16(0x6480), dtype) - 1152,)
    if x.dtype == jnp.float8_e4m3fn and fp8_by_bits:
        if dtype != jnp.float16:
            return (widened_fp8(x, nan=nan).astype(dtype),)
        # sign, exponent and mantissa in a float16's places: 2^-8 times the number, by the exponents' biases
        bits = lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int16) << 8
        number = lax.bitcast_convert_type((bits >> 1) & jnp.int16(~0x4000), dtype)
        return (with_nan(number, 2.0**-8) if nan else number,)
    return (x.astype(dtype),)


def offset(stored: Any, dtype: Any, scales: Array, zeros: Array | None, minima: Array | None) -> Array | None:
    """What the sum of the other factor is multiplied by: minimum - scale * (zero + what the numbers are too large by).

    None: nothing. All of one shape, in float32 but for zeros, which are integers, and minima.
    """
    shift = bias(stored, dtype)
    if stored == jnp.uint8 and not (zeros is minima is None):
        shift -= INT4_ZERO  # the numbers are 0 to 15, not levels
    found = None
    if zeros is not None:
        found = scales * (-shift - zeros.astype(jnp.float32))
    elif shift:
        found = scales * -shift
    if minima is not None:
        minima = minima.astype(jnp.float32)
        found = minima if found is None else found + minima
    return found


def rounded_half_up(x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """float32 to bfloat16 by one addition, for GPUs without an instruction; ties are rounded away from zero."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0x8000)
    return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _halves(x: UInt8[Array, "*n d"], dtype: Any) -> tuple[Array, Array]:
    """The low and the high halves of bytes, with the upper byte _UPPER: about three instructions per number."""
    bits, upper = x.astype(jnp.uint16), jnp.uint16(_UPPER[dtype.name] << 8)
    low, high = (lax.bitcast_convert_type(half | upper, dtype) for half in (bits & 15, bits >> 4))
    return low, high


def _halves_by_words(x: UInt8[Array, "*n d"], dtype: Any) -> tuple[Array, Array]:
    """The same of four bytes together: an instruction per number, and more registers."""
    words = _words(x)
    mask = jnp.uint32(0x0F0F0F0F)
    low, high = (_shorts(half, x.shape, dtype) for half in (words & mask, (words >> 4) & mask))
    return low, high


def _words(x: UInt8[Array, "*n d"]) -> UInt32[Array, "*n words"]:
    """Each four bytes as one integer, the first byte lowest."""
    parts = [x.reshape(*x.shape[:-1], x.shape[-1] // 4, 2, 2)]
    for _ in range(2):  # bytes 0 and 2, 1 and 3; then each alone
        parts = [half[..., 0] for part in parts for half in lax.split(part, (1, 1), axis=part.ndim - 1)]
    zero, two, one, three = (part.astype(jnp.uint32) for part in parts)
    return zero | (one << 8) | (two << 16) | (three << 24)


def _shorts(words: UInt32[Array, "*n words"], shape: tuple[int, ...], dtype: Any) -> Array:
    """The bytes of words, as numbers of a 16-bit dtype with the upper byte _UPPER."""
    pairs = [spread(words, _UPPER[dtype.name], pair=pair) for pair in (0, 1)]
    first, second = (_joined(*(bits.astype(jnp.uint16) for bits in both)) for both in (pairs, [p >> 16 for p in pairs]))
    return lax.bitcast_convert_type(_joined(first, second).reshape(shape), dtype)


def _joined(a: Array, b: Array) -> Array:
    return jnp.concatenate([a[..., None], b[..., None]], axis=-1)


def bias(stored: Any, dtype: Any) -> float:
    """What `widened` numbers of a stored dtype are too large by; 4-bit numbers are the levels -7.5 to 7.5."""
    if stored != jnp.uint8 or dtype == jnp.float32:
        return 0.0
    return INT4_ZERO + (128 if dtype == jnp.bfloat16 else -7)


def unit(stored: Any, dtype: Any, fp8_by_bits: bool) -> float:
    """The factor by which `widened` numbers still have to be multiplied."""
    return 256.0 if stored == jnp.float8_e4m3fn and fp8_by_bits and dtype == jnp.float16 else 1.0
