"""Which tiles to use: a measured or compiled-for table per architecture, else the kernel's own default."""

import functools
import json
from importlib import resources

from jfa.types import FlashConfig, PagedConfig

# Neighbours whose compute units are alike enough to share a table.
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
    """The architecture whose table serves this one: itself, or its nearest neighbour."""
    return _NEIGHBOUR.get(arch, arch)


def flash_config(arch: str, *, dtype: str, head_dim: int, kernel: str = "flash_attention") -> FlashConfig | None:
    """The table's entry for the smallest listed head_dim that is not below this one; None without a table or entry.

    kernel: "flash_attention", "flash_attention_dq" or "flash_attention_dkv".
    """
    entries = _table(kernel, table_arch(arch)).get(dtype, {})
    fitting = sorted(int(listed) for listed in entries if int(listed) >= head_dim)
    return FlashConfig(**entries[str(fitting[0])]["config"]) if fitting else None


def paged_config(kernel: str, arch: str, *, dtype: str, pages: str, head_dim: int) -> PagedConfig | None:
    """The table's entry of a kernel over pages, as flash_config finds it.

    kernel: "paged_decode_attention" or "ragged_paged_attention". pages: their dtype.
    """
    entries = _table(kernel, table_arch(arch)).get(pages_key(dtype, pages), {})
    fitting = sorted(int(listed) for listed in entries if int(listed) >= head_dim)
    return PagedConfig(**entries[str(fitting[0])]["config"]) if fitting else None


def pages_key(dtype: str, pages: str) -> str:
    """What a table calls queries of one dtype on pages of another."""
    return dtype if pages == dtype else f"{dtype} on {pages}"


@functools.cache
def _table(op: str, arch: str) -> dict:
    file = resources.files("jfa") / "tuning_tables" / arch / f"{op}.json"
    return json.loads(file.read_text())["configs"] if file.is_file() else {}
