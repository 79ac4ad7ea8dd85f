"""The emulator's main loop: binds a program to gangs of waves and runs them in lockstep.

A gang is a set of workgroups whose waves execute together: an instruction is one NumPy call over all of their lanes. If
waves diverge, those in the earliest block run first and the others are masked out until they reconverge. Not modelled:
time, wait counts and other hazards, cache coherence, modes that flush denormal numbers (refused), and how a matrix
instruction rounds between its products.
"""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np

from . import lanes, lds, matrix, memory, scalar, vector
from .errors import Deadlock, UnsupportedInstruction
from .gang import Gang, Step
from .program import Instruction, Program, parse
from .storage import Memory

# Lanes in a gang: enough to amortize the cost of a NumPy call, few enough for its operands to stay in the cache
# (measured: bench/LOG.md).
LANES = 1024
KEEPS = 3  # the floating-point mode that computes with denormal numbers
MAX_BLOCKS = 5_000_000  # takes minutes; far above any kernel that terminates


@dataclasses.dataclass(frozen=True)
class Run:
    """The result of a kernel: for each argument the array afterwards (None for a number)."""

    outputs: tuple[np.ndarray | None, ...]
    instructions: int  # number executed, over all waves; waits and hints are not counted
    races: tuple[str, ...]


def run(
    asm: str,
    args: Sequence[np.ndarray | int | float],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    lds_bytes: int,
    threads: int | None = None,
    memory: Memory | None = None,
    max_blocks: int = MAX_BLOCKS,
) -> Run:
    """Runs a kernel over a grid of up to three dimensions, one workgroup of num_warps waves per point.

    Args:
      args: for each pointer, in order, an array, which is not modified, or an address in `memory`; a number for each
        other argument.
      lds_bytes: Triton's `metadata.shared`, or the dynamic and the static bytes.
      threads: of a workgroup, if its last wave is not full.
      memory: with buffers that kernels share, which this one may modify.
      max_blocks: the maximum number of basic blocks that a gang may execute.

    Raises:
      UnsupportedInstruction: an instruction or mode is not implemented; raised before anything runs.
      MemoryFault: an access outside its buffer.
      Deadlock: waves never meet at a barrier, or never finish.
    """
    program = parse(asm)
    if any(program.descriptor.get(f"float_denorm_mode_{bits}", KEEPS) != KEEPS for bits in ("32", "16_64")):
        raise UnsupportedInstruction("the kernel's floating-point mode replaces denormal numbers by 0")
    store = memory or Memory()
    grid, threads = (*grid, 1, 1)[:3], threads or num_warps * program.wave_size
    kernarg, arrays = _kernarg(program, args, grid, threads, store)
    workgroups = np.indices(grid[::-1]).reshape(3, -1)[::-1].T  # x, y, z of each; x runs fastest
    together = max(1, min(len(workgroups), LANES // threads))
    packet = _dispatch_packet(grid, threads, program.scratch_bytes, lds_bytes, kernarg)
    initial = _user_registers(program, kernarg, store.add(packet, "the dispatch packet", writable=False))
    instructions, races = 0, {}
    gang, blocks = None, []
    with np.errstate(all="ignore"):
        for first in range(0, len(workgroups), together):
            some = workgroups[first : first + together]
            if gang is None or gang.num_workgroups != len(some):
                gang = Gang(program, len(some), num_warps, store, lds_bytes, threads)
                blocks = [[bind(gang, instruction) for instruction in block.instructions] for block in program.blocks]
            gang.start(some, initial)
            _execute(gang, blocks, max_blocks)
            instructions += gang.executed
            races |= dict.fromkeys(gang.lds.races)
    outputs = tuple(
        None if place is None else store.content(place).view(np.asarray(arg).dtype).reshape(np.shape(arg))
        for arg, place in zip(args, arrays, strict=True)
    )
    return Run(outputs, instructions, tuple(races))


def _execute(gang: Gang, blocks: Sequence[Sequence[Step]], max_blocks: int) -> None:
    """Runs the waves until all have finished."""
    for _ in range(max_blocks):
        ahead = np.where(gang.waiting, gang.end, gang.next_block)
        block = int(ahead.min())
        if block == gang.end:
            if not gang.waiting.any():
                return
            gang.pass_barrier()
            continue
        gang.select(ahead == block)
        np.copyto(gang.next_block, block + 1, where=gang.waves)
        for step in blocks[block]:
            step()
        running = gang.num_waves if gang.waves is True else int(np.count_nonzero(gang.waves))
        gang.executed += running * len(blocks[block])
    raise Deadlock(f"{max_blocks:,} basic blocks were executed without an end")


# Modifiers that some instruction here implements, and cache policies, which have no effect.
_KNOWN_MODIFIERS = {
    *("offset", "offset0", "offset1", "offen", "lds", "th", "scope", "glc", "slc", "dlc", "sc0", "sc1", "nt"),
    *("op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp", "mul", "div", "bitop3", "cbsz", "blgp"),
    "byte_sel",
    *("src0_sel", "src1_sel", "dst_sel", "dst_unused", "row_mask", "bank_mask", "bound_ctrl", "fi"),
}


def bind(gang: Gang, instruction: Instruction) -> Step:
    """Binds an instruction: returns a function without arguments that executes it on the gang."""
    name = instruction.name
    unknown = [key for key in instruction.modifiers if key not in _KNOWN_MODIFIERS and not lanes.is_permutation(key)]
    if unknown:
        raise UnsupportedInstruction(f"unsupported modifier {unknown[0]} of {instruction}")
    if name.startswith("s_load"):
        return memory.bind(gang, instruction)
    if name.startswith("s_"):
        return scalar.bind(gang, instruction)
    if name.startswith("ds_"):
        return lanes.bind(gang, instruction) or lds.bind(gang, instruction)
    if name.startswith(("global_", "flat_", "buffer_", "scratch_")):
        return memory.bind(gang, instruction)
    if name.startswith(("v_mfma", "v_wmma")):
        return matrix.bind(gang, instruction)
    if name.startswith("v_"):
        return vector.bind(gang, instruction)
    raise UnsupportedInstruction(f"unsupported instruction {instruction}")


def _kernarg(
    program: Program, args: Sequence[np.ndarray | int | float], grid: tuple[int, ...], num_threads: int, store: Memory
) -> tuple[int, list[int | None]]:
    """(address of the kernel's arguments, address of each array). Copies the arrays into the emulator's memory."""
    segment = bytearray(program.kernarg_bytes + 256)
    hidden = dict(zip(("hidden_block_count_x", "hidden_block_count_y", "hidden_block_count_z"), grid, strict=True))
    hidden |= {"hidden_group_size_x": num_threads, "hidden_group_size_y": 1, "hidden_group_size_z": 1}
    hidden["hidden_grid_dims"] = 3
    for place in program.arguments:
        value = hidden.get(place.kind, 0).to_bytes(place.size, "little")
        segment[place.offset : place.offset + place.size] = value
    addresses: list[int | None] = []
    for number, (arg, place) in enumerate(zip(args, program.arguments, strict=False)):
        address = None
        if place.kind == "global_buffer" and isinstance(arg, int):
            value = struct.pack("<Q", arg)
        elif place.kind == "global_buffer":
            octets = np.ascontiguousarray(arg).reshape(-1).view(np.uint8)
            address = store.add(octets, f"argument {number}", writable=True)
            value = struct.pack("<Q", address)
        elif isinstance(arg, float):
            value = struct.pack("<f" if place.size == 4 else "<d", arg)
        else:
            value = int(arg).to_bytes(place.size, "little", signed=int(arg) < 0)
        segment[place.offset : place.offset + place.size] = value
        addresses.append(address)
    return store.add(bytes(segment), "the kernel's arguments", writable=False), addresses


def _dispatch_packet(
    grid: tuple[int, ...], num_threads: int, scratch_bytes: int, lds_bytes: int, kernarg: int
) -> bytes:
    """The packet of the HSA Platform System Architecture Specification, section "Kernel dispatch packet"."""
    sizes = (0x1502, 3, num_threads, 1, 1, 0, grid[0] * num_threads, grid[1], grid[2], scratch_bytes, lds_bytes)
    return struct.pack("<6H5I3Q", *sizes, 0, kernarg, 0) + bytes(64)


def _user_registers(program: Program, kernarg: int, packet: int) -> list[int]:
    """Initial values of the scalar registers that the kernel descriptor enables, in their fixed order."""
    values = {
        "private_segment_buffer": [0] * 4,
        "dispatch_ptr": [packet & 0xFFFFFFFF, packet >> 32],
        "queue_ptr": [0, 0],
        "kernarg_segment_ptr": [kernarg & 0xFFFFFFFF, kernarg >> 32],
        "dispatch_id": [0, 0],
        "flat_scratch_init": [0, 0],
        "private_segment_size": [0],
    }
    asked = [values[key] for key in values if program.descriptor.get(f"user_sgpr_{key}", 0)]
    return [dword for value in asked for dword in value]
