"""`jfa-bench attention` checks results, measures interleaved, and reports what could not run."""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import jfa
from jfa_bench import cli, names
from jfa_bench.cli import options
from jfa_bench.measure import attention, peers, roofline
from jfa_bench.records import tables

SMALL = ("--heads", "4", "--head-dim", "16", "--samples", "2", "--dtype", "float32")


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Fixed values, since measuring the ceilings takes too long for every test."""
    found = {"matrix_tflops": 2.0, "copy_gb_per_s": 10.0}
    monkeypatch.setattr(roofline, "ceilings", lambda dtype, *, clock: found)
    return found


def run(*arguments):
    return CliRunner().invoke(cli.commands, ["attention", *SMALL, *map(str, arguments)])


def test_a_record_for_each_length_direction_and_implementation():
    implementations = ("reference", "xla", "jax.nn")
    asked = ("--kv-heads", "2", "--seq-lens", "24", "--direction", "all", "--implementation", ",".join(implementations))
    done = run("-o", "json", *asked)
    assert done.exit_code == 0
    records = json.loads(done.stdout.splitlines()[-1])
    assert [(r["case"]["direction"], r["implementation"]) for r in records] == [
        (direction, name) for direction in names.MEASURED for name in implementations
    ]
    # 4 b n^2 h d, half of it masked; gradients 2.5 times that
    flop = 4 * 24**2 * 4 * 16 * 0.5
    for r in records:
        assert r["status"] == "ok" and len(r["samples_ms"]) == 2 and r["peak_bytes"] > 0
        assert r["flop"] == flop * {"forward": 1, "backward": 2.5, "both": 3.5}[r["case"]["direction"]]
        assert r["tflops"] == pytest.approx(r["flop"] / r["time_ms_p50"] / 1e9, rel=0.01)
        assert r["share_of_peak"] == pytest.approx(r["tflops"] / 2)
        assert r["implementation"] == "jax.nn" or r["config"]["backend"] == r["implementation"]
        assert 0 < r["max_error"] < 1e-5 and r["ceilings"]["copy_gb_per_s"] == 10
        assert (r["speedup"] == 1) == (r["implementation"] == "reference")
    assert records[1]["config"]["forward"]["block_kv"] > 0 and "backward" not in records[1]["config"]
    assert records[4]["config"]["backward"]["block_kv"] > 0 and records[0]["config"]["forward"] is None
    # q and the output of 4 heads, k and v of 2
    assert records[0]["bytes"] == 24 * 16 * 4 * (2 * 4 + 2 * 2)


def xla(*arrays, causal):
    return jfa.dot_product_attention(*arrays, is_causal=causal, implementation="xla")


def replaced(monkeypatch, attend):
    """Replaces the xla implementation with attend(q, k, v, causal)."""
    program = peers.of_jax(lambda causal: functools.partial(attend, causal=causal))
    monkeypatch.setitem(peers.PEERS, "xla", peers.Peer(program=program))


def test_an_incorrect_result_is_not_timed(monkeypatch):
    replaced(monkeypatch, lambda *arrays, causal: xla(*arrays, causal=causal).at[0, -1, 0, 0].add(0.1))
    [one] = measured("xla", "forward")
    assert one["status"] == "wrong" and "time_ms_p50" not in one and "tflops" not in one
    assert one["reason"].startswith("out at (0, 7, 0, 0): ") and "the allowed" in one["reason"]


@pytest.mark.parametrize("argument", ["q", "k", "v"])
def test_an_incorrect_gradient_is_not_timed(monkeypatch, argument):
    def leaning(*arrays, causal):
        total = arrays["qkv".index(argument)].sum()
        return xla(*arrays, causal=causal) + 0.01 * (total - jax.lax.stop_gradient(total))

    replaced(monkeypatch, leaning)
    [one] = measured("xla", "backward")
    assert one["status"] == "wrong" and one["reason"].startswith(f"d_{argument} at ")
    [one] = measured("xla", "forward")
    assert one["status"] == "ok"


def measured(name, direction, **more):
    shape = dict(batch=1, length=40, heads=2, kv_heads=1, head_dim=16, dtype="float32", causal=True) | more
    cases = [attention.Case(**shape)]
    return list(attention.measure(cases, directions=[direction], implementations=[name], samples=1))


def test_an_unsupported_implementation_is_a_row_with_a_reason():
    done = run("--seq-lens", "24", "--head-dim", "8", "--implementation", "xla,triton,tokamax", "-o", "json")
    assert done.exit_code == 0
    rows = {r["implementation"]: r for r in json.loads(done.stdout) if r["case"]["direction"] == "forward"}
    assert rows["xla"]["status"] == "ok" and rows["xla"]["speedup"] is None
    assert rows["triton"]["status"] == "unsupported" and "head_dim must be 16 to 256, got 8" in rows["triton"]["reason"]
    assert rows["tokamax"]["status"] in ("missing", "ok")
    table = run("--seq-lens", "24", "--head-dim", "8", "--implementation", "triton").stdout
    assert "triton: unsupported: " in table and "(2 times)" in table


def test_a_call_that_exceeds_the_memory_of_a_cpu_is_not_run(monkeypatch):
    monkeypatch.setattr(peers.machine, "free_bytes", lambda: 1000)
    [one] = measured("reference", "forward")
    assert one["status"] == "oom" and one["reason"].endswith("GiB in addition to its arguments, 0.0 are free")


def test_float16_of_jax_nn_on_a_cpu_is_a_row_with_a_reason():
    [one] = measured("jax.nn", "forward", dtype="float16")
    assert one["status"] == "unsupported" and "F16" in one["reason"]


def test_the_grid_of_the_papers():
    grid = attention.fa_grid("bfloat16")
    assert len(grid) == 36 and {case.batch * case.length for case in grid} == {2**14}
    assert {case.heads * case.head_dim for case in grid} == {2048}
    assert min(case.length for case in grid) == 512 and {case.causal for case in grid} == {True, False}


def told(**more):
    """A record like one that is measured on a GPU."""
    case = {"batch": 1, "length": 16384, "heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    case |= {"causal": True, "direction": "backward"}
    times = {"time_ms_p20": 1234.5, "time_ms_p50": 1334.5, "time_ms_p80": 1534.5}
    figures = {"tflops": 431.2, "share_of_peak": 0.6543, "speedup": 12.34, "peak_bytes": 2**35}
    one = {"case": case, "implementation": "jax-aiter", "status": "ok", "ceilings": {"matrix_tflops": 659.0}}
    return one | times | figures | more


def test_tables_fit_a_terminal_and_show_the_peak():
    other = told()["case"] | {"head_dim": 64, "causal": False}
    refused = {"case": other, "implementation": "triton", "status": "unsupported", "reason": "too wide"}
    lines = (
        tables.VIEWS["attention"]
        .table([told(), told(case=other), refused | {"ceilings": {"matrix_tflops": None}}])
        .splitlines()
    )
    assert lines[0] == "bfloat16, 32 heads over 8 of 128, causal, batch 1; peak 659 TFLOP/s"
    assert "bfloat16, 32 heads over 8 of 64, all keys, batch 1; peak 659 TFLOP/s" in lines
    assert lines[-1] == "triton: unsupported: too wide"
    assert max(map(len, lines)) <= 80


def test_default_implementations_are_installed_and_support_the_platform():
    assert peers.usual("cpu")[:3] == ("reference", "xla", "jax.nn") and "triton" not in peers.usual("cpu")
    assert {"triton", "pallas"} <= set(peers.usual("rocm")) and "cudnn" not in peers.usual("rocm")
    assert "cudnn" in peers.usual("cuda")


def test_torch_agrees_if_it_is_installed():
    pytest.importorskip("torch")
    for direction in names.MEASURED:
        [one] = measured("torch", direction)
        assert one["status"] == "ok", one["reason"]


def test_the_ceilings_are_measured(monkeypatch):
    monkeypatch.undo()
    assert all(value > 0 for value in roofline.ceilings("float32", clock=_Ticking()).values())


class _Ticking:
    """A clock that advances by a second at every call."""

    now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "3 key heads do not divide 4 query heads"),
        (
            ["--implementation", "cuda"],
            "unknown implementation 'cuda'; use one of reference, xla, triton, jax.nn, cudnn, pallas, tokamax, "
            "jax-aiter, torch, tpu, or all",
        ),
        (["--dtype", "float8"], "unknown dtype 'float8'; use one of float16, bfloat16, float32, or all"),
        (["--direction", "sideways"], "unknown direction 'sideways'; use one of forward, backward, both, or all"),
        (["--seq-lens", "0"], "'0' is not a list of integers above 0, such as 1,8, nor a range first:last:step"),
        (["--seq-lens", "64:32:8"], "'64:32:8' is not a list"),
        (["--seq-lens", "8:32"], "'8:32' is not a list"),
        (["--seq-lens", "8:32:0"], "such as 256:4096:64"),
        (["--grid", "fa2", "--seq-lens", "64"], "--grid sets the shapes: remove --seq-lens"),
        (["--torch-python", "no/python"], "File 'no/python' does not exist"),
        (
            ["--torch-python", sys.executable, "--implementation", "xla"],
            "--torch-python is for torch: add it to --implementation",
        ),
    ],
)
def test_invalid_input_is_reported_in_one_sentence(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())


def test_ranges_include_both_ends():
    convert = options.Counts().convert
    assert convert("16:24:4,40", None, None) == (16, 20, 24, 40)
    assert convert("256:4096:64", None, None) == tuple(range(256, 4097, 64))
    assert convert("5:6:4", None, None) == (5,)


def test_the_checked_rows_include_the_first_and_the_last():
    case = attention.Case(batch=1, length=40, heads=1, kv_heads=1, head_dim=16, dtype="float32", causal=True)
    rows = attention.checked_rows(case)
    assert rows[0] == 0 and rows[-1] == 39 and len(rows) == attention.ROWS
    assert np.array_equal(attention.checked_rows(dataclasses.replace(case, length=3)), [0, 1, 2])
