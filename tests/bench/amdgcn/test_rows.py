"""Softmax, reductions, scans, sorting, and data movement between lanes and waves, compared with NumPy."""

import ml_dtypes
import numpy as np
import pytest

from . import kernels
from .support import ARCHS, build, poisoned

TYPES = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "i8": np.int8,
    "i32": np.int32,
    "i64": np.int64,
}
TILES = {"one_wave": (16, 16, 1), "four_waves": (32, 64, 4), "eight_waves": (64, 64, 8)}  # rows, columns, num_warps

REDUCTIONS = {  # in the order of kernels.reductions
    "sum": lambda a, axis: a.sum(axis),
    "max": lambda a, axis: a.max(axis),
    "min": lambda a, axis: a.min(axis),
    "argmax_first_of_equals": lambda a, axis: a.argmax(axis),
    "argmin_first_of_equals": lambda a, axis: a.argmin(axis),
    "largest_absolute": lambda a, axis: np.abs(a).max(axis),
    "xor": lambda a, axis: np.bitwise_xor.reduce(a.astype(np.int32), axis),
}


def steps(a, axis):
    """x -> s x + a from 0, with s the sign of a."""
    out, x = np.empty_like(a), 0
    for n in range(a.shape[axis]):
        row = np.take(a, n, axis)
        x = np.where(row > 0, 1, -1) * x + row
        np.moveaxis(out, axis, 0)[n] = x
    return out


SCANS = {  # in the order of kernels.scans
    "sum": lambda a, axis: a.cumsum(axis),
    "sum_from_the_end": lambda a, axis: np.flip(np.flip(a, axis).cumsum(axis), axis),
    "max": lambda a, axis: np.maximum.accumulate(a, axis),
    "steps": steps,
}

LAYOUTS = {  # in the order of kernels.layouts
    "flat": lambda a: a,
    "transposed": lambda a: a.T,
    "cube": lambda a: a.reshape(len(a), -1, 4).transpose(2, 0, 1),
    "neighbours_swapped": lambda a: a.reshape(len(a), -1, 2)[:, :, ::-1],
    "row_and_column": lambda a: a + a.sum(0, dtype=a.dtype) + a.max(1, keepdims=True),
    "flipped": lambda a: a[:, ::-1],
    "gathered": lambda a: np.take_along_axis(
        a, (5 * np.arange(len(a))[:, None] + 3 * np.arange(len(a.T))) % len(a.T), 1
    ),
}


def small_integers(shape, dtype, seed=0):
    """Numbers whose sums and products are exact in any order; many of them are equal."""
    return np.random.default_rng(seed).integers(-9, 10, shape).astype(dtype)


def assert_tables_equal(got, table, *args):
    wrong = [name for n, name in enumerate(table) if not np.array_equal(got[n].ravel(), table[name](*args).ravel())]
    assert not wrong


@pytest.mark.parametrize(("kind", "num_warps"), [("fp32", 1), ("bf16", 2), ("fp32", 4), ("bf16", 8)])
@pytest.mark.parametrize("arch", ARCHS)
def test_softmax_of_odd_rows(arch, kind, num_warps):
    dtype, block, stride = TYPES[kind], 128, 130
    built = build(kernels.softmax, arch, f"*{kind} *{kind} i32 i32", num_warps=num_warps, BLOCK=block)
    x = np.random.default_rng(0).standard_normal((3, stride)).astype(dtype)
    x[1, 4], x[2, 5] = -np.inf, 100
    for width in (1, 31, 77, 128):
        done = built.run(x, poisoned(x.shape, dtype), width, stride, grid=(3,))
        assert not done.races
        score = x[:, :width].astype(np.float64) - x[:, :width].max(1, keepdims=True).astype(np.float64)
        got, want = done.outputs[1], np.exp(score) / np.exp(score).sum(1, keepdims=True)
        # the output's rounding, that of the sum, and those of exp, whose argument is rounded too
        roundings = float(ml_dtypes.finfo(dtype).eps) / 2 + (64 + 8 - np.maximum(score, -200)) * 2.0**-23
        assert (np.abs(got[:, :width] - want) <= roundings * want + np.finfo(np.float32).tiny).all()
        assert np.isnan(got[:, width:]).all(), "written past the mask"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("kind", "tile"), [*(("fp32", tile) for tile in TILES), ("i32", "four_waves")])
@pytest.mark.parametrize("arch", ARCHS)
def test_reductions(arch, kind, tile, axis):
    rows, columns, num_warps = TILES[tile]
    left = (columns, rows)[axis]
    built = build(
        kernels.reductions,
        arch,
        f"*{kind} *{kind}",
        num_warps=num_warps,
        ROWS=rows,
        COLUMNS=columns,
        AXIS=axis,
        LEFT=left,
    )
    x = small_integers((rows, columns), TYPES[kind])
    done = built.run(x, poisoned((len(REDUCTIONS), left), TYPES[kind]))
    assert not done.races
    assert_tables_equal(done.outputs[1], REDUCTIONS, x, axis)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("arch", ARCHS)
def test_scans(arch, tile, axis):
    rows, columns, num_warps = TILES[tile]
    built = build(kernels.scans, arch, "*fp32 *fp32", num_warps=num_warps, ROWS=rows, COLUMNS=columns, AXIS=axis)
    x = small_integers((rows, columns), np.float32)
    done = built.run(x, poisoned((len(SCANS), rows, columns), np.float32))
    assert not done.races
    assert_tables_equal(done.outputs[1], SCANS, x, axis)


@pytest.mark.parametrize("kind", ["fp32", "fp16", "i8", "i64"])
@pytest.mark.parametrize("arch", ARCHS)
def test_layout_changes(arch, kind):
    rows, columns = 32, 32
    built = build(kernels.layouts, arch, f"*{kind} *{kind}", ROWS=rows, COLUMNS=columns)
    x = small_integers((rows, columns), TYPES[kind]) % 4
    done = built.run(x, poisoned((len(LAYOUTS), rows, columns), TYPES[kind]))
    assert not done.races
    assert_tables_equal(done.outputs[1], LAYOUTS, x)


@pytest.mark.parametrize(("kind", "num_warps"), [("fp32", 4), ("fp16", 4), ("i8", 1), ("i8", 4), ("i64", 2)])
@pytest.mark.parametrize("arch", ARCHS)
def test_transpose(arch, kind, num_warps):
    x = np.arange(64 * 32).reshape(64, 32).astype(TYPES[kind])
    built = build(kernels.transpose, arch, f"*{kind} *{kind}", num_warps=num_warps, ROWS=64, COLUMNS=32)
    done = built.run(x, poisoned((32, 64), TYPES[kind]))
    assert not done.races
    assert np.array_equal(done.outputs[1], x.T)


@pytest.mark.parametrize("kind", ["fp32", "i32"])
@pytest.mark.parametrize("arch", ARCHS)
def test_sort(arch, kind):
    x = np.random.default_rng(0).integers(-99, 99, (16, 32)).astype(TYPES[kind])
    done = build(kernels.sort, arch, f"*{kind} *{kind}", ROWS=16, COLUMNS=32).run(x, poisoned(x.shape, x.dtype))
    assert not done.races
    assert np.array_equal(done.outputs[1], np.sort(x, 1))
