"""The LDS: memory that the waves of a workgroup share, and the races between them.

Meanings: ISA manuals, chapter "Data Share Operations"; chapter "Instructions", encoding DS. A race is two waves that
touch the same bytes, at least one of them writing other bytes than were there, with no barrier between: real waves run
in any order.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import MachineError, MemoryFault, UnsupportedInstruction
from .memory import ATOMICS, SIZES, Width
from .operands import vector_register
from .program import Instruction

if TYPE_CHECKING:
    from .machine import Gang, Step

_MANY = -2  # in place of a wave: more than one has read here


class LDS:
    """One stretch of memory per workgroup; for every unit of it who wrote and read it since the last barrier."""

    def __init__(self, gang: "Gang", size: int):
        self._size = size
        self._stride = -(-size // 16) * 16
        self._octets = np.empty(gang.num_workgroups * self._stride, np.uint8)
        self._dwords = self._octets.view(np.uint32)
        wave = np.repeat(np.arange(gang.num_waves), gang.wave_size)
        self._first = gang.workgroup[wave] * self._stride  # of a lane's workgroup
        self._wave = wave
        self._workgroup = gang.workgroup[wave]
        self._watch = gang.num_warps > 1
        # accesses are tracked in the smallest unit that the program moves
        kinds = [re.split(r"_", i.name)[-1] for block in gang.program.blocks for i in block.instructions]
        narrow = [SIZES[kind] for kind in kinds if kind in SIZES] or [4]
        self._unit = min(4, *narrow)
        units = len(self._octets) // self._unit
        # a wave's tag is epoch * num_waves + wave; epochs only grow, so an old tag is below every new one
        self._num_waves = gang.num_waves
        self._epoch = np.zeros(gang.num_workgroups, np.int64)
        self._writer = np.full(units, -1, np.int64)
        self._reader = np.full(units, -1, np.int64)
        self._reader_epoch = np.full(units, -1, np.int64)
        self.races: dict[str, None] = {}

    def start(self) -> None:
        """Forgets everything; memory that nobody wrote reads as NaN."""
        self._octets.fill(0xFF)
        self._epoch += 1
        self.races.clear()

    def next_epoch(self, workgroups: np.ndarray) -> None:
        """These workgroups have passed a barrier."""
        self._epoch += workgroups

    def read(self, addresses: np.ndarray, size: int, lanes: np.ndarray, instruction: Instruction) -> np.ndarray:
        """`size` bytes at each address: u32[n, size // 4], or u8[n, size] below a dword."""
        at = self._places(addresses, size, lanes, instruction, "read")
        if self._watch:
            self._note_read(at, size, lanes, instruction)
        if size % 4 == 0 and not (at & 3).any():
            return self._dwords[(at >> 2)[:, None] + np.arange(size // 4)]
        octets = self._octets[at[:, None] + np.arange(size)]
        return octets.view(np.uint32) if size % 4 == 0 else octets

    def write(self, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray, instruction: Instruction) -> None:
        """Writes u32[n, k] or u8[n, k] at each address; of two lanes at one place the later wins."""
        octets = np.ascontiguousarray(data).view(np.uint8)
        size = octets.shape[1]
        at = self._places(addresses, size, lanes, instruction, "write")
        place = at[:, None] + np.arange(size)
        changed = (self._octets[place] != octets) if self._watch else None
        if data.dtype == np.uint32 and not (at & 3).any():
            self._dwords[(at >> 2)[:, None] + np.arange(data.shape[1])] = data
        else:
            self._octets[place] = octets
        if changed is not None:
            self._note_write(at, size, lanes, changed, octets != self._octets[place], instruction)

    def update(self, address: np.ndarray, compute: Callable, lane: np.ndarray, instruction: Instruction) -> None:
        """Replaces the dword at an address by compute(dword), without regard to races."""
        at = self._places(address, 4, lane, instruction, "atomic") >> 2
        self._dwords[at] = compute(self._dwords[at])

    def _places(
        self, addresses: np.ndarray, size: int, lanes: np.ndarray, instruction: Instruction, verb: str
    ) -> np.ndarray:
        if ((addresses < 0) | (addresses + size > self._size)).any():
            low, high = addresses.min(), addresses.max() + size
            raise MemoryFault(f"LDS {verb} at {low}..{high} of {self._size} bytes, {instruction}")
        return self._first[lanes] + addresses

    def _units(self, at: np.ndarray, size: int) -> np.ndarray:
        return (at // self._unit)[:, None] + np.arange(-(-size // self._unit))

    def _race(self, what: str, instruction: Instruction) -> None:
        self.races[f"LDS {what} since the last barrier, {instruction}"] = None

    def _note_read(self, at: np.ndarray, size: int, lanes: np.ndarray, instruction: Instruction) -> None:
        units, wave, epoch = (
            self._units(at, size),
            self._wave[lanes][:, None],
            self._epoch[self._workgroup[lanes]][:, None],
        )
        oldest = epoch * self._num_waves
        writer = self._writer[units]
        if ((writer >= oldest) & (writer != oldest + wave)).any():
            self._race("read of what another wave has written", instruction)
        another = (self._reader_epoch[units] == epoch) & (self._reader[units] != wave)
        self._reader_epoch[units] = epoch
        self._reader[units] = np.where(another, _MANY, wave)
        # waves of this very instruction that read the same unit: the last one is noted, the others see it
        self._reader[units[self._reader[units] != wave]] = _MANY

    def _note_write(
        self,
        at: np.ndarray,
        size: int,
        lanes: np.ndarray,
        changed: np.ndarray,
        overwritten: np.ndarray,
        instruction: Instruction,
    ) -> None:
        """changed: bytes that differ from before; overwritten: bytes that another lane of this instruction wrote."""
        units, wave, epoch = (
            self._units(at, size),
            self._wave[lanes][:, None],
            self._epoch[self._workgroup[lanes]][:, None],
        )
        shape = (*units.shape, -1)
        changed, overwritten = changed.reshape(shape).any(2), overwritten.reshape(shape).any(2)
        tag = epoch * self._num_waves + wave
        writer = self._writer[units]
        other_wrote = (writer >= epoch * self._num_waves) & (writer != tag)
        self._writer[units] = tag
        other_writes = overwritten & (self._writer[units] != tag)
        if (other_wrote & changed).any() or other_writes.any():
            self._race("write over what another wave has written", instruction)
        if ((self._reader_epoch[units] == epoch) & (self._reader[units] != wave) & changed).any():
            self._race("write over what another wave has read", instruction)


def bind(gang: "Gang", instruction: Instruction) -> "Step":
    """The instruction as a function without arguments that changes the gang."""
    name = instruction.name
    if match := re.fullmatch(r"ds_read_b64_tr_b(8|16)", name):
        return _read_transposed(gang, instruction, int(match[1]))
    if match := re.fullmatch(r"ds_(read2|load_2addr|write2|store_2addr)(st64|_stride64)?_(b32|b64)", name):
        size = SIZES[match[3]]
        return _access_two(gang, instruction, match[1], size, size * (64 if match[2] else 1))
    if match := re.fullmatch(r"ds_(read|load|write|store)_(\w+)", name):
        return _access(gang, instruction, match[1], match[2])
    if match := re.fullmatch(r"ds_((?:add|max|min|max_num|min_num)_(?:f32|u32|i32))", name):
        return _atomic(gang, instruction, match[1])
    raise UnsupportedInstruction(f"no meaning for {instruction}")


def _address(gang: "Gang", text: str, offset: int) -> Callable[[np.ndarray], np.ndarray]:
    index = gang.flat_v[vector_register(text).index]
    return lambda lanes: index[lanes].astype(np.int64) + offset


def _access(gang: "Gang", instruction: Instruction, verb: str, suffix: str) -> "Step":
    first, second = instruction.operands
    loads = verb in ("read", "load")
    width = Width.of(suffix, first if loads else second)
    address = _address(gang, second if loads else first, instruction.number("offset"))

    def load() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            width.load(gang, lanes, gang.lds.read(address(lanes), width.size, lanes, instruction))

    def store() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            gang.lds.write(address(lanes), width.store(gang, lanes), lanes, instruction)

    return load if loads else store


def _access_two(gang: "Gang", instruction: Instruction, verb: str, size: int, stride: int) -> "Step":
    """Two values, at offset0 and offset1 in units of their size (or of 64 times it)."""
    operands, loads = instruction.operands, verb in ("read2", "load_2addr")
    text = operands[1] if loads else operands[0]
    addresses = [_address(gang, text, instruction.number(f"offset{i}") * stride) for i in range(2)]
    kind = {4: "b32", 8: "b64"}[size]
    if loads:
        first = vector_register(operands[0]).index
        widths = [Width.of(kind, f"v{first + i * size // 4}") for i in range(2)]
    else:
        widths = [Width.of(kind, text) for text in operands[1:]]

    def load() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            # both before the registers change: the address may be one of them
            both = [gang.lds.read(address(lanes), size, lanes, instruction) for address in addresses]
            for width, data in zip(widths, both, strict=True):
                width.load(gang, lanes, data)

    def store() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            for width, address in zip(widths, addresses, strict=True):
                gang.lds.write(address(lanes), width.store(gang, lanes), lanes, instruction)

    return load if loads else store


def _read_transposed(gang: "Gang", instruction: Instruction, bits: int) -> "Step":
    """gfx950: sixteen lanes hold rows of sixteen elements between them; lane i receives column i."""
    width = Width.of("b64", instruction.operands[0])
    address = _address(gang, instruction.operands[1], instruction.number("offset"))
    dtype = np.dtype(f"u{bits // 8}")
    rows = 8 // dtype.itemsize

    def step() -> None:
        lanes = gang.active_lanes()
        if lanes.size % gang.wave_size:
            raise MachineError(f"a transposed read with lanes switched off has no documented meaning, {instruction}")
        data = gang.lds.read(address(lanes), 8, lanes, instruction).view(dtype)
        columns = data.reshape(-1, rows, 16).swapaxes(1, 2)
        width.load(gang, lanes, np.ascontiguousarray(columns).reshape(-1, rows).view(np.uint32))

    return step


def _atomic(gang: "Gang", instruction: Instruction, kind: str) -> "Step":
    """Lane after lane; the order in which waves come does not count as a race."""
    address = _address(gang, instruction.operands[0], instruction.number("offset"))
    data = vector_register(instruction.operands[1]).index
    dtype, compute = ATOMICS[kind]

    def step() -> None:
        for lane in gang.active_lanes():
            lane = np.array([lane])
            operand = gang.flat_v[data, lane].view(dtype)
            gang.lds.update(
                address(lane),
                lambda old, x=operand: np.asarray(compute(old.view(dtype), x)).view(np.uint32),
                lane,
                instruction,
            )

    return step
