"""`jfa-bench card` tunes in rounds from the best code outwards, and compares predictions with measurements."""

import json

import pytest

from jfa.device import describe
from jfa_bench.card import page, tuning
from jfa_bench.proof import compilers, ops, tune
from jfa_bench.records import record

KEY = tuning.Key(kernel="flash_attention", dtype="bfloat16", head_dim=128)


def candidate(block_q):
    """A compile record."""
    config = dict(block_q=block_q, block_kv=32, num_warps=4, num_stages=1)
    figures = dict(vgpr=100, vgpr_spills=0, lds_bytes=16_384, waves_per_simd=2, matrix_bound=0.75, flop_per_cycle=384.0)
    return dict(arch="gfx942", dtype="bfloat16", head_dim=128, config=config) | figures


CANDIDATES = [candidate(16 * n) for n in range(1, 11)]  # ten: the last round has two


@pytest.fixture
def card(monkeypatch):
    """A fake gfx942 on which a tile takes as many milliseconds as `times` says; returns what was measured."""
    asked = []

    def offline(op, arch, compile):
        assert (op.kernel, op.dtypes, op.head_dims, op.sweep.alike) == ("flash_attention", ("bfloat16",), (128,), {})
        choice = tune.Choice(chosen=CANDIDATES[0], note=None, candidates=CANDIDATES, compiled=20)
        return {("bfloat16", 128): choice}

    def measure_here(cases, *, samples):
        rows = [dict(case.config)["block_q"] for case in cases]
        asked.append(rows)
        return {case: abs(block_q - 96) + 1.0 for case, block_q in zip(cases, rows, strict=True) if block_q != 32}

    monkeypatch.setattr(tune, "offline", offline)
    monkeypatch.setattr(tune, "measure_here", measure_here)
    monkeypatch.setattr(tune, "probe", lambda: describe("rocm", "gfx942"))
    monkeypatch.setattr(compilers, "name", lambda arch: "triton 3.9.0")
    monkeypatch.setattr(compilers, "chosen", lambda arch: "triton")
    return asked


def tuned(rounds):
    """The records of an entry's first rounds; a record is JSON between two of them, as in a folder."""
    records = list(tuning.compile_candidates(KEY, "gfx942"))
    for turn in range(rounds):
        records = json.loads(json.dumps(records))
        records += tuning.measure(KEY, turn, records, samples=2)
    return records


def test_each_round_compares_the_next_candidates_with_the_first_and_the_fastest(card):
    *_, one, two, three = tuned(3)
    assert card == [[16, 32, 48, 64], [16, 64, 80, 96, 112, 128], [16, 96, 144, 160]]
    assert [dict(found["candidate"]["config"])["block_q"] for found in (one, two, three)] == [64, 96, 96]
    assert [found["measured"] for found in (one, two, three)] == [4, 8, 10]
    assert (three["time_ms"], three["first_ms"], three["first"]) == (1.0, 81.0, CANDIDATES[0]["config"])
    assert len(one["times"]) == 3  # one of the four did not run
    assert one["case"] == {"kernel": "flash_attention", "dtype": "bfloat16", "head_dim": 128}


def test_a_round_without_candidates_measures_nothing(card, monkeypatch):
    monkeypatch.setattr(tune, "MEASURED", 4)
    records = tuned(2)
    assert card == [[16, 32, 48, 64]] and len(records) == 2


def test_an_entry_whose_candidates_were_not_compiled_is_refused(card):
    with pytest.raises(ValueError, match="its candidates were not compiled"):
        list(tuning.measure(KEY, 0, [], samples=2))


def test_the_tables_have_what_was_measured_so_far(card, tmp_path):
    tuning.write(tmp_path, "gfx942", [])
    assert not list(tmp_path.iterdir())
    for rounds, block_q in ((1, 64), (2, 96)):
        tuning.write(tmp_path, "gfx942", tuned(rounds))
        [file] = tmp_path.rglob("*.json")
        assert file == tmp_path / "gfx942" / "flash_attention.json"
        table = json.loads(file.read_text())
        assert (table["op"], table["arch"]) == ("flash_attention", "gfx942")
        assert "the fastest median of up to 12 configurations with the best code from triton 3.9.0" in table["source"]
        [entry] = [one for rows in table["configs"].values() for one in rows.values()]
        assert entry["config"]["block_q"] == block_q and entry["time_ms"] > 0 and entry["matrix_bound"] == 0.75
        assert entry["measured"] == 4 * rounds and [*table["configs"]] == ["bfloat16"]


def test_every_entry_of_every_table_is_tuned_most_used_first():
    keys = list(tuning.keys())
    flat = [(key.kernel, key.dtype, key.head_dim) for group in keys for key in group]
    assert len(flat) == len(set(flat))
    assert set(flat) == {(op.kernel, dtype, d) for op in ops.TUNED for dtype in op.dtypes for d in op.head_dims}
    assert [(group[0].dtype, group[0].head_dim) for group in keys[:4]] == [
        *(("bfloat16", 128), ("float16", 128), ("bfloat16 on int8", 128), ("bfloat16", 64))
    ]


def test_a_machine_that_cannot_tune_has_a_reason(card, monkeypatch):
    assert tuning.why_not() is None
    monkeypatch.setattr(tune, "probe", lambda: describe("rocm", "gfx803"))
    assert "not for gfx803" in tuning.why_not()

    def missing(arch):
        raise RuntimeError("the package triton is not installed")

    monkeypatch.setattr(tune, "probe", lambda: describe("rocm", "gfx942"))
    monkeypatch.setattr(compilers, "chosen", missing)
    assert tuning.why_not() == "the package triton is not installed"


def attention(direction, length, share, *, backend="triton", **more):
    case = dict(batch=1, length=length, head_dim=128, dtype="float16", direction=direction)
    config = {"backend": backend}
    return dict(benchmark="attention", status="ok", case=case, config=config, share_of_peak=share) | more


def paged(kv_dtype, batch, share):
    case = dict(batch=batch, context=1024, head_dim=128, dtype="bfloat16", kv_dtype=kv_dtype)
    return dict(benchmark="paged", status="ok", case=case, config={"backend": "triton"}, share_of_peak=share)


def test_the_page_compares_what_was_predicted_with_what_was_measured():
    records = [
        attention("forward", 4096, 0.5),
        attention("forward", 256, 0.1),
        attention("forward", 8192, 0.9, backend="xla"),
        attention("forward", 8192, None, status="oom"),
        attention("backward", 4096, 0.25),
        paged("same", 8, 0.75),
        paged("same", 1, 0.5),
        paged("int8", 8, 0.625),
    ]
    rows = list(page._bounds("gfx942", records))
    assert [(row["kernel"], row["dtype"], row["measured"], row["where"]) for row in rows] == [
        ("flash_attention", "f16", "50%", "1 x 4,096 tokens"),
        ("flash_attention_dq", "f16", "25%", "1 x 4,096 tokens"),
        ("flash_attention_dkv", "f16", "25%", "1 x 4,096 tokens"),
        ("paged_decode_attention", "bf16", "75%", "8 x 1,024 tokens"),
        ("paged_decode_attention", "bf16 on int8", "62%", "8 x 1,024 tokens"),
    ]
    assert [row["bound"] for row in rows] == ["matrix"] * 3 + ["memory"] * 2
    [op] = (op for op in ops.OPS if op.kernel == "flash_attention")
    assert rows[0]["predicted"] == record.percent(page._entries(op, "gfx942")["float16"]["128"]["matrix_bound"])
    assert {row["predicted"] for row in page._bounds("gfx803", records)} == {None}  # an architecture without tables


def test_the_page_shows_the_tiles_that_were_predicted_and_the_fastest(card):
    heading, table, _ = page._tuned(tuned(2))
    assert heading == "## Tuning"
    cells = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert cells == ["flash_attention", "bf16", "128", "16x32 4w 1s", "81", "96x32 4w 1s", "1", "8"]
