"""Compiles kernels with the `triton` package: its releases are close to what XLA has built in, and not identical."""

import functools
import importlib.metadata
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import aot
from .aot import Compiled, CompileError, Kernel

# Triton releases whose output was checked (tests/bench/); others may or may not work.
MET = ("3.6", "3.7", "3.8", "3.9")


@functools.lru_cache(maxsize=32)
def compile_kernel(kernel: Kernel, *, arch: str) -> Compiled:
    """Compiles the kernel for arch, as compilers.compile_kernel does; Triton's cache is a temporary folder."""
    triton = package()
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.errors import TritonError  # pyright: ignore[reportMissingImports]

    if aot.is_amd(arch):
        gpu = GPUTarget("hip", arch, 64 if aot.is_cdna(arch) else 32)
    else:
        gpu = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    # as XLA: no a * b + c is fused unless the kernel says fma
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": False}
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
    shared = {"kernel": kernel, "arch": arch, "compiler": "triton", "lds_bytes": built.metadata.shared}
    if aot.is_amd(arch):
        return Compiled(**shared, asm=built.asm["amdgcn"])
    registers, stack = resources(built.asm["cubin"])
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


def unmet() -> str | None:
    """A warning if the output of the installed triton release was not checked; None otherwise."""
    version = importlib.metadata.version("triton")
    if ".".join(version.split(".")[:2]) in MET:
        return None
    return (
        f"triton {version} is not among the releases whose output was checked ({MET[0]} to {MET[-1]}): "
        "figures read from its code may be wrong"
    )


def package() -> Any:
    """The triton package.

    Raises:
      RuntimeError: it is not installed; the message names the extra.
    """
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


def nvidia_tools() -> Path:
    """The folder of NVIDIA's assembler and its tools, which are part of the triton package."""
    return Path(package().__file__).parent / "backends" / "nvidia" / "bin"


def assembled(ptx: str, arch: str) -> bytes:
    """The binary that NVIDIA's assembler makes of PTX."""
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        tool = nvidia_tools() / ("ptxas-blackwell" if arch == "sm_100" else "ptxas")
        target = "sm_90a" if arch == "sm_90" else "sm_100a" if arch == "sm_100" else arch
        subprocess.run([str(tool), f"--gpu-name={target}", str(source), "-o", str(binary)], check=True)
        return binary.read_bytes()


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread in an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvidia_tools() / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise CompileError(f"cuobjdump reported no resource usage: {text.strip()[:200]!r}")
    return int(found[1]), int(found[2])
