"""Quantized arrays: the bounds of their errors, their layout in memory, and what is refused."""

import functools

import hypothesis.extra.numpy
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jfa
from jfa import quant

FLOAT32 = np.finfo(np.float32)
LARGEST = float(np.float32(3e38))


@functools.partial(jax.jit, static_argnames=("kind", "dtype"))
def round_trip(x, kind, dtype=jnp.float32):
    found = quant.quantize(x, kind)
    return found, quant.dequantize(found, dtype)


def vectors(*shape):
    """Seeded normally distributed vectors of different magnitudes."""
    random = np.random.default_rng(0)
    return random.standard_normal(shape) * np.exp(2 * random.standard_normal((*shape[:-1], 1)))


def half_steps(x, kind, scales):
    """The largest error of the nearest number of a kind, computed from the scales."""
    scales = np.asarray(scales, np.float64)[..., None]
    step = np.ones(x.shape)
    if kind == "fp8":
        in_scales = np.abs(x) / np.where(scales == 0, 1, scales)
        # three bits of mantissa; numbers below 2^-6 have the same step as 2^-6
        step = 2.0 ** (np.floor(np.log2(np.maximum(in_scales, 2.0**-6))) - 3)
    rounding = 2 * float(FLOAT32.eps) * np.abs(x).max(-1, keepdims=True, initial=0)
    # results and scales below the smallest normal float32 may be flushed to 0
    vanished = float(FLOAT32.tiny) * np.where(scales == 0, quant.KINDS[kind][1], 1)
    return 0.5 * step * scales + rounding + vanished


def check(x, kind):
    """Checks that quantizing and dequantizing x has an error within the computed bound; returns the result."""
    found, got = round_trip(x, kind)
    assert found.kind == kind and found.scales.dtype == jnp.bfloat16 and found.scales.shape == x.shape[:-1]
    got, x = np.asarray(got, np.float64), np.asarray(x, np.float64)
    error, allowed = np.abs(got - x), half_steps(x, kind, found.scales)
    assert (error <= allowed).all(), f"{error.max()} off where {allowed.flat[error.argmax()]} is allowed"
    return got


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", quant.KINDS)
def test_the_error_of_a_number_is_at_most_half_a_step(kind, dtype):
    check(jnp.asarray(vectors(3, 8), dtype), kind)
    largest = float(jnp.finfo(dtype).max) / 2 if dtype != "float32" else LARGEST
    check(jnp.asarray([[largest, -largest, 1.0, 0.0, 9.0, largest / 2, 8.0, 7.0]] * 3, dtype), kind)


@pytest.mark.parametrize("magnitude", [1e-40, 1e-37, 1e-35, 1e-30, 1e30, LARGEST])
@pytest.mark.parametrize("kind", quant.KINDS)
def test_the_error_of_tiny_and_huge_numbers_is_at_most_half_a_step(kind, magnitude):
    got = check(jnp.asarray([np.linspace(-1, 1, 8) * magnitude] * 3, jnp.float32), kind)
    assert np.isfinite(got).all()
    if magnitude >= 1e-35:
        assert got[0, 0] < 0 < got[0, -1], "a magnitude whose scale is representable must not become 0"


@pytest.mark.parametrize("kind", quant.KINDS)
@settings(max_examples=50, deadline=None)
@given(x=hypothesis.extra.numpy.arrays(np.float32, (3, 8), elements=st.floats(-LARGEST, LARGEST, width=32)))
def test_the_error_of_any_finite_vector_is_at_most_half_a_step(kind, x):
    check(x, kind)


def test_the_largest_number_of_a_dtype_stays_finite():
    infinite = []
    for kind in quant.KINDS:
        for dtype in ("float32", "bfloat16", "float16"):
            largest = float(jnp.finfo(dtype).max)
            _, got = round_trip(jnp.full((3, 8), largest, dtype), kind, dtype)
            if not np.isfinite(np.asarray(got, np.float64)).all():
                infinite.append((kind, dtype))
    assert not infinite


@pytest.mark.parametrize("kind", quant.KINDS)
def test_vectors_of_zeros_stay_zeros(kind):
    x = np.zeros((3, 8), np.float32)
    x[1] = 1
    found, got = round_trip(x, kind)
    assert not got[0].any() and not got[2].any() and got[1].all()
    np.testing.assert_array_equal(found.scales != 0, [False, True, False])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_among_other_numbers_stay_zeros(kind):
    x = vectors(3, 8).astype(np.float32)
    x[:, ::2] = 0
    assert not np.asarray(round_trip(x, kind)[1])[:, ::2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", quant.KINDS)
def test_a_vector_with_nan_or_infinity_becomes_nan_without_affecting_others(kind, bad):
    x = vectors(3, 8).astype(np.float32)
    want = np.array(round_trip(x, kind)[1])
    x[1, 5], want[1] = bad, np.nan
    np.testing.assert_array_equal(round_trip(x, kind)[1], want)


def test_byte_i_of_int4_has_element_i_low_and_element_i_plus_half_high():
    levels = np.array([[0, 15, 3, 7, 9, 12, 15, 1], [15, 0, 8, 8, 4, 2, 6, 13], [0] * 8])
    found, got = round_trip((levels - 7.5).astype(np.float32), "int4")
    assert found.values.dtype == jnp.uint8 and found.scales.tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_array_equal(found.values, levels[:, :4] + 16 * levels[:, 4:])
    np.testing.assert_array_equal(quant.numbers(found.values), levels - 7.5)
    np.testing.assert_array_equal(got, levels - 7.5)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", jnp.int8), ("fp8", jnp.float8_e4m3fn)])
def test_other_kinds_store_one_number_per_element_up_to_their_largest(kind, dtype):
    largest = quant.KINDS[kind][1]
    x = np.array([[largest, -largest, 0, 16, 1, 2, 3, 4]] * 3, np.float32)
    found, _ = round_trip(x, kind)
    assert found.values.dtype == dtype and quant.stored_size(kind, 5) == 5
    np.testing.assert_array_equal(quant.numbers(found.values), x)


def test_all_codes_of_fp8_are_dequantized_exactly():
    codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    got = np.asarray(jax.jit(quant.numbers)(codes))
    want = codes.astype(np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("kind", quant.KINDS)
def test_quantizing_a_dequantized_array_changes_nothing(kind):
    once = round_trip(vectors(3, 8).astype(np.float32), kind)[1]
    np.testing.assert_array_equal(round_trip(once, kind)[1], once)


@pytest.mark.parametrize(
    ("kind", "shape"), [("int8", (0, 4)), ("fp8", (2, 0, 3, 4)), ("int4", (0, 4)), ("int4", (3, 0))]
)
def test_empty_arrays_stay_empty(kind, shape):
    found, got = round_trip(jnp.zeros(shape), kind)
    assert found.scales.shape == shape[:-1] and found.values.size == 0 and got.shape == shape


@pytest.mark.parametrize("kind", quant.KINDS)
def test_dequantize_rounds_once_to_the_requested_dtype(kind):
    x = vectors(3, 8).astype(np.float32)
    exact = np.asarray(round_trip(x, kind)[1])
    for dtype in (jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(np.asarray(round_trip(x, kind, dtype)[1]), exact.astype(dtype))


@pytest.mark.parametrize("kind", quant.KINDS)
def test_is_a_pytree_and_the_same_under_jit_and_vmap_and_in_double_precision(kind):
    x = vectors(3, 8).astype(np.float32)
    found, _ = round_trip(x, kind)
    assert isinstance(found, jfa.QuantizedArray) and len(jax.tree.leaves(found)) == 2
    others = [quant.quantize(jnp.asarray(x), kind), jax.jit(jax.vmap(lambda row: quant.quantize(row, kind)))(x)]
    with jax.enable_x64(True):
        found_64, got_64 = round_trip(x, kind)
        others.append(found_64)
    assert got_64.dtype == jnp.float32
    for other in others:
        assert isinstance(other, jfa.QuantizedArray)
        jax.tree.map(np.testing.assert_array_equal, other, found)


@pytest.mark.parametrize("d", [1, 2, 6, 40, 64, 80, 128])
def test_a_rotation_is_its_own_inverse_and_of_constant_magnitude_in_blocks(d):
    turn = quant.rotation(d)
    assert turn.shape == (d, d) and turn.dtype == np.float32
    np.testing.assert_array_equal(turn, turn.T)
    np.testing.assert_allclose(turn @ turn, np.eye(d), rtol=0, atol=4 * FLOAT32.eps)
    block = d & -d
    assert (np.count_nonzero(turn, axis=0) == block).all() and len(np.unique(np.abs(turn[turn != 0]))) == 1


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.29)])
def test_bytes_relative_to_bfloat16_including_scales(kind, share):
    x = jax.ShapeDtypeStruct((10, 3, 64), jnp.bfloat16)
    found = jax.eval_shape(lambda x: quant.quantize(x, kind), x)
    assert found.num_bytes == 30 * (quant.stored_size(kind, 64) + 2)
    assert found.num_bytes <= share * x.size * x.dtype.itemsize


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.quantize(jnp.ones(3), "int4"), "per byte, so a vector must have an even length, got 3"),
        (lambda: quant.stored_size("int4", 7), "int4 stores two numbers per byte, .* even length, got 7"),
        (lambda: quant.quantize(jnp.ones(4), "int3"), "kind must be one of int8, fp8, int4, got 'int3'"),
        (
            lambda: quant.kind_of(jnp.int16),
            r"are stored as int8 \(int8\), float8_e4m3fn \(fp8\), uint8 \(int4\); got int16",
        ),
        (
            lambda: jfa.QuantizedArray(values=jnp.ones(4), scales=jnp.ones(())).kind,
            "quantized numbers are stored as .*; got float32",
        ),
    ],
    ids=["odd_length", "odd_size", "kind", "dtype", "values"],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_are_refused():
    with pytest.raises(ValueError, match="quantize takes a float array, got int32"):
        quant.quantize(jnp.ones((2, 4), jnp.int32), "int8")
