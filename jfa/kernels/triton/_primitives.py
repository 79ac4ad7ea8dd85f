"""Operations that GPUs have and Pallas lacks, as JAX primitives.

  fma    a * b + c: XLA's compiler fuses none by itself (jax 0.11.2 to 0.12.0)
  exp2   the hardware's 2^x: XLA's handles results below the smallest normal number, by five more instructions

Outside of GPU kernels, as in the interpreter on a CPU, they are computed by the JAX functions that define them here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir.dialects import math
from jaxtyping import Array, Float

# there is no public way to add an operation to Pallas' Triton dialect
from jax._src.lib.triton import dialect
from jax._src.pallas.triton.lowering import register_lowering


def fma(a: Any, b: Any, c: Any) -> Float[Array, "..."]:
    """a * b + c of float32 numbers or arrays, which are broadcast; rounded once on a GPU."""
    return _fma.bind(*jnp.broadcast_arrays(*(jnp.asarray(x, jnp.float32) for x in (a, b, c))))


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^x of a float32 array; on a GPU to about one unit in the last place, and 0 below the smallest normal number."""
    return _exp2.bind(x)


def _primitive(name: str, plainly: Callable[..., Array], on_gpu: Callable[..., Any]) -> Primitive:
    """A primitive of float32 arrays of one shape.

    plainly: the JAX function that defines it. on_gpu: (context, *values), which emits it in Pallas' Triton dialect.
    """
    made = Primitive(name)
    made.def_impl(jax.jit(plainly))
    made.def_abstract_eval(lambda x, *others: x)
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
