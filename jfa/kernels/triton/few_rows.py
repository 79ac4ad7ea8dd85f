"""Products of a few rows with float weights, and what a decode step does around them, as one Pallas-Triton kernel.

A program computes block_out columns of the output. Its waves divide the columns of the weights: each multiplies its own
part of x, and the float32 sums of the parts are added on chip. So also a weight of few rows keeps the device busy, and
no partial results are written to memory, for whose addition XLA takes one more launch.

Around the product, in float32: x is normalized, after the product, by the root mean square of its row; a bias is added;
an activation is applied, whose result is multiplied by a second product (a gated MLP); the residual is added. Weights
that share x, as those of queries, keys and values do, stay where they are: a program reads one of them.

The time is that of reading the weights. Sources: arXiv:2402.00025, section 3 (dividing the columns), arXiv:2002.05202
(gated MLPs). Tested in tests/jfa/test_row_ops.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import dot_of_parts, exp2, fma
from jfa.kernels.triton.casts import rounded_half_up
from jfa.kernels.triton.tile import kind_of
from jfa.types import DeviceInfo, RowOperands, RowSpec

MAX_ROWS = 32  # with more, x would be read several times as often as the weights

_MAX_NORMALIZED = 16  # of these; normalizing more takes as long as reading the weights, and spills on RDNA
_BLOCK_OUT = 16
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
    n, dtype = operands.x.shape[0], operands.x.dtype
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    largest = MAX_ROWS if spec.eps is None else _MAX_NORMALIZED
    if not 0 < n <= largest:
        return f"it is for 1 to {largest} rows, got {n}"
    if not all(math.prod(weight.shape) for weight in operands.weights):
        return "a product without columns, or weights without rows"
    if dtype not in (jnp.bfloat16, jnp.float16) or any(weight.dtype != dtype for weight in operands.weights):
        return f"x and weights must be bfloat16 or float16, all the same, got {dtype} and {operands.weights[0].dtype}"
    if spec.eps is not None and dtype != jnp.bfloat16:
        return f"x is multiplied before its norm is known, which may be too large for {dtype}"
    if spec.activation not in (None, *ACTIVATIONS):
        return f"it has the activations {', '.join(ACTIVATIONS)}, not {spec.activation}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
    """Of a program: num_warps waves, each with block_in columns of the weights at a time."""

    block_rows: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    round_half_up: bool  # what is normalized, to bfloat16

    @property
    def columns(self) -> int:
        return self.num_warps * self.block_in


def _tile(operands: RowOperands, spec: RowSpec, device: DeviceInfo) -> _Tile:
    n, columns = operands.x.shape
    block_rows = 16 if n <= 16 else 32
    num_warps = min(_MAX_WARPS, pl.next_power_of_2(pl.cdiv(columns, _BLOCK_IN)))
    num_weights = len(operands.weights) if spec.activation else 1
    stage = num_warps * _BLOCK_IN * (block_rows + num_weights * _BLOCK_OUT) * operands.x.dtype.itemsize
    # two stages, of which one is in registers on AMD; NVIDIA has both in shared memory, and room for some sums
    is_deep = kind_of(device) == "cuda" and 2 * stage + _BYTES_OF_SUMS <= device.lds_bytes
    return _Tile(
        block_rows=block_rows,
        block_out=_BLOCK_OUT,
        block_in=_BLOCK_IN,
        num_warps=num_warps,
        num_stages=3 if is_deep else 2,
        round_half_up=not device.arch.startswith(_WITH_BF16_CASTS),
    )


def matmul_few_rows(
    operands: RowOperands, *, spec: RowSpec, device: DeviceInfo, interpret: bool
) -> Float[Array, "n sum_of_out"]:
    """What row_ops.matmul_few_rows defines, in the dtype of x."""
    n, tile = operands.x.shape[0], _tile(operands, spec, device)
    arrays = {"x": operands.x, "scale": operands.scale, "residual": operands.residual}
    arrays |= {f"weight_{i}": weight for i, weight in enumerate(operands.weights)}
    arrays |= {f"bias_{i}": bias for i, bias in enumerate(operands.biases)}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    outs = [weight.shape[0] for weight in operands.weights[: 1 if spec.activation else None]]
    call = pl.pallas_call(
        functools.partial(_kernel, names=tuple(arrays), outs=tuple(outs), spec=spec, tile=tile),
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
    outs: tuple[int, ...],
    spec: RowSpec,
    tile: _Tile,
):
    *inputs, o_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    num_weights = sum(name.startswith("weight_") for name in names)
    if spec.activation:
        _columns_of(ref, o_ref, tuple(range(num_weights)), pl.program_id(0), 0, spec=spec, tile=tile)
        return
    first, before = 0, 0
    for i, out in enumerate(outs):
        here = functools.partial(_columns_of, ref, o_ref, (i,), pl.program_id(0) - first, before, spec=spec, tile=tile)
        first, before = first + pl.cdiv(out, tile.block_out), before + out
        if len(outs) == 1:
            here()
        else:
            pl.when((pl.program_id(0) >= first - pl.cdiv(out, tile.block_out)) & (pl.program_id(0) < first))(here)


def _columns_of(
    ref: dict, o_ref, weights: tuple[int, ...], block: Array, before: int, *, spec: RowSpec, tile: _Tile
) -> None:
    """Stores a block of the columns of a weight, or of a gate and its factor, after the `before` columns of others."""
    n, columns = ref["x"].shape
    out = ref[f"weight_{weights[0]}"].shape[0]
    rows, outs = jnp.arange(tile.block_rows), block * tile.block_out + jnp.arange(tile.block_out)
    # rows and outputs past the last one read the last one, so that loads need no mask for them
    own_rows, own_outs = jnp.minimum(rows, n - 1), jnp.minimum(outs, out - 1)
    part = jnp.arange(tile.num_warps)

    def step(t, carry, *, edge: bool):
        column = (t * tile.num_warps + part)[:, None] * tile.block_in + jnp.arange(tile.block_in)
        inside = column < columns if edge else None

        def tile_of(ref, at):
            mask = None
            if inside is not None:
                mask = jnp.broadcast_to(inside[:, None, :], (tile.num_warps, at.shape[0], tile.block_in))
            return load(ref.at[at[None, :, None], column[:, None, :]], mask=mask, other=None if mask is None else 0.0)

        sums, squares = carry
        x = tile_of(ref["x"], own_rows)
        if spec.eps is not None:
            wide = x.astype(jnp.float32)
            scale = load(ref["scale"].at[column], mask=inside, other=None if inside is None else 0.0)
            wide_scaled = wide * (scale.astype(jnp.float32) + spec.plus)[:, None, :]
            x = rounded_half_up(wide_scaled) if tile.round_half_up else wide_scaled.astype(x.dtype)
            squares = fma(wide, wide, squares)
        products = [dot_of_parts(tile_of(ref[f"weight_{i}"], own_outs), x) for i in weights]
        return [total + product for total, product in zip(sums, products, strict=True)], squares

    squares = None
    if spec.eps is not None:
        squares = jnp.zeros((tile.num_warps, tile.block_rows, tile.block_in), jnp.float32)
    carry = [jnp.zeros((tile.num_warps, tile.block_out, tile.block_rows), jnp.float32) for _ in weights], squares
    num_whole = columns // tile.columns
    carry = lax.fori_loop(0, num_whole, functools.partial(step, edge=False), carry)
    sums, squares = step(num_whole, carry, edge=True) if columns % tile.columns else carry
    found = [total.sum(0) for total in sums]
    if squares is not None:
        norm = lax.rsqrt(squares.sum(2).sum(0) * (1.0 / columns) + spec.eps)
        found = [total * norm[None, :] for total in found]
    for i, number in enumerate(weights):
        if f"bias_{number}" in ref:
            found[i] = found[i] + load(ref[f"bias_{number}"].at[own_outs]).astype(jnp.float32)[:, None]
    y = found[0]
    if spec.activation:
        y = functools.reduce(jnp.multiply, found[1:], ACTIVATIONS[spec.activation](y))
    if "residual" in ref:
        y = y + load(ref["residual"].at[own_rows[None, :], before + own_outs[:, None]]).astype(jnp.float32)
    inside = (outs < out)[:, None] & (rows < n)[None, :]
    store(o_ref.at[rows[None, :], before + outs[:, None]], y.astype(o_ref.dtype), mask=inside)
