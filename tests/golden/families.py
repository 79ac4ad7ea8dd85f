"""Writes tiny seeded checkpoints of every model family beside this file, with their truth.

For each NAME: the folder NAME/ (config.json, generation_config.json, model.safetensors, as `save_pretrained` writes
them), NAME.npz (what Hugging Face transformers computes from it on a CPU, float32, eager attention) and, for some,
NAME.gguf (the same weights by the conventions of llama.cpp's converter). The files are committed, so the tests need
none of this. An archive holds

    input_ids i32[2, 24], logits f32[2, 24, 96]
    greedy i32[2, n]: the continuation without a stop, from full forward passes without a cache; 16 tokens, of models
      with states 32
    greedy_margin f32[2, n]: the best logit of each step minus the second
    padded_input_ids, padded_mask, padded_logits: the same, row 1 padded by 5 on the left (compare real tokens only)

A case is refused when something it is about (a window, a soft cap, a bias, ...) could be dropped without moving the
logits, and when padding moves them.

Packages: python 3.11, torch==2.13.0 (CPU), transformers==5.23.0, accelerate, gguf==0.19.0, safetensors,
          numpy.
Run:      python tests/golden/families.py [NAME ...]
          python tests/golden/families.py --saved FOLDER     loads FOLDER/NAME, what save_pretrained of jfa wrote of
                                                             NAME, and compares its logits with NAME.npz

Another transformers, or another torch, may write other bytes.
"""

import dataclasses
import math
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

HERE = Path(__file__).parent

PROMPT_TOKENS = 24
PADDING = 5

# The change that dropping a part must cause and the change that a rewriting may cause, both in the largest logit
# difference over the standard deviation of the logits.
MATTERS = 0.02
SAME = 1e-4

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

OF_ATTENTION = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
LAST_NORMS = ("model.norm.weight", "backbone.norm_f.weight")
GRANITE_MISTAKES = {
    f"{key} of 1": {key: 1.0}
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint: its configuration, what a reader could get wrong, and its GGUF architecture."""

    config: PreTrainedConfig
    # Changes of the configuration under which the same weights must give other logits, by name.
    wrong: dict[str, dict[str, Any]]
    gguf: str | None = None

    @property
    def new_tokens(self) -> int:
        """How many the continuation has; the longer, the more steps a state lasts."""
        return 32 if self.config.model_type in ("mamba2", "granitemoehybrid", "qwen3_next") else 16


def main(names: list[str]) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cases = all_cases()
    for name in names or cases:
        write_case(name, cases[name])


def check_saved(folder: Path) -> None:
    """Ends with an error unless transformers loads what was saved of each case whole, and computes the same."""
    for saved in sorted(path for path in folder.iterdir() if path.is_dir()):
        model, loading = AutoModelForCausalLM.from_pretrained(
            saved, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not any(loading.values()), (saved.name, loading)
        arrays = dict(np.load(HERE / f"{saved.name}.npz"))
        found = difference(run(model, arrays), arrays["logits"])
        print(f"{saved.name}: {found:.0e}")
        assert found < SAME, saved.name


def write_case(name: str, case: Case) -> None:
    model, arrays = seeded_truth(name, case)
    check_padding(arrays)
    print(f"{name}: logits std {arrays['logits'].std():.2f}, least margin {arrays['greedy_margin'].min():.4f}")
    check_everything_matters(case, model, arrays)
    model.save_pretrained(HERE / name)
    np.savez(HERE / f"{name}.npz", **arrays)
    check_reload(HERE / name, arrays)
    if case.gguf is not None:
        write_gguf(HERE / f"{name}.gguf", case.gguf, case.config, load_file(HERE / name / "model.safetensors"))
        print(f"  {name}.gguf read by transformers: {check_gguf(name, case.config, arrays)}")


# The cases


def all_cases() -> dict[str, Case]:
    """Every case by name. A rotary base other than the family's default shows whether it is read at all."""
    no_window = {"window": {"sliding_window": None}}
    return {
        # llama3/ itself, with its older archive, is larger than these: this is its shape for a GGUF file.
        "llama3_tiny": Case(
            config=transformers.LlamaConfig(
                **SMALL | {"max_position_embeddings": 256},
                head_dim=16,
                rope_parameters=llama3_rope(),
            ),
            wrong={"rope scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
            gguf="llama",
        ),
        "mistral": Case(
            config=transformers.MistralConfig(**SMALL, head_dim=12, sliding_window=6, rope_parameters=plain_rope(1e3)),
            wrong=no_window | {"window + 1": {"sliding_window": 7}, "rope theta": {"rope_parameters": plain_rope(1e4)}},
        ),
        "mixtral": Case(
            config=transformers.MixtralConfig(
                **SMALL | {"intermediate_size": 16},
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=None,
                rope_parameters=plain_rope(1e3),
            ),
            wrong={"experts per token": {"num_experts_per_tok": 1}},
            gguf="llama",
        ),
        # A GGUF file of this architecture does not state the rotary base: it is 10000.
        "phi2": Case(
            config=transformers.PhiConfig(
                **SMALL
                | {"hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
                hidden_act="gelu_new",
                rope_parameters=plain_rope(1e4, partial_rotary_factor=0.4),
            ),
            wrong={"partial rotary": {"rope_parameters": plain_rope(1e4, partial_rotary_factor=1.0)}},
            gguf="phi2",
        ),
        "phi3": Case(
            config=transformers.Phi3Config(**SMALL, sliding_window=7, rope_parameters=plain_rope(500.0)),
            wrong=no_window | {"window - 1": {"sliding_window": 6}},
            gguf="phi3",
        ),
        "phi3_long": Case(
            config=transformers.Phi3Config(
                **SMALL,
                original_max_position_embeddings=16,
                rope_parameters=longrope(4, original=16),
            ),
            wrong={
                "long factors": {"rope_parameters": longrope(4, original=16) | {"long_factor": [1.0] * 4}},
                "attention factor": {"rope_parameters": longrope(4, original=16) | {"attention_factor": 1.0}},
            },
            gguf="phi3",
        ),
        "phi3_short": Case(
            config=transformers.Phi3Config(
                **SMALL | {"max_position_embeddings": 256},
                original_max_position_embeddings=64,
                tie_word_embeddings=True,
                rope_parameters=longrope(3, original=64, partial_rotary_factor=0.75),
            ),
            wrong={
                "short factors": {
                    "rope_parameters": longrope(3, original=64, partial_rotary_factor=0.75)
                    | {"short_factor": [1.0] * 3}
                },
                "attention factor": {
                    "rope_parameters": longrope(3, original=64, partial_rotary_factor=0.75) | {"attention_factor": 1.0}
                },
                "partial rotary": {"rope_parameters": longrope(4, original=64)},
            },
        ),
        "qwen2": Case(
            config=transformers.Qwen2Config(**SMALL, tie_word_embeddings=True, rope_parameters=plain_rope(1e3)),
            wrong={"rope theta": {"rope_parameters": plain_rope(1e4)}},
            gguf="qwen2",
        ),
        "qwen2_yarn": Case(
            config=transformers.Qwen2Config(**SMALL, rope_parameters=yarn()),
            wrong={
                "rope scaling": {"rope_parameters": plain_rope(1e3)},
                "attention factor": {"rope_parameters": yarn() | {"attention_factor": 1.0}},
            },
        ),
        "qwen2_window": Case(
            config=transformers.Qwen2Config(
                **SMALL | {"num_hidden_layers": 3},
                use_sliding_window=True,
                sliding_window=6,
                max_window_layers=1,
                rope_parameters=plain_rope(1e3),
            ),
            wrong={
                "window": {"use_sliding_window": False, "layer_types": None},
                "first layer full": {"max_window_layers": 0, "layer_types": None},
                "window only after": {"max_window_layers": 2, "layer_types": None},
            },
        ),
        "qwen3": Case(
            config=transformers.Qwen3Config(**SMALL, head_dim=12, rope_parameters=plain_rope(1e3)),
            wrong={"rope theta": {"rope_parameters": plain_rope(1e4)}},
            gguf="qwen3",
        ),
        "qwen3_moe": Case(
            config=transformers.Qwen3MoeConfig(
                **SMALL | {"num_hidden_layers": 3},
                head_dim=12,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                norm_topk_prob=True,
                mlp_only_layers=[1],
                rope_parameters=plain_rope(1e3),
            ),
            wrong={"normalised weights": {"norm_topk_prob": False}, "experts per token": {"num_experts_per_tok": 1}},
        ),
        "qwen3_moe_raw": Case(
            config=transformers.Qwen3MoeConfig(
                **SMALL,
                head_dim=12,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                norm_topk_prob=False,
                decoder_sparse_step=1,
                rope_parameters=plain_rope(1e3),
            ),
            wrong={"raw weights": {"norm_topk_prob": True}, "experts per token": {"num_experts_per_tok": 1}},
        ),
        # What a GGUF file of this architecture can say: llama.cpp has experts in every layer, and normalises.
        "qwen3_moe_sparse": Case(
            config=transformers.Qwen3MoeConfig(
                **SMALL,
                head_dim=12,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                norm_topk_prob=True,
                rope_parameters=plain_rope(1e3),
            ),
            wrong={"normalised weights": {"norm_topk_prob": False}, "experts per token": {"num_experts_per_tok": 1}},
            gguf="qwen3moe",
        ),
        "gemma": Case(
            config=transformers.GemmaConfig(**SMALL, head_dim=12, rope_parameters=plain_rope(1e3)),
            wrong={"rope theta": {"rope_parameters": plain_rope(1e4)}, "activation": {"hidden_act": "silu"}},
        ),
        "gemma2": Case(
            config=transformers.Gemma2Config(
                **SMALL | {"num_hidden_layers": 3},
                head_dim=16,
                attn_logit_softcapping=5.0,
                final_logit_softcapping=4.0,
                sliding_window=6,
                query_pre_attn_scalar=24,
                rope_parameters=plain_rope(1e3),
            ),
            wrong={
                "attention soft cap": {"attn_logit_softcapping": None},
                "final soft cap": {"final_logit_softcapping": None},
                "query scale": {"query_pre_attn_scalar": 16},
                "window": {"sliding_window": 4096},
                "window everywhere": {"layer_types": ["sliding_attention"] * 3},
                "other layers": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            },
        ),
        "gemma3": Case(
            config=transformers.Gemma3TextConfig(
                **SMALL | {"num_hidden_layers": 4},
                head_dim=16,
                sliding_window=6,
                sliding_window_pattern=3,
                query_pre_attn_scalar=20,
                rope_parameters=gemma3_rope(),
            ),
            wrong=gemma3_mistakes(4) | {"query scale": {"query_pre_attn_scalar": 16}},
        ),
        # What a GGUF file of this architecture can say: the usual pattern of six, and the scale of the head size.
        "gemma3_six": Case(
            config=transformers.Gemma3TextConfig(
                **SMALL
                | {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 6}
                | {"num_attention_heads": 2, "num_key_value_heads": 1},
                head_dim=16,
                sliding_window=6,
                query_pre_attn_scalar=16,
                rope_parameters=gemma3_rope(),
            ),
            wrong=gemma3_mistakes(6),
            gguf="gemma3",
        ),
        "mamba2": Case(
            config=mamba2(n_groups=2, use_bias=True, time_step_limit=(0.3, 1.2)),
            wrong={
                "shortest step": {"time_step_limit": (0.0, 1.2)},
                "longest step": {"time_step_limit": (0.3, math.inf)},
                "activation": {"hidden_act": "gelu"},
            },
        ),
        "mamba2_tied": Case(
            config=mamba2(n_groups=1, use_conv_bias=False, conv_kernel=3, tie_word_embeddings=True),
            wrong={"activation": {"hidden_act": "gelu"}},
        ),
        # What a GGUF file of this architecture can say: no bias of a projection, and steps of any length.
        "mamba2_groups": Case(
            config=mamba2(n_groups=4, conv_kernel=3), wrong={"activation": {"hidden_act": "gelu"}}, gguf="mamba2"
        ),
        "granitemoehybrid": Case(
            config=granite(num_local_experts=0, mamba_n_groups=2), wrong=GRANITE_MISTAKES, gguf="granitehybrid"
        ),
        # What a GGUF file of this architecture can say.
        "granitemoehybrid_shared": Case(
            config=granite(
                **{"intermediate_size": 16, "shared_intermediate_size": 20},
                num_local_experts=4,
                num_experts_per_tok=2,
                mamba_n_groups=4,
                tie_word_embeddings=True,
            ),
            wrong=GRANITE_MISTAKES | {"experts per token": {"num_experts_per_tok": 1}},
            gguf="granitehybrid",
        ),
        "granitemoehybrid_moe": Case(
            config=granite(
                **{"intermediate_size": 16, "shared_intermediate_size": 20},
                num_local_experts=4,
                num_experts_per_tok=2,
                mamba_n_groups=1,
                mamba_proj_bias=True,
                attention_bias=True,
                time_step_limit=(0.3, 1.2),
                position_embedding_type="rope",
                rope_parameters=plain_rope(1e3),
                tie_word_embeddings=True,
            ),
            wrong=GRANITE_MISTAKES
            | {
                "experts per token": {"num_experts_per_tok": 1},
                "no rope": {"position_embedding_type": None},
                "shortest step": {"time_step_limit": (0.0, 1.2)},
            },
        ),
        "qwen3_next": Case(
            config=qwen3_next(linear_value_head_dim=12, mlp_only_layers=[1]),
            wrong={
                "normalised weights": {"norm_topk_prob": False},
                "experts per token": {"num_experts_per_tok": 1},
                "partial rotary": {"rope_parameters": plain_rope(1e3, partial_rotary_factor=1.0)},
            },
        ),
        # What a GGUF file of this architecture can say: experts in every layer, and states that are square.
        "qwen3_next_square": Case(
            config=qwen3_next(linear_value_head_dim=8),
            wrong={"partial rotary": {"rope_parameters": plain_rope(1e3, partial_rotary_factor=1.0)}},
            gguf="qwen3next",
        ),
    }


def mamba2(**more: Any) -> PreTrainedConfig:
    """Eight heads of eight; their states are not square."""
    small = {key: value for key, value in SMALL.items() if key not in OF_ATTENTION}
    return transformers.Mamba2Config(**small, num_heads=8, head_dim=8, state_size=12, chunk_size=7, **more)


def granite(**more: Any) -> PreTrainedConfig:
    """One layer of attention between two with states."""
    return transformers.GraniteMoeHybridConfig(
        **SMALL
        | {"num_hidden_layers": 3, "shared_intermediate_size": 24}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
        | {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 12, "mamba_chunk_size": 7}
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.5, "logits_scaling": 2.0}
        | more
    )


def qwen3_next(**more: Any) -> PreTrainedConfig:
    """Three layers with a state, and one with attention."""
    return transformers.Qwen3NextConfig(
        **SMALL | {"num_hidden_layers": 4},
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=20,
        norm_topk_prob=True,
        rope_parameters=plain_rope(1e3, partial_rotary_factor=0.5),
        **more,
    )


def plain_rope(theta: float, **more: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def llama3_rope() -> dict[str, Any]:
    """Of the eight frequencies of a head of 16, some stay, some are divided by 8, and some lie between."""
    return {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


def longrope(frequencies: int, *, original: int, partial_rotary_factor: float = 1.0) -> dict[str, Any]:
    """The long list is for more than `original` tokens, the short list for fewer."""
    generator = np.random.default_rng(7)
    return {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "partial_rotary_factor": partial_rotary_factor,
        "original_max_position_embeddings": original,
        "short_factor": increasing(generator, frequencies, low=1.05, high=2.0),
        "long_factor": increasing(generator, frequencies, low=1.5, high=6.0),
    }


def increasing(generator: np.random.Generator, count: int, *, low: float, high: float) -> list[float]:
    return [round(value, 3) for value in sorted(generator.uniform(low, high, count).tolist())]


def yarn() -> dict[str, Any]:
    return {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}


def gemma3_rope(**linear: float) -> dict[str, Any]:
    return {
        "sliding_attention": plain_rope(100.0),
        "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0} | linear,
    }


def gemma3_mistakes(layers: int) -> dict[str, dict[str, Any]]:
    return {
        "window": {"sliding_window": 4096},
        "window everywhere": {"layer_types": ["sliding_attention"] * layers},
        "linear factor": {"rope_parameters": gemma3_rope(factor=1.0)},
        "local theta": {"rope_parameters": gemma3_rope() | {"sliding_attention": plain_rope(1000.0)}},
    }


# Weights and truth


def seeded_truth(name: str, case: Case) -> tuple[PreTrainedModel, dict[str, np.ndarray]]:
    """The first seed of this name that makes a good continuation."""
    for attempt in range(100):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {attempt}".encode()))
        model = build(case.config)
        fill(model, generator)
        arrays = truth(model, generator, case.new_tokens)
        if is_good(arrays, case.config.eos_token_id):
            return model, arrays
    raise AssertionError(f"{name}: no good continuation")


def is_good(arrays: dict[str, np.ndarray], eos_token_id: int) -> bool:
    """The continuation does not end, does not go round in a small circle, and leaves no step to rounding."""
    varied = min(len(set(row)) for row in arrays["greedy"].tolist()) >= min(8, arrays["greedy"].shape[1] // 2)
    return varied and eos_token_id not in arrays["greedy"] and arrays["greedy_margin"].min() > 5e-3


def build(config: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model.eval()


def fill(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights that spread the scores, the routes and the logits; no norm is plain and no bias is zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif name.endswith("A_log"):
                parameter.copy_(0.7 * noise - 1.5)  # states that last for some tokens
            elif parameter.ndim == 1:
                # without mixed signs before tied logits, every token would predict itself
                mixed_signs = model.config.tie_word_embeddings and name in LAST_NORMS
                factor = noise if mixed_signs else 1 + 0.3 * noise
                parameter.copy_(factor - 1 + neutral_norm(model.config, name))
            elif "embed" in name:
                parameter.copy_(0.4 * noise)
            else:
                gain = 2.5 if "lm_head" in name else 1.5
                parameter.copy_(gain / math.sqrt(parameter.shape[-1]) * noise)


def neutral_norm(config: PreTrainedConfig, name: str = "") -> float:
    """The weight of a norm that scales by one: gemma and most norms of qwen3_next store what is added to one."""
    adds_one = "gemma" in config.model_type or config.model_type == "qwen3_next"
    return 0.0 if adds_one and not name.endswith("linear_attn.norm.weight") else 1.0


def truth(model: PreTrainedModel, generator: torch.Generator, new_tokens: int) -> dict[str, np.ndarray]:
    input_ids = torch.randint(3, model.config.vocab_size, (2, PROMPT_TOKENS), generator=generator)
    padded_ids, mask = input_ids.clone(), torch.ones_like(input_ids)
    padded_ids[1, PADDING:] = input_ids[1, :-PADDING]
    padded_ids[1, :PADDING] = model.config.pad_token_id
    mask[1, :PADDING] = 0
    greedy, margin = greedy_continuation(model, input_ids, new_tokens)
    plain = logits(model, input_ids)
    if any(name.endswith("in_proj.bias") for name, _ in model.named_parameters()):
        # transformers 5.23 lets this bias of the padding into the convolution of the first real tokens
        padded = plain.clone()
        padded[1, PADDING:] = plain[1, :-PADDING]
    else:
        padded = logits(model, padded_ids, mask)
    arrays = {
        "input_ids": input_ids,
        "logits": plain,
        "greedy": greedy,
        "greedy_margin": margin,
        "padded_input_ids": padded_ids,
        "padded_mask": mask,
        "padded_logits": padded,
    }
    return {key: as_stored(value) for key, value in arrays.items()}


def logits(model: PreTrainedModel, input_ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of every token; a mask moves the positions so that they count real tokens only."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def greedy_continuation(
    model: PreTrainedModel, input_ids: torch.Tensor, new_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    margins = []
    for _ in range(new_tokens):
        best = logits(model, input_ids)[:, -1].topk(2)
        margins.append(best.values[:, 0] - best.values[:, 1])
        input_ids = torch.cat([input_ids, best.indices[:, :1]], dim=1)
    return input_ids[:, -new_tokens:], torch.stack(margins, dim=1)


def as_stored(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.float32 if tensor.is_floating_point() else np.int32)


# What is checked


def check_padding(arrays: dict[str, np.ndarray]) -> None:
    """The real tokens of the padded batch have the logits of the batch without padding."""
    expected = arrays["logits"].copy()
    expected[1, PADDING:] = arrays["logits"][1, :-PADDING]
    real = arrays["padded_mask"].astype(bool)
    assert difference(arrays["padded_logits"][real], expected[real]) < SAME


def check_everything_matters(case: Case, model: PreTrainedModel, arrays: dict[str, np.ndarray]) -> None:
    """Each mistake of the case, and each kind of small tensor set to nothing, moves the logits."""
    weights = model.state_dict()
    found = {}
    for mistake, changes in case.wrong.items():
        other = build(type(case.config)(**case.config.to_dict() | changes))
        other.load_state_dict(weights)
        found[mistake] = difference(run(other, arrays), arrays["logits"])
    for kind, (belongs, value) in small_tensors(neutral_norm(case.config)).items():
        if chosen := [name for name in weights if belongs(name)]:
            other = build(case.config)
            other.load_state_dict(weights | {name: torch.full_like(weights[name], value) for name in chosen})
            found[kind] = difference(run(other, arrays), arrays["logits"])
    print("  without it, the logits move by", ", ".join(f"{part} {moved:.2g}" for part, moved in found.items()))
    assert min(found.values()) > MATTERS, found


def small_tensors(neutral: float) -> dict[str, tuple[Callable[[str], bool], float]]:
    """Kinds of tensors that are easily forgotten: which names, and the value that does nothing."""
    return {
        "biases": (lambda name: name.endswith(".bias"), 0.0),
        "q/k norms": (lambda name: name.endswith(("q_norm.weight", "k_norm.weight")), neutral),
        "layer norms": (lambda name: name.endswith("layernorm.weight"), neutral),
        "last norm": (lambda name: name in LAST_NORMS or name.endswith("final_layernorm.weight"), neutral),
        "router": (lambda name: name.endswith(("mlp.gate.weight", "router.weight")), 0.0),
        "gated norms": (lambda name: name.endswith(("mixer.norm.weight", "a.norm.weight", "attn.norm.weight")), 1.0),
        "norms of mixers": (lambda name: bool(re.search(r"layers\.\d+\.norm\.weight", name)), neutral),
        "skips": (lambda name: name.endswith(".D"), 0.0),
        "decays": (lambda name: name.endswith(".A_log"), 0.0),
        "biases of time steps": (lambda name: name.endswith(".dt_bias"), 0.0),
        "gate of the shared expert": (lambda name: name.endswith("shared_expert_gate.weight"), 0.0),
    }


def check_reload(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """The folder read back is the model that made the truth."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    assert difference(run(model.eval(), arrays), arrays["logits"]) < SAME


def run(model: PreTrainedModel, arrays: dict[str, np.ndarray]) -> np.ndarray:
    return as_stored(logits(model, torch.from_numpy(arrays["input_ids"]).long()))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in standard deviations of the expected logits."""
    return float(np.abs(found - expected).max() / expected.std())


# GGUF


def check_gguf(name: str, config: PreTrainedConfig, arrays: dict[str, np.ndarray]) -> str:
    """How far transformers is from the truth when it reads the file: numbers, or why there are none.

    Given our configuration it reads the tensors alone, and must then agree. By the metadata alone it agrees on qwen2
    only: in 5.23 it passes over `rope_freqs` and the stacked experts of llama, the window and the factors of phi3, the
    key length of qwen3, the expert length of qwen3moe, the rotary scaling and the local base of gemma3; it does not
    know phi2, and has no place for the experts of mixtral.

    llama.cpp 0.5.0 on these files (CPU, a float32 cache) is within 2e-5 of the truth, phi2 and gemma3_six within 3e-3
    (its GELU is a float16 table), and phi3 on its first 7 tokens: it has switched the windows of this architecture off.

    transformers reads none of the files with states. llama.cpp (xllamacpp 2026.10.11549, a vocabulary added) computes
    from 1, 5, 12 and 24 tokens what is within 6e-6 of the truth for mamba2_groups, and with its float16 cache within
    2e-3 for both granitemoehybrid and 7e-4 for qwen3_next_square (llama3_tiny: 4e-3).
    """
    tensors_alone = read_gguf(name, arrays, config=config)
    with_metadata = read_gguf(name, arrays, pad_token_id=config.pad_token_id)
    assert isinstance(tensors_alone, str) or tensors_alone < SAME, tensors_alone
    return f"tensors alone {tensors_alone}, with the metadata {with_metadata}"


def read_gguf(name: str, arrays: dict[str, np.ndarray], **options: Any) -> float | str:
    """The difference of the logits, or the error."""
    try:
        model = AutoModelForCausalLM.from_pretrained(
            HERE, gguf_file=f"{name}.gguf", dtype=torch.float32, attn_implementation="eager", **options
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error)[:60]}"
    return round(difference(run(model.eval(), arrays), arrays["logits"]), 7)


def write_gguf(path: Path, arch: str, config: PreTrainedConfig, tensors: dict[str, np.ndarray]) -> None:
    """Every tensor in float32; no tokenizer, so the file states the size of the vocabulary."""
    writer = gguf.GGUFWriter(path, arch)
    add_metadata(writer, arch, config)
    for name, tensor in gguf_tensors(arch, config, tensors):
        writer.add_tensor(name, np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, arch: str, config: PreTrainedConfig) -> None:
    """The keys that llama.cpp's converter writes for the architecture."""
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_vocab_size(config.vocab_size)
    has_positions = arch not in ("mamba2", "granitehybrid")
    writer.add_context_length(config.max_position_embeddings if has_positions else 2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    if arch == "mamba2":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
        add_states(writer, config, heads=config.num_heads, head=config.head_dim, groups=config.n_groups)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if arch == "granitehybrid":
        attends = [kind == "full_attention" for kind in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads if one else 0 for one in attends])
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
    if arch == "phi2":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if (experts := getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)) is not None:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if arch in ("qwen3moe", "qwen3next"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch == "qwen3next":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(4)
    if arch == "granitehybrid":
        if experts:
            writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
        writer.add_rope_scaling_finetuned(False)
        own = {"heads": config.mamba_n_heads, "head": config.mamba_d_head, "groups": config.mamba_n_groups}
        add_states(writer, config, **own)
        return
    add_rope(writer, arch, config)
    if arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if arch == "phi3":
        # None is written as 0
        writer.add_sliding_window(config.sliding_window or 0)


def add_states(writer: gguf.GGUFWriter, config: PreTrainedConfig, *, heads: int, head: int, groups: int) -> None:
    writer.add_ssm_conv_kernel(getattr(config, "conv_kernel", None) or config.mamba_d_conv)
    writer.add_ssm_state_size(getattr(config, "state_size", None) or config.mamba_d_state)
    writer.add_ssm_inner_size(heads * head)
    writer.add_ssm_time_step_rank(heads)
    writer.add_ssm_group_count(groups)


def add_rope(writer: gguf.GGUFWriter, arch: str, config: PreTrainedConfig) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    if arch in ("llama", "phi2", "phi3", "qwen3next"):
        writer.add_rope_dimension_count(rotary_dimensions(config))
    if arch != "phi2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if arch == "gemma3":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if arch == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))


def rotary_dimensions(config: PreTrainedConfig) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def gguf_tensors(
    arch: str, config: PreTrainedConfig, tensors: dict[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the checkpoint under their GGUF names, then those that stand for rotary scaling."""
    arch_id = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(arch_id, config.num_hidden_layers)
    for name, tensor in with_halves(with_stacked_experts(tensors)).items():
        if arch in ("llama", "granitehybrid") and name.endswith("q_proj.weight"):
            tensor = neighbours_paired(tensor, config.num_attention_heads)
        if arch in ("llama", "granitehybrid") and name.endswith("k_proj.weight"):
            tensor = neighbours_paired(tensor, config.num_key_value_heads)
        if arch in ("gemma3", "qwen3next") and name.endswith("norm.weight") and ".linear_attn." not in name:
            tensor = tensor + 1
        if name.endswith(".A_log"):
            tensor = -np.exp(tensor)
        if name.endswith((".A_log", ".D")) and arch != "qwen3next":
            tensor = tensor[:, None]
        if name.endswith((".mixer.norm.weight", ".mamba.norm.weight")):
            tensor = tensor.reshape(getattr(config, "n_groups", None) or config.mamba_n_groups, -1)
        if ".conv1d." in name:
            tensor = tensor.squeeze()
        if name.endswith("in_proj_qkvz.weight"):
            number = name.split(".")[2]
            parts = heads_together(tensor, config)
            yield f"blk.{number}.attn_qkv.weight", np.concatenate(parts[:3])
            yield f"blk.{number}.attn_gate.weight", parts[3]
            continue
        name = name.replace(".dt_bias", ".dt_proj.bias")
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long.weight", np.array(rope["long_factor"])
        yield "rope_factors_short.weight", np.array(rope["short_factor"])
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", llama3_divisors(rope, config.head_dim)


def with_stacked_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`....experts.3.w1.weight` of every expert becomes one `....experts.w1.weight`, experts first."""
    stacked: dict[str, list[np.ndarray]] = {}
    for name in sorted(tensors):  # fewer than ten experts: their names sort as their numbers do
        stacked.setdefault(re.sub(r"(\.experts)\.\d+", r"\1", name), []).append(tensors[name])
    return {name: np.stack(parts) if ".experts." in name else parts[0] for name, parts in stacked.items()}


def with_halves(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Granite's gates and their factors apart, by the names of a model without experts or with them."""
    found: dict[str, np.ndarray] = {}
    has_experts = any(".block_sparse_moe." in name for name in tensors)
    for name, tensor in tensors.items():
        base, _, rest = name.partition(".shared_mlp.")
        mlp = f"{base}.mlp.shared_expert" if has_experts else f"{base}.mlp"
        halves = np.split(tensor, 2, axis=-2) if name.endswith("input_linear.weight") else []
        if ".block_sparse_moe.input_linear" in name:
            base = name.partition(".block_sparse_moe.")[0]
            found |= {
                f"{base}.mlp.experts.{part}_proj.weight": x for part, x in zip(("gate", "up"), halves, strict=True)
            }
        elif rest == "input_linear.weight":
            found |= {f"{mlp}.{part}_proj.weight": x for part, x in zip(("gate", "up"), halves, strict=True)}
        elif rest == "output_linear.weight":
            found[f"{mlp}.down_proj.weight"] = tensor
        else:
            found[name] = tensor
    return found


def heads_together(weight: np.ndarray, config: PreTrainedConfig) -> list[np.ndarray]:
    """Queries, keys, values and gates of all heads, of rows that are ordered by the key head."""
    keys, values = config.linear_key_head_dim, config.linear_value_head_dim
    values *= config.linear_num_value_heads // config.linear_num_key_heads
    by_head = weight.reshape(config.linear_num_key_heads, -1, weight.shape[-1])
    parts = np.split(by_head, np.cumsum([keys, keys, values]), axis=1)
    return [part.reshape(-1, weight.shape[-1]) for part in parts]


def neighbours_paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order in which rotary pairs are neighbours (0, n/2, 1, n/2 + 1, ...)."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """What each frequency is divided by: 1 where the wave is short, `factor` where it is long, a blend between."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (kept + (1 - kept) / rope["factor"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--saved"]:
        check_saved(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
