"""Blockwise attention in plain XLA, for any platform."""

from jfa.backends.interface import FlashBackend, LinearBackend, PagedBackend, ProductBackend, SparseBackend
from jfa.kernels.xla import block_sparse, flash, linear, paged, products
from jfa.types import BlockConfig, LinearConfig


def _run(operands, spec, config, device):
    return flash.flash_attention(operands, spec=spec, config=config)


def _run_backward(operands, out, lse, d_out, d_lse, spec, config, device):
    return flash.flash_attention_bwd(operands, out, lse, d_out, d_lse, spec=spec, config=config)


def _run_sparse(operands, spec, config, device):
    dense, mask = operands
    return block_sparse.block_sparse_attention(dense, mask, spec=spec, widen=device.platform == "cpu")


def _run_sparse_backward(operands, out, lse, d_out, d_lse, spec, config, device):
    dense, mask = operands
    return block_sparse.block_sparse_attention_bwd(
        dense, mask, out, lse, d_out, d_lse, spec=spec, widen=device.platform == "cpu"
    )


def _nothing(*call) -> None:
    return None


def _run_paged(operands, spec, config, device):
    return paged.paged_attention(operands, spec=spec, config=config)


def _run_product(operands, spec, config, device):
    return products.quantized_matmul(operands, spec=spec, on_cpu=device.platform == "cpu")


def _run_linear(operands, spec, config, device):
    return linear.linear_attention(operands, spec=spec, config=config)


def _run_ragged_linear(operands, rows, spec, config, device):
    return linear.ragged_linear_attention(operands, rows, spec=spec, config=config)


FLASH = FlashBackend(
    why_not=flash.why_not,
    default_config=flash.default_config,
    config_type=BlockConfig,
    run=_run,
    backward_config=flash.backward_config,
    run_backward=_run_backward,
)
SPARSE = SparseBackend(
    why_not=_nothing,
    default_config=_nothing,
    config_type=None,
    run=_run_sparse,
    backward_config=_nothing,
    run_backward=_run_sparse_backward,
)
PAGED = PagedBackend(
    why_not=paged.why_not, default_config=paged.default_config, config_type=BlockConfig, run=_run_paged
)
PRODUCT = ProductBackend(
    why_not=products.why_not, default_config=products.default_config, config_type=None, run=_run_product
)
LINEAR = LinearBackend(
    why_not=linear.why_not,
    default_config=linear.default_config,
    config_type=LinearConfig,
    run=_run_linear,
    run_ragged=_run_ragged_linear,
)
