"""The gradient of linear attention with a decay for each column of a key: what is left after linear_bwd.py's walks.

  gated_linear_attention_dqkv  one program for each chunk and value head: the gradients of its tokens by the states
                               before and after it, and by each other

Weights between tokens are sums over columns, and the terms of which a decay is a factor sums over tokens, one query
after another, as in linear.py. All terms of a decay's gradient are summed directly, as in linear_bwd.py.

Tested in tests/jfa/test_linear_attention.py.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton.linear import ColumnDecays, each, row_of, with_row
from jfa.kernels.triton.tile import chunks, padded, product, whole_tiles
from jfa.types import LinearKernelConfig

Tokens = dict[str, Array]
Place = tuple[Any, Array]  # some columns of a ref, and which of them there are


def gradients(
    tokens: Tokens,
    states: Float[Array, "b h n dk dv"],
    d_states: Float[Array, "b h n dk dv"],
    *,
    scale: float,
    config: LinearKernelConfig,
    interpret: bool,
) -> tuple[Array, ...]:
    """The cotangents of q and k by each value head, in float32 if there are several, of v and log_decay.

    Args:
      tokens: q, k, v, do, and parts of the decays' logarithms, whole and rest, [b, t, heads, columns].
    """
    (b, t, hk, dk), (h, dv), size = tokens["k"].shape, tokens["v"].shape[2:], config.chunk_size
    g, width, columns, like = h // hk, padded(dk), whole_tiles(dv, config.block_v), tokens["v"]

    def of_key_head(head, c, row):
        return row, c, lax.div(head, jnp.int32(g)), 0

    def of_head(head, c, row):
        return row, c, head, 0

    def state(head, c, row):
        return row, head, c, 0, 0

    keys, of_columns = (pl.BlockSpec((None, size, None, width), at) for at in (of_key_head, of_head))
    values = pl.BlockSpec((None, size, None, columns), of_head)
    of_state = pl.BlockSpec((None, None, None, width, columns), state)
    blocks = {"q": keys, "k": keys, "v": values, "do": values, "whole": of_columns, "rest": of_columns}
    d_keys = output((b, t, h, dk), like.dtype if g == 1 else jnp.float32, like=like)
    outs = [(d_keys, of_columns), (d_keys, of_columns), (output(like.shape, like.dtype, like=like), values)]
    outs.append((output((b, t, h, dk), jnp.float32, like=like), of_columns))
    return pl.pallas_call(
        functools.partial(_kernel, names=(*tokens, "state", "d_state"), sizes=(t, dk, dv), config=config, scale=scale),
        name="gated_linear_attention_dqkv",
        grid=(h, pl.cdiv(t, size), b),
        in_specs=[*(blocks[name] for name in tokens), of_state, of_state],
        out_specs=[block for _, block in outs],
        out_shape=[shape for shape, _ in outs],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )(*tokens.values(), states, d_states)


def _kernel(
    *refs,  # of a chunk: the tokens by `names`, the state [dk, dv] before it, and its cotangent after it
    # outputs: dq and dk [chunk, dk], dv [chunk, dv], d_log_decay [chunk, dk]
    names: tuple[str, ...],
    sizes: tuple[int, int, int],
    config: LinearKernelConfig,
    scale: float,
):
    ref = dict(zip(names, refs, strict=False))
    dq_ref, dk_ref, dv_ref, d_log_ref = refs[len(names) :]
    (t, dk, dv), size, block_v, dtype = sizes, config.chunk_size, config.block_v, dv_ref.dtype
    block_d, num_values = chunks(dk, config.block_d)[0][1], pl.cdiv(dv, block_v)
    num_keys, token = pl.cdiv(dk, block_d), jnp.arange(size)
    inside = pl.program_id(1) * size + token < t

    def keys_at(n) -> Place:
        return pl.ds(n * block_d, block_d), n * block_d + jnp.arange(block_d) < dk

    def values_at(p) -> Place:
        return pl.ds(p * block_v, block_v), p * block_v + jnp.arange(block_v) < dv

    def rows(name: str, at: Place) -> Float[Array, "chunk block"]:
        return load(ref[name].at[:, at[0]], mask=inside[:, None] & at[1][None, :], other=0.0)

    def state(name: str, keys: Place, values: Place) -> Float[Array, "block_d block_v"]:
        return load(ref[name].at[keys[0], values[0]], mask=keys[1][:, None] & values[1][None, :], other=0.0)

    def put(to, at: Place, x: Float[Array, "chunk block"]):
        store(to.at[:, at[0]], x.astype(to.dtype), mask=inside[:, None] & at[1][None, :])

    def in_float32(name: str, at: Place) -> Float[Array, "chunk block"]:
        return rows(name, at).astype(jnp.float32)

    def decays_of(at: Place) -> ColumnDecays:
        return ColumnDecays.of(rows("whole", at), rows("rest", at))

    def with_values(p, total):
        return total + product(rows("do", values_at(p)), rows("v", values_at(p)), trans_b=True) * scale

    nothing = jnp.zeros((size, size), jnp.float32)
    d_weights = each(num_values, with_values, nothing)  # [query, key]

    def columns(n, weights):
        at = keys_at(n)
        q, k, decays = in_float32("q", at), in_float32("k", at), decays_of(at)
        zeros = jnp.zeros((size, block_d), jnp.float32)

        def with_states(p, carry):
            read, written, kept = carry
            before, after = state("state", at, values_at(p)), state("d_state", at, values_at(p))
            read = read + product(rows("do", values_at(p)), before, trans_b=True)
            written = written + product(rows("v", values_at(p)), after, trans_b=True)
            return read, written, kept + (before.astype(jnp.float32) * after.astype(jnp.float32)).sum(1)

        read, written, kept = each(num_values, with_states, (zeros, zeros, jnp.zeros(block_d, jnp.float32)))
        read, written = read * (decays.since * scale), written * decays.until_end
        by_state, to_state = read * q, written * k  # terms of which the decays up to a token are factors, and after it

        def of_query(i, carry):
            weights, d_q, d_k, d_log = carry
            decay, query, up_to_i = decays.up_to(i), row_of(q, i)[None, :], token[:, None] <= i
            wanted = decay * row_of(d_weights, i)[:, None]
            terms = wanted * k * query
            before = jnp.cumsum(terms, axis=0) - terms + row_of(by_state, i)[None, :]
            d_log = d_log + jnp.where(up_to_i, before, row_of(to_state, i)[None, :])
            d_q = with_row(d_q, i, row_of(d_q, i) + (wanted * k).sum(0))
            weights = with_row(weights, i, row_of(weights, i) + (decay * k * query).sum(1))
            return weights, d_q, d_k + wanted * query, d_log

        weights, d_q, d_k, d_log = lax.fori_loop(0, size, of_query, (weights, read, written, zeros))
        put(dq_ref, at, d_q)
        put(dk_ref, at, d_k)
        put(d_log_ref, at, d_log + (kept * decays.all)[None, :])
        return weights

    weights = each(num_keys, columns, nothing).astype(dtype)

    def values(p, carry):
        at = values_at(p)

        def by_state(n, total):
            decayed = (in_float32("k", keys_at(n)) * decays_of(keys_at(n)).until_end).astype(dtype)
            return total + product(decayed, state("d_state", keys_at(n), at))

        by_queries = product(weights, rows("do", at), trans_a=True) * scale
        put(dv_ref, at, each(num_keys, by_state, by_queries))
        return carry

    each(num_values, values, 0)
