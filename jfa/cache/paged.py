"""A paged KV cache: rows get pages as tokens arrive, share the pages of a common prefix, and release them.

The host decides which row owns which page (jfa.PageAllocator); this module manages the pages and the page tables on the
device. Source: arXiv:2309.06180, section 4.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Shaped

from jfa import quant
from jfa.cache.state import StateCache, check_no_states
from jfa.device import probe
from jfa.meshes import like_itself
from jfa.quant import QuantizedArray
from jfa.rules import with_default_rules
from jfa.types import NULL_PAGE

_LANES = 128  # columns of a TPU's tile

Pages = Shaped[Array, "num_pages page_size hkv*d"] | QuantizedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedKVCache:
    """The keys and values of all layers of one model. Every method returns a new cache.

    Token t of row r is in slot t % page_size of page page_table[r, t // page_size]. Slots at or past kv_len contain
    garbage and are never read. Page table entries without a page are NULL_PAGE, which is never written. Donate the
    cache to the jitted function that returns the new one, so that writes happen in place.

    The heads of a token are side by side, since a TPU pads the last axis of an array to 128 columns. There they may be
    followed by spare heads of zeros, which no query sees, so that the columns are a multiple of 128.

    Attributes:
      k, v: the pages of each layer with attention, floats or quantized, in groups of head_dim.
      page_tables: one page table for each attention pattern of the model, since layers with a window release pages
        that the others still need.
      kv_len: number of valid tokens of each row.
      table_of: for each layer, the index of its page table in page_tables.
      states: of the layers without attention; None: there are none.
    """

    k: tuple[Pages, ...]
    v: tuple[Pages, ...]
    page_tables: tuple[Int[Array, "b pages_per_seq"], ...]
    kv_len: Int[Array, " b"]
    table_of: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    states: StateCache | None = None

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_pages: int | Sequence[int],
        page_size: int,
        batch: int,
        pages_per_seq: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        kv_dtype: str | None = None,
        table_of: Sequence[int] | None = None,
        sharding: jax.sharding.Sharding | None = None,
    ) -> "PagedKVCache":
        """An empty cache with empty page tables.

        Args:
          num_pages: number of pages per layer, including NULL_PAGE; or a sequence of these numbers, one for the layers
            of each page table.
          num_kv_heads: on a TPU and without a sharding rounded up to whole tiles of 128 columns, at most to double.
          batch, pages_per_seq: rows and columns of a page table.
          dtype: dtype of the pages, unless they are quantized.
          kv_dtype: "int8", "fp8" or "int4" (jfa.quant), with a bfloat16 scale for each token and head; None: dtype.
            On a CPU, prefer int8 to fp8: XLA has no in-place update of 8-bit floats there, so every write copies all
            fp8 pages.
          table_of: for each layer, the index of its page table; None: one page table for all layers.
          sharding: of pages and their scales, by heads, such as NamedSharding(mesh, P(None, None, "heads")); None: the
            default device.

        Raises:
          ValueError: unknown kv_dtype, int4 with an odd head_dim, or no page other than NULL_PAGE.
        """
        if kv_dtype is not None and kv_dtype not in quant.KINDS:
            raise ValueError(
                f"kv_dtype must be one of {', '.join(quant.KINDS)}, or None for unquantized pages, got {kv_dtype!r}"
            )
        table_of = (0,) * num_layers if table_of is None else tuple(table_of)
        if len(table_of) != num_layers or min(table_of, default=0) < 0:
            raise ValueError(
                f"table_of must have a page table index >= 0 for each of the {num_layers} layers, got {table_of}"
            )
        num_tables = 1 + max(table_of, default=0)
        pools = (num_pages,) * num_tables if isinstance(num_pages, int) else tuple(num_pages)
        if len(pools) != num_tables:
            raise ValueError(f"num_pages must have one entry for each of the {num_tables} page tables, got {pools}")
        if min(pools) < 2 or page_size < 1:
            raise ValueError(
                f"num_pages must be >= 2, since page {NULL_PAGE} is never used, and page_size >= 1, got "
                f"num_pages={num_pages} and page_size={page_size}"
            )

        size = head_dim if kv_dtype is None else quant.stored_size(kv_dtype, head_dim)
        heads = _with_spare_heads(num_kv_heads, size) if sharding is None else num_kv_heads

        def pages(table: int) -> Pages:
            shape = (pools[table], page_size)
            if kv_dtype is None:
                return jnp.zeros((*shape, heads * head_dim), dtype, device=sharding)
            stored, _ = quant.KINDS[kv_dtype]
            values = jnp.zeros((*shape, heads * size), stored, device=sharding)
            scales = jnp.zeros((*shape, heads), jnp.bfloat16, device=sharding)
            return QuantizedArray(values=values, scales=scales, group_size=head_dim)

        # a separate array for each layer's k and v and each table: a buffer that two leaves share cannot be donated
        k, v = (tuple(map(pages, table_of)) for _ in "kv")
        tables = tuple(jnp.full((batch, pages_per_seq), NULL_PAGE, jnp.int32) for _ in range(num_tables))
        return cls(k=k, v=v, page_tables=tables, kv_len=jnp.zeros(batch, jnp.int32), table_of=table_of)

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return _values(self.k[0]).shape[1]

    @property
    def num_pages(self) -> tuple[int, ...]:
        """For each page table, the number of pages of its layers, including NULL_PAGE."""
        sizes = dict(zip(self.table_of, (_values(k).shape[0] for k in self.k), strict=True))
        return tuple(sizes.get(table, 0) for table in range(len(self.page_tables)))

    @property
    def capacity(self) -> int:
        """Tokens that a row of a page table can hold."""
        return self.page_tables[0].shape[1] * self.page_size

    @property
    def num_bytes(self) -> int:
        """Total size of all pages, including scales, and of all states in bytes."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((self.k, self.v, self.states)))

    def num_heads(self, head_dim: int) -> int:
        """Key heads of a page, with the spare ones."""
        k = self.k[0]
        size = quant.stored_size(k.kind, head_dim) if isinstance(k, QuantizedArray) else head_dim
        return _values(k).shape[2] // size

    def arguments(self, layer: int) -> dict[str, Any]:
        """A layer's keyword arguments for jfa's paged ops, except kv_len, and the query, which must pass rotated()."""
        k, v = self.k[layer], self.v[layer]
        return {
            "key_pages": _values(k),
            "value_pages": _values(v),
            "page_table": self.page_tables[self.table_of[layer]],
            "key_scales": k.scales if isinstance(k, QuantizedArray) else None,
            "value_scales": v.scales if isinstance(v, QuantizedArray) else None,
        }

    @with_default_rules
    def first(
        self, layer: int, num_tokens: int, head_dim: int, dtype: DTypeLike
    ) -> tuple[Float[Array, "b num_tokens hkv head_dim"], Float[Array, "b num_tokens hkv head_dim"]]:
        """The keys and values of the first tokens of each row, in this dtype; garbage where no token is written.

        Keys in int4 pages are rotated; a query must pass rotated().
        """
        table = self.page_tables[self.table_of[layer]]
        num_pages = min(table.shape[1], -(-num_tokens // self.page_size))

        def of(pages: Pages) -> Float[Array, "b num_tokens hkv head_dim"]:
            x = jax.tree.map(lambda x: quant.on_bits(lambda x: x[table[:, :num_pages]], x), pages)
            x = quant.dequantize(x, dtype) if isinstance(x, QuantizedArray) else x.astype(dtype)
            x = x.reshape(x.shape[0], -1, x.shape[3] // head_dim, head_dim)[:, :num_tokens]
            return jnp.pad(x, ((0, 0), (0, num_tokens - x.shape[1]), (0, 0), (0, 0)))

        return of(self.k[layer]), of(self.v[layer])

    @with_default_rules
    def rotated(self, x: Float[Array, "*n heads d"]) -> Float[Array, "*n heads d"]:
        """Rotates queries or keys (quant.rotation) if the pages are int4; otherwise returns them unchanged.

        This reduces the increase in perplexity that int4 pages cause for SmolLM2 to a sixth. Rotating the values does
        not help (bench/LOG.md).
        """
        k = self.k[0]
        if not (isinstance(k, QuantizedArray) and k.kind == "int4"):
            return x
        return jnp.matmul(x.astype(jnp.float32), quant.rotation(x.shape[-1]), precision="highest").astype(x.dtype)

    @like_itself
    @with_default_rules
    def write(
        self,
        layer: int,
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        lengths: Int[Array, " b"] | None = None,
    ) -> "PagedKVCache":
        """Writes t tokens of each row of one layer starting at kv_len, which advance updates.

        Args:
          lengths: number of valid tokens in each row; None: all. Padding is not written, since the next page may belong
            to another row.
        """
        b, t = k.shape[:2]
        places = self._places_of_rows(layer, t, lengths)
        return self._put(layer, places, *(x.reshape(b * t, *x.shape[2:]) for x in (k, v)))

    @like_itself
    @with_default_rules
    def write_ragged(
        self,
        layer: int,
        k: Float[Array, "n hkv d"],
        v: Float[Array, "n hkv d"],
        query_start: Int[Array, " b+1"],
    ) -> "PagedKVCache":
        """Like write, for rows that are concatenated: row r has the tokens query_start[r] up to query_start[r + 1].

        Tokens before query_start[0] and from query_start[-1] on are padding and are not written.
        """
        return self._put(layer, self._places_of_ragged(layer, k.shape[0], query_start), k, v)

    def holding(self, layer: int, k: Pages, v: Pages) -> "PagedKVCache":
        """The cache with other pages of a layer."""
        all_k, all_v = ((*held[:layer], x, *held[layer + 1 :]) for held, x in ((self.k, k), (self.v, v)))
        return dataclasses.replace(self, k=all_k, v=all_v)

    @with_default_rules
    def slots(self, layer: int, t: int, lengths: Int[Array, " b"] | None = None) -> Int[Array, " b*t"]:
        """Where write puts t tokens of each row, among the slots of all pages of the layer; -1: nowhere."""
        return self._slots(layer, self._places_of_rows(layer, t, lengths))

    @with_default_rules
    def ragged_slots(self, layer: int, n: int, query_start: Int[Array, " b+1"]) -> Int[Array, " n"]:
        """Where write_ragged puts n tokens, among the slots of all pages of the layer; -1: nowhere."""
        return self._slots(layer, self._places_of_ragged(layer, n, query_start))

    @with_default_rules
    def advance(self, num_tokens: Int[Array, " b"] | int) -> "PagedKVCache":
        """Marks the first num_tokens tokens written after kv_len as valid, in every layer."""
        return dataclasses.replace(self, kv_len=(self.kv_len + num_tokens).astype(jnp.int32))

    @with_default_rules
    def truncate(self, kv_len: Int[Array, " b"]) -> "PagedKVCache":
        """Drops all tokens at positions >= kv_len (rollback), without copying.

        Raises:
          ValueError: it has states.
        """
        check_no_states(self.states)
        return dataclasses.replace(self, kv_len=jnp.minimum(self.kv_len, kv_len).astype(jnp.int32))

    @like_itself
    @with_default_rules
    def compact(self, kept: Int[Array, "b k"], num_kept: Int[Array, " b"]) -> "PagedKVCache":
        """Moves tokens written after kv_len to the front, in every layer: the accepted path of a verified tree.

        Token kv_len + kept[r, i] of row r becomes token kv_len + i, for each i < num_kept[r]; advance(num_kept) then
        makes them valid. Other tokens after kv_len of the row may be overwritten; a row with num_kept = 0 keeps all.
        Where a step has advanced kv_len, truncate to its value before the step.

        Args:
          kept: indices among the tokens written after kv_len, increasing in each row.
        """
        b, k = kept.shape
        row, to = jnp.repeat(jnp.arange(b), k), jnp.tile(jnp.arange(k), b)
        moves = (jnp.arange(k) < num_kept[:, None]).reshape(-1)
        places = {
            table: [
                self._places(self.table_of.index(table), row, index, moves & (kept.reshape(-1) != to))
                for index in (kept.reshape(-1), to)
            ]
            for table in set(self.table_of)
        }

        def compacted(pages: Pages, table: int) -> Pages:
            source, destination = places[table]

            def move(x):
                return x.at[destination].set(x.at[source].get(mode="clip"), mode="drop", unique_indices=True)

            return jax.tree.map(lambda x: quant.on_bits(move, x), pages)

        k_pages, v_pages = (tuple(map(compacted, arrays, self.table_of)) for arrays in (self.k, self.v))
        return dataclasses.replace(self, k=k_pages, v=v_pages)

    @like_itself
    @with_default_rules
    def copy_pages(self, source: Int[Array, " n"], destination: Int[Array, " n"], *, table: int = 0) -> "PagedKVCache":
        """Copies pages source to pages destination in all layers of a page table, for copy-on-write of shared pages.

        All pages are read before any is written. Pairs (NULL_PAGE, NULL_PAGE) do nothing and serve as padding.
        """
        if not 0 <= table < len(self.page_tables):
            raise ValueError(f"table must be 0 to {len(self.page_tables) - 1}, an index of page_tables, got {table}")
        nowhere = self.num_pages[table] + jnp.arange(destination.shape[0])  # out of bounds; unique_indices=True below
        destination = jnp.where(destination == NULL_PAGE, nowhere, destination)

        def copied(pages: Pages, own: bool) -> Pages:
            if not own:
                return pages

            def copy(x):
                return x.at[destination].set(x[source], mode="drop", unique_indices=True)

            return jax.tree.map(lambda x: quant.on_bits(copy, x), pages)

        own = [number == table for number in self.table_of]
        k, v = (tuple(map(copied, arrays, own)) for arrays in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)

    @with_default_rules
    def grow(self, num_pages: int | Sequence[int]) -> "PagedKVCache":
        """A copy with more pages, appended to the current ones; num_pages as in create.

        Raises:
          ValueError: num_pages is below the current number.
        """
        pools = (num_pages,) * len(self.page_tables) if isinstance(num_pages, int) else tuple(num_pages)
        if len(pools) != len(self.page_tables) or any(
            new < old for new, old in zip(pools, self.num_pages, strict=True)
        ):
            old, new = (", ".join(map(str, sizes)) for sizes in (self.num_pages, pools))
            raise ValueError(f"a cache of {old} pages cannot grow to {new}")

        def padded(pages: Pages, table: int) -> Pages:
            more = pools[table] - _values(pages).shape[0]

            def pad(x):
                return jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1))

            return jax.tree.map(lambda x: quant.on_bits(pad, x), pages)

        k, v = (tuple(map(padded, arrays, self.table_of)) for arrays in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)

    def _slots(self, layer: int, places: tuple[Int[Array, " n"], Int[Array, " n"]]) -> Int[Array, " n"]:
        page, slot = places
        return jnp.where(page < self.num_pages[self.table_of[layer]], page * self.page_size + slot, -1)

    def _places_of_rows(self, layer: int, t: int, lengths: Int[Array, " b"] | None) -> tuple[Array, Array]:
        """_places of t tokens of each row, the first `lengths` of which are not padding."""
        b = self.kv_len.shape[0]
        index = jnp.broadcast_to(jnp.arange(t), (b, t))
        real = jnp.ones((b, t), bool) if lengths is None else index < lengths[:, None]
        row = jnp.broadcast_to(jnp.arange(b)[:, None], (b, t))
        return self._places(layer, row.reshape(-1), index.reshape(-1), real.reshape(-1))

    def _places_of_ragged(self, layer: int, n: int, query_start: Int[Array, " b+1"]) -> tuple[Array, Array]:
        """_places of n tokens of rows that are concatenated."""
        token = jnp.arange(n)
        row = jnp.minimum(
            jnp.searchsorted(query_start[1:], token, side="right", method="compare_all"), self.kv_len.shape[0] - 1
        )
        real = (token >= query_start[0]) & (token < query_start[-1])
        return self._places(layer, row, token - query_start[row], real)

    def _places(
        self, layer: int, row: Int[Array, " n"], index: Int[Array, " n"], real: Bool[Array, " n"]
    ) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
        """Page and slot of the token at kv_len + index of a row; an out-of-bounds page for tokens not to be written."""
        table = self.table_of[layer]
        page_table = self.page_tables[table]
        nowhere = self.num_pages[table] + jnp.arange(row.shape[0])  # out of bounds; distinct for unique_indices=True
        if page_table.size == 0:
            return nowhere, jnp.zeros_like(row)
        position = self.kv_len[row] + index
        column = position // self.page_size
        page = page_table[row, jnp.clip(column, 0, page_table.shape[1] - 1)]
        real &= (position >= 0) & (column < page_table.shape[1]) & (page != NULL_PAGE)
        return jnp.where(real, page, nowhere), position % self.page_size

    def _put(self, layer: int, places: tuple[Int[Array, " n"], Int[Array, " n"]], k: Array, v: Array) -> "PagedKVCache":
        def like(stored: Array, x: Array) -> Array:
            # the tokens are reshaped: XLA for a TPU would copy all pages to give them an axis of heads
            x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
            if spare := stored.shape[2] - x.shape[1]:
                x = jnp.pad(x, ((0, 0), (0, spare)))
            return x.astype(stored.dtype)

        def put(pages: Pages, x: Array) -> Pages:
            new = x
            if isinstance(pages, QuantizedArray):
                new = quant.quantize(x, pages.kind)
                new = dataclasses.replace(pages, values=new.values, scales=new.scales)

            def scatter(stored, x):
                # two index arrays: a single one would need a reshape of the pages, which copies pages of one token
                return stored.at[places].set(x, mode="drop", unique_indices=True)

            return jax.tree.map(lambda stored, x: quant.on_bits(scatter, stored, like(stored, x)), pages, new)

        return self.holding(layer, put(self.k[layer], self.rotated(k)), put(self.v[layer], v))


def _with_spare_heads(num_kv_heads: int, size: int) -> int:
    """The number of heads that are stored, of so many columns each."""
    if probe().platform != "tpu":
        return num_kv_heads
    whole = _LANES // math.gcd(size, _LANES)  # heads that fill whole tiles
    rounded = -(-num_kv_heads // whole) * whole
    return rounded if rounded <= 2 * num_kv_heads else num_kv_heads


def _values(pages: Pages) -> Array:
    return pages.values if isinstance(pages, QuantizedArray) else pages
