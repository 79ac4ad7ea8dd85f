"""The configuration of a decoder, and an error message for each invalid field."""

import dataclasses

import pytest

from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.presets import preset
from jfa_models.model.config import DecoderConfig, ExpertsConfig, GatedDeltaConfig, Mamba2Config
from jfa_models.model.rope import ListedScaling, RopeConfig
from jfa_models.text.files import read_json

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


def test_a_config_is_hashable():
    assert len({CONFIG, dataclasses.replace(CONFIG)}) == 1


REFUSED_FIELDS = {  # name: (changed fields, message)
    "zero": ({"num_layers": 0}, "num_layers must be an integer >= 1, got 0"),
    "text": ({"hidden_size": "96"}, "hidden_size must be an integer >= 1, got '96'"),
    "flag": ({"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
    "heads": ({"num_kv_heads": 4}, "num_q_heads must be a multiple of num_kv_heads, got 6 and 4"),
    "odd_head": ({"head_dim": 15}, "head_dim must be even, because rope rotates pairs of elements, got 15"),
    "activation": ({"hidden_act": "tanh"}, "hidden_act must be one of silu, gelu, gelu_tanh, relu, got 'tanh'"),
    "norm": ({"norm": "batch"}, "norm must be one of rms, rms_plus_one, layer, got 'batch'"),
    "cap": ({"logits_soft_cap": -1.0}, "logits_soft_cap must be a finite number > 0, got -1.0"),
    "windows": ({"windows": (4, 4)}, "windows must have one entry per layer, 3, got 2"),
    "window": (
        {"windows": (4, None, 0)},
        r"a window must be an integer >= 1, or None, got \(4, None, 0\)",
    ),
    "eps": ({"norm_eps": 0.0}, "norm_eps must be a finite number > 0, got 0.0"),
    "divisors": (
        {"rope": RopeConfig(theta=1e4, scaling=ListedScaling(values=(1.0,)))},
        "rope scaling must list a divisor for each of 8 pairs, got 1",
    ),
}

MAMBA2 = Mamba2Config(num_heads=6, head_dim=8, state_size=4, num_groups=2)
DELTA = GatedDeltaConfig(num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=6)
REFUSED_FIELDS |= {
    "no_attention": ({"head_dim": 0}, "head_dim must be an integer >= 1 in a decoder with attention, got 0"),
    "multiplier": ({"residual_multiplier": 0.0}, "residual_multiplier must be a finite number > 0, got 0.0"),
    "mixers": ({"mixers": ("attention",)}, "mixers must have one entry per layer, 3, got 1"),
    "mixer": ({"mixers": ("rwkv",) * 3}, "a mixer must be one of attention, mamba2, gated_delta, got rwkv"),
    "mixer_of_nothing": ({"mixers": ("mamba2",) * 3}, "mixers has mamba2, so mamba2 must be its configuration"),
    "two_states": ({"mamba2": MAMBA2, "gated_delta": DELTA}, "a decoder has layers of mamba2 or of gated_delta, got"),
}
REFUSED_STATES = {  # name: (configuration, changed fields, message)
    "groups": (MAMBA2, {"num_groups": 4}, "num_heads must be a multiple of num_groups, got 6 and 4"),
    "limit": (MAMBA2, {"time_step_limit": (2.0, 1.0)}, r"must be two numbers, 0 <= low <= high, got \(2.0, 1.0\)"),
    "width": (MAMBA2, {"conv_width": 1}, "conv_width must be at least 2, got 1"),
    "width_of_delta": (DELTA, {"conv_width": 1}, "conv_width must be at least 2, got 1"),
    "key_heads": (DELTA, {"num_key_heads": 3}, "num_value_heads must be a multiple of num_key_heads, got 4 and 3"),
}


@pytest.mark.parametrize("name", REFUSED_STATES)
def test_invalid_fields_of_mixers_are_refused(name):
    config, changed, message = REFUSED_STATES[name]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changed)


def test_layers_with_attention_and_with_states_are_numbered_by_themselves():
    mixers = ("mamba2", "attention", "mamba2")
    config = dataclasses.replace(CONFIG, mixers=mixers, mamba2=MAMBA2, windows=(None, 4, None))
    assert (config.attention_layers, config.state_layers) == ((1,), (0, 2))
    assert config.patterns == (4,) and config.cache_elements(9) == 2 * 4 * 2 * 16
    assert config.states == MAMBA2 and CONFIG.states is None
    first = config.with_layers(1)
    assert (first.mixers, first.attention_layers, first.patterns) == (("mamba2",), (), ())


def test_the_first_layers_of_a_decoder():
    config = dataclasses.replace(CONFIG, windows=(4, None, 4)).with_layers(2)
    assert (config.num_layers, config.windows) == (2, (4, None))
    with pytest.raises(ValueError, match="num_layers must be 1 to 3, the model's own, got 4"):
        CONFIG.with_layers(4)


# Numbers of parameters that the authors publish, in billions.
PUBLISHED = {
    "llama-2-7b": 6.738,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "llama-3.2-1b": 1.236,
    "mistral-7b": 7.242,
    "mixtral-8x7b": 46.703,
    "phi-1.5": 1.418,
    "phi-2": 2.780,
    "phi-3-mini": 3.821,
    "phi-4": 14.660,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-8b": 8.191,
    "qwen3-30b-a3b": 30.532,
    "gemma-2b": 2.506,
    "gemma-2-9b": 9.242,
    "gemma-3-270m": 0.268,
    "gemma-3-27b": 27.009,
    "mamba-codestral-7b": 7.285,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name):
    assert round(preset(name).num_params / 1e9, 3) == PUBLISHED[name]


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="there is no preset 'gpt-5'; the presets are llama-2-7b, llama-3-8b, "):
        preset("gpt-5")


def test_more_experts_per_token_than_experts_are_refused():
    with pytest.raises(ValueError, match="experts_per_token must be at most num_experts, got 3 and 2"):
        ExpertsConfig(num_experts=2, experts_per_token=3, intermediate_size=8)


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_invalid_fields_are_refused(name):
    changed, message = REFUSED_FIELDS[name]
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changed)


GENERATION = {  # name: (generation_config.json, config.json, defaults)
    "nothing": ({}, {}, GenerationDefaults()),
    "null_eos": ({"eos_token_id": None}, {"eos_token_id": None}, GenerationDefaults()),
    "both_eos": ({"eos_token_id": 2}, {"eos_token_id": [3, 2]}, GenerationDefaults(eos_token_ids=(2, 3))),
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


@pytest.mark.parametrize("eos", ["</s>", [1, "</s>"], -2, True])
def test_an_eos_that_is_not_a_token_id_is_refused(eos):
    with pytest.raises(ValueError, match="eos_token_id must be a token id or a list of them, got"):
        GenerationDefaults.from_hf({"eos_token_id": eos}, {})


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe"])
def test_broken_json_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON \(.*\); download it again"):
        read_json(path)


def test_json_that_is_not_an_object_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config.json must hold a JSON object, got a list"):
        read_json(path)
