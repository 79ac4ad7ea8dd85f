"""Products of a few rows, with what a decoder does before and after them, as one kernel.

A decode step on a GPU reads weights and little else, and spends much of the rest on launches: of a norm, of a product
for each weight, of the sums of split products, of an activation and a residual. Only the triton backend has the kernel;
with the others, these are operations of their own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from jfa import backends, quant
from jfa.backends.interface import RowBackend
from jfa.device import probe
from jfa.kernels.xla import products as in_xla
from jfa.quant import QuantizedArray
from jfa.rules import compiled, with_default_rules
from jfa.types import DeviceInfo, Implementation, RowOperands, RowSpec

_PLAIN = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def serves(
    x: Float[Array, "*b in"],
    weights: Sequence[Float[Array, "out in"] | QuantizedArray],
    spec: RowSpec,
    *,
    implementation: Implementation | None = None,
) -> bool:
    """Whether matmul_few_rows supports a call. Arrays, or their shapes."""
    device = probe()
    backend = backends.rows(implementation, device)
    if backend is None:
        return False
    arrays = jax.tree.leaves(list(weights))
    if any(kind == AxisType.Manual for x in arrays for kind in jax.typeof(x).sharding.mesh.axis_types):
        return False  # the kernel has no rule for an array that is divided
    rows: Any = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), x.shape[-1]), x.dtype)
    operands = RowOperands(rows, tuple(weights), (None,) * len(weights))  # type: ignore[arg-type]
    return backend.why_not(operands, spec, device) is None


@with_default_rules
def matmul_few_rows(
    x: Float[Array, "*b in"],
    weights: Sequence[Float[Array, "out in"] | QuantizedArray],
    spec: RowSpec,
    *,
    biases: Sequence[Float[Array, " out"] | None] | None = None,
    scale: Float[Array, " in"] | None = None,
    residual: Float[Array, "*b sum_of_out"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*b sum_of_out"]:
    """x weight^T of each weight, side by side, in the dtype of x; computed in float32 and rounded once.

    With spec.eps, x is normalized first and multiplied by spec.plus + scale. With spec.activation, the result is
    activation(x first^T) * (x second^T), or without a second weight activation(x first^T). The residual is added last.

    implementation: "triton", or None; serves(...) must be True.
    """
    device = probe()
    backend = backends.rows(implementation, device)
    assert backend is not None, "serves(...) is False"

    def flat(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])

    operands = RowOperands(
        flat(x),
        tuple(weights),
        tuple(biases or (None,) * len(weights)),
        scale,
        None if residual is None else flat(residual),
    )
    return _run(_Plan(backend=backend, spec=spec, device=device), operands).reshape(*x.shape[:-1], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: RowBackend
    spec: RowSpec
    device: DeviceInfo


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@compiled
@with_default_rules
def _run(plan: _Plan, operands: RowOperands) -> Float[Array, "n sum_of_out"]:
    with jax.named_scope("jfa.matmul_few_rows.triton"):
        return plan.backend.run(operands, plan.spec, plan.device)


@_run.defjvp
@with_default_rules  # it is traced when the caller asks for a derivative
def _derivative(plan: _Plan, primals, tangents):
    return _run(plan, *primals), jax.jvp(functools.partial(_plain, plan.spec), primals, tangents)[1]


def _plain(spec: RowSpec, operands: RowOperands) -> Float[Array, "n sum_of_out"]:
    """The definition, as operations of XLA."""
    x, dtype = operands.x, operands.x.dtype
    if spec.eps is not None:
        wide = x.astype(jnp.float32)
        assert operands.scale is not None
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + spec.eps)
        x = (wide * (spec.plus + operands.scale.astype(jnp.float32))).astype(dtype)
    dense = [quant.dequantize(w, dtype) if isinstance(w, QuantizedArray) else w for w in operands.weights]
    found = [in_xla.times_rows(x, weight, to=jnp.float32, on_cpu=False) for weight in dense]
    found = [y if b is None else y + b.astype(jnp.float32) for y, b in zip(found, operands.biases, strict=True)]
    if spec.activation is not None:
        found = [functools.reduce(jnp.multiply, found[1:], _PLAIN[spec.activation](found[0]))]
    y = jnp.concatenate(found, axis=-1)
    if operands.residual is not None:
        y = y + operands.residual.astype(jnp.float32)
    return y.astype(dtype)
