"""Peers that run in another Python, with libraries that need not be installed beside JAX.

They also have that process's threads to themselves: those of two libraries in one process wait for work by spinning.
"""

import atexit
import contextlib
import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from . import in_torch, timing
from .peers import Call, Program

SETTLE = 0.15  # seconds for which a process is called before it is timed, after the other one's turn


def program(python: str, call: Call, *arrays) -> Program:
    """The Program of torch's attention for one call in the Python at this path, which times its runs itself.

    Raises:
      RuntimeError: what went wrong there.
      OSError: there is no such Python.
    """
    worker = _worker(python)
    about = worker.ask(do="start", call={"causal": call.causal, "direction": call.direction})["about"]
    prepared: list[int] = []  # bytes of each

    def prepare(*arrays) -> tuple[int]:
        np.savez(worker.file, *(np.asarray(x, np.float32) for x in arrays))
        prepared.append(worker.ask(do="prepare", file=worker.file, dtype=arrays[0].dtype.name)["num_bytes"])
        return (len(prepared) - 1,)

    def read(outputs) -> tuple[np.ndarray, ...]:
        worker.ask(do="read", file=worker.file)
        with np.load(worker.file) as found:
            return tuple(found[name] for name in found.files)

    return Program(
        prepare=prepare,
        run=lambda index: timing.Took(worker.ask(do="run", index=index)["ms"]),
        read=read,
        num_bytes=lambda index: prepared[index[0]],
        peak_bytes=None,
        about=about,
    )


class _Worker:
    def __init__(self, python: str):
        self._python = python
        self._process = subprocess.Popen(
            [python, in_torch.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._folder = tempfile.TemporaryDirectory()
        self.file = str(Path(self._folder.name) / "arrays.npz")  # what is exchanged
        atexit.register(self._end)

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self._python} ended with exit status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self._python}: {answer['error']}")
        return answer

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


_worker = functools.cache(_Worker)
