"""The `jfa` command: write text, talk, and say what the machine can do."""

import contextlib
import importlib.metadata
import itertools
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import jax
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jfa
from jfa.device import probe
from jfa_models import batch
from jfa_models.checkpoints.families import FAMILIES
from jfa_models.checkpoints.reader import open_checkpoint
from jfa_models.decoding.language_model import LanguageModel, Session, compute_dtype
from jfa_models.decoding.options import CACHES, DTYPES, KV_DTYPES
from jfa_models.decoding.outputs import RequestOutput
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.pretrained import from_pretrained, shape_of
from jfa_models.engine import Engine

DEFAULT_MODEL = "smollm2"
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")


def main() -> None:
    """Runs the command line. What the user can mend is one line on stderr and exit status 2."""
    sys.exit(run(commands, "jfa"))


def run(group: click.Group, name: str) -> int:
    """The exit status of a click group: 2 and one line for every error that a user can mend."""
    try:
        status = group.main(prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        return 130
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        return 2
    except (ValueError, RuntimeError, OSError) as error:  # of JAX: no such platform, out of memory
        click.echo(f"{name}: {' '.join(str(error).split())}", err=True)
        return 2
    return status if isinstance(status, int) else 0  # what a command has given to Context.exit


def command_group(function: Callable) -> click.Group:
    """A command of commands, which prints its help when it is called alone."""

    @click.group(
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        invoke_without_command=True,
        help=function.__doc__,
    )
    @click.version_option(importlib.metadata.version("jfa"))
    @click.pass_context
    def command(context: click.Context) -> None:
        if context.invoked_subcommand is None:
            click.echo(context.get_help())

    return command


@command_group
def commands() -> None:
    """Decoders on JAX: AMD and NVIDIA GPUs, TPUs and CPUs."""


def cache_options(command: Callable) -> Callable:
    """--cache and --kv-dtype."""
    kv_dtype = click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Of quantized pages.")
    return click.option("--cache", type=click.Choice(CACHES), default=CACHES[0], show_default=True)(kv_dtype(command))


def model_options(command: Callable) -> Callable:
    """--model and --dtype."""
    dtype = click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on a CPU, bfloat16 elsewhere.")
    model = click.option(
        "--model",
        default=DEFAULT_MODEL,
        show_default=True,
        help="A folder of safetensors, a .gguf file, owner/name at Hugging Face, smollm2 or gemma-3-270m.",
    )
    return model(dtype(command))


def sampling_options(command: Callable) -> Callable:
    """The options that become SamplingParams; what is left out is as the model's authors advise.

    Where they advise no temperature it is greedy, unless an option is given that only a draw can honour.
    """
    for option in (
        click.option("--stop", multiple=True, help="End before this text; may be repeated."),
        click.option("--seed", type=int, help="Same seed, same text."),
        click.option("--repetition-penalty", type=float),
        click.option("--min-p", type=float),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--temperature", type=float, help="0 is greedy."),
        click.option("--max-tokens", type=int, default=128, show_default=True),
    ):
        command = option(command)
    return command


@commands.command()
@click.argument("text", required=False)
@click.option("--prompt", help="The prompt, where it is not given as an argument.")
@model_options
@cache_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of streaming.")
@click.option(
    "--batch-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Prompts, a JSON object a line."
)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Results of --batch-file, appended.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of a batch.")
@click.pass_context
def generate(
    context: click.Context,
    text: str | None,
    prompt: str | None,
    model: str,
    dtype: str | None,
    cache: str,
    kv_dtype: str | None,
    as_json: bool,
    batch_file: Path | None,
    output: Path | None,
    max_num_seqs: int,
    **sampling,
) -> None:
    """Continue TEXT, or each prompt of a --batch-file: the same command goes on after an interruption.

    Lines of a batch file look like {"prompt": "The capital of France is", "max_tokens": 20}: prompt (or
    prompt_token_ids), and as they like an id and fields of SamplingParams, which otherwise are those of the options.
    """
    if batch_file is not None or output is not None:
        _batch(context, batch_file, output, max_num_seqs)
        return
    if context.get_parameter_source("max_num_seqs") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("--max-num-seqs is for a --batch-file: a single prompt is a row of its own")
    given = [one for one in (text, prompt) if one is not None]
    if len(given) != 1:
        raise click.UsageError('give one prompt: jfa generate "The capital of France is", or --prompt TEXT')
    language_model = _load(model, dtype=dtype, cache=cache, kv_dtype=kv_dtype)
    params = _sampling_params(language_model, sampling)
    if as_json:
        click.echo(json.dumps(_timed(language_model, given[0], params), ensure_ascii=False))
    else:
        _print_growth(language_model.stream(given[0], params), after=click.style(given[0], dim=True))


def _batch(context: click.Context, batch_file: Path | None, output: Path | None, max_num_seqs: int) -> None:
    """generate with --batch-file."""
    options = dict(context.params)
    if batch_file is None or output is None:
        raise click.UsageError("--batch-file and --output go together")
    for name in ("text", "prompt", "as_json", "cache"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE and options[name] != "paged":
            raise click.UsageError(f"--{name.removeprefix('as_')} is not for a --batch-file, which runs over pages")
    lines = batch.read(batch_file)
    left = batch.done(output, lines)
    lines = [line for line in lines if line.number not in left]
    if not lines:
        click.echo(f"all {len(left)} results are in {output}", err=True)
        return
    language_model = _load(options["model"], dtype=options["dtype"])
    params = _sampling_params(language_model, {name: options[name] for name in SAMPLING_OPTIONS})
    engine = Engine(language_model, max_num_seqs=max_num_seqs, kv_dtype=options["kv_dtype"])
    console, errors, written = Console(stderr=True), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("generating", total=len(lines) + len(left), completed=len(left))
            for result in batch.run(engine, lines, output, params):
                written += 1
                errors += "error" in result
                bar.advance(task)
    except KeyboardInterrupt:
        where = f"{len(left) + written} of {len(left) + len(lines)} results are in {output}"
        click.echo(f"\ninterrupted: {where}; the same command writes the others", err=True)
        context.exit(130)
    refused = f", {errors} of them errors" if errors else ""
    click.echo(f"{written} results written to {output}{refused}", err=True)


@commands.command()
@model_options
@cache_options
@sampling_options
@click.option("--system", help="What the model is told before the first turn.")
def chat(model: str, dtype: str | None, cache: str, kv_dtype: str | None, system: str | None, **sampling) -> None:
    """Talk with a model. /reset forgets the conversation; /exit or Ctrl-D ends it."""
    language_model = _load(model, dtype=dtype, cache=cache, kv_dtype=kv_dtype)
    tokenizer = language_model.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise click.UsageError(f"{model} has no chat template, so it was not made for conversations: use jfa generate")
    params = _sampling_params(language_model, sampling)
    opening = [{"role": "system", "content": system}] if system else []
    messages, session = list(opening), Session()
    # who asks from a pipe gets the answers alone
    you, answers = (click.style(f"{who}> ", bold=True) if sys.stdin.isatty() else "" for who in ("you", "model"))
    while True:
        try:
            said = click.prompt(you, prompt_suffix="").strip()
        except click.exceptions.Abort:
            said = "/exit"
            click.echo(nl=bool(you))
        if said == "/exit":
            return
        if not said:
            continue
        if said == "/reset":
            messages, session = list(opening), Session()
            continue
        turn = [*messages, {"role": "user", "content": said}]
        try:
            prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(turn), add_special_tokens=False)
            results = language_model.stream(prompt_ids, params, session=session)
        except ValueError as error:
            click.echo(f"jfa: {error}. /reset starts anew.", err=True)
            continue
        answer = _print_growth(results, after=answers)
        messages = [*turn, {"role": "assistant", "content": answer}]


@commands.command()
@model_options
def info(model: str, dtype: str | None) -> None:
    """Versions, the device, which backend serves each op and why the others do not, and a model's size."""
    console = Console()
    device = probe()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    packages = ("jfa", "jax", "jaxlib", "flax", "jax-rocm7-plugin", "jax-rocm10-plugin", "jax-cuda13-plugin", "libtpu")
    table.add_row("versions", ", ".join(f"{name} {version}" for name in packages if (version := _version(name))))
    table.add_row("device", escape(", ".join(dict.fromkeys((device.platform, device.arch))) + _details(device)))
    said = None
    for op in jfa.explain(device):
        table.add_row(op.op, escape(f"{op.backend} ({op.tiles})"))
        for backend, reason in () if op.refused == said else op.refused:
            table.add_row("", escape(f"not {backend}: {reason}"))
        said = op.refused
    try:
        sizes = list(_sizes(model, compute_dtype(dtype)))
    except ValueError as error:
        if model != DEFAULT_MODEL:
            raise
        # nobody asked for this model by name: the rest is worth printing without it
        sizes = [("model", str(error))]
    for name, text in sizes:
        table.add_row(name, escape(text))
    console.print(table)


def _sizes(model: str, dtype: np.dtype) -> Iterator[tuple[str, str]]:
    if (config := shape_of(model)) is not None:
        name, stored = model, "without weights"
    else:
        checkpoint = open_checkpoint(model)
        config, name, stored = checkpoint.config, checkpoint.path.stem, f"stored as {checkpoint.stored_dtype}"
    users = FAMILIES[config.architecture].users
    yield "model", f"{name} ({users}): {config.num_params / 1e6:,.1f} M parameters, {stored}"
    yield "", f"{config.num_params * dtype.itemsize / 1e6:,.0f} MB as {dtype.name}"
    whole = config.cache_elements(config.context_length) * dtype.itemsize
    context = f"{whole / 1e6:,.0f} MB for its context of {config.context_length:,} tokens"
    yield "cache", f"{config.cache_elements_per_token * dtype.itemsize:,} bytes per token, {context}"
    windows = [window for i in range(config.num_layers) if (window := config.window(i)) is not None]
    if windows:
        yield "", f"{len(windows)} of {config.num_layers} layers see {windows[0]:,} tokens and keep no more"


def _load(model: str, **options) -> LanguageModel:
    """Loads with a line on the terminal meanwhile; compiled programs are kept for the next start."""
    if not jax.config.jax_compilation_cache_dir:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jfa" / "xla"
        with contextlib.suppress(OSError):  # where it cannot be written, every start compiles
            cache.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(cache))
    with Console(stderr=True).status(f"loading {escape(model)}"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        loaded = from_pretrained(model, **options)
    for warning in said:
        click.echo(f"jfa: {warning.message}", err=True)
    return loaded


def _sampling_params(model: LanguageModel, given: dict) -> SamplingParams:
    given = {name: value for name, value in given.items() if value is not None}
    if model.defaults.temperature is None and not given.keys() & {"top_k", "top_p", "min_p", "seed"}:
        given.setdefault("temperature", 0.0)
    return model.default_params(**given)


def _print_growth(results: Iterator[RequestOutput], *, after: str) -> str:
    """Prints a text as it grows, after another that stands before it; returns it."""
    # the spinner wipes its line: nothing of ours may stand there yet
    with Console(stderr=True).status("reading the prompt (the first time: compiling for this machine)"):
        first = next(results)
    click.echo(after, nl=False)
    shown = ""
    for result in itertools.chain([first], results):
        text = result.outputs[0].text
        click.echo(text[len(shown) :], nl=False)
        shown = text
    click.echo()
    return shown


def _timed(model: LanguageModel, prompt: str, params: SamplingParams) -> dict:
    """One prompt with its times, after two tokens that compiled every step of it."""
    for _ in itertools.islice(model.stream(prompt, params), 2):
        pass
    start = time.perf_counter()
    results = model.stream(prompt, params)
    result = next(results)
    first = time.perf_counter()
    *_, result = result, *results
    end = time.perf_counter()
    output = result.outputs[0]
    decoded = len(output.token_ids) - 1
    return {
        "prompt": prompt,
        "prompt_token_ids": list(result.prompt_token_ids),
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "prefill_ms": round((first - start) * 1e3, 3),
        "decode_ms": round((end - first) * 1e3, 3),
        "tokens_per_s": round(decoded / (end - first), 3) if decoded else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _details(device: jfa.DeviceInfo) -> str:
    if not device.lds_bytes:
        return ""
    return f", {device.compute_units} compute units, {device.lds_bytes // 1024} KiB of LDS per workgroup"
