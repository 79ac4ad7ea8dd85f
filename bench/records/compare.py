"""`jfa-bench compare`: what moved between two files of records, beyond the noise of both.

A time has moved when the medians differ by more than a threshold and the middles of the samples, from p20 to p80, do
not overlap. A status that changed has moved too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from . import record

THRESHOLD = 0.03
# Of the circumstances; what differs between two files is said above what moved.
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
    """A record of each case whose time or status is another in `after`; cases that only one side has are left out."""
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
    """How many cases are in both."""
    return len({_key(one) for one in before} & {_key(one) for one in after})


def _verdict(old: Record, new: Record, threshold: float) -> str | None:
    if old["status"] != new["status"]:
        return "mended" if new["status"] == "ok" else "broken" if old["status"] == "ok" else "other status"
    ratio = _ratio(old, new)
    if ratio is None or 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return None
    if ratio > 1:
        return "slower" if new["time_ms_p20"] > old["time_ms_p80"] else None
    return "faster" if new["time_ms_p80"] < old["time_ms_p20"] else None


def _ratio(old: Record, new: Record) -> float | None:
    """Of the medians; None where one has no time."""
    times = old.get("time_ms_p50"), new.get("time_ms_p50")
    return times[1] / times[0] if times[0] and times[1] else None


def _shown(one: Record) -> str:
    return f"{one['time_ms_p50']:.4g} ms" if one["status"] == "ok" else one["status"]


def other_circumstances(before: Sequence[Record], after: Sequence[Record]) -> list[str]:
    """A line for each fact of ABOUT that is not the same in both."""
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
    """The fields of the cases that tell rows apart."""
    names = dict.fromkeys(name for row in rows for name in row["case"])
    return [name for name in names if len({json.dumps(row["case"].get(name)) for row in rows}) > 1]


def table(rows: Sequence[Record]) -> str:
    """Markdown; a case is told by the fields that differ."""
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
    """The records of a file that have a time or could have one: those of compile and prove have neither.

    Raises:
      ClickException: there are none.
    """
    found = [one for one in record.load(path) if "case" in one and "implementation" in one]
    if not found:
        raise click.ClickException(f"{path} holds no records of measurements")
    return found
