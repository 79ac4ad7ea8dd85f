"""Products with quantized weights in plain XLA, for any platform."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from jfa import quant
from jfa.types import DeviceInfo, ProductOperands, ProductSpec


def why_not(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> None:
    """The reason why this backend does not support a call: it supports all."""
    return None


def default_config(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> None:
    """There is nothing to configure."""
    return None


def quantized_matmul(operands: ProductOperands, *, spec: ProductSpec, on_cpu: bool) -> Float[Array, "n out"]:
    """x weight^T in the dtype of x: of integers if a row has one scale, else with the weight dequantized."""
    x = operands.x
    symmetric = spec.group_size is None and operands.zeros is None and operands.minima is None
    if spec.rounds_inputs and symmetric:
        rows, scales = quant.rounded_rows(x)
        sums = times_rows(rows, operands.values, accumulate=jnp.int32, on_cpu=on_cpu)
        return (sums.astype(jnp.float32) * scales * operands.scales.astype(jnp.float32)).astype(x.dtype)
    if spec.rounds_inputs:
        rows, scales = quant.rounded_rows(x)
        x = (rows.astype(jnp.float32) * scales).astype(x.dtype)
    weight = quant.dequantize(quant.weight_of(operands, spec), x.dtype)
    return times_rows(x, weight, accumulate=jnp.float32, on_cpu=on_cpu).astype(x.dtype)


def times_rows(
    x: Shaped[Array, "n in"], weight: Shaped[Array, "out in"], *, accumulate, on_cpu: bool
) -> Shaped[Array, "n out"]:
    """x weight^T. Contracting the last axis of both reads the weight as stored; no transposed copy is made.

    XLA on a CPU multiplies a single row of 8- or 16-bit numbers by a scalar loop, several times slower than two rows:
    there a row of zeros is added (bench/LOG.md).
    """
    alone = on_cpu and x.shape[0] == 1 and x.dtype != jnp.float32
    if alone:
        x = jnp.pad(x, ((0, 1), (0, 0)))
    precision = "highest" if x.dtype == jnp.float32 else None  # otherwise float32 may be rounded to tf32
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=accumulate)
    return out[:1] if alone else out
