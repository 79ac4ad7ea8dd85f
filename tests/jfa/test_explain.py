"""What jfa.explain, and with it `jfa info`, says of a device."""

import pytest

import jfa
from jfa.device import describe

TILES = {
    ("rocm", "gfx942"): "tuning table of gfx942",
    ("rocm", "gfx1151"): "tuning table of gfx1100",
    ("cuda", "sm_89"): "tuning table of sm_80",
    ("rocm", "gfx1300"): "safe defaults, since no tuning table is for gfx1300; jfa-bench tune makes one",
    ("cpu", "cpu"): "defaults",
}


@pytest.mark.parametrize("device", TILES, ids="-".join)
def test_where_the_tiles_come_from(device):
    [told] = jfa.explain(describe(*device))
    assert told.tiles == TILES[device]
    assert told.backend == ("xla" if device[0] == "cpu" else "triton")
