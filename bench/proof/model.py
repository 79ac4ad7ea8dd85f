"""`jfa-bench prove --model`: a whole model's step, compiled by XLA for an AMD GPU and executed kernel by kernel here.

A row is a tiny model, a step, a cache and an architecture. Every kernel of the program runs as machine code, in the
order and in the buffers of XLA's schedule: jfa's Pallas kernels, XLA's fusions, and its Triton products. The row holds
if the logits are within the numerics contract of a float32 model on this CPU (numerics.limit), the cache has the new
keys and values within it, and every byte of the cache that the step does not write is what it was.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa import quant
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.decoding.options import CacheOptions
from jfa_models.model.config import DecoderConfig, ExpertsConfig, RopeConfig

from .. import amdgcn, names
from ..records import record
from ..truth import numerics
from . import compilers, pool
from .execute import Executed, execute
from .program import ProgramError, by_role, compile_program

_TINY = DecoderConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    context_length=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10_000.0),
)
MODELS: Mapping[str, DecoderConfig] = {
    "llama": _TINY,
    "mixture": dataclasses.replace(
        _TINY,
        architecture="mixtral",
        experts=ExpertsConfig(num_experts=4, experts_per_token=2, intermediate_size=32),
    ),
}
CACHES: Mapping[str, CacheOptions] = {
    "contiguous": CacheOptions(),
    "paged": CacheOptions(kind="paged", page_size=4),
    "int8 pages": CacheOptions(kind="paged", page_size=4, kv_dtype="int8"),
}
_QUANTIZED = (("llama", "paged", "int4"), ("mixture", "contiguous", "int8"))  # model, cache, weights
STEPS = {"prefill": (9, 4), "decode": (1, 1)}  # new tokens of each row
_PROMPTS = (13, 6)  # tokens that are in the cache before a decode step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row; plain data, so that it can be sent to another process."""

    arch: str
    model: str
    step: str
    cache: str
    weights: str | None = None  # a quantization of LanguageModel.random


def rows(archs: Sequence[str], *, quick: bool = False) -> list[Row]:
    """The rows to prove; quick: one cache for each step."""
    kept = {
        ("llama", "decode", "int8 pages", None),
        ("llama", "decode", "paged", "int4"),
        ("llama", "prefill", "contiguous", None),
        ("mixture", "decode", "paged", None),
    }
    cases = [
        *((model, step, cache, None) for model in MODELS for step in STEPS for cache in CACHES),
        *((model, step, cache, weights) for model, cache, weights in _QUANTIZED for step in STEPS),
    ]
    return [
        Row(arch=arch, model=model, step=step, cache=cache, weights=weights)
        for arch in archs
        for model, step, cache, weights in cases
        if not quick or (model, step, cache, weights) in kept
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step and its arguments. model: in bfloat16; exact: the same weights in float32."""

    model: LanguageModel
    exact: LanguageModel
    cache: Any
    exact_cache: Any
    tokens: jax.Array
    lengths: jax.Array


def case_of(row: Row) -> Case:
    """The model of a row with seeded random weights, and its cache before the step."""
    config, options = MODELS[row.model], CACHES[row.cache]
    model = LanguageModel.random(config, dtype="bfloat16", quantization=row.weights, cache_options=options)
    model.params = tuple(map(_as_on_a_gpu, model.params))
    exact = LanguageModel.random(config, dtype="float32", cache_options=options)
    exact.params = tuple(
        quant.dequantize(x) if isinstance(x, jfa.QuantizedArray) else x.astype(jnp.float32) for x in model.params
    )
    draw = np.random.default_rng(0)
    caches = [one.new_cache(batch=len(_PROMPTS), capacity=64) for one in (model, exact)]
    if row.step == "decode":
        prompts = jnp.asarray(draw.integers(0, config.vocab_size, (len(_PROMPTS), max(_PROMPTS))), jnp.int32)
        lengths = jnp.asarray(_PROMPTS, jnp.int32)
        before = zip((model, exact), caches, strict=True)
        caches = [one.steps.score(one.params, cache, prompts, lengths)[0] for one, cache in before]
    new = STEPS[row.step]
    tokens = jnp.asarray(draw.integers(0, config.vocab_size, (len(new), max(new))), jnp.int32)
    return Case(
        model=model,
        exact=exact,
        cache=caches[0],
        exact_cache=caches[1],
        tokens=tokens,
        lengths=jnp.asarray(new, jnp.int32),
    )


def _as_on_a_gpu(x: jax.Array | jfa.QuantizedArray) -> jax.Array | jfa.QuantizedArray:
    """Inputs of its products are not rounded."""
    return dataclasses.replace(x, rounds_inputs=0) if isinstance(x, jfa.QuantizedArray) else x


def executed(case: Case, arch: str, **options: Any) -> tuple[Executed, dict[str, int]]:
    """(the step as machine code of arch, number of launches by role); options: of execute."""
    step = case.model.steps.score
    args = jax.tree.map(np.array, (case.model.params, case.cache, case.tokens, case.lengths))
    program = compile_program(step, *args, arch=arch)
    return execute(program, *args, **options), by_role(program)


def verdict(case: Case, done: Executed) -> tuple[float | None, str | None]:
    """(worst error / limit of the numerics contract, what is wrong or None)."""
    before = jax.tree.map(np.array, case.cache)
    # the steps donate their cache
    caches = (jax.tree.map(jnp.array, cache) for cache in (case.cache, case.exact_cache))
    (plain_cache, plain), (exact_cache, want) = (
        model.steps.score(model.params, cache, case.tokens, case.lengths)
        for model, cache in zip((case.model, case.exact), caches, strict=True)
    )
    shapes = jax.tree.leaves((plain_cache, plain))
    got = [x.view(s.dtype).reshape(s.shape) for x, s in zip(done.outputs, shapes, strict=True)]
    cache, logits = jax.tree.unflatten(jax.tree.structure((plain_cache, plain)), got)
    valid = np.arange(case.tokens.shape[1]) < np.asarray(case.lengths)[:, None]
    try:
        share = _share(logits[valid], np.asarray(want)[valid], np.asarray(plain)[valid])
        for parts in zip(*map(jax.tree.leaves, (before, cache, plain_cache, exact_cache)), strict=True):
            share = max(share, _cache_share(*map(np.asarray, parts)))
    except AssertionError as error:
        return None, str(error)
    return share, done.races[0] if done.races else None


def _cache_share(before: np.ndarray, got: np.ndarray, plain: np.ndarray, exact: np.ndarray) -> float:
    """Checks one array of the cache: what the CPU's step leaves is left, what it writes is within the contract."""
    if got.dtype == np.int32:
        assert np.array_equal(got, plain), f"lengths or tables are {got}, expected {plain}"
        return 0.0
    # of keys and values the first two axes are a token's place
    slots = (x.view(np.uint8).reshape(*x.shape[:2], -1) for x in (before, plain, got))
    old, expected, new = slots
    written = (expected != old).any(-1)
    assert np.array_equal(new[~written], old[~written]), "bytes of the cache that the step does not write have changed"
    got, exact, plain = (x[written].astype(np.float64) for x in (got, exact, plain))
    if before.dtype == np.int8:  # levels, of which rounding may choose the next one
        return numerics.assert_within(got, exact, allowed := 2 * np.abs(plain - exact).max(initial=0) + 2) / allowed
    return _share(got, exact, plain)


def _share(got: np.ndarray, want: np.ndarray, plain: np.ndarray) -> float:
    allowed = numerics.limit(want, plain, jnp.bfloat16)
    return numerics.assert_within(got, want, allowed) / allowed


def prove_row(row: Row) -> dict[str, Any]:
    """The record of a row: status "ok" or "wrong" and the reason, worst error / limit, launches, instructions."""
    start = time.perf_counter()
    case = case_of(row)
    share, launches, kernels, instructions, races = None, {}, [], 0, 0
    try:
        done, launches = executed(case, row.arch)
        share, wrong = verdict(case, done)
        kernels, instructions, races = list(dict.fromkeys(done.kernels)), done.instructions, len(done.races)
    except (ProgramError, amdgcn.MachineError) as error:
        wrong = f"{type(error).__name__}: {error}"
    return _about(row) | {
        "status": "wrong" if wrong else "ok",
        "reason": wrong,
        "worst_error_of_limit": None if share is None else round(float(share), 3),
        "launches": launches,
        "kernels": kernels,
        "races": races,
        "instructions": instructions,
        "seconds": round(time.perf_counter() - start, 2),
    }


def _about(row: Row) -> dict[str, Any]:
    return {"benchmark": "prove model", "compiler": "xla", **dataclasses.asdict(row)}


def _lost(row: Row, why: str) -> dict[str, Any]:
    return _about(row) | {"status": "wrong", "reason": f"the row {why}", "seconds": None}


def prove_all(rows: Sequence[Row], processes: int = names.PROCESSES) -> list[dict[str, Any]]:
    """prove_row for each row, in order, each in a process of its own; this number of them at a time.

    Raises:
      RuntimeError: XLA's compiler is not installed; the message says how to install it.
    """
    for arch in {row.arch for row in rows}:
        compilers.chosen(arch, "xla")
    return pool.each(prove_row, rows, lost=_lost, doing="proving", processes=max(1, processes), rows_per_process=1)


TABLE = {
    **{"arch": "arch", "name": "model", "step": "step", "cache": "cache", "status": "status"},
    **{"worst_error_of_limit": "error", "count": "kernels", "instructions": "instructions", "seconds": "s"},
}
COLUMNS = TABLE | {"races": "races", "reason": "reason"}


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['model']} {row['weights'] or ''}".rstrip()


def render(records: Sequence[Mapping[str, Any]], output: str) -> str:
    """Records as text; for md a table, and the reason of each row that is wrong."""
    shown = [{**row, "name": _name(row), "count": sum((row.get("launches") or {}).values())} for row in records]
    if output != "md":
        return record.render(records if "json" in output else shown, output, COLUMNS)
    lines = [
        f"{row['arch']} {_name(row)} {row['step']}, {row['cache']}: {row['reason']}"
        for row in records
        if row["status"] != "ok"
    ]
    table = record.render(shown, "md", TABLE)
    return "\n\n".join(
        [table, "error: worst error / limit of the numerics contract"] + ["\n".join(lines)] * bool(lines)
    )
