"""Operations that GPUs have and Pallas lacks, as JAX primitives.

  fma           a * b + c: XLA's compiler fuses none by itself (jax 0.11.2 to 0.12.0)
  exp2          the hardware's 2^x: XLA's handles results below the smallest normal number, by five more instructions
  widened_fp8   fp8 to bfloat16 for GPUs without an instruction: XLA's code takes twice as many
  spread        bytes as the lower halves of 16-bit numbers, two at a time
  dot_of_parts  products of several pairs of matrices, one of each wave of a program

Outside of GPU kernels, as in the interpreter on a CPU, they are computed by the JAX functions that define them here.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# there is no public way to add an operation to Pallas' Triton dialect
from jax._src.lib.triton import dialect
from jax._src.pallas.triton.lowering import lower_fun, register_lowering
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, math
from jaxtyping import Array, BFloat16, Float, Float8e4m3fn, UInt32


def fma(a: Any, b: Any, c: Any) -> Float[Array, "..."]:
    """a * b + c of float32 numbers or arrays, which are broadcast; rounded once on a GPU."""
    return _fma.bind(*jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in (a, b, c))))


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^x of a float32 array; on a GPU to about one unit in the last place, and 0 below the smallest normal number."""
    return _exp2.bind(x)


def widened_fp8(x: Float8e4m3fn[Array, "..."], *, nan: bool) -> BFloat16[Array, "..."]:
    """x in bfloat16, exactly; nan False: on a GPU NaN becomes a number, which saves an instruction or two."""
    return _widened_fp8[nan].bind(x)


def spread(x: UInt32[Array, "..."], upper: int, *, pair: int) -> UInt32[Array, "..."]:
    """Bytes 2 * pair and 2 * pair + 1 of each x as the lower bytes of two 16-bit halves; upper: their upper byte."""
    return _spread[pair].bind(x, jnp.full(x.shape, upper * 0x01000100, jnp.uint32))


def dot_of_parts(a: Float[Array, "parts m k"], b: Float[Array, "parts n k"]) -> Float[Array, "parts m n"]:
    """a[i] b[i]^T of each part in float32. With as many parts as waves, each wave of a program computes one."""
    return _dot_of_parts.bind(a, b)


def truncated(x: Float[Array, "..."]) -> BFloat16[Array, "..."]:
    """float32 numbers that are exact in bfloat16, cast to it by dropping the lower half."""
    upper = (lax.bitcast_convert_type(x, jnp.uint32) >> 16).astype(jnp.uint16)
    return lax.bitcast_convert_type(upper, jnp.bfloat16)


def _primitive(
    name: str,
    plainly: Callable[..., Array],
    on_gpu: Callable[..., Any],
    dtype: Any = jnp.float32,
    shape: Callable[..., tuple[int, ...]] = lambda x, *others: x.shape,
) -> Primitive:
    """A primitive with one result.

    plainly: the JAX function that defines it. on_gpu: (context, *values), which emits it in Pallas' Triton dialect.
    dtype, shape: of the result; the latter from the arguments.
    """
    made = Primitive(name)
    made.def_impl(jax.jit(plainly))
    made.def_abstract_eval(lambda *args: args[0].update(shape=shape(*args), dtype=jnp.dtype(dtype)))
    mlir.register_lowering(made, mlir.lower_fun(plainly, multiple_results=False))
    register_lowering(made)(on_gpu)
    return made


_fma = _primitive("fma", lambda a, b, c: a * b + c, lambda context, a, b, c: math.fma(a, b, c))

# LLVM's intrinsics for the instructions v_exp_f32 and ex2.approx.ftz.f32
_INTRINSICS = {"rocm": "llvm.amdgcn.exp2.f32", "cuda": "llvm.nvvm.ex2.approx.ftz.f32"}


def _exp2_on_gpu(context: Any, x: Any) -> Any:
    symbol = _INTRINSICS[context.context.platform]
    return dialect.extern_elementwise(x.type, [x], libname="", libpath="", symbol=symbol, pure=True)


_exp2 = _primitive("gpu_exp2", jnp.exp2, _exp2_on_gpu)


def _widened_on_gpu(x: Array, *, nan: bool) -> Array:
    # sign, exponent and mantissa in a float32's places: the exponent's bias is larger by 120. XLA's kernels on GPUs
    # multiply numbers below the smallest normal one exactly; XLA on a CPU takes them for 0
    bits = lax.bitcast_convert_type(x, jnp.int8).astype(jnp.int32) << 20
    number = lax.bitcast_convert_type(bits & jnp.int32(~0x78000000), jnp.float32) * 2.0**120
    return truncated(with_nan(number, 1.0) if nan else number)


def with_nan(x: Float[Array, "..."], unit: float) -> Float[Array, "..."]:
    """Numbers of float8_e4m3fn times unit, where NaN is the code after that of 448, as if it were 480: NaN again.

    A factor makes 480 infinite but not 448; infinity times 0 is NaN.
    """
    large = x * (float(jnp.finfo(x.dtype).max) / (464.0 * unit))
    return fma(large, 0.0, x) if x.dtype == jnp.float32 else large * 0.0 + x


def _widening(nan: bool) -> Primitive:
    return _primitive(
        "widened_fp8_with_nan" if nan else "widened_fp8",
        lambda x: x.astype(jnp.bfloat16),
        lower_fun(functools.partial(_widened_on_gpu, nan=nan), multiple_results=False),
        jnp.bfloat16,
    )


_widened_fp8 = {nan: _widening(nan) for nan in (False, True)}


def _spread_pair(pair: int) -> Primitive:
    def plainly(x: Array, upper: Array) -> Array:
        low = x >> (16 * pair)
        return (low & 0xFF) | ((low & 0xFF00) << 8) | upper

    def on_gpu(context: Any, x: Any, upper: Any) -> Any:
        if context.context.platform != "rocm":
            return lower_fun(plainly, multiple_results=False)(context, x, upper)
        # v_perm_b32: each byte of the selector is the number of a byte, 0 to 3 of x, 4 to 7 of upper
        selector = _splat(x.type, 0x07010700 + pair * 0x00020002)
        symbol = "llvm.amdgcn.perm"
        return dialect.extern_elementwise(
            x.type, [upper, x, selector], libname="", libpath="", symbol=symbol, pure=True
        )

    return _primitive(f"spread_{pair}", plainly, on_gpu, jnp.uint32)


def _splat(tensor: Any, number: int | float) -> Any:
    of = ir.FloatAttr if isinstance(number, float) else ir.IntegerAttr
    element = of.get(ir.RankedTensorType(tensor).element_type, number)
    return arith.constant(tensor, ir.DenseElementsAttr.get_splat(tensor, element))


_spread = tuple(map(_spread_pair, (0, 1)))


def _plain_dot_of_parts(a: Array, b: Array) -> Array:
    return jnp.einsum("pmk,pnk->pmn", a, b, preferred_element_type=jnp.float32)


def _dot_of_parts_on_gpu(context: Any, a: Any, b: Any) -> Any:
    [out] = context.avals_out
    zeros = _splat(ir.RankedTensorType.get(out.shape, ir.F32Type.get()), 0.0)
    return dialect.dot(a, dialect.trans(b, (0, 2, 1)), zeros)


_dot_of_parts = _primitive(
    "dot_of_parts",
    _plain_dot_of_parts,
    _dot_of_parts_on_gpu,
    shape=lambda a, b: (*a.shape[:2], b.shape[1]),
)
