"""Which backend serves a call: a table per platform, and a sentence for every refusal."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jfa import tuning
from jfa.device import probe
from jfa.kernels.triton import flash as triton_flash
from jfa.kernels.triton import flash_bwd as triton_flash_bwd
from jfa.kernels.triton import paged as triton_paged
from jfa.kernels.xla import flash as xla_flash
from jfa.kernels.xla import paged as xla_paged
from jfa.reference import attention as reference
from jfa.reference import paged as paged_reference
from jfa.types import (
    AttentionSpec,
    BlockConfig,
    DeviceInfo,
    FlashConfig,
    Operands,
    PagedConfig,
    PagedOperands,
    UnsupportedError,
)

# platform: best first. The reference is never chosen, only named.
PREFERENCE: dict[str, tuple[str, ...]] = {
    "rocm": ("triton", "xla"),
    "cuda": ("triton", "xla"),
    "tpu": ("xla",),
    "cpu": ("xla",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashBackend:
    """One way to compute attention. The functions are those of its module."""

    why_not: Callable[[Operands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[Operands, DeviceInfo], BlockConfig | FlashConfig | None]
    config_type: type | None
    run: Callable  # (operands, spec, config, device) -> (out, lse)
    backward_config: Callable  # (operands, config of the forward pass, device) -> config
    run_bwd: Callable  # (operands, out, lse, d_out, d_lse, spec, config, device) -> cotangents, as Operands


def _differentiates_itself(*args):
    raise AssertionError("the reference is differentiated by JAX")


def _triton_backward_config(operands: Operands, config: FlashConfig, device: DeviceInfo):
    """Each backward kernel's entry of its tuning table, else its default."""
    widest = max(operands.q.shape[3], operands.v.shape[3])
    default = triton_flash_bwd.default_config(operands, device)

    def tuned(kernel: str) -> FlashConfig | None:
        return tuning.flash_config(device.arch, dtype=operands.q.dtype.name, head_dim=widest, kernel=kernel)

    return triton_flash_bwd.BackwardConfig(
        dq=tuned("flash_attention_dq") or default.dq, dkv=tuned("flash_attention_dkv") or default.dkv
    )


FLASH: dict[str, FlashBackend] = {
    "reference": FlashBackend(
        why_not=lambda operands, spec, device: None,
        default_config=lambda operands, device: None,
        config_type=None,
        run=lambda operands, spec, config, device: reference.attention(operands, spec=spec),
        backward_config=_differentiates_itself,
        run_bwd=_differentiates_itself,
    ),
    "xla": FlashBackend(
        why_not=xla_flash.why_not,
        default_config=xla_flash.default_config,
        config_type=BlockConfig,
        run=lambda operands, spec, config, device: xla_flash.flash_attention(operands, spec=spec, config=config),
        backward_config=lambda operands, config, device: config,
        run_bwd=lambda operands, out, lse, d_out, d_lse, spec, config, device: xla_flash.flash_attention_bwd(
            operands, out, lse, d_out, d_lse, spec=spec, config=config
        ),
    ),
    "triton": FlashBackend(
        why_not=triton_flash.why_not,
        default_config=triton_flash.default_config,
        config_type=FlashConfig,
        run=lambda operands, spec, config, device: triton_flash.flash_attention(
            operands, spec=spec, config=config, interpret=device.platform == "cpu"
        ),
        backward_config=_triton_backward_config,
        run_bwd=lambda operands, out, lse, d_out, d_lse, spec, config, device: triton_flash_bwd.flash_attention_bwd(
            operands, out, lse, d_out, d_lse, spec=spec, config=config, interpret=device.platform == "cpu"
        ),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBackend:
    """One way to compute attention over pages. The functions are those of its module."""

    why_not: Callable[[PagedOperands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[PagedOperands, DeviceInfo], BlockConfig | PagedConfig | None]
    config_type: type | None
    run: Callable  # (operands, spec, config, device) -> (out, lse)


def _triton_paged_config(operands: PagedOperands, device: DeviceInfo) -> PagedConfig:
    """The entry of the kernel's tuning table, else its default."""
    tuned = tuning.paged_config(
        "paged_decode_attention" if operands.query_start is None else "ragged_paged_attention",
        device.arch,
        dtype=operands.q.dtype.name,
        pages=operands.k_pages.dtype.name,
        head_dim=operands.q.shape[2],
    )
    return tuned or triton_paged.default_config(operands, device)


PAGED: dict[str, PagedBackend] = {
    "reference": PagedBackend(
        why_not=lambda operands, spec, device: None,
        default_config=lambda operands, device: None,
        config_type=None,
        run=lambda operands, spec, config, device: paged_reference.paged_attention(operands, spec=spec),
    ),
    "xla": PagedBackend(
        why_not=xla_paged.why_not,
        default_config=xla_paged.default_config,
        config_type=BlockConfig,
        run=lambda operands, spec, config, device: xla_paged.paged_attention(operands, spec=spec, config=config),
    ),
    "triton": PagedBackend(
        why_not=triton_paged.why_not,
        default_config=_triton_paged_config,
        config_type=PagedConfig,
        run=lambda operands, spec, config, device: triton_paged.paged_attention(
            operands,
            spec=spec,
            config=config,
            num_splits=triton_paged.num_splits(operands, config, device),
            interpret=device.platform == "cpu",
        ),
    ),
}

# Public names of backends that are planned; named, they are refused with this sentence.
NOT_BUILT = {"tpu": "a Pallas kernel for TPU is not built yet", "mosaic_gpu": "a Mosaic GPU kernel is not built yet"}


def select(
    implementation: str | None,
    operands: Any,
    spec: AttentionSpec,
    device: DeviceInfo,
    *,
    table: Mapping[str, FlashBackend | PagedBackend] = FLASH,
) -> str:
    """The name of the backend that serves this call on this device.

    Args:
      implementation: a backend by name, or None for the first in the platform's table that can.
      operands: Operands, or PagedOperands with table=PAGED.

    Raises:
      ValueError: no such backend.
      UnsupportedError: the named backend cannot serve the call, or none can; each with its reason.
    """
    if implementation is None:
        reasons = []
        for name in PREFERENCE.get(device.platform, ("xla",)):
            reason = table[name].why_not(operands, spec, device)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise UnsupportedError(f"no attention backend on {device.platform}:\n  " + "\n  ".join(reasons))
    if implementation not in table and implementation not in NOT_BUILT:
        known = ", ".join((*table, *NOT_BUILT))
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")
    reason = NOT_BUILT.get(implementation) or table[implementation].why_not(operands, spec, device)
    if reason:
        raise UnsupportedError(f"implementation={implementation!r}: {reason}; leave it None to let jfa choose")
    return implementation


def check_config(backend: str, wanted: type | None, given) -> None:
    """Raises ValueError unless a configuration is of the type that the backend takes."""
    if wanted is None or not isinstance(given, wanted):
        takes = "no config" if wanted is None else f"a {wanted.__name__}"
        raise ValueError(f"the {backend} backend takes {takes}, got a {type(given).__name__}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """Who serves an op on a device, and why the others do not."""

    op: str
    backend: str
    tiles: str  # where the configuration comes from
    refused: tuple[tuple[str, str], ...]  # (backend, reason)


def explain(device: DeviceInfo | None = None) -> tuple[Explanation, ...]:
    """For each op the backend that a plain call gets on this device, and what speaks against the others.

    Args:
      device: None means the one in use.
    """
    device = device or probe()
    dtype = jnp.float32 if device.platform == "cpu" else jnp.bfloat16
    row: Any = jax.ShapeDtypeStruct((1, 1024, 8, 64), dtype)
    pages: Any = jax.ShapeDtypeStruct((65, 16, 8, 64), dtype)
    numbers: Any = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    flash = Operands(row, row, row)
    decode = PagedOperands(jax.ShapeDtypeStruct((1, 8, 64), dtype), pages, pages, numbers, numbers)  # type: ignore[arg-type]
    tuned = tuning.flash_config(device.arch, dtype=jnp.dtype(dtype).name, head_dim=64)
    tuned_paged = functools.partial(
        tuning.paged_config, arch=device.arch, dtype=jnp.dtype(dtype).name, pages=jnp.dtype(dtype).name, head_dim=64
    )
    return (
        _explained("dot_product_attention", FLASH, flash, device, tuned is not None),
        _explained("paged_decode_attention", PAGED, decode, device, tuned_paged("paged_decode_attention") is not None),
        _explained(
            "ragged_paged_attention",
            PAGED,
            decode._replace(query_start=numbers),
            device,
            tuned_paged("ragged_paged_attention") is not None,
        ),
    )


def _explained(op: str, table: Mapping[str, Any], operands: Any, device: DeviceInfo, has_table: bool) -> Explanation:
    spec = AttentionSpec(sm_scale=0.125, causal=True)
    chosen = select(None, operands, spec, device, table=table)
    refused = []
    for name, backend in table.items():
        if name == chosen:
            continue
        reason = backend.why_not(operands, spec, device)
        if reason is None and name == "reference":
            reason = "holds every score in memory; runs when named"
        elif reason is None and name == "triton" and device.platform == "cpu":
            reason = "interpreted on a CPU, slowly; runs when named"
        refused.append((name, reason or f"comes after {chosen} on {device.platform}; runs when named"))
    tiles = "defaults"
    if chosen == "triton":
        tiles = f"tuning table of {tuning.table_arch(device.arch)}"
        if not has_table:
            tiles = f"safe defaults, since no tuning table is for {device.arch}; jfa-bench tune makes one"
    return Explanation(op=op, backend=chosen, tiles=tiles, refused=(*refused, *NOT_BUILT.items()))
