"""What an implementation that does not serve becomes: a record that says so."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

import jfa

from ..records.record import Record

# What a call that cannot serve, or a library that does not know the device, ends in. An AssertionError is not among
# them: it is a mistake of ours and ends the run.
REFUSALS = (NotImplementedError, ValueError, TypeError, RuntimeError, MemoryError, ImportError, OSError, ExceptionGroup)


def of(error: BaseException) -> Record:
    """The status and the reason of a record whose implementation has ended in one of REFUSALS."""
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
    """Calls each once: the status and reason of all, and the runs that serve."""
    found, serve = {}, {}
    for name, run in runs.items():
        try:
            jax.block_until_ready(run())
        except REFUSALS as refusal:
            found[name] = of(refusal)
        else:
            found[name], serve[name] = {"status": "ok", "reason": None}, run
    return found, serve
