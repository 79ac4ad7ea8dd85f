"""The emulator's memory: buffers in global memory, and the LDS of each workgroup with race detection."""

from collections.abc import Callable

import numpy as np

from .errors import MemoryFault
from .program import Instruction

# Bytes of an access by the suffix of its name; RDNA's names, then CDNA's.
SIZES = {
    **{"u8": 1, "i8": 1, "b8": 1, "u16": 2, "i16": 2, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16},
    **{"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2},
    **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
}
_MANY = -2  # instead of a wave's index: more than one wave has read here


class Memory:
    """Buffers at artificial addresses, so far apart that an out-of-bounds index cannot reach another buffer."""

    _SPACING = 40  # bits: each buffer starts in the middle of its own address range of 2^40 bytes
    _MIDDLE = 1 << _SPACING - 1

    def __init__(self):
        self._names: list[str] = []
        self._writable: list[bool] = []
        self._starts = np.empty(0, np.int64)  # in the arena
        self._sizes = np.empty(0, np.int64)
        self._arena = np.empty(0, np.uint8)

    def add(self, content: bytes | np.ndarray, name: str, *, writable: bool) -> int:
        """Adds a buffer with this content and returns its address."""
        octets = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content
        start = -(-len(self._arena) // 16) * 16
        arena = np.zeros(-(-(start + len(octets)) // 16) * 16, np.uint8)
        arena[: len(self._arena)] = self._arena
        arena[start : start + len(octets)] = octets
        self._arena, self._dwords = arena, arena.view(np.uint32)
        self._starts = np.append(self._starts, start)
        self._sizes = np.append(self._sizes, len(octets))
        self._names.append(name)
        self._writable.append(writable)
        return (len(self._names) << self._SPACING) + self._MIDDLE

    def content(self, address: int, size: int | None = None) -> np.ndarray:
        """A copy of `size` bytes at an address; None: of the whole buffer that starts there."""
        start, held = self._place(address)
        return self._arena[start : start + (held if size is None else size)].copy()

    def fill(self, address: int, content: np.ndarray) -> None:
        """Replaces the bytes at an address."""
        start, _ = self._place(address)
        self._arena[start : start + len(content)] = content

    def _place(self, address: int) -> tuple[int, int]:
        """(index in the arena, bytes from there to the buffer's end)."""
        number = (address >> self._SPACING) - 1
        offset = (address & ((1 << self._SPACING) - 1)) - self._MIDDLE
        return int(self._starts[number]) + offset, int(self._sizes[number]) - offset

    def read(self, addresses: np.ndarray, size: int, instruction: Instruction) -> np.ndarray:
        """`size` bytes at each address: u32[n, size // 4], or u8[n, size] for less than a dword."""
        at = self._places(addresses, size, instruction, "read")
        if size % 4 == 0 and not (at & 3).any():
            return self._dwords[(at >> 2)[:, None] + np.arange(size // 4)]
        octets = self._arena[at[:, None] + np.arange(size)]
        return octets.view(np.uint32) if size % 4 == 0 else octets

    def write(self, addresses: np.ndarray, data: np.ndarray, instruction: Instruction) -> None:
        """Writes u32[n, k] or u8[n, k] at each address; if two lanes write to one place, the later lane wins."""
        at = self._places(addresses, data.shape[1] * data.itemsize, instruction, "write")
        if data.dtype == np.uint32 and not (at & 3).any():
            self._dwords[(at >> 2)[:, None] + np.arange(data.shape[1])] = data
            return
        octets = np.ascontiguousarray(data).view(np.uint8)
        self._arena[at[:, None] + np.arange(octets.shape[1])] = octets

    def _places(self, addresses: np.ndarray, size: int, instruction: Instruction, verb: str) -> np.ndarray:
        """Indices of the addresses in the arena; raises MemoryFault for addresses outside of every buffer."""
        number = (addresses >> self._SPACING) - 1
        known = (number >= 0) & (number < len(self._names))
        number = np.where(known, number, 0)
        offset = (addresses & ((1 << self._SPACING) - 1)) - self._MIDDLE
        inside = known & (offset >= 0) & (offset + size <= self._sizes[number])
        if not inside.all():
            worst = int(np.flatnonzero(~inside)[0])
            if not known[worst]:
                raise MemoryFault(f"{verb} of {size} bytes at the invalid address {addresses[worst]:#x}, {instruction}")
            name, held = self._names[number[worst]], self._sizes[number[worst]]
            raise MemoryFault(
                f"{verb} of {size} bytes at offset {offset[worst]} of {name} ({held} bytes), {instruction}"
            )
        if verb == "write" and not all(self._writable[i] for i in np.unique(number)):
            raise MemoryFault(f"write to {self._names[number[0]]}, which is read-only, {instruction}")
        return self._starts[number] + offset


class LDS:
    """The LDS of each workgroup; records for each unit which waves wrote and read it since the last barrier.

    A race is two waves that access the same bytes without a barrier between, of which at least one changes them: real
    waves run in any order.
    """

    def __init__(self, size: int, *, num_workgroups: int, num_warps: int, wave_size: int, unit: int):
        """unit: granularity in bytes at which accesses are tracked: the smallest access of the program."""
        self._size = size
        self._stride = -(-size // 16) * 16
        self._octets = np.empty(num_workgroups * self._stride, np.uint8)
        self._dwords = self._octets.view(np.uint32)
        self._num_waves = num_workgroups * num_warps
        self._wave = np.repeat(np.arange(self._num_waves), wave_size)  # of each lane
        self._workgroup = self._wave // num_warps
        self._first = self._workgroup * self._stride
        self._watch = num_warps > 1
        self._unit = unit
        units = len(self._octets) // unit
        # a wave's tag is epoch * num_waves + wave; epochs only increase, so an old tag is below every new one
        self._epoch = np.zeros(num_workgroups, np.int64)
        self._writer = np.full(units, -1, np.int64)
        self._reader = np.full(units, -1, np.int64)
        self._reader_epoch = np.full(units, -1, np.int64)
        self.races: dict[str, None] = {}

    def start(self) -> None:
        """Resets everything; memory that was not written reads as NaN."""
        self._octets.fill(0xFF)
        self._epoch += 1
        self.races.clear()

    def next_epoch(self, workgroups: np.ndarray) -> None:
        """Starts a new epoch in workgroups that passed a barrier: bool[workgroup]."""
        self._epoch += workgroups

    def read(self, addresses: np.ndarray, size: int, lanes: np.ndarray, instruction: Instruction) -> np.ndarray:
        """`size` bytes at each address: u32[n, size // 4], or u8[n, size] for less than a dword."""
        at = self._places(addresses, size, lanes, instruction, "read")
        if self._watch:
            self._note_read(at, size, lanes, instruction)
        if size % 4 == 0 and not (at & 3).any():
            return self._dwords[(at >> 2)[:, None] + np.arange(size // 4)]
        octets = self._octets[at[:, None] + np.arange(size)]
        return octets.view(np.uint32) if size % 4 == 0 else octets

    def write(self, addresses: np.ndarray, data: np.ndarray, lanes: np.ndarray, instruction: Instruction) -> None:
        """Writes u32[n, k] or u8[n, k] at each address; if two lanes write to one place, the later lane wins."""
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
        """Replaces the dword at an address by compute(dword), without race detection."""
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
            self._race("read of data that another wave has written", instruction)
        another = (self._reader_epoch[units] == epoch) & (self._reader[units] != wave)
        self._reader_epoch[units] = epoch
        self._reader[units] = np.where(another, _MANY, wave)
        # if several waves read the same unit in this instruction, the last one is stored and the others notice it
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
        """changed: bytes that differ from before; overwritten: bytes that a later lane of this instruction changed."""
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
            self._race("write over data that another wave has written", instruction)
        if ((self._reader_epoch[units] == epoch) & (self._reader[units] != wave) & changed).any():
            self._race("write over data that another wave has read", instruction)
