"""Checkpoints on disk: what is in them, and their tensors as our parameters.

A checkpoint is a folder of safetensors with its config.json (one file, or shards with an index), one .safetensors file
beside its config.json, or one .gguf file.

Files are read in plain reads of a chunk at a time and never mapped: mapped pages count as resident memory, and a
model should need little more than its weights while it loads. For the same reason the header of a GGUF file is read
here: the `gguf` package's reader makes several arrays of each of the hundred thousand strings of a vocabulary, which
takes seconds and 150 MB for SmolLM2. Its tables of types and its dequantization are used as they are.
"""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Array, Shaped
from safetensors import SafetensorError, safe_open

from jfa_models.checkpoints.families import (
    FAMILIES,
    Names,
    config_from_gguf,
    config_from_hf,
    config_to_hf,
    gguf_names,
    hugging_face_names,
)
from jfa_models.checkpoints.locate import locate
from jfa_models.model.config import DecoderConfig, GenerationDefaults, read_json, write_json
from jfa_models.text.tokenizer import Tokenizer

# Of a GGUF file; part of its configuration rather than of its weights.
_ROPE_DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

# Tables that can be computed from the configuration, which older checkpoints store all the same.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.inv_freq|" + "|".join(map(re.escape, _ROPE_DIVISORS)))

# Of a model that also sees: what stands in front of the names of its decoder, and the tensors of its eyes.
_PREFIX = re.compile(r"(language_model\.)?(model\.)?(language_model\.)?")
_OTHER_SENSES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")

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
    minus: float = 0.0  # what the file has added to each number

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Some rows of it, as a tensor of its own."""
        row_bytes = self.num_bytes // self.shape[0]
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row_bytes,
            num_bytes=(stop - start) * row_bytes,
        )

    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """The whole tensor in host memory.

        Raises:
          ValueError: its encoding is not supported.
        """
        out = _aligned(self.shape, dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Shaped[np.ndarray, "..."]) -> None:
        """The whole tensor into memory of its shape."""
        rows = out.reshape(self._num_rows, -1)
        for where, values in self.chunks():
            rows[where] = values

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
        values = self._plain(raw, num_rows)
        return values - np.float32(self.minus) if self.minus else values

    def _plain(self, raw: np.ndarray, num_rows: int) -> np.ndarray:
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
class StackedTensors:
    """Tensors of one shape, those of a layer's experts, as one with an axis more."""

    parts: tuple[StoredTensor, ...]

    @property
    def name(self) -> str:
        """As the file calls the first and the last."""
        return f"{self.parts[0].name} to {self.parts[-1].name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a part behind their number; that of one that differs, so that nobody takes it for right."""
        odd = next((part.shape for part in self.parts if part.shape != self.parts[0].shape), self.parts[0].shape)
        return (len(self.parts), *odd)

    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """All of them in host memory."""
        out = _aligned(self.shape, dtype)
        for i, part in enumerate(self.parts):
            part.read_into(out[i])
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says about itself. Nothing but headers has been read."""

    path: Path
    config: DecoderConfig
    generation: GenerationDefaults
    stored_dtype: str  # "bfloat16", "Q4_1": for people to read
    tensors: Mapping[str, StoredTensor | StackedTensors] = dataclasses.field(repr=False)  # by our parameters' names
    unknown: tuple[StoredTensor, ...] = ()  # tensors that belong to no parameter
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # of a GGUF file

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that came with the weights; None where nothing of one did.

        Raises:
          ValueError: a part of it is missing, or it is of a kind that is not supported.
        """
        if self.metadata:
            has_vocabulary = self.metadata.get("tokenizer.ggml.model", "none") not in ("none", "no_vocab")
            if not has_vocabulary:
                return None
            tokenizer, template = Tokenizer.from_gguf(self.metadata), FAMILIES[self.config.architecture].chat_template
            if tokenizer.chat_template is None and template is not None:
                return dataclasses.replace(tokenizer, chat_template=template)
            return tokenizer
        folder = self.path if self.path.is_dir() else self.path.parent
        return Tokenizer.from_folder(folder) if any(folder.glob("tokenizer*")) else None


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Reads what a checkpoint is, without its weights.

    Raises:
      ValueError: there is no checkpoint, a file is damaged, or the model is of a kind that is not supported.
    """
    path = locate(name_or_path)
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


def _repeats_embedding(stored: Mapping[str, StoredTensor | StackedTensors]) -> bool:
    """Whether the embedding is stored a second time as the output layer, as some tied models do."""
    head, embedding = stored.get("lm_head.weight"), stored.get("embed.weight")
    if not isinstance(head, StoredTensor) or not isinstance(embedding, StoredTensor) or head.shape != embedding.shape:
        return False
    return all(np.array_equal(a, b) for (_, a), (_, b) in zip(head.chunks(), embedding.chunks(), strict=True))


def _by_our_names(
    tensors: Mapping[str, StoredTensor], table: Names, config: DecoderConfig
) -> tuple[dict[str, StoredTensor | StackedTensors], tuple[StoredTensor, ...]]:
    """Tensors by our names, and those that the table does not know."""
    known: dict[str, StoredTensor | StackedTensors] = {}
    stacks: dict[str, dict[int, StoredTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix(_PREFIX.match(name)[0]).rpartition(".")  # type: ignore[index]
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", module)
        for mark in "#*":
            module = re.sub(r"(?<=\.)\d+(?=\.)", mark, module, count=1)
        ours = table.get(module)
        parts = (ours,) if isinstance(ours, str) else ours or ()
        pieces = _split(tensor, [_num_rows(part, config) for part in parts]) if len(parts) > 1 else [tensor]
        if pieces is None or not parts:
            if not (_DERIVED.fullmatch(name) or _OTHER_SENSES.fullmatch(name)):
                unknown.append(tensor)
            continue
        for part, piece in zip(parts, pieces, strict=True):
            renamed = "scale" if part.endswith("norm") and kind == "weight" else kind
            target = f"{part.replace('#', numbers[0]) if numbers else part}.{renamed}"
            if "*" in module:
                stacks.setdefault(target, {})[int(numbers[1])] = piece
            else:
                known[target] = piece
    for target, stack in stacks.items():
        known[target] = StackedTensors(parts=tuple(stack[i] for i in sorted(stack)))
    return known, tuple(unknown)


def _num_rows(module: str, config: DecoderConfig) -> int:
    """Rows of a weight that shares its tensor with others."""
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    return {"q": q_size, "k": kv_size, "v": kv_size, "gate": inner, "up": inner}[module.rpartition(".")[2]]


def _split(tensor: StoredTensor, num_rows: Sequence[int]) -> list[StoredTensor] | None:
    """A tensor cut into these numbers of rows; None if it has another number of them."""
    ends = list(itertools.accumulate(num_rows))
    if not tensor.shape or tensor.shape[0] != ends[-1]:
        return None
    return [tensor.rows(end - n, end) for n, end in zip(num_rows, ends, strict=True)]


def _aligned(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Memory that XLA on a CPU adopts."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


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
    decoder = config_from_hf(config)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= _read_safetensors_header(file)
    tensors, unknown = _by_our_names(stored, hugging_face_names(decoder.architecture), decoder)
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
    divisors = {name: tuple(stored[name].read(np.float32).tolist()) for name in _ROPE_DIVISORS if name in stored}
    config = config_from_gguf(metadata, stored.keys(), divisors)
    tensors, unknown = _by_our_names(stored, gguf_names(config.architecture), config)
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
        stored_dtype=_main_encoding(stored),
        tensors=tensors,
        unknown=unknown,
        metadata=metadata,
    )


_SHARD_BYTES = 5 * 10**9
_OF_A_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_WRITTEN_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save_checkpoint(
    folder: Path,
    config: DecoderConfig,
    params: Mapping[str, Array],
    *,
    generation: GenerationDefaults,
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a folder that Hugging Face and open_checkpoint read; one tensor of the device at a time on the host.

    What was there of another model and its tokenizer is replaced.

    Raises:
      ValueError: config.json cannot say what the model is, or there is a file in the place of the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to save into")
    written = config_to_hf(config) | {"dtype": str(next(iter(params.values())).dtype)}
    advised = {name: value for name, value in dataclasses.asdict(generation).items() if value is not None}
    eos = advised.pop("eos_token_ids")
    advised |= {"eos_token_id": list(eos)} if eos else {}
    if "temperature" in advised:
        advised["do_sample"] = advised["temperature"] > 0
        advised = {name: value for name, value in advised.items() if name != "temperature" or value > 0}
    # stated even where there is none: the defaults of transformers may lie outside of the vocabulary
    written |= {"eos_token_id": advised.get("eos_token_id"), "pad_token_id": None}
    written["bos_token_id"] = None if tokenizer is None else tokenizer.bos_token_id
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", written)
    write_json(folder / "generation_config.json", advised)
    for name in _OF_A_TOKENIZER:
        (folder / name).unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(folder)
    _save_tensors(folder, _pieces(config, params))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """A tensor to write: rows of parameters, one below the other, or one expert of a stack."""

    name: str
    sources: tuple[Array, ...]
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [source.shape if self.expert is None else source.shape[1:] for source in self.sources]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.sources[0].dtype.itemsize

    def parts(self) -> Iterator[np.ndarray]:
        for source in self.sources:
            yield np.asarray(source if self.expert is None else source[self.expert])


def _pieces(config: DecoderConfig, params: Mapping[str, Array]) -> list[_Piece]:
    """The parameters under the names of Hugging Face."""
    pieces = []
    for theirs, ours in hugging_face_names(config.architecture).items():
        modules = (ours,) if isinstance(ours, str) else ours
        for layer in range(config.num_layers) if "#" in theirs else [0]:
            for kind, stored in (("weight", "weight"), ("scale", "weight"), ("bias", "bias")):
                names = [f"{module.replace('#', str(layer))}.{kind}" for module in modules]
                if names[0] not in params or (params[names[0]].ndim == 3) != ("*" in theirs):
                    continue  # not in this model, or under another name where a layer is a mixture
                prefix = "" if theirs == "lm_head" else "model."
                name = f"{prefix}{theirs.replace('#', str(layer))}.{stored}"
                sources = tuple(params[name] for name in names)
                if "*" not in theirs:
                    pieces.append(_Piece(name=name, sources=sources))
                    continue
                for expert in range(sources[0].shape[0]):
                    pieces.append(_Piece(name=name.replace("*", str(expert)), sources=sources, expert=expert))
    return pieces


def _save_tensors(folder: Path, pieces: Sequence[_Piece]) -> None:
    shards: list[list[_Piece]] = [[]]
    room = _SHARD_BYTES
    for piece in pieces:
        if shards[-1] and piece.num_bytes > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(piece)
        room -= piece.num_bytes
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        total = sum(piece.num_bytes for piece in pieces)
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard)
    index = () if len(names) == 1 else ("model.safetensors.index.json",)
    for file in folder.iterdir():
        if _OF_A_MODEL.fullmatch(file.name) and file.name not in (*names, *index):
            file.unlink()  # of what was saved here before, and would be read


def _write_safetensors(file: Path, pieces: Sequence[_Piece]) -> None:
    """The format is simple and the library wants all tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": _WRITTEN_DTYPES[piece.sources[0].dtype.name],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.num_bytes],
        }
        offset += piece.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(file.name + ".part")  # nobody finds half a file
    with open(part, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            for values in piece.parts():
                stream.write(np.ascontiguousarray(values).view(np.uint8).data)
    os.replace(part, file)


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
