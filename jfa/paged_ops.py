"""The paged attention ops: check arguments, select a backend and its configuration, run it. Not differentiable."""

import dataclasses
import functools
import math
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

from jfa import arguments, backends, checks
from jfa.device import probe
from jfa.meshes import on_any_mesh, spec_of
from jfa.rules import compiled, with_default_rules
from jfa.types import (
    AttentionSpec,
    BlockConfig,
    DeviceInfo,
    Implementation,
    PagedConfig,
    PagedOperands,
    TpuConfig,
    UnsupportedError,
)


class _Options(TypedDict, total=False):
    """Options that all overloads share, for type checkers."""

    scale: float | None
    local_window_size: int | tuple[int | None, int | None] | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    key_scales: ArrayLike | None
    value_scales: ArrayLike | None
    implementation: Implementation | None
    config: BlockConfig | PagedConfig | TpuConfig | None


@overload
def paged_decode_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    kv_len: ArrayLike,
    *,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def paged_decode_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    kv_len: ArrayLike,
    *,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Array]: ...


@with_default_rules
def paged_decode_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    kv_len: ArrayLike,
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    key_scales: ArrayLike | None = None,
    value_scales: ArrayLike | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
    config: BlockConfig | PagedConfig | TpuConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Decode attention over a paged KV cache: one new token of each row attends to the row's keys and values.

    Row r has kv_len[r] tokens, including the new one: token t is in page page_table[r, t // page_size], in slot
    t % page_size. Other slots (the rest of the last page, and jfa.types.NULL_PAGE) never affect the output, even if
    they contain NaN. A row without tokens returns zeros and a residual of -inf. Scores, softmax and sums are float32.
    Not differentiable.

    Values in page_table and kv_len are not checked; for tests and debugging, jfa.checks.paged_values checks them.
    Lengths are clipped to the capacity of a page table row.

    Args:
      query: [b, hq, d]; float16, bfloat16 or float32.
      key_pages, value_pages: [num_pages, page_size, hkv * d] and [num_pages, page_size, hkv * dv], the heads of a token
        side by side; or with four axes, [..., hkv, d] and [..., hkv, dv], which a TPU copies before each call. Each has
        its own dtype: floats of one of these dtypes, or quantized with scales as in jfa.quant: int8, float8_e4m3fn, or
        uint8, which packs two 4-bit numbers of a head per byte, so that it takes half the columns. hq is a multiple of
        hkv.
      page_table: i32[b, pages_per_seq].
      kv_len: i32[b].
      scale: factor of the scores, a Python number; None: 1 / sqrt(d).
      local_window_size: number of keys before its own position that the query sees, None: all of them; of a pair
        (left, right), only left is used.
      logits_soft_cap: scores become cap * tanh(score / cap).
      sinks: [hq], one attention sink logit per head: exp(sink) is added to the softmax's denominator.
      key_scales, value_scales: [num_pages, page_size, hkv], if and only if those pages are quantized.
      return_residual: also return the (natural) log-sum-exp of the scores, without the sink.
      implementation: "reference", "xla", "triton" or "tpu" to require that backend; None to choose automatically.
      config: a PagedConfig for "triton", a TpuConfig for "tpu" or a BlockConfig for "xla"; None: the backend's
        default.

    Returns:
      [b, hq, dv] in query's dtype; with return_residual also the residual, f32[b, hq].

    Raises:
      ValueError: invalid shapes, dtypes or numbers; the message names them.
      UnsupportedError: the call is valid, but the backend does not implement it.

    Source: arXiv:2309.06180, section 4.1.
    """
    operands = _operands(query, key_pages, value_pages, page_table, kv_len, None, sinks, key_scales, value_scales)
    if operands.q.shape[0] != operands.kv_len.shape[0]:
        raise ValueError(
            f"query must have one token for each row of page_table, got {operands.q.shape[0]} for "
            f"{operands.kv_len.shape[0]} rows; use ragged_paged_attention for other numbers of tokens"
        )
    out, lse = _run(operands, _spec(operands, scale, local_window_size, logits_soft_cap), implementation, config)
    return (out, lse) if return_residual else out


@overload
def ragged_paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    kv_len: ArrayLike,
    query_start: ArrayLike,
    *,
    tree_mask: ArrayLike | None = ...,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def ragged_paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    kv_len: ArrayLike,
    query_start: ArrayLike,
    *,
    tree_mask: ArrayLike | None = ...,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Array]: ...


@with_default_rules
def ragged_paged_attention(
    query: ArrayLike,
    key_pages: ArrayLike,
    value_pages: ArrayLike,
    page_table: ArrayLike,
    kv_len: ArrayLike,
    query_start: ArrayLike,
    *,
    tree_mask: ArrayLike | None = None,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    key_scales: ArrayLike | None = None,
    value_scales: ArrayLike | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
    config: BlockConfig | PagedConfig | TpuConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Causal attention over a paged KV cache for any number of new tokens per row: mixed prefill and decode.

    One call processes prompt chunks and single tokens of decoding rows, concatenated without padding. The parameters
    are those of paged_decode_attention, except:

    Args:
      query: [n, hq, d], the new tokens of row 0, then those of row 1, ...
      kv_len: i32[b], number of tokens in each row, including the new ones, which are its last tokens.
      query_start: i32[b + 1], non-decreasing: row r has the queries query_start[r] up to query_start[r + 1]. Queries
        from query_start[b] on are padding and return zeros and a residual of -inf.
      tree_mask: bool[n, m], for rows whose new tokens are a tree of up to m tokens, as when drafts are verified; None:
        every row is a sequence. tree_mask[i, j] says whether query i sees the j-th new token of its row: True for its
        ancestors and itself. Parents precede children: a query sees no later token, whatever its mask says. A query
        whose mask is all False is causal, so that prompt chunks (of any length) and single tokens need no mask. All
        queries see the tokens before the new ones. The new tokens that a query sees are at consecutive positions, which
        end with its own; windows are in positions. "triton" takes up to 128 columns; bits are not checked (but by
        jfa.checks.paged_values).

    Returns:
      [n, hq, dv] in query's dtype; with return_residual also the residual, f32[n, hq].

    Source of tree_mask: arXiv:2305.09781, section 4.
    """
    operands = _operands(
        query, key_pages, value_pages, page_table, kv_len, query_start, sinks, key_scales, value_scales
    )
    if tree_mask is not None:
        tree_mask = jnp.asarray(tree_mask)
        checks.tree_mask(tree_mask, operands.q.shape[0])
        operands = operands._replace(tree_mask=tree_mask)
    out, lse = _run(operands, _spec(operands, scale, local_window_size, logits_soft_cap), implementation, config)
    return (out, lse) if return_residual else out


def _operands(
    query, key_pages, value_pages, page_table, kv_len, query_start, sinks, key_scales, value_scales
) -> PagedOperands:
    query, key_pages, value_pages = (jnp.asarray(x) for x in (query, key_pages, value_pages))
    key_scales, value_scales = (None if x is None else jnp.asarray(x) for x in (key_scales, value_scales))
    page_table = arguments.narrowed(page_table)
    checks.paged_shapes(query, key_pages, value_pages, page_table, key_scales, value_scales)
    key_pages, value_pages = (x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for x in (key_pages, value_pages))
    b = page_table.shape[0]
    if query_start is not None:
        query_start = arguments.per_row("query_start", query_start, b + 1)
    lengths = arguments.per_row("kv_len", kv_len, b)
    assert lengths is not None
    return PagedOperands(
        q=query,
        k_pages=key_pages,
        v_pages=value_pages,
        page_table=page_table.astype(jnp.int32),
        kv_len=lengths,
        query_start=query_start,
        k_scales=key_scales,
        v_scales=value_scales,
        sinks=arguments.per_head("sinks", sinks, query.shape[1]),
    )


def _spec(operands: PagedOperands, scale, local_window_size, logits_soft_cap) -> AttentionSpec:
    return AttentionSpec(
        sm_scale=operands.q.shape[2] ** -0.5 if scale is None else float(scale),
        causal=True,
        window=arguments.window(local_window_size),
        softcap=None if logits_soft_cap is None else float(logits_soft_cap),
    )


def _run(operands: PagedOperands, spec: AttentionSpec, implementation, given) -> tuple[Array, Array]:
    if min(operands.q.size, operands.page_table.size) == 0:
        shape = operands.q.shape[:2]
        return jnp.zeros((*shape, operands.value_head_dim), operands.q.dtype), jnp.full(shape, -jnp.inf, jnp.float32)
    device = probe()
    name = backends.select(implementation, operands, spec, device, table=backends.paged)
    backend = backends.paged(name)
    config = given
    if given is None:
        config = backend.default_config(operands, device)
    else:
        backends.check_config(name, backend.config_type, given)
    plan = _Plan(backend=name, spec=spec, config=config, device=device)
    rows = PartitionSpec(*spec_of(operands.q)[:2])  # results are sharded as the queries
    operands = arguments.varying_alike(operands)
    return on_any_mesh(functools.partial(_computed, plan), operands, specs=lambda: (rows, rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: str
    spec: AttentionSpec
    config: BlockConfig | PagedConfig | TpuConfig | None
    device: DeviceInfo


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@compiled
@with_default_rules
def _computed(plan: _Plan, operands: PagedOperands) -> tuple[Array, Array]:
    with jax.named_scope(f"jfa.paged_attention.{plan.backend}"):
        return backends.paged(plan.backend).run(operands, plan.spec, plan.config, plan.device)


@_computed.defjvp
def _refused(plan: _Plan, primals, tangents):
    raise UnsupportedError(
        "paged attention is not differentiable: train with dot_product_attention, or use stop_gradient on the operands"
    )
