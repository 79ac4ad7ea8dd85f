"""`jfa-bench compare`: the changes between two files of records that exceed the noise.

A time has changed if the medians differ by more than a threshold and the ranges from p20 to p80 do not overlap. A
different status is a change too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import record

THRESHOLD = 0.03
# Fields of the machine and software; their differences between the two files are printed before the changes.
ABOUT = ("device.name", "device.arch", "device.host", "device.driver", "device.power", "runtime", "flags", "versions")

COLUMNS = {
    "benchmark": "benchmark",
    "what": "case",
    "implementation": "what",
    "before": "before",
    "after": "after",
    "change": "change",
    "verdict": "verdict",
}

Record = Mapping[str, Any]


def moved(before: Sequence[Record], after: Sequence[Record], *, threshold: float = THRESHOLD) -> Iterator[dict]:
    """A record for each case whose time or status changed; cases that are only in one file are skipped."""
    known = {_key(one): one for one in before}
    for one in after:
        old = known.get(_key(one))
        verdict = old and _verdict(old, one, threshold)
        if old and verdict:
            yield {
                **{name: one[name] for name in ("benchmark", "case", "implementation")},
                "before": _shown(old),
                "after": _shown(one),
                "ratio": _ratio(old, one),
                "verdict": verdict,
            }


def _key(one: Record) -> str:
    return json.dumps([one["benchmark"], one["implementation"], one["case"]], sort_keys=True)


def common(before: Sequence[Record], after: Sequence[Record]) -> int:
    """The number of cases that are in both."""
    return len({_key(one) for one in before} & {_key(one) for one in after})


def _verdict(old: Record, new: Record, threshold: float) -> str | None:
    if old["status"] != new["status"]:
        return "fixed" if new["status"] == "ok" else "broken" if old["status"] == "ok" else "other status"
    ratio = _ratio(old, new)
    if ratio is None or 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return None
    if ratio > 1:
        return "slower" if new["time_ms_p20"] > old["time_ms_p80"] else None
    return "faster" if new["time_ms_p80"] < old["time_ms_p20"] else None


def _ratio(old: Record, new: Record) -> float | None:
    """The ratio of the medians; None if one has no time."""
    times = old.get("time_ms_p50"), new.get("time_ms_p50")
    return times[1] / times[0] if times[0] and times[1] else None


def _shown(one: Record) -> str:
    return f"{one['time_ms_p50']:.4g} ms" if one["status"] == "ok" else one["status"]


def other_circumstances(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """A line for each field of ABOUT that differs."""
    lines = []
    for path in ABOUT:
        old, new = (_facts(records, path) for records in (before, after))
        if old != new:
            lines.append(f"{path}: {', '.join(old) or 'unknown'} -> {', '.join(new) or 'unknown'}")
    return lines


def _facts(records: Sequence[Record], path: str) -> list[str]:
    found = (record.field(one, path) for one in records)
    return sorted({fact if isinstance(fact, str) else json.dumps(fact) for fact in found if fact})


def _differing(rows: Sequence[Record]) -> list[str]:
    """The fields of the cases that are not the same in all rows."""
    names = dict.fromkeys(name for row in rows for name in row["case"])
    return [name for name in names if len({json.dumps(row["case"].get(name)) for row in rows}) > 1]


def table(rows: Sequence[Record]) -> str:
    """A Markdown table; cases are identified by the fields that differ between them."""
    names = _differing(rows)
    shown = [
        {
            **row,
            "what": ", ".join(f"{name} {row['case'].get(name)}" for name in names),
            "change": None if row["ratio"] is None else f"{row['ratio'] - 1:+.1%}",
        }
        for row in rows
    ]
    return record.render(shown, "md", COLUMNS)


def timed(path: Path) -> list[record.Record]:
    """The records of a file that are measurements, unlike those of compile and prove.

    Raises:
      ClickException: there are none.
    """
    found = [one for one in record.load(path) if "case" in one and "implementation" in one]
    if not found:
        raise click.ClickException(f"{path} contains no records of measurements")
    return found
