"""Whole programs: what is read from XLA's dumps, and steps of tiny models that are executed as machine code."""

import concurrent.futures
import dataclasses
import multiprocessing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner
from compiled import needs_xla
from proven import proven_together
from runs import run

from jfa_bench import cli, configs, names
from jfa_bench.proof import by_xla, execute, model, program, steps
from jfa_bench.proof.model import Row
from jfa_bench.proof.program import Launch, Place
from jfa_bench.records import report

THUNKS = """
001: kCustomKernel [source       | next=002 (1)] wrapped_iota grid: [4, 1, 1] threads: [2, 1, 1]  shared_memory: 0 bytes
002: kCopy         [prev=001 (1) | next=003 (1)] kCopy
003: kWhile        [prev=002 (1) | next=006 (1)]
condition:
    004: kCustomKernel [source | sink] loop_compare_fusion grid: [1, 1, 1] threads: [1, 1, 1]  shared_memory: 0 bytes
  body:
    007: kConditional  [source | sink]
      false_branch:
        005: kCustomKernel [source | sink] gemm_fusion grid: [2, 3, 1] threads: [128, 1, 1]  shared_memory: 2048 bytes
      true_branch:
        008: kCopy         [source | sink] kCopy
006: kGemm         [prev=003 (1) | sink        ] cublas
"""
NAMES = ("iota.1", "copy.2", "while.3", "compare.4", "dot.5", "gemm.6", "cond.7", "copy.8")
METADATA = "".join(
    f'thunk_metadata {{\n  thunk_info {{\n    profile_annotation: "{name}"\n    thunk_id: {number}\n  }}\n}}\n'
    for number, name in enumerate(NAMES, 1)
)


def test_a_schedule_is_read_with_its_loops_and_conditionals():
    launches = program._launches(THUNKS, METADATA, dict.fromkeys(NAMES))
    first, copy, loop, last = launches
    assert first == Launch(
        kind="kernel", name="wrapped_iota", instruction="iota.1", grid=(4, 1, 1), threads=2, lds_bytes=0
    )
    assert (copy.kind, copy.instruction, last.kind, last.name) == ("copy", "copy.2", "gemm", "cublas")
    [compare], [conditional] = loop.parts["condition"], loop.parts["body"]
    assert (compare.name, conditional.kind) == ("loop_compare_fusion", "conditional")
    assert set(conditional.parts) == {"true_branch", "false_branch"}
    [product] = conditional.parts["false_branch"]
    assert (product.grid, product.threads, product.lds_bytes) == ((2, 3, 1), 128, 2048)
    assert len(list(program.each(launches))) == 8


@pytest.mark.parametrize(
    ("thunks", "message"),
    [
        ("001: something else", "a step of XLA's schedule that is not understood: 001: something else"),
        (THUNKS.replace("threads: [2, 1, 1]", "threads: [2, 8, 1]"), "a workgroup of more than one dimension: 001"),
    ],
)
def test_what_is_not_understood_is_named(thunks, message):
    with pytest.raises(program.ProgramError, match=message):
        program._launches(thunks, METADATA, {})


def test_places_of_values_and_of_their_other_names():
    assignment = """BufferAssignment:
allocation 0: size 32, page 0, parameter 21, shape |f32[8]|, maybe-live-out:
 value: <4 x.1 @0> (size=32,offset=0): f32[8]{0}
allocation 1: size 64, page 0, constant:
 value: <5 fusion.2{0} (phi) @0> (size=16,offset=48): f32[4]{0}
"""
    values = """<4 x.1 @0>
 positions:
  x.1
  tuple.3 {0}
 uses:
  fusion.2, operand 0
<5 fusion.2{0} (phi) @0>
 positions:
  fusion.2 {0}
  tuple.3 {}
"""
    allocations, places = program._buffers(assignment, values)
    assert places == {"x.1": Place(0, 0, 32), "tuple.3#0": Place(0, 0, 32), "fusion.2#0": Place(1, 48, 16)}
    assert (allocations[0].parameter, allocations[0].constant, allocations[1].constant) == (21, False, True)


@pytest.mark.parametrize(
    ("shape", "text", "value"),
    [
        ("f32[2]{0}", "{1.5, -inf}", np.array([1.5, -np.inf], np.float32)),
        ("s32[2,2]{1,0}", "{ {1, 2}, {-3, 4} }", np.array([1, 2, -3, 4], np.int32)),
        ("pred[2]{0}", "{true, false}", np.array([True, False])),
    ],
)
def test_constants_are_read(shape, text, value):
    found = program.literal(program.Instruction(opcode="constant", shape=shape, operands=(), literal=text))
    assert found.dtype == value.dtype and np.array_equal(found, value)


def test_a_constant_that_was_left_out_is_refused():
    with pytest.raises(program.ProgramError, match=r"the value of a constant f32\[999\] was left out"):
        program.literal(program.Instruction(opcode="constant", shape="f32[999]", operands=(), literal="{...}"))


QUICK = (
    Row(model="llama", step="decode", cache="int8 pages", arch="gfx1100"),
    Row(model="llama", step="decode", cache="paged", weights="int4", arch="gfx1100"),
    Row(model="mixture", step="prefill", cache="contiguous", arch="gfx942"),
)
STEPS = {  # name: the rows of a step, one for each architecture
    "-".join(filter(None, (one.model, one.step, one.cache, one.weights))): [
        dataclasses.replace(one, arch=arch) for arch in names.EXECUTED_ARCHS
    ]
    for one in model.rows(names.EXECUTED_ARCHS[:1])
}


def check(row, record):
    assert (record["status"], record["reason"], record["races"]) == ("ok", None, 0)
    assert 0 < record["worst_error_of_limit"] < 1 and record["instructions"] > 10_000
    # two layers: tokens are rotated and written, then attended to; q, k and v, o and, without experts, two of the MLP
    own = 2 * (2 + (2 if row.model == "mixture" else 4))
    if row.weights:  # the head, and experts in a loop
        assert record["launches"]["pallas"] > own
        assert any("quantized_matmul" in kernel for kernel in record["kernels"])
    else:
        assert record["launches"]["pallas"] == own and record["launches"]["products"] >= 1


@needs_xla
@pytest.mark.parametrize("row", QUICK, ids=str)
def test_a_step_of_a_model_runs_as_machine_code(row):
    [record] = model.prove_all([row])
    check(row, record)


# Left to the longest run, apart from these and those of test_a_step_of_a_model_runs_as_machine_code.
IN_CI = ["llama-prefill-paged"]


@needs_xla
@pytest.mark.exhaustive
@pytest.mark.parametrize("step", [run(step, quick=False, soak=step not in IN_CI) for step in STEPS])
def test_a_step_of_a_model_runs_as_machine_code_of_every_architecture(step):
    """In one process: what is compiled for this CPU is the same for all, and takes longer than a row itself."""
    rows = [row for row in STEPS[step] if row not in QUICK]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([model.__name__])  # imported once for all steps
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for row, record in zip(rows, pool.submit(proven_together, rows).result(), strict=True):
            check(row, record)


BROKEN = {
    "a product without its first multiplication": ("matmul_few_rows", "v_mfma", 1),
    "new tokens that are not written": ("rotate_and_write", "global_store_", 99),
    "attention without exponentials": ("attention", "v_exp_f32", 99),
}


@needs_xla
def test_an_error_in_one_kernel_is_noticed():
    """Instructions of one kernel are left out; each time the logits or the cache differ."""
    case = model.case_of(Row(arch="gfx942", model="llama", step="decode", cache="contiguous"))
    args = jax.tree.map(np.array, (case.model.params, case.cache, case.tokens, case.lengths))
    compiled = program.compile_program(case.model.steps.score, *args, arch="gfx942")
    for kernel, instruction, number in BROKEN.values():
        changed = []

        def edit(name, asm, kernel=kernel, instruction=instruction, number=number, changed=changed):
            lines = asm.split("\n")
            at = [i for i, line in enumerate(lines) if line.startswith(f"\t{instruction}")]
            if kernel in name and at and not changed:
                changed.append(name)
                for i in at[:number]:
                    lines[i] = "\ts_nop 0"
            return "\n".join(lines)

        done = execute.execute(compiled, *args, edit=edit)
        assert changed and model.verdict(case, done)[1] is not None, kernel
    assert model.verdict(case, execute.execute(compiled, *args))[1] is None


@needs_xla
def test_a_program_compiled_twice_in_one_process_is_refused():
    """XLA keeps the code of kernels that it met before to itself."""
    fn = jax.jit(lambda x: jnp.cumsum(jnp.sort(x)) * 3.5)
    x = jnp.arange(37.0)
    programs = [program.compile_program(fn, x, arch="gfx942") for _ in range(2)]
    assert np.array_equal(execute.execute(programs[0], np.asarray(x)).outputs[0].view(np.float32), fn(x))
    with pytest.raises(program.ProgramError, match="compile the program in a process of its own"):
        execute.execute(programs[1], np.asarray(x))


def test_a_library_call_is_refused_by_name():
    call = Launch(kind="gemm", name="cublas", instruction="", grid=(1, 1, 1), threads=0, lds_bytes=0)
    nothing = dict(code={}, allocations={}, places={}, instructions={}, roots={}, outputs=(), bytes={})
    with pytest.raises(program.ProgramError, match="gemm cublas cannot be run here"):
        execute.execute(program.Program(arch="gfx942", launches=(call,), **nothing))


@needs_xla
@pytest.mark.parametrize("arch", [run(arch, quick=arch == "gfx942", soak=True) for arch in ("gfx942", "gfx1100")])
def test_the_launches_of_a_model_are_counted(arch):
    [record] = steps.compile_all([steps.Row(model="smollm2-135m", step="decode", arch=arch, batch=2, context=256)])
    assert (record["status"], record["layers"], record["in_place"]) == ("ok", 30, True)
    # q, k and v; rotation and write; attention; o; gate and up; down: and nothing else
    assert record["by_role_per_layer"]["pallas"] == record["launches_per_layer"] == 6
    assert record["by_role"]["pallas"] == 180
    assert record["launches"] >= 30 * record["launches_per_layer"]
    assert "paged_decode_attention" in record["one_layer"]
    table = steps.render([record], "md").split("\n\n")[0]
    assert f"| {arch}" in table and max(map(len, table.splitlines())) <= 86


@needs_xla
@pytest.mark.exhaustive
@pytest.mark.soak
def test_the_kernels_of_a_shard_have_its_share_of_the_heads():
    """9 query and 3 key heads over three hosts of one device."""
    row = steps.Row(model="smollm2-135m", step="decode", arch="gfx942", batch=2, context=256, cache="paged")
    [record] = steps.compile_all([dataclasses.replace(row, devices=1, hosts=3)])
    assert record["status"] == "ok", record["reason"]
    [one] = [kernel for kernel in record["kernels"] if kernel["name"] == "paged_decode_attention"]
    assert one["count"] == 30 and list(one["operands"][:2]) == ["bf16[2,3,64]", "bf16[528,1,64]"]


def test_the_recorded_kernels_are_those_of_one_device():
    for row in report.load("devices"):
        config, mesh = configs.config_of(row["model"]), row.get("mesh") or {"tensor": row["devices"] * row["hosts"]}
        count = mesh.get("tensor", 1)
        [one] = [kernel for kernel in row["kernels"] if "attention" in kernel["name"]]
        q, k, v, *_ = one["operands"]
        assert one["count"] == row["by_role"]["pallas"] == config.num_layers
        assert f",{config.num_q_heads // count},{config.head_dim}]" in q
        assert k == v and f",{max(1, config.num_kv_heads // count)},{config.head_dim}]" in k


def test_kernels_are_shown_with_their_shapes_in_80_columns():
    row = report.load("devices")[0]
    told = steps.render([row], "md")
    first = "32 paged_decode_attention: bf16[8,4,128], 2 bf16[8208,1,128], s32[8,64], s32[8]"
    [at] = [i for i, line in enumerate(told.splitlines()) if line == first]
    lines = told.splitlines()
    assert lines[at + 1] == "    -> f32[4,8,4,128], f32[4,8,4]"
    start = next(i for i, line in enumerate(lines) if line.startswith("each of 8 devices"))
    assert max(map(len, lines[start + 2 :])) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compile --model llama-3-8b --op flash_attention", "--op cannot be combined with --model"),
        ("compile --batch 3", "--batch needs --model"),
        ("compile --model nope", "unknown model 'nope'; use one of llama-2-7b"),
        ("compile --model phi-2 --kv-dtype int8", "--kv-dtype int8 needs --cache paged: a contiguous cache is not"),
        ("compile --model phi-2 --compiler triton", "--model needs --compiler xla: a whole program is compiled by XLA"),
        ("prove --model --op flash_attention", "--op cannot be combined with --model"),
        ("prove --model --compiler triton", "--model needs --compiler xla: a whole program is compiled by XLA"),
    ],
)
def test_user_errors_name_the_way_out(arguments, message):
    done = CliRunner().invoke(cli.commands, arguments.split())
    assert done.exit_code == 2 and message in " ".join(done.stderr.split())


def test_without_the_plugin_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(by_xla, "plugin", lambda platform: None)
    for prove in (model.prove_all, steps.compile_all):
        with pytest.raises(RuntimeError, match="XLA's compiler for rocm is in jax-rocm7-pjrt, which is not installed"):
            prove([Row(arch="gfx942", model="llama", step="decode", cache="paged")])


def test_a_wrong_row_is_shown_with_its_reason():
    row = Row(arch="gfx942", model="llama", step="decode", cache="paged")
    wrong = model._about(row) | {"status": "wrong", "reason": "NaN at [0 0]", "seconds": None}
    assert "gfx942 llama decode, paged: NaN at [0 0]" in model.render([wrong], "md")
    assert dataclasses.asdict(row).items() <= wrong.items()
