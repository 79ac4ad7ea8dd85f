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

from jfa.types import DeviceInfo, LinearConfig, LinearOperands, LinearSpec

_CHUNK = 64
_PIECE = 16  # of a chunk, within which decays of columns are not a factor of a matrix product
_FORWARD = dict(left_side=True, lower=True, unit_diagonal=True)
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
    b, t, h, dv = operands.v.shape
    by_columns = operands.log_decay.ndim == 4
    q, k = operands.q, operands.k
    if by_columns:  # the decays of a value head are factors of its keys
        q, k = (jnp.repeat(x, operands.group_size, axis=2) for x in (q, k))
    hk, g = k.shape[2], h // k.shape[2]
    chunk = config.chunk_size

    def in_chunks(x: Array, *shape: int) -> Float[Array, "n b heads chunk ..."]:
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -t % chunk), *[(0, 0)] * (x.ndim - 2)))
        x = x.reshape(b, -1, chunk, hk, *shape)
        return jnp.moveaxis(x, (1, 3), (0, 2))

    beta = operands.beta
    tokens = (
        in_chunks(q * jnp.asarray(spec.scale, jnp.float32), q.shape[3]),
        in_chunks(k, k.shape[3]),
        in_chunks(operands.v, g, dv),
        in_chunks(operands.log_decay, *(k.shape[3:] if by_columns else (g,))),
        None if beta is None else in_chunks(beta, g),
    )

    @jax.checkpoint
    def step(state: Float[Array, "b hk dk g dv"], tokens):
        q, k, v, log_decay, beta = tokens
        decays = (_ByColumns if by_columns else _ByHeads).of(log_decay)
        if beta is not None:
            added_before = jnp.tril(decays.weights(k, k), -1) * _swapped(beta)[..., None]
            wanted = beta[..., None] * (v - decays.read(k, state))
            system = added_before + jnp.eye(chunk, dtype=jnp.float32)
            v = _swapped(lax.linalg.triangular_solve(system, _swapped(wanted), **_FORWARD))
        near = _swapped(_matmul(decays.weights(q, k), _swapped(v)))
        return decays.write(state, k, v), decays.read(q, state) + near

    start = jnp.moveaxis(operands.state.reshape(b, hk, g, k.shape[3], dv), 2, 3)
    state, out = lax.scan(step, start, tokens)
    out = jnp.moveaxis(out, (0, 2), (1, 3)).reshape(b, -1, h, dv)[:, :t]
    return out.astype(operands.v.dtype), jnp.moveaxis(state, 3, 2).reshape(operands.state.shape)


class _ByHeads(NamedTuple):
    """The decays of a chunk: one number for each token and value head."""

    since: Float[Array, "2 b hk c g"]  # _sums

    @classmethod
    def of(cls, log_decay: Float[Array, "b hk c g"]) -> "_ByHeads":
        return cls(_sums(log_decay))

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

    @classmethod
    def of(cls, log_decay: Float[Array, "b h c dk"]) -> "_ByColumns":
        return cls(_sums(log_decay))

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
