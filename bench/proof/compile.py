"""`jfa-bench compile`: compiles every kernel of the library for an architecture, whether or not the device is present.

One row per kernel (ops.OPS), dtype, head_dim and architecture, with the configuration that a plain call uses there.
Rows are compiled in worker processes: a compiler that crashes its process only loses that row.
"""

import dataclasses
import importlib.metadata
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

import jfa

from .. import names
from ..measure import machine
from ..records import record, tables
from . import aot, by_libtpu, compilers, machine_code, pool
from .ops import OPS, Op


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row to compile; plain data, so that it can be sent to another process."""

    kernel: str  # a kernel of ops.OPS
    dtype: str
    head_dim: int
    arch: str
    config: tuple[tuple[str, Any], ...] | None = None  # fields of the op's config_type; None: the library's default
    variant: str = ""
    compiler: str | None = None  # one of names.COMPILERS; None: the best that is installed

    @property
    def op(self) -> Op:
        """The entry of OPS."""
        return next(op for op in OPS if op.kernel == self.kernel)


def cases(
    archs: Sequence[str],
    *,
    ops: Sequence[Op] = OPS,
    dtypes: Sequence[str] | None = None,
    head_dims: Sequence[int] | None = None,
    compiler: str | None = None,
) -> list[Case]:
    """The rows of the table, in order; None: all that the op has."""
    return [
        Case(kernel=op.kernel, dtype=dtype, head_dim=head_dim, arch=arch, compiler=compiler)
        for op in ops
        for arch in archs
        if op.kernel in (names.GPU_KERNELS if arch in names.ARCHS else names.TPU_KERNELS)
        for dtype in op.dtypes
        for head_dim in sorted((*op.head_dims, *op.between))
        if (dtypes is None or dtype in dtypes) and (head_dims is None or head_dim in head_dims)
    ]


def compile_case(case: Case) -> dict[str, Any]:
    """The `compile` record of one row: the case, status, reason, seconds, and machine_code.FIELDS or by_libtpu.FIELDS.

    status: "ok"; "spills": registers are spilled to memory; "over_lds": a GPU could not launch it; "failed": no code;
    "unsupported": the kernel does not support the call there. All except "ok" have a reason.
    """
    start = time.perf_counter()
    op = case.op
    info = aot.device(case.arch)
    config_type = op.config_type
    if info.platform == "tpu":
        config_type = jfa.TpuProductConfig if config_type is jfa.ProductConfig else jfa.TpuConfig
    asked = None if case.config is None else config_type(**dict(case.config))
    config = asked or op.default_config(info, case.dtype, case.head_dim)
    row = {
        "benchmark": "compile",
        **{"op": op.name, "direction": op.direction, "kernel": op.kernel, "variant": case.variant},
        **{
            "dtype": case.dtype,
            "head_dim": case.head_dim,
            "arch": case.arch,
            "compiler": compilers.chosen(case.arch, case.compiler),
            "config": given(config_type, dataclasses.asdict(config)),
        },
    }
    try:
        if case.arch in names.TPU_ARCHS:
            fn, args = op.call(case.dtype, case.head_dim, asked, case.variant)
            figures = by_libtpu.compile_call(fn, args, kernel=op.kernel, arch=case.arch)
            return row | {"status": "ok", "reason": None, "seconds": round(time.perf_counter() - start, 2)} | figures
        compiled = compilers.compile_kernel(_kernel(case, asked), arch=case.arch, compiler=row["compiler"])
    except jfa.UnsupportedError as error:
        return row | _without_code(str(error), case.arch) | {"status": "unsupported", "seconds": None}
    except aot.CompileError as error:
        return row | _without_code(str(error), case.arch) | {"seconds": round(time.perf_counter() - start, 2)}
    figures = machine_code.read(compiled)
    status, reason = "ok", compiled.why_not_launched()
    if reason:
        status = "over_lds"
    elif figures["vgpr_spills"]:
        where = "" if "scratch" in (figures["loop_cycles"] or {"scratch": 0}) else ", none of them in the main loop"
        status, reason = "spills", f"{figures['vgpr_spills']} registers are spilled to memory{where}"
    return row | {"status": status, "reason": reason, "seconds": round(time.perf_counter() - start, 2)} | figures


def _kernel(case: Case, config: Any) -> aot.Kernel:
    fn, args = case.op.call(case.dtype, case.head_dim, config, case.variant)
    found = aot.lower(fn, *args, arch=case.arch)
    wanted = [kernel for kernel in found if kernel.name == case.kernel]
    if not wanted:
        others = ", ".join(kernel.name for kernel in found) or "none"
        raise aot.CompileError(f"the call has no kernel named {case.kernel}; its kernels: {others}")
    return wanted[0]


def _without_code(reason: str, arch: str) -> dict[str, Any]:
    fields = by_libtpu.FIELDS if arch in names.TPU_ARCHS else machine_code.FIELDS
    return {"status": "failed", "reason": reason} | dict.fromkeys(fields)


def compile_all(cases: Sequence[Case], *, processes: int = names.PROCESSES) -> list[dict[str, Any]]:
    """compile_case for each case, in order, in this number of worker processes; 0: in this process."""
    return pool.each(compile_case, cases, lost=_lost, doing="compiling", processes=processes)


def _lost(case: Case, why: str) -> dict[str, Any]:
    about = {"kernel": case.kernel, "op": case.op.name, "direction": case.op.direction, "variant": case.variant}
    what = {"dtype": case.dtype, "head_dim": case.head_dim, "arch": case.arch, "config": dict(case.config or ())}
    what["compiler"] = compilers.chosen(case.arch, case.compiler)
    failed = _without_code(f"the compiler {why}", case.arch)
    return {"benchmark": "compile", **about, **what, **failed, "seconds": None}


def circumstances(archs: Sequence[str], compiler: str | None = None) -> dict[str, Any]:
    """The fields about versions, commit and date of a `compile` record; prints a note about the compiler to stderr.

    This machine's device is left out: it is not the one that is compiled for.
    """
    here = machine.circumstances()
    about = {name: here[name] for name in ("git_commit", "date")}
    return {"versions": versions(), **about, "note": warn_of_unmet(archs, compiler)}


def versions() -> dict[str, str]:
    """The versions of the packages that produced the code."""
    return {name: importlib.metadata.version(name) for name in ("jfa", "jax", "jaxlib")} | compilers.versions()


def warn_of_unmet(archs: Sequence[str], compiler: str | None) -> str | None:
    """Prints a note to stderr, and returns it, if the compiler for one of archs is a release that was not checked."""
    note = compilers.unmet({compilers.chosen(arch, compiler) for arch in archs if arch != names.INTERPRETED})
    if note:
        click.echo(f"note: {note}", err=True)
    return note


# sizes of a tile: of attention, of a product, of linear attention
BLOCKS = ("block_q", "block_kv", "block_rows", "block_out", "block_in", "chunk_size", "block_v")

# Columns of csv: field to heading. TABLE has fewer, to fit into 80 columns.
COLUMNS = {
    **{name: name for name in ("op", "direction", "arch", "dtype", "head_dim", "status", "reason")},
    **{f"config.{name}": name for name in (*BLOCKS, "num_warps", "num_stages")},
    **{name: name for name in machine_code.FIELDS if not name.endswith("loop_cycles")},
    **{"seconds": "seconds", "compiler": "compiler"},
    **{name: name for name in by_libtpu.FIELDS},
}
TABLE = {
    **{"arch": "arch", "dtype": "dtype", "head_dim": "d", "tile": "tile", "vgpr": "vgpr", "vgpr_spills": "spill"},
    **{"lds_kib": "KiB", "waves_per_simd": "occ", "bound": "bound"},
}
TPU_TABLE = {
    **{"arch": "arch", "dtype": "dtype", "head_dim": "d", "tile": "tile", "vmem_mib": "VMEM MiB", "limit_mib": "of"},
    **{"hbm_mib": "HBM MiB", "copied_mib": "copied", "loop_bundles": "cycles", "bound": "bound ms"},
}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; for md one table for each kernel, followed by the rows that cannot be launched."""
    if output != "md":
        return record.render(records, output, COLUMNS)
    parts = []
    for op in OPS:
        rows = [row for row in records if row["kernel"] == op.kernel]
        of_gpus = [{**row, **_shown(row, op)} for row in rows if row["arch"] in names.ARCHS]
        of_tpus = [{**row, **_shown_of_tpu(row)} for row in rows if row["arch"] in names.TPU_ARCHS]
        for shown, columns in ((of_gpus, TABLE), (of_tpus, TPU_TABLE)):
            if shown:
                parts.append(f"{op.kernel}, {op.direction}\n\n" + record.render(shown, "md", columns))
        parts += [
            f"{row['arch']} {row['dtype']} {row['head_dim']}: {row['status']}: {row['reason']}"
            for row in rows
            if row["status"] in ("over_lds", "failed", "unsupported")
        ]
    return "\n".join(parts)


def _shown(row: Mapping[str, Any], op: Op) -> dict[str, Any]:
    lds = row["lds_bytes"]
    return {
        "dtype": tables.short_dtype(row["dtype"]),
        "tile": tile(row["config"]),
        "lds_kib": None if lds is None else f"{lds / 1024:.0f}",
        "bound": row[op.bound] if row["status"] in ("ok", "spills") else row["status"],
    }


def _shown_of_tpu(row: Mapping[str, Any]) -> dict[str, Any]:
    def mib(name: str) -> str | None:
        return None if row[name] is None else f"{row[name] / 2**20:.1f}"

    shown = {"dtype": tables.short_dtype(row["dtype"]), "tile": tile(row["config"])}
    shown |= {"vmem_mib": mib("vmem_bytes"), "limit_mib": mib("vmem_limit"), "hbm_mib": mib("hbm_bytes")}
    bound = row["roofline_ms"] if row["status"] == "ok" else row["status"]
    return shown | {"copied_mib": mib("copied_bytes"), "bound": bound}


def tile(config: Mapping[str, Any]) -> str:
    """The short form of a configuration: 128x64 4w 2s (of a product 16x64x128 1w 1s), and the switches that are set.

    r: round_half_up.
    """
    sizes = "x".join(str(config[name]) for name in BLOCKS if name in config)
    rest = [f"{config[name]}{letter}" for name, letter in (("num_warps", "w"), ("num_stages", "s")) if name in config]
    known = (*BLOCKS, "num_warps", "num_stages")
    on = {name: value for name, value in config.items() if name not in known and value}
    switches = (_LETTERS.get(name, f"{name}=") + ("" if value is True else str(value)) for name, value in on.items())
    return " ".join([sizes, *rest, *switches])


_LETTERS = {"block_d": "d", "round_half_up": "r", "fp8_by_bits": "b"}


def given(config_type: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without fields that have their default value, in the order of the type's fields."""
    fields = dataclasses.fields(config_type)
    return {
        field.name: config[field.name]
        for field in fields
        if field.name in config and config[field.name] != field.default
    }
