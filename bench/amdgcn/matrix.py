"""Matrix instructions: v_mfma_* of CDNA and v_wmma_* of RDNA.

Layouts: "AMD Instinct MI300 (CDNA3) Instruction Set Architecture", chapter "Matrix Arithmetic Instructions", and AMD's
"Matrix Instruction Calculator"; RDNA3 and RDNA4 ISA manuals, section "Wave Matrix Multiply Accumulate". The terms of a
product are summed in float64 and rounded once; the hardware rounds more often, in an undocumented order.
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from . import narrow
from .errors import UnsupportedInstruction
from .gang import Gang, Step
from .operands import constant, register, vector_register
from .program import Instruction


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the elements of D = A B + C are stored in a wave's registers.

    A lane holds consecutive elements along k of one row of A (and of one column of B); groups of m (n) lanes hold
    different parts of k. row, column: indices of the elements of C and D, [register, lane].
    """

    m: int
    n: int
    k: int
    groups: int
    row: np.ndarray
    column: np.ndarray


def _layout(gang: Gang, kind: str, m: int, n: int, k: int) -> Layout:
    lane = np.arange(gang.wave_size)
    if kind == "mfma":
        # each lane holds runs of four rows, interleaved over the groups of lanes
        groups = gang.wave_size // m
        index = np.arange(m * n // gang.wave_size)[:, None]
        row = index // 4 * 4 * groups + 4 * (lane // m) + index % 4
        return Layout(m, n, k, groups, row, np.broadcast_to(lane % m, row.shape))
    index = np.arange(8)[:, None]
    if gang.program.target.startswith("gfx12"):
        row, groups = 8 * (lane // 16) + index, 2
    else:
        # RDNA3: the halves of the wave hold the same A and B, and alternate in the rows of D
        row, groups = 2 * index + lane // 16, 1
    return Layout(m, n, k, groups, row, np.broadcast_to(lane % 16, row.shape))


_NAME = re.compile(r"v_(mfma|wmma)_(f32|i32)_(\d+)x(\d+)x(\d+)_?(\w+?)")


def bind(gang: Gang, instruction: Instruction) -> Step:
    """Binds an instruction: returns a function without arguments that executes it on the gang."""
    match = _NAME.fullmatch(instruction.name.removesuffix("_1k"))
    if match is None or match[3] == "4":
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    kind_a, kind_b = _kinds(instruction, match[6])
    layout = _layout(gang, match[1], *(int(match[i]) for i in (3, 4, 5)))
    sign_a, sign_b = _signs(instruction, kind_a)
    d, a, b = (vector_register(text).index for text in instruction.operands[:3])
    decode_a, decode_b = _decoder(gang, instruction, kind_a), _decoder(gang, instruction, kind_b)
    result = np.dtype(np.float32 if match[2] == "f32" else np.int32)
    count = len(layout.row)
    addend = register(instruction.operands[3])
    if addend is None:
        bits = constant(instruction.operands[3], match[2])
        assert bits is not None
        c = np.broadcast_to(bits, (count, gang.num_waves, gang.wave_size))
    else:
        c = gang.v[addend.index : addend.index + count].view(result)
    words = _words(layout, kind_a), _words(layout, kind_b)
    gather = (layout.row * layout.n + layout.column).reshape(-1)
    out = gang.v[d : d + count].view(result)

    def step() -> None:
        left = _matrix(gang.v[a : a + words[0]], layout, layout.m, decode_a) * sign_a
        right = _matrix(gang.v[b : b + words[1]], layout, layout.n, decode_b) * sign_b
        product = (left @ right.swapaxes(1, 2)).reshape(gang.num_waves, -1)[:, gather]
        product = product.reshape(gang.num_waves, count, gang.wave_size).swapaxes(0, 1)
        # matrix instructions ignore EXEC
        waves = gang.waves if gang.waves is True else np.broadcast_to(gang.waves, out.shape[1:])
        np.copyto(out, product + c, where=waves, casting="unsafe")

    return step


def _kinds(instruction: Instruction, suffix: str) -> tuple[str, str]:
    """The element types of A and B: from the name, or for f8f6f4 from cbsz and blgp."""
    if suffix == "f8f6f4":
        formats = [instruction.number(key) for key in ("cbsz", "blgp")]
        if max(formats) > 1:
            raise UnsupportedInstruction(f"unsupported 6-bit or 4-bit elements in {instruction}")
        return ("fp8", "bf8")[formats[0]], ("fp8", "bf8")[formats[1]]
    if {"cbsz", "abid", "blgp"} & set(instruction.modifiers):
        raise UnsupportedInstruction(f"unsupported broadcast within a matrix in {instruction}")
    first, *rest = suffix.split("_")
    return first, rest[0] if rest else first


def _signs(instruction: Instruction, kind: str) -> tuple[int, int]:
    """The factors of A and B from neg_lo and neg_hi; for integers these say that the operand is signed."""
    low, high = instruction.bits("neg_lo", (0, 0, 0)), instruction.bits("neg_hi", (0, 0, 0))
    if kind in ("iu8", "iu4"):
        if low[:2] != (1, 1):
            raise UnsupportedInstruction(f"unsupported unsigned integers in {instruction}")
        return 1, 1
    if (any(low) or any(high)) and (low != high or low[2]):
        raise UnsupportedInstruction(f"unsupported signs of {instruction}")
    return 1 - 2 * low[0], 1 - 2 * low[1]


def _words(layout: Layout, kind: str) -> int:
    """The number of registers of one lane's elements of an operand."""
    return layout.k // layout.groups * _ELEMENT_BYTES[kind] // 4


def _matrix(words: np.ndarray, layout: Layout, size: int, decode: Callable) -> np.ndarray:
    """[wave, m or n, k] from registers [word, wave, lane]."""
    num_waves = words.shape[1]
    elements = decode(np.ascontiguousarray(words.transpose(1, 2, 0)))
    elements = elements[:, : layout.groups * size].reshape(num_waves, layout.groups, size, -1)
    return elements.swapaxes(1, 2).reshape(num_waves, size, layout.k)


_ELEMENT_BYTES = {"f32": 4, "xf32": 4, "f64": 8, "f16": 2, "bf16": 2, "i8": 1, "iu8": 1, "fp8": 1, "bf8": 1}
_ELEMENTS = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "i8": np.dtype(np.int8),
    "iu8": np.dtype(np.int8),
}


def _decoder(gang: Gang, instruction: Instruction, kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from dwords [..., n] to numbers that NumPy multiplies exactly."""
    if kind == "xf32":
        return _rounded_to_tf32
    if kind == "bf16":
        return _from_bfloat16
    if kind in ("fp8", "bf8"):
        octets = np.arange(256, dtype=np.uint8)
        table = octets.view(narrow.float8(gang.program.target, kind)).astype(np.float64)
        return lambda words: table[words.view(np.uint8)]
    if kind not in _ELEMENTS:
        raise UnsupportedInstruction(f"unsupported element type {kind} in {instruction}")
    return lambda words: words.view(_ELEMENTS[kind]).astype(np.float64)


def _from_bfloat16(words: np.ndarray) -> np.ndarray:
    return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _rounded_to_tf32(words: np.ndarray) -> np.ndarray:
    """Rounds to ten bits of mantissa, to nearest even (the manual does not specify the rounding)."""
    bits = words + ((words >> np.uint32(13) & np.uint32(1)) + np.uint32(0xFFF)) & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)
