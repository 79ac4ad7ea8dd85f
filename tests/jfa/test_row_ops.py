"""Products of a few rows with what a decoder computes around them, as one kernel."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

import jfa
from jfa import backends, quant, row_ops
from jfa.device import probe
from jfa.kernels.triton import few_rows
from jfa.types import RowOperands, RowSpec
from jfa_bench import names
from jfa_bench.proof import aot
from jfa_bench.truth import row_cases
from jfa_bench.truth.numerics import assert_within, limit

PLAIN, GATE = RowSpec(), RowSpec(activation="silu")


def int8(*, group_size=None, rounds_inputs=0):
    """A weight [32, 96]."""
    scales = jnp.ones(32) if group_size is None else jnp.ones((32, -(-96 // group_size)))
    values = jnp.zeros((32, 96), jnp.int8)
    return jfa.QuantizedArray(values=values, scales=scales, group_size=group_size, rounds_inputs=rounds_inputs)


def products(truth):
    """As the kernel computes them."""
    assert row_ops.serves(truth.x, truth.weights, truth.case.spec, implementation="triton")
    return row_ops.matmul_few_rows(truth.x, truth.weights, truth.case.spec, implementation="triton", **truth.options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        run(name, dtype, quick=dtype.startswith("bfloat16") or name in ("residual", "fp8"), soak=True)
        for dtype in names.ROW_DTYPES
        for name in row_cases.cases(dtype)
    ],
)
def test_results_are_those_of_the_definition(name, dtype):
    of_x = dtype.partition(" on ")[0]
    truth = row_cases.truth_of(row_cases.cases(dtype)[name], of_x, seed=0)
    got = products(truth)
    assert got.dtype == of_x
    assert_within(got, truth.out, limit(truth.out, truth.plain_out, of_x))


def test_float16_near_its_largest_number_stays_finite():
    x, weight = jnp.full((2, 64), 30_000.0, jnp.float16), jnp.full((16, 64), 0.03, jnp.float16)
    bias, residual = jnp.full(16, -50_000.0, jnp.float16), jnp.full((2, 16), 20_000.0, jnp.float16)
    got = row_ops.matmul_few_rows(x, [weight], PLAIN, biases=[bias], residual=residual, implementation="triton")
    want = 64 * 30_000.0 * float(weight[0, 0]) - 50_000 + 20_000  # the product alone is within the range too
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-3)


@pytest.mark.parametrize("activation", few_rows.ACTIVATIONS)
def test_activations_of_large_numbers(activation):
    """Their exponentials overflow."""
    x = jnp.zeros((1, 64), jnp.bfloat16).at[0, 0].set(1)
    weight = jnp.zeros((16, 64), jnp.bfloat16).at[:, 0].set(jnp.linspace(-3e38, 3e38, 16).astype(jnp.bfloat16))
    got = row_ops.matmul_few_rows(x, [weight], RowSpec(activation=activation), implementation="triton")
    want = np.maximum(np.asarray(weight[:, 0], np.float64), 0)
    if activation == "gelu_tanh":  # whose cube overflows, too
        want, got = want[[0, -1]], got[:, [0, -1]]
    np.testing.assert_allclose(np.asarray(got[0], np.float64), want, rtol=1e-2)


def test_a_row_with_nan_leaves_the_others_alone():
    truth = row_cases.truth_of(row_cases.NORMALIZED["normalized"], "bfloat16", seed=0)
    x = jnp.asarray(truth.x).at[2, 5].set(jnp.nan)
    got, others = products(truth._replace(x=x)), np.arange(7) != 2
    assert jnp.isnan(got[2]).all()
    assert_within(got[others], truth.out[others], limit(truth.out, truth.plain_out, "bfloat16"))


def test_leading_axes_of_x_are_kept():
    truth = row_cases.truth_of(row_cases.CASES["residual"], "bfloat16", seed=0)
    x, residual = truth.x.reshape(2, 8, -1), truth.options["residual"].reshape(2, 8, -1)
    got = products(truth._replace(x=x, options=truth.options | {"residual": residual}))
    assert got.shape == (2, 8, 33)
    np.testing.assert_array_equal(got.reshape(16, -1), products(truth))


def test_gradients_are_those_of_the_definition():
    case = dataclasses.replace(row_cases.NORMALIZED["normalized_gate"], rows=3, width=96, residual=True)
    truth = row_cases.truth_of(case, "bfloat16", seed=0)
    d_out = jnp.asarray(np.random.default_rng(1).standard_normal(truth.out.shape), jnp.float32)

    def loss(arrays, of):
        return (of(arrays).astype(jnp.float32) * d_out).sum()

    def definition(arrays):
        x, (gate, up), options = arrays["x"], arrays["weights"], arrays["options"]
        x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + case.spec.eps) * (1.0 + options["scale"])
        gate, up = (x @ w.T + b for w, b in zip((gate, up), options["biases"], strict=True))
        return jax.nn.silu(gate) * up + options["residual"]

    arrays = {"x": truth.x, "weights": truth.weights, "options": truth.options}
    got = jax.grad(loss)(jax.tree.map(jnp.asarray, arrays), lambda given: products(truth._replace(**given)))
    want = jax.grad(loss)(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays), definition)
    for name, found in jax.tree.leaves_with_path(got):
        exact = np.asarray(dict(jax.tree.leaves_with_path(want))[name], np.float64)
        error = np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max()
        assert error < 0.03, (name, error)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1201", "sm_80", "sm_90", "sm_100"])
def test_it_is_one_kernel_on_every_architecture(arch):
    for case, programs in (("side_by_side", 3 + 1 + 1), ("normalized_gate", 2)):
        truth = row_cases.truth_of(row_cases.cases("bfloat16")[case], "bfloat16", seed=0)

        def call(x, weights, truth=truth):
            return products(truth._replace(x=x, weights=weights))

        [kernel] = aot.lower(call, truth.x, truth.weights, arch=arch)
        assert (kernel.name, kernel.grid[0]) == ("matmul_few_rows", programs)
        assert kernel.num_warps == {"side_by_side": 4, "normalized_gate": 8}[case]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(rows=33), "it is for 1 to 32 rows, got 33"),
        (dict(rows=0), "it is for 1 to 32 rows, got 0"),
        (dict(rows=17, spec=RowSpec(eps=1e-5)), "it is for 1 to 16 rows, got 17"),
        (dict(columns=0), "a product without columns, or weights without rows"),
        (dict(out=0), "a product without columns, or weights without rows"),
        (dict(dtype="float32"), "x must be bfloat16 or float16, got float32"),
        (dict(of_weights="float16"), "weights must be quantized, or bfloat16 as x is, got float16"),
        (dict(dtype="float16", spec=RowSpec(eps=1e-5)), "which may be too large for float16"),
        (dict(spec=RowSpec(activation="gelu")), "it has the activations silu, gelu_tanh, relu, not gelu"),
    ],
    ids=str,
)
def test_what_is_left_to_xla(change, reason):
    given = dict(rows=4, columns=64, out=32, dtype="bfloat16", spec=PLAIN) | change
    x = jax.ShapeDtypeStruct((given["rows"], given["columns"]), given["dtype"])
    weight = jax.ShapeDtypeStruct((given["out"], given["columns"]), given.get("of_weights", given["dtype"]))
    assert not row_ops.serves(x, [weight], given["spec"], implementation="triton")
    device = probe()
    operands = RowOperands(x, (weight,), (None,))
    assert reason in backends.rows("triton", device).why_not(operands, given["spec"], device)


@pytest.mark.parametrize(
    ("weights", "spec", "reason"),
    [
        ([int8(rounds_inputs=1)], PLAIN, "rounded inputs are multiplied as integers"),
        ([int8()], RowSpec(eps=1e-5), "normalizing x in each program would take longer than reading quantized weights"),
        ([int8(group_size=24)], PLAIN, "group_size must be a power of two of at least 16"),
        (
            [int8(), int8(group_size=32)],
            RowSpec(activation="silu"),
            "a gate and its factor must be stored in the same way",
        ),
    ],
    ids=["rounded", "norm", "groups", "gate"],
)
def test_quantized_weights_that_are_left_to_others(weights, spec, reason):
    x, device = jnp.zeros((4, 96), jnp.bfloat16), probe()
    assert not row_ops.serves(x, weights, spec, implementation="triton")
    operands = RowOperands(x, tuple(weights), (None,) * len(weights))
    assert reason in backends.rows("triton", device).why_not(operands, spec, device)


def test_weights_that_are_stored_in_different_ways_share_x():
    """As those of queries and values do in some GGUF files."""
    known = row_cases.truth_of(row_cases.QUANTIZED["int4_minima"], "bfloat16", seed=0)
    x, weights = known.x, [quant.dequantize(known.weights[0], "bfloat16"), known.weights[0]]
    got = row_ops.matmul_few_rows(x, weights, PLAIN, implementation="triton")
    want = known.out - known.options["residual"]
    for y in np.split(got, 2, axis=1):
        assert_within(y, want, limit(want, known.plain_out - known.options["residual"], "bfloat16"))


def test_other_backends_have_no_such_kernel():
    x, weight = jnp.zeros((4, 64), jnp.bfloat16), jnp.zeros((32, 64), jnp.bfloat16)
    assert row_ops.serves(x, [weight], PLAIN, implementation="triton")
    for implementation in (None, "xla", "reference", "tpu"):  # None: on a CPU
        assert not row_ops.serves(x, [weight], PLAIN, implementation=implementation)
