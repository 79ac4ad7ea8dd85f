"""The gradient of linear attention with the delta rule: the walks over the chunks, as Pallas-Triton kernels.

  delta_attention_states   one program for some value columns of a head, as the forward kernel; it stores the state
                           before each chunk and what the state lacks of each token's value
  delta_attention_dstates  the same from the last chunk to the first: the cotangent of the state after each chunk, and
                           of what each token adds

What a token adds is beta (value - what the state holds for its key). The second is an output of the state like any
other, with keys in the place of queries, so that what is left is the same as without the delta rule: linear_bwd.py.

Tested in tests/jfa/test_linear_attention.py.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton.linear import Decays
from jfa.kernels.triton.tile import chunks, later, load_rows, once, padded, product, sum_of_products, whole_tiles
from jfa.types import LinearKernelConfig

Tokens = dict[str, Array]  # the arrays of the tokens by name: q, k, v, do, and numbers of a head [b, h, t]


def states(
    tokens: Tokens, first: Float[Array, "b h dk dv"], *, config: LinearKernelConfig, interpret: bool
) -> tuple[Float[Array, "b h n dk dv"], Float[Array, "b t h dv"]]:
    """(the state before each chunk, what it lacks of each token's value); tokens: k, v, whole, rest, beta."""
    found, lacked, _ = _walk(tokens, first, of="v", scale=None, config=config, interpret=interpret)
    return found, lacked


def d_states(
    tokens: Tokens, last: Float[Array, "b h dk dv"], *, scale: float, config: LinearKernelConfig, interpret: bool
) -> tuple[Float[Array, "b h n dk dv"], Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """The cotangents of the state after each chunk, of what each token adds, and of the first state.

    last: the cotangent of the last state. tokens: q, k, do, whole, rest, beta.
    """
    return _walk(tokens, last, of="do", scale=scale, config=config, interpret=interpret)


def _walk(
    tokens: Tokens,
    first: Float[Array, "b h dk dv"],
    *,
    of: str,
    scale: float | None,
    config: LinearKernelConfig,
    interpret: bool,
) -> tuple[Float[Array, "b h n dk dv"], Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    (b, t, h, dv), (hk, dk), size, block_v = tokens[of].shape, tokens["k"].shape[2:], config.chunk_size, config.block_v
    num_chunks, length, g, width = pl.cdiv(t, size), whole_tiles(t, size), h // hk, padded(dk)

    def keys(head, n, row):
        return row, 0, lax.div(head, jnp.int32(g)), 0

    def columns(head, n, row):
        return row, 0, head, n

    def numbers(head, n, row):
        return row, head, 0

    def state(head, n, row):
        return row, head, 0, n

    def stored(head, n, row):
        return row, head, 0, 0, n

    of_keys = pl.BlockSpec((None, length, None, width), keys)
    of_values = pl.BlockSpec((None, length, None, block_v), columns)
    of_state = pl.BlockSpec((None, None, width, block_v), state)
    blocks = {"q": of_keys, "k": of_keys, of: of_values}
    of_head = pl.BlockSpec((None, None, length), numbers)
    return pl.pallas_call(
        functools.partial(_kernel, names=tuple(tokens), of=of, sizes=(t, dk, dv), config=config, scale=scale),
        name="delta_attention_states" if scale is None else "delta_attention_dstates",
        grid=(h, pl.cdiv(dv, block_v), b),
        in_specs=[*(blocks.get(name, of_head) for name in tokens), of_state],
        out_specs=[pl.BlockSpec((None, None, num_chunks, width, block_v), stored), of_values, of_state],
        out_shape=[
            output((b, h, num_chunks, dk, dv), tokens[of].dtype, like=tokens[of]),
            output(tokens[of].shape, tokens[of].dtype, like=tokens[of]),
            output(first.shape, jnp.float32, like=tokens[of]),
        ],
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )(*tokens.values(), first)


def _kernel(
    *refs,  # the tokens by `names`: [t, dk], [t, block_v] and [t]; the first state [dk, block_v]
    # outputs: the states [chunks, dk, block_v], values [t, block_v], the last state [dk, block_v]
    names: tuple[str, ...],
    of: str,
    sizes: tuple[int, int, int],
    config: LinearKernelConfig,
    scale: float | None,
):
    ref = dict(zip(names, refs, strict=False))
    first_ref, states_ref, values_ref, last_ref = refs[len(names) :]
    (t, dk, dv), size, dtype = sizes, config.chunk_size, values_ref.dtype
    num_chunks, pieces, token = pl.cdiv(t, size), chunks(dk, config.block_d), jnp.arange(size)
    columns = pl.program_id(1) * config.block_v + jnp.arange(config.block_v) < dv
    before = token[:, None] > token[None, :]

    def used(piece: tuple[int, int]) -> Array:
        return (piece[0] + jnp.arange(piece[1]) < dk)[:, None] & columns[None, :]

    def chunk(n, state):
        c = n if scale is None else num_chunks - 1 - n
        start = c * size
        inside = start + token < t
        mask = inside[:, None] & columns[None, :]
        for piece, part in zip(pieces, state, strict=True):
            store(states_ref.at[c, pl.ds(*piece)], part.astype(dtype), mask=used(piece))

        def keys_of(name: str):
            def piece_of(piece, zero):
                return load_rows(ref[name], start + zero, size, piece, width=dk, inside=inside)

            return once(piece_of, pieces)

        def number(name: str) -> Float[Array, " chunk"]:
            return load(ref[name].at[pl.ds(start, size)], mask=inside, other=0.0)

        at = functools.partial(later, n, pieces)  # of each use of a piece: several are loaded again for each
        k_of = keys_of("k")

        def with_keys(x_of, use: int) -> Float[Array, "chunk chunk"]:
            return sum_of_products((x_of(piece, at(use=use)), k_of(piece, at(use=use))) for piece in pieces)

        def with_state(use: int) -> Float[Array, "chunk block_v"]:
            found = (
                product(k_of(piece, at(use=use)), part.astype(dtype)) for piece, part in zip(pieces, state, strict=True)
            )
            return functools.reduce(jnp.add, found)

        decay, beta = Decays.of(number("whole"), number("rest")), number("beta")
        x = load(ref[of].at[pl.ds(start, size)], mask=mask, other=0.0)
        among = jnp.where(before, with_keys(k_of, 1) * decay.between, 0.0)  # [reading, read]
        if scale is None:
            lacked = x.astype(jnp.float32) - decay.since[:, None] * with_state(2)
            lacked = _solved(among * beta[None, :], lacked)
            store(values_ref.at[pl.ds(start, size)], lacked.astype(dtype), mask=mask)
            added = (lacked * (beta * decay.until_end)[:, None]).astype(dtype)
            return tuple(
                part * decay.all + product(k_of(piece, at(use=5)), added, trans_a=True)
                for piece, part in zip(pieces, state, strict=True)
            )
        q_of = keys_of("q")
        weights = (with_keys(q_of, 3) * decay.between).astype(dtype)
        d_added = product(weights, x, trans_a=True) * scale + with_state(2) * decay.until_end[:, None]
        d_added = _solved(among * beta[:, None], d_added, transposed=True)
        store(values_ref.at[pl.ds(start, size)], d_added.astype(dtype), mask=mask)
        by_queries = (x.astype(jnp.float32) * (decay.since * scale)[:, None]).astype(dtype)
        by_keys = (d_added * (-beta * decay.since)[:, None]).astype(dtype)
        return tuple(
            part * decay.all
            + product(q_of(piece, at(use=4)), by_queries, trans_a=True)
            + product(k_of(piece, at(use=5)), by_keys, trans_a=True)
            for piece, part in zip(pieces, state, strict=True)
        )

    def load_state(piece: tuple[int, int]) -> Float[Array, "piece block_v"]:
        return load(first_ref.at[pl.ds(*piece)], mask=used(piece), other=0.0)

    state = lax.fori_loop(0, num_chunks, chunk, tuple(map(load_state, pieces)))
    for piece, part in zip(pieces, state, strict=True):
        store(last_ref.at[pl.ds(*piece)], part, mask=used(piece))


def _solved(
    lower: Float[Array, "chunk chunk"], x: Float[Array, "chunk block_v"], *, transposed: bool = False
) -> Float[Array, "chunk block_v"]:
    """The y with y + lower y = x, or its transpose: a token at a time. lower is 0 on its diagonal and above."""
    size = x.shape[0]
    token = jnp.arange(size)

    def substitute(n, x: Any):
        # token i is known: take it out of the ones that depend on it
        i = size - 1 - n if transposed else n
        known = jnp.where(token[:, None] == i, x, 0.0).sum(0)
        if transposed:
            factor = jnp.where(token[:, None] == i, lower, 0.0).sum(0)
        else:
            factor = jnp.where(token[None, :] == i, lower, 0.0).sum(1)
        return x - factor[:, None] * known[None, :]

    return lax.fori_loop(0, size - 1, substitute, x)
