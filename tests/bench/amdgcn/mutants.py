"""One-instruction changes to assembly, like those due to a bug in a compiler, in a kernel or in the emulator."""

import random
import re

from .support import without

# Pairs of strings in instruction names that are exchanged, in both directions.
_NEIGHBOURS = [
    ("add_", "sub_"),
    ("max_", "min_"),
    ("_lt_", "_gt_"),
    ("_le_", "_ge_"),
    ("_lt_", "_le_"),
    ("_gt_", "_ge_"),
    ("_eq_", "_ne_"),
    ("lshlrev_", "lshrrev_"),
    ("lshl_b", "lshr_b"),
    ("and_b", "or_b"),
    ("_xor_", "_and_"),
    ("mul_f32", "add_f32"),
    ("fma_f32", "max3_f32"),
    ("exp_f32", "log_f32"),
    ("scc0", "scc1"),
    ("execz", "execnz"),
    ("vccz", "vccnz"),
]
# Not modelled by the emulator, or without effect on the results.
_NO_MEANING = re.compile(
    r"s_(waitcnt|wait_|nop|delay_alu|clause|set|sleep|endpgm|code_end|barrier|sendmsg)|\w*prefetch|\w+_(inv|wb)"
    r"|v_max_\w+ v\d+, (?P<x>v\d+), (?P=x)$"  # converts a signalling NaN to a quiet one
    r"|v_dual_max_\w+ v\d+, (?P<y>v\d+), (?P=y) :: v_dual_max_\w+ v\d+, (?P<z>v\d+), (?P=z)$"
)


def mutants(asm: str, number: int, seed: int) -> list[tuple[str, str]]:
    """Seeded changes: (description, assembly). A quarter each of opcodes, constants, registers and deletions."""
    draw = random.Random(seed)
    lines = asm.split("\n")
    end = next(n for n, line in enumerate(lines) if line.startswith("\t.section"))
    code = [
        n
        for n in range(end)
        if re.match(r"\t[a-z]\w+", lines[n]) and not _NO_MEANING.match(lines[n].split(";")[0].strip())
    ]
    found: dict[str, str] = {}
    while len(found) < number:
        change = (_other_opcode, _other_constant, _other_register, _deleted)[len(found) % 4]
        at = draw.choice(code)
        changed = change(lines[at], draw)
        if changed is None:
            continue
        what = f"line {at + 1}: {' '.join(lines[at].split(';')[0].split())} -> {' '.join(changed.split()) or 'nothing'}"
        found[what] = "\n".join([*lines[:at], changed, *lines[at + 1 :]]) if changed else without(asm, [at])
    return list(found.items())


def _other_opcode(line: str, draw: random.Random) -> str | None:
    name, rest = re.match(r"\t(\w+)(.*)", line).groups()
    pairs = [(a, b) for pair in _NEIGHBOURS for a, b in (pair, pair[::-1]) if a in name]
    if not pairs:
        return None
    a, b = draw.choice(pairs)
    return f"\t{name.replace(a, b, 1)}{rest}"


def _other_constant(line: str, draw: random.Random) -> str | None:
    places = list(re.finditer(r"(?<=[\s:,\[-])(0x[0-9a-f]+|\d+)(?![\w.:\]])", line.split(";")[0]))
    if not places:
        return None
    place = draw.choice(places)
    value = int(place[0], 0)
    if value >= 1 << 16:  # the bits of a float: changing the lowest would only be a rounding error
        new = f"0x{value ^ 1 << draw.randrange(20, 31):x}"
    elif value == 0 and line[place.start() - 1] in " \t":  # as the bits of a float, 1 would be almost 0
        new = "1.0"
    elif "[" in line[: place.start()].split()[-1]:  # a list of lanes or of halves
        new = str(value ^ 1)
    else:
        new = str(value ^ 1 << draw.randrange(0, 5))
    return line[: place.start()] + new + line[place.end() :]


def _other_register(line: str, draw: random.Random) -> str | None:
    places = list(re.finditer(r"\b([vs])(\d+)\b|\b([vs])\[(\d+):(\d+)\]", line.split(";")[0]))[1:]  # all but the first
    if not places:
        return None
    place = draw.choice(places)
    step = draw.choice((-2, 2) if place[3] else (-1, 1))
    first = max(0, int(place[2] or place[4]) + step)
    if place[1]:
        new = f"{place[1]}{first}"
    else:
        new = f"{place[3]}[{first}:{first + int(place[5]) - int(place[4])}]"
    return line[: place.start()] + new + line[place.end() :] if new != place[0] else None


def _deleted(line: str, draw: random.Random) -> str:
    return ""
