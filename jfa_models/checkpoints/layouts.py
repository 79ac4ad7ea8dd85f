"""How the tensors of one quantized weight are laid out: their shapes, and how each becomes numbers of [out, in].

One function for each layout: compressed-tensors (words, bytes, mxfp4), GPTQ, AWQ. Sources: compressors/pack_quantized
and mxfp4 of compressed-tensors 0.20.0; nn_modules/qlinear/__init__.py (pack_original) and utils/model.py
(convert_gptq_v2_to_v1_format_module) of gptqmodel 7.7.0; awq/modules/linear/gemm.py of autoawq 0.2.9; FP8Linear in
integrations/finegrained_fp8.py of transformers 5.24.0; OCP Microscaling Formats 1.0, section 5.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Int, UInt

from jfa_models.checkpoints.schemes import Scheme
from jfa_models.checkpoints.tensors import StoredTensor

_DTYPES = {
    "I32": np.int32,
    "I64": np.int64,
    "I8": np.int8,
    "U8": np.uint8,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_FLOATS = ("F32", "F16", "BF16")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # field i of a word belongs to this column
_MINUS_ONE = {4: 0x1111_1111, 8: 0x0101_0101}  # subtracted from words of zero points in GPTQ's first version
# e2m1, doubled: integers
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

Parts = Mapping[str, StoredTensor]  # by the last part of their names


# What a layout is in terms of [out, in]. Numbers and zero points have 4 bits as uint8, from 0 to 15, or 8 bits as int8:
# files with unsigned 8-bit numbers have both 128 larger.


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """The tensors of one weight.

    Attributes:
      shape: of the weight.
      expected: of each tensor (shape, encodings). Axes of length 1 do not count.
      numbers: starts to read; returns a function of (first row, end of rows).
      scales, zeros: read them, [blocks of rows, groups of columns].
    """

    shape: tuple[int, int]
    expected: Mapping[str, tuple[tuple[int, ...], tuple[str, ...]]]
    numbers: Callable[[], Callable[[int, int], np.ndarray]]
    scales: Callable[[], np.ndarray]
    zeros: Callable[[], np.ndarray | None] = lambda: None


def grid_of(shape: tuple[int, int], scheme: Scheme) -> tuple[int, int]:
    """How many scales there are along each axis."""
    rows, columns = (math.ceil(n / (size or n or 1)) for n, size in zip(shape, scheme.block, strict=True))
    return rows, columns


def _packed(parts: Parts, scheme: Scheme) -> StoredWeight:
    """Words along in; zero points in words along out."""
    words, bits = parts["weight_packed"], scheme.bits
    stated = parts["weight_shape"]
    readable = stated.encoding in ("I64", "I32") and stated.shape == (2,)
    out, width = shape = tuple(load(stated).tolist()) if readable else (0, 0)
    grid = grid_of(shape, scheme)
    zero_words = (math.ceil(grid[0] * bits / 32), grid[1])
    expected = {
        "weight_packed": ((out, math.ceil(width * bits / 32)), ("I32",)),
        "weight_shape": ((2,), ("I64", "I32")),
        "weight_scale": (grid, _FLOATS),
    }
    if scheme.zero_points:
        expected["weight_zero_point"] = (zero_words, ("I32",))

    def zeros() -> np.ndarray | None:
        if scheme.zero_points:
            packed = load(parts["weight_zero_point"]).reshape(zero_words)
            return np.ascontiguousarray(_integers(packed.T, bits).T[: grid[0]])
        return np.full(grid, 8, np.uint8) if bits == 4 else None

    return StoredWeight(
        shape=shape,
        expected=expected,
        numbers=lambda: lambda start, stop: _integers(load(words.rows(start, stop)), bits)[:, :width],
        scales=lambda: load(parts["weight_scale"]).reshape(grid),
        zeros=zeros,
    )


def _unpacked(parts: Parts, scheme: Scheme, *, encoding: str) -> StoredWeight:
    """One number per byte."""
    numbers = parts["weight"]
    shape = (numbers.shape[0], math.prod(numbers.shape[1:])) if numbers.shape else (0, 0)
    grid = grid_of(shape, scheme)
    expected = {"weight": (shape, (encoding,)), "weight_scale": (grid, (*_FLOATS, "F8_E8M0"))}
    if scheme.zero_points:
        expected["weight_zero_point"] = (grid, (encoding,))
    return StoredWeight(
        shape=shape,
        expected=expected,
        numbers=lambda: lambda start, stop: load(numbers.rows(start, stop)),
        scales=lambda: _load_scales(parts["weight_scale"]).reshape(grid),
        zeros=lambda: load(parts["weight_zero_point"]).reshape(grid) if scheme.zero_points else None,
    )


def _mxfp4(parts: Parts, scheme: Scheme) -> StoredWeight:
    """Two 4-bit floats per byte, read as integers twice as large; scales are exponents."""
    numbers = parts["weight_packed"]
    shape = (numbers.shape[0], 2 * math.prod(numbers.shape[1:])) if numbers.shape else (0, 0)
    grid = grid_of(shape, scheme)

    def read(start: int, stop: int) -> np.ndarray:
        pairs = load(numbers.rows(start, stop))
        return _E2M1_DOUBLED[np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(pairs), -1)]

    def scales() -> np.ndarray:
        exponents = load(parts["weight_scale"]).view(ml_dtypes.float8_e8m0fnu).reshape(grid)
        return (exponents.astype(np.float32) * np.float32(0.5)).astype(ml_dtypes.bfloat16)

    return StoredWeight(
        shape=shape,
        expected={
            "weight_packed": ((shape[0], shape[1] // 2), ("U8",)),
            "weight_scale": (grid, ("U8", "F8_E8M0")),
        },
        numbers=lambda: read,
        scales=scales,
    )


def _gptq(parts: Parts, scheme: Scheme, *, minus_one: bool) -> StoredWeight:
    """[in, out]: words along in; zero points in words along out."""
    bits = scheme.bits
    num_words, out = (*parts["qweight"].shape, 0, 0)[:2]
    width = num_words * 32 // bits
    num_groups = grid_of((out, width), scheme)[1]

    def numbers() -> Callable[[int, int], np.ndarray]:
        words = load(parts["qweight"])
        return lambda start, stop: _integers(words[:, start:stop].T, bits)

    def zeros() -> np.ndarray:
        words = load(parts["qzeros"]).view(np.uint32).reshape(num_groups, -1)
        # on whole words: a zero point of 0, stored as the largest number, has borrowed from the next field
        return _integers((words + np.uint32(_MINUS_ONE[bits] if minus_one else 0)).view(np.int32), bits).T[:out]

    return StoredWeight(
        shape=(out, width),
        expected={
            "qweight": ((num_words, out), ("I32",)),
            "scales": ((num_groups, out), _FLOATS),
            "qzeros": ((num_groups, math.ceil(out * bits / 32)), ("I32",)),
        }
        | ({"g_idx": ((width,), ("I32", "I64"))} if "g_idx" in parts else {}),
        numbers=numbers,
        scales=lambda: load(parts["scales"]).reshape(num_groups, out).T,
        zeros=zeros,
    )


def _awq(parts: Parts, scheme: Scheme) -> StoredWeight:
    """[in, out]: words along out, in an order of its own."""
    width, num_words = (*parts["qweight"].shape, 0, 0)[:2]
    out = num_words * 8
    num_groups = grid_of((out, width), scheme)[1]

    def integers(words: np.ndarray) -> np.ndarray:
        fields = _integers(words, 4).reshape(len(words), -1, 8)
        return fields[:, :, np.argsort(_AWQ_ORDER)].reshape(len(words), -1).T

    def numbers() -> Callable[[int, int], np.ndarray]:
        words = load(parts["qweight"])
        return lambda start, stop: integers(words[:, start // 8 : -(-stop // 8)])[start % 8 :][: stop - start]

    return StoredWeight(
        shape=(out, width),
        expected={
            "qweight": ((width, num_words), ("I32",)),
            "scales": ((num_groups, out), _FLOATS),
            "qzeros": ((num_groups, num_words), ("I32",)),
        },
        numbers=numbers,
        scales=lambda: load(parts["scales"]).reshape(num_groups, out).T,
        zeros=lambda: integers(load(parts["qzeros"]).reshape(num_groups, num_words)),
    )


LAYOUTS: dict[str, Callable[[Parts, Scheme], StoredWeight]] = {
    "packed": _packed,
    "int8": functools.partial(_unpacked, encoding="I8"),
    "fp8": functools.partial(_unpacked, encoding="F8_E4M3"),
    "mxfp4": _mxfp4,
    "gptq": functools.partial(_gptq, minus_one=True),
    "gptq_v2": functools.partial(_gptq, minus_one=False),
    "awq": _awq,
}
REQUIRED = {  # the tensors without which a layout's shape is not known; the first one has the numbers
    "packed": ("weight_packed", "weight_shape"),
    "int8": ("weight",),
    "fp8": ("weight",),
    "mxfp4": ("weight_packed",),
    "gptq": ("qweight",),
    "gptq_v2": ("qweight",),
    "awq": ("qweight",),
}


def load(tensor: StoredTensor) -> np.ndarray:
    """The numbers of a tensor as they are stored."""
    dtype = np.dtype(_DTYPES[tensor.encoding])
    raw = np.fromfile(tensor.file, np.uint8, tensor.num_bytes, offset=tensor.offset)
    return raw.view(dtype).reshape(tensor.shape)


def _load_scales(tensor: StoredTensor) -> np.ndarray:
    """Scales in their dtype; exponents in bfloat16, which represents each of them."""
    scales = load(tensor)
    return scales.astype(ml_dtypes.bfloat16) if tensor.encoding == "F8_E8M0" else scales


def _integers(words: np.ndarray, bits: int) -> np.ndarray:
    fields = unpack(words, bits)
    return fields if bits == 4 else (fields ^ 128).view(np.int8)


def signed(fields: np.ndarray) -> np.ndarray:
    """4-bit numbers as int8, from -8 to 7."""
    return fields.view(np.int8) - np.int8(8)


def unpack(words: Int[np.ndarray, "*n words"], bits: int) -> UInt[np.ndarray, "*n fields"]:
    """The fields of 4 or 8 bits of 32-bit words, from the lowest bits to the highest."""
    fields = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        fields = np.stack([fields & 15, fields >> 4], axis=-1)
    return fields.reshape(*words.shape[:-1], -1)


def pack(fields: UInt[np.ndarray, "*n fields"], bits: int) -> Int[np.ndarray, "*n words"]:
    """The inverse of unpack; the last word is filled up with zeros."""
    missing = -fields.shape[-1] % (32 // bits)
    padded = np.pad(fields, [(0, 0)] * (fields.ndim - 1) + [(0, missing)])
    if bits == 4:
        padded = padded[..., ::2] | padded[..., 1::2] << 4
    return np.ascontiguousarray(padded).view("<i4")
