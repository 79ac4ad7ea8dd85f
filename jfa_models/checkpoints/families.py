"""The decoder families: tables that map the tensor names in files to parameters, and defaults of their configurations.

A family is a DecoderConfig and a table of names. Two formats are read, config.json of Hugging Face (older and newer)
and the metadata of GGUF files; config.json is also written.

In the tables, `#` is a layer number and `*` an expert number; the tensors of all experts are stacked. A tuple lists the
parameters that a file stores in one tensor, concatenated by rows. The last part of a name (weight or bias) stays the
same, except that the weight of a norm is called scale.
"""

import dataclasses
from typing import Any, Literal

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
        **_QWEN3,  # some layers have a dense MLP
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
    "output_norm": "norm",
    "output": "lm_head",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The properties of a family that its files do not specify.

    Attributes:
      users: well-known models of the family.
      class_name: its class in transformers.
      gguf: its general.architecture in GGUF files.
      always: fields of DecoderConfig that are the same in all its models.
      defaults: values of keys that a config.json may omit.
      windows: which layers have a window if config.json has sliding_window but no layer_types: "all"; "late", from
        max_window_layers on; or "pattern", all but every n-th one. None: the family has no windows.
      permuted: whether rows of q and k are interleaved in GGUF files.
      float16: whether its activations fit float16, whose largest number is 65,504.
      chat_template: the template of its chat models, for files without one.
    """

    users: str
    class_name: str
    gguf: str
    always: dict[str, Any] = dataclasses.field(default_factory=dict)
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: Literal["all", "late", "pattern"] | None = None
    permuted: bool = False
    chat_template: str | None = None
    float16: bool = True


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
}


def hugging_face_names(architecture: str) -> Names:
    """Maps module names in a family's safetensors, without the prefix `model.`, to ours."""
    return _HUGGING_FACE.get(architecture, _LLAMA)


def gguf_names(architecture: str) -> Names:
    """Maps module names in a family's GGUF files to ours."""
    if architecture == "phi3":  # gate and up are stored as one tensor with the name of up
        return _GGUF | {"blk.#.ffn_up": ("layers.#.mlp.gate", "layers.#.mlp.up")}
    return _GGUF
