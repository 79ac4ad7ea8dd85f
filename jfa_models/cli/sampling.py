"""The options that become SamplingParams."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from jfa_models.decoding.params import SamplingParams

_FORMS = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}


def sampling_options(command: Callable) -> Callable:
    """Adds --max-tokens, --temperature and so on; an omitted option is what the model's authors recommend."""
    for option in (
        click.option("--stop", multiple=True, help="Stop before this text; can be repeated."),
        click.option("--seed", type=int, help="With the same seed, the text is the same."),
        click.option("--repetition-penalty", type=float),
        click.option("--min-p", type=float),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--temperature", type=float, help="0: greedy decoding."),
        click.option("--max-tokens", type=int, default=128, show_default=True),
        click.option("--grammar", type=click.File(encoding="utf-8"), help="The text has this grammar (Lark)."),
        click.option("--regex", help="The text matches this regular expression."),
        click.option("--json-schema", type=click.File(encoding="utf-8"), help="The text is JSON of this schema."),
    ):
        command = option(command)
    return command


def given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, or have a default, by the names of SamplingParams."""
    fields = {name: value for name, value in sampling.items() if value is not None}
    form = {kind: fields.pop(option) for option, kind in _FORMS.items() if option in fields}
    if len(form) > 1:
        raise ValueError("--json-schema, --regex and --grammar exclude each other: a text has one form")
    return fields | ({"structured_outputs": form} if form else {})


def read_forms(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """With the contents of the files that options name.

    Raises:
      ValueError: a file is not a text in UTF-8.
    """
    return {name: _text_of(value) if hasattr(value, "read") else value for name, value in sampling.items()}


def _text_of(file: Any) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} is not a text in UTF-8: {error}") from None


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that no model accepts, before a model is loaded."""
    SamplingParams(**given(sampling))
