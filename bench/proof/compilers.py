"""The compilers that turn a kernel into machine code, and which one is used.

xla      XLA's own, from JAX's plugin for the platform (by_xla.py): the code that a card would run
triton   the package (by_triton.py), which is close to it
libtpu   XLA's for TPUs (by_libtpu.py), the only one
"""

import functools
import importlib.metadata
from collections.abc import Collection

from .. import names
from . import aot, by_libtpu, by_triton, by_xla
from .aot import Compiled, Kernel


def chosen(arch: str, compiler: str | None = None) -> str:
    """The compiler that is used for arch if `compiler` is asked for; None: XLA's if its plugin is there, else triton's.

    Raises:
      ValueError: unknown compiler or architecture.
      RuntimeError: what it needs is not installed; the message says how to install it.
    """
    platform = aot.device(arch).platform
    if platform == "tpu":
        if compiler == "triton":
            raise ValueError(f"compiler must be xla or None for {arch}, got 'triton'")
        if missing := by_libtpu.why_not():
            raise RuntimeError(missing)
        return "libtpu"
    if compiler not in (None, *names.COMPILERS):
        raise ValueError(f"compiler must be one of {', '.join(names.COMPILERS)}, got {compiler!r}")
    missing = by_xla.why_not(platform)
    if compiler == "xla" and missing:
        raise RuntimeError(missing)
    if compiler == "triton" or missing:
        by_triton.package()
        return "triton"
    return "xla"


def compile_kernel(kernel: Kernel, *, arch: str, compiler: str | None = None) -> Compiled:
    """Compiles a kernel for arch. Takes about a second, or minutes if thousands of registers spill.

    Code that exceeds the memory of a workgroup is returned too, see Compiled.why_not_launched(). Nothing is kept on
    disk.

    Args:
      compiler: "xla" or "triton", see `chosen`.

    Raises:
      ValueError: arch is not one of names.ARCHS, or the compiler is unknown.
      RuntimeError: the compiler is not installed; the message says how to install it.
      CompileError: compilation failed.
    """
    by = by_xla if chosen(arch, compiler) == "xla" else by_triton
    return by.compile_kernel(kernel, arch=arch)


def name(arch: str, compiler: str | None = None) -> str:
    """The compiler that is used for arch, for people: "XLA (jax-rocm7-pjrt 0.12.0)" or "triton 3.9.0"."""
    if chosen(arch, compiler) == "triton":
        return f"triton {versions()['triton']}"
    plugin = by_xla.plugin(aot.device(arch).platform)
    assert plugin is not None
    return f"XLA ({plugin.package} {plugin.version})"


def unmet(used: Collection[str]) -> str | None:
    """A warning if one of the compilers is a release whose output was not checked; None otherwise."""
    return by_triton.unmet() if "triton" in used else None


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the packages that are or contain a compiler here."""
    found = {}
    for platform in ("rocm", "cuda"):
        if plugin := by_xla.plugin(platform):
            found[plugin.package] = plugin.version
    if version := by_libtpu.version():
        found["libtpu"] = version
    try:
        found["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        pass
    return found
