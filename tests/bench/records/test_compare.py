"""`jfa-bench compare` finds an artificial slow-down and ignores noise."""

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner

from jfa_bench import cli
from jfa_bench.measure import timing
from jfa_bench.records import compare, record

RESULTS = Path(__file__).parents[3] / "bench" / "results"
DEVICE = {"device": {"name": "gfx942", "arch": "gfx942", "host": "x"}, "versions": {"jax": "0.12.0"}, "flags": ""}


def records(seed, *, slower=None, noise=0.01, samples=15, status="ok"):
    """Twenty cases of one implementation with noisy samples; `slower` maps a length to a factor."""
    draw = random.Random(seed)
    found = []
    for length in range(256, 256 * 21, 256):
        mean = length / 100 * (slower or {}).get(length, 1)
        case = {"length": length, "dtype": "float16"}
        one = DEVICE | {"benchmark": "attention", "case": case, "implementation": "triton", "status": status}
        if status == "ok":
            one |= timing.summary([mean * draw.gauss(1, noise) for _ in range(samples)])
        found.append(one | {"reason": None})
    return found


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_slow_down_is_found_and_noise_is_not(seed):
    before = records(seed)
    assert list(compare.moved(before, records(seed + 100))) == []
    [one] = compare.moved(before, records(seed + 100, slower={1024: 1.1}))
    assert one["case"]["length"] == 1024 and one["verdict"] == "worse"
    assert one["ratio"] == pytest.approx(1.1, rel=0.02)
    [one] = compare.moved(before, records(seed + 100, slower={512: 0.9}))
    assert (one["case"]["length"], one["verdict"]) == (512, "better")


def test_a_difference_within_the_noise_is_ignored():
    assert list(compare.moved(records(0, noise=0.2), records(1, noise=0.2, slower={1024: 1.1}))) == []


def test_the_threshold_can_be_chosen():
    before, after = records(0, noise=0.001), records(1, noise=0.001, slower={256: 1.02})
    assert list(compare.moved(before, after)) == []
    assert [one["case"]["length"] for one in compare.moved(before, after, threshold=0.01)] == [256]


def test_a_changed_status_is_a_change():
    before, after = records(0), records(1)
    after[3] = {key: value for key, value in after[3].items() if "ms" not in key} | {"status": "oom"}
    [one] = compare.moved(before, after)
    assert (one["figure"], one["before"], one["after"], one["verdict"]) == ("status", "ok", "oom", "broken")
    [one] = compare.moved(after, before)
    assert one["verdict"] == "fixed"


@pytest.mark.parametrize(
    ("benchmark", "field", "worse", "shown"),
    [
        ("serve", "output_throughput", 0.9, ("speed", "100 tokens/s", "90 tokens/s")),
        ("serve", "median_ttft_ms", 1.1, ("TTFT", "100 ms", "110 ms")),
        ("serve", "median_tpot_ms", 1.1, ("TPOT", "100 ms", "110 ms")),
        ("throughput", "tokens_per_s", 0.9, ("speed", "100 tokens/s", "90 tokens/s")),
        ("speculation", "tokens_per_s", 0.9, ("speed", "100 tokens/s", "90 tokens/s")),
        ("speculation", "speedup", 0.9, ("speedup", "100", "90")),
        ("accuracy", "perplexity", 1.1, ("perplexity", "100", "110")),
        ("memory", "wasted_share", 1.1, ("wasted share", "100", "110")),
    ],
)
def test_benchmarks_without_a_time_are_compared_by_their_own_figures(benchmark, field, worse, shown):
    before = DEVICE | {"benchmark": benchmark, "case": {"x": 1}, "implementation": "a", "status": "ok", field: 100}
    after = before | {field: 100 * worse}
    [one] = compare.moved([before], [after])
    assert (one["figure"], one["before"], one["after"]) == shown and one["verdict"] == "worse"
    assert [one["verdict"] for one in compare.moved([after], [before])] == ["better"]
    assert list(compare.moved([before], [before | {field: 102}])) == []
    [one] = compare.moved([before | {field: 0}], [before])
    assert one["ratio"] is None and one["before"].split()[0] == "0"
    [one] = compare.moved([before], [after | {"status": "failed"}])
    assert one["verdict"] == "broken"


def test_every_measurement_kept_here_has_a_figure_that_is_compared():
    for path in sorted(RESULTS.glob("*.json")):
        for one in record.load(path):
            if "case" in one and "implementation" in one and one["status"] == "ok":
                figures = compare.FIGURES.get(one["benchmark"], (compare.TIME,))
                assert any(one.get(figure.field) is not None for figure in figures), (path.name, one["benchmark"])


def run(tmp_path, before, after, *arguments):
    for name, found in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(found))
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    return CliRunner().invoke(cli.commands, ["compare", *paths, *arguments])


def test_the_command_shows_the_differing_fields_and_circumstances(tmp_path):
    after = [one | {"versions": {"jax": "0.12.1"}} for one in records(9, slower={1024: 1.2, 2048: 1.2})]
    done = run(tmp_path, records(0), after)
    assert done.exit_code == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert [(row[1], row[2], row[3], row[7]) for row in rows] == [
        ("length 1024", "triton", "time", "worse"),
        ("length 2048", "triton", "time", "worse"),
    ]
    assert all(row[6].startswith("+") and row[6].endswith("%") for row in rows)
    assert 'note: versions: {"jax": "0.12.0"} -> {"jax": "0.12.1"}' in done.stderr
    assert "note: 20 cases are in both, 20 before and 20 after" in done.stderr
    found = json.loads(run(tmp_path, records(0), after, "-o", "json").stdout.splitlines()[-1])
    assert [one["verdict"] for one in found] == ["worse", "worse"]


def test_no_change_is_reported_in_one_sentence(tmp_path):
    done = run(tmp_path, records(0), records(1))
    assert done.stdout == "no change exceeds 3% and the noise\n"


def test_records_without_times_are_refused(tmp_path):
    done = run(tmp_path, [{"benchmark": "compile", "kernel": "x"}], records(0))
    assert done.exit_code == 1 and "a.json contains no records of measurements" in done.stderr


def test_files_without_a_case_in_common_are_refused(tmp_path):
    other = [one | {"benchmark": "decode"} for one in records(0)]
    done = run(tmp_path, records(0), other)
    assert done.exit_code == 1 and "the files have no case in common" in done.stderr
