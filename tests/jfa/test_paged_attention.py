"""Attention over pages: oracle, reference, kernels; each case on every backend."""

import dataclasses

import jax.numpy as jnp
import pytest

import jfa
from jfa_bench.numerics import assert_within, limit
from jfa_bench.paged_cases import CASES, truth

TILES = {
    "reference": None,
    "xla": jfa.BlockConfig(block_q=16, block_kv=16, widen=True),
    "triton": jfa.PagedConfig(block_q=16, block_kv=16, num_warps=4, num_stages=1, num_splits=1),
}
# float16 and bfloat16 differ in rounding alone, so half of the cases run in each
DTYPES = {name: ("float32", ("bfloat16", "float16")[i % 2]) for i, name in enumerate(CASES)}
RUNS = [
    pytest.param(name, dtype, backend, id=f"{name}-{dtype}-{backend}")
    for name in CASES
    for dtype in DTYPES[name]
    for backend in TILES
]


def attend(name, dtype, backend, **more):
    known = truth(name, dtype)
    options = known.options | dict(implementation=backend, config=TILES[backend], return_residual=True) | more
    return getattr(jfa, known.op)(*known.arrays, **options)


@pytest.mark.parametrize(("name", "dtype", "backend"), RUNS)
def test_agrees_with_the_oracle_beside_poison(name, dtype, backend):
    known = truth(name, dtype)
    out, lse = attend(name, dtype, backend)
    assert out.dtype == jnp.dtype(dtype) and lse.dtype == jnp.float32
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


@pytest.mark.parametrize("name", ["ragged", "sinks", "window", "int8", "chunks_and_tokens", "chunk_with_sinks"])
def test_a_row_whose_keys_are_shared_out_gives_the_same(name):
    known = truth(name, "bfloat16")
    config = dataclasses.replace(TILES["triton"], num_splits=3)
    out, lse = attend(name, "bfloat16", "triton", config=config)
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))
