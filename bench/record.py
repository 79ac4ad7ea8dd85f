"""What a measurement says about itself, and how a list of them is printed."""

import csv
import datetime
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jfa.device import probe

FORMATS = ("md", "csv", "json", "jsonl")


def circumstances() -> dict[str, Any]:
    """The fields that every record of one run shares: device, versions, flags, commit, date."""
    device = probe()
    return {
        "device": {"platform": device.platform, "arch": device.arch, "host": _processor(), "cpus": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in ("jfa", "jax", "jaxlib", "flax")},
        "flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def render(records: Sequence[Mapping[str, Any]], output: str, columns: Mapping[str, str]) -> str:
    """The records as text; columns: field (dots reach inside) to heading, used by md and csv."""
    if output == "json":
        return json.dumps(records)
    if output == "jsonl":
        return "\n".join(json.dumps(record) for record in records)
    rows = [[_cell(record, field) for field in columns] for record in records]
    text = io.StringIO()
    if output == "csv":
        csv.writer(text, lineterminator="\n").writerows([list(columns.values()), *rows])
        return text.getvalue().rstrip("\n")
    lines = [list(columns.values()), ["---"] * len(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(record: Mapping[str, Any], field: str) -> str:
    value: Any = record
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if value is None:
        return ""
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def _processor() -> str:
    """The processor's name as Linux states it, else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor()


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
