"""The information about a device that jfa.explain returns and `jfa info` prints."""

import pytest

import jfa
from jfa.device import describe

TILES = {
    ("rocm", "gfx942"): "tuning table of gfx942",
    ("rocm", "gfx1151"): "tuning table of gfx1100",
    ("cuda", "sm_89"): "tuning table of sm_80",
    ("rocm", "gfx1300"): "safe defaults: there is no tuning table for gfx1300; create one with jfa-bench tune",
    ("cpu", "cpu"): "defaults",
}


@pytest.mark.parametrize("device", TILES, ids="-".join)
def test_the_source_of_the_tile_sizes(device):
    told, *others = jfa.explain(describe(*device))
    assert told.tiles == TILES[device]
    assert [one.op for one in (told, *others)] == [
        "dot_product_attention",
        "paged_decode_attention",
        "ragged_paged_attention",
        "block_sparse_attention",
        "quantized_matmul",
        "linear_attention",
    ]
    assert {one.backend for one in (told, *others)} == {"xla" if device[0] == "cpu" else "triton"}
    assert all(len(one.refused) == 4 for one in (told, *others))


def test_paged_ops_have_separate_tuning_tables():
    tiles = {one.op: one.tiles for one in jfa.explain(describe("cuda", "sm_90"))}
    assert tiles["dot_product_attention"] == "tuning table of sm_90"
    assert tiles["paged_decode_attention"].startswith("safe defaults: there is no tuning table for sm_90")
