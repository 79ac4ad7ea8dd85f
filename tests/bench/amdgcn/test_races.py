"""Waves that share the LDS without a barrier are detected, whatever order the emulator runs them in."""

import numpy as np
import pytest
from runs import run

from jfa_bench import amdgcn

from . import kernels
from .flash import flash
from .support import ARCHS, barriers, build, poisoned, without


def seeded(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def transpose(arch):
    built = build(kernels.transpose, arch, "*fp32 *fp32", ROWS=64, COLUMNS=32)
    return built, (seeded(64, 32), poisoned((32, 64), np.float32))


def softmax(arch):
    built = build(kernels.softmax, arch, "*fp32 *fp32 i32 i32", BLOCK=128)
    return built, (seeded(1, 128), poisoned((1, 128), np.float32), 101, 128)


def scan_across_waves(arch):
    built = build(kernels.scans, arch, "*fp32 *fp32", ROWS=64, COLUMNS=32, AXIS=0)
    return built, (seeded(64, 32), poisoned((4, 64, 32), np.float32))


def two_dots(arch):
    built = build(kernels.two_dots, arch, "*fp16 *fp16 *fp16 *fp32", M=64, N=32, D=32, TILES=3)
    inputs = (seeded(rows, 32, dtype=np.float16) for rows in (64, 96, 96))
    return built, (*inputs, poisoned((64, 32), np.float32))


# Kernels in which four waves exchange data, and in which Triton inserts no unnecessary barrier.
EXCHANGES = (transpose, softmax, scan_across_waves, two_dots)


def unnoticed(built, args, grid=(1, 1, 1)):
    """(barriers of a kernel whose removal is not detected, number of its barriers)."""
    want = built.run(*args, grid=grid)
    assert not want.races
    found = barriers(built.asm)
    missed = []
    for barrier in found:
        try:
            done = built.replaced(without(built.asm, barrier)).run(*args, grid=grid)
        except amdgcn.MachineError:
            continue
        same = all(
            np.array_equal(a.view(np.uint8), b.view(np.uint8))
            for a, b in zip(done.outputs, want.outputs, strict=True)
            if a is not None
        )
        if same and not done.races:
            missed.append(f"line {barrier[0] + 1}")
    return missed, len(found)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("arch", ARCHS)
def test_removing_any_barrier_is_detected(arch, exchange):
    built, args = exchange(arch)
    missed, number = unnoticed(built, args)
    assert number > 0
    assert not missed


@pytest.mark.parametrize("arch", [run(arch, quick=arch == "gfx1201") for arch in ARCHS])
def test_removing_any_barrier_of_flash_attention_is_detected(arch):
    known = flash(arch, "float16")
    missed, number = unnoticed(known.built, known.calls[0].args, known.grid)
    assert number > 5
    assert not missed


def test_a_race_is_reported_with_instruction_and_line():
    built, args = transpose("gfx942")
    [barrier] = barriers(built.asm)
    races = built.replaced(without(built.asm, barrier)).run(*args).races
    assert races
    for race in races:
        line = int(race.rsplit("(line ", 1)[1].rstrip(")"))
        assert race.startswith("LDS read of data that another wave has written since the last barrier")
        assert "ds_read" in built.asm.split("\n")[line - 1]


@pytest.mark.parametrize("half", ["signal", "wait"])
def test_half_a_barrier_is_a_deadlock_on_gfx12(half):
    built, args = two_dots("gfx1201")
    for barrier in barriers(built.asm):
        asm = without(built.asm, [barrier[("signal", "wait").index(half)]])
        with pytest.raises(amdgcn.Deadlock, match="s_barrier"):
            built.replaced(asm).run(*args)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_a_barrier_that_some_waves_never_reach_is_a_deadlock(arch):
    built, args = transpose(arch)
    # the wave of thread 0 exits before the barrier
    leave = "\tv_readfirstlane_b32 s90, v0\n\ts_cmp_eq_u32 s90, 0\n\ts_cbranch_scc1 .LBB0_99\n"
    entry = built.asm.index("\ts_load")
    end = built.asm.index("\ts_endpgm")
    asm = f"{built.asm[:entry]}{leave}{built.asm[entry:end]}.LBB0_99:\n{built.asm[end:]}"
    with pytest.raises(amdgcn.Deadlock, match="barrier"):
        built.replaced(asm).run(*args)
