"""Paged attention by the plain formula: the pages of each row are gathered into one float32 array."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jfa import quant, trees
from jfa.reference.attention import attention
from jfa.types import AttentionSpec, Operands, PagedOperands


def paged_attention(
    operands: PagedOperands, *, spec: AttentionSpec
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """reference.attention for each row, over the keys and values in its pages.

    Queries that belong to no row return zeros and -inf.
    """
    n = operands.q.shape[0]
    b = operands.kv_len.shape[0]
    start = jnp.arange(b + 1) if operands.query_start is None else operands.query_start
    q_len = jnp.diff(start)
    # [b, n]: each row's queries first; index n, out of bounds, marks unused entries
    index = jnp.where(jnp.arange(n) < q_len[:, None], start[:-1, None] + jnp.arange(n), n)
    kv_len = jnp.minimum(operands.kv_len, operands.capacity)
    k_pages, v_pages = operands.pages_by_head
    rows = Operands(
        q=jnp.take(operands.q, index, axis=0, mode="fill", fill_value=0),
        k=_laid_out(k_pages, operands.k_scales, operands.page_table).astype(jnp.float32),
        v=_laid_out(v_pages, operands.v_scales, operands.page_table).astype(jnp.float32),
        q_len=q_len,
        kv_len=kv_len,
        q_offset=kv_len - q_len,
        sinks=operands.sinks,
    )
    if operands.tree_mask is not None:
        rows = rows._replace(mask=_tree(operands, spec.left, index, kv_len - q_len))
        spec = dataclasses.replace(spec, window=None)
    out, lse = attention(rows, spec=spec)
    return (
        jnp.zeros((n, *out.shape[2:]), out.dtype).at[index].set(out, mode="drop"),
        jnp.full((n, lse.shape[2]), -jnp.inf).at[index].set(lse, mode="drop"),
    )


def _tree(
    operands: PagedOperands, left: int | None, index: Int[Array, "b n"], offset: Int[Array, " b"]
) -> Bool[Array, "b 1 n tk"]:
    """The keys that each query sees by the tree mask and the window; a causal mask is left to apply."""
    assert operands.tree_mask is not None and operands.query_start is not None
    mask, start = operands.tree_mask, operands.query_start
    visible = jnp.take(trees.seen(mask, start, left), index, axis=0, mode="fill", fill_value=False)
    key = jnp.broadcast_to(jnp.arange(operands.capacity), (*index.shape, operands.capacity))
    new = key - offset[:, None, None]
    inside = jnp.take_along_axis(visible, jnp.clip(new, 0, mask.shape[1] - 1), axis=2)
    found = (new < 0) | inside
    if left is not None:
        depth = jnp.take(trees.depths(mask, start), index, axis=0, mode="fill", fill_value=0)
        found &= new >= depth[..., None] - left
    return found[:, None]


def _laid_out(
    pages: Shaped[Array, "num_pages page_size hkv _"],
    scales: Float[Array, "num_pages page_size hkv"] | None,
    page_table: Int[Array, "b p"],
) -> Float[Array, "b capacity hkv d"]:
    found = pages[page_table]
    if scales is not None:
        found = quant.dequantize(quant.QuantizedArray(values=found, scales=scales[page_table]))
    return found.reshape(found.shape[0], -1, *found.shape[3:])
