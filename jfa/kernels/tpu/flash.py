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

from jfa.kernels.common import Shape, output
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
    refused = {"bias": operands.bias, "mask": operands.mask, "query_segment_ids": operands.q_segments}
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
    """Bytes of VMEM that the kernel needs, at most: blocks twice, scratch arrays, and three tiles of scores."""
    shape, dtype = Shape.of(operands), operands.q.dtype
    block_q = _block_q(shape, config, dtype)
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
    return 2 * blocks + scratch + 3 * stored((rows, config.block_kv), jnp.float32)


def flash_attention(
    operands: Operands, *, spec: AttentionSpec, config: TpuConfig, vmem_limit_bytes: int, interpret: Any
) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """Attention and the natural log-sum-exp, as reference.attention defines them.

    Not differentiable by itself: ops.dot_product_attention pairs it with a backward pass.

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
    config = dataclasses.replace(config, block_kv=min(config.block_kv, tile.rounded(shape.tk, LANES)))
    block_q, block_kv, heads = _block_q(shape, config, q.dtype), config.block_kv, heads_of_block(shape)
    rows, num_q_tiles = shape.g * block_q, pl.cdiv(shape.tq, block_q)
    span = functools.partial(Span.of, shape=shape, spec=spec, block_q=block_q, block_kv=block_kv)

    def q_tile(b, h, i, step, *scalars):
        return b, i, h

    def kv_tile(b, h, i, step, row_ref, *scalars):
        visited = span(row_ref, b, i)
        last = jnp.maximum(visited.tile_end - 1, visited.tile_first)
        # the last tile may be behind all keys, if no key is visible
        return b, jnp.minimum(jnp.minimum(visited.tile_first + step, last), pl.cdiv(shape.tk, block_kv) - 1), h

    def lse_tile(b, h, i, step, *scalars):
        return b, h, 0, i

    scalars = {"rows": _rows(operands, shape)}
    for name in ("sinks", "alibi_slopes"):
        if (x := getattr(operands, name)) is not None:
            scalars[name] = x.astype(jnp.float32)
    ragged = operands.kv_len is not None or shape.tk % block_kv != 0
    # every key is seen by a query of its row, so that none may be NaN
    all_seen = not ragged and spec.window is None and operands.q_len is operands.q_offset is None
    all_seen &= not spec.causal or shape.tk <= shape.tq
    visible_pairs = shape.b * shape.hq * shape.tq * shape.tk // (2 if spec.causal and shape.tq == shape.tk else 1)
    call = pl.pallas_call(
        functools.partial(
            _flash_kernel,
            names=tuple(scalars),
            shape=shape,
            heads=heads,
            spec=spec,
            block_q=block_q,
            block_kv=block_kv,
            ragged=ragged,
            all_seen=all_seen,
        ),
        name="flash_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(shape.b, shape.hkv // heads, num_q_tiles, _num_steps(shape, spec, block_q, block_kv)),
            in_specs=[
                pl.BlockSpec((None, block_q, heads * shape.g * shape.d), q_tile),
                pl.BlockSpec((None, block_kv, heads * shape.d), kv_tile),
                pl.BlockSpec((None, block_kv, heads * shape.dv), kv_tile),
            ],
            out_specs=[
                pl.BlockSpec((None, block_q, heads * shape.g * shape.dv), q_tile),
                pl.BlockSpec((None, heads * shape.g, 1, block_q), lse_tile),
            ],
            scratch_shapes=[
                pltpu.VMEM((heads, rows, shape.d), q.dtype),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, LANES), jnp.float32),
                pltpu.VMEM((heads, rows, shape.dv), jnp.float32),
            ],
        ),
        out_shape=[
            output((shape.b, shape.tq, shape.hq * shape.dv), q.dtype, like=q),
            output((shape.b, shape.hq, 1, num_q_tiles * block_q), jnp.float32, like=q),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * visible_pairs * (shape.d + shape.dv),
            transcendentals=visible_pairs,
            bytes_accessed=(q.size + k.size + v.size + shape.b * shape.tq * shape.hq * shape.dv) * q.dtype.itemsize,
        ),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        out, lse = call(*scalars.values(), *(x.reshape(*x.shape[:2], -1) for x in (q, k, v)))
    return out.reshape(shape.b, shape.tq, shape.hq, shape.dv), lse[:, :, 0, : shape.tq].swapaxes(1, 2)


def _block_q(shape: Shape, config: TpuConfig, dtype: Any) -> int:
    """The queries of a tile: no more than there are, rounded up to whole tiles in memory."""
    return min(config.block_q, tile.rounded(shape.tq, tile.sublanes(dtype)))


def _rows(operands: Operands, shape: Shape):
    """i32[3, b]: valid queries and keys of each row, and the position of its first query."""

    def full(n: int):
        return jnp.full(shape.b, n, jnp.int32)

    return jnp.stack(
        [
            full(shape.tq) if operands.q_len is None else jnp.minimum(operands.q_len, shape.tq),
            full(shape.tk) if operands.kv_len is None else jnp.minimum(operands.kv_len, shape.tk),
            full(0) if operands.q_offset is None else operands.q_offset,
        ]
    )


def _num_steps(shape: Shape, spec: AttentionSpec, block_q: int, block_kv: int) -> int:
    """Tiles of keys that a tile of queries can see at most."""
    num_tiles = pl.cdiv(shape.tk, block_kv)
    if spec.left is None or spec.right is None:
        return num_tiles
    return min(num_tiles, pl.cdiv(block_q + spec.left + spec.right - 1, block_kv) + 1)


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

    @classmethod
    def of(cls, row_ref, b, i, *, shape: Shape, spec: AttentionSpec, block_q: int, block_kv: int) -> "Span":
        """The Span of tile i of a batch row, whose lengths and offset are in row_ref."""
        q_len, kv_len, offset = (row_ref[at, b] for at in range(3))
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
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            offset=offset,
            first=first,
            end=end,
            tile_first=_divided(first, block_kv),
            tile_end=_divided(end + block_kv - 1, block_kv),
            whole_first=_divided(whole_first + block_kv - 1, block_kv),
            whole_end=_divided(whole_end, block_kv),
        )


def _divided(n, block: int):
    return lax.div(jnp.int32(n), jnp.int32(block))


def _flash_kernel(
    *refs,  # scalars by `names`; q [block_q, heads*g*d], k [block_kv, heads*d], v [block_kv, heads*dv];
    # o [block_q, heads*g*dv], lse [heads*g, 1, block_q]; q rows [heads, g*block_q, d], m, l [heads, g*block_q, LANES],
    # acc [heads, g*block_q, dv]
    names: tuple[str, ...],
    shape: Shape,
    heads: int,
    spec: AttentionSpec,
    block_q: int,
    block_kv: int,
    ragged: bool,  # some tiles have fewer keys
    all_seen: bool,  # no key may contain anything
):
    ref = dict(zip(names, refs, strict=False))
    q_ref, k_ref, v_ref, o_ref, lse_ref, rows_ref, m_ref, l_ref, acc_ref = refs[len(names) :]
    g, d, dv = shape.g, shape.d, shape.dv
    b, block, i, step = (pl.program_id(axis) for axis in range(4))
    span = Span.of(ref["rows"], b, i, shape=shape, spec=spec, block_q=block_q, block_kv=block_kv)
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
            q = q_ref[:, head * d : (head + 1) * d]
            rows_ref[h, rows] = q if scores.sign == 1.0 else q * scores.sign

    def add_tile(*, edge: bool):
        key = n * block_kv + lax.broadcasted_iota(jnp.int32, (1, block_kv), 1)
        row = first_row + lax.rem(lax.broadcasted_iota(jnp.int32, (g * block_q, 1), 0), jnp.int32(block_q))
        position = row + span.offset
        for h in range(heads):
            keys, values = k_ref[:, h * d : (h + 1) * d], v_ref[:, h * dv : (h + 1) * dv]
            bias = None
            if "alibi_slopes" in ref:
                slopes = ref["alibi_slopes"]
                place = b if slopes.shape[0] > 1 else 0
                of_rows = per_row([slopes[place, first_head + h * g + j] for j in range(g)], block_kv)
                bias = of_rows * -jnp.abs(position - key).astype(jnp.float32)
            raw = scores.raw(tile.product(rows_ref[h], keys, transposed=True), bias)
            if edge:
                # rows past the last query may see anything: nothing of theirs is used
                conditions = [key < span.kv_len] if ragged else []
                if spec.left is not None:
                    conditions.append(key >= position - spec.left)
                if spec.right is not None:
                    conditions.append(key <= position + spec.right)
                raw = functools.reduce(lambda raw, seen: jnp.where(seen, raw, -jnp.inf), conditions, raw)
            if edge and not all_seen:
                # keys that the tile does not see may contain anything, and 0 * NaN is NaN
                at = n * block_kv + lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where((at >= span.first) & (at < span.end), values, 0)
            tile.add_to_softmax(m_ref.at[h], l_ref.at[h], acc_ref.at[h], raw, values, scores.factor)

    is_whole = (n >= span.whole_first) & (n < span.whole_end)
    pl.when((n < span.tile_end) & is_whole)(functools.partial(add_tile, edge=False))
    pl.when((n < span.tile_end) & ~is_whole)(functools.partial(add_tile, edge=True))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        row = first_row + lax.broadcasted_iota(jnp.int32, (block_q, LANES), 0)
        for h, head, rows in each_query_head():
            m, l = m_ref[h, rows], jnp.where(row < span.q_len, l_ref[h, rows], 0.0)
            sinks = jnp.full_like(l, ref["sinks"][first_head + head]) if "sinks" in ref else None
            out = tile.normalized(acc_ref[h, rows], m, l, scores, sinks)
            o_ref[:, head * dv : (head + 1) * dv] = out.astype(o_ref.dtype)
            lse_ref[head] = jnp.transpose(scores.log_sum_exp(m, l))[:1]
