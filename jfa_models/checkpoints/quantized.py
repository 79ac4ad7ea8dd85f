"""Quantized weights in safetensors: compressed-tensors, GPTQ, AWQ and 8-bit floats with a scale for each block.

A quantized weight is stored as several tensors: its numbers, their scales, perhaps zero points. Here they become one
QuantizedTensor with the name that the weight would have. It is read as floats or, number by number, as QuantizedArray.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, Shaped, UInt

from jfa import QuantizedArray
from jfa_models.checkpoints.layouts import LAYOUTS, REQUIRED, Parts, StoredWeight, grid_of, load, signed
from jfa_models.checkpoints.schemes import Scheme, schemes_of
from jfa_models.checkpoints.tensors import StackedTensors, StoredTensor, aligned, damaged
from jfa_models.model.config import DecoderConfig

# Tensors beside a weight that are part of it, and those of roundings that are not done: of activations and caches.
_PARTS = ("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape")
_PARTS += ("weight_g_idx", "weight_global_scale", "qweight", "scales", "qzeros", "g_idx")
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale", "output_scale")
_UNUSED += ("output_zero_point", "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point")

_CHUNK_ELEMENTS = 1 << 17  # as in tensors.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """A quantized weight [out, in], or some of its rows."""

    name: str  # in the file: that of its numbers
    shape: tuple[int, int]
    scheme: Scheme
    parts: Parts = dataclasses.field(repr=False)
    first_row: int = 0

    @property
    def encoding(self) -> str:
        """ "int4 (compressed-tensors)": for display."""
        kind = self.scheme.layout if self.scheme.layout in ("int8", "fp8", "mxfp4") else f"int{self.scheme.bits}"
        return kind if kind == self.scheme.method else f"{kind} ({self.scheme.method})"

    @property
    def is_quantized(self) -> bool:
        """Yes."""
        return True

    @property
    def num_bytes(self) -> int:
        """Bytes in the file, of these rows."""
        return sum(part.num_bytes for part in self.parts.values()) * self.shape[0] // self._stored.shape[0]

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """A range of its rows, as a separate tensor."""
        width = self.shape[1]
        return dataclasses.replace(self, shape=(stop - start, width), first_row=self.first_row + start)

    def columns(self, start: int, stop: int) -> None:
        """None: its columns are read together."""

    def read(self, dtype: Any) -> Shaped[np.ndarray, "out in"]:
        """Reads and dequantizes it: (number - zero point) * scale in float32, rounded once to dtype."""
        out = aligned(self.shape, dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Shaped[np.ndarray, "out in"]) -> None:
        """Reads and dequantizes it into `out`, which has its shape."""
        for where, values in self.chunks():
            out[where] = values

    def chunks(self) -> Iterator[tuple[slice, Float[np.ndarray, "rows in"]]]:
        """Yields (row numbers, dequantized rows) chunk by chunk."""
        scales, zeros = self._per_row()
        groups = self._group_of_column()
        for where, numbers in self._numbers():
            values = numbers.astype(np.float32)
            if zeros is not None:
                values -= zeros[where].astype(np.float32)[:, groups]
            values *= scales[where].astype(np.float32)[:, groups]
            yield where, values

    def read_quantized(self) -> QuantizedArray | None:
        """Reads it as it was quantized; scales of blocks are repeated for each row.

        4-bit numbers whose groups cannot be stored in halves (an odd group_size, or a shorter last group) become int8.
        None: QuantizedArray cannot represent it, since the columns of a group are not next to each other (GPTQ with
        act-order).
        """
        num_rows, width = self.shape
        group = self.scheme.block[1] or width
        if not np.array_equal(self._group_of_column(), np.arange(width) // group):
            return None
        scales, zeros = self._per_row()
        four_bits = zeros is not None and zeros.dtype == np.uint8
        halves = four_bits and group % 2 == 0 and width % group == 0
        dtype = np.uint8 if halves else ml_dtypes.float8_e4m3fn if self.scheme.layout == "fp8" else np.int8
        values = aligned((num_rows, width // 2 if halves else width), dtype)
        for where, numbers in self._numbers():
            values[where] = to_halves(numbers, group) if halves else signed(numbers) if four_bits else numbers
        if zeros is not None and four_bits and not halves:
            zeros = signed(zeros)
        one_group = self.scheme.block[1] is None and not halves
        arrays: dict[str, Any] = dict(values=values)
        for name, array in (("scales", scales), ("zeros", zeros)):
            if array is not None:
                arrays[name] = aligned(array.shape[:1] if one_group else array.shape, array.dtype)
                arrays[name][...] = array[:, 0] if one_group else array
        return QuantizedArray(
            **arrays, group_size=None if one_group else group, rounds_inputs=int(self.scheme.rounds_inputs)
        )

    def _numbers(self) -> Iterator[tuple[slice, Shaped[np.ndarray, "rows in"]]]:
        num_rows, width = self.shape
        step = max(1, _CHUNK_ELEMENTS // max(1, width))
        read = self._stored.numbers()
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            yield slice(start, stop), read(self.first_row + start, self.first_row + stop)

    def _per_row(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points for each row and group of columns."""
        rows = np.arange(self.first_row, self.first_row + self.shape[0]) // (
            self.scheme.block[0] or self._stored.shape[0]
        )
        zeros = self._stored.zeros()
        return self._stored.scales()[rows], None if zeros is None else zeros[rows]

    def _group_of_column(self) -> np.ndarray:
        if order := self.parts.get("g_idx"):
            groups = load(order)
            if groups.min() < 0 or groups.max() >= grid_of(self._stored.shape, self.scheme)[1]:
                raise damaged(order.file, f"{order.name} has a group that does not exist")
            return groups
        return np.arange(self.shape[1]) // (self.scheme.block[1] or self.shape[1])

    @functools.cached_property
    def _stored(self) -> "StoredWeight":
        return LAYOUTS[self.scheme.layout](self.parts, self.scheme)


def to_halves(numbers: UInt[np.ndarray, "rows in"], group_size: int) -> UInt[np.ndarray, "rows half"]:
    """4-bit numbers, two per byte, as QuantizedArray stores them."""
    grouped = numbers.reshape(len(numbers), -1, 2, group_size // 2)
    return (grouped[:, :, 0] | grouped[:, :, 1] << 4).reshape(len(numbers), -1)


def from_halves(values: UInt[np.ndarray, "rows half"], group_size: int) -> UInt[np.ndarray, "rows in"]:
    """The inverse of to_halves."""
    grouped = values.reshape(len(values), -1, 1, group_size // 2)
    return np.concatenate([grouped & 15, grouped >> 4], axis=2).reshape(len(values), -1)


def join_quantized(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> dict[str, StoredTensor | QuantizedTensor]:
    """The tensors of a checkpoint by name, those of each quantized weight as one QuantizedTensor.

    Args:
      config: config.json.

    Raises:
      ValueError: tensors of a quantized weight are missing or do not fit together, or its quantization is not
        supported.
    """
    scheme_of = schemes_of(config)
    modules: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind in _PARTS or (scheme_of is not None and kind == "weight" and tensor.encoding in ("I8", "F8_E4M3")):
            modules[module] = {}
    tensors: dict[str, StoredTensor | QuantizedTensor] = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if module in modules and kind in (*_PARTS, "weight"):
            modules[module][kind] = tensor
        elif scheme_of is None or kind not in _UNUSED:
            tensors[name] = tensor
    for module, parts in modules.items():
        if scheme_of is None:
            raise ValueError(
                f"{next(iter(parts.values())).file}: {module} is quantized ({', '.join(sorted(parts))}), but "
                "config.json has no quantization_config; use the config.json that belongs to these weights"
            )
        tensors[f"{module}.weight"] = _joined(module, parts, scheme_of(module))
    return tensors


def without_padding(
    tensors: Mapping[str, StoredTensor | QuantizedTensor | StackedTensors], config: DecoderConfig
) -> dict[str, StoredTensor | QuantizedTensor | StackedTensors]:
    """Without the zero biases that GPTQ files of older programs have in layers of models without biases."""
    biased = {"attention.o": config.out_bias, "attention": config.qkv_bias, "mlp": config.mlp_bias}
    biased |= {"lm_head": config.head_bias}

    def is_padding(name: str) -> bool:
        module, _, kind = name.rpartition(".")
        weight, bias = tensors.get(f"{module}.weight"), tensors[name]
        if kind != "bias" or not isinstance(weight, QuantizedTensor) or "qweight" not in weight.parts:
            return False
        expected = next((has for part, has in biased.items() if part in module), True)
        return not expected and not bias.read(np.float32).any()

    return {name: tensor for name, tensor in tensors.items() if not is_padding(name)}


def _joined(module: str, parts: dict[str, StoredTensor], scheme: Scheme) -> QuantizedTensor:
    if "weight_scale_inv" in parts:
        parts["weight_scale"] = parts.pop("weight_scale_inv")
    required = REQUIRED[scheme.layout]
    _check_present(module, parts, required, scheme)
    stored = LAYOUTS[scheme.layout](parts, scheme)
    _check_present(module, parts, stored.expected, scheme)
    where = f"{parts[required[0]].file}: {module}"
    if extra := sorted(parts.keys() - stored.expected.keys()):
        raise ValueError(
            f"{where} has {', '.join(extra)}, which cannot be used with its quantization_config ({scheme.method}, "
            f"layout {scheme.layout}); use the config.json that belongs to these weights, or the unquantized checkpoint"
        )
    for kind, (shape, encodings) in stored.expected.items():
        part = parts[kind]
        if _without_ones(part.shape) != _without_ones(shape) or part.encoding not in encodings:
            raise ValueError(
                f"{where}: {part.name.rpartition('.')[2]} is {part.encoding} {list(part.shape)}, but for a weight of "
                f"shape {list(stored.shape)} with {scheme.bits} bits and a scale for {_block_text(scheme)}, as "
                f"quantization_config says, it must be {' or '.join(encodings)} {list(shape)}; use the config.json "
                "that belongs to these weights"
            )
    return QuantizedTensor(name=parts[required[0]].name, shape=stored.shape, scheme=scheme, parts=parts)


def _check_present(module: str, parts: Parts, kinds: Iterable[str], scheme: Scheme) -> None:
    if missing := [kind for kind in kinds if kind not in parts]:
        raise ValueError(
            f"{next(iter(parts.values())).file}: {module} lacks {', '.join(missing)} for its quantization_config "
            f"({scheme.method}); use the config.json that belongs to these weights, or download them again"
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _block_text(scheme: Scheme) -> str:
    rows, columns = ("all" if n is None else n for n in scheme.block)
    return f"{rows} rows and {columns} columns"
