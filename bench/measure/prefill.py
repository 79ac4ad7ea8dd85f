"""`jfa-bench prefill`: the prefill time of whole models, with jfa's attention and with the plain formula.

The prompt is processed in one chunk; the logits after it are part of decode. For comparison only the model's matrix
products are measured as well, interleaved.
"""

import time
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from jfa_models.decoding.language_model import LanguageModel

from ..records import record
from . import machine, models, outcome, timing, used


def measure(
    names: Sequence[str],
    *,
    layers: int | None,
    batch: int,
    seq_lens: Sequence[int],
    implementations: Sequence[str],
    dtype: str | None,
    quantization: str | None = None,
    samples: int,
    clock: timing.Clock = time.perf_counter,
) -> Iterator[record.Record]:
    """A record of the products and one for each implementation of attention, for each model and length.

    speedup: over the reference. share_of_peak: time of the products / this time.
    """
    shared = machine.circumstances() | {"benchmark": "prefill"}
    for name in names:
        about, built, refused = models.build(
            name, layers=layers, dtype=dtype, quantization=quantization, implementations=implementations
        )
        for seq_len in seq_lens:
            case = about | {"batch": batch, "seq_len": seq_len}
            for one in refused or _of_length(built, batch, seq_len, samples, clock):
                yield shared | {"case": case} | one
        built.clear()  # frees memory for the next model


def _of_length(
    built: dict[str, LanguageModel], batch: int, seq_len: int, samples: int, clock: timing.Clock
) -> Iterator[record.Record]:
    first = next(iter(built.values()))
    runs: dict[str, timing.Run] = {models.LIMIT: models.products(first, rows=batch * seq_len, with_head=False)}
    runs |= {name: _step(model, batch, seq_len) for name, model in built.items()}
    found, runs = outcome.tried(runs)
    taken = timing.in_turns(runs, samples=samples, clock=clock)
    medians = {name: float(np.median(ms)) for name, ms in taken.items()}
    limit, plain = (medians.get(name) for name in (models.LIMIT, "reference"))
    for name, own in found.items():
        if name in taken and name in built:
            implementation = models.chosen(name)
            own |= {"config": used.in_model(first, implementation, batch=batch, queries=seq_len, keys=seq_len)}
        if name in taken:
            own |= timing.summary(taken[name]) | timing.rate(batch * seq_len, taken[name])
            own |= {"share_of_peak": limit and limit / medians[name]}
            if name != models.LIMIT:
                own |= {"speedup": plain and plain / medians[name]}
        yield {"implementation": name} | own


def _step(model: LanguageModel, batch: int, seq_len: int) -> timing.Run:
    held = {"cache": model.new_cache(batch=batch, capacity=seq_len)}
    tokens, lengths = np.ones((batch, seq_len), np.int32), np.full(batch, seq_len, np.int32)

    def step():
        cache = held["cache"].truncate(jnp.zeros(batch, jnp.int32))
        hidden = jnp.zeros((batch, model.config.hidden_size), model.dtype)
        held["cache"], hidden = model.steps.prefill(model.params, cache, hidden, tokens, lengths)
        return hidden

    return step
