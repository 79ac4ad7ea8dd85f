"""What layers have instead of attention: projections around jfa's linear attention, whose states have a fixed size.

The layer of such a mixer in a StateCache is its number among the layers with a state.

A state cannot be taken back to an earlier token. If some of a step's tokens may be dropped again (StateCache.pending),
a mixer therefore leaves its states as they are and keeps what the tokens would bring to them; once it is known which
ones stay, Decoder.enter runs the convolution and the recurrence again over these. For nine tokens of Qwen3-Next, that
is 5 MB to keep; the states after each of them would be 680 MB.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import jfa
from jfa_models.model.attention import Cache, Rotation, Rows
from jfa_models.model.config import DecoderConfig
from jfa_models.model.layers import ACTIVATIONS, Linear, RMSNorm
from jfa_models.model.lora import UNCHANGED, Scope


def state_cache(config: DecoderConfig, *, batch: int, dtype: DTypeLike) -> jfa.StateCache | None:
    """The states of a decoder's layers before the first token; None: no layer has one."""
    if config.states is None:
        return None
    num_heads, key_dim, value_dim = config.states.state_shape
    return jfa.StateCache.create(
        num_layers=len(config.state_layers),
        rows=batch,
        conv_width=config.states.conv_width,
        channels=config.states.channels,
        num_heads=num_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        dtype=dtype,
    )


def pending_bytes(config: DecoderConfig, *, num_tokens: int, dtype: DTypeLike) -> int:
    """Bytes of what so many tokens bring to the states of all layers; 0: no layer has one."""
    per_layer = 0 if config.states is None else config.states.inputs * jnp.dtype(dtype).itemsize
    return num_tokens * len(config.state_layers) * per_layer


class Mamba2(nnx.Module):
    """Each head's state is decayed by its time step, and adds the token's key and value. Source: arXiv:2405.21060."""

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.mamba2 is not None
        self.config = own = config.mamba2
        self.layer = config.state_layers.index(layer)
        self.act = ACTIVATIONS[config.hidden_act]
        linear = functools.partial(Linear, bias=own.proj_bias, dtype=dtype, rngs=rngs)
        self.in_proj = linear(config.hidden_size, own.inner + own.channels + own.num_heads)
        self.conv = CausalConv(own.channels, own.conv_width, bias=own.conv_bias, dtype=dtype)
        self.A_log = nnx.Param(jnp.zeros(own.num_heads, dtype))
        self.D = nnx.Param(jnp.ones(own.num_heads, dtype))
        self.dt_bias = nnx.Param(jnp.zeros(own.num_heads, dtype))
        self.norm = RMSNorm(own.inner, eps=config.norm_eps, num_groups=own.num_groups, dtype=dtype)
        self.out_proj = linear(own.inner, config.hidden_size)

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotation: Rotation | None,
        rows: Rows,
        cache: Cache | None,
        scope: Scope = UNCHANGED,
    ) -> tuple[Float[Array, "b t hidden"], Cache | None]:
        """As Attention; there is nothing to rotate."""
        gate, inputs = jnp.split(self.in_proj(x, scope.at("in_proj")), (self.config.inner,), axis=-1)
        out, cache = self.recurred(inputs, rows, cache)
        gated = out.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))
        out = self.norm(gated, scope.at("norm")).astype(x.dtype)
        return self.out_proj(out, scope.at("out_proj")), cache

    def recurred(
        self, inputs: Float[Array, "b t inputs"], rows: Rows, cache: Cache | None
    ) -> tuple[Float[Array, "b t inner"], Cache | None]:
        """The convolution and the recurrence over what tokens bring to them."""
        own, (b, t) = self.config, inputs.shape[:2]
        past, state, rows = _held(cache, self.layer, rows)
        mixed, step = jnp.split(inputs, (own.channels,), axis=-1)
        mixed, past = self.conv(mixed, rows, past)
        value, key, query = jnp.split(
            self.act(mixed), (own.inner, own.inner + own.num_groups * own.state_size), axis=-1
        )
        query, key = (part.reshape(b, t, own.num_groups, own.state_size) for part in (query, key))
        value = value.reshape(b, t, own.num_heads, own.head_dim)
        step = jnp.clip(_time_step(step, self.dt_bias[...]), *own.time_step_limit)
        added = (value * step[..., None]).astype(value.dtype)
        out, state = _attended(query, key, added, _log_decay(self.A_log[...], step), None, rows, state, scale=1.0)
        out = (out + value * self.D[...][:, None]).reshape(b, t, own.inner)
        return out, _with_states(cache, self.layer, past, state, inputs)


class GatedDelta(nnx.Module):
    """Each token decays its heads' states, and replaces what they hold for its key. Source: arXiv:2412.06464.

    The rows of the projections are in the order of the key heads, as in the checkpoints of Qwen3-Next.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        assert config.gated_delta is not None
        self.config = own = config.gated_delta
        self.layer = config.state_layers.index(layer)
        self.act = ACTIVATIONS[config.hidden_act]
        linear = functools.partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        values = own.num_value_heads * own.value_dim
        self.in_proj_qkvz = linear(config.hidden_size, own.channels + values)
        self.in_proj_ba = linear(config.hidden_size, 2 * own.num_value_heads)
        self.conv = CausalConv(own.channels, own.conv_width, bias=False, dtype=dtype)
        self.A_log = nnx.Param(jnp.zeros(own.num_value_heads, dtype))
        self.dt_bias = nnx.Param(jnp.zeros(own.num_value_heads, dtype))
        self.norm = RMSNorm(own.value_dim, eps=config.norm_eps, dtype=dtype)
        self.out_proj = linear(values, config.hidden_size)

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotation: Rotation | None,
        rows: Rows,
        cache: Cache | None,
        scope: Scope = UNCHANGED,
    ) -> tuple[Float[Array, "b t hidden"], Cache | None]:
        """As Attention; there is nothing to rotate."""
        own, (b, t) = self.config, x.shape[:2]
        # for each key head: its query, its key, the values of its value heads, and their gates
        projected = self.in_proj_qkvz(x, scope.at("in_proj_qkvz")).reshape(b, t, own.num_key_heads, -1)
        of_values = own.num_value_heads // own.num_key_heads * own.value_dim
        *parts, gate = jnp.split(projected, (own.key_dim, 2 * own.key_dim, 2 * own.key_dim + of_values), axis=-1)
        both = self.in_proj_ba(x, scope.at("in_proj_ba")).reshape(b, t, own.num_key_heads, -1)
        parts += jnp.split(both, 2, axis=-1)
        out, cache = self.recurred(jnp.concatenate([part.reshape(b, t, -1) for part in parts], axis=-1), rows, cache)
        out = self.norm(out, scope.at("norm")) * jax.nn.silu(gate.reshape(out.shape).astype(jnp.float32))
        out = out.astype(x.dtype).reshape(b, t, -1)
        return self.out_proj(out, scope.at("out_proj")), cache

    def recurred(
        self, inputs: Float[Array, "b t inputs"], rows: Rows, cache: Cache | None
    ) -> tuple[Float[Array, "b t h dv"], Cache | None]:
        """The convolution and the recurrence over what tokens bring to them."""
        own, (b, t) = self.config, inputs.shape[:2]
        past, state, rows = _held(cache, self.layer, rows)
        mixed, beta, step = jnp.split(inputs, (own.channels, own.channels + own.num_value_heads), axis=-1)
        mixed, past = self.conv(mixed, rows, past)
        keys = own.num_key_heads * own.key_dim
        query, key, value = jnp.split(self.act(mixed), (keys, 2 * keys), axis=-1)
        query, key = (_unit(part.reshape(b, t, own.num_key_heads, own.key_dim)) for part in (query, key))
        value = value.reshape(b, t, own.num_value_heads, own.value_dim)
        log_decay = _log_decay(self.A_log[...], _time_step(step, self.dt_bias[...]))
        beta = jax.nn.sigmoid(beta.astype(jnp.float32))
        out, state = _attended(query, key, value, log_decay, beta, rows, state)
        return out, _with_states(cache, self.layer, past, state, inputs)


class CausalConv(nnx.Module):
    """A convolution of each channel by itself over the last tokens."""

    def __init__(self, channels: int, width: int, *, bias: bool, dtype: DTypeLike):
        self.kernel = nnx.Param(jnp.full((channels, width), 1 / width, dtype))
        self.bias = nnx.Param(jnp.zeros(channels, dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "b t channels"], rows: Rows, past: Float[Array, "b width-1 channels"] | None
    ) -> tuple[Float[Array, "b t channels"], Float[Array, "b width-1 channels"]]:
        """past: the last inputs before x, None: zeros; also returns the last ones after it."""
        bias = None if self.bias is None else self.bias[...]
        if rows.of_states is not None:
            assert past is not None
            tokens = x.reshape(-1, x.shape[2])
            out, past = jfa.ragged_causal_conv(tokens, self.kernel[...], past, bias=bias, **rows.of_states._asdict())
            return out.reshape(x.shape), past
        options = dict(initial_state=past, seq_lengths=rows.lengths, segment_ids=rows.segments)
        return jfa.causal_conv(x, self.kernel[...], bias, **options)


def _attended(
    query: Float[Array, "b t hk dk"],
    key: Float[Array, "b t hk dk"],
    value: Float[Array, "b t h dv"],
    log_decay: Float[Array, "b t h"],
    beta: Float[Array, "b t h"] | None,
    rows: Rows,
    state: Float[Array, "b h dk dv"] | None,
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """The outputs, and the state after each row's last valid token; a row without one keeps its state.

    With rows.of_states, `state` is that of all slots.
    """
    options: dict[str, Any]
    if rows.of_states is not None and value.shape[1] == 1 and rows.query_start is None:
        assert state is not None
        slot, _, is_new = rows.of_states
        held = jnp.where(is_new[:, None, None, None], 0.0, jnp.take(state, slot, axis=0, mode="clip"))
        own = rows._replace(lengths=None, of_states=None)
        out, new = _attended(query, key, value, log_decay, beta, own, held, scale=scale)
        return out, state.at[slot].set(new, mode="drop")
    if rows.of_states is not None:
        assert state is not None
        q, k, v, decay = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value, log_decay))
        beta = None if beta is None else beta.reshape(-1, beta.shape[2])
        options = rows.of_states._asdict() | dict(beta=beta, scale=scale)
        out, state = jfa.ragged_linear_attention(q, k, v, decay, state, **options)
        return out.reshape(value.shape), state
    if state is None or value.shape[1] > 1:
        options = dict(initial_state=state, seq_lengths=rows.lengths, segment_ids=rows.segments)
        return jfa.linear_attention(query, key, value, log_decay, beta=beta, scale=scale, **options)
    q, k, v, decay = (x[:, 0] for x in (query, key, value, log_decay))
    out, new = jfa.linear_attention_step(q, k, v, decay, state, beta=None if beta is None else beta[:, 0], scale=scale)
    if rows.lengths is not None:
        new = jnp.where((rows.lengths > 0)[:, None, None, None], new, state)
    return out[:, None], new


def _time_step(projected: Float[Array, "b t h"], bias: Float[Array, " h"]) -> Float[Array, "b t h"]:
    return jax.nn.softplus(projected.astype(jnp.float32) + bias.astype(jnp.float32))


def _log_decay(log_rate: Float[Array, " h"], step: Float[Array, "b t h"]) -> Float[Array, "b t h"]:
    return -jnp.exp(log_rate.astype(jnp.float32)) * step


def _unit(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x / |x|, in float32, returned in the dtype of x."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _held(cache: Cache | None, layer: int, rows: Rows) -> tuple[Array | None, Array | None, Rows]:
    """The last inputs of the convolution, the state, and where in these the rows have theirs; None: zeros."""
    if cache is None:
        return None, None, rows
    states = cache.states
    assert states is not None, "the cache of a decoder with states has them: see state_cache"
    past, state = states.conv[layer], states.state[layer]
    if states.pending is None:
        return past, state, rows
    # the states of all slots stay, so those of the rows are copied
    assert rows.of_states is not None
    past, state = (jnp.take(x, rows.of_states.slot, axis=0, mode="clip") for x in (past, state))
    own = rows.of_states._replace(slot=jnp.arange(past.shape[0], dtype=jnp.int32))
    return past, state, rows._replace(of_states=own)


def _with_states(
    cache: Cache | None,
    layer: int,
    past: Float[Array, "b width-1 channels"],
    state: Float[Array, "b h dk dv"],
    inputs: Float[Array, "b t inputs"],
) -> Cache | None:
    """The cache after the tokens that brought these inputs, or with them pending."""
    if cache is None or cache.states is None:
        return None
    states = cache.states
    if states.pending is None:
        states = states.write(layer, past, state)
    else:
        states = dataclasses.replace(states, pending=(*states.pending, inputs.reshape(-1, inputs.shape[2])))
    return dataclasses.replace(cache, states=states)
