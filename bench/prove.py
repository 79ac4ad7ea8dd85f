"""`jfa-bench prove`: every kernel's default configuration, run as AMD machine code beside a NumPy oracle.

A row is a proof on an architecture, in a dtype and at a head_dim, with its cases: small odd shapes that take every path
through the tiles of that configuration, or one for each option (cases.CASES). It holds when every case stays within
the numerics contract (numerics.limit), no access leaves its operand, and no two waves race in the LDS. What lies past a
row's length is NaN or infinite, and outputs start as NaN. Rows run in processes of their own.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

import jfa

from . import amdgcn, aot, cases, emulate, numerics, ops, pool, record
from .cases import Case, Truth
from .compile import ABOUT, Names, versions, warn_of_unmet_triton

QUICK = (("bfloat16", 128), ("float16", 64), ("float32", 64))  # dtype, head_dim
QUICK_OPTIONS = ("gqa", "cached_chunk", "everything")  # of cases.CASES
GRADIENT_PRODUCTS = 3  # scores, their cotangent, its product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row; plain data, so that another process can be told."""

    op: str
    proof: str  # of PROOFS
    arch: str
    dtype: str
    head_dim: int | None  # None: those of cases.CASES
    quick: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a case came to. share: the worst error over what the contract allows, of all outputs."""

    share: float | None = None
    wrong: str | None = None  # a sentence; None: nothing is
    kernels: tuple[str, ...] = ()
    instructions: int = 0
    races: int = 0


def tile_cases(block_q: int, block_kv: int, head_dim: int, *, quick: bool) -> dict[str, Case]:
    """Cases around a tile: whole tiles, the diagonal, windows, ragged ends, empty rows."""
    several = block_q + block_q // 2 + 3  # queries: more than one tile and a part
    longer = max(several, 2 * block_kv) + block_kv // 2 + 1
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


def forward(truth: Truth, arch: str, **options: Any) -> Verdict:
    """Output and residual of a case on arch's machine code, beside the oracle; options: of emulate."""
    q, k, v = poisoned(truth)

    def call(q, k, v):
        return jfa.dot_product_attention(q, k, v, implementation="triton", return_residual=True, **truth.options)

    limits = (
        numerics.limit(truth.out, truth.plain_out, q.dtype),
        numerics.limit(truth.lse, truth.plain_lse, np.dtype(np.float32)),
    )
    return verdict(call, (q, k, v), (truth.out, truth.lse), limits, arch=arch, **options)


def backward(truth: Truth, arch: str, **options: Any) -> Verdict:
    """The gradients of a case, of all arguments that have one; the forward kernel runs too."""
    arrays = dict(zip(("query", "key", "value"), poisoned(truth), strict=True))
    arrays |= {name: truth.options[name] for name in cases.GRADIENTS if name in truth.options}
    others = {name: x for name, x in truth.options.items() if name not in arrays}

    def call(*values):
        def loss(arrays):
            out, lse = jfa.dot_product_attention(**arrays, implementation="triton", return_residual=True, **others)
            through_lse = jnp.where(jnp.isfinite(lse), lse * truth.d_lse, 0.0)
            return (out.astype(jnp.float32) * truth.d_out.astype(jnp.float32)).sum() + through_lse.sum()

        gradients = jax.grad(loss)(dict(zip(arrays, values, strict=True)))
        return tuple(gradients[name] for name in arrays)

    dtype = truth.arrays[0].dtype
    wanted = [truth.gradients[name] for name in arrays]
    limits = [numerics.limit(want, plain, dtype, products=GRADIENT_PRODUCTS) for want, plain in wanted]
    return verdict(call, tuple(arrays.values()), [want for want, _ in wanted], limits, arch=arch, **options)


def poisoned(truth: Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query, key and value with NaN and infinities where nobody may read."""
    q, k, v = (np.array(x) for x in truth.arrays)
    for row in range(len(q)):
        if (length := truth.options.get("query_seq_lengths")) is not None:
            q[row, length[row] :] = np.nan
        if (length := truth.options.get("key_value_seq_lengths")) is not None:
            k[row, length[row] :] = np.nan
            v[row, length[row] :] = np.inf
    return q, k, v


def verdict(
    fn: Callable, args: Sequence[Any], wanted: Sequence[Any], limits: Sequence[float], *, arch: str, **options: Any
) -> Verdict:
    """fn(*args) as machine code of arch: each output within its limit of what is wanted, no race, no stray access."""
    try:
        done = emulate.emulate(fn, *map(jnp.asarray, args), arch=arch, **options)
    except (amdgcn.MachineError, aot.CompileError) as error:
        return Verdict(wrong=f"{type(error).__name__}: {error}")
    shares, wrong = [], None
    for got, want, allowed in zip(done.outputs, wanted, limits, strict=True):
        try:
            shares.append(numerics.assert_within(got, want, allowed) / allowed)
        except AssertionError as error:
            wrong = wrong or str(error)
    if done.races:
        wrong = wrong or done.races[0]
    return Verdict(
        share=max(shares) if len(shares) == len(wanted) else None,
        wrong=wrong,
        kernels=tuple(dict.fromkeys(done.kernels)),
        instructions=done.instructions,
        races=len(done.races),
    )


def _cases(row: Row) -> dict[str, Case]:
    if row.head_dim is None:
        return {name: case for name, case in cases.CASES.items() if not row.quick or name in QUICK_OPTIONS}
    op = next(op for op in ops.OPS if op.kernel == "flash_attention")
    config = op.default_config(aot.device(row.arch), row.dtype, row.head_dim)
    found = tile_cases(config.block_q, config.block_kv, row.head_dim, quick=row.quick)
    # the gradient of each option is proven with the options; here it is tiles that matter
    few = ("causal", "windows_and_lengths", "padded_head_dim")
    return found if row.proof == "forward" else {name: case for name, case in found.items() if name in few}


# What is proven of a case.
PROOFS: dict[str, Callable[..., Verdict]] = {"forward": forward, "backward": backward}


def prove_row(row: Row) -> dict[str, Any]:
    """The record of a row: status "ok" or "wrong" and why, worst error over what is allowed, instructions, seconds."""
    start = time.perf_counter()
    verdicts = {
        name: PROOFS[row.proof](cases.truth_of(case, row.dtype, seed=0), row.arch) for name, case in _cases(row).items()
    }
    wrong = [f"{name}: {found.wrong}" for name, found in verdicts.items() if found.wrong]
    shares = {name: found.share for name, found in verdicts.items() if found.share is not None}
    return _about(row) | {
        "kernels": list(dict.fromkeys(kernel for found in verdicts.values() for kernel in found.kernels)),
        "cases": list(verdicts),
        "status": "wrong" if wrong else "ok",
        "reason": "; ".join(wrong) or None,
        "worst_error_of_limit": round(max(shares.values()), 3) if shares else None,
        "worst_case": max(shares, key=lambda name: shares[name]) if shares else None,
        "races": sum(found.races for found in verdicts.values()),
        "instructions": sum(found.instructions for found in verdicts.values()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _about(row: Row) -> dict[str, Any]:
    what = {"benchmark": "prove", "op": row.op, "direction": row.proof, "arch": row.arch}
    return what | {"dtype": row.dtype, "head_dim": "options" if row.head_dim is None else row.head_dim}


def _crashed(row: Row) -> dict[str, Any]:
    return _about(row) | {"status": "wrong", "reason": "the process ended", "cases": [], "seconds": None}


def rows(archs: Sequence[str], op_names: Sequence[str], proofs: Sequence[str], *, quick: bool = False) -> list[Row]:
    """What is proven, in the table's order; quick: QUICK and fewer cases."""
    sizes = [(dtype, head_dim) for dtype in ("bfloat16", "float16", "float32") for head_dim in (64, 128, 256)]
    sizes = [size for size in sizes if not quick or size in QUICK]
    return [
        Row(op=op, proof=proof, arch=arch, dtype=dtype, head_dim=head_dim, quick=quick)
        for op in op_names
        for proof in proofs
        for arch in archs
        for dtype, head_dim in [*sizes, ("bfloat16", None)]
    ]


TABLE = {
    **{"arch": "arch", "direction": "direction", "dtype": "dtype", "head_dim": "d", "status": "status"},
    **{"worst_error_of_limit": "error", "races": "races", "instructions": "instr", "seconds": "s"},
}
COLUMNS = {name: name for name in ("op", *TABLE, "reason")}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; as md with a sentence for each row that is wrong."""
    text = record.render(records, output, TABLE if output == "md" else COLUMNS)
    if output != "md":
        return text
    wrong = [row for row in records if row["status"] != "ok"]
    lines = [f"{row['arch']} {row['direction']} {row['dtype']} {row['head_dim']}: {row['reason']}" for row in wrong]
    return "\n".join([text, "", "error: worst error over what the numerics contract allows", *lines])


@click.command("prove")
@click.option("--arch", type=Names("architecture", emulate.ARCHS), default="all", show_default=True)
@click.option("--op", type=Names("op", ("flash_attention",)), default="all", show_default=True)
@click.option("--direction", type=Names("direction", tuple(PROOFS)), default="all", show_default=True)
@click.option("--quick", is_flag=True, help="Fewer rows and cases: for CI.")
@click.option("--processes", type=click.IntRange(min=0), default=pool.PROCESSES, show_default=True, help="0: this one.")
@click.option("-o", "output", type=click.Choice(record.FORMATS), default="md", show_default=True)
@click.pass_context
def command(ctx, arch, op, direction, quick, processes, output) -> None:
    """Each kernel as AMD machine code on this CPU, beside an oracle; exit status 1 if one is wrong."""
    circumstances = {"versions": versions(), **{k: v for k, v in record.circumstances().items() if k in ABOUT}}
    circumstances["note"] = warn_of_unmet_triton()
    found = pool.each(
        prove_row, rows(arch, op, direction, quick=quick), crashed=_crashed, doing="proving", processes=processes
    )
    click.echo(render([row | circumstances for row in found], output))
    ctx.exit(int(any(row["status"] != "ok" for row in found)))
