"""The process: a bound port, signals, and logs."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import Scope

from jfa_models.serving.app import Server

log = logging.getLogger("jfa.serving")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: any free one.

    Raises:
      OSError: the port is taken, or the host is not one of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()  # a port that is only bound may be bound twice; who connects now waits for the model
    except (OSError, OverflowError) as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error}; choose another --port or --host") from None
    return listening


class Process(uvicorn.Server):
    """Serves until a signal ends it: `run(sockets=[bind(host, port)])`.

    The first SIGTERM or SIGINT lets running requests finish for `grace` seconds; the second one ends at once.
    """

    def __init__(
        self,
        server: Server,
        *,
        grace: float = 30.0,
        max_connections: int = 1024,
        on_ready: Callable[[], None] = lambda: None,
    ):
        config = uvicorn.Config(
            server.app(),
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=max_connections,
            timeout_graceful_shutdown=2,
            lifespan="on",
        )
        super().__init__(config)
        self._server, self._grace, self._on_ready = server, grace, on_ready
        self._tasks: list[asyncio.Future[None]] = []
        server.cut = self._cut

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._tasks.append(asyncio.ensure_future(self._tell()))

    async def _tell(self) -> None:
        await self._server.runner.wait_until_ready()
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._server.runner.is_draining or not hasattr(self, "_loop"):
            os._exit(128 + sig)
        log.info("%s: running requests have %g s to finish", signal.Signals(sig).name, self._grace)
        self._server.runner.is_draining = True
        self._loop.call_soon_threadsafe(lambda: self._tasks.append(asyncio.ensure_future(self._drain())))

    async def _drain(self) -> None:
        try:
            await self._server.runner.drain(self._grace)
        finally:
            self.should_exit = True

    def _cut(self, scope: Scope) -> None:
        for connection in list(self.server_state.connections):
            if getattr(connection, "client", None) == scope["client"]:
                with contextlib.suppress(AttributeError):
                    connection.transport.abort()  # type: ignore[union-attr]


def set_up_logs(*, as_json: bool) -> None:
    """Logs to stderr: lines to read, or a JSON object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if as_json else _LineFormatter())
    logger = logging.getLogger("jfa.serving")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # what it has to say is in ours


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        found = getattr(record, "record", None)
        if found is None:
            text = record.getMessage()
            return f"{moment} {text}\n{getattr(record, 'traceback', '')}".rstrip()
        tokens = [one for one in found.get("tokens", ()) if one]
        parts = [f"{found['method']} {found['path']} {found['status']}, {found['seconds']:.3f} s"]
        if tokens:
            prompt, generated = (sum(one[name] for one in tokens) for name in ("prompt", "generated"))
            parts.append(f"{prompt} prompt and {generated} generated tokens")
        parts += [f"client {found['client']}"] if "client" in found else []
        parts += [found["error"]] if "error" in found else []
        parts += [json.dumps(found[name], ensure_ascii=False) for name in ("body", "answers") if name in found]
        return f"{moment} {', '.join(parts)}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": round(record.created, 3), "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "record", {})
        if hasattr(record, "traceback"):
            line["traceback"] = record.traceback  # type: ignore[attr-defined]
        return json.dumps(line, ensure_ascii=False)
