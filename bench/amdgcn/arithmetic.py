"""The arithmetic of instructions as functions on arrays, shared by the scalar and the vector unit.

Transcendental functions are computed in float64 and rounded once, so they are slightly more accurate than the
hardware's (specified to 1 ulp); a fused multiply-add is rounded from float64.
"""

from collections.abc import Callable

import numpy as np

SMALLEST_NORMAL = np.float32(2.0**-126)

COMPARISONS: dict[str, Callable] = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ne": np.not_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "ge": np.greater_equal,
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": lambda a, b: ~(a == b),
    "nlt": lambda a, b: ~(a < b),
}


# ---- integers


def shift(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """A shift distance modulo the width, in the unsigned type of that width."""
    dtype = np.dtype(f"u{bits // 8}")
    return lambda distance: (distance & (bits - 1)).astype(dtype)


def add_with_carry(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u32 sum, and whether it exceeds 32 bits."""
    total = a.astype(np.uint64) + b + carry
    return total.astype(np.uint32), total >> np.uint64(32) != 0


def subtract_with_borrow(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u32 difference, and whether it is below 0."""
    total = a.astype(np.int64) - b - borrow
    return total.astype(np.uint32), total < 0


def add_with_overflow(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i32 sum, and whether it overflows."""
    total = a.astype(np.int64) + b
    return total.astype(np.int32), total != total.astype(np.int32)


def subtract_with_overflow(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i32 difference, and whether it overflows."""
    total = a.astype(np.int64) - b
    return total.astype(np.int32), total != total.astype(np.int32)


def shift_and_add(places: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a << places) + b in u32, and whether it exceeds 32 bits."""
    total = (a.astype(np.uint64) << np.uint64(places)) + b
    return total.astype(np.uint32), total >> np.uint64(32) != 0


def multiply_high_unsigned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a 64-bit product."""
    return (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def multiply_high_signed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of a 64-bit product."""
    return (a.astype(np.int64) * b.astype(np.int64) >> 32).astype(np.int32)


def low_24(a: np.ndarray) -> np.ndarray:
    """The lower 24 bits, sign-extended for an i32."""
    return (a << 8) >> 8


def scalar_field(bits: int, signed: bool, a: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The bit field of s_bfe: first bit in where[4:0 or 5:0], width in where[22:16]."""
    return field(a, where & (bits - 1), where >> 16 & 0x7F, signed)


def field(a: np.ndarray, first: np.ndarray, width: np.ndarray, signed: bool) -> np.ndarray:
    """`width` bits of a starting at bit `first`, sign- or zero-extended."""
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    first, width = first.astype(unsigned), np.minimum(width, 8 * a.dtype.itemsize - 1).astype(unsigned)
    bits = (a.view(unsigned) >> first) & ((np.ones_like(width) << width) - 1)
    if not signed:
        return bits
    sign = np.where(width == 0, 0, np.ones_like(width) << np.maximum(width, 1) - 1).astype(unsigned)
    return ((bits ^ sign) - sign).view(a.dtype)


def reversed_bits(bits: int, a: np.ndarray) -> np.ndarray:
    """The bits in reverse order."""
    octets = np.ascontiguousarray(a)[..., None].view(np.uint8)
    turned = np.packbits(np.unpackbits(octets, axis=-1, bitorder="little")[..., ::-1], axis=-1, bitorder="little")
    return turned.view(a.dtype)[..., 0]


def trailing_zeros(bits: int, a: np.ndarray) -> np.ndarray:
    """The index of the lowest set bit; -1 if there is none."""
    return np.where(a == 0, -1, np.bitwise_count((a & (~a + a.dtype.type(1))) - a.dtype.type(1))).astype(np.int32)


def leading_zeros(bits: int, a: np.ndarray) -> np.ndarray:
    """The number of zeros before the highest set bit; -1 if there is none."""
    filled = a.copy()
    for distance in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        filled |= filled >> a.dtype.type(distance)
    return np.where(a == 0, -1, bits - np.bitwise_count(filled).astype(np.int32)).astype(np.int32)


def leading_signs(a: np.ndarray) -> np.ndarray:
    """The number of leading bits of an i32 that equal its sign; -1 if all do."""
    return leading_zeros(32, (a ^ (a >> 31)).view(np.uint32))


def permuted_bytes(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """v_perm_b32: a byte of the selector selects each byte of the result, from a (bytes 4-7) and b (bytes 0-3)."""
    both = b.astype(np.uint64) | a.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), np.uint32)
    for place in range(4):
        chosen = selector >> np.uint32(8 * place) & np.uint32(0xFF)
        octet = (both >> (chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(0xFF)
        if (chosen > 7).any():
            # 8 to 11 repeat the sign bit of a 16-bit word, 12 is 0, higher values are all ones
            signs = [both >> np.uint64(bit) & np.uint64(1) for bit in (15, 31, 47, 63)]
            sign = np.select([chosen == 8 + i for i in range(4)], signs, 0).astype(np.uint32) * np.uint32(255)
            octet = np.select(
                [chosen < 8, chosen < 12, chosen == 12], [octet, sign, np.uint32(0)], np.uint32(255)
            ).astype(np.uint32)
        result |= octet << np.uint32(8 * place)
    return result


def truth_table(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """v_bitop3_b32: for each bit, the entry of an 8-bit table that the bits of a, b and c select."""
    result = np.zeros((), a.dtype)
    for entry in range(8):
        if table >> entry & 1:
            result = result | (a if entry & 4 else ~a) & (b if entry & 2 else ~b) & (c if entry & 1 else ~c)
    return np.asarray(result)


# ---- floats


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c; a float32 product is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def median(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The median of three."""
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def reciprocal(a: np.ndarray) -> np.ndarray:
    """1 / a."""
    return (1 / a.astype(np.float64)).astype(a.dtype)


def reciprocal_square_root(a: np.ndarray) -> np.ndarray:
    """1 / sqrt(a)."""
    return (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)


def exp2(a: np.ndarray) -> np.ndarray:
    """2 ** a; denormal inputs and outputs are flushed to 0, as in the hardware."""
    result = np.exp2(np.where(np.abs(a) < SMALLEST_NORMAL, 0, a).astype(np.float64)).astype(np.float32)
    return np.where(result < SMALLEST_NORMAL, np.float32(0), result)


def log2(a: np.ndarray) -> np.ndarray:
    """log2(a); denormal inputs are flushed to 0, as in the hardware."""
    return np.log2(np.where(np.abs(a) < SMALLEST_NORMAL, 0, a).astype(np.float64)).astype(np.float32)


def saturated_i32(a: np.ndarray) -> np.ndarray:
    """Truncates to an i32; saturates out of range, NaN becomes 0."""
    whole = np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0.0)
    return np.clip(whole, -(2.0**31), 2.0**31 - 1).astype(np.int64).astype(np.int32)


def saturated_u32(a: np.ndarray) -> np.ndarray:
    """Truncates to a u32; saturates out of range, NaN becomes 0."""
    whole = np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0.0)
    return np.clip(whole, 0.0, 2.0**32 - 1).astype(np.int64).astype(np.uint32)


def bfloat16_bits(a: np.ndarray) -> np.ndarray:
    """Rounds a float32 to the nearest bfloat16, ties to even; returns its 16 bits in a u32."""
    bits = np.ascontiguousarray(a).view(np.uint32)
    rounded = (bits + ((bits >> np.uint32(16) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(a), bits >> np.uint32(16) | np.uint32(0x40), rounded)


def half_toward_zero(a: np.ndarray) -> np.ndarray:
    """Rounds a float32 to float16, toward zero."""
    nearest = a.astype(np.float16)
    beyond = (np.abs(nearest.astype(np.float32)) > np.abs(a)) & np.isfinite(a)
    return np.where(beyond, np.nextafter(nearest, np.float16(0)), nearest)


def class_of(a: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """v_cmp_class: whether a float is of one of the ten classes whose bits are set in `wanted`."""
    limit = np.finfo(a.dtype).tiny
    negative, nan, infinite, zero = np.signbit(a), np.isnan(a), np.isinf(a), a == 0
    denormal = (np.abs(a) < limit) & ~zero
    normal = ~(nan | infinite | zero | denormal)
    classes = [
        np.zeros_like(nan),  # signalling NaN, which NumPy does not distinguish
        nan,
        infinite & negative,
        normal & negative,
        denormal & negative,
        zero & negative,
        zero & ~negative,
        denormal & ~negative,
        normal & ~negative,
        infinite & ~negative,
    ]
    result = np.zeros(np.broadcast_shapes(a.shape, wanted.shape), bool)
    for bit, member in enumerate(classes):
        result |= member & (wanted >> np.uint32(bit) & np.uint32(1)).astype(bool)
    return result


def fix_division(quotient: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> np.ndarray:
    """v_div_fixup_f32: the special cases of a division."""
    kind = quotient.dtype.type
    negative = np.signbit(denominator) ^ np.signbit(numerator)
    infinity = np.where(negative, kind(-np.inf), kind(np.inf))
    zero = np.where(negative, kind(-0.0), kind(0.0))
    # a NaN quotient: the previous steps overflowed to infinity
    result = np.where(np.isnan(quotient), infinity, np.where(negative, -np.abs(quotient), np.abs(quotient)))
    result = np.where(np.isinf(denominator) | (numerator == 0), zero, result)
    result = np.where((denominator == 0) | np.isinf(numerator), infinity, result)
    undefined = ((numerator == 0) & (denominator == 0)) | (np.isinf(numerator) & np.isinf(denominator))
    return np.where(undefined | np.isnan(denominator) | np.isnan(numerator), kind(np.nan), result)


def scale_division(a: np.ndarray, denominator: np.ndarray, numerator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """v_div_scale_f32: scales a (one of the other two) so that the steps of a division have no denormals.

    The second result is the flag that makes v_div_fmas scale its result back.
    """
    x, d, n = np.broadcast_arrays(*(value.astype(np.float64) for value in (a, denominator, numerator)))

    def exponent(value: np.ndarray) -> np.ndarray:
        return np.where(value == 0, 0, np.frexp(value)[1] + 126)

    def denormal(value: np.ndarray) -> np.ndarray:
        return (np.abs(value) < SMALLEST_NORMAL) & (value != 0)

    quotient = n / d
    up = x * 2.0**64
    cases = [  # in the manual's order: condition, value, flag
        ((n == 0) | (d == 0), np.full_like(x, np.nan), False),
        (exponent(n) - exponent(d) >= 96, np.where(x == d, up, x), True),
        (denormal(d), up, False),
        # two more cases need a denormal float64 reciprocal, which a float32 never has
        (denormal(quotient), np.where(x == n, up, x), True),
        (exponent(n) <= 23, up, False),
    ]
    conditions = [case[0] for case in cases]
    value = np.select(conditions, [case[1] for case in cases], x)
    return value.astype(np.float32), np.select(conditions, [case[2] for case in cases], False)


def scaled_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, flag: np.ndarray) -> np.ndarray:
    """v_div_fmas_f32: a * b + c, scaled back where v_div_scale set the flag."""
    result = a.astype(np.float64) * b + c
    back = np.where(np.abs(c) >= 2.0, 2.0**64, 2.0**-64)
    return np.where(flag, result * back, result).astype(np.float32)


def scaled(a: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """a * 2 ** exponent."""
    return np.ldexp(a.astype(np.float64), np.clip(exponent, -2000, 2000).astype(np.int32)).astype(a.dtype)
