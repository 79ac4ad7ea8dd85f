"""The fields of Hugging Face's config.json about layers with a state, and back."""

import math
from collections.abc import Mapping
from typing import Any

from jfa_models.checkpoints.fields import ACTIVATIONS, activation_of, check_counts, list_of, require
from jfa_models.model.config import DecoderConfig, GatedDeltaConfig, Mamba2Config, Mixer

_STATE, _FULL = "linear_attention", "full_attention"
_KINDS = {"mamba": _STATE, "attention": _FULL}  # the names of older files
_MIXERS: Mapping[str, Mixer] = {"granitemoehybrid": "mamba2", "qwen3_next": "gated_delta"}


def mamba2_from_hf(source: Mapping[str, Any]) -> DecoderConfig:
    """The decoder of a config.json with model_type mamba2, whose missing keys have been filled in."""
    counts = ("vocab_size", "hidden_size", "num_hidden_layers")
    require(source, "config.json", *counts)
    check_counts(source, "config.json", *counts, "max_position_embeddings", "expand")
    own = Mamba2Config(
        num_heads=source["num_heads"],
        head_dim=source["head_dim"],
        state_size=source["state_size"],
        num_groups=source["n_groups"],
        conv_width=source.get("conv_kernel", 4),
        conv_bias=source.get("use_conv_bias", True),
        proj_bias=source.get("use_bias", False),
        time_step_limit=_limit_from_hf(source),
    )
    _check_inner(own, source.get("expand", 2), source["hidden_size"])
    return DecoderConfig(
        architecture="mamba2",
        vocab_size=source["vocab_size"],
        hidden_size=source["hidden_size"],
        intermediate_size=0,
        num_layers=source["num_hidden_layers"],
        num_q_heads=0,
        num_kv_heads=0,
        head_dim=0,
        context_length=source["max_position_embeddings"],
        norm_eps=source["layer_norm_epsilon"],
        rope=None,
        hidden_act=activation_of(source, "mamba2"),
        tie_word_embeddings=source.get("tie_word_embeddings", False),
        mixers=("mamba2",) * source["num_hidden_layers"],
        mamba2=own,
    )


def mamba2_to_hf(config: DecoderConfig, own: Mamba2Config) -> dict[str, Any]:
    """The keys of a config.json with model_type mamba2."""
    return {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": own.num_heads,
        "head_dim": own.head_dim,
        "state_size": own.state_size,
        "n_groups": own.num_groups,
        "expand": own.inner // config.hidden_size,
        "conv_kernel": own.conv_width,
        "use_conv_bias": own.conv_bias,
        "use_bias": own.proj_bias,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_act": next(name for name, ours in ACTIVATIONS.items() if ours == config.hidden_act),
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_limit_to_hf(own),
    }


def mixers_from_hf(source: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """The fields of a DecoderConfig that say which layers have a state, and what their mixer is; {}: none can have one.

    Raises:
      ValueError: a layer is of an unknown type, or the numbers do not fit together.
    """
    mixer = _MIXERS.get(source["model_type"])
    if mixer is None:
        return {}
    listed = source.get("layer_types") or source.get("layers_block_type")
    if listed is None:
        every = source.get("full_attention_interval", num_layers + 1)
        listed = [_STATE if (i + 1) % every else _FULL for i in range(num_layers)]
    kinds = [str(_KINDS.get(kind, kind)) for kind in list_of(listed, str, "config.json: layer_types")]
    if len(kinds) != num_layers or set(kinds) - {_STATE, _FULL}:
        raise ValueError(
            f"config.json: layer_types must be {_STATE} or {_FULL} for each of the {num_layers} layers, "
            f"got {len(kinds)} entries: {', '.join(sorted(set(kinds)))}"
        )
    mixers = tuple(mixer if kind == _STATE else "attention" for kind in kinds)
    return {"mixers": mixers, **(_granite_from_hf(source) if mixer == "mamba2" else _delta_from_hf(source))}


def mixers_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The keys that mixers_from_hf reads."""
    if config.architecture not in _MIXERS:
        return {}
    written: dict[str, Any] = {"layer_types": [_FULL if x == "attention" else _STATE for x in config.mixers]}
    if (delta := config.gated_delta) is not None:
        written |= {
            "linear_num_key_heads": delta.num_key_heads,
            "linear_num_value_heads": delta.num_value_heads,
            "linear_key_head_dim": delta.key_dim,
            "linear_value_head_dim": delta.value_dim,
            "linear_conv_kernel_dim": delta.conv_width,
        }
    if (own := config.mamba2) is not None:
        written |= {
            "position_embedding_type": "nope" if config.rope is None else "rope",
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logits_divisor,
            "attention_multiplier": config.query_scale or config.head_dim**-0.5,
            "shared_intermediate_size": config.intermediate_size,
            "num_local_experts": 0,
            "mamba_n_heads": own.num_heads,
            "mamba_d_head": own.head_dim,
            "mamba_d_state": own.state_size,
            "mamba_n_groups": own.num_groups,
            "mamba_expand": own.inner // config.hidden_size,
            "mamba_d_conv": own.conv_width,
            "mamba_conv_bias": own.conv_bias,
            "mamba_proj_bias": own.proj_bias,
            **_limit_to_hf(own),
        }
    return written


def _granite_from_hf(source: Mapping[str, Any]) -> dict[str, Any]:
    if (positions := source.get("position_embedding_type")) not in (None, "nope", "rope"):
        raise ValueError(f"config.json: position_embedding_type must be nope or rope, got {positions!r}")
    check_counts(source, "config.json", "mamba_n_heads", "mamba_expand", "shared_intermediate_size")
    num_heads, expand, head_dim = source["mamba_n_heads"], source.get("mamba_expand", 2), source.get("mamba_d_head")
    own = Mamba2Config(
        num_heads=num_heads,
        head_dim=expand * source["hidden_size"] // num_heads if head_dim in (None, "auto") else head_dim,
        state_size=source["mamba_d_state"],
        num_groups=source.get("mamba_n_groups", 1),
        conv_width=source.get("mamba_d_conv", 4),
        conv_bias=source.get("mamba_conv_bias", True),
        proj_bias=source.get("mamba_proj_bias", False),
        time_step_limit=_limit_from_hf(source),
    )
    _check_inner(own, expand, source["hidden_size"])
    return {
        "mamba2": own,
        "intermediate_size": source["shared_intermediate_size"],
        "embedding_multiplier": source["embedding_multiplier"],
        "residual_multiplier": source["residual_multiplier"],
        "logits_divisor": source["logits_scaling"],
        **({} if positions == "rope" else {"rope": None}),
    }


def _delta_from_hf(source: Mapping[str, Any]) -> dict[str, Any]:
    own = GatedDeltaConfig(
        num_key_heads=source["linear_num_key_heads"],
        num_value_heads=source["linear_num_value_heads"],
        key_dim=source["linear_key_head_dim"],
        value_dim=source["linear_value_head_dim"],
        conv_width=source.get("linear_conv_kernel_dim", 4),
    )
    return {"gated_delta": own}


def _check_inner(own: Mamba2Config, expand: int, hidden_size: int) -> None:
    if own.inner != expand * hidden_size:
        raise ValueError(
            "config.json: the heads of Mamba-2 and their size must multiply to expand times hidden_size, "
            f"{expand} * {hidden_size}, got {own.num_heads} * {own.head_dim}"
        )


def _limit_from_hf(source: Mapping[str, Any]) -> tuple[float, float]:
    limit = source.get("time_step_limit", (0.0, math.inf))
    if isinstance(limit, list | tuple):  # newer files have no infinite numbers
        limit = [math.inf if x == {"__float__": "Infinity"} else x for x in limit]
    low_high = list_of(limit, (int, float), "config.json: time_step_limit")
    if len(low_high) != 2:
        raise ValueError(f"config.json: time_step_limit must be two numbers, got {limit}")
    return low_high[0], low_high[1]


def _limit_to_hf(own: Mamba2Config) -> dict[str, Any]:
    low, high = own.time_step_limit
    if (low, high) == (0.0, math.inf):
        return {}
    return {"time_step_limit": [low, {"__float__": "Infinity"} if math.isinf(high) else high]}
