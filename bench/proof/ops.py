"""Table of the library's kernels: how each is called and configured, and which configurations are worth trying."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jfa
from jfa import backends, quant, row_ops, write_ops
from jfa.block_mask import SparseOperands
from jfa.device import probe
from jfa.kernels.triton import flash_bwd, linear_bwd
from jfa.types import (
    AttentionSpec,
    DeviceInfo,
    FlashConfig,
    LinearKernelConfig,
    LinearOperands,
    LinearSpec,
    Operands,
    PagedConfig,
    PagedOperands,
    ProductConfig,
    ProductOperands,
    ProductSpec,
    RowSpec,
    TpuConfig,
)

from .. import names
from . import aot


def _kernels(device: DeviceInfo | None = None) -> Any:
    """The backend that has kernels for a device; None: for the one that is traced for."""
    return "tpu" if (device or probe()).platform == "tpu" else "triton"


LENGTH = 4096  # of all representative calls: longer than any tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """The configurations of a kernel that are worth compiling, for tune.py.

    starts: (arch, dtype, head_dim) to the configurations to start with, without the axis `grows`.
    grows: (axis, values); increased from the smallest value until a kernel spills, does not fit or gets slower.
    late: (arch, dtype) to {axis: values}; a configuration starts with the first value of each, and the others are tried
    one at a time on the best candidates.
    registers: a lower bound of a lane's 4-byte registers, to skip hopeless tiles, which would compile for minutes.
    alike: dtypes for which only the best configurations of another dtype are tried.
    """

    starts: Callable[[str, str, int], list[dict[str, Any]]]
    grows: tuple[str, tuple[int, ...]]
    late: Callable[[str, str], Mapping[str, tuple[Any, ...]]]
    registers: Callable[[Mapping[str, Any], int, int], float]  # (config, head_dim, lanes of a wave)
    alike: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One kernel of the library: a row of the table, with one tuning table per architecture."""

    name: str  # name of the op in records
    direction: str  # "forward" or "backward"
    kernel: str  # name of its Pallas call and of its tuning table
    config_type: type
    # (dtype, head_dim, config or None for the library's default, variant) -> (function, args) that calls the kernel
    call: Callable[[str, int, Any, str], tuple[Callable, tuple]]
    default_config: Callable[[DeviceInfo, str, int], Any]  # the configuration that a plain call uses
    # the results of `call` to those of this kernel, so that without the others the call runs no other kernel
    own_results: Callable[[Any], Any] = lambda results: results
    bound: str = "matrix_bound"  # the figure shown in tables; "memory_bound_share" for kernels limited by memory
    variants: tuple[str, ...] = ()  # other calls of the same kernel, which a tuned configuration must also support
    sweep: Sweep | None  # None: the kernel has no tuning tables
    dtypes: tuple[str, ...] = names.FLASH_DTYPES
    head_dims: tuple[int, ...] = names.HEAD_DIMS  # of the tuning table; of products the group sizes
    between: tuple[int, ...] = names.BETWEEN


def _rows(dtype: str, head_dim: int, batch: int = 1, heads: int = 8) -> Any:
    return jax.ShapeDtypeStruct((batch, LENGTH, heads, head_dim), dtype)


def _operands(dtype: str, head_dim: int) -> Operands:
    q, kv = _rows(dtype, head_dim), _rows(dtype, head_dim, heads=2)
    return Operands(q, kv, kv)


def _flash_forward(dtype: str, head_dim: int, config: FlashConfig | None, variant: str) -> tuple[Callable, tuple]:
    """Causal, [1, 4096, 8, d] with two key heads."""
    batch = 1
    options: dict[str, Any] = {}
    if variant == "window and lengths":
        batch = 4
        lengths = jnp.full(batch, LENGTH, jnp.int32)
        options = dict(local_window_size=(1024, 0), key_value_seq_lengths=lengths, query_offset=lengths)
    elif variant == "padded head_dim":
        head_dim = head_dim * 5 // 8

    def call(q, k, v):
        return jfa.dot_product_attention(q, k, v, is_causal=True, implementation=_kernels(), config=config, **options)

    kv = _rows(dtype, head_dim, batch, 2)
    return call, (_rows(dtype, head_dim, batch), kv, kv)


def _flash_default(device: DeviceInfo, dtype: str, head_dim: int) -> FlashConfig:
    return backends.flash(_kernels(device)).default_config(_operands(dtype, head_dim), device)  # type: ignore[return-value]


def _flash_backward(dtype: str, head_dim: int, config: FlashConfig | None, variant: str) -> tuple[Callable, tuple]:
    """The backward pass of _flash_forward's call; config is used for each of its kernels."""
    if variant == "padded head_dim":
        head_dim = head_dim * 5 // 8
    q, kv = _rows(dtype, head_dim), _rows(dtype, head_dim, heads=2)
    residual = jax.ShapeDtypeStruct(q.shape[:3], "float32")

    def call(q, k, v, out, lse, d_out):
        device, operands = probe(), Operands(q, k, v)
        backend, spec = backends.flash(_kernels()), AttentionSpec(sm_scale=head_dim**-0.5, causal=True)
        if reason := backend.why_not(operands, spec, device):
            raise jfa.UnsupportedError(reason)
        chosen = _backward_default(device, dtype, head_dim)
        if config is not None:
            chosen = config if device.platform == "tpu" else flash_bwd.BackwardConfig(dq=config, dkv=config)
        return backend.run_backward(operands, out, lse, d_out, jnp.zeros_like(lse), spec, chosen, device)

    return call, (q, kv, kv, q, residual, q)


def _backward_default(device: DeviceInfo, dtype: str, head_dim: int) -> Any:
    """The configuration of a call's backward pass."""
    backend, operands = backends.flash(_kernels(device)), _operands(dtype, head_dim)
    return backend.backward_config(operands, backend.default_config(operands, device), device)


def _backward_part(kernel: str) -> Callable[[DeviceInfo, str, int], FlashConfig]:
    return lambda device, dtype, head_dim: getattr(_backward_default(device, dtype, head_dim), kernel)


def sparse_operands(dtype: str, head_dim: int, variant: str = "") -> SparseOperands:
    """Shapes of a call of block-sparse attention, and its mask: whole and partial tiles, or per head whole ones."""
    if variant == "padded head_dim":
        head_dim = head_dim * 5 // 8
    return SparseOperands(_operands(dtype, head_dim), _block_mask(per_head=variant == "mask per head"))


@functools.cache
def _block_mask(*, per_head: bool) -> jfa.BlockMask:
    if per_head:
        return jfa.BlockMask.bigbird(LENGTH, LENGTH, heads=8)
    return jfa.BlockMask.sliding_window(LENGTH, LENGTH, (1023, 0), sinks=4)


def _sparse_forward(dtype: str, head_dim: int, config: FlashConfig | None, variant: str) -> tuple[Callable, tuple]:
    """Causal, [1, 4096, 8, d] with two key heads."""
    (q, k, v, *_), mask = sparse_operands(dtype, head_dim, variant)

    def call(q, k, v, mask):
        return jfa.block_sparse_attention(q, k, v, mask, is_causal=True, implementation="triton", config=config)

    return call, (q, k, v, mask)


def _sparse_default(device: DeviceInfo, dtype: str, head_dim: int) -> FlashConfig:
    return backends.sparse("triton").default_config(sparse_operands(dtype, head_dim), device)  # type: ignore[return-value]


def _sparse_backward(dtype: str, head_dim: int, config: FlashConfig | None, variant: str) -> tuple[Callable, tuple]:
    """The backward pass of _sparse_forward's call; config is used for each of its kernels."""
    operands = sparse_operands(dtype, head_dim, variant)
    q = operands.dense.q
    residual = jax.ShapeDtypeStruct(q.shape[:3], "float32")

    def call(operands, out, lse, d_out):
        device, backend, spec = probe(), backends.sparse("triton"), AttentionSpec(sm_scale=0.125, causal=True)
        if reason := backend.why_not(operands, spec, device):
            raise jfa.UnsupportedError(reason)
        chosen = _sparse_backward_default(device, dtype, head_dim)
        if config is not None:
            chosen = flash_bwd.BackwardConfig(dq=config, dkv=config)
        found = backend.run_backward(operands, out, lse, d_out, jnp.zeros_like(lse), spec, chosen, device)
        return found.q, found.k, found.v

    return call, (operands, q, residual, q)


def _sparse_backward_default(device: DeviceInfo, dtype: str, head_dim: int) -> flash_bwd.BackwardConfig:
    backend, operands = backends.sparse("triton"), sparse_operands(dtype, head_dim)
    return backend.backward_config(operands, backend.default_config(operands, device), device)


def _sparse_backward_part(kernel: str) -> Callable[[DeviceInfo, str, int], FlashConfig]:
    return lambda device, dtype, head_dim: getattr(_sparse_backward_default(device, dtype, head_dim), kernel)


# A decode batch, and the same rows with a prompt chunk each: 64 rows of up to 8192 tokens, 32 query heads over 8.
_PAGED_BATCH, _PAGED_CAPACITY, _PAGE_SIZE, _CHUNK = 64, 8192, 16, 64


def _paged_operands(dtype: str, head_dim: int, *, ragged: bool) -> PagedOperands:
    """Shapes of a paged call; dtype: one of names.PAGED_DTYPES."""
    of_queries, _, of_pages = dtype.partition(" on ")
    pages_per_seq = _PAGED_CAPACITY // _PAGE_SIZE
    pool, heads = (_PAGED_BATCH * pages_per_seq + 1, _PAGE_SIZE), 8
    stored = quant.stored_size(quant.kind_of(of_pages), head_dim) if of_pages else head_dim
    pages: Any = jax.ShapeDtypeStruct((*pool, heads * stored), of_pages or of_queries)
    scales: Any = jax.ShapeDtypeStruct((*pool, heads), "bfloat16") if of_pages else None

    def integers(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, "int32")

    return PagedOperands(
        q=jax.ShapeDtypeStruct((_PAGED_BATCH * (_CHUNK if ragged else 1), 32, head_dim), of_queries),  # type: ignore[arg-type]
        k_pages=pages,
        v_pages=pages,
        page_table=integers(_PAGED_BATCH, pages_per_seq),
        kv_len=integers(_PAGED_BATCH),
        query_start=integers(_PAGED_BATCH + 1) if ragged else None,
        k_scales=scales,
        v_scales=scales,
    )


def filled(args: Any) -> Any:
    """Seeded arrays for the shapes of a call's args. Rows of a page table are full, and their pages in random order."""
    if isinstance(args, PagedOperands):
        rows, pages_per_seq = args.page_table.shape
        pages = 1 + np.random.default_rng(0).permutation(rows * pages_per_seq)
        numbers: dict[str, Any] = {
            "page_table": jnp.asarray(pages.reshape(rows, pages_per_seq), jnp.int32),
            "kv_len": jnp.full(rows, args.capacity, jnp.int32),
        }
        if args.query_start is not None:
            numbers["query_start"] = jnp.arange(rows + 1, dtype=jnp.int32) * (args.q.shape[0] // rows)
        others = args._asdict() | dict.fromkeys(numbers)
        return PagedOperands(**filled(others) | numbers)
    leaves, structure = jax.tree.flatten(args, is_leaf=lambda one: isinstance(one, PagedOperands))
    return structure.unflatten(
        [
            filled(x) if isinstance(x, PagedOperands) else _random(key, x)
            for key, x in zip(jax.random.split(jax.random.key(0), len(leaves)), leaves, strict=True)
        ]
    )


def _random(key: jax.Array, x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.random.randint(key, x.shape, 0, 100, x.dtype)
    return jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)


def _paged(kernel: str) -> Callable[[str, int, PagedConfig | None, str], tuple[Callable, tuple]]:
    """The call of one of the paged kernels."""

    def call_of(dtype: str, head_dim: int, config: PagedConfig | None, variant: str) -> tuple[Callable, tuple]:
        options: dict[str, Any] = {}
        if variant == "window":
            options = dict(local_window_size=1024, sinks=jnp.zeros(32))
        elif variant == "tree":
            options = dict(tree_mask=jnp.tile(jnp.tril(jnp.ones((_CHUNK, _CHUNK), bool)), (_PAGED_BATCH, 1)))
        elif variant == "padded head_dim":
            head_dim = head_dim * 5 // 8
        operands = _paged_operands(dtype, head_dim, ragged=kernel == "ragged_paged_attention")

        def call(operands):
            q, k_pages, v_pages, page_table, kv_len, query_start, k_scales, v_scales, *_ = operands
            rows = (page_table, kv_len) if query_start is None else (page_table, kv_len, query_start)
            return getattr(jfa, kernel)(
                *(q, k_pages, v_pages, *rows),
                key_scales=k_scales,
                value_scales=v_scales,
                implementation=_kernels(),
                config=config,
                **options,
            )

        return call, (operands,)

    return call_of


def _paged_default(kernel: str) -> Callable[[DeviceInfo, str, int], PagedConfig]:
    def config(device: DeviceInfo, dtype: str, head_dim: int) -> PagedConfig:
        operands = _paged_operands(dtype, head_dim, ragged=kernel == "ragged_paged_attention")
        return backends.paged(_kernels(device)).default_config(operands, device)  # type: ignore[return-value]

    return config


_PARTS = 128  # of each row's keys: a loop that no compiler unrolls


def _merge(dtype: str, head_dim: int, config: PagedConfig | None, variant: str) -> tuple[Callable, tuple]:
    """The call of paged_decode_attention, with rows that are split."""
    call_of = _paged("paged_decode_attention")

    def call(operands):
        fn, _ = call_of(dtype, head_dim, config or _merge_default(probe(), dtype, head_dim), variant)
        return fn(operands)

    return call, call_of(dtype, head_dim, config, variant)[1]


def _merge_default(device: DeviceInfo, dtype: str, head_dim: int) -> PagedConfig:
    """That of the kernel whose results are merged."""
    default = _paged_default("paged_decode_attention")(device, dtype, head_dim)
    return dataclasses.replace(default, num_splits=_PARTS)


# A layer of a decoder: rows of a decode step or of a prompt, times a weight [4096, 4096].
_FEW_ROWS, _MANY_ROWS = 8, 512


def _weight(dtype: str, group_size: int, variant: str) -> jfa.QuantizedArray:
    """Shapes; dtype: one of names.PRODUCT_DTYPES, group_size: one of names.GROUP_SIZES."""
    group = group_size if group_size < LENGTH else None
    out, width = LENGTH, LENGTH
    if variant == "ragged":
        out, width = LENGTH - 24, LENGTH - (group or 24)
    return _quantized(dtype, out, width, group, minima=variant == "minima")


def _quantized(dtype: str, out: int, width: int, group: int | None, *, minima: bool = False) -> jfa.QuantizedArray:
    of_x, _, stored = dtype.partition(" on ")
    kind = quant.kind_of(stored)
    shape = (out,) if group is None else (out, width // group)

    def each(dtype: str, used: bool) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype) if used else None

    return jfa.QuantizedArray(
        values=jax.ShapeDtypeStruct((out, quant.stored_size(kind, width)), stored),  # type: ignore[arg-type]
        scales=each("bfloat16", True),
        zeros=each(stored, kind == "int4" and not minima),
        minima=each("float32", minima),
        group_size=group,
        rounds_inputs=int(of_x == "int8"),
    )


def _rows_of(weight: jfa.QuantizedArray, dtype: str, rows: int) -> Any:
    of_x = dtype.partition(" on ")[0]
    return jax.ShapeDtypeStruct((rows, weight.shape[-1]), "bfloat16" if of_x == "int8" else of_x)


def _product(rows: int) -> Callable[[str, int, ProductConfig | None, str], tuple[Callable, tuple]]:
    """The call with this number of rows; 4-bit numbers have zero points."""

    def call_of(dtype: str, group_size: int, config: ProductConfig | None, variant: str) -> tuple[Callable, tuple]:
        weight = _weight(dtype, group_size, variant)

        def call(x, weight):
            return jfa.quantized_matmul(x, weight, implementation=_kernels(), config=config)

        return call, (_rows_of(weight, dtype, rows), weight)

    return call_of


def _product_default(rows: int) -> Callable[[DeviceInfo, str, int], ProductConfig]:
    def config(device: DeviceInfo, dtype: str, group_size: int) -> ProductConfig:
        weight = _weight(dtype, group_size, "")
        operands = ProductOperands(
            _rows_of(weight, dtype, rows), weight.values, weight.scales, weight.zeros, weight.minima
        )
        spec = ProductSpec(group_size=weight.group_size, rounds_inputs=weight.rounds_inputs)
        return backends.product(_kernels(device)).default_config(operands, spec, device)  # type: ignore[return-value]

    return config


# A layer of a decoder: two value heads for each key head, as in Qwen3-Next.
_KEY_HEADS, _VALUE_HEADS, _SLOTS = 4, 8, 16


def linear_operands(name: str, dtype: str, head_dim: int) -> LinearOperands:
    """Shapes of a call of one of names.LINEAR_OPS; keys and values have the same head_dim."""
    keys, values = (_rows(dtype, head_dim, heads=heads) for heads in (_KEY_HEADS, _VALUE_HEADS))
    number: Any = jax.ShapeDtypeStruct((1, LENGTH, _VALUE_HEADS), "float32")
    state: Any = jax.ShapeDtypeStruct((1, _VALUE_HEADS, head_dim, head_dim), "float32")
    columns = (head_dim,) if name == "gated_linear_attention" else ()
    log_decay: Any = jax.ShapeDtypeStruct((*number.shape, *columns), "float32")
    beta = number if name == "delta_attention" else None
    return LinearOperands(keys, keys, values, log_decay=log_decay, state=state, beta=beta)


def _linear(name: str) -> Callable[[str, int, LinearKernelConfig | None, str], tuple[Callable, tuple]]:
    def call_of(dtype: str, head_dim: int, config: LinearKernelConfig | None, variant: str) -> tuple[Callable, tuple]:
        if variant == "padded head_dim":
            head_dim = head_dim * 5 // 8
        operands = linear_operands(name, dtype, head_dim)
        options: dict[str, Any] = dict(implementation="triton", config=config)

        def call(operands):
            q, k, v, log_decay, state, beta = operands
            return jfa.linear_attention(q, k, v, log_decay, initial_state=state, beta=beta, **options)

        def call_of_rows(operands, slot, query_start):
            (q, k, v, log_decay), beta = (x[0] for x in operands[:4]), operands.beta
            beta = None if beta is None else beta[0]
            return jfa.ragged_linear_attention(
                q, k, v, log_decay, operands.state, slot, query_start, beta=beta, **options
            )

        if variant != "rows":
            return call, (operands,)
        states: Any = jax.ShapeDtypeStruct((_SLOTS, *operands.state.shape[1:]), "float32")
        slot, start = (jax.ShapeDtypeStruct((n,), "int32") for n in (_SLOTS, _SLOTS + 1))
        return call_of_rows, (operands._replace(state=states), slot, start)

    return call_of


def _linear_default(name: str) -> Callable[[DeviceInfo, str, int], LinearKernelConfig]:
    def config(device: DeviceInfo, dtype: str, head_dim: int) -> LinearKernelConfig:
        operands = linear_operands(name, dtype, head_dim)
        return backends.linear("triton").default_config(operands, device)  # type: ignore[return-value]

    return config


def _linear_backward(name: str) -> Callable[[str, int, LinearKernelConfig | None, str], tuple[Callable, tuple]]:
    """The backward pass of _linear's call; config is used for each of its kernels."""

    def call_of(dtype: str, head_dim: int, config: LinearKernelConfig | None, variant: str) -> tuple[Callable, tuple]:
        if variant == "padded head_dim":
            head_dim = head_dim * 5 // 8
        operands = linear_operands(name, dtype, head_dim)

        def call(operands, d_out, d_state):
            device, spec = probe(), LinearSpec(scale=head_dim**-0.5)
            if reason := backends.linear("triton").why_not(operands, spec, device):
                raise jfa.UnsupportedError(reason)
            chosen = config or linear_bwd.default_config(operands, device)
            interpret = device.platform == "cpu"
            return linear_bwd.linear_attention_bwd(
                operands, d_out, d_state, spec=spec, config=chosen, interpret=interpret
            )

        return call, (operands, operands.v, operands.state)

    return call_of


def _linear_backward_default(name: str) -> Callable[[DeviceInfo, str, int], LinearKernelConfig]:
    def config(device: DeviceInfo, dtype: str, head_dim: int) -> LinearKernelConfig:
        return linear_bwd.default_config(linear_operands(name, dtype, head_dim), device)

    return config


def linear_why_not(name: str, device: DeviceInfo, dtype: str, head_dim: int) -> str | None:
    """Why the kernels do not support a call on a device; None if they do."""
    operands = linear_operands(name, dtype, head_dim)
    return backends.linear("triton").why_not(operands, LinearSpec(scale=1.0), device)


def _linear_ops(name: str) -> list[Op]:
    """The forward kernel and those of the backward pass.

    They have no tuning tables: RDNA has no tile for some entries, and the figures do not see the substitution's loop.
    """
    forward = Op(
        name=name,
        direction="forward",
        kernel=name,
        config_type=LinearKernelConfig,
        call=_linear(name),
        default_config=_linear_default(name),
        variants=("rows", "padded head_dim"),
        dtypes=names.LINEAR_DTYPES,
        sweep=None,
    )
    backward = dataclasses.replace(
        forward,
        direction="backward",
        call=_linear_backward(name),
        default_config=_linear_backward_default(name),
        variants=("padded head_dim",),
    )
    kernels = (f"{name}_{part}" for part in ("states", "dstates", "dqkv"))
    return [forward, *(dataclasses.replace(backward, kernel=kernel) for kernel in kernels)]


def _sparse_ops() -> list[Op]:
    """The kernels of attention with a BlockMask; they have no tables of their own, but use those of flash attention."""
    forward = Op(
        name="block_sparse_attention",
        direction="forward",
        kernel="block_sparse_attention",
        config_type=FlashConfig,
        call=_sparse_forward,
        default_config=_sparse_default,
        variants=("mask per head", "padded head_dim"),
        sweep=None,
    )
    backward = dataclasses.replace(forward, direction="backward", call=_sparse_backward)
    return [
        forward,
        *(
            dataclasses.replace(
                backward, kernel=f"block_sparse_attention_{part}", default_config=_sparse_backward_part(part)
            )
            for part in ("dq", "dkv")
        ),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoConfig:
    """Of a kernel without tile sizes."""


def _write(dtype: str, head_dim: int, config: NoConfig | None, variant: str) -> tuple[Callable, tuple]:
    """A token for each row of _paged_operands, into its pages."""
    if variant == "padded head_dim":
        head_dim = head_dim * 5 // 8
    rows = _paged_operands(dtype, head_dim, ragged=False)
    pages, scales = rows.k_pages, rows.k_scales
    of_new = dtype.partition(" on ")[0]
    keys = pages if scales is None else jfa.QuantizedArray(values=pages, scales=scales, group_size=head_dim)

    def call(qkv, cos, sin, slots, keys, values):
        how: dict[str, Any] = dict(head_dim=head_dim, implementation="triton")
        if not write_ops.serves(qkv, keys, values, **how):
            raise jfa.UnsupportedError("the kernel does not support the call")
        return write_ops.rotate_and_write(qkv, cos, sin, slots, keys, values, **how)

    angles = jax.ShapeDtypeStruct((_PAGED_BATCH, head_dim // 2), "float32")
    qkv = jax.ShapeDtypeStruct((_PAGED_BATCH, (32 + 2 * 8) * head_dim), of_new)
    return call, (qkv, angles, angles, rows.kv_len, keys, keys)


def _few_rows(dtype: str, columns: int, config: NoConfig | None, variant: str) -> tuple[Callable, tuple]:
    """A product of Llama-3-8B's decoder: of queries, keys and values, or, by the variant, of another part of it.

    Weights in 8 bits have a scale for each row, or groups of 128; those in 4 bits groups of 128, or of 32.
    """
    of_x, _, stored = dtype.partition(" on ")
    outs, hidden = {"": (columns, 1024, 1024), "gate": (14336, 14336)}.get(variant, (columns,)), columns
    activation = "silu" if variant == "gate" else None
    if variant == "ragged":
        outs, columns = tuple(out - 24 for out in outs), columns - (128 if stored else 24)
    spec = RowSpec(activation=activation, eps=1e-5 if dtype == "bfloat16" and variant != "residual" else None)
    groups = (32, 128) if stored == "uint8" else (128, None)

    def array(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, of_x)

    x, scale, residual = array(_FEW_ROWS, columns), array(columns), array(_FEW_ROWS, hidden)
    weights: tuple[Any, ...] = tuple(array(out, columns) for out in outs)
    if stored:
        weights = tuple(_quantized(dtype, out, columns, groups[variant != "groups"]) for out in outs)

    def call(x, weights, scale, residual):
        if not row_ops.serves(x, weights, spec, implementation="triton"):
            raise jfa.UnsupportedError("the kernel does not support the call")
        given: dict[str, Any] = dict(scale=None if spec.eps is None else scale, implementation="triton")
        given["residual"] = residual if variant == "residual" else None
        return row_ops.matmul_few_rows(x, weights, spec, **given)

    return call, (x, weights, scale, residual)


# These starting points were selected by wider sweeps of all architectures, so that a sweep takes minutes, not an hour.


def _forward_starts(arch: str, dtype: str, head_dim: int) -> list[dict[str, Any]]:
    """16 or 32 queries per wave: with fewer, waves compute redundant products; with more, a tile spills."""
    if aot.is_cdna(arch) and dtype == "float32":
        pairs = [(32, 4), (64, 4), (128, 8)]
    elif aot.is_cdna(arch):
        pairs = [(64, 4), (128, 8)] if head_dim > 128 else [(128, 4), (256, 8)]
    elif aot.is_amd(arch) and dtype == "float32":
        pairs = [(16, 4), (16, 8), (32, 8)]
    elif aot.is_amd(arch):
        pairs = [(32, 4), (64, 4)] if head_dim > 128 else [(64, 4), (128, 8)]
    else:
        pairs = [(64, 4), (128, 4), (128, 8), (256, 8)] if dtype != "float32" else [(32, 4), (64, 4), (32, 8), (64, 8)]
    return _with_chunks(arch, dtype, head_dim, [dict(block_q=rows, num_warps=warps) for rows, warps in pairs])


def _dq_starts(arch: str, dtype: str, head_dim: int) -> list[dict[str, Any]]:
    if aot.is_cdna(arch):
        pairs = [(64, 4)] if dtype == "float32" or head_dim > 128 else [(64, 4), (128, 4)]
    elif aot.is_amd(arch):
        pairs = [(16, 4), (16, 8)] if dtype == "float32" else [(32, 4), (64, 4)] if head_dim <= 128 else [(32, 4)]
    else:
        pairs = [(32, 4), (64, 4), (128, 4)]
    return _with_chunks(arch, dtype, head_dim, [dict(block_q=rows, num_warps=warps) for rows, warps in pairs])


def _dkv_starts(arch: str, dtype: str, head_dim: int) -> list[dict[str, Any]]:
    if aot.is_cdna(arch):
        pairs = [(32, 4), (64, 4)] if dtype == "float32" else [(64, 4), (64, 8)] if head_dim > 128 else [(64, 4)]
        pairs += [(128, 4)] if head_dim == 64 and dtype != "float32" else []
    elif aot.is_amd(arch):
        pairs = [(16, 4), (16, 8)] if dtype == "float32" else [(32, 4), (64, 4)] if head_dim <= 128 else [(32, 4)]
    else:
        pairs = [(16, 4), (32, 4), (32, 8)] if dtype == "float32" else [(32, 4), (64, 4), (128, 4), (64, 8)]
    return _with_chunks(arch, dtype, head_dim, [dict(block_kv=rows, num_warps=warps) for rows, warps in pairs])


def _with_chunks(arch: str, dtype: str, head_dim: int, starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """RDNA has too few registers for tiles of a wide head_dim, which is therefore split into chunks."""
    if not arch.startswith("gfx1"):
        return starts
    sizes: tuple[dict[str, int], ...] = ({"block_d": 32}, {"block_d": 64}) if head_dim > 128 else ({}, {"block_d": 32})
    return [{**start, **chunk} for start in starts for chunk in sizes]


def _switches(arch: str, dtype: str) -> dict[str, tuple[Any, ...]]:
    """The first value of each is the one that is nearly always best."""
    if not aot.is_amd(arch):
        return {"num_stages": (2, 1, 3)}
    axes: dict[str, tuple[Any, ...]] = {"num_stages": (1,)}  # pipelining uses registers that a tile needs
    if dtype == "bfloat16":
        # gfx950 has an instruction for the conversion
        axes["round_half_up"] = (False, True) if arch == "gfx950" else (True, False)
    return axes


def _decode_starts(arch: str, dtype: str, head_dim: int) -> list[dict[str, Any]]:
    """A group of heads is at most 16 rows here, which one wave computes: more waves do redundant work."""
    return _with_chunks(arch, dtype, head_dim, [dict(block_q=16, num_warps=warps) for warps in (1, 2, 4)])


def _ragged_starts(arch: str, dtype: str, head_dim: int) -> list[dict[str, Any]]:
    """The tiles of the forward kernel except the tallest, of which rows that decode fill only a part."""
    if aot.is_cdna(arch) and head_dim > 128:
        return [dict(block_q=64, num_warps=warps) for warps in (4, 8)]
    starts = _forward_starts(arch, dtype.partition(" on ")[0], head_dim)
    if arch.startswith("gfx1") and head_dim > 128:
        starts = [*_with_chunks(arch, dtype, head_dim, [dict(block_q=16, num_warps=4)]), *starts]  # quantized pages
    return [start for start in starts if start["block_q"] <= 128]


def _decode_switches(arch: str, dtype: str) -> dict[str, tuple[Any, ...]]:
    of_queries, _, of_pages = dtype.partition(" on ")
    axes = _switches(arch, of_queries)
    if aot.is_amd(arch) and of_pages == "float8_e4m3fn":
        # gfx950 and gfx1201 have instructions for the conversion
        axes["fp8_by_bits"] = (False, True) if arch in ("gfx950", "gfx1201") else (True, False)
    return axes


def _ragged_switches(arch: str, dtype: str) -> dict[str, tuple[Any, ...]]:
    """The first, best value of each switch."""
    return {name: values[:1] for name, values in _decode_switches(arch, dtype).items()}


def _few_rows_starts(arch: str, dtype: str, group_size: int) -> list[dict[str, Any]]:
    """64 rows of the weight per wave: with fewer, the waves load x too often."""
    pairs = [(64, 1), (128, 2)] if aot.is_amd(arch) else [(64, 4), (128, 4)]
    return [dict(block_rows=16, block_out=out, num_warps=warps) for out, warps in pairs]


def _many_rows_starts(arch: str, dtype: str, group_size: int) -> list[dict[str, Any]]:
    if aot.is_cdna(arch):
        tiles = [(64, 256, 8), (128, 128, 4), (128, 128, 8), (128, 256, 8)]
    else:
        tiles = [(64, 64, 4), (64, 128, 4), (128, 128, 8)]
    return [dict(block_rows=rows, block_out=out, num_warps=warps) for rows, out, warps in tiles]


_PRODUCTS_ALIKE = {
    "bfloat16 on float8_e4m3fn": "bfloat16 on int8",
    "float16 on int8": "bfloat16 on int8",
    "float16 on float8_e4m3fn": "bfloat16 on int8",
    "float16 on uint8": "bfloat16 on uint8",
}


def _stages(arch: str, dtype: str) -> dict[str, tuple[Any, ...]]:
    return {"num_stages": _switches(arch, "float32")["num_stages"]}


def _product_registers(config: Mapping[str, Any], group_size: int, lanes: int) -> float:
    """The sums in float32, and the numbers of a tile in 16 bits."""
    sums = config["block_rows"] * config["block_out"]
    return (sums + config["block_out"] * config["block_in"] / 2) / (config["num_warps"] * lanes)


_PAGED_ALIKE = {"float16": "bfloat16"} | {
    dtype: "bfloat16 on int8" for dtype in names.PAGED_DTYPES if " on " in dtype and dtype != "bfloat16 on int8"
}


OPS = (
    Op(
        name="flash_attention",
        direction="forward",
        kernel="flash_attention",
        config_type=FlashConfig,
        call=_flash_forward,
        default_config=_flash_default,
        variants=("window and lengths", "padded head_dim"),
        sweep=Sweep(
            starts=_forward_starts,
            grows=("block_kv", (16, 32, 64, 128)),
            late=_switches,
            # the accumulator and the scores in float32, the queries in 16 bits
            registers=lambda config, head_dim, lanes: (
                config["block_q"]
                * ((1.0 if config.get("block_d") else 1.5) * head_dim + config["block_kv"])
                / (config["num_warps"] * lanes)
            ),
            alike={"float16": "bfloat16"},
        ),
    ),
    Op(
        name="flash_attention",
        direction="backward",
        kernel="flash_attention_dq",
        config_type=FlashConfig,
        call=_flash_backward,
        default_config=_backward_part("dq"),
        own_results=lambda gradients: gradients.q,
        variants=("padded head_dim",),
        sweep=Sweep(
            starts=_dq_starts,
            grows=("block_kv", (16, 32, 64)),
            late=_switches,
            # the accumulator, two tiles of scores, and q and do in 16 bits
            registers=lambda config, head_dim, lanes: (
                config["block_q"]
                * ((1.0 if config.get("block_d") else 2.0) * head_dim + 2 * config["block_kv"])
                / (config["num_warps"] * lanes)
            ),
            alike={"float16": "bfloat16"},
        ),
    ),
    Op(
        name="flash_attention",
        direction="backward",
        kernel="flash_attention_dkv",
        config_type=FlashConfig,
        call=_flash_backward,
        default_config=_backward_part("dkv"),
        own_results=lambda gradients: (gradients.k, gradients.v),
        variants=("padded head_dim",),
        sweep=Sweep(
            starts=_dkv_starts,
            grows=("block_q", (16, 32, 64)),
            late=_switches,
            # two accumulators, two tiles of scores, and k and v in 16 bits
            registers=lambda config, head_dim, lanes: (
                config["block_kv"]
                * ((2.0 if config.get("block_d") else 3.0) * head_dim + 2 * config["block_q"])
                / (config["num_warps"] * lanes)
            ),
            alike={"float16": "bfloat16"},
        ),
    ),
    Op(
        name="flash_attention",
        direction="backward",
        kernel="flash_attention_bwd",
        config_type=TpuConfig,
        call=_flash_backward,
        default_config=_backward_default,
        sweep=None,
    ),
    Op(
        name="paged_decode_attention",
        direction="forward",
        kernel="paged_decode_attention",
        config_type=PagedConfig,
        call=_paged("paged_decode_attention"),
        default_config=_paged_default("paged_decode_attention"),
        bound="memory_bound_share",
        variants=("window", "padded head_dim"),
        dtypes=names.PAGED_DTYPES,
        sweep=Sweep(
            starts=_decode_starts,
            grows=("block_kv", (16, 32, 64)),
            late=_decode_switches,
            registers=lambda config, head_dim, lanes: (
                config["block_kv"] * head_dim / 2 / (config["num_warps"] * lanes)  # the keys of a tile in 16 bits
            ),
            alike=_PAGED_ALIKE,
        ),
    ),
    Op(
        name="paged_decode_attention",
        direction="forward",
        kernel="split_kv_merge",
        config_type=PagedConfig,
        call=_merge,
        default_config=_merge_default,
        bound="memory_bound_share",
        variants=("window", "padded head_dim"),
        sweep=None,
    ),
    Op(
        name="ragged_paged_attention",
        direction="forward",
        kernel="ragged_paged_attention",
        config_type=PagedConfig,
        call=_paged("ragged_paged_attention"),
        default_config=_paged_default("ragged_paged_attention"),
        variants=("window", "padded head_dim"),
        dtypes=names.PAGED_DTYPES,
        sweep=Sweep(
            starts=_ragged_starts,
            grows=("block_kv", (16, 32, 64)),
            late=_ragged_switches,
            registers=lambda config, head_dim, lanes: (
                config["block_q"]
                * ((1.0 if config.get("block_d") else 1.5) * head_dim + config["block_kv"])
                / (config["num_warps"] * lanes)
            ),
            alike=_PAGED_ALIKE,
        ),
    ),
    Op(
        name="quantized_matmul_few_rows",
        direction="forward",
        kernel="quantized_matmul_few_rows",
        config_type=ProductConfig,
        call=_product(_FEW_ROWS),
        default_config=_product_default(_FEW_ROWS),
        bound="memory_bound_share",
        variants=("minima", "ragged"),
        dtypes=names.PRODUCT_DTYPES,
        head_dims=names.GROUP_SIZES,
        between=(),
        sweep=Sweep(
            starts=_few_rows_starts,
            grows=("block_in", (64, 128, 256)),
            late=_stages,
            registers=_product_registers,
            alike=_PRODUCTS_ALIKE,
        ),
    ),
    Op(
        name="quantized_matmul",
        direction="forward",
        kernel="quantized_matmul",
        config_type=ProductConfig,
        call=_product(_MANY_ROWS),
        default_config=_product_default(_MANY_ROWS),
        variants=("minima", "ragged"),
        dtypes=names.PRODUCT_DTYPES,
        head_dims=names.GROUP_SIZES,
        between=(),
        sweep=Sweep(
            starts=_many_rows_starts,
            grows=("block_in", (32, 64, 128)),
            late=_stages,
            registers=_product_registers,
            alike=_PRODUCTS_ALIKE,
        ),
    ),
    *(op for name in names.LINEAR_OPS for op in _linear_ops(name)),
    *_sparse_ops(),
    Op(
        name="rotate_and_write",
        direction="forward",
        kernel="rotate_and_write",
        config_type=NoConfig,
        call=_write,
        default_config=lambda device, dtype, head_dim: NoConfig(),
        bound="memory_bound_share",
        variants=("padded head_dim",),
        dtypes=names.WRITE_DTYPES,
        sweep=None,
    ),
    Op(
        name="matmul_few_rows",
        direction="forward",
        kernel="matmul_few_rows",
        config_type=NoConfig,
        call=_few_rows,
        default_config=lambda device, dtype, columns: NoConfig(),
        bound="memory_bound_share",
        variants=("gate", "residual", "ragged", "groups"),
        dtypes=names.ROW_DTYPES,
        head_dims=names.GROUP_SIZES[-1:],
        between=(),
        sweep=None,
    ),
)
ON_GPUS = tuple(op for op in OPS if op.kernel in names.GPU_KERNELS)

TUNED = tuple(op for op in OPS if op.sweep)

# (architecture, kernel) to tiles that are not used, since `prove` found the code wrong that XLA makes of them
MISCOMPILED: Mapping[tuple[str, str], tuple[Mapping[str, Any], ...]] = {
    # jax-rocm7-pjrt 0.12.0, head_dim 80: two waves store different values in one place of the LDS
    ("gfx1100", "flash_attention"): (dict(block_q=128, block_kv=32, num_warps=8, block_d=32),),
}


def named(names: Sequence[str], directions: Sequence[str], *, table: Sequence[Op] = OPS) -> tuple[Op, ...]:
    """The entries with these names (of an op or a kernel) and directions."""
    return tuple(op for op in table if (op.name in names or op.kernel in names) and op.direction in directions)
