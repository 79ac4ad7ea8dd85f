"""The paged kernels, lowered on the CPU for GPUs that are not present."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

import jfa
from jfa_bench.names import PAGED_DTYPES
from jfa_bench.proof import aot
from jfa_bench.proof.ops import OPS

PAGED = {op.kernel: op for op in OPS if op.kernel in ("paged_decode_attention", "ragged_paged_attention")}
CONFIG = jfa.FlashConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1)
ARCHS = ("gfx942", "gfx1100", "sm_90")
MERGED = "split_kv_merge"  # the kernel that follows where rows are split
FP8 = ("bfloat16 on float8_e4m3fn", "float16 on float8_e4m3fn")  # on sm_80 without Triton's casts, which it lacks there


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", PAGED_DTYPES)
@pytest.mark.parametrize("kernel", PAGED)
def test_a_plain_call_becomes_one_kernel_and_another_where_rows_are_split(kernel, dtype, arch):
    op = PAGED[kernel]
    fn, args = op.call(dtype, 64, None, "")
    found, *merges = aot.lower(fn, *args, arch=arch)
    assert found.name == kernel and [one.name for one in merges] == [MERGED] * (found.grid[1] > 1)
    assert found.num_warps == op.default_config(aot.device(arch), dtype, 64).num_warps


@pytest.mark.parametrize("arch", ["gfx90a", "gfx950", "gfx1201", "sm_80", "sm_100"])
@pytest.mark.parametrize("kernel", PAGED)
def test_other_architectures_lower(kernel, arch):
    for dtype in ("bfloat16", "bfloat16 on int8", "float16 on uint8", *FP8):
        fn, args = PAGED[kernel].call(dtype, 64, None, "")
        assert [one.name for one in aot.lower(fn, *args, arch=arch) if one.name != MERGED] == [kernel]


@pytest.mark.parametrize("head_dim", [16, 40, 80, 256])
@pytest.mark.parametrize(
    ("kernel", "variant"), [*itertools.product(PAGED, ["", "window"]), ("ragged_paged_attention", "tree")]
)
def test_every_head_dim_and_option_lowers(kernel, variant, head_dim):
    fn, args = PAGED[kernel].call("bfloat16 on int8", head_dim, None, variant)
    assert [one.name for one in aot.lower(fn, *args, arch="gfx942") if one.name != MERGED] == [kernel]


def test_a_row_is_split_until_all_compute_units_are_busy():
    def grid(batch):
        q = jax.ShapeDtypeStruct((batch, 8, 64), jnp.bfloat16)
        pages = jax.ShapeDtypeStruct((1000, 16, 2, 64), jnp.bfloat16)
        table = jax.ShapeDtypeStruct((batch, 512), jnp.int32)
        kernel, *_ = aot.lower(
            jfa.paged_decode_attention, q, pages, pages, table, jax.ShapeDtypeStruct((batch,), jnp.int32), arch="gfx942"
        )
        return kernel.grid

    assert grid(1) == (2, 32, 1)  # key heads, splits (of at least 256 tokens), rows
    assert grid(304) == (2, 4, 304)
    assert grid(4000) == (2, 1, 4000)


def test_one_query_per_row_is_split_as_well():
    def kernels(tk, **options):
        q, k = (jax.ShapeDtypeStruct((2, t, heads, 64), jnp.bfloat16) for t, heads in ((1, 8), (tk, 2)))
        fn = functools.partial(jfa.dot_product_attention, is_causal=True, **options)
        return [(kernel.name, kernel.grid) for kernel in aot.lower(fn, q, k, k, arch="gfx942")]

    assert kernels(2000) == [("paged_decode_attention", (2, 7, 2)), (MERGED, (2, 8, 1))]
    assert kernels(500) == [("paged_decode_attention", (2, 1, 2))]
    # what the kernel has not: a mask, as rings of slots use it; and a configuration of the other one
    for others in (dict(mask=jnp.ones((2, 1, 1, 500), bool)), dict(config=CONFIG), dict(query_seq_lengths=[1, 0])):
        assert [name for name, _ in kernels(500, **others)] == ["flash_attention"]
