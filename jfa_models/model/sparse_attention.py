"""Causal attention of whole texts that computes only a part of the tiles of scores, as a SparseConfig says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

import jfa
from jfa.rules import with_default_rules
from jfa_models.model.sparse_config import SparseConfig

BLOCK = 128  # queries and keys of a tile
LAST_QUERIES = 64  # whose scores choose the lines of vertical-slash

_FIRST = 1e9  # more than any sum of weights
_LEAST = -1e30  # a score; rows without keys have no infinities


def sparse_attention(
    q: Float[Array, "b t hq d"],
    k: Float[Array, "b t hkv d"],
    v: Float[Array, "b t hkv d"],
    config: SparseConfig,
    *,
    scale: float | None,
    query_seq_lengths: Int[Array, " b"] | None,
    **options: Any,
) -> Float[Array, "b t hq d"]:
    """Causal attention over the tiles of the config.

    Args:
      query_seq_lengths: valid tokens of each row. None: all.
      scale, options: as of jfa.block_sparse_attention.
    """
    options |= dict(scale=scale, is_causal=True, query_seq_lengths=query_seq_lengths)
    if config.is_exact:
        return jfa.dot_product_attention(q, k, v, **options)
    lengths = jnp.full(q.shape[0], q.shape[1]) if query_seq_lengths is None else query_seq_lengths
    mask = mask_of(config, q, k, lengths, scale=q.shape[3] ** -0.5 if scale is None else scale)
    return jfa.block_sparse_attention(q, k, v, mask, **options)


@with_default_rules
def mask_of(
    config: SparseConfig,
    q: Float[Array, "b t hq d"],
    k: Float[Array, "b t hkv d"],
    lengths: Int[Array, " b"],
    *,
    scale: float,
) -> jfa.BlockMask:
    """The tiles that a causal mask leaves and that are computed, and others. The arrays may be traced."""
    t, blocks = q.shape[1], dict(block_q=BLOCK, block_kv=BLOCK)
    if config.pattern == "vertical-slash":
        return jfa.BlockMask.from_tiles(_vertical_slash(q, k, lengths, config.fraction, scale), t, t, **blocks)
    tiles = np.arange(-(-t // BLOCK))
    # with a tile of its own alone, the first query of a tile would see nothing before it
    counts = np.maximum(np.minimum(2, tiles + 1), (config.fraction * (tiles + 1)).astype(int))
    if config.pattern == "window":
        distance = tiles[:, None] - tiles
        return jfa.BlockMask.from_tiles((distance < counts[:, None]) | (tiles == 0), t, t, **blocks)
    # the queries up to the first one of each tile, which all queries of the tile may know
    known = jnp.pad(q, ((0, 0), (BLOCK - 1, -t % BLOCK), (0, 0), (0, 0)))[:, : len(tiles) * BLOCK]
    best = jfa.BlockMask.top_k(known, k, counts, is_causal=True, **blocks)
    return jfa.BlockMask.from_tiles((best.grid() >= 0).at[..., 0].set(True), t, t, **blocks)


def _vertical_slash(
    q: Float[Array, "b t hq d"], k: Float[Array, "b t hkv d"], lengths: Int[Array, " b"], fraction: float, scale: float
) -> Bool[Array, "b hq n n"]:
    """The columns and diagonals of tiles with the largest weights, as many as the fraction has room for."""
    vertical, slash = _weights_of_lines(q, k, lengths, scale)
    n = vertical.shape[2]
    # the diagonal is always chosen, then the first column and the diagonal before the tile's own
    slash = slash.at[..., 0].set(jnp.inf).at[..., 1:2].set(_FIRST)
    vertical = vertical.at[..., 0].set(_FIRST)
    place = jnp.argsort(jnp.argsort(-jnp.concatenate([vertical, slash], axis=-1), axis=-1), axis=-1)
    row, column = jnp.ogrid[:n, :n]
    of_slash = jnp.take(place[..., n:], jnp.maximum(row - column, 0), axis=-1)
    first = jnp.minimum(place[..., None, :n], of_slash)  # place of the first line that crosses a tile
    tiles = -(-lengths // BLOCK)[:, None, None, None]
    first = jnp.where((column <= row) & (row < tiles), first, 2 * n)
    room = jnp.floor(fraction * tiles[..., 0] * (tiles[..., 0] + 1) / 2).astype(jnp.int32)
    in_order = jnp.sort(first.reshape(*first.shape[:2], -1), axis=-1)
    left_out = jnp.take_along_axis(in_order, jnp.minimum(room, n * n - 1), axis=-1)[..., None]
    return (first < left_out) | (row == column)


def _weights_of_lines(
    q: Float[Array, "b t hq d"], k: Float[Array, "b t hkv d"], lengths: Int[Array, " b"], scale: float
) -> tuple[Float[Array, "b hq n"], Float[Array, "b hq n"]]:
    """For columns and for diagonals of tiles, the largest sum of the last queries' weights over a line of tokens.

    Not the sum over all lines: the tokens of one diagonal are all in a few columns of tiles, and would choose these.
    """
    (b, t, hq, d), hkv = q.shape, k.shape[2]
    rows, n = min(LAST_QUERIES, t), -(-t // BLOCK)
    start = jnp.maximum(lengths - rows, 0)
    last = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, rows))(q, start).reshape(b, rows, hkv, hq // hkv, d)
    scores = jnp.einsum("brhgd,bjhd->bhgrj", last, k, preferred_element_type=jnp.float32).reshape(b, hq, rows, t)
    position = (start[:, None] + jnp.arange(rows))[:, None, :, None]
    seen = (jnp.arange(t) <= position) & (position < lengths[:, None, None, None])
    weights = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scale * scores, _LEAST), axis=-1), 0.0)
    vertical = jnp.pad(weights.sum(2), ((0, 0), (0, 0), (0, n * BLOCK - t))).reshape(b, hq, n, BLOCK)
    # the r-th row from below is moved right by r, so that the sum of a column is that of a distance
    moved = jnp.pad(weights[:, :, ::-1], ((0, 0), (0, 0), (0, 0), (0, rows))).reshape(b, hq, -1)
    by_distance = moved[..., :-rows].reshape(b, hq, rows, t + rows - 1).sum(2)
    place = (start + rows - 1)[:, None, None] - jnp.arange(n * BLOCK)
    found = jnp.take_along_axis(by_distance, jnp.clip(place, 0, t + rows - 2), axis=-1)
    found = jnp.where(place >= 0, found, 0.0).reshape(b, hq, n, BLOCK)
    # keys at a distance of a BLOCK + r are in the a-th diagonal of tiles, or for a share r / BLOCK of the queries in
    # the next one
    share = jnp.arange(BLOCK) / BLOCK
    slash, following = (found * (1 - share)).max(-1), (found * share).max(-1)
    return vertical.max(-1), jnp.maximum(slash, jnp.pad(following, ((0, 0), (0, 0), (1, 0)))[..., :-1])
