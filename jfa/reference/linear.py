"""Linear attention by its recurrence, one token at a time in float32."""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.types import LinearOperands, LinearRows, LinearSpec


def linear_attention(
    operands: LinearOperands, *, spec: LinearSpec
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """The output of each token and the state after the last one."""
    state, out = lax.scan(functools.partial(_token, spec), operands.state, _tokens(operands))
    return jnp.moveaxis(out, 0, 1).astype(operands.v.dtype), state


def ragged_linear_attention(
    operands: LinearOperands, rows: LinearRows, *, spec: LinearSpec
) -> tuple[Float[Array, "1 n h dv"], Float[Array, "slots h dk dv"]]:
    """The output of each token and the states of all slots. Tokens after the last row belong to none."""

    def token(states, at):
        index, *arrays = at
        row = jnp.searchsorted(rows.query_start[1:], index, side="right")
        begins = (index == rows.query_start[row]) & rows.is_new[row]
        slot = jnp.where(row < rows.slot.shape[0], rows.slot[row], states.shape[0])
        held = jnp.where(begins, 0.0, jnp.take(states, slot[None], axis=0, mode="clip"))
        new, out = _token(spec, held, arrays)
        return states.at[slot[None]].set(new, mode="drop"), out

    states, out = lax.scan(token, operands.state, (jnp.arange(operands.v.shape[1]), *_tokens(operands)))
    is_real = jnp.arange(len(out)) < rows.query_start[-1]
    return jnp.where(is_real[:, None, None], out[:, 0], 0.0)[None].astype(operands.v.dtype), states


def _tokens(operands: LinearOperands) -> tuple[Float[Array, "t b ..."] | None, ...]:
    q, k = (jnp.repeat(x.astype(jnp.float32), operands.group_size, axis=2) for x in (operands.q, operands.k))
    decay = jnp.exp(operands.log_decay)
    decay = decay[..., None] if decay.ndim == 3 else decay
    arrays = (q, k, operands.v.astype(jnp.float32), decay, operands.beta)
    return tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in arrays)


def _token(spec: LinearSpec, state: Float[Array, "b h dk dv"], at) -> tuple[Array, Array]:
    q, k, v, decay, beta = at
    state = decay[..., None] * state
    if beta is not None:
        v = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", state, k, precision="highest"))
    state = state + k[..., None] * v[..., None, :]
    return state, spec.scale * jnp.einsum("bhkv,bhk->bhv", state, q, precision="highest")
