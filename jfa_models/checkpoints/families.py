"""The decoder families: tables that map the tensor names in files to parameters, and defaults of their configurations.

A family is a DecoderConfig and a table of names. Two formats are read, config.json of Hugging Face (older and newer)
and the metadata of GGUF files; config.json is also written.

In the tables, `#` is a layer number and `*` an expert number; the tensors of all experts are stacked. A tuple lists the
parameters that a file stores in one tensor, concatenated by rows. The last part of a name (weight, bias, A_log, ...)
stays the same, except that the weight of a norm is called scale, and that of a convolution kernel.
"""

import dataclasses
from typing import Any, Literal

from jfa_models.model.config import DecoderConfig

Names = dict[str, str | tuple[str, ...]]


def _instead(names: Names, other: Names) -> Names:
    """A copy of a table in which some of our modules have different names in files."""
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


def _mixer(theirs: str, *projections: str) -> Names:
    """The modules of a mixer with a state."""
    kept = {f"layers.#.{theirs}.{name}": f"layers.#.mixer.{name}" for name in (*projections, "norm", "out_proj")}
    return {f"layers.#.{theirs}": "layers.#.mixer", f"layers.#.{theirs}.conv1d": "layers.#.mixer.conv", **kept}


_GRANITE = _mixer("mamba", "in_proj") | _instead(
    _LLAMA,
    {
        "layers.#.shared_mlp.input_linear": ("layers.#.mlp.gate", "layers.#.mlp.up"),
        "layers.#.shared_mlp.output_linear": "layers.#.mlp.down",
    },
)
_GRANITE_EXPERTS = _GRANITE | {
    "layers.#.shared_mlp.input_linear": ("layers.#.mlp.shared.gate", "layers.#.mlp.shared.up"),
    "layers.#.shared_mlp.output_linear": "layers.#.mlp.shared.down",
    "layers.#.block_sparse_moe.router.layer": "layers.#.mlp.router",
    # of all experts
    "layers.#.block_sparse_moe.input_linear": ("layers.#.mlp.gate", "layers.#.mlp.up"),
    "layers.#.block_sparse_moe.output_linear": "layers.#.mlp.down",
}
_QWEN3_MOE = {
    **_QWEN3,  # some layers have a dense MLP
    "layers.#.mlp.gate": "layers.#.mlp.router",
    "layers.#.mlp.experts.*.gate_proj": "layers.#.mlp.gate",
    "layers.#.mlp.experts.*.up_proj": "layers.#.mlp.up",
    "layers.#.mlp.experts.*.down_proj": "layers.#.mlp.down",
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
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_next": {
        **_QWEN3_MOE,
        "layers.#.mlp.shared_expert.gate_proj": "layers.#.mlp.shared.gate",
        "layers.#.mlp.shared_expert.up_proj": "layers.#.mlp.shared.up",
        "layers.#.mlp.shared_expert.down_proj": "layers.#.mlp.shared.down",
        "layers.#.mlp.shared_expert_gate": "layers.#.mlp.shared_gate",
        **_mixer("linear_attn", "in_proj_qkvz", "in_proj_ba"),
    },
    "mamba2": {
        "embeddings": "embed",
        "layers.#.norm": "layers.#.attention_norm",
        **_mixer("mixer", "in_proj"),
        "norm_f": "norm",
        "lm_head": "lm_head",
    },
    "granitemoehybrid": _GRANITE,
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
_GGUF: Names = {  # the same names in every family; a file has only those that its family uses
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
    "blk.#.ffn_gate_shexp": "layers.#.mlp.shared.gate",
    "blk.#.ffn_up_shexp": "layers.#.mlp.shared.up",
    "blk.#.ffn_down_shexp": "layers.#.mlp.shared.down",
    "blk.#.ssm": "layers.#.mixer",
    "blk.#.ssm_in": "layers.#.mixer.in_proj",
    "blk.#.ssm_conv1d": "layers.#.mixer.conv",
    "blk.#.ssm_norm": "layers.#.mixer.norm",
    "blk.#.ssm_out": "layers.#.mixer.out_proj",
    "output_norm": "norm",
    "output": "lm_head",
}
_GGUF_QWEN3_NEXT = _GGUF | {
    "blk.#.post_attention_norm": "layers.#.mlp_norm",
    "blk.#.ffn_gate_inp_shexp": "layers.#.mlp.shared_gate",
    "blk.#.attn_qkv": "layers.#.mixer.in_proj_qkv",
    "blk.#.attn_gate": "layers.#.mixer.in_proj_z",
    "blk.#.ssm_in": "layers.#.mixer.in_proj_qkvz",  # of older files
    "blk.#.ssm_ba": "layers.#.mixer.in_proj_ba",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The properties of a family that its files do not specify.

    Attributes:
      users: well-known models of the family.
      class_name: its class in transformers.
      gguf: its general.architecture in GGUF files; None: they are not read.
      always: fields of DecoderConfig that are the same in all its models.
      defaults: values of keys that a config.json may omit.
      windows: which layers have a window if config.json has sliding_window but no layer_types: "all"; "late", from
        max_window_layers on; or "pattern", all but every n-th one. None: the family has no windows.
      permuted: whether rows of q and k are interleaved in GGUF files.
      float16: whether its activations fit float16, whose largest number is 65,504.
      chat_template: the template of its chat models, for files without one.
      prefix: of all names in its safetensors except the output layer's.
    """

    users: str
    class_name: str
    gguf: str | None
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: Literal["all", "late", "pattern"] | None = None
    permuted: bool = False
    chat_template: str | None = None
    float16: bool = True
    prefix: str = "model."


# https://ai.google.dev/gemma/docs/core/prompt-structure; the system message is prepended to the first turn
_GEMMA_TURNS = (
    "{{ bos_token }}{% set said = namespace(first='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set said.first = (message.content | trim) ~ '\n\n' %}{% else %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ said.first }}{{ message.content | trim }}<end_of_turn>\n{% set said.first = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_GEMMA = dict(norm="rms_plus_one", scale_embeddings=True)
_NORM = dict(rms_norm_eps=1e-6)
_GEMMA_DEFAULTS = _NORM | dict(tie_word_embeddings=True, head_dim=256)
_GEMMA2_DEFAULTS = _GEMMA_DEFAULTS | dict(hidden_activation="gelu_pytorch_tanh", sliding_window=4096)
_QWEN_DEFAULTS = _NORM | dict(use_sliding_window=False, sliding_window=4096, max_window_layers=28)
_QWEN_DEFAULTS |= dict(max_position_embeddings=32_768)
_PHI_BIASES = dict(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True)
FAMILIES: dict[str, Family] = {  # by model_type of config.json
    "llama": Family(
        users="Llama 2, Llama 3, SmolLM2",
        class_name="LlamaForCausalLM",
        gguf="llama",
        defaults=_NORM | dict(max_position_embeddings=2048),
        permuted=True,
    ),
    "mistral": Family(
        users="Mistral",
        class_name="MistralForCausalLM",
        gguf="llama",
        defaults=_NORM | dict(sliding_window=4096, num_key_value_heads=8, max_position_embeddings=131_072),
        windows="all",
        permuted=True,
    ),
    "mixtral": Family(
        users="Mixtral",
        class_name="MixtralForCausalLM",
        gguf="llama",
        defaults=dict(
            rope_theta=1e6,
            num_key_value_heads=8,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=131_072,
            rms_norm_eps=1e-5,
        ),
        windows="all",
        permuted=True,
    ),
    "qwen2": Family(
        users="Qwen2, Qwen2.5",
        class_name="Qwen2ForCausalLM",
        gguf="qwen2",
        always=dict(qkv_bias=True, out_bias=False),
        defaults=_QWEN_DEFAULTS | dict(num_key_value_heads=32),
        windows="late",
    ),
    "qwen3": Family(
        users="Qwen3",
        class_name="Qwen3ForCausalLM",
        gguf="qwen3",
        always=dict(qk_norm=True),
        defaults=_QWEN_DEFAULTS | dict(head_dim=128, num_key_value_heads=32),
        windows="late",
    ),
    "qwen3_moe": Family(
        users="Qwen3-MoE",
        class_name="Qwen3MoeForCausalLM",
        gguf="qwen3moe",
        always=dict(qk_norm=True),
        defaults=_QWEN_DEFAULTS
        | dict(num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        windows="all",
    ),
    "gemma": Family(
        users="Gemma",
        class_name="GemmaForCausalLM",
        gguf="gemma",
        chat_template=_GEMMA_TURNS,
        always=_GEMMA,
        defaults=_GEMMA_DEFAULTS
        | dict(num_key_value_heads=16, hidden_act="gelu_pytorch_tanh", max_position_embeddings=8192),
    ),
    "gemma2": Family(
        users="Gemma 2",
        class_name="Gemma2ForCausalLM",
        gguf="gemma2",
        float16=False,
        chat_template=_GEMMA_TURNS,
        always=_GEMMA | dict(post_norms=True),
        defaults=_GEMMA2_DEFAULTS
        | dict(
            sliding_window_pattern=2,
            max_position_embeddings=8192,
            num_key_value_heads=4,
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
        float16=False,
        chat_template=_GEMMA_TURNS,
        always=_GEMMA | dict(post_norms=True, qk_norm=True),
        defaults=_GEMMA2_DEFAULTS
        | dict(
            sliding_window_pattern=6,
            rope_theta=1e6,
            rope_local_base_freq=1e4,
            query_pre_attn_scalar=256,
            vocab_size=262_208,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=131_072,
        ),
        windows="pattern",
    ),
    "phi": Family(
        users="Phi-1, Phi-1.5, Phi-2",
        class_name="PhiForCausalLM",
        gguf="phi2",
        always=_PHI_BIASES | dict(norm="layer", gated_mlp=False, parallel_block=True),
        defaults=dict(
            hidden_act="gelu_new", partial_rotary_factor=0.5, max_position_embeddings=2048, layer_norm_eps=1e-5
        ),
    ),
    "phi3": Family(
        users="Phi-3, Phi-4",
        class_name="Phi3ForCausalLM",
        gguf="phi3",
        defaults=dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
        windows="all",
    ),
    "mamba2": Family(
        users="Mamba-2, Codestral Mamba",
        class_name="Mamba2ForCausalLM",
        gguf="mamba2",
        prefix="backbone.",
        defaults=dict(
            num_heads=128,
            head_dim=64,
            state_size=128,
            n_groups=8,
            layer_norm_epsilon=1e-5,
            max_position_embeddings=2**20,  # a file states no limit, and there is none
        ),
    ),
    "granitemoehybrid": Family(
        users="Granite 4.0 H",
        class_name="GraniteMoeHybridForCausalLM",
        gguf="granitehybrid",
        permuted=True,
        defaults=_NORM
        | dict(
            max_position_embeddings=2048,
            attention_multiplier=1.0,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            logits_scaling=1.0,
            num_local_experts=8,
            num_experts_per_tok=2,
            shared_intermediate_size=1024,
            mamba_n_heads=128,
            mamba_d_state=256,
        ),
    ),
    "qwen3_next": Family(
        users="Qwen3-Next",
        class_name="Qwen3NextForCausalLM",
        gguf="qwen3next",
        always=dict(norm="rms_plus_one", qk_norm=True, attention_gate=True),
        defaults=_NORM
        | dict(
            head_dim=256,
            num_key_value_heads=2,
            max_position_embeddings=32_768,
            partial_rotary_factor=0.25,
            full_attention_interval=4,
            num_experts=512,
            num_experts_per_tok=10,
            norm_topk_prob=True,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
        ),
    ),
}


def hugging_face_names(config: DecoderConfig) -> Names:
    """Maps module names in the safetensors of a decoder, without the prefix of its family, to ours."""
    if config.architecture == "granitemoehybrid" and config.experts is not None:
        return _GRANITE_EXPERTS
    return _HUGGING_FACE.get(config.architecture, _LLAMA)


def gguf_names(architecture: str) -> Names:
    """Maps module names in a family's GGUF files to ours."""
    if architecture == "phi3":  # gate and up are stored as one tensor with the name of up
        return _GGUF | {"blk.#.ffn_up": ("layers.#.mlp.gate", "layers.#.mlp.up")}
    return _GGUF_QWEN3_NEXT if architecture == "qwen3_next" else _GGUF
