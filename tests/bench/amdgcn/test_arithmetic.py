"""Functions of one or more numbers, compiled by Triton to machine code, compared with NumPy."""

import math

import ml_dtypes
import numpy as np
import pytest

from . import kernels
from .support import ARCHS, build, poisoned

SIZE = 512
TYPES = {  # Triton's name: NumPy's type
    **{f"i{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp8e4nv": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8e5": np.dtype(ml_dtypes.float8_e5m2),
}
TINY = 2.0**-140  # a denormal of float32
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, TINY, -TINY, 2.0**-126, 3e38, -3e38, 0.5, 2.5, -2.5])


def fma(a, b, c):
    """Rounded once: the product of two float32 is exact in float64."""
    return (a.astype(np.float64) * b + c).astype(a.dtype)


FLOAT32 = {  # in the order of kernels.float32_functions; exact
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "fma": fma,
    "max": lambda a, b, c: np.fmax(a, b),
    "min": lambda a, b, c: np.fmin(a, b),
    "max_that_keeps_nan": lambda a, b, c: np.maximum(a, b),
    "min_that_keeps_nan": lambda a, b, c: np.minimum(a, b),
    "clamp": lambda a, b, c: np.clip(a, np.float32(-2), np.float32(3)),
    "less": lambda a, b, c: np.where(a < b, a, c),
    "less_or_equal": lambda a, b, c: np.where(a <= b, a, c),
    "greater": lambda a, b, c: np.where(a > b, a, c),
    "greater_or_equal": lambda a, b, c: np.where(a >= b, a, c),
    "equal": lambda a, b, c: np.where(a == b, a, c),
    "not_equal": lambda a, b, c: np.where(a != b, a, c),
    "abs": lambda a, b, c: np.abs(a),
    "negative": lambda a, b, c: -a,
    "floor": lambda a, b, c: np.floor(a),
    "ceil": lambda a, b, c: np.ceil(a),
    "trunc": lambda a, b, c: np.trunc(a),
    "round_to_even": lambda a, b, c: np.rint(a),
    "copysign": lambda a, b, c: np.copysign(a, b),
    "isnan": lambda a, b, c: np.where(np.isnan(a), b, c),
    "ldexp": lambda a, b, c: np.ldexp(a, 3),
    "exact_quotient": lambda a, b, c: a / b,
    "exact_root": lambda a, b, c: np.sqrt(a),
}

FLOAT16 = {  # in the order of kernels.float16_functions; exact
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "max": lambda a, b, c: np.fmax(a, b),
    "min": lambda a, b, c: np.fmin(a, b),
    "less": lambda a, b, c: np.where(a < b, a, c),
    "greater_or_equal": lambda a, b, c: np.where(a >= b, a, c),
    "not_equal": lambda a, b, c: np.where(a != b, a, c),
    "abs": lambda a, b, c: np.abs(a),
    "negative": lambda a, b, c: -a,
    "fma": lambda a, b, c: fma(*(x.astype(np.float32) for x in (a, b, c))).astype(a.dtype),
    "root": lambda a, b, c: np.sqrt(a.astype(np.float32)).astype(a.dtype),
}

TRANSCENDENTAL = {  # in the order of kernels.transcendental_functions: (function, inputs, roundings allowed)
    "divide": (lambda a, b: a / b, "any", 3),
    "exp2": (lambda a, b: np.exp2(a), "any", 2),
    "log2": (lambda a, b: np.log2(a), "positive", 2),
    "exp": (lambda a, b: np.exp(a), "any", 24),  # 2 to a rounded product: the error is proportional to the argument
    "log": (lambda a, b: np.log(a), "positive", 3),
    "sqrt": (lambda a, b: np.sqrt(a), "positive", 2),
    "rsqrt": (lambda a, b: 1 / np.sqrt(a), "positive", 2),
    "sin": (lambda a, b: np.sin(a), "any", 4),
    "cos": (lambda a, b: np.cos(a), "any", 4),
    "erf": (lambda a, b: np.vectorize(math.erf)(a), "any", 16),
    "tanh": (lambda a, b: np.tanh(a), "any", 5),
    "sigmoid": (lambda a, b: 1 / (1 + np.exp(-a)), "any", 24),
    "expm1": (lambda a, b: np.expm1(a), "any", 3),
    "log1p": (lambda a, b: np.log1p(a), "positive", 2),
    "pow": (lambda a, b: np.power(a, b), "positive", 16),
    "atan": (lambda a, b: np.arctan(a), "any", 5),
}


def c_divide(a, b):
    """Integer division that rounds toward zero."""
    return a // b + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def c_remainder(a, b):
    return a - c_divide(a, b) * b


INTEGERS = {  # in the order of kernels.integer_functions
    "add": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul": lambda a, b, c: a * b,
    "divide": lambda a, b, c: c_divide(a, b),
    "remainder": lambda a, b, c: c_remainder(a, b),
    "divide_by_7": lambda a, b, c: c_divide(a, a.dtype.type(7)),
    "remainder_of_10": lambda a, b, c: c_remainder(a, a.dtype.type(10)),
    "and": lambda a, b, c: a & b,
    "or": lambda a, b, c: a | b,
    "xor": lambda a, b, c: a ^ b,
    "not": lambda a, b, c: ~a,
    "shift_left": lambda a, b, c: a << c,
    "shift_right": lambda a, b, c: a >> c,
    "max": lambda a, b, c: np.maximum(a, b),
    "min": lambda a, b, c: np.minimum(a, b),
    "less": lambda a, b, c: np.where(a < b, a, c),
    "less_or_equal": lambda a, b, c: np.where(a <= b, a, c),
    "equal": lambda a, b, c: np.where(a == b, a, c),
    "multiply_add": lambda a, b, c: (a + b) * c + (a & 7) * a.dtype.type(3),
    "shift_add": lambda a, b, c: (a << a.dtype.type(3)) + b,
    "and_or": lambda a, b, c: (a & b) | c,
}


def high_half(a, b):
    bits = 8 * a.itemsize
    unsigned = f"u{a.itemsize}"
    return np.array(
        [int(x) * int(y) >> bits for x, y in zip(a.view(unsigned), b.view(unsigned), strict=True)], unsigned
    ).view(a.dtype)


def in_bits(count):
    """Makes a function of an array from a function of each number's bits as text."""
    return lambda a, b: np.array([count(f"{x:0{8 * a.itemsize}b}") for x in a.view(f"u{a.itemsize}").tolist()], a.dtype)


BITS = {  # in the order of kernels.bit_functions
    "leading_zeros": in_bits(lambda text: len(text) - len(text.lstrip("0"))),
    "ones": in_bits(lambda text: text.count("1")),
    "abs": lambda a, b: np.abs(a),
    "high_half": high_half,
    "field": lambda a, b: (a >> 5) & 0x3FF,
    "rotate": lambda a, b: (a << 13) | ((a >> 19) & 0x1FFF),
}

CASTS = {  # name: (from, to, rounding)
    **{f"{source}_to_{target}": (source, target, "nearest") for source, target in (
        *(("fp32", t) for t in ("fp16", "bf16", "fp8e4nv", "fp8e5", "i8", "i16", "i32", "i64", "u8", "u32", "u64")),
        *((t, "fp32") for t in ("fp16", "bf16", "fp8e4nv", "fp8e5", "i8", "u8", "i16", "i32", "u32", "i64", "u64")),
        *(("fp16", "bf16"), ("bf16", "fp16"), ("fp16", "fp8e4nv"), ("fp16", "fp8e5"), ("bf16", "fp8e4nv")),
        *(("fp8e4nv", "fp16"), ("fp8e4nv", "bf16"), ("fp8e5", "fp16")),
        *(("i32", "i8"), ("i8", "i64"), ("u8", "i64"), ("i64", "i32"), ("i32", "fp16"), ("fp16", "i32")),
    )},
    "fp32_to_fp16_toward_zero": ("fp32", "fp16", "toward_zero"),
    "fp32_as_bits": ("fp32", "i32", "bits"),
}  # fmt: skip


def floats(seed: int, dtype) -> np.ndarray:
    """Numbers of all magnitudes; an even and an odd seed together contain every pair of special values."""
    random = np.random.default_rng(seed)
    x = random.standard_normal(SIZE) * np.exp2(random.integers(-8, 9, SIZE))
    order = np.arange(len(SPECIAL) ** 2)
    chosen = order % len(SPECIAL) if seed % 2 else order // len(SPECIAL)
    x[: len(chosen)] = SPECIAL[chosen]
    x[len(chosen) : len(chosen) + 20] = random.integers(-9, 9, 20) / 2  # halves: ties, and equal numbers
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(dtype)


def integers(seed: int, dtype) -> np.ndarray:
    random = np.random.default_rng(seed)
    info = np.iinfo(dtype)
    special = np.array([info.min, info.max, 0, 1, info.max - 1, info.min + 1, 7, 10, 100], dtype)
    x = random.integers(info.min, info.max, SIZE, dtype=dtype, endpoint=True) >> random.integers(
        0, info.bits, SIZE
    ).astype(dtype)
    order = np.arange(len(special) ** 2)
    x[: len(order)] = special[order % len(special) if seed % 2 else order // len(special)]
    return x


def rows(kernel, arch, kind, inputs, names):
    """What a *_functions kernel writes: a row per name."""
    out = poisoned((len(names), SIZE), inputs[0].dtype)
    built = build(kernel, arch, " ".join([f"*{kind}"] * (len(inputs) + 1)), SIZE=SIZE)
    done = built.run(*inputs, out)
    assert not done.races
    return dict(zip(names, done.outputs[-1], strict=True))


def difference(got, want, inputs) -> str | None:
    """The first element that differs, ignoring the sign of a zero and the payload of a NaN."""
    at = np.flatnonzero(~((got == want) | ((got != got) & (want != want))))
    return (
        f"of {[x[at[0]] for x in inputs]}: {got[at[0]]} instead of {want[at[0]]}, {len(at)} such" if len(at) else None
    )


def assert_exact(got, table, inputs):
    with np.errstate(all="ignore"):
        wanted = {name: function(*inputs).astype(inputs[0].dtype) for name, function in table.items()}
        wrong = {name: difference(got[name], want, inputs) for name, want in wanted.items()}
    assert not {name: what for name, what in wrong.items() if what}


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_functions_are_exact(arch):
    inputs = tuple(floats(seed, np.float32) for seed in (0, 1, 2))
    got = rows(kernels.float32_functions, arch, "fp32", inputs, FLOAT32)
    assert_exact(got, FLOAT32, inputs)
    for name in ("add", "mul", "fma", "negative", "floor", "copysign", "exact_quotient"):
        with np.errstate(all="ignore"):
            want = FLOAT32[name](*inputs)
        zero = want == 0
        assert np.array_equal(np.signbit(got[name][zero]), np.signbit(want[zero])), f"sign of a zero: {name}"


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
@pytest.mark.parametrize("arch", ARCHS)
def test_16_bit_functions_are_exact(arch, kind):
    inputs = tuple(floats(seed, TYPES[kind]) for seed in (0, 1, 2))
    assert_exact(rows(kernels.float16_functions, arch, kind, inputs, FLOAT16), FLOAT16, inputs)


@pytest.mark.parametrize("domain", ["any", "positive"])
@pytest.mark.parametrize("arch", ARCHS)
def test_transcendental_functions_are_within_a_few_roundings(arch, domain):
    x, y = (np.random.default_rng(seed).uniform(-20, 20, SIZE).astype(np.float32) for seed in (0, 1))
    x[:5] = 0.0, -0.0, 1.0, -1.0, 1e-6
    inputs = (np.abs(x), y / 4) if domain == "positive" else (x, y)
    got = rows(kernels.transcendental_functions, arch, "fp32", inputs, TRANSCENDENTAL)
    wrong = {}
    for name, (function, where, roundings) in TRANSCENDENTAL.items():
        if where != domain:
            continue
        with np.errstate(all="ignore"):
            want = function(*(x.astype(np.float64) for x in inputs))
        # only an absolute error is guaranteed near a zero of the function whose argument is not 0
        scale = np.maximum(np.abs(want), 1.0 if name in ("sin", "cos", "log2", "log") else 0.0)
        allowed = roundings * np.finfo(np.float32).eps * np.where(np.isfinite(want), scale, 0)
        near = (np.abs(got[name] - np.where(np.isinf(want), 0, want)) <= allowed) | (got[name] == want)
        if len(at := np.flatnonzero(~near)):
            wrong[name] = (
                f"of {inputs[0][at[0]]}, {inputs[1][at[0]]}: {got[name][at[0]]}, not {want[at[0]]}; {len(at)} such"
            )
    assert not wrong


@pytest.mark.parametrize("kind", ["i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"])
@pytest.mark.parametrize("arch", ARCHS)
def test_integer_functions_are_exact(arch, kind):
    dtype = TYPES[kind]
    a, b = (integers(seed, dtype) for seed in (0, 1))
    undefined = (b == 0) | ((b == dtype.type(-1)) if kind[0] == "i" else False)  # and the smallest by -1
    inputs = a, np.where(undefined, dtype.type(3), b), (np.arange(SIZE) % (8 * dtype.itemsize)).astype(dtype)
    assert_exact(rows(kernels.integer_functions, arch, kind, inputs, INTEGERS), INTEGERS, inputs)


@pytest.mark.parametrize("arch", ARCHS)
def test_bit_functions_are_exact(arch):
    inputs = tuple(integers(seed, np.dtype(np.int32)) for seed in (0, 1))
    assert_exact(rows(kernels.bit_functions, arch, "i32", inputs, BITS), BITS, inputs)


def castable(source, target) -> np.ndarray:
    """Inputs for which the cast is defined: a float cast to an integer must be in its range."""
    dtype, to = TYPES[source], TYPES[target]
    if dtype.kind in "iu":
        return integers(0, dtype)
    if to.kind in "iu":
        info = np.iinfo(to)
        return np.random.default_rng(0).uniform(max(info.min, -30000), min(info.max, 30000), SIZE).astype(dtype)
    x = floats(0, dtype)
    if dtype.itemsize == 1:  # each of the 256
        x = np.tile(np.arange(256, dtype=np.uint8), 2).view(dtype)
    if "fp8" in source + target:  # how Triton saturates, and what NaN becomes in 8 bits, differs between cards
        largest = float(ml_dtypes.finfo(to if to.itemsize == 1 else dtype).max)
        x = np.where(np.abs(x.astype(np.float32)) <= largest, x, np.ones((), x.dtype))
    return x


@pytest.mark.parametrize("name", CASTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_casts_are_exact(arch, name):
    source, target, rounding = CASTS[name]
    x = floats(0, np.float32) if rounding == "bits" else castable(source, target)
    built = build(kernels.cast, arch, f"*{source} *{target}", SIZE=SIZE, ROUNDING=rounding)
    got = built.run(x, poisoned(SIZE, TYPES[target])).outputs[1]
    with np.errstate(all="ignore"):
        want = x.view(np.int32) if rounding == "bits" else x.astype(TYPES[target])
    if rounding == "toward_zero":
        further = np.isfinite(x) & (np.abs(want.astype(np.float32)) > np.abs(x))
        want = np.where(further, np.nextafter(want, np.float16(0)), want)
    wrong = difference(got, want, [x])
    assert wrong is None, wrong
