"""Checks at the door. What they say is static (shapes, dtypes, numbers), so they cost nothing in a compiled program."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

FLOAT_DTYPES = ("float16", "bfloat16", "float32")


def attention_shapes(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError unless query [b, tq, hq, d], key [b, tk, hkv, d] and value [b, tk, hkv, dv] belong together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, length, heads, head_dim], or without batch like the other two, "
                f"got shape {x.shape}"
            )
        if x.dtype.name not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1:
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}; "
            "cast them before the call"
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must have the same shape but for the head_dim, got {key.shape} and {value.shape}"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have the same batch size, got {query.shape[0]} and {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head_dim, got {query.shape[3]} and {key.shape[3]}")
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got {query.shape[3]} and, of value, {value.shape[3]}")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, got {query.shape[2]} and "
            f"{key.shape[2]}; repeat or drop key heads before the call"
        )


def broadcasts(name: str, x: Array, shape: Sequence[int], *, boolean: bool) -> None:
    """Raises ValueError unless x [.., .., .., ..] broadcasts to the scores [batch, heads, queries, keys]."""
    if boolean != (x.dtype == jnp.bool_):
        other = "an additive one is called bias" if boolean else "a boolean one is called mask"
        raise ValueError(f"{name} must be {'boolean' if boolean else 'a float array'}, got {x.dtype}; {other}")
    if not boolean and x.dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
    if x.ndim != 4 or any(n not in (1, full) for n, full in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must broadcast to [batch, query heads, queries, keys] = {list(shape)}, got {list(x.shape)}"
        )


def per_row(name: str, x: Array, batch: int) -> None:
    """Raises ValueError unless x is i32[batch]."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, got {x.dtype}")
    if x.shape != (batch,):
        raise ValueError(f"{name} must hold one integer per batch row, shape ({batch},), got {x.shape}")


def per_head(name: str, x: Array, num_heads: int) -> None:
    """Raises ValueError unless x is float[num_heads]."""
    if x.dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}")
    if x.shape != (num_heads,):
        raise ValueError(f"{name} must hold one number per query head, shape ({num_heads},), got {x.shape}")


def segments(name: str, x: Array, shape: Sequence[int]) -> None:
    """Raises ValueError unless x is i32 of this shape."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers, got {x.dtype}")
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must hold one integer per position, shape {tuple(shape)}, got {x.shape}")


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
