"""Cases of products of a few rows with what is computed around them, and their expected results."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jfa import quant
from jfa.quant import kind_of
from jfa.types import RowSpec

from .numerics import rounding_to
from .product_cases import ProductCase
from .product_cases import truth_of as product_truth_of

_PLAIN = RowSpec()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowCase:
    """Shapes of x [rows, width] and of the weights [out, width], and what is computed around their products."""

    rows: int
    width: int
    outs: tuple[int, ...]
    spec: RowSpec = _PLAIN
    biases: bool = False
    residual: bool = False
    weight: ProductCase | None = None  # how the weights are quantized; its shapes are not used


CASES = {
    "one_row": RowCase(rows=1, width=64, outs=(16,)),
    "side_by_side": RowCase(rows=3, width=200, outs=(40, 16, 7), biases=True),
    "residual": RowCase(rows=16, width=512, outs=(33,), residual=True),
    "more_than_a_tile": RowCase(rows=8, width=1100, outs=(16, 8), biases=True, residual=True),
    "silu_of_a_gate": RowCase(rows=5, width=600, outs=(24, 24), spec=RowSpec(activation="silu"), biases=True),
    "many_rows": RowCase(rows=27, width=300, outs=(24, 40), biases=True),
    "many_rows_of_a_gate": RowCase(rows=32, width=576, outs=(17, 17), spec=RowSpec(activation="silu")),
    "gelu": RowCase(rows=2, width=96, outs=(24,), spec=RowSpec(activation="gelu_tanh"), biases=True),
    "relu_of_a_gate": RowCase(rows=2, width=40, outs=(20, 20), spec=RowSpec(activation="relu"), residual=True),
}
_INT8, _FP8, _INT4 = (ProductCase(rows=1, out=1, width=1, kind=kind) for kind in ("int8", "fp8", "int4"))
_GATE = RowSpec(activation="silu")
QUANTIZED = {
    "int8": RowCase(rows=3, width=200, outs=(40, 16, 7), biases=True, weight=_INT8),
    "int8_groups": RowCase(
        rows=9, width=1100, outs=(24,), residual=True, weight=dataclasses.replace(_INT8, group_size=32)
    ),
    "int8_minima_of_a_gate": RowCase(
        rows=5, width=640, outs=(20, 20), spec=_GATE, weight=dataclasses.replace(_INT8, group_size=128, minima=True)
    ),
    "int8_zeros": RowCase(rows=17, width=96, outs=(24,), weight=dataclasses.replace(_INT8, group_size=16, zeros=True)),
    "fp8": RowCase(rows=4, width=576, outs=(33, 17), residual=True, weight=_FP8),
    "fp8_groups_of_a_gate": RowCase(
        rows=2, width=300, outs=(17, 17), spec=_GATE, weight=dataclasses.replace(_FP8, group_size=128)
    ),
    "int4_levels": RowCase(rows=4, width=400, outs=(40, 24), weight=_INT4),
    "int4_zeros": RowCase(
        rows=1, width=512, outs=(40, 16, 16), biases=True, weight=dataclasses.replace(_INT4, group_size=128, zeros=True)
    ),
    "int4_minima": RowCase(
        rows=6, width=576, outs=(33,), residual=True, weight=dataclasses.replace(_INT4, group_size=32, minima=True)
    ),
    "int4_zeros_of_a_gate": RowCase(
        rows=20, width=1088, outs=(20, 20), spec=_GATE, weight=dataclasses.replace(_INT4, group_size=64, zeros=True)
    ),
}
NORMALIZED = {  # not in float16
    "normalized": RowCase(rows=7, width=600, outs=(40, 16, 16), spec=RowSpec(eps=1e-5)),
    "normalized_gate": RowCase(
        rows=16, width=1024, outs=(20, 20), spec=RowSpec(activation="silu", eps=1e-6, plus=1.0), biases=True
    ),
}


class RowTruth(NamedTuple):
    """Arguments of jfa.row_ops.matmul_few_rows, the exact result, and that of the plain formula in the dtype of x."""

    case: RowCase
    x: np.ndarray
    weights: tuple[Any, ...]
    options: dict[str, Any]
    out: np.ndarray
    plain_out: np.ndarray


def cases(dtype: str) -> dict[str, RowCase]:
    """Those of a dtype of x, or, as in names.ROW_DTYPES, of x on numbers of quantized weights."""
    stored = dtype.partition(" on ")[2]
    found = CASES | QUANTIZED | (NORMALIZED if dtype == "bfloat16" else {})
    kind = kind_of(stored) if stored else None
    return {name: case for name, case in found.items() if kind == (case.weight and case.weight.kind)}


def truth_of(case: RowCase, dtype: str, *, seed: int) -> RowTruth:
    """Seeded arrays of a case and its results, computed in float64."""
    draw, spec = np.random.default_rng(seed), case.spec

    def array(*shape: int, factor: float = 1.0) -> np.ndarray:
        return np.array(jnp.asarray(draw.standard_normal(shape) * factor, dtype))

    x = array(case.rows, case.width, factor=3.0)
    x[-1] *= 8  # rows have norms of their own
    weights: tuple[Any, ...] = tuple(array(out, case.width, factor=case.width**-0.5) for out in case.outs)
    dense = weights
    if case.weight is not None:
        shapes = [dataclasses.replace(case.weight, out=out, width=case.width) for out in case.outs]
        weights = tuple(product_truth_of(shape, dtype, seed=seed + i).weight for i, shape in enumerate(shapes))
        weights = tuple(map(_smaller, weights))
        dense = tuple(np.asarray(quant.dequantize(one)) for one in weights)
    total = case.outs[0] if spec.activation else sum(case.outs)
    options: dict[str, Any] = {
        "biases": tuple(array(out) for out in case.outs) if case.biases else None,
        "scale": None if spec.eps is None else array(case.width),
        "residual": array(case.rows, total, factor=4.0) if case.residual else None,
    }

    def computed(rounded) -> np.ndarray:
        rows = x.astype(np.float64)
        if spec.eps is not None:
            rows = rounded(rows / np.sqrt(np.mean(rows**2, axis=1, keepdims=True) + spec.eps))
            rows = rounded(rows * (spec.plus + options["scale"].astype(np.float64)))
        found = [rounded(rows @ rounded(weight.astype(np.float64)).T) for weight in dense]
        if case.biases:
            found = [rounded(y + bias.astype(np.float64)) for y, bias in zip(found, options["biases"], strict=True)]
        if spec.activation:
            found[0] = rounded(_ACTIVATIONS[spec.activation](found[0]))
            found = [rounded(np.prod(found, axis=0))]
        y = np.concatenate(found, axis=1)
        return rounded(y + options["residual"].astype(np.float64)) if case.residual else y

    return RowTruth(case, x, weights, options, computed(lambda x: x), computed(rounding_to(x.dtype)))


def _smaller(weight: quant.QuantizedArray) -> quant.QuantizedArray:
    """Products of about the size of those with floats."""
    minima = None if weight.minima is None else weight.minima * 0.02
    return dataclasses.replace(weight, scales=weight.scales * 0.02, minima=minima)


_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: np.maximum(x, 0),
}
