"""Tensors in files: where each one is stored, and how its bytes are decoded.

Files are read one chunk at a time and never memory-mapped: mapped pages count as resident memory, and loading a model
should need little more memory than its weights.
"""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import jax
import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Shaped

from jfa import QuantizedArray
from jfa_models.checkpoints import gguf_blocks

_PLAIN_DTYPES = {  # names in both formats; all other encodings consist of blocks that `gguf` dequantizes
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
_CHUNK_ELEMENTS = 1 << 17  # 512 KiB in float32: chunks that stay in a core's cache decode twice as fast
_ALIGNMENT = 64  # bytes; XLA on a CPU uses memory with this alignment without copying it


class Tensor(Protocol):
    """A tensor in a file: a StoredTensor, or a quantized weight that is stored as several of them."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def encoding(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def is_quantized(self) -> bool: ...
    def rows(self, start: int, stop: int) -> "Tensor": ...
    def columns(self, start: int, stop: int) -> "Tensor | None": ...
    def chunks(self) -> Iterator[tuple[slice | np.ndarray, Shaped[np.ndarray, "rows columns"]]]: ...
    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]: ...
    def read_into(self, out: Shaped[np.ndarray, "..."]) -> None: ...
    def read_quantized(self) -> QuantizedArray | None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor is stored in a file, and how its bytes are decoded."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    encoding: str  # in the file: "BF16", "Q4_1"
    offset: int
    num_bytes: int
    interleaved_heads: int | None = None  # set for q and k of GGUF files: see _row_order
    minus: float = 0.0  # subtracted from each number when it is read: files store some norm scales plus 1
    is_minus_exp: bool = False  # the numbers are -exp of those that are read: decays of GGUF files
    row_stride: int | None = None  # bytes from a row to the next in the file; None: they follow one another

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """A range of its rows, as a separate tensor; of whole heads, if heads are interleaved."""
        row_bytes = self.num_bytes // self.shape[0]
        heads = self.interleaved_heads
        return dataclasses.replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * (self.row_stride or row_bytes),
            num_bytes=(stop - start) * row_bytes,
            interleaved_heads=None if heads is None else heads * (stop - start) // self.shape[0],
        )

    def columns(self, start: int, stop: int) -> "StoredTensor | None":
        """A range of its columns, as a separate tensor; None: that would cut blocks of a quantized one."""
        num_rows, width = self.shape
        block = 1 if self.encoding in _PLAIN_DTYPES else GGML_QUANT_SIZES[GGMLQuantizationType[self.encoding]][0]
        if start % block or stop % block:
            return None
        row_bytes = self.num_bytes // num_rows
        return dataclasses.replace(
            self,
            shape=(num_rows, stop - start),
            offset=self.offset + row_bytes * start // width,
            num_bytes=num_rows * (row_bytes * (stop - start) // width),
            row_stride=self.row_stride or row_bytes,
        )

    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """Reads the whole tensor into new host memory.

        Raises:
          ValueError: its encoding is not supported.
        """
        out = aligned(self.shape, dtype)
        self.read_into(out)
        return out

    def read_quantized(self) -> QuantizedArray | None:
        """Reads the whole tensor as it is quantized; None: it is floats, or blocks that only read() knows."""
        if self.encoding not in gguf_blocks.LAYOUTS or len(self.shape) != 2:
            return None
        with open(self.file, "rb") as file:
            raw = self._bytes(file, 0, self.shape[0])
        found = gguf_blocks.read(self.encoding, raw, self.shape[0])
        if (order := self._row_order()) is None:
            return found
        return jax.tree.map(lambda x: x[np.argsort(order)], found)

    def read_into(self, out: Shaped[np.ndarray, "..."]) -> None:
        """Reads the whole tensor into `out`, which has its shape."""
        rows = out.reshape(self._num_rows, -1)
        for where, values in self.chunks():
            rows[where] = values

    def chunks(self) -> Iterator[tuple[slice | np.ndarray, Shaped[np.ndarray, "rows columns"]]]:
        """Yields (row numbers, rows) chunk by chunk. A vector is one row, unless its elements belong to heads."""
        num_rows = self._num_rows
        step = max(1, _CHUNK_ELEMENTS * num_rows // max(1, math.prod(self.shape)))
        order = self._row_order()
        with open(self.file, "rb", buffering=0) as file:
            for start in range(0, num_rows, step):
                stop = min(start + step, num_rows)
                raw = self._bytes(file, start, stop)
                yield (slice(start, stop) if order is None else order[start:stop]), self._decode(raw, stop - start)

    def _bytes(self, file: IO[bytes], start: int, stop: int) -> np.ndarray:
        """Those of some rows."""
        row_bytes = self.num_bytes // self._num_rows
        if self.row_stride is None:
            file.seek(self.offset + start * row_bytes)
            return np.fromfile(file, np.uint8, (stop - start) * row_bytes)
        raw = np.empty((stop - start, row_bytes), np.uint8)
        for row, into in enumerate(raw, start):
            os.preadv(file.fileno(), [into], self.offset + row * self.row_stride)
        return raw.ravel()

    @property
    def is_quantized(self) -> bool:
        """Whether its numbers have a common scale in each block."""
        return self.encoding not in _PLAIN_DTYPES

    @property
    def _num_rows(self) -> int:
        return math.prod(self.shape[:1]) if self.interleaved_heads or len(self.shape) > 1 else 1

    def _row_order(self) -> np.ndarray | None:
        """For each stored row, its index in our order.

        The two rows of a head that rope rotates together are adjacent in a GGUF file, but half a head apart in our
        order and in that of Hugging Face.
        """
        if self.interleaved_heads is None:
            return None
        return np.arange(self.shape[0]).reshape(self.interleaved_heads, 2, -1).swapaxes(1, 2).ravel()

    def _decode(self, raw: np.ndarray, num_rows: int) -> np.ndarray:
        values = self._plain(raw, num_rows)
        if self.is_minus_exp:
            return np.log(-values.astype(np.float32))
        return values - np.float32(self.minus) if self.minus else values

    def _plain(self, raw: np.ndarray, num_rows: int) -> np.ndarray:
        if self.encoding in _PLAIN_DTYPES:
            return raw.view(_PLAIN_DTYPES[self.encoding]).reshape(num_rows, -1)
        try:
            # one long row: `dequantize` loops in Python over groups of 16
            return dequantize(raw[np.newaxis], GGMLQuantizationType[self.encoding]).reshape(num_rows, -1)
        except (KeyError, NotImplementedError):
            raise ValueError(
                f"{self.file}: {self.name} is stored as {self.encoding}, which cannot be read; "
                "use a checkpoint in float32, float16, bfloat16 or a common GGUF quantization such as Q8_0"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StackedTensors:
    """Tensors of one shape, those of a layer's experts, stacked along a new first axis."""

    parts: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """The names of the first and the last part in the file."""
        return f"{self.parts[0].name} to {self.parts[-1].name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """(number of parts, *shape of a part); if the shapes differ, that of a differing part, so that checks fail."""
        odd = next((part.shape for part in self.parts if part.shape != self.parts[0].shape), self.parts[0].shape)
        return (len(self.parts), *odd)

    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """Reads all of them into new host memory."""
        out = aligned(self.shape, dtype)
        for i, part in enumerate(self.parts):
            part.read_into(out[i])
        return out

    def part(self, experts: slice, rows: slice, columns: slice) -> "StackedTensors | None":
        """Some experts, and of each some rows and columns; None: those columns cannot be read by themselves."""
        found = [part_of(one, rows, columns) for one in self.parts[experts]]
        kept = tuple(one for one in found if one is not None)
        return StackedTensors(parts=kept) if len(kept) == len(found) else None

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def is_quantized(self) -> bool:
        """Whether they are quantized."""
        return self.parts[0].is_quantized

    def read_quantized(self) -> QuantizedArray | None:
        """Reads all of them as they are quantized; None: QuantizedArray cannot represent one, or they differ."""
        out = None
        for i, part in enumerate(self.parts):
            if (found := part.read_quantized()) is None:
                return None
            out = out or jax.tree.map(lambda x: aligned((len(self.parts), *x.shape), x.dtype), found)
            if _kind(found) != _kind(out):
                return None
            for array, whole in zip(jax.tree.leaves(found), jax.tree.leaves(out), strict=True):
                whole[i] = array
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedTensors:
    """One weight whose rows are those of several tensors, one after another."""

    parts: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        """The names of the first and the last part in the file."""
        return f"{self.parts[0].name} and {self.parts[-1].name}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def encoding(self) -> str:
        """Of most elements."""
        return main_encoding({str(i): part for i, part in enumerate(self.parts)})

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def is_quantized(self) -> bool:
        """Whether some are quantized."""
        return any(part.is_quantized for part in self.parts)

    def rows(self, start: int, stop: int) -> "JoinedTensors":
        """A range of its rows."""
        kept, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, part.shape[0])
            if low < high:
                kept.append(part.rows(low, high))
            at += part.shape[0]
        return JoinedTensors(parts=tuple(kept))

    def columns(self, start: int, stop: int) -> "JoinedTensors | None":
        """A range of its columns; None: that would cut blocks."""
        kept = tuple(found for part in self.parts if (found := part.columns(start, stop)) is not None)
        return JoinedTensors(parts=kept) if len(kept) == len(self.parts) else None

    def chunks(self) -> Iterator[tuple[slice | np.ndarray, Shaped[np.ndarray, "rows columns"]]]:
        """Yields (row numbers, rows) chunk by chunk."""
        at = 0
        for part in self.parts:
            for where, values in part.chunks():
                yield (slice(at + where.start, at + where.stop) if isinstance(where, slice) else at + where), values
            at += part.shape[0]

    def read(self, dtype: Any) -> Shaped[np.ndarray, "..."]:
        """Reads all of them into new host memory."""
        out = aligned(self.shape, dtype)
        self.read_into(out)
        return out

    def read_into(self, out: Shaped[np.ndarray, "..."]) -> None:
        """Reads all of them into `out`, which has the shape of the weight."""
        for where, values in self.chunks():
            out[where] = values

    def read_quantized(self) -> QuantizedArray | None:
        """Reads all of them as they are quantized; None: QuantizedArray cannot represent one, or they differ."""
        found = [part.read_quantized() for part in self.parts]
        if any(one is None for one in found) or len({_kind(one) for one in found}) > 1:
            return None
        return jax.tree.map(lambda *x: np.concatenate(x), *found)


def _kind(held: QuantizedArray | None) -> tuple[Any, ...]:
    """What quantized parts of one weight must have in common."""
    return jax.tree.structure(held), *(x.dtype for x in jax.tree.leaves(held))


def part_of(tensor: Tensor, rows: slice, columns: slice = slice(None)) -> Tensor | None:
    """Some rows and columns of a tensor; None: those columns cannot be read by themselves."""
    found = tensor.rows(*rows.indices(tensor.shape[0])[:2]) if rows != slice(None) else tensor
    return found if columns == slice(None) else found.columns(*columns.indices(tensor.shape[1])[:2])


def aligned(shape: tuple[int, ...], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Allocates memory that XLA on a CPU uses without copying it."""
    dtype = np.dtype(dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def main_encoding(tensors: Mapping[str, Tensor]) -> str:
    """The encoding of the largest number of elements."""
    numbers = Counter[str]()
    for tensor in tensors.values():
        numbers[tensor.encoding] += math.prod(tensor.shape)
    return max(numbers, key=lambda encoding: numbers[encoding], default="no weights")


def check_length(file: Path, tensors: Mapping[str, StoredTensor], on_disk: int) -> None:
    needed = max((tensor.offset + tensor.num_bytes for tensor in tensors.values()), default=0)
    if needed > on_disk:
        raise damaged(file, f"its tensors need {needed} bytes, but the file has {on_disk}")


def damaged(file: Path, problem: str) -> ValueError:
    return ValueError(f"{file} is damaged or truncated: {problem}; download it again")
