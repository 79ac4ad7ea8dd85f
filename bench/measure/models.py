"""Models by name, and the time of their matrix products only, with which `prefill` and `decode` are compared.

Weights are random: a name only defines shapes, and nothing is downloaded.
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
    """(fields of a case, a model for each implementation of attention, records of errors if memory is insufficient).

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
    """The implementation argument of the ops; None: the ops choose."""
    return None if implementation == "jfa" else implementation


def _check_room(config: DecoderConfig, itemsize: int) -> None:
    """Raises MemoryError if a CPU lacks the memory: there, unlike on a GPU, the process would be killed."""
    free = machine.free_bytes() if jax.default_backend() == "cpu" else None
    needs = 2 * config.num_params * itemsize  # building a model temporarily needs a second copy
    if free is not None and needs > free:
        raise MemoryError(f"needs {needs / 2**30:.1f} GiB for its weights, {free / 2**30:.1f} are free; try --layers")


def matrices(model: LanguageModel, *, with_head: bool) -> list[Array]:
    """The weights of all layers, without experts, and optionally that of the logits; [out, in]."""
    # params are ordered by name: embed, layers, lm_head
    embed, *layers = (x for x in model.params if x.ndim == 2)
    head = embed if model.config.tie_word_embeddings else layers.pop()
    return [*layers, head] if with_head else layers


def products(weights: Sequence[Array], *, rows: int) -> Callable[[], object]:
    """A run of all products of the weights with this number of rows, executed one after another: the lower limit of a
    forward pass of that shape on this machine."""
    run = jax.jit(functools.partial(_products, rows=rows))
    return lambda: run(weights)


def _products(weights: Sequence[Array], *, rows: int) -> Array:
    # the precision of jfa_models.model.layers
    precision = "highest" if weights[0].dtype == jnp.float32 else None
    before = jnp.zeros((), weights[0].dtype)
    for weight in weights:
        # adding a 0 that the compiler cannot know makes each product depend on the one before
        x = jnp.ones((rows, weight.shape[1]), weight.dtype) + before * 0
        before = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), precision=precision)[0, 0]
    return before
