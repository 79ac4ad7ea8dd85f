"""Flash attention forward as a Mosaic kernel, for TPUs.

One program computes a tile of queries of a few key heads, and its grid steps over the tiles of keys that any of the
queries may see, with a running maximum and sum in VMEM. All query heads of a key head are rows of one tile, so that the
keys are read once for all of them. Steps without keys for a tile do nothing and fetch nothing: their index is that of
the step before.

Arrays are read as [b, t, heads * head_dim], which is how a projection writes them: nothing is transposed. A block has
as many key heads as fill whole rows of 128 lanes, two of head_dim 64, or all of them.

Source: arXiv:2307.08691, algorithm 1. Scores are defined in tile.py. Tested in tests/jfa/test_tpu.py.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import Shape, output, tiles_in_common
from jfa.kernels.tpu import tile
from jfa.kernels.tpu._pallas import pl, pltpu
from jfa.kernels.tpu.tile import LANES, Scores
from jfa.types import AttentionSpec, DeviceInfo, Operands, TpuConfig

# Tiles, best first by the instructions of libtpu's code: the first that fits is used. Each has at most _MOST_ROWS rows,
# or 128 queries. Taller ones take minutes to compile and gain nothing.
_TILES = ((512, 1024), (512, 512), (256, 512), (128, 512), (128, 256), (128, 128))
_MOST_ROWS = 1024


def heads_of_block(shape: Shape) -> int:
    """Key heads of a block: the fewest whose columns fill whole rows of lanes, otherwise all."""
    fitting = math.lcm(LANES // math.gcd(shape.d, LANES), LANES // math.gcd(shape.dv, LANES))
    return fitting if shape.hkv % fitting == 0 else shape.hkv


def default_config(operands: Operands, device: DeviceInfo) -> TpuConfig:
    """The first of _TILES that fits into the device's VMEM."""
    shape = Shape.of(operands)
    fitting = (
        TpuConfig(block_q=block_q, block_kv=block_kv)
        for block_q, block_kv in _TILES
        if shape.g * block_q <= _MOST_ROWS or block_q == LANES
    )
    sizes = [(config, vmem_bytes(operands, config)) for config in fitting]
    return next((config for config, needed in sizes if needed <= tile.budget(device)), sizes[-1][0])


def why_not(operands: Operands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    q, k, v = operands[:3]
    for name, x in (("query", q), ("key", k)):
        if not all(isinstance(n, int) for n in x.shape):
            return f"a kernel's grid has a static size, but {name} has the symbolic shape {x.shape}"
    refused = {"bias": operands.bias, "mask": operands.mask}
    for name, x in (refused | {"dropout_rate": operands.dropout_seed}).items():
        if x is not None:
            return f"the TPU kernel has no {name} yet"
    least = TpuConfig(block_q=LANES, block_kv=LANES)
    return (
        tile.why_not_device(device)
        or tile.why_not_dtypes(q, k, v)
        or tile.why_not_head_dims(q.shape[3], v.shape[3])
        or tile.why_not_vmem(
            vmem_bytes(operands, least), device, f"128 queries of {Shape.of(operands).g} heads and 128 keys"
        )
    )


def vmem_bytes(operands: Operands, config: TpuConfig) -> int:
    """Bytes of VMEM that the kernel needs, at most: blocks twice, scratch arrays, and what the compiler adds.

    That is three tiles of scores, or half a tile for each key head of a block, which are unrolled. If there are
    several, the keys, values, queries and outputs of each are moved to where rows of lanes begin.
    """
    shape, dtype = Shape.of(operands), operands.q.dtype
    block_q = min(config.block_q, tile.rounded(shape.tq, tile.sublanes(dtype)))
    heads = heads_of_block(shape)
    rows, columns = shape.g * block_q, heads * shape.g
    stored = tile.stored_bytes
    blocks = (
        stored((block_q, columns * shape.d), dtype)
        + stored((config.block_kv, heads * shape.d), dtype)
        + stored((config.block_kv, heads * shape.dv), dtype)
        + stored((block_q, columns * shape.dv), dtype)
        + stored((columns, 1, block_q), jnp.float32)
    )
    scratch = heads * (
        stored((rows, shape.d), dtype) + stored((rows, shape.dv), jnp.float32) + 2 * stored((rows, LANES), jnp.float32)
    )
    added = max(6, heads) * stored((rows, config.block_kv), jnp.float32) // 2
    if heads > 1:
        for size in (shape.d, shape.dv):
            added += heads * (stored((config.block_kv, size), dtype) + stored((rows, size), jnp.float32))
    return 2 * blocks + scratch + added


def flash_attention(
    operands: Operands, *, spec: AttentionSpec, config: TpuConfig, vmem_limit_bytes: int, interpret: Any
) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """Attention and the natural log-sum-exp, as reference.attention defines them.

    Not differentiable by itself: ops.dot_product_attention pairs it with flash_bwd.flash_attention_bwd.

    Args:
      vmem_limit_bytes: VMEM that the compiler may use.
      interpret: of pallas_call: False, or pltpu.InterpretParams.

    Raises:
      ValueError: the tiles do not fit into that.
    """
    tile.check_config(config, vmem_bytes(operands, config), vmem_limit_bytes)
    q, k, v = operands.q, operands.k, operands.v
    shape = Shape.of(operands)
    if min(q.size, k.size, v.size) == 0:
        empty = jnp.full((shape.b, shape.tq, shape.hq), -jnp.inf, jnp.float32)
        return jnp.zeros((*empty.shape, shape.dv), q.dtype), empty
    grid = Grid.of(operands, spec, config, least_rows=tile.sublanes(q.dtype))
    block_q, block_kv, heads = grid.block_q, grid.block_kv, grid.heads
    scalars = grid.scalars(operands)

    def q_tile(b, h, i, step, *refs):
        return b, i, h

    def kv_tile(b, h, i, step, *refs):
        return b, grid.fetched(grid.span(dict(zip(scalars, refs, strict=True)), b, i), step), h

    def lse_tile(b, h, i, step, *refs):
        return b, h, 0, i

    arrays = {
        "q": (in_columns(q), pl.BlockSpec((None, block_q, heads * shape.g * shape.d), q_tile)),
        "k": (in_columns(k), pl.BlockSpec((None, block_kv, heads * shape.d), kv_tile)),
        "v": (in_columns(v), pl.BlockSpec((None, block_kv, heads * shape.dv), kv_tile)),
        **grid.segments(operands, q_tile, kv_tile),
    }
    scratch = [
        pltpu.VMEM((heads, grid.rows, shape.d), q.dtype),
        pltpu.VMEM((heads, grid.rows, LANES), jnp.float32),
        pltpu.VMEM((heads, grid.rows, LANES), jnp.float32),
        pltpu.VMEM((heads, grid.rows, shape.dv), jnp.float32),
    ]
    call = pl.pallas_call(
        functools.partial(_flash_kernel, names=(*scalars, *arrays), grid=grid),
        name="flash_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(shape.b, shape.hkv // heads, grid.num_q_tiles, grid.num_steps),
            in_specs=[block for _, block in arrays.values()],
            out_specs=[
                pl.BlockSpec((None, block_q, heads * shape.g * shape.dv), q_tile),
                pl.BlockSpec((None, heads * shape.g, 1, block_q), lse_tile),
            ],
            scratch_shapes=scratch,
        ),
        out_shape=[
            output((shape.b, shape.tq, shape.hq * shape.dv), q.dtype, like=q),
            output((shape.b, shape.hq, 1, grid.num_q_tiles * block_q), jnp.float32, like=q),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * grid.visible_pairs * (shape.d + shape.dv),
            transcendentals=grid.visible_pairs,
            bytes_accessed=(q.size + k.size + v.size + shape.b * shape.tq * shape.hq * shape.dv) * q.dtype.itemsize,
        ),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        out, lse = call(*scalars.values(), *(x for x, _ in arrays.values()))
    return out.reshape(shape.b, shape.tq, shape.hq, shape.dv), lse[:, :, 0, : shape.tq].swapaxes(1, 2)


def in_columns(x: Array) -> Float[Array, "b t columns"]:
    """[b, t, heads, head_dim] with the heads side by side, which is how a projection writes it."""
    return x.reshape(*x.shape[:2], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What the kernels of both passes know of a call: its tiles, and which keys may be invisible."""

    shape: Shape
    spec: AttentionSpec
    heads: int  # key heads of a block
    block_q: int
    block_kv: int
    ragged: bool  # some tiles have fewer keys
    all_seen: bool  # every key is seen by a query of its row, so that none may be NaN

    @classmethod
    def of(cls, operands: Operands, spec: AttentionSpec, config: TpuConfig, *, least_rows: int) -> "Grid":
        """The grid of a call; least_rows: what block_q is a multiple of, if there are fewer queries than it has."""
        shape = Shape.of(operands)
        block_kv = min(config.block_kv, tile.rounded(shape.tk, LANES))
        ragged = operands.kv_len is not None or shape.tk % block_kv != 0
        all_seen = not ragged and spec.window is None and operands.q_len is operands.q_offset is None
        all_seen &= operands.q_segments is None and (not spec.causal or shape.tk <= shape.tq)
        return cls(
            shape=shape,
            spec=spec,
            heads=heads_of_block(shape),
            block_q=min(config.block_q, tile.rounded(shape.tq, least_rows)),
            block_kv=block_kv,
            ragged=ragged,
            all_seen=all_seen,
        )

    @property
    def rows(self) -> int:
        """Rows of a tile: its queries, for each query head of a key head."""
        return self.shape.g * self.block_q

    @property
    def num_q_tiles(self) -> int:
        return pl.cdiv(self.shape.tq, self.block_q)

    @property
    def num_kv_tiles(self) -> int:
        return pl.cdiv(self.shape.tk, self.block_kv)

    @property
    def num_steps(self) -> int:
        """Tiles of keys that a tile of queries can see at most."""
        if self.spec.left is None or self.spec.right is None:
            return self.num_kv_tiles
        seen = self.block_q + self.spec.left + self.spec.right
        return min(self.num_kv_tiles, pl.cdiv(seen - 1, self.block_kv) + 1)

    @property
    def visible_pairs(self) -> int:
        """Queries times keys, of all heads: what the cost estimates count."""
        half = self.spec.causal and self.shape.tq == self.shape.tk
        return self.shape.b * self.shape.hq * self.shape.tq * self.shape.tk // (2 if half else 1)

    def scalars(self, operands: Operands) -> dict[str, Array]:
        """The arrays that a kernel reads as scalars, by name.

        rows: i32[3, b], valid queries and keys of each row, and the position of its first query. tiles: i32[2, b, n],
        the first tile of keys that has a segment of each tile of queries, and the one after the last.
        """
        shape = self.shape

        def full(n: int):
            return jnp.full(shape.b, n, jnp.int32)

        rows = [
            full(shape.tq) if operands.q_len is None else jnp.minimum(operands.q_len, shape.tq),
            full(shape.tk) if operands.kv_len is None else jnp.minimum(operands.kv_len, shape.tk),
            full(0) if operands.q_offset is None else operands.q_offset,
        ]
        found = {"rows": jnp.stack(rows)}
        for name in ("sinks", "alibi_slopes"):
            if (x := getattr(operands, name)) is not None:
                found[name] = x.astype(jnp.float32)
        if operands.q_segments is not None and operands.kv_segments is not None:
            ranges = tiles_in_common(operands.q_segments, operands.kv_segments, self.block_q, self.block_kv)
            found["tiles"] = jnp.moveaxis(ranges, 2, 0)
        return found

    def segments(self, operands: Operands, q_tile, kv_tile) -> dict[str, tuple[Array, Any]]:
        """The segments of queries and keys by name, as (array, BlockSpec); q_tile, kv_tile: index maps of a tile."""
        if operands.q_segments is None or operands.kv_segments is None:
            return {}
        missing = self.num_q_tiles * self.block_q - self.shape.tq
        ids = jnp.pad(operands.q_segments, ((0, 0), (0, missing)))

        def along_lanes(place):
            def index(*at):
                b, n, _ = place(*at)
                return b, 0, n

            return index

        return {
            "q_segments": (ids[:, None], pl.BlockSpec((None, 1, self.block_q), along_lanes(q_tile))),
            "kv_segments": (
                operands.kv_segments[:, None],
                pl.BlockSpec((None, 1, self.block_kv), along_lanes(kv_tile)),
            ),
        }

    def span(self, ref: dict[str, Any], b, i) -> "Span":
        """The keys that tile i of the queries of a batch row may see; ref: the scalars."""
        spec, block_q, block_kv = self.spec, self.block_q, self.block_kv
        q_len, kv_len, offset = (ref["rows"][at, b] for at in range(3))
        first_row = i * block_q
        position = first_row + offset
        first, whole_first, end, whole_end = 0, 0, kv_len, kv_len
        # the window of the last row starts and ends furthest to the right
        if spec.left is not None:
            first = jnp.maximum(0, position - spec.left)
            whole_first = jnp.maximum(0, position + block_q - 1 - spec.left)
        if spec.right is not None:
            # padding rows see no keys: keys past those of the last valid row may contain anything
            last = jnp.minimum(first_row + block_q, q_len)
            end = jnp.clip(last + offset + spec.right, 0, kv_len)
            whole_end = jnp.clip(position + 1 + spec.right, 0, kv_len)
        end = jnp.where(first_row < q_len, jnp.int32(end), 0)
        tile_first, tile_end = _divided(first, block_kv), _divided(end + block_kv - 1, block_kv)
        if "tiles" in ref:
            tile_first = jnp.maximum(tile_first, ref["tiles"][0, b, i])
            tile_end = jnp.minimum(tile_end, ref["tiles"][1, b, i])
        return Span(
            q_len=q_len,
            kv_len=kv_len,
            offset=offset,
            first=first,
            end=end,
            tile_first=tile_first,
            tile_end=tile_end,
            whole_first=_divided(whole_first + block_kv - 1, block_kv),
            whole_end=_divided(whole_end, block_kv),
        )

    def fetched(self, span: "Span", step):
        """The tile of keys of a step: steps past the last one repeat it, which fetches nothing."""
        last = jnp.maximum(span.tile_end - 1, span.tile_first)
        # the last tile may be behind all keys, if no key is visible
        return jnp.minimum(jnp.minimum(span.tile_first + step, last), self.num_kv_tiles - 1)

    def visible(self, span: "Span", query, key, *, edge: bool, segments=None) -> list[Array]:
        """The conditions for a score to be visible; query, key: indices, one a column and the other a row.

        edge: positions may mask some keys. segments: of the queries and the keys, arrays like those; None: there are
        none. Without them, rows past the last query may see anything: nothing of theirs is used.
        """
        conditions = []
        if edge and self.ragged:
            conditions.append(key < span.kv_len)
        if edge and self.spec.left is not None:
            conditions.append(key >= query + (span.offset - self.spec.left))
        if edge and self.spec.right is not None:
            conditions.append(key <= query + (span.offset + self.spec.right))
        if segments is not None:
            # keys that only such rows see may contain anything
            conditions += [query < span.q_len, segments[0] == segments[1]]
        return conditions


class Span(NamedTuple):
    """The keys [first, end) that a tile of queries may see, the tiles that have them, and those seen by all queries."""

    q_len: Any
    kv_len: Any
    offset: Any
    first: Any
    end: Any
    tile_first: Any
    tile_end: Any
    whole_first: Any
    whole_end: Any

    def each_way(self, n, add_tile) -> None:
        """Runs add_tile(edge=) for tile n, if it is visited: edge if positions mask some of its scores."""
        is_visited, is_whole = n < self.tile_end, (n >= self.whole_first) & (n < self.whole_end)
        pl.when(is_visited & is_whole)(functools.partial(add_tile, edge=False))
        pl.when(is_visited & ~is_whole)(functools.partial(add_tile, edge=True))


def _divided(n, block: int):
    return lax.div(jnp.int32(n), jnp.int32(block))


def _flash_kernel(
    *refs,  # by `names`: scalars, q [block_q, heads*g*d], k [block_kv, heads*d], v [block_kv, heads*dv], and segments
    # [1, block_q] and [1, block_kv]; o [block_q, heads*g*dv], lse [heads*g, 1, block_q]; q rows [heads, rows, d], m, l
    # [heads, rows, LANES], acc [heads, rows, dv]
    names: tuple[str, ...],
    grid: Grid,
):
    ref = dict(zip(names, refs, strict=False))
    o_ref, lse_ref, rows_ref, m_ref, l_ref, acc_ref = refs[len(names) :]
    spec, block_q, block_kv, heads = grid.spec, grid.block_q, grid.block_kv, grid.heads
    g, d, dv = grid.shape.g, grid.shape.d, grid.shape.dv
    b, block, i, step = (pl.program_id(axis) for axis in range(4))
    span = grid.span(ref, b, i)
    scores = Scores(spec=spec, has_bias="alibi_slopes" in ref)
    first_row, n = i * block_q, span.tile_first + step
    first_head = block * heads * g

    def each_query_head():
        """(key head, query head, rows) of the block."""
        for h in range(heads):
            for j in range(g):
                yield h, h * g + j, pl.ds(j * block_q, block_q)

    def per_row(values, columns: int):
        """[g * block_q, columns], with a number for each query head of a key head."""
        return jnp.concatenate([jnp.full((block_q, columns), x, jnp.float32) for x in values], axis=0)

    @pl.when(step == 0)
    def _():
        tile.start_softmax(m_ref, l_ref, acc_ref)
        for h, head, rows in each_query_head():
            q = ref["q"][:, head * d : (head + 1) * d]
            rows_ref[h, rows] = q if scores.sign == 1.0 else q * scores.sign

    def add_tile(*, edge: bool):
        key = n * block_kv + lax.broadcasted_iota(jnp.int32, (1, block_kv), 1)
        query = first_row + lax.rem(lax.broadcasted_iota(jnp.int32, (grid.rows, 1), 0), jnp.int32(block_q))
        segments = None
        if "q_segments" in ref:
            of_rows = jnp.tile(tile.column(ref["q_segments"][...]), (g, 1))
            segments = tile.spread(of_rows, block_kv), ref["kv_segments"][...]
        conditions = grid.visible(span, query, key, edge=edge, segments=segments)
        for h in range(heads):
            keys, values = ref["k"][:, h * d : (h + 1) * d], ref["v"][:, h * dv : (h + 1) * dv]
            bias = None
            if "alibi_slopes" in ref:
                slopes = ref["alibi_slopes"]
                place = b if slopes.shape[0] > 1 else 0
                of_rows = per_row([slopes[place, first_head + h * g + j] for j in range(g)], block_kv)
                bias = of_rows * -jnp.abs(query + span.offset - key).astype(jnp.float32)
            raw = scores.raw(tile.product(rows_ref[h], keys, trans_b=True), bias)
            raw = functools.reduce(lambda raw, seen: jnp.where(seen, raw, -jnp.inf), conditions, raw)
            # keys that the tile does not see may contain anything, and 0 * NaN is NaN
            if segments is not None:
                seen = tile.column((raw > -jnp.inf).astype(jnp.float32).max(0, keepdims=True))
                values = jnp.where(tile.spread(seen, dv) > 0.0, values, 0)
            elif edge and not grid.all_seen:
                at = n * block_kv + lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where((at >= span.first) & (at < span.end), values, 0)
            tile.add_to_softmax(m_ref.at[h], l_ref.at[h], acc_ref.at[h], raw, values, scores.factor)

    span.each_way(n, add_tile)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        row = first_row + lax.broadcasted_iota(jnp.int32, (block_q, LANES), 0)
        for h, head, rows in each_query_head():
            m, l = m_ref[h, rows], jnp.where(row < span.q_len, l_ref[h, rows], 0.0)
            sinks = jnp.full_like(l, ref["sinks"][first_head + head]) if "sinks" in ref else None
            out = tile.normalized(acc_ref[h, rows], m, l, scores, sinks)
            o_ref[:, head * dv : (head + 1) * dv] = out.astype(o_ref.dtype)
            lse_ref[head] = jnp.transpose(scores.log_sum_exp(m, l))[:1]
