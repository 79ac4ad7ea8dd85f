"""What paged attention refuses, and with which message; and the number of splits of a row's keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jfa
from jfa import checks
from jfa.device import describe
from jfa.kernels.triton import paged
from jfa.types import AttentionSpec, PagedOperands

Q = np.ones((2, 6, 16), np.float32)
PAGES = np.ones((5, 4, 3, 16), np.float32)
SIDE_BY_SIDE = PAGES.reshape(5, 4, 48)
INT8 = np.ones((5, 4, 3, 16), np.int8)
INT4 = np.ones((5, 4, 3, 8), np.uint8)
SCALES = np.ones((5, 4, 3), np.float32)
CALL = dict(
    query=Q,
    key_pages=PAGES,
    value_pages=PAGES,
    page_table=np.ones((2, 2), np.int32),
    kv_len=np.array([3, 5]),
)
QUANTIZED = dict(key_pages=INT8, value_pages=INT8, key_scales=SCALES, value_scales=SCALES)
TILES = dict(block_q=16, block_kv=16, num_warps=4, num_stages=1)
SPEC = AttentionSpec(sm_scale=1.0, causal=True)

WRONG = {  # name: (arguments, message); of both ops
    "query_rank": (dict(query=Q[0]), r"query must be \[queries, heads, head_dim\], got shape \(6, 16\)"),
    "query_dtype": (dict(query=Q.astype(np.int32)), "query must be float16, bfloat16 or float32, got int32; cast it"),
    "key_rank": (
        dict(key_pages=PAGES[0, 0]),
        r"key_pages must be \[num_pages, page_size, heads \* head_dim\] or .*heads, head_dim\], got shape \(3, 16\)",
    ),
    "value_rank": (dict(value_pages=PAGES[None]), r"value_pages must be .*head_dim\], got shape \(1, 5, 4, 3, 16\)"),
    "key_columns": (
        dict(key_pages=SIDE_BY_SIDE[..., :40]),
        "key_pages must have the heads of a token side by side, 16 columns each for a query of head_dim 16, got 40 "
        "columns of float32",
    ),
    "key_columns_of_int4": (
        QUANTIZED | dict(query=Q[..., :15], key_pages=INT4.reshape(5, 4, -1), value_pages=INT4),
        "side by side, 7 columns each for a query of head_dim 15, got 24 columns of uint8",
    ),
    "no_key_columns": (dict(query=Q[..., :0], key_pages=SIDE_BY_SIDE), "0 columns each .* got 48 columns of float32"),
    "value_columns": (
        dict(key_pages=SIDE_BY_SIDE, value_pages=SIDE_BY_SIDE[..., :40]),
        "value_pages must have the 3 heads of a token side by side, as key_pages has, got 40 columns",
    ),
    "heads_of_values": (
        dict(key_pages=SIDE_BY_SIDE, value_pages=PAGES[:, :, :1]),
        r"same shape except for the head_dim, got \(5, 4, 3, 16\) and \(5, 4, 1, 16\)",
    ),
    "empty_page": (dict(key_pages=PAGES[:, :0]), r"key_pages must have .* one token, got shape \(5, 0, 3, 16\)"),
    "page_shapes": (
        dict(value_pages=PAGES[:4]),
        r"same shape except for the head_dim, got \(5, 4, 3, 16\) and \(4, 4, 3, 16\)",
    ),
    "page_dtype": (
        dict(key_pages=INT8.astype(np.int16), value_pages=INT8.astype(np.int16)),
        r"pages must be float16, bfloat16 or float32, or quantized; quantized numbers are stored as int8 \(int8\), "
        r"float8_e4m3fn \(fp8\), uint8 \(int4\); got int16",
    ),
    "e5m2": (dict(value_pages=PAGES.astype(jnp.float8_e5m2)), "float8_e4m3fn .* got float8_e5m2"),
    "no_key_scales": (
        QUANTIZED | dict(key_scales=None),
        "key_scales: pages of dtype int8 need scales, got None",
    ),
    "no_value_scales": (
        QUANTIZED | dict(value_scales=None),
        "value_scales: pages of dtype int8 need scales, got None",
    ),
    "scales_of_floats": (
        dict(key_scales=SCALES),
        "key_scales: pages of dtype float32 have no scales; pass None",
    ),
    "scales_of_quantized_values_only": (
        dict(value_pages=INT8),
        "value_scales: pages of dtype int8 need scales, got None",
    ),
    "value_scales_of_floats": (dict(value_scales=SCALES), "value_scales: pages of dtype float32 have no scales"),
    "scale_dtype": (
        QUANTIZED | dict(key_scales=SCALES.astype(np.int32)),
        "key_scales must be float16, bfloat16 or float32, got int32",
    ),
    "scale_shape": (
        QUANTIZED | dict(value_scales=SCALES[..., None]),
        r"value_scales must contain one scale per page, token and head, shape \(5, 4, 3\), got \(5, 4, 3, 1\)",
    ),
    "head_dim": (dict(query=Q[..., :8]), r"same head_dim, at least 1, got 8 and 16 \(value_pages: 16\)"),
    "head_dim_of_int4": (
        QUANTIZED | dict(query=Q[..., :8], key_pages=INT4, value_pages=INT4),
        r"same head_dim, at least 1, got 8 and 16 \(value_pages: 8\)",
    ),
    "no_head_dim": (
        dict(query=Q[..., :0], key_pages=PAGES[..., :0]),
        r"same head_dim, at least 1, got 0 and 0 \(value_pages: 16\)",
    ),
    "no_value_head_dim": (dict(value_pages=PAGES[..., :0]), r"at least 1, got 16 and 16 \(value_pages: 0\)"),
    "heads": (dict(query=Q[:, :4]), "query heads must be a multiple of the number of key heads, got 4 and 3"),
    "no_key_heads": (dict(key_pages=PAGES[:, :, :0], value_pages=PAGES[:, :, :0]), "of key heads, got 6 and 0"),
    "table_rank": (
        dict(page_table=np.ones(2, np.int32)),
        r"page_table must be an integer array \[rows, pages per row\], got int32 of shape \(2,\)",
    ),
    "table_dtype": (
        dict(page_table=np.ones((2, 2), np.float32)),
        r"page_table must be an integer array \[rows, pages per row\], got float32 of shape \(2, 2\)",
    ),
    "lengths_shape": (
        dict(kv_len=np.array([3])),
        r"kv_len must contain one integer per batch row, shape \(2,\), got \(1,\)",
    ),
    "lengths_dtype": (dict(kv_len=np.array([3.0, 5.0], np.float32)), "kv_len must contain integers, got float32"),
    "sinks": (
        dict(sinks=np.ones(3, np.float32)),
        r"sinks must contain one number per query head, shape \(6,\), got \(3,\)",
    ),
    "window": (dict(local_window_size=-1), r"both must be >= 0, or None for all .* got \(-1, -1\)"),
    "scale": (dict(scale=float("inf")), "scale must be a finite number, got inf"),
    "soft_cap": (dict(logits_soft_cap=-1.0), r"logits_soft_cap must be a finite number > 0, got -1\.0"),
    "implementation": (dict(implementation="cudnn"), "one of reference, xla, triton, tpu, mosaic_gpu, got 'cudnn'"),
    "config_of_flash": (
        dict(implementation="triton", config=jfa.FlashConfig(**TILES)),
        "the triton backend takes a PagedConfig, got a FlashConfig",
    ),
    "config_of_triton": (
        dict(implementation="xla", config=jfa.PagedConfig(**TILES)),
        "the xla backend takes a BlockConfig, got a PagedConfig",
    ),
    "config_of_reference": (
        dict(implementation="reference", config=jfa.PagedConfig(**TILES)),
        "the reference backend takes no config, got a PagedConfig",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_both_ops_refuse_invalid_arguments(name):
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        jfa.paged_decode_attention(**(CALL | given))
    with pytest.raises(ValueError, match=message):
        jfa.ragged_paged_attention(**(CALL | dict(query_start=np.array([0, 1, 2])) | given))


def test_decode_needs_one_query_per_row():
    message = "one token for each row of page_table, got 3 for 2 rows; use ragged_paged_attention for other"
    with pytest.raises(ValueError, match=message):
        jfa.paged_decode_attention(**(CALL | dict(query=np.ones((3, 6, 16), np.float32))))


@pytest.mark.parametrize(
    ("query_start", "message"),
    [
        (np.array([0, 2]), r"query_start must contain one integer per batch row, shape \(3,\), got \(2,\)"),
        (np.array([0.0, 1.0, 2.0], np.float32), "query_start must contain integers, got float32"),
    ],
    ids=["shape", "dtype"],
)
def test_ragged_refuses_an_invalid_query_start(query_start, message):
    with pytest.raises(ValueError, match=message):
        jfa.ragged_paged_attention(**CALL, query_start=query_start)


@pytest.mark.parametrize(
    ("tree_mask", "message"),
    [
        (np.ones((2, 3), np.uint32), "tree_mask must be boolean, got uint32; unpack bits before the call"),
        (
            np.ones((3, 3), bool),
            r"tree_mask must be \[queries, new tokens .*\] = \[2, at least 1\], got shape \(3, 3\)",
        ),
        (np.ones((2, 0), bool), r"= \[2, at least 1\], got shape \(2, 0\)"),
        (np.ones(2, bool), r"= \[2, at least 1\], got shape \(2,\)"),
    ],
    ids=["dtype", "rows", "columns", "rank"],
)
def test_ragged_refuses_an_invalid_tree_mask(tree_mask, message):
    with pytest.raises(ValueError, match=message):
        jfa.ragged_paged_attention(**CALL, query_start=np.array([0, 1, 2]), tree_mask=tree_mask)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            dict(implementation="tpu", query=Q[..., :4], key_pages=PAGES[..., :4]),
            "implementation='tpu': head_dim must be 8 to 256, got 4; leave it None to let jfa choose",
        ),
        (
            dict(implementation="mosaic_gpu"),
            "implementation='mosaic_gpu': the Mosaic GPU kernel is not implemented yet",
        ),
        (
            dict(implementation="triton", query=Q[..., :8], key_pages=PAGES[..., :8]),
            "implementation='triton': head_dim must be 16 to 256, got 8; leave it None to let jfa choose",
        ),
    ],
    ids=["tpu", "mosaic_gpu", "triton"],
)
def test_a_requested_backend_that_does_not_support_the_call_says_why(given, message):
    with pytest.raises(jfa.UnsupportedError, match=message):
        jfa.paged_decode_attention(**(CALL | given))


def test_calls_that_triton_refuses_run_if_jfa_chooses():
    out = jax.eval_shape(
        lambda: jfa.paged_decode_attention(**(CALL | dict(query=Q[..., :8], key_pages=PAGES[..., :8])))
    )
    assert out.shape == (2, 6, 16)


# Values in the arrays

VALUES = dict(page_table=[[1, 2], [3, 0]], kv_len=[7, 4], num_pages=4, page_size=4, query_start=[0, 3, 5])

WRONG_VALUES = {
    "kv_len_beyond_capacity": (
        dict(kv_len=[7, 9]),
        "row 1: kv_len must be 0 to 8, its page table's capacity, got 9",
    ),
    "negative_kv_len": (dict(kv_len=[-1, 4]), "row 0: kv_len must be 0 to 8, its page table's capacity, got -1"),
    "null_page": (
        dict(kv_len=[7, 5]),
        "row 1: entry 1 of its page table, for the tokens from 4 on, is page 0; pages must be 1 to 3",
    ),
    "page_past_the_pool": (
        dict(page_table=[[1, 4], [3, 0]]),
        "row 0: entry 1 of its page table, for the tokens from 4 on, is page 4; pages must be 1 to 3",
    ),
    "negative_page": (
        dict(page_table=[[1, 2], [-1, 0]]),
        "row 1: entry 0 of its page table, for the tokens from 0 on, is page -1; pages",
    ),
    "falling_start": (dict(query_start=[0, 3, 2]), "row 1: query_start must not decrease, got 2 after 3"),
    "negative_start": (
        dict(query_start=[-2, 1, 2]),
        "query_start must begin with 0, the first query of row 0, got -2",
    ),
    "more_queries_than_tokens": (
        dict(query_start=[0, 2, 7]),
        "row 1: it has 5 queries but kv_len, which includes them, is only 4",
    ),
    "child_before_parent": (
        dict(tree_mask=[[0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 0, 0]]),
        "row 0: the last token that new token 1 sees must be itself, but by tree_mask it is 2; order a tree so",
    ),
    "token_that_does_not_see_itself": (
        dict(tree_mask=[[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]),
        "row 1: the last token that new token 1 sees must be itself, but by tree_mask it is 0",
    ),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_invalid_values_are_reported_with_their_row(name):
    given, message = WRONG_VALUES[name]
    with pytest.raises(ValueError, match=message):
        checks.paged_values(**{key: np.asarray(value) for key, value in (VALUES | given).items()})


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(query_start=None),
        dict(query_start=[0, 0, 0]),
        dict(kv_len=[8, 0], page_table=[[1, 2], [0, 0]], query_start=[0, 8, 8]),
        dict(tree_mask=[[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0], [0, 0, 0]]),
        dict(kv_len=[4, 4], page_table=[[1, 99], [3, -5]]),  # entries after the last token are not checked
        dict(kv_len=jnp.array([7, 4]), page_table=jnp.array([[1, 2], [3, 0]])),
        dict(kv_len=np.zeros(0, int), page_table=np.zeros((0, 2), int), query_start=[0]),
        dict(kv_len=[0, 0], page_table=np.zeros((2, 0), int), query_start=None),
    ],
    ids=["plain", "decode", "no_queries", "whole_row", "tree", "unused_places", "arrays", "no_rows", "no_pages"],
)
def test_valid_values_pass(changed):
    checks.paged_values(**(VALUES | changed))


# Configurations


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_splits=0), "num_splits must be >= 1, or None to choose automatically, got 0"),
        (dict(block_q=48), "block_q must be a power of two of at least 16, .* got 48"),
        (dict(block_kv=8), "block_kv must be a power of two of at least 16, .* got 8"),
        (dict(num_warps=3), "num_warps must be 1, 2, 4, 8 or 16, got 3"),
    ],
)
def test_invalid_tiles(fields, message):
    with pytest.raises(ValueError, match=message):
        jfa.PagedConfig(**(TILES | fields))


# The Triton kernel

H100, A100, MI300 = describe("cuda", "sm_90"), describe("cuda", "sm_80"), describe("rocm", "gfx942")


def operands(*, dtype="bfloat16", pages=None, head_dim=64, value_head_dim=None, heads=(8, 2), b=4, num_pages=100,
             page_size=16, pages_per_seq=64, queries=None, tree=None):  # fmt: skip
    """Shapes of a call; queries: the total number of the ragged op; tree: columns of its tree mask."""
    sizes = [head_dim, value_head_dim or head_dim]
    stored = jnp.dtype({"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}.get(pages, pages or dtype))
    if pages == "int4":
        sizes = [size // 2 for size in sizes]
    k, v = (jax.ShapeDtypeStruct((num_pages, page_size, heads[1] * size), stored) for size in sizes)
    scales = jax.ShapeDtypeStruct((num_pages, page_size, heads[1]), jnp.bfloat16) if stored.itemsize == 1 else None
    return PagedOperands(
        q=jax.ShapeDtypeStruct((b if queries is None else queries, heads[0], head_dim), jnp.dtype(dtype)),
        k_pages=k,
        v_pages=v,
        page_table=jax.ShapeDtypeStruct((b, pages_per_seq), jnp.int32),
        kv_len=jax.ShapeDtypeStruct((b,), jnp.int32),
        query_start=None if queries is None else jax.ShapeDtypeStruct((b + 1,), jnp.int32),
        k_scales=scales,
        v_scales=scales,
        tree_mask=None if tree is None else jax.ShapeDtypeStruct((queries, tree), jnp.bool_),
    )


GIB = 2**30 // (16 * 2 * 64)  # number of pages in one GiB, with one byte per element
TOO_LARGE = "_pages of 2 to 4 GiB with a one-byte dtype; use fewer pages"
UNSERVED = {
    "tpu": ({}, describe("tpu", "TPU v5e"), "Triton kernels run on AMD and NVIDIA GPUs .* not on tpu"),
    "head_dim_300": (dict(head_dim=300), H100, "^head_dim must be 16 to 256, got 300"),
    "head_dim_8": (dict(head_dim=8), MI300, "^head_dim must be 16 to 256, got 8"),
    "value_head_dim": (dict(value_head_dim=300), H100, "^the head_dim of value must be 16 to 256, got 300"),
    "head_dim_of_int4": (dict(pages="int4", head_dim=300), H100, "^head_dim must be 16 to 256, got 300"),
    "value_head_dim_of_int4": (
        dict(pages="int4", value_head_dim=260),
        H100,
        "^the head_dim of value must be 16 to 256, got 260",
    ),
    "group": (dict(heads=(65, 1)), MI300, "at most 64 query heads may share a key head, got 65"),
    "tree": (dict(queries=8, tree=129), MI300, "a tree may have at most 128 new tokens, got a tree_mask for 129"),
    "two_gib_of_int8": (dict(pages="int8", num_pages=2 * GIB), MI300, "key" + TOO_LARGE),
    "four_gib_of_fp8": (dict(pages="fp8", num_pages=4 * GIB), H100, "key" + TOO_LARGE),
    "three_gib_of_int4": (dict(pages="int4", num_pages=6 * GIB), H100, "key" + TOO_LARGE),
    "values_alone": (
        dict(pages="int8", head_dim=32, value_head_dim=64, num_pages=3 * GIB),
        H100,
        "value" + TOO_LARGE,
    ),
}
SERVED = {
    "plain": ({}, H100),
    "ragged": (dict(queries=77), MI300),
    "cpu": ({}, describe("cpu", "cpu")),
    "head_dim_16": (dict(head_dim=16), H100),
    "head_dim_256": (dict(head_dim=256), MI300),
    "head_dim_16_of_int4": (dict(pages="int4", head_dim=16), H100),
    "head_dim_256_of_int4": (dict(pages="int4", head_dim=256), MI300),
    "group": (dict(heads=(64, 1)), MI300),
    "fp8_to_float16": (dict(pages="fp8", dtype="float16"), A100),
    "fp8_to_float32": (dict(pages="fp8", dtype="float32"), A100),
    "fp8_to_bfloat16": (dict(pages="fp8"), H100),
    "fp8_to_bfloat16_on_amd": (dict(pages="fp8"), MI300),
    "int8_to_bfloat16": (dict(pages="int8"), A100),
    "less_than_two_gib": (dict(pages="int8", num_pages=2 * GIB - 1), H100),
    "more_than_four_gib": (dict(pages="int8", num_pages=4 * GIB + 1), H100),
    "four_gib_of_bfloat16": (dict(num_pages=2 * GIB), H100),
}


@pytest.mark.parametrize("name", UNSERVED)
def test_why_not_states_what_the_triton_kernel_does_not_support(name):
    shapes, device, message = UNSERVED[name]
    reason = paged.why_not(operands(**shapes), SPEC, device)
    with pytest.raises(jfa.UnsupportedError, match=message):
        raise jfa.UnsupportedError(reason)


@pytest.mark.parametrize("name", SERVED)
def test_the_triton_kernel_supports_the_limits_themselves(name):
    shapes, device = SERVED[name]
    assert paged.why_not(operands(**shapes), SPEC, device) is None


# Splits of a row's keys

CONFIG = jfa.PagedConfig(**TILES)


def splits(device=MI300, config=CONFIG, **shapes):
    return paged.num_splits(operands(**(dict(pages_per_seq=4096) | shapes)), config, device)


def test_ragged_calls_split_no_row():
    assert splits(queries=9, b=1) == 1


def test_num_splits_of_the_config_takes_precedence():
    for shapes in (dict(b=1), dict(b=500), dict(b=1, pages_per_seq=1), dict(queries=9)):
        assert splits(config=dataclasses.replace(CONFIG, num_splits=7), **shapes) == 7


def test_more_compute_units_and_fewer_warps_split_more():
    found = [splits(describe("cuda", "sm_90", units), b=2) for units in (1, 16, 64, 256)]
    assert found == sorted(set(found)) and found[0] == 1
    assert splits(config=dataclasses.replace(CONFIG, num_warps=1)) > splits()


def test_more_rows_and_key_heads_split_less():
    found = [splits(b=b) for b in (1, 4, 16, 64, 2000)]
    assert found == sorted(set(found), reverse=True) and found[-1] == 1
    assert splits(heads=(8, 8)) < splits(heads=(8, 2))


@pytest.mark.parametrize("pages_per_seq", [0, 1, 15, 16, 48, 100])
def test_no_split_is_shorter_than_256_keys(pages_per_seq):
    found = splits(describe("rocm", "gfx942", 10_000), b=1, pages_per_seq=pages_per_seq)
    assert found == max(1, pages_per_seq * 16 // 256)


def test_a_call_without_rows_has_one_split():
    assert splits(b=0) >= 1
