"""Runs a program with eight CPU devices, whose number is fixed when JAX starts, in a process of its own."""

import os
import subprocess
import sys
import textwrap


def run_on_eight_devices(program: str) -> None:
    """Raises AssertionError with the end of its errors if the program fails."""
    flags = (
        f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"  # tests/conftest.py says why the first
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(program)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
