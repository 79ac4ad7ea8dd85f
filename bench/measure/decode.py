"""`jfa-bench decode`: the time of decode steps, for a batch of rows after a context of a given length.

A step reads every weight and all keys and values once: the bytes per second are compared with the bandwidth of a copy,
measured in the same run. For comparison only the model's matrix products are measured as well, interleaved.
"""

import functools
import itertools
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import lax

from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.params import SamplingParams

from .. import configs
from ..records import record
from . import machine, models, outcome, roofline, timing, used

HOST_SAMPLES = 200  # samples of a step that computes nothing; the first dozens are slower


def measure(
    names: Sequence[str],
    *,
    layers: int | None,
    batches: Sequence[int],
    contexts: Sequence[int],
    implementations: Sequence[str],
    dtype: str | None,
    quantization: str | None = None,
    samples: int,
    clock: timing.Clock = time.perf_counter,
) -> Iterator[record.Record]:
    """A record of the products and one for each implementation of attention, for each model, batch and context.

    share_of_peak: time of the products / this time. share_of_bandwidth: gb_per_s / that of a copy.
    """
    shared = machine.circumstances() | {"benchmark": "decode"}
    for name in names:
        about, built, refused = models.build(
            name, layers=layers, dtype=dtype, quantization=quantization, implementations=implementations
        )
        ceilings = roofline.ceilings(about["dtype"], clock=clock)
        for batch, context in itertools.product(batches, contexts):
            case = about | {"batch": batch, "context": context}
            for one in refused or _of_shape(built, batch, context, samples, ceilings, clock):
                yield shared | {"case": case, "ceilings": ceilings} | one
        built.clear()  # frees memory for the next model


def _of_shape(built, batch, context, samples, ceilings, clock) -> Iterator[record.Record]:
    first = next(iter(built.values()))
    weights = sum(x.nbytes for x in jax.tree.leaves(models.matrices(first, with_head=True)))
    runs: dict[str, timing.Run] = {models.LIMIT: models.products(first, rows=batch, with_head=True)}
    host_ms = {}
    refused: dict[str, record.Record] = {}
    for name, model in built.items():
        try:
            runs[name], host_ms[name] = _step(model, batch, context, samples, clock)
        except outcome.REFUSALS as refusal:
            refused[name] = outcome.of(refusal)
    found, runs = outcome.tried(runs)
    found |= refused
    taken = timing.in_turns(runs, samples=samples, clock=clock)
    limit = float(np.median(taken[models.LIMIT])) if models.LIMIT in taken else None
    read = {name: weights + _kv_bytes(model, batch, context) for name, model in built.items()}
    read[models.LIMIT] = weights
    for name, own in found.items():
        if name in taken:
            median = float(np.median(taken[name]))
            own |= timing.summary(taken[name]) | timing.rate(batch, taken[name])
            own |= {"gb_per_s": read[name] / median / 1e6, "share_of_peak": limit and limit / median}
            own |= {"share_of_bandwidth": own["gb_per_s"] / ceilings["copy_gb_per_s"]}
            if name in built:
                config = used.in_model(first, models.chosen(name), batch=batch, queries=1, keys=context)
                own |= {"host_ms_per_step": host_ms[name], "config": config}
        yield {"implementation": name} | own


def _kv_bytes(model: LanguageModel, batch: int, context: int) -> int:
    """Bytes of keys and values that a step reads."""
    return batch * model.config.cache_elements(context) * model.dtype.itemsize


def _step(model: LanguageModel, batch: int, context: int, samples: int, clock) -> tuple[timing.Run, float]:
    """A run of one step, and its host time in milliseconds."""
    params = SamplingParams(temperature=0.0, max_tokens=configs.decoded_tokens(samples), ignore_eos=True)
    held = {"state": model.start([[1 + i] * context for i in range(batch)], params)}
    host_ms = _host_ms(model, held, clock)

    def step():
        held["state"], emitted = model.steps.decode(model.params, held["state"])
        return jax.device_get(emitted.sampled.token)

    return step, host_ms


def _host_ms(model: LanguageModel, held: dict, clock: timing.Clock) -> float:
    """The median time of a step that computes nothing: the same arguments, and the same results returned and read."""
    state, _ = model.steps.decode(model.params, held["state"])

    @functools.partial(jax.jit, donate_argnums=(1,))
    def nothing(params, state):
        return lax.optimization_barrier((state, state.token))

    def step():
        held["state"], token = nothing(model.params, held["state"])
        return jax.device_get(token)

    held["state"] = state
    return float(np.median(timing.in_turns({"nothing": step}, samples=HOST_SAMPLES, clock=clock)["nothing"]))
