"""`jfa-bench attention`: the op on this machine beside the plain formula and jax.nn's, forward and with its gradient.

FLOP are those of FlashAttention's papers: 4 b n^2 h d forward, 2.5 times that for the gradient, half if causal.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa

from . import record, timing

IMPLEMENTATIONS = ("reference", "xla", "triton", "jax.nn")
DIRECTIONS = ("forward", "both")  # both: output and gradient

COLUMNS = {
    "case.length": "length",
    "case.direction": "direction",
    "implementation": "what",
    "status": "status",
    "time_ms_p50": "ms",
    "time_ms_p20": "p20",
    "time_ms_p80": "p80",
    "tflops": "TFLOP/s",
    "peak_mib": "MiB",
    "speedup": "x plain",
}


def measure(
    *,
    batch: int,
    lengths: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    dtype: str,
    causal: bool,
    implementations: Sequence[str],
    samples: int,
) -> Iterator[dict]:
    """A record for each length, direction and implementation; those of one length are measured in turns.

    heads: of queries and of keys. peak_bytes is what the compiled program holds beside its arguments.
    """
    shared = record.circumstances() | {"benchmark": "attention"}
    for length, direction in itertools.product(lengths, DIRECTIONS):
        case = {"batch": batch, "length": length, "heads": heads[0], "kv_heads": heads[1], "head_dim": head_dim}
        case |= {"dtype": dtype, "causal": causal, "direction": direction}
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (
            jax.random.normal(key, (batch, length, n, head_dim), jnp.float32).astype(dtype)
            for key, n in zip(keys, (heads[0], heads[1], heads[1]), strict=True)
        )
        runs: dict[str, Callable] = {}
        found: dict[str, dict] = {}
        for name in implementations:
            try:
                program = _program(name, direction, causal).lower(q, k, v).compile()
                jax.block_until_ready(program(q, k, v))
            except jfa.UnsupportedError as error:
                found[name] = {"status": "unsupported", "reason": str(error).splitlines()[0]}
                continue
            except jax.errors.JaxRuntimeError as error:
                status = "oom" if "RESOURCE_EXHAUSTED" in str(error) else "unsupported"
                found[name] = {"status": status, "reason": str(error).splitlines()[0]}
                continue
            memory = program.memory_analysis()
            held = memory.temp_size_in_bytes if memory else 0
            found[name] = {"status": "ok", "reason": None, "peak_bytes": held}
            runs[name] = functools.partial(program, q, k, v)
        flop = (
            4
            * batch
            * length**2
            * heads[0]
            * head_dim
            * (0.5 if causal else 1)
            * (1 if direction == "forward" else 3.5)
        )
        taken = timing.in_turns(runs, samples=samples)
        plain = float(np.median(taken["reference"])) if "reference" in taken else None
        for name, figures in found.items():
            own = {"case": case, "implementation": name, **figures}
            if name in taken:
                median = float(np.median(taken[name]))
                own |= timing.summary(taken[name]) | {"tflops": flop / median / 1e9}
                own |= {"peak_mib": figures["peak_bytes"] / 2**20, "speedup": plain and plain / median}
            yield shared | own


def _program(name: Any, direction: str, causal: bool):
    def attend(q, k, v):
        if name == "jax.nn":
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        return jfa.dot_product_attention(q, k, v, is_causal=causal, implementation=name)

    if direction == "forward":
        return jax.jit(attend)

    def both(q, k, v):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(jnp.ones_like(out))

    return jax.jit(both)
