"""Kernels compiled to machine code by XLA's own compilers and by the triton package."""

import dataclasses
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import COMPILERS, needs_triton, needs_xla, needs_xla_for_nvidia

import jfa
from jfa_bench import amdgcn
from jfa_bench.proof import aot, by_triton, by_xla, code_object, compilers, program, stand_ins

CONFIG = jfa.FlashConfig(block_q=64, block_kv=16, num_warps=4, num_stages=1)
SHAPES = (jax.ShapeDtypeStruct((2, 300, 4, 64), "bfloat16"), *[jax.ShapeDtypeStruct((2, 333, 2, 64), "bfloat16")] * 2)
FEW = (jax.ShapeDtypeStruct((4,), "float32"),)
NOTHING = aot.Kernel(name="k", ttir="", grid=(1, 1, 1), num_warps=1, num_stages=1, operands=FEW, results=FEW)


@pytest.fixture(scope="module")
def kernel():
    """kernel(arch): one small flash kernel."""

    def lowered(arch):
        [found] = aot.lower(
            lambda q, k, v: jfa.dot_product_attention(q, k, v, implementation="triton", config=CONFIG),
            *SHAPES,
            arch=arch,
        )
        return found

    return lowered


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201"])
def test_amd_code_is_assembly_for_the_architecture(kernel, arch, compiler):
    code = compilers.compile_kernel(kernel(arch), arch=arch, compiler=compiler)
    assert f'-{arch}"' in code.asm.split("\n")[0] and ("v_mfma_" in code.asm or "v_wmma_" in code.asm)
    assert "v_exp_f32" in code.asm and "fma" in code.asm
    assert 0 < code.lds_bytes <= 65_536 and code.why_not_launched() is None
    assert (code.compiler, code.registers, code.stack_bytes) == (compiler, None, None)


@pytest.mark.parametrize(
    "compiler", [pytest.param("xla", marks=needs_xla_for_nvidia), pytest.param("triton", marks=needs_triton)]
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_nvidia_code_is_ptx_with_the_registers_of_the_binary(kernel, arch, compiler):
    code = compilers.compile_kernel(kernel(arch), arch=arch, compiler=compiler)
    assert f".target {arch}" in code.asm and ".entry flash_attention" in code.asm
    assert "ex2.approx.ftz.f32" in code.asm and "fma.rn" in code.asm
    assert 16 < code.registers <= 255 and 0 <= code.stack_bytes <= 16 and code.lds_bytes > 0


@needs_xla
def test_a_program_that_only_compiles_passes_the_cache_by(own_cache, tmp_path):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        x = jax.ShapeDtypeStruct((4,), "float32")
        first, second = (program.compile_program(jax.jit(jnp.exp), x, arch="gfx942") for _ in range(2))
        assert first.launches == second.launches
        assert not (tmp_path / "cache").exists() and jax.config.jax_enable_compilation_cache
        jax.jit(lambda x: jnp.exp(x) + 41)(jnp.zeros(3))
        assert [*(tmp_path / "cache").iterdir()]  # what runs here is kept as before
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


@needs_triton
def test_triton_leaves_nothing_on_disk(kernel, monkeypatch, tmp_path):
    import triton.knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    by_triton.compile_kernel.cache_clear()
    compilers.compile_kernel(kernel("gfx942"), arch="gfx942", compiler="triton")
    assert list(tmp_path.iterdir()) == [] and triton.knobs.cache.dir == str(tmp_path)


@needs_xla
def test_xla_gives_the_same_code_again_and_leaves_the_environment(kernel, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/somewhere")
    first = compilers.compile_kernel(kernel("gfx1100"), arch="gfx1100", compiler="xla")
    by_xla.compile_kernel.cache_clear()
    assert compilers.compile_kernel(kernel("gfx1100"), arch="gfx1100", compiler="xla") == first
    import os

    assert os.environ["TMPDIR"] == "/somewhere" and "TF_ROCM_KEEP_XLA_TEMPFILES" not in os.environ


@pytest.mark.parametrize("compiler", COMPILERS)
def test_what_cannot_be_compiled_is_an_error_with_its_reason(compiler, capfd):
    broken = dataclasses.replace(NOTHING, name="broken", ttir="module { tt.func }")
    reason = {
        "xla": "XLA produced no code for gfx942: ",
        "triton": "triton produced no code for gfx942: RuntimeError: ",
    }
    with pytest.raises(aot.CompileError, match=reason[compiler]):
        compilers.compile_kernel(broken, arch="gfx942", compiler=compiler)


def code_with(arch, **fields):
    kernel = aot.Kernel(name="k", ttir="", grid=(1, 1, 1), num_warps=4, num_stages=1)
    return aot.Compiled(**{"kernel": kernel, "arch": arch, "compiler": "xla", "asm": "", "lds_bytes": 0} | fields)


def test_code_that_cannot_be_launched_has_a_reason():
    over = code_with("gfx942", lds_bytes=65_537).why_not_launched()
    assert over == "needs 65,537 bytes of LDS; the limit of a workgroup on gfx942 is 65,536"
    assert code_with("gfx950", lds_bytes=65_537).why_not_launched() is None
    assert "of shared memory" in (code_with("sm_80", lds_bytes=200_000).why_not_launched() or "")
    columns = code_with("sm_100", tensor_memory_columns=640).why_not_launched()
    assert columns == "needs 640 columns of tensor memory; the limit is 512"


def test_the_error_for_an_unknown_compiler_lists_the_known_ones():
    with pytest.raises(ValueError, match="compiler must be one of xla, triton, got 'gcc'"):
        compilers.chosen("gfx942", "gcc")
    with pytest.raises(ValueError, match="arch must be one of"):
        compilers.chosen("gfx9")


def test_without_a_plugin_triton_is_used_and_xla_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(by_xla, "plugin", lambda platform: None)
    monkeypatch.setattr(by_triton, "package", lambda: None)
    assert compilers.chosen("gfx942") == "triton"
    command = "pip install --target FOLDER --no-deps jax-rocm7-pjrt; export JFA_XLA_PLUGINS=FOLDER"
    with pytest.raises(RuntimeError, match=f"XLA's compiler for rocm is in jax-rocm7-pjrt, .* {command}"):
        compilers.chosen("gfx942", "xla")
    with pytest.raises(RuntimeError, match="XLA's compiler for cuda is in jax-cuda13-pjrt, which is not installed"):
        compilers.chosen("sm_90", "xla")


def test_a_plugin_is_found_in_a_folder_with_its_version(monkeypatch, tmp_path):
    library = tmp_path / "jax_plugins" / "xla_rocm7" / "xla_rocm_plugin.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "jax_rocm7_pjrt-0.12.0.dist-info").mkdir()
    monkeypatch.setenv("JFA_XLA_PLUGINS", f"{tmp_path / 'missing'}:{tmp_path}")
    assert by_xla.plugin("rocm") == (library, "jax-rocm7-pjrt", "0.12.0")
    monkeypatch.setattr(compilers, "chosen", lambda arch, compiler: "xla")
    assert compilers.name("gfx942") == "XLA (jax-rocm7-pjrt 0.12.0)"


def test_a_plugin_without_what_reads_its_code_names_the_extra(monkeypatch):
    monkeypatch.setattr(by_xla, "plugin", lambda platform: ("library", "package", "1"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert by_xla.why_not("rocm") == (
        'XLA\'s code is read with elftools, llvm, msgpack, which is not installed: pip install "jfa[aot]"'
    )


def test_without_triton_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for ask in (lambda: compilers.compile_kernel(NOTHING, arch="gfx942", compiler="triton"), by_triton.package):
        with pytest.raises(RuntimeError, match=r'the triton package, which is not installed: pip install "jfa\[aot\]"'):
            ask()


@pytest.mark.parametrize(("version", "met"), [("3.6.0", True), ("3.9.1", True), ("3.10.0", False), ("4.0", False)])
def test_a_note_names_an_unchecked_triton_release(monkeypatch, version, met):
    monkeypatch.setattr(importlib.metadata, "version", {"triton": version}.__getitem__)
    said = compilers.unmet(["triton"])
    assert (said is None) == met and compilers.unmet(["xla"]) is None
    if said:
        assert f"triton {version} is not among the releases whose output was checked (3.6 to 3.9)" in said


def test_a_stand_in_is_a_library_whose_functions_return_an_error(tmp_path):
    import ctypes

    names = [f"function_{number}" for number in range(300)]
    file = tmp_path / "libstandin.so.7"
    file.write_bytes(stand_ins.shared_object("libstandin.so.7", names))
    library = ctypes.CDLL(str(file))
    assert [getattr(library, name)() for name in names] == [1] * 300
    assert not hasattr(library, "another")
    (tmp_path / "libempty.so").write_bytes(stand_ins.shared_object("libempty.so", []))
    ctypes.CDLL(str(tmp_path / "libempty.so"))


@needs_xla
@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_the_text_of_a_code_object_assembles_what_a_kernel_does(arch):
    """A kernel with a branch and a loop, whose disassembly is run: numbers are doubled until they exceed 1,000."""
    from jfa.kernels.triton._pallas import CompilerParams, pl

    def double(x_ref, out_ref):
        def step(state):
            return state[0] * 2, state[1] + 1

        x = x_ref[...]
        doubled, count = jax.lax.while_loop(lambda state: jnp.max(state[0]) < 1000, step, (x, jnp.int32(0)))
        out_ref[...] = doubled + count

    shape = jax.ShapeDtypeStruct((128,), "int32")
    params = CompilerParams(num_warps=2, num_stages=1)
    [kernel] = aot.lower(lambda x: pl.pallas_call(double, out_shape=shape, compiler_params=params)(x), shape, arch=arch)
    code = compilers.compile_kernel(kernel, arch=arch, compiler="xla")
    x = np.arange(1, 129, dtype=np.int32)
    done = amdgcn.run(code.asm, [x, np.zeros_like(x)], grid=(1,), num_warps=2, lds_bytes=code.lds_bytes)
    assert np.array_equal(done.outputs[1], x * 8 + 3)


def test_an_instruction_that_the_disassembler_does_not_know_is_an_error():
    pytest.importorskip("llvm", reason="needs llvm-nanobind (extra aot)")
    with pytest.raises(code_object.UndecodedError, match="does not know the instruction at byte 0: ffffffff ffffffff"):
        code_object._instructions(b"\xff" * 8, "gfx942")
