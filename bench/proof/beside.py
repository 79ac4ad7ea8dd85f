"""`jfa-bench compile --peers`: the library's kernels for TPUs beside JAX's own, by libtpu's code for the same calls.

A call's words are those of the parts of the code that have matrix products, as often as the call visits them. Which
other parts run at each step is not known: they are listed. Waits for memory are not counted.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jfa

from ..records import record, report
from . import aot, by_libtpu, pool

HEADS, HEAD_DIM = 8, 128  # of flash attention
ROWS, CAPACITY, PAGE_SIZE = 64, 8192, 16  # of paged attention, with 32 query heads over 8 key heads
_BLOCK = 512  # tokens of a block of pages
_SMALL = 100  # words: shorter parts are not listed

Parts = dict[str, list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A call by one implementation.

    Attributes:
      call: key of CALLS.
      implementation: "jfa" or the name of JAX's module.
    """

    call: str
    implementation: str
    arch: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled for a Row.

    Attributes:
      fn, args: as by_libtpu.compile_program takes them.
      kernel: the start of its kernels' names.
      words: (parts) -> instruction words of the call.
    """

    fn: Callable
    args: tuple
    kernel: str
    words: Callable[[Parts], int]


def compile_row(row: Row) -> dict[str, Any]:
    """The `beside` record of a row: status, reason, seconds, words, other_parts and by_libtpu.FIELDS but the loop's."""
    start = time.perf_counter()
    about = {"benchmark": "beside", **dataclasses.asdict(row)}
    program = CALLS[row.call][row.implementation]()
    try:
        figures, parts = by_libtpu.compile_program(program.fn, program.args, kernel=program.kernel, arch=row.arch)
    except (aot.CompileError, jfa.UnsupportedError) as error:
        return about | {"status": "failed", "reason": str(error)}
    own = {name: found for name, found in parts.items() if name.startswith(program.kernel)}
    others = [words for found in own.values() for words, products in found if not products and words >= _SMALL]
    found = {"words": program.words(own), "other_parts": others}
    return about | {"status": "ok", "reason": None, "seconds": round(time.perf_counter() - start, 2)} | found | figures


def rows(archs: Sequence[str]) -> list[Row]:
    """All calls by all implementations."""
    return [Row(call=call, implementation=name, arch=arch) for arch in archs for call in CALLS for name in CALLS[call]]


def compile_all(wanted: Sequence[Row], *, processes: int) -> list[dict[str, Any]]:
    """compile_row for each row, in order, in this number of worker processes; 0: in this process."""
    return pool.each(compile_row, wanted, lost=_lost, doing="compiling", processes=processes)


def _lost(row: Row, why: str) -> dict[str, Any]:
    return {"benchmark": "beside", **dataclasses.asdict(row), "status": "failed", "reason": f"the compiler {why}"}


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; for md as in the guide."""
    columns = ("arch", "call", "implementation", "status", "reason", "words", "seconds", *by_libtpu.FIELDS[:-2])
    return (
        report.beside(records) if output == "md" else record.render(records, output, {name: name for name in columns})
    )


def _integers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _numbers(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


# Flash attention: causal, as many key heads as query heads


def _tiles(length: int, block_q: int, block_kv: int) -> tuple[int, int]:
    """Tiles of a causal head without and with masked scores."""
    seen = [-(-(first + block_q) // block_kv) for first in range(0, length, block_q)]
    whole = [(first + 1) // block_kv for first in range(0, length, block_q)]
    return sum(whole), sum(seen) - sum(whole)


def _of_tiles(length: int, block_q: int, block_kv: int) -> Callable[[Parts], int]:
    """The words of all tiles: if a kernel has several parts with the most products, the longest one masks."""

    def words(parts: Parts) -> int:
        whole, edge = _tiles(length, block_q, block_kv)
        total = 0
        for found in parts.values():
            most = max(products for _, products in found)
            same = [count for count, products in found if products == most]
            total += HEADS * (whole * min(same) + edge * max(same))
        return total

    return words


def _heads_first(length: int) -> tuple:
    """Arrays as JAX's kernels read them."""
    return (_numbers(1, HEADS, length, HEAD_DIM),) * 3


def _with_gradients(attend: Callable) -> Callable:
    def gradients(q, k, v):
        return jax.vjp(attend, q, k, v)[1](q)

    return gradients


def _ours(length: int, *, backward: bool) -> Program:
    block_q, block_kv = (512, 512) if backward else (512, 1024)
    config = jfa.TpuConfig(block_q=block_q, block_kv=block_kv)

    def attend(*columns):
        q, k, v = (x.reshape(1, length, HEADS, HEAD_DIM) for x in columns)
        return jfa.dot_product_attention(q, k, v, is_causal=True, implementation="tpu", config=config).reshape(
            columns[0].shape
        )

    return Program(
        fn=_with_gradients(attend) if backward else attend,
        args=(_numbers(1, length, HEADS * HEAD_DIM),) * 3,  # as the kernel reads them, and projections make them
        kernel="flash_attention_bwd" if backward else "flash_attention",
        words=_of_tiles(length, block_q, block_kv),
    )


def _flash(length: int, *, backward: bool) -> Program:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = dict.fromkeys((field.name for field in dataclasses.fields(flash.BlockSizes)), 512) | {"block_b": 1}
    if not backward:
        sizes |= {"block_k_major": 1024, "block_k": 1024}
    call = functools.partial(
        flash.flash_attention, causal=True, sm_scale=HEAD_DIM**-0.5, block_sizes=flash.BlockSizes(**sizes)
    )
    return Program(
        fn=_with_gradients(call) if backward else call,
        args=_heads_first(length),
        kernel="flash_mha_bwd" if backward else "flash_attention",
        words=_of_tiles(length, 512, 512 if backward else 1024),
    )


def _splash(length: int, *, backward: bool) -> Program:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    keys = 512 if backward else 1024
    names = ("block_q", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, 512) | {"block_kv": keys, "block_kv_compute": keys}
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(HEADS)])
    kernel = splash.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, block_sizes=splash.BlockSizes(**sizes))
    call = jax.vmap(kernel)
    return Program(
        fn=_with_gradients(call) if backward else call,
        args=_heads_first(length),
        kernel="splash_mha_d" if backward else "splash_mha_fwd",
        words=_of_tiles(length, 512, keys),
    )


# Paged attention


_NUM_PAGES = ROWS * CAPACITY // PAGE_SIZE + 1
_TABLE = (ROWS, CAPACITY // PAGE_SIZE)
_BLOCKS = ROWS * CAPACITY // _BLOCK  # of all rows
_GROUPS = 2  # of 4 key heads, whose 16 query heads are multiplied at once if a row has one query


def _longest(parts: Parts, products: int | None) -> int:
    """The words of the shortest part with this number of products, of all kernels; None: the most."""
    [found] = parts.values()
    wanted = max(count for _, count in found) if products is None else products
    return min(words for words, count in found if count == wanted)


def _our_decode() -> Program:
    pages = _numbers(_NUM_PAGES, PAGE_SIZE, 8 * HEAD_DIM)
    return Program(
        fn=functools.partial(jfa.paged_decode_attention, implementation="tpu"),
        args=(_numbers(ROWS, 32, HEAD_DIM), pages, pages, _integers(*_TABLE), _integers(ROWS)),
        kernel="paged_decode_attention",
        words=lambda parts: _BLOCKS * _GROUPS * _longest(parts, None),
    )


def _paged() -> Program:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    pages = _numbers(8, _NUM_PAGES, PAGE_SIZE, HEAD_DIM)
    return Program(
        fn=functools.partial(paged_attention, pages_per_compute_block=_BLOCK // PAGE_SIZE),
        args=(_numbers(ROWS, 32, HEAD_DIM), pages, pages, _integers(ROWS), _integers(*_TABLE)),
        kernel="paged_attention",
        words=lambda parts: 8 * _BLOCKS * _longest(parts, None),  # a head at a time
    )


def _our_ragged(tokens: int) -> Program:
    pages = _numbers(_NUM_PAGES, PAGE_SIZE, 8 * HEAD_DIM)

    def words(parts: Parts) -> int:
        [found] = parts.values()
        products = {count for _, count in found if count}
        return _BLOCKS * (
            _GROUPS * _longest(parts, min(products)) if tokens == 1 else 8 * _longest(parts, max(products))
        )

    return Program(
        fn=functools.partial(jfa.ragged_paged_attention, implementation="tpu"),
        args=(
            _numbers(ROWS * tokens, 32, HEAD_DIM),
            pages,
            pages,
            _integers(*_TABLE),
            _integers(ROWS),
            _integers(ROWS + 1),
        ),
        kernel="ragged_paged_attention",
        words=words,
    )


def _ragged(tokens: int) -> Program:
    """With 32 queries in a block if rows have one; a row computes all of a block in which it has a query."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    call = functools.partial(
        ragged_paged_attention,
        num_kv_pages_per_block=_BLOCK // PAGE_SIZE,
        num_queries_per_block=max(tokens, 32),
        vmem_limit_bytes=96 << 20,
    )
    return Program(
        fn=call,
        args=(
            _numbers(ROWS * tokens, 32, HEAD_DIM),
            _numbers(_NUM_PAGES, PAGE_SIZE, 16, HEAD_DIM),
            *(_integers(ROWS), _integers(*_TABLE), _integers(ROWS + 1), _integers(1)),
        ),
        kernel="ragged_paged_attention",
        words=lambda parts: _BLOCKS * _longest(parts, None),
    )


# call to implementation to program
CALLS: dict[str, dict[str, Callable[[], Program]]] = {
    **{
        f"flash, {direction}, {length:,} tokens": {
            name: functools.partial(program, length, backward=direction == "backward")
            for name, program in (("jfa", _ours), ("flash_attention", _flash), ("splash_attention", _splash))
        }
        for direction in ("forward", "backward")
        for length in (4096, 16384)
    },
    "decode, 64 rows": {"jfa": _our_decode, "paged_attention": _paged},
    "ragged, 64 rows of one": {
        "jfa": functools.partial(_our_ragged, 1),
        "ragged_paged_attention": functools.partial(_ragged, 1),
    },
    "ragged, 64 rows of 64": {
        "jfa": functools.partial(_our_ragged, 64),
        "ragged_paged_attention": functools.partial(_ragged, 64),
    },
}
