"""The gradient of linear attention as Pallas-Triton kernels, for AMD and NVIDIA GPUs.

Three kernels, without atomics, so that results are bitwise reproducible:

  linear_attention_states   one program for each piece of a head's state; it walks over the chunks and stores the state
                            before each of them
  linear_attention_dstates  the same from the last chunk to the first: the cotangent of the state after each chunk
  linear_attention_dqkv     one program for each chunk and value head: the gradients of its tokens by the two states and
                            by each other; with the delta rule delta_attention_dqkv, after the walks of delta_bwd.py;
                            with decays of columns that of gated_bwd.py, after walks like these

No program of the last kernel waits for another, and none holds a state: it reads both in pieces. States are stored in
the dtype of the inputs, to which they are rounded for products anyway; their sums are float32. Gradients of queries and
keys are summed over the value heads of a key head by XLA.

The gradient of a decay's logarithm is the sum of all terms of which the decay is a factor. Differences of sums over a
chunk would round it away where a decay near 0 makes it tiny. Here it has the rounding of the terms between the tokens
of one chunk, with decays of columns only its own.

Forward: linear.py, with the mathematics. Tested in tests/jfa/test_linear_attention.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton import delta_bwd, gated_bwd
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton.linear import Chunk, ColumnDecays, Decays, Tiles, each, forgets, parts_of, safe_config
from jfa.kernels.triton.tile import chunks, padded, product, whole_tiles
from jfa.types import DeviceInfo, LinearKernelConfig, LinearOperands, LinearSpec

_SAFE: dict[tuple[str, str], tuple[Tiles, Tiles, Tiles]] = {  # for each of linear.NAMES
    ("cdna", "16 bits"): ((64, 64, 4, 64), (16, 64, 4, None), (16, 64, 4, 32)),
    ("cdna", "float32"): ((32, 32, 4, 32), (16, 32, 4, None), (16, 32, 4, 32)),
    ("rdna", "16 bits"): ((32, 16, 4, 32), (16, 16, 2, 32), (16, 16, 4, 16)),
    ("rdna", "float32"): ((16, 16, 4, 16), (16, 16, 8, None), (16, 16, 8, 16)),
    ("cuda", "16 bits"): ((64, 32, 4, 64), (16, 32, 4, 64), (16, 32, 4, 64)),
    ("cuda", "float32"): ((32, 16, 4, 16), (16, 16, 8, 32), (16, 16, 4, 16)),
}


def default_config(operands: LinearOperands, device: DeviceInfo) -> LinearKernelConfig:
    """Tile sizes with few or no spills on all tested architectures of this kind."""
    return safe_config(_SAFE, operands, device)


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
    q, k, v, beta = operands.q, operands.k, operands.v, operands.beta
    (b, t, hk, dk), g = k.shape, operands.group_size
    options: dict[str, Any] = dict(config=config, interpret=interpret)

    def of_head(x: Float[Array, "b t h"]) -> Float[Array, "b h t"]:
        return x.swapaxes(1, 2) if x.ndim == 3 else x  # its tokens are contiguous

    whole, rest = map(of_head, parts_of(operands.log_decay))
    numbers = {"whole": whole, "rest": rest} | ({} if beta is None else {"beta": of_head(beta)})
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        if beta is None:
            states, _ = _walk(k, v, numbers, operands.state, scale=None, **options)
            d_states, d_first = _walk(q, d_out, numbers, d_state, scale=spec.scale, **options)
            tokens = {"q": q, "k": k, "v": v, "do": d_out}
        else:
            states, lacked = delta_bwd.states({"k": k, "v": v} | numbers, operands.state, **options)
            read = {"q": q, "k": k, "do": d_out} | numbers
            d_states, d_added, d_first = delta_bwd.d_states(read, d_state, scale=spec.scale, **options)
            tokens = {"q": q, "k": k, "v": lacked, "do": d_out, "d_added": d_added}
        found = _gradients(tokens | numbers, states, d_states, scale=spec.scale, **options)
    dq, dk_, dv, d_log_decay, *d_beta = found
    if g > 1:
        dq, dk_ = (x.reshape(b, t, hk, g, dk).sum(3).astype(q.dtype) for x in (dq, dk_))
    d_log_decay = jnp.where(forgets(operands.log_decay), 0.0, of_head(d_log_decay))
    return LinearOperands(dq, dk_, dv, d_log_decay, d_first, of_head(d_beta[0]) if d_beta else None)


def _walk(
    x: Float[Array, "b t hk dk"],
    y: Float[Array, "b t h dv"],
    numbers: dict[str, Float[Array, "b h t"] | Float[Array, "b t h dk"]],  # parts of the decays' logarithms
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

    def of_head(head, n, row):
        return row, head, 0

    def of_columns(head, n, row):
        return row, 0, head, lax.div(n, jnp.int32(value_blocks))

    def state(head, n, row):
        return row, head, lax.div(n, jnp.int32(value_blocks)), lax.rem(n, jnp.int32(value_blocks))

    def stored(head, n, row):
        return row, head, 0, *state(head, n, row)[2:]

    of_token, of_state = (
        pl.BlockSpec((None, None, tokens), of_head),
        pl.BlockSpec((None, None, block_d, block_v), state),
    )
    name = "linear_attention"
    if numbers["whole"].ndim == 4:
        of_token, name = pl.BlockSpec((None, tokens, None, block_d), of_columns), "gated_linear_attention"
    return pl.pallas_call(
        functools.partial(_walk_kernel, sizes=(t, dk, dv), config=config, scale=scale),
        name=f"{name}_states" if scale is None else f"{name}_dstates",
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
    )(x, y, numbers["whole"], numbers["rest"], first)


def _walk_kernel(
    x_ref,  # [t, block_d]
    y_ref,  # [t, block_v]
    whole_ref,  # [t] or [t, block_d]
    rest_ref,  # as whole_ref
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
        by_columns = whole_ref.ndim == 2
        mask = inside[:, None] & keys[None, :] if by_columns else inside
        parts = (load(ref.at[pl.ds(start, size)], mask=mask, other=0.0) for ref in (whole_ref, rest_ref))
        decay = (ColumnDecays if by_columns else Decays).of(*parts)
        factor = decay.until_end if scale is None else decay.since * scale
        if by_columns:
            x = (x.astype(jnp.float32) * factor).astype(x.dtype)
        else:
            y = (y.astype(jnp.float32) * factor[:, None]).astype(y.dtype)
        kept = decay.all[:, None] if by_columns else decay.all
        return state * kept + product(x, y, trans_a=True)

    state = lax.fori_loop(0, num_chunks, chunk, load(first_ref, mask=used, other=0.0))
    store(last_ref, state, mask=used)


def _gradients(
    tokens: dict[str, Array],
    states: Float[Array, "b h n dk dv"],
    d_states: Float[Array, "b h n dk dv"],
    *,
    scale: float,
    config: LinearKernelConfig,
    interpret: bool,
) -> tuple[Array, ...]:
    """The cotangents of q and k by each value head, in float32 if there are several, of v, log_decay, and beta if any.

    Args:
      tokens: q, k, v and do [b, t, heads, columns]; whole and rest, parts of the decays' logarithms, [b, h, t] or
        [b, t, h, dk]. With the delta rule also d_added, the cotangent of what is added, and beta; v is what the state
        lacked.
    """
    (b, t, hk, dk), (h, dv), size = tokens["k"].shape, tokens["v"].shape[2:], config.chunk_size
    g, width, columns, like = h // hk, padded(dk), whole_tiles(dv, config.block_v), tokens["v"]

    def of_key_head(head, c, row):
        return row, c, lax.div(head, jnp.int32(g)), 0

    def of_head(head, c, row):
        return row, c, head, 0

    def number(head, c, row):
        return row, head, c

    def state(head, c, row):
        return row, head, c, 0, 0

    keys, of_d_keys = (pl.BlockSpec((None, size, None, width), at) for at in (of_key_head, of_head))
    values = pl.BlockSpec((None, size, None, columns), of_head)
    of_token, d_number = pl.BlockSpec((None, None, size), number), output((b, h, t), jnp.float32, like=like)
    name, kernel = "delta_attention" if "beta" in tokens else "linear_attention", _gradients_kernel
    if tokens["whole"].ndim == 4:
        of_token, d_number = of_d_keys, output((b, t, h, dk), jnp.float32, like=like)
        name, kernel = "gated_linear_attention", gated_bwd.gradients_kernel
    of_state = pl.BlockSpec((None, None, None, width, columns), state)
    blocks = {"q": keys, "k": keys, "v": values, "do": values, "d_added": values}
    d_keys = output((b, t, h, dk), like.dtype if g == 1 else jnp.float32, like=like)
    outs = [(d_keys, of_d_keys), (d_keys, of_d_keys), (output(like.shape, like.dtype, like=like), values)]
    outs += [(d_number, of_token)] * (2 if "beta" in tokens else 1)
    return pl.pallas_call(
        functools.partial(kernel, names=(*tokens, "state", "d_state"), sizes=(t, dk, dv), config=config, scale=scale),
        name=f"{name}_dqkv",
        grid=(h, pl.cdiv(t, size), b),
        in_specs=[*(blocks.get(name, of_token) for name in tokens), of_state, of_state],
        out_specs=[block for _, block in outs],
        out_shape=[shape for shape, _ in outs],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )(*tokens.values(), states, d_states)


def _gradients_kernel(
    *refs,  # of a chunk: the tokens by `names`, the state [dk, dv] before it, and its cotangent after it
    # outputs: dq and dk [chunk, dk], dv [chunk, dv], numbers of the tokens: d_log_decay, d_beta if there is one
    names: tuple[str, ...],
    sizes: tuple[int, int, int],
    config: LinearKernelConfig,
    scale: float,
):
    ref = dict(zip(names, refs, strict=False))
    dq_ref, dk_ref, dv_ref, d_log_ref, *d_beta_ref = refs[len(names) :]
    (t, dk, dv), size, block_v, dtype = sizes, config.chunk_size, config.block_v, dv_ref.dtype
    token = jnp.arange(size)
    chunk = Chunk(ref, pl.program_id(1) * size + token < t, dk, dv, config)
    keys_at, values_at, rows, state, number, put = (
        *(chunk.keys_at, chunk.values_at, chunk.rows, chunk.state, chunk.number, chunk.put),
    )
    inside, block_d, num_keys, num_values = chunk.inside, chunk.block_d, chunk.num_keys, chunk.num_values

    def in_float32(x: Array) -> Array:
        return x.astype(jnp.float32)

    decays, beta = Decays.of(number("whole"), number("rest")), number("beta")[:, None] if d_beta_ref else None
    between, since, until_end = decays.between, decays.since[:, None], decays.until_end[:, None]
    is_before = token[:, None] > token[None, :]

    def added(at) -> Float[Array, "chunk block_v"]:
        return rows("v", at) if beta is None else (in_float32(rows("v", at)) * beta).astype(dtype)

    def erased(at) -> Float[Array, "chunk block_v"]:
        """The cotangent of what the state holds for the keys."""
        assert beta is not None
        return (in_float32(rows("d_added", at)) * -beta).astype(dtype)

    def products(name: str) -> Float[Array, "chunk chunk"]:
        def one(n, total):
            return total + product(rows(name, keys_at(n)), rows("k", keys_at(n)), trans_b=True)

        return each(num_keys, one, jnp.zeros((size, size), jnp.float32))

    scores, nothing = products("q"), jnp.zeros((size, size), jnp.float32)
    weights = (scores * between).astype(dtype)

    def values(p, pairs):
        at = values_at(p)
        do, u = rows("do", at), added(at)
        by_queries = pairs[0] + product(do, u, trans_b=True)
        if beta is not None:
            d_added = in_float32(rows("d_added", at))
            put(dv_ref, at, d_added * beta)
            d_beta = pairs[2] + (d_added * in_float32(rows("v", at))).sum(1)
            return by_queries, pairs[1] + product(erased(at), u, trans_b=True), d_beta

        def by_state(n, total):
            return total + product(rows("k", keys_at(n)), state("d_state", keys_at(n), values_at(p)))

        after = each(num_keys, by_state, jnp.zeros((size, block_v), jnp.float32))
        put(dv_ref, at, product(weights, do, trans_a=True) * scale + after * until_end)
        return (by_queries,)

    none = jnp.zeros(size, jnp.float32)
    by_queries, *more = each(num_values, values, (nothing,) if beta is None else (nothing, nothing, none))
    by_queries = by_queries * between * scale  # [query, key]
    terms, by_keys = by_queries * scores, None
    by_queries = by_queries.astype(dtype)
    if beta is not None:
        store(d_beta_ref[0], more[1], mask=inside)
        by_keys = jnp.where(is_before, more[0] * between, 0.0)  # [reading key, key]
        terms = terms + by_keys * products("k")
        by_keys = by_keys.astype(dtype)
    # the decay of token i is part of the terms of a query (or reading key) from i on and of a key before i
    terms, is_after = jnp.where(is_before, terms, 0.0), token[:, None] >= token[None, :]
    d_log = jnp.where(is_after, jnp.cumsum(terms, axis=1) - terms, 0.0).sum(0)

    def keys(n, carry):
        read, written, kept = carry
        at, zeros = keys_at(n), jnp.zeros((size, block_d), jnp.float32)

        def with_states(p, carry):
            columns = values_at(p)
            before, after = (state(name, keys_at(n), values_at(p)) for name in ("state", "d_state"))
            dq, dk, kept = carry[:3]
            dq = dq + product(rows("do", columns), before, trans_b=True)
            dk = dk + product(added(columns), after, trans_b=True)
            more = [part + product(erased(columns), before, trans_b=True) for part in carry[3:]]
            return dq, dk, kept + (in_float32(before) * in_float32(after)).sum(), *more

        start = (zeros, zeros, kept) if beta is None else (zeros, zeros, kept, zeros)
        dq, dk, kept, *more = each(num_values, with_states, start)
        dq, dk = dq * (since * scale), dk * until_end
        q, k = rows("q", at), rows("k", at)
        read, written = read + (dq * in_float32(q)).sum(1), written + (dk * in_float32(k)).sum(1)
        put(dq_ref, at, dq + product(by_queries, k))
        dk = dk + product(by_queries, q, trans_a=True)
        if by_keys is not None:
            by_state = more[0] * since
            read = read + (by_state * in_float32(k)).sum(1)
            dk = dk + by_state + product(by_keys, k) + product(by_keys, k, trans_a=True)
        put(dk_ref, at, dk)
        return read, written, kept

    read, written, kept = each(num_keys, keys, (none, none, jnp.float32(0)))
    # of the state before the chunk by queries from i on, of the state after it by keys before i, and of both
    d_log = d_log + jnp.where(is_after, read[:, None], written[:, None]).sum(0)
    store(d_log_ref, d_log + (decays.all * kept).sum(), mask=inside)
