"""Whole fine-tunes of a tiny model: interrupted and continued ones, their files, and what stops one."""

import contextlib
import dataclasses
import functools
import itertools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import GOLDEN
from tiny_model import CHAT_TEMPLATE, byte_tokenizer, folder_with_text, tiny_config

from jfa_models import LanguageModel, cli, from_pretrained
from jfa_models.training import Options, finetune, new_adapter, run
from jfa_models.training.data import read_data
from jfa_models.training.run import CHECKPOINTS, LOG_FILE

OPTIONS = Options(row_length=48, rows=2, learning_rate=5e-2, epochs=2, save_every=3, max_steps=10, seed=3)


@functools.cache
def model(quantization=None):
    made = LanguageModel.random(tiny_config(num_layers=1, context_length=128), quantization=quantization)
    made.tokenizer = dataclasses.replace(byte_tokenizer(), chat_templates={"default": CHAT_TEMPLATE})
    return made


def adapter_of(base, **options):
    return new_adapter(base, rank=4, targets=["q_proj", "down_proj", "lm_head"], **options)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a, b in itertools.product(range(8), repeat=2)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return read_data(file, model().tokenizer, max_length=48)


def log_of(folder):
    """The log without times."""
    lines = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def tensors_of(folder):
    adapter = model().read_adapter(folder)
    return {(name, kind): x for name, kinds in adapter.tensors.items() for kind, x in kinds.items()}


class _Interrupted(Exception):
    pass


def stopping_after(step):
    def on_step(done):
        if done.step == step:
            raise _Interrupted

    return on_step


def test_the_loss_falls_and_the_adapter_is_what_was_trained(data, tmp_path):
    finetune(model(), adapter_of(model()), data, tmp_path / "out", OPTIONS, eval_data=data)
    log = log_of(tmp_path / "out")
    assert [line["step"] for line in log] == list(range(1, 11))
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert [line["step"] for line in log if "eval_loss" in line] == [10]
    model().load_adapter("sums", tmp_path / "out")
    [one] = data.examples[:1]
    ids = one.ids[None]
    shift = np.abs(model().logits(ids, adapter="sums") - model().logits(ids)).max()
    model().unload_adapter("sums")
    assert shift > 0.01


def test_an_interrupted_run_goes_on_bit_for_bit(data, tmp_path):
    def go(folder, on_step=None):
        finetune(model(), adapter_of(model(), dropout=0.3), data, tmp_path / folder, OPTIONS, on_step=on_step)

    go("whole")
    for step in (1, 5, 6):  # before the first checkpoint, between two, right after one
        with pytest.raises(_Interrupted):
            go("parts", stopping_after(step))
        assert len(log_of(tmp_path / "parts")) == step
    go("parts")
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert json.loads((tmp_path / "parts" / "adapter_config.json").read_text())["lora_dropout"] == 0.3
    assert model().read_adapter(tmp_path / "parts").config.lora_dropout == 0.3
    found, wanted = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert found.keys() == wanted.keys() and all(np.array_equal(found[key], wanted[key]) for key in wanted)
    go("parts")  # finished: nothing to do, and nothing changes
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_a_folder_with_another_run_is_refused_with_the_difference(data, tmp_path):
    finetune(model(), new_adapter(model(), rank=2), data, tmp_path / "out", dataclasses.replace(OPTIONS, max_steps=1))
    differences = r"adapter, first tensors of the adapter, max_steps \(1, now 2\), seed \(3, now 4\): use another"
    with pytest.raises(ValueError, match=f"another run, which differs in {differences}"):
        other = dataclasses.replace(OPTIONS, max_steps=2, seed=4)
        finetune(model(), new_adapter(model(), rank=3), data, tmp_path / "out", other)
    fewer = dataclasses.replace(data, examples=data.examples[:5])
    with pytest.raises(ValueError, match="has another run, which differs in data"):
        one = dataclasses.replace(OPTIONS, max_steps=1)
        finetune(model(), new_adapter(model(), rank=2), fewer, tmp_path / "out", one)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_lines(data, tmp_path):
    adapter = new_adapter(model(), rank=2)
    adapter.tensors["layers.0.self_attn.q_proj"]["lora_B"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"step 1: the loss is nan .* its texts are lines \d+, .* of .*data.jsonl"):
        finetune(model(), adapter, data, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_step_without_enough_memory_names_what_needs_less(data, tmp_path, monkeypatch):
    def no_step(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nMore")

    with monkeypatch.context() as patched:
        patched.setattr(run, "make_train_step", lambda *_, **__: no_step)
        message = (
            r"step 1 needs more memory than the device has: use remat 'attention' or 'all', fewer rows with a larger "
            r"accumulate, or a smaller row_length \(RESOURCE_EXHAUSTED.* 9 bytes\.\)$"
        )
        with pytest.raises(RuntimeError, match=message):
            finetune(model(), new_adapter(model(), rank=2), data, tmp_path / "out", OPTIONS)
    # the folder has no step of that run
    less = dataclasses.replace(OPTIONS, remat="all", max_steps=1)
    finetune(model(), new_adapter(model(), rank=2), data, tmp_path / "out", less)
    assert len(log_of(tmp_path / "out")) == 1
    with pytest.raises(
        ValueError, match=r"differs in max_steps \(1, now 10\), remat \(all, now products\): use another"
    ):
        finetune(model(), new_adapter(model(), rank=2), data, tmp_path / "out", OPTIONS)


def rows_of(data, ids):
    """The data with one other text in its second place."""
    is_target = np.array([0, *[1] * (len(ids) - 1)], np.int32)
    one = dataclasses.replace(data.examples[1], ids=np.array(ids, np.int32), is_target=is_target)
    return dataclasses.replace(data, examples=(data.examples[0], one))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [5] * 49,
            "data.jsonl, line 2: the text has 49 tokens, more than a row of 48: read the file with a max_length",
        ),
        ([5, 272], "data.jsonl, line 2: token 272 is not one of the model's 272: the tokenizer is another model's"),
    ],
)
def test_texts_that_do_not_fit_are_refused_before_the_first_step(data, tmp_path, ids, message):
    wrong = rows_of(data, ids)
    for texts, eval_data in ((wrong, None), (data, wrong)):
        with pytest.raises(ValueError, match=message):
            finetune(model(), adapter_of(model()), texts, tmp_path / "out", OPTIONS, eval_data=eval_data)
    assert not (tmp_path / "out").exists()


def test_the_first_loss_is_that_of_the_model_by_hand(data, tmp_path):
    options = dataclasses.replace(OPTIONS, rows=64, max_steps=1)
    finetune(model(), adapter_of(model()), data, tmp_path / "out", options)
    losses = []
    for one in data.examples:
        likely = jax.nn.log_softmax(model().logits(one.ids[None])[0, :-1])
        losses += [-likely[i, one.ids[i + 1]] for i in range(len(one.ids) - 1) if one.is_target[i + 1]]
    [line] = log_of(tmp_path / "out")
    assert line["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert line["targets"] == len(losses) and line["tokens"] == data.num_tokens


def test_the_log_has_each_step_once_also_where_lines_were_lost(data, tmp_path):
    def go(step=None):
        with pytest.raises(_Interrupted) if step else contextlib.nullcontext():
            finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS, on_step=stopping_after(step))

    go(5)
    whole = (tmp_path / LOG_FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG_FILE).write_bytes(whole[0] + b'{"step": 2, "lo\n' + whole[2][:9])  # the checkpoint is of step 3
    go(5)
    go()
    assert [line["step"] for line in log_of(tmp_path)] == [1, *range(4, 11)]


def test_another_start_of_the_same_shape_is_another_run(data, tmp_path):
    options = dataclasses.replace(OPTIONS, max_steps=1)
    finetune(model(), adapter_of(model()), data, tmp_path, options)
    with pytest.raises(ValueError, match="which differs in first tensors of the adapter: use another"):
        finetune(model(), adapter_of(model(), seed=1), data, tmp_path, options)
    other = LanguageModel.random(model().config, seed=1)
    for base in (other, model("int8")):
        with pytest.raises(ValueError, match="which differs in weights of the model: use another"):
            finetune(base, adapter_of(model()), data, tmp_path, options)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged: delete the folder, or use another output folder"):
        finetune(model(), adapter_of(model()), data, tmp_path, options)


def test_a_second_run_in_the_folder_of_one_that_goes_on_is_refused(data, tmp_path):
    def on_step(_):
        with pytest.raises(ValueError, match=r"another run is going on in .*: wait for it, or use another folder"):
            finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS)
        raise _Interrupted

    with pytest.raises(_Interrupted):
        finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS, on_step=on_step)
    assert len(log_of(tmp_path)) == 1


def test_a_checkpoint_that_cannot_be_read_is_named_with_the_way_out(data, tmp_path):
    with pytest.raises(_Interrupted):
        finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS, on_step=stopping_after(7))
    newest = tmp_path / CHECKPOINTS / "6"
    shutil.rmtree(newest / "default")
    with pytest.raises(ValueError, match=r"checkpoints/6 cannot be read: delete this folder to go on after step 3 \("):
        finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS)
    shutil.rmtree(newest)
    finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 11))


def test_a_full_disk_leaves_the_checkpoint_before_it(data, tmp_path, monkeypatch):
    def full(manager, step, state):
        if step == 6:
            raise OSError(28, "No space left on device")
        save(manager, step, state)

    save = run._save
    monkeypatch.setattr(run, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS)
    monkeypatch.undo()
    finetune(model(), adapter_of(model()), data, tmp_path, OPTIONS)
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, 11))


def test_an_adapter_of_another_embedding_is_refused(data, tmp_path):
    copy = np.asarray(model().float32("embed.weight")) + 1.0
    adapter = new_adapter(model(), rank=2, targets=["q_proj"])
    weight = {"weight": np.array(model().float32("embed.weight")), "base": copy}
    adapter = dataclasses.replace(adapter, tensors={**adapter.tensors, "embed_tokens": weight})
    with pytest.raises(ValueError, match="the adapter was trained on another embed_tokens"):
        finetune(model(), adapter, data, tmp_path / "out", OPTIONS)


@pytest.mark.parametrize(("quantization", "options"), [("int4", {"use_dora": True}), ("int8", {"use_rslora": True})])
def test_an_adapter_is_trained_on_a_base_that_stays_quantized(data, tmp_path, quantization, options):
    base = model(quantization)
    before = [np.asarray(x) for x in _leaves(base.params)]
    finetune(base, adapter_of(base, **options), data, tmp_path / "out", OPTIONS)
    log = log_of(tmp_path / "out")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert all(np.array_equal(x, y) for x, y in zip(before, _leaves(base.params), strict=True))


def _leaves(params):
    return [np.asarray(x).view(np.uint8) if x.dtype == jnp.int4 else x for x in jax.tree.leaves(params)]


def test_a_whole_model_is_trained_and_saved(data, tmp_path):
    finetune(model(), None, data, tmp_path / "out", dataclasses.replace(OPTIONS, weight_decay=0.01, accumulate=2))
    log = log_of(tmp_path / "out")
    assert log[-1]["loss"] < log[0]["loss"]
    trained = from_pretrained(tmp_path / "out", dtype="float32")
    assert any(not np.array_equal(x, y) for x, y in zip(trained.params, model().params, strict=True))
    assert trained.tokenizer is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"rows": 1.5}, "rows must be an integer of at least 1, got 1.5"),
        ({"learning_rate": -1}, "learning_rate must be a number of at least 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number of at least 0, got nan"),
        ({"warmup": 2}, "warmup is a fraction of all steps, at most 1, got 2"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0, or None, got 0"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Options(**options)


@pytest.fixture
def jfa(monkeypatch, capfd, own_cache):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jfa", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capfd.readouterr()

    return run


def test_the_command_trains_and_says_how_to_use_the_result(jfa, data, tmp_path):
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "model")
    common = ("--model", folder, "--data", data.path, "--max-length", 48, "--rows", 4, "--rank", 2, "--max-steps", 3)
    more = ("--target", "q_proj", "--eval-fraction", 0.1, "--plot", tmp_path / "curve.png")
    status, out, err = jfa("finetune", *common, *more, "--output", tmp_path / "out")
    assert status == 0 and out == ""
    assert "training: " in err and "58 texts" in err and "evaluation: " in err and "step 3 of 3: loss " in err
    assert f"jfa generate --model {folder} --adapter {tmp_path / 'out'}" in err
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = jfa("generate", "1+1=", "--model", folder, "--adapter", tmp_path / "out", "--max-tokens", 3)
    assert status == 0 and out.startswith("1+1=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full", "--rank", "4"], "--rank belongs to a new adapter: leave out --full"),
        (["--full", "--lora-dropout", "0.1"], "--lora-dropout belongs to a new adapter: leave out --full"),
        (["--dora", "--lora-dropout", "0.1"], "--lora-dropout cannot be used with --dora: use one of them"),
        (["--full", "--dora"], "--dora belongs to a new adapter: leave out --full"),
        (["--full", "--adapter", "x"], "--full trains all parameters, --adapter those of an adapter: use one of them"),
        (["--full", "--quantization", "int4"], "--full trains floats: leave out --quantization int4"),
        (["--eval-data", "DATA", "--eval-fraction", "0.1"], "both choose the evaluation's texts"),
        (["--eval-every", "2"], "--eval-every needs --eval-data or --eval-fraction"),
        (["--plot", "curve.gif"], "--plot must be a .png, .svg or .pdf file"),
        (["--plot", "MISSING/curve.png"], "missing does not exist or is not writable"),
        (["--max-length", "1000"], "--max-length 1000 is more than the model's"),
        (["--target", "nothing"], "targets: 'nothing' matches no linear layer"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(jfa, data, tmp_path, arguments, message):
    folder = folder_with_text(GOLDEN / "llama3", tmp_path / "model")
    places = {"DATA": data.path, "MISSING/curve.png": tmp_path / "missing" / "curve.png"}
    arguments = [str(places.get(one, one)) for one in arguments]
    short = () if "--max-length" in arguments else ("--max-length", 48)
    status, _, err = jfa(
        "finetune", "--model", folder, "--data", data.path, "--output", tmp_path / "o", *arguments, *short
    )
    assert status == 2 and message in err
