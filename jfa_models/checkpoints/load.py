"""Loads the tensors of a checkpoint as the parameters of a decoder."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from jfa import QuantizedArray
from jfa.quant import quantize_weight
from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.tensors import StackedTensors, Tensor, aligned, part_of
from jfa_models.model.partition import WHOLE, Partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """How the weights of linear layers and of the embedding are held in memory.

    Attributes:
      quantization: None: as floats. "stored": as in the checkpoint. "int8": a scale per row. "int8-dynamic": so, and
        products round their inputs to int8 too. "int4": in groups of 128, 64 or 32 with zero points, or in int8 where
        none divides. "fp8": a scale per row. For both, the embedding and the output layer are in int8.
      dtype: of weights that are floats; None: that of the model.
    """

    quantization: str | None = None
    dtype: DTypeLike | None = None

    def describe(self, dtype: np.dtype) -> str:
        """A few words for a person; dtype: that of the model."""
        floats = np.dtype(self.dtype or dtype).name
        return {None: floats, "stored": "the stored blocks"}.get(self.quantization, str(self.quantization))

    def num_bytes(
        self, expected: Mapping[str, jax.ShapeDtypeStruct], tensors: Mapping[str, Tensor | StackedTensors]
    ) -> int:
        """Bytes of all parameters as load_params holds them; of stored blocks as they are in the file."""
        total = 0
        for name, wanted in expected.items():
            size, tensor = math.prod(wanted.shape), tensors.get(name)
            if not is_weight(name):
                total += size * wanted.dtype.itemsize
            elif self.quantization is None or (self.quantization == "stored" and not (tensor and tensor.is_quantized)):
                total += size * np.dtype(self.dtype or wanted.dtype).itemsize
            elif self.quantization == "stored" and tensor is not None:
                total += tensor.num_bytes
            else:
                parts = jax.tree.leaves(shape_of(name, wanted.shape, self.quantization))
                total += sum(math.prod(x.shape) * x.dtype.itemsize for x in parts)
        return total


def load_params(
    checkpoint: Checkpoint,
    expected: Mapping[str, jax.ShapeDtypeStruct],
    weights: Weights = Weights(),
    partition: Partition = WHOLE,
) -> dict[str, Array | QuantizedArray]:
    """Loads parameters by name to their devices, each in its expected dtype or as `weights` says.

    Tensors are read one at a time: the peak host memory is that of the result (on an accelerator, of one tensor) plus a
    chunk. Each of several processes reads the parts of its own devices; but whole rows of weights that are quantized
    while they are loaded, and of those that are stored by GPTQ, AWQ or compressed-tensors.

    Raises:
      ValueError: tensors are missing, unexpected or have the wrong shape, the message names the first ones; or one
        cannot be divided.

    Warns:
      UserWarning: weights that should stay as they are stored cannot.
    """
    _check_fit(checkpoint, expected)
    params, widened = {}, []
    for name, wanted in expected.items():
        tensor = checkpoint.tensors[name]
        own = partition.of_process(name, wanted.shape)
        part, own = _part(tensor, own, whole_rows=weights.quantization not in (None, "stored"))
        part_wanted = jax.ShapeDtypeStruct(part.shape, wanted.dtype)
        held = _read_weight(name, part, part_wanted, weights) if is_weight(name) else part.read(wanted.dtype)
        # Waiting prevents a growing queue of transfers, each of which keeps its host copy alive.
        params[name] = jax.block_until_ready(partition.put_parameter(name, held, own, wanted.shape))
        if weights.quantization == "stored" and tensor.is_quantized and not isinstance(held, QuantizedArray):
            widened.append(tensor.name)
    if widened:
        warnings.warn(
            f"{checkpoint.path}: {len(widened)} quantized weights, such as {widened[0]}, are held as floats, since "
            "QuantizedArray has no form for their blocks; quantization='int8' holds them in 8 bits",
            stacklevel=3,
        )
    return params


def _part(
    tensor: Tensor | StackedTensors, own: tuple[slice, ...] | None, *, whole_rows: bool
) -> tuple[Tensor | StackedTensors, tuple[slice, ...] | None]:
    """What this process reads of a tensor, and which part that is; None: all.

    whole_rows: all columns are needed, since a row has one scale.
    """
    if own is None:
        return tensor, None
    if whole_rows and len(own) > 1:
        own = (*own[:-1], slice(None))
    for part in (own, (*own[:-1], slice(None))):
        found = tensor.part(*part) if isinstance(tensor, StackedTensors) else part_of(tensor, *part)
        if found is not None:
            return found, part
    raise AssertionError("any rows can be read")


def shape_of(name: str, shape: tuple[int, ...], quantization: str) -> QuantizedArray:
    """The shapes and dtypes of a parameter that is a weight, quantized as Weights.quantization says."""
    kind, group = _kind_and_group(name, shape[-1], quantization)
    row = quantize_weight(np.zeros((1, shape[-1])), kind, group_size=group or None, symmetric=False)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*shape[:-1], *x.shape[1:]), x.dtype), row)


def is_weight(name: str) -> bool:
    """Whether a parameter is a weight that may be quantized: of a linear layer, or the embedding."""
    return name.endswith(".weight") and not name.endswith(".router.weight")


def _kind_and_group(name: str, width: int, quantization: str) -> tuple[str, int]:
    """The kind of a weight [out, width] in quant.KINDS, and the elements per group; 0: a scale per row."""
    kind = quantization.removesuffix("-dynamic")
    group = next((size for size in (128, 64, 32) if width % size == 0), 0)
    if name in ("embed.weight", "lm_head.weight") or (kind == "int4" and not group):
        return "int8", 0
    return kind, group if kind == "int4" else 0


def _read_weight(
    name: str, tensor: Tensor | StackedTensors, wanted: jax.ShapeDtypeStruct, weights: Weights
) -> np.ndarray | QuantizedArray:
    if weights.quantization == "stored":
        if (found := tensor.read_quantized()) is not None:
            return found if found.rounds_inputs else dataclasses.replace(found, rounds_inputs=_terms(found))
    if weights.quantization in (None, "stored"):
        return tensor.read(weights.dtype or wanted.dtype)
    parts = tensor.parts if isinstance(tensor, StackedTensors) else (tensor,)
    held = [quantized(name, wanted.shape[-2:], part.chunks(), weights.quantization) for part in parts]
    return jax.tree.map(lambda *x: np.stack(x), *held) if isinstance(tensor, StackedTensors) else held[0]


def quantized(
    name: str, shape: tuple[int, ...], chunks: Iterable[tuple[slice | np.ndarray, np.ndarray]], quantization: str
) -> QuantizedArray:
    """The weight [out, in] of a parameter from chunks of its rows, quantized as Weights.quantization says."""
    kind, group = _kind_and_group(name, shape[-1], quantization)
    whole = None
    for rows, chunk in chunks:
        found = quantize_weight(chunk, kind, group_size=group or None, symmetric=False)
        if whole is None:
            whole = jax.tree.map(lambda x: aligned((shape[0], *x.shape[1:]), x.dtype), found)
        for into, x in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            into[rows] = x
    assert whole is not None, "a weight has rows"
    return dataclasses.replace(whole, rounds_inputs=1 if quantization == "int8-dynamic" else _terms(whole))


def _terms(weight: QuantizedArray) -> int:
    """QuantizedArray.rounds_inputs on this platform.

    XLA on a CPU multiplies integers, if a row has one scale; two int8 numbers for an element of the input are as
    precise as a 16-bit float. Other weights are dequantized in each product.
    """
    is_plain = weight.kind == "int8" and weight.group_size is None and weight.zeros is weight.minima is None
    return 2 if is_plain and jax.default_backend() == "cpu" else 0


def with_settled_head(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint without an output layer that repeats its tied embedding; with an own one if the file has another.

    Warns:
      UserWarning: the configuration says that they are tied, but the file has two that differ. As in transformers and
        vLLM, the file decides.
    """
    head, embedding = (checkpoint.tensors.get(name) for name in ("lm_head.weight", "embed.weight"))
    tied = checkpoint.config.tie_word_embeddings
    if isinstance(head, StackedTensors) or isinstance(embedding, StackedTensors):
        return checkpoint
    if not tied or head is None or embedding is None or head.shape != embedding.shape:
        return checkpoint
    parts = (range(start, min(start + 1024, head.shape[0])) for start in range(0, head.shape[0], 1024))
    both = ([x.rows(part.start, part.stop).read(np.float32) for x in (head, embedding)] for part in parts)
    if all(np.array_equal(one, other) for one, other in both):
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
