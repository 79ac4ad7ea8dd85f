"""Whole models by name, and what their matrix products alone would take: `prefill` and `decode` measure beside it.

Weights are random: a name is a shape here, and nothing is downloaded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jfa_models.decoding.language_model import LanguageModel, compute_dtype
from jfa_models.model.config import DecoderConfig

from .. import configs, names
from ..records import record
from . import machine, outcome

LIMIT = names.MATRIX_PRODUCTS


def build(
    name: str, *, layers: int | None, dtype: str | None, implementations: Sequence[str]
) -> tuple[dict[str, Any], dict[str, LanguageModel], list[record.Record]]:
    """The fields of a case that say what is measured, and a model for each implementation of attention; where there is
    no room for them, what their records say instead.

    The models share their weights.
    """
    config, dtype_name = configs.config_of(name, layers), compute_dtype(dtype).name
    about = {
        "model": name,
        "layers": config.num_layers,
        "of_layers": configs.config_of(name).num_layers,
        "dtype": dtype_name,
    }
    built: dict[str, LanguageModel] = {}
    try:
        _check_room(config, compute_dtype(dtype).itemsize)
        for implementation in implementations:
            model = LanguageModel.random(config, dtype=dtype, attention_implementation=chosen(implementation))
            model.params = next(iter(built.values()), model).params
            built[implementation] = model
    except (MemoryError, jax.errors.JaxRuntimeError) as refusal:
        why = outcome.of(refusal)
        return about, {}, [{"implementation": each} | why for each in (LIMIT, *implementations)]
    return about, built, []


def chosen(implementation: str) -> str | None:
    """What the ops are asked for by name; None: they choose."""
    return None if implementation == "jfa" else implementation


def _check_room(config: DecoderConfig, itemsize: int) -> None:
    """Raises MemoryError where a CPU has no room: there, unlike on a GPU, the whole process would end."""
    free = machine.free_bytes() if jax.default_backend() == "cpu" else None
    needs = 2 * config.num_params * itemsize  # a second copy for a moment, while a model is built
    if free is not None and needs > free:
        raise MemoryError(f"needs {needs / 2**30:.1f} GiB for its weights, {free / 2**30:.1f} are free; try --layers")


def matrices(model: LanguageModel, *, with_head: bool) -> list[Array]:
    """The weights of all layers, and the one that makes logits; [out, in]. Experts are not among them."""
    # in the order of their names: embed, layers, lm_head
    embed, *layers = (x for x in model.params if x.ndim == 2)
    head = embed if model.config.tie_word_embeddings else layers.pop()
    return [*layers, head] if with_head else layers


def products(weights: Sequence[Array], *, rows: int) -> Callable[[], object]:
    """All products of so many rows with the weights, chained so that each waits for the one before: the least that a
    forward pass of that shape could take on this machine."""
    run = jax.jit(functools.partial(_products, rows=rows))
    return lambda: run(weights)


def _products(weights: Sequence[Array], *, rows: int) -> Array:
    # the precision of jfa_models.model.layers
    precision = "highest" if weights[0].dtype == jnp.float32 else None
    before = jnp.zeros((), weights[0].dtype)
    for weight in weights:
        # a number that is always 0 and that the compiler cannot know makes each product wait for the one before
        x = jnp.ones((rows, weight.shape[1]), weight.dtype) + before * 0
        before = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision)[0, 0]
    return before
