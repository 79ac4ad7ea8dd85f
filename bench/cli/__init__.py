"""The `jfa-bench` command.

Each command imports what it needs when it is called, so that help texts and usage errors do not wait for JAX.
"""

import sys

from jfa_models.cli.base import command_group, run

from . import card, measure, proof, records, serve


def main() -> None:
    """Runs the command line. Errors that the user can fix are one line on stderr and exit status 2."""
    sys.exit(run(commands, "jfa-bench"))


@command_group
def commands() -> None:
    """Benchmark jfa on this machine, and verify its kernels for GPUs that are not present."""


for command in (*measure.COMMANDS, serve.serve_command, *card.COMMANDS, *proof.COMMANDS, *records.COMMANDS):
    commands.add_command(command)
