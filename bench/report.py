"""`jfa-bench report`: the support table, from what `compile` and `prove` have recorded and from nothing else."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import aot
from .ops import PAGED_DTYPES

RESULTS = Path(__file__).parent / "results"
DTYPES = {
    "16 bits": ("bfloat16", "float16"),
    "16 bits on quantized pages": tuple(dtype for dtype in PAGED_DTYPES if " on " in dtype),
    "float32": ("float32",),
}

Record = Mapping[str, Any]


def support(compiled: Sequence[Record], proven: Sequence[Record]) -> str:
    """A Markdown table: for each kernel and architecture the highest rung that all its records reached.

    executed: every proof in these dtypes held; compiled: machine code that a card would start; a number of spilled
    registers is that of the worst configuration.
    """
    compiled = [row for row in compiled if row["status"] != "unsupported"]
    kernels = dict.fromkeys(row["kernel"] for row in compiled)
    lines = [["kernel", *aot.ARCHS], ["---"] * (1 + len(aot.ARCHS))]
    for kernel in kernels:
        for name, dtypes in DTYPES.items():
            if not any(row["kernel"] == kernel and row["dtype"] in dtypes for row in compiled):
                continue
            cells = [
                _cell(
                    [r for r in compiled if (r["kernel"], r["arch"]) == (kernel, arch) and r["dtype"] in dtypes],
                    [
                        r
                        for r in proven
                        if r["arch"] == arch and r["dtype"] in dtypes and kernel in r.get("kernels", ())
                    ],
                )
                for arch in aot.ARCHS
            ]
            lines.append([f"`{kernel}`, {name}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(compiled: Sequence[Record], proven: Sequence[Record]) -> str:
    if not compiled or any(row["status"] not in ("ok", "spills") for row in compiled):
        return "lowered"
    rung = "executed" if proven and all(row["status"] == "ok" for row in proven) else "compiled"
    spills = max(row["vgpr_spills"] for row in compiled)
    return f"{rung}, {spills} spilled" if spills else rung


def load(name: str) -> list[Record]:
    """The records of bench/results/<name>.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


@click.command("report")
def command() -> None:
    """The support table, from the records in bench/results."""
    click.echo(support(load("compile"), load("prove")))
