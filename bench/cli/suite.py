"""`jfa-bench all`: runs all benchmarks, saves each to a file in a folder, then writes the report."""

from collections.abc import Mapping
from pathlib import Path

import click

from ..records import plot, report

# File name to the command line that creates it. What a machine does not support is recorded with a reason.
FULL: Mapping[str, str] = {
    "attention": "attention --direction all",
    "attention-fa2": "attention --grid fa2 --dtype bfloat16",
    "sparse": "sparse --seq-len 16384 --dtype bfloat16 --heads 32 --kv-heads 8 --head-dim 128",
    "linear": "linear --dtype bfloat16 --heads 32 --key-dim 128 --value-dim 128",
    "paged": "paged --batch 1,8,64,256 --context 1024,8192 --page-size 16 --kv-dtype all --dtype bfloat16 "
    "--heads 32 --kv-heads 8 --head-dim 128",
    "prefill": "prefill",
    "decode": "decode --models mistral-7b,llama-3-8b,phi-2 --batch 1,8,64 --context 128,1024",
    "throughput": "throughput",
    "memory": "memory",
}

# The same in ten minutes on two cores: small shapes, and only one layer of each model.
QUICK: Mapping[str, str] = {
    "attention": "attention --seq-lens 256:1024:256 --heads 8 --head-dim 64 --dtype float32 --samples 5",
    "sparse": "sparse --seq-len 2048 --mask window --density 0.5,0.2 --samples 5",
    "linear": "linear --seq-lens 1024,2048 --rule scalar --samples 5",
    "paged": "paged --batch 1,8 --context 1024 --samples 5",
    "prefill": "prefill --models mistral-7b,phi-2 --layers 1 --seq-lens 128,256 --samples 5",
    "decode": "decode --models mistral-7b,phi-2 --layers 1 --samples 5",
    "throughput": "throughput --num-prompts 8 --output-len 32",
    "memory": "memory --steps 100",
}


@click.command("all")
@click.option("--quick", is_flag=True, help="Small shapes: ten minutes on two cores.")
@click.option(
    "--into",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default="jfa-bench-results",
    show_default=True,
    help="Folder for the records and the page.",
)
@click.pass_context
def all_command(context, quick, folder) -> None:
    """Run all benchmarks and write a report.

    Takes ten minutes with --quick, otherwise a night on a GPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot.check(folder / "report.svg")
    assert context.parent is not None
    commands = context.parent.command
    for name, line in (QUICK if quick else FULL).items():
        click.echo(f"jfa-bench {line}", err=True)
        arguments = [*line.split(), "--save", str(folder / f"{name}.json")]
        try:
            status = commands.main(arguments, prog_name="jfa-bench", standalone_mode=False)
        except (click.ClickException, ValueError, RuntimeError, OSError) as error:
            click.echo(f"{name}: {' '.join(str(error).split())}", err=True)  # run the others anyway
            continue
        if status:  # Ctrl-C
            context.exit(status)
    report.write(folder)
