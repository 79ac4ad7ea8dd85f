"""The machine: waves in lockstep, their registers, and the order in which they run.

A gang is a number of workgroups whose waves execute together: an instruction is one NumPy call over all of their
lanes. Waves that have gone another way are masked out until the gang meets again; the waves furthest behind run first.
Not modelled: time, wait counts and other hazards, cache coherence, flush modes, and how a matrix instruction rounds
between its products.
"""

import dataclasses
import struct
from collections.abc import Callable, Sequence

import numpy as np

from . import lanes, lds, matrix, memory, scalar, vector
from .errors import Deadlock, UnsupportedInstruction
from .lds import LDS
from .memory import Memory
from .operands import EXEC, NULL, NUM_SCALARS, TRAP_TEMPORARIES
from .program import Instruction, Program, parse

# Lanes in a gang: enough to spread the cost of a NumPy call, few enough that its operands stay in the cache (measured:
# bench/LOG.md).
LANES = 1024
MAX_BLOCKS = 5_000_000  # far above any kernel that ends: minutes
_UNSET = 0xFFEDFFED  # what a register holds before it is written: NaN as float32, float16 and bfloat16

Step = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Run:
    """What came of a kernel: per argument its array afterwards (None for a number)."""

    outputs: tuple[np.ndarray | None, ...]
    instructions: int  # executed by waves; waits and hints are not counted
    races: tuple[str, ...]


def run(
    asm: str,
    args: Sequence[np.ndarray | int | float],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    lds_bytes: int,
    max_blocks: int = MAX_BLOCKS,
) -> Run:
    """Runs a kernel over a grid of up to three dimensions, one workgroup of num_warps waves per point.

    args: an array for every pointer in order, and numbers for the others; arrays are not modified. lds_bytes: what
    Triton calls `metadata.shared`. max_blocks: how many straight pieces of the program a gang may run.

    Raises:
      UnsupportedInstruction: before anything runs, for an instruction that is not built in.
      MemoryFault: an access outside its buffer.
      Deadlock: waves that never meet at a barrier, or never end.
    """
    program = parse(asm)
    store = Memory()
    grid, threads = (*grid, 1, 1)[:3], num_warps * program.wave_size
    kernarg, arrays = _kernarg(program, args, grid, threads, store)
    workgroups = np.indices(grid[::-1]).reshape(3, -1)[::-1].T  # x, y, z of each; x runs fastest
    together = max(1, min(len(workgroups), LANES // threads))
    packet = _dispatch_packet(grid, threads, program.scratch_bytes, lds_bytes, kernarg)
    initial = _user_registers(program, kernarg, store.add(packet, "the dispatch packet", writable=False))
    instructions, races = 0, {}
    gang = None
    with np.errstate(all="ignore"):
        for first in range(0, len(workgroups), together):
            some = workgroups[first : first + together]
            if gang is None or gang.num_workgroups != len(some):
                gang = Gang(program, len(some), num_warps, store, lds_bytes)
            gang.start(some, initial)
            gang.run(max_blocks)
            instructions += gang.executed
            races |= dict.fromkeys(gang.lds.races)
    outputs = tuple(
        None if place is None else store.content(place).view(np.asarray(arg).dtype).reshape(np.shape(arg))
        for arg, place in zip(args, arrays, strict=True)
    )
    return Run(outputs, instructions, tuple(races))


class Gang:
    """The state of waves that run in lockstep, and their program bound to it."""

    def __init__(self, program: Program, num_workgroups: int, num_warps: int, store: Memory, lds_bytes: int):
        self.program, self.wave_size = program, program.wave_size
        self.num_workgroups, self.num_warps = num_workgroups, num_warps
        self.num_waves = num_workgroups * num_warps
        shape = (self.num_waves, self.wave_size)
        self.v = np.empty((512 if program.is_cdna else 256, *shape), np.uint32)
        self.flat_v = self.v.reshape(len(self.v), -1)
        self.s = np.empty((self.num_waves, NUM_SCALARS), np.uint32)
        self.scc = np.zeros((self.num_waves, 1), bool)
        self.scratch = np.empty((self.num_waves * self.wave_size, program.scratch_bytes), np.uint8)
        self.memory = store
        self.workgroup = np.repeat(np.arange(num_workgroups), num_warps)  # of a wave
        self.wave_of_lane = np.repeat(np.arange(self.num_waves), self.wave_size)
        self.lds = LDS(self, lds_bytes)
        # who runs: waves[wave, 1] and mask[wave, lane] are True when all do
        self.exec = np.ones(shape, bool)
        self.waves: np.ndarray | bool = True
        self.mask: np.ndarray | bool = True
        self._all_lanes = np.arange(self.num_waves * self.wave_size)
        self._lanes: np.ndarray | None = None
        self.end = len(program.blocks)
        self.next_block = np.zeros((self.num_waves, 1), np.int64)
        self.waiting = np.zeros((self.num_waves, 1), bool)  # at a barrier
        self.signalled = np.zeros((self.num_waves, 1), bool)  # gfx12: has signalled the barrier
        self.executed = 0
        self.blocks = [[bind(self, instruction) for instruction in block.instructions] for block in program.blocks]

    def start(self, workgroups: np.ndarray, user_registers: Sequence[int]) -> None:
        """Puts the waves of these workgroups (x, y, z each) at the kernel's entry.

        Initial registers: "User Guide for AMDGPU Backend", section "Initial Kernel Execution State".
        """
        self.v.fill(_UNSET)
        self.s.fill(_UNSET)
        self.scratch.fill(0xFF)
        self.s[:, NULL] = 0
        self.s[:, : len(user_registers)] = user_registers
        x, y, z = np.repeat(workgroups, self.num_warps, axis=0).T
        warp = np.arange(self.num_waves) % self.num_warps
        self.v[0] = warp[:, None] * self.wave_size + np.arange(self.wave_size)
        descriptor = self.program.descriptor
        if self.program.target.startswith("gfx12"):
            for temporary, value in ((7, y | z << 16), (8, warp << 25), (9, x)):
                self.s[:, TRAP_TEMPORARIES + temporary] = value
        else:
            at = descriptor.get("user_sgpr_count", len(user_registers))
            for axis, index in (("x", x), ("y", y), ("z", z)):
                if descriptor.get(f"system_sgpr_workgroup_id_{axis}", 0):
                    self.s[:, at] = index
                    at += 1
        self.s[:, EXEC : EXEC + 2] = (0xFFFFFFFF, 0xFFFFFFFF if self.wave_size == 64 else 0)
        self.next_block.fill(0)
        self.waiting.fill(False)
        self.signalled.fill(False)
        self.waves = True
        self.exec_changed()
        self.lds.start()
        self.executed = 0

    def run(self, max_blocks: int) -> None:
        """Runs the waves until all have ended."""
        for _ in range(max_blocks):
            ahead = np.where(self.waiting, self.end, self.next_block)
            block = int(ahead.min())
            if block == self.end:
                if not self.waiting.any():
                    return
                self._pass_barrier()
                continue
            self._select(ahead == block)
            np.copyto(self.next_block, block + 1, where=self.waves)
            for step in self.blocks[block]:
                step()
            running = self.num_waves if self.waves is True else int(np.count_nonzero(self.waves))
            self.executed += running * len(self.blocks[block])
        raise Deadlock(f"{max_blocks:,} blocks of instructions have run without an end")

    def exec_changed(self) -> None:
        """Reads EXEC anew."""
        self.exec = self._read_exec()
        self._refresh()

    def active_lanes(self) -> np.ndarray:
        """Flat indices (wave * wave_size + lane) of the lanes that run."""
        if self.mask is True:
            return self._all_lanes
        if self._lanes is None:
            self._lanes = np.flatnonzero(self.mask)
        return self._lanes

    def _read_exec(self) -> np.ndarray:
        bits = np.ascontiguousarray(self.s[:, EXEC : EXEC + self.wave_size // 32])
        return np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(bool)

    def _select(self, waves: np.ndarray) -> None:
        everyone = bool(waves.all())
        if everyone and self.waves is True:
            return
        self.waves = True if everyone else waves
        self._refresh()

    def _refresh(self) -> None:
        mask = self.exec & self.waves
        self.mask = True if mask.all() else mask
        self._lanes = None

    def _pass_barrier(self) -> None:
        waiting = self.waiting.reshape(self.num_workgroups, self.num_warps)
        whole = waiting.all(1)
        if (waiting.any(1) & ~whole).any():
            raise Deadlock("waves wait at a barrier that others of their workgroup have ended without reaching")
        self.waiting.fill(False)
        self.lds.next_epoch(whole)


# Modifiers that some instruction here gives a meaning to, or that speak to a cache.
_KNOWN_MODIFIERS = {
    *("offset", "offset0", "offset1", "offen", "lds", "th", "scope", "glc", "slc", "dlc", "sc0", "sc1", "nt"),
    *("op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp", "mul", "div", "bitop3", "cbsz", "blgp"),
    *("src0_sel", "src1_sel", "dst_sel", "dst_unused", "row_mask", "bank_mask", "bound_ctrl", "fi"),
}


def bind(gang: Gang, instruction: Instruction) -> Step:
    """The instruction as a function without arguments that changes the gang."""
    name = instruction.name
    unknown = [key for key in instruction.modifiers if key not in _KNOWN_MODIFIERS and not lanes.is_permutation(key)]
    if unknown:
        raise UnsupportedInstruction(f"no meaning for the modifier {unknown[0]} of {instruction}")
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
    raise UnsupportedInstruction(f"no meaning for {instruction}")


def _kernarg(
    program: Program, args: Sequence[np.ndarray | int | float], grid: tuple[int, ...], num_threads: int, store: Memory
) -> tuple[int, list[int | None]]:
    """(address of the kernel's arguments, address of each array): arrays are copied into the machine's memory."""
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
        if place.kind == "global_buffer":
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
    """HSA Platform System Architecture Specification, section "Kernel dispatch packet"."""
    sizes = (0x1502, 3, num_threads, 1, 1, 0, grid[0] * num_threads, grid[1], grid[2], scratch_bytes, lds_bytes)
    return struct.pack("<6H5I3Q", *sizes, 0, kernarg, 0) + bytes(64)


def _user_registers(program: Program, kernarg: int, packet: int) -> list[int]:
    """The scalar registers that a wave finds set, in the order in which the descriptor may ask for them."""
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
