"""Linear attention, whose state has a fixed size, and the short convolution that models put before it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from jfa import arguments, backends, checks
from jfa.device import probe
from jfa.meshes import on_any_mesh, spec_of
from jfa.rules import compiled, with_default_rules
from jfa.types import DeviceInfo, Implementation, LinearConfig, LinearOperands, LinearRows, LinearSpec


@with_default_rules
def linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    log_decay: ArrayLike,
    *,
    beta: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    scale: float | None = None,
    seq_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    implementation: Implementation | None = None,
    config: LinearConfig | None = None,
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """Causal attention without a softmax: each head has one matrix as its state, which every token decays and changes.

    With a_t = exp(log_decay_t), the state S [dk, dv] and the output of a head are

      S_t = a_t S_{t-1} + k_t v_t^T,    o_t = scale S_t^T q_t

    and with beta, the delta rule: a token replaces a part of what the state holds for its key,

      S_t = a_t S_{t-1} + beta_t k_t (v_t - (a_t S_{t-1})^T k_t)^T.

    This is Mamba-2 (query C, key B, value dt x, log_decay -exp(A_log) dt, scale 1), RetNet (a constant decay per head),
    GLA (a decay for each column of the key) and Gated DeltaNet (a decay per head, beta, keys of norm 1). Time and
    memory are linear in t. States and sums are float32. First-order reverse-mode gradients of all arrays work on every
    backend. A NaN in a valid token reaches all tokens after it in its row, also where the state is dropped.

    Args:
      query, key: [b, t, hk, dk]; float16, bfloat16 or float32.
      value: [b, t, h, dv], same dtype. h is a multiple of hk: value head h reads key head h // (h / hk).
      log_decay: [b, t, h], or [b, t, h, dk] for a decay of each row of the state; at most 0. -inf: the state is
        dropped before the token.
      beta: [b, t, h], usually 0 to 1; None: no delta rule. The state stays bounded for beta |k|^2 <= 2.
      initial_state: f32[b, h, dk, dv], that before the first token; None: zeros.
      scale: factor of the outputs, a Python number; None: 1 / sqrt(dk).
      seq_lengths: i32[b], number of valid tokens in each row; the rest is padding on the right, is never read, does not
        change the state, and has zeros as its output. None: all.
      segment_ids: i32[b, t]; the state is dropped where they change, so that several documents can be packed into one
        row. initial_state belongs to the first of them.
      implementation: "reference" or "xla" to require that backend; None to choose automatically.
      config: a LinearConfig for "xla"; None: the backend's default.

    Returns:
      [b, t, h, dv] in value's dtype, and the state after the last valid token, f32[b, h, dk, dv].

    Raises:
      ValueError: invalid shapes, dtypes or numbers, log_decay above 0 (not checked if it is traced); the message names
        them.
      UnsupportedError: the call is valid, but the backend does not implement it.

    Sources: arXiv:2405.21060; arXiv:2312.06635; arXiv:2412.06464.
    """
    operands, spec = _checked(query, key, value, log_decay, beta, scale)
    b, t = operands.v.shape[:2]
    state = operands.state if initial_state is None else jnp.asarray(initial_state)
    checks.state("initial_state", state, operands.state.shape)
    operands = operands._replace(state=state)
    lengths = arguments.per_row("seq_lengths", seq_lengths, b)
    if segment_ids is not None:
        begins = _changes(arguments.tokens("segment_ids", segment_ids, (b, t)))
        log_decay = jnp.where(_over(begins, operands.log_decay), -jnp.inf, operands.log_decay)
        operands = operands._replace(log_decay=log_decay)
    valid = None
    if lengths is not None:
        valid = jnp.arange(t) < lengths[:, None]
        given = {name: x for name, x in operands._asdict().items() if name != "state" and x is not None}
        operands = operands._replace(**{name: jnp.where(_over(valid, x), x, 0) for name, x in given.items()})
    checks.decay(operands.log_decay)
    plan = _plan(operands, spec, implementation, config)
    rows = spec_of(operands.v)
    operands = arguments.varying_alike(operands)
    out, state = on_any_mesh(
        functools.partial(_run, plan), operands, specs=lambda: (rows, PartitionSpec(rows[0], rows[2]))
    )
    return out if valid is None else jnp.where(_over(valid, out), out, 0), state


@with_default_rules
def ragged_linear_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    log_decay: ArrayLike,
    states: ArrayLike,
    slot: ArrayLike,
    query_start: ArrayLike,
    *,
    is_new: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    config: LinearConfig | None = None,
) -> tuple[Float[Array, "n h dv"], Float[Array, "slots h dk dv"]]:
    """linear_attention of rows that are concatenated, each with any number of tokens, and with a slot for its state.

    Row r has the tokens query_start[r] up to query_start[r + 1]; tokens after the last row belong to none and have
    zeros as their output. Not differentiable.

    Args:
      query, key: [n, hk, dk]; float16, bfloat16 or float32.
      value: [n, h, dv], same dtype.
      log_decay: [n, h] or [n, h, dk].
      states: f32[slots, h, dk, dv]. Donate them to the jitted function that returns the new ones.
      slot: i32[rows], the slot of each row's state: different ones for rows that have tokens.
      query_start: i32[rows + 1]; begins with 0, does not decrease, at most n (not checked if it is traced).
      is_new: bool[rows], True: the row starts with a state of zeros, whatever is in its slot. None: none is.
      beta: [n, h]; None: no delta rule.
      scale, implementation, config: see linear_attention.

    Returns:
      [n, h, dv] in value's dtype, and the states after each row's last token; those of other slots are unchanged.

    Raises:
      ValueError, UnsupportedError: as linear_attention.
    """
    operands, spec = _checked(query, key, value, log_decay, beta, scale, is_ragged=True)
    states = jnp.asarray(states)
    checks.state("states", states, (*states.shape[:1], *operands.state.shape[1:]))
    rows = _rows(slot, query_start, is_new, num_tokens=operands.v.shape[1])
    operands = operands._replace(state=states)
    is_real = jnp.arange(operands.v.shape[1]) < rows.query_start[-1]
    checks.decay(jnp.where(_over(is_real[None], operands.log_decay), operands.log_decay, 0))
    plan = _plan(operands, spec, implementation, config)
    sharded = spec_of(operands.v), spec_of(states)
    out, states = on_any_mesh(functools.partial(_run_ragged, plan), operands, rows, specs=lambda: sharded)
    return out[0], states


@with_default_rules
def linear_attention_step(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    log_decay: ArrayLike,
    state: ArrayLike,
    *,
    beta: ArrayLike | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b h dv"], Float[Array, "b h dk dv"]]:
    """linear_attention of one more token in each row: reads and writes the state once.

    Args:
      query, key: [b, hk, dk]; float16, bfloat16 or float32.
      value: [b, h, dv], same dtype.
      log_decay: [b, h] or [b, h, dk].
      state: f32[b, h, dk, dv], as linear_attention returns it. Donate it to the jitted function that returns the new
        one.
      beta: [b, h]; None: no delta rule.
      scale: see linear_attention.

    Returns:
      [b, h, dv] in value's dtype, and the new state, f32[b, h, dk, dv].

    Raises:
      ValueError: as linear_attention.
    """
    query, key, value, log_decay, state = (jnp.asarray(x) for x in (query, key, value, log_decay, state))
    beta = None if beta is None else jnp.asarray(beta)
    checks.linear_shapes(query, key, value, log_decay, beta, tokens="batch")
    checks.decay(log_decay)
    b, h, dv = value.shape
    hk, dk = key.shape[1:]
    checks.state("state", state, (b, h, dk, dv))
    spec = LinearSpec(scale=dk**-0.5 if scale is None else float(scale))
    q, k, v, log_decay = (x.astype(jnp.float32) for x in (query, key, value, log_decay))
    q, k = (jnp.repeat(x, h // hk, axis=1) for x in (q * spec.scale, k))
    decay = jnp.exp(log_decay if log_decay.ndim == 3 else log_decay[..., None])
    if beta is not None:
        v = beta.astype(jnp.float32)[..., None] * (v - _times_state(decay * k, state))
    state = decay[..., None] * state + k[..., None] * v[:, :, None]
    return _times_state(q, state).astype(value.dtype), state


def _times_state(x: Float[Array, "b h dk"], state: Float[Array, "b h dk dv"]) -> Float[Array, "b h dv"]:
    # a product: a sum over the rows takes XLA on a CPU several times as long (bench/LOG.md)
    return jnp.einsum("bhk,bhkv->bhv", x, state, precision="highest")


@with_default_rules
def causal_conv(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    initial_state: ArrayLike | None = None,
    seq_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
) -> tuple[Float[Array, "b t c"], Float[Array, "b _ c"]]:
    """A causal convolution of each channel by itself: out_t = bias + sum_i weight[:, i] x_{t - width + 1 + i}.

    Sums are float32.

    Args:
      x: [b, t, channels]; float16, bfloat16 or float32.
      weight: [channels, width]; width is at least 2. The last column is the factor of the token itself.
      bias: [channels].
      initial_state: [b, width - 1, channels], the inputs before the first one; None: zeros.
      seq_lengths: i32[b], number of valid tokens in each row; the rest is padding on the right, with zeros as its
        output. None: all.
      segment_ids: i32[b, t]; another document begins where they change, and tokens of other documents count as zeros.
        initial_state belongs to the first document.

    Returns:
      [b, t, channels] in the dtype of x, and the last width - 1 valid inputs, [b, width - 1, channels], also of x's
      dtype: the initial_state of the next tokens of the last document.

    Raises:
      ValueError: invalid shapes or dtypes; the message names them.
    """
    x, weight = jnp.asarray(x), jnp.asarray(weight)
    bias = None if bias is None else jnp.asarray(bias)
    checks.convolution(x, weight, bias)
    (b, t, channels), width = x.shape, weight.shape[1]
    if initial_state is None:
        state = jnp.zeros((b, width - 1, channels), x.dtype)
    else:
        state = jnp.asarray(initial_state)
        checks.state("initial_state", state, (b, width - 1, channels), dtype=x.dtype)
    lengths = arguments.per_row("seq_lengths", seq_lengths, b)
    documents = None  # the number of each token's document
    if segment_ids is not None:
        documents = jnp.cumsum(_changes(arguments.tokens("segment_ids", segment_ids, (b, t))), axis=1)

    def run(x, state):
        valid = None if lengths is None else _over(jnp.arange(t) < lengths[:, None], x)
        if valid is not None:
            x = jnp.where(valid, x, 0)
        extended = jnp.concatenate([state, x], axis=1)
        end = jnp.full(b, t) if lengths is None else jnp.clip(lengths, 0, t)
        slices = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, width - 1))
        last, seen = slices(extended, end), None
        if documents is not None and t:
            of = jnp.pad(documents, ((0, 0), (width - 1, 0)))  # the first document is number 0
            seen = lambda i: (of[:, i : i + t] == documents)[..., None]  # noqa: E731
            held = slices(of, end)
            last = jnp.where((held == held[:, -1:])[..., None], last, 0)
        out = _taps(extended, weight, bias, seen)
        return (out if valid is None else jnp.where(valid, out, 0)).astype(x.dtype), last

    rows = spec_of(x)
    return on_any_mesh(run, x, state, specs=lambda: (rows, PartitionSpec(rows[0], None, rows[2])))


@with_default_rules
def ragged_causal_conv(
    x: ArrayLike,
    weight: ArrayLike,
    states: ArrayLike,
    slot: ArrayLike,
    query_start: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    is_new: ArrayLike | None = None,
) -> tuple[Float[Array, "n c"], Float[Array, "slots _ c"]]:
    """causal_conv of rows that are concatenated, whose states are in slots. Rows: see ragged_linear_attention.

    Args:
      x: [n, channels]; float16, bfloat16 or float32.
      weight: [channels, width].
      states: [slots, width - 1, channels] in the dtype of x.
      slot, query_start, is_new: see ragged_linear_attention.
      bias: [channels].

    Returns:
      [n, channels] in the dtype of x, and the states after each row's last token; those of other slots are unchanged.

    Raises:
      ValueError: invalid shapes or dtypes; the message names them.
    """
    x, weight, states = jnp.asarray(x), jnp.asarray(weight), jnp.asarray(states)
    bias = None if bias is None else jnp.asarray(bias)
    checks.convolution(x, weight, bias, tokens="tokens")
    before = weight.shape[1] - 1
    checks.state("states", states, (*states.shape[:1], before, x.shape[1]), dtype=x.dtype)
    rows = _rows(slot, query_start, is_new, num_tokens=x.shape[0])

    def run(x, states, rows):
        # each row's state is put before its tokens
        n, num_rows = x.shape[0], rows.slot.shape[0]
        row = jnp.searchsorted(rows.query_start[1:], jnp.arange(n), side="right", method="compare_all")
        place = jnp.arange(n) + before * (jnp.minimum(row, num_rows - 1) + 1)
        held = jnp.take(states, rows.slot, axis=0, mode="clip")
        held = jnp.where(rows.is_new[:, None, None], 0, held)
        first = (rows.query_start[:-1] + before * jnp.arange(num_rows))[:, None] + jnp.arange(before)
        extended = jnp.zeros((n + before * num_rows, x.shape[1]), x.dtype)
        extended = extended.at[place].set(x, unique_indices=True).at[first].set(held, unique_indices=True)
        out = _taps(jnp.pad(extended, ((before, 0), (0, 0))), weight, bias)[place]
        counts = jnp.diff(rows.query_start)
        after = extended[first + counts[:, None]]
        used = jnp.where(counts > 0, rows.slot, states.shape[0] + jnp.arange(num_rows))
        states = states.at[used].set(after, mode="drop", unique_indices=True)
        is_real = jnp.arange(n) < rows.query_start[-1]
        return jnp.where(is_real[:, None], out, 0).astype(x.dtype), states

    sharded = spec_of(x), spec_of(states)
    return on_any_mesh(run, x, states, rows, specs=lambda: sharded)


def _taps(
    x: Float[Array, "*b t+width-1 c"], weight: Float[Array, "c width"], bias: Float[Array, " c"] | None, seen=None
) -> Float[Array, "*b t c"]:
    """The convolution in float32. seen: whether token j of x counts for token t, a function of j's first index."""
    width = weight.shape[1]
    t = x.shape[-2] - width + 1
    out = jnp.float32(0) if bias is None else bias.astype(jnp.float32)
    for i in range(width):
        tap = x[..., i : i + t, :].astype(jnp.float32) * weight[:, i].astype(jnp.float32)
        out = out + (tap if seen is None else jnp.where(seen(i), tap, 0))
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: str
    spec: LinearSpec
    config: LinearConfig | None
    device: DeviceInfo


@compiled
@with_default_rules
def _run(plan: _Plan, operands: LinearOperands) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    if operands.v.size == 0:
        return operands.v, operands.state
    with jax.named_scope(f"jfa.linear_attention.{plan.backend}"):
        return backends.linear(plan.backend).run(operands, plan.spec, plan.config, plan.device)


@compiled
@with_default_rules
def _run_ragged(
    plan: _Plan, operands: LinearOperands, rows: LinearRows
) -> tuple[Float[Array, "1 n h dv"], Float[Array, "slots h dk dv"]]:
    if operands.v.size == 0:
        return operands.v, operands.state
    with jax.named_scope(f"jfa.ragged_linear_attention.{plan.backend}"):
        return backends.linear(plan.backend).run_ragged(operands, rows, plan.spec, plan.config, plan.device)


def _checked(
    query, key, value, log_decay, beta, scale, *, is_ragged: bool = False
) -> tuple[LinearOperands, LinearSpec]:
    """The operands, with a batch axis of 1 if they are ragged, and a state of zeros."""
    query, key, value, log_decay = (jnp.asarray(x) for x in (query, key, value, log_decay))
    beta = None if beta is None else jnp.asarray(beta)
    checks.linear_shapes(query, key, value, log_decay, beta, tokens="tokens" if is_ragged else "batch, length")
    if is_ragged:
        query, key, value, log_decay = (x[None] for x in (query, key, value, log_decay))
        beta = None if beta is None else beta[None]
    b, _, h, dv = value.shape
    dk = key.shape[3]
    operands = LinearOperands(
        q=query,
        k=key,
        v=value,
        log_decay=log_decay.astype(jnp.float32),
        state=jnp.zeros((b, h, dk, dv), jnp.float32),
        beta=None if beta is None else beta.astype(jnp.float32),
    )
    return operands, LinearSpec(scale=dk**-0.5 if scale is None else float(scale))


def _rows(slot: ArrayLike, query_start: ArrayLike, is_new: ArrayLike | None, *, num_tokens: int) -> LinearRows:
    slots = arguments.narrowed(slot)
    checks.per_row("slot", slots, slots.size)
    starts = arguments.per_row("query_start", query_start, slots.size + 1)
    assert starts is not None
    checks.row_starts(starts, num_tokens)
    new = jnp.zeros(slots.shape, bool) if is_new is None else jnp.asarray(is_new)
    if new.shape != slots.shape or new.dtype != jnp.bool_:
        raise ValueError(
            f"is_new must be boolean, one for each of the {slots.size} rows, got {new.dtype} of shape {new.shape}"
        )
    return LinearRows(slots.astype(jnp.int32), starts, new)


def _plan(operands: LinearOperands, spec: LinearSpec, implementation: str | None, config: LinearConfig | None) -> _Plan:
    device = probe()
    name = backends.select(implementation, operands, spec, device, table=backends.linear)
    backend = backends.linear(name)
    if config is None:
        config = backend.default_config(operands, device)
    else:
        backends.check_config(name, backend.config_type, config)
    return _Plan(backend=name, spec=spec, config=config, device=device)


def _changes(ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
    """Whether a token's segment is another than that of the token before it."""
    return jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))[:, : ids.shape[1]]


def _over(mask: Bool[Array, "b t"], x: Array) -> Bool[Array, "b t *_"]:
    """A mask of tokens with the axes of x."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
