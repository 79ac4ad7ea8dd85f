"""Clocks. Warm up, block until ready, medians; what is compared is measured in turns, since machines are noisy."""

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def in_turns(runs: Mapping[str, Callable[[], object]], *, samples: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Milliseconds of each run, `samples` of them, taken round-robin so that a busy moment hits every run alike."""
    taken = {name: [] for name in runs}
    for turn in range(-warm_up, samples):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn >= 0:
                taken[name].append((time.perf_counter() - start) * 1e3)
    return taken


def summary(samples_ms: list[float]) -> dict[str, float | list[float]]:
    """The record fields of one series of samples."""
    p20, p50, p80 = np.percentile(samples_ms, (20, 50, 80))
    return {
        "time_ms_p20": round(float(p20), 4),
        "time_ms_p50": round(float(p50), 4),
        "time_ms_p80": round(float(p80), 4),
        "samples_ms": [round(sample, 4) for sample in samples_ms],
    }
