"""What the TPU kernels share: the units of scores, the online softmax of a tile, and the VMEM that arrays take.

The vector unit works on registers of 8 x 128 numbers of 4 bytes: the last axis of an array is called lanes. A running
maximum or sum per row is stored in all 128 lanes, so that no kernel moves a number from one lane to the others.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.tpu._pallas import pl, pltpu
from jfa.types import AttentionSpec, DeviceInfo, TpuConfig

LOG2_E = math.log2(math.e)
LANES = 128
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256


def interpretation(device: DeviceInfo) -> Any:
    """The argument `interpret` of pallas_call: on a CPU, JAX's interpreter of TPU kernels."""
    return pltpu.InterpretParams() if device.platform == "cpu" else False


def why_not_device(device: DeviceInfo) -> str | None:
    """The reason why no kernel of this folder runs on a device; None if they do."""
    if device.platform not in ("tpu", "cpu"):
        return f"Mosaic TPU kernels run on TPUs (and interpreted on the CPU), not on {device.platform}"
    return None


def why_not_dtypes(*arrays: Any) -> str | None:
    """The reason why the kernels do not take arrays of these dtypes; None if they do."""
    if any(x.dtype == jnp.float16 for x in arrays):
        return "no TPU loads float16 (Mosaic refuses it); use bfloat16"
    return None


def why_not_head_dims(d: int, dv: int) -> str | None:
    """The reason why the kernels do not take keys and values of these sizes; None if they do."""
    for name, size in (("head_dim", d), ("the head_dim of value", dv)):
        if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM:
            return f"{name} must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {size}"
    return None


def why_not_vmem(needed: int, device: DeviceInfo, smallest: str) -> str | None:
    """The reason why a kernel does not fit into a device's VMEM; None if it does.

    Args:
      needed: bytes with the smallest tiles, which `smallest` describes.
    """
    limit = budget(device)
    if needed > limit:
        return f"{smallest} need {needed:,} bytes of VMEM, and a kernel gets {limit:,} of it on {device.arch}"
    return None


def check_config(config: TpuConfig, needed: int, limit: int) -> None:
    """Raises ValueError if tiles of this size need more VMEM than there is."""
    if needed > limit:
        raise ValueError(
            f"tiles of block_q={config.block_q} and block_kv={config.block_kv} need {needed:,} bytes of VMEM, and a "
            f"kernel gets {limit:,}; leave config None for tiles that fit"
        )


def budget(device: DeviceInfo) -> int:
    """Bytes of VMEM that a kernel may use: XLA keeps operands of the program around it in the rest."""
    return device.vmem_bytes * 3 // 4 if device.vmem_bytes > 16 << 20 else device.vmem_bytes * 7 // 8


def sublanes(dtype: Any) -> int:
    """Rows of a tile in memory: 8 of 4 bytes, 16 of 2, 32 of 1."""
    return 32 // jnp.dtype(dtype).itemsize


def stored_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array in VMEM: its last two axes are rounded up to whole tiles."""
    *outer, rows, columns = (1, *shape) if len(shape) == 1 else shape
    return math.prod(outer) * rounded(rows, sublanes(dtype)) * rounded(columns, LANES) * jnp.dtype(dtype).itemsize


def rounded(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return pl.cdiv(n, multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """The units of scores: `raw` ones, times `factor`, are exponents of 2.

    A score that is only a scaled product stays a product: its scale becomes part of the factor.
    """

    spec: AttentionSpec
    has_bias: bool = False  # something is added to the scaled products

    @property
    def _simple(self) -> bool:
        return self.spec.softcap is None and not self.has_bias

    @property
    def factor(self) -> float:
        """Positive, so that the maximum may be taken before it is applied."""
        if self.spec.softcap is not None:
            return LOG2_E * self.spec.softcap
        return LOG2_E * (abs(self.spec.sm_scale) or 1.0) if self._simple else LOG2_E

    @property
    def sign(self) -> float:
        """The factor of the queries: 1, or what `factor` lacks of the scale: -1 or 0."""
        if not self._simple or self.spec.sm_scale > 0:
            return 1.0
        return -1.0 if self.spec.sm_scale else 0.0

    def raw(self, products: Float[Array, "x y"], bias: Float[Array, "x y"] | None = None) -> Float[Array, "x y"]:
        """Raw scores of the products of queries and keys; with a soft cap, the tanh."""
        if self._simple:
            return products
        scores = products * self.spec.sm_scale
        if bias is not None:
            scores = scores + bias
        return scores if self.spec.softcap is None else jnp.tanh(scores * (1.0 / self.spec.softcap))

    def log_sum_exp(self, m: Array, l: Array) -> Array:
        """Natural log-sum-exp of the maximum of raw scores and the sum of the weights; -inf if that is 0."""
        empty = l == 0.0
        return jnp.where(empty, -jnp.inf, m * (self.factor / LOG2_E) + jnp.log(jnp.where(empty, 1.0, l)))


def start_softmax(m_ref, l_ref, acc_ref) -> None:
    """Sets the running maximum [.., rows, LANES], sum [.., rows, LANES] and output [.., rows, dv] of no keys."""
    m_ref[...] = jnp.full_like(m_ref, -jnp.inf)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)


def add_to_softmax(m_ref, l_ref, acc_ref, raw: Float[Array, "rows keys"], values, factor: float, weigh=None) -> None:
    """Adds keys with these raw scores (-inf: masked) and values [keys, dv] to a running softmax.

    weigh: changes the weights before they are multiplied with the values.
    """
    m = m_ref[...]
    m_next = jnp.maximum(m, raw.max(1, keepdims=True))
    # until a row sees its first key its maximum is -inf, and (-inf) - (-inf) is NaN
    m_safe = jnp.where(m_next == -jnp.inf, 0.0, m_next)
    p = jnp.exp2((raw - spread(m_safe, raw.shape[1])) * factor)
    rescale = jnp.exp2((m - m_safe) * factor)
    l_ref[...] = l_ref[...] * rescale + p.sum(1, keepdims=True)
    p = p if weigh is None else weigh(p)
    added = product(p.astype(values.dtype), values)
    acc_ref[...] = acc_ref[...] * spread(rescale, added.shape[1]) + added
    m_ref[...] = m_next


def normalized(acc: Array, m: Array, l: Array, scores: Scores, sinks: Array | None = None) -> Array:
    """The output of a softmax; rows without keys are 0.

    sinks: f32[rows, LANES], logits that are added to the denominator.
    """
    empty = l == 0.0
    if sinks is not None:
        l = l + jnp.exp2(sinks * LOG2_E - jnp.where(empty, 0.0, m) * scores.factor)
    norm = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, l))
    return jnp.where(spread(empty.astype(jnp.int32), acc.shape[1]) != 0, 0.0, acc * spread(norm, acc.shape[1]))


def spread(x: Array, columns: int) -> Array:
    """[rows, columns] of numbers that are the same in all lanes of x [rows, LANES]."""
    if columns <= LANES:
        return x[:, :columns]
    if columns % LANES == 0:
        return jnp.tile(x, (1, columns // LANES))
    return jnp.broadcast_to(x[:, :1], (x.shape[0], columns))


def column(row: Array) -> Array:
    """[n, LANES] of a row [1, n]: its numbers, the same in all lanes."""
    return jnp.transpose(jnp.broadcast_to(row, (LANES, row.shape[1])))


def product(a: Array, b: Array, *, trans_a: bool = False, trans_b: bool = False) -> Array:
    """A matrix product with float32 sums; float32 inputs are not rounded to bfloat16."""
    if a.dtype == jnp.float32 and trans_b and a.shape[1] > LANES:
        # two short sums are more precise than a long one; the matrix unit adds 128 products at a time anyway
        parts = (slice(LANES), slice(LANES, None))
        first, second = (product(a[:, part], b[:, part], trans_b=True) for part in parts)
        return first + second
    dimensions = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
