"""Products of a few rows, and what a decode step does before and after them, as one Pallas-Triton kernel.

A program computes block_out columns of the output. Its waves divide the columns of the weights: each multiplies its own
part of x, and the float32 sums of the parts are added on chip. So also a weight of few rows keeps the device busy, and
no partial results are written to memory, for whose addition XLA takes one more launch.

Around the product, in float32: x is normalized, after the product, by the root mean square of its row; a bias is added;
an activation is applied, whose result is multiplied by a second product (a gated MLP); the residual is added. Weights
that share x, as those of queries, keys and values do, stay where they are: a program reads one of them.

Quantized weights are cast in registers, and scales applied to the sums of a group, as in products.py. The sum of x that
zero points and minima are multiplied by is a product with ones: its result lies where the others do.

The time is that of reading the weights. Sources: arXiv:2402.00025, section 3 (dividing the columns), arXiv:2002.05202
(gated MLPs). Tested in tests/jfa/test_row_ops.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton import products
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import dot_of_parts, exp2, fma
from jfa.kernels.triton.casts import offset, rounded_half_up, unit, widened
from jfa.kernels.triton.products import Layout
from jfa.kernels.triton.tile import kind_of
from jfa.quant import QuantizedArray
from jfa.types import DeviceInfo, ProductOperands, ProductSpec, RowOperands, RowSpec

MAX_ROWS = 32  # with more, x would be read several times as often as the weights

_MAX_NORMALIZED = 16  # of these; normalizing more takes as long as reading the weights, and spills on RDNA
_BLOCK_OUT, _BLOCK_OUT_INT4 = 16, 32  # of a 4-bit weight: more, since x is loaded and added up for each block
_BLOCK_IN = 64  # columns of a wave: with 16 bits, 128 bytes of each row of a weight
_MAX_WARPS = 8
_BYTES_OF_SUMS = 4096
_WITH_BF16_CASTS = ("gfx950", "gfx125", "sm_")  # architectures with an instruction that rounds float32 to bfloat16


def _sigmoid_times(x: Array, y: Array) -> Array:
    """y / (1 + e^-x)."""
    return y / (1.0 + exp2(x * -math.log2(math.e)))


def _gelu_tanh(x: Array) -> Array:
    # 1 + tanh(u) is 2 / (1 + e^-2u)
    return _sigmoid_times((x + 0.044715 * x * x * x) * (2.0 * math.sqrt(2.0 / math.pi)), x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": lambda x: _sigmoid_times(x, x),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: jnp.maximum(x, 0.0),
}


def why_not(operands: RowOperands, spec: RowSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    x, weights = operands.x, operands.weights
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    largest = MAX_ROWS if spec.eps is None else _MAX_NORMALIZED
    if not 0 < x.shape[0] <= largest:
        return f"it is for 1 to {largest} rows, got {x.shape[0]}"
    if not all(math.prod(weight.shape) for weight in weights):
        return "a product without columns, or weights without rows"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"x must be bfloat16 or float16, got {x.dtype}"
    for weight in weights:
        if isinstance(weight, QuantizedArray):
            if weight.rounds_inputs:
                return "rounded inputs are multiplied as integers, by a kernel of their own"
            of_weight = ProductOperands(x, weight.values, weight.scales, weight.zeros, weight.minima)
            if reason := products.why_not(of_weight, ProductSpec(group_size=weight.group_size), device):
                return reason
        elif weight.dtype != x.dtype:
            return f"weights must be quantized, or {x.dtype} as x is, got {weight.dtype}"
    if spec.eps is not None and x.dtype != jnp.bfloat16:
        return f"x is multiplied before its norm is known, which may be too large for {x.dtype}"
    if spec.eps is not None and any(isinstance(weight, QuantizedArray) for weight in weights):
        return "normalizing x in each program would take longer than reading quantized weights"
    if spec.activation not in (None, *ACTIVATIONS):
        return f"it has the activations {', '.join(ACTIVATIONS)}, not {spec.activation}"
    if spec.activation and len({(_layout(weight), _stored(weight).dtype) for weight in weights}) > 1:
        return "a gate and its factor must be stored in the same way"
    return None


def _stored(weight: Array | QuantizedArray) -> Array:
    return weight.values if isinstance(weight, QuantizedArray) else weight


def _layout(weight: Array | QuantizedArray) -> Layout:
    """How a wave walks the stored columns of a weight."""
    stored, tile = _stored(weight).shape[1], _BLOCK_IN
    if not isinstance(weight, QuantizedArray):
        return Layout(stored=stored, halves=1, span=stored, tile=tile, piece=tile)
    halves = 2 if weight.values.dtype == jnp.uint8 else 1
    tile = tile // halves
    span = stored if weight.group_size is None else min(stored, weight.group_size // halves)
    return Layout(stored=stored, halves=halves, span=span, tile=tile, piece=min(tile, span) if span < stored else tile)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """Of a program, whose waves divide the columns of the weights."""

    block_rows: int
    block_out: int
    num_warps: int
    num_stages: int
    round_half_up: bool  # what is normalized, to bfloat16
    fp8_by_bits: bool


def _tile(operands: RowOperands, spec: RowSpec, device: DeviceInfo) -> _Tile:
    n, columns = operands.x.shape
    block_rows = 16 if n <= 16 else 32
    num_warps = min(_MAX_WARPS, pl.next_power_of_2(pl.cdiv(columns, _BLOCK_IN)))
    num_weights = len(operands.weights) if spec.activation else 1
    packed = any(_stored(weight).dtype == jnp.uint8 for weight in operands.weights)
    block_out = _BLOCK_OUT_INT4 if packed else _BLOCK_OUT
    stage = num_warps * _BLOCK_IN * (block_rows + num_weights * block_out) * operands.x.dtype.itemsize
    # two stages, of which one is in registers on AMD; NVIDIA has both in shared memory, and room for some sums
    is_deep = kind_of(device) == "cuda" and 2 * stage + _BYTES_OF_SUMS <= device.lds_bytes
    return _Tile(
        block_rows=block_rows,
        block_out=block_out,
        num_warps=num_warps,
        num_stages=3 if is_deep else 2,
        round_half_up=not device.arch.startswith(_WITH_BF16_CASTS),
        fp8_by_bits=products.fp8_by_bits(device),
    )


def matmul_few_rows(
    operands: RowOperands, *, spec: RowSpec, device: DeviceInfo, interpret: bool
) -> Float[Array, "n sum_of_out"]:
    """What row_ops.matmul_few_rows defines, in the dtype of x."""
    n, tile = operands.x.shape[0], _tile(operands, spec, device)
    arrays: dict[str, Any] = {"x": operands.x, "scale": operands.scale, "residual": operands.residual}
    for i, (weight, of_weight) in enumerate(zip(operands.weights, operands.biases, strict=True)):
        arrays |= {f"values_{i}": _stored(weight), f"bias_{i}": of_weight}
        if isinstance(weight, QuantizedArray):
            fields = {name: getattr(weight, name) for name in ("scales", "zeros", "minima")}
            arrays |= {f"{name}_{i}": None if x is None else x.reshape(len(x), -1) for name, x in fields.items()}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    outs = [weight.shape[0] for weight in operands.weights[: 1 if spec.activation else None]]
    call = pl.pallas_call(
        functools.partial(
            _kernel,
            names=tuple(arrays),
            layouts=tuple(map(_layout, operands.weights)),
            spec=spec,
            tile=tile,
        ),
        name="matmul_few_rows",
        grid=(sum(pl.cdiv(out, tile.block_out) for out in outs),),
        in_specs=[_whole(x.shape) for x in arrays.values()],
        out_specs=_whole((n, sum(outs))),
        out_shape=output((n, sum(outs)), operands.x.dtype, like=operands.x),
        compiler_params=CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        return call(*arrays.values())


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *grid: (0,) * len(shape))


def _kernel(
    *refs,  # the arguments by `names`, then the output [n, sum of outs]
    names: tuple[str, ...],
    layouts: tuple[Layout, ...],
    spec: RowSpec,
    tile: _Tile,
):
    *inputs, o_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    fields = ("values", "bias", "scales", "zeros", "minima")
    weights = [_Weight(**{name: ref.get(f"{name}_{i}") for name in fields}) for i in range(len(layouts))]
    store_block = functools.partial(_columns_of, ref, o_ref, spec=spec, tile=tile)
    program = pl.program_id(0)
    if spec.activation:
        store_block(weights, layouts[0], program, 0)
        return
    first, before = 0, 0  # programs, and columns of the output, of the weights before
    for weight, layout in zip(weights, layouts, strict=True):
        out = weight.values.shape[0]
        end = first + pl.cdiv(out, tile.block_out)
        is_own = (program >= first) & (program < end)
        here = functools.partial(store_block, [weight], layout, program - first, before)
        here() if len(weights) == 1 else pl.when(is_own)(here)
        first, before = end, before + out


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Weight:
    """The references of a weight in a kernel."""

    values: Any
    bias: Any
    scales: Any  # None: floats
    zeros: Any
    minima: Any

    def offsets(self, dtype: Any, at: tuple[Array, ...], scales: Array) -> Array | None:
        """casts.offset, of these rows and groups."""
        zeros, minima = (None if ref is None else load(ref.at[at]) for ref in (self.zeros, self.minima))
        return offset(self.values.dtype, dtype, scales, zeros, minima)


def _columns_of(
    ref: Mapping[str, Any],
    o_ref,
    weights: Sequence[_Weight],
    layout: Layout,
    block: Array,
    before: int,
    *,
    spec: RowSpec,
    tile: _Tile,
) -> None:
    """Stores a block of the columns of a weight, or of a gate and its factor, after the `before` columns of others."""
    n, width = ref["x"].shape
    dtype, out = ref["x"].dtype, weights[0].values.shape[0]
    rows, outs = jnp.arange(tile.block_rows), block * tile.block_out + jnp.arange(tile.block_out)
    # rows and outputs past the last one read the last one, so that loads need no mask for them
    own_rows, own_outs = jnp.minimum(rows, n - 1), jnp.minimum(outs, out - 1)
    part = jnp.arange(tile.num_warps)
    factor = unit(weights[0].values.dtype, dtype, tile.fp8_by_bits)
    sums_x = any(one.scales is not None and products.has_offset(one, dtype) for one in weights)

    def scales_of(weight: _Weight, at: tuple[Array, ...]) -> tuple[Array, Array | None]:
        """(scales, what the sum of x is multiplied by)"""
        scales = load(weight.scales.at[at]).astype(jnp.float32)
        return (scales * factor if factor != 1.0 else scales), weight.offsets(dtype, at, scales)

    def piece(start, carry, *, edge: bool):
        """Adds the products of the stored columns from start[part] on."""
        sums, ones, squares = carry
        stored = start[:, None] + jnp.arange(layout.piece)
        inside = stored < layout.stored if edge else None

        def tile_of(ref, at, column):
            at = at[None, :, None], column[:, None, :]
            if inside is None:
                return load(ref.at[at])
            mask = jnp.broadcast_to(inside[:, None, :], (tile.num_warps, at[0].shape[1], layout.piece))
            return load(ref.at[at], mask=mask, other=0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0)

        column, group = stored, None
        if layout.grouped:
            group = lax.div(start, jnp.int32(layout.span))
            column = stored + group[:, None] * layout.span if layout.halves == 2 else stored
        xs = []
        for half in range(layout.halves):
            own = column + half * layout.span
            x = tile_of(ref["x"], own_rows, own)
            if spec.eps is not None:
                wide = x.astype(jnp.float32)
                scale = load(ref["scale"].at[own], mask=inside, other=None if inside is None else 0.0)
                scaled = wide * (scale.astype(jnp.float32) + spec.plus)[:, None, :]
                x = rounded_half_up(scaled) if tile.round_half_up else scaled.astype(dtype)
                squares = fma(wide, wide, squares)
            xs.append(x)

        def product(numbers: Sequence[Array]) -> Array:
            return functools.reduce(jnp.add, map(dot_of_parts, numbers, xs))

        of_ones = None
        if sums_x:  # a product too, since its result has the place of the others'
            of_ones = product([jnp.ones((tile.num_warps, tile.block_out, layout.piece), dtype)] * layout.halves)
            ones = ones if layout.grouped else ones + of_ones
        for i, weight in enumerate(weights):
            numbers = (tile_of(weight.values, own_outs, stored),)
            if weight.scales is not None:
                numbers = widened(*numbers, dtype=dtype, fp8_by_bits=tile.fp8_by_bits, nan=True, words=True)
            total = product(numbers)
            if group is None:
                sums[i] = sums[i] + total
                continue
            assert weight.scales is not None
            # a piece past the last column adds nothing
            own_group = jnp.minimum(group, weight.scales.shape[1] - 1) if edge else group
            scales, offsets = scales_of(weight, (own_outs[None, :], own_group[:, None]))
            sums[i] = fma(total, scales[:, :, None], sums[i])
            if offsets is not None:
                sums[i] = fma(of_ones, offsets[:, :, None], sums[i])
        return sums, ones, squares

    def step(t, carry, *, edge: bool):
        for i in range(layout.tile // layout.piece):
            start = (t * tile.num_warps + part) * layout.tile + i * layout.piece
            carry = piece(start, (list(carry[0]), *carry[1:]), edge=edge)
        return carry

    zeros = jnp.zeros((tile.num_warps, tile.block_out, tile.block_rows), jnp.float32)
    squares = None
    if spec.eps is not None:
        squares = jnp.zeros((tile.num_warps, tile.block_rows, layout.piece), jnp.float32)
    carry = [zeros for _ in weights], zeros if sums_x and not layout.grouped else None, squares
    columns = tile.num_warps * layout.tile
    num_whole = layout.stored // columns
    carry = lax.fori_loop(0, num_whole, functools.partial(step, edge=False), carry)
    sums, ones, squares = step(num_whole, carry, edge=True) if layout.stored % columns else carry
    found = [total.sum(0) for total in sums]
    for i, weight in enumerate(weights):
        if weight.scales is None or layout.grouped:
            continue
        scales, offsets = scales_of(weight, (own_outs, jnp.zeros_like(own_outs)))
        found[i] = found[i] * scales[:, None]
        if offsets is not None:
            found[i] = fma(ones.sum(0), offsets[:, None], found[i])
    if squares is not None:
        norm = lax.rsqrt(squares.sum(2).sum(0) * (1.0 / width) + spec.eps)
        found = [total * norm[None, :] for total in found]
    for i, weight in enumerate(weights):
        if weight.bias is not None:
            found[i] = found[i] + load(weight.bias.at[own_outs]).astype(jnp.float32)[:, None]
    y = found[0]
    if spec.activation:
        y = functools.reduce(jnp.multiply, found[1:], ACTIVATIONS[spec.activation](y))
    if "residual" in ref:
        y = y + load(ref["residual"].at[own_rows[None, :], before + own_outs[:, None]]).astype(jnp.float32)
    inside = (outs < out)[:, None] & (rows < n)[None, :]
    store(o_ref.at[rows[None, :], before + outs[:, None]], y.astype(o_ref.dtype), mask=inside)
