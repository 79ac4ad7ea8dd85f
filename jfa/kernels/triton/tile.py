"""One tile of scores: code that the forward and backward kernels share.

A kernel's arrays are named: `arguments` collects the optional arrays of a call with their BlockSpecs, and `Tile`
computes scores, masks and dropout from them. Index arrays are passed as a column and a row, queries by keys or keys by
queries, so that the same code also serves kernels that compute the scores transposed.

This is one file so that the arguments, mask and value of each option (bias, window, soft cap, dropout) are together.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sized
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa import dropout
from jfa.kernels.common import Shape
from jfa.kernels.triton._pallas import dot, load, pl
from jfa.kernels.triton._primitives import exp2, fma
from jfa.kernels.triton.casts import rounded_half_up
from jfa.types import AttentionSpec, DeviceInfo, FlashConfig, Operands

LOG2_E = math.log2(math.e)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256

_SMALL_CAP = 256.0  # largest soft cap for which a faster tanh is precise enough


def kind_of(device: DeviceInfo) -> str:
    """The kind of architecture that selects the default tile sizes: "cdna", "rdna" or "cuda"."""
    if device.platform == "cuda":
        return "cuda"
    return "rdna" if device.arch.startswith("gfx1") else "cdna"


def safe_config(
    tiles: Mapping[int, tuple[int, int, int]], kind: str, widest: int, *, block_d: int | None
) -> FlashConfig:
    """The first entry of tiles {largest head_dim: (block_q, block_kv, num_warps)} whose head_dim is at least widest."""
    block_q, block_kv, num_warps = next(tile for limit, tile in tiles.items() if widest <= limit)
    stages = 2 if kind == "cuda" else 1  # pipelining on AMD uses registers that the tile needs
    return FlashConfig(block_q=block_q, block_kv=block_kv, num_warps=num_warps, num_stages=stages, block_d=block_d)


def padded(head_dim: int) -> int:
    """head_dim rounded up to a power of two, as Triton requires of array sizes; loads past head_dim are masked."""
    return max(MIN_HEAD_DIM, pl.next_power_of_2(head_dim))


def whole_tiles(length: int, block: int) -> int:
    """A length rounded up to whole tiles, so that none starts out of bounds; loads past the length are masked."""
    return pl.cdiv(length, block) * block


def chunks(head_dim: int, block_d: int | None) -> tuple[tuple[int, int], ...]:
    """(start, size) of the pieces into which a padded head_dim is split for matrix products."""
    whole = padded(head_dim)
    size = min(block_d or whole, whole)
    return tuple((start, size) for start in range(0, whole, size))


def arguments(operands: Operands, config: FlashConfig) -> dict[str, tuple[Any, Any]]:
    """The optional arrays of a call by name, as (array, BlockSpec of the whole array).

    Bias and mask keep their axes of size 1. Lengths are rounded up to tiles: loads past them are masked.
    """
    tq, tk = operands.q.shape[1], operands.k.shape[1]
    rows, keys = whole_tiles(tq, config.block_q), whole_tiles(tk, config.block_kv)
    arrays: dict[str, Any] = {name: getattr(operands, name) for name in OPTIONAL}
    if operands.mask is not None:
        arrays["mask"] = operands.mask.astype(jnp.int8)  # Triton has no boolean arrays in memory
    found = {}
    for name, x in arrays.items():
        if x is None:
            continue
        block = x.shape
        if name in ("sinks", "alibi_slopes"):
            x = x.astype(jnp.float32)
        if name in ("bias", "mask"):
            block = (*x.shape[:2], rows if x.shape[2] > 1 else 1, keys if x.shape[3] > 1 else 1)
        elif name.endswith("segments"):
            block = (x.shape[0], rows if name == "q_segments" else keys)
        found[name] = x, pl.BlockSpec(block, functools.partial(_at_the_start, x.ndim))
    return found


OPTIONAL = tuple(name for name in Operands._fields if name not in ("q", "k", "v"))


def _at_the_start(ndim: int, *grid) -> tuple[int, ...]:
    return (0,) * ndim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The tiles that a program visits: whole tiles, which need no positional mask, and edge tiles around them."""

    first: Any  # the visible keys (or queries) are [first, end)
    end: Any
    tile_first: Any
    tile_end: Any
    whole_first: Any
    whole_end: Any

    def walk(self, body, carry):
        """Runs body(n, carry, edge=) over the tiles n: first the whole ones, then those at the edges."""
        return self.walk_heads(lambda n, carry, edge, head: body(n, carry, edge=edge), carry, 1)

    def walk_heads(self, body, carry, heads: int):
        """Runs body(n, carry, edge=, head=) over all heads' tiles: one loop for whole tiles, one for those at edges."""
        num_whole = self.whole_end - self.whole_first
        before = self.whole_first - self.tile_first
        num_edges = jnp.maximum(0, (self.tile_end - self.tile_first) - num_whole)

        def turn(n, carry, *, edge: bool, count):
            head = jnp.int32(0)
            if heads > 1:
                head = lax.div(n, jnp.maximum(count, 1))
                n = n - head * count
            if edge:
                n = jnp.where(n < before, self.tile_first + n, self.whole_end + n - before)
            else:
                n = self.whole_first + n
            return body(n, carry, edge=edge, head=head)

        for edge, count in ((False, num_whole), (True, num_edges)):
            carry = lax.fori_loop(0, heads * count, functools.partial(turn, edge=edge, count=count), carry)
        return carry

    def part(self, i, n: int) -> "Span":
        """The i-th of n equal parts of the tiles."""
        each = lax.div(jnp.maximum(0, self.tile_end - self.tile_first) + (n - 1), jnp.int32(n))
        first = self.tile_first + i * each
        end = jnp.minimum(self.tile_end, first + each)
        whole_first = jnp.clip(self.whole_first, first, jnp.maximum(first, end))
        return dataclasses.replace(
            self,
            tile_first=first,
            tile_end=end,
            whole_first=whole_first,
            whole_end=jnp.clip(self.whole_end, whole_first, jnp.maximum(whole_first, end)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listed:
    """The tiles that a program visits by the lists of a BlockMask, for walk and walk_heads as of a Span."""

    ref: dict[str, Any]
    block: int  # rows of a tile; tiles of the lists consist of several
    listed_block: int
    end: Any  # length of the axis
    first: int = 0

    def walk(self, body, carry):
        """Runs body(n, carry, edge=, kind=) over the tiles n; kind: index of the mask's tile."""
        return self.walk_heads(lambda n, carry, edge, kind, head: body(n, carry, edge=edge, kind=kind), carry, 1)

    def walk_heads(self, body, carry, heads: int):
        """Runs body(n, carry, edge=, kind=, head=) over the tiles of all heads."""
        parts = self.listed_block // self.block

        def one_head(head, carry):
            # the lists of a mask that is the same for all heads are there once
            at = head if self.ref["visited"].shape[0] > 1 else 0

            def turn(n, carry, *, edge: bool):
                place, part = divided(n, parts)
                tile, kind = self.ref["visited"][at, place], self.ref["kinds"][at, place]
                return body(tile * parts + part, carry, edge=edge, kind=kind, head=head)

            first, whole, end = 0, self.ref["num_whole"][at] * parts, self.ref["num_visited"][at] * parts
            carry = lax.fori_loop(first, whole, functools.partial(turn, edge=False), carry)
            return lax.fori_loop(whole, end, functools.partial(turn, edge=True), carry)

        if heads == 1:
            return one_head(jnp.int32(0), carry)
        return lax.fori_loop(0, heads, one_head, carry)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The properties that all tiles of one query head share, inside a kernel.

    ref: the kernel's arguments by name. row, head: batch row and query head of the program (its loop may change head).
    """

    ref: dict[str, Any]
    shape: Shape
    spec: AttentionSpec
    config: FlashConfig
    row: Any
    head: Any
    q_len: Any  # valid queries of the row
    kv_len: Any  # valid keys of the row
    offset: Any  # position of the row's first query

    @classmethod
    def of(
        cls, ref: dict[str, Any], *, shape: Shape, spec: AttentionSpec, config: FlashConfig, row: Any, head: Any
    ) -> "Tile":
        """The Tile of a batch row; lengths and offset come from the arguments if they are there."""
        return cls(
            ref=ref,
            shape=shape,
            spec=spec,
            config=config,
            row=row,
            head=head,
            q_len=jnp.minimum(ref["q_len"][row], shape.tq) if "q_len" in ref else shape.tq,
            kv_len=jnp.minimum(ref["kv_len"][row], shape.tk) if "kv_len" in ref else shape.tk,
            offset=ref["q_offset"][row] if "q_offset" in ref else 0,
        )

    @property
    def exact(self) -> bool:
        """Whether inputs are float32, so that the approximations for 16-bit dtypes must not be used."""
        return self.ref["q"].dtype == jnp.float32

    @property
    def sm_scale(self) -> float:
        return self.spec.sm_scale

    @property
    def _simple(self) -> bool:
        """Whether a score is only a scaled product: then its scale is merged into the factor of the exponent.

        Other scores may have any magnitude (some callers mask with a bias of -1e30), so the row's maximum is subtracted
        before the factor is applied.
        """
        return self.spec.softcap is None and "bias" not in self.ref and "alibi_slopes" not in self.ref

    @property
    def factor(self) -> float:
        """The factor from raw scores to base-2 units. Positive, so that the maximum may be taken before applying it."""
        if self.spec.softcap is not None:
            return LOG2_E * self.spec.softcap
        return LOG2_E * (abs(self.sm_scale) or 1.0) if self._simple else LOG2_E

    @property
    def q_factor(self) -> float:
        """The factor of the queries: the sign of the scale if `factor` has only its magnitude."""
        if not self._simple or self.sm_scale > 0:
            return 1.0
        return math.copysign(1.0 if self.sm_scale else 0.0, self.sm_scale)

    @property
    def has_data_mask(self) -> bool:
        """Whether visibility depends on arrays and not only on positions: then any tile may have masked scores."""
        return "mask" in self.ref or "q_segments" in self.ref or "mask_tiles" in self.ref

    @property
    def may_be_minus_infinity(self) -> bool:
        """Whether a score may be -inf even if no position is masked."""
        return "mask" in self.ref or "q_segments" in self.ref or "bias" in self.ref

    def visited_keys(self, first_row, block_q: int, block_kv: int) -> Span | Listed:
        """The tiles of keys_of; with a BlockMask those in its list."""
        if "visited" not in self.ref:
            return self.keys_of(first_row, block_q, block_kv)
        return Listed(ref=self.ref, block=block_kv, listed_block=self.ref["mask_tiles"].shape[2], end=self.kv_len)

    def visited_queries(self, first_key, block_q: int, block_kv: int) -> Span | Listed:
        """The tiles of queries_of; with a BlockMask those in its list."""
        if "visited" not in self.ref:
            return self.queries_of(first_key, block_q, block_kv)
        return Listed(ref=self.ref, block=block_q, listed_block=self.ref["mask_tiles"].shape[1], end=self.q_len)

    def keys_of(self, first_row, block_q: int, block_kv: int, *, tree=None) -> Span:
        """The tiles of keys that the queries [first_row, first_row + block_q) may see.

        tree: whether the queries are of a tree, with positions between those of the first and the last query of the
        row, and a mask from the row's first query on; None: they never are.
        """
        first, end = 0, self.kv_len
        whole_first, whole_end = 0, self.kv_len
        lowest = first_row if tree is None else jnp.where(tree, jnp.int32(0), first_row)
        # the window of the last row starts and ends furthest to the right
        if self.spec.left is not None:
            first = jnp.maximum(0, lowest + self.offset - self.spec.left)
            whole_first = jnp.maximum(0, first_row + block_q - 1 + self.offset - self.spec.left)
        if self.spec.right is not None:
            # padding rows see no keys: keys past those of the last valid row may contain anything
            last = jnp.minimum(first_row + block_q, self.q_len)
            end = jnp.minimum(self.kv_len, last + self.offset + self.spec.right)
            whole_end = jnp.minimum(self.kv_len, first_row + 1 + self.offset + self.spec.right)
        if tree is not None:
            whole_end = jnp.where(tree, jnp.int32(self.offset), whole_end)
        # int32: Pallas (jax 0.12) lowers a select between two weakly typed numbers as one of booleans
        end = jnp.where(first_row < self.q_len, jnp.int32(end), 0)
        return self._span(first, end, whole_first, tile_of(whole_end, block_kv), block_kv)

    def queries_of(self, first_key, block_q: int, block_kv: int) -> Span:
        """The tiles of queries that may see the keys [first_key, first_key + block_kv).

        Queries past the row's length do not make a tile an edge tile: their log-sum-exp masks them.
        """
        last_key = first_key + block_kv - 1
        first, end = 0, self.q_len
        whole_first, whole_end = 0, tile_of(self.q_len + block_q - 1, block_q)
        if self.spec.right is not None:
            first = jnp.maximum(0, first_key - self.spec.right - self.offset)
            whole_first = jnp.maximum(0, last_key - self.spec.right - self.offset)
        if self.spec.left is not None:
            end = jnp.minimum(self.q_len, last_key + self.spec.left - self.offset + 1)
            whole = jnp.maximum(0, first_key + self.spec.left - self.offset + 1)
            whole_end = jnp.minimum(whole_end, tile_of(whole, block_q))
        end = jnp.where(first_key < self.kv_len, jnp.int32(end), 0)
        whole_end = jnp.where(last_key < self.kv_len, jnp.int32(whole_end), 0)
        return self._span(first, end, whole_first, whole_end, block_q)

    def _span(self, first, end, whole_first, whole_end_tile, block: int) -> Span:
        tile_first, tile_end = tile_of(first, block), tile_of(end + block - 1, block)
        if "tiles" in self.ref:
            tile_first = jnp.maximum(tile_first, self.ref["tiles"][0])
            tile_end = jnp.minimum(tile_end, self.ref["tiles"][1])
        beyond = jnp.maximum(tile_first, tile_end)
        whole_first = jnp.clip(tile_of(whole_first + block - 1, block), tile_first, beyond)
        whole_end = jnp.clip(whole_end_tile, whole_first, jnp.maximum(whole_first, tile_end))
        return Span(
            first=first,
            end=end,
            tile_first=tile_first,
            tile_end=tile_end,
            whole_first=whole_first,
            whole_end=whole_end,
        )

    def raw(self, product: Float[Array, "x y"], rows, keys) -> Float[Array, "x y"]:
        """Scores before masks and before `factor` is applied; with softcap, the tanh."""
        if self._simple:
            return product
        if "bias" in self.ref:
            bias = self._per_score("bias", rows, keys, other=0.0).astype(jnp.float32)
            scores = fma(product, self.sm_scale, bias)
        else:
            scores = product * self.sm_scale
        if "alibi_slopes" in self.ref:
            row = self.row if self.ref["alibi_slopes"].shape[0] > 1 else 0
            scores = fma(self.distance(rows, keys), self.ref["alibi_slopes"][row, self.head], scores)
        if self.spec.softcap is None:
            return scores
        return self._tanh(scores * (1.0 / self.spec.softcap))

    def distance(self, rows, keys) -> Float[Array, "x y"]:
        """The factor of ALiBi's slope: minus the distance of a key from the query's position."""
        return -jnp.abs(rows + self.offset - keys).astype(jnp.float32)

    def visible(self, rows, keys, *, edge: bool, depths=None, kind=None):
        """The mask of visible scores; None: all are. edge: positions may mask some.

        depths: distances of the queries from the position of the first one; None: rows.
        kind: index of the tile of a BlockMask; it masks edges only.
        """
        conditions = []
        if edge:
            # padding rows see no keys: keys past those of the valid rows may contain anything
            conditions.append((keys < self.kv_len) & (rows < self.q_len))
            position = rows + self.offset
            if self.spec.left is not None:
                lowest = position if depths is None else depths + self.offset
                conditions.append(keys >= lowest - self.spec.left)
            if self.spec.right is not None:
                conditions.append(keys <= position + self.spec.right)
            if kind is not None:
                tiles = self.ref["mask_tiles"]
                _, block_q, block_kv = tiles.shape
                whole = jnp.broadcast_shapes(rows.shape, keys.shape)
                at = (jnp.broadcast_to(lax.rem(x, jnp.int32(n)), whole) for x, n in ((rows, block_q), (keys, block_kv)))
                conditions.append(load(tiles.at[kind, *at]) != 0)
        if "mask" in self.ref:
            conditions.append(self._per_score("mask", rows, keys, other=0) != 0)
        if "q_segments" in self.ref:
            q_ids = load(self.ref["q_segments"].at[self.row, rows], mask=rows < self.shape.tq, other=0)
            kv_ids = load(self.ref["kv_segments"].at[self.row, keys], mask=keys < self.shape.tk, other=0)
            conditions.append(q_ids == kv_ids)
        if not conditions:
            return None
        both = conditions[0]
        for condition in conditions[1:]:
            both = both & condition
        return jnp.broadcast_to(both, jnp.broadcast_shapes(rows.shape, keys.shape))

    def kept(self, rows, keys):
        """The mask of weights that dropout keeps; None: all."""
        if "dropout_seed" not in self.ref:
            return None
        seed = self.ref["dropout_seed"]
        seed = dropout.row_seed((seed[0], seed[1]), self.row, self.head, broadcast=self.spec.broadcast_dropout)
        return dropout.keep(seed, rows, keys, rate=self.spec.dropout_rate)

    @property
    def unit(self) -> float:
        """The factor from a row's maximum, as passed to weights(), to natural units."""
        return 1.0 / LOG2_E if self._simple else self.factor / LOG2_E

    def maximum(self, scores: Array) -> Array:
        """The maximum of each row of raw scores, in the units that weights() takes."""
        return scores.max(1) * self.factor if self._simple else scores.max(1)

    def weights(self, scores: Array, m: Array) -> Array:
        """e^(score - m) of raw scores; m broadcasts, and is in base-2 units if _simple, otherwise raw."""
        return exp2(fma(scores, self.factor, -m) if self._simple else (scores - m) * self.factor)

    def rescale(self, m: Array, m_next: Array) -> Array:
        """e^(m - m_next) for maxima in the units that weights() takes."""
        return exp2(m - m_next if self._simple else (m - m_next) * self.factor)

    @property
    def early_scale(self) -> float:
        """The factor of a score's gradient before rounding: without the scale, float16 would overflow."""
        half = self.ref["q"].dtype == jnp.float16
        return self.sm_scale if half and self.sm_scale else 1.0

    def rounded(self, x: Array, dtype: Any) -> Array:
        """x rounded to the dtype of a product's operand."""
        if dtype != jnp.bfloat16 or not self.config.round_half_up:
            return x.astype(dtype)
        return rounded_half_up(x)

    def _tanh(self, x: Array) -> Array:
        if self.exact or self.spec.softcap is None or self.spec.softcap > _SMALL_CAP:
            return jnp.tanh(x)
        # 1 - 2 / (1 + e^2x): the error is one rounding of 1, which times a small cap is less than that of 16-bit inputs
        root = lax.rsqrt(1.0 + exp2(x * (2 * LOG2_E)))
        return fma(-2.0 * root, root, 1.0)

    def _per_score(self, name: str, rows, keys, *, other: float) -> Array:
        ref = self.ref[name]
        batches, heads, num_rows, num_keys = ref.shape
        whole = jnp.broadcast_shapes(rows.shape, keys.shape)
        at_rows, at_keys = (
            jnp.broadcast_to(at if size > 1 else jnp.zeros_like(at), whole)
            for at, size in ((rows, num_rows), (keys, num_keys))
        )
        inside = (rows < self.shape.tq) & (keys < self.shape.tk)
        row, head = (at if n > 1 else jnp.int32(0) for at, n in ((self.row, batches), (self.head, heads)))
        place = ref.at[row, head, at_rows, at_keys]
        return load(place, mask=inside, other=other)


def product(a: Array, b: Array, *, trans_a: bool = False, trans_b: bool = False) -> Array:
    """A matrix product with float32 sums; float32 inputs are not rounded to tf32."""
    return dot(a, b, trans_a=trans_a, trans_b=trans_b, precision="highest" if a.dtype == jnp.float32 else None)


def sum_of_products(pairs) -> Array:
    """The sum of the products a b^T over pieces of the head_dim."""
    total = None
    for a, b in pairs:
        if total is None:
            total = product(a, b, trans_b=True)
        elif a.dtype == jnp.float32:
            # not an addition: Triton would fuse it with the product into one long chain of rounded sums
            total = total - product(-a, b, trans_b=True)
        else:
            total = total + product(a, b, trans_b=True)
    assert total is not None
    return total


def once(load_piece, pieces: tuple[tuple[int, int], ...]):
    """A function like load_piece(piece, start); a single piece is loaded here, once, and kept in registers.

    Several pieces are loaded each time they are used. start: the result of `later`, or 0.
    """
    if len(pieces) > 1:
        return load_piece
    kept = load_piece(*pieces, 0)
    return lambda piece, start: kept


def later(n, pieces: Sized, *, use: int = 0):
    """0, but computed so that the compiler cannot hoist the loads of several pieces out of the loop into registers.

    n: the loop index. use: must differ between uses in one iteration; otherwise two loads are merged and the result is
    kept in registers.
    """
    return lax.shift_right_logical(n, jnp.int32(30 - use)) if len(pieces) > 1 else 0


def tile_of(index, block: int):
    """The tile that contains an index. Traced indices are never negative where it matters (lax.div rounds to 0)."""
    return lax.div(index, jnp.int32(block)) if not isinstance(index, int) else index // block


def divided(n, size: int):
    """(quotient, remainder), without any operation if size is 1."""
    return (n, jnp.int32(0)) if size == 1 else (lax.div(n, jnp.int32(size)), lax.rem(n, jnp.int32(size)))


def load_rows(
    ref, start, block: int, columns: tuple[int, int], *, width: int, inside=None, head=None, row=None
) -> Array:
    """Loads [block, size] of a ref [rows, width], or [b, rows, heads, width] where row and head are given.

    Args:
      columns: (start, size) of the head_dim.
      width: number of valid columns; the others are loaded as 0.
      inside: bool[block], False for rows to load as 0; None: load all rows.
    """
    first, size = columns
    mask = None
    if first + size > width:
        mask = jnp.broadcast_to((first + jnp.arange(size) < width)[None, :], (block, size))
    if inside is not None:
        rows = jnp.broadcast_to(inside[:, None], (block, size))
        mask = rows if mask is None else mask & rows
    place = (row, pl.ds(start, block), head, pl.ds(first, size))
    index = tuple(at for at in place if at is not None)
    return load(ref.at[index], mask=mask, other=None if mask is None else 0.0)
