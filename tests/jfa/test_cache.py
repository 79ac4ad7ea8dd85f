"""KVCache: only kv_len determines which tokens are valid."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa


def empty(capacity=6):
    return jfa.KVCache.create(num_layers=2, batch=2, capacity=capacity, num_kv_heads=1, head_dim=2, dtype=jnp.float32)


def tokens(*values):
    """k or v [2, t, 1, 2]: all elements of a token have the given value."""
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32)[None, :, None, None], (2, len(values), 1, 2))


def test_write_starts_at_kv_len_and_advance_makes_tokens_valid():
    cache = empty().write(1, tokens(1, 2, 3), tokens(4, 5, 6)).advance(jnp.array([3, 1]))
    cache = cache.write(1, tokens(7), tokens(8))
    np.testing.assert_array_equal(cache.k[1][:, :, 0, 0], [[1, 2, 3, 7, 0, 0], [1, 7, 3, 0, 0, 0]])
    np.testing.assert_array_equal(cache.v[1][:, :, 0, 0], [[4, 5, 6, 8, 0, 0], [4, 8, 6, 0, 0, 0]])
    assert not cache.k[0].any() and cache.kv_len.tolist() == [3, 1]


def test_tokens_past_the_capacity_are_dropped():
    cache = empty(capacity=2).advance(1).write(0, tokens(1, 2, 3), tokens(1, 2, 3))
    np.testing.assert_array_equal(cache.k[0][:, :, 0, 0], [[0, 1], [0, 1]])


def test_truncate_never_lengthens():
    assert empty().advance(4).truncate(jnp.array([2, 5])).kv_len.tolist() == [2, 4]


def test_grow_keeps_the_tokens():
    cache = empty().write(0, tokens(1), tokens(2)).advance(1).grow(16)
    assert cache.capacity == 16 and cache.k[0][0, 0, 0, 0] == 1 and cache.kv_len.tolist() == [1, 1]
    with pytest.raises(ValueError, match="a cache of 16 slots cannot grow to 8"):
        cache.grow(8)


def test_num_bytes():
    assert empty().num_bytes == 2 * 2 * 2 * 6 * 1 * 2 * 4  # layers, k and v, rows, slots, heads, head_dim, bytes


def test_is_a_pytree_and_is_written_in_place_if_donated():
    @jax.jit
    def step(cache, k):
        return cache.write(0, k, k).advance(1)

    donating = jax.jit(step, donate_argnums=0)
    cache = empty()
    used = donating.lower(cache, tokens(1)).compile().memory_analysis()
    assert used.alias_size_in_bytes >= cache.num_bytes
    after = donating(cache, tokens(1))
    assert cache.k[0].is_deleted() and after.kv_len.tolist() == [1, 1]


@pytest.mark.parametrize("lengths", [(1, 1), (3, 2), (0, 4), (7, 12), (12, 9)])
@pytest.mark.parametrize("kv_len", [(0, 0), (3, 5), (6, 13), (40, 7)])
def test_a_ring_keeps_the_last_tokens_of_each_row(kv_len, lengths):
    """Compares slots with positions counted one by one; the value in a slot is the position of its token."""
    window, slack, slots = 4, 2, 6
    cache = jfa.KVCache.create(
        num_layers=2, batch=2, capacity=64, num_kv_heads=1, head_dim=1, dtype=jnp.float32, windows=(4, None), slack=2
    )
    assert [cache.is_ring(layer) for layer in range(2)] == [True, False]
    held = np.full((2, slots, 1, 1), np.nan, np.float32)
    for row, n in enumerate(kv_len):
        for position in range(n):
            held[row, position % slots] = position
    cache = dataclasses.replace(
        cache, k=(jnp.array(held), cache.k[1]), v=(jnp.array(held), cache.v[1]), kv_len=jnp.array(kv_len)
    )
    t = max(lengths)
    new = (np.array(kv_len)[:, None] + np.arange(t)).astype(np.float32).reshape(2, t, 1, 1)

    keys, _, offset = cache.followed_by(0, new, new)
    after = cache.write(0, new, new, jnp.array(lengths))
    for row, (n, length) in enumerate(zip(kv_len, lengths, strict=True)):
        assert offset[row] == min(n, slots)
        want = [*range(max(0, n - slots), n), *range(n, n + t)]
        assert keys[row, : len(want), 0, 0].tolist() == want
        kept = {position: after.k[0][row, position % slots, 0, 0] for position in range(n + length)[-slots:]}
        assert all(position == stored for position, stored in kept.items())
        if length == t == 1:
            seen, filled = after.slots_seen(0, window)
            assert filled[row] == min(n + 1, slots)
            want = set(range(max(0, n - window + 1), n + 1))
            assert {float(x) for x in after.k[0][row, :, 0, 0][seen[row]]} == want
    assert slack == slots - window


def test_grow_enlarges_a_windowed_layer_until_it_is_a_ring():
    options = dict(num_layers=1, batch=1, num_kv_heads=1, head_dim=1, dtype=jnp.float32, windows=(4,), slack=2)
    cache = jfa.KVCache.create(capacity=5, **options)
    assert cache.k[0].shape[1] == 5 and not cache.is_ring(0)
    grown = cache.grow(16)
    assert grown.k[0].shape[1] == 6 and grown.is_ring(0) and grown.capacity == 16
    with pytest.raises(ValueError, match="windows must have one entry for each of 1 layers, got 2"):
        jfa.KVCache.create(capacity=5, **(options | dict(windows=(4, 4))))
