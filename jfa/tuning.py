"""Tuning tables: tile sizes per architecture, measured or chosen by offline compilation."""

import functools
import json
from importlib import resources

from jfa.types import FlashConfig, PagedConfig, ProductConfig

# Architectures whose compute units are similar enough to those of another one to use its table.
_NEIGHBOUR = {
    "gfx940": "gfx942",
    "gfx941": "gfx942",
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
    "gfx1103": "gfx1100",
    "gfx1150": "gfx1100",
    "gfx1151": "gfx1100",
    "gfx1152": "gfx1100",
    "gfx1153": "gfx1100",
    "gfx1200": "gfx1201",
    "sm_86": "sm_80",
    "sm_89": "sm_80",
}


def table_arch(arch: str) -> str:
    """The architecture whose table is used for this one: itself or a similar one."""
    return _NEIGHBOUR.get(arch, arch)


def flash_config(arch: str, *, dtype: str, head_dim: int, kernel: str = "flash_attention") -> FlashConfig | None:
    """The table's entry for the smallest listed head_dim >= head_dim; None if there is no table or no such entry.

    kernel: "flash_attention", "flash_attention_dq" or "flash_attention_dkv".
    """
    entries = _table(kernel, table_arch(arch)).get(dtype, {})
    fitting = sorted(int(listed) for listed in entries if int(listed) >= head_dim)
    return FlashConfig(**entries[str(fitting[0])]["config"]) if fitting else None


def paged_config(kernel: str, arch: str, *, dtype: str, pages: str, head_dim: int) -> PagedConfig | None:
    """Like flash_config, for a paged attention kernel.

    kernel: "paged_decode_attention" or "ragged_paged_attention". pages: dtype of the pages.
    """
    entries = _table(kernel, table_arch(arch)).get(pages_key(dtype, pages), {})
    fitting = sorted(int(listed) for listed in entries if int(listed) >= head_dim)
    return PagedConfig(**entries[str(fitting[0])]["config"]) if fitting else None


def product_config(kernel: str, arch: str, *, dtype: str, weight: str, group_size: int) -> ProductConfig | None:
    """The table's entry for the smallest listed group_size >= group_size, else for the largest; None if there is none.

    kernel: "quantized_matmul" or "quantized_matmul_few_rows". weight: dtype of the stored numbers.
    """
    entries = _table(kernel, table_arch(arch)).get(f"{dtype} on {weight}", {})
    listed = sorted(map(int, entries))
    fitting = [size for size in listed if size >= group_size] or listed[-1:]
    return ProductConfig(**entries[str(fitting[0])]["config"]) if fitting else None


def pages_key(dtype: str, pages: str) -> str:
    """The key in a table for queries of one dtype and pages of another."""
    return dtype if pages == dtype else f"{dtype} on {pages}"


@functools.cache
def _table(op: str, arch: str) -> dict:
    file = resources.files("jfa") / "tuning_tables" / arch / f"{op}.json"
    return json.loads(file.read_text())["configs"] if file.is_file() else {}
