"""What jfa takes for a call: the backend, and its tiles. Shapes are enough."""

import dataclasses
from typing import Any

import jax

import jfa
from jfa import backends, ops
from jfa.device import probe
from jfa.types import AttentionSpec, Operands, PagedOperands
from jfa_models.decoding.language_model import LanguageModel


def attention(implementation: str | None, q: Any, k: Any, v: Any, *, causal: bool, backward: bool) -> dict[str, Any]:
    """For jfa.dot_product_attention: backend, forward and, where it is asked for, backward.

    Raises:
      UnsupportedError: it does not serve.
    """
    operands, device = Operands(q, k, v), probe()
    spec = AttentionSpec(sm_scale=q.shape[3] ** -0.5, causal=causal)
    name = backends.select(implementation, operands, spec, device)
    config = ops._config(name, operands, device, None)  # what the op itself asks
    found = {"backend": name, "forward": _fields(config)}
    if backward and config is not None:
        found["backward"] = _fields(backends.flash(name).backward_config(operands, config, device))
    return found


def in_model(
    model: LanguageModel, implementation: str | None, *, batch: int, queries: int, keys: int
) -> dict[str, Any]:
    """For the attention of a model's layers, so many queries a row over so many keys."""
    c = model.config
    q = jax.ShapeDtypeStruct((batch, queries, c.num_q_heads, c.head_dim), model.dtype)
    kv = jax.ShapeDtypeStruct((batch, keys, c.num_kv_heads, c.head_dim), model.dtype)
    return attention(implementation, q, kv, kv, causal=True, backward=False)


def paged(implementation: str | None, q: Any, cache: jfa.PagedKVCache) -> dict[str, Any]:
    """For jfa.paged_decode_attention over a cache's first layer."""
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
