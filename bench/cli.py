"""The `jfa-bench` command."""

import itertools
import math
import sys

import click

from jfa.device import probe
from jfa_models.cli import command_group, model_options, run
from jfa_models.decoding.options import KV_DTYPES
from jfa_models.decoding.pretrained import from_pretrained

from . import options, suite
from .measure import accuracy, attention, decode, memory, paged, peers, prefill, throughput
from .proof import compile, prove, tune
from .records import compare, plot, report
from .records.output import measurement_options, output_options


def main() -> None:
    """Runs the command line; exit status 2 and one line for what the user can mend."""
    sys.exit(run(commands, "jfa-bench"))


DTYPE_NAMES = compile.Names("dtype", ("float16", "bfloat16", "float32"))


@command_group
def commands() -> None:
    """Measures jfa on this machine."""


SHAPES = ("seq_lens", "batch", "heads", "kv_heads", "head_dim", "causal")  # what a grid decides


@commands.command("attention")
@click.option(
    "--seq-lens", type=options.Counts(), default="256:4096:64", show_default=True, help="Of queries and keys."
)
@click.option("--batch", type=options.Counts(), default="1", show_default=True)
@click.option("--heads", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1), default=None, help="As many as --heads.")
@click.option("--head-dim", type=options.Counts(), default="128", show_default=True)
@click.option("--dtype", type=DTYPE_NAMES, default="float16", show_default=True)
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--grid", type=click.Choice(("fa2",)), help="The shapes of the FlashAttention papers instead.")
@click.option(
    "--direction", type=compile.Names("direction", peers.DIRECTIONS), default="forward,backward", show_default=True
)
@click.option(
    "--implementation",
    type=compile.Names("implementation", tuple(peers.PEERS)),
    default=None,
    help="Default: those that are installed and made for this platform.",
)
@click.option("--device-time", is_flag=True, help="Add the profiler's time on the device.")
@measurement_options
@click.pass_context
def attention_command(
    context,
    seq_lens,
    batch,
    heads,
    kv_heads,
    head_dim,
    dtype,
    causal,
    grid,
    direction,
    implementation,
    device_time,
    samples,
    output,
) -> None:
    """The op beside the plain formula and what others have; right before it is fast."""
    if heads % (kv_heads or heads):
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")
    given = [name for name in SHAPES if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if grid and given:
        raise click.UsageError(f"--grid has shapes of its own: leave out --{given[0].replace('_', '-')}")
    shapes = itertools.product(dtype, head_dim, batch, seq_lens)
    cases = [
        attention.Case(
            batch=b, length=n, heads=heads, kv_heads=kv_heads or heads, head_dim=d, dtype=name, causal=causal
        )
        for name, d, b, n in shapes
    ]
    if grid:
        cases = [case for name in dtype for case in attention.fa_grid(name)]
    if implementation is None:
        implementation = peers.usual(probe().platform)
    records = attention.measure(
        cases, directions=direction, implementations=implementation, samples=samples, device_time=device_time
    )
    total = len(cases) * len(direction) * len(implementation)
    output.present(records, attention.COLUMNS, total=total, doing="attention", table=attention.table)


@commands.command("accuracy")
@click.option("--kv-dtype", type=compile.Names("kv dtype", KV_DTYPES), default="all", show_default=True)
@click.option("--text", type=click.File(), required=True, help="To be surprised by, such as LICENSE.")
@click.option("--tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of the text.")
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Greedy ones, per prompt."
)
@model_options
@output_options
def accuracy_command(kv_dtype, text, tokens, new_tokens, model, dtype, output) -> None:
    """What quantized pages cost a model: perplexity, and what it writes."""
    language_models = {
        name or "float": from_pretrained(model, dtype=dtype, cache="paged", kv_dtype=name) for name in (None, *kv_dtype)
    }
    records = accuracy.measure(language_models, text.read(), tokens=tokens, new_tokens=new_tokens)
    output.present(records, accuracy.COLUMNS, total=len(language_models), doing="accuracy")


@commands.command("memory")
@click.option("--data", type=compile.Names("data set", tuple(memory.DATA_SETS)), default="all", show_default=True)
@click.option("--page-size", type=options.Counts(), default="16", show_default=True)
@click.option("--steps", type=click.IntRange(min=10), default=500, show_default=True)
@output_options
def memory_command(data, page_size, steps, output) -> None:
    """What pages save, by the allocator's books on simulated requests."""
    records = memory.measure(data_sets=data, page_sizes=page_size, steps=steps)
    output.present(records, memory.COLUMNS, total=len(data) * len(page_size) * len(memory.WAYS), doing="memory")


@commands.command("paged")
@click.option("--batch", type=options.Counts(), default="1,8", show_default=True)
@click.option("--context", type=options.Counts(), default="2048", show_default=True, help="Tokens of each row.")
@click.option("--page-size", type=options.Counts(), default="16", show_default=True)
@click.option("--kv-dtype", type=compile.Names("kv dtype", paged.KV_DTYPES), default="same,int8", show_default=True)
@click.option("--heads", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--head-dim", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option("--implementation", type=click.Choice(("xla", "triton", "reference")), help="Default: jfa's choice.")
@measurement_options
def paged_command(
    batch, context, page_size, kv_dtype, heads, kv_heads, head_dim, dtype, implementation, samples, output
) -> None:
    """Decoding over pages, beside the contiguous cache and a copy of the same bytes."""
    if heads % kv_heads:
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")
    records = paged.measure(
        batches=batch,
        contexts=context,
        page_sizes=page_size,
        kv_dtypes=kv_dtype,
        heads=(heads, kv_heads),
        head_dim=head_dim,
        dtype=dtype,
        implementation=implementation,
        samples=samples,
    )
    total = len(batch) * len(context) * (2 + len(page_size) * len(kv_dtype))
    output.present(records, paged.COLUMNS, total=total, doing="paged")


@commands.command("throughput")
@click.option("--num-prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--lengths", type=click.Choice(throughput.LENGTHS), default="skewed", show_default=True)
@click.option("--input-len", type=click.IntRange(min=1), default=64, show_default=True, help="The longest prompt.")
@click.option("--output-len", type=click.IntRange(min=1), default=256, show_default=True, help="The longest answer.")
@click.option(
    "--request-rate", type=click.FloatRange(min=0, min_open=True), default=math.inf, help="Per second; all at once."
)
@click.option("--max-concurrency", type=click.IntRange(min=1), help="Requests in the engine at a time.")
@click.option("--max-num-seqs", type=click.IntRange(min=1), default=32, show_default=True, help="Rows of a step.")
@click.option("--n", type=click.IntRange(min=1), default=1, show_default=True, help="Samples of each prompt.")
@click.option("--beam-width", type=click.IntRange(1, 10), help="Search instead of sampling.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Of quantized pages.")
@click.option("--page-size", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--implementation", type=compile.Names("implementation", throughput.IMPLEMENTATIONS), default="static,engine"
)
@model_options
@output_options
def throughput_command(
    num_prompts,
    lengths,
    input_len,
    output_len,
    request_rate,
    max_concurrency,
    max_num_seqs,
    n,
    beam_width,
    kv_dtype,
    page_size,
    seed,
    implementation,
    model,
    dtype,
    output,
) -> None:
    """Requests of all lengths through the engine, beside batches that wait for their longest row."""
    if n > 1 and beam_width is not None:
        raise click.UsageError("--n and --beam-width exclude each other")
    language_model = from_pretrained(model, dtype=dtype)
    arrivals = throughput.trace(
        num_prompts=num_prompts,
        lengths=lengths,
        input_len=input_len,
        output_len=output_len,
        request_rate=request_rate,
        vocab_size=language_model.config.vocab_size,
        seed=seed,
    )
    case = {"model": model, "dtype": language_model.dtype.name, "num_prompts": num_prompts, "lengths": lengths}
    case |= {"input_len": input_len, "output_len": output_len, "max_num_seqs": max_num_seqs, "seed": seed}
    case |= {"request_rate": request_rate if math.isfinite(request_rate) else None, "kv_dtype": kv_dtype}
    records = throughput.measure(
        language_model,
        arrivals,
        case=case | {"max_concurrency": max_concurrency, "page_size": page_size, "n": n, "beam_width": beam_width},
        implementations=implementation,
        max_num_seqs=max_num_seqs,
        max_concurrency=max_concurrency,
        n=n,
        beam_width=beam_width,
        engine_options={"kv_dtype": kv_dtype, "page_size": page_size},
    )
    output.present(records, throughput.COLUMNS, total=len(implementation), doing="throughput")


commands.add_command(compare.command)
commands.add_command(compile.command)
commands.add_command(decode.command)
commands.add_command(plot.command)
commands.add_command(prefill.command)
commands.add_command(prove.command)
commands.add_command(report.command)
commands.add_command(suite.command)
commands.add_command(tune.command)
