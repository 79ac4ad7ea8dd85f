"""Converts the metadata of GGUF files to a DecoderConfig.

A key that a file lacks has the value that llama.cpp gives it: for some architectures that is not "off". Source:
llama.cpp, src/llama-model.cpp and src/models/.
"""

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jfa_models.checkpoints import gguf_mixers
from jfa_models.checkpoints.families import FAMILIES, Family
from jfa_models.checkpoints.fields import (
    ROPE_THETA_UNSTATED,
    activation_of,
    check_counts,
    context_of,
    default_head_dim,
    family_of,
    longrope_attention,
    require,
)
from jfa_models.model.config import DecoderConfig, ExpertsConfig
from jfa_models.model.rope import LinearScaling, ListedScaling, LongRopeScaling, RopeConfig, Scaling, YarnScaling

# Keys of an architecture whose other values would need code that this library does not have.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),  # unspecified, softmax
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_shared_count": (0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}
# The keys that are read, and those that describe how a model was made.
_KNOWN = frozenset(_FIXED) | frozenset(
    """
    vocab_size context_length embedding_length block_count feed_forward_length tensor_data_layout
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon
    attention.sliding_window attention.sliding_window_pattern
    attn_logit_softcapping final_logit_softcapping expert_count expert_used_count expert_feed_forward_length
    rope.dimension_count rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.type rope.scaling.factor
    rope.scaling.attn_factor rope.scaling.original_context_length rope.scaling.finetuned
    rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    """.split()
)

_NO_ATTENTION: Mapping[str, Any] = dict(num_q_heads=0, num_kv_heads=0, head_dim=0, rope=None)


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_divisors: Mapping[str, tuple[float, ...]] | None = None,
) -> DecoderConfig:
    """Converts the metadata of a GGUF file.

    Three properties are not in the metadata, but follow from the tensors: tied embeddings (no `output.weight`), biases,
    and rope scalings that are stored as tensors. Pass the tensors `rope_freqs.weight`, `rope_factors_short.weight` and
    `rope_factors_long.weight` as `rope_divisors`.

    Raises:
      ValueError: the architecture or rope type is not supported, or a key is missing or invalid.

    Warns:
      UserWarning: keys of the architecture that this library does not know, and therefore ignores.
    """
    arch = metadata.get("general.architecture")
    architectures: dict[str, str] = {}
    for name, family in FAMILIES.items():
        if family.gguf is not None:
            architectures.setdefault(family.gguf, name)
    family = family_of(arch, "GGUF metadata: general.architecture", architectures)
    architecture = architectures[str(arch)]
    kv_heads = metadata.get(f"{arch}.attention.head_count_kv")
    metadata = {key: _same_for_all_layers(key, value, arch in gguf_mixers.KEYS) for key, value in metadata.items()}
    source = {key.removeprefix(f"{arch}."): value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    _check_known(source, str(arch))
    if architecture == "llama" and source.get("expert_count"):
        architecture = "mixtral"
    eps = "attention.layer_norm_epsilon" if family.always.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    counts = ("embedding_length", "block_count", "context_length")
    names = (*counts, eps)
    require(metadata, "GGUF metadata", *(f"{arch}.{name}" for name in names))
    check_counts(metadata, "GGUF metadata", *(f"{arch}.{name}" for name in (*counts, "vocab_size")))
    hidden_size, num_layers, context_length, norm_eps = (source[name] for name in names)
    experts = None
    if num_experts := source.get("expert_count"):
        inner = source.get("expert_feed_forward_length") or source.get("feed_forward_length")
        require(metadata, "GGUF metadata", f"{arch}.expert_used_count")
        experts = ExpertsConfig(
            num_experts=num_experts,
            experts_per_token=source["expert_used_count"],
            intermediate_size=inner or 0,
            **gguf_mixers.shared_expert(source, str(arch)),
        )
    if experts is None:
        require(metadata, "GGUF metadata", f"{arch}.feed_forward_length")
    if not (vocab_size := source.get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ()))):
        require(metadata, "GGUF metadata", "tokenizer.ggml.tokens")
    read: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=source.get("feed_forward_length") or (experts.intermediate_size if experts else 0),
        num_layers=num_layers,
        context_length=context_length,
        norm_eps=norm_eps,
        tie_word_embeddings="output.weight" not in tensor_names,
        hidden_act=activation_of(family.defaults, architecture),
        qkv_bias=any(name.endswith(".attn_q.bias") for name in tensor_names),  # the first layer may have a state
        out_bias=any(name.endswith(".attn_output.bias") for name in tensor_names),
        mlp_bias=any(name.endswith(".ffn_up.bias") for name in tensor_names),
        attention_soft_cap=source.get("attn_logit_softcapping", family.defaults.get("attn_logit_softcapping")),
        logits_soft_cap=source.get("final_logit_softcapping", family.defaults.get("final_logit_softcapping")) or None,
        experts=experts,
    )
    read |= _attention_from_gguf(source, str(arch), family, rope_divisors or {}) if arch != "mamba2" else _NO_ATTENTION
    read |= gguf_mixers.mixers_from_gguf(
        source | {"attention.head_count_kv": kv_heads}, str(arch), num_layers, tensor_names
    )
    return DecoderConfig(architecture=architecture, **(read | family.always))


def _attention_from_gguf(
    source: Mapping[str, Any], arch: str, family: Family, divisors: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """The fields about layers with attention."""
    names = {name: f"{arch}.attention.{name}" for name in ("head_count", "head_count_kv", "key_length")}
    stated = {long: source.get(f"attention.{short}") for short, long in names.items()}
    require(stated, "GGUF metadata", names["head_count"])
    check_counts(stated, "GGUF metadata", *stated)
    if window := source.get("attention.sliding_window"):
        check_counts({f"{arch}.attention.sliding_window": window}, "GGUF metadata", f"{arch}.attention.sliding_window")
    hidden_size, num_layers, num_q_heads = (
        source[name] for name in ("embedding_length", "block_count", "attention.head_count")
    )
    head_dim = source.get("attention.key_length") or default_head_dim(hidden_size, num_q_heads)
    if source.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"GGUF metadata: {arch}.attention.value_length must equal key_length, {head_dim}")
    windows = _windows_from_gguf(source, family, num_layers)
    rope = _rope_from_gguf(source, arch, head_dim, divisors)
    # two models scale their queries by a factor that their files do not specify
    odd_scale = (arch, num_layers) in (("gemma2", 46), ("gemma3", 62))
    return dict(
        num_q_heads=num_q_heads,
        num_kv_heads=source.get("attention.head_count_kv", num_q_heads),
        head_dim=head_dim,
        context_length=context_of(source["context_length"], rope.scaling),
        rope=rope,
        local_rope=_local_rope_from_gguf(source) if arch == "gemma3" and any(windows) else None,
        query_scale=(hidden_size / num_q_heads) ** -0.5 if odd_scale else None,
        windows=windows,
    )


def _same_for_all_layers(key: str, value: Any, may_have_states: bool) -> Any:
    """A number that is listed for each layer, as a single one; layers with a state may have no heads."""
    if key.endswith(("_length", "head_count", "head_count_kv", "sliding_window")) and isinstance(value, list) and value:
        if may_have_states and key.endswith("head_count_kv"):
            value = [one for one in value if one] or [0]
        if any(one != value[0] for one in value):
            raise ValueError(f"GGUF metadata: {key} must be the same in all layers, got {value}")
        return value[0]
    return value


def _check_known(source: Mapping[str, Any], arch: str) -> None:
    for key, allowed in _FIXED.items():
        if key in source and source[key] not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise ValueError(f"GGUF metadata: {arch}.{key} must be {wanted} for this library, got {source[key]!r}")
    known = _KNOWN.union(gguf_mixers.KEYS.get(arch, ()))
    if unknown := [f"{arch}.{key}" for key in source if key not in known]:
        warnings.warn(
            f"GGUF metadata: {', '.join(unknown)}: not known to this library and ignored; "
            "compare its answers with llama.cpp's",
            stacklevel=4,
        )


def _windows_from_gguf(source: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    if family.windows in (None, "late"):
        return ()
    window = source.get("attention.sliding_window", _default_window(source, family, num_layers))
    if not window:
        return ()
    pattern = source.get("attention.sliding_window_pattern", family.defaults.get("sliding_window_pattern"))
    if isinstance(pattern, Sequence):
        return tuple(window if is_local else None for is_local in pattern)
    return tuple(None if pattern and (i + 1) % pattern == 0 else window for i in range(num_layers))


def _default_window(source: Mapping[str, Any], family: Family, num_layers: int) -> int | None:
    """The window of files that were made before converters wrote it."""
    match family.gguf, num_layers, source["context_length"]:
        case "gemma2", _, _:
            return family.defaults["sliding_window"]
        case "phi3", 32 | 40, 4096:  # Phi-3 mini and medium
            return 2047
        case "phi3", 40, 131_072:
            return 131_072
    return None


def _rope_from_gguf(
    source: Mapping[str, Any], arch: str, head_dim: int, divisors: Mapping[str, tuple[float, ...]]
) -> RopeConfig:
    theta = source.get("rope.freq_base", ROPE_THETA_UNSTATED)
    rotary_dim = source.get("rope.dimension_count", head_dim)
    kind = source.get("rope.scaling.type", "linear")
    factor = source.get("rope.scaling.factor", source.get("rope.scale_linear", 1.0)) or 1.0
    longest = source["context_length"]
    original: Any = source.get("rope.scaling.original_context_length", longest)
    attention = source.get("rope.scaling.attn_factor")
    scaling: Scaling | None = None
    if long := divisors.get("rope_factors_long.weight"):
        scaling = LongRopeScaling(
            short=divisors.get("rope_factors_short.weight", ()),
            long=long,
            original_context_length=original,
            attention_factor=attention or longrope_attention(longest, original),
        )
    elif kind == "longrope":
        raise ValueError(
            f"GGUF metadata: {arch}.rope.scaling.type is longrope, but the file lacks the tensors "
            "rope_factors_long.weight and rope_factors_short.weight; convert the model again"
        )
    elif kind == "yarn":
        given = source.get("rope.scaling.yarn_attn_factor")
        if attention is not None:  # a factor of the factor that YaRN has anyway
            given = attention * (given or 0.1 * math.log(max(factor, 1.0)) + 1.0)
        scaling = YarnScaling(
            factor=factor,
            original_context_length=original,
            beta_fast=source.get("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=source.get("rope.scaling.yarn_beta_slow", 1.0),
            attention_factor=given,
        )
    elif kind in ("none", "linear"):
        linear = LinearScaling(factor=1.0 if kind == "none" else factor)
        if listed := divisors.get("rope_freqs.weight"):
            scaling = ListedScaling(values=tuple(linear.factor * value for value in listed))
        elif linear.factor != 1.0:
            scaling = linear
        if attention not in (None, 1.0):
            raise ValueError(
                f"GGUF metadata: {arch}.rope.scaling.attn_factor must be 1 for rope scaling {kind}, got {attention}"
            )
    else:
        raise ValueError(
            f"GGUF metadata: {arch}.rope.scaling.type must be none, linear, yarn or longrope, got {kind!r}"
        )
    return RopeConfig(theta=theta, scaling=scaling, rotary_dim=None if rotary_dim == head_dim else rotary_dim)


def _local_rope_from_gguf(source: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(theta=source.get("rope.freq_base_swa", FAMILIES["gemma3_text"].defaults["rope_local_base_freq"]))
