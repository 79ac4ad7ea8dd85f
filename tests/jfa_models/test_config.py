"""Both spellings of a configuration, and a sentence for everything that is refused."""

import dataclasses
import math

import numpy as np
import pytest

from jfa_models.config import (
    DecoderConfig,
    GenerationDefaults,
    LinearScaling,
    ListedScaling,
    Llama3Scaling,
    RopeConfig,
    read_json,
)

HF = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
GGUF = {
    "general.architecture": "llama",
    "llama.vocab_size": 256,
    "llama.embedding_length": 96,
    "llama.feed_forward_length": 192,
    "llama.block_count": 3,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 500_000.0,
    "llama.rope.dimension_count": 16,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALED = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64)
CONFIG = DecoderConfig(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=192,
    num_layers=3,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=16,
    context_length=512,
    norm_eps=1e-5,
    rope=RopeConfig(theta=500_000.0),
)
TENSORS = ("token_embd.weight", "output.weight")


def test_hugging_face_and_gguf_say_the_same():
    assert DecoderConfig.from_hf(HF) == CONFIG
    assert DecoderConfig.from_gguf(GGUF, TENSORS) == CONFIG


ROPE_SPELLINGS = {  # name: (keys of config.json, scaling)
    "older_without_scaling": ({"rope_theta": 500_000.0, "rope_scaling": None}, None),
    "older_llama3": ({"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}, SCALED),
    "oldest_key_of_the_type": (
        {"rope_theta": 500_000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        LinearScaling(factor=4.0),
    ),
    "newer_default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}, None),
    "newer_llama3": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}}, SCALED),
}


@pytest.mark.parametrize("name", ROPE_SPELLINGS)
def test_each_spelling_of_rope_is_read(name):
    keys, scaling = ROPE_SPELLINGS[name]
    config = {key: value for key, value in HF.items() if key != "rope_theta"} | keys
    assert DecoderConfig.from_hf(config).rope == RopeConfig(theta=500_000.0, scaling=scaling)


def test_what_older_checkpoints_leave_out_has_the_meaning_it_had():
    unstated = {"num_key_value_heads": None, "rope_theta": None, "head_dim": None}
    config = DecoderConfig.from_hf(HF | unstated)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (6, 16, 10_000.0)
    assert not (config.tie_word_embeddings or config.attention_bias or config.mlp_bias)


def test_gguf_facts_that_only_the_tensors_tell():
    config = DecoderConfig.from_gguf(GGUF, ["blk.0.attn_q.bias", "blk.0.ffn_gate.bias"], rope_divisors=(1.0,) * 8)
    assert config.tie_word_embeddings and config.attention_bias and config.mlp_bias
    assert config.rope.scaling == ListedScaling(values=(1.0,) * 8)


def test_gguf_without_vocab_size_counts_the_tokens():
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    assert DecoderConfig.from_gguf(metadata | {"tokenizer.ggml.tokens": ["a"] * 7}, TENSORS).vocab_size == 7


GGUF_ROPE = {  # name: (metadata, divisors of the file, scaling)
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        None,
        LinearScaling(factor=4.0),
    ),
    "linear_in_old_files": ({"llama.rope.scale_linear": 2.0}, None, LinearScaling(factor=2.0)),
    "none_wins_over_a_factor": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None, None),
    "listed_and_linear": ({"llama.rope.scale_linear": 2.0}, (1.0,) * 8, ListedScaling(values=(2.0,) * 8)),
}


@pytest.mark.parametrize("name", GGUF_ROPE)
def test_gguf_rope_scaling(name):
    metadata, divisors, scaling = GGUF_ROPE[name]
    assert DecoderConfig.from_gguf(GGUF | metadata, TENSORS, divisors).rope.scaling == scaling


def test_llama3_scaling_is_the_published_rule():
    def published(frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4.0:
            return frequency
        if wavelength > 64 / 1.0:
            return frequency / 8.0
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * frequency / 8.0 + smooth * frequency

    plain = [500_000.0 ** -(2 * i / 64) for i in range(32)]
    got = RopeConfig(theta=500_000.0, scaling=SCALED).inverse_frequencies(64)
    np.testing.assert_allclose(got, [published(f) for f in plain], rtol=2e-7)
    assert got.dtype == np.float32


def test_linear_and_listed_scaling_divide():
    plain = RopeConfig(theta=1e4).inverse_frequencies(8)
    assert np.array_equal(RopeConfig(theta=1e4, scaling=LinearScaling(factor=2)).inverse_frequencies(8), plain / 2)
    listed = RopeConfig(theta=1e4, scaling=ListedScaling(values=(1.0, 2.0, 4.0, 8.0)))
    assert np.array_equal(listed.inverse_frequencies(8), plain / np.float32([1, 2, 4, 8]))


def test_a_config_is_hashable():
    assert len({CONFIG, DecoderConfig.from_hf(HF)}) == 1


REFUSED_FIELDS = {  # name: (changed fields, message)
    "zero": ({"num_layers": 0}, "num_layers must be a whole number of at least 1, got 0"),
    "text": ({"hidden_size": "96"}, "hidden_size must be a whole number of at least 1, got '96'"),
    "flag": ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    "heads": ({"num_kv_heads": 4}, "num_q_heads must be a multiple of num_kv_heads, got 6 and 4"),
    "odd_head": ({"head_dim": 15}, "head_dim must be even, because rope turns pairs of numbers, got 15"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be one of silu, got 'gelu'"),
    "eps": ({"norm_eps": 0.0}, "norm_eps must be a finite number > 0, got 0.0"),
    "divisors": (
        {"rope": RopeConfig(theta=1e4, scaling=ListedScaling(values=(1.0,)))},
        r"rope scaling must list head_dim / 2 = 8 divisors, got 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_impossible_numbers_are_refused(name):
    changed, message = REFUSED_FIELDS[name]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


def test_impossible_rope_numbers_are_refused():
    with pytest.raises(ValueError, match="rope: theta must be a finite number > 0, got -1"):
        RopeConfig(theta=-1.0)
    with pytest.raises(ValueError, match="rope scaling: factor must be a finite number > 0, got 'x'"):
        DecoderConfig.from_hf(HF | {"rope_scaling": {"type": "linear", "factor": "x"}})
    with pytest.raises(ValueError, match=r"high_freq_factor must be larger than low_freq_factor, got 1.0 and 4.0"):
        dataclasses.replace(SCALED, low_freq_factor=4.0, high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"smallest_divisor must be a finite number > 0, got 0.0"):
        ListedScaling(values=(1.0, 0.0))


REFUSED_HF = {  # name: (changed keys, message)
    "architecture": (
        {"model_type": "mistral"},
        r"model_type 'mistral' is not supported; supported architectures: llama \(Llama 2, Llama 3, SmolLM2\)",
    ),
    "no_architecture": ({"model_type": None}, "model_type None is not supported; supported architectures: llama"),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config is not supported; use the unquantized checkpoint or a GGUF file",
    ),
    "missing": (
        {"vocab_size": None, "rms_norm_eps": None},
        "config.json lacks vocab_size, rms_norm_eps; take the file that belongs to these weights",
    ),
    "rope_type": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        "rope type must be default, linear or llama3, got 'yarn'",
    ),
    "rope_keys": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "rope scaling lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "rope_text": ({"rope_scaling": "linear"}, "the parameters of rope must be an object, got 'linear'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1, got 0.5; rotating a part"),
    "head_dim": (
        {"hidden_size": 100},
        "the hidden size must be a multiple of the number of heads, got 100 and 6; a model of another shape must state",
    ),
    "no_heads": ({"num_attention_heads": 0}, "num_q_heads must be a finite number > 0, got 0"),
}


@pytest.mark.parametrize("name", REFUSED_HF)
def test_a_config_json_that_is_not_supported_is_refused(name):
    changed, message = REFUSED_HF[name]
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_hf(HF | changed)


REFUSED_GGUF = {  # name: (changed keys, message)
    "architecture": ({"general.architecture": "gemma3"}, "general.architecture 'gemma3' is not supported; supported"),
    "missing": ({"llama.block_count": None}, "GGUF metadata lacks llama.block_count"),
    "partial": (
        {"llama.rope.dimension_count": 8},
        r"llama.rope.dimension_count must be head_dim \(16\), got 8; rotating a part of a head is not supported",
    ),
    "rope_type": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type must be none or linear, got 'yarn'"),
}


@pytest.mark.parametrize("name", REFUSED_GGUF)
def test_gguf_metadata_that_is_not_supported_is_refused(name):
    changed, message = REFUSED_GGUF[name]
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_gguf(GGUF | changed, TENSORS)


GENERATION = {  # name: (generation_config.json, config.json, defaults)
    "nothing": ({}, {}, GenerationDefaults()),
    "null_eos": ({"eos_token_id": None}, {"eos_token_id": None}, GenerationDefaults()),
    "one_eos": ({"eos_token_id": 2}, {"eos_token_id": 3}, GenerationDefaults(eos_token_ids=(2,))),
    "many_eos": ({"eos_token_id": [128001, 128009]}, {}, GenerationDefaults(eos_token_ids=(128001, 128009))),
    "eos_of_config": ({}, {"eos_token_id": 3}, GenerationDefaults(eos_token_ids=(3,))),
    "sampling": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1},
        {},
        GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.1),
    ),
    "greedy": ({"do_sample": False, "temperature": 0.6}, {}, GenerationDefaults(temperature=0.0)),
    "top_k_off": ({"temperature": 0.6, "top_k": 0}, {}, GenerationDefaults(temperature=0.6)),
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation_defaults_of_a_folder(name):
    generation, config, defaults = GENERATION[name]
    assert GenerationDefaults.from_hf(generation, config) == defaults


def test_generation_defaults_of_a_gguf_file():
    metadata = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    assert GenerationDefaults.from_gguf(metadata) == GenerationDefaults(eos_token_ids=(2, 5))


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], -1, True])
def test_an_eos_that_is_no_token_id_is_refused(eos):
    with pytest.raises(ValueError, match="eos_token_id must be a token id or a list of them, got"):
        GenerationDefaults.from_hf({"eos_token_id": eos}, {})


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe"])
def test_broken_json_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON \(.*\); download it again"):
        read_json(path)


def test_json_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, got a list"):
        read_json(path)
