"""What a new release of XLA's compiler, or a change of a kernel, costs by code shows here before a card sees it."""

import pytest
from compiled import needs_xla

from jfa_bench.names import SKIPPING_OPS
from jfa_bench.proof import compile, compilers
from jfa_bench.records import report

ARCHS, HEAD_DIMS = ("gfx942", "gfx1100"), (64, 128)  # only the last one of names.SKIPPING_OPS
DTYPES = ("bfloat16", "bfloat16 on int8", "bfloat16 on uint8")
KINDS = ("vector", "transcendental", "lds")  # of issue cycles
MORE = 1.03


def recorded() -> list[dict]:
    """The records of the library's kernels that are compiled again."""
    return [
        one
        for one in report.load("compile")
        if one["arch"] in ARCHS and one["dtype"] in DTYPES and one["head_dim"] in HEAD_DIMS[one["op"] in SKIPPING_OPS :]
    ]


def cycles(one: dict) -> int:
    return sum(one["loop_cycles"].get(kind, 0) for kind in KINDS)


def slower(old: dict, new: dict) -> str | None:
    """What a kernel costs more than its record says; None: nothing."""
    if new["vgpr_spills"] > old["vgpr_spills"]:
        return f"spills {new['vgpr_spills']} registers instead of {old['vgpr_spills']}"
    if new["waves_per_simd"] < old["waves_per_simd"]:
        return f"{new['waves_per_simd']} waves instead of {old['waves_per_simd']}"
    if cycles(new) > MORE * cycles(old):
        return f"{cycles(new)} issue cycles in the main loop instead of {cycles(old)}"
    return None


@needs_xla
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_is_slower_by_code_than_its_record(arch):
    found = []
    for old in (one for one in recorded() if one["arch"] == arch):
        case = compile.Case(**{name: old[name] for name in ("kernel", "dtype", "head_dim", "arch")}, compiler="xla")
        if reason := slower(old, compile.compile_case(case)):
            found.append(f"{old['kernel']} {old['dtype']} {old['head_dim']}: {reason}")
    about = f"{compilers.name(arch)}; recorded with {old['versions']}"
    assert not found, f"slower by the code of {about}:\n" + "\n".join(found) + "\nIf that is meant: jfa-bench compile"


def test_the_gate_names_what_got_worse():
    old = dict(vgpr_spills=0, waves_per_simd=2, loop_cycles={"vector": 900, "lds": 100, "matrix": 1024})
    assert slower(old, old) is None and slower(old, old | dict(loop_cycles={"vector": 920, "lds": 110})) is None
    more = slower(old, old | dict(loop_cycles={"vector": 940, "lds": 100}))
    assert more == "1040 issue cycles in the main loop instead of 1000"
    assert slower(old, old | dict(vgpr_spills=3)) == "spills 3 registers instead of 0"
    assert slower(old, old | dict(waves_per_simd=1)) == "1 waves instead of 2"


def test_block_sparse_attention_spills_nothing_in_16_bits_on_amd():
    records = [one for one in report.load("compile") if one["op"] == "block_sparse_attention"]
    of_amd = [one for one in records if one["arch"].startswith("gfx") and one["dtype"] != "float32"]
    assert len(of_amd) == 5 * 2 * 4 * 3  # architectures, dtypes, head_dims, kernels
    assert {one["status"] for one in of_amd} == {"ok"}


def test_the_records_are_of_xlas_code():
    attention = 2 * 2 * (3 + 2 * 3)  # architectures, head_dims: flash kernels, and pages of three kinds
    steps = 2 * 2 * (1 + 2)  # architectures, head_dims: parts are merged, tokens written to two kinds of caches
    products = 2 * 2 * 2  # in groups of 128: architectures, rows, two kinds
    linear = 2 * 3 * (1 + 3)  # architectures, decays or delta rule: forward, and backward
    sparse = 2 * 3  # architectures: forward, dq and dkv
    assert len(recorded()) == attention + steps + products + linear + sparse
    assert {one["compiler"] for one in recorded()} == {"xla"}
