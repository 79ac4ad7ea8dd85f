"""The compiled steps of generation: the only jit, the only donation.

Every step takes the parameters as a flat tuple of leaves (a nested tree costs more on the host than the step's own
dispatch) and a state that is donated and returned. A step compiles once per shape; caches.py keeps shapes few.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

import jfa
from jfa.rules import with_default_rules
from jfa_models.decoding.divided import sample_divided
from jfa_models.decoding.params import MAX_LOGPROBS
from jfa_models.decoding.sampling import NO_TOKEN, Sampled, SamplingRows, finished_by_id, sample, update, with_logprobs
from jfa_models.decoding.speculation import MAX_DRAFT
from jfa_models.model.attention import Cache, StateRows
from jfa_models.model.decoder import Decoder
from jfa_models.model.lora import NO_ADAPTER, Adapters
from jfa_models.model.partition import Axes, Partition, gathered
from jfa_models.model.sparse_config import SparseConfig

# Tokens decoded per call for an offline batch; the host checks for stop strings in between.
STEPS_PER_CALL = 32

# Prompt tokens whose logits are in memory at the same time.
LOGPROB_ROWS = 64

# The likeliest tokens of each place that a draft model reports, if the draft may be a tree.
OTHERS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch in the middle of generation.

    Attributes:
      cache: every token of each row except the last.
      token: the last token of each row.
      num_generated: tokens emitted by each row.
      active: rows that continue; the others are computed but change nothing.
      adapter: the slot of each row's adapter; None: no row has one.
    """

    cache: Cache
    rows: SamplingRows
    token: Int[Array, " b"]
    num_generated: Int[Array, " b"]
    active: Bool[Array, " b"]
    adapter: Int[Array, " b"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Emitted:
    """What one step returns to the host: a token per row that was active, and which rows continue after it."""

    sampled: Sampled
    active: Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One step of an engine: the new tokens of some rows, any number of each, concatenated.

    Attributes:
      tokens: a negative one is replaced by the last token of its row's slot, which the host does not know yet.
      query_start: where each row's tokens begin; None: one token per row.
      slot: the slot of each row; out of range for padding rows.
      last: the index in tokens of the token whose successor a row samples; one past the end for none. None: every
        token's successor is sampled, since all but the first of each row are drafts.
      tree_mask: the drafts of a row may be trees: which new tokens of its row each token sees, itself included, as in
        Decoder. None: they are sequences.
      next_tokens: the token after each one, if the log-probabilities of a prompt are requested.
      adapter: the slot of each row's adapter; None: no row has one.
    """

    tokens: Int[Array, " n"]
    query_start: Int[Array, " b+1"] | None
    slot: Int[Array, " b"]
    last: Int[Array, " b"] | None
    tree_mask: Bool[Array, "n m"] | None = None
    next_tokens: Int[Array, " n"] | None = None
    adapter: Int[Array, " b"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """An engine's state on the device, per running request. The last three are None until one adjusts its logits."""

    last_token: Int[Array, " slots"]
    prompt_seen: Bool[Array, "slots vocab"] | None = None
    output_counts: Int[Array, "slots vocab"] | None = None
    logit_bias: Float[Array, "slots vocab"] | None = None


# What the tokens of a step bring to the states of each layer that has some, until it is known which of them stay.
Pending = tuple[Float[Array, "n inputs"], ...]


class Proposed(NamedTuple):
    """The tokens that a draft model drew for each row, one after another.

    Attributes:
      odds: the probability that it gives to each; None unless asked for, as the rest.
      others: the likeliest tokens of each place. other_odds: their probabilities.
    """

    token: Int[Array, "k b"]
    odds: Float[Array, "k b"] | None = None
    others: Int[Array, "k b other"] | None = None
    other_odds: Float[Array, "k b other"] | None = None


class Adapted(NamedTuple):
    """A decoder whose weights adapters change; the arguments are those of its own."""

    decoder: Decoder
    adapters: Adapters | None

    def __call__(self, tokens: Int[Array, "b t"], **given) -> tuple[Float[Array, "*n hidden"], Cache | None]:
        return self.decoder(tokens, adapters=self.adapters, **given)

    def unembed(
        self, hidden: Float[Array, "*b hidden"], slot: Int[Array, "*#b"] | None = None
    ) -> Float[Array, "*b vocab"]:
        return self.decoder.unembed(hidden, self.adapters, slot)

    def enter(self, cache: Cache, pending: Pending, rows: StateRows) -> Cache:
        return self.decoder.enter(cache, pending, rows)

    @property
    def vocab(self) -> Axes:
        """Over which axes of a mesh the logits are divided."""
        return self.decoder.partition.vocab


class Steps:
    """The compiled steps of one decoder.

    logits(params, tokens [b, t], lengths, adapter) -> f32[b, t, vocab], without a cache
    prefill(params, cache, hidden, tokens [b, t], lengths, adapter) -> (cache, hidden): t more tokens of each row
    prefill_sparse: the same, of whole prompts in an empty cache, with the scores that each layer computes of them
    score(params, cache, tokens [b, t], lengths, adapter) -> (cache, f32[b, t, vocab]): with logits after each token
    first(params, cache, hidden, rows, active, adapter) -> (state, emitted): the token after the prompt
    decode(params, state) -> (state, emitted): one more token
    decode_many(params, state) -> (state, emitted [n, b], num_steps): up to n = STEPS_PER_CALL more tokens

    and those of an engine, whose rows change from step to step (Batch, Slots):
    advance(params, cache, last_token, batch) -> (cache, f32[b or n, vocab], Sampled | None, Pending | None)
    draw(slots, logits, rows, slot, samples, num_generated, allowed) -> (slots, Sampled): of each row that samples
    verify(slots, logits, rows, batch, samples, num_generated, allowed) -> (slots, Sampled): after each of its tokens
    keep(cache, batch, token) -> cache: of drafts that are trees, with the path that verify sampled
    enter(params, cache, pending, batch, token) -> cache: of a decoder with states, after the drafts that verify sampled
    propose(params, cache, batch, rows, num_generated, lengths, confidence, guess) -> (cache, Proposed, i32[b])
    adjust(slots, slot, prompt_seen, output_counts, logit_bias) -> slots: sets a slot's values for a request
    copy_pages(cache, source, destination, table=0) -> cache
    copy_states(cache, source, destination) -> cache: those of slots

    Cache, state, slots and the hidden state of prefill are donated. All that take params also take adapters=, which
    matter to the rows whose `adapter` is a slot: one program if some row of a step has one, and one if none has.

    A decoder that is divided over a mesh computes on every device with its parts (jax.shard_map). Logits are then
    global arrays, divided along the vocabulary.
    """

    def __init__(self, decoder: Decoder, sparse: Sequence[SparseConfig | None] = ()):
        """sparse: for prefill_sparse, as of Decoder."""
        graphdef, state = nnx.split(decoder)
        treedef = jax.tree.structure(state)
        names = list(named_leaves(decoder))
        partition = decoder.partition
        vocab = partition.vocab or None
        token_logits, text_logits = P(None, vocab), P(None, None, vocab)

        def step(function: Callable, returns: Callable[[Any], Any], *, donate: Sequence[int] = ()) -> Callable:
            @functools.partial(jax.jit, donate_argnums=donate)
            @functools.wraps(function)
            def run(params, *args, adapters=None):
                def on_device(params, adapters, *args):
                    decoder = nnx.merge(graphdef, jax.tree.unflatten(treedef, params))
                    return with_default_rules(function)(Adapted(decoder, adapters), *args)

                if partition.mesh is None:
                    return on_device(params, adapters, *args)
                given = tuple(map(partition.of_parameter, names, params))
                specs = [_specs(partition, x) for x in (adapters, *args)]
                return partition.on_devices(on_device, (given, *specs), returns(specs[1]))(params, adapters, *args)

            return run

        def of_logits(function: Callable) -> Callable:
            function = with_default_rules(functools.partial(function, axes=partition.vocab))

            @functools.partial(jax.jit, donate_argnums=0)
            def run(*args):
                if partition.mesh is None:
                    return function(*args)
                slots, _, *rest = (_specs(partition, x) for x in args)
                return partition.on_devices(function, (slots, token_logits, *rest), P())(*args)

            return run

        def of_cache(function: Callable) -> Callable:
            @functools.partial(jax.jit, donate_argnums=0, static_argnames="table")
            def run(cache, *args, **table):
                on_device = with_default_rules(functools.partial(function, **table))
                if partition.mesh is None:
                    return on_device(cache, *args)
                specs = partition.of_cache(cache)
                return partition.on_devices(on_device, (specs, *(P() for _ in args)), specs)(cache, *args)

            return run

        self.logits = step(_logits, lambda _: text_logits)
        self.prefill = step(_prefill, lambda cache: (cache, P()), donate=(1, 2))
        prefill_sparse = functools.partial(_prefill, sparse=sparse)
        self.prefill_sparse = step(prefill_sparse, lambda cache: (cache, P()), donate=(1, 2))
        self.score = step(_score, lambda cache: (cache, text_logits), donate=(1,))
        self.first = step(_first, lambda cache: (_state_specs(cache), P()), donate=(1,))
        self.decode = step(_decode, lambda state: (state, P()), donate=(1,))
        self.decode_many = step(_decode_many, lambda state: (state, P(), P()), donate=(1,))
        self.advance = step(_advance, lambda cache: (cache, token_logits, P(), P()), donate=(1,))
        self.enter = step(_enter, lambda cache: cache, donate=(1,))
        self.propose = step(_propose, lambda cache: (cache, P(), P()), donate=(1,))
        self.draw = of_logits(_draw)
        self.verify = of_logits(_verify)
        self.keep = of_cache(_keep)
        self.adjust = jax.jit(with_default_rules(_adjust), donate_argnums=0)
        self.copy_states = of_cache(_copy_states)
        self.copy_pages = of_cache(jfa.PagedKVCache.copy_pages)


def named_leaves(abstract: Decoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its dotted name, in the order of the steps' flat tuple."""
    state = nnx.to_pure_dict(nnx.split(abstract)[1])
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(state)}


def _specs(partition: Partition, x: Any) -> Any:
    """The PartitionSpecs of an argument of a step, in its structure."""
    if isinstance(x, jfa.KVCache | jfa.PagedKVCache):
        return partition.of_cache(x)
    if isinstance(x, Adapters):
        return partition.of_adapters(x)
    if isinstance(x, DecodeState):
        return _state_specs(partition.of_cache(x.cache))
    return jax.tree.map(lambda _: P(), x)


def _state_specs(cache: Any) -> Any:
    """The PartitionSpecs of a DecodeState, whose cache has these."""
    fields: Any = {field.name: P() for field in dataclasses.fields(DecodeState)}
    return DecodeState(**(fields | {"cache": cache}))


def _logits(
    decoder: Adapted,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"] | None,
    adapter: Int[Array, " b"] | None = None,
) -> Float[Array, "b t vocab"]:
    hidden, _ = decoder(tokens, lengths=lengths, slot=adapter)
    return decoder.unembed(hidden, _of_tokens(adapter))


def _prefill(
    decoder: Adapted,
    cache: Cache,
    hidden: Float[Array, "b hidden"],
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    adapter: Int[Array, " b"] | None = None,
    sparse: Sequence[SparseConfig | None] = (),
) -> tuple[Cache, Float[Array, "b hidden"]]:
    """hidden: the state of each row's last token so far; a row whose prompt ended in an earlier chunk keeps it."""
    b, t = tokens.shape
    wanted = jnp.arange(b) * t + jnp.maximum(lengths - 1, 0)
    last, filled = decoder(tokens, lengths=lengths, cache=cache, slot=adapter, wanted=wanted, sparse=sparse)
    assert filled is not None
    return filled, jnp.where((lengths > 0)[:, None], last, hidden)


def _score(
    decoder: Adapted,
    cache: Cache,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    adapter: Int[Array, " b"] | None = None,
) -> tuple[Cache, Float[Array, "b t vocab"]]:
    states, filled = decoder(tokens, lengths=lengths, cache=cache, slot=adapter)
    assert filled is not None
    return filled, decoder.unembed(states, _of_tokens(adapter))


def _first(
    decoder: Adapted,
    cache: Cache,
    hidden: Float[Array, "b hidden"],
    rows: SamplingRows,
    active: Bool[Array, " b"],
    adapter: Int[Array, " b"] | None = None,
) -> tuple[DecodeState, Emitted]:
    none = jnp.zeros(hidden.shape[0], jnp.int32)
    state = DecodeState(cache=cache, rows=rows, token=none, num_generated=none, active=active, adapter=adapter)
    return _emit(decoder, hidden, state)


def _decode(decoder: Adapted, state: DecodeState) -> tuple[DecodeState, Emitted]:
    lengths = state.active.astype(jnp.int32)
    states, cache = decoder(state.token[:, None], lengths=lengths, cache=state.cache, slot=state.adapter)
    return _emit(decoder, states[:, 0], dataclasses.replace(state, cache=cache))


def _emit(decoder: Adapted, hidden: Float[Array, "b hidden"], state: DecodeState) -> tuple[DecodeState, Emitted]:
    """Samples the token after hidden and counts it."""
    logits = decoder.unembed(hidden, state.adapter)
    sampled = sample_divided(logits, state.rows, state.num_generated, decoder.vocab)
    num_generated = state.num_generated + state.active
    ended = finished_by_id(state.rows, sampled.token) | (num_generated >= state.rows.max_tokens)
    active = state.active & ~ended
    state = DecodeState(
        cache=state.cache,
        rows=update(state.rows, sampled.token, state.active),
        token=jnp.maximum(sampled.token, 0),  # a row without a token has ended
        num_generated=num_generated,
        active=active,
        adapter=state.adapter,
    )
    return state, Emitted(sampled=sampled, active=active)


def _decode_many(decoder: Adapted, state: DecodeState) -> tuple[DecodeState, Emitted, Int[Array, ""]]:
    """Decodes until no row is active, at most STEPS_PER_CALL tokens; emitted[:num_steps] is filled."""
    shapes = jax.eval_shape(functools.partial(_decode, decoder), state)[1]
    emitted = jax.tree.map(lambda x: jnp.zeros((STEPS_PER_CALL, *x.shape), x.dtype), shapes)

    def is_active(carry):
        state, _, step = carry
        return (step < STEPS_PER_CALL) & state.active.any()

    def decode_once(carry):
        state, emitted, step = carry
        state, new = _decode(decoder, state)
        return state, jax.tree.map(lambda x, y: x.at[step].set(y), emitted, new), step + 1

    return lax.while_loop(is_active, decode_once, (state, emitted, jnp.int32(0)))


def _advance(
    decoder: Adapted, cache: jfa.PagedKVCache, last_token: Int[Array, " slots"], batch: Batch
) -> tuple[Cache, Float[Array, "b vocab"], Sampled | None, Pending | None]:
    """The logits after each row's `last` token, or after all; with next_tokens also the log-probabilities of these.

    If there may be drafts among the tokens, states stay those before the step, and what the tokens bring is pending.
    """
    n, b = batch.tokens.shape[0], batch.slot.shape[0]
    if batch.query_start is None:
        lengths = (batch.slot < last_token.shape[0]).astype(jnp.int32)
        first, shape = jnp.arange(b), (b, 1)
    else:
        # a row without tokens begins where the next row does, and must not replace that row's first token
        lengths, has_tokens = None, jnp.diff(batch.query_start) > 0
        first, shape = jnp.where(has_tokens, batch.query_start[:-1], n), (1, n)
    known = jnp.take(batch.tokens, first, mode="clip")
    token = jnp.where(known < 0, jnp.take(last_token, batch.slot, mode="clip"), known)
    tokens = batch.tokens.at[first].set(token, mode="drop").reshape(shape)
    rows = dict(lengths=lengths, query_start=batch.query_start, slot=batch.adapter, state_slot=batch.slot)
    rows["tree_mask"] = batch.tree_mask
    needs_all = batch.last is None or batch.next_tokens is not None
    last = None if batch.last is None else jnp.minimum(batch.last, n - 1)
    if batch.last is None and cache.states is not None:
        cache = dataclasses.replace(cache, states=dataclasses.replace(cache.states, pending=()))
    states, filled = decoder(tokens, cache=cache, **rows, wanted=None if needs_all else last)
    assert filled is not None
    pending = None
    if filled.states is not None:
        pending = filled.states.pending
        filled = dataclasses.replace(filled, states=dataclasses.replace(filled.states, pending=None))
    states = states.reshape(-1, states.shape[-1])
    slot = batch.adapter  # of each row, then of each token
    if slot is not None and batch.query_start is not None:
        slot = jnp.append(slot, NO_ADAPTER)[_row_of_token(batch.query_start, n)]
    if batch.last is None:
        logits = decoder.unembed(states, slot)
    else:
        logits = decoder.unembed(states[last] if needs_all else states, batch.adapter)
    if batch.next_tokens is None:
        return filled, logits, None, pending

    def block(part):
        states, tokens, slot = part
        raw = gathered(decoder.unembed(states, slot).astype(jnp.float32), decoder.vocab)
        return with_logprobs(tokens, raw, min(MAX_LOGPROBS, raw.shape[-1]))

    # the logits of a whole chunk could be larger than the model
    rows = min(n, LOGPROB_ROWS)

    def in_blocks(x):
        return jnp.pad(x, [(0, -n % rows), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, rows, *x.shape[1:])

    found = lax.map(block, jax.tree.map(in_blocks, (states, batch.next_tokens, slot)))
    return filled, logits, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], found), pending


def _row_of_token(query_start: Int[Array, " b+1"], n: int) -> Int[Array, " n"]:
    """The row of each token of a step; b for padding."""
    return jnp.searchsorted(query_start[1:], jnp.arange(n), side="right", method="compare_all")


def _draw(
    slots: Slots,
    logits: Float[Array, "b vocab"],
    rows: SamplingRows,
    slot: Int[Array, " b"],
    samples: Bool[Array, " b"],
    num_generated: Int[Array, " b"],
    allowed: Int[Array, "b words"] | None = None,
    *,
    axes: Axes = (),
) -> tuple[Slots, Sampled]:
    """Stores the token of each row that samples in its slot. With min_tokens, adjusts logits and counts the tokens."""
    adjusts = rows.min_tokens is not None
    if adjusts:
        rows = _with_dense_rows(rows, slots, slot)
    sampled = sample_divided(logits, dataclasses.replace(rows, allowed=allowed), num_generated, axes)
    place = jnp.where(samples, slot, slots.last_token.shape[0])
    token = jnp.maximum(sampled.token, 0)  # of a row without a token, nothing is used
    slots = dataclasses.replace(slots, last_token=slots.last_token.at[place].set(token, mode="drop"))
    if adjusts:
        assert slots.output_counts is not None, "a slot needs counts before a row adjusts its logits"
        counts = slots.output_counts.at[place, token].add(1, mode="drop")
        slots = dataclasses.replace(slots, output_counts=counts)
    return slots, sampled


def _propose(
    decoder: Adapted,
    cache: jfa.PagedKVCache,
    batch: Batch,
    rows: SamplingRows,
    num_generated: Int[Array, " b"],
    lengths: Int[Array, " b"],
    confidence: Float[Array, ""],
    guess: Int[Array, "b g"] | None = None,
) -> tuple[Cache, Proposed, Int[Array, " b"]]:
    """The tokens that a draft model continues each row with, and how many: up to lengths, none of low probability.

    A row that samples uses the random numbers of each token's place, as the verifying model does: the more alike the
    two distributions are, the more often both draw the same token (arXiv:2408.07978).

    Args:
      guess: the last tokens of each row in the batch, which has no `last`, are guesses, computed at once and kept as
        long as they are what the draft model draws; then NO_TOKEN. With it, the result has odds and other tokens too.
    """
    b, n = batch.slot.shape[0], batch.tokens.shape[0]
    row, places = jnp.arange(b), jnp.arange(1 if guess is None else 1 + guess.shape[1])
    filled, logits, _, _ = _advance(decoder, cache, jnp.zeros(1, jnp.int32), batch)
    assert filled is not None and batch.query_start is not None
    states = filled.states
    if states is not None:  # they stay those after the row's own tokens: what is drawn may be refused
        filled = dataclasses.replace(filled, states=states.take(batch.slot))
    num_guessed = jnp.zeros(b, jnp.int32)
    if guess is None:
        logits = logits[:, None]
    else:
        num_guessed = (guess != NO_TOKEN).sum(1, dtype=jnp.int32)
        last = batch.query_start[1:] - 1 - num_guessed
        logits = logits[jnp.clip(last[:, None] + places, 0, n - 1)]

    def draw(logits: Float[Array, "b p vocab"], place: Int[Array, "b p"]) -> tuple[Proposed, Bool[Array, "b p"]]:
        raw = gathered(logits.astype(jnp.float32), decoder.vocab)
        raw = raw.reshape(-1, raw.shape[-1])
        of_token = jax.tree.map(lambda x: jnp.repeat(x, place.shape[1], axis=0), rows)
        drawn = sample(raw, of_token, (num_generated[:, None] + place).reshape(-1)).token
        token, total = jnp.maximum(drawn, 0), jax.nn.logsumexp(raw, axis=-1)
        odds = jnp.exp(jnp.take_along_axis(raw, token[:, None], axis=-1)[:, 0] - total)
        is_sure = (odds >= confidence) & (drawn != NO_TOKEN)
        found = Proposed(token=token)
        if guess is not None:
            best, others = lax.top_k(raw, min(OTHERS, raw.shape[-1]))
            found = Proposed(token, odds, others, jnp.exp(best - total[:, None]))
        return jax.tree.map(lambda x: x.reshape(*place.shape, *x.shape[1:]), (found, is_sure))

    def entered(found: Proposed, new: Proposed, place: Int[Array, "b p"]) -> Proposed:
        return jax.tree.map(lambda x, y: x.at[place, row[:, None]].set(y, mode="drop"), found, new)

    drawn, is_sure = draw(logits, jnp.broadcast_to(places, (b, len(places))))
    num_right = jnp.zeros(b, jnp.int32)
    if guess is not None:
        is_right = (guess == drawn.token[:, :-1]) & is_sure[:, :-1]
        num_right = jnp.sum(jnp.cumprod(is_right, axis=1, dtype=jnp.int32), axis=1)
        filled = filled.truncate(cache.kv_len + jnp.diff(batch.query_start) - num_guessed + num_right)
    token, active = (jnp.take_along_axis(x, num_right[:, None], axis=1)[:, 0] for x in (drawn.token, is_sure))
    count = jnp.minimum(num_right + active, lengths)
    room = jax.tree.map(lambda x: jnp.zeros((MAX_DRAFT, b, *x.shape[2:]), x.dtype), drawn)
    found = entered(room, drawn, jnp.where(places < count[:, None], places, MAX_DRAFT))

    def goes_on(carry):
        _, _, active, _, count = carry
        return jnp.any(active & (count < lengths))

    def decode_once(carry):
        cache, token, active, found, count = carry
        active &= count < lengths
        states, cache = decoder(token[:, None], lengths=active.astype(jnp.int32), cache=cache, slot=batch.adapter)
        drawn, is_sure = draw(decoder.unembed(states, _of_tokens(batch.adapter)), count[:, None])
        active &= is_sure[:, 0]
        found = entered(found, drawn, jnp.where(active, count, MAX_DRAFT)[:, None])
        return cache, drawn.token[:, 0], active, found, count + active

    filled, _, _, found, count = lax.while_loop(goes_on, decode_once, (filled, token, active, found, count))
    assert filled is not None
    return dataclasses.replace(filled, states=states), found, count


def _of_tokens(slot: Int[Array, " b"] | None) -> Int[Array, "b 1"] | None:
    return None if slot is None else slot[:, None]


def _with_dense_rows(rows: SamplingRows, slots: Slots, slot: Int[Array, " b"]) -> SamplingRows:
    mine = {
        name: jnp.take(getattr(slots, name), slot, axis=0, mode="clip")
        for name in ("prompt_seen", "output_counts", "logit_bias")
    }
    return dataclasses.replace(rows, **mine)


def _verify(
    slots: Slots,
    logits: Float[Array, "n vocab"],
    rows: SamplingRows,
    batch: Batch,
    samples: Bool[Array, " b"],
    num_generated: Int[Array, " b"],
    allowed: Int[Array, "n words"] | None = None,
    *,
    axes: Axes = (),
) -> tuple[Slots, Sampled]:
    """The token that each row samples after each of its tokens, of which all but the first are drafts.

    A draft is accepted if it is the token sampled after the one before it, and that one is accepted. So a row's tokens
    are those that it gets without drafts: each is drawn from the model's own distribution after the accepted ones, with
    the random numbers of its place. A draft that does not depend on these is accepted with the model's probability of
    it, which is what rejection sampling (arXiv:2211.17192) gives for a draft proposed with certainty.
    """
    assert batch.query_start is not None
    n, b = batch.tokens.shape[0], batch.slot.shape[0]
    row, is_padding = _rows_of_tokens(batch)
    seen = _seen(batch)
    depth = (seen < n).sum(1, dtype=jnp.int32) - 1
    slot = batch.slot[row]
    of_token = jax.tree.map(lambda x: x[row], rows)
    adjusts = rows.min_tokens is not None
    if adjusts:
        of_token = _with_dense_rows(of_token, slots, slot)
        # the drafts up to a token count as emitted before its successor
        assert of_token.output_counts is not None and slots.output_counts is not None
        vocab = of_token.output_counts.shape[-1]
        is_draft = (seen < n) & (seen > batch.query_start[row][:, None])
        at = jnp.where(is_draft, jnp.take(batch.tokens, seen, mode="clip"), vocab)
        counts = of_token.output_counts.at[jnp.arange(n)[:, None], at].add(1, mode="drop")
        of_token = dataclasses.replace(of_token, output_counts=counts)
    of_token = dataclasses.replace(of_token, allowed=allowed)
    sampled = sample_divided(logits, of_token, num_generated[row] + jnp.maximum(depth, 0), axes)
    emitted = _accepted(batch, sampled.token) & samples[row] & ~is_padding
    furthest = jnp.zeros(b, jnp.int32).at[row].max(jnp.where(emitted, depth, 0))
    new = jnp.maximum(sampled.token, 0)
    none = slots.last_token.shape[0]
    at = jnp.where(emitted & (depth == furthest[row]), slot, none)
    slots = dataclasses.replace(slots, last_token=slots.last_token.at[at].set(new, mode="drop"))
    if adjusts:
        assert slots.output_counts is not None
        counts = slots.output_counts.at[jnp.where(emitted, slot, none), new].add(1, mode="drop")
        slots = dataclasses.replace(slots, output_counts=counts)
    return slots, sampled


def _keep(cache: jfa.PagedKVCache, batch: Batch, sampled: Int[Array, " n"]) -> jfa.PagedKVCache:
    """Moves the accepted tokens of each row's tree behind its last known one; kv_len is that of before the step.

    sampled: the token after each one, as verify returns them.
    """
    assert batch.query_start is not None and batch.tree_mask is not None
    b, m = batch.slot.shape[0], batch.tree_mask.shape[1]
    row, is_padding = _rows_of_tokens(batch)
    depth = batch.tree_mask.sum(1, dtype=jnp.int32) - 1
    accepted = _accepted(batch, sampled) & ~is_padding
    place = jnp.arange(batch.tokens.shape[0]) - batch.query_start[row]
    kept = jnp.zeros((b, m), jnp.int32).at[jnp.where(accepted, row, b), depth].set(place, mode="drop")
    count = jnp.zeros(b, jnp.int32).at[row].add(accepted)
    return cache.compact(kept, count)


def _enter(
    decoder: Adapted, cache: jfa.PagedKVCache, pending: Pending, batch: Batch, sampled: Int[Array, " n"]
) -> Cache:
    """Brings the accepted tokens of each row into its states; kv_len is that of before the step.

    sampled: the token after each one, as verify returns them.
    """
    n, b = batch.tokens.shape[0], batch.slot.shape[0]
    row, is_padding = _rows_of_tokens(batch)
    accepted = _accepted(batch, sampled) & ~is_padding
    counts = jnp.zeros(b, jnp.int32).at[row].add(accepted)
    start = jnp.pad(jnp.cumsum(counts, dtype=jnp.int32), (1, 0))
    # a row's accepted tokens are its first ones: without the others, rows still come one after another
    kept = jnp.nonzero(accepted, size=n, fill_value=0)[0]
    return decoder.enter(cache, tuple(x[kept] for x in pending), StateRows(batch.slot, start, cache.kv_len == 0))


def _rows_of_tokens(batch: Batch) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """The row of each token of a step, and which tokens are padding."""
    assert batch.query_start is not None
    b = batch.slot.shape[0]
    row = _row_of_token(batch.query_start, batch.tokens.shape[0])
    return jnp.minimum(row, b - 1), row == b


def _seen(batch: Batch) -> Int[Array, "n m"]:
    """The tokens of a step that each one follows, in order, with itself; n for none. Meaningless for padding."""
    assert batch.query_start is not None
    n = batch.tokens.shape[0]
    row, is_padding = _rows_of_tokens(batch)
    token, start = jnp.arange(n), batch.query_start[row][:, None]
    if batch.tree_mask is not None:
        return jnp.where(batch.tree_mask, start + jnp.arange(batch.tree_mask.shape[1]), n)
    return jnp.where((token >= start) & (token <= token[:, None]) & ~is_padding[:, None], token, n)


def _accepted(batch: Batch, sampled: Int[Array, " n"]) -> Bool[Array, " n"]:
    """Which tokens are those that were sampled after the one before them, as are all that they follow.

    The first token of a row, which is no draft, always is.
    """
    assert batch.query_start is not None
    n = batch.tokens.shape[0]
    seen = _seen(batch)
    before = jnp.max(jnp.where(seen < jnp.arange(n)[:, None], seen, -1), axis=1)
    is_wrong = (before >= 0) & (batch.tokens != jnp.take(sampled, before, mode="clip"))
    return ~jnp.any((seen < n) & jnp.take(is_wrong, seen, mode="clip"), axis=1)


def _copy_states(cache: Cache, source: Int[Array, " n"], destination: Int[Array, " n"]) -> Cache:
    assert cache.states is not None
    return dataclasses.replace(cache, states=cache.states.copy(source, destination))


def _adjust(slots: Slots, slot, prompt_seen, output_counts, logit_bias) -> Slots:
    new = {"prompt_seen": prompt_seen, "output_counts": output_counts, "logit_bias": logit_bias}
    return dataclasses.replace(slots, **{name: getattr(slots, name).at[slot].set(x) for name, x in new.items()})
