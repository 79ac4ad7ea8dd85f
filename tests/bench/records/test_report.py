"""The support table agrees with its records, and a folder of records becomes a page."""

import base64
import importlib.util
import json
import re

import pytest
from click.testing import CliRunner

from jfa_bench import cli, names
from jfa_bench.records import report

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="the extra plot is not installed"
)


def compiled(arch="gfx942", **more):
    row = {"kernel": "flash_attention", "arch": arch, "dtype": "bfloat16", "status": "ok", "vgpr_spills": 0}
    return row | more


def proven(**more):
    return {"arch": "gfx942", "dtype": "bfloat16", "kernels": ["flash_attention"], "status": "ok"} | more


def cell(compile_records, prove_records, arch="gfx942"):
    first = report.support(compile_records, prove_records).splitlines()[2]
    return first.split(" | ")[1 + names.ARCHS.index(arch)].strip(" |")


def test_a_kernel_is_executed_if_every_proof_passed():
    assert cell([compiled()], [proven(), proven()]) == "executed"
    assert cell([compiled()], [proven(), proven(status="wrong")]) == "compiled"
    assert cell([compiled()], [proven(kernels=["another"])]) == "compiled"
    assert cell([compiled()], []) == "compiled"


def test_spills_are_those_of_the_worst_configuration():
    records = [compiled(), compiled(status="spills", vgpr_spills=7), compiled(status="spills", vgpr_spills=3)]
    assert cell(records, [proven()]) == "executed, 7 spilled"


def test_a_kernel_that_cannot_be_launched_is_only_lowered():
    assert cell([compiled(), compiled(status="over_lds")], [proven()]) == "lowered"
    assert cell([compiled()], [], arch="sm_90") == "lowered"  # no record


def test_the_bound_of_a_loop_names_what_limits_it():
    def row(arch, head_dim):
        busy = {64: dict(matrix=1024, vector=600), 128: dict(matrix=1024, vector=2000, transcendental=48)}
        cycles = busy.get(head_dim, dict(matrix=2048, vector=2000))
        more = dict(op="flash_attention", head_dim=head_dim, useful_matrix_cycles=1024, masked_loop_cycles=cycles)
        return compiled(arch, loop_cycles=cycles, **more)

    records = [row(arch, head_dim) for arch in names.EXECUTED_ARCHS for head_dim in names.HEAD_DIMS]
    lines = report.bounds(records, ["flash_attention"]).splitlines()
    assert lines[2] == "| `flash_attention` |" + " 1, 0.5v, 0.5w |" * 4
    assert lines[3].startswith("| `flash_attention`, partial tiles |") and len(lines) == 4


def test_dtypes_with_the_same_cells_share_a_line():
    both = [compiled(), compiled(dtype="float32")]
    table = report.support(both, []).splitlines()
    assert len(table) == 3 and table[2].startswith("| `flash_attention`, 16 bits and float32 | lowered | compiled |")
    apart = report.support([both[0], both[1] | dict(status="spills", vgpr_spills=2)], []).splitlines()
    assert [line.split(" | ")[0] for line in apart[2:]] == [
        "| `flash_attention`, 16 bits",
        "| `flash_attention`, float32",
    ]


def measured(benchmark, **case):
    return {
        "benchmark": benchmark,
        "case": {"model": "phi-2", "layers": 1, "of_layers": 32, "dtype": "bfloat16", "batch": 1, "seq_len": 512}
        | case,
        "implementation": "jfa",
        "status": "ok",
        "reason": None,
        **{"time_ms_p20": 9.0, "time_ms_p50": 10.0, "time_ms_p80": 11.0},
        "device": {
            **{"platform": "rocm", "arch": "gfx942", "name": "MI300X", "host": "a <processor>"},
            **{"driver": "amdgpu 6.14", "power": {"clock": "2100Mhz"}},
        },
        "flags": "",
        "versions": {"jfa": "0.1.0", "jax": "0.12.0"},
        "git_commit": "abc1234",
        "date": "2026-11-21T00:00:00+00:00",
    }


def run(*arguments):
    return CliRunner().invoke(cli.commands, ["report", *map(str, arguments)])


@needs_matplotlib
def test_kernels_of_one_op_and_direction_share_a_line_with_the_worst_of_them():
    parts = ["flash_attention_dq", "flash_attention_dkv"]
    of_gradients = [compiled(kernel=parts[0]), compiled(kernel=parts[1], status="spills", vgpr_spills=3)]
    table = report.support([compiled(), *of_gradients], [proven(kernels=parts)]).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| `flash_attention`, 16 bits",
        "| `flash_attention_dq`, `flash_attention_dkv`, 16 bits",
    ]
    assert " executed, 3 spilled " in table[3]
    assert cell(of_gradients, [proven(kernels=parts[:1])]) == "compiled, 3 spilled", "one of them did not run"


def test_a_folder_becomes_one_page_and_tables(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([measured("prefill"), measured("prefill", seq_len=1024)]))
    refused = {key: value for key, value in measured("prefill", seq_len=2048).items() if "time" not in key}
    (tmp_path / "b.jsonl").write_text(json.dumps(refused | {"status": "oom", "reason": "too much"}))
    done = run(tmp_path)
    assert done.exit_code == 0
    assert done.stdout.startswith(
        "### prefill\n\nMI300X (gfx942), a <processor>; amdgpu 6.14; clock 2100Mhz; jfa 0.1.0, jax 0.12.0; "
        "commit abc1234; 2026-11-21.\n\nphi-2, 1 of"
    )
    assert "| 1024   | jfa  | 10  |" in done.stdout and "jfa: oom: too much" in done.stdout
    page = (tmp_path / "report.html").read_text()
    [picture] = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
    assert b"</svg>" in base64.b64decode(picture)
    assert "<th>tokens</th>" in page and "<tr><td>1024</td><td>jfa</td><td>10</td>" in page
    assert "a &lt;processor&gt;" in page and "<h2>prefill</h2>" in page and "jfa: oom: too much" in page
    # self-contained: nothing is fetched
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


@needs_matplotlib
def test_the_error_for_a_folder_without_records_says_how_to_create_some(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([measured("compile")]))
    with pytest.raises(
        ValueError, match=r"there are no records of attention, sparse.*; create some with jfa-bench all"
    ):
        report.gather(tmp_path)


def test_without_a_folder_the_support_tables_are_printed():
    records = report.load("compile"), report.load("prove")
    tables = report.support(*records), report.support(*records, skipping=True), report.support_on_tpus(*records)
    tables += report.launches(report.load("models-gpu")), report.models_on_tpus(report.load("models-tpu"))
    tables += (report.beside(report.load("beside")),)
    assert run().stdout == "\n\n".join(tables) + "\n"


def test_a_step_on_tpus_is_told_with_what_crosses_and_what_is_copied():
    row = dict(model="tiny", devices=8, hosts=1, arch="v5e", mesh=None, step="decode", cache="paged", cache_copies=2)
    row |= dict(device_bytes=2_000_000_000, cache_bytes=250_000_000, temporary_bytes=3 * 2**20)
    row |= dict(kernels=[dict(name="flash_attention", count=2)], backends={"attention": ["tpu"], "paged": ["xla"]})
    row |= dict(collectives=[dict(kind="all-reduce", count=3, shape="bf16[8,1,64]")])
    shown = report.models_on_tpus([row, row | {"collectives": []}]).splitlines()[2:]
    start = "| tiny | 8 v5e | decode | paged, 0.25 GB | 2.00 GB | 3 MiB | 2 `flash_attention`, paged by xla |"
    assert shown == [f"{start} 3 all-reduce bf16[8,1,64] | 2 |", f"{start} nothing | 2 |"]


def test_what_skips_scores_has_a_table_of_its_own():
    records = [compiled(), compiled(kernel="linear_attention"), compiled(kernel="block_sparse_attention")]
    first = [line.split(", ")[0] for line in report.support(records, []).splitlines()[2:]]
    others = [line.split(", ")[0] for line in report.support(records, [], skipping=True).splitlines()[2:]]
    assert (first, others) == (["| `flash_attention`"], ["| `linear_attention`", "| `block_sparse_attention`"])


def test_a_kernel_for_tpus_is_interpreted_if_every_proof_passed():
    on_tpu = compiled(arch="v5e")
    for proofs, cell in (([], "compiled"), ([proven(arch="tpu")], "compiled, interpreted")):
        assert report.support_on_tpus([on_tpu], proofs).splitlines()[2].split(" | ")[1] == cell


def test_records_of_an_earlier_version_are_skipped_with_a_message(tmp_path, capsys):
    old = measured("prefill")
    old["case"] = {"model": "phi-2", "dtype": "bfloat16", "batch": 1, "prompt": 512}
    (tmp_path / "mixed.json").write_text(json.dumps([old, measured("prefill")]))
    assert len(report.gather(tmp_path)["prefill"]) == 1
    assert "mixed.json: skipped 1 records of an earlier version" in capsys.readouterr().err
