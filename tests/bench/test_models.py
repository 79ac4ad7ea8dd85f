"""`jfa-bench prefill` and `decode`: what a record says, how it is printed, and what is refused."""

import csv
import io
import json
import sys
from pathlib import Path

import jax
import pytest

from jfa_bench import cli, models, record

LLAMA3 = Path(__file__).parents[1] / "golden" / "llama3"
FIELDS = {  # DESIGN.md, "Public surface"
    *("benchmark", "case", "implementation", "status", "reason", "device", "versions", "flags", "git_commit", "date"),
    *("time_ms_p20", "time_ms_p50", "time_ms_p80", "samples_ms", "tokens_per_s", "share_of_peak"),
}


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs the command and returns (exit status, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["jfa-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, *capsys.readouterr()

    return run


def test_decode_records_say_what_was_measured_beside_what(bench):
    status, out, err = bench(
        "decode", "--model", LLAMA3, "--batch", "1,3", "--prompt", 5, "--samples", 3, "--dtype", "float32", "-o", "json"
    )
    assert (status, err) == (0, "")
    records = json.loads(out.splitlines()[-1])
    told = [(r["case"]["batch"], r["case"]["prompt"], r["implementation"]) for r in records]
    assert told == [(b, 5, name) for b in (1, 3) for name in ("matrix products", "jfa")]
    for one in records:
        assert set(one) == FIELDS | ({"host_ms_per_step"} if one["implementation"] == "jfa" else set())
        assert (one["benchmark"], one["status"], one["reason"]) == ("decode", "ok", None)
        assert (one["case"]["model"], one["case"]["dtype"]) == (str(LLAMA3), "float32")
        assert len(one["samples_ms"]) == 3 and min(one["samples_ms"]) > 0
        assert one["time_ms_p20"] <= one["time_ms_p50"] <= one["time_ms_p80"]
        assert one["tokens_per_s"] == pytest.approx(one["case"]["batch"] / one["time_ms_p50"] * 1e3, rel=1e-2)
        assert one["device"]["platform"] == jax.default_backend() and one["versions"]["jax"] == jax.__version__


def test_prefill_goes_through_a_prompt_in_chunks(bench):
    status, out, err = bench("prefill", "--model", LLAMA3, "--prompt", "20", "--samples", 2, "-o", "jsonl")
    assert (status, err) == (0, "")
    products, jfa = (json.loads(line) for line in out.splitlines())
    assert set(products) == set(jfa) == FIELDS
    assert jfa["tokens_per_s"] == pytest.approx(20 / jfa["time_ms_p50"] * 1e3, rel=1e-2)
    assert products["share_of_peak"] == 1
    assert jfa["share_of_peak"] == pytest.approx(products["time_ms_p50"] / jfa["time_ms_p50"], rel=1e-2)


RECORDS = [
    {"benchmark": "decode", "case": {"batch": 8}, "time_ms_p50": 12.3456, "tokens_per_s": 12345.6},
    {"benchmark": "prefill", "case": {"batch": 1}, "time_ms_p50": 0.5, "reason": "a, b"},
]
COLUMNS = {
    "benchmark": "benchmark",
    "case.batch": "batch",
    "time_ms_p50": "ms",
    "tokens_per_s": "tokens/s",
    "reason": "why",
}


def test_a_table_shows_the_chosen_fields_in_line():
    lines = record.render(RECORDS, "md", COLUMNS).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["decode", "8", "12.3", "12,346", ""]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["prefill", "1", "0.5", "", "a, b"]
    assert len({len(line) for line in lines}) == 1


def test_csv_is_read_back(capsys):
    rows = list(csv.reader(io.StringIO(record.render(RECORDS, "csv", COLUMNS))))
    assert rows[0] == list(COLUMNS.values())
    assert rows[2] == ["prefill", "1", "0.5", "", "a, b"]


def test_json_keeps_every_field():
    assert json.loads(record.render(RECORDS, "json", {})) == RECORDS
    assert [json.loads(line) for line in record.render(RECORDS, "jsonl", {}).splitlines()] == RECORDS


def test_every_column_of_the_tables_is_a_field():
    assert {column.split(".")[0] for column in models.COLUMNS} <= FIELDS | {"host_ms_per_step"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode", "--batch", "0,x"], "'0,x' is not a list of whole numbers above 0, such as 1,8"),
        (["decode", "--batch", ""], "'' is not a list of whole numbers above 0"),
        (["prefill", "--prompt", "\u00b2"], "is not a list of whole numbers above 0"),
        (["prefill", "--samples", "0"], "Invalid value for '--samples'"),
        (["decode", "-o", "xml"], "'xml' is not one of 'md', 'csv', 'json', 'jsonl'"),
        (["decode", "--model", "no/where"], "there is no model at 'no/where'"),
        (["decode", "--model", LLAMA3, "--prompt", "512"], "together more than the model's context of 512"),
        (["compose"], "No such command 'compose'"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_status_2(bench, arguments, message):
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("jfa-bench: ") and err.count("\n") == 1 and message in err
