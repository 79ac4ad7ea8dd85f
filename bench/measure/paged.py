"""`jfa-bench paged`: paged decode attention, compared with the contiguous cache and a copy of the same number of bytes.

Decode reads every key and value once, so a copy's bandwidth is its upper limit: it is measured in the same run,
interleaved with the others.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa

from . import machine, outcome, timing, used


def measure(
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    page_sizes: Sequence[int],
    kv_dtypes: Sequence[str],
    heads: tuple[int, int],
    head_dim: int,
    dtype: str,
    implementation: Any,
    samples: int,
) -> Iterator[dict]:
    """Records of a copy, of the contiguous cache, and of each kind of page, for each batch and context.

    heads: (query heads, key heads). gb_per_s counts the keys and values that are read, including scales; for the copy
    the bytes that it reads and writes.
    """
    shared = machine.circumstances() | {"benchmark": "paged"}
    for batch, context in itertools.product(batches, contexts):
        case = {"batch": batch, "context": context, "heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
        case |= {"dtype": dtype, "page_size": None, "kv_dtype": None}
        q = jax.random.normal(jax.random.key(0), (batch, heads[0], head_dim), jnp.float32).astype(dtype)
        lengths = np.full(batch, context, np.int32)
        contiguous = jfa.KVCache.create(
            num_layers=1, batch=batch, capacity=context, num_kv_heads=heads[1], head_dim=head_dim, dtype=dtype
        )
        key, value = (_filled(x) for x in (contiguous.k[0], contiguous.v[0]))
        found, num_bytes = {"copy": case, "contiguous": case}, {"copy": 4 * key.nbytes, "contiguous": 2 * key.nbytes}
        copies = range(timing.copies_past_cache(2 * key.nbytes))
        rows = [(jnp.copy(key), jnp.copy(value)) for _ in copies]
        runs: dict[str, Callable] = {
            "copy": timing.rotating(jax.jit(lambda k, v: (k + 1, v + 1)), rows),
            "contiguous": timing.rotating(
                jax.jit(functools.partial(contiguous_step, implementation)), [(q, k, v, lengths) for k, v in rows]
            ),
        }
        caches = {}
        for page_size, kv_dtype in itertools.product(page_sizes, kv_dtypes):
            name = f"pages of {page_size}, {kv_dtype}"
            cache = _paged_cache(key, value, page_size, None if kv_dtype == "same" else kv_dtype)
            pools = [(q, jax.tree.map(jnp.copy, cache)) for _ in copies]
            run = timing.rotating(jax.jit(functools.partial(_paged, implementation)), pools)
            found[name] = case | {"page_size": page_size, "kv_dtype": kv_dtype}
            caches[name] = cache
            num_bytes[name], runs[name] = cache.num_bytes, run
        status, runs = outcome.tried(runs)
        taken = timing.in_turns(runs, samples=samples)
        medians = {name: float(np.median(ms)) for name, ms in taken.items()}
        copied = num_bytes["copy"] / medians["copy"] / 1e6
        for name, about in found.items():
            own: dict[str, Any] = {"case": about, "implementation": name.partition(" ")[0]} | status[name]
            if name in medians and name in caches:
                own |= {"config": used.paged(implementation, q, caches[name])}
            if name in medians:
                rate = num_bytes[name] / medians[name] / 1e6
                own |= timing.summary(taken[name]) | {"gb_per_s": rate, "share_of_peak": rate / copied}
                if name != "copy" and "contiguous" in medians:
                    own |= {"slowdown": medians[name] / medians["contiguous"]}
            yield shared | own


def _filled(x: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.key(x.size), x.shape, jnp.float32).astype(x.dtype)


def contiguous_step(implementation, q, key, value, lengths):
    """Attention of the last of `lengths` tokens of a contiguous cache. q: [b, hq, d]; key, value: [b, n, hkv, d]."""
    out = jfa.dot_product_attention(
        q[:, None],
        key,
        value,
        is_causal=True,
        query_offset=lengths - 1,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return out[:, 0]


def _paged(implementation, q, cache):
    return jfa.paged_decode_attention(
        cache.rotated(q), kv_len=cache.kv_len, implementation=implementation, **cache.arguments(0)
    )


def _paged_cache(key: jax.Array, value: jax.Array, page_size: int, kv_dtype: str | None) -> jfa.PagedKVCache:
    """The same tokens in pages in random order, as after many allocations and releases."""
    batch, context, hkv, head_dim = key.shape
    pages_per_seq = -(-context // page_size)
    num_pages = 1 + batch * pages_per_seq
    cache = jfa.PagedKVCache.create(
        num_layers=1,
        num_pages=num_pages,
        page_size=page_size,
        batch=batch,
        pages_per_seq=pages_per_seq,
        num_kv_heads=hkv,
        head_dim=head_dim,
        dtype=key.dtype,
        kv_dtype=kv_dtype,
    )
    table = 1 + np.random.default_rng(0).permutation(num_pages - 1).reshape(batch, pages_per_seq).astype(np.int32)
    written = jfa.PagedKVCache(
        k=cache.k, v=cache.v, page_tables=(jnp.asarray(table),), kv_len=cache.kv_len, table_of=cache.table_of
    )
    return jax.jit(lambda cache, k, v: cache.write(0, k, v).advance(context), donate_argnums=0)(written, key, value)
