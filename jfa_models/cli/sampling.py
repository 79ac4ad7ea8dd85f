"""The options that become SamplingParams."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from jfa_models.decoding.params import SamplingParams


def sampling_options(command: Callable) -> Callable:
    """--max-tokens, --temperature and so on; omitted ones are what the model's authors recommend."""
    for option in (
        click.option("--stop", multiple=True, help="Stop before this text; may be repeated."),
        click.option("--seed", type=int, help="The same seed gives the same text."),
        click.option("--repetition-penalty", type=float),
        click.option("--min-p", type=float),
        click.option("--top-p", type=float),
        click.option("--top-k", type=int),
        click.option("--temperature", type=float, help="0 is greedy."),
        click.option("--max-tokens", type=int, default=128, show_default=True),
    ):
        command = option(command)
    return command


def given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, or have a default."""
    return {name: value for name, value in sampling.items() if value is not None}


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that no model accepts, before one is loaded."""
    SamplingParams(**given(sampling))
