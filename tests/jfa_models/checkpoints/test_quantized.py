"""Quantized checkpoints: the weights that the packages of the formats compute, bit for bit, and a message per defect.

The golden weights are in the dtype in which each package dequantizes: that of the scales for compressed-tensors, GPTQ
and AWQ, float32 for 8-bit floats of transformers (tests/golden/quantized.py).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from golden import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jfa import QuantizedArray, checks
from jfa.quant import dequantize, quantize_weight
from jfa_models.checkpoints.generation import GenerationDefaults
from jfa_models.checkpoints.layouts import pack, unpack
from jfa_models.checkpoints.load import load_params
from jfa_models.checkpoints.quantized import QuantizedTensor, from_halves, to_halves
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.checkpoints.save import save_checkpoint
from jfa_models.checkpoints.tensors import StackedTensors

QUANTIZED = GOLDEN / "quantized"
DOWN, K = "layers.0.mlp.down.weight", "layers.0.attention.k.weight"
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}

CASES = {  # name: (stored_dtype; of layers.0.mlp.down: kind, group_size, has zeros, rounds_inputs)
    "ct_int4": ("int4 (compressed-tensors)", "int4", 16, True, False),
    "ct_int4_zeros": ("int4 (compressed-tensors)", "int4", 8, True, False),
    "ct_int4_channel": ("int4 (compressed-tensors)", "int4", 40, True, False),
    "ct_int8_packed": ("int8 (compressed-tensors)", "int8", 8, True, False),
    "ct_int8": ("int8 (compressed-tensors)", "int8", None, False, True),
    "ct_int8_zeros": ("int8 (compressed-tensors)", "int8", None, True, True),
    "ct_fp8": ("fp8 (compressed-tensors)", "fp8", None, False, False),
    "ct_fp8_channel": ("fp8 (compressed-tensors)", "fp8", None, False, False),
    "ct_fp8_block": ("fp8 (compressed-tensors)", "fp8", 16, False, False),
    "ct_mxfp4": ("mxfp4 (compressed-tensors)", "int8", 32, False, False),
    "ct_mixed": ("int4 (compressed-tensors)", "int4", 8, True, False),
    "gptq": ("int4 (gptq)", "int4", 16, True, False),
    "gptq_zeros": ("int4 (gptq)", "int4", 16, True, False),
    "gptq_v2": ("int4 (gptq)", "int4", 48, True, False),
    "gptq_int8": ("int8 (gptq)", "int8", 16, True, False),
    "gptq_act_order": ("int4 (gptq)", None, None, None, None),
    "awq": ("int4 (awq)", "int4", 16, True, False),
    "fp8_block": ("fp8", "fp8", 16, False, False),
}


def quantized_of(name):
    """The quantized weights of a golden checkpoint by our names."""
    tensors = open_checkpoint(QUANTIZED / name).tensors
    return {ours: tensor for ours, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same(got: QuantizedArray, want: QuantizedArray):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert same_bits(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_what_its_package_computes(name):
    by_file = {tensor.name.rpartition(".")[0]: tensor for tensor in quantized_of(name).values()}
    golden = dict(np.load(QUANTIZED / f"{name}.npz"))
    dtype = DTYPES[str(golden.pop("dtype"))]
    for theirs, want in golden.items():
        got = by_file[theirs.removesuffix(".weight")].read(dtype)
        assert np.array_equal(got, want.view(dtype))  # not by bits: a zero has no sign in integers


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_held_as_it_was_quantized(name):
    stored, *expected = CASES[name]
    checkpoint = open_checkpoint(QUANTIZED / name)
    assert checkpoint.stored_dtype == stored and not checkpoint.unknown
    for ours, tensor in quantized_of(name).items():
        held = tensor.read_quantized()
        if held is None:
            assert expected == [None] * 4
            continue
        checks.quantized_weight(held)
        assert held.shape == tensor.shape
        assert np.array_equal(dequantize(held), tensor.read(np.float32))
        if ours == DOWN:
            assert [held.kind, held.group_size, held.zeros is not None, held.rounds_inputs] == expected


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_weight(name, monkeypatch):
    monkeypatch.setattr("jfa_models.checkpoints.quantized._CHUNK_ELEMENTS", 150)  # 3 or 4 rows at once
    whole = quantized_of(name)[DOWN]
    rows = whole.rows(2, 29).rows(3, 18)  # start and stop within words and blocks
    assert rows.shape == (15, whole.shape[1])
    assert same_bits(rows.read(np.float32), whole.read(np.float32)[5:20])
    if (held := rows.read_quantized()) is not None:
        assert_same(held, jax.tree.map(lambda x: x[5:20], whole.read_quantized()))


@pytest.mark.parametrize("name", CASES)
def test_experts_are_stacked(name):
    tensors = quantized_of(name)
    parts = tuple(tensors[f"layers.0.mlp.{part}.weight"] for part in ("gate", "up"))
    stack = StackedTensors(parts=parts)
    assert same_bits(stack.read(np.float32), np.stack([part.read(np.float32) for part in parts]))
    held = [part.read_quantized() for part in parts]
    if held[0] is None:
        assert stack.read_quantized() is None
    else:
        assert_same(stack.read_quantized(), jax.tree.map(lambda *x: np.stack(x), *held))


def test_experts_that_are_quantized_differently_are_read_as_floats():
    parts = tuple(quantized_of(name)["layers.0.mlp.up.weight"] for name in ("ct_int4", "ct_int8"))
    stack = StackedTensors(parts=parts)
    assert stack.read_quantized() is None
    assert all(map(np.array_equal, stack.read(np.float32), (part.read(np.float32) for part in parts)))


def test_zero_points_of_0_borrow_in_gptq():
    """What the golden file is about: subtracted from whole words, 1 changes the field next to a zero point of 0."""
    zeros = quantized_of("gptq_zeros")[K].read_quantized().zeros
    assert (zeros[:3] == 0).all() and zeros[3:].any()
    stored = read_tensors(QUANTIZED / "gptq_zeros" / "model.safetensors")
    by_field = (unpack(stored["model.layers.0.self_attn.k_proj.qzeros"], 4).T + 1) & 15
    assert not np.array_equal(by_field, zeros)


@pytest.mark.parametrize("name", ["gptq", "ct_fp8_block"])
def test_a_quantized_checkpoint_loads_as_floats(name):
    checkpoint = open_checkpoint(QUANTIZED / name)
    expected = {ours: jax.ShapeDtypeStruct(tensor.shape, jnp.float32) for ours, tensor in checkpoint.tensors.items()}
    params = load_params(checkpoint, expected)
    assert np.array_equal(params[DOWN], checkpoint.tensors[DOWN].read(np.float32))


# Packing.


@given(
    st.sampled_from([4, 8]).flatmap(
        lambda bits: st.tuples(
            st.just(bits),
            hnp.arrays(
                np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.integers(0, 2**bits - 1)
            ),
        )
    )
)
def test_words_are_packed_and_unpacked(drawn):
    bits, fields = drawn
    words = pack(fields, bits)
    per_word = 32 // bits
    assert words.shape == (len(fields), -(-fields.shape[1] // per_word))
    for column in range(fields.shape[1]):  # the definition: field i is at bit i * bits
        shifted = words.view(np.uint32)[:, column // per_word] >> np.uint32(column % per_word * bits)
        assert np.array_equal(shifted & np.uint32(2**bits - 1), fields[:, column])
    assert np.array_equal(unpack(words, bits)[:, : fields.shape[1]], fields)


@settings(deadline=None)  # compiles
@given(st.integers(1, 4).flatmap(lambda pairs: hnp.arrays(np.uint8, (2, 6 * pairs), elements=st.integers(0, 15))))
def test_halves_are_those_of_a_quantized_array(numbers):
    group = numbers.shape[1] // 3
    values = to_halves(numbers, group)
    held = QuantizedArray(
        values=jnp.asarray(values),
        scales=jnp.ones((2, 3)),
        zeros=jnp.zeros((2, 3), jnp.uint8),
        group_size=group,
    )
    assert np.array_equal(dequantize(held), numbers) and np.array_equal(from_halves(values, group), numbers)


def test_4_bit_numbers_in_groups_without_halves_are_held_in_8_bits(tmp_path):
    def narrower(tensors, config):
        group_of(config)["weights"]["group_size"] = 15
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            width = tensors[name.replace("_scale", "_shape")][1]
            tensors[name] = np.tile(tensors[name][:, :1], (1, -(-width // 15)))

    tensor = open_checkpoint(changed("ct_int4", tmp_path, narrower)).tensors[DOWN]
    held = tensor.read_quantized()
    assert (held.kind, held.group_size, held.scales.shape) == ("int8", 15, (32, 4))
    checks.quantized_weight(held)
    assert np.array_equal(dequantize(held), tensor.read(np.float32))


# What real files have besides, and what cannot be honoured.


ENCODINGS = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    **{"F16": np.float16, "F32": np.float32, "I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64},
}


def read_tensors(file):
    """Not safetensors.numpy, which has no 8-bit floats."""
    return {
        name: np.frombuffer(entry["data"], ENCODINGS[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in sorted(safetensors.deserialize(file.read_bytes()), key=lambda pair: pair[0])
    }


def write_tensors(file, tensors):
    encodings = {np.dtype(dtype): encoding for encoding, dtype in ENCODINGS.items()}
    header, data = {}, b""
    for name, x in tensors.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": encodings[x.dtype], "shape": x.shape, "data_offsets": offsets}
        data += x.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def changed(name, folder, change):
    """A golden checkpoint with changes: change(tensors by name, config) edits both."""
    tensors = read_tensors(QUANTIZED / name / "model.safetensors")
    config = json.loads((QUANTIZED / name / "config.json").read_text())
    change(tensors, config)
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", {key: np.asarray(x) for key, x in tensors.items()})
    return folder


def group_of(config):
    return config["quantization_config"]["config_groups"]["group_0"]


def test_scales_of_activations_and_caches_are_left_out(tmp_path):
    def add(tensors, config):
        for name in ("q_proj.input_scale", "k_scale", "k_proj.output_scale"):
            tensors[f"model.layers.0.self_attn.{name}"] = np.ones(1, np.float32)
        config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}

    with pytest.warns(UserWarning, match="kv_cache_scheme is not used: pass kv_dtype"):
        checkpoint = open_checkpoint(changed("ct_fp8", tmp_path, add))
    assert (
        checkpoint.unknown == () and checkpoint.tensors.keys() == open_checkpoint(QUANTIZED / "ct_fp8").tensors.keys()
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_of_zeros_in_gptq_files_are_left_out(tmp_path, value):
    def add(tensors, config):
        tensors["model.layers.0.mlp.down_proj.bias"] = np.full(32, value, np.float16)

    checkpoint = open_checkpoint(changed("gptq", tmp_path, add))
    assert ("layers.0.mlp.down.bias" in checkpoint.tensors) == bool(value)


def test_one_scale_per_tensor_has_any_shape_of_one_element(tmp_path):
    def flatten(tensors, config):
        del config["quantization_config"]["weight_block_size"]
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)[0, 0]

    held = open_checkpoint(changed("fp8_block", tmp_path, flatten)).tensors[DOWN].read_quantized()
    assert held.group_size is None and held.scales.shape == (32,) and len(np.unique(held.scales)) == 1


def test_scales_may_be_exponents(tmp_path):
    def exponents(tensors, config):
        config["quantization_config"]["scale_fmt"] = "ue8m0"
        for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
            tensors[name] = np.full(tensors[name].shape, 2.0**-9).astype(ml_dtypes.float8_e8m0fnu)

    tensor = open_checkpoint(changed("fp8_block", tmp_path, exponents)).tensors[DOWN]
    assert tensor.read_quantized().scales.dtype == ml_dtypes.bfloat16
    assert np.array_equal(tensor.read(np.float32), tensor.read_quantized().values.astype(np.float32) * 2.0**-9)


def in_weights(**changes):
    return lambda tensors, config: group_of(config)["weights"].update(changes)


def in_group(**changes):
    return lambda tensors, config: group_of(config).update(changes)


def in_config(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


def on_down(part, edit):
    """A change of one tensor of down_proj: edit(array), or None to remove it."""

    def change(tensors, config):
        name = f"model.layers.0.mlp.down_proj.{part}"
        tensors.pop(name) if edit is None else tensors.update({name: edit(tensors.get(name))})

    return change


def two_groups(first, second):
    def change(tensors, config):
        group = group_of(config)
        other = group | {"targets": [second], "weights": group["weights"] | {"group_size": 8}}
        config["quantization_config"]["config_groups"] = {"a": group | {"targets": [first]}, "b": other}

    return change


REFUSED = {  # name: (golden checkpoint, change, message)
    "method": (
        "gptq",
        in_config(quant_method="hqq"),
        "quant_method 'hqq' is not supported, only 'compressed-tensors', 'gp",
    ),
    "no_config": (
        "ct_int4",
        lambda tensors, config: config.pop("quantization_config"),
        r"down_proj is quantized \(weight_packed, weight_scale, weight_shape\), but config.json has no quantization_c",
    ),
    "ct_format": (
        "ct_int4",
        in_group(format="marlin-24"),
        "format 'marlin-24' is not supported, only 'pack-quantized', ",
    ),
    "ct_nvfp4": ("ct_int4", in_group(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
    "ct_bits": (
        "ct_int4",
        in_weights(num_bits=3),
        r"config_groups.group_0.weights.num_bits 3 is not supported, only 4, 8",
    ),
    "ct_type": ("ct_int4", in_weights(type="float"), "weights.type 'float' is not supported, only 'int'"),
    "ct_strategy": ("ct_int4", in_weights(strategy="tensor_group"), "weights.strategy 'tensor_group' is not supported"),
    "ct_group": ("ct_int4", in_weights(group_size=0), "weights.group_size 0 must be an integer >= 1, or -1"),
    "ct_block": ("ct_fp8_block", in_weights(block_structure=[16]), r"block_structure \[16\] must be two integers >= 1"),
    "ct_actorder": ("ct_int4", in_weights(actorder="group"), "weights.actorder 'group' is not supported"),
    "ct_g_idx": (
        "ct_int4",
        on_down("weight_g_idx", lambda _: np.zeros(48, np.int32)),
        "down_proj has weight_g_idx, which cannot be used with its quantization_config",
    ),
    "ct_dynamic": ("ct_int4", in_weights(dynamic=True), "weights.dynamic True is not supported"),
    "ct_float_zeros": ("ct_fp8", in_weights(symmetric=False), "weights.symmetric False is not supported"),
    "ct_sparsity": (
        "ct_int4",
        in_config(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config.format 'sparse-24",
    ),
    "ct_transform": (
        "ct_int4",
        in_config(transform_config={"config_groups": {"u": {}}}),
        "transform_config .* is not supp",
    ),
    "ct_groups": ("ct_int4", in_config(config_groups={}), "config_groups {} must have a group"),
    "ct_preset": (
        "ct_int4",
        in_config(config_groups={"W4A16": ["Linear"]}),
        "config_groups.W4A16 .* must have targets and",
    ),
    "ct_pattern": ("ct_int4", in_config(ignore=["re:("]), r"pattern 're:\(' is no regular expression"),
    "ct_pattern_type": ("ct_int4", in_config(ignore=[1]), "pattern 1 must be a string"),
    "ct_ignored": (
        "ct_int4",
        in_config(ignore=["re:.*down_proj"]),
        "down_proj is in quantization_config.ignore of config",
    ),
    "ct_no_target": (
        "ct_int4",
        in_group(targets=["re:.*self_attn"]),
        "down_proj is quantized, but matches no targets in quantization_config",
    ),
    "ct_two_schemes": (
        "ct_int4",
        two_groups("re:.*mlp.*|.*attn.*", "re:.*down_proj"),
        "down_proj matches the targets .* and 're:.*down_proj', whose weights differ",
    ),
    "ct_no_scale": (
        "ct_int4",
        on_down("weight_scale", None),
        "down_proj lacks weight_scale for its quantization_config",
    ),
    "ct_no_shape": (
        "ct_int4",
        on_down("weight_shape", None),
        "down_proj lacks weight_shape for its quantization_config",
    ),
    "ct_no_zeros": ("ct_int4_zeros", on_down("weight_zero_point", None), "down_proj lacks weight_zero_point"),
    "ct_int8_no_scale": ("ct_int8", on_down("weight_scale", None), "down_proj lacks weight_scale"),
    "ct_unexpected_zeros": (
        "ct_int4_zeros",
        in_weights(symmetric=True),
        "down_proj has weight_zero_point, which cannot",
    ),
    "ct_scale_shape": (
        "ct_int4",
        on_down("weight_scale", lambda x: x[:, :1]),
        r"weight_scale is BF16 \[32, 1\], but for a weight of shape \[32, 48\] with 4 bits and a scale for 1 rows and "
        r"16 columns, as quantization_config says, it must be F32 or F16 or BF16 \[32, 3\]",
    ),
    "ct_words": (
        "ct_int4",
        on_down("weight_packed", lambda x: x[:, 1:]),
        r"weight_packed is I32 \[32, 5\], .* I32 \[32, 6\]",
    ),
    "ct_dtype": (
        "ct_int8",
        on_down("weight", lambda x: x.astype(np.float16)),
        r"weight is F16 \[32, 48\], .* must be I8",
    ),
    "gptq_format": (
        "gptq",
        in_config(checkpoint_format="marlin"),
        "checkpoint_format 'marlin' is not supported, only 'gptq'",
    ),
    "gptq_bits": ("gptq", in_config(bits=3), "bits 3 is not supported, only 4, 8"),
    "gptq_pack": ("gptq", in_config(pack_dtype="int16"), "pack_dtype 'int16' is not supported"),
    "gptq_dynamic": (
        "gptq",
        in_config(dynamic={"+:.*down": {"bits": 8}}),
        r"dynamic '\+:.*down': bits 8 differs from the",
    ),
    "gptq_group": (
        "gptq",
        in_config(group_size=32),
        r"scales is F16 \[3, 32\], but .* must be F32 or F16 or BF16 \[2, 32\]",
    ),
    "awq_version": ("awq", in_config(version="gemv"), "version 'gemv' is not supported, only 'gemm'"),
    "awq_bits": ("awq", in_config(bits=8), "bits 8 is not supported, only 4"),
    "awq_zeros": ("awq", in_config(zero_point=False), "zero_point False is not supported, only True"),
    "fp8_fmt": ("fp8_block", in_config(fmt="e5m2"), "fmt 'e5m2' is not supported, only 'e4m3'"),
    "fp8_block": (
        "fp8_block",
        in_config(weight_block_size=[16, 0]),
        r"weight_block_size \[16, 0\] must be two integers",
    ),
    "fp8_no_block": (
        "fp8_block",
        in_config(weight_block_size=None),
        r"weight_scale_inv is F32 \[\d, \d\], but .* a scale for all rows and all columns",
    ),
    "fp8_other_block": ("fp8_block", in_config(weight_block_size=[8, 16]), r"a scale for 8 rows and 16 columns"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused(name, tmp_path):
    golden, change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(changed(golden, tmp_path, change))
    assert "; use the" in str(error.value) or "; write " in str(error.value) or "; name each" in str(error.value)


def test_a_group_that_does_not_exist_is_refused(tmp_path):
    folder = changed("gptq_act_order", tmp_path, on_down("g_idx", lambda x: np.where(x == 2, 3, x)))
    with pytest.raises(ValueError, match=r"down_proj.g_idx has a group that does not exist; download it again"):
        open_checkpoint(folder).tensors[DOWN].read(np.float32)


@pytest.mark.parametrize("first, group", [("Linear", 8), ("re:.*down_proj$", 8)])
def test_the_most_specific_target_counts(tmp_path, first, group):
    """As in compressed-tensors: a name before a pattern before a class."""
    change = two_groups(first, "model.layers.0.mlp.down_proj")

    def halved(tensors, config):
        change(tensors, config)
        for name in [name for name in tensors if name.endswith("down_proj.weight_scale")]:
            tensors[name] = np.repeat(tensors[name], 2, axis=1)
        if first != "Linear":
            group_a = config["quantization_config"]["config_groups"]["a"]
            group_a["targets"] = [first, "Linear"]

    assert open_checkpoint(changed("ct_int4", tmp_path, halved)).tensors[DOWN].read_quantized().group_size == group


# Saving.


def small(x, kind, **options):
    return quantize_weight(jnp.asarray(x, jnp.float32), kind, **options)


def with_zeros(weight):
    zeros = np.random.default_rng(0).integers(-128, 128, weight.scales.shape)
    return dataclasses.replace(weight, zeros=jnp.asarray(zeros, jnp.int8))


def rounding(weight):
    return dataclasses.replace(weight, rounds_inputs=True)


SAVED = {  # name: (weight to quantized weight, format)
    "int4": (lambda x: small(x, "int4", group_size=8), "pack-quantized"),
    "int4_zeros": (lambda x: small(x, "int4", group_size=8, symmetric=False), "pack-quantized"),
    "int4_rows": (lambda x: small(x, "int4"), "pack-quantized"),
    "int8": (lambda x: small(x, "int8"), "pack-quantized"),
    "int8_groups": (lambda x: small(x, "int8", group_size=8), "pack-quantized"),
    "int8_zeros": (lambda x: with_zeros(small(x, "int8", group_size=8)), "pack-quantized"),
    "int8_rounding": (lambda x: rounding(small(x, "int8")), "int-quantized"),
    "int8_rounding_zeros": (lambda x: with_zeros(rounding(small(x, "int8"))), "int-quantized"),
    "fp8": (lambda x: small(x, "fp8"), "float-quantized"),
    "fp8_groups": (lambda x: small(x, "fp8", group_size=8), "float-quantized"),
}


def quantized_params(golden, form):
    """The configuration and parameters of a golden checkpoint, the weights of its layers (not a router's) quantized."""
    checkpoint = open_checkpoint(GOLDEN / golden)
    params = {ours: jnp.asarray(tensor.read(np.float32)) for ours, tensor in checkpoint.tensors.items()}
    for ours in params:
        if ours.startswith("layers") and ours.endswith(".weight") and "router" not in ours:
            params[ours] = form(params[ours])
    return checkpoint.config, params


def save(folder, config, params):
    save_checkpoint(folder, config, params, generation=GenerationDefaults(), tokenizer=None)
    return open_checkpoint(folder)


@pytest.mark.parametrize("golden", ["quantized/awq", "mixtral", "phi3"])  # one layer; experts; fused tensors
@pytest.mark.parametrize("form", SAVED)
def test_what_is_saved_reads_back(form, golden, tmp_path):
    quantize, written = SAVED[form]
    config, params = quantized_params(golden, quantize)
    checkpoint = save(tmp_path / "saved", config, params)
    assert checkpoint.config == config
    for ours, param in params.items():
        if isinstance(param, QuantizedArray):
            assert_same(checkpoint.tensors[ours].read_quantized(), param)
        else:
            assert same_bits(checkpoint.tensors[ours].read(param.dtype), np.asarray(param))
    quantization = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert quantization["format"] == written and quantization["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "lm_head" in quantization["ignore"] and any(
        "block_sparse_moe.gate" in x for x in quantization["ignore"]
    ) == (golden == "mixtral")


def test_layers_that_are_quantized_differently_are_saved(tmp_path):
    config, params = quantized_params("quantized/awq", SAVED["int4_zeros"][0])
    params |= {K: small(dequantize(params[K]), "int8"), "embed.weight": small(params["embed.weight"], "int8")}
    checkpoint = save(tmp_path / "saved", config, params)
    for ours in (K, DOWN):
        assert_same(checkpoint.tensors[ours].read_quantized(), params[ours])
    embedding = dequantize(params["embed.weight"], jnp.float32)
    assert np.array_equal(checkpoint.tensors["embed.weight"].read(np.float32), embedding)


NOT_SAVED = {  # name: (change of a weight in int4 or int8, message)
    "minima": (
        lambda x: dataclasses.replace(small(x, "int8"), minima=jnp.zeros(len(x))),
        "it has minima, but compressed",
    ),
    "levels": (
        lambda x: dataclasses.replace(small(x, "int4"), zeros=None),
        r"it has the levels -7.5 to 7.5, .*quantize_wei",
    ),
    "short_group": (
        lambda x: QuantizedArray(
            values=jnp.zeros(x.shape, jnp.int8), scales=jnp.ones((len(x), -(-x.shape[1] // 20))), group_size=20
        ),
        "it has groups of 20, which must divide its width 48",
    ),
    "rounding_groups": (
        lambda x: rounding(small(x, "int8", group_size=8)),
        "it has rounds_inputs and groups, but inputs are rounded only",
    ),
}


@pytest.mark.parametrize("name", NOT_SAVED)
def test_what_the_format_cannot_represent_is_not_saved(name, tmp_path):
    change, message = NOT_SAVED[name]
    config, params = quantized_params("quantized/awq", lambda x: x)
    params[DOWN] = change(params[DOWN])
    with pytest.raises(
        ValueError, match=f"{DOWN} cannot be saved as it is quantized: {message}.*; load the model with quantization="
    ):
        save(tmp_path / "saved", config, params)
    assert not (tmp_path / "saved").exists()


def test_fused_weights_must_be_quantized_alike(tmp_path):
    config, params = quantized_params("phi3", SAVED["int8"][0])
    params["layers.0.attention.q.weight"] = SAVED["int8_groups"][0](dequantize(params["layers.0.attention.q.weight"]))
    with pytest.raises(
        ValueError, match=r"attention.q.weight and .*v.weight are written as one tensor, but are quantized"
    ):
        save(tmp_path / "saved", config, params)
