"""What two processes do with one model through Python: save it, share a batch, compare values."""

import json

import pytest
from together import ended, started_together

from jfa_models import SamplingParams, batch
from jfa_models.engine import engine_of
from jfa_models.model.groups import own_group

MODELS = """
import dataclasses

from jfa_models import LanguageModel
from jfa_models.model.config import DecoderConfig, ExpertsConfig
from jfa_models.model.rope import RopeConfig

DENSE = DecoderConfig(
    vocab_size=64, hidden_size=64, intermediate_size=256, num_layers=1, num_q_heads=4, num_kv_heads=2, head_dim=64,
    context_length=64, norm_eps=1e-5, rope=RopeConfig(theta=1e4),
)
EXPERTS = ExpertsConfig(num_experts=2, experts_per_token=1, intermediate_size=256)
CONFIGS = dict(dense=DENSE, experts=dataclasses.replace(DENSE, architecture="mixtral", experts=EXPERTS))

def saved(kinds, mesh_of=lambda axis: None):
    for name in kinds:
        config, axis, kind = name.split("-")
        options = dict(dtype="bfloat16", quantization=kind if kind != "floats" else None, mesh=mesh_of(axis))
        LanguageModel.random(CONFIGS[config], **options).save_pretrained(name)
"""
# model, axis of two devices, one of each process; of "data" each has a whole model
SAVED = ["dense-tensor-floats", "experts-expert-int4", "dense-data-floats"]
MORE = ["dense-tensor-int8", "dense-tensor-fp8", "dense-tensor-int4"]

PROGRAM = """
import json
from pathlib import Path

import jax
import pytest

from jfa_models import LLM, SamplingParams, batch
from jfa_models.engine import engine_of
from jfa_models.engine.shares import Shares
from jfa_models.training.step import Trainable

def mesh_of(axis):
    return jax.make_mesh((2,), (axis,))

own = processes.index()
saved({kinds}, mesh_of)
told = dict(smallest=processes.smallest(2**40 + own))

def error(name, call, *given, **named):
    try:
        call(*given, **named)
    except Exception as error:
        told[name] = type(error).__name__ + ": " + str(error)

error("long", processes.check_equal, dict(same="x" * 100_000, text="y" * 100_000 + "yz"[own]))
model = LanguageModel.random(DENSE, dtype="float32", mesh=mesh_of("tensor"))
Path("file").touch()
error("a file", model.save_pretrained, "file")

Path("partly/model.safetensors.part").mkdir(parents=True, exist_ok=True)
error("disk", model.save_pretrained, "partly")

def fails():
    with processes.in_all():
        if own == 1:
            raise ValueError("no room")

error("second", fails)
replicas = LanguageModel.random(DENSE, dtype="float32", mesh=mesh_of("data"))
told["groups"] = replicas.partition.group, replicas.partition.num_groups, replicas.partition.is_first_of_group
error("llm", LLM, replicas)
error("training", Trainable, replicas, None)
lines, params = batch.read(Path({lines!r})), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
engine = engine_of(replicas, max_num_seqs=2)
error("no shares", lambda: list(batch.run(engine, lines, Path("none.jsonl"), params)))
shares = Shares("127.0.0.1")
told["yielded"] = [one["line"] for one in batch.run(engine, lines, Path("out.jsonl"), params, shares=shares)]
Path(f"told{{own}}.json").write_text(json.dumps(told))
"""


def run_in_two(folder, program):
    done = ended(started_together(MODELS + program, folder, 2))
    assert [code for *_, code in done] == [0, 0], done[0][1] + done[1][1]


def check_saved(folder, kinds, monkeypatch):
    """As one process saves the same models."""
    alone = folder / "alone"
    alone.mkdir()
    monkeypatch.chdir(alone)
    exec(MODELS + f"\nsaved({kinds})", {})
    for name in kinds:
        files = sorted(file.name for file in (alone / name).iterdir())
        assert files == sorted(file.name for file in (folder / name).iterdir()) and "model.safetensors" in files
        for file in files:
            assert (folder / name / file).read_bytes() == (alone / name / file).read_bytes(), (name, file)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a program that two processes have run, and what each has told."""
    folder = tmp_path_factory.mktemp("two")
    lines = [dict(prompt_token_ids=[9, 8, 7, 6, 5, 4][: 2 + i]) for i in range(5)] + [dict(prompt=7)]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_in_two(folder, PROGRAM.format(kinds=SAVED, lines=str(folder / "in.jsonl")))
    return folder, [json.loads((folder / f"told{i}.json").read_text()) for i in range(2)]


def test_a_saved_model_has_the_bytes_that_one_process_writes(two, monkeypatch):
    check_saved(two[0], SAVED, monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.soak
def test_every_quantized_kind_is_saved(tmp_path, monkeypatch):
    run_in_two(tmp_path, f"import jax\nsaved({MORE}, lambda axis: jax.make_mesh((2,), (axis,)))")
    check_saved(tmp_path, MORE, monkeypatch)


def test_an_error_of_one_process_is_raised_in_both(two):
    folder, (first, second) = two
    assert (first["second"], second["second"]) == ("RuntimeError: process 1: no room", "ValueError: no room")
    assert first["disk"].startswith("IsADirectoryError") and "process 0: [Errno 21]" in second["disk"]
    assert not (folder / "partly" / "model.safetensors").exists()
    assert first["a file"] == "ValueError: file is a file; pass a folder to save into"
    assert second["a file"] == "RuntimeError: process 0: file is a file; pass a folder to save into"


def test_values_of_any_length_are_compared(two):
    for told in two[1]:
        assert told["smallest"] == 2**40
        assert told["long"].startswith("ValueError: process 1 has text='yyy") and "yyz'" in told["long"]


def test_replicas_of_two_processes_share_a_batch(two):
    folder, (first, second) = two
    assert (first["groups"], second["groups"]) == ([0, 2, True], [1, 2, True])
    assert sorted(first["yielded"]) == [1, 2, 3, 4, 5, 6] and sorted(second["yielded"]) == [2, 4, 6]
    lines = batch.read(folder / "in.jsonl")
    assert batch.done(folder / "out.jsonl", lines) == {1, 2, 3, 4, 5, 6} and not (folder / "none.jsonl").exists()
    found = [json.loads(text) for text in (folder / "out.jsonl").read_text().splitlines()]
    assert len(found) == 6
    model: dict = {}
    exec(MODELS + 'one = LanguageModel.random(DENSE, dtype="float32")', model)
    engine = engine_of(model["one"], max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    alone = batch.run(engine, lines, folder / "alone.jsonl", params)
    assert sorted(found, key=lambda one: one["line"]) == sorted(alone, key=lambda one: one["line"])


REFUSED = {
    "llm": "ValueError: 2 groups of processes have replicas of the model, and each would run all prompts: use a mesh "
    "without the axis 'data' here, or run a file of prompts",
    "training": "ValueError: training is of one process: use a mesh of its own devices, jax.local_devices()",
    "no shares": "ValueError: 2 groups of processes have replicas of the model: their results need shares=Shares(HOST)",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_replicas_of_several_processes_cannot_do_is_refused(two, name):
    for told in two[1]:
        assert told[name].startswith(REFUSED[name])


GROUPS = [  # the processes of each replica, this one; its replicas, group, and how many groups
    ([{0}, {0}], 0, ([0, 1], 0, 1)),
    ([{0, 1}], 1, ([0], 0, 1)),
    ([{0}, {0}, {1}, {1}], 1, ([2, 3], 1, 2)),
    ([{0, 1}, {2, 3}, {4, 5}], 3, ([1], 1, 3)),
]
NO_GROUPS = [
    (
        [{0}, {0}],
        1,
        "process 1 has no device of the mesh, which has those of processes 0: start fewer processes,",
    ),
    (
        [{0, 1}, {0, 1}],
        0,
        "replica 0 .* is on processes 0, 1, and replica 1 on 0, 1: a process can have whole",
    ),
    ([{0, 1}, {1, 2}], 0, "replica 0 .* is on processes 0, 1, and replica 1 on 1, 2: .* name the axis 'data' first"),
    (
        [{0}, {0}, {1}],
        0,
        "process 0 has 2 of the 3 replicas of the axis 'data', and 1 has 1: give all as many",
    ),
]


@pytest.mark.parametrize(("places", "process", "found"), GROUPS)
def test_replicas_are_grouped_by_processes(places, process, found):
    assert own_group([*map(frozenset, places)], process) == found


@pytest.mark.parametrize(("places", "process", "message"), NO_GROUPS)
def test_replicas_that_cannot_be_grouped(places, process, message):
    with pytest.raises(ValueError, match=message):
        own_group([*map(frozenset, places)], process)
