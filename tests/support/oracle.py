"""Attention in NumPy float64, query by query. Shares no code with jfa: the truth behind the reference."""

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16 from it)
import numpy as np


def attention(
    q,
    k,
    v,
    *,
    scale,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    softcap=None,
    q_len=None,
    kv_len=None,
    q_offset=None,
    rounding=lambda x: x,
):
    """(out [b, tq, hq, d], lse [b, tq, hq]) in nested loops over rows, queries and heads.

    rounding is applied to every product; the identity leaves float64.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, tq, hq, _ = q.shape
    tk, hkv = k.shape[1], k.shape[2]
    out, lse = np.zeros((b, tq, hq, v.shape[3])), np.full((b, tq, hq), -np.inf)
    full = (b, hq, tq, tk)
    bias = None if bias is None else np.broadcast_to(np.asarray(bias, np.float64), full)
    mask = None if mask is None else np.broadcast_to(np.asarray(mask), full)
    for r in range(b):
        end = tk if kv_len is None else min(tk, int(kv_len[r]))
        for i in range(tq if q_len is None else min(tq, int(q_len[r]))):
            position = i + (0 if q_offset is None else int(q_offset[r]))
            for h in range(hq):
                keys = [
                    j
                    for j in range(end)
                    if (not causal or j <= position)
                    and (window is None or position - window[0] <= j <= position + window[1])
                    and (mask is None or mask[r, h, i, j])
                ]
                if not keys:
                    continue
                s = rounding(scale * rounding(k[r, keys, h // (hq // hkv)] @ q[r, i, h]))
                if bias is not None:
                    s = rounding(s + bias[r, h, i, keys])
                if softcap is not None:
                    s = rounding(softcap * np.tanh(s / softcap))
                top = s.max()
                if top == -np.inf:
                    continue
                p = np.exp(s - top)
                out[r, i, h] = rounding(rounding(p / p.sum()) @ v[r, keys, h // (hq // hkv)])
                lse[r, i, h] = top + np.log(p.sum())
    return out, lse
