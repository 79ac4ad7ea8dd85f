"""The `jfa` command: generate text, chat, and report what the machine supports.

One file per command. A command imports what it runs only when it is called: a help text or a usage error must not wait
for JAX.
"""

import sys

from jfa_models.cli.base import command_group, run
from jfa_models.cli.chat import chat
from jfa_models.cli.generate import generate
from jfa_models.cli.info import info


def main() -> None:
    """Runs the command line. An error that the user can fix is one line on stderr and exit status 2."""
    sys.exit(run(commands, "jfa"))


@command_group
def commands() -> None:
    """Decoders on JAX: AMD and NVIDIA GPUs, TPUs and CPUs."""


for command in (generate, chat, info):
    commands.add_command(command)
