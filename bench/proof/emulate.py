"""Runs a function with its Pallas calls emulated as AMD machine code on this CPU, and everything else in JAX.

    emulate(fn, *args, arch="gfx942") -> Emulated   the outputs of fn on that GPU, with races and instruction count

Each Pallas call is lowered by aot.py, compiled by compilers.py and executed by amdgcn/. An access outside of an
operand raises amdgcn.MemoryFault; outputs are initialized to NaN (0xff bytes), so that elements that are not written
are noticed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import amdgcn, names
from . import aot, compilers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emulated:
    """The result of an emulated function."""

    outputs: Any  # as fn returns them
    kernels: tuple[str, ...]  # names of the Pallas calls that ran, in order
    instructions: int  # number executed, over all waves
    races: tuple[str, ...]  # a message for each


def emulate(
    fn: Callable,
    *args: Any,
    arch: str,
    compiler: str | None = None,
    edit: Callable[[str], str] = lambda asm: asm,
) -> Emulated:
    """fn(*args) on an emulated AMD GPU.

    Args:
      args: arrays or pytrees of arrays.
      arch: one of names.EXECUTED_ARCHS.
      compiler: as for compilers.compile_kernel.
      edit: changes the assembly before it runs; tests use it to break kernels.

    Raises:
      ValueError: arch is not one of names.EXECUTED_ARCHS, or fn made no Pallas call.
      aot.CompileError: compilation failed, or the code exceeds the limits of a workgroup.
      amdgcn.MachineError: the machine code did something invalid, or has an instruction that is not implemented.
    """
    if arch not in names.EXECUTED_ARCHS:
        raise ValueError(
            f"arch must be one of {', '.join(names.EXECUTED_ARCHS)}, got {arch!r}: others cannot be emulated"
        )
    machine = _Machine(arch, compiler, edit)
    with aot.target(arch):
        traced, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    outputs = machine.evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(args))
    if not machine.kernels:
        raise ValueError("the function made no Pallas call: nothing ran as AMD machine code")
    return Emulated(
        outputs=jax.tree.unflatten(jax.tree.structure(shapes), outputs),
        kernels=tuple(machine.kernels),
        instructions=machine.instructions,
        races=tuple(machine.races),
    )


class _Machine:
    """Evaluates jaxprs and records the kernels that it runs."""

    def __init__(self, arch: str, compiler: str | None, edit: Callable[[str], str]):
        self._arch, self._compiler, self._edit = arch, compiler, edit
        self.kernels: list[str] = []
        self.instructions = 0
        self.races: list[str] = []

    def evaluate(self, jaxpr: Any, consts: Any, args: Any) -> list[Any]:
        values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Any:
            return var.val if hasattr(var, "val") else values[var]

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(var) for var in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def _equation(self, equation: Any, args: list[Any]) -> list[Any]:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            return self._kernel(equation, args)
        inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
        if inner is not None and name not in ("scan", "while", "cond"):
            closed = hasattr(inner, "consts")
            return self.evaluate(inner.jaxpr if closed else inner, inner.consts if closed else (), args)
        results = equation.primitive.bind(*args, **params)
        return list(results) if equation.primitive.multiple_results else [results]

    def _kernel(self, equation: Any, args: list[Any]) -> list[Any]:
        params = dict(equation.params, interpret=False)
        [kernel] = aot.lower(lambda *xs: equation.primitive.bind(*xs, **params), *args, arch=self._arch)
        compiled = compilers.compile_kernel(kernel, arch=self._arch, compiler=self._compiler)
        if reason := compiled.why_not_launched():
            raise aot.CompileError(f"{kernel.name} {reason}")
        aliased = dict((out, arg) for arg, out in params.get("input_output_aliases", ()))
        outputs = [
            np.array(args[aliased[i]]) if i in aliased else _poisoned(var.aval.shape, np.dtype(var.aval.dtype))
            for i, var in enumerate(equation.outvars)
        ]
        operands = [np.asarray(arg) for arg in args] + outputs
        done = amdgcn.run(
            self._edit(compiled.asm),
            operands,
            grid=kernel.grid,
            num_warps=kernel.num_warps,
            lds_bytes=compiled.lds_bytes,
        )
        self.kernels.append(kernel.name)
        self.instructions += done.instructions
        self.races += done.races
        return [jnp.asarray(output) for output in done.outputs[len(args) :]]


def _poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.full((*shape, dtype.itemsize), 0xFF, np.uint8).view(dtype)[..., 0]
