"""A server in this process, on a port of its own."""

import asyncio
import contextlib
import threading

from running import PATIENCE, running

from jfa_models.engine import Engine
from jfa_models.serving import server as http
from jfa_models.serving.app import Server, Settings
from jfa_models.serving.metrics import Metrics
from jfa_models.serving.runner import Runner

MAX_NUM_SEQS = 4


def new_engine(model, **options):
    """A small engine for a server."""
    return Engine(model, **({"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": 64, "num_pages": 400} | options))


class Served:
    """A running server: its address, and the objects behind it."""

    def __init__(self, url, server, process, thread):
        self.url, self.server, self.process, self.thread = url, server, process, thread
        self.runner, self.engine = server.runner, server.runner.engine

    def wait(self, holds):
        """Returns when holds() is true, which is asked between what the event loop does."""

        async def ask():
            while not holds():
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(ask(), self.runner._loop).result(PATIENCE)


@contextlib.contextmanager
def serving(
    engine,
    *,
    max_num_seqs=MAX_NUM_SEQS,
    max_waiting=64,
    timeout=PATIENCE,
    warm_up=(),
    grace=PATIENCE,
    waits=True,
    **settings,
):
    """Serves an engine while the body of a `with` statement runs; settings are those of Settings.

    waits: until it is ready.
    """
    metrics = Metrics("tiny")
    runner = Runner(
        engine,
        max_num_seqs=max_num_seqs,
        max_waiting=max_waiting,
        timeout=timeout,
        warm_up=warm_up,
        on_end=metrics.count,
    )
    metrics.read(runner)
    server = Server(runner, Settings(**({"names": ["tiny"]} | settings)), metrics)
    listening, is_ready = http.bind("127.0.0.1", 0), threading.Event()
    process = http.Process(server, grace=grace, on_ready=is_ready.set)
    with running(process, listening) as thread:
        assert not waits or is_ready.wait(PATIENCE)
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", server, process, thread)
