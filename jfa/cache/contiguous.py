"""A contiguous KV cache, which reserves all slots of every row in advance: simple, and the fastest to write to."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jfa.cache.state import StateCache, check_no_states
from jfa.meshes import like_itself, on_any_mesh, spec_of
from jfa.rules import with_default_rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """The keys and values of all layers of one model. Every method returns a new cache.

    Slots at or past kv_len contain garbage and are never read. Donate the cache to the jitted function that returns the
    new one, so that writes happen in place.

    Layers with a window are ring buffers: they store the last window + slack tokens, position j in slot j % num_slots.
    Once such a ring is full, truncate can drop at most slack tokens.

    Attributes:
      k, v: an array per layer with attention; slot j of a row holds the token at position j.
      kv_len: number of valid tokens of each row.
      capacity: tokens that a row can hold.
      ring_sizes: for each layer, the maximum number of slots that it needs; None: capacity.
      states: of the layers without attention; None: there are none.
    """

    k: tuple[Float[Array, "b slots hkv d"], ...]
    v: tuple[Float[Array, "b slots hkv d"], ...]
    kv_len: Int[Array, " b"]
    capacity: int = dataclasses.field(metadata=dict(static=True))
    ring_sizes: tuple[int | None, ...] = dataclasses.field(metadata=dict(static=True))
    states: StateCache | None = None

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: DTypeLike,
        windows: Sequence[int | None] = (),
        slack: int = 0,
        sharding: jax.sharding.Sharding | None = None,
    ) -> "KVCache":
        """An empty cache of capacity tokens per row.

        Args:
          windows: for each layer, the number of tokens that a query sees, including itself; None: all. Empty: all
            tokens in every layer.
          slack: number of tokens that truncate may drop in layers with a window.
          sharding: of k and v, such as NamedSharding(mesh, P(None, None, "heads")); None: the default device.

        Raises:
          ValueError: windows does not have one entry per layer.
        """
        if len(windows) not in (0, num_layers):
            raise ValueError(f"windows must have one entry for each of {num_layers} layers, got {len(windows)}")
        ring_sizes = tuple(None if window is None else window + slack for window in windows) or (None,) * num_layers

        # a separate array for each layer's k and v: a buffer that two leaves share cannot be donated
        def slots(size: int | None) -> Array:
            return jnp.zeros((batch, _slots(capacity, size), num_kv_heads, head_dim), dtype, device=sharding)

        k, v = (tuple(map(slots, ring_sizes)) for _ in "kv")
        return cls(k=k, v=v, kv_len=jnp.zeros(batch, jnp.int32), capacity=capacity, ring_sizes=ring_sizes)

    @property
    def num_bytes(self) -> int:
        """Total size of all slots and states in bytes."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((self.k, self.v, self.states)))

    def is_ring(self, layer: int) -> bool:
        """Whether a layer has fewer slots than a row can have tokens."""
        return self.k[layer].shape[1] < self.capacity

    @like_itself
    @with_default_rules
    def write(
        self,
        layer: int,
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        lengths: Int[Array, " b"] | None = None,
    ) -> "KVCache":
        """Writes t tokens of one layer starting at kv_len, which advance updates. Tokens past capacity are dropped.

        lengths: number of valid tokens in each row; None: all. The rest is padding, which is never written to a ring.
        """
        row, slot = jnp.arange(k.shape[0])[:, None], self._places(layer, k.shape[1], lengths)

        def put(array, new):
            written = array.at[row, slot].set(new.astype(array.dtype), mode="drop", unique_indices=True)
            # for a single row, XLA on a CPU would otherwise fuse the update with what reads it, and copy the array
            return lax.optimization_barrier(written)

        return self.holding(layer, put(self.k[layer], k), put(self.v[layer], v))

    def holding(self, layer: int, k: Float[Array, "b slots hkv d"], v: Float[Array, "b slots hkv d"]) -> "KVCache":
        """The cache with other keys and values of a layer."""
        all_k, all_v = ((*held[:layer], x, *held[layer + 1 :]) for held, x in ((self.k, k), (self.v, v)))
        return dataclasses.replace(self, k=all_k, v=all_v)

    @with_default_rules
    def slots(self, layer: int, t: int, lengths: Int[Array, " b"] | None = None) -> Int[Array, "b t"]:
        """Where write puts t tokens, among the slots of all rows of the layer; -1: nowhere."""
        b, slots = self.k[layer].shape[:2]
        slot = self._places(layer, t, lengths)
        return jnp.where(slot < slots, jnp.arange(b)[:, None] * slots + slot, -1)

    def _places(self, layer: int, t: int, lengths: Int[Array, " b"] | None) -> Int[Array, "b t"]:
        """The slot of each of t new tokens in its row; one out of bounds for those that are not written."""
        slots = self.k[layer].shape[1]
        token = jnp.arange(t)
        slot = self.kv_len[:, None] + token
        if self.is_ring(layer):
            real = t if lengths is None else lengths[:, None]
            # if there are more tokens than slots, write the last ones; the others get distinct out-of-bounds indices
            slot = jnp.where((token < real) & (token >= real - slots), slot % slots, slots + token)
        return slot

    @with_default_rules
    def slots_seen(self, layer: int, window: int) -> tuple[Bool[Array, "b slots"], Int[Array, " b"]]:
        """The slots of a ring that the token to be written at kv_len will see, and how many slots will be filled."""
        slots = self.k[layer].shape[1]
        position = self.kv_len[:, None]
        age = (position - jnp.arange(slots)) % slots
        return (age < window) & (age <= position), jnp.minimum(self.kv_len + 1, slots)

    @with_default_rules
    def followed_by(
        self, layer: int, k: Float[Array, "b t hkv d"], v: Float[Array, "b t hkv d"]
    ) -> tuple[Float[Array, "b n hkv d"], Float[Array, "b n hkv d"], Int[Array, " b"]]:
        """The tokens of a ring in order, followed by t new ones; also returns how many tokens precede the new ones."""
        b, t, slots = *k.shape[:2], self.k[layer].shape[1]

        def joined(arrays, new, kv_len):
            held = jnp.minimum(kv_len, slots)
            oldest = jnp.where(kv_len > slots, kv_len % slots, 0)
            slot = (oldest[:, None] + jnp.arange(slots)) % slots
            row = jnp.arange(b)[:, None]

            def join(array, new):
                both = jnp.pad(array[row, slot], ((0, 0), (0, t), (0, 0), (0, 0)))
                new = new.astype(array.dtype)
                return both.at[row, held[:, None] + jnp.arange(t)].set(new, unique_indices=True)

            return join(arrays[0], new[0]), join(arrays[1], new[1]), held

        arrays = self.k[layer], self.v[layer]
        like = k, v, self.kv_len
        return on_any_mesh(joined, arrays, (k, v), self.kv_len, specs=lambda: tuple(map(spec_of, like)))

    @with_default_rules
    def advance(self, num_tokens: Int[Array, " b"] | int) -> "KVCache":
        """Marks the first num_tokens tokens written after kv_len as valid, in every layer."""
        return dataclasses.replace(self, kv_len=(self.kv_len + num_tokens).astype(jnp.int32))

    @with_default_rules
    def grow(self, capacity: int) -> "KVCache":
        """A copy with more slots per row.

        Raises:
          ValueError: capacity is below the current one.
        """
        if capacity < self.capacity:
            raise ValueError(f"a cache of {self.capacity} slots cannot grow to {capacity}; use truncate to drop tokens")

        def padded(array: Array, size: int | None) -> Array:  # a ring that still grows has never wrapped around
            return jnp.pad(array, ((0, 0), (0, _slots(capacity, size) - array.shape[1]), (0, 0), (0, 0)))

        k, v = (tuple(map(padded, arrays, self.ring_sizes)) for arrays in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, capacity=capacity)

    @with_default_rules
    def truncate(self, kv_len: Int[Array, " b"]) -> "KVCache":
        """Drops all tokens at positions >= kv_len (at most slack of them in a full ring), without copying.

        Raises:
          ValueError: it has states.
        """
        check_no_states(self.states)
        return dataclasses.replace(self, kv_len=jnp.minimum(self.kv_len, kv_len).astype(jnp.int32))


def _slots(capacity: int, ring_size: int | None) -> int:
    return capacity if ring_size is None else min(capacity, ring_size)
