"""The machine and software of a measurement: device, driver, clocks, versions, flags, commit and date.

Unknown values are None: nothing here fails because a file or a program is missing.
"""

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax

from jfa.device import probe

# Packages whose versions are recorded if installed.
PACKAGES = (
    *("jfa", "jax", "jaxlib", "flax", "triton"),
    *("jax-rocm7-plugin", "jax-rocm7-pjrt", "jax-rocm10-plugin", "jax-rocm10-pjrt"),
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu"),
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION", "HIP_VISIBLE_DEVICES")


def circumstances(root: Path = Path("/")) -> dict[str, Any]:
    """The fields that all records of a run share. root: folder that contains proc and sys."""
    device = probe()
    runtime = _one_line(getattr(jax.devices()[0].client, "platform_version", ""))
    return _circumstances(root, device.platform, device.arch, jax.devices()[0].device_kind, runtime)


def client_circumstances(root: Path = Path("/")) -> dict[str, Any]:
    """The same of the processor, without a look at JAX's devices, whose memory a server may need."""
    return _circumstances(root, "cpu", "cpu", "cpu", "")


def _circumstances(root: Path, platform: str, arch: str, name: str, runtime: str) -> dict[str, Any]:
    return {
        "device": {
            "platform": platform,
            "arch": arch,
            "name": name,
            "host": _processor(root),
            "cpus": os.cpu_count(),
            "driver": driver(root),
            "power": power(platform, root),
        },
        "versions": {name: found for name in PACKAGES if (found := version(name))},
        "runtime": runtime,
        "flags": " ".join(f"{name}={os.environ[name]}" for name in FLAGS if os.environ.get(name)),
        "git_commit": _git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver(root: Path = Path("/")) -> str | None:
    """The kernel driver of AMD or NVIDIA GPUs, with its version."""
    if amd := _read(root / "sys/module/amdgpu/version"):
        return f"amdgpu {amd}"
    nvidia = re.search(r"Kernel Module.*?(\d+\.\d+(\.\d+)?)", _read(root / "proc/driver/nvidia/version") or "")
    return f"nvidia {nvidia[1]}" if nvidia else None


def power(platform: str, root: Path = Path("/")) -> dict[str, str]:
    """Clocks and limits of the first GPU, or of the processor, as far as they are known."""
    if platform == "rocm":
        return _amd(root)
    if platform == "cuda":
        return _nvidia()
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    clock = re.search(r"cpu MHz\s*:\s*(\d+)", _read(root / "proc/cpuinfo") or "")
    return _known(governor=governor, clock=f"{clock[1]} MHz" if clock else None)


def _amd(root: Path) -> dict[str, str]:
    cards = sorted((root / "sys/class/drm").glob("card*/device/pp_dpm_sclk"))
    if not cards:
        return {}
    card = cards[0].parent
    monitor = next(iter(sorted(card.glob("hwmon/hwmon*"))), card)
    cap = _read(monitor / "power1_cap")
    return _known(
        clock=_chosen(_read(card / "pp_dpm_sclk")),
        memory_clock=_chosen(_read(card / "pp_dpm_mclk")),
        level=_read(card / "power_dpm_force_performance_level"),
        power_cap=f"{int(cap) // 10**6} W" if cap else None,
    )


def _nvidia() -> dict[str, str]:
    fields = {"clock": "clocks.sm", "memory_clock": "clocks.mem", "level": "pstate", "power_cap": "power.limit"}
    if not shutil.which("nvidia-smi"):
        return {}
    asked = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))


def _chosen(levels: str | None) -> str | None:
    """The line that the driver marks with a star: '1: 2100Mhz *'."""
    marked = re.search(r"^\d+:\s*(\S+)\s*\*", levels or "", re.MULTILINE)
    return marked[1] if marked else None


def _known(**fields: str | None) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value}


def free_bytes(root: Path = Path("/")) -> int | None:
    """Available memory of the host."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo") or "")
    return int(found[1]) * 1024 if found else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def _processor(root: Path) -> str:
    """The processor's name from Linux, or otherwise from Python."""
    named = re.search(r"model name\s*:\s*(.+)", _read(root / "proc/cpuinfo") or "")
    return named[1].strip() if named else platform.processor()


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
