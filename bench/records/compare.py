"""`jfa-bench compare`: the changes between two files of records that exceed the noise.

A figure has changed if it differs by more than a threshold and, where the records have them, the ranges from p20 to p80
do not overlap. A different status is a change too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from . import record

THRESHOLD = 0.03
# Fields of the machine and software; their differences between the two files are printed before the changes.
ABOUT = ("device.name", "device.arch", "device.host", "device.driver", "device.power", "runtime", "flags", "versions")

COLUMNS = {
    "benchmark": "benchmark",
    "what": "case",
    "implementation": "what",
    "figure": "figure",
    "before": "before",
    "after": "after",
    "change": "change",
    "verdict": "verdict",
}

Record = Mapping[str, Any]


class Figure(NamedTuple):
    """A field that is compared. spread: the fields with the range of its samples."""

    field: str
    name: str
    unit: str = ""
    more_is_better: bool = False
    spread: tuple[str, str] | None = None


TIME = Figure("time_ms_p50", "time", " ms", spread=("time_ms_p20", "time_ms_p80"))
_SPEED = Figure("tokens_per_s", "speed", " tokens/s", more_is_better=True)
# What is compared of benchmarks without a time of one call.
FIGURES = {
    "accuracy": (Figure("perplexity", "perplexity"),),
    "memory": (Figure("wasted_share", "wasted share"),),
    "serve": (
        Figure("output_throughput", "speed", " tokens/s", more_is_better=True),
        Figure("median_ttft_ms", "TTFT", " ms"),
        Figure("median_tpot_ms", "TPOT", " ms"),
    ),
    "speculation": (_SPEED, Figure("speedup", "speedup", more_is_better=True)),
    "throughput": (_SPEED,),
}


def moved(before: Sequence[Record], after: Sequence[Record], *, threshold: float = THRESHOLD) -> Iterator[dict]:
    """A record for each figure or status that changed; cases that are only in one file are skipped."""
    known = {_key(one): one for one in before}
    for one in after:
        if (old := known.get(_key(one))) is None:
            continue
        shared = {name: one[name] for name in ("benchmark", "case", "implementation")}
        if old["status"] != one["status"]:
            verdict = "fixed" if one["status"] == "ok" else "broken" if old["status"] == "ok" else "other status"
            states = {"before": old["status"], "after": one["status"]}
            yield {**shared, "figure": "status", **states, "ratio": None, "verdict": verdict}
            continue
        for figure in FIGURES.get(one["benchmark"], (TIME,)):
            if verdict := _verdict(old, one, figure, threshold):
                yield {
                    **shared,
                    "figure": figure.name,
                    "before": f"{old[figure.field]:.4g}{figure.unit}",
                    "after": f"{one[figure.field]:.4g}{figure.unit}",
                    "ratio": one[figure.field] / old[figure.field] if old[figure.field] else None,
                    "verdict": verdict,
                }


def _key(one: Record) -> str:
    return json.dumps([one["benchmark"], one["implementation"], one["case"]], sort_keys=True)


def common(before: Sequence[Record], after: Sequence[Record]) -> int:
    """The number of cases that are in both."""
    return len({_key(one) for one in before} & {_key(one) for one in after})


def _verdict(old: Record, new: Record, figure: Figure, threshold: float) -> str | None:
    """How a figure has changed; None if it has not, or one record does not have it."""
    first, second = old.get(figure.field), new.get(figure.field)
    if first is None or second is None or max(first, second) <= min(first, second) * (1 + threshold):
        return None
    lower, higher = (old, new) if second > first else (new, old)
    if figure.spread and lower[figure.spread[1]] >= higher[figure.spread[0]]:
        return None
    return "better" if (second > first) == figure.more_is_better else "worse"


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
