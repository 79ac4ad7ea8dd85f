"""Converts Hugging Face's config.json, in its older and newer formats, to a DecoderConfig and back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jfa_models.checkpoints.families import FAMILIES, Family
from jfa_models.checkpoints.fields import (
    ACTIVATIONS,
    ROPE_THETA_UNSTATED,
    activation_of,
    check_counts,
    context_of,
    default_head_dim,
    family_of,
    list_of,
    longrope_attention,
    require,
)
from jfa_models.checkpoints.mixers_config import mamba2_from_hf, mamba2_to_hf, mixers_from_hf, mixers_to_hf
from jfa_models.model.config import DecoderConfig, ExpertsConfig
from jfa_models.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    Scaling,
    YarnScaling,
    check_positive,
)

_FULL, _WINDOW = "full_attention", "sliding_attention"

# null: off, or as many as query heads; missing: the family's default
_OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads", "head_dim")
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_pattern",
    "decoder_sparse_step",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a Hugging Face config.json; for a Gemma 3 with a vision tower, only its text part.

    Raises:
      ValueError: the architecture, activation or rope type is not supported, or a key is missing or invalid.
    """
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
        outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = {"model_type": "gemma3_text"} | outer | config["text_config"]
    architecture = config.get("model_type")
    family = family_of(architecture, "config.json: model_type", {name: name for name in FAMILIES})
    for key in ("qk_layernorm", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"config.json: {key} is not supported, got {config[key]!r}")
    source = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    source |= {key: None for key in _OFF if key in config and config[key] is None}
    if architecture == "mamba2":
        return mamba2_from_hf(source)
    eps = "layer_norm_eps" if family.always.get("norm") == "layer" else "rms_norm_eps"
    require(
        source,
        "config.json",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    if architecture == "granitemoehybrid" and source["num_local_experts"] == 0:
        del source["num_local_experts"]  # each layer has an MLP
    check_counts(source, "config.json", *_COUNTS)
    num_q_heads, num_layers = source["num_attention_heads"], source["num_hidden_layers"]
    head_dim = source.get("head_dim") or default_head_dim(source["hidden_size"], num_q_heads)
    rope, local_rope = _ropes_from_hf(source, head_dim)
    windows = _windows_from_hf(source, family, num_layers)
    scalar, query_scale = source.get("query_pre_attn_scalar"), source.get("attention_multiplier")
    if scalar is not None:
        check_positive("config.json", query_pre_attn_scalar=scalar)
        query_scale = scalar**-0.5
    read: dict[str, Any] = dict(
        vocab_size=source["vocab_size"],
        hidden_size=source["hidden_size"],
        intermediate_size=source["intermediate_size"],
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=source.get("num_key_value_heads") or num_q_heads,
        head_dim=head_dim,
        context_length=context_of(source["max_position_embeddings"], rope.scaling),
        norm_eps=source[eps],
        rope=rope,
        local_rope=local_rope if windows else None,
        tie_word_embeddings=source.get("tie_word_embeddings", False),
        hidden_act=activation_of(source, str(architecture)),
        qkv_bias=source.get("attention_bias", False),
        out_bias=source.get("attention_bias", False),
        mlp_bias=source.get("mlp_bias", False),
        query_scale=None if query_scale == head_dim**-0.5 else query_scale,
        attention_soft_cap=source.get("attn_logit_softcapping"),
        logits_soft_cap=source.get("final_logit_softcapping"),
        windows=windows,
        experts=_experts_from_hf(source, num_layers) if "num_experts_per_tok" in family.defaults else None,
        sparse_attention=_sparse_attention_from_hf(source),
    )
    read |= mixers_from_hf(source, num_layers)
    return DecoderConfig(architecture=str(architecture), **(read | family.always))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A config.json in a form that both older and newer versions of transformers read.

    Raises:
      ValueError: config.json cannot represent the decoder; the message names the fields.
    """
    family = family_of(config.architecture, "architecture", {name: name for name in FAMILIES})
    if config.architecture == "mamba2" and config.mamba2 is not None:
        written = mamba2_to_hf(config, config.mamba2)
    else:
        written = _written_for_hf(config, family)
    read = config_from_hf(written)
    lost = [
        field.name for field in dataclasses.fields(config) if getattr(read, field.name) != getattr(config, field.name)
    ]
    if lost:
        differ = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(
            f"config.json of a {config.architecture} model cannot represent {differ}; save it as another architecture"
        )
    return written


def _written_for_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    activation = next(name for name, ours in ACTIVATIONS.items() if ours == config.hidden_act)
    eps = "layer_norm_eps" if config.norm == "layer" else "rms_norm_eps"
    written: dict[str, Any] = {
        "architectures": [family.class_name],
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        eps: config.norm_eps,
        "hidden_act": activation,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.architecture in ("gemma2", "gemma3_text"):
        written["hidden_activation"] = activation
    if "qkv_bias" not in family.always:
        written["attention_bias"], written["mlp_bias"] = config.qkv_bias, config.mlp_bias
    if "query_pre_attn_scalar" in family.defaults:
        # transformers accepts only an integer
        written["query_pre_attn_scalar"] = round((config.query_scale or config.head_dim**-0.5) ** -2)
        written["attn_logit_softcapping"] = config.attention_soft_cap
        written["final_logit_softcapping"] = config.logits_soft_cap
    written |= _rope_to_hf(config)
    written |= mixers_to_hf(config)
    if family.windows is not None:
        window = next(filter(None, config.windows), None)
        written["sliding_window"] = window
        if family.windows != "all":
            written["layer_types"] = [_WINDOW if config.is_local(i) else _FULL for i in range(config.num_layers)]
        if "use_sliding_window" in family.defaults:
            written["use_sliding_window"] = window is not None
    if config.sparse_attention:  # our own key: transformers computes all scores
        written["sparse_attention"] = [None if entry is None else str(entry) for entry in config.sparse_attention]
    if config.experts is not None:
        experts = config.experts
        written["num_experts_per_tok"] = experts.experts_per_token
        if config.architecture in ("mixtral", "granitemoehybrid"):
            written |= {"num_local_experts": experts.num_experts, "intermediate_size": experts.intermediate_size}
        else:
            written |= {
                "num_experts": experts.num_experts,
                "moe_intermediate_size": experts.intermediate_size,
                "norm_topk_prob": experts.normalize,
                "mlp_only_layers": list(experts.dense_layers),
                "decoder_sparse_step": 1,
            }
        if config.architecture == "qwen3_next":
            written["shared_expert_intermediate_size"] = experts.shared_size
    return written


def _experts_from_hf(source: Mapping[str, Any], num_layers: int) -> ExpertsConfig | None:
    """None: the layers have MLPs."""
    count = "num_local_experts" if "num_local_experts" in source else "num_experts"
    if count not in source:
        return None
    shared = {"granitemoehybrid": "shared_intermediate_size", "qwen3_next": "shared_expert_intermediate_size"}
    step = source.get("decoder_sparse_step", 1)
    listed = list_of(source.get("mlp_only_layers", ()), int, "config.json: mlp_only_layers")
    return ExpertsConfig(
        num_experts=source[count],
        experts_per_token=source["num_experts_per_tok"],
        intermediate_size=source.get("moe_intermediate_size", source["intermediate_size"]),
        normalize=source["model_type"] in ("mixtral", "granitemoehybrid") or source.get("norm_topk_prob", False),
        shared_size=source[shared[source["model_type"]]] if source["model_type"] in shared else 0,
        shared_gate=source["model_type"] == "qwen3_next",
        dense_layers=tuple(i for i in range(num_layers) if i in listed or (i + 1) % step),
    )


def _sparse_attention_from_hf(source: Mapping[str, Any]) -> tuple[Any, ...]:
    given = source.get("sparse_attention", ())
    if not isinstance(given, list | tuple) or not all(isinstance(entry, str | None) for entry in given):
        raise ValueError(
            "config.json: sparse_attention must be a list with null or PATTERN:FRACTION for each layer, such as "
            f'[null, "top-k:0.25"], got {given!r}'
        )
    return tuple(given)


def _windows_from_hf(source: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    window, kinds = source.get("sliding_window"), source.get("layer_types")
    if family.windows is None:
        return ()
    if kinds is None:
        first, every = 0, num_layers + 1
        if family.windows == "late":
            first = source["max_window_layers"]
        if family.windows == "pattern":
            every = source["sliding_window_pattern"]
        kinds = [_WINDOW if i >= first and (i + 1) % every else _FULL for i in range(num_layers)]
    kinds = list_of(kinds, str, "config.json: layer_types")
    if len(kinds) != num_layers or set(kinds) - {_FULL, _WINDOW}:
        raise ValueError(
            f"config.json: layer_types must be {_FULL} or {_WINDOW} for each of the {num_layers} layers, "
            f"got {len(kinds)} entries: {', '.join(sorted(set(kinds)))}"
        )
    if window is None or not source.get("use_sliding_window", True) or _WINDOW not in kinds:
        return ()
    return tuple(window if kind == _WINDOW else None for kind in kinds)


def _ropes_from_hf(source: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The rope of layers without a window, and that of layers with a window if it is different."""
    rope = _rope_source(source)
    if isinstance(rope, Mapping) and _FULL in rope:
        full, local = (_rope_from_hf(source, rope.get(kind) or {}, head_dim) for kind in (_FULL, _WINDOW))
    else:
        full = local = _rope_from_hf(source, rope, head_dim)
        if "rope_local_base_freq" in source:
            local = RopeConfig(theta=source["rope_local_base_freq"])
    return full, (None if local == full else local)


def _rope_source(source: Mapping[str, Any]) -> Any:
    """rope_parameters of newer files or rope_scaling of older ones; of a file with both, the former.

    Raises:
      ValueError: a file has both, and they differ: transformers drops one, which was hardly meant.
    """
    newer, older = (source.get(name) or {} for name in ("rope_parameters", "rope_scaling"))
    if isinstance(newer, Mapping) and isinstance(older, Mapping) and newer and older:
        named = {"rope_type" if key == "type" else key: value for key, value in older.items()}
        stated = {"rope_type": "default", **(newer.get(_FULL, newer) or {})}
        if differing := [key for key in named if stated.get(key) != named[key]]:
            raise ValueError(
                f"config.json has both rope_parameters and rope_scaling, which differ in {', '.join(differing)}; "
                "move what you want from rope_scaling into rope_parameters"
            )
    return newer or older


def _rope_from_hf(source: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> RopeConfig:
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: the rope parameters must be a JSON object, got {rope!r}")
    check_counts(rope, "config.json: rope scaling", "original_max_position_embeddings")
    theta = rope.get("rope_theta") or source.get("rope_theta", ROPE_THETA_UNSTATED)
    part = rope.get("partial_rotary_factor") or source.get("partial_rotary_factor", 1.0)
    check_positive("config.json", partial_rotary_factor=part)
    original: Any = rope.get("original_max_position_embeddings") or source.get("original_max_position_embeddings")
    longest, where, scaling = source["max_position_embeddings"], "config.json: rope scaling", None
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su" or (kind == "yarn" and source["model_type"] == "phi3"):
        kind = "longrope"  # early Phi-3 files use these names
    match kind:
        case "default":
            pass
        case "linear":
            require(rope, where, "factor")
            scaling = LinearScaling(factor=rope["factor"])
        case "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            require(rope, where, *keys)
            factor, low, high, original = (rope[key] for key in keys)
            scaling = Llama3Scaling(
                factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=original
            )
        case "yarn":
            scaling = _yarn_from_hf(rope, longest, original or longest)
        case "longrope":
            require(rope, where, "short_factor", "long_factor")
            require({"original_max_position_embeddings": original}, where, "original_max_position_embeddings")
            scaling = LongRopeScaling(
                short=list_of(rope["short_factor"], (int, float), f"{where}: short_factor"),
                long=list_of(rope["long_factor"], (int, float), f"{where}: long_factor"),
                original_context_length=original,
                attention_factor=rope.get("attention_factor") or longrope_attention(longest, original),
            )
        case other:
            raise ValueError(f"config.json: rope type must be default, linear, llama3, yarn or longrope, got {other!r}")
    return RopeConfig(theta=theta, scaling=scaling, rotary_dim=None if part == 1.0 else int(head_dim * part))


def _yarn_from_hf(rope: Mapping[str, Any], longest: int, original: int) -> YarnScaling:
    factor = rope.get("factor") or longest / original
    check_positive("config.json: rope scaling", factor=factor)
    if rope.get("truncate") is False:
        raise ValueError("config.json: rope scaling: yarn with truncate=false is not supported")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (0.1 * rope[key] * math.log(max(factor, 1.0)) + 1.0 for key in ("mscale", "mscale_all_dim"))
        attention_factor = over / under
    return YarnScaling(
        factor=factor,
        original_context_length=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=attention_factor,
    )


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    rope = config.rope
    if rope is None:
        return {}
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": _scaling_to_hf(rope.scaling)}
    if rope.rotary_dim is not None:
        part = rope.rotary_dim / config.head_dim
        # readers truncate the product to an integer
        written["partial_rotary_factor"] = part if int(config.head_dim * part) == rope.rotary_dim else part * (1 + 1e-9)
    elif "partial_rotary_factor" in FAMILIES[config.architecture].defaults:
        written["partial_rotary_factor"] = 1.0
    if isinstance(rope.scaling, LongRopeScaling):
        written["original_max_position_embeddings"] = rope.scaling.original_context_length
    if config.architecture == "gemma3_text":
        written["rope_local_base_freq"] = (config.local_rope or rope).theta
    return written


def _scaling_to_hf(scaling: Scaling | None) -> dict[str, Any] | None:
    match scaling:
        case None:
            return None
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_context_length,
            }
        case YarnScaling():
            written = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_context_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
            }
            return (
                written
                if scaling.attention_factor is None
                else written | {"attention_factor": scaling.attention_factor}
            )
        case LongRopeScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                "attention_factor": scaling.attention_factor,
            }
    raise ValueError(
        "config.json cannot represent the rope scaling of this GGUF file, a list of divisors; "
        "to save the model, load it from its safetensors checkpoint"
    )
