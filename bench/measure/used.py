"""The backend and tile sizes that jfa uses for a call, determined from shapes only."""

import dataclasses
from typing import Any

import jax

import jfa
from jfa import backends, ops
from jfa.block_mask import SparseOperands
from jfa.device import probe
from jfa.types import AttentionSpec, Operands, PagedOperands
from jfa_models.decoding.language_model import LanguageModel


def attention(implementation: str | None, q: Any, k: Any, v: Any, *, causal: bool, backward: bool) -> dict[str, Any]:
    """For jfa.dot_product_attention: the backend, and the configuration of the forward and optionally backward pass.

    Raises:
      UnsupportedError: the implementation does not support the call.
    """
    operands, device = Operands(q, k, v), probe()
    spec = AttentionSpec(sm_scale=q.shape[3] ** -0.5, causal=causal)
    name = backends.select(implementation, operands, spec, device)
    config = ops._config(name, operands, device, None)  # the function that the op itself calls
    found = {"backend": name, "forward": _fields(config)}
    if backward and config is not None:
        found["backward"] = _fields(backends.flash(name).backward_config(operands, config, device))
    return found


def sparse(implementation: str, q: Any, k: Any, v: Any, mask: jfa.BlockMask) -> dict[str, Any]:
    """For jfa.block_sparse_attention with a causal mask: the backend, and the configuration of the forward pass."""
    operands, device = SparseOperands(Operands(q, k, v), mask), probe()
    spec = AttentionSpec(sm_scale=q.shape[3] ** -0.5, causal=True)
    name = backends.select(implementation, operands, spec, device, table=backends.sparse)
    return {"backend": name, "forward": _fields(backends.sparse(name).default_config(operands, device))}


def in_model(
    model: LanguageModel, implementation: str | None, *, batch: int, queries: int, keys: int
) -> dict[str, Any]:
    """For the attention layers of a model, with this number of queries and keys per row; {}: it has none."""
    c = model.config
    if not c.attention_layers:
        return {}
    q = jax.ShapeDtypeStruct((batch, queries, c.num_q_heads, c.head_dim), model.dtype)
    kv = jax.ShapeDtypeStruct((batch, keys, c.num_kv_heads, c.head_dim), model.dtype)
    return attention(implementation, q, kv, kv, causal=True, backward=False)


def paged(implementation: str | None, q: Any, cache: jfa.PagedKVCache) -> dict[str, Any]:
    """For jfa.paged_decode_attention on a cache's first layer."""
    pages = cache.arguments(0)
    operands = PagedOperands(
        q=q,
        k_pages=pages["key_pages"],
        v_pages=pages["value_pages"],
        page_table=pages["page_table"],
        kv_len=cache.kv_len,
        k_scales=pages["key_scales"],
        v_scales=pages["value_scales"],
    )
    device = probe()
    spec = AttentionSpec(sm_scale=q.shape[-1] ** -0.5, causal=True)
    name = backends.select(implementation, operands, spec, device, table=backends.paged)
    return {"backend": name, "forward": _fields(backends.paged(name).default_config(operands, device))}


def _fields(config: Any) -> dict[str, Any] | None:
    return None if config is None else dataclasses.asdict(config)
