"""block_sparse_attention: checks arguments, selects a backend and its configuration, runs it, defines the gradient."""

import dataclasses
import functools
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array

from jfa import arguments, backends, checks
from jfa.block_mask import BlockMask, SparseOperands
from jfa.device import probe
from jfa.meshes import on_any_mesh, spec_of
from jfa.rules import compiled, with_default_rules
from jfa.types import AttentionSpec, DeviceInfo, FlashConfig, Implementation, Operands


class _Options(TypedDict, total=False):
    """Options that both overloads of block_sparse_attention share, for type checkers."""

    scale: float | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    implementation: Implementation | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    alibi_slopes: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    query_offset: ArrayLike | None
    config: FlashConfig | None


@overload
def block_sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    block_mask: BlockMask,
    bias: ArrayLike | None = ...,
    *,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def block_sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    block_mask: BlockMask,
    bias: ArrayLike | None = ...,
    *,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Array]: ...


@with_default_rules
def block_sparse_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    block_mask: BlockMask,
    bias: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_offset: ArrayLike | None = None,
    config: FlashConfig | None = None,
) -> Array | tuple[Array, Array]:
    """dot_product_attention with a mask of which only the visible tiles are computed, forward and backward.

    Tiles that the mask, a causal mask, lengths or segments hide are skipped: work is proportional to the tiles that
    remain.
    Gradients and the content of keys that no query sees are as in dot_product_attention; the mask has no gradient.

    Args:
      query, key, value: [b, tq, hq, d], [b, tk, hkv, d] and [b, tk, hkv, dv], or all without b.
      block_mask: for tq queries and tk keys, 1 or b batch rows, 1 or hq heads. A pytree: it may be an argument of a
        jitted function, which is compiled anew if the shapes of the mask's lists differ.
      scale, bias, is_causal, query_seq_lengths, key_value_seq_lengths, implementation, return_residual, sinks,
        logits_soft_cap, alibi_slopes, query_segment_ids, key_value_segment_ids, query_offset: as in
        dot_product_attention. The mask is of the indices of queries and keys in the arrays: query_offset does not move
        it.
      config: a FlashConfig for "triton" (forward), whose tiles are cut to those of the mask; None: the default.

    Returns:
      As dot_product_attention.

    Raises:
      ValueError: invalid shapes, dtypes or numbers, or a mask that does not fit; the message names them.
      UnsupportedError: the call is valid, but the backend does not implement it.

    Source: arXiv:2412.05496 (block masks); arXiv:2307.08691.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    one_row = query.ndim == key.ndim == value.ndim == 3
    if one_row:
        query, key, value = query[None], key[None], value[None]
    checks.attention_shapes(query, key, value)
    checks.block_mask(block_mask, query, key)
    b, tq, hq, head_dim = query.shape
    dense = Operands(
        q=query,
        k=key,
        v=value,
        bias=arguments.broadcastable("bias", bias, (b, hq, tq, key.shape[1]), boolean=False),
        q_len=arguments.per_row("query_seq_lengths", query_seq_lengths, b),
        kv_len=arguments.per_row("key_value_seq_lengths", key_value_seq_lengths, b),
        q_offset=arguments.per_row("query_offset", query_offset, b, spread=True),
        sinks=arguments.per_head("sinks", sinks, hq),
        alibi_slopes=arguments.slopes(alibi_slopes, b, hq),
        **arguments.segments(query_segment_ids, key_value_segment_ids, (b, tq), (b, key.shape[1]), one_row=one_row),
    )
    spec = AttentionSpec(
        sm_scale=head_dim**-0.5 if scale is None else float(scale),
        causal=bool(is_causal),
        softcap=None if logits_soft_cap is None else float(logits_soft_cap),
    )
    operands, device = SparseOperands(dense, block_mask), probe()
    name = backends.select(implementation, operands, spec, device, table=backends.sparse)
    backend = backends.sparse(name)
    if config is None:
        config = backend.default_config(operands, device)
    else:
        backends.check_config(name, backend.config_type, config)
    if query.size == 0:
        name = "reference"  # the kernels visit at least one tile
    plan = _Plan(backend=name, spec=spec, config=config, device=device)
    run = _run if name == "reference" else _differentiable
    rows = PartitionSpec(*spec_of(query)[:3])  # results are sharded as the queries
    operands = arguments.varying_alike(operands)
    out, lse = on_any_mesh(functools.partial(run, plan), operands, specs=lambda: (rows, rows))
    if one_row:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: str
    spec: AttentionSpec
    config: FlashConfig | None
    device: DeviceInfo


@compiled
@with_default_rules
def _run(plan: _Plan, operands: SparseOperands) -> tuple[Array, Array]:
    with jax.named_scope(f"jfa.block_sparse_attention.{plan.backend}"):
        return backends.sparse(plan.backend).run(operands, plan.spec, plan.config, plan.device)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: _Plan, operands: SparseOperands):
    return _run(plan, operands)


def _forward(plan: _Plan, operands: SparseOperands):
    out, lse = _run(plan, operands)
    # named for remat policies, as those of dot_product_attention
    out, lse = checkpoint_name(out, "jfa_out"), checkpoint_name(lse, "jfa_lse")
    return (out, lse), (operands, out, lse)


@compiled
@with_default_rules
def _backward(plan: _Plan, saved, cotangents) -> tuple[SparseOperands]:
    operands, out, lse = saved
    backend = backends.sparse(plan.backend)
    config = backend.backward_config(operands, plan.config, plan.device)
    with jax.named_scope(f"jfa.block_sparse_attention_bwd.{plan.backend}"):
        dense = backend.run_backward(operands, out, lse, *cotangents, plan.spec, config, plan.device)
    return (SparseOperands(dense, None),)  # type: ignore[arg-type]  # the mask has no gradient


_differentiable.defvjp(_forward, _backward)
