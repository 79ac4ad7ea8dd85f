"""A server in this process, on a port of its own."""

import contextlib
import threading

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

    def __init__(self, url, server, process):
        self.url, self.server, self.process = url, server, process
        self.runner, self.engine = server.runner, server.runner.engine


@contextlib.contextmanager
def serving(engine, *, max_num_seqs=MAX_NUM_SEQS, max_waiting=64, timeout=60.0, warm_up=(), grace=5.0, **settings):
    """Serves an engine while the body of a `with` statement runs; settings are those of Settings."""
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
    listening = http.bind("127.0.0.1", 0)
    is_ready = threading.Event()
    process = http.Process(server, grace=grace, on_ready=is_ready.set)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    assert is_ready.wait(300)
    try:
        yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", server, process)
    finally:
        process.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
