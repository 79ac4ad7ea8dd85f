"""Heads side by side in the columns of pages, for TPU kernels, which read columns in whole rows of 128 lanes.

The window of a head, or of a group of heads, is the rows of lanes that have its columns. Queries are zero in the
columns of a window that belong to other heads, and of the output each head keeps its own columns.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jfa.kernels.tpu import tile
from jfa.kernels.tpu.tile import LANES


class Columns(NamedTuple):
    """Where the heads of keys or of values are.

    Two halves of a head, in the low and in the high bits, share the columns of packed 4-bit numbers.
    """

    total: int
    size: int  # of a head
    halves: int

    @classmethod
    def of(cls, pages: Any, num_heads: int) -> "Columns":
        total = pages.shape[2]
        return cls(total, total // num_heads, 2 if pages.dtype == jnp.uint8 else 1)

    def start(self, group: Any, heads: int) -> Any:
        """The first column of the window of a group of heads; group may be traced."""
        size = heads * self.size
        if self.total % LANES:  # only where no hardware asks for whole rows of lanes
            return 0
        if size % LANES == 0:
            return group * size
        last = self.total - self.width(heads)
        if isinstance(group, int):
            return min(group * size // LANES * LANES, last)
        return jnp.minimum(lax.div(group * size, jnp.int32(LANES)) * LANES, last)

    def width(self, heads: int) -> int:
        """Columns of a group's window, the same for all groups."""
        if self.total % LANES:
            return self.total
        size = heads * self.size
        return max(tile.rounded(first % LANES + size, LANES) for first in range(0, self.total, size))

    @property
    def of_head(self) -> int:
        """Columns of the windows of a head's halves."""
        return self.halves * self.width(1)

    @property
    def differ(self) -> bool:
        """Whether some heads need a row of lanes less than the window of a head has."""
        return self.halves == 1 and self.total % LANES == 0 and self.size <= self.width(1) - LANES

    def needs_less(self, head: Any) -> Any:
        """Whether this head is one of them."""
        return (head + 1) * self.size <= self.start(head, 1) + self.width(1) - LANES

    def offsets(self, hq: int) -> list[int]:
        """The first column of each query head in the window of its head."""
        heads = self.total // self.size
        return [head * self.size - self.start(head, 1) for head in range(heads) for _ in range(hq // heads)]

    def slabs(self, group: int, heads: int) -> dict[int, tuple[int, int]]:
        """The rows of lanes in a group's window at which windows of heads start: the first and the last head."""
        found: dict[int, tuple[int, int]] = {}
        for head in range(heads):
            slab = (self.start(group * heads + head, 1) - self.start(group, heads)) // LANES
            found[slab] = found.get(slab, (head,))[0], head
        return found


def in_windows(q: Float[Array, "n hq d"], columns: Columns) -> Float[Array, "n hq of_head"]:
    """Queries in the windows of their heads; the halves of a head, if it has two, one after the other."""
    width, size = columns.width(1), columns.size
    if width == size and columns.halves == 1:
        return q
    offsets, halves = columns.offsets(q.shape[1]), []
    for half in jnp.split(q, columns.halves, axis=2):
        placed = jnp.zeros((*q.shape[:2], width), q.dtype)
        for first in sorted(set(offsets)):
            padded = jnp.pad(half, ((0, 0), (0, 0), (first, width - first - size)))
            placed = jnp.where(_of_offset(offsets, first), padded, placed)
        halves.append(placed)
    return jnp.concatenate(halves, axis=2)


def out_of_windows(out: Float[Array, "n hq of_head"], columns: Columns) -> Float[Array, "n hq dv"]:
    """Each head's own columns of the outputs in its window."""
    size = columns.size
    if columns.width(1) == size:
        return out
    offsets, halves = columns.offsets(out.shape[1]), []
    for half in jnp.split(out, columns.halves, axis=2):
        own = half[..., :size]
        for first in sorted(set(offsets) - {0}):
            own = jnp.where(_of_offset(offsets, first), half[..., first : first + size], own)
        halves.append(own)
    return jnp.concatenate(halves, axis=2)


def _of_offset(offsets: list[int], first: int) -> Any:
    return jnp.array([offset == first for offset in offsets])[:, None]


def in_group(q: Shaped[Array, "hq of_head"], group: int, heads: int, columns: Columns) -> Shaped[Array, "hq width"]:
    """Queries of a group of heads in the window of the group, from those in the windows of their heads."""
    width, of_group = columns.width(1), columns.width(heads)
    if width == of_group:
        return q
    slabs, found = columns.slabs(group, heads), []
    for half in range(columns.halves):
        for slab in range(of_group // LANES):
            moved = jnp.zeros((len(q), LANES), q.dtype)
            for start, own in slabs.items():
                if start <= slab < start + width // LANES:
                    moved = jnp.where(_of_heads(own, len(q), heads), _lanes(q, half * width, slab - start), moved)
            found.append(moved)
    return jnp.concatenate(found, axis=1)


def out_of_group(out: Shaped[Array, "hq width"], group: int, heads: int, columns: Columns) -> Shaped[Array, "hq _"]:
    """Outputs in the windows of the heads, from those in the window of their group."""
    width, of_group = columns.width(1), columns.width(heads)
    if width == of_group:
        return out
    slabs, found = columns.slabs(group, heads), []
    for half in range(columns.halves):
        for slab in range(width // LANES):
            moved = jnp.zeros((len(out), LANES), out.dtype)
            for start, own in slabs.items():
                if start + slab < of_group // LANES:
                    of_slab = _lanes(out, half * of_group, start + slab)
                    moved = jnp.where(_of_heads(own, len(out), heads), of_slab, moved)
            found.append(moved)
    return jnp.concatenate(found, axis=1)


def _lanes(x: Array, first: int, slab: int) -> Array:
    return x[:, first + slab * LANES : first + (slab + 1) * LANES]


def _of_heads(own: tuple[int, int], rows: int, heads: int) -> Array:
    """Whether a row is of a head from own[0] to own[1]."""
    row, g = lax.broadcasted_iota(jnp.int32, (rows, LANES), 0), rows // heads
    return (row >= own[0] * g) & (row < (own[1] + 1) * g)
