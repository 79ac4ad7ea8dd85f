"""Rotates new queries and keys and writes keys and values into a cache, as a Pallas-Triton kernel.

One program rotates the query heads of a group and their key head of one token, quantizes the key and the value where
the cache is quantized, and stores them at the token's slot, in place. XLA takes a launch for the rotation, one for each
array of the cache, and several more to quantize.

Numbers and scales are those of quant.quantize, bit by bit, where its division is rounded correctly: XLA on a CPU, which
multiplies with a reciprocal, sometimes misses a tie. Tested in tests/jfa/test_write.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jfa import quant
from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton.tile import MAX_HEAD_DIM, MIN_HEAD_DIM
from jfa.types import DeviceInfo, WriteOperands

_TO_INTEGER = 1.5 * 2.0**23  # added and subtracted, it rounds to the nearest integer, ties to even
_INFINITY = 0x7F800000  # bits of float32


def why_not(operands: WriteOperands, head_dim: int, device: DeviceInfo) -> str | None:
    """The reason why the kernel does not support this call; None if it does."""
    if device.platform not in ("rocm", "cuda", "cpu"):
        return f"Triton kernels run on AMD and NVIDIA GPUs (and interpreted on the CPU), not on {device.platform}"
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, got {head_dim}"
    for x in (operands.k, operands.v):
        if x.dtype == jnp.uint8:
            return "4-bit keys are rotated once more and packed, which the kernel does not do"
        if x.dtype.itemsize == 1 and 2**31 <= x.size <= 2**32:
            # Pallas (jax 0.12) uses signed 32-bit offsets for such an array
            return "Pallas computes wrong addresses in a cache of 2 to 4 GiB with a one-byte dtype"
    return None


def rotate_and_write(operands: WriteOperands, *, head_dim: int, interpret: bool) -> tuple[Array, ...]:
    """The rotated queries [n, hq, d], then keys, values and their scales if there are any, with the new tokens."""
    n, width = operands.qkv.shape
    given = {name: x for name, x in operands._asdict().items() if x is not None}
    cache = tuple(name for name in given if name in ("k", "v", "k_scales", "v_scales"))
    names = tuple(name for name in given if name not in cache)
    hkv = operands.k.shape[1] // head_dim
    hq = width // head_dim - 2 * hkv
    out_shape = [output((n, hq, head_dim), operands.qkv.dtype, like=operands.qkv)]
    out_shape += [output(given[name].shape, given[name].dtype, like=operands.qkv) for name in cache]
    call = pl.pallas_call(
        functools.partial(_write_kernel, names=names, cache=cache, hq=hq, hkv=hkv),
        name="rotate_and_write",
        grid=(n, hkv),
        in_specs=[_whole(given[name].shape) for name in (*names, *cache)],
        out_specs=[_whole(x.shape) for x in out_shape],
        out_shape=out_shape,
        input_output_aliases={len(names) + i: 1 + i for i in range(len(cache))},
        compiler_params=CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        return tuple(call(*(given[name] for name in (*names, *cache))))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *grid: (0,) * len(shape))


class _Part(NamedTuple):
    """Some columns of heads."""

    x: Array  # [heads, size], in the dtype of the inputs; 0 past the last column
    columns: Array  # [1, size], in a head
    inside: Array  # bool[heads, size]


def _write_kernel(
    *refs,  # the arguments by `names`, the cache by `cache`; then q [n, hq, d], and the cache again, in place
    names: tuple[str, ...],
    cache: tuple[str, ...],
    hq: int,
    hkv: int,
):
    ref = dict(zip(names, refs[: len(names)], strict=True))
    q_ref, *written = refs[len(names) + len(cache) :]
    held = dict(zip(cache, written, strict=True))
    token, kv_head, d = pl.program_id(0), pl.program_id(1), q_ref.shape[2]
    group = hq // hkv
    half = ref["cos"].shape[1]

    def part(heads, own, first: int, end: int) -> _Part:
        columns = first + jnp.arange(pl.next_power_of_2(end - first))[None, :]
        inside = jnp.broadcast_to(own[:, None] & (columns < end), (own.shape[0], columns.shape[1]))
        return _Part(load(ref["qkv"].at[token, heads[:, None] * d + columns], mask=inside, other=0.0), columns, inside)

    def rotated(heads, own) -> list[_Part]:
        """Columns [0, half), [half, 2 half) and the others, which are not rotated."""
        first, second = part(heads, own, 0, half), part(heads, own, half, 2 * half)
        angle = first.columns[0]
        cos, sin = (load(ref[name].at[token, angle], mask=angle < half, other=0.0)[None, :] for name in ("cos", "sin"))
        a, b = first.x.astype(jnp.float32), second.x.astype(jnp.float32)
        parts = [first._replace(x=(a * cos - b * sin).astype(first.x.dtype))]
        parts.append(second._replace(x=(b * cos + a * sin).astype(first.x.dtype)))
        return parts + ([part(heads, own, 2 * half, d)] if 2 * half < d else [])

    member = jnp.arange(pl.next_power_of_2(group))
    for x, columns, inside in rotated(kv_head * group + member, member < group):
        store(q_ref.at[token, (kv_head * group + member)[:, None], columns], x, mask=inside)

    slot = ref["slots"][token]
    is_held = (slot >= 0) & (slot < held["k"].shape[0])
    one = jnp.arange(1)
    keys, values = rotated(hq + kv_head + one, one == 0), [part(hq + hkv + kv_head + one, one == 0, 0, d)]
    for name, parts in (("k", keys), ("v", values)):
        to, scale = held[name], None
        if f"{name}_scales" in held:
            scale = _scale(parts, quant.kind_of(to.dtype))
            store(held[f"{name}_scales"].at[slot, kv_head + one], scale.astype(jnp.bfloat16), mask=is_held & (one == 0))
        for x, columns, inside in parts:
            number = x.astype(to.dtype) if scale is None else _numbers(x, scale, to.dtype)
            store(to.at[slot, kv_head * d + columns], number, mask=inside & is_held)


def _scale(parts: list[_Part], kind: str) -> Array:
    """f32[1], exact in bfloat16."""
    dtype, (_, largest) = parts[0].x.dtype, quant.KINDS[kind]
    # of numbers that are not negative, bits have the same order, and those of NaN are above infinity's
    bits = [lax.bitcast_convert_type(jnp.abs(part.x.astype(jnp.float32)), jnp.int32).max(1) for part in parts]
    top = lax.bitcast_convert_type(functools.reduce(jnp.maximum, bits), jnp.float32)
    scale = (top / largest).astype(jnp.bfloat16).astype(jnp.float32)
    is_finite = lax.bitcast_convert_type(scale, jnp.int32) < _INFINITY
    return jnp.where(is_finite, jnp.minimum(scale, quant.largest_scale(dtype, kind)), jnp.nan)


def _numbers(x: Array, scale: Array, dtype: Any) -> Array:
    """x / scale, rounded to int8 or float8_e4m3fn."""
    largest = quant.KINDS[quant.kind_of(dtype)][1]
    x = x.astype(jnp.float32) / jnp.where(scale == 0.0, 1.0, scale)[:, None]
    x = jnp.minimum(jnp.maximum(x, -largest), largest)
    if dtype == jnp.int8:
        return ((x + _TO_INTEGER) - _TO_INTEGER).astype(jnp.int32).astype(jnp.int8)
    return _fp8(x)


def _fp8(x: Array) -> Array:
    """float8_e4m3fn by integer operations, which all GPUs have: 4 bits of exponent and 3 of mantissa, ties to even."""
    size = jnp.abs(x)
    bits = lax.bitcast_convert_type(size, jnp.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = ((size * 2.0**9 + _TO_INTEGER) - _TO_INTEGER).astype(jnp.int32)  # in units of the smallest number
    sign = (lax.bitcast_convert_type(x, jnp.int32) >> 24) & 0x80
    codes = jnp.where(size < 2.0**-6, small, normal) | sign
    return lax.bitcast_convert_type(codes.astype(jnp.uint8), jnp.float8_e4m3fn)
