"""Paged attention in plain XLA, for any platform: flash.py over tiles of keys gathered through the page table.

A tile is gathered and dequantized when it is needed: the keys of a row are never stored contiguously.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jfa import quant, trees
from jfa.kernels.xla import flash
from jfa.types import AttentionSpec, BlockConfig, DeviceInfo, Operands, PagedOperands

# If the pool is large, XLA on a CPU splits a gather among threads, however little is gathered, and waking them takes
# longer than gathering a small tile. Tiles of up to this many pages are sliced instead; concatenating more slices is
# slower than the gather (bench/LOG.md).
_MOST_SLICES = 8

_FAR = 2**30  # a key after all others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The keys or values of all rows as a virtual array [b, capacity, hkv, d], from which flash.py reads tiles."""

    pages: Shaped[Array, "num_pages page_size hkv*_"]
    heads: int
    head_dim: int
    scales: Float[Array, "num_pages page_size hkv"] | None
    page_table: Int[Array, "b pages_per_seq"]
    dtype: DTypeLike  # of the tiles

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, pages_per_seq = self.page_table.shape
        return b, pages_per_seq * self.pages.shape[1], self.heads, self.head_dim

    def rows(self, start, size: int) -> Float[Array, "b size hkv d"]:
        """The tokens [start, start + size) of each row; a tile of flash.py starts at start."""
        page_size = self.pages.shape[1]
        run = math.gcd(size, page_size)  # tokens that are contiguous wherever a tile starts
        token = start + run * jnp.arange(size // run)
        page = self.page_table[:, token // page_size]
        index = page * (page_size // run) + token % page_size // run
        # without this barrier, XLA would bitcast all fp8 pages once, before the loop
        pages, index = lax.optimization_barrier((self.pages, index))
        found = quant.on_bits(functools.partial(_runs, index=index, run=run), pages)
        found = found.reshape(*found.shape[:2], self.heads, -1)
        if self.scales is not None:
            scales = _runs(self.scales, index, run)
            found = quant.numbers(found) * scales[..., None].astype(jnp.float32)
        return found.astype(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeMask:
    """The tree mask and window of one tile of a row's queries, which flash.py applies after the causal mask."""

    seen: Bool[Array, "block_q m"]  # trees.seen
    depth: Int[Array, " block_q"]
    offset: Int[Array, ""]  # position of the row's first new token
    left: int | None

    @property
    def keys(self) -> tuple[Any, Any, Any]:
        """(first, inside, outside): no query sees keys before first, and all see those of [inside, outside)."""
        first = inside = 0
        if self.left is not None:
            lowest, highest = (
                jnp.maximum(0, self.offset + x - self.left) for x in (self.depth.min(), self.depth.max())
            )
            first, inside = lowest, highest
        return first, inside, jnp.where(self.seen.all(), _FAR, self.offset)

    def visible(self, key: Int[Array, " block_kv"]) -> Bool[Array, "block_q block_kv"]:
        new, m = key - self.offset, self.seen.shape[1]
        inside = jnp.take(self.seen, jnp.clip(new, 0, m - 1), axis=1)
        found = (new < 0) | inside
        return found if self.left is None else found & (new >= self.depth[:, None] - self.left)


def default_config(operands: PagedOperands, device: DeviceInfo) -> BlockConfig:
    """The default of flash.py, with whole pages on a CPU, for one query per row.

    Otherwise block_q is near the mean number of queries per row.
    """
    b = operands.kv_len.shape[0]
    if operands.query_start is None:
        config = flash.default_config(_one_query_each(operands), device)
        if device.platform != "cpu":
            return config
        # pages of up to 256 tokens in one piece, so that _runs can slice them
        block_kv = max(config.block_kv, min(256, operands.k_pages.shape[1]))
        # other dtypes are cast to float32, which transposes at no cost
        elementwise = config.elementwise and operands.k_pages.dtype == operands.v_pages.dtype == jnp.float32
        return dataclasses.replace(config, block_kv=block_kv, elementwise=elementwise)
    n = operands.q.shape[0]
    block_q = 16
    while block_q < min(256, n // max(b, 1)):
        block_q *= 2
    return BlockConfig(block_q=block_q, block_kv=256, widen=device.platform == "cpu")


def why_not(operands: PagedOperands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """None: every call is supported."""
    return None


def paged_attention(
    operands: PagedOperands, *, spec: AttentionSpec, config: BlockConfig
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """Attention and the natural log-sum-exp, as reference.paged_attention defines them."""
    if operands.query_start is None:
        out, lse = flash.flash_attention(_one_query_each(operands), spec=spec, config=config)
        return out[:, 0], lse[:, 0]
    n, hq, _ = operands.q.shape
    dv = _rows(operands).v.shape[3]
    block_q = max(1, min(config.block_q, n))
    start = operands.query_start
    tiles = -(-jnp.diff(start) // block_q)
    tiles_end = jnp.cumsum(tiles)
    tree = None
    if operands.tree_mask is not None:
        tree = trees.seen(operands.tree_mask, start, spec.left), trees.depths(operands.tree_mask, start)

    def tile(i, done):
        row = jnp.searchsorted(tiles_end, i, side="right")
        first = (i - (tiles_end - tiles)[row]) * block_q
        index = start[row] + first + jnp.arange(block_q)
        own = index < start[row + 1]
        index = jnp.where(own, index, n)
        kv_len = jnp.minimum(operands.kv_len[row], operands.capacity)
        one = operands._replace(page_table=operands.page_table[row][None], kv_len=kv_len[None])
        queries = _rows(one)._replace(
            q=jnp.take(operands.q, index, axis=0, mode="fill", fill_value=0)[None],
            q_len=own.sum()[None],
            q_offset=(kv_len - (start[row + 1] - start[row]) + first)[None],
        )
        if tree is not None:
            seen, depth = (x[jnp.minimum(index, start[row + 1] - 1)] for x in tree)
            offset = kv_len - (start[row + 1] - start[row])
            mask: Any = TreeMask(seen=seen, depth=depth, offset=offset, left=spec.left)
            queries = queries._replace(mask=mask)
        found = flash.flash_attention(
            queries,
            spec=spec if tree is None else dataclasses.replace(spec, window=None),
            config=dataclasses.replace(config, block_q=block_q),
        )
        return tuple(x.at[index].set(new[0], mode="drop") for x, new in zip(done, found, strict=True))

    done = (
        flash.float32(operands.q, (n, hq, dv)).astype(operands.q.dtype),
        flash.float32(operands.q, (n, hq), -jnp.inf),
    )
    return lax.fori_loop(0, tiles.sum(), tile, done)


def _runs(
    x: Shaped[Array, "num_pages page_size width"], index: Int[Array, "b m"], run: int
) -> Shaped[Array, "b m*run width"]:
    """The tokens [run * i, run * i + run) of the pool for each i of a row, concatenated."""
    num_pages, page_size, width = x.shape
    # the heads of a token stay one axis up to the barrier: XLA on a CPU takes twice as long to loop over short axes. Do
    # not merge the tokens as well: sharded heads would be gathered from all devices
    if index.size <= _MOST_SLICES and run == page_size:
        pages = [lax.dynamic_slice_in_dim(x, i, 1).reshape(1, run, width) for i in index.reshape(-1)]
        found = jnp.concatenate(pages)
    else:
        found = x.reshape(num_pages * page_size // run, run, width).at[index].get(mode="promise_in_bounds")
    return lax.optimization_barrier(found).reshape(len(index), -1, width)


def _one_query_each(operands: PagedOperands) -> Operands:
    kv_len = jnp.minimum(operands.kv_len, operands.capacity)
    return _rows(operands)._replace(q=operands.q[:, None], q_offset=kv_len - 1, kv_len=kv_len)


def _rows(operands: PagedOperands) -> Operands:
    """The operands of flash.py, except q_len and q_offset."""
    k, v = (
        Rows(
            pages=pages,
            heads=operands.num_kv_heads,
            head_dim=head_dim,
            scales=scales,
            page_table=operands.page_table,
            dtype=operands.q.dtype,
        )
        for pages, head_dim, scales in (
            (operands.k_pages, operands.q.shape[2], operands.k_scales),
            (operands.v_pages, operands.value_head_dim, operands.v_scales),
        )
    )
    return Operands(q=operands.q, k=k, v=v, kv_len=operands.kv_len, sinks=operands.sinks)  # type: ignore[arg-type]
