"""The scalar unit: instructions s_*, one value per wave, and control flow.

Semantics: ISA manuals (CDNA3, CDNA4, RDNA3, RDNA4), chapter "Instructions", encodings SOP1, SOP2, SOPC, SOPK and SOPP.
A table has for each name the types of destination and sources, a function on arrays [wave, 1], and the effect on SCC,
the scalar condition code.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic as math
from .errors import Deadlock, UnsupportedInstruction
from .gang import Gang, Step
from .operands import current, destination, source
from .program import Instruction


@dataclasses.dataclass(frozen=True)
class Operation:
    """signature: such as 'u32 = u32 u32'; the left side is empty if only SCC is set; 'scc' is SCC as a source.

    scc: None: SCC is unchanged; 'nonzero': set if the result is not 0; 'returned': compute returns (result, scc).
    """

    signature: str
    compute: Callable[..., Any]
    scc: str | None = None


OPERATIONS: dict[str, Operation] = {}


def _define(names: str, signature: str, compute: Callable[..., Any], scc: str | None = None) -> None:
    for name in names.split():
        OPERATIONS["s_" + name] = Operation(signature, compute, scc)


# ---- logic, per width: SCC is set if the result is not 0
for bits in (32, 64):
    two = f"b{bits} = b{bits} b{bits}"
    _define(f"and_b{bits}", two, lambda a, b: a & b, "nonzero")
    _define(f"or_b{bits}", two, lambda a, b: a | b, "nonzero")
    _define(f"xor_b{bits}", two, lambda a, b: a ^ b, "nonzero")
    _define(f"nand_b{bits}", two, lambda a, b: ~(a & b), "nonzero")
    _define(f"nor_b{bits}", two, lambda a, b: ~(a | b), "nonzero")
    _define(f"xnor_b{bits}", two, lambda a, b: ~(a ^ b), "nonzero")
    _define(f"andn2_b{bits} and_not1_b{bits}", two, lambda a, b: a & ~b, "nonzero")
    _define(f"orn2_b{bits} or_not1_b{bits}", two, lambda a, b: a | ~b, "nonzero")
    _define(f"not_b{bits}", f"b{bits} = b{bits}", lambda a: ~a, "nonzero")
    shift = math.shift(bits)
    _define(f"lshl_b{bits}", f"u{bits} = u{bits} u32", lambda a, n, at=shift: a << at(n), "nonzero")
    _define(f"lshr_b{bits}", f"u{bits} = u{bits} u32", lambda a, n, at=shift: a >> at(n), "nonzero")
    _define(f"ashr_i{bits}", f"i{bits} = i{bits} u32", lambda a, n, at=shift: a >> at(n).astype(a.dtype), "nonzero")
    _define(f"bfe_u{bits}", f"u{bits} = u{bits} u32", functools.partial(math.scalar_field, bits, False), "nonzero")
    _define(f"bfe_i{bits}", f"i{bits} = i{bits} u32", functools.partial(math.scalar_field, bits, True), "nonzero")
    _define(
        f"bfm_b{bits}",
        f"u{bits} = u32 u32",
        lambda width, first, at=shift: ((at(width) * 0 + 1 << at(width)) - 1) << at(first),
    )
    _define(f"mov_b{bits}", f"b{bits} = b{bits}", lambda a: a)
    _define(f"cselect_b{bits}", f"b{bits} = b{bits} b{bits} scc", lambda a, b, scc: np.where(scc, a, b))
    _define(f"brev_b{bits}", f"u{bits} = u{bits}", functools.partial(math.reversed_bits, bits))
    _define(f"bcnt1_i32_b{bits}", f"u32 = u{bits}", np.bitwise_count, "nonzero")
    _define(f"bcnt0_i32_b{bits}", f"u32 = u{bits}", lambda a: np.bitwise_count(~a), "nonzero")
    _define(f"ff1_i32_b{bits} ctz_i32_b{bits}", f"i32 = u{bits}", functools.partial(math.trailing_zeros, bits))
    _define(f"flbit_i32_b{bits} clz_i32_u{bits}", f"i32 = u{bits}", functools.partial(math.leading_zeros, bits))
    _define(f"cmp_eq_u{bits}", f"= u{bits} u{bits}", np.equal)
    _define(f"cmp_lg_u{bits} cmp_ne_u{bits}", f"= u{bits} u{bits}", np.not_equal)
    _define(f"bitcmp1_b{bits}", f"= u{bits} u32", lambda a, n, at=shift: (a >> at(n) & 1) == 1)
    _define(f"bitcmp0_b{bits}", f"= u{bits} u32", lambda a, n, at=shift: (a >> at(n) & 1) == 0)
for value in (0, 1):
    # the destination is a source too: bind() inserts it as the first one
    _define(
        f"bitset{value}_b32",
        "u32 = u32 u32",
        lambda old, n, value=value: old & ~(np.uint32(1) << (n & 31)) | np.uint32(value) << (n & 31),
    )


# ---- integers
_define("add_u32", "u32 = u32 u32", lambda a, b: (a + b, a + b < a), "returned")
_define("sub_u32", "u32 = u32 u32", lambda a, b: (a - b, b > a), "returned")
_define("addc_u32 add_co_ci_u32", "u32 = u32 u32 scc", math.add_with_carry, "returned")
_define("subb_u32 sub_co_ci_u32", "u32 = u32 u32 scc", math.subtract_with_borrow, "returned")
_define("add_i32 add_co_i32 addk_i32 addk_co_i32", "i32 = i32 i32", math.add_with_overflow, "returned")
_define("sub_i32 sub_co_i32", "i32 = i32 i32", math.subtract_with_overflow, "returned")
_define("add_co_u32", "u32 = u32 u32", lambda a, b: (a + b, a + b < a), "returned")
_define("sub_co_u32", "u32 = u32 u32", lambda a, b: (a - b, b > a), "returned")
_define("add_u64 add_nc_u64", "u64 = u64 u64", np.add)
_define("sub_u64 sub_nc_u64", "u64 = u64 u64", np.subtract)
_define("mul_i32 mulk_i32", "i32 = i32 i32", np.multiply)
_define("mul_u64", "u64 = u64 u64", np.multiply)
_define("mul_hi_u32", "u32 = u32 u32", math.multiply_high_unsigned)
_define("mul_hi_i32", "i32 = i32 i32", math.multiply_high_signed)
_define("abs_i32", "u32 = i32", lambda a: abs(a.astype(np.int64)).astype(np.uint32), "nonzero")
_define("absdiff_i32", "u32 = i32 i32", lambda a, b: abs(a.astype(np.int64) - b).astype(np.uint32), "nonzero")
_define("sext_i32_i8", "i32 = u32", lambda a: a.astype(np.int8).astype(np.int32))
_define("sext_i32_i16", "i32 = u32", lambda a: a.astype(np.int16).astype(np.int32))
for places in range(1, 5):
    _define(f"lshl{places}_add_u32", "u32 = u32 u32", functools.partial(math.shift_and_add, places), "returned")
for sign in "ui":
    pair = f"{sign}32 = {sign}32 {sign}32"
    # SCC is set if the first operand was selected
    _define(f"max_{sign}32", pair, lambda a, b: (np.maximum(a, b), a > b), "returned")
    _define(f"min_{sign}32", pair, lambda a, b: (np.minimum(a, b), a < b), "returned")
    for name, compare in math.COMPARISONS.items():
        _define(f"cmp_{name}_{sign}32 cmpk_{name}_{sign}32", f"= {sign}32 {sign}32", compare)
for first, second in ("ll", "lh", "hl", "hh"):
    _define(
        f"pack_{first}{second}_b32_b16",
        "u32 = u32 u32",
        lambda a, b, i=16 * (first == "h"), j=16 * (second == "h"): (a >> i & 0xFFFF) | (b >> j & 0xFFFF) << 16,
    )
_define("flbit_i32 cls_i32", "i32 = i32", math.leading_signs)
_define("movk_i32", "i32 = i32", lambda a: a)
_define("cmov_b32 cmovk_i32", "u32 = u32 u32 scc", lambda old, a, scc: np.where(scc, a, old))


# ---- floats (RDNA3.5 and RDNA4)
_FLOAT_PAIRS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin}
for name, compute in _FLOAT_PAIRS.items():
    _define(f"{name}_f32 {name}_num_f32", "f32 = f32 f32", compute)
_define("fmac_f32", "f32 = f32 f32 f32", lambda old, a, b: math.fma(a, b, old))
_define("fmaak_f32 fmamk_f32", "f32 = f32 f32 f32", math.fma)
for name, compute in {"floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "rndne": np.rint}.items():
    _define(f"{name}_f32", "f32 = f32", compute)
_define("cvt_f32_u32", "f32 = u32", lambda a: a.astype(np.float32))
_define("cvt_f32_i32", "f32 = i32", lambda a: a.astype(np.float32))
_define("cvt_u32_f32", "u32 = f32", math.saturated_u32)
_define("cvt_i32_f32", "i32 = f32", math.saturated_i32)
for name, compare in math.COMPARISONS.items():
    _define(f"cmp_{name}_f32", "= f32 f32", compare)

# The destination is read as the first source.
_ACCUMULATING = re.compile(r"s_(bitset\d_b32|addk_(co_)?i32|mulk_i32|cmov_b32|cmovk_i32|fmac_f32)")

# s_<name>_saveexec: the new EXEC from its source and EXEC.
_SAVEEXEC = {
    "and": lambda s, e: s & e,
    "or": lambda s, e: s | e,
    "xor": lambda s, e: s ^ e,
    "andn2": lambda s, e: s & ~e,
    "and_not1": lambda s, e: s & ~e,
    "orn2": lambda s, e: s | ~e,
    "or_not1": lambda s, e: s | ~e,
    "andn1": lambda s, e: ~s & e,
    "and_not0": lambda s, e: ~s & e,
    "nand": lambda s, e: ~(s & e),
    "nor": lambda s, e: ~(s | e),
    "xnor": lambda s, e: ~(s ^ e),
}


def bind(gang: Gang, instruction: Instruction) -> Step:
    """Binds an instruction: returns a function without arguments that executes it on the gang."""
    name, operands = instruction.name, instruction.operands
    if re.match(r"s_(c?branch|endpgm|barrier)", name):
        return _control_flow(gang, instruction)
    if match := re.fullmatch(r"s_(\w+)_saveexec_b(32|64)", name):
        return _save_exec(gang, instruction, _SAVEEXEC[match[1]], "b" + match[2])
    if name == "s_load" or name not in OPERATIONS:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    operation = OPERATIONS[name]
    left, right = (side.split() for side in operation.signature.split("="))
    texts = list(operands if not left or _ACCUMULATING.fullmatch(name) else operands[1:])
    if re.search(r"k_(co_|[a-z]{2}_)?i32$", name):
        # a signed 16-bit number, which the text may show as unsigned
        texts[-1] = str(np.array(int(texts[-1], 0) & 0xFFFF, np.uint16).view(np.int16))
    sources = [source(gang, text, type) for text, type in zip([*texts, "scc"], right, strict=False)]
    if not left:
        store_condition = _condition(gang)
        return lambda: store_condition(operation.compute(*map(current, sources)))
    store = destination(gang, operands[0], left[0])
    return _with_condition(gang, operation, sources, store)


def _condition(gang: Gang) -> Callable[[np.ndarray], None]:
    return lambda value: np.copyto(gang.scc, value, where=gang.waves)


def _with_condition(gang: Gang, operation: Operation, sources: list, store: Callable) -> Step:
    compute, set_condition = operation.compute, _condition(gang)
    if operation.scc is None:
        return lambda: store(compute(*map(current, sources)))
    if operation.scc == "returned":

        def returned() -> None:
            value, condition = compute(*map(current, sources))
            store(value)
            set_condition(condition)

        return returned

    def nonzero() -> None:
        value = compute(*map(current, sources))
        condition = value != 0  # before the store: the value may be a view of the destination
        store(value)
        set_condition(condition)

    return nonzero


def _save_exec(gang: Gang, instruction: Instruction, compute: Callable, type: str) -> Step:
    old = source(gang, "exec", type)
    value = source(gang, instruction.operands[1], type)
    save, store = destination(gang, instruction.operands[0], type), destination(gang, "exec", type)
    set_condition = _condition(gang)

    def step() -> None:
        before = current(old).copy()
        after = compute(current(value), before)
        save(before)
        store(after)
        set_condition(after != 0)

    return step


def _control_flow(gang: Gang, instruction: Instruction) -> Step:
    name = instruction.name
    if name == "s_endpgm":
        return lambda: np.copyto(gang.next_block, gang.end, where=gang.waves)
    if name == "s_barrier":
        return lambda: np.copyto(gang.waiting, True, where=gang.waves)
    if name == "s_barrier_signal":
        return functools.partial(_signal, gang, instruction)
    if name == "s_barrier_wait":
        return functools.partial(_wait, gang, instruction)
    if not name.startswith(("s_branch", "s_cbranch")) or instruction.operands[0] not in gang.program.labels:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    target = gang.program.labels[instruction.operands[0]]
    condition = _branch_condition(gang, instruction)
    return lambda: np.copyto(gang.next_block, target, where=condition() & gang.waves)


def _branch_condition(gang: Gang, instruction: Instruction) -> Callable[[], np.ndarray | bool]:
    word = "b64" if gang.wave_size == 64 else "b32"
    vcc, exec = source(gang, "vcc", word), source(gang, "exec", word)
    conditions = {
        "s_branch": lambda: np.True_,
        "s_cbranch_scc0": lambda: ~gang.scc,
        "s_cbranch_scc1": lambda: gang.scc,
        "s_cbranch_vccz": lambda: current(vcc) == 0,
        "s_cbranch_vccnz": lambda: current(vcc) != 0,
        "s_cbranch_execz": lambda: current(exec) == 0,
        "s_cbranch_execnz": lambda: current(exec) != 0,
    }
    if instruction.name not in conditions:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    return conditions[instruction.name]


def _signal(gang: Gang, instruction: Instruction) -> None:
    if (gang.signalled & gang.waves).any():
        raise Deadlock(f"second barrier signal without a wait in between, at {instruction}")
    np.copyto(gang.signalled, True, where=gang.waves)


def _wait(gang: Gang, instruction: Instruction) -> None:
    if (~gang.signalled & gang.waves).any():
        raise Deadlock(f"barrier wait without a signal before it, at {instruction}")
    np.copyto(gang.signalled, False, where=gang.waves)
    np.copyto(gang.waiting, True, where=gang.waves)
