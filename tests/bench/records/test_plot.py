"""Plots show the records as lines, bars and labels; what cannot be plotted is reported at once."""

import importlib.util
import itertools
import json

import pytest
from click.testing import CliRunner

from jfa_bench import cli
from jfa_bench.records import plot

NAMES = ("reference", "xla", "jax.nn")
SHARED = {
    "device": {"platform": "rocm", "arch": "gfx942", "name": "AMD Instinct MI300X", "host": "a processor"},
    "versions": {"jfa": "0.1.0", "jax": "0.12.0"},
    "git_commit": "abc1234",
    "date": "2026-11-21T00:00:00+00:00",
    "status": "ok",
}


def attention(lengths=(256, 512, 1024), directions=("forward", "backward"), head_dims=(128,)):
    for d, direction, length, (i, name) in itertools.product(head_dims, directions, lengths, enumerate(NAMES)):
        case = {"batch": 1, "length": length, "heads": 32, "kv_heads": 32, "head_dim": d, "dtype": "float16"}
        yield SHARED | {
            "benchmark": "attention",
            "case": case | {"causal": True, "direction": direction},
            "implementation": name,
            "ceilings": {"matrix_tflops": 600.0, "copy_gb_per_s": 4000.0},
            "tflops": 50.0 * (i + 1),
            "speedup": float(i + 1),
            "flop": 1e9 * length,
            "bytes": 1e6 * length**0.5,
        }


def model(benchmark, **case):
    return SHARED | {
        "benchmark": benchmark,
        "case": {"model": "phi-2", "layers": 1, "of_layers": 32, "dtype": "bfloat16", "batch": 1} | case,
    }


PREFILL = [
    model("prefill", seq_len=length) | {"implementation": name, "time_ms_p50": length / (1 + i), "speedup": i / 2 + 0.5}
    for length in (512, 1024)
    for i, name in enumerate(("matrix products", "reference", "jfa"))
]
DECODE = [
    model("decode", batch=batch, context=128) | {"implementation": "jfa", "tokens_per_s": 10.0 * batch}
    for batch in (1, 8)
]
PAGED = [
    SHARED
    | {
        "benchmark": "paged",
        "case": {
            **{"batch": 1, "context": 2048, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float16"},
            **{"page_size": page_size, "kv_dtype": kv_dtype},
        },
        "implementation": name,
        "gb_per_s": 100.0,
    }
    for name, page_size, kv_dtype in (("copy", None, None), ("pages", 16, "same"), ("pages", 16, "int8"))
]
THROUGHPUT = [
    SHARED
    | {
        "benchmark": "throughput",
        "case": {"model": "smollm2", "num_prompts": 8, "lengths": "skewed"},
        "implementation": name,
        "tokens_per_s": 100.0,
    }
    for name in ("static", "engine")
]
SERVE = [
    SHARED
    | {
        "benchmark": "serve",
        "case": {"model": "smollm2", "request_rate": rate},
        "implementation": name,
        "output_throughput": 10.0,
    }
    | {f"{kind}_{what}_ms": float(i) for i, kind in enumerate(("median", "p99"), 1) for what in ("ttft", "tpot")}
    for rate in (2.0, "inf", 0.5)
    for name in ("server", "engine")
]
SPARSE = [
    SHARED
    | {
        "benchmark": "sparse",
        "case": {
            **{"length": 4096, "heads": 8, "kv_heads": 8, "head_dim": 64, "causal": True, "dtype": "float32"},
            **{"direction": direction, "mask": mask, "density": density},
        },
        "implementation": name,
        **{"time_ms_p50": 100 * density, "visited": density, "speedup": 1 / density},
    }
    for direction in ("forward", "backward")
    for mask in ("window", "top-k")
    for name, density in (("dense", 1.0), ("xla", 0.5), ("xla", 0.1))
]
LINEAR = [
    SHARED
    | {
        "benchmark": "linear",
        "case": {
            **{"rule": rule, "length": length, "batch": 1, "heads": 8, "key_heads": 8, "key_dim": 64, "value_dim": 64},
            **{"dtype": "float32", "direction": direction},
        },
        "implementation": name,
        "time_ms_p50": float(length),
    }
    for rule in ("scalar", "delta")
    for direction in ("forward", "step")
    for length in (4096, 8192)
    for name in ("xla", "attention")
]
ATTENTION = list(attention())
ALL = {"attention": ATTENTION, "prefill": PREFILL, "decode": DECODE, "paged": PAGED, "throughput": THROUGHPUT}
ALL |= {"serve": SERVE, "sparse": SPARSE, "linear": LINEAR}

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra plot is not installed"
)


@needs_matplotlib
@pytest.mark.parametrize("kind", plot.KINDS)
def test_every_kind_draws_with_axes_units_and_legend(kind, tmp_path):
    records = ALL[plot.KINDS[kind][0]]
    figure = plot.figure(records, kind)
    for ax in figure.axes:
        assert ax.get_ylabel() and ax.get_title() and (ax.get_xlabel() or kind == "throughput")
        assert {text.get_text() for text in ax.get_legend().get_texts()}
    [foot] = figure.texts
    assert foot.get_text() == "AMD Instinct MI300X (gfx942) · jfa 0.1.0, jax 0.12.0 · commit abc1234 · 2026-11-21"
    plot.save(records, tmp_path / "a.svg", kind)
    assert (tmp_path / "a.svg").read_text().count("<svg") == 1


@needs_matplotlib
def test_lines_show_the_records_and_differ_without_color():
    figure = plot.figure(ATTENTION)
    assert [ax.get_title().partition("\n")[0] for ax in figure.axes] == [
        "Speed-up, forward",
        "Throughput, forward",
        "Speed-up, backward",
        "Throughput, backward",
    ]
    lines = figure.axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert [list(line.get_xdata()) for line in lines] == [[256, 512, 1024]] * 3
    assert len({line.get_marker() for line in lines}) == 3


@needs_matplotlib
def test_a_name_has_the_same_style_with_and_without_others():
    def looks(records):
        lines = plot.figure(records).axes[0].get_lines()
        return {line.get_label(): (line.get_color(), line.get_marker()) for line in lines}

    some = [one for one in ATTENTION if one["implementation"] != "reference"]
    assert looks(some).items() <= looks(ATTENTION).items()


@needs_matplotlib
def test_sparse_attention_has_a_line_for_each_mask_and_one_for_dense_attention():
    figure = plot.figure(SPARSE)
    assert [ax.get_title().partition("\n")[0] for ax in figure.axes] == [
        f"{what}, {direction}" for direction in ("forward", "backward") for what in ("Time", "Speed-up")
    ]
    window, top_k, dense = figure.axes[0].get_lines()
    assert [window.get_label(), top_k.get_label()] == ["window", "top-k"]
    assert list(window.get_xdata()) == [10, 50] and list(window.get_ydata()) == [10, 50]
    assert set(dense.get_ydata()) == {100}


@needs_matplotlib
def test_linear_attention_has_a_panel_for_each_rule_and_direction():
    assert [ax.get_title().partition("\n")[0] for ax in plot.figure(LINEAR).axes] == [
        f"{rule}, {what}"
        for rule in ("A decay per head", "Delta rule")
        for what in ("forward", "one token after these")
    ]


@needs_matplotlib
def test_a_grid_of_shapes_has_a_panel_for_each():
    figure = plot.figure(list(attention(head_dims=(64, 128))))
    assert len(figure.axes) == 4 and all("Throughput" in ax.get_title() for ax in figure.axes)


@needs_matplotlib
def test_bars_are_labelled_and_the_title_has_the_number_of_layers():
    [ax] = plot.figure(PREFILL).axes
    assert ax.get_title() == "Prefill, phi-2\n1 of 32 layers, bfloat16"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["512", "1,024"]
    assert {"512\n0.50 x", "256", "171\n1.50 x"} <= {text.get_text() for text in ax.texts}
    assert len({patch.get_hatch() for patch in ax.patches}) == 3


@needs_matplotlib
def test_a_load_has_panels_of_latencies_and_throughput():
    first, *_, last = plot.figure(SERVE).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in first.get_lines()}
    assert lines == {f"{name}, {kind}": [value] * 3 for name in ("server", "engine") for kind, value in KINDS}
    assert [text.get_text() for text in last.get_xticklabels()] == ["0.5", "2", "inf"]


KINDS = (("median", 1.0), ("P99", 2.0))


@needs_matplotlib
def test_a_plot_needs_only_saved_records(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PREFILL))
    done = run("plot", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert done.exit_code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@needs_matplotlib
def test_records_that_a_kind_does_not_draw_are_refused():
    with pytest.raises(ValueError, match="plot 'roofline' needs attention records with bytes, but there are none"):
        plot.figure(PREFILL, "roofline")
    with pytest.raises(ValueError, match="there is no plot for records of 'memory', only for attention"):
        plot.figure([{"benchmark": "memory"}])
    refused = [one | {"status": "oom", "time_ms_p50": None} for one in PREFILL]
    assert plot.kinds(refused) == [] and plot.kinds(PREFILL) == ["prefill"]
    with pytest.raises(ValueError, match="needs prefill records with time_ms_p50"):
        plot.figure(refused)


def run(*arguments):
    return CliRunner().invoke(cli.commands, [*map(str, arguments)])


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.json").write_text(json.dumps(PREFILL))
    done = run("plot", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert done.exit_code == 1
    assert "plots need matplotlib: pip install 'jfa[plot]', or pip install matplotlib" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "a.gif"], "a plot must be a .png, .svg or .pdf file, got 'a.gif'"),
        (["--plot", "a.png", "--kind", "pie"], "'pie' is not one of 'attention', 'speedup'"),
        ([], "Missing option '--plot'"),
    ],
)
def test_invalid_input_is_reported_in_one_sentence(tmp_path, arguments, message):
    (tmp_path / "a.json").write_text(json.dumps(PREFILL))
    done = run("plot", tmp_path / "a.json", *arguments)
    assert done.exit_code in (1, 2) and message in " ".join(done.stderr.split())
