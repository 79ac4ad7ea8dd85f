"""`jfa-bench tune`: chooses each kernel's configuration for an architecture, in jfa/tuning_tables/<arch>/<kernel>.json.

Offline, the choice is made from compiled code. A kernel's Sweep (ops.TUNED) defines what is tried: its starting tiles,
enlarged until a kernel spills, loses occupancy or gets slower; then its late axes, one at a time, on the best LATE
candidates; for a dtype that is like another, only the best ALIKE candidates of the other. Then:

AMD: the criteria are that a candidate fits the LDS, spills nothing and keeps at least two waves per SIMD; of these, the
most FLOP per cycle wins (the order of matrix_bound, but also defined if no matrix instruction supports a dtype).
Candidates within TIE are equal; then independent workgroups come first (two or more on a compute unit), then the larger
tile, which reads less, fewer issue cycles in the main loop, fewer waves, fewer stages.

NVIDIA, whose cycles cannot be counted: the criteria are that a candidate fits the shared memory, including that of
similar architectures that use the table, spills nothing and keeps at least eight warps on a multiprocessor (two per
scheduler); of these, the largest tile up to 128 x 128 wins, then the squarer one, the most resident warps, fewer warps
in a workgroup, more stages.

Tiles of which XLA makes wrong code (ops.MISCOMPILED) are left out.

A winner must also meet the criteria in the kernel's other calls (Op.variants); otherwise the next candidates are tried.
If no candidate meets the criteria, the least bad one is used and its entry has a note. On AMD that is one without
spills, unless a spilling one has GAIN times its FLOP per cycle, where a single wave counts half; otherwise the one with
the most FLOP per cycle among those with up to SPILLING times the fewest spills (spills also cost time outside of the
main loop, and more than is counted if they exceed the caches). On NVIDIA it is the one with the fewest spills.

With a GPU and without --offline, the best candidates by these rules are measured, interleaved; the fastest median wins,
and the table records date, device and versions.

The rules above and the code that applies them are in one file because they are read together.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

from jfa import tuning
from jfa.device import describe, probe

from .. import names
from ..measure import machine, timing
from ..records import record
from . import aot, compilers, ops
from .compile import BLOCKS, Case, compile_all, given, tile
from .ops import MISCOMPILED, Op

LANE_REGISTERS = 255  # maximum for a tile; half of CDNA's 512, so that two waves fit on a SIMD
WAVES, WARPS = 2, 8  # per SIMD on AMD, per multiprocessor on NVIDIA
GAIN = 1.75
SPILLING, FEW = 2.5, 32
TIE = 0.97
LATE, ALIKE = 2, 3  # number of candidates on which late axes are tried; and that are tried for a dtype like another
TRIED, LOSS = 6, 0.75  # the variants are tried on this many candidates, down to this fraction of the best one
MEASURED = 12  # number of candidates that are measured

# Architectures that use another one's table but have less shared memory.
_SMALLER = ("sm_86", "sm_89")
_NVIDIA_REGISTERS = 65_536  # of a multiprocessor. Source: CUDA C programming guide, compute capabilities 8.0 to 10.0

RULES = {
    "rocm": (
        f"of the configurations that fit the LDS, spill nothing and keep {WAVES} waves per SIMD, also in the kernel's "
        "other calls (windows, lengths, padded head_dims), the one with the most FLOP per cycle in its main loop, the "
        "larger tile on a tie; if there is none, the entry is the least bad configuration and has a note"
    ),
    "cuda": (
        "of the configurations that fit the shared memory, spill nothing and keep "
        f"{WARPS} warps on a multiprocessor, also in the kernel's other calls (windows, lengths, padded head_dims), "
        "the one with the largest tile up to 128 x 128; vgpr counts the registers of a thread; if there is none, the "
        "entry is the least bad configuration and has a note"
    ),
}

CompileAll = Callable[[Sequence[Case]], list[dict[str, Any]]]
Key = tuple[str, int]  # dtype, head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The result of a sweep for one dtype and head_dim."""

    chosen: dict[str, Any]  # compile record of the chosen configuration
    note: str | None  # which criteria it does not meet
    candidates: list[dict[str, Any]]  # compile records, best first
    compiled: int


def offline(op: Op, arch: str, compile_all: CompileAll) -> dict[Key, Choice]:
    """The best configuration by compiled code, for each dtype and head_dim of the op."""
    wrong = MISCOMPILED.get((arch, op.kernel), ())
    found = {
        key: [one for one in records if not any(tile.items() <= one["config"].items() for tile in wrong)]
        for key, records in _swept(op, arch, compile_all).items()
    }
    candidates = {key: list(ranked(records)) for key, records in found.items()}
    for key, ordered in candidates.items():
        if not ordered:
            dtype, head_dim = key
            raise ValueError(f"no configuration of {op.kernel} fits {arch} at {dtype}, head_dim {head_dim}")
    passing = _first_passing(op, arch, candidates, compile_all)
    return {
        key: Choice(
            chosen=ordered[passing[key] or 0],
            note=_note(ordered[0], passing[key]),
            candidates=ordered,
            compiled=len(found[key]),
        )
        for key, ordered in candidates.items()
    }


def _note(best: Mapping[str, Any], passing: int | None) -> str | None:
    if not wanted(best):
        return f"no configuration meets the criteria; the least bad: {best['reason'] or 'too few waves'}"
    return "spills or loses a wave with a window, lengths or a padded head_dim" if passing is None else None


def _swept(op: Op, arch: str, compile_all: CompileAll) -> dict[Key, list[dict[str, Any]]]:
    """Compile records of all configurations worth trying, in rounds of many rows that depend on the previous rounds."""
    sweep = op.sweep
    assert sweep is not None
    grows, sizes = sweep.grows
    lanes = 64 if aot.is_cdna(arch) else 32
    found: dict[Key, list[dict[str, Any]]] = {key: [] for key in itertools.product(op.dtypes, op.head_dims)}
    keys = [key for key in found if key[0] not in sweep.alike]
    late = {dtype: sweep.late(arch, dtype) for dtype in op.dtypes}

    def compiled(trial: Sequence[tuple[Key, Mapping[str, Any]]]) -> list[dict[str, Any]]:
        records = _compiled(op, arch, trial, compile_all)
        for (key, _), one in zip(trial, records, strict=True):
            found[key].append(one)
        return records

    growing = [
        (((dtype, head_dim), {**{name: values[0] for name, values in late[dtype].items()}, **start}), 0.0)
        for dtype, head_dim in keys
        for start in sweep.starts(arch, dtype, head_dim)
    ]
    for size in sizes:
        trial = [((key, {**config, grows: size}), merit) for (key, config), merit in growing]
        trial = [(row, merit) for row, merit in trial if sweep.registers(row[1], row[0][1], lanes) <= LANE_REGISTERS]
        records = compiled([row for row, _ in trial])
        growing = [
            (row, _merit(one))
            for (row, merit), one in zip(trial, records, strict=True)
            if wanted(one) and not one["vgpr_spills"] and _merit(one) >= TIE * merit
        ]
    compiled(
        [
            (key, {**best["config"], name: value})
            for key in keys
            for best in itertools.islice(ranked(found[key]), LATE)
            for name, values in late[key[0]].items()
            for value in values[1:]
        ]
    )
    compiled(
        [
            ((dtype, head_dim), {**config, **own})
            for dtype, model in sweep.alike.items()
            for head_dim in op.head_dims
            for config in _best_without(found[model, head_dim], late[model].keys() - late[dtype].keys())
            for own in _combinations({name: late[dtype][name] for name in late[dtype].keys() - late[model].keys()})
        ]
    )
    return found


def _best_without(records: Iterable[dict[str, Any]], axes: Collection[str]) -> list[dict[str, Any]]:
    """The distinct configurations of the best ALIKE records, without these axes."""
    configs: dict[str, dict[str, Any]] = {}
    for one in ranked(records):
        config = {name: value for name, value in one["config"].items() if name not in axes}
        configs.setdefault(json.dumps(config, sort_keys=True), config)
    return list(configs.values())[:ALIKE]


def _combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _compiled(
    op: Op, arch: str, configs: Iterable[tuple[Key, Mapping[str, Any]]], compile_all: CompileAll, variant: str = ""
) -> list[dict[str, Any]]:
    return compile_all(
        [
            Case(
                kernel=op.kernel,
                dtype=dtype,
                head_dim=head_dim,
                arch=arch,
                config=tuple(sorted(config.items())),
                variant=variant,
            )
            for (dtype, head_dim), config in configs
        ]
    )


def _first_passing(
    op: Op, arch: str, candidates: Mapping[Key, Sequence[dict[str, Any]]], compile_all: CompileAll
) -> dict[Key, int | None]:
    """For each key the index of the first candidate that passes in all variants; None: none that is near the best."""
    passing: dict[Key, int | None] = {}
    for place in range(TRIED):
        rows = [
            (key, ordered[place]["config"])
            for key, ordered in candidates.items()
            if key not in passing and place < len(ordered) and _is_near(ordered[place], ordered[0])
        ]
        records = [_compiled(op, arch, rows, compile_all, variant) for variant in op.variants]
        for (key, _), *variants in zip(rows, *records, strict=True):
            if all(_passes(candidates[key][place], one) for one in variants):
                passing[key] = place
    return {key: passing.get(key) for key in candidates}


def _is_near(one: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    if one["vgpr_spills"] and not best["vgpr_spills"]:
        return False
    as_good = wanted(one) or (not wanted(best) and not one["vgpr_spills"])
    return as_good and _merit(one) >= LOSS * _merit(best)


def _passes(one: Mapping[str, Any], variant: Mapping[str, Any]) -> bool:
    """Whether a variant spills only if its candidate does, and meets the criteria if its candidate does."""
    if variant["status"] not in ("ok", "spills") or (variant["vgpr_spills"] and not one["vgpr_spills"]):
        return False
    return wanted(variant) or not wanted(one)


def _merit(one: Mapping[str, Any]) -> float:
    if not aot.is_amd(one["arch"]):
        return 1.0
    return (one["flop_per_cycle"] or 0.0) * (1.0 if one["waves_per_simd"] >= WAVES else 0.5)


def ranked(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The records, of one kernel, dtype, head_dim and architecture, that can be launched; best first."""
    left = [one for one in records if one["status"] in ("ok", "spills") and _fits_neighbours(one)]
    if not left:
        return
    if not aot.is_amd(left[0]["arch"]):
        yield from sorted(filter(wanted, left), key=_nvidia_preference, reverse=True)
        wide = sorted((one for one in left if not wanted(one)), key=_nvidia_preference, reverse=True)
        yield from sorted(wide, key=lambda one: (one["vgpr_spills"], _resident_warps(one) < WARPS))
        return
    clean = [one for one in left if not one["vgpr_spills"]]
    enough = GAIN * max(map(_merit, clean), default=0.0)
    first = [one for one in clean if wanted(one)]
    gains = any(_merit(one) > enough for one in left if one["vgpr_spills"])
    second = [one for one in clean if one not in first and (first or not gains)]
    yield from _best_of_equals(first)
    yield from _best_of_equals(second)
    yield from _least_bad([one for one in left if one not in first and one not in second])


def wanted(one: Mapping[str, Any]) -> bool:
    """Whether a record meets the criteria for a table's entry; see the module's docstring."""
    if one["status"] not in ("ok", "spills"):
        return False
    if not aot.is_amd(one["arch"]):
        return not one["vgpr_spills"] and _resident_warps(one) >= WARPS
    return not one["vgpr_spills"] and one["waves_per_simd"] >= WAVES


def _best_of_equals(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    left = list(records)
    while left:
        best = max(map(_merit, left))
        first = max((one for one in left if _merit(one) >= TIE * best), key=_amd_preference)
        left.remove(first)
        yield first


def _amd_preference(one: Mapping[str, Any]) -> tuple:
    config = one["config"]
    groups = one["waves_per_simd"] * 4 / config["num_warps"]
    return (
        not one["vgpr_spills"],
        groups >= 2,
        _area(config),
        -_issue_cycles(one),
        -config["num_warps"],
        -config["num_stages"],
        _text(config),
    )


def _issue_cycles(one: Mapping[str, Any]) -> float:
    """Cycles of a workgroup's waves in an iteration of the main loop that matrix instructions do not take."""
    cycles = one["loop_cycles"]
    return one["config"]["num_warps"] * sum(cycles.get(kind, 0) for kind in ("vector", "transcendental", "lds"))


def _nvidia_preference(one: Mapping[str, Any]) -> tuple:
    config = one["config"]
    return (
        *(min(_area(config), 128 * 128), min(_blocks(config)), -max(_blocks(config)), _resident_warps(one)),
        *(-config["num_warps"], config["num_stages"], _text(config)),
    )


def _least_bad(records: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The order of AMD candidates that spill."""
    fewest = min((one["vgpr_spills"] for one in records), default=0)
    near = [one for one in records if one["vgpr_spills"] <= SPILLING * max(fewest, FEW)]
    yield from _best_of_equals(near)
    yield from sorted((one for one in records if one not in near), key=lambda one: (one["vgpr_spills"], _text(one)))


def _blocks(config: Mapping[str, Any]) -> list[int]:
    return [config[name] for name in BLOCKS if name in config]


def _area(config: Mapping[str, Any]) -> int:
    return int(np.prod(_blocks(config)))


def _text(config: Mapping[str, Any]) -> str:
    """Tie-breaker."""
    return json.dumps(config, sort_keys=True)


def _resident_warps(one: Mapping[str, Any]) -> int:
    """Resident warps, in whole workgroups, of one multiprocessor, as limited by registers and shared memory."""
    warps = one["config"]["num_warps"]
    registers = -(-one["vgpr"] // 8) * 8 * 32 * warps  # allocated in units of 8
    groups = min(_NVIDIA_REGISTERS // registers, one["lds_limit"] // max(1, one["lds_bytes"]))
    return groups * warps


def _fits_neighbours(one: Mapping[str, Any]) -> bool:
    sharing = (name for name in _SMALLER if tuning.table_arch(name) == one["arch"])
    return all(one["lds_bytes"] <= describe("cuda", name).lds_bytes for name in sharing)


def measured(
    op: Op, choices: Mapping[Key, Choice], measure: Callable[[Sequence[Case]], Mapping[Case, float]]
) -> dict[Key, tuple[dict[str, Any], float]]:
    """For each key the record of the fastest candidate and its time in milliseconds.

    Raises:
      ValueError: none of a key's candidates ran.
    """
    fastest = {}
    for (dtype, head_dim), choice in choices.items():
        records = {
            Case(
                kernel=op.kernel,
                dtype=dtype,
                head_dim=head_dim,
                arch=one["arch"],
                config=tuple(sorted(one["config"].items())),
            ): one
            for one in choice.candidates[:MEASURED]
        }
        taken = measure(list(records))
        if not taken:
            raise ValueError(f"none of {len(records)} configurations ran at {dtype}, head_dim {head_dim}")
        case = min(taken, key=lambda case: (taken[case], case.config))
        fastest[dtype, head_dim] = (records[case], taken[case])
    return fastest


def measure_here(cases: Sequence[Case], *, samples: int) -> dict[Case, float]:
    """The median milliseconds of each case that this machine's device can run, measured interleaved.

    Only the case's kernel is timed, also if its call has others: a configuration that is good for one may be bad for
    the other.
    """
    runs: dict[str, Callable[[], object]] = {}
    arrays: dict[tuple[str, str, int], Any] = {}  # cases of the same call share them: pages take gigabytes
    for number, case in enumerate(cases):
        fn, shapes = case.op.call(case.dtype, case.head_dim, case.op.config_type(**dict(case.config or ())), "")
        call = (case.kernel, case.dtype, case.head_dim)
        args = arrays[call] = arrays[call] if call in arrays else ops.filled(shapes)
        run = jax.jit(lambda *args, fn=fn, own=case.op.own_results: own(fn(*args)))
        try:
            jax.block_until_ready(run(*args))
        except jax.errors.JaxRuntimeError as error:  # the device's compiler may reject it as too large
            click.echo(f"note: {tile(dict(case.config or ()))} does not run: {str(error).splitlines()[0]}", err=True)
            continue
        runs[str(number)] = lambda run=run, args=args: run(*args)
    taken = timing.in_turns(runs, samples=samples)
    return {cases[int(number)]: float(np.median(series)) for number, series in taken.items()}


def table(op: Op, arch: str, source: str, entries: Mapping[Key, Mapping[str, Any]]) -> str:
    """The text of a table, with one line per entry, so that changes of an entry change one line."""
    by_dtype = {dtype: {d: entries[t, d] for t, d in entries if t == dtype} for dtype in op.dtypes}
    dtypes = ",\n".join(
        f'    "{dtype}": {{\n'
        + ",\n".join(f'      "{d}": {json.dumps(entry)}' for d, entry in rows.items())
        + "\n    }"
        for dtype, rows in by_dtype.items()
    )
    head = "".join(
        f'  "{name}": {json.dumps(x)},\n' for name, x in (("op", op.kernel), ("arch", arch), ("source", source))
    )
    return f'{{\n{head}  "configs": {{\n{dtypes}\n  }}\n}}\n'


def entry(op: Op, one: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """An entry of a table: the configuration, and the figures on which the choice is based."""
    figures = ["vgpr", "vgpr_spills", "lds_bytes"]
    if aot.is_amd(one["arch"]):
        figures += ["waves_per_simd", op.bound, "flop_per_cycle"]
    config = given(op.config_type, one["config"])
    return {
        "config": config,
        **{name: one[name] for name in figures},
        **{k: v for k, v in more.items() if v is not None},
    }


def arch_to_measure(given: Sequence[str] | None) -> str:
    """The architecture of this machine's GPU.

    Raises:
      UsageError: there is none, --arch was given, or candidates cannot be compiled for it.
    """
    device = probe()
    if device.platform not in ("rocm", "cuda"):
        raise click.UsageError(
            f"there is no GPU to measure on (this machine's device: {device.platform}); "
            "tune from compiled code instead: --offline --arch gfx942"
        )
    if given:
        raise click.UsageError(f"--arch needs --offline; without it this machine's {device.arch} is measured")
    if tuning.table_arch(device.arch) not in names.ARCHS:
        raise click.UsageError(f"candidates can only be compiled for {', '.join(names.ARCHS)}, not for {device.arch}")
    return device.arch


def resources_folder() -> Path:
    """The folder of jfa's own tables."""
    return Path(str(resources.files("jfa") / "tuning_tables"))


def tuned(
    op: Op, arch: str, *, processes: int, samples: int | None, compiler: str | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """(text of the table, a `tune` record for each entry). samples: per measurement; None: choose by compiled code."""
    made_for = tuning.table_arch(arch)

    def compile(cases: Sequence[Case]) -> list[dict[str, Any]]:
        return compile_all([dataclasses.replace(case, compiler=compiler) for case in cases], processes=processes)

    choices = offline(op, made_for, compile)
    made_with = compilers.name(made_for, compiler)
    if samples is None:
        source = f"Compiled offline with {made_with}, not measured: {RULES[aot.device(arch).platform]}."
        entries = {key: entry(op, choice.chosen, note=choice.note) for key, choice in choices.items()}
    else:
        fastest = measured(op, choices, lambda cases: measure_here(cases, samples=samples))
        entries = {key: entry(op, one, time_ms=round(ms, 4)) for key, (one, ms) in fastest.items()}
        source = measured_source(arch, made_with)
    rows = [
        {
            **{"benchmark": "tune", "op": op.name, "direction": op.direction, "kernel": op.kernel, "arch": arch},
            **{"dtype": dtype, "head_dim": head_dim, "before": _before(op, arch, dtype, head_dim)},
            **{"compiled": choices[dtype, head_dim].compiled, "source": source, "note": None},
            **chosen,
        }
        for (dtype, head_dim), chosen in entries.items()
    ]
    return table(op, arch, source, entries), rows


def measured_source(arch: str, compiler: str, *, tried: str = f"the {MEASURED}") -> str:
    """The source field of a table that was measured; tried: how many candidates."""
    circumstances = machine.circumstances()
    made_with = ", ".join(f"{name} {circumstances['versions'][name]}" for name in ("jax", "jaxlib"))
    return (
        f"Measured on {jax.devices()[0].device_kind} ({arch}) on {circumstances['date'][:10]} with {made_with}: the "
        f"fastest median of {tried} configurations with the best code from {compiler}; "
        "figures other than time_ms are from compiled code."
    )


def _before(op: Op, arch: str, dtype: str, head_dim: int) -> dict[str, Any]:
    platform = aot.device(tuning.table_arch(arch)).platform
    return given(op.config_type, dataclasses.asdict(op.default_config(describe(platform, arch), dtype, head_dim)))


COLUMNS = {
    **{"arch": "arch", "dtype": "dtype", "head_dim": "d", "chosen": "chosen", "was": "was", "vgpr": "vgpr"},
    **{"vgpr_spills": "spills", "waves_per_simd": "waves", "matrix_bound": "bound", "time_ms": "ms", "note": "note"},
}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    same = row["before"] == row["config"]
    return {"chosen": tile(row["config"]), "was": "same" if same else tile(row["before"])}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text."""
    shown = [{**row, **_shown(row)} for row in records] if output == "md" else records
    return record.render(shown, output, COLUMNS)
