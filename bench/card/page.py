"""The page of a folder: what card, whether its results are right, what was predicted and measured, what is left."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jfa import quant, tuning

from ..proof import tune
from ..proof.compile import tile
from ..proof.ops import ON_GPUS, Op
from ..records import record, report, tables
from ..records.record import Record
from . import correctness, plan
from . import tuning as card_tuning
from .ledger import Ledger

CASES = {
    **{"case.op": "op", "dir": "dir", "dtype": "dtype", "case.head_dim": "d", "cases": "cases", "wrong": "wrong"},
    **{"kernels": "kernels", "worst": "error"},
}
BOUNDS = {
    **{"kernel": "kernel", "dtype": "dtype", "head_dim": "d", "bound": "bound", "predicted": "predicted"},
    **{"measured": "measured", "where": "where"},
}
TUNED = {
    **{"case.kernel": "kernel", "dtype": "dtype", "case.head_dim": "d", "predicted": "best code", "first_ms": "ms"},
    **{"fastest": "fastest", "time_ms": "ms", "measured": "of"},
}
LEFT = {"stage": "stage", "done": "done", "failed": "failed", "left": "left"}

BENCHMARKS = ("attention", "prefill", "decode", "paged")  # whose records have a table, see tables.VIEWS

BOUNDS_NOTE = """bound: what limits the kernel, the matrix units or memory. predicted: the share of that peak which the
machine code of the tuning table's entry could reach at most. measured: the share that the call reached, of the products
or the copy measured in the same run. The two backward kernels are measured together, with 2.5 times the FLOP of the
forward pass."""


def text(ledger: Ledger, units: Sequence[plan.Unit], left_out: Mapping[str, str], *, arch: str, command: str) -> str:
    """The page in Markdown.

    Args:
      left_out: stages that this machine cannot do, with the reason.
      command: the command that continues.
    """
    call, records = ledger.calls[-1], ledger.records
    bounds = list(_bounds(arch, records))
    parts = [
        f"# {call['device']['name']} ({arch})",
        report.about([call]),
        "## Correctness",
        *_correctness(ledger, units),
        *(["## Predicted and measured", record.render(bounds, "md", BOUNDS), BOUNDS_NOTE] if bounds else []),
        *_tuned(records),
    ]
    for name in BENCHMARKS:
        if own := [one for one in records if one["benchmark"] == name]:
            parts += [f"## {name.capitalize()}", tables.VIEWS[name].table(_in_order(own))]
    return "\n\n".join([*parts, "## Left to do", *_left(ledger, units, left_out, command)]) + "\n"


def _in_order(records: Sequence[Record]) -> list[Record]:
    """A benchmark's records so that few tables hold them; without their ceilings, which each unit measured anew."""

    def place(one: Record) -> tuple:
        case = one["case"]
        model = case.get("model", "")
        return model, case.get("context", 0), case.get("direction", "forward") != "forward", case.get("length", 0)

    return sorted(({**one, "ceilings": None} for one in records), key=place)


def _correctness(ledger: Ledger, units: Sequence[plan.Unit]) -> list[str]:
    found: dict[tuple, list[Record]] = {}
    for one in ledger.records:
        if one["benchmark"] == correctness.BENCHMARK:
            case = one["case"]
            found.setdefault((case["op"], case["direction"], case["dtype"], case["head_dim"]), []).append(one)
    rows = [
        {
            "case": own[0]["case"],
            "dir": record.SHORT_DIRECTIONS[own[0]["case"]["direction"]],
            "dtype": tables.short_dtype(own[0]["case"]["dtype"]),
            "cases": len(own),
            "wrong": sum(one["status"] != "ok" for one in own),
            "kernels": sum(bool(one["kernels"]) for one in own),
            "worst": max((one["worst_error_of_limit"] for one in own if one["worst_error_of_limit"]), default=None),
        }
        for own in found.values()
    ]
    own = [one for one in units if one.stage == plan.CORRECTNESS]
    done = sum(one.key in ledger.done for one in own)
    if bad := correctness.wrong(ledger):
        verdict = "**Results are wrong; nothing is timed:**\n\n" + "\n".join(f"* {line}" for line in bad)
    elif done < len(own):
        verdict = f"Not all cases were checked: {done} of {len(own)} units are done."
    else:
        verdict = "All results are within the numerics contract."
    legend = "kernels: cases that ran a kernel of jfa, not XLA's code only. error: worst error / limit."
    return [verdict, *([record.render(rows, "md", CASES), legend] if rows else [])]


def _bounds(arch: str, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """A row for each kernel, dtype and head_dim that was measured or tuned."""
    for op in ON_GPUS:
        entries = _entries(op, arch)
        for (dtype, head_dim), one in _measured(op, records).items():
            listed = min((int(d) for d in entries.get(dtype, {}) if int(d) >= head_dim), default=None)
            predicted = entries[dtype][str(listed)].get(op.bound) if listed else None
            case = one["case"]
            share = one["share_of_peak"]
            yield {
                "kernel": op.kernel,
                "dtype": tables.short_dtype(dtype),
                "head_dim": head_dim,
                "bound": "matrix" if op.bound == "matrix_bound" else "memory",
                "predicted": None if predicted is None else record.percent(predicted),
                "measured": None if share is None else record.percent(share),
                "where": f"{case['batch']} x {case.get('length', case.get('context')):,} tokens",
            }


def _entries(op: Op, arch: str) -> Mapping[str, Any]:
    """The entries of jfa's own table by dtype and head_dim; empty if there is no table."""
    file = tune.resources_folder() / tuning.table_arch(arch) / f"{op.kernel}.json"
    return json.loads(file.read_text())["configs"] if file.is_file() else {}


def _measured(op: Op, records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """(dtype, head_dim) to the record with the most tokens of a call that runs the kernel."""
    found: dict[tuple[str, int], Record] = {}
    for one in sorted((one for one in records if _runs(op, one)), key=_tokens):
        case = one["case"]
        dtype = case["dtype"]
        if (kind := case.get("kv_dtype")) in quant.KINDS:
            dtype = tuning.pages_key(dtype, jnp.dtype(quant.KINDS[kind][0]).name)
        found[dtype, case["head_dim"]] = one
    return found


def _runs(op: Op, one: Record) -> bool:
    """Whether a record is of a call of the op by jfa's kernels."""
    if one["status"] != "ok" or record.field(one, "config.backend") != "triton":
        return False
    if op.name == "flash_attention":
        return one["benchmark"] == "attention" and one["case"]["direction"] == op.direction
    return one["benchmark"] == "paged" and op.kernel == "paged_decode_attention"


def _tokens(one: Record) -> int:
    return one["case"]["batch"] * (one["case"].get("length") or one["case"].get("context"))


def _tuned(records: Sequence[Record]) -> list[str]:
    rows = [
        {
            **one,
            "dtype": tables.short_dtype(one["case"]["dtype"]),
            "predicted": tile(one["first"]),
            "fastest": "same" if one["candidate"]["config"] == one["first"] else tile(one["candidate"]["config"]),
        }
        for one in card_tuning.winners(records)
    ]
    legend = (
        "best code: the candidate with the best code, and its time. fastest: the one that took least time, of that "
        "many measured. The tables are in tuning_tables/."
    )
    return ["## Tuning", record.render(rows, "md", TUNED), legend] if rows else []


def _left(ledger: Ledger, units: Sequence[plan.Unit], left_out: Mapping[str, str], command: str) -> Iterator[str]:
    rows = []
    for stage in plan.STAGES:
        own = [ledger.done.get(one.key) for one in units if one.stage == stage]
        done = [one for one in own if one]
        failed = sum(one["status"] != "ok" for one in done)
        rows.append({"stage": stage, "done": len(done), "failed": failed, "left": len(own) - len(done)})
    yield record.render(rows, "md", LEFT)
    notes = [f"* {stage}: left out: {reason}" for stage, reason in left_out.items()]
    notes += [
        f"* {one['unit']}: {one['status']}: {one['reason']}"
        for one in ledger.done.values()
        if one["status"] != "ok" and one["stage"] != plan.CORRECTNESS
    ]
    if notes:
        yield "\n".join(notes)
    seconds = sum(one["seconds"] for one in ledger.done.values())
    yield f"Time of all units: {seconds / 60:.1f} minutes. Calls of the command: {len(ledger.calls)}."
    if any(row["left"] for row in rows):
        yield f"Continue with:\n\n```console\n$ {command}\n```"
