"""Turns an AMD code object (HSACO, the ELF file that a GPU loads) into assembly text, as a compiler would write it.

The text has what amdgcn/ and machine_code.py read: the instructions, the kernel descriptor, and the metadata. It is
LLVM's disassembly (package llvm-nanobind). Formats: LLVM's "User Guide for AMDGPU Backend", sections "Code Object
Metadata" and "Kernel Descriptor".
"""

import io
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

_NOTE = 32  # NT_AMDGPU_METADATA
# bits of compute_pgm_rsrc1, compute_pgm_rsrc2 and kernel_code_properties: directive to (position, number)
_RSRC2 = {
    "enable_private_segment": (0, 1),
    "user_sgpr_count": (1, 5),
    "system_sgpr_workgroup_id_x": (7, 1),
    "system_sgpr_workgroup_id_y": (8, 1),
    "system_sgpr_workgroup_id_z": (9, 1),
    "system_sgpr_workgroup_info": (10, 1),
    "system_vgpr_workitem_id": (11, 2),
}
_RSRC1 = {"float_denorm_mode_32": (16, 2), "float_denorm_mode_16_64": (18, 2)}
_PROPERTIES = {
    "user_sgpr_private_segment_buffer": (0, 1),
    "user_sgpr_dispatch_ptr": (1, 1),
    "user_sgpr_queue_ptr": (2, 1),
    "user_sgpr_kernarg_segment_ptr": (3, 1),
    "user_sgpr_dispatch_id": (4, 1),
    "user_sgpr_flat_scratch_init": (5, 1),
    "user_sgpr_private_segment_size": (6, 1),
}
_PRELOAD = {"user_sgpr_kernarg_preload_length": (0, 7), "user_sgpr_kernarg_preload_offset": (7, 9)}
# Third and second source of a VOP3 word without one: LLVM 24 writes inline constants there, LLVM 21 insists on zeros.
_UNUSED_SOURCES = (0x1FF << 18, 0x3FFFF << 9)
_BRANCH = re.compile(r"(s_c?branch\w*) (\d+)")


class UndecodedError(RuntimeError):
    """The disassembler does not know an instruction; the message has its bytes."""


def assembly(hsaco: bytes, arch: str) -> str:
    """The assembly text of the only kernel in a code object for arch.

    Raises:
      UndecodedError: an instruction could not be disassembled.
    """
    from elftools.elf.elffile import ELFFile

    elf = ELFFile(io.BytesIO(hsaco))
    sections: dict[str, Any] = {section.name: section for section in elf.iter_sections()}
    symbols = {symbol.name: symbol for symbol in sections[".dynsym"].iter_symbols()}
    [name] = (name.removesuffix(".kd") for name in symbols if name.endswith(".kd"))

    def content(symbol: Any) -> bytes:
        section = next(s for s in sections.values() if s["sh_addr"] <= symbol["st_value"] < s["sh_addr"] + s["sh_size"])
        start = symbol["st_value"] - section["sh_addr"]
        return section.data()[start : start + symbol["st_size"]]

    lines = _instructions(content(symbols[name]), arch)
    descriptor = _descriptor(content(symbols[f"{name}.kd"]))
    directives = [f"\t\t.amdhsa_{key} {value}" for key, value in descriptor.items()]
    return "\n".join(
        [
            f'\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"',
            "\t.text",
            f"{name}:",
            *lines,
            f'\t.section\t.rodata,"a"\n\t.amdhsa_kernel {name}',
            *directives,
            "\t.end_amdhsa_kernel",
            "\t.text",
            f"\t.size\t{name}, .-{name}",
            "\t.amdgpu_metadata",
            *_yaml(_metadata(sections[".note"])),
            "\t.end_amdgpu_metadata",
            "",
        ]
    )


def _instructions(code: bytes, arch: str) -> list[str]:
    """Lines of assembly; targets of branches have labels."""
    import llvm  # pyright: ignore[reportMissingImports]

    features = "" if arch.startswith("gfx9") else "+wavefrontsize32,+real-true16"
    decoder = llvm.DisasmContext.create("amdgcn-amd-amdhsa", arch, features)
    found: list[tuple[int, str]] = []
    targets: dict[int, str] = {}
    at = 0
    while at < len(code):
        size, text = _decoded(decoder, code[at:], at)
        if branch := _BRANCH.match(text):
            words = int(branch[2])
            target = at + size + 4 * (words - 65_536 * (words >= 32_768))
            label = targets.setdefault(target, f".L{len(targets)}")
            text = f"{branch[1]} {label}"
        found.append((at, text))
        at += size
    lines = []
    for at, text in found:
        lines += [f"{targets[at]}:"] if at in targets else []
        lines.append(f"\t{text}")
    return lines


def _decoded(decoder: Any, code: bytes, at: int) -> tuple[int, str]:
    words = code[:20]
    size, text = decoder.disasm_instruction(words, 0, at)
    if size and ".long" not in text:
        return size, text.strip()
    if len(words) >= 8:
        low, high = struct.unpack_from("<II", words)
        for unused in _UNUSED_SOURCES:
            size, text = decoder.disasm_instruction(struct.pack("<II", low, high & ~unused) + words[8:], 0, at)
            if size and ".long" not in text:
                return size, text.strip()
    raise UndecodedError(f"LLVM's disassembler does not know the instruction at byte {at}: {words[:8].hex(' ', 4)}")


def _descriptor(kd: bytes) -> dict[str, int]:
    """The directives of a kernel descriptor that the emulator reads, and sizes."""
    group, private, kernarg = struct.unpack_from("<III", kd)
    rsrc1, rsrc2 = struct.unpack_from("<II", kd, 48)
    properties, preload = struct.unpack_from("<HH", kd, 56)
    sizes = {"group_segment_fixed_size": group, "private_segment_fixed_size": private, "kernarg_size": kernarg}
    fields = ((rsrc1, _RSRC1), (rsrc2, _RSRC2), (properties, _PROPERTIES), (preload, _PRELOAD))
    return sizes | {
        key: word >> position & (1 << bits) - 1 for word, keys in fields for key, (position, bits) in keys.items()
    }


def _metadata(notes: Any) -> Any:
    import msgpack  # pyright: ignore[reportMissingImports]

    for note in notes.iter_notes():
        if note["n_type"] in (_NOTE, "NT_AMDGPU_METADATA"):
            desc = note["n_desc"]
            return msgpack.unpackb(desc if isinstance(desc, bytes) else desc.encode("latin-1"))
    raise ValueError("the code object has no metadata")


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Lines of YAML, laid out as LLVM prints them."""
    if isinstance(value, Mapping):
        for key, item in sorted(value.items()):
            if isinstance(item, Mapping | list):
                yield f"{indent}{key}:"
                yield from _yaml(item, indent + "  ")
            else:
                yield f"{indent}{f'{key}:':<16} {item}"
    else:
        for item in value:
            first, *rest = _yaml(item, indent + "  ") if isinstance(item, Mapping | list) else [f"{indent}  {item}"]
            yield f"{indent}- {first[len(indent) + 2 :]}"
            yield from rest
