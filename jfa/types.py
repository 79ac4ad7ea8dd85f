"""Types that the whole library uses.

Axis letters in annotations: `b` batch, `tq` and `tk` query and key positions, `hq` and `hkv` query and key heads,
`g` query heads per key head, `d` head_dim of queries and keys, `dv` head_dim of values. A *block* is always a tile of a
kernel, a *page* is always memory.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

# Padded rows and unused page table entries point to this page: it is in bounds, and its content affects no output.
NULL_PAGE = 0


Implementation = Literal["reference", "xla", "triton", "tpu", "mosaic_gpu"]


class UnsupportedError(NotImplementedError):
    """The call is valid, but the requested backend does not implement it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What attention computes: all static parameters that change the result.

    Query `i` is at position `i + query_offset` and sees the keys from `position - left` to `position + right`.
    """

    sm_scale: float
    causal: bool = False
    window: tuple[int | None, int | None] | None = None  # visible keys to the left and right of the query; None: all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    dropout_rate: float = 0.0  # fraction of the weights set to 0; the others are divided by 1 - dropout_rate
    broadcast_dropout: bool = False  # drop the same weights in all batch rows and heads

    def __post_init__(self) -> None:
        if not math.isfinite(self.sm_scale):
            raise ValueError(f"scale must be a finite number, got {self.sm_scale}")
        if any(side is not None and side < 0 for side in self.window or ()):
            raise ValueError(
                "local_window_size is the number of visible keys to the left and right of a query: both must be >= 0, "
                f"or None for all keys on that side, got {self.window}"
            )
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"logits_soft_cap must be a finite number > 0, got {self.softcap}; None means no cap")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be >= 0 and < 1, got {self.dropout_rate}")

    @property
    def left(self) -> int | None:
        """Number of keys that a query sees before its own position; None: all."""
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        """Number of keys that a query sees after its own position; None: all."""
        if self.causal:
            return 0
        return None if self.window is None else self.window[1]


class Operands(NamedTuple):
    """The arrays that attention reads, or their shapes. None: the option is not used and has no cost."""

    q: Float[Array, "b tq hq d"]
    k: Float[Array, "b tk hkv d"]
    v: Float[Array, "b tk hkv dv"]
    bias: Float[Array, "#b #hq #tq #tk"] | None = None
    mask: Bool[Array, "#b #hq #tq #tk"] | None = None  # True: the key is visible
    q_len: Int[Array, " b"] | None = None
    kv_len: Int[Array, " b"] | None = None
    q_offset: Int[Array, " b"] | None = None
    sinks: Float[Array, " hq"] | None = None  # a logit per head; exp(sink) is added to the denominator only
    alibi_slopes: Float[Array, "#b hq"] | None = None  # adds -slope * |position - key| to the scores
    q_segments: Int[Array, "b tq"] | None = None  # a query sees the keys of its own segment; needs kv_segments
    kv_segments: Int[Array, "b tk"] | None = None
    dropout_seed: UInt32[Array, " 2"] | None = None  # used with spec.dropout_rate

    @property
    def group_size(self) -> int:
        """Number of query heads per key head."""
        return self.q.shape[2] // self.k.shape[2]


class PagedOperands(NamedTuple):
    """The arrays that paged attention reads, or their shapes.

    A row's queries are its last tokens: the last one is at position kv_len - 1, and their keys are in the pages.
    """

    q: Float[Array, "n hq d"]  # the queries of all rows, one row after another
    k_pages: Shaped[Array, "num_pages page_size hkv*_"]  # floats, or quantized as in quant.KINDS; heads side by side
    v_pages: Shaped[Array, "num_pages page_size hkv*_"]
    page_table: Int[Array, "b pages_per_seq"]  # entry j of a row: the page of tokens page_size * j and following
    kv_len: Int[Array, " b"]
    query_start: Int[Array, " b+1"] | None = None  # index of each row's first query; None: one query per row
    k_scales: Float[Array, "num_pages page_size hkv"] | None = None  # for quantized pages
    v_scales: Float[Array, "num_pages page_size hkv"] | None = None
    sinks: Float[Array, " hq"] | None = None
    tree_mask: Bool[Array, "n m"] | None = None  # a query sees the row's new token j; all False: causal. See trees.py

    @property
    def capacity(self) -> int:
        """Tokens that a row of the page table can hold."""
        return self.page_table.shape[1] * self.k_pages.shape[1]

    @property
    def group_size(self) -> int:
        """Number of query heads per key head."""
        return self.q.shape[1] // self.num_kv_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key heads."""
        return self.k_pages.shape[2] * _elements_stored_in_one(self.k_pages) // self.q.shape[2]

    @property
    def value_head_dim(self) -> int:
        """Elements of a value."""
        return self.v_pages.shape[2] * _elements_stored_in_one(self.v_pages) // self.num_kv_heads

    @property
    def pages_by_head(self) -> tuple[Shaped[Array, "num_pages page_size hkv _"], ...]:
        """The keys and the values with an axis of heads."""
        return tuple(x.reshape(*x.shape[:2], self.num_kv_heads, -1) for x in (self.k_pages, self.v_pages))


def _elements_stored_in_one(pages: Shaped[Array, "..."]) -> int:
    return 2 if pages.dtype == "uint8" else 1  # two 4-bit numbers in a byte


class WriteOperands(NamedTuple):
    """The arrays that rotate_and_write reads, or their shapes."""

    qkv: Float[Array, "n heads*d"]  # the heads of the queries, the keys and the values, side by side
    cos: Float[Array, "n half"]
    sin: Float[Array, "n half"]
    slots: Int[Array, " n"]  # where a token is written; out of bounds or negative: nowhere
    k: Shaped[Array, "slots hkv*d"]  # floats, or quantized to int8 or fp8
    v: Shaped[Array, "slots hkv*d"]
    k_scales: Float[Array, "slots hkv"] | None = None
    v_scales: Float[Array, "slots hkv"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
    """What row_ops.matmul_few_rows computes around a product.

    Attributes:
      activation: of the first product; a second one is multiplied by it. None: products are side by side.
      eps: x is divided by sqrt(mean(x^2) + eps) of its row, and multiplied by plus + scale. None: it is not.
    """

    activation: str | None = None
    eps: float | None = None
    plus: float = 0.0


class RowOperands(NamedTuple):
    """The arrays that matmul_few_rows reads, or their shapes."""

    x: Float[Array, "n in"]
    weights: tuple[Any, ...]  # [out, in]: floats in the dtype of x, or a QuantizedArray
    biases: tuple[Float[Array, " out"] | None, ...]
    scale: Float[Array, " in"] | None = None
    residual: Float[Array, "n sum_of_out"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductSpec:
    """What a product with a quantized weight computes: the static fields of QuantizedArray."""

    group_size: int | None = None
    rounds_inputs: int = 0


class ProductOperands(NamedTuple):
    """The arrays that a product x weight^T reads, or their shapes. The weight is that of QuantizedArray."""

    x: Float[Array, "n in"]
    values: Shaped[Array, "out stored"]
    scales: Float[Array, " out"] | Float[Array, "out groups"]
    zeros: Int[Array, "out groups"] | None = None
    minima: Float[Array, "out groups"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """What linear attention computes: the static parameters that change the result."""

    scale: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale}")


class LinearOperands(NamedTuple):
    """The arrays that linear attention reads, or their shapes. Value head h reads key head h // g.

    log_decay may be -inf, which drops the state. beta: with it, a token first removes what the state holds for its key.
    """

    q: Float[Array, "b t hk dk"]
    k: Float[Array, "b t hk dk"]
    v: Float[Array, "b t h dv"]
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h dk"]
    state: Float[Array, "b h dk dv"]
    beta: Float[Array, "b t h"] | None = None

    @property
    def group_size(self) -> int:
        """Number of value heads per key head."""
        return self.v.shape[2] // self.k.shape[2]


class LinearRows(NamedTuple):
    """How the tokens of LinearOperands with b = 1 are divided into rows, whose states are slots of `state`."""

    slot: Int[Array, " rows"]
    query_start: Int[Array, " rows+1"]  # index of each row's first token
    is_new: Bool[Array, " rows"]  # the row starts with a state of zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """How many tokens of linear attention are computed together. It affects the speed, not the result."""

    chunk_size: int

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be >= 1, got {self.chunk_size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearKernelConfig(LinearConfig):
    """Tile sizes, warps and pipeline stages of the `triton` kernel of linear attention."""

    block_v: int  # columns of the state that a program holds
    num_warps: int
    num_stages: int
    block_d: int | None = None  # number of key columns that are multiplied at a time; None: all at once

    def __post_init__(self) -> None:
        for name in ("chunk_size", "block_v", "block_d"):
            if (size := getattr(self, name)) is not None:
                _check_tile(name, size)
        _check_launch(self.num_warps, self.num_stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Tile sizes and options of the `xla` backend. They affect the speed, not the result."""

    block_q: int
    block_kv: int
    widen: bool = False  # cast tiles to float32 before a matrix product: for CPUs without a fast 16-bit one
    elementwise: bool = False  # forward: sums of elementwise products, without a transposed copy of keys: for one query
    heads: int | None = None  # key heads computed at a time, of one or more whole rows or a part of one; None: all
    strips: int = 1  # forward: parts of block_q whose products are independent, for CPUs with several cores

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_kv < 1:
            raise ValueError(f"block_q and block_kv must be >= 1, got {self.block_q} and {self.block_kv}")
        if self.strips < 1 or (self.heads is not None and self.heads < 1):
            raise ValueError(f"strips and heads must be >= 1, got {self.strips} and {self.heads}; heads=None means all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashConfig:
    """Tile sizes, warps and pipeline stages of a `triton` flash attention kernel, and a switch.

    The switch round_half_up (bfloat16) changes rounding within the documented tolerances. It pays off on AMD GPUs
    without an instruction for the conversion, all but gfx950. With it, a NaN whose bits are all ones, as produced by
    NVIDIA GPUs, may become a number.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    block_d: int | None = None  # number of head_dim columns that are multiplied at a time; None: all at once
    round_half_up: bool = False  # round weights to bfloat16 half up (one integer addition) instead of to nearest even

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "block_d"):
            if (rows := getattr(self, name)) is not None:
                _check_tile(name, rows)
        _check_launch(self.num_warps, self.num_stages)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuConfig:
    """Tile sizes of a `tpu` attention kernel. They affect the speed, not the result."""

    block_q: int  # tokens; a tile has a row for each of them and each query head of a key head
    block_kv: int

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            if (size := getattr(self, name)) < 128 or size % 128:
                raise ValueError(f"{name} must be a multiple of 128, the lanes of a register, got {size}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedConfig(FlashConfig):
    """Like FlashConfig, for a `triton` paged attention kernel. A tile of queries contains all heads of a group.

    Keys are gathered through the page table, so block_kv is independent of page_size.
    """

    num_splits: int | None = None  # programs that split a row's keys; None: enough to keep the device busy
    fp8_by_bits: bool = False  # cast fp8 pages by integer operations, for GPUs without an instruction: gfx942, gfx1100

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_splits(self.num_splits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductConfig:
    """Tile sizes, warps and pipeline stages of the `triton` kernel for products with quantized weights."""

    block_rows: int  # rows of x
    block_out: int  # rows of the weight
    block_in: int  # columns that are multiplied per iteration
    num_warps: int
    num_stages: int
    num_splits: int | None = None  # programs that split the columns; None: enough to keep the device busy

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_out", "block_in"):
            _check_tile(name, getattr(self, name))
        _check_launch(self.num_warps, self.num_stages)
        _check_splits(self.num_splits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuProductConfig:
    """Tile sizes of the `tpu` kernel for products with quantized weights. They affect the speed, not the result."""

    block_rows: int  # rows of x
    block_out: int  # rows of the weight
    block_in: int  # columns that are multiplied per step

    def __post_init__(self) -> None:
        # two 4-bit numbers are one column of lanes
        for name, least in (("block_rows", 16), ("block_out", 128), ("block_in", 256)):
            if (size := getattr(self, name)) < least or size % least:
                raise ValueError(f"{name} must be a multiple of {least}, got {size}")


def _check_tile(name: str, size: int) -> None:
    if size < 16 or size & (size - 1):
        raise ValueError(f"{name} must be a power of two of at least 16, the smallest matrix tile, got {size}")


def _check_launch(num_warps: int, num_stages: int) -> None:
    if num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {num_warps}")
    if num_stages < 1:
        raise ValueError(f"num_stages must be >= 1, got {num_stages}")


def _check_splits(num_splits: int | None) -> None:
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits must be >= 1, or None to choose automatically, got {num_splits}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """The properties of a device that kernels depend on."""

    platform: str  # "rocm", "cuda", "tpu" or "cpu"
    arch: str  # "gfx942", "sm_90", "v5e", "cpu": a name, never a number
    compute_units: int = 1
    lds_bytes: int = 0  # maximum LDS or shared memory of one workgroup
    vmem_bytes: int = 0  # VMEM of a TPU's core; on a CPU, of the one that is interpreted
    multiplies_bfloat16: bool = False  # a CPU with instructions for bfloat16 products
    num_devices: int = 1  # of a CPU: several are virtual, and heads and rows may be divided over them
