"""Products with quantized weights: oracle, reference, kernels; each case on every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

import jfa
from jfa import backends, quant, tuning
from jfa.device import describe
from jfa.kernels.triton import products
from jfa.kernels.xla import products as in_xla
from jfa.products import low_rank_rows, times_rows
from jfa.types import ProductOperands, ProductSpec
from jfa_bench.truth.numerics import assert_within, limit
from jfa_bench.truth.product_cases import CASES, ON_GPUS, ProductCase, truth, truth_of

TILES = {
    "reference": None,
    "xla": None,
    "triton": jfa.ProductConfig(block_rows=16, block_out=32, block_in=64, num_warps=1, num_stages=1, num_splits=1),
}
DTYPES = ("float32", "bfloat16", "float16")
QUICK_ON_TRITON = {"int8_ragged_group", "fp8", "int4_levels", "int4_zeros", "int4_minima", "rounded_inputs_in_groups"}


def is_quick(i: int, name: str, dtype: str, backend: str) -> bool:
    if backend == "triton" and name not in QUICK_ON_TRITON:
        return False
    return dtype == DTYPES[(i + (backend == "triton")) % 3]


RUNS = [
    run(name, dtype, backend, quick=is_quick(i, name, dtype, backend))
    for i, name in enumerate(CASES)
    for dtype in DTYPES
    for backend in TILES
    if backend != "triton" or name in ON_GPUS
]


def multiplied(known, backend, **options):
    return jax.jit(functools.partial(jfa.quantized_matmul, implementation=backend, **options))(known.x, known.weight)


def check(known, backend, **options):
    got = multiplied(known, backend, **options)
    assert got.dtype == known.x.dtype
    assert_within(got, known.out, limit(known.out, known.plain_out, known.x.dtype))


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle(name, dtype, backend):
    check(truth(name, dtype), backend, config=TILES[backend])


SPLITS = [
    run(name, num_splits, block_in, quick=(name, num_splits) in (("int4_zeros", 3), ("int8_ragged_group", 2)))
    for name in ON_GPUS
    for num_splits, block_in in ((2, 16), (3, 32), (7, 32))
]


@pytest.mark.parametrize(("name", "num_splits", "block_in"), SPLITS)
def test_programs_that_split_the_columns_give_the_same_result(name, num_splits, block_in):
    config = dataclasses.replace(TILES["triton"], num_splits=num_splits, block_in=block_in)
    check(truth(name, "bfloat16"), "triton", config=config)


@pytest.mark.parametrize(("kind", "n"), [("int8", 5), ("int4", 5), ("int4", 70), ("fp8", 5)])
def test_a_large_weight_is_multiplied_in_blocks_of_rows(kind, n):
    """1101 rows are two blocks, of which the second repeats a row of the first."""
    draw = np.random.default_rng(0)
    weight = quant.quantize_weight(
        draw.standard_normal((1101, 1088), np.float32), kind, group_size=64, symmetric=kind != "int4"
    )
    x = draw.standard_normal((n, 1088), np.float32)
    d_out = draw.standard_normal((n, 1101), np.float32)
    dense = np.asarray(quant.dequantize(jax.tree.map(jnp.asarray, weight)), np.float64)
    out, gradient = jax.vjp(lambda x: jfa.quantized_matmul(x, weight, implementation="xla"), x)
    np.testing.assert_allclose(out, x @ dense.T, atol=1e-3)
    np.testing.assert_allclose(gradient(d_out)[0], d_out @ dense, atol=1e-3)


@pytest.mark.parametrize(("kind", "width"), [("int4", 512), ("int4", 2048), ("float16", 512)])
def test_weights_are_widened_one_after_another(kind, width):
    """A step does not take the memory of all its weights in float32."""
    weight = np.ones((width, width), np.float32)
    weight = weight.astype(kind) if kind == "float16" else quant.quantize_weight(weight, kind, group_size=64)

    def step(x, weights):
        for one in weights:
            x = times_rows(x, one)
        return x

    x = jnp.ones((8, width), "float16" if kind == "float16" else "float32")
    gradient = jax.grad(lambda *args: step(*args).sum())
    for function in (step,) if kind == "float16" else (step, gradient):
        compiled = jax.jit(function).lower(x, [weight] * 6).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2.5 * min(4 * width**2, 4 << 20)


@pytest.mark.parametrize("n", [1, 3, 16, 17, 300])
def test_any_number_of_rows(n):
    case = ProductCase(rows=n, out=37, width=128, kind="int4", group_size=64, zeros=True)
    check(truth_of(case, "bfloat16", seed=n), "triton")


@pytest.mark.parametrize("backend", TILES)
@pytest.mark.parametrize("shape", [(4, 96), (2, 3, 96), (96,)])
def test_leading_axes_of_x_are_kept(shape, backend):
    known = truth("int8", "float32")
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    got = jfa.quantized_matmul(x, known.weight, implementation=backend)
    want = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(known.weight), np.float64).T
    assert got.shape == (*shape[:-1], 40)
    assert_within(got, want, limit(want, want.astype(np.float32), got.dtype))


@pytest.mark.parametrize("backend", TILES)
def test_without_rows_outputs_or_columns_the_result_is_empty_or_zero(backend):
    for n, out, width in ((0, 4, 8), (3, 0, 8), (3, 4, 0)):
        weight = jfa.QuantizedArray(values=jnp.zeros((out, width), jnp.int8), scales=jnp.ones(out))
        got = jfa.quantized_matmul(jnp.ones((n, width)), weight, implementation=backend)
        assert got.shape == (n, out) and not got.any()


@pytest.mark.parametrize("backend", TILES)
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_nan_in_a_row_of_x_or_of_the_weight_stays_there(kind, backend):
    known = truth_of(ProductCase(rows=3, out=6, width=40, kind=kind), "bfloat16", seed=0)
    x = known.x.copy()
    x[1, 5] = np.nan
    values, scales = np.array(known.weight.values), np.array(known.weight.scales)
    if kind == "fp8":
        values[4, 7] = np.nan
    else:
        scales[4] = np.nan
    weight = dataclasses.replace(known.weight, values=jnp.asarray(values), scales=jnp.asarray(scales))
    got = np.asarray(jfa.quantized_matmul(x, weight, implementation=backend), np.float32)
    wanted = np.zeros((3, 6), bool)
    wanted[1], wanted[:, 4] = True, True
    np.testing.assert_array_equal(np.isnan(got), wanted)


@pytest.mark.parametrize("backend", TILES)
@pytest.mark.parametrize("name", ["int4_zeros", "fp8_groups", "rounded_inputs"])
def test_the_gradient_of_x_is_a_product_with_the_weight(name, backend):
    known = truth(name, "float32")
    d_out = np.random.default_rng(1).standard_normal(known.out.shape).astype(np.float32)

    def loss(x):
        out = jfa.quantized_matmul(x, known.weight, implementation=backend, config=TILES[backend])
        return (out * d_out).sum()

    got = jax.jit(jax.grad(loss))(known.x)
    want = d_out.astype(np.float64) @ np.asarray(quant.dequantize(known.weight), np.float64)
    assert_within(got, want, limit(want, want.astype(np.float32), got.dtype))


def test_the_weight_is_a_constant():
    known = truth("int8", "float32")

    def loss(scales):
        return jfa.quantized_matmul(known.x, dataclasses.replace(known.weight, scales=scales)).sum()

    assert not np.asarray(jax.grad(loss)(known.weight.scales), np.float32).any()


def weight_of(kind="int8", out=4, width=64, **fields):
    """Shapes are right unless fields say otherwise."""
    stored, dtype = quant.stored_size(kind, width), quant.KINDS[kind][0]
    group = fields.get("group_size")
    scales = jnp.ones((out,) if not isinstance(group, int) or group < 1 else (out, -(-width // group)))
    return jfa.QuantizedArray(**{"values": jnp.ones((out, stored), dtype), "scales": scales} | fields)


X = jnp.ones((2, 64))
REFUSALS = {
    "floats": (X, jnp.ones((4, 64)), "weight must be a QuantizedArray, got ArrayImpl; multiply floats with jnp.matmul"),
    "integers": (X.astype(int), weight_of(), "x must be float16, bfloat16 or float32, got int32; cast it before"),
    "width": (X, weight_of(width=32), r"x must be \[..., 32\] for a weight of shape \(4, 32\), got \(2, 64\)"),
    "scalar": (jnp.ones(()), weight_of(), r"x must be \[..., 64\] for a weight of shape \(4, 64\), got \(\)"),
    "three_axes": (
        X,
        weight_of(values=jnp.ones((2, 4, 64), jnp.int8), scales=jnp.ones((2, 4))),
        r"weight must be \[out, in\], got \(2, 4, 64\)",
    ),
    "group_of_zero": (X, weight_of(group_size=0), "group_size must be an integer >= 1, or None .*, got 0"),
    "group_of_half": (X, weight_of(group_size=0.5), "group_size must be an integer >= 1, or None .*, got 0.5"),
    "odd_group": (X, weight_of("int4", group_size=3), "must be even and divide the width 64 .*, got group_size=3"),
    "uneven_group": (X, weight_of("int4", group_size=48), "must be even and divide the width 64 .*, got group_size=48"),
    "scales": (
        X,
        weight_of(group_size=32, scales=jnp.ones(4)),
        r"scales must have shape \(4, 2\) for a weight of shape \(4, 64\) with group_size=32, got \(4,\)",
    ),
    "zeros": (
        X,
        weight_of(zeros=jnp.ones((4, 1), jnp.int8)),
        r"zeros must have shape \(4,\) for a weight of shape \(4, 64\) with group_size=None, got \(4, 1\)",
    ),
    "zeros_dtype": (
        X,
        weight_of(zeros=jnp.ones(4)),
        "zeros must have the dtype of values, int8, and come without minima, got float32$",
    ),
    "zeros_and_minima": (
        X,
        weight_of(zeros=jnp.ones(4, jnp.int8), minima=jnp.ones(4)),
        "zeros must have the dtype of values, int8, and come without minima, got int8 with minima",
    ),
    "rounded": (
        X,
        weight_of("fp8", rounds_inputs=1),
        "rounds_inputs multiplies integers and needs a weight in int8 or int4, got fp8",
    ),
    "terms": (X, weight_of(rounds_inputs=3), "rounds_inputs must be 0, 1 or 2, got 3"),
    "dtype": (X, weight_of(values=jnp.ones((4, 64))), "quantized numbers are stored as .*; got float32"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_arguments_are_refused(name):
    x, weight, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        jfa.quantized_matmul(x, weight)


def test_a_configuration_of_another_kernel_is_refused():
    flash = jfa.FlashConfig(block_q=16, block_kv=16, num_warps=1, num_stages=1)
    with pytest.raises(ValueError, match="the triton backend takes a ProductConfig, got a FlashConfig"):
        jfa.quantized_matmul(X, weight_of(), implementation="triton", config=flash)
    with pytest.raises(ValueError, match="the xla backend takes no config, got a ProductConfig"):
        jfa.quantized_matmul(X, weight_of(), implementation="xla", config=TILES["triton"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(block_rows=8), "block_rows must be a power of two of at least 16, the smallest matrix tile, got 8"),
        (dict(block_out=48), "block_out must be a power of two of at least 16, the smallest matrix tile, got 48"),
        (dict(block_in=100), "block_in must be a power of two of at least 16, the smallest matrix tile, got 100"),
        (dict(num_warps=3), "num_warps must be 1, 2, 4, 8 or 16, got 3"),
        (dict(num_stages=0), "num_stages must be >= 1, got 0"),
        (dict(num_splits=0), "num_splits must be >= 1, or None to choose automatically, got 0"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TILES["triton"], **fields)


def operands_of(weight, rows=2, dtype="bfloat16"):
    x = jax.ShapeDtypeStruct((rows, weight.shape[-1]), dtype)
    operands = ProductOperands(x, weight.values, weight.scales, weight.zeros, weight.minima)
    return operands, ProductSpec(group_size=weight.group_size, rounds_inputs=weight.rounds_inputs)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (weight_of(group_size=8), "group_size must be a power of two of at least 16, or the width .*, got 8"),
        (weight_of(group_size=48), "group_size must be a power of two of at least 16, or the width .*, got 48"),
        (weight_of("int4", group_size=16), "group_size must be a power of two of at least 32, or .*, got 16"),
        (weight_of("fp8", zeros=jnp.ones(4, jnp.float8_e4m3fn)), "zero points must be integers, got float8_e4m3fn"),
    ],
)
def test_what_the_kernel_lacks_is_told_and_served_by_xla(weight, message):
    with pytest.raises(jfa.UnsupportedError, match=message):
        jfa.quantized_matmul(X, weight, implementation="triton")
    for platform, arch in (("rocm", "gfx942"), ("cuda", "sm_90")):
        device = describe(platform, arch)
        assert backends.select(None, *operands_of(weight), device, table=backends.product) == "xla"


def test_a_weight_with_wrong_addresses_is_refused():
    shape = jax.ShapeDtypeStruct((2**17, 2**14), jnp.int8)
    weight = jfa.QuantizedArray(values=shape, scales=jax.ShapeDtypeStruct((2**17,), jnp.bfloat16))
    reason = products.why_not(*operands_of(weight), describe("rocm", "gfx942"))
    assert reason == "Pallas computes wrong addresses in a weight of 2 to 4 GiB; split it along `out`"


def test_backends_by_platform():
    operands, spec = operands_of(weight_of())
    for device, name in (
        (("rocm", "gfx942"), "triton"),
        (("rocm", "gfx1100"), "triton"),
        (("cuda", "sm_90"), "triton"),
        (("cpu", "cpu"), "xla"),
        (("tpu", "TPU v5e"), "xla"),
    ):
        assert backends.select(None, operands, spec, describe(*device), table=backends.product) == name
    with pytest.raises(jfa.UnsupportedError, match=r"Triton kernels run on AMD and NVIDIA GPUs .*, not on tpu"):
        backends.select("triton", operands, spec, describe("tpu", "TPU v5e"), table=backends.product)


@pytest.mark.parametrize(
    ("arch", "by_bits"),
    [("gfx942", True), ("gfx1100", True), ("sm_80", True), ("gfx950", False), ("gfx1201", False), ("sm_90", False)],
)
def test_where_fp8_is_cast_by_bits(arch, by_bits):
    assert products.fp8_by_bits(describe("rocm" if arch.startswith("gfx") else "cuda", arch)) == by_bits


def test_the_columns_are_split_while_the_weight_is_much_larger_than_the_partial_results():
    device = describe("rocm", "gfx942")
    config = dataclasses.replace(TILES["triton"], num_splits=None)

    def splits(rows, out=4096, width=4096, **fields):
        weight = jfa.QuantizedArray(
            values=jax.ShapeDtypeStruct((out, width), jnp.int8), scales=jax.ShapeDtypeStruct((out,), jnp.bfloat16)
        )
        operands, _ = operands_of(weight, rows)
        return products.num_splits(operands, dataclasses.replace(config, **fields), device)

    assert splits(1) == 16  # 4096 / 256: no shorter parts
    assert splits(16) == 8 and splits(64) == 2 and splits(512) == 1
    assert splits(1, out=2**17) == 1  # enough programs for all compute units
    assert splits(1, width=128) == 1
    assert splits(512, num_splits=5) == 5


def test_the_table_of_the_kernel_is_used_by_group_size():
    weight = weight_of("int4", out=4096, width=4096, group_size=64, zeros=jnp.ones((4096, 64), jnp.uint8))
    for rows, kernel in ((1, "quantized_matmul_few_rows"), (16, "quantized_matmul_few_rows"), (17, "quantized_matmul")):
        operands, spec = operands_of(weight, rows)
        found = backends.product("triton").default_config(operands, spec, describe("rocm", "gfx942"))
        named = dict(dtype="bfloat16", weight="uint8")
        assert found == tuning.product_config(kernel, "gfx942", group_size=64, **named)
        assert found == tuning.product_config(kernel, "gfx942", group_size=128, **named)
    assert tuning.product_config("quantized_matmul", "gfx942", group_size=10_000, **named) == tuning.product_config(
        "quantized_matmul", "gfx942", group_size=4096, **named
    )
    assert tuning.product_config("quantized_matmul", "gfx803", group_size=128, **named) is None


def unpacked(values, group_size):
    """The stored integers in the order of the elements: packed, the halves of a group are in a byte's halves."""
    if values.dtype != np.uint8:
        return values
    grouped = values.reshape(len(values), -1, group_size // 2 if group_size else values.shape[1])
    return np.concatenate([grouped & 15, grouped >> 4], axis=-1).reshape(len(values), -1)


@pytest.mark.parametrize(("kind", "symmetric"), [("int8", True), ("fp8", True), ("int4", True), ("int4", False)])
@pytest.mark.parametrize("group_size", [None, 16])
def test_quantize_weight_keeps_numbers_within_a_step(kind, symmetric, group_size):
    x = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    found = quant.quantize_weight(jnp.asarray(x), kind, group_size=group_size, symmetric=symmetric)
    assert found.shape == x.shape and found.kind == kind
    numbers = unpacked(np.asarray(found.values), found.group_size).astype(np.float64)
    group = group_size or 64

    def each(of_groups):
        return np.repeat(np.asarray(of_groups, np.float64).reshape(6, -1), group, axis=1)

    want = (numbers - (0 if found.zeros is None else each(found.zeros))) * each(found.scales)
    got = np.asarray(quant.dequantize(found), np.float64)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    # half a step, or a whole one: the ends of a range without a number, and a zero point that is rounded
    steps = {"int8": 0.5, "fp8": 16.0, "int4": 1.0}[kind]
    assert np.all(np.abs(got - x) <= steps * np.abs(each(found.scales)) + 1e-6)
    if kind == "int4":
        assert found.zeros is not None and found.group_size == group
        assert not symmetric or np.all(np.asarray(found.zeros) == 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_dequantize_is_the_formula(name, dtype):
    case = dataclasses.replace(CASES[name], rows=CASES[name].width)
    known = truth_of(case, "float32", seed=0)
    got = np.asarray(quant.dequantize(known.weight, dtype), np.float64)
    eye = dataclasses.replace(known.weight, rounds_inputs=0)
    exact = np.asarray(jfa.quantized_matmul(jnp.eye(case.width), eye, implementation="reference"), np.float64).T
    assert_within(got, exact, limit(exact, exact.astype(np.float32), jnp.dtype(dtype)))


@pytest.mark.parametrize(
    ("kind", "group_size", "message"),
    [
        ("int8", 48, "group_size must be a number that divides the width 64 of the weight, got 48"),
        ("int4", 1, "group_size must be an even number that divides the width 64 of the weight, got 1"),
    ],
)
def test_groups_that_do_not_divide_the_weight_are_refused(kind, group_size, message):
    with pytest.raises(ValueError, match=message):
        quant.quantize_weight(jnp.ones((2, 64)), kind, group_size=group_size)


# Low-rank products of many slots, of which each row has one

LOW_RANK = {  # rows, slots, rank, width, out, whether a CPU multiplies by own parts only
    "eight_rows": (8, 8, 16, 64, 40, True),
    "one_row": (1, 3, 4, 48, 20, True),
    "groups_of_terms": (3, 2, 12, 16 * 21, 24, True),
    "ragged_width": (5, 4, 4, 50, 24, False),
    "prime_rank": (5, 4, 13, 64, 24, False),
    "one_slot": (5, 1, 4, 64, 24, False),
    "many_rows": (40, 4, 4, 64, 24, False),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_rows_have_the_parts_of_their_own_slots(name):
    rows, slots, rank, width, out, is_own = LOW_RANK[name]
    random = np.random.default_rng(0)
    x, a, b = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((rows, width), (slots, rank, width), (slots, rank, out))
    )
    slot = random.integers(-1, slots, rows)
    gates = np.asarray(slot[:, None] == np.arange(slots), np.float32)
    want = np.zeros((rows, out))
    for row, own in enumerate(slot):
        if own >= 0:
            want[row] = b[own].T.astype(np.float64) @ (a[own].astype(np.float64) @ x[row])
    got = low_rank_rows(x, a, b, gates)
    assert in_xla.prefers_own(rows, a) == is_own
    np.testing.assert_allclose(got, want, atol=1e-6 * max(1, np.abs(want).max()) * width**0.5)
    assert (np.asarray(got)[slot < 0] == 0).all()


@pytest.mark.parametrize("rows", [4, 40], ids=["own_parts", "all_parts"])
def test_the_overflow_of_another_slot_does_not_reach_a_row(rows):
    a, b = np.full((2, 4, 32), 1e30, np.float32), np.ones((2, 4, 8), np.float32)
    a[0] = 1.0
    gates = np.zeros((rows, 2), np.float32)
    gates[0, 0] = 1
    got = np.asarray(low_rank_rows(np.full((rows, 32), 1e30, np.float32), a, b, gates))
    assert np.isfinite(got[0]).all() and (got[1:] == 0).all()


def test_low_rank_rows_of_16_bits_are_products_of_all_slots():
    random = np.random.default_rng(0)
    x, a, b = (jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in ((4, 32), (2, 4, 32), (2, 4, 8)))
    got = low_rank_rows(x, a, b, jax.nn.one_hot(jnp.array([1, 0, 1, -1]), 2))
    assert got.dtype == jnp.bfloat16 and got.shape == (4, 8) and (got[3] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_low_rank_rows_are_those_of_the_products(dtype):
    random = np.random.default_rng(0)
    shapes = ((3, 14, 32), (2, 4, 32), (2, 4, 8), (3, 14, 8))
    x, a, b, d_out = (jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes)
    gates = jax.nn.one_hot(random.integers(-1, 2, (3, 14)), 2)

    def by_einsum(x, a, b):
        return jnp.einsum("bti,sri,sro,bts->bto", x, a, b, gates)

    out, vjp = jax.vjp(lambda *operands: low_rank_rows(*operands, gates), x, a, b)
    want, want_vjp = jax.vjp(by_einsum, *(z.astype(jnp.float32) for z in (x, a, b)))
    found = (out, *vjp(d_out))
    assert [z.dtype for z in found] == [jnp.dtype(dtype)] * 4
    eps = float(jnp.finfo(dtype).eps)
    for z, y in zip(found, (want, *want_vjp(d_out.astype(jnp.float32))), strict=True):
        np.testing.assert_allclose(z.astype(jnp.float32), y, atol=4 * eps * float(jnp.abs(y).max()))
