"""BlockMask: which tiles of keys each tile of queries visits, for jfa.block_sparse_attention.

Source of the format: arXiv:2412.05496, section 3 (lists of full and partial blocks, in both directions).
"""

import dataclasses
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jfa.meshes import on_any_mesh
from jfa.rules import with_default_rules
from jfa.types import AttentionSpec, Operands

BLOCK = 128  # default size of a tile in both directions

# kinds of tiles in a grid: an index of BlockMask.tiles, of which the first is visible whole, or
_NOT_VISITED = -1
_WHOLE = 0


class Visits(NamedTuple):
    """For each tile of one axis, the tiles of the other axis that it visits: first whole ones, then partial ones."""

    indices: Int[Array, "#b #hq n width"]  # entries from `num_visited` on have no meaning
    kinds: Int[Array, "#b #hq n width"]  # index of the visited tile in BlockMask.tiles
    num_whole: Int[Array, "#b #hq n"]  # number of visited tiles that are visible whole
    num_visited: Int[Array, "#b #hq n"]  # number of visited tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMask:
    """A mask [#b, #hq, tq, tk] in tiles [block_q, block_kv]. Made by one of the class methods, a pytree.

    Tiles are visible whole, partly or not at all; those that are not visible are never loaded. Equal partial tiles are
    stored once. The methods that return exact masks of positions (from_function, from_array, sliding_window and
    from_segments) run on the host, outside of jit; those that choose whole tiles also work on traced arrays.

    Attributes:
      kv: the tiles of keys that each tile of queries visits.
      q: the same mask transposed: the tiles of queries that visit each tile of keys.
      tiles: the distinct tiles, of which the first is visible whole. Keys past tk are not visible.
      tq, tk: the numbers of queries and keys.
    """

    kv: Visits
    q: Visits
    tiles: Bool[Array, "distinct block_q block_kv"]
    block_q: int = dataclasses.field(metadata=dict(static=True))
    block_kv: int = dataclasses.field(metadata=dict(static=True))
    tq: int = dataclasses.field(metadata=dict(static=True))
    tk: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def from_function(
        cls,
        mask_mod: Callable[..., Any],
        tq: int,
        tk: int,
        *,
        batch: int = 1,
        heads: int = 1,
        block_q: int = BLOCK,
        block_kv: int = BLOCK,
    ) -> "BlockMask":
        """The mask of a function of positions, called for one row of tiles at a time.

        Args:
          mask_mod: (batch row, query head, query, key) -> bool, on integers and NumPy arrays that broadcast.
          batch, heads: 1 if the mask is the same for all of them.
        """
        make = _Builder(tq, tk, block_q, block_kv)

        def tiles(b: int, h: int, i: int, j: np.ndarray) -> np.ndarray:
            return mask_mod(b, h, *make.positions(i, j))

        return cls(**make.fields(np.full((batch, heads, *make.grid), True), None, tiles))

    @classmethod
    def from_array(cls, mask: ArrayLike, *, block_q: int = BLOCK, block_kv: int = BLOCK) -> "BlockMask":
        """The mask of a boolean array [b or 1, hq or 1, tq, tk]; leading axes may be left out.

        Raises:
          ValueError: the array is not boolean, or has not two to four axes.
        """
        whole = _concrete("mask", mask)
        if whole.dtype != np.bool_ or not 2 <= whole.ndim <= 4:
            raise ValueError(
                f"mask must be a boolean array [batch, heads, queries, keys], got {whole.dtype} of shape {whole.shape}"
            )
        whole = whole.reshape((1,) * (4 - whole.ndim) + whole.shape)
        make = _Builder(whole.shape[2], whole.shape[3], block_q, block_kv)

        def tiles(b: int, h: int, i: int, j: np.ndarray) -> np.ndarray:
            return whole[b, h, *make.positions(i, j)]

        return cls(**make.fields(np.full((*whole.shape[:2], *make.grid), True), None, tiles))

    @classmethod
    def sliding_window(
        cls,
        tq: int,
        tk: int,
        window: int | tuple[int | None, int | None],
        *,
        sinks: int = 0,
        block_q: int = BLOCK,
        block_kv: int = BLOCK,
    ) -> "BlockMask":
        """A local window, and the first keys, which every query sees (arXiv:2309.17453).

        Args:
          window: number of visible keys to the left and right of the query's position, which is visible too; an int is
            both, None all keys on that side.
          sinks: number of keys at the start that every query sees, also those before it.
        """
        sides = tuple(window) if isinstance(window, tuple | list) else (window, window)
        if len(sides) != 2 or not all(isinstance(x, Integral) for x in (*sides, sinks) if x is not None):
            raise ValueError(
                f"window must be an integer or a pair (left, right) of integers or None, and sinks an integer, got "
                f"{window} and {sinks}"
            )
        left, right = sides
        left, right = tq + tk if left is None else left, tq + tk if right is None else right
        if min(left, right, sinks) < 0:
            raise ValueError(f"window and sinks must be >= 0, got {window} and {sinks}")
        make = _Builder(tq, tk, block_q, block_kv)
        (first_q, last_q), (first_k, last_k) = make.extremes

        def tiles(b: int, h: int, i: int, j: np.ndarray) -> np.ndarray:
            q, k = make.positions(i, j)
            return ((k >= q - left) & (k <= q + right)) | (k < sinks)

        some = ((last_k >= first_q - left) & (first_k <= last_q + right)) | (first_k < sinks)
        whole = ((first_k >= last_q - left) & (last_k <= first_q + right)) | (last_k < sinks)
        return cls(**make.fields(some[None, None], whole[None, None], tiles))

    @classmethod
    def from_segments(
        cls,
        query_segment_ids: ArrayLike,
        key_value_segment_ids: ArrayLike | None = None,
        *,
        block_q: int = BLOCK,
        block_kv: int = BLOCK,
    ) -> "BlockMask":
        """Packed documents: a query sees the keys of its own segment.

        Args:
          query_segment_ids, key_value_segment_ids: integers [b, tq] and [b, tk], or [tq] and [tk] for all rows; None:
            those of the queries.
        """
        given = {"query_segment_ids": query_segment_ids}
        given["key_value_segment_ids"] = query_segment_ids if key_value_segment_ids is None else key_value_segment_ids
        q_ids, kv_ids = (np.atleast_2d(_concrete(name, x)) for name, x in given.items())
        for name, x in zip(given, (q_ids, kv_ids), strict=True):
            if x.ndim != 2 or x.dtype.kind not in "iu" or x.shape[0] != q_ids.shape[0]:
                raise ValueError(
                    f"{name} must contain one integer per position, shape ({q_ids.shape[0]}, positions), got "
                    f"{x.dtype} of shape {x.shape}"
                )
        make = _Builder(q_ids.shape[1], kv_ids.shape[1], block_q, block_kv)
        q_low, q_high = extremes(q_ids, block_q)
        k_low, k_high = extremes(kv_ids, block_kv)
        some = (k_low[:, None] <= q_high[..., None]) & (k_high[:, None] >= q_low[..., None])

        def tiles(b: int, h: int, i: int, j: np.ndarray) -> np.ndarray:
            q, k = make.positions(i, j)
            return q_ids[b, q] == kv_ids[b, k]

        return cls(**make.fields(some[:, None], None, tiles))

    @classmethod
    @with_default_rules
    def from_tiles(
        cls, visible: ArrayLike, tq: int, tk: int, *, block_q: int = BLOCK, block_kv: int = BLOCK
    ) -> "BlockMask":
        """Whole tiles, from a boolean grid [b or 1, hq or 1, tiles of queries, tiles of keys], which may be traced.

        Raises:
          ValueError: the grid is not boolean, or does not have ceil(tq / block_q) times ceil(tk / block_kv) tiles.
        """
        make = _Builder(tq, tk, block_q, block_kv)
        grid = visible if isinstance(visible, Array) else np.asarray(visible)
        if grid.dtype != bool or not 2 <= grid.ndim <= 4 or grid.shape[-2:] != make.grid:
            raise ValueError(
                f"{tq} queries and {tk} keys in tiles of {block_q} by {block_kv} need a boolean grid [.., .., "
                f"{make.grid[0]}, {make.grid[1]}], got {grid.dtype} of shape {grid.shape}"
            )
        return cls(**make.of_whole_tiles(grid.reshape((1,) * (4 - grid.ndim) + grid.shape)))

    @classmethod
    def bigbird(
        cls,
        tq: int,
        tk: int,
        *,
        window: int = 3,
        num_global: int = 1,
        num_random: int = 1,
        heads: int = 1,
        seed: int = 0,
        block_q: int = BLOCK,
        block_kv: int = BLOCK,
    ) -> "BlockMask":
        """BigBird's pattern of whole tiles (arXiv:2007.14062, section 2).

        Args:
          window: number of tiles around the diagonal, odd.
          num_global: number of tiles at the start that every query sees, and whose queries see all keys.
          num_random: number of further tiles per tile of queries, drawn for each head.
        """
        if window < 1 or window % 2 == 0 or min(num_global, num_random) < 0:
            raise ValueError(
                "window must be an odd number of tiles, num_global and num_random must be >= 0, got "
                f"{window}, {num_global} and {num_random}"
            )
        make = _Builder(tq, tk, block_q, block_kv)
        i, j = np.ogrid[: make.grid[0], : make.grid[1]]
        middle = (i * block_q + block_q // 2) // block_kv
        fixed = (abs(j - middle) <= window // 2) | (i < num_global) | (j < num_global)
        drawn = np.where(fixed, np.inf, np.random.default_rng(seed).random((heads, *make.grid)))
        chosen = drawn.argsort(2).argsort(2) < num_random
        return cls(**make.of_whole_tiles((fixed | chosen)[None]))

    @classmethod
    @with_default_rules
    def vertical_slash(
        cls,
        vertical_indices: ArrayLike,
        slash_indices: ArrayLike,
        tq: int,
        tk: int,
        *,
        block_q: int = BLOCK,
        block_kv: int = BLOCK,
    ) -> "BlockMask":
        """The whole tiles that MInference's vertical and slash lines cross (arXiv:2407.02490, section 3.2).

        Call the op with is_causal=True, as there. The indices may be traced.

        Args:
          vertical_indices: i32[b or 1, hq or 1, n]: keys that every query sees.
          slash_indices: i32[b or 1, hq or 1, m]: distances of a key before its query, 0 for the diagonal.
        """
        make = _Builder(tq, tk, block_q, block_kv)
        vertical, slash = (jnp.asarray(x)[:, :, None] for x in (vertical_indices, slash_indices))
        (first_q, last_q), (first_k, last_k) = make.extremes

        def crossed(lowest: Any, highest: Any, lines: Array) -> Bool[Array, "#b #hq rows columns"]:
            lines = jnp.sort(lines, axis=-1)
            shape = *lines.shape[:2], *np.broadcast_shapes(lowest.shape, highest.shape)
            search = jnp.vectorize(jnp.searchsorted, signature="(n),(m)->(m)", excluded={"side"})
            at = [jnp.broadcast_to(x, shape).reshape(*shape[:2], -1) for x in (lowest, highest + 1)]
            found = [search(lines[:, :, 0], x).reshape(shape) for x in at]
            return found[1] > found[0]

        visible = crossed(first_k, last_k, vertical) | crossed(first_q - last_k, last_q - first_k, slash)
        crossing = -(-block_q // block_kv) + 1  # tiles of a row of tiles that one slash line crosses, at most
        width = min(make.grid[1], vertical.shape[3] + crossing * slash.shape[3])
        return cls(**make.of_whole_tiles(visible & (first_k <= last_q), width))

    @classmethod
    @with_default_rules
    def top_k(
        cls,
        query: Float[Array, "b tq hq d"],
        key: Float[Array, "b tk hkv d"],
        k: int | Int[np.ndarray, " n"],
        *,
        is_causal: bool = False,
        block_q: int = BLOCK,
        block_kv: int = BLOCK,
    ) -> "BlockMask":
        """For each head, the k tiles of keys whose mean has the largest product with the mean of the queries.

        The arrays may be traced; no gradient flows through the choice (arXiv:2502.13189, section 2.2; there, queries
        choose one by one; here, what a query computes depends on the later ones of its tile, also if is_causal).

        Args:
          k: one number, or one for each tile of queries.
          is_causal: choose among tiles that a causal mask does not hide, the tile of a query's own position first. The
            op needs is_causal=True too.

        Raises:
          ValueError: k is not from 1 to the number of tiles of keys, or has another number of entries.
        """
        (b, tq, hq, d), (_, tk, hkv, _) = query.shape, key.shape
        make = _Builder(tq, tk, block_q, block_kv)
        counts = np.asarray(k)
        is_valid = counts.dtype.kind in "iu" and counts.shape in ((), make.grid[:1])
        counts = np.broadcast_to(counts, make.grid[:1]) if is_valid else np.zeros(1, int)
        if not 1 <= counts.min() <= counts.max() <= make.grid[1]:
            raise ValueError(
                f"k must be 1 to {make.grid[1]}, the number of tiles of {tk} keys, for all {make.grid[0]} tiles of "
                f"queries or for each one, got {k}"
            )
        most = int(counts.max())

        def choose(query: Array, key: Array) -> Bool[Array, "b hq n m"]:
            q_means, k_means = _means(query, block_q), _means(key, block_kv)
            q_means = q_means.reshape(b, -1, hkv, hq // hkv, d)
            scores = jnp.einsum("bihgd,bjhd->bhgij", q_means, k_means, precision="highest")
            scores = scores.reshape(b, hq, *make.grid)
            if is_causal:
                (first_q, last_q), (first_k, last_k) = make.extremes
                scores = jnp.where((first_k <= last_q) & (last_k >= first_q), jnp.inf, scores)
                scores = jnp.where(first_k <= last_q, scores, -jnp.inf)
            best, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), most)
            is_chosen = (best > -jnp.inf) & (np.arange(most) < counts[:, None])
            return jnp.put_along_axis(jnp.zeros(scores.shape, bool), chosen, is_chosen, -1, inplace=False)

        visible = on_any_mesh(choose, query, key, specs=PartitionSpec)
        return cls(**make.of_whole_tiles(visible, most))

    @property
    def num_axis_tiles(self) -> tuple[int, int]:
        """The numbers of tiles of queries and of keys, visited or not."""
        return self.kv.indices.shape[2], self.q.indices.shape[2]

    @property
    def num_tiles(self) -> Int[Array, ""]:
        """Number of visited tiles, over the mask's own batch rows and heads."""
        return self.kv.num_visited.sum()

    @property
    def density(self) -> Float[Array, ""]:
        """The fraction of all tiles that is visited, of those above the diagonal too."""
        return self.num_tiles / (self.kv.num_visited.size * self.num_axis_tiles[1])

    def to_array(self) -> Bool[Array, "#b #hq tq tk"]:
        """The mask with an element per query and key."""
        kinds = self.grid()
        found = self.tiles[jnp.maximum(kinds, 0)] & (kinds >= 0)[..., None, None]
        b, h, n, m = kinds.shape
        whole = found.swapaxes(3, 4).reshape(b, h, n * self.block_q, m * self.block_kv)
        return whole[:, :, : self.tq, : self.tk]

    @with_default_rules
    def grid(self) -> Int[Array, "#b #hq n m"]:
        """The index of each tile in `tiles`, -1 for those that are not visited."""
        b, h, n, width = self.kv.indices.shape
        m = self.num_axis_tiles[1]
        place = jnp.where(jnp.arange(width) < self.kv.num_visited[..., None], self.kv.indices, m)
        kinds = jnp.full((b, h, n, m), _NOT_VISITED, jnp.int32)
        return kinds.at[(*jnp.ogrid[:b, :h, :n, :1][:3], place)].set(self.kv.kinds, mode="drop")

    def seen(self, operands: Operands, spec: AttentionSpec, *, transposed: bool = False) -> Visits:
        """The visits that remain under a causal mask, lengths and segments; a tile that these cut is partial.

        transposed: of tiles of keys.
        """
        visits = self.q if transposed else self.kv
        if not spec.causal and all(x is None for x in (operands.q_len, operands.kv_len, operands.q_segments)):
            return visits
        own, other = jnp.arange(visits.indices.shape[2])[:, None], visits.indices
        i, j = (other, own) if transposed else (own, other)
        first_q, last_q = i * self.block_q, jnp.minimum((i + 1) * self.block_q, self.tq) - 1
        first_k, last_k = j * self.block_kv, jnp.minimum((j + 1) * self.block_kv, self.tk) - 1
        some = jnp.arange(other.shape[3]) < visits.num_visited[..., None]
        whole = visits.kinds == _WHOLE
        if spec.causal:
            offset = 0 if operands.q_offset is None else _per_row(operands.q_offset)
            some, whole = some & (first_k <= last_q + offset), whole & (last_k <= first_q + offset)
        for length, first, last in ((operands.q_len, first_q, last_q), (operands.kv_len, first_k, last_k)):
            if length is not None:
                some, whole = some & (first < _per_row(length)), whole & (last < _per_row(length))
        if operands.q_segments is not None and operands.kv_segments is not None:
            ids = (operands.q_segments, self.block_q), (operands.kv_segments, self.block_kv)
            (low, high), (other_low, other_high) = (extremes(*x) for x in (reversed(ids) if transposed else ids))
            low, high = (x[:, None, :, None] for x in (low, high))
            other_low, other_high = (
                jnp.take_along_axis(x[:, None, None], other, axis=-1) for x in (other_low, other_high)
            )
            some &= (other_low <= high) & (other_high >= low)
            whole &= (low == other_high) & (high == other_low)
        return _sorted(jnp.where(some, jnp.where(whole, 0, 1), 2), other, visits.kinds)


class SparseOperands(NamedTuple):
    """What attention with a BlockMask reads."""

    dense: Operands
    mask: BlockMask


class _Builder(NamedTuple):
    """The tiles of a mask that is being made."""

    tq: int
    tk: int
    block_q: int
    block_kv: int

    @property
    def grid(self) -> tuple[int, int]:
        """The numbers of tiles of queries and of keys."""
        for name in self._fields:
            size = getattr(self, name)
            if not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        return -(-self.tq // self.block_q), -(-self.tk // self.block_kv)

    @property
    def extremes(self):
        """((first, last) query of each tile, a column), ((first, last) key of each tile, a row)."""
        i, j = np.ogrid[: self.grid[0], : self.grid[1]]
        return (
            (i * self.block_q, np.minimum((i + 1) * self.block_q, self.tq) - 1),
            (j * self.block_kv, np.minimum((j + 1) * self.block_kv, self.tk) - 1),
        )

    def positions(self, i: int, j: np.ndarray) -> tuple[Int[np.ndarray, "1 bq 1"], Int[np.ndarray, "n 1 bk"]]:
        """The queries of a tile and the keys of several; the last ones repeat, to fill whole tiles."""
        q = i * self.block_q + np.arange(self.block_q)
        k = j[:, None] * self.block_kv + np.arange(self.block_kv)
        return np.minimum(q, self.tq - 1)[None, :, None], np.minimum(k, self.tk - 1)[:, None]

    def fields(self, some: np.ndarray, whole: np.ndarray | None, tiles: Callable[..., Any]) -> dict[str, Any]:
        """The fields of a BlockMask.

        Args:
          some: [b, h, n, m] tiles that may be visible.
          whole: tiles that are known to be visible whole.
          tiles: (b, h, i, [js]) -> bool[js, block_q, block_kv], the tiles themselves.
        """
        whole = (np.zeros_like(some) if whole is None else whole) & some
        whole[..., self.tk // self.block_kv :] = False  # keys past the last one are hidden by a partial tile
        kinds = np.where(whole, np.int32(_WHOLE), np.int32(_NOT_VISITED))
        distinct = [np.ones((self.block_q, self.block_kv), bool)]
        known = {np.packbits(distinct[0]).tobytes(): _WHOLE}
        for b, h, i in np.argwhere((some & ~whole).any(-1)).tolist():
            js = np.flatnonzero(some[b, h, i] & ~whole[b, h, i])
            keys = js[:, None, None] * self.block_kv + np.arange(self.block_kv)
            found = np.broadcast_to(tiles(b, h, i, js), (len(js), self.block_q, self.block_kv)) & (keys < self.tk)
            seen = found.any((1, 2))
            for j, tile in zip(js[seen], found[seen], strict=True):
                kind = known.setdefault(np.packbits(tile).tobytes(), len(distinct))
                if kind == len(distinct):
                    distinct.append(tile)
                kinds[b, h, i, j] = kind
        return self._of(kinds, np.stack(distinct))

    def of_whole_tiles(self, visible: Any, width: int | None = None) -> dict[str, Any]:
        """The fields of a BlockMask of whole tiles, at most `width` per tile of queries."""
        xp = np if isinstance(visible, np.ndarray) else jnp
        tiles = np.ones((1, self.block_q, self.block_kv), bool)
        kind = np.zeros(self.grid[1], np.int32)
        if self.tk % self.block_kv:
            tiles = np.stack([tiles[0], tiles[0] & (np.arange(self.block_kv) < self.tk % self.block_kv)])
            kind[-1] = 1
        return self._of(xp.where(visible, kind, np.int32(_NOT_VISITED)), tiles, width)

    def _of(self, kinds: Any, tiles: np.ndarray, width: int | None = None) -> dict[str, Any]:
        fields = {name: int(size) for name, size in self._asdict().items()}
        return fields | dict(kv=_visits(kinds, width), q=_visits(kinds.swapaxes(2, 3), None), tiles=jnp.asarray(tiles))


def _visits(kinds: Any, width: int | None) -> Visits:
    """The visits of a grid of kinds [b, h, n, m]. width: the most of a row if the grid is traced; None: any number."""
    xp = np if isinstance(kinds, np.ndarray) else jnp
    rank = xp.where(kinds == _NOT_VISITED, 2, xp.minimum(kinds, 1))
    if not isinstance(kinds, Tracer):
        width = int((kinds != _NOT_VISITED).sum(-1).max(initial=1))
    visits = _sorted(rank, np.arange(kinds.shape[3], dtype=np.int32), xp.maximum(kinds, _WHOLE))
    visits = visits._replace(indices=visits.indices[..., :width], kinds=visits.kinds[..., :width])
    return jax.tree.map(jnp.asarray, visits)


def _sorted(rank: Any, indices: Any, kinds: Any) -> Visits:
    """Visits in the order of their rank [b, h, n, m]: 0 visible whole, 1 partial, 2 not visited."""
    xp: Any = np if isinstance(rank, np.ndarray) else jnp
    order = xp.argsort(rank, axis=-1, stable=True)
    indices, kinds = (xp.take_along_axis(xp.broadcast_to(x, rank.shape), order, -1) for x in (indices, kinds))
    counts = (xp.sum(rank < limit, axis=-1, dtype=np.int32) for limit in (1, 2))
    return Visits(indices, kinds, *counts)


def _per_row(x: Int[Array, " b"]) -> Int[Array, "b 1 1 1"]:
    return x[:, None, None, None]


def _concrete(name: str, x: ArrayLike) -> np.ndarray:
    if isinstance(x, Tracer):
        raise ValueError(f"{name} is traced: make an exact BlockMask outside of jit and pass it as an argument")
    return np.asarray(x)


def extremes(ids: Any, block: int) -> tuple[Any, Any]:
    """The smallest and the largest segment id of each tile, [b, n] of ids [b, t]."""
    xp = np if isinstance(ids, np.ndarray) else jnp
    tiles = xp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge").reshape(ids.shape[0], -1, block)
    return tiles.min(2), tiles.max(2)


def _means(x: Float[Array, "b t h d"], block: int) -> Float[Array, "b n h d"]:
    """The mean of each tile, in float32."""
    b, t, *rest = x.shape
    n = -(-t // block)
    padded = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, n * block - t), (0, 0), (0, 0)))
    held = jnp.minimum(block, t - block * jnp.arange(n))
    return padded.reshape(b, n, block, *rest).sum(2) / held[:, None, None]
