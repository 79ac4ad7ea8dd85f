"""The families of decoders: the names of their tensors in files, and how a file's configuration becomes ours.

A family is a DecoderConfig and a table of names. Two spellings are read, config.json of Hugging Face (older and newer)
and the metadata of GGUF files; config.json is also written.

In the tables `#` is a layer and `*` an expert, whose tensors are stacked; a file's tensor that is several of ours, one
below the other, has a tuple. A parameter keeps its kind (weight or bias), but the weight of a norm is its scale.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from jfa_models.model.config import Activation, DecoderConfig, ExpertsConfig
from jfa_models.model.rope import (
    LinearScaling,
    ListedScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    Scaling,
    YarnScaling,
    check_positive,
)

Names = dict[str, str | tuple[str, ...]]


def _instead(names: Names, other: Names) -> Names:
    """A table in which some of our modules have other names."""
    renamed = {part for ours in other.values() for part in ([ours] if isinstance(ours, str) else ours)}
    return {theirs: ours for theirs, ours in names.items() if ours not in renamed} | other


_LLAMA: Names = {
    "embed_tokens": "embed",
    "layers.#.input_layernorm": "layers.#.attention_norm",
    "layers.#.self_attn.q_proj": "layers.#.attention.q",
    "layers.#.self_attn.k_proj": "layers.#.attention.k",
    "layers.#.self_attn.v_proj": "layers.#.attention.v",
    "layers.#.self_attn.o_proj": "layers.#.attention.o",
    "layers.#.post_attention_layernorm": "layers.#.mlp_norm",
    "layers.#.mlp.gate_proj": "layers.#.mlp.gate",
    "layers.#.mlp.up_proj": "layers.#.mlp.up",
    "layers.#.mlp.down_proj": "layers.#.mlp.down",
    "norm": "norm",
    "lm_head": "lm_head",
}
_QWEN3 = _LLAMA | {
    "layers.#.self_attn.q_norm": "layers.#.attention.q_norm",
    "layers.#.self_attn.k_norm": "layers.#.attention.k_norm",
}
_GEMMA2: Names = {
    "layers.#.post_attention_layernorm": "layers.#.attention_post_norm",
    "layers.#.pre_feedforward_layernorm": "layers.#.mlp_norm",
    "layers.#.post_feedforward_layernorm": "layers.#.mlp_post_norm",
}
_HUGGING_FACE: dict[str, Names] = {
    "mixtral": _instead(
        _LLAMA,
        {
            "layers.#.block_sparse_moe.gate": "layers.#.mlp.router",
            "layers.#.block_sparse_moe.experts.*.w1": "layers.#.mlp.gate",
            "layers.#.block_sparse_moe.experts.*.w3": "layers.#.mlp.up",
            "layers.#.block_sparse_moe.experts.*.w2": "layers.#.mlp.down",
        },
    ),
    "qwen3": _QWEN3,
    "qwen3_moe": {
        **_QWEN3,  # some layers have an MLP
        "layers.#.mlp.gate": "layers.#.mlp.router",
        "layers.#.mlp.experts.*.gate_proj": "layers.#.mlp.gate",
        "layers.#.mlp.experts.*.up_proj": "layers.#.mlp.up",
        "layers.#.mlp.experts.*.down_proj": "layers.#.mlp.down",
    },
    "gemma2": _instead(_LLAMA, _GEMMA2),
    "gemma3_text": _instead(_QWEN3, _GEMMA2),
    "phi": _instead(
        _LLAMA,
        {
            "layers.#.self_attn.dense": "layers.#.attention.o",
            "layers.#.mlp.fc1": "layers.#.mlp.up",
            "layers.#.mlp.fc2": "layers.#.mlp.down",
            "final_layernorm": "norm",
        },
    ),
    "phi3": _instead(
        _LLAMA,
        {
            "layers.#.self_attn.qkv_proj": ("layers.#.attention.q", "layers.#.attention.k", "layers.#.attention.v"),
            "layers.#.mlp.gate_up_proj": ("layers.#.mlp.gate", "layers.#.mlp.up"),
        },
    ),
}

_GGUF: Names = {  # the same names in every family; what one lacks, its files do not have
    "token_embd": "embed",
    "blk.#.attn_norm": "layers.#.attention_norm",
    "blk.#.attn_q": "layers.#.attention.q",
    "blk.#.attn_k": "layers.#.attention.k",
    "blk.#.attn_v": "layers.#.attention.v",
    "blk.#.attn_qkv": ("layers.#.attention.q", "layers.#.attention.k", "layers.#.attention.v"),
    "blk.#.attn_q_norm": "layers.#.attention.q_norm",
    "blk.#.attn_k_norm": "layers.#.attention.k_norm",
    "blk.#.attn_output": "layers.#.attention.o",
    "blk.#.post_attention_norm": "layers.#.attention_post_norm",
    "blk.#.ffn_norm": "layers.#.mlp_norm",
    "blk.#.ffn_gate": "layers.#.mlp.gate",
    "blk.#.ffn_up": "layers.#.mlp.up",
    "blk.#.ffn_down": "layers.#.mlp.down",
    "blk.#.post_ffw_norm": "layers.#.mlp_post_norm",
    "blk.#.ffn_gate_inp": "layers.#.mlp.router",
    "blk.#.ffn_gate_exps": "layers.#.mlp.gate",
    "blk.#.ffn_up_exps": "layers.#.mlp.up",
    "blk.#.ffn_down_exps": "layers.#.mlp.down",
    "output_norm": "norm",
    "output": "lm_head",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What a file of a family leaves unsaid.

    Attributes:
      users: the models people know it by.
      class_name: of transformers.
      gguf: general.architecture.
      always: fields of DecoderConfig that are the same in all of them.
      defaults: keys that a config.json may leave out.
      windows: which layers have a window where one is stated and layer_types are not: "all"; "late", from
        max_window_layers on; or "pattern", all but every n-th one. None: the family has no windows.
      permuted: rows of q and k lie interleaved in GGUF files.
      chat_template: how its members for conversations read one, for files that do not say it.
    """

    users: str
    class_name: str
    gguf: str
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: Literal["all", "late", "pattern"] | None = None
    permuted: bool = False
    chat_template: str | None = None


# https://ai.google.dev/gemma/docs/core/prompt-structure; what the system says stands in front of the first turn
_GEMMA_TURNS = (
    "{{ bos_token }}{% set said = namespace(first='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set said.first = (message.content | trim) ~ '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ said.first }}{{ message.content | trim }}<end_of_turn>\n{% set said.first = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA = dict(norm="rms_plus_one", scale_embeddings=True)
_GEMMA_DEFAULTS = dict(tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh", head_dim=256)
_UNUSED_WINDOW = dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
_PHI_BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True)

FAMILIES: dict[str, Family] = {  # by model_type of config.json
    "llama": Family(users="Llama 2, Llama 3, SmolLM2", class_name="LlamaForCausalLM", gguf="llama", permuted=True),
    "mistral": Family(
        users="Mistral",
        class_name="MistralForCausalLM",
        gguf="llama",
        defaults=dict(sliding_window=4096),
        windows="all",
        permuted=True,
    ),
    "mixtral": Family(
        users="Mixtral",
        class_name="MixtralForCausalLM",
        gguf="llama",
        defaults=dict(rope_theta=1e6),
        windows="all",
        permuted=True,
    ),
    "qwen2": Family(
        users="Qwen2, Qwen2.5",
        class_name="Qwen2ForCausalLM",
        gguf="qwen2",
        always=dict(qkv_bias=True, out_bias=False),
        defaults=_UNUSED_WINDOW,
        windows="late",
    ),
    "qwen3": Family(
        users="Qwen3",
        class_name="Qwen3ForCausalLM",
        gguf="qwen3",
        always=dict(qk_norm=True),
        defaults=_UNUSED_WINDOW | dict(head_dim=128),
        windows="late",
    ),
    "qwen3_moe": Family(
        users="Qwen3-MoE",
        class_name="Qwen3MoeForCausalLM",
        gguf="qwen3moe",
        always=dict(qk_norm=True),
        defaults=_UNUSED_WINDOW,
        windows="all",
    ),
    "gemma": Family(
        users="Gemma",
        class_name="GemmaForCausalLM",
        gguf="gemma",
        chat_template=_GEMMA_TURNS,
        always=_GEMMA,
        defaults=_GEMMA_DEFAULTS,
    ),
    "gemma2": Family(
        users="Gemma 2",
        class_name="Gemma2ForCausalLM",
        gguf="gemma2",
        chat_template=_GEMMA_TURNS,
        always=_GEMMA | dict(post_norms=True),
        defaults=_GEMMA_DEFAULTS
        | dict(
            sliding_window_pattern=2,
            sliding_window=4096,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        windows="pattern",
    ),
    "gemma3_text": Family(
        users="Gemma 3",
        class_name="Gemma3ForCausalLM",
        gguf="gemma3",
        chat_template=_GEMMA_TURNS,
        always=_GEMMA | dict(post_norms=True, qk_norm=True),
        defaults=_GEMMA_DEFAULTS
        | dict(
            sliding_window_pattern=6,
            sliding_window=4096,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            query_pre_attn_scalar=256,
            vocab_size=262_208,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-6,
        ),
        windows="pattern",
    ),
    "phi": Family(
        users="Phi-1, Phi-1.5, Phi-2",
        class_name="PhiForCausalLM",
        gguf="phi2",
        always=_PHI_BIASES | dict(norm="layer", gated_mlp=False, parallel_block=True),
        defaults=dict(hidden_act="gelu_new", partial_rotary_factor=0.5),
    ),
    "phi3": Family(users="Phi-3, Phi-4", class_name="Phi3ForCausalLM", gguf="phi3", windows="all"),
}

_ACTIVATIONS: Mapping[str, Activation] = {  # in config.json; the first name of each is the one that is written
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
_FULL, _WINDOW = "full_attention", "sliding_attention"
_OFF = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")  # null: without; unstated: the default
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "sliding_window",
    "sliding_window_pattern",
    "decoder_sparse_step",
)
_ROPE_THETA_UNSTATED = 10_000.0  # in config.json and GGUF files alike


def hugging_face_names(architecture: str) -> Names:
    """The modules in a family's safetensors, less `model.` in front, and ours."""
    return _HUGGING_FACE.get(architecture, _LLAMA)


def gguf_names(architecture: str) -> Names:
    """The modules in a family's GGUF files and ours."""
    if architecture == "phi3":  # gate and up in one, under the name of one
        return _GGUF | {"blk.#.ffn_up": ("layers.#.mlp.gate", "layers.#.mlp.up")}
    return _GGUF


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a config.json of Hugging Face; of a Gemma 3 with eyes the part that reads and writes text.

    Raises:
      ValueError: an architecture, activation, rope type or quantization that is not supported, or a key is missing or
        wrong.
    """
    if config.get("model_type") == "gemma3" and isinstance(config.get("text_config"), Mapping):
        outer = {key: config[key] for key in ("quantization_config", "tie_word_embeddings") if key in config}
        config = {"model_type": "gemma3_text"} | outer | config["text_config"]
    architecture = config.get("model_type")
    family = _family(architecture, "config.json: model_type", {name: name for name in FAMILIES})
    if config.get("quantization_config"):
        raise ValueError(
            "config.json: quantization_config is not supported; "
            "use the unquantized checkpoint or a GGUF file of the model"
        )
    for key in ("qk_layernorm", "use_bidirectional_attention"):
        if config.get(key):
            raise ValueError(f"config.json: {key} is not supported, got {config[key]!r}")
    source = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
    source |= {key: None for key in _OFF if key in config and config[key] is None}
    eps = "layer_norm_eps" if family.always.get("norm") == "layer" else "rms_norm_eps"
    _require(
        source,
        "config.json",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        eps,
    )
    _check_counts(source, "config.json", *_COUNTS)
    num_q_heads, num_layers = source["num_attention_heads"], source["num_hidden_layers"]
    head_dim = source.get("head_dim") or _head_dim(source["hidden_size"], num_q_heads)
    rope, local_rope = _ropes_from_hf(source, head_dim)
    windows = _windows_from_hf(source, family, num_layers)
    scalar = source.get("query_pre_attn_scalar")
    if scalar is not None:
        check_positive("config.json", query_pre_attn_scalar=scalar)
    read: dict[str, Any] = dict(
        vocab_size=source["vocab_size"],
        hidden_size=source["hidden_size"],
        intermediate_size=source["intermediate_size"],
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=source.get("num_key_value_heads", num_q_heads),
        head_dim=head_dim,
        context_length=source["max_position_embeddings"],
        norm_eps=source[eps],
        rope=rope,
        local_rope=local_rope if windows else None,
        tie_word_embeddings=source.get("tie_word_embeddings", False),
        hidden_act=_activation(source, str(architecture)),
        qkv_bias=source.get("attention_bias", False),
        out_bias=source.get("attention_bias", False),
        mlp_bias=source.get("mlp_bias", False),
        query_scale=None if scalar is None or scalar == head_dim else scalar**-0.5,
        attention_soft_cap=source.get("attn_logit_softcapping"),
        logits_soft_cap=source.get("final_logit_softcapping"),
        windows=windows,
        experts=_experts_from_hf(source, num_layers) if architecture in ("mixtral", "qwen3_moe") else None,
    )
    return DecoderConfig(architecture=str(architecture), **(read | family.always))


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A config.json that Hugging Face reads, in the spelling that its older and newer versions know.

    Raises:
      ValueError: config.json cannot say what the decoder is; the message names the fields.
    """
    family = _family(config.architecture, "architecture", {name: name for name in FAMILIES})
    written = _written_for_hf(config, family)
    read = config_from_hf(written)
    lost = [
        field.name for field in dataclasses.fields(config) if getattr(read, field.name) != getattr(config, field.name)
    ]
    if lost:
        differ = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ValueError(
            f"a {config.architecture} checkpoint cannot have {differ}; choose another architecture to save it"
        )
    return written


def _written_for_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    activation = next(name for name, ours in _ACTIVATIONS.items() if ours == config.hidden_act)
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
        # transformers takes nothing but a whole number
        written["query_pre_attn_scalar"] = round((config.query_scale or config.head_dim**-0.5) ** -2)
        written["attn_logit_softcapping"] = config.attention_soft_cap
        written["final_logit_softcapping"] = config.logits_soft_cap
    written |= _rope_to_hf(config)
    if family.windows is not None:
        window = next(filter(None, config.windows), None)
        written["sliding_window"] = window
        if family.windows != "all":
            written["layer_types"] = [_WINDOW if config.is_local(i) else _FULL for i in range(config.num_layers)]
        if "use_sliding_window" in family.defaults:
            written["use_sliding_window"] = window is not None
    if config.experts is not None:
        experts = config.experts
        written["num_experts_per_tok"] = experts.experts_per_token
        if config.architecture == "mixtral":
            written |= {"num_local_experts": experts.num_experts, "intermediate_size": experts.intermediate_size}
        else:
            written |= {
                "num_experts": experts.num_experts,
                "moe_intermediate_size": experts.intermediate_size,
                "norm_topk_prob": experts.normalize,
                "mlp_only_layers": list(experts.dense_layers),
                "decoder_sparse_step": 1,
            }
    return written


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_divisors: Mapping[str, tuple[float, ...]] | None = None,
) -> DecoderConfig:
    """Reads the metadata of a GGUF file.

    Three facts are not in the metadata and follow from the tensors: tied embeddings (no `output.weight`), biases, and
    rope scalings that are tensors: pass `rope_freqs.weight`, `rope_factors_short.weight` and `rope_factors_long.weight`
    as `rope_divisors`.

    Raises:
      ValueError: an architecture or rope type that is not supported, or a key is missing or wrong.
    """
    stated = metadata.get("general.architecture")
    architectures: dict[str, str] = {}
    for name, family in FAMILIES.items():
        architectures.setdefault(family.gguf, name)
    family = _family(stated, "GGUF metadata: general.architecture", architectures)
    architecture = architectures[str(stated)]
    source = {key.removeprefix(f"{stated}."): value for key, value in metadata.items() if key.startswith(f"{stated}.")}
    if architecture == "llama" and source.get("expert_count"):
        architecture = "mixtral"
    eps = "attention.layer_norm_epsilon" if family.always.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    counts = ("embedding_length", "block_count", "attention.head_count", "context_length")
    names = (*counts, eps)
    _require(metadata, "GGUF metadata", *(f"{stated}.{name}" for name in names))
    _check_counts(metadata, "GGUF metadata", *(f"{stated}.{name}" for name in (*counts, "attention.key_length")))
    if source.get("attention.sliding_window"):
        _check_counts(metadata, "GGUF metadata", f"{stated}.attention.sliding_window")
    hidden_size, num_layers, num_q_heads, context_length, norm_eps = (source[name] for name in names)
    head_dim = source.get("attention.key_length") or _head_dim(hidden_size, num_q_heads)
    if source.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"GGUF metadata: {stated}.attention.value_length must be key_length, {head_dim}")
    experts = None
    if num_experts := source.get("expert_count"):
        inner = source.get("expert_feed_forward_length") or source.get("feed_forward_length")
        _require(metadata, "GGUF metadata", f"{stated}.expert_used_count")
        experts = ExpertsConfig(
            num_experts=num_experts, experts_per_token=source["expert_used_count"], intermediate_size=inner or 0
        )
    if experts is None:
        _require(metadata, "GGUF metadata", f"{stated}.feed_forward_length")
    windows = _windows_from_gguf(source, family, num_layers)
    # two sizes divide by what the file does not say
    odd_scale = (stated, num_layers) in (("gemma2", 46), ("gemma3", 62))
    read: dict[str, Any] = dict(
        vocab_size=source.get("vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
        hidden_size=hidden_size,
        intermediate_size=source.get("feed_forward_length") or (experts.intermediate_size if experts else 0),
        num_layers=num_layers,
        num_q_heads=num_q_heads,
        num_kv_heads=source.get("attention.head_count_kv", num_q_heads),
        head_dim=head_dim,
        context_length=context_length,
        norm_eps=norm_eps,
        rope=_rope_from_gguf(source, str(stated), head_dim, rope_divisors or {}),
        local_rope=_local_rope_from_gguf(source) if architecture == "gemma3_text" and any(windows) else None,
        tie_word_embeddings="output.weight" not in tensor_names,
        hidden_act=_activation(family.defaults, architecture),
        qkv_bias="blk.0.attn_q.bias" in tensor_names,
        out_bias="blk.0.attn_output.bias" in tensor_names,
        mlp_bias="blk.0.ffn_up.bias" in tensor_names,
        query_scale=(hidden_size / num_q_heads) ** -0.5 if odd_scale else None,
        attention_soft_cap=source.get("attn_logit_softcapping"),
        logits_soft_cap=source.get("final_logit_softcapping"),
        windows=windows,
        experts=experts,
    )
    return DecoderConfig(architecture=architecture, **(read | family.always))


def _family(name: object, where: str, known: Mapping[str, str]) -> Family:
    """Raises ValueError unless an architecture is one that we build."""
    if not isinstance(name, str) or name not in known:
        supported = ", ".join(f"{key} ({FAMILIES[ours].users})" for key, ours in known.items())
        raise ValueError(f"{where} {name!r} is not supported; supported architectures: {supported}")
    return FAMILIES[known[name]]


def _require(source: Mapping[str, Any], where: str, *keys: str) -> None:
    missing = [key for key in keys if source.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; take the file that belongs to these weights")


def _check_counts(source: Mapping[str, Any], where: str, *keys: str) -> None:
    """Raises ValueError unless what is stated of these is a whole number of at least 1."""
    for key in keys:
        value = source.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{where}: {key} must be a whole number of at least 1, got {value!r}")


def _list(value: object, kind: type | tuple[type, ...], where: str) -> tuple[Any, ...]:
    """Raises ValueError unless it is a list of this kind."""
    if not isinstance(value, list | tuple) or not all(isinstance(entry, kind) for entry in value):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
        raise ValueError(f"{where} must be a list of {names}, got {value!r}")
    return tuple(value)


def _head_dim(hidden_size: int, num_q_heads: int) -> int:
    check_positive("config", hidden_size=hidden_size, num_q_heads=num_q_heads)
    if hidden_size % num_q_heads:
        raise ValueError(
            f"the hidden size must be a multiple of the number of heads, got {hidden_size} and {num_q_heads}; "
            "a model of another shape must state its head_dim"
        )
    return hidden_size // num_q_heads


def _activation(source: Mapping[str, Any], architecture: str) -> Activation:
    name = source.get("hidden_activation") or source.get("hidden_act", "silu")
    if architecture == "gemma" and name == "gelu":
        name = "gelu_pytorch_tanh"  # the first files said the one and were trained with the other
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


def _experts_from_hf(source: Mapping[str, Any], num_layers: int) -> ExpertsConfig:
    count = "num_local_experts" if "num_local_experts" in source else "num_experts"
    _require(source, "config.json", count, "num_experts_per_tok")
    step = source.get("decoder_sparse_step", 1)
    listed = _list(source.get("mlp_only_layers", ()), int, "config.json: mlp_only_layers")
    return ExpertsConfig(
        num_experts=source[count],
        experts_per_token=source["num_experts_per_tok"],
        intermediate_size=source.get("moe_intermediate_size", source["intermediate_size"]),
        normalize=source["model_type"] == "mixtral" or source.get("norm_topk_prob", False),
        dense_layers=tuple(i for i in range(num_layers) if i in listed or (i + 1) % step),
    )


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
    kinds = _list(kinds, str, "config.json: layer_types")
    if len(kinds) != num_layers or set(kinds) - {_FULL, _WINDOW}:
        raise ValueError(
            f"config.json: layer_types must be {_FULL} or {_WINDOW} for each of {num_layers} layers, "
            f"got {len(kinds)}: {', '.join(sorted(set(kinds)))}"
        )
    if window is None or not source.get("use_sliding_window", True) or _WINDOW not in kinds:
        return ()
    return tuple(window if kind == _WINDOW else None for kind in kinds)


def _windows_from_gguf(source: Mapping[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    window = source.get("attention.sliding_window")
    if family.windows in (None, "late") or not window:
        return ()
    pattern = source.get("attention.sliding_window_pattern", family.defaults.get("sliding_window_pattern"))
    if isinstance(pattern, Sequence):
        return tuple(window if is_local else None for is_local in pattern)
    return tuple(None if pattern and (i + 1) % pattern == 0 else window for i in range(num_layers))


def _ropes_from_hf(source: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig | None]:
    """That of layers that see all, and that of layers with a window where it is another one."""
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and _FULL in rope:
        full, local = (_rope_from_hf(source, rope.get(kind) or {}, head_dim) for kind in (_FULL, _WINDOW))
    else:
        full = local = _rope_from_hf(source, rope, head_dim)
        if "rope_local_base_freq" in source:
            local = RopeConfig(theta=source["rope_local_base_freq"])
    return full, (None if local == full else local)


def _rope_from_hf(source: Mapping[str, Any], rope: Mapping[str, Any], head_dim: int) -> RopeConfig:
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: the parameters of rope must be an object, got {rope!r}")
    _check_counts(rope, "config.json: rope scaling", "original_max_position_embeddings")
    theta = rope.get("rope_theta") or source.get("rope_theta", _ROPE_THETA_UNSTATED)
    part = rope.get("partial_rotary_factor") or source.get("partial_rotary_factor", 1.0)
    check_positive("config.json", partial_rotary_factor=part)
    original: Any = rope.get("original_max_position_embeddings") or source.get("original_max_position_embeddings")
    longest, where, scaling = source["max_position_embeddings"], "config.json: rope scaling", None
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "su" or (kind == "yarn" and source["model_type"] == "phi3"):
        kind = "longrope"  # as the first files of Phi-3 call it
    match kind:
        case "default":
            pass
        case "linear":
            _require(rope, where, "factor")
            scaling = LinearScaling(factor=rope["factor"])
        case "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            _require(rope, where, *keys)
            factor, low, high, original = (rope[key] for key in keys)
            scaling = Llama3Scaling(
                factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=original
            )
        case "yarn":
            scaling = _yarn_from_hf(rope, longest, original or longest)
        case "longrope":
            _require(rope, where, "short_factor", "long_factor")
            _require({"original_max_position_embeddings": original}, where, "original_max_position_embeddings")
            scaling = LongRopeScaling(
                short=_list(rope["short_factor"], (int, float), f"{where}: short_factor"),
                long=_list(rope["long_factor"], (int, float), f"{where}: long_factor"),
                original_context_length=original,
                attention_factor=rope.get("attention_factor") or _longrope_attention(longest, original),
            )
        case other:
            raise ValueError(f"config.json: rope type must be default, linear, llama3, yarn or longrope, got {other!r}")
    return RopeConfig(theta=theta, scaling=scaling, rotary_dim=None if part == 1.0 else int(head_dim * part))


def _yarn_from_hf(rope: Mapping[str, Any], longest: int, original: int) -> YarnScaling:
    factor = rope.get("factor") or longest / original
    check_positive("config.json: rope scaling", factor=factor)
    if rope.get("truncate") is False:
        raise ValueError("config.json: rope scaling: truncate=false of yarn is not supported")
    stated = rope.get("attention_factor")
    if stated is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (0.1 * rope[key] * math.log(max(factor, 1.0)) + 1.0 for key in ("mscale", "mscale_all_dim"))
        stated = over / under
    return YarnScaling(
        factor=factor,
        original_context_length=original,
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        attention_factor=stated,
    )


def _longrope_attention(longest: int, original: int) -> float:
    """Source: arXiv:2402.13753, section 3; a context that is not stretched has 1."""
    check_positive("rope scaling", max_position_embeddings=longest, original_max_position_embeddings=original - 1)
    return math.sqrt(1.0 + math.log(longest / original) / math.log(original)) if longest > original else 1.0


def _rope_to_hf(config: DecoderConfig) -> dict[str, Any]:
    rope = config.rope
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": _scaling_to_hf(rope.scaling)}
    if rope.rotary_dim is not None:
        part = rope.rotary_dim / config.head_dim
        # readers cut the product to a whole number
        written["partial_rotary_factor"] = part if int(config.head_dim * part) == rope.rotary_dim else part * (1 + 1e-9)
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
        "config.json cannot say the rope scaling of this GGUF file, a list of divisors; "
        "load the model from its safetensors to save it"
    )


def _rope_from_gguf(
    source: Mapping[str, Any], stated: str, head_dim: int, divisors: Mapping[str, tuple[float, ...]]
) -> RopeConfig:
    theta = source.get("rope.freq_base", _ROPE_THETA_UNSTATED)
    turned = source.get("rope.dimension_count", head_dim)
    kind = source.get("rope.scaling.type", "linear")
    factor = source.get("rope.scaling.factor", source.get("rope.scale_linear", 1.0))
    original: Any = source.get("rope.scaling.original_context_length")
    longest = source["context_length"]
    scaling: Scaling | None = None
    if long := divisors.get("rope_factors_long.weight"):
        _require(source, f"GGUF metadata: {stated}", "rope.scaling.original_context_length")
        scaling = LongRopeScaling(
            short=divisors.get("rope_factors_short.weight", ()),
            long=long,
            original_context_length=original,
            attention_factor=source.get("rope.scaling.attn_factor") or _longrope_attention(longest, original),
        )
    elif kind == "yarn":
        _require(source, f"GGUF metadata: {stated}", "rope.scaling.original_context_length")
        scaling = YarnScaling(factor=factor, original_context_length=original)
    elif kind in ("none", "linear"):
        linear = LinearScaling(factor=1.0 if kind == "none" else factor)
        if listed := divisors.get("rope_freqs.weight"):
            scaling = ListedScaling(values=tuple(linear.factor * value for value in listed))
        elif linear.factor != 1.0:
            scaling = linear
    else:
        raise ValueError(
            f"GGUF metadata: {stated}.rope.scaling.type must be none, linear, yarn or longrope, got {kind!r}"
        )
    return RopeConfig(theta=theta, scaling=scaling, rotary_dim=None if turned == head_dim else turned)


def _local_rope_from_gguf(source: Mapping[str, Any]) -> RopeConfig:
    return RopeConfig(theta=source.get("rope.freq_base_swa", FAMILIES["gemma3_text"].defaults["rope_local_base_freq"]))
