"""The benchmark commands."""

import functools
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from jfa_models.cli.base import JsonObject, dtype_options, model_options
from jfa_models.decoding.options import KV_DTYPES, QUANTIZATIONS
from jfa_models.decoding.speculation import SpeculativeConfig
from jfa_models.rates import CARDS

from .. import configs, names
from . import options

SHAPES = ("seq_lens", "batch", "heads", "kv_heads", "head_dim", "causal")  # set by a grid


@click.command("attention")
@click.option(
    "--seq-lens", type=options.Counts(), default="256:4096:64", show_default=True, help="Number of queries and keys."
)
@click.option("--batch", type=options.Counts(), default="1", show_default=True)
@click.option("--heads", type=options.COUNT, default=32, show_default=True)
@click.option("--kv-heads", type=options.COUNT, default=None, help="Default: the same as --heads.")
@click.option("--head-dim", type=options.Counts(), default="128", show_default=True)
@click.option(
    "--dtype", type=options.Names("dtype", ("float16", "bfloat16", "float32")), default="float16", show_default=True
)
@click.option("--causal/--no-causal", default=True, show_default=True)
@click.option("--grid", type=click.Choice(("fa2",)), help="Use the shapes of the FlashAttention papers.")
@click.option(
    "--direction", type=options.Names("direction", names.MEASURED), default="forward,backward", show_default=True
)
@click.option(
    "--implementation",
    type=options.Names("implementation", names.PEERS),
    default=None,
    help="Default: all that are installed and support this platform.",
)
@click.option("--device-time", is_flag=True, help="Also measure the time on the device with the profiler.")
@click.option(
    "--torch-python",
    type=click.Path(exists=True, dir_okay=False),
    help="A Python that has torch, if this one has not: torch runs there, and times itself.",
)
@options.measurement_options
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
    torch_python,
    samples,
    output,
) -> None:
    """Benchmark the attention op.

    Compares it with the plain formula and other libraries; results are checked before timing.
    """
    if heads % (kv_heads or heads):
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")
    given = [name for name in SHAPES if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if grid and given:
        raise click.UsageError(f"--grid sets the shapes: remove --{given[0].replace('_', '-')}")

    from jfa.device import probe

    from ..measure import attention, peers

    shapes = itertools.product(dtype, head_dim, batch, seq_lens)
    cases = [
        attention.Case(
            batch=b, length=n, heads=heads, kv_heads=kv_heads or heads, head_dim=d, dtype=name, causal=causal
        )
        for name, d, b, n in shapes
    ]
    if grid:
        cases = [case for name in dtype for case in attention.fa_grid(name)]
    pythons = {"torch": torch_python} if torch_python else {}
    if implementation is None:
        implementation = tuple(dict.fromkeys((*peers.usual(probe().platform), *pythons)))
    elif torch_python and "torch" not in implementation:
        raise click.UsageError("--torch-python is for torch: add it to --implementation")
    records = attention.measure(
        cases,
        directions=direction,
        implementations=implementation,
        samples=samples,
        device_time=device_time,
        pythons=pythons,
    )
    total = len(cases) * len(direction) * len(implementation)
    output.present(records, "attention", total=total)


@click.command("sparse")
@click.option("--seq-len", type=options.COUNT, default=8192, show_default=True, help="Number of queries and keys.")
@click.option(
    "--density",
    type=options.Numbers("a list of numbers above 0, up to 1, such as 1,0.5,0.1", above=0, most=1),
    default="1,0.5,0.25,0.1,0.05",
    show_default=True,
    help="Of the tiles that a causal mask leaves.",
)
@click.option("--mask", type=options.Names("mask", names.SPARSE_MASKS), default="all", show_default=True)
@click.option("--block", type=options.COUNT, default=128, show_default=True, help="Queries and keys of a tile.")
@click.option("--batch", type=options.COUNT, default=1, show_default=True)
@click.option("--heads", type=options.COUNT, default=8, show_default=True)
@click.option("--kv-heads", type=options.COUNT, default=None, help="Default: the same as --heads.")
@click.option("--head-dim", type=options.COUNT, default=64, show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option(
    "--direction", type=options.Names("direction", names.MEASURED), default="forward,backward", show_default=True
)
@click.option(
    "--implementation",
    type=options.Names("implementation", names.SPARSE),
    default=None,
    help="Default: all that are installed and support this platform.",
)
@options.measurement_options
def sparse_command(
    seq_len,
    density,
    mask,
    block,
    batch,
    heads,
    kv_heads,
    head_dim,
    dtype,
    direction,
    implementation,
    samples,
    output,
) -> None:
    """Benchmark block-sparse attention over density.

    Compares it with dense causal attention; results are checked before timing.
    """
    if heads % (kv_heads or heads):
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")

    from jfa.device import probe

    from ..measure import attention, peers, sparse

    shape: dict = dict(length=seq_len, heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim)
    if implementation is None:
        implementation = peers.usual(probe().platform, peers.SPARSE)
    records = sparse.measure(
        attention.Case(batch=batch, dtype=dtype, causal=True, **shape),
        kinds=mask,
        densities=density,
        block=block,
        directions=direction,
        implementations=implementation,
        samples=samples,
    )
    has_dense = sparse.DENSE in implementation
    of_each = has_dense + len(density) * (len(implementation) - has_dense)
    output.present(records, "sparse", total=len(mask) * len(direction) * of_each)


@click.command("linear")
@click.option("--rule", type=options.Names("rule", names.RULES), default="all", show_default=True)
@click.option("--seq-lens", type=options.Counts(), default="4096,8192,16384,32768,65536", show_default=True)
@click.option(
    "--max-quadratic",
    type=click.IntRange(min=0),
    default=16384,
    show_default=True,
    help="Longest length of attention and of the quadratic form.",
)
@click.option("--batch", type=options.COUNT, default=1, show_default=True)
@click.option("--heads", type=options.COUNT, default=8, show_default=True, help="Of values.")
@click.option("--key-heads", type=options.COUNT, default=None, help="Default: the same as --heads.")
@click.option("--key-dim", type=options.COUNT, default=64, show_default=True)
@click.option("--value-dim", type=options.COUNT, default=64, show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option("--direction", type=options.Names("direction", names.LINEAR_MEASURED), default="all", show_default=True)
@click.option(
    "--implementation",
    type=options.Names("implementation", names.LINEAR),
    default=None,
    help="Default: all that are installed and support this platform, without the reference.",
)
@options.measurement_options
def linear_command(
    rule,
    seq_lens,
    max_quadratic,
    batch,
    heads,
    key_heads,
    key_dim,
    value_dim,
    dtype,
    direction,
    implementation,
    samples,
    output,
) -> None:
    """Benchmark linear attention over length, and a step of decoding.

    Compares it with attention and the quadratic form; results are checked
    before timing.
    """
    if heads % (key_heads or heads):
        raise click.BadParameter(f"{key_heads} key heads do not divide {heads} value heads", param_hint="--key-heads")

    from jfa.device import probe

    from ..measure import linear, peers

    shape: dict = dict(batch=batch, heads=heads, key_heads=key_heads or heads, key_dim=key_dim, value_dim=value_dim)
    if implementation is None:
        found = peers.usual(probe().platform, peers.LINEAR)
        implementation = tuple(name for name in found if name != "reference")
    plan = linear.planned(
        [linear.Case(rule=name, length=n, dtype=dtype, **shape) for name in rule for n in seq_lens],
        directions=direction,
        implementations=implementation,
        max_quadratic=max_quadratic,
    )
    output.present(linear.measure(plan, samples=samples), "linear", total=sum(map(len, plan.values())))


@click.command("accuracy")
@click.option("--kv-dtype", type=options.Names("kv dtype", KV_DTYPES), help="Kinds of pages; default: all.")
@click.option("--weights", type=options.Names("quantization", QUANTIZATIONS), help="Kinds of weights instead of pages.")
@click.option("--text", type=click.File(), required=True, help="Text for the perplexity, such as LICENSE.")
@click.option("--tokens", type=options.COUNT, default=1024, show_default=True, help="Number of tokens of the text.")
@click.option("--new-tokens", type=options.COUNT, default=64, show_default=True, help="Greedy tokens per prompt.")
@model_options
@options.output_options
def accuracy_command(kv_dtype, weights, text, tokens, new_tokens, model, dtype, quantization, output) -> None:
    """Measure the accuracy of quantized pages or weights.

    Compares the perplexity and the greedy completions of a model with those
    on float pages, or with float weights.
    """
    from jfa_models import from_pretrained

    from ..measure import accuracy

    for name, given in (("--kv-dtype", kv_dtype), ("--quantization", quantization)):
        if weights and given:
            raise click.UsageError(f"--weights cannot be combined with {name}")
    load = functools.partial(from_pretrained, model, dtype=dtype, cache="paged")
    if weights:
        kinds = ("none", *(kind for kind in weights if kind != "none"))
        language_models = {kind: load(quantization=kind) for kind in kinds}
    else:
        kinds = (None, *(kv_dtype or KV_DTYPES))
        language_models = {kind or "float": load(quantization=quantization, kv_dtype=kind) for kind in kinds}
    records = accuracy.measure(language_models, text.read(), tokens=tokens, new_tokens=new_tokens)
    output.present(records, "accuracy", total=len(language_models))


@click.command("memory")
@click.option("--data", type=options.Names("data set", names.DATA_SETS), default="all", show_default=True)
@click.option("--page-size", type=options.Counts(), default="16", show_default=True)
@click.option("--steps", type=click.IntRange(min=10), default=500, show_default=True)
@options.output_options
def memory_command(data, page_size, steps, output) -> None:
    """Measure the memory that pages save.

    Computes it from the allocator's state on simulated requests.
    """
    from ..measure import memory

    records = memory.measure(data_sets=data, page_sizes=page_size, steps=steps)
    output.present(records, "memory", total=len(data) * len(page_size) * len(memory.WAYS))


@click.command("paged")
@click.option("--batch", type=options.Counts(), default="1,8", show_default=True)
@click.option("--context", type=options.Counts(), default="2048", show_default=True, help="Tokens in each row.")
@click.option("--page-size", type=options.Counts(), default="16", show_default=True)
@click.option("--kv-dtype", type=options.Names("kv dtype", names.PAGE_KINDS), default="same,int8", show_default=True)
@click.option("--heads", type=options.COUNT, default=8, show_default=True)
@click.option("--kv-heads", type=options.COUNT, default=2, show_default=True)
@click.option("--head-dim", type=options.COUNT, default=64, show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16", "float16")), default="float32", show_default=True)
@click.option(
    "--implementation", type=click.Choice(("xla", "triton", "tpu", "reference")), help="Default: chosen by jfa."
)
@options.measurement_options
def paged_command(
    batch, context, page_size, kv_dtype, heads, kv_heads, head_dim, dtype, implementation, samples, output
) -> None:
    """Benchmark paged decode attention.

    Compares it with the contiguous cache and with a copy of the same number of bytes.
    """
    if heads % kv_heads:
        raise click.BadParameter(f"{kv_heads} key heads do not divide {heads} query heads", param_hint="--kv-heads")

    from ..measure import paged

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
    output.present(records, "paged", total=total)


@click.command("throughput")
@click.option("--num-prompts", type=options.COUNT, default=64, show_default=True)
@click.option("--lengths", type=click.Choice(names.LENGTHS), default="skewed", show_default=True)
@click.option("--input-len", type=options.COUNT, default=64, show_default=True, help="Tokens of the longest prompt.")
@click.option(
    "--output-len", type=options.COUNT, default=256, show_default=True, help="Tokens of the longest completion."
)
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=math.inf,
    help="Requests per second; default: all at once.",
)
@click.option("--max-concurrency", type=options.COUNT, help="Maximum number of requests in the engine at a time.")
@click.option("--max-num-seqs", type=options.COUNT, default=32, show_default=True, help="Maximum rows per step.")
@click.option("--n", type=options.COUNT, default=1, show_default=True, help="Samples per prompt.")
@click.option("--beam-width", type=click.IntRange(1, 10), help="Use beam search instead of sampling.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Quantize the pages.")
@click.option("--page-size", type=options.COUNT, default=16, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--implementation", type=options.Names("implementation", names.BATCHING), default="static,engine")
@model_options
@click.option("--tensor-parallel", type=options.COUNT, help="Divide the model over as many devices.")
@options.output_options
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
    quantization,
    tensor_parallel,
    output,
) -> None:
    """Benchmark the engine on a trace of requests.

    Compares it with static batches, which wait for their longest row.
    """
    if n > 1 and beam_width is not None:
        raise click.UsageError("--n and --beam-width cannot be combined")

    from ..measure import throughput

    language_model = configs.load(model, dtype, quantization, tensor_parallel)
    arrivals = throughput.trace(
        num_prompts=num_prompts,
        lengths=lengths,
        input_len=input_len,
        output_len=output_len,
        request_rate=request_rate,
        vocab_size=language_model.config.vocab_size,
        seed=seed,
    )
    case = {"model": model, "dtype": language_model.dtype.name, "quantization": quantization}
    case |= {"tensor_parallel": tensor_parallel} if tensor_parallel else {}
    case |= {"num_prompts": num_prompts, "lengths": lengths}
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
    output.present(records, "throughput", total=len(implementation))


@click.command("speculation")
@click.option(
    "--config",
    "configs_given",
    type=JsonObject(),
    multiple=True,
    default=['{"method": "ngram", "num_speculative_tokens": 16}'],
    help="A speculative_config; can be repeated.",
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON Lines with kind, task, prompt.",
)
@click.option("--kind", help="Only the prompts of this kind.")
@click.option("--batch", type=options.COUNT, default=1, show_default=True, help="Copies of a prompt at a time.")
@click.option("--output-len", type=options.COUNT, default=128, show_default=True, help="Tokens per prompt.")
@click.option("--rounds", type=options.COUNT, default=5, show_default=True)
@click.option(
    "--arch", type=click.Choice(tuple(CARDS)), help="Compute what a card would gain at best, for csv and json."
)
@model_options
@options.output_options
def speculation_command(
    configs_given, prompts, kind, batch, output_len, rounds, arch, model, dtype, quantization, output
) -> None:
    """Benchmark speculative decoding on prompts that copy and prompts that do not.

    Compares each --config with plain decoding, in turns.
    """
    from ..measure import speculation

    found = speculation.read_prompts(prompts or speculation.PROMPTS)
    if kind is not None:
        kinds = sorted({one["kind"] for one in found})
        if kind not in kinds:
            raise click.BadParameter(f"must be one of {', '.join(kinds)}, got {kind}", param_hint="--kind")
        found = [one for one in found if one["kind"] == kind]
    named = {_config_name(one): SpeculativeConfig.of(one) for one in configs_given}
    if len(named) < len(configs_given):
        raise click.BadParameter(
            f"two have the same name, of {', '.join(named)}: measure one of them", param_hint="--config"
        )
    named = {speculation.PLAIN: None} | named
    language_model = configs.load(model, dtype, quantization)
    records = speculation.measure(
        language_model,
        found,
        named,
        # as they are held, which is what a CPU chooses if nothing is given
        case={"model": model, "dtype": language_model.dtype.name, "quantization": _held(language_model.params)},
        batch=batch,
        output_len=output_len,
        rounds=rounds,
        arch=arch,
    )
    output.present(records, "speculation", total=len(named) * (len(found) + len({one["kind"] for one in found})))


def _held(params: Iterable[Any]) -> str | None:
    """The kind of the quantized weights; None: there are none."""
    return next((kind for x in params if (kind := getattr(x, "kind", None)) is not None), None)


def _config_name(config: dict) -> str:
    """The method and the values of other options: "ngram 16"."""
    return " ".join(str(value) for value in config.values())


@click.command("decode")
@click.option("--models", type=options.Models(), default="smollm2", show_default=True)
@click.option("--layers", type=options.COUNT, help="Only the first layers of each model, for small machines.")
@click.option("--batch", type=options.Counts(), default="1,8", show_default=True)
@click.option("--context", type=options.Counts(), default="128", show_default=True, help="Tokens already in the cache.")
@click.option(
    "--implementation",
    type=options.Names("implementation", names.IMPLEMENTATIONS),
    default="jfa",
    show_default=True,
    help="Attention; jfa: chosen automatically.",
)
@dtype_options
@options.measurement_options
def decode_command(models, layers, batch, context, implementation, dtype, quantization, samples, output) -> None:
    """Benchmark decode steps of whole models.

    Compares them with their matrix products only and with the bandwidth of a copy.
    """
    for name in models:
        room = configs.config_of(name, layers).context_length - configs.decoded_tokens(samples)
        if max(context) > room:
            raise click.BadParameter(
                f"{name} supports at most {room} tokens of context in addition to the timed ones, got {max(context)}",
                param_hint="--context",
            )

    from ..measure import decode

    records = decode.measure(
        models,
        layers=layers,
        batches=batch,
        contexts=context,
        implementations=implementation,
        dtype=dtype,
        quantization=quantization,
        samples=samples,
    )
    total = len(models) * len(batch) * len(context) * (1 + len(implementation))
    output.present(records, "decode", total=total)


@click.command("prefill")
@click.option("--models", type=options.Models(), default="mistral-7b,llama-3-8b,phi-2", show_default=True)
@click.option("--layers", type=options.COUNT, help="Only the first layers of each model, for small machines.")
@click.option("--seq-lens", type=options.Counts(), default="512,1024,2048", show_default=True, help="Prompt lengths.")
@click.option("--batch", type=options.COUNT, default=1, show_default=True)
@click.option(
    "--implementation",
    type=options.Names("implementation", names.IMPLEMENTATIONS),
    default="reference,jfa",
    show_default=True,
    help="Attention; jfa: chosen automatically.",
)
@dtype_options
@options.measurement_options
def prefill_command(models, layers, seq_lens, batch, implementation, dtype, quantization, samples, output) -> None:
    """Benchmark prefill of whole models.

    Compares jfa's attention with the plain formula.
    """
    for name in models:
        config = configs.config_of(name, layers)
        if max(seq_lens) > config.context_length:
            raise click.BadParameter(
                f"{name} has a context of {config.context_length} tokens, got {max(seq_lens)}", param_hint="--seq-lens"
            )

    from ..measure import prefill

    records = prefill.measure(
        models,
        layers=layers,
        batch=batch,
        seq_lens=seq_lens,
        implementations=implementation,
        dtype=dtype,
        quantization=quantization,
        samples=samples,
    )
    total = len(models) * len(seq_lens) * (1 + len(implementation))
    output.present(records, "prefill", total=total)


COMMANDS = (
    attention_command,
    sparse_command,
    linear_command,
    paged_command,
    prefill_command,
    decode_command,
    throughput_command,
    speculation_command,
    accuracy_command,
    memory_command,
)
