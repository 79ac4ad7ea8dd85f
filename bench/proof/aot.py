"""From a function of ours to the machine code of a card that is not there: lower with JAX, compile with Triton.

    lower(fn, *shapes, arch="gfx942")       -> the Pallas-Triton kernels in fn, as Triton IR
    compile_kernel(kernel, arch="gfx942")   -> its machine code, through the `triton` package (extra `aot`)

XLA on ROCm and CUDA compiles with its own copy of Triton, so the code is near to, not the same as, what runs there.
How the code is read: machine_code.py. How it is run: emulate.py.
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

# Releases whose output has been compiled, read and compared (tests/bench/); others may do as well, or not.
TRITON_MET = ("3.6", "3.7", "3.8", "3.9")

# Columns of tensor memory of one multiprocessor: PTX ISA, "Tensor Memory"; only sm_100 has it.
TENSOR_MEMORY_COLUMNS = 512

# JAX knows its NVIDIA targets by marketing name; jfa.device reads the same names back.
_NVIDIA_KIND = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H100", "sm_100": "NVIDIA B200"}


class CompileError(RuntimeError):
    """A kernel for which the compiler made no machine code; the message is its reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One Pallas call, as JAX hands it to Triton."""

    name: str
    ttir: str  # the Triton IR's text, without source locations
    grid: tuple[int, int, int]
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel's machine code for one architecture.

    asm is AMD's assembly with its metadata, or PTX. What PTX does not tell is read from NVIDIA's binary: registers and
    stack are None on AMD, where the assembly's metadata has them.
    """

    kernel: Kernel
    arch: str
    asm: str
    lds_bytes: int  # LDS or shared memory of one workgroup, the launch argument
    registers: int | None = None  # of a thread
    stack_bytes: int | None = None  # of a thread; a Triton kernel has nothing there but spilled registers
    tensor_memory_columns: int = 0  # of one workgroup; sm_100 alone

    def why_not_launched(self) -> str | None:
        """Why no card of this architecture would start the code, as a sentence; None: nothing speaks against it."""
        limit = device(self.arch).lds_bytes
        if self.lds_bytes > limit:
            memory = "LDS" if is_amd(self.arch) else "shared memory"
            return f"takes {self.lds_bytes:,} bytes of {memory}; a workgroup on {self.arch} may take {limit:,}"
        if self.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
            return f"takes {self.tensor_memory_columns} columns of tensor memory; there are {TENSOR_MEMORY_COLUMNS}"
        return None


def is_amd(arch: str) -> bool:
    """Whether an architecture's name is one of AMD's."""
    return arch.startswith("gfx")


def is_cdna(arch: str) -> bool:
    """Whether an architecture is of AMD's data-centre line: waves of 64, MFMA. RDNA has waves of 32 and WMMA."""
    return arch.startswith("gfx9")


def device(arch: str) -> DeviceInfo:
    """What jfa knows of the usual card of an architecture.

    Raises:
      ValueError: not one of names.ARCHS.
    """
    if arch not in names.ARCHS:
        raise ValueError(f"arch must be one of {', '.join(names.ARCHS)}, got {arch!r}")
    return describe("rocm" if is_amd(arch) else "cuda", arch)


@contextlib.contextmanager
def target(arch: str) -> Iterator[DeviceInfo]:
    """Inside, JAX and jfa trace for arch: an abstract device stands where the real one would.

    Raises:
      ValueError: not one of names.ARCHS.
    """
    info = device(arch)
    abstract = AbstractDevice(device_kind=_NVIDIA_KIND.get(arch, arch), num_cores=None, platform=info.platform)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        warnings.filterwarnings("ignore", message=".*[Tt]riton.*", category=DeprecationWarning)
        yield info


def lower(fn: Callable, *args: Any, arch: str) -> tuple[Kernel, ...]:
    """Every Pallas-Triton call that fn(*args) makes on arch, in the order of the program.

    Args:
      args: arrays or jax.ShapeDtypeStructs, also in pytrees; only shapes and dtypes matter.

    A kernel that is called twice is listed twice, unless JAX has put both calls into one function of the module.
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
    """The kernel in one custom call, whose IR is MLIR bytecode in an attribute."""
    from jax._src.lib.triton import dialect  # no public name for it

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
    """The kernel's machine code for arch; about a second, minutes where thousands of registers spill.

    Code that asks for more memory than a workgroup may have is returned all the same: Compiled.why_not_launched().
    Nothing stays on disk: Triton's own cache is a folder that goes away.

    Raises:
      ValueError: arch is not one of names.ARCHS.
      RuntimeError: the triton package is not installed; the message names the extra.
      CompileError: the compiler gave up.
    """
    device(arch)
    triton = _triton()
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    if is_amd(arch):
        gpu = GPUTarget("hip", arch, 64 if is_cdna(arch) else 32)
    else:
        gpu = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    # fusing a * b + c is what XLA asks of Triton; said here, since Triton's default is about to change
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        file = Path(folder) / "kernel.ttir"
        file.write_text(kernel.ttir)
        try:
            file.write_text(_simplified(file, gpu, options))
            built = triton.compile(str(file), target=gpu, options=options)
        except (TritonError, RuntimeError) as error:  # RuntimeError: a pass of MLIR failed
            reason = " ".join(str(error).split())[:300]
            raise CompileError(f"triton made no code for {arch}: {type(error).__name__}: {reason}") from error
    shared = {"kernel": kernel, "arch": arch, "lds_bytes": built.metadata.shared}
    if is_amd(arch):
        return Compiled(**shared, asm=built.asm["amdgcn"])
    registers, stack = _resources(built.asm["cubin"])
    columns = getattr(built.metadata, "tmem_size", None) or 0
    return Compiled(
        **shared, asm=built.asm["ptx"], registers=registers, stack_bytes=stack, tensor_memory_columns=columns
    )


def _simplified(file: Path, gpu: Any, options: dict[str, Any]) -> str:
    """The IR after Triton's passes on Triton IR, which triton.compile leaves out for a file and XLA does not.

    They fold `acc + dot(a, b)` into one accumulating product, among others: 60 registers of a flash kernel.
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
    """A sentence when the installed triton is a release whose output nobody here has looked at; None otherwise."""
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
    """(registers, bytes of stack) of a thread, as NVIDIA's cuobjdump, which the triton package carries, reads them."""
    tool = Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise CompileError(f"cuobjdump told no resource usage: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])
