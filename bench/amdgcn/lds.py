"""ds_*: loads, stores and atomics in the LDS, the memory that the waves of a workgroup share.

Semantics: ISA manuals, chapter "Data Share Operations"; chapter "Instructions", encoding DS.
"""

import re
from collections.abc import Callable

import numpy as np

from .errors import MachineError, UnsupportedInstruction
from .gang import Gang, Step
from .memory import ATOMICS, Width
from .operands import vector_register
from .program import Instruction
from .storage import SIZES


def bind(gang: Gang, instruction: Instruction) -> Step:
    """Binds an instruction: returns a function without arguments that executes it on the gang."""
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
    raise UnsupportedInstruction(f"unsupported instruction {instruction}")


def _address(gang: Gang, text: str, offset: int) -> Callable[[np.ndarray], np.ndarray]:
    index = gang.flat_v[vector_register(text).index]
    return lambda lanes: index[lanes].astype(np.int64) + offset


def _access(gang: Gang, instruction: Instruction, verb: str, suffix: str) -> Step:
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


def _access_two(gang: Gang, instruction: Instruction, verb: str, size: int, stride: int) -> Step:
    """Accesses two values, at offset0 and offset1 in units of their size (or of 64 times it)."""
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
            # read both before writing registers: the address may be in one of them
            both = [gang.lds.read(address(lanes), size, lanes, instruction) for address in addresses]
            for width, data in zip(widths, both, strict=True):
                width.load(gang, lanes, data)

    def store() -> None:
        lanes = gang.active_lanes()
        if lanes.size:
            for width, address in zip(widths, addresses, strict=True):
                gang.lds.write(address(lanes), width.store(gang, lanes), lanes, instruction)

    return load if loads else store


def _read_transposed(gang: Gang, instruction: Instruction, bits: int) -> Step:
    """gfx950: sixteen lanes together read rows of sixteen elements; lane i receives column i."""
    width = Width.of("b64", instruction.operands[0])
    address = _address(gang, instruction.operands[1], instruction.number("offset"))
    dtype = np.dtype(f"u{bits // 8}")
    rows = 8 // dtype.itemsize

    def step() -> None:
        lanes = gang.active_lanes()
        if lanes.size % gang.wave_size:
            raise MachineError(f"a transposed read with inactive lanes is not documented, {instruction}")
        data = gang.lds.read(address(lanes), 8, lanes, instruction).view(dtype)
        columns = data.reshape(-1, rows, 16).swapaxes(1, 2)
        width.load(gang, lanes, np.ascontiguousarray(columns).reshape(-1, rows).view(np.uint32))

    return step


def _atomic(gang: Gang, instruction: Instruction, kind: str) -> Step:
    """Executes lane by lane; atomics of several waves do not count as a race."""
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
