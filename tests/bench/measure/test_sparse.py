"""`jfa-bench sparse` and `linear`: their records, and that wrong results are not timed."""

import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import jfa
from jfa_bench import cli, names
from jfa_bench.measure import attention, linear, peers, roofline, sparse

SPARSE = ("sparse", "--seq-len", 64, "--block", 8, "--heads", 2, "--head-dim", 16, "--samples", 2)
LINEAR = ("linear", "--heads", 4, "--key-dim", 16, "--value-dim", 8, "--samples", 2)
CASE = attention.Case(batch=1, length=100, heads=2, kv_heads=1, head_dim=16, dtype="float32", causal=True)


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr(roofline, "ceilings", lambda dtype, *, clock: {"matrix_tflops": 2.0, "copy_gb_per_s": 10.0})


def run(*arguments):
    return CliRunner().invoke(cli.commands, [*map(str, arguments)])


def records(*arguments):
    done = run(*arguments, "-o", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_record_of_dense_attention_and_one_for_each_density():
    found = records(
        *SPARSE, "--kv-heads", 1, "--density", "0.5,0.2", "--mask", "window", "--implementation", "dense,xla"
    )
    assert [(r["case"]["direction"], r["implementation"], r["case"]["density"]) for r in found] == [
        (direction, name, density)
        for direction in ("forward", "backward")
        for name, density in (("dense", 1.0), ("xla", 0.5), ("xla", 0.2))
    ]
    for r in found:
        assert r["status"] == "ok" and len(r["samples_ms"]) == 2 and 0 < r["max_error"] < 1e-5
        times = {"forward": 1, "backward": 2.5}[r["case"]["direction"]]
        assert r["flop"] == pytest.approx(4 * 64**2 * 2 * 16 * 0.5 * times * r["visited"])
        assert r["implementation"] == "dense" or r["config"] == {"backend": "xla", "forward": None}
    dense, half, fifth = found[:3]
    assert dense["visited"] == dense["speedup"] == 1 and abs(half["visited"] - 0.5) < 0.1
    # the smallest window has, of 36 tiles, the 8 on the diagonal and the 7 others with the sinks
    assert fifth["visited"] == pytest.approx(15 / 36)


@pytest.mark.parametrize("kind", names.SPARSE_MASKS)
def test_masks_have_the_asked_number_of_tiles(kind):
    few = sparse.mask_of(kind, CASE, 0.4, 8)
    assert sparse.visited_share(few) == pytest.approx(0.4, abs=0.08)
    rows = attention.checked_rows(CASE)
    seen = np.asarray(few.to_array())[:, :, rows] & (rows[:, None] >= np.arange(100))
    assert np.array_equal(np.broadcast_to(sparse._seen(few, CASE), seen.shape), seen)


def test_a_density_of_1_is_all_tiles():
    assert sparse.visited_share(sparse.mask_of("bigbird", CASE, 1.0, 8)) == 1


def test_an_incorrect_result_of_sparse_attention_is_not_timed(monkeypatch):
    def all_keys(call, *arrays):
        return peers.of_jax(lambda causal: lambda q, k, v: jfa.dot_product_attention(q, k, v, is_causal=True))(
            call, *arrays
        )

    monkeypatch.setitem(peers.SPARSE, "xla", peers.Peer(program=all_keys))
    [one] = records(*SPARSE, "--density", 0.6, "--mask", "top-k", "--direction", "forward", "--implementation", "xla")
    assert one["status"] == "wrong" and "time_ms_p50" not in one and one["reason"].startswith("out at (0, ")


def test_linear_attention_is_compared_with_attention_and_the_quadratic_form():
    asked = ("--seq-lens", "100,130", "--max-quadratic", 100, "--key-heads", 2, "--rule", "scalar")
    found = records(*LINEAR, *asked, "--implementation", "xla,attention,quadratic")
    assert [(r["case"]["direction"], r["case"]["length"], r["implementation"]) for r in found] == [
        *(
            (direction, length, name)
            for direction in ("forward", "backward")
            for length, name in ((100, "xla"), (100, "attention"), (100, "quadratic"), (130, "xla"))
        ),
        *(("step", length, name) for length in (100, 130) for name in linear.STEPS),
    ]
    for r in found:
        assert r["status"] == "ok" and len(r["samples_ms"]) == 2, r["reason"]
        assert r["tokens_per_s"] > 0 and (r["speedup"] == 1) == (r["implementation"] == "attention")
    assert 0 < found[0]["max_error"] < 1e-5 and found[1]["max_error"] is None and found[3]["speedup"] is None


@pytest.mark.parametrize("rule", names.RULES)
def test_every_rule_is_checked_in_both_directions(rule):
    asked = ("--seq-lens", 100, "--rule", rule, "--dtype", "bfloat16", "--implementation", "xla")
    found = records(*LINEAR, *asked, "--direction", "forward,backward")
    assert [r["status"] for r in found] == ["ok", "ok"], [r["reason"] for r in found]


@pytest.mark.parametrize(("direction", "reason"), [("forward", "at (0, "), ("backward", "at (): ")])
def test_an_incorrect_result_of_linear_attention_is_not_timed(monkeypatch, direction, reason):
    def leaning(q, k, v, log_decay):
        out = jfa.linear_attention(q, k, v, log_decay)[0]
        return out + 0.01 * (k.sum() - (jax.lax.stop_gradient(k.sum()) if direction == "backward" else 0))

    monkeypatch.setitem(peers.LINEAR, "xla", peers.Peer(program=peers.of_jax(lambda causal: leaning)))
    asked = ("--seq-lens", 20, "--rule", "scalar", "--implementation", "xla", "--direction", direction)
    [one] = records(*LINEAR, *asked)
    assert one["status"] == "wrong" and one["reason"].startswith(reason)


def test_what_an_implementation_does_not_have_is_a_row_with_a_reason():
    asked = ("--seq-lens", 16, "--rule", "delta", "--direction", "forward")
    found = records(*LINEAR, *asked, "--implementation", "quadratic,fla,transformers")
    assert found[0]["status"] == "unsupported" and "decays per head without a delta rule" in found[0]["reason"]
    assert all(r["status"] in ("missing", "ok") for r in found[1:])


def test_other_libraries_agree_if_they_are_installed():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    for rule in ("scalar", "delta"):
        asked = ("--seq-lens", 100, "--rule", rule, "--key-heads", 2, "--implementation", "transformers")
        found = records(*LINEAR, *asked, "--direction", "forward,backward")
        assert [r["status"] for r in found] == ["ok", "ok"], [r["reason"] for r in found]
    asked = ("--seq-len", 256, "--block", 128, "--density", 0.7, "--direction", "forward", "--mask", "top-k")
    [one] = records(*SPARSE, *asked, "--implementation", "flex")
    assert one["status"] == "ok", one["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SPARSE, "--kv-heads", 3), "3 key heads do not divide 2 query heads"),
        ((*SPARSE, "--density", "0.5,0"), "'0.5,0' is not a list of numbers above 0, up to 1, such as 1,0.5,0.1"),
        ((*SPARSE, "--density", "half"), "'half' is not a list of numbers above 0"),
        ((*SPARSE, "--mask", "ring"), "unknown mask 'ring'; use one of window, bigbird, vertical-slash, top-k, or all"),
        ((*LINEAR, "--key-heads", 3), "3 key heads do not divide 4 value heads"),
        ((*LINEAR, "--rule", "matrix"), "unknown rule 'matrix'; use one of scalar, vector, delta, or all"),
    ],
)
def test_invalid_input_is_reported_in_one_sentence(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())
