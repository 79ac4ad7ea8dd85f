"""`jfa-bench compile --model`: what a GPU does in a whole step of a model, as XLA compiles it; no GPU, no weights.

The program of a step is compiled with two and with three layers: the difference is what a layer adds, so that the
launches of the whole model follow without compiling all of it. A decode step ends with the logits, before sampling; a
prefill step with the state of each row's last token.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jfa_models.checkpoints.load import is_weight, shape_of
from jfa_models.decoding.language_model import LanguageModel, abstract_decoder, named_leaves
from jfa_models.decoding.options import CacheOptions

from .. import configs, names
from ..records import record
from . import compilers, pool
from .program import Program, ProgramError, by_role, compile_program, each

_LAYERS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One step to compile; plain data, so that it can be sent to another process.

    context: tokens of a row that the cache holds; a prefill step computes all of them.
    """

    model: str
    step: str
    arch: str
    batch: int = 8
    context: int = 1024
    cache: str = "contiguous"  # or "paged"
    kv_dtype: str | None = None
    weights: str | None = None  # a quantization of from_pretrained
    dtype: str = "bfloat16"


def compiled(row: Row, layers: int) -> Program:
    """The program of a step of the model's first layers."""
    config = configs.config_of(row.model, layers)
    options = CacheOptions(kind=row.cache, kv_dtype=row.kv_dtype)  # type: ignore[arg-type]
    decoder = abstract_decoder(config, row.dtype)
    params = tuple(
        shape_of(name, x.shape, row.weights)
        if row.weights and is_weight(name)
        else jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in named_leaves(decoder).items()
    )
    model = LanguageModel(decoder=decoder, params=params, cache_options=options)  # type: ignore[arg-type]
    cache = jax.eval_shape(lambda: model.new_cache(batch=row.batch, capacity=row.context))
    new = 1 if row.step == "decode" else row.context
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((row.batch, new), (row.batch,)))
    if row.step == "decode":
        return compile_program(model.steps.score, params, cache, tokens, lengths, arch=row.arch)
    hidden = jax.ShapeDtypeStruct((row.batch, config.hidden_size), row.dtype)
    return compile_program(model.steps.prefill, params, cache, hidden, tokens, lengths, arch=row.arch)


def compile_row(row: Row) -> dict[str, Any]:
    """The record of a row: launches of a layer in order, their number by role, of a layer and in all, and bytes."""
    about = {"benchmark": "compile model", "compiler": "xla", **dataclasses.asdict(row)}
    try:
        fewer, more = (compiled(row, _LAYERS + extra) for extra in (0, 1))
    except ProgramError as error:
        return about | {"status": "failed", "reason": str(error)}
    layer = {role: n - by_role(fewer).get(role, 0) for role, n in by_role(more).items()}
    count = configs.config_of(row.model).num_layers
    total = {role: n + (count - _LAYERS) * layer.get(role, 0) for role, n in by_role(fewer).items()}
    return about | {
        "status": "ok",
        "reason": None,
        "layers": count,
        "launches_per_layer": sum(layer.values()),
        "by_role_per_layer": layer,
        "launches": sum(total.values()),
        "by_role": total,
        "one_layer": _one_layer(more),
        "temporary_bytes": more.bytes["temporaries"],
        "in_place": more.bytes["aliased"] >= _bytes_of_cache(row, _LAYERS + 1),
    }


def _bytes_of_cache(row: Row, layers: int) -> int:
    config = configs.config_of(row.model, layers)
    model = LanguageModel(
        decoder=abstract_decoder(config, row.dtype),
        params=(jax.ShapeDtypeStruct((1,), row.dtype),),  # type: ignore[arg-type]
        cache_options=CacheOptions(kind=row.cache, kv_dtype=row.kv_dtype),  # type: ignore[arg-type]
    )
    cache = jax.eval_shape(lambda: model.new_cache(batch=row.batch, capacity=row.context))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim > 2)


def _one_layer(program: Program) -> list[str]:
    """The kernels from one attention kernel to the next, in order."""
    launches = list(each(program.launches))
    pallas = [i for i, launch in enumerate(launches) if "attention" in launch.name]
    return [launch.name or launch.kind for launch in launches[pallas[-2] + 1 : pallas[-1] + 1]]


def compile_all(rows: Sequence[Row], processes: int = names.PROCESSES) -> list[dict[str, Any]]:
    """compile_row for each row, in order, each in a process of its own; this number of them at a time.

    Raises:
      RuntimeError: XLA's compiler is not installed; the message says how to install it.
    """
    for arch in {row.arch for row in rows}:
        compilers.chosen(arch, "xla")

    def crashed(row: Row) -> dict[str, Any]:
        about = {"benchmark": "compile model", "compiler": "xla", **dataclasses.asdict(row)}
        return about | {"status": "failed", "reason": "the compiler crashed its process"}

    return pool.each(
        compile_row, rows, crashed=crashed, doing="compiling", processes=max(1, processes), rows_per_process=1
    )


TABLE = {
    **{"arch": "arch", "model": "model", "step": "step", "pages": "cache"},
    **{"launches_per_layer": "a layer", "launches": "launches", "mib": "MiB", "place": "in place"},
}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; for md a table, and below it the kernels of one layer in order. MiB: of temporary buffers."""
    if output not in ("md", "csv"):
        return record.render(records, output, TABLE)
    shown = [
        {
            **row,
            "model": f"{row['model']} {row['weights'] or ''}".rstrip(),
            "pages": row["kv_dtype"] or row["cache"],
            "mib": f"{row.get('temporary_bytes', 0) / 2**20:.1f}",
            "place": "yes" if row.get("in_place") else "no",
        }
        for row in records
    ]
    table = record.render(shown, output, TABLE)
    if output == "csv":
        return table
    lines = [
        f"{row['arch']} {row['model']} {row['step']}: "
        + (", ".join(row["one_layer"]) if row["status"] == "ok" else f"{row['status']}: {row['reason']}")
        for row in records
    ]
    return "\n\n".join([table, *lines])
