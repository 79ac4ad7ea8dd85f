"""Rows of a table, each in a process of its own kind: a compiler that ends its process costs that row and no other."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import names

Record = dict[str, Any]


def each[Row](
    function: Callable[[Row], Record],
    rows: Sequence[Row],
    *,
    crashed: Callable[[Row], Record],
    doing: str,
    processes: int = names.PROCESSES,
) -> list[Record]:
    """function(row) of each, in their order.

    crashed: the record of a row whose process ended. processes: how many run at a time; 0: all in this one. A bar
    says on stderr, if that is a terminal, what is being done and how far it is.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=len(rows))
        return list(_each(function, rows, crashed, processes, lambda: bar.advance(task)))


def _each[Row](
    function: Callable[[Row], Record],
    rows: Sequence[Row],
    crashed: Callable[[Row], Record],
    processes: int,
    done: Callable[[], None],
) -> Iterator[Record]:
    if not processes or not rows:
        for row in rows:
            yield function(row)
            done()
        return
    with _workers(min(processes, len(rows))) as pool:
        futures = [pool.submit(function, row) for row in rows]
        for future in futures:
            future.add_done_callback(lambda _: done())
        for row, future in zip(rows, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:  # this row's process ended, or that of a neighbour
                yield _alone(function, row, crashed)


def _alone[Row](function: Callable[[Row], Record], row: Row, crashed: Callable[[Row], Record]) -> Record:
    with _workers(1) as pool:
        try:
            return pool.submit(function, row).result()
        except BrokenProcessPool:
            return crashed(row)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    # spawned: JAX's threads do not survive a fork
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_on_the_cpu)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _on_the_cpu() -> None:
    """A process that compiles or emulates takes no memory of a real GPU."""
    jax.config.update("jax_platforms", "cpu")
