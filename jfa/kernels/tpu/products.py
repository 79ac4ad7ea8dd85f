"""Products with quantized weights as a Mosaic kernel, for TPUs.

One program computes a tile of the output, [block_rows, block_out], and its grid steps over the columns, block_in at a
time, with float32 sums in VMEM. The stored numbers are cast to the dtype of x in VMEM, which is exact, and multiplied
as they are. Scales, zero points and minima are applied to the sums of each group:

    sum over groups of  scale * (x number^T)  +  (sum of x) * (minimum - scale * zero)

A piece is what is multiplied at once: a group, or a whole row of lanes that has several groups. Then the rows of x are
repeated for each group of the piece, with zeros in the columns of the others, so that one product has the sums of all.
4-bit numbers are unpacked into the low halves of a piece's groups and then the high ones, and the columns of x are in
the same order.

Sources: arXiv:2210.17323 (groups). Tested in tests/jfa/test_tpu.py and by bench/proof/prove.py.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.tpu import tile
from jfa.kernels.tpu._pallas import pl, pltpu
from jfa.kernels.tpu.tile import LANES
from jfa.types import DeviceInfo, ProductOperands, ProductSpec, TpuProductConfig

FEW_ROWS = 16  # up to one tile of 16-bit rows: the time is that of reading the weight

# Tiles, largest first: the first that fits is used.
_FEW = ((16, 512, 2048), (16, 256, 1024), (16, 128, 256))
_MANY = ((512, 512, 1024), (256, 512, 1024), (256, 256, 512), (128, 128, 256))

# Rows of x, each repeated for each group of a piece, up to which the matrix unit has time for this.
_MOST_REPEATED = 512

_LEVELS_ZERO = 7.5  # of 4-bit numbers without zero points and minima


def default_config(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> TpuProductConfig:
    """The first tiles that fit into the device's VMEM."""
    tiles = _FEW if operands.x.shape[0] <= FEW_ROWS else _MANY
    fitting = [
        TpuProductConfig(block_rows=block_rows, block_out=block_out, block_in=block_in)
        for block_rows, block_out, block_in in tiles
    ]
    budget = tile.budget(device)
    return next((one for one in fitting if vmem_bytes(operands, spec, one) <= budget), fitting[-1])


def why_not(operands: ProductOperands, spec: ProductSpec, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    x, group = operands.x, spec.group_size
    for name, found in (("x", x), ("the weight", operands.values)):
        if not all(isinstance(n, int) for n in found.shape):
            return f"a kernel's grid has a static size, but {name} has the symbolic shape {found.shape}"
    if reason := tile.why_not_device(device) or tile.why_not_dtypes(x):
        return reason
    if spec.rounds_inputs:
        return "the TPU kernel does not round inputs"
    if group is not None and group < x.shape[1] and (group < 16 or group & (group - 1)):
        return f"group_size must be a power of two of at least 16, or the width of the weight, got {group}"
    repeated = max(1, LANES // (group or LANES))
    if repeated > 1 and repeated * x.shape[0] > _MOST_REPEATED:
        return (
            f"groups of {group} fill 1 / {repeated} of the matrix unit, which takes longer with {x.shape[0]} rows than "
            "to dequantize the weight"
        )
    if device.platform == "tpu" and operands.values.shape[1] % LANES:
        return (
            f"rows of {operands.values.shape[1]} bytes are not a multiple of {LANES}: XLA would copy the weight before "
            "each product, to store it by rows"
        )
    block_rows, block_out, block_in = (_FEW if x.shape[0] <= FEW_ROWS else _MANY)[-1]
    config = TpuProductConfig(block_rows=block_rows, block_out=block_out, block_in=block_in)
    needed = vmem_bytes(operands, spec, config)
    return tile.why_not_vmem(needed, device, "the smallest tiles and a row's scales")


def name(operands: ProductOperands) -> str:
    """The name of the Pallas call."""
    return "quantized_matmul_few_rows" if operands.x.shape[0] <= FEW_ROWS else "quantized_matmul"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the stored columns of a weight are walked: in tiles of one or more pieces, each of one or more groups."""

    stored: int  # columns of values
    halves: int  # numbers per stored column
    span: int  # stored columns of a group; without groups, all
    tile: int  # stored columns of a step
    rows: int  # of x in a tile
    outs: int  # rows of the weight in a tile
    integers: bool  # numbers are finite, whatever their bits
    middle: float  # what is subtracted from 4-bit numbers: float32 sums of smaller numbers are more precise
    zero: float  # of the numbers without zero points, less that

    @classmethod
    def of(cls, operands: ProductOperands, spec: ProductSpec, config: TpuProductConfig) -> "_Layout":
        halves = 2 if operands.values.dtype == jnp.uint8 else 1
        are_levels = halves == 2 and operands.zeros is None and operands.minima is None
        middle = (_LEVELS_ZERO if are_levels else 8.0) if halves == 2 and operands.x.dtype == jnp.float32 else 0.0
        out, stored = operands.values.shape
        return cls(
            stored=stored,
            halves=halves,
            span=stored if spec.group_size is None else min(stored, spec.group_size // halves),
            tile=min(stored, config.block_in // halves),
            rows=min(config.block_rows, tile.rounded(operands.x.shape[0], tile.sublanes(operands.x.dtype))),
            outs=min(config.block_out, tile.rounded(out, LANES)),
            integers=bool(jnp.issubdtype(operands.values.dtype, jnp.integer)),
            middle=middle,
            zero=(_LEVELS_ZERO if are_levels else 0.0) - middle,
        )

    @property
    def num_groups(self) -> int:
        return pl.cdiv(self.stored, self.span)

    @property
    def groups_first(self) -> bool:
        """Whether XLA stores an array [out, groups] by columns: it does, unless the groups fill whole rows of lanes."""
        return self.num_groups % LANES != 0

    @property
    def num_steps(self) -> int:
        return pl.cdiv(self.stored, self.tile)

    @property
    def natural(self) -> bool:
        """Whether the columns of a piece follow each other in x: a tile has whole groups, or numbers have no halves."""
        alike = self.span * self.halves >= LANES or self.stored % self.pieces[0].stop == 0
        return self.halves == 1 or (self.tile % self.span == 0 and alike)

    @property
    def pieces(self) -> tuple[slice, ...]:
        """Stored columns of a tile that are multiplied at once: as many as fill a row of lanes, or of one group."""
        of_group = self.tile if self.num_groups == 1 else self.span
        if self.num_steps > 1:  # no piece has columns of two long groups
            of_group = math.gcd(of_group, self.tile)
        size = min(self.tile, max(of_group, LANES // self.halves))
        return tuple(slice(start, min(start + size, self.tile)) for start in range(0, self.tile, size))


def vmem_bytes(operands: ProductOperands, spec: ProductSpec, config: TpuProductConfig) -> int:
    """Bytes of VMEM that the kernel needs, at most: blocks twice, scratch arrays, and a tile's numbers and sums."""
    layout, dtype = _Layout.of(operands, spec, config), operands.x.dtype
    stored, numbers = tile.stored_bytes, (layout.outs, layout.tile * layout.halves)
    of_groups = stored((layout.num_groups, layout.outs), jnp.float32)
    sums = stored((layout.rows, layout.outs), jnp.float32)
    parts = max(1, min(LANES // layout.halves, layout.tile) // layout.span)
    blocks = (
        stored((layout.rows, layout.tile * layout.halves), dtype)
        + stored((layout.outs, layout.tile), operands.values.dtype)
        + 2 * of_groups
        + stored((layout.rows, layout.outs), dtype)
    )
    return 2 * blocks + sums + 2 * of_groups + stored(numbers, jnp.int32) + stored(numbers, dtype) + (1 + parts) * sums


def quantized_matmul(
    operands: ProductOperands,
    *,
    spec: ProductSpec,
    config: TpuProductConfig,
    vmem_limit_bytes: int,
    interpret: Any,
) -> Float[Array, "n out"]:
    """x weight^T in the dtype of x, as reference.quantized_matmul defines it.

    Args:
      vmem_limit_bytes: VMEM that the compiler may use.
      interpret: of pallas_call: False, or pltpu.InterpretParams.

    Raises:
      ValueError: the tiles do not fit into that.
    """
    needed = vmem_bytes(operands, spec, config)
    if needed > vmem_limit_bytes:
        raise ValueError(
            f"tiles of block_rows={config.block_rows}, block_out={config.block_out}, block_in={config.block_in} need "
            f"{needed:,} bytes of VMEM, and a kernel gets {vmem_limit_bytes:,}; leave config None for tiles that fit"
        )
    layout = _Layout.of(operands, spec, config)
    n, out = operands.x.shape[0], operands.values.shape[0]
    has_offset = operands.zeros is not None or operands.minima is not None or layout.zero != 0.0

    def x_tile(i, j, step):
        return 0, i, step

    x = _in_order(operands.x, layout)

    def values_tile(i, j, step):
        return j, step

    def groups_tile(i, j, step):
        return (0, j) if layout.groups_first else (j, 0)

    def out_tile(i, j, step):
        return i, j

    arrays = {
        "x": (x, pl.BlockSpec((len(x), layout.rows, layout.tile * layout.halves // len(x)), x_tile)),
        "values": (operands.values, pl.BlockSpec((layout.outs, layout.tile), values_tile)),
    }
    for key in ("scales", "zeros", "minima"):
        if (found := getattr(operands, key)) is not None:
            of_groups, size = found.reshape(out, -1), (layout.outs, layout.num_groups)
            if layout.groups_first:
                of_groups, size = of_groups.T, size[::-1]
            arrays[key] = of_groups, pl.BlockSpec(size, groups_tile)
    call = pl.pallas_call(
        functools.partial(_product_kernel, names=tuple(arrays), layout=layout),
        name=name(operands),
        grid=(pl.cdiv(n, layout.rows), pl.cdiv(out, layout.outs), layout.num_steps),
        in_specs=[block for _, block in arrays.values()],
        out_specs=pl.BlockSpec((layout.rows, layout.outs), out_tile),
        out_shape=output((n, out), operands.x.dtype, like=operands.x),
        scratch_shapes=[
            pltpu.VMEM((layout.rows, layout.outs), jnp.float32),
            *[pltpu.VMEM((layout.num_groups, layout.outs), jnp.float32)] * (1 + has_offset),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=vmem_limit_bytes
        ),
        cost_estimate=_cost(operands),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        return call(*(array for array, _ in arrays.values()))


def _cost(operands: ProductOperands) -> pl.CostEstimate:
    n, width = operands.x.shape
    out = operands.values.shape[0]
    read = sum(x.size * x.dtype.itemsize for x in operands if x is not None)
    written = n * out * operands.x.dtype.itemsize
    return pl.CostEstimate(flops=2 * n * out * width, bytes_accessed=read + written, transcendentals=0)


def _in_order(x: Array, layout: _Layout) -> Float[Array, "sides n columns"]:
    """The columns of x in the order of a weight's numbers: of each piece, or those of each half of the bytes."""
    n, width = x.shape
    if not layout.natural:
        halves = x.reshape(n, -1, layout.halves, layout.span)
        return jnp.moveaxis(halves, 2, 0).reshape(layout.halves, n, layout.stored)
    size = layout.pieces[0].stop
    if layout.halves == 2 and layout.span < size:
        x = jnp.swapaxes(x.reshape(n, -1, size // layout.span, layout.halves, layout.span), 2, 3)
    return x.reshape(1, n, width)


def _product_kernel(
    *refs,  # the arguments by `names`: x [sides, rows, columns], values [outs, tile], scales, zeros and minima
    # [groups, outs] or [outs, groups]; the output [rows, outs]; acc f32[rows, outs], scales and perhaps offsets
    # f32[groups, outs]
    names: tuple[str, ...],
    layout: _Layout,
):
    ref = dict(zip(names, refs, strict=False))
    o_ref, acc_ref, *of_groups = refs[len(names) :]
    step, dtype = pl.program_id(2), ref["x"].dtype

    @pl.when(step == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for target, found in zip(of_groups, _of_groups(ref, layout), strict=True):
            target[...] = found

    for piece, weight in _numbers(ref["values"], layout, dtype):
        x = _joined([ref["x"][side, :, _columns(piece, layout)] for side in range(ref["x"].shape[0])])
        start = step * layout.tile + piece.start
        if layout.stored % layout.tile:  # what is past the last column may be anything, and 0 * NaN is NaN
            column = lax.rem(_iota(x.shape[1]), jnp.int32(piece.stop - piece.start))
            inside = start + column < layout.stored
            x = jnp.where(inside, x, 0)
            weight = weight if layout.integers else jnp.where(inside, weight, 0)
        first = lax.div(start, jnp.int32(layout.span))
        acc_ref[...] += _of_piece(x, weight, first, of_groups, layout)
    pl.when(step == layout.num_steps - 1)(lambda: _store(o_ref, acc_ref))


def _store(o_ref, acc_ref) -> None:
    o_ref[...] = acc_ref[...].astype(o_ref.dtype)


def _of_groups(ref, layout: _Layout) -> list[Float[Array, "groups outs"]]:
    """Scales, and what each group adds for a sum of x of 1, if it adds anything: minimum - scale * zero."""

    def found(key: str) -> Array:
        numbers = ref[key][...]
        whole = numbers.astype(jnp.int32) if jnp.issubdtype(numbers.dtype, jnp.integer) else numbers
        return whole.astype(jnp.float32) if layout.groups_first else jnp.transpose(whole.astype(jnp.float32))

    scales = found("scales")
    if "minima" in ref:
        minima = found("minima")
        return [scales, minima - scales * layout.zero if layout.zero else minima]
    if "zeros" in ref:
        return [scales, -scales * (found("zeros") + layout.zero)]
    return [scales, -scales * layout.zero] if layout.zero else [scales]


def _of_piece(x: Array, weight: Array, first, of_groups, layout: _Layout) -> Float[Array, "rows outs"]:
    """What the groups of a piece add to the output. first: the index of the first group."""
    columns = x.shape[1] // layout.halves
    count = pl.cdiv(columns, layout.span)
    if count > 1:
        group = lax.div(lax.rem(_iota(x.shape[1]), jnp.int32(columns)), jnp.int32(layout.span))
        x = jnp.concatenate([jnp.where(group == i, x, 0) for i in range(count)], axis=0)
    products = tile.product(x, weight, trans_b=True)
    sums = x.astype(jnp.float32).sum(1, keepdims=True) if len(of_groups) > 1 else None
    total = None
    for i in range(count):
        # a group past the last column has products and sums of 0
        group = pl.ds(jnp.minimum(first + i, layout.num_groups - 1), 1)
        rows = slice(i * layout.rows, (i + 1) * layout.rows)
        part = products[rows] * of_groups[0][group, :]
        if sums is not None:
            part = part + sums[rows] * of_groups[1][group, :]
        total = part if total is None else total + part
    assert total is not None
    return total


def _columns(piece: slice, layout: _Layout) -> slice:
    """The columns of a tile of x for a piece."""
    numbers = layout.halves if layout.natural else 1
    return slice(piece.start * numbers, piece.stop * numbers)


def _iota(columns: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, (1, columns), 1)


def _numbers(values_ref, layout: _Layout, dtype: Any) -> Iterator[tuple[slice, Array]]:
    """The stored numbers of each piece in dtype, less the middle; of bytes the low halves, then the high ones."""
    if layout.halves == 1:
        for piece in layout.pieces:
            yield piece, values_ref[:, piece].astype(dtype)
        return

    def numbers(words: Array) -> Array:
        found = pltpu.bitcast(words & 0x0F0F0F0F, jnp.int8).astype(dtype)
        return found - layout.middle if layout.middle else found

    pieces = iter(layout.pieces)
    for piece in pieces:
        if 2 * (piece.stop - piece.start) != LANES or layout.tile % LANES:
            words = _words(values_ref[:, piece])
            yield piece, jnp.concatenate([numbers(words), numbers(words >> 4)], axis=1)
            continue
        # two pieces in a row of lanes: each gets half of it from the other side
        other = next(pieces)
        words = _words(values_ref[:, slice(piece.start, other.stop)])
        turned, is_left = pltpu.roll(words, LANES // 2, 1), _iota(LANES) < LANES // 2
        yield piece, numbers(jnp.where(is_left, words, turned >> 4))
        yield other, numbers(jnp.where(is_left, turned, words >> 4))


def _words(values: Array) -> Array:
    """Bytes of four rows as a word: TPUs shift no bytes."""
    return pltpu.bitcast(values, jnp.int32)


def _joined(halves: list[Array]) -> Array:
    return halves[0] if len(halves) == 1 else jnp.concatenate(halves, axis=1)
