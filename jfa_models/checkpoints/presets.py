"""Configurations of well-known decoders, for random weights: benchmarks need a model's shape, not its weights.

Each lists the values of its config.json, except those that are the same in its whole family.
"""

from collections.abc import Mapping
from typing import Any

from jfa_models.checkpoints.hf_config import config_from_hf
from jfa_models.model.config import DecoderConfig

_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
)


def _model(model_type: str, *numbers: float, eps: float = 1e-5, **more: Any) -> DecoderConfig:
    eps_name = "layer_norm_eps" if model_type == "phi" else "rms_norm_eps"
    return config_from_hf({"model_type": model_type, eps_name: eps, **dict(zip(_KEYS, numbers, strict=True)), **more})


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _gemma3(*numbers: float, **more: Any) -> DecoderConfig:
    return _model("gemma3_text", *numbers, eps=1e-6, **more)


_TIED = dict(tie_word_embeddings=True)
_LINEAR = dict(rope_scaling={"rope_type": "linear", "factor": 8.0})

# The comments name the Hugging Face repository that each config.json is from.
PRESETS: Mapping[str, DecoderConfig] = {
    # meta-llama/Llama-2-7b-hf
    "llama-2-7b": _model("llama", 32_000, 4096, 11_008, 32, 32, 32, 4096, 1e4),
    # meta-llama/Meta-Llama-3-8B, -70B
    "llama-3-8b": _model("llama", 128_256, 4096, 14_336, 32, 32, 8, 8192, 5e5),
    "llama-3-70b": _model("llama", 128_256, 8192, 28_672, 80, 64, 8, 8192, 5e5),
    # meta-llama/Llama-3.1-8B
    "llama-3.1-8b": _model("llama", 128_256, 4096, 14_336, 32, 32, 8, 131_072, 5e5, rope_scaling=_llama3_scaling(8.0)),
    # meta-llama/Llama-3.2-1B, -3B
    "llama-3.2-1b": _model(
        "llama", 128_256, 2048, 8192, 16, 32, 8, 131_072, 5e5, rope_scaling=_llama3_scaling(32.0), head_dim=64, **_TIED
    ),
    "llama-3.2-3b": _model(
        "llama", 128_256, 3072, 8192, 28, 24, 8, 131_072, 5e5, rope_scaling=_llama3_scaling(32.0), head_dim=128, **_TIED
    ),
    # HuggingFaceTB/SmolLM2-135M, -360M, -1.7B
    "smollm2-135m": _model("llama", 49_152, 576, 1536, 30, 9, 3, 8192, 1e5, **_TIED),
    "smollm2-360m": _model("llama", 49_152, 960, 2560, 32, 15, 5, 8192, 1e5, **_TIED),
    "smollm2-1.7b": _model("llama", 49_152, 2048, 8192, 24, 32, 32, 8192, 130_000, **_TIED),
    # mistralai/Mistral-7B-v0.1, -v0.3
    "mistral-7b": _model("mistral", 32_000, 4096, 14_336, 32, 32, 8, 32_768, 1e4, sliding_window=4096),
    "mistral-7b-v0.3": _model("mistral", 32_768, 4096, 14_336, 32, 32, 8, 32_768, 1e6, sliding_window=None),
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": _model(
        "mixtral", 32_000, 4096, 14_336, 32, 32, 8, 32_768, 1e6, num_local_experts=8, num_experts_per_tok=2
    ),
    # microsoft/phi-1_5 (phi-1 has the same shape), phi-2
    "phi-1.5": _model("phi", 51_200, 2048, 8192, 24, 32, 32, 2048, 1e4, partial_rotary_factor=0.5),
    "phi-2": _model("phi", 51_200, 2560, 10_240, 32, 32, 32, 2048, 1e4, partial_rotary_factor=0.4),
    # microsoft/Phi-3-mini-4k-instruct, phi-4
    "phi-3-mini": _model("phi3", 32_064, 3072, 8192, 32, 32, 32, 4096, 1e4, sliding_window=2047),
    "phi-4": _model("phi3", 100_352, 5120, 17_920, 40, 40, 10, 16_384, 250_000),
    # Qwen/Qwen2.5-0.5B, -1.5B, -7B
    "qwen2.5-0.5b": _model("qwen2", 151_936, 896, 4864, 24, 14, 2, 32_768, 1e6, eps=1e-6, **_TIED),
    "qwen2.5-1.5b": _model("qwen2", 151_936, 1536, 8960, 28, 12, 2, 131_072, 1e6, eps=1e-6, **_TIED),
    "qwen2.5-7b": _model("qwen2", 152_064, 3584, 18_944, 28, 28, 4, 131_072, 1e6, eps=1e-6),
    # Qwen/Qwen3-0.6B, -1.7B, -4B, -8B, -30B-A3B
    "qwen3-0.6b": _model("qwen3", 151_936, 1024, 3072, 28, 16, 8, 40_960, 1e6, eps=1e-6, head_dim=128, **_TIED),
    "qwen3-1.7b": _model("qwen3", 151_936, 2048, 6144, 28, 16, 8, 40_960, 1e6, eps=1e-6, head_dim=128, **_TIED),
    "qwen3-4b": _model("qwen3", 151_936, 2560, 9728, 36, 32, 8, 40_960, 1e6, eps=1e-6, head_dim=128, **_TIED),
    "qwen3-8b": _model("qwen3", 151_936, 4096, 12_288, 36, 32, 8, 40_960, 1e6, eps=1e-6, head_dim=128),
    "qwen3-30b-a3b": _model(
        "qwen3_moe",
        *(151_936, 2048, 6144, 48, 32, 4, 40_960, 1e6),
        eps=1e-6,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    # google/gemma-2b, -7b
    "gemma-2b": _model("gemma", 256_000, 2048, 16_384, 18, 8, 1, 8192, 1e4, eps=1e-6, head_dim=256),
    "gemma-7b": _model("gemma", 256_000, 3072, 24_576, 28, 16, 16, 8192, 1e4, eps=1e-6, head_dim=256),
    # google/gemma-2-2b, -9b, -27b
    "gemma-2-2b": _model("gemma2", 256_000, 2304, 9216, 26, 8, 4, 8192, 1e4, eps=1e-6, head_dim=256),
    "gemma-2-9b": _model("gemma2", 256_000, 3584, 14_336, 42, 16, 8, 8192, 1e4, eps=1e-6, head_dim=256),
    "gemma-2-27b": _model(
        "gemma2", 256_000, 4608, 36_864, 46, 32, 16, 8192, 1e4, eps=1e-6, head_dim=128, query_pre_attn_scalar=144
    ),
    # google/gemma-3-270m, -1b-pt, -4b-pt, -12b-pt, -27b-pt
    "gemma-3-270m": _gemma3(262_144, 640, 2048, 18, 4, 1, 32_768, 1e6, sliding_window=512),
    "gemma-3-1b": _gemma3(262_144, 1152, 6912, 26, 4, 1, 32_768, 1e6, sliding_window=512),
    "gemma-3-4b": _gemma3(262_208, 2560, 10_240, 34, 8, 4, 131_072, 1e6, sliding_window=1024, **_LINEAR),
    "gemma-3-12b": _gemma3(262_208, 3840, 15_360, 48, 16, 8, 131_072, 1e6, sliding_window=1024, **_LINEAR),
    "gemma-3-27b": _gemma3(
        *(262_208, 5376, 21_504, 62, 32, 16, 131_072, 1e6),
        sliding_window=1024,
        head_dim=128,
        query_pre_attn_scalar=168,
        **_LINEAR,
    ),
    # mistralai/Mamba-Codestral-7B-v0.1
    "mamba-codestral-7b": config_from_hf(
        {"model_type": "mamba2", "vocab_size": 32_768, "hidden_size": 4096, "num_hidden_layers": 64}
    ),
    # Qwen/Qwen3-Next-80B-A3B-Instruct
    "qwen3-next-80b-a3b": _model("qwen3_next", 151_936, 2048, 5120, 48, 16, 2, 262_144, 1e7, eps=1e-6),
}


def preset(name: str) -> DecoderConfig:
    """The configuration of a well-known decoder.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
    """
    if (config := PRESETS.get(name.lower())) is None:
        raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return config
