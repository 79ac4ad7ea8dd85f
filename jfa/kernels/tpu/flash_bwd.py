"""Flash attention backward as a Mosaic kernel, for TPUs.

One kernel computes all cotangents: it recomputes the weights from the log-sum-exp once, with five products for a tile
of scores, where a kernel for dq and another for dk and dv need seven. Its grid is that of the forward kernel: tiles of
queries one after another, and for each of them steps over the tiles of keys that its queries may see. The sums of dq
are those of one tile; the sums of dk and dv stay in VMEM until the last tile of queries. If they do not fit, keys are
divided into parts, which are an axis of the grid, and each part has its own dq: XLA adds them.

Scores are computed transposed, [keys, queries]: the log-sum-exp and delta of the queries are rows along the lanes, as
they are stored, and the products for dk and dv need no transpose.

If p are the weights, do is the cotangent of the output, and delta = sum(do * output) for each row, then
ds = p (do v^T - delta). The cotangent of the residual is subtracted from delta. The kernel computes delta too: for rows
of sums, XLA would transpose the output and do. With sinks, which change both, XLA does.

Source: arXiv:2307.08691, algorithm 2 and section 3.1.2. Scores are defined in tile.py. Forward: flash.py. Tested in
tests/jfa/test_tpu.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import Shape, output, row_terms
from jfa.kernels.tpu import tile
from jfa.kernels.tpu._pallas import pl, pltpu
from jfa.kernels.tpu.flash import Grid, Span, heads_of_block, in_columns
from jfa.kernels.tpu.tile import LANES, LOG2_E, Scores
from jfa.types import AttentionSpec, DeviceInfo, Operands, TpuConfig

# Tiles, best first by the instructions of libtpu's code: the first that fits is used, of those with _MOST_ROWS rows at
# most, or 128 queries.
_TILES = ((512, 512), (256, 512), (128, 512), (128, 256), (128, 128))
_MOST_ROWS = 1024


def default_config(operands: Operands, forward: TpuConfig, device: DeviceInfo) -> TpuConfig | None:
    """The first of _TILES, cut to those of the forward pass, that fits into the device's VMEM; None: none does."""
    g, limit = Shape.of(operands).g, tile.budget(device)
    fitting = (
        TpuConfig(block_q=min(block_q, forward.block_q), block_kv=min(block_kv, forward.block_kv))
        for block_q, block_kv in _TILES
        if g * block_q <= _MOST_ROWS or block_q == LANES
    )
    return next((one for one in fitting if vmem_bytes(operands, one, tiles=1) <= limit), None)


def vmem_bytes(operands: Operands, config: TpuConfig, *, tiles: int) -> int:
    """Bytes of VMEM that the kernel needs, at most: blocks twice, scratch arrays, and what the compiler adds.

    That is four tiles of scores, and if a block has several key heads, the queries and outputs of each, which are moved
    to where rows of lanes begin. tiles: tiles of keys in a part.
    """
    shape, dtype = Shape.of(operands), operands.q.dtype
    block_q, heads = min(config.block_q, tile.rounded(shape.tq, LANES)), heads_of_block(shape)
    block_kv = min(config.block_kv, tile.rounded(shape.tk, LANES))
    rows, columns = shape.g * block_q, heads * shape.g
    stored = tile.stored_bytes
    keys = heads * (shape.d + shape.dv)
    is_divided = tiles * block_kv < shape.tk
    blocks = (
        stored((block_q, columns * shape.d), dtype)
        + stored((block_q, columns * shape.d), jnp.float32 if is_divided else dtype)
        + 2 * stored((block_q, columns * shape.dv), dtype)
        + stored((block_kv, keys), dtype)
        + stored((tiles * block_kv, keys), dtype)
        + 3 * stored((columns, 1, block_q), jnp.float32)
    )
    scratch = heads * (
        stored((rows, shape.d), dtype)
        + stored((rows, shape.dv), dtype)
        + stored((rows, shape.d), jnp.float32)
        + stored((1, rows), jnp.float32)
        + stored((tiles * block_kv, shape.d), jnp.float32)
        + stored((tiles * block_kv, shape.dv), jnp.float32)
    )
    added = 4 * stored((block_kv, rows), jnp.float32)
    if heads > 1:
        added += heads * sum(stored((rows, size), jnp.float32) for size in (shape.d, shape.dv))
    return 2 * blocks + scratch + added


def flash_attention_bwd(
    operands: Operands,
    out: Float[Array, "b tq hq dv"],
    lse: Float[Array, "b tq hq"],
    d_out: Float[Array, "b tq hq dv"],
    d_lse: Float[Array, "b tq hq"],
    *,
    spec: AttentionSpec,
    config: TpuConfig,
    vmem_limit_bytes: int,
    interpret: Any,
) -> Operands:
    """The cotangents of q, k, v, sinks and alibi_slopes; None for operands without one.

    Args:
      vmem_limit_bytes: VMEM that the compiler may use; it decides into how many parts the keys are divided.
      interpret: of pallas_call: False, or pltpu.InterpretParams.

    Raises:
      ValueError: the tiles do not fit into that.
    """
    tile.check_config(config, vmem_bytes(operands, config, tiles=1), vmem_limit_bytes)
    q, k, v = operands.q, operands.k, operands.v
    slopes = operands.alibi_slopes
    d_sinks, whole_delta = None, operands.sinks is not None
    if whole_delta:
        d_out, lse, delta, d_sinks = row_terms(operands, out, lse, d_out, d_lse)
    else:
        empty = lse == -jnp.inf
        lse, delta = jnp.where(empty, jnp.inf, lse), jnp.where(empty, 0.0, -d_lse)
    if min(q.size, v.size) == 0:
        nothing = None if slopes is None else jnp.zeros_like(slopes)
        return Operands(*map(jnp.zeros_like, (q, k, v)), sinks=d_sinks, alibi_slopes=nothing)
    grid = Grid.of(operands, spec, config, least_rows=LANES)
    parts = _Parts.of(grid, operands, config, vmem_limit_bytes)
    dq, dk, dv, *d_slopes = _call(
        operands._replace(sinks=None),
        None if whole_delta else out,
        d_out,
        lse,
        delta,
        grid,
        parts,
        vmem_limit_bytes=vmem_limit_bytes,
        interpret=interpret,
    )
    dq = dq[0] if parts.count == 1 else dq.sum(0).astype(q.dtype)
    if slopes is not None:
        summed = d_slopes[0].sum((0, 3, 4))
        slopes = (summed if len(slopes) > 1 else summed.sum(0, keepdims=True)).astype(slopes.dtype)
    return Operands(
        q=dq.reshape(q.shape), k=dk.reshape(k.shape), v=dv.reshape(v.shape), sinks=d_sinks, alibi_slopes=slopes
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """The parts into which keys are divided, so that the sums of each fit into VMEM."""

    tiles: int
    count: int

    @classmethod
    def of(cls, grid: Grid, operands: Operands, config: TpuConfig, limit: int) -> "_Parts":
        """The largest parts that fit into a number of bytes."""
        total = grid.num_kv_tiles
        sizes = (pl.cdiv(total, count) for count in range(1, total + 1))
        tiles = next((n for n in sizes if vmem_bytes(operands, config, tiles=n) <= limit), 1)
        return cls(tiles=tiles, count=pl.cdiv(total, tiles))

    def within(self, span: Span, part) -> Span:
        """The tiles of a span that are in a part."""
        first = part * self.tiles
        return span._replace(
            tile_first=jnp.maximum(span.tile_first, first), tile_end=jnp.minimum(span.tile_end, first + self.tiles)
        )


def _call(
    operands: Operands,
    out: Array | None,
    d_out: Array,
    lse: Array,
    delta: Array,
    grid: Grid,
    parts: _Parts,
    *,
    vmem_limit_bytes,
    interpret,
) -> list[Array]:
    """dq of each part, dk, dv, and with slopes the sums of their gradients for each part and query.

    out: the kernel adds sum(d_out * out) to delta; None: delta has it.
    """
    q, k, v = operands.q, operands.k, operands.v
    shape, heads, block_q, block_kv = grid.shape, grid.heads, grid.block_q, grid.block_kv
    scalars = grid.scalars(operands)
    scores = _scores(grid.spec, scalars)

    def q_tile(b, h, part, i, step, *refs):
        return b, i, h

    def kv_tile(b, h, part, i, step, *refs):
        span = parts.within(grid.span(dict(zip(scalars, refs, strict=True)), b, i), part)
        return b, grid.fetched(span, step), h

    def row_tile(b, h, part, i, step, *refs):
        return b, h, 0, i

    def dq_tile(b, h, part, i, step, *refs):
        return part, b, i, h

    def dkv_part(b, h, part, i, step, *refs):
        return b, part, h

    def slope_tile(b, h, part, i, step, *refs):
        return part, b, h, 0, i

    def along_lanes(x: Array, otherwise: float) -> Float[Array, "b hq 1 rows"]:
        missing = grid.num_q_tiles * block_q - shape.tq
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=otherwise).swapaxes(1, 2)[:, :, None]

    q_spec = pl.BlockSpec((None, block_q, heads * shape.g * shape.d), q_tile)
    do_spec = pl.BlockSpec((None, block_q, heads * shape.g * shape.dv), q_tile)
    row_spec = pl.BlockSpec((None, heads * shape.g, 1, block_q), row_tile)
    arrays = {
        "q": (in_columns(q), q_spec),
        "k": (in_columns(k), pl.BlockSpec((None, block_kv, heads * shape.d), kv_tile)),
        "v": (in_columns(v), pl.BlockSpec((None, block_kv, heads * shape.dv), kv_tile)),
        "do": (in_columns(d_out), do_spec),
        **({} if out is None else {"out": (in_columns(out), do_spec)}),
        # as a raw score
        "lse": (along_lanes(lse * (LOG2_E / scores.factor), jnp.inf), row_spec),
        "delta": (along_lanes(delta, 0.0), row_spec),
        **grid.segments(operands, q_tile, kv_tile),
    }
    of_part, rows = parts.tiles * block_kv, grid.rows
    dq_dtype = q.dtype if parts.count == 1 else jnp.float32
    outputs = [
        (
            output((parts.count, shape.b, shape.tq, shape.hq * shape.d), dq_dtype, like=q),
            pl.BlockSpec((None, None, block_q, heads * shape.g * shape.d), dq_tile),
        ),
        (
            output((shape.b, shape.tk, shape.hkv * shape.d), k.dtype, like=q),
            pl.BlockSpec((None, of_part, heads * shape.d), dkv_part),
        ),
        (
            output((shape.b, shape.tk, shape.hkv * shape.dv), v.dtype, like=q),
            pl.BlockSpec((None, of_part, heads * shape.dv), dkv_part),
        ),
    ]
    scratch = {
        "q_rows": pltpu.VMEM((heads, rows, shape.d), q.dtype),
        "do_rows": pltpu.VMEM((heads, rows, shape.dv), q.dtype),
        "delta_sum": pltpu.VMEM((heads, 1, rows), jnp.float32),
        "dq_sum": pltpu.VMEM((heads, rows, shape.d), jnp.float32),
        "dk_sum": pltpu.VMEM((heads, of_part, shape.d), jnp.float32),
        "dv_sum": pltpu.VMEM((heads, of_part, shape.dv), jnp.float32),
    }
    names = (*scalars, *arrays, "dq", "dk", "dv")
    if operands.alibi_slopes is not None:
        padded = grid.num_q_tiles * block_q
        outputs.append(
            (
                output((parts.count, shape.b, shape.hq, 1, padded), jnp.float32, like=q),
                pl.BlockSpec((None, None, heads * shape.g, 1, block_q), slope_tile),
            )
        )
        scratch["slope_sum"] = pltpu.VMEM((heads, 1, rows), jnp.float32)
        names += ("d_slopes",)
    call = pl.pallas_call(
        functools.partial(_flash_bwd_kernel, names=(*names, *scratch), grid=grid, parts=parts),
        name="flash_attention_bwd",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(
                *(shape.b, shape.hkv // heads, parts.count),
                *(grid.num_q_tiles, min(grid.num_steps, parts.tiles)),
            ),
            in_specs=[block for _, block in arrays.values()],
            out_specs=[block for _, block in outputs],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=vmem_limit_bytes,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * grid.visible_pairs * (3 * shape.d + 2 * shape.dv),
            transcendentals=grid.visible_pairs,
            bytes_accessed=(2 * (q.size + k.size + v.size) + (1 if out is None else 2) * d_out.size) * q.dtype.itemsize,
        ),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        return call(*scalars.values(), *(x for x, _ in arrays.values()))


def _scores(spec: AttentionSpec, scalars) -> Scores:
    return Scores(spec=spec, has_bias="alibi_slopes" in scalars)


def _flash_bwd_kernel(
    *refs,  # by `names`: scalars, q [block_q, heads*g*d], k [block_kv, heads*d], v [block_kv, heads*dv],
    # do and out [block_q, heads*g*dv], lse and delta [heads*g, 1, block_q], segments [1, block_q] and [1, block_kv];
    # dq [block_q, heads*g*d], dk [part, heads*d], dv [part, heads*dv], d_slopes [heads*g, 1, block_q];
    # q_rows [heads, rows, d], do_rows [heads, rows, dv], delta_sum [heads, 1, rows], dq_sum [heads, rows, d],
    # dk_sum [heads, part, d], dv_sum [heads, part, dv], slope_sum [heads, 1, rows]
    names: tuple[str, ...],
    grid: Grid,
    parts: _Parts,
):
    ref = dict(zip(names, refs, strict=True))
    spec, block_q, block_kv, heads = grid.spec, grid.block_q, grid.block_kv, grid.heads
    g, d, dv = grid.shape.g, grid.shape.d, grid.shape.dv
    b, block, part, i, step = (pl.program_id(axis) for axis in range(5))
    is_last_step = step == pl.num_programs(4) - 1
    span = parts.within(grid.span(ref, b, i), part)
    scores = _scores(spec, ref)
    n = span.tile_first + step

    def each_query_head():
        """(key head, query head, rows) of the block."""
        for h in range(heads):
            for j in range(g):
                yield h, h * g + j, pl.ds(j * block_q, block_q)

    def lse_of_group(h: int):
        """f32[1, rows], of a key head's rows."""
        return jnp.concatenate([ref["lse"][h * g + j] for j in range(g)], axis=1)

    def of_tile(j):
        """The rows of a tile in the sums of the part."""
        return pl.ds(pl.multiple_of(j * block_kv, block_kv), block_kv)

    @pl.when((i == 0) & (step == 0))
    def _():
        def clear(j, _):
            for name in ("dk_sum", "dv_sum"):
                _clear(ref[name].at[:, of_tile(j)])

        lax.fori_loop(0, parts.tiles, clear, None)

    @pl.when(step == 0)
    def _():
        for name in ("dq_sum", "slope_sum"):
            if name in ref:
                _clear(ref[name])
        for h, head, rows in each_query_head():
            # rows that saw no key may contain anything
            saw = tile.column(ref["lse"][head]) != jnp.inf
            for name, width in (("q", d), ("do", dv)):
                x = ref[name][:, head * width : (head + 1) * width]
                ref[f"{name}_rows"][h, rows] = jnp.where(tile.spread(saw.astype(jnp.int32), width) != 0, x, 0)
            delta = ref["delta"][head]
            if "out" in ref:
                out = ref["out"][:, head * dv : (head + 1) * dv].astype(jnp.float32)
                added = (ref["do_rows"][h, rows].astype(jnp.float32) * out).sum(1, keepdims=True)
                added = jnp.where(saw, added, 0.0)  # rows past the last one have any output
                delta = delta + jnp.transpose(added)[:1]
            ref["delta_sum"][h, :, rows] = delta

    def add_tile(*, edge: bool):
        key = n * block_kv + lax.broadcasted_iota(jnp.int32, (block_kv, 1), 0)
        query = i * block_q + lax.rem(lax.broadcasted_iota(jnp.int32, (1, grid.rows), 1), jnp.int32(block_q))
        segments = None
        if "q_segments" in ref:
            of_keys = tile.spread(tile.column(ref["kv_segments"][...]), grid.rows)
            segments = jnp.tile(ref["q_segments"][...], (1, g)), of_keys
        conditions = grid.visible(span, query, key, edge=edge, segments=segments)
        for h in range(heads):
            keys, values = ref["k"][:, h * d : (h + 1) * d], ref["v"][:, h * dv : (h + 1) * dv]
            if segments is not None:
                seen = functools.reduce(jnp.logical_and, conditions).astype(jnp.float32).max(1, keepdims=True) > 0.0
                keys, values = jnp.where(seen, keys, 0), jnp.where(seen, values, 0)
            elif edge and not grid.all_seen:
                # keys that the tile does not see may contain anything, and 0 * NaN is NaN
                inside = (key >= span.first) & (key < span.end)
                keys, values = jnp.where(inside, keys, 0), jnp.where(inside, values, 0)
            q, do = ref["q_rows"][h], ref["do_rows"][h]
            bias = distance = None
            if "alibi_slopes" in ref:
                slopes, first_head = ref["alibi_slopes"], (block * heads + h) * g
                place = b if slopes.shape[0] > 1 else 0
                of_rows = [jnp.full((1, block_q), slopes[place, first_head + j], jnp.float32) for j in range(g)]
                distance = -jnp.abs(query + span.offset - key).astype(jnp.float32)
                bias = jnp.concatenate(of_rows, axis=1) * distance
            products = tile.product(keys, q, trans_b=True)
            raw = scores.raw(products if scores.sign == 1.0 else products * scores.sign, bias)
            p = jnp.exp2((raw - lse_of_group(h)) * scores.factor)
            p = functools.reduce(lambda p, seen: jnp.where(seen, p, 0.0), conditions, p)
            ds = p * (tile.product(values, do, trans_b=True) - ref["delta_sum"][h])
            if spec.softcap is not None:
                ds = ds * (1.0 - raw * raw)
            if distance is not None:
                ref["slope_sum"][h] += (ds * distance).sum(0, keepdims=True)
            p, ds = p.astype(do.dtype), ds.astype(q.dtype)
            at = of_tile(n - part * parts.tiles)
            ref["dv_sum"][h, at] += tile.product(p, do)
            ref["dk_sum"][h, at] += tile.product(ds, q)
            ref["dq_sum"][h] += tile.product(ds, keys, trans_a=True)

    span.each_way(n, add_tile)

    @pl.when(is_last_step)
    def _():
        for h, head, rows in each_query_head():
            dq = ref["dq_sum"][h, rows] * spec.sm_scale
            ref["dq"][:, head * d : (head + 1) * d] = dq.astype(ref["dq"].dtype)
            if "slope_sum" in ref:
                ref["d_slopes"][head] = ref["slope_sum"][h, :, rows]

    @pl.when(is_last_step & (i == pl.num_programs(3) - 1))
    def _():
        def store(j, _):
            at = of_tile(j)
            for h in range(heads):
                for name, width, factor in (("dk", d, spec.sm_scale), ("dv", dv, 1.0)):
                    summed = ref[f"{name}_sum"][h, at] * factor
                    ref[name][at, h * width : (h + 1) * width] = summed.astype(ref[name].dtype)

        lax.fori_loop(0, parts.tiles, store, None)


def _clear(ref) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)
