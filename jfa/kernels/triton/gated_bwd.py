"""The gradient of linear attention with a decay for each column of a key: what is left after linear_bwd.py's walks.

  gated_linear_attention_dqkv  one program for each chunk and value head: the gradients of its tokens by the states
                               before and after it, and by each other

Weights between tokens are sums over columns, and the terms of which a decay is a factor sums over tokens, one query
after another, as in linear.py. All terms of a decay's gradient are summed directly, as in linear_bwd.py.

Tested in tests/jfa/test_linear_attention.py.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.triton._pallas import pl
from jfa.kernels.triton.linear import Chunk, ColumnDecays, Place, each, row_of, with_row
from jfa.kernels.triton.tile import product
from jfa.types import LinearKernelConfig


def gradients_kernel(
    *refs,  # of a chunk: the tokens by `names`, the state [dk, dv] before it, and its cotangent after it
    # outputs: dq and dk [chunk, dk], dv [chunk, dv], d_log_decay [chunk, dk]
    names: tuple[str, ...],
    sizes: tuple[int, int, int],
    config: LinearKernelConfig,
    scale: float,
):
    ref = dict(zip(names, refs, strict=False))
    dq_ref, dk_ref, dv_ref, d_log_ref = refs[len(names) :]
    (t, dk, dv), size, dtype = sizes, config.chunk_size, dv_ref.dtype
    token = jnp.arange(size)
    chunk = Chunk(ref, pl.program_id(1) * size + token < t, dk, dv, config)
    keys_at, values_at, rows, state, put = chunk.keys_at, chunk.values_at, chunk.rows, chunk.state, chunk.put

    def in_float32(name: str, at: Place) -> Float[Array, "chunk block"]:
        return rows(name, at).astype(jnp.float32)

    def decays_of(at: Place) -> ColumnDecays:
        return ColumnDecays.of(rows("whole", at), rows("rest", at))

    def with_values(p, total):
        return total + product(rows("do", values_at(p)), rows("v", values_at(p)), trans_b=True) * scale

    # sums over the keys before a token: a difference of sums up to it would round them away where a decay is near 0
    is_earlier = (token[:, None] > token[None, :]).astype(jnp.float32)
    nothing = jnp.zeros((size, size), jnp.float32)
    d_weights = each(chunk.num_values, with_values, nothing)  # [query, key]

    def columns(n, weights):
        at = keys_at(n)
        q, k, decays = in_float32("q", at), in_float32("k", at), decays_of(at)
        zeros = jnp.zeros((size, chunk.block_d), jnp.float32)

        def with_states(p, carry):
            read, written, kept = carry
            before, after = state("state", at, values_at(p)), state("d_state", at, values_at(p))
            read = read + product(rows("do", values_at(p)), before, trans_b=True)
            written = written + product(rows("v", values_at(p)), after, trans_b=True)
            return read, written, kept + (before.astype(jnp.float32) * after.astype(jnp.float32)).sum(1)

        read, written, kept = each(chunk.num_values, with_states, (zeros, zeros, jnp.zeros(chunk.block_d, jnp.float32)))
        read, written = read * (decays.since * scale), written * decays.until_end
        by_state, to_state = read * q, written * k  # terms of which the decays up to a token are factors, and after it

        def of_query(i, carry):
            weights, d_q, d_k, d_log = carry
            decay, query, up_to_i = decays.up_to(i), row_of(q, i)[None, :], token[:, None] <= i
            wanted = decay * row_of(d_weights, i)[:, None]
            terms = wanted * k * query
            before = product(is_earlier, terms) + row_of(by_state, i)[None, :]
            d_log = d_log + jnp.where(up_to_i, before, row_of(to_state, i)[None, :])
            d_q = with_row(d_q, i, row_of(d_q, i) + (wanted * k).sum(0))
            weights = with_row(weights, i, row_of(weights, i) + (decay * k * query).sum(1))
            return weights, d_q, d_k + wanted * query, d_log

        weights, d_q, d_k, d_log = lax.fori_loop(0, size, of_query, (weights, read, written, zeros))
        put(dq_ref, at, d_q)
        put(dk_ref, at, d_k)
        put(d_log_ref, at, d_log + (kept * decays.all)[None, :])
        return weights

    weights = each(chunk.num_keys, columns, nothing).astype(dtype)

    def values(p, carry):
        at = values_at(p)

        def by_state(n, total):
            decayed = (in_float32("k", keys_at(n)) * decays_of(keys_at(n)).until_end).astype(dtype)
            return total + product(decayed, state("d_state", keys_at(n), at))

        by_queries = product(weights, rows("do", at), trans_a=True) * scale
        put(dv_ref, at, each(chunk.num_keys, by_state, by_queries))
        return carry

    each(chunk.num_values, values, 0)
