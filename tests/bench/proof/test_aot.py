"""Kernels lowered and compiled for GPUs that are not present."""

import importlib.metadata
import importlib.util
import sys

import jax
import pytest

import jfa
from jfa import tuning
from jfa.device import describe, probe
from jfa.kernels.triton import flash
from jfa.types import Operands
from jfa_bench import names
from jfa_bench.proof import aot

CONFIG = jfa.FlashConfig(block_q=64, block_kv=16, num_warps=4, num_stages=1)
SHAPES = (jax.ShapeDtypeStruct((2, 300, 4, 64), "bfloat16"), *[jax.ShapeDtypeStruct((2, 333, 2, 64), "bfloat16")] * 2)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="machine code needs the triton package (extra aot)"
)


def attention(config=CONFIG):
    return lambda q, k, v: jfa.dot_product_attention(q, k, v, implementation="triton", config=config)


@pytest.fixture(scope="module")
def compiled():
    """compiled(arch): one small flash kernel's machine code."""

    def compile(arch):
        [kernel] = aot.lower(attention(), *SHAPES, arch=arch)
        return aot.compile_kernel(kernel, arch=arch)

    return compile


@pytest.mark.parametrize("arch", names.ARCHS)
def test_under_a_target_jfa_sees_that_architecture(arch):
    before = probe()
    with aot.target(arch) as info:
        assert probe() == info == describe("rocm" if arch.startswith("gfx") else "cuda", arch)
    assert probe() == before


@pytest.mark.parametrize("arch", names.ARCHS)
def test_a_plain_call_lowers_to_one_kernel_with_the_configuration_of_the_architecture(arch):
    [kernel] = aot.lower(attention(None), *SHAPES, arch=arch)
    with aot.target(arch) as info:
        config = aot_config(info)
    assert kernel.name == "flash_attention"
    assert kernel.grid == (4, -(-300 // config.block_q), 2)
    assert (kernel.num_warps, kernel.num_stages) == (config.num_warps, config.num_stages)
    assert "tt.dot" in kernel.ttir and "loc(" not in kernel.ttir


def aot_config(info):
    """The configuration of a plain call there: the table's entry, else the kernel's default."""
    tuned = tuning.flash_config(info.arch, dtype="bfloat16", head_dim=64)
    return tuned or flash.default_config(Operands(*SHAPES), info)


def test_every_kernel_of_a_function_is_found():
    def both(q, k, v):
        once = attention()(q, k, v)
        return attention(jfa.FlashConfig(block_q=32, block_kv=16, num_warps=2, num_stages=1))(once, k, v)

    assert [kernel.num_warps for kernel in aot.lower(both, *SHAPES, arch="gfx942")] == [4, 2]
    assert aot.lower(lambda x: x + 1, SHAPES[0], arch="gfx942") == ()


def test_lowering_twice_gives_the_same_kernel():
    assert aot.lower(attention(), *SHAPES, arch="gfx1100") == aot.lower(attention(), *SHAPES, arch="gfx1100")


@pytest.mark.parametrize("arch", ["gfx9", "gfx908", "sm_77", "", "MI300X"])
def test_the_error_for_an_unknown_architecture_lists_the_known_ones(arch):
    with pytest.raises(ValueError, match=r"arch must be one of gfx90a, .*, sm_100, got"), aot.target(arch):
        pass
    with pytest.raises(ValueError, match="arch must be one of"):
        aot.lower(attention(), *SHAPES, arch=arch)


@needs_triton
def test_amd_code_is_assembly_for_the_architecture(compiled):
    code = compiled("gfx942")
    assert '-gfx942"' in code.asm.splitlines()[0] and "v_mfma_" in code.asm
    assert 0 < code.lds_bytes <= 65_536 and code.why_not_launched() is None
    assert (code.registers, code.stack_bytes) == (None, None)


@needs_triton
def test_nvidia_code_is_ptx_with_the_registers_of_the_binary(compiled):
    code = compiled("sm_90")
    assert ".target sm_90" in code.asm
    assert 16 < code.registers <= 255 and code.stack_bytes == 0 and code.lds_bytes > 0


@needs_triton
def test_compiling_leaves_nothing_on_disk(compiled, monkeypatch, tmp_path):
    import triton.knobs

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    aot.compile_kernel.cache_clear()
    compiled("gfx942")
    assert list(tmp_path.iterdir()) == [] and triton.knobs.cache.dir == str(tmp_path)


@needs_triton
def test_what_triton_cannot_compile_is_an_error_with_its_reason(capfd):
    kernel = aot.Kernel(name="broken", ttir="module { tt.func }", grid=(1, 1, 1), num_warps=1, num_stages=1)
    with pytest.raises(aot.CompileError, match="triton produced no code for gfx942: RuntimeError: "):
        aot.compile_kernel(kernel, arch="gfx942")


def code_with(arch, **fields):
    kernel = aot.Kernel(name="k", ttir="", grid=(1, 1, 1), num_warps=4, num_stages=1)
    return aot.Compiled(**{"kernel": kernel, "arch": arch, "asm": "", "lds_bytes": 0} | fields)


def test_code_that_cannot_be_launched_has_a_reason():
    over = code_with("gfx942", lds_bytes=65_537).why_not_launched()
    assert over == "needs 65,537 bytes of LDS; the limit of a workgroup on gfx942 is 65,536"
    assert code_with("gfx950", lds_bytes=65_537).why_not_launched() is None
    assert "of shared memory" in (code_with("sm_80", lds_bytes=200_000).why_not_launched() or "")
    columns = code_with("sm_100", tensor_memory_columns=640).why_not_launched()
    assert columns == "needs 640 columns of tensor memory; the limit is 512"


def test_without_triton_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel = aot.Kernel(name="k", ttir="", grid=(1, 1, 1), num_warps=1, num_stages=1)
    for ask in (lambda: aot.compile_kernel(kernel, arch="gfx942"), aot.triton_version, aot.unmet_triton):
        with pytest.raises(RuntimeError, match=r'the triton package, which is not installed: pip install "jfa\[aot\]"'):
            ask()


@pytest.mark.parametrize(("version", "met"), [("3.6.0", True), ("3.9.1", True), ("3.10.0", False), ("4.0", False)])
def test_a_note_names_an_unchecked_triton_release(monkeypatch, version, met):
    monkeypatch.setattr(aot, "_triton", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", {"triton": version}.__getitem__)
    said = aot.unmet_triton()
    assert (said is None) == met
    if said:
        assert f"triton {version} is not among the releases whose output was checked (3.6 to 3.9)" in said
