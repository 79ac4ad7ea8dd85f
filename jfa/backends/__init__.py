"""Selects the backend of a call: an ordered list per platform, and a reason for each backend that cannot be used.

A backend is a module in this package that implements interface.py. It is imported when it is first considered for a
call, so that calls on a CPU do not import Pallas.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jfa import tuning
from jfa.backends.interface import (
    FlashBackend,
    LinearBackend,
    PagedBackend,
    ProductBackend,
    RowBackend,
    SparseBackend,
    WriteBackend,
)
from jfa.block_mask import BlockMask, SparseOperands
from jfa.device import probe
from jfa.types import (
    AttentionSpec,
    DeviceInfo,
    LinearOperands,
    LinearSpec,
    Operands,
    PagedOperands,
    ProductOperands,
    ProductSpec,
    UnsupportedError,
)

NAMES = ("reference", "xla", "triton", "tpu")

# platform: backends, best first. The reference is used only if requested by name.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "rocm": ("triton", "xla"),
    "cuda": ("triton", "xla"),
    "tpu": ("tpu", "xla"),
    "cpu": ("xla",),
}


# Planned backends: public name, and the reason given to a call that requests it.
NOT_BUILT = {
    "mosaic_gpu": "the Mosaic GPU kernel is not implemented yet",
}


def flash(name: str) -> FlashBackend:
    """The attention backend with this name, one of NAMES."""
    return importlib.import_module(f"jfa.backends.{name}").FLASH


def sparse(name: str) -> SparseBackend:
    """The backend with this name, one of NAMES, of attention with a BlockMask."""
    return importlib.import_module(f"jfa.backends.{name}").SPARSE


def paged(name: str) -> PagedBackend:
    """The paged attention backend with this name, one of NAMES."""
    return importlib.import_module(f"jfa.backends.{name}").PAGED


def product(name: str) -> ProductBackend:
    """The backend with this name, one of NAMES, of products with quantized weights."""
    return importlib.import_module(f"jfa.backends.{name}").PRODUCT


def linear(name: str) -> LinearBackend:
    """The backend with this name, one of NAMES, of linear attention."""
    return importlib.import_module(f"jfa.backends.{name}").LINEAR


def write(implementation: str | None, device: DeviceInfo) -> WriteBackend | None:
    """The backend that rotates and writes with one kernel, if it is the one that a call would use; only one can."""
    return importlib.import_module("jfa.backends.triton").WRITE if _is_triton(implementation, device) else None


def rows(implementation: str | None, device: DeviceInfo) -> RowBackend | None:
    """The backend with products of a few rows and what is around them as one kernel; like `write`."""
    return importlib.import_module("jfa.backends.triton").ROWS if _is_triton(implementation, device) else None


def _is_triton(implementation: str | None, device: DeviceInfo) -> bool:
    return (implementation or PREFERENCE.get(device.platform, ("xla",))[0]) == "triton"


Table = Callable[[str], FlashBackend | SparseBackend | PagedBackend | ProductBackend | LinearBackend]


def select(
    implementation: str | None,
    operands: Any,
    spec: Any,
    device: DeviceInfo,
    *,
    table: Table = flash,
) -> str:
    """The name of the backend to use for this call on this device.

    Args:
      implementation: a backend by name, or None for the platform's first backend that supports the call.
      operands: Operands, or those of the table: SparseOperands, PagedOperands, ProductOperands or LinearOperands.
      spec: an AttentionSpec; with table=product a ProductSpec, with table=linear a LinearSpec.

    Raises:
      ValueError: there is no backend with this name.
      UnsupportedError: the named backend, or every backend, does not support the call; the message has the reasons.
    """
    if implementation is None:
        reasons = []
        for name in PREFERENCE.get(device.platform, ("xla",)):
            reason = table(name).why_not(operands, spec, device)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise UnsupportedError(f"no backend supports this call on {device.platform}:\n  " + "\n  ".join(reasons))
    if implementation not in NAMES and implementation not in NOT_BUILT:
        known = ", ".join((*NAMES, *NOT_BUILT))
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")
    reason = NOT_BUILT.get(implementation) or table(implementation).why_not(operands, spec, device)
    if reason:
        raise UnsupportedError(f"implementation={implementation!r}: {reason}; leave it None to let jfa choose")
    return implementation


def check_config(backend: str, wanted: type | None, given) -> None:
    """Raises ValueError unless a configuration has the type that the backend accepts."""
    if wanted is None or not isinstance(given, wanted):
        takes = "no config" if wanted is None else f"a {wanted.__name__}"
        raise ValueError(f"the {backend} backend takes {takes}, got a {type(given).__name__}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """Which backend an op uses on a device, and why the others are not used."""

    op: str
    backend: str
    tiles: str  # where the configuration comes from
    refused: tuple[tuple[str, str], ...]  # (backend, reason)


def explain(device: DeviceInfo | None = None) -> tuple[Explanation, ...]:
    """For each op, the backend that a plain call uses on this device, and why the others are not used.

    Args:
      device: None: the current device.
    """
    device = device or probe()
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    row: Any = jax.ShapeDtypeStruct((1, 1024, 8, 64), dtype)
    pages: Any = jax.ShapeDtypeStruct((65, 16, 8 * 64), dtype)
    numbers: Any = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    plain = Operands(row, row, row)
    visited = SparseOperands(plain, BlockMask.sliding_window(1024, 1024, 128))
    decode = PagedOperands(jax.ShapeDtypeStruct((1, 8, 64), dtype), pages, pages, numbers, numbers)  # type: ignore[arg-type]
    tuned = tuning.flash_config(device.arch, dtype=jnp.dtype(dtype).name, head_dim=64)
    tuned_paged = functools.partial(
        tuning.paged_config, arch=device.arch, dtype=jnp.dtype(dtype).name, pages=jnp.dtype(dtype).name, head_dim=64
    )
    # a decode step over 4-bit numbers in groups
    product_spec = ProductSpec(group_size=128)
    values, groups = jax.ShapeDtypeStruct((1024, 512), jnp.uint8), jax.ShapeDtypeStruct((1024, 8), dtype)
    rows = ProductOperands(jax.ShapeDtypeStruct((1, 1024), dtype), values, groups)  # type: ignore[arg-type]
    tuned_product = tuning.product_config(
        "quantized_matmul_few_rows", device.arch, dtype=jnp.dtype(dtype).name, weight="uint8", group_size=128
    )
    decays, state = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1024, 8), (1, 8, 64, 64)))
    tokens = LinearOperands(row, row, row, decays, state)  # type: ignore[arg-type]
    spec = AttentionSpec(sm_scale=0.125, causal=True)
    return (
        _explained("dot_product_attention", flash, plain, spec, device, tuned is not None),
        _explained(
            "paged_decode_attention", paged, decode, spec, device, tuned_paged("paged_decode_attention") is not None
        ),
        _explained(
            "ragged_paged_attention",
            paged,
            decode._replace(query_start=numbers),
            spec,
            device,
            tuned_paged("ragged_paged_attention") is not None,
        ),
        _explained("block_sparse_attention", sparse, visited, spec, device, tuned is not None),
        _explained("quantized_matmul", product, rows, product_spec, device, tuned_product is not None),
        _explained("linear_attention", linear, tokens, LinearSpec(scale=0.125), device, False),
    )


_OF_REFERENCE = {
    flash: "stores all scores in memory; used only if requested",
    sparse: "stores all scores in memory; used only if requested",
    paged: "stores all scores in memory; used only if requested",
    product: "dequantizes the whole weight to float32; used only if requested",
    linear: "computes one token at a time; used only if requested",
}


def _explained(op: str, table: Table, operands: Any, spec: Any, device: DeviceInfo, has_table: bool) -> Explanation:
    chosen = select(None, operands, spec, device, table=table)
    refused = []
    for name in NAMES:
        if name == chosen:
            continue
        reason = table(name).why_not(operands, spec, device)
        if reason is None and name == "reference":
            reason = _OF_REFERENCE[table]
        elif reason is None and name in ("triton", "tpu") and device.platform == "cpu":
            reason = "interpreted on a CPU, which is slow; used only if requested"
        refused.append((name, reason or f"{chosen} is preferred on {device.platform}; used only if requested"))
    tiles = "defaults"
    if chosen == "triton":
        tiles = f"tuning table of {tuning.table_arch(device.arch)}"
        if not has_table:
            tiles = f"safe defaults: there is no tuning table for {device.arch}; create one with jfa-bench tune"
    return Explanation(op=op, backend=chosen, tiles=tiles, refused=(*refused, *NOT_BUILT.items()))
