"""The compiled steps of generation: the only jit, the only donation.

Every step takes the parameters as a flat tuple of leaves (a nested tree costs more on the host than the step's own
dispatch) and a state that it consumes and returns. A step compiles once per shape: generate.py keeps shapes few.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jfa_models.attention import Cache
from jfa_models.decoder import Decoder
from jfa_models.sampling import Sampled, SamplingRows, finished_by_id, sample, update

# Decoded tokens between two looks of the host at the texts of an offline batch (for stop strings).
STEPS_PER_CALL = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """A batch in the middle of generation.

    Attributes:
      cache: every token of each row but its last.
      token: the last token of each row.
      num_generated: tokens emitted by each row.
      active: rows that go on; the others are carried along and change nothing.
    """

    cache: Cache
    rows: SamplingRows
    token: Int[Array, " b"]
    num_generated: Int[Array, " b"]
    active: Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Emitted:
    """What one step shows to the host: a token per row that was active, and which rows go on after it."""

    sampled: Sampled
    active: Bool[Array, " b"]


class Steps:
    """The compiled steps of one decoder.

    logits(params, tokens [b, t], lengths) -> f32[b, t, vocab], without a cache
    prefill(params, cache, hidden, tokens [b, t], lengths) -> (cache, hidden): t more tokens of each row
    score(params, cache, tokens [b, t], lengths) -> (cache, f32[b, t, vocab]): the same, and the logits behind each
    first(params, cache, hidden, rows, active) -> (state, emitted): the token after the prompt
    decode(params, state) -> (state, emitted): one more token
    decode_many(params, state) -> (state, emitted [n, b], turns): up to n = STEPS_PER_CALL more tokens

    Cache and state are donated, and the hidden state of prefill.
    """

    def __init__(self, decoder: Decoder):
        graphdef, state = nnx.split(decoder)
        treedef = jax.tree.structure(state)

        def step(function: Callable, *, donate: Sequence[int] = ()) -> Callable:
            @functools.partial(jax.jit, donate_argnums=donate)
            @functools.wraps(function)
            def run(params, *args):
                return function(nnx.merge(graphdef, jax.tree.unflatten(treedef, params)), *args)

            return run

        self.logits = step(_logits)
        self.prefill = step(_prefill, donate=(1, 2))
        self.score = step(_score, donate=(1,))
        self.first = step(_first, donate=(1,))
        self.decode = step(_decode, donate=(1,))
        self.decode_many = step(_decode_many, donate=(1,))


def _logits(decoder: Decoder, tokens: Int[Array, "b t"], lengths: Int[Array, " b"] | None) -> Float[Array, "b t vocab"]:
    hidden, _ = decoder(tokens, lengths=lengths)
    return decoder.unembed(hidden)


def _prefill(
    decoder: Decoder,
    cache: Cache,
    hidden: Float[Array, "b hidden"],
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
) -> tuple[Cache, Float[Array, "b hidden"]]:
    """hidden is that of each row's last token so far; a row whose prompt ended in an earlier chunk keeps it."""
    states, filled = decoder(tokens, lengths=lengths, cache=cache)
    assert filled is not None
    last = states[jnp.arange(tokens.shape[0]), jnp.maximum(lengths - 1, 0)]
    return filled, jnp.where((lengths > 0)[:, None], last, hidden)


def _score(
    decoder: Decoder, cache: Cache, tokens: Int[Array, "b t"], lengths: Int[Array, " b"]
) -> tuple[Cache, Float[Array, "b t vocab"]]:
    states, filled = decoder(tokens, lengths=lengths, cache=cache)
    assert filled is not None
    return filled, decoder.unembed(states)


def _first(
    decoder: Decoder,
    cache: Cache,
    hidden: Float[Array, "b hidden"],
    rows: SamplingRows,
    active: Bool[Array, " b"],
) -> tuple[DecodeState, Emitted]:
    none = jnp.zeros(hidden.shape[0], jnp.int32)
    return _emit(decoder, hidden, DecodeState(cache=cache, rows=rows, token=none, num_generated=none, active=active))


def _decode(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Emitted]:
    states, cache = decoder(state.token[:, None], lengths=state.active.astype(jnp.int32), cache=state.cache)
    return _emit(decoder, states[:, 0], dataclasses.replace(state, cache=cache))


def _emit(decoder: Decoder, hidden: Float[Array, "b hidden"], state: DecodeState) -> tuple[DecodeState, Emitted]:
    """Chooses the token behind hidden and counts it."""
    sampled = sample(decoder.unembed(hidden), state.rows, state.num_generated)
    num_generated = state.num_generated + state.active
    ended = finished_by_id(state.rows, sampled.token) | (num_generated >= state.rows.max_tokens)
    active = state.active & ~ended
    state = DecodeState(
        cache=state.cache,
        rows=update(state.rows, sampled.token, state.active),
        token=sampled.token,
        num_generated=num_generated,
        active=active,
    )
    return state, Emitted(sampled=sampled, active=active)


def _decode_many(decoder: Decoder, state: DecodeState) -> tuple[DecodeState, Emitted, Int[Array, ""]]:
    """Steps until no row is active, at most STEPS_PER_CALL; emitted[:turns] is filled."""
    shapes = jax.eval_shape(functools.partial(_decode, decoder), state)[1]
    emitted = jax.tree.map(lambda x: jnp.zeros((STEPS_PER_CALL, *x.shape), x.dtype), shapes)

    def goes_on(carry):
        state, _, turn = carry
        return (turn < STEPS_PER_CALL) & state.active.any()

    def turn_once(carry):
        state, emitted, turn = carry
        state, new = _decode(decoder, state)
        return state, jax.tree.map(lambda x, y: x.at[turn].set(y), emitted, new), turn + 1

    return lax.while_loop(goes_on, turn_once, (state, emitted, jnp.int32(0)))
