"""The plain formula, used only if requested by name. JAX differentiates it."""

from jfa.backends.interface import FlashBackend, LinearBackend, PagedBackend, ProductBackend, SparseBackend
from jfa.reference.attention import attention
from jfa.reference.linear import linear_attention, ragged_linear_attention
from jfa.reference.paged import paged_attention
from jfa.reference.products import quantized_matmul


def _serves(operands, spec, device) -> None:
    return None


def _no_config(*call) -> None:
    return None


def _run(operands, spec, config, device):
    return attention(operands, spec=spec)


def _run_sparse(operands, spec, config, device):
    return attention(operands.dense._replace(mask=operands.mask.to_array()), spec=spec)


def _run_paged(operands, spec, config, device):
    return paged_attention(operands, spec=spec)


def _run_product(operands, spec, config, device):
    return quantized_matmul(operands, spec=spec)


def _run_linear(operands, spec, config, device):
    return linear_attention(operands, spec=spec)


def _run_ragged_linear(operands, rows, spec, config, device):
    return ragged_linear_attention(operands, rows, spec=spec)


def _differentiates_itself(*args):
    raise AssertionError("JAX differentiates the reference; it has no backward pass of its own")


FLASH = FlashBackend(
    why_not=_serves,
    default_config=_no_config,
    config_type=None,
    run=_run,
    backward_config=_differentiates_itself,
    run_backward=_differentiates_itself,
)
SPARSE = SparseBackend(
    why_not=_serves,
    default_config=_no_config,
    config_type=None,
    run=_run_sparse,
    backward_config=_differentiates_itself,
    run_backward=_differentiates_itself,
)
PAGED = PagedBackend(why_not=_serves, default_config=_no_config, config_type=None, run=_run_paged)
PRODUCT = ProductBackend(why_not=_serves, default_config=_no_config, config_type=None, run=_run_product)
LINEAR = LinearBackend(
    why_not=_serves, default_config=_no_config, config_type=None, run=_run_linear, run_ragged=_run_ragged_linear
)
