"""Mixtures of experts: each token is computed by the experts it is routed to, and by no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_model import tiny_config

from jfa_models.model.config import ExpertsConfig
from jfa_models.model.layers import Experts, for_each_expert, where_experts_are

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


ROUTES = {  # device and token -> experts, two on each of four devices
    "evenly": lambda device, token: [(2 * token + device) % 8, (2 * token + device + 3) % 8],
    "all_to_one": lambda device, token: [6, 7],
    "from_one_to_one": lambda device, token: [0, 1] if device == 2 else [2 * device, 2 * device + 1],
}


@pytest.mark.parametrize("name", ROUTES)
def test_tokens_of_several_devices_reach_their_experts(name):
    """In as many rounds as it takes: however uneven they are, none is dropped."""
    n, scales = 40, 10.0 ** np.arange(8)
    chosen = np.array([[ROUTES[name](device, token) for token in range(n)] for device in range(4)]).reshape(-1, 2)
    rng = np.random.default_rng(0)
    tokens, weights = (rng.integers(1, 9, (4 * n, size)).astype(np.float32) for size in (3, 2))

    def of_own_experts(tokens, chosen, weights):
        own = chosen - 2 * jax.lax.axis_index("x")
        scale = jnp.asarray(scales)[jnp.clip(chosen, 0, 7)] * weights
        return tokens * jnp.where((own >= 0) & (own < 2), scale, 0).sum(-1, keepdims=True)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))

    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    def run(*rows):
        return where_experts_are(of_own_experts, *rows, num_own=2, axes=("x",))

    want = tokens * (scales[chosen] * weights).sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.jit(run)(tokens, jnp.asarray(chosen, jnp.int32), weights), want, rtol=1e-6)


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
