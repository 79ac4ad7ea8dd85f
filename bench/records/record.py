"""Records: how a list of them is printed, kept in a file and read again, and what an error makes of one."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import jfa

FORMATS = ("md", "csv", "json", "jsonl")

Record = dict[str, Any]
Heading = Callable[[Mapping[str, Any]], str]


def render(records: Sequence[Mapping[str, Any]], output: str, columns: Mapping[str, str]) -> str:
    """The records as text; columns: field (dots reach inside) to heading, used by md and csv."""
    if output == "json":
        return json.dumps(records)
    if output == "jsonl":
        return "\n".join(json.dumps(record) for record in records)
    shown = [{**_shown(record), **record} for record in records]
    if output == "csv":
        text = io.StringIO()
        rows = [[field(record, path) for path in columns] for record in shown]
        csv.writer(text, lineterminator="\n").writerows([list(columns.values()), *rows])
        return text.getvalue().rstrip("\n")
    rows = [[_cell(record, path) for path in columns] for record in shown]
    lines = [list(columns.values()), ["---"] * len(columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _shown(record: Mapping[str, Any]) -> Record:
    """What a table says of a measurement in fewer words than its fields have."""
    status = record.get("status")
    found: Record = {"ms": record.get("time_ms_p50", "n/a" if status in ("unsupported", "missing") else status)}
    if direction := field(record, "case.direction"):
        found["dir"] = {"forward": "fwd", "backward": "bwd"}.get(direction, direction)
    if record.get("share_of_peak") is not None:
        found["peak"] = f"{record['share_of_peak']:.0%}"
    if record.get("time_ms_p50"):
        found["spread"] = f"{(record['time_ms_p80'] - record['time_ms_p20']) / 2 / record['time_ms_p50']:.0%}"
    if record.get("tokens_per_s_mean"):
        mean, deviation = record["tokens_per_s_mean"], record["tokens_per_s_deviation"]
        digits = 0 if mean >= 100 else 1
        found["t/s"] = f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"
    if record.get("peak_bytes") is not None:
        found["peak_mib"] = record["peak_bytes"] / 2**20
    return found


def table_of(columns: Mapping[str, str], heading: Heading | None = None) -> Callable[[Sequence[Record]], str]:
    """What makes a Markdown table of records, and under it says why some rows have no figures.

    heading: of a record; those with the same one, side by side, make a table of their own.
    """

    def table(records: Sequence[Record]) -> str:
        parts = []
        for head, rows in itertools.groupby(records, heading or (lambda one: "")):
            parts += [head, render(list(rows), "md", columns)]
        return "\n\n".join(part for part in (*parts, refusals(records)) if part)

    return table


def field(record: Mapping[str, Any], path: str) -> Any:
    """What a record says under a name with dots; None where it says nothing."""
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _cell(record: Mapping[str, Any], path: str) -> str:
    value = field(record, path)
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def refusals(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for every reason why an implementation has no figures, and how many records it stands for."""
    counts: dict[str, int] = {}
    for record in records:
        if record["status"] != "ok":
            line = f"{record['implementation']}: {record['status']}: {record['reason']}"
            counts[line] = counts.get(line, 0) + 1
    return "\n".join(line if count == 1 else f"{line} ({count} times)" for line, count in counts.items())


# What a call that cannot serve, or a library that does not know the device, ends in. An AssertionError is not among
# them: it is a mistake of ours and ends the run.
REFUSALS = (NotImplementedError, ValueError, TypeError, RuntimeError, MemoryError, ImportError, OSError, ExceptionGroup)


def outcome(error: BaseException) -> Record:
    """The status and the reason of a record whose implementation has ended in one of REFUSALS."""
    text = str(error).strip() or type(error).__name__
    reason = text.splitlines()[0]
    if isinstance(error, ImportError):
        return {"status": "missing", "reason": reason}
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return {"status": "oom", "reason": reason}
    if not isinstance(error, jfa.UnsupportedError):
        reason = f"{type(error).__name__}: {reason}"
    return {"status": "unsupported", "reason": reason}


def tried(runs: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Record], dict[str, Callable[[], Any]]]:
    """Calls each once: the status and reason of all, and the runs that serve."""
    found, serve = {}, {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run())
        except REFUSALS as refusal:
            found[name] = outcome(refusal)
        else:
            found[name], serve[name] = {"status": "ok", "reason": None}, run
    return found, serve


class File:
    """A JSON file of records that is whole after each of them: an end at any time loses none."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._end = 0
        self._file.write(b"[]\n")
        self._file.flush()

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends one."""
        self._file.seek(self._end)
        self._file.write((b",\n" if self._end else b"[\n") + json.dumps(record).encode())
        self._end = self._file.tell()
        self._file.write(b"\n]\n")
        self._file.flush()

    def close(self) -> None:
        """Gives the file back."""
        self._file.close()


def load(path: Path) -> list[Record]:
    """The records of a JSON file, or of one with a record a line.

    Raises:
      ValueError: it holds no records.
    """
    text = path.read_text()
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, {error.msg}") from None
    if not all(isinstance(one, dict) and "benchmark" in one for one in found):
        raise ValueError(f"{path} holds no records: they are objects with a field benchmark")
    return found
