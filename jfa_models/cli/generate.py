"""`jfa generate`: continues a prompt, or each prompt of a file."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import click

from jfa_models.cli.base import (
    JsonObject,
    adapter_options,
    cache_options,
    mesh_options,
    model_options,
    process_options,
    window_options,
)
from jfa_models.cli.sampling import check_sampling, read_forms, sampling_options
from jfa_models.decoding.speculation import SpeculativeConfig

# Options for a single prompt, which a batch does not support.
SINGLE_PROMPT_OPTIONS = {"text": "TEXT", "prompt": "--prompt", "as_json": "--json", "cache": "--cache"}


@click.command()
@click.argument("text", required=False)
@click.option("--prompt", help="Prompt, instead of the argument TEXT.")
@model_options
@mesh_options
@process_options
@adapter_options
@cache_options
@window_options
@sampling_options
@click.option(
    "--sparse-prefill",
    metavar="PATTERN:FRACTION",
    help="Compute a part of a long prompt's scores: vertical-slash:0.3, top-k:0.3 or window:0.3.",
)
@click.option(
    "--speculative-config",
    type=JsonObject(),
    help="""How to speculate, such as '{"method": "ngram"}'; see the guide.""",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of streaming text.")
@click.option(
    "--batch-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Prompts, as JSON Lines."
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Results of --batch-file, as JSON Lines."
)
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=32, show_default=True, help="Maximum batch size.")
@click.pass_context
def generate(
    context: click.Context,
    text: str | None,
    prompt: str | None,
    model: str,
    dtype: str | None,
    quantization: str | None,
    tensor_parallel: int | None,
    mesh_sizes: dict[str, int] | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    adapters: tuple[tuple[str, str], ...],
    adapter_scale: float,
    cache: str,
    kv_dtype: str | None,
    max_model_len: int | None,
    attention_window: int | None,
    attention_sinks: int | None,
    sparse_prefill: str | None,
    speculative_config: dict[str, Any] | None,
    as_json: bool,
    batch_file: Path | None,
    output: Path | None,
    max_num_seqs: int,
    **sampling,
) -> None:
    """Continue TEXT, or each prompt of a --batch-file.

    Each line of a batch file is a JSON object like {"prompt": "The capital of France is", "max_tokens": 20}, with a
    prompt or prompt_token_ids, and optionally an id, the name of an adapter and fields of SamplingParams, which
    override the options.
    After an interruption, the same command resumes the batch. With --coordinator, several processes run one batch
    over all their devices, each replica (--mesh data=...) its share, and the first writes the results.
    """

    def is_given(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    sampling = read_forms(sampling)
    check_sampling(sampling)
    speculation = None if speculative_config is None else SpeculativeConfig.of(speculative_config)
    loading: dict[str, Any] = dict(
        model=model,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel=tensor_parallel,
        mesh_sizes=mesh_sizes,
        adapters=adapters,
        adapter_scale=adapter_scale,
        context_length=max_model_len,
        attention_window=attention_window,
        attention_sinks=attention_sinks,
    )
    for name in ("num_processes", "process_id"):
        if coordinator is None and is_given(name):
            raise click.UsageError(f"--{name.replace('_', '-')} needs --coordinator")
    if batch_file is not None or output is not None:
        if batch_file is None or output is None:
            raise click.UsageError("--batch-file and --output must be given together")
        for name, option in SINGLE_PROMPT_OPTIONS.items():
            if is_given(name) and context.params[name] != "paged":
                raise click.UsageError(f"{option} cannot be combined with --batch-file, which uses a paged cache")
        if sparse_prefill is not None:
            raise click.UsageError(
                "--sparse-prefill cannot be combined with --batch-file, whose engine prefills prompts in parts"
            )
        run = functools.partial(_batch, batch_file, output, max_num_seqs, kv_dtype, speculation, sampling, loading)
        if coordinator is not None:
            given = {name: value for name, value in context.params.items() if name not in ("process_id", "output")}
            from jfa_models.cli import together

            given["the content of the batch file"] = hashlib.sha256(batch_file.read_bytes()).hexdigest()
            with together.joined(coordinator, num_processes, process_id, given) as first:
                status = run(first)
            context.exit(status)
        context.exit(run())
    if coordinator is not None:
        raise click.UsageError("--coordinator needs --batch-file: several processes run batches")
    if is_given("max_num_seqs"):
        raise click.UsageError("--max-num-seqs needs --batch-file: it has no effect on a single prompt")
    given = [one for one in (text, prompt) if one is not None]
    if speculation is not None and sparse_prefill is not None:
        raise click.UsageError("--sparse-prefill cannot be combined with --speculative-config, which uses an engine")
    if speculation is not None and is_given("cache") and cache != "paged":
        raise click.UsageError("--speculative-config needs a paged cache: leave out --cache")
    if len(given) != 1:
        raise click.UsageError('pass one prompt: jfa generate "The capital of France is", or --prompt TEXT')

    from jfa_models.cli import running

    loading |= dict(cache="paged" if speculation else cache, kv_dtype=kv_dtype, sparse_prefill=sparse_prefill)
    language_model = running.load(**loading)
    params, adapter = running.sampling_params(language_model, sampling), language_model.adapters.first
    stream = language_model.stream
    if speculation is not None:
        from jfa_models.engine import Engine

        stream = Engine(language_model, max_num_seqs=1, kv_dtype=kv_dtype, speculative_config=speculation).stream
    if as_json:
        click.echo(json.dumps(running.timed(stream, given[0], params, adapter), ensure_ascii=False))
    else:
        running.print_growth(stream(given[0], params, adapter=adapter), after=click.style(given[0], dim=True))


def _batch(
    batch_file: Path,
    output: Path,
    max_num_seqs: int,
    kv_dtype: str | None,
    speculation: SpeculativeConfig | None,
    sampling: dict[str, Any],
    loading: dict[str, Any],
    first: str | None = None,
) -> int:
    """Runs a batch file and returns the exit status.

    loading: the arguments of running.load. first: the address of the first process, if there are several.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jfa_models import batch, processes
    from jfa_models.cli import running, together
    from jfa_models.engine import engine_of
    from jfa_models.engine.shares import Shares

    lines = batch.read(batch_file)
    done = processes.of_first(lambda: sorted(batch.done(output, lines)))
    lines = [line for line in lines if line.number not in done]
    if not lines:
        if processes.is_first():
            click.echo(f"all {len(done)} results are already in {output}", err=True)
        return 0
    has_replicas = (loading["mesh_sizes"] or {}).get("data", 1) > 1
    shares = Shares(first, together.leave) if first is not None and has_replicas else None
    language_model = running.load(**loading, replicas=True)
    params = running.sampling_params(language_model, sampling)
    engine = engine_of(language_model, max_num_seqs=max_num_seqs, kv_dtype=kv_dtype, speculative_config=speculation)
    console, errors, written = Console(stderr=True, quiet=not processes.is_first()), 0, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("generating", total=len(lines) + len(done), completed=len(done))
            for result in batch.run(engine, lines, output, params, language_model.adapters.first, shares):
                written += 1
                errors += "error" in result
                bar.advance(task)
    except KeyboardInterrupt:
        where = f"{len(done) + written} of {len(done) + len(lines)} results are in {output}"
        click.echo(f"\ninterrupted: {where}; run the same command again to continue", err=True)
        return 130
    refused = f", of which {errors} are errors" if errors else ""
    if processes.is_first():
        click.echo(f"{written} results written to {output}{refused}", err=True)
    return 0
