"""`jfa-bench prove`: runs each kernel's default configuration as AMD machine code and checks it against a NumPy oracle.

A row is a proof for an architecture, dtype and head_dim. Its cases are small odd shapes that take every path through
the tiles of that configuration, or one case for each option (CASES). The proof passes if every case is within the
numerics contract (numerics.limit), no access is outside of its operand, and no two waves race in the LDS. Inputs past a
row's length are NaN or infinite, and outputs are initialized to NaN. Rows run in worker processes.

With the architecture "tpu" the same cases run in JAX's interpreter of TPU kernels (proofs.interpreted).
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jfa import quant
from jfa.kernels.triton import products
from jfa.types import Implementation, TpuConfig, TpuProductConfig, UnsupportedError

from .. import names
from ..records import record, tables
from ..truth import cases, linear_cases, paged_cases, product_cases, row_cases, sparse_cases, write_cases
from . import aot, compilers, ops, pool
from .proofs import (
    Check,
    Verdict,
    backward,
    backward_check,
    forward,
    forward_check,
    interpreted,
    linear_backward_check,
    linear_check,
    linear_tile_cases,
    of_chunks,
    of_chunks_backward,
    of_rows,
    of_tokens,
    of_weight,
    one_query_cases,
    over_pages,
    paged_check,
    paged_tile_cases,
    product_check,
    product_tile_cases,
    row_check,
    tile_cases,
    write_check,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row; plain data, so that it can be sent to another process."""

    op: str
    direction: str
    arch: str
    dtype: str  # of the queries, or for quantized pages "bfloat16 on int8"
    head_dim: int | None  # None: the named cases of the op
    quick: bool = False
    compiler: str | None = None  # one of names.COMPILERS; None: the best that is installed


Size = tuple[str, int | None]  # dtype, head_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """How an op is proven in one direction."""

    run: Callable[..., Verdict]  # (truth, arch, compiler=), as machine code
    check: Callable[[Any, Implementation | None], Check]  # (truth, implementation), the same for any device
    cases: Callable[[Row], Mapping[str, Any]]
    truth: Callable[[Any, Row], Any]  # (case, row)
    sizes: tuple[Size, ...]
    quick: tuple[Size, ...]
    supports: Callable[["Row"], bool] = lambda row: True  # a row whose call the kernel refuses is left out


# named cases for quick runs
QUICK_OPTIONS = (
    "gqa",
    "cached_chunk",
    "everything",
    "int4_odd",
    "chunks_and_tokens",
    "tree_beside_chunk_and_token",
    "int4_zeros",
    "many_rows",
    "mamba",
    "delta_and_groups",
    "columns_and_groups",
)


INTERPRETED_S = 900.0  # that a row may take in the interpreter, several times what the slowest takes
QUICK_ON_TPUS = ("gqa", "cached_chunk", "sinks_and_window", "int8_odd", "window", "chunks_and_tokens")
QUICK_ON_TPUS += ("int4_zeros", "many_rows")


def _named(row: Row, known: Mapping[str, Any]) -> dict[str, Any]:
    quick = QUICK_ON_TPUS if row.arch == names.INTERPRETED else QUICK_OPTIONS
    return {name: case for name, case in known.items() if not row.quick or name in quick}


def _config(row: Row, head_dim: int) -> Any:
    linear = row.op in names.LINEAR_OPS  # whose backward pass has tiles of its own
    direction = row.direction if linear else "forward"
    op = next(op for op in ops.OPS if (op.name, op.direction) == (row.op, direction))
    # the tiles of a v5e are too large to interpret many of them
    if row.arch == names.INTERPRETED:
        return _interpreted_config(row)
    return op.default_config(aot.device(row.arch), row.dtype, head_dim)


def _interpreted_config(row: Row) -> TpuConfig | TpuProductConfig:
    if row.op.startswith("quantized_matmul"):
        return TpuProductConfig(block_rows=16, block_out=128, block_in=256)
    return TpuConfig(block_q=128, block_kv=128)


def _flash_cases(row: Row) -> dict[str, cases.Case]:
    if row.head_dim is None:
        return _named(row, cases.CASES)
    config = _config(row, row.head_dim)
    found = tile_cases(config.block_q, config.block_kv, row.head_dim, quick=row.quick)
    # gradients of the options are proven by the named cases; these cases only have to cover the tiles
    few = ("causal", "windows_and_lengths", "padded_head_dim")
    if row.direction == "backward":
        return {name: case for name, case in found.items() if name in few}
    if row.arch == names.INTERPRETED or row.quick:
        return found
    decode = next(op for op in ops.OPS if op.kernel == "paged_decode_attention")
    config = decode.default_config(aot.device(row.arch), row.dtype, row.head_dim)
    return found | one_query_cases(config.block_kv, row.head_dim)


def _paged_cases(row: Row) -> dict[str, paged_cases.PagedCase]:
    ragged = row.op == "ragged_paged_attention"
    if row.head_dim is None:
        return _named(
            row, {name: case for name, case in paged_cases.CASES.items() if ragged == (case.queries is not None)}
        )
    pages = row.dtype.partition(" on ")[2]
    kind = quant.kind_of(pages) if pages else None
    # larger scores cost float32 more than the contract allows, in a single part too
    spread = 1 if row.dtype == "float32" else 3
    return paged_tile_cases(_config(row, row.head_dim), row.head_dim, kind, ragged=ragged, spread=spread)


def _product_cases(row: Row) -> dict[str, product_cases.ProductCase]:
    few = row.op == "quantized_matmul_few_rows"
    if row.head_dim is None:
        on_gpus = {name: product_cases.CASES[name] for name in product_cases.ON_GPUS}
        return _named(row, {name: case for name, case in on_gpus.items() if few == (case.rows <= products.FEW_ROWS)})
    config = _config(row, row.head_dim)
    return product_tile_cases(
        config,
        None if row.head_dim == max(names.GROUP_SIZES) else row.head_dim,
        quant.kind_of(row.dtype.partition(" on ")[2]),
        rows=3 if few else config.block_rows + 7,
        rounds_inputs=int(row.dtype.startswith("int8 on")),
    )


def _linear_cases(row: Row) -> dict[str, linear_cases.LinearCase]:
    if row.head_dim is None:
        on_gpus = {name: linear_cases.CASES[name] for name in linear_cases.ON_GPUS}
        return _named(row, {name: case for name, case in on_gpus.items() if case.op == row.op and _has(row, case)})
    found = linear_tile_cases(_config(row, row.head_dim), row.head_dim, row.op)
    few = ("lengths_and_segments", "rows")
    return {name: case for name, case in found.items() if _has(row, case) and (not row.quick or name in few)}


def _has(row: Row, case: linear_cases.LinearCase) -> bool:
    """Whether a row's direction exists for a case: rows that are concatenated have no gradient."""
    return row.direction == "forward" or case.rows is None


def _linear_supports(row: Row) -> bool:
    return not ops.linear_why_not(row.op, aot.device(row.arch), row.dtype, row.head_dim or 16)


def _sparse_cases(row: Row) -> Mapping[str, cases.Case]:
    if row.head_dim is None:
        return _named(row, {name: sparse_cases.CASES[name] for name in sparse_cases.ON_GPUS})
    return sparse_cases.tile_cases(row.head_dim, quick=row.quick)


def _write_cases(row: Row) -> dict[str, write_cases.WriteCase]:
    assert row.head_dim is not None
    stored = row.dtype.partition(" on ")[2]
    return write_cases.cases(row.head_dim, quant.kind_of(stored) if stored else None)


def _flash_truth(case: cases.Case, row: Row) -> cases.Truth:
    return cases.truth_of(case, row.dtype, seed=0)


def _paged_truth(case: paged_cases.PagedCase, row: Row) -> paged_cases.PagedTruth:
    return paged_cases.truth_of(case, row.dtype.partition(" on ")[0], seed=0)


def _product_truth(case: product_cases.ProductCase, row: Row) -> product_cases.ProductTruth:
    of_x = row.dtype.partition(" on ")[0]
    return product_cases.truth_of(case, "bfloat16" if of_x == "int8" else of_x, seed=0)


def _linear_truth(case: linear_cases.LinearCase, row: Row) -> linear_cases.LinearTruth:
    return linear_cases.truth_of(case, row.dtype, seed=0)


_FLASH_SIZES: tuple[Size, ...] = (
    *((dtype, head_dim) for dtype in ("bfloat16", "float16", "float32") for head_dim in (64, 128, 256)),
    ("bfloat16", None),
)
_FLASH_QUICK: tuple[Size, ...] = (("bfloat16", 128), ("float16", 64), ("float32", 64), ("bfloat16", None))
_PAGED = Proof(
    run=over_pages,
    check=paged_check,
    cases=_paged_cases,
    truth=_paged_truth,
    sizes=(
        *((dtype, head_dim) for dtype in names.PAGED_DTYPES for head_dim in (64, 128, 256)),
        *((dtype, None) for dtype in ("bfloat16", "float16", "float32")),
    ),
    quick=(("bfloat16 on int8", 64), ("float16", 128), ("bfloat16", None)),
)
_PRODUCTS = Proof(
    run=of_weight,
    check=product_check,
    cases=_product_cases,
    truth=_product_truth,
    sizes=(
        *((dtype, group_size) for dtype in names.PRODUCT_DTYPES for group_size in names.GROUP_SIZES),
        *((dtype, None) for dtype in ("bfloat16", "float16", "float32")),
    ),
    quick=(("bfloat16 on uint8", 128), ("bfloat16", None)),
)
_LINEAR = Proof(
    run=of_chunks,
    check=linear_check,
    cases=_linear_cases,
    truth=_linear_truth,
    sizes=(
        *(("bfloat16", head_dim) for head_dim in names.HEAD_DIMS),
        *(("float32", head_dim) for head_dim in (64, 128)),
        *((dtype, None) for dtype in names.LINEAR_DTYPES),
    ),
    quick=(("bfloat16", 128), ("float32", 64), ("bfloat16", None)),
    supports=_linear_supports,
)
PROOFS: dict[tuple[str, str], Proof] = {
    ("flash_attention", direction): Proof(
        run=run, check=check, cases=_flash_cases, truth=_flash_truth, sizes=_FLASH_SIZES, quick=_FLASH_QUICK
    )
    for direction, run, check in (("forward", forward, forward_check), ("backward", backward, backward_check))
} | {(op, "forward"): _PAGED for op in ("paged_decode_attention", "ragged_paged_attention")}
PROOFS |= {(op, "forward"): _PRODUCTS for op in ("quantized_matmul_few_rows", "quantized_matmul")}
PROOFS |= {(op, "forward"): _LINEAR for op in names.LINEAR_OPS}
_LINEAR_BACKWARD = dataclasses.replace(
    _LINEAR, run=of_chunks_backward, check=linear_backward_check, quick=(("bfloat16", None),)
)
PROOFS |= {(op, "backward"): _LINEAR_BACKWARD for op in names.LINEAR_OPS}
PROOFS |= {
    ("block_sparse_attention", direction): Proof(
        run=run,
        check=check,
        cases=_sparse_cases,
        truth=_flash_truth,
        sizes=(
            *((dtype, head_dim) for dtype in ("bfloat16", "float16") for head_dim in names.HEAD_DIMS),
            *(("float32", head_dim) for head_dim in (64, 128)),
            *((dtype, None) for dtype in names.FLASH_DTYPES),
        ),
        quick=quick,
    )
    for direction, run, check, quick in (
        ("forward", forward, forward_check, (("float16", 64), ("bfloat16", None))),
        ("backward", backward, backward_check, (("bfloat16", None),)),
    )
}


PROOFS["rotate_and_write", "forward"] = Proof(
    run=of_tokens,
    check=write_check,
    cases=_write_cases,
    truth=lambda case, row: write_cases.truth_of(case, row.dtype.partition(" on ")[0], seed=0),
    sizes=tuple((dtype, head_dim) for dtype in names.WRITE_DTYPES for head_dim in names.HEAD_DIMS),
    quick=(("bfloat16 on int8", 128), ("float16 on float8_e4m3fn", 64)),
)


PROOFS["matmul_few_rows", "forward"] = Proof(
    run=of_rows,
    check=row_check,
    cases=lambda row: row_cases.cases(row.dtype),
    truth=lambda case, row: row_cases.truth_of(case, row.dtype.partition(" on ")[0], seed=0),
    sizes=tuple((dtype, None) for dtype in names.ROW_DTYPES),
    quick=tuple((dtype, None) for dtype in names.ROW_DTYPES if dtype.startswith("bfloat16")),
)


def prove_row(row: Row) -> dict[str, Any]:
    """The record of a row: status "ok" or "wrong" and the reason, worst error / limit, instructions, seconds."""
    start = time.perf_counter()
    proof = PROOFS[row.op, row.direction]
    verdicts, refused = {}, []
    for name, case in proof.cases(row).items():
        truth = proof.truth(case, row)
        if row.arch != names.INTERPRETED:
            verdicts[name] = proof.run(truth, row.arch, compiler=compilers.chosen(row.arch, row.compiler))
            continue
        truth.options.setdefault("config", _interpreted_config(row))
        try:
            verdicts[name] = dataclasses.replace(interpreted(proof.check(truth, "tpu")), kernels=_kernels_on_tpus(row))
        except UnsupportedError:
            refused.append(name)
    wrong = [f"{name}: {found.wrong}" for name, found in verdicts.items() if found.wrong]
    wrong += [] if verdicts else ["the kernel refused every case"]
    shares = {name: found.share for name, found in verdicts.items() if found.share is not None}
    return _about(row) | {
        "kernels": list(dict.fromkeys(kernel for found in verdicts.values() for kernel in found.kernels)),
        "cases": list(verdicts),
        **({"refused": refused} if row.arch == names.INTERPRETED else {}),
        "status": "wrong" if wrong else "ok",
        "reason": "; ".join(wrong) or None,
        "worst_error_of_limit": round(max(shares.values()), 3) if shares else None,
        "worst_case": max(shares, key=lambda name: shares[name]) if shares else None,
        "races": sum(found.races for found in verdicts.values()),
        "instructions": sum(found.instructions for found in verdicts.values()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def _kernels_on_tpus(row: Row) -> tuple[str, ...]:
    backward = [name for name in names.TPU_KERNELS if names.KERNELS[name] == (row.op, "backward")]
    return row.op, *(backward if row.direction == "backward" else ())


def _about(row: Row) -> dict[str, Any]:
    what = {"benchmark": "prove", "op": row.op, "direction": row.direction, "arch": row.arch}
    what["compiler"] = "interpreter" if row.arch == names.INTERPRETED else compilers.chosen(row.arch, row.compiler)
    return what | {"dtype": row.dtype, "head_dim": "options" if row.head_dim is None else row.head_dim}


def _lost(row: Row, why: str) -> dict[str, Any]:
    return _about(row) | {"status": "wrong", "reason": f"the row {why}", "cases": [], "seconds": None}


def rows(
    archs: Sequence[str],
    op_names: Sequence[str],
    directions: Sequence[str],
    *,
    quick: bool = False,
    compiler: str | None = None,
) -> list[Row]:
    """The rows to prove, in the table's order; quick: fewer rows and cases."""
    found = [
        (proof, Row(op=op, direction=direction, arch=arch, dtype=dtype, head_dim=size, quick=quick, compiler=compiler))
        for (op, direction), proof in PROOFS.items()
        if op in op_names and direction in directions
        for arch in archs
        for dtype, size in (proof.quick if quick else proof.sizes)
    ]
    return [row for proof, row in found if (_on_tpus(row) if row.arch == names.INTERPRETED else proof.supports(row))]


def _on_tpus(row: Row) -> bool:
    """Whether TPUs have the kernel, for these dtypes."""
    of_queries, _, _ = row.dtype.partition(" on ")
    return row.op in names.TPU_KERNELS and of_queries not in ("float16", "int8")


def prove_all(rows: Sequence[Row], processes: int) -> list[dict[str, Any]]:
    """prove_row for each row, in order, in this number of worker processes; 0: in this process.

    A wait for a semaphore that nobody signals hangs the interpreter: a row of it that takes too long is wrong.
    """
    return pool.each(
        prove_row,
        rows,
        lost=_lost,
        doing="proving",
        processes=processes,
        limit_s=lambda row: INTERPRETED_S if row.arch == names.INTERPRETED else None,
    )


TABLE = {
    **{"dir": "dir", "short_dtype": "dtype", "head_dim": "d", "status": "status"},
    **{"worst_error_of_limit": "error", "races": "races", "instructions": "instructions", "seconds": "s"},
}
COLUMNS = {
    **{name: name for name in ("op", "arch", "direction", "dtype", "head_dim", "status", "worst_error_of_limit")},
    **{name: name for name in ("races", "instructions", "seconds", "reason")},
}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; for md a table for each op and architecture, and the reason of each row that is wrong."""
    if output != "md":
        return record.render(records, output, COLUMNS)
    parts = []
    for above, rows in itertools.groupby(records, lambda row: f"{row['op']} on {row['arch']}"):
        shown = [
            {**row, "dir": record.SHORT_DIRECTIONS[row["direction"]], "short_dtype": tables.short_dtype(row["dtype"])}
            for row in rows
        ]
        parts += [above, record.render(shown, "md", TABLE)]
    key = ("op", "arch", "direction", "dtype", "head_dim")
    lines = [f"{' '.join(str(row[name]) for name in key)}: {row['reason']}" for row in records if row["status"] != "ok"]
    return "\n\n".join(
        [*parts, "error: worst error / limit of the numerics contract"] + ["\n".join(lines)] * bool(lines)
    )
