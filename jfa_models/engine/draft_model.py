"""Drafts by a second, smaller model: its keys and values lie in pages of the same numbers as the model's own."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax
import numpy as np

import jfa
from jfa.types import NULL_PAGE
from jfa_models.decoding.draft_tree import DraftTree
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.decoding.sampling import NO_TOKEN, SamplingRows
from jfa_models.decoding.speculation import SpeculativeConfig
from jfa_models.decoding.steps import Batch, Proposed
from jfa_models.engine.drafts import Acceptance
from jfa_models.engine.launch import SMALLEST_STEP, Launcher, bucket, buckets, host_batch, slot_of
from jfa_models.engine.request import NO_SEED, Continuation
from jfa_models.engine.speculator import NgramProposer, permitted
from jfa_models.model.attention import paged_cache
from jfa_models.model.lora import NO_ADAPTER, Adapters
from jfa_models.model.mixers import state_cache
from jfa_models.text.guided import Guide

MOST_GUESSED = 8  # tokens that prompt lookup drafts for the draft model


class DraftModel:
    """Drafts with a decoder of its own.

    Its cache has the same page numbers as the engine's, so that a continuation's page table serves both, and states in
    the same slots. Those of a prompt are computed when the first draft is wanted, even if the engine had them in its
    prefix cache. States stay those after a row's own tokens while it drafts, so that its next draft begins with all
    tokens that came since: the accepted ones are computed once more.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        model: LanguageModel,
        launcher: Launcher,
        reserve: Callable[[Continuation, int], bool],
        *,
        num_pages: Sequence[int],
        kv_dtype: str | None,
    ):
        """model: the one that drafts. reserve: gives a continuation pages for so many drafted tokens, if there are."""
        self._model = model
        self._confidence = np.float32(config.confidence_threshold)
        self._length = config.length
        # the layers of the model itself have its adapters
        self._adapters = launcher.model.adapters if config.num_layers is not None else None
        self._guesses = NgramProposer(config) if config.method == "staged" else None
        self._launcher = launcher
        self._reserve = reserve
        self._acceptance = Acceptance()
        # computed tokens of the last draft
        self._ahead: WeakKeyDictionary[Continuation, list[int]] = WeakKeyDictionary()
        windows = [pool.window for pool in launcher.scheduler.pools.pools]
        self._pool_of = pools_of(model, windows)
        options: dict[str, Any] = dict(page_size=launcher.scheduler.pools.page_size, kv_dtype=kv_dtype)
        cache = draft_cache(model, windows, num_pages, rows=launcher.scheduler.max_num_seqs, **options)
        self._cache: jfa.PagedKVCache = self._without_tables(model.partition.everywhere(cache))
        # tokens that a row lacks at most when it drafts: after a whole draft was accepted, its last token and the next
        # one, or with states all of these
        self._few = 2 if cache.states is None else 1 + self._length
        launcher.copies_too = self._copy

    def gains(self, one: Continuation) -> Sequence[float]:
        """See Proposer."""
        if self._guesses is None:
            self._acceptance.forget(0)
            return list(itertools.accumulate([self._acceptance.odds(0)] * self._length, operator.mul))
        for place in range(self._length):
            self._acceptance.forget(place)
        # tokens of a tree come in the order of their odds
        return list(itertools.accumulate(map(self._acceptance.odds, range(self._length)), min))

    def judge(self, one: Continuation, draft: DraftTree, path: Sequence[int], sampled: Sequence[int]) -> None:
        """See Proposer."""
        if self._guesses is None:
            self._acceptance.add(0, len(path), missed=len(path) < len(draft))
        else:
            for place in range(len(draft)):
                self._acceptance.add(place, int(place in path), missed=place not in path)
        if self._cache.states is not None:
            return
        same = zip((draft.tokens[node] for node in path), self._ahead[one], strict=False)
        one.num_drafted += sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same))

    def draft(self, lengths: Mapping[Continuation, int]) -> Mapping[Continuation, DraftTree]:
        """See Proposer. Waits for the draft model."""
        rows = [one for one, length in lengths.items() if self._reserve(one, length)]
        if not rows:
            return {}
        self._catch_up(rows)
        b = bucket(len(rows), 1, self._launcher.scheduler.max_num_seqs, factor=4)
        most, generated = np.zeros(b, np.int32), np.zeros(b, np.int32)
        most[: len(rows)] = [lengths[one] for one in rows]
        generated[: len(rows)] = [one.num_tokens - one.num_prompt for one in rows]
        sampling = self._sampling([(one.params, one.seed) for one in rows], b)
        guesses = [self._guessed(one, lengths[one]) for one in rows] if self._guesses is not None else None
        found, count = self._propose(rows, b, sampling, generated, most, guesses)
        drafts = {}
        for row, (one, n) in enumerate(zip(rows, count.tolist(), strict=False)):
            if n == 0:  # too unsure from the first token on: there is nothing to verify
                self._acceptance.add(0, 0, missed=True)
            one.num_drafted = one.num_tokens
            tokens = found.token[:n, row].tolist()
            self._ahead[one] = tokens[: n - (n == lengths[one])]  # the last token of a whole draft is not computed
            of_row = jax.tree.map(lambda x, row=row, n=n: x[:n, row], found)
            drafts[one] = permitted(one, tokens) if guesses is None else tree_of(of_row, lengths[one], one.guide)
        return drafts

    def _guessed(self, one: Continuation, length: int) -> list[int]:
        assert self._guesses is not None
        return self._guesses.lookup(one).tokens[: min(length, MOST_GUESSED)]

    def warm_up(self, params: Sequence[SamplingParams]) -> None:
        """Compiles all that drafts for requests with these params need."""
        scheduler = self._launcher.scheduler
        variants = [None] if self._adapters is None else self._adapters.variants()
        for n, adapters in itertools.product(buckets(SMALLEST_STEP, scheduler.max_num_batched_tokens), variants):
            self._advance([], [], n, adapters)
        for b, adapters in itertools.product(buckets(1, scheduler.max_num_seqs, factor=4), variants):
            for is_greedy in {one.is_greedy for one in params}:
                like, nothing = SamplingParams(temperature=0.0 if is_greedy else 1.0), np.zeros(b, np.int32)
                sampling = self._sampling([(like, NO_SEED)], b)
                for guesses in [None] if self._guesses is None else [[], [[0]]]:
                    self._propose([], b, sampling, nothing, nothing, guesses, adapters)

    def _catch_up(self, rows: Sequence[Continuation]) -> None:
        """Computes the tokens of rows that lack more than a few, up to the last one."""
        budget = self._launcher.scheduler.max_num_batched_tokens
        while behind := [one for one in rows if one.num_tokens - one.num_drafted > self._few]:
            ends, room = [], budget
            for one in behind:
                ends.append(min(one.num_tokens - 1, one.num_drafted + room))
                room -= ends[-1] - one.num_drafted
            self._advance(behind, ends, bucket(budget - room, SMALLEST_STEP, budget))
            for one, end in zip(behind, ends, strict=True):
                one.num_drafted = end

    def _advance(
        self, rows: Sequence[Continuation], ends: Sequence[int], n: int, adapters: Adapters | None = None
    ) -> None:
        """Computes the tokens of each row up to its end. adapters: see _batch."""
        b = self._launcher.scheduler.max_num_seqs
        batch, cache, adapters = self._batch(rows, ends, b, n, adapters=adapters)
        cache, *_ = self._model.steps.advance(
            self._model.params, cache, np.zeros(1, np.int32), batch, adapters=adapters
        )
        self._cache = self._without_tables(cache)

    def _propose(
        self,
        rows: Sequence[Continuation],
        b: int,
        sampling: SamplingRows,
        generated: np.ndarray,
        most: np.ndarray,
        guesses: Sequence[Sequence[int]] | None,
        adapters: Adapters | None = None,
    ) -> tuple[Proposed, np.ndarray]:
        """guesses: what may follow each row; None: only the tokens drawn are wanted, and not their odds.

        adapters: see _batch.
        """
        guess, n = None, self._few * b
        if guesses is not None:
            guess = np.full((b, MOST_GUESSED * any(guesses)), NO_TOKEN, np.int32)
            for row, tokens in enumerate(guesses):
                guess[row, : len(tokens)] = tokens
            n += guess.size
        batch, cache, adapters = self._batch(rows, [one.num_tokens for one in rows], b, n, guesses, adapters)
        cache, found, count = self._model.steps.propose(
            self._model.params, cache, batch, sampling, generated, most, self._confidence, guess, adapters=adapters
        )
        self._cache = self._without_tables(cache)
        return jax.device_get((found, count))

    def _batch(
        self,
        rows: Sequence[Continuation],
        ends: Sequence[int],
        b: int,
        n: int,
        guesses: Sequence[Sequence[int]] | None = None,
        adapters: Adapters | None = None,
    ) -> tuple[Batch, jfa.PagedKVCache, Adapters | None]:
        """The tokens of each row that the cache lacks, up to its end, in a step of b rows and n tokens.

        guesses: tokens behind the end of each row; then the logits after each token of the step are wanted.
        adapters: of a step without rows, which is only compiled; that of rows has those of their requests.
        """
        tokens = [one.tokens[one.num_drafted : end] for one, end in zip(rows, ends, strict=True)]
        if guesses is not None:
            tokens = [[*known, *more] for known, more in zip(tokens, guesses, strict=False)]
        total = sum(map(len, tokens))
        start, kv_len = np.full(b + 1, total, np.int32), np.zeros(b, np.int32)
        slot = np.full(b, self._launcher.scheduler.max_num_seqs, np.int32)
        tables = np.full((len(self._pool_of), b, self._launcher.pages_per_seq), NULL_PAGE, np.int32)
        start[: len(rows)] = np.cumsum([0, *map(len, tokens)])[:-1]
        for row, one in enumerate(rows):
            kv_len[row], tables[:, row] = one.num_drafted, self._launcher.pages_of(one)[self._pool_of]
            slot[row] = slot_of(one)
        padded = np.zeros(n, np.int32)
        padded[:total] = [token for part in tokens for token in part]
        of_rows = None if adapters is None else np.full(b, NO_ADAPTER, np.int32)
        if rows and self._adapters is not None:
            of_rows, adapters = self._adapters.for_rows([one.request.adapter for one in rows], b)
        last = np.maximum(start[1:] - 1, 0) if guesses is None else None
        batch = host_batch(padded, start, slot, last, None, None, of_rows)
        return batch, dataclasses.replace(self._cache, page_tables=tuple(tables), kv_len=kv_len), adapters

    def _without_tables(self, cache: jfa.PagedKVCache) -> jfa.PagedKVCache:
        """Between steps the tables are on the host; these have a shape that does not depend on the step."""
        tables = tuple(np.zeros((1, 1), np.int32) for _ in self._pool_of)
        return dataclasses.replace(cache, page_tables=tables, kv_len=np.zeros(1, np.int32))

    def _sampling(self, of_rows: Sequence[tuple[SamplingParams, np.random.SeedSequence]], b: int) -> SamplingRows:
        """Without what changes the logits: it would need counts of drafted tokens."""
        rows = self._launcher.sampling_rows(of_rows, b)
        none: dict[str, Any] = dict(min_tokens=None, num_logprobs=None, stop_ids=np.zeros((b, 1), np.int32))
        return dataclasses.replace(rows, **none)

    def _copy(self, pool: int, source: np.ndarray, destination: np.ndarray) -> None:
        for table, number in enumerate(self._pool_of):
            if number == pool:
                self._cache = self._model.steps.copy_pages(self._cache, source, destination, table=table)


def tree_of(found: Proposed, length: int, guide: Guide | None) -> DraftTree:
    """The likeliest tokens of a row's draft [k] and of the others that the draft model had in mind at each place.

    Each token comes behind the one before it. Behind one that the guide forbids there are none.
    """
    assert found.odds is not None and found.others is not None and found.other_odds is not None
    chosen = found.token.tolist()
    num_fitting = len(chosen) if guide is None else guide.permitted(chosen)
    # rounding may give more than 1; a token must not be likelier than the one before it
    odds, other_odds = np.minimum(found.odds, 1.0).tolist(), np.minimum(found.other_odds, 1.0).tolist()
    before = [1.0, *itertools.accumulate(odds, operator.mul)]
    nodes = []
    for place, token in enumerate(chosen[: num_fitting + 1]):
        if place < num_fitting:
            nodes.append((-before[place + 1], place, False, token))
        for other, own in zip(found.others[place].tolist(), other_odds[place], strict=True):
            if other != token and (guide is None or guide.permitted([*chosen[:place], other]) > place):
                nodes.append((-before[place] * own, place, True, other))
    tree, ends = DraftTree(), [-1]  # where the chosen tokens up to each place are
    for _, place, is_other, token in sorted(nodes)[:length]:
        node = tree.append(token, ends[place])
        if not is_other:
            ends.append(node)
    return tree


def pools_of(model: LanguageModel, windows: Sequence[int | None]) -> list[int]:
    """The pool whose pages each pattern of a draft model reads: that of the same window, or else of the longest one."""
    longest = max(range(len(windows)), key=lambda i: windows[i] or float("inf"))
    return [windows.index(x) if x in windows else longest for x in model.config.patterns or (None,)]


def draft_cache(
    model: LanguageModel,
    windows: Sequence[int | None],
    num_pages: Sequence[int],
    *,
    rows: int,
    page_size: int,
    kv_dtype: str | None,
) -> jfa.PagedKVCache:
    """A draft model's cache, with as many pages as the pools of these windows. rows: that have states."""
    cache = paged_cache(
        model.config,
        num_pages=[num_pages[i] for i in pools_of(model, windows)],
        page_size=page_size,
        batch=1,
        pages_per_seq=1,
        dtype=model.dtype,
        kv_dtype=kv_dtype if model.config.attention_layers else None,
        sharding=model.partition.of_kv,
    )
    return dataclasses.replace(cache, states=state_cache(model.config, batch=rows, dtype=model.dtype))


def draft_model_of(config: SpeculativeConfig, model: LanguageModel) -> LanguageModel:
    """The model that drafts for another.

    Raises:
      ValueError: it has another vocabulary, whose first difference the message names; or it cannot be loaded.
    """
    if config.num_layers is not None:
        if config.num_layers >= model.config.num_layers:
            raise ValueError(
                f"num_layers must be less than {model.config.num_layers}, the layers of the model, "
                f"got {config.num_layers}"
            )
        return model.with_layers(config.num_layers)
    draft = config.model
    if not isinstance(draft, LanguageModel):
        streaming = model.config.streaming
        draft = from_pretrained(
            draft,
            dtype=model.dtype,
            attention_window=None if streaming is None else streaming.window,
            attention_sinks=None if streaming is None else streaming.num_sinks,
        )
    if (difference := _vocabulary_difference(model, draft)) is not None:
        raise ValueError(f"the draft model must have the vocabulary of the model, but {difference}")
    return draft


def _vocabulary_difference(model: LanguageModel, draft: LanguageModel) -> str | None:
    ours, theirs = model.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        sizes = model.config.vocab_size, draft.config.vocab_size
        return None if sizes[0] == sizes[1] else f"it has {sizes[1]} tokens, and the model {sizes[0]}"
    for i in range(max(ours.core.get_vocab_size(), theirs.core.get_vocab_size())):
        if (one := ours.core.id_to_token(i)) != (other := theirs.core.id_to_token(i)):
            return f"token {i} is {other!r} in it, and {one!r} in the model"
    return None
