"""The words that the rest of the library is written in.

Axis letters in annotations: `b` batch, `tq` and `tk` query and key positions, `hq` and `hkv` query and key heads,
`g` query heads per key head, `d` head_dim of queries and keys, `dv` that of values. A *block* is always a tile of a
kernel, a *page* is always memory.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

# Padded rows and empty places of a page table point to this page: it is in bounds and what it holds reaches no output.
NULL_PAGE = 0


Implementation = Literal["reference", "xla", "triton", "tpu", "mosaic_gpu"]


class UnsupportedError(NotImplementedError):
    """The call is sound, but what it asks for is not built on the backend that was asked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What attention computes: everything static that changes the answer.

    Query `i` stands at position `i + query_offset` and sees the keys from `position - left` to `position + right`.
    """

    sm_scale: float
    causal: bool = False
    window: tuple[int, int] | None = None  # keys seen to the left and to the right, the query's own not counted
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    dropout_rate: float = 0.0  # share of the weights that count 0; the others are divided by 1 - dropout_rate
    broadcast_dropout: bool = False  # the same weights in all batch rows and heads

    def __post_init__(self) -> None:
        if not math.isfinite(self.sm_scale):
            raise ValueError(f"scale must be a finite number, got {self.sm_scale}")
        if self.window is not None and min(self.window) < 0:
            raise ValueError(
                f"local_window_size counts the keys seen to the left and right of a query, so both must be >= 0, "
                f"got {self.window}; leave it None for no window"
            )
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"logits_soft_cap must be a finite number > 0, got {self.softcap}; None means no cap")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be >= 0 and < 1, got {self.dropout_rate}")

    @property
    def left(self) -> int | None:
        """How many keys before its own position a query sees; None: all."""
        return None if self.window is None else self.window[0]

    @property
    def right(self) -> int | None:
        """How many keys after its own position a query sees; None: all."""
        if self.causal:
            return 0
        return None if self.window is None else self.window[1]


class Operands(NamedTuple):
    """The arrays that attention reads, or their shapes. None: the option is not in use and costs nothing."""

    q: Float[Array, "b tq hq d"]
    k: Float[Array, "b tk hkv d"]
    v: Float[Array, "b tk hkv dv"]
    bias: Float[Array, "#b #hq #tq #tk"] | None = None
    mask: Bool[Array, "#b #hq #tq #tk"] | None = None  # True: the key may be seen
    q_len: Int[Array, " b"] | None = None
    kv_len: Int[Array, " b"] | None = None
    q_offset: Int[Array, " b"] | None = None
    sinks: Float[Array, " hq"] | None = None  # a logit per head, natural units, that joins the denominator alone
    alibi_slopes: Float[Array, " hq"] | None = None  # scores get -slope * |position - key|
    q_segments: Int[Array, "b tq"] | None = None  # a query sees the keys of its own segment; with kv_segments
    kv_segments: Int[Array, "b tk"] | None = None
    dropout_seed: UInt32[Array, " 2"] | None = None  # with spec.dropout_rate

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[2] // self.k.shape[2]


class PagedOperands(NamedTuple):
    """The arrays that attention over pages reads, or their shapes.

    A row's queries are its last tokens: they stand at the positions before kv_len, and their keys are in the pages.
    """

    q: Float[Array, "n hq d"]  # the queries of all rows, one row after another
    k_pages: Shaped[Array, "num_pages page_size hkv _"]  # floats, or quant.KINDS
    v_pages: Shaped[Array, "num_pages page_size hkv _"]
    page_table: Int[Array, "b pages_per_seq"]  # which page holds the tokens page_size * j and on of a row
    kv_len: Int[Array, " b"]
    query_start: Int[Array, " b+1"] | None = None  # where a row's queries begin; None: one for each row
    k_scales: Float[Array, "num_pages page_size hkv"] | None = None  # with quantized pages
    v_scales: Float[Array, "num_pages page_size hkv"] | None = None
    sinks: Float[Array, " hq"] | None = None

    @property
    def capacity(self) -> int:
        """Tokens that a row of the page table can hold."""
        return self.page_table.shape[1] * self.k_pages.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.q.shape[1] // self.k_pages.shape[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How the `xla` backend computes: tile rows. Changes the speed, not the answer."""

    block_q: int
    block_kv: int
    widen: bool = False  # raise tiles to float32 before a product: CPUs have no fast 16-bit one
    packed: bool = False  # forward: all heads in one block-diagonal product, which reads the keys as they lie

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_kv < 1:
            raise ValueError(f"block_q and block_kv must be >= 1, got {self.block_q} and {self.block_kv}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashConfig:
    """How a `triton` flash kernel computes: tile rows, warps and pipeline stages of one program, and its switches.

    The switches exp2_degree (of 16-bit inputs) and round_half_up (of bfloat16) move roundings within the numerics
    contract. They pay where vector instructions, not matrix units, bound the kernel (bench/LOG.md): on AMD. A NaN of
    all ones, as NVIDIA's cards make it, may come out of them as a number.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int
    block_d: int | None = None  # head_dims of queries and keys that are multiplied at a time; None: all at once
    exp2_degree: int | None = None  # 2^x by a polynomial of degree 3 or 4 instead of the hardware's function
    round_half_up: bool = False  # weights to bfloat16 by an addition, instead of to nearest even

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv", "block_d"):
            rows = getattr(self, name)
            if rows is not None and (rows < 16 or rows & (rows - 1)):
                raise ValueError(f"{name} must be a power of two of at least 16, the smallest matrix tile, got {rows}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be >= 1, got {self.num_stages}")
        if self.exp2_degree not in (None, 3, 4):
            raise ValueError(f"exp2_degree must be None, 3 or 4, got {self.exp2_degree}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedConfig(FlashConfig):
    """How a `triton` kernel over pages computes: a tile of queries has the heads of a group beside each other.

    Keys are gathered by the page table, so block_kv has nothing to do with the size of a page.
    """

    num_splits: int | None = None  # programs that share a row's keys; None: as many as keep the device busy

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_splits is not None and self.num_splits < 1:
            raise ValueError(f"num_splits must be >= 1, or None to follow from the call, got {self.num_splits}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceInfo:
    """One accelerator, as far as kernels care."""

    platform: str  # "rocm", "cuda", "tpu" or "cpu"
    arch: str  # "gfx942", "sm_90", "TPU v5e", "cpu": a name, never a number
    compute_units: int = 1
    lds_bytes: int = 0  # LDS or shared memory that one workgroup may take
