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

# On a CPU, which computes some heads after the others to keep them smaller: of one tile, and of the strips of one.
_TILE_BYTES, _STRIPS_BYTES = 5 << 19, 6 << 20

# For fewer queries than this, a mask costs less than a second loop over keys, and on a CPU the time goes to the keys. A
# tile then has up to so many of them, of so many bytes in float32, for one head and for all (bench/LOG.md).
_FEW_QUERIES = 16
_MOST_KEYS, _KEY_BYTES_OF_HEAD, _KEY_BYTES = 512, 128 << 10, 2 << 20

_SYMBOLIC_BLOCK = 128  # tile size where a batch size or length is symbolic (jax.export)


def default_config(operands: Operands, device: DeviceInfo) -> BlockConfig:
    """Tiles of 256 x 256, or narrower for large batches and many heads.

    On a CPU in strips and of some heads at a time, unless it is several devices, over which heads may be divided; for
    few queries by the size of keys.
    """
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
    if not on_cpu or device.num_devices > 1 or _is_of_all_heads(operands):
        # on a CPU, the query heads of a group are rows of one product, which is then large enough
        block_q = max(1, min(tq, 128 if on_cpu and operands.group_size > 1 else 256))
        is_wide = 256 * 4 * b * hq * block_q <= SCORE_TILE_BYTES and not (on_cpu and block_q < 256)
        return BlockConfig(block_q=block_q, block_kv=256 if is_wide else 128, widen=widen)
    if tq < 256 or operands.q_segments is not None:
        return _undivided(operands, widen)
    is_long = widen and tq >= 4096 and b * hq * 256 * 256 * 4 <= _STRIPS_BYTES
    tile = 512 if is_long else 256
    return BlockConfig(
        block_q=tile,
        block_kv=tile,
        widen=widen,
        strips=2,
        heads=None if is_long else _heads(operands, 256, _STRIPS_BYTES),
    )


def backward_config(operands: Operands, config: BlockConfig, device: DeviceInfo) -> BlockConfig:
    """The tiles of the forward pass, without strips: there are products enough that do not wait for each other."""
    return config if config.strips == 1 else _undivided(operands, config.widen)


def _undivided(operands: Operands, widen: bool) -> BlockConfig:
    """Tiles of some heads for a CPU, without strips."""
    b, tq, hq, _ = operands.q.shape
    tile = 256 if operands.group_size == 1 or (tq >= 1024 and b * hq * 256 * 256 * 4 <= _TILE_BYTES) else 128
    block_q = max(1, min(tq, tile))
    return BlockConfig(block_q=block_q, block_kv=tile, widen=widen, heads=_heads(operands, tile, _TILE_BYTES))


def _is_of_all_heads(operands: Operands) -> bool:
    """Whether the call has options that are not divided into shares."""
    return any(x is not None for x in (operands.bias, operands.mask, operands.alibi_slopes, operands.dropout_seed))


def _heads(operands: Operands, tile: int, most_bytes: int) -> int | None:
    """The key heads of square tiles with so many bytes of scores; None: all of all rows."""
    b, of_head = operands.q.shape[0], tile * tile * 4 * operands.group_size
    return None if b * operands.k.shape[2] * of_head <= most_bytes else max(1, most_bytes // of_head)


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
    q, d = operands.q, operands.v.shape[3]
    b, tq, hq, _ = q.shape
    if (padded := _padded(operands, config)) is not operands:
        out, lse = flash_attention(padded, spec=spec, config=config)
        return out[:, :tq], lse[:, :tq]
    grid = _Grid.of(operands, config)
    if q.size == 0 or grid.num_kv == 0:
        return jnp.zeros((b, tq, hq, d), q.dtype), float32(q, (b, tq, hq), -jnp.inf)
    shares = _Shares.of(operands, config)
    if shares.is_whole and grid.num_q in (1, 2):  # typical of prompt chunks; unrolled: the copies of a loop cost more
        tile = functools.partial(_query_tile, _with_heads_first(operands, config), spec, config, grid)
        tiles = zip(*(tile(grid.q_start(i)) for i in range(grid.num_q)), strict=True)
        out, lse = (x[0] if len(x) == 1 else jnp.concatenate([x[0], x[1][:, grid.block_q - tq :]], 1) for x in tiles)
        return out, lse

    def share(s, done):
        own = _with_heads_first(shares.own(operands, s), config)

        def q_tile(i, done):
            start = grid.q_start(i)
            found = _query_tile(own, spec, config, grid, start)
            return tuple(shares.put(x, block, s, start) for x, block in zip(done, found, strict=True))

        return lax.fori_loop(0, grid.num_q, q_tile, done)

    done = (float32(q, (b, tq, hq, d)).astype(q.dtype), float32(q, (b, tq, hq)))
    return _loop(0, shares.num, share, done)


def _query_tile(
    operands: Operands, spec: AttentionSpec, config: BlockConfig, grid: "_Grid", start
) -> tuple[Float[Array, "b bq hq dv"], Float[Array, "b bq hq"]]:
    """Attention and log-sum-exp of the queries [start, start + block_q)."""
    q, hkv = operands.q, operands.k.shape[2]
    q_block, scale = _heads_first(_rows(q, start, grid.block_q), hkv), spec.sm_scale
    if config.widen:  # scale the float32 queries once instead of all scores
        q_block, scale = q_block.astype(jnp.float32) * scale, 1.0
    n = config.strips if grid.block_q % config.strips == grid.block_kv % config.strips == 0 else 1
    strips = [
        _Strip(block, start + i * block.shape[3], grid._replace(block_q=block.shape[3]))
        for i, block in enumerate(jnp.split(q_block, n, axis=3))
    ]

    def kv_tile(strip: _Strip, j, carry, *, masked: bool, keys: Any = None):
        acc, m, l = carry
        q_block, start, grid = strip
        keys = keys or _keys_and_values(operands, config, grid, j)
        tile = _score_tile(operands, spec, config, grid, q_block, scale, start, j, keys, masked=masked)
        kept = _kept(operands, spec, grid, start, grid.k_start(j))
        m_next = jnp.maximum(m, tile.scores.max(-1))
        m_safe = jnp.where(m_next == -jnp.inf, 0.0, m_next)  # (-inf) - (-inf) would be NaN
        p = jnp.exp(tile.scores - m_safe[..., None])
        rescale = jnp.exp(m - m_safe)
        l = l * rescale + p.sum(-1)
        p = p if kept is None else jnp.where(kept, p, 0.0)
        return acc * rescale[..., None] + _times_values(p, tile, config), m_next, l

    def kv_tile_of_all(j, carries):
        keys = _keys_and_values(operands, config, grid, j)
        if n > 1:  # or XLA would copy them for each strip
            keys = _copied_once(keys)
        return tuple(kv_tile(*own, masked=False, keys=keys) for own in zip(strips, (j,) * n, carries, strict=True))

    _, inside, outside, _ = grid.kv_tiles(operands, spec, start)
    carries = _loop(inside, outside, kv_tile_of_all, tuple(strip.nothing(operands) for strip in strips))
    found = []
    for strip, carry in zip(strips, carries, strict=True):
        # its first and last keys in tiles that are as much narrower
        own = strip._replace(grid=strip.grid._replace(block_kv=grid.block_kv // n))
        first, _, _, end = own.grid.kv_tiles(operands, spec, own.start)
        body = functools.partial(kv_tile, own, masked=True)
        carry = _loop(first, _least(inside * n, end), body, carry)
        found.append(_loop(outside * n, end, body, carry))
    acc, m, l = (jnp.concatenate(x, axis=3) for x in zip(*found, strict=True))
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    lse_block = _rows_first(jnp.where(empty, -jnp.inf, m + jnp.log(l)))
    if operands.sinks is not None:
        # if the sink is far above m this is inf, and acc / inf is 0, as it should be
        l = l + jnp.exp(_per_head(operands.sinks, hkv)[..., 0] - jnp.where(empty, 0.0, m))
    return _rows_first(acc / (l * (1.0 - spec.dropout_rate))[..., None]).astype(q.dtype), lse_block


def _copied_once(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays, as matrices behind a barrier: other axes XLA would copy in their old order first."""
    matrices = lax.optimization_barrier(tuple(x.reshape(-1, x.shape[-1]) for x in arrays))
    return tuple(x.reshape(y.shape) for x, y in zip(matrices, arrays, strict=True))


class _Strip(NamedTuple):
    """Some rows of a tile of queries. On a CPU the products of one strip fill the time in which the other's wait."""

    q_block: Float[Array, "b hkv g rows d"]
    start: Any
    grid: "_Grid"

    def nothing(self, operands: Operands) -> tuple[Array, Array, Array]:
        """The sum, maximum and denominator of no keys."""
        rows, like = self.q_block.shape[:4], self.q_block
        return float32(like, (*rows, operands.v.shape[3])), float32(like, rows, -jnp.inf), float32(like, rows)


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
    grid, shares = _Grid.of(operands, config), _Shares.of(operands, config)
    seen_d_out, lse, delta, d_sinks = row_terms(operands, out, lse, d_out, d_lse)
    if operands.sinks is not None:
        d_out = seen_d_out  # otherwise rows are masked in their tile, without a copy of all

    def share(s, grads):
        own = _with_heads_first(shares.own(operands, s), config)
        hkv = own.k.shape[2]
        terms = [shares.part(x, s) for x in (d_out, lse, delta)]

        def q_tile(i, grads):
            start = grid.q_start(i)
            q_block, do_block, lse_block, delta_block = (
                _heads_first(_rows(x, start, grid.block_q), hkv) for x in (own.q, *terms)
            )
            # mask the rows that the last tile shares with the one before it: exp(score - inf) = 0
            lse_block = jnp.where(start + jnp.arange(grid.block_q) >= i * grid.block_q, lse_block, jnp.inf)[..., None]
            delta_block = delta_block[..., None]
            q_block, do_block = (jnp.where(jnp.isposinf(lse_block), 0, x) for x in (q_block, do_block))
            if config.widen:
                q_block, do_block = (x.astype(jnp.float32) for x in (q_block, do_block))
            # XLA on a CPU has no fast product that sums over the rows of its left side, so it gets a transposed copy
            columns = (_merge_groups(x).swapaxes(2, 3) for x in (q_block, do_block))
            q_columns, do_columns = lax.optimization_barrier(tuple(columns))

            def kv_tile(j, carry, *, masked: bool):
                dq_block, dk, dv, d_bias, d_slopes = carry
                keys = _keys_and_values(own, config, grid, j)
                tile = _score_tile(own, spec, config, grid, q_block, spec.sm_scale, start, j, keys, masked=masked)
                k_block, v_block = tile.seen_only(tile.k_block), tile.seen_only(tile.v_block)
                p = jnp.exp(tile.scores - lse_block)
                dp = _rows_dot("bhrd,bhkd->bhrk", do_block, v_block)
                kept = _kept(own, spec, grid, start, grid.k_start(j))
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
                    change = (ds * _distance(own, grid, start, grid.k_start(j))).sum((3, 4)).reshape(q.shape[0], -1)
                    d_slopes = d_slopes - (change.sum(0, keepdims=True) if d_slopes.shape[0] == 1 else change)
                ds = (ds * spec.sm_scale).astype(k_block.dtype)
                p = _merge_groups(p.astype(v_block.dtype))
                dv = _add(dv, dot("bhdr,bhrk->bhdk", do_columns, p), j)
                dk = _add(dk, dot("bhdr,bhrk->bhdk", q_columns, _merge_groups(ds)), j)
                dq_block = dq_block + _rows_dot("bhrk,bhkd->bhrd", ds, k_block)
                return dq_block, dk, dv, d_bias, d_slopes

            dq, *rest = grads
            carry = (float32(q, q_block.shape), *rest)
            dq_block, *rest = _over_keys(own, spec, grid, start, kv_tile, carry)
            dq_block = _rows_first(dq_block) + _rows(shares.part(dq, s), start, grid.block_q)
            return shares.put(dq, dq_block, s, start), *rest

        dq, dk, dv, *rest = grads
        tiles = [float32(q, (grid.num_kv, own.k.shape[0], hkv, x.shape[3], grid.block_kv)) for x in (k, v)]
        dq, *tiles, d_bias, d_slopes = _loop(0, grid.num_q, q_tile, (dq, *tiles, *rest))
        dk, dv = (shares.put(x, _tokens(y, grid), s, 0) for x, y in zip((dk, dv), tiles, strict=True))
        return dq, dk, dv, d_bias, d_slopes

    slopes = operands.alibi_slopes
    grads: Any = tuple(None if x is None else float32(q, x.shape) for x in (q, k, v, bias, slopes))
    if q.size and grid.num_kv:
        grads = _loop(0, shares.num, share, grads)
    dq, dk, dv, d_bias, d_slopes = grads
    return Operands(
        q=dq.astype(q.dtype),
        k=dk.astype(k.dtype),
        v=dv.astype(v.dtype),
        bias=None if bias is None or d_bias is None else d_bias.astype(bias.dtype),
        sinks=d_sinks,
        alibi_slopes=None if slopes is None or d_slopes is None else d_slopes.astype(slopes.dtype),
    )


class _Part(NamedTuple):
    """Some heads of some rows of the batch, of which tiles are read: nothing is copied."""

    array: Array  # [b, t, heads] or [b, t, heads, d]
    row: Any
    head: Any
    num_rows: int
    num_heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_rows, self.array.shape[1], self.num_heads, *self.array.shape[3:]

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def rows(self, start, size: int) -> Array:
        rest = self.array.shape[3:]
        begin = (self.row, start, self.head, *(0 for _ in rest))
        return lax.dynamic_slice(self.array, begin, (self.num_rows, size, self.num_heads, *rest))


class _Shares(NamedTuple):
    """The division of a call into shares that are computed one after another, since a tile of all heads and rows would
    leave the cores' caches: some rows of the batch, or some key heads of one row."""

    num_rows: int  # of the call
    num_heads: int  # key heads of the call
    rows: int  # of a share
    heads: int  # of a share

    @classmethod
    def of(cls, operands: Operands, config: BlockConfig) -> "_Shares":
        b, hkv = operands.q.shape[0], operands.k.shape[2]
        is_symbolic = not isinstance(b, int)
        if config.heads is None or is_symbolic or hasattr(operands.k, "rows") or _is_of_all_heads(operands):
            return cls(b, hkv, b, hkv)
        return cls(b, hkv, _divisor(b, config.heads // hkv), _divisor(hkv, config.heads))

    @property
    def num(self) -> int:
        return self.num_rows // self.rows * (self.num_heads // self.heads)

    @property
    def is_whole(self) -> bool:
        return (self.num_rows, self.num_heads) == (self.rows, self.heads)

    def _begin(self, s) -> tuple[Any, Any]:
        """The first row and key head of share s."""
        of_row = self.num_heads // self.heads
        return s // of_row * self.rows, s % of_row * self.heads

    def part(self, x: Array, s) -> Any:
        """What share s has of x [b, t, heads, ...], the heads being those of queries or of keys."""
        if self.is_whole:
            return x
        (row, head), g = self._begin(s), x.shape[2] // self.num_heads
        return _Part(x, row, head * g, self.rows, self.heads * g)

    def own(self, operands: Operands, s) -> Operands:
        """The operands of share s."""
        if self.is_whole:
            return operands
        (row, head), g = self._begin(s), operands.group_size
        q, k, v = (self.part(x, s) for x in operands[:3])
        names = ("q_len", "kv_len", "q_offset", "q_segments", "kv_segments")
        given = {name: x for name in names if (x := getattr(operands, name)) is not None}
        found: dict[str, Any] = {name: lax.dynamic_slice_in_dim(x, row, self.rows) for name, x in given.items()}
        if operands.sinks is not None:
            found["sinks"] = lax.dynamic_slice_in_dim(operands.sinks, head * g, self.heads * g)
        return operands._replace(q=q, k=k, v=v, **found)

    def put(self, x: Array, block: Array, s, start) -> Array:
        """Writes the tokens of share s from start on."""
        row, head = (0, 0) if self.is_whole else self._begin(s)
        begin = (row, start, head * (x.shape[2] // self.num_heads), *(0 for _ in x.shape[3:]))
        return lax.dynamic_update_slice(x, block.astype(x.dtype), begin)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, at least 1."""
    return max(i for i in range(1, max(1, min(n, most)) + 1) if n % i == 0)


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
        return _quotient(self.tq, self.block_q)

    @property
    def num_kv(self) -> int:
        return _quotient(self.tk, self.block_kv)

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


def _keys_and_values(operands: Operands, config: BlockConfig, grid: _Grid, j) -> tuple[Array, Array]:
    """A tile of keys and values, [b, hkv, bk, d], or [b, bk, hkv, d] if elementwise."""
    read = _rows if config.elementwise else _kv_tile
    k_block, v_block = (read(x, grid.k_start(j), grid.block_kv) for x in (operands.k, operands.v))
    return (k_block.astype(jnp.float32), v_block.astype(jnp.float32)) if config.widen else (k_block, v_block)


def _score_tile(
    operands: Operands,
    spec: AttentionSpec,
    config: BlockConfig,
    grid: _Grid,
    q_block: Float[Array, "b hkv g bq d"],
    scale: float,
    q_start,
    j,
    keys: tuple[Array, Array],
    *,
    masked: bool,
) -> _ScoreTile:
    k_start, (k_block, v_block) = grid.k_start(j), keys
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
        return cls(lax.optimization_barrier(_rows(x, 0, x.shape[1]).swapaxes(1, 2)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, hkv, tk, d = self.array.shape
        return b, tk, hkv, d


def _with_heads_first(operands: Operands, config: BlockConfig) -> Operands:
    """Copies k and v once, if they are not widened: XLA on a CPU multiplies a tile that was transposed within the loop
    in float32."""
    in_pages = hasattr(operands.k, "rows") and not isinstance(operands.k, _Part)
    if config.widen or config.elementwise or in_pages or not _has_few_keys(operands):
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


def _quotient(length: Any, block: int) -> Any:
    """The number of tiles; a symbolic length is one of whole tiles (_padded)."""
    if not isinstance(length, int):
        return length // block
    return -(-length // block) if length else 0


def _least(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def _most(a, b):
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


def _per_head(x: Float[Array, "*#b hq"], hkv: int) -> Float[Array, "*#b hkv g 1 1"]:
    return x.astype(jnp.float32).reshape(*x.shape[:-1], hkv, -1, 1, 1)


def _per_row(x: Array) -> Array:
    return x[:, None, None, None, None]


def _rows(x: Any, start, size: int) -> Array:
    if hasattr(x, "rows"):  # _Part, or paged.Rows, which gathers them
        return x.rows(start, size)
    return _slice(x, start, size, axis=1)


def _slice(x: Array, start, size: int, *, axis: int) -> Array:
    return x if x.shape[axis] == size else lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def _add(tiles: Float[Array, "n b hkv d bk"], block: Float[Array, "b hkv d bk"], j) -> Float[Array, "n b hkv d bk"]:
    return lax.dynamic_update_slice_in_dim(tiles, lax.dynamic_slice_in_dim(tiles, j, 1) + block[None], j, axis=0)


def _tokens(tiles: Float[Array, "n b hkv d bk"], grid: _Grid) -> Float[Array, "b tk hkv d"]:
    """The tokens of all tiles of keys; the last one is 0 where it repeats keys of the one before it."""
    n, b, hkv, d, block_kv = tiles.shape
    x = tiles.transpose(1, 0, 4, 2, 3)
    if n * block_kv == grid.tk:
        return x.reshape(b, grid.tk, hkv, d)
    last = grid.tk - (n - 1) * block_kv
    return jnp.concatenate([x[:, :-1].reshape(b, grid.tk - last, hkv, d), x[:, -1, block_kv - last :]], axis=1)


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
