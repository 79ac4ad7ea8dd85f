"""The pages of an engine: one pool for each attention pattern of its model.

Layers with full attention keep every page of a sequence. Layers with a window get pages when a step needs them and free
those that slid out of the window: their pool is only as large as the windows of all running sequences.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from jfa.pages import Copy, PageAllocator
from jfa_models.engine.snapshots import Snapshots

WATERMARK = 0.01  # fraction of the pages that is kept free for running sequences when a prompt is admitted


class Pool(NamedTuple):
    """An allocator of pages, and which tokens the layers that use them see.

    Attributes:
      window: the last tokens, including a query's own; None: full attention.
      num_sinks: with a window, the first tokens too.
    """

    allocator: PageAllocator
    window: int | None = None
    num_sinks: int = 0


class Started(NamedTuple):
    """known: how many of a sequence's first tokens are cached. snapshot: the slot that has the states after them."""

    known: int
    snapshot: int | None


class Pools:
    """The pools of one model: sequences are added, extended and freed in all of them.

    Attributes:
      snapshots: of states, without which the prefixes of a model with states are not reused; None: there are none.
      queried_tokens, hit_tokens: tokens looked up in the prefix cache, and those of them found in all pools.
    """

    def __init__(self, pools: Sequence[Pool], *, snapshots: Snapshots | None = None, has_attention: bool = True):
        """has_attention: the pages have keys and values; False: they only count sequences."""
        self.pools = tuple(pools)
        self.snapshots = snapshots
        self._cached = self.pools if has_attention else ()  # those with a prefix cache
        if snapshots is not None:
            for pool in self._cached:
                pool.allocator.on_evicted = snapshots.drop
        self.page_size = pools[0].allocator.page_size
        self.queried_tokens = self.hit_tokens = 0

    def add(
        self,
        sequence: Hashable,
        num_tokens: int,
        at_once: int,
        *,
        tokens: Sequence[int] | None = None,
        salt: bytes = b"",
    ) -> Started | None:
        """Starts a sequence of num_tokens; None: there are too few pages, or the next step can reuse more of it.

        Args:
          at_once: tokens of its first step: pools with a window allocate pages only for these.
          tokens: the ids to look up in the prefix cache; None: no lookup.
          salt: see PageAllocator.add.
        """
        snapshots = None if tokens is None else self.snapshots
        digests = () if tokens is None or snapshots is None else snapshots.digests(tokens, salt)
        hit = 0 if tokens is None else self._known_tokens(tokens, num_tokens, salt, digests)
        if snapshots is not None and snapshots.is_fresh(digests, hit):
            return None
        for i, (allocator, window, num_sinks) in enumerate(self.pools):
            room = num_tokens if window is None else min(num_tokens, hit + at_once)
            known = tokens[: hit + 1] if tokens is not None and self._cached else None
            seen: dict[str, Any] = dict(window=window, num_sinks=num_sinks)
            if allocator.add(sequence, room, tokens=known, salt=salt, **seen) is None:
                for pool in self.pools[:i]:
                    pool.allocator.free(sequence)
                return None
        self.queried_tokens += len(tokens or ())
        self.hit_tokens += hit
        return Started(hit, None if snapshots is None else snapshots.add(sequence, digests, hit))

    def _known_tokens(self, tokens: Sequence[int], num_tokens: int, salt: bytes, digests: Sequence[bytes]) -> int:
        """The length of the longest prefix that is cached in all pools, and of whose states there is a snapshot."""
        hit, before = min(num_tokens, len(tokens) - 1), -1
        while hit != before:  # if one pool shortens the prefix, another may lack the shorter one
            before = hit
            for allocator, window, num_sinks in self._cached:
                seen: dict[str, Any] = dict(window=window, num_sinks=num_sinks)
                hit = allocator.known_tokens(tokens[: hit + 1], num_tokens, salt=salt, **seen)
            if self.snapshots is not None:
                hit = self.snapshots.known_tokens(digests, hit)
        return hit

    def most_tokens(self, max_num_batched_tokens: int) -> int | None:
        """The length of the longest single sequence that fits, computed in steps of this size; None: any length."""
        size = self.page_size
        limits = [
            room * size
            for allocator, window, num_sinks in self.pools
            if (room := allocator.num_pages - 1 - allocator.watermark)
            < _kept(window, num_sinks, size, max_num_batched_tokens)
        ]
        return min(limits, default=None)

    def make_room(self, sequence: Hashable, num_tokens: int, *, spare: int = 0) -> list[tuple[int, Copy]] | None:
        """Allocates pages for a sequence's first num_tokens; returns the necessary (pool index, copy) pairs.

        None: one of the pools has too few pages, and nothing has changed. spare: pages that must stay free besides
        those of whole pages of new tokens.
        """
        missing = [max(0, num_tokens - pool.allocator.num_tokens(sequence)) for pool in self.pools]
        for (allocator, *_), n in zip(self.pools, missing, strict=True):
            is_tight = spare > 0 and allocator.num_free <= spare + n // self.page_size
            if is_tight or not allocator.fits(sequence, n):
                return None
        copies = []
        for i, (pool, n) in enumerate(zip(self.pools, missing, strict=True)):
            copies += [(i, copy) for copy in (pool.allocator.append(sequence, n) if n else None) or ()]
        return copies

    def slide(self, sequence: Hashable, num_computed: int) -> None:
        """Frees pages that no token from num_computed on can see."""
        for allocator, window, num_sinks in self.pools:
            if window is not None and num_computed >= window:
                allocator.slide(sequence, num_computed - window + 1, num_sinks=num_sinks)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Starts a sequence that shares the pages of another."""
        for pool in self.pools:
            pool.allocator.fork(parent, child)

    def commit(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Adds a sequence's first tokens to the prefix cache."""
        for pool in self._cached:
            pool.allocator.commit(sequence, tokens)

    def free(self, sequence: Hashable) -> None:
        """Ends a sequence and frees its pages."""
        for pool in self.pools:
            pool.allocator.free(sequence)
        if self.snapshots is not None:
            self.snapshots.free(sequence)

    @property
    def num_pages(self) -> int:
        """Pages that sequences can hold."""
        return sum(pool.allocator.num_pages - 1 for pool in self.pools)

    @property
    def num_held(self) -> int:
        """Pages that sequences hold; a shared one is counted once."""
        return sum(pool.allocator.num_held for pool in self.pools)

    @property
    def num_shared(self) -> int:
        """Additional pages that sequences would hold without sharing."""
        return sum(pool.allocator.num_shared for pool in self.pools)

    @property
    def wasted_slots(self) -> int:
        """Empty token slots in held pages."""
        return sum(pool.allocator.wasted_slots for pool in self.pools)


def pool_sizes(
    num_pages: int,
    windows: Sequence[tuple[int | None, int]],
    *,
    page_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> list[int]:
    """The number of pages of each pool; num_pages for those without a window. windows: and sinks, as of a Pool.

    A pool with a window needs no more than the windows of all running sequences, plus the tokens of a step.
    """
    step = -(-max_num_batched_tokens // page_size)
    return [
        num_pages if window is None else min(num_pages, 1 + max_num_seqs * int(_kept(window, sinks, page_size)) + step)
        for window, sinks in windows
    ]


def make_pools(
    sizes: Sequence[int], windows: Sequence[tuple[int | None, int]], *, page_size: int, **options: Any
) -> Pools:
    """Empty pools. windows: and sinks, as of a Pool. options: see Pools.

    A pool of a few pages has no watermark. Neither has a pool with a window, which has enough pages for all running
    sequences, if there is also a pool without one, which limits admission.
    """
    is_alone = all(window is not None for window, _ in windows)
    watermarks = [
        int(WATERMARK * max(0, n - 2)) if window is None or is_alone else 0
        for n, (window, _) in zip(sizes, windows, strict=True)
    ]
    allocators = [PageAllocator(n, page_size, watermark=w) for n, w in zip(sizes, watermarks, strict=True)]
    pools = [Pool(allocator, *seen) for allocator, seen in zip(allocators, windows, strict=True)]
    return Pools(pools, **options)


def _kept(window: int | None, num_sinks: int, page_size: int, new_tokens: int = 0) -> float:
    """Pages that a sequence needs for a window: its tokens, a partial page at each end, sinks, and the new tokens."""
    return math.inf if window is None else 2 + sum(-(-n // page_size) for n in (window, num_sinks, new_tokens))
