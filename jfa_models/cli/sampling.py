"""The options that become SamplingParams."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from jfa_models.decoding.params import SamplingParams


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
    ):
        command = option(command)
    return command


def given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, or have a default."""
    return {name: value for name, value in sampling.items() if value is not None}


def check_sampling(sampling: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that no model accepts, before a model is loaded."""
    SamplingParams(**given(sampling))
