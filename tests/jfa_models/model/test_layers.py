"""Mixtures of experts: each token is computed by the experts it is routed to, and by no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import tiny_config

from jfa_models.model.config import ExpertsConfig
from jfa_models.model.layers import Experts, for_each_expert

SCALES = jnp.array([1.0, 10.0, 100.0, 1000.0])


def scaled(rows, expert):
    return rows * SCALES[expert]


CHOSEN = {  # name: (tokens, chosen experts of each)
    "one_token": (1, [[2, 0]]),
    "all_to_one": (5, [[3]] * 5),
    "none_to_some": (7, [[0, 3], [3, 0], [0, 3], [0, 3], [3, 0], [0, 3], [0, 3]]),
    "every_expert": (2, [[0, 1, 2, 3], [3, 2, 1, 0]]),
    "no_tokens": (0, np.zeros((0, 2), np.int32)),
}


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("x64", [False, True])
def test_a_token_gets_the_outputs_of_its_experts_in_its_order(name, x64):
    n, chosen = CHOSEN[name]
    tokens = jnp.arange(1.0, 1 + 3 * n, dtype=jnp.float32).reshape(n, 3)
    chosen = jnp.asarray(chosen, jnp.int32)
    with jax.enable_x64(x64):
        got = jax.jit(lambda x, c: for_each_expert(scaled, x, c, 4))(tokens, chosen)
    np.testing.assert_array_equal(got, tokens[:, None] * SCALES[chosen][..., None])


def test_gradients_flow_only_through_the_chosen_experts():
    tokens, chosen = jnp.ones((3, 2)), jnp.array([[1], [1], [2]])
    d_tokens, d_scales = jax.grad(
        lambda x, s: for_each_expert(lambda rows, e: rows * s[e], x, chosen, 4).sum(), argnums=(0, 1)
    )(tokens, SCALES)
    np.testing.assert_array_equal(d_tokens, SCALES[chosen] * jnp.ones((3, 2)))
    np.testing.assert_array_equal(d_scales, [0.0, 4.0, 2.0, 0.0])


def test_the_cost_of_a_mixture_is_that_of_the_chosen_experts():
    """The products of 64 tokens that choose 2 of 16 experts: no more than those of 4 experts for all tokens."""
    config = dataclasses.replace(
        tiny_config(num_layers=1, context_length=64),
        experts=ExpertsConfig(num_experts=16, experts_per_token=2, intermediate_size=64),
    )
    graph, state = nnx.split(Experts(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    x = jnp.ones((64, config.hidden_size))
    blocks = []

    def counted(rows, expert):
        jax.debug.callback(lambda e: blocks.append(int(e)), expert)
        return rows

    weights = nnx.merge(graph, state).router(jax.random.normal(jax.random.key(0), x.shape))
    chosen = jax.lax.top_k(weights, 2)[1]
    for_each_expert(counted, x, chosen, 16)
    jax.effects_barrier()
    rows = 64 * 2 // 16
    assert len(blocks) == sum(-(-int((chosen == e).sum()) // rows) for e in range(16)) <= 2 * 16
