"""Weights in 8 and 4 bits: blocks of GGUF files kept as they are, and quantization while loading."""

import dataclasses
from pathlib import Path

import gguf
import gguf.quants
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from gguf.quants import dequantize
from runs import run

import jfa
from jfa import cpu, quant
from jfa_models import LLM, LanguageModel, SamplingParams, from_pretrained
from jfa_models.checkpoints import gguf_blocks
from jfa_models.checkpoints.load import Weights, load_params
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.cli import about
from jfa_models.decoding.language_model import abstract_decoder, named_leaves
from jfa_models.decoding.pretrained import weights_of

GOLDEN = Path(__file__).parents[2] / "golden"
ENDS = ("embed.weight", "lm_head.weight")
FLOATS_AT = {  # where a block has its float16 numbers: random bytes there could be NaN
    **{"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2]},
    **{"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]},
}


def random_blocks(encoding, rows, blocks):
    rng = np.random.default_rng(len(encoding) + rows)
    _, num_bytes, _ = gguf_blocks.LAYOUTS[encoding]
    raw = rng.integers(0, 256, (rows * blocks, num_bytes), dtype=np.uint8)
    for at in FLOATS_AT[encoding]:
        raw[:, at : at + 2] = rng.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("encoding", gguf_blocks.LAYOUTS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (5, 3)])
def test_blocks_keep_every_number(encoding, rows, blocks):
    raw = random_blocks(encoding, rows, blocks)
    held = gguf_blocks.read(encoding, raw.ravel(), rows)
    assert np.array_equal(quant.dequantize(held), dequantize(raw, gguf.GGMLQuantizationType[encoding]))
    held = jax.tree.map(jnp.asarray, held)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, held.shape[-1])), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(quant.dequantize(held), np.float64).T
    got = jfa.quantized_matmul(x, held)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def loaded(name, **options):
    checkpoint = open_checkpoint(GOLDEN / name)
    expected = named_leaves(abstract_decoder(checkpoint.config, jnp.float32))
    return load_params(checkpoint, expected, Weights(**options))


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic", "int4", "fp8"])
def test_weights_are_quantized_while_they_are_loaded(quantization):
    floats, held = loaded("llama3"), loaded("llama3", quantization=quantization)
    kinds = set()
    for name, x in held.items():
        if not isinstance(x, jfa.QuantizedArray):
            assert name.endswith(("norm.scale", "bias")) and np.array_equal(x, floats[name])
            continue
        kind, group = ("int8", None) if name in ENDS else (quantization.removesuffix("-dynamic"), None)
        if kind == "int4":
            group = next((size for size in (128, 64, 32) if x.shape[-1] % size == 0), None)
            kind = "int8" if group is None else kind
        want = quant.quantize_weight(np.asarray(floats[name]), kind, group_size=group, symmetric=False)
        assert x.kind == kind and x.shape == floats[name].shape
        assert all(map(np.array_equal, jax.tree.leaves(x), jax.tree.leaves(want)))
        assert x.rounds_inputs == (1 if quantization == "int8-dynamic" else 2 if kind == "int8" else 0)
        kinds.add(kind)
    assert quantization.removesuffix("-dynamic") in kinds


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A GGUF file of the Llama family whose weights are in blocks: norms stay floats, the embedding is Q8_0."""
    file = tmp_path_factory.mktemp("blocks") / "llama.gguf"
    reader, writer = gguf.GGUFReader(GOLDEN / "llama3_tiny.gguf"), gguf.GGUFWriter(file, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    kinds = [gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")]
    for i, tensor in enumerate(reader.tensors):
        data = np.array(tensor.data)
        if data.shape[-1] % 32 or data.ndim == 1:  # as llama.cpp does, floats where no block fits
            writer.add_tensor(tensor.name, data)
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if "token_embd" in tensor.name else kinds[i % len(kinds)]
        writer.add_tensor(tensor.name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return file


def test_stored_blocks_stay_and_q_and_k_are_in_our_order(blocks):
    floats, held = loaded(blocks), loaded(blocks, quantization="stored")
    for name, x in held.items():
        fits = name.endswith(".weight") and x.shape[-1] % 32 == 0
        assert isinstance(x, jfa.QuantizedArray) == fits, name
        if isinstance(x, jfa.QuantizedArray):
            assert np.array_equal(quant.dequantize(x), floats[name]), name
        else:
            assert np.array_equal(x, floats[name]), name
    assert isinstance(held["layers.0.attention.q.weight"], jfa.QuantizedArray)
    assert {x.kind for x in held.values() if isinstance(x, jfa.QuantizedArray)} == {"int8", "int4"}
    model = from_pretrained(blocks, quantization="stored")
    want = from_pretrained(blocks, dtype="float32").logits([[5, 6, 7]])
    assert float(jnp.abs(model.logits([[5, 6, 7]]) - want).max()) < 2e-3 * float(want.max() - want.min())


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        *(run(name, "int8", quick=True) for name in ("llama3", "mixtral", "phi2", "gemma3", "qwen2")),
        *(run(name, "int4", quick=name == "mixtral", soak=True) for name in ("llama3", "mixtral", "phi2", "gemma3")),
        *(run(name, "fp8", quick=name == "llama3", soak=True) for name in ("llama3", "mixtral", "phi2", "gemma3")),
    ],
)
def test_families_compute_with_the_weights_that_they_hold(name, quantization):
    """The logits are those of a float model with the dequantized weights."""
    model = from_pretrained(GOLDEN / name, dtype="float32", quantization=quantization)
    held = model.params
    tokens = np.arange(8)[None] + 3
    got = model.logits(tokens)
    model.params = tuple(quant.dequantize(x) if isinstance(x, jfa.QuantizedArray) else x for x in held)
    assert any(isinstance(x, jfa.QuantizedArray) for x in held)
    want = model.logits(tokens)
    spread = float(want.max() - want.min())
    assert float(jnp.abs(got - want).max()) < 2e-3 * spread  # inputs have 16 bits


def test_a_stored_form_that_cannot_stay_is_named():
    with pytest.warns(UserWarning, match=r"\d+ quantized weights, such as .*qweight, are held as floats"):
        held = loaded("quantized/gptq_act_order", quantization="stored")
    assert not any(isinstance(x, jfa.QuantizedArray) for x in held.values())


def test_a_router_stays_in_floats():
    held = loaded("mixtral", quantization="int8")
    routers = [x for name, x in held.items() if "router" in name]
    assert routers and not any(isinstance(x, jfa.QuantizedArray) for x in routers)
    assert any(isinstance(x, jfa.QuantizedArray) and x.values.ndim == 3 for x in held.values())


def test_bytes_held_are_those_announced():
    checkpoint = open_checkpoint(GOLDEN / "llama3")
    expected = named_leaves(abstract_decoder(checkpoint.config, jnp.float32))
    for quantization in (None, "int8", "int4", "fp8"):
        weights = Weights(quantization=quantization)
        held = sum(x.nbytes for x in jax.tree.leaves(load_params(checkpoint, expected, weights)))
        assert held == weights.num_bytes(expected, checkpoint.tensors)


def test_float_weights_of_another_dtype():
    held = loaded("llama3", dtype="bfloat16")
    assert held["embed.weight"].dtype == jnp.bfloat16 and held["norm.scale"].dtype == jnp.float32
    model = from_pretrained(GOLDEN / "llama3", dtype="float32")
    want = model.logits([[5, 6, 7]])
    model.params = tuple(held.values())
    got = model.logits([[5, 6, 7]])
    assert got.dtype == want.dtype and float(jnp.abs(got - want).max()) < 0.05 * float(want.max() - want.min())


def test_random_weights_are_quantized_too():
    model = LanguageModel.random(open_checkpoint(GOLDEN / "mixtral").config, dtype="float32", quantization="int4")
    assert sum(isinstance(x, jfa.QuantizedArray) for x in model.params) > 5
    assert model.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=3))[0].outputs[0].token_ids
    assert model.dtype == jnp.float32


def test_the_fastest_form_is_chosen_on_a_cpu(monkeypatch, blocks):
    times = {"float32": (1.0, 4.0), "bfloat16": (1.04, 1.5), "int8": (0.7, 0.8)}
    monkeypatch.delenv("JFA_CPU_WEIGHTS")
    monkeypatch.setattr(cpu, "milliseconds", times.__getitem__)
    floats, blocks = open_checkpoint(GOLDEN / "llama3"), open_checkpoint(blocks)
    in_bfloat16 = dataclasses.replace(floats, stored_dtype="bfloat16")
    assert blocks.is_quantized and not floats.is_quantized
    assert weights_of(blocks, None, None) == Weights(quantization="int8")
    assert weights_of(in_bfloat16, None, None) == Weights(dtype="bfloat16")
    assert weights_of(in_bfloat16, None, "float32") == Weights()
    assert weights_of(in_bfloat16, "none", None) == Weights()
    assert weights_of(blocks, "int4", "float32") == Weights(quantization="int4")
    times |= {"bfloat16": (1.2, 1.5), "int8": (1.2, 0.8)}
    assert weights_of(in_bfloat16, None, None) == Weights(dtype="float32")
    assert weights_of(blocks, None, None).quantization is None


def test_measured_times_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(cpu, "_measured", lambda form: measured.append(form) or (1.5, 2.5))
    for _ in range(2):
        cpu.milliseconds.cache_clear()
        assert cpu.milliseconds("int8") == (1.5, 2.5)
    assert measured == ["int8"]
    for count, damaged in enumerate(("[]", "{bad", "null", '{"a": 1}'), 2):
        (tmp_path / "jfa" / "products.json").write_text(damaged)
        for _ in range(2):  # measured once, and the file is mended
            cpu.milliseconds.cache_clear()
            assert cpu.milliseconds("int8") == (1.5, 2.5) and measured == ["int8"] * count
    cpu.milliseconds.cache_clear()


def test_measuring_takes_every_form(monkeypatch):
    monkeypatch.setattr(cpu, "_SIZE", 32)
    for form in cpu.FORMS:
        assert all(time > 0 for time in cpu._measured(form))


def test_info_shows_the_size_of_a_preset_in_another_form(capsys, monkeypatch):
    monkeypatch.setattr(cpu, "milliseconds", lambda form: (1.0, 2.0))
    about.show("llama-3-8b", None, "int4")
    assert "4,706 MB in memory, weights as int4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "number"),
    [*((kind, number) for kind in quant.KINDS for number in (np.nan, np.inf, -np.inf)), ("int4", 3.4e38)],
)
def test_weights_that_have_no_scale_are_refused(kind, number):
    weight = np.array([[number, -3.4e38, 2, 3]], np.float32)
    with pytest.raises(ValueError, match="a weight with NaN, infinity or numbers near the largest float32 cannot"):
        quant.quantize_weight(weight, kind, group_size=4, symmetric=False)


def test_a_symbolic_number_of_rows():
    rows = jax.export.symbolic_shape("n, 64")
    for kind, group in (("int8", None), ("int4", 32)):
        held = quant.quantize_weight(np.eye(8, 64, dtype=np.float32), kind, group_size=group)
        held = jax.tree.map(jnp.asarray, dataclasses.replace(held, rounds_inputs=2))
        exported = jax.export.export(jax.jit(jfa.quantized_matmul))(jax.ShapeDtypeStruct(rows, jnp.float32), held)
        assert exported.out_avals[0].shape[1] == 8


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match=r"quantization must be None or one of int8, .*, got 'int3'"):
        from_pretrained(GOLDEN / "llama3", quantization="int3")
    with pytest.raises(ValueError, match="quantization='stored' keeps a checkpoint's blocks, but random weights have"):
        LanguageModel.random("smollm2-135m", quantization="stored")
    with pytest.raises(ValueError, match="quantization='int8' has no effect: the model is already loaded"):
        LLM(from_pretrained(GOLDEN / "llama3", dtype="float32"), quantization="int8")
    monkeypatch.setenv("JFA_CPU_WEIGHTS", "int5")
    with pytest.raises(ValueError, match="JFA_CPU_WEIGHTS must be one of float32, bfloat16, int8, got 'int5'"):
        cpu.fastest(("float32",))
