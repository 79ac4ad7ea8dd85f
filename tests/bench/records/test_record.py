"""Records in tables and files, and how errors and Ctrl-C are handled."""

import csv
import io
import json

import click
import jax
import pytest
from click.testing import CliRunner

import jfa
from jfa_bench.cli import options
from jfa_bench.measure import outcome
from jfa_bench.records import record, tables

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
for one in RECORDS:
    one |= {"time_ms_p20": one["time_ms_p50"], "time_ms_p80": one["time_ms_p50"]}


def test_a_table_shows_the_selected_fields_aligned():
    lines = record.render(RECORDS, "md", COLUMNS).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["decode", "8", "12.3", "12,346", ""]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["prefill", "1", "0.5", "", "a, b"]
    assert len({len(line) for line in lines}) == 1


def test_csv_can_be_read_back():
    rows = list(csv.reader(io.StringIO(record.render(RECORDS, "csv", COLUMNS))))
    assert rows[0] == list(COLUMNS.values())
    assert rows[1:] == [["decode", "8", "12.3456", "12345.6", ""], ["prefill", "1", "0.5", "", "a, b"]]


def test_json_keeps_every_field():
    assert json.loads(record.render(RECORDS, "json", {})) == RECORDS
    assert [json.loads(line) for line in record.render(RECORDS, "jsonl", {}).splitlines()] == RECORDS


def test_a_table_abbreviates_names_and_values():
    one = {"time_ms_p20": 9.0, "time_ms_p50": 10.0, "time_ms_p80": 11.0, "peak_bytes": 2**21, "share_of_peak": 0.654}
    one["case"] = {"direction": "backward"}
    columns = {name: name for name in ("ms", "spread", "peak_mib", "peak", "dir")}
    lines = record.render([one, {"status": "oom"}, {"status": "missing"}], "md", columns).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["10", "10%", "2", "65%", "bwd"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["oom", *[""] * 4]
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["n/a", *[""] * 4]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (0.00023456, "2e-4"), (0.00994, "1e-2"), (0.0123456, "0.0123"), (1 / 3, "0.333")),
        *((12.345, "12.3"), (99.94, "99.9"), (99.96, "100"), (1234.5, "1,234"), (99_999.4, "99,999"), (1e5, "1.0e5")),
        *((123_456_789.0, "1.2e8"), (9.99e12, "1.0e13"), (1e-12, "1e-12")),
    ],
)
def test_a_figure_has_at_most_six_characters(value, text):
    assert record.number(value) == text and len(text) <= 6


def test_a_share_has_at_most_four_characters():
    assert [record.percent(share) for share in (0.0, 0.0451, 0.999, 9.99, 12.0)] == ["0%", "5%", "100%", "999%", ">10x"]


def test_equal_refusals_are_reported_once():
    rows = [{"implementation": "a", "status": "oom", "reason": "too much"}] * 3
    rows += [{"implementation": "b", "status": "ok", "reason": None}]
    rows += [{"implementation": "c", "status": "missing", "reason": "not here"}]
    assert record.refusals(rows) == "a: oom: too much (3 times)\nc: missing: not here"


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (jfa.UnsupportedError("no such tile\nmore"), "unsupported", "no such tile"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), "oom", "RESOURCE_EXHAUSTED: 9 GiB"),
        (RuntimeError("CUDA out of memory."), "oom", "CUDA out of memory."),
        (MemoryError("needs 9 GiB"), "oom", "needs 9 GiB"),
        (ModuleNotFoundError("the package x is not installed"), "missing", "the package x is not installed"),
        (ValueError("gfx942"), "unsupported", "ValueError: gfx942"),
        (TypeError(), "unsupported", "TypeError: TypeError"),
    ],
)
def test_an_error_becomes_a_status_and_a_reason(error, status, reason):
    assert isinstance(error, outcome.REFUSALS)
    assert outcome.of(error) == {"status": status, "reason": reason}


def test_failing_runs_are_left_out():
    def refuses():
        raise NotImplementedError("not here")

    found, serve = outcome.tried({"a": lambda: 1, "b": refuses})
    assert list(serve) == ["a"] and found["a"]["status"] == "ok"
    assert found["b"] == {"status": "unsupported", "reason": "NotImplementedError: not here"}


def test_a_file_is_valid_after_every_record(tmp_path):
    path = tmp_path / "records.json"
    file = record.File(path)
    assert json.loads(path.read_text()) == []
    for count in (1, 2):
        file.add(RECORDS[count - 1])
        assert record.load(path) == RECORDS[:count]
    file.close()
    assert path.read_text().count("\n") == 4  # one record per line


def test_json_lines_files_can_be_read(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(record.render(RECORDS, "jsonl", {}) + "\n")
    assert record.load(path) == RECORDS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"benchmark": ', "is not JSON: line 1"),
        ("[1]", "contains no records: a record is an object with a field 'benchmark'"),
        ('{"a": 1}', "contains no records"),
    ],
)
def test_a_file_without_records_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        record.load(path)


ROWS = [
    {"benchmark": "b", "case": {}, "implementation": name, "status": "ok", "reason": None, "figure": i}
    for i, name in enumerate("xyz")
]


@pytest.fixture
def present(monkeypatch):
    """Runs a command that presents ROWS."""
    view = tables.View({"what": "what", "figure": "figure"})
    monkeypatch.setattr(tables, "VIEWS", {"b": view})
    return _present


def _present(*arguments, interrupted_after=None):
    @click.command()
    @options.output_options
    def command(output):
        def rows():
            for i, row in enumerate(ROWS):
                if i == interrupted_after:
                    raise KeyboardInterrupt
                yield row

        output.present(rows(), "b", total=3)

    return CliRunner().invoke(command, [*map(str, arguments)])


def test_records_go_to_stdout_and_into_a_file(present, tmp_path):
    done = present("--save", tmp_path / "a.json", "-o", "jsonl")
    assert done.exit_code == 0 and [json.loads(line) for line in done.stdout.splitlines()] == ROWS
    assert record.load(tmp_path / "a.json") == ROWS
    assert json.loads(present("-o", "json").stdout.splitlines()[-1]) == ROWS
    assert present("-o", "csv").stdout.splitlines() == ["what,figure", "x,0", "y,1", "z,2"]
    assert present().stdout.splitlines()[2:] == ["| x    | 0      |", "| y    | 1      |", "| z    | 2      |"]


def test_ctrl_c_keeps_the_records_so_far(present, tmp_path):
    done = present("--save", tmp_path / "a.json", "-o", "json", interrupted_after=2)
    assert done.exit_code == 130 and json.loads(done.stdout) == ROWS[:2]
    assert done.stderr == "interrupted: 2 of 3 records were kept\n"
    assert record.load(tmp_path / "a.json") == ROWS[:2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "/no/such/folder/a.json"], "cannot write /no/such/folder/a.json: No such file or directory"),
        (["--plot", "a.jpeg"], "a plot must be a .png, .svg or .pdf file, got 'a.jpeg'"),
        (["--plot", "/no/such/folder/a.png"], "the folder /no/such/folder does not exist or is not writable"),
        (["-o", "xml"], "'xml' is not one of 'md', 'csv', 'json', 'jsonl'"),
    ],
)
def test_unwritable_outputs_are_reported_before_anything_runs(present, arguments, message):
    done = present(*arguments, interrupted_after=0)
    assert done.exit_code in (1, 2) and message in " ".join(done.stderr.split())
