"""Loads a model by path or name."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from typing import Literal

import jax
from jax.typing import DTypeLike

from jfa import cpu
from jfa_models import processes
from jfa_models.checkpoints.checkpoint import Checkpoint
from jfa_models.checkpoints.families import FAMILIES
from jfa_models.checkpoints.load import Weights, load_params, with_settled_head
from jfa_models.checkpoints.locate import PACKAGED
from jfa_models.checkpoints.presets import PRESETS
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.decoding.language_model import LanguageModel, abstract_decoder, compute_dtype, named_leaves
from jfa_models.decoding.options import QUANTIZATIONS, CacheOptions
from jfa_models.model.config import DecoderConfig, StreamingConfig
from jfa_models.model.partition import mesh_of, partition_of
from jfa_models.model.sparse_config import SparseConfig


def from_pretrained(
    model: str | os.PathLike[str] = "smollm2",
    *,
    dtype: DTypeLike | None = None,
    cache: Literal["contiguous", "paged"] = "contiguous",
    kv_dtype: str | None = None,
    page_size: int = 16,
    quantization: str | None = None,
    sparse_prefill: str | None = None,
    attention_window: int | None = None,
    attention_sinks: int | None = None,
    context_length: int | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    max_adapters: int | None = None,
    max_rank: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
    tensor_parallel: int | None = None,
) -> "LanguageModel":
    """Loads a model of a supported family (families.FAMILIES).

    Args:
      model: a folder with a Hugging Face checkpoint; a .safetensors or .gguf file; "smollm2" or "gemma-3-270m", which
        are in packages; or a Hugging Face repository, "owner/name". For random weights: LanguageModel.random.
      dtype: float32, bfloat16 or float16, of activations, cache, and weights that are not quantized. None: float32 on a
        CPU, bfloat16 elsewhere.
      cache, kv_dtype, page_size: see CacheOptions.
      quantization: how the weights of linear layers and the embedding are held (checkpoints.load.Weights): "int8",
        "int8-dynamic", "int4", "fp8", "stored" for a quantized checkpoint as it is, or "none" for floats. None:
        "stored"; but on a CPU whichever form it multiplies fastest (jfa.cpu): for a quantized checkpoint int8 or
        float32, for one in bfloat16 bfloat16 or float32, and floats of `dtype` if that is given.
      sparse_prefill: PATTERN:FRACTION, such as "vertical-slash:0.3": a prompt is processed in one piece, and layers
        that see the whole context compute only this fraction of its scores (model.sparse_config.SparseConfig). An
        approximation, which pays off in long prompts. Decoding and what follows tokens that are already in a cache are
        exact. A fraction of 1: all scores. None: those that config.json says (sparse_attention), all as a rule.
      attention_window: layers that see the whole context see the first attention_sinks tokens (None: 4) and this many
        last ones instead (StreamingLLM, model.config.StreamingConfig), so that a text may be longer than the model's
        context; pages of other tokens are given back. None: the whole context.
      context_length: maximum number of tokens of a prompt and its answer, if less than the model's own, or, with
        attention_window, any. A model with two rope scalings (Phi-3 for 128,000 tokens) uses the one for this length.
      adapters: adapters to load, by the names that requests choose them by (LanguageModel.load_adapter).
      max_adapters, max_rank: memory is reserved for this many adapters of up to this rank on the layers of attention
        and MLPs: loading them compiles nothing. None: room is made for each one, and steps compile anew.
      mesh: the devices that the model is divided over, with the axes "tensor" (heads, inner vectors and vocabulary) and
        "expert" (whole experts), or one of them: jax.make_mesh((8,), ("tensor",)). With an axis "data", LLM runs an
        engine on each of as many replicas; this model is the first. None: it is on the default device.
      tensor_parallel: short for a mesh of the first so many devices with the axis "tensor".

    Raises:
      ValueError: the checkpoint does not exist, has no weights or is damaged, or its architecture or dtype is not
        supported; the message says which. Or the model cannot be divided over the mesh.

    Warns:
      UserWarning: a LongRoPE model uses its factors for long texts, a file has keys that are not known, or a part of
        the model cannot be divided, and is on every device of the mesh.
    """
    given, dtype = dtype, compute_dtype(dtype)
    options = CacheOptions(kind=cache, kv_dtype=kv_dtype, page_size=page_size)
    sparse = None if sparse_prefill is None else SparseConfig.of(sparse_prefill)
    name = os.fspath(model)
    if name.lower() in PRESETS and name.lower() not in PACKAGED and not os.path.exists(name):
        raise ValueError(
            f"{name!r} is a preset, which has no weights: load a folder, a file or a Hugging Face repository, or use "
            f"LanguageModel.random({name!r}) for random weights in its shape"
        )
    checkpoint = with_settled_head(open_checkpoint(name))
    weights = weights_of(checkpoint, quantization, given)
    family = FAMILIES[checkpoint.config.architecture]
    if dtype == "float16" and not family.float16:
        raise ValueError(f"{family.users} overflows float16; use dtype='bfloat16', or 'float32'")
    config = _with_streaming(checkpoint.config, attention_window, attention_sinks)
    config = _with_context(config, context_length)
    if (original := config.long_rope_from) is not None:
        warnings.warn(
            f"{name} rotates by its factors for long texts, also in short ones; for texts of up to {original} tokens, "
            f"load it with context_length={original} (--max-model-len)",
            stacklevel=2,
        )
    partition = partition_of(config, mesh_of(mesh, tensor_parallel))
    abstract = abstract_decoder(config, dtype, partition=partition)
    expected = named_leaves(abstract)
    params = load_params(checkpoint, expected, weights, partition)
    loaded = LanguageModel(
        decoder=abstract,
        params=tuple(params[name] for name in expected),
        tokenizer=checkpoint.load_tokenizer(),
        defaults=checkpoint.generation,
        cache_options=options,
        sparse_prefill=sparse,
        max_adapters=max_adapters,
        max_rank=max_rank,
    )
    for adapter, path in (adapters or {}).items():
        loaded.load_adapter(adapter, path)
    return loaded


def weights_of(checkpoint: Checkpoint, quantization: str | None, dtype: DTypeLike | None) -> Weights:
    """How from_pretrained, given these arguments, holds the weights of a checkpoint.

    Raises:
      ValueError: unknown quantization.
    """
    if quantization is not None:
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization must be None or one of {', '.join(QUANTIZATIONS)}, got {quantization!r}")
        return Weights(quantization=None if quantization == "none" else quantization)
    if jax.default_backend() != "cpu":
        return Weights(quantization="stored")
    if processes.count() > 1:  # each would measure which form is the fastest, and might find another
        return Weights()
    if dtype is not None:
        return Weights()
    if checkpoint.is_quantized:
        return Weights(quantization="int8" if cpu.fastest(("float32", "int8")) == "int8" else None)
    if checkpoint.stored_dtype.lower() not in ("bfloat16", "bf16"):
        return Weights()
    return Weights(dtype=cpu.fastest(("float32", "bfloat16")))


def _with_streaming(config: DecoderConfig, window: int | None, num_sinks: int | None) -> DecoderConfig:
    if window is None:
        if num_sinks is not None:
            raise ValueError(
                f"attention_sinks={num_sinks} has no effect without attention_window, the last tokens to see besides"
            )
        return config
    num_sinks = 4 if num_sinks is None else num_sinks
    if window < 1 or num_sinks < 0 or window + num_sinks > config.context_length:
        raise ValueError(
            f"attention_window must be at least 1, attention_sinks at least 0, and both together at most "
            f"{config.context_length}, the model's context, got {window} and {num_sinks}"
        )
    if all(config.window(layer) is not None for layer in config.attention_layers):
        raise ValueError(
            f"attention_window={window}: no layer of this {config.architecture} model sees the whole context; leave it "
            "out"
        )
    return dataclasses.replace(config, streaming=StreamingConfig(window=window, num_sinks=num_sinks))


def _with_context(config: DecoderConfig, context_length: int | None) -> DecoderConfig:
    if context_length is None:
        return config
    if config.streaming is not None and context_length >= 1:
        return dataclasses.replace(config, context_length=context_length)
    if not 1 <= context_length <= config.context_length:
        raise ValueError(
            f"context_length (max_model_len of LLM) must be 1 to {config.context_length}, the model's own, "
            f"got {context_length}"
        )
    return dataclasses.replace(config, context_length=context_length)
