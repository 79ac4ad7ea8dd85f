"""The interface of a backend: the functions that the ops call, one set for each kind of op."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from jfa.block_mask import SparseOperands
from jfa.types import (
    AttentionSpec,
    BlockConfig,
    DeviceInfo,
    FlashConfig,
    LinearConfig,
    LinearOperands,
    LinearSpec,
    Operands,
    PagedConfig,
    PagedOperands,
    ProductConfig,
    ProductOperands,
    ProductSpec,
    RowOperands,
    RowSpec,
    TpuConfig,
    TpuProductConfig,
    WriteOperands,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashBackend:
    """An implementation of attention.

    Attributes:
      why_not: the reason why it does not support a call; None: it does.
      default_config: the configuration if the caller passes none; None: the backend has no configuration.
      config_type: type of the configurations that it accepts; None: it accepts none.
      run: (operands, spec, config, device) -> (out, lse).
      backward_config: (operands, config of the forward pass, device) -> configuration of the backward pass.
      run_backward: (operands, out, lse, d_out, d_lse, spec, config, device) -> cotangents, as Operands.
    """

    why_not: Callable[[Operands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[Operands, DeviceInfo], BlockConfig | FlashConfig | TpuConfig | None]
    config_type: type | None
    run: Callable[..., tuple]
    backward_config: Callable[..., Any]
    run_backward: Callable[..., Operands]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseBackend:
    """An implementation of attention with a BlockMask. The fields are those of FlashBackend."""

    why_not: Callable[[SparseOperands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[SparseOperands, DeviceInfo], FlashConfig | None]
    config_type: type | None
    run: Callable[..., tuple]
    backward_config: Callable[..., Any]
    run_backward: Callable[..., Operands]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBackend:
    """An implementation of paged attention. The fields are those of FlashBackend; there are no gradients."""

    why_not: Callable[[PagedOperands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[PagedOperands, DeviceInfo], BlockConfig | PagedConfig | TpuConfig | None]
    config_type: type | None
    run: Callable[..., tuple]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductBackend:
    """An implementation of products with quantized weights. The fields are those of FlashBackend.

    But run returns one array, and default_config also takes the spec. The gradient of x is a product with the
    dequantized weight on every backend.
    """

    why_not: Callable[[ProductOperands, ProductSpec, DeviceInfo], str | None]
    default_config: Callable[[ProductOperands, ProductSpec, DeviceInfo], ProductConfig | TpuProductConfig | None]
    config_type: type | None
    run: Callable[..., Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearBackend:
    """An implementation of linear attention. The fields are those of FlashBackend.

    But run returns the output and the state after the last token, and JAX differentiates it; run_ragged is run for
    (operands, rows, ...) and has no gradient.
    """

    why_not: Callable[[LinearOperands, LinearSpec, DeviceInfo], str | None]
    default_config: Callable[[LinearOperands, DeviceInfo], LinearConfig | None]
    config_type: type | None
    run: Callable[..., tuple]
    run_ragged: Callable[..., tuple]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteBackend:
    """An implementation of the rotation of new queries and keys with the write into a cache.

    Attributes:
      why_not: the reason why it does not support a call, (operands, head_dim, device); None: it does.
      run: (operands, head_dim, device) -> the rotated queries, and the arrays of the cache.
    """

    why_not: Callable[[WriteOperands, int, DeviceInfo], str | None]
    run: Callable[..., tuple[Array, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBackend:
    """An implementation of products of a few rows with what is computed around them.

    Attributes:
      why_not: the reason why it does not support a call; None: it does.
      run: (operands, spec, device) -> the products.
    """

    why_not: Callable[[RowOperands, RowSpec, DeviceInfo], str | None]
    run: Callable[..., Array]
