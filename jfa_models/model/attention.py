"""Self-attention of a decoder: projections, rotary position embedding, and jfa's attention ops over a cache."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import jfa
import jfa.sharding
from jfa import write_ops
from jfa.rules import with_default_rules
from jfa_models.model.config import DecoderConfig
from jfa_models.model.layers import Linear, Normed, make_norm, together
from jfa_models.model.lora import UNCHANGED, Scope
from jfa_models.model.partition import Axes, Portion
from jfa_models.model.rope import RopeConfig
from jfa_models.model.sparse_attention import sparse_attention
from jfa_models.model.sparse_config import SparseConfig

Cache = jfa.KVCache | jfa.PagedKVCache


def paged_cache(
    config: DecoderConfig,
    *,
    num_pages: Sequence[int],
    page_size: int,
    batch: int,
    pages_per_seq: int,
    dtype: DTypeLike,
    kv_dtype: str | None,
    sharding: jax.sharding.Sharding | None = None,
) -> jfa.PagedKVCache:
    """An empty cache for a decoder, with a page table and num_pages[i] pages per attention pattern; without states."""
    check_kv_dtype(config, kv_dtype)
    return jfa.PagedKVCache.create(
        num_layers=len(config.attention_layers),
        num_pages=num_pages,
        page_size=page_size,
        batch=batch,
        pages_per_seq=pages_per_seq,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        kv_dtype=kv_dtype,
        table_of=[config.patterns.index(config.window(i)) for i in config.attention_layers],
        sharding=sharding,
    )


def check_kv_dtype(config: DecoderConfig, kv_dtype: str | None) -> None:
    """Raises ValueError if there is nothing to quantize."""
    if kv_dtype is not None and not config.attention_layers:
        raise ValueError(
            f"kv_dtype={kv_dtype!r}: a {config.architecture} model has no keys and values, and its states are float32; "
            "leave it out"
        )


class StateRows(NamedTuple):
    """The rows of a step whose states are in slots of a StateCache, as arguments of jfa's ragged linear attention."""

    slot: Int[Array, " rows"]
    query_start: Int[Array, " rows+1"]
    is_new: Bool[Array, " rows"]


class Sinks(NamedTuple):
    """What layers that see the first tokens besides a window need to know of the queries.

    Attributes:
      positions: of the queries in their texts.
      rotation: as if the text had no tokens between the first ones and the window. None: they are not rotated.
      row: with Rows.query_start, the row of each token. None: of the batch.
    """

    positions: Int[Array, "#b t"]
    rotation: "Rotation | None"
    row: Int[Array, " t"] | None


class Rows(NamedTuple):
    """How the tokens of a step [b, t] are divided.

    Attributes:
      lengths: valid tokens of each row; the rest is padding on the right. None: all.
      query_start: there is one row; the new tokens of row i of a paged cache start at query_start[i] in it.
      segments: rows have several texts one after another, numbered; a token sees those of its own. Without a cache.
      tree_mask: with query_start, the new tokens of its row that each token sees, as in jfa.ragged_paged_attention.
      of_states: where the rows' states are. None: row r has the states of row r of the cache.
      portion: layers get this device's part of the tokens. None: they get all.
      is_whole: there are no tokens before: there is no cache, or an empty one.
      sparse: of the layer, whose text is_whole: which scores it computes. None: all.
      sinks: of the queries. None: no layer needs it.
    """

    lengths: Int[Array, " b"] | None = None
    query_start: Int[Array, " rows+1"] | None = None
    segments: Int[Array, "b t"] | None = None
    tree_mask: Bool[Array, "t m"] | None = None
    of_states: StateRows | None = None
    portion: Portion | None = None
    is_whole: bool = False
    sparse: SparseConfig | None = None
    sinks: Sinks | None = None


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv:2305.13245); its layer in a cache is its number among those with attention.

    With a gate, each head of q is followed by its gate, which is applied as in arXiv:2505.06708.

    sum_over: the axes of a mesh over whose devices the heads are divided.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        implementation: str | None,
        sum_over: Axes = (),
    ):
        self.layer = config.attention_layers.index(layer)
        self.head_dim = config.head_dim
        self.num_kv_heads, self.group_size = config.num_kv_heads, config.num_q_heads // config.num_kv_heads
        self.has_gate = config.attention_gate
        self.window = config.window(layer)
        self.num_sinks = config.sinks_of(self.window) if config.is_streaming(layer) else 0
        self.options: dict[str, Any] = dict(
            implementation=implementation,
            scale=config.query_scale,
            logits_soft_cap=config.attention_soft_cap,
            local_window_size=None if self.window is None else (self.window - 1, 0),
        )
        if self.num_sinks:
            self.options["return_residual"] = True
        hidden, q_size, kv_size = (
            config.hidden_size,
            config.num_q_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        linear = functools.partial(Linear, bias=config.qkv_bias, dtype=dtype, rngs=rngs, implementation=implementation)
        self.q = linear(hidden, q_size * (1 + config.attention_gate))
        self.k = linear(hidden, kv_size)
        self.v = linear(hidden, kv_size)
        self.o = linear(q_size, hidden, bias=config.out_bias, sum_over=sum_over)
        self.q_norm = make_norm(config, config.head_dim, dtype=dtype) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_dim, dtype=dtype) if config.qk_norm else None

    def __call__(
        self,
        x: Normed | Float[Array, "b t hidden"],
        rotation: "Rotation | None",
        rows: Rows,
        cache: Cache | None,
        scope: Scope = UNCHANGED,
        residual: Float[Array, "b t hidden"] | None = None,
    ) -> tuple[Float[Array, "b t hidden"], Cache | None]:
        """Attends over the cache (its valid tokens, then x), or over only x without a cache.

        rotation: None: queries and keys are not rotated.
        scope: what adapters change.
        residual: what the result is added to.
        """
        lengths, query_start, tree_mask, portion = rows.lengths, rows.query_start, rows.tree_mask, rows.portion
        qkv, (q, k, v) = self._projected(x, scope)
        b, t = q.shape[:2]
        gate = None
        if self.has_gate:
            q, gate = jnp.split(q.reshape(b, t, -1, 2 * self.head_dim), 2, axis=-1)
        q, k, v = (self._heads(part) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q, scope.at("q_norm")), self.k_norm(k, scope.at("k_norm"))
        plain = q
        written: Any = None  # the cache with the new tokens
        if rotation is not None and (slots := self._slots(q, k, v, rows, cache)) is not None:
            assert cache is not None
            if qkv is None or gate is not None or self.q_norm is not None:
                qkv = jnp.concatenate([x.reshape(b, t, -1) for x in (q, k, v)], axis=-1)  # XLA's merged product
            q, written = self._rotated_and_written(qkv, rotation, slots, cache)
        elif rotation is not None:
            q, k = rotation(q), rotation(k)
        if portion is not None:
            out, cache = self._of_own_tokens(q, k, v, rows, cache)
        elif cache is None or rows.is_whole:
            cache = None if cache is None else cache.write(self.layer, k, v, lengths)
            out = self._of_new_tokens(q, k, v, rows)
        elif isinstance(cache, jfa.KVCache):
            out, cache = self._over_slots(q, k, v, lengths, cache, written=written)
        elif query_start is not None:
            pages: jfa.PagedKVCache = written or cache.write_ragged(self.layer, k[0], v[0], query_start)
            kv_len = pages.kv_len + jnp.diff(query_start)
            out = _each(lambda x: x[None], self._ragged(q[0], pages, kv_len, query_start, tree_mask))
            cache = pages
        else:
            pages = written or cache.write(self.layer, k, v, lengths)
            out = self._over_pages(q, pages, jnp.full(b, t) if lengths is None else lengths)
            cache = pages
        if self.num_sinks:
            of_window, lse = out
            out = self._with_sinks(of_window, lse, plain, k, v, rows, cache)
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return self.o(out.reshape(b, t, -1), scope.at("o"), residual), cache

    def _projected(
        self, x: Normed | Float[Array, "b t hidden"], scope: Scope
    ) -> tuple[Float[Array, "b t heads*d"] | None, Sequence[Float[Array, "b t size"]]]:
        """Queries, keys and values side by side, if one kernel computes them, and each of them."""
        modules, changes = (self.q, self.k, self.v), [scope.at(name) for name in ("q", "k", "v")]
        if (qkv := together(x, modules, changes)) is not None:
            sizes = [module.weight.shape[0] for module in modules]
            return qkv, jnp.split(qkv, np.cumsum(sizes[:-1]), axis=-1)
        x = x.value if isinstance(x, Normed) else x
        return None, [module(x, change) for module, change in zip(modules, changes, strict=True)]

    def _heads(self, x: Float[Array, "b t *size"]) -> Float[Array, "b t h d"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def _slots(
        self, q: Float[Array, "b t hq d"], k: Array, v: Array, rows: Rows, cache: Cache | None
    ) -> Int[Array, " b*t"] | None:
        """Where one kernel, after rotating them, writes the new tokens. None: there is none for this step."""
        layer, (b, t, _, d) = self.layer, q.shape
        if cache is None or rows.is_whole or rows.portion is not None or self.num_sinks:
            return None
        if isinstance(cache, jfa.KVCache) and cache.is_ring(layer) and t > 1:
            return None  # the first tokens see slots that the last ones overwrite
        if isinstance(cache, jfa.PagedKVCache) and cache.num_heads(d) > k.shape[2]:
            return None
        qkv: Any = jax.ShapeDtypeStruct((b * t, sum(x.shape[2] for x in (q, k, v)) * d), q.dtype)
        how: dict[str, Any] = dict(head_dim=d, implementation=self.options["implementation"])
        if not write_ops.serves(qkv, cache.k[layer], cache.v[layer], **how):
            return None
        if isinstance(cache, jfa.PagedKVCache) and rows.query_start is not None:
            return cache.ragged_slots(layer, t, rows.query_start)
        return cache.slots(layer, t, rows.lengths).reshape(-1)

    def _rotated_and_written[C: Cache](
        self, qkv: Float[Array, "b t heads*d"], rotation: "Rotation", slots: Int[Array, " b*t"], cache: C
    ) -> tuple[Float[Array, "b t hq d"], C]:
        """The rotated queries, and the cache with the new tokens."""
        held: Any = cache
        layer, n = self.layer, len(slots)
        cos, sin = (
            jnp.broadcast_to(x, (*qkv.shape[:2], *x.shape[2:])).reshape(n, -1) for x in (rotation.cos, rotation.sin)
        )
        how: dict[str, Any] = dict(head_dim=self.head_dim, implementation=self.options["implementation"])
        rows = qkv.reshape(n, -1)
        out, *kv = write_ops.rotate_and_write(rows, cos, sin, slots, held.k[layer], held.v[layer], **how)
        return self._heads(out.reshape(*qkv.shape[:2], -1)), held.holding(layer, *kv)

    def _of_new_tokens(
        self, q: Float[Array, "b t hq d"], k: Float[Array, "b t hkv d"], v: Float[Array, "b t hkv d"], rows: Rows
    ) -> Any:
        """Attention to the new tokens alone: there are no others."""
        options: dict[str, Any] = dict(query_segment_ids=rows.segments, key_value_segment_ids=rows.segments)
        options |= self.options | dict(query_seq_lengths=rows.lengths if q.shape[1] > 1 else None)
        if rows.sparse is None:
            return jfa.dot_product_attention(q, k, v, is_causal=True, **options)
        del options["local_window_size"]
        return sparse_attention(q, k, v, rows.sparse, **options)

    def _of_own_tokens(
        self,
        q: Float[Array, "b own hq d"],
        k: Float[Array, "b own hkv d"],
        v: Float[Array, "b own hkv d"],
        rows: Rows,
        cache: Cache | None,
    ) -> tuple[Float[Array, "b own hq d"], Cache | None]:
        """Attention of this device's tokens, two chunks of each row, to those of all devices."""
        portion = rows.portion
        assert portion is not None
        if cache is None:
            segments = None if rows.segments is None else portion.own(rows.segments)
            ring: dict[str, Any] = dict(axis_name=portion.axes, order="zigzag", is_causal=True, **self.options)
            ring |= dict(query_segment_ids=segments, key_value_segment_ids=segments)
            return jfa.sharding.ring_attention(q, k, v, **ring), None
        k, v = portion.whole(k), portion.whole(v)
        (b, t), size = k.shape[:2], q.shape[1] // 2
        start = portion.starts(size)[:, None]
        if isinstance(cache, jfa.KVCache):
            return self._over_slots(q, k, v, rows.lengths, cache, start[:, 0])
        # each chunk as one more row with the same pages
        tables = tuple(jnp.concatenate([table, table]) for table in cache.page_tables)
        if rows.query_start is None:
            new = jnp.full(b, t) if rows.lengths is None else rows.lengths
            cache = cache.write(self.layer, k, v, rows.lengths)
        else:
            new, start = jnp.diff(rows.query_start), start - rows.query_start[:-1]
            cache = cache.write_ragged(self.layer, k[0], v[0], rows.query_start)
        # of each row, what comes before a chunk, and what is in it
        before, own = jnp.clip(start, 0, new), jnp.clip(start + size, 0, new) - jnp.clip(start, 0, new)
        twice = dataclasses.replace(cache, page_tables=tables, kv_len=(cache.kv_len + before).reshape(-1))
        own = own.reshape(-1)
        if rows.query_start is None:
            chunks = q.reshape(b, 2, size, *q.shape[2:]).swapaxes(0, 1).reshape(2 * b, size, *q.shape[2:])
            out = self._over_pages(chunks, twice, own)
            return out.reshape(2, b, size, *q.shape[2:]).swapaxes(0, 1).reshape(q.shape), cache
        query_start = jnp.concatenate([jnp.zeros(1, own.dtype), jnp.cumsum(own)])
        return self._ragged(q[0], twice, twice.kv_len + own, query_start)[None], cache

    def _over_slots(
        self,
        q: Float[Array, "b own hq d"],
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        lengths: Int[Array, " b"] | None,
        cache: jfa.KVCache,
        starts: Int[Array, " chunks"] | None = None,
        written: jfa.KVCache | None = None,
    ) -> tuple[Float[Array, "b own hq d"], jfa.KVCache]:
        """starts: q has chunks of the new tokens, which begin there; None: it has all. written: the cache with k, v."""
        layer, t = self.layer, k.shape[1]
        written = written or cache.write(layer, k, v, lengths)
        keys, values, offset = written.k[layer], written.v[layer], cache.kv_len
        if cache.is_ring(layer) and t == 1:
            assert self.window is not None
            # softmax does not depend on the order of the slots
            seen, held = cache.slots_seen(layer, self.window)
            see: dict[str, Any] = dict(mask=seen[:, None, None, :], key_value_seq_lengths=held, local_window_size=None)
        else:
            if cache.is_ring(layer):  # the first new tokens see slots that the last ones overwrite
                keys, values, offset = cache.followed_by(layer, k, v)
            see = dict(is_causal=True, query_offset=offset, key_value_seq_lengths=offset + t)
            see["query_seq_lengths"] = lengths if t > 1 else None
        if starts is None:
            return jfa.dot_product_attention(q, keys, values, **(self.options | see)), written
        out = []
        for chunk, start in zip(jnp.split(q, len(starts), axis=1), starts, strict=True):
            see["query_offset"] = offset + start
            if lengths is not None:
                see["query_seq_lengths"] = jnp.clip(lengths - start, 0, chunk.shape[1])
            out.append(jfa.dot_product_attention(chunk, keys, values, **(self.options | see)))
        return jnp.concatenate(out, axis=1), written

    def _over_pages(
        self, q: Float[Array, "b t hq d"], cache: jfa.PagedKVCache, lengths: Int[Array, " b"]
    ) -> Float[Array, "b t hq d"]:
        """Attends over the cache, which already contains the new tokens after its kv_len."""
        kv_len = cache.kv_len + lengths
        b, t = q.shape[:2]
        if t == 1:
            pages = cache.arguments(self.layer)
            out = jfa.paged_decode_attention(self._for_pages(q[:, 0], cache), kv_len=kv_len, **pages, **self.options)
            return _each(lambda x: x[:, None, : q.shape[2]], out)
        start = jnp.concatenate([jnp.zeros(1, lengths.dtype), jnp.cumsum(lengths)])
        if b == 1:
            return _each(lambda x: x[None], self._ragged(q[0], cache, kv_len, start))
        # the tokens of all rows are concatenated; padding gets the out-of-range index b * t
        token = jnp.arange(t)
        place = jnp.where(token < lengths[:, None], start[:-1, None] + token, b * t)
        together = jnp.zeros((b * t, *q.shape[2:]), q.dtype).at[place].set(q, mode="drop")
        out = self._ragged(together, cache, kv_len, start)
        return _each(lambda x: jnp.take(x, place, axis=0, mode="fill", fill_value=0), out)

    def _ragged(
        self,
        q: Float[Array, "n hq d"],
        cache: jfa.PagedKVCache,
        kv_len: Int[Array, " b"],
        query_start: Int[Array, " b+1"],
        tree_mask: Bool[Array, "n m"] | None = None,
    ) -> Float[Array, "n hq d"]:
        rows: dict[str, Any] = dict(kv_len=kv_len, query_start=query_start, tree_mask=tree_mask)
        queries, pages = self._for_pages(q, cache), cache.arguments(self.layer)
        out = jfa.ragged_paged_attention(queries, **rows, **pages, **self.options)
        return _each(lambda x: x[:, : q.shape[1]], out)

    def _for_pages(self, q: Float[Array, "n hq d"], cache: jfa.PagedKVCache) -> Float[Array, "n heads d"]:
        """Queries as a cache's pages need them: rotated once more for int4, and with those of spare key heads."""
        spare = cache.num_heads(self.head_dim) - self.num_kv_heads  # of all devices, which have none
        q = cache.rotated(q)
        return q if spare <= 0 else jnp.pad(q, ((0, 0), (0, spare * self.group_size), (0, 0)))

    @with_default_rules
    def _with_sinks(
        self,
        out: Float[Array, "b t hq d"],
        lse: Float[Array, "b t hq"],
        q: Float[Array, "b t hq d"],
        k: Float[Array, "b t hkv d"],
        v: Float[Array, "b t hkv d"],
        rows: Rows,
        cache: Cache | None,
    ) -> Float[Array, "b t hq d"]:
        """The attention to a window, and that to the first tokens outside of it.

        out, lse: of the window. q: not rotated. k, v: the new tokens, which the cache contains.
        """
        assert rows.sinks is not None and self.window is not None
        positions, rotation, row = rows.sinks
        (b, t, hq, d), n = q.shape, self.num_sinks
        q = q if rotation is None else rotation(q)
        kv_len = jnp.full(b, t) if rows.lengths is None else rows.lengths
        kv_len = kv_len if rows.query_start is None else jnp.diff(rows.query_start)
        kv_len = kv_len if cache is None else cache.kv_len + kv_len
        if cache is None:
            keys, values = k[:, :n], v[:, :n]
        elif isinstance(cache, jfa.KVCache):
            keys, values = cache.k[self.layer][:, :n], cache.v[self.layer][:, :n]
        else:
            q, held = cache.rotated(q), cache.first(self.layer, n, d, q.dtype)
            keys, values = (x[:, :, : k.shape[2]] for x in held)
        first = jnp.arange(keys.shape[1])
        values = jnp.where((first < kv_len[:, None])[..., None, None], values, 0)
        seen = first <= (positions - self.window)[..., None]  # the window has the others
        if row is not None:  # each token is a row of its own
            q, seen, keys, values = q.swapaxes(0, 1), seen.swapaxes(0, 1), keys[row], values[row]
        scores = jnp.einsum(
            "bthgd,bnhd->bthgn",
            q.reshape(*q.shape[:2], keys.shape[2], -1, d),
            keys.astype(q.dtype),
            preferred_element_type=jnp.float32,
        )
        scores = scores.reshape(b, t, hq, -1) * (d**-0.5 if self.options["scale"] is None else self.options["scale"])
        if (cap := self.options["logits_soft_cap"]) is not None:
            scores = cap * jnp.tanh(scores / cap)
        scores = jnp.where(seen.reshape(*positions.shape, 1, -1), scores, -jnp.inf)
        total = jnp.logaddexp(lse, jax.nn.logsumexp(scores, axis=-1))
        total = jnp.where(jnp.isneginf(total), 0.0, total)  # padding
        weights = jnp.exp(scores - total[..., None]).reshape(*q.shape[:2], keys.shape[2], -1, scores.shape[-1])
        of_first = jnp.einsum("bthgn,bnhd->bthgd", weights, values.astype(jnp.float32)).reshape(b, t, hq, -1)
        return (out * jnp.exp(lse - total)[..., None] + of_first).astype(out.dtype)


def _each(change: Callable[[Array], Array], out: Any) -> Any:
    """Changes an output, or an output and its log-sum-exp."""
    return jax.tree.map(change, out)


class Rotation:
    """Rotary position embedding at given positions, shared by the layers of one forward pass.

    Source: arXiv:2104.09864, in the half-split form of checkpoints from Hugging Face.
    """

    def __init__(self, config: DecoderConfig, rope: RopeConfig, positions: Int[Array, "b t"]):
        self.size = rope.rotary_dim or config.head_dim
        frequencies = jnp.asarray(rope.inverse_frequencies(config.head_dim, config.context_length), jnp.float32)
        angle = positions[..., None, None].astype(jnp.float32) * frequencies
        # [b, t, 1, size / 2]
        self.cos, self.sin = jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor

    def __call__(self, x: Float[Array, "b t h d"]) -> Float[Array, "b t h d"]:
        first, second, rest = jnp.split(x, (self.size // 2, self.size), axis=-1)
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        rotated = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return jnp.concatenate([*(part.astype(x.dtype) for part in rotated), rest], axis=-1)
