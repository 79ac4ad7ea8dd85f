"""`jfa-bench compile` and `prove` for TPUs: records, refusals, and broken kernels that the proofs notice."""

import dataclasses
import json
import re
import threading

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from runs import run

import jfa
from jfa.kernels.tpu import flash, flash_bwd, paged, tile
from jfa.kernels.tpu._pallas import pltpu
from jfa_bench import cli, names
from jfa_bench.proof import beside, by_libtpu, compile, compilers, pool, proofs, prove
from jfa_bench.records import report
from jfa_bench.truth import cases, paged_cases

needs_libtpu = pytest.mark.skipif(by_libtpu.why_not() is not None, reason=by_libtpu.why_not() or "")
CASE = compile.Case(kernel="flash_attention", dtype="bfloat16", head_dim=128, arch="v5e")
TILES = jfa.TpuConfig(block_q=128, block_kv=128)


# Compiling


@needs_libtpu
def test_a_record_has_the_vmem_the_copies_and_the_loop_of_a_kernel():
    record = compile.compile_case(CASE)
    assert (record["status"], record["reason"], record["compiler"]) == ("ok", None, "libtpu")
    assert set(by_libtpu.FIELDS) <= set(record)
    assert 2**20 < record["vmem_bytes"] < record["vmem_limit"] == 96 * 2**20
    assert record["hbm_bytes"] > 20 * 2**20 and record["flops"] > 2**34
    json.dumps(record)
    assert "| v5e  | bf16  | 128 |" in compile.render([record], "md")


@needs_libtpu
def test_a_call_that_the_kernel_refuses_is_an_unsupported_row():
    record = compile.compile_case(dataclasses.replace(CASE, dtype="float16"))
    assert record["status"] == "unsupported" and "no TPU loads float16" in record["reason"]
    assert set(by_libtpu.FIELDS) <= set(record)


def test_tpus_have_rows_for_the_kernels_that_they_have():
    assert {row.kernel for row in compile.cases(names.TPU_ARCHS)} == set(names.TPU_KERNELS)


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(by_libtpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'which is not installed: pip install "jfa\[tpu-aot\]"'):
        compilers.chosen("v5e")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("compile", ["--arch", "v9"], "unknown architecture 'v9'; use one of gfx90a, .* v5e, v6e, v7x, or all"),
        ("compile", ["--arch", "v5e", "--model", "llama-3-8b"], "--model knows no TPUs yet, got v5e"),
        ("compile", ["--arch", "v5e,gfx942", "--peers"], "--peers compares kernels for TPUs, got gfx942"),
        ("compile", ["--arch", "v5e", "--model", "llama-3-8b", "--peers"], "--peers cannot be combined with --model"),
        ("prove", ["--arch", "v5e"], "unknown architecture 'v5e'; use one of gfx942, .* tpu, or all"),
        ("prove", ["--arch", "tpu", "--model"], "--model knows no TPUs yet, got tpu"),
    ],
)
def test_what_the_commands_refuse(command, arguments, message):
    found = CliRunner().invoke(getattr(cli.proof, f"{command}_command"), arguments)
    assert found.exit_code == 2 and re.search(message, " ".join(found.output.split()))


def test_libtpu_is_the_only_compiler_for_tpus():
    with pytest.raises(ValueError, match="compiler must be xla or None for v5e, got 'triton'"):
        compilers.chosen("v5e", "triton")


# Proofs

PAGES = paged_cases.PagedCase(kv_len=(150, 40), heads=(4, 2), head_dim=16, page_size=16)


@pytest.fixture
def broken(monkeypatch):
    """Replaces an attribute; JAX forgets the programs that it traced before and with it."""

    def replace(place, name, value):
        jax.clear_caches()
        monkeypatch.setattr(place, name, value)

    yield replace
    jax.clear_caches()


def proven(case=PAGES):
    if isinstance(case, cases.Case):
        truth = cases.truth_of(case, "bfloat16", seed=0)
        truth.options["config"] = TILES
        return proofs.interpreted(proofs.forward_check(truth, "tpu"))
    truth = paged_cases.truth_of(case, "bfloat16", seed=0)
    truth.options["config"] = TILES
    return proofs.interpreted(proofs.paged_check(truth, "tpu"))


def test_a_row_has_the_cases_that_were_proven_and_those_that_were_refused():
    row = prove.Row(
        op="paged_decode_attention", direction="forward", arch="tpu", dtype="bfloat16", head_dim=None, quick=True
    )
    record = prove.prove_row(row)
    assert (record["status"], record["races"], record["compiler"]) == ("ok", 0, "interpreter")
    assert record["cases"] == ["window", "int8_odd"] and record["refused"] == []
    assert 0 < record["worst_error_of_limit"] < 1


def test_only_what_tpus_have_is_proven():
    rows = prove.rows(["tpu"], names.OPS, names.DIRECTIONS)
    assert {(row.op, row.direction) for row in rows} == {names.KERNELS[name] for name in names.TPU_KERNELS}
    assert not any("float16" in row.dtype.replace("bfloat16", "") or "uint8" in row.dtype for row in rows)


def test_a_missing_wait_is_noticed(broken):
    broken(paged._Copies, "wait", lambda *place: None)
    assert proven().wrong


def test_an_off_by_one_page_is_noticed(broken):
    whole = paged._Tiles.of.__func__
    broken(paged._Tiles, "of", classmethod(lambda cls, *call: (t := whole(cls, *call))._replace(row=1 - t.row)))
    assert "NaN" in proven().wrong


def test_a_bfloat16_accumulator_is_noticed(broken):
    whole = tile.add_to_softmax

    def rounded(m_ref, l_ref, acc_ref, *rest):
        whole(m_ref, l_ref, acc_ref, *rest)
        acc_ref[...] = acc_ref[...].astype(jnp.bfloat16).astype(jnp.float32)

    broken(tile, "add_to_softmax", rounded)
    case = cases.Case(shape=(1, 8, 2048, 1, 1, 64))
    truth = cases.truth_of(case, "float32", seed=0)
    truth.options["config"] = TILES
    assert proofs.interpreted(proofs.forward_check(truth, "tpu")).wrong


def gradients_proven():
    """The verdict on gradients of two tiles of queries and of keys."""
    case = cases.Case(shape=(1, 140, 140, 1, 1, 16), options=dict(is_causal=True))
    truth = cases.truth_of(case, "float32", seed=0)
    truth.options["config"] = TILES
    return proofs.interpreted(proofs.backward_check(truth, "tpu"))


def in_bfloat16(*call, **options):
    return _product(*call, **options).astype(jnp.bfloat16).astype(jnp.float32)


def next_tile(grid, span, step):
    return jax.lax.rem(_fetched(grid, span, step) + 1, grid.num_kv_tiles)


def without_delta(*call):
    d_out, lse, delta, d_sinks = _row_terms(*call)
    return d_out, lse, jnp.zeros_like(delta), d_sinks


_product, _fetched, _row_terms = tile.product, flash.Grid.fetched, flash_bwd.row_terms
BACKWARD_MUTANTS = {
    "sums_in_bfloat16": (tile, "product", in_bfloat16),
    "no_mask": (flash.Grid, "visible", lambda *call, **options: []),
    "wrong_tile": (flash.Grid, "fetched", next_tile),
    "no_delta": (flash_bwd, "row_terms", without_delta),
    "sums_start_with_anything": (flash_bwd, "_clear", lambda *call: None),
}


@pytest.mark.parametrize(
    "name", [run(name, quick=name in ("no_mask", "sums_start_with_anything"), soak=True) for name in BACKWARD_MUTANTS]
)
def test_a_broken_backward_pass_is_noticed(broken, name):
    broken(*BACKWARD_MUTANTS[name])
    assert gradients_proven().wrong


@pytest.mark.soak
@pytest.mark.exhaustive
def test_the_whole_backward_pass_is_not_refused():
    assert gradients_proven().wrong is None


def wait_for_ever(row):
    threading.Event().wait()


def test_a_row_that_never_ends_is_told():
    row = prove.rows(["tpu"], ["flash_attention"], ["backward"])[0]
    [record] = pool.each(wait_for_ever, [row], lost=prove._lost, doing="", processes=1, limit_s=lambda row: 0.1)
    assert (record["status"], record["reason"]) == ("wrong", "the row took more than 0.1 s")
    assert (record["op"], record["direction"], record["dtype"]) == ("flash_attention", "backward", "bfloat16")


def test_the_interpreter_works_after_an_error(broken):
    assert proven().wrong is None
    pltpu.reset_tpu_interpret_mode_state()


# Beside JAX's own kernels


@needs_libtpu
def test_a_call_has_a_row_of_each_kernel_with_its_words():
    wanted = [row for row in beside.rows(["v5e"]) if row.call == "decode, 64 rows"]
    records = [beside.compile_row(row) for row in wanted]
    assert [(one["implementation"], one["status"]) for one in records] == [("jfa", "ok"), ("paged_attention", "ok")]
    assert all(one["words"] > 0 and one["copies"] is not None for one in records)
    ours, theirs = report.beside(records).splitlines()[2:]
    assert "| jfa |" in ours and "| 1.00 |" in ours and "| paged_attention |" in theirs


def test_tiles_of_a_causal_head_are_counted_by_their_masks():
    # rows of tiles see 1, 1, 2 and 2 tiles of keys, the last of which has masked scores
    assert beside._tiles(2048, 512, 1024) == (2, 4)


def test_a_failed_row_has_no_figures():
    row = beside._lost(beside.rows(["v5e"])[0], "crashed")
    assert report.beside([row]).splitlines()[2].startswith("| v5e | flash, forward, 4,096 tokens | jfa | failed |")
