"""Plots of records, made only from the records. Each line has its own marker and dashes, and each bar its own hatch, so
that plots can be read in black and white.

matplotlib is an optional dependency and is imported when a plot is made.
"""

import importlib.util
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import names
from . import record, tables

FORMATS = (".png", ".svg", ".pdf")
MOST_LABELS = 24  # maximum number of bars with labels in a panel; more would overlap
WIDTH, HEIGHT = 5.2, 3.6  # of a panel, in inches

# Okabe and Ito's palette, which is safe for color blindness. A name has the same style in every plot.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#B8A800")
MARKERS = "os^Dv<>PX"
DASHES = ((), (5, 2), (1, 1.5), (5, 2, 1, 2), (8, 2), (3, 1), (2, 2), (6, 1, 1, 1), (1, 3))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "ooo", "---", "**")
LOOKS: dict[str, int] = {name: place for place, name in enumerate(names.PEERS)}
LOOKS |= {name: place for place, name in enumerate(names.SPARSE_MASKS, 1)}
LOOKS |= {"attention": 3, "quadratic": 6, "fla": 5, "transformers": 8}
LOOKS |= {
    "jfa": 2,
    "tpu": 2,
    "matrix products": 7,
    "copy": 7,
    "contiguous": 3,
    "engine": 2,
    "static": 0,
    "sequential": 6,
}
LOOKS |= {"server": 1, "server, median": 1, "server, P99": 6, "engine, median": 2, "engine, P99": 5}
# Placement of a legend that would not fit into the axes in all cases.
BELOW: Mapping[str, Any] = {"fontsize": 8, "loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "frameon": False}
DISPLAY_NAMES = {"reference": "reference (plain formula)", "jax.nn": "jax.nn (xla)", "cudnn": "jax.nn (cudnn)"}

Records = Sequence[Mapping[str, Any]]


def check(path: Path) -> None:
    """Checks that a plot can be written, before anything is measured.

    Raises:
      ClickException: matplotlib is missing, the format is not supported, or the folder is not writable.
    """
    if path.suffix not in FORMATS:
        raise click.ClickException(
            f"a plot must be a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file, got {str(path)!r}"
        )
    if not os.access(path.resolve().parent, os.W_OK):
        raise click.ClickException(f"the folder {path.resolve().parent} does not exist or is not writable")
    if importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("plots need matplotlib: pip install 'jfa[plot]', or pip install matplotlib")


def save(records: Records, path: Path, kind: str | None = None) -> None:
    """Plots records into a file. kind: a key of KINDS; None: the default kind of the first record's benchmark.

    Raises:
      ValueError: the records contain nothing that this kind plots.
    """
    figure(records, kind).savefig(path, dpi=150)


def figure(records: Records, kind: str | None = None) -> Any:
    """The matplotlib Figure."""
    from matplotlib import rc_context

    kind = kind or usual_kind(records)
    drawn = _drawn(records, kind)
    if not drawn:
        benchmark, figure_drawn, _ = KINDS[kind]
        raise ValueError(f"plot {kind!r} needs {benchmark} records with {figure_drawn}, but there are none")
    with rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.35, "hatch.linewidth": 0.6}):
        found = KINDS[kind][2](drawn)
        found.text(0.995, 0.005, _circumstances(drawn), ha="right", va="bottom", fontsize=7, color="#444444")
    return found


def _drawn(records: Records, kind: str) -> Records:
    benchmark, name, _ = KINDS[kind]
    return [one for one in records if one["benchmark"] == benchmark and one.get(name) is not None]


def kinds(records: Records) -> list[str]:
    """The kinds for which the records contain data."""
    return [kind for kind in KINDS if _drawn(records, kind)]


def usual_kind(records: Records) -> str:
    """The default kind for the first record's benchmark.

    Raises:
      ValueError: there is no plot for that benchmark.
    """
    benchmark = records[0]["benchmark"] if records else None
    for kind, (drawn, *_) in KINDS.items():
        if drawn == benchmark:
            return kind
    known = ", ".join(dict.fromkeys(drawn for drawn, *_ in KINDS.values()))
    raise ValueError(f"there is no plot for records of {benchmark!r}, only for {known}")


def _attention(records: Records) -> Any:
    """Speed-up and TFLOP/s over length; only TFLOP/s for more than three shapes."""
    groups = _grouped(records, ("heads", "kv_heads", "head_dim", "causal", "dtype", "direction"))
    return _speedup_and_tflops(groups) if len(groups) <= 3 else _wrapped(groups, _tflops)


def _speedup_and_tflops(groups: Sequence[Records]) -> Any:
    fig, axes = _panels(len(groups), 2)
    for (left, right), rows in zip(axes, groups, strict=True):
        _speedup(left, rows)
        _tflops(right, rows)
    return fig


def _one_kind(panel: Callable) -> Callable[[Records], Any]:
    """A plot with one kind of panel, one panel for each shape."""
    return lambda records: _wrapped(
        _grouped(records, ("heads", "kv_heads", "head_dim", "causal", "dtype", "direction")), panel
    )


def _wrapped(groups: Sequence[Records], panel: Callable) -> Any:
    columns = min(3, len(groups))
    fig, axes = _panels(-(-len(groups) // columns), columns)
    flat = list(axes.flat)
    for ax, rows in zip(flat, groups, strict=False):
        panel(ax, rows)
    for ax in flat[len(groups) :]:
        ax.remove()
    return fig


def _speedup(ax: Any, rows: Records) -> None:
    drawn = [row for row in rows if row.get("speedup")]
    _lines(ax, drawn, "case.length", "speedup", "tokens", "speed-up over the reference")
    ax.set_title(f"Speed-up, {_call(rows[0])}", fontsize=10)


def _tflops(ax: Any, rows: Records) -> None:
    _lines(ax, rows, "case.length", "tflops", "tokens", "TFLOP/s")
    peak = record.field(rows[0], "ceilings.matrix_tflops")
    if peak:
        ax.axhline(peak, color="#444444", linewidth=1, dashes=(6, 3))
        at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        ax.annotate("matrix product, measured", (0.99, peak), fontsize=8, **at)
        # leave room for the legend above the line
        ax.set_ylim(top=1.4 * max(peak, *(row["tflops"] for row in rows)))
    ax.set_title(f"Throughput, {_call(rows[0])}", fontsize=10)


def _roofline(ax: Any, rows: Records) -> None:
    peak, copy = (record.field(rows[0], f"ceilings.{name}") for name in ("matrix_tflops", "copy_gb_per_s"))
    points = [{**row, "intensity": row["flop"] / row["bytes"]} for row in rows]
    _lines(ax, points, "intensity", "tflops", "FLOP per byte of q, k, v and output", "TFLOP/s", zero=False)
    ys = [point["tflops"] for point in points] + [peak] * bool(peak)
    lowest, highest = 10 ** math.floor(math.log10(min(ys))), 10 ** math.ceil(math.log10(1.2 * max(ys)))
    if peak and copy:
        knee, last = peak * 1e3 / copy, 2 * max(point["intensity"] for point in points)
        first = max(lowest * 1e3 / copy, min(knee, *(point["intensity"] for point in points)) / 10)
        roof = [(first, copy * first / 1e3), (knee, peak), (max(last, 2 * knee), peak)]
        ax.plot(*zip(*roof, strict=True), color="#444444", linewidth=1.5, zorder=1)
        ax.annotate(f"{peak:.3g} TFLOP/s", roof[-1], ha="right", va="bottom", fontsize=8)
        beside = {"xytext": (8, -8), "textcoords": "offset points"}
        ax.annotate(f"{copy:.3g} GB/s", (knee / 2, peak / 2), ha="left", va="top", fontsize=8, **beside)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(lowest, highest)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.legend(**BELOW, ncols=3)
    ax.set_title(f"Roofline, {_call(rows[0])}", fontsize=10)


def _prefill(records: Records) -> Any:
    """A panel for each model, a group of bars for each length."""
    groups = _grouped(records, ("model", "layers", "dtype"))
    fig, axes = _panels(1, len(groups))
    for ax, rows in zip(axes.flat, groups, strict=True):
        lengths = sorted({row["case"]["seq_len"] for row in rows})
        _bars(ax, rows, [f"{length:,}" for length in lengths], lambda row: f"{row['case']['seq_len']:,}", "time_ms_p50")
        ax.set_xlabel("tokens of the prompt")
        ax.set_ylabel("ms, median\n(x: speed-up over the reference)")
        ax.set_title(f"Prefill, {_model(rows[0])}", fontsize=10)
    return fig


def _decode(records: Records) -> Any:
    groups = _grouped(records, ("model", "layers", "dtype"))
    fig, axes = _panels(1, len(groups))
    for ax, rows in zip(axes.flat, groups, strict=True):
        labels = list(dict.fromkeys(_decoded(row) for row in rows))
        _bars(ax, rows, labels, _decoded, "tokens_per_s")
        ax.set_xlabel("rows × tokens in the cache of each")
        ax.set_ylabel("tokens per second")
        ax.set_title(f"Decoding, {_model(rows[0])}", fontsize=10)
    return fig


def _decoded(row: Mapping[str, Any]) -> str:
    return f"{row['case']['batch']} × {row['case']['context']:,}"


def _paged(records: Records) -> Any:
    groups = _grouped(records, ("heads", "kv_heads", "head_dim", "dtype"))
    fig, axes = _panels(len(groups), 1, width=max(1.0, max(map(len, groups)) / MOST_LABELS))
    for ax, rows in zip(axes.flat, groups, strict=True):
        named = [{**row, "implementation": _pages(row)} for row in rows]
        labels = list(dict.fromkeys(_decoded(row) for row in named))
        _bars(ax, named, labels, _decoded, "gb_per_s")
        ax.set_xlabel("rows × tokens of each")
        ax.set_ylabel("GB/s of keys and values")
        case = rows[0]["case"]
        ax.set_title(
            f"Paged decode\n{case['dtype']}, {tables.heads(case)}",
            fontsize=10,
        )
    return fig


def _pages(row: Mapping[str, Any]) -> str:
    case = row["case"]
    kind = "" if case["kv_dtype"] in (None, "same") else f", {case['kv_dtype']}"
    return f"{row['implementation']} of {case['page_size']}{kind}" if case["page_size"] else row["implementation"]


def _throughput(records: Records) -> Any:
    groups = _grouped(records, ("model", "num_prompts", "lengths", "n", "beam_width", "request_rate"))
    fig, axes = _panels(1, len(groups))
    for ax, rows in zip(axes.flat, groups, strict=True):
        case = rows[0]["case"]
        _bars(ax, rows, [""], lambda row: "", "tokens_per_s")
        ax.set_ylabel("generated tokens per second\n(x: speed-up over static batches)")
        ax.set_title(f"{case['model']}, {case['num_prompts']} requests, {case['lengths']} lengths", fontsize=10)
    return fig


def _sparse(records: Records) -> Any:
    """Time and speed-up over density, a line for each kind of mask; dense attention is a line across."""
    groups = _grouped(records, ("length", "heads", "kv_heads", "head_dim", "causal", "dtype", "direction"))
    fig, axes = _panels(len(groups), 2)
    for (left, right), rows in zip(axes, groups, strict=True):
        several = len({row["implementation"] for row in rows if row["implementation"] != "dense"}) > 1
        lines, dense = [], [row["time_ms_p50"] for row in rows if row["implementation"] == "dense"]
        for row in rows:
            if row["implementation"] != "dense":
                name = row["case"]["mask"] + (f", {row['implementation']}" if several else "")
                lines.append({**row, "implementation": name, "percent": 100 * row["visited"]})
        x_label = "% of the tiles that a causal mask leaves"
        _lines(left, lines, "percent", "time_ms_p50", x_label, "ms, median", zero=False)
        _lines(right, [row for row in lines if row.get("speedup")], "percent", "speedup", x_label, "", zero=False)
        right.set_ylabel("speed-up over dense causal attention")
        right.set_yscale("log")
        right.yaxis.set_major_formatter("{x:g}")
        left.set_ylim(bottom=0)
        if dense:
            level = sum(dense) / len(dense)
            left.axhline(level, color="#444444", linewidth=1, dashes=(6, 3))
            at = {"xycoords": ("axes fraction", "data"), "ha": "left", "va": "bottom"}
            left.annotate("dense causal", (0.01, level), fontsize=8, **at)
        for ax, what in ((left, "Time"), (right, "Speed-up")):
            ax.set_xscale("log", base=2)
            places = (5, 10, 25, 50, 100)
            ax.set_xticks(places, [f"{place}" for place in places])
            ax.minorticks_off()
            ax.set_title(f"{what}, {_call(rows[0])}, {rows[0]['case']['length']:,} tokens", fontsize=10)
    return fig


def _linear(records: Records) -> Any:
    """Time over length, a panel for each rule and direction."""
    fields = ("rule", "direction", "heads", "key_heads", "key_dim", "value_dim", "dtype", "batch")
    return _wrapped(_grouped(records, fields), _over_length)


def _over_length(ax: Any, rows: Records) -> None:
    case = rows[0]["case"]
    _lines(ax, rows, "case.length", "time_ms_p50", "tokens", "ms, median", zero=False)
    places = sorted({row["case"]["length"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(places, [f"{place:,}" for place in places])
    ax.minorticks_off()
    what = {"step": "one token after these"}.get(case["direction"], case["direction"])
    shape = f"{case['heads']} heads, keys of {case['key_dim']}, values of {case['value_dim']}"
    ax.set_title(f"{tables.RULES[case['rule']].capitalize()}, {what}\n{case['dtype']}, {shape}", fontsize=10)


def _serve(records: Records) -> Any:
    """Latencies and throughput over the rate of requests, of each implementation."""
    from matplotlib.ticker import LogLocator

    rates = sorted({row["case"]["request_rate"] for row in records}, key=float)
    rows = [{**row, "place": rates.index(row["case"]["request_rate"])} for row in records]
    fig, axes = _panels(1, 3)
    first, second, third = axes.flat
    for ax, name, title in ((first, "ttft", "Time to first token"), (second, "tpot", "Time per later token")):
        drawn = [
            {**row, "implementation": f"{row['implementation']}, {label}", "ms": row[field]}
            for kind, label in (("median", "median"), ("p99", "P99"))
            for row in rows
            if row.get(field := f"{kind}_{name}_ms") is not None
        ]
        _lines(ax, drawn, "place", "ms", "requests per second", "ms", zero=False)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:,g}")
        ax.yaxis.set_minor_formatter("")
        ax.set_title(f"{title}, {records[0]['case']['model']}", fontsize=10)
    _lines(third, rows, "place", "output_throughput", "requests per second", "generated tokens per second", zero=False)
    third.set_ylim(bottom=0)
    third.set_title(f"Throughput, {records[0]['case']['model']}", fontsize=10)
    for ax in axes.flat:
        ax.set_xticks(range(len(rates)), [rate if rate == "inf" else f"{rate:g}" for rate in rates])
    return fig


# kind: (benchmark, the field that it plots, the function that plots it). A benchmark's first kind is its default.
KINDS: dict[str, tuple[str, str, Callable[[Records], Any]]] = {
    "attention": ("attention", "tflops", _attention),
    "speedup": ("attention", "speedup", _one_kind(_speedup)),
    "tflops": ("attention", "tflops", _one_kind(_tflops)),
    "roofline": ("attention", "bytes", _one_kind(_roofline)),
    "sparse": ("sparse", "time_ms_p50", _sparse),
    "linear": ("linear", "time_ms_p50", _linear),
    "prefill": ("prefill", "time_ms_p50", _prefill),
    "decode": ("decode", "tokens_per_s", _decode),
    "paged": ("paged", "gb_per_s", _paged),
    "throughput": ("throughput", "tokens_per_s", _throughput),
    "serve": ("serve", "output_throughput", _serve),
}


def _panels(rows: int, columns: int, *, width: float = 1.0) -> tuple[Any, Any]:
    """A Figure and its axes; width: factor of a panel's usual width."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(WIDTH * width * columns, HEIGHT * rows + 0.2), layout="constrained")
    fig.get_layout_engine().set(rect=(0, 0.2 / fig.get_figheight(), 1, 1 - 0.2 / fig.get_figheight()))  # type: ignore[union-attr]
    return fig, fig.subplots(rows, columns, squeeze=False)


def _lines(ax: Any, rows: Records, x: str, y: str, x_label: str, y_label: str, *, zero: bool = True) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    for name, looks in _looks(names).items():
        points = sorted((record.field(row, x), row[y]) for row in rows if row["implementation"] == name)
        ax.plot(
            *zip(*points, strict=True),
            label=DISPLAY_NAMES.get(name, name),
            color=COLOURS[looks],
            marker=MARKERS[looks],
            dashes=DASHES[looks] or (None, None),
            markersize=4,
            markevery=max(1, len(points) // 12),
            linewidth=1.5,
        )
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    places = sorted({record.field(row, x) for row in rows})
    if zero:
        ax.set_ylim(bottom=0)
        if len(places) > 1 and places[-1] >= 16 * places[0] and len(places) < 10:
            ax.set_xscale("log", base=2)
        if len(places) < 10:
            ax.set_xticks(places, [f"{place:,}" for place in places])
            ax.minorticks_off()
        else:
            ax.xaxis.set_major_formatter("{x:,.0f}")
    if names:
        ax.legend(fontsize=8)


def _bars(ax: Any, rows: Records, groups: Sequence[str], group_of: Callable, y: str) -> None:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    width = 0.84 / len(names)
    tallest = max(row[y] for row in rows)
    for index, (name, looks) in enumerate(_looks(names).items()):
        own = [row for row in rows if row["implementation"] == name]
        places = [groups.index(group_of(row)) + (index - (len(names) - 1) / 2) * width for row in own]
        bars = ax.bar(
            places,
            [row[y] for row in own],
            width * 0.92,
            label=DISPLAY_NAMES.get(name, name),
            color=COLOURS[looks] if looks else "#FFFFFF",
            hatch=HATCHES[looks],
            edgecolor="#000000",
            linewidth=0.8,
            alpha=0.9,
        )
        if len(groups) * len(names) <= MOST_LABELS:
            ax.bar_label(bars, [_label(row, row[y]) for row in own], fontsize=8, padding=2)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_ylim(0, tallest * 1.18)
    ax.yaxis.set_major_formatter("{x:,g}")
    ax.grid(axis="x", visible=False)
    ax.set_axisbelow(True)
    ax.legend(**BELOW, ncols=min(3, len(names)))


def _label(row: Mapping[str, Any], value: float) -> str:
    """A bar's value and its speed-up over the reference."""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    speedup = row.get("speedup") if row["implementation"] not in ("reference", "static") else None
    return f"{text}\n{speedup:.2f} x" if speedup else text


def _looks(names: Sequence[str]) -> dict[str, int]:
    """The index of each name's style; unknown names get the unused ones."""
    looks = {name: LOOKS[name] for name in names if name in LOOKS}
    left = itertools.cycle([place for place in range(len(COLOURS)) if place not in looks.values()])
    return {name: looks[name] if name in looks else next(left) for name in names}


def _grouped(records: Records, fields: Sequence[str]) -> list[list[Mapping[str, Any]]]:
    """Groups of records whose cases have the same values of these fields, in the order of each group's first record."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for one in records:
        groups.setdefault(tuple(one["case"].get(name) for name in fields), []).append(one)
    return list(groups.values())


def _call(row: Mapping[str, Any]) -> str:
    case = row["case"]
    what = {"forward": "forward", "backward": "backward", "both": "forward and backward"}[case["direction"]]
    return f"{what}\n{case['dtype']}, {tables.heads(case)}{', causal' if case['causal'] else ''}"


def _model(row: Mapping[str, Any]) -> str:
    case = row["case"]
    return f"{case['model']}\n{tables.layers(case)}, {case['dtype']}"


def _circumstances(records: Records) -> str:
    """Device, versions, commit and date, in one line."""
    first = records[0]
    device = first["device"]
    name = device["host"] if device["platform"] == "cpu" else device.get("name", device["arch"])
    seen = {one["git_commit"] for one in records}
    parts = [
        f"{name} ({device['arch']})" if name != device["arch"] else name,
        f"jfa {first['versions']['jfa']}, jax {first['versions']['jax']}",
        "commits " + ", ".join(sorted(map(str, seen))) if len(seen) > 1 else f"commit {first['git_commit']}",
        first["date"][:10],
    ]
    return " · ".join(itertools.chain(parts))
