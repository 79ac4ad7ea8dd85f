"""Decides which attention weights dropout keeps: a pure function of a key and the indices of a weight.

It is a counter-based hash, not a stream of random numbers: the forward pass, the backward pass and the reference visit
the weights in different orders and tiles, but must get the same result for each weight.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

# Odd constants with well distributed bits: 2^32 / golden ratio, and primes 2 to 4 of xxHash32.
_ROW, _COLUMN, _BATCH, _HEAD = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F


def row_seed(
    seed: UInt32[Array, " 2"] | tuple, batch: Int[Array, "..."], head: Int[Array, "..."], *, broadcast: bool
) -> UInt32[Array, "..."]:
    """A 32-bit seed for a key, a batch row and a query head; batch and head broadcast.

    broadcast: the same seed for all batch rows and heads.
    """
    if broadcast:
        batch, head = jnp.zeros_like(batch), jnp.zeros_like(head)
    first, second = seed
    mixed = _mix(second ^ (batch.astype(jnp.uint32) * jnp.uint32(_BATCH)))
    return _mix(mixed ^ first ^ (head.astype(jnp.uint32) * jnp.uint32(_HEAD)))


def keep(
    seed: UInt32[Array, "..."], query: Int[Array, "..."], key: Int[Array, "..."], *, rate: float
) -> Bool[Array, "..."]:
    """True where the weight of a query for a key is kept; arguments broadcast.

    Args:
      seed: from row_seed.
      query, key: indices in the op's own arrays, before any offset.
      rate: the fraction that is dropped, to within 2^-32.
    """
    # most of the work is per row or per column; per weight it is one addition, one _mix and one comparison
    row = _mix(seed ^ (query.astype(jnp.uint32) * jnp.uint32(_ROW)))
    column = key.astype(jnp.uint32) * jnp.uint32(_COLUMN)
    return _mix(row + column) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection on 32-bit integers: flipping one bit of x flips about half of the bits of the result.

    Source: C. Wellons, "Prospecting for Hash Functions", 2018: lowbias32.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
