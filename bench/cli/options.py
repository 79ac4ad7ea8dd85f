"""Types of options, and options that several commands share."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from .. import configs, names


class Counts(click.ParamType):
    """Integers above 0, separated by commas; first:last:step is a range that includes both ends."""

    name = "N,N,... or first:last:step"

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in value.split(","):
            numbers = self._numbers(part.strip())
            if not numbers:
                self.fail(
                    f"{value!r} is not a list of integers above 0, such as 1,8, nor a range first:last:step, "
                    "such as 256:4096:64",
                    param,
                    ctx,
                )
            found += numbers
        return tuple(dict.fromkeys(found))

    @staticmethod
    def _numbers(part: str) -> list[int]:
        if not re.fullmatch(r"[0-9]+(:[0-9]+:[0-9]+)?", part):
            return []
        first, *rest = (int(number) for number in part.split(":"))
        last, step = rest or (first, 1)
        return list(range(first, last + 1, step)) if first > 0 and step > 0 else []


class Numbers(click.ParamType):
    """Different numbers above one and up to another, separated by commas. what: in words, with an example."""

    name = "NUMBER,..."

    def __init__(self, what: str, *, above: float, most: float = math.inf):
        self.what, self.above, self.most = what, above, most

    def convert(self, value, param, ctx) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(dict.fromkeys(float(part) for part in value.split(",")))
        except ValueError:
            found = (math.nan,)
        if not all(self.above < one <= self.most for one in found):
            self.fail(f"{value!r} is not {self.what}", param, ctx)
        return found


class Names(click.ParamType):
    """Known names, separated by commas, or "all". more: names that "all" leaves out."""

    name = "NAME,..."

    def __init__(self, what: str, known: Sequence[str], more: Sequence[str] = ()):
        self.what, self.known, self.more = what, tuple(known), tuple(more)

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        given = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        if given == ("all",):
            return self.known
        for name in given:
            if name not in (*self.known, *self.more):
                known = ", ".join((*self.known, *self.more))
                self.fail(f"unknown {self.what} {name!r}; use one of {known}, or all", param, ctx)
        return given


class Models(click.ParamType):
    """Presets, packages, folders of safetensors or .gguf files, separated by commas."""

    name = "MODEL,..."

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        given = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        if problem := configs.unknown(given):
            self.fail(problem, param, ctx)
        return given


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)

COUNT = click.IntRange(min=1)

format_option = click.option("-o", "format", type=click.Choice(names.FORMATS), default="md", show_default=True)
processes_option = click.option(
    "--processes", type=click.IntRange(min=0), default=names.PROCESSES, show_default=True, help="0: no subprocesses."
)


def output_options(command: Callable) -> Callable:
    """Adds -o, --save and --plot, which are passed to the command as a records.output.Output named `output`."""

    @functools.wraps(command)
    def run(format, save, picture, **options):
        from ..records import plot
        from ..records.output import Output

        if picture:
            plot.check(picture)
        return command(output=Output(format=format, save=save, plot=picture), **options)

    for option in (
        click.option("--plot", "picture", type=NEW_FILE, help="Plot the records to a .png, .svg or .pdf file."),
        click.option("--save", type=NEW_FILE, help="Save the records to a JSON file as they are measured."),
        format_option,
    ):
        run = option(run)
    return run


def measurement_options(command: Callable) -> Callable:
    """Adds --samples and the options of output_options."""
    return output_options(
        click.option("--samples", type=COUNT, default=15, show_default=True, help="Number of timed calls.")(command)
    )
