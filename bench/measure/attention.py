"""`jfa-bench attention`: compares the op on this machine with the plain formula and with other libraries.

FLOP are counted as in the FlashAttention papers: 4 b n^2 h d forward, 2.5 times that for the gradients, half if causal.
Before timing, the results of some query rows are checked against the oracle, by the numerics contract.
"""

import dataclasses
import functools
import itertools
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jfa import backends

from ..records import record
from ..truth import numerics, oracle
from . import elsewhere, machine, outcome, peers, roofline, timing, used

ROWS = 8  # number of query rows that are checked, including the first and the last
GRADIENT_PRODUCTS = 3  # consecutive products: the scores, their cotangent and the gradient
FLOP = {"forward": 1.0, "backward": 2.5, "both": 3.5}  # relative to the forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes of one call; length is the number of queries and of keys."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool

    @property
    def flop(self) -> float:
        """FLOP of the forward pass."""
        return 4 * self.batch * self.length**2 * self.heads * self.head_dim * (0.5 if self.causal else 1)

    @property
    def num_bytes(self) -> int:
        """Bytes of queries, keys, values and output, which a forward pass must read or write."""
        rows = self.batch * self.length * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return rows * jnp.dtype(self.dtype).itemsize


def fa_grid(dtype: str) -> list[Case]:
    """The grid of the FlashAttention-2 and -3 papers: 16k tokens, hidden size 2048."""
    grid = itertools.product((64, 128, 256), (False, True), (2**n for n in range(9, 15)))
    return [
        Case(
            batch=2**14 // length,
            length=length,
            heads=2048 // head_dim,
            kv_heads=2048 // head_dim,
            head_dim=head_dim,
            dtype=dtype,
            causal=causal,
        )
        for head_dim, causal, length in grid
    ]


def measure(
    cases: Sequence[Case],
    *,
    directions: Sequence[str],
    implementations: Sequence[str],
    samples: int,
    device_time: bool = False,
    pythons: Mapping[str, str] = types.MappingProxyType({}),
    clock: timing.Clock = time.perf_counter,
) -> Iterator[record.Record]:
    """A record for each case, direction and implementation; those of one case and direction are measured interleaved.

    pythons: the Python in which an implementation runs, by its name (elsewhere.py).

    peak_bytes: memory that the program uses in addition to its arguments. speedup: over the reference.
    """
    shared = machine.circumstances() | {"benchmark": "attention"}
    ceilings = {dtype: roofline.ceilings(dtype, clock=clock) for dtype in {case.dtype for case in cases}}
    for case, direction in itertools.product(cases, directions):
        about = {"case": dataclasses.asdict(case) | {"direction": direction}, "ceilings": ceilings[case.dtype]}
        found, runs = _checked(case, direction, implementations, pythons)
        settle = elsewhere.SETTLE if pythons else 0.0
        taken = timing.in_turns(runs, samples=samples, settle=settle, clock=clock)
        plain = float(np.median(taken["reference"])) if "reference" in taken else None
        for name, own in found.items():
            if name in taken:
                median = float(np.median(taken[name]))
                flop, peak = case.flop * FLOP[direction], ceilings[case.dtype]["matrix_tflops"]
                own |= timing.summary(taken[name]) | {"flop": flop, "bytes": case.num_bytes}
                own |= {"tflops": flop / median / 1e9, "share_of_peak": peak and flop / median / 1e9 / peak}
                own |= {"speedup": plain and plain / median}
                if device_time:
                    own |= {"device_ms": timing.on_device(runs[name], samples=samples)}
            yield shared | about | {"implementation": name} | own


def _checked(
    case: Case, direction: str, implementations: Sequence[str], pythons: Mapping[str, str]
) -> tuple[dict[str, record.Record], dict[str, timing.Run]]:
    """The record fields of each implementation before timing, and a run of each that is correct."""
    arrays, some = inputs(case)
    call = peers.Call(causal=case.causal, direction=direction)
    found: dict[str, record.Record] = {}
    runs: dict[str, timing.Run] = {}
    for name in implementations:
        found[name], run = checked(
            functools.partial(elsewhere.program, pythons[name], call, *arrays)
            if name in pythons
            else functools.partial(peers.program, name, call, *arrays),
            functools.partial(_error, case, direction),
            arrays,
            (*arrays[:3], some),
        )
        if run is not None:
            runs[name] = run
        if run is not None and name in backends.NAMES:
            backward = direction != "forward"
            found[name]["config"] = used.attention(name, *arrays[:3], causal=case.causal, backward=backward)
    return found, runs


def checked(
    program_of: Callable[[], peers.Program],
    error_of: Callable[[Sequence[np.ndarray]], float | None],
    arrays: Sequence[jax.Array],
    checked_arrays: Sequence[jax.Array],
) -> tuple[record.Record, timing.Run | None]:
    """The record fields of one implementation before timing, and a run of it; None if it is wrong or does not serve.

    Args:
      error_of: the largest error of the results of checked_arrays; raises AssertionError if it is too large.
      arrays: what is timed, in copies that exceed the processor's cache.
    """
    try:
        program = program_of()
        error = error_of(program.read(program.run(*program.prepare(*checked_arrays))))
        rotated = [program.prepare(*arrays)]
        for _ in range(1, timing.copies_past_cache(program.num_bytes(rotated[0]))):
            rotated.append(program.prepare(*(jnp.copy(x) for x in arrays)))
    except AssertionError as wrong:
        return {"status": "wrong", "reason": str(wrong)}, None
    except outcome.REFUSALS as refusal:
        return outcome.of(refusal), None
    fields = {"status": "ok", "reason": None, "max_error": error, "peak_bytes": program.peak_bytes, **program.about}
    return fields, timing.rotating(program.run, rotated)


def inputs(case: Case) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Seeded q, k, v and cotangent; and a cotangent that is zero except in the rows that are checked."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    q, k, v, d_out = (
        jax.random.normal(key, (case.batch, case.length, n, case.head_dim), jnp.float32).astype(case.dtype)
        for key, n in zip(keys, heads, strict=True)
    )
    is_checked = np.zeros(case.length, bool)
    is_checked[checked_rows(case)] = True
    return (q, k, v, d_out), jnp.where(is_checked[None, :, None, None], d_out, jnp.zeros((), d_out.dtype))


def checked_rows(case: Case) -> np.ndarray:
    """The query rows whose results are checked."""
    return np.unique(np.linspace(0, case.length - 1, ROWS).astype(int))


@functools.lru_cache(maxsize=1)
def _truth(case: Case, gradients: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    rows = checked_rows(case)
    seen = rows[:, None] >= np.arange(case.length)[None, :] if case.causal else None
    return truth(case, None if seen is None else seen[None, None], gradients=gradients)


def truth(case: Case, seen: np.ndarray | None, *, gradients: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """(oracle, plain formula in the dtype) for the output in checked_rows and for the gradients of q, k and v.

    seen: bool[#b, #hq, rows, length], the keys that these rows see; None: all.
    """
    (q, k, v, _), some = inputs(case)
    rows = checked_rows(case)
    options: dict[str, Any] = {"scale": case.head_dim**-0.5, "mask": seen}
    q, k, v, d_out = (np.asarray(x) for x in (q[:, rows], k, v, some[:, rows]))
    answers = []
    for rounding in (lambda x: x, numerics.rounding_to(jnp.dtype(case.dtype))):
        answer = [oracle.attention(q, k, v, rounding=rounding, **options)[0]]
        if gradients:
            nothing = np.zeros(q.shape[:3])
            answer += oracle.gradients(q, k, v, d_out, nothing, rounding=rounding, **options).values()
        answers.append(answer)
    return list(zip(*answers, strict=True))


def _error(case: Case, direction: str, got: Sequence[np.ndarray]) -> float:
    return error(case, direction, _truth(case, direction != "forward"), got)


def error(
    case: Case, direction: str, known: Sequence[tuple[np.ndarray, np.ndarray]], got: Sequence[np.ndarray]
) -> float:
    """The largest error of results with the cotangent that is zero except in checked_rows. known: see truth.

    Raises:
      AssertionError: one is larger than the numerics contract allows.
    """
    rows = checked_rows(case)
    names, wanted = ["out", "d_q", "d_k", "d_v"], list(known)
    if direction == "backward":
        names, wanted = names[1:], wanted[1:]
    errors = []
    for name, value, (want, plain) in zip(names, got, wanted, strict=False):
        allowed = numerics.limit(want, plain, jnp.dtype(case.dtype), products=1 if name == "out" else GRADIENT_PRODUCTS)
        try:
            errors.append(numerics.assert_within(value[:, rows] if name in ("out", "d_q") else value, want, allowed))
        except AssertionError as wrong:
            raise AssertionError(f"{name} {wrong}") from None
    return max(errors)
