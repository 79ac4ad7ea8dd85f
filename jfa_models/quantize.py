"""Quantizes a model's linear layers, if wanted with scales that protect the channels of large activations."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jfa import quant
from jfa.rules import default_rules
from jfa_models.decoding.language_model import LanguageModel, abstract_decoder, named_leaves
from jfa_models.model.layers import MLP, Normed

CALIBRATION_TOKENS = 2048  # of the text, in rows of _ROW tokens
_ROW = 256
_SEEN = 512  # inputs of a layer that the search compares
_EXPONENTS = np.linspace(0.0, 1.0, 21)


def quantize(
    model: LanguageModel,
    kind: str,
    *,
    group_size: int | None = None,
    symmetric: bool = False,
    calibration: str | None = None,
) -> LanguageModel:
    """A model whose linear layers, except routers and the output layer, are quantized.

    With a calibration text, the channels of a layer's input are first scaled as in AWQ: weights are multiplied by
    mean(|x|) ^ a, and what produces the input is divided by it. For each input, a in [0, 1] is the one with the
    smallest error of the outputs on the text. The result depends on nothing but the arguments.

    Args:
      model: a model with float weights.
      kind: "int8", "int4" or "fp8" (jfa.quant).
      group_size: elements along `in` with a common scale; None: a scale for each row.
      symmetric: int4 without zero points.
      calibration: a text like those that the model will read; its first CALIBRATION_TOKENS tokens are used.

    Raises:
      ValueError: the model is quantized already, the group does not divide a layer, or the text is too short or the
        model has no tokenizer for it.

    Source: arXiv:2306.00978, section 3.2.
    """
    names = tuple(named_leaves(abstract_decoder(model.config, model.dtype)))
    params: dict[str, Any] = dict(zip(names, model.params, strict=True))
    if any(isinstance(x, quant.QuantizedArray) for x in model.params):
        raise ValueError("the model is quantized already: load it with quantization='none'")
    weights = _weights(params)
    for name in weights:
        width = params[name].shape[-1]
        if group_size is not None and width % group_size:
            raise ValueError(f"group size {group_size} does not divide {width}, the inputs of {name}; use another")

    def rounded(x: Float[Array, "*n out in"]) -> quant.QuantizedArray:
        found = quant.quantize_weight(np.asarray(x, np.float32), kind, group_size=group_size, symmetric=symmetric)
        return jax.tree.map(jnp.asarray, found)

    if calibration is not None:
        params = _scaled(model, params, calibration, rounded)
    held = {name: rounded(x) if name in weights else x for name, x in params.items()}
    return LanguageModel(
        decoder=abstract_decoder(model.config, model.dtype),
        params=tuple(held.values()),
        tokenizer=model.tokenizer,
        defaults=model.defaults,
        cache_options=model.cache_options,
    )


def common_group(model: LanguageModel) -> int | None:
    """The first of the group sizes 128, 64 and 32 that divides the inputs of all layers that are quantized, if any."""
    names = named_leaves(abstract_decoder(model.config, model.dtype))
    widths = {names[name].shape[-1] for name in _weights(names)}
    return next((size for size in (128, 64, 32) if not any(width % size for width in widths)), None)


def _weights(names: Iterable[str]) -> list[str]:
    """The parameters that are quantized: weights of linear layers, but not routers and the output layer."""
    weights = [name for name in names if name.startswith("layers.") and name.endswith(".weight")]
    return [name for name in weights if ".router." not in name]


def _scaled(
    model: LanguageModel, params: dict[str, Any], text: str, rounded: Callable[[Array], quant.QuantizedArray]
) -> dict[str, Any]:
    """The parameters of the same function, with every input's channels scaled."""
    params = dict(params)
    for layer, inputs in enumerate(_inputs(model, text)):
        for readers, producers, x in _shared(f"layers.{layer}", params, inputs):
            weights = [params[name] for name in readers if ".router." not in name]
            scales = _best_scales(x, weights, rounded)
            for name in readers:
                params[name] = (params[name] * scales).astype(params[name].dtype)
            for name in producers:
                old = params[name].astype(jnp.float32)
                is_norm = name.endswith("norm.scale")
                one = 1.0 if is_norm and model.config.norm == "rms_plus_one" else 0.0
                divisor = scales[:, None] if old.ndim == 2 else scales
                params[name] = ((old + one) / divisor - one).astype(params[name].dtype)
    return params


def _shared(
    block: str, params: Mapping[str, Any], inputs: Mapping[str, Array]
) -> Iterator[tuple[list[str], list[str], Array]]:
    """For each input of a block: the weights that read it, what it is a multiple of in each channel, and samples."""

    def present(*names: str) -> list[str]:
        return [f"{block}.{name}" for name in names if f"{block}.{name}" in params]

    attention = present(*(f"attention.{name}.weight" for name in "qkv"))
    mlp = present(*(f"mlp.{name}.weight" for name in ("gate", "up", "router")))
    norms = [present(f"{norm}.scale", f"{norm}.bias") for norm in ("attention_norm", "mlp_norm")]
    if norms[1]:
        yield attention, norms[0], inputs["attention"]
        yield mlp, norms[1], inputs["mlp"]
    else:  # a parallel block has one norm
        yield attention + mlp, norms[0], inputs["attention"]
    if "down" in inputs and present("mlp.gate.weight"):
        yield present("mlp.down.weight"), present("mlp.up.weight", "mlp.up.bias"), inputs["down"]


def _inputs(model: LanguageModel, text: str) -> list[dict[str, Float[Array, "n in"]]]:
    """For each block, a sample of the inputs of its attention, its MLP and the MLP's last layer on a text."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer, which a calibration text needs")
    ids = model.tokenizer.encode(text)[:CALIBRATION_TOKENS]
    row = min(_ROW, model.config.context_length)
    if len(ids) < row:
        raise ValueError(f"the calibration text has {len(ids)} tokens, but at least {row} are needed; use a longer one")
    tokens = jnp.asarray(ids[: len(ids) // row * row]).reshape(-1, row)
    abstract = abstract_decoder(model.config, model.dtype)
    graphdef, state = nnx.split(abstract)
    decoder = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), model.params))
    found: list[dict[str, Array]] = []
    for block in map(_untyped, decoder.layers):
        seen: dict[str, Array] = {}
        found.append(seen)
        if isinstance(block.mlp, MLP):
            mlp: Any = block.mlp
            mlp.down = _Recorded(mlp.down, seen, "down")
        block.mlp = _Recorded(block.mlp, seen, "mlp")
        block.attention = _Recorded(block.attention, seen, "attention")
    with default_rules():
        decoder(tokens)
    return found


def _untyped(block: nnx.Module) -> Any:
    return block  # its layers are replaced by others


class _Recorded(nnx.Module):
    """A layer that stores a sample of its inputs."""

    def __init__(self, layer: nnx.Module, seen: dict[str, Array], name: str):
        self.layer = layer
        self.store = functools.partial(seen.__setitem__, name)

    def __call__(self, x: Normed | Float[Array, "b t in"], *rest: Any) -> Any:
        inputs = x.value if isinstance(x, Normed) else x
        rows = inputs.reshape(-1, inputs.shape[-1])
        self.store(rows[:: max(1, len(rows) // _SEEN)].astype(jnp.float32))
        return self.layer(x, *rest)


def _best_scales(
    x: Float[Array, "n in"], weights: Sequence[Array], rounded: Callable[[Array], quant.QuantizedArray]
) -> Float[Array, " in"]:
    """The scales whose rounded weights change the outputs on x least; ones, if none is better."""
    size = jnp.maximum(jnp.mean(jnp.abs(x), axis=0), 1e-5)
    best, least = jnp.ones_like(size), None
    for exponent in _EXPONENTS:
        scales = size**exponent
        scales = scales / jnp.sqrt(scales.max() * scales.min())
        error = 0.0
        for weight in weights:
            wide = weight.astype(jnp.float32)
            change = quant.dequantize(rounded(wide * scales)) / scales - wide
            error += float(jnp.sum(jnp.square(jnp.matmul(x, jnp.swapaxes(change, -1, -2)))))
        if least is None or error < least:
            best, least = scales, error
    return best
