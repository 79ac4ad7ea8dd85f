"""attention_fn under Flax's own layers gives what Flax's own attention gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jfa
import jfa.flax

X = jax.random.normal(jax.random.key(0), (2, 3, 11, 32))  # two batch axes


def nnx_layer(**options):
    return nnx.MultiHeadAttention(
        num_heads=4, in_features=32, qkv_features=64, decode=False, rngs=nnx.Rngs(0), **options
    )


def linen_layer(**options):
    return linen.MultiHeadDotProductAttention(num_heads=4, qkv_features=64, **options)


CALLS = {
    "plain": {},
    "causal_mask": dict(mask=linen.make_causal_mask(jnp.ones((2, 3, 11)))),  # Flax makes masks of floats
    "padding_mask": dict(mask=linen.make_attention_mask(jnp.ones(11), jnp.arange(11) < 7)),
}


@pytest.mark.parametrize("call", CALLS)
def test_nnx(call):
    ours, theirs = nnx_layer(attention_fn=jfa.flax.attention_fn), nnx_layer()
    np.testing.assert_allclose(ours(X, **CALLS[call]), theirs(X, **CALLS[call]), atol=1e-5)


def test_nnx_causal_flag():
    ours, theirs = nnx_layer(attention_fn=jfa.flax.attention_fn), nnx_layer()
    np.testing.assert_allclose(ours(X, is_causal=True), theirs(X, is_causal=True), atol=1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_linen_and_its_gradient(call):
    ours, theirs = linen_layer(attention_fn=jfa.flax.attention_fn), linen_layer()
    params = theirs.init(jax.random.key(1), X)

    def loss(layer, params):
        return jnp.square(layer.apply(params, X, **CALLS[call])).sum()

    np.testing.assert_allclose(loss(ours, params), loss(theirs, params), rtol=1e-5)
    for got, want in zip(
        jax.tree.leaves(jax.grad(functools.partial(loss, ours))(params)),
        jax.tree.leaves(jax.grad(functools.partial(loss, theirs))(params)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=2e-4)


def test_bias_with_a_batch_axis_of_its_own():
    q = jax.random.normal(jax.random.key(2), (2, 3, 11, 4, 16))
    bias = jax.random.normal(jax.random.key(3), (3, 1, 11, 11))
    want = nnx.dot_product_attention(q, q, q, bias=jnp.broadcast_to(bias, (2, 3, 4, 11, 11)))
    np.testing.assert_allclose(jfa.flax.attention_fn(q, q, q, bias=bias), want, atol=1e-5)


def test_options_of_ours_through_partial():
    window = functools.partial(jfa.flax.attention_fn, local_window_size=2, implementation="reference")
    q = jax.random.normal(jax.random.key(2), (2, 11, 4, 16))
    want = jfa.dot_product_attention(q, q, q, local_window_size=2)
    np.testing.assert_allclose(window(q, q, q), want, atol=1e-5)


def test_computes_in_the_layer_dtype():
    assert nnx_layer(attention_fn=jfa.flax.attention_fn, dtype=jnp.bfloat16)(X).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dropout_rate=0.5), "dropout_rate=0.5: dropout inside attention is not built yet; set dropout_rate=0"),
        (dict(precision="bfloat16"), "precision=bfloat16: products are as exact as their dtype; leave it None"),
        (dict(module=object()), "blockwise attention never holds the weights; leave sow_weights off"),
        (dict(qk_attn_weights_einsum=jnp.einsum), "leave the einsum classes of the layer out"),
    ],
)
def test_refusals(options, message):
    q = jnp.ones((1, 4, 2, 16))
    with pytest.raises(jfa.UnsupportedError, match=message):
        jfa.flax.attention_fn(q, q, q, **options)


def test_dropout_that_is_off_is_no_dropout():
    q = jnp.ones((1, 4, 2, 16))
    assert jfa.flax.attention_fn(q, q, q, dropout_rate=0.5, deterministic=True).shape == q.shape
