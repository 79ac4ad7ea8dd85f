"""The TPU kernel for products with quantized weights, in JAX's TPU interpreter: what is not written is NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

import jfa
from jfa import backends
from jfa.device import describe
from jfa.kernels.tpu import products, tile
from jfa.types import ProductOperands, ProductSpec
from jfa_bench.proof import proofs
from jfa_bench.truth import numerics, product_cases
from jfa_bench.truth.product_cases import ProductCase

TILES = jfa.TpuProductConfig(block_rows=16, block_out=128, block_in=256)
V5E, V4 = describe("tpu", "v5e"), describe("tpu", "v4")

SERVED = [name for name, case in product_cases.CASES.items() if not case.rounds_inputs]
# between them, they have all kinds of numbers, several groups in a piece, and columns past the last one
QUICK = ("int8_ragged_group", "fp8_groups", "int4_levels", "int4_zeros", "many_rows")


def holds(truth):
    verdict = proofs.interpreted(proofs.product_check(truth, "tpu"))
    assert verdict.wrong is None, verdict.wrong


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [run(name, quick=name in QUICK) for name in SERVED])
def test_products_agree_with_the_oracle(name, dtype):
    truth = product_cases.truth(name, dtype)
    holds(dataclasses.replace(truth, options=truth.options | {"config": TILES}))


# Widths of several steps, whose last one is not whole.
STEPS = {
    "groups": ProductCase(rows=3, out=150, width=576, kind="int8", group_size=64, zeros=True),
    "long_groups": ProductCase(rows=3, out=130, width=1024, kind="int4", group_size=512, minima=True),
    "longer_than_a_step": ProductCase(rows=2, out=130, width=2048, kind="int4", group_size=1024, zeros=True),
    "halves_of_a_row": ProductCase(rows=2, out=130, width=650, kind="int4"),
    "two_pieces_in_a_row_of_lanes": ProductCase(rows=2, out=130, width=640, kind="int4", group_size=128, zeros=True),
    "groups_that_fill_rows_of_lanes": ProductCase(rows=2, out=130, width=4096, kind="int8", group_size=32, minima=True),
    "fp8": ProductCase(rows=2, out=130, width=650, kind="fp8"),
}


@pytest.mark.parametrize("name", [run(name, quick=name in ("groups", "halves_of_a_row")) for name in STEPS])
def test_several_steps_agree_with_the_oracle(name):
    truth = product_cases.truth_of(STEPS[name], "bfloat16", seed=0)
    holds(dataclasses.replace(truth, options={"config": TILES}))


def test_the_gradient_of_x_is_that_of_the_dequantized_weight():
    truth = product_cases.truth("int4_zeros", "float32")

    def loss(x, implementation):
        return jnp.sin(jfa.quantized_matmul(x, truth.weight, implementation=implementation)).sum()

    got, want = (jax.grad(loss)(jnp.asarray(truth.x), name) for name in ("tpu", "reference"))
    numerics.assert_within(got, np.asarray(want), 1e-4)


def shapes(*, rows=8, out=4096, width=4096, dtype="bfloat16", stored="int8", groups=1):
    values = jax.ShapeDtypeStruct((out, width // 2 if stored == "uint8" else width), jnp.dtype(stored))
    scales = jax.ShapeDtypeStruct((out, groups), jnp.bfloat16)
    return ProductOperands(jax.ShapeDtypeStruct((rows, width), jnp.dtype(dtype)), values, scales)


UNSERVED = {
    "gpu": (shapes(), ProductSpec(), describe("cuda", "sm_90"), "Mosaic TPU kernels run on TPUs .* not on cuda"),
    "float16": (shapes(dtype="float16"), ProductSpec(), V5E, "no TPU loads float16"),
    "rounds": (shapes(), ProductSpec(rounds_inputs=1), V5E, "the TPU kernel does not round inputs"),
    "group_size": (
        shapes(groups=86),
        ProductSpec(group_size=48),
        V5E,
        "group_size must be a power of two of at least 16, or the width of the weight, got 48",
    ),
    "short_groups": (
        shapes(rows=256, groups=128),
        ProductSpec(group_size=32),
        V5E,
        "groups of 32 fill 1 / 4 of the matrix unit, which takes longer with 256 rows than to dequantize",
    ),
    "copies": (
        shapes(width=576, stored="uint8"),
        ProductSpec(),
        V5E,
        "rows of 288 bytes are not a multiple of 128: XLA would copy the weight before each product",
    ),
    "vmem": (
        shapes(width=2**18, groups=2**13),
        ProductSpec(group_size=32),
        V4,
        "the smallest tiles and a row's scales need [0-9,]+ bytes of VMEM",
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(name):
    operands, spec, device, message = UNSERVED[name]
    with pytest.raises(jfa.UnsupportedError, match=message):
        backends.select("tpu", operands, spec, device, table=backends.product)
    if device.platform == "tpu":
        assert backends.select(None, operands, spec, device, table=backends.product) == "xla"


def test_a_symbolic_number_of_rows_is_refused():
    def product(x, weight):
        return jfa.quantized_matmul(x, weight, implementation="tpu")

    truth = product_cases.truth("int8", "bfloat16")
    [rows] = jax.export.symbolic_shape("rows")
    x = jax.ShapeDtypeStruct((rows, truth.x.shape[1]), jnp.bfloat16)
    with pytest.raises(jfa.UnsupportedError, match=r"a static size, but x has the symbolic shape \(rows, 96\)"):
        jax.export.export(jax.jit(product))(x, truth.weight)


@pytest.mark.parametrize(
    ("field", "size", "least"), [("block_rows", 8, 16), ("block_out", 192, 128), ("block_in", 128, 256)]
)
def test_tiles_consist_of_whole_registers(field, size, least):
    with pytest.raises(ValueError, match=f"{field} must be a multiple of {least}, got {size}"):
        dataclasses.replace(TILES, **{field: size})


def test_tiles_that_do_not_fit_are_refused_with_the_numbers():
    x, weight = jnp.ones((8, 64)), jfa.QuantizedArray(values=jnp.ones((2**15, 64), jnp.int8), scales=jnp.ones(2**15))
    tiles = dataclasses.replace(TILES, block_rows=4096, block_out=2**15)
    message = "block_rows=4096, block_out=32768, block_in=256 need [0-9,]+ bytes of VMEM, and a kernel gets"
    with pytest.raises(ValueError, match=message):
        jfa.quantized_matmul(jnp.tile(x, (512, 1)), weight, implementation="tpu", config=tiles)
    with pytest.raises(ValueError, match="the tpu backend takes a TpuProductConfig, got a TpuConfig"):
        tiles = jfa.TpuConfig(block_q=128, block_kv=128)
        jfa.quantized_matmul(x, weight, implementation="tpu", config=tiles)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["v4", "v5e", "v5p", "v6e", "v7x"])
@pytest.mark.parametrize("stored", ["int8", "uint8"])
def test_default_tiles_fit_into_the_vmem_of_each_chip(arch, stored):
    device = describe("tpu", arch)
    for rows in (1, 8, 64, 4096):
        for dtype in ("bfloat16", "float32"):
            for width in (4096, 14336):
                operands = shapes(rows=rows, width=width, dtype=dtype, stored=stored, groups=width // 128)
                spec = ProductSpec(group_size=128)
                assert products.why_not(operands, spec, device) is None
                config = products.default_config(operands, spec, device)
                assert products.vmem_bytes(operands, spec, config) <= tile.budget(device)
