"""The `jfa-bench` command.

What a command runs is imported when it is called: a help text or a usage error must not wait for JAX.
"""

import sys

from jfa_models.cli.base import command_group, run

from . import measure, proof, records


def main() -> None:
    """Runs the command line. An error that the user can fix is one line on stderr and exit status 2."""
    sys.exit(run(commands, "jfa-bench"))


@command_group
def commands() -> None:
    """Measures jfa on this machine, and proves its kernels for cards that are not in it."""


for command in (*measure.COMMANDS, *proof.COMMANDS, *records.COMMANDS):
    commands.add_command(command)
