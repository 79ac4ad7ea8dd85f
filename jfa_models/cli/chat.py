"""`jfa chat`: a conversation in the terminal."""

import re
import sys
from typing import Any

import click

from jfa_models.cli.base import JsonObject, adapter_options, cache_options, mesh_options, model_options, window_options
from jfa_models.cli.sampling import check_sampling, read_forms, sampling_options

_COMMAND = re.compile(r"/\w+")


@click.command()
@model_options
@mesh_options
@adapter_options
@cache_options
@window_options
@sampling_options
@click.option("--system", help="System prompt.")
@click.option(
    "--template-kwargs", type=JsonObject(), help='Arguments of the chat template, such as {"enable_thinking": false}.'
)
def chat(
    model: str,
    dtype: str | None,
    quantization: str | None,
    tensor_parallel: int | None,
    mesh_sizes: dict[str, int] | None,
    adapters: tuple[tuple[str, str], ...],
    adapter_scale: float,
    cache: str,
    kv_dtype: str | None,
    max_model_len: int | None,
    attention_window: int | None,
    attention_sinks: int | None,
    system: str | None,
    template_kwargs: dict[str, Any] | None,
    **sampling,
) -> None:
    """Chat with a model. /reset starts over; /exit or Ctrl-D ends the chat."""
    sampling = read_forms(sampling)
    check_sampling(sampling)
    if "messages" in (template_kwargs or {}):
        raise click.UsageError("--template-kwargs must not have messages: they are what you type")

    from jfa_models.cli import running
    from jfa_models.decoding.language_model import Session

    language_model = running.load(
        model,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel=tensor_parallel,
        mesh_sizes=mesh_sizes,
        adapters=adapters,
        adapter_scale=adapter_scale,
        cache=cache,
        kv_dtype=kv_dtype,
        context_length=max_model_len,
        attention_window=attention_window,
        attention_sinks=attention_sinks,
    )
    tokenizer = language_model.tokenizer
    if tokenizer is None or not tokenizer.chat_templates:
        raise click.UsageError(f"{model} has no chat template, so it is not a chat model: use jfa generate")
    params = running.sampling_params(language_model, sampling)
    opening = [{"role": "system", "content": system}] if system else []
    messages, session = list(opening), Session()
    # if the input is a pipe, print only the answers
    you, answers = (click.style(f"{name}> ", bold=True) if sys.stdin.isatty() else "" for name in ("you", "model"))
    while True:
        try:
            message = click.prompt(you, prompt_suffix="").strip()
        except click.exceptions.Abort:
            message = "/exit"
            click.echo(nl=bool(you))
        if message == "/exit":
            return
        if not message:
            continue
        if message == "/reset":
            messages, session = list(opening), Session()
            continue
        if _COMMAND.fullmatch(message):
            click.echo(f"jfa: there is no command {message}; the commands are /reset and /exit", err=True)
            continue
        turn = [*messages, {"role": "user", "content": message}]
        try:
            text = tokenizer.apply_chat_template(turn, **(template_kwargs or {}))
            ids = tokenizer.encode(text, add_special_tokens=False)
            results = language_model.stream(ids, params, session=session, adapter=language_model.adapters.first)
            answer = running.print_growth(results, after=answers)
        except ValueError as error:
            click.echo(f"jfa: {error}. /reset starts a new conversation.", err=True)
            continue
        messages = [*turn, {"role": "assistant", "content": answer}]
