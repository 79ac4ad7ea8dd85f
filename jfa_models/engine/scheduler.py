"""Decides what the next step computes: continuous batching over pages, as plain Python on integers.

A step computes new tokens of many continuations: one token of each that decodes, and chunks of prompts while the token
budget lasts. Decoding continuations go first, so a long prompt never delays them; then partly computed prompts; then
waiting ones, strictly in the order of priority and arrival. A prompt is admitted when there are pages for all of it.
When a decoding continuation needs a page and none is free, the newest ones are preempted: they free their pages and
wait again, and all their tokens that are not in the prefix cache are recomputed later. The oldest one is never
preempted, so every request finishes.

Source: Orca, https://www.usenix.org/conference/osdi22/presentation/yu, section 4 (iteration-level scheduling);
arXiv:2309.06180, section 4.5 (preemption by recomputation); arXiv:2308.16369 (chunked prefill).
"""

import bisect
import heapq
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jfa.pages import Copy
from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.engine.pools import Pools
from jfa_models.engine.request import Continuation

_NO_DRAFTS: Mapping[Continuation, DraftTree] = MappingProxyType({})
_NO_TREE = DraftTree()


class Chunk(NamedTuple):
    """Tokens of one continuation in a step.

    start: tokens computed before. samples: the chunk ends with the continuation's last token, so the next one is
    sampled, also for each of the followers, which are forked here. generated: tokens sampled before that one. copies:
    page copies, each with the index of its pool. drafts: tokens that may follow, computed too; if they are those that
    are sampled, one step gives several.
    """

    of: Continuation
    start: int
    num_tokens: int
    samples: bool
    generated: int
    copies: Sequence[tuple[int, Copy]]
    followers: Sequence[Continuation] = ()
    drafts: DraftTree = _NO_TREE


class Scheduler:
    """Chooses the chunks of each step, and assigns pages and slots to running continuations.

    Attributes:
      num_preemptions: how often a continuation was preempted.
      forked: the slot of each child that was forked since the last step, apart from a chunk's followers, and that of
        its parent. If one starts from a snapshot of states, that is the parent.
      saved: the slot of each snapshot that the step takes, and that of the continuation whose states it copies.
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
                f"max_num_batched_tokens must be at least max_num_seqs, one token per decoding sequence, got "
                f"{max_num_batched_tokens} and {max_num_seqs}"
            )
        self.pools = pools
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self.forked: dict[int, int] = {}
        self.saved: dict[int, int] = {}
        self._slots = list(reversed(range(max_num_seqs)))  # a stack of the free ones
        self._running: list[Continuation] = []  # sorted by order
        self._waiting: list[tuple[tuple[int, int, int], Continuation]] = []  # a heap

    @property
    def running(self) -> Sequence[Continuation]:
        """Continuations with pages and a slot."""
        return self._running

    @property
    def num_running(self) -> int:
        """Continuations with pages and a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Continuations that wait for pages."""
        return sum(not one.finished for _, one in self._waiting)

    def add(self, one: Continuation) -> None:
        """Adds a continuation to the waiting queue."""
        heapq.heappush(self._waiting, (one.order, one))

    def finish(self, one: Continuation) -> None:
        """Ends a continuation in any state and frees what it holds."""
        one.finished = True
        if one.slot is not None:
            self._release(one)

    def fork(self, parent: Continuation, child: Continuation) -> None:
        """Starts a child with the parent's computed tokens, on the same pages; without pages or a slot it waits."""
        if self._fork(parent, child) and parent.slot is not None and child.slot is not None:
            self.forked[child.slot] = parent.slot

    def _fork(self, parent: Continuation, child: Continuation) -> bool:
        if parent.slot is None or not self._slots:
            self.add(child)
            return False
        self.pools.fork(parent, child)
        child.num_computed, child.num_committed = parent.num_computed, parent.num_committed
        self._run(child)
        child.num_drafted = parent.num_drafted
        return True

    def choose(self, beam: Continuation, token: int) -> None:
        """Appends the next token of a beam, which the host chose."""
        beam.tokens.append(token)
        beam.num_tokens += 1
        beam.reported = False
        if beam.slot is None and not beam.finished:
            self.add(beam)  # it was preempted before the choice

    def make_way(self) -> bool:
        """Preempts a beam whose successors are known, so that a waiting one can run when nothing else can."""
        if not self._running or not self.num_waiting:
            return False
        self._preempt(self._running[-1])
        return True

    @property
    def next_tokens(self) -> list[Continuation]:
        """The running continuations, if the next step computes just one token of each; otherwise none."""
        waits = self._slots and self._next_waiting() is not None
        ready = [one for one in self._running if one.num_new]
        return [] if waits or any(one.num_new > 1 or one.followers for one in ready) else ready

    def reserve(self, one: Continuation, num_drafted: int) -> Sequence[tuple[int, Copy]] | None:
        """Pages for the next token of a running continuation and drafts behind it, as schedule would allocate them.

        Returns the copies to make, or None if there are too few pages.
        """
        # No continuation is preempted for drafts: each may need a page for its next token, and one for a copy. Drafts
        # in the page of the next token take nothing from the others.
        needs_more = (one.num_computed + num_drafted) // self.pools.page_size > one.num_computed // self.pools.page_size
        spare = 2 * len(self._running) if needs_more else 0
        return self.pools.make_room(one, one.num_computed + 1 + num_drafted, spare=spare)

    def keep(self, one: Continuation, num_accepted: int) -> None:
        """Counts the accepted drafts of its last chunk as computed tokens: what was computed behind them is not."""
        one.num_tokens += num_accepted
        one.num_computed += num_accepted

    def schedule(self, drafts: Mapping[Continuation, DraftTree] = _NO_DRAFTS) -> list[Chunk]:
        """The chunks of the next step; empty if nothing can run before results are known.

        drafts: of next_tokens, whose tokens must all be known. They are left out where there are no pages for
          them, and once the step preempted a continuation.
        """
        chunks: list[Chunk] = []
        budget, before = self.max_num_batched_tokens, self.num_preemptions
        if self.pools.snapshots is not None:
            self.pools.snapshots.begin_step()
        for one in self._running:
            self.pools.slide(one, one.num_computed)
        for prompts in (False, True):
            for one in self._running.copy():
                num_tokens = self._next_tokens(one, budget)
                if one.slot is None or not num_tokens or (one.num_new > 1) != prompts:
                    continue
                # once one is preempted, the rows left may be too few for a step of so many drafted tokens
                extra = drafts.get(one, _NO_TREE) if self.num_preemptions == before else _NO_TREE
                copies = self.reserve(one, len(extra)) if extra else None
                if copies is None:
                    extra, copies = _NO_TREE, self._make_room(one, num_tokens, chunks)
                if copies is not None:
                    chunks.append(self._chunk(one, num_tokens, copies, extra))
                    budget -= num_tokens
        if any(chunk.drafts for chunk in chunks):
            return chunks  # a step that verifies has no prompts: every token of it is sampled after
        while budget and self._slots and (one := self._next_waiting()) is not None:
            # prompt log-probabilities need every token of the prompt to be computed
            look_up = self.enable_prefix_caching and one.request.num_prompt_logprobs is None
            tokens = one.tokens if look_up else None
            started = self.pools.add(one, one.num_tokens, budget, tokens=tokens, salt=one.request.salt)
            if started is None:
                break
            heapq.heappop(self._waiting)
            one.num_computed = one.num_committed = started.known
            self._run(one)
            if started.snapshot is not None:
                assert one.slot is not None
                self.forked[one.slot] = started.snapshot
            num_tokens = self._next_tokens(one, budget)
            chunks.append(self._chunk(one, num_tokens, ()))
            budget -= num_tokens
        return chunks

    def _next_waiting(self) -> Continuation | None:
        """The first continuation in the queue, if all its tokens are known."""
        while self._waiting and self._waiting[0][1].finished:
            heapq.heappop(self._waiting)
        if not self._waiting or len(self._waiting[0][1].tokens) < self._waiting[0][1].num_tokens:
            return None
        return self._waiting[0][1]

    def _next_tokens(self, one: Continuation, budget: int) -> int:
        """How many tokens its next chunk has, which ends where a snapshot of its states is taken."""
        num_tokens = min(one.num_new, budget)
        if num_tokens and self.pools.snapshots is not None:
            start = one.num_computed
            return self.pools.snapshots.end_of_chunk(one, start, start + num_tokens) - start
        return num_tokens

    def _make_room(
        self, one: Continuation, num_tokens: int, chunks: Sequence[Chunk]
    ) -> Sequence[tuple[int, Copy]] | None:
        """Allocates pages for its next tokens, preempting if necessary.

        None: it was preempted itself, or must wait, since all newer ones are in the chunks of this step.
        """
        while (copies := self.pools.make_room(one, one.num_computed + num_tokens)) is None:
            in_step = {each for chunk in chunks for each in (chunk.of, *chunk.followers)}
            newest = next(other for other in reversed(self._running) if other is one or other not in in_step)
            if newest is not one or newest is self._running[-1]:
                self._preempt(newest)
            if newest is one:
                return None
        return copies

    def _chunk(
        self,
        one: Continuation,
        num_tokens: int,
        copies: Sequence[tuple[int, Copy]],
        drafts: DraftTree = _NO_TREE,
    ) -> Chunk:
        start = one.num_computed
        one.num_computed += num_tokens
        samples = one.num_computed == one.num_tokens
        generated = one.num_tokens - one.num_prompt
        if self.enable_prefix_caching:
            self._commit(one)
        if self.pools.snapshots is not None:
            snapshot = self.pools.snapshots.take(one, one.num_computed)
            if snapshot is not None:
                assert one.slot is not None
                self.saved[snapshot] = one.slot
        followers = []
        if samples:
            followers = [child for child in one.followers if not child.finished and self._fork(one, child)]
            one.followers = []
            for each in (one, *followers):
                if each.draws:
                    each.num_tokens += 1
                else:
                    each.reported = True
        return Chunk(one, start, num_tokens, samples, generated, copies, followers, drafts)

    def _commit(self, one: Continuation) -> None:
        """Adds the pages that this step fills to the prefix cache: others read them only after they are written."""
        known = min(one.num_computed, len(one.tokens))
        if known // self.pools.page_size > one.num_committed // self.pools.page_size:
            self.pools.commit(one, one.tokens[:known])
            one.num_committed = known

    def _run(self, one: Continuation) -> None:
        one.slot, one.is_new, one.num_drafted = self._slots.pop(), True, 0
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
        if one.num_new:  # otherwise it waits only for results
            self.add(one)
