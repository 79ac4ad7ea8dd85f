"""Analysis of machine code: a small text with known counts, single instructions, and compiled kernels."""

import dataclasses
import re

import pytest
from compiled import needs_triton

from jfa_bench.proof import aot, compilers, machine_code, ops

# Two loops over the same products: main (LBB0_2) and masked (LBB0_5, with a block before its
# header); an outer loop around the first; and a backward branch without a loop (LBB0_1).
ASM = """
	.text
attention:                              ; @attention
; %bb.0:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	v_mov_b32_e32 v0, 0
	s_branch .LBB0_6
.LBB0_1:

	v_mov_b32_e32 v1, 0
.LBB0_2:

	s_nop 0
	global_load_dwordx4 v[8:11], v[0:1], off
	s_waitcnt vmcnt(0)
	ds_write_b128 v2, v[8:11]
	ds_read2_b64 v[4:7], v2 offset1:2
	v_mfma_f32_32x32x8_f16 v[16:31], v[4:5], v[6:7], v[16:31]
	v_exp_f32_e32 v3, v3
	v_pk_fma_f32 v[12:13], v[12:13], v[14:15], v[12:13]
	v_mul_lo_u32 v3, v3, v4
	scratch_load_dword v40, off, off offset:4 ; 4-byte Folded Reload
	s_cbranch_scc1 .LBB0_2
; %bb.3:
	v_add_f32_e32 v1, v1, v1
	s_cbranch_scc1 .LBB0_1
	s_branch .LBB0_5
.LBB0_4:
	v_mfma_f32_32x32x8_f16 v[16:31], v[4:5], v[6:7], v[16:31]
	s_cbranch_scc0 .LBB0_7
.LBB0_5:
	v_exp_f32_e32 v3, v3
	v_cndmask_b32_e32 v3, v4, v5, vcc
	v_cndmask_b32_e32 v4, v4, v5, vcc
	v_cndmask_b32_e32 v5, v4, v5, vcc
	v_cndmask_b32_e32 v6, v4, v5, vcc
	v_cndmask_b32_e32 v7, v4, v5, vcc
	v_cndmask_b32_e32 v8, v4, v5, vcc
	s_branch .LBB0_4
.LBB0_6:
	s_cbranch_scc1 .LBB0_1
.LBB0_7:
	s_endpgm
    .agpr_count:     8
    .private_segment_fixed_size: 16
    .sgpr_count:     20
    .vgpr_count:     130
    .vgpr_spill_count: 3
"""
TTIR = """
module {
  %0 = tt.dot %a, %b, %c : tensor<512x512xf16> * tensor<512x512xf16> -> tensor<512x512xf32>
  scf.for %i = %x to %y step %z  : i32 {
    %1 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf16> * tensor<32x16xf16> -> tensor<64x16xf32>
    %2 = scf.if %p -> (i32) {
      scf.yield %q : i32
    } else {
      scf.yield %r : i32
    }
  }
  scf.for %i = %x to %y step %z  : i32 {
    scf.yield
  }
}
"""


def code(arch="gfx942", asm=ASM, ttir=TTIR, num_warps=4, **fields):
    kernel = aot.Kernel(name="k", ttir=ttir, grid=(1, 1, 1), num_warps=num_warps, num_stages=1)
    return aot.Compiled(kernel=kernel, arch=arch, compiler="triton", asm=asm, **{"lds_bytes": 32_768} | fields)


def test_a_text_with_known_counts():
    read = machine_code.read(code())
    assert tuple(read) == machine_code.FIELDS
    assert [read[x] for x in ("vgpr", "agpr", "sgpr", "vgpr_spills", "scratch_bytes")] == [130, 8, 20, 3, 16]
    assert (read["lds_bytes"], read["lds_limit"]) == (32_768, 65_536)
    assert read["waves_per_simd"] == 2  # two workgroups of four waves fit the LDS, three the registers
    assert read["matrix_instructions"] == 2
    assert read["loop_cycles"] == {
        "memory": 4,
        "lds": 8,
        "matrix": 32,  # 16,384 FLOP at 512 a cycle
        "transcendental": 16,
        "vector": 4 + 16,  # the packed one, and a quarter-rate multiplication
        "scratch": 4,
        "lds_data": (16 + 16) * 64 / 32,
    }
    assert read["masked_loop_cycles"] == {"matrix": 32, "transcendental": 16, "vector": 24}
    flop = 2 * 64 * 32 * 16
    assert read["useful_matrix_cycles"] == flop / 512 / 4
    assert read["matrix_bound"] == round(32 / 36, 3)
    assert read["flop_per_cycle"] == round(flop / 4 / (36 + 4 * 64 / (64 / 4)), 1)
    assert read["loop_bytes"] == 16 * 64 * 4
    assert read["memory_cycles"] == round(4096 / 8.3)
    assert read["memory_bound_share"] == 1.0
    assert read["dual_issue"] == 0


def test_memory_bound_share_is_low_if_vector_work_is_the_bottleneck():
    """Like decoding: no matrix instruction, and vector work that takes longer than loading the bytes of a tile."""
    lines = ["\tv_cndmask_b32_e32 v3, v4, v5, vcc"] * 1000
    asm = "\n".join([".LBB0_1:", "\tglobal_load_dwordx4 v[8:11], v[0:1], off", *lines, "\ts_cbranch_scc1 .LBB0_1"])
    read = machine_code.read(code(asm=asm, ttir=""))
    assert (read["matrix_bound"], read["useful_matrix_cycles"], read["flop_per_cycle"]) == (None, 0, None)
    assert read["memory_bound_share"] == pytest.approx(4096 / 8.3 / 4000, rel=0.01)


def test_two_operations_at_once_are_one_slot_on_rdna():
    asm = """
.LBB0_1:
	v_dual_mul_f32 v1, v2, v3 :: v_dual_add_f32 v4, v5, v6
	v_exp_f32_e32 v3, v3
	s_delay_alu instid0(VALU_DEP_1)
	v_wmma_f32_16x16x16_f16 v[16:23], v[0:7], v[8:15], v[16:23]
	ds_load_u16_d16 v1, v2
	buffer_gl0_inv
	s_cbranch_scc1 .LBB0_1
    .vgpr_count:     160
"""
    read = machine_code.read(code("gfx1100", asm, num_warps=8, lds_bytes=0))
    cycles = {"vector": 1, "transcendental": 4, "matrix": 32, "lds": 1, "lds_data": 2}
    assert (read["loop_cycles"], read["dual_issue"]) == (cycles, 1)
    assert read["waves_per_simd"] == 8  # nine fit the registers: four workgroups of two waves a SIMD
    assert (read["agpr"], read["masked_loop_cycles"]) == (0, None)


@pytest.mark.parametrize(("lds_bytes", "waves"), [(65_536, 4), (32_768, 8), (40_000, 6)])
def test_two_rdna_compute_units_share_twice_the_lds_of_a_workgroup(lds_bytes, waves):
    asm = "\tv_mov_b32_e32 v0, 0\n"
    assert machine_code.read(code("gfx1100", asm, num_warps=8, lds_bytes=lds_bytes))["waves_per_simd"] == waves


@pytest.mark.parametrize(
    ("arch", "vgpr", "sgpr", "waves"),  # LLVM's "; Occupancy:" comments for kernels with these numbers of registers
    [
        ("gfx942", 64, 20, 8),
        ("gfx942", 65, 20, 7),
        ("gfx942", 64, 104, 7),
        ("gfx942", 128, 104, 4),
        ("gfx942", 168, 20, 3),
        ("gfx942", 169, 20, 2),
        ("gfx942", 257, 20, 1),
        ("gfx1100", 96, 106, 16),
        ("gfx1100", 97, 20, 12),
        ("gfx1201", 168, 20, 9),
        ("gfx1201", 256, 20, 5),
    ],
)
def test_occupancy_follows_from_the_registers(arch, vgpr, sgpr, waves):
    asm = f"\tv_mov_b32_e32 v0, 0\n.vgpr_count: {vgpr}\n.sgpr_count: {sgpr}\n"
    assert machine_code.read(code(arch, asm, lds_bytes=0))["waves_per_simd"] == waves


def test_gfx90a_spills_through_the_buffer_of_its_scratch_memory():
    asm = (
        '.amdgcn_target "amdgcn-amd-amdhsa--gfx90a"\n.private_segment_fixed_size: 16\n.L1:\n'
        "\tbuffer_load_dword v40, off, s[0:3], 0 offset:4\n\tbuffer_load_dwordx4 v[0:3], v9, s[8:11], 0 offen\n"
        "\tglobal_load_dwordx4 v[8:11], v[0:1], off\n\ts_cbranch_scc1 .L1\n"
    )
    cycles = machine_code.read(code("gfx90a", asm))["loop_cycles"]
    assert cycles == {"scratch": 4, "memory": 8}


def test_a_loop_is_found_wherever_its_blocks_are():
    """An inner loop of two blocks that are apart, inside of an outer loop; and a jump back that is no loop."""
    asm = """
	s_branch .L3
.L0:
	v_nop 0
	s_branch .L2
.L1:
	v_add_f32_e32 v1, v1, v1
	s_cbranch_scc0 .L0
	v_mul_f32_e32 v1, v1, v1
	s_branch .L1
.L2:
	s_cbranch_scc1 .L1
	s_endpgm
.L3:
	s_cbranch_vccz .L1
	s_branch .L2
"""
    _, [loop] = machine_code.parse(asm)
    assert [line.split()[0] for line in loop] == ["v_add_f32_e32", "s_cbranch_scc0", "v_mul_f32_e32", "s_branch"]


@needs_triton
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx1100", "gfx1201"])
def test_llvm_agrees_on_loops_and_occupancy(arch):
    """LLVM's comments name the innermost loop of each block, and the waves that the registers allow."""
    op = next(op for op in ops.OPS if op.kernel == "flash_attention_dkv")
    fn, args = op.call("bfloat16", 64, None, "")
    kernel = next(kernel for kernel in aot.lower(fn, *args, arch=arch) if kernel.name == op.kernel)
    compiled = compilers.compile_kernel(kernel, arch=arch, compiler="triton")
    assert len(machine_code.parse(compiled.asm)[1]) == compiled.asm.count("Inner Loop Header")
    one_warp = dataclasses.replace(compiled, lds_bytes=0, kernel=dataclasses.replace(kernel, num_warps=1))
    occupancy = int(re.search(r"; Occupancy: (\d+)", compiled.asm)[1])
    assert machine_code.read(one_warp)["waves_per_simd"] == occupancy


@pytest.mark.parametrize(
    ("arch", "name", "cycles"),  # passes of LLVM's SISchedule.td, four cycles each; WMMA by AMD's peak rates
    [
        ("gfx90a", "v_mfma_f32_32x32x8f16", 64),
        ("gfx90a", "v_mfma_f32_16x16x16bf16_1k", 32),
        ("gfx90a", "v_mfma_f32_32x32x2f32", 64),
        ("gfx90a", "v_mfma_i32_32x32x8i8", 64),
        ("gfx942", "v_mfma_f32_32x32x8_bf16", 32),
        ("gfx942", "v_mfma_f32_16x16x16_f16", 16),
        ("gfx942", "v_mfma_f32_4x4x4_16b_f16", 4),
        ("gfx942", "v_mfma_f32_32x32x2_f32", 64),
        ("gfx942", "v_mfma_f32_16x16x8_xf32", 16),
        ("gfx942", "v_mfma_f32_32x32x16_fp8_fp8", 32),
        ("gfx942", "v_mfma_i32_16x16x32_i8", 16),
        ("gfx950", "v_mfma_f32_32x32x16_bf16", 32),
        ("gfx950", "v_mfma_f32_16x16x32_f16", 16),
        ("gfx950", "v_mfma_f32_32x32x8_f16", 32),  # a form of gfx942: half the rate
        ("gfx950", "v_mfma_f32_16x16x16_bf16", 16),
        ("gfx950", "v_mfma_f32_32x32x64_f8f6f4", 64),
        ("gfx1100", "v_wmma_f32_16x16x16_bf16", 32),
        ("gfx1201", "v_wmma_f32_16x16x16_f16", 16),
        ("gfx1201", "v_wmma_f32_16x16x16_fp8_fp8", 8),
    ],
)
def test_cycles_of_a_matrix_instruction_are_its_flop_over_the_rate(arch, name, cycles):
    assert machine_code._class(name)[0] == "matrix"
    assert machine_code._matrix_cycles(f"{name} v[0:15], v[16:17], v[18:19], v[0:15]", arch) == cycles


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("global_load_dword", 4),
        ("global_load_dwordx3", 12),
        ("buffer_load_dwordx4", 16),
        ("global_load_ushort", 2),
        ("global_load_short_d16_hi", 2),
        ("buffer_load_ubyte", 1),
        ("global_load_b128", 16),
        ("global_load_u8", 1),
        ("global_load_d16_b16", 2),
        ("global_load_d16_hi_u8", 1),
        ("global_load_lds_dwordx4", 16),
        ("ds_read_b64", 8),
        ("ds_read_u16_d16_hi", 2),
        ("ds_read2st64_b32", 8),
        ("ds_load_2addr_stride64_b64", 16),
        ("ds_read_b64_tr_b16", 8),
        ("ds_bpermute_b32", 4),
        ("scratch_store_dwordx2", 8),
        ("scratch_load_b96", 12),
    ],
)
def test_bytes_per_lane_from_the_mnemonic(name, number):
    assert machine_code._bytes_per_lane(name) == number


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("v_exp_f32_e32", "transcendental"),
        ("v_s_exp_f32", "transcendental"),
        ("v_cmp_gt_f32_e64", "vector"),
        ("v_accvgpr_read_b32", "vector"),
        ("v_nop", None),
        ("s_nop", None),
        ("s_waitcnt", None),
        ("s_barrier", None),
        ("ds_bpermute_b32", "lds"),
        ("buffer_inv", None),
        ("global_wb", None),
        ("buffer_store_dwordx4", "memory"),
        ("scratch_load_dword", "scratch"),
    ],
)
def test_an_instruction_has_one_class(name, kind):
    assert machine_code._class(name)[0] == kind


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("tensor<64x32xbf16> * tensor<32x16xbf16> -> tensor<64x16xf32>", (65_536, "16 bits")),
        ("tensor<64x32xi8> * tensor<32x16xi8> -> tensor<64x16xi32>", (65_536, "8 bits")),
        ("tensor<64x32xf8E4M3FN> * tensor<32x16xf8E4M3FN> -> tensor<64x16xf32>", (65_536, "8 bits")),
        ("tensor<64x32xf32> * tensor<32x16xf32> -> tensor<64x16xf32>", (65_536, "f32")),
    ],
)
def test_the_dots_of_a_loop_are_counted_in_the_ir(line, found):
    assert machine_code.dot_flop(f"scf.for %i = %a to %b {{\n %1 = tt.dot %a, %b, %c : {line}\n}}\n") == found


def test_a_dot_outside_of_every_loop_is_not_counted():
    assert machine_code.dot_flop("%1 = tt.dot %a : tensor<64x32xf16> * tensor<32x16xf16> -> tensor<64x16xf32>") == (
        0,
        None,
    )


def test_nvidia_has_registers_spills_and_tensor_core_instructions():
    ptx = "\twgmma.mma_async.sync.aligned.m64n64k16 {%f1};\n\t@%p1 mma.sync.aligned.m16n8k16 {%f2};\n// mma.sync.\n"
    read = machine_code.read(code("sm_90", ptx, registers=168, stack_bytes=24))
    told = {name for name, value in read.items() if value is not None}
    assert told == {"vgpr", "vgpr_spills", "scratch_bytes", "lds_bytes", "lds_limit", "matrix_instructions"}
    assert [read[x] for x in ("vgpr", "vgpr_spills", "scratch_bytes", "matrix_instructions")] == [168, 6, 24, 2]
