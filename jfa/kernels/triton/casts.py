"""Stored numbers of quantized arrays as inputs of a matrix product, in the fewest instructions.

Three steps, each of them exact: `widened` casts them, in few instructions also on a GPU without a direct conversion;
the product's sums are corrected by `bias` times the sum of the other input; and the scales are multiplied by `unit`.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jfa.kernels.triton._primitives import truncated, widened_fp8

WITHOUT_FP8_CASTS = ("sm_80", "sm_86")  # architectures for which Triton casts no fp8
INT4_ZERO = 7.5  # the level of a 4-bit number of 0 is minus this

_MAGIC = {"bfloat16": 0x4300, "float16": 0x6400}  # 128 and 1024: the low bits of the mantissa are units


def widened(x: Array, *, dtype: Any, fp8_by_bits: bool) -> tuple[Array, ...]:
    """Stored numbers in the dtype of a product: one array, or the low and the high half of each byte."""
    if x.dtype == jnp.uint8 and dtype == jnp.float32:
        return tuple(half.astype(jnp.float32) - INT4_ZERO for half in (x & 15, x >> 4))
    if x.dtype == jnp.uint8:
        bits = x.astype(jnp.uint16)
        magic = jnp.uint16(_MAGIC[dtype.name])
        halves = tuple(lax.bitcast_convert_type(half | magic, dtype) for half in (bits & 15, bits >> 4))
        return tuple(half - 1031 for half in halves) if dtype == jnp.float16 else halves
    if x.dtype == jnp.int8 and dtype == jnp.bfloat16:
        return (truncated(x.astype(jnp.float32)),)
    if x.dtype == jnp.int8 and dtype == jnp.float16:
        # 1024 + 128 + x: the lower byte of x + 128 is that of x with its first bit inverted
        bits = lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.uint16)
        return (lax.bitcast_convert_type(bits ^ jnp.uint16(0x6480), dtype) - 1152,)
    if x.dtype == jnp.float8_e4m3fn and fp8_by_bits:
        # NaN becomes a number, which is harmless: quant.quantize gives a vector with a NaN a scale of NaN
        if dtype != jnp.float16:
            return (widened_fp8(x).astype(dtype),)
        # sign, exponent and mantissa in a float16's places: 2^-8 times the number, by the exponents' biases
        bits = lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int16) << 8
        return (lax.bitcast_convert_type((bits >> 1) & jnp.int16(~0x4000), dtype),)
    return (x.astype(dtype),)


def bias(stored: Any, dtype: Any) -> float:
    """What `widened` numbers of a stored dtype are too large by; 4-bit numbers are the levels -7.5 to 7.5."""
    if stored != jnp.uint8 or dtype == jnp.float32:
        return 0.0
    return INT4_ZERO + (128 if dtype == jnp.bfloat16 else -7)


def unit(stored: Any, dtype: Any, fp8_by_bits: bool) -> float:
    """The factor by which `widened` numbers still have to be multiplied."""
    return 256.0 if stored == jnp.float8_e4m3fn and fp8_by_bits and dtype == jnp.float16 else 1.0
