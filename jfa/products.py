"""Products with quantized weights: check arguments, select a backend and its configuration, run it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jfa import backends, checks
from jfa.device import probe
from jfa.kernels.xla import products as in_xla
from jfa.quant import QuantizedArray
from jfa.rules import compiled, with_default_rules
from jfa.types import DeviceInfo, Implementation, ProductConfig, ProductOperands, ProductSpec, TpuProductConfig


@with_default_rules
def quantized_matmul(
    x: ArrayLike,
    weight: QuantizedArray,
    *,
    implementation: Implementation | None = None,
    config: ProductConfig | TpuProductConfig | None = None,
) -> Float[Array, "*b out"]:
    """x weight^T for a weight in 8 or 4 bits, which is read as it is stored. Sums are float32 (int32 of integers).

    Differentiable with respect to x; the weight and its scales are constants. With weight.rounds_inputs each row of x
    is rounded by its absolute maximum, and the gradient is that of the product without this rounding.

    Backend "xla" rounds a dequantized weight to the dtype of x before the product.

    Args:
      x: [..., in]; float16, bfloat16 or float32.
      weight: [out, in], in groups along `in` or with one scale for each row.
      implementation: "reference", "xla", "triton" or "tpu" to require that backend; None to choose automatically.
      config: a ProductConfig for "triton", a TpuProductConfig for "tpu"; None: the backend's default.

    Returns:
      [..., out] in the dtype of x.

    Raises:
      ValueError: invalid shapes or dtypes; the message names them.
      UnsupportedError: the call is valid, but the backend does not implement it.

    Sources: arXiv:2208.07339, section 2 (int8 with a scale per row); arXiv:2210.17323 (groups of 4-bit numbers).
    """
    x = jnp.asarray(x)
    checks.product(x, weight)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    operands = ProductOperands(rows, weight.values, weight.scales, weight.zeros, weight.minima)
    spec = ProductSpec(group_size=weight.group_size, rounds_inputs=weight.rounds_inputs)
    shape = (*x.shape[:-1], weight.values.shape[0])
    if math.prod(shape) == 0 or x.shape[-1] == 0:
        return jnp.zeros(shape, x.dtype)
    device = probe()
    name = backends.select(implementation, operands, spec, device, table=backends.product)
    backend = backends.product(name)
    if config is None:
        config = backend.default_config(operands, spec, device)
    else:
        backends.check_config(name, backend.config_type, config)
    plan = _Plan(backend=name, spec=spec, config=config, device=device)
    return _differentiable(plan, operands).reshape(shape)


@with_default_rules
def times_rows(x: Float[Array, "*b in"], weight: Float[Array, "out in"] | QuantizedArray) -> Float[Array, "*b out"]:
    """x weight^T in the dtype of x, for a quantized weight or floats; x is rounded to the dtype of floats first."""
    if isinstance(weight, QuantizedArray):
        return quantized_matmul(x, weight)
    on_cpu = probe().platform == "cpu"
    return in_xla.times_rows(x.astype(weight.dtype), weight, to=x.dtype, on_cpu=on_cpu)


@with_default_rules
def low_rank_rows(
    x: Float[Array, "*b in"],
    a: Float[Array, "slots r in"],
    b: Float[Array, "slots r out"],
    gates: Float[Array, "*b slots"],
) -> Float[Array, "*b out"]:
    """x a^T b in the dtype of x, for each row with the slot that its gates name; zeros where all of them are 0.

    Numbers of other slots do not reach a row, except that those of a and b must be finite.
    """
    slots, rank, width = a.shape
    rows = math.prod(x.shape[:-1])
    if probe().platform == "cpu" and a.dtype == b.dtype == x.dtype and in_xla.prefers_own(rows, a):
        own = gates.reshape(rows, slots)
        out = in_xla.own_low_rank(x.reshape(rows, width), a, b, jnp.argmax(own, axis=-1))
        return jnp.where(own.any(-1, keepdims=True), out, 0).reshape(*x.shape[:-1], -1)
    hidden = times_rows(x, a.reshape(-1, width))
    hidden = jnp.where(jnp.repeat(gates, rank, axis=-1) != 0, hidden, 0)
    return in_xla.times_columns(hidden, b.reshape(slots * rank, -1), probe().platform == "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: str
    spec: ProductSpec
    config: ProductConfig | TpuProductConfig | None
    device: DeviceInfo


@compiled
@with_default_rules
def _run(plan: _Plan, operands: ProductOperands) -> Float[Array, "n out"]:
    with jax.named_scope(f"jfa.quantized_matmul.{plan.backend}"):
        return backends.product(plan.backend).run(operands, plan.spec, plan.config, plan.device)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: _Plan, operands: ProductOperands) -> Float[Array, "n out"]:
    return _run(plan, operands)


def _forward(plan: _Plan, operands: ProductOperands):
    return _run(plan, operands), operands


@compiled
@with_default_rules
def _backward(plan: _Plan, operands: ProductOperands, d_out) -> tuple[ProductOperands]:
    d_x = in_xla.gradient_of_x(d_out, operands, plan.spec, on_cpu=plan.device.platform == "cpu")
    return (ProductOperands(d_x, None, None),)  # type: ignore[arg-type]  # constants


_differentiable.defvjp(_forward, _backward)
