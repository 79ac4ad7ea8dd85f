"""Estimates a kernel's speed from its machine code: registers, spills, memory, and the instructions of its main loop.

`read` returns these fields. Cycles are issue cycles of one wave; they are counted, not measured.

    vgpr, agpr, sgpr        registers per lane (NVIDIA: vgpr is the registers per thread)
    vgpr_spills             registers that are spilled to memory, anywhere in the kernel
    scratch_bytes           memory per lane for them
    lds_bytes, lds_limit    LDS or shared memory of a workgroup, and its limit
    waves_per_simd          occupancy: resident waves per SIMD, in whole workgroups, limited by registers and LDS
    matrix_instructions     number of MFMA, WMMA (NVIDIA: mma, wgmma, tcgen05.mma) instructions in the kernel
    loop_cycles             cycles of one iteration of the main loop by class (INSTRUCTIONS). `lds_data` are not issue
                            cycles: the time of the LDS for the loop's data while all SIMDs of the unit access it
    masked_loop_cycles      the same for the loop over masked tiles; None: no such loop (unrolled, or not needed)
    dual_issue              dual-issue instructions of the main loop (RDNA's v_dual_...)
    useful_matrix_cycles    cycles of the dots of one iteration at the matrix peak: from the Triton IR, divided among
                            the waves. If loop_cycles' matrix is more, waves compute redundant products, or the
                            instruction is not of the fast form
    matrix_bound            useful / max(matrix, vector + transcendental): the fraction of the matrix peak that the main
                            loop could reach if everything overlapped perfectly. An upper bound, not a measurement
    flop_per_cycle          FLOP of the dots of one iteration per cycle and SIMD: / (max(matrix, vector +
                            transcendental) + time of spilled registers in the loop). Compares tiles of one kernel, even
                            if no matrix instruction supports its dtype
    loop_bytes              bytes that a workgroup loads from global memory in one iteration of the main loop
    memory_cycles           their time at a compute unit's share of the memory bandwidth, without caches
    memory_bound_share      memory_cycles / max(memory_cycles, issue cycles of the workgroup on its unit). 1: only
                            memory limits the loop, as it should in decode; 0.3: it could use 0.3 of the bandwidth

The main loop is the innermost one with the most matrix work; among equals (masked and unmasked tiles) the one with less
vector work. Without matrix instructions it is the one that loads the most bytes. The whole loop body is counted, even
if a branch inside may skip a part. Fields that are not available on an architecture are None.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jfa_models.rates import CARDS

from .aot import Compiled, device, is_amd, is_cdna


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak rates of an architecture's most common card: vendor's peak / (units * SIMDs per unit * boost clock)."""

    card: str
    matrix: dict[str, int]  # dense FLOP per cycle and SIMD by kind of input (_kind); no entry: no instruction
    bytes_per_cycle: float  # memory bandwidth per cycle and compute unit
    lds_bytes_per_cycle: int  # per SIMD, if all SIMDs of the unit are busy
    simds: int  # per compute unit


# Sources: AMD's data sheets of the cards (peak TFLOP/s, TB/s, compute units, boost clock) and white papers CDNA 3
# (LDS: 128 bytes per cycle and unit), CDNA 4 (256), RDNA 3 (128 for two SIMDs). MI210 represents the gfx90a family.
# Where CARDS has another card, its memory is as fast.
RATES = {
    "gfx90a": Rates(
        card="MI210",
        matrix={"16 bits": 256, "8 bits": 256, "f32": 64},
        bytes_per_cycle=CARDS["gfx90a"].memory_gb_per_s / 104 / 1.7,
        lds_bytes_per_cycle=32,
        simds=4,
    ),
    "gfx942": Rates(
        card="MI300X",
        matrix={"16 bits": 512, "8 bits": 1024, "f32": 64, "tf32": 256},
        bytes_per_cycle=CARDS["gfx942"].memory_gb_per_s / 304 / 2.1,
        lds_bytes_per_cycle=32,
        simds=4,
    ),
    "gfx950": Rates(
        card="MI355X",
        matrix={"16 bits": 1024, "8 bits": 2048, "f32": 64},
        bytes_per_cycle=CARDS["gfx950"].memory_gb_per_s / 256 / 2.4,
        lds_bytes_per_cycle=64,
        simds=4,
    ),
    "gfx1100": Rates(
        card="RX 7900 XTX",
        matrix={"16 bits": 256, "8 bits": 256},
        bytes_per_cycle=CARDS["gfx1100"].memory_gb_per_s / 96 / 2.5,
        lds_bytes_per_cycle=64,
        simds=2,
    ),
    "gfx1201": Rates(
        card="RX 9070 XT",
        matrix={"16 bits": 512, "8 bits": 1024},
        bytes_per_cycle=CARDS["gfx1201"].memory_gb_per_s / 64 / 2.97,
        lds_bytes_per_cycle=64,
        simds=2,
    ),
}

L1_BYTES_PER_CYCLE = 64  # per compute unit; the L1 cache holds spilled registers first. Source: the same white papers

# Instruction forms that gfx950 inherits from gfx942 take the same number of cycles: half the rate of its deeper ones.
# Source: LLVM's SISchedule.td, passes of SIDPGFX950FullSpeedModel.
_OLD_FORMS_OF_GFX950 = {
    ("32x32x8", "16 bits"),
    ("16x16x16", "16 bits"),
    ("32x32x16", "8 bits"),
    ("16x16x32", "8 bits"),
}

# (mnemonic, class, issue slots); the first match wins. A slot is 4 cycles on CDNA (64 lanes over 16) and 1 on RDNA (32
# lanes at once). Quarter rate: LLVM's SISchedule.td (WriteTrans32, WriteQuarterRate32). None: negligible cost.
INSTRUCTIONS: tuple[tuple[str, str | None, int], ...] = (
    (r"v_(mfma|smfmac|wmma|swmmac)_", "matrix", 0),  # from the shape: _matrix_cycles
    (r"v_(s_)?(exp|log|rcp|rsq|sqrt|sin|cos)_", "transcendental", 4),
    (r"v_(mul_(lo|hi)_[iu]32|mad_[iu]64_[iu]32)", "vector", 4),
    (r"v_nop", None, 0),
    (r"v_", "vector", 1),  # v_dual_...: two operations in one slot
    (r"ds_nop", None, 0),
    (r"ds_", "lds", 1),
    (r"scratch_", "scratch", 1),
    (r"(global|buffer|flat)_(inv|wb|wbl2|wbinv|gl\d_inv)", None, 0),
    (r"(global|buffer|flat)_", "memory", 1),
    (r"s_", None, 0),  # another unit issues them in parallel with vector instructions
)
_INSTRUCTIONS = tuple((re.compile(pattern), kind, slots) for pattern, kind, slots in INSTRUCTIONS)

FIELDS = (
    *("vgpr", "agpr", "sgpr", "vgpr_spills", "scratch_bytes", "lds_bytes", "lds_limit", "waves_per_simd"),
    *("matrix_instructions", "loop_cycles", "masked_loop_cycles", "dual_issue", "useful_matrix_cycles"),
    *("matrix_bound", "flop_per_cycle", "loop_bytes", "memory_cycles", "memory_bound_share"),
)

_MATRIX = re.compile(r"v_(?:mfma|smfmac|wmma|swmmac)_(?:scale_)?\w+?_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?(\w*)")
_NVIDIA_MATRIX = re.compile(r"^\s*(?:@\S+\s+)?(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.", re.MULTILINE)


def read(compiled: Compiled) -> dict[str, Any]:
    """FIELDS of one kernel, as defined in the module's docstring."""
    found: dict[str, Any] = {"lds_bytes": compiled.lds_bytes, "lds_limit": device(compiled.arch).lds_bytes}
    if compiled.asm:
        found |= _amd(compiled) if is_amd(compiled.arch) else _nvidia(compiled)
    return {field: found.get(field) for field in FIELDS}


def _amd(compiled: Compiled) -> dict[str, Any]:
    arch, kernel = compiled.arch, compiled.kernel
    body, loops = parse(compiled.asm)
    costs = [_cost(loop, arch) for loop in loops]
    main, masked = _main_and_masked(costs)
    cycles = main.cycles
    matrix, vector = cycles.get("matrix", 0), cycles.get("vector", 0) + cycles.get("transcendental", 0)
    flop, kind = dot_flop(kernel.ttir)
    rate = RATES[arch].matrix.get(kind) if kind else None
    useful = flop / rate / kernel.num_warps if rate and matrix else 0.0
    busy = max(matrix, vector)
    spilling = main.scratch_bytes / (L1_BYTES_PER_CYCLE / RATES[arch].simds)
    loop_bytes = main.loaded_bytes * kernel.num_warps
    memory = loop_bytes / RATES[arch].bytes_per_cycle
    issue = busy * kernel.num_warps / RATES[arch].simds
    return {
        "vgpr": _metadata(compiled.asm, "vgpr_count"),
        "agpr": _metadata(compiled.asm, "agpr_count"),
        "sgpr": _metadata(compiled.asm, "sgpr_count"),
        "vgpr_spills": _metadata(compiled.asm, "vgpr_spill_count"),
        "scratch_bytes": _metadata(compiled.asm, "private_segment_fixed_size"),
        "waves_per_simd": _waves_per_simd(compiled),
        "matrix_instructions": sum(_class(code)[0] == "matrix" for code in body),
        "loop_cycles": {name: round(n) for name, n in cycles.items()},
        "masked_loop_cycles": {name: round(n) for name, n in masked.cycles.items()} if masked else None,
        "dual_issue": main.dual,
        "useful_matrix_cycles": round(useful),
        "matrix_bound": round(min(useful, matrix) / busy, 3) if matrix else None,
        "flop_per_cycle": round(flop / kernel.num_warps / (busy + spilling), 1) if flop and busy else None,
        "loop_bytes": loop_bytes,
        "memory_cycles": round(memory),
        "memory_bound_share": round(memory / max(memory, issue), 3) if loop_bytes else None,
    }


def _nvidia(compiled: Compiled) -> dict[str, Any]:
    """Registers and stack come from the binary; cycles would need a model of hardware that NVIDIA does not document."""
    return {
        "vgpr": compiled.registers,
        "vgpr_spills": (compiled.stack_bytes or 0) // 4,
        "scratch_bytes": compiled.stack_bytes,
        "matrix_instructions": len(_NVIDIA_MATRIX.findall(compiled.asm)),
    }


def parse(asm: str) -> tuple[list[str], list[list[str]]]:
    """(instructions, instructions of each innermost loop) of the kernel in an AMD assembly text, without comments.

    Loops are the natural loops of the control flow: a compiler may place the blocks of a loop apart and in any order.
    Spills by buffer instructions (gfx90a) are returned as scratch instructions.
    """
    blocks, successors = _blocks(asm)
    inner = [sorted(loop) for loop in _innermost_loops(successors)]
    body = [code for block in blocks for code in block]
    return body, [[code for number in loop for code in blocks[number]] for loop in sorted(inner)]


def _blocks(asm: str) -> tuple[list[list[str]], list[list[int]]]:
    """(instructions of each basic block, the blocks that may follow each)."""
    spilled = _spilling(asm)
    blocks: list[list[str]] = [[]]
    labels: dict[str, int] = {}
    for line in asm.split("\n"):
        code = line.partition(";")[0].strip()
        if label := re.fullmatch(r"(\.?\w+):", code):
            blocks += [[]] if blocks[-1] else []
            labels[label[1]] = len(blocks) - 1
        elif re.match(r"[a-z]\w+(\s|$)", code):
            blocks[-1].append(re.sub(r"^buffer_", "scratch_", code) if spilled(code) else code)
            if re.match(r"s_(c?branch|endpgm)", code):
                blocks.append([])
        elif code.startswith(".amdhsa_kernel"):
            break
    successors = []
    for number, block in enumerate(blocks):
        last, *operands = block[-1].split() if block else [""]
        following = [] if last in ("s_branch", "s_endpgm") or number + 1 == len(blocks) else [number + 1]
        jumps = last.startswith(("s_branch", "s_cbranch"))
        successors.append(following + ([labels[operands[0]]] if jumps else []))
    return blocks, successors


def _spilling(asm: str) -> Callable[[str], bool]:
    """Whether an instruction spills: gfx90a addresses scratch memory by a buffer whose descriptor is in s[0:3]."""
    if not _metadata(asm, "private_segment_fixed_size") or "gfx90a" not in asm:
        return lambda code: False
    return lambda code: re.match(r"buffer_(load|store)_\w+ \w\S*, off, s\[0:3\], 0", code) is not None


def _innermost_loops(successors: Sequence[Sequence[int]]) -> list[set[int]]:
    """The blocks of each natural loop that contains no other one."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for number, following in enumerate(successors):
        for other in following:
            predecessors[other].append(number)
    loops: dict[int, set[int]] = {}  # by header
    for latch, header in _back_edges(successors):
        loop, left = loops.setdefault(header, {header}), [latch]
        while left:
            number = left.pop()
            if number not in loop:
                loop.add(number)
                left += predecessors[number]
    return [loop for header, loop in loops.items() if not any(other in loop for other in loops if other != header)]


def _back_edges(successors: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The edges to a block that is on the path of a depth-first walk to their start."""
    found, seen = [], {0}
    path: list[tuple[int, Iterator[int]]] = [(0, iter(successors[0]))]
    while path:
        number, following = path[-1]
        other = next(following, None)
        if other is None:
            path.pop()
        elif other not in seen:
            seen.add(other)
            path.append((other, iter(successors[other])))
        elif any(other == on_path for on_path, _ in path):
            found.append((number, other))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Cost:
    """The cost of one iteration of a loop, for one wave."""

    cycles: dict[str, float]
    loaded_bytes: int
    scratch_bytes: int
    dual: int


def _cost(codes: Sequence[str], arch: str) -> _Cost:
    lanes, slot = (64, 4) if is_cdna(arch) else (32, 1)
    cycles: collections.defaultdict[str, float] = collections.defaultdict(float)
    loaded = scratch = dual = 0
    lds_data = 0.0
    for code in codes:
        kind, slots = _class(code)
        if kind is None:
            continue
        cycles[kind] += _matrix_cycles(code, arch) if kind == "matrix" else slots * slot
        name = code.split()[0]
        dual += name.startswith("v_dual_")
        if kind == "lds":
            # a bank is four bytes wide: smaller accesses take as long
            lds_data += max(4, _bytes_per_lane(name)) * lanes / RATES[arch].lds_bytes_per_cycle
        elif kind == "scratch":
            scratch += _bytes_per_lane(name) * lanes
        elif kind == "memory" and "_load_" in name:
            loaded += _bytes_per_lane(name) * lanes
    if lds_data:
        cycles["lds_data"] += round(lds_data)
    return _Cost(cycles=dict(cycles), loaded_bytes=loaded, scratch_bytes=scratch, dual=dual)


def _class(code: str) -> tuple[str | None, int]:
    name = code.split()[0]
    return next(((kind, slots) for pattern, kind, slots in _INSTRUCTIONS if pattern.match(name)), (None, 0))


def _bytes_per_lane(name: str) -> int:
    """Bytes that one lane accesses, from the mnemonic: global_load_dwordx4, ds_load_2addr_b64, buffer_load_u16, ..."""
    if found := re.search(r"dwordx(\d)", name):
        return 4 * int(found[1])
    named = {"dword": 4, "short": 2, "byte": 1}
    if word := next((word for word in named if word in name), None):
        return named[word]
    if found := re.search(r"_[biuf](\d+)", name):
        two = re.search(r"(read|write)2|2addr", name) is not None
        return int(found[1]) // 8 * (2 if two else 1)
    return 4


def _matrix_cycles(code: str, arch: str) -> float:
    found = _MATRIX.match(code.split()[0])
    if found is None:
        raise ValueError(f"matrix instruction without a shape in its name: {code!r}")
    m, n, k = (int(found[i]) for i in (1, 2, 3))
    kind = _kind(found[5])
    arch = "gfx942" if arch == "gfx950" and (f"{m}x{n}x{k}", kind) in _OLD_FORMS_OF_GFX950 else arch
    return 2 * m * n * k * int(found[4] or 1) / RATES[arch].matrix[kind]


def _kind(dtype: str) -> str:
    """The key of Rates.matrix for a dtype as written in mnemonics and Triton IR: bf16_1k, fp8_fp8, ..."""
    if re.match(r"xf32|tf32", dtype):
        return "tf32"
    if re.match(r"f32", dtype):
        return "f32"
    return "8 bits" if re.match(r"i8|iu8|fp8|bf8|f8", dtype) else "16 bits"


def _main_and_masked(costs: Sequence[_Cost]) -> tuple[_Cost, _Cost | None]:
    """The main loop, and the loop with the same products and the most vector work."""
    if not costs:
        return _Cost(cycles={}, loaded_bytes=0, scratch_bytes=0, dual=0), None

    def vector(cost: _Cost) -> float:
        return cost.cycles.get("vector", 0) + cost.cycles.get("transcendental", 0)

    def work(cost: _Cost) -> tuple[float, float]:
        return (cost.cycles.get("matrix", 0), 0 if cost.cycles.get("matrix") else cost.loaded_bytes)

    main = max(costs, key=lambda cost: (*work(cost), -vector(cost)))
    others = [cost for cost in costs if cost is not main and work(cost) == work(main) and any(work(main))]
    return main, max(others, key=vector, default=None)


def dot_flop(ttir: str) -> tuple[int, str | None]:
    """(FLOP per workgroup in one iteration of the loop with the most dot work, kind of its inputs) in Triton IR."""
    best: tuple[int, str | None] = (0, None)
    open_loops: list[tuple[int, dict[str, int]]] = []
    depth = 0
    for line in ttir.split("\n"):
        opens = re.search(r"\bscf\.(for|while)\b", line) is not None
        if opens:
            open_loops.append((depth, collections.Counter()))
        depth += line.count("{") - line.count("}")
        if open_loops and (found := re.search(r"tt\.dot .*: tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x", line)):
            tf32 = found[3] == "f32" and "inputPrecision = tf32" in line
            kind = _kind("tf32" if tf32 else found[3])
            open_loops[-1][1][kind] += 2 * int(found[1]) * int(found[2]) * int(found[4])
        while open_loops and depth <= open_loops[-1][0] and not opens:
            flop = open_loops.pop()[1]
            if sum(flop.values()) > best[0]:
                best = (sum(flop.values()), max(flop, key=flop.__getitem__))
    return best


def _waves_per_simd(compiled: Compiled) -> int | float:
    """Occupancy in waves per SIMD, in whole workgroups.

    Registers are allocated in units. Four SIMDs share the LDS: those of a compute unit on CDNA, those of two units (a
    WGP, with twice the limit of a workgroup) on RDNA.

    Source: LLVM's AMDGPUBaseInfo.cpp, getNumWavesPerEUWithNumVGPRs and getOccupancyWithNumSGPRs.
    """
    cdna = is_cdna(compiled.arch)
    most, registers, unit = (8, 512, 8) if cdna else (16, 1536, 24)
    vgpr = max(1, _metadata(compiled.asm, "vgpr_count"))
    waves = min(most, registers // (-(-vgpr // unit) * unit))
    if cdna and _metadata(compiled.asm, "sgpr_count") > 100:
        waves = min(waves, 7)
    num_warps = compiled.kernel.num_warps
    groups = max(1, waves * 4 // num_warps)
    if compiled.lds_bytes:
        pool = device(compiled.arch).lds_bytes * (1 if cdna else 2)
        groups = min(groups, pool // compiled.lds_bytes)
    waves = groups * num_warps / 4
    return int(waves) if waves == int(waves) else waves


def _metadata(asm: str, key: str) -> int:
    """A number in the metadata of the assembly's kernel; 0 if the architecture does not have it."""
    return int((re.findall(rf"\.{key}:\s+(\d+)", asm) or ["0"])[-1])
