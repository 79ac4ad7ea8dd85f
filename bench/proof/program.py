"""A whole program as XLA compiles it for a GPU that is not present: its launches in order, its buffers, its code.

    compile_program(step, *args, arch="gfx942") -> Program

step is a jitted function; its arguments may be shapes. XLA's dumps say the rest: the schedule and kernels' launch
parameters (thunk_sequence), which HLO instruction a launch computes (thunk_metadata), what its operands are (the
optimized HLO) and where each value lies (buffer-assignment). Formats: as seen in jaxlib 0.12.0.
"""

import dataclasses
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from . import aot, by_xla

_DTYPES = {"pred": "bool", "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f8e4m3fn": "float8_e4m3fn"}
_INTEGERS = (("s", "int"), ("u", "uint"))
_DTYPES |= {f"{sign}{bits}": f"{name}{bits}" for sign, name in _INTEGERS for bits in (8, 16, 32, 64)}


class ProgramError(RuntimeError):
    """The program has something that is not understood; the message names it."""


class Place(NamedTuple):
    """Where a value lies."""

    allocation: int
    offset: int
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One buffer of a program. parameter: the argument's number; constant: whether XLA fills it in beforehand."""

    size: int
    parameter: int | None
    constant: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """One step of the schedule.

    kind: "kernel", or the lower-case name of what else it is: "copy", "while", "conditional", "gemm", ... parts: the
    steps of a loop ("condition", "body") or of a conditional ("true_branch", "false_branch").
    """

    kind: str
    name: str  # of the kernel
    instruction: str  # of the HLO
    grid: tuple[int, int, int]
    threads: int
    lds_bytes: int
    parts: "Mapping[str, tuple[Launch, ...]]" = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One HLO instruction. condition: the computation that a loop calls for it."""

    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str = ""  # of a constant
    condition: str = ""
    target: str = ""  # of a custom call


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program.

    Attributes:
      launches: in the order of the schedule.
      code: the code object of each kernel (HSACO); empty on NVIDIA.
      places: of each value, by the HLO's name; of a tuple's elements as "name#0", "name#1", ...
      instructions: of all computations; their names differ.
      roots: the last value of each computation.
      outputs: values of the results, in order.
      bytes: of "arguments", "outputs", "aliased" (outputs that reuse an argument) and "temporaries".
    """

    arch: str
    launches: tuple[Launch, ...]
    code: Mapping[str, Any]
    allocations: Mapping[int, Allocation]
    places: Mapping[str, Place]
    instructions: Mapping[str, Instruction]
    roots: Mapping[str, str]
    outputs: tuple[str, ...]
    bytes: Mapping[str, int]

    def resolved(self, value: str) -> Place:
        """The place of a value, which may be another name of one (bitcast, get-tuple-element)."""
        while value not in self.places:
            name, _, element = value.partition("#")
            found = self.instructions[name]
            if found.opcode not in ("bitcast", "get-tuple-element", "tuple"):
                raise ProgramError(f"{value} ({found.opcode}) has no buffer")
            value = found.operands[int(element)] if found.opcode == "tuple" else found.operands[0]
        return self.places[value]


def compile_program(step: Any, *args: Any, arch: str, mesh: jax.sharding.Mesh | None = None) -> Program:
    """Compiles a jitted function for arch, with XLA's own compiler.

    mesh: of by_xla.devices(arch, ...), over which the arguments are divided as their shapes say. The program, and its
    bytes, are those of one device.

    Raises:
      RuntimeError: the compiler is not installed; the message says how to install it.
      aot.CompileError: compilation failed.
      ProgramError: XLA's dumps have something that is not understood.
    """
    sharding = jax.sharding.SingleDeviceSharding(by_xla.device(arch))
    shapes = args
    if mesh is None:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with aot.target(arch, mesh):
        lowered = step.trace(*shapes).lower()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compiled = by_xla.compile_lowered(lowered, folder, arch=arch, dump_large_constants=True)
        stats = compiled.memory_analysis()
        hlo, assignment, values, thunks, metadata = (_dumped(folder, suffix) for suffix in _SUFFIXES)
        # XLA compiles some kernels twice; the later code is that of the final buffers
        files = sorted(folder.glob("*.hsaco"), key=lambda file: file.stat().st_mtime_ns)
        code = {kernel: file.read_bytes() for file in files for kernel in by_xla.kernels_in(file.read_bytes())}
    instructions, roots, entry = _instructions(hlo)
    root = roots[entry]
    allocations, places = _buffers(assignment, values)
    return Program(
        arch=arch,
        launches=_launches(thunks, metadata, instructions),
        code=code,
        allocations=allocations,
        places=places,
        instructions=instructions,
        roots=roots,
        outputs=instructions[root].operands if instructions[root].opcode == "tuple" else (root,),
        bytes={
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
        },
    )


_SUFFIXES = (
    "gpu_after_optimizations.txt",
    "gpu_after_optimizations-buffer-assignment.txt",
    "gpu_after_optimizations-buffer-assignment-values.txt",
    "thunk_sequence.txt",
    "thunk_metadata.txt",
)


def _dumped(folder: Path, suffix: str) -> str:
    files = [file for file in folder.glob(f"*{suffix}") if file.name.endswith(("." + suffix, "_" + suffix))]
    if len(files) != 1:
        raise ProgramError(f"XLA wrote {len(files)} files *{suffix}, not one")
    return files[0].read_text()


_THUNK = re.compile(
    r"( *)(\d+): k(\w+)\s+\[.*?\]\s*(\S*)(?: grid: \[(.*?)\] threads: \[(.*?)\]\s+shared_memory: (\d+))?"
)


def _launches(thunks: str, metadata: str, instructions: Mapping[str, Instruction]) -> tuple[Launch, ...]:
    """The schedule; the steps of loops and conditionals stand indented below them, each part behind its name."""
    told = re.findall(r'thunk_info \{\s*(?:profile_annotation: "(.*?)")?\s*thunk_id: (\d+)', metadata)
    named = {int(number): name for name, number in told}
    lines = [line for line in thunks.splitlines() if line.strip()]

    def steps(depth: int) -> Iterator[Launch]:
        """Takes the lines that are indented at least this far."""
        while lines and _indent(lines[0]) >= depth and lines[0].strip() not in _PARTS:
            line = lines.pop(0)
            found = _THUNK.match(line)
            if found is None:
                raise ProgramError(f"a step of XLA's schedule that is not understood: {line.strip()}")
            parts: dict[str, tuple[Launch, ...]] = {}
            while lines and lines[0].strip() in _PARTS and _indent(lines[0]) >= len(found[1]):
                part = lines.pop(0).strip().rstrip(":")
                parts[part] = tuple(steps(len(found[1]) + 2))
            threads = [int(n) for n in (found[6] or "0, 1, 1").split(",")]
            if threads[1:] != [1, 1]:
                raise ProgramError(f"a workgroup of more than one dimension: {line.strip()}")
            x, y, z = (int(n) for n in (found[5] or "1, 1, 1").split(","))
            instruction = named.get(int(found[2]), "")
            yield Launch(
                kind="kernel" if found[3] in ("CustomKernel", "Kernel") else found[3].lower(),
                name=found[4],
                instruction=instruction if instruction in instructions else "",
                grid=(x, y, z),
                threads=threads[0],
                lds_bytes=int(found[7] or 0),
                parts=parts,
            )

    return tuple(steps(0))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


_PARTS = ("condition:", "body:", "true_branch:", "false_branch:")
_LINE = re.compile(r"^\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<shape>.*?) (?P<opcode>[a-z][\w-]*)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")


def instructions_of(hlo: str) -> Mapping[str, Instruction]:
    """All instructions of XLA's text of a program, by name."""
    return _instructions(hlo)[0]


def _instructions(hlo: str) -> tuple[dict[str, Instruction], dict[str, str], str]:
    """(all instructions by name, the root of each computation, the name of the entry computation)."""
    found: dict[str, Instruction] = {}
    roots: dict[str, str] = {}
    computation = entry = ""
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            computation = start["name"]
            entry = computation if start["entry"] else entry
        elif match := _LINE.match(line):
            end = _closing(match["rest"])
            arguments, attributes = match["rest"][:end], match["rest"][end:]
            found[match["name"]] = Instruction(
                opcode=match["opcode"],
                shape=match["shape"],
                operands=tuple(re.findall(r"%([\w.#-]+)", arguments)),
                literal=arguments if match["opcode"] in ("constant", "parameter") else "",
                condition=(re.findall(r"\bcondition=%([\w.-]+)", attributes) or [""])[0],
                target=(re.findall(r'\bcustom_call_target="([^"]*)"', attributes) or [""])[0],
            )
            if match["root"]:
                roots[computation] = match["name"]
    return found, roots, entry


def _closing(text: str) -> int:
    """The index of the parenthesis that closes one before the text."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return at
    return len(text)


_VALUE = re.compile(r"\s+value: <(\d+) .*? @\d+> \(size=(\d+),offset=(\d+)\)")
_POSITION = re.compile(r"  (\S+)(?: \{([\d,]*)\})?$")


def _buffers(assignment: str, values: str) -> tuple[dict[int, Allocation], dict[str, Place]]:
    """(allocations, places of all values), from the dumps of the assignment and of the positions of each value."""
    allocations: dict[int, Allocation] = {}
    by_value: dict[int, Place] = {}
    number = 0
    for line in assignment.splitlines():
        if found := re.match(r"allocation (\d+): size (\d+), (.*)", line):
            number = int(found[1])
            parameter = re.search(r"parameter (\d+)", found[3])
            allocations[number] = Allocation(
                size=int(found[2]),
                parameter=int(parameter[1]) if parameter else None,
                constant=re.search(r"\bconstant\b", found[3]) is not None,
            )
        elif found := _VALUE.match(line):
            by_value[int(found[1])] = Place(number, int(found[3]), int(found[2]))
    places: dict[str, Place] = {}
    value, in_positions = 0, False
    for line in values.splitlines():
        if found := re.match(r"<(\d+) ", line):
            value = int(found[1])
        elif line.startswith(" ") and not line.startswith("  "):
            in_positions = line.strip() == "positions:"
        elif in_positions and value in by_value and (found := _POSITION.match(line)) and found[2] != "":
            places[f"{found[1]}#{found[2]}" if found[2] else found[1]] = by_value[value]
    return allocations, places


def literal(instruction: Instruction) -> np.ndarray:
    """The value of a constant."""
    dtype = _DTYPES[instruction.shape.partition("[")[0]]
    words = re.findall(r"[^\s{},]+", instruction.literal)
    if "..." in instruction.literal:
        raise ProgramError(f"the value of a constant {instruction.shape} was left out of XLA's dump")
    if dtype == "bool":
        return np.array([word in ("true", "1") for word in words])
    return np.array([float(word) if "float" in dtype else int(word) for word in words]).astype(jax.numpy.dtype(dtype))


def each(launches: Sequence[Launch]) -> Iterator[Launch]:
    """All steps, those of loops behind their loop."""
    for launch in launches:
        yield launch
        for part in launch.parts.values():
            yield from each(part)


_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def collectives(instructions: Mapping[str, Instruction]) -> dict[tuple[str, str], int]:
    """Number of the arrays that collective operations return, by (kind, shape): an operation may return several."""
    counts: dict[tuple[str, str], int] = {}
    for found in instructions.values():
        kind = found.opcode.removesuffix("-start")
        if kind in _COLLECTIVES:
            for shape in shapes(found.shape)[-len(found.operands) :]:  # of a started one: after its operands
                counts[kind, shape] = counts.get((kind, shape), 0) + 1
    return counts


def shape_bytes(shape: str) -> int:
    """Bytes of an array whose shape XLA writes like "bf16[8,1,4096]"."""
    dtype, _, sizes = shape.rstrip("]").partition("[")
    return np.dtype(jax.numpy.dtype(_DTYPES[dtype])).itemsize * math.prod(int(n) for n in sizes.split(",") if n)


def by_role(program: Program) -> dict[str, int]:
    """Number of launches by what they are: "pallas", "products" (XLA's Triton fusions), "fusions", and others."""
    return dict(Counter(_role(program, launch) for launch in each(program.launches)))


def _role(program: Program, launch: Launch) -> str:
    if launch.kind != "kernel":
        return launch.kind
    opcode = program.instructions[launch.instruction].opcode if launch.instruction else ""
    return "pallas" if opcode == "custom-call" else "products" if "gemm" in launch.name else "fusions"


def kernels(program: Program) -> list[dict[str, Any]]:
    """The kernels of jfa and XLA's products with the shapes of their operands and results, and how often each runs."""

    def described(launch: Launch) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        found = program.instructions[launch.instruction]
        # XLA numbers its kernels, also those that differ in their tiles alone
        name = launch.name if found.opcode == "custom-call" else re.sub(r"(_\d+)+$", "", launch.name)
        return name, tuple(_shape(program, one) for one in found.operands), tuple(shapes(found.shape))

    wanted = [one for one in each(program.launches) if _role(program, one) in ("pallas", "products")]
    counts = Counter(described(one) for one in wanted if one.instruction)
    return [dict(name=name, operands=xs, results=ys, count=n) for (name, xs, ys), n in counts.items()]


def shapes(shape: str) -> list[str]:
    """Those of an array or of a tuple's elements, without layouts."""
    return re.findall(r"\w+\[[\d,]*\]", shape)


def _shape(program: Program, value: str) -> str:
    name, _, element = value.partition("#")
    return shapes(program.instructions[name].shape)[int(element or 0)]
