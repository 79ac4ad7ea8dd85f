"""The decoder: one readable file for every family; a family is a DecoderConfig and a table of tensor names."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jfa_models.attention import Attention, Cache, Rotation
from jfa_models.config import DecoderConfig
from jfa_models.layers import Embedding, GatedMLP, Linear, RMSNorm


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, x, rotation, lengths, query_start, cache, layer):
        attended, cache = self.attention(self.attention_norm(x), rotation, lengths, query_start, cache, layer)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only transformer as a pure function: parameters in, nothing hidden, the cache goes in and comes out."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = (
            None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        lengths: Int[Array, " b"] | None = None,
        query_start: Int[Array, " rows+1"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "b t hidden"], Cache | None]:
        """The normalised hidden state of every token, and the cache with the tokens in it.

        Args:
          tokens: the next tokens of each row, at positions kv_len, kv_len + 1, ... of the cache (0, 1, ... without).
          lengths: how many tokens of each row are real; the rest is padding on the right, its states mean nothing and
            it does not enter the cache's kv_len. None: all.
          query_start: tokens is [1, t], in which row r of a paged cache has the tokens query_start[r] to
            query_start[r + 1]: any number each, without padding between them.
        """
        t = tokens.shape[1]
        if query_start is not None:
            assert cache is not None and lengths is None
            new = jnp.diff(query_start)
            row = jnp.searchsorted(query_start[1:], jnp.arange(t), side="right")
            offset = jnp.append(cache.kv_len - query_start[:-1], 0)  # tokens behind the last row are of no row
            positions = (offset[row] + jnp.arange(t))[None, :]
        else:
            new = t if lengths is None else lengths
            positions = (0 if cache is None else cache.kv_len[:, None]) + jnp.arange(t)[None, :]
        rotation = Rotation(self.config.rope, self.config.head_dim, positions)
        x = self.embed(tokens)
        for i, block in enumerate(self.layers):
            x, cache = block(x, rotation, lengths, query_start, cache, i)
        if cache is not None:
            cache = cache.advance(new)
        return self.norm(x), cache

    def unembed(self, hidden: Float[Array, "*b hidden"]) -> Float[Array, "*b vocab"]:
        """Logits over the vocabulary, float32."""
        head = self.embed.attend if self.lm_head is None else self.lm_head
        return head(hidden).astype(jnp.float32)
