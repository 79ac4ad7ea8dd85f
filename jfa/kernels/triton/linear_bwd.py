"""The gradient of linear attention as Pallas-Triton kernels, for AMD and NVIDIA GPUs: one decay per head, no delta rule.

Three kernels, without atomics, so that results are bitwise reproducible:

  linear_attention_states   one program for each piece of a head's state; it walks over the chunks and stores the state
                            before each of them
  linear_attention_dstates  the same from the last chunk to the first: the cotangent of the state after each chunk
  linear_attention_dqkv     one program for each chunk and value head: what its tokens and the two states give each other

No program of the last kernel waits for another, and none holds a state: it reads both in pieces. States are stored in
the dtype of the inputs, to which they are rounded for products anyway; their sums are float32. Gradients of queries and
keys are summed over the value heads of a key head by XLA.

The gradient of a logarithm is the sum over all that decays by it. Each of its terms is added up where it is, so that it
is exact also where a decay near 0 leaves nothing: differences of sums over a chunk are not.

Forward: linear.py, with the mathematics. Tested in tests/jfa/test_linear_attention.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import exp2
from jfa.kernels.triton.linear import forgets, parts_of
from jfa.kernels.triton.tile import chunks, kind_of, padded, product, whole_tiles
from jfa.types import DeviceInfo, LinearKernelConfig, LinearOperands, LinearSpec

# (chunk_size, block_v, num_warps, block_d)
_SAFE: dict[tuple[str, str], tuple[int, int, int, int]] = {
    ("cdna", "16 bits"): (64, 64, 4, 64),
    ("cdna", "float32"): (32, 32, 4, 32),
    ("rdna", "16 bits"): (32, 32, 4, 32),
    ("rdna", "float32"): (16, 16, 4, 16),
    ("cuda", "16 bits"): (64, 32, 4, 64),
    ("cuda", "float32"): (16, 16, 4, 32),
}


def default_config(operands: LinearOperands, device: DeviceInfo) -> LinearKernelConfig:
    """Tile sizes without spills on all tested architectures of this kind."""
    precision = "float32" if operands.q.dtype == jnp.float32 else "16 bits"
    chunk, block_v, warps, block_d = _SAFE[kind_of(device), precision]
    return LinearKernelConfig(
        chunk_size=chunk,
        block_v=min(block_v, padded(operands.v.shape[3])),
        num_warps=warps,
        num_stages=1,
        block_d=min(block_d, padded(operands.k.shape[3])),
    )


def why_not(operands: LinearOperands, device: DeviceInfo) -> str | None:
    """The reason why these kernels do not support a call that the forward kernel supports; None if they do."""
    if operands.beta is not None:
        return "the backward kernels have no delta rule"
    return None


def linear_attention_bwd(
    operands: LinearOperands,
    d_out: Float[Array, "b t h dv"],
    d_state: Float[Array, "b h dk dv"],
    *,
    spec: LinearSpec,
    config: LinearKernelConfig,
    interpret: bool,
) -> LinearOperands:
    """The cotangents of the operands."""
    q, k, v = operands.q, operands.k, operands.v
    (b, t, hk, dk), g = k.shape, operands.group_size
    decays = tuple(x.swapaxes(1, 2) for x in parts_of(operands.log_decay))  # a head's tokens are contiguous
    options = dict(config=config, interpret=interpret)
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        states, _ = _walk(k, v, decays, operands.state, scale=None, **options)
        d_states, d_first = _walk(q, d_out, decays, d_state, scale=spec.scale, **options)
        dq, dk_, dv, d_log_decay = _gradients(q, k, v, d_out, decays, states, d_states, scale=spec.scale, **options)
    if g > 1:
        dq, dk_ = (x.reshape(b, t, hk, g, dk).sum(3).astype(q.dtype) for x in (dq, dk_))
    d_log_decay = jnp.where(forgets(operands.log_decay), 0.0, d_log_decay.swapaxes(1, 2))
    return LinearOperands(dq, dk_, dv, log_decay=d_log_decay, state=d_first)


def _walk(
    x: Float[Array, "b t hk dk"],
    y: Float[Array, "b t h dv"],
    decays: tuple[Float[Array, "b h t"], Float[Array, "b h t"]],
    first: Float[Array, "b h dk dv"],
    *,
    scale: float | None,
    config: LinearKernelConfig,
    interpret: bool,
) -> tuple[Float[Array, "b h n dk dv"], Float[Array, "b h dk dv"]]:
    """(the state before each chunk, and the one after the last) of keys x and values y.

    With a scale, the cotangents of the state after each chunk, and of the first state, by queries x and cotangents y of
    the outputs: first is then that of the last state.
    """
    (b, t, hk, dk), (h, dv), block_v = x.shape, y.shape[2:], config.block_v
    num_chunks, g, value_blocks = pl.cdiv(t, config.chunk_size), h // hk, pl.cdiv(dv, block_v)
    tokens, (_, block_d) = whole_tiles(t, config.chunk_size), chunks(dk, config.block_d)[0]

    def keys(head, n, row):
        return row, 0, lax.div(head, jnp.int32(g)), lax.div(n, jnp.int32(value_blocks))

    def values(head, n, row):
        return row, 0, head, lax.rem(n, jnp.int32(value_blocks))

    def numbers(head, n, row):
        return row, head, 0

    def state(head, n, row):
        return row, head, lax.div(n, jnp.int32(value_blocks)), lax.rem(n, jnp.int32(value_blocks))

    def stored(head, n, row):
        return row, head, 0, *state(head, n, row)[2:]

    of_token, of_state = (
        pl.BlockSpec((None, None, tokens), numbers),
        pl.BlockSpec((None, None, block_d, block_v), state),
    )
    return pl.pallas_call(
        functools.partial(_walk_kernel, sizes=(t, dk, dv), config=config, scale=scale),
        name="linear_attention_states" if scale is None else "linear_attention_dstates",
        grid=(h, pl.cdiv(dk, block_d) * value_blocks, b),
        in_specs=[
            pl.BlockSpec((None, tokens, None, block_d), keys),
            pl.BlockSpec((None, tokens, None, block_v), values),
            of_token,
            of_token,
            of_state,
        ],
        out_specs=[pl.BlockSpec((None, None, num_chunks, block_d, block_v), stored), of_state],
        out_shape=[
            output((b, h, num_chunks, dk, dv), y.dtype, like=y),
            output(first.shape, jnp.float32, like=y),
        ],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )(x, y, *decays, first)


def _walk_kernel(
    x_ref,  # [t, block_d]
    y_ref,  # [t, block_v]
    whole_ref,  # [t]
    rest_ref,  # [t]
    first_ref,  # [block_d, block_v]
    states_ref,  # [chunks, block_d, block_v]
    last_ref,  # [block_d, block_v]
    *,
    sizes: tuple[int, int, int],
    config: LinearKernelConfig,
    scale: float | None,
):
    (t, dk, dv), size = sizes, config.chunk_size
    block_d, block_v = last_ref.shape
    num_chunks, value_blocks = pl.cdiv(t, size), pl.cdiv(dv, block_v)
    keys = lax.div(pl.program_id(1), jnp.int32(value_blocks)) * block_d + jnp.arange(block_d) < dk
    columns = lax.rem(pl.program_id(1), jnp.int32(value_blocks)) * block_v + jnp.arange(block_v) < dv
    used = keys[:, None] & columns[None, :]

    def chunk(n, state):
        c = n if scale is None else num_chunks - 1 - n
        store(states_ref.at[c], state.astype(states_ref.dtype), mask=used)
        start = c * size
        inside = start + jnp.arange(size) < t
        x, y = (
            load(ref.at[pl.ds(start, size)], mask=inside[:, None] & valid[None, :], other=0.0)
            for ref, valid in ((x_ref, keys), (y_ref, columns))
        )
        decay = _Decays.of(*(load(ref.at[pl.ds(start, size)], mask=inside, other=0.0) for ref in (whole_ref, rest_ref)))
        factor = decay.until_end if scale is None else decay.since * scale
        y = (y.astype(jnp.float32) * factor[:, None]).astype(y.dtype)
        return state * decay.all + product(x, y, trans_a=True)

    state = lax.fori_loop(0, num_chunks, chunk, load(first_ref, mask=used, other=0.0))
    store(last_ref, state, mask=used)


class _Decays(NamedTuple):
    """The decays of a chunk."""

    between: Float[Array, "chunk chunk"]  # [i, j]: from after token j to token i; 0 if j is after i
    since: Float[Array, " chunk"]  # from the chunk's start to a token, its own included
    until_end: Float[Array, " chunk"]  # after a token
    all: Float[Array, "1 1"]

    @classmethod
    def of(cls, whole: Float[Array, " chunk"], rest: Float[Array, " chunk"]) -> "_Decays":
        wholes, rests, token = jnp.cumsum(whole), jnp.cumsum(rest), jnp.arange(whole.shape[0])
        between = (wholes[:, None] - wholes[None, :]) + (rests[:, None] - rests[None, :])
        total, total_rest = whole.sum(), rest.sum()
        return cls(
            between=exp2(jnp.where(token[:, None] >= token[None, :], between, -jnp.inf)),
            since=exp2(wholes + rests),
            until_end=exp2((total - wholes) + (total_rest - rests)),
            all=exp2(jnp.full((1, 1), total + total_rest)),
        )


def _gradients(
    q: Float[Array, "b t hk dk"],
    k: Float[Array, "b t hk dk"],
    v: Float[Array, "b t h dv"],
    d_out: Float[Array, "b t h dv"],
    decays: tuple[Float[Array, "b h t"], Float[Array, "b h t"]],
    states: Float[Array, "b h n dk dv"],
    d_states: Float[Array, "b h n dk dv"],
    *,
    scale: float,
    config: LinearKernelConfig,
    interpret: bool,
) -> tuple[Float[Array, "b t h dk"], Float[Array, "b t h dk"], Float[Array, "b t h dv"], Float[Array, "b h t"]]:
    """The cotangents of q and k by each value head, in float32 if there are several, of v and of log_decay."""
    (b, t, hk, dk), (h, dv), size = q.shape, v.shape[2:], config.chunk_size
    g, width, columns = h // hk, padded(dk), whole_tiles(dv, config.block_v)

    def of_key_head(head, c, row):
        return row, c, lax.div(head, jnp.int32(g)), 0

    def of_head(head, c, row):
        return row, c, head, 0

    def numbers(head, c, row):
        return row, head, c

    def state(head, c, row):
        return row, head, c, 0, 0

    keys, values = (
        pl.BlockSpec((None, size, None, width), of_key_head),
        pl.BlockSpec((None, size, None, columns), of_head),
    )
    of_token, of_state = (
        pl.BlockSpec((None, None, size), numbers),
        pl.BlockSpec((None, None, None, width, columns), state),
    )
    d_keys = (
        output((b, t, h, dk), q.dtype if g == 1 else jnp.float32, like=v),
        pl.BlockSpec((None, size, None, width), of_head),
    )
    outs = (
        d_keys,
        d_keys,
        (output(v.shape, v.dtype, like=v), values),
        (output((b, h, t), jnp.float32, like=v), of_token),
    )
    return pl.pallas_call(
        functools.partial(_gradients_kernel, sizes=(t, dk, dv), config=config, scale=scale),
        name="linear_attention_dqkv",
        grid=(h, pl.cdiv(t, size), b),
        in_specs=[keys, keys, values, values, of_token, of_token, of_state, of_state],
        out_specs=[block for _, block in outs],
        out_shape=[shape for shape, _ in outs],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )(q, k, v, d_out, *decays, states, d_states)


def _gradients_kernel(
    q_ref,  # [chunk, dk]
    k_ref,  # [chunk, dk]
    v_ref,  # [chunk, dv]
    do_ref,  # [chunk, dv]
    whole_ref,  # [chunk]
    rest_ref,  # [chunk]
    state_ref,  # [dk, dv], before the chunk
    d_state_ref,  # [dk, dv], after the chunk
    dq_ref,  # [chunk, dk]
    dk_ref,  # [chunk, dk]
    dv_ref,  # [chunk, dv]
    d_log_ref,  # [chunk]
    *,
    sizes: tuple[int, int, int],
    config: LinearKernelConfig,
    scale: float,
):
    (t, dk, dv), size, block_v, dtype = sizes, config.chunk_size, config.block_v, v_ref.dtype
    pieces = chunks(dk, config.block_d)
    block_d, num_values = pieces[0][1], pl.cdiv(dv, block_v)
    num_keys = pl.cdiv(dk, block_d)
    token = jnp.arange(size)
    inside = pl.program_id(1) * size + token < t

    def keys_at(n) -> tuple[Any, Array]:
        return pl.ds(n * block_d, block_d), n * block_d + jnp.arange(block_d) < dk

    def values_at(n) -> tuple[Any, Array]:
        return pl.ds(n * block_v, block_v), n * block_v + jnp.arange(block_v) < dv

    def rows(ref, at: tuple[Any, Array]) -> Float[Array, "chunk block"]:
        return load(ref.at[:, at[0]], mask=inside[:, None] & at[1][None, :], other=0.0)

    def state(ref, n, p) -> Float[Array, "block_d block_v"]:
        (keys, used), (columns, valid) = keys_at(n), values_at(p)
        return load(ref.at[keys, columns], mask=used[:, None] & valid[None, :], other=0.0)

    def put(ref, at: tuple[Any, Array], x: Float[Array, "chunk block"]):
        store(ref.at[:, at[0]], x.astype(ref.dtype), mask=inside[:, None] & at[1][None, :])

    decay = _Decays.of(*(load(ref, mask=inside, other=0.0) for ref in (whole_ref, rest_ref)))
    square = jnp.zeros((size, size), jnp.float32)

    def score(n, scores):
        return scores + product(rows(q_ref, keys_at(n)), rows(k_ref, keys_at(n)), trans_b=True)

    scores = _each(num_keys, score, square)
    weights = (scores * decay.between).astype(dtype)

    def values(p, pairs):
        at = values_at(p)
        do = rows(do_ref, at)

        def from_state(n, total):
            return total + product(rows(k_ref, keys_at(n)), state(d_state_ref, n, p))

        later = _each(num_keys, from_state, jnp.zeros((size, block_v), jnp.float32))
        put(dv_ref, at, product(weights, do, trans_a=True) * scale + later * decay.until_end[:, None])
        return pairs + product(do, rows(v_ref, at), trans_b=True)

    pairs = _each(num_values, values, square) * decay.between * scale  # [query, key]
    of_pairs = jnp.where(token[:, None] > token[None, :], pairs * scores, 0.0)
    # token i's decay is part of the pairs of a query from i on and of a key before i
    is_query = token[:, None] >= token[None, :]
    d_log = jnp.where(is_query, jnp.cumsum(of_pairs, axis=1) - of_pairs, 0.0).sum(0)
    pairs = pairs.astype(dtype)

    def keys(n, carry):
        read, written, kept = carry
        at, nothing = keys_at(n), jnp.zeros((size, block_d), jnp.float32)

        def with_states(p, carry):
            dq, dk, kept = carry
            before, after = state(state_ref, n, p), state(d_state_ref, n, p)
            dq = dq + product(rows(do_ref, values_at(p)), before, trans_b=True)
            dk = dk + product(rows(v_ref, values_at(p)), after, trans_b=True)
            return dq, dk, kept + (before.astype(jnp.float32) * after.astype(jnp.float32)).sum()

        dq, dk, kept = _each(num_values, with_states, (nothing, nothing, kept))
        dq, dk = dq * (decay.since * scale)[:, None], dk * decay.until_end[:, None]
        q, k = rows(q_ref, at), rows(k_ref, at)
        put(dq_ref, at, dq + product(pairs, k))
        put(dk_ref, at, dk + product(pairs, q, trans_a=True))
        return read + (dq * q.astype(jnp.float32)).sum(1), written + (dk * k.astype(jnp.float32)).sum(1), kept

    none = jnp.zeros(size, jnp.float32)
    read, written, kept = _each(num_keys, keys, (none, none, jnp.float32(0)))
    # of the state before the chunk by queries from i on, of the state after it by keys before i, and of both
    d_log = d_log + jnp.where(is_query, read[:, None], written[:, None]).sum(0)
    d_log = d_log + (decay.all * kept).sum()
    store(d_log_ref, d_log, mask=inside)


def _each(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """A loop; a single turn is none."""
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)
