"""`jfa-bench prefill` and `jfa-bench decode`: whole models beside what their matrix products alone would take.

The products are those of the model's own weights, chained so that each waits for the one before, in the same run and
in turns with the model: their time is the least that a forward pass of that shape could take on this machine.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jfa_models.generate import LanguageModel, prefill_chunks
from jfa_models.sampling import SamplingParams

from . import machine, timing

WARM_UP = 3
HOST_SAMPLES = 200  # of a step that computes nothing; the first dozens are slower

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


def prefill(
    model: LanguageModel, name: str, *, batches: Sequence[int], prompts: Sequence[int], samples: int
) -> Iterator[dict]:
    """A record for the products and one for the model (called name), for each batch and prompt length.

    A prompt enters the cache in the chunks of generate; the logits behind it belong to decoding.
    """
    for batch, prompt in itertools.product(batches, prompts):
        state = model.start([[1] * prompt] * batch, SamplingParams(max_tokens=1))
        rows = state.token.shape[0]
        chunks = list(prefill_chunks([[1] * prompt] * batch, rows))
        held = {"cache": state.cache}

        def step(held=held, rows=rows, chunks=chunks):
            cache = held["cache"].truncate(jnp.zeros(rows, jnp.int32))
            hidden = jnp.zeros((rows, model.config.hidden_size), model.dtype)
            for tokens, lengths in chunks:
                cache, hidden = model.steps.prefill(model.params, cache, hidden, tokens, lengths)
            held["cache"] = cache
            return hidden

        case = _case(model, name, batch, prompt)
        yield from _beside_products("prefill", model, case, step, prompt, samples)


def decode(
    model: LanguageModel, name: str, *, batches: Sequence[int], prompts: Sequence[int], samples: int
) -> Iterator[dict]:
    """The same for one decoded token per row, logits included, behind a prompt of each length."""
    for batch, prompt in itertools.product(batches, prompts):
        # the first token, one step of _host_ms, and those that are timed
        params = SamplingParams(temperature=0.0, max_tokens=2 + WARM_UP + samples, ignore_eos=True)
        state = model.start([[1 + i] * prompt for i in range(batch)], params)
        held = {"state": state}
        host_ms = _host_ms(model, held)

        def step(held=held):
            held["state"], emitted = model.steps.decode(model.params, held["state"])
            return jax.device_get(emitted.sampled.token)

        case = _case(model, name, batch, prompt)
        yield from _beside_products("decode", model, case, step, 1, samples, host_ms)


def _case(model: LanguageModel, name: str, batch: int, prompt: int) -> dict:
    return {"model": name, "dtype": model.dtype.name, "batch": batch, "prompt": prompt}


def _beside_products(
    benchmark: str,
    model: LanguageModel,
    case: dict,
    step: Callable,
    tokens: int,
    samples: int,
    host_ms: float | None = None,
) -> Iterator[dict]:
    batch = case["batch"]
    products = jax.jit(functools.partial(_products, rows=batch * tokens))
    weights = _matrices(model, with_head=benchmark == "decode")
    runs = {"matrix products": lambda: products(weights), "jfa": step}
    taken = timing.in_turns(runs, samples=samples, warm_up=WARM_UP)
    shared = machine.circumstances() | {"benchmark": benchmark, "case": case, "status": "ok", "reason": None}
    limit = float(np.median(taken["matrix products"]))
    for implementation, series in taken.items():
        figures = timing.summary(series)
        median = float(np.median(series))
        own = {
            "implementation": implementation,
            "tokens_per_s": batch * tokens / median * 1e3,
            "share_of_peak": limit / median,
        }
        if implementation == "jfa" and host_ms is not None:
            own["host_ms_per_step"] = host_ms
        yield shared | own | figures


def _matrices(model: LanguageModel, *, with_head: bool) -> list[Array]:
    """The weights of all layers, and the one that makes logits; [out, in]."""
    # in the order of their names: embed, layers, lm_head
    embed, *layers = (x for x in model.params if x.ndim == 2)
    head = embed if model.config.tie_word_embeddings else layers.pop()
    return [*layers, head] if with_head else layers


def _products(weights: Sequence[Array], *, rows: int) -> Array:
    # the precision of jfa_models.layers
    precision = "highest" if weights[0].dtype == jnp.float32 else None
    before = jnp.zeros((), weights[0].dtype)
    for weight in weights:
        # a number that is always 0 and that the compiler cannot know makes each product wait for the one before
        x = jnp.ones((rows, weight.shape[1]), weight.dtype) + before * 0
        before = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision)[0, 0]
    return before


def _host_ms(model: LanguageModel, held: dict) -> float:
    """The median of a step that computes nothing: the same arguments in, the same results out and read."""
    state, _ = model.steps.decode(model.params, held["state"])

    @functools.partial(jax.jit, donate_argnums=(1,))
    def nothing(params, state):
        return lax.optimization_barrier((state, state.token))

    def step():
        held["state"], token = nothing(model.params, held["state"])
        return jax.device_get(token)

    held["state"] = state
    return float(np.median(timing.in_turns({"nothing": step}, samples=HOST_SAMPLES)["nothing"]))
