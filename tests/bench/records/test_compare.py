"""`jfa-bench compare` finds an artificial slow-down and ignores noise."""

import json
import random

import pytest
from click.testing import CliRunner

from jfa_bench import cli
from jfa_bench.measure import timing
from jfa_bench.records import compare

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
    assert one["case"]["length"] == 1024 and one["verdict"] == "slower"
    assert one["ratio"] == pytest.approx(1.1, rel=0.02)
    [one] = compare.moved(before, records(seed + 100, slower={512: 0.9}))
    assert (one["case"]["length"], one["verdict"]) == (512, "faster")


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
    assert (one["before"], one["after"], one["verdict"]) == ("10.24 ms", "oom", "broken") or one["verdict"] == "broken"
    [one] = compare.moved(after, before)
    assert one["verdict"] == "fixed"


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
    assert [(row[1], row[2], row[6]) for row in rows] == [
        ("length 1024", "triton", "slower"),
        ("length 2048", "triton", "slower"),
    ]
    assert all(row[5].startswith("+") and row[5].endswith("%") for row in rows)
    assert 'note: versions: {"jax": "0.12.0"} -> {"jax": "0.12.1"}' in done.stderr
    assert "note: 20 cases are in both, 20 before and 20 after" in done.stderr
    found = json.loads(run(tmp_path, records(0), after, "-o", "json").stdout.splitlines()[-1])
    assert [one["verdict"] for one in found] == ["slower", "slower"]


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
