"""The library's flash attention kernel in the emulator: it is correct, and changes that break it are detected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from runs import run

from jfa.types import AttentionSpec
from jfa_bench import amdgcn

from .flash import compiled, flash
from .mutants import mutants
from .support import ARCHS

MAX_BLOCKS = 2000  # several times the number that the correct kernel executes
NOTICED, MUTANTS = 45, 60


def complaint(known, asm=None) -> str | None:
    """The error of the kernel, or of the assembly `asm` in its place; None: it is correct."""
    try:
        known.check(asm, max_blocks=MAX_BLOCKS)
    except (amdgcn.MachineError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [run(arch, dtype, quick=dtype == "bfloat16") for arch in ARCHS for dtype in ("bfloat16", "float16", "float32")],
)
def test_the_kernel_meets_the_numerics_contract(arch, dtype):
    flash(arch, dtype).check()


@pytest.mark.parametrize("arch", [run(arch, quick=False, soak=True) for arch in ("gfx942", "gfx1100")])
def test_most_one_instruction_changes_are_detected(arch):
    known = flash(arch, "float16")
    missed = [what for what, asm in mutants(known.built.asm, MUTANTS, seed=0) if complaint(known, asm) is None]
    noticed = MUTANTS - len(missed)
    assert noticed >= NOTICED, f"{noticed} of {MUTANTS} noticed, not:\n" + "\n".join(missed)


def diagonal_one_too_far(patch):
    patch.setattr(AttentionSpec, "right", property(lambda spec: 1))


def diagonal_one_short(patch):
    patch.setattr(AttentionSpec, "right", property(lambda spec: -1))


def window_one_too_far(patch):
    patch.setattr(AttentionSpec, "left", property(lambda spec: spec.window[0] + 1))


def window_one_short(patch):
    patch.setattr(AttentionSpec, "left", property(lambda spec: spec.window[0] - 1))


def accumulator_in_bfloat16(patch):
    fori_loop = lax.fori_loop

    def rounded(x):
        return x.astype(jnp.bfloat16).astype(x.dtype) if x.ndim == 2 else x

    def loop(first, end, body, carry):
        return fori_loop(first, end, lambda n, carry: jax.tree.map(rounded, body(n, carry)), carry)

    patch.setattr(lax, "fori_loop", loop)


BREAKS = (diagonal_one_too_far, diagonal_one_short, window_one_too_far, window_one_short, accumulator_in_bfloat16)


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("arch", [run("gfx942", quick=True), run("gfx1201", quick=False)])
def test_a_broken_kernel_is_detected(arch, break_it, changing_kernels):
    sound = flash(arch, "float32")
    break_it(changing_kernels)
    broken = compiled(arch, "float32")
    assert broken[0].asm != sound.built.asm, "the kernel is not broken: nothing is tested"
    with pytest.raises(AssertionError, match=r"the allowed|infinities|NaN"):
        dataclasses.replace(sound, built=broken[0]).check(max_blocks=MAX_BLOCKS)


@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_one_key_past_the_length_is_detected(arch):
    known = flash(arch, "bfloat16")
    call = known.calls[0]
    kv_len = call.args[4] + np.array([1, 0], np.int32)
    call = dataclasses.replace(call, args=(*call.args[:4], kv_len, *call.args[5:]))
    with pytest.raises(AssertionError, match="NaN"):
        dataclasses.replace(known, calls=(call,)).check()


@pytest.mark.parametrize("output", [-2, -1], ids=["out", "lse"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx1201"])
def test_a_store_past_the_end_is_detected(arch, output):
    known = flash(arch, "float16")
    args = list(known.calls[0].args)
    args[output] = args[output].ravel()[:-1]
    with pytest.raises(amdgcn.MemoryFault, match=rf"write .* of argument {len(args) + output}\b"):
        known.built.run(*args, grid=known.grid)
