"""Loss, gradients and updates: those that PEFT and torch compute, and the same however texts are packed."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import GOLDEN
from runs import run
from tiny_model import tiny_config

from jfa_models import LanguageModel, from_pretrained
from jfa_models.checkpoints.lora_config import LoraConfig
from jfa_models.checkpoints.peft import Adapter, save_adapter
from jfa_models.model.lora import Applied, Change, Dropout
from jfa_models.training import Batch, Trainable, loss_fn, make_optimizer, make_train_step, new_adapter, new_state

ADAPTERS = GOLDEN / "adapters"
WITH_GRADIENTS = [
    "lora",
    "rslora",
    "dora",
    "dora_embedding",
    "lora_bias",
    "embeddings",
    "modules_to_save",
    "trainable_tokens",
    "phi3",
]
FIRST_TARGET = 9  # the archives leave out the first eight predictions of each row


@functools.cache
def base(name, **options):
    return from_pretrained(GOLDEN / name, dtype="float32", **options)


def golden(name):
    """(model, adapter, archive)"""
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    model = base(config["base_model_name_or_path"])
    return model, model.read_adapter(ADAPTERS / name), dict(np.load(ADAPTERS / f"{name}.npz"))


def targets_of(ids):
    wanted = np.ones_like(ids)
    wanted[:, :FIRST_TARGET] = 0
    return wanted


def mean_loss(trainable, tensors, ids, wanted):
    segments = np.ones_like(ids)
    return loss_fn(trainable, trainable.base, tensors, ids, segments, wanted) / wanted[:, 1:].sum()


def by_peft_names(adapter, tensors, folder):
    """The tensors as save_adapter writes them."""
    from safetensors.numpy import load_file

    save_adapter(folder, dataclasses.replace(adapter, tensors=jax.device_get(tensors)))
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        *(run(name, "none", quick=name in ("lora", "dora", "phi3", "embeddings")) for name in WITH_GRADIENTS),
        run("granite", "none", quick=False, soak=True),
        run("lora", "attention", quick=False),
        run("dora", "all", quick=True),
        run("phi3", "products", quick=True),
    ],
)
def test_gradients_and_a_step_of_adamw_are_those_of_torch(name, remat, tmp_path):
    model, adapter, truth = golden(name)
    trainable = Trainable(model, adapter, remat=remat)
    tensors, ids = trainable.start(model), truth["input_ids"]
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: mean_loss(trainable, x, ids, targets_of(ids))))
    loss, grads = value_and_grad(tensors)
    np.testing.assert_allclose(loss, truth["loss"], rtol=1e-5)
    found = by_peft_names(adapter, grads, tmp_path / "grads")
    wanted = {key.removeprefix("grad/"): x for key, x in truth.items() if key.startswith("grad/")}
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        assert np.abs(found[key] - x).max() <= 1e-4 * np.abs(x).max(), key

    optimizer = optax.adamw(1e-2, 0.9, 0.999, eps=1e-8, weight_decay=0.01)
    updates, _ = optimizer.update(grads, optimizer.init(tensors), tensors)
    stepped = by_peft_names(adapter, optax.apply_updates(tensors, updates), tmp_path / "stepped")
    for key, x in wanted.items():
        is_clear = np.abs(x) > 1e-5  # the first step is the gradient's sign, whose noise would decide it otherwise
        np.testing.assert_allclose(stepped[key][is_clear], truth[f"stepped/{key}"][is_clear], rtol=0, atol=1e-4)


def tiny(quantization=None, seed=0):
    return LanguageModel.random(tiny_config(num_layers=2, context_length=128), seed=seed, quantization=quantization)


def texts(count, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 200, generator.integers(3, 20)).astype(np.int32) for _ in range(count)]


def packed(rows, length):
    """tokens, segments and targets of rows of texts; the first two tokens of each are its prompt."""
    tokens, segments, wanted = np.zeros((3, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        end = 0
        for number, text in enumerate(row, start=1):
            place = slice(end, end + len(text))
            tokens[i, place], segments[i, place], wanted[i, place] = text, number, np.arange(len(text)) > 1
            end += len(text)
    return tokens, segments, wanted


def noisy(tensors, seed=1):
    """lora_B starts at zero, which hides lora_A."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * generator.standard_normal(x.shape).astype(np.float32), tensors)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_packed_texts_have_the_loss_and_the_gradients_that_each_has_alone(quantization):
    model = tiny(quantization)
    trainable = Trainable(model, new_adapter(model, rank=3))
    tensors = noisy(trainable.start(model))
    found = texts(7)
    value_and_grad = jax.jit(jax.value_and_grad(functools.partial(loss_fn, trainable, trainable.base)))
    loss, grads = value_and_grad(tensors, *packed([found[:4], found[4:]], 90))
    alone = [value_and_grad(tensors, *packed([[one]], 24)) for one in found]
    np.testing.assert_allclose(loss, sum(one for one, _ in alone), rtol=1e-5)
    summed = functools.reduce(lambda x, y: jax.tree.map(jnp.add, x, y), [each for _, each in alone])
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max() + 1e-6)


@pytest.mark.parametrize("is_full", [False, True], ids=["adapter", "full"])
def test_many_blocks_of_logits_give_the_loss_and_the_gradient_of_one(is_full, monkeypatch):
    model = tiny()
    trainable = Trainable(model, None if is_full else new_adapter(model, rank=2, targets=["q_proj", "lm_head"]))
    tensors = noisy(trainable.start(model))
    rows = packed([texts(4), texts(5, 1)], 100)  # the last blocks have no target

    def found():
        both = jax.value_and_grad(lambda x: 0.5 * loss_fn(trainable, trainable.base, x, *rows))(tensors)
        assert float(loss_fn(trainable, trainable.base, tensors, *rows)) == pytest.approx(2 * float(both[0]), rel=1e-6)
        return both

    whole = found()
    monkeypatch.setattr("jfa_models.training.step.LOSS_ROWS", 16)
    for x, y in zip(jax.tree.leaves(found()), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * np.abs(y).max())


def test_accumulated_parts_give_the_step_of_one_large_batch():
    model = tiny()
    rows = packed([[one] for one in texts(4)], 24)
    states = []
    for parts in (1, 4):
        trainable = Trainable(model, new_adapter(model, rank=2))
        optimizer = make_optimizer(learning_rate=1e-2, num_steps=10, max_grad_norm=None)
        state = new_state(noisy(trainable.start(model)), optimizer)
        batch = Batch(*(x.reshape(parts, 4 // parts, 24) for x in rows))
        state, metrics = make_train_step(trainable, optimizer)(trainable.base, state, batch)
        states.append((state, metrics))
    (one, metrics), (other, other_metrics) = states
    assert int(one.step) == int(other.step) == 1
    assert int(metrics["targets"]) == int(other_metrics["targets"])
    np.testing.assert_allclose(metrics["loss"], other_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], other_metrics["grad_norm"], rtol=1e-4)


def test_a_new_adapter_changes_nothing_and_dora_starts_with_the_norms_of_the_rows():
    model, ids = tiny(), np.arange(24).reshape(2, 12)
    for options in ({}, {"use_dora": True}, {"use_rslora": True, "targets": ["q_proj", "lm_head"]}):
        adapter = new_adapter(model, rank=4, **options)
        model.load_adapter("new", adapter)
        np.testing.assert_allclose(model.logits(ids, adapter="new"), model.logits(ids), atol=1e-5)
        model.unload_adapter("new")
    assert set(adapter.tensors) == {"layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "lm_head"}


def test_all_parameters_can_be_trained_and_every_one_gets_a_gradient():
    model = tiny()
    trainable = Trainable(model, None)
    tensors = trainable.start(model)
    assert set(tensors) == set(model.names) and trainable.base is None
    grads = jax.jit(jax.grad(functools.partial(loss_fn, trainable, None)))(tensors, *packed([texts(3)], 60))
    assert all(np.abs(x).max() > 0 for x in grads.values())


def test_an_adapter_of_single_experts_is_trained(tmp_path):
    model, random = base("mixtral"), np.random.default_rng(0)
    (_, inner, hidden), tensors = model.shapes["layers.0.mlp.gate.weight"], {}
    for expert, rank in ((0, 2), (1, 3)):
        a, b = (random.normal(0, 0.1, shape).astype(np.float32) for shape in ((rank, hidden), (inner, rank)))
        for layer in range(model.config.num_layers):
            tensors[f"layers.{layer}.block_sparse_moe.experts.{expert}.w1"] = {"lora_A": a, "lora_B": b}
    config = LoraConfig(r=2, rank_pattern={"experts.1.w1": 3}, target_modules=("w1",))
    save_adapter(tmp_path, Adapter(config=config, tensors=tensors))
    model.load_adapter("experts", tmp_path)
    trainable = Trainable(model, model.read_adapter(tmp_path))
    ids = random.integers(0, model.config.vocab_size, (2, 12)).astype(np.int32)
    wanted = targets_of(ids)
    found, grads = jax.value_and_grad(mean_loss, argnums=1)(trainable, trainable.start(model), ids, wanted)
    likely = jax.nn.log_softmax(model.logits(ids, adapter="experts")[:, :-1])
    by_hand = -np.take_along_axis(np.asarray(likely), ids[:, 1:, None], axis=-1)[..., 0][wanted[:, 1:] > 0].mean()
    model.unload_adapter("experts")
    assert float(found) == pytest.approx(float(by_hand), rel=1e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))


def test_weight_decay_spares_vectors():
    optimizer = make_optimizer(learning_rate=1.0, num_steps=2, weight_decay=0.1, max_grad_norm=None)
    tensors = {"matrix": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tensors), optimizer.init(tensors), tensors)
    assert float(jnp.abs(updates["norm"]).max()) == 0 and float(updates["matrix"][0, 0]) < 0


@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_the_first_step_of_a_warm_up_has_its_part_of_the_learning_rate(warmup_steps):
    optimizer = make_optimizer(learning_rate=1.0, num_steps=8, warmup_steps=warmup_steps)
    tensors = {"x": jnp.zeros(3)}
    state, sizes = optimizer.init(tensors), []
    for _ in range(8):  # of a constant gradient, the size of AdamW's update is the learning rate
        updates, state = optimizer.update({"x": jnp.ones(3)}, state, tensors)
        sizes.append(-float(updates["x"][0]))
    rises = [0.25, 0.5, 0.75] if warmup_steps == 4 else []
    assert sizes[: len(rises) + 1] == pytest.approx([*rises, 1.0], abs=1e-4)
    assert sizes[len(rises) :] == sorted(sizes[len(rises) :], reverse=True) and sizes[-1] > 0.1


# Dropout of the inputs of low-rank parts


def test_dropout_zeroes_its_part_of_the_numbers_and_scales_the_others():
    x = jnp.ones((200, 300))
    dropout = Dropout(jnp.array([7, 8], jnp.uint32), 0.25)
    found = np.asarray(dropout(x))
    assert set(np.unique(found).tolist()) == {0.0, float(np.float32(4 / 3))}
    assert abs((found == 0).mean() - 0.25) < 0.01
    others = [np.asarray(other(x)) for other in (dropout.at(0), dropout.at(1), dropout.at(1).at(1))]
    for one, other in itertools.combinations([found, *others], 2):  # independent of one another
        assert abs(((one == 0) & (other == 0)).mean() - 0.25**2) < 0.01


def test_dropout_changes_low_rank_parts_alone_and_its_gradient_is_that_of_what_was_kept():
    x, dropout = jnp.ones((2, 3, 8)), Dropout(jnp.array([1, 2], jnp.uint32), 0.5)
    change = Change(a=jnp.ones((1, 2, 8)), b=jnp.ones((1, 2, 5)))
    applied = Applied(change, jnp.ones((2, 3, 1)), dropout)
    kept = np.asarray(dropout.at(0)(x))
    y, gradient = jax.vjp(lambda x: applied.product(x, jnp.full((2, 3, 5), 100.0)), x)
    np.testing.assert_allclose(y, 100 + np.broadcast_to(2 * kept.sum(-1, keepdims=True), y.shape))
    np.testing.assert_allclose(gradient(jnp.ones_like(y))[0], 10 * kept)
    assert not np.array_equal(applied.product(x, y, part=1), applied.product(x, y))


def test_what_is_dropped_depends_on_the_seed_the_step_and_the_part_alone():
    model = LanguageModel.random(tiny_config(num_layers=1, context_length=128))
    rows = packed([texts(4)], 64)
    adapter = new_adapter(model, rank=2, targets=["q_proj", "down_proj", "lm_head"], dropout=0.5)
    trainable = Trainable(model, adapter, remat="all")
    base, tensors = trainable.base, noisy(trainable.start(model))

    @jax.jit
    def loss(seed, step, part):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return loss_fn(trainable, base, tensors, *rows, jax.random.fold_in(key, part))

    found = [float(loss(*each)) for each in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0))]
    assert len(set(found)) == 4 and found[0] == found[4]
    assert float(jax.jit(functools.partial(loss_fn, trainable, base))(tensors, *rows)) not in found

    optimizer = make_optimizer(learning_rate=0.0, num_steps=9)
    batch = Batch(*(np.stack([x, x]) for x in rows))  # two equal parts
    _, metrics = make_train_step(trainable, optimizer)(base, new_state(tensors, optimizer), batch)
    assert float(metrics["loss"] * metrics["targets"]) == pytest.approx(found[0] + found[1], rel=1e-5)


def _of_experts_with_dropout(_):
    model = base("mixtral")
    adapter = model.read_adapter(ADAPTERS / "mixtral")
    return Trainable(model, dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, lora_dropout=0.1)))


def _dora_with_dropout(model):
    adapter = new_adapter(model, use_dora=True)
    return Trainable(model, dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, lora_dropout=0.1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: new_adapter(model, dropout=1.0), "dropout must be a number of at least 0 and below 1, got 1.0"),
        (lambda model: new_adapter(model, dropout=float("nan")), "dropout must be a number of at least 0 .* got nan"),
        (
            lambda model: new_adapter(model, dropout=0.1, use_dora=True),
            "dropout=0.1 cannot be used with use_dora: PEFT",
        ),
        (_dora_with_dropout, "lora_dropout=0.1 of the adapter cannot be trained with use_dora: PEFT drops inputs"),
        (_of_experts_with_dropout, "lora_dropout=0.1 .* changes of experts such as layers.0.mlp.experts.* set it to 0"),
        (lambda model: new_adapter(model, rank=0), "rank must be an integer >= 1, got 0"),
        (
            lambda model: new_adapter(model, targets=["q_proj", "qq"]),
            "targets: 'qq' matches no linear layer of this model",
        ),
        (lambda model: new_adapter(model, targets="nothing.*"), "targets: 'nothing.*' matches no linear layer"),
        (
            lambda model: new_adapter(model, targets=["layers.0.self_attn.q_proj", "layers.9.self_attn.q_proj"]),
            "targets: 'layers.9.self_attn.q_proj' matches no linear layer",
        ),
        (lambda model: new_adapter(model, targets="(?s:.+)"), "also matches embed_tokens, but embeddings and routers"),
        (lambda model: new_adapter(model, alpha=0), "alpha must be a number above 0, got 0"),
        (lambda model: new_adapter(model, alpha=float("nan")), "alpha must be a number above 0, got nan"),
        (
            lambda model: Trainable(model, None, remat="some"),
            "remat must be one of none, products, attention, all, got 'some'",
        ),
        (lambda _: Trainable(tiny("int8"), None), "quantized weights such as .* cannot be trained"),
    ],
)
def test_what_cannot_be_trained_is_refused(call, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*") if "nothing" in message else message):
        call(tiny())
