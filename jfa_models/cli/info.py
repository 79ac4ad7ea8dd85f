"""`jfa info`: what this machine supports, and a model's size."""

import click

from jfa_models.cli.base import model_options


@click.command()
@model_options
def info(model: str, dtype: str | None, quantization: str | None) -> None:
    """Show versions, the device and a model's size.

    For each op, also shows the backend that it uses, and why it does not use the others.
    """
    from jfa_models.cli import about

    about.show(model, dtype, quantization)
