"""Global memory and scratch: loads, stores and atomics, each checked against the bounds of its buffer.

Semantics: ISA manuals, chapters "Vector Memory Operations" and "Flat, Scratch and Global"; chapter "Instructions",
encodings SMEM, MUBUF (VBUFFER) and FLAT (VFLAT, VGLOBAL, VSCRATCH).
"""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np

from .errors import MemoryFault, UnsupportedInstruction
from .gang import M0, Gang, Step
from .operands import Register, constant, current, register, source, vector_register
from .program import Instruction
from .storage import SIZES


def bind(gang: Gang, instruction: Instruction) -> Step:
    """Binds an instruction: returns a function without arguments that executes it on the gang."""
    name = instruction.name
    if name.startswith("s_load_"):
        return _scalar_load(gang, instruction)
    if name.startswith("global_load_lds_"):
        return _load_to_lds(gang, instruction, _flat_address(gang, instruction, instruction.operands), SIZES[name[16:]])
    if match := re.fullmatch(r"(global|flat)_(load|store)_(\w+)", name):
        first, second, *base = instruction.operands
        data, address = (first, second) if match[2] == "load" else (second, first)
        places = _flat_address(gang, instruction, (address, *base))
        return _access(gang, instruction, match[2], Width.of(match[3], data), places, Global(gang, instruction))
    if match := re.fullmatch(r"scratch_(load|store)_(\w+)", name):
        first, second, *base = instruction.operands
        data, address = (first, second) if match[1] == "load" else (second, first)
        places = _scratch_address(gang, instruction, address, base)
        return _access(gang, instruction, match[1], Width.of(match[2], data), places, Scratch(gang, instruction))
    if match := re.fullmatch(r"buffer_(load|store)_(\w+)", name):
        return _buffer(gang, instruction, match[1], match[2])
    if match := re.fullmatch(r"(global|flat|buffer)_atomic_(\w+)", name):
        return _atomic(gang, instruction, match[1], match[2])
    raise UnsupportedInstruction(f"unsupported instruction {instruction}")


class Width:
    """The size of an access, and its layout in the data register."""

    def __init__(self, size: int, reg: Register, *, signed: bool, keep_other_half: bool, half: int):
        self.size, self.reg = size, reg
        self.signed, self.keep_other_half, self.half = signed, keep_other_half, half

    @classmethod
    def of(cls, suffix: str, data: str) -> "Width":
        """From an instruction's suffix ('b128', 'd16_hi_b16', 'short_d16_hi') and its data operand."""
        kind = re.sub(r"_?d16(_hi)?_?", "", suffix)
        if kind not in SIZES:
            raise UnsupportedInstruction(f"unsupported memory access of kind {suffix!r}")
        reg = vector_register(data)
        high = "_hi" in suffix or reg.half == 1
        return cls(
            SIZES[kind],
            reg,
            signed=kind in ("i8", "i16", "sbyte", "sshort"),
            keep_other_half="d16" in suffix,
            half=int(high),
        )

    def load(self, gang: Gang, lanes: np.ndarray, data: np.ndarray) -> None:
        """Writes the result of Memory.read to the register, in these lanes."""
        v, first = gang.flat_v, self.reg.index
        if self.size >= 4:
            v[first : first + self.size // 4, lanes] = data.T
            return
        value = data.view(f"{'i' if self.signed else 'u'}{self.size}")[:, 0].astype(np.int32).view(np.uint32)
        if self.keep_other_half:
            shift = np.uint32(16 * self.half)
            kept = v[first, lanes] & (np.uint32(0xFFFF0000) >> shift)
            value = kept | (value & np.uint32(0xFFFF)) << shift
        v[first, lanes] = value

    def store(self, gang: Gang, lanes: np.ndarray) -> np.ndarray:
        """The register's data in these lanes, as Memory.write takes it."""
        v, first = gang.flat_v, self.reg.index
        if self.size >= 4:
            return np.ascontiguousarray(v[first : first + self.size // 4, lanes].T)
        value = v[first, lanes] >> np.uint32(16 * self.half)
        return np.ascontiguousarray(value).view(np.uint8).reshape(-1, 4)[:, : self.size]


class Global:
    """Global memory, accessed by one instruction."""

    def __init__(self, gang: Gang, instruction: Instruction):
        self._memory, self._instruction = gang.memory, instruction

    def read(self, places: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        return self._memory.read(places, size, self._instruction)

    def write(self, places: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        self._memory.write(places, data, self._instruction)


class Scratch:
    """The lanes' private memory, accessed by one instruction."""

    def __init__(self, gang: Gang, instruction: Instruction):
        self._scratch, self._instruction = gang.scratch, instruction

    def read(self, places: np.ndarray, size: int, lanes: np.ndarray) -> np.ndarray:
        octets = self._scratch[lanes[:, None], self._checked(places, size)]
        return octets.view(np.uint32) if size % 4 == 0 else octets

    def write(self, places: np.ndarray, data: np.ndarray, lanes: np.ndarray) -> None:
        octets = np.ascontiguousarray(data).view(np.uint8)
        self._scratch[lanes[:, None], self._checked(places, octets.shape[1])] = octets

    def _checked(self, places: np.ndarray, size: int) -> np.ndarray:
        held = self._scratch.shape[1]
        if ((places < 0) | (places + size > held)).any():
            raise MemoryFault(f"scratch at {places.min()}..{places.max() + size} of {held} bytes, {self._instruction}")
        return places[:, None] + np.arange(size)


def _access(
    gang: Gang,
    instruction: Instruction,
    verb: str,
    width: Width,
    address: Callable[[np.ndarray], np.ndarray],
    space: Global | Scratch,
) -> Step:
    def load() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            width.load(gang, lanes, space.read(address(lanes), width.size, lanes))

    def store() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            space.write(address(lanes), width.store(gang, lanes), lanes)

    return load if verb == "load" else store


def _per_lane(gang: Gang, text: str, type: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns an operand as int64 in the given lanes."""
    value = source(gang, text, type)
    shape = (gang.num_waves, gang.wave_size)
    return lambda lanes: np.broadcast_to(current(value), shape).reshape(-1)[lanes].astype(np.int64)


def _flat_address(gang: Gang, instruction: Instruction, operands: tuple[str, ...]) -> Callable:
    """The address of a global or flat access: a register pair, or a scalar pair plus a 32-bit register."""
    address, base = operands[0], operands[1] if len(operands) > 1 else "off"
    offset = instruction.number("offset")
    if base == "off":
        if address == "off":
            raise UnsupportedInstruction(f"unsupported access without an address in {instruction}")
        low, high = (gang.flat_v[vector_register(address).index + i] for i in range(2))
        return lambda lanes: (low[lanes].astype(np.int64) | high[lanes].astype(np.int64) << 32) + offset
    start = _per_lane(gang, base, "u64")
    if address == "off":
        return lambda lanes: start(lanes) + offset
    index = gang.flat_v[vector_register(address).index]
    return lambda lanes: start(lanes) + index[lanes].astype(np.int64) + offset


def _scratch_address(gang: Gang, instruction: Instruction, address: str, base: list[str]) -> Callable:
    offset = instruction.number("offset")
    parts = [_per_lane(gang, text, "u32") for text in (address, *base) if text != "off"]
    return lambda lanes: sum((part(lanes) for part in parts), np.full(len(lanes), offset))


def _scalar_load(gang: Gang, instruction: Instruction) -> Step:
    kind, operands = instruction.name.removeprefix("s_load_"), instruction.operands
    size = SIZES.get(kind) or {"dwordx8": 32, "dwordx16": 64, "b256": 32, "b512": 64}.get(kind)
    reg = register(operands[0])
    if size is None or reg is None or reg.file != "s":
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    base = source(gang, operands[1], "u64")
    offset = source(gang, operands[2], "i64" if constant(operands[2], "i64") is not None else "u32")
    more = instruction.number("offset")
    signed = kind in ("i8", "i16")

    def step() -> None:
        waves = np.arange(gang.num_waves) if gang.waves is True else np.flatnonzero(gang.waves)
        address = current(base).astype(np.int64) + current(offset).astype(np.int64) + more
        data = gang.memory.read(address[waves, 0], size, instruction)
        if size < 4:
            data = data.view(f"{'i' if signed else 'u'}{size}").astype(np.int32).view(np.uint32)
        gang.s[waves[:, None], reg.index + np.arange(data.shape[1])] = data

    return step


def _load_to_lds(gang: Gang, instruction: Instruction, address: Callable, size: int) -> Step:
    """Loads from global memory directly into the LDS, at M0 and in the order of the lanes."""
    base, offset = gang.s[:, M0], instruction.number("offset")

    def step() -> None:
        lanes = gang.active_lanes()
        data = gang.memory.read(address(lanes), size, instruction)
        start = (base[gang.wave_of_lane[lanes]] & 0x3FFFF).astype(np.int64)
        gang.lds.write(start + offset + lanes % gang.wave_size * size, data, lanes, instruction)

    return step


class Descriptor:
    """Addresses through a buffer resource: lanes outside of its range are inactive.

    Triton gives masked lanes such addresses. Addresses in range must still be in a real buffer.
    """

    def __init__(self, gang: Gang, instruction: Instruction, index: str, resource: str, base: str):
        reg = register(resource)
        if reg is None or "idxen" in instruction.modifiers:
            raise UnsupportedInstruction(f"unsupported instruction {instruction}")
        self._offset, self._more = instruction.number("offset"), _per_lane(gang, base, "u32")
        self._start = _per_lane(gang, f"s[{reg.index}:{reg.index + 1}]", "u64")
        self._num_bytes = _per_lane(gang, f"s{reg.index + 2}", "u32")
        self._index = _per_lane(gang, index, "u32") if "offen" in instruction.modifiers else None

    def __call__(self, lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(addresses of the lanes that are in range, bool[lanes]: which are)."""
        at = np.full(len(lanes), self._offset, np.int64)
        if self._index is not None:
            at += self._index(lanes)
        inside = at + size <= self._num_bytes(lanes)
        return ((self._start(lanes) & 0xFFFFFFFFFFFF) + self._more(lanes) + at)[inside], inside


def _buffer(gang: Gang, instruction: Instruction, verb: str, suffix: str) -> Step:
    """Accesses through a descriptor: outside of its range loads return 0 and stores do nothing."""
    to_lds = "lds" in instruction.modifiers
    data, *where = ("", *instruction.operands) if to_lds else instruction.operands
    address = Descriptor(gang, instruction, *where)
    width = None if to_lds else Width.of(suffix, data)
    size = SIZES[suffix] if width is None else width.size
    offset, to_memory = instruction.number("offset"), gang.s[:, M0]

    def load() -> None:
        lanes = gang.active_lanes()
        places, inside = address(lanes, size)
        data = np.zeros((len(lanes), size // 4), np.uint32) if size % 4 == 0 else np.zeros((len(lanes), size), np.uint8)
        if places.size:
            data[inside] = gang.memory.read(places, size, instruction)
        if width is not None:
            width.load(gang, lanes, data)
        elif lanes.size:
            first = (to_memory[gang.wave_of_lane[lanes]] & 0xFFFF).astype(np.int64)
            gang.lds.write(first + offset + lanes % gang.wave_size * size, data, lanes, instruction)

    def store() -> None:
        lanes = gang.active_lanes()
        places, inside = address(lanes, size)
        if places.size and width is not None:
            gang.memory.write(places, width.store(gang, lanes[inside]), instruction)

    return load if verb == "load" else store


# name: (dtype, function (old, operand) -> new). RDNA's and CDNA's names; pk: two elements in a dword.
ATOMICS: dict[str, tuple[np.dtype, Callable]] = {}
for bits, wide in ((32, ""), (64, "_x2")):
    u, i = np.dtype(f"u{bits // 8}"), np.dtype(f"i{bits // 8}")
    for names, dtype, compute in (
        (f"add_u{bits} add{wide}", u, np.add),
        (f"sub_u{bits} sub{wide}", u, np.subtract),
        (f"min_u{bits} umin{wide}", u, np.minimum),
        (f"max_u{bits} umax{wide}", u, np.maximum),
        (f"min_i{bits} smin{wide}", i, np.minimum),
        (f"max_i{bits} smax{wide}", i, np.maximum),
        (f"and_b{bits} and{wide}", u, np.bitwise_and),
        (f"or_b{bits} or{wide}", u, np.bitwise_or),
        (f"xor_b{bits} xor{wide}", u, np.bitwise_xor),
        (f"swap_b{bits} swap{wide}", u, lambda old, new: new),
    ):
        ATOMICS |= dict.fromkeys(names.split(), (dtype, compute))
for names, kind, compute in (
    ("add_f32", np.float32, np.add),
    ("min_f32 min_num_f32", np.float32, np.fmin),
    ("max_f32 max_num_f32", np.float32, np.fmax),
    ("add_f64", np.float64, np.add),
    ("pk_add_f16", np.float16, np.add),
    ("pk_add_bf16", ml_dtypes.bfloat16, np.add),
):
    ATOMICS |= dict.fromkeys(names.split(), (np.dtype(kind), compute))
# Size of an element. The operand has the new value first, then the expected one.
_COMPARE_AND_SWAP = {"cmpswap": 4, "cmpswap_b32": 4, "cmpswap_x2": 8, "cmpswap_b64": 8}


def _atomic(gang: Gang, instruction: Instruction, space: str, kind: str) -> Step:
    """Executes lane by lane, in order."""
    modifiers, operands = instruction.modifiers, instruction.operands
    if kind not in ATOMICS and kind not in _COMPARE_AND_SWAP:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    returns = "glc" in modifiers or "sc0" in modifiers or "TH_ATOMIC_RETURN" in str(modifiers.get("th", ""))
    dtype, compute = ATOMICS.get(kind, (np.dtype(np.uint32), None))
    size = _COMPARE_AND_SWAP.get(kind) or max(4, dtype.itemsize)
    if space == "buffer":
        # the old value is returned in the operand's register
        data, *where = operands
        into, address = data, Descriptor(gang, instruction, *where)
    else:
        into, place, data, *base = operands if returns else ("", *operands)
        flat = _flat_address(gang, instruction, (place, *base))

        def address(lanes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
            return flat(lanes), np.ones(len(lanes), bool)

    operand = Width.of(f"b{8 * size}" if compute else f"b{16 * size}", data)
    result = Width.of(f"b{8 * size}", into) if returns else None

    def step() -> None:
        lanes = gang.active_lanes()
        places, inside = address(lanes, size)
        old = np.zeros((len(lanes), size // 4), np.uint32)
        for lane, place in zip(np.flatnonzero(inside), places, strict=True):
            value = operand.store(gang, lanes[lane : lane + 1])
            old[lane] = before = gang.memory.read(place[None], size, instruction)
            if compute is not None:
                after = compute(before.view(dtype), value.view(dtype)).astype(dtype, copy=False).view(np.uint32)
            else:
                new, expected = np.split(value, 2, axis=1)
                after = new if (before == expected).all() else before
            gang.memory.write(place[None], after, instruction)
        if result is not None:
            result.load(gang, lanes, old)

    return step
