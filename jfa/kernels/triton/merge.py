"""Merges the results of programs that split a row's keys (split-KV) as a Pallas-Triton kernel.

One program merges the parts of one query and head. Parts are weighted by the exponentials of their log-sum-exp, in
float32 and in an order that depends on nothing but their number. By XLA this takes two or more launches.

Source: "Flash-Decoding for long-context inference" (Dao et al., 2023). Tested in tests/jfa/test_paged_attention.py.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jfa.kernels.common import output
from jfa.kernels.triton._pallas import CompilerParams, load, pl, store
from jfa.kernels.triton._primitives import exp2, fma
from jfa.kernels.triton.tile import LOG2_E, padded

_BLOCK = 16  # parts that are loaded at a time


def merged(
    out: Float[Array, "splits n hq dv"],
    lse: Float[Array, "splits n hq"],
    sinks: Float[Array, " hq"] | None,
    *,
    dtype: Any,
    interpret: bool,
) -> tuple[Float[Array, "n hq dv"], Float[Array, "n hq"]]:
    """The output in dtype and the natural log-sum-exp over all parts, which is without the sinks.

    out, lse: float32, each part's output and log-sum-exp; zeros and -inf of a part without a visible key.
    """
    _, n, hq, dv = out.shape
    arrays = {"out": out, "lse": lse} | ({} if sinks is None else {"sinks": sinks})
    call = pl.pallas_call(
        functools.partial(_merge_kernel, names=tuple(arrays)),
        name="split_kv_merge",
        grid=(n, hq),
        in_specs=[pl.BlockSpec(x.shape, functools.partial(_whole, x.ndim)) for x in arrays.values()],
        out_specs=[
            pl.BlockSpec((n, hq, dv), functools.partial(_whole, 3)),
            pl.BlockSpec((n, hq), functools.partial(_whole, 2)),
        ],
        out_shape=[output((n, hq, dv), dtype, like=out), output((n, hq), jnp.float32, like=out)],
        compiler_params=CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # index arithmetic in a kernel is int32, regardless of JAX's default
        return call(*arrays.values())


def _whole(ndim: int, *grid) -> tuple[int, ...]:
    return (0,) * ndim


def _merge_kernel(
    *refs,  # the arguments by `names`: out [splits, n, hq, dv], lse [splits, n, hq], sinks [hq]; o [n, hq, dv], [n, hq]
    names: tuple[str, ...],
):
    *inputs, o_ref, lse_ref = refs
    ref = dict(zip(names, inputs, strict=True))
    num_splits, _, _, dv = ref["out"].shape
    query, head = pl.program_id(0), pl.program_id(1)
    column = jnp.arange(padded(dv))

    def lse_of(split):
        return load(ref["lse"].at[split, query, head], mask=split < num_splits, other=-jnp.inf)

    every = lse_of(jnp.arange(pl.next_power_of_2(num_splits)))
    m = jnp.max(every)
    empty = m == -jnp.inf
    m = jnp.where(empty, 0.0, m)
    total = jnp.sum(exp2((every - m) * LOG2_E))
    block = min(_BLOCK, pl.next_power_of_2(num_splits))

    def add_parts(i, acc):
        split = i * block + jnp.arange(block)
        weight = exp2((lse_of(split) - m) * LOG2_E)
        inside = jnp.broadcast_to((split < num_splits)[:, None] & (column < dv)[None, :], acc.shape)
        part = load(ref["out"].at[split[:, None], query, head, column[None, :]], mask=inside, other=0.0)
        return fma(weight[:, None], part, acc)

    acc = jnp.zeros((block, len(column)), jnp.float32)
    acc = lax.fori_loop(0, pl.cdiv(num_splits, block), add_parts, acc)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log2(jnp.where(empty, 1.0, total)) / LOG2_E)
    if "sinks" in ref:
        total = total + exp2((ref["sinks"][head].astype(jnp.float32) - m) * LOG2_E)
    norm = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
    store(o_ref.at[query, head, column], (acc.sum(0) * norm).astype(o_ref.dtype), mask=column < dv)
    store(lse_ref.at[query, head], lse)
