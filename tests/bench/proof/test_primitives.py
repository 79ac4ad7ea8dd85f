"""The operations that the kernels add to Pallas, and their casts of stored numbers, as AMD machine code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import needs_compiler
from runs import run

from jfa import quant
from jfa.device import describe
from jfa.kernels.triton import _primitives, casts, products
from jfa.kernels.triton._pallas import CompilerParams, pl
from jfa_bench import names
from jfa_bench.proof import emulate

ARCHS = [run(arch, quick=arch == "gfx942") for arch in names.EXECUTED_ARCHS]


def on(arch, function, *arrays):
    """function(*arrays) in a kernel, whose machine code for arch is executed; None: in the interpreter."""

    def kernel(*refs):
        inputs, outputs = refs[: len(arrays)], refs[len(arrays) :]
        for out, x in zip(outputs, function(*(ref[...] for ref in inputs)), strict=True):
            out[...] = x

    shapes = jax.eval_shape(function, *arrays)
    params = CompilerParams(num_warps=1, num_stages=1)

    def call(*arrays):
        return pl.pallas_call(kernel, out_shape=shapes, compiler_params=params, interpret=arch is None)(*arrays)

    return call(*arrays) if arch is None else emulate.emulate(call, *arrays, arch=arch).outputs


@needs_compiler
@pytest.mark.parametrize("arch", ARCHS)
def test_fma_rounds_once(arch):
    x = jnp.full(128, 1 + 2.0**-12)
    [got] = on(arch, lambda x: [_primitives.fma(x, x, -1.0)], x)
    assert np.all(np.asarray(got) == 2.0**-11 + 2.0**-24)  # the square has 25 bits, and is rounded to 24 by itself


@needs_compiler
@pytest.mark.parametrize("arch", ARCHS)
def test_exp2_is_exact_to_a_unit_and_zero_at_minus_infinity(arch):
    x = np.concatenate([np.linspace(-125.9, 127.9, 1021, dtype=np.float32), [-np.inf, 0, np.nan]]).astype(np.float32)
    [got] = map(np.asarray, on(arch, lambda x: [_primitives.exp2(x)], jnp.asarray(x)))
    want = np.exp2(x[:-3].astype(np.float64))
    assert np.all(np.abs(got[:-3] - want) <= np.spacing(want.astype(np.float32)))
    assert (got[-3], got[-2]) == (0, 1) and np.isnan(got[-1])


def test_in_the_interpreter_they_are_what_they_say():
    x = jnp.linspace(-3, 3, 64)
    plain, power = on(None, lambda x: [_primitives.fma(x, 2.0, x), _primitives.exp2(x)], x)
    assert np.array_equal(plain, x * 2.0 + x) and np.array_equal(power, jnp.exp2(x))
    assert np.array_equal(jax.jit(_primitives.exp2)(x), jnp.exp2(x))


CASTS = list(
    itertools.product(("int8", "fp8", "int4"), ("bfloat16", "float16"), (False, True)),
)


def numbers(kind, dtype, by_bits, arch, *, of_products=False):
    """(what a product and its corrections make of every code of a kind of page, what the code stands for)."""
    codes = np.arange(256, dtype=np.uint8)
    pages = jnp.asarray(codes.view(quant.KINDS[kind][0]))
    dtype = jnp.dtype(dtype)
    halves = on(
        arch, lambda x: casts.widened(x, dtype=dtype, fp8_by_bits=by_bits, nan=of_products, words=of_products), pages
    )
    got = [np.asarray(x, np.float64) - casts.bias(pages.dtype, dtype) for x in halves]
    want = [pages] if kind != "int4" else [(codes & 15) - 7.5, (codes >> 4) - 7.5]
    unit = casts.unit(pages.dtype, dtype, by_bits)
    return np.concatenate(got) * unit, np.concatenate([np.asarray(x).astype(np.float64) for x in want])


@pytest.mark.parametrize(("kind", "dtype", "by_bits"), CASTS)
def test_every_code_of_a_page_is_cast_exactly(kind, dtype, by_bits):
    got, want = numbers(kind, dtype, by_bits, None)
    known = ~np.isnan(want)
    assert np.array_equal(got[known], want[known])


@needs_compiler
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_products_cast_every_code_exactly_with_nan(kind, dtype, arch):
    got, want = numbers(kind, dtype, products.fp8_by_bits(describe("rocm", arch)), arch, of_products=True)
    np.testing.assert_array_equal(got, want)


@needs_compiler
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("kind", "dtype", "by_bits"), [run(*one, quick=one[2]) for one in CASTS])
def test_every_code_of_a_page_is_cast_exactly_by_machine_code(kind, dtype, by_bits, arch):
    got, want = numbers(kind, dtype, by_bits, arch)
    known = ~np.isnan(want)
    assert np.array_equal(got[known], want[known])
