"""The commands that compare, plot and tabulate records, and the one that runs all benchmarks."""

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
    help="Ignore changes of less than this fraction.",
)
@options.format_option
def compare_command(before, after, threshold, format) -> None:
    """Compare two files of records.

    Prints the changes from BEFORE to AFTER that exceed the noise.
    """
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
        click.echo(compare.table(rows) if rows else f"no change exceeds {threshold:.0%} and the noise")


@click.command("plot")
@click.argument("files", nargs=-1, required=True, type=options.FILE)
@click.option("--plot", "picture", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Output file.")
@click.option("--kind", type=click.Choice(tuple(plot.KINDS)), help="Default: the first record's default kind.")
def plot_command(files, picture, kind) -> None:
    """Plot the records of FILES.

    Files are those written by --save or -o json.
    """
    plot.check(picture)
    plot.save([one for file in files for one in record.load(file)], picture, kind)
    click.echo(f"wrote {picture}", err=True)


@click.command("report")
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
def report_command(folder) -> None:
    """Print tables of records and write a page.

    Reads the records in FOLDER and writes FOLDER/report.html, with plots.
    Without FOLDER, prints the support tables, from the records in bench/results.
    """
    if folder is None:
        records = report.load("compile"), report.load("prove")
        tables = report.support(*records), report.support(*records, skipping=True), report.support_on_tpus(*records)
        tables += report.launches(report.load("models-gpu")), report.models_on_tpus(report.load("models-tpu"))
        tables += (report.beside(report.load("beside")),)
        click.echo("\n\n".join(tables))
        return
    report.write(folder)


COMMANDS = (compare_command, plot_command, report_command, suite.all_command)
