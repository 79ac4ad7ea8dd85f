"""Compiles kernels for GPUs that are not present, and edits and runs their assembly."""

import dataclasses
import functools

import numpy as np
import pytest

from jfa_bench import amdgcn

triton = pytest.importorskip("triton", reason='needs triton: pip install "jfa[aot]"')
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

LANES = {"gfx942": 64, "gfx950": 64, "gfx1100": 32, "gfx1201": 32}
ARCHS = tuple(LANES)


@dataclasses.dataclass(frozen=True)
class Built:
    """Machine code, and its launch parameters."""

    asm: str
    num_warps: int
    lds_bytes: int

    def run(self, *args, grid=(1, 1, 1), **options):
        """Runs the machine code in the emulator and returns its result."""
        grid = (*grid, 1, 1)[:3]
        return amdgcn.run(self.asm, args, grid=grid, num_warps=self.num_warps, lds_bytes=self.lds_bytes, **options)

    def replaced(self, asm: str) -> "Built":
        """The same launch with other machine code."""
        return dataclasses.replace(self, asm=asm)


@functools.cache
def build(
    kernel,
    arch: str,
    signature: str,
    *,
    small: bool = True,
    num_warps: int = 4,
    num_stages: int = 1,
    options: tuple = (),
    **constexprs,
) -> Built:
    """A Triton kernel for arch. signature: the types of its runtime arguments in order, as in "*fp32 i32".

    Arrays are promised to be aligned to 16 bytes and, if small, shorter than 2 GiB, as Triton's launcher would find
    them: small ones are accessed through buffer descriptors, in which an offset past 2 GiB is a masked lane.
    """
    types = signature.split()
    runtime = [name for name in kernel.arg_names if name not in constexprs]
    assert len(runtime) == len(types), f"{kernel.__name__} takes {runtime}, got types {types}"
    promises = [["tt.divisibility", 16], *([["tt.pointer_range", 32]] if small else [])]
    source = ASTSource(
        fn=kernel,
        signature={**dict(zip(runtime, types, strict=True)), **dict.fromkeys(constexprs, "constexpr")},
        constexprs=constexprs,
        attrs={(kernel.arg_names.index(n),): promises for n, t in zip(runtime, types, strict=True) if t[0] == "*"},
    )
    built = triton.compile(
        source,
        target=GPUTarget("hip", arch, LANES[arch]),
        options=dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **dict(options)),
    )
    return Built(built.asm["amdgcn"], num_warps, built.metadata.shared)


def poisoned(shape, dtype) -> np.ndarray:
    """An array of 0xff bytes (NaN or -1), so that elements that are not written are noticed."""
    empty = np.empty(shape, dtype)
    empty.reshape(-1).view(np.uint8)[...] = 0xFF
    return empty


def barriers(asm: str) -> list[tuple[int, ...]]:
    """The barriers in the text, each as its lines, counted from 0: one, or on gfx12 a signal and the wait after it."""
    found: list[tuple[int, ...]] = []
    for number, line in enumerate(asm.split("\n")):
        match line.split():
            case ["s_barrier", *_] | ["s_barrier_signal", *_]:
                found.append((number,))
            case ["s_barrier_wait", *_]:
                found[-1] += (number,)
    return found


def without(asm: str, lines) -> str:
    """The text with these lines empty; the others keep their numbers."""
    return "\n".join("" if number in lines else line for number, line in enumerate(asm.split("\n")))
