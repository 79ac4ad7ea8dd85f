"""Proves a case: a kernel, run as machine code, returns the oracle's result and accesses nothing out of bounds.

A Check is a call of the public op with what it must return; `verdict` runs it emulated, `on_device` on this device, and
`interpreted` in JAX's interpreter of TPU kernels.

Inputs past a row's length, and page slots without a token, are NaN or infinite; outputs are initialized to NaN.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa import row_ops, write_ops
from jfa.kernels.tpu._pallas import pltpu
from jfa.types import Implementation

from .. import amdgcn
from ..measure import outcome
from ..truth import cases, numerics
from ..truth.cases import Case, Truth
from ..truth.linear_cases import LinearCase, LinearTruth
from ..truth.paged_cases import PagedCase, PagedTruth
from ..truth.product_cases import ProductCase, ProductTruth
from ..truth.row_cases import RowTruth
from ..truth.write_cases import WriteTruth
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


class Check(NamedTuple):
    """A call and its expected results: each leaf of fn(*args) is within its limit of the one in wanted."""

    fn: Callable
    args: tuple
    wanted: Sequence[Any]
    limits: Sequence[float]


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
        "one_query": Case(  # as in a ring of slots
            shape=(2, 1, longer, 4, 2, head_dim),
            options=dict(key_value_seq_lengths=[longer, 40]),
            mask=(2, 1, 1, longer),
        ),
        "padded_head_dim": Case(
            shape=(1, short, longer, 2, 1, head_dim * 5 // 8), options=dict(is_causal=True, query_offset=[longer - 20])
        ),
    }


def one_query_cases(block_kv: int, head_dim: int) -> dict[str, Case]:
    """Cases of one query per row, which the kernel of pages computes: by one program, and by several for more keys."""
    few, many = 2 * block_kv + 3, 3 * 256 + 40
    return {
        "one_query_of_rows": Case(
            shape=(3, 1, few, 8, 2, head_dim),
            options=dict(is_causal=True, query_offset=[few - 1, 40, 2], key_value_seq_lengths=[few, 0, 9]),
        ),
        "one_query_shared_out": Case(
            shape=(2, 1, many, 6, 2, head_dim * 5 // 8),
            value_head_dim=head_dim,
            options=dict(
                local_window_size=(many - 50, 5),
                query_offset=[many - 7, 11],
                key_value_seq_lengths=[many - 4, 30],
                logits_soft_cap=3.0,
            ),
            sinks=True,
        ),
    }


def forward(truth: Truth, arch: str, **options: Any) -> Verdict:
    """Checks output and residual of a case, as machine code of arch, against the oracle; options: of emulate."""
    return verdict(*forward_check(truth, "triton"), arch=arch, **options)


def backward(truth: Truth, arch: str, **options: Any) -> Verdict:
    """Like forward, for the gradients of all differentiable arguments of a case; the forward kernel runs too."""
    return verdict(*backward_check(truth, "triton"), arch=arch, **options)


def forward_check(truth: Truth, implementation: Implementation | None) -> Check:
    """Output and residual of a case; implementation: of the op, None: the op chooses."""

    def call(q, k, v):
        return getattr(jfa, truth.op)(q, k, v, implementation=implementation, return_residual=True, **truth.options)

    args = poisoned(truth)
    return Check(call, args, (truth.out, truth.lse), _limits(truth, args[0].dtype))


def backward_check(truth: Truth, implementation: Implementation | None) -> Check:
    """The gradients of all differentiable arguments of a case; implementation: of the op, None: the op chooses."""
    arrays = dict(zip(("query", "key", "value"), poisoned(truth), strict=True))
    arrays |= {name: truth.options[name] for name in cases.GRADIENTS if name in truth.options}
    others = {name: x for name, x in truth.options.items() if name not in arrays}

    def call(*values):
        def loss(arrays):
            options = arrays | others
            out, lse = getattr(jfa, truth.op)(**options, implementation=implementation, return_residual=True)
            through_lse = jnp.where(jnp.isfinite(lse), lse * truth.d_lse, 0.0)
            return (out.astype(jnp.float32) * truth.d_out.astype(jnp.float32)).sum() + through_lse.sum()

        gradients = jax.grad(loss)(dict(zip(arrays, values, strict=True)))
        return tuple(gradients[name] for name in arrays)

    dtype = truth.arrays[0].dtype
    wanted = [truth.gradients[name] for name in arrays]
    limits = [numerics.limit(want, plain, dtype, products=GRADIENT_PRODUCTS) for want, plain in wanted]
    return Check(call, tuple(arrays.values()), [want for want, _ in wanted], limits)


def _limits(truth: Truth | PagedTruth, dtype: Any) -> tuple[float, float]:
    """Of the output and the residual."""
    return (
        numerics.limit(truth.out, truth.plain_out, dtype),
        numerics.limit(truth.lse, truth.plain_lse, np.dtype(np.float32)),
    )


def poisoned(truth: Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """query, key and value with NaN and infinities where the kernel must not read."""
    q, k, v = (np.array(x) for x in truth.arrays)
    for row in range(len(q)):
        if (length := truth.options.get("query_seq_lengths")) is not None:
            q[row, length[row] :] = np.nan
        if (length := truth.options.get("key_value_seq_lengths")) is not None:
            k[row, length[row] :] = np.nan
            v[row, length[row] :] = np.inf
    if "block_mask" in truth.options:
        (b, _, hq, _), (tk, hkv) = q.shape, k.shape[1:3]
        seen = np.broadcast_to(truth.named["mask"], (b, hq, q.shape[1], tk))
        q[~seen.any(3).swapaxes(1, 2)] = np.nan
        of_group = seen.any(2).reshape(b, hkv, hq // hkv, tk).any(2).swapaxes(1, 2)
        k[~of_group], v[~of_group] = np.nan, np.inf
    return q, k, v


def verdict(
    fn: Callable, args: Sequence[Any], wanted: Sequence[Any], limits: Sequence[float], *, arch: str, **options: Any
) -> Verdict:
    """Runs fn(*args) as machine code of arch: each output must be within its limit, without races or memory faults."""
    try:
        done = emulate.emulate(fn, *jax.tree.map(jnp.asarray, args), arch=arch, **options)
    except (amdgcn.MachineError, aot.CompileError) as error:
        return Verdict(wrong=f"{type(error).__name__}: {error}")
    share, wrong = _compared(done.outputs, wanted, limits)
    return Verdict(
        share=share,
        wrong=wrong or (done.races[0] if done.races else None),
        kernels=tuple(dict.fromkeys(done.kernels)),
        instructions=done.instructions,
        races=len(done.races),
    )


def on_device(check: Check) -> Verdict:
    """Runs a check compiled for this process's device; a call that fails is wrong too."""
    args = jax.tree.map(jnp.asarray, check.args)
    try:
        lowered = jax.jit(check.fn).lower(*args)
        kernels = aot.kernel_names(lowered)
        outputs = jax.block_until_ready(lowered.compile()(*args))
    except outcome.REFUSALS as error:
        return Verdict(wrong=f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}")
    share, wrong = _compared(outputs, check.wanted, check.limits)
    return Verdict(share=share, wrong=wrong, kernels=kernels)


def interpreted(check: Check) -> Verdict:
    """Runs a check in JAX's interpreter of TPU kernels, on this CPU.

    Memory is NaN until it is written, a copy arrives when its semaphore is waited for, programs of parallel axes run in
    random order, and reads out of bounds and races are errors.

    Raises:
      UnsupportedError: the kernel does not support the call.
    """
    args = jax.tree.map(jnp.asarray, check.args)
    params = pltpu.InterpretParams(detect_races=True, random_seed=0)
    try:
        with pltpu.force_tpu_interpret_mode(params):
            lowered = jax.jit(check.fn).lower(*args)
            outputs = jax.block_until_ready(lowered.compile()(*args))
    except (jfa.UnsupportedError, ValueError):
        raise
    except Exception as error:  # the interpreter passes any error of a callback on as an error of XLA's
        lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
        told = next((line for line in reversed(lines) if "Error" in line or "race" in line.lower()), lines[0])
        return Verdict(wrong=f"{type(error).__name__}: {told.strip()}", races=int("race" in str(error).lower()))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    share, wrong = _compared(outputs, check.wanted, check.limits)
    return Verdict(share=share, wrong=wrong)


def _compared(
    outputs: Sequence[Any], wanted: Sequence[Any], limits: Sequence[float]
) -> tuple[float | None, str | None]:
    """(the worst error / limit, None if an output has no error; what is wrong with the first wrong output)."""
    shares, wrong = [], None
    for got, want, allowed in zip(outputs, wanted, limits, strict=True):
        try:
            shares.append(numerics.assert_within(got, want, allowed) / allowed)
        except AssertionError as error:
            wrong = wrong or str(error)
    return max(shares) if len(shares) == len(wanted) else None, wrong


def paged_tile_cases(
    config: jfa.PagedConfig | jfa.TpuConfig, head_dim: int, pages: str | None, *, ragged: bool, spread: float
) -> dict[str, PagedCase]:
    """Cases that cover all paths of a paged kernel's tile: whole tiles, ragged ends, empty rows, split-KV.

    spread: the standard deviation of the scores where the parts of split keys are many.
    """
    heads, block_kv = (8, 2), config.block_kv
    tokens = config.block_q // 4 if ragged else 1
    longer = 2 * block_kv + tokens + 3
    lengths = (longer, 0, 1, block_kv, tokens + 7)
    queries = (tokens + 2, 0, 1, 1, tokens) if ragged else None
    shared_out = many_parts = config
    if isinstance(config, jfa.PagedConfig):
        shared_out, many_parts = (dataclasses.replace(config, num_splits=parts) for parts in (3, 37))
    found = {
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
            options={"local_window_size": 3 * block_kv + 1, "config": shared_out},
        ),
    }
    if not ragged:  # several tiles of the kernel that merges them; with a large spread, their weights differ
        found["many_parts"] = dataclasses.replace(
            found["tiles"],
            kv_len=(36 * block_kv + 5,),
            options={"config": many_parts, "scale": spread * head_dim**-0.5},
        )
    return found


def over_pages(truth: PagedTruth, arch: str, **options: Any) -> Verdict:
    """Like forward, for a paged case."""
    return verdict(*paged_check(truth, "triton"), arch=arch, **options)


def paged_check(truth: PagedTruth, implementation: Implementation | None) -> Check:
    """Like forward_check, for a paged case."""

    def call(*arrays):
        return getattr(jfa, truth.op)(*arrays, implementation=implementation, return_residual=True, **truth.options)

    return Check(call, truth.arrays, (truth.out, truth.lse), _limits(truth, truth.arrays[0].dtype))


def product_tile_cases(
    config: jfa.ProductConfig | jfa.TpuProductConfig,
    group_size: int | None,
    kind: str,
    *,
    rows: int,
    rounds_inputs: int,
) -> dict[str, ProductCase]:
    """Cases that cover all paths of a product's tile: whole tiles, ragged ends, more groups than tiles, splits."""
    out = config.block_out + config.block_out // 2 + 3
    width = 2 * max(config.block_in, group_size or 0) + (group_size or 22)
    shared: dict[str, Any] = dict(kind=kind, group_size=group_size, rounds_inputs=rounds_inputs)
    on_gpu = isinstance(config, jfa.ProductConfig)
    split = {"config": dataclasses.replace(config, num_splits=3)} if on_gpu else {}
    return {
        "tiles": ProductCase(rows=rows, out=out, width=width, zeros=kind == "int4", **shared),
        "minima_shared_out": ProductCase(
            rows=1,
            out=17,
            width=2 * width,
            minima=True,
            options=split,
            **shared,
        ),
    }


def of_weight(truth: ProductTruth, arch: str, **options: Any) -> Verdict:
    """Like forward, for a product."""
    return verdict(*product_check(truth, "triton"), arch=arch, **options)


def product_check(truth: ProductTruth, implementation: Implementation | None) -> Check:
    """Like forward_check, for a product."""

    def call(x, weight):
        return (jfa.quantized_matmul(x, weight, implementation=implementation, **truth.options),)

    limit = numerics.limit(truth.out, truth.plain_out, truth.x.dtype)
    return Check(call, (truth.x, truth.weight), (truth.out,), (limit,))


def linear_tile_cases(config: jfa.LinearKernelConfig, head_dim: int, op: str) -> dict[str, LinearCase]:
    """Cases that cover all paths of the kernel: whole chunks, ragged ends, empty rows, columns past the last one."""
    several = config.chunk_size + config.chunk_size // 2 + 3  # tokens: one whole chunk and part of another
    shared: dict[str, Any] = dict(dv=config.block_v + config.block_v // 2 + 3, dk=head_dim)
    shared |= dict(delta=op == "delta_attention", by_columns=op == "gated_linear_attention")
    segments = np.arange(several) // (config.chunk_size // 2 + 1)
    return {
        "groups": LinearCase(b=1, t=several, hk=1, h=2, state=False, **shared),
        "lengths_and_segments": LinearCase(
            b=3,
            t=several,
            hk=1,
            h=1,
            options=dict(seq_lengths=np.array([several, 0, 5]), segment_ids=np.stack([segments, segments, segments])),
            **shared,
        ),
        "padded_head_dim": dataclasses.replace(LinearCase(b=1, t=several, **shared), dk=head_dim * 5 // 8),
        "rows": LinearCase(rows=(1, several, 0, 3), new=(1,), padding=5, hk=1, h=2, **shared),
    }


def of_chunks(truth: LinearTruth, arch: str, **options: Any) -> Verdict:
    """Like forward, for linear attention."""
    return verdict(*linear_check(truth, "triton"), arch=arch, **options)


def linear_check(truth: LinearTruth, implementation: Implementation | None) -> Check:
    """Like forward_check, for linear attention: the output, and the state after the last token of each row."""
    scale, arrays, given = _poisoned_tokens(truth)

    def call(arrays, given):
        return getattr(jfa, truth.op)(*arrays, scale=scale, implementation=implementation, **given)

    dtype = arrays[2].dtype
    limits = (  # what is added to the state is rounded to the dtype of the inputs
        numerics.limit(truth.out, truth.plain_out, dtype),
        numerics.limit(truth.state, truth.plain_state, dtype),
    )
    return Check(call, (arrays, given), (truth.out, truth.state), limits)


def of_chunks_backward(truth: LinearTruth, arch: str, **options: Any) -> Verdict:
    """Like backward, for linear attention."""
    return verdict(*linear_backward_check(truth, "triton"), arch=arch, **options)


def linear_backward_check(truth: LinearTruth, implementation: Implementation | None) -> Check:
    """Like backward_check, for linear attention."""
    scale, arrays, given = _poisoned_tokens(truth)
    given |= dict(zip(("query", "key", "value", "log_decay"), arrays, strict=True))
    others = {name: x for name, x in given.items() if name not in truth.gradients}
    names = tuple(truth.gradients)

    def call(values, others):
        def loss(values):
            options = dict(zip(names, values, strict=True)) | others
            found = jfa.linear_attention(**options, scale=scale, implementation=implementation)
            return sum(
                (x.astype(jnp.float32) * d.astype(jnp.float32)).sum()
                for x, d in zip(found, truth.cotangents, strict=True)
            )

        return jax.grad(loss)(values)

    dtype = arrays[2].dtype
    limits = [numerics.limit(*pair, dtype, products=GRADIENT_PRODUCTS) for pair in truth.gradients.values()]
    args = tuple(given[name] for name in names), others
    return Check(call, args, [want for want, _ in truth.gradients.values()], limits)


def _poisoned_tokens(truth: LinearTruth) -> tuple[float | None, tuple[np.ndarray, ...], dict[str, Any]]:
    """(scale, arrays, other options) of a case, with NaN in tokens past a row's length."""
    scale = truth.options.get("scale")
    given = {name: x for name, x in truth.options.items() if name != "scale"}
    arrays = tuple(map(np.array, truth.arrays))
    if (lengths := given.get("seq_lengths")) is not None:
        of_tokens = [*arrays]
        if "beta" in given:
            of_tokens.append(np.array(given["beta"]))
            given["beta"] = of_tokens[-1]
        for x, (row, length) in itertools.product(of_tokens, enumerate(lengths)):
            x[row, length:] = np.nan
    return scale, arrays, given


def of_tokens(truth: WriteTruth, arch: str, **options: Any) -> Verdict:
    """Like forward, for new tokens that are written into a cache."""
    return verdict(*write_check(truth, "triton"), arch=arch, **options)


def write_check(truth: WriteTruth, implementation: Implementation | None) -> Check:
    """Like forward_check, for new tokens: no number of the cache may differ. implementation: only "triton" has it."""

    def call(tokens, cache):
        q, *cache = write_ops.rotate_and_write(
            *tokens, *cache, head_dim=truth.case.head_dim, implementation=implementation or "triton"
        )
        arrays = [x.values if isinstance(x, jfa.QuantizedArray) else x for x in cache]
        arrays += [x.scales for x in cache if isinstance(x, jfa.QuantizedArray)]
        return tuple(x.astype(jnp.float32) for x in (q, *arrays))

    return Check(call, (truth.tokens, truth.cache), truth.wanted, (_NOTHING,) * len(truth.wanted))


def of_rows(truth: RowTruth, arch: str, **options: Any) -> Verdict:
    """Like forward, for products of a few rows."""
    return verdict(*row_check(truth, "triton"), arch=arch, **options)


def row_check(truth: RowTruth, implementation: Implementation | None) -> Check:
    """Like forward_check, for products of a few rows. implementation: only "triton" has them."""

    def call(x, weights, options):
        how: dict[str, Any] = dict(implementation=implementation or "triton")
        return (row_ops.matmul_few_rows(x, weights, truth.case.spec, **options, **how),)

    limit = numerics.limit(truth.out, truth.plain_out, truth.x.dtype)
    return Check(call, (truth.x, truth.weights, truth.options), (truth.out,), (limit,))


_NOTHING = float(np.finfo(np.float32).tiny)
