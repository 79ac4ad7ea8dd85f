"""The DeviceInfo that jfa.device returns for real, abstract and unknown devices."""

import types

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

import jfa
from jfa import device
from jfa.device import describe, probe

MI300X = dict(platform="gpu", device_kind="AMD Instinct MI300X", core_count=304)
H200 = dict(platform="gpu", device_kind="NVIDIA H200", core_count=132, compute_capability="9.0")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(platform=..., device_kind=..., ...) replaces the real device with that one, on a CPU with these flags."""

    def install(*, cpu_flags=None, **attributes):
        if cpu_flags is not None:
            (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {cpu_flags}\nbugs\t\t:\n")
        monkeypatch.setattr(device, "_CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(**attributes)])
        device._real.cache_clear()

    yield install
    device._real.cache_clear()


def abstract(kind, platform):
    """A context in which JAX's abstract device has this kind."""
    named = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=named))


def test_describe_knows_architectures_by_name():
    assert describe("rocm", "gfx942") == jfa.DeviceInfo(
        platform="rocm", arch="gfx942", compute_units=304, lds_bytes=65_536
    )
    assert describe("rocm", "gfx950").lds_bytes == 163_840
    assert describe("cuda", "sm_90").compute_units == 132


def test_describe_has_conservative_values_for_unknown_architectures():
    assert describe("rocm", "gfx1399") == jfa.DeviceInfo(
        platform="rocm", arch="gfx1399", compute_units=1, lds_bytes=65_536
    )
    assert describe("cuda", "sm_77").lds_bytes == 101_376


def test_reported_compute_units_take_precedence_over_the_usual_number():
    assert describe("rocm", "gfx942", 38).compute_units == 38


def test_the_real_device_without_an_abstract_device(machine):
    machine(platform="cpu", device_kind="cpu")
    assert probe() == describe("cpu", "cpu")


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx512f avx512_bf16", True), ("fpu avx512f", False), (None, False)]
)
def test_a_cpu_multiplies_bfloat16_if_it_has_the_instructions(machine, flags, expected):
    machine(platform="cpu", device_kind="cpu", cpu_flags=flags)
    assert probe().multiplies_bfloat16 == expected


@pytest.mark.parametrize("capability", ["gfx942", "gfx942:sramecc+:xnack-"])
@pytest.mark.parametrize("platform", ["gpu", "rocm"])
def test_a_rocm_gpu_is_identified_by_its_architecture(machine, platform, capability):
    machine(**MI300X | dict(platform=platform, compute_capability=capability))
    assert probe() == describe("rocm", "gfx942", 304)


def test_a_cuda_gpu_is_identified_by_its_compute_capability(machine):
    machine(**H200)
    assert probe() == describe("cuda", "sm_90", 132)


def test_a_device_without_a_core_count_gets_the_usual_number(machine):
    machine(platform="gpu", device_kind="AMD Instinct MI300X", compute_capability="gfx942")
    assert probe().compute_units == 304


@pytest.mark.parametrize(
    ("kind", "platform", "arch"),
    [
        ("gfx942", "rocm", "gfx942"),
        ("gfx90a", "rocm", "gfx90a"),
        ("gfx1201", "rocm", "gfx1201"),
        ("sm_80", "cuda", "sm_80"),
        ("NVIDIA A100-SXM4-80GB", "cuda", "sm_80"),
        ("NVIDIA H100 80GB HBM3", "cuda", "sm_90"),
        ("NVIDIA H200", "cuda", "sm_90"),
        ("NVIDIA B200", "cuda", "sm_100"),
        ("TPU v5 lite", "tpu", "v5e"),
        ("TPU v5", "tpu", "v5p"),
        ("TPU v6 lite", "tpu", "v6e"),
        ("TPU7x", "tpu", "v7x"),
    ],
)
def test_an_abstract_architecture_takes_precedence_over_the_real_one(machine, kind, platform, arch):
    machine(platform="cpu", device_kind="cpu")
    with abstract(kind, platform):
        assert probe() == describe(platform, arch)


@pytest.mark.parametrize(
    "kind", ["AMD Instinct MI300X", "AMD Radeon RX 7900 XTX", "NVIDIA GeForce RTX 4090", "TPU v8", "cpu"]
)
def test_other_device_kinds_do_not_change_the_target(machine, kind):
    machine(platform="cpu", device_kind="cpu")
    with abstract(kind, "rocm"):
        assert probe() == describe("cpu", "cpu")


def test_an_abstract_device_of_the_real_architecture_keeps_its_core_count(machine):
    machine(**MI300X | dict(compute_capability="gfx942:sramecc+:xnack-", core_count=80))
    with abstract("gfx942", "rocm"):
        assert probe().compute_units == 80
    with abstract("gfx950", "rocm"):
        assert probe() == describe("rocm", "gfx950")


def test_shard_map_uses_the_marketing_name_of_the_real_gpu(machine):
    machine(**MI300X | dict(compute_capability="gfx942"))
    with abstract(MI300X["device_kind"], "rocm"):
        assert probe() == describe("rocm", "gfx942", 304)
