"""`jfa serve`: an HTTP server with OpenAI's protocol."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import click

from jfa_models.cli.base import (
    JsonObject,
    ModelName,
    NamedAdapter,
    dtype_options,
    mesh_options,
    process_options,
    window_options,
)
from jfa_models.decoding.options import KV_DTYPES
from jfa_models.decoding.params import SamplingParams
from jfa_models.decoding.speculation import SpeculativeConfig

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_COUNT = click.IntRange(min=1)


@click.command()
@click.option("--model", type=ModelName(), default="smollm2", show_default=True, help="What jfa generate takes.")
@dtype_options
@mesh_options
@process_options
@click.option("--served-model-name", "names", multiple=True, help="Name for requests; can be repeated.")
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: reachable from other machines.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any free one.")
@click.option("--api-key-file", type=_FILE, help="Keys, one per line; requests must send one of them.")
@click.option("--allowed-host", "hosts", multiple=True, help="Host name of requests. Default on loopback: localhost.")
@click.option("--allowed-origin", "origins", multiple=True, help="Web page that may read answers (CORS).")
@click.option("--adapter", "adapters", type=NamedAdapter(), multiple=True, help="Folder or repository of an adapter.")
@click.option(
    "--adapter-root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Requests may load adapters from folders in here.",
)
@click.option("--max-adapters", type=_COUNT, help="Reserve room for this many, so that loading compiles nothing.")
@click.option("--max-rank", type=_COUNT, help="Their largest rank.")
@click.option("--chat-template", type=_FILE, help="A Jinja template, instead of the model's.")
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="Quantize the pages of the KV cache.")
@click.option("--num-pages", type=_COUNT, help="Pages of the KV cache. Default: most of the free memory.")
@click.option("--max-model-len", type=_COUNT, help="Tokens of a prompt and its answer. Default: the model's context.")
@window_options
@click.option("--max-num-seqs", type=_COUNT, default=16, show_default=True, help="Sequences that run at a time.")
@click.option("--max-num-batched-tokens", type=_COUNT, help="Tokens per step.")
@click.option(
    "--max-waiting",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Sequences that may wait; more get status 429.",
)
@click.option("--no-prefix-caching", is_flag=True, help="Compute equal beginnings of prompts anew.")
@click.option(
    "--num-state-snapshots",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="For models with states: beginnings of prompts to keep them for.",
)
@click.option("--speculative-config", type=JsonObject(), help="""How to speculate, such as '{"method": "ngram"}'.""")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For requests without one.")
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds for a request.",
)
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds for a client to read what was sent.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds for running requests after SIGTERM.",
)
@click.option("--max-connections", type=_COUNT, default=1024, show_default=True)
@click.option("--max-body", type=_COUNT, default=16 * 2**20, show_default=True, help="Bytes of a request.")
@click.option("--max-sequences", type=_COUNT, default=256, show_default=True, help="Prompts times n of a request.")
@click.option("--ignore-unknown-fields", is_flag=True, help="Do not refuse fields that are not known.")
@click.option(
    "--warm-up",
    type=click.Choice(("common", "all", "none")),
    default="common",
    show_default=True,
    help="What to compile before the first request: the rest compiles when it is first asked for.",
)
@click.option("--log-json", is_flag=True, help="Log JSON objects.")
@click.option("--log-prompts", is_flag=True, help="Log what is asked and answered, too.")
def serve(
    model: str,
    dtype: str | None,
    quantization: str | None,
    tensor_parallel: int | None,
    mesh_sizes: dict[str, int] | None,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    names: tuple[str, ...],
    host: str,
    port: int,
    api_key_file: Path | None,
    hosts: tuple[str, ...],
    origins: tuple[str, ...],
    adapters: tuple[tuple[str, str], ...],
    adapter_root: Path | None,
    max_adapters: int | None,
    max_rank: int | None,
    chat_template: Path | None,
    kv_dtype: str | None,
    num_pages: int | None,
    max_model_len: int | None,
    attention_window: int | None,
    attention_sinks: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int | None,
    max_waiting: int,
    no_prefix_caching: bool,
    num_state_snapshots: int,
    speculative_config: dict[str, Any] | None,
    seed: int,
    request_timeout: float,
    stall_timeout: float,
    grace: float,
    max_connections: int,
    max_body: int,
    max_sequences: int,
    ignore_unknown_fields: bool,
    warm_up: str,
    log_json: bool,
    log_prompts: bool,
) -> None:
    """Serve a model over HTTP with OpenAI's protocol, and a page to chat with it.

    The server listens on this machine only, unless --host says otherwise. The first SIGTERM or Ctrl-C lets running
    requests finish, the second one ends at once. With --coordinator, the first of several processes serves, and all
    compute.
    """
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise click.UsageError("--num-processes and --process-id need --coordinator")
    if coordinator is not None and adapter_root is not None:
        raise click.UsageError("--adapter-root loads adapters in one process: leave it out with --coordinator")
    start = time.monotonic()
    speculation = None if speculative_config is None else SpeculativeConfig.of(speculative_config)
    keys = () if api_key_file is None else _keys(api_key_file)
    if host in _LOOPBACK and not hosts:
        hosts = ("localhost", "127.0.0.1", "[::1]")  # no other name leads here, except by deceit
    try:
        from jfa_models.serving import server as http
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client", "msgspec"):
            raise
        raise ValueError(f'jfa serve needs {error.name}: pip install "jfa[serve]"') from None

    loading: dict[str, Any] = dict(
        model=model,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel=tensor_parallel,
        mesh_sizes=mesh_sizes,
        adapters=adapters,
        context_length=max_model_len,
        attention_window=attention_window,
        attention_sinks=attention_sinks,
        max_adapters=max_adapters,
        max_rank=max_rank,
    )
    options: dict[str, Any] = dict(
        kv_dtype=kv_dtype,
        num_pages=num_pages,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        enable_prefix_caching=not no_prefix_caching,
        num_state_snapshots=num_state_snapshots,
        speculative_config=speculation,
        seed=seed,
    )
    with contextlib.ExitStack() as stack:
        from jfa_models import processes
        from jfa_models.cli import running, together
        from jfa_models.engine import Engine
        from jfa_models.engine.relay import Leader, follow
        from jfa_models.serving.app import Server, Settings
        from jfa_models.serving.metrics import Metrics
        from jfa_models.serving.runner import Runner

        first = None  # the address of the first process
        if coordinator is not None:
            given = loading | options | {"warm_up": warm_up}
            first = stack.enter_context(together.joined(coordinator, num_processes, process_id, given))
            if not processes.is_first():
                follow(Engine(running.load(**loading), **options), first)
                return
        listening = stack.enter_context(http.bind(host, port))
        engine = Engine(running.load(**loading), **options)
        leader = None if first is None else Leader(engine, first)
        if leader is not None:
            leader.warm_up(_WARM[warm_up])
        settings = Settings(
            names=names or (model,),
            keys=keys,
            hosts=[name.lower() for name in hosts],
            origins=origins,
            adapter_root=adapter_root,
            max_body=max_body,
            stall_timeout=stall_timeout,
            max_sequences=max_sequences,
            ignore_unknown=ignore_unknown_fields,
            log_prompts=log_prompts,
            chat_template=None if chat_template is None else running.read_text(chat_template),
        )
        metrics = Metrics(settings.names[0])
        runner = Runner(
            engine,
            max_num_seqs=max_num_seqs,
            max_waiting=max_waiting,
            timeout=request_timeout,
            warm_up=_WARM[warm_up] if leader is None else (),
            on_end=metrics.count,
            on_failure=None if leader is None else lambda cause: together.leave(RuntimeError(cause)),
        )
        metrics.read(runner)
        http.set_up_logs(as_json=log_json)
        shown, used = listening.getsockname()[:2]
        address = f"http://{f'[{shown}]' if ':' in shown else shown}:{used}"

        def tell() -> None:
            click.echo(f"jfa serves {settings.names[0]} at {address} (ready after {time.monotonic() - start:.0f} s)")

        server = Server(runner, settings, metrics)
        process = http.Process(server, grace=grace, max_connections=max_connections, on_ready=tell)
        process.run(sockets=[listening])
        if runner.is_alive:  # it compiles, or its device hangs: Python would wait for it
            os._exit(0)
        if leader is not None:
            leader.stop()


_COMMON = (SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.9, top_k=40))
_RARE = SamplingParams(presence_penalty=0.5, logprobs=5, prompt_logprobs=5, structured_outputs={"choice": ["a", "b"]})
_WARM = {"none": (), "common": _COMMON, "all": (*_COMMON, _RARE)}


def _keys(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise ValueError(f"{path} has no key: write one per line")
    return keys
