"""uvicorn on a thread of this process."""

import contextlib
import socket
import threading

import uvicorn

PATIENCE = 120  # seconds that a test waits for what must come


@contextlib.contextmanager
def running(process, listening):
    """Runs a uvicorn server on a thread of its own."""
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        process.should_exit = True
        thread.join(PATIENCE)
        listening.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def running_app(app):
    """Serves an application that has no life of its own; its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        config = uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="warning")
        with running(uvicorn.Server(config), listening):
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
