"""Paged attention as a Mosaic kernel, for TPUs.

Pages stay in HBM. A program computes a tile of one row's queries and loops over blocks of that row's pages, which it
copies to VMEM through the page table, a block ahead: while a block is computed, the next one, or the first one of the
next tile, is on its way.

  paged_decode_attention   one query per row: the tile is all query heads. One product with the keys of all heads has
                           the scores, of which each head uses its own: a step waits for memory, not for products
  ragged_paged_attention   any number of queries per row. XLA gathers them into tiles of one row each; a tile has a
                           product for each key head, with all its query heads

The scales of quantized keys are applied to the scores, and those of quantized values to the weights. XLA gathers them
beforehand: pages of scales are too small to be copied one by one.

Source: arXiv:2309.06180, section 4. Tested in tests/jfa/test_tpu.py.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jfa.kernels.common import output
from jfa.kernels.tpu import tile
from jfa.kernels.tpu._pallas import pl, pltpu
from jfa.kernels.tpu.tile import LANES, Scores
from jfa.types import AttentionSpec, DeviceInfo, PagedOperands, TpuConfig

_BLOCKS = (512, 256, 128)  # tokens of a block, best first: the first that fits is used
_SMEM_BYTES = 768 << 10  # of 1 MiB, for the page table and the numbers of the tiles


class Shape(NamedTuple):
    """The sizes of a call, in elements."""

    tiles: int
    groups: int  # products of a tile: one for all key heads, or one for each
    heads: int  # key heads of a product
    g: int  # query heads per key head
    tokens: int  # queries of a tile
    rows: int  # of a product: queries and their heads, rounded up
    d: int
    dv: int
    page_size: int
    pages: int  # of a block
    heads_first: bool  # within a page

    @classmethod
    def of(cls, operands: PagedOperands, config: TpuConfig) -> "Shape":
        n, hq, d = operands.q.shape
        _, page_size, hkv, dv = operands.v_pages.shape
        g, packed = hq // hkv, tile.sublanes(operands.q.dtype)
        common: dict[str, Any] = dict(
            g=g,
            d=d,
            dv=dv,
            page_size=page_size,
            pages=max(1, config.block_kv // page_size),
            heads_first=_heads_first(operands),
        )
        if operands.query_start is None:
            return cls(tiles=n, groups=1, heads=hkv, tokens=1, rows=tile.rounded(hq, packed), **common)
        rows = tile.rounded(max(config.block_q, g), packed)
        tokens = rows // g
        return cls(
            tiles=n // tokens + operands.kv_len.shape[0], groups=hkv, heads=1, tokens=tokens, rows=rows, **common
        )

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.pages * self.page_size

    @property
    def hkv(self) -> int:
        return self.groups * self.heads


def _heads_first(operands: PagedOperands) -> bool:
    """Whether XLA stores the heads of a page before its tokens, rather than pad the heads of each token to whole words.

    Seen in entry layouts of libtpu 0.0.52.
    """
    return bool(operands.k_pages.shape[2] * operands.k_pages.dtype.itemsize % 4)


def default_config(operands: PagedOperands, device: DeviceInfo) -> TpuConfig:
    """128 rows of queries, and the first of _BLOCKS that fits into the device's VMEM."""
    sizes = [TpuConfig(block_q=LANES, block_kv=block) for block in _BLOCKS]
    return next((one for one in sizes if vmem_bytes(operands, one) <= tile.budget(device)), sizes[-1])


def why_not(operands: PagedOperands, spec: AttentionSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    if reason := tile.why_not_device(device):
        return reason
    for name, x in (("query", operands.q), ("key_pages", operands.k_pages), ("page_table", operands.page_table)):
        if not all(isinstance(n, int) for n in x.shape):
            return f"a kernel's grid has a static size, but {name} has the symbolic shape {x.shape}"
    if operands.tree_mask is not None:
        return "the TPU kernel has no tree_mask yet"
    k, v = operands.k_pages, operands.v_pages
    if jnp.uint8 in (k.dtype, v.dtype):
        return "the TPU kernel does not read packed 4-bit pages yet"
    if (k.dtype.itemsize == 1) != (v.dtype.itemsize == 1):
        return "the TPU kernel reads keys and values that are both quantized, or none of them"
    smallest = TpuConfig(block_q=LANES, block_kv=min(_BLOCKS))
    shape = Shape.of(operands, smallest)
    return (
        tile.why_not_dtypes(operands.q, k, v)
        or tile.why_not_head_dims(shape.d, shape.dv)
        or (_why_copied(operands) if device.platform == "tpu" else None)
        or _why_not_smem(operands, shape)
        or tile.why_not_vmem(
            vmem_bytes(operands, smallest), device, f"blocks of {shape.block} tokens with {shape.hkv} key heads"
        )
    )


def _why_copied(operands: PagedOperands) -> str | None:
    """The reason why XLA would copy the whole pool before each call; None if it would not."""
    for name, pages in (("key_pages", operands.k_pages), ("value_pages", operands.v_pages)):
        _, page_size, hkv, d = pages.shape
        if d % LANES:
            return (
                f"{name} with a head_dim of {d} are stored in another order, unless it is a multiple of 128: XLA would "
                "copy all pages before each call"
            )
        together = page_size if _heads_first(operands) else hkv
        if together & (together - 1) or page_size * hkv % tile.sublanes(pages.dtype):
            return (
                f"{name} of {page_size} tokens and {hkv} heads are stored with padding, which XLA would remove by a "
                "copy of all pages before each call; use a page_size that is a power of two of at least 16"
            )
    return None


def _why_not_smem(operands: PagedOperands, shape: Shape) -> str | None:
    b, pages_per_seq = operands.page_table.shape
    needed = 4 * (b * tile.rounded(pages_per_seq, LANES) + 8 * tile.rounded(shape.tiles, LANES))
    if needed > _SMEM_BYTES:
        return f"a page_table [{b}, {pages_per_seq}] needs {needed:,} bytes of scalar memory, of {_SMEM_BYTES:,}"
    return None


def vmem_bytes(operands: PagedOperands, config: TpuConfig) -> int:
    """Bytes of VMEM that the kernel needs, at most."""
    shape, stored = Shape.of(operands, config), tile.stored_bytes
    dtype, columns = operands.q.dtype, shape.heads * shape.block
    pages = sum(
        stored((shape.pages, shape.page_size * shape.hkv, x.shape[3]), x.dtype)
        for x in (operands.k_pages, operands.v_pages)
    )
    of_rows = shape.groups * (
        2 * stored((shape.rows, shape.d), dtype)
        + 2 * stored((shape.rows, shape.dv), dtype)
        + 2 * stored((1, shape.rows), jnp.float32)
        + stored((shape.rows, shape.dv), jnp.float32)
        + 4 * stored((shape.rows, LANES), jnp.float32)
    )
    scales = 0 if operands.k_scales is None else 4 * stored((1, shape.block * shape.hkv), jnp.float32)
    cast = sum(stored((columns, size), dtype) for size in (shape.d, shape.dv))
    return 2 * pages + of_rows + scales + cast + 3 * stored((shape.rows, columns), jnp.float32)


class _Tiles(NamedTuple):
    """Numbers of the tiles, i32[tiles] each, in the order in which the kernel gets them."""

    row: Any  # of the page table
    position: Any  # of the tile's first query
    count: Any  # of its queries
    first: Any  # the keys [first, end) are visible to any of them
    end: Any
    next: Any  # the next tile that has keys; the number of tiles: none

    @classmethod
    def of(cls, operands: PagedOperands, spec: AttentionSpec, shape: Shape) -> "_Tiles":
        kv_len = jnp.minimum(operands.kv_len, operands.capacity)
        if operands.query_start is None:
            row, begin = jnp.arange(shape.tiles, dtype=jnp.int32), jnp.zeros(shape.tiles, jnp.int32)
            q_len = jnp.ones_like(kv_len)
        else:
            row, begin = _tiles_of_rows(operands.query_start, shape)
            q_len = jnp.diff(operands.query_start)
        count = jnp.clip(q_len[row] - begin, 0, shape.tokens)
        position = (kv_len - q_len)[row] + begin
        first = jnp.zeros_like(position) if spec.left is None else jnp.maximum(0, position - spec.left)
        end = jnp.where(count > 0, jnp.maximum(0, position + count), 0)
        index = jnp.arange(shape.tiles, dtype=jnp.int32)
        busy = jnp.where(end > first, index, shape.tiles)
        following = jnp.append(lax.cummin(busy, reverse=True)[1:], shape.tiles)
        return cls(*(x.astype(jnp.int32) for x in (row, position, count, first, end, following)))


def _tiles_of_rows(query_start: Int[Array, " b+1"], shape: Shape) -> tuple[Array, Array]:
    """For each tile of queries, its row and the index of its first query in the row.

    The number of tiles is the most that these queries can need; unused tiles start after the last row's queries.
    """
    b = query_start.shape[0] - 1
    count = -(-jnp.diff(query_start) // shape.tokens)
    end = jnp.cumsum(count)
    index = jnp.arange(shape.tiles)
    row = jnp.minimum(jnp.searchsorted(end, index, side="right", method="compare_all"), b - 1)
    return row, (index - (end - count)[row]) * shape.tokens


def paged_attention(
    operands: PagedOperands, *, spec: AttentionSpec, config: TpuConfig, vmem_limit_bytes: int, interpret: Any
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """Attention and the natural log-sum-exp, as reference.paged_attention defines them.

    Args:
      vmem_limit_bytes, interpret: as in flash.flash_attention.

    Raises:
      ValueError: as flash.flash_attention.
    """
    tile.check_config(config, vmem_bytes(operands, config), vmem_limit_bytes)
    shape = Shape.of(operands, config)
    # ragged tiles of int32 numbers, regardless of JAX's default
    with jax.enable_x64(False):
        tiles = _Tiles.of(operands, spec, shape)
        q = _in_tiles(operands, tiles, shape)
        out, lse = _call(operands, tiles, q, shape, spec, vmem_limit_bytes=vmem_limit_bytes, interpret=interpret)
        return _in_rows(operands, out, lse, shape)


def _in_tiles(operands: PagedOperands, tiles: _Tiles, shape: Shape) -> Float[Array, "tiles groups rows d"]:
    """The queries of each tile; rows of a product are its tokens and their heads, and zeros."""
    q = operands.q
    if operands.query_start is None:
        found = q[:, None]
    else:
        first = tiles.position - jnp.minimum(operands.kv_len, operands.capacity)[tiles.row]  # from the row's end
        index = (operands.query_start[tiles.row + 1] + first)[:, None] + jnp.arange(shape.tokens)
        found = jnp.take(q, index, axis=0, mode="clip").reshape(shape.tiles, shape.tokens, shape.groups, -1, shape.d)
        found = found.swapaxes(1, 2).reshape(shape.tiles, shape.groups, -1, shape.d)
    return jnp.pad(found, ((0, 0), (0, 0), (0, shape.rows - found.shape[2]), (0, 0)))


def _in_rows(
    operands: PagedOperands, out: Float[Array, "tiles groups rows dv"], lse: Float[Array, "tiles groups 1 rows"], shape
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """The inverse of _in_tiles; queries that belong to no row get zeros and -inf."""
    n, hq, _ = operands.q.shape
    used = shape.tokens * shape.g * shape.heads
    out, lse = out[:, :, :used], lse[:, :, 0, :used]
    if operands.query_start is None:
        return out[:, 0], lse[:, 0]
    start = operands.query_start
    query = jnp.arange(n)
    row = jnp.clip(jnp.searchsorted(start, query, side="right", method="compare_all") - 1, 0, start.shape[0] - 2)
    count = -(-jnp.diff(start) // shape.tokens)
    place = query - start[row]
    at = (jnp.cumsum(count) - count)[row] + place // shape.tokens
    at = jnp.clip(at, 0, shape.tiles - 1) * shape.tokens + place % shape.tokens

    def each(x: Array) -> Array:
        x = x.reshape(shape.tiles, shape.groups, shape.tokens, shape.g, *x.shape[3:]).swapaxes(1, 2)
        return x.reshape(shape.tiles * shape.tokens, hq, *x.shape[4:])[at]

    own = (query >= start[0]) & (query < start[-1])
    return jnp.where(own[:, None, None], each(out), 0), jnp.where(own[:, None], each(lse), -jnp.inf)


def _call(
    operands: PagedOperands, tiles: _Tiles, q: Array, shape: Shape, spec: AttentionSpec, *, vmem_limit_bytes, interpret
) -> tuple[Float[Array, "tiles groups rows dv"], Float[Array, "tiles groups 1 rows"]]:
    b = operands.page_table.shape[0]
    named: dict[str, Any] = {"q": (q, _per_tile(q.shape))}
    if operands.sinks is not None:
        of_rows = operands.sinks.astype(jnp.float32).reshape(shape.groups, -1)
        of_rows = jnp.tile(of_rows, (1, shape.tokens))
        of_rows = jnp.pad(of_rows, ((0, 0), (0, shape.rows - of_rows.shape[1])))
        sinks = jnp.broadcast_to(of_rows[..., None], (*of_rows.shape, LANES))
        named["sinks"] = sinks, pl.BlockSpec(sinks.shape, lambda *grid: (0, 0, 0))
    buffers = {"k": operands.k_pages, "v": operands.v_pages}
    buffers = {name: _pages(x, shape) for name, x in buffers.items()}
    in_vmem = [pltpu.VMEM((2, shape.pages, *x.shape[1:]), x.dtype) for x in buffers.values()]
    for name, scales in (("k_scales", operands.k_scales), ("v_scales", operands.v_scales)):
        if scales is not None:
            buffers[name] = _scales(scales, operands.page_table, shape)
            in_vmem.append(pltpu.VMEM((2, *buffers[name].shape[2:]), jnp.float32))
    named |= {name: (x, pl.BlockSpec(memory_space=pl.ANY)) for name, x in buffers.items()}
    outs = (*q.shape[:3], shape.dv), (shape.tiles, shape.groups, 1, shape.rows)
    scores = math.prod(q.shape[:3]) * operands.capacity * shape.heads
    return pl.pallas_call(
        functools.partial(_paged_kernel, names=tuple(named), copied=tuple(buffers), shape=shape, spec=spec),
        name="paged_decode_attention" if operands.query_start is None else "ragged_paged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(shape.tiles,),
            in_specs=[block for _, block in named.values()],
            out_specs=[_per_tile(one) for one in outs],
            scratch_shapes=[
                pltpu.VMEM((shape.groups, shape.rows, LANES), jnp.float32),
                pltpu.VMEM((shape.groups, shape.rows, LANES), jnp.float32),
                pltpu.VMEM((shape.groups, shape.rows, shape.dv), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, len(buffers))),
                *in_vmem,
            ],
        ),
        out_shape=[
            output(one, dtype, like=operands.q)
            for one, dtype in zip(outs, (operands.q.dtype, jnp.float32), strict=True)
        ],
        # in order: a tile starts the copies of the next one
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * (shape.d + shape.dv),
            transcendentals=scores,
            bytes_accessed=sum(
                b * operands.capacity * math.prod(x.shape[2:]) * x.dtype.itemsize
                for x in (operands.k_pages, operands.v_pages)
            ),
        ),
        interpret=interpret,
    )(jnp.stack(tiles), operands.page_table, *(x for x, _ in named.values()))


def _per_tile(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape[1:]), lambda i, *scalars: (i, 0, 0, 0))


def _pages(x: Array, shape: Shape) -> Array:
    """The pages as XLA stores them: no copy is made.

    One product: [num_pages, page_size * hkv, d]; otherwise [num_pages, page_size, hkv, d] or [.., hkv, page_size, d].
    """
    if shape.heads_first:
        x = x.swapaxes(1, 2)
    return x.reshape(x.shape[0], -1, x.shape[3]) if shape.groups == 1 else x


def _scales(scales: Array, page_table: Array, shape: Shape) -> Float[Array, "b blocks groups columns"]:
    """The scales of each row's blocks, in the order of the columns of a product."""
    found = scales[page_table].astype(jnp.float32)  # [b, pages, page_size, hkv]
    found = jnp.pad(found, ((0, 0), (0, -found.shape[1] % shape.pages), (0, 0), (0, 0)))
    found = found.reshape(found.shape[0], -1, shape.pages, *found.shape[2:])
    if shape.groups > 1:
        return jnp.moveaxis(found, 4, 2).reshape(*found.shape[:2], shape.groups, -1)
    found = found.swapaxes(3, 4) if shape.heads_first else found
    return found.reshape(*found.shape[:2], 1, -1)


class _Copies(NamedTuple):
    """The copies of a tile's blocks to VMEM, in two places that take turns."""

    shape: Shape
    tiles: Any  # i32[6, tiles], _Tiles
    page_table: Any
    hbm: dict[str, Any]
    vmem: dict[str, Any]
    semaphores: Any

    def blocks(self, of_tile) -> tuple[Any, Any]:
        """The range of blocks that a tile reads."""
        of = _Tiles(*range(6))
        first, end = self.tiles[of.first, of_tile], self.tiles[of.end, of_tile]
        return lax.div(first, self.shape.block), lax.div(end + self.shape.block - 1, self.shape.block)

    def start(self, of_tile, block, place) -> None:
        self._each(of_tile, block, place, lambda copy: copy.start())

    def wait(self, of_tile, block, place) -> None:
        self._each(of_tile, block, place, lambda copy: copy.wait())

    def _each(self, of_tile, block, place, act) -> None:
        of, shape = _Tiles(*range(6)), self.shape
        row, end = self.tiles[of.row, of_tile], self.tiles[of.end, of_tile]
        first_page = block * shape.pages
        last_page = lax.div(end + shape.page_size - 1, shape.page_size)

        def one_page(i, _):
            page = self.page_table[row, first_page + i]
            for at, name in enumerate(("k", "v")):
                source, target = self.hbm[name].at[page], self.vmem[name].at[place, i]
                act(pltpu.make_async_copy(source, target, self.semaphores.at[place, at]))
            return _

        lax.fori_loop(0, jnp.minimum(shape.pages, last_page - first_page), one_page, None)
        for at, name in enumerate(self.hbm):
            if name.endswith("scales"):
                source, target = self.hbm[name].at[row, block], self.vmem[name].at[place]
                act(pltpu.make_async_copy(source, target, self.semaphores.at[place, at]))


def _paged_kernel(
    tiles_ref,  # i32[6, tiles]
    page_table_ref,  # i32[b, pages_per_seq]
    *refs,  # the arguments by `names`: q [groups, rows, d], sinks [groups, rows, LANES], pages and scales in HBM;
    # o [groups, rows, dv], lse [groups, 1, rows]; m, l [groups, rows, LANES], acc [groups, rows, dv], place i32[1],
    # semaphores [2, copied], two blocks of each of `copied`
    names: tuple[str, ...],
    copied: tuple[str, ...],
    shape: Shape,
    spec: AttentionSpec,
):
    ref = dict(zip(names, refs, strict=False))
    o_ref, lse_ref, m_ref, l_ref, acc_ref, place_ref, semaphores, *buffers = refs[len(names) :]
    vmem = dict(zip(copied, buffers, strict=True))
    copies = _Copies(shape, tiles_ref, page_table_ref, {name: ref[name] for name in copied}, vmem, semaphores)
    dtype, scores = ref["q"].dtype, Scores(spec=spec)
    at, num_tiles = pl.program_id(0), pl.num_programs(0)
    _, position, count, first, end, following = (tiles_ref[i, at] for i in range(6))
    first_block, end_block = copies.blocks(at)

    @pl.when(at == 0)
    def _():
        place_ref[0] = 0
        begin = jnp.where(end > first, 0, following)
        pl.when(begin < num_tiles)(lambda: copies.start(begin, copies.blocks(begin)[0], 0))

    tile.start_softmax(m_ref, l_ref, acc_ref)

    def numbers(name: str, place, group: int):
        """[heads * block, d] of the keys or values of a product."""
        pages: Any = vmem[name]
        if shape.groups == 1:
            found = pages[place]
        else:
            found = pages[place, :, group] if shape.heads_first else pages[place, :, :, group]
        return found.reshape(-1, found.shape[-1]).astype(dtype)

    def places(size: tuple[int, int], axis: int):
        """(token in the block, key head in the product) along an axis of the keys."""
        column = lax.broadcasted_iota(jnp.int32, size, axis)
        if shape.heads == 1:
            return column, None
        if not shape.heads_first:
            return lax.div(column, jnp.int32(shape.heads)), lax.rem(column, jnp.int32(shape.heads))
        page_rows = jnp.int32(shape.page_size * shape.heads)
        inside = lax.rem(column, page_rows)
        token = lax.div(column, page_rows) * shape.page_size + lax.rem(inside, jnp.int32(shape.page_size))
        return token, lax.div(inside, jnp.int32(shape.page_size))

    def add_block(block, place, *, edge: bool):
        start = block * shape.block
        columns = shape.heads * shape.block
        token, head = places((1, columns), 1)
        key = start + token
        row = lax.broadcasted_iota(jnp.int32, (shape.rows, 1), 0)
        query = position + (0 if shape.tokens == 1 else lax.div(row, jnp.int32(shape.g)))
        visible = None
        if edge:
            visible = (key <= query) & (key < end)
            if spec.left is not None:
                visible &= key >= query - spec.left
        if head is not None:
            own = head == lax.div(row, jnp.int32(shape.g))
            visible = own if visible is None else visible & own
        for group in range(shape.groups):
            raw = tile.product(_signed(ref["q"][group], scores), numbers("k", place, group), trans_b=True)
            if "k_scales" in vmem:
                raw = raw * vmem["k_scales"][place, pl.ds(group, 1)]
            raw = scores.raw(raw)
            if visible is not None:
                raw = jnp.where(visible, raw, -jnp.inf)
            values = numbers("v", place, group)
            if edge:
                # slots without a token may contain anything, and 0 * NaN is NaN
                key_of_row = start + places(values.shape, 0)[0]
                values = jnp.where((key_of_row >= first) & (key_of_row < end), values, 0)
            weigh = None
            if "v_scales" in vmem:
                v_scales = vmem["v_scales"][place, pl.ds(group, 1)]
                if edge:
                    v_scales = jnp.where((key >= first) & (key < end), v_scales, 0.0)
                weigh = functools.partial(jnp.multiply, v_scales)
            tile.add_to_softmax(m_ref.at[group], l_ref.at[group], acc_ref.at[group], raw, values, scores.factor, weigh)

    def one_block(block, place):
        other = 1 - place
        is_last = block + 1 == end_block
        pl.when(~is_last)(lambda: copies.start(at, block + 1, other))
        is_followed = is_last & (following < num_tiles)
        pl.when(is_followed)(lambda: copies.start(following, copies.blocks(following)[0], other))
        copies.wait(at, block, place)
        highest = block * shape.block + shape.block - 1
        is_whole = highest <= position
        if spec.left is not None:
            is_whole &= block * shape.block >= position + count - 1 - spec.left
        pl.when(is_whole)(lambda: add_block(block, place, edge=False))
        pl.when(~is_whole)(lambda: add_block(block, place, edge=True))
        return other

    place_ref[0] = lax.fori_loop(first_block, end_block, one_block, place_ref[0])

    row = lax.broadcasted_iota(jnp.int32, (shape.rows, LANES), 0)
    for group in range(shape.groups):
        m, l = m_ref[group], jnp.where(row < count * shape.g * shape.heads, l_ref[group], 0.0)
        sinks = ref["sinks"][group] if "sinks" in ref else None
        o_ref[group] = tile.normalized(acc_ref[group], m, l, scores, sinks).astype(o_ref.dtype)
        lse_ref[group] = jnp.transpose(scores.log_sum_exp(m, l))[:1]


def _signed(q: Array, scores: Scores) -> Array:
    return q if scores.sign == 1.0 else q * scores.sign
