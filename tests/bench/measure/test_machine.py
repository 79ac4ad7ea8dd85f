"""The fields of a record about its machine, read from folders like /proc and /sys of Linux."""

import stat

import jax
import pytest

from jfa_bench.measure import machine


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CARD = "sys/class/drm/card1/device/"
AMD = {
    "sys/module/amdgpu/version": "6.14.14\n",
    CARD + "pp_dpm_sclk": "0: 132Mhz\n1: 2100Mhz *\n",
    CARD + "pp_dpm_mclk": "0: 900Mhz *\n1: 1300Mhz\n",
    CARD + "power_dpm_force_performance_level": "auto\n",
    CARD + "hwmon/hwmon4/power1_cap": "750000000\n",
}


def test_driver_clocks_and_limits_of_an_amd_gpu(tmp_path):
    root = tree(tmp_path, AMD)
    assert machine.driver(root) == "amdgpu 6.14.14"
    said = {"clock": "2100Mhz", "memory_clock": "900Mhz", "level": "auto", "power_cap": "750 W"}
    assert machine.power("rocm", root) == said


def test_driver_clocks_and_limits_of_an_nvidia_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\ncase "$2" in *clocks.sm,clocks.mem,pstate,power.limit) ;; *) exit 1;; esac\n')
    program.write_text(program.read_text() + "echo '1980 MHz, 3201 MHz, P0, 700.00 W'\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    said = {"clock": "1980 MHz", "memory_clock": "3201 MHz", "level": "P0", "power_cap": "700.00 W"}
    assert machine.power("cuda", tmp_path) == said
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    assert machine.driver(tree(tmp_path, {"proc/driver/nvidia/version": text})) == "nvidia 580.65.06"


def test_clock_and_memory_of_a_processor(tmp_path):
    files = {
        "proc/cpuinfo": "processor : 0\nmodel name\t: Fast One\ncpu MHz\t\t: 2999.998\n",
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    }
    root = tree(tmp_path, files)
    assert machine.power("cpu", root) == {"governor": "performance", "clock": "2999 MHz"}
    assert machine.free_bytes(root) == 2048 * 1024
    assert machine.circumstances(root)["device"]["host"] == "Fast One"


def test_missing_information_is_none_without_an_error(tmp_path):
    assert machine.driver(tmp_path) is None and machine.free_bytes(tmp_path) is None
    assert machine.power("rocm", tmp_path) == machine.power("cpu", tmp_path) == {}


def test_circumstances_include_device_versions_flags_and_date(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=")
    said = machine.circumstances()
    assert said["device"]["platform"] == jax.default_backend()
    assert said["versions"]["jax"] == jax.__version__ and "jfa" in said["versions"]
    assert "XLA_FLAGS=--xla_dump_to=" in said["flags"]
    assert machine.version("no-such-package") is None
    assert said["date"].endswith("+00:00")


@pytest.mark.parametrize("levels", ["", "0: 132Mhz\n"])
def test_no_level_is_marked(tmp_path, levels):
    root = tree(tmp_path, {CARD + "pp_dpm_sclk": levels})
    assert machine.power("rocm", root) == {}
