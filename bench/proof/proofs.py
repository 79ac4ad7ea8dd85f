"""Proves a case: a kernel, run as machine code, returns the oracle's result and accesses nothing out of bounds.

Inputs past a row's length, and page slots without a token, are NaN or infinite; outputs are initialized to NaN.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa

from .. import amdgcn
from ..truth import cases, numerics
from ..truth.cases import Case, Truth
from ..truth.paged_cases import PagedCase, PagedTruth
from . import aot, emulate

GRADIENT_PRODUCTS = 3  # scores, their cotangent, its product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of a case. share: the worst error / limit of the numerics contract, over all outputs."""

    share: float | None = None
    wrong: str | None = None  # what is wrong; None: nothing
    kernels: tuple[str, ...] = ()
    instructions: int = 0
    races: int = 0


def tile_cases(block_q: int, block_kv: int, head_dim: int, *, quick: bool) -> dict[str, Case]:
    """Cases that cover all paths of a tile: whole tiles, the diagonal, windows, ragged ends, empty rows."""
    several = block_q + block_q // 2 + 3  # queries: one whole tile and part of another
    longer = max(several, 2 * block_kv) + block_kv // 2 + 1
    short = min(block_q, 32) + 5
    found = {
        "causal": Case(shape=(1, several, several, 2, 1, head_dim), options=dict(is_causal=True)),
        "windows_and_lengths": Case(
            shape=(3, short, longer, 2, 1, head_dim),
            options=dict(
                is_causal=True,
                local_window_size=(block_kv + 7, 0),
                query_seq_lengths=[short, short - 9, 0],
                key_value_seq_lengths=[longer, 0, 17],
                query_offset=[longer - short, 0, 3],
            ),
        ),
    }
    if quick:
        return found
    return found | {
        "both_windows": Case(
            shape=(1, short, longer, 1, 1, head_dim), options=dict(local_window_size=(block_kv + 3, block_kv // 2))
        ),
        "soft_cap": Case(shape=(1, short, longer, 2, 2, head_dim), options=dict(logits_soft_cap=3.0)),
        "one_query": Case(
            shape=(2, 1, longer, 4, 2, head_dim), options=dict(is_causal=True, query_offset=[longer - 1, 40])
        ),
        "padded_head_dim": Case(
            shape=(1, short, longer, 2, 1, head_dim * 5 // 8), options=dict(is_causal=True, query_offset=[longer - 20])
        ),
    }


def forward(truth: Truth, arch: str, **options: Any) -> Verdict:
    """Checks output and residual of a case, as machine code of arch, against the oracle; options: of emulate."""
    q, k, v = poisoned(truth)

    def call(q, k, v):
        return jfa.dot_product_attention(q, k, v, implementation="triton", return_residual=True, **truth.options)

    limits = (
        numerics.limit(truth.out, truth.plain_out, q.dtype),
        numerics.limit(truth.lse, truth.plain_lse, np.dtype(np.float32)),
    )
    return verdict(call, (q, k, v), (truth.out, truth.lse), limits, arch=arch, **options)


def backward(truth: Truth, arch: str, **options: Any) -> Verdict:
    """Like forward, for the gradients of all differentiable arguments of a case; the forward kernel runs too."""
    arrays = dict(zip(("query", "key", "value"), poisoned(truth), strict=True))
    arrays |= {name: truth.options[name] for name in cases.GRADIENTS if name in truth.options}
    others = {name: x for name, x in truth.options.items() if name not in arrays}

    def call(*values):
        def loss(arrays):
            out, lse = jfa.dot_product_attention(**arrays, implementation="triton", return_residual=True, **others)
            through_lse = jnp.where(jnp.isfinite(lse), lse * truth.d_lse, 0.0)
            return (out.astype(jnp.float32) * truth.d_out.astype(jnp.float32)).sum() + through_lse.sum()

        gradients = jax.grad(loss)(dict(zip(arrays, values, strict=True)))
        return tuple(gradients[name] for name in arrays)

    dtype = truth.arrays[0].dtype
    wanted = [truth.gradients[name] for name in arrays]
    limits = [numerics.limit(want, plain, dtype, products=GRADIENT_PRODUCTS) for want, plain in wanted]
    return verdict(call, tuple(arrays.values()), [want for want, _ in wanted], limits, arch=arch, **options)


def poisoned(truth: Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query, key and value with NaN and infinities where the kernel must not read."""
    q, k, v = (np.array(x) for x in truth.arrays)
    for row in range(len(q)):
        if (length := truth.options.get("query_seq_lengths")) is not None:
            q[row, length[row] :] = np.nan
        if (length := truth.options.get("key_value_seq_lengths")) is not None:
            k[row, length[row] :] = np.nan
            v[row, length[row] :] = np.inf
    return q, k, v


def verdict(
    fn: Callable, args: Sequence[Any], wanted: Sequence[Any], limits: Sequence[float], *, arch: str, **options: Any
) -> Verdict:
    """Runs fn(*args) as machine code of arch: each output must be within its limit, without races or memory faults."""
    try:
        done = emulate.emulate(fn, *map(jnp.asarray, args), arch=arch, **options)
    except (amdgcn.MachineError, aot.CompileError) as error:
        return Verdict(wrong=f"{type(error).__name__}: {error}")
    shares, wrong = [], None
    for got, want, allowed in zip(done.outputs, wanted, limits, strict=True):
        try:
            shares.append(numerics.assert_within(got, want, allowed) / allowed)
        except AssertionError as error:
            wrong = wrong or str(error)
    if done.races:
        wrong = wrong or done.races[0]
    return Verdict(
        share=max(shares) if len(shares) == len(wanted) else None,
        wrong=wrong,
        kernels=tuple(dict.fromkeys(done.kernels)),
        instructions=done.instructions,
        races=len(done.races),
    )


def paged_tile_cases(
    config: jfa.PagedConfig, head_dim: int, pages: str | None, *, ragged: bool
) -> dict[str, PagedCase]:
    """Cases that cover all paths of a paged kernel's tile: whole tiles, ragged ends, empty rows, split-KV."""
    heads, block_kv = (8, 2), config.block_kv
    tokens = config.block_q // 4 if ragged else 1
    longer = 2 * block_kv + tokens + 3
    lengths = (longer, 0, 1, block_kv, tokens + 7)
    queries = (tokens + 2, 0, 1, 1, tokens) if ragged else None
    return {
        "tiles": PagedCase(
            kv_len=lengths,
            queries=queries,
            padding=2 if ragged else 0,
            heads=heads,
            head_dim=head_dim,
            page_size=16,
            pages=pages,
        ),
        "shared_out": PagedCase(
            kv_len=(4 * block_kv + 5, 3),
            queries=(tokens, 2) if ragged else None,
            heads=heads,
            head_dim=head_dim,
            page_size=7,
            pages=pages,
            sinks=True,
            options={"local_window_size": 3 * block_kv + 1, "config": dataclasses.replace(config, num_splits=3)},
        ),
    }


def over_pages(truth: PagedTruth, arch: str, **options: Any) -> Verdict:
    """Like forward, for a paged case."""

    def call(*arrays):
        return getattr(jfa, truth.op)(*arrays, implementation="triton", return_residual=True, **truth.options)

    limits = (
        numerics.limit(truth.out, truth.plain_out, truth.arrays[0].dtype),
        numerics.limit(truth.lse, truth.plain_lse, np.dtype(np.float32)),
    )
    return verdict(call, truth.arrays, (truth.out, truth.lse), limits, arch=arch, **options)
