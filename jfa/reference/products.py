"""Products with quantized weights by the plain formula: the weight is dequantized to float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jfa import quant
from jfa.types import ProductOperands, ProductSpec


def quantized_matmul(operands: ProductOperands, *, spec: ProductSpec) -> Float[Array, "n out"]:
    """x weight^T, the sums in float32, in the dtype of x."""
    x, weight = operands.x.astype(jnp.float32), quant.dequantize(quant.weight_of(operands, spec))
    if spec.rounds_inputs:
        rows, scales = quant.rounded_rows(x, spec.rounds_inputs)
        x = (rows.astype(jnp.float32) * scales).sum(0)
    return jnp.matmul(x, weight.T, precision="highest").astype(operands.x.dtype)
