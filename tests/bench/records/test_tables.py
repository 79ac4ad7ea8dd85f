"""Tables of records fit a terminal of 80 columns, whatever was measured."""

import itertools

import pytest

from jfa_bench import names
from jfa_bench.records import record, tables

# The longest implementation name of each benchmark, and the fields of its cases.
MODEL = {"model": "m", "layers": 2, "of_layers": 32, "dtype": "bfloat16"}
CALL = {"heads": 128, "kv_heads": 8, "head_dim": 256, "dtype": "bfloat16", "batch": 256}
CASES = {
    "attention": (names.PEERS, CALL | {"length": 131_072, "causal": False, "direction": "backward"}),
    "sparse": (
        names.SPARSE,
        CALL | {"length": 131_072, "causal": True, "direction": "backward", "mask": "vertical-slash", "density": 0.05},
    ),
    "linear": (
        names.LINEAR,
        {
            **{"rule": "vector", "length": 131_072, "direction": "backward", "dtype": "bfloat16", "batch": 256},
            **{"heads": 128, "key_heads": 128, "key_dim": 256, "value_dim": 256},
        },
    ),
    "prefill": ((*names.IMPLEMENTATIONS, names.MATRIX_PRODUCTS), MODEL | {"seq_len": 131_072}),
    "decode": ((*names.IMPLEMENTATIONS, names.MATRIX_PRODUCTS), MODEL | {"batch": 1024, "context": 131_072}),
    "paged": (("contiguous", "copy"), CALL | {"context": 131_072, "page_size": 1024, "kv_dtype": "int8"}),
    "throughput": (names.BATCHING, {}),
    "serve": (names.SERVED, {"model": "m", "request_rate": 0.125, "max_concurrency": 8}),
    "speculation": (("none", "ngram 16"), {"kind": "grounded", "task": "edited configuration", "batch": 64}),
    "memory": (("pages",), {"data": "ShareGPT", "page_size": 1024, "sampling": "parallel", "width": 6}),
    "accuracy": (("float", *names.PAGE_KINDS[1:]), {"tokens": 10_000}),
}
FIGURES = (0.0, 3.21e-7, 0.00999, 0.123456, 12.3456, 99.99, 999.9, 9_999.9, 54_321.9, 99_999.9, 1.23e9)


@pytest.mark.parametrize("benchmark", tables.VIEWS)
def test_a_table_fits_80_columns_for_any_figure(benchmark):
    view, (implementations, case) = tables.VIEWS[benchmark], CASES[benchmark]
    rows = []
    for name, figure in itertools.product(implementations, FIGURES):
        times = {"time_ms_p20": figure, "time_ms_p50": figure or 1.0, "time_ms_p80": figure * 5}
        one = {"benchmark": benchmark, "case": case, "implementation": name, "status": "ok", "reason": None} | times
        one |= {"share_of_peak": figure, "peak_bytes": int(figure * 2**20), "greedy_same": "64/64 12/64 10/64"}
        for field in view.columns:
            outer, _, inner = field.partition(".")
            if outer not in ("case", "what", "ms", "dir", "spread", "peak", "peak_mib") and outer not in one:
                one[outer] = {"p50": figure, "p99": figure} if inner else figure
        rows.append(one)
    text = view.table(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert len([line for line in text.splitlines() if line.startswith("|")]) == len(rows) + 2


@pytest.mark.parametrize("benchmark", tables.VIEWS)
def test_csv_has_all_columns_of_the_table(benchmark):
    view = tables.VIEWS[benchmark]
    assert view.columns.items() <= view.csv.items()
    heading = record.render([], "csv", view.csv).split(",")
    assert heading == list(view.csv.values()) and len(set(heading)) == len(heading)


def test_consecutive_records_of_one_kind_share_a_table():
    case = CASES["decode"][1]
    rows = [
        {"case": case | {"model": model}, "implementation": "jfa", "status": "ok", "time_ms_p50": 1.0}
        | {"time_ms_p20": 1.0, "time_ms_p80": 1.0}
        for model in "aab"
    ]
    lines = tables.VIEWS["decode"].table(rows).splitlines()
    assert [line for line in lines if line and not line.startswith("|")] == [
        "a, 2 of 32 layers, bfloat16, 131,072 tokens of context",
        "b, 2 of 32 layers, bfloat16, 131,072 tokens of context",
    ]


def test_short_dtype_names():
    assert tables.short_dtype("bfloat16 on float8_e4m3fn") == "bf16 on fp8"
    assert tables.short_dtype("float16 on uint8") == "f16 on int4"
