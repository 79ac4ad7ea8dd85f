"""Implementations of attention, jfa's and others', with a common interface. Other libraries are imported only if used.

Each has a function that returns a Program for one call; its exceptions become records with a reason (outcome.of).
"""

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jfa

from . import machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The parameters of an attention call, except the arrays."""

    causal: bool
    direction: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One implementation, compiled for a call.

    Attributes:
      prepare: (q, k, v, d_out) -> arguments of run; not timed.
      run: (*prepared) -> outputs, on the device.
      read: outputs -> arrays [b, t, h, d]: the output, then the gradients of q, k and v, depending on the direction.
      num_bytes: prepared -> total size of its arrays.
      peak_bytes: memory that the program uses in addition to its arguments; None: unknown.
    """

    prepare: Callable[..., tuple]
    run: Callable
    read: Callable[[Any], tuple[np.ndarray, ...]]
    num_bytes: Callable[[tuple], int]
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One implementation.

    Attributes:
      program: (call, q, k, v, d_out) -> Program.
      module: module that must be installed.
      platforms: platforms on which it is measured by default.
    """

    program: Callable[..., Program]
    module: str = "jax"
    platforms: tuple[str, ...] = ("rocm", "cuda", "tpu", "cpu")


def of_jax(attend_for: Callable[[bool], Callable]) -> Callable[..., Program]:
    """A function that makes Programs from attend_for(causal) -> attend(q, k, v)."""

    def program(call: Call, q, k, v, d_out) -> Program:
        attend = attend_for(call.causal)
        function, prepare = {"forward": _forward, "backward": _backward, "both": _both}[call.direction](attend, q, k, v)
        run = _compiled(function, *prepare(q, k, v, d_out))
        return Program(
            prepare=prepare,
            run=run,
            read=lambda outputs: tuple(np.asarray(x) for x in jax.tree.leaves(outputs)),
            num_bytes=lambda prepared: sum(x.nbytes for x in jax.tree.leaves(prepared)),
            peak_bytes=_memory_bytes(run),
        )

    return program


def _forward(attend: Callable, q, k, v) -> tuple[Callable, Callable]:
    """(function to compile, function from (q, k, v, d_out) to its arguments)."""
    return attend, lambda q, k, v, d_out: (q, k, v)


def _backward(attend: Callable, q, k, v) -> tuple[Callable, Callable]:
    residuals = _compiled(lambda q, k, v: jax.vjp(attend, q, k, v)[1], q, k, v)
    return lambda pull, d_out: pull(d_out), lambda q, k, v, d_out: (residuals(q, k, v), d_out)


def _both(attend: Callable, q, k, v) -> tuple[Callable, Callable]:
    def both(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    return both, lambda *arrays: arrays


def _compiled(function: Callable, *arrays):
    """Raises MemoryError if a CPU lacks the memory: there, unlike on a GPU, the process would be killed."""
    compiled = jax.jit(function).lower(*arrays).compile()
    free = machine.free_bytes() if jax.default_backend() == "cpu" else None
    needs = _memory_bytes(compiled)
    if free is not None and needs > free:
        raise MemoryError(f"needs {needs / 2**30:.1f} GiB in addition to its arguments, {free / 2**30:.1f} are free")
    return compiled


def _memory_bytes(compiled) -> int:
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0


def _jfa(implementation: Any) -> Peer:
    kernels = {"triton": ("rocm", "cuda"), "tpu": ("tpu",)}  # interpreters are not measured
    platforms = kernels.get(implementation, Peer.platforms)
    return Peer(
        program=of_jax(
            lambda causal: functools.partial(jfa.dot_product_attention, is_causal=causal, implementation=implementation)
        ),
        platforms=platforms,
    )


def _jax_nn(implementation: Any) -> Callable[..., Program]:
    return of_jax(
        lambda causal: functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=implementation)
    )


def _pallas(causal: bool) -> Callable:
    """JAX's own Pallas op; for GPUs the deprecated one."""
    if jax.default_backend() == "tpu":
        from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention

        def attend(q, k, v):
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            return flash_attention(q, k, v, causal=causal, sm_scale=q.shape[-1] ** -0.5).swapaxes(1, 2)

        return attend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.attention import mha
    on_cpu = jax.default_backend() == "cpu"

    def attend_on_gpu(q, k, v):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return mha(q, k, v, None, sm_scale=q.shape[-1] ** -0.5, causal=causal, interpret=on_cpu)

    return attend_on_gpu


def _tokamax(causal: bool) -> Callable:
    import tokamax  # type: ignore[import-not-found]

    return functools.partial(tokamax.dot_product_attention, is_causal=causal)


def _jax_aiter(causal: bool) -> Callable:
    from jax_aiter.mha import flash_attn_func  # type: ignore[import-not-found]

    def attend(q, k, v):
        out = flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _torch(call: Call, q, k, v, d_out) -> Program:
    """scaled_dot_product_attention on torch's device; it takes heads before tokens."""
    import torch  # type: ignore[import-not-found]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, q.dtype.name)
    wants = call.direction != "forward"

    def tensor(x):
        rows = torch.from_numpy(np.asarray(x, np.float32)).to(device, dtype)
        return rows.transpose(1, 2).contiguous()

    def attend(q, k, v):
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(q, k, v, is_causal=call.causal, enable_gqa=q.shape[1] != k.shape[1])

    def prepare(q, k, v, d_out):
        arrays = tuple(tensor(x).requires_grad_(wants) for x in (q, k, v))
        cotangent = tensor(d_out)
        return (attend(*arrays), arrays, cotangent) if call.direction == "backward" else (arrays, cotangent)

    def done(*outputs):
        if device == "cuda":
            torch.cuda.synchronize()
        return outputs

    def run(*prepared):
        if call.direction == "backward":
            out, arrays, cotangent = prepared
            return done(*torch.autograd.grad(out, arrays, cotangent, retain_graph=True))
        arrays, cotangent = prepared
        out = attend(*arrays)
        return done(out, *torch.autograd.grad(out, arrays, cotangent)) if wants else done(out)

    def num_bytes(prepared):
        arrays, cotangent = prepared[-2:]
        return sum(x.numel() * x.element_size() for x in (*arrays, cotangent))

    def read(outputs):
        return tuple(x.detach().transpose(1, 2).float().cpu().numpy() for x in outputs)

    peak = None
    if device == "cuda":
        inputs = prepare(q, k, v, d_out)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*inputs)
        peak = torch.cuda.max_memory_allocated() - before
    return Program(prepare=prepare, run=run, read=read, num_bytes=num_bytes, peak_bytes=peak)


PEERS: dict[str, Peer] = {
    "reference": _jfa("reference"),
    "xla": _jfa("xla"),
    "triton": _jfa("triton"),
    "jax.nn": Peer(program=_jax_nn("xla")),
    "cudnn": Peer(program=_jax_nn("cudnn"), platforms=("cuda",)),
    "pallas": Peer(program=of_jax(_pallas), platforms=("rocm", "cuda", "tpu")),
    "tokamax": Peer(program=of_jax(_tokamax), module="tokamax"),
    "jax-aiter": Peer(program=of_jax(_jax_aiter), module="jax_aiter", platforms=("rocm",)),
    "torch": Peer(program=_torch, module="torch"),
    "tpu": _jfa("tpu"),
}


def usual(platform: str) -> tuple[str, ...]:
    """The implementations that are measured on a platform by default: those that are installed."""
    return tuple(
        name
        for name, peer in PEERS.items()
        if platform in peer.platforms and importlib.util.find_spec(peer.module) is not None
    )


def program(name: str, call: Call, q, k, v, d_out) -> Program:
    """The Program of an implementation.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    peer = PEERS[name]
    if importlib.util.find_spec(peer.module) is None:
        raise ModuleNotFoundError(f"the package {peer.module} is not installed")
    return peer.program(call, q, k, v, d_out)
