"""The oracle's cases on this device, compiled, with the implementation that jfa chooses for them.

The cases are those of `jfa-bench prove` (proof.prove.PROOFS): every option by itself, and the paths of a tile.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from jfa import tuning

from .. import names
from ..measure import machine
from ..proof import proofs, prove
from ..records.record import Record
from .ledger import Ledger

STAGE = BENCHMARK = "correctness"
CASES = 8  # in a unit
PROCESSORS = 8  # maximum number of cases that are compiled at the same time


def rows(arch: str, *, quick: bool) -> list[prove.Row]:
    """What is checked, in order: for each op and direction the tiles in several dtypes and the options by name.

    quick: only some of the options. Those are also all that is known for an architecture without compiled tiles.
    """
    known = tuning.table_arch(arch) in names.ARCHS
    return [
        prove.Row(op=op, direction=direction, arch=tuning.table_arch(arch), dtype=dtype, head_dim=head_dim, quick=quick)
        for (op, direction), proof in prove.PROOFS.items()
        for dtype, head_dim in proof.quick
        if head_dim is None or (known and not quick)
    ]


def parts(row: prove.Row) -> list[list[str]]:
    """The cases of a row by name, split into units."""
    found = list(prove.PROOFS[row.op, row.direction].cases(row))
    return [found[start : start + CASES] for start in range(0, len(found), CASES)]


def check(row: prove.Row, cases: Sequence[str]) -> Iterator[Record]:
    """A record for each of these cases of a row: status "ok" or "wrong" with the reason, worst error / limit."""
    shared = machine.circumstances() | {"benchmark": BENCHMARK, "implementation": "jfa"}
    with ThreadPoolExecutor(min(PROCESSORS, os.cpu_count() or 1)) as pool:  # compilers leave Python's lock
        verdicts = pool.map(lambda name: _verdict(row, name), cases)
        for name, verdict in zip(cases, verdicts, strict=True):
            size = "options" if row.head_dim is None else row.head_dim
            case = {"op": row.op, "direction": row.direction, "dtype": row.dtype, "head_dim": size, "name": name}
            yield shared | {
                "case": case,
                "kernels": list(verdict.kernels),
                "status": "wrong" if verdict.wrong else "ok",
                "reason": verdict.wrong,
                "worst_error_of_limit": None if verdict.share is None else round(verdict.share, 3),
            }


def _verdict(row: prove.Row, name: str) -> proofs.Verdict:
    proof = prove.PROOFS[row.op, row.direction]
    return proofs.on_device(proof.check(proof.truth(proof.cases(row)[name], row), None))


def wrong(ledger: Ledger) -> list[str]:
    """A line for each case that is wrong, and for each unit that could not be run."""
    units = [one for one in ledger.done.values() if one["stage"] == STAGE and one["status"] != "ok"]
    cases = [one for one in ledger.records if one["benchmark"] == BENCHMARK and one["status"] != "ok"]
    return [
        *(f"{one['unit']}: {one['reason']}" for one in units),
        *(f"{', '.join(str(value) for value in one['case'].values())}: {one['reason']}" for one in cases),
    ]
