"""Cases of the kernel that rotates new tokens and writes them into a cache, and their expected results."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jfa import quant

_SLOTS = 37


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteCase:
    """Shapes: hq and hkv heads of head_dim columns, 2 * half of which are rotated."""

    hq: int
    hkv: int
    head_dim: int
    half: int
    kind: str | None  # of quant.KINDS; None: the cache holds floats
    tokens: int = 5


class WriteTruth(NamedTuple):
    """Arguments of jfa.write_ops.rotate_and_write, and its results as floats: q, keys, values and their scales."""

    case: WriteCase
    tokens: tuple[Any, ...]
    cache: tuple[Any, Any]
    wanted: tuple[np.ndarray, ...]


def cases(head_dim: int, kind: str | None) -> dict[str, WriteCase]:
    """A whole and a partial rotation; groups and head_dims that are no powers of two."""
    return {
        "groups": WriteCase(hq=8, hkv=2, head_dim=head_dim, half=head_dim // 2, kind=kind),
        "part_of_odd_groups": WriteCase(hq=3, hkv=1, head_dim=head_dim * 5 // 8, half=head_dim // 8, kind=kind),
    }


def truth_of(case: WriteCase, dtype: str, *, seed: int) -> WriteTruth:
    """Computed by NumPy in float32, as the definition says; numbers and scales as quant.quantize does."""
    draw = np.random.default_rng(seed)
    n, d, half = case.tokens, case.head_dim, case.half
    x = np.array(jnp.asarray(draw.normal(size=(n, case.hq + 2 * case.hkv, d)) * 3, dtype))
    x[1] = 0  # a vector of zeros has a scale of 0
    angle = draw.normal(size=(n, half)).astype(np.float32) * 5
    # a scale of 1, and numbers in the middle between two that are stored
    x[2], angle[2], largest = draw.integers(-127, 128, x[2].shape) / 2, 0, quant.KINDS[case.kind or "int8"][1]
    x[2, :, 0] = largest
    cos, sin = np.cos(angle), np.sin(angle)
    slots = draw.permutation(_SLOTS)[:n].astype(np.int32)
    slots[[0, -1]] = -1, _SLOTS  # neither is written
    turned, (a, b) = x.copy(), (x[..., s : s + half].astype(np.float32) for s in (0, half))
    turned[..., :half] = (a * cos[:, None] - b * sin[:, None]).astype(x.dtype)
    turned[..., half : 2 * half] = (b * cos[:, None] + a * sin[:, None]).astype(x.dtype)
    cache, wanted, scales = [], [turned[:, : case.hq].astype(np.float32)], []
    for new in (turned[:, case.hq : -case.hkv], x[:, -case.hkv :]):
        held: Any = jnp.asarray(draw.integers(1, 9, (1, _SLOTS, case.hkv * d)), dtype)
        if case.kind is not None:
            new, scale = _quantized(new, case.kind)
            held = quant.QuantizedArray(
                values=held.astype(quant.KINDS[case.kind][0]),
                scales=jnp.full((1, _SLOTS, case.hkv), 3, jnp.bfloat16),
                group_size=d,
            )
            scales.append(_written(held.scales, scale, slots))
        cache.append(held)
        wanted.append(_written(held.values if case.kind else held, new, slots))
    return WriteTruth(case, (x.reshape(n, -1), cos, sin, slots), (cache[0], cache[1]), (*wanted, *scales))


def _quantized(x: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """quant.quantize of finite vectors. XLA on a CPU multiplies with a rounded reciprocal, and misses ties."""
    stored, largest = quant.KINDS[kind]
    x = x.astype(np.float32)
    scales = (np.abs(x).max(-1) / np.float32(largest)).astype(ml_dtypes.bfloat16)
    divisor = scales.astype(np.float32)[..., None]
    numbers = np.clip(x / np.where(divisor == 0, 1, divisor), -largest, largest)
    return (np.rint(numbers) if kind == "int8" else numbers.astype(np.dtype(stored))), scales


def _written(held: Any, new: Any, slots: np.ndarray) -> np.ndarray:
    found = np.array(held, np.float32)
    found[0, slots[1:-1]] = np.asarray(new, np.float32).reshape(len(slots), -1)[1:-1]
    return found
