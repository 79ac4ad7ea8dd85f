"""Lowers a function for a GPU that is not present, and describes its kernels before and after they are compiled.

    lower(fn, *shapes, arch="gfx942")   -> the Pallas-Triton kernels in fn, as Triton IR

compilers.py turns a kernel into machine code, machine_code.py analyzes the code, and emulate.py executes it.
"""

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AbstractDevice, AbstractMesh, Mesh
from jaxlib.mlir import ir

from jfa.device import describe
from jfa.types import DeviceInfo

from .. import names

CUSTOM_CALL = "__gpu$xla.gpu.triton"  # XLA's name for a Triton kernel

# Columns of tensor memory of one multiprocessor: PTX ISA, "Tensor Memory"; only sm_100 has it.
TENSOR_MEMORY_COLUMNS = 512

# JAX identifies NVIDIA GPUs and TPUs by other names; jfa.device converts these names back.
_KINDS = {"sm_80": "NVIDIA A100", "sm_90": "NVIDIA H100", "sm_100": "NVIDIA B200"}
_KINDS |= {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite", "v7x": "TPU7x"}


_CACHE = threading.Lock()  # one thread at a time changes JAX's configuration


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
    operands: tuple[jax.ShapeDtypeStruct, ...] = ()
    results: tuple[jax.ShapeDtypeStruct, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel's machine code for one architecture.

    asm is AMD assembly with its metadata, or PTX. registers and stack_bytes are read from NVIDIA's binary, since PTX
    does not have them; they are None on AMD, where the metadata has them.
    """

    kernel: Kernel
    arch: str
    compiler: str  # one of names.COMPILERS
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
      ValueError: not one of names.ARCHS and names.TPU_ARCHS.
    """
    known = (*names.ARCHS, *names.TPU_ARCHS)
    if arch not in known:
        raise ValueError(f"arch must be one of {', '.join(known)}, got {arch!r}")
    if arch in names.TPU_ARCHS:
        return describe("tpu", arch)
    return describe("rocm" if is_amd(arch) else "cuda", arch)


@contextlib.contextmanager
def target(arch: str, mesh: Mesh | None = None) -> Iterator[DeviceInfo]:
    """A context in which JAX and jfa trace for arch: an abstract device replaces the real one, or each of a mesh.

    Raises:
      ValueError: unknown architecture.
    """
    info = device(arch)
    num_cores = 1 if info.platform == "tpu" else None  # Mosaic asks for it
    abstract = AbstractDevice(device_kind=_KINDS.get(arch, arch), num_cores=num_cores, platform=info.platform)
    sizes, axes, kinds = ((), (), ()) if mesh is None else (mesh.axis_sizes, mesh.axis_names, mesh.axis_types)
    abstract_mesh = AbstractMesh(sizes, axes, axis_types=kinds, abstract_device=abstract)
    with warnings.catch_warnings(), jax.sharding.use_abstract_mesh(abstract_mesh):
        warnings.filterwarnings("ignore", message=".*[Tt]riton.*", category=DeprecationWarning)
        yield info


def compile_lowered(lowered: Any, *, arch: str, compiler: str, options: Mapping[str, Any] | None = None) -> Any:
    """Compiles a jax.stages.Lowered for devices that only compile.

    JAX's persistent cache is passed by: it cannot read back what it keeps of such devices, and the compiler dumps
    nothing for a program that it finds there.

    Raises:
      CompileError: compilation failed.
    """
    with _CACHE:
        before = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # JAX asks for the flag once
        try:
            return lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise CompileError(f"{compiler} produced no code for {arch}: {reason}") from error
        finally:
            jax.config.update("jax_enable_compilation_cache", before)
            compilation_cache.reset_cache()


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


def kernel_names(lowered: Any) -> tuple[str, ...]:
    """The names of the Pallas-Triton kernels in a jax.stages.Lowered, each once, in program order."""
    calls = _triton_calls(lowered.compiler_ir("stablehlo").operation)
    return tuple(dict.fromkeys(ir.StringAttr(call.attributes["mhlo.backend_config"]["name"]).value for call in calls))


def _triton_calls(operation: Any) -> Iterator[Any]:
    for inner in (o.operation for region in operation.regions for block in region.blocks for o in block.operations):
        if (
            inner.name == "stablehlo.custom_call"
            and ir.StringAttr(inner.attributes["call_target_name"]).value == CUSTOM_CALL
        ):
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
        operands=tuple(_shape(operand.type) for operand in call.operands),
        results=tuple(_shape(result.type) for result in call.results),
    )


# MLIR's names of dtypes, where they differ from NumPy's
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f8E4M3FN": "float8_e4m3fn", "i1": "bool"}
_DTYPES |= {f"{sign}i{bits}": f"{name}{bits}" for sign, name in (("", "int"), ("u", "uint")) for bits in (8, 16, 32)}


def _shape(tensor: Any) -> jax.ShapeDtypeStruct:
    tensor = ir.RankedTensorType(tensor)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), _DTYPES[str(tensor.element_type)])
