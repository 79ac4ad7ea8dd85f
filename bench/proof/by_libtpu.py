"""Compiles calls and whole steps for TPUs with libtpu, which needs no TPU, and reads what the compiler says about them.

libtpu compiles whole programs: the figures of a call include what XLA adds around the kernel, such as copies of
operands to the layout that the kernel reads.
"""

import atexit
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from jfa.kernels.tpu import tile

from . import aot, program
from .aot import CompileError
from .program import Instruction

# Slices by their number of devices, as libtpu names them. A chip of v7x is two devices.
_PLANES = {1: "1x1", 2: "1x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
_CUBES = {1: "1x1x1", 2: "1x1x1", 4: "1x2x1", 8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4"}
_TOPOLOGIES = {"v5e": ("v5e", _PLANES), "v6e": ("v6e", _PLANES), "v7x": ("tpu7x", _CUBES)}

# Fields of a record of a TPU. vmem_limit: what a kernel may use of the chip's VMEM. hbm_bytes and flops are those of
# the program, with what the kernel states for itself; roofline_ms is XLA's estimate from these.
# loop_bundles: instruction words, one a cycle, of the longest part of the kernel's loop without a branch, with
# loop_products matrix products; waits for memory are not part of it.
FIELDS = ("vmem_bytes", "vmem_limit", "hbm_bytes", "flops", "roofline_ms", "copies", "copied_bytes", "code_bytes")
FIELDS += ("loop_bundles", "loop_products")


def why_not() -> str | None:
    """What is missing to compile for TPUs; None: nothing."""
    if importlib.util.find_spec("libtpu") is None:
        return 'the compiler for TPUs is in libtpu, which is not installed: pip install "jfa[tpu-aot]"'
    return None


def version() -> str | None:
    """The version of libtpu; None: it is not installed."""
    return None if why_not() else importlib.metadata.version("libtpu")


def compile_call(fn: Callable, args: tuple, *, kernel: str, arch: str) -> dict[str, Any]:
    """FIELDS of fn(*args), compiled for a chip.

    Args:
      args: pytrees of jax.ShapeDtypeStruct.
      kernel: name of the Pallas call in it.

    Raises:
      RuntimeError: libtpu is not installed; the message names the extra.
      CompileError: compilation failed, or the program has no such kernel.
    """
    figures, parts = compile_program(fn, args, kernel=kernel, arch=arch)
    own = [part for name, of_kernel in parts.items() if name.startswith(kernel) for part in of_kernel]
    return figures | dict(zip(("loop_bundles", "loop_products"), _loop(own), strict=True))


def compile_program(
    fn: Callable, args: tuple, *, kernel: str, arch: str
) -> tuple[dict[str, Any], dict[str, list[tuple[int, int]]]]:
    """FIELDS without those of the loop, and of each kernel with products its parts without a branch, longest first.

    A part is (instruction words, matrix products). Arguments and exceptions: as of compile_call.
    """
    _dumps()
    compiled = _compiled(jax.jit(fn), args, arch)
    text, cost, memory = compiled.as_text() or "", compiled.cost_analysis() or {}, compiled.memory_analysis()
    assert memory is not None
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line and kernel in line]
    if not calls:
        raise CompileError(f"the program has no kernel named {kernel}")
    copied = [_bytes(found[1], found[2]) for line in text.splitlines() if (found := _COPY.search(line))]
    seconds = cost.get("optimal_seconds")
    figures = {
        "vmem_bytes": max((int(size) for line in calls for size in _VMEM.findall(line)), default=None),
        "vmem_limit": tile.budget(aot.device(arch)),
        "hbm_bytes": _whole(cost.get("bytes accessed")),
        "flops": _whole(cost.get("flops")),
        "roofline_ms": None if seconds is None else round(1e3 * seconds, 4),
        "copies": len(copied),
        "copied_bytes": sum(copied),
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    return figures, _parts()


def _compiled(step: Any, args: tuple, arch: str, mesh: jax.sharding.Mesh | None = None) -> Any:
    if mesh is None:
        sharding = jax.sharding.SingleDeviceSharding(devices(arch)[0])
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with aot.target(arch, mesh):
        return aot.compile_lowered(step.trace(*args).lower(), arch=arch, compiler="libtpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A whole program for TPUs: that of one device, if there are several.

    Attributes:
      instructions: of all computations, by name.
      inlined: those inside fusions, which write nothing to memory of their own.
      backends: of each op of jfa, those that compute it ("tpu", "xla").
      bytes: of "arguments", "outputs", "aliased" (outputs that reuse an argument), "temporaries" and "code".
    """

    instructions: Mapping[str, Instruction]
    inlined: frozenset[str]
    backends: Mapping[str, tuple[str, ...]]
    bytes: Mapping[str, int]

    @classmethod
    def of(cls, text: str, num_bytes: Mapping[str, int]) -> "Step":
        """From the text of XLA's optimized program."""
        fused, inlined, computation = set(_CALLED.findall(text)), set(), ""
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                computation = start[1]
            elif computation in fused and (found := _NAME.match(line)):
                inlined.add(found[1])
        ops: dict[str, set[str]] = {}
        for op, backend in _SCOPE.findall(text):
            ops.setdefault(op, set()).add(backend)
        return cls(
            instructions=program.instructions_of(text),
            inlined=frozenset(inlined),
            backends={op: tuple(sorted(found)) for op, found in sorted(ops.items())},
            bytes=num_bytes,
        )

    def kernels(self) -> list[dict[str, Any]]:
        """jfa's kernels with the shapes of their operands and results, and how often each runs."""

        def described(name: str, found: Instruction) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
            operands = tuple(program.shapes(self.instructions[x].shape)[0] for x in found.operands)
            return name.partition(".")[0], operands, tuple(program.shapes(found.shape))

        calls = [one for one in self.instructions.items() if one[1].target == "tpu_custom_call"]
        return [
            dict(name=name, operands=xs, results=ys, count=n)
            for (name, xs, ys), n in Counter(described(*one) for one in calls).items()
        ]

    def copies_of(self, arrays: set[tuple[str, int]]) -> tuple[int, int]:
        """(copies, moves) of arrays by (dtype, number of elements).

        A copy writes the whole array to memory again, in another layout or another place; a move takes it to VMEM or
        back, which XLA does with arrays that are small enough, to read them there.
        """
        copies = moves = 0
        for name, found in self.instructions.items():
            if name in self.inlined or found.opcode not in ("copy", "copy-start", "transpose", "reshape"):
                continue
            first, *others = program.shapes(found.shape)
            dtype, _, sizes = first.rstrip("]").partition("[")
            if (dtype, int(np.prod([int(n) for n in sizes.split(",") if n], dtype=np.int64))) not in arrays:
                continue
            layouts = {_SPACE.sub("", layout) for layout in _LAYOUT.findall(found.shape)[:2]}
            is_move = found.opcode == "copy-start" and "S(1)" in found.shape and len(layouts) == 1 and others
            copies, moves = (copies, moves + 1) if is_move else (copies + 1, moves)
        return copies, moves


_CALLED = re.compile(r" fusion\(.*? calls=%([\w.-]+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%(\S+) = ")
_SCOPE = re.compile(r"\bjfa\.(\w+)\.(tpu|xla|reference)\b")
_LAYOUT = re.compile(r"\]\{([^}]*)\}")
_SPACE = re.compile(r"S\(\d\)")


def compile_step(step: Any, *args: Any, arch: str, mesh: jax.sharding.Mesh | None = None) -> Step:
    """Compiles a jitted function for a chip, or for several.

    Args:
      args: pytrees of jax.ShapeDtypeStruct.
      mesh: of devices(arch, ...), over which the arguments are divided as their shapes say.

    Raises:
      RuntimeError: libtpu is not installed; the message names the extra.
      CompileError: compilation failed.
    """
    compiled = _compiled(step, args, arch, mesh)
    memory = compiled.memory_analysis()
    assert memory is not None
    return Step.of(
        compiled.as_text() or "",
        {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        },
    )


# The compiler's notes on an instruction, and a copy of an array in HBM: S(1) in a layout is VMEM.
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')
_COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\]\{[^}]*\}[^=]* (?:copy|copy-start|transpose)\(")
_BITS = re.compile(r"\d+")


def _parts() -> dict[str, list[tuple[int, int]]]:
    """The parts of the kernels that were compiled since the last call, from the compiler's dump of them."""
    found: dict[str, list[tuple[int, int]]] = {}
    for file in sorted(_dumps().glob("*-final_bundles.txt")):
        parts: list[list[int]] = []
        for line in file.read_text().splitlines():
            if not (bundle := _BUNDLE.match(line)):
                continue
            if bundle[1] or not parts:
                parts.append([0, 0])
            parts[-1][0] += 1
            parts[-1][1] += line.count("vmatmul")
        if any(products for _, products in parts):
            name = _KERNEL.sub(r"\1", file.name)
            found[name] = sorted(map(tuple, parts), reverse=True)  # type: ignore[arg-type]
    for file in _dumps().iterdir():
        file.unlink()
    return found


def _loop(parts: list[tuple[int, int]]) -> tuple[int | None, int | None]:
    """The part with the most products. If several have as many, it is the shortest: the one without masks."""
    known = [part for part in parts if part[1]]
    return min(known, key=lambda part: (-part[1], part[0])) if known else (None, None)


_KERNEL = re.compile(r"^\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt$")
_BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|0) +(LB|PB|PF|LH|LE)?: ")


@functools.cache
def _dumps() -> Path:
    """The folder that libtpu writes the code of kernels to, in a process that did not load it before."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    asked = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{asked} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true".strip()
    return folder


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.search(dtype)
    count = 1
    for size in filter(None, shape.split(",")):
        count *= int(size)
    return count * (int(bits[0]) if bits else 8) // 8


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


@functools.cache
def devices(arch: str, count: int = 1) -> list[Any]:
    """Devices of one slice to compile for, which cannot run anything.

    Raises:
      ValueError: there is no slice of so many.
      RuntimeError: libtpu is not installed; the message names the extra.
    """
    name, shapes = _TOPOLOGIES[arch]
    if count not in shapes:
        sizes = ", ".join(map(str, shapes))
        raise ValueError(f"a slice of {arch} has {sizes} devices, got {count}")
    if reason := why_not():
        raise RuntimeError(reason)
    # other processes compile at the same time, and there is no server to ask about this machine's TPUs
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(f"{name}:{shapes[count]}", platform="tpu").devices[:count]
