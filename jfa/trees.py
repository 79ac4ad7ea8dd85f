"""Trees of new tokens in a ragged call: the position of each query, and the new tokens of its row that it sees.

Source: arXiv:2305.09781, section 4 (tree attention).
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def depths(tree_mask: Bool[Array, "n m"], query_start: Int[Array, " b+1"]) -> Int[Array, " n"]:
    """The distance of each query's position from that of its row's first new token.

    This is the number of new tokens that it sees, itself not counted; for a causal query, its index in the row.
    """
    index = _index(tree_mask, query_start)
    found = _earlier(tree_mask, index).sum(1, dtype=jnp.int32)
    return jnp.where(tree_mask.any(1), found - 1, index)


def seen(tree_mask: Bool[Array, "n m"], query_start: Int[Array, " b+1"], left: int | None) -> Bool[Array, "n m"]:
    """The new tokens that each query sees within its window, before a causal mask is applied.

    Those of a tree are at consecutive positions. Of a causal query all are True; what holds for column m - 1 holds for
    all new tokens past it: to a query of a tree, the causal mask hides them.

    Args:
      left: number of keys that a query sees before its own position; None: all.
    """
    visible = _earlier(tree_mask, _index(tree_mask, query_start))
    if left is not None:
        from_here = jnp.cumsum(visible[:, ::-1], axis=1, dtype=jnp.int32)[:, ::-1]
        visible &= from_here <= left + 1
    return visible | ~tree_mask.any(1, keepdims=True)


def _earlier(tree_mask: Bool[Array, "n m"], index: Int[Array, " n"]) -> Bool[Array, "n m"]:
    return tree_mask & (jnp.arange(tree_mask.shape[1]) <= index[:, None])


def _index(tree_mask: Bool[Array, "n m"], query_start: Int[Array, " b+1"]) -> Int[Array, " n"]:
    """The index of each query in its row."""
    query = jnp.arange(tree_mask.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(query_start[1:], query, side="right", method="compare_all")
    return query - query_start[jnp.minimum(row, query_start.shape[0] - 2)]
