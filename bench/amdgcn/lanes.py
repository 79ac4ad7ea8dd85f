"""Data movement between lanes: DPP, readlane and writelane, permutations by index.

Semantics: ISA manuals, chapter "Vector ALU Operations", sections on DPP; chapter "Instructions", encodings VOP1, VOP3
and DS (permutes do not access the LDS).
"""

import re
from collections.abc import Callable, Mapping

import numpy as np

from .errors import UnsupportedInstruction
from .gang import Gang, Step
from .operands import current, destination, source, vector_register
from .program import Instruction

_DPP = re.compile(
    r"quad_perm|row_mirror|row_half_mirror|row_bcast|dpp8|(row|wave)_(shl|shr|ror|rol|share|xmask|newbcast)"
)


def is_permutation(modifier: str) -> bool:
    """Whether a modifier is a DPP lane selection."""
    return _DPP.fullmatch(modifier) is not None


class Permutation:
    """A DPP modifier: the lane from which each lane reads source 0, and the lanes that may be written."""

    def __init__(self, gang: Gang, modifiers: Mapping):
        kind = next(key for key in modifiers if is_permutation(key))
        lane = np.arange(gang.wave_size)
        from_lane, valid = _sources(kind, modifiers[kind], lane, gang.wave_size)
        self._gang = gang
        self._from = np.where(valid, from_lane, 0)
        self._valid = valid
        self._fetch_inactive = str(modifiers.get("fi", "0")) != "0"
        self._zero_invalid = "bound_ctrl" in modifiers
        rows, banks = (int(str(modifiers.get(key, "0xf")), 0) for key in ("row_mask", "bank_mask"))
        self._enabled = (rows >> (lane >> 4) & 1).astype(bool) & (banks >> ((lane & 15) >> 2) & 1).astype(bool)

    def _readable(self) -> np.ndarray:
        if self._fetch_inactive:
            return np.broadcast_to(self._valid, self._gang.exec.shape)
        return self._valid & self._gang.exec[:, self._from]

    def permute(self, value: np.ndarray) -> np.ndarray:
        """The permuted value; 0 where the source lane cannot be read."""
        value = np.broadcast_to(value, self._gang.exec.shape)
        return np.where(self._readable(), value[:, self._from], np.zeros((), value.dtype))

    def writable(self) -> np.ndarray:
        """The lanes that the instruction may write."""
        return self._enabled if self._zero_invalid else self._enabled & self._readable()


def permutation(gang: Gang, instruction: Instruction) -> Permutation | None:
    """The instruction's DPP modifier, if it has one."""
    if any(map(is_permutation, instruction.modifiers)):
        return Permutation(gang, instruction.modifiers)
    if "dpp" in instruction.encoding:
        raise UnsupportedInstruction(f"unsupported lane permutation of {instruction}")
    return None


def _sources(kind: str, value, lane: np.ndarray, wave_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(source lane, whether it exists) for each lane."""
    row, column, everywhere = lane & ~15, lane & 15, np.ones(wave_size, bool)
    if kind in ("quad_perm", "dpp8"):
        size = len(value)
        return lane // size * size + np.array(value)[lane % size], everywhere
    if kind == "row_mirror":
        return row + 15 - column, everywhere
    if kind == "row_half_mirror":
        return row + (column & 8) + 7 - (column & 7), everywhere
    distance = int(value, 0) if isinstance(value, str) else 1
    if kind == "row_bcast":
        # lane 15 of each row to the next row, or lane 31 to the upper half
        return (row - 1, lane >= 16) if distance == 15 else (np.full(wave_size, 31), lane >= 32)
    return {
        "row_shl": (lane + distance, column + distance <= 15),
        "row_shr": (lane - distance, column >= distance),
        "row_ror": (row + (column - distance & 15), everywhere),
        "row_share": (row + distance, everywhere),
        "row_newbcast": (row + distance, everywhere),
        "row_xmask": (row + (column ^ distance), everywhere),
        "wave_shl": (lane + 1, lane < wave_size - 1),
        "wave_shr": (lane - 1, lane > 0),
        "wave_rol": ((lane + 1) % wave_size, everywhere),
        "wave_ror": ((lane - 1) % wave_size, everywhere),
    }[kind]


def bind(gang: Gang, instruction: Instruction) -> Step | None:
    """Binds an instruction: returns a function that executes it on the gang; None if it is not in this file."""
    name, operands = instruction.name, instruction.operands
    if name in _READERS:
        return _READERS[name](gang, operands)
    if match := re.fullmatch(r"v_permlane(16|32)_swap_b32", name):
        return _swap_rows(gang, operands, int(match[1]))
    if match := re.fullmatch(r"v_permlane(x?)16_b32", name):
        return _permute_row(gang, instruction, other_row=bool(match[1]))
    if match := re.fullmatch(r"ds_(b?)permute_b32", name):
        return _permute_by_address(gang, instruction, backward=bool(match[1]))
    if name == "ds_swizzle_b32":
        return _swizzle(gang, instruction)
    return None


def _read_first_lane(gang: Gang, operands: tuple[str, ...]) -> Step:
    store, value = destination(gang, operands[0], "b32"), source(gang, operands[1], "b32")

    def step() -> None:
        lanes = np.broadcast_to(current(value), gang.exec.shape)
        store(np.take_along_axis(lanes, gang.exec.argmax(1)[:, None], 1))

    return step


def _read_lane(gang: Gang, operands: tuple[str, ...]) -> Step:
    store, value = destination(gang, operands[0], "b32"), source(gang, operands[1], "b32")
    lane = source(gang, operands[2], "u32")

    def step() -> None:
        index = np.broadcast_to(current(lane) & (gang.wave_size - 1), (gang.num_waves, 1)).astype(np.int64)
        store(np.take_along_axis(np.broadcast_to(current(value), gang.exec.shape), index, 1))

    return step


def _write_lane(gang: Gang, operands: tuple[str, ...]) -> Step:
    view = gang.v[vector_register(operands[0]).index]
    value, lane = source(gang, operands[1], "b32"), source(gang, operands[2], "u32")
    all_lanes = np.arange(gang.wave_size)

    def step() -> None:
        chosen = all_lanes == (current(lane) & (gang.wave_size - 1))
        np.copyto(view, current(value), where=chosen & gang.waves)

    return step


def _swap_halves(gang: Gang, operands: tuple[str, ...]) -> Step:
    store, value = destination(gang, operands[0], "b32"), source(gang, operands[1], "b32")
    if gang.wave_size == 32:
        return lambda: None
    return lambda: store(np.roll(current(value), 32, axis=1))


def _swap_registers(gang: Gang, operands: tuple[str, ...]) -> Step:
    views = [gang.v[vector_register(text).index] for text in operands]

    def step() -> None:
        first = views[0].copy()
        np.copyto(views[0], views[1], where=gang.mask)
        np.copyto(views[1], first, where=gang.mask)

    return step


_READERS: dict[str, Callable] = {
    "v_readfirstlane_b32": _read_first_lane,
    "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane,
    "v_permlane64_b32": _swap_halves,
    "v_swap_b32": _swap_registers,
}


def _swap_rows(gang: Gang, operands: tuple[str, ...], width: int) -> Step:
    """Swaps the odd rows of `width` lanes of the first register with the even rows of the second."""
    first, second = (gang.v[vector_register(text).index] for text in operands)
    shape = (gang.num_waves, gang.wave_size // (2 * width), 2, width)

    def step() -> None:
        a, b = first.reshape(shape), second.reshape(shape)
        new_a = np.stack([a[:, :, 0], b[:, :, 0]], 2).reshape(first.shape)
        new_b = np.stack([a[:, :, 1], b[:, :, 1]], 2).reshape(first.shape)
        np.copyto(first, new_a, where=gang.mask)
        np.copyto(second, new_b, where=gang.mask)

    return step


def _permute_row(gang: Gang, instruction: Instruction, *, other_row: bool) -> Step:
    operands = instruction.operands
    old = gang.v[vector_register(operands[0]).index]
    store, value = destination(gang, operands[0], "b32"), source(gang, operands[1], "b32")
    low, high = source(gang, operands[2], "u32"), source(gang, operands[3], "u32")
    fetch_inactive, zero_invalid = instruction.bits("op_sel", (0, 0))[:2]
    lane = np.arange(gang.wave_size)

    def step() -> None:
        select = np.where(lane & 8, current(high), current(low)) >> (4 * (lane & 7)).astype(np.uint32) & 15
        from_lane = ((lane & ~15) + select.astype(np.int64)) ^ (16 if other_row else 0)
        from_lane = np.broadcast_to(from_lane, gang.exec.shape)
        readable = fetch_inactive or np.take_along_axis(gang.exec, from_lane, 1)
        lanes = np.broadcast_to(current(value), gang.exec.shape)
        store(np.where(readable, np.take_along_axis(lanes, from_lane, 1), np.uint32(0) if zero_invalid else old))

    return step


def _permute_by_address(gang: Gang, instruction: Instruction, *, backward: bool) -> Step:
    """ds_bpermute: each lane reads from lane address / 4; ds_permute: each lane writes to it."""
    operands = instruction.operands
    store = destination(gang, operands[0], "b32")
    address, value = (gang.v[vector_register(text).index] for text in operands[1:])
    offset = instruction.number("offset")

    def step() -> None:
        lane = ((address.astype(np.int64) + offset) >> 2) & (gang.wave_size - 1)
        if backward:
            readable = np.take_along_axis(gang.exec, lane, 1)
            store(np.where(readable, np.take_along_axis(value, lane, 1), np.uint32(0)))
            return
        result = np.zeros_like(value)
        waves, lanes = np.nonzero(gang.exec)
        result[waves, lane[waves, lanes]] = value[waves, lanes]
        store(result)

    return step


def _swizzle(gang: Gang, instruction: Instruction) -> Step:
    """Permutes groups of 32 lanes: by bit masks (and, or, xor) on the lane's index, or within each group of four."""
    store = destination(gang, instruction.operands[0], "b32")
    value = source(gang, instruction.operands[1], "b32")
    offset, lane = _swizzle_code(instruction), np.arange(gang.wave_size)
    if offset & 0x8000:
        from_lane = (lane & ~3) + (offset >> (2 * (lane & 3)) & 3)
    else:
        and_mask, or_mask, xor_mask = offset & 31, offset >> 5 & 31, offset >> 10 & 31
        from_lane = (lane & ~31) + (((lane & 31 & and_mask) | or_mask) ^ xor_mask)

    def step() -> None:
        readable = gang.exec[:, from_lane]
        store(np.where(readable, np.broadcast_to(current(value), gang.exec.shape)[:, from_lane], np.uint32(0)))

    return step


def _swizzle_code(instruction: Instruction) -> int:
    """The 16-bit code of offset:5, offset:swizzle(SWAP,16) and the assembler's other forms."""
    text = str(instruction.modifiers.get("offset", "0"))
    match = re.fullmatch(r"swizzle\((\w+),(.*)\)", text)
    if match is None:
        return int(text, 0)
    kind, items = match[1], [item.strip().strip('"') for item in match[2].split(",")]
    if kind == "SWAP":
        return int(items[0]) << 10 | 31
    if kind == "REVERSE":
        return int(items[0]) - 1 << 10 | 31
    if kind == "BROADCAST":
        return int(items[1]) << 5 | 32 - int(items[0])
    if kind == "QUAD_PERM":
        return 0x8000 | sum(int(item) << 2 * i for i, item in enumerate(items))
    if kind == "BITMASK_PERM":  # what becomes of each bit of the lane's index, the highest first
        codes = {"0": 0, "1": 1 << 5, "p": 1, "i": 1 | 1 << 10}
        return sum(codes[letter] << bit for bit, letter in enumerate(reversed(items[0])))
    raise UnsupportedInstruction(f"unsupported swizzle of {instruction}")
