"""Paged attention by the plain formula: the pages of each row are gathered into one float32 array."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jfa import quant
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
    rows = Operands(
        q=jnp.take(operands.q, index, axis=0, mode="fill", fill_value=0),
        k=_laid_out(operands.k_pages, operands.k_scales, operands.page_table).astype(jnp.float32),
        v=_laid_out(operands.v_pages, operands.v_scales, operands.page_table).astype(jnp.float32),
        q_len=q_len,
        kv_len=kv_len,
        q_offset=kv_len - q_len,
        sinks=operands.sinks,
    )
    out, lse = attention(rows, spec=spec)
    return (
        jnp.zeros((n, *out.shape[2:]), out.dtype).at[index].set(out, mode="drop"),
        jnp.full((n, lse.shape[2]), -jnp.inf).at[index].set(lse, mode="drop"),
    )


def _laid_out(
    pages: Shaped[Array, "num_pages page_size hkv _"],
    scales: Float[Array, "num_pages page_size hkv"] | None,
    page_table: Int[Array, "b p"],
) -> Float[Array, "b capacity hkv d"]:
    found = pages[page_table]
    if scales is not None:
        found = quant.dequantize(quant.QuantizedArray(values=found, scales=scales[page_table]))
    return found.reshape(found.shape[0], -1, *found.shape[3:])
