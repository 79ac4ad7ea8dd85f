"""Named cases of linear attention and their expected results: a recurrence in float64, one token after another."""

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCase:
    """Shapes and options of jfa.linear_attention, or with `rows` of jfa.ragged_linear_attention."""

    b: int = 2
    t: int = 37
    hk: int = 2
    h: int = 2
    dk: int = 8
    dv: int = 5
    by_columns: bool = False  # a decay for each column of a key
    delta: bool = False
    state: bool = True  # whether a state is given; one of rows always is
    decays: tuple[float, float] = (-3.0, 1.0)  # of log_decay, the exponents of its power of ten
    rows: tuple[int, ...] | None = None  # tokens of each row, which are concatenated, instead of b and t
    new: tuple[int, ...] = ()  # rows that start without a state
    padding: int = 0  # number of tokens after the last row's
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def op(self) -> str | None:
        """The kernels on GPUs that compute it, one of names.LINEAR_OPS; None: there are none."""
        if self.by_columns:
            return None if self.delta else "gated_linear_attention"
        return "delta_attention" if self.delta else "linear_attention"


SEGMENTS = np.array([[0] * 5 + [1] * 20 + [2] + [3] * 11, [4] * 30 + [4, 4, 0, 0, 0, 4, 4]])
_ROWS: dict[str, Any] = dict(rows=(1, 0, 30, 1, 5, 20), new=(2, 3), padding=13)
CASES = {
    "mamba": LinearCase(hk=1, h=4, dk=16, options=dict(scale=1.0)),
    "heads": LinearCase(h=6),
    "columns": LinearCase(by_columns=True),
    "columns_and_groups": LinearCase(by_columns=True, h=4, t=50),
    "delta": LinearCase(delta=True),
    "delta_and_groups": LinearCase(delta=True, h=4, dv=16, t=70),
    "delta_and_columns": LinearCase(delta=True, by_columns=True, h=4),
    "one_token": LinearCase(t=1, delta=True),
    "no_state": LinearCase(state=False),
    "lengths": LinearCase(options=dict(seq_lengths=np.array([0, 21])), delta=True),
    "segments": LinearCase(options=dict(segment_ids=SEGMENTS)),
    "segments_columns_and_lengths": LinearCase(
        by_columns=True, delta=True, options=dict(segment_ids=SEGMENTS, seq_lengths=np.array([37, 31]))
    ),
    "columns_segments_and_lengths": LinearCase(
        by_columns=True, options=dict(segment_ids=SEGMENTS, seq_lengths=np.array([37, 31]))
    ),
    "columns_near_0": LinearCase(decays=(1.0, 3.0), by_columns=True, t=90),
    "columns_near_1": LinearCase(decays=(-9.0, -6.0), by_columns=True, t=90),
    "decays_near_1": LinearCase(decays=(-9.0, -6.0), t=90),
    "decays_near_0": LinearCase(decays=(1.5, 4.0), t=90),
    "decays_near_0_by_columns": LinearCase(decays=(1.0, 3.0), by_columns=True, delta=True, t=90),
    "mixed_decays": LinearCase(decays=(-8.0, 4.0), delta=True, t=90),
    "rows": LinearCase(hk=1, h=4, dk=16, options=dict(scale=0.5), **_ROWS),
    "rows_by_columns": LinearCase(by_columns=True, h=4, **_ROWS),
    "rows_delta": LinearCase(delta=True, h=4, dv=16, **_ROWS),
    "rows_delta_and_columns": LinearCase(delta=True, by_columns=True, h=4, **_ROWS),
}
ON_GPUS = tuple(name for name, case in CASES.items() if case.op is not None)


@dataclasses.dataclass(frozen=True)
class LinearTruth:
    """A case's arguments of jfa.<op>, and exact results and those of the recurrence in float32.

    Tokens that belong to no row, and the states of new rows, are NaN.
    """

    op: str
    arrays: tuple[np.ndarray, ...]  # query, key, value, log_decay
    options: dict[str, Any]
    out: np.ndarray
    state: np.ndarray  # after the last token; of rows all states
    plain_out: np.ndarray
    plain_state: np.ndarray

    @functools.cached_property
    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the output, in the dtype of the inputs, and of the state."""
        rng = np.random.default_rng(1)
        d_out = rng.standard_normal(self.out.shape).astype(self.arrays[2].dtype)
        return d_out, rng.standard_normal(self.state.shape).astype(np.float32)

    @functools.cached_property
    def gradients(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The gradients by the names of the arguments: (exact ones, those of the recurrence in float32)."""
        exact, plain = (
            gradients(self.arrays, *self.cotangents, **self.options, dtype=dtype) for dtype in (np.float64, np.float32)
        )
        return {name: (want, plain[name]) for name, want in exact.items()}


@functools.lru_cache(maxsize=64)
def truth(name: str, dtype: str) -> LinearTruth:
    """truth_of a named case."""
    return truth_of(CASES[name], dtype, seed=0)


def truth_of(case: LinearCase, dtype: str, *, seed: int) -> LinearTruth:
    """Seeded arrays of a case and its results."""
    if case.rows is not None:
        return _truth_of_rows(case, case.rows, dtype, seed)
    arrays, options = arrays_of(case, dtype, seed=seed)
    (out, state), (plain_out, plain_state) = (
        recurrence(arrays, **options, dtype=exact) for exact in (np.float64, np.float32)
    )
    return LinearTruth("linear_attention", arrays, options, out, state, plain_out, plain_state)


def arrays_of(
    case: LinearCase, dtype: str = "float32", *, seed: int = 0
) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
    """(query, key, value, log_decay), and the options of jfa.linear_attention; keys have the norm 1."""
    rng = np.random.default_rng(seed)
    given = jnp.dtype(dtype)
    keys = (case.b, case.t, case.hk, case.dk)
    q, k = (rng.standard_normal(keys).astype(given) for _ in "qk")
    k = (k / np.linalg.norm(k.astype(np.float32), axis=-1, keepdims=True)).astype(given)
    v = rng.standard_normal((case.b, case.t, case.h, case.dv)).astype(given)
    log_decay = -(10 ** rng.uniform(*case.decays, (case.b, case.t, case.h, case.dk)).astype(np.float32))
    if not case.by_columns:
        log_decay = log_decay[..., 0]
    more: dict[str, Any] = {}
    if case.delta:
        more["beta"] = rng.random((case.b, case.t, case.h), np.float32)
    if case.state:
        more["initial_state"] = rng.standard_normal((case.b, case.h, case.dk, case.dv)).astype(np.float32)
    return (q, k, v, log_decay), more | case.options


def _truth_of_rows(case: LinearCase, rows: tuple[int, ...], dtype: str, seed: int) -> LinearTruth:
    start = np.concatenate([[0], np.cumsum(rows)])
    of_all = dataclasses.replace(case, b=1, t=int(start[-1]) + case.padding, state=False)
    arrays, options = arrays_of(of_all, dtype, seed=seed)
    arrays = tuple(np.array(x[0]) for x in arrays)
    beta = options.pop("beta")[0] if case.delta else None
    rng = np.random.default_rng(seed + 1)
    slot = rng.permutation(len(rows) + 3)[: len(rows)]
    states = rng.standard_normal((len(rows) + 3, case.h, case.dk, case.dv)).astype(np.float32)
    is_new = np.isin(np.arange(len(rows)), case.new)
    results = []
    for exact in (np.float64, np.float32):
        out, after = np.zeros(arrays[2].shape, exact), states.astype(exact)
        for row, (first, end) in enumerate(itertools.pairwise(start)):
            own = {} if beta is None else {"beta": beta[None, first:end]}
            state = None if is_new[row] else states[slot[row]][None]
            if first < end:
                tokens = [x[None, first:end] for x in arrays]
                done = recurrence(tokens, **own, **options, initial_state=state, dtype=exact)
                out[first:end], after[slot[row]] = done[0][0], done[1][0]
        results.append((out, after))
    given: dict[str, Any] = dict(states=states.copy(), slot=slot, query_start=start, is_new=is_new)
    for row in case.new:
        given["states"][slot[row]] = np.nan
    if beta is not None:
        given["beta"] = beta
    for x in (*arrays, *([] if beta is None else [beta])):
        x[start[-1] :] = np.nan
    (out, after), (plain_out, plain_after) = results
    return LinearTruth("ragged_linear_attention", arrays, given | options, out, after, plain_out, plain_after)


def recurrence(
    arrays: Any,
    *,
    beta: Any = None,
    initial_state: Any = None,
    scale: float | None = None,
    seq_lengths: Any = None,
    segment_ids: Any = None,
    dtype: Any = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """(output, state after the last valid token) by the definition of jfa.linear_attention, computed in dtype."""
    q, k, v, log_decay = (np.asarray(x, dtype) for x in arrays)
    b, t, h, dv = v.shape
    dk = k.shape[3]
    q, k = (np.repeat(x, h // k.shape[2], axis=2) for x in (q, k))
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    states = np.zeros((b, h, dk, dv), dtype) if initial_state is None else np.array(initial_state, dtype)
    out = np.zeros((b, t, h, dv), dtype)
    for row in range(b):
        for i in range(t if seq_lengths is None else seq_lengths[row]):
            if segment_ids is not None and i and segment_ids[row, i] != segment_ids[row, i - 1]:
                states[row] = 0
            for head in range(h):
                state = np.exp(log_decay[row, i, head])[:, None] * states[row, head]
                new = v[row, i, head]
                if beta is not None:
                    new = beta[row, i, head] * (new - state.T @ k[row, i, head])
                states[row, head] = state + np.outer(k[row, i, head], new)
                out[row, i, head] = states[row, head].T @ q[row, i, head] * (dk**-0.5 if scale is None else scale)
    return out, states


def gradients(
    arrays: Any,
    d_out: Any,
    d_state: Any,
    *,
    beta: Any = None,
    initial_state: Any = None,
    scale: float | None = None,
    seq_lengths: Any = None,
    segment_ids: Any = None,
    dtype: Any = np.float64,
) -> dict[str, np.ndarray]:
    """The gradients of all arguments of `recurrence` that are given, by the names of jfa.linear_attention."""
    q, k, v, log_decay = (np.asarray(x, dtype) for x in arrays)
    (b, t, h, _), (hk, dk) = v.shape, k.shape[2:]
    q, k = (np.repeat(x, h // hk, axis=2) for x in (q, k))
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    d_q, d_k, d_v, d_log = (np.zeros(x.shape, dtype) for x in (q, k, v, log_decay))
    d_beta, d_first = np.zeros((b, t, h), dtype), np.array(d_state, dtype)
    scale = dk**-0.5 if scale is None else scale
    for row in range(b):
        state = np.zeros(d_first.shape[1:], dtype) if initial_state is None else np.array(initial_state[row], dtype)
        known = []  # of each token: its decay, the decayed state, what the state lacked, what was added, the state
        for i in range(t if seq_lengths is None else seq_lengths[row]):
            drops = segment_ids is not None and i and segment_ids[row, i] != segment_ids[row, i - 1]
            decay = np.exp(log_decay[row, i])[..., None] * (0 if drops else 1)
            decayed, new = decay * state, v[row, i]
            if beta is not None:
                new = new - np.einsum("hkv,hk->hv", decayed, k[row, i])
            added = new if beta is None else np.asarray(beta[row, i], dtype)[:, None] * new
            state = decayed + k[row, i, :, :, None] * added[:, None]
            known.append((decay, decayed, new, added, state))
        d = d_first[row]
        for i, (decay, decayed, new, added, state) in reversed(list(enumerate(known))):
            do = np.asarray(d_out[row, i], dtype) * dtype(scale)
            d_q[row, i] = np.einsum("hkv,hv->hk", state, do)
            d = d + q[row, i, :, :, None] * do[:, None]
            d_k[row, i] = np.einsum("hkv,hv->hk", d, added)
            d_added = np.einsum("hkv,hk->hv", d, k[row, i])
            d_v[row, i] = d_added
            if beta is not None:
                d_beta[row, i] = (d_added * new).sum(-1)
                d_v[row, i] = np.asarray(beta[row, i], dtype)[:, None] * d_added
                d = d - k[row, i, :, :, None] * d_v[row, i][:, None]
                d_k[row, i] -= np.einsum("hkv,hv->hk", decayed, d_v[row, i])
            d_log[row, i] = (d * decayed).sum(-1 if log_decay.shape[3] > 1 else (1, 2)).reshape(h, -1)
            d = decay * d
        d_first[row] = d
    d_q, d_k = (x.reshape(b, t, hk, h // hk, dk).sum(3) for x in (d_q, d_k))
    found = {"query": d_q, "key": d_k, "value": d_v, "log_decay": d_log.reshape(np.shape(arrays[3]))}
    found |= {} if beta is None else {"beta": d_beta}
    return found | ({} if initial_state is None else {"initial_state": d_first})
