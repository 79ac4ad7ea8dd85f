"""Which backend serves a call: a table per platform, and a sentence for every refusal."""

import dataclasses
from collections.abc import Callable

from jfa.kernels.triton import flash as triton_flash
from jfa.kernels.xla import flash as xla_flash
from jfa.reference import attention as reference
from jfa.types import AttentionSpec, BlockConfig, DeviceInfo, FlashConfig, Operands, UnsupportedError

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


FLASH: dict[str, FlashBackend] = {
    "reference": FlashBackend(
        why_not=lambda operands, spec, device: None,
        default_config=lambda operands, device: None,
        config_type=None,
        run=lambda operands, spec, config, device: reference.attention(operands, spec=spec),
    ),
    "xla": FlashBackend(
        why_not=xla_flash.why_not,
        default_config=xla_flash.default_config,
        config_type=BlockConfig,
        run=lambda operands, spec, config, device: xla_flash.flash_attention(operands, spec=spec, config=config),
    ),
    "triton": FlashBackend(
        why_not=triton_flash.why_not,
        default_config=triton_flash.default_config,
        config_type=FlashConfig,
        run=lambda operands, spec, config, device: triton_flash.flash_attention(
            operands, spec=spec, config=config, interpret=device.platform == "cpu"
        ),
    ),
}

# Public names of backends that are planned; named, they are refused with this sentence.
NOT_BUILT = {"tpu": "a Pallas kernel for TPU is not built yet", "mosaic_gpu": "a Mosaic GPU kernel is not built yet"}


def select(implementation: str | None, operands: Operands, spec: AttentionSpec, device: DeviceInfo) -> str:
    """The name of the backend that serves this call on this device.

    Args:
      implementation: a backend by name, or None for the first in the platform's table that can.

    Raises:
      ValueError: no such backend.
      UnsupportedError: the named backend cannot serve the call, or none can; each with its reason.
    """
    if implementation is None:
        reasons = []
        for name in PREFERENCE.get(device.platform, ("xla",)):
            reason = FLASH[name].why_not(operands, spec, device)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise UnsupportedError(f"no attention backend on {device.platform}:\n  " + "\n  ".join(reasons))
    if implementation not in FLASH and implementation not in NOT_BUILT:
        known = ", ".join((*FLASH, *NOT_BUILT))
        raise ValueError(f"implementation must be None or one of {known}, got {implementation!r}")
    reason = NOT_BUILT.get(implementation) or FLASH[implementation].why_not(operands, spec, device)
    if reason:
        raise UnsupportedError(f"implementation={implementation!r}: {reason}; leave it None to let jfa choose")
    return implementation
