"""Computes the rows of a table in worker processes: only a row that crashes its process, or never ends, is lost."""

import concurrent.futures
import multiprocessing
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
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
    lost: Callable[[Row, str], Record],
    doing: str,
    processes: int = names.PROCESSES,
    rows_per_process: int | None = None,
    limit_s: Callable[[Row], float | None] = lambda row: None,
) -> list[Record]:
    """function(row) for each row, in order.

    Args:
      lost: returns the record of a row that has none, and why: its process crashed, or it took too long.
      doing: label of a progress bar on stderr, if that is a terminal.
      processes: number of worker processes; 0: run in this process, where nothing ends a row.
      rows_per_process: None: any number.
      limit_s: seconds that a row may take; None: any number.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(doing, total=len(rows))
        computed = map(function, rows)
        if processes and rows:
            computed = _in_processes(function, rows, lost, min(processes, len(rows)), rows_per_process, limit_s)
        found = []
        for record in computed:
            found.append(record)
            bar.advance(task)
        return found


def _in_processes[Row](
    function: Callable[[Row], Record],
    rows: Sequence[Row],
    lost: Callable[[Row, str], Record],
    processes: int,
    rows_per_process: int | None,
    limit_s: Callable[[Row], float | None],
) -> Iterator[Record]:
    """One thread for each process, so that it is known which row a process is computing."""
    own = threading.local()
    workers: list[_Worker] = []

    def start() -> None:
        own.worker = _Worker(rows_per_process)
        workers.append(own.worker)

    def compute(row: Row) -> Record:
        try:
            return own.worker.result(function, row, limit_s(row))
        except EOFError:
            return lost(row, "crashed its process")
        except TimeoutError:
            return lost(row, f"took more than {limit_s(row):g} s")

    threads = concurrent.futures.ThreadPoolExecutor(processes, initializer=start)
    try:
        yield from threads.map(compute, rows)
    finally:
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that computes one row at a time; another one follows when it is lost or has computed enough rows."""

    def __init__(self, rows_per_process: int | None):
        self._rows_per_process = rows_per_process
        self._process: Any = None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
        self._pipe, of_process = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(of_process,))
        self._process.start()
        of_process.close()
        self._computed = 0

    def result[Row](self, function: Callable[[Row], Record], row: Row, limit_s: float | None) -> Record:
        """function(row), or the exception that it raises.

        Raises:
          EOFError: the process crashed.
          TimeoutError: it took longer than limit_s.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, row))
            if not self._pipe.poll(limit_s):
                self.close(kill=True)
                raise TimeoutError
            record, error = self._pipe.recv()
        except (EOFError, ConnectionError) as crash:
            self.close()
            raise EOFError from crash
        self._computed += 1
        if self._computed == self._rows_per_process:
            self.close()
        if error:
            raise error
        return record

    def close(self, *, kill: bool = False) -> None:
        """Ends the process; kill: even if it is computing."""
        if self._process is not None:
            if kill:
                self._process.kill()
            self._pipe.close()
            self._process.join()
            self._process = None


def _serve(pipe: Connection) -> None:
    """Computes rows until the other end is closed."""
    jax.config.update("jax_platforms", "cpu")  # compiling and emulating must not allocate memory on a real GPU
    while True:
        try:
            function, row = pipe.recv()
        except EOFError:
            return
        try:
            found = function(row), None
        except Exception as error:  # any error of a row is the caller's
            error.add_note(traceback.format_exc())
            found = None, error
        pipe.send(found)
