"""Products with quantized weights in plain XLA, for any platform."""

import math

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from jfa import quant
from jfa.types import DeviceInfo, ProductOperands, ProductSpec


def why_not(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> None:
    """The reason why this backend does not support a call: it supports all."""
    return None


def default_config(operands: ProductOperands, device: DeviceInfo) -> None:
    """There is nothing to configure."""
    return None


def quantized_matmul(operands: ProductOperands, *, spec: ProductSpec, on_cpu: bool) -> Float[Array, "n out"]:
    """x weight^T in the dtype of x: of integers if the weight has one scale per row, else with the weight dequantized."""
    x = operands.x
    symmetric = spec.group_size is None and operands.zeros is None and operands.minima is None
    if spec.rounds_inputs and symmetric:
        rows, scales = quant.rounded_rows(x)
        sums = times_rows(rows, operands.values, to=jnp.int32, on_cpu=on_cpu)
        return (sums.astype(jnp.float32) * scales * operands.scales.astype(jnp.float32)).astype(x.dtype)
    if spec.rounds_inputs:
        rows, scales = quant.rounded_rows(x)
        x = (rows.astype(jnp.float32) * scales).astype(x.dtype)
    weight = quant.dequantize(quant.weight_of(operands, spec), x.dtype)
    return times_rows(x, weight, to=x.dtype, on_cpu=on_cpu)


def times_rows(
    x: Shaped[Array, "*b in"], weight: Shaped[Array, "out in"], *, to: DTypeLike, on_cpu: bool
) -> Shaped[Array, "*b out"]:
    """x weight^T in the dtype `to`. Contracting the last axis of both reads the weight as stored: nothing is transposed.

    XLA on a CPU multiplies a single row of 8- or 16-bit numbers by a scalar loop, ten times slower than two rows: there
    a row of zeros is added (bench/LOG.md).
    """
    alone = on_cpu and x.dtype != jnp.float32 and math.prod(x.shape[:-1]) == 1
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0))) if alone else x
    precision = "highest" if x.dtype == jnp.float32 else None  # otherwise float32 may be rounded to tf32
    contracted = (((rows.ndim - 1,), (1,)), ((), ()))
    out = lax.dot_general(rows, weight, contracted, precision=precision, preferred_element_type=to)
    return out[0].reshape(*x.shape[:-1], -1) if alone else out
