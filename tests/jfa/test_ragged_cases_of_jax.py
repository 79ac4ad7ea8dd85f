"""Ragged paged attention at the sizes that JAX tests its own kernel with, by the TPU kernel, interpreted.

Source: the parameters of tests/pallas/tpu_ragged_paged_attention_test.py in jax-ml/jax (2025-12). Numbers are ours, as
are the expected results and their tolerance: the oracle's and the numerics contract's, where JAX allows errors of 0.15
to 0.2. Its tests vary the sizes of its tiles; ours are multiples of 128.
"""

import functools

import jax
import numpy as np
import pytest
from runs import run

import jfa
from jfa.kernels.tpu._pallas import pltpu
from jfa_bench.truth import paged_cases
from jfa_bench.truth.numerics import assert_within, limit

TILES = jfa.TpuConfig(block_q=128, block_kv=128)
CHUNKS = ((192, 328), (128, 180), (64, 255))
CONTEXTS = (18, 129, 597, 122, 64, 322, 463, 181, 1107, 123, 31, 18, 1229, 229, 87, 1328)
PREFILL = (5, 15, 120, 100, 21, 32, 251, 40, 64, 99, 10, 5, 3, 120, 9, 2)
MIXED = (5, 1, 120, 1, 1, 32, 251, 1, 1, 99, 1, 5, 3, 117, 1, 1)


def rows(pairs, heads=(32, 8), **more) -> paged_cases.PagedCase:
    """A case of rows (new tokens, tokens), in a batch of at least 512 tokens."""
    queries, kv_len = zip(*pairs, strict=True)
    padding = max(0, 512 - sum(queries))
    return paged_cases.PagedCase(
        kv_len=kv_len, queries=queries, padding=padding, heads=heads, head_dim=128, page_size=16, **more
    )


SMALL = dict(kv_len=(20,), queries=(3,), heads=(4, 2), head_dim=128, page_size=16)


def drawn(count: int) -> list[tuple[int, int]]:
    """Rows of up to 100 new tokens after fewer than 50."""
    random = np.random.default_rng(1234)
    new = random.integers(1, 100, count)
    return list(zip(new.tolist(), (new + random.integers(0, 50, count)).tolist(), strict=True))


CASES = {
    "basic": rows(CHUNKS),
    "decode_only": rows([(1, length) for length in CONTEXTS]),
    "prefill_only": rows(zip(PREFILL, CONTEXTS, strict=True)),
    "mixed": rows(zip(MIXED, CONTEXTS, strict=True)),
    **{
        f"complex_{count}_rows_{heads[0]}_heads_over_{heads[1]}": rows(drawn(count), heads)
        for count in (1, 5, 16)
        for heads in ((32, 8), (32, 16), (16, 2), (4, 4), (8, 1))
    },
    # a window there counts the query itself
    **{
        f"window_{seen}": rows(drawn(5), (4, 4), options=dict(local_window_size=None if seen is None else seen - 1))
        for seen in (None, 5, 128)
    },
    **{f"soft_cap_{cap}": rows(drawn(2), (16, 2), options=dict(logits_soft_cap=cap)) for cap in (None, 50.0)},
    **{f"fp8_scale_{scale}": rows(CHUNKS, pages="fp8", scale_of_pages=scale) for scale in (0.5, 1.0)},
}
DTYPES = {name: ("bfloat16",) if name.startswith("fp8") else ("bfloat16", "float32") for name in CASES}
DTYPES |= {name: ("float32",) for name in CASES if name.startswith(("window", "soft_cap"))}
QUICK = {"window_5": "float32", "complex_1_rows_8_heads_over_1": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [run(name, dtype, quick=QUICK.get(name) == dtype, soak=True) for name in CASES for dtype in DTYPES[name]],
)
def test_a_case_of_jax_agrees_with_the_oracle(name, dtype):
    known = paged_cases.truth_of(CASES[name], dtype, seed=0)
    call = functools.partial(
        jfa.ragged_paged_attention, implementation="tpu", config=TILES, return_residual=True, **known.options
    )
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            out, lse = jax.block_until_ready(jax.jit(call)(*known.arrays))
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    # scores are the first product; the interpreter sums 128 float32 products one by one
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype, products=2))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


REFUSED = {
    "float8_e5m2": (dict(pages="float8_e5m2"), {}, "pages must be .*, or quantized; .*float8_e5m2"),
    # its windows count the query, ours do not: 0 is refused there, and is a window here
    "window": ({}, dict(local_window_size=-1), r"both must be >= 0, .* got \(-1, -1\)"),
    "soft_cap": ({}, dict(logits_soft_cap=0.0), "logits_soft_cap must be a finite number > 0, got 0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_case_of_jax_that_is_refused_says_why(name):
    pages, options, message = REFUSED[name]
    known = paged_cases.truth_of(paged_cases.PagedCase(**SMALL), "bfloat16", seed=0)
    q, *pools, table, kv_len, start = known.arrays
    pools = [x.astype(pages.get("pages", x.dtype)) for x in pools]
    if pages:
        options = dict(zip(("key_scales", "value_scales"), (x[..., 0].astype("bfloat16") for x in pools), strict=True))
    call = functools.partial(jfa.ragged_paged_attention, implementation="tpu", **options)
    with pytest.raises(ValueError, match=message):
        call(q, *pools, table, kv_len, start)
