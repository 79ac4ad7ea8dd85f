"""Blockwise attention in plain XLA, for any platform: the memory of both passes is linear in the sequence length.

Scores are computed for one tile of queries and one tile of keys at a time, and combined with a running maximum and sum
(online softmax). The backward pass recomputes the weights from the log-sum-exp. Tiles that no row of the batch can see
are skipped. If the tile size does not divide a length, the last tile starts earlier and its repeated rows are masked:
nothing is padded or copied.

Forward and backward pass are in one file because they visit the same tiles, sliced and masked in the same way.

Source: arXiv:2307.08691, algorithms 1 and 2. Tested in tests/jfa/test_attention.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jfa import dropout
from jfa.kernels.common import row_terms
from jfa.types import AttentionSpec, BlockConfig, DeviceInfo, Operands

# A tile of scores should stay in the cores' caches (measured: bench/LOG.md).
SCORE_TILE_BYTES = 4 << 20

# For fewer queries than this, a mask costs less than a second loop over keys, and on a CPU the time goes to the keys. A
# tile then has up to so many of them, of so many bytes in float32, for one head and for all (bench/LOG.md).
_FEW_QUERIES = 16
_MOST_KEYS, _KEY_BYTES_OF_HEAD, _KEY_BYTES = 512, 128 << 10, 2 << 20

_SYMBOLIC_BLOCK = 128  # tile size where a batch size or length is symbolic (jax.export)


def default_config(operands: Operands, device: DeviceInfo) -> BlockConfig:
    """Tiles of 256 x 256, or narrower for large batches and many heads; few queries on a CPU: by the size of keys."""
    b, tq, hq, _ = operands.q.shape
    on_cpu = device.platform == "cpu"
    in_bfloat16 = device.multiplies_bfloat16 and all(x.dtype == jnp.bfloat16 for x in operands[:3])
    widen = on_cpu and not (in_bfloat16 and _has_few_keys(operands))
    if not all(isinstance(n, int) for n in (b, tq, operands.k.shape[1])):
        return BlockConfig(block_q=_SYMBOLIC_BLOCK, block_kv=_SYMBOLIC_BLOCK, widen=widen)
    if on_cpu and tq < _FEW_QUERIES:
        hkv, d = operands.k.shape[2:]
        keys = min(_MOST_KEYS, min(_KEY_BYTES_OF_HEAD, _KEY_BYTES // max(b * hkv, 1)) // (4 * max(d, 1)))
        block_kv = 1 << (max(32, keys).bit_length() - 1)  # a power of two
        elementwise = tq == 1 and hkv > 1 and d <= 64 and all(x.dtype == jnp.float32 for x in operands[:3])
        return BlockConfig(block_q=max(1, tq), block_kv=block_kv, widen=widen, elementwise=elementwise)
    # on a CPU, the query heads of a group are rows of one product, which is then large enough
    block_q = max(1, min(tq, 128 if on_cpu and operands.group_size > 1 else 256))
    is_wide = 256 * 4 * b * hq * block_q <= SCORE_TILE_BYTES and not (on_cpu and block_q < 256)
    return BlockConfig(block_q=block_q, block_kv=256 if is_wide else 128, widen=widen)


def _has_few_keys(operands: Operands) -> bool:
    """Whether a copy of all keys costs little: a cache may have many more slots than there are queries."""
    tq, tk = operands.q.shape[1], operands.k.shape[1]
    return isinstance(tq, int) and isinstance(tk, int) and tk <= 8 * tq


def why_not(operands: Operands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """None: every call is supported."""
    return None


def flash_attention(
    operands: Operands, *, spec: AttentionSpec, config: BlockConfig
) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """Attention and the natural log-sum-exp, as reference.attention defines them.

    Not differentiable by itself: ops.dot_product_attention pairs it with flash_attention_bwd.
    """
    q = operands.q
    b, tq, hq, _ = q.shape
    if (padded := _padded(operands, config)) is not operands:
        out, lse = flash_attention(padded, spec=spec, config=config)
        return out[:, :tq], lse[:, :tq]
    hkv, g, d = operands.k.shape[2], operands.group_size, operands.v.shape[3]
    grid = _Grid.of(operands, config)
    operands = _with_heads_first(operands, config)
    queries = _heads_first(q, hkv)

    def q_tile(i, done):
        start = grid.q_start(i)
        q_block, scale = _slice(queries, start, grid.block_q, axis=3), spec.sm_scale
        if config.widen:  # scale the float32 queries once instead of all scores
            q_block, scale = q_block.astype(jnp.float32) * scale, 1.0

        def kv_tile(j, carry, *, masked: bool):
            acc, m, l = carry
            tile = _score_tile(operands, spec, config, grid, q_block, scale, start, j, masked=masked)
            kept = _kept(operands, spec, grid, start, grid.k_start(j))
            m_next = jnp.maximum(m, tile.scores.max(-1))
            m_safe = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # (-inf) - (-inf) would be NaN
            p = jnp.exp(tile.scores - m_safe[..., None])
            rescale = jnp.exp(m - m_safe)
            l = l * rescale + p.sum(-1)
            p = p if kept is None else jnp.where(kept, p, 0.0)
            return acc * rescale[..., None] + _times_values(p, tile, config), m_next, l

        rows = (b, hkv, g, grid.block_q)
        carry = (float32(q, (*rows, d)), float32(q, rows, -jnp.inf), float32(q, rows))
        acc, m, l = _over_keys(operands, spec, grid, start, kv_tile, carry)
        empty = l == 0.0
        l = jnp.where(empty, 1.0, l)
        lse_block = _rows_first(jnp.where(empty, -jnp.inf, m + jnp.log(l)))
        if operands.sinks is not None:
            # if the sink is far above m this is inf, and acc / inf is 0, as it should be
            l = l + jnp.exp(_per_head(operands.sinks, hkv)[..., 0] - jnp.where(empty, 0.0, m))
        out_block = _rows_first(acc / (l * (1.0 - spec.dropout_rate))[..., None]).astype(q.dtype)
        if done is None:
            return out_block, lse_block
        out, lse = done
        return _put_rows(out, out_block, start), _put_rows(lse, lse_block, start)

    if q.size == 0 or grid.num_kv == 0:
        return jnp.zeros((b, tq, hq, d), q.dtype), float32(q, (b, tq, hq), -jnp.inf)
    if grid.num_q == 1:
        return q_tile(0, None)
    if grid.num_q == 2:  # typical of prompt chunks; unrolled, since the copies that a loop makes cost more
        pairs = zip(q_tile(0, None), q_tile(1, None), strict=True)
        out, lse = (jnp.concatenate([x, y[:, grid.block_q - tq :]], axis=1) for x, y in pairs)
        return out, lse
    done = (float32(q, (b, tq, hq, d)).astype(q.dtype), float32(q, (b, tq, hq)))
    return lax.fori_loop(0, grid.num_q, q_tile, done)


def flash_attention_bwd(
    operands: Operands,
    out: Float[Array, "b tq hq d"],
    lse: Float[Array, "b tq hq"],
    d_out: Float[Array, "b tq hq d"],
    d_lse: Float[Array, "b tq hq"],
    *,
    spec: AttentionSpec,
    config: BlockConfig,
) -> Operands:
    """The cotangents of q, k, v, bias, sinks and slopes, recomputed tile by tile; None for operands without one.

    The gradient of a broadcast bias is summed into an array of the bias's own shape.
    """
    q, k, v, bias = operands.q, operands.k, operands.v, operands.bias
    if (padded := _padded(operands, config)) is not operands:
        rows = {1: padded.q.shape[1]}
        out, d_out, d_lse = (_lengthened(x, rows) for x in (out, d_out, d_lse))
        lse = _lengthened(lse, rows, -jnp.inf)
        found = flash_attention_bwd(padded, out, lse, d_out, d_lse, spec=spec, config=config)
        given = {name: x for name, x in found._asdict().items() if x is not None}
        return found._replace(
            **{name: x[tuple(map(slice, getattr(operands, name).shape))] for name, x in given.items()}
        )
    hkv = k.shape[2]
    grid = _Grid.of(operands, config)
    d_out, lse, delta, d_sinks = row_terms(operands, out, lse, d_out, d_lse)
    safe_q = jnp.where(jnp.isposinf(lse)[..., None], 0, q)
    operands = _with_heads_first(operands, config)
    queries, d_outs, lses, deltas = (_heads_first(x, hkv) for x in (safe_q, d_out, lse, delta))

    def q_tile(i, grads):
        start = grid.q_start(i)
        q_block, do_block, lse_block, delta_block = (
            _slice(x, start, grid.block_q, axis=3) for x in (queries, d_outs, lses, deltas)
        )
        # mask the rows that the last tile shares with the one before it: exp(score - inf) = 0
        lse_block = jnp.where(start + jnp.arange(grid.block_q) >= i * grid.block_q, lse_block, jnp.inf)[..., None]
        delta_block = delta_block[..., None]
        if config.widen:
            q_block, do_block = (x.astype(jnp.float32) for x in (q_block, do_block))
        # XLA on a CPU has no fast product that sums over the rows of its left side, so it gets a transposed copy
        columns = (_merge_groups(x).swapaxes(2, 3) for x in (q_block, do_block))
        q_columns, do_columns = lax.optimization_barrier(tuple(columns))

        def kv_tile(j, carry, *, masked: bool):
            dq_block, dk, dv, d_bias, d_slopes = carry
            tile = _score_tile(operands, spec, config, grid, q_block, spec.sm_scale, start, j, masked=masked)
            k_block, v_block = tile.seen_only(tile.k_block), tile.seen_only(tile.v_block)
            p = jnp.exp(tile.scores - lse_block)
            dp = _rows_dot("bhrd,bhkd->bhrk", do_block, v_block)
            kept = _kept(operands, spec, grid, start, grid.k_start(j))
            if kept is not None:
                dp = jnp.where(kept, dp / (1.0 - spec.dropout_rate), 0.0)
            ds = p * (dp - delta_block)
            if kept is not None:
                p = jnp.where(kept, p / (1.0 - spec.dropout_rate), 0.0)
            if spec.softcap is not None:
                slope = 1.0 - jnp.square(tile.scores / spec.softcap)
                ds = ds * (slope if tile.visible is None else jnp.where(tile.visible, slope, 0.0))
            if d_bias is not None:
                d_bias = _add_bias_tile(d_bias, ds, start, grid.k_start(j))
            if d_slopes is not None:
                change = (ds * _distance(operands, grid, start, grid.k_start(j))).sum((3, 4)).reshape(q.shape[0], -1)
                d_slopes = d_slopes - (change.sum(0, keepdims=True) if d_slopes.shape[0] == 1 else change)
            ds = (ds * spec.sm_scale).astype(k_block.dtype)
            dv = _add(dv, dot("bhdr,bhrk->bhdk", do_columns, _merge_groups(p.astype(v_block.dtype))), grid.k_start(j))
            dk = _add(dk, dot("bhdr,bhrk->bhdk", q_columns, _merge_groups(ds)), grid.k_start(j))
            dq_block = dq_block + _rows_dot("bhrk,bhkd->bhrd", ds, k_block)
            return dq_block, dk, dv, d_bias, d_slopes

        dq, *rest = grads
        carry = (float32(q, q_block.shape), *rest)
        dq_block, *rest = _over_keys(operands, spec, grid, start, kv_tile, carry)
        return _put_rows(dq, _rows(dq, start, grid.block_q) + _rows_first(dq_block), start), *rest

    slopes = operands.alibi_slopes
    d_bias, d_slopes = (None if x is None else float32(q, x.shape) for x in (bias, slopes))
    dk, dv = (float32(q, (x.shape[0], hkv, x.shape[3], x.shape[1])) for x in (k, v))
    grads = (float32(q, q.shape), dk, dv, d_bias, d_slopes)
    if q.size and grid.num_kv:
        grads = _loop(0, grid.num_q, q_tile, grads)
    dq, dk, dv, d_bias, d_slopes = grads
    dk, dv = (jnp.moveaxis(x, 3, 1) for x in (dk, dv))
    return Operands(
        q=dq.astype(q.dtype),
        k=dk.astype(k.dtype),
        v=dv.astype(v.dtype),
        bias=None if bias is None or d_bias is None else d_bias.astype(bias.dtype),
        sinks=d_sinks,
        alibi_slopes=None if slopes is None or d_slopes is None else d_slopes.astype(slopes.dtype),
    )


def _padded(operands: Operands, config: BlockConfig) -> Operands:
    """The operands, with symbolic lengths rounded up to whole tiles: a tile must have a static shape."""
    (b, tq), tk = operands.q.shape[:2], operands.k.shape[1]
    queries, keys = _whole_tiles(tq, config.block_q), _whole_tiles(tk, config.block_kv)
    if queries is tq and keys is tk:
        return operands
    q_len, kv_len = (
        jnp.full((b,), t, jnp.int32) if given is None else jnp.minimum(given, t)
        for given, t in ((operands.q_len, tq), (operands.kv_len, tk))
    )
    of_q, of_k, of_scores = {1: queries}, {1: keys}, {2: queries, 3: keys}
    axes = {
        "q": of_q,
        "q_segments": of_q,
        "k": of_k,
        "v": of_k,
        "kv_segments": of_k,
        "bias": of_scores,
        "mask": of_scores,
    }
    given = {name: x for name in axes if (x := getattr(operands, name)) is not None}
    longer: dict[str, Any] = {name: _lengthened(x, axes[name]) for name, x in given.items()}
    return operands._replace(q_len=q_len, kv_len=kv_len, **longer)


def _whole_tiles(length: Any, block: int) -> Any:
    if isinstance(length, int) or length % block == 0:
        return length
    return (length + block - 1) // block * block


def _lengthened(x: Array, sizes: dict[int, Any], value: float = 0.0) -> Array:
    """x with these sizes of axes; an axis of size 1 is broadcast, and stays."""
    more = [(0, 0 if x.shape[axis] == 1 else sizes.get(axis, size) - size) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, more, constant_values=jnp.asarray(value, x.dtype))


class _Grid(NamedTuple):
    """The tiles of one call. The last tile of an axis starts early enough to end exactly at the axis's end."""

    tq: int
    tk: int
    block_q: int
    block_kv: int

    @classmethod
    def of(cls, operands: Operands, config: BlockConfig) -> "_Grid":
        tq, tk = operands.q.shape[1], operands.k.shape[1]
        tiles = zip((config.block_q, config.block_kv), (tq, tk), strict=True)
        return cls(tq, tk, *(min(block, length) if isinstance(length, int) else block for block, length in tiles))

    @property
    def num_q(self) -> int:
        return -(-self.tq // self.block_q) if self.tq else 0

    @property
    def num_kv(self) -> int:
        return -(-self.tk // self.block_kv) if self.tk else 0

    def q_start(self, i):
        return _least(i * self.block_q, self.tq - self.block_q)

    def k_start(self, j):
        return _least(j * self.block_kv, self.tk - self.block_kv)

    def kv_tiles(self, operands: Operands, spec: AttentionSpec, q_start):
        """(first, inside, outside, end): any row of the query tile may see keys of the tiles [first, end), and every
        row sees all keys of [inside, outside)."""
        last = q_start + self.block_q - 1
        lowest, highest = q_start, last  # positions
        if operands.q_offset is not None:
            lowest, highest = q_start + operands.q_offset.min(), last + operands.q_offset.max()
        first, inside, outside, end = 0, 0, self.tk, self.tk
        if by_tree := hasattr(operands.mask, "visible"):
            first, inside, outside = operands.mask.keys  # type: ignore[union-attr]
        if spec.left is not None:
            first, inside = _most(0, lowest - spec.left), _most(0, highest - spec.left)
        if spec.right is not None:
            outside, end = _least(outside, lowest + spec.right + 1), _least(end, highest + spec.right + 1)
        if operands.kv_len is not None:
            outside, end = _least(outside, operands.kv_len.min()), _least(end, operands.kv_len.max())
        if operands.q_len is not None:
            outside = jnp.where(last < operands.q_len.min(), outside, 0)
            end = jnp.where(q_start < operands.q_len.max(), end, 0)
        if operands.q_segments is not None and operands.kv_segments is not None:
            ids = _rows(operands.q_segments, q_start, self.block_q)
            low, high = ids.min(1, keepdims=True), ids.max(1, keepdims=True)
            meets = ((operands.kv_segments >= low) & (operands.kv_segments <= high)).any(0)
            first = jnp.maximum(first, jnp.where(meets.any(), meets.argmax(), self.tk))
            end = jnp.minimum(end, self.tk - meets[::-1].argmax())
        first, end = first // self.block_kv, -(-end // self.block_kv)
        by_data = operands.q_segments is not None or (operands.mask is not None and not by_tree)
        if by_data or self.block_q < _FEW_QUERIES:
            return first, end, end, end
        inside = first if spec.left is None and not by_tree else _least(_most(-(-inside // self.block_kv), first), end)
        return first, inside, _least(_most(outside // self.block_kv, inside), end), end


def _over_keys(operands: Operands, spec: AttentionSpec, grid: _Grid, q_start, kv_tile, carry):
    """kv_tile over the key tiles that a query tile sees, without a mask where every row sees all keys."""
    first, inside, outside, end = grid.kv_tiles(operands, spec, q_start)
    carry = _loop(first, inside, functools.partial(kv_tile, masked=True), carry)
    carry = _loop(inside, outside, functools.partial(kv_tile, masked=False), carry)
    return _loop(outside, end, functools.partial(kv_tile, masked=True), carry)


class _ScoreTile(NamedTuple):
    scores: Float[Array, "b hkv g bq bk"]  # soft-capped; -inf where masked
    visible: Bool[Array, "#b #hkv #g bq bk"] | None  # None: all
    k_block: Float[Array, "b hkv bk d"]  # [b, bk, hkv, d] if elementwise
    v_block: Float[Array, "b hkv bk d"]

    @property
    def seen(self) -> Bool[Array, "#b #hkv bk"]:
        """The keys that any query of the tile sees; the others may contain anything, even NaN."""
        assert self.visible is not None
        return self.visible.any(axis=(2, 3))

    def seen_only(self, x: Float[Array, "b hkv bk d"]) -> Float[Array, "b hkv bk d"]:
        """The keys or values, 0 instead of those that no query sees: 0 * NaN is NaN."""
        return x if self.visible is None else jnp.where(self.seen[..., None], x, 0)


def _visible(operands: Operands, spec: AttentionSpec, grid: _Grid, q_start, j) -> Bool[Array, "#b #hkv #g bq bk"]:
    """The mask of a tile of scores."""
    k_start = grid.k_start(j)
    row = q_start + jnp.arange(grid.block_q)[:, None]
    key = k_start + jnp.arange(grid.block_kv)
    position = _position(operands, grid, q_start)
    # mask the keys that the last tile shares with the one before it
    visible = jnp.broadcast_to(key >= j * grid.block_kv, (1, 1, 1, grid.block_q, grid.block_kv))
    if spec.left is not None:
        visible &= key >= position - spec.left
    if spec.right is not None:
        visible &= key <= position + spec.right
    if operands.q_len is not None:
        visible &= row < _per_row(operands.q_len)
    if operands.kv_len is not None:
        visible &= key < _per_row(operands.kv_len)
    if hasattr(operands.mask, "visible"):  # paged.TreeMask
        visible &= operands.mask.visible(key)  # type: ignore[union-attr]
    elif operands.mask is not None:
        visible &= _bias_tile(operands.mask, grid, q_start, k_start, operands.group_size)
    if operands.q_segments is not None and operands.kv_segments is not None:
        q_ids = _rows(operands.q_segments, q_start, grid.block_q)[:, None, None, :, None]
        visible &= q_ids == _rows(operands.kv_segments, k_start, grid.block_kv)[:, None, None, None, :]
    return visible


def _score_tile(
    operands: Operands,
    spec: AttentionSpec,
    config: BlockConfig,
    grid: _Grid,
    q_block: Float[Array, "b hkv g bq d"],
    scale: float,
    q_start,
    j,
    *,
    masked: bool,
) -> _ScoreTile:
    k_start = grid.k_start(j)
    read = _rows if config.elementwise else _kv_tile
    k_block, v_block = (read(x, k_start, grid.block_kv) for x in (operands.k, operands.v))
    if config.widen:
        q_block, k_block, v_block = (x.astype(jnp.float32) for x in (q_block, k_block, v_block))
    if config.elementwise:
        scores = _elementwise_scores(q_block, k_block)
    else:
        scores = _rows_dot("bhrd,bhkd->bhrk", q_block, k_block)
    scores = scores if scale == 1.0 else scale * scores
    if operands.bias is not None:
        bias = _bias_tile(operands.bias, grid, q_start, k_start, operands.group_size)
        scores = scores + bias.astype(jnp.float32)
    if operands.alibi_slopes is not None:
        slopes = _per_head(operands.alibi_slopes, operands.k.shape[2])
        scores = scores - slopes * _distance(operands, grid, q_start, k_start)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    if not masked:
        return _ScoreTile(scores, None, k_block, v_block)
    visible = _visible(operands, spec, grid, q_start, j)
    return _ScoreTile(jnp.where(visible, scores, -jnp.inf), visible, k_block, v_block)


def _position(operands: Operands, grid: _Grid, q_start) -> Int[Array, "#b 1 1 bq 1"]:
    """The positions of a tile's queries among the keys."""
    row = q_start + jnp.arange(grid.block_q)[:, None]
    return row if operands.q_offset is None else row + _per_row(operands.q_offset)


def _distance(operands: Operands, grid: _Grid, q_start, k_start) -> Float[Array, "#b 1 1 bq bk"]:
    """The distances between the keys and queries of a tile."""
    key = k_start + jnp.arange(grid.block_kv)
    return jnp.abs(_position(operands, grid, q_start) - key).astype(jnp.float32)


def _kept(
    operands: Operands, spec: AttentionSpec, grid: _Grid, q_start, k_start
) -> Bool[Array, "b hkv g bq bk"] | None:
    """The mask of a tile's weights that dropout keeps; None: all."""
    if operands.dropout_seed is None:
        return None
    b, hq, hkv = operands.q.shape[0], operands.q.shape[2], operands.k.shape[2]
    batch, head = jnp.arange(b).reshape(b, 1, 1, 1, 1), jnp.arange(hq).reshape(hkv, -1, 1, 1)
    row = q_start + jnp.arange(grid.block_q)[:, None]
    key = k_start + jnp.arange(grid.block_kv)
    seed = dropout.row_seed(operands.dropout_seed, batch, head, broadcast=spec.broadcast_dropout)
    return dropout.keep(seed, row, key, rate=spec.dropout_rate)


def _times_values(p: Float[Array, "b hkv g bq bk"], tile: _ScoreTile, config: BlockConfig) -> Array:
    """p v of one tile."""
    p, v_block = p.astype(tile.v_block.dtype), tile.v_block
    if not config.elementwise:
        return _rows_dot("bhrk,bhkd->bhrd", p, tile.seen_only(v_block))
    # without the barrier, the weights would be computed again for each of the head_dim columns
    weights = jnp.moveaxis(_merge_groups(lax.optimization_barrier(p)), 3, 1)[..., None]

    def product(v_block):
        return _sum_of_products(weights, v_block[:, :, :, None], axis=1).reshape(*p.shape[:4], -1)

    if tile.visible is None:
        return product(v_block)
    # the replacement makes a copy, which for few queries costs as much as the product: do it only if needed
    return lax.cond(
        tile.seen.all(),
        lambda: product(v_block),
        lambda: product(tile.seen_only(v_block.swapaxes(1, 2)).swapaxes(1, 2)),
    )


def _elementwise_scores(
    q_block: Float[Array, "b hkv g bq d"], k_block: Float[Array, "b bk hkv d"]
) -> Float[Array, "b hkv g bq bk"]:
    """The scores as sums of elementwise products: keys are read in their order, and not copied."""
    # the barrier keeps XLA from computing the sums in the order of the transposed result
    scores = lax.optimization_barrier(
        _sum_of_products(_merge_groups(q_block)[:, None], k_block[:, :, :, None], axis=-1)
    )
    return jnp.moveaxis(scores, 1, 3).reshape(*q_block.shape[:4], -1)


def _sum_of_products(a: Array, b: Array, *, axis: int) -> Array:
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=axis)


class _HeadsFirst(NamedTuple):
    """A copy of all keys or values with heads before tokens."""

    array: Float[Array, "b hkv tk d"]

    @classmethod
    def of(cls, x: Float[Array, "b tk hkv d"]) -> Any:
        return cls(lax.optimization_barrier(x.swapaxes(1, 2)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, hkv, tk, d = self.array.shape
        return b, tk, hkv, d


def _with_heads_first(operands: Operands, config: BlockConfig) -> Operands:
    """Copies k and v once, if they are not widened: XLA on a CPU multiplies a tile that was transposed within the loop
    in float32."""
    if config.widen or config.elementwise or hasattr(operands.k, "rows") or not _has_few_keys(operands):
        return operands
    return operands._replace(k=_HeadsFirst.of(operands.k), v=_HeadsFirst.of(operands.v))


def _kv_tile(x: Any, start, size: int) -> Float[Array, "b hkv size d"]:
    return _slice(x.array, start, size, axis=2) if isinstance(x, _HeadsFirst) else _rows(x, start, size).swapaxes(1, 2)


def dot(equation: str, a: Array, b: Array) -> Array:
    """A matrix product with float32 sums; float32 inputs are not rounded to tf32."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _rows_dot(
    equation: str, a: Float[Array, "b hkv g bq m"], b: Float[Array, "b hkv _ _"]
) -> Float[Array, "b hkv g bq n"]:
    """dot of all rows of a key head: XLA on a CPU would make a transposed copy of b for a product with more axes."""
    return dot(equation, _merge_groups(a), b).reshape(*a.shape[:4], -1)


def _merge_groups(x: Float[Array, "b hkv g bq n"]) -> Float[Array, "b hkv rows n"]:
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _loop(first, end, body, carry):
    """fori_loop, or nothing or only the body if that is known."""
    if first is end:
        return carry
    if isinstance(first, int) and isinstance(end, int) and end - first <= 1:
        return body(first, carry) if end > first else carry
    return lax.fori_loop(first, end, body, carry)


def float32(like: Array, shape: tuple[int, ...], value: float = 0.0) -> Array:
    """float32 even if JAX's default is float64; inside shard_map it varies over the same mesh axes as `like`."""
    axes = jax.typeof(like).manual_axis_type.varying
    full = jnp.full(shape, value, jnp.float32)
    return lax.pcast(full, tuple(axes), to="varying") if axes else full


def _least(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _per_head(x: Float[Array, "*#b hq"], hkv: int) -> Float[Array, "*#b hkv g 1 1"]:
    return x.astype(jnp.float32).reshape(*x.shape[:-1], hkv, -1, 1, 1)


def _per_row(x: Array) -> Array:
    return x[:, None, None, None, None]


def _rows(x: Any, start, size: int) -> Array:
    if hasattr(x, "rows"):  # paged.Rows, which gathers them
        return x.rows(start, size)
    return _slice(x, start, size, axis=1)


def _slice(x: Array, start, size: int, *, axis: int) -> Array:
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _put_rows(x: Array, block: Array, start) -> Array:
    return lax.dynamic_update_slice_in_dim(x, block, start, axis=1)


def _add(x: Float[Array, "b hkv d tk"], block: Float[Array, "b hkv d bk"], start) -> Float[Array, "b hkv d tk"]:
    """Adds a block of columns."""
    return lax.dynamic_update_slice_in_dim(x, _slice(x, start, block.shape[3], axis=3) + block, start, axis=3)


def _heads_first(x: Array, hkv: int) -> Array:
    """[b, t, hq, ...] -> [b, hkv, g, t, ...]"""
    x = x.reshape(*x.shape[:2], hkv, x.shape[2] // hkv, *x.shape[3:])
    return jnp.moveaxis(x, 1, 3)


def _rows_first(x: Array) -> Array:
    """[b, hkv, g, t, ...] -> [b, t, hq, ...]"""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], *x.shape[4:])


def _bias_tile(x: Array, grid: _Grid, q_start, k_start, group_size: int) -> Array:
    """The tile of a bias or mask of any broadcastable shape, as [b, hkv, g, bq, bk]; axes of size 1 stay 1."""
    if x.shape[2] > 1:
        x = lax.dynamic_slice_in_dim(x, q_start, grid.block_q, axis=2)
    if x.shape[3] > 1:
        x = lax.dynamic_slice_in_dim(x, k_start, grid.block_kv, axis=3)
    g = group_size if x.shape[1] > 1 else 1
    return x.reshape(x.shape[0], x.shape[1] // g, g, *x.shape[2:])


def _add_bias_tile(d_bias: Array, ds: Array, q_start, k_start) -> Array:
    """Adds a tile of score gradients, summed over the axes along which the bias was broadcast."""
    tile = ds.reshape(ds.shape[0], -1, *ds.shape[3:])
    tile = tile.sum([axis for axis in range(4) if d_bias.shape[axis] == 1], keepdims=True)
    at = (0, 0, q_start if d_bias.shape[2] > 1 else 0, k_start if d_bias.shape[3] > 1 else 0)
    return lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, at, tile.shape) + tile, at)
