"""Products with quantized weights in plain XLA, for any platform."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from jfa import quant
from jfa.kernels.xla.flash import float32
from jfa.types import DeviceInfo, ProductOperands, ProductSpec

# Of a weight that is dequantized on a CPU: bytes at a time, but no fewer rows than a product needs (bench/LOG.md).
_DEQUANTIZED_BYTES, _LEAST_ROWS = 4 << 20, 256

# Rows of x up to which it costs more to put packed numbers in order than to add two products.
_ROWS_IN_HALVES = 64

# Of own_low_rank: a loop adds up to _TERMS products of _LANES numbers; more are faster, but take longer to compile.
_LANES, _TERMS = 16, 8
_MAX_OWN_ROWS, _MAX_OWN_RANK = 32, 32


def why_not(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> None:
    """The reason why this backend does not support a call: it supports all."""
    return None


def default_config(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> None:
    """There is nothing to configure."""
    return None


def quantized_matmul(operands: ProductOperands, *, spec: ProductSpec, on_cpu: bool) -> Float[Array, "n out"]:
    """x weight^T in the dtype of x: of integers where inputs are rounded, else with the weight dequantized."""
    x = operands.x
    if not spec.rounds_inputs:
        return _times_dequantized(x, operands, spec, on_cpu=on_cpu)
    terms, scales = quant.rounded_rows(x, spec.rounds_inputs)
    if spec.group_size is None and operands.zeros is operands.minima is None and operands.values.dtype == jnp.int8:
        rows = terms.reshape(-1, terms.shape[-1])
        sums = times_rows(rows, operands.values, to=jnp.int32, on_cpu=on_cpu).astype(jnp.float32)
        sums = (sums * operands.scales.astype(jnp.float32)).reshape(*terms.shape[:2], -1)
        return (sums * scales).sum(0).astype(x.dtype)
    rounded = (terms.astype(jnp.float32) * scales).sum(0).astype(x.dtype)
    return _times_dequantized(rounded, operands, spec, on_cpu=on_cpu)


def gradient_of_x(
    d_out: Float[Array, "n out"], operands: ProductOperands, spec: ProductSpec, *, on_cpu: bool
) -> Float[Array, "n in"]:
    """d_out weight, in the dtype of operands.x, with the weight dequantized."""
    d_out, blocks = _Blocks.after(d_out, operands, spec, on_cpu=on_cpu)

    def product(i) -> Float[Array, "n in"]:
        d_block = lax.dynamic_slice_in_dim(d_out, blocks.start(i), blocks.size, axis=1)
        is_new = blocks.start(i) + jnp.arange(blocks.size) >= i * blocks.size  # the last block repeats some rows
        d_block = jnp.where(is_new, d_block, 0)

        def times(weight: Float[Array, "size _"]) -> Float[Array, "n _"]:
            return jnp.matmul(d_block, weight, precision=_precision(weight), preferred_element_type=jnp.float32)

        return blocks.joined([times(part) for part in blocks.weight(i)])

    d_x = float32(d_out, operands.x.shape)
    d_x = lax.fori_loop(0, blocks.number, lambda i, d_x: d_x + product(i), d_x) if blocks.number > 1 else product(0)
    return d_x.astype(operands.x.dtype)


def _times_dequantized(
    x: Float[Array, "n in"], operands: ProductOperands, spec: ProductSpec, *, on_cpu: bool
) -> Float[Array, "n out"]:
    """x weight^T with the weight in the dtype of x."""
    x, blocks = _Blocks.after(x, operands, spec, on_cpu=on_cpu)

    def product(i) -> Float[Array, "n size"]:
        columns, weights = blocks.split(x), blocks.weight(i)
        if len(weights) == 1:
            return times_rows(columns[0], weights[0], to=x.dtype, on_cpu=on_cpu)
        low, high = (times_rows(*pair, to=jnp.float32, on_cpu=on_cpu) for pair in zip(columns, weights, strict=True))
        return (low + high).astype(x.dtype)

    if blocks.number == 1:
        return product(0)
    parts = lax.map(product, jnp.arange(blocks.number))
    first, last = jnp.moveaxis(parts[:-1], 0, 1).reshape(x.shape[0], -1), parts[-1]
    return jnp.concatenate([first, last[:, first.shape[1] - operands.values.shape[0] :]], axis=1)


class _Blocks(NamedTuple):
    """A weight in blocks of rows, which a CPU dequantizes one after another, when they are needed.

    Temporaries are fresh memory at each step, and the kernel takes longer to clear a page than a product to read it. So
    a large weight is dequantized in a loop, and none before what it is multiplied with is known: XLA would begin a
    step with the dequantization of all its weights, which takes the memory of a model in floats.
    """

    operands: ProductOperands
    spec: ProductSpec
    number: int
    size: int  # rows; the last block starts early enough to end with the weight
    in_halves: bool  # packed numbers are not put in order: two products of half of the columns

    @classmethod
    def after(
        cls, x: Float[Array, "n _"], operands: ProductOperands, spec: ProductSpec, *, on_cpu: bool
    ) -> tuple[Float[Array, "n _"], "_Blocks"]:
        """x, and the blocks of the weight that it is multiplied with."""
        out, width = operands.values.shape[0], operands.x.shape[1]
        if not on_cpu:
            return x, cls(operands, spec, 1, out, in_halves=False)
        num_bytes = out * width * operands.x.dtype.itemsize
        number = max(1, min(out // _LEAST_ROWS, -(-num_bytes // _DEQUANTIZED_BYTES)))
        x, weight = lax.optimization_barrier((x, operands._replace(x=None)))
        is_short = isinstance(x.shape[0], int) and x.shape[0] <= _ROWS_IN_HALVES
        in_halves = operands.values.dtype == jnp.uint8 and is_short
        return x, cls(weight._replace(x=operands.x), spec, number, -(-out // number), in_halves)

    def start(self, i):
        return jnp.minimum(i * self.size, self.operands.values.shape[0] - self.size)

    def weight(self, i) -> tuple[Float[Array, "size _"], ...]:
        """Block i in the dtype of x; in two parts, if in halves."""
        rows = functools.partial(lax.dynamic_slice_in_dim, start_index=self.start(i), slice_size=self.size)
        arrays = {name: array for name, array in self.operands._asdict().items() if name != "x" and array is not None}
        own = {name: quant.on_bits(rows, array) for name, array in arrays.items()} if self.number > 1 else arrays
        held, dtype = quant.weight_of(self.operands._replace(**own), self.spec), self.operands.x.dtype
        return quant.dequantized_halves(held, dtype) if self.in_halves else (quant.dequantize(held, dtype),)

    def split(self, x: Float[Array, "n in"]) -> tuple[Float[Array, "n _"], ...]:
        """The columns that the parts of a block are multiplied with."""
        return quant.halves(x, self.spec.group_size) if self.in_halves else (x,)

    def joined(self, parts: Sequence[Float[Array, "n _"]]) -> Float[Array, "n in"]:
        """The inverse of split."""
        return quant.joined((parts[0], parts[1]), self.spec.group_size) if self.in_halves else parts[0]


def times_rows(
    x: Shaped[Array, "*b in"], weight: Shaped[Array, "out in"], *, to: DTypeLike, on_cpu: bool
) -> Shaped[Array, "*b out"]:
    """x weight^T in the dtype `to`. Both are contracted along their last axis: the weight is read as it is stored.

    XLA on a CPU multiplies a single row of 8- or 16-bit numbers by a scalar loop, ten times slower than two rows: there
    a row of zeros is added (bench/LOG.md).
    """
    if on_cpu and weight.dtype == jnp.float16:  # XLA widens it: as _Blocks.after
        x, weight = lax.optimization_barrier((x, weight))
    alone = on_cpu and x.dtype != jnp.float32 and math.prod(x.shape[:-1]) == 1
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0))) if alone else x
    contracted = (((rows.ndim - 1,), (1,)), ((), ()))
    out = lax.dot_general(rows, weight, contracted, precision=_precision(x), preferred_element_type=to)
    out = out[0].reshape(*x.shape[:-1], -1) if alone else out
    return _with_separate_gradient(out) if on_cpu and jnp.issubdtype(out.dtype, jnp.floating) else out


@jax.custom_vjp
def _with_separate_gradient(out: Float[Array, "*b out"]) -> Float[Array, "*b out"]:
    """The product, whose gradient is in memory before something is multiplied by it.

    The gradient of the weight needs it transposed. XLA on a CPU fuses all that it is computed from with the transposed
    copy, one number at a time, which takes longer than the products beside it (bench/LOG.md).
    """
    return out


_with_separate_gradient.defvjp(lambda out: (out, None), lambda _, d_out: (lax.optimization_barrier(d_out),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def times_columns(x: Float[Array, "*b in"], weight: Float[Array, "in out"], on_cpu: bool) -> Float[Array, "*b out"]:
    """x weight in the dtype of x, which is rounded to the dtype of the weight, for weights with few rows.

    Of the gradient of the weight, x^T d_out, a CPU transposes x, which is small; that of times_rows transposes d_out.
    """
    return times_rows(x.astype(weight.dtype), weight.T, to=x.dtype, on_cpu=on_cpu)


def _times_columns_forward(x, weight, on_cpu: bool):
    return times_columns(x, weight, on_cpu), (x, weight)


def _times_columns_backward(on_cpu: bool, saved, d_out):
    x, weight = saved
    d_out = d_out.astype(weight.dtype)
    d_x = times_rows(d_out, weight, to=x.dtype, on_cpu=on_cpu)
    rows, d_rows = (a.reshape(-1, a.shape[-1]).astype(weight.dtype) for a in (x, d_out))
    d_weight = jnp.matmul(rows.T, d_rows, precision=_precision(rows), preferred_element_type=jnp.float32)
    return d_x, d_weight.astype(weight.dtype)


times_columns.defvjp(_times_columns_forward, _times_columns_backward)


def _precision(x: Array) -> str | None:
    return "highest" if x.dtype == jnp.float32 else None  # otherwise float32 may be rounded to tf32


def prefers_own(rows: int, a: Shaped[Array, "slots r in"]) -> bool:
    """Whether own_low_rank is faster on a CPU than products of all rows with all slots, of which all but one are zero.

    Eigen's product of eight rows is bound by its arithmetic, so products with others' slots cost as much as one's own.
    """
    slots, rank, width = a.shape
    is_small = slots > 1 and 0 < rows <= _MAX_OWN_ROWS and rank <= _MAX_OWN_RANK
    return (
        is_small and a.dtype == jnp.float32 and width % _LANES == 0 and bool(_terms(width // _LANES) and _terms(rank))
    )


def _terms(count: int) -> int:
    """Into how many parts at most _TERMS a sum of so many is divided; 0: not evenly, or only into hardly any."""
    terms = max((n for n in range(1, _TERMS + 1) if count % n == 0), default=0)
    return terms if terms == count or terms >= _TERMS // 2 else 0


def own_low_rank(
    x: Float[Array, "n in"], a: Float[Array, "slots r in"], b: Float[Array, "slots r out"], slot: Int[Array, " n"]
) -> Float[Array, "n out"]:
    """x a[slot]^T b[slot], each row with its own slot, for few rows on a CPU. Slots must be in bounds.

    Written as sums of elementwise products, with which XLA fuses the selection of each row's part: nothing is copied,
    and nothing of another slot is multiplied. A reduction or a batched product would get a copy (bench/LOG.md).
    """
    n, width = x.shape
    slots, rank, _ = a.shape

    def own(parts: Float[Array, "slots ..."], axis: int, i: int) -> Float[Array, "n ..."]:
        return jnp.take(lax.index_in_dim(parts, i, axis, keepdims=False), slot, axis=0, mode="clip")

    # Each barrier keeps a loop from computing the one before it again for every one of its own elements.
    terms = _terms(width // _LANES)
    x = lax.optimization_barrier(x).reshape(n, 1, -1, terms, _LANES)
    a = a.reshape(slots, rank, -1, terms, _LANES)
    sums = sum(x[:, :, :, i] * own(a, 3, i) for i in range(terms))
    hidden = lax.optimization_barrier(jnp.sum(lax.optimization_barrier(sums), axis=(-2, -1)))
    terms = _terms(rank)
    hidden = hidden.reshape(n, -1, terms, 1)
    b = b.reshape(slots, -1, terms, b.shape[-1])
    return jnp.sum(lax.optimization_barrier(sum(hidden[:, :, i] * own(b, 2, i) for i in range(terms))), axis=1)
