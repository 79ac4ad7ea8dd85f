"""Prefix caching for layers with a state: which copies of states are kept, and in which slots of the cache. No jax.

A state cannot go back to an earlier token, so a prompt can continue the states of another one only from a copy that was
made at a page border of their common prefix: a snapshot. Chunks of a prompt end where snapshots are taken:

* at the last page border before the prompt's last token: the next turn of a chat goes on there, or the same prompt;
* where the prompt leaves the text of earlier ones: after a system prompt, for instance, once a second question has it;
* at the last page border that a step's token budget reaches, if the prompt needs several steps: for the next question
  about a long document. It is a guess, so it is the first to be dropped until a request uses it.

If no slot is free, the least recently used snapshot is dropped. Each of the first two costs a prompt a step more.
Generated tokens leave no snapshots.

Source: arXiv:2411.19379 (Marconi), which also keeps states at the ends of prompts and where they branch.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from jfa.pages import prefix_digests

# Pages of earlier prompts that are remembered to see where the next ones leave them: about 10 MB of host memory.
SEEN_PAGES = 2**16


class _Plan(NamedTuple):
    """Where a sequence leaves snapshots, in tokens; never empty. digests: of its prefixes of 0, 1, 2, ... pages."""

    digests: Sequence[bytes]
    borders: list[int]


class Snapshots:
    """An index of snapshots by the text that they follow. The scheduler copies states as it says.

    Attributes:
      page_size: tokens between the borders where snapshots can be.
    """

    def __init__(self, slots: Sequence[int], page_size: int):
        """slots: of the states in the cache, for snapshots; at least one."""
        if page_size < 1:
            raise ValueError(f"page_size is the number of tokens per page and must be >= 1, got {page_size}")
        self.page_size = page_size
        self._slots = tuple(slots)
        self._free = list(reversed(slots))
        self._slot_of: OrderedDict[bytes, int] = OrderedDict()  # the next one to be dropped comes first
        self._fresh: set[bytes] = set()  # taken by the step that is being scheduled: the next one can read them
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._plans: dict[Hashable, _Plan] = {}
        self._last: tuple[Sequence[int], tuple[int, bytes], Sequence[bytes]] = (), (0, b""), ()  # and their digests

    def begin_step(self) -> None:
        """Call this before a step is scheduled: it can read what the steps before it took."""
        self._fresh.clear()

    def digests(self, tokens: Sequence[int], salt: bytes) -> Sequence[bytes]:
        """Those of the prefixes of 0, 1, 2, ... pages of a sequence. Its last token is always computed."""
        held, of, _ = self._last
        if held is not tokens or of != (len(tokens), salt):  # a prompt that waits for pages is looked up in each step
            self._last = tokens, (len(tokens), salt), list(prefix_digests(tokens[:-1], self.page_size, salt))
        return self._last[2]

    def known_tokens(self, digests: Sequence[bytes], most: int) -> int:
        """The length of the longest prefix of up to `most` tokens that has a snapshot."""
        longest = min(most // self.page_size, len(digests) - 1)
        return self.page_size * next((n for n in range(longest, 0, -1) if digests[n] in self._slot_of), 0)

    def is_fresh(self, digests: Sequence[bytes], num_tokens: int) -> bool:
        """Whether the snapshot of this prefix is taken in the step that is being scheduled, at its end."""
        return digests[num_tokens // self.page_size] in self._fresh

    def add(self, sequence: Hashable, digests: Sequence[bytes], known: int) -> int | None:
        """Starts a sequence with the snapshot after its `known` first tokens; returns its slot, None if there is none.

        The states are copied from there before the next step.
        """
        source, num_seen = None, known // self.page_size
        if known:
            source = self._slot_of[digests[num_seen]]
            self._slot_of.move_to_end(digests[num_seen])
        while num_seen + 1 < len(digests) and digests[num_seen + 1] in self._seen:
            num_seen += 1
        borders = sorted(page * self.page_size for page in {num_seen, len(digests) - 1})
        if borders := [border for border in borders if border > known]:
            self._plans[sequence] = _Plan(digests, borders)
        for digest in reversed(digests[1:]):  # the longest prefix is forgotten first
            self._seen[digest] = None
            self._seen.move_to_end(digest)
        while len(self._seen) > SEEN_PAGES:
            self._seen.popitem(last=False)
        return source

    def free(self, sequence: Hashable) -> None:
        """Ends a sequence; its snapshots stay."""
        self._plans.pop(sequence, None)

    def end_of_chunk(self, sequence: Hashable, start: int, end: int) -> int:
        """Where its chunk from token start on ends, which can have the tokens up to `end`."""
        if (plan := self._plans.get(sequence)) is None:
            return end
        if end >= plan.borders[0]:
            return plan.borders[0]
        border = end // self.page_size * self.page_size
        return border if border > start else end

    def take(self, sequence: Hashable, num_tokens: int) -> int | None:
        """The slot to which its states are copied after this step, which computes the last of num_tokens; or None."""
        plan = self._plans.get(sequence)
        if plan is None or num_tokens % self.page_size:
            return None
        digest, is_guess = plan.digests[num_tokens // self.page_size], num_tokens < plan.borders[0]
        if not is_guess:
            del plan.borders[0]
            if not plan.borders:
                self.free(sequence)
        if digest in self._slot_of:
            return None  # another sequence was faster
        if not self._free:
            self.drop(next(iter(self._slot_of)))
        slot = self._slot_of[digest] = self._free.pop()
        self._slot_of.move_to_end(digest, last=not is_guess)
        self._fresh.add(digest)
        return slot

    def drop(self, digest: bytes) -> None:
        """Drops the snapshot of a prefix, if there is one: the prefix is no longer in pages, for example."""
        slot = self._slot_of.pop(digest, None)
        if slot is not None:
            self._free.append(slot)
            self._fresh.discard(digest)

    def check(self) -> None:
        """Checks that the state is consistent, for tests and debugging.

        Raises:
          AssertionError: it is not.
        """
        assert sorted([*self._free, *self._slot_of.values()]) == sorted(self._slots), "a slot is lost, or used twice"
        assert self._fresh <= self._slot_of.keys(), "a snapshot is fresh, but dropped"
        assert len(self._seen) <= SEEN_PAGES, "too many pages are remembered"
        assert all(plan.borders == sorted(set(plan.borders)) != [] for plan in self._plans.values()), "an empty plan"
