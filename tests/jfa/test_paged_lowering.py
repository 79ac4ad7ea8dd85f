"""The paged kernels, lowered on the CPU for GPUs that are not present."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import jfa
from jfa_bench.names import PAGED_DTYPES
from jfa_bench.proof import aot
from jfa_bench.proof.ops import OPS

PAGED = {op.kernel: op for op in OPS if op.kernel in ("paged_decode_attention", "ragged_paged_attention")}
ARCHS = ("gfx942", "gfx1100", "sm_90")
FP8 = ("bfloat16 on float8_e4m3fn", "float16 on float8_e4m3fn")  # on sm_80 without Triton's casts, which it lacks there


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", PAGED_DTYPES)
@pytest.mark.parametrize("kernel", PAGED)
def test_a_plain_call_becomes_one_kernel(kernel, dtype, arch):
    op = PAGED[kernel]
    fn, args = op.call(dtype, 64, None, "")
    [found] = aot.lower(fn, *args, arch=arch)
    assert found.name == kernel
    assert found.num_warps == op.default_config(aot.device(arch), dtype, 64).num_warps


@pytest.mark.parametrize("arch", ["gfx90a", "gfx950", "gfx1201", "sm_80", "sm_100"])
@pytest.mark.parametrize("kernel", PAGED)
def test_other_architectures_lower(kernel, arch):
    for dtype in ("bfloat16", "bfloat16 on int8", "float16 on uint8", *FP8):
        fn, args = PAGED[kernel].call(dtype, 64, None, "")
        assert [found.name for found in aot.lower(fn, *args, arch=arch)] == [kernel]


@pytest.mark.parametrize("head_dim", [16, 40, 80, 256])
@pytest.mark.parametrize(
    ("kernel", "variant"), [*itertools.product(PAGED, ["", "window"]), ("ragged_paged_attention", "tree")]
)
def test_every_head_dim_and_option_lowers(kernel, variant, head_dim):
    fn, args = PAGED[kernel].call("bfloat16 on int8", head_dim, None, variant)
    assert len(aot.lower(fn, *args, arch="gfx942")) == 1


def test_a_row_is_split_until_all_compute_units_are_busy():
    def grid(batch):
        q = jax.ShapeDtypeStruct((batch, 8, 64), jnp.bfloat16)
        pages = jax.ShapeDtypeStruct((1000, 16, 2, 64), jnp.bfloat16)
        table = jax.ShapeDtypeStruct((batch, 512), jnp.int32)
        [kernel] = aot.lower(
            jfa.paged_decode_attention, q, pages, pages, table, jax.ShapeDtypeStruct((batch,), jnp.int32), arch="gfx942"
        )
        return kernel.grid

    assert grid(1) == (2, 32, 1)  # key heads, splits (of at least 256 tokens), rows
    assert grid(304) == (2, 4, 304)
    assert grid(4000) == (2, 1, 4000)
