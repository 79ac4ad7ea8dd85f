"""Which compilers of kernels are installed, for tests that need one."""

import importlib.util

import pytest

from jfa_bench.proof import by_xla

_TRITON = importlib.util.find_spec("triton") is not None
_XLA = {platform: by_xla.why_not(platform) for platform in ("rocm", "cuda")}

needs_triton = pytest.mark.skipif(not _TRITON, reason="machine code needs the triton package (extra aot)")
needs_xla = pytest.mark.skipif(_XLA["rocm"] is not None, reason=_XLA["rocm"] or "")
needs_xla_for_nvidia = pytest.mark.skipif(_XLA["cuda"] is not None, reason=_XLA["cuda"] or "")
needs_compiler = pytest.mark.skipif(not _TRITON and _XLA["rocm"] is not None, reason="needs a compiler (extra aot)")
COMPILERS = [pytest.param("xla", marks=needs_xla), pytest.param("triton", marks=needs_triton)]
