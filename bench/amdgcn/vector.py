"""The vector unit: instructions v_*, one value per lane.

Semantics: ISA manuals (CDNA3, CDNA4, RDNA3, RDNA4), chapter "Instructions", encodings VOP1, VOP2, VOP3, VOPC, VOP3P and
VOPD (dual issue). Most are an entry of vector_table.py; carries, comparisons, packed and mixed types have a function
here.
"""

import re
from collections.abc import Callable

import numpy as np

from . import arithmetic as math
from . import lanes, narrow
from .errors import UnsupportedInstruction
from .gang import Gang, Step
from .operands import (
    PARTS,
    TYPES,
    Store,
    Value,
    current,
    destination,
    lane_mask,
    register,
    source,
    split_modifiers,
    store_lane_mask,
    vector_register,
)
from .program import Instruction
from .vector_table import OPERATIONS, Operation

# Instructions whose result is added to the destination.
_ACCUMULATING = {"v_fmac_f32": "f32", "v_fmac_f16": "f16", "v_fmac_f64": "f64"}


def bind(gang: Gang, instruction: Instruction) -> Step:
    """Binds an instruction: returns a function without arguments that executes it on the gang."""
    name = instruction.name
    if name == "v_dual":
        return _both(gang, instruction)
    if (step := lanes.bind(gang, instruction) or narrow.bind(gang, instruction)) is not None:
        return step
    for pattern, special in _SPECIAL.items():
        if re.fullmatch(pattern, name):
            if {"clamp", "mul", "div"} & set(instruction.modifiers) and special is not _packed:
                raise UnsupportedInstruction(f"unsupported output modifier of {instruction}")
            return special(gang, instruction)
    if name.startswith("v_s_"):
        return _on_scalars(gang, instruction)
    if name not in OPERATIONS:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    operation = OPERATIONS[name]
    values = [_source(gang, instruction, i, type) for i, type in enumerate(operation.sources)]
    store = _destination(gang, instruction, operation.result)
    compute = _with_output_modifiers(instruction, operation)
    if all(isinstance(value, np.ndarray) for value in values):
        if isinstance(compute, np.ufunc) and _writes_in_place(gang, instruction, operation):
            out = source(gang, instruction.operands[0], operation.result)
            return lambda: compute(*values, out=out, where=gang.mask, casting="unsafe")
        if len(values) == 1:
            [only] = values
            return lambda: store(compute(only))
        if len(values) == 2:
            first, second = values
            return lambda: store(compute(first, second))
    return lambda: store(compute(*map(current, values)))


def _source(gang: Gang, instruction: Instruction, number: int, type: str, *, first: int = 1) -> Value:
    """Source `number` of an instruction whose sources start at operand `first`."""
    half = instruction.bits("op_sel", ())[number : number + 1]
    if any(half) and TYPES[type].itemsize != 2:
        raise UnsupportedInstruction(f"unsupported op_sel of {instruction}")
    dpp = lanes.permutation(gang, instruction) if number == 0 else None
    part = str(instruction.modifiers.get(f"src{number}_sel", "DWORD")) if instruction.encoding == "sdwa" else "DWORD"
    return source(
        gang,
        instruction.operands[first + number],
        type,
        half=half[0] if half else 0,
        part=part,
        permute=dpp.permute if dpp else None,
    )


def _destination(gang: Gang, instruction: Instruction, type: str) -> Store:
    selection = instruction.bits("op_sel", ())
    half = selection[-1] if len(selection) == len(instruction.operands) else 0
    if half and TYPES[type].itemsize != 2:
        raise UnsupportedInstruction(f"unsupported op_sel of {instruction}")
    dpp = lanes.permutation(gang, instruction)
    part = instruction.modifiers.get("dst_sel", "DWORD")
    if instruction.encoding != "sdwa" and part != "DWORD":
        raise UnsupportedInstruction(f"unsupported dst_sel of {instruction}")
    if part != "DWORD":
        return _destination_part(gang, instruction, str(part), type)
    return destination(gang, instruction.operands[0], type, half=half, lanes=dpp.writable if dpp else None)


def _destination_part(gang: Gang, instruction: Instruction, part: str, type: str) -> Store:
    """SDWA: stores the result in a part of the register; the rest is kept or cleared."""
    unused = instruction.modifiers.get("dst_unused", "UNUSED_PAD")
    if unused not in ("UNUSED_PAD", "UNUSED_PRESERVE"):
        raise UnsupportedInstruction(f"unsupported {unused} of {instruction}")
    shift, width = PARTS[part]
    mask = np.uint32((1 << width) - 1 << shift)
    view = gang.v[vector_register(instruction.operands[0]).index]
    store = destination(gang, instruction.operands[0], "b32")
    bits_type = f"u{TYPES[type].itemsize}"

    def store_part(value: np.ndarray) -> None:
        bits = np.ascontiguousarray(value).astype(TYPES[type]).view(bits_type).astype(np.uint32) << np.uint32(shift)
        store(bits & mask | (view & ~mask if unused == "UNUSED_PRESERVE" else np.uint32(0)))

    return store_part


def _writes_in_place(gang: Gang, instruction: Instruction, operation: Operation) -> bool:
    """Whether a ufunc can write into the register's view: whole dwords of a vector register, without sdwa or dpp."""
    reg = register(instruction.operands[0])
    return (
        reg is not None
        and reg.file == "v"
        and TYPES[operation.result].itemsize == 4
        and instruction.encoding not in ("sdwa", "dpp", "e64_dpp", "dpp8")
        and all(TYPES[type] == TYPES[operation.result] for type in operation.sources)
    )


def _with_output_modifiers(instruction: Instruction, operation: Operation) -> Callable:
    """The computation, including the instruction's clamp, mul and div."""
    clamp = "clamp" in instruction.modifiers
    factor = {"2": 2.0, "4": 4.0}.get(str(instruction.modifiers.get("mul")), 1.0)
    factor = 0.5 if instruction.modifiers.get("div") == "2" else factor
    compute, dtype = operation.compute, TYPES[operation.result]
    if not clamp and factor == 1.0:
        return compute
    if dtype.kind != "f":
        return _saturated(instruction, operation.result)

    scaled = (lambda *values: compute(*values) * dtype.type(factor)) if factor != 1.0 else compute
    return _clamped(scaled) if clamp else scaled


def _clamped(compute: Callable) -> Callable:
    """Float clamp: limits the result to 0 to 1; NaN becomes 0."""
    return lambda *values: np.nan_to_num(np.clip(compute(*values), 0, 1), nan=0.0)


def _saturated(instruction: Instruction, result: str) -> Callable:
    """Integer clamp: saturates the sum or difference to the type."""
    limits = np.iinfo(TYPES[result])
    word = instruction.name.removeprefix("v_").removeprefix("pk_").split("_")[0]
    signs = {"add": (1, 1), "sub": (1, -1), "subrev": (-1, 1)}.get(word)
    if signs is None:
        raise UnsupportedInstruction(f"unsupported clamp of {instruction}")
    return lambda a, b: np.clip(a.astype(np.int64) * signs[0] + b.astype(np.int64) * signs[1], limits.min, limits.max)


def _both(gang: Gang, instruction: Instruction) -> Step:
    """Dual issue: both read before either writes."""
    first, second = instruction.parts
    do_first, do_second = bind(gang, first), bind(gang, second)
    written = vector_register(first.operands[0])
    reads = second.operands[1:] + (second.operands[:1] if second.name in _ACCUMULATING else ())
    if written not in [register(split_modifiers(text)[0]) for text in reads]:

        def in_turn() -> None:
            do_first()
            do_second()

        return in_turn
    view = gang.v[written.index]

    def together() -> None:
        before = view.copy()
        do_first()
        after = view.copy()
        view[...] = before
        do_second()
        view[...] = after

    return together


def _accumulate(gang: Gang, instruction: Instruction) -> Step:
    type = _ACCUMULATING[instruction.name]
    a, b = (_source(gang, instruction, i, type) for i in range(2))
    half = instruction.bits("op_sel", ())
    old = source(gang, instruction.operands[0], type, half=half[-1] if len(half) == 3 else 0)
    store = _destination(gang, instruction, type)
    return lambda: store(math.fma(current(a), current(b), current(old)))


def _compare(gang: Gang, instruction: Instruction) -> Step:
    match = re.fullmatch(r"v_cmp(x?)_(\w+?)_([fiu]\d\d)", instruction.name)
    if match is None or match[2] not in (*math.COMPARISONS, "class"):
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    type, to_exec = match[3], bool(match[1])
    implicit = len(instruction.operands) == 2  # RDNA: v_cmpx only writes EXEC
    first = 0 if implicit else 1
    a = _source(gang, instruction, 0, type, first=first)
    b = _source(gang, instruction, 1, "u32" if match[2] == "class" else type, first=first)
    compute = math.class_of if match[2] == "class" else math.COMPARISONS[match[2]]
    targets = ([] if implicit else [instruction.operands[0]]) + (["exec"] if to_exec else [])
    stores = [store_lane_mask(gang, text) for text in targets]
    shape = gang.exec.shape

    def step() -> None:
        lanes = np.broadcast_to(compute(current(a), current(b)), shape)
        for store in stores:
            store(lanes)

    return step


def _choose(gang: Gang, instruction: Instruction) -> Step:
    type = "b" + instruction.name[-2:]
    a, b = (_source(gang, instruction, i, type) for i in range(2))
    condition = lane_mask(gang, instruction.operands[3] if len(instruction.operands) > 3 else "vcc")
    store = _destination(gang, instruction, type)
    return lambda: store(np.where(condition(), current(b), current(a)))


def _add_or_subtract_with_carry(gang: Gang, instruction: Instruction) -> Step:
    match = re.fullmatch(r"v_(addc?|subb?|subb?rev)_co(_ci)?_u32", instruction.name)
    if match is None:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    a, b = (_source(gang, instruction, i, "u32", first=2) for i in range(2))
    takes_carry = len(instruction.operands) > 4
    carry = lane_mask(gang, instruction.operands[4]) if takes_carry else lambda: np.zeros((), bool)
    compute = math.add_with_carry if match[1].startswith("add") else math.subtract_with_borrow
    swapped = match[1].endswith("rev")
    store, store_carry = _destination(gang, instruction, "u32"), store_lane_mask(gang, instruction.operands[1])

    def step() -> None:
        x, y = current(a), current(b)
        value, out = compute(*((y, x) if swapped else (x, y)), carry())
        store(value)
        store_carry(np.broadcast_to(out, gang.exec.shape))

    return step


def _multiply_add_64(gang: Gang, instruction: Instruction) -> Step:
    signed = instruction.name.endswith("i64_i32")
    type, wide = ("i32", np.int64) if signed else ("u32", np.uint64)
    a, b = (_source(gang, instruction, i, type, first=2) for i in range(2))
    c = _source(gang, instruction, 2, "u64", first=2)
    store, store_carry = _destination(gang, instruction, "u64"), store_lane_mask(gang, instruction.operands[1])

    def step() -> None:
        product = (current(a).astype(wide) * current(b).astype(wide)).view(np.uint64)
        addend = current(c)
        total = product + addend
        carry = np.broadcast_to(total < addend, gang.exec.shape)
        store(total)
        store_carry(carry)

    return step


def _scale_division(gang: Gang, instruction: Instruction) -> Step:
    values = [_source(gang, instruction, i, "f32", first=2) for i in range(3)]
    store, store_flag = _destination(gang, instruction, "f32"), store_lane_mask(gang, instruction.operands[1])

    def step() -> None:
        value, flag = math.scale_division(*map(current, values))
        store(value)
        store_flag(np.broadcast_to(flag, gang.exec.shape))

    return step


def _finish_division(gang: Gang, instruction: Instruction) -> Step:
    values = [_source(gang, instruction, i, "f32") for i in range(3)]
    store, flag = _destination(gang, instruction, "f32"), lane_mask(gang, "vcc")
    return lambda: store(math.scaled_fma(*map(current, (*values, flag))))


def _count_lower_lanes(gang: Gang, instruction: Instruction) -> Step:
    """v_mbcnt: the number of bits of a mask for lanes below this one (lo: lanes 0 to 31, hi: 32 to 63)."""
    mask, addend = (_source(gang, instruction, i, "u32") for i in range(2))
    store = _destination(gang, instruction, "u32")
    lane = np.arange(gang.wave_size) - (32 if "_hi_" in instruction.name else 0)
    below = ((1 << np.clip(lane, 0, 32).astype(np.uint64)) - np.uint64(1)).astype(np.uint32)
    return lambda: store(np.bitwise_count(current(mask) & below) + current(addend))


def _truth_table(gang: Gang, instruction: Instruction) -> Step:
    type = instruction.name[-3:]
    values = [_source(gang, instruction, i, type) for i in range(3)]
    store, table = _destination(gang, instruction, type), instruction.number("bitop3")
    return lambda: store(math.truth_table(table, *map(current, values)))


def _mixed_fma(gang: Gang, instruction: Instruction) -> Step:
    """v_fma_mix: each source is a float32, or half of a register as float16 if op_sel_hi is set."""
    is_half, which = instruction.bits("op_sel_hi", (0, 0, 0)), instruction.bits("op_sel", (0, 0, 0))
    values = [
        source(gang, instruction.operands[i + 1], "f16" if is_half[i] else "f32", half=which[i]) for i in range(3)
    ]

    def compute() -> np.ndarray:
        a, b, c = (current(value).astype(np.float64) for value in values)
        return (a * b + c).astype(np.float32)

    if instruction.name == "v_fma_mix_f32":
        store = destination(gang, instruction.operands[0], "f32")
        return lambda: store(compute())
    # both forms keep the other half, even on CDNA
    half = int(instruction.name == "v_fma_mixhi_f16")
    view = gang.v[vector_register(instruction.operands[0]).index].view(np.float16)[:, half::2]
    return lambda: np.copyto(view, compute(), where=gang.mask, casting="unsafe")


_PACKED: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul_lo": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "max_num": np.fmax,
    "min_num": np.fmin,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "maximum3": lambda a, b, c: np.maximum(np.maximum(a, b), c),
    "minimum3": lambda a, b, c: np.minimum(np.minimum(a, b), c),
    "fma": math.fma,
    "mad": lambda a, b, c: a * b + c,
    "lshlrev": lambda n, a: a << (n & 15),
    "lshrrev": lambda n, a: a >> (n & 15),
    "ashrrev": lambda n, a: a >> (n & 15),
}


def _packed(gang: Gang, instruction: Instruction) -> Step:
    """v_pk_*: two results, from the halves of registers (16 bits) or from pairs of them (32 bits)."""
    match = re.fullmatch(r"v_pk_(\w+)_([fiub]\d\d)", instruction.name)
    if match is None or match[1] not in (*_PACKED, "mov") or (match[1] == "mov") != (match[2] == "b32"):
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    type = match[2]
    dtype, number = TYPES[type], len(instruction.operands) - 1
    # for floats, a number takes precedence over a NaN
    compute = {"max": np.fmax, "min": np.fmin}.get(match[1]) if dtype.kind == "f" else None
    compute = compute or _PACKED.get(match[1], np.positive)
    results = [
        (instruction.bits("op_sel", (0,) * number), instruction.bits("neg_lo", (0,) * number)),
        (instruction.bits("op_sel_hi", (1,) * number), instruction.bits("neg_hi", (0,) * number)),
    ]
    first = vector_register(instruction.operands[0]).index
    if dtype.itemsize == 4:
        views = [gang.v[first + i].view(dtype) for i in range(2)]
    else:
        views = [gang.v[first].view(dtype)[:, i::2] for i in range(2)]
    values = [
        [_packed_source(gang, instruction.operands[i + 1], type, select[i], negate[i]) for i in range(number)]
        for select, negate in results
    ]
    if match[1] == "mov":
        # op_sel selects half of each source: that of the first is the low result, that of the second the high one
        values = [[values[0][0]], [values[0][1]]]
    if "clamp" in instruction.modifiers:
        compute = _clamped(compute) if dtype.kind == "f" else _saturated(instruction, type)

    def step() -> None:
        both = [compute(*map(current, sources)) for sources in values]
        for view, result in zip(views, both, strict=True):
            np.copyto(view, result, where=gang.mask, casting="unsafe")

    return step


def _packed_source(gang: Gang, text: str, type: str, select: int, negate: int) -> Value:
    text, negated, absolute, _ = split_modifiers(text)
    if negated or absolute:
        raise UnsupportedInstruction(f"unsupported sign modifiers of a packed operand {text!r}")
    reg = register(text)
    if reg is None and select and TYPES[type].itemsize == 2:
        value: Value = np.zeros((), TYPES[type])  # a constant has no upper half
    elif reg is not None and TYPES[type].itemsize == 4:
        value = source(gang, f"{reg.file}{reg.index + select}", type)
    else:
        value = source(gang, text, type, half=select)
    return (lambda: -current(value)) if negate else value


def _on_scalars(gang: Gang, instruction: Instruction) -> Step:
    """v_s_exp_f32 and similar of RDNA4: a transcendental function on scalar registers."""
    operation = OPERATIONS.get("v_" + instruction.name.removeprefix("v_s_"))
    if operation is None or len(operation.sources) != 1:
        raise UnsupportedInstruction(f"unsupported instruction {instruction}")
    value = source(gang, instruction.operands[1], operation.sources[0])
    store = destination(gang, instruction.operands[0], operation.result)
    return lambda: store(np.asarray(operation.compute(current(value)), TYPES[operation.result]))


# Instructions that are not in the table, by pattern.
_SPECIAL: dict[str, Callable[[Gang, Instruction], Step]] = {
    r"v_cmpx?_\w+": _compare,
    r"v_cndmask_b(16|32)": _choose,
    r"v_(add|sub)\w*_co_\w*u32": _add_or_subtract_with_carry,
    r"v_mad_(co_)?(u64_u32|i64_i32)": _multiply_add_64,
    r"v_div_scale_f32": _scale_division,
    r"v_div_fmas_f32": _finish_division,
    r"v_mbcnt_(lo|hi)_u32_b32": _count_lower_lanes,
    r"v_fmac_f(16|32|64)": _accumulate,
    r"v_fma_mix(lo|hi)?_f(16|32)": _mixed_fma,
    r"v_bitop3_b(16|32)": _truth_table,
    r"v_pk_\w+": _packed,
}
