"""Reads folders of safetensors. Source: the format section of the README of github.com/huggingface/safetensors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.families import hugging_face_names
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.hf_config import config_from_hf
from jfa_models.checkpoints.names import by_our_names
from jfa_models.checkpoints.quantized import QuantizedTensor, join_quantized, without_padding
from jfa_models.checkpoints.tensors import StoredTensor, check_length, damaged, main_encoding
from jfa_models.text.files import read_json


def open_safetensors(path: Path, folder: Path, files: list[Path]) -> Checkpoint:
    """Opens the checkpoint at a path, with config.json in `folder` and tensors in `files`.

    Raises:
      ValueError: a file is missing or damaged, or the model is not supported.
    """
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json; put the config.json of these weights into the folder")
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    decoder = config_from_hf(config)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        stored |= read_header(file)
    joined = join_quantized(stored, config)
    tensors, unknown = by_our_names(joined, hugging_face_names(decoder), decoder)
    tensors = without_padding(tensors, decoder)
    attention = next((f"layers.{i}.attention" for i in decoder.attention_layers), None)
    if config.get("attention_bias") and attention and f"{attention}.o.bias" not in tensors:
        # attention_bias means all four; Qwens that were saved as Llama have those of q, k and v only
        decoder = dataclasses.replace(decoder, out_bias=False)
    quantized = {name: tensor for name, tensor in joined.items() if isinstance(tensor, QuantizedTensor)}
    stated = config.get("dtype") or config.get("torch_dtype")
    return Checkpoint(
        path=path,
        config=decoder,
        generation=GenerationDefaults.from_hf(read_json(generation) if generation.exists() else {}, config),
        stored_dtype=main_encoding(quantized) if quantized else stated or main_encoding(stored),
        tensors=tensors,
        unknown=unknown,
    )


def safetensors_files(folder: Path) -> list[Path]:
    """The files in a folder that contain its weights.

    Raises:
      ValueError: there are none, or some are missing.
    """
    # before an index, as in transformers: it may be left from older shards
    if (single := folder / "model.safetensors").exists():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map from tensors to files; download it again")
        shards = sorted(set(weight_map.values()))
        if missing := [shard for shard in shards if not (folder / shard).exists()]:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, listed in its index; download them again")
        return [folder / shard for shard in shards]
    others = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pth", ".pt", ".gguf"))
    if others and others[0].endswith(".gguf"):
        raise ValueError(f"{folder} contains GGUF files; use the path of one of them: {', '.join(others)}")
    if others:
        raise ValueError(
            f"{folder} contains only pickled weights ({others[0]}), which may execute code when they are loaded; "
            "convert them to safetensors (with save_pretrained of transformers) or download safetensors files"
        )
    raise ValueError(f"{folder} contains no model.safetensors and no model.safetensors.index.json; use another folder")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Parses the header: eight bytes with its length, then JSON. The tensors follow."""
    on_disk = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        start = 8 + length
        if start > on_disk:
            raise damaged(file, f"its header needs {start} bytes, but the file has {on_disk}")
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
        raise damaged(file, f"its header cannot be read ({error})") from None
    check_length(file, tensors, on_disk)
    try:  # the library checks the rest: shapes against sizes, no gaps, no overlaps
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise damaged(file, str(error)) from None
    return tensors
