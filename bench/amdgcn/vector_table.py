"""Table of vector instructions: for each, the types of destination and sources and a function on arrays.

Names and semantics: ISA manuals (CDNA3, CDNA4, RDNA3, RDNA4), chapter "Instructions", encodings VOP1, VOP2 and VOP3.
Arrays are [wave, lane], or [wave, 1] for a scalar operand.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic as math


@dataclasses.dataclass(frozen=True)
class Operation:
    """Types of the destination and of the sources, and the function."""

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Any]


OPERATIONS: dict[str, Operation] = {}


def _define(names: str, signature: str, compute: Callable[..., Any]) -> None:
    result, _, sources = signature.partition("=")
    for name in names.split():
        OPERATIONS["v_" + name] = Operation(result.strip(), tuple(sources.split()), compute)


def _same(a: np.ndarray) -> np.ndarray:
    return a


def _as(dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: a.astype(dtype)


# ---- moves and logic
_define("mov_b32 accvgpr_read_b32 accvgpr_write_b32 accvgpr_mov_b32", "b32 = b32", _same)
_define("mov_b16", "b16 = b16", _same)
_define("mov_b64", "b64 = b64", _same)
for bits in (16, 32):
    two = f"b{bits} = b{bits} b{bits}"
    shift = math.shift(bits)
    _define(f"not_b{bits}", f"b{bits} = b{bits}", np.invert)
    _define(f"and_b{bits}", two, np.bitwise_and)
    _define(f"or_b{bits}", two, np.bitwise_or)
    _define(f"xor_b{bits}", two, np.bitwise_xor)
    _define(f"xnor_b{bits}", two, lambda a, b: ~(a ^ b))
    # rev: the shift distance is the first operand
    _define(f"lshlrev_b{bits}", two, lambda n, a, at=shift: a << at(n))
    _define(f"lshrrev_b{bits}", two, lambda n, a, at=shift: a >> at(n))
    _define(f"ashrrev_i{bits}", f"i{bits} = b{bits} i{bits}", lambda n, a, at=shift: a >> at(n).astype(a.dtype))
_shift_32, _shift_64 = math.shift(32), math.shift(64)
_define("lshlrev_b64", "u64 = u32 u64", lambda n, a: a << _shift_64(n))
_define("lshrrev_b64", "u64 = u32 u64", lambda n, a: a >> _shift_64(n))
_define("ashrrev_i64", "i64 = u32 i64", lambda n, a: a >> _shift_64(n).astype(np.int64))
three = "b32 = b32 b32 b32"
_define("and_or_b32", three, lambda a, b, c: a & b | c)
_define("or3_b32", three, lambda a, b, c: a | b | c)
_define("xor3_b32", three, lambda a, b, c: a ^ b ^ c)
_define("lshl_or_b32", three, lambda a, b, c: a << _shift_32(b) | c)
_define("bfi_b32", three, lambda a, b, c: a & b | ~a & c)
_define(
    "bfm_b32", "b32 = b32 b32", lambda width, first: ((np.uint32(1) << (width & 31)) - np.uint32(1)) << (first & 31)
)
_define("bfe_u32", "u32 = u32 u32 u32", lambda a, first, width: math.field(a, first & 31, width & 31, False))
_define("bfe_i32", "i32 = i32 u32 u32", lambda a, first, width: math.field(a, first & 31, width & 31, True))
_define("bfrev_b32", "b32 = b32", functools.partial(math.reversed_bits, 32))
_define("perm_b32", three, math.permuted_bytes)
_define("bcnt_u32_b32", "u32 = u32 u32", lambda a, b: np.bitwise_count(a) + b)
_define("ffbh_u32 clz_i32_u32", "i32 = u32", functools.partial(math.leading_zeros, 32))
_define("ffbh_i32 cls_i32", "i32 = i32", math.leading_signs)
_define("ffbl_b32 ctz_i32_b32", "i32 = u32", functools.partial(math.trailing_zeros, 32))
for name, mask, unit in (("alignbit", 31, 1), ("alignbyte", 3, 8)):
    _define(
        f"{name}_b32",
        three,
        lambda a, b, n, mask=mask, unit=unit: (
            (b.astype(np.uint64) | a.astype(np.uint64) << np.uint64(32))
            >> ((n & mask) * np.uint32(unit)).astype(np.uint64)
        ),
    )

# ---- integers
for type in ("u32", "i32", "u16", "i16"):
    two = f"{type} = {type} {type}"
    three = f"{type} = {type} {type} {type}"
    _define(f"add_{type} add_nc_{type}", two, np.add)
    _define(f"sub_{type} sub_nc_{type}", two, np.subtract)
    _define(f"subrev_{type} subrev_nc_{type}", two, lambda a, b: b - a)
    _define(f"max_{type}", two, np.maximum)
    _define(f"min_{type}", two, np.minimum)
    _define(f"max3_{type}", three, lambda a, b, c: np.maximum(np.maximum(a, b), c))
    _define(f"min3_{type}", three, lambda a, b, c: np.minimum(np.minimum(a, b), c))
    _define(f"maxmin_{type}", three, lambda a, b, c: np.minimum(np.maximum(a, b), c))
    _define(f"minmax_{type}", three, lambda a, b, c: np.maximum(np.minimum(a, b), c))
    _define(f"med3_{type}", three, math.median)
    _define(f"mad_{type}", three, lambda a, b, c: a * b + c)
_define("mad_legacy_u16", "u16 = u16 u16 u16", lambda a, b, c: a * b + c)
_define("mul_lo_u16", "u16 = u16 u16", np.multiply)
_define("mul_lo_u32 mul_lo_i32", "u32 = u32 u32", np.multiply)
_define("mul_hi_u32", "u32 = u32 u32", math.multiply_high_unsigned)
_define("mul_hi_i32", "i32 = i32 i32", math.multiply_high_signed)
_define("mul_u32_u24", "u32 = u32 u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF))
_define("mul_i32_i24", "i32 = i32 i32", lambda a, b: math.low_24(a) * math.low_24(b))
_define("mul_hi_u32_u24", "u32 = u32 u32", lambda a, b: math.multiply_high_unsigned(a & 0xFFFFFF, b & 0xFFFFFF))
_define("mul_hi_i32_i24", "i32 = i32 i32", lambda a, b: math.multiply_high_signed(math.low_24(a), math.low_24(b)))
_define("mad_u32_u24", "u32 = u32 u32 u32", lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c)
_define("mad_i32_i24", "i32 = i32 i32 i32", lambda a, b, c: math.low_24(a) * math.low_24(b) + c)
_define("mad_u32_u16", "u32 = u16 u16 u32", lambda a, b, c: a.astype(np.uint32) * b.astype(np.uint32) + c)
_define("mad_i32_i16", "i32 = i16 i16 i32", lambda a, b, c: a.astype(np.int32) * b.astype(np.int32) + c)
_define("add3_u32", "u32 = u32 u32 u32", lambda a, b, c: a + b + c)
_define("xad_u32", "u32 = u32 u32 u32", lambda a, b, c: (a ^ b) + c)
_define("lshl_add_u32", "u32 = u32 u32 u32", lambda a, b, c: (a << _shift_32(b)) + c)
_define("add_lshl_u32", "u32 = u32 u32 u32", lambda a, b, c: a + b << _shift_32(c))
_define("lshl_add_u64", "u64 = u64 u32 u64", lambda a, b, c: (a << (b & 7).astype(np.uint64)) + c)
_define("sad_u32", "u32 = u32 u32 u32", lambda a, b, c: np.maximum(a, b) - np.minimum(a, b) + c)

# ---- floats
for type in ("f32", "f16", "f64"):
    two = f"{type} = {type} {type}"
    three = f"{type} = {type} {type} {type}"
    _define(f"add_{type}", two, np.add)
    _define(f"sub_{type}", two, np.subtract)
    _define(f"subrev_{type}", two, lambda a, b: b - a)
    _define(f"mul_{type}", two, np.multiply)
    _define(f"max_{type} max_num_{type}", two, np.fmax)
    _define(f"min_{type} min_num_{type}", two, np.fmin)
    _define(f"maximum_{type}", two, np.maximum)
    _define(f"minimum_{type}", two, np.minimum)
    _define(f"max3_{type} max3_num_{type}", three, lambda a, b, c: np.fmax(np.fmax(a, b), c))
    _define(f"min3_{type} min3_num_{type}", three, lambda a, b, c: np.fmin(np.fmin(a, b), c))
    _define(f"maximum3_{type}", three, lambda a, b, c: np.maximum(np.maximum(a, b), c))
    _define(f"minimum3_{type}", three, lambda a, b, c: np.minimum(np.minimum(a, b), c))
    _define(f"maxmin_{type} maxmin_num_{type}", three, lambda a, b, c: np.fmin(np.fmax(a, b), c))
    _define(f"minmax_{type} minmax_num_{type}", three, lambda a, b, c: np.fmax(np.fmin(a, b), c))
    _define(f"maximumminimum_{type}", three, lambda a, b, c: np.minimum(np.maximum(a, b), c))
    _define(f"minimummaximum_{type}", three, lambda a, b, c: np.maximum(np.minimum(a, b), c))
    _define(f"med3_{type} med3_num_{type}", three, math.median)
    _define(f"fma_{type}", three, math.fma)
    for name, compute in {"floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rndne": np.rint}.items():
        _define(f"{name}_{type}", f"{type} = {type}", compute)
    _define(f"fract_{type}", f"{type} = {type}", lambda a: a - np.floor(a))
    _define(f"sqrt_{type}", f"{type} = {type}", np.sqrt)
    _define(f"rcp_{type} rcp_iflag_{type}", f"{type} = {type}", math.reciprocal)
    _define(f"rsq_{type}", f"{type} = {type}", math.reciprocal_square_root)
    _define(f"ldexp_{type}", f"{type} = {type} {'i16' if type == 'f16' else 'i32'}", math.scaled)
    _define(f"frexp_mant_{type}", f"{type} = {type}", lambda a: np.where(np.isfinite(a), np.frexp(a)[0], a))
    _define(
        f"frexp_exp_{'i16' if type == 'f16' else 'i32'}_{type}",
        f"{'i16' if type == 'f16' else 'i32'} = {type}",
        lambda a: np.where(np.isfinite(a), np.frexp(a)[1], 0),
    )
_define("mul_legacy_f32 mul_dx9_zero_f32", "f32 = f32 f32", lambda a, b: np.where((a == 0) | (b == 0), 0, a * b))
_define("fmaak_f32 fmamk_f32", "f32 = f32 f32 f32", math.fma)
_define("fmaak_f16 fmamk_f16", "f16 = f16 f16 f16", math.fma)
_define("exp_f32", "f32 = f32", math.exp2)
_define("log_f32", "f32 = f32", math.log2)
_define("exp_f16", "f16 = f16", lambda a: np.exp2(a.astype(np.float32)))
_define("log_f16", "f16 = f16", lambda a: np.log2(a.astype(np.float32)))
_define("sin_f32", "f32 = f32", lambda a: np.sin(2 * np.pi * a.astype(np.float64)))  # operand in revolutions
_define("cos_f32", "f32 = f32", lambda a: np.cos(2 * np.pi * a.astype(np.float64)))
_define("tanh_f32", "f32 = f32", np.tanh)
_define("div_fixup_f32", "f32 = f32 f32 f32", math.fix_division)
_define("div_fixup_f16", "f16 = f16 f16 f16", math.fix_division)

# ---- conversions
_FLOATS = {"f16": np.float16, "f32": np.float32, "f64": np.float64}
for to, dtype in _FLOATS.items():
    for type in _FLOATS:
        if to != type:
            _define(f"cvt_{to}_{type}", f"{to} = {type}", _as(dtype))
for type in ("u32", "i32"):
    _define(f"cvt_f32_{type}", f"f32 = {type}", _as(np.float32))
    _define(f"cvt_f64_{type}", f"f64 = {type}", _as(np.float64))
for type in ("f32", "f64"):
    _define(f"cvt_u32_{type}", f"u32 = {type}", math.saturated_u32)
    _define(f"cvt_i32_{type}", f"i32 = {type}", math.saturated_i32)
for sign in "ui":
    _define(f"cvt_f16_{sign}16", f"f16 = {sign}16", _as(np.float16))
    _define(f"cvt_{sign}32_{sign}16", f"{sign}32 = {sign}16", _as(np.int32))
_define("cvt_u16_f16", "u16 = f16", lambda a: np.clip(np.nan_to_num(np.trunc(a.astype(np.float32)), nan=0), 0, 65535))
_define(
    "cvt_i16_f16",
    "i16 = f16",
    lambda a: np.clip(np.nan_to_num(np.trunc(a.astype(np.float32)), nan=0), -32768, 32767).astype(np.int16),
)
_define("cvt_rpi_i32_f32 cvt_nearest_i32_f32", "i32 = f32", lambda a: math.saturated_i32(np.floor(a + np.float32(0.5))))
_define("cvt_flr_i32_f32 cvt_floor_i32_f32", "i32 = f32", lambda a: math.saturated_i32(np.floor(a)))
for octet in range(4):
    _define(f"cvt_f32_ubyte{octet}", "f32 = u32", lambda a, shift=8 * octet: (a >> shift & 255).astype(np.float32))
_define("cvt_f32_bf16", "f32 = u16", lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32))


def _packed_halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Packs two arrays of 16-bit values into one of dwords."""
    low, high = (np.ascontiguousarray(value).view(np.uint16).astype(np.uint32) for value in (a, b))
    return low | high << np.uint32(16)


_define("pack_b32_f16", "b32 = b16 b16", _packed_halves)
_define("cvt_pk_bf16_f32", "b32 = f32 f32", lambda a, b: math.bfloat16_bits(a) | math.bfloat16_bits(b) << np.uint32(16))
_define("cvt_pk_f16_f32", "b32 = f32 f32", lambda a, b: _packed_halves(a.astype(np.float16), b.astype(np.float16)))
_define(
    "cvt_pkrtz_f16_f32 cvt_pk_rtz_f16_f32",
    "b32 = f32 f32",
    lambda a, b: _packed_halves(math.half_toward_zero(a), math.half_toward_zero(b)),
)
_define("cvt_pk_u16_u32", "b32 = u32 u32", lambda a, b: np.minimum(a, 65535) | np.minimum(b, 65535) << np.uint32(16))
_define(
    "cvt_pk_i16_i32",
    "b32 = i32 i32",
    lambda a, b: _packed_halves(*(np.clip(value, -32768, 32767).astype(np.int16) for value in (a, b))),
)

for type, limits in (("u16", (0, 65535)), ("i16", (-32768, 32767))):
    _define(
        f"cvt_pk_{type}_f32",
        "b32 = f32 f32",
        lambda a, b, limits=limits: _packed_halves(
            *(np.clip(math.saturated_i32(value), *limits).astype(np.uint16) for value in (a, b))
        ),
    )
