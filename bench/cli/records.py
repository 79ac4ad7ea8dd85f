"""The commands about records: compared, drawn, put into tables; and all measurements at once."""

from pathlib import Path

import click

from ..records import compare, plot, record, report
from . import options, suite


@click.command("compare")
@click.argument("before", type=options.FILE)
@click.argument("after", type=options.FILE)
@click.option(
    "--threshold",
    type=click.FloatRange(min=0),
    default=compare.THRESHOLD,
    show_default=True,
    help="Share of a time below which nothing counts.",
)
@options.format_option
def compare_command(before, after, threshold, format) -> None:
    """What moved beyond the noise from BEFORE to AFTER, two files of records."""
    old, new = compare.timed(before), compare.timed(after)
    rows = list(compare.moved(old, new, threshold=threshold))
    for line in compare.other_circumstances(old, new):
        click.echo(f"note: {line}", err=True)
    common = compare.common(old, new)
    click.echo(f"note: {common} cases are in both, {len(old)} before and {len(new)} after", err=True)
    if not common:
        raise click.ClickException("the files have no case in common")
    if format != "md":
        click.echo(record.render(rows, format, compare.COLUMNS))
    else:
        click.echo(compare.table(rows) if rows else f"nothing moved by more than {threshold:.0%} and the noise")


@click.command("plot")
@click.argument("files", nargs=-1, required=True, type=options.FILE)
@click.option("--plot", "picture", required=True, type=click.Path(dir_okay=False, path_type=Path), help="To be drawn.")
@click.option("--kind", type=click.Choice(tuple(plot.KINDS)), help="Default: what suits the first record.")
def plot_command(files, picture, kind) -> None:
    """Draw the records of FILES, as --save and -o json keep them."""
    plot.check(picture)
    plot.save([one for file in files for one in record.load(file)], picture, kind)
    click.echo(f"{picture} drawn", err=True)


@click.command("report")
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
def report_command(folder) -> None:
    """Tables of the records in FOLDER, and a page of them with pictures: FOLDER/report.html.

    Without a folder: the support table, from the records in bench/results.
    """
    if folder is None:
        click.echo(report.support(report.load("compile"), report.load("prove")))
        return
    report.write(folder)


COMMANDS = (compare_command, plot_command, report_command, suite.all_command)
