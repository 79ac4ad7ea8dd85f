"""Implementations of attention, jfa's and others', with a common interface. Other libraries are imported only if used.

Each has a function that returns a Program for one call; its exceptions become records with a reason (outcome.of).
"""

import dataclasses
import functools
import importlib.util
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa

from . import in_torch, machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The parameters of an attention call, except the arrays."""

    causal: bool
    direction: str
    mask: jfa.BlockMask | None = None  # besides the causal one, of calls of SPARSE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One implementation, compiled for a call.

    Attributes:
      prepare: (q, k, v, d_out) -> arguments of run; not timed. Linear attention has more arrays before d_out.
      run: (*prepared) -> outputs, on the device.
      read: outputs -> arrays [b, t, h, d]: the output, then the gradients of q, k and v, depending on the direction.
      num_bytes: prepared -> total size of its arrays.
      peak_bytes: memory that the program uses in addition to its arguments; None: unknown.
      about: record fields of a library other than JAX: its version and number of threads.
    """

    prepare: Callable[..., tuple]
    run: Callable
    read: Callable[[Any], tuple[np.ndarray, ...]]
    num_bytes: Callable[[tuple], int]
    peak_bytes: int | None
    about: Mapping[str, Any] = types.MappingProxyType({})


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

    def program(call: Call, *arrays) -> Program:
        attend = attend_for(call.causal)
        function, prepare = {"forward": _forward, "backward": _backward, "both": _both}[call.direction](attend, *arrays)
        run = _compiled(function, *prepare(*arrays))
        return Program(
            prepare=prepare,
            run=run,
            read=lambda outputs: tuple(np.asarray(x) for x in jax.tree.leaves(outputs)),
            num_bytes=lambda prepared: sum(x.nbytes for x in jax.tree.leaves(prepared)),
            peak_bytes=_memory_bytes(run),
        )

    return program


def _forward(attend: Callable, *arrays) -> tuple[Callable, Callable]:
    """(function to compile, function from the arrays, the last of which is d_out, to its arguments)."""
    return attend, lambda *arrays: arrays[:-1]


def _backward(attend: Callable, *arrays) -> tuple[Callable, Callable]:
    residuals = _compiled(lambda *inputs: jax.vjp(attend, *inputs)[1], *arrays[:-1])
    return lambda pull, d_out: pull(d_out), lambda *arrays: (residuals(*arrays[:-1]), arrays[-1])


def _both(attend: Callable, *arrays) -> tuple[Callable, Callable]:
    def both(*arrays):
        out, pull = jax.vjp(attend, *arrays[:-1])
        return out, *pull(arrays[-1])

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


def of_torch(attend_for: Callable[[Call, Any], Callable], *, heads_first: bool = True) -> Callable[..., Program]:
    """A function that makes Programs from attend_for(call, torch's device) -> attend(q, k, v).

    heads_first: attend takes [b, h, t, d].
    """

    def program(call: Call, *arrays) -> Program:
        own = in_torch.Attention(attend_for(call, in_torch.device()), call.direction, heads_first=heads_first)

        def prepare(*arrays):
            return own.prepare([np.asarray(x, np.float32) for x in arrays], arrays[0].dtype.name)

        peak = own.peak_bytes(prepare(*arrays)) if in_torch.device() != "cpu" else None
        return Program(
            prepare=prepare,
            run=own.run,
            read=own.read,
            num_bytes=own.num_bytes,
            peak_bytes=peak,
            about=in_torch.about(),
        )

    return program


def _sdpa(call: Call, device: Any) -> Callable:
    return in_torch.sdpa(call.causal)


def _flex(call: Call, device: Any) -> Callable:
    """torch's FlexAttention with the positions that a BlockMask shows; compiled, as its documentation asks for."""
    import torch  # type: ignore[import-not-found]
    from torch.nn.attention import flex_attention as flex  # type: ignore[import-not-found]

    assert call.mask is not None
    seen = torch.from_numpy(np.array(call.mask.to_array())).to(device)
    b, h, tq, tk = seen.shape
    visible = lambda row, head, query, key: seen[row % b, head % h, query, key] & (query >= key)  # noqa: E731
    size = dict(BLOCK_SIZE=(call.mask.block_q, call.mask.block_kv), device=device)
    mask = flex.create_block_mask(visible, b if b > 1 else None, h if h > 1 else None, tq, tk, **size)
    torch._dynamo.config.recompile_limit = 1000  # each mask is compiled anew
    attend = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _sparse(implementation: Any) -> Peer:
    def program(call: Call, *arrays) -> Program:
        def attend(q, k, v):
            # without the barrier XLA would sort the visits, which are constants, while it compiles
            mask = jax.lax.optimization_barrier(call.mask)
            return jfa.block_sparse_attention(q, k, v, mask, is_causal=call.causal, implementation=implementation)

        return of_jax(lambda causal: attend)(call, *arrays)

    return Peer(program=program, platforms=_jfa(implementation).platforms)


def _splash(call: Call, *arrays) -> Program:
    """JAX's splash attention for TPUs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    assert call.mask is not None
    seen = np.asarray(call.mask.to_array())
    if seen.shape[0] > 1:
        raise ValueError("splash attention has one mask for all rows of a batch")
    heads, (tq, tk) = arrays[0].shape[2], seen.shape[2:]
    seen = np.broadcast_to(seen[0] & np.tri(tq, tk, dtype=bool), (heads, tq, tk))
    mask = masks.MultiHeadMask([masks.NumpyMask(one) for one in seen])
    splash = kernel.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1)

    def attend(q, k, v):
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
        out: Any = jax.vmap(splash)(q, k, v)
        return out.swapaxes(1, 2)

    return of_jax(lambda causal: attend)(call, *arrays)


PEERS: dict[str, Peer] = {
    "reference": _jfa("reference"),
    "xla": _jfa("xla"),
    "triton": _jfa("triton"),
    "jax.nn": Peer(program=_jax_nn("xla")),
    "cudnn": Peer(program=_jax_nn("cudnn"), platforms=("cuda",)),
    "pallas": Peer(program=of_jax(_pallas), platforms=("rocm", "cuda", "tpu")),
    "tokamax": Peer(program=of_jax(_tokamax), module="tokamax"),
    "jax-aiter": Peer(program=of_jax(_jax_aiter), module="jax_aiter", platforms=("rocm",)),
    "torch": Peer(program=of_torch(_sdpa), module="torch"),
    "tpu": _jfa("tpu"),
}


def _linear(implementation: Any) -> Peer:
    def attend(q, k, v, log_decay, beta=None):
        return jfa.linear_attention(q, k, v, log_decay, beta=beta, implementation=implementation)[0]

    return Peer(program=of_jax(lambda causal: attend), platforms=_jfa(implementation).platforms)


def _softmax(q, k, v, *decays):
    """Attention of the same shapes, with the keys of each value head."""
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    return jfa.dot_product_attention(q, k, v, is_causal=True)


def _quadratic(q, k, v, log_decay, beta=None):
    """Linear attention as a product of a masked matrix of all pairs of tokens with the values."""
    if beta is not None or log_decay.ndim == 4:
        raise NotImplementedError("the quadratic form is of decays per head without a delta rule")
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    t = v.shape[1]
    total = jnp.cumsum(log_decay, axis=1).swapaxes(1, 2)  # [b, h, t]
    between = jnp.where(jnp.tri(t, dtype=bool), total[..., None] - total[:, :, None], -jnp.inf)
    scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") * q.shape[3] ** -0.5
    weights = (scores * jnp.exp(between)).astype(v.dtype)
    return jnp.einsum("bhij,bjhd->bihd", weights, v, precision="highest")


def _of_torch_heads(q, k, v) -> tuple:
    """Queries and keys of each value head."""
    each = v.shape[2] // k.shape[2]
    return (q, k) if each == 1 else tuple(x.repeat_interleave(each, dim=2) for x in (q, k))


def _fla(call: Call, device: Any) -> Callable:
    from fla.ops import gated_delta_rule, gla, simple_gla  # type: ignore[import-not-found]

    def attend(q, k, v, log_decay, beta=None):
        q, k = _of_torch_heads(q, k, v)
        if beta is not None:
            if q.element_size() == 4:
                raise NotImplementedError("flash-linear-attention's delta rule takes 16 bits only")
            return gated_delta_rule.chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta)[0]
        chunks = simple_gla.chunk_simple_gla if log_decay.ndim == 3 else gla.chunk_gla
        return chunks(q, k, v, g=log_decay)[0]

    return attend


def _transformers(call: Call, device: Any) -> Callable:
    """What transformers' own layers call if there are no kernels for them: torch operations over chunks."""
    from transformers.models.mamba2 import modeling_mamba2 as mamba2  # type: ignore[import-not-found]
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next  # type: ignore[import-not-found]

    def attend(q, k, v, log_decay, beta=None):
        if log_decay.ndim == 4:
            raise NotImplementedError("transformers has no layers whose decays are those of columns")
        if beta is not None:
            q, k = _of_torch_heads(q, k, v)
            return qwen3_next.torch_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta)[0]
        # its decay is exp(A dt), and its values are multiplied by dt
        step, rate = -log_decay, -log_decay.new_ones(v.shape[2])
        queries = q * q.shape[3] ** -0.5
        return mamba2.mamba2_chunk_scan(v / step[..., None], step, rate, k, queries, chunk_size=256)

    return attend


# of linear attention; attention: with a softmax, of the same shapes
LINEAR: dict[str, Peer] = {
    "xla": _linear("xla"),
    "triton": _linear("triton"),
    "reference": _linear("reference"),
    "attention": Peer(program=of_jax(lambda causal: _softmax)),
    "quadratic": Peer(program=of_jax(lambda causal: _quadratic)),
    "fla": Peer(program=of_torch(_fla, heads_first=False), module="fla", platforms=("rocm", "cuda")),
    "transformers": Peer(program=of_torch(_transformers, heads_first=False), module="transformers"),
}

# of a causal call with a BlockMask; dense: without the mask
SPARSE: dict[str, Peer] = {
    "dense": _jfa(None),
    "xla": _sparse("xla"),
    "triton": _sparse("triton"),
    "flex": Peer(program=of_torch(_flex), module="torch"),
    "splash": Peer(program=_splash, platforms=("tpu",)),
}


def usual(platform: str, known: Mapping[str, Peer] = PEERS) -> tuple[str, ...]:
    """The implementations that are measured on a platform by default: those that are installed."""
    return tuple(
        name
        for name, peer in known.items()
        if platform in peer.platforms and importlib.util.find_spec(peer.module) is not None
    )


def program(name: str, call: Call, *arrays: jax.Array, known: Mapping[str, Peer] = PEERS) -> Program:
    """The Program of an implementation. arrays: q, k, v, d_out.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    peer = known[name]
    if importlib.util.find_spec(peer.module) is None:
        raise ModuleNotFoundError(f"the package {peer.module} is not installed")
    return peer.program(call, *arrays)
