"""Attention and its gradients in NumPy float64, head by head: the ground truth, which shares no code with jfa."""

from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np


class Head(NamedTuple):
    """One head of one batch row: matrices [tq, tk] and vectors [tq]."""

    scores: np.ndarray  # -inf where masked
    slope: np.ndarray | float  # derivative of the soft cap
    distance: np.ndarray  # |position - key|
    kept: np.ndarray | float  # dropout's factor of a weight
    lse: np.ndarray  # log-sum-exp of the keys only
    total: np.ndarray  # log-sum-exp of the keys and the sink


def attention(q, k, v, *, rounding=lambda x: x, **options):
    """(out [b, tq, hq, dv], lse [b, tq, hq]).

    rounding is applied to every product; the identity keeps float64. Options: those of _head.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, tq, hq, _ = q.shape
    out, lse = np.zeros((b, tq, hq, v.shape[3])), np.full((b, tq, hq), -np.inf)
    for r, h, kv in _heads(q, k):
        head = _head(q, k, r, h, kv, rounding=rounding, **options)
        out[r, :, h] = rounding(rounding(_weights(head) * head.kept) @ v[r, :, kv])
        lse[r, :, h] = head.lse
    return out, lse


def gradients(q, k, v, d_out, d_lse, *, rounding=lambda x: x, **options) -> dict[str, np.ndarray]:
    """The cotangents of q, k, v, and of bias, sinks and alibi_slopes if they are given.

    That of bias is summed to the bias's shape. Rows with a residual of -inf have no gradient.
    """
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    b, tq, hq, _ = q.shape
    scale = options["scale"]
    found = {"q": np.zeros_like(q), "k": np.zeros_like(k), "v": np.zeros_like(v)}
    d_scores = np.zeros((b, hq, tq, k.shape[1]))
    d_sinks, d_slopes = np.zeros(hq), np.zeros((b, hq))
    for r, h, kv in _heads(q, k):
        head = _head(q, k, r, h, kv, rounding=rounding, **options)
        p, seen = _weights(head), np.isfinite(head.lse)
        do = np.where(seen[:, None], d_out[r, :, h], 0.0)
        delta = (do * rounding(rounding(p * head.kept) @ v[r, :, kv])).sum(1)
        dp = rounding(do @ v[r, :, kv].T) * head.kept
        alone = np.exp(head.scores - np.where(seen, head.lse, 0.0)[:, None])
        ds = p * (dp - delta[:, None]) + alone * np.where(seen, d_lse[r, :, h], 0.0)[:, None]
        ds = rounding(ds * head.slope)
        d_scores[r, h] = ds
        d_slopes[r, h] -= (ds * head.distance).sum()
        if options.get("sinks") is not None:
            sink = np.exp(float(options["sinks"][h]) - head.total)
            d_sinks[h] -= np.where(seen, sink * delta, 0.0).sum()
        found["q"][r, :, h] = scale * (ds @ k[r, :, kv])
        found["k"][r, :, kv] += scale * (ds.T @ q[r, :, h])
        found["v"][r, :, kv] += rounding(p * head.kept).T @ do
    if (bias := options.get("bias")) is not None:
        axes = tuple(axis for axis, size in enumerate(np.shape(bias)) if size == 1)
        found["bias"] = d_scores.sum(axes, keepdims=True)
    if options.get("sinks") is not None:
        found["sinks"] = d_sinks
    if options.get("alibi_slopes") is not None:
        found["alibi_slopes"] = d_slopes if np.ndim(options["alibi_slopes"]) == 2 else d_slopes.sum(0)
    return found


def _heads(q, k):
    group = q.shape[2] // k.shape[2]
    return [(r, h, h // group) for r in range(q.shape[0]) for h in range(q.shape[2])]


def _head(
    q,
    k,
    r: int,
    h: int,
    kv: int,
    *,
    scale: float,
    rounding,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    softcap=None,
    q_len=None,
    kv_len=None,
    q_offset=None,
    sinks=None,
    alibi_slopes=None,
    q_segments=None,
    kv_segments=None,
    dropout_seed=None,
    dropout_rate=0.0,
    broadcast_dropout=False,
) -> Head:
    tq, tk = q.shape[1], k.shape[1]
    full = (q.shape[0], q.shape[2], tq, tk)
    row, key = np.arange(tq)[:, None], np.arange(tk)[None, :]
    position = row + (0 if q_offset is None else int(q_offset[r]))
    distance = np.abs(position - key).astype(np.float64)

    scores = rounding(scale * rounding(q[r, :, h] @ k[r, :, kv].T))
    if bias is not None:
        scores = rounding(scores + np.broadcast_to(np.asarray(bias, np.float64), full)[r, h])
    if alibi_slopes is not None:
        scores = rounding(scores - float(np.broadcast_to(alibi_slopes, full[:2])[r, h]) * distance)
    slope: Any = 1.0
    if softcap is not None:
        slope = 1.0 - np.tanh(scores / softcap) ** 2
        scores = rounding(softcap * np.tanh(scores / softcap))

    visible = np.ones((tq, tk), bool)
    if q_len is not None:
        visible &= row < int(q_len[r])
    if kv_len is not None:
        visible &= key < int(kv_len[r])
    if causal:
        visible &= key <= position
    if window is not None:
        left, right = (np.inf if side is None else side for side in window)
        visible &= (key >= position - left) & (key <= position + right)
    if mask is not None:
        visible &= np.broadcast_to(np.asarray(mask), full)[r, h]
    if q_segments is not None:
        visible &= np.asarray(q_segments)[r][:, None] == np.asarray(kv_segments)[r][None, :]
    scores = np.where(visible, scores, -np.inf)

    top = scores.max(1, initial=-np.inf)
    with np.errstate(divide="ignore"):
        lse = top + np.log(np.exp(scores - np.where(np.isfinite(top), top, 0.0)[:, None]).sum(1))
    lse = np.where(np.isfinite(top), lse, -np.inf)
    total = lse if sinks is None else np.logaddexp(lse, float(sinks[h]))
    kept: Any = 1.0
    if dropout_seed is not None:
        place = (0, 0) if broadcast_dropout else (r, h)
        kept = _kept(dropout_seed, *place, row, key, dropout_rate) / (1.0 - dropout_rate)
    return Head(scores, slope, distance, kept, lse, total)


def _weights(head: Head) -> np.ndarray:
    """The softmax; 0 in rows that see no key."""
    return np.exp(head.scores - np.where(np.isfinite(head.lse), head.total, 0.0)[:, None])


def _kept(seed, batch: int, head: int, row, key, rate: float) -> np.ndarray:
    """Which weights dropout keeps: the hash described in jfa's documentation, in Python and NumPy 64-bit integers."""
    wrap = (1 << 32) - 1

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & wrap
        x = ((x ^ (x >> 15)) * 0x846CA68B) & wrap
        return x ^ (x >> 16)

    first, second = (int(word) for word in seed)
    row_seed = mix(mix(second ^ batch * 0xC2B2AE3D & wrap) ^ first ^ head * 0x27D4EB2F & wrap)
    rows = mix(row_seed ^ (row.astype(np.uint64) * np.uint64(0x9E3779B1)) & wrap)
    columns = (key.astype(np.uint64) * np.uint64(0x85EBCA77)) & wrap
    return mix((rows + columns) & wrap) >= round(rate * 2**32)
