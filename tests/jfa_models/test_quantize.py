"""jfa_models.quantize: scaling changes no output, protects large inputs, and what is saved is what was computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import byte_tokenizer, tiny_config

import jfa
from jfa import quant
from jfa_models import LanguageModel, from_pretrained
from jfa_models import quantize as module
from jfa_models.cli import commands
from jfa_models.cli.base import run
from jfa_models.decoding.language_model import named_leaves
from jfa_models.model.config import ExpertsConfig
from jfa_models.model.decoder import Decoder
from jfa_models.quantize import common_group, quantize

TEXT = "A text like those that the model will read, long enough for a row of tokens. " * 12
TOKENS = np.frombuffer(TEXT[:48].encode(), np.uint8)[None].astype(np.int32)
VARIANTS = {
    "llama": {},
    "gemma": dict(norm="rms_plus_one", post_norms=True),
    "phi2": dict(norm="layer", parallel_block=True, gated_mlp=False, mlp_bias=True, qkv_bias=True, out_bias=True),
    "biased": dict(qkv_bias=True, mlp_bias=True),
    "mixtral": dict(experts=ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=32)),
}


def model_of(outliers=1.0, **options):
    """A tiny model; outliers: how much larger a few channels of the normalized inputs are."""
    config = dataclasses.replace(tiny_config(num_layers=2, context_length=64), intermediate_size=64, **options)
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(1))
    params = dict(zip(named_leaves(decoder), jax.tree.leaves(nnx.split(decoder)[1]), strict=True))
    for name, x in params.items():
        if name.endswith("_norm.scale") and name.startswith("layers"):
            params[name] = x.at[:3].set(outliers if config.norm != "rms_plus_one" else outliers - 1)
    return LanguageModel(decoder=decoder, params=tuple(params.values()), tokenizer=byte_tokenizer())


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_change_no_output(monkeypatch, variant):
    model = model_of(20.0, **VARIANTS[variant])
    before = model.params
    want = model.logits(TOKENS)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        module, "_best_scales", lambda x, weights, rounded: jnp.asarray(rng.uniform(0.25, 4, x.shape[1]), jnp.float32)
    )
    params = module._scaled(model, dict(zip(model.names, before, strict=True)), TEXT, lambda x: x)
    assert any(not np.array_equal(x, y) for x, y in zip(params.values(), before, strict=True))
    model.params = tuple(params.values())
    got = model.logits(TOKENS)
    assert float(jnp.abs(got - want).max()) < 1e-4 * float(want.max() - want.min())


def test_calibration_protects_the_weights_of_large_inputs():
    model = model_of(5.0)
    want = model.logits(TOKENS)
    errors = [
        float(jnp.square(quantize(model, "int4", group_size=32, calibration=text).logits(TOKENS) - want).mean())
        for text in (None, TEXT)
    ]
    assert errors[1] < 0.8 * errors[0]


def test_the_result_does_not_change_from_run_to_run():
    model = model_of(30.0)
    one, other = (quantize(model, "int4", group_size=32, calibration=TEXT) for _ in range(2))
    assert all(map(np.array_equal, jax.tree.leaves(one.params), jax.tree.leaves(other.params)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_linear_layers_are_quantized_and_nothing_else(kind, variant):
    model = model_of(**VARIANTS[variant])
    group = common_group(model) if kind == "int4" else None
    held = quantize(model, kind, group_size=group)
    for name, old, new in zip(model.names, model.params, held.params, strict=True):
        is_layer = name.startswith("layers") and name.endswith(".weight") and "router" not in name
        assert isinstance(new, jfa.QuantizedArray) == is_layer
        if is_layer:
            want = quant.quantize_weight(np.asarray(old), kind, group_size=group, symmetric=False)
            assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(want)))
        else:
            assert np.array_equal(new, old)
    want, got = model.logits(TOKENS), held.logits(TOKENS)
    assert float(jnp.abs(got - want).max()) < 0.35 * float(want.max() - want.min())


def test_the_command_writes_what_is_read_back(tmp_path, capsys):
    model_of(20.0).save_pretrained(tmp_path / "floats")
    (tmp_path / "text").write_text(TEXT)
    out = tmp_path / "out"
    args = ["quantize", str(tmp_path / "floats"), str(out), "--awq", str(tmp_path / "text"), "--dtype", "float32"]

    def called(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["jfa", *args])
            return run(commands, "jfa")

    assert called(*args) == 0 and "int4 with a scale for each 32 inputs" in capsys.readouterr().err
    model = from_pretrained(tmp_path / "floats", dtype="float32")
    want = quantize(model, "int4", group_size=32, calibration=TEXT)
    got = from_pretrained(out, dtype="float32", quantization="stored")
    for one, other in zip(got.params, want.params, strict=True):
        assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    assert called(*args) == 2 and "is not empty; use another folder" in capsys.readouterr().err
    twice = ["quantize", str(out), str(tmp_path / "twice"), "--kind", "int8"]
    assert called(*twice) == 0 and "is quantized already: its numbers are rounded a second" in capsys.readouterr().err
    assert called(*twice[:2], str(tmp_path / "x"), *twice[3:], "--symmetric") == 2
    assert "--symmetric needs --kind int4: int8 has no zero points" in capsys.readouterr().err


def test_bad_input():
    model = model_of()
    with pytest.raises(ValueError, match=r"group size 24 does not divide \d+, the inputs of layers.0"):
        quantize(model, "int4", group_size=24)
    with pytest.raises(ValueError, match="quantized already: load it with quantization='none'"):
        quantize(quantize(model, "int8"), "int8")
    with pytest.raises(ValueError, match=r"the calibration text has \d tokens, but at least 64 are needed"):
        quantize(model, "int8", calibration="short")
    model.tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer, which a calibration text needs"):
        quantize(model, "int8", calibration=TEXT)
    with pytest.raises(ValueError, match="kind must be one of int8, fp8, int4, got 'int2'"):
        quantize(model, "int2")
