"""Paged attention as a Mosaic kernel, for TPUs.

Pages, queries and outputs stay in HBM. A program computes a tile of one row's queries, copied to VMEM one by one, and
loops over blocks of that row's pages, which it copies through the page table, a block ahead: while a block is computed,
the next one, or the first one of the next tile with its queries, is on its way.

  paged_decode_attention   one query per row: the tile is all query heads. One product with the keys of all heads has
                           the scores, of which each head uses its own: a step waits for memory, not for products
  ragged_paged_attention   any number of queries per row. A block's heads are taken apart, and a tile has a product for
                           each key head, with all its query heads. A row's only query is a tile of few rows

The scales of quantized keys are applied to the scores, and those of quantized values to the weights. XLA gathers them
beforehand: pages of scales are too small to be copied one by one.

Source: arXiv:2309.06180, section 4. Tested in tests/jfa/test_tpu.py.
"""

import functools
import math
from collections.abc import Callable
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

# Rows of queries and tokens of a block, best first: the first that fits is used. A block's heads are taken apart for
# all rows, so more of them take fewer instructions each
_TILES = ((256, 512), (256, 256), (128, 256), (128, 128))
_SMEM_BYTES = 768 << 10  # of 1 MiB, for the page table and the numbers of the tiles


class Shape(NamedTuple):
    """The sizes of a call, in elements."""

    tiles: int
    groups: int  # products of a tile: one for all key heads, or one for each
    heads: int  # key heads of a product
    g: int  # query heads per key head
    tokens: int  # queries of a tile, at most
    packed: int  # queries of one head that fill a tile of memory
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
            packed=packed,
            d=d,
            dv=dv,
            page_size=page_size,
            pages=max(1, config.block_kv // page_size),
            heads_first=_heads_first(operands),
        )
        if operands.query_start is None:
            return cls(tiles=n, groups=1, heads=hkv, tokens=1, **common)
        tokens = max(1, config.block_q // (g * packed)) * packed
        # each row, and the queries of no row, may end in a tile that is not full
        return cls(tiles=n // tokens + operands.kv_len.shape[0] + 1, groups=hkv, heads=1, tokens=tokens, **common)

    def rows(self, tokens: int) -> int:
        """Rows of a product with these queries, the heads of a product one after the other."""
        return tile.rounded(tokens * self.heads * self.g, self.packed)

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.pages * self.page_size

    @property
    def hkv(self) -> int:
        return self.groups * self.heads

    @property
    def hq(self) -> int:
        return self.hkv * self.g


def _heads_first(operands: PagedOperands) -> bool:
    """Whether XLA stores the heads of a page before its tokens, rather than pad the heads of each token to whole words.

    Seen in entry layouts of libtpu 0.0.52.
    """
    return bool(operands.k_pages.shape[2] * operands.k_pages.dtype.itemsize % 4)


def default_config(operands: PagedOperands, device: DeviceInfo) -> TpuConfig:
    """The first of _TILES that fits into the device's VMEM."""
    sizes = [TpuConfig(block_q=block_q, block_kv=block_kv) for block_q, block_kv in _TILES]
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
    smallest = TpuConfig(**dict(zip(("block_q", "block_kv"), _TILES[-1], strict=True)))
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
                f"{name} with a head_dim of {d}, no multiple of 128, are stored with pages or tokens in lanes: XLA "
                "would copy all pages before each call; pad queries and pages with zeros, and give scale"
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
    dtype, columns, rows = operands.q.dtype, shape.heads * shape.block, shape.rows(shape.tokens)
    pages = (operands.k_pages, operands.v_pages)
    blocks = sum(2 * stored(_block_of_pages(x.shape, shape), x.dtype) for x in pages)
    scales = 0 if operands.k_scales is None else 4 * stored((1, shape.block * shape.hkv), jnp.float32)
    heads = sum(stored(one.shape, one.dtype) for one in _of_heads(operands, shape))
    copied = sum(stored((shape.tokens, shape.hq, size), dtype) for size in (shape.d, shape.dv))
    of_rows = shape.groups * (
        stored((rows, shape.d), dtype)
        + stored((rows, shape.dv), jnp.float32)
        + (2 if operands.sinks is None else 4) * stored((rows, LANES), jnp.float32)
    )
    cast = sum(stored((columns, size), dtype) for size in (shape.d, shape.dv))
    of_products = cast + 3 * stored((rows, columns), jnp.float32)
    # outputs are turned as float32
    turned = 2 * stored((shape.hq, shape.tokens, max(shape.d, shape.dv)), jnp.float32)
    return blocks + scales + heads + copied + of_rows + max(of_products, turned)


class _Tiles(NamedTuple):
    """Numbers of the tiles, i32[tiles] each, in the order in which the kernel gets them."""

    row: Any  # of the page table
    query: Any  # the tile's first one, of all queries
    position: Any  # of that query
    count: Any  # of its queries
    first: Any  # the keys [first, end) are visible to any of them
    end: Any
    next: Any  # the next tile that has keys; the number of tiles: none

    @classmethod
    def of(cls, operands: PagedOperands, spec: AttentionSpec, shape: Shape) -> "_Tiles":
        kv_len = jnp.minimum(operands.kv_len, operands.capacity)
        index = jnp.arange(shape.tiles, dtype=jnp.int32)
        if operands.query_start is None:
            row, begin, start, q_len = index, jnp.zeros_like(index), index, jnp.ones_like(index)
        else:
            # queries of no row are one without keys
            start = jnp.append(operands.query_start, operands.q.shape[0])
            row, begin = _tiles_of_rows(start, shape)
            q_len, kv_len = jnp.diff(start), jnp.append(kv_len, 0)
        count = jnp.clip(q_len[row] - begin, 0, shape.tokens)
        position = (kv_len - q_len)[row] + begin
        first = jnp.zeros_like(position) if spec.left is None else jnp.maximum(0, position - spec.left)
        end = jnp.where(count > 0, jnp.maximum(0, position + count), 0)
        busy = jnp.where(end > first, index, shape.tiles)
        following = jnp.append(lax.cummin(busy, reverse=True)[1:], shape.tiles)
        return cls(*(x.astype(jnp.int32) for x in (row, start[row] + begin, position, count, first, end, following)))


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
    # the numbers of tiles are int32, regardless of JAX's default
    with jax.enable_x64(False):
        tiles = _Tiles.of(operands, spec, shape)
        out, lse = _call(operands, tiles, shape, spec, vmem_limit_bytes=vmem_limit_bytes, interpret=interpret)
        return out, lse[:, 0, : shape.hq]


def _call(
    operands: PagedOperands, tiles: _Tiles, shape: Shape, spec: AttentionSpec, *, vmem_limit_bytes, interpret
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n 1 columns"]]:
    b, n, q = operands.page_table.shape[0], operands.q.shape[0], operands.q
    named: dict[str, Any] = {}
    if operands.sinks is not None:
        for tokens in {1, shape.tokens}:
            of_rows = jnp.repeat(operands.sinks.astype(jnp.float32).reshape(shape.groups, -1), tokens, axis=1)
            of_rows = jnp.pad(of_rows, ((0, 0), (0, shape.rows(tokens) - of_rows.shape[1])))
            sinks = jnp.broadcast_to(of_rows[..., None], (*of_rows.shape, LANES))
            named[f"sinks_of_{tokens}"] = sinks, pl.BlockSpec(sinks.shape, lambda *grid: (0, 0, 0))
    pages = {"k": _pages(operands.k_pages, shape), "v": _pages(operands.v_pages, shape)}
    blocks = {name: pltpu.VMEM((2, *_block_of_pages(x.shape, shape)), x.dtype) for name, x in pages.items()}
    for name, scales in (("k_scales", operands.k_scales), ("v_scales", operands.v_scales)):
        if scales is not None:
            pages[name] = _scales(scales, operands.page_table, shape)
            blocks[name] = pltpu.VMEM((2, *pages[name].shape[2:]), jnp.float32)
    in_hbm = {"q": q, **pages}
    named |= {name: (x, pl.BlockSpec(memory_space=pl.ANY)) for name, x in in_hbm.items()}
    rows, columns = shape.rows(shape.tokens), tile.rounded(shape.hq, LANES)
    scores = shape.tiles * shape.groups * rows * operands.capacity * shape.heads
    return pl.pallas_call(
        functools.partial(_paged_kernel, names=tuple(named), copied=tuple(blocks), shape=shape, spec=spec),
        name="paged_decode_attention" if operands.query_start is None else "ragged_paged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles) + 1,
            grid=(shape.tiles,),
            in_specs=[block for _, block in named.values()],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                pltpu.VMEM((shape.tokens, shape.hq, shape.d), q.dtype),
                pltpu.VMEM((shape.tokens, shape.hq, shape.dv), q.dtype),
                pltpu.VMEM((shape.tokens, 1, columns), jnp.float32),
                pltpu.VMEM((shape.groups, rows, shape.d), q.dtype),
                pltpu.VMEM((shape.groups, rows, LANES), jnp.float32),
                pltpu.VMEM((shape.groups, rows, LANES), jnp.float32),
                pltpu.VMEM((shape.groups, rows, shape.dv), jnp.float32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((3,)),
                pltpu.SemaphoreType.DMA((2, len(blocks))),
                *blocks.values(),
                *_of_heads(operands, shape),
            ],
        ),
        out_shape=[
            output((n, shape.hq, shape.dv), q.dtype, like=q),
            output((n, 1, columns), jnp.float32, like=q),
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
    )(*tiles, operands.page_table, *(x for x, _ in named.values()))


def _pages(x: Array, shape: Shape) -> Array:
    """The pages as XLA stores them: no copy is made.

    [num_pages, page_size * hkv, d], or [num_pages, hkv, page_size, d] if each head has a product of its own.
    """
    if shape.heads_first:
        x = x.swapaxes(1, 2)
    return x if shape.heads_first and shape.groups > 1 else x.reshape(x.shape[0], -1, x.shape[3])


def _block_of_pages(pages: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """The shape of a block of pages of this shape; the rows of flat pages are joined."""
    *page, d = pages[1:]
    if shape.heads_first and shape.groups > 1:
        return shape.pages, shape.hkv, shape.page_size, d
    return shape.pages * math.prod(page), d


def _of_heads(operands: PagedOperands, shape: Shape) -> list[Any]:
    """Memory for the heads of a block, taken apart: k [groups, block, d], v [groups, block, dv].

    And for words of each: [columns / 128, rows, 128], a word of a column has the numbers of several heads.
    """
    if shape.groups == 1:
        return []
    pages, dtype = (operands.k_pages, operands.v_pages), operands.q.dtype
    heads = [pltpu.VMEM((shape.groups, shape.block, x.shape[3]), dtype) for x in pages]
    if shape.heads_first:
        return heads
    rows = shape.block * shape.hkv * pages[0].dtype.itemsize // 4
    return heads + [pltpu.VMEM((pl.cdiv(x.shape[3], LANES), rows, LANES), jnp.int32) for x in pages]


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
    """The copies of a tile's queries, and of its blocks in two places that take turns, to VMEM."""

    shape: Shape
    tiles: _Tiles
    page_table: Any
    hbm: dict[str, Any]
    vmem: dict[str, Any]
    of_queries: Any  # semaphores
    of_blocks: Any

    def blocks(self, of_tile) -> tuple[Any, Any]:
        """The range of blocks that a tile reads."""
        first, end = self.tiles.first[of_tile], self.tiles.end[of_tile]
        return lax.div(first, self.shape.block), lax.div(end + self.shape.block - 1, self.shape.block)

    def start_tile(self, of_tile, place) -> None:
        """The tile's queries and its first block."""
        self._queries(of_tile, lambda copy: copy.start())
        self.start(of_tile, self.blocks(of_tile)[0], place)

    def wait_for_queries(self, of_tile) -> None:
        self._queries(of_tile, lambda copy: copy.wait())

    def start(self, of_tile, block, place) -> None:
        self._block(of_tile, block, place, lambda copy: copy.start())

    def wait(self, of_tile, block, place) -> None:
        self._block(of_tile, block, place, lambda copy: copy.wait())

    def _queries(self, of_tile, act) -> None:
        def one(i):
            source, target = self.hbm["q"].at[self.tiles.query[of_tile] + i], self.vmem["q"].at[i]
            act(pltpu.make_async_copy(source, target, self.of_queries))

        _each(self.tiles.count[of_tile], one)

    def _block(self, of_tile, block, place, act) -> None:
        shape, row, end = self.shape, self.tiles.row[of_tile], self.tiles.end[of_tile]
        first_page = block * shape.pages
        last_page = lax.div(end + shape.page_size - 1, shape.page_size)

        def one_page(i):
            page = self.page_table[row, first_page + i]
            for at, name in enumerate("kv"):
                source, target = self.hbm[name].at[page], self.vmem[name].at[place]
                rows = source.shape[0]
                is_flat = len(target.shape) == 2
                target = target.at[pl.ds(pl.multiple_of(i * rows, rows), rows)] if is_flat else target.at[i]
                act(pltpu.make_async_copy(source, target, self.of_blocks.at[place, at]))

        _each(jnp.minimum(shape.pages, last_page - first_page), one_page)
        for at, name in enumerate(name for name in self.vmem if name != "q"):
            if name.endswith("scales"):
                source, target = self.hbm[name].at[row, block], self.vmem[name].at[place]
                act(pltpu.make_async_copy(source, target, self.of_blocks.at[place, at]))


def _paged_kernel(
    *refs,  # in this order:
    # _Tiles, i32[tiles] each, and the page table; the arguments by `names`: sinks [groups, rows, LANES], and in HBM
    # q [n, hq, d], pages and scales; in HBM o [n, hq, dv], lse [n, 1, columns]; of a tile q, o and lse, [tokens, ..];
    # in rows q [groups, rows, d], m, l [groups, rows, LANES] and acc [groups, rows, dv]; i32[2]: the place of the next
    # block, the number of outputs on their way; semaphores of q, o and lse, and of blocks [2, copied]; two blocks of
    # each of `copied`; _of_heads
    names: tuple[str, ...],
    copied: tuple[str, ...],
    shape: Shape,
    spec: AttentionSpec,
):
    numbers_of_tiles = len(_Tiles._fields)
    tiles, page_table_ref, refs = _Tiles(*refs[:numbers_of_tiles]), refs[numbers_of_tiles], refs[numbers_of_tiles + 1 :]
    ref, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    o_hbm, lse_hbm, queries_ref, outputs_ref, sums_ref, q_ref, m_ref, l_ref, acc_ref, state_ref, *refs = refs
    of_tile, of_blocks, *buffers = refs
    vmem, heads = dict(zip(copied, buffers, strict=False)), buffers[len(copied) :]
    copies = _Copies(shape, tiles, page_table_ref, ref, {"q": queries_ref, **vmem}, of_tile.at[0], of_blocks)
    dtype, scores = q_ref.dtype, Scores(spec=spec)
    at, num_tiles = pl.program_id(0), pl.num_programs(0)
    position, count, first, end, following = (x[at] for x in tiles[2:])
    first_block, end_block = copies.blocks(at)
    of_group = shape.heads * shape.g

    @pl.when(at == 0)
    def _():
        state_ref[0], state_ref[1] = 0, 0
        begin = jnp.where(end > first, 0, following)
        pl.when(begin < num_tiles)(lambda: copies.start_tile(begin, 0))

    def numbers(name: str, place, group):
        """[heads * block, d] of the keys or values of a product."""
        return heads["kv".index(name)][group] if heads else vmem[name][place].astype(dtype)

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

    def add_block(block, place, tokens: int, *, edge: bool):
        start, rows = block * shape.block, shape.rows(tokens)
        token, head = places((1, shape.heads * shape.block), 1)
        key = start + token
        row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        query = position + lax.rem(row, jnp.int32(tokens))
        visible = None
        if edge:
            visible = (key <= query) & (key < end)
            if spec.left is not None:
                visible &= key >= query - spec.left
        if head is not None:
            own = head == lax.div(row, jnp.int32(tokens * shape.g))
            visible = own if visible is None else visible & own

        def one_group(group):
            raw = tile.product(q_ref[group, :rows], numbers("k", place, group), trans_b=True)
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
            m, l, acc = (x.at[group, :rows] for x in (m_ref, l_ref, acc_ref))
            tile.add_to_softmax(m, l, acc, raw, values, scores.factor, weigh)

        _each(shape.groups, one_group)

    def attend(tokens: int):
        """The whole tile, which has at most this number of queries."""
        rows = shape.rows(tokens)

        @pl.when(end > first)
        def _():
            copies.wait_for_queries(at)
            if tokens > 1:
                q_ref[...] = _signed(jnp.swapaxes(queries_ref[...], 0, 1).reshape(q_ref.shape), scores)
                return
            for group in range(shape.groups):
                q_ref[group, :of_group] = _signed(queries_ref[0, group * of_group : (group + 1) * of_group], scores)

        tile.start_softmax(*(x.at[:, :rows] for x in (m_ref, l_ref, acc_ref)))

        def one_block(block, place):
            other = 1 - place
            is_last = block + 1 == end_block
            pl.when(~is_last)(lambda: copies.start(at, block + 1, other))
            pl.when(is_last & (following < num_tiles))(lambda: copies.start_tile(following, other))
            copies.wait(at, block, place)
            _take_apart([vmem[name].at[place] for name in "kv"], heads, shape)
            highest = block * shape.block + shape.block - 1
            is_whole = highest <= position
            if spec.left is not None:
                is_whole &= block * shape.block >= position + count - 1 - spec.left
            pl.when(is_whole)(lambda: add_block(block, place, tokens, edge=False))
            pl.when(~is_whole)(lambda: add_block(block, place, tokens, edge=True))
            return other

        state_ref[0] = lax.fori_loop(first_block, end_block, one_block, state_ref[0])
        wait_for_outputs()
        sums_ref[:tokens] = jnp.zeros((tokens, *sums_ref.shape[1:]), jnp.float32)
        row, lane = (lax.broadcasted_iota(jnp.int32, (rows, sums_ref.shape[2]), axis) for axis in range(2))

        def end_group(group):
            m, l = m_ref[group, :rows], l_ref[group, :rows]
            sinks = ref[f"sinks_of_{tokens}"][group] if "sinks_of_1" in ref else None
            out = tile.normalized(acc_ref[group, :rows], m, l, scores, sinks)
            if tokens > 1:
                acc_ref[group] = out
            else:
                outputs_ref[0, group * of_group : (group + 1) * of_group] = out[:of_group].astype(dtype)
            # each head's in its lane
            own = (lane == group * of_group + lax.div(row, jnp.int32(tokens))) & (row < of_group * tokens)
            lse = jnp.where(own, tile.spread(scores.log_sum_exp(m, l), lane.shape[1]), 0.0)
            lse = lse.reshape(of_group, tokens, -1).sum(0) if tokens > 1 else lse.sum(0, keepdims=True)
            sums_ref[:tokens, 0] += lse

        if tokens > 1:
            _each(shape.groups, end_group)
            turned = acc_ref[...].reshape(shape.hq, tokens, shape.dv).astype(dtype)
            outputs_ref[...] = jnp.swapaxes(turned, 0, 1)
        else:
            for group in range(shape.groups):
                end_group(group)
        state_ref[1] = count
        outputs(tiles.query[at], lambda copy: copy.start())

    def outputs(query, act):
        def one(i):
            for semaphore, source, target in ((1, outputs_ref, o_hbm), (2, sums_ref, lse_hbm)):
                act(pltpu.make_async_copy(source.at[i], target.at[query + i], of_tile.at[semaphore]))

        _each(state_ref[1], one)

    def wait_for_outputs():
        """Those of the tile before, or of this one: a wait counts bytes, whatever their place."""
        outputs(0, lambda copy: copy.wait())
        state_ref[1] = 0

    pl.when(count == 1)(lambda: attend(1))
    if shape.tokens > 1:
        pl.when(count > 1)(lambda: attend(shape.tokens))
    pl.when(at == num_tiles - 1)(wait_for_outputs)


def _each(count: Any, act: Callable[[Any], None]) -> None:
    """Calls act for each index; the compiler sees it once."""
    if isinstance(count, int) and count == 1:
        return act(0)
    lax.fori_loop(0, count, lambda index, _: act(index), None)


def _take_apart(pages, memory, shape: Shape) -> None:
    """Stores the rows of each head of two blocks of pages, as _block_of_pages, in memory, as _of_heads."""
    for at, block in enumerate(pages if memory else ()):
        heads = memory[at]
        if shape.heads_first:
            for head in range(shape.groups):
                heads[head] = block[:, head].reshape(heads.shape[1:]).astype(heads.dtype)
            continue
        # Mosaic loads every n-th row only of numbers of 4 bytes, and of 128 columns
        words, parts = memory[2 + at], 4 // block.dtype.itemsize
        per_token = shape.hkv // parts
        for slab, first in enumerate(range(0, block.shape[1], LANES)):
            columns = slice(first, min(first + LANES, block.shape[1]))
            width = columns.stop - first
            words[slab, :, :width] = pltpu.bitcast(block[:, columns], jnp.int32)
            for word in range(per_token):
                found = words[slab, pl.ds(word, shape.block, stride=per_token)][:, :width]
                for part in range(parts):
                    heads[word * parts + part, :, columns] = _number(found, part, block.dtype).astype(heads.dtype)


def _number(words: Array, part: int, dtype: Any) -> Array:
    """The numbers of a dtype in one part of words of 4 bytes, the first in the lowest bits."""
    bits = 8 * jnp.dtype(dtype).itemsize
    highest = words << (32 - bits * (part + 1))
    if bits > 8:
        highest = highest & jnp.int32(-1 << (32 - bits)) if part else highest
        return lax.bitcast_convert_type(highest, jnp.float32)
    if dtype == jnp.int8:
        return highest >> 24
    return lax.bitcast_convert_type((highest >> 24).astype(jnp.int8), dtype)


def _signed(q: Array, scores: Scores) -> Array:
    return q if scores.sign == 1.0 else q * scores.sign
