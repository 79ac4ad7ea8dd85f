"""jax.export of the attention op: symbolic and static shapes, forward and gradients, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from runs import run

import jfa
from jfa_bench.truth.cases import CASES, GRADIENTS, truth
from jfa_bench.truth.numerics import assert_within, limit

TILES = {"xla": jfa.BlockConfig(block_q=16, block_kv=16), "reference": None}
QUICK = {
    "xla": ("everything", "cached_chunk", "alibi_per_row", "bias_per_key", "broadcast_dropout"),
    "reference": ("everything",),
}
# the plain formula has no tiles whose ends depend on a length: these have all options that look at a shape, and its
# gradients in static shapes are compared in every case by test_attention_gradients.py
ON_REFERENCE = ("everything", "lengths_with_empty_rows", "segments_window_and_lengths", "bias_per_key", "alibi_per_row")
WITHOUT = ("steep_scale",)  # its rounded formula has no meaningful gradient
PRODUCTS = 3  # consecutive products: the scores, their cotangent and the gradient
# the symbol of each axis of an argument; "." has a static size, as has every broadcast axis of size 1
AXES = {
    "query": "bq..",
    "key": "bk..",
    "value": "bk..",
    "bias": "b.qk",
    "mask": "b.qk",
    "alibi_slopes": "b.",
    "query_segment_ids": "bq",
    "key_value_segment_ids": "bk",
    "query_seq_lengths": "b",
    "key_value_seq_lengths": "b",
    "query_offset": "b",
    "d_out": "bq..",
    "d_lse": "bq.",
}


def symbolic(arrays):
    """The shapes of named arrays, with symbols for batch and lengths."""
    sizes = dict(zip("bqk", export.symbolic_shape("b, q, k"), strict=True))
    found = {}
    for name, x in arrays.items():
        symbols = AXES.get(name, "").rjust(x.ndim, ".")[-x.ndim :]
        broadcast = name in ("bias", "mask", "alibi_slopes")
        shape = (n if broadcast and n == 1 else sizes.get(at, n) for at, n in zip(symbols, x.shape, strict=True))
        found[name] = jax.ShapeDtypeStruct(tuple(shape), x.dtype)
    return found


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        run(name, backend, quick=name in QUICK[backend])
        for name in CASES
        for backend in TILES
        if name not in WITHOUT and (backend == "xla" or name in ON_REFERENCE)
    ],
)
def test_a_program_of_symbolic_lengths_agrees_with_the_oracle(name, backend):
    known = truth(name, "float32")
    arrays = dict(zip(("query", "key", "value"), known.arrays, strict=True)) | known.options
    arrays |= dict(d_out=known.d_out, d_lse=known.d_lse)
    fixed = {key: x for key, x in arrays.items() if key == "dropout_key" or not hasattr(x, "shape")}
    arrays = {key: jnp.asarray(x) for key, x in arrays.items() if key not in fixed}
    fixed |= dict(implementation=backend, config=TILES[backend], return_residual=True)

    def computed(arrays):
        inputs = {key: x for key, x in arrays.items() if key in GRADIENTS}
        d_out, d_lse = arrays["d_out"], arrays["d_lse"]
        others = {key: x for key, x in arrays.items() if key not in (*inputs, "d_out", "d_lse")}

        def loss(inputs):
            out, lse = jfa.dot_product_attention(**inputs, **others, **fixed)
            return (out * d_out).sum() + jnp.where(jnp.isfinite(lse), lse * d_lse, 0.0).sum(), (out, lse)

        gradients, (out, lse) = jax.grad(loss, has_aux=True)(inputs)
        return out, lse, gradients

    out, lse, gradients = export.export(jax.jit(computed))(symbolic(arrays)).call(arrays)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))
    for key, (want, plain) in known.gradients.items():
        assert_within(gradients[key], want, limit(want, plain, jnp.float32, products=PRODUCTS))


def test_a_deserialized_program_takes_every_length():
    [length] = export.symbolic_shape("length")
    attend = jax.jit(lambda q, k: jfa.dot_product_attention(q, k, k, is_causal=True, local_window_size=(150, 0)))
    shape = jax.ShapeDtypeStruct((length, 1, 16), jnp.float32)
    program = export.deserialize(export.export(attend)(shape, shape).serialize())
    x = jnp.asarray(np.random.default_rng(0).standard_normal((257, 1, 16)), jnp.float32)
    for size in (1, 127, 128, 129, 255, 257):
        want = jfa.dot_product_attention(
            *(x[:size],) * 3, is_causal=True, local_window_size=(150, 0), implementation="reference"
        )
        np.testing.assert_allclose(program.call(x[:size], x[:size]), want, atol=1e-5)


def test_only_lengths_that_may_end_inside_a_tile_are_padded():
    tiles, batch = export.symbolic_shape("tiles, batch")
    attend = jax.jit(lambda q: jfa.dot_product_attention(q, q, q, implementation="xla", config=TILES["xla"]))
    for length, padded in ((16 * tiles, False), (8 * tiles, True), (48, False)):
        program = export.export(attend)(jax.ShapeDtypeStruct((batch, length, 1, 16), jnp.float32))
        assert bool(re.search(r"stablehlo\.\w*pad\b", program.mlir_module())) == padded
        np.testing.assert_array_equal(program.call(jnp.ones((2, 48, 1, 16))), jnp.ones((2, 48, 1, 16)))


@pytest.mark.parametrize("backend", ["reference", "xla", "triton"])
def test_static_shapes_can_be_exported_on_every_backend(backend):
    x = jnp.linspace(-1, 1, 256).reshape(1, 16, 1, 16)
    attend = jax.jit(lambda x: jfa.dot_product_attention(x, x, x, implementation=backend))
    np.testing.assert_array_equal(export.export(attend)(x).call(x), attend(x))


def test_triton_refuses_symbolic_lengths():
    [length] = export.symbolic_shape("length")
    x = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    attend = jax.jit(lambda x: jfa.dot_product_attention(x, x, x, implementation="triton"))
    with pytest.raises(jfa.UnsupportedError, match=r"static size, but query has the symbolic shape \(1, length, 2, 16"):
        export.export(attend)(x)


def test_symbolic_heads_are_refused():
    [heads] = export.symbolic_shape("heads")
    x = jax.ShapeDtypeStruct((1, 8, heads, 16), jnp.float32)
    with pytest.raises(ValueError, match=r"query: only batch and length may be symbolic.* got \(1, 8, heads, 16\)"):
        export.export(jax.jit(jfa.dot_product_attention))(x, x, x)


def test_pages_of_a_symbolic_shape_are_refused():
    [num_pages] = export.symbolic_shape("num_pages")
    pages = jax.ShapeDtypeStruct((num_pages, 4, 1, 16), jnp.float32)
    attend = jax.jit(lambda pages: jfa.paged_decode_attention(jnp.ones((1, 1, 16)), pages, pages, [[1]], [3]))
    with pytest.raises(ValueError, match=r"key_pages must have a static shape, got \(num_pages, 4, 1, 16\)"):
        export.export(attend)(pages)
