"""The page allocator of a paged KV cache: which sequences own a page, which pages are free, which can be reused.

Host-side Python on integers: the device only sees a page table and kv_len. A page is in one of three states:

    free       no sequence owns it and its content is not used
    held       one or more sequences own it (its reference count), all at the same index among their pages
    evictable  no sequence owns it, but its content is registered in the prefix cache: `add` reuses it for the same
               prefix, and when no page is free, the least recently used evictable page is evicted

Sharing is safe because a page is written only while exactly one sequence owns it and its content is not registered.
`append` ensures this before it adds room to a sequence.

Source: PagedAttention, arXiv:2309.06180, section 4; prefixes are looked up by a chain of hashes as in vLLM's automatic
prefix caching, https://docs.vllm.ai/en/stable/design/prefix_caching.html.
"""

import dataclasses
import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple

from jfa.types import NULL_PAGE


class Copy(NamedTuple):
    """A page to be copied to another page, in every layer, before the next step writes to the cache.

    Make the copies of a step in the order in which append returned them: if sequences are forked or freed between the
    calls, the source or destination of one copy can be the destination of a later one.
    """

    source: int
    destination: int


@dataclasses.dataclass(slots=True)
class _Sequence:
    pages: list[int]
    num_tokens: int
    chain: list[bytes]  # digest of the salt, then of every full page whose tokens were committed
    gone: int = 0  # slide released the pages before this index and replaced them by NULL_PAGE,
    kept: int = 0  # but for so many at its start

    @property
    def held(self) -> list[int]:
        return self.pages[: self.kept] + self.pages[self.gone :]


class PageAllocator:
    """Allocates the pages of a pool to sequences, shares them, and finds cached prefixes.

    A sequence is identified by any hashable id. If there are too few pages, a method returns None and changes nothing;
    misuse raises ValueError. Each method takes time proportional to the number of pages that it touches. Allocation is
    deterministic: the same calls return the same pages.

    Attributes:
      num_pages: number of pages in the pool, including NULL_PAGE, which is never allocated.
      page_size: tokens per page.
      watermark: pages that `add` leaves free, so that running sequences can grow. A sequence of more than
        (num_pages - 1 - watermark) * page_size tokens is never admitted, however long it waits.
      queried_tokens, hit_tokens: number of tokens that `add` looked up in the prefix cache, and how many it found.
      evictions: number of registered pages whose content was dropped because a page was needed.
      on_evicted: called with the digest (see prefix_digests) of the prefix that such a page ends; None: not called.
    """

    def __init__(self, num_pages: int, page_size: int, *, watermark: int = 0) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be >= 2, since page {NULL_PAGE} is never allocated, got {num_pages}")
        if page_size < 1:
            raise ValueError(f"page_size is the number of tokens per page and must be >= 1, got {page_size}")
        if not 0 <= watermark <= num_pages - 2:
            raise ValueError(
                f"watermark must be >= 0 and leave at least one page to allocate, so at most {num_pages - 2} of "
                f"{num_pages} pages, got {watermark}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.watermark = watermark
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self.on_evicted: Callable[[bytes], None] | None = None
        self._sequences: dict[Hashable, _Sequence] = {}
        self._counts = [0] * num_pages  # owners of each page
        self._free = [page for page in reversed(range(num_pages)) if page != NULL_PAGE]  # a stack
        # an OrderedDict finds its oldest entry in constant time; a plain dict scans over the deleted ones
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._digest_of: list[bytes | None] = [None] * num_pages  # registered pages; _page_of is the inverse
        self._page_of: dict[bytes, int] = {}

    def add(
        self,
        sequence: Hashable,
        num_tokens: int,
        *,
        tokens: Sequence[int] | None = None,
        salt: bytes = b"",
        window: int | None = None,
        num_sinks: int = 0,
    ) -> int | None:
        """Starts a sequence with room for num_tokens tokens and returns how many of them are already cached.

        Args:
          tokens: token ids of the sequence, to look up in the prefix cache. The longest cached prefix of full pages is
            shared. It has at most num_tokens tokens and never includes the last of `tokens`, which must be computed to
            get its logits.
          salt: anything else that the cached values depend on (an adapter, an image): prefixes with different salts
            never match.
          window: number of tokens that a query sees, including itself. Only the pages that the next token sees must be
            cached; earlier pages are replaced by NULL_PAGE, as after slide.
          num_sinks: number of first tokens that it sees besides.

        Returns:
          The number of cached tokens, or None if fewer than `watermark` pages would be left.
        """
        self._check_new(sequence)
        if num_tokens < 0:
            raise ValueError(f"to add sequence {sequence!r}, num_tokens must be >= 0, got {num_tokens}")
        pages, chain = self._known(() if tokens is None else tokens, num_tokens, salt, window, num_sinks)
        kept = pages.index(NULL_PAGE) if NULL_PAGE in pages else 0
        gone = kept + pages.count(NULL_PAGE)
        missing = -(-num_tokens // self.page_size) - len(pages)
        if self.num_free - missing - sum(page in self._evictable for page in pages) < self.watermark:
            return None
        hit = len(pages) * self.page_size
        record = self._sequences[sequence] = _Sequence(pages, num_tokens, chain, gone, kept)
        self._share(record.held)
        pages += [self._take() for _ in range(missing)]
        if tokens is not None:
            self.queried_tokens += len(tokens)
            self.hit_tokens += hit
        return hit

    def known_tokens(
        self,
        tokens: Sequence[int],
        num_tokens: int,
        *,
        salt: bytes = b"",
        window: int | None = None,
        num_sinks: int = 0,
    ) -> int:
        """The number of cached tokens that `add` would return now."""
        return len(self._known(tokens, num_tokens, salt, window, num_sinks)[0]) * self.page_size

    def append(self, sequence: Hashable, num_tokens: int = 1) -> list[Copy] | None:
        """Adds room for num_tokens more tokens and returns the page copies to make before they are written.

        There is at most one copy: of the last page, if it has room and either other sequences also own it or its
        content is registered (truncate may leave part of a registered full page). The sequence then uses the copy.

        Returns None if there are too few pages, even including those that the watermark reserves.
        """
        record = self._record(sequence)
        if num_tokens < 0:
            raise ValueError(
                f"to append to sequence {sequence!r}, num_tokens must be >= 0, got {num_tokens}; "
                "use truncate to drop tokens"
            )
        length = record.num_tokens + num_tokens
        missing, shared, registered = self._needs(record, num_tokens)
        if not (missing or shared or registered):
            record.num_tokens = length
            return []

        if missing + shared > self.num_free:
            return None
        copies = []
        if registered and not shared and missing == self.num_free:
            self._forget(record.pages[-1])  # no page is left for a copy: drop the registered content, as in an eviction
        elif shared or registered:
            copies.append(Copy(record.pages[-1], self._take()))
            self._release(record.pages[-1:])
            record.pages[-1] = copies[0].destination
        record.pages += [self._take() for _ in range(missing)]
        record.num_tokens = length
        return copies

    def fits(self, sequence: Hashable, num_tokens: int) -> bool:
        """Whether append would find enough pages for num_tokens more tokens."""
        missing, shared, _ = self._needs(self._record(sequence), num_tokens)
        return missing + shared <= self.num_free

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Starts a sequence with the tokens of another, on the same pages; the first to append gets a copy of the last.

        The tokens that the parent has room for must already be written, or be the same in both sequences: the sequences
        stay on the same pages until `append`.
        """
        record = self._record(parent)
        self._check_new(child)
        self._share(record.held)
        self._sequences[child] = dataclasses.replace(record, pages=record.pages.copy(), chain=record.chain.copy())

    def slide(self, sequence: Hashable, first_token: int, *, num_sinks: int = 0) -> None:
        """Releases the pages whose tokens are all before first_token: a layer with a window no longer sees them.

        They are replaced by NULL_PAGE in the pages of the sequence; registered contents stay registered. The pages of
        the first num_sinks tokens stay; pass the same number in all calls for a sequence.
        """
        record = self._record(sequence)
        if not 0 <= first_token <= record.num_tokens:
            raise ValueError(
                f"to slide sequence {sequence!r}, first_token must be from 0 to its length, "
                f"{record.num_tokens}, got {first_token}"
            )
        kept = -(-num_sinks // self.page_size)
        gone, first = first_token // self.page_size, max(record.gone, kept)
        if gone > first:
            self._release(record.pages[first:gone])
            record.pages[first:gone] = [NULL_PAGE] * (gone - first)
            record.gone, record.kept = gone, kept

    def truncate(self, sequence: Hashable, num_tokens: int) -> None:
        """Keeps the first num_tokens tokens of a sequence and releases the pages that these do not need."""
        record = self._record(sequence)
        if not 0 <= num_tokens <= record.num_tokens:
            raise ValueError(
                f"truncate must keep 0 to {record.num_tokens} tokens of sequence {sequence!r}, "
                f"got {num_tokens}; use append to add room"
            )
        if num_tokens < record.gone * self.page_size:
            raise ValueError(
                f"cannot truncate to {num_tokens} tokens: slide released the pages of sequence {sequence!r} up to "
                f"token {record.gone * self.page_size}; free it and add it again"
            )
        num_pages = -(-num_tokens // self.page_size)
        self._release(record.pages[num_pages:])
        del record.pages[num_pages:]
        del record.chain[1 + num_tokens // self.page_size :]
        record.num_tokens = num_tokens

    def commit(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Registers the full pages of the first len(tokens) tokens for reuse; they must be written on the device.

        tokens: the sequence's token ids from the first one on; only those of pages that were not committed before are
        read. If several pages have the same content, the first one stays registered.
        """
        record = self._record(sequence)
        committed = (len(record.chain) - 1) * self.page_size
        if not committed <= len(tokens) <= record.num_tokens:
            raise ValueError(
                f"to commit sequence {sequence!r}, pass its tokens from the first one on: at least the {committed} "
                f"already committed and at most {record.num_tokens}, got {len(tokens)}; see append and truncate"
            )
        for index in range(committed // self.page_size, len(tokens) // self.page_size):
            page = record.pages[index]
            digest = _digest(record.chain[-1], tokens, index, self.page_size)
            if page == NULL_PAGE:
                record.chain.append(digest)
                continue
            if self._digest_of[page] not in (None, digest):
                raise ValueError(
                    f"the tokens of sequence {sequence!r} from {index * self.page_size} on differ from those that "
                    f"another owner of page {page} committed; fork before append, and append before the tokens differ"
                )
            if self._page_of.setdefault(digest, page) == page:
                self._digest_of[page] = digest
            record.chain.append(digest)

    def free(self, sequence: Hashable) -> None:
        """Removes a sequence. Pages that no other sequence owns become evictable if registered, otherwise free."""
        record = self._record(sequence)
        self._release(record.held)
        del self._sequences[sequence]

    def pages(self, sequence: Hashable, start: int = 0) -> tuple[int, ...]:
        """The pages of a sequence in order, from index start on: its row of the page table.

        Pages that slide released are NULL_PAGE.
        """
        return tuple(self._record(sequence).pages[start:])

    def gone(self, sequence: Hashable) -> slice:
        """The pages of a sequence that slide released."""
        record = self._record(sequence)
        return slice(record.kept, record.gone)

    def num_tokens(self, sequence: Hashable) -> int:
        """The number of tokens that a sequence has room for: its kv_len once they are written."""
        return self._record(sequence).num_tokens

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The ids of all sequences, oldest first."""
        return tuple(self._sequences)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        """Pages that no sequence owns and whose content can be reused."""
        return len(self._evictable)

    @property
    def num_held(self) -> int:
        """Pages that sequences own; a shared page is counted once."""
        return self.num_pages - 1 - self.num_free

    @property
    def num_shared(self) -> int:
        """Additional pages that would be held without sharing. Takes time proportional to the number of sequences."""
        return sum(len(record.held) for record in self._sequences.values()) - self.num_held

    @property
    def wasted_slots(self) -> int:
        """Unused slots among the num_held * page_size of held pages.

        Takes time proportional to the number of sequences.
        """
        filled: dict[int, list[int]] = {}  # partly filled last page: number of tokens of each sequence that ends there
        for record in self._sequences.values():
            if record.num_tokens % self.page_size:
                filled.setdefault(record.pages[-1], []).append(record.num_tokens % self.page_size)
        # an owner that is not in the list uses the whole page
        return sum(self.page_size - max(n) for page, n in filled.items() if len(n) == self._counts[page])

    def check(self) -> None:
        """Checks that the allocator's state is consistent, for tests and debugging. Visits every page of the pool.

        Raises:
          AssertionError: the state is inconsistent; the message names the page or the sequence.
        """
        owners = Counter(page for record in self._sequences.values() for page in record.held)
        free = Counter(self._free)
        for page, digest in enumerate(self._digest_of):
            evictable = page in self._evictable
            count = self._counts[page]
            assert count == owners[page], f"page {page} has {owners[page]} owners and a count of {count}"
            assert (count > 0) + free[page] + evictable == (page != NULL_PAGE), (
                f"page {page} is not in exactly one state: {count} owners, {free[page]} times free, "
                f"evictable is {evictable}"
            )
            if digest is None:
                assert not evictable, f"page {page} is evictable, but not registered"
            else:
                assert not free[page], f"page {page} is free, but registered"
                assert self._page_of.get(digest) == page, f"page {page} is registered, but not found by its digest"
        for digest, page in self._page_of.items():
            assert self._digest_of[page] == digest, f"page {page} is found by the digest of another page"
        for name, record in self._sequences.items():
            full, rest = divmod(record.num_tokens, self.page_size)
            assert len(record.pages) == full + (rest > 0), (
                f"sequence {name!r} of {record.num_tokens} tokens has {len(record.pages)} pages of {self.page_size}"
            )
            held, released = record.held, record.pages[self.gone(name)]
            assert not any(page != NULL_PAGE for page in released), f"sequence {name!r} lists a released page"
            assert len(set(held)) == len(held), f"sequence {name!r} has a page twice: {record.pages}"
            assert len(record.chain) - 1 <= full, f"sequence {name!r} has committed more than its {full} full pages"
            for page, digest in zip(record.pages, record.chain[1:], strict=False):
                is_own = page == NULL_PAGE or self._digest_of[page] in (None, digest)
                assert is_own, f"page {page} of sequence {name!r} has other tokens"

    def _known(
        self, tokens: Sequence[int], num_tokens: int, salt: bytes, window: int | None, num_sinks: int
    ) -> tuple[list[int], list[bytes]]:
        """The pages of the longest cached prefix, and the digests of the salt and of each of these pages.

        NULL_PAGE: the next token does not see the page.
        """
        found: list[int] = []
        chain = [_root(salt)]
        for index in range(min(num_tokens, len(tokens) - 1) // self.page_size):
            chain.append(_digest(chain[-1], tokens, index, self.page_size))
            page = self._page_of.get(chain[-1], NULL_PAGE)
            if page == NULL_PAGE and window is None:
                break
            found.append(page)
        size = len(found)
        while size and window is not None:
            first = max(0, size * self.page_size - window + 1) // self.page_size
            kept = min(first, -(-num_sinks // self.page_size))
            lacking = [index for index in (*range(kept), *range(first, size)) if found[index] == NULL_PAGE]
            if not lacking:
                return found[:kept] + [NULL_PAGE] * (first - kept) + found[first:size], chain[: 1 + size]
            size = lacking[-1]  # a longer prefix would lack this page too, or a later one
        return found[:size], chain[: 1 + size]

    def _needs(self, record: _Sequence, num_tokens: int) -> tuple[int, bool, bool]:
        """Number of pages to allocate for num_tokens more tokens; and, if some of these are written to the last page,
        whether that page is shared and whether it is registered.
        """
        missing = -(-(record.num_tokens + num_tokens) // self.page_size) - len(record.pages)
        if not num_tokens or not record.num_tokens % self.page_size:
            return missing, False, False
        tail = record.pages[-1]
        return missing, self._counts[tail] > 1, self._digest_of[tail] is not None

    def _check_new(self, sequence: Hashable) -> None:
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence!r} already exists; free it first or choose another id")

    def _record(self, sequence: Hashable) -> _Sequence:
        record = self._sequences.get(sequence)
        if record is None:
            raise ValueError(f"there is no sequence {sequence!r}; start it with add or fork")
        return record

    def _take(self) -> int:
        """Allocates a page to one owner. The caller has checked that a page is available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            self._forget(page)
        self._counts[page] = 1
        return page

    def _share(self, pages: list[int]) -> None:
        """Adds an owner to each of these held or evictable pages."""
        for page in pages:
            if not self._counts[page]:
                del self._evictable[page]
            self._counts[page] += 1

    def _release(self, pages: list[int]) -> None:
        """Removes an owner from each page, last page first: a prefix must be evicted from its end."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if self._counts[page]:
                continue
            if self._digest_of[page] is None:
                self._free.append(page)
            else:
                self._evictable[page] = None

    def _forget(self, page: int) -> None:
        """Drops a registered page from the prefix cache."""
        digest = self._digest_of[page]
        assert digest is not None, f"page {page} is not registered"
        del self._page_of[digest]
        self._digest_of[page] = None
        self.evictions += 1
        if self.on_evicted is not None:
            self.on_evicted(digest)


def prefix_digests(tokens: Sequence[int], page_size: int, salt: bytes = b"") -> Iterator[bytes]:
    """What identifies each prefix of 0, 1, 2, ... full pages of a sequence. salt: see PageAllocator.add."""
    yield (digest := _root(salt))
    for index in range(len(tokens) // page_size):
        yield (digest := _digest(digest, tokens, index, page_size))


def _root(salt: bytes) -> bytes:
    return hashlib.blake2b(salt, digest_size=32, person=b"salt").digest()


def _digest(parent: bytes, tokens: Sequence[int], index: int, page_size: int) -> bytes:
    """Hashes a full page's tokens and all tokens before them. 32 bytes: collisions cannot be found on purpose."""
    start = index * page_size
    page = array("q", tokens[start : start + page_size]).tobytes()
    return hashlib.blake2b(parent + page, digest_size=32).digest()
