"""Paged attention as a Pallas-Triton kernel, for AMD and NVIDIA GPUs.

One program computes a tile of one row's queries. The tile contains all query heads of a key head, so that the keys are
read once for all of them. The program loops over its part of the row's keys, in tiles gathered through the page table:
block_kv is independent of page_size. If several programs split a row's keys (split-KV), partial results are float32 and
are merged by their log-sum-exp in a kernel of its own, merge.py.

  paged_decode_attention   one query per row: the tile is a group of heads; keys in pages, or row after row
  ragged_paged_attention   any number of queries per row, rows concatenated without padding

The scales of quantized keys are applied to the scores, and those of quantized values to the weights; the keys and
values themselves are never dequantized.

Sources: arXiv:2309.06180, section 4; split-KV: "Flash-Decoding for long-context inference" (Dao et al., 2023).
Scores are defined in tile.py. Tested in tests/jfa/test_paged_attention.py.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jfa import trees
from jfa.kernels.common import Shape, output
from jfa.kernels.triton import merge
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import exp2, fma
from jfa.kernels.triton.casts import bias, unit, widened
from jfa.kernels.triton.tile import (
    LOG2_E,
    MAX_HEAD_DIM,
    MIN_HEAD_DIM,
    Tile,
    chunks,
    kind_of,
    later,
    product,
    safe_config,
    sum_of_products,
)
from jfa.types import NULL_PAGE, AttentionSpec, DeviceInfo, Operands, PagedConfig, PagedOperands

# {largest head_dim: (block_q, block_kv, num_warps)}
_SAFE_DECODE = {
    ("cdna", "16 bits"): {64: (16, 64, 1), 128: (16, 32, 1), 256: (16, 16, 1)},
    ("cdna", "float32"): {64: (16, 32, 1), 128: (16, 16, 1), 256: (16, 16, 4)},
    ("rdna", "16 bits"): {64: (16, 16, 1), 128: (16, 16, 1), 256: (16, 16, 2)},
    ("rdna", "float32"): {64: (16, 16, 4), 256: (16, 16, 4)},
    ("cuda", "16 bits"): {64: (16, 64, 4), 128: (16, 32, 4), 256: (16, 32, 4)},
    ("cuda", "float32"): {64: (16, 32, 4), 128: (16, 16, 4), 256: (16, 16, 4)},
}
_SAFE_RAGGED = {
    ("cdna", "16 bits"): {64: (128, 16, 4), 128: (128, 16, 4), 256: (64, 16, 4)},
    ("cdna", "float32"): {64: (64, 16, 4), 128: (64, 16, 4), 256: (32, 16, 4)},
    ("rdna", "16 bits"): {64: (64, 16, 4), 128: (64, 16, 4), 256: (32, 16, 4)},
    ("rdna", "float32"): {64: (32, 16, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
    ("cuda", "16 bits"): {64: (64, 32, 4), 128: (64, 16, 4), 256: (32, 16, 4)},
    ("cuda", "float32"): {64: (32, 32, 4), 128: (32, 16, 4), 256: (32, 16, 8)},
}

MAX_GROUP_SIZE = 64
MAX_TREE = 128  # new tokens; 32 of them take a register of each row of a tile
_LEAST = 2.0**-40  # scales below give results that float16 cannot represent
_WAVES_PER_UNIT = 8  # for decode; waves hide each other's load latency
_SHORTEST_SPLIT = 256  # keys; fewer take less time than starting a program


def default_config(operands: PagedOperands, device: DeviceInfo) -> PagedConfig:
    """Tile sizes without spills on all tested architectures of this kind; tuning tables have better ones."""
    safe = _SAFE_DECODE if operands.query_start is None else _SAFE_RAGGED
    return _safe(safe, operands.q.dtype, max(operands.q.shape[2], operands.value_head_dim), device)


def default_config_of_rows(operands: Operands, device: DeviceInfo) -> PagedConfig:
    """default_config for attention_of_one_query."""
    return _safe(_SAFE_DECODE, operands.q.dtype, max(operands.q.shape[3], operands.v.shape[3]), device)


def _safe(tiles: Any, dtype: Any, widest: int, device: DeviceInfo) -> PagedConfig:
    kind = kind_of(device)
    tiles = tiles[kind, "float32" if dtype == jnp.float32 else "16 bits"]
    config = safe_config(tiles, kind, widest, block_d=32 if kind == "rdna" and widest > 64 else None)
    return PagedConfig(**dataclasses.asdict(config))


def why_not(operands: PagedOperands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    shape = _shape(operands)
    for name, head_dim in (("head_dim", shape.d), ("the head_dim of value", shape.dv)):
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
            return f"{name} must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
    if shape.g > MAX_GROUP_SIZE:
        return f"at most {MAX_GROUP_SIZE} query heads may share a key head, got {shape.g}"
    for name, pages in (("key_pages", operands.k_pages), ("value_pages", operands.v_pages)):
        if pages.dtype.itemsize == 1 and 2**31 <= pages.size <= 2**32:
            # Pallas (jax 0.12) uses signed 32-bit offsets for such an array
            return f"Pallas computes wrong addresses in {name} of 2 to 4 GiB with a one-byte dtype; use fewer pages"
    if operands.tree_mask is not None and operands.tree_mask.shape[1] > MAX_TREE:
        return f"a tree may have at most {MAX_TREE} new tokens, got a tree_mask for {operands.tree_mask.shape[1]}"
    return None


def num_splits(operands: PagedOperands, config: PagedConfig, device: DeviceInfo) -> int:
    """The number of programs that split a row's keys: enough to keep the device busy; 1 for ragged calls."""
    if config.num_splits is None and operands.query_start is not None:
        return 1
    return _parts(operands.kv_len.shape[0] * operands.num_kv_heads, operands.capacity, config, device)


def num_splits_of_rows(operands: Operands, config: PagedConfig, device: DeviceInfo) -> int:
    """num_splits for attention_of_one_query."""
    b, length, hkv, _ = operands.k.shape
    return _parts(b * hkv, length, config, device)


def _parts(programs: int, keys: int, config: PagedConfig, device: DeviceInfo) -> int:
    if config.num_splits is not None:
        return config.num_splits
    wanted = device.compute_units * max(1, _WAVES_PER_UNIT // config.num_warps)
    return max(1, min(wanted // max(1, programs), keys // _SHORTEST_SPLIT))


def paged_attention(
    operands: PagedOperands, *, spec: AttentionSpec, config: PagedConfig, num_splits: int, interpret: bool
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """Attention and the natural log-sum-exp, as reference.paged_attention defines them.

    Args:
      num_splits: number of programs that split a row's keys.
    """
    shape = _shape(operands)
    n, tokens = shape.tq, 1
    k_pages, v_pages = operands.pages_by_head
    arrays: dict[str, Any] = {
        "q": operands.q,
        # [slots, hkv, stored]: slot = page * page_size + place in the page
        "k": k_pages.reshape(-1, *k_pages.shape[2:]),
        "v": v_pages.reshape(-1, *v_pages.shape[2:]),
        "page_table": operands.page_table,
        "kv_len": operands.kv_len,
    }
    for name, scales in (("k_scales", operands.k_scales), ("v_scales", operands.v_scales)):
        if scales is not None:
            arrays[name] = scales.reshape(-1, shape.hkv)
    if operands.query_start is not None:
        tokens = _rows(config, shape) // shape.g
        arrays["query_start"] = operands.query_start
        arrays["tiles"] = _tiles_of_rows(operands.query_start, n, tokens)
    if operands.tree_mask is not None:
        assert operands.query_start is not None
        arrays["tree"] = _words(trees.seen(operands.tree_mask, operands.query_start, spec.left))
        if spec.left is not None:
            arrays["depths"] = trees.depths(operands.tree_mask, operands.query_start)
    out, lse = _call(
        arrays,
        operands.sinks,
        shape=shape,
        spec=spec,
        config=config,
        num_splits=num_splits,
        page_size=k_pages.shape[1],
        tokens=tokens,
        interpret=interpret,
    )
    if operands.query_start is not None:
        # no program writes the queries that belong to no row
        query = jnp.arange(n)
        own = (query >= operands.query_start[0]) & (query < operands.query_start[-1])
        out, lse = jnp.where(own[:, None, None], out, 0), jnp.where(own[:, None], lse, -jnp.inf)
    return out, lse


def takes(operands: Operands) -> bool:
    """Whether attention_of_one_query computes a call of flash attention that flash.why_not accepts."""
    known = ("q", "k", "v", "kv_len", "q_offset", "sinks")
    others = any(x is not None for name, x in operands._asdict().items() if name not in known)
    b, t = operands.q.shape[:2]
    return t == 1 and not others and b > 0 and operands.k.shape[1] > 0 and operands.group_size <= MAX_GROUP_SIZE


def attention_of_one_query(
    operands: Operands, *, spec: AttentionSpec, config: PagedConfig, num_splits: int, interpret: bool
) -> tuple[Float[Array, "b 1 hq dv"], Float[Array, "b 1 hq"]]:
    """flash.flash_attention for one query per row, as in a decode step: the slots of a row are its only page.

    A program of flash attention computes one head: it would read the keys once for each head of a group, one tile after
    another.
    """
    shape = Shape.of(operands)
    arrays = {
        "q": operands.q[:, 0],
        "k": operands.k.reshape(-1, *operands.k.shape[2:]),
        "v": operands.v.reshape(-1, *operands.v.shape[2:]),
    }
    arrays |= {name: x for name, x in (("kv_len", operands.kv_len), ("q_offset", operands.q_offset)) if x is not None}
    out, lse = _call(
        arrays,
        operands.sinks,
        shape=dataclasses.replace(shape, tq=shape.b),
        spec=spec,
        config=config,
        num_splits=num_splits,
        page_size=shape.tk,
        tokens=1,
        interpret=interpret,
    )
    return out[:, None], lse[:, None]


def _rows(config: PagedConfig, shape: Shape) -> int:
    """Rows of a tile: of the heads of a group, for one or more queries."""
    return max(config.block_q, pl.next_power_of_2(shape.g))


def _call(
    arrays: dict[str, Any],
    sinks: Float[Array, " hq"] | None,
    *,
    shape: Shape,
    spec: AttentionSpec,
    config: PagedConfig,
    num_splits: int,
    page_size: int,
    tokens: int,
    interpret: bool,
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """The kernel, for the arrays that it takes by name; tokens: queries of a tile."""
    q = arrays["q"]
    decodes = "query_start" not in arrays
    if sinks is not None and num_splits == 1:
        arrays = arrays | {"sinks": sinks.astype(jnp.float32)}
    outs = (shape.tq, shape.hq, shape.dv), (shape.tq, shape.hq)
    if num_splits > 1:
        outs = tuple((num_splits, *one) for one in outs)
    dtypes = q.dtype if num_splits == 1 else jnp.float32, jnp.float32
    call = pl.pallas_call(
        functools.partial(
            _paged_kernel,
            names=tuple(arrays),
            shape=shape,
            spec=spec,
            config=config,
            page_size=page_size,
            rows=_rows(config, shape),
            tokens=tokens,
        ),
        name="paged_decode_attention" if decodes else "ragged_paged_attention",
        grid=(shape.hkv, num_splits, shape.tq if decodes else len(arrays["tiles"])),
        in_specs=[_whole(x.shape) for x in arrays.values()],
        out_specs=[_whole(one) for one in outs],
        out_shape=[output(one, dtype, like=q) for one, dtype in zip(outs, dtypes, strict=True)],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        out, lse = call(*arrays.values())
    if num_splits == 1:
        return out, lse
    return merge.merged(out, lse, sinks, dtype=q.dtype, interpret=interpret)


def _shape(operands: PagedOperands) -> Shape:
    n, hq, d = operands.q.shape
    return Shape(
        b=operands.kv_len.shape[0],
        tq=n,
        tk=operands.capacity,
        hq=hq,
        hkv=operands.num_kv_heads,
        d=d,
        dv=operands.value_head_dim,
    )


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *grid: (0,) * len(shape))


def _tiles_of_rows(query_start: Array, n: int, tokens: int) -> Array:
    """i32[tiles, 2]: for each tile of queries, its row and the index of its first query in the row.

    The number of tiles is the maximum that n queries in b rows can need; unused tiles start after the last row's
    queries.
    """
    b = query_start.shape[0] - 1
    count = -(-jnp.diff(query_start) // tokens)
    end = jnp.cumsum(count)
    tile = jnp.arange(n // tokens + b)
    row = jnp.minimum(jnp.searchsorted(end, tile, side="right", method="compare_all"), b - 1)
    return jnp.stack([row, (tile - (end - count)[row]) * tokens], axis=1).astype(jnp.int32)


def _words(seen: Bool[Array, "n m"]) -> Int[Array, "n words"]:
    """Packs bits into 32-bit words; bit j % 32 of word j // 32 is column j. Bits past m are those of column m - 1."""
    n, m = seen.shape
    bits = jnp.pad(seen, ((0, 0), (0, -m % 32)), mode="edge").reshape(n, -1, 32).astype(jnp.uint32)
    words = (bits << jnp.arange(32, dtype=jnp.uint32)).sum(2, dtype=jnp.uint32)
    return lax.bitcast_convert_type(words, jnp.int32)


class _Piece(NamedTuple):
    """Stored columns that are loaded at a time. Packed 4-bit numbers unpack to two ranges of head_dim columns."""

    start: int
    size: int  # a power of two
    width: int  # number of stored columns; loads past it are masked
    firsts: tuple[int, ...]  # the head_dim columns that the first stored column contains


def _pieces(head_dim: int, pages: Any, block_d: int | None) -> tuple[_Piece, ...]:
    packed = pages == jnp.uint8
    stored = head_dim // 2 if packed else head_dim
    return tuple(
        _Piece(start, size, stored, (0, stored) if packed else (0,)) for start, size in chunks(stored, block_d)
    )


def _paged_kernel(
    *refs,  # the arguments by `names`, then outputs: o [n, hq, dv], lse [n, hq], or [splits, ...] of both
    names: tuple[str, ...],
    shape: Shape,
    spec: AttentionSpec,
    config: PagedConfig,
    page_size: int,
    rows: int,
    tokens: int,
):
    *inputs, o_ref, lse_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    block_kv, g, dtype = config.block_kv, shape.g, ref["q"].dtype
    kv_head, split, place = (pl.program_id(axis) for axis in range(3))
    row, first, begin, q_len = place, 0, place, 1
    if "tiles" in ref:
        row, first = ref["tiles"][place, 0], ref["tiles"][place, 1]
        begin = ref["query_start"][row]
        q_len = ref["query_start"][row + 1] - begin
    kv_len = jnp.minimum(ref["kv_len"][row], shape.tk) if "kv_len" in ref else jnp.int32(shape.tk)
    offset = kv_len - q_len
    if "page_table" not in ref:
        offset = ref["q_offset"][row] if "q_offset" in ref else jnp.int32(0)
    tile = Tile(
        ref={name: x for name, x in ref.items() if name in ("q", "k", "v")},
        shape=shape,
        spec=spec,
        config=config,
        row=row,
        head=kv_head,
        q_len=q_len,
        kv_len=kv_len,
        offset=offset,
    )
    member = jnp.arange(rows)
    token = first + lax.div(member, jnp.int32(g))
    head = kv_head * g + lax.rem(member, jnp.int32(g))
    own = (token < q_len) & (member < tokens * g)
    query = begin + token
    k_pieces = _pieces(shape.d, ref["k"].dtype, config.block_d)
    v_pieces = _pieces(shape.dv, ref["v"].dtype, config.block_d)

    def load_q(piece: _Piece, first_column: int, zero):
        columns = piece.start + jnp.arange(piece.size)
        at = query[:, None] + zero, head[:, None], first_column + columns[None, :]
        q = load(ref["q"].at[at], mask=own[:, None] & (columns < piece.width)[None, :], other=0.0)
        return q if tile.q_factor == 1.0 else q * tile.q_factor

    # a single piece is loaded here and kept in registers; if there are several, each is loaded when it is used
    held = {(piece, at): load_q(piece, at, 0) for piece in k_pieces for at in piece.firsts if len(k_pieces) == 1}
    cast = functools.partial(widened, dtype=dtype, fp8_by_bits=config.fp8_by_bits, nan=False, words=False)
    k_bias, v_bias = bias(ref["k"].dtype, dtype), bias(ref["v"].dtype, dtype)
    q_bias = None
    if k_bias:
        parts = [load_q(piece, at, 0).astype(jnp.float32).sum(1) for piece in k_pieces for at in piece.firsts]
        q_bias = functools.reduce(jnp.add, parts) * -k_bias

    def load_of_queries(name: str, zero, *word):
        # in bounds instead of masked: the branch of a masked load here costs tens of registers on gfx1100
        return load(ref[name].at[jnp.minimum(query + zero, shape.tq - 1), *word])

    def load_words(zero):
        return tuple(load_of_queries("tree", zero, word) for word in range(ref["tree"].shape[1]))

    is_tree = None
    if "tree" in ref:
        common = functools.reduce(jnp.bitwise_and, load_words(0))
        is_tree = jnp.max((own & (common != -1)).astype(jnp.int32)) > 0  # all bits of causal queries are set
    span = tile.keys_of(first, tokens, block_kv, tree=is_tree)
    if o_ref.ndim == 4:
        span = span.part(split, o_ref.shape[0])

    def kv_tile(n, carry, *, edge: bool):
        acc, m, l = carry
        start = n * block_kv
        keys = start + jnp.arange(block_kv)
        inside = (keys >= span.first) & (keys < span.end) if edge else None
        in_tree = depths = None
        if edge and "tree" in ref:
            # 0, so that each of the few edge tiles loads these: they are not kept in registers all along
            zero = lax.shift_right_logical(n, jnp.int32(30))
            in_tree = _in_tree(load_words(zero), keys - tile.offset)
            depths = load_of_queries("depths", zero)[:, None] if "depths" in ref else None
        if "page_table" not in ref:
            slots = row * page_size + keys
        elif page_size % block_kv == 0:
            slots = ref["page_table"][row, lax.div(start, page_size)] * page_size + lax.rem(keys, jnp.int32(page_size))
        else:
            at = ref["page_table"].at[row, lax.div(keys, jnp.int32(page_size))]
            pages = load(at, mask=inside, other=None if inside is None else NULL_PAGE)
            slots = pages * page_size + lax.rem(keys, jnp.int32(page_size))

        def load_pages(name: str, piece: _Piece, inside=inside):
            columns = piece.start + jnp.arange(piece.size)
            mask = None
            if piece.start + piece.size > piece.width:
                mask = jnp.broadcast_to((columns < piece.width)[None, :], (block_kv, piece.size))
            if inside is not None:
                both = jnp.broadcast_to(inside[:, None], (block_kv, piece.size))
                mask = both if mask is None else mask & both
            zero = 0.0 if jnp.issubdtype(ref[name].dtype, jnp.floating) else 0
            place = ref[name].at[slots[:, None], kv_head, columns[None, :]]
            return load(place, mask=mask, other=None if mask is None else zero)

        def scales(name: str):
            found = load(ref[name].at[slots, kv_head], mask=inside, other=None if inside is None else 0.0)
            return found.astype(jnp.float32) * unit(ref[name[0]].dtype, dtype, config.fp8_by_bits)

        zero = later(n, k_pieces)
        scores = sum_of_products(
            (held[piece, at] if held else load_q(piece, at, zero), numbers)
            for piece in k_pieces
            for at, numbers in zip(piece.firsts, cast(load_pages("k", piece)), strict=True)
        )
        if q_bias is not None:
            scores = scores + q_bias[:, None]
        if "k_scales" in ref:
            scores = scores * scales("k_scales")[None, :]
        scores = tile.raw(scores, token[:, None], keys[None, :])
        visible = tile.visible(token[:, None], keys[None, :], edge=edge, depths=depths)
        if in_tree is not None and visible is not None:
            visible = visible & in_tree
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        m_next = jnp.maximum(m, tile.maximum(scores))
        m_safe = m_next if visible is None else jnp.where(m_next == -jnp.inf, 0.0, m_next)
        p = tile.weights(scores, m_safe[:, None])
        rescale = tile.rescale(m, m_safe)
        l = fma(l, rescale, p.sum(1))
        common = None
        if "v_scales" in ref:
            v_scales = scales("v_scales")
            if dtype == jnp.float16:
                # small scales could make float16 weights underflow: factor out the largest scale of the tile
                common = jnp.maximum(jnp.max(v_scales), _LEAST)
                v_scales = v_scales * (1.0 / common)
                rescale = rescale * (1.0 / common)
            p = p * v_scales[None, :]
        p = tile.rounded(p, dtype)
        products = [product(p, numbers) for piece in v_pieces for numbers in cast(load_pages("v", piece))]
        kept = tuple(part * rescale[:, None] for part in acc)
        if v_bias:
            of_rows = p.astype(jnp.float32).sum(1) * -v_bias
            kept = tuple(fma(part, rescale[:, None], of_rows[:, None]) for part in acc)
        # additions, which Triton makes part of the products. (Products of their own, added later, are wrong on gfx1100
        # in float16: XLA's LLVM, jax-rocm7-pjrt 0.12.0, does not clear the registers of their sums)
        acc = tuple(part + new for part, new in zip(kept, products, strict=True))
        if common is not None:
            acc = tuple(part * common for part in acc)
        return acc, m_next, l

    carry = (
        tuple(jnp.zeros((rows, piece.size), jnp.float32) for piece in v_pieces for _ in piece.firsts),
        jnp.full(rows, -jnp.inf, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    acc, m, l = span.walk(kv_tile, carry)

    empty = l == 0.0
    m = jnp.where(empty, 0.0, m * tile.unit)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log2(jnp.where(empty, 1.0, l)) / LOG2_E)
    if "sinks" in ref:
        sinks = load(ref["sinks"].at[head], mask=own, other=0.0)
        l = l + exp2((sinks - m) * LOG2_E)
    norm = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, l))
    before = (split,) if o_ref.ndim == 4 else ()
    parts = [(piece, at) for piece in v_pieces for at in piece.firsts]
    for part, (piece, first_column) in zip(acc, parts, strict=True):
        columns = piece.start + jnp.arange(piece.size)
        at = (*before, query[:, None], head[:, None], first_column + columns[None, :])
        out = jnp.where(empty[:, None], 0.0, part * norm[:, None])
        store(o_ref.at[at], out.astype(o_ref.dtype), mask=own[:, None] & (columns < piece.width)[None, :])
    store(lse_ref.at[(*before, query, head)], lse, mask=own)


def _in_tree(words: tuple[Array, ...], new: Array) -> Bool[Array, "rows block_kv"]:
    """The keys that the tree mask leaves visible; new: index of each key among the row's new tokens, or negative.

    The last word decides about keys past it, which only a causal query sees.
    """
    word = words[0][:, None]
    for i, following in enumerate(words[1:], 1):
        word = jnp.where((new < 32 * i)[None, :], word, following[:, None])
    whole = len(words[0]), len(new)
    place = jnp.broadcast_to((new & 31)[None, :], whole)
    bit = lax.shift_right_logical(jnp.broadcast_to(word, whole), place) & 1
    return (new < 0)[None, :] | (bit != 0)
