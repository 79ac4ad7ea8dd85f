"""Shared by the commands `jfa` and `jfa-bench`: entry point, exit status, and the options that select a model."""

import json
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import CompletionItem

from jfa_models.checkpoints.locate import PACKAGED
from jfa_models.decoding.options import CACHES, DTYPES, KV_DTYPES, QUANTIZATIONS

DEFAULT_MODEL = "smollm2"


def run(group: click.Group, name: str) -> int:
    """Runs a group of commands. For errors that the user can fix, prints one line to stderr and returns status 2."""
    try:
        status = group.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        return 2
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError of JAX: no such platform, out of memory
        click.echo(f"{name}: {' '.join(str(error).split())}", err=True)
        return 2
    return status if isinstance(status, int) else 0  # what a command passed to Context.exit


def command_group(function: Callable) -> click.Group:
    """A group of commands that prints its help when called without a command."""

    @click.group(
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        invoke_without_command=True,
        help=function.__doc__,
    )
    @click.version_option(package_name="jfa")
    @click.pass_context
    def command(context: click.Context) -> None:
        if context.invoked_subcommand is None:
            click.echo(context.get_help())

    return command


class ModelName(click.ParamType):
    """A name or a path, checked when the model is loaded. Shell completion offers package names, then files."""

    name = "model"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        names = [CompletionItem(name) for name in PACKAGED if name.startswith(incomplete)]
        return names or [CompletionItem(incomplete, type="file")]


class JsonObject(click.ParamType):
    """A JSON object, as a dictionary."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r} is not a JSON object such as {{"enable_thinking": false}}', param, ctx)
        return found


def model_options(command: Callable) -> Callable:
    """Adds --model, --dtype and --quantization."""
    model = click.option(
        "--model",
        type=ModelName(),
        default=DEFAULT_MODEL,
        show_default=True,
        help="Folder of safetensors, .gguf file, Hugging Face repository (owner/name), smollm2 or gemma-3-270m.",
    )
    return model(dtype_options(command))


def dtype_options(command: Callable) -> Callable:
    """Adds --dtype and --quantization."""
    dtype = click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on a CPU, bfloat16 elsewhere.")
    quantization = click.option(
        "--quantization",
        type=click.Choice(QUANTIZATIONS),
        help="How weights are held. Default: as stored; on a CPU in the fastest form.",
    )
    return dtype(quantization(command))


class MeshSizes(click.ParamType):
    """tensor=4,expert=2, as a dictionary."""

    name = "axis=size,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        parts = [part.partition("=") for part in value.split(",")]
        if not all(axis.strip() and size.strip().isdecimal() and int(size) > 0 for axis, _, size in parts):
            self.fail(f"{value!r} must be sizes of axes, integers above 0, such as tensor=4,expert=2", param, ctx)
        return {axis.strip(): int(size) for axis, _, size in parts}


def mesh_options(command: Callable) -> Callable:
    """Adds --tensor-parallel, and --mesh as sizes by axis in `mesh_sizes`."""
    tensor = click.option(
        "--tensor-parallel", type=click.IntRange(min=1), help="Divide the model over so many devices."
    )
    mesh = click.option(
        "--mesh",
        "mesh_sizes",
        type=MeshSizes(),
        help="Instead: sizes of axes, such as data=2,tensor=4.",
    )
    return tensor(mesh(command))


def process_options(command: Callable) -> Callable:
    """Adds --coordinator, --num-processes and --process-id."""
    coordinator = click.option(
        "--coordinator", metavar="HOST:PORT", help="Join other processes; auto: under Slurm, Open MPI or Kubernetes."
    )
    number = click.option("--num-processes", type=click.IntRange(min=1), help="Number of processes.")
    own = click.option("--process-id", type=click.IntRange(min=0), help="Number of this one, from 0.")
    return coordinator(number(own(command)))


class NamedAdapter(click.ParamType):
    """PATH or NAME=PATH, as (name, path); without a name it is the last part of the path."""

    name = "[name=]path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, path = value.rpartition("=")
        if not path or (equals and not name):
            self.fail(f"{value!r} must be PATH or NAME=PATH", param, ctx)
        return (name or path.rstrip("/").rpartition("/")[2] or path), path

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="dir")]


def adapter_options(command: Callable) -> Callable:
    """Adds --adapter, as (name, path) pairs in `adapters`, and --adapter-scale."""
    adapter = click.option(
        "--adapter",
        "adapters",
        type=NamedAdapter(),
        multiple=True,
        help="Folder or repository of a LoRA adapter. Of several, the first is used, or what a line of a batch names.",
    )
    scale = click.option("--adapter-scale", type=float, default=1.0, show_default=True, help="Multiplies the change.")
    return adapter(scale(command))


def window_options(command: Callable) -> Callable:
    """Adds --attention-window and --attention-sinks."""
    window = click.option(
        "--attention-window",
        type=click.IntRange(min=1),
        help="See only so many of the last tokens and the first ones, in texts of any length (StreamingLLM).",
    )
    sinks = click.option("--attention-sinks", type=click.IntRange(min=0), help="So many first ones.  [default: 4]")
    return window(sinks(command))


def cache_options(command: Callable) -> Callable:
    """Adds --cache, --kv-dtype and --max-model-len."""
    cache = click.option("--cache", type=click.Choice(CACHES), default=CACHES[0], show_default=True)
    kv_dtype = click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Quantize the pages of the KV cache.")
    longest = click.option(
        "--max-model-len",
        type=click.IntRange(min=1),
        help="Maximum tokens of a prompt and its answer. Default: the model's context.",
    )
    return cache(kv_dtype(longest(command)))
