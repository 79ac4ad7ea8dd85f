"""Clocks. Warm up until stable, block until ready, medians; what is compared is measured in turns, since machines are
noisy."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import names

# A run is warm once two calls in a row take the same to within STABLE, or after names.WARM_UP_CALLS, or after so long.
STABLE = 0.1
WARM_UP_SECONDS = 2.0

# More than the last cache of any processor that we know keeps (MI300X: 256 MiB), and a bound on small inputs.
CACHE_BYTES = 512 * 2**20
MOST_COPIES = 256

Run = Callable[[], object]
Clock = Callable[[], float]  # seconds


def in_turns(runs: Mapping[str, Run], *, samples: int, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Milliseconds of each warm run, `samples` of them, taken round-robin: a busy moment hits every run alike."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        warm_up(run, clock=clock)
    for _ in range(samples):
        for name, run in runs.items():
            taken[name].append(_milliseconds(run, clock))
    return taken


def warm_up(run: Run, *, clock: Clock = time.perf_counter) -> int:
    """Calls a run until it is stable, and says how often that was: at most names.WARM_UP_CALLS times."""
    start, before = clock(), _milliseconds(run, clock)
    for calls in range(2, names.WARM_UP_CALLS + 1):
        if clock() - start > WARM_UP_SECONDS:
            return calls - 1
        now = _milliseconds(run, clock)
        if abs(now - before) <= STABLE * before:
            return calls
        before = now
    return names.WARM_UP_CALLS


def _milliseconds(run: Run, clock: Clock) -> float:
    start = clock()
    jax.block_until_ready(run())
    return (clock() - start) * 1e3


def copies_past_cache(num_bytes: int) -> int:
    """How many copies of inputs of that size to go through in turn, so that no cache still holds the next."""
    return 1 if num_bytes >= CACHE_BYTES else min(MOST_COPIES, 1 + CACHE_BYTES // max(1, num_bytes))


def rotating(function: Callable, inputs: Sequence[tuple]) -> Run:
    """A run of function on the next of several inputs each time."""
    following = itertools.cycle(inputs)
    return lambda: function(*next(following))


def summary(samples_ms: list[float]) -> dict[str, float | list[float]]:
    """The record fields of one series of samples."""
    p20, p50, p80 = np.percentile(samples_ms, (20, 50, 80))
    return {
        "time_ms_p20": round(float(p20), 4),
        "time_ms_p50": round(float(p50), 4),
        "time_ms_p80": round(float(p80), 4),
        "samples_ms": [round(sample, 4) for sample in samples_ms],
    }


def rate(count: float, samples_ms: Sequence[float]) -> dict[str, float]:
    """The record fields of what is counted per second: by the median time, and over the samples as in llama-bench."""
    each = count / np.asarray(samples_ms) * 1e3
    return {
        "tokens_per_s": count / float(np.median(samples_ms)) * 1e3,
        "tokens_per_s_mean": float(each.mean()),
        "tokens_per_s_deviation": float(each.std(ddof=1)) if len(each) > 1 else 0.0,
    }


def on_device(run: Run, *, samples: int) -> float | None:
    """Mean milliseconds that a run keeps the device busy, by JAX's profiler; None where that sees no device (a CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(samples):
                jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes if files else ()
        busy = busy_ms(planes)
    return busy / samples if busy else None


def busy_ms(planes: Iterable[Any]) -> float:
    """Milliseconds in which at least one stream of a device works, of a profile's planes."""
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6
