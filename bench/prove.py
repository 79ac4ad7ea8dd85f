"""`jfa-bench prove`: every kernel's default configuration, run as AMD machine code beside a NumPy oracle.

A row is a kernel, an architecture, a dtype and a head_dim with its cases: small odd shapes that take every path through
the tiles of that configuration. It is proven when every case stays within the numerics contract (numerics.limit), no
access leaves its operand, and no two waves race in the LDS. What lies past a row's length is NaN or infinite, and
outputs start as NaN. Rows run in processes of their own.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import jax.numpy as jnp
import numpy as np

import jfa

from . import amdgcn, aot, cases, emulate, numerics, pool, record
from .cases import Case
from .compile import ABOUT, OPS, Names, Op, named, versions, warn_of_unmet_triton

QUICK = (("bfloat16", 128), ("float16", 64), ("float32", 64), ("float32", 256))  # dtype, head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row; plain data, so that another process can be told."""

    kernel: str  # of OPS
    arch: str
    dtype: str
    head_dim: int
    quick: bool = False

    @property
    def op(self) -> Op:
        """The entry of OPS."""
        return next(op for op in OPS if op.kernel == self.kernel)


def flash_cases(block_q: int, block_kv: int, head_dim: int, *, quick: bool) -> dict[str, Case]:
    """Cases around a tile: whole tiles, the diagonal, windows, ragged ends, empty rows."""
    several = block_q + block_q // 2 + 3  # queries: more than one tile and a part
    longer = max(several, 2 * block_kv) + block_kv // 2 + 1
    # a few rows of both tiles' edges
    short = min(block_q, 32) + 5
    found = {
        "causal": Case(shape=(1, several, several, 2, 1, head_dim), options=dict(is_causal=True)),
        "windows_and_lengths": Case(
            shape=(3, short, longer, 2, 1, head_dim),
            options=dict(
                is_causal=True,
                local_window_size=(block_kv + 7, 0),
                query_seq_lengths=[short, short - 9, 0],
                key_value_seq_lengths=[longer, 0, 17],
                query_offset=[longer - short, 0, 3],
            ),
        ),
    }
    if quick:
        return found
    return found | {
        "both_windows": Case(
            shape=(1, short, longer, 1, 1, head_dim), options=dict(local_window_size=(block_kv + 3, block_kv // 2))
        ),
        "soft_cap": Case(shape=(1, short, longer, 2, 2, head_dim), options=dict(logits_soft_cap=3.0)),
        "one_query": Case(
            shape=(2, 1, longer, 4, 2, head_dim), options=dict(is_causal=True, query_offset=[longer - 1, 40])
        ),
        "padded_head_dim": Case(
            shape=(1, short, longer, 2, 1, head_dim * 5 // 8), options=dict(is_causal=True, query_offset=[longer - 20])
        ),
    }


def _flash_proofs(row: Row) -> dict[str, Callable[[], "Verdict"]]:
    config = row.op.default_config(aot.device(row.arch), row.dtype, row.head_dim)
    found = flash_cases(config.block_q, config.block_kv, row.head_dim, quick=row.quick)
    return {name: lambda case=case: attention_verdict(case, row.dtype, row.arch) for name, case in found.items()}


# kernel of OPS: its cases by name
PROOFS: dict[str, Callable[[Row], dict[str, Callable[[], "Verdict"]]]] = {"flash_attention": _flash_proofs}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a case came to. share: the worst error over what the contract allows, of all outputs."""

    share: float | None = None
    wrong: str | None = None  # a sentence; None: nothing is
    instructions: int = 0
    races: tuple[str, ...] = ()


def attention_verdict(
    case: Case, dtype: str, arch: str, *, attention: Callable = jfa.dot_product_attention, **options: Any
) -> Verdict:
    """A case of attention on arch's machine code, beside the oracle; options: of emulate."""
    truth = cases.truth_of(case, dtype, seed=0)
    q, k, v = (np.array(x) for x in truth.arrays)
    for row in range(case.shape[0]):
        # nobody may read what lies past the lengths
        if (length := truth.options.get("query_seq_lengths")) is not None:
            q[row, length[row] :] = np.nan
        if (length := truth.options.get("key_value_seq_lengths")) is not None:
            k[row, length[row] :] = np.nan
            v[row, length[row] :] = np.inf

    def call(q, k, v):
        return attention(q, k, v, implementation="triton", return_residual=True, **truth.options)

    wanted = ((truth.out, truth.plain_out, jnp.dtype(dtype)), (truth.lse, truth.plain_lse, jnp.dtype("float32")))
    return verdict(call, (q, k, v), wanted, arch=arch, **options)


def verdict(fn: Callable, args: Sequence[np.ndarray], wanted: Sequence[tuple], *, arch: str, **options: Any) -> Verdict:
    """fn(*args) as machine code of arch; wanted: per output the truth, the plain formula's answer, and the dtype."""
    try:
        done = emulate.emulate(fn, *map(jnp.asarray, args), arch=arch, **options)
    except (amdgcn.MachineError, aot.CompileError) as error:
        return Verdict(wrong=f"{type(error).__name__}: {error}")
    shares, wrong = [], None
    for got, (want, plain, dtype) in zip(done.outputs, wanted, strict=True):
        allowed = numerics.limit(want, plain, dtype)
        try:
            shares.append(numerics.assert_within(got, want, allowed) / allowed)
        except AssertionError as error:
            wrong = wrong or str(error)
    if done.races:
        wrong = wrong or done.races[0]
    share = max(shares) if shares and len(shares) == len(wanted) else None
    return Verdict(share=share, wrong=wrong, instructions=done.instructions, races=done.races)


def prove_row(row: Row) -> dict[str, Any]:
    """The record of a row: status "ok" or "wrong" and why, worst error over what is allowed, instructions, seconds."""
    start = time.perf_counter()
    verdicts = {name: proof() for name, proof in PROOFS[row.kernel](row).items()}
    wrong = [f"{name}: {found.wrong}" for name, found in verdicts.items() if found.wrong]
    shares = {name: found.share for name, found in verdicts.items() if found.share is not None}
    return _about(row) | {
        "cases": list(verdicts),
        "status": "wrong" if wrong else "ok",
        "reason": "; ".join(wrong) or None,
        "worst_error_of_limit": round(max(shares.values()), 3) if shares else None,
        "worst_case": max(shares, key=lambda name: shares[name]) if shares else None,
        "races": sum(len(found.races) for found in verdicts.values()),
        "instructions": sum(found.instructions for found in verdicts.values()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _about(row: Row) -> dict[str, Any]:
    op = row.op
    config = op.default_config(aot.device(row.arch), row.dtype, row.head_dim)
    what = {"op": op.name, "direction": op.direction, "kernel": row.kernel, "dtype": row.dtype}
    return {"benchmark": "prove", **what, "head_dim": row.head_dim, "arch": row.arch} | {
        "config": dataclasses.asdict(config)
    }


def _crashed(row: Row) -> dict[str, Any]:
    return _about(row) | {"status": "wrong", "reason": "the process ended", "cases": [], "seconds": None}


def rows(archs: Sequence[str], ops: Sequence[Op] = OPS, *, quick: bool = False) -> list[Row]:
    """What is proven, in the table's order; quick: QUICK and fewer cases."""
    return [
        Row(kernel=op.kernel, arch=arch, dtype=dtype, head_dim=head_dim, quick=quick)
        for op in ops
        for arch in archs
        for dtype in op.dtypes
        for head_dim in op.head_dims
        if not quick or (dtype, head_dim) in QUICK
    ]


TABLE = {
    **{"arch": "arch", "kernel": "kernel", "dtype": "dtype", "head_dim": "d", "status": "status"},
    **{"worst_error_of_limit": "error", "races": "races", "instructions": "instr", "seconds": "s"},
}
COLUMNS = {name: name for name in ("op", "direction", *TABLE, "reason")}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; as md with a sentence for each row that is wrong."""
    text = record.render(records, output, TABLE if output == "md" else COLUMNS)
    if output != "md":
        return text
    wrong = [r for r in records if r["status"] != "ok"]
    lines = [f"{r['arch']} {r['kernel']} {r['dtype']} {r['head_dim']}: {r['reason']}" for r in wrong]
    return "\n".join([text, "", "error: worst error over what the numerics contract allows", *lines])


@click.command("prove")
@click.option("--arch", type=Names("architecture", emulate.ARCHS), default="all", show_default=True)
@click.option("--op", type=Names("op", tuple(PROOFS)), default="all", show_default=True)
@click.option("--quick", is_flag=True, help="Fewer rows and cases: for CI.")
@click.option("--processes", type=click.IntRange(min=0), default=pool.PROCESSES, show_default=True, help="0: this one.")
@click.option("-o", "output", type=click.Choice(record.FORMATS), default="md", show_default=True)
@click.pass_context
def command(ctx, arch, op, quick, processes, output) -> None:
    """Each kernel as AMD machine code on this CPU, beside an oracle; exit status 1 if one is wrong."""
    circumstances = {"versions": versions(), **{k: v for k, v in record.circumstances().items() if k in ABOUT}}
    circumstances["note"] = warn_of_unmet_triton()
    found = pool.each(
        prove_row, rows(arch, named(op), quick=quick), crashed=_crashed, doing="proving", processes=processes
    )
    click.echo(render([row | circumstances for row in found], output))
    ctx.exit(int(any(row["status"] != "ok" for row in found)))
