"""Grids, loops, branches, arguments, indexed loads, atomics and spilled registers."""

import re

import numpy as np
import pytest

from . import kernels
from .support import ARCHS, LANES, build, poisoned

TYPES = {"fp32": np.float32, "fp16": np.float16, "i8": np.int8, "i32": np.int32, "u32": np.uint32, "i64": np.int64}


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 1, 1), (2, 3, 4), (1, 7, 2), (300, 1, 1)], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_programs_have_the_right_program_ids(arch, grid):
    nx, ny, nz = grid
    out = poisoned((nz, ny, nx), np.int32)
    z, y, x = np.indices(out.shape)
    got = build(kernels.program_ids, arch, "*i32", num_warps=1).run(out, grid=grid).outputs[0]
    assert np.array_equal(got, ((x * 10 + y) * 10 + z) * 10000 + nx * 25 + ny * 5 + nz)


@pytest.mark.parametrize("grid", [(0, 1, 1), (3, 0, 2)], ids=str)
def test_an_empty_grid_runs_nothing(grid):
    out = poisoned(4, np.int32)
    done = build(kernels.program_ids, "gfx942", "*i32", num_warps=1).run(out, grid=grid)
    assert done.instructions == 0
    assert np.array_equal(done.outputs[0], out)


@pytest.mark.parametrize("arch", ARCHS)
def test_loops_with_a_different_trip_count_per_program(arch):
    length = np.array([0, 1, 400, 127, 128, 129, 3, 256], np.int32)
    x = np.random.default_rng(0).integers(-9, 9, (len(length), 400)).astype(np.float32)
    built = build(kernels.ragged_sums, arch, "*fp32 *i32 *fp32 i32", BLOCK=128)
    done = built.run(x, length, poisoned(len(length), np.float32), x.shape[1], grid=(len(length),))
    assert not done.races
    assert np.array_equal(done.outputs[2], [row[:n].sum() for row, n in zip(x, length, strict=True)])


@pytest.mark.parametrize("arch", ARCHS)
def test_while_loops_with_a_condition_per_program(arch):
    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    x = np.array([1, 2, 3, 7, 27, 97, 64], np.int32)
    got = build(kernels.collatz, arch, "*i32 *i32").run(x, poisoned(len(x), np.int32), grid=(len(x),)).outputs[1]
    assert got.tolist() == [steps(n) for n in x.tolist()]


@pytest.mark.parametrize("arch", ARCHS)
def test_branches_on_a_number_from_memory(arch):
    x = np.array([3, -900, 0, 1, -500, -501, 70_000, -70_000], np.int32)
    out = poisoned((len(x), 256), np.int32)
    got = build(kernels.branch, arch, "*i32 *i32", BLOCK=256).run(x, out, grid=(len(x),)).outputs[1]
    at = np.arange(256)
    want = [at * n if n > 0 else at - n if n < -500 else np.full(256, -1) for n in x]
    assert np.array_equal(got, want)


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("arch", ARCHS)
def test_numbers_as_arguments(arch, flag):
    i, j, f = -77, -(2**40) + 12345, 0.75
    got = build(kernels.scalars, arch, "*fp32 i32 i64 fp32 i1", BLOCK=256).run(poisoned(256, np.float32), i, j, f, flag)
    want = (i + np.arange(256)) * f + int(j / 1000000007)
    assert np.array_equal(got.outputs[0], want.astype(np.float32) * flag)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "i8", "i64"])
@pytest.mark.parametrize("arch", ARCHS)
def test_loads_by_index(arch, kind):
    random = np.random.default_rng(0)
    x = random.integers(-99, 99, 1000).astype(TYPES[kind])
    index = random.integers(0, 1000, 700).astype(np.int32)
    built = build(kernels.gather, arch, f"*{kind} *i32 *{kind} i32", BLOCK=256)
    done = built.run(x, index, poisoned(700, x.dtype), 700, grid=(3,))
    assert np.array_equal(done.outputs[2], x[index])


COPIES = [
    ("fp32", 1, True),
    ("i8", 2, False),
    ("fp16", 4, True),
    ("i64", 8, False),
    ("i8", 8, True),
    ("fp32", 4, False),
]


@pytest.mark.parametrize(("kind", "num_warps", "small"), COPIES)
@pytest.mark.parametrize("arch", ARCHS)
def test_copies_of_odd_sizes(arch, kind, num_warps, small):
    x = np.random.default_rng(0).integers(-99, 99, 2500).astype(TYPES[kind])
    built = build(kernels.copy, arch, f"*{kind} *{kind} i32", num_warps=num_warps, small=small, BLOCK=1024)
    assert np.array_equal(built.run(x, poisoned(x.shape, x.dtype), x.size, grid=(3,)).outputs[1], x)


ATOMICS = {  # the new value of a cell
    "add": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "xchg": lambda before, x: x,
    "cas": lambda before, x: np.where(before == 0, x, before),  # of a cell that holds 0
}
ATOMIC_CASES = [  # type, name, through a buffer descriptor
    *((kind, name, True) for kind in ("i32", "i64") for name in ATOMICS),
    *(("u32", name, True) for name in ("max", "min")),
    *(("fp32", name, True) for name in ("add", "max", "min", "xchg")),
    ("fp16", "add", True),
    *((kind, "add", False) for kind in ("i32", "i64", "fp32", "fp16")),
    *(("i32", name, False) for name in ("max", "xor", "cas")),
    ("i64", "cas", False),
]


@pytest.mark.parametrize(("kind", "name", "small"), ATOMIC_CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_atomics_on_one_address_are_executed_one_by_one(arch, kind, name, small):
    dtype = np.dtype(TYPES[kind])
    x = np.random.default_rng(0).integers(0 if dtype.kind == "u" else -20, 20, 512).astype(dtype)
    x[x == 0] = 1
    start = np.full(8, 0 if name == "cas" else 5, dtype)
    built = build(kernels.atomic_counts, arch, f"*{kind} *{kind} *{kind}", small=small, KIND=name, BLOCK=256)
    _, out, old = built.run(x, start, poisoned(x.shape, dtype), grid=(2,)).outputs
    for cell in range(8):
        before, after = old[cell::8], ATOMICS[name](old[cell::8], x[cell::8])
        # in any order: the value that one element stores is the one that the next element reads
        assert sorted([*before, out[cell]]) == sorted([start[cell], *after])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_scalar_atomic_runs_once_and_every_wave_gets_its_result(arch):
    counter, out = np.zeros(1, np.int32), poisoned((6, 256), np.int32)
    done = build(kernels.atomic_ticket, arch, "*i32 *i32").run(counter, out, grid=(6,))
    assert not done.races
    assert done.outputs[0][0] == 6
    assert np.array_equal(done.outputs[1], np.arange(256) + np.arange(6)[:, None])


SPILLS = {
    "more_tiles_than_registers": ({64: 4096, 32: 1024}, ()),
    "occupancy_asked_for": ({64: 1024, 32: 1024}, (("waves_per_eu", 8),)),
}


@pytest.mark.parametrize("case", SPILLS)
@pytest.mark.parametrize("arch", ARCHS)
def test_spilled_registers_are_restored(arch, case):
    sizes, options = SPILLS[case]
    size = sizes[LANES[arch]]
    built = build(kernels.spilled, arch, "*i32 *i32", num_warps=1, options=options, SIZE=size, TURNS=3)
    assert int(re.search(r"\.vgpr_spill_count:\s+(\d+)", built.asm)[1]) > 0, "nothing was spilled: nothing is tested"
    x = np.random.default_rng(0).integers(-99, 99, (8, size)).astype(np.int32)
    a, b, c, d, e, f, g, h = x
    for _ in range(3):
        a, b, c, d, e, f, g, h = b + c * 3, c - d, d ^ e, e + f, f * 5, g - h, h + a, a ^ b
    got = built.run(x, poisoned(size, np.int32)).outputs[1]
    assert np.array_equal(got, a + b * 2 + c * 3 + d * 4 + e * 5 + f * 6 + g * 7 + h * 8)
