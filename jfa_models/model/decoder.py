"""The decoder, one file for every family: a family is a DecoderConfig and a table of tensor names."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from jfa import trees
from jfa.rules import with_default_rules
from jfa_models.model.attention import Attention, Cache, Rotation, Rows, Sinks, StateRows
from jfa_models.model.config import DecoderConfig
from jfa_models.model.layers import MLP, Embedding, Experts, Linear, Normed, make_norm
from jfa_models.model.lora import NO_ADAPTER, UNCHANGED, Adapters
from jfa_models.model.mixers import GatedDelta, Mamba2
from jfa_models.model.partition import WHOLE, Partition
from jfa_models.model.sparse_config import SparseConfig


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or both of the same norm(x), in a parallel block (GPT-J).

    Some have a mixer with a state in place of attention, and some no MLP.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        implementation: str | None,
        partition: Partition,
    ):
        hidden = config.hidden_size
        self.attention_norm = make_norm(config, hidden, dtype=dtype)
        self.multiplier = config.residual_multiplier
        mixer = {"mamba2": Mamba2, "gated_delta": GatedDelta}.get(config.mixer(layer))
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        attention = functools.partial(Attention, implementation=implementation, sum_over=partition.q_heads)
        self.attention = None if mixer else attention(config, layer, **options)
        self.mixer = mixer(config, layer, **options) if mixer else None
        self.attention_post_norm = make_norm(config, hidden, dtype=dtype) if config.post_norms else None
        has_norm = config.has_mlp and not config.parallel_block
        self.mlp_norm = make_norm(config, hidden, dtype=dtype) if has_norm else None
        mlp = functools.partial(MLP, sum_over=partition.inner, implementation=implementation)
        self.has_experts = config.has_experts(layer)
        if self.has_experts:
            mlp = functools.partial(Experts, partition=partition)
        self.mlp = mlp(config, **options) if config.has_mlp else None
        self.mlp_post_norm = make_norm(config, hidden, dtype=dtype) if config.post_norms else None

    @with_default_rules
    def __call__(self, x, rotation, rows, cache, scope=UNCHANGED):
        normed = Normed.of(self.attention_norm, x, scope.at("attention_norm"))
        adds = self.multiplier == 1.0 and self.attention_post_norm is None  # the last product of a part adds it to x
        if self.attention is not None:
            how = scope.inside("attention"), x if adds else None
            attended, cache = self.attention(normed, rotation, rows, cache, *how)
        else:
            assert self.mixer is not None
            inputs, portion, scope_inside = normed.value, rows.portion, scope.inside("mixer")
            if portion is not None:  # a state has all tokens before in it
                inputs, scope_inside = portion.whole(inputs), scope_inside.map(portion.whole)
            attended, cache = self.mixer(inputs, rotation, rows, cache, scope_inside)
            attended = attended if portion is None else portion.own(attended)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended, scope.at("attention_post_norm"))
        x = attended if adds and self.attention is not None else x + self._weighed(attended)
        if self.mlp is None:
            return x, cache
        normed = normed if self.mlp_norm is None else Normed.of(self.mlp_norm, x, scope.at("mlp_norm"))
        mlp: Any = self.mlp
        if self.has_experts:
            out = mlp(normed.value, scope.inside("mlp"), rows.portion)
        else:
            out = mlp(normed, scope.inside("mlp"), x if adds else None)
        if self.mlp_post_norm is not None:
            out = self.mlp_post_norm(out, scope.at("mlp_post_norm"))
        return out if adds and not self.has_experts else x + self._weighed(out), cache

    def _weighed(self, x):
        return x if self.multiplier == 1.0 else x * jnp.asarray(self.multiplier, x.dtype)


def _run(block: Block | Callable[[], Block], x, **given):
    return (block if isinstance(block, Block) else block())(x, **given)


class Decoder(nnx.Module):
    """A decoder-only language model as a pure function: no hidden state; the cache is an argument and a result.

    attention_implementation: the implementation of jfa's ops by name; None: the ops choose.
    partition: over which axes of a mesh parameters are divided. Calls are then made inside of jax.shard_map, with each
      device's parts, and logits are those of its part of the vocabulary.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        attention_implementation: str | None = None,
        partition: Partition = WHOLE,
    ):
        self.config = config
        self.implementation = attention_implementation
        self.partition = partition
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.embed = Embedding(config.vocab_size, config.hidden_size, rows_over=partition.vocab, **options)
        block = functools.partial(Block, implementation=attention_implementation, partition=partition, **options)
        self.layers = nnx.List([block(config, i) for i in range(config.num_layers)])
        self.norm = make_norm(config, config.hidden_size, dtype=dtype)
        head = functools.partial(Linear, config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.lm_head = None if config.tie_word_embeddings else head(**options)

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        lengths: Int[Array, " b"] | None = None,
        query_start: Int[Array, " rows+1"] | None = None,
        segments: Int[Array, "b t"] | None = None,
        tree_mask: Bool[Array, "t m"] | None = None,
        cache: Cache | None = None,
        adapters: Adapters | None = None,
        slot: Int[Array, " rows"] | None = None,
        state_slot: Int[Array, " rows"] | None = None,
        remat: Callable[[Callable], Callable] | None = None,
        whole: Callable[[int, Block], Block] | None = None,
        wanted: Int[Array, " n"] | None = None,
        sparse: Sequence[SparseConfig | None] = (),
    ) -> tuple[Float[Array, "*n hidden"], Cache | None]:
        """The normalized hidden state of every token [b, t, hidden], and the cache with the tokens added.

        Args:
          tokens: the next tokens of each row, at positions kv_len, kv_len + 1, ... of the cache (0, 1, ... without).
          lengths: valid tokens of each row; the rest is padding on the right, whose states are meaningless and which
            the cache's kv_len does not count. None: all.
          query_start: tokens is [1, t], in which row r of a paged cache has the tokens query_start[r] to
            query_start[r + 1]: any number per row, without padding between rows.
          segments: without a cache: each row has several texts one after another, numbered in any way; a token sees the
            earlier ones of its own text, and positions start at 0 in each.
          tree_mask: with query_start: the new tokens of its row that each token sees, itself included, as in
            jfa.ragged_paged_attention; a row's new tokens may then be a tree. All False: a sequence. The cache gets all
            tokens; PagedKVCache.compact keeps a path.
          adapters: changes of the weights.
          slot: which of the adapters each row uses; NO_ADAPTER: none. None: no row uses one.
          state_slot: with query_start, or one token per row: the row of cache.states that each row has, out of range
            for rows of padding, which come last. A row without earlier tokens starts with new states. None: its own.
            With cache.states.pending = () the states stay as they are, and pending is what `enter` takes.
          remat: wraps the function x -> (x, cache) of each block, to save memory in a backward pass: jax.checkpoint.
          whole: for parameters of which this device has parts: called inside of remat with the number of each block,
            and the block; returns one with all of them.
          sparse: with a cache without tokens: for each layer, which scores it computes; empty: all. Without a cache,
            config.sparse_attention says it.
          wanted: only the states of these tokens are returned, [n, hidden]: their indices in tokens.reshape(-1).
        """
        t, row = tokens.shape[1], None
        scope = UNCHANGED
        portion = self.partition.portion(t) if tree_mask is None else None
        assert tree_mask is None or query_start is not None
        if query_start is not None:
            assert cache is not None and lengths is None
            assert self.config.states is None or (state_slot is not None and tree_mask is None)
            new = jnp.diff(query_start)
            row = jnp.searchsorted(query_start[1:], jnp.arange(t), side="right", method="compare_all")
            offset = jnp.append(cache.kv_len - query_start[:-1], 0)  # tokens after the last row belong to no row
            positions = (offset[row] + jnp.arange(t))[None, :]
            if tree_mask is not None:
                positions = (jnp.append(cache.kv_len, 0)[row] + trees.depths(tree_mask, query_start))[None, :]
            if adapters is not None and slot is not None:
                scope = adapters.scope(jnp.append(slot, NO_ADAPTER)[row][None, :])
        else:
            new = t if lengths is None else lengths
            positions = (0 if cache is None else cache.kv_len[:, None]) + jnp.arange(t)[None, :]
            if segments is not None:
                begins = segments != jnp.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
                positions = positions - lax.cummax(jnp.where(begins, positions, 0), axis=1)
            if adapters is not None and slot is not None:
                scope = adapters.scope(jnp.broadcast_to(slot[:, None], tokens.shape))
        of_states = None
        if state_slot is not None and cache is not None and cache.states is not None:
            starts = query_start
            if starts is None:
                assert t == 1
                is_row = state_slot < cache.states.num_rows
                starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(is_row, dtype=jnp.int32)])
            of_states = StateRows(state_slot, starts, cache.kv_len == 0)
        of_all = scope
        config, sinks, is_whole = self.config, None, cache is None or bool(sparse)
        assert not sparse or (cache is not None and query_start is None and portion is None)
        if cache is None:
            sparse = config.sparse_attention
            self._check_causal()
            assert portion is None or not config.sparse_layers
        if any(map(config.is_streaming, config.attention_layers)):
            assert config.streaming is not None and segments is None and portion is None
            far = jnp.minimum(positions, config.streaming.window + config.streaming.num_sinks - 1)
            sinks = Sinks(positions, None if config.rope is None else Rotation(config, config.rope, far), row)
        rows = Rows(lengths, query_start, segments, tree_mask, of_states, portion, is_whole, None, sinks)
        if portion is not None:
            tokens, positions = portion.own(tokens), portion.own(jnp.broadcast_to(positions, tokens.shape))
            scope = scope.map(portion.own)
        rotation = None if config.rope is None else Rotation(config, config.rope, positions)
        local = rotation if config.local_rope is None else Rotation(config, config.local_rope, positions)
        x = self.embed(tokens, scope.at("embed"))
        if config.scale_embeddings:
            x = x * jnp.asarray(math.sqrt(config.hidden_size), x.dtype)
        if config.embedding_multiplier != 1.0:
            x = x * jnp.asarray(config.embedding_multiplier, x.dtype)
        for i, block in enumerate(self.layers):
            run = functools.partial(
                _run,
                block if whole is None else functools.partial(whole, i, block),
                rotation=local if config.is_local(i) else rotation,
                rows=rows._replace(sparse=sparse[i]) if sparse else rows,
                cache=cache,
                scope=scope.inside("layers").inside(str(i)),
            )
            x, cache = run(x) if remat is None else remat(run)(x)
        if cache is not None:
            cache = cache.advance(new)
        if wanted is None:
            x = self.norm(x, scope.at("norm"))
            return x if portion is None else portion.whole(x), cache
        at = jnp.divmod(wanted, t)
        x = x[at] if portion is None else portion.at(x, *at)
        return self.norm(x, of_all.map(lambda gates: gates[at]).at("norm")), cache

    def _check_causal(self) -> None:
        """Raises ValueError if what a token computes depends on later ones, which may be what it is to predict."""
        for layer in self.config.sparse_layers:
            given = self.config.sparse_attention[layer]
            assert given is not None
            if not given.is_causal:
                raise ValueError(
                    f"sparse_attention={given} of layer {layer} chooses by the last queries of a text, which earlier "
                    "tokens must not know in training and in logits: use top-k or window, which do not"
                )

    @with_default_rules
    def enter(self, cache: Cache, pending: Sequence[Float[Array, "n inputs"]], rows: StateRows) -> Cache:
        """The cache with tokens of the last step in its states.

        pending: what these tokens bring to each layer with a state. rows: how they are divided.
        """
        of_step, filled = Rows(query_start=rows.query_start, of_states=rows), cache
        mixers = [block.mixer for block in self.layers if block.mixer is not None]
        for mixer, inputs in zip(mixers, pending, strict=True):
            _, filled = mixer.recurred(inputs[None], of_step, filled)
        assert filled is not None
        return filled

    @with_default_rules
    def unembed(
        self,
        hidden: Float[Array, "*b hidden"],
        adapters: Adapters | None = None,
        slot: Int[Array, "*#b"] | None = None,
    ) -> Float[Array, "*b vocab"]:
        """Logits over the vocabulary, float32, or over this device's part. slot: of each token, as in __call__."""
        scope = UNCHANGED
        if adapters is not None and slot is not None:
            scope = adapters.scope(jnp.broadcast_to(slot, hidden.shape[:-1]))
        head = self.embed.attend if self.lm_head is None else self.lm_head
        logits = head(hidden, scope.at("lm_head")).astype(jnp.float32)
        if self.config.logits_divisor != 1.0:
            logits = logits / self.config.logits_divisor
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)
