"""Small Triton kernels, one for each class of instructions that AMD's backend generates.

A kernel named *_functions writes one row of SIZE results for each function of its table in test_arithmetic, in order.
"""

import pytest

triton = pytest.importorskip("triton", reason='needs triton: pip install "jfa[aot]"')
import triton.language as tl  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402


@triton.jit
def float32_functions(x, y, z, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(z + at)
    tl.store(out + 0 * SIZE + at, a + b)
    tl.store(out + 1 * SIZE + at, a - b)
    tl.store(out + 2 * SIZE + at, a * b)
    tl.store(out + 3 * SIZE + at, tl.fma(a, b, c))
    tl.store(out + 4 * SIZE + at, tl.maximum(a, b))
    tl.store(out + 5 * SIZE + at, tl.minimum(a, b))
    tl.store(out + 6 * SIZE + at, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 7 * SIZE + at, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 8 * SIZE + at, tl.clamp(a, -2.0, 3.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 9 * SIZE + at, tl.where(a < b, a, c))
    tl.store(out + 10 * SIZE + at, tl.where(a <= b, a, c))
    tl.store(out + 11 * SIZE + at, tl.where(a > b, a, c))
    tl.store(out + 12 * SIZE + at, tl.where(a >= b, a, c))
    tl.store(out + 13 * SIZE + at, tl.where(a == b, a, c))
    tl.store(out + 14 * SIZE + at, tl.where(a != b, a, c))
    tl.store(out + 15 * SIZE + at, tl.abs(a))
    tl.store(out + 16 * SIZE + at, -a)
    tl.store(out + 17 * SIZE + at, tl.floor(a))
    tl.store(out + 18 * SIZE + at, tl.ceil(a))
    tl.store(out + 19 * SIZE + at, libdevice.trunc(a))
    tl.store(out + 20 * SIZE + at, libdevice.rint(a))
    tl.store(out + 21 * SIZE + at, libdevice.copysign(a, b))
    tl.store(out + 22 * SIZE + at, tl.where(libdevice.isnan(a) != 0, b, c))
    tl.store(out + 23 * SIZE + at, libdevice.ldexp(a, 3))
    tl.store(out + 24 * SIZE + at, tl.div_rn(a, b))
    tl.store(out + 25 * SIZE + at, tl.sqrt_rn(a))


@triton.jit
def transcendental_functions(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + 0 * SIZE + at, a / b)
    tl.store(out + 1 * SIZE + at, tl.exp2(a))
    tl.store(out + 2 * SIZE + at, tl.log2(a))
    tl.store(out + 3 * SIZE + at, tl.exp(a))
    tl.store(out + 4 * SIZE + at, tl.log(a))
    tl.store(out + 5 * SIZE + at, tl.sqrt(a))
    tl.store(out + 6 * SIZE + at, tl.rsqrt(a))
    tl.store(out + 7 * SIZE + at, tl.sin(a))
    tl.store(out + 8 * SIZE + at, tl.cos(a))
    tl.store(out + 9 * SIZE + at, tl.erf(a))
    tl.store(out + 10 * SIZE + at, libdevice.tanh(a))
    tl.store(out + 11 * SIZE + at, tl.sigmoid(a))
    tl.store(out + 12 * SIZE + at, libdevice.expm1(a))
    tl.store(out + 13 * SIZE + at, libdevice.log1p(a))
    tl.store(out + 14 * SIZE + at, libdevice.pow(a, b))
    tl.store(out + 15 * SIZE + at, libdevice.atan(a))


@triton.jit
def float16_functions(x, y, z, out, SIZE: tl.constexpr):
    """Also for bfloat16."""
    at = tl.arange(0, SIZE)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(z + at)
    tl.store(out + 0 * SIZE + at, a + b)
    tl.store(out + 1 * SIZE + at, a - b)
    tl.store(out + 2 * SIZE + at, a * b)
    tl.store(out + 3 * SIZE + at, tl.maximum(a, b))
    tl.store(out + 4 * SIZE + at, tl.minimum(a, b))
    tl.store(out + 5 * SIZE + at, tl.where(a < b, a, c))
    tl.store(out + 6 * SIZE + at, tl.where(a >= b, a, c))
    tl.store(out + 7 * SIZE + at, tl.where(a != b, a, c))
    tl.store(out + 8 * SIZE + at, tl.abs(a))
    tl.store(out + 9 * SIZE + at, -a)
    tl.store(out + 10 * SIZE + at, (a.to(tl.float32) * b.to(tl.float32) + c.to(tl.float32)).to(a.dtype))
    tl.store(out + 11 * SIZE + at, tl.sqrt(a.to(tl.float32)).to(a.dtype))


@triton.jit
def integer_functions(x, y, z, out, SIZE: tl.constexpr):
    """For signed and unsigned integers of 8 to 64 bits. y is never 0, z is a number of bits."""
    at = tl.arange(0, SIZE)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(z + at)
    tl.store(out + 0 * SIZE + at, a + b)
    tl.store(out + 1 * SIZE + at, a - b)
    tl.store(out + 2 * SIZE + at, a * b)
    tl.store(out + 3 * SIZE + at, a // b)
    tl.store(out + 4 * SIZE + at, a % b)
    tl.store(out + 5 * SIZE + at, a // 7)
    tl.store(out + 6 * SIZE + at, a % 10)
    tl.store(out + 7 * SIZE + at, a & b)
    tl.store(out + 8 * SIZE + at, a | b)
    tl.store(out + 9 * SIZE + at, a ^ b)
    tl.store(out + 10 * SIZE + at, ~a)
    tl.store(out + 11 * SIZE + at, a << c)
    tl.store(out + 12 * SIZE + at, a >> c)
    tl.store(out + 13 * SIZE + at, tl.maximum(a, b))
    tl.store(out + 14 * SIZE + at, tl.minimum(a, b))
    tl.store(out + 15 * SIZE + at, tl.where(a < b, a, c))
    tl.store(out + 16 * SIZE + at, tl.where(a <= b, a, c))
    tl.store(out + 17 * SIZE + at, tl.where(a == b, a, c))
    tl.store(out + 18 * SIZE + at, (a + b) * c + (a & 7) * 3)
    tl.store(out + 19 * SIZE + at, (a << 3) + b)
    tl.store(out + 20 * SIZE + at, (a & b) | c)


@triton.jit
def bit_functions(x, y, out, SIZE: tl.constexpr):
    """For 32 and 64 bits."""
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + 0 * SIZE + at, libdevice.clz(a).to(a.dtype))
    tl.store(out + 1 * SIZE + at, libdevice.popc(a).to(a.dtype))
    tl.store(out + 2 * SIZE + at, tl.abs(a))
    tl.store(out + 3 * SIZE + at, tl.umulhi(a, b))
    tl.store(out + 4 * SIZE + at, (a >> 5) & 0x3FF)
    tl.store(out + 5 * SIZE + at, (a << 13) | ((a >> 19) & 0x1FFF))


@triton.jit
def cast(x, out, SIZE: tl.constexpr, ROUNDING: tl.constexpr):
    at = tl.arange(0, SIZE)
    a = tl.load(x + at)
    if ROUNDING == "bits":
        tl.store(out + at, a.to(out.dtype.element_ty, bitcast=True))
    elif ROUNDING == "toward_zero":
        tl.store(out + at, a.to(out.dtype.element_ty, fp_downcast_rounding="rtz"))
    else:
        tl.store(out + at, a.to(out.dtype.element_ty))


@triton.jit
def dot(
    a,  # [m, k], or [k, m] if TRANS_A
    b,  # [k, n], or [n, k] if TRANS_B
    c,  # [m, n]
    k,
    M: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros((M, N), tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        if TRANS_A:
            left = tl.trans(tl.load(a + at[:, None] * M + m[None, :]))
        else:
            left = tl.load(a + m[:, None] * k + at[None, :])
        if TRANS_B:
            right = tl.trans(tl.load(b + n[:, None] * k + at[None, :]))
        else:
            right = tl.load(b + at[:, None] * N + n[None, :])
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty))


@triton.jit
def two_dots(q, k, v, out, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr):
    """(q k^T) v over tiles of keys: the result of one product is an operand of the next, through LDS."""
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    left = tl.load(q + m[:, None] * D + d[None, :])
    acc = tl.zeros((M, D), tl.float32)
    for tile in range(TILES):
        at = (tile * N + n)[:, None] * D + d[None, :]
        scores = tl.dot(left, tl.trans(tl.load(k + at)))
        acc = tl.dot(scores.to(v.dtype.element_ty), tl.load(v + at), acc)
    tl.store(out + m[:, None] * D + d[None, :], acc)


@triton.jit
def softmax(x, out, width, stride, BLOCK: tl.constexpr):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    a = tl.load(x + row * stride + at, mask=at < width, other=-float("inf")).to(tl.float32)
    e = tl.exp(a - tl.max(a, 0))
    tl.store(out + row * stride + at, (e / tl.sum(e, 0)).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b)


@triton.jit
def _affine(a, b, c, d):
    """Two steps x -> a x + b one after the other."""
    return a * c, b * c + d


@triton.jit
def reductions(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, LEFT: tl.constexpr):
    """Rows of LEFT results in the order of test_rows.REDUCTIONS."""
    r, c, at = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, LEFT)
    a = tl.load(x + r[:, None] * COLUMNS + c[None, :])
    tl.store(out + 0 * LEFT + at, tl.sum(a, AXIS))
    tl.store(out + 1 * LEFT + at, tl.max(a, AXIS))
    tl.store(out + 2 * LEFT + at, tl.min(a, AXIS))
    tl.store(out + 3 * LEFT + at, tl.argmax(a, AXIS).to(a.dtype))
    tl.store(out + 4 * LEFT + at, tl.argmin(a, AXIS).to(a.dtype))
    tl.store(out + 5 * LEFT + at, tl.reduce(tl.abs(a), AXIS, _largest))
    tl.store(out + 6 * LEFT + at, tl.xor_sum(a.to(tl.int32), AXIS).to(a.dtype))


@triton.jit
def scans(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """Arrays of ROWS x COLUMNS in the order of test_rows.SCANS."""
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(x + at)
    tl.store(out + 0 * ROWS * COLUMNS + at, tl.cumsum(a, AXIS))
    tl.store(out + 1 * ROWS * COLUMNS + at, tl.cumsum(a, AXIS, reverse=True))
    tl.store(out + 2 * ROWS * COLUMNS + at, tl.associative_scan(a, AXIS, _largest))
    _, steps = tl.associative_scan((tl.where(a > 0, 1, -1).to(a.dtype), a), AXIS, _affine)
    tl.store(out + 3 * ROWS * COLUMNS + at, steps)


@triton.jit
def sort(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + at, tl.sort(tl.load(x + at), 1))


@triton.jit
def transpose(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    a = tl.load(x + r[:, None] * COLUMNS + c[None, :])
    tl.store(out + c[:, None] * ROWS + r[None, :], tl.trans(a))


@triton.jit
def layouts(x, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Arrays of ROWS x COLUMNS in the order of test_rows.LAYOUTS."""
    size: tl.constexpr = ROWS * COLUMNS
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    a = tl.load(x + at)
    flat = tl.arange(0, size)
    tl.store(out + 0 * size + flat, tl.reshape(a, (size,)))
    tl.store(out + 1 * size + flat, tl.reshape(tl.trans(a), (size,)))
    cube = tl.permute(tl.reshape(a, (ROWS, COLUMNS // 4, 4)), (2, 0, 1))
    tl.store(out + 2 * size + flat, tl.reshape(cube, (size,)))
    left, right = tl.split(tl.reshape(a, (ROWS, COLUMNS // 2, 2)))
    tl.store(out + 3 * size + at, tl.reshape(tl.join(right, left), (ROWS, COLUMNS)))
    tl.store(out + 4 * size + at, a + tl.sum(a, 0)[None, :] + tl.max(a, 1)[:, None])
    tl.store(out + 5 * size + at, tl.flip(a, 1))
    index = (tl.arange(0, ROWS)[:, None] * 5 + tl.arange(0, COLUMNS)[None, :] * 3) % COLUMNS
    tl.store(out + 6 * size + at, tl.gather(a, index, 1))


@triton.jit
def program_ids(out):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nx, ny, nz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    tl.store(out + (z * ny + y) * nx + x, ((x * 10 + y) * 10 + z) * 10000 + nx * 25 + ny * 5 + nz)


@triton.jit
def ragged_sums(x, length, out, stride, BLOCK: tl.constexpr):
    """A loop whose trip count each program reads from memory."""
    row = tl.program_id(0)
    end = tl.load(length + row)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(x + row * stride + at, mask=at < end, other=0.0)
    tl.store(out + row, tl.sum(acc, 0))


@triton.jit
def collatz(x, out):
    """A while loop with a conditional expression."""
    n = tl.load(x + tl.program_id(0))
    steps = 0
    while n != 1:
        if n % 2 == 0:
            n = n // 2
        else:
            n = 3 * n + 1
        steps += 1
    tl.store(out + tl.program_id(0), steps)


@triton.jit
def branch(x, out, BLOCK: tl.constexpr):
    """Each branch stores something different; the scalar condition is uniform in a program."""
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    choice = tl.load(x + row)
    if choice > 0:
        tl.store(out + row * BLOCK + at, at * choice)
    elif choice < -500:  # a constant of sixteen bits
        tl.store(out + row * BLOCK + at, at - choice)


@triton.jit
def scalars(out, i, j, f, flag, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.where(flag != 0, (i + at).to(tl.float32) * f + (j // 1000000007).to(tl.float32), 0.0))


@triton.jit
def gather(x, index, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = tl.load(index + at, mask=at < size, other=0)
    tl.store(out + at, tl.load(x + wanted, mask=at < size, other=0), mask=at < size)


@triton.jit
def copy(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < size), mask=at < size)


@triton.jit
def copy_two_rows(x, out, size, BLOCK: tl.constexpr):
    """Leaves row 1 of out, of three, as it is."""
    at = tl.arange(0, BLOCK)
    a = tl.load(x + at, mask=at < size)
    tl.store(out + at, a, mask=at < size)
    tl.store(out + 2 * size + at, a, mask=at < size)


@triton.jit
def atomic_counts(x, out, old, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Each element updates one of eight cells; the previous value of the cell is stored in `old`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at)
    cell = out + at % 8
    if KIND == "add":
        before = tl.atomic_add(cell, a)
    elif KIND == "max":
        before = tl.atomic_max(cell, a)
    elif KIND == "min":
        before = tl.atomic_min(cell, a)
    elif KIND == "and":
        before = tl.atomic_and(cell, a)
    elif KIND == "or":
        before = tl.atomic_or(cell, a)
    elif KIND == "xor":
        before = tl.atomic_xor(cell, a)
    elif KIND == "xchg":
        before = tl.atomic_xchg(cell, a)
    else:
        before = tl.atomic_cas(cell, tl.zeros_like(a), a)
    tl.store(old + at, before)


@triton.jit
def atomic_ticket(counter, out):
    """Each program takes a number from a counter: a scalar atomic, whose result every wave needs."""
    ticket = tl.atomic_add(counter, 1)
    at = tl.arange(0, 256)
    tl.store(out + ticket * 256 + at, at + ticket)


@triton.jit
def spilled(x, out, SIZE: tl.constexpr, TURNS: tl.constexpr):
    """Eight tiles alive at once, over a loop: more than a wave's registers."""
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(x + SIZE + at)
    c, d = tl.load(x + 2 * SIZE + at), tl.load(x + 3 * SIZE + at)
    e, f = tl.load(x + 4 * SIZE + at), tl.load(x + 5 * SIZE + at)
    g, h = tl.load(x + 6 * SIZE + at), tl.load(x + 7 * SIZE + at)
    for _ in range(TURNS):
        a, b, c, d, e, f, g, h = b + c * 3, c - d, d ^ e, e + f, f * 5, g - h, h + a, a ^ b
    tl.store(out + at, a + b * 2 + c * 3 + d * 4 + e * 5 + f * 6 + g * 7 + h * 8)


@triton.jit
def bfloat16_sum(x, out, turns, stride, BLOCK: tl.constexpr, ROUNDED: tl.constexpr):
    """Sums of rows in float32, or, if ROUNDED, in an accumulator rounded to bfloat16 in each iteration."""
    at = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for row in range(turns):
        acc += tl.load(x + row * stride + at).to(tl.float32)
        if ROUNDED:
            acc = acc.to(tl.bfloat16).to(tl.float32)
    tl.store(out + at, acc.to(tl.bfloat16))
