"""Paged attention as a Mosaic kernel, for TPUs.

Pages, queries and outputs stay in HBM. A program computes a tile of one row's queries, copied to VMEM one by one, and
loops over blocks of that row's pages, which it copies through the page table, a block ahead: while a block is computed,
the next one, or the first one of the next tile with its queries, is on its way.

A tile's heads are multiplied in groups of key heads, as columns.py describes. A key that is not finite spoils the
scores of the other heads in its window, too.

  tiles of one query   a group has enough query heads to fill a tile of memory: all of paged_decode_attention
  tiles of many        a group is one key head, with all its query heads and queries

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
from jfa.kernels.tpu.columns import Columns, in_group, in_windows, out_of_group, out_of_windows
from jfa.kernels.tpu.tile import LANES, Scores
from jfa.types import AttentionSpec, DeviceInfo, PagedOperands, TpuConfig

# Rows of queries and tokens of a block, best first: the first that fits is used. A block is read for all rows, so
# more of them take fewer instructions each
_TILES = ((256, 512), (256, 256), (128, 256), (128, 128))
_SMEM_BYTES = 768 << 10  # of 1 MiB, for the page table and the numbers of the tiles


class Products(NamedTuple):
    """How the heads of a tile are multiplied: in groups of key heads, with a product for scores and one for outputs."""

    tokens: int  # queries of a tile, at most
    groups: int
    heads: int  # key heads of a group
    g: int  # query heads per key head
    packed: int  # queries of one head that fill a tile of memory

    @property
    def of_group(self) -> int:
        """Query heads of a group."""
        return self.heads * self.g

    @property
    def rows(self) -> int:
        """Rows of a product, the heads one after the other."""
        return tile.rounded(self.tokens * self.of_group, self.packed)


class Shape(NamedTuple):
    """The sizes of a call, in elements."""

    tiles: int
    one: Products  # of a tile that has one query
    many: Products | None  # of one that has more: a group is a head
    k: Columns
    v: Columns
    page_size: int
    pages: int  # of a block

    @classmethod
    def of(cls, operands: PagedOperands, config: TpuConfig) -> "Shape":
        n, hq, _ = operands.q.shape
        hkv, page_size = operands.num_kv_heads, operands.k_pages.shape[1]
        g, packed = hq // hkv, tile.sublanes(operands.q.dtype)
        k, v = (Columns.of(pages, hkv) for pages in (operands.k_pages, operands.v_pages))
        heads = next(
            (
                heads
                for heads in range(1, hkv)
                if hkv % heads == 0 and heads * g >= packed and not any(heads * x.size % LANES for x in (k, v))
            ),
            hkv,
        )
        one = Products(tokens=1, groups=hkv // heads, heads=heads, g=g, packed=packed)
        pages = max(1, config.block_kv // page_size)
        if operands.query_start is None:
            return cls(tiles=n, one=one, many=None, k=k, v=v, page_size=page_size, pages=pages)
        tokens = max(1, config.block_q // (g * packed)) * packed
        many = Products(tokens=tokens, groups=hkv, heads=1, g=g, packed=packed)
        # each row, and the queries of no row, may end in a tile that is not full
        tiles = n // tokens + operands.kv_len.shape[0] + 1
        return cls(tiles=tiles, one=one, many=many, k=k, v=v, page_size=page_size, pages=pages)

    @property
    def products(self) -> tuple[Products, ...]:
        return (self.one,) if self.many is None else (self.one, self.many)

    @property
    def tokens(self) -> int:
        """Queries of a tile, at most."""
        return self.products[-1].tokens

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.pages * self.page_size

    @property
    def hkv(self) -> int:
        return self.one.groups * self.one.heads

    @property
    def hq(self) -> int:
        return self.hkv * self.one.g


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
    if (k.dtype.itemsize == 1) != (v.dtype.itemsize == 1):
        return "the TPU kernel reads keys and values that are both quantized, or none of them"
    smallest = TpuConfig(**dict(zip(("block_q", "block_kv"), _TILES[-1], strict=True)))
    shape = Shape.of(operands, smallest)
    return (
        tile.why_not_dtypes(operands.q, k, v)
        or tile.why_not_head_dims(operands.q.shape[2], operands.value_head_dim)
        or _why_not_pages(operands, device)
        or _why_not_smem(operands, shape)
        or tile.why_not_vmem(
            vmem_bytes(operands, smallest), device, f"blocks of {shape.block} tokens with {shape.hkv} key heads"
        )
    )


def _why_not_pages(operands: PagedOperands, device: DeviceInfo) -> str | None:
    """The reason why pages are not read as they are stored; None if they are."""
    hkv = operands.num_kv_heads
    for name, pages, d in (
        ("key_pages", operands.k_pages, operands.q.shape[2]),
        ("value_pages", operands.v_pages, operands.value_head_dim),
    ):
        _, page_size, columns = pages.shape
        if pages.dtype == jnp.uint8 and page_size % 4:
            return f"{name} of {page_size} tokens: 4-bit numbers are unpacked from words of four tokens"
        if device.platform != "tpu":
            continue
        if columns % LANES:
            size = columns // hkv
            heads = tile.rounded(hkv, LANES // math.gcd(size, LANES))
            wider = tile.rounded(size, LANES // math.gcd(hkv, LANES))
            way_out = f"to {heads} key heads, and query heads in proportion"
            if hkv * wider <= heads * size:
                way_out = f"to a head_dim of {wider * (d // size)}, and give scale"
            return (
                f"{name} with {columns} columns ({hkv} heads of {d}), no multiple of {LANES}, are stored with pages in "
                f"lanes: XLA would copy all pages before each call; pad queries and pages with zeros {way_out}"
            )
        # XLA stores pages in tiles of so many tokens, or in smaller ones if a page has fewer
        of_tile = 32 if pages.dtype.itemsize == 1 else 8
        if page_size % of_tile and (page_size < 4 or of_tile % page_size):
            return (
                f"{name} of {page_size} tokens are no whole tiles of {of_tile}, which Mosaic does not copy; use a "
                "page_size that is a power of two of at least 4"
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
    dtype, of_pages = operands.q.dtype, (operands.k_pages.dtype, operands.v_pages.dtype)
    both = (shape.k, shape.v)
    blocks = sum(2 * stored((shape.block, x.total), kind) for x, kind in zip(both, of_pages, strict=True))
    scales = 0 if operands.k_scales is None else 4 * stored((shape.hkv, shape.block), jnp.float32)
    copied = sum(stored((shape.tokens, shape.hq, x.of_head), dtype) for x in both)
    of_rows = sum(stored(x.shape, x.dtype) for one in shape.products for x in _of_rows(one, shape, dtype))
    if operands.sinks is not None:
        of_rows += sum(2 * stored((one.groups, one.rows, LANES), jnp.float32) for one in shape.products)
    of_products = max(
        sum(stored((shape.block, x.halves * x.width(one.heads)), dtype) for x in both)
        + 3 * stored((one.rows, shape.block), jnp.float32)
        for one in shape.products
    )
    # outputs are turned as float32
    turned = 2 * stored((shape.hq, shape.tokens, max(x.of_head for x in both)), jnp.float32)
    return blocks + scales + copied + of_rows + max(of_products, turned)


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
        return out_of_windows(out, shape.v), lse[:, 0, : shape.hq]


def _call(
    operands: PagedOperands, tiles: _Tiles, shape: Shape, spec: AttentionSpec, *, vmem_limit_bytes, interpret
) -> tuple[Float[Array, "n hq of_head"], Float[Array, "n 1 columns"]]:
    b, n, q = operands.page_table.shape[0], operands.q.shape[0], operands.q
    named: dict[str, Any] = {}
    if operands.sinks is not None:
        for at, one in enumerate(shape.products):
            of_rows = jnp.repeat(operands.sinks.astype(jnp.float32).reshape(one.groups, -1), one.tokens, axis=1)
            of_rows = jnp.pad(of_rows, ((0, 0), (0, one.rows - of_rows.shape[1])))
            sinks = jnp.broadcast_to(of_rows[..., None], (*of_rows.shape, LANES))
            named[f"sinks_{at}"] = sinks, pl.BlockSpec(sinks.shape, lambda *grid: (0, 0, 0))
    pages = {"k": operands.k_pages, "v": operands.v_pages}
    blocks = {name: pltpu.VMEM((2, shape.block, x.shape[2]), x.dtype) for name, x in pages.items()}
    for name, scales in (("k_scales", operands.k_scales), ("v_scales", operands.v_scales)):
        if scales is not None:
            pages[name] = _scales(scales, operands.page_table, shape)
            if pages[name[0]].dtype == jnp.uint8:  # _doubled_levels
                pages[name] *= 0.5
            blocks[name] = pltpu.VMEM((2, *pages[name].shape[2:]), jnp.float32)
    in_hbm = {"q": in_windows(q, shape.k), **pages}
    named |= {name: (x, pl.BlockSpec(memory_space=pl.ANY)) for name, x in in_hbm.items()}
    columns, most = tile.rounded(shape.hq, LANES), shape.products[-1]
    scores = shape.tiles * most.groups * most.rows * operands.capacity
    return pl.pallas_call(
        functools.partial(_paged_kernel, names=tuple(named), copied=tuple(blocks), shape=shape, spec=spec),
        name="paged_decode_attention" if operands.query_start is None else "ragged_paged_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tiles) + 1,
            grid=(shape.tiles,),
            in_specs=[block for _, block in named.values()],
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
            scratch_shapes=[
                pltpu.VMEM((shape.tokens, shape.hq, shape.k.of_head), q.dtype),
                pltpu.VMEM((shape.tokens, shape.hq, shape.v.of_head), q.dtype),
                pltpu.VMEM((shape.tokens, 1, columns), jnp.float32),
                pltpu.SMEM((2,), jnp.int32),
                pltpu.SemaphoreType.DMA((3,)),
                pltpu.SemaphoreType.DMA((2, len(blocks))),
                *blocks.values(),
                *(x for one in shape.products for x in _of_rows(one, shape, q.dtype)),
            ],
        ),
        out_shape=[
            output((n, shape.hq, shape.v.of_head), q.dtype, like=q),
            output((n, 1, columns), jnp.float32, like=q),
        ],
        # in order: a tile starts the copies of the next one
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem_limit_bytes),
        cost_estimate=pl.CostEstimate(
            flops=2 * scores * sum(x.halves * x.width(most.heads) for x in (shape.k, shape.v)),
            transcendentals=scores,
            bytes_accessed=sum(
                b * operands.capacity * math.prod(x.shape[2:]) * x.dtype.itemsize
                for x in (operands.k_pages, operands.v_pages)
            ),
        ),
        interpret=interpret,
    )(*tiles, operands.page_table, *(x for x, _ in named.values()))


class _Rows(NamedTuple):
    """Memory for the rows of a tile's products: a running softmax, and the queries with zeros."""

    q: Any  # [groups, rows, columns]
    m: Any  # [groups, rows, LANES]
    l: Any
    acc: Any  # [groups, rows, columns]


def _of_rows(products: Products, shape: Shape, dtype: Any) -> _Rows:
    k, v = (x.halves * x.width(products.heads) for x in (shape.k, shape.v))
    sizes = ((k, dtype), (LANES, jnp.float32), (LANES, jnp.float32), (v, jnp.float32))
    return _Rows(*(pltpu.VMEM((products.groups, products.rows, size), kind) for size, kind in sizes))


def _scales(scales: Array, page_table: Array, shape: Shape) -> Float[Array, "b blocks hkv block"]:
    """The scales of each row's blocks."""
    found = scales[page_table].astype(jnp.float32)  # [b, pages, page_size, hkv]
    found = jnp.pad(found, ((0, 0), (0, -found.shape[1] % shape.pages), (0, 0), (0, 0)))
    return jnp.swapaxes(found.reshape(found.shape[0], -1, shape.block, shape.hkv), 2, 3)


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
            rows = pl.ds(pl.multiple_of(i * shape.page_size, shape.page_size), shape.page_size)
            for at, name in enumerate("kv"):
                source, target = self.hbm[name].at[page], self.vmem[name].at[place, rows]
                act(pltpu.make_async_copy(source, target, self.of_blocks.at[place, at]))

        _each(jnp.minimum(shape.pages, last_page - first_page), one_page)
        for at, name in enumerate(name for name in self.vmem if name != "q"):
            if name.endswith("scales"):
                source, target = self.hbm[name].at[row, block], self.vmem[name].at[place]
                act(pltpu.make_async_copy(source, target, self.of_blocks.at[place, at]))


def _paged_kernel(
    *refs,  # in this order:
    # _Tiles, i32[tiles] each, and the page table; the arguments by `names`: sinks [groups, rows, LANES], and in HBM
    # q [n, hq, of_head], pages and scales; in HBM o [n, hq, of_head], lse [n, 1, columns]; of a tile q, o and lse,
    # [tokens, ..]; i32[2]: the place of the next block, the number of outputs on their way; semaphores of q, o and lse,
    # and of blocks [2, copied]; two blocks of each of `copied`; _Rows of each of shape.products
    names: tuple[str, ...],
    copied: tuple[str, ...],
    shape: Shape,
    spec: AttentionSpec,
):
    numbers_of_tiles = len(_Tiles._fields)
    tiles, page_table_ref, refs = _Tiles(*refs[:numbers_of_tiles]), refs[numbers_of_tiles], refs[numbers_of_tiles + 1 :]
    ref, refs = dict(zip(names, refs, strict=False)), refs[len(names) :]
    o_hbm, lse_hbm, queries_ref, outputs_ref, sums_ref, state_ref, of_tile, of_blocks, *buffers = refs
    vmem, rows_of = dict(zip(copied, buffers, strict=False)), buffers[len(copied) :]
    copies = _Copies(shape, tiles, page_table_ref, ref, {"q": queries_ref, **vmem}, of_tile.at[0], of_blocks)
    dtype, scores = queries_ref.dtype, Scores(spec=spec)
    at, num_tiles = pl.program_id(0), pl.num_programs(0)
    position, count, first, end, following = (x[at] for x in tiles[2:])
    first_block, end_block = copies.blocks(at)

    @pl.when(at == 0)
    def _():
        state_ref[0], state_ref[1] = 0, 0
        begin = jnp.where(end > first, 0, following)
        pl.when(begin < num_tiles)(lambda: copies.start_tile(begin, 0))

    def numbers(name: str, place, group, heads: int, width: int):
        """[block, halves * width] of the keys or values of a group."""
        return _numbers(vmem[name].at[place], getattr(shape, name).start(group, heads), width, dtype)

    def add_block(block, place, products: Products, rows: _Rows, *, edge: bool):
        start = block * shape.block
        key = start + lax.broadcasted_iota(jnp.int32, (1, shape.block), 1)
        visible = None
        if edge:
            row = lax.broadcasted_iota(jnp.int32, (products.rows, 1), 0)
            query = position + (lax.rem(row, jnp.int32(products.tokens)) if products.tokens > 1 else 0)
            visible = (key <= query) & (key < end)
            if spec.left is not None:
                visible &= key >= query - spec.left

        def scales(name: str, group):
            """Of each row its head's, or of all rows that of the only head."""
            heads = [vmem[name][place, pl.ds(group * products.heads + i, 1)] for i in range(products.heads)]
            if edge:
                heads = [jnp.where((key >= first) & (key < end), x, 0.0) for x in heads]
            if len(heads) == 1:
                return heads[0]
            head = lax.div(lax.broadcasted_iota(jnp.int32, (products.rows, 1), 0), jnp.int32(products.g))
            found = heads[0]
            for i, x in enumerate(heads[1:], 1):
                found = jnp.where(head >= i, x, found)
            return found

        def add_group(group, less: int):
            """With windows that are less wide by so many columns."""
            k_width, v_width = (x.width(products.heads) - less for x in (shape.k, shape.v))
            q = rows.q[group, :, : shape.k.halves * k_width]
            raw = tile.product(q, numbers("k", place, group, products.heads, k_width), trans_b=True)
            if "k_scales" in vmem:
                raw = raw * scales("k_scales", group)
            raw = scores.raw(raw)
            if visible is not None:
                raw = jnp.where(visible, raw, -jnp.inf)
            values = numbers("v", place, group, products.heads, v_width)
            if edge:
                # slots without a token may contain anything, and 0 * NaN is NaN
                key_of_row = start + lax.broadcasted_iota(jnp.int32, values.shape, 0)
                values = jnp.where((key_of_row >= first) & (key_of_row < end), values, 0)
            weigh = functools.partial(jnp.multiply, scales("v_scales", group)) if "v_scales" in vmem else None
            m, l, acc = rows.m.at[group], rows.l.at[group], rows.acc.at[group, :, : shape.v.halves * v_width]
            tile.add_to_softmax(m, l, acc, raw, values, scores.factor, weigh)

        def one_group(group):
            if products.tokens == 1 or not (shape.k.differ and shape.v.differ):
                return add_group(group, 0)
            less = shape.k.needs_less(group) & shape.v.needs_less(group)
            pl.when(less)(lambda: add_group(group, LANES))
            pl.when(~less)(lambda: add_group(group, 0))

        _each(products.groups, one_group)

    def attend(products: Products, rows: _Rows, sinks_ref):
        """The whole tile."""
        of_group, tokens = products.of_group, products.tokens

        @pl.when(end > first)
        def _():
            copies.wait_for_queries(at)
            if tokens > 1:
                rows.q[...] = _signed(jnp.swapaxes(queries_ref[...], 0, 1).reshape(rows.q.shape), scores)
                return
            for group in range(products.groups):
                q = queries_ref[0, group * of_group : (group + 1) * of_group]
                rows.q[group, :of_group] = _signed(in_group(q, group, products.heads, shape.k), scores)

        tile.start_softmax(rows.m, rows.l, rows.acc)

        def one_block(block, place):
            other = 1 - place
            is_last = block + 1 == end_block
            pl.when(~is_last)(lambda: copies.start(at, block + 1, other))
            pl.when(is_last & (following < num_tiles))(lambda: copies.start_tile(following, other))
            copies.wait(at, block, place)
            highest = block * shape.block + shape.block - 1
            is_whole = highest <= position
            if spec.left is not None:
                is_whole &= block * shape.block >= position + count - 1 - spec.left
            pl.when(is_whole)(lambda: add_block(block, place, products, rows, edge=False))
            pl.when(~is_whole)(lambda: add_block(block, place, products, rows, edge=True))
            return other

        state_ref[0] = lax.fori_loop(first_block, end_block, one_block, state_ref[0])
        wait_for_outputs()
        sums_ref[:tokens] = jnp.zeros((tokens, *sums_ref.shape[1:]), jnp.float32)
        row, lane = (lax.broadcasted_iota(jnp.int32, (products.rows, sums_ref.shape[2]), axis) for axis in range(2))

        def end_group(group):
            m, l = rows.m[group], rows.l[group]
            out = tile.normalized(rows.acc[group], m, l, scores, None if sinks_ref is None else sinks_ref[group])
            if tokens > 1:
                rows.acc[group] = out
            else:
                own = out_of_group(out[:of_group], group, products.heads, shape.v)
                outputs_ref[0, group * of_group : (group + 1) * of_group] = own.astype(dtype)
            # each head's in its lane
            own = (lane == group * of_group + lax.div(row, jnp.int32(tokens))) & (row < of_group * tokens)
            lse = jnp.where(own, tile.spread(scores.log_sum_exp(m, l), lane.shape[1]), 0.0)
            lse = lse.reshape(of_group, tokens, -1).sum(0) if tokens > 1 else lse.sum(0, keepdims=True)
            sums_ref[:tokens, 0] += lse

        if tokens > 1:
            _each(products.groups, end_group)
            turned = rows.acc[...].reshape(shape.hq, tokens, shape.v.of_head).astype(dtype)
            outputs_ref[...] = jnp.swapaxes(turned, 0, 1)
        else:
            for group in range(products.groups):
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

    for i, (products, fits) in enumerate(zip(shape.products, (count == 1, count > 1), strict=False)):
        fields = len(_Rows._fields)
        rows = _Rows(*rows_of[i * fields : (i + 1) * fields])
        pl.when(fits)(functools.partial(attend, products, rows, ref.get(f"sinks_{i}")))
    pl.when(at == num_tiles - 1)(wait_for_outputs)


def _each(count: Any, act: Callable[[Any], None]) -> None:
    """Calls act for each index; the compiler sees it once."""
    if isinstance(count, int) and count == 1:
        return act(0)
    lax.fori_loop(0, count, lambda index, _: act(index), None)


def _numbers(block, start, width: int, dtype: Any) -> Float[Array, "block columns"]:
    """The numbers in a window of a block of pages; of 4 bits those of the low halves, then the high ones, doubled."""
    stored = block[:, pl.ds(start if isinstance(start, int) else pl.multiple_of(start, LANES), width)]
    if stored.dtype != jnp.uint8:
        return stored.astype(dtype)
    words = pltpu.bitcast(stored, jnp.int32)  # TPUs shift no bytes
    return jnp.concatenate([_doubled_levels(x, dtype) for x in (words, words >> 4)], axis=1)


def _doubled_levels(words: Array, dtype: Any) -> Array:
    """2 n - 15, an integer, for the number n in the low half of each byte."""
    doubled = (words << 1) & 0x1E1E1E1E
    # + 128 - 15, which needs no bit of the next byte; then - 128
    return pltpu.bitcast((doubled + 0x71717171) ^ -0x7F7F7F80, jnp.int8).astype(dtype)


def _signed(q: Array, scores: Scores) -> Array:
    return q if scores.sign == 1.0 else q * scores.sign
