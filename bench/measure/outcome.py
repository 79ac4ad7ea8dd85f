"""Converts the exceptions of an implementation to records with a status and a reason."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

import jfa

from ..records.record import Record

# Exceptions of unsupported calls, and of libraries that do not know the device. Not AssertionError: that is a bug of
# jfa and aborts the run.
REFUSALS = (NotImplementedError, ValueError, TypeError, RuntimeError, MemoryError, ImportError, OSError, ExceptionGroup)


def of(error: BaseException) -> Record:
    """Status and reason of a record whose implementation raised one of REFUSALS."""
    text = str(error).strip() or type(error).__name__
    reason = text.splitlines()[0]
    if isinstance(error, ImportError):
        return {"status": "missing", "reason": reason}
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return {"status": "oom", "reason": reason}
    if not isinstance(error, jfa.UnsupportedError):
        reason = f"{type(error).__name__}: {reason}"
    return {"status": "unsupported", "reason": reason}


def tried(runs: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Record], dict[str, Callable[[], Any]]]:
    """Calls each run once; returns the status and reason of all, and the runs that work."""
    found, serve = {}, {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run())
        except REFUSALS as refusal:
            found[name] = of(refusal)
        else:
            found[name], serve[name] = {"status": "ok", "reason": None}, run
    return found, serve
