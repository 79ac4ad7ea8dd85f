"""Layers with a state in GGUF files: the fields of a DecoderConfig, and their tensors as our parameters.

Source: llama.cpp, conversion/mamba.py, granite.py and qwen.py, and src/models/.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jfa_models.checkpoints.fields import check_counts, require
from jfa_models.checkpoints.tensors import JoinedTensors, StackedTensors, StoredTensor
from jfa_models.model.config import DecoderConfig, GatedDeltaConfig, Mamba2Config, Mixer

SIZES = tuple(f"ssm.{name}" for name in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count"))
_GRANITE_SCALES = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
# The keys that are read besides those of every architecture, by general.architecture.
KEYS: Mapping[str, tuple[str, ...]] = {
    "mamba2": SIZES,
    "granitehybrid": (*SIZES, *_GRANITE_SCALES, "expert_shared_feed_forward_length"),
    "qwen3next": (
        *(*SIZES, "expert_shared_feed_forward_length"),
        *("full_attention_interval", "attention.recurrent_layers"),
    ),
}
_EVERY = 4  # llama.cpp's full_attention_interval
# Tensors that are not named after a module of ours.
_NAMES = {"ssm_a": "ssm.A_log", "ssm_d": "ssm.D", "ssm_dt.bias": "ssm.dt_bias"}

Tensors = dict[str, StoredTensor | StackedTensors | JoinedTensors]


def mixers_from_gguf(
    source: Mapping[str, Any], arch: str, num_layers: int, tensor_names: Collection[str]
) -> dict[str, Any]:
    """The fields of a DecoderConfig that say which layers have a state, and what their mixer is; {}: none can have one.

    Args:
      source: the keys of the architecture, without its name.
      arch: general.architecture.

    Raises:
      ValueError: a key is missing or invalid, or the layers are not one per layer.
    """
    if arch not in KEYS:
        return {}
    require(source, f"GGUF metadata: {arch}", *SIZES)
    check_counts(source, f"GGUF metadata: {arch}", *SIZES)
    width, inner, state, heads, groups = (source[name] for name in SIZES)
    if inner % heads:
        raise ValueError(
            f"GGUF metadata: {arch}.ssm.inner_size must be a multiple of ssm.time_step_rank, the number of heads, "
            f"got {inner} and {heads}"
        )
    if arch == "qwen3next":
        delta = GatedDeltaConfig(
            num_key_heads=groups, num_value_heads=heads, key_dim=state, value_dim=inner // heads, conv_width=width
        )
        return {"mixers": _delta_mixers(source, num_layers), "gated_delta": delta}
    mamba2 = Mamba2Config(
        num_heads=heads,
        head_dim=inner // heads,
        state_size=state,
        num_groups=groups,
        conv_width=width,
        conv_bias=any(name.endswith(".ssm_conv1d.bias") for name in tensor_names),
        proj_bias=any(name.endswith(".ssm_in.bias") for name in tensor_names),
    )
    if arch == "mamba2":
        return {"mixers": ("mamba2",) * num_layers, "mamba2": mamba2}
    shared = source.get("expert_shared_feed_forward_length") if source.get("expert_count") else None
    scales = [source.get(name) for name in _GRANITE_SCALES]
    if not all(isinstance(scale, int | float | None) for scale in scales):
        raise ValueError(f"GGUF metadata: {arch}: {', '.join(_GRANITE_SCALES)} must be numbers, got {scales}")
    usual = (source.get("attention.key_length") or source["embedding_length"] / source["attention.head_count"]) ** -0.5
    return {
        "mixers": tuple("attention" if n else "mamba2" for n in _per_layer(source, num_layers)),
        "mamba2": mamba2,
        "query_scale": scales[0] if scales[0] and not math.isclose(scales[0], usual, rel_tol=1e-6) else None,
        "embedding_multiplier": scales[1] or 1.0,
        "residual_multiplier": scales[2] or 1.0,
        "logits_divisor": scales[3] or 1.0,
        **({"intermediate_size": shared} if shared else {}),
        **({} if source.get("rope.scaling.finetuned", True) else {"rope": None}),
    }


def shared_expert(source: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """The fields of an ExpertsConfig about the MLP that processes every token."""
    size = source.get("expert_shared_feed_forward_length", 0) if arch in KEYS else 0
    if arch == "qwen3next":
        return {"shared_size": size or source.get("feed_forward_length", 0), "shared_gate": True}
    return {"shared_size": size}


def _per_layer(source: Mapping[str, Any], num_layers: int) -> Sequence[int]:
    """The heads of each layer's keys: none in layers with a state."""
    heads = source.get("attention.head_count_kv")
    return heads if isinstance(heads, Sequence) else (heads or 1,) * num_layers


def _delta_mixers(source: Mapping[str, Any], num_layers: int) -> tuple[Mixer, ...]:
    check_counts(source, "GGUF metadata: qwen3next", "full_attention_interval")
    every = source.get("full_attention_interval", _EVERY)
    has_state = source.get("attention.recurrent_layers", [bool((i + 1) % every) for i in range(num_layers)])
    if not isinstance(has_state, Sequence):
        has_state = (has_state,) * num_layers
    return tuple("gated_delta" if one else "attention" for one in has_state)


def by_names_of_modules(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of a file, those of mixers under names that the table of families has."""
    found = {}
    for name, tensor in stored.items():
        block, layer, rest = (*name.split(".", 2), "", "")[:3]
        found[f"{block}.{layer}.{_NAMES[rest]}" if rest in _NAMES else name] = tensor
    return found


def as_parameters(tensors: Mapping[str, Any], config: DecoderConfig) -> Tensors:
    """The tensors by our names, as their parameters have them: in one piece, and in their shapes."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".mixer.A_log"):
            tensor = dataclasses.replace(tensor, is_minus_exp=True)
        if re.search(r"\.mixer\.(A_log|D|norm\.scale)$", name):  # they have an axis more, of groups or of length 1
            tensor = dataclasses.replace(tensor, shape=(math.prod(tensor.shape),))
        if name.endswith(".mlp.shared_gate.weight"):
            tensor = dataclasses.replace(tensor, shape=(1, math.prod(tensor.shape)))
        found[name] = tensor
    for name in [name for name in found if name.endswith(".mixer.in_proj_qkv.weight")]:
        start = name.removesuffix("qkv.weight")
        gate = found.pop(f"{start}z.weight", None)
        if isinstance(gate, StoredTensor):
            found[f"{start}qkvz.weight"] = JoinedTensors(parts=tuple(_of_key_heads(found.pop(name), gate, config)))
    return found


def _of_key_heads(qkv: Any, gate: StoredTensor, config: DecoderConfig) -> Iterator[StoredTensor]:
    """For each key head: its query, its key, the values of its value heads, and their gates."""
    own = config.gated_delta
    assert own is not None
    keys = own.num_key_heads * own.key_dim
    of_values = own.num_value_heads // own.num_key_heads * own.value_dim
    for head in range(own.num_key_heads):
        for whole, start, size in (
            (qkv, 0, own.key_dim),
            (qkv, keys, own.key_dim),
            (qkv, 2 * keys, of_values),
            (gate, 0, of_values),
        ):
            yield whole.rows(start + head * size, start + (head + 1) * size)
