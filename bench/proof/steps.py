"""`jfa-bench compile --model`: what a device does in a whole step of a model, as XLA compiles it, without either.

The program of a step is compiled with two and with three layers: the difference is what a layer adds, so that the
launches of the whole model follow without compiling all of it. A decode step ends with the logits, before sampling; a
prefill step with the state of each row's last token.

For several devices all layers are compiled, and what crosses between devices, what one of them holds
and which kernels it runs on which shapes are read from the program of the whole model. So are they for TPUs, whose
programs have no launches, together with the backend of each op of jfa and the copies of the cache.
"""

import contextlib
import dataclasses
import itertools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jfa_models.checkpoints.load import is_weight, shape_of
from jfa_models.decoding.language_model import LanguageModel, abstract_decoder, named_leaves
from jfa_models.decoding.options import CacheOptions
from jfa_models.model.config import DecoderConfig
from jfa_models.model.partition import WHOLE, Partition, partition_of

from .. import configs, names
from ..records import record
from . import aot, by_libtpu, by_xla, compilers, pool
from .program import Program, ProgramError, by_role, collectives, compile_program, each, kernels, shape_bytes

_LAYERS = 2
_ROOM = 128  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One step to compile; plain data, so that it can be sent to another process.

    context: tokens of a row that the cache holds; a prefill step computes all of them. devices: of each of the hosts.
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
    devices: int = 1
    hosts: int = 1
    mesh: Mapping[str, int] | None = None  # None: all of them along "tensor"


class Call(NamedTuple):
    """A jitted step and the shapes of its arguments. mesh: None: of one device."""

    step: Any
    args: tuple
    mesh: Any


def call_of(row: Row, layers: int) -> Call:
    """A step of the model's first layers."""
    config = configs.config_of(row.model, layers)
    options = CacheOptions(kind=row.cache, kv_dtype=row.kv_dtype)  # type: ignore[arg-type]
    partition = _partition(row, config)
    decoder = abstract_decoder(config, row.dtype, partition=partition)

    def param(name: str, x: jax.ShapeDtypeStruct) -> Any:
        held = jax.ShapeDtypeStruct(x.shape, x.dtype)
        if row.weights and is_weight(name):
            held = shape_of(name, x.shape, row.weights)
        return _placed(held, partition.of_parameter(name, held), partition)

    params = tuple(param(name, x) for name, x in named_leaves(decoder).items())
    model = LanguageModel(decoder=decoder, params=params, cache_options=options)
    cache = _cache(row, config)
    cache = _placed(cache, partition.of_cache(cache), partition)

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> Any:
        return _placed(jax.ShapeDtypeStruct(shape, dtype), PartitionSpec(), partition)

    tokens = array(row.batch, 1 if row.step == "decode" else row.context)
    if row.step == "decode":
        return Call(model.steps.score, (params, cache, tokens, array(row.batch)), partition.mesh)
    hidden = array(row.batch, config.hidden_size, dtype=row.dtype)
    return Call(model.steps.prefill, (params, cache, hidden, tokens, array(row.batch)), partition.mesh)


def compiled(row: Row, layers: int) -> Program:
    """The program of a step of the model's first layers, for a GPU."""
    step, args, mesh = call_of(row, layers)
    return compile_program(step, *args, arch=row.arch, mesh=mesh)


def _partition(row: Row, config: DecoderConfig) -> Partition:
    if row.devices * row.hosts == 1:
        return WHOLE
    if row.arch in names.TPU_ARCHS:
        devices = np.asarray(by_libtpu.devices(row.arch, row.devices))
    else:
        devices = np.asarray(by_xla.devices(row.arch, row.devices, row.hosts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "over .* devices, each has all of", UserWarning)
        mesh = row.mesh or {"tensor": len(devices)}
        return partition_of(config, jax.sharding.Mesh(devices.reshape(*mesh.values()), tuple(mesh)))


def _placed(shapes: Any, specs: Any, partition: Partition) -> Any:
    if (mesh := partition.mesh) is None:
        return shapes

    def placed(x: jax.ShapeDtypeStruct, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, shapes, specs)


def compile_row(row: Row) -> dict[str, Any]:
    """The record of a row: launches of a layer in order, their number by role, of a layer and in all, and bytes.

    Of a TPU: kernels, backends, collectives and copies of the whole program, and bytes.
    """
    about = _about(row)
    try:
        if row.arch in names.TPU_ARCHS:
            return about | {"status": "ok", "reason": None} | _of_tpu(row)
        fewer, more = (compiled(row, _LAYERS + extra) for extra in (0, 1))
        whole = compiled(row, configs.config_of(row.model).num_layers) if row.devices * row.hosts > 1 else None
    except (ProgramError, aot.CompileError, ValueError) as error:
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
        **({} if whole is None else _of_one_device(whole)),
    }


def _about(row: Row) -> dict[str, Any]:
    compiler = "libtpu" if row.arch in names.TPU_ARCHS else "xla"
    return {"benchmark": "compile model", "compiler": compiler, **dataclasses.asdict(row)}


def _of_one_device(whole: Program) -> dict[str, Any]:
    """What one of several devices holds, runs and sends."""
    return _held(whole) | {"kernels": kernels(whole)}


def _held(whole: Program | by_libtpu.Step) -> dict[str, Any]:
    """What one device holds and sends: the operands of collectives, each counted once."""
    crossing = [
        {"kind": kind, "shape": shape, "count": count, "bytes": count * shape_bytes(shape)}
        for (kind, shape), count in collectives(whole.instructions).items()
    ]
    held = whole.bytes["arguments"] + whole.bytes["temporaries"] + whole.bytes["outputs"] - whole.bytes["aliased"]
    return {"collectives": crossing, "device_bytes": held, "cache_bytes": whole.bytes["aliased"]}


def _of_tpu(row: Row) -> dict[str, Any]:
    layers = configs.config_of(row.model).num_layers
    step, args, mesh = call_of(row, layers)
    whole = by_libtpu.compile_step(step, *args, arch=row.arch, mesh=mesh)
    arrays = {(_HLO_DTYPES[x.dtype.name], size) for x, size in _arrays_of_cache(row, layers)}
    copies, moves = whole.copies_of(arrays)
    return {
        "layers": layers,
        "backends": whole.backends,
        "kernels": whole.kernels(),
        "temporary_bytes": whole.bytes["temporaries"],
        "code_bytes": whole.bytes["code"],
        "in_place": whole.bytes["aliased"] >= _bytes_of_cache(row, layers),
        "cache_copies": copies,
        "cache_moves": moves,
        **_held(whole),
    }


_HLO_DTYPES = {"bfloat16": "bf16", "float32": "f32", "int8": "s8", "uint8": "u8", "float8_e4m3fn": "f8e4m3fn"}


def _bytes_of_cache(row: Row, layers: int) -> int:
    return sum(size * x.dtype.itemsize for x, size in _arrays_of_cache(row, layers))


def _arrays_of_cache(row: Row, layers: int) -> list[tuple[Any, int]]:
    """(array, elements that one device has) for each of keys and values."""
    config = configs.config_of(row.model, layers)
    partition = _partition(row, config)
    arrays = [x for x in jax.tree.leaves(_cache(row, config)) if x.ndim > 2]
    return [(x, x.size // partition.size(partition.kv_heads)) for x in arrays]


def _cache(row: Row, config: DecoderConfig) -> Any:
    """The shapes of a cache; of one device, since those of other hosts can be given nothing."""
    model = LanguageModel(
        decoder=abstract_decoder(config, row.dtype),
        params=(jax.ShapeDtypeStruct((1,), row.dtype),),  # type: ignore[arg-type]
        cache_options=CacheOptions(kind=row.cache, kv_dtype=row.kv_dtype),  # type: ignore[arg-type]
    )
    # with room for more on a TPU, where a copy of the cache is told from one of a prompt's keys by its size
    capacity = row.context + (_ROOM if row.arch in names.TPU_ARCHS else 0)
    divided = row.devices * row.hosts > 1  # then it has no spare heads
    with contextlib.nullcontext() if divided else aot.target(row.arch):
        return jax.eval_shape(lambda: model.new_cache(batch=row.batch, capacity=capacity))


def _one_layer(program: Program) -> list[str]:
    """The kernels from one attention kernel to the next, in order."""
    launches = list(each(program.launches))
    pallas = [i for i, launch in enumerate(launches) if "attention" in launch.name]
    return [launch.name or launch.kind for launch in launches[pallas[-2] + 1 : pallas[-1] + 1]]


def compile_all(rows: Sequence[Row], processes: int = names.PROCESSES) -> list[dict[str, Any]]:
    """compile_row for each row, in order, each in a process of its own; this number of them at a time.

    Raises:
      RuntimeError: the compiler is not installed; the message says how to install it.
    """
    for arch in {row.arch for row in rows}:
        compilers.chosen(arch, "xla")

    def lost(row: Row, why: str) -> dict[str, Any]:
        return _about(row) | {"status": "failed", "reason": f"the compiler {why}"}

    return pool.each(compile_row, rows, lost=lost, doing="compiling", processes=max(1, processes), rows_per_process=1)


TABLE = {
    **{"arch": "arch", "model": "model", "step": "step", "pages": "cache"},
    **{"launches_per_layer": "a layer", "launches": "launches", "mib": "MiB", "place": "in place"},
}
TPU_TABLE = {
    **{"arch": "arch", "devices": "devices", "model": "model", "step": "step", "pages": "cache"},
    **{"gb": "GB", "mib": "MiB", "place": "in place", "cache_copies": "copies"},
}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; for md tables of GPUs and TPUs, and below them what a row's device runs and sends.

    MiB: of temporary buffers; GB: of all that a device holds; copies: of whole arrays of the cache.
    """
    if output not in ("md", "csv"):
        return record.render(records, output, TABLE | TPU_TABLE)
    shown = [
        {
            **row,
            "model": f"{row['model']} {row['weights'] or ''}".rstrip(),
            "pages": row["kv_dtype"] or row["cache"],
            "gb": f"{row['device_bytes'] / 1e9:.2f}" if "device_bytes" in row else None,
            "mib": f"{row.get('temporary_bytes', 0) / 2**20:.1f}",
            "place": "yes" if row.get("in_place") else "no",
        }
        for row in records
    ]
    if output == "csv":
        return record.render(shown, output, TABLE | TPU_TABLE)
    of_gpus = [row for row in shown if row["arch"] not in names.TPU_ARCHS]
    of_tpus = [row for row in shown if row["arch"] in names.TPU_ARCHS]
    tables = [record.render(rows, output, to) for rows, to in ((of_gpus, TABLE), (of_tpus, TPU_TABLE)) if rows]
    return "\n\n".join([*tables, *map(_line, records)])


def _line(row: Mapping[str, Any]) -> str:
    title = f"{row['arch']} {row['model']} {row['step']}: "
    if row["status"] != "ok":
        return f"{title}{row['status']}: {row['reason']}"
    if row["arch"] in names.TPU_ARCHS:
        found = title + ", ".join(f"{op} by {' and '.join(by)}" for op, by in row["backends"].items())
    else:
        found = title + ", ".join(row["one_layer"])
    if "collectives" not in row:
        return found
    count = row["devices"] * row["hosts"]
    crossing = "; ".join(f"{one['count']} {one['kind']} of {one['shape']}" for one in row["collectives"])
    held, cache = row["device_bytes"] / 1e9, row["cache_bytes"] / 1e9
    who = "one device" if count == 1 else f"each of {count} devices"
    told = "; ".join(filter(None, [f"{who}: {held:.2f} GB, of which {cache:.2f} GB cache", crossing]))
    return "\n".join([found, "", told, "", *map(_kernel, row["kernels"])])


def _kernel(one: Mapping[str, Any]) -> str:
    """A kernel's operands and results, equal ones that follow one another counted."""

    def shown(shapes: Sequence[str]) -> str:
        runs = [(shape, len(list(group))) for shape, group in itertools.groupby(shapes)]
        return ", ".join(shape if n == 1 else f"{n} {shape}" for shape, n in runs)

    text = f"{one['count']} {one['name']}: {shown(one['operands'])} -> {shown(one['results'])}"
    return textwrap.fill(text, 80, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
