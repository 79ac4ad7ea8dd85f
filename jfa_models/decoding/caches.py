"""KV caches of a decoder: how they are created and extended."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jax.typing import DTypeLike

import jfa
from jfa_models.decoding.options import CacheOptions
from jfa_models.model.attention import Cache, check_kv_dtype, paged_cache
from jfa_models.model.config import DecoderConfig
from jfa_models.model.mixers import state_cache
from jfa_models.model.partition import WHOLE, Partition

# Prompts are prefilled in chunks of PREFILL_CHUNK tokens for each device, the last one padded to a power of two; cache
# capacities and batch sizes are powers of two. This keeps the number of shapes, and so of compilations, small.
PREFILL_CHUNK = 512
SMALLEST_CHUNK = 16
SMALLEST_CAPACITY = 256
SLACK = 128  # tokens that a layer stores in addition to its window: how far a session can go back


def new_cache(
    config: DecoderConfig,
    options: CacheOptions,
    *,
    batch: int,
    capacity: int,
    dtype: DTypeLike,
    partition: Partition = WHOLE,
) -> Cache:
    """An empty cache for at least capacity tokens per row; contiguous if no layer has attention."""
    capacity = max(SMALLEST_CAPACITY, power_of_two(capacity))
    check_kv_dtype(config, options.kv_dtype)
    states = state_cache(config, batch=batch, dtype=dtype)
    if options.kind == "contiguous" or not config.attention_layers:
        cache = jfa.KVCache.create(
            num_layers=len(config.attention_layers),
            batch=batch,
            capacity=capacity,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=dtype,
            # the first tokens have no place in a ring
            windows=[None if config.is_streaming(i) else config.window(i) for i in config.attention_layers],
            slack=SLACK,
            sharding=partition.of_kv,
        )
        return dataclasses.replace(cache, states=states)
    own = _own_pages(config, batch, capacity, options.page_size, prefill_chunk(partition))
    cache = paged_cache(
        config,
        num_pages=[1 + int(table.max(initial=0)) for table in own],
        page_size=options.page_size,
        batch=batch,
        pages_per_seq=own[0].shape[1],
        dtype=dtype,
        kv_dtype=options.kv_dtype,
        sharding=partition.of_kv,
    )
    return dataclasses.replace(cache, page_tables=own, states=states)


def _own_pages(config: DecoderConfig, batch: int, capacity: int, page_size: int, chunk: int) -> tuple[np.ndarray, ...]:
    """Page tables in which every row has its own pages from the start: nothing is shared.

    The pages of a window are reused cyclically: pages that slid out of the window store the next tokens. Those of the
    first tokens are not, where layers see these too.
    """
    columns = -(-capacity // page_size)
    tables = []
    for window in config.patterns:
        # a whole chunk is written before its first token attends to the cache
        cycle = columns if window is None else min(columns, 1 + -(-(window + chunk + SLACK) // page_size))
        first = min(columns, -(-config.sinks_of(window) // page_size))
        column = np.arange(columns)
        page = np.where(column < first, column, first + (column - first) % cycle)
        tables.append(1 + (first + cycle) * np.arange(batch)[:, None] + page)
    return tuple(table.astype(np.int32) for table in tables)


def grown(config: DecoderConfig, cache: Cache, capacity: int, partition: Partition = WHOLE) -> Cache:
    """The cache of one row, extended to capacity tokens."""
    if isinstance(cache, jfa.KVCache):
        return cache.grow(capacity)
    own = _own_pages(config, 1, capacity, cache.page_size, prefill_chunk(partition))
    return dataclasses.replace(cache.grow([1 + int(table.max()) for table in own]), page_tables=own)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def prefill_chunk(partition: Partition) -> int:
    """The most tokens of each prompt that a step prefills."""
    return PREFILL_CHUNK * partition.size(partition.tokens)


def prefill_chunks(
    prompts: Sequence[Sequence[int]], size: int, partition: Partition, *, is_whole: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens i32[size, t], lengths i32[size]) for each chunk; a finished or padding row has length 0.

    is_whole: prompts are one chunk, which has at most an eighth of padding after the longest if that is long.
    """
    longest = max(len(prompt) for prompt in prompts)
    chunk, start = prefill_chunk(partition), 0
    if is_whole and longest > chunk:
        step = max(chunk, power_of_two(longest) // 8)
        chunk = -(-longest // step) * step
    while start < longest:
        t = min(chunk, max(SMALLEST_CHUNK, power_of_two(longest - start)))
        tokens, lengths = np.zeros((size, t), np.int32), np.zeros(size, np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + t]
            tokens[row, : len(part)], lengths[row] = part, len(part)
        yield tokens, lengths
        start += t
