"""The command for whoever has a GPU for a short time."""

import math

import click

from . import options


@click.command("card")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=25,
    show_default=True,
    help="Stop after this time, before a unit of work that would exceed it.",
)
@click.option(
    "--output",
    "folder",
    type=options.FOLDER,
    default="jfa-bench-card",
    show_default=True,
    help="Folder for the records, the tuning tables and card.md; the next call with the same one goes on there.",
)
@click.option("--quick", is_flag=True, help="Tiny shapes, to try the command out on any device.")
@click.pass_context
def card_command(context, minutes, folder, quick) -> None:
    """Test, measure and tune this machine's GPU in a short time.

    Starts with what is most valuable: the oracle's cases, then attention,
    whole models, pages and tuning. Writes a page about the card. Exit
    status 1 if a result is wrong.
    """
    if math.isnan(minutes):
        raise click.BadParameter("nan is not a number of minutes", param_hint="--minutes")

    from jfa.device import probe

    from ..card import plan, session

    platform = probe().platform
    if platform not in ("rocm", "cuda") and not quick:
        raise click.UsageError(
            f"there is no GPU on this machine (JAX's device: {platform}); try the command out with --quick"
        )
    size = plan.QUICK if quick else plan.FULL
    context.exit(session.run(folder, minutes=minutes, size=size, say=lambda line: click.echo(line, err=True)))


COMMANDS = (card_command,)
