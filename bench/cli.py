"""The `jfa-bench` command."""

import math
import sys
from collections.abc import Callable

import click
import jax

from jfa_models.cli import command_group, model_options, run
from jfa_models.generate import KV_DTYPES, from_pretrained

from . import accuracy, attention, compile, memory, models, paged, prove, record, report, throughput, tune


def main() -> None:
    """Runs the command line; exit status 2 and one line for what the user can mend."""
    sys.exit(run(commands, "jfa-bench"))


@command_group
def commands() -> None:
    """Measures jfa on this machine."""


class Counts(click.ParamType):
    """Whole numbers above 0, separated by commas."""

    name = "N,N,..."

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of whole numbers above 0, such as 1,8", param, ctx)
        return tuple(int(part) for part in parts)


def measurement_options(command: Callable) -> Callable:
    """-o and --samples."""
    output = click.option("-o", "output", type=click.Choice(record.FORMATS), default="md", show_default=True)
    samples = click.option("--samples", type=click.IntRange(min=1), default=15, show_default=True)
    return output(samples(command))


@commands.command("attention")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--length", type=Counts(), default="512,2048", show_default=True, help="Of queries and keys.")
@click.option("--heads", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1), default=None, help="As many as --heads.")
@click.option("--head-dim", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--implementation", type=compile.Names("implementation", attention.IMPLEMENTATIONS), default=None)
@measurement_options
def attention_command(batch, length, heads, kv_heads, head_dim, dtype, causal, implementation, samples, output) -> None:
    """The op beside the plain formula and jax.nn's, forward and with its gradient."""
    if implementation is None:  # interpreted kernels are no measurement
        implementation = [n for n in attention.IMPLEMENTATIONS if n != "triton" or jax.default_backend() == "gpu"]
    if heads % (kv_heads or heads):
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")
    records = attention.measure(
        batch=batch,
        lengths=length,
        heads=(heads, kv_heads or heads),
        head_dim=head_dim,
        dtype=dtype,
        causal=causal,
        implementations=implementation,
        samples=samples,
    )
    click.echo(record.render(list(records), output, attention.COLUMNS))


@commands.command("accuracy")
@click.option("--kv-dtype", type=compile.Names("kv dtype", KV_DTYPES), default="all", show_default=True)
@click.option("--text", type=click.File(), required=True, help="To be surprised by, such as LICENSE.")
@click.option("--tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of the text.")
@click.option(
    "--new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Greedy ones, per prompt."
)
@model_options
@click.option("-o", "output", type=click.Choice(record.FORMATS), default="md", show_default=True)
def accuracy_command(kv_dtype, text, tokens, new_tokens, model, dtype, output) -> None:
    """What quantized pages cost a model: perplexity, and what it writes."""
    language_models = {
        name or "float": from_pretrained(model, dtype=dtype, cache="paged", kv_dtype=name) for name in (None, *kv_dtype)
    }
    records = accuracy.measure(language_models, text.read(), tokens=tokens, new_tokens=new_tokens)
    click.echo(record.render(list(records), output, accuracy.COLUMNS))


@commands.command("memory")
@click.option("--data", type=compile.Names("data set", tuple(memory.DATA_SETS)), default="all", show_default=True)
@click.option("--page-size", type=Counts(), default="16", show_default=True)
@click.option("--steps", type=click.IntRange(min=10), default=500, show_default=True)
@click.option("-o", "output", type=click.Choice(record.FORMATS), default="md", show_default=True)
def memory_command(data, page_size, steps, output) -> None:
    """What pages save, by the allocator's books on simulated requests."""
    records = list(memory.measure(data_sets=data, page_sizes=page_size, steps=steps))
    click.echo(record.render(records, output, memory.COLUMNS))


@commands.command("paged")
@click.option("--batch", type=Counts(), default="1,8", show_default=True)
@click.option("--context", type=Counts(), default="2048", show_default=True, help="Tokens of each row.")
@click.option("--page-size", type=Counts(), default="16", show_default=True)
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
    click.echo(record.render(list(records), output, paged.COLUMNS))


@commands.command()
@click.option("--batch", type=Counts(), default="1", show_default=True)
@click.option("--prompt", type=Counts(), default="512", show_default=True, help="Tokens of the prompt.")
@model_options
@measurement_options
def prefill(batch, prompt, model, dtype, samples, output) -> None:
    """A prompt's way into the cache, beside its matrix products alone."""
    language_model = from_pretrained(model, dtype=dtype)
    records = list(models.prefill(language_model, model, batches=batch, prompts=prompt, samples=samples))
    click.echo(record.render(records, output, models.COLUMNS))


@commands.command()
@click.option("--batch", type=Counts(), default="1,8", show_default=True)
@click.option("--prompt", type=Counts(), default="128", show_default=True, help="Tokens in the cache before.")
@model_options
@measurement_options
def decode(batch, prompt, model, dtype, samples, output) -> None:
    """One token after another, beside the matrix products of a step alone."""
    language_model = from_pretrained(model, dtype=dtype)
    records = list(models.decode(language_model, model, batches=batch, prompts=prompt, samples=samples))
    click.echo(record.render(records, output, models.COLUMNS))


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
@click.option("-o", "output", type=click.Choice(record.FORMATS), default="md", show_default=True)
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
    click.echo(record.render(list(records), output, throughput.COLUMNS))


commands.add_command(compile.command)
commands.add_command(prove.command)
commands.add_command(report.command)
commands.add_command(tune.command)
