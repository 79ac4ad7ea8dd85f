"""Parses assembly text into blocks of instructions.

The text is LLVM assembly for the target amdgcn, as in Triton's `kernel.asm["amdgcn"]`. Directives and metadata:
LLVM's "User Guide for AMDGPU Backend", sections "Code Object V5 Metadata" and "AMDHSA Kernel Directives".
"""

import dataclasses
import re
from collections.abc import Mapping

from .errors import MachineError

TARGETS = ("gfx942", "gfx950", "gfx1100", "gfx1201")

# Waits, hints and cache maintenance: the emulator models neither time nor caches.
_NO_EFFECT = re.compile(
    r"s_(waitcnt\w*|wait_\w+|nop|delay_alu|clause|setprio|sendmsg|sleep|set_inst_prefetch_distance|code_end|setreg\w*"
    r"|inst_prefetch|sched_\w+|icache_inv|dcache_\w+|round_mode|denorm_mode|ttracedata\w*|monitor_sleep|prefetch_\w+"
    r"|incperflevel|decperflevel)|buffer_(gl\d_inv|inv|wbl2|wbinvl1\w*)|global_(inv|wb|wbinv|prefetch_b8)|v_nop"
)
_ENDS_BLOCK = re.compile(r"s_c?branch\w*|s_barrier|s_barrier_wait|s_endpgm")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction. A dual-issue pair of RDNA is one instruction named v_dual with two `parts`."""

    name: str  # without the suffix of its encoding: v_add_f32
    encoding: str  # the suffix: e32, e64, dpp, sdwa, or empty
    operands: tuple[str, ...]
    modifiers: Mapping[str, str | bool | tuple[int, ...]]
    text: str
    line: int  # line number in the assembly text, from 1
    parts: tuple["Instruction", ...] = ()

    def __str__(self) -> str:
        return f"`{self.text}` (line {self.line})"

    def number(self, modifier: str) -> int:
        """The value of an integer modifier such as offset:16; 0 if absent."""
        value = self.modifiers.get(modifier, "0")
        return int(value, 0) if isinstance(value, str) else int(value is True)

    def bits(self, modifier: str, otherwise: tuple[int, ...]) -> tuple[int, ...]:
        """The value of a list modifier such as op_sel:[0,1]."""
        value = self.modifiers.get(modifier)
        return value if isinstance(value, tuple) else otherwise


@dataclasses.dataclass(frozen=True)
class Block:
    """A basic block: only its last instruction may branch, wait at a barrier or end the program."""

    instructions: tuple[Instruction, ...]


@dataclasses.dataclass(frozen=True)
class Argument:
    """A kernel argument: its offset and size in the kernarg segment in bytes; kind is LLVM's value_kind."""

    offset: int
    size: int
    kind: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed kernel."""

    name: str
    target: str
    wave_size: int
    blocks: tuple[Block, ...]
    labels: Mapping[str, int]  # label to index of the block
    arguments: tuple[Argument, ...]
    kernarg_bytes: int
    scratch_bytes: int  # per lane
    descriptor: Mapping[str, int]  # .amdhsa_ directives

    @property
    def is_cdna(self) -> bool:
        return self.target.startswith("gfx9")


def parse(text: str) -> Program:
    """Parses the single kernel in an assembly text.

    Raises:
      MachineError: no kernel in the text, or an unsupported target.
    """
    target = re.search(r'\.amdgcn_target\s+".*?(gfx\w+)', text)
    kernel = re.search(r"\.amdhsa_kernel (\S+)", text)
    if not target or not kernel:
        raise MachineError("no amdgcn kernel in the text: .amdgcn_target and .amdhsa_kernel are missing")
    if target[1] not in TARGETS:
        raise MachineError(f"the emulator does not support {target[1]}, only {', '.join(TARGETS)}")
    name = kernel[1]
    blocks, labels = _blocks(_lines_of(name, text))
    metadata = text[text.index(".amdgpu_metadata") :]

    def field(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", metadata)
        return int(found[1]) if found else 0

    return Program(
        name=name,
        target=target[1],
        wave_size=64 if target[1].startswith("gfx9") else 32,
        blocks=blocks,
        labels=labels,
        arguments=_arguments(metadata),
        kernarg_bytes=field("kernarg_segment_size"),
        scratch_bytes=field("private_segment_fixed_size"),
        descriptor={key: int(value, 0) for key, value in re.findall(r"\.amdhsa_(\w+) (\d\w*)\s", text)},
    )


def _lines_of(name: str, text: str) -> list[tuple[int, str]]:
    """(line number, line without comment) for each line of the kernel's body."""
    lines = text.split("\n")
    first = lines.index(next(line for line in lines if line.split(";")[0].strip() == f"{name}:"))
    end = next(i for i in range(first, len(lines)) if lines[i].lstrip().startswith(".size\t" + name))
    return [(i + 1, lines[i].split(";")[0].rstrip()) for i in range(first + 1, end)]


def _blocks(lines: list[tuple[int, str]]) -> tuple[tuple[Block, ...], dict[str, int]]:
    blocks: list[list[Instruction]] = [[]]
    labels = {}
    for number, line in lines:
        if label := re.fullmatch(r"(\.?\w+):", line):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif re.match(r"\s+[a-z]\w+(\s|$)", line):
            instruction = parse_instruction(line.strip(), number)
            if _NO_EFFECT.fullmatch(instruction.name):
                continue
            blocks[-1].append(instruction)
            if _ENDS_BLOCK.fullmatch(instruction.name):
                blocks.append([])
    return tuple(Block(tuple(block)) for block in blocks), labels


def parse_instruction(text: str, line: int) -> Instruction:
    """Parses one line of assembly without comment and label."""
    if "::" in text:
        halves = [half.strip().removeprefix("v_dual_") for half in text.split("::")]
        parts = tuple(parse_instruction("v_" + half, line) for half in halves)
        return Instruction("v_dual", "", (), {}, text, line, parts)
    mnemonic, *rest = text.split(None, 1)
    suffix = re.search(r"_(e64_dpp|e32|e64|dpp|dpp8|sdwa)$", mnemonic)
    name, encoding = (mnemonic[: suffix.start()], suffix[1]) if suffix else (mnemonic, "")
    operands, modifiers = _operands(*rest)
    return Instruction(name, encoding, operands, modifiers, " ".join(text.split()), line)


def _operands(text: str = "") -> tuple[tuple[str, ...], dict[str, str | bool | tuple[int, ...]]]:
    """Parses 'v1, s[2:3], 4 offset:8 op_sel:[0,1]' to ('v1', 's[2:3]', '4'), {'offset': '8', 'op_sel': (0, 1)}."""
    operands = [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text)] if text else []
    modifiers: dict[str, str | bool | tuple[int, ...]] = {}
    if operands:
        last, *rest = re.findall(r"(?:[^\s\[(]|\[[^\]]*\]|\([^)]*\))+", operands[-1])
        operands[-1] = last
        for word in rest:
            key, colon, value = word.partition(":")
            if value.startswith("["):
                modifiers[key] = tuple(int(item, 0) for item in value[1:-1].split(","))
            else:
                modifiers[key] = value if colon else True
    return tuple(operands), modifiers


def _arguments(metadata: str) -> tuple[Argument, ...]:
    listed = metadata[metadata.index(".args:") : metadata.index(".group_segment_fixed_size")]
    found = []
    for item in re.split(r"\n\s+- ", listed)[1:]:
        fields = dict(re.findall(r"\.(\w+):\s+(\S+)", item))
        found.append(Argument(int(fields["offset"]), int(fields["size"]), fields["value_kind"]))
    return tuple(found)
