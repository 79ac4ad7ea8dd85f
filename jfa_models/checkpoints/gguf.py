"""Reads .gguf files. Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The header is parsed here: the reader of the `gguf` package creates several arrays for each of the about 100,000 strings
of a vocabulary, which takes seconds and 150 MB for SmolLM2. Only the package's tables of types are used.
"""

import dataclasses
import io
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jfa_models.checkpoints import gguf_mixers
from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.families import FAMILIES, gguf_names
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.gguf_config import config_from_gguf
from jfa_models.checkpoints.locate import parts_of
from jfa_models.checkpoints.names import ROPE_DIVISORS, by_our_names
from jfa_models.checkpoints.tensors import StoredTensor, check_length, damaged, main_encoding

_ALIGNMENT = 32  # of the tensors, unless general.alignment says otherwise


def open_gguf(path: Path) -> Checkpoint:
    """Opens a .gguf file; of a model in several files, any of them.

    Raises:
      ValueError: a file is damaged, the model is not supported, or its parts are missing or do not belong together.
    """
    metadata, stored = _read_parts(parts_of(path))
    divisors = {name: tuple(stored[name].read(np.float32).tolist()) for name in ROPE_DIVISORS if name in stored}
    config = config_from_gguf(metadata, stored.keys(), divisors)
    named = gguf_mixers.by_names_of_modules(stored)
    tensors, unknown = by_our_names(named, gguf_names(config.architecture), config)
    for name, tensor in tensors.items():
        module, kind = name.split(".")[-2:]
        heads = {"q": config.num_q_heads, "k": config.num_kv_heads}.get(module)
        if heads and FAMILIES[config.architecture].permuted:
            tensors[name] = dataclasses.replace(tensor, interleaved_heads=heads)
        if kind == "scale" and config.norm == "rms_plus_one" and ".mixer." not in name:
            tensors[name] = dataclasses.replace(tensor, minus=1.0)
    return Checkpoint(
        path=path,
        config=config,
        generation=GenerationDefaults.from_gguf(metadata),
        stored_dtype=main_encoding(stored),
        tensors=gguf_mixers.as_parameters(tensors, config),
        unknown=unknown,
        metadata=metadata,
    )


def _read_parts(files: Sequence[Path]) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata, all of which is in the first part, and the tensors of all parts."""
    if missing := [file.name for file in files if not file.is_file()]:
        several = (
            f"{', '.join(missing[:3])} and {len(missing) - 3} more parts" if len(missing) > 4 else ", ".join(missing)
        )
        raise ValueError(f"{files[0].parent} lacks {several} of the model; download them too")
    metadata, tensors = _read_gguf_header(files[0])
    alignments = (metadata.get("general.alignment", _ALIGNMENT), _ALIGNMENT)
    count = metadata.get("split.count", 1)
    if count != len(files):
        raise ValueError(
            f"{files[0]} is a part of {count}, and its name says {len(files)}; "
            "give it the name that it had, or merge the parts with llama-gguf-split --merge"
        )
    for number, file in enumerate(files):
        own, more = (metadata, {}) if number == 0 else _read_gguf_header(file, alignments)
        if len(files) > 1 and (own.get("split.no"), own.get("split.count")) != (number, count):
            raise ValueError(
                f"{file} says that it is part {own.get('split.no')} (from 0) of {own.get('split.count')}; "
                "download it again"
            )
        if twice := sorted(tensors.keys() & more.keys()):
            raise ValueError(f"{file} has tensors that another part has too, such as {twice[0]}; download it again")
        tensors |= more
    if len(tensors) != metadata.get("split.tensors.count", len(tensors)):
        raise ValueError(
            f"{files[0]} and its other parts must have {metadata['split.tensors.count']} tensors, and have "
            f"{len(tensors)}: they are of different models; download them again"
        )
    return metadata, tensors


# Value types of the key-value pairs, as `struct` codes. Source: the GGUF specification, gguf_metadata_value_type.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

_STRING, _ARRAY = 8, 9


class _GgufFields:
    """Reads the fields in the header of a GGUF file one after another."""

    def __init__(self, file: Path, stream: io.BufferedReader) -> None:
        self._file = file
        self._stream = stream
        self._left = os.fstat(stream.fileno()).st_size

    def take(self, num_bytes: int) -> bytes:
        self._left -= num_bytes
        if self._left < 0:  # checked before allocating: in a damaged file the size may be any number
            raise damaged(self._file, f"its header is {-self._left} bytes longer than the file")
        return self._stream.read(num_bytes)

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self._file, "a string in its header is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.scalar(self._code(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        return list(self.scalars(self._code(kind), count))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise damaged(self._file, f"its header has a value of unknown type {kind}")
        return _SCALARS[kind]


def _read_gguf_header(
    path: Path, alignments: Sequence[int] = (_ALIGNMENT,)
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Parses little-endian fields: key-value pairs, then a table of tensors. Padding and the tensors follow.

    alignments: of a file that does not say it, the likeliest first; the length of the file decides. The parts after the
    first do not say it: the gguf package writes them with that of the first, llama-gguf-split with 32.
    """
    with open(path, "rb") as stream:
        fields = _GgufFields(path, stream)
        if (magic := fields.take(4)) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}; download it again")
        if (version := fields.scalar("I")) not in (2, 3):
            raise ValueError(f"{path}: only little-endian GGUF versions 2 and 3 are supported, got {version:#x}")
        num_tensors, num_pairs = fields.scalars("Q", 2)
        metadata = {fields.text(): fields.value(fields.scalar("I")) for _ in range(num_pairs)}
        infos = [
            (fields.text(), fields.scalars("Q", fields.scalar("I")), fields.scalar("I"), fields.scalar("Q"))
            for _ in range(num_tensors)
        ]
        if (alignment := metadata.get("general.alignment")) is not None:
            alignments = (alignment,)
        if any(type(alignment) is not int or alignment < 1 for alignment in alignments):
            raise damaged(path, f"general.alignment is {alignments[0]!r}")
        header = stream.tell()
    tensors = {}
    for name, extents, kind, offset in infos:
        if kind not in GGMLQuantizationType:
            raise ValueError(f"{path}: {name} has type {kind}, which the gguf package does not know; upgrade gguf")
        encoding = GGMLQuantizationType(kind)
        block_elements, block_bytes = GGML_QUANT_SIZES[encoding]
        tensors[name] = StoredTensor(
            file=path,
            name=name,
            shape=extents[::-1],
            encoding=encoding.name,
            offset=offset,
            num_bytes=math.prod(extents) // block_elements * block_bytes,
        )
    length = path.stat().st_size
    end = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
    starts = [_aligned(header, alignment) for alignment in alignments]
    fitting = [
        start
        for start, alignment in zip(starts, alignments, strict=True)
        if start + end <= length <= start + _aligned(end, alignment)
    ]
    start = (fitting or starts)[0]
    tensors = {name: dataclasses.replace(each, offset=start + each.offset) for name, each in tensors.items()}
    check_length(path, tensors, length)
    return metadata, tensors


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
