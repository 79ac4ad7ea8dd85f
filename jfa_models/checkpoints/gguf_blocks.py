"""Blocks of GGUF files as quantized arrays: the same numbers, scales and minima, laid out for kernels.

Source: the structures block_q4_0 to block_q6_K in ggml/src/ggml-common.h of github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int, UInt8

from jfa import QuantizedArray

# values, scales, zeros, minima; a row per block, and per block a column for each group
Fields = tuple[
    Int[np.ndarray, "blocks stored"],
    Float[np.ndarray, "blocks groups"],
    UInt8[np.ndarray, "blocks groups"] | None,
    Float[np.ndarray, "blocks groups"] | None,
]


def read(encoding: str, raw: UInt8[np.ndarray, " bytes"], num_rows: int) -> QuantizedArray:
    """The rows of a weight in this encoding, a key of LAYOUTS."""
    size, num_bytes, layout = LAYOUTS[encoding]
    values, scales, zeros, minima = (
        None if x is None else np.ascontiguousarray(x).reshape(num_rows, -1) for x in layout(raw.reshape(-1, num_bytes))
    )
    assert values is not None and scales is not None
    group_size = size // (scales.size * num_bytes // raw.size)
    return QuantizedArray(values=values, scales=scales, zeros=zeros, minima=minima, group_size=group_size)


def _parts(blocks: UInt8[np.ndarray, "n bytes"], *sizes: int) -> Iterator[UInt8[np.ndarray, "n _"]]:
    """Cuts the bytes of every block into parts; the last part is the rest."""
    return iter(np.split(blocks, np.cumsum(sizes), axis=1))


def _floats(part: UInt8[np.ndarray, "n bytes"]) -> Float[np.ndarray, "n _"]:
    return np.ascontiguousarray(part).view(np.float16)


def _q8_0(blocks) -> Fields:
    scale, numbers = _parts(blocks, 2)
    return numbers.view(np.int8), _floats(scale), None, None


def _q4_0(blocks) -> Fields:
    scale, numbers = _parts(blocks, 2)
    return numbers, _floats(scale), np.full((len(blocks), 1), 8, np.uint8), None


def _q4_1(blocks) -> Fields:
    scale, minimum, numbers = _parts(blocks, 2, 2)
    return numbers, _floats(scale), None, _floats(minimum)


def _with_fifth_bit(numbers: UInt8[np.ndarray, "n 16"], fifth: UInt8[np.ndarray, "n 4"]) -> Int[np.ndarray, "n 32"]:
    low = np.concatenate([numbers & 15, numbers >> 4], axis=1)
    return (low | np.unpackbits(fifth, axis=1, bitorder="little") << 4).view(np.int8)


def _q5_0(blocks) -> Fields:
    scale, fifth, numbers = _parts(blocks, 2, 4)
    return _with_fifth_bit(numbers, fifth) - np.int8(16), _floats(scale), None, None


def _q5_1(blocks) -> Fields:
    scale, minimum, fifth, numbers = _parts(blocks, 2, 2, 4)
    return _with_fifth_bit(numbers, fifth), _floats(scale), None, _floats(minimum)


def _of_sub_blocks(scale, minimum, packed) -> tuple[Float[np.ndarray, "n 8"], Float[np.ndarray, "n 8"]]:
    """The scales and minima of the 8 groups of a block: 6-bit integers times one float16 each, exact in float32."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6) << 4], axis=1)
    return (
        _floats(scale).astype(np.float32) * scales.astype(np.float32),
        -_floats(minimum).astype(np.float32) * minima.astype(np.float32),
    )


def _four_bits(numbers: UInt8[np.ndarray, "n 128"]) -> UInt8[np.ndarray, "n 8 32"]:
    """The numbers of the 8 groups; two groups of 32 share the bytes of 32."""
    pairs = numbers.reshape(-1, 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks) -> Fields:
    scale, minimum, packed, numbers = _parts(blocks, 2, 2, 12)
    groups = _four_bits(numbers)
    scales, minima = _of_sub_blocks(scale, minimum, packed)
    return groups[..., :16] | groups[..., 16:] << 4, scales, None, minima


def _q5_k(blocks) -> Fields:
    scale, minimum, packed, fifth, numbers = _parts(blocks, 2, 2, 12, 32)
    bits = (fifth[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    scales, minima = _of_sub_blocks(scale, minimum, packed)
    return (_four_bits(numbers) | bits << 4).view(np.int8), scales, None, minima


def _q6_k(blocks) -> Fields:
    low, high, packed, scale = _parts(blocks, 128, 64, 16)
    low, high = low.reshape(-1, 2, 2, 32), high.reshape(-1, 2, 1, 32)
    four = np.concatenate([low & 15, low >> 4], axis=2)  # [n, half, quarter, 32]
    two = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    scales = _floats(scale).astype(np.float32) * packed.view(np.int8).astype(np.float32)
    return (four | two << 4).view(np.int8) - np.int8(32), scales, None, None


# encoding: elements and bytes of a block, and its layout
LAYOUTS: dict[str, tuple[int, int, Callable[[UInt8[np.ndarray, "n bytes"]], Fields]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
