"""Mosaic kernels for TPUs. On a CPU they run in JAX's TPU interpreter.

What they do not support is left to XLA.
"""

import functools

from jfa.backends.interface import FlashBackend, LinearBackend, PagedBackend, ProductBackend, SparseBackend
from jfa.kernels.tpu import flash, flash_bwd, paged, products, shares, tile
from jfa.kernels.xla import flash as flash_in_xla
from jfa.types import AttentionSpec, BlockConfig, DeviceInfo, Operands, TpuConfig, TpuProductConfig


def _of_one_call(operands: Operands, device: DeviceInfo) -> Operands:
    return shares.of_one(operands, shares.number(operands, device))


def _why_not(operands: Operands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    return flash.why_not(_of_one_call(operands, device), spec, device)


def _default_config(operands: Operands, device: DeviceInfo) -> TpuConfig:
    return flash.default_config(_of_one_call(operands, device), device)


def _run(operands, spec, config, device):
    run = functools.partial(
        flash.flash_attention,
        spec=spec,
        config=config,
        vmem_limit_bytes=tile.budget(device),
        interpret=tile.interpretation(device),
    )
    return shares.forward(run, operands, shares.number(operands, device))


def _backward_config(operands: Operands, config: TpuConfig, device: DeviceInfo) -> TpuConfig | BlockConfig:
    """XLA computes the gradients if not even the smallest tiles of the kernel fit into VMEM."""
    of_kernel = flash_bwd.default_config(_of_one_call(operands, device), config, device)
    return of_kernel or flash_in_xla.default_config(operands, device)


def _run_backward(operands, out, lse, d_out, d_lse, spec, config, device):
    if isinstance(config, BlockConfig):
        return flash_in_xla.flash_attention_bwd(operands, out, lse, d_out, d_lse, spec=spec, config=config)
    run = functools.partial(
        flash_bwd.flash_attention_bwd,
        spec=spec,
        config=config,
        vmem_limit_bytes=tile.budget(device),
        interpret=tile.interpretation(device),
    )
    return shares.backward(run, operands, (out, lse, d_out, d_lse), shares.number(operands, device))


def _run_paged(operands, spec, config, device):
    return paged.paged_attention(
        operands,
        spec=spec,
        config=config,
        vmem_limit_bytes=tile.budget(device),
        interpret=tile.interpretation(device),
    )


def _run_product(operands, spec, config, device):
    return products.quantized_matmul(
        operands,
        spec=spec,
        config=config,
        vmem_limit_bytes=tile.budget(device),
        interpret=tile.interpretation(device),
    )


def _not_for(op: str):
    return lambda operands, spec, device: f"there is no TPU kernel for {op} yet"


def _never(*call):
    raise AssertionError("why_not has refused the call")


FLASH = FlashBackend(
    why_not=_why_not,
    default_config=_default_config,
    config_type=TpuConfig,
    run=_run,
    backward_config=_backward_config,
    run_backward=_run_backward,
)
SPARSE = SparseBackend(
    why_not=_not_for("block-sparse attention"),
    default_config=_never,
    config_type=None,
    run=_never,
    backward_config=_never,
    run_backward=_never,
)
PAGED = PagedBackend(why_not=paged.why_not, default_config=paged.default_config, config_type=TpuConfig, run=_run_paged)
PRODUCT = ProductBackend(
    why_not=products.why_not,
    default_config=products.default_config,
    config_type=TpuProductConfig,
    run=_run_product,
)
LINEAR = LinearBackend(
    why_not=_not_for("linear attention"), default_config=_never, config_type=None, run=_never, run_ragged=_never
)
