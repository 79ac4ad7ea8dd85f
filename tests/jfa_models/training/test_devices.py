"""Training over a mesh: the steps are those of one device, and what is trained is divided while it rests."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
from golden import GOLDEN
from jax.sharding import NamedSharding, PartitionSpec
from runs import run
from tiny_model import counted_compilations, folder_with_text, tiny_config

from jfa_bench.proof import aot, by_xla
from jfa_models import LanguageModel, from_pretrained
from jfa_models.checkpoints.presets import preset
from jfa_models.decoding.language_model import abstract_decoder, named_leaves
from jfa_models.model.config import ExpertsConfig
from jfa_models.model.partition import partition_of
from jfa_models.training import Options, finetune
from jfa_models.training.data import read_data
from jfa_models.training.lora import new_adapter
from jfa_models.training.step import (
    Batch,
    Trainable,
    TrainState,
    loss_fn,
    make_optimizer,
    make_train_step,
    new_state,
)

CONFIG = dataclasses.replace(
    tiny_config(num_layers=2, context_length=64), num_q_heads=8, num_kv_heads=4, vocab_size=128
)
# of so many experts that tokens would go to them in several rounds
EXPERTS = dataclasses.replace(CONFIG, experts=ExpertsConfig(num_experts=8, experts_per_token=2, intermediate_size=16))


def mesh_of(**sizes):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=jax.devices()[:count])


def trained(mesh, *, lora, rows=4, config=CONFIG, **options):
    """The metrics of two steps, and the state after them."""
    model = LanguageModel.random(config, dtype="float32", mesh=mesh)
    adapter = new_adapter(model, rank=4, **options) if lora else None
    trainable = Trainable(model, adapter, remat="attention")
    optimizer = make_optimizer(learning_rate=1e-2, num_steps=4)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, rows, 34)).astype(np.int32)
    is_target = np.ones_like(tokens)
    is_target[:, 0, :9] = 0  # replicas have different numbers of targets
    segments = np.broadcast_to(np.arange(34) // 11, tokens.shape)
    batch = Batch(tokens, segments, is_target)
    step, state = make_train_step(trainable, optimizer), new_state(trainable.start(model), optimizer)
    state, metrics = step(trainable.base, state, batch)
    with counted_compilations() as count:
        state, more = step(trainable.base, state, batch)
    assert not count
    return [{name: float(x) for name, x in one.items()} for one in (metrics, more)], state


def test_devices_with_the_same_inputs_drop_the_same_numbers():
    """Each of two devices has half of the heads of q, and all inputs."""
    options = dict(lora=True, targets=["q_proj"], dropout=0.4)
    (alone, _), (divided, _) = (trained(mesh, **options) for mesh in (None, mesh_of(tensor=2)))
    for one, other in zip(alone, divided, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


CASES = [
    run("full", dict(data=2, tensor=2, context=2), quick=True),
    run("moe", dict(expert=2, context=2), quick=True),
    run("moe", dict(data=2, expert=4), quick=False, soak=True),
    run("full", dict(data=2, tensor=4), quick=False, soak=True),
    run("lora", dict(context=2), quick=False, soak=True),
    run("lora", dict(data=2, tensor=2), quick=False, soak=True),
    run("full", dict(data=8), quick=False, soak=True),
    run("full", dict(tensor=8), quick=False, soak=True),
    run("lora", dict(data=4), quick=False, soak=True),
    run("moe_lora", dict(expert=2, context=2), quick=False, soak=True),
    run("moe_lora", dict(tensor=2), quick=False, soak=True),
]


@pytest.mark.parametrize(("kind", "sizes"), CASES)
def test_steps_are_those_of_one_device(kind, sizes):
    rows = max(4, sizes.get("data", 1))
    options = dict(lora=kind.endswith("lora"), rows=rows, config=EXPERTS if kind.startswith("moe") else CONFIG)
    if kind == "moe_lora":
        options |= dict(targets=["experts.gate_up_proj", "experts.down_proj", "q_proj"])
    (want, alone), (got, state) = (trained(mesh, **options) for mesh in (None, mesh_of(**sizes)))
    for one, other in zip(want, got, strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    for one, other in zip(jax.tree.leaves(alone.tensors), jax.tree.leaves(state.tensors), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)  # a fifth of a step: Adam divides rounding by itself
    if kind == "full":
        whole = sum(x.nbytes for x in jax.tree.leaves((state.tensors, state.optimizer)))
        own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.tensors, state.optimizer)))
        parts = sizes.get("data", 1) * sizes.get("tensor", 1)
        assert own < 1.2 * whole / parts  # pairs of devices may have the same key head


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_card_has_all_of_one_block_at_a_time(tmp_path):
    """By the program for eight cards. Where products take no longer than gathers, XLA starts many of these early."""
    if reason := by_xla.why_not("rocm"):
        pytest.skip(reason)

    def temporary_bytes(layers):
        config = preset("llama-3-8b").with_layers(layers)
        mesh = jax.sharding.Mesh(np.asarray(by_xla.devices("gfx942", 8)), ("data",))
        decoder = abstract_decoder(config, "bfloat16", partition=partition_of(config, mesh))
        params = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in named_leaves(decoder).values())
        trainable = Trainable(LanguageModel(decoder=decoder, params=params), None, remat="all")
        mesh, optimizer = trainable.partition.mesh, make_optimizer(learning_rate=1e-2, num_steps=4)

        def placed(path, x):
            name = next((key.key for key in path if getattr(key, "key", None) in trainable._specs), None)
            spec = PartitionSpec() if name is None else trainable.partition.at_rest(trainable._specs[name], x.shape)[0]
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        names = list(named_leaves(decoder))
        tensors = {name: jax.ShapeDtypeStruct(x.shape, np.float32) for name, x in zip(names, params, strict=True)}
        state = TrainState(jax.ShapeDtypeStruct((), np.int32), tensors, jax.eval_shape(optimizer.init, tensors))
        rows = jax.ShapeDtypeStruct((1, 8, 2048), np.int32)
        given = jax.tree.map_with_path(placed, (state, Batch(rows, rows, rows)))
        with aot.target("gfx942", mesh):
            lowered = make_train_step(trainable, optimizer).trace(None, *given).lower()
        compiled = by_xla.compile_lowered(lowered, tmp_path, arch="gfx942")
        return compiled.memory_analysis().temp_size_in_bytes, sum(2 * x.size for x in params)

    (few, of_few), (many, of_many) = map(temporary_bytes, (2, 4))
    assert many - few < 0.4 * (of_many - of_few)  # an eighth of the gradients, in 16 bits and in 32


class _Interrupted(Exception):
    pass


@pytest.mark.exhaustive
@pytest.mark.soak
def test_a_run_goes_on_where_it_stopped(tmp_path):
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "model")
    model = from_pretrained(folder, dtype="float32", mesh=mesh_of(data=2, tensor=2))
    lines = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(32)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = read_data(tmp_path / "data.jsonl", model.tokenizer, max_length=32)
    options = Options(row_length=32, rows=2, save_every=2, epochs=3)

    def stop(done):
        if done.step == 3:
            raise _Interrupted

    finetune(model, None, data, tmp_path / "whole", options)
    with contextlib.suppress(_Interrupted):
        finetune(model, None, data, tmp_path / "parts", options, on_step=stop)
    finetune(model, None, data, tmp_path / "parts", options)
    whole, parts = (from_pretrained(tmp_path / name, dtype="float32") for name in ("whole", "parts"))
    for one, other in zip(whole.params, parts.params, strict=True):
        np.testing.assert_array_equal(one, other)


def test_rows_that_replicas_cannot_share():
    model = LanguageModel.random(CONFIG, dtype="float32", mesh=mesh_of(data=2))
    trainable, tokens = Trainable(model, None), np.zeros((3, 8), np.int32)
    with pytest.raises(ValueError, match="3 rows cannot be divided by 2 replicas: use a multiple"):
        loss_fn(trainable, trainable.base, trainable.start(model), tokens, tokens, tokens)


def test_dora_over_divided_rows_is_refused():
    with pytest.raises(ValueError, match="DoRA needs the norms of whole rows of weights"):
        trained(mesh_of(tensor=2), lora=True, use_dora=True)
