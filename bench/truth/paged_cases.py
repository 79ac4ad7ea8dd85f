"""Named cases of paged attention and their expected results: small, odd, and each for a reason.

Pages are in random order in the pool; every slot without a token of a row, including all of NULL_PAGE, contains NaN (if
pages are quantized: in its scales).
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from . import oracle
from .numerics import rounding_to


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCase:
    """Shapes, and the options of jfa's paged ops by name."""

    kv_len: tuple[int, ...]
    heads: tuple[int, int]  # query heads, key heads
    head_dim: int
    page_size: int
    queries: tuple[int, ...] | None = None  # new tokens of each row, for the ragged op; None: the decode op, one each
    # for each row, the parent of each new token among them (-1: none), or None for a causal row; None: all are causal
    trees: tuple[tuple[int, ...] | None, ...] | None = None
    mask_width: int | None = None  # columns of the tree mask; None: the most tokens of a tree
    padding: int = 0  # number of queries after the last row's
    value_head_dim: int | None = None
    pages: str | None = None  # a kind of quant.KINDS, or a float dtype; None: the dtype of the queries
    value_pages: str | None = None  # the same for values; None: as the keys
    scale_of_pages: float | None = None  # of all numbers of fp8 pages; None: one of each token and head
    sinks: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


CASES = {
    "one_row": PagedCase(kv_len=(37,), heads=(2, 2), head_dim=16, page_size=16),
    "ragged": PagedCase(kv_len=(1, 0, 50, 33, 16), heads=(4, 2), head_dim=16, page_size=16),
    "pages_of_one": PagedCase(kv_len=(23, 5), heads=(2, 1), head_dim=16, page_size=1),
    "odd_pages": PagedCase(kv_len=(23, 40), heads=(3, 1), head_dim=32, page_size=7),
    "pages_larger_than_tiles": PagedCase(kv_len=(150, 64), heads=(2, 1), head_dim=16, page_size=64),
    "large_pages": PagedCase(kv_len=(300, 9), heads=(2, 2), head_dim=16, page_size=256),
    "mqa_16": PagedCase(kv_len=(41, 8), heads=(16, 1), head_dim=16, page_size=8),
    "mqa_20": PagedCase(kv_len=(35,), heads=(20, 1), head_dim=16, page_size=8),
    "head_dim_80": PagedCase(kv_len=(35, 2), heads=(4, 2), head_dim=80, page_size=16),
    "head_dim_256": PagedCase(kv_len=(21,), heads=(2, 1), head_dim=256, page_size=16),
    "narrow_values": PagedCase(kv_len=(35,), heads=(4, 2), head_dim=48, value_head_dim=24, page_size=16),
    "window": PagedCase(kv_len=(70, 9), heads=(4, 2), head_dim=16, page_size=8, options={"local_window_size": 20}),
    "window_of_itself": PagedCase(
        kv_len=(20,), heads=(1, 1), head_dim=16, page_size=4, options={"local_window_size": 0}
    ),
    "soft_cap": PagedCase(kv_len=(40, 3), heads=(2, 2), head_dim=16, page_size=16, options={"logits_soft_cap": 2.0}),
    "negative_scale": PagedCase(kv_len=(30,), heads=(2, 2), head_dim=16, page_size=16, options={"scale": -0.3}),
    "sinks": PagedCase(kv_len=(40, 0, 3), heads=(4, 2), head_dim=16, page_size=16, sinks=True),
    "int8": PagedCase(kv_len=(40, 0, 17), heads=(4, 2), head_dim=16, page_size=16, pages="int8"),
    "int8_odd": PagedCase(
        kv_len=(23, 40),
        heads=(6, 2),
        head_dim=40,
        page_size=5,
        pages="int8",
        sinks=True,
        options={"logits_soft_cap": 3.0},
    ),
    "fp8": PagedCase(kv_len=(40, 1, 17), heads=(4, 2), head_dim=16, page_size=16, pages="fp8"),
    "int4": PagedCase(kv_len=(40, 1, 17), heads=(4, 2), head_dim=32, page_size=16, pages="int4"),
    "int4_odd": PagedCase(
        kv_len=(23, 40), heads=(2, 1), head_dim=72, page_size=6, pages="int4", options={"local_window_size": 11}
    ),
    "other_floats": PagedCase(kv_len=(33,), heads=(2, 1), head_dim=16, page_size=16, pages="bfloat16"),
    "prefill": PagedCase(kv_len=(37,), queries=(37,), heads=(2, 1), head_dim=16, page_size=16),
    "chunks_and_tokens": PagedCase(
        kv_len=(50, 33, 8, 0, 20), queries=(20, 1, 8, 0, 1), padding=3, heads=(4, 2), head_dim=16, page_size=8
    ),
    "chunk_with_odd_group": PagedCase(
        kv_len=(45, 12), queries=(13, 5), heads=(3, 1), head_dim=40, page_size=9, options={"logits_soft_cap": 3.0}
    ),
    "chunk_with_window": PagedCase(
        kv_len=(70, 30),
        queries=(25, 30),
        heads=(2, 1),
        head_dim=16,
        page_size=16,
        options={"local_window_size": (18, 3)},
    ),
    "chunk_with_sinks": PagedCase(kv_len=(40, 9), queries=(10, 9), heads=(4, 2), head_dim=16, page_size=16, sinks=True),
    "chunk_int8": PagedCase(kv_len=(45, 12), queries=(13, 5), heads=(4, 1), head_dim=32, page_size=16, pages="int8"),
    "chunk_int4": PagedCase(
        kv_len=(45, 12), queries=(13, 1), padding=2, heads=(4, 2), head_dim=48, page_size=16, pages="int4"
    ),
    "chunk_fp8": PagedCase(kv_len=(45, 12), queries=(13, 5), heads=(2, 2), head_dim=16, page_size=8, pages="fp8"),
    "int8_keys_int4_values": PagedCase(
        kv_len=(40, 1, 17), heads=(4, 2), head_dim=32, page_size=16, pages="int8", value_pages="int4"
    ),
    "int4_keys_fp8_values": PagedCase(
        kv_len=(40, 0, 17), heads=(2, 1), head_dim=32, value_head_dim=24, page_size=5, pages="int4", value_pages="fp8"
    ),
    "float_keys_int8_values": PagedCase(
        kv_len=(40, 3), heads=(4, 2), head_dim=16, page_size=16, value_pages="int8", sinks=True
    ),
    "chunk_fp8_keys_float_values": PagedCase(
        kv_len=(45, 12), queries=(13, 5), heads=(4, 2), head_dim=16, page_size=8, pages="fp8", value_pages="bfloat16"
    ),
    "chunk_float16_keys_bfloat16_values": PagedCase(
        kv_len=(45,), queries=(13,), heads=(2, 2), head_dim=16, page_size=8, pages="float16", value_pages="bfloat16"
    ),
    "tree": PagedCase(
        kv_len=(40, 9),
        queries=(7, 5),
        trees=((-1, 0, 0, 1, 1, 2, 4), (-1, 0, 0, 0, 0)),
        padding=2,
        heads=(4, 2),
        head_dim=16,
        page_size=8,
    ),
    "tree_beside_chunk_and_token": PagedCase(
        kv_len=(50, 33, 8, 0, 20, 6),
        queries=(20, 1, 8, 0, 6, 6),
        trees=(None, None, None, None, (-1, 0, 1, 0, 3, 3), (-1, -1, 0, 1, 1, 3)),
        padding=3,
        heads=(3, 1),
        head_dim=16,
        page_size=8,
        sinks=True,
    ),
    "tree_with_narrow_window": PagedCase(  # tokens of the tree see neither all before it nor all of its path
        kv_len=(70, 25, 30),
        queries=(25, 9, 18),
        trees=((-1, *range(12), *range(12)), (-1, 0, 1, 2, 3, 4, 5, 6, 7), None),
        heads=(2, 1),
        head_dim=16,
        page_size=4,
        options={"local_window_size": 5},
    ),
    "tree_with_window_and_soft_cap": PagedCase(
        kv_len=(70, 40),
        queries=(12, 30),
        trees=((-1, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5), None),
        heads=(2, 2),
        head_dim=16,
        page_size=16,
        options={"local_window_size": 20, "logits_soft_cap": 3.0},
    ),
    "tree_of_many_tokens": PagedCase(  # two words of bits, of which tokens in other tiles may use only the second
        kv_len=(81, 44),
        queries=(61, 44),
        trees=((*(-1,) * 30, *range(15), *range(15), 45), (*(-1,) * 40, 38, 39, 40, 42)),
        mask_width=64,
        heads=(2, 1),
        head_dim=16,
        page_size=16,
    ),
    "tree_int4": PagedCase(
        kv_len=(45, 12),
        queries=(3, 5),
        trees=((-1, 0, 0), (-1, 0, 0, 1, 1)),
        heads=(4, 2),
        head_dim=48,
        page_size=16,
        pages="int4",
    ),
    "tree_fp8": PagedCase(
        kv_len=(45, 12),
        queries=(6, 5),
        trees=((-1, 0, 0, 1, 1, 2), None),
        heads=(2, 2),
        head_dim=16,
        page_size=8,
        pages="fp8",
    ),
    "tree_int8": PagedCase(
        kv_len=(45, 12),
        queries=(13, 5),
        trees=((-1, *range(6), *range(6)), None),
        mask_width=32,
        heads=(4, 1),
        head_dim=32,
        page_size=5,
        pages="int8",
    ),
}


@dataclasses.dataclass(frozen=True)
class PagedTruth:
    """The inputs of a case, the oracle's result, and that of the plain formula with the dtype's rounding."""

    arrays: tuple  # query, key_pages, value_pages, page_table, kv_len, and query_start for the ragged op
    options: dict[str, Any]
    out: np.ndarray
    lse: np.ndarray
    plain_out: np.ndarray
    plain_lse: np.ndarray

    @property
    def op(self) -> str:
        """The name of the public op."""
        return "paged_decode_attention" if len(self.arrays) == 5 else "ragged_paged_attention"


@functools.cache
def truth(name: str, dtype: str) -> PagedTruth:
    """Seeded inputs of a case of CASES for queries in a dtype, and the expected results."""
    return truth_of(CASES[name], dtype, seed=list(CASES).index(name))


def truth_of(case: PagedCase, dtype: str, *, seed: int) -> PagedTruth:
    """Seeded inputs of a case for queries in a dtype, and the expected results."""
    random = np.random.default_rng(seed)
    hq = case.heads[0]
    d, dv = case.head_dim, case.value_head_dim or case.head_dim
    queries = (1,) * len(case.kv_len) if case.queries is None else case.queries
    start = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    q = np.array(jnp.asarray(random.standard_normal((start[-1] + case.padding, hq, d)), dtype))
    if case.padding:
        q[start[-1] :] = np.nan
    table, num_pages = _page_table(random, case)
    of_keys = case.pages or dtype
    keys = _pool(random, case, table, num_pages, d, of_keys)
    values = _pool(random, case, table, num_pages, dv, case.value_pages or of_keys)
    options = dict(case.options)
    if case.sinks:
        options["sinks"] = jnp.asarray(random.standard_normal(hq) * 2, jnp.float32)
    named = {"scale": options.get("scale", d**-0.5), "softcap": options.get("logits_soft_cap"), "causal": True}
    named["sinks"] = options.get("sinks")
    if (window := options.get("local_window_size")) is not None:
        named["window"] = (window, 0) if isinstance(window, int) else window
    options |= {"key_scales": keys.scales, "value_scales": values.scales}
    outs = []
    for rounding in (lambda x: x, rounding_to(q.dtype)):
        out, lse = np.zeros((len(q), hq, dv)), np.full((len(q), hq), -np.inf)
        for row, length in enumerate(case.kv_len):
            own = slice(start[row], start[row + 1])
            k, v = keys.rows[row][None], values.rows[row][None]
            before = length - queries[row]
            if case.trees is None or (parents := case.trees[row]) is None:
                found = oracle.attention(q[own][None], k, v, q_offset=np.array([before]), rounding=rounding, **named)
                out[own], lse[own] = found[0][0], found[1][0]
                continue
            for query in range(queries[row]):  # each by itself, as the last token of its path
                path = _path(parents, query)
                held = [*range(before), *(before + token for token in path)]
                found = oracle.attention(
                    q[start[row] + query][None, None],
                    k[:, held],
                    v[:, held],
                    q_offset=np.array([len(held) - 1]),
                    rounding=rounding,
                    **named,
                )
                out[start[row] + query], lse[start[row] + query] = found[0][0, 0], found[1][0, 0]
        outs += [out, lse]
    if case.trees is not None:
        options["tree_mask"] = jnp.asarray(_tree_mask(case, len(q), start))
    arrays = (q, keys.pages, values.pages, table, np.asarray(case.kv_len, np.int32))
    return PagedTruth(arrays if case.queries is None else (*arrays, start), options, *outs)


def _path(parents: tuple[int, ...], token: int) -> list[int]:
    """The new tokens from a root to a token."""
    return ([] if parents[token] < 0 else _path(parents, parents[token])) + [token]


def _tree_mask(case: PagedCase, num_queries: int, start: np.ndarray) -> np.ndarray:
    """bool[num_queries, m], all True for padding."""
    assert case.trees is not None
    mask = np.ones((num_queries, case.mask_width or max(len(parents or ()) for parents in case.trees)), bool)
    mask[: start[-1]] = False
    for first, parents in zip(start.tolist(), case.trees, strict=False):
        for token in range(len(parents or ())):
            mask[first + token, _path(parents or (), token)] = True
    return mask


def _page_table(random: np.random.Generator, case: PagedCase) -> tuple[np.ndarray, int]:
    """A page table in which every row has the pages it needs in random order, then NULL_PAGE in at least one entry."""
    needed = [-(-length // case.page_size) for length in case.kv_len]
    num_pages = sum(needed) + 2
    free = list(random.permutation(np.arange(1, num_pages)))
    table = np.zeros((len(needed), max(needed) + 1), np.int32)
    for row, count in enumerate(needed):
        table[row, :count] = [free.pop() for _ in range(count)]
    return table, num_pages


@dataclasses.dataclass(frozen=True)
class _Pool:
    pages: Any
    scales: Any
    rows: list[np.ndarray]  # the exact values of each row's tokens, float64[kv_len, hkv, d]


def _pool(random: np.random.Generator, case: PagedCase, table: np.ndarray, num_pages: int, d: int, pages: str) -> _Pool:
    hkv, size = case.heads[1], case.page_size
    held = np.zeros((num_pages, size), bool)
    for row, length in enumerate(case.kv_len):
        for token in range(length):
            held[table[row, token // size], token % size] = True
    x = random.standard_normal((num_pages, size, hkv, d))
    scales = None
    if pages in ("int8", "fp8", "int4"):
        drawn, scale = 0.02 * np.exp(random.standard_normal((num_pages, size, hkv))), case.scale_of_pages
        scales = (drawn if scale is None else np.full_like(drawn, scale)).astype(ml_dtypes.bfloat16)
        if pages == "int8":
            stored = np.clip(np.round(x * 40), -127, 127).astype(np.int8)
            numbers = stored.astype(np.float64)
        elif pages == "fp8":
            stored = np.clip(x * (100 if scale is None else 1), -448, 448).astype(ml_dtypes.float8_e4m3fn)
            numbers = stored.astype(np.float64)
        else:
            levels = random.integers(0, 16, x.shape)
            stored = (levels[..., : d // 2] + 16 * levels[..., d // 2 :]).astype(np.uint8)
            numbers = levels - 7.5
        exact = numbers * scales.astype(np.float64)[..., None]
        scales = np.where(held[..., None], scales, np.nan).astype(ml_dtypes.bfloat16)
    else:
        stored = np.asarray(jnp.asarray(x, pages))
        exact = stored.astype(np.float64)
        stored = np.where(held[..., None, None], stored, np.nan).astype(stored.dtype)
    rows = [exact[table[row]].reshape(-1, hkv, d)[:length] for row, length in enumerate(case.kv_len)]
    stored = stored.reshape(*stored.shape[:2], -1)
    return _Pool(jnp.asarray(stored), None if scales is None else jnp.asarray(scales), rows)
