"""Named cases of products with quantized weights and their expected results: small, odd, and each for a reason."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jfa.quant import QuantizedArray

from .numerics import rounding_to


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductCase:
    """Shapes of x [rows, width] and of the weight [out, width], and how the weight is quantized."""

    rows: int
    out: int
    width: int
    kind: str  # of quant.KINDS
    group_size: int | None = None
    zeros: bool = False
    minima: bool = False
    rounds_inputs: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of jfa.quantized_matmul


CASES = {
    "int8": ProductCase(rows=3, out=40, width=96, kind="int8"),
    "int8_ragged_group": ProductCase(rows=5, out=33, width=100, kind="int8", group_size=32),
    "int8_zeros": ProductCase(rows=17, out=40, width=128, kind="int8", group_size=64, zeros=True),
    "int8_minima": ProductCase(rows=1, out=24, width=64, kind="int8", group_size=16, minima=True),
    "fp8": ProductCase(rows=3, out=40, width=75, kind="fp8"),
    "fp8_groups": ProductCase(rows=2, out=40, width=200, kind="fp8", group_size=64),
    "int4_levels": ProductCase(rows=4, out=40, width=90, kind="int4"),
    "int4_zeros": ProductCase(rows=1, out=40, width=128, kind="int4", group_size=32, zeros=True),
    "int4_minima": ProductCase(rows=3, out=70, width=96, kind="int4", group_size=32, minima=True),
    "int4_wide_groups": ProductCase(rows=2, out=40, width=512, kind="int4", group_size=256, zeros=True),
    "int4_one_group": ProductCase(rows=17, out=20, width=90, kind="int4", group_size=90, zeros=True),
    "many_rows": ProductCase(rows=70, out=50, width=128, kind="int4", group_size=64, zeros=True),
    "rounded_inputs": ProductCase(rows=5, out=40, width=200, kind="int8", rounds_inputs=1),
    "rounded_inputs_in_groups": ProductCase(
        rows=3, out=40, width=128, kind="int8", group_size=32, zeros=True, rounds_inputs=1
    ),
    "rounded_inputs_minima": ProductCase(rows=20, out=33, width=70, kind="int8", minima=True, rounds_inputs=1),
    # two numbers for an element: for CPUs
    "two_numbers": ProductCase(rows=1, out=40, width=96, kind="int8", rounds_inputs=2),
    "two_numbers_rows": ProductCase(rows=5, out=40, width=96, kind="int8", rounds_inputs=2),
    "two_numbers_levels": ProductCase(rows=1, out=40, width=90, kind="int4", rounds_inputs=2),
    "two_numbers_zeros": ProductCase(
        rows=2, out=40, width=128, kind="int4", group_size=32, zeros=True, rounds_inputs=2
    ),
    "two_numbers_minima": ProductCase(rows=2, out=33, width=70, kind="int8", minima=True, rounds_inputs=2),
    "two_numbers_ragged": ProductCase(rows=1, out=33, width=100, kind="int8", group_size=32, rounds_inputs=2),
    "two_numbers_many_rows": ProductCase(
        rows=9, out=33, width=96, kind="int4", group_size=32, minima=True, rounds_inputs=2
    ),
}
ON_GPUS = tuple(name for name, case in CASES.items() if case.rounds_inputs < 2)


@dataclasses.dataclass(frozen=True)
class ProductTruth:
    """A case's x and weight, the exact result, and that of the plain formula in the dtype of x."""

    x: np.ndarray
    weight: QuantizedArray
    options: dict[str, Any]
    out: np.ndarray
    plain_out: np.ndarray


@functools.lru_cache(maxsize=64)
def truth(name: str, dtype: str) -> ProductTruth:
    """truth_of a named case."""
    return truth_of(CASES[name], dtype, seed=0)


def truth_of(case: ProductCase, dtype: str, *, seed: int) -> ProductTruth:
    """Seeded arrays of a case and its results, computed in float64."""
    random = np.random.default_rng(seed)
    x = np.asarray(jnp.asarray(random.standard_normal((case.rows, case.width)), dtype))
    group = case.group_size or case.width
    shape = (case.out, -(-case.width // group))
    scales = (0.02 * np.exp(random.standard_normal(shape))).astype(ml_dtypes.bfloat16)
    stored, numbers = _numbers(random, case)
    zeros = minima = None
    if case.zeros:
        zeros = random.integers(0, 16, shape).astype(stored.dtype)
    if case.minima:
        minima = (0.1 * random.standard_normal(shape)).astype(np.float32)
    if case.kind == "int4" and not case.zeros and not case.minima:
        numbers = numbers - 7.5

    def each(of_groups: np.ndarray) -> np.ndarray:
        return np.repeat(of_groups.astype(np.float64), group, axis=1)[:, : case.width]

    weight = (numbers - (0 if zeros is None else each(zeros))) * each(scales)
    weight += 0 if minima is None else each(minima)
    rows = x.astype(np.float64)
    if case.rounds_inputs:
        of_rows = np.abs(x.astype(np.float32)).max(1, keepdims=True) / np.float32(127)
        rest = x.astype(np.float32) / of_rows
        terms = np.round(rest).astype(np.float64)
        if case.rounds_inputs == 2:
            terms += np.round((rest - np.round(rest)) * np.float32(254)) / 254.0
        rows = terms * of_rows
    rounding = rounding_to(x.dtype)

    def held(x: np.ndarray | None) -> Any:
        return None if x is None else jnp.asarray(x if case.group_size else x[:, 0])

    return ProductTruth(
        x=x,
        weight=QuantizedArray(
            values=jnp.asarray(stored),
            scales=held(scales),
            zeros=held(zeros),
            minima=held(minima),
            group_size=case.group_size,
            rounds_inputs=case.rounds_inputs,
        ),
        options=case.options,
        out=rows @ weight.T,
        plain_out=rounding(rounding(rows) @ rounding(weight).T),
    )


def _numbers(random: np.random.Generator, case: ProductCase) -> tuple[np.ndarray, np.ndarray]:
    """(stored numbers, what they stand for in float64); 4-bit numbers from 0 to 15."""
    shape = (case.out, case.width)
    if case.kind == "int8":
        stored = random.integers(-127, 128, shape).astype(np.int8)
        return stored, stored.astype(np.float64)
    if case.kind == "fp8":
        stored = (random.standard_normal(shape) * 100).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        return stored, stored.astype(np.float64)
    levels = random.integers(0, 16, shape)
    halves = levels.reshape(case.out, -1, 2, (case.group_size or case.width) // 2)
    return (halves[:, :, 0] + 16 * halves[:, :, 1]).reshape(case.out, -1).astype(np.uint8), levels.astype(np.float64)
