"""The two ceilings of a machine, measured in the same run: matrix products and memory copies."""

import functools
import time

import jax
import jax.numpy as jnp

from . import outcome, timing

SAMPLES = 10


def ceilings(dtype: str, *, clock: timing.Clock = time.perf_counter) -> dict[str, float | None]:
    """matrix_tflops of a square product in a dtype, and copy_gb_per_s, counting read and written bytes.

    Each is the best of its samples, so that other processes do not lower the ceiling. matrix_tflops is None if the
    machine has no product in the dtype. float32 products have the same precision as in the kernels.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, num_bytes = (2048, 256 * 2**20) if on_cpu else (8192, 2**30)
    x = jnp.ones((size, size), dtype)
    precision = "highest" if dtype == "float32" else None
    product = functools.partial(jax.jit(lambda a, b: jnp.dot(a, b, precision=precision)), x, x)
    # in place: on a CPU, fresh memory costs more than the copy
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    held = [jnp.zeros(num_bytes // 4, jnp.float32)]

    def copy():
        held[0] = add(held[0])
        return held[0]

    runs: dict[str, timing.Run] = {"matrix": product, "copy": copy}
    try:
        jax.block_until_ready(product())
    except outcome.REFUSALS:
        del runs["matrix"]
    taken = {name: min(ms) for name, ms in timing.in_turns(runs, samples=SAMPLES, clock=clock).items()}
    return {
        "matrix_tflops": 2 * size**3 / taken["matrix"] / 1e9 if "matrix" in taken else None,
        "copy_gb_per_s": 2 * held[0].nbytes / taken["copy"] / 1e6,
    }
