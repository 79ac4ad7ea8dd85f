"""Runs a program on the eight CPU devices that conftest.py asks XLA for."""

import textwrap
import warnings

import jax


def run_on_eight_devices(program: str) -> None:
    """Runs its text; UserWarnings are errors."""
    assert jax.device_count() == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(textwrap.dedent(program), {})
