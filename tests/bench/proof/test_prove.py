"""`jfa-bench prove` passes for the library's kernels and fails for broken ones."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from compiled import needs_compiler
from runs import run

import jfa
from jfa.kernels.triton import linear
from jfa_bench import cli, names
from jfa_bench.proof import by_triton, by_xla, emulate, proofs, prove
from jfa_bench.truth import cases, linear_cases, paged_cases, product_cases, sparse_cases

pytestmark = needs_compiler

# more keys than a tile, so that waves share tiles that change
CASE = cases.Case(shape=(1, 70, 90, 2, 1, 64), options=dict(is_causal=True, query_offset=[20]))


@pytest.fixture(scope="module")
def truth():
    return cases.truth_of(CASE, "float16", seed=0)


# What `jfa-bench prove --quick` proves on all architectures, as .ci/run does, is not repeated here for each of them.


@pytest.mark.parametrize("arch", ["gfx942"])
def test_forward_and_backward_run_as_machine_code(arch):
    truth = cases.truth("everything", "bfloat16")
    for proof, kernels in (
        ("forward", {"flash_attention"}),
        ("backward", {"flash_attention", "flash_attention_dq", "flash_attention_dkv", "flash_attention_dbias"}),
    ):
        found = prove.PROOFS["flash_attention", proof].run(truth, arch)
        assert found.wrong is None and found.share < 1 and found.races == 0 and found.instructions > 1000
        assert set(found.kernels) == kernels


def is_soak(arch: str) -> bool:
    """The second architecture of each kind is left to the longest run, where no quick case is of it."""
    return arch in ("gfx950", "gfx1201")


PAGED = [
    run(name, arch, quick=(name, arch) in (("int8_odd", "gfx1201"), ("chunk_int4", "gfx950")), soak=is_soak(arch))
    for name in ("int8_odd", "chunk_int4")
    for arch in names.EXECUTED_ARCHS
]


@pytest.mark.parametrize(("name", "arch"), PAGED)
def test_paged_attention_runs_as_machine_code(name, arch):
    found = proofs.over_pages(paged_cases.truth(name, "bfloat16"), arch)
    assert found.wrong is None and found.share < 1 and found.races == 0 and found.instructions > 1000


QUICK_PRODUCTS = (("int4_zeros", "gfx942"), ("fp8_groups", "gfx1100"), ("many_rows", "gfx950"))
PRODUCTS = [
    run(name, arch, quick=(name, arch) in QUICK_PRODUCTS, soak=is_soak(arch))
    for name in ("int4_zeros", "fp8_groups", "int8_minima", "rounded_inputs", "many_rows")
    for arch in names.EXECUTED_ARCHS
    if name not in prove.QUICK_OPTIONS or (name, arch) in QUICK_PRODUCTS
]


@pytest.mark.parametrize(("name", "arch"), PRODUCTS)
def test_products_run_as_machine_code(name, arch):
    found = proofs.of_weight(product_cases.truth(name, "bfloat16"), arch)
    assert found.wrong is None and found.share < 1 and found.races == 0 and found.instructions > 100


QUICK_LINEAR = (("rows", "gfx942"), ("rows_delta", "gfx1100"), ("rows_by_columns", "gfx942"))
LINEAR = [
    run(name, arch, quick=(name, arch) in QUICK_LINEAR, soak=is_soak(arch))
    for name in ("rows", "rows_delta", "rows_by_columns", "segments", "lengths", "columns_near_0")
    for arch in names.EXECUTED_ARCHS
]


@pytest.mark.parametrize(("name", "arch"), LINEAR)
def test_linear_attention_runs_as_machine_code(name, arch):
    found = proofs.of_chunks(linear_cases.truth(name, "bfloat16"), arch)
    assert found.wrong is None and found.share < 1 and found.races == 0 and found.instructions > 1000
    assert found.kernels == (linear_cases.CASES[name].op,)


QUICK_LINEAR_GRADIENTS = (("segments", "gfx1100"), ("columns_and_groups", "gfx942"))
LINEAR_GRADIENTS = [
    run(name, arch, quick=(name, arch) in QUICK_LINEAR_GRADIENTS, soak=is_soak(arch))
    for name in ("segments", "lengths", "columns_and_groups")
    for arch in names.EXECUTED_ARCHS
]


@pytest.mark.parametrize(("name", "arch"), LINEAR_GRADIENTS)
def test_gradients_of_linear_attention_run_as_machine_code(name, arch):
    found = proofs.of_chunks_backward(linear_cases.truth(name, "bfloat16"), arch)
    assert found.wrong is None and found.share < 1 and found.races == 0 and found.instructions > 1000
    kernel = linear_cases.CASES[name].op
    assert found.kernels == (kernel, *(f"{kernel}_{part}" for part in ("states", "dstates", "dqkv")))


QUICK_SPARSE = (("window_and_sinks", "gfx1100"),)
SPARSE = [
    run(name, arch, quick=(name, arch) in QUICK_SPARSE, soak=is_soak(arch))
    for name in ("array_per_row_and_head", "window_and_sinks", "function_of_rows_and_heads")
    for arch in names.EXECUTED_ARCHS
]


@pytest.mark.parametrize(("name", "arch"), SPARSE)
def test_block_sparse_attention_and_its_gradient_run_as_machine_code(name, arch):
    truth = sparse_cases.truth(name, "bfloat16")
    for proof, parts in ((proofs.forward, ()), (proofs.backward, ("_dq", "_dkv"))):
        found = proof(truth, arch)
        assert found.wrong is None and found.share < 1 and found.races == 0 and found.instructions > 1000
        parts += ("_dbias",) if parts and "bias" in truth.options else ()
        assert found.kernels == ("block_sparse_attention", *(f"block_sparse_attention{part}" for part in parts))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("partial tiles taken for whole ones", lambda visits: visits._replace(num_whole=visits.num_visited)),
        ("the last tile is left out", lambda visits: visits._replace(num_visited=visits.num_visited - 1)),
        ("another partial tile", lambda visits: visits._replace(kinds=visits.kinds[..., ::-1])),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_mask_that_is_read_wrong_is_caught(what, change, changing_kernels):
    seen = jfa.BlockMask.seen
    changing_kernels.setattr(jfa.BlockMask, "seen", lambda *args, **options: change(seen(*args, **options)))
    truth = sparse_cases.truth("window_and_sinks", "bfloat16")
    assert proofs.forward(truth, "gfx1100").wrong and proofs.backward(truth, "gfx942").wrong, what


def test_a_decay_of_a_column_that_is_read_one_token_late_is_caught(changing_kernels):
    up_to = linear.ColumnDecays.up_to
    changing_kernels.setattr(linear.ColumnDecays, "up_to", lambda decays, i: up_to(decays, i + 1))
    known = linear_cases.truth("columns_and_groups", "bfloat16")
    assert proofs.of_chunks(known, "gfx1100").wrong


def test_what_a_block_mask_hides_is_poisoned():
    truth = sparse_cases.truth("array_per_row_and_head", "float32")
    q, k, v = proofs.poisoned(truth)
    seen = truth.named["mask"].reshape(2, 2, 2, *truth.named["mask"].shape[2:])  # [b, hkv, g, tq, tk]
    np.testing.assert_array_equal(np.isnan(q).all(3), ~seen.any(4).reshape(2, 4, -1).swapaxes(1, 2))
    for x, bad in ((k, np.isnan), (v, np.isinf)):
        np.testing.assert_array_equal(bad(x).all(3), ~seen.any((2, 3)).swapaxes(1, 2))
    assert np.isnan(q).any() and np.isnan(k).any()


def test_rows_that_a_kernel_refuses_are_left_out():
    rows = prove.rows(["gfx942", "gfx1100"], ["linear_attention", "delta_attention"], ["forward"])
    for op, dtype, head_dim in (("linear_attention", "float32", 128), ("delta_attention", "bfloat16", 256)):
        found = [row.arch for row in rows if (row.op, row.dtype, row.head_dim) == (op, dtype, head_dim)]
        assert found == ["gfx942"]


def test_what_xla_once_made_wrong_code_of_holds():
    """float16 over quantized pages, and a head_dim of 80 in the tile of 128 (bench/LOG.md, 2026-11-28)."""
    for name in ("fp8", "float_keys_int8_values"):
        assert proofs.over_pages(paged_cases.truth(name, "float16"), "gfx1100").wrong is None
    row = prove.Row(op="flash_attention", direction="forward", arch="gfx1100", dtype="bfloat16", head_dim=128)
    padded = cases.truth_of(prove.PROOFS[row.op, row.direction].cases(row)["padded_head_dim"], row.dtype, seed=0)
    assert proofs.forward(padded, row.arch).wrong is None


@pytest.mark.parametrize("arch", ["gfx942", "gfx1100"])
def test_a_missing_barrier_is_caught(truth, arch):
    def without_barriers(asm):
        return re.sub(r"\n\ts_barrier", "\n\ts_nop 0", asm)

    assert "since the last barrier" in proofs.forward(truth, arch, edit=without_barriers).wrong


def test_a_store_past_the_end_is_caught(truth):
    def further(asm):
        return re.sub(r"(buffer|global)_store_(\w+) (.*)", r"\1_store_\2 \3 offset:2048", asm)

    found = proofs.forward(truth, "gfx942", edit=further).wrong
    assert re.search(r"MemoryFault: write of \d+ bytes at offset \d+ of argument \d+ \(\d+ bytes\), `\w+_store_", found)


def test_a_wrong_mask_edge_is_caught(truth, changing_kernels):
    right = jfa.AttentionSpec.right
    changing_kernels.setattr(jfa.AttentionSpec, "right", property(lambda spec: right.fget(spec) + 1))
    assert "the allowed" in proofs.forward(truth, "gfx1100").wrong


def test_a_tile_that_cannot_be_launched_is_caught(truth):
    def call(q, k, v):
        config = jfa.FlashConfig(block_q=128, block_kv=128, num_warps=4, num_stages=3)
        return jfa.dot_product_attention(q, k, v, implementation="triton", config=config)

    shapes = [np.zeros((1, 512, 2, 256), np.float16)] * 3
    found = proofs.verdict(call, shapes, [shapes[0]], [1.0], arch="gfx942").wrong
    assert re.search(r"CompileError: flash_attention needs [\d,]+ bytes of LDS; .* is 65,536", found)


def test_a_function_without_a_kernel_is_refused():
    with pytest.raises(ValueError, match="the function made no Pallas call: nothing ran as AMD machine code"):
        emulate.emulate(lambda x: x + 1, jnp.ones(3), arch="gfx942")


def test_an_architecture_without_an_emulator_is_refused():
    with pytest.raises(ValueError, match="arch must be one of gfx942, gfx950, gfx1100, gfx1201, got 'gfx90a'"):
        emulate.emulate(lambda x: x, jnp.ones(3), arch="gfx90a")


def quick(run, *arguments, monkeypatch):
    """Runs the command for one row of one case, with its proof replaced by `run`."""
    proof = dataclasses.replace(prove.PROOFS["flash_attention", "forward"], quick=(("bfloat16", None),), run=run)
    monkeypatch.setattr(prove, "PROOFS", {("flash_attention", "forward"): proof})
    monkeypatch.setattr(prove, "QUICK_OPTIONS", ("gqa",))
    return CliRunner().invoke(cli.commands, ["prove", "--quick", "--arch", "gfx942", "--processes", "0", *arguments])


def test_exit_status_0_and_a_record_if_all_proofs_pass(monkeypatch):
    holds = proofs.Verdict(share=0.25, instructions=7)
    done = quick(lambda truth, arch, compiler: holds, "-o", "json", monkeypatch=monkeypatch)
    assert done.exit_code == 0
    [row] = json.loads(done.stdout)
    assert row["status"] == "ok" and row["worst_error_of_limit"] == 0.25 and row["cases"] == ["gqa"]


def test_exit_status_1_and_a_reason_if_a_proof_fails(monkeypatch):
    done = quick(lambda truth, arch, compiler: proofs.Verdict(wrong="2 is not 3"), monkeypatch=monkeypatch)
    assert done.exit_code == 1
    assert "flash_attention gfx942 forward bfloat16 options: gqa: 2 is not 3" in done.stdout


def test_the_process_ends_with_that_status(monkeypatch):
    monkeypatch.setattr(
        prove.pool,
        "each",
        lambda *args, **more: [
            {"status": "wrong", "op": "", "arch": "", "direction": "forward", "dtype": "", "head_dim": "", "reason": ""}
        ],
    )
    monkeypatch.setattr("sys.argv", ["jfa-bench", "prove", "--quick"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--arch", "gfx900"],
            "unknown architecture 'gfx900'; use one of gfx942, gfx950, gfx1100, gfx1201, tpu, or all",
        ),
        (
            ["--op", "paged"],
            "unknown op 'paged'; use one of flash_attention, paged_decode_attention, ragged_paged_attention, "
            "quantized_matmul_few_rows, quantized_matmul, linear_attention, gated_linear_attention, delta_attention, "
            "block_sparse_attention, rotate_and_write, matmul_few_rows, "
            "or all",
        ),
    ],
)
def test_the_error_for_an_unknown_name_lists_the_known_ones(arguments, message):
    done = CliRunner().invoke(cli.commands, ["prove", *arguments])
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())


def test_without_triton_the_error_names_the_extra(monkeypatch):
    def missing():
        raise RuntimeError('machine code needs the triton package, which is not installed: pip install "jfa[aot]"')

    monkeypatch.setattr(by_xla, "plugin", lambda platform: None)
    monkeypatch.setattr(by_triton, "package", missing)
    done = CliRunner().invoke(cli.commands, ["prove", "--quick"])
    assert done.exit_code != 0 and 'pip install "jfa[aot]"' in str(done.exception)
