"""Narrow elements: conversions of fp8 and bf8, dot products of four integers and of two bfloat16 numbers.

Semantics: CDNA3 and CDNA4 ISA manuals, chapter "Instructions", encodings VOP3 and VOP3P. gfx942 uses the FNUZ formats,
without a negative zero; later targets use those of the OCP 8-bit Floating Point Specification.
"""

import re

import ml_dtypes
import numpy as np

from .errors import UnsupportedInstruction
from .gang import Gang, Step
from .operands import Value, current, destination, source
from .program import Instruction

_OCP = {"fp8": np.dtype(ml_dtypes.float8_e4m3fn), "bf8": np.dtype(ml_dtypes.float8_e5m2)}
_FNUZ = {"fp8": np.dtype(ml_dtypes.float8_e4m3fnuz), "bf8": np.dtype(ml_dtypes.float8_e5m2fnuz)}
_WIDER = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def float8(target: str, kind: str) -> np.dtype:
    """The NumPy dtype of an architecture's 'fp8' or 'bf8'."""
    return (_FNUZ if target == "gfx942" else _OCP)[kind]


def bind(gang: Gang, instruction: Instruction) -> Step | None:
    """Binds an instruction: returns a function that executes it on the gang; None if it is not in this file."""
    if match := re.fullmatch(r"v_cvt_scalef32_pk_(fp8|bf8)_(f32|f16|bf16)", instruction.name):
        return _narrowed(gang, instruction, float8(gang.program.target, match[1]), match[2])
    if match := re.fullmatch(r"v_cvt_scalef32_pk_(f32|f16|bf16)_(fp8|bf8)", instruction.name):
        return _widened(gang, instruction, float8(gang.program.target, match[2]), match[1])
    if match := re.fullmatch(r"v_cvt_f32_(fp8|bf8)", instruction.name):
        return _widened_byte(gang, instruction, float8(gang.program.target, match[1]))
    if instruction.name == "v_dot2c_f32_bf16":
        return _dot_of_two(gang, instruction)
    if re.fullmatch(r"v_dot4c?_i32_i(8|u8)", instruction.name):
        return _dot_of_four(gang, instruction)
    return None


def _only_unscaled(instruction: Instruction) -> None:
    if instruction.operands[-1] != "1.0":
        raise UnsupportedInstruction(f"unsupported scale other than 1.0 in {instruction}")


def _narrowed(gang: Gang, instruction: Instruction, to: np.dtype, kind: str) -> Step:
    """Converts two numbers to two bytes in one half of the destination; the other half is kept."""
    _only_unscaled(instruction)
    half = instruction.bits("op_sel", (0,))[-1]
    values = _pair(gang, instruction, kind)
    old = source(gang, instruction.operands[0], "u32")
    store = destination(gang, instruction.operands[0], "u32")
    shift, kept = np.uint32(16 * half), np.uint32(0xFFFF0000 >> 16 * half)

    def step() -> None:
        low, high = (
            np.ascontiguousarray(current(value)).astype(np.float32).astype(to).view(np.uint8).astype(np.uint32)
            for value in values
        )
        store(current(old) & kept | (low | high << np.uint32(8)) << shift)

    return step


def _pair(gang: Gang, instruction: Instruction, kind: str) -> list[Value]:
    """Two float32 operands, or the two halves of one operand."""
    if kind == "f32":
        return [source(gang, text, "f32") for text in instruction.operands[1:3]]
    halves = [source(gang, instruction.operands[1], "u16", half=half) for half in range(2)]
    return [lambda half=half: np.ascontiguousarray(current(half)).view(_WIDER[kind]) for half in halves]


def _widened(gang: Gang, instruction: Instruction, element: np.dtype, kind: str) -> Step:
    """Converts two bytes of one half of the source to two numbers."""
    _only_unscaled(instruction)
    half = instruction.bits("op_sel", (0,))[0]
    octets = source(gang, instruction.operands[1], "u16", half=half)
    store = destination(gang, instruction.operands[0], "u64" if kind == "f32" else "u32")
    bits = np.uint64 if kind == "f32" else np.uint32
    table = np.arange(256, dtype=np.uint8).view(element).astype(_WIDER[kind]).view(f"u{_WIDER[kind].itemsize}")

    def step() -> None:
        both = current(octets)
        low, high = (table[octet].astype(bits) for octet in (both & 0xFF, both >> 8))
        store(low | high << bits(8 * table.itemsize))

    return step


def _widened_byte(gang: Gang, instruction: Instruction, element: np.dtype) -> Step:
    """Converts one byte of the source to a float32 number."""
    if instruction.encoding == "sdwa":
        raise UnsupportedInstruction(f"unsupported encoding of {instruction}")
    shift = np.uint32(8 * instruction.number("byte_sel"))
    value, store = source(gang, instruction.operands[1], "u32"), destination(gang, instruction.operands[0], "f32")
    table = np.arange(256, dtype=np.uint8).view(element).astype(np.float32)

    def step() -> None:
        store(table[current(value) >> shift & np.uint32(0xFF)])

    return step


def _dot_of_two(gang: Gang, instruction: Instruction) -> Step:
    """Adds two products of bfloat16 numbers to the destination, in float32."""
    operands = instruction.operands
    addend, store = source(gang, operands[0], "f32"), destination(gang, operands[0], "f32")
    halves = [[source(gang, text, "u16", half=half) for half in range(2)] for text in operands[1:3]]

    def number(value: Value) -> np.ndarray:
        return (np.asarray(current(value), np.uint32) << np.uint32(16)).view(np.float32)

    def step() -> None:
        total = current(addend)
        for a, b in zip(*halves, strict=True):
            total = total + number(a) * number(b)
        store(total)

    return step


def _dot_of_four(gang: Gang, instruction: Instruction) -> Step:
    """The sum of four products of bytes and an addend: operand 3, or the destination if the name has a c."""
    name, operands = instruction.name, instruction.operands
    signed = instruction.bits("neg_lo", (0, 0, 0)) if name.endswith("iu8") else (1, 1, 0)
    a, b = (source(gang, text, "u32") for text in operands[1:3])
    addend = source(gang, operands[0] if "dot4c" in name else operands[3], "i32")
    store = destination(gang, operands[0], "i32")

    def octets(value: np.ndarray, has_sign: int) -> np.ndarray:
        view = np.ascontiguousarray(value)[..., None].view(np.int8 if has_sign else np.uint8)
        return view.astype(np.int32)

    def step() -> None:
        products = octets(current(a), signed[0]) * octets(current(b), signed[1])
        store(products.sum(-1, dtype=np.int32) + current(addend))

    return step
