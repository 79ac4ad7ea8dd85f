"""Groups of processes that share a batch: each runs requests of its own, and the first process gets all results.

Groups do not wait for each other's steps. Every process has a connection with the first one. Over it go results, a line
of JSON for each, and by it all notice at once that a process has ended.
"""

import contextlib
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jfa_models import processes
from jfa_models.engine import relay


class Shares:
    """The connections of this process. All make one, before anything that takes one of them longer than others."""

    def __init__(self, host: str, on_failure: Callable[[RuntimeError], Any] | None = None):
        """host: the name or address of the first process's machine that the others reach.

        on_failure: called on a thread as soon as another process has ended without a word; None: the next call here
        raises the error.
        """
        self._on_failure, self._is_first = on_failure, processes.is_first()
        self._sockets = relay.others(host) if self._is_first else [relay.first(host)]
        self._arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._running = len(self._sockets)  # of the others that have not come to their end
        for one in self._sockets:
            threading.Thread(target=self._read, args=(one,), daemon=True).start()

    def send(self, result: dict[str, Any]) -> None:
        """Sends a result to the first process; from there, nowhere."""
        if not self._is_first:
            self._tell("result", result)

    def arrived(self) -> Iterator[dict[str, Any]]:
        """The results that have arrived, without waiting; none where it is not the first process."""
        while not self._arrived.empty():
            yield from self._next()

    def rest(self) -> Iterator[dict[str, Any]]:
        """The results that are still to come. Ends when all processes are here."""
        if not self._is_first:
            self._tell("end", None)
        while self._running:
            yield from self._next()
        if self._is_first:
            self._tell("end", None)
        for one in self._sockets:
            one.close()

    def _next(self) -> Iterator[dict[str, Any]]:
        what, value = self._arrived.get()
        if what == "error":
            raise value
        self._running -= what == "end"
        if what == "result":
            yield value

    def _tell(self, what: str, value: Any) -> None:
        try:
            for one in self._sockets:
                one.sendall(json.dumps([what, value]).encode() + b"\n")
        except OSError as error:
            raise self._ended(f" ({error})") from error

    def _read(self, connection: socket.socket) -> None:
        reason = ""
        try:
            for line in connection.makefile("rb"):
                if not line.endswith(b"\n"):
                    break  # it ended in the middle of it
                what, value = json.loads(line)
                self._arrived.put((what, value))
                if what == "end":
                    return
        except OSError as error:
            reason = f" ({error})"
        failure = self._ended(reason)
        self._arrived.put(("error", failure))
        for one in self._sockets if self._is_first else ():  # so that all others notice
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        if self._on_failure is not None:
            self._on_failure(failure)

    def _ended(self, reason: str) -> RuntimeError:
        who = "another process" if self._is_first else "the first process"
        return RuntimeError(f"{who} has ended{reason}: start all again")
