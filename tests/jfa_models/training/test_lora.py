"""New adapters of models with experts: their targets are where PEFT looks for them, and their tensors are PEFT's."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from golden import GOLDEN
from tiny_model import tiny_config

from jfa_models import LanguageModel, from_pretrained
from jfa_models.checkpoints.peft import save_adapter
from jfa_models.model.config import ExpertsConfig
from jfa_models.training import Batch, Trainable, make_optimizer, make_train_step, new_adapter, new_state

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


@functools.cache
def base(name):
    return from_pretrained(GOLDEN / name, dtype="float32")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("moe_experts", ["q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        ("mixtral", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]),
    ],
)
def test_a_new_adapter_has_the_targets_and_the_tensors_of_peft(name, targets):
    folder = GOLDEN / "adapters" / name
    model = base({"moe_experts": "qwen3_moe"}.get(name, name))
    truth = model.read_adapter(folder)
    found = new_adapter(model, rank=2, alpha=6, targets=targets)
    for field in ("target_modules", "target_parameters"):
        assert sorted(getattr(found.config, field)) == sorted(getattr(truth.config, field))
    shapes = [
        {module: {kind: x.shape for kind, x in kinds.items()} for module, kinds in adapter.tensors.items()}
        for adapter in (found, truth)
    ]
    assert shapes[0] == shapes[1]


# all of these folders were read by PEFT 0.21.2, which found every tensor and computed the same logits
TARGETS = [  # checkpoint, targets, and the lists in adapter_config.json
    ("mixtral", EXPERTS, (), EXPERTS),
    ("mixtral", ["down_proj"], (), ("down_proj",)),
    ("mixtral", "all-linear", ("k_proj", "o_proj", "q_proj", "v_proj"), ()),
    # PEFT would take the layer out of a regular expression
    (
        "mixtral",
        r".*\.1\.mlp\.experts\..*|.*\.0\.self_attn\.v_proj",
        ("model.layers.0.self_attn.v_proj",),
        ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"),
    ),
    # some layers have no experts, and PEFT would take these names for those of experts
    (
        "qwen3_moe",
        "all-linear",
        ("k_proj", "o_proj", "q_proj", "v_proj"),
        ("down_proj.weight", "gate_proj.weight", "up_proj.weight"),
    ),
    ("qwen3_next", ["down_proj", "q_proj"], ("q_proj",), ("down_proj.weight", "down_proj")),
    (
        "qwen3_next",
        ["shared_expert.gate_proj", "shared_expert_gate"],
        ("shared_expert_gate",),
        ("shared_expert.gate_proj.weight",),
    ),
    ("granitemoehybrid_moe", ["experts.down_proj", "input_linear"], ("input_linear",), ("experts.down_proj",)),
]


@pytest.mark.parametrize(("name", "targets", "modules", "parameters"), TARGETS)
def test_targets_are_written_where_peft_looks_for_them(name, targets, modules, parameters, tmp_path):
    model = base(name)
    adapter = new_adapter(model, rank=2, targets=targets)
    assert (adapter.config.target_modules, adapter.config.target_parameters) == (modules, parameters)
    save_adapter(tmp_path, adapter)
    again = model.read_adapter(tmp_path)
    assert again.config == adapter.config and again.tensors.keys() == adapter.tensors.keys()


@pytest.mark.parametrize("options", [{"use_dora": True}, {"dropout": 0.1}])
def test_linear_layers_that_peft_would_take_for_experts_keep_their_place_with_what_parameters_cannot_have(
    options, tmp_path
):
    """PEFT refuses such a folder; jfa reads it."""
    model = base("qwen3_moe")
    adapter = new_adapter(model, rank=2, **options)
    assert "gate_proj" in adapter.config.target_modules and not adapter.config.target_parameters
    save_adapter(tmp_path, adapter)
    assert model.read_adapter(tmp_path).config == adapter.config


def test_the_experts_of_a_new_adapter_are_trained():
    """From nothing, by gradients of every tensor; the base stays as it is."""
    experts = ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=16)
    model = LanguageModel.random(dataclasses.replace(tiny_config(num_layers=1, context_length=64), experts=experts))
    trainable = Trainable(model, new_adapter(model, rank=2, targets=EXPERTS))
    start = jax.device_get(trainable.start(model))  # a step is given its own
    assert all(not np.any(kinds["lora_B"]) and np.all(kinds["lora_A"]) for kinds in start.values())
    tokens = np.random.default_rng(0).integers(3, 90, (1, 2, 24)).astype(np.int32)
    optimizer = make_optimizer(learning_rate=3e-2, num_steps=8)
    step, state = make_train_step(trainable, optimizer), new_state(trainable.start(model), optimizer)
    losses = []
    for _ in range(8):
        state, metrics = step(trainable.base, state, Batch(tokens, np.ones_like(tokens), np.ones_like(tokens)))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    for module, kinds in state.tensors.items():
        assert all(not np.array_equal(x, start[module][kind]) for kind, x in kinds.items())


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(targets=EXPERTS, use_dora=True),
            "targets: model.layers.0.mlp.experts.gate_up_proj is of experts, which cannot be trained with use_dora, as "
            "in PEFT: leave out use_dora, or the experts",
        ),
        (
            dict(targets=["q_proj", "down_proj"], dropout=0.1),
            "targets: model.layers.0.mlp.experts.down_proj is of experts, which cannot be trained with dropout=0.1, as "
            "in PEFT: leave out dropout, or the experts",
        ),
        (
            dict(targets=["q_proj", "w1"]),
            "targets: 'w1' matches no linear layer of this model and no experts; it has k_proj, lm_head, o_proj, "
            "q_proj, v_proj, experts.down_proj, experts.gate_up_proj",
        ),
        (
            dict(name="qwen3_moe", targets=r".*[.]mlp[.].*"),
            "targets: '.*[.]mlp[.].*' also matches layers.0.mlp.gate, but embeddings and routers get no new parts",
        ),
    ],
)
def test_targets_that_cannot_be_trained_are_refused(options, message):
    name, options = options.get("name", "mixtral"), {key: x for key, x in options.items() if key != "name"}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        new_adapter(base(name), rank=2, **options)
