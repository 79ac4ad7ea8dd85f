"""Flash attention forward as a Pallas-Triton kernel, for AMD and NVIDIA GPUs.

One program computes `block_q` queries of one head and loops over the tiles of keys that any of them may see, with a
running maximum and sum. Tiles that every query sees completely are processed by a loop without positional masks; the
tiles at the edges (diagonal, window, lengths) by another one. Query heads of a group read the same keys: no copies are
made. With a BlockMask, a program loops over the tiles of its list instead.

Scores are in base-2 units, since the hardware has exp2 but no exp. If scaled products without bias, ALiBi and soft cap
exceed about 1e7, subtracting the maximum, which is fused with the scaling, loses too much float32 precision, and the
weights of a row may be wrong. Other scores have no such limit.

Source: arXiv:2307.08691, algorithm 1. Scores are defined in tile.py. Backward: flash_bwd.py. Tested in tests/jfa/.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.block_mask import BlockMask, Visits
from jfa.kernels.common import Shape, output, tiles_in_common
from jfa.kernels.triton._pallas import CompilerParams, pl, store
from jfa.kernels.triton._primitives import exp2, fma
from jfa.kernels.triton.tile import (
    LOG2_E,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    Tile,
    arguments,
    chunks,
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

# {largest head_dim: (block_q, block_kv, num_warps)}. RDNA has half the registers for a wave's tile and no float32
# matrix instruction.
_SAFE_TILES = {
    ("cdna", "16 bits"): {64: (128, 64, 4), 128: (128, 32, 4), 256: (64, 16, 4)},
    ("cdna", "float32"): {64: (64, 32, 4), 128: (64, 16, 4), 256: (32, 16, 4)},
    ("rdna", "16 bits"): {64: (64, 32, 4), 128: (64, 16, 8), 256: (64, 16, 4)},
    ("rdna", "float32"): {64: (64, 16, 8), 128: (32, 16, 8), 256: (16, 16, 8)},
    ("cuda", "16 bits"): {64: (128, 64, 8), 128: (64, 64, 4), 256: (64, 32, 8)},
    ("cuda", "float32"): {64: (64, 32, 8), 128: (32, 16, 8), 256: (32, 16, 8)},
}


def default_config(operands: Operands, device: DeviceInfo) -> FlashConfig:
    """Tile sizes with few or no spills on all tested architectures of this kind; tuning tables have better ones."""
    kind, exact = kind_of(device), operands.q.dtype == jnp.float32
    widest = max(operands.q.shape[3], operands.v.shape[3])
    block_d = (64 if exact else 32) if kind == "rdna" and widest > 128 else None
    return safe_config(_SAFE_TILES[kind, "float32" if exact else "16 bits"], kind, widest, block_d=block_d)


def why_not(operands: Operands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    for name, x in (("query", operands.q), ("key", operands.k)):
        if not all(isinstance(n, int) for n in x.shape):
            return f"a kernel's grid has a static size, but {name} has the symbolic shape {x.shape}"
    for name, head_dim in (("head_dim", operands.q.shape[3]), ("the head_dim of value", operands.v.shape[3])):
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
            return f"{name} must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
    return None


def flash_attention(
    operands: Operands, *, spec: AttentionSpec, config: FlashConfig, interpret: bool, mask: BlockMask | None = None
) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """Attention and the natural log-sum-exp, as reference.attention defines them.

    Not differentiable by itself: ops.dot_product_attention pairs it with flash_bwd.flash_attention_bwd.

    mask: visits its tiles only; the tiles of config divide them.
    """
    q, k, v = operands.q, operands.k, operands.v
    shape = Shape.of(operands)
    if min(q.size, v.size) == 0:
        empty = jnp.full((shape.b, shape.tq, shape.hq), -jnp.inf, jnp.float32)
        return jnp.zeros((*empty.shape, shape.dv), q.dtype), empty
    # a short chunk does not need a full tile of queries
    config = dataclasses.replace(config, block_q=min(config.block_q, max(16, pl.next_power_of_2(shape.tq))))
    num_q_tiles = pl.cdiv(shape.tq, config.block_q)
    keys = whole_tiles(shape.tk, config.block_kv)

    def q_tile(h, i, b):
        # the longest programs of a causal grid start first, so that none of them runs alone at the end
        return b, num_q_tiles - 1 - i, h, 0

    def all_keys(h, i, b):
        return b, 0, lax.div(h, shape.g), 0

    def lse_tile(h, i, b):
        return b, num_q_tiles - 1 - i, h

    def list_of(h, i, b):
        return b, h, num_q_tiles - 1 - i

    named = {
        "q": (q, pl.BlockSpec((None, config.block_q, None, padded(shape.d)), q_tile)),
        "k": (k, pl.BlockSpec((None, keys, None, padded(shape.d)), all_keys)),
        "v": (v, pl.BlockSpec((None, keys, None, padded(shape.dv)), all_keys)),
        **arguments(operands, config),
    }
    if mask is not None:
        named |= visits_of(mask, mask.seen(operands, spec), mask.block_q // config.block_q, 1, list_of)
    elif operands.q_segments is not None and operands.kv_segments is not None:
        ranges = tiles_in_common(operands.q_segments, operands.kv_segments, config.block_q, config.block_kv)
        named["tiles"] = ranges, pl.BlockSpec((None, None, 2), lambda h, i, b: (b, num_q_tiles - 1 - i, 0))
    call = pl.pallas_call(
        functools.partial(_flash_kernel, names=tuple(named), shape=shape, spec=spec, config=config),
        name=name_of("attention", mask),
        grid=(shape.hq, num_q_tiles, shape.b),
        in_specs=[block for _, block in named.values()],
        out_specs=[
            pl.BlockSpec((None, config.block_q, None, padded(shape.dv)), q_tile),
            pl.BlockSpec((None, config.block_q, None), lse_tile),
        ],
        out_shape=[
            output((shape.b, shape.tq, shape.hq, shape.dv), q.dtype, like=q),
            output((shape.b, shape.tq, shape.hq), jnp.float32, like=q),
        ],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        return call(*(array for array, _ in named.values()))


def name_of(part: str, mask: BlockMask | None) -> str:
    """The name of a kernel's Pallas call."""
    return f"{'flash' if mask is None else 'block_sparse'}_{part}"


def visits_of(mask: BlockMask, visits: Visits, parts: int, heads: int, place) -> dict[str, tuple[Any, Any]]:
    """The lists of a BlockMask that tile.Listed reads, by name, as (array, BlockSpec), and the mask's tiles.

    Args:
      visits: those of the mask's tiles of queries, or of keys.
      parts: number of programs for one of these tiles.
      heads: query heads of a program.
      place: (batch row, block of heads, tile) of a program, from its indices in the grid.
    """
    b, h, _, width = visits.indices.shape
    held = heads if h > 1 else 1

    def per_tile(*grid):
        row, head, tile = place(*grid)
        return row if b > 1 else 0, head if h > 1 else 0, lax.div(tile, parts)

    numbers = pl.BlockSpec((None, held, None), per_tile)
    lists = pl.BlockSpec((None, held, None, width), lambda *grid: (*per_tile(*grid), 0))
    return {
        "visited": (visits.indices, lists),
        "kinds": (visits.kinds, lists),
        "num_whole": (visits.num_whole, numbers),
        "num_visited": (visits.num_visited, numbers),
        "mask_tiles": tiles_of(mask),
    }


def tiles_of(mask: BlockMask) -> tuple[Array, Any]:
    """(array, BlockSpec) of the distinct tiles of a BlockMask; Triton has no boolean arrays in memory."""
    return mask.tiles.astype(jnp.int8), pl.BlockSpec(mask.tiles.shape, lambda *grid: (0, 0, 0))


def _flash_kernel(
    *refs,  # the arguments by `names`, then outputs: o [block_q, dv], lse [block_q]
    names: tuple[str, ...],
    shape: Shape,
    spec: AttentionSpec,
    config: FlashConfig,
):
    *inputs, o_ref, lse_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    block_q, block_kv = config.block_q, config.block_kv
    q_ref, k_ref, v_ref = ref["q"], ref["k"], ref["v"]
    tile = Tile.of(ref, shape=shape, spec=spec, config=config, row=pl.program_id(2), head=pl.program_id(0))
    q_len = tile.q_len
    first_row = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q
    q_rows = first_row + jnp.arange(block_q)
    head_chunks, value_chunks = chunks(shape.d, config.block_d), chunks(shape.dv, config.block_d)

    def load_q(columns, start):
        q = load_rows(q_ref, start, block_q, columns, width=shape.d, inside=q_rows < q_len)
        return q if tile.q_factor == 1.0 else q * tile.q_factor

    q_of = once(load_q, head_chunks)

    span = tile.visited_keys(first_row, block_q, block_kv)

    def kv_tile(n, carry, *, edge: bool, kind=None):
        acc, m, l = carry
        start = n * block_kv
        keys = start + jnp.arange(block_kv)
        # keys that the tile does not see may contain anything, and 0 * NaN is NaN
        inside = (keys >= span.first) & (keys < span.end) if edge else None
        scores = sum_of_products(
            (q_of(c, later(n, head_chunks)), load_rows(k_ref, start, block_kv, c, width=shape.d, inside=inside))
            for c in head_chunks
        )
        rows, columns = q_rows[:, None], keys[None, :]
        scores = tile.raw(scores, rows, columns)
        visible = tile.visible(rows, columns, edge=edge, kind=kind)
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        m_next = jnp.maximum(m, tile.maximum(scores))
        # until a row sees its first key its maximum is -inf, and (-inf) - (-inf) is NaN
        guarded = visible is not None or tile.may_be_minus_infinity
        m_safe = jnp.where(m_next == -jnp.inf, 0.0, m_next) if guarded else m_next
        p = tile.weights(scores, m_safe[:, None])
        rescale = tile.rescale(m, m_safe)
        l = fma(l, rescale, p.sum(1))
        kept = tile.kept(rows, columns)
        if kept is not None:
            p = jnp.where(kept, p, 0.0)
        p = tile.rounded(p, v_ref.dtype)
        if tile.has_data_mask and visible is not None:
            # mask values that no query of the tile sees; needs a reduction, so only for masks given as data
            seen = visible.astype(jnp.int32).max(0) > 0
            inside = seen if inside is None else inside & seen
        acc = tuple(
            part * rescale[:, None]
            + product(p, load_rows(v_ref, start, block_kv, columns, width=shape.dv, inside=inside))
            for part, columns in zip(acc, value_chunks, strict=True)
        )
        return acc, m_next, l

    carry = (
        tuple(jnp.zeros((block_q, size), jnp.float32) for _, size in value_chunks),
        jnp.full(block_q, -jnp.inf, jnp.float32),
        jnp.zeros(block_q, jnp.float32),
    )
    acc, m, l = span.walk(kv_tile, carry)

    empty = (l == 0.0) | (q_rows >= q_len)
    m = jnp.where(empty, 0.0, m * tile.unit)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log2(jnp.where(empty, 1.0, l)) / LOG2_E)
    if "sinks" in ref:
        l = l + exp2((ref["sinks"][tile.head] - m) * LOG2_E)
    norm = jnp.where(empty, 0.0, (1.0 / (1.0 - spec.dropout_rate)) / jnp.where(empty, 1.0, l))
    in_bounds = q_rows < shape.tq
    for part, (start, size) in zip(acc, value_chunks, strict=True):
        out = jnp.where(empty[:, None], 0.0, part * norm[:, None])
        mask = in_bounds[:, None] & (start + jnp.arange(size) < shape.dv)[None, :]
        store(o_ref.at[:, pl.ds(start, size)], out.astype(o_ref.dtype), mask=mask)
    store(lse_ref, lse, mask=in_bounds)
