"""Matrix products, with and without the matrix units of each architecture, compared with NumPy."""

import ml_dtypes
import numpy as np
import pytest

from . import kernels
from .support import ARCHS, LANES, build, poisoned

KINDS = {  # Triton's name: (type of the operands, type of the sums)
    "fp16": (np.float16, "fp32"),
    "bf16": (ml_dtypes.bfloat16, "fp32"),
    "fp32": (np.float32, "fp32"),
    "i8": (np.int8, "i32"),
    "fp8e4nv": (ml_dtypes.float8_e4m3fn, "fp32"),
    "fp8e5": (ml_dtypes.float8_e5m2, "fp32"),
}
CASES = {  # name: (m, n, block_k, tiles of k, transposed a, transposed b, num_warps, num_stages, options)
    "smallest_tile_one_wave": (16, 16, 16, 1, False, False, 1, 1, {}),
    "two_waves": (32, 32, 32, 2, False, False, 2, 1, {}),
    "b_transposed": (64, 64, 64, 1, False, True, 4, 1, {}),
    "a_transposed": (64, 32, 64, 1, True, False, 4, 1, {}),
    "eight_waves_pipelined": (128, 64, 32, 4, False, False, 8, 2, {}),
    "matrix_tiles_of_16": (64, 64, 64, 2, True, True, 4, 2, {"matrix_instr_nonkdim": 16}),
    "matrix_tiles_of_32": (64, 64, 64, 2, False, False, 4, 1, {"matrix_instr_nonkdim": 32}),
}


def run_dot(arch, kind, a, b, case, precision="ieee"):
    m, n, block_k, tiles, trans_a, trans_b, num_warps, num_stages, options = CASES[case]
    sums = KINDS[kind][1]
    built = build(
        kernels.dot,
        arch,
        f"*{kind} *{kind} *{sums} i32",
        num_warps=num_warps,
        num_stages=num_stages,
        options=tuple(options.items()),
        M=m,
        N=n,
        BLOCK_K=block_k,
        TRANS_A=trans_a,
        TRANS_B=trans_b,
        PRECISION=precision,
    )
    out = poisoned((m, n), np.int32 if sums == "i32" else np.float32)
    a, b = (a.T if trans_a else a), (b.T if trans_b else b)
    done = built.run(np.ascontiguousarray(a), np.ascontiguousarray(b), out, block_k * tiles)
    assert not done.races
    return done.outputs[2]


def operands(kind, case, seed=0):
    m, n, block_k, tiles = CASES[case][:4]
    dtype = np.dtype(KINDS[kind][0])
    random = np.random.default_rng(seed)
    shapes = (m, block_k * tiles), (block_k * tiles, n)
    if dtype.kind == "i":
        return tuple(random.integers(-128, 128, shape, dtype=dtype) for shape in shapes)
    return tuple(random.standard_normal(shape).astype(dtype) for shape in shapes)


def assert_product(got, a, b, rounding=2.0**-24):
    """Checks the error bound of a float32 sum in any order: k roundings of the sum of absolute products."""
    if a.dtype.kind == "i":
        assert np.array_equal(got, a.astype(np.int32) @ b.astype(np.int32))
        return
    a, b = a.astype(np.float64), b.astype(np.float64)
    limit = (len(b) + 1) * rounding * (np.abs(a) @ np.abs(b))
    error = np.abs(got - a @ b)
    assert (error <= limit).all(), f"{np.nanmax(error):.2e} off, {limit.flat[error.argmax()]:.2e} allowed"


PRODUCTS = [
    (arch, kind, case)
    for arch in ARCHS
    for kind in KINDS
    for case in CASES
    if LANES[arch] == 64 or not case.startswith("matrix_tiles")  # RDNA's are always of 16
]


@pytest.mark.parametrize(("arch", "kind", "case"), PRODUCTS)
def test_a_product_agrees_with_numpy(arch, kind, case):
    a, b = operands(kind, case)
    assert_product(run_dot(arch, kind, a, b, case), a, b)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_product_propagates_infinities_and_nan(arch, kind):
    a, b = (np.ones_like(x) for x in operands(kind, "two_waves"))
    a[1, 2], a[3, 4], a[5, 6] = np.inf, -np.inf, np.nan
    b[2, 1], b[4, 7] = 0, -1
    got = run_dot(arch, kind, a, b, "two_waves")
    with np.errstate(invalid="ignore"):
        want = a.astype(np.float32) @ b.astype(np.float32)
    assert np.array_equal(got, want, equal_nan=True)


def test_tf32_rounds_the_operands_to_ten_bits():
    a, b = operands("fp32", "b_transposed")
    got = run_dot("gfx942", "fp32", a, b, "b_transposed", precision="tf32")
    assert_product(got, a, b, rounding=2.0**-10 / 16)
    with pytest.raises(AssertionError, match="off"):
        assert_product(got, a, b)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_float32_product_from_three_bfloat16_products(arch):
    a, b = operands("fp32", "two_waves")
    assert_product(run_dot(arch, "fp32", a, b, "two_waves", precision="bf16x3"), a, b, rounding=2.0**-20)


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8e4nv"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_product_of_a_product(arch, kind):
    m, n, d, tiles = 64, 32, 32, 3
    dtype = np.dtype(KINDS[kind][0])
    random = np.random.default_rng(0)
    q, k, v = (random.integers(-2, 3, (rows, d)).astype(dtype) for rows in (m, n * tiles, n * tiles))
    q *= (np.arange(d) % 8 == 0).astype(dtype)  # so that every score is a small integer, exact in 8 bits
    built = build(kernels.two_dots, arch, f"*{kind} *{kind} *{kind} *fp32", M=m, N=n, D=d, TILES=tiles)
    done = built.run(q, k, v, poisoned((m, d), np.float32))
    assert not done.races
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    assert np.array_equal(done.outputs[3], q @ k.T @ v)
