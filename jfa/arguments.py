"""Converts the arguments of the public functions to the arrays that kernels take, and checks them."""

from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array

from jfa import checks

# Upper bound of lengths and offsets: a query index, an offset and a window of _WIDEST can be added without overflowing
# int32.
_LONGEST = 2**29
_WIDEST = 2 * _LONGEST  # a window this wide reaches the first key even from the largest offset


def broadcastable(name: str, x: ArrayLike | None, scores: tuple[int, ...], *, boolean: bool) -> Array | None:
    """Reshapes x to four axes and checks that it broadcasts to the shape of the scores; None stays None."""
    if x is None:
        return None
    x = jnp.asarray(x)
    x = x.reshape((1,) * max(0, 4 - x.ndim) + x.shape)
    checks.broadcasts(name, x, scores, boolean=boolean)
    return x


def narrowed(x: ArrayLike) -> Array:
    """Converts integers of any width to a JAX array. Clips them first, since JAX would drop the upper 32 of 64 bits."""
    if isinstance(x, Array):
        return x
    leaves = jax.tree.leaves(x)
    if all(isinstance(leaf, Integral | np.ndarray | np.generic) for leaf in leaves):
        whole = np.asarray(x)
        if whole.dtype.kind in "iu":
            held = np.iinfo(whole.dtype)
            x = np.clip(whole, max(held.min, -_LONGEST), min(held.max, _LONGEST)).astype(np.int32)
    return jnp.asarray(x)


def per_row(name: str, x: ArrayLike | None, batch: int, *, spread: bool = False) -> Array | None:
    """Converts to i32[batch], clipped to valid positions. spread: accept one number for all rows."""
    if x is None:
        return None
    x = narrowed(x)
    if spread and x.ndim == 0:
        x = jnp.full((batch,), x)
    checks.per_row(name, x, batch)
    held = jnp.iinfo(x.dtype)
    return jnp.clip(x, max(held.min, -_LONGEST), min(held.max, _LONGEST)).astype(jnp.int32)


def per_head(name: str, x: ArrayLike | None, num_heads: int) -> Array | None:
    """float[num_heads]; None stays None."""
    if x is None:
        return None
    x = jnp.asarray(x)
    checks.per_head(name, x, num_heads)
    return x


def slopes(x: ArrayLike | None, batch: int, num_heads: int) -> Array | None:
    """float[1 or batch, num_heads], from one slope per head or per row and head; None stays None."""
    if x is None:
        return None
    x = jnp.asarray(x)
    checks.per_head("alibi_slopes", x, num_heads, batch=batch)
    return x[None] if x.ndim == 1 else x


def segments(
    query: ArrayLike | None, key: ArrayLike | None, query_shape: tuple, key_shape: tuple, *, one_row: bool
) -> dict[str, Array]:
    """The segment ids as fields of Operands; empty if none are given."""
    given = {"query_segment_ids": query, "key_value_segment_ids": key}
    if query is None and key is None:
        return {}
    arrays = []
    for (name, x), shape in zip(given.items(), (query_shape, key_shape), strict=True):
        if x is None:
            raise ValueError(f"{name} is missing: pass the segment ids of both queries and keys, or neither")
        if isinstance(x, np.ndarray) and x.dtype.kind in "iu" and x.size and not -(2**31) <= x.min() <= x.max() < 2**31:
            raise ValueError(f"{name} must fit into 32 bits, got {x.min()} to {x.max()}; number the documents from 0")
        x = jnp.asarray(x)
        x = x[None] if one_row and x.ndim == 1 else x
        checks.segments(name, x, shape)
        arrays.append(x.astype(jnp.int32))
    return dict(zip(("q_segments", "kv_segments"), arrays, strict=True))


def tokens(name: str, x: ArrayLike, shape: tuple[int, ...]) -> Array:
    """i32 of this shape, an id for each token."""
    x = narrowed(x)
    checks.segments(name, x, shape)
    return x.astype(jnp.int32)


def dropout_seed(rate: float, key: ArrayLike | None) -> Array | None:
    """Two 32-bit words from a random key; None if nothing is dropped."""
    if not 0.0 < rate < 1.0:  # AttentionSpec rejects rates that are out of range
        return None
    if key is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_key: jax.random.key(seed), a new one for each step")
    return jax.random.bits(jnp.asarray(key), (2,), jnp.uint32)


def window(size: int | tuple[int | None, int | None] | None) -> tuple[int | None, int | None] | None:
    """(left, right), from an int or a pair; None: all keys on that side."""
    if size is None:
        return None
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(n is None or isinstance(n, Integral) for n in pair):
        raise ValueError(f"local_window_size must be an int or a pair (left, right) of ints or None, got {size!r}")
    left, right = (None if n is None else min(int(n), _WIDEST) for n in pair)
    return left, right


def varying_alike[T](operands: T) -> T:
    """Inside shard_map, casts every operand to vary over all mesh axes that any operand varies over.

    The gradient of an operand that was replicated over an axis is then summed over that axis.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(operands)))

    def cast(x: Array) -> Array:
        lacking = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, lacking, to="varying") if lacking else x

    return jax.tree.map(cast, operands)
