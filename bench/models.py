"""`jfa-bench prefill` and `jfa-bench decode`: whole models beside what their matrix products alone would take.

The products are those of the model's own weights, chained so that each waits for the one before, in the same run and
in turns with the model: their time is the least that a forward pass of that shape could take on this machine.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jfa_bench import record, timing
from jfa_models.generate import LanguageModel
from jfa_models.sampling import SamplingParams

COLUMNS = {
    "benchmark": "benchmark",
    "case.batch": "batch",
    "case.prompt": "prompt",
    "implementation": "what",
    "time_ms_p50": "ms",
    "time_ms_p20": "p20",
    "time_ms_p80": "p80",
    "tokens_per_s": "tokens/s",
    "share_of_peak": "of limit",
    "host_ms_per_step": "host ms",
}


def prefill(model: LanguageModel, *, batches: Sequence[int], prompts: Sequence[int], samples: int) -> Iterator[dict]:
    """A record for the products and one for the model, for each batch and prompt length."""
    for batch, prompt in itertools.product(batches, prompts):
        tokens = np.ones((batch, prompt), np.int32)
        lengths = np.full(batch, prompt, np.int32)
        held: dict[str, Any] = {"cache": model.new_cache(batch=batch, capacity=prompt)}

        def step(held=held, batch=batch, tokens=tokens, lengths=lengths):
            cache, hidden = held["cache"], jnp.zeros((batch, model.config.hidden_size), model.dtype)
            cache = cache.truncate(jnp.zeros(batch, jnp.int32))
            held["cache"], hidden = model.steps.prefill(model.params, cache, hidden, tokens, lengths)
            return hidden

        yield from _beside_products("prefill", model, {"batch": batch, "prompt": prompt}, step, prompt, samples, 0.0)


def decode(model: LanguageModel, *, batches: Sequence[int], prompts: Sequence[int], samples: int) -> Iterator[dict]:
    """The same for one decoded token per row, behind a prompt of each length."""
    for batch, prompt in itertools.product(batches, prompts):
        requests = [
            model._request(
                i, [1 + i] * prompt, SamplingParams(temperature=0.0, max_tokens=samples + 64, ignore_eos=True), 0
            )
            for i in range(batch)
        ]
        cache = model.new_cache(batch=batch, capacity=prompt + samples + 64)
        state, _ = model._prefill(requests, cache, [request.prompt_ids for request in requests])
        held = {"state": state}
        host_ms = _host_ms(model, held, samples)

        def step(held=held):
            held["state"], emitted = model.steps.decode(model.params, held["state"])
            return jax.device_get(emitted.sampled.token)

        yield from _beside_products("decode", model, {"batch": batch, "prompt": prompt}, step, 1, samples, host_ms)


def _beside_products(
    benchmark: str, model: LanguageModel, case: dict, step: Callable, tokens: int, samples: int, host_ms: float
) -> Iterator[dict]:
    batch = case["batch"]
    # prefill needs the logits of one token per row, so its head is a product of batch rows
    products = jax.jit(functools.partial(_products, rows=batch * tokens, head_rows=batch))
    weights = _matrices(model)
    taken = timing.in_turns({"matrix products": lambda: products(*weights), "jfa": step}, samples=samples)
    shared = record.circumstances() | {"benchmark": benchmark, "case": case, "status": "ok"}
    limit = float(np.median(taken["matrix products"]))
    for name, series in taken.items():
        figures = timing.summary(series)
        median = float(np.median(series))
        own = {"implementation": name, "tokens_per_s": batch * tokens / median * 1e3, "share_of_peak": limit / median}
        if name == "jfa" and host_ms:
            own["host_ms_per_step"] = host_ms
        yield shared | own | figures


def _matrices(model: LanguageModel) -> tuple[tuple[Array, ...], Array]:
    """All weights of the layers, and the one that makes logits; [out, in]."""
    matrices = [x for x in model.params if x.ndim == 2]
    head = next(x for x in reversed(matrices) if x.shape[0] == model.config.vocab_size)
    return tuple(x for x in matrices if x.shape[0] != model.config.vocab_size), head


def _products(weights: tuple[Array, ...], head: Array, *, rows: int, head_rows: int) -> Array:
    def times(weight, rows, before):
        # a number that is always 0 and that the compiler cannot know makes each product wait for the one before
        x = jnp.ones((rows, weight.shape[1]), weight.dtype) + before * 0
        return lax.dot_general(x, weight, (((1,), (1,)), ((), ())))[0, 0]

    before = jnp.zeros((), head.dtype)
    for weight in weights:
        before = times(weight, rows, before)
    return times(head, head_rows, before)


def _host_ms(model: LanguageModel, held: dict, samples: int) -> float:
    """The median of a step that computes nothing: the same arguments in, the same results out and read."""
    state, emitted = model.steps.decode(model.params, held["state"])

    @functools.partial(jax.jit, donate_argnums=(1,))
    def nothing(params, state):
        return lax.optimization_barrier((state, state.token))

    def step():
        held["state"], token = nothing(model.params, held["state"])
        return jax.device_get(token)

    held["state"] = state
    return float(np.median(timing.in_turns({"nothing": step}, samples=samples)["nothing"]))
