"""`jfa-bench linear`: linear attention over length, and a step of decoding, compared with attention.

Before timing, the first tokens' results are checked against a recurrence in float64: they depend on no later ones.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa

from .. import names
from ..records import record
from ..truth import linear_cases, numerics
from . import attention, machine, outcome, paged, peers, timing

CHECKED = 96  # tokens: more than one chunk
GRADIENT_PRODUCTS = 8  # consecutive products and sums of a chunk's gradients
STEPS = ("xla", "attention")  # implementations that have a step of decoding
BASELINE = "attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one call. rule: one of names.RULES."""

    rule: str
    length: int
    batch: int
    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    dtype: str


Plan = Mapping[tuple[str, str], Sequence[tuple[Case, str]]]  # (rule, direction) -> (case, implementation)


def planned(
    cases: Sequence[Case], *, directions: Sequence[str], implementations: Sequence[str], max_quadratic: int
) -> Plan:
    """What is measured interleaved: the lengths and implementations of each rule and direction."""
    found: dict[tuple[str, str], list[tuple[Case, str]]] = {}
    for case, direction, name in itertools.product(cases, directions, implementations):
        is_too_long = name in names.QUADRATIC and case.length > max_quadratic and direction != "step"
        if not is_too_long and (direction != "step" or name in STEPS):
            found.setdefault((case.rule, direction), []).append((case, name))
    return found


def measure(plan: Plan, *, samples: int, clock: timing.Clock = time.perf_counter) -> Iterator[record.Record]:
    """A record for each case, direction and implementation. speedup: over attention of the same shapes and length."""
    shared = machine.circumstances() | {"benchmark": "linear"}
    for (_, direction), jobs in plan.items():
        prepared = {job: _prepared(*job, direction) for job in jobs}
        runs = {job: run for job, (_, run) in prepared.items() if run is not None}
        taken = timing.in_turns(runs, samples=samples, clock=clock)
        for (case, name), (own, _) in prepared.items():
            if (case, name) in taken:
                ms, others = taken[case, name], taken.get((case, BASELINE))
                tokens = case.batch * (1 if direction == "step" else case.length)
                own |= timing.summary(ms) | timing.rate(tokens, ms)
                own |= {"speedup": others and float(np.median(others) / np.median(ms))}
            about = dataclasses.asdict(case) | {"direction": direction}
            yield shared | {"case": about, "implementation": name} | own


def _prepared(case: Case, name: str, direction: str) -> tuple[record.Record, timing.Run | None]:
    """The record fields before timing, and a run; None if it is wrong or does not serve."""
    if direction == "step":
        found, runs = outcome.tried({name: _step(case, name)})
        return found[name], runs.get(name)
    arrays = inputs(case)
    call = peers.Call(causal=True, direction=direction)
    some = arrays[-1].at[:, CHECKED:].set(0)
    return attention.checked(
        functools.partial(peers.program, name, call, *arrays, known=peers.LINEAR),
        (lambda got: None) if name == BASELINE else functools.partial(_error, case, direction),
        arrays,
        (*arrays[:-1], some),
    )


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """Seeded q, k, v, log_decay, beta if the rule has it, and a cotangent; keys have the norm 1."""
    keys = jax.random.split(jax.random.key(0), 6)
    tokens, of_keys = (case.batch, case.length), (case.key_heads, case.key_dim)
    q, k = (jax.random.normal(key, (*tokens, *of_keys), jnp.float32) for key in keys[:2])
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    v, d_out = (jax.random.normal(key, (*tokens, case.heads, case.value_dim), jnp.float32) for key in keys[2:4])
    columns = (case.key_dim,) if case.rule == "vector" else ()
    decays = -(10 ** jax.random.uniform(keys[4], (*tokens, case.heads, *columns), minval=-3.0, maxval=0.0))
    beta = (jax.random.uniform(keys[5], (*tokens, case.heads)),) if case.rule == "delta" else ()
    q, k, v, d_out = (x.astype(case.dtype) for x in (q, k, v, d_out))
    return q, k, v, decays, *beta, d_out


def _error(case: Case, direction: str, got: Sequence[np.ndarray]) -> float:
    """The largest error of the first tokens' output, or of the gradients' products with a direction.

    Raises:
      AssertionError: one is larger than the numerics contract allows.
    """
    *given, d_out = (np.asarray(x, np.float64)[:, :CHECKED] for x in inputs(case))
    dtype = jnp.dtype(case.dtype)

    def output(arrays: Sequence[np.ndarray], exact: Any = np.float64) -> np.ndarray:
        more: dict[str, Any] = {"beta": arrays[4]} if len(arrays) > 4 else {}
        return linear_cases.recurrence(arrays[:4], **more, dtype=exact)[0]

    if direction == "forward":
        want = output(given)
        return numerics.assert_within(got[0][:, :CHECKED], want, numerics.limit(want, output(given, np.float32), dtype))
    rng, errors = np.random.default_rng(0), []
    for i, x in enumerate(given):
        along = rng.standard_normal(x.shape) * np.abs(x)
        ends = ((output([*given[:i], x + step * along, *given[i + 1 :]]) * d_out).sum() for step in (1e-5, -1e-5))
        want = np.array((next(ends) - next(ends)) / 2e-5)
        products = np.asarray(got[i], np.float64)[:, :CHECKED] * along
        norm = np.linalg.norm(products)
        allowed = norm * numerics.limit(want / norm, want / norm, dtype, products=GRADIENT_PRODUCTS)
        errors.append(numerics.assert_within(products.sum(), want, float(allowed)))
    return max(errors)


def _step(case: Case, name: str) -> timing.Run:
    """One more token of each row: with a state, or with a cache of `length` tokens."""
    q, k, v, *rest, _ = inputs(dataclasses.replace(case, length=1))
    token = [x[:, 0] for x in (q, k, v, *rest)]
    if name == BASELINE:
        keys, values = (
            jax.random.normal(jax.random.key(i), (case.batch, case.length, case.heads, size)).astype(case.dtype)
            for i, size in enumerate((case.key_dim, case.value_dim))
        )
        query = jnp.repeat(token[0], case.heads // case.key_heads, axis=1)
        lengths = np.full(case.batch, case.length, np.int32)
        return _rotating(functools.partial(paged.contiguous_step, None), query, (keys, values), lengths)
    shape = case.batch, case.heads, case.key_dim, case.value_dim
    state = jax.random.normal(jax.random.key(1), shape)

    def step(token: list[jax.Array], state: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v, log_decay, *beta = token
        return jfa.linear_attention_step(q, k, v, log_decay, state, beta=beta[0] if beta else None)

    return _rotating(step, token, (state,))


def _rotating(function: Callable, first: Any, held: tuple[jax.Array, ...], *rest: Any) -> timing.Run:
    """A run that calls a function on copies of what it reads from memory."""
    copies = range(timing.copies_past_cache(sum(x.nbytes for x in held)))
    return timing.rotating(jax.jit(function), [(first, *map(jnp.copy, held), *rest) for _ in copies])
