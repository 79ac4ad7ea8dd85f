"""Compiles a function's kernels to machine code for a GPU that is not present: lowers with JAX, compiles with Triton.

    lower(fn, *shapes, arch="gfx942")       -> the Pallas-Triton kernels in fn, as Triton IR
    compile_kernel(kernel, arch="gfx942")   -> its machine code, from the `triton` package (extra `aot`)

XLA on ROCm and CUDA has its own copy of Triton, so the code is similar, but not identical, to what runs there. The code
is analyzed by machine_code.py and executed by emulate.py.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir

from jfa.device import describe
from jfa.types import DeviceInfo

from .. import names

# Triton releases whose output was checked (tests/bench/); others may or may not work.
TRITON_MET = ("3.6", "3.7", "3.8", "3.9")

# Columns of tensor memory of one multiprocessor: PTX ISA, "Tensor Memory"; only sm_100 has it.
TENSOR_MEMORY_COLUMNS = 512

# JAX identifies NVIDIA targets by marketing name; jfa.device converts these names back.
_NVIDIA_KIND = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H100", "sm_100": "NVIDIA B200"}


class CompileError(RuntimeError):
    """The compiler produced no machine code for a kernel; the message has the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Pallas call, as JAX passes it to Triton."""

    name: str
    ttir: str  # text of the Triton IR, without source locations
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel's machine code for one architecture.

    asm is AMD assembly with its metadata, or PTX. registers and stack_bytes are read from NVIDIA's binary, since PTX
    does not have them; they are None on AMD, where the metadata has them.
    """

    kernel: Kernel
    arch: str
    asm: str
    lds_bytes: int  # LDS or shared memory of one workgroup, the launch argument
    registers: int | None = None  # per thread
    stack_bytes: int | None = None  # per thread; Triton kernels use it only for spilled registers
    tensor_memory_columns: int = 0  # of one workgroup; only on sm_100

    def why_not_launched(self) -> str | None:
        """The reason why no GPU of this architecture could launch the code; None if it could."""
        limit = device(self.arch).lds_bytes
        if self.lds_bytes > limit:
            memory = "LDS" if is_amd(self.arch) else "shared memory"
            return f"needs {self.lds_bytes:,} bytes of {memory}; the limit of a workgroup on {self.arch} is {limit:,}"
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            return f"needs {self.tensor_memory_columns} columns of tensor memory; the limit is {TENSOR_MEMORY_COLUMNS}"
        return None


def is_amd(arch: str) -> bool:
    """Whether an architecture is AMD's."""
    return arch.startswith("gfx")


def is_cdna(arch: str) -> bool:
    """Whether an architecture is CDNA, AMD's data center line: waves of 64, MFMA. RDNA has waves of 32 and WMMA."""
    return arch.startswith("gfx9")


def device(arch: str) -> DeviceInfo:
    """The DeviceInfo of an architecture's most common card.

    Raises:
      ValueError: not one of names.ARCHS.
    """
    if arch not in names.ARCHS:
        raise ValueError(f"arch must be one of {', '.join(names.ARCHS)}, got {arch!r}")
    return describe("rocm" if is_amd(arch) else "cuda", arch)


@contextlib.contextmanager
def target(arch: str) -> Iterator[DeviceInfo]:
    """A context in which JAX and jfa trace for arch: an abstract device replaces the real one.

    Raises:
      ValueError: not one of names.ARCHS.
    """
    info = device(arch)
    abstract = AbstractDevice(device_kind=_NVIDIA_KIND.get(arch, arch), num_cores=None, platform=info.platform)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        warnings.filterwarnings("ignore", message=".*[Tt]riton.*", category=DeprecationWarning)
        yield info


def lower(fn: Callable, *args: Any, arch: str) -> tuple[Kernel, ...]:
    """All Pallas-Triton calls that fn(*args) makes on arch, in program order.

    Args:
      args: arrays or jax.ShapeDtypeStructs, or pytrees of them; only shapes and dtypes matter.

    A kernel that is called twice is returned twice, unless JAX put both calls into one function of the module.
    """
    with target(arch) as info:
        lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=(info.platform,))
        module: Any = lowered.compiler_ir("stablehlo")
    return tuple(_kernel(call) for call in _triton_calls(module.operation))


def _triton_calls(operation: Any) -> Iterator[Any]:
    for inner in (o.operation for region in operation.regions for block in region.blocks for o in block.operations):
        if inner.name == "stablehlo.custom_call" and "triton" in str(inner.attributes["call_target_name"]):
            yield inner
        yield from _triton_calls(inner)


def _kernel(call: Any) -> Kernel:
    """The kernel of a custom call, whose IR is MLIR bytecode in an attribute."""
    from jax._src.lib.triton import dialect  # there is no public API

    config = call.attributes["mhlo.backend_config"]

    def number(name: str) -> int:
        return int(ir.IntegerAttr(config[name]).value)

    context = ir.Context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        module = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes)
        text = str(module.operation.get_asm(enable_debug_info=False))
    return Kernel(
        name=ir.StringAttr(config["name"]).value,
        ttir=text,
        grid=(number("grid_x"), number("grid_y"), number("grid_z")),
        num_warps=number("num_warps"),
        num_stages=number("num_stages"),
    )


@functools.lru_cache(maxsize=32)
def compile_kernel(kernel: Kernel, *, arch: str) -> Compiled:
    """Compiles the kernel for arch. Takes about a second, or minutes if thousands of registers spill.

    Code that exceeds the memory of a workgroup is returned too, see Compiled.why_not_launched(). Nothing is kept on
    disk: Triton's cache is a temporary folder.

    Raises:
      ValueError: arch is not one of names.ARCHS.
      RuntimeError: the triton package is not installed; the message names the extra.
      CompileError: compilation failed.
    """
    device(arch)
    triton = _triton()
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    if is_amd(arch):
        gpu = GPUTarget("hip", arch, 64 if is_cdna(arch) else 32)
    else:
        gpu = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    # XLA makes Triton fuse a * b + c; set explicitly, since Triton's default is about to change
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        file = Path(folder) / "kernel.ttir"
        file.write_text(kernel.ttir)
        try:
            file.write_text(_simplified(file, gpu, options))
            built = triton.compile(str(file), target=gpu, options=options)
        except (TritonError, RuntimeError) as error:  # RuntimeError: an MLIR pass failed
            reason = " ".join(str(error).split())[:300]
            raise CompileError(f"triton produced no code for {arch}: {type(error).__name__}: {reason}") from error
    shared = {"kernel": kernel, "arch": arch, "lds_bytes": built.metadata.shared}
    if is_amd(arch):
        return Compiled(**shared, asm=built.asm["amdgcn"])
    registers, stack = _resources(built.asm["cubin"])
    columns = getattr(built.metadata, "tmem_size", None) or 0
    return Compiled(
        **shared, asm=built.asm["ptx"], registers=registers, stack_bytes=stack, tensor_memory_columns=columns
    )


def _simplified(file: Path, gpu: Any, options: dict[str, Any]) -> str:
    """The IR after Triton's passes on Triton IR, which XLA runs but triton.compile skips for a file.

    Among other things they fold `acc + dot(a, b)` into one accumulating dot, which saves a flash kernel 60 registers.
    """
    from triton._C.libtriton import ir as triton_ir  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import Language  # pyright: ignore[reportMissingImports]
    from triton.compiler.compiler import make_backend  # pyright: ignore[reportMissingImports]

    backend = make_backend(gpu)
    stages: dict[str, Callable] = {}
    backend.add_stages(stages, backend.parse_options(options), Language.TRITON)
    context = triton_ir.context()
    triton_ir.load_dialects(context)
    backend.load_dialects(context)
    module = triton_ir.parse_mlir_module(str(file), context)
    module.context = context
    return str(stages["ttir"](module, {}))


def triton_version() -> str:
    """The installed version of the triton package.

    Raises:
      RuntimeError: it is not installed; the message names the extra.
    """
    _triton()
    return importlib.metadata.version("triton")


def unmet_triton() -> str | None:
    """A warning if the output of the installed triton release was not checked; None otherwise."""
    version = triton_version()
    if ".".join(version.split(".")[:2]) in TRITON_MET:
        return None
    return (
        f"triton {version} is not among the releases whose output was checked ({TRITON_MET[0]} to {TRITON_MET[-1]}): "
        "figures read from its code may be wrong"
    )


def _triton() -> Any:
    try:
        import triton  # pyright: ignore[reportMissingImports]
        import triton.knobs  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            'machine code needs the triton package, which is not installed: pip install "jfa[aot]"'
        ) from error
    return triton


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread, read by NVIDIA's cuobjdump, which is part of the triton package."""
    tool = Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise CompileError(f"cuobjdump reported no resource usage: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])
