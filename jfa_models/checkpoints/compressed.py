"""Writes quantized weights as compressed-tensors stores them: the tensors of each, and quantization_config.

Source: compressors/pack_quantized and naive_quantized of compressed-tensors 0.20.0.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import DTypeLike

from jfa import QuantizedArray
from jfa_models.checkpoints.layouts import pack
from jfa_models.checkpoints.quantized import from_halves

_WAY_OUT = "load the model with quantization='none' or 'int8' to save it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What quantization_config says about a weight; group_size None: a scale for each row."""

    kind: str  # a key of jfa.quant.KINDS
    group_size: int | None
    symmetric: bool
    rounds_inputs: bool

    @property
    def format(self) -> str:
        """As compressed-tensors chooses it: weights in words unless they are multiplied as they are."""
        return "float-quantized" if self.kind == "fp8" else "int-quantized" if self.rounds_inputs else "pack-quantized"


def form_of(weights: Mapping[str, Array | QuantizedArray]) -> Form | None:
    """The form of weights, by our names, that are written as one; None if they are floats.

    Raises:
      ValueError: the format cannot represent one of them exactly, or they differ.
    """
    forms = {name: _form_of(name, x) if isinstance(x, QuantizedArray) else None for name, x in weights.items()}
    if len(set(forms.values())) > 1:
        raise ValueError(
            f"{' and '.join(forms)} are written as one tensor, but are quantized differently; quantize them alike, or "
            + _WAY_OUT
        )
    return next(iter(forms.values()))


def _form_of(name: str, weight: QuantizedArray) -> Form:
    width, group, rounds = weight.shape[-1], weight.group_size, weight.rounds_inputs == 1
    reasons = {
        "minima, but compressed-tensors has only zero points": weight.minima is not None,
        "the levels -7.5 to 7.5, but compressed-tensors has integers: quantize it with jfa.quant.quantize_weight": (
            weight.kind == "int4" and weight.zeros is None
        ),
        f"groups of {group}, which must divide its width {width}": group is not None and width % group != 0,
        "rounds_inputs and groups, but inputs are rounded only where each row has one scale": (
            rounds and group is not None
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name} cannot be saved as it is quantized: it has {reason}; {_WAY_OUT}")
    four_bits = weight.kind == "int4"
    return Form(
        kind=weight.kind,
        group_size=None if four_bits and group == width else group,  # rows of 4-bit numbers are read as one group
        symmetric=weight.zeros is None or (four_bits and bool(jnp.all(weight.zeros == 8))),
        rounds_inputs=rounds,
    )


# shape, dtype, and a function of the arrays that are concatenated by rows
Written = tuple[tuple[int, ...], DTypeLike, Callable[[Sequence[Any]], np.ndarray]]


def tensors_of(form: Form, weights: Sequence[Any]) -> dict[str, Written]:
    """The tensors of a weight of which `weights` are rows; of one expert, if they are stacks."""
    rows, width = sum(weight.shape[-2] for weight in weights), weights[0].shape[-1]
    groups = 1 if form.group_size is None else width // form.group_size
    per_word = 8 if form.kind == "int4" else 4
    tensors: dict[str, Written] = {
        "weight_scale": ((rows, groups), weights[0].scales.dtype, functools.partial(_columns, name="scales"))
    }
    if form.format == "pack-quantized":
        tensors["weight_packed"] = ((rows, -(-width // per_word)), np.int32, _words)
        tensors["weight_shape"] = ((2,), np.int64, lambda _: np.array([rows, width], np.int64))
        zeros = ((-(-rows // per_word), groups), np.int32, _zero_words)
    else:
        tensors["weight"] = ((rows, width), weights[0].values.dtype, functools.partial(_columns, name="values"))
        zeros = ((rows, groups), np.int8, functools.partial(_columns, name="zeros"))
    return tensors | ({} if form.symmetric else {"weight_zero_point": zeros})


def quantization_config(forms: Mapping[str, Form | None]) -> dict[str, Any]:
    """quantization_config for the linear layers of a model by name, None for those that are not quantized."""
    quantized = {form: [module for module in forms if forms[module] == form] for form in forms.values() if form}
    if not quantized:
        return {}
    formats = {form.format for form in quantized}
    single = len(quantized) == 1
    groups = {
        f"group_{i}": _group(form) | {"targets": ["Linear"] if single else modules}
        for i, (form, modules) in enumerate(quantized.items())
    }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": groups,
            "ignore": [module for module, form in forms.items() if form is None],
        }
    }


def _group(form: Form) -> dict[str, Any]:
    weights = {
        "num_bits": 4 if form.kind == "int4" else 8,
        "type": "float" if form.kind == "fp8" else "int",
        "symmetric": form.symmetric,
        "strategy": "channel" if form.group_size is None else "group",
        "group_size": form.group_size,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {"format": form.format, "weights": weights, "input_activations": inputs if form.rounds_inputs else None}


def _columns(weights: Sequence[QuantizedArray], name: str) -> np.ndarray:
    """A field of weights that are concatenated by rows; [rows, 1] if it has one number per row."""
    rows = joined([getattr(weight, name) for weight in weights])
    return rows.reshape(len(rows), -1)


def joined(arrays: Sequence[Array], axis: int = 0) -> np.ndarray:
    """Arrays on the host, concatenated by rows."""
    return np.asarray(arrays[0]) if len(arrays) == 1 else np.concatenate([np.asarray(x) for x in arrays], axis=axis)


def _fields(numbers: np.ndarray) -> np.ndarray:
    """Unsigned integers: 8-bit ones 128 larger."""
    return numbers if numbers.dtype == np.uint8 else numbers.view(np.uint8) ^ 128


def _words(weights: Sequence[QuantizedArray]) -> np.ndarray:
    values, four_bits = _columns(weights, "values"), weights[0].kind == "int4"
    if four_bits:
        values = from_halves(values, weights[0].group_size or weights[0].shape[-1])
    return pack(_fields(values), 4 if four_bits else 8)


def _zero_words(weights: Sequence[QuantizedArray]) -> np.ndarray:
    fields = _fields(_columns(weights, "zeros"))
    return pack(fields.T, 4 if weights[0].kind == "int4" else 8).T
