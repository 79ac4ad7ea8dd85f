"""The engine: requests are added at any time; a step computes one token of each running one and chunks of prompts.

The host runs one step ahead of the results: while the device computes a step, the next one is scheduled and launched
with last tokens that only the device knows; only then are the results of the previous step read. The end of a
continuation is therefore noticed one step late: its surplus token is dropped, and its slot is reused one step later.

One file: what a caller sees, most of it documentation. launch.py talks to the device, results.py reads what comes back.
"""

import bisect
import collections
import dataclasses
import functools
import itertools
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

import jfa
from jfa_models import processes
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import SEED_ADVICE, BeamSearchParams, SamplingParams, check_kind, integer
from jfa_models.decoding.prompts import Prompt, text_of
from jfa_models.decoding.sampling import seed_sequence
from jfa_models.decoding.speculation import METHODS, TREES, SpeculativeConfig
from jfa_models.engine.beams import BeamSearch
from jfa_models.engine.draft_model import DraftModel, draft_cache, draft_model_of
from jfa_models.engine.launch import Launched, Launcher
from jfa_models.engine.lookahead import LookaheadProposer
from jfa_models.engine.pools import Pools, make_pools, pool_sizes
from jfa_models.engine.request import CANDIDATES, GREEDY, Continuation, OnOutput, Request
from jfa_models.engine.results import Results
from jfa_models.engine.scheduler import Scheduler
from jfa_models.engine.snapshots import Snapshots
from jfa_models.engine.speculator import LONGEST_FORCED, NgramProposer, Proposer, Speculated, Speculator
from jfa_models.model.attention import paged_cache
from jfa_models.model.mixers import pending_bytes, state_cache

FREE_MEMORY = 0.85  # fraction of the device's free memory that is used for pages
HOST_CACHE_BYTES = 2**30  # for pages, beside states, if the device does not report its memory
SNAPSHOT_ADVICE = "it is the number of prefixes whose states are kept for other prompts; 0 keeps none"

Params = SamplingParams | BeamSearchParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """A snapshot. Tokens and counts are since the engine was created or reset; times are means in seconds.

    Attributes:
      running, waiting: continuations that hold pages, and those that wait for them.
      cache_use: fraction of the pages that continuations hold.
      cache_waste: fraction of the token slots in held pages that are empty.
      cache_saved: fraction saved by sharing, of the pages that continuations would hold without it.
      prefix_hits: fraction of the looked-up tokens that were in the prefix cache. Preemption repeats a look-up.
      prefix_tokens: the number of looked-up tokens.
      preemptions: how often a continuation was preempted.
      speculation: by method: tokens drafted, accepted, and per step of a row with a draft.
      time_to_first_token: over requests that have a first token.
      time_per_output_token: after the first one, over continuations that finished normally.
    """

    running: int
    waiting: int
    cache_use: float
    cache_waste: float
    cache_saved: float
    prefix_hits: float
    prefix_tokens: int
    preemptions: int
    steps: int
    prompt_tokens: int
    generated_tokens: int
    finished_requests: int
    speculation: Mapping[str, Speculated]
    time_to_first_token: float | None
    time_per_output_token: float | None


class Abort(NamedTuple):
    """A message that ends a request."""

    request: Request


class Engine:
    """Continuous batching over a paged cache. Any thread may call its methods; one thread at a time runs a step.

    A request's tokens do not depend on other requests, unless rounding, which depends on the batch size, breaks a tie.

    A model with states (Mamba-2, for example) has those of each running continuation in the cache, beside the pages,
    and snapshots of them, from which prompts with a common prefix go on. A step that verifies drafts brings only the
    accepted tokens into the states; they cannot follow drafts that are trees.

    Attributes:
      on_received: called in each step with the requests that are new in it and those that end; None: not called.
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
        num_state_snapshots: int = 16,
        max_wait_ms: float = 0.0,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Allocates the pool of pages.

        Args:
          kv_dtype: dtype of the pages: "int8", "fp8" or "int4"; None: the model's dtype.
          page_size: tokens per page. A model without attention has one page for each sequence, without content, unless
            a draft model has attention; and snapshots of states at multiples of page_size.
          num_pages: pages of page_size tokens; None: as many as fit into most of the device's free memory, or into 1
            GiB of the host's beside the states, but no more than max_num_seqs sequences of max_model_len need.
          max_num_seqs: maximum number of continuations that run at the same time.
          max_num_batched_tokens: maximum tokens per step; None: 512 on a CPU, 2048 elsewhere, times the devices that
            tokens are divided over.
          max_model_len: maximum tokens of a prompt and its continuation; None: the model's context, or less if the pool
            is smaller.
          num_state_snapshots: for prefix caching of a model with states: how many copies of them the cache keeps, each
            as large as the states of one sequence; the least recently used one is dropped. 0: no prefix caching of such
            a model. Other models have none.
          max_wait_ms: how long an idle engine waits for more requests after the first one (dynamic batching).
          speculative_config: how to speculate, such as {"method": "ngram"}; None: not at all.
          seed: for requests without their own.
          clock: returns seconds, for the metrics, max_wait_ms and adaptive speculation.

        Raises:
          ValueError: an argument is out of range; the message names it.
        """
        config = model.config
        _check_not_sparse(model)
        if max_num_batched_tokens is None:
            per_device = 512 if jax.default_backend() == "cpu" else 2048
            max_num_batched_tokens = max(max_num_seqs, per_device * model.partition.size(model.partition.tokens))
        if max_model_len is not None and not 1 <= max_model_len <= config.context_length:
            raise ValueError(
                f"max_model_len must be from 1 to {config.context_length}, the model's context, got {max_model_len}"
            )
        if max_model_len and max_model_len <= (config.long_rope_from or 0):
            warnings.warn(
                f"the model was loaded with its factors for long texts, and max_model_len={max_model_len} allows "
                f"short ones only; load it with context_length={max_model_len}",
                stacklevel=2,
            )
        if max_wait_ms < 0:
            raise ValueError(f"max_wait_ms must be at least 0, got {max_wait_ms}")
        self._speculation = None if speculative_config is None else SpeculativeConfig.of(speculative_config)
        self._draft: LanguageModel | None = None
        if self._speculation is not None and self._speculation.method not in ("ngram", "lookahead"):
            self._draft = draft_model_of(self._speculation, model)
        if self._draft is not None:
            _check_not_sparse(self._draft)
        if self._speculation is not None:
            _check_trees(self._speculation, self._draft, model)
        longest = max_model_len or config.context_length
        num_state_snapshots = integer("num_state_snapshots", num_state_snapshots, 0, None, SNAPSHOT_ADVICE)
        if config.states is None or not enable_prefix_caching:
            num_state_snapshots = 0
        snapshot_slots, snapshot_size = range(max_num_seqs, max_num_seqs + num_state_snapshots), page_size
        draft = self._draft
        if not config.attention_layers and (draft is None or not draft.config.attention_layers):
            page_size = longest  # pages without keys and values: one for each sequence

        def new_states() -> jfa.StateCache | None:
            return state_cache(config, batch=max_num_seqs + num_state_snapshots, dtype=model.dtype)

        def new_cache(num_pages: Sequence[int]) -> jfa.PagedKVCache:
            cache = paged_cache(
                config,
                num_pages=num_pages,
                page_size=page_size,
                batch=1,
                pages_per_seq=1,
                dtype=model.dtype,
                kv_dtype=kv_dtype,
                sharding=model.partition.of_kv,
            )
            return dataclasses.replace(cache, states=new_states())

        windows = config.patterns or (None,)
        seen = [(window, config.sinks_of(window)) for window in windows]

        state_bytes = _state_bytes(
            model,
            draft,
            self._speculation,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_state_snapshots=num_state_snapshots,
        )

        def num_bytes(num_pages: Sequence[int]) -> int:
            caches = [(model, jax.eval_shape(lambda: new_cache(num_pages)))]
            if draft is not None:
                options: dict[str, Any] = dict(rows=max_num_seqs, page_size=page_size, kv_dtype=kv_dtype)
                of_draft = functools.partial(draft_cache, draft, windows, num_pages, **options)
                caches.append((draft, jax.eval_shape(of_draft)))
            pages = [(one, dataclasses.replace(cache, states=None)) for one, cache in caches]
            return state_bytes + sum(one.partition.num_bytes(cache) for one, cache in pages)

        num_bytes([2] * len(windows))  # raises for options that no cache supports

        def sizes(num_pages: int) -> list[int]:
            return pool_sizes(
                num_pages,
                seen,
                page_size=page_size,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
            )

        if num_pages is None:
            most = 1 + max_num_seqs * -(-longest // page_size)
            num_pages = processes.smallest(_most_pages(model, most, lambda n: num_bytes(sizes(n)), state_bytes))
        pools = sizes(num_pages)

        def new_pools() -> Pools:
            snapshots = Snapshots(snapshot_slots, snapshot_size) if snapshot_slots else None
            has_attention = bool(config.attention_layers)
            return make_pools(pools, seen, page_size=page_size, snapshots=snapshots, has_attention=has_attention)

        most_tokens = new_pools().most_tokens(max_num_batched_tokens)
        self.max_model_len = longest if most_tokens is None else min(longest, most_tokens)
        self.model = model
        self.seed = integer("seed", seed, 0, None, SEED_ADVICE)
        self.max_wait = max_wait_ms / 1e3
        self._new_cache = lambda: new_cache(pools)
        self._draft_options: dict[str, Any] = dict(num_pages=pools, kv_dtype=kv_dtype)
        self._new_scheduler = lambda: Scheduler(
            new_pools(),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=enable_prefix_caching and (config.states is None or num_state_snapshots > 0),
        )
        self.on_received: Callable[[list[Request | Abort]], None] | None = None
        self._clock = clock
        self._numbers = itertools.count()
        self._step_lock = threading.RLock()
        self._requests_lock = threading.RLock()  # a Stream may be collected, and abort, at any time
        self._start()

    def _start(self) -> None:
        """Sets the initial state: no requests, an empty cache, all counters zero."""
        self._scheduler = self._new_scheduler()
        pages_per_seq = -(-self.max_model_len // self._scheduler.pools.page_size)
        largest_tree = None
        if self._speculation is not None and self._speculation.method in TREES:
            largest_tree = max(self._speculation.length, LONGEST_FORCED)
        self._launcher = Launcher(
            self.model, self._scheduler, self._new_cache(), pages_per_seq=pages_per_seq, largest_tree=largest_tree
        )
        self._speculator = Speculator(
            self._speculation, self._new_proposer(), self._launcher.shapes, longest=self.max_model_len
        )
        self._results = Results(self.model, self._scheduler, self._speculator, self._clock)
        self._inbox: queue.SimpleQueue[Request | Abort] = queue.SimpleQueue()
        self._launched: Launched | None = None
        self._collected: float | None = None  # when the last results were read, unless the engine was idle since
        self._is_broken = False
        self._steps = self._prompt_tokens = 0

    def _new_proposer(self) -> Proposer | None:
        if self._speculation is None:
            return None
        if self._draft is None:
            of_text = {"ngram": NgramProposer, "lookahead": LookaheadProposer}
            return of_text[self._speculation.method](self._speculation)

        def reserve(one: Continuation, num_drafted: int) -> bool:
            copies = self._scheduler.reserve(one, num_drafted)
            self._launcher.copy(copies or ())
            return copies is not None

        return DraftModel(self._speculation, self._draft, self._launcher, reserve, **self._draft_options)

    def add_request(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        number: int | None = None,
        on_output: OnOutput | None = None,
        adapter: str | None = None,
        count: int | None = None,
    ) -> str:
        """Queues a prompt and returns the request's id.

        Args:
          params: None: model.default_params().
          priority: smaller values run first.
          number: a request without a seed gets one from (the engine's seed, number); None: the request count so far.
          on_output: called within step with the result so far, whenever it grew. If it raises, only its request ends.
          adapter: the name of a loaded adapter (LanguageModel.load_adapter); None: none.
          count: the number of requests before it, in an engine that follows that of another process; None: as counted.

        Raises:
          ValueError: the request can never be served; the message says why, with the numbers.
        """
        return self._submit(prompt, params, request_id, priority, number, adapter, on_output, count=count).id

    def _submit(
        self, prompt, params, request_id, priority, number, adapter, on_output, *, is_streamed=False, count=None
    ) -> Request:
        self._check_not_broken()
        if not isinstance(priority, int):
            raise ValueError(f"priority must be an integer (smaller values run first), got {priority!r}")
        count = next(self._numbers) if count is None else count
        params = self.model.default_params() if params is None else params
        check_kind(params, SamplingParams, BeamSearchParams)
        ids = self.model.prompt_ids(prompt)
        request = Request(
            id=f"request-{count}" if request_id is None else request_id,
            number=count,
            prompt=text_of(prompt),
            prompt_ids=tuple(ids),
            priority=priority,
            arrival=self._clock(),
            on_output=on_output,
            is_streamed=is_streamed,
            adapter=self.model.adapters.find(adapter),
        )
        if isinstance(params, BeamSearchParams):
            self._begin_beams(request, params)
        else:
            self._begin(request, params, count if number is None else number)
        with self._requests_lock:
            while request_id is None and request.id in self._results.requests:
                request.id += "+"  # a caller has chosen this id
            if request.id in self._results.requests:
                raise ValueError(f"request id {request_id!r} is in use; wait for that request or choose another id")
            self.model.adapters.hold(request.adapter)
            self._results.requests[request.id] = request
            self._inbox.put(request)
        return request

    def abort(self, request_id: str) -> None:
        """Ends a request in any state with finish_reason "abort"; a finished one is unchanged."""
        with self._requests_lock:
            if (request := self._results.requests.get(request_id)) is not None:
                self._inbox.put(Abort(request))

    @property
    def has_unfinished(self) -> bool:
        """Whether a request is unfinished, so that step has something to do."""
        return bool(self._results.requests)

    def step(self) -> list[RequestOutput]:
        """Launches the next step and reads the results of the previous one.

        Returns the requests that finished since the last call, in that order, except for those of streams.

        Raises:
          RuntimeError: an earlier step was interrupted, so the contents of the cache are unknown: call reset.
        """
        self._run_step()
        return [self._results.ended.popleft() for _ in range(len(self._results.ended))]

    def run(self) -> Iterator[RequestOutput]:
        """Steps until all requests have finished; yields each one when it finishes, as step returns it."""
        while self._results.ended or self.has_unfinished:
            if not self._results.ended:
                self._run_step()
            while self._results.ended:
                yield self._results.ended.popleft()

    def stream(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        number: int | None = None,
        adapter: str | None = None,
    ) -> "Stream":
        """Iterates over one request's results as they grow, while others run. Arguments and errors: see add_request."""
        stream = Stream(self)
        stream.request = self._submit(
            prompt, params, request_id, priority, number, adapter, stream.grown.append, is_streamed=True
        )
        return stream

    def reset(self) -> None:
        """Drops all requests and empties the cache. Call this after an interrupted step."""
        with self._step_lock, self._requests_lock:  # a request that is being added is dropped, or kept
            for request in self._results.requests.values():
                self.model.adapters.release(request.adapter)
            self._launcher.copies_too = None  # it holds the cache of a draft model
            del self._launcher, self._launched, self._speculator, self._results  # there may be no memory for two pools
            self._start()

    def _check_not_broken(self) -> None:
        if self._is_broken:
            raise RuntimeError("a step was interrupted, so the contents of the cache are unknown: call reset() first")

    def _run_step(self) -> None:
        with self._step_lock:
            self._check_not_broken()
            try:
                if self._launched is None:
                    self._collected = None  # the engine was idle: no step's time starts there
                self._receive()
                drafts = {}
                if self._speculator.looks(self._scheduler.running):
                    self._collect()
                    drafts = self._speculator.plan(self._scheduler.next_tokens)
                    if not self._speculator.is_timed:
                        self._collected = None
                chunks = self._scheduler.schedule(drafts)
                while not chunks and self._launched is None and self._scheduler.make_way():
                    chunks = self._scheduler.schedule()
                launched = self._launcher.launch(chunks) if chunks else None
                self._steps += launched is not None
                self._collect()
                self._launched = launched if self._results.requests else None  # or only surplus tokens are in it
            except BaseException:  # Ctrl-C too: the state of host and device may now differ
                self._is_broken = True
                raise

    def _collect(self) -> None:
        """Reads the results of the last step, if there is one whose results were not read."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        self._results.collect(launched)
        now = self._clock()
        if launched.shape is not None and self._collected is not None:
            self._speculator.time(launched.shape, now - self._collected)
        self._collected = now

    @property
    def num_slots(self) -> int:
        """Number of tokens that fit into the largest pool."""
        pools = self._scheduler.pools
        return (max(pool.allocator.num_pages for pool in pools.pools) - 1) * pools.page_size

    def warm_up(self, params: Sequence[Params] = (GREEDY,)) -> None:
        """Compiles all steps that any mixture of requests with these params needs, so that nothing compiles later.

        Raises:
          RuntimeError: there are unfinished requests.
        """
        with self._step_lock:
            if self.has_unfinished:
                raise RuntimeError("warm_up needs an idle engine: call it before or after all requests")
            sampling = [CANDIDATES if isinstance(one, BeamSearchParams) else one for one in params]
            guided = any(one.structured_outputs is not None for one in sampling)
            drafted = 0 if self._speculation is None else self._speculation.length
            self._launcher.warm_up(sampling, longest_draft=max(drafted, LONGEST_FORCED * guided), guided=guided)
            self._speculator.warm_up(sampling)

    def metrics(self) -> EngineMetrics:
        """The current metrics."""
        with self._step_lock:
            pools = self._scheduler.pools
            held, shared = pools.num_held, pools.num_shared
            with self._requests_lock:
                living = [one for request in self._results.requests.values() for one in request.continuations]
            running = self._scheduler.num_running
            return EngineMetrics(
                running=running,
                waiting=sum(not one.finished for one in living) - running,
                cache_use=held / pools.num_pages,
                cache_waste=pools.wasted_slots / (held * pools.page_size) if held else 0.0,
                cache_saved=shared / (held + shared) if held else 0.0,
                prefix_hits=pools.hit_tokens / max(1, pools.queried_tokens),
                prefix_tokens=pools.queried_tokens,
                preemptions=self._scheduler.num_preemptions,
                steps=self._steps,
                prompt_tokens=self._prompt_tokens,
                generated_tokens=self._results.generated_tokens,
                finished_requests=self._results.finished_requests,
                speculation=dict(self._speculator.counts),
                time_to_first_token=self._results.time_to_first_token,
                time_per_output_token=self._results.time_per_output_token,
            )

    # Starting a request.

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
                params=completion.params,
                seed=seed_sequence(params, self.seed, number, index),
                completion=completion,
            )
            request.continuations.append(one)
        request.continuations[0].followers = request.continuations[1:]

    def _begin_beams(self, request: Request, params: BeamSearchParams) -> None:
        self._check_room(request, params.max_tokens)
        request.beams = BeamSearch(params, self.model.eos_token_ids)
        request.continuations = [request.new_beam(request.prompt_ids)]

    def _check_room(self, request: Request, max_tokens: int) -> None:
        if len(request.prompt_ids) + max_tokens > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is {max_tokens}, together more than "
                f"max_model_len={self.max_model_len} (the model's context is {self.model.config.context_length}, the "
                f"pool holds {self.num_slots} tokens); shorten the prompt, lower max_tokens, or "
                "give the engine more pages"
            )

    def _receive(self) -> None:
        """Handles the messages of other threads; an idle engine waits up to max_wait for more requests."""
        received = list(self._handled())
        if self.on_received is not None:
            self.on_received(received)

    def _handled(self) -> Iterator[Request | Abort]:
        until = None
        while True:
            wait = 0.0
            if until is not None and 0 < self._scheduler.num_waiting < self._scheduler.max_num_seqs:
                wait = max(0.0, until - self._clock())
            try:
                message = self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait()
            except queue.Empty:
                return
            yield message
            if isinstance(message, Abort):
                if not message.request.finished:
                    self._results.end(message.request, "abort")
                continue
            if self.max_wait and until is None and self._launched is None and not self._scheduler.num_running:
                until = message.arrival + self.max_wait
            self._scheduler.add(message.continuations[0])
            self._prompt_tokens += len(message.prompt_ids)


class Stream:
    """Iterator over one request's results as they grow. Closing or deleting it aborts the request."""

    def __init__(self, engine: Engine):
        self.grown: collections.deque[RequestOutput] = collections.deque()
        self.request: Request | None = None
        self._engine = engine

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> RequestOutput:
        while not self.grown:
            with self._engine._step_lock:  # another thread may have run the step
                if not self.grown:
                    if self.request is None or self.request.finished:
                        raise StopIteration
                    self._engine._run_step()
        return self.grown.popleft()

    def close(self) -> None:
        """Aborts the request if it is unfinished."""
        if self.request is not None and not self.request.finished:
            self._engine.abort(self.request.id)

    __del__ = close


def _check_trees(config: SpeculativeConfig, draft: LanguageModel | None, model: LanguageModel) -> None:
    for one in (model, draft):
        if one is not None and one.config.states is not None and config.method in TREES:
            raise ValueError(
                f"speculative_config: the drafts of the method {config.method!r} are trees, which the states of a "
                f"{one.config.architecture} model cannot follow; use {', '.join(x for x in METHODS if x not in TREES)}"
            )


def _check_not_sparse(model: LanguageModel) -> None:
    """Raises ValueError if the model or draft model computes only a part of a whole prompt's scores."""
    if model.sparse is not None:
        raise ValueError(
            f"{model.sparse}: an engine prefills prompts in parts, which see all tokens before them; use "
            "LanguageModel.generate or stream, or a model without it"
        )


def _state_bytes(
    model: LanguageModel,
    draft: LanguageModel | None,
    config: SpeculativeConfig | None,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_state_snapshots: int,
) -> int:
    """Bytes of states beside the pages, and of what a step with drafts keeps until it is known which tokens stay."""
    held, pending = [(model, max_num_seqs + num_state_snapshots)], 0
    if draft is not None:  # the states after each row's own tokens, and a copy that goes on from there
        held.append((draft, 2 * max_num_seqs))
    if config is not None:  # the largest step has less than twice as many tokens as it verifies
        most = min(max(2 * max_num_seqs, max_num_batched_tokens), 2 * max_num_seqs * (1 + config.length))
        pending = pending_bytes(model.config, num_tokens=most, dtype=model.dtype)
    shapes = [jax.eval_shape(functools.partial(state_cache, x.config, batch=n, dtype=x.dtype)) for x, n in held]
    return pending + sum(states.num_bytes for states in shapes if states is not None)


def _most_pages(model: LanguageModel, most: int, num_bytes: Callable[[int], int], state_bytes: int) -> int:
    """The number of pages that fit into most of the free memory of each of the model's devices, at most `most`.

    num_bytes: of so many pages and all that states need, which is state_bytes.
    """
    devices = jax.tree.leaves(model.params)[0].sharding.addressable_devices
    room = min(_room(one, state_bytes) for one in devices)
    return max(2, bisect.bisect_right(range(1 + most), room, key=num_bytes, lo=2) - 1)


def _room(device: Any, state_bytes: int) -> int:
    """Bytes for pages and states on a device."""
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    if limit is None:
        return HOST_CACHE_BYTES + state_bytes
    return int(FREE_MEMORY * (limit - stats.get("bytes_in_use", 0)))
