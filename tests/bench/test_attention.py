"""`jfa-bench attention` measures in turns and says what could not run."""

import json

import pytest
from click.testing import CliRunner

from jfa_bench import cli


def run(*arguments):
    return CliRunner().invoke(cli.commands, ["attention", "--length", "24", "--samples", "2", *arguments])


def test_a_record_for_each_direction_and_implementation():
    done = run("-o", "json", "--heads", "4", "--kv-heads", "2", "--head-dim", "16")
    assert done.exit_code == 0
    records = json.loads(done.stdout)
    assert [(r["case"]["direction"], r["implementation"]) for r in records] == [
        (direction, name) for direction in ("forward", "both") for name in ("reference", "xla", "jax.nn")
    ]
    for r in records:
        assert r["status"] == "ok" and len(r["samples_ms"]) == 2 and r["peak_bytes"] >= 0
    # 4 b n^2 h d, half of it masked, in the time that was taken
    assert records[0]["tflops"] == pytest.approx(4 * 24**2 * 4 * 16 * 0.5 / records[0]["time_ms_p50"] / 1e9, rel=0.01)


def test_what_cannot_run_is_a_row_and_not_an_end():
    done = run("-o", "json", "--head-dim", "8", "--implementation", "xla,triton")
    assert done.exit_code == 0
    rows = {r["implementation"]: r for r in json.loads(done.stdout) if r["case"]["direction"] == "forward"}
    assert rows["xla"]["status"] == "ok" and rows["triton"]["status"] == "unsupported"
    assert "head_dim must be 16 to 256, got 8" in rows["triton"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-heads", "3"], "3 key heads do not divide 8 query heads"),
        (["--implementation", "cudnn"], "'cudnn' is no implementation here; known: reference, xla, triton, jax.nn"),
        (["--length", "0"], "'0' is not a list of whole numbers above 0"),
    ],
)
def test_bad_input_ends_in_one_sentence(arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())
