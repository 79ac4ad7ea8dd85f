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
from jfa.kernels.tpu import columns, flash, flash_bwd, paged, products, tile
from jfa.kernels.tpu._pallas import pltpu
from jfa_bench import cli, configs, names
from jfa_bench.proof import beside, by_libtpu, compile, compilers, model, pool, proofs, prove, steps
from jfa_bench.records import report
from jfa_bench.truth import cases, paged_cases, product_cases

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
        (
            "compile",
            ["--arch", "v5e", "--model", "phi-2", "--step", "train"],
            "unknown step 'train'; use one of decode,",
        ),
        (
            "compile",
            ["--arch", "v5e", "--model", "llama-3-8b", "--devices", "8", "--mesh", "tensor=3"],
            "--mesh tensor=3 is not of 8 devices: see --devices and --hosts",
        ),
        (
            "compile",
            ["--arch", "v5e", "--model", "phi-2", "--hosts", "2"],
            "--hosts is of GPUs, got v5e: a slice of TPUs has --devices",
        ),
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


# Whole steps

TINY = steps.Row(model="tiny", step="decode", arch="v5e", batch=2, context=256, devices=2)


@pytest.fixture
def tiny(monkeypatch):
    """A model of one layer by the name of TINY."""
    config = dataclasses.replace(model.MODELS["llama"], head_dim=128, hidden_size=256, num_layers=1)
    monkeypatch.setattr(configs, "config_of", lambda name, layers=None: config)


@needs_libtpu
@pytest.mark.parametrize("cache", ["contiguous", "paged"])
def test_a_step_of_a_model_over_two_chips(tiny, cache):
    row = dataclasses.replace(TINY, cache=cache)
    record = steps.compile_row(row)
    assert (record["status"], record["reason"], record["compiler"]) == ("ok", None, "libtpu")
    [kernel] = record["kernels"]
    op, name = {
        "contiguous": ("attention", "flash_attention"),
        "paged": ("paged_attention", "paged_decode_attention"),
    }[cache]
    assert record["backends"][op] == ("tpu",) and (kernel["name"], kernel["count"]) == (name, 1)
    # a sum of the embedding, and two of each layer
    [one] = record["collectives"]
    assert (one["kind"], one["count"]) == ("all-reduce", 3)
    assert record["in_place"] and record["cache_copies"] == 0
    assert record["cache_bytes"] < record["device_bytes"] < 2**22
    json.dumps(record)
    told = steps.render([record], "md")
    assert "| v5e  | 2       | tiny  | decode |" in told and "; 3 all-reduce of bf16[2,1,256]" in told


@needs_libtpu
def test_a_slice_that_does_not_exist_is_a_failed_row(tiny):
    record = steps.compile_row(dataclasses.replace(TINY, devices=3))
    assert record["status"] == "failed" and record["reason"].startswith("a slice of v5e has 1, 2, 4, 8, 16, 32, 64 dev")
    assert "v5e tiny decode: failed: a slice of v5e" in steps.render([record], "md")


PROGRAM = """HloModule jit_step

%fused_computation (param_0: bf16[2,256,1,128]) -> bf16[2,256,1,128] {
  %param_0 = bf16[2,256,1,128]{3,2,1,0:T(2,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[2,256,1,128]{1,3,2,0:T(8,128)(2,1)} copy(%param_0)
}

ENTRY %main (k: bf16[2,256,1,128]) -> bf16[2,256,1,128] {
  %k = bf16[2,256,1,128]{3,1,2,0:T(8,128)} parameter(0)
  %begun = (bf16[2,256,1,128]{3,1,2,0:T(8,128)S(1)}, bf16[2,256,1,128]{3,1,2,0:T(8,128)}, u32[]) copy-start(%k)
  %done = bf16[2,256,1,128]{3,1,2,0:T(8,128)S(1)} copy-done(%begun)
  %paged.3 = f32[2,8]{1,0} custom-call(%done), custom_call_target="tpu_custom_call", metadata={op_name="jfa.pages.tpu"}
  %copy.2 = bf16[65536]{0:T(1024)} copy(%done)
  %small = bf16[2,256]{1,0} copy(%done)
  ROOT %fusion = bf16[2,256,1,128]{3,1,2,0} fusion(%k), kind=kLoop, calls=%fused_computation
}
"""


def test_copies_of_the_cache_are_told_from_moves_to_vmem():
    step = by_libtpu.Step.of(PROGRAM, {})
    assert step.copies_of({("bf16", 2 * 256 * 128)}) == (1, 1)
    assert step.copies_of({("s8", 2 * 256 * 128)}) == (0, 0)
    assert step.backends == {"pages": ("tpu",)}
    assert step.kernels() == [dict(name="paged", operands=("bf16[2,256,1,128]",), results=("f32[2,8]",), count=1)]


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
    assert not any("float16" in row.dtype.replace("bfloat16", "") for row in rows)
    of_four_bits = {row.op for row in rows if "uint8" in row.dtype}
    products, paged_ops = (
        ("quantized_matmul_few_rows", "quantized_matmul"),
        ("paged_decode_attention", "ragged_paged_attention"),
    )
    assert of_four_bits == {*products, *paged_ops}


def test_a_missing_wait_is_noticed(broken):
    broken(paged._Copies, "wait", lambda *place: None)
    assert proven().wrong


def test_an_off_by_one_page_is_noticed(broken):
    whole = paged._Tiles.of.__func__
    broken(paged._Tiles, "of", classmethod(lambda cls, *call: (t := whole(cls, *call))._replace(row=1 - t.row)))
    assert "NaN" in proven().wrong


ONE_QUERY = paged_cases.PagedCase(kv_len=(40,), heads=(16, 16), head_dim=80, page_size=16, pages="int4")
MANY_QUERIES = dataclasses.replace(ONE_QUERY, queries=(20,), heads=(8, 8), pages="int8")
_levels, _scales = paged._doubled_levels, paged._scales

WRONG_HEADS = {
    "narrow_windows_of_all": (MANY_QUERIES, columns.Columns, "needs_less", lambda of, head: head >= 0),
    "queries_not_moved": (MANY_QUERIES, columns.Columns, "offsets", lambda of, hq: [0] * hq),
    "scales_of_others": (MANY_QUERIES, paged, "_scales", lambda *call: jnp.roll(_scales(*call), 1, axis=2)),
    "groups": (ONE_QUERY, columns.Columns, "slabs", lambda of, group, heads: {0: (0, heads - 1)}),
    "levels": (ONE_QUERY, paged, "_doubled_levels", lambda words, dtype: _levels(words, dtype) + 1),
}


@pytest.mark.parametrize("name", WRONG_HEADS)
def test_a_head_read_in_the_wrong_place_is_noticed(broken, name):
    case, *change = WRONG_HEADS[name]
    broken(*change)
    assert proven(case).wrong


@pytest.mark.parametrize("case", [ONE_QUERY, MANY_QUERIES])
def test_heads_read_in_the_right_place_are_not_refused(case):
    assert not proven(case).wrong


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


def product_proven():
    """The verdict on a product of several groups and steps, with zero points."""
    case = product_cases.ProductCase(rows=2, out=20, width=2048, kind="int4", group_size=128, zeros=True)
    truth = product_cases.truth_of(case, "float32", seed=0)
    truth.options["config"] = jfa.TpuProductConfig(block_rows=16, block_out=128, block_in=256)
    return proofs.interpreted(proofs.product_check(truth, "tpu"))


def next_scales(x, weight, first, *rest):
    return _of_piece(x, weight, first + 1, *rest)


def without_zeros(*call):
    scales, offsets = _of_groups(*call)
    return scales, jnp.zeros_like(offsets)


def low_halves_twice(*call):
    for piece, weight in _numbers(*call):
        low = weight[:, : weight.shape[1] // 2]
        yield piece, jnp.concatenate([low, low], axis=1)


_of_piece, _of_groups, _numbers = products._of_piece, products._of_groups, products._numbers
PRODUCT_MUTANTS = {
    "sums_in_bfloat16": (products, "_of_piece", lambda *call: _of_piece(*call).astype(jnp.bfloat16).astype("float32")),
    "wrong_groups_scale": (products, "_of_piece", next_scales),
    "no_zero_point": (products, "_of_groups", without_zeros),
    "low_halves_twice": (products, "_numbers", low_halves_twice),
}


@pytest.mark.parametrize("name", [run(name, quick=name != "low_halves_twice") for name in PRODUCT_MUTANTS])
def test_a_broken_product_is_noticed(broken, name):
    broken(*PRODUCT_MUTANTS[name])
    assert product_proven().wrong


def test_the_whole_product_is_not_refused():
    assert product_proven().wrong is None


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
