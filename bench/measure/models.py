"""Models by name, and the time of their matrix products only, with which `prefill` and `decode` are compared.

Weights are random: a name only defines shapes, and nothing is downloaded.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jfa import QuantizedArray
from jfa.products import times_rows
from jfa_models.decoding.language_model import LanguageModel, compute_dtype
from jfa_models.model.config import DecoderConfig

from .. import configs, names
from ..records import record
from . import machine, outcome

Weight = Array | QuantizedArray
LIMIT = names.MATRIX_PRODUCTS


def build(
    name: str, *, layers: int | None, dtype: str | None, quantization: str | None, implementations: Sequence[str]
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
        "quantization": quantization,
    }
    built: dict[str, LanguageModel] = {}
    try:
        _check_room(config, compute_dtype(dtype).itemsize)
        for implementation in implementations:
            model = LanguageModel.random(
                config, dtype=dtype, quantization=quantization, attention_implementation=chosen(implementation)
            )
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


def matrices(model: LanguageModel, *, with_head: bool) -> list[Weight]:
    """The weights of all layers, without experts, and optionally that of the logits; [out, in]."""
    # params are ordered by name: embed, layers, lm_head
    embed, *layers = (x for x in model.params if len(x.shape) == 2)
    head = embed if model.config.tie_word_embeddings else layers.pop()
    return [*layers, head] if with_head else layers


def products(model: LanguageModel, *, rows: int, with_head: bool) -> Callable[[], object]:
    """A run of all products of a model with this number of rows, executed one after another: the lower limit of a
    forward pass of that shape on this machine."""
    run = jax.jit(functools.partial(_products, rows=rows, dtype=model.dtype))
    weights = matrices(model, with_head=with_head)
    return lambda: run(weights)


def _products(weights: Sequence[Weight], *, rows: int, dtype: DTypeLike) -> Array:
    before = jnp.zeros((), dtype)
    for weight in weights:
        # adding a 0 that the compiler cannot know makes each product depend on the one before
        x = jnp.ones((rows, weight.shape[1]), dtype) + before * 0
        before = times_rows(x, weight)[0, 0]
    return before
