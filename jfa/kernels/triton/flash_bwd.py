"""Flash attention backward as Pallas-Triton kernels, for AMD and NVIDIA GPUs.

Weights are recomputed from the log-sum-exp. Three kernels, without atomics, so that results are bitwise reproducible:

  flash_attention_dq    one program for each tile of queries and query head; it loops over the tiles of keys
  flash_attention_dkv   one program for each tile of keys and key head; it loops over the query heads of its group and
                        their tiles. Scores are computed transposed, so that neither product needs a transpose
  flash_attention_dbias one program for each tile of the bias; it loops over all scores that the tile was added to

With a BlockMask their names start with block_sparse_attention.

If p are the weights, do is the cotangent of the output, and delta = sum(do * output) for each row, then
ds = p (do v^T - delta). The cotangent of the residual is subtracted from delta.

The kernels are in one file because they share their operands, their checks and the loop over tiles.

Source: arXiv:2307.08691, algorithm 2 and section 3.1.2. Scores are defined in tile.py. Forward: flash.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.block_mask import BlockMask
from jfa.kernels.common import Shape, output, row_terms, tiles_in_common
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import fma
from jfa.kernels.triton.flash import name_of, tiles_of, visits_of
from jfa.kernels.triton.tile import (
    Tile,
    arguments,
    chunks,
    divided,
    kind_of,
    later,
    load_rows,
    once,
    padded,
    product,
    safe_config,
    sum_of_products,
    whole_tiles,
)
from jfa.types import AttentionSpec, DeviceInfo, FlashConfig, Operands

# (kernel, kind): {largest head_dim: (block_q, block_kv, num_warps)}
_SAFE_TILES = {
    ("dq", "cdna"): {64: (128, 32, 4), 128: (128, 32, 4), 256: (64, 16, 4)},
    ("dkv", "cdna"): {64: (32, 128, 4), 128: (32, 128, 4), 256: (16, 64, 4)},
    ("dq", "rdna"): {64: (64, 16, 4), 128: (64, 16, 4), 256: (32, 16, 4)},
    ("dkv", "rdna"): {64: (16, 64, 4), 128: (16, 64, 8), 256: (16, 16, 8)},
    ("dq", "cuda"): {64: (64, 64, 4), 128: (64, 32, 4), 256: (32, 32, 4)},
    ("dkv", "cuda"): {64: (32, 64, 4), 128: (32, 64, 4), 256: (32, 32, 8)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """The configurations of the kernels of the backward pass. The bias kernel uses that of dq."""

    dq: FlashConfig
    dkv: FlashConfig


def default_config(operands: Operands, device: DeviceInfo) -> BackwardConfig:
    """Tile sizes with few or no spills on the architectures of this kind; tuning tables have better ones."""
    kind = kind_of(device)
    widest = max(operands.q.shape[3], operands.v.shape[3])

    def config(kernel: str) -> FlashConfig:
        safe = safe_config(_SAFE_TILES[kernel, kind], kind, widest, block_d=32 if kind == "rdna" else None)
        if operands.q.dtype != jnp.float32:
            return safe
        # float32 needs twice the registers
        halves = max(16, safe.block_q // 2), max(16, safe.block_kv // 2)
        return dataclasses.replace(safe, block_q=halves[0], block_kv=halves[1])

    return BackwardConfig(dq=config("dq"), dkv=config("dkv"))


def flash_attention_bwd(
    operands: Operands,
    out: Float[Array, "b tq hq dv"],
    lse: Float[Array, "b tq hq"],
    d_out: Float[Array, "b tq hq dv"],
    d_lse: Float[Array, "b tq hq"],
    *,
    spec: AttentionSpec,
    config: BackwardConfig,
    interpret: bool,
    mask: BlockMask | None = None,
) -> Operands:
    """The cotangents of q, k, v, bias, sinks and alibi_slopes; None for operands without one.

    The gradient of a broadcast bias is summed in the kernel, into an array of the bias's own shape.

    mask: visits its tiles only; the tiles of config divide them.
    """
    q, k, v = operands.q, operands.k, operands.v
    d_out, lse, delta, d_sinks = row_terms(operands, out, lse, d_out, d_lse)
    rows = _Rows(d_out=d_out, lse=lse.swapaxes(1, 2), delta=delta.swapaxes(1, 2))
    d_bias = None
    if min(q.size, v.size) == 0:
        dq, dk, dv, d_slopes = jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), None
        if operands.bias is not None:
            d_bias = jnp.zeros_like(operands.bias)
        if operands.alibi_slopes is not None:
            d_slopes = jnp.zeros_like(operands.alibi_slopes)
    else:
        with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
            dq, d_slopes = _dq(operands, rows, spec, config.dq, interpret, mask)
            dk, dv = _dkv(operands, rows, spec, config.dkv, interpret, mask)
            if operands.bias is not None:
                d_bias = _d_bias(operands, rows, spec, config.dq, interpret, mask)
    return Operands(q=dq, k=dk, v=dv, bias=d_bias, sinks=d_sinks, alibi_slopes=d_slopes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """The backward pass's inputs for each query row. lse is inf for rows that saw no key.

    The rows of a head are contiguous in lse and delta, so that a lane loads several at once.
    """

    d_out: Float[Array, "b tq hq dv"]
    lse: Float[Array, "b hq tq"]
    delta: Float[Array, "b hq tq"]


def _dq(
    operands: Operands, rows: _Rows, spec: AttentionSpec, config: FlashConfig, interpret: bool, mask: BlockMask | None
):
    """The cotangents of q and of the slopes (None if there are none)."""
    shape = Shape.of(operands)
    config = dataclasses.replace(config, block_q=min(config.block_q, max(16, pl.next_power_of_2(shape.tq))))
    num_q_tiles = pl.cdiv(shape.tq, config.block_q)
    keys = whole_tiles(shape.tk, config.block_kv)

    def q_tile(h, i, b):
        return b, num_q_tiles - 1 - i, h, 0

    def row_tile(h, i, b):
        return b, h, num_q_tiles - 1 - i

    def all_keys(h, i, b):
        return b, 0, lax.div(h, shape.g), 0

    q_spec = pl.BlockSpec((None, config.block_q, None, padded(shape.d)), q_tile)
    row_spec = pl.BlockSpec((None, None, config.block_q), row_tile)
    named = {
        "q": (operands.q, q_spec),
        "k": (operands.k, pl.BlockSpec((None, keys, None, padded(shape.d)), all_keys)),
        "v": (operands.v, pl.BlockSpec((None, keys, None, padded(shape.dv)), all_keys)),
        "do": (rows.d_out, pl.BlockSpec((None, config.block_q, None, padded(shape.dv)), q_tile)),
        "lse": (rows.lse, row_spec),
        "delta": (rows.delta, row_spec),
        **arguments(operands, config),
    }
    if mask is not None:
        named |= visits_of(mask, mask.seen(operands, spec), mask.block_q // config.block_q, 1, row_tile)
    elif operands.q_segments is not None and operands.kv_segments is not None:
        ranges = tiles_in_common(operands.q_segments, operands.kv_segments, config.block_q, config.block_kv)
        named["tiles"] = ranges, pl.BlockSpec((None, None, 2), lambda h, i, b: (b, num_q_tiles - 1 - i, 0))
    outputs = [(output(operands.q.shape, operands.q.dtype, like=operands.q), q_spec)]
    if operands.alibi_slopes is not None:
        outputs.append((output(rows.lse.shape, jnp.float32, like=operands.q), row_spec))
    dq, *slopes = _call(
        functools.partial(_dq_kernel, names=tuple(named), shape=shape, spec=spec, config=config),
        name_of("attention_dq", mask),
        (shape.hq, num_q_tiles, shape.b),
        named,
        outputs,
        config,
        interpret,
    )
    if operands.alibi_slopes is None:
        return dq, None
    d_slopes = slopes[0].sum(2)
    if len(operands.alibi_slopes) == 1:
        d_slopes = d_slopes.sum(0, keepdims=True)
    return dq, d_slopes.astype(operands.alibi_slopes.dtype)


def _dkv(
    operands: Operands, rows: _Rows, spec: AttentionSpec, config: FlashConfig, interpret: bool, mask: BlockMask | None
):
    """The cotangents of k and v."""
    shape = Shape.of(operands)
    config = dataclasses.replace(config, block_kv=min(config.block_kv, max(16, pl.next_power_of_2(shape.tk))))
    queries = whole_tiles(shape.tq, config.block_q)

    def kv_tile(h, j, b):
        return b, j, h, 0

    def group(h, j, b):
        return b, 0, h, 0

    def group_rows(h, j, b):
        return b, h, 0

    k_spec = pl.BlockSpec((None, config.block_kv, None, padded(shape.d)), kv_tile)
    v_spec = pl.BlockSpec((None, config.block_kv, None, padded(shape.dv)), kv_tile)
    row_spec = pl.BlockSpec((None, shape.g, queries), group_rows)
    named = {
        "q": (operands.q, pl.BlockSpec((None, queries, shape.g, padded(shape.d)), group)),
        "k": (operands.k, k_spec),
        "v": (operands.v, v_spec),
        "do": (rows.d_out, pl.BlockSpec((None, queries, shape.g, padded(shape.dv)), group)),
        "lse": (rows.lse, row_spec),
        "delta": (rows.delta, row_spec),
        **arguments(operands, config),
    }
    if mask is not None:
        visits, parts = mask.seen(operands, spec, transposed=True), mask.block_kv // config.block_kv
        named |= visits_of(mask, visits, parts, shape.g, lambda h, j, b: (b, h, j))
    elif operands.q_segments is not None and operands.kv_segments is not None:
        ranges = tiles_in_common(operands.kv_segments, operands.q_segments, config.block_kv, config.block_q)
        named["tiles"] = ranges, pl.BlockSpec((None, None, 2), lambda h, j, b: (b, j, 0))
    outputs = [
        (output(operands.k.shape, operands.k.dtype, like=operands.k), k_spec),
        (output(operands.v.shape, operands.v.dtype, like=operands.v), v_spec),
    ]
    return _call(
        functools.partial(_dkv_kernel, names=tuple(named), shape=shape, spec=spec, config=config),
        name_of("attention_dkv", mask),
        (shape.hkv, pl.cdiv(shape.tk, config.block_kv), shape.b),
        named,
        outputs,
        config,
        interpret,
    )


def _call(kernel, name: str, grid, named: dict[str, tuple[Any, Any]], outputs: list, config: FlashConfig, interpret):
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=[block for _, block in named.values()],
        out_specs=[block for _, block in outputs],
        out_shape=[shape for shape, _ in outputs],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )(*(array for array, _ in named.values()))


def _dq_kernel(*refs, names: tuple[str, ...], shape: Shape, spec: AttentionSpec, config: FlashConfig):
    ref = dict(zip(names, refs, strict=False))
    dq_ref, *slope_refs = refs[len(names) :]
    block_q, block_kv = config.block_q, config.block_kv
    tile = Tile.of(ref, shape=shape, spec=spec, config=config, row=pl.program_id(2), head=pl.program_id(0))
    first_row = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q
    q_rows = first_row + jnp.arange(block_q)
    in_bounds = q_rows < shape.tq
    lse = load(ref["lse"], mask=in_bounds, other=jnp.inf)
    delta = load(ref["delta"], mask=in_bounds, other=0.0)
    saw = lse != jnp.inf  # q and d_out of other rows may contain anything
    head_chunks, value_chunks = chunks(shape.d, config.block_d), chunks(shape.dv, config.block_d)

    def load_q(columns, start):
        q = load_rows(ref["q"], start, block_q, columns, width=shape.d, inside=saw)
        return q if tile.q_factor == 1.0 else q * tile.q_factor

    def load_do(columns, start):
        return load_rows(ref["do"], start, block_q, columns, width=shape.dv, inside=saw)

    q_of, do_of = once(load_q, head_chunks), once(load_do, value_chunks)
    span = tile.visited_keys(first_row, block_q, block_kv)
    zero_slope = jnp.zeros(block_q if slope_refs else 16, jnp.float32)

    def kv_tile(n, carry, *, edge: bool, kind=None):
        dq, d_slope = carry
        start = n * block_kv
        keys = start + jnp.arange(block_kv)
        inside = (keys >= span.first) & (keys < span.end) if edge else None
        rows, columns = q_rows[:, None], keys[None, :]

        def keys_of(x_ref, piece, width, inside=inside, at: Any = 0):
            return load_rows(x_ref, start + at, block_kv, piece, width=width, inside=inside)

        q_at, do_at, again = later(n, head_chunks), later(n, value_chunks), later(n, head_chunks, use=1)
        scores = sum_of_products((q_of(c, q_at), keys_of(ref["k"], c, shape.d)) for c in head_chunks)
        dp = sum_of_products((do_of(c, do_at), keys_of(ref["v"], c, shape.dv)) for c in value_chunks)
        ds, visible = score_gradient(
            tile, scores, dp, lse[:, None], delta[:, None], rows, columns, edge=edge, kind=kind
        )[1:]
        if slope_refs:
            d_slope = d_slope + (ds * tile.distance(rows, columns)).sum(1)
        ds = tile.rounded(ds * tile.early_scale, ref["k"].dtype)
        if tile.has_data_mask and visible is not None:
            seen = visible.astype(jnp.int32).max(0) > 0
            inside = seen if inside is None else inside & seen
        dq = tuple(
            part + product(ds, keys_of(ref["k"], c, shape.d, inside, again))
            for part, c in zip(dq, head_chunks, strict=True)
        )
        return dq, d_slope

    carry = tuple(jnp.zeros((block_q, size), jnp.float32) for _, size in head_chunks), zero_slope
    dq, d_slope = span.walk(kv_tile, carry)
    for part, (start, size) in zip(dq, head_chunks, strict=True):
        mask = in_bounds[:, None] & (start + jnp.arange(size) < shape.d)[None, :]
        part = part * (spec.sm_scale / tile.early_scale)
        store(dq_ref.at[:, pl.ds(start, size)], part.astype(dq_ref.dtype), mask=mask)
    for slope_ref in slope_refs:
        store(slope_ref, d_slope, mask=in_bounds)


def _dkv_kernel(*refs, names: tuple[str, ...], shape: Shape, spec: AttentionSpec, config: FlashConfig):
    ref = dict(zip(names, refs, strict=False))
    dk_ref, dv_ref = refs[len(names) :]
    block_q, block_kv = config.block_q, config.block_kv
    kv_head = pl.program_id(0)
    common = Tile.of(ref, shape=shape, spec=spec, config=config, row=pl.program_id(2), head=kv_head * shape.g)
    first_key = pl.program_id(1) * block_kv
    keys = first_key + jnp.arange(block_kv)
    inside_keys = keys < common.kv_len
    head_chunks, value_chunks = chunks(shape.d, config.block_d), chunks(shape.dv, config.block_d)

    def load_k(columns, start):
        return load_rows(ref["k"], start, block_kv, columns, width=shape.d, inside=inside_keys)

    def load_v(columns, start):
        return load_rows(ref["v"], start, block_kv, columns, width=shape.dv, inside=inside_keys)

    k_of, v_of = once(load_k, head_chunks), once(load_v, value_chunks)
    span = common.visited_queries(first_key, block_q, block_kv)

    def q_tile(n, carry, *, edge: bool, head, kind=None):
        dk, dv = carry
        start = n * block_q
        q_rows = start + jnp.arange(block_q)
        tile = dataclasses.replace(common, head=kv_head * shape.g + head)
        in_bounds = q_rows < shape.tq
        lse = load(ref["lse"].at[head, pl.ds(start, block_q)], mask=in_bounds, other=jnp.inf)
        delta = load(ref["delta"].at[head, pl.ds(start, block_q)], mask=in_bounds, other=0.0)
        saw = lse != jnp.inf

        def load_q(columns, at):
            return load_rows(ref["q"], start + at, block_q, columns, width=shape.d, inside=saw, head=head)

        def load_do(columns, at):
            return load_rows(ref["do"], start + at, block_q, columns, width=shape.dv, inside=saw, head=head)

        q_of, do_of = once(load_q, head_chunks), once(load_do, value_chunks)
        rows, columns = q_rows[None, :], keys[:, None]
        k_at, v_at = later(n, head_chunks), later(n, value_chunks)
        q_again, do_again = later(n, head_chunks, use=1), later(n, value_chunks, use=1)
        scores = sum_of_products((k_of(c, k_at), q_of(c, 0)) for c in head_chunks)
        if tile.q_factor != 1.0:
            scores = scores * tile.q_factor
        dp = sum_of_products((v_of(c, v_at), do_of(c, 0)) for c in value_chunks)
        p, ds, _ = score_gradient(tile, scores, dp, lse[None, :], delta[None, :], rows, columns, edge=edge, kind=kind)
        p, ds = tile.rounded(p, ref["do"].dtype), tile.rounded(ds * tile.early_scale, ref["q"].dtype)
        dv = tuple(part + product(p, do_of(c, do_again)) for part, c in zip(dv, value_chunks, strict=True))
        dk = tuple(part + product(ds, q_of(c, q_again)) for part, c in zip(dk, head_chunks, strict=True))
        return dk, dv

    carry = tuple(
        tuple(jnp.zeros((block_kv, size), jnp.float32) for _, size in pieces) for pieces in (head_chunks, value_chunks)
    )
    dk, dv = span.walk_heads(q_tile, carry, shape.g)
    in_bounds = keys < shape.tk
    scale = 1.0 / (1.0 - spec.dropout_rate)
    for out_ref, parts, pieces, width, factor in (
        (dk_ref, dk, head_chunks, shape.d, spec.sm_scale / common.early_scale),
        (dv_ref, dv, value_chunks, shape.dv, scale),
    ):
        for part, (start, size) in zip(parts, pieces, strict=True):
            mask = in_bounds[:, None] & (start + jnp.arange(size) < width)[None, :]
            store(out_ref.at[:, pl.ds(start, size)], (part * factor).astype(out_ref.dtype), mask=mask)


def score_gradient(tile: Tile, product_qk, dp, lse, delta, rows, keys, *, edge: bool, kind=None):
    """(p, ds, visible): the weights that multiply the values, the gradients of the scores before sm_scale, the mask.

    dp is do v^T; lse and delta broadcast against the scores. Dropped weights are 0; the others are not yet divided
    by 1 - dropout_rate.
    """
    scores = tile.raw(product_qk, rows, keys)
    visible = tile.visible(rows, keys, edge=edge, kind=kind)
    p = tile.weights(scores, lse * (1.0 / tile.unit))
    kept = tile.kept(rows, keys)
    if kept is not None:
        dp = jnp.where(kept, dp * (1.0 / (1.0 - tile.spec.dropout_rate)), 0.0)
    ds = p * (dp - delta)
    if tile.spec.softcap is not None:
        ds = ds * fma(scores, -scores, 1.0)
    if kept is not None:
        p = jnp.where(kept, p, 0.0)
    if visible is not None:
        p, ds = jnp.where(visible, p, 0.0), jnp.where(visible, ds, 0.0)
    return p, ds, visible


def _d_bias(
    operands: Operands, rows: _Rows, spec: AttentionSpec, config: FlashConfig, interpret: bool, mask: BlockMask | None
) -> Array:
    """The cotangent of the bias, in its own shape."""
    shape, bias = Shape.of(operands), operands.bias
    assert bias is not None
    queries, keys = whole_tiles(shape.tq, config.block_q), whole_tiles(shape.tk, config.block_kv)
    batches, heads, num_rows, num_keys = bias.shape

    def everything(*grid):
        return 0, 0, 0, 0

    def rows_of_all(*grid):
        return 0, 0, 0

    row_spec = pl.BlockSpec((shape.b, shape.hq, queries), rows_of_all)
    named = {
        "q": (operands.q, pl.BlockSpec((shape.b, queries, shape.hq, padded(shape.d)), everything)),
        "k": (operands.k, pl.BlockSpec((shape.b, keys, shape.hkv, padded(shape.d)), everything)),
        "v": (operands.v, pl.BlockSpec((shape.b, keys, shape.hkv, padded(shape.dv)), everything)),
        "do": (rows.d_out, pl.BlockSpec((shape.b, queries, shape.hq, padded(shape.dv)), everything)),
        "lse": (rows.lse, row_spec),
        "delta": (rows.delta, row_spec),
        **arguments(operands, config),
    }
    if mask is not None:
        grid_of_kinds = mask.grid()
        named["grid"] = grid_of_kinds, pl.BlockSpec(grid_of_kinds.shape, everything)
        named["mask_tiles"] = tiles_of(mask)
    block = (None, None, config.block_q if num_rows > 1 else None, config.block_kv if num_keys > 1 else None)
    # batch and head share an axis of the grid, which has at most three
    grid = (
        pl.cdiv(num_keys, config.block_kv) if num_keys > 1 else 1,
        pl.cdiv(num_rows, config.block_q) if num_rows > 1 else 1,
        batches * heads,
    )
    out_spec = pl.BlockSpec(block, lambda j, i, n: (lax.div(n, heads), lax.rem(n, heads), i, j))
    [d_bias] = _call(
        functools.partial(
            _d_bias_kernel, names=tuple(named), shape=shape, spec=spec, config=config, bias_shape=bias.shape
        ),
        name_of("attention_dbias", mask),
        grid,
        named,
        [(output(bias.shape, bias.dtype, like=bias), out_spec)],
        config,
        interpret,
    )
    return d_bias


def _d_bias_kernel(
    *refs, names: tuple[str, ...], shape: Shape, spec: AttentionSpec, config: FlashConfig, bias_shape: tuple[int, ...]
):
    ref = dict(zip(names, refs, strict=False))
    out_ref = refs[len(names)]
    block_q, block_kv = config.block_q, config.block_kv
    batches, heads, num_rows, num_keys = bias_shape
    key_program, row_program, place = (pl.program_id(axis) for axis in range(3))
    # number of steps along each axis along which the bias was broadcast
    all_batches, all_heads = (shape.b if batches == 1 else 1), (shape.hq if heads == 1 else 1)
    all_rows = pl.cdiv(shape.tq, block_q) if num_rows == 1 else 1
    all_keys = pl.cdiv(shape.tk, block_kv) if num_keys == 1 else 1

    def step(n, acc):
        n, key_tile = divided(n, all_keys)
        n, row_tile = divided(n, all_rows)
        batch, head = divided(n, all_heads)
        row = batch if batches == 1 else lax.div(place, jnp.int32(heads))
        head = head if heads == 1 else lax.rem(place, jnp.int32(heads))
        q_start = (row_tile if num_rows == 1 else row_program) * block_q
        k_start = (key_tile if num_keys == 1 else key_program) * block_kv
        tile = Tile.of(ref, shape=shape, spec=spec, config=config, row=row, head=head)
        span = tile.keys_of(q_start, block_q, block_kv)
        kind = _kind(ref, row, head, q_start, k_start)
        is_seen = (k_start < span.end) & (k_start + block_kv > span.first)
        return lax.cond(
            is_seen if kind is None else is_seen & (kind >= 0),
            lambda: acc + _bias_tile(tile, ref, row, head, q_start, k_start, span, kind),
            lambda: acc,
        )

    acc = jnp.zeros((block_q, block_kv), jnp.float32)
    acc = lax.fori_loop(0, all_batches * all_heads * all_rows * all_keys, step, acc)
    q_rows, keys = row_program * block_q + jnp.arange(block_q), key_program * block_kv + jnp.arange(block_kv)
    if num_rows == 1 and num_keys == 1:
        out_ref[...] = acc.sum().astype(out_ref.dtype)
    elif num_rows == 1:
        store(out_ref, acc.sum(0).astype(out_ref.dtype), mask=keys < shape.tk)
    elif num_keys == 1:
        store(out_ref, acc.sum(1).astype(out_ref.dtype), mask=q_rows < shape.tq)
    else:
        mask = (q_rows < shape.tq)[:, None] & (keys < shape.tk)[None, :]
        store(out_ref, acc.astype(out_ref.dtype), mask=mask)


def _kind(ref: dict[str, Any], row, head, q_start, k_start):
    """The index of a BlockMask's tile, or -1 where it is not visited; None without such a mask."""
    if "grid" not in ref:
        return None
    batches, heads = ref["grid"].shape[:2]
    _, block_q, block_kv = ref["mask_tiles"].shape
    tile = lax.div(q_start, jnp.int32(block_q)), lax.div(k_start, jnp.int32(block_kv))
    return ref["grid"][row if batches > 1 else 0, head if heads > 1 else 0, *tile]


def _bias_tile(
    tile: Tile, ref: dict[str, Any], row, head, q_start, k_start, span, kind
) -> Float[Array, "block_q block_kv"]:
    """The gradient of one tile of scores."""
    shape, config = tile.shape, tile.config
    block_q, block_kv = config.block_q, config.block_kv
    q_rows, keys = q_start + jnp.arange(block_q), k_start + jnp.arange(block_kv)
    in_bounds = q_rows < shape.tq
    kv_head = lax.div(head, jnp.int32(shape.g))
    lse = load(ref["lse"].at[row, head, pl.ds(q_start, block_q)], mask=in_bounds, other=jnp.inf)
    delta = load(ref["delta"].at[row, head, pl.ds(q_start, block_q)], mask=in_bounds, other=0.0)
    saw, inside = lse != jnp.inf, (keys >= span.first) & (keys < span.end)

    def pairs(rows_name: str, keys_name: str, width: int):
        for columns in chunks(width, config.block_d):
            yield (
                load_rows(ref[rows_name], q_start, block_q, columns, width=width, inside=saw, head=head, row=row),
                load_rows(
                    ref[keys_name], k_start, block_kv, columns, width=width, inside=inside, head=kv_head, row=row
                ),
            )

    scores = sum_of_products(pairs("q", "k", shape.d))
    dp = sum_of_products(pairs("do", "v", shape.dv))
    rows, columns = q_rows[:, None], keys[None, :]
    return score_gradient(tile, scores, dp, lse[:, None], delta[:, None], rows, columns, edge=True, kind=kind)[1]
