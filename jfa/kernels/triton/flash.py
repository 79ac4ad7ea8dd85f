"""Flash attention forward as a Pallas kernel, through Triton: AMD and NVIDIA GPUs.

One program owns `block_q` queries of one head and walks over the tiles of keys that some of them may see, with a
running maximum and sum. Tiles that every query sees whole take a loop without masks; the tiles at the edges (diagonal,
window, lengths) take another. Query heads of a group read the same keys: nothing is repeated in memory.

Scores are kept in units of log2, since the hardware has exp2 and not exp. Where they exceed about 4e8 (natural units),
the subtraction of the maximum, fused with the scale, no longer resolves them in float32, and a row may come out wrong.

Source: arXiv:2307.08691, algorithm 1. Tested in tests/jfa/.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.triton._pallas import CompilerParams, dot, load, pl, store
from jfa.types import AttentionSpec, DeviceInfo, FlashConfig, Operands

LOG2_E = math.log2(math.e)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256

# Per head_dim, up to and including: block_q, block_kv, num_warps. RDNA has half the registers for a wave's tile and
# no float32 matrix instruction.
_SAFE_TILES = {
    ("cdna", "16 bits"): {64: (128, 64, 4), 128: (128, 32, 4), 256: (64, 16, 4)},
    ("cdna", "float32"): {64: (64, 32, 4), 128: (64, 16, 4), 256: (32, 16, 4)},
    ("rdna", "16 bits"): {64: (64, 32, 4), 128: (64, 16, 8), 256: (64, 16, 8)},
    ("rdna", "float32"): {64: (64, 16, 8), 128: (32, 16, 8), 256: (16, 16, 8)},
    ("cuda", "16 bits"): {64: (128, 64, 8), 128: (64, 64, 4), 256: (64, 32, 8)},
    ("cuda", "float32"): {64: (64, 32, 8), 128: (32, 16, 8), 256: (32, 16, 8)},
}


def default_config(operands: Operands, device: DeviceInfo) -> FlashConfig:
    """Tiles that spill nothing, or least, on all architectures of a kind that were tried; a table knows better."""
    if device.platform == "cuda":
        kind = "cuda"
    else:
        kind = "rdna" if device.arch.startswith("gfx1") else "cdna"
    tiles = _SAFE_TILES[kind, "float32" if operands.q.dtype == jnp.float32 else "16 bits"]
    block_q, block_kv, num_warps = next(tile for limit, tile in tiles.items() if operands.q.shape[3] <= limit)
    # AMD's pipeliner spends registers that the tile needs
    return FlashConfig(block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=2 if kind == "cuda" else 1)


def why_not(operands: Operands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """What stands between this call and the kernel, as a sentence; None: nothing."""
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    head_dim = operands.q.shape[3]
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
    for name in ("bias", "mask"):
        if getattr(operands, name) is not None:
            return f"{name} is not built into the kernel yet"
    return None


def flash_attention(
    operands: Operands, *, spec: AttentionSpec, config: FlashConfig, interpret: bool
) -> tuple[Float[Array, "b tq hq d"], Float[Array, "b tq hq"]]:
    """Attention and the natural log-sum-exp, as reference.attention defines them.

    Not differentiable by itself: ops.dot_product_attention joins it to a backward pass.
    """
    q, k, v, _, _, *rows = operands
    b, tq, hq, d = q.shape
    tk, g = k.shape[1], operands.group_size
    if q.size == 0 or tk == 0:
        return jnp.zeros_like(q), jnp.full((b, tq, hq), -jnp.inf, jnp.float32)
    d_padded = _padded(d)
    # a short chunk needs no tile of full height
    block_q = min(config.block_q, max(16, pl.next_power_of_2(tq)))
    config = dataclasses.replace(config, block_q=block_q)
    num_q_tiles = pl.cdiv(tq, block_q)

    def q_tile(h, i, b):
        # the longest rows of a causal grid start first, so that no long one is left over at the end
        return b, num_q_tiles - 1 - i, h, 0

    def all_keys(h, i, b):
        return b, 0, lax.div(h, g), 0

    def lse_tile(h, i, b):
        return b, num_q_tiles - 1 - i, h

    def whole(h, i, b):
        return (0,)

    q_spec = pl.BlockSpec((None, block_q, None, d_padded), q_tile)
    # a whole number of tiles, so that a tile never starts outside the block; loads past the end are masked
    kv_spec = pl.BlockSpec((None, pl.cdiv(tk, config.block_kv) * config.block_kv, None, d_padded), all_keys)
    given = [x is not None for x in rows]
    present = [x.astype(jnp.int32) for x in rows if x is not None]
    call = pl.pallas_call(
        functools.partial(_flash_kernel, given=tuple(given), tq=tq, tk=tk, head_dim=d, spec=spec, config=config),
        name="flash_attention",
        grid=(hq, num_q_tiles, b),
        in_specs=[q_spec, kv_spec, kv_spec, *(pl.BlockSpec((b,), whole) for _ in present)],
        out_specs=[q_spec, pl.BlockSpec((None, block_q, None), lse_tile)],
        out_shape=[
            jax.ShapeDtypeStruct((b, tq, hq, d), q.dtype),
            jax.ShapeDtypeStruct((b, tq, hq), jnp.float32),
        ],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # a kernel's index arithmetic is int32 whatever JAX's default is
        return call(q, k, v, *present)


def _flash_kernel(
    q_ref,  # [block_q, d_padded]
    k_ref,  # [tk, d_padded]
    v_ref,  # [tk, d_padded]
    *refs,  # i32[b] of each per-row operand in use, then outputs: o [block_q, d_padded], lse [block_q]
    given: tuple[bool, ...],  # which of q_len, kv_len, q_offset are in use
    tq: int,
    tk: int,
    head_dim: int,
    spec: AttentionSpec,
    config: FlashConfig,
):
    *row_refs, o_ref, lse_ref = refs
    block_q, block_kv = config.block_q, config.block_kv
    row = pl.program_id(2)
    remaining = iter(row_refs)
    q_len, kv_len, offset = (next(remaining)[row] if used else None for used in given)
    q_len = tq if q_len is None else jnp.minimum(q_len, tq)
    kv_len = tk if kv_len is None else jnp.minimum(kv_len, tk)
    offset = 0 if offset is None else offset

    first_row = (pl.num_programs(1) - 1 - pl.program_id(1)) * block_q
    q_rows = first_row + jnp.arange(block_q)
    position = q_rows + offset
    dims = jnp.arange(q_ref.shape[1]) < head_dim
    q = load(q_ref, mask=(q_rows < q_len)[:, None] & dims[None, :], other=0.0)
    # a positive factor lets the maximum be taken before the multiplication: the sign of the scale, or 0, goes to q
    sm_scale = abs(spec.sm_scale) or 1.0
    factor = LOG2_E * (sm_scale if spec.softcap is None else spec.softcap)
    if spec.sm_scale <= 0:
        q = q * math.copysign(1.0 if spec.sm_scale else 0.0, spec.sm_scale)

    # keys that the tile's first and last row see, as [first, end); the last row sees the furthest in both directions
    first, end = 0, kv_len
    whole_first, whole_end = 0, kv_len
    if spec.left is not None:
        first = jnp.maximum(0, first_row + offset - spec.left)
        whole_first = jnp.maximum(0, first_row + block_q - 1 + offset - spec.left)
    if spec.right is not None:
        end = jnp.minimum(kv_len, first_row + block_q + offset + spec.right)
        whole_end = jnp.minimum(kv_len, first_row + 1 + offset + spec.right)
    # typed: Pallas (jax 0.12) lowers a choice between two weakly typed numbers as booleans
    end = jnp.where(first_row < q_len, jnp.int32(end), 0)
    tile_first, tile_end = _tile(first, block_kv), _tile(end + block_kv - 1, block_kv)
    whole_first = jnp.clip(_tile(whole_first + block_kv - 1, block_kv), tile_first, tile_end)
    whole_end = jnp.clip(_tile(whole_end, block_kv), whole_first, tile_end)

    def kv_tile(tile, carry, *, masked: bool):
        acc, m, l = carry
        start = tile * block_kv
        keys = start + jnp.arange(block_kv)
        inside = dims[None, :]
        if masked:
            # beyond what the tile sees may lie anything, NaN too, and 0 * NaN is NaN
            inside = inside & ((keys >= first) & (keys < end))[:, None]
        needs_mask = masked or head_dim != q_ref.shape[1]
        inside = jnp.broadcast_to(inside, (block_kv, q_ref.shape[1])) if needs_mask else None
        other = 0.0 if needs_mask else None
        at = pl.ds(start, block_kv)
        k = load(k_ref.at[at, :], mask=inside, other=other)
        scores = _dot(q, k, trans_b=True)
        if spec.softcap is not None:
            scores = jnp.tanh(scores * (sm_scale / spec.softcap))
        if masked:
            visible = (keys < kv_len)[None, :]
            if spec.left is not None:
                visible &= keys[None, :] >= (position - spec.left)[:, None]
            if spec.right is not None:
                visible &= keys[None, :] <= (position + spec.right)[:, None]
            scores = jnp.where(visible, scores, -jnp.inf)
        m_next = jnp.maximum(m, scores.max(1) * factor)
        # before a row has seen its first key its maximum is -inf, and (-inf) - (-inf) is NaN
        m_safe = jnp.where(m_next == -jnp.inf, 0.0, m_next) if masked else m_next
        p = jnp.exp2(scores * factor - m_safe[:, None])
        rescale = jnp.exp2(m - m_safe)
        v = load(v_ref.at[at, :], mask=inside, other=other)
        acc = acc * rescale[:, None] + _dot(p.astype(v.dtype), v)
        return acc, m_next, l * rescale + p.sum(1)

    carry = (
        jnp.zeros((block_q, q_ref.shape[1]), jnp.float32),
        jnp.full(block_q, -jnp.inf, jnp.float32),
        jnp.zeros(block_q, jnp.float32),
    )
    carry = lax.fori_loop(whole_first, whole_end, functools.partial(kv_tile, masked=False), carry)

    def edge_tile(n, carry):
        before = whole_first - tile_first
        tile = jnp.where(n < before, tile_first + n, whole_end + n - before)
        return kv_tile(tile, carry, masked=True)

    num_edge_tiles = jnp.maximum(0, (tile_end - tile_first) - (whole_end - whole_first))
    acc, m, l = lax.fori_loop(0, num_edge_tiles, edge_tile, carry)

    empty = (l == 0.0) | (q_rows >= q_len)
    l = jnp.where(empty, 1.0, l)
    in_bounds = q_rows < tq
    out = jnp.where(empty[:, None], 0.0, acc / l[:, None])
    store(o_ref, out.astype(o_ref.dtype), mask=in_bounds[:, None] & dims[None, :])
    store(lse_ref, jnp.where(empty, -jnp.inf, (m + jnp.log2(l)) / LOG2_E), mask=in_bounds)


def _dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
    """A product with float32 sums; float32 inputs are not rounded to tf32 on the way."""
    return dot(a, b, trans_b=trans_b, precision="highest" if a.dtype == jnp.float32 else None)


def _tile(key, block_kv: int):
    """The tile that a key lies in. Keys may be traced and are never negative where it matters (lax.div rounds to 0)."""
    return lax.div(key, block_kv) if not isinstance(key, int) else key // block_kv


def _padded(head_dim: int) -> int:
    """Arrays in a Triton kernel have power-of-two sizes; loads past head_dim are masked."""
    return max(MIN_HEAD_DIM, pl.next_power_of_2(head_dim))
