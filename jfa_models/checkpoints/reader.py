"""Opens a checkpoint of any format.

A checkpoint is a folder of safetensors with its config.json (one file, or shards with an index), one .safetensors file
next to its config.json, or a .gguf file: one, any part of several, or the folder that has them.
"""

from pathlib import Path

from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.gguf import open_gguf
from jfa_models.checkpoints.locate import locate, only_model
from jfa_models.checkpoints.safetensors import open_safetensors, safetensors_files


def open_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Opens a checkpoint and reads everything except its weights.

    Raises:
      ValueError: there is no checkpoint, a file is damaged, or the model is not supported.
    """
    path = locate(name_or_path)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (file := only_model(path)) is not None:
        return open_gguf(file)
    if path.is_dir():
        return open_safetensors(path, path, safetensors_files(path))
    if path.suffix.lower() == ".safetensors":
        return open_safetensors(path, path.parent, [path])
    if path.suffix.lower() == ".gguf":
        return open_gguf(path)
    raise ValueError(f"{path} is not a model: use a folder of safetensors, a .safetensors or a .gguf file")
