"""Attention in several calls, each with a share of the query heads of every key head, where one does not fit into VMEM.

A block has several key heads if their columns do not fill whole rows of lanes, and then all of their query heads: with
head_dim 80 and 16 query heads for each of 8 key heads not even the smallest tiles fit on v7x.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jfa.kernels.tpu import flash, tile
from jfa.types import DeviceInfo, Operands, TpuConfig

_SMALLEST = TpuConfig(block_q=tile.LANES, block_kv=tile.LANES)


def number(operands: Operands, device: DeviceInfo) -> int:
    """The fewest calls that fit; 1 if none does, or one is enough."""
    count = 1
    if not all(isinstance(n, int) for n in (*operands.q.shape, *operands.k.shape)):
        return count  # flash.why_not refuses symbolic shapes
    while flash.vmem_bytes(of_one(operands, count), _SMALLEST) > tile.budget(device):
        count *= 2
        if operands.group_size % count:
            return 1
    return count


def of_one(operands: Operands, count: int) -> Operands:
    """Operands of the sizes of one call; not its numbers."""
    q: Any = operands.q
    shape = (*q.shape[:2], q.shape[2] // count, q.shape[3])
    return operands if count == 1 else operands._replace(q=jax.ShapeDtypeStruct(shape, q.dtype))


def forward(run: Callable[[Operands], tuple[Array, ...]], operands: Operands, count: int) -> tuple[Array, ...]:
    """The output and log-sum-exp of all heads; run: of one share."""
    if count == 1:
        return run(operands)
    hkv = operands.k.shape[2]
    return tuple(_joined(parts, hkv) for parts in zip(*map(run, _each(operands, count)), strict=True))


def backward(
    run: Callable[..., Operands], operands: Operands, rows: Sequence[Float[Array, "b tq hq *_"]], count: int
) -> Operands:
    """The cotangents of all heads; run: of one share, with its part of rows. Those of keys and values are added."""
    if count == 1:
        return run(operands, *rows)
    hkv = operands.k.shape[2]
    of_rows = zip(*(_split(x, 2, hkv, count) for x in rows), strict=True)
    found = [run(share, *own) for share, own in zip(_each(operands, count), of_rows, strict=True)]
    joined: dict[str, Any] = {"q": _joined([one.q for one in found], hkv)}
    for name, axis in _OF_HEADS.items():
        if getattr(found[0], name) is not None:
            joined[name] = _joined([getattr(one, name) for one in found], hkv, axis)
    for name in ("k", "v"):
        parts = [getattr(one, name) for one in found]
        joined[name] = jnp.sum(jnp.stack(parts), 0, dtype=jnp.float32).astype(parts[0].dtype)
    return Operands(**joined)


_OF_HEADS = {"sinks": 0, "alibi_slopes": 1}  # arrays with a number for each query head: the axis


def _each(operands: Operands, count: int) -> list[Operands]:
    hkv = operands.k.shape[2]
    parts = {"q": _split(operands.q, 2, hkv, count)}
    for name, axis in _OF_HEADS.items():
        if (x := getattr(operands, name)) is not None:
            parts[name] = _split(x, axis, hkv, count)
    return [operands._replace(**{name: of_each[i] for name, of_each in parts.items()}) for i in range(count)]


def _split(x: Array, axis: int, hkv: int, count: int) -> list[Array]:
    """An axis of query heads in parts, each with some of those of every key head."""
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    parts = jnp.split(x.reshape(*before, hkv, -1, *after), count, axis + 1)
    return [part.reshape(*before, -1, *after) for part in parts]


def _joined(parts: Sequence[Array], hkv: int, axis: int = 2) -> Array:
    before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
    whole = jnp.concatenate([part.reshape(*before, hkv, -1, *after) for part in parts], axis + 1)
    return whole.reshape(*before, -1, *after)
