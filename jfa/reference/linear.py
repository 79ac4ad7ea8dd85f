"""Linear attention by its recurrence, one token at a time in float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.types import LinearOperands, LinearSpec


def linear_attention(
    operands: LinearOperands, *, spec: LinearSpec
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """The output of each token and the state after the last one."""
    q, k = (jnp.repeat(x.astype(jnp.float32), operands.group_size, axis=2) for x in (operands.q, operands.k))
    v, decay = operands.v.astype(jnp.float32), jnp.exp(operands.log_decay)
    if decay.ndim == 3:
        decay = decay[..., None]

    def token(state, at):
        q, k, v, decay, beta = at
        state = decay[..., None] * state
        if beta is not None:
            v = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", state, k, precision="highest"))
        state = state + k[..., None] * v[..., None, :]
        return state, spec.scale * jnp.einsum("bhkv,bhk->bhv", state, q, precision="highest")

    tokens = tuple(None if x is None else jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, operands.beta))
    state, out = lax.scan(token, operands.state, tokens)
    return jnp.moveaxis(out, 0, 1).astype(operands.v.dtype), state
