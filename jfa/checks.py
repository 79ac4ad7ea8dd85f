"""Checks of the arguments of public functions: shapes, dtypes, numbers. All but paged_values run at trace time only."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from jfa import quant
from jfa.block_mask import BlockMask
from jfa.types import NULL_PAGE

FLOAT_DTYPES = ("float16", "bfloat16", "float32")


def attention_shapes(query: Array, key: Array, value: Array) -> None:
    """Raises ValueError unless query [b, tq, hq, d], key [b, tk, hkv, d] and value [b, tk, hkv, dv] are consistent."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} must be [batch, length, heads, head_dim] (or query, key and value all without batch), "
                f"got shape {x.shape}"
            )
        if not all(isinstance(n, int) for n in x.shape[2:]):
            raise ValueError(f"{name}: only batch and length may be symbolic, not heads and head_dim, got {x.shape}")
        if x.dtype.name not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1:
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}; "
            "cast them before the call"
        )
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key and value must have the same shape except for the head_dim, got {key.shape} and {value.shape}"
        )
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must have the same batch size, got {query.shape[0]} and {key.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"query and key must have the same head_dim, got {query.shape[3]} and {key.shape[3]}")
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got {query.shape[3]} for query, {value.shape[3]} for value")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, got {query.shape[2]} and "
            f"{key.shape[2]}; repeat or drop key heads before the call"
        )


def block_mask(mask: BlockMask, query: Array, key: Array) -> None:
    """Raises ValueError unless a BlockMask fits query [b, tq, hq, d] and key [b, tk, hkv, d]."""
    if not isinstance(mask, BlockMask):
        raise ValueError(
            f"block_mask must be a jfa.BlockMask, got a {type(mask).__name__}; make it with BlockMask.from_array or "
            "another of its class methods"
        )
    (b, tq, hq, _), tk = query.shape, key.shape[1]
    if not all(isinstance(n, int) for n in (b, tq, tk)):
        raise ValueError(f"block_sparse_attention needs static shapes, got {query.shape}; export each shape separately")
    if (mask.tq, mask.tk) != (tq, tk):
        raise ValueError(
            f"block_mask has tiles of {mask.block_q} by {mask.block_kv} for {mask.tq} queries and {mask.tk} keys, got "
            f"{tq} and {tk}; make it for these lengths, or pad query, key and value and pass key_value_seq_lengths"
        )
    got = mask.kv.num_visited.shape[:2]
    if got[0] not in (1, b) or got[1] not in (1, hq):
        raise ValueError(
            f"block_mask is for {got[0]} batch rows and {got[1]} heads, got {b} rows and {hq} query heads; make it for "
            "these numbers, or for 1 where it is the same for all"
        )


def product(x: Array, weight: quant.QuantizedArray) -> None:
    """Raises ValueError unless x [..., in] can be multiplied by a quantized weight [out, in]."""
    if not isinstance(weight, quant.QuantizedArray):
        got = type(weight).__name__
        raise ValueError(f"weight must be a QuantizedArray, got {got}; multiply floats with jnp.matmul")
    if x.dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"x must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
    quantized_weight(weight)
    if weight.values.ndim != 2:
        raise ValueError(f"weight must be [out, in], got {weight.shape}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x must be [..., {weight.shape[-1]}] for a weight of shape {weight.shape}, got {x.shape}")


def quantized_weight(weight: quant.QuantizedArray) -> None:
    """Raises ValueError unless the arrays of a quantized array belong together."""
    group = weight.group_size
    width = weight.shape[-1]
    expected = weight.values.shape[:-1]
    if group is not None:
        if type(group) is not int or group < 1:
            raise ValueError(f"group_size must be an integer >= 1, or None for one scale per vector, got {group!r}")
        if weight.kind == "int4" and (group % 2 or width % group):
            raise ValueError(
                f"groups of 4-bit numbers must be even and divide the width {width} of the weight, got "
                f"group_size={group}"
            )
        expected = (*expected, -(-width // group))
    for name in ("scales", "zeros", "minima"):
        x = getattr(weight, name)
        if x is not None and x.shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} for a weight of shape {weight.shape} with group_size={group}, "
                f"got {x.shape}"
            )
    if weight.zeros is not None and (weight.minima is not None or weight.zeros.dtype != weight.values.dtype):
        raise ValueError(
            f"zeros must have the dtype of values, {weight.values.dtype}, and come without minima, got "
            f"{weight.zeros.dtype}" + (" with minima" if weight.minima is not None else "")
        )
    if weight.rounds_inputs not in (0, 1, 2):
        raise ValueError(f"rounds_inputs must be 0, 1 or 2, got {weight.rounds_inputs!r}")
    if weight.rounds_inputs and weight.kind == "fp8":
        raise ValueError("rounds_inputs multiplies integers and needs a weight in int8 or int4, got fp8")


def linear_shapes(query: Array, key: Array, value: Array, log_decay: Array, beta: Array | None, *, tokens: str) -> None:
    """Raises ValueError unless the arrays of linear attention are consistent.

    tokens: names of the axes before the heads, separated by commas.
    """
    ndim = tokens.count(",") + 3
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != ndim:
            raise ValueError(f"{name} must be [{tokens}, heads, head_dim], got shape {x.shape}")
        if x.dtype.name not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
    if len({x.dtype for x in (query, key, value)}) > 1:
        raise ValueError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}; "
            "cast them before the call"
        )
    if query.shape != key.shape:
        raise ValueError(f"query and key must have the same shape, got {query.shape} and {key.shape}")
    if key.shape[:-2] != value.shape[:-2]:
        raise ValueError(f"key and value must have the same {tokens}, got {key.shape} and {value.shape}")
    if 0 in (key.shape[-1], value.shape[-1]):
        raise ValueError(f"head_dim must be at least 1, got {key.shape[-1]} for key, {value.shape[-1]} for value")
    hk, h = key.shape[-2], value.shape[-2]
    if hk == 0 or h % hk:
        raise ValueError(f"the number of value heads must be a multiple of the number of key heads, got {h} and {hk}")
    heads, columns = value.shape[:-1], (*value.shape[:-1], key.shape[-1])
    for name, x, shapes in (("log_decay", log_decay, (heads, columns)), ("beta", beta, (heads,))):
        if x is None:
            continue
        if x.dtype.name not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
        if x.shape not in shapes:
            raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {x.shape}")


def decay(log_decay: Array) -> None:
    """Raises ValueError if a decay is known to be above 1: a traced one is not."""
    if isinstance(log_decay, Tracer) or log_decay.size == 0:
        return
    # NumPy: in a traced function, jnp would trace this too. NaN may be in padding
    if (largest := float(np.fmax.reduce(np.asarray(log_decay, np.float32), axis=None))) > 0:
        raise ValueError(
            f"log_decay must be at most 0, the logarithm of a decay of 1, but its largest number is {largest:g}; "
            "pass log(decay), for decays from 0 to 1"
        )


def row_starts(query_start: Array, num_tokens: int) -> None:
    """Raises ValueError if rows are known not to be in order within the tokens: traced ones are not known."""
    if isinstance(query_start, Tracer) or not isinstance(num_tokens, int):
        return
    with jax.ensure_compile_time_eval():
        ends = jnp.concatenate([query_start, jnp.full(1, num_tokens, query_start.dtype)])
        is_valid = bool((query_start[0] == 0) & (jnp.diff(ends) >= 0).all())
        got = None if is_valid else query_start.tolist()
    if got is not None:
        raise ValueError(
            f"query_start must begin with 0, not decrease, and end with at most {num_tokens}, the number of tokens, "
            f"got {got}; put the rows one after another from the first token on"
        )


def state(name: str, x: Array, shape: Sequence[int], *, dtype: DTypeLike = jnp.float32) -> None:
    """Raises ValueError unless x is a state of this shape and dtype."""
    if x.shape != tuple(shape) or x.dtype != dtype:
        raise ValueError(f"{name} must be {jnp.dtype(dtype).name}{list(shape)}, got {x.dtype.name}{list(x.shape)}")


def convolution(x: Array, weight: Array, bias: Array | None, *, tokens: str = "batch, length") -> None:
    """Raises ValueError unless x [tokens, channels], weight [channels, width] and bias [channels] are consistent.

    tokens: as in linear_shapes.
    """
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        if array is not None and array.dtype.name not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {array.dtype}; cast it before the call")
    if x.ndim != tokens.count(",") + 2:
        raise ValueError(f"x must be [{tokens}, channels], got shape {x.shape}")
    channels = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != channels or weight.shape[1] < 2:
        raise ValueError(f"weight must be [channels, width] = [{channels}, at least 2], got shape {weight.shape}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one number for each of the {channels} channels, got shape {bias.shape}")


def broadcasts(name: str, x: Array, shape: Sequence[int], *, boolean: bool) -> None:
    """Raises ValueError unless x [.., .., .., ..] broadcasts to the scores [batch, heads, queries, keys]."""
    if boolean != (x.dtype == jnp.bool_):
        other = "pass an additive mask as bias" if boolean else "pass a boolean mask as mask"
        raise ValueError(f"{name} must be {'boolean' if boolean else 'a float array'}, got {x.dtype}; {other}")
    if not boolean and x.dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}; cast it before the call")
    if x.ndim != 4 or any(n not in (1, full) for n, full in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"{name} must broadcast to [batch, query heads, queries, keys] = {list(shape)}, got {list(x.shape)}"
        )


def per_row(name: str, x: Array, batch: int) -> None:
    """Raises ValueError unless x is i32[batch]."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must contain integers, got {x.dtype}")
    if x.shape != (batch,):
        raise ValueError(f"{name} must contain one integer per batch row, shape ({batch},), got {x.shape}")


def per_head(name: str, x: Array, num_heads: int, *, batch: int | None = None) -> None:
    """Raises ValueError unless x is float[num_heads]; with batch, also float[batch or 1, num_heads] is valid."""
    if x.dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {x.dtype}")
    if x.shape == (num_heads,) or (batch is not None and x.shape in ((1, num_heads), (batch, num_heads))):
        return
    per_row = "" if batch is None else f", or per row and query head, shape ({batch}, {num_heads})"
    raise ValueError(f"{name} must contain one number per query head, shape ({num_heads},){per_row}, got {x.shape}")


def segments(name: str, x: Array, shape: Sequence[int]) -> None:
    """Raises ValueError unless x is i32 of this shape."""
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must contain integers, got {x.dtype}")
    if x.shape != tuple(shape):
        raise ValueError(f"{name} must contain one integer per position, shape {tuple(shape)}, got {x.shape}")


def paged_shapes(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    page_table: Array,
    key_scales: Array | None,
    value_scales: Array | None,
) -> None:
    """Raises ValueError unless query [n, hq, d], the pages, their scales and the page table are consistent."""
    if query.ndim != 3:
        raise ValueError(f"query must be [queries, heads, head_dim], got shape {query.shape}")
    if query.dtype.name not in FLOAT_DTYPES:
        raise ValueError(f"query must be {_one_of(FLOAT_DTYPES)}, got {query.dtype}; cast it before the call")
    arrays = {"query": query, "key_pages": key_pages, "value_pages": value_pages, "page_table": page_table}
    for name, x in arrays.items():
        if not all(isinstance(n, int) for n in x.shape):
            raise ValueError(f"{name} must have a static shape, got {x.shape}; export each shape separately")
    for name, x in (("key_pages", key_pages), ("value_pages", value_pages)):
        if x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must be [num_pages, page_size, heads * head_dim] or [num_pages, page_size, heads, head_dim], "
                f"got shape {x.shape}"
            )
        if 0 in x.shape[:2]:
            raise ValueError(f"{name} must have at least one page of at least one token, got shape {x.shape}")
    key_pages, value_pages = _pages_by_head(query, key_pages, value_pages)
    if key_pages.shape[:3] != value_pages.shape[:3]:
        raise ValueError(
            "key_pages and value_pages must have the same shape except for the head_dim, "
            f"got {key_pages.shape} and {value_pages.shape}"
        )
    _page_scales(key_pages, value_pages, key_scales, value_scales)
    held = quant.width(key_pages, key_scales)
    if query.shape[2] != held or held == 0 or value_pages.shape[3] == 0:
        raise ValueError(
            f"query and key_pages must have the same head_dim, at least 1, got {query.shape[2]} and {held}"
            f" (value_pages: {value_pages.shape[3]})"
        )
    if key_pages.shape[2] == 0 or query.shape[1] % key_pages.shape[2]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key heads, got {query.shape[1]} and "
            f"{key_pages.shape[2]}"
        )
    if page_table.ndim != 2 or not jnp.issubdtype(page_table.dtype, jnp.integer):
        raise ValueError(
            f"page_table must be an integer array [rows, pages per row], got {page_table.dtype} of shape "
            f"{page_table.shape}"
        )


def _pages_by_head(query: Array, key_pages: Array, value_pages: Array) -> tuple[Any, Any]:
    """Shapes and dtypes of the pages with an axis of heads."""
    stored = query.shape[2] // 2 if key_pages.dtype == jnp.uint8 else query.shape[2]
    heads = key_pages.shape[2]
    if key_pages.ndim == 3:
        if stored == 0 or heads % stored:
            raise ValueError(
                f"key_pages must have the heads of a token side by side, {stored} columns each for a query of head_dim "
                f"{query.shape[2]}, got {heads} columns of {key_pages.dtype}"
            )
        heads //= stored
    if value_pages.ndim == 3 and (heads == 0 or value_pages.shape[2] % heads):
        raise ValueError(
            f"value_pages must have the {heads} heads of a token side by side, as key_pages has, got "
            f"{value_pages.shape[2]} columns"
        )

    def by_head(x: Array) -> Any:
        shape = x.shape if x.ndim == 4 else (*x.shape[:2], heads, x.shape[2] // heads)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return by_head(key_pages), by_head(value_pages)


def tree_mask(x: Array, num_queries: int) -> None:
    """Raises ValueError unless x is bool[num_queries, m] with m >= 1."""
    if x.dtype != jnp.bool_:
        raise ValueError(f"tree_mask must be boolean, got {x.dtype}; unpack bits before the call")
    if x.ndim != 2 or x.shape[0] != num_queries or x.shape[1] == 0:
        raise ValueError(
            f"tree_mask must be [queries, new tokens of the largest tree] = [{num_queries}, at least 1], got shape "
            f"{x.shape}"
        )


def _page_scales(key_pages: Array, value_pages: Array, key_scales: Array | None, value_scales: Array | None) -> None:
    for name, scales, pages in (("key_scales", key_scales, key_pages), ("value_scales", value_scales, value_pages)):
        quantized = pages.dtype.name not in FLOAT_DTYPES
        if quantized:
            try:
                quant.kind_of(pages.dtype)
            except ValueError as error:
                raise ValueError(f"pages must be {_one_of(FLOAT_DTYPES)}, or quantized; {error}") from None
        if quantized != (scales is not None):
            way = "need scales, got None" if quantized else "have no scales; pass None"
            raise ValueError(f"{name}: pages of dtype {pages.dtype} {way}")
        if scales is None:
            continue
        if scales.dtype.name not in FLOAT_DTYPES:
            raise ValueError(f"{name} must be {_one_of(FLOAT_DTYPES)}, got {scales.dtype}")
        if scales.shape != pages.shape[:3]:
            raise ValueError(
                f"{name} must contain one scale per page, token and head, shape {pages.shape[:3]}, got {scales.shape}"
            )


def paged_values(
    page_table: ArrayLike,
    kv_len: ArrayLike,
    *,
    num_pages: int,
    page_size: int,
    query_start: ArrayLike | None = None,
    tree_mask: ArrayLike | None = None,
) -> None:
    """Raises ValueError unless the values in the arrays of a paged call are valid; for tests and debugging.

    Copies the arrays to the host. Every page of a row's kv_len tokens must be in the pool and not NULL_PAGE;
    query_start must not decrease, and no row may have more queries than tokens. A query with a tree mask must see
    itself and no later token of its row.
    """
    table, lengths = np.asarray(page_table), np.asarray(kv_len)
    capacity = table.shape[1] * page_size
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"row {row}: kv_len must be 0 to {capacity}, its page table's capacity, got {length}")
        for place, page in enumerate(table[row, : -(-length // page_size)].tolist()):
            if not 0 <= page < num_pages or page == NULL_PAGE:
                raise ValueError(
                    f"row {row}: entry {place} of its page table, for the tokens from {place * page_size} on, is page "
                    f"{page}; pages must be {NULL_PAGE + 1} to {num_pages - 1}"
                )
    if query_start is None:
        return
    start = np.asarray(query_start)
    if start[0] != 0:
        raise ValueError(f"query_start must begin with 0, the first query of row 0, got {start[0]}")
    for row, (first, end) in enumerate(itertools.pairwise(start.tolist())):
        if end < first:
            raise ValueError(f"row {row}: query_start must not decrease, got {end} after {first}")
        if end - first > lengths[row]:
            raise ValueError(
                f"row {row}: it has {end - first} queries but kv_len, which includes them, is only {lengths[row]}"
            )
        if tree_mask is not None:
            for index, sees in enumerate(np.asarray(tree_mask)[first:end]):
                if sees.any() and (last := int(np.flatnonzero(sees)[-1])) != index:
                    raise ValueError(
                        f"row {row}: the last token that new token {index} sees must be itself, but by tree_mask it is "
                        f"{last}; order a tree so that parents precede children"
                    )


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
