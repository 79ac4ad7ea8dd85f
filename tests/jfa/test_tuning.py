"""The tuning tables in the package, and the rules by which a call finds its entry."""

import dataclasses
import json
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jfa
from jfa import tuning
from jfa.backends import triton
from jfa.block_mask import SparseOperands
from jfa.device import describe
from jfa.kernels.triton.flash import default_config
from jfa.kernels.xla import flash as xla_flash
from jfa.kernels.xla import paged as xla_paged
from jfa.types import Operands, PagedOperands

NEIGHBOURS = [
    ("gfx940", "gfx942"),
    ("gfx941", "gfx942"),
    ("gfx1101", "gfx1100"),
    ("gfx1102", "gfx1100"),
    ("gfx1103", "gfx1100"),
    ("gfx1150", "gfx1100"),
    ("gfx1151", "gfx1100"),
    ("gfx1152", "gfx1100"),
    ("gfx1153", "gfx1100"),
    ("gfx1200", "gfx1201"),
    ("sm_86", "sm_80"),
    ("sm_89", "sm_80"),
]
DTYPES = ("bfloat16", "float16", "float32")
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
SHIPPED = {  # architectures, by kernel
    "flash_attention": (*AMD, "sm_80", "sm_90"),
    "flash_attention_dq": (*AMD, "sm_80", "sm_90"),
    "flash_attention_dkv": (*AMD, "sm_80", "sm_90"),
}
PAGED = dict.fromkeys(
    ("paged_decode_attention", "ragged_paged_attention"), ("gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201")
)
PAGED_DTYPES = (
    *DTYPES,
    *(f"{dtype} on {pages}" for dtype in ("bfloat16", "float16") for pages in ("int8", "float8_e4m3fn", "uint8")),
)
PRODUCTS = dict.fromkeys(("quantized_matmul_few_rows", "quantized_matmul"), AMD)
PRODUCT_DTYPES = (*(dtype for dtype in PAGED_DTYPES if dtype not in DTYPES), "int8 on int8")
FOLDER = resources.files("jfa") / "tuning_tables"
TABLES = {
    (kernel, arch): json.loads((FOLDER / arch / f"{kernel}.json").read_text())
    for kernel, archs in (SHIPPED | PAGED | PRODUCTS).items()
    for arch in archs
}
FLASH_TABLES = [key for key in TABLES if key[0] in SHIPPED]
ENTRIES = [
    pytest.param(kernel, arch, table, entry, id=f"{kernel}-{arch}-{dtype}-{head_dim}")
    for (kernel, arch), table in TABLES.items()
    for dtype, entries in table["configs"].items()
    for head_dim, entry in entries.items()
]


def test_every_table_is_tested():
    files = [file for folder in FOLDER.iterdir() if folder.is_dir() for file in folder.iterdir()]
    assert {(file.name, file.parent.name) for file in map(Path, map(str, files))} == {
        (f"{kernel}.json", arch) for kernel, arch in TABLES
    }


@pytest.mark.parametrize(("kernel", "arch"), TABLES)
def test_a_table_states_its_kernel_architecture_source_and_dtypes(kernel, arch):
    table = TABLES[kernel, arch]
    assert (table["op"], table["arch"]) == (kernel, arch)
    assert "not measured" in table["source"]
    dtypes = DTYPES if kernel in SHIPPED else PAGED_DTYPES if kernel in PAGED else PRODUCT_DTYPES
    assert tuple(table["configs"]) == dtypes


@pytest.mark.parametrize(("kernel", "arch", "table", "entry"), ENTRIES)
def test_an_entry_fits_its_architecture(kernel, arch, table, entry):
    config_type = jfa.FlashConfig if kernel in SHIPPED else jfa.PagedConfig if kernel in PAGED else jfa.ProductConfig
    config_type(**entry["config"])
    platform = "rocm" if arch.startswith("gfx") else "cuda"
    served = [arch, *(name for name, neighbour in NEIGHBOURS if neighbour == arch)]
    assert 0 < entry["lds_bytes"] <= min(describe(platform, name).lds_bytes for name in served)
    assert entry["vgpr_spills"] == 0 or "spill" in table["source"]


@pytest.mark.parametrize("dtype", PAGED_DTYPES)
@pytest.mark.parametrize(("kernel", "arch"), [key for key in TABLES if key[0] in PAGED])
def test_every_head_dim_of_the_paged_kernels_has_an_entry(kernel, arch, dtype):
    of_queries, _, of_pages = dtype.partition(" on ")
    for head_dim in (16, 64, 80, 256):
        found = tuning.paged_config(kernel, arch, dtype=of_queries, pages=of_pages or of_queries, head_dim=head_dim)
        assert isinstance(found, jfa.PagedConfig) and found.num_splits is None
    assert tuning.paged_config(kernel, arch, dtype=of_queries, pages=of_pages or of_queries, head_dim=257) is None


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES)
@pytest.mark.parametrize(("kernel", "arch"), [key for key in TABLES if key[0] in PRODUCTS])
def test_every_group_size_of_the_products_has_an_entry(kernel, arch, dtype):
    of_x, _, weight = dtype.partition(" on ")
    for group_size in (16, 32, 64, 128, 4096, 11_008):
        found = tuning.product_config(kernel, arch, dtype=of_x, weight=weight, group_size=group_size)
        assert isinstance(found, jfa.ProductConfig) and found.num_splits is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kernel", "arch"), FLASH_TABLES)
def test_every_head_dim_of_the_kernel_has_an_entry(kernel, arch, dtype):
    for head_dim in (16, 40, 64, 80, 128, 160, 256):
        found = tuning.flash_config(arch, dtype=dtype, head_dim=head_dim, kernel=kernel)
        assert isinstance(found, jfa.FlashConfig)
    assert tuning.flash_config(arch, dtype=dtype, head_dim=257, kernel=kernel) is None


def listed(arch, head_dim, kernel="flash_attention"):
    return jfa.FlashConfig(**TABLES[kernel, arch]["configs"]["bfloat16"][head_dim]["config"])


@pytest.mark.parametrize(("head_dim", "entry"), [(16, "64"), (64, "64"), (65, "128"), (80, "128"), (129, "256")])
def test_a_head_dim_between_entries_uses_the_next_larger(head_dim, entry):
    assert tuning.flash_config("gfx942", dtype="bfloat16", head_dim=head_dim) == listed("gfx942", entry)


@pytest.mark.parametrize(("arch", "neighbour"), [*NEIGHBOURS, ("gfx942", "gfx942")])
def test_an_architecture_without_a_table_uses_that_of_a_similar_one(arch, neighbour):
    assert tuning.table_arch(arch) == neighbour
    for kernel in (kernel for kernel, archs in SHIPPED.items() if neighbour in archs):
        found = tuning.flash_config(arch, dtype="bfloat16", head_dim=128, kernel=kernel)
        assert found == listed(neighbour, "128", kernel)


@pytest.mark.parametrize(("kernel", "arch", "head_dim"), triton._SPARSE_TILES)
def test_block_sparse_attention_replaces_tiles_that_would_spill(kernel, arch, head_dim):
    changed = triton._SPARSE_TILES[kernel, arch, head_dim]
    table = listed(arch, str(head_dim), kernel)
    assert all(getattr(table, name) != value for name, value in changed.items())
    assert sparse_config(kernel, arch, head_dim) == dataclasses.replace(table, **changed)
    dense = tuning.flash_config(arch, dtype="float32", head_dim=head_dim, kernel=kernel)
    assert sparse_config(kernel, arch, head_dim, dtype="float32") == dense
    small = sparse_config(kernel, arch, head_dim, block=16)
    assert (small.block_q, small.block_kv) == (16, 16)


def sparse_config(kernel, arch, head_dim, dtype="bfloat16", block=128):
    """The configuration of a kernel of block-sparse attention, with a mask in tiles of this size."""
    row = jax.ShapeDtypeStruct((1, 256, 2, head_dim), dtype)
    mask = jfa.BlockMask.sliding_window(256, 256, 100, block_q=block, block_kv=block)
    operands, device = SparseOperands(Operands(row, row, row), mask), describe("rocm", arch)
    forward = triton.SPARSE.default_config(operands, device)
    if kernel == "flash_attention":
        return forward
    return getattr(triton.SPARSE.backward_config(operands, forward, device), kernel.removeprefix("flash_attention_"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("platform", "arch"), [("rocm", "gfx908"), ("rocm", "gfx1399"), ("cuda", "sm_77"), ("cpu", "cpu")]
)
def test_an_unknown_architecture_has_no_entry_and_gets_the_default(platform, arch, dtype):
    for head_dim in (16, 80, 256):
        for kernel in SHIPPED:
            assert tuning.flash_config(arch, dtype=dtype, head_dim=head_dim, kernel=kernel) is None
        row = jax.ShapeDtypeStruct((1, 64, 2, head_dim), dtype)
        assert isinstance(default_config(Operands(row, row, row), describe(platform, arch)), jfa.FlashConfig)


def test_default_tiles_are_pipelined_only_on_nvidia():
    """On AMD a second stage would use registers that the tile needs."""
    row = jax.ShapeDtypeStruct((1, 64, 2, 64), "bfloat16")
    stages = [
        default_config(Operands(row, row, row), describe(*device)).num_stages
        for device in (("cuda", "sm_77"), ("rocm", "gfx908"), ("rocm", "gfx1399"))
    ]
    assert stages == [2, 1, 1]


@pytest.mark.parametrize(
    ("b", "hkv", "d", "block_kv", "elementwise"),
    [
        *((1, 3, 64, 512, True), (8, 3, 64, 256, True), (1, 1, 256, 128, False)),
        *((32, 8, 128, 32, False), (0, 1, 8, 512, False)),
    ],
)
def test_default_tiles_of_one_query_on_a_cpu(b, hkv, d, block_kv, elementwise):
    """A tile of keys stays in cache; many small heads are not copied."""
    q, k = (jax.ShapeDtypeStruct((b, t, heads, d), "float32") for t, heads in ((1, 2 * hkv), (4096, hkv)))
    config = xla_flash.default_config(Operands(q, k, k), describe("cpu", "cpu"))
    assert (config.block_q, config.block_kv, config.elementwise) == (1, block_kv, elementwise)


def test_default_tiles_of_the_paged_xla_ops():
    """Whole pages for one query per row on a CPU; otherwise tiles of about the number of queries per row."""
    pages = jnp.zeros((9, 256, 8))

    def config(b, num_queries, **ragged):
        rows = PagedOperands(jnp.zeros((num_queries, 4, 8)), pages, pages, jnp.zeros((b, 2), int), jnp.zeros(b, int))
        return xla_paged.default_config(rows._replace(**ragged), describe("cpu", "cpu"))

    assert config(4, 4).block_kv == 512
    for b, queries, block_q in ((4, 8, 16), (4, 128, 32), (4, 400, 128), (4, 4096, 256), (1, 128, 128), (0, 64, 64)):
        assert config(b, queries, query_start=jnp.zeros(b + 1, int)).block_q == block_q


def test_an_unknown_dtype_has_no_entry():
    assert tuning.flash_config("gfx942", dtype="float64", head_dim=64) is None
