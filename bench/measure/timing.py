"""Timing: warms up until stable, blocks until ready, reports medians; runs to be compared are interleaved, since
machines are noisy."""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import names

# A run is warm when two consecutive calls differ by at most STABLE, or after names.WARM_UP_CALLS or WARM_UP_SECONDS.
STABLE = 0.1
WARM_UP_SECONDS = 2.0

# Larger than the last-level cache of any known processor (MI300X: 256 MiB); and the maximum number of small inputs.
CACHE_BYTES = 512 * 2**20
MOST_COPIES = 256

Run = Callable[[], object]
Clock = Callable[[], float]  # seconds


def in_turns[Name: Hashable](
    runs: Mapping[Name, Run], *, samples: int, settle: float = 0.0, clock: Clock = time.perf_counter
) -> dict[Name, list[float]]:
    """`samples` times in milliseconds of each run after its warm-up, round-robin: noise affects all runs alike.

    settle: for so many seconds a run is called before each of its samples. After another process's turn, a system may
    have all threads of this one on one core.
    """
    taken: dict[Name, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        warm_up(run, clock=clock)
    for _ in range(samples):
        for name, run in runs.items():
            start = clock()
            while settle and clock() - start < settle:
                jax.block_until_ready(run())
            taken[name].append(_milliseconds(run, clock))
    return taken


def warm_up(run: Run, *, clock: Clock = time.perf_counter) -> int:
    """Calls a run until it is stable, at most names.WARM_UP_CALLS times; returns the number of calls."""
    start, before = clock(), _milliseconds(run, clock)
    for calls in range(2, names.WARM_UP_CALLS + 1):
        if clock() - start > WARM_UP_SECONDS:
            return calls - 1
        now = _milliseconds(run, clock)
        if abs(now - before) <= STABLE * before:
            return calls
        before = now
    return names.WARM_UP_CALLS


@dataclasses.dataclass(frozen=True)
class Took:
    """What a run returns that is timed where it happens, in another process."""

    milliseconds: float


def _milliseconds(run: Run, clock: Clock) -> float:
    start = clock()
    found = jax.block_until_ready(run())
    return found.milliseconds if isinstance(found, Took) else (clock() - start) * 1e3


def copies_past_cache(num_bytes: int) -> int:
    """The number of copies of inputs of that size to rotate through, so that the next one is never in a cache."""
    return 1 if num_bytes >= CACHE_BYTES else min(MOST_COPIES, 1 + CACHE_BYTES // max(1, num_bytes))


def rotating(function: Callable, inputs: Sequence[tuple]) -> Run:
    """A run that calls function on several inputs in rotation."""
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
    """The record fields of a count per second: by the median time, and over the samples as in llama-bench."""
    each = count / np.asarray(samples_ms) * 1e3
    return {
        "tokens_per_s": count / float(np.median(samples_ms)) * 1e3,
        "tokens_per_s_mean": float(each.mean()),
        "tokens_per_s_deviation": float(each.std(ddof=1)) if len(each) > 1 else 0.0,
    }


def on_device(run: Run, *, samples: int) -> float | None:
    """Mean device time of a run in milliseconds, from JAX's profiler; None if it sees no device (CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(samples):
                jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(files[0])).planes if files else ()
        busy = busy_ms(planes)
    return busy / samples if busy else None


def busy_ms(planes: Iterable[Any]) -> float:
    """Milliseconds during which at least one stream of a device is busy, from a profile's planes."""
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
