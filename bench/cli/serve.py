"""`jfa-bench serve`: a load on a server with OpenAI's protocol, with the options of `vllm bench serve`."""

from pathlib import Path

import click

from jfa_models.cli.base import DEFAULT_MODEL, JsonObject, dtype_options
from jfa_models.decoding.options import KV_DTYPES
from jfa_models.decoding.speculation import SpeculativeConfig

from .. import names
from . import options

OF_SERVER = ("base_url", "header", "api_key_file", "retry_429")
OF_ENGINE = (
    *("dtype", "quantization", "kv_dtype", "num_pages", "max_model_len", "max_num_seqs", "max_num_batched_tokens"),
    *("no_prefix_caching", "speculative_config"),
)
RANDOM = ("random_input_len", "random_range_ratio")


class _Command(click.Command):
    """Options of MANY take values until the next option, as in vLLM."""

    MANY = ("--goodput", "--header", "--metadata")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        found, option = [], None
        for one in args:
            if one.startswith("-"):
                option = one if one in self.MANY else None
            elif option in self.MANY and found[-1] != option:
                found.append(option)
            found.append(one)
        return super().parse_args(ctx, found)


class _Pair(click.ParamType):
    """A name and a value."""

    def __init__(self, mark: str):
        self.mark, self.name = mark, f"name{mark}value"

    def convert(self, value, param, ctx) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, mark, given = value.partition(self.mark)
        if not name or not mark:
            self.fail(f"{value!r} must be NAME{self.mark}VALUE", param, ctx)
        return name.strip(), given.strip()


@click.command("serve", cls=_Command)
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True, help="Of the server, without /v1.")
@click.option("--endpoint", type=click.Choice(names.ENDPOINTS), default=names.ENDPOINTS[0], show_default=True)
@click.option("--model", help=f"Default: the first one of the server; with --offline {DEFAULT_MODEL}.")
@click.option("--header", type=_Pair("="), multiple=True, help="Header of all requests; can be repeated.")
@click.option("--api-key-file", type=options.FILE, help="The key is its first line.")
@click.option("--num-prompts", type=options.COUNT, default=1000, show_default=True)
@click.option("--random-input-len", type=options.COUNT, default=1024, show_default=True, help="Tokens of a prompt.")
@click.option("--random-output-len", type=options.COUNT, default=128, show_default=True, help="Tokens of an answer.")
@click.option(
    "--random-range-ratio",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Lengths are from 1 - ratio to 1 + ratio times these.",
)
@click.option("--dataset-path", type=options.FILE, help="JSON Lines with prompt, instead of random prompts.")
@click.option(
    "--request-rate",
    "rates",
    type=options.Numbers("a list of rates above 0, such as 0.5,1,inf", above=0),
    default="inf",
    show_default=True,
    help="Requests per second; a run for each. inf: all at once.",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Below 1: requests come in bursts; inf: at regular intervals.",
)
@click.option("--max-concurrency", type=options.COUNT, help="Maximum number of requests at a time.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--ignore-eos/--no-ignore-eos", default=True, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option(
    "--goodput",
    type=_Pair(":"),
    multiple=True,
    help="Milliseconds of ttft, tpot or e2el that a good answer keeps, such as ttft:200 tpot:50.",
)
@click.option(
    "--percentile-metrics",
    "metrics",
    type=options.Names("metric", tuple(names.LATENCIES)),
    default=",".join(names.LATENCIES),
    show_default=True,
    help="Latencies to print.",
)
@click.option(
    "--metric-percentiles",
    "percentiles",
    type=options.Numbers("a list of percentiles above 0 and up to 100, such as 90,99", above=0, most=100),
    default="99",
    show_default=True,
)
@click.option("--retry-429", is_flag=True, help="Send refused requests again, after the seconds of Retry-After.")
@click.option("--metadata", type=_Pair("="), multiple=True, help="Goes into the records; can be repeated.")
@click.option("--offline", is_flag=True, help="Run the trace in an engine in this process. It has the options below.")
@dtype_options
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Quantize the pages of the KV cache.")
@click.option("--num-pages", type=options.COUNT, help="Pages of the KV cache. Default: most of the free memory.")
@click.option("--max-model-len", type=options.COUNT, help="Tokens of a prompt and its answer.")
@click.option("--max-num-seqs", type=options.COUNT, default=16, show_default=True, help="Sequences at a time.")
@click.option("--max-num-batched-tokens", type=options.COUNT, help="Tokens per step.")
@click.option("--no-prefix-caching", is_flag=True, help="Compute equal beginnings of prompts anew.")
@click.option("--speculative-config", type=JsonObject(), help="""How to speculate, such as '{"method": "ngram"}'.""")
@options.output_options
@click.pass_context
def serve_command(
    context,
    base_url,
    endpoint,
    model,
    header,
    api_key_file,
    num_prompts,
    random_input_len,
    random_output_len,
    random_range_ratio,
    dataset_path,
    rates,
    burstiness,
    max_concurrency,
    seed,
    ignore_eos,
    temperature,
    goodput,
    metrics,
    percentiles,
    retry_429,
    metadata,
    offline,
    dtype,
    quantization,
    max_model_len,
    no_prefix_caching,
    speculative_config,
    output,
    **engine_options,
) -> None:
    """Benchmark a server with OpenAI's protocol.

    Has the options of vllm bench serve, and prints its figures for each rate of requests.
    """
    _refuse(context, OF_SERVER, "belongs to a server: remove --offline or it", if_=offline)
    _refuse(context, OF_ENGINE, "belongs to the engine of --offline: a server has its own", if_=not offline)
    _refuse(context, RANDOM, "is about random prompts: remove --dataset-path or it", if_=dataset_path is not None)
    if offline and endpoint != names.ENDPOINTS[0]:
        raise click.UsageError(f"--offline knows {names.ENDPOINTS[0]} only: there is no chat without a server")
    goals = _goals(goodput)
    speculation = None if speculative_config is None else SpeculativeConfig.of(speculative_config)
    headers = dict(header)
    if api_key_file:
        headers["authorization"] = f"Bearer {_key(api_key_file)}"

    from ..measure import client, serve

    case = {"dataset": dataset_path.name if dataset_path else "random", "num_prompts": num_prompts}
    case |= {"input_len": None if dataset_path else random_input_len, "output_len": random_output_len}
    case |= {"range_ratio": None if dataset_path else random_range_ratio}

    def load(alphabet) -> serve.Load:
        def requests(rate: float) -> list[serve.Asked]:
            if dataset_path:
                return serve.dataset_requests(
                    dataset_path, num_prompts=num_prompts, output_len=random_output_len, seed=seed
                )
            return serve.random_requests(
                num_prompts=num_prompts,
                input_len=random_input_len,
                output_len=random_output_len,
                range_ratio=random_range_ratio,
                alphabet=alphabet,
                seed=seed,
                request_rate=rate,
            )

        return serve.Load(
            requests=requests,
            rates=rates,
            burstiness=burstiness,
            max_concurrency=max_concurrency,
            seed=seed,
            temperature=temperature,
            ignore_eos=ignore_eos,
            percentiles=percentiles,
            metrics=metrics,
            goodput=goals,
        )

    if offline:
        from .. import configs

        name = model or DEFAULT_MODEL
        language_model = configs.load(name, dtype, quantization)
        engine_options |= {"max_model_len": max_model_len, "enable_prefix_caching": not no_prefix_caching}
        case |= {"model": name, "endpoint": None, "dtype": language_model.dtype.name, "quantization": quantization}
        case |= {**engine_options, "speculative_config": speculative_config}
        records = serve.measure_engine(
            load(serve.engine_alphabet(language_model)),
            language_model,
            engine_options | {"speculative_config": speculation},
            case=case,
            metadata=dict(metadata),
        )
    else:
        server = client.Client(base_url, headers)
        name = serve.served_model(server, model)
        alphabet = () if dataset_path else serve.alphabet_of(server, endpoint, name)
        records = serve.measure(
            load(alphabet),
            server,
            endpoint=endpoint,
            model=name,
            retries=retry_429,
            case=case,
            metadata=dict(metadata),
        )
    output.present(records, "serve", total=len(rates))


def _refuse(context: click.Context, parameters: tuple[str, ...], why: str, *, if_: bool) -> None:
    """Refuses options that were given and do not belong to the others."""
    for name in parameters:
        if if_ and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")


def _goals(pairs: tuple[tuple[str, str], ...]) -> dict[str, float]:
    goals = {}
    for name, text in pairs:
        if name not in ("ttft", "tpot", "e2el"):
            raise click.BadParameter(f"must be of ttft, tpot or e2el, got {name!r}", param_hint="--goodput")
        try:
            goals[name] = float(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a number of milliseconds", param_hint="--goodput") from None
    return goals


def _key(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").split()
    if not lines:
        raise ValueError(f"{path} has no key")
    return lines[0]
