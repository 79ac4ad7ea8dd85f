"""`jfa chat`: a conversation in the terminal."""

import sys

import click

from jfa_models.cli.base import cache_options, model_options
from jfa_models.cli.sampling import check_sampling, sampling_options


@click.command()
@model_options
@cache_options
@sampling_options
@click.option("--system", help="System prompt.")
def chat(
    model: str,
    dtype: str | None,
    cache: str,
    kv_dtype: str | None,
    max_model_len: int | None,
    system: str | None,
    **sampling,
) -> None:
    """Chat with a model. /reset starts over; /exit or Ctrl-D ends the chat."""
    check_sampling(sampling)

    from jfa_models.cli import running
    from jfa_models.decoding.language_model import Session

    language_model = running.load(model, dtype=dtype, cache=cache, kv_dtype=kv_dtype, context_length=max_model_len)
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
        turn = [*messages, {"role": "user", "content": message}]
        try:
            prompt_ids = tokenizer.encode(tokenizer.apply_chat_template(turn), add_special_tokens=False)
            results = language_model.stream(prompt_ids, params, session=session)
        except ValueError as error:
            click.echo(f"jfa: {error}. /reset starts a new conversation.", err=True)
            continue
        answer = running.print_growth(results, after=answers)
        messages = [*turn, {"role": "assistant", "content": answer}]
