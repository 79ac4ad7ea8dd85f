"""Compiles kernels with XLA's own compiler: the code that a JAX process with the card would run.

The compiler is inside JAX's plugin for ROCm or CUDA, jax-rocm7-pjrt or jax-cuda13-pjrt, and runs without a GPU and
without ROCm or CUDA. A plugin is found in the environment or in a folder of $JFA_XLA_PLUGINS, made with

    pip install --target FOLDER --no-deps jax-rocm7-pjrt

which is the better place on a machine without the card: JAX reports a plugin in its environment at each start.

JAX has no public way to load a plugin only for its compiler: this is the one file that uses what it has inside.
"""

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from . import aot, code_object, stand_ins
from .aot import Compiled, CompileError, Kernel

PLUGINS = "JFA_XLA_PLUGINS"
_LIBRARIES = {"rocm": "jax_plugins/xla_rocm*/xla_rocm_plugin.so", "cuda": "jax_plugins/xla_cuda*/xla_cuda_plugin.so"}
_PACKAGES = {"rocm": "jax-rocm7-pjrt", "cuda": "jax-cuda13-pjrt"}

# What XLA asks about a GPU, in its text format. Pallas kernels depend on the name, the waves and the LDS only.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: {wave}
  shared_memory_per_block: {lds}
  shared_memory_per_block_optin: {lds}
  shared_memory_per_core: {lds}
  threads_per_core_limit: 2048
  core_count: {units}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 5300000000000
  l2_cache_size: 4194304
  clock_rate_ghz: 2.1
  device_memory_size: 206158430208
  registers_per_core_limit: {registers}
  registers_per_block_limit: {registers}
  {capability}
}}
platform_name: "{platform}"
dnn_version_info {{ major: 9 }}
device_description_str: "{arch}"
"""


_NUMBERS = itertools.count()
_OPTIONS = {"xla_backend_optimization_level": 3}  # whatever XLA_FLAGS says
_TOO_LARGE = re.compile(r"Shared memory size limit exceeded: requested (\d+)")


class Plugin(NamedTuple):
    """A plugin's library, and the package that it is from."""

    library: Path
    package: str
    version: str


def plugin(platform: str) -> Plugin | None:
    """The plugin for "rocm" or "cuda"; None if there is none."""
    for folder in (*filter(None, os.environ.get(PLUGINS, "").split(os.pathsep)), *sys.path):
        for library in sorted(Path(folder or ".").glob(_LIBRARIES[platform]), reverse=True):
            package = f"jax-{library.parent.name.removeprefix('xla_')}-pjrt"
            about = list(Path(folder or ".").glob(f"{package.replace('-', '_')}-*.dist-info"))
            return Plugin(library, package, about[0].name.split("-")[1].removesuffix(".dist") if about else "unknown")
    return None


def why_not(platform: str) -> str | None:
    """What is missing to compile for a platform; None: nothing."""
    if plugin(platform) is None:
        package = _PACKAGES[platform]
        return (
            f"XLA's compiler for {platform} is in {package}, which is not installed: pip install --target FOLDER "
            f"--no-deps {package}; export {PLUGINS}=FOLDER"
        )
    needed = {"rocm": ("elftools", "llvm", "msgpack"), "cuda": ("triton",)}[platform]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        return f'XLA\'s code is read with {", ".join(missing)}, which is not installed: pip install "jfa[aot]"'
    return None


@functools.lru_cache(maxsize=32)
def compile_kernel(kernel: Kernel, *, arch: str) -> Compiled:
    """Compiles the kernel for arch, as compilers.compile_kernel does."""
    call = jax.ffi.ffi_call(aot.CUSTOM_CALL, kernel.results)
    numbers = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    numbers |= dict(zip(("grid_x", "grid_y", "grid_z"), kernel.grid, strict=True))
    # XLA remembers the code of a kernel that it met before, and would keep no file of it
    name = f"{kernel.name}_{next(_NUMBERS)}"
    attributes = {"name": name, "ir": kernel.ttir.replace(f"@{kernel.name}(", f"@{name}("), "debug": False}
    attributes |= {key: np.int32(number) for key, number in numbers.items()}
    sharding = jax.sharding.SingleDeviceSharding(device(arch))
    operands = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in kernel.operands]
    with tempfile.TemporaryDirectory() as folder:
        lowered = jax.jit(lambda *xs: call(*xs, **attributes)).trace(*operands).lower()
        try:
            compile_lowered(lowered, Path(folder), arch=arch)
        except CompileError as error:
            if too_large := _TOO_LARGE.search(str(error)):
                return Compiled(kernel=kernel, arch=arch, compiler="xla", asm="", lds_bytes=int(too_large[1]))
            raise
        [thunks] = (file.read_text() for file in Path(folder).glob("*.thunk_sequence.txt"))
        hsaco = [file.read_bytes() for file in Path(folder).glob("*.hsaco")]
        ptx = "\n".join(file.read_text() for file in Path(folder).glob("*.ptx")).replace(name, kernel.name)
    shared = re.search(r"shared_memory: (\d+) bytes", thunks)
    assert shared is not None, thunks
    common: dict[str, Any] = {"kernel": kernel, "arch": arch, "compiler": "xla", "lds_bytes": int(shared[1])}
    if aot.is_amd(arch):
        [code] = hsaco
        return Compiled(**common, asm=code_object.assembly(code, arch).replace(name, kernel.name))
    from . import by_triton

    registers, stack = by_triton.resources(by_triton.assembled(ptx, arch))
    return Compiled(**common, asm=ptx, registers=registers, stack_bytes=stack)


def compile_lowered(lowered: Any, folder: Path, *, arch: str, dump_large_constants: bool = False) -> Any:
    """Compiles a jax.stages.Lowered for device(arch); XLA's dumps and code objects are kept in the folder.

    Raises:
      CompileError: compilation failed.
    """
    options = _OPTIONS | {"xla_dump_to": str(folder), "xla_dump_large_constants": dump_large_constants}
    options |= {} if aot.is_amd(arch) else _for_nvidia()
    with _kept_files(str(folder)):
        return aot.compile_lowered(lowered, arch=arch, compiler="XLA", options=options)


def kernels_in(hsaco: bytes) -> list[str]:
    """The names of the kernels in a code object."""
    from elftools.elf.elffile import ELFFile

    symbols: Any = ELFFile(io.BytesIO(hsaco)).get_section_by_name(".dynsym")
    return [symbol.name.removesuffix(".kd") for symbol in symbols.iter_symbols() if symbol.name.endswith(".kd")]


@contextlib.contextmanager
def _kept_files(folder: str) -> Iterator[None]:
    """A context in which XLA for ROCm keeps the code objects that it makes, in the folder."""
    wanted = {"TF_ROCM_KEEP_XLA_TEMPFILES": "1", "TMPDIR": folder}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _for_nvidia() -> dict[str, Any]:
    from . import by_triton

    return {"xla_gpu_cuda_data_dir": str(by_triton.nvidia_tools().parent), "xla_dump_emitter_re": "ptx"}


def device(arch: str) -> Any:
    """A device to compile for, which cannot run anything."""
    return devices(arch)[0]


@functools.cache
def devices(arch: str, count: int = 1, hosts: int = 1) -> list[Any]:
    """Devices to compile for: `count` of them on each of some hosts."""
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    platform = aot.device(arch).platform
    if reason := why_not(platform):
        raise RuntimeError(reason)
    topology = xla_client.make_c_api_device_topology(
        _loaded(platform), "", target_config=_target(arch), topology=f"1x{hosts}x{count}"
    )
    return topology._make_compile_only_devices()


@functools.cache
def _loaded(platform: str) -> Any:
    from jax._src import xla_bridge
    from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

    found = xla_bridge._backend_factories.get(platform)
    if found is not None and found.c_api is not None:  # JAX has loaded it, since there is a card
        return found.c_api
    plugged = plugin(platform)
    assert plugged is not None
    stand_ins.load(plugged.library)
    c_api = xla_client.load_pjrt_plugin_dynamically(platform, str(plugged.library))
    xla_client.initialize_pjrt_plugin(platform)
    return c_api


def _target(arch: str) -> str:
    info = aot.device(arch)
    if aot.is_amd(arch):
        features = ":sramecc+:xnack-" if aot.is_cdna(arch) else ""
        capability = f'rocm_compute_capability {{ gcn_arch_name: "{arch}{features}" }}'
    else:
        digits = arch.removeprefix("sm_")
        capability = f"cuda_compute_capability {{ major: {digits[:-1]} minor: {digits[-1]} }}"
    return _TARGET.format(
        wave=64 if aot.is_cdna(arch) else 32,
        lds=info.lds_bytes,
        units=info.compute_units,
        registers=131_072 if aot.is_amd(arch) else 65_536,
        capability=capability,
        platform=info.platform.upper(),
        arch=arch,
    )
