"""A KV cache that reserves every slot of every row in advance: simple, and the fastest to write to."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The keys and values of all layers of one model. One per model; every method returns a new one.

    Slots at or past kv_len hold garbage and are never read. Donate it to the step that returns its successor: the
    writes then happen in place.

    Attributes:
      k, v: an array per layer, slot j of a row holding the token at position j.
      kv_len: valid tokens of each row, the only truth about fullness.
    """

    k: tuple[Float[Array, "b capacity hkv d"], ...]
    v: tuple[Float[Array, "b capacity hkv d"], ...]
    kv_len: Int[Array, " b"]

    @classmethod
    def create(
        cls, *, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "KVCache":
        """An empty cache of capacity tokens a row."""
        shape = (batch, capacity, num_kv_heads, head_dim)
        # an array of its own per layer, k and v: a buffer that two leaves share cannot be donated
        k, v = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in "kv")
        return cls(k=k, v=v, kv_len=jnp.zeros(batch, jnp.int32))

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.k[0].shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(x.size * x.dtype.itemsize for x in (*self.k, *self.v))

    def write(self, layer: int, k: Float[Array, "b t hkv d"], v: Float[Array, "b t hkv d"]) -> "KVCache":
        """Puts t tokens of one layer behind kv_len, which stays as it is until advance. What overruns is dropped."""
        t = k.shape[1]
        row = jnp.arange(k.shape[0])[:, None]
        slot = self.kv_len[:, None] + jnp.arange(t)

        def put(slots, new):
            return slots.at[row, slot].set(new.astype(slots.dtype), mode="drop", unique_indices=True)

        return dataclasses.replace(
            self,
            k=(*self.k[:layer], put(self.k[layer], k), *self.k[layer + 1 :]),
            v=(*self.v[:layer], put(self.v[layer], v), *self.v[layer + 1 :]),
        )

    def advance(self, num_tokens: Int[Array, " b"] | int) -> "KVCache":
        """Declares the first num_tokens of what was written behind kv_len valid, in every layer."""
        return dataclasses.replace(self, kv_len=(self.kv_len + num_tokens).astype(jnp.int32))

    def grow(self, capacity: int) -> "KVCache":
        """A copy with more slots a row.

        Raises:
          ValueError: capacity is below the present one.
        """
        if capacity < self.capacity:
            raise ValueError(f"a cache of {self.capacity} slots cannot grow to {capacity}; truncate forgets tokens")
        more = ((0, 0), (0, capacity - self.capacity), (0, 0), (0, 0))
        k, v = (tuple(jnp.pad(x, more) for x in arrays) for arrays in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)

    def truncate(self, kv_len: Int[Array, " b"]) -> "KVCache":
        """Forgets every token at or past kv_len. Nothing moves: rollback is this."""
        return dataclasses.replace(self, kv_len=jnp.minimum(self.kv_len, kv_len).astype(jnp.int32))
