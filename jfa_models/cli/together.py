"""One command in several processes, each with some of the devices."""

import contextlib
import importlib.metadata
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from jfa_models import processes


@contextlib.contextmanager
def joined(
    coordinator: str, num_processes: int | None, process_id: int | None, given: Mapping[str, Any]
) -> Iterator[str]:
    """Joins the other processes, which must have been given the same; yields the address of the first.

    An error inside ends this process at once, with one line: leaving as usual would wait for processes that may be
    gone.
    """
    if given["tensor_parallel"] is None and given["mesh_sizes"] is None:
        raise click.UsageError("--coordinator needs --tensor-parallel or --mesh: what the processes divide")
    if given["speculative_config"] is not None:
        raise click.UsageError("--speculative-config adapts to times, which differ between processes: leave it out")
    processes.join(coordinator, num_processes, process_id)
    try:
        versions = {name: importlib.metadata.version(name) for name in ("jfa", "jax", "jaxlib")}
        processes.check_equal(versions | dict(given))
        own = socket.gethostbyname(socket.gethostname()) if coordinator == processes.AUTO else ""
        yield processes.of_first(lambda: own or coordinator.rpartition(":")[0])
    except (ValueError, RuntimeError, OSError) as error:
        leave(error)


_LEAVING = threading.Lock()


def leave(error: Exception) -> None:
    """Ends this process at once, with one line, however many threads have a reason."""
    _LEAVING.acquire()
    reason = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "start all again" not in reason:
        reason = f"a step failed: another process or a device is gone; start all again to go on ({reason})"
    click.echo(f"jfa: process {processes.index()}: {reason}", err=True)
    if processes.is_first():
        time.sleep(1.0)  # those that it leaves alone print a page of JAX's: let them leave first
    os._exit(2)
