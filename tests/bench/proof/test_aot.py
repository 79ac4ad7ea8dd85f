"""Kernels lowered for GPUs that are not present."""

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


def attention(config=CONFIG):
    return lambda q, k, v: jfa.dot_product_attention(q, k, v, implementation="triton", config=config)


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
    assert kernel.operands == SHAPES
    assert kernel.results == (SHAPES[0], jax.ShapeDtypeStruct((2, 300, 4), "float32"))


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
    with (
        pytest.raises(ValueError, match=r"arch must be one of gfx90a, .*, sm_100, v5e, v6e, v7x, got"),
        aot.target(arch),
    ):
        pass
    with pytest.raises(ValueError, match="arch must be one of"):
        aot.lower(attention(), *SHAPES, arch=arch)
