"""The `jfa` command: generate text, chat, serve, train adapters, report what the machine supports, plan others.

One file per command. Commands import what they need only when they are called, so that help texts and usage errors do
not wait for the import of JAX.
"""

import sys

from jfa_models.cli.base import command_group, run
from jfa_models.cli.chat import chat
from jfa_models.cli.finetune import finetune
from jfa_models.cli.generate import generate
from jfa_models.cli.info import info
from jfa_models.cli.plan import plan
from jfa_models.cli.quantize import quantize
from jfa_models.cli.serve import serve


def main() -> None:
    """Runs the command line. For an error that the user can fix, prints one line to stderr and exits with status 2."""
    sys.exit(run(commands, "jfa"))


@command_group
def commands() -> None:
    """Generate text with language models in JAX, on AMD and NVIDIA GPUs, TPUs and CPUs."""


for command in (generate, chat, serve, finetune, info, plan, quantize):
    commands.add_command(command)
