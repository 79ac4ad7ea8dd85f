"""Linear attention in chunks: the tokens of a chunk attend to each other, and to the state before it, by products.

A chunk of C tokens costs products of [C, C] and [C, dk] matrices, and one read and one write of the state. The backward
pass computes each chunk again: both passes need memory for the inputs and one state per chunk.

All exponents are sums of logarithms of decays between two tokens, the later one minus the earlier one, so none is
positive: quotients of cumulative decays, which overflow, never occur. With the delta rule, what a token adds depends on
what the tokens of its chunk before it have added; that is a triangular system, solved by forward substitution.

Sources: arXiv:2405.21060, section 6 (decays of a head); arXiv:2312.06635, section 4 (decays of columns);
arXiv:2412.06464, section 3 (delta rule). Tested in tests/jfa/test_linear_attention.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.types import DeviceInfo, LinearConfig, LinearOperands, LinearRows, LinearSpec

_CHUNK = 64
_PIECE = 16  # of a chunk, within which decays of columns are not a factor of a matrix product
_FORGETS = -1e4  # e^-10,000 is 0, and sums of such logarithms are exact


def default_config(operands: LinearOperands, device: DeviceInfo) -> LinearConfig:
    """Chunks of 64 tokens, or of all tokens if there are fewer."""
    t = operands.q.shape[1]
    return LinearConfig(chunk_size=max(1, min(_CHUNK, t)) if isinstance(t, int) else _CHUNK)


def why_not(operands: LinearOperands, spec: LinearSpec, device: DeviceInfo) -> str | None:
    """The reason why this backend does not support this call; None if it does."""
    if not isinstance(operands.q.shape[1], int):
        return f"the number of chunks is static, but query has the symbolic shape {operands.q.shape}"
    return None


def linear_attention(
    operands: LinearOperands, *, spec: LinearSpec, config: LinearConfig
) -> tuple[Float[Array, "b t h dv"], Float[Array, "b h dk dv"]]:
    """The output of each token and the state after the last one, as reference.linear_attention defines them."""
    (b, t, h, dv), size = operands.v.shape, config.chunk_size

    def in_chunks(x: Float[Array, "b hk t ..."]) -> Float[Array, "n b hk c ..."]:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -t % size), *[(0, 0)] * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    tokens = jax.tree.map(in_chunks, _heads_first(operands, spec))
    state = _grouped(operands.state, tokens[1].shape[2])
    state, out = lax.scan(jax.checkpoint(_chunk), state, tokens)
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(b, -1, h, dv)[:, :t]
    return out.astype(operands.v.dtype), _ungrouped(state)


def ragged_linear_attention(
    operands: LinearOperands, rows: LinearRows, *, spec: LinearSpec, config: LinearConfig
) -> tuple[Float[Array, "1 n h dv"], Float[Array, "slots h dk dv"]]:
    """The output of each token and all states, as reference.ragged_linear_attention defines them.

    Rows of one token are computed together; the chunks of all other rows, of which there are few, one after another.
    """
    (_, n, h, dv), size, states = operands.v.shape, config.chunk_size, operands.state
    num_rows = rows.slot.shape[0]
    tokens = _heads_first(operands, spec)
    hk = tokens[1].shape[1]
    counts = jnp.diff(rows.query_start)

    first = jnp.minimum(rows.query_start[:-1], n - 1)
    alone = jax.tree.map(lambda x: jnp.moveaxis(x[:, :, first], 2, 0)[:, 0, :, None], tokens)
    held = jnp.where(rows.is_new[:, None, None, None], 0.0, jnp.take(states, rows.slot, axis=0, mode="clip"))
    after, out_alone = _chunk(_grouped(held, hk), alone)
    has_one = counts == 1
    nowhere = states.shape[0] + jnp.arange(num_rows)
    states = states.at[jnp.where(has_one, rows.slot, nowhere)].set(_ungrouped(after), mode="drop", unique_indices=True)
    # one more chunk, so that the last slice stays in bounds
    out = jnp.zeros((hk, n + size, h // hk, dv), jnp.float32)
    place = jnp.where(has_one, rows.query_start[:-1], n + size + jnp.arange(num_rows))
    out = out.at[:, place].set(jnp.moveaxis(out_alone[:, :, 0], 0, 1), mode="drop", unique_indices=True)

    tokens = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, size), *[(0, 0)] * (x.ndim - 3))), tokens)
    num_chunks = jnp.where(has_one, 0, (counts + size - 1) // size)
    ends = jnp.cumsum(num_chunks)

    def one_chunk(i, carry):
        states, out = carry
        row = jnp.searchsorted(ends, i, side="right", method="compare_all")
        number = i - (ends[row] - num_chunks[row])  # of the row's chunks
        start = rows.query_start[row] + number * size
        valid = jnp.arange(size) < rows.query_start[row + 1] - start

        def of_chunk(x):
            x = lax.dynamic_slice_in_dim(x, start, size, axis=2)
            return jnp.where(valid.reshape(-1, *[1] * (x.ndim - 3)), x, 0)  # a token of zeros changes no state

        slot = rows.slot[row]
        state = lax.dynamic_index_in_dim(states, slot, keepdims=True)
        state = jnp.where(rows.is_new[row] & (number == 0), 0.0, state)
        state, new = _chunk(_grouped(state, hk), jax.tree.map(of_chunk, tokens))
        old = lax.dynamic_slice_in_dim(out, start, size, axis=1)
        out = lax.dynamic_update_slice_in_dim(out, jnp.where(valid[:, None, None], new[0], old), start, axis=1)
        return lax.dynamic_update_slice_in_dim(states, _ungrouped(state), slot, axis=0), out

    states, out = lax.fori_loop(0, ends[-1], one_chunk, (states, out))
    out = jnp.swapaxes(out[:, :n], 0, 1).reshape(1, n, h, dv)
    return out.astype(operands.v.dtype), states


_Tokens = tuple[
    Float[Array, "b hk c dk"],  # queries
    Float[Array, "b hk c dk"],  # keys
    Float[Array, "b hk c g dv"],  # values
    Float[Array, "b hk c g"] | Float[Array, "b h c 1 dk"],  # log_decay
    Float[Array, "b hk c g"] | None,  # beta
]


def _heads_first(operands: LinearOperands, spec: LinearSpec) -> _Tokens:
    """The tokens in float32. With decays of columns, hk = h and g = 1: they are factors of the keys of a value head."""
    q, k, by_columns = operands.q, operands.k, operands.log_decay.ndim == 4
    if by_columns:
        q, k = (jnp.repeat(x, operands.group_size, axis=2) for x in (q, k))
    hk, g = k.shape[2], operands.v.shape[2] // k.shape[2]

    def split(x: Array, *shape: int) -> Float[Array, "b hk t ..."]:
        return jnp.swapaxes(x.astype(jnp.float32).reshape(*x.shape[:2], hk, *shape), 1, 2)

    dk, dv, beta = k.shape[3], operands.v.shape[3], operands.beta
    return (
        split(q, dk) * spec.scale,
        split(k, dk),
        split(operands.v, g, dv),
        split(operands.log_decay, *((1, dk) if by_columns else (g,))),
        None if beta is None else split(beta, g),
    )


def _chunk(
    state: Float[Array, "b hk dk g dv"], tokens: _Tokens
) -> tuple[Float[Array, "b hk dk g dv"], Float[Array, "b hk c g dv"]]:
    """The state after a chunk, and the outputs of its tokens."""
    q, k, v, log_decay, beta = tokens
    decays = _ByHeads(_sums(log_decay)) if log_decay.ndim == 4 else _ByColumns(_sums(log_decay[:, :, :, 0]))
    if beta is not None:
        added_before = jnp.tril(decays.weights(k, k), -1) * _swapped(beta)[..., None]
        wanted = beta[..., None] * (v - decays.read(k, state))
        v = _swapped(_solved(added_before, _swapped(wanted)))
    near = _swapped(_matmul(decays.weights(q, k), _swapped(v)))
    return decays.write(state, k, v), decays.read(q, state) + near


def _solved(lower: Float[Array, "*b c c"], right: Float[Array, "*b c n"]) -> Float[Array, "*b c n"]:
    """The x with x + lower x = right. lower is zero on and above its diagonal.

    1 + lower is inverted by halves, all blocks of a size at once. lax.linalg.triangular_solve would call BLAS for one
    matrix after another on a CPU, with threads that wait for each other where cores are busy (bench/LOG.md).
    """
    c, batch = lower.shape[-1], lower.shape[:-2]
    size = 1 << (c - 1).bit_length()
    lower = jnp.pad(lower, [(0, 0)] * len(batch) + [(0, size - c)] * 2)
    inverse, half = jnp.ones((*batch, size, 1, 1), lower.dtype), 1  # of blocks on the diagonal
    while half < size:
        blocks = lower.reshape(*batch, size // (2 * half), 2 * half, size // (2 * half), 2 * half)
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)[..., half:, :half]
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        both = jnp.concatenate([-_matmul(_matmul(second, below), first), second], axis=-1)
        above = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        inverse, half = jnp.concatenate([above, both], axis=-2), 2 * half
    return _matmul(inverse[..., 0, :c, :c], right)


def _grouped(state: Float[Array, "b h dk dv"], hk: int) -> Float[Array, "b hk dk g dv"]:
    b, h, dk, dv = state.shape
    return jnp.moveaxis(state.reshape(b, hk, h // hk, dk, dv), 2, 3)


def _ungrouped(state: Float[Array, "b hk dk g dv"]) -> Float[Array, "b h dk dv"]:
    b, hk, dk, g, dv = state.shape
    return jnp.moveaxis(state, 3, 2).reshape(b, hk * g, dk, dv)


class _ByHeads(NamedTuple):
    """The decays of a chunk: one number for each token and value head."""

    since: Float[Array, "2 b hk c g"]  # _sums

    def read(self, x: Float[Array, "b hk c dk"], state: Float[Array, "b hk dk g dv"]) -> Float[Array, "b hk c g dv"]:
        """What the state before the chunk holds for queries or keys, when their tokens come."""
        return jnp.exp(self.since.sum(0))[..., None] * _einsum("bhck,bhkgv->bhcgv", x, state)

    def weights(self, x: Float[Array, "b hk c dk"], k: Float[Array, "b hk c dk"]) -> Float[Array, "b hk g c c"]:
        """Products of queries or keys with the keys up to their own, and the decays from then on."""
        since = jnp.swapaxes(self.since, -1, -2)
        between = (since[..., :, None] - since[..., None, :]).sum(0)
        products = _einsum("bhik,bhjk->bhij", x, k)[:, :, None]
        return products * jnp.exp(jnp.where(_earlier(x.shape[2]), between, -jnp.inf))

    def write(self, state, k: Float[Array, "b hk c dk"], v: Float[Array, "b hk c g dv"]):
        """The state after the chunk, whose tokens add v for their keys."""
        until_end = jnp.exp((self.since[..., -1:, :] - self.since).sum(0))
        whole = jnp.exp(self.since.sum(0)[..., -1, :])[..., None, :, None]
        return whole * state + _einsum("bhck,bhcgv->bhkgv", k, until_end[..., None] * v)


class _ByColumns(NamedTuple):
    """The decays of a chunk: one number for each token, head and column of its key; hk = h, g = 1."""

    since: Float[Array, "2 b h c dk"]

    def read(self, x: Float[Array, "b h c dk"], state: Float[Array, "b h dk 1 dv"]) -> Float[Array, "b h c 1 dv"]:
        return _einsum("bhck,bhkgv->bhcgv", x * jnp.exp(self.since.sum(0)), state)

    def weights(self, x: Float[Array, "b h c dk"], k: Float[Array, "b h c dk"]) -> Float[Array, "b h 1 c c"]:
        """By pieces of the chunk: decays up to the start of a query's piece are factors of keys before it."""
        size = x.shape[2]
        rows = []
        for start in range(0, size, _PIECE):
            end = min(start + _PIECE, size)
            mine = self.since[..., start:end, :]
            own = (mine[..., :, None, :] - mine[..., None, :, :]).sum(0)
            own = jnp.exp(jnp.where(_earlier(end - start)[..., None], own, -jnp.inf))
            parts = [(x[:, :, start:end, None] * own * k[:, :, None, start:end]).sum(-1)]
            if start:
                border = self.since[..., start - 1 : start, :]
                query = x[:, :, start:end] * jnp.exp((mine - border).sum(0))
                key = k[:, :, :start] * jnp.exp((border - self.since[..., :start, :]).sum(0))
                parts.insert(0, _einsum("bhik,bhjk->bhij", query, key))
            rows.append(jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, 0), (0, 0), (0, size - end))))
        return jnp.concatenate(rows, axis=2)[:, :, None]

    def write(self, state, k: Float[Array, "b h c dk"], v: Float[Array, "b h c 1 dv"]):
        until_end = jnp.exp((self.since[..., -1:, :] - self.since).sum(0))
        whole = jnp.exp(self.since.sum(0)[..., -1, :])[..., None, None]
        return whole * state + _einsum("bhck,bhcgv->bhkgv", k * until_end, v)


def _sums(log_decay: Float[Array, "b h c x"]) -> Float[Array, "2 b h c x"]:
    """The sums of the logarithms up to each token, of their integers and of what remains.

    Differences of the first are exact: a decay near 0 leaves those of tokens after it as precise as they were.
    """
    whole = jnp.round(jnp.maximum(log_decay, _FORGETS))
    whole = lax.stop_gradient(whole)
    rest = jnp.where(log_decay < _FORGETS, 0.0, log_decay - whole)
    return jnp.cumsum(jnp.stack([whole, rest]), axis=3)


def _earlier(size: int):
    """Whether token j is token i or before it, [i, j]."""
    return jnp.arange(size)[:, None] >= jnp.arange(size)


def _swapped(x: Array) -> Array:
    """[b, hk, c, g, ...] as [b, hk, g, c, ...], and back."""
    return jnp.swapaxes(x, 2, 3)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _einsum(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision="highest")
