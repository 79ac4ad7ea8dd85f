"""The commands that compile, verify and tune kernels, also for GPUs that are not present."""

import math

import click

from jfa_models.cli.base import MeshSizes
from jfa_models.decoding.options import CACHES, KV_DTYPES

from .. import names
from . import options

ARCHS = options.Names("architecture", names.ARCHS)
WITH_TPUS = options.Names("architecture", names.ARCHS, more=names.TPU_ARCHS)
PROVEN = options.Names("architecture", names.EXECUTED_ARCHS, more=(names.INTERPRETED,))
OPS = options.Names("op", names.OPS)
OPS_AND_KERNELS = options.Names("op", tuple(dict.fromkeys((*names.OPS, *names.KERNELS))))
TUNED = options.Names("op", tuple(dict.fromkeys((*(names.KERNELS[kernel][0] for kernel in names.TUNED), *names.TUNED))))
DIRECTIONS = options.Names("direction", names.DIRECTIONS)
HEAD_DIMS = options.Names("head_dim", tuple(map(str, sorted({*names.HEAD_DIMS, *names.BETWEEN, *names.GROUP_SIZES}))))

compiler_option = click.option(
    "--compiler",
    type=click.Choice(names.COMPILERS),
    help="xla: the one in JAX's plugin for the platform; triton: the package. Default: xla if its plugin is installed.",
)
direction_option = click.option("--direction", type=DIRECTIONS, default="all", show_default=True)
kernels_option = click.option("--op", type=OPS_AND_KERNELS, default="all", show_default=True)


@click.command("compile")
@click.option(
    "--arch",
    type=WITH_TPUS,
    default="all",
    show_default=True,
    help=f"One or more of {', '.join(names.ARCHS)}, which are all, and of {', '.join(names.TPU_ARCHS)}.",
)
@kernels_option
@direction_option
@click.option("--dtype", type=options.Names("dtype", names.DTYPES), default="all", show_default=True)
@click.option("--head-dim", type=HEAD_DIMS, default="all", show_default=True, help="Of products: the group size.")
@click.option("--model", help="Whole steps of this model instead: a name such as llama-3-8b, a folder or a .gguf file.")
@click.option("--step", type=options.Names("step", names.MODEL_STEPS), default="decode", show_default=True)
@click.option("--batch", type=options.COUNT, default=8, show_default=True, help="With --model: rows.")
@click.option("--context", type=options.COUNT, default=1024, show_default=True, help="With --model: cached tokens.")
@click.option("--cache", type=click.Choice(CACHES), default="contiguous", show_default=True, help="With --model.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="With --model and --cache paged.")
@click.option("--quantization", type=click.Choice(("int8", "int4", "fp8")), help="With --model: its weights.")
@click.option("--devices", type=options.COUNT, default=1, show_default=True, help="With --model: that divide it.")
@click.option("--hosts", type=options.COUNT, default=1, show_default=True, help="With --model: each with --devices.")
@click.option("--mesh", type=MeshSizes(), help="With --model: how they divide it. Default: by tensor alone.")
@click.option("--peers", is_flag=True, help="Of TPUs: JAX's own kernels beside the library's, for the same calls.")
@compiler_option
@options.processes_option
@options.format_option
@click.pass_context
def compile_command(
    context_,
    arch,
    op,
    direction,
    dtype,
    head_dim,
    model,
    step,
    batch,
    context,
    cache,
    kv_dtype,
    quantization,
    devices,
    hosts,
    mesh,
    peers,
    compiler,
    processes,
    format,
) -> None:
    """Compile kernels for an architecture.

    Reports registers, spills, LDS and the theoretical bound of each kernel, or the VMEM of a TPU; with --model what
    a whole step launches. Needs no GPU and no TPU.
    """
    of_kernels = ("op", "direction", "dtype", "head_dim", "peers")
    _refuse_options(context_, of_kernels if model else _OF_MODELS, with_model=bool(model))
    if model:
        from .. import configs

        if reason := configs.unknown([model]):
            raise click.UsageError(reason)
        if hosts > 1 and (tpus := [name for name in arch if name in names.TPU_ARCHS]):
            raise click.UsageError(f"--hosts is of GPUs, got {tpus[0]}: a slice of TPUs has --devices")
        if compiler == "triton":
            raise click.UsageError("--model needs --compiler xla: a whole program is compiled by XLA")
        if kv_dtype and cache != "paged":
            raise click.UsageError(f"--kv-dtype {kv_dtype} needs --cache paged: a contiguous cache is not quantized")

        if mesh and math.prod(mesh.values()) != devices * hosts:
            shown = ",".join(f"{axis}={size}" for axis, size in mesh.items())
            raise click.UsageError(f"--mesh {shown} is not of {devices * hosts} devices: see --devices and --hosts")

        from ..proof import compile, steps

        options_ = {"cache": cache, "kv_dtype": kv_dtype, "devices": devices, "hosts": hosts, "mesh": mesh}
        wanted = [
            steps.Row(step=one, arch=name, model=model, batch=batch, context=context, weights=quantization, **options_)
            for name in arch
            for one in step
        ]
        circumstances = compile.circumstances(arch, "xla")
        click.echo(steps.render([row | circumstances for row in steps.compile_all(wanted, processes)], format))
        return

    if peers:
        if of_gpus := [name for name in arch if name not in names.TPU_ARCHS]:
            raise click.UsageError(f"--peers compares kernels for TPUs, got {', '.join(of_gpus)}")

        from ..proof import beside, compile

        circumstances = compile.circumstances(arch, compiler)
        found = beside.compile_all(beside.rows(arch), processes=processes)
        click.echo(beside.render([row | circumstances for row in found], format))
        return

    from ..proof import compile, ops

    circumstances = compile.circumstances(arch, compiler)
    rows = compile.cases(
        arch, ops=ops.named(op, direction), dtypes=dtype, head_dims=[int(d) for d in head_dim], compiler=compiler
    )
    records = [row | circumstances for row in compile.compile_all(rows, processes=processes)]
    click.echo(compile.render(records, format))


def _refuse_tpus(archs: tuple[str, ...]) -> None:
    for name in archs:
        if name in (*names.TPU_ARCHS, names.INTERPRETED):
            raise click.UsageError(f"--model knows no TPUs yet, got {name}")


_OF_MODELS = ("step", "batch", "context", "cache", "kv_dtype", "quantization", "devices", "hosts", "mesh")


def _refuse_options(context: click.Context, given: tuple[str, ...], *, with_model: bool) -> None:
    """Refuses options that would be ignored."""
    for name in given:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(
                f"{option} cannot be combined with --model" if with_model else f"{option} needs --model"
            )


@click.command("prove")
@click.option(
    "--arch",
    type=PROVEN,
    default="all",
    show_default=True,
    help=f"One or more of {', '.join(names.EXECUTED_ARCHS)}, which are all, or tpu: JAX's interpreter of TPU kernels.",
)
@click.option("--op", type=OPS, default="all", show_default=True)
@direction_option
@click.option("--quick", is_flag=True, help="Fewer rows and cases, for CI.")
@click.option("--model", is_flag=True, help="Whole steps of two tiny models instead of kernels; needs XLA's compiler.")
@compiler_option
@options.processes_option
@options.format_option
@click.pass_context
def prove_command(context, arch, op, direction, quick, model, compiler, processes, format) -> None:
    """Verify the AMD machine code of kernels, or the TPU kernels in JAX's interpreter.

    Executes it on this CPU and checks the results against an oracle; exit status 1 if one is wrong.
    """
    from ..proof import compile, prove
    from ..proof import model as models

    if model:
        _refuse_options(context, ("op", "direction"), with_model=True)
        _refuse_tpus(arch)
        if compiler == "triton":
            raise click.UsageError("--model needs --compiler xla: a whole program is compiled by XLA")
        circumstances = compile.circumstances(arch, "xla")
        records = [row | circumstances for row in models.prove_all(models.rows(arch, quick=quick), processes)]
        click.echo(models.render(records, format))
        context.exit(int(any(row["status"] != "ok" for row in records)))
    circumstances = compile.circumstances(arch, compiler)
    rows = prove.rows(arch, op, direction, quick=quick, compiler=compiler)
    records = [row | circumstances for row in prove.prove_all(rows, processes)]
    click.echo(prove.render(records, format))
    context.exit(int(any(row["status"] != "ok" for row in records)))


@click.command("tune")
@click.option("--offline", is_flag=True, help="Choose by compiled code. Default: measure on this device.")
@click.option("--arch", type=ARCHS, help=f"With --offline: one or more of {', '.join(names.ARCHS)}, or all.")
@click.option("--op", type=TUNED, default="all", show_default=True, help="Linear attention has no tables.")
@direction_option
@click.option("--write", is_flag=True, help="Replace the tables that jfa uses.")
@click.option("--folder", type=options.FOLDER, help="Write the tables to this folder instead.")
@compiler_option
@options.processes_option
@click.option("--samples", type=options.COUNT, default=15, show_default=True, help="Timed calls per measurement.")
@options.format_option
def tune_command(offline, arch, op, direction, write, folder, compiler, processes, samples, format) -> None:
    """Choose the tile sizes of kernels.

    Compares their compiled code, or measures them on this machine's GPU.
    """
    if write and folder:
        raise click.UsageError("--write and --folder cannot be combined: both set where the tables are written")
    if offline and not arch:
        raise click.UsageError(f"--offline needs --arch: one or more of {', '.join(names.ARCHS)}, or all")

    from jfa import tuning

    from ..proof import compile, ops, tune

    archs = arch if offline else (tune.arch_to_measure(arch),)
    compile.warn_of_unmet([tuning.table_arch(name) for name in archs], compiler)
    place = tune.resources_folder() if write else folder
    records = []
    for one in ops.named(op, direction, table=ops.TUNED):
        for name in archs:
            text, rows = tune.tuned(
                one, name, processes=processes, samples=None if offline else samples, compiler=compiler
            )
            records += rows
            if place:
                file = place / name / f"{one.kernel}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
                click.echo(f"wrote {file}", err=True)
    click.echo(tune.render(records, format))


COMMANDS = (compile_command, prove_command, tune_command)
