"""Who computes what in the next step: continuous batching over pages, as plain Python on integers.

A step computes new tokens of many continuations at once: one of each that decodes, and chunks of prompts while the
budget of tokens lasts. Whoever decodes goes first, so a long prompt delays nobody; then prompts that have begun, then
those that wait, in the order of priority and arrival and without overtaking. A prompt is admitted when there are pages
for all of it. When a decoding continuation finds no page, the newest ones give up theirs and wait again, with all their
tokens: they are computed anew later (of what the prefix cache still holds, nothing). The oldest one never gives way, so
everybody ends.

Source: Orca, https://www.usenix.org/conference/osdi22/presentation/yu, section 4 (iteration-level scheduling);
arXiv:2309.06180, section 4.5 (preemption by recomputation); arXiv:2308.16369 (chunked prefill).
"""

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple

from jfa.pages import Copy
from jfa_models.engine.pools import Pools
from jfa_models.engine.request import Continuation


class Chunk(NamedTuple):
    """Tokens of one continuation in a step.

    start: how many were computed before. samples: the chunk ends with its last token, so the next one is drawn, and for
    each of the followers, which begin here, too. generated: tokens drawn before that. copies: of pages, with the number
    of their pool.
    """

    of: Continuation
    start: int
    num_tokens: int
    samples: bool
    generated: int
    copies: Sequence[tuple[int, Copy]]
    followers: Sequence[Continuation] = ()


class Scheduler:
    """Chooses the chunks of each step, and keeps pages and slots with those that run.

    Attributes:
      num_preemptions: how often somebody gave up their pages.
    """

    def __init__(
        self,
        pools: Pools,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ):
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, got {max_num_seqs}")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs, a token of each that decodes, got "
                f"{max_num_batched_tokens} and {max_num_seqs}"
            )
        self.pools = pools
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self._slots = list(reversed(range(max_num_seqs)))  # a stack of free ones
        self._running: list[Continuation] = []  # in their order
        self._waiting: list[tuple[tuple[int, int, int], Continuation]] = []  # a heap

    @property
    def num_running(self) -> int:
        """Continuations with pages and a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Continuations that want pages."""
        return sum(not one.finished for _, one in self._waiting)

    def add(self, one: Continuation) -> None:
        """Lets a continuation wait for its turn."""
        heapq.heappush(self._waiting, (one.order, one))

    def finish(self, one: Continuation) -> None:
        """Gives back what a continuation has, wherever it is."""
        one.finished = True
        if one.slot is not None:
            self._release(one)

    def fork(self, parent: Continuation, child: Continuation) -> bool:
        """Starts a child with what the parent has computed, on the same pages; without pages or a slot it waits."""
        if parent.slot is None or not self._slots:
            self.add(child)
            return False
        self.pools.fork(parent, child)
        child.num_computed = parent.num_computed
        self._run(child)
        return True

    def choose(self, beam: Continuation, token: int) -> None:
        """The host's choice of a beam's next token."""
        beam.tokens.append(token)
        beam.num_tokens += 1
        beam.reported = False
        if beam.slot is None and not beam.finished:
            self.add(beam)  # it gave up its pages while the choice was open

    def make_way(self) -> bool:
        """When nothing can be scheduled: a beam whose successors are known lets others have its pages."""
        if not self._running or not self.num_waiting:
            return False
        self._preempt(self._running[-1])
        return True

    def schedule(self) -> list[Chunk]:
        """The next step; empty if nothing can run before results are known."""
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        for one in self._running:
            self.pools.slide(one, one.num_computed)
        for prompts in (False, True):
            for one in self._running.copy():
                num_tokens = min(one.num_new, budget)
                if one.slot is None or not num_tokens or (one.num_new > 1) != prompts:
                    continue
                copies = self._make_room(one, num_tokens)
                if copies is not None:
                    chunks.append(self._chunk(one, num_tokens, copies))
                    budget -= num_tokens
        while budget and self._slots and (one := self._next_waiting()) is not None:
            # of a prompt whose log-probabilities are wanted every token must be computed
            look_up = self.enable_prefix_caching and one.request.num_prompt_logprobs is None
            hit = self.pools.add(one, one.num_tokens, budget, tokens=one.tokens if look_up else None)
            if hit is None:
                break
            heapq.heappop(self._waiting)
            one.num_computed = hit
            self._run(one)
            num_tokens = min(one.num_new, budget)
            chunks.append(self._chunk(one, num_tokens, ()))
            budget -= num_tokens
        return chunks

    def _next_waiting(self) -> Continuation | None:
        """The first in the queue, if its tokens are all known."""
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
        if not self._waiting or len(self._waiting[0][1].tokens) < self._waiting[0][1].num_tokens:
            return None
        return self._waiting[0][1]

    def _make_room(self, one: Continuation, num_tokens: int) -> Sequence[tuple[int, Copy]] | None:
        """Room for its next tokens, if need be by preemption; None if it was preempted itself."""
        while (copies := self.pools.make_room(one, one.num_computed + num_tokens)) is None:
            newest = self._running[-1]
            self._preempt(newest)
            if newest is one:
                return None
        return copies

    def _chunk(self, one: Continuation, num_tokens: int, copies: Sequence[tuple[int, Copy]]) -> Chunk:
        start = one.num_computed
        one.num_computed += num_tokens
        samples = one.num_computed == one.num_tokens
        generated = one.num_tokens - one.num_prompt
        if self.enable_prefix_caching:
            self._commit(one, start)
        followers = []
        if samples:
            followers = [child for child in one.followers if not child.finished and self.fork(one, child)]
            one.followers = []
            for drawn in (one, *followers):
                if drawn.draws:
                    drawn.num_tokens += 1
                else:
                    drawn.reported = True
        return Chunk(one, start, num_tokens, samples, generated, copies, followers)

    def _commit(self, one: Continuation, start: int) -> None:
        """Makes the pages that this step fills known to others: those who share them come later, or read behind it."""
        size = self.pools.page_size
        known = min(one.num_computed, len(one.tokens))
        if known // size > max(0, start - 1) // size:  # the last token of an earlier step may have been unknown then
            self.pools.commit(one, one.tokens[:known])

    def _run(self, one: Continuation) -> None:
        one.slot, one.is_new = self._slots.pop(), True
        bisect.insort(self._running, one, key=lambda other: other.order)

    def _release(self, one: Continuation) -> None:
        self.pools.free(one)
        assert one.slot is not None
        self._slots.append(one.slot)
        one.slot = None
        self._running.remove(one)

    def _preempt(self, one: Continuation) -> None:
        self.num_preemptions += 1
        self._release(one)
        one.num_computed = 0
        if one.num_new:  # else only results are missing
            self.add(one)
