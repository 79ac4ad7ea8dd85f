"""TPU kernels of all sizes of heads, groups and pages, compiled by libtpu: about ten minutes for each chip."""

import functools

import jax
import pytest

import jfa
from jfa_bench import names
from jfa_bench.proof import by_libtpu

pytestmark = [
    pytest.mark.skipif(by_libtpu.why_not() is not None, reason=by_libtpu.why_not() or ""),
    pytest.mark.soak,
    pytest.mark.exhaustive,
]

KEY_HEADS, LENGTH = 8, 4096  # of attention; so many queries have the rows of a ragged call together
ROWS, CAPACITY = 64, 8192  # of paged attention
HEAD_DIMS, GROUPS, PAGE_SIZES = (64, 80, 96, 128, 256), (1, 2, 4, 8, 16), (16, 32, 64, 128, 256)
FLOAT32 = (64, 96, 128)  # head_dims, with groups of four and pages of 16

FLASH = [("bfloat16", head_dim, group) for head_dim in HEAD_DIMS for group in GROUPS]
FLASH += [("float32", head_dim, 4) for head_dim in FLOAT32]
PAGED = [
    (dtype, head_dim, group, page_size)
    for dtype, head_dim, group in FLASH
    for page_size in (PAGE_SIZES if (dtype, group) == ("bfloat16", 4) else PAGE_SIZES[:1])
]


@pytest.mark.parametrize(("dtype", "head_dim", "group"), FLASH)
@pytest.mark.parametrize("arch", names.TPU_ARCHS)
def test_both_passes_of_attention_compile(arch, dtype, head_dim, group):
    def both_passes(q, k, v, d_out):
        call = functools.partial(jfa.dot_product_attention, is_causal=True, implementation="tpu")
        out, transposed = jax.vjp(call, q, k, v)
        return out, transposed(d_out)

    q, k = (jax.ShapeDtypeStruct((1, LENGTH, heads, head_dim), dtype) for heads in (KEY_HEADS * group, KEY_HEADS))
    compiled = functools.partial(by_libtpu.compile_program, both_passes, (q, k, k, q), kernel="flash_attention")
    figures, parts = compiled(arch=arch)
    assert set(parts) == {"flash_attention", "flash_attention_bwd"}
    assert 0 < figures["vmem_bytes"] <= figures["vmem_limit"]


@pytest.mark.parametrize(("dtype", "head_dim", "group", "page_size"), PAGED)
@pytest.mark.parametrize("op", ["paged_decode_attention", "ragged_paged_attention"])
@pytest.mark.parametrize("arch", names.TPU_ARCHS)
def test_attention_over_pages_compiles_and_copies_no_pages(arch, op, dtype, head_dim, group, page_size):
    ragged = op == "ragged_paged_attention"
    pages_per_row = CAPACITY // page_size
    pages = jax.ShapeDtypeStruct((ROWS * pages_per_row + 1, page_size, KEY_HEADS * head_dim), dtype)
    q = jax.ShapeDtypeStruct((LENGTH if ragged else ROWS, KEY_HEADS * group, head_dim), dtype)
    integers = [(ROWS, pages_per_row), (ROWS,), *([(ROWS + 1,)] if ragged else [])]
    args = (q, pages, pages, *(jax.ShapeDtypeStruct(shape, "int32") for shape in integers))
    call = functools.partial(getattr(jfa, op), implementation="tpu")
    figures, parts = by_libtpu.compile_program(call, args, kernel=op, arch=arch)
    assert set(parts) == {op}
    assert 0 < figures["vmem_bytes"] <= figures["vmem_limit"]
    # XLA may turn queries and outputs, which together are smaller than the keys of a pool
    assert figures["copied_bytes"] < pages.size * pages.dtype.itemsize
