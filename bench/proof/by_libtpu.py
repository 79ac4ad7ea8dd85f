"""Compiles a call for a TPU with libtpu, which needs no TPU, and reads what the compiler says about it.

libtpu compiles whole programs: the figures of a call include what XLA adds around the kernel, such as copies of
operands to the layout that the kernel reads.
"""

import atexit
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jfa.kernels.tpu import tile

from . import aot
from .aot import CompileError

_TOPOLOGIES = {"v5e": "v5e:1x1", "v6e": "v6e:1x1", "v7x": "tpu7x:1x1x1"}

# Fields of a record of a TPU. vmem_limit: what a kernel may use of the chip's VMEM. hbm_bytes and flops are those of
# the program, with what the kernel states for itself; roofline_ms is XLA's estimate from these.
# loop_bundles: instruction words, one a cycle, of the longest part of the kernel's loop without a branch, with
# loop_products matrix products; waits for memory are not part of it.
FIELDS = ("vmem_bytes", "vmem_limit", "hbm_bytes", "flops", "roofline_ms", "copies", "copied_bytes", "code_bytes")
FIELDS += ("loop_bundles", "loop_products")


def why_not() -> str | None:
    """What is missing to compile for TPUs; None: nothing."""
    if importlib.util.find_spec("libtpu") is None:
        return 'the compiler for TPUs is in libtpu, which is not installed: pip install "jfa[tpu-aot]"'
    return None


def version() -> str | None:
    """The version of libtpu; None: it is not installed."""
    return None if why_not() else importlib.metadata.version("libtpu")


def compile_call(fn: Callable, args: tuple, *, kernel: str, arch: str) -> dict[str, Any]:
    """FIELDS of fn(*args), compiled for a chip.

    Args:
      args: pytrees of jax.ShapeDtypeStruct.
      kernel: name of the Pallas call in it.

    Raises:
      RuntimeError: libtpu is not installed; the message names the extra.
      CompileError: compilation failed, or the program has no such kernel.
    """
    figures, parts = compile_program(fn, args, kernel=kernel, arch=arch)
    own = [part for name, of_kernel in parts.items() if name.startswith(kernel) for part in of_kernel]
    return figures | dict(zip(("loop_bundles", "loop_products"), _loop(own), strict=True))


def compile_program(
    fn: Callable, args: tuple, *, kernel: str, arch: str
) -> tuple[dict[str, Any], dict[str, list[tuple[int, int]]]]:
    """FIELDS without those of the loop, and of each kernel with products its parts without a branch, longest first.

    A part is (instruction words, matrix products). Arguments and exceptions: as of compile_call.
    """
    sharding = jax.sharding.SingleDeviceSharding(_device(arch))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with aot.target(arch) as info:
        lowered = jax.jit(fn).trace(*placed).lower()
        compiled = aot.compile_lowered(lowered, arch=arch, compiler="libtpu")
    text, cost, memory = compiled.as_text() or "", compiled.cost_analysis() or {}, compiled.memory_analysis()
    assert memory is not None
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line and kernel in line]
    if not calls:
        raise CompileError(f"the program has no kernel named {kernel}")
    copied = [_bytes(found[1], found[2]) for line in text.splitlines() if (found := _COPY.search(line))]
    seconds = cost.get("optimal_seconds")
    figures = {
        "vmem_bytes": max((int(size) for line in calls for size in _VMEM.findall(line)), default=None),
        "vmem_limit": tile.budget(info),
        "hbm_bytes": _whole(cost.get("bytes accessed")),
        "flops": _whole(cost.get("flops")),
        "roofline_ms": None if seconds is None else round(1e3 * seconds, 4),
        "copies": len(copied),
        "copied_bytes": sum(copied),
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    return figures, _parts()


# The compiler's notes on an instruction, and a copy of an array in HBM: S(1) in a layout is VMEM.
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')
_COPY = re.compile(r"= \(?(\w+)\[([\d,]*)\]\{[^}]*\}[^=]* (?:copy|copy-start|transpose)\(")
_BITS = re.compile(r"\d+")


def _parts() -> dict[str, list[tuple[int, int]]]:
    """The parts of the kernels that were compiled since the last call, from the compiler's dump of them."""
    found: dict[str, list[tuple[int, int]]] = {}
    for file in sorted(_dumps().glob("*-final_bundles.txt")):
        parts: list[list[int]] = []
        for line in file.read_text().splitlines():
            if not (bundle := _BUNDLE.match(line)):
                continue
            if bundle[1] or not parts:
                parts.append([0, 0])
            parts[-1][0] += 1
            parts[-1][1] += line.count("vmatmul")
        if any(products for _, products in parts):
            name = _KERNEL.sub(r"\1", file.name)
            found[name] = sorted(map(tuple, parts), reverse=True)  # type: ignore[arg-type]
    for file in _dumps().iterdir():
        file.unlink()
    return found


def _loop(parts: list[tuple[int, int]]) -> tuple[int | None, int | None]:
    """The part with the most products. If several have as many, it is the shortest: the one without masks."""
    known = [part for part in parts if part[1]]
    return min(known, key=lambda part: (-part[1], part[0])) if known else (None, None)


_KERNEL = re.compile(r"^\d+-(.+?)(?:\.\d+)?-\d+-final_bundles\.txt$")
_BUNDLE = re.compile(r" *(?:0x[0-9a-f]+|0) +(LB|PB|PF|LH|LE)?: ")


@functools.cache
def _dumps() -> Path:
    """The folder that libtpu writes the code of kernels to, in a process that did not load it before."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    asked = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{asked} --xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true".strip()
    return folder


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.search(dtype)
    count = 1
    for size in filter(None, shape.split(",")):
        count *= int(size)
    return count * (int(bits[0]) if bits else 8) // 8


def _whole(number: float | None) -> int | None:
    return None if number is None else int(number)


@functools.cache
def _device(arch: str) -> Any:
    """A device to compile for, which cannot run anything."""
    if reason := why_not():
        raise RuntimeError(reason)
    # other processes compile at the same time, and there is no server to ask about this machine's TPUs
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    _dumps()
    return topologies.get_topology_desc(_TOPOLOGIES[arch], platform="tpu").devices[0]
