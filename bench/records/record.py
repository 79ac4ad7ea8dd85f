"""Records: formats a list of them, writes them to a file and reads them. Nothing here imports JAX."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import names

Record = dict[str, Any]

SHORT_DIRECTIONS = {"forward": "fwd", "backward": "bwd"}


def render(records: Sequence[Mapping[str, Any]], output: str, columns: Mapping[str, str]) -> str:
    """The records as text. columns, for md and csv: field (with dots for nested fields) to heading."""
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
    """Shorter names and values for the columns of a table."""
    status, name = record.get("status"), record.get("implementation")
    found: Record = {"ms": record.get("time_ms_p50", "n/a" if status in ("unsupported", "missing") else status)}
    found["what"] = "products" if name == names.MATRIX_PRODUCTS else name
    if direction := field(record, "case.direction"):
        found["dir"] = SHORT_DIRECTIONS.get(direction, direction)
    if record.get("share_of_peak") is not None:
        found["peak"] = percent(record["share_of_peak"])
    if record.get("time_ms_p50"):
        found["spread"] = percent((record["time_ms_p80"] - record["time_ms_p20"]) / 2 / record["time_ms_p50"])
    if record.get("peak_bytes") is not None:
        found["peak_mib"] = record["peak_bytes"] / 2**20
    return found


def number(value: float) -> str:
    """A number in at most six characters: three significant digits, but all digits of an integer part below 100,000."""
    size = abs(value)
    if size >= 99_999.5:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    if 0 < size < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if size >= 99.95 else f"{value:.3g}"


def percent(share: float) -> str:
    """A fraction as a percentage in at most four characters."""
    return f"{share:.0%}" if share < 9.995 else ">10x"


def field(record: Mapping[str, Any], path: str) -> Any:
    """The value of a field, with dots for nested fields; None if the record does not have it."""
    value: Any = record
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _cell(record: Mapping[str, Any], path: str) -> str:
    value = field(record, path)
    if value is None:
        return ""
    return number(value) if isinstance(value, float) else str(value)


def refusals(records: Sequence[Mapping[str, Any]]) -> str:
    """A line for each reason why an implementation has no results, with the number of records that it applies to."""
    counts: dict[str, int] = {}
    for record in records:
        if record["status"] != "ok":
            line = f"{record['implementation']}: {record['status']}: {record['reason']}"
            counts[line] = counts.get(line, 0) + 1
    return "\n".join(line if count == 1 else f"{line} ({count} times)" for line, count in counts.items())


class File:
    """A JSON file of records that is valid after each of them, so that an interruption loses none."""

    def __init__(self, path: Path):
        self._file = path.open("wb")
        self._end = 0
        self._file.write(b"[]\n")
        self._file.flush()

    def add(self, record: Mapping[str, Any]) -> None:
        """Appends a record."""
        self._file.seek(self._end)
        self._file.write((b",\n" if self._end else b"[\n") + json.dumps(record).encode())
        self._end = self._file.tell()
        self._file.write(b"\n]\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def load(path: Path) -> list[Record]:
    """The records of a JSON or JSON lines file.

    Raises:
      ValueError: it contains no records.
    """
    text = path.read_text()
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}, {error.msg}") from None
    if not all(isinstance(one, dict) and "benchmark" in one for one in found):
        raise ValueError(f"{path} contains no records: a record is an object with a field 'benchmark'")
    return found
