"""dot_product_attention: checks arguments, selects a backend and its configuration, runs it, defines the gradient."""

import dataclasses
import functools
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from jfa import arguments, backends, checks
from jfa.device import probe
from jfa.meshes import on_any_mesh, spec_of
from jfa.rules import compiled, with_default_rules
from jfa.types import AttentionSpec, BlockConfig, DeviceInfo, FlashConfig, Implementation, Operands, TpuConfig


class _Options(TypedDict, total=False):
    """Options that both overloads of dot_product_attention share, for type checkers."""

    scale: float | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: int | tuple[int | None, int | None] | None
    implementation: Implementation | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    alibi_slopes: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    query_offset: ArrayLike | None
    dropout_rate: float
    dropout_key: ArrayLike | None
    broadcast_dropout: bool
    config: BlockConfig | FlashConfig | TpuConfig | None


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    return_residual: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Array, Array]: ...


@with_default_rules
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_offset: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_key: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    config: BlockConfig | FlashConfig | TpuConfig | None = None,
) -> Array | tuple[Array, Array]:
    """softmax(scale * query key^T + bias) value, without storing the scores in memory.

    The first parameters are those of jax.nn.dot_product_attention. They have the same meaning, with two exceptions: a
    query that sees no key returns zeros (jax.nn: the mean of the values) and a residual of -inf; and the residual is
    float32 and differentiable (jax.nn: the query's dtype, without a gradient).

    Scores are scaled, then bias and ALiBi are added, then the soft cap and the masks are applied; sinks, if given, are
    added to the softmax's denominator. Scores, softmax and sums are float32. First-order reverse-mode gradients of
    query, key, value, bias, sinks and alibi_slopes work on every backend; forward mode works on "reference" only. Keys
    and values that no query sees may contain anything, even NaN. If some query sees a NaN, the outputs of queries that
    do not see it may become NaN too.

    Numbers and flags (scale, is_causal, local_window_size, logits_soft_cap, dropout_rate) are static; arrays may be
    traced.

    Args:
      query: [b, tq, hq, d], or [tq, hq, d] for one row; float16, bfloat16 or float32.
      key, value: [b, tk, hkv, d] and [b, tk, hkv, dv], same dtype. hq is a multiple of hkv: query head h reads key
        head h // (hq / hkv).
      bias: added to the scores; broadcasts to [b, hq, tq, tk].
      mask: boolean, True where a key is visible; broadcasts to [b, hq, tq, tk].
      scale: factor of the scores, a Python number; None: 1 / sqrt(d).
      is_causal: query i sees the keys up to its own position, i + query_offset.
      query_seq_lengths, key_value_seq_lengths: i32[b], number of valid queries and keys in each row; the rest is never
        read.
      local_window_size: (left, right), the number of keys that a query sees before and after its own position, None:
        all of them; an int sets both.
      implementation: "reference", "xla", "triton" or "tpu" to require that backend; None to choose automatically.
      return_residual: also return the (natural) log-sum-exp of the scores.
      logits_soft_cap: scores become cap * tanh(score / cap).
      sinks: [hq], one attention sink logit per head: exp(sink) is added to the softmax's denominator. It has no value
        vector and is not part of the residual.
      alibi_slopes: [hq] or [b, hq]; adds -slope * |query position - key position| to the scores. If all keys that a
        query sees are thousands of positions away (query_offset), gradients lose precision, most of all those of the
        slopes.
      query_segment_ids, key_value_segment_ids: i32[b, tq] and i32[b, tk], both or neither: a query only sees keys of
        its own segment, so that several documents can be packed into one row.
      query_offset: i32[b] or int, position of the first query among the keys, for a chunk that follows cached tokens;
        None: 0.
      dropout_rate: fraction of the weights set to 0; the others are divided by 1 - dropout_rate.
      dropout_key: a JAX random key, required if dropout_rate > 0. On every backend, which weights are kept depends only
        on this key and on the indices (row, head, query, key) of the weight in this call's arrays. Under shard_map,
        fold the device's index into the key.
      broadcast_dropout: drop the same weights in all rows and heads.
      config: tile sizes, a FlashConfig for "triton" (forward), a TpuConfig for "tpu" (the backward pass has no larger
        ones) or a BlockConfig for "xla"; None: the backend's default.

    Returns:
      [b, tq, hq, dv] in query's dtype; with return_residual also the residual, f32[b, tq, hq]. Without the batch axis
      if query has none.

    Raises:
      ValueError: invalid shapes, dtypes or numbers; the message names them.
      UnsupportedError: the call is valid, but the backend does not implement it.

    Source: arXiv:2205.14135; arXiv:2307.08691.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    one_row = query.ndim == key.ndim == value.ndim == 3
    if one_row:
        query, key, value = query[None], key[None], value[None]
    checks.attention_shapes(query, key, value)
    b, tq, hq, head_dim = query.shape
    scores = (b, hq, tq, key.shape[1])
    operands = Operands(
        q=query,
        k=key,
        v=value,
        bias=arguments.broadcastable("bias", bias, scores, boolean=False),
        mask=arguments.broadcastable("mask", mask, scores, boolean=True),
        q_len=arguments.per_row("query_seq_lengths", query_seq_lengths, b),
        kv_len=arguments.per_row("key_value_seq_lengths", key_value_seq_lengths, b),
        q_offset=arguments.per_row("query_offset", query_offset, b, spread=True),
        sinks=arguments.per_head("sinks", sinks, hq),
        alibi_slopes=arguments.slopes(alibi_slopes, b, hq),
        **arguments.segments(query_segment_ids, key_value_segment_ids, (b, tq), (b, key.shape[1]), one_row=one_row),
        dropout_seed=arguments.dropout_seed(dropout_rate, dropout_key),
    )
    spec = AttentionSpec(
        sm_scale=head_dim**-0.5 if scale is None else float(scale),
        causal=bool(is_causal),
        window=arguments.window(local_window_size),
        softcap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout_rate=float(dropout_rate),
        broadcast_dropout=broadcast_dropout,
    )
    device = probe()
    backend = backends.select(implementation, operands, spec, device)
    plan = _Plan(backend=backend, spec=spec, config=_config(backend, operands, device, config), device=device)
    run = _run if backend == "reference" else _differentiable
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
    config: BlockConfig | FlashConfig | TpuConfig | None
    device: DeviceInfo


@compiled
@with_default_rules
def _run(plan: _Plan, operands: Operands) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    with jax.named_scope(f"jfa.attention.{plan.backend}"):
        return backends.flash(plan.backend).run(operands, plan.spec, plan.config, plan.device)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: _Plan, operands: Operands):
    return _run(plan, operands)


def _forward(plan: _Plan, operands: Operands):
    out, lse = _run(plan, operands)
    # named for remat policies: jax.checkpoint_policies.save_only_these_names("jfa_out", "jfa_lse")
    out, lse = checkpoint_name(out, "jfa_out"), checkpoint_name(lse, "jfa_lse")
    return (out, lse), (operands, out, lse)


@compiled
@with_default_rules
def _backward(plan: _Plan, saved, cotangents) -> tuple[Operands]:
    operands, out, lse = saved
    backend = backends.flash(plan.backend)
    config = backend.backward_config(operands, plan.config, plan.device)
    with jax.named_scope(f"jfa.attention_bwd.{plan.backend}"):
        return (backend.run_backward(operands, out, lse, *cotangents, plan.spec, config, plan.device),)


_differentiable.defvjp(_forward, _backward)


def _config(
    backend: str, operands: Operands, device: DeviceInfo, given
) -> BlockConfig | FlashConfig | TpuConfig | None:
    chosen = backends.flash(backend)
    if given is None:
        return chosen.default_config(operands, device)
    backends.check_config(backend, chosen.config_type, given)
    return given
