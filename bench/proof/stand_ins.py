"""Stand-ins for the shared libraries that a JAX plugin links to and this machine lacks: ROCm's, without ROCm.

A plugin is loaded here for its compiler, which calls none of them, but the dynamic linker wants them all. A stand-in is
an x86-64 ELF file, written by `shared_object`, whose functions all return 1, an error to every caller.
"""

import ctypes
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PAGE = 4096
_CODE = bytes.fromhex("b801000000c3")  # mov eax, 1; ret


def load(plugin: Path) -> tuple[str, ...]:
    """Loads a stand-in for each missing library of a plugin, before the plugin itself; returns their names."""
    missing, functions = _missing(plugin)
    with tempfile.TemporaryDirectory() as folder:
        for name in missing:
            file = Path(folder) / name
            # the linker searches all loaded libraries for a function: one of them may have them all
            file.write_bytes(shared_object(name, functions if name == missing[0] else ()))
            ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    return missing


def _missing(plugin: Path) -> tuple[tuple[str, ...], list[str]]:
    """(names of the libraries that a plugin needs and this machine lacks, the functions to expect in them)."""
    from elftools.elf.elffile import ELFFile

    with plugin.open("rb") as file:
        elf = ELFFile(file)
        sections: dict[str, Any] = {section.name: section for section in elf.iter_sections()}
        missing = []
        for tag in sections[".dynamic"].iter_tags("DT_NEEDED"):
            try:
                ctypes.CDLL(tag.needed)
            except OSError:
                missing.append(tag.needed)
        if not missing:
            return (), []
        library = {
            entry["vna_other"]: needed.name
            for needed, entries in sections[".gnu.version_r"].iter_versions()
            for entry in entries
        }
        versions = sections[".gnu.version"]
        functions = []
        for number, symbol in enumerate(sections[".dynsym"].iter_symbols()):
            undefined = symbol["st_shndx"] == "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_WEAK"
            # a function with a version belongs to the library that has it; one without may be of any
            if undefined and symbol.name and library.get(versions.get_symbol(number)["ndx"], missing[0]) in missing:
                functions.append(symbol.name)
    return tuple(missing), functions


def shared_object(soname: str, functions: Sequence[str]) -> bytes:
    """An x86-64 ELF shared library with these functions, which return 1.

    Source: System V ABI, chapters "Object Files" and "Program Loading and Dynamic Linking".
    """
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in (soname, *functions))
    names = [0]  # offset of each symbol's name; symbol 0 is undefined
    at = 1 + len(soname.encode()) + 1
    for name in functions:
        names.append(at)
        at += len(name.encode()) + 1

    code_at = 64 + 4 * 56  # behind the ELF header and the program headers
    symbols_at = code_at + 8
    symbols = bytes(24) + b"".join(struct.pack("<IBBHQQ", name, 0x12, 0, 1, code_at, len(_CODE)) for name in names[1:])
    # one bucket, whose chain visits every symbol
    chain = [0, *range(2, len(names)), 0][: len(names)]
    table = struct.pack(f"<{3 + len(chain)}I", 1, len(chain), int(bool(functions)), *chain)
    table_at = symbols_at + len(symbols)
    strings_at = table_at + len(table)
    end = strings_at + len(strings)
    dynamic_at = -(-end // _PAGE) * _PAGE
    tags = {14: 1, 4: table_at, 5: strings_at, 6: symbols_at, 10: len(strings), 11: 24, 0: 0}  # DT_SONAME, DT_HASH, ...
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags.items())

    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    segments = (
        (1, 5, 0, 0, 0, end, end, _PAGE),  # PT_LOAD, read and execute
        (1, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), _PAGE),  # PT_LOAD, read and write
        (2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0, 0, 0, 0, 16),  # PT_GNU_STACK: the stack is not executable
    )
    start = header + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments) + _CODE.ljust(8, b"\0")
    return (start + symbols + table + strings).ljust(dynamic_at, b"\0") + dynamic
