"""The TPU kernels, in JAX's TPU interpreter: NaN in scratch memory, copies that arrive late, and races reported."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from runs import run

import jfa
from jfa import backends
from jfa.device import describe
from jfa.kernels.tpu import columns, flash, flash_bwd, shares, tile
from jfa.kernels.tpu._pallas import pltpu
from jfa.types import AttentionSpec, BlockConfig, Operands, PagedOperands
from jfa_bench.proof.proofs import backward_check, poisoned, tile_cases
from jfa_bench.truth import cases, paged_cases
from jfa_bench.truth.numerics import assert_within, limit

TILES = jfa.TpuConfig(block_q=128, block_kv=128)
SPEC = AttentionSpec(sm_scale=0.125, causal=True)
V5E, V4, CPU = describe("tpu", "v5e"), describe("tpu", "v4"), describe("cpu", "cpu")


@contextlib.contextmanager
def interpreter(**changed):
    """A context in which races are errors; an error leaves the interpreter unusable, unless it is reset."""
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, **changed)):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def agrees(known, call, *arrays):
    with interpreter():
        out, lse = jax.block_until_ready(jax.jit(call)(*arrays))
    assert out.dtype == arrays[0].dtype and lse.dtype == jnp.float32
    assert_within(out, known.out, limit(known.out, known.plain_out, out.dtype))
    assert_within(lse, known.lse, limit(known.lse, known.plain_lse, lse.dtype))


# Attention

SERVED = [name for name, case in cases.CASES.items() if not (case.bias or case.mask)]
SERVED = [name for name in SERVED if not cases.CASES[name].dropout_rate]
# between them, they have all options
QUICK = {
    "gqa": "bfloat16",
    "head_dim_80": "bfloat16",
    "offset_and_window": "float32",
    "lengths_with_empty_rows": "float32",
    "wide_values": "bfloat16",
    "sinks_and_window": "bfloat16",
    "alibi_both_ways_with_soft_cap": "float32",
    "alibi_per_row": "bfloat16",
    "negative_scale": "bfloat16",
    "segments_window_and_lengths": "bfloat16",
}
RUNS = [
    run(name, dtype, quick=QUICK.get(name) == dtype, soak=True) for name in SERVED for dtype in ("bfloat16", "float32")
]


@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_attention_agrees_with_the_oracle(name, dtype):
    known = cases.truth(name, dtype)
    options = known.options | dict(implementation="tpu", config=TILES, return_residual=True)
    agrees(known, functools.partial(jfa.dot_product_attention, **options), *poisoned(known))


OF_TILES = {head_dim: tile_cases(128, 128, head_dim, quick=False) for head_dim in (64, 128)}
QUICK_TILES = {("causal", 64), ("windows_and_lengths", 128)}


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        run(name, head_dim, quick=(name, head_dim) in QUICK_TILES, soak=True)
        for head_dim, found in OF_TILES.items()
        for name in found
    ],
)
def test_several_tiles_agree_with_the_oracle(name, head_dim):
    known = cases.truth_of(OF_TILES[head_dim][name], "bfloat16", seed=0)
    options = known.options | dict(implementation="tpu", config=TILES, return_residual=True)
    agrees(known, functools.partial(jfa.dot_product_attention, **options), *poisoned(known))


def test_programs_may_run_in_any_order():
    known = cases.truth_of(OF_TILES[64]["causal"], "bfloat16", seed=0)
    call = jax.jit(functools.partial(jfa.dot_product_attention, implementation="tpu", config=TILES, **known.options))
    outs = []
    for seed in (1, 2):
        with interpreter(random_seed=seed):
            outs.append(np.asarray(call(*known.arrays)))
    np.testing.assert_array_equal(*outs)


def gradients_agree(known):
    known = dataclasses.replace(known, options=known.options | {"config": TILES})
    fn, args, wanted, limits = backward_check(known, "tpu")
    with interpreter():
        found = jax.block_until_ready(jax.jit(fn)(*args))
    for got, want, allowed in zip(found, wanted, limits, strict=True):
        assert_within(got, want, allowed)


# between them, they have all options
QUICK_GRADIENTS = {
    "offset_and_window": "float32",
    "segments_window_and_lengths": "bfloat16",
    "alibi_both_ways_with_soft_cap": "float32",
    "sinks_and_window": "bfloat16",
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        run(name, dtype, quick=QUICK_GRADIENTS.get(name) == dtype, soak=True)
        for name in SERVED
        for dtype in ("bfloat16", "float32")
    ],
)
def test_gradients_agree_with_the_oracle(name, dtype):
    gradients_agree(cases.truth(name, dtype))


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        run(name, head_dim, quick=(name, head_dim) == ("causal", 64), soak=True)
        for head_dim, found in OF_TILES.items()
        for name in found
    ],
)
def test_gradients_of_several_tiles_agree_with_the_oracle(name, head_dim):
    gradients_agree(cases.truth_of(OF_TILES[head_dim][name], "bfloat16", seed=0))


def test_gradients_agree_if_the_sums_of_only_one_tile_of_keys_fit(monkeypatch):
    case = cases.Case(shape=(1, 140, 200, 2, 1, 16), alibi=True, options=dict(is_causal=True, query_offset=[60]))
    monkeypatch.setattr(flash_bwd, "vmem_bytes", lambda operands, config, *, tiles: 0 if tiles == 1 else 1 << 40)
    gradients_agree(cases.truth_of(case, "bfloat16", seed=0))


@pytest.mark.parametrize("spec", [P("part"), P(None, None, "part")], ids=["batch", "heads"])
def test_output_and_gradients_of_two_devices_are_those_of_one(spec):
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (2, 20, 4, 16)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 20, 2, 16)) for key in keys[2:])

    def both_passes(implementation, q, k, v, d_out):
        call = functools.partial(jfa.dot_product_attention, is_causal=True, implementation=implementation)
        out, transposed = jax.vjp(call, q, k, v)
        return out, *transposed(d_out)

    mesh = Mesh(np.array(jax.devices()[:2]), ("part",))
    kernels = functools.partial(both_passes, "tpu")
    divided = jax.shard_map(kernels, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4)
    with interpreter():
        found = jax.block_until_ready(jax.jit(divided)(q, k, v, d_out))
    for got, want in zip(found, both_passes("xla", q, k, v, d_out), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_keys_of_segments_that_no_query_sees_may_be_nan():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, 20, 2, 16)), jnp.float32) for _ in range(3))
    # the last tile of queries is padded with the id 0
    ids = dict(query_segment_ids=np.full((1, 20), 1), key_value_segment_ids=np.repeat([[0, 1]], 10, axis=1))

    @jax.jit
    def gradients(k, v):
        def loss(*arrays):
            return jfa.dot_product_attention(*arrays, implementation="tpu", config=TILES, **ids).sum()

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)

    with interpreter():
        dirty = gradients(k.at[:, :10].set(jnp.nan), v.at[:, :10].set(jnp.inf))
        clean = gradients(k, v)
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


def test_gradients_are_those_of_xla_where_the_kernel_does_not_fit():
    operands = shapes(heads=(128, 8), head_dim=256)
    forward = flash.default_config(operands, V4)
    assert flash.why_not(operands, SPEC, V4) is None
    assert isinstance(backends.flash("tpu").backward_config(operands, forward, V4), BlockConfig)


def test_keys_seen_only_by_the_padding_of_a_tile_may_be_nan():
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((1, n, 2, 16)), jnp.float32) for n in (3, 20, 20))
    call = functools.partial(jfa.dot_product_attention, is_causal=True, query_offset=4, implementation="tpu")
    with interpreter():
        dirty = np.asarray(call(q, k.at[:, 7:].set(jnp.nan), v.at[:, 7:].set(jnp.inf)))
    np.testing.assert_allclose(dirty, call(q, k, v), atol=1e-6)


# Pages

QUICK_PAGES = {
    "ragged": "bfloat16",
    "odd_pages": "float32",
    "window": "bfloat16",
    "int8_odd": "bfloat16",
    "chunks_and_tokens": "bfloat16",
    "chunk_with_window": "float32",
    "chunk_with_sinks": "bfloat16",
    "chunk_fp8": "bfloat16",
    "chunk_int4": "bfloat16",
    "int8_keys_int4_values": "float32",
}


def serves(case: paged_cases.PagedCase) -> bool:
    kinds = {case.pages, case.value_pages or case.pages}
    quantized = kinds & {"int8", "fp8", "int4"}
    unpacks = "int4" not in kinds or case.page_size % 4 == 0
    return case.trees is None and "float16" not in kinds and quantized in (set(), kinds) and unpacks


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        run(name, dtype, quick=QUICK_PAGES.get(name) == dtype, soak=True)
        for name, case in paged_cases.CASES.items()
        for dtype in ("bfloat16", "float32")
        if serves(case)
    ],
)
def test_paged_attention_agrees_with_the_oracle_despite_nan_in_unused_slots(name, dtype):
    known = paged_cases.truth(name, dtype)
    options = known.options | dict(implementation="tpu", config=TILES, return_residual=True)
    agrees(known, functools.partial(getattr(jfa, known.op), **options), *known.arrays)


@pytest.mark.parametrize("ragged", [False, True], ids=["decode", "ragged"])
def test_several_blocks_of_pages_agree_with_the_oracle(ragged):
    case = paged_cases.PagedCase(
        kv_len=(300, 0, 129, 17),
        queries=(140, 0, 1, 17) if ragged else None,
        padding=3 if ragged else 0,
        heads=(4, 2),
        head_dim=64,
        page_size=16,
        sinks=True,
        options={"local_window_size": 170},
    )
    known = paged_cases.truth_of(case, "bfloat16", seed=0)
    options = known.options | dict(implementation="tpu", config=TILES, return_residual=True)
    agrees(known, functools.partial(getattr(jfa, known.op), **options), *known.arrays)


# head_dim, heads, kinds of keys and values: heads of a token begin and end within a row of 128 lanes
SIDE_BY_SIDE = {
    "64": (64, (8, 4), None, None),
    "80": (80, (8, 8), None, None),
    "96": (96, (8, 4), "int8", "int8"),
    "160": (160, (4, 4), None, None),
    "80 of int4": (80, (16, 16), "int4", "int4"),
    "80 of int4 and int8": (80, (16, 16), "int4", "int8"),
    "128 of int4": (128, (4, 2), "int4", "int4"),
}


@pytest.mark.parametrize(
    ("name", "ragged"),
    [
        run(name, ragged, quick=ragged and name in ("80", "80 of int4 and int8", "128 of int4"))
        for name in SIDE_BY_SIDE
        for ragged in (False, True)
    ],
)
def test_heads_that_share_rows_of_lanes_agree_with_the_oracle(name, ragged):
    head_dim, heads, pages, value_pages = SIDE_BY_SIDE[name]
    case = paged_cases.PagedCase(
        kv_len=(150, 0, 17),
        queries=(20, 0, 1) if ragged else None,
        heads=heads,
        head_dim=head_dim,
        page_size=16,
        pages=pages,
        value_pages=value_pages,
        sinks=True,
    )
    known = paged_cases.truth_of(case, "bfloat16", seed=0)
    options = known.options | dict(implementation="tpu", config=TILES, return_residual=True)
    agrees(known, functools.partial(getattr(jfa, known.op), **options), *known.arrays)


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize(
    ("heads", "size"), [(2, 64), (8, 16), (8, 80), (16, 40), (4, 96), (8, 96), (4, 224), (3, 128), (3, 5)]
)
def test_queries_moved_to_windows_have_the_columns_of_their_heads(heads, size, halves):
    all_heads = columns.Columns(heads * size, size, halves)
    g = 2
    q = jnp.arange(1.0, 1 + heads * g * halves * size).reshape(1, heads * g, -1)
    placed = columns.in_windows(q, all_heads)
    np.testing.assert_array_equal(columns.out_of_windows(placed, all_heads), q)
    together = np.asarray(columns.in_group(placed[0], 0, heads, all_heads)).reshape(heads, g, halves, -1)
    expected = np.zeros_like(together)
    for head in range(heads):
        expected[head, :, :, head * size : (head + 1) * size] = q.reshape(heads, g, halves, size)[head]
    np.testing.assert_array_equal(together, expected)
    apart = columns.out_of_group(jnp.asarray(together.reshape(heads * g, -1)), 0, heads, all_heads)
    np.testing.assert_array_equal(columns.out_of_windows(apart[None], all_heads), q)


# Refusals


def shapes(*, dtype="bfloat16", head_dim=128, value_head_dim=None, heads=(8, 2), tq=256, tk=256, **options):
    q, k, v = (
        jax.ShapeDtypeStruct((1, t, h, d), jnp.dtype(dtype))
        for t, h, d in ((tq, heads[0], head_dim), (tk, heads[1], head_dim), (tk, heads[1], value_head_dim or head_dim))
    )
    return Operands(q, k, v, **options)


ANY = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
UNSERVED = {
    "gpu": (shapes(), describe("rocm", "gfx942"), "Mosaic TPU kernels run on TPUs .* not on rocm"),
    "float16": (shapes(dtype="float16"), V5E, "no TPU loads float16 .*; use bfloat16"),
    "head_dim": (shapes(head_dim=300), V5E, "head_dim must be 8 to 256, got 300"),
    "value_head_dim": (shapes(value_head_dim=4), V5E, "the head_dim of value must be 8 to 256, got 4"),
    "bias": (shapes(bias=ANY), V5E, "the TPU kernel has no bias yet"),
    "mask": (shapes(mask=ANY), V5E, "the TPU kernel has no mask yet"),
    "dropout": (shapes(dropout_seed=ANY), V5E, "the TPU kernel has no dropout_rate yet"),
    "vmem": (
        shapes(heads=(2046, 31), head_dim=136),
        V4,
        "128 queries of 66 heads and 128 keys need [0-9,]+ bytes of VMEM, and a kernel gets 14,680,064 of it on v4",
    ),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_what_the_kernel_does_not_do_is_refused_with_the_reason(name):
    operands, device, message = UNSERVED[name]
    with pytest.raises(jfa.UnsupportedError, match=message):
        backends.select("tpu", operands, SPEC, device)
    if device.platform == "tpu":
        assert backends.select(None, operands, SPEC, device) == "xla"


def paged_shapes(
    *, dtype="bfloat16", pages=None, head_dim=128, heads=(8, 2), page_size=16, b=4, pages_per_seq=8, **more
):
    stored = head_dim // 2 if pages == "uint8" else head_dim
    pool = jax.ShapeDtypeStruct((64, page_size, heads[1] * stored), jnp.dtype(pages or dtype))
    scales = jax.ShapeDtypeStruct((64, page_size, heads[1]), jnp.bfloat16) if pool.dtype.itemsize == 1 else None
    return PagedOperands(
        q=jax.ShapeDtypeStruct((b, heads[0], head_dim), jnp.dtype(dtype)),
        k_pages=pool,
        v_pages=pool,
        page_table=jax.ShapeDtypeStruct((b, pages_per_seq), jnp.int32),
        kv_len=jax.ShapeDtypeStruct((b,), jnp.int32),
        k_scales=scales,
        v_scales=scales,
    )._replace(**more)


UNSERVED_PAGES = {
    "gpu": (paged_shapes(), describe("cuda", "sm_90"), "Mosaic TPU kernels run on TPUs .* not on cuda"),
    "float16": (paged_shapes(dtype="float16"), V5E, "no TPU loads float16"),
    "tree": (paged_shapes(tree_mask=ANY), V5E, "the TPU kernel has no tree_mask yet"),
    "one_quantized": (paged_shapes(v_pages=paged_shapes(pages="int8").v_pages), V5E, "both quantized, or none of them"),
    "columns": (
        paged_shapes(head_dim=80, heads=(6, 3)),
        V5E,
        r"240 columns \(3 heads of 80\), .* XLA would copy all pages .*; pad .* to a head_dim of 128, and give scale",
    ),
    "columns_of_int4": (
        paged_shapes(head_dim=80, pages="uint8"),
        V5E,
        r"80 columns \(2 heads of 80\), .* to a head_dim of 128, and give scale",
    ),
    "few_columns": (
        paged_shapes(head_dim=64, heads=(9, 3)),
        V5E,
        r"192 columns \(3 heads of 64\), .* to 4 key heads, and query heads in proportion",
    ),
    "page_size": (
        paged_shapes(page_size=12),
        V5E,
        "12 tokens are no whole tiles of 8, .*; use a page_size that",
    ),
    "page_size_int8": (paged_shapes(page_size=48, pages="int8"), V5E, "48 tokens are no whole tiles of 32,"),
    "page_size_int4": (
        paged_shapes(page_size=6, pages="uint8"),
        V5E,
        "6 tokens: 4-bit numbers are unpacked from words",
    ),
    "smem": (
        paged_shapes(b=256, pages_per_seq=1024),
        V5E,
        r"a page_table \[256, 1024\] needs 1,056,768 bytes of scalar memory, of 786,432",
    ),
    "vmem": (
        paged_shapes(heads=(64, 64), head_dim=256, page_size=256),
        V4,
        "blocks of 256 tokens with 64 key heads need [0-9,]+ bytes of VMEM",
    ),
}


@pytest.mark.parametrize("name", UNSERVED_PAGES)
def test_what_the_paged_kernel_does_not_do_is_refused_with_the_reason(name):
    operands, device, message = UNSERVED_PAGES[name]
    with pytest.raises(jfa.UnsupportedError, match=message):
        backends.select("tpu", operands, SPEC, device, table=backends.paged)
    if device.platform == "tpu":
        assert backends.select(None, operands, SPEC, device, table=backends.paged) == "xla"


def test_a_tpu_uses_the_kernels_and_xla_what_they_lack():
    told = {one.op: one for one in jfa.explain(V5E)}
    assert told["dot_product_attention"].backend == told["quantized_matmul"].backend == "tpu"
    for op in ("block_sparse_attention", "linear_attention"):
        assert told[op].backend == "xla"
        assert dict(told[op].refused)["tpu"].startswith("there is no TPU kernel for")


@pytest.mark.parametrize("field", ["block_q", "block_kv"])
@pytest.mark.parametrize("size", [64, 200])
def test_tiles_consist_of_whole_rows_of_lanes(field, size):
    with pytest.raises(ValueError, match=f"{field} must be a multiple of 128, the lanes of a register, got {size}"):
        jfa.TpuConfig(**dict(block_q=128, block_kv=128) | {field: size})


def test_tiles_that_do_not_fit_are_refused_with_the_numbers():
    x = jnp.ones((1, 2048, 4, 16))
    tiles = jfa.TpuConfig(block_q=8192, block_kv=4096)
    with pytest.raises(
        ValueError, match=r"block_q=8192 and block_kv=4096 need [0-9,]+ bytes of VMEM, and a kernel gets"
    ):
        jfa.dot_product_attention(x, x[:, :, :1], x[:, :, :1], implementation="tpu", config=tiles)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("arch", ["v4", "v5e", "v5p", "v6e", "v7x"])
def test_default_tiles_fit_into_the_vmem_of_each_chip(arch, group, head_dim):
    device = describe("tpu", arch)
    for dtype in ("bfloat16", "float32"):
        operands = shapes(dtype=dtype, head_dim=head_dim, heads=(8 * group, 8), tq=8192, tk=8192)
        if reason := flash.why_not(operands, SPEC, device):
            assert arch == "v4" or ((group, head_dim) == (16, 80) and "bytes of VMEM" in reason)
        else:
            forward = flash.default_config(operands, device)
            assert flash.vmem_bytes(operands, forward) <= tile.budget(device)
            backward = flash_bwd.default_config(operands, forward, device)
            large = (group, head_dim) == (16, 80) or (group, head_dim, dtype) == (16, 96, "float32")
            assert backward or (arch == "v4" and group > 1) or large


def test_query_heads_that_do_not_fit_together_are_computed_in_shares():
    v7x, v6e = describe("tpu", "v7x"), describe("tpu", "v6e")
    large = shapes(head_dim=80, heads=(128, 8), tq=4096, tk=4096)
    assert (shares.number(large, v7x), shares.number(large, v6e)) == (2, 1)
    assert "bytes of VMEM" in flash.why_not(large, SPEC, v7x)
    backend = backends.flash("tpu")
    assert backend.why_not(large, SPEC, v7x) is None
    forward = backend.default_config(large, v7x)
    assert isinstance(backend.backward_config(large, forward, v7x), jfa.TpuConfig)
    too_large = shapes(head_dim=80, heads=(8 * 17, 8), tq=4096, tk=4096)  # 17 query heads cannot be halved
    assert shares.number(too_large, v7x) == 1 and "17 heads" in backend.why_not(too_large, SPEC, v7x)


@pytest.mark.parametrize("name", ["sinks_and_window", "alibi_both_ways_with_soft_cap"])
def test_shares_of_query_heads_give_the_same_output_and_gradients(name, monkeypatch):
    """Every call in shares, in the interpreter."""
    monkeypatch.setattr(shares, "number", lambda operands, device: 2)
    case = cases.CASES[name]
    b, tq, tk, _, _, d = case.shape
    known = cases.truth_of(dataclasses.replace(case, shape=(b, tq, tk, 8, 2, d)), "float32", seed=0)
    options = known.options | dict(implementation="tpu", config=TILES, return_residual=True)
    agrees(known, functools.partial(jfa.dot_product_attention, **options), *poisoned(known))
    gradients_agree(known)


def test_a_tpu_does_not_round_float32_before_a_product():
    """Other tests cannot notice: a CPU never does."""
    for dtype, precision in (("float32", (jax.lax.Precision.HIGHEST,) * 2), ("bfloat16", None)):
        x = jnp.ones((128, 128), dtype)
        [product] = jax.make_jaxpr(tile.product)(x, x).eqns
        assert product.params["precision"] == precision


# head_dim, query heads per key head, block_q, block_kv: MiB that libtpu 0.0.50.1 needed on v7x, bfloat16
NEEDED = {
    (64, 16, 128, 512): 15.77,
    (80, 1, 512, 1024): 29.16,
    (80, 2, 256, 512): 20.67,
    (80, 2, 512, 1024): 49.27,
    (80, 16, 128, 128): 56.86,
    (96, 2, 512, 1024): 27.78,
    (96, 16, 128, 512): 33.73,
    (128, 2, 512, 1024): 8.42,
}
# and tiles of keys in a part
NEEDED_BACKWARD = {
    (64, 16, 128, 512, 8): 29.55,
    (80, 2, 512, 512, 2): 39.46,
    (80, 16, 128, 128, 1): 59.25,
    (96, 2, 512, 512, 4): 32.88,
    (96, 16, 128, 512, 1): 48.57,
    (128, 2, 512, 512, 8): 14.83,
}


@pytest.mark.parametrize("call", [*NEEDED, *NEEDED_BACKWARD])
def test_tiles_are_thought_to_need_at_least_what_the_compiler_needed(call):
    head_dim, group, block_q, block_kv, *tiles = call
    operands = shapes(head_dim=head_dim, heads=(8 * group, 8), tq=4096, tk=4096)
    config = jfa.TpuConfig(block_q=block_q, block_kv=block_kv)
    if tiles:
        assert flash_bwd.vmem_bytes(operands, config, tiles=tiles[0]) >= NEEDED_BACKWARD[call] * 2**20
    else:
        assert flash.vmem_bytes(operands, config) >= NEEDED[call] * 2**20


def test_the_sums_for_queries_of_divided_keys_are_thought_to_be_float32():
    config = jfa.TpuConfig(block_q=512, block_kv=512)
    whole, divided = (flash_bwd.vmem_bytes(shapes(heads=(2, 2), tq=512, tk=tk), config, tiles=1) for tk in (512, 1024))
    assert divided - whole == 2 * 512 * 128 * (4 - 2)  # two blocks
