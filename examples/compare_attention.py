"""Compares the speed of jfa's attention with jax.nn's on this machine, and plots both.

    python examples/compare_attention.py --lengths 512 1024 2048 --picture attention.png

It needs matplotlib. For a thorough benchmark use `jfa-bench attention`.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import jfa

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
parser.add_argument("--dtype", default="float32" if jax.default_backend() == "cpu" else "bfloat16")
parser.add_argument("--picture", default="attention.png")
args = parser.parse_args()

IMPLEMENTATIONS = {"jfa": jfa.dot_product_attention, "jax.nn": jax.nn.dot_product_attention}


def milliseconds(attend, *arrays) -> float:
    """The median of ten calls of a compiled function."""
    run = jax.jit(functools.partial(attend, is_causal=True))
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


found = {name: [] for name in IMPLEMENTATIONS}
for n in args.lengths:
    query, key, value = (jax.random.normal(jax.random.key(i), (1, n, 8, 64), jnp.dtype(args.dtype)) for i in range(3))
    for name, attend in IMPLEMENTATIONS.items():
        found[name].append(milliseconds(attend, query, key, value))
    print(f"{n:6} tokens: " + ", ".join(f"{name} {times[-1]:.2f} ms" for name, times in found.items()))

for name, times in found.items():
    plt.plot(args.lengths, times, marker="o", label=name)
plt.xlabel("tokens")
plt.ylabel("milliseconds, the median of ten")
plt.title(f"Causal attention, 8 heads of 64, {args.dtype}, {jax.devices()[0].device_kind}")
plt.legend()
plt.savefig(args.picture)
print(f"{args.picture} saved")
