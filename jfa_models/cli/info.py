"""`jfa info`: what this machine supports, and a model's size."""

import click

from jfa_models.cli.base import model_options


@click.command()
@model_options
def info(model: str, dtype: str | None) -> None:
    """Show versions, the device, which backend serves each op and why the others do not, and a model's size."""
    from jfa_models.cli import about

    about.show(model, dtype)
