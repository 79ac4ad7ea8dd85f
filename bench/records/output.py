"""What a measuring command does with its records: a bar while they come, a file, a picture, and text on stdout.

The bar moves between measurements only: a thread that redraws it would take its share of a small machine's cores.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import plot, record

Render = Callable[[Sequence[record.Record]], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where records go: a format for stdout, a JSON file and a picture, or None."""

    format: str
    save: Path | None
    plot: Path | None

    def present(
        self,
        records: Iterable[record.Record],
        columns: Mapping[str, str],
        *,
        total: int,
        doing: str,
        table: Render | None = None,
    ) -> None:
        """Prints and keeps records as they come.

        Ctrl-C keeps those that have come and ends with status 130.

        Args:
          columns: field to heading, of csv and of the table.
          total: how many will come.
          table: what makes the Markdown of them, where it is not one table of columns.
        """
        kept = _opened(self.save) if self.save else None
        came: list[record.Record] = []
        console = Console(stderr=True)
        parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        interrupted = False
        with Progress(
            *parts, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task(doing, total=total)
            bar.refresh()
            try:
                for one in records:
                    came.append(one)
                    if kept:
                        kept.add(one)
                    if self.format == "jsonl":
                        click.echo(record.render([one], "jsonl", columns))
                    bar.update(task, advance=1, description=f"{doing}, {one['implementation']}", refresh=True)
            except KeyboardInterrupt:
                interrupted = True
        if kept:
            kept.close()
        if self.format == "md":
            click.echo((table or record.table_of(columns))(came))
        elif self.format != "jsonl":
            click.echo(record.render(came, self.format, columns))
        if self.plot and came:
            plot.save(came, self.plot)
        if interrupted:
            click.echo(f"interrupted: {len(came)} of {total} records were kept", err=True)
            click.get_current_context().exit(130)


def _opened(path: Path) -> record.File:
    try:
        return record.File(path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


def output_options(command: Callable) -> Callable:
    """-o, --save and --plot, which reach the command as one Output named `output`."""

    @functools.wraps(command)
    def run(format, save, picture, **options):
        if picture:
            plot.check(picture)
        return command(output=Output(format=format, save=save, plot=picture), **options)

    path = click.Path(dir_okay=False, writable=True, path_type=Path)
    options = (
        click.option("--plot", "picture", type=path, help="Draw the records: a .png, .svg or .pdf."),
        click.option("--save", type=path, help="Keep the records in a JSON file as they come."),
        click.option("-o", "format", type=click.Choice(record.FORMATS), default="md", show_default=True),
    )
    for option in options:
        run = option(run)
    return run


def measurement_options(command: Callable) -> Callable:
    """--samples, and those of output_options."""
    samples = click.option("--samples", type=click.IntRange(min=1), default=15, show_default=True, help="Timed calls.")
    return output_options(samples(command))
