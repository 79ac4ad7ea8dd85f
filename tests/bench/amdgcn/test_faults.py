"""What the emulator rejects and what it leaves unchanged: accesses out of bounds, unknown instructions, NaN."""

import dataclasses
import re

import numpy as np
import pytest

from jfa_bench import amdgcn

from . import kernels
from .support import ARCHS, build, poisoned


def line_named_in(error, asm) -> str:
    """The line of the assembly that a message names, counted from 1."""
    return asm.split("\n")[int(re.search(r"\(line (\d+)\)", str(error.value))[1]) - 1]


SHORT = {
    "load": ("read of 4 bytes", 0),
    "store": ("write of 4 bytes", 1),
}  # (text of the message, index of the argument)


@pytest.mark.parametrize("small", [True, False], ids=["buffer_access", "global_access"])
@pytest.mark.parametrize("access", SHORT)
@pytest.mark.parametrize("arch", ARCHS)
def test_one_element_past_the_end_is_a_fault_with_argument_and_instruction(arch, access, small):
    what, argument = SHORT[access]
    arrays = [np.zeros(1000, np.float32), np.zeros(1000, np.float32)]
    arrays[argument] = arrays[argument][:-1]
    built = build(kernels.copy, arch, "*fp32 *fp32 i32", small=small, BLOCK=1024)
    with pytest.raises(
        amdgcn.MemoryFault, match=rf"{what}.* offset 3996 of argument {argument} \(3996 bytes\)"
    ) as error:
        built.run(*arrays, 1000)
    assert f"\t{'buffer' if small else 'global'}_{access}_" in line_named_in(error, built.asm)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_index_before_the_start_is_a_fault(arch):
    built = build(kernels.gather, arch, "*fp32 *i32 *fp32 i32", small=False, BLOCK=256)
    x, index, out = np.zeros(300, np.float32), np.zeros(200, np.int32), np.zeros(200, np.float32)
    index[77] = -1
    with pytest.raises(amdgcn.MemoryFault, match="read of 4 bytes"):
        built.run(x, index, out, 200)


@pytest.mark.parametrize("arch", ARCHS)
def test_masked_lanes_may_have_any_address(arch):
    built = build(kernels.gather, arch, "*fp32 *i32 *fp32 i32", BLOCK=256)
    x, index = np.arange(300, dtype=np.float32), np.arange(200, dtype=np.int32)
    got = built.run(x, index, poisoned(200, np.float32), 150).outputs[2]
    assert np.array_equal(got[:150], x[:150])
    assert np.isnan(got[150:]).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_an_access_beyond_the_launched_lds_size_is_a_fault(arch):
    built = build(kernels.transpose, arch, "*fp32 *fp32", ROWS=64, COLUMNS=32)
    args = np.zeros((64, 32), np.float32), np.zeros((32, 64), np.float32)
    with pytest.raises(amdgcn.MemoryFault, match=f"LDS write .* of {built.lds_bytes - 16} bytes") as error:
        dataclasses.replace(built, lds_bytes=built.lds_bytes - 16).run(*args)
    assert "\tds_" in line_named_in(error, built.asm)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_unknown_instruction_is_rejected_by_name_before_anything_runs(arch):
    built = build(kernels.copy, arch, "*fp32 *fp32 i32", BLOCK=1024)
    end = built.asm.index("\ts_endpgm")
    asm = f"{built.asm[:end]}\tv_twirl_b32_e32 v10, 4, v0\n{built.asm[end:]}"
    empty = np.zeros(0, np.float32)  # the first access would be a fault
    with pytest.raises(amdgcn.UnsupportedInstruction, match="v_twirl_b32_e32 v10, 4, v0") as error:
        built.replaced(asm).run(empty, empty, 1000)
    assert "v_twirl_b32_e32" in line_named_in(error, asm)


@pytest.mark.parametrize("modifier", ["mul:2", "twirl", "op_sel:[0,1,0]"])
def test_an_unsupported_modifier_is_rejected(modifier):
    built = build(kernels.copy, "gfx942", "*fp32 *fp32 i32", BLOCK=1024)
    changed = re.sub(r"(\tv_lshlrev_b32_e32 [^;\n]*)", rf"\1 {modifier}", built.asm, count=1)
    assert changed != built.asm
    with pytest.raises(amdgcn.UnsupportedInstruction, match=re.escape(modifier.split(":")[0])):
        built.replaced(changed).run(np.zeros(1000, np.float32), np.zeros(1000, np.float32), 1000)


@pytest.mark.parametrize("arch", ARCHS)
def test_unwritten_elements_stay_nan_and_inputs_are_unchanged(arch):
    x, out = np.arange(200, dtype=np.float32), poisoned((3, 200), np.float32)
    built = build(kernels.copy_two_rows, arch, "*fp32 *fp32 i32", BLOCK=256)
    done = built.run(x, out, 200)
    assert np.array_equal(done.outputs[1][[0, 2]], [x, x])
    assert np.isnan(done.outputs[1][1]).all()
    assert np.isnan(out).all(), "the argument itself was changed"
    assert np.array_equal(done.outputs[0], np.arange(200))
    assert done.outputs[2] is None
    assert isinstance(done.instructions, int) and done.instructions > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_an_infinite_loop_is_stopped(arch):
    built = build(kernels.collatz, arch, "*i32 *i32")
    with pytest.raises(amdgcn.Deadlock, match="without an end"):
        built.run(np.zeros(1, np.int32), np.zeros(1, np.int32), max_blocks=1000)  # 0 stays 0 and never becomes 1


@pytest.mark.parametrize("error", [amdgcn.MemoryFault, amdgcn.UnsupportedInstruction, amdgcn.Deadlock])
def test_every_exception_is_a_machine_error(error):
    assert issubclass(error, amdgcn.MachineError)


def test_a_mode_that_flushes_denormal_numbers_is_rejected():
    built = build(kernels.copy, "gfx942", "*fp32 *fp32 i32", BLOCK=256)
    asm = built.asm.replace(".amdhsa_float_denorm_mode_32 3", ".amdhsa_float_denorm_mode_32 0")
    assert asm != built.asm
    with pytest.raises(amdgcn.UnsupportedInstruction, match="mode replaces denormal numbers by 0"):
        dataclasses.replace(built, asm=asm).run(np.zeros(256, np.float32), np.zeros(256, np.float32), 256)
