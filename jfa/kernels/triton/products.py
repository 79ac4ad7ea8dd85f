"""Products with quantized weights as a Pallas-Triton kernel, for AMD and NVIDIA GPUs.

One program computes a tile of the output, [block_rows, block_out], from its part of the columns, block_in at a time.
The stored numbers are cast in registers and multiplied as they are; scales, zero points and minima are applied to the
float32 sums, one piece of columns with common scales at a time:

    sum over pieces of  scale * (x number^T)  +  (sum of x) * (minimum - scale * zero)

The sums of x are computed outside of the kernel. A piece is a group or a part of one; the whole row, if there are no
groups. 4-bit numbers are two pieces of x by the low and the high halves of the same bytes, never interleaved.

With few rows the time is that of reading the weight. Several programs then split the columns, to keep the device busy;
their results are float32 and are added outside of the kernel, in a fixed order.

With spec.rounds_inputs the rows are int8, and each piece is a product of integers.

Sources: arXiv:2210.17323 (groups); arXiv:2402.00025, section 3 (splitting the columns). Tested in
tests/jfa/test_products.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jfa import quant
from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, dot, load, pl, store
from jfa.kernels.triton._primitives import fma
from jfa.kernels.triton.casts import bias, offset, unit, widened
from jfa.kernels.triton.tile import kind_of
from jfa.types import DeviceInfo, ProductConfig, ProductOperands, ProductSpec

FEW_ROWS = 16  # up to one tile of the smallest matrix instruction: the time is that of reading the weight

# (block_rows, block_out, block_in, num_warps), for few and for many rows
_SAFE = {
    ("cdna", "16 bits"): ((16, 32, 128, 1), (64, 64, 64, 4)),
    ("cdna", "float32"): ((16, 32, 64, 4), (32, 32, 32, 4)),
    ("rdna", "16 bits"): ((16, 32, 64, 1), (64, 64, 32, 4)),
    ("rdna", "float32"): ((16, 32, 32, 4), (32, 32, 32, 4)),
    ("cuda", "16 bits"): ((16, 64, 64, 4), (64, 64, 64, 4)),
    ("cuda", "float32"): ((16, 32, 32, 4), (32, 32, 32, 4)),
}

_SMALLEST_DOT = 16  # columns of a matrix instruction
_WAVES_PER_UNIT = 8  # waves hide each other's load latency
_SHORTEST_SPLIT = 256  # columns; fewer take less time than starting a program
_PARTIAL_SHARE = 4  # partial results are at most this fraction (1 / 4) of the weight's bytes

# architectures with an instruction that casts float8_e4m3fn
_WITH_FP8_CASTS = ("gfx950", "gfx12", "sm_89", "sm_9", "sm_1")


def default_config(operands: ProductOperands, device: DeviceInfo) -> ProductConfig:
    """Tile sizes without spills on all tested architectures of this kind; tuning tables have better ones."""
    kind = kind_of(device)
    few, many = _SAFE[kind, "float32" if operands.x.dtype == jnp.float32 else "16 bits"]
    block_rows, block_out, block_in, num_warps = few if operands.x.shape[0] <= FEW_ROWS else many
    return ProductConfig(
        block_rows=block_rows,
        block_out=block_out,
        block_in=block_in,
        num_warps=num_warps,
        num_stages=2 if kind == "cuda" else 1,  # pipelining on AMD uses registers that the tile needs
    )


def why_not(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    group, least = spec.group_size, _SMALLEST_DOT * _halves(operands)
    if group is not None and group < operands.x.shape[1] and (group < least or group & (group - 1)):
        return f"group_size must be a power of two of at least {least}, or the width of the weight, got {group}"
    if spec.rounds_inputs > 1:
        return "inputs are rounded to one int8 number per element; rounds_inputs=2 is for CPUs"
    if operands.zeros is not None and not jnp.issubdtype(operands.zeros.dtype, jnp.integer):
        return f"zero points must be integers, got {operands.zeros.dtype}"
    if 2**31 <= operands.values.size <= 2**32:
        # Pallas (jax 0.12) uses signed 32-bit offsets for such an array
        return "Pallas computes wrong addresses in a weight of 2 to 4 GiB; split it along `out`"
    return None


def name(operands: ProductOperands) -> str:
    """The name of the Pallas call and of its tuning table."""
    return "quantized_matmul_few_rows" if operands.x.shape[0] <= FEW_ROWS else "quantized_matmul"


def fp8_by_bits(device: DeviceInfo) -> bool:
    """Whether float8_e4m3fn is cast by integer operations, since the device has no instruction for it."""
    return not device.arch.startswith(_WITH_FP8_CASTS)


def num_splits(operands: ProductOperands, config: ProductConfig, device: DeviceInfo) -> int:
    """The number of programs that split the columns: enough to keep the device busy; 1 for many rows."""
    if config.num_splits is not None:
        return config.num_splits
    n, columns = operands.x.shape
    out, stored = operands.values.shape
    wanted = device.compute_units * max(1, _WAVES_PER_UNIT // config.num_warps)
    programs = pl.cdiv(n, config.block_rows) * pl.cdiv(out, config.block_out)
    bytes_of_partials = 8 * n  # per output column, written and read in float32
    return max(1, min(wanted // programs, columns // _SHORTEST_SPLIT, stored // (_PARTIAL_SHARE * bytes_of_partials)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the stored columns of a weight are walked: in tiles, each of one or more pieces with common scales."""

    stored: int  # columns of values
    halves: int  # numbers per stored column
    span: int  # stored columns of a group; without groups, all
    tile: int  # stored columns per iteration, a power of two
    piece: int  # stored columns of a product, a power of two

    @property
    def grouped(self) -> bool:
        return self.span < self.stored

    @property
    def num_tiles(self) -> int:
        return pl.cdiv(self.stored, self.tile)

    @property
    def num_whole(self) -> int:
        """Tiles without columns past the last one."""
        return self.stored // self.tile

    def tiles_per_split(self, num_splits: int) -> int:
        return pl.cdiv(self.num_tiles, num_splits)


def _halves(operands: ProductOperands) -> int:
    return 2 if operands.values.dtype == jnp.uint8 else 1


def _layout(operands: ProductOperands, spec: ProductSpec, config: ProductConfig) -> Layout:
    halves, stored = _halves(operands), operands.values.shape[1]
    tile = max(_SMALLEST_DOT, config.block_in // halves)
    span = stored if spec.group_size is None else min(stored, spec.group_size // halves)
    return Layout(stored=stored, halves=halves, span=span, tile=tile, piece=min(tile, span) if span < stored else tile)


def quantized_matmul(
    operands: ProductOperands,
    *,
    spec: ProductSpec,
    config: ProductConfig,
    num_splits: int,
    fp8_by_bits: bool,
    interpret: bool,
) -> Float[Array, "n out"]:
    """x weight^T in the dtype of x, as reference.quantized_matmul defines it.

    Args:
      num_splits: number of programs that split the columns.
      fp8_by_bits: cast float8_e4m3fn by integer operations.
    """
    n, out = operands.x.shape[0], operands.values.shape[0]
    layout = _layout(operands, spec, config)
    # programs that read the same part of the weight follow each other
    grid = pl.cdiv(n, config.block_rows), pl.cdiv(out, config.block_out), num_splits
    arrays: dict[str, Any] = {"x": operands.x, "values": operands.values}
    if spec.rounds_inputs:
        [arrays["x"]], [arrays["x_scales"]] = quant.rounded_rows(operands.x, terms=1)
    for key in ("scales", "zeros", "minima"):
        if (found := getattr(operands, key)) is not None:
            arrays[key] = found.reshape(out, -1)
    if has_offset(operands, arrays["x"].dtype):
        arrays["sums"] = _sums(arrays["x"], layout, num_splits, grid[0] * config.block_rows)
    shape = (n, out) if num_splits == 1 else (num_splits, n, out)
    dtype = operands.x.dtype if num_splits == 1 else jnp.float32
    call = pl.pallas_call(
        functools.partial(
            _product_kernel,
            names=tuple(arrays),
            layout=layout,
            config=config,
            fp8_by_bits=fp8_by_bits,
        ),
        name=name(operands),
        grid=grid,
        in_specs=[_whole(x.shape) for x in arrays.values()],
        out_specs=_whole(shape),
        out_shape=output(shape, dtype, like=operands.x),
        compiler_params=CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        found = call(*arrays.values())
    return found if num_splits == 1 else found.sum(0).astype(operands.x.dtype)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *grid: (0,) * len(shape))


def has_offset(operands: Any, dtype: Any) -> bool:
    """Whether casts.offset has something to multiply with the sum of x; operands: with values, zeros and minima."""
    return operands.zeros is not None or operands.minima is not None or bias(operands.values.dtype, dtype) != 0.0


def _sums(x: Array, layout: Layout, num_splits: int, rows: int) -> Float[Array, "parts rows"]:
    """The sums of x over the columns of each piece; without groups, of each program's columns.

    Zeros are added up to a number of rows that is a whole number of tiles.
    """
    n = x.shape[0]
    x = jnp.pad(x.astype(jnp.float32), ((0, rows - n), (0, 0)))
    if layout.grouped:
        # up to whole groups and, for the pieces of the last tile that are past the last column, whole tiles
        groups = pl.cdiv(max(layout.stored, layout.num_tiles * layout.tile), layout.span)
        x = jnp.pad(x, ((0, 0), (0, groups * layout.span * layout.halves - x.shape[1])))
        return x.reshape(rows, groups, layout.halves, -1, layout.piece).sum((2, 4)).reshape(rows, -1).T
    columns = layout.tiles_per_split(num_splits) * layout.tile
    x = x.reshape(rows, layout.halves, layout.stored)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, num_splits * columns - layout.stored)))
    return x.reshape(rows, layout.halves, num_splits, columns).sum((1, 3)).T


def _product_kernel(
    *refs,  # the arguments by `names`, then the output [n, out], or [splits, n, out]
    names: tuple[str, ...],
    layout: Layout,
    config: ProductConfig,
    fp8_by_bits: bool,
):
    *inputs, o_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    x_ref, values_ref = ref["x"], ref["values"]
    n, out = x_ref.shape[0], values_ref.shape[0]
    row_tile, out_tile, split = (pl.program_id(axis) for axis in range(3))
    rows = row_tile * config.block_rows + jnp.arange(config.block_rows)
    outs = out_tile * config.block_out + jnp.arange(config.block_out)
    # rows and outputs past the last one read the last one, so that no load in the loop needs a mask for them
    own_rows, own_outs = jnp.minimum(rows, n - 1), jnp.minimum(outs, out - 1)
    integers = x_ref.dtype == jnp.int8
    sums_dtype = jnp.int32 if integers and not layout.grouped else jnp.float32

    def product(start, *, edge: bool) -> Array:
        """The product of x and the stored numbers of the piece that starts at a stored column."""
        stored = start + jnp.arange(layout.piece)
        inside = stored < layout.stored if edge else None

        def tile_of(ref, at, column):
            mask = None if inside is None else jnp.broadcast_to(inside[None, :], (at.shape[0], layout.piece))
            zero = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
            return load(ref.at[at[:, None], column[None, :]], mask=mask, other=None if mask is None else zero)

        found = tile_of(values_ref, own_outs, stored)
        numbers = (
            (found,) if integers else widened(found, dtype=x_ref.dtype, fp8_by_bits=fp8_by_bits, nan=True, words=True)
        )
        columns = stored
        if layout.halves == 2 and layout.grouped:
            columns = stored + lax.div(start, jnp.int32(layout.span)) * layout.span
        total = None
        for half, number in enumerate(numbers):
            part = _dot(number, tile_of(x_ref, own_rows, columns + half * layout.span))
            total = part if total is None else total + part
        assert total is not None
        return total

    def scaled(total: Array, acc: Array, group, part) -> Array:
        """acc plus a piece's product times its scales, and with its offsets. part: of the sums of x."""
        scales = load(ref["scales"].at[own_outs, group]).astype(jnp.float32)
        of_groups = (load(ref[name].at[own_outs, group]) if name in ref else None for name in ("zeros", "minima"))
        offsets = offset(values_ref.dtype, x_ref.dtype, scales, *of_groups)
        factor = unit(values_ref.dtype, x_ref.dtype, fp8_by_bits)
        acc = fma(total.astype(jnp.float32), (scales * factor if factor != 1.0 else scales)[:, None], acc)
        if offsets is None:
            return acc
        return fma(load(ref["sums"].at[part, rows])[None, :], offsets[:, None], acc)

    def tile(t, acc, *, edge: bool):
        for i in range(layout.tile // layout.piece):
            start = t * layout.tile + i * layout.piece
            total = product(start, edge=edge)
            if layout.grouped:
                group = lax.div(start, jnp.int32(layout.span))
                if edge:  # a piece past the last column adds nothing
                    group = jnp.minimum(group, ref["scales"].shape[1] - 1)
                acc = scaled(total, acc, group, lax.div(start, jnp.int32(layout.piece)))
            else:
                acc = acc + total
        return acc

    each = layout.tiles_per_split(1 if o_ref.ndim == 2 else o_ref.shape[0])
    first = split * each
    acc = jnp.zeros((config.block_out, config.block_rows), sums_dtype)
    end = jnp.minimum(first + each, layout.num_whole)
    acc = lax.fori_loop(first, end, functools.partial(tile, edge=False), acc)
    if layout.num_tiles > layout.num_whole:
        beyond = jnp.minimum(first + each, layout.num_tiles)
        acc = lax.fori_loop(jnp.maximum(first, layout.num_whole), beyond, functools.partial(tile, edge=True), acc)
    if not layout.grouped:
        acc = scaled(acc, jnp.zeros(acc.shape, jnp.float32), 0, split)
    if "x_scales" in ref:
        acc = acc * load(ref["x_scales"].at[own_rows, 0])[None, :]
    before = () if o_ref.ndim == 2 else (split,)
    inside = (outs < out)[:, None] & (rows < n)[None, :]
    store(o_ref.at[(*before, rows[None, :], outs[:, None])], acc.astype(o_ref.dtype), mask=inside)


def _dot(numbers: Array, x: Array) -> Float[Array, "out rows"] | Int[Array, "out rows"]:
    """numbers x^T with float32 or int32 sums; float32 inputs are not rounded to tf32."""
    return dot(numbers, x, trans_b=True, precision="highest" if x.dtype == jnp.float32 else None)
