"""Writes a checkpoint that transformers can load: config.json, safetensors, the tokenizer and its chat template."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jfa import QuantizedArray
from jfa.quant import dequantize
from jfa_models import processes
from jfa_models.checkpoints.compressed import Form, Written, form_of, joined, quantization_config, tensors_of
from jfa_models.checkpoints.families import FAMILIES, hugging_face_names
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.hf_config import config_to_hf
from jfa_models.model.config import DecoderConfig
from jfa_models.model.partition import WHOLE, Partition
from jfa_models.text.files import write_json
from jfa_models.text.tokenizer import Tokenizer

_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_OF_A_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
_OF_A_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_KINDS = {name: name for name in ("weight", "bias", "A_log", "D", "dt_bias")}  # the last parts of our names, and files'
_KINDS |= {"scale": "weight", "kernel": "weight"}
_WRITTEN_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WRITTEN_DTYPES |= {"int64": "I64", "int32": "I32", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}


def save_checkpoint(
    folder: Path,
    config: DecoderConfig,
    params: Mapping[str, Array | QuantizedArray],
    *,
    generation: GenerationDefaults,
    tokenizer: Tokenizer | None,
    partition: Partition = WHOLE,
) -> None:
    """Writes a folder that transformers and open_checkpoint can load; copies one tensor at a time to the host.

    Replaces the files of a model and tokenizer that were saved there before. Quantized weights are written as
    compressed-tensors stores them, except for a quantized embedding, which becomes floats in the dtype of the rest.

    If several processes have the model, all call this, and return when all is written. The first one writes, so that
    the others need not see its disk: each tensor, when it is its turn, is put together on the devices of its replica.

    Raises:
      ValueError: config.json cannot represent the model, compressed-tensors cannot represent a quantized weight, or the
        folder is a file.
      RuntimeError: another process had an error; the message has it.
    """
    turns = _Turns(partition)
    with turns.in_all():
        if turns.writes and folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; pass a folder to save into")
    dtype = next(x.dtype for x in params.values() if not isinstance(x, QuantizedArray))
    embedding = params["embed.weight"]
    if isinstance(embedding, QuantizedArray):
        params = {**params, "embed.weight": dequantize(embedding, dtype)}
    pieces, quantization = _pieces(config, params)
    written = config_to_hf(config) | {"dtype": str(dtype)} | quantization
    recommended = {name: value for name, value in dataclasses.asdict(generation).items() if value is not None}
    eos = recommended.pop("eos_token_ids")
    recommended |= {"eos_token_id": list(eos)} if eos else {}
    if "temperature" in recommended:
        recommended["do_sample"] = recommended["temperature"] > 0
        recommended = {name: value for name, value in recommended.items() if name != "temperature" or value > 0}
    # written even if there are no such tokens: the defaults of transformers may be outside the vocabulary
    written |= {"eos_token_id": recommended.get("eos_token_id"), "pad_token_id": None}
    written["bos_token_id"] = None if tokenizer is None else tokenizer.bos_token_id
    with turns.in_all():
        if turns.writes:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "config.json", written)
            write_json(folder / "generation_config.json", recommended)
            for name in _OF_A_TOKENIZER:
                (folder / name).unlink(missing_ok=True)
            if tokenizer is not None:
                tokenizer.save(folder)
    _save_tensors(folder, pieces, turns)


class _Turns:
    """What this process does of a save. reads: it has parts of what is written, writes: it writes them."""

    def __init__(self, partition: Partition):
        self._is_shared = partition.is_shared
        self.reads = partition.group == 0
        self.writes = not self._is_shared or processes.is_first()

    def in_all(self) -> contextlib.AbstractContextManager:
        """A context of which all processes that have the model leave with an error if one has an error in it."""
        return processes.in_all() if self._is_shared else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """A tensor to write, computed when it is its turn."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray | None]  # None: the first process writes it

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _pieces(config: DecoderConfig, params: Mapping[str, Array | QuantizedArray]) -> tuple[list[_Piece], dict[str, Any]]:
    """The parameters under their Hugging Face names, and what config.json says about the quantized ones."""
    pieces = []
    table, prefix = hugging_face_names(config), FAMILIES[config.architecture].prefix
    one_by_one = {ours for theirs, ours in table.items() if "*" in theirs}
    forms: dict[str, Form | None] = {} if "lm_head.weight" in params else {"lm_head": None}
    for theirs, ours in table.items():
        modules = (ours,) if isinstance(ours, str) else ours
        for layer in range(config.num_layers) if "#" in theirs else [0]:
            for kind, stored in _KINDS.items():
                names = [f"{module.replace('#', str(layer))}.{kind}" for module in modules]
                if names[0] not in params:
                    continue  # not in this model
                sources = [params[name] for name in names]
                is_stack = len(sources[0].shape) == 3
                if is_stack != ("*" in theirs) and (ours in one_by_one or not is_stack):
                    continue  # another name applies because this layer has experts, or none
                form = form_of(dict(zip(names, sources, strict=True)))
                if form is not None and is_stack and ours not in one_by_one:
                    raise ValueError(
                        f"the experts of a {config.architecture} model are one tensor in a file, and cannot be saved "
                        "quantized; load the model with quantization='none' to save it"
                    )
                tensors = _floats(stored, kind, sources, "*" in theirs) if form is None else tensors_of(form, sources)
                for expert in range(sources[0].shape[0]) if "*" in theirs else [None]:
                    module = theirs.replace("#", str(layer)).replace("*", str(expert))
                    module = module if theirs == "lm_head" else f"{prefix}{module}"
                    for part, (shape, dtype, convert) in tensors.items():
                        read = functools.partial(_read, sources, expert, convert)
                        pieces.append(_Piece(name=f"{module}.{part}", shape=shape, dtype=np.dtype(dtype), read=read))
                    if kind == "weight" and ours != "embed":
                        forms[module] = form
    return pieces, quantization_config(forms)


def _floats(name: str, kind: str, sources: Sequence[Array | QuantizedArray], one_by_one: bool) -> dict[str, Written]:
    """One tensor: the sources, or one expert of each, concatenated by rows."""
    shapes = [x.shape[one_by_one:] for x in sources]
    axis = max(0, len(shapes[0]) - 2)  # of the rows, if it has all experts
    shape = [*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :]]
    if kind == "kernel":
        shape.insert(1, 1)
    dtype = jax.tree.leaves(sources[0])[0].dtype
    return {name: (tuple(shape), dtype, lambda parts: joined(parts, axis).reshape(shape))}


def _read(
    sources: Sequence[Array | QuantizedArray], expert: int | None, convert: Callable[[Sequence[Any]], np.ndarray]
) -> np.ndarray | None:
    parts = [x if expert is None else jax.tree.map(lambda leaf: leaf[expert], x) for x in sources]
    leaves, structure = jax.tree.flatten(parts)
    if all(not isinstance(x, jax.Array) or x.is_fully_addressable for x in leaves):
        return convert(parts)
    found = [*map(processes.whole, leaves)]
    return convert(jax.tree.unflatten(structure, found)) if processes.is_first() else None


def _save_tensors(folder: Path, pieces: Sequence[_Piece], turns: _Turns) -> None:
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
        index = {"metadata": {"total_size": sum(piece.num_bytes for piece in pieces)}, "weight_map": weight_map}
        with turns.in_all():
            if turns.writes:
                write_json(folder / _INDEX, index)
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / name, shard, turns)
    kept = (*names, *[_INDEX] * (len(names) > 1))
    with turns.in_all():
        for file in folder.iterdir() if turns.writes else ():
            if _OF_A_MODEL.fullmatch(file.name) and file.name not in kept:
                file.unlink()  # left over from an earlier save, and would be loaded


def _write_safetensors(file: Path, pieces: Sequence[_Piece], turns: _Turns) -> None:
    """Writes one file; not with the safetensors library, which needs all tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        header[piece.name] = {
            "dtype": _WRITTEN_DTYPES[piece.dtype.name],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.num_bytes],
        }
        offset += piece.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = file.with_name(file.name + ".part")  # so that no reader finds an incomplete file
    with contextlib.ExitStack() as stack:
        stream = None
        with turns.in_all():
            if turns.writes:
                stream = stack.enter_context(open(part, "wb"))
                stream.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            with turns.in_all():
                data = piece.read() if turns.reads else None
                if stream is not None:
                    assert data is not None
                    stream.write(np.ascontiguousarray(data).view(np.uint8).data)
    with turns.in_all():
        if turns.writes:
            os.replace(part, file)
