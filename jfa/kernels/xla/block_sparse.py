"""Attention over the tiles of a BlockMask in plain XLA: work and loads are proportional to the tiles that are visited.

Tiles of queries, of all batch rows and heads, are sorted by the number of their visits and processed several at a time,
each over its own list: first the tiles that all of them see whole, without a mask. So masks of heads may differ in
number, and a round of equal numbers wastes nothing. The backward pass visits the same tiles in the same order.

Source: arXiv:2307.08691, algorithms 1 and 2. Tested in tests/jfa/test_block_sparse.py.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jfa.block_mask import BlockMask, Visits
from jfa.kernels.common import row_terms
from jfa.kernels.xla.flash import SCORE_TILE_BYTES, dot, float32
from jfa.types import AttentionSpec, Operands

_MOST_LANES = 8  # tiles of queries that are processed at a time


def block_sparse_attention(
    operands: Operands, mask: BlockMask, *, spec: AttentionSpec, widen: bool
) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """Attention and the natural log-sum-exp, as reference.attention defines them with the mask as an array.

    Not differentiable by itself: sparse_ops pairs it with block_sparse_attention_bwd.

    Args:
      widen: cast tiles to float32 before a matrix product: for CPUs without a fast 16-bit one.
    """
    work = _Work.of(operands, mask, spec, widen)
    q, d = operands.q, operands.v.shape[3]

    def one_round(r, done):
        lanes = work.round(r)
        q_block, scale = work.queries(work.operands.q, lanes), spec.sm_scale
        if widen:  # scale the float32 queries once instead of all scores
            q_block, scale = q_block * scale, 1.0

        def kv_tile(n, carry, *, masked: bool):
            acc, m, l = carry
            tile = work.tile(lanes, n, q_block, scale, masked=masked)
            m_next = jnp.maximum(m, tile.scores.max(-1))
            m_safe = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # (-inf) - (-inf) would be NaN
            p = jnp.exp(tile.scores - m_safe[..., None])
            rescale = jnp.exp(m - m_safe)
            acc = acc * rescale[..., None] + dot("nrk,nkd->nrd", p.astype(tile.v_block.dtype), tile.v_block)
            return acc, m_next, l * rescale + p.sum(-1)

        rows = q_block.shape[:2]
        carry = (float32(q, (*rows, d)), float32(q, rows, -jnp.inf), float32(q, rows))
        acc, m, l = lanes.visit(kv_tile, carry)
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        lse_block = jnp.where(empty, -jnp.inf, m + jnp.log(l))
        if operands.sinks is not None:
            # if the sink is far above m this is inf, and acc / inf is 0, as it should be
            l = l + jnp.exp(work.per_head(operands.sinks[None], lanes) - jnp.where(empty, 0.0, m))
        blocks = (acc / l[..., None]).astype(q.dtype), lse_block[..., None]
        return tuple(_put(x, block, lanes.row) for x, block in zip(done, blocks, strict=True))

    done = (work.all_rows(d, q.dtype), work.all_rows(1, jnp.float32))
    out, lse = (work.unfolded(x) for x in lax.fori_loop(0, work.num_rounds, one_round, done))
    return out, lse[..., 0]


def block_sparse_attention_bwd(
    operands: Operands,
    mask: BlockMask,
    out: Float[Array, "b tq hq dv"],
    lse: Float[Array, "b tq hq"],
    d_out: Float[Array, "b tq hq dv"],
    d_lse: Float[Array, "b tq hq"],
    *,
    spec: AttentionSpec,
    widen: bool,
) -> Operands:
    """The cotangents of q, k, v, bias, sinks and slopes, recomputed tile by tile; None for operands without one."""
    q, bias, slopes = operands.q, operands.bias, operands.alibi_slopes
    d_out, lse, delta, d_sinks = row_terms(operands, out, lse, d_out, d_lse)
    safe_q = jnp.where(jnp.isposinf(lse)[..., None], 0, q)
    work = _Work.of(operands._replace(q=safe_q), mask, spec, widen)
    d_out = _lengthened(d_out, {1: work.num_q * mask.block_q})
    lse = _lengthened(lse[..., None], {1: work.num_q * mask.block_q}, jnp.inf)
    delta = _lengthened(delta[..., None], {1: work.num_q * mask.block_q})

    def one_round(r, grads):
        lanes = work.round(r)
        q_block, do_block = (work.queries(x, lanes) for x in (work.operands.q, d_out))
        lse_block, delta_block = (work.queries(x, lanes) for x in (lse, delta))
        # XLA on a CPU has no fast product that sums over the rows of its left side, so it gets a transposed copy
        columns = q_block.swapaxes(1, 2), do_block.swapaxes(1, 2)
        q_columns, do_columns = lax.optimization_barrier(columns)

        def kv_tile(n, carry, *, masked: bool):
            dq_block, dk, dv, d_bias, d_slopes = carry
            tile = work.tile(lanes, n, q_block, spec.sm_scale, masked=masked)
            p = jnp.exp(tile.scores - lse_block)
            ds = p * (dot("nrd,nkd->nrk", do_block, tile.v_block) - delta_block)
            if spec.softcap is not None:
                slope = 1.0 - jnp.square(tile.scores / spec.softcap)
                ds = ds * (slope if tile.visible is None else jnp.where(tile.visible, slope, 0.0))
            if d_bias is not None:
                d_bias = work.add_bias_tile(d_bias, ds, lanes, tile.j)
            if d_slopes is not None:
                change = work.split(ds * work.distance(lanes, tile.j)).sum((2, 3))
                d_slopes = d_slopes.at[work.slope_index(lanes)].add(-change)
            ds = (ds * spec.sm_scale).astype(tile.k_block.dtype)
            dv = _add(dv, dot("ndr,nrk->ndk", do_columns, p.astype(do_columns.dtype)), lanes, tile)
            dk = _add(dk, dot("ndr,nrk->ndk", q_columns, ds), lanes, tile)
            return dq_block + dot("nrk,nkd->nrd", ds, tile.k_block), dk, dv, d_bias, d_slopes

        dq, *rest = grads
        dq_block, *rest = lanes.visit(kv_tile, (float32(q, q_block.shape), *rest))
        return _put(dq, dq_block.astype(q.dtype), lanes.row), *rest

    d_bias, d_slopes = (None if x is None else float32(q, x.shape) for x in (work.operands.bias, slopes))
    dk, dv = (float32(q, (x.shape[0], x.shape[2], x.shape[3], x.shape[1])) for x in work.operands[1:3])
    grads = (work.all_rows(q.shape[3], q.dtype), dk, dv, d_bias, d_slopes)
    dq, dk, dv, d_bias, d_slopes = lax.fori_loop(0, work.num_rounds, one_round, grads)
    dk, dv = (jnp.moveaxis(x, 3, 1)[:, : mask.tk].astype(q.dtype) for x in (dk, dv))
    if bias is not None and d_bias is not None:
        d_bias = d_bias[:, :, : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
    return Operands(
        q=work.unfolded(dq),
        k=dk,
        v=dv,
        bias=d_bias,
        sinks=d_sinks,
        alibi_slopes=None if slopes is None or d_slopes is None else d_slopes.astype(slopes.dtype),
    )


class _Round(NamedTuple):
    """One tile of queries for each lane. A lane without one has no visits, and its results are dropped."""

    row: Int[Array, " n"]  # number of the tile in the order of batch rows, heads and tiles
    batch: Int[Array, " n"]
    head: Int[Array, " n"]  # first query head
    i: Int[Array, " n"]
    visits: Visits  # of each lane: [n, width] and [n]

    def visit(self, kv_tile, carry):
        """kv_tile over the visits, without a mask as long as all lanes have a tile that is visible whole."""
        full, count = self.visits.num_whole.min(), self.visits.num_visited.max()
        carry = lax.fori_loop(0, full, functools.partial(kv_tile, masked=False), carry)
        return lax.fori_loop(full, count, functools.partial(kv_tile, masked=True), carry)


class _ScoreTile(NamedTuple):
    scores: Float[Array, "n rows bk"]  # soft-capped; -inf where masked
    visible: Bool[Array, "n rows bk"] | None  # None: all
    k_block: Float[Array, "n bk d"]  # 0 instead of keys that no query sees, which may be NaN
    v_block: Float[Array, "n bk dv"]
    j: Int[Array, " n"]  # the tiles of keys
    kv_head: Int[Array, " n"]


class _Work(NamedTuple):
    """The tiles of one call. Lengths are rounded up to whole tiles, of which the mask hides the rest."""

    operands: Operands
    mask: BlockMask
    spec: AttentionSpec
    widen: bool
    tq: int
    visits: Visits
    order: Int[Array, " rounds*lanes"]  # rows of tiles, those with the most visits first

    @classmethod
    def of(cls, operands: Operands, mask: BlockMask, spec: AttentionSpec, widen: bool) -> "_Work":
        visits = mask.seen(operands, spec)
        b, tq = operands.q.shape[:2]
        num_q, num_kv = mask.num_axis_tiles
        queries, keys = num_q * mask.block_q, num_kv * mask.block_kv
        padded: Any = {"q": _lengthened(operands.q, {1: queries})}
        padded |= {name: _lengthened(getattr(operands, name), {1: keys}) for name in ("k", "v")}
        if operands.bias is not None:
            sizes = {axis: n for axis, n in ((2, queries), (3, keys)) if operands.bias.shape[axis] > 1}
            padded["bias"] = _lengthened(operands.bias, sizes)
        work = cls(operands._replace(**padded), mask, spec, widen, tq, visits, jnp.zeros(0, jnp.int32))
        full, count = (jnp.broadcast_to(x, (b, work.heads, num_q)).reshape(-1) for x in visits[2:])
        order = jnp.argsort(-(count * (num_kv + 1) + full), stable=True).astype(jnp.int32)
        missing = -len(order) % work.lanes
        return work._replace(order=jnp.pad(order, (0, missing), constant_values=len(order)))

    @property
    def num_q(self) -> int:
        return self.mask.num_axis_tiles[0]

    @property
    def each(self) -> int:
        """Query heads that share a lane: those of a group, if the mask is the same for all heads."""
        return self.operands.group_size if self.visits.indices.shape[1] == 1 else 1

    @property
    def heads(self) -> int:
        return self.operands.q.shape[2] // self.each

    @property
    def num_rows(self) -> int:
        return self.operands.q.shape[0] * self.heads * self.num_q

    @property
    def lanes(self) -> int:
        scores = self.each * self.mask.block_q * self.mask.block_kv
        return max(1, min(_MOST_LANES, self.num_rows, SCORE_TILE_BYTES // (4 * scores)))

    @property
    def num_rounds(self) -> int:
        return self.order.shape[0] // self.lanes

    def round(self, r) -> _Round:
        row = lax.dynamic_slice_in_dim(self.order, r * self.lanes, self.lanes)
        place = jnp.minimum(row, self.num_rows - 1)
        place, i = jnp.divmod(place, self.num_q)
        batch, head = jnp.divmod(place, self.heads)
        index = tuple(at if n > 1 else 0 for at, n in zip((batch, head), self.visits.indices.shape, strict=False))
        visits = Visits(*(x[*index, i] for x in self.visits))
        idle = row == self.num_rows
        full, count = (jnp.where(idle, 0, x) for x in (visits.num_whole, visits.num_visited))
        return _Round(row, batch, head * self.each, i, visits._replace(num_whole=full, num_visited=count))

    def all_rows(self, d: int, dtype: Any) -> Float[Array, "rows+1 each*bq d"]:
        """Zeros for each tile of queries, and one tile for lanes without one."""
        shape = self.num_rows + 1, self.each * self.mask.block_q, d
        return float32(self.operands.q, shape).astype(dtype)

    def unfolded(self, x: Float[Array, "rows+1 each*bq d"]) -> Float[Array, "b tq hq d"]:
        b, _, hq, _ = self.operands.q.shape
        d, block = x.shape[2], self.mask.block_q
        x = x[:-1].reshape(b, self.heads, self.num_q, self.each, block, d)
        return x.transpose(0, 2, 4, 1, 3, 5).reshape(b, self.num_q * block, hq, d)[:, : self.tq]

    def queries(self, x: Float[Array, "b queries hq d"], lanes: _Round) -> Float[Array, "n each*bq d"]:
        return self._tiles(x, lanes.batch, lanes.i * self.mask.block_q, lanes.head, self.mask.block_q, self.each)

    def _tiles(self, x: Array, batch, start, head, size: int, heads: int) -> Array:
        def one(*at):
            block = lax.dynamic_slice(x, _index(*at, 0), (1, size, heads, x.shape[3]))[0]
            return block.swapaxes(0, 1).reshape(size * heads, -1)

        tiles = jnp.stack([one(*at) for at in zip(batch, start, head, strict=True)])
        return tiles.astype(jnp.float32) if self.widen else tiles

    def split(self, x: Float[Array, "n each*bq bk"]) -> Float[Array, "n each bq bk"]:
        return x.reshape(x.shape[0], self.each, self.mask.block_q, -1)

    def tile(self, lanes: _Round, n, q_block: Float[Array, "n rows d"], scale: float, *, masked: bool) -> _ScoreTile:
        """The scores of each lane's n-th visit."""
        operands, spec, block = self.operands, self.spec, self.mask.block_kv
        turn = jnp.clip(n, 0, jnp.maximum(lanes.visits.num_visited - 1, 0))[:, None]
        j, kind = (jnp.take_along_axis(x, turn, 1)[:, 0] for x in lanes.visits[:2])
        kv_head = lanes.head // operands.group_size
        k_block, v_block = (self._tiles(x, lanes.batch, j * block, kv_head, block, 1) for x in (operands.k, operands.v))
        scores = dot("nrd,nkd->nrk", q_block, k_block)
        scores = scores if scale == 1.0 else scale * scores
        if operands.bias is not None:
            scores = scores + self._bias_tile(operands.bias, lanes, j)
        if operands.alibi_slopes is not None:
            scores = scores - self.per_head(operands.alibi_slopes, lanes)[..., None] * self.distance(lanes, j)
        if spec.softcap is not None:
            scores = spec.softcap * jnp.tanh(scores / spec.softcap)
        if not masked:
            return _ScoreTile(scores, None, k_block, v_block, j, kv_head)
        visible = self.mask.tiles[kind] & (n < lanes.visits.num_visited)[:, None, None]
        # queries past the last one see what it sees, so that keys that no query sees are known
        row = jnp.minimum(lanes.i[:, None] * self.mask.block_q + jnp.arange(self.mask.block_q), self.tq - 1)[..., None]
        key = (j[:, None] * block + jnp.arange(block))[:, None]
        if spec.causal:
            visible &= key <= row + self._offset(lanes)
        for length, at in ((operands.q_len, row), (operands.kv_len, key)):
            if length is not None:
                visible &= at < length[lanes.batch][:, None, None]
        if operands.q_segments is not None and operands.kv_segments is not None:
            text = lanes.batch[:, None, None]
            visible &= operands.q_segments[text, row] == operands.kv_segments[text, jnp.minimum(key, self.mask.tk - 1)]
        seen = visible.any(1)[..., None]
        visible = jnp.broadcast_to(visible[:, None], self.split(scores).shape).reshape(scores.shape)
        k_block, v_block = (jnp.where(seen, x, 0) for x in (k_block, v_block))
        return _ScoreTile(jnp.where(visible, scores, -jnp.inf), visible, k_block, v_block, j, kv_head)

    def _offset(self, lanes: _Round) -> Any:
        return 0 if self.operands.q_offset is None else self.operands.q_offset[lanes.batch][:, None, None]

    def distance(self, lanes: _Round, j) -> Float[Array, "n each*bq bk"]:
        """The distances between the keys and queries of a tile."""
        row = lanes.i[:, None] * self.mask.block_q + jnp.tile(jnp.arange(self.mask.block_q), self.each)
        key = j[:, None] * self.mask.block_kv + jnp.arange(self.mask.block_kv)
        return jnp.abs(row[:, :, None] + self._offset(lanes) - key[:, None]).astype(jnp.float32)

    def slope_index(self, lanes: _Round) -> tuple[Array, Array]:
        head = lanes.head[:, None] + jnp.arange(self.each)
        one = self.operands.alibi_slopes is not None and self.operands.alibi_slopes.shape[0] == 1
        return jnp.zeros_like(head) if one else jnp.broadcast_to(lanes.batch[:, None], head.shape), head

    def per_head(self, x: Float[Array, "#b hq"], lanes: _Round) -> Float[Array, "n each*bq"]:
        """A number per query head, for each row of a tile."""
        head = lanes.head[:, None] + jnp.arange(self.each)
        row = lanes.batch[:, None] if x.shape[0] > 1 else 0
        return jnp.repeat(x.astype(jnp.float32)[row, head], self.mask.block_q, axis=1)

    def _bias_at(self, x: Array, batch, head, i, j) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """(start, size) of a tile of a bias; axes of size 1 stay."""
        sizes = 1, self.each, self.mask.block_q, self.mask.block_kv
        starts = batch, head, i * sizes[2], j * sizes[3]
        at = _index(*(start if n > 1 else 0 for start, n in zip(starts, x.shape, strict=True)))
        return at, tuple(size if n > 1 else 1 for size, n in zip(sizes, x.shape, strict=True))

    def _bias_tile(self, bias: Array, lanes: _Round, j) -> Float[Array, "n each*bq bk"]:
        places = zip(lanes.batch, lanes.head, lanes.i, j, strict=True)
        tiles = [lax.dynamic_slice(bias, *self._bias_at(bias, *place))[0] for place in places]
        whole = self.each, self.mask.block_q, self.mask.block_kv
        blocks = jnp.stack([jnp.broadcast_to(tile, whole) for tile in tiles]).astype(jnp.float32)
        return blocks.reshape(len(tiles), -1, self.mask.block_kv)

    def add_bias_tile(self, d_bias: Array, ds: Float[Array, "n each*bq bk"], lanes: _Round, j) -> Array:
        """Adds tiles of score gradients, summed over the axes along which the bias was broadcast."""
        tiles = self.split(ds)

        def one(n, d_bias):
            at, size = self._bias_at(d_bias, *(x[n] for x in (lanes.batch, lanes.head, lanes.i, j)))
            tile = lax.dynamic_slice_in_dim(tiles, n, 1)
            tile = tile.sum([axis for axis in range(4) if size[axis] == 1], keepdims=True)
            return lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, at, size) + tile, at)

        return lax.fori_loop(0, len(tiles), one, d_bias)


def _lengthened(x: Array, sizes: dict[int, int], value: float = 0.0) -> Array:
    """x with these sizes of axes."""
    more = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return x if not any(n for _, n in more) else jnp.pad(x, more, constant_values=jnp.asarray(value, x.dtype))


def _index(*at: Any) -> tuple[Array, ...]:
    """Indices of one type, as slices need, even if JAX's default is int64."""
    return tuple(jnp.asarray(x, jnp.int32) for x in at)


def _put(x: Float[Array, "rows+1 m d"], blocks: Float[Array, "n m d"], rows: Int[Array, " n"]) -> Array:
    for block, row in zip(blocks, rows, strict=True):
        x = lax.dynamic_update_slice(x, block[None], _index(row, 0, 0))
    return x


def _add(x: Float[Array, "b hkv d keys"], blocks: Float[Array, "n d bk"], lanes: _Round, tile: _ScoreTile) -> Array:
    """Adds a block of columns for each lane, one after another: several lanes may visit one tile.

    A loop, since XLA on a CPU would copy the whole array for each of a chain of updates.
    """

    def one(n, x):
        block = lax.dynamic_slice_in_dim(blocks, n, 1)[None]
        at = _index(lanes.batch[n], tile.kv_head[n], 0, tile.j[n] * blocks.shape[2])
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, at, block.shape) + block, at)

    return lax.fori_loop(0, len(blocks), one, x)
