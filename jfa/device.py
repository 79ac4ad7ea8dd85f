"""Detects the device. Only this module queries it; everything else takes a DeviceInfo."""

import dataclasses
import functools
import re
from pathlib import Path

import jax

from jfa.types import DeviceInfo

# Maximum bytes of LDS (shared memory) of one workgroup. Sources: CDNA3 and RDNA3 ISA guides, section on LDS; CUDA C
# programming guide, table "Technical Specifications per Compute Capability" (opt-in maximum per block).
_LDS_BYTES = {"gfx950": 163_840, "sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448}
_LDS_BYTES_OTHERWISE = {"rocm": 65_536, "cuda": 101_376}

# JAX's abstract NVIDIA devices are identified by marketing name; these are the data center GPUs that JAX knows.
_NVIDIA_ARCH = {
    "A100": "sm_80",
    "H100": "sm_90",
    "H200": "sm_90",
    "GH200": "sm_90",
    "B200": "sm_100",
    "GB200": "sm_100",
}

# JAX's names of TPUs, and those that people use. Names that are not listed are used as they are.
_TPU_ARCH = {
    "TPU v2": "v2",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}

# Bytes of VMEM of one core, as libtpu 0.0.52 reports them when a kernel needs more.
_VMEM_BYTES = {"v5e": 128 << 20, "v5p": 64 << 20, "v6e": 128 << 20, "v7x": 64 << 20, "cpu": 128 << 20}
_VMEM_BYTES_OTHERWISE = {"tpu": 16 << 20}

# Compute units of an architecture's most common card, for compiling without the device.
_COMPUTE_UNITS = {
    "gfx90a": 104,
    "gfx942": 304,
    "gfx950": 256,
    "gfx1100": 96,
    "gfx1201": 64,
    "sm_80": 108,
    "sm_90": 132,
    "sm_100": 148,
}


def describe(platform: str, arch: str, compute_units: int | None = None) -> DeviceInfo:
    """The DeviceInfo of an architecture by name, whether or not such a device is present."""
    return DeviceInfo(
        platform=platform,
        arch=arch,
        compute_units=compute_units or _COMPUTE_UNITS.get(arch, 1),
        lds_bytes=_LDS_BYTES.get(arch, _LDS_BYTES_OTHERWISE.get(platform, 0)),
        vmem_bytes=_VMEM_BYTES.get(arch, _VMEM_BYTES_OTHERWISE.get(platform, 0)),
    )


def probe() -> DeviceInfo:
    """The device that the code being traced will run on.

    JAX's abstract device takes precedence if it names an architecture other than the real one: this is how kernels are
    lowered for a device that is not present. Inside shard_map JAX sets the abstract device from the real one, under its
    marketing name; that is ignored.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and (target := _architecture(abstract.device_kind)):
        platform, arch = target
        if arch != _real().arch:
            return describe(platform, arch)
    return _real()


def _architecture(kind: str) -> tuple[str, str] | None:
    """(platform, arch) if a device kind names an architecture: 'gfx942', 'sm_90', a data center GPU, a TPU."""
    if re.fullmatch(r"gfx[0-9a-f]+", kind):
        return "rocm", kind
    if re.fullmatch(r"sm_\d+", kind):
        return "cuda", kind
    if kind in _TPU_ARCH:
        return "tpu", _TPU_ARCH[kind]
    if match := re.search(r"NVIDIA (\w+)", kind):
        arch = _NVIDIA_ARCH.get(match[1])
        return ("cuda", arch) if arch else None
    return None


_CPU_INFO = Path("/proc/cpuinfo")  # Linux


@functools.cache
def _real() -> DeviceInfo:
    devices = jax.devices()
    device = devices[0]
    if device.platform not in ("gpu", "cuda", "rocm"):
        kind = str(device.device_kind)
        found = describe(device.platform, _TPU_ARCH.get(kind, kind))
        if device.platform != "cpu":
            return found
        return dataclasses.replace(found, multiplies_bfloat16=_multiplies_bfloat16(), num_devices=len(devices))
    # ROCm returns 'gfx942' (older plugins 'gfx942:sramecc+:xnack-') here, CUDA '9.0'
    capability = str(device.compute_capability).split(":")[0]
    units = getattr(device, "core_count", None)
    if capability.startswith("gfx"):
        return describe("rocm", capability, units)
    return describe("cuda", "sm_" + capability.replace(".", ""), units)


def _multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16; False if that is unknown (no Linux, no x86)."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("flags") and "avx512_bf16" in line.split() for line in lines)
