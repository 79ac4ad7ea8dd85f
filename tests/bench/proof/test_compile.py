"""`jfa-bench compile`: its rows, their records, and what is refused."""

import json
import os
import sys

import click
import pytest
from compiled import needs_compiler, needs_triton

import jfa
from jfa_bench import cli, names
from jfa_bench.proof import aot, by_triton, by_xla, compile, compilers, machine_code, ops
from jfa_bench.proof.compile import Case, compile_all, compile_case
from jfa_models.cli import run

pytestmark = needs_compiler

FIELDS = {  # of docs/proofs.md
    *("op", "direction", "dtype", "head_dim", "arch", "config", "vgpr", "vgpr_spills", "scratch_bytes", "lds_bytes"),
    *("lds_limit", "waves_per_simd", "matrix_instructions", "loop_cycles", "useful_matrix_cycles", "matrix_bound"),
}


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs the command and returns (exit status, stdout, stderr)."""
    group = click.Group("jfa-bench", commands=[cli.proof.compile_command])

    def run_it(*arguments):
        monkeypatch.setattr(sys, "argv", ["jfa-bench", *map(str, arguments)])
        return run(group, "jfa-bench"), *capsys.readouterr()

    return run_it


def case(arch="gfx942", dtype="bfloat16", head_dim=64, **config):
    config = config and dict(block_q=64, block_kv=16, num_warps=4, num_stages=1) | config
    given = tuple(config.items()) or None
    return Case(kernel="flash_attention", dtype=dtype, head_dim=head_dim, arch=arch, config=given)


WITH_HEADS = [op for op in ops.ON_GPUS if op.head_dims == names.HEAD_DIMS]  # the others are products


@pytest.fixture(scope="module")
def records():
    """The records of an ordinary row, on AMD and NVIDIA."""
    return {arch: compile_case(case(arch)) for arch in ("gfx942", "sm_90")}


def test_the_table_has_a_row_for_every_kernel_dtype_head_dim_and_architecture():
    rows = compile.cases(names.ARCHS)
    assert (
        len(rows)
        == len(set(rows))
        == sum(len(names.ARCHS) * len(op.dtypes) * len((*op.head_dims, *op.between)) for op in ops.ON_GPUS)
    )
    assert {row.kernel for row in rows} >= {"flash_attention", "flash_attention_dq", "flash_attention_dkv"}
    few = compile.cases(["gfx942"], dtypes=["float16"], head_dims=[64, 128])
    assert {(row.arch, row.dtype, row.head_dim) for row in few} == {("gfx942", "float16", d) for d in (64, 128)}


@pytest.mark.parametrize("arch", ["gfx942", "sm_90"])
def test_a_record_has_the_case_and_its_result(records, arch):
    record = records[arch]
    assert set(record) >= FIELDS | set(machine_code.FIELDS) | {"status", "reason", "seconds"}
    assert (record["benchmark"], record["op"], record["direction"]) == ("compile", "flash_attention", "forward")
    assert (record["arch"], record["dtype"], record["head_dim"]) == (arch, "bfloat16", 64)
    assert (record["status"], record["reason"], record["vgpr_spills"]) == ("ok", None, 0)
    assert record["seconds"] > 0 and record["matrix_instructions"] > 0
    json.dumps(record)


def test_the_configuration_in_a_record_agrees_with_the_kernel(records):
    for arch, record in records.items():
        fn, args = case(arch).op.call("bfloat16", 64, None, "")
        [kernel] = aot.lower(fn, *args, arch=arch)
        config = record["config"]
        assert (config["num_warps"], config["num_stages"]) == (kernel.num_warps, kernel.num_stages)
        assert kernel.grid == (8, 4096 // config["block_q"], 1)


def test_both_loops_of_a_causal_kernel_are_read(records):
    main, masked = (records["gfx942"][name] for name in ("loop_cycles", "masked_loop_cycles"))
    assert main["matrix"] == masked["matrix"] == records["gfx942"]["useful_matrix_cycles"] > 0
    assert masked["vector"] > main["vector"] and masked["transcendental"] == main["transcendental"]
    assert 0 < records["gfx942"]["matrix_bound"] <= 1


@pytest.mark.parametrize(
    ("op", "variant"), [pytest.param(op, v, id=f"{op.kernel}-{v}") for op in ops.ON_GPUS for v in ("", *op.variants)]
)
def test_every_variant_reaches_the_same_kernel(op, variant):
    for dtype, head_dim in ((op.dtypes[0], op.head_dims[0]), (op.dtypes[-1], op.head_dims[-1])):
        fn, args = op.call(dtype, head_dim, None, variant)
        kernels = [kernel.name for kernel in aot.lower(fn, *args, arch="gfx942")]
        assert set(kernels) == {
            one.kernel for one in ops.ON_GPUS if (one.name, one.direction) == (op.name, op.direction)
        }
        assert kernels.count(op.kernel) == 1


def test_each_kernel_of_the_backward_pass_gets_its_configuration():
    config = jfa.FlashConfig(block_q=32, block_kv=64, num_warps=8, num_stages=3)
    for op in (op for op in ops.ON_GPUS if (op.name, op.direction) == ("flash_attention", "backward")):
        fn, args = op.call("bfloat16", 64, config, "")
        grids = {kernel.name: (kernel.grid, kernel.num_warps) for kernel in aot.lower(fn, *args, arch="gfx942")}
        assert grids == {"flash_attention_dq": ((8, 128, 1), 8), "flash_attention_dkv": ((2, 64, 1), 8)}


def test_a_tile_over_the_lds_limit_is_caught():
    record = compile_case(case(head_dim=256, block_q=256, num_warps=8))
    assert record["status"] == "over_lds" and record["lds_bytes"] > record["lds_limit"] == 65_536
    assert (
        record["reason"] == f"needs {record['lds_bytes']:,} bytes of LDS; the limit of a workgroup on gfx942 is 65,536"
    )
    line = compile.render([record], "md").splitlines()[-1]
    assert line == f"gfx942 bfloat16 256: over_lds: {record['reason']}"


def test_spilled_registers_are_a_status_with_their_number():
    record = compile_case(case("gfx1100", head_dim=128, block_q=128, num_warps=4))
    assert record["status"] == "spills" and record["vgpr_spills"] > 0
    assert record["reason"].startswith(f"{record['vgpr_spills']} registers are spilled to memory")


def test_an_unsupported_call_is_a_row_with_a_reason(monkeypatch):
    def refuses(case, config):
        raise jfa.UnsupportedError("head_dim must be 16 to 256, got 512")

    monkeypatch.setattr(compile, "_kernel", refuses)
    [record] = compile_all([case("sm_80")], processes=0)
    assert (record["status"], record["vgpr"]) == ("unsupported", None)
    assert "head_dim must be 16 to 256, got 512" in record["reason"]
    assert "unsupported" in compile.render([record], "md")


def test_a_compilation_error_is_a_failed_row(monkeypatch):
    def fails(kernel, *, arch, compiler):
        raise aot.CompileError(f"triton produced no code for {arch}: PassManager::run failed")

    monkeypatch.setattr(compilers, "compile_kernel", fails)
    [record] = compile_all([case()], processes=0)
    assert (record["status"], record["vgpr"]) == ("failed", None)
    assert record["reason"] == "triton produced no code for gfx942: PassManager::run failed"
    assert "failed" in compile.render([record], "md")


class EndsItsProcess:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.exhaustive
def test_a_compiler_that_crashes_its_process_loses_only_its_row():
    bad = case(block_q=EndsItsProcess())
    first, second = compile_all([bad, case(block_kv=32)], processes=2)
    assert (first["status"], first["reason"]) == ("failed", "the compiler crashed its process")
    assert second["status"] == "ok" and second["config"]["block_kv"] == 32


@pytest.mark.exhaustive
def test_a_table_fits_80_columns(bench):
    chosen = [op for op in WITH_HEADS if op.name in ("flash_attention", "gated_linear_attention")]
    few = f"--op {','.join({op.name for op in chosen})} --dtype bfloat16 --head-dim 64 --processes 0"
    status, out, err = bench(*f"compile --arch gfx942,sm_80 {few}".split())
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 6 * len(chosen)
    for op, *six in zip(chosen, *(lines[i::6] for i in range(6)), strict=True):
        title, _, heading, _, amd, nvidia = six
        assert title == f"{op.kernel}, {op.direction}"
        assert [cell.strip() for cell in heading.split("|")[1:-1]] == list(compile.TABLE.values())
        assert amd.startswith("| gfx942 | bf16") and nvidia.startswith("| sm_80  | bf16")
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_one_document_with_versions(bench):
    few = "--op flash_attention,paged_decode_attention --dtype float16 --head-dim 64"
    status, out, _ = bench(*f"compile --arch gfx942 {few} --processes 0 -o json".split())
    records = json.loads(out.splitlines()[-1])
    having = [op.kernel for op in WITH_HEADS if op.name in ("flash_attention", "paged_decode_attention")]
    assert status == 0 and [record["kernel"] for record in records] == having
    for record in records:
        assert record["compiler"] == compilers.chosen("gfx942")
        assert record["versions"].items() >= compilers.versions().items() and compilers.versions()
        assert set(record) >= FIELDS and record["note"] is None


@needs_triton
def test_an_unchecked_triton_release_is_noted_on_stderr_and_in_the_record(bench, monkeypatch):
    monkeypatch.setattr(by_triton, "MET", ("1.0", "2.0"))
    monkeypatch.setattr(compile, "compile_case", lambda case: {"kernel": case.kernel, "compiler": case.compiler})
    line = "compile --arch gfx942 --dtype float16 --head-dim 64 --compiler triton --processes 0 -o jsonl"
    status, out, err = bench(*line.split())
    said = "is not among the releases whose output was checked (1.0 to 2.0): figures read from its code may be wrong"
    assert status == 0 and err.startswith("note: triton ") and said in err and err.count("\n") == 1
    assert all(said in json.loads(line)["note"] for line in out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "gfx9"], "unknown architecture 'gfx9'; use one of gfx90a, gfx942, gfx950, gfx1100, gfx1201, sm_80"),
        (["--arch", "gfx942,"], "unknown architecture ''"),
        (["--op", "conv"], "unknown op 'conv'; use one of flash_attention"),
        (["--dtype", "int8"], "unknown dtype 'int8'; use one of bfloat16, float16, float32, bfloat16 on int8"),
        (["--head-dim", "96"], "unknown head_dim '96'; use one of 32, 64, 80, 128, 256, 4096, or all"),
        (["--compiler", "gcc"], "'gcc' is not one of 'xla', 'triton'"),
        (["-o", "xml"], "'xml' is not one of 'md', 'csv', 'json', 'jsonl'"),
    ],
)
def test_user_errors_are_one_line_and_exit_status_2(bench, arguments, message):
    status, out, err = bench("compile", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("jfa-bench: ") and err.count("\n") == 1 and message in err


def test_without_triton_one_line_names_the_extra(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(by_xla, "plugin", lambda platform: None)
    status, out, err = bench("compile", "--arch", "gfx942")
    assert (status, out) == (2, "")
    assert 'pip install "jfa[aot]"' in err and err.count("\n") == 1
