"""Computes the rows of a table in worker processes: a compiler that crashes its process only loses that row."""

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
    rows_per_process: int | None = None,
) -> list[Record]:
    """function(row) for each row, in order.

    crashed: returns the record of a row whose process crashed. processes: number of worker processes; 0: run in this
    process. doing: label of a progress bar on stderr, if that is a terminal. rows_per_process: None: any number.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=len(rows))
        return list(_each(function, rows, crashed, processes, rows_per_process, lambda: bar.advance(task)))


def _each[Row](
    function: Callable[[Row], Record],
    rows: Sequence[Row],
    crashed: Callable[[Row], Record],
    processes: int,
    rows_per_process: int | None,
    done: Callable[[], None],
) -> Iterator[Record]:
    if not processes or not rows:
        for row in rows:
            yield function(row)
            done()
        return
    with _workers(min(processes, len(rows)), rows_per_process) as pool:
        futures = [pool.submit(function, row) for row in rows]
        for future in futures:
            future.add_done_callback(lambda _: done())
        for row, future in zip(rows, futures, strict=True):
            try:
                yield future.result()
            except BrokenProcessPool:  # the process of this row or of another one crashed
                yield _retried(function, row, crashed)


def _retried[Row](function: Callable[[Row], Record], row: Row, crashed: Callable[[Row], Record]) -> Record:
    with _workers(1) as pool:
        try:
            return pool.submit(function, row).result()
        except BrokenProcessPool:
            return crashed(row)


@contextlib.contextmanager
def _workers(count: int, rows_per_process: int | None = None) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),  # JAX's threads do not survive a fork
        initializer=_on_the_cpu,
        max_tasks_per_child=rows_per_process,
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _on_the_cpu() -> None:
    """Keeps worker processes, which compile or emulate, from allocating memory on a real GPU."""
    jax.config.update("jax_platforms", "cpu")
