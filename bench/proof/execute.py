"""Executes a whole program as AMD machine code on this CPU: every kernel of its schedule, in XLA's own buffers.

    execute(program, *args) -> Executed   the program's results, and what ran

Kernels share the memory that XLA's buffer assignment lays out, so that a value that was overwritten too early, or a
result that is not updated in place, is noticed. Temporaries and results start as NaN. Copies are done here; what is
neither a kernel nor a copy, such as a library call, is refused by name.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from .. import amdgcn
from . import code_object
from .program import Launch, Program, ProgramError, literal

# Bytes in which XLA allocates buffers. Lanes of its scatters that have nothing to do read behind a short operand.
UNIT = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Executed:
    """The result of a program. outputs: flat, as bytes of XLA's layout, one for each value in Program.outputs."""

    outputs: tuple[np.ndarray, ...]
    kernels: tuple[str, ...]  # in the order in which they ran
    instructions: int  # number executed, over all waves
    races: tuple[str, ...]


def execute(program: Program, *args: Any, edit: Callable[[str, str], str] = lambda name, asm: asm) -> Executed:
    """program(*args) on an emulated AMD GPU.

    Args:
      args: the arguments of the compiled function, as arrays.
      edit: (kernel's name, its assembly) to the assembly that runs; tests use it to break a kernel.

    Raises:
      ProgramError: the schedule has a step that cannot be run here.
      amdgcn.MachineError: the machine code did something invalid, or has an instruction that is not implemented.
    """
    memory, addresses = _laid_out(program, [np.asarray(x) for x in jax.tree.leaves(args)])

    def address(value: str) -> int:
        place = program.resolved(value)
        return addresses[place.allocation] + place.offset

    ran: list[str] = []
    counted, races = 0, []
    asm: dict[str, str] = {}

    def run_kernel(launch: Launch) -> None:
        nonlocal counted
        if launch.name not in program.code:
            raise ProgramError(f"XLA kept no code of {launch.name}: compile the program in a process of its own")
        if launch.name not in asm:
            asm[launch.name] = edit(launch.name, code_object.assembly(program.code[launch.name], program.arch))
        operands = program.instructions[launch.instruction].operands
        try:
            done = _run(launch, asm[launch.name], [*map(address, (*operands, *_results(program, launch)))], memory)
        except amdgcn.MachineError as error:
            raise type(error)(f"{launch.name}: {error}") from error
        ran.append(launch.name)
        races.extend(done.races)
        counted += done.instructions

    def is_true(value: str) -> bool:
        return bool(memory.content(address(value), 1)[0])

    def run(launches: Sequence[Launch]) -> None:
        for launch in launches:
            found = program.instructions.get(launch.instruction)
            if found is None or launch.kind not in ("kernel", "copy", "while", "conditional"):
                raise ProgramError(
                    f"{launch.kind} {launch.name} cannot be run here: only kernels, copies, loops and conditionals can"
                )
            if launch.kind == "kernel":
                run_kernel(launch)
            elif launch.kind == "copy":
                pairs = zip(found.operands, _results(program, launch), strict=False)
                apart = [(x, y) for x, y in pairs if program.resolved(x) != program.resolved(y)]
                if len(apart) != 1:
                    raise ProgramError(
                        f"a copy for {launch.instruction}, but {len(apart)} of its operands are not in place"
                    )
                [(x, y)] = apart
                memory.fill(address(y), memory.content(address(x), program.resolved(y).size))
            elif launch.kind == "conditional":
                run(launch.parts["true_branch" if is_true(found.operands[0]) else "false_branch"])
            else:
                run(launch.parts["condition"])
                while is_true(program.roots[found.condition]):
                    run(launch.parts["body"])
                    run(launch.parts["condition"])

    run(program.launches)
    outputs = [memory.content(address(value), program.resolved(value).size) for value in program.outputs]
    return Executed(outputs=tuple(outputs), kernels=tuple(ran), instructions=counted, races=tuple(races))


def _laid_out(program: Program, args: list[np.ndarray]) -> tuple[amdgcn.Memory, dict[int, int]]:
    """(memory with arguments and constants in it, the address of each allocation)."""
    memory, addresses = amdgcn.Memory(), {}
    for number, allocation in program.allocations.items():
        content = np.full(-(-allocation.size // UNIT) * UNIT, 0xFF, np.uint8)
        name = f"buffer {number}"
        if allocation.parameter is not None:
            given = np.ascontiguousarray(args[allocation.parameter]).reshape(-1).view(np.uint8)
            content[: len(given)] = given
            name = f"argument {allocation.parameter}"
        addresses[number] = memory.add(content, name, writable=not allocation.constant)
    for name, instruction in program.instructions.items():
        if instruction.opcode == "constant" and name in program.places:
            place = program.places[name]
            memory.fill(addresses[place.allocation] + place.offset, literal(instruction).view(np.uint8))
    return memory, addresses


def _results(program: Program, launch: Launch) -> list[str]:
    """The values that a launch computes: one, or the elements of a tuple."""
    elements = [f"{launch.instruction}#{i}" for i in range(100) if f"{launch.instruction}#{i}" in program.places]
    return elements or [launch.instruction]


def _run(launch: Launch, asm: str, args: list[int], memory: amdgcn.Memory) -> amdgcn.Run:
    parsed = amdgcn.parse(asm)
    if len(parsed.arguments) != len(args):
        raise ProgramError(f"{launch.name} takes {len(parsed.arguments)} arguments, its instruction has {len(args)}")
    static = parsed.descriptor.get("group_segment_fixed_size", 0)
    return amdgcn.run(
        asm,
        args,
        grid=launch.grid,
        num_warps=-(-launch.threads // parsed.wave_size),
        threads=launch.threads,
        lds_bytes=launch.lds_bytes + static,
        memory=memory,
    )
