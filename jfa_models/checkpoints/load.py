"""Loads the tensors of a checkpoint as the parameters of a decoder."""

import dataclasses
import warnings
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array

from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.tensors import StoredTensor


def load_params(checkpoint: Checkpoint, expected: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Loads parameters by name to the default device, each in its expected dtype.

    Tensors are read one at a time: the peak host memory is that of the result (on an accelerator, of one tensor) plus a
    chunk.

    Raises:
      ValueError: tensors are missing, unexpected or have the wrong shape; the message names the first ones.
    """
    _check_fit(checkpoint, expected)
    params = {}
    for name, wanted in expected.items():
        # Waiting prevents a growing queue of transfers, each of which keeps its host copy alive.
        params[name] = jax.device_put(checkpoint.tensors[name].read(wanted.dtype)).block_until_ready()
    return params


def with_settled_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without an output layer that repeats its tied embedding; with an own one if the file has another.

    Warns:
      UserWarning: the configuration says that they are tied, but the file has two that differ. As in transformers and
        vLLM, the file decides.
    """
    head, embedding = (checkpoint.tensors.get(name) for name in ("lm_head.weight", "embed.weight"))
    tied = checkpoint.config.tie_word_embeddings
    if not tied or not isinstance(head, StoredTensor) or not isinstance(embedding, StoredTensor):
        return checkpoint
    if head.shape != embedding.shape:
        return checkpoint
    if all(np.array_equal(a, b) for (_, a), (_, b) in zip(head.chunks(), embedding.chunks(), strict=True)):
        rest = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "lm_head.weight"}
        return dataclasses.replace(checkpoint, tensors=rest)
    warnings.warn(
        f"{checkpoint.path}: tie_word_embeddings is set, but the output layer in the file is not the embedding: "
        "both are used",
        stacklevel=3,
    )
    config = dataclasses.replace(checkpoint.config, tie_word_embeddings=False)
    return dataclasses.replace(checkpoint, config=config)


def _check_fit(checkpoint: Checkpoint, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    stored = checkpoint.tensors
    wrong = [
        f"{stored[name].name} has shape {list(stored[name].shape)}, expected {list(wanted.shape)}"
        for name, wanted in expected.items()
        if name in stored and stored[name].shape != tuple(wanted.shape)
    ]
    missing = [f"{name} {list(wanted.shape)} is missing" for name, wanted in expected.items() if name not in stored]
    left_over = [tensor for name, tensor in stored.items() if name not in expected]
    extra = [
        f"{tensor.name} {list(tensor.shape)} is not part of the model" for tensor in (*checkpoint.unknown, *left_over)
    ]
    if problems := missing + wrong + extra:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(
            f"{checkpoint.path}: the tensors do not match the configuration, which may belong to another model: {shown}"
        )
