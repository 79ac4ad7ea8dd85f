"""The support table says no more than its records."""

from jfa_bench import aot, report


def compiled(arch="gfx942", **more):
    row = {"kernel": "flash_attention", "arch": arch, "dtype": "bfloat16", "status": "ok", "vgpr_spills": 0}
    return row | more


def proven(**more):
    return {"arch": "gfx942", "dtype": "bfloat16", "kernels": ["flash_attention"], "status": "ok"} | more


def cell(compile_records, prove_records, arch="gfx942"):
    first = report.support(compile_records, prove_records).splitlines()[2]
    return first.split(" | ")[1 + aot.ARCHS.index(arch)].strip(" |")


def test_a_kernel_is_executed_when_every_proof_held():
    assert cell([compiled()], [proven(), proven()]) == "executed"
    assert cell([compiled()], [proven(), proven(status="wrong")]) == "compiled"
    assert cell([compiled()], [proven(kernels=["another"])]) == "compiled"
    assert cell([compiled()], []) == "compiled"


def test_spills_are_those_of_the_worst_configuration():
    records = [compiled(), compiled(status="spills", vgpr_spills=7), compiled(status="spills", vgpr_spills=3)]
    assert cell(records, [proven()]) == "executed, 7 spilled"


def test_what_does_not_compile_or_start_is_lowered_only():
    assert cell([compiled(), compiled(status="over_lds")], [proven()]) == "lowered"
    assert cell([compiled()], [], arch="sm_90") == "lowered"  # no record
