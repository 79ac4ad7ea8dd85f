"""Reads .gguf files. Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The header is parsed here: the reader of the `gguf` package creates several arrays for each of the about 100,000 strings
of a vocabulary, which takes seconds and 150 MB for SmolLM2. Only the package's tables of types are used.
"""

import dataclasses
import io
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.families import FAMILIES, gguf_names
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.gguf_config import config_from_gguf
from jfa_models.checkpoints.names import ROPE_DIVISORS, by_our_names
from jfa_models.checkpoints.tensors import StoredTensor, check_length, damaged, main_encoding


def open_gguf(path: Path) -> Checkpoint:
    """Opens a .gguf file. Raises ValueError if the file is damaged or the model is not supported."""
    metadata, stored = _read_gguf_header(path)
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts; merge them with llama-gguf-split --merge")
    divisors = {name: tuple(stored[name].read(np.float32).tolist()) for name in ROPE_DIVISORS if name in stored}
    config = config_from_gguf(metadata, stored.keys(), divisors)
    tensors, unknown = by_our_names(stored, gguf_names(config.architecture), config)
    for name, tensor in tensors.items():
        module, kind = name.split(".")[-2:]
        heads = {"q": config.num_q_heads, "k": config.num_kv_heads}.get(module)
        if heads and FAMILIES[config.architecture].permuted:
            tensors[name] = dataclasses.replace(tensor, interleaved_heads=heads)
        if kind == "scale" and config.norm == "rms_plus_one":
            tensors[name] = dataclasses.replace(tensor, minus=1.0)
    return Checkpoint(
        path=path,
        config=config,
        generation=GenerationDefaults.from_gguf(metadata),
        stored_dtype=main_encoding(stored),
        tensors=tensors,
        unknown=unknown,
        metadata=metadata,
    )


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


def _read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Parses little-endian fields: key-value pairs, then a table of tensors. Padding and the tensors follow."""
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
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise damaged(path, f"general.alignment is {alignment!r}")
        start = -(-stream.tell() // alignment) * alignment
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
            offset=start + offset,
            num_bytes=math.prod(extents) // block_elements * block_bytes,
        )
    check_length(path, tensors, path.stat().st_size)
    return metadata, tensors
