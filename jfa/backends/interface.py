"""What a backend offers: the functions that the ops call, one set for each kind of op."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jfa.types import AttentionSpec, BlockConfig, DeviceInfo, FlashConfig, Operands, PagedConfig, PagedOperands


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashBackend:
    """One way to compute attention.

    Attributes:
      why_not: a sentence about a call that it does not serve; None: it serves.
      default_config: the tiles of a plain call; None: it has none.
      config_type: of the tiles that a caller may give; None: it takes none.
      run: (operands, spec, config, device) -> (out, lse).
      backward_config: (operands, config of the forward pass, device) -> the tiles of the gradients.
      run_backward: (operands, out, lse, d_out, d_lse, spec, config, device) -> cotangents, as Operands.
    """

    why_not: Callable[[Operands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[Operands, DeviceInfo], BlockConfig | FlashConfig | None]
    config_type: type | None
    run: Callable[..., tuple]
    backward_config: Callable[..., Any]
    run_backward: Callable[..., Operands]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBackend:
    """One way to compute attention over pages. The fields are those of FlashBackend; there are no gradients."""

    why_not: Callable[[PagedOperands, AttentionSpec, DeviceInfo], str | None]
    default_config: Callable[[PagedOperands, DeviceInfo], BlockConfig | PagedConfig | None]
    config_type: type | None
    run: Callable[..., tuple]
