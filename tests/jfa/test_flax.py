"""Flax's layers with jfa's attention_fn give the same results as with Flax's own attention."""

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


def test_bias_with_a_batch_axis():
    q = jax.random.normal(jax.random.key(2), (2, 3, 11, 4, 16))
    bias = jax.random.normal(jax.random.key(3), (3, 1, 11, 11))
    want = nnx.dot_product_attention(q, q, q, bias=jnp.broadcast_to(bias, (2, 3, 4, 11, 11)))
    np.testing.assert_allclose(jfa.flax.attention_fn(q, q, q, bias=bias), want, atol=1e-5)


def test_jfa_options_through_partial():
    window = functools.partial(jfa.flax.attention_fn, local_window_size=2, implementation="reference")
    q = jax.random.normal(jax.random.key(2), (2, 11, 4, 16))
    want = jfa.dot_product_attention(q, q, q, local_window_size=2)
    np.testing.assert_allclose(window(q, q, q), want, atol=1e-5)


def test_computes_in_the_layer_dtype():
    assert nnx_layer(attention_fn=jfa.flax.attention_fn, dtype=jnp.bfloat16)(X).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(precision=jax.lax.DotAlgorithmPreset.F64_F64_F64),
            "precision=F64_F64_F64 is not supported: products have float32 precision, .*; use precision=None",
        ),
        (
            dict(precision=("highest", "exact")),
            r"precision=\('highest', 'exact'\) is not supported",
        ),
        (dict(precision=np.array(1)), "precision=1 is not supported"),
        (dict(precision=(("high",), "high")), r"precision=\(\('high',\), 'high'\) is not supported"),
        (
            dict(module=object()),
            "sow_weights is not supported: the attention weights are never stored; set it to False",
        ),
        (
            dict(qk_attn_weights_einsum=jnp.einsum),
            "custom einsum classes are not supported: .*; do not set them in the layer",
        ),
    ],
)
def test_refusals(options, message):
    q = jnp.ones((1, 4, 2, 16))
    with pytest.raises(jfa.UnsupportedError, match=message):
        jfa.flax.attention_fn(q, q, q, **options)


def test_inactive_dropout_has_no_effect():
    q = jnp.ones((1, 4, 2, 16))
    assert jfa.flax.attention_fn(q, q, q, dropout_rate=0.5, deterministic=True).shape == q.shape


def test_active_dropout_needs_a_key():
    q = jnp.ones((1, 4, 2, 16))
    with pytest.raises(ValueError, match=r"dropout_rate=0\.5 needs a dropout_key"):
        jfa.flax.attention_fn(q, q, q, dropout_rate=0.5)


@pytest.mark.parametrize("broadcast", [True, False])
def test_dropout_is_broadcast_over_rows_and_heads_as_in_flax(broadcast):
    q = jnp.zeros((3, 40, 2, 16))  # all weights are equal: the output shows which values were kept
    v = jnp.broadcast_to(jnp.arange(40.0)[:, None, None], q.shape)
    out = jfa.flax.attention_fn(q, q, v, broadcast_dropout=broadcast, dropout_rng=jax.random.key(3), dropout_rate=0.5)
    alike = np.array_equal(out, np.broadcast_to(out[:1, :, :1], out.shape))
    assert alike == broadcast


def test_a_layer_with_dropout_runs_and_is_reproducible():
    layer = nnx_layer(attention_fn=jfa.flax.attention_fn, dropout_rate=0.3)
    first, again, other = (layer(X, rngs=nnx.Rngs(seed), deterministic=False) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_model_trains_as_with_flax_attention():
    """Twenty steps of a two-layer model that learns to repeat the token before the last."""
    tokens = jax.random.randint(jax.random.key(0), (16, 12), 0, 8)
    wanted = jnp.roll(tokens, 2, axis=1)

    class Model(nnx.Module):
        def __init__(self, attention_fn, rngs):
            self.embed = nnx.Embed(8, 32, rngs=rngs)
            options = dict(num_heads=2, in_features=32, decode=False, rngs=rngs)
            options |= {} if attention_fn is None else dict(attention_fn=attention_fn)
            self.layers = nnx.List([nnx.MultiHeadAttention(**options) for _ in range(2)])
            self.head = nnx.Linear(32, 8, rngs=rngs)
            self.position = nnx.Param(jax.random.normal(rngs.params(), (12, 32)))

        def __call__(self, tokens):
            x = self.embed(tokens) + self.position[...]
            for layer in self.layers:
                x = x + layer(x, mask=nnx.make_causal_mask(tokens))
            return self.head(x)

    def curve(attention_fn):
        model = Model(attention_fn, nnx.Rngs(0))
        graph, params = nnx.split(model)

        def loss(params):
            logits = jax.nn.log_softmax(nnx.merge(graph, params)(tokens))
            return -jnp.take_along_axis(logits, wanted[..., None], 2)[:, 2:].mean()

        step = jax.jit(jax.value_and_grad(loss))
        losses = []
        for _ in range(20):
            value, grads = step(params)
            losses.append(float(value))
            params = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
        return losses

    ours, theirs = curve(jfa.flax.attention_fn), curve(None)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    assert ours[-1] < 0.7 * ours[0]


P = jax.lax.Precision
PRECISIONS = [None, "default", "high", "highest", "float32", "tensorfloat32", "bfloat16", P.HIGH, P.HIGHEST]
PRECISIONS += ["BF16_BF16_F32", ["highest", "F32_F32_F32"]]
PRECISIONS += [(P.DEFAULT, "highest"), *(one for one in jax.lax.DotAlgorithmPreset if "F64" not in one.name)]


def test_a_precision_that_is_met_changes_nothing():
    q = jnp.arange(2 * 4 * 2 * 16, dtype=jnp.float32).reshape(2, 4, 2, 16) / 100
    want = jfa.flax.attention_fn(q, q, q)
    for precision in PRECISIONS:
        np.testing.assert_array_equal(jfa.flax.attention_fn(q, q, q, precision=precision), want, err_msg=str(precision))


OTHER_BATCH = {  # name: shapes of query, key and value
    "rank": ((2, 4, 2, 16), (4, 2, 16), (4, 2, 16)),
    "one_row": ((2, 4, 2, 16), (1, 4, 2, 16), (1, 4, 2, 16)),
    "value": ((3, 2, 4, 2, 16), (3, 2, 4, 2, 16), (2, 3, 4, 2, 16)),
}


@pytest.mark.parametrize("name", OTHER_BATCH)
def test_other_batch_axes_are_refused(name):
    q, k, v = (jnp.ones(shape) for shape in OTHER_BATCH[name])
    with pytest.raises(ValueError, match=r"must have the same batch axes before \[length, heads, head_dim\], got \["):
        jfa.flax.attention_fn(q, k, v)
