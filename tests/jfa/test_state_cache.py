"""StateCache: states of a fixed size beside the keys and values of both caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa


def states(rows=2):
    shape = dict(conv_width=4, channels=5, num_heads=3, key_dim=2, value_dim=6)
    return jfa.StateCache.create(num_layers=2, rows=rows, dtype=jnp.bfloat16, **shape)


def test_a_new_one_has_zeros_in_each_layer():
    cache = states()
    assert [x.shape for x in cache.conv] == [(2, 3, 5)] * 2 and cache.conv[0].dtype == jnp.bfloat16
    assert [x.shape for x in cache.state] == [(2, 3, 2, 6)] * 2 and cache.state[0].dtype == jnp.float32
    assert not any(x.any() for x in jax.tree.leaves(cache))
    assert cache.num_bytes == 2 * 2 * (3 * 5 * 2 + 3 * 2 * 6 * 4)  # layers, rows


def test_write_changes_one_layer():
    before = states()
    cache = before.write(1, before.conv[1] + 1, before.state[1] + 2)
    assert not cache.conv[0].any() and not cache.state[0].any()
    assert (cache.conv[1] == 1).all() and (cache.state[1] == 2).all()


def test_take_gives_rows_in_any_order():
    before = states(rows=3)
    before = before.write(0, before.conv[0] + jnp.arange(3)[:, None, None].astype(jnp.bfloat16), before.state[0])
    taken = before.take(np.array([2, 0, 7, 2]))
    assert taken.num_rows == 4
    assert taken.conv[0][:, 0, 0].tolist() == [2, 0, 2, 2] and taken.state[1].shape == (4, 3, 2, 6)


CACHES = {
    "contiguous": lambda: jfa.KVCache.create(
        num_layers=1, batch=2, capacity=4, num_kv_heads=1, head_dim=2, dtype=jnp.float32
    ),
    "paged": lambda: jfa.PagedKVCache.create(
        num_layers=1, num_pages=3, page_size=4, batch=2, pages_per_seq=1, num_kv_heads=1, head_dim=2, dtype=jnp.float32
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_both_caches_carry_states_and_none_of_them_goes_back(name):
    plain = CACHES[name]()
    cache = dataclasses.replace(plain, states=states())
    assert cache.num_bytes == plain.num_bytes + states().num_bytes

    @jax.jit
    def step(cache):
        new = cache.states.write(0, cache.states.conv[0], cache.states.state[0] + 1)
        return dataclasses.replace(cache, states=new).advance(1)

    after = step(step(cache))
    assert after.kv_len.tolist() == [2, 2] and (after.states.state[0] == 2).all()
    assert plain.advance(2).truncate(np.array([1, 1])).kv_len.tolist() == [1, 1]
    with pytest.raises(ValueError, match="a cache with states cannot drop tokens: a state cannot be taken back"):
        after.truncate(np.array([1, 1]))


def test_a_cache_without_attention_counts_its_tokens():
    cache = jfa.KVCache.create(num_layers=0, batch=2, capacity=4, num_kv_heads=0, head_dim=0, dtype=jnp.float32)
    assert cache.advance(jnp.array([3, 1])).kv_len.tolist() == [3, 1] and cache.num_bytes == 0
