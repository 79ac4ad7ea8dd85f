"""Pallas-Triton kernels, with tile sizes from the architecture's tuning table if it has them, otherwise safe defaults.

On a CPU the kernels are interpreted.
"""

import dataclasses

import jax

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
from jfa.kernels.triton import casts, few_rows, flash, flash_bwd, linear, linear_bwd, paged, products, write
from jfa.rules import with_default_rules
from jfa.types import (
    AttentionSpec,
    DeviceInfo,
    FlashConfig,
    LinearKernelConfig,
    Operands,
    PagedConfig,
    PagedOperands,
    ProductConfig,
    ProductOperands,
    ProductSpec,
)


def _tuned(operands: Operands, device: DeviceInfo, kernel: str) -> FlashConfig | None:
    widest = max(operands.q.shape[3], operands.v.shape[3])
    return tuning.flash_config(device.arch, dtype=operands.q.dtype.name, head_dim=widest, kernel=kernel)


def _flash_config(operands: Operands, device: DeviceInfo) -> FlashConfig:
    return _tuned(operands, device, "flash_attention") or flash.default_config(operands, device)


def _default_config(operands: Operands, device: DeviceInfo) -> FlashConfig:
    """A PagedConfig where the paged kernel computes the call."""
    if not paged.takes(operands):
        return _flash_config(operands, device)
    dtype = operands.q.dtype.name
    widest = max(operands.q.shape[3], operands.v.shape[3])
    tuned = tuning.paged_config("paged_decode_attention", device.arch, dtype=dtype, pages=dtype, head_dim=widest)
    return tuned or paged.default_config_of_rows(operands, device)


def _run(operands, spec, config, device):
    if isinstance(config, PagedConfig) and paged.takes(operands):
        return paged.attention_of_one_query(
            operands,
            spec=spec,
            config=config,
            num_splits=paged.num_splits_of_rows(operands, config, device),
            interpret=device.platform == "cpu",
        )
    return flash.flash_attention(operands, spec=spec, config=config, interpret=device.platform == "cpu")


def _backward_config(operands: Operands, config: FlashConfig, device: DeviceInfo) -> flash_bwd.BackwardConfig:
    default = flash_bwd.default_config(operands, device)
    return flash_bwd.BackwardConfig(
        dq=_tuned(operands, device, "flash_attention_dq") or default.dq,
        dkv=_tuned(operands, device, "flash_attention_dkv") or default.dkv,
    )


def _run_backward(operands, out, lse, d_out, d_lse, spec, config, device):
    interpret = device.platform == "cpu"
    return flash_bwd.flash_attention_bwd(
        operands, out, lse, d_out, d_lse, spec=spec, config=config, interpret=interpret
    )


def _why_not_sparse(operands: SparseOperands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    for name in ("block_q", "block_kv"):
        block = getattr(operands.mask, name)
        if block < 16 or block & (block - 1):
            return f"the mask's {name} must be a power of two of at least 16, the smallest matrix tile, got {block}"
    return flash.why_not(operands.dense, spec, device)


# Entries of flash attention's tables that spill registers in the loop over a mask's partial tiles, in 16 bits: (kernel,
# architecture, head_dim) to the fields that differ. Those of jfa-bench compile with the most FLOP per cycle of a few.
_SPARSE_TILES = {
    ("flash_attention", "gfx1100", 64): dict(block_kv=32),
    ("flash_attention", "gfx1201", 64): dict(block_kv=64),
    ("flash_attention_dkv", "gfx942", 256): dict(block_kv=32, num_warps=4),
    ("flash_attention_dkv", "gfx1100", 64): dict(block_q=16),
    ("flash_attention_dkv", "gfx1100", 128): dict(block_d=16),
    ("flash_attention_dkv", "gfx1100", 256): dict(block_d=64, num_warps=8),
    ("flash_attention_dkv", "gfx1201", 128): dict(block_q=16),
}


def _of_sparse(config: FlashConfig, kernel: str, operands: SparseOperands, device: DeviceInfo) -> FlashConfig:
    """The configuration that a call with a mask uses in place of flash attention's."""
    q, _, v = operands.dense[:3]
    if q.dtype.itemsize == 2:
        size = next(size for size in (64, 128, 256) if max(q.shape[3], v.shape[3]) <= size)
        changed = _SPARSE_TILES.get((kernel, tuning.table_arch(device.arch), size), {})
        config = dataclasses.replace(config, **changed)
    return _within(config, operands.mask)


def _within(config: FlashConfig, mask: BlockMask) -> FlashConfig:
    """The configuration, with tiles no larger than the mask's: as powers of two, they divide them."""
    blocks = {name: min(getattr(config, name), getattr(mask, name)) for name in ("block_q", "block_kv")}
    return dataclasses.replace(config, **blocks)


def _default_sparse_config(operands: SparseOperands, device: DeviceInfo) -> FlashConfig:
    return _of_sparse(_flash_config(operands.dense, device), "flash_attention", operands, device)


def _sparse_backward_config(
    operands: SparseOperands, config: FlashConfig, device: DeviceInfo
) -> flash_bwd.BackwardConfig:
    chosen = _backward_config(operands.dense, config, device)
    return flash_bwd.BackwardConfig(
        dq=_of_sparse(chosen.dq, "flash_attention_dq", operands, device),
        dkv=_of_sparse(chosen.dkv, "flash_attention_dkv", operands, device),
    )


def _run_sparse(operands, spec, config, device):
    dense, mask = operands
    interpret = device.platform == "cpu"
    return flash.flash_attention(dense, spec=spec, config=_within(config, mask), interpret=interpret, mask=mask)


def _run_sparse_backward(operands, out, lse, d_out, d_lse, spec, config, device):
    dense, mask = operands
    interpret = device.platform == "cpu"
    return flash_bwd.flash_attention_bwd(
        dense, out, lse, d_out, d_lse, spec=spec, config=config, interpret=interpret, mask=mask
    )


def _default_paged_config(operands: PagedOperands, device: DeviceInfo) -> PagedConfig:
    tuned = tuning.paged_config(
        "paged_decode_attention" if operands.query_start is None else "ragged_paged_attention",
        device.arch,
        dtype=operands.q.dtype.name,
        pages=operands.k_pages.dtype.name,
        head_dim=operands.q.shape[2],
    )
    return tuned or paged.default_config(operands, device)


def _run_paged(operands, spec, config, device):
    if device.arch in casts.WITHOUT_FP8_CASTS:
        config = dataclasses.replace(config, fp8_by_bits=True)
    return paged.paged_attention(
        operands,
        spec=spec,
        config=config,
        num_splits=paged.num_splits(operands, config, device),
        interpret=device.platform == "cpu",
    )


def _default_product_config(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> ProductConfig:
    tuned = tuning.product_config(
        products.name(operands),
        device.arch,
        dtype="int8" if spec.rounds_inputs else operands.x.dtype.name,
        weight=operands.values.dtype.name,
        group_size=spec.group_size or operands.x.shape[1],
    )
    return tuned or products.default_config(operands, device)


def _run_product(operands, spec, config, device):
    return products.quantized_matmul(
        operands,
        spec=spec,
        config=config,
        num_splits=products.num_splits(operands, config, device),
        fp8_by_bits=products.fp8_by_bits(device),
        interpret=device.platform == "cpu",
    )


def _run_linear(operands, spec, config, device):
    @jax.custom_vjp
    def run(operands):
        return linear.linear_attention(operands, spec=spec, config=config, interpret=device.platform == "cpu")

    @with_default_rules  # it is traced when the caller asks for the gradient
    def backward(operands, cotangents):
        found = linear_bwd.linear_attention_bwd(
            operands,
            *cotangents,
            spec=spec,
            config=linear_bwd.default_config(operands, device),
            interpret=device.platform == "cpu",
        )
        return (found,)

    run.defvjp(lambda operands: (run(operands), operands), backward)
    return run(operands)


def _run_ragged_linear(operands, rows, spec, config, device):
    return linear.ragged_linear_attention(operands, rows, spec=spec, config=config, interpret=device.platform == "cpu")


def _run_write(operands, head_dim, device):
    return write.rotate_and_write(operands, head_dim=head_dim, interpret=device.platform == "cpu")


def _run_rows(operands, spec, device):
    return few_rows.matmul_few_rows(operands, spec=spec, device=device, interpret=device.platform == "cpu")


FLASH = FlashBackend(
    why_not=flash.why_not,
    default_config=_default_config,
    config_type=FlashConfig,
    run=_run,
    backward_config=_backward_config,
    run_backward=_run_backward,
)
SPARSE = SparseBackend(
    why_not=_why_not_sparse,
    default_config=_default_sparse_config,
    config_type=FlashConfig,
    run=_run_sparse,
    backward_config=_sparse_backward_config,
    run_backward=_run_sparse_backward,
)
PAGED = PagedBackend(
    why_not=paged.why_not, default_config=_default_paged_config, config_type=PagedConfig, run=_run_paged
)
PRODUCT = ProductBackend(
    why_not=products.why_not,
    default_config=_default_product_config,
    config_type=ProductConfig,
    run=_run_product,
)
LINEAR = LinearBackend(
    why_not=linear.why_not,
    default_config=linear.default_config,
    config_type=LinearKernelConfig,
    run=_run_linear,
    run_ragged=_run_ragged_linear,
)
WRITE = WriteBackend(why_not=write.why_not, run=_run_write)
ROWS = RowBackend(why_not=few_rows.why_not, run=_run_rows)
