"""The output of a measuring command: a progress bar, a file of records, a plot, and text on stdout.

The bar is redrawn only between measurements: a thread that redraws it would use a core of a small machine.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import plot, record, tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """Where records go: the format on stdout, a JSON file and a plot; None for no file or plot."""

    format: str
    save: Path | None
    plot: Path | None

    def present(self, records: Iterable[record.Record], benchmark: str, *, total: int) -> None:
        """Prints and saves records as they are measured.

        Ctrl-C keeps the records so far and exits with status 130.

        Args:
          benchmark: a key of tables.VIEWS.
          total: the expected number of records.
        """
        view = tables.VIEWS[benchmark]
        kept = _opened(self.save) if self.save else None
        received: list[record.Record] = []
        console = Console(stderr=True)
        parts = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        interrupted = False
        with Progress(
            *parts, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task(benchmark, total=total)
            bar.refresh()
            try:
                for one in records:
                    received.append(one)
                    if kept:
                        kept.add(one)
                    if self.format == "jsonl":
                        click.echo(record.render([one], "jsonl", view.csv))
                    bar.update(task, advance=1, description=f"{benchmark}, {one['implementation']}", refresh=True)
            except KeyboardInterrupt:
                interrupted = True
        if kept:
            kept.close()
        if self.format == "md":
            click.echo(view.table(received))
        elif self.format != "jsonl":
            click.echo(record.render(received, self.format, view.csv))
        if self.plot and received:
            plot.save(received, self.plot)
        if interrupted:
            click.echo(f"interrupted: {len(received)} of {total} records were kept", err=True)
            click.get_current_context().exit(130)


def _opened(path: Path) -> record.File:
    try:
        return record.File(path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None
