"""The engine: requests come and go, and each step computes a token of all that run and chunks of prompts beside.

The host is one step ahead of what it knows: while the device computes a step, the next one is scheduled and launched
with last tokens that are still on the device, and only then the results of the former are read. A continuation that
ends is therefore noticed one step late, its surplus token is dropped, and its place is taken in the step after.
"""

import bisect
import collections
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa.pages import Copy
from jfa.types import NULL_PAGE
from jfa_models.decoding.completion import Completion, logprobs_of
from jfa_models.decoding.language_model import LanguageModel, Prompt
from jfa_models.decoding.outputs import FinishReason, RequestOutput
from jfa_models.decoding.params import MAX_LOGPROBS, BeamSearchParams, SamplingParams
from jfa_models.decoding.sampling import Sampled, SamplingRows, dense_bias, seed_sequence, seen, slot_rows
from jfa_models.decoding.steps import Batch, Slots
from jfa_models.engine.beams import Beam, BeamSearch
from jfa_models.engine.pools import Pools, make_pools, pool_sizes
from jfa_models.engine.request import Continuation, OnOutput, Request
from jfa_models.engine.scheduler import Chunk, Scheduler
from jfa_models.model.attention import paged_cache

SMALLEST_STEP = 32  # tokens of a step with prompts: its shapes are the powers of two from here on
SMALLEST_COPY = 8  # pages that are copied at a time
FREE_MEMORY = 0.85  # of what the device has left, for pages
HOST_CACHE_BYTES = 2**30  # for pages where the device does not say how much memory it has

Params = SamplingParams | BeamSearchParams

GREEDY = SamplingParams(temperature=0.0)
_CANDIDATES = SamplingParams(temperature=0.0, logprobs=MAX_LOGPROBS)  # of a beam
_NO_LENGTHS = np.zeros(1, np.int32)
_NO_SEED = np.random.SeedSequence(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """A snapshot. Tokens and counts are since the engine was made or reset; times are means in seconds.

    Attributes:
      running, waiting: continuations that hold pages, and that will.
      cache_use: share of the pages that continuations hold.
      cache_waste: share of the held places without a token.
      cache_saved: share of the pages that continuations would hold without sharing, which sharing saves.
      prefix_hits: share of the tokens that were looked up and found in the cache; who was preempted looks again.
      preemptions: how often a continuation gave up its pages.
      time_to_first_token: of requests that have one.
      time_per_output_token: behind the first one, of continuations that have ended by themselves.
    """

    running: int
    waiting: int
    cache_use: float
    cache_waste: float
    cache_saved: float
    prefix_hits: float
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    finished_requests: int
    time_to_first_token: float | None
    time_per_output_token: float | None


class _Launched(NamedTuple):
    """A step on the device: what its results will mean."""

    rows: Sequence[tuple[int, Continuation]]  # that sample
    sampled: Sampled | None
    prompts: Sequence[tuple[Request, int, int, int]]  # first place in the prompt, first token in the step, how many
    prompt_logprobs: Sampled | None


class _Abort(NamedTuple):
    """The wish to end a request."""

    request: Request


class Engine:
    """Continuous batching over a paged cache. Any thread may call its methods; a step is one thread's at a time.

    A request's tokens do not depend on what else runs, but for ties that the rounding of another batch size decides.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        kv_dtype: str | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        max_wait_ms: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Makes the pool of pages.

        Args:
          kv_dtype: of the pages: "int8", "fp8" or "int4"; None: the model's dtype.
          num_pages: of page_size tokens each; None: what fits most of the device's free memory, or 1 GiB of the host's,
            and no more than max_num_seqs of max_model_len need.
          max_num_seqs: continuations that run at a time.
          max_num_batched_tokens: of a step; None: 512 on a CPU, 2048 elsewhere.
          max_model_len: tokens of a prompt and its continuation; None: the model's context, or what the pool holds.
          max_wait_ms: how long an idle engine waits for company of a first request (dynamic batching).
          seed: of requests without one.
          clock: seconds, for the metrics and max_wait_ms.

        Raises:
          ValueError: numbers that do not make sense; the message names them.
        """
        config = model.config
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(max_num_seqs, 512 if jax.default_backend() == "cpu" else 2048)
        if max_model_len is not None and not 1 <= max_model_len <= config.context_length:
            raise ValueError(
                f"max_model_len must be from 1 to {config.context_length}, the model's context, got {max_model_len}"
            )
        if max_wait_ms < 0:
            raise ValueError(f"max_wait_ms must be at least 0, got {max_wait_ms}")
        longest = max_model_len or config.context_length

        def new_cache(num_pages: Sequence[int]) -> jfa.PagedKVCache:
            return paged_cache(
                config,
                num_pages=num_pages,
                page_size=page_size,
                batch=1,
                pages_per_seq=1,
                dtype=model.dtype,
                kv_dtype=kv_dtype,
            )

        def num_bytes(num_pages: Sequence[int]) -> int:
            return jax.eval_shape(lambda: new_cache(num_pages)).num_bytes

        windows = config.patterns
        num_bytes([2] * len(windows))  # refuses what no cache can be

        def sizes(num_pages: int) -> list[int]:
            return pool_sizes(
                num_pages,
                windows,
                page_size=page_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
            )

        if num_pages is None:
            most = 1 + max_num_seqs * -(-longest // page_size)
            num_pages = _most_pages(most, lambda n: num_bytes(sizes(n)))
        pools = sizes(num_pages)

        def new_pools() -> Pools:
            return make_pools(pools, windows, page_size=page_size)

        most_tokens = new_pools().most_tokens(max_num_batched_tokens)
        self.max_model_len = longest if most_tokens is None else min(longest, most_tokens)
        self.model = model
        self.seed = seed
        self.max_wait = max_wait_ms / 1e3
        self._new_cache = lambda: new_cache(pools)
        self._new_scheduler = lambda: Scheduler(
            new_pools(),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching,
        )
        self._clock = clock
        self._numbers = itertools.count()
        self._scheduler = self._new_scheduler()
        self._pages_per_seq = -(-self.max_model_len // page_size)
        self._turning = threading.RLock()
        self._entering = threading.Lock()
        self._start()

    def _start(self) -> None:
        """Nothing runs, nothing is known, nothing has been counted."""
        slots = self._scheduler.max_num_seqs
        pools = self._scheduler.pools.pools
        self._no_tables = tuple(np.zeros((1, 1), np.int32) for _ in pools)
        self._cache = dataclasses.replace(self._new_cache(), page_tables=self._no_tables, kv_len=_NO_LENGTHS)
        self._slots = Slots(last_token=jnp.zeros(slots, jnp.int32))
        # for each pool: the pages of each slot, and how many of them stand there
        self._tables = np.full((len(pools), slots, self._pages_per_seq), NULL_PAGE, np.int32)
        self._num_pages = np.zeros((len(pools), slots), np.int64)
        self._adjusted: set[int] = set()  # slots whose logits somebody adjusts
        self._rows: tuple[object, SamplingRows | None] = (None, None)  # of the last step, and what they are made of
        self._requests: dict[str, Request] = {}
        self._inbox: queue.SimpleQueue[Request | _Abort] = queue.SimpleQueue()
        self._ended: collections.deque[RequestOutput] = collections.deque()  # that nobody was given yet
        self._launched: _Launched | None = None
        self._is_broken = False
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._finished_requests = self._begun_requests = self._tokens_after = 0
        self._seconds_to_first = self._seconds_after = 0.0

    def add_request(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        number: int | None = None,
        on_output: OnOutput | None = None,
    ) -> str:
        """Queues a prompt and returns the request's id.

        Args:
          params: None: model.default_params().
          priority: smaller ones go first.
          number: a request without a seed draws by (the engine's seed, number); None: the count of requests so far.
          on_output: called in step with the result so far, whenever it grew. If it raises, its request ends alone.

        Raises:
          ValueError: the request can never be served; the message says why, with the numbers.
        """
        return self._submit(prompt, params, request_id, priority, number, on_output).id

    def _submit(
        self, prompt, params, request_id=None, priority=0, number=None, on_output=None, is_streamed=False
    ) -> Request:
        self._check_whole()
        if not isinstance(priority, int):
            raise ValueError(f"priority must be a whole number, smaller ones go first, got {priority!r}")
        count = next(self._numbers)
        params = self.model.default_params() if params is None else params
        ids = self.model.prompt_ids(prompt)
        request = Request(
            id=f"request-{count}" if request_id is None else request_id,
            number=count,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_ids=tuple(ids),
            priority=priority,
            arrival=self._clock(),
            on_output=on_output,
            is_streamed=is_streamed,
        )
        if isinstance(params, BeamSearchParams):
            self._begin_beams(request, params)
        else:
            self._begin(request, params, count if number is None else number)
        with self._entering:
            while request_id is None and request.id in self._requests:
                request.id += "+"  # somebody has chosen this name
            if request.id in self._requests:
                raise ValueError(f"there is a request {request_id!r} already; wait for its end or choose another id")
            self._requests[request.id] = request
            self._inbox.put(request)
        return request

    def abort(self, request_id: str) -> None:
        """Ends a request, wherever it is, with finish_reason "abort"; one that has ended stays as it is."""
        if (request := self._requests.get(request_id)) is not None:
            self._inbox.put(_Abort(request))

    @property
    def has_unfinished(self) -> bool:
        """Whether step has something to do."""
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Launches a step and reads the results of the one before.

        Returns the requests that have ended since the last call, in the order they did, but for those of streams.

        Raises:
          RuntimeError: an earlier step was interrupted, so that nobody knows what the cache holds: call reset.
        """
        self._turn()
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def run(self) -> Iterator[RequestOutput]:
        """Steps until nothing is left; every request as it ends, as step has them."""
        while self._ended or self.has_unfinished:
            if not self._ended:
                self._turn()
            while self._ended:
                yield self._ended.popleft()

    def stream(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        number: int | None = None,
    ) -> "Stream":
        """One request's results as they grow; others run beside it. Arguments and errors are those of add_request."""
        stream = Stream(self)
        stream.request = self._submit(prompt, params, request_id, priority, number, stream.grown.append, True)
        return stream

    def reset(self) -> None:
        """Forgets all requests and empties the cache: for who was interrupted inside step."""
        with self._turning:
            self._scheduler = self._new_scheduler()
            del self._cache, self._slots, self._launched  # there may be no memory for another pool beside it
            self._start()

    def _check_whole(self) -> None:
        if self._is_broken:
            raise RuntimeError("a step was interrupted, and nobody knows what the cache holds: call reset() first")

    def _turn(self) -> None:
        with self._turning:
            self._check_whole()
            try:
                self._receive()
                chunks = self._scheduler.schedule()
                while not chunks and self._launched is None and self._scheduler.make_way():
                    chunks = self._scheduler.schedule()
                launched = self._launch(chunks) if chunks else None
                before, self._launched = self._launched, launched
                if before is not None:
                    self._collect(before)
                if not self._requests:
                    self._launched = None  # surplus tokens of those that have ended
            except BaseException:  # Ctrl-C too: books and device may have parted anywhere above; told on, never hidden
                self._is_broken = True
                raise

    @property
    def num_slots(self) -> int:
        """Tokens that the largest pool holds."""
        pools = self._scheduler.pools
        return (max(pool.allocator.num_pages for pool in pools.pools) - 1) * pools.page_size

    def warm_up(self, params: Sequence[Params] = (GREEDY,)) -> None:
        """Compiles what any mixture of requests like these needs, so that nothing compiles later.

        Raises:
          RuntimeError: requests are on their way.
        """
        with self._turning:
            if self.has_unfinished:
                raise RuntimeError("warm_up runs steps of its own: call it before or after all requests")
            self._warm_up([_CANDIDATES if isinstance(one, BeamSearchParams) else one for one in params])

    def _warm_up(self, params: Sequence[SamplingParams]) -> None:
        most = self._scheduler.max_num_seqs
        wants_prompt = {False} | {one.prompt_logprobs is not None for one in params}
        mixtures = list(
            itertools.product(
                {one.is_greedy for one in params},
                {one.logprobs is None for one in params},
                {one.adjusts_logits for one in params},
                {one.stop_token_ids for one in params},  # how many decides a shape
            )
        )
        shapes: list[tuple[int, int | None]] = [(b, None) for b in _buckets(1, most)]
        shapes += [(most, n) for n in _buckets(SMALLEST_STEP, self._scheduler.max_num_batched_tokens)]
        for (b, n), with_prompt in itertools.product(shapes, wants_prompt):
            batch = _batch(
                np.zeros(n or b, np.int32),
                None if n is None else np.zeros(b + 1, np.int32),
                np.full(b, most, np.int32),
                np.full(b, n or b, np.int32),
                np.zeros(n, np.int32) if with_prompt and n else None,
            )
            tables = np.zeros((len(self._no_tables), b, self._pages_per_seq), np.int32)
            logits, _ = self._advance(batch, tables, np.zeros(b, np.int32))
            if n in (None, SMALLEST_STEP):
                for greedy, no_logprobs, adjusting, stops in mixtures:
                    like = SamplingParams(
                        temperature=0.0 if greedy else 1.0,
                        logprobs=None if no_logprobs else 0,
                        min_tokens=int(adjusting),
                        stop_token_ids=stops,
                    )
                    rows = self._sampling_rows([(like, _NO_SEED)], b)
                    self._draw(logits, rows, batch.slot, np.zeros(b, bool), np.zeros(b, np.int32))
        for n, pool in itertools.product(_buckets(SMALLEST_COPY, most), range(len(self._no_tables))):
            self._copy([(pool, Copy(NULL_PAGE, NULL_PAGE))] * n)
        if any(one.adjusts_logits for one in params):
            self._adjust(most, GREEDY, (), ())

    def metrics(self) -> EngineMetrics:
        """How things stand."""
        with self._turning:
            pools = self._scheduler.pools
            held, shared = pools.num_held, pools.num_shared
            with self._entering:
                living = [one for request in self._requests.values() for one in request.continuations]
            running = self._scheduler.num_running
            return EngineMetrics(
                running=running,
                waiting=sum(not one.finished for one in living) - running,
                cache_use=held / pools.num_pages,
                cache_waste=pools.wasted_slots / (held * pools.page_size) if held else 0.0,
                cache_saved=shared / (held + shared) if held else 0.0,
                prefix_hits=pools.hit_tokens / max(1, pools.queried_tokens),
                preemptions=self._scheduler.num_preemptions,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._generated_tokens,
                finished_requests=self._finished_requests,
                time_to_first_token=self._seconds_to_first / self._begun_requests if self._begun_requests else None,
                time_per_output_token=self._seconds_after / self._tokens_after if self._tokens_after else None,
            )

    # How a request begins.

    def _begin(self, request: Request, params: SamplingParams, number: int) -> None:
        room = self.max_model_len - len(request.prompt_ids)
        if params.max_tokens is None and room > 0:
            params = dataclasses.replace(params, max_tokens=room)
        self._check_room(request, params.max_tokens or 1)
        request.num_prompt_logprobs = params.prompt_logprobs
        for index in range(params.n):
            completion = self.model.completion(request.prompt_ids, params, index=index)
            request.completions.append(completion)
            one = Continuation(
                request,
                index,
                request.prompt_ids,
                limit=len(request.prompt_ids) + completion.max_tokens,
                params=params,
                seed=seed_sequence(params, self.seed, number, index),
                completion=completion,
            )
            request.continuations.append(one)
        request.continuations[0].followers = request.continuations[1:]

    def _begin_beams(self, request: Request, params: BeamSearchParams) -> None:
        self._check_room(request, params.max_tokens)
        request.beams = BeamSearch(params, self.model.eos_token_ids)
        request.continuations = [self._beam(request, request.prompt_ids)]

    @staticmethod
    def _beam(request: Request, tokens: Sequence[int]) -> Continuation:
        assert request.beams is not None
        request.num_beams += 1
        limit = len(request.prompt_ids) + request.beams.params.max_tokens
        return Continuation(
            request, request.num_beams, tokens, limit=limit, params=_CANDIDATES, seed=_NO_SEED, draws=False
        )

    def _check_room(self, request: Request, max_tokens: int) -> None:
        if len(request.prompt_ids) + max_tokens > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is {max_tokens}, together more than "
                f"max_model_len={self.max_model_len} (the model's context is {self.model.config.context_length}, the "
                f"pool holds {self.num_slots} tokens); shorten the prompt, lower max_tokens, or "
                "give the engine more pages"
            )

    def _receive(self) -> None:
        """Takes what other threads sent; an idle engine waits a while for company."""
        until = None
        while True:
            wait = 0.0
            if until is not None and 0 < self._scheduler.num_waiting < self._scheduler.max_num_seqs:
                wait = max(0.0, until - self._clock())
            try:
                message = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Abort):
                if not message.request.finished:
                    self._end(message.request, "abort")
                continue
            if self.max_wait and until is None and self._launched is None and not self._scheduler.num_running:
                until = message.arrival + self.max_wait
            self._scheduler.add(message.continuations[0])
            self._prompt_tokens += len(message.prompt_ids)

    # A step on its way to the device.

    def _launch(self, chunks: Sequence[Chunk]) -> _Launched:
        most = self._scheduler.max_num_seqs
        self._steps += 1
        self._copy([copy for chunk in chunks for copy in chunk.copies])
        total = sum(chunk.num_tokens for chunk in chunks)
        rows = [(chunk, one) for chunk in chunks for one in (chunk.of, *chunk.followers)]
        one_each = total == len(chunks) == len(rows) and not any(map(_wants_prompt, chunks))
        b = _bucket(len(rows), 1, most) if one_each else most
        n = b if one_each else _bucket(total, SMALLEST_STEP, self._scheduler.max_num_batched_tokens)
        tokens, next_tokens = np.zeros(n, np.int32), np.zeros(n, np.int32)
        tables = np.full((len(self._no_tables), b, self._pages_per_seq), NULL_PAGE, np.int32)
        kv_len, generated = np.zeros(b, np.int32), np.zeros(b, np.int32)
        start, slot, last = np.full(b + 1, total, np.int32), np.full(b, most, np.int32), np.full(b, n, np.int32)
        samples = np.zeros(b, bool)
        end, prompts = 0, []
        for row, (chunk, one) in enumerate(rows):
            assert one.slot is not None
            if one.is_new:
                self._enter(one)
            slot[row], start[row] = one.slot, end
            if one is chunk.of:
                known = one.tokens[chunk.start : chunk.start + chunk.num_tokens]
                tokens[end : end + chunk.num_tokens] = known or -1
                if _wants_prompt(chunk):
                    follow = one.tokens[chunk.start + 1 : min(chunk.start + chunk.num_tokens + 1, one.num_prompt)]
                    next_tokens[end : end + len(follow)] = follow
                    prompts.append((one.request, chunk.start + 1, end, len(follow)))
                kv_len[row], tables[:, row] = chunk.start, self._pages_of(one)
                end += chunk.num_tokens
            if chunk.samples:
                last[row], generated[row], samples[row] = end - 1, chunk.generated, one.draws
        batch = _batch(tokens, None if one_each else start, slot, last, next_tokens if prompts else None)
        logits, prompt_logprobs = self._advance(batch, tables, kv_len)
        sampled, who = None, [(row, one) for row, (chunk, one) in enumerate(rows) if chunk.samples]
        if who:
            of_rows = self._sampling_rows([(one.params, one.seed) for _, one in rows], b)
            sampled = self._draw(logits, of_rows, slot, samples, generated)
        for x in jax.tree.leaves((sampled, prompt_logprobs)):
            x.copy_to_host_async()
        return _Launched(who, sampled, prompts, prompt_logprobs)

    def _advance(self, batch: Batch, tables: np.ndarray, kv_len: np.ndarray) -> tuple[jax.Array, Sampled | None]:
        cache = dataclasses.replace(self._cache, page_tables=tuple(tables), kv_len=kv_len)
        cache, logits, prompt_logprobs = self.model.steps.advance(
            self.model.params, cache, self._slots.last_token, batch
        )
        # between steps the tables are the host's: of one shape here, whatever the step's was
        self._cache = dataclasses.replace(cache, page_tables=self._no_tables, kv_len=_NO_LENGTHS)
        return logits, prompt_logprobs

    def _draw(self, logits, rows: SamplingRows, slot, samples, generated) -> Sampled:
        adjusting = rows.min_tokens is not None
        if adjusting:
            self._make_counts()
        # what a step does not need stays outside: its program would differ
        slots = self._slots if adjusting else Slots(last_token=self._slots.last_token)
        slots, sampled = self.model.steps.draw(slots, logits, rows, slot, samples, generated)
        self._slots = slots if adjusting else dataclasses.replace(self._slots, last_token=slots.last_token)
        return sampled

    def _sampling_rows(self, who: Sequence[tuple[SamplingParams, np.random.SeedSequence]], b: int) -> SamplingRows:
        made_of, rows = self._rows
        key = (b, tuple(who))
        if rows is None or made_of != key:
            params, seeds = zip(*who, *[(GREEDY, _NO_SEED)] * (b - len(who)), strict=True)
            vocab_size, eos = self.model.config.vocab_size, self.model.eos_token_ids
            rows = slot_rows(params, seeds, vocab_size=vocab_size, eos_token_ids=eos)
            self._rows = (key, rows)
        return rows

    def _enter(self, one: Continuation) -> None:
        """A continuation takes its slot."""
        assert one.slot is not None
        one.is_new = False
        self._num_pages[:, one.slot] = 0
        if one.params.adjusts_logits:
            self._adjust(one.slot, one.params, one.request.prompt_ids, one.tokens[one.num_prompt :])
            self._adjusted.add(one.slot)
        elif one.slot in self._adjusted:  # by who had it before
            self._adjust(one.slot, GREEDY, (), ())
            self._adjusted.remove(one.slot)

    def _make_counts(self) -> None:
        if self._slots.output_counts is None:
            shape = (self._scheduler.max_num_seqs, self.model.config.vocab_size)
            self._slots = Slots(
                last_token=self._slots.last_token,
                prompt_seen=jnp.zeros(shape, bool),
                output_counts=jnp.zeros(shape, jnp.int32),
                logit_bias=jnp.zeros(shape, jnp.float32),
            )

    def _adjust(self, slot: int, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Tells a slot what its logits are adjusted by."""
        self._make_counts()
        vocab_size = self.model.config.vocab_size
        counts = np.bincount(np.asarray(generated, np.int64), minlength=vocab_size).astype(np.int32)
        self._slots = self.model.steps.adjust(
            self._slots, slot, seen([prompt], vocab_size)[0], counts, dense_bias([params], vocab_size)[0]
        )

    def _pages_of(self, one: Continuation) -> np.ndarray:
        """Its row of each page table.

        Since the last step its last page may be another one, there may be more, and some may have left a window.
        """
        assert one.slot is not None
        for i, (allocator, window) in enumerate(self._scheduler.pools.pools):
            table = self._tables[i, one.slot]
            start = max(0, int(self._num_pages[i, one.slot]) - 1)
            pages = allocator.pages(one, start)
            table[start : start + len(pages)] = pages
            if window is not None:
                table[: allocator.num_gone(one)] = NULL_PAGE
            self._num_pages[i, one.slot] = start + len(pages)
        return self._tables[:, one.slot]

    def _copy(self, copies: Sequence[tuple[int, Copy]]) -> None:
        for i in range(len(self._no_tables)):
            if of_pool := [copy for number, copy in copies if number == i]:
                n = _bucket(len(of_pool), SMALLEST_COPY, self._scheduler.max_num_seqs)
                pairs = np.full((2, n), NULL_PAGE, np.int32)
                pairs[:, : len(of_pool)] = np.transpose(of_pool)
                self._cache = self.model.steps.copy_pages(self._cache, *pairs, table=i)

    # What a step has brought.

    def _collect(self, launched: _Launched) -> None:
        """Reads the results of a step and passes them on."""
        sampled, prompt_logprobs = jax.device_get((launched.sampled, launched.prompt_logprobs))
        now = self._clock()
        tokenizer = self.model.tokenizer
        for request, place, first, count in launched.prompts:
            for i in range(count):
                entries = logprobs_of(prompt_logprobs, first + i, request.num_prompt_logprobs, tokenizer)
                request.prompt_logprobs.setdefault(place + i, entries)
        grown: dict[Request, None] = {}
        for row, one in launched.rows:
            request = one.request
            if one.finished or request.finished:
                continue  # drawn before its end was known
            if request.first_token is None:
                request.first_token = now
                self._begun_requests += 1
                self._seconds_to_first += now - request.arrival
            grown[request] = None
            try:
                if request.beams is not None:
                    self._report(request, request.beams, one, sampled, row)
                else:
                    self._push(one, sampled, row, now)
            except Exception as error:  # its text cannot be made: the others go on
                self._fail(request, error)
        for request in grown:
            if not request.finished:
                self._show(request)

    def _push(self, one: Continuation, sampled: Sampled, row: int, now: float) -> None:
        assert one.completion is not None
        one.completion.push(sampled, row)
        one.tokens.append(one.completion.token_ids[-1])
        self._generated_tokens += 1
        if one.completion.finished:
            self._scheduler.finish(one)
            self._count(one.request, one.completion, now)

    def _count(self, request: Request, completion: Completion, now: float) -> None:
        assert request.first_token is not None
        self._seconds_after += now - request.first_token
        self._tokens_after += len(completion.token_ids) - 1

    def _report(self, request: Request, beams: BeamSearch, one: Continuation, sampled: Sampled, row: int) -> None:
        """A beam's successors; with those of the last one the next beams are chosen."""
        assert sampled.top_ids is not None and sampled.top_logprobs is not None
        width = 2 * beams.params.beam_width
        ids, logprobs = sampled.top_ids[row, :width].tolist(), sampled.top_logprobs[row, :width].tolist()
        parents = request.continuations
        if not beams.report(parents.index(one), list(zip(ids, logprobs, strict=True))):
            return
        chosen = beams.choose()
        heirs = {place: token for place, token in reversed(chosen)}  # the first child goes on as its parent
        for place, parent in enumerate(parents):
            if place not in heirs:
                self._scheduler.finish(parent)
        live = []
        for place, token in chosen:
            child = parents[place]
            if child in live:
                child = self._beam(request, [*parents[place].tokens, token])
                self._scheduler.fork(parents[place], child)
            live.append(child)
        for place, token in heirs.items():
            self._scheduler.choose(parents[place], token)
        request.continuations = live
        if beams.done:
            request.completions = [
                self._completion_of(request, index, found.beam) for index, found in enumerate(beams.hypotheses)
            ]
            self._generated_tokens += request.num_generated
            for completion in request.completions[:1]:
                self._count(request, completion, self._clock())

    def _completion_of(self, request: Request, index: int, beam: Beam) -> Completion:
        assert request.beams is not None
        params = SamplingParams(
            temperature=0.0, max_tokens=request.beams.params.max_tokens, ignore_eos=request.beams.params.ignore_eos
        )
        completion = self.model.completion(request.prompt_ids, params, index=index)
        for token in beam.tokens:
            completion.take(token)
        completion.cumulative_logprob = beam.total
        return completion

    def _show(self, request: Request) -> None:
        """Shows a request that grew to who wants to see it, and ends it if it is done."""
        done = request.beams.done if request.beams is not None else all(one.finished for one in request.completions)
        if done:
            self._end(request)
        elif request.on_output is not None and request.beams is None:
            try:
                request.on_output(request.output())
            except Exception as error:  # somebody else's code: its request ends, the others go on
                self._fail(request, error, "on_output raised ")

    def _fail(self, request: Request, error: Exception, what: str = "") -> None:
        request.error = f"{what}{error!r}"
        self._end(request, "error")

    def _end(self, request: Request, reason: FinishReason | None = None) -> None:
        """Gives back all that a request has. reason: of what has not ended by itself."""
        request.ended = self._clock()
        for one in request.continuations:
            if not one.finished:
                self._scheduler.finish(one)
        if reason is not None and request.beams is not None:
            found = [*(one.beam for one in request.beams.hypotheses), *request.beams.live]
            request.completions = [
                self._completion_of(request, index, beam)
                for index, beam in enumerate(found[: request.beams.params.beam_width])
            ]
        for completion in request.completions:
            if reason is not None:
                completion.end(reason)
        del self._requests[request.id]
        self._finished_requests += 1
        if request.on_output is not None and reason != "error":
            try:
                request.on_output(request.output())
            except Exception as error:
                request.error = f"on_output raised {error!r}"
        if not request.is_streamed:
            self._ended.append(request.output())


class Stream:
    """One request's results as they grow: an iterator. Closing it, or letting it go, aborts the request."""

    def __init__(self, engine: Engine):
        self.grown: collections.deque[RequestOutput] = collections.deque()
        self.request: Request | None = None
        self._engine = engine

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> RequestOutput:
        while not self.grown:
            with self._engine._turning:  # another thread's turn may have brought it
                if not self.grown:
                    if self.request is None or self.request.finished:
                        raise StopIteration
                    self._engine._turn()
        return self.grown.popleft()

    def close(self) -> None:
        """Aborts the request, if it has not ended."""
        if self.request is not None and not self.request.finished:
            self._engine.abort(self.request.id)

    __del__ = close


def _batch(tokens, query_start, slot, last, next_tokens) -> Batch:
    """Arrays of the host: a step takes them to the device in one go."""
    return Batch(tokens=tokens, query_start=query_start, slot=slot, last=last, next_tokens=next_tokens)


def _wants_prompt(chunk: Chunk) -> bool:
    one = chunk.of
    wants = one.request.num_prompt_logprobs is not None and one is one.request.continuations[0]
    return wants and chunk.start + 1 < one.num_prompt


def _bucket(n: int, smallest: int, largest: int) -> int:
    """The first of _buckets that holds n."""
    return next(size for size in _buckets(smallest, largest) if size >= n)


def _buckets(smallest: int, largest: int) -> Iterator[int]:
    """Powers of two times smallest, and the largest."""
    while smallest < largest:
        yield smallest
        smallest *= 2
    yield largest


def _most_pages(most: int, num_bytes: Callable[[int], int]) -> int:
    """Pages for most of what the device has left, at most as many as can be used."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    room = HOST_CACHE_BYTES if limit is None else int(FREE_MEMORY * (limit - stats.get("bytes_in_use", 0)))
    return max(2, bisect.bisect_right(range(1 + most), room, key=num_bytes, lo=2) - 1)
