"""`jfa-bench report`: records as tables, plots and an HTML page.

Without a folder it prints the support table, generated only from the records of `compile` and `prove`.
"""

import base64
import html
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from .. import names
from . import plot, record
from .tables import VIEWS

RESULTS = Path(__file__).parents[1] / "results"
DTYPES = {
    "16 bits": ("bfloat16", "float16"),
    "16 bits on quantized numbers": tuple(dtype for dtype in names.PAGED_DTYPES if " on " in dtype),
    "float32": ("float32",),
    "8 bits": ("int8 on int8",),
}

# Fields of a case that its table needs; records of earlier versions lack some.
NEEDS = {"prefill": ("model", "layers", "seq_len"), "decode": ("model", "layers", "context")}

PARTS = ("speedup", "tflops")  # kinds of plots that are part of another one

Record = Mapping[str, Any]


def support(compiled: Sequence[Record], proven: Sequence[Record], *, skipping: bool = False) -> str:
    """A Markdown table: for the kernels of an op and direction, the highest level that all their records reached.

    executed: every proof in these dtypes passed; compiled: there is machine code that the GPU could launch. The number
    of spilled registers is that of the worst configuration. Dtypes with the same cells share a line.

    skipping: of names.SKIPPING_OPS; otherwise of all others.
    """
    skips = {kernel for kernel, (op, _) in names.KERNELS.items() if op in names.SKIPPING_OPS}
    chosen = [row for row in compiled if row["arch"] in names.ARCHS and (row["kernel"] in skips) == skipping]
    return _support(chosen, proven, names.ARCHS)


def support_on_tpus(compiled: Sequence[Record], proven: Sequence[Record]) -> str:
    """The same table for TPUs. interpreted: every proof passed in JAX's interpreter, the same one for all of them."""
    return _support([row for row in compiled if row["arch"] in names.TPU_ARCHS], proven, names.TPU_ARCHS)


def beside(records: Sequence[Record]) -> str:
    """A Markdown table of `compile --peers`: instruction words as multiples of jfa's, other parts, and bytes in HBM."""
    lines = [["arch", "call", "kernel", "words", "of jfa's", "other parts", "HBM MB", "copied MB"], ["---"] * 8]
    ours = {(row["arch"], row["call"]): row.get("words") for row in records if row["implementation"] == "jfa"}
    for row in records:
        cells = [row["arch"], row["call"], row["implementation"]]
        if row["status"] == "ok":
            of_ours = ours.get((row["arch"], row["call"]))
            cells += [f"{row['words']:,}", f"{row['words'] / of_ours:.2f}" if of_ours else ""]
            cells += [", ".join(map(str, row["other_parts"]))]
            cells += [f"{row[field] / 1e6:,.1f}" for field in ("hbm_bytes", "copied_bytes")]
        else:
            cells += [row["status"], *[""] * 4]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attention_beside(records: Sequence[Record], other: str) -> str:
    """A Markdown table of `attention`: milliseconds of jfa and of another library, and the latter over the former."""
    of_pass = other, "times as fast"
    lines = [["dtype", "tokens", "heads", "forward", *of_pass, "gradients", *of_pass], ["---"] * 9]
    times: dict[tuple, dict[tuple, float | None]] = {}
    for row in records:
        case = row["case"]
        heads = "" if case["heads"] == case["kv_heads"] else f" over {case['kv_heads']}"
        call = case["dtype"], f"{case['length']:,}", f"{case['heads']}{heads} of {case['head_dim']}"
        times.setdefault(call, {})[case["direction"], row["implementation"]] = row.get("time_ms_p50")
    for call, found in times.items():
        cells = list(call)
        for direction in ("forward", "backward"):
            own, others = (found.get((direction, name)) for name in ("xla", other))
            if own and others:
                cells += [f"{own:,.1f}", f"{others:,.1f}", f"{others / own:.2f}"]
            else:
                cells += [""] * 3
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _support(compiled: Sequence[Record], proven: Sequence[Record], archs: Sequence[str]) -> str:
    compiled = [row for row in compiled if row["status"] != "unsupported"]
    groups: dict[Any, list[str]] = {}  # the kernels of an op and direction
    for kernel in dict.fromkeys(row["kernel"] for row in compiled):
        groups.setdefault(names.KERNELS.get(kernel, kernel), []).append(kernel)
    lines = [["kernel", *archs], ["---"] * (1 + len(archs))]
    for kernels in groups.values():
        named: dict[tuple[str, ...], list[str]] = {}
        for name, dtypes in DTYPES.items():
            rows = [row for row in compiled if row["kernel"] in kernels and row["dtype"] in dtypes]
            if not rows:
                continue
            executed = [r for r in proven if r["dtype"] in dtypes and set(kernels) & set(r.get("kernels", ()))]
            cells = tuple(
                _cell(
                    [r for r in rows if r["arch"] == arch],
                    [r for r in executed if r["arch"] == _proven_on(arch)],
                    kernels,
                    arch,
                )
                for arch in archs
            )
            named.setdefault(cells, []).append(name)
        shown = ", ".join(f"`{kernel}`" for kernel in kernels)
        lines += [[f"{shown}, {' and '.join(of)}", *cells] for cells, of in named.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bounds(compiled: Sequence[Record], ops: Sequence[str]) -> str:
    """A Markdown table: for each kernel of ops in bfloat16, matrix_bound and what limits it, for each of HEAD_DIMS.

    v: vector instructions; w: waves compute products that others compute too; nothing: the matrix units; -: there is no
    loop, or the kernel refuses the head_dim. A second line has the same for the loop over masked tiles, if any.
    """
    archs = names.EXECUTED_ARCHS
    known = {(row["kernel"], row["arch"], row["dtype"], row["head_dim"]): row for row in compiled if row["op"] in ops}
    lines = [["loop", *archs], ["---"] * (1 + len(archs))]
    for kernel in dict.fromkeys(kernel for kernel, *_ in known):
        for loop, title in (("loop_cycles", f"`{kernel}`"), ("masked_loop_cycles", f"`{kernel}`, partial tiles")):
            rows = [[known[kernel, arch, "bfloat16", d] for d in names.HEAD_DIMS] for arch in archs]
            if loop == "loop_cycles" or all(one.get(loop) for of_arch in rows for one in of_arch):
                lines.append([title, *(", ".join(_bound(one, one.get(loop)) for one in of_arch) for of_arch in rows)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bound(row: Record, cycles: Mapping[str, float] | None) -> str:
    """The bound of a loop as machine_code.py defines matrix_bound, and a letter for what limits it."""
    if not cycles:
        return "-"
    matrix, vector = cycles.get("matrix", 0), cycles.get("vector", 0) + cycles.get("transcendental", 0)
    bound = min(row["useful_matrix_cycles"], matrix) / max(matrix, vector)
    return f"{bound:.2g}{'v' if vector > matrix else 'w' if bound < 1 else ''}"


def devices(compiled: Sequence[Record]) -> str:
    """A Markdown table of steps compiled for several devices: what each holds, and what crosses between them."""
    lines = [["model", "devices", "step", "each holds", "cache", "crosses"], ["---"] * 6]
    for row in compiled:
        crossing = ", ".join(f"{one['count']} {one['kind']} {one['shape']}" for one in row["collectives"])
        held, cache = (f"{row[field] / 1e9:.2f} GB" for field in ("device_bytes", "cache_bytes"))
        lines.append([row["model"], _devices(row), row["step"], held, cache, crossing])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shards(compiled: Sequence[Record]) -> str:
    """A Markdown table of the attention kernels that one of several devices runs, and of their operands."""
    lines = [["model", "devices", "step", "kernel", "operands"], ["---"] * 5]
    for row in compiled:
        for one in row["kernels"]:
            if "attention" in one["name"]:
                kernel = f"{one['count']} `{one['name']}`"
                lines.append([row["model"], _devices(row), row["step"], kernel, ", ".join(one["operands"])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def launches(compiled: Sequence[Record]) -> str:
    """A Markdown table of whole steps of models on one GPU: launches of the step, and those of a layer."""
    lines = [["model", "GPU", "rows", "tokens", "cache", "launches", "a layer", "which"], ["---"] * 8]
    for row in compiled:
        of_layer = Counter(name.partition("__")[0] for name in row["one_layer"])
        told = [f"{n} `{name}`" if n > 1 else f"`{name}`" for name, n in of_layer.items() if name in names.KERNELS]
        if others := sum(n for name, n in of_layer.items() if name not in names.KERNELS):
            told.append(f"{others} of XLA")
        cache = f"{row['kv_dtype']} pages" if row["kv_dtype"] else {"paged": "pages"}.get(row["cache"], row["cache"])
        model = f"{row['model']} {row['weights'] or ''}".rstrip()
        who = [model, row["arch"], str(row["batch"]), f"{row['context']:,}", cache]
        lines.append([*who, str(row["launches"]), str(row["launches_per_layer"]), ", ".join(told)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def models_on_tpus(compiled: Sequence[Record]) -> str:
    """A Markdown table of whole steps of models, compiled for TPUs.

    kernels: of jfa; an op without one says which backend computes it. copies: of whole arrays of the cache.
    """
    lines = [
        ["model", "devices", "step", "cache", "each holds", "temporary", "kernels", "crosses", "copies"],
        ["---"] * 9,
    ]
    for row in compiled:
        held, cache = (f"{row[field] / 1e9:.2f} GB" for field in ("device_bytes", "cache_bytes"))
        kernels = [f"{one['count']} `{one['name']}`" for one in row["kernels"]]
        kernels += [f"{op} by {' and '.join(by)}" for op, by in row["backends"].items() if list(by) != ["tpu"]]
        crossing = ", ".join(f"{one['count']} {one['kind']} {one['shape']}" for one in row["collectives"])
        temporary, copies = f"{row['temporary_bytes'] / 2**20:.0f} MiB", str(row["cache_copies"])
        which = f"{row['cache']}, {cache}"
        who = [row["model"], _devices(row), row["step"], which]
        lines.append([*who, held, temporary, ", ".join(kernels), crossing or "nothing", copies])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _devices(row: Record) -> str:
    hosts = f"{row['hosts']} x " if row["hosts"] > 1 else ""
    mesh = "".join(f", {axis}={size}" for axis, size in (row.get("mesh") or {}).items())
    return f"{hosts}{row['devices']} {row['arch']}{mesh}"


def _proven_on(arch: str) -> str:
    return names.INTERPRETED if arch in names.TPU_ARCHS else arch


def _cell(compiled: Sequence[Record], proven: Sequence[Record], kernels: Sequence[str], arch: str) -> str:
    has_code = bool(compiled) and all(row["status"] in ("ok", "spills") for row in compiled)
    ran = {kernel for row in proven for kernel in row["kernels"]}
    passed = ran >= set(kernels) and all(row["status"] == "ok" for row in proven)
    if arch in names.TPU_ARCHS:
        return ", ".join(name for name, reached in (("compiled", has_code), ("interpreted", passed)) if reached)
    if not has_code:
        return "lowered"
    rung = "executed" if passed else "compiled"
    spills = max(row["vgpr_spills"] for row in compiled)
    return f"{rung}, {spills} spilled" if spills else rung


def load(name: str) -> list[Record]:
    """The records of bench/results/<name>.json, then of <name>-*.json: one file of all would be too large to review."""
    files = sorted(RESULTS.glob(f"{name}*.json"), key=lambda file: file.stem)
    return [one for file in files for one in record.load(file)]


def gather(folder: Path) -> dict[str, list[record.Record]]:
    """The records of a folder's .json and .jsonl files by benchmark, for benchmarks that have a table.

    Records of earlier versions, whose cases lack a field, are skipped with a message on stderr.

    Raises:
      ValueError: there are none.
    """
    found: dict[str, list[record.Record]] = {name: [] for name in VIEWS}
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")]):
        records = record.load(file)
        usable = [one for one in records if all(name in one["case"] for name in NEEDS.get(one["benchmark"], ()))]
        if len(usable) < len(records):
            click.echo(f"{file}: skipped {len(records) - len(usable)} records of an earlier version", err=True)
        for one in usable:
            found.get(one["benchmark"], []).append(one)
    found = {name: records for name, records in found.items() if records}
    if not found:
        raise ValueError(f"there are no records of {', '.join(VIEWS)} in {folder}; create some with jfa-bench all")
    return found


def markdown(found: Mapping[str, Sequence[record.Record]]) -> str:
    """A section for each benchmark, in the form used in the README."""
    return "\n\n".join(
        f"### {name}\n\n{about(records)}\n\n{VIEWS[name].table(records)}" for name, records in found.items()
    )


def about(records: Sequence[Record]) -> str:
    """Device, versions, flags, commit and date in a sentence."""
    first = records[0]
    device = first["device"]
    name = device.get("name", device["arch"])
    parts = [
        device["host"] if name == "cpu" else f"{name} ({device['arch']}), {device['host']}",
        device.get("driver"),
        ", ".join(f"{what} {value}" for what, value in device.get("power", {}).items()),
        ", ".join(f"{package} {number}" for package, number in first["versions"].items()),
        first["flags"],
        f"commit {first['git_commit']}",
        first["date"][:10],
    ]
    return "; ".join(part for part in parts if part) + "."


def page(found: Mapping[str, Sequence[record.Record]]) -> str:
    """A self-contained HTML document: plots, tables, and the device and versions of the records."""
    sections = []
    for name, records in found.items():
        figures = "".join(_picture(records, kind) for kind in plot.kinds(records) if kind not in PARTS)
        text = _tables(VIEWS[name].table(records))
        sections.append(
            f"<section><h2>{name}</h2><p>{html.escape(about(records))}</p>{figures}"
            f"<details><summary>{len(records)} records</summary>{text}</details></section>"
        )
    return _PAGE.replace("@sections@", "\n".join(sections))


def _picture(records: Sequence[Record], kind: str) -> str:
    drawn = io.BytesIO()
    plot.figure(records, kind).savefig(drawn, format="svg")
    inside = base64.b64encode(drawn.getvalue()).decode()
    return f'<img alt="{kind}" src="data:image/svg+xml;base64,{inside}">'


def _tables(text: str) -> str:
    """Markdown tables and the lines between them as HTML."""
    parts = []
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith("|")):
        if is_table:
            head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
            parts.append(f"<table>{_row('th', head)}{''.join(_row('td', row) for row in rows)}</table>")
        else:
            parts += [f"<p>{html.escape(line)}</p>" for line in lines if line]
    return "\n".join(parts)


def _row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jfa-bench</title>
<style>
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
  h1, h2 { line-height: 1.2; }
  img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
  table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
  th, td { border-bottom: 1px solid #ccc; padding: 0.15rem 0.7rem; text-align: left; }
  summary { cursor: pointer; }
</style>
<h1>jfa-bench</h1>
@sections@
</html>
"""


def write(folder: Path) -> None:
    """Prints the tables of a folder's records and writes its HTML page."""
    place = folder / "report.html"
    plot.check(place.with_suffix(".svg"))
    found = gather(folder)
    place.write_text(page(found))
    click.echo(markdown(found))
    click.echo(f"{place} written", err=True)
