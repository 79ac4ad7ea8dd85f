"""Tuning in small units, from the configurations with the best predicted code outwards.

For each kernel, dtype and head_dim the candidates are compiled and ordered (proof.tune.offline); then, ROUND at a time,
they are measured interleaved with the first candidate and the fastest one so far. Each round leaves valid tables.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from jfa import tuning

from ..measure import machine
from ..proof import compilers, ops, tune
from ..proof.compile import Case, compile_all
from ..records.record import Record

CANDIDATES, BENCHMARK = "candidates", "tuning"
ROUND = 4  # candidates
ROUNDS = tune.MEASURED // ROUND

# Most used first; the other dtypes follow in the order of the kernel's tables.
DTYPES = ("bfloat16", "float16", "bfloat16 on int8")
HEAD_DIMS = (128, 64, 256)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """An entry of a kernel's table."""

    kernel: str
    dtype: str
    head_dim: int

    @property
    def op(self) -> ops.Op:
        """The kernel, with this entry only."""
        [op] = (op for op in ops.TUNED if op.kernel == self.kernel)
        assert op.sweep is not None
        # alike: the configurations of a dtype are taken from another one's, which is not compiled here
        return dataclasses.replace(
            op, dtypes=(self.dtype,), head_dims=(self.head_dim,), sweep=dataclasses.replace(op.sweep, alike={})
        )


def why_not() -> str | None:
    """Why this machine cannot tune; None if it can."""
    try:
        compilers.chosen(tuning.table_arch(tune.arch_to_measure(None)))
    except click.UsageError as error:
        return error.format_message()
    except RuntimeError as error:
        return str(error)
    return None


def keys() -> Iterator[list[Key]]:
    """For each dtype and head_dim, most used first, the entries of all kernels that have them."""
    others = tuple(dict.fromkeys(dtype for op in ops.TUNED for dtype in op.dtypes if dtype not in DTYPES))
    sizes = tuple(dict.fromkeys((*HEAD_DIMS, *(size for op in ops.TUNED for size in op.head_dims))))
    for dtypes in (DTYPES, others):
        for size, dtype in itertools.product(sizes, dtypes):
            having = [op for op in ops.TUNED if dtype in op.dtypes and size in op.head_dims]
            if having:
                yield [Key(kernel=op.kernel, dtype=dtype, head_dim=size) for op in having]


def compile_candidates(key: Key, arch: str) -> Iterator[Record]:
    """One record with the compile records of an entry's best candidates, best first; arch: this machine's."""
    made_for = tuning.table_arch(arch)

    def compile(cases: Sequence[Case]) -> list[dict[str, Any]]:
        return compile_all(cases, processes=os.cpu_count() or 1)

    [choice] = tune.offline(key.op, made_for, compile).values()
    yield _about(CANDIDATES, key) | {
        "candidates": choice.candidates[: tune.MEASURED],
        "compiled": choice.compiled,
        "source": tune.measured_source(arch, compilers.name(made_for), tried=f"up to {tune.MEASURED}"),
    }


def measure(key: Key, turn: int, records: Sequence[Record], *, samples: int) -> Iterator[Record]:
    """One record of the fastest candidate up to this round, number `turn` from 0; none if no candidates are left.

    times: (configuration, milliseconds) of each candidate in this round. first_ms: of the first candidate.

    Raises:
      ValueError: records do not have the candidates, or none of them ran.
    """
    found = [one for one in records if one["benchmark"] == CANDIDATES and one["case"] == dataclasses.asdict(key)]
    if not found:
        raise ValueError("its candidates were not compiled")
    candidates = found[-1]["candidates"]
    following = candidates[turn * ROUND : (turn + 1) * ROUND]
    if not following:
        return
    before = [one["candidate"] for one in winners(records) if one["case"] == dataclasses.asdict(key)]
    tried = list(
        {json.dumps(one["config"], sort_keys=True): one for one in (candidates[0], *before, *following)}.values()
    )
    taken: dict[Case, float] = {}

    def measured(cases: Sequence[Case]) -> dict[Case, float]:
        taken.update(tune.measure_here(cases, samples=samples))
        return taken

    choice = tune.Choice(chosen=candidates[0], note=None, candidates=tried, compiled=found[-1]["compiled"])
    [(fastest, ms)] = tune.measured(key.op, {(key.dtype, key.head_dim): choice}, measured).values()
    times = [[dict(case.config or ()), round(one, 4)] for case, one in taken.items()]
    yield _about(BENCHMARK, key) | {
        "candidate": fastest,
        "time_ms": round(ms, 4),
        "first": candidates[0]["config"],
        "first_ms": next((one for config, one in times if config == candidates[0]["config"]), None),
        "times": times,
        "measured": min(len(candidates), (turn + 1) * ROUND),
        "source": found[-1]["source"],
    }


def _about(benchmark: str, key: Key) -> dict[str, Any]:
    about = {"benchmark": benchmark, "case": dataclasses.asdict(key), "implementation": key.kernel}
    return machine.circumstances() | about | {"status": "ok", "reason": None}


def winners(records: Sequence[Record]) -> list[Record]:
    """The last record of each entry that was measured."""
    last = {str(one["case"]): one for one in records if one["benchmark"] == BENCHMARK}
    return list(last.values())


def write(folder: Path, arch: str, records: Sequence[Record]) -> None:
    """Writes a table of the measured entries of each kernel: folder/<arch>/<kernel>.json."""
    found = winners(records)
    for op in ops.TUNED:
        own = [one for one in found if one["case"]["kernel"] == op.kernel]
        if not own:
            continue
        entries = {
            (one["case"]["dtype"], one["case"]["head_dim"]): tune.entry(
                op, one["candidate"], time_ms=one["time_ms"], measured=one["measured"]
            )
            for one in own
        }
        dtypes = tuple(dtype for dtype in op.dtypes if any(dtype == key[0] for key in entries))
        text = tune.table(dataclasses.replace(op, dtypes=dtypes), arch, own[-1]["source"], entries)
        (folder / arch).mkdir(parents=True, exist_ok=True)
        (folder / arch / f"{op.kernel}.json").write_text(text)
