"""`jfa info`: what this machine can do with a model."""

import click

from jfa_models.cli.base import model_options


@click.command()
@model_options
def info(model: str, dtype: str | None) -> None:
    """Versions, the device, which backend serves each op and why the others do not, and a model's size."""
    from jfa_models.cli import about

    about.show(model, dtype)
