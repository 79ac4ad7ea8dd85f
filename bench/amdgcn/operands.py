"""Operands: a register is a NumPy view into a register file, created once when an instruction is bound.

Vector registers are views [wave, lane], scalar registers [wave, 1]: the two broadcast against each other, so `source`
works for vector and scalar instructions. Constants and modifiers: ISA manuals, chapters "Shader Program State" and
"Vector ALU Operations" (inline constants, NEG, ABS, OPSEL, SDWA).
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np

from .errors import UnsupportedInstruction
from .gang import EXEC, M0, NULL, TRAP_TEMPORARIES, VCC, Gang

ACCUMULATORS = 256  # index of CDNA's a0, which follows v255

# The ISA manuals' names of operand types. b16 and b32 are untyped bits; bfloat16 is handled as bits.
TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        **{"f16": np.float16, "f32": np.float32, "f64": np.float64},
        **{"u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "i16": np.int16, "i32": np.int32, "i64": np.int64},
        **{"b16": np.uint16, "b32": np.uint32, "b64": np.uint64},
    }.items()
}

# An operand's value: a view that is always current, or a function that computes it.
Value = np.ndarray | Callable[[], np.ndarray]
Store = Callable[[np.ndarray], None]


@dataclasses.dataclass(frozen=True)
class Register:
    """file: 'v' vector (and accumulators) or 's' scalar; count: in dwords; half: 0 low, 1 high, None: the whole."""

    file: str
    index: int
    count: int = 1
    half: int | None = None


_NAMED = {
    "vcc": Register("s", VCC, 2),
    "vcc_lo": Register("s", VCC),
    "vcc_hi": Register("s", VCC + 1),
    "exec": Register("s", EXEC, 2),
    "exec_lo": Register("s", EXEC),
    "exec_hi": Register("s", EXEC + 1),
    "m0": Register("s", M0),
    "null": Register("s", NULL),
}


@functools.cache
def register(text: str) -> Register | None:
    """The register that an operand names; None for constants and other words."""
    if text in _NAMED:
        return _NAMED[text]
    match = re.fullmatch(r"(v|a|s|ttmp)(?:(\d+)|\[(\d+):(\d+)\])(?:\.([lh]))?", text)
    if match is None:
        return None
    first = int(match[2] or match[3])
    count = int(match[4]) - first + 1 if match[4] else 1
    shift = {"a": ACCUMULATORS, "ttmp": TRAP_TEMPORARIES}.get(match[1], 0)
    half = {None: None, "l": 0, "h": 1}[match[5]]
    return Register("v" if match[1] in "va" else "s", first + shift, count, half)


def vector_register(text: str) -> Register:
    """The vector register of an operand; any other operand raises UnsupportedInstruction."""
    found = register(text)
    if found is None or found.file != "v":
        raise UnsupportedInstruction(f"expected a vector register, got operand {text!r}")
    return found


def constant(text: str, type: str) -> np.ndarray | None:
    """The bits of an inline constant or literal in a type, shape []; None for other words."""
    dtype = TYPES[type]
    unsigned = np.dtype(f"u{dtype.itemsize}")
    if re.fullmatch(r"-?\d+\.\d+", text):
        # 1 / (2 pi) is printed with ten or more digits and means the nearest representable number
        kind = {2: np.float16, 4: np.float32, 8: np.float64 if type == "f64" else np.float32}[dtype.itemsize]
        bits = np.array(float(text), kind).view(f"u{np.dtype(kind).itemsize}").astype(unsigned)
        return bits.view(dtype)
    try:
        value = int(text, 0)
    except ValueError:
        return None
    if type == "f64" and not -16 <= value <= 64:
        value <<= 32  # a literal is the upper half of a double
    return np.array(value & ((1 << 8 * dtype.itemsize) - 1), unsigned).view(dtype)


def current(value: Value) -> np.ndarray:
    """The current value of an operand."""
    return value() if callable(value) else value


def split_modifiers(text: str) -> tuple[str, bool, bool, bool]:
    """(operand, negated, absolute, sign-extended) of '-|v1|', 'neg(v1)', 'sext(v1)'."""
    negated = absolute = extended = False
    while True:
        if match := re.fullmatch(r"neg\((.*)\)", text):
            text, negated = match[1], True
        elif match := re.fullmatch(r"abs\((.*)\)|\|(.*)\|", text):
            text, absolute = match[1] or match[2], True
        elif match := re.fullmatch(r"sext\((.*)\)", text):
            text, extended = match[1], True
        elif text[:1] == "-" and (register(text[1:]) or text[1:2] == "|"):
            text, negated = text[1:], True
        else:
            return text, negated, absolute, extended


def source(
    gang: Gang,
    text: str,
    type: str,
    *,
    half: int = 0,
    part: str = "DWORD",
    permute: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Value:
    """The value of a source operand.

    half: which half of the register a 16-bit type uses (OPSEL), unless the operand itself specifies it; part: an SDWA
    selection; permute: a DPP permutation of the lanes.
    """
    text, negated, absolute, extended = split_modifiers(text)
    if text == "scc":
        return gang.scc
    dtype = TYPES[type]
    reg = register(text)
    if reg is None:
        bits = constant(text, type)
        if bits is None:
            raise UnsupportedInstruction(f"unsupported operand {text!r}")
        value: Value = bits
    elif part != "DWORD" or permute is not None:
        whole = _view(gang, reg, "b32", 0)
        value = functools.partial(_selected, whole, part, extended, permute, dtype)
    else:
        value = _view(gang, reg, type, half if reg.half is None else reg.half)
    if not (negated or absolute):
        return value
    sign = np.array(1 << (8 * dtype.itemsize - 1), f"u{dtype.itemsize}")

    def modified() -> np.ndarray:
        bits = current(value).view(sign.dtype)
        bits = bits & ~sign if absolute else bits
        return (bits ^ sign if negated else bits).view(dtype)

    return modified


def _selected(whole: Value, part: str, extended: bool, permute: Callable | None, dtype: np.dtype) -> np.ndarray:
    bits = current(whole) if permute is None else permute(current(whole))
    if part != "DWORD":
        shift, width = PARTS[part]
        if extended:
            bits = ((bits << np.uint32(32 - width - shift)).view(np.int32) >> (32 - width)).view(np.uint32)
        else:
            bits = (bits >> np.uint32(shift)) & np.uint32((1 << width) - 1)
    return bits.astype(np.uint16).view(dtype) if dtype.itemsize == 2 else bits.view(dtype)


# SDWA selections: (first bit, width).
PARTS = {
    "BYTE_0": (0, 8),
    "BYTE_1": (8, 8),
    "BYTE_2": (16, 8),
    "BYTE_3": (24, 8),
    "WORD_0": (0, 16),
    "WORD_1": (16, 16),
    "DWORD": (0, 32),
}


def _view(gang: Gang, reg: Register, type: str, half: int) -> Value:
    dtype = TYPES[type]
    if reg.file == "s":
        if dtype.itemsize == 8:
            pair = gang.s[:, reg.index : reg.index + 2]
            return pair.view(dtype)
        dword = gang.s[:, reg.index : reg.index + 1]
        return dword.view(dtype) if dtype.itemsize == 4 else dword.view(dtype)[:, half : half + 1]
    if dtype.itemsize == 8:
        low, high = gang.v[reg.index], gang.v[reg.index + 1]
        return lambda: (low | high.astype(np.uint64) << np.uint64(32)).view(dtype)
    dword = gang.v[reg.index]
    return dword.view(dtype) if dtype.itemsize == 4 else dword.view(dtype)[:, half::2]


def destination(gang: Gang, text: str, type: str, *, half: int = 0, lanes: Callable | None = None) -> Store:
    """A function that stores a value in a register, in the active lanes (or waves), restricted to `lanes()` if given.

    16-bit values: RDNA keeps the other half of the register, CDNA clears the upper half when the lower is written.
    """
    reg = register(text)
    if reg is None:
        raise UnsupportedInstruction(f"unsupported destination {text!r}")
    dtype = TYPES[type]
    if reg.file == "s":
        return _scalar_destination(gang, reg, dtype)
    half = half if reg.half is None else reg.half

    def mask():
        if lanes is None or (only := lanes()) is None:
            return gang.mask
        return only & gang.mask

    if dtype.itemsize == 8:
        low, high = gang.v[reg.index], gang.v[reg.index + 1]

        def store_pair(value: np.ndarray) -> None:
            bits = value.view(np.uint64)
            np.copyto(low, bits & np.uint64(0xFFFFFFFF), where=mask(), casting="unsafe")
            np.copyto(high, bits >> np.uint64(32), where=mask(), casting="unsafe")

        return store_pair
    dword = gang.v[reg.index]
    if dtype.itemsize == 2 and gang.program.is_cdna and not half:
        return lambda value: np.copyto(dword, np.asarray(value, dtype).view(np.uint16), where=mask(), casting="unsafe")
    view = dword.view(dtype) if dtype.itemsize == 4 else dword.view(dtype)[:, half::2]
    if lanes is None:
        return lambda value: np.copyto(view, value, where=gang.mask, casting="unsafe")
    return lambda value: np.copyto(view, value, where=mask(), casting="unsafe")


def _scalar_destination(gang: Gang, reg: Register, dtype: np.dtype) -> Store:
    if reg.index == NULL:
        return lambda value: None
    view = gang.s[:, reg.index : reg.index + max(1, dtype.itemsize // 4)].view(dtype)

    def store(value: np.ndarray) -> None:
        np.copyto(view, value, where=gang.waves, casting="unsafe")

    def store_exec(value: np.ndarray) -> None:
        np.copyto(view, value, where=gang.waves, casting="unsafe")
        gang.exec_changed()

    return store_exec if reg.index >= EXEC else store


def lane_mask(gang: Gang, text: str) -> Callable[[], np.ndarray]:
    """A scalar register (pair) as one bool per lane, [wave, lane]."""
    reg = register(text)
    if reg is None:
        bits = constant(text, "u64")
        if bits is None:
            raise UnsupportedInstruction(f"expected a lane mask, got operand {text!r}")
        lanes = (int(bits) >> np.arange(gang.wave_size, dtype=np.uint64) & np.uint64(1)).astype(bool)
        return lambda: np.broadcast_to(lanes, (gang.num_waves, gang.wave_size))
    view = gang.s[:, reg.index : reg.index + gang.wave_size // 32]
    return lambda: np.unpackbits(np.ascontiguousarray(view).view(np.uint8), axis=1, bitorder="little").view(bool)


def store_lane_mask(gang: Gang, text: str) -> Store:
    """The inverse of lane_mask; inactive lanes become 0."""
    reg = register(text)
    if reg is None:
        raise UnsupportedInstruction(f"unsupported destination {text!r}")
    store = _scalar_destination(gang, reg, np.dtype(f"u{gang.wave_size // 8}"))
    word = np.dtype(f"u{gang.wave_size // 8}")
    return lambda lanes: store(np.packbits(lanes & gang.exec, axis=1, bitorder="little").view(word))
