"""GGUF files of models whose layers have states: older forms, quantized weights, parts of weights, bad metadata."""

import gguf
import numpy as np
import pytest
from golden import GOLDEN

from jfa import QuantizedArray, quant
from jfa_models.checkpoints.gguf_config import config_from_gguf
from jfa_models.checkpoints.load import Weights, load_params
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.checkpoints.tensors import part_of
from jfa_models.decoding.language_model import abstract_decoder, named_leaves

SQUARE = GOLDEN / "qwen3_next_square.gguf"
JOINED = "layers.0.mixer.in_proj_qkvz.weight"


def rewritten(path, to, change):
    """A copy of a GGUF file; change(name, array) yields pairs of a name, and an array or (type, array to quantize)."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(to, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        for name, kind, array in change(tensor.name, np.array(tensor.data)):
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def params_of(path, quantization=None):
    checkpoint = open_checkpoint(path)
    expected = named_leaves(abstract_decoder(checkpoint.config, np.float32))
    return load_params(checkpoint, expected, Weights(quantization=quantization))


def test_an_older_file_has_all_rows_of_a_key_head_together(tmp_path):
    rows = params_of(GOLDEN / "qwen3_next_square")

    def older(name, array):
        if name.endswith("attn_gate.weight"):
            return
        if name.endswith("attn_qkv.weight") and f"layers.{name.split('.')[1]}.mixer.in_proj_qkvz.weight" in rows:
            name, array = name.replace("attn_qkv", "ssm_in"), rows[JOINED.replace("0", name.split(".")[1])]
        yield name, gguf.GGMLQuantizationType.F32, np.asarray(array)

    found = params_of(rewritten(SQUARE, tmp_path / "older.gguf", older))
    assert found.keys() == rows.keys()
    for name, want in rows.items():
        assert np.allclose(found[name], want, rtol=1e-6), name


@pytest.fixture
def in_8_bits(tmp_path):
    def quantized(name, array):
        is_large = array.ndim > 1 and array.shape[-1] % 32 == 0 and "ffn_gate_inp" not in name
        yield name, gguf.GGMLQuantizationType["Q8_0" if is_large else "F32"], array

    return rewritten(SQUARE, tmp_path / "q8.gguf", quantized)


def test_joined_rows_stay_quantized(in_8_bits):
    exact, held = params_of(SQUARE)[JOINED], params_of(in_8_bits, "stored")[JOINED]
    assert isinstance(held, QuantizedArray) and held.shape == exact.shape and held.group_size == 32
    assert np.array_equal(quant.dequantize(held), params_of(in_8_bits)[JOINED])
    assert 0 < np.abs(np.asarray(quant.dequantize(held)) - exact).max() < 0.01 * np.abs(exact).max()


def test_joined_rows_of_different_kinds_become_floats(tmp_path):
    def mixed(name, array):
        kind = {"attn_qkv.weight": "Q8_0", "attn_gate.weight": "Q4_0"}.get(name.split(".", 2)[-1], "F32")
        yield name, gguf.GGMLQuantizationType[kind], array

    path = rewritten(SQUARE, tmp_path / "mixed.gguf", mixed)
    with pytest.warns(UserWarning, match="3 quantized weights, such as blk.0.attn_qkv.weight and blk.0.attn_gate.wei"):
        held = params_of(path, "stored")[JOINED]
    assert np.array_equal(held, params_of(path)[JOINED])


@pytest.mark.parametrize("part", [slice(0, 5), slice(7, 41), slice(40, 96), slice(95, 96)])
def test_a_part_of_joined_rows(part):
    tensor = open_checkpoint(SQUARE).tensors[JOINED]
    whole = tensor.read(np.float32)
    assert whole.shape == tensor.shape == (96, 32) and not tensor.is_quantized and tensor.encoding == "F32"
    assert tensor.num_bytes == whole.nbytes
    assert np.array_equal(part_of(tensor, part).read(np.float32), whole[part])
    assert np.array_equal(part_of(tensor, part, slice(3, 20)).read(np.float32), whole[part, 3:20])
    rows = np.concatenate([values for _, values in tensor.rows(part.start, part.stop).chunks()])
    assert np.array_equal(rows, whole[part])


def test_a_part_of_joined_rows_does_not_cut_blocks(in_8_bits):
    tensor = open_checkpoint(in_8_bits).tensors[JOINED]
    assert tensor.is_quantized and tensor.encoding == "Q8_0" and tensor.columns(0, 16) is None


REFUSED = {  # name: (file, changed keys, message)
    "sizes": ("mamba2_groups", {"ssm.state_size": None}, "GGUF metadata: mamba2 lacks ssm.state_size"),
    "no_number": ("mamba2_groups", {"ssm.group_count": 0}, "mamba2: ssm.group_count must be an integer >= 1, got 0"),
    "heads": (
        "mamba2_groups",
        {"ssm.time_step_rank": 7},
        "mamba2.ssm.inner_size must be a multiple of ssm.time_step_rank, the number of heads, got 64 and 7",
    ),
    "key_heads": ("qwen3_next_square", {"ssm.group_count": 3}, "num_value_heads must be a multiple of num_key_heads"),
    "interval": (
        "qwen3_next_square",
        {"full_attention_interval": 0},
        "qwen3next: full_attention_interval must be an integer >= 1, got 0",
    ),
    "too_few_layers": (
        "qwen3_next_square",
        {"attention.recurrent_layers": [True, False]},
        "mixers must have one entry per layer, 4, got 2",
    ),
    "too_many_layers": (
        "granitemoehybrid",
        {"attention.head_count_kv": [0, 2, 0, 2]},
        "mixers must have one entry per layer, 3, got 4",
    ),
    "scale": (
        "granitemoehybrid",
        {"embedding_scale": "x"},
        r"granitehybrid: attention.scale, embedding_scale, residual_scale, logit_scale must be numbers, got \[0.5, 'x'",
    ),
    "layers_differ": (
        "granitemoehybrid",
        {"attention.head_count_kv": [4, 2, 0]},
        r"granitehybrid.attention.head_count_kv must be the same in all layers, got \[4, 2\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_metadata_that_does_not_fit_is_refused(name):
    file, changed, message = REFUSED[name]
    checkpoint = open_checkpoint(GOLDEN / f"{file}.gguf")
    arch = checkpoint.metadata["general.architecture"]
    changed = {f"{arch}.{key}": value for key, value in changed.items()}
    with pytest.raises(ValueError, match=message):
        config_from_gguf({**checkpoint.metadata, **changed}, ["output.weight"])


def test_the_layers_with_a_state_may_be_listed():
    metadata = open_checkpoint(SQUARE).metadata
    listed = {**metadata, "qwen3next.attention.recurrent_layers": [True, False, True, False]}
    assert config_from_gguf(listed, []).attention_layers == (1, 3)
    assert config_from_gguf(metadata, []).attention_layers == (3,)
    for one, layers in ((True, ()), (False, (0, 1, 2, 3))):
        assert config_from_gguf(listed | {"qwen3next.attention.recurrent_layers": one}, []).attention_layers == layers


def test_a_bias_of_attention_is_found_behind_a_layer_with_a_state():
    metadata = open_checkpoint(GOLDEN / "granitemoehybrid.gguf").metadata
    assert config_from_gguf(metadata, ["blk.1.attn_q.bias", "blk.1.attn_output.bias"]).qkv_bias
    assert not config_from_gguf(metadata, ["blk.1.attn_output.bias"]).qkv_bias
