"""Turns the scheduler's decisions into arrays and runs the compiled steps on them: the device side of an engine."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa.pages import Copy
from jfa.types import NULL_PAGE
from jfa_models.decoding.completion import allowed_tokens, everything_allowed
from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.sampling import Sampled, SamplingRows, dense_bias, seen, slot_rows
from jfa_models.decoding.steps import Batch, Pending, Slots
from jfa_models.engine.request import GREEDY, NO_SEED, Continuation, Request
from jfa_models.engine.scheduler import Chunk, Scheduler
from jfa_models.model.lora import NO_ADAPTER, Adapters

SMALLEST_STEP = 32  # minimum tokens of a step with prompts; its sizes double from here on
SMALLEST_COPY = 8  # minimum number of pages per copy
_NO_LENGTHS = np.zeros(1, np.int32)


class Launched(NamedTuple):
    """A step on the device, and what its results mean."""

    chunks: Sequence[tuple[int, Continuation, DraftTree]]  # those that sample: their first row of sampled, drafts
    sampled: Sampled | None
    prompts: Sequence[tuple[Request, int, int, int]]  # first position in the prompt, first token in the step, count
    prompt_logprobs: Sampled | None
    shape: tuple[int, int] | None  # rows and tokens, of a step without prompts

    def read(self) -> tuple[Sampled | None, Sampled | None]:
        """sampled and prompt_logprobs in host memory; waits for the step."""
        return jax.device_get((self.sampled, self.prompt_logprobs))


class Launcher:
    """The cache, a slot for each running continuation, and the page tables of the slots.

    A step's arrays are on the host until the step transfers them to the device, all at once.
    """

    def __init__(
        self,
        model: LanguageModel,
        scheduler: Scheduler,
        cache: jfa.PagedKVCache,
        *,
        pages_per_seq: int,
        largest_tree: int | None,
    ):
        """largest_tree: how many tokens the drafts of a row have at most; None: drafts are sequences."""
        self.model = model
        self.largest_tree = largest_tree
        self.scheduler = scheduler
        slots, pools = scheduler.max_num_seqs, scheduler.pools.pools
        self.pages_per_seq = pages_per_seq
        self._no_slot = slots if cache.states is None else cache.states.num_rows  # for padding: out of range
        self._no_tables = tuple(np.zeros((1, 1), np.int32) for _ in pools)
        cache = model.partition.everywhere(cache)
        self.cache = dataclasses.replace(cache, page_tables=self._no_tables, kv_len=_NO_LENGTHS)
        self._slots = model.partition.everywhere(Slots(last_token=jnp.zeros(slots, jnp.int32)))
        # for each pool: the page table of each slot, and how many entries are set
        self._tables = np.full((len(pools), slots, pages_per_seq), NULL_PAGE, np.int32)
        self._num_pages = np.zeros((len(pools), slots), np.int64)
        self._adjusted: set[int] = set()  # slots whose request adjusts its logits
        self.copies_too: Callable[[int, np.ndarray, np.ndarray], None] | None = None  # copies pages of a draft model
        # the rows of the last steps, whose sizes alternate with drafts
        self._rows: collections.deque[tuple[object, SamplingRows]] = collections.deque(maxlen=4)

    def shapes(self, num_rows: int) -> list[tuple[int, int]]:
        """The shapes, rows and tokens, of a step for one token of this many rows: without drafts, then with."""
        plain = bucket(num_rows, 1, self.scheduler.max_num_seqs)
        return [(plain, plain), *self.drafted_shapes(num_rows)]

    def drafted_shapes(self, num_rows: int) -> list[tuple[int, int]]:
        """The shapes, rows and tokens, of the steps with drafts for this many rows."""
        most, most_tokens = self.scheduler.max_num_seqs, self.scheduler.max_num_batched_tokens
        rows = bucket(num_rows, 1, most, factor=4)
        return [(rows, tokens) for tokens in buckets(2 * rows, max(2 * rows, most_tokens))]

    def warm_up(self, params: Sequence[SamplingParams], *, longest_draft: int = 0, guided: bool = False) -> None:
        """Compiles all steps that any mixture of requests with these params needs.

        longest_draft: tokens of a row's drafts.
        """
        most, most_tokens = self.scheduler.max_num_seqs, self.scheduler.max_num_batched_tokens
        wants_prompt = {False} | {one.prompt_logprobs is not None for one in params}
        mixtures = list(
            itertools.product(
                {one.is_greedy for one in params},
                {one.logprobs is None for one in params},
                {one.adjusts_logits for one in params},
                {one.stop_token_ids for one in params},  # the number of ids decides a shape
                {False, guided},
            )
        )

        def compile_step(
            b: int, n: int | None, *, draws: bool, verifies: bool = False, with_prompt: bool = False
        ) -> None:
            batch = host_batch(
                np.zeros(n or b, np.int32),
                None if n is None else np.zeros(b + 1, np.int32),
                np.full(b, self._no_slot, np.int32),
                None if verifies else np.full(b, n or b, np.int32),
                self._no_mask(n or b) if verifies else None,
                np.zeros(n, np.int32) if with_prompt and n else None,
                None,
            )
            tables, nothing = np.zeros((len(self._no_tables), b, self.pages_per_seq), np.int32), np.zeros(b, np.int32)
            logits = pending = None
            for adapters in self.model.adapters.variants():
                slots = None if adapters is None else np.full(b, NO_ADAPTER, np.int32)
                given = dataclasses.replace(batch, adapter=slots)
                logits, _, pending = self._advance(given, tables, nothing, adapters)
            assert logits is not None
            for greedy, no_logprobs, adjusting, stops, masked in mixtures if draws else ():
                like = SamplingParams(
                    temperature=0.0 if greedy else 1.0,
                    logprobs=None if no_logprobs else 0,
                    min_tokens=int(adjusting),
                    stop_token_ids=stops,
                )
                rows = self.sampling_rows([(like, NO_SEED)], b)
                allowed = everything_allowed(len(logits), self.model.config.vocab_size) if masked else None
                sampled = self._draw(logits, rows, batch, nothing.astype(bool), nothing, allowed)
                self._keep(batch, tables, nothing, sampled, pending)

        for b in buckets(1, most):
            compile_step(b, None, draws=True)
        for n, with_prompt in itertools.product(buckets(SMALLEST_STEP, most_tokens), wants_prompt):
            compile_step(most, n, draws=n == SMALLEST_STEP, with_prompt=with_prompt)
        drafted = {shape for b in buckets(1, most) for shape in self.drafted_shapes(b)} if longest_draft else ()
        for b, n in sorted(drafted):
            if n < 2 * b * (1 + longest_draft):
                compile_step(b, n, draws=True, verifies=True)
        for n in buckets(SMALLEST_COPY, most):
            for pool in range(len(self._no_tables)):
                self.copy([(pool, Copy(NULL_PAGE, NULL_PAGE))] * n)
        for n in buckets(1, most, factor=4):
            self.copy_states([(self._no_slot, self._no_slot)] * n)
        if any(one.adjusts_logits for one in params):
            self._adjust(most, GREEDY, (), ())

    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """Starts a step on the device and does not wait for it."""
        most, most_tokens = self.scheduler.max_num_seqs, self.scheduler.max_num_batched_tokens
        self.copy([copy for chunk in chunks for copy in chunk.copies])
        self.copy_states([(source, slot) for slot, source in self.scheduler.forked.items()])
        self.scheduler.forked.clear()
        total = sum(chunk.num_tokens + len(chunk.drafts) for chunk in chunks)
        rows = [(chunk, one) for chunk in chunks for one in (chunk.of, *chunk.followers)]
        verifies = any(chunk.drafts for chunk in chunks)
        one_each = total == len(chunks) == len(rows) and not any(map(_wants_prompt, chunks))
        if verifies:
            b, n = next(shape for shape in self.drafted_shapes(len(rows)) if shape[1] >= total)
        elif one_each:
            b = n = bucket(len(rows), 1, most)
        else:
            b, n = most, bucket(total, SMALLEST_STEP, most_tokens)
        tokens, next_tokens = np.zeros(n, np.int32), np.zeros(n, np.int32)
        tables = np.full((len(self._no_tables), b, self.pages_per_seq), NULL_PAGE, np.int32)
        kv_len, generated = np.zeros(b, np.int32), np.zeros(b, np.int32)
        start, last = np.full(b + 1, total, np.int32), np.full(b, n, np.int32)
        slot = np.full(b, self._no_slot, np.int32)
        tree_mask = self._no_mask(n) if verifies else None
        samples = np.zeros(b, bool)
        end, prompts = 0, []
        for row, (chunk, one) in enumerate(rows):
            assert one.slot is not None
            if one.is_new:
                self._enter(one)
            slot[row], start[row] = one.slot, end
            if one is chunk.of:
                known = [*(one.tokens[chunk.start : chunk.start + chunk.num_tokens] or [-1]), *chunk.drafts.tokens]
                tokens[end : end + len(known)] = known
                if tree_mask is not None:
                    tree_mask[end : end + len(known)] = chunk.drafts.seen(tree_mask.shape[1])
                if _wants_prompt(chunk):
                    follow = one.tokens[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, one.num_prompt)]
                    next_tokens[end : end + len(follow)] = follow
                    prompts.append((one.request, chunk.start + 1, end, len(follow)))
                kv_len[row], tables[:, row] = chunk.start, self.pages_of(one)
                end += len(known)
            if chunk.samples:
                last[row], generated[row], samples[row] = end - 1, chunk.generated, one.draws
        adapter, adapters = self.model.adapters.for_rows([one.request.adapter for _, one in rows], b)
        batch = host_batch(
            tokens,
            None if one_each else start,
            slot,
            None if verifies else last,
            tree_mask,
            next_tokens if prompts else None,
            adapter,
        )
        logits, prompt_logprobs, pending = self._advance(batch, tables, kv_len, adapters)
        batch = dataclasses.replace(batch, adapter=None)  # what follows does not depend on it
        sampled = None
        sampling = [
            (int(start[row]) if verifies else row, one, chunk.drafts)
            for row, (chunk, one) in enumerate(rows)
            if chunk.samples
        ]
        if sampling:
            sampling_rows = self.sampling_rows([(one.params, one.seed) for _, one in rows], b)
            # while the device computes the logits
            asked = [(row, one.completion, drafts) for row, one, drafts in sampling]
            allowed = allowed_tokens(asked, len(logits), self.model.config.vocab_size)
            sampled = self._draw(logits, sampling_rows, batch, samples, generated, allowed)
            if pending is not None or any(not chunk.drafts.is_chain for chunk in chunks):
                self._keep(batch, tables, kv_len, sampled, pending)
        self.copy_states([(slot_of(one.of), slot_of(child)) for one in chunks for child in one.followers])
        self.copy_states([(own, snapshot) for snapshot, own in self.scheduler.saved.items()])
        self.scheduler.saved.clear()
        for x in jax.tree.leaves((sampled, prompt_logprobs)):
            x.copy_to_host_async()
        shape = (b, n) if one_each or verifies else None
        return Launched(sampling, sampled, prompts, prompt_logprobs, shape)

    def _advance(
        self, batch: Batch, tables: np.ndarray, kv_len: np.ndarray, adapters: Adapters | None
    ) -> tuple[jax.Array, Sampled | None, Pending | None]:
        cache = dataclasses.replace(self.cache, page_tables=tuple(tables), kv_len=kv_len)
        cache, logits, prompt_logprobs, pending = self.model.steps.advance(
            self.model.params, cache, self._slots.last_token, batch, adapters=adapters
        )
        # between steps the tables are on the host; these have a fixed shape, which does not depend on the step
        self.cache = dataclasses.replace(cache, page_tables=self._no_tables, kv_len=_NO_LENGTHS)
        return logits, prompt_logprobs, pending

    def _no_mask(self, n: int) -> np.ndarray | None:
        return None if self.largest_tree is None else np.zeros((n, 1 + self.largest_tree), bool)

    def _keep(
        self, batch: Batch, tables: np.ndarray, kv_len: np.ndarray, sampled: Sampled, pending: Pending | None
    ) -> None:
        """Moves the accepted tokens of trees to where the next step expects them, or those pending into the states."""
        if batch.tree_mask is None and pending is None:
            return
        cache = dataclasses.replace(self.cache, page_tables=tuple(tables), kv_len=kv_len)
        if pending is None:
            cache = self.model.steps.keep(cache, batch, sampled.token)
        else:
            cache = self.model.steps.enter(self.model.params, cache, pending, batch, sampled.token)
        self.cache = dataclasses.replace(cache, page_tables=self._no_tables, kv_len=_NO_LENGTHS)

    def _draw(self, logits, rows: SamplingRows, batch: Batch, samples, generated, allowed) -> Sampled:
        adjusting = rows.min_tokens is not None
        if adjusting:
            self._make_counts()
        # arrays that a step does not need are left out: they would change its program
        slots = self._slots if adjusting else Slots(last_token=self._slots.last_token)
        if batch.last is None:
            slots, sampled = self.model.steps.verify(slots, logits, rows, batch, samples, generated, allowed)
        else:
            slots, sampled = self.model.steps.draw(slots, logits, rows, batch.slot, samples, generated, allowed)
        self._slots = slots if adjusting else dataclasses.replace(self._slots, last_token=slots.last_token)
        return sampled

    def sampling_rows(self, of_rows: Sequence[tuple[SamplingParams, np.random.SeedSequence]], b: int) -> SamplingRows:
        """The rows of a step of b rows, the last of which are padding."""
        key = (b, tuple(of_rows))
        for known, rows in self._rows:
            if known == key:
                return rows
        params, seeds = zip(*of_rows, *[(GREEDY, NO_SEED)] * (b - len(of_rows)), strict=True)
        vocab_size, eos = self.model.config.vocab_size, self.model.eos_token_ids
        rows = slot_rows(params, seeds, vocab_size=vocab_size, eos_token_ids=eos)
        self._rows.append((key, rows))
        return rows

    def _enter(self, one: Continuation) -> None:
        """Initializes the slot of a new continuation."""
        assert one.slot is not None
        one.is_new = False
        self._num_pages[:, one.slot] = 0
        if one.params.adjusts_logits:
            self._adjust(one.slot, one.params, one.request.prompt_ids, one.tokens[one.num_prompt :])
            self._adjusted.add(one.slot)
        elif one.slot in self._adjusted:  # by its previous continuation
            self._adjust(one.slot, GREEDY, (), ())
            self._adjusted.remove(one.slot)

    def _make_counts(self) -> None:
        if self._slots.output_counts is None:
            shape = (self.scheduler.max_num_seqs, self.model.config.vocab_size)
            slots = Slots(
                last_token=self._slots.last_token,
                prompt_seen=jnp.zeros(shape, bool),
                output_counts=jnp.zeros(shape, jnp.int32),
                logit_bias=jnp.zeros(shape, jnp.float32),
            )
            self._slots = self.model.partition.everywhere(slots)

    def _adjust(self, slot: int, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Sets the values that adjust the logits of a slot."""
        self._make_counts()
        vocab_size = self.model.config.vocab_size
        counts = np.bincount(np.asarray(generated, np.int64), minlength=vocab_size).astype(np.int32)
        self._slots = self.model.steps.adjust(
            self._slots, slot, seen([prompt], vocab_size)[0], counts, dense_bias([params], vocab_size)[0]
        )

    def pages_of(self, one: Continuation) -> np.ndarray:
        """The continuation's row of each page table, updated.

        Since the last step, its last page may have been replaced, pages added, and pages outside of a window freed.
        """
        assert one.slot is not None
        for i, (allocator, window, _) in enumerate(self.scheduler.pools.pools):
            table = self._tables[i, one.slot]
            start = max(0, int(self._num_pages[i, one.slot]) - 1)
            pages = allocator.pages(one, start)
            table[start : start + len(pages)] = pages
            if window is not None:
                table[allocator.gone(one)] = NULL_PAGE
            self._num_pages[i, one.slot] = start + len(pages)
        return self._tables[:, one.slot]

    def copy(self, copies: Sequence[tuple[int, Copy]]) -> None:
        """Copies pages, each within the pool of its index."""
        for i in range(len(self._no_tables)):
            if of_pool := [copy for number, copy in copies if number == i]:
                n = bucket(len(of_pool), SMALLEST_COPY, self.scheduler.max_num_seqs)
                pairs = np.full((2, n), NULL_PAGE, np.int32)
                pairs[:, : len(of_pool)] = np.transpose(of_pool)
                self.cache = self.model.steps.copy_pages(self.cache, *pairs, table=i)
                if self.copies_too is not None:
                    self.copies_too(i, *pairs)

    def copy_states(self, slots: Sequence[tuple[int, int]]) -> None:
        """Copies the states of a model that has some, each from a slot to another one."""
        if slots and self.cache.states is not None:
            n = bucket(len(slots), 1, self.scheduler.max_num_seqs, factor=4)  # states are large, and few at a time
            pairs = np.full((2, n), self._no_slot, np.int32)
            pairs[:, : len(slots)] = np.transpose(slots)
            self.cache = self.model.steps.copy_states(self.cache, *pairs)


def slot_of(one: Continuation) -> int:
    """The slot of a running continuation."""
    assert one.slot is not None
    return one.slot


def host_batch(tokens, query_start, slot, last, tree_mask, next_tokens, adapter) -> Batch:
    """A Batch of host arrays: a step transfers them to the device at once."""
    rows = dict(query_start=query_start, slot=slot, last=last, tree_mask=tree_mask)
    return Batch(tokens=tokens, **rows, next_tokens=next_tokens, adapter=adapter)


def _wants_prompt(chunk: Chunk) -> bool:
    one = chunk.of
    wants = one.request.num_prompt_logprobs is not None and one is one.request.continuations[0]
    return wants and chunk.start + 1 < one.num_prompt


def bucket(n: int, smallest: int, largest: int, *, factor: int = 2) -> int:
    """The smallest of buckets that is at least n."""
    return next(size for size in buckets(smallest, largest, factor=factor) if size >= n)


def buckets(smallest: int, largest: int, *, factor: int = 2) -> Iterator[int]:
    """smallest times the powers of factor, up to largest, which is included."""
    while smallest < largest:
        yield smallest
        smallest *= factor
    yield largest
