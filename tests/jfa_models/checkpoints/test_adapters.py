"""Adapters of PEFT: the logits that PEFT computes with each golden one, writing, merging, and a message per defect."""

import dataclasses
import functools
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDEN
from runs import run
from safetensors.numpy import load_file, save_file

from jfa_models import from_pretrained
from jfa_models.checkpoints.lora_config import LoraConfig, lora_config
from jfa_models.checkpoints.peft import CONFIG_FILE, TENSOR_FILE, read_adapter, save_adapter

ADAPTERS = GOLDEN / "adapters"
NAMES = sorted(path.name for path in ADAPTERS.iterdir() if path.is_dir() and path.name != "pissa")
SAME, WORKS = 1e-4, 0.05  # in standard deviations of the logits, as in golden/adapters.py


@functools.cache
def base_model(name, **options):
    return from_pretrained(GOLDEN / name, dtype="float32", **options)


def base_of(name):
    """The name of the checkpoint to which a golden adapter belongs."""
    return json.loads((ADAPTERS / name / CONFIG_FILE).read_text())["base_model_name_or_path"]


def with_adapter(name, **options):
    """The model of a golden adapter, with all adapters of this model under their own names."""
    model = base_model(base_of(name), **options)
    for one in NAMES:
        if base_of(one) == base_of(name) and one not in model.adapters.names:
            model.load_adapter(one, ADAPTERS / one)
    return model


def golden(name):
    return dict(np.load(ADAPTERS / f"{name}.npz"))


def difference(found, expected):
    return float(np.abs(np.asarray(found) - expected).max() / expected.std())


def read(folder, base):
    model = base_model(base)
    return read_adapter(folder, model.config, model.shapes)


# What is computed


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_peft(name):
    model, want = with_adapter(name), golden(name)
    assert difference(model.logits(want["input_ids"], adapter=name), want["logits"]) < SAME
    assert difference(model.logits(want["input_ids"]), want["logits"]) > WORKS


@pytest.mark.parametrize("name", [run(name, quick=name != "granite", soak=True) for name in NAMES])
def test_merged_logits_are_those_of_peft(name):
    """With a tied embedding, PEFT merges into the head what it did not apply there: ours is then untied."""
    model, want = with_adapter(name), golden(name)
    before = np.asarray(model.logits(want["input_ids"]))
    merged = model.merge_adapter(name)
    assert difference(merged.logits(want["input_ids"]), want.get("merged_logits", want["logits"])) < SAME
    assert merged.adapters.names == () and (merged.config == model.config) == (name != "tied_embeddings")
    assert np.array_equal(model.logits(want["input_ids"]), before)


# the first adapter of each model: what is saved is a model without adapters, whose logits are compared above
SAVED = [name for i, name in enumerate(NAMES) if base_of(name) not in map(base_of, NAMES[:i])]


@pytest.mark.parametrize(
    "name", [run(name, quick=name in ("tied_embeddings", "moe_all_linear"), soak=name == "granite") for name in SAVED]
)
def test_a_merged_model_is_saved(name, tmp_path):
    merged = with_adapter(name).merge_adapter(name)
    merged.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype="float32")
    ids = golden(name)["input_ids"]
    assert again.config == merged.config and np.array_equal(again.logits(ids), merged.logits(ids))


def test_rows_of_one_batch_have_different_adapters():
    names = [name for name in NAMES if base_of(name) == "llama3_tiny"]
    model, ids = with_adapter("lora"), golden("lora")["input_ids"][:1]
    found = model.logits(np.repeat(ids, 1 + len(names), axis=0), adapter=[None, *names])
    for row, name in zip(found[1:], names, strict=True):
        assert difference(row, golden(name)["logits"][0]) < SAME
    assert difference(found[0], np.asarray(model.logits(ids))[0]) < SAME


# what only differs in how its file is read or its scale computed is on the device as "lora" is, which quantized weights
# do not see; its logits with floats are compared above
READ_ALIKE = ("bias_only", "half_file", "layers", "lora_bias", "rank_alpha_patterns", "regex", "rslora")
QUANTIZED = [
    run(name, quick=name in ("dora", "moe_experts"), soak=name == "granite") for name in NAMES if name not in READ_ALIKE
]


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_adapter_of_a_quantized_base(name):
    model, want = with_adapter(name, quantization="int8"), golden(name)
    ids = want["input_ids"]
    change = np.asarray(model.logits(ids, adapter=name)) - np.asarray(model.logits(ids))
    wanted = want["logits"] - np.asarray(base_model(base_of(name)).logits(ids))
    near = 0.15 if "moe" in base_of(name) or base_of(name) == "mixtral" else 0.1  # of experts, others may be chosen
    assert np.linalg.norm(change - wanted) < near * np.linalg.norm(wanted)
    with pytest.raises(
        ValueError, match=r"cannot be merged into quantized weights such as .*weight: load the model wi"
    ):
        model.merge_adapter(name)


# What is written


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_reads_back_and_has_the_names_of_peft(name, tmp_path):
    adapter = read(ADAPTERS / name, base_of(name))
    save_adapter(tmp_path, adapter)
    again = read(tmp_path, base_of(name))
    assert again.config == adapter.config and again.num_params == adapter.num_params
    want, found = load_file(ADAPTERS / name / TENSOR_FILE), load_file(tmp_path / TENSOR_FILE)
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[key], x.astype(np.float32)) for key, x in want.items())
    written, given = (json.loads((folder / CONFIG_FILE).read_text()) for folder in (tmp_path, ADAPTERS / name))
    assert written.keys() <= given.keys()


def test_an_alpha_of_zero_is_written(tmp_path):
    adapter = read(edited("lora", tmp_path / "given", config={"lora_alpha": 0}), "llama3_tiny")
    save_adapter(tmp_path / "saved", adapter)
    assert read(tmp_path / "saved", "llama3_tiny").config.lora_alpha == 0


def test_the_folder_may_be_a_string_or_a_path_and_names_in_it_may_have_that_of_the_adapter(tmp_path):
    def spelled(tensors):
        for key in list(tensors):
            key_of_peft = key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
            tensors[key_of_peft] = tensors.pop(key)

    want = read(ADAPTERS / "lora", "llama3_tiny")
    found = read(str(edited("lora", tmp_path, spelled)), "llama3_tiny")
    assert found.config == want.config and found.tensors.keys() == want.tensors.keys()


# What a configuration means


def test_the_first_pattern_that_matches_the_end_of_a_name_counts():
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        rank_pattern={r"layers\.1\..*": 3, "q_proj": 4, r"^model\.layers\.0\.mlp\.up_proj": 5, "proj": 7},
        alpha_pattern={"q_proj": 1, r"self_attn\..*": 9},
    )
    assert config.rank("model.layers.0.self_attn.q_proj") == 4
    assert config.rank("model.layers.1.self_attn.q_proj") == 3
    assert config.rank("model.layers.0.mlp.up_proj") == 5
    assert config.rank("model.layers.0.mlp.down_proj") == 2  # a part of a name is not its end
    assert config.scale("model.layers.0.self_attn.q_proj") == 1 / 4
    assert config.scale("model.layers.0.self_attn.k_proj") == 9 / 2
    assert config.scale("model.layers.0.mlp.up_proj") == 6 / 5


def test_the_scale_of_rslora_is_divided_by_the_root_of_the_rank():
    config = LoraConfig(r=4, lora_alpha=6, use_rslora=True, rank_pattern={"k_proj": 9})
    assert config.scale("model.layers.0.self_attn.q_proj") == 3
    assert config.scale("model.layers.0.self_attn.k_proj") == 2


Q0, Q1, K1, HEAD = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.k", "lm_head"


@pytest.mark.parametrize(
    ("fields", "targets"),
    [
        (dict(target_modules=["q_proj"]), (Q0, Q1)),
        (dict(target_modules=["proj"]), ()),
        (dict(target_modules=[Q0, "k"]), (Q0, K1)),
        (dict(target_modules=r".*\.1\..*"), (Q1, K1)),
        (dict(target_modules="q_proj"), ()),  # a regular expression for the whole name
        (dict(target_modules="all-linear"), (Q0, Q1, K1)),
        (dict(target_modules=["q_proj", "lm_head"], exclude_modules=["q_proj"]), (HEAD,)),
        (dict(target_modules=["q_proj"], exclude_modules=r".*\.0\..*"), (Q1,)),
        (dict(target_modules=["q_proj"], layers_to_transform=1), (Q1,)),
        (dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers"), (Q1,)),
        (dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["blocks"]), ()),
        (dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[0]), (Q0, HEAD)),
        (dict(target_modules=[Q0, "q_proj"], layers_to_transform=[1]), (Q0, Q1)),  # a whole name is not restricted
        (dict(target_modules=None, target_parameters=["experts.down_proj"]), ()),
    ],
)
def test_which_modules_are_targeted(fields, targets):
    config = lora_config({"peft_type": "LORA"} | fields, "file")
    assert tuple(module for module in (Q0, Q1, K1, HEAD) if config.targets(module)) == targets
    if fields["target_modules"] == "all-linear":
        assert not config.targets("model.embed_tokens")


def test_all_linear_modules_may_be_written_as_one_word(tmp_path):
    adapter = read(edited("all_linear", tmp_path / "given", config={"target_modules": "all-linear"}), "llama3_tiny")
    save_adapter(tmp_path / "saved", adapter)
    assert read(tmp_path / "saved", "llama3_tiny").config == adapter.config


# What is refused


def edited(name, folder, tensors=None, config=None):
    """A copy of a golden adapter with changes of its tensors, a function of their dictionary, and of its fields."""
    shutil.copytree(ADAPTERS / name, folder, dirs_exist_ok=True)
    if tensors is not None:
        held = load_file(folder / TENSOR_FILE)
        tensors(held)
        (folder / TENSOR_FILE).unlink()
        save_file(held, folder / TENSOR_FILE)
    if config is not None:
        about = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(about | config))
    return folder


def refusal(folder, base="llama3_tiny"):
    """The message with which load_adapter refuses a folder, which is named in it."""
    model = base_model(base)
    try:
        model.load_adapter("accepted", folder)
    except ValueError as error:
        assert type(error) is ValueError and "accepted" not in model.adapters.names
        return str(error)
    model.unload_adapter("accepted")
    pytest.fail("it was accepted")


def test_what_is_no_adapter_is_refused(tmp_path):
    assert refusal(str(tmp_path / "none")).startswith(
        f"there is no adapter '{tmp_path}/none': use a folder that PEFT saved, or a repository (owner/name)"
    )
    lacks = "is not an adapter of PEFT: it lacks"
    for folder in (tmp_path, tmp_path / "none", GOLDEN / "llama3_tiny"):
        assert refusal(folder) == f"{folder} {lacks} adapter_config.json and adapter_model.safetensors"
    folder = edited("lora", tmp_path / "lora")
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    assert refusal(folder).startswith(
        f"{folder} has only pickled weights (adapter_model.bin), which may execute code when they are loaded; convert"
    )
    (folder / "adapter_model.bin").unlink()
    assert refusal(folder) == f"{folder} {lacks} adapter_model.safetensors"
    (edited("lora", folder) / CONFIG_FILE).unlink()
    assert refusal(folder) == f"{folder} {lacks} adapter_config.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "adapter_config.json is not valid JSON"),
        ("[]", "adapter_config.json must hold a JSON object, got a list"),
        ("{}", "adapter_config.json: peft_type must be LORA, which covers rsLoRA and DoRA; None is not supported"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, content, message):
    (edited("lora", tmp_path) / CONFIG_FILE).write_text(content)
    assert message in refusal(tmp_path)


def test_damaged_tensors_are_refused(tmp_path):
    file = edited("lora", tmp_path) / TENSOR_FILE
    whole = file.read_bytes()
    for length in (0, 5, 100, len(whole) - 4):
        file.write_bytes(whole[:length])
        assert str(file) in refusal(tmp_path) and "damaged" in refusal(tmp_path)


START = ["pissa", "PiSSA_niter_4", "olora", "corda", "loftq", "lora_ga"]
CONFIGS = [
    *(({"peft_type": kind}, f"peft_type must be LORA, .*; {kind!r} is not") for kind in ("PROMPT_TUNING", "IA3", None)),
    *(({"init_lora_weights": start}, f"init_lora_weights is {start!r}, which changes the base wei") for start in START),
    *(
        ({key: value}, f"{key} is .*, which is not supported")
        for key, value in {
            "megatron_config": {"a": 1},
            "layer_replication": [[0, 2]],
            "alora_invocation_tokens": [1],
            "use_qalora": True,
            "use_bdlora": {"a": 1},
            "arrow_config": {"a": 1},
            "kasa_config": {"a": 1},
            "velora_config": {"a": 1},
            "monteclora_config": {"a": 1},
        }.items()
    ),
    *(({"r": value}, "r must be an integer >= 1, got ") for value in (0, -1, 1.5, "4", True, [4])),
    *(
        ({"lora_dropout": value}, "lora_dropout must be a number of at least 0 and below 1, got ")
        for value in ("0.1", True, -0.1, 1.0, float("nan"))
    ),
    *(({"lora_alpha": value}, "lora_alpha must be a number, got ") for value in ("8", True, [], float("nan"))),
    *(
        ({"target_modules": value}, "target_modules must be a list of module names, got")
        for value in (5, [1], {"a": 1})
    ),
    ({"target_modules": "("}, r"target_modules must be module names or a regular expression, got '\('"),
    ({"exclude_modules": "["}, r"exclude_modules must be module names or a regular expression, got '\['"),
    ({"exclude_modules": 5}, "exclude_modules must be a list of module names, got 5"),
    ({"modules_to_save": "lm_head"}, "modules_to_save must be a list of module names, got 'lm_head'"),
    ({"target_parameters": [None]}, r"target_parameters must be a list of module names, got \[None\]"),
    *(({"layers_to_transform": x}, "layers_to_transform must be layer numbers, got") for x in ("1", [1.5], [True], {})),
    ({"layers_pattern": 5}, "layers_pattern must be names or regular expressions, got"),
    (
        {"layers_to_transform": 1, "layers_pattern": "("},
        r"layers_pattern must be names or regular expressions, got \['\('\]",
    ),
    *(
        ({"rank_pattern": value}, "rank_pattern must be integers >= 1 by module pattern, got")
        for value in ([], 5, {"q_proj": 0}, {"q_proj": "4"}, {"q_proj": 2.5}, {"q_proj": True}, {"(": 4})
    ),
    *(
        ({"alpha_pattern": value}, "alpha_pattern must be numbers by module pattern, got")
        for value in ([1], {"q_proj": "4"}, {"q_proj": None}, {"q_proj": True}, {"(": 4}, {"q_proj": float("inf")})
    ),
    *(({key: 1}, f"{key} must be true or false, got 1") for key in ("use_rslora", "use_dora", "lora_bias")),
    ({"ensure_weight_tying": "yes"}, "ensure_weight_tying must be true or false, got 'yes'"),
    *(({"bias": x}, "bias must be none, all or lora_only, got") for x in ("some", True, ["all"], {})),
    *(
        ({"trainable_token_indices": value}, "trainable_token_indices must be token ids, or lists of them by module")
        for value in (5, ["5"], [-1], [1.5], {"embed_tokens": 5}, {"embed_tokens": [True]}, [5, 5])
    ),
    *(({"base_model_name_or_path": value}, "base_model_name_or_path must be a name, got") for value in (5, ["x"])),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_a_field_that_cannot_be_honoured_is_refused(change, message):
    content = json.loads((ADAPTERS / "lora" / CONFIG_FILE).read_text()) | change
    with pytest.raises(ValueError, match=f"^file: {message}"):
        lora_config(content, "file")


def test_the_golden_adapter_whose_base_is_not_stored_is_refused():
    message = refusal(ADAPTERS / "pissa")
    assert message.startswith(f"{ADAPTERS / 'pissa' / CONFIG_FILE}: init_lora_weights is 'pissa', which changes the")
    assert "path_initial_model_for_weight_conversion" in message


LAYER = "base_model.model.model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
EXPERTS = f"{LAYER}.mlp.experts"
EMBED = "base_model.model.model.embed_tokens"


def put(key, *shape):
    return lambda tensors: tensors.update({key: np.zeros(shape, np.float32)})


def without(*keys):
    def change(tensors):
        for key in keys:
            del tensors[key]

    return change


TENSORS = {  # name: (golden adapter, change of its tensors, of its configuration, message)
    "no_name": ("lora", put(f"{Q}.lora_C.weight", 2), {}, r"q_proj.lora_C \(weight\) is not part of the model"),
    "no_kind": ("lora", put(f"{Q}.vera_lambda_d", 2), {}, f"{Q}.vera_lambda_d is not a tensor of LoRA"),
    "no_module": (
        "lora",
        put(f"{LAYER}.self_attn.x_proj.lora_A.weight", 4, 32),
        {},
        r"layers.0.self_attn.x_proj \(lora_A\) is not part of the model",
    ),
    "no_layer": (
        "lora",
        put(f"{Q.replace('layers.0', 'layers.2')}.lora_A.weight", 4, 32),
        {},
        r"layers.2.self_attn.q_proj \(lora_A\) is not part of the model",
    ),
    "no_b": ("lora", without(f"{Q}.lora_B.weight"), {}, "layers.0.self_attn.q_proj lacks lora_B$"),
    "no_a": ("lora", without(f"{Q}.lora_A.weight"), {}, "layers.0.self_attn.q_proj lacks lora_A$"),
    "shape_of_a": (
        "lora",
        put(f"{Q}.lora_A.weight", 4, 31),
        {},
        r"lora_A of layers.0.self_attn.q_proj has shape \[4, 31\], the model needs \[4, 32\]$",
    ),
    "shape_of_b": (
        "lora",
        put(f"{Q}.lora_B.weight", 64),
        {},
        r"lora_B of layers.0.self_attn.q_proj has shape \[64\], the model needs \[64, 4\]$",
    ),
    "rank": (
        "lora",
        None,
        {"r": 8},
        r"lora_A of layers.0.mlp.down_proj has shape \[4, 24\], the model needs \[8, 24\]; .*; and 22 more$",
    ),
    "magnitude": (
        "dora",
        put(f"{Q}.lora_magnitude_vector", 31),
        {},
        r"lora_magnitude_vector of layers.0.self_attn.q_proj has shape \[31\], the model needs \[32\]$",
    ),
    "no_magnitude": ("dora", without(f"{Q}.lora_magnitude_vector"), {}, "q_proj lacks lora_magnitude_vector$"),
    "no_dora": (
        "dora",
        None,
        {"use_dora": False},
        "q_proj has lora_magnitude_vector, which adapter_config.json does not ask for|and 4 more",
    ),
    "bias_of_b": ("lora_bias", without(f"{Q}.lora_B.bias"), {}, "layers.0.self_attn.q_proj lacks lora_B.bias$"),
    "no_lora_bias": (
        "lora_bias",
        None,
        {"lora_bias": False},
        "has lora_B.bias, which adapter_config.json does not ask",
    ),
    "target_without_tensors": (
        "lora",
        without(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
        {},
        "layers.0.self_attn.q_proj is one of target_modules, but has no tensors$",
    ),
    "tensors_without_target": (
        "lora",
        None,
        {"exclude_modules": ["q_proj"]},
        "layers.0.self_attn.q_proj has tensors, but is not one of target_modules",
    ),
    "embedding_is_not_targeted": (
        "embeddings",
        None,
        {"target_modules": ["lm_head", "q_proj"]},
        "embed_tokens has tensors, but is not one of target_modules",
    ),
    "empty": ("lora", dict.clear, {"target_modules": []}, "it has no tensors$"),
    "empty_of_targets": ("lora", dict.clear, {}, "q_proj is one of target_modules, but has no tensors; .* more$"),
    "norm": (
        "lora",
        lambda x: (
            put(f"{LAYER}.input_layernorm.lora_A.weight", 4, 1)(x),
            put(f"{LAYER}.input_layernorm.lora_B.weight", 32, 4)(x),
        ),
        {},
        "layers.0.input_layernorm is a norm, and cannot have low-rank parts",
    ),
    "bias_that_the_model_lacks": (
        "lora",
        put(f"{Q}.base_layer.bias", 64),
        {"bias": "lora_only"},
        "layers.0.self_attn.q_proj has bias, but that of the model has none$",
    ),
    "bias_of_a_norm": (
        "modules_to_save",
        put(f"{LAYER}.input_layernorm.bias", 32),
        {"bias": "all"},
        "layers.0.input_layernorm has bias, but that of the model has none$",
    ),
    "bias_is_missing": (
        "bias_all",
        without(f"{LAYER}.self_attn.k_proj.bias"),
        {},
        "layers.0.self_attn.k_proj lacks bias, which bias='all' asks for$",
    ),
    "own_bias_is_missing": (
        "bias_only",
        without(f"{Q}.base_layer.bias"),
        {},
        "layers.0.self_attn.q_proj lacks bias, which bias='lora_only' asks for$",
    ),
    "bias_that_is_not_asked_for": (
        "bias_only",
        None,
        {"bias": "none"},
        "layers.0.self_attn.q_proj has bias, which adapter_config.json does not ask for",
    ),
    "weight_that_is_not_asked_for": (
        "modules_to_save",
        put(f"{LAYER}.mlp.up_proj.weight", 24, 32),
        {},
        "layers.0.mlp.up_proj has weight, which adapter_config.json does not ask for$",
    ),
    "module_to_save_is_missing": (
        "modules_to_save",
        without("base_model.model.lm_head.weight"),
        {},
        "lm_head is one of modules_to_save, but no tensors replace it$",
    ),
    "replaced_and_low_rank": (
        "embeddings",
        put(f"{EMBED}.weight", 96, 32),
        {"modules_to_save": ["embed_tokens"]},
        "embed_tokens has both low-rank parts and weight, which is not supported",
    ),
    "shape_of_weight": (
        "modules_to_save",
        put("base_model.model.lm_head.weight", 97, 32),
        {},
        r"weight of lm_head has shape \[97, 32\], the model needs \[96, 32\]$",
    ),
    "rows_are_missing": (
        "trainable_tokens",
        without(f"{EMBED}.token_adapter.trainable_tokens_delta"),
        {},
        "embed_tokens is one of trainable_token_indices, but no tensors replace its rows$",
    ),
    "number_of_rows": (
        "trainable_tokens",
        None,
        {"trainable_token_indices": [95, 6]},
        r"rows of embed_tokens has shape \[3, 32\], the model needs \[2, 32\]$",
    ),
    "token_outside": (
        "trainable_tokens",
        None,
        {"trainable_token_indices": [96, 6, 5]},
        "trainable_token_indices has 96, but embed_tokens has 96 rows$",
    ),
    "rows_that_are_not_asked_for": (
        "trainable_tokens",
        None,
        {"trainable_token_indices": None},
        "embed_tokens has rows, which adapter_config.json does not ask for$",
    ),
    "experts_without_b": (
        "moe_experts",
        without(f"{EXPERTS}.lora_B.weight"),
        {},
        "layers.0.mlp.experts lacks lora_B; ",
    ),
    "experts_without_a": (
        "moe_experts",
        without(f"{EXPERTS}.lora_A.weight"),
        {},
        "layers.0.mlp.experts lacks lora_A; ",
    ),
    "shape_of_experts": (
        "moe_experts",
        put(f"{EXPERTS}.lora_A.weight", 8, 17),
        {},
        r"layers.0.mlp.experts has lora_A \[8, 17\] and lora_B \[32, 8\], but the model needs for gate_up_proj "
        r"\[8, 32\] and \[32, 8\] or for down_proj \[8, 16\] and \[32, 8\]",
    ),
    "dimensions_of_experts": (
        "moe_experts",
        put(f"{EXPERTS}.lora_A.weight", 8),
        {},
        r"layers.0.mlp.experts has lora_A \[8\] and lora_B \[32, 8\], but the model needs for ",
    ),
    "rank_of_experts": (
        "moe_experts",
        None,
        {"rank_pattern": {"down_proj": 3}},
        r"lora_A of layers.0.mlp.experts has shape \[8, 16\], the model needs \[12, 16\]",
    ),
    "experts_are_missing": (
        "moe_experts",
        without(f"{EXPERTS}.lora_A.weight", f"{EXPERTS}.lora_B.weight"),
        {},
        "layers.0.mlp.experts.down_proj is one of target_parameters, but has no tensors$",
    ),
    "experts_that_are_not_asked_for": (
        "moe_experts",
        None,
        {"target_parameters": ["mlp.experts.down_proj"]},
        "layers.0.mlp.experts.gate_up_proj has tensors, but is not one of target_parameters",
    ),
    "dora_of_experts": (
        "mixtral",
        lambda x: None,
        {"use_dora": True},
        "layers.0.mlp.experts is of experts, which PEFT changes by lora_A and lora_B only, without DoRA and lora_bias",
    ),
    "dora_of_one_expert": (
        "moe_experts",
        lambda x: [
            put(f"{EXPERTS}.1.gate_proj.lora_{name}", *shape)(x)
            for name, shape in (("A.weight", (2, 32)), ("B.weight", (16, 2)), ("magnitude_vector", (16,)))
        ],
        {"use_dora": True},
        "experts.1.gate_proj is one expert's, which can have lora_A and lora_B only, without DoRA",
    ),
    "weight_of_one_expert": (
        "moe_experts",
        put(f"{EXPERTS}.1.gate_proj.weight", 16, 32),
        {"modules_to_save": ["gate_proj"]},
        "experts.1.gate_proj is one expert's, which can have lora_A and lora_B only, without DoRA",
    ),
    "no_such_expert": (
        "moe_experts",
        lambda x: (
            put(f"{EXPERTS}.4.gate_proj.lora_A.weight", 2, 32)(x),
            put(f"{EXPERTS}.4.gate_proj.lora_B.weight", 16, 2)(x),
        ),
        {},
        r"layers.0.mlp.experts.4.gate_proj \(lora_A, lora_B\) is not part of the model",
    ),
    "same_module": (
        "mixtral",
        lambda x: [
            put(f"{LAYER}.{mlp}.gate.lora_{name}.weight", *shape)(x)
            for mlp in ("mlp", "block_sparse_moe")
            for name, shape in (("A", (2, 32)), ("B", (4, 2)))
        ],
        {"target_parameters": ["gate_up_proj", "down_proj", "0.mlp.gate.weight", "block_sparse_moe.gate.weight"]},
        "layers.0.block_sparse_moe.gate and layers.0.mlp.gate are the same module|"
        "layers.0.mlp.gate and layers.0.block_sparse_moe.gate are the same module",
    ),
    "same_expert": (
        "moe_experts",
        lambda x: [
            put(f"{EXPERTS}.1.up_proj.lora_{name}.weight", *shape)(x)
            for name, shape in (("A", (2, 32)), ("B", (16, 2)))
        ],
        {},
        r"layers.0.mlp.experts.* and layers.0.mlp.experts.* are the same module",
    ),
    "not_finite": (
        "lora",
        lambda x: x[f"{Q}.lora_B.weight"].__setitem__((3, 1), np.nan),
        {},
        r"adapter 'accepted' changes layers.0.attention.q \(b\) by numbers that are not finite in float32$",
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit_are_refused(name, tmp_path):
    golden_name, change, config, message = TENSORS[name]
    found = refusal(edited(golden_name, tmp_path, change, config), base_of(golden_name))
    assert re.search(message, found), found
    if "LoRA" not in message and "finite" not in message:
        assert found.startswith(f"{tmp_path} does not fit the model (")
        assert f"and may belong to {base_of(golden_name)}: " in found and len(found) < 1000


@pytest.mark.parametrize("mlp", ["mlp", "block_sparse_moe"])
def test_the_router_of_mixtral_has_two_names(mlp, tmp_path):
    generator = np.random.default_rng(0)

    def with_routers(tensors):
        for layer in range(2):
            name = f"base_model.model.model.layers.{layer}.{mlp}.gate"
            tensors[f"{name}.lora_A.weight"] = generator.standard_normal((2, 32)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = generator.standard_normal((4, 2)).astype(np.float32)

    parameters = ["gate_up_proj", "down_proj", "gate.weight"]
    model = base_model("mixtral")
    model.load_adapter("routers", edited("mixtral", tmp_path, with_routers, {"target_parameters": parameters}))
    changes = model.adapters.find("routers").changes
    model.unload_adapter("routers")
    generator = np.random.default_rng(0)
    for layer in range(2):
        a, b = generator.standard_normal((2, 32)), generator.standard_normal((4, 2))
        change = changes[f"layers.{layer}.mlp.router"]
        np.testing.assert_allclose(change.a[0], a, rtol=1e-6)
        np.testing.assert_allclose(change.b[0].T, 3 * b, rtol=1e-6)


def test_a_module_to_save_may_have_others_inside(tmp_path):
    base = base_model("llama3_tiny")
    parts = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}

    def with_mlps(tensors):
        for layer, (theirs, ours) in itertools.product(range(2), parts.items()):
            key = LAYER.replace("layers.0", f"layers.{layer}")
            tensors[f"{key}.mlp.{theirs}.weight"] = 1 + base.float32(f"layers.{layer}.mlp.{ours}.weight")

    config = {"modules_to_save": ["lm_head", "norm", "mlp"]}
    base.load_adapter("mlps", edited("modules_to_save", tmp_path / "all", with_mlps, config))
    changes = base.adapters.find("mlps").changes
    base.unload_adapter("mlps")
    for layer, ours in itertools.product(range(2), parts.values()):
        np.testing.assert_allclose(changes[f"layers.{layer}.mlp.{ours}"].whole, 1, rtol=1e-5)
    message = refusal(edited("modules_to_save", tmp_path / "none", config=config))
    assert "layers.0.mlp.gate_proj is one of modules_to_save, but no tensors replace it" in message


def older_names(tensors):
    """As an older transformers, whose modules had the names of the checkpoint, called Granite's experts and router."""
    for key in list(tensors):
        older = key.replace(".experts.base_layer.", ".input_linear.").replace(".experts.", ".output_linear.")
        tensors[older.replace(".router.", ".router.layer.")] = tensors.pop(key)


def test_the_experts_and_the_router_of_granite_have_two_names(tmp_path):
    parameters = ["block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"]
    modules = ["q_proj", "out_proj", "shared_mlp.input_linear", "shared_mlp.output_linear", "router.layer"]
    config = {"target_modules": modules, "target_parameters": parameters}
    older = edited("granite", tmp_path / "older", older_names, config)
    model = base_model("granitemoehybrid_moe")
    for name, folder in (("newer names", ADAPTERS / "granite"), ("older names", older)):
        model.load_adapter(name, folder)
    of_newer, of_older = (model.adapters.find(name).changes for name in ("newer names", "older names"))
    jax.tree.map(np.testing.assert_array_equal, of_newer, of_older)
    for name in ("newer names", "older names"):
        model.unload_adapter(name)

    def without_one(tensors):
        older_names(tensors)
        for kind in "AB":
            del tensors[f"{LAYER}.block_sparse_moe.output_linear.lora_{kind}.weight"]

    message = refusal(edited("granite", tmp_path / "fewer", without_one, config), "granitemoehybrid_moe")
    assert "layers.0.block_sparse_moe.output_linear is one of target_parameters, but has no tensors" in message

    def without_any(tensors):
        older_names(tensors)
        for key in [key for key in tensors if ".block_sparse_moe.input" in key or ".block_sparse_moe.output" in key]:
            del tensors[key]

    message = refusal(edited("granite", tmp_path / "none", without_any, config), "granitemoehybrid_moe")
    assert "layers.0.block_sparse_moe.input_linear is one of target_parameters, but has no tensors" in message
    fewer = {"target_parameters": ["experts.down_proj", "router.weight"]}
    message = refusal(edited("granite", tmp_path / "other", config=fewer), "granitemoehybrid_moe")
    assert "experts.gate_up_proj has tensors, but is not one of target_parameters" in message


def test_patterns_see_the_names_of_parameters():
    """Of a weight among target_parameters, PEFT 0.21.2 compares patterns with the weight's name, not the module's."""
    patterns = {"gate": 9, "gate.weight": 3, "gate_up_proj": 5}
    config = LoraConfig(r=2, lora_alpha=6, rank_pattern=patterns, target_parameters=("gate.weight", "gate_up_proj"))
    assert config.rank("model.layers.0.mlp.gate") == 3 and config.scale("model.layers.0.mlp.gate") == 2
    assert config.rank("model.layers.0.mlp.experts.gate_up_proj") == 5
    both = dataclasses.replace(
        config, rank_pattern={"down_proj": 4}, target_parameters=("down_proj.weight", "down_proj")
    )
    assert both.rank("model.layers.0.mlp.experts.down_proj") == 4
    assert both.rank("model.layers.0.mlp.shared_expert.down_proj") == 2
    of_modules = dataclasses.replace(config, target_modules=("gate",))
    assert of_modules.rank("model.layers.0.mlp.gate") == 9


def test_an_adapter_of_another_model_is_refused():
    message = refusal(ADAPTERS / "mixtral")
    assert "does not fit the model (llama), and may belong to mixtral: " in message
    assert "layers.0.mlp.experts.base_layer (lora_A, lora_B) is not part of the model" in message
    message = refusal(ADAPTERS / "lora", "qwen2")
    assert "does not fit the model (qwen2), and may belong to llama3_tiny: " in message
    assert "lora_B of layers.0.self_attn.k_proj has shape [32, 4], the model needs [16, 4]" in message


@pytest.mark.parametrize("spelled", ["lora_A.default.weight", "lora_B.default.weight"])
def test_a_tensor_under_two_names_is_refused(spelled, tmp_path):
    plain = spelled.replace(".default", "")
    folder = edited("lora", tmp_path, lambda x: x.update({f"{Q}.{spelled}": x[f"{Q}.{plain}"]}))
    kind = spelled.partition(".")[0]
    assert f"{folder / TENSOR_FILE} has {kind} of layers.0.self_attn.q_proj twice; one of them is {Q}." in refusal(
        folder
    )


def test_an_adapter_of_a_model_with_another_embedding_is_refused(tmp_path):
    folder = edited("embeddings", tmp_path, lambda x: x[f"{EMBED}.base_layer.weight"].__setitem__((7, 3), 5.0))
    message = refusal(folder)
    assert "the adapter was trained on another embed_tokens: the copy in the adapter's file differs" in message
    assert "by up to " in message and "load the model that it was trained on" in message


def test_a_copy_of_fused_weights_is_compared_part_by_part(tmp_path):
    base = base_model("phi3")
    parts = [base.float32(f"layers.0.attention.{name}.weight") for name in "qkv"]
    key = f"{LAYER}.self_attn.qkv_proj.base_layer.weight"
    same = edited("phi3", tmp_path / "same", lambda x: x.update({key: np.concatenate(parts)}))
    base.load_adapter("with its base", same)
    base.unload_adapter("with its base")
    other = edited("phi3", tmp_path / "other", lambda x: x.update({key: np.concatenate(parts[::-1])}))
    assert "the adapter was trained on another layers.0.self_attn.qkv_proj" in refusal(other, "phi3")


def test_an_adapter_in_memory_is_checked_too():
    adapter = read(ADAPTERS / "lora", "llama3_tiny")
    with pytest.raises(ValueError, match="does not fit the model"):
        base_model("phi3").load_adapter("x", adapter)


def test_numbers_that_overflow_the_dtype_are_refused(tmp_path):
    folder = edited("lora", tmp_path, lambda x: x[f"{Q}.lora_A.weight"].__setitem__((0, 0), 1e6))
    model = from_pretrained(GOLDEN / "llama3_tiny", dtype=jnp.float16)
    with pytest.raises(
        ValueError, match=r"adapter 'big' changes layers.0.attention.q \(a\) by .* not finite in float16$"
    ):
        model.load_adapter("big", folder)
    base_model("llama3_tiny").load_adapter("big", folder)
    base_model("llama3_tiny").unload_adapter("big")
