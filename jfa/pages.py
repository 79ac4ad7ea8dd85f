"""The books of a paged KV cache: who owns which page, which pages are free, and what is known of their contents.

Host Python on integers: the device sees a page table and kv_len and nothing of this. A page is in one of three states:

    free       no sequence owns it and nothing is known of what it holds
    held       sequences own it (its count), all at the same place among their pages
    evictable  no sequence owns it, but its content is registered: `add` takes it up again for the same prefix, and when
               no page is free, the least recently used evictable one is emptied for whoever needs a page

One rule keeps sharing sound: a page is written only while one sequence owns it and its content is not registered.
`append` sees to that before it makes room.

Source: PagedAttention, arXiv:2309.06180, section 4; prefixes found by a chain of hashes as in vLLM's automatic prefix
caching, https://docs.vllm.ai/en/stable/design/prefix_caching.html.
"""

import dataclasses
import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jfa.types import NULL_PAGE


class Copy(NamedTuple):
    """A page whose content must be on another page, in every layer, before the next step writes.

    Make the copies of a step in the order in which append gave them: a page can be the source or the destination of
    one and the destination of a later one, when sequences are forked or freed between the calls.
    """

    source: int
    destination: int


@dataclasses.dataclass(slots=True)
class _Sequence:
    pages: list[int]
    num_tokens: int
    chain: list[bytes]  # digest of the salt, then of every full page whose tokens were committed
    gone: int = 0  # pages at its begin that it gave back: NULL_PAGE stands in their places


class PageAllocator:
    """Gives the pages of a pool to sequences, shares them, and finds prefixes that the pool already holds.

    A sequence is named by any hashable id. When pages run out a method returns None and nothing has changed; a
    caller's mistake is a ValueError. Every method costs time in proportion to the pages that it touches, and the same
    calls give the same pages.

    Attributes:
      num_pages: pages of the pool; NULL_PAGE is one of them and is never given out.
      page_size: tokens of a page.
      watermark: free pages that `add` leaves for sequences that run to grow into. A sequence of more than
        (num_pages - 1 - watermark) * page_size tokens is never admitted, however long it waits.
      queried_tokens, hit_tokens: tokens that were given to `add` to look for, and those of them that it found.
      evictions: registered contents that were given up because a page was needed.
    """

    def __init__(self, num_pages: int, page_size: int, *, watermark: int = 0) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be >= 2, as page {NULL_PAGE} is never given out, got {num_pages}")
        if page_size < 1:
            raise ValueError(f"page_size is the number of tokens of a page and must be >= 1, got {page_size}")
        if not 0 <= watermark <= num_pages - 2:
            raise ValueError(
                f"watermark must be >= 0 and leave a page to give out, so at most {num_pages - 2} of {num_pages} "
                f"pages, got {watermark}"
            )
        self.num_pages = num_pages
        self.page_size = page_size
        self.watermark = watermark
        self.queried_tokens = 0
        self.hit_tokens = 0
        self.evictions = 0
        self._sequences: dict[Hashable, _Sequence] = {}
        self._counts = [0] * num_pages  # owners of each page
        self._free = [page for page in reversed(range(num_pages)) if page != NULL_PAGE]  # a stack
        # a plain dict finds its oldest entry by walking over the deleted ones, an OrderedDict at once
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
    ) -> int | None:
        """Starts a sequence with room for num_tokens tokens and returns how many of them need not be computed.

        With tokens, the ids from the first on, the longest prefix that the pool holds in full pages is shared. The last
        token is never among it, as its logits are wanted. What lies past num_tokens is not reused either. The salt
        stands for whatever else the cached values depend on (an adapter, an image): prefixes of different salts differ.
        With a window, of so many tokens with the query, only the pages that the next token sees must be there;
        NULL_PAGE stands for those before, as behind slide.

        None: fewer than `watermark` pages would be left.
        """
        self._check_new(sequence)
        if num_tokens < 0:
            raise ValueError(f"add starts sequence {sequence!r} with num_tokens >= 0, got {num_tokens}")
        pages, chain = self._known(() if tokens is None else tokens, num_tokens, salt, window)
        gone = pages.count(NULL_PAGE)
        missing = -(-num_tokens // self.page_size) - len(pages)
        if self.num_free - missing - sum(page in self._evictable for page in pages) < self.watermark:
            return None
        hit = len(pages) * self.page_size
        self._share(pages[gone:])
        pages += [self._take() for _ in range(missing)]
        self._sequences[sequence] = _Sequence(pages, num_tokens, chain, gone)
        if tokens is not None:
            self.queried_tokens += len(tokens)
            self.hit_tokens += hit
        return hit

    def known_tokens(
        self, tokens: Sequence[int], num_tokens: int, *, salt: bytes = b"", window: int | None = None
    ) -> int:
        """How many of the tokens `add` would find now."""
        return len(self._known(tokens, num_tokens, salt, window)[0]) * self.page_size

    def append(self, sequence: Hashable, num_tokens: int = 1) -> list[Copy] | None:
        """Makes room for num_tokens more tokens, and says what must be copied before they are written.

        There is at most one copy: of the last page, if it has room and other sequences own it too or its content is
        registered (a full page may be, of which truncate left a part). The copy then takes its place.

        None: there are too few pages, the watermark's among them.
        """
        books = self._books(sequence)
        if num_tokens < 0:
            raise ValueError(f"append adds num_tokens >= 0 to sequence {sequence!r}, got {num_tokens}; see truncate")
        length = books.num_tokens + num_tokens
        missing, shared, registered = self._wants(books, num_tokens)
        if not (missing or shared or registered):
            books.num_tokens = length
            return []

        if missing + shared > self.num_free:
            return None
        copies = []
        if registered and not shared and missing == self.num_free:
            self._forget(books.pages[-1])  # no page to spare for a copy: the content is given up, as in an eviction
        elif shared or registered:
            copies.append(Copy(books.pages[-1], self._take()))
            self._release(books.pages[-1:])
            books.pages[-1] = copies[0].destination
        books.pages += [self._take() for _ in range(missing)]
        books.num_tokens = length
        return copies

    def fits(self, sequence: Hashable, num_tokens: int) -> bool:
        """Whether append would find the pages for num_tokens more tokens."""
        missing, shared, _ = self._wants(self._books(sequence), num_tokens)
        return missing + shared <= self.num_free

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Starts a sequence with the tokens of another, on the same pages; whoever appends first gets a copy.

        What the parent has room for must be written by then, or be the same in both: only `append` separates them.
        """
        books = self._books(parent)
        self._check_new(child)
        self._share(books.pages[books.gone :])
        self._sequences[child] = _Sequence(books.pages.copy(), books.num_tokens, books.chain.copy(), books.gone)

    def slide(self, sequence: Hashable, first_token: int) -> None:
        """Gives back the pages whose tokens all lie before first_token: a layer with a window sees them no more.

        NULL_PAGE takes their places among the pages of the sequence; what is known of their contents stays known.
        """
        books = self._books(sequence)
        if not 0 <= first_token <= books.num_tokens:
            raise ValueError(
                f"slide keeps the tokens of sequence {sequence!r} from one on that is at most its "
                f"{books.num_tokens}th, got {first_token}"
            )
        gone = first_token // self.page_size
        if gone > books.gone:
            self._release(books.pages[books.gone : gone])
            books.pages[books.gone : gone] = [NULL_PAGE] * (gone - books.gone)
            books.gone = gone

    def truncate(self, sequence: Hashable, num_tokens: int) -> None:
        """Keeps the first num_tokens tokens of a sequence and gives back the pages that only the others need."""
        books = self._books(sequence)
        if not 0 <= num_tokens <= books.num_tokens:
            raise ValueError(
                f"truncate keeps between 0 and all {books.num_tokens} tokens of sequence {sequence!r}, "
                f"got {num_tokens}; append makes room for more"
            )
        if num_tokens < books.gone * self.page_size:
            raise ValueError(
                f"truncate to {num_tokens} tokens needs pages of sequence {sequence!r} that slide gave back, up to "
                f"token {books.gone * self.page_size}; free it and add it anew"
            )
        num_pages = -(-num_tokens // self.page_size)
        self._release(books.pages[num_pages:])
        del books.pages[num_pages:]
        del books.chain[1 + num_tokens // self.page_size :]
        books.num_tokens = num_tokens

    def commit(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Says which tokens of a sequence, from its first on, are written on the device: others may reuse full pages.

        Only pages that were not committed before are looked at. Of pages with equal content the first stays registered.
        """
        books = self._books(sequence)
        committed = (len(books.chain) - 1) * self.page_size
        if not committed <= len(tokens) <= books.num_tokens:
            raise ValueError(
                f"commit takes the tokens of sequence {sequence!r} from its first on, at least the {committed} of its "
                f"committed pages and at most {books.num_tokens}, got {len(tokens)}; see append and truncate"
            )
        for index in range(committed // self.page_size, len(tokens) // self.page_size):
            page = books.pages[index]
            digest = self._digest(books.chain[-1], tokens, index)
            if page == NULL_PAGE:
                books.chain.append(digest)
                continue
            if self._digest_of[page] not in (None, digest):
                raise ValueError(
                    f"sequence {sequence!r} commits other tokens from {index * self.page_size} on than a sequence that "
                    f"shares page {page} with it; fork before append, and append before the tokens differ"
                )
            if self._page_of.setdefault(digest, page) == page:
                self._digest_of[page] = digest
            books.chain.append(digest)

    def free(self, sequence: Hashable) -> None:
        """Forgets a sequence. Pages that nobody else owns become evictable if they are registered, else free."""
        books = self._books(sequence)
        self._release(books.pages[books.gone :])
        del self._sequences[sequence]

    def pages(self, sequence: Hashable, start: int = 0) -> tuple[int, ...]:
        """The pages of a sequence in order, from the one at index start on: its row of the page table.

        NULL_PAGE stands for those that slide gave back.
        """
        return tuple(self._books(sequence).pages[start:])

    def num_gone(self, sequence: Hashable) -> int:
        """The pages at the begin of a sequence that slide gave back."""
        return self._books(sequence).gone

    def num_tokens(self, sequence: Hashable) -> int:
        """The tokens that a sequence has room for: its kv_len once they are written."""
        return self._books(sequence).num_tokens

    @property
    def sequences(self) -> tuple[Hashable, ...]:
        """The names of all sequences, the oldest first."""
        return tuple(self._sequences)

    @property
    def num_free(self) -> int:
        """Pages that can be had: free and evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_evictable(self) -> int:
        """Pages that no sequence owns, with content that may be reused."""
        return len(self._evictable)

    @property
    def num_held(self) -> int:
        """Pages that sequences own, a shared one counted once."""
        return self.num_pages - 1 - self.num_free

    @property
    def num_shared(self) -> int:
        """Pages that sequences would hold besides, had each its own. Costs time per sequence."""
        return sum(len(books.pages) - books.gone for books in self._sequences.values()) - self.num_held

    @property
    def wasted_slots(self) -> int:
        """Slots of held pages that hold no sequence's token, of num_held * page_size. Costs time per sequence."""
        filled: dict[int, list[int]] = {}  # last page that is not full: tokens in it, of each sequence that ends there
        for books in self._sequences.values():
            if books.num_tokens % self.page_size:
                filled.setdefault(books.pages[-1], []).append(books.num_tokens % self.page_size)
        # an owner that is not in the list has filled the page
        return sum(self.page_size - max(n) for page, n in filled.items() if len(n) == self._counts[page])

    def check(self) -> None:
        """Proves the books, for tests and debug runs. Costs time per page of the pool.

        Raises:
          AssertionError: they do not add up; the message names the page or the sequence.
        """
        owners = Counter(page for books in self._sequences.values() for page in books.pages[books.gone :])
        free = Counter(self._free)
        for page, digest in enumerate(self._digest_of):
            evictable = page in self._evictable
            count = self._counts[page]
            assert count == owners[page], f"page {page} has {owners[page]} owners and a count of {count}"
            assert (count > 0) + free[page] + evictable == (page != NULL_PAGE), (
                f"page {page} is not in one state: {count} owners, {free[page]} times free, evictable is {evictable}"
            )
            if digest is None:
                assert not evictable, f"page {page} is evictable, but not registered"
            else:
                assert not free[page], f"page {page} is free, but registered"
                assert self._page_of.get(digest) == page, f"page {page} is registered, but not found"
        for digest, page in self._page_of.items():
            assert self._digest_of[page] == digest, f"page {page} is found by a digest that is not its own"
        for name, books in self._sequences.items():
            full, rest = divmod(books.num_tokens, self.page_size)
            assert len(books.pages) == full + (rest > 0), (
                f"sequence {name!r} of {books.num_tokens} tokens has {len(books.pages)} pages of {self.page_size}"
            )
            held = books.pages[books.gone :]
            assert books.pages[: books.gone] == [NULL_PAGE] * books.gone, f"sequence {name!r} holds what it gave back"
            assert len(set(held)) == len(held), f"sequence {name!r} has a page twice: {books.pages}"
            assert len(books.chain) - 1 <= full, f"sequence {name!r} has committed more than its {full} full pages"
            for page, digest in zip(held, books.chain[1 + books.gone :], strict=False):
                assert self._digest_of[page] in (None, digest), f"page {page} of sequence {name!r} holds other tokens"

    def _known(
        self, tokens: Sequence[int], num_tokens: int, salt: bytes, window: int | None
    ) -> tuple[list[int], list[bytes]]:
        """The pages of the longest prefix that the pool holds, and the digests of the salt and of each of them."""
        found: list[int] = []
        chain = [hashlib.blake2b(salt, digest_size=32, person=b"salt").digest()]
        for index in range(min(num_tokens, len(tokens) - 1) // self.page_size):
            chain.append(self._digest(chain[-1], tokens, index))
            page = self._page_of.get(chain[-1], NULL_PAGE)
            if page == NULL_PAGE and window is None:
                break
            found.append(page)
        size = len(found)
        while size and window is not None:
            first = max(0, size * self.page_size - window + 1) // self.page_size
            lacking = [index for index in range(first, size) if found[index] == NULL_PAGE]
            if not lacking:
                return [NULL_PAGE] * first + found[first:size], chain[: 1 + size]
            size = lacking[-1]  # a longer prefix would lack this page too, or one behind it
        return found[:size], chain[: 1 + size]

    def _wants(self, books: _Sequence, num_tokens: int) -> tuple[int, bool, bool]:
        """Pages that more tokens take, and whether the last page, which they fill up, is shared or registered."""
        missing = -(-(books.num_tokens + num_tokens) // self.page_size) - len(books.pages)
        if not num_tokens or not books.num_tokens % self.page_size:
            return missing, False, False
        tail = books.pages[-1]
        return missing, self._counts[tail] > 1, self._digest_of[tail] is not None

    def _digest(self, parent: bytes, tokens: Sequence[int], index: int) -> bytes:
        """Names a full page by its tokens and all before them. 32 bytes: no two contents meet, not even by intent."""
        start = index * self.page_size
        page = array("q", tokens[start : start + self.page_size]).tobytes()
        return hashlib.blake2b(parent + page, digest_size=32).digest()

    def _check_new(self, sequence: Hashable) -> None:
        if sequence in self._sequences:
            raise ValueError(f"sequence {sequence!r} is already there; free it first or choose another name")

    def _books(self, sequence: Hashable) -> _Sequence:
        books = self._sequences.get(sequence)
        if books is None:
            raise ValueError(f"there is no sequence {sequence!r}; add or fork starts one")
        return books

    def _take(self) -> int:
        """A page for one owner. The caller knows that there is one."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            self._forget(page)
        self._counts[page] = 1
        return page

    def _share(self, pages: list[int]) -> None:
        """One more owner each, of held and evictable pages."""
        for page in pages:
            if not self._counts[page]:
                del self._evictable[page]
            self._counts[page] += 1

    def _release(self, pages: list[int]) -> None:
        """One owner less each. The last page goes first and is evicted first: a head is useful without its tail."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if self._counts[page]:
                continue
            if self._digest_of[page] is None:
                self._free.append(page)
            else:
                self._evictable[page] = None

    def _forget(self, page: int) -> None:
        """Makes the content of a registered page unknown."""
        digest = self._digest_of[page]
        assert digest is not None, f"page {page} is not registered"
        del self._page_of[digest]
        self._digest_of[page] = None
        self.evictions += 1
