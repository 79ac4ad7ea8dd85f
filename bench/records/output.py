"""What a measuring command does with its records: a bar while they come, a file, a picture, and text on stdout.

The bar moves between measurements only: a thread that redraws it would take its share of a small machine's cores.
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
    """Where records go: a format for stdout, a JSON file and a picture, or None."""

    format: str
    save: Path | None
    plot: Path | None

    def present(self, records: Iterable[record.Record], benchmark: str, *, total: int) -> None:
        """Prints and keeps records as they come.

        Ctrl-C keeps those that have come and ends with status 130.

        Args:
          benchmark: of tables.VIEWS.
          total: how many will come.
        """
        view = tables.VIEWS[benchmark]
        kept = _opened(self.save) if self.save else None
        came: list[record.Record] = []
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
                    came.append(one)
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
            click.echo(view.table(came))
        elif self.format != "jsonl":
            click.echo(record.render(came, self.format, view.csv))
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
