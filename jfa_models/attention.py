"""Self-attention of a decoder: projections, rotary positions, and the meeting of jfa's op with a cache."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

import jfa
from jfa_models.config import DecoderConfig, RopeConfig
from jfa_models.layers import Linear

Cache = jfa.KVCache | jfa.PagedKVCache


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv:2305.13245)."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        hidden, q_size, kv_size = (
            config.hidden_size,
            config.num_q_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        linear = functools.partial(Linear, bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.q = linear(hidden, q_size)
        self.k = linear(hidden, kv_size)
        self.v = linear(hidden, kv_size)
        self.o = linear(q_size, hidden)

    def __call__(
        self,
        x: Float[Array, "b t hidden"],
        rotation: "Rotation",
        lengths: Int[Array, " b"] | None,
        query_start: Int[Array, " rows+1"] | None,
        cache: Cache | None,
        layer: int,
    ) -> tuple[Float[Array, "b t hidden"], Cache | None]:
        """Attends over the cache (its valid tokens, then x), or over x alone without one.

        Args:
          lengths: valid tokens of each row of x; the rest is padding on the right. None: all.
          query_start: x is one row, in which the new tokens of each row of a paged cache begin here.
          layer: which arrays of the cache are this layer's.
        """
        q, k, v = (self._heads(project(x)) for project in (self.q, self.k, self.v))
        q, k = rotation(q), rotation(k)
        q_len = lengths if x.shape[1] > 1 else None
        if cache is None:
            out = jfa.dot_product_attention(q, k, v, is_causal=True, query_seq_lengths=q_len)
        elif query_start is not None:
            assert isinstance(cache, jfa.PagedKVCache), "rows of different lengths need pages"
            cache = cache.write_ragged(layer, k[0], v[0], query_start)
            kv_len = cache.kv_len + jnp.diff(query_start)
            pages = cache.arguments(layer)
            q = cache.rotated(q[0])
            out = jfa.ragged_paged_attention(q, kv_len=kv_len, query_start=query_start, **pages)[None]
        elif isinstance(cache, jfa.PagedKVCache):
            cache = cache.write(layer, k, v, lengths)
            out = _over_pages(q, cache, layer, jnp.full(x.shape[0], x.shape[1]) if lengths is None else lengths)
        else:
            cache = cache.write(layer, k, v)
            out = jfa.dot_product_attention(
                q,
                cache.k[layer],
                cache.v[layer],
                is_causal=True,
                query_seq_lengths=q_len,
                query_offset=cache.kv_len,
                key_value_seq_lengths=cache.kv_len + x.shape[1],
            )
        return self.o(out.reshape(*x.shape[:2], -1)), cache

    def _heads(self, x: Float[Array, "b t size"]) -> Float[Array, "b t h d"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


def _over_pages(
    q: Float[Array, "b t hq d"], cache: jfa.PagedKVCache, layer: int, lengths: Int[Array, " b"]
) -> Float[Array, "b t hq d"]:
    """The new tokens, which the cache holds already behind its kv_len, over the cache."""
    pages, kv_len = cache.arguments(layer), cache.kv_len + lengths
    q = cache.rotated(q)
    b, t = q.shape[:2]
    if t == 1:
        return jfa.paged_decode_attention(q[:, 0], kv_len=kv_len, **pages)[:, None]
    start = jnp.concatenate([jnp.zeros(1, lengths.dtype), jnp.cumsum(lengths)])
    if b == 1:
        return jfa.ragged_paged_attention(q[0], kv_len=kv_len, query_start=start, **pages)[None]
    # the padding of all rows goes behind the last one's tokens
    token = jnp.arange(t)
    place = jnp.where(token < lengths[:, None], start[:-1, None] + token, b * t)
    together = jnp.zeros((b * t, *q.shape[2:]), q.dtype).at[place].set(q, mode="drop")
    out = jfa.ragged_paged_attention(together, kv_len=kv_len, query_start=start, **pages)
    return jnp.take(out, place, axis=0, mode="fill", fill_value=0)


class Rotation:
    """Rotary position embedding at given positions, shared by all layers of one forward pass.

    Source: arXiv:2104.09864, in the half-split form of Llama checkpoints from Hugging Face.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, positions: Int[Array, "b t"]):
        angle = positions[..., None, None].astype(jnp.float32) * rope.inverse_frequencies(head_dim)
        self.cos, self.sin = jnp.cos(angle), jnp.sin(angle)  # [b, t, 1, d / 2]

    def __call__(self, x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
