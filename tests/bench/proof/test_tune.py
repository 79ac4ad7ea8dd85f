"""`jfa-bench tune`: the rule by which a configuration is chosen, with a fake compiler, and the tables it writes."""

import collections
import dataclasses
import json
import sys

import click
import jax
import jax.numpy as jnp
import pytest

import jfa
from jfa import tuning
from jfa.device import describe
from jfa_bench import cli, names
from jfa_bench.proof import aot, compile, compilers, machine_code, ops, tune
from jfa_models.cli import run

OP = ops.OPS[0]


def keys(op):
    """The keys of the entries in a table of the op."""
    return {(dtype, head_dim) for dtype in op.dtypes for head_dim in op.head_dims}


TILE = ("block_q", "block_kv", "num_warps", "num_stages")


def row(arch="gfx942", tile=(128, 32, 4, 1), status=None, dtype="bfloat16", head_dim=64, more=(), **figures):
    """A compile record that meets the criteria. more: fields of its configuration; figures: other fields."""
    config = dict(zip(TILE, tile, strict=True)) | dict(more)
    base = dict(vgpr=100, vgpr_spills=0, lds_bytes=16_384, lds_limit=65_536, waves_per_simd=2, flop_per_cycle=100.0)
    record = dict.fromkeys(machine_code.FIELDS) | base | dict(loop_cycles={}, matrix_bound=0.5) | figures
    spills = record["vgpr_spills"]
    reason = f"{spills} registers are spilled to memory" if spills else None
    told = dict(status=status or ("spills" if spills else "ok"), reason=reason)
    return dict(arch=arch, dtype=dtype, head_dim=head_dim, config=config) | told | record


def first(*records):
    """The tile that is chosen from these records."""
    return tuple(next(tune.ranked(records))["config"].values())


SMALL, LARGE, OTHER = (64, 32, 4, 1), (128, 32, 4, 1), (128, 64, 8, 1)


def test_the_most_flop_per_cycle_wins():
    assert first(row(tile=LARGE), row(tile=SMALL, flop_per_cycle=110.0)) == SMALL


@pytest.mark.parametrize(
    "lacking",
    [
        dict(waves_per_simd=1),
        dict(vgpr_spills=3, loop_cycles={"scratch": 4}),
        dict(vgpr_spills=1, loop_cycles={}),
        dict(status="over_lds", lds_bytes=70_000),
        dict(status="failed", vgpr=None, lds_bytes=None, flop_per_cycle=None),
    ],
)
def test_a_candidate_that_misses_a_criterion_loses(lacking):
    assert first(row(tile=LARGE, **{"flop_per_cycle": 500.0} | lacking), row(tile=SMALL)) == SMALL


def test_a_single_wave_counts_half_compared_with_spilling_candidates():
    alone = row(tile=SMALL, waves_per_simd=1)
    assert first(row(tile=LARGE, vgpr_spills=6, flop_per_cycle=80.0), alone) == SMALL
    assert first(row(tile=LARGE, vgpr_spills=6, flop_per_cycle=90.0), alone) == LARGE
    assert first(row(tile=LARGE, flop_per_cycle=40.0), alone) == LARGE  # two waves, and nothing spilled


def test_of_equal_candidates_the_larger_tile_wins_unless_only_one_workgroup_fits():
    assert first(row(tile=SMALL, flop_per_cycle=101.0), row(tile=LARGE)) == LARGE
    # eight waves of one workgroup, which all wait at its barriers
    assert first(row(tile=OTHER, flop_per_cycle=102.0), row(tile=SMALL)) == SMALL
    assert first(row(tile=OTHER, flop_per_cycle=110.0), row(tile=SMALL)) == OTHER


def test_the_order_of_the_records_does_not_matter():
    tiles = [(q, kv, w, s) for q in (64, 128) for kv in (32, 64) for w in (4, 8) for s in (1, 2)]
    records = [row(tile=tile, flop_per_cycle=100.0 + i % 5) for i, tile in enumerate(tiles)]
    assert list(tune.ranked(records)) == list(tune.ranked(reversed(records)))


def test_if_no_candidate_meets_the_criteria_the_least_bad_comes_first():
    def bad(tile, spills, flop, **figures):
        return row(tile=tile, vgpr_spills=spills, loop_cycles={"scratch": 8}, flop_per_cycle=flop, **figures)

    assert first(bad(SMALL, 200, 100.0), bad(LARGE, 400, 120.0)) == LARGE
    assert first(bad(SMALL, 200, 100.0), bad(LARGE, 501, 120.0)) == SMALL  # spills cost more than the loop shows
    assert first(bad(SMALL, 200, 150.0, waves_per_simd=1), bad(LARGE, 200, 100.0)) == LARGE
    assert first(bad(SMALL, 70, 80.0), row(tile=LARGE, waves_per_simd=1)) == LARGE
    assert first(bad(SMALL, 70, 90.0), row(tile=LARGE, waves_per_simd=1)) == SMALL
    assert first(bad(SMALL, 200, 90.0), row(tile=LARGE, waves_per_simd=1)) == LARGE


NVIDIA = dict(arch="sm_90", waves_per_simd=None, flop_per_cycle=None, loop_cycles=None, lds_limit=232_448, vgpr=128)


def test_nvidia_uses_the_largest_tile_with_eight_resident_warps():
    assert first(row(tile=SMALL, **NVIDIA), row(tile=LARGE, **NVIDIA)) == LARGE
    assert first(row(tile=SMALL, **NVIDIA), row(tile=LARGE, **NVIDIA | dict(vgpr_spills=1))) == SMALL
    # 168 registers of 128 threads: three workgroups, 12 warps; 130,000 bytes of shared memory: one, 4 warps
    assert first(row(tile=SMALL, **NVIDIA), row(tile=LARGE, **NVIDIA | dict(lds_bytes=130_000))) == SMALL
    assert first(row(tile=(128, 128, 8, 2), **NVIDIA), row(tile=(256, 128, 8, 2), **NVIDIA)) == (128, 128, 8, 2)


def test_nvidia_uses_more_stages_if_as_many_warps_are_resident():
    two, three = (128, 64, 8, 2), (128, 64, 8, 3)
    assert first(row(tile=two, **NVIDIA), row(tile=three, **NVIDIA)) == three
    assert first(row(tile=two, **NVIDIA), row(tile=three, **NVIDIA | dict(lds_bytes=120_000))) == two


def test_a_table_fits_similar_architectures_with_less_shared_memory():
    ampere = NVIDIA | dict(arch="sm_80", lds_limit=166_912)
    limit = describe("cuda", "sm_86").lds_bytes
    assert first(row(tile=OTHER, **ampere | dict(lds_bytes=limit + 1)), row(tile=SMALL, **ampere)) == SMALL
    assert first(row(tile=OTHER, **ampere | dict(lds_bytes=limit)), row(tile=SMALL, **ampere)) == OTHER


def test_tiles_of_which_xla_makes_wrong_code_are_left_out(monkeypatch):
    def best(case, config):
        return dict(flop_per_cycle=900.0) if (config["block_q"], config["block_kv"]) == (128, 32) else {}

    assert tune.offline(OP, "gfx942", Paper(best))["bfloat16", 64].chosen["config"]["block_kv"] == 32
    monkeypatch.setitem(ops.MISCOMPILED, ("gfx942", OP.kernel), (dict(block_q=128, block_kv=32, num_warps=4),))
    choice = tune.offline(OP, "gfx942", Paper(best))["bfloat16", 64]
    assert choice.chosen["config"]["block_kv"] != 32
    assert all((one["config"]["block_q"], one["config"]["block_kv"]) != (128, 32) for one in choice.candidates)


class Paper:
    """A fake compiler that computes figures from a configuration and records its calls."""

    def __init__(self, figures=lambda case, config: {}):
        self.figures, self.asked = figures, []

    def __call__(self, cases, **_):
        self.asked += cases
        return [self.record(case) for case in cases]

    def record(self, case):
        config = dict(case.config)
        blocks = [config[name] for name in compile.BLOCKS if name in config]
        amd = case.arch.startswith("gfx")
        lds = blocks[0] * min(case.head_dim, 256) * 2
        lanes = 64 if amd else 32
        vgpr = case.op.sweep.registers(config, case.head_dim, lanes) * 1.2
        figures = dict(vgpr=round(vgpr), vgpr_spills=max(0, round(vgpr) - 255), lds_bytes=lds)
        rows = max(blocks)
        figures |= dict(flop_per_cycle=rows / (64 + rows) * 512) if amd else {}
        figures |= self.figures(case, config)
        limits = dict(lds_limit=aot.device(case.arch).lds_bytes)
        shared = NVIDIA if case.arch.startswith("sm") else {}
        known = dict(dtype=case.dtype, head_dim=case.head_dim, arch=case.arch)
        own = {name: value for name, value in config.items() if name in (*compile.BLOCKS, *TILE) or value}
        return row(**shared | figures | limits | known) | dict(config=own)


@pytest.mark.parametrize("op", ops.TUNED, ids=lambda op: op.kernel)
@pytest.mark.parametrize("arch", names.ARCHS)
def test_a_sweep_finds_an_entry_for_every_dtype_and_head_dim(arch, op):
    choices = tune.offline(op, arch, Paper())
    assert set(choices) == keys(op)
    for choice in choices.values():
        op.config_type(**choice.chosen["config"])
        assert choice.note is None and choice.compiled >= len(choice.candidates) >= 3


@pytest.mark.parametrize(
    ("figures", "sizes"),
    [
        (dict(), [16, 32, 64, 128]),
        (dict(vgpr_spills=3), [16, 32, 64]),
        (dict(waves_per_simd=1), [16, 32, 64]),
        (dict(status="over_lds"), [16, 32, 64]),
        (dict(flop_per_cycle=50.0), [16, 32, 64]),
    ],
)
def test_a_tile_grows_until_the_result_gets_worse(figures, sizes):
    paper = Paper(lambda case, config: dict(flop_per_cycle=100.0) | (figures if config["block_kv"] >= 64 else {}))
    tune.offline(OP, "gfx942", paper)
    start = {name: values[0] for name, values in OP.sweep.late("gfx942", "bfloat16").items()}
    rows = collections.defaultdict(list)
    for case in paper.asked:
        config = dict(case.config)
        if case.dtype == "bfloat16" and start.items() <= config.items() and not case.variant:
            rows[case.head_dim, config["block_q"], config["num_warps"]].append(config["block_kv"])
    assert len(rows) == sum(len(OP.sweep.starts("gfx942", "bfloat16", head_dim)) for head_dim in OP.head_dims)
    assert all(grown == sizes for grown in rows.values())


def test_tiles_that_must_spill_are_not_compiled(monkeypatch):
    monkeypatch.setattr(tune, "LANE_REGISTERS", 150)
    paper = Paper()
    tune.offline(OP, "gfx942", paper)
    wide = [case for case in paper.asked if (case.dtype, case.head_dim) == ("bfloat16", 128)]
    assert {dict(case.config)["block_kv"] for case in wide} == {16, 32, 64}
    assert all(OP.sweep.registers(dict(case.config), case.head_dim, 64) <= 150 for case in paper.asked)


def test_switches_are_tried_one_at_a_time_on_the_best():
    paper = Paper(lambda case, config: dict(flop_per_cycle=500.0) if config.get("round_half_up") else {})
    choices = tune.offline(OP, "gfx950", paper)
    assert OP.sweep.late("gfx950", "bfloat16") == dict(num_stages=(1,), round_half_up=(False, True))
    asked = [
        dict(case.config)
        for case in paper.asked
        if (case.dtype, case.head_dim) == ("bfloat16", 128) and not case.variant
    ]
    tried = collections.Counter(config.get("round_half_up", False) for config in asked)
    assert tried == {False: 8, True: tune.LATE}
    chosen = {key: choice.chosen["config"].get("round_half_up") for key, choice in choices.items()}
    assert chosen["bfloat16", 64] and not chosen["float16", 64]


def test_a_similar_dtype_tries_its_own_switches_on_the_best_of_the_other():
    decode = next(op for op in ops.OPS if op.kernel == "paged_decode_attention")
    paper = Paper(lambda case, config: dict(flop_per_cycle=500.0) if config.get("fp8_by_bits") else {})
    choices = tune.offline(decode, "gfx1201", paper)
    asked = [dict(case.config) for case in paper.asked if case.dtype == "float16 on float8_e4m3fn" and not case.variant]
    assert collections.Counter(config["fp8_by_bits"] for config in asked) == {True: 9, False: 9}  # 3 head_dims
    assert choices["float16 on float8_e4m3fn", 64].chosen["config"]["fp8_by_bits"]
    assert "fp8_by_bits" not in choices["float16 on int8", 64].chosen["config"]


def test_of_equal_tiles_the_one_with_fewer_issue_cycles_wins():
    slow = row(tile=LARGE, loop_cycles={"vector": 300, "lds": 100})
    fast = row(tile=LARGE, loop_cycles={"vector": 280, "lds": 100}, more={"round_half_up": True})
    assert next(tune.ranked([slow, fast])) == fast and next(tune.ranked([fast, slow])) == fast


def test_a_similar_dtype_tries_the_best_of_the_other_without_unused_switches():
    paper = Paper()
    choices = tune.offline(OP, "gfx942", paper)
    for head_dim in OP.head_dims:
        known = (tune.given(OP.config_type, one["config"]) for one in choices["bfloat16", head_dim].candidates)
        best = []
        for config in known:
            config.pop("round_half_up", None)
            best += [] if config in best else [config]
        asked = [
            dict(case.config)
            for case in paper.asked
            if (case.dtype, case.head_dim) == ("float16", head_dim) and not case.variant
        ]
        assert asked == best[: tune.ALIKE] and choices["float16", head_dim].compiled == tune.ALIKE


def test_a_winner_that_a_variant_makes_spill_is_passed_over():
    winner = tune.offline(OP, "gfx942", Paper())["bfloat16", 64].chosen

    def fragile(case, config):
        return dict(vgpr_spills=40) if case.variant == "padded head_dim" and config == winner["config"] else {}

    careful = tune.offline(OP, "gfx942", Paper(fragile))["bfloat16", 64]
    assert careful.note is None and careful.candidates[0] == winner and careful.chosen == careful.candidates[1]


def test_a_variant_may_spill_if_the_call_itself_spills():
    def spills(case, config):
        return dict(vgpr_spills=20 if case.variant else 10 * (config["block_q"] == 128), flop_per_cycle=512.0)

    fragile = tune.offline(OP, "gfx942", Paper(spills))["bfloat16", 64]
    assert fragile.note is not None and not fragile.chosen["vgpr_spills"]
    everywhere = Paper(lambda case, config: dict(vgpr_spills=20 if case.variant else 10))
    assert tune.offline(OP, "gfx942", everywhere)["bfloat16", 64].note.startswith("no configuration meets the criteria")


def test_the_note_of_an_entry_names_the_unmet_criteria():
    spills = Paper(lambda case, config: dict(vgpr_spills=50, loop_cycles={"scratch": 4}))
    note = "no configuration meets the criteria; the least bad: 50 registers are spilled to memory"
    assert tune.offline(OP, "gfx942", spills)["float32", 64].note == note
    fragile = Paper(lambda case, config: dict(waves_per_simd=1) if case.variant else {})
    note = "spills or loses a wave with a window, lengths or a padded head_dim"
    assert tune.offline(OP, "gfx942", fragile)["float32", 64].note == note


def test_an_architecture_that_nothing_fits_is_an_error():
    with pytest.raises(ValueError, match="no configuration of flash_attention fits gfx942 at bfloat16, head_dim 64"):
        tune.offline(OP, "gfx942", Paper(lambda case, config: dict(status="over_lds")))


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs the command with a fake compiler and returns (exit status, stdout, stderr)."""
    monkeypatch.setattr(tune, "compile_all", Paper())
    monkeypatch.setattr(compilers, "chosen", lambda arch, compiler=None: "triton")
    monkeypatch.setattr(compilers, "versions", lambda: {"triton": "3.9.0"})
    monkeypatch.setattr(compilers, "unmet", lambda used: None)
    group = click.Group("jfa-bench", commands=[cli.proof.tune_command])

    def run_it(*arguments):
        monkeypatch.setattr(sys, "argv", ["jfa-bench", "tune", *map(str, arguments)])
        return run(group, "jfa-bench"), *capsys.readouterr()

    return run_it


def test_tables_are_written_identically_and_read_back(bench, tmp_path, monkeypatch):
    for folder in ("one", "two"):
        status, out, err = bench("--offline", "--arch", "gfx942,sm_100", "--folder", tmp_path / folder)
        assert status == 0 and err.count("wrote ") == 2 * len(ops.TUNED) and "| gfx942" in out and "| sm_100" in out
    for arch in ("gfx942", "sm_100"):
        for op in ops.TUNED:
            one, two = ((tmp_path / folder / arch / f"{op.kernel}.json").read_text() for folder in ("one", "two"))
            assert one == two
            table = json.loads(one)
            assert (table["op"], table["arch"]) == (op.kernel, arch)
            assert table["source"].startswith("Compiled offline with triton 3.9.0, not measured: of the configurations")
            assert {(dtype, int(d)) for dtype, rows in table["configs"].items() for d in rows} == keys(op)
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    (tmp_path / "one").rename(tmp_path / "tuning_tables")
    tuning._table.cache_clear()
    for op in (op for op in ops.TUNED if op.head_dims == names.HEAD_DIMS):
        found = tuning.flash_config("gfx942", dtype="bfloat16", head_dim=128, kernel=op.kernel)
        text = (tmp_path / "tuning_tables" / "gfx942" / f"{op.kernel}.json").read_text()
        assert found == jfa.FlashConfig(**json.loads(text)["configs"]["bfloat16"]["128"]["config"])
    tuning._table.cache_clear()


def test_without_write_or_folder_nothing_is_written(bench, monkeypatch):
    monkeypatch.setattr(tune, "resources_folder", lambda: pytest.fail("no write was requested"))
    status, out, err = bench("--offline", "--arch", "gfx1100", "-o", "json")
    records = json.loads(out)
    assert (status, err, len(records)) == (0, "", sum(len(keys(op)) for op in ops.TUNED))
    assert {record["arch"] for record in records} == {"gfx1100"} and all(record["before"] for record in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no GPU to measure on (this machine's device: cpu); tune from compiled code instead: --offline"),
        (["--arch", "gfx942"], "there is no GPU to measure on"),
        (["--offline"], "--offline needs --arch: one or more of gfx90a, gfx942"),
        (["--offline", "--arch", "gfx9"], "unknown architecture 'gfx9'; use one of gfx90a"),
        (["--offline", "--arch", "all", "--op", "linear_attention"], "unknown op 'linear_attention'; use one of flash"),
        (["--offline", "--arch", "all", "--op", "conv"], "unknown op 'conv'; use one of flash_attention"),
        (["--offline", "--arch", "all", "--write", "--folder", "x"], "--write and --folder cannot be combined"),
    ],
)
def test_user_errors_are_one_line_and_exit_status_2(bench, monkeypatch, arguments, message):
    monkeypatch.setattr(tune, "probe", lambda: describe("cpu", "cpu"))
    status, out, err = bench(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("jfa-bench: ") and err.count("\n") == 1 and message in err


def test_on_a_device_the_fastest_candidate_wins_and_the_table_has_its_source(bench, monkeypatch, tmp_path):
    """A fake GPU of an architecture without a table: the candidates are those of a similar architecture."""
    monkeypatch.setattr(tune, "probe", lambda: describe("rocm", "gfx1101"))
    slow = []

    def measure(cases, *, samples):
        assert samples == 5 and len(cases) <= tune.MEASURED and {case.arch for case in cases} == {"gfx1100"}
        slow.append(cases[0])
        return {case: 1.0 if case == cases[2] else 2.0 for case in cases}

    monkeypatch.setattr(tune, "measure_here", measure)
    status, out, err = bench("--folder", tmp_path, "--samples", 5, "-o", "json")
    assert status == 0 and "wrote " in err
    table = json.loads((tmp_path / "gfx1101" / "flash_attention.json").read_text())
    assert table["arch"] == "gfx1101"
    told = table["source"]
    assert told.startswith("Measured on ") and f"with jax {jax.__version__}" in told and "(gfx1101) on 20" in told
    entry = table["configs"]["bfloat16"]["64"]
    assert entry["time_ms"] == 1.0 and entry["config"] != dict(slow[0].config)
    assert {record["time_ms"] for record in json.loads(out)} == {1.0}


def test_arch_is_refused_when_measuring_on_the_device(bench, monkeypatch):
    monkeypatch.setattr(tune, "probe", lambda: describe("rocm", "gfx942"))
    assert "--arch needs --offline; without it this machine's gfx942 is measured" in bench("--arch", "gfx942")[2]
    monkeypatch.setattr(tune, "probe", lambda: describe("rocm", "gfx803"))
    assert "not for gfx803" in bench()[2]


def test_cases_are_measured_interleaved_and_failing_ones_are_skipped(monkeypatch, capsys):
    def call(dtype, head_dim, config, variant):
        def fn(x):
            if config.block_kv == 128:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory\nmore")
            return jnp.sin(x) * config.block_q

        return fn, (jax.ShapeDtypeStruct((4, head_dim), dtype),)

    monkeypatch.setattr(compile, "OPS", (dataclasses.replace(OP, call=call),))  # of Case.op
    cases = [
        compile.Case(kernel=OP.kernel, dtype="bfloat16", head_dim=64, arch="sm_90", config=tuple(config.items()))
        for config in (dict(block_q=64, block_kv=n, num_warps=4, num_stages=1) for n in (16, 32, 128))
    ]
    taken = tune.measure_here(cases, samples=2)
    assert set(taken) == set(cases[:2]) and min(taken.values()) > 0
    assert capsys.readouterr().err == "note: 64x128 4w 1s does not run: RESOURCE_EXHAUSTED: shared memory\n"


@pytest.mark.parametrize("kernel", [op.kernel for op in ops.ON_GPUS if op.sweep is not None])
def test_a_measured_call_runs_no_other_kernel(kernel):
    """A configuration of dq would otherwise be timed together with dkv in the same, unsuitable, configuration."""
    [op] = (op for op in ops.OPS if op.kernel == kernel)
    fn, shapes = op.call(op.dtypes[0], op.head_dims[0], None, "")
    first, *others = [one.name for one in aot.lower(lambda *args: op.own_results(fn(*args)), *shapes, arch="gfx942")]
    assert first == kernel
    assert others == (["split_kv_merge"] if kernel == "paged_decode_attention" else [])  # a part of the call's time


@pytest.mark.parametrize("dtype", ["bfloat16", "float16 on int8", "bfloat16 on float8_e4m3fn", "bfloat16 on uint8"])
def test_pages_are_filled_with_whole_rows(monkeypatch, dtype):
    monkeypatch.setattr(ops, "_PAGED_BATCH", 3)
    monkeypatch.setattr(ops, "_PAGED_CAPACITY", 64)
    for ragged in (False, True):
        shapes = ops._paged_operands(dtype, 64, ragged=ragged)
        [found] = ops.filled((shapes,))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
        assert sorted(found.page_table.ravel().tolist()) == list(range(1, 13)) and found.kv_len.tolist() == [64] * 3
        assert found.query_start is None if not ragged else found.query_start.tolist() == [0, 64, 128, 192]
