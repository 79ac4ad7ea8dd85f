"""Several processes that run one program, each with some of the devices of a mesh (jax.distributed).

Every process makes the same decisions from the same input, so nothing is communicated but what the steps themselves
exchange. What could differ is compared before the first step, or taken from the first process.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

AUTO = "auto"  # the coordinator that JAX finds in the environment: Slurm, Open MPI, Kubernetes, Cloud TPU
HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead
_LEAST_BYTES = 1 << 10  # that are exchanged: few sizes, of which each is a program of its own


def join(coordinator: str, num_processes: int | None, process_id: int | None, *, timeout: float = 60.0) -> None:
    """Joins the processes that have the same coordinator, before JAX is used for anything else.

    Args:
      coordinator: "host:port" of the first process, or "auto".
      num_processes, process_id: their number, and which this is; None, with "auto": as the environment says.
      timeout: seconds that a process waits for the first one, and the first for the others.

    Raises:
      ValueError: an argument is missing or out of range, or nothing answers.
    """
    options: dict[str, Any] = dict(
        initialization_timeout=int(timeout), heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=HEARTBEAT
    )
    if coordinator != AUTO:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or int(port) >= 1 << 16:
            raise ValueError(f"the coordinator must be HOST:PORT of the first process, or {AUTO}, got {coordinator!r}")
        if num_processes is None or process_id is None:
            raise ValueError(
                f"with a coordinator, each process needs the number of processes and its own, 0 to that number, got "
                f"{num_processes} and {process_id}; or use {AUTO} under Slurm, Open MPI or Kubernetes"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(f"the number of a process must be 0 to {num_processes - 1}, got {process_id}")
        if process_id > 0:  # jax would end this process without a word to its caller
            _wait_for(host, int(port), timeout)
        options |= dict(coordinator_address=coordinator, num_processes=num_processes, process_id=process_id)
    elif num_processes is not None or process_id is not None:
        raise ValueError(f"the coordinator {AUTO} finds out how many processes there are: leave their numbers out")
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the processes cannot be joined with coordinator {coordinator}: {reason}") from error


def _wait_for(host: str, port: int, timeout: float) -> None:
    until = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"no process answers at {host}:{port} ({error}) after {timeout:g} s: start the first process there"
                ) from None
            time.sleep(0.1)


def count() -> int:
    """The number of processes."""
    return jax.process_count()


def index() -> int:
    """The number of this process."""
    return jax.process_index()


def is_first() -> bool:
    """Whether this is the process that reads requests and writes results."""
    return index() == 0


def check_equal(facts: Mapping[str, Any]) -> None:
    """Raises ValueError in all processes if one of them has other facts, of which the message names the first.

    facts: values for JSON.
    """
    if count() == 1:
        return
    everyone = [json.loads(text) for text in _gathered(json.dumps(facts, default=str).encode())]
    for process, theirs in enumerate(everyone):
        for name, value in everyone[0].items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"process {process} has {name}={theirs.get(name)!r}, and process 0 {value!r}: start all processes "
                    "with the same versions and arguments"
                )


def of_first[T](value: Callable[[], T]) -> T:
    """What the first process gets from the function, in all processes; values for JSON, and ValueErrors too."""
    if count() == 1:
        return value()
    sent: dict[str, Any] = {}
    if is_first():
        try:
            sent["value"] = value()
        except ValueError as error:
            sent["error"] = str(error)
    from jax.experimental import multihost_utils

    text = json.dumps(sent).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = np.frombuffer(text, np.uint8)
    found = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if "error" in found:
        raise ValueError(found["error"])
    return found["value"]


def smallest(value: int) -> int:
    """The smallest of the values of all processes."""
    return value if count() == 1 else min(map(int, _gathered(str(value).encode())))  # it may be more than 32 bits


@contextlib.contextmanager
def in_all() -> Iterator[None]:
    """An error inside, in one process, is raised in all of them; all must come here.

    Raises:
      RuntimeError: another process had an error; the message has it.
    """
    error = None
    try:
        yield
    except Exception as found:
        error = found
    if count() > 1 and (is_wrong := _values(error is not None)).any():
        told = _gathered((str(error) or type(error).__name__).encode())
        if error is None:
            process = int(is_wrong.argmax())
            raise RuntimeError(f"process {process}: {told[process].decode()}")
    if error is not None:
        raise error


def whole(x: Any) -> np.ndarray | None:
    """An array on the host of the first process; None in others. All that have parts of it must call this.

    The devices of all of them get the whole array.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x) if is_first() else None
    if not x.is_fully_replicated:
        assert isinstance(x.sharding, NamedSharding)
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    jax.block_until_ready(x)  # or the next ones would wait in memory
    return np.asarray(x) if is_first() else None


def _values(value: int) -> np.ndarray:
    """The number of each process."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(np.int32(value)))


def _gathered(text: bytes) -> list[bytes]:
    """What each process has. All run the same program, whatever they have, so that none waits for another."""
    from jax.experimental import multihost_utils

    sizes = _values(len(text))
    padded = np.zeros(max(_LEAST_BYTES, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]
