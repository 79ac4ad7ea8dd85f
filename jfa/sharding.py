"""Attention over a sequence that is split over the devices of a mesh: each device keeps its part of it.

The keys and values of a part travel around the ring of devices. Each device attends its queries to one part after
another with the kernels of dot_product_attention, and merges the results by their log-sum-exp. The backward pass goes
around the ring again: the gradients of a part travel with its keys and values. A device stores its own part and two
travelling ones, however many devices there are.

Source: arXiv:2310.01889 (ring attention); arXiv:2105.13120. Tested in tests/jfa/test_ring_attention.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from jfa import arguments, backends, checks
from jfa.device import probe
from jfa.meshes import on_any_mesh, spec_of
from jfa.rules import compiled, with_default_rules
from jfa.types import AttentionSpec, DeviceInfo, Implementation, Operands, UnsupportedError

Order = Literal["contiguous", "zigzag"]


class _Options(TypedDict, total=False):
    """Options that both overloads of ring_attention share, for type checkers."""

    axis_name: str | tuple[str, ...]
    mesh: Mesh | AbstractMesh | None
    order: Order
    is_causal: bool
    scale: float | None
    local_window_size: int | tuple[int | None, int | None] | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    implementation: Implementation | None


@overload
def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    return_residual: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Array: ...


@overload
def ring_attention(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, *, return_residual: Literal[True], **options: Unpack[_Options]
) -> tuple[Array, Array]: ...


@with_default_rules
def ring_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    axis_name: str | tuple[str, ...] = "context",
    mesh: Mesh | AbstractMesh | None = None,
    order: Order = "contiguous",
    is_causal: bool = False,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    return_residual: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]:
    """dot_product_attention of a sequence that is split over the n devices of a mesh axis.

    Called outside of shard_map, it takes whole arrays, splits them over the axis if they are not, and returns results
    split alike; other axes of the mesh stay as they are. Called inside a jax.shard_map over the axis, it takes and
    returns this device's part. No device gathers the keys of the others: its memory does not depend on n.

    Results and first-order reverse-mode gradients are those of dot_product_attention within its tolerances, also of
    queries that see no key.
    A device runs nothing for a part that a causal mask, a window or segments hide entirely. Of a causal mask that is
    half of all work, divided evenly in zigzag order only: in contiguous order the last device has nothing to skip.

    Args:
      query, key, value: [b, tq, hq, d], [b, tk, hkv, d] and [b, tk, hkv, dv], or all without b; float16, bfloat16 or
        float32. Lengths are multiples of n, in zigzag order of 2 n.
      axis_name: the axis of the mesh that the sequence is split over; inside a jax.shard_map also several.
      mesh: None: the mesh of jax.set_mesh, or that of the arrays. Under jit, arrays of a mesh with automatic axes do
        not have it: pass it.
      order: of the tokens in all arrays and results. "contiguous": as they are; "zigzag": as zigzag returns them.
        Masks are of the positions that the tokens had before.
      is_causal, scale, local_window_size, logits_soft_cap, sinks: as in dot_product_attention.
      query_segment_ids, key_value_segment_ids: as in dot_product_attention, i32[b, tq] and i32[b, tk].
      return_residual: also return the (natural) log-sum-exp of the scores.
      implementation: "xla" or "triton" to require that backend; None to choose automatically.

    Returns:
      [b, tq, hq, dv] in query's dtype; with return_residual also the residual, f32[b, tq, hq].

    Raises:
      ValueError: invalid shapes, dtypes or numbers, no such axis, or lengths that do not divide.
      UnsupportedError: the call is valid, but the backend does not implement it.

    Source: arXiv:2310.01889.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    one_row = query.ndim == key.ndim == value.ndim == 3
    if one_row:
        query, key, value = query[None], key[None], value[None]
    checks.attention_shapes(query, key, value)
    if order not in ("contiguous", "zigzag"):
        raise ValueError(f"order must be 'contiguous' or 'zigzag', got {order!r}")
    mesh = _mesh_to_split_over(axis_name, mesh, (query, key, value))
    num_parts = (2 if order == "zigzag" else 1) * (1 if mesh is None else mesh.shape[axis_name])
    for name, x in (("query", query), ("key", key)):
        _check_length(name, x.shape[1], num_parts, order, "this device's part of it" if mesh is None else "it")
    b, tq, hq, head_dim = query.shape
    operands = Operands(
        q=query,
        k=key,
        v=value,
        **arguments.segments(query_segment_ids, key_value_segment_ids, (b, tq), (b, key.shape[1]), one_row=one_row),
    )
    sinks = arguments.per_head("sinks", sinks, hq)
    spec = AttentionSpec(
        sm_scale=head_dim**-0.5 if scale is None else float(scale),
        causal=bool(is_causal),
        window=arguments.window(local_window_size),
        softcap=None if logits_soft_cap is None else float(logits_soft_cap),
    )
    device = probe()
    backend = backends.select(implementation, operands, spec, device)
    if backend == "reference":
        raise UnsupportedError("implementation='reference': it has no backward pass of its own; use 'xla'")
    plan = _Plan(backend=backend, spec=spec, device=device, axis_name=axis_name, order=order, mesh=mesh)
    rows = spec_of(query) if mesh is None else PartitionSpec(spec_of(query)[0], axis_name, *spec_of(query)[2:])
    rows = PartitionSpec(*rows[:3])
    operands, sinks = arguments.varying_alike(_on_explicit_context(operands, sinks))
    out, lse = on_any_mesh(functools.partial(_with_sinks, plan), operands, sinks, specs=lambda: (rows, rows))
    if one_row:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def zigzag(x: Shaped[ArrayLike, "..."], n: int, axis: int = 1) -> Shaped[Array, "..."]:
    """Tokens in the order in which n devices share the work of a causal mask evenly.

    The sequence is cut into 2 n chunks; part i of the result consists of chunks i and 2 n - 1 - i.

    Raises:
      ValueError: the length is not a multiple of 2 n.
    """
    return _reordered(jnp.asarray(x), [chunk for i in range(n) for chunk in (i, 2 * n - 1 - i)], axis)


def unzigzag(x: Shaped[ArrayLike, "..."], n: int, axis: int = 1) -> Shaped[Array, "..."]:
    """The inverse of zigzag."""
    return _reordered(jnp.asarray(x), [*range(0, 2 * n, 2), *range(2 * n - 1, 0, -2)], axis)


@with_default_rules
def _reordered(x: Array, chunks: list[int], axis: int) -> Array:
    axis = range(x.ndim)[axis]
    _check_length("x", x.shape[axis], len(chunks), "zigzag", "it")

    def reorder(x: Array) -> Array:
        parts = x.reshape(*x.shape[:axis], len(chunks), x.shape[axis] // len(chunks), *x.shape[axis + 1 :])
        return jnp.take(parts, jnp.array(chunks), axis=axis).reshape(x.shape)

    return on_any_mesh(reorder, x, specs=lambda: spec_of(x))


def _check_length(name: str, length: int, num_parts: int, order: str, what: str) -> None:
    if length % num_parts == 0 and length:
        return
    below = length // num_parts * num_parts
    nearest = f"{below} or {below + num_parts}" if below else f"{num_parts}"
    raise ValueError(
        f"{name} has length {length}, but {order} order cuts {what} into {num_parts} equal parts; the nearest length "
        f"that can be is {nearest}: pad the sequence, with other segment ids for the padding"
    )


def _mesh_to_split_over(
    axis_name: str | tuple[str, ...], mesh: Mesh | AbstractMesh | None, arrays: tuple[Array, ...]
) -> Mesh | AbstractMesh | None:
    """The mesh with automatic axes; None inside a shard_map over the axis."""
    context = jax.sharding.get_abstract_mesh()
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if set(names) <= set(context.manual_axes):
        if mesh is not None:
            raise ValueError(f"inside a shard_map over {axis_name!r} arrays are already split; call without mesh")
        return None
    shardings = [jax.typeof(x).sharding for x in arrays]
    shardings += [x.sharding for x in arrays if not isinstance(x, Tracer)]
    known = [mesh, context, *(sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))]
    mesh = next((one for one in known if one is not None and not one.empty), None)
    if mesh is None:
        raise ValueError(
            f"no mesh is known whose axis {axis_name!r} the sequence could be split over; pass mesh=, or use "
            "jax.set_mesh"
        )
    if axis_name not in mesh.shape:
        raise ValueError(f"axis_name must be an axis of the mesh, one of {list(mesh.axis_names)}, got {axis_name!r}")
    kinds = tuple(AxisType.Auto if kind == AxisType.Explicit else kind for kind in mesh.axis_types)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    return mesh.update(axis_types=kinds)


def _on_explicit_context(*arrays: Any) -> Any:
    """Arrays that are on no mesh, put on that of jax.set_mesh if its axes are explicit; others as they are."""
    context = jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in context.axis_types:
        return arrays
    return jax.tree.map(lambda x: jax.reshard(x, PartitionSpec()) if jax.typeof(x).sharding.mesh.empty else x, arrays)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """The static parameters of one call."""

    backend: str
    spec: AttentionSpec
    device: DeviceInfo
    axis_name: str | tuple[str, ...]
    order: Order
    mesh: Mesh | AbstractMesh | None  # to split whole arrays over; None: they are a device's part

    @property
    def num_devices(self) -> int:
        return lax.axis_size(self.axis_name)

    def num_steps(self, operands: Operands) -> int:
        """Number of parts that a device visits: all, unless a window ends before the keys that would come last."""
        is_causal_window = self.spec.right == 0 and self.spec.left is not None
        length = operands.q.shape[1]
        if not is_causal_window or self.order == "zigzag" or operands.k.shape[1] != length:
            return self.num_devices
        return min(self.num_devices, 1 + -(-self.spec.left // length))  # type: ignore[operator]

    @property
    def has_positions(self) -> bool:
        """Whether it matters where a token is."""
        return self.spec.left is not None or self.spec.right is not None

    @property
    def num_chunks(self) -> int:
        """Number of pieces of a device's part whose tokens follow each other, as far as that matters."""
        return 2 if self.order == "zigzag" and self.has_positions else 1


def _with_sinks(plan: _Plan, operands: Operands, sinks: Float[Array, " hq"] | None) -> tuple[Array, Array]:
    out, lse = _differentiable(plan, operands)
    if sinks is None:
        return out, lse
    # once for all parts: the residual is without them
    weight = jax.nn.sigmoid(jnp.where(lse == -jnp.inf, 0.0, lse) - sinks.astype(jnp.float32))
    return (out * weight[..., None]).astype(out.dtype), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(plan: _Plan, operands: Operands) -> tuple[Array, Array]:
    return _run(plan, operands)


def _forward(plan: _Plan, operands: Operands):
    out, lse = _run(plan, operands)
    # named for remat policies, as those of dot_product_attention
    out, lse = checkpoint_name(out, "jfa_out"), checkpoint_name(lse, "jfa_lse")
    return (out, lse), (operands, out, lse)


def _backward(plan: _Plan, saved, cotangents) -> tuple[Operands]:
    return (_run_backward(plan, *saved, *cotangents),)


_differentiable.defvjp(_forward, _backward)


@compiled
@with_default_rules
def _run(plan: _Plan, operands: Operands) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    with jax.named_scope(f"jfa.ring_attention.{plan.backend}"):
        return _on_each_device(plan, _attend)(operands)


@compiled
@with_default_rules
def _run_backward(plan: _Plan, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array) -> Operands:
    with jax.named_scope(f"jfa.ring_attention_bwd.{plan.backend}"):
        return _on_each_device(plan, _differentiate)(operands, out, lse, d_out, d_lse)


def _on_each_device(plan: _Plan, function: Callable) -> Callable:
    """The function of a device's part, for the arrays that the plan is for."""
    function = functools.partial(function, plan)
    if plan.mesh is None:
        return function
    split = PartitionSpec(None, plan.axis_name)  # all arrays are [b, tokens, ...]
    # interpreted kernels do not run under the check
    return jax.shard_map(
        function, mesh=plan.mesh, in_specs=split, out_specs=split, axis_names={plan.axis_name}, check_vma=False
    )


class _KeyPart(NamedTuple):
    """A device's part of keys and values, as it travels.

    Side by side in one array: XLA for GPUs overlaps one transfer at a time with a computation.
    """

    kv: Float[Array, "b tk hkv d+dv"]
    segments: Int[Array, "b tk"] | None


def _attend(plan: _Plan, operands: Operands) -> tuple[Float[Array, "b tq hq dv"], Float[Array, "b tq hq"]]:
    """Attention of this device's queries to the keys of all devices."""
    backend = backends.flash(plan.backend)
    q = operands.q
    rows = q.shape[:3]
    nothing = _zeros(operands, (*rows, operands.v.shape[3])), _zeros(operands, rows) - jnp.inf

    def attend_to(pair: "_Pair", found: tuple[Array, Array]) -> tuple[Array, Array]:
        part = pair.operands
        out, lse = backend.run(part, plan.spec, backend.default_config(part, plan.device), plan.device)
        all_out, all_lse = found
        out, lse = _merged(pair.rows(all_out), pair.rows(all_lse), out, lse)
        return pair.put_rows(all_out, out), pair.put_rows(all_lse, lse)

    def visit(step: Any, keys: _KeyPart, found: tuple[Array, Array]) -> tuple[Array, Array]:
        return _over_pairs(plan, operands, keys, step, attend_to, found)

    out, lse = _around_the_ring(plan, operands, visit, nothing)
    return out.astype(q.dtype), lse


def _differentiate(plan: _Plan, operands: Operands, out: Array, lse: Array, d_out: Array, d_lse: Array) -> Operands:
    """The cotangents of this device's part of q, k and v.

    Given out and lse of all keys, a kernel returns what the keys that it gets contribute.
    """
    backend = backends.flash(plan.backend)
    q, k, v = operands.q, operands.k, operands.v
    d_q, no_d_kv = (_zeros(operands, x.shape) for x in (q, jax.eval_shape(_side_by_side, k, v)))

    def add_to(pair: "_Pair", sums: tuple[Array, Array]) -> tuple[Array, Array]:
        part, of_rows = pair.operands, [pair.rows(x) for x in (out, lse, d_out, d_lse)]
        config = backend.backward_config(part, backend.default_config(part, plan.device), plan.device)
        new = backend.run_backward(part, *of_rows, plan.spec, config, plan.device)
        d_q, d_kv = sums
        d_kv_of_pair = _side_by_side(*(x.astype(jnp.float32) for x in (new.k, new.v)))
        return pair.put_rows(d_q, pair.rows(d_q) + new.q), pair.add_keys(d_kv, d_kv_of_pair)

    def visit(step: Any, keys: _KeyPart, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        d_q, d_kv = sums
        arriving = _passed_on(plan, d_kv)  # before the computation, as the keys
        d_q, new = _over_pairs(plan, operands, keys, step, add_to, (d_q, no_d_kv))
        return d_q, arriving + new

    d_q, d_kv = _around_the_ring(plan, operands, visit, (d_q, no_d_kv))
    d_k, d_v = _apart(_passed_on(plan, d_kv, 1 - plan.num_steps(operands)), operands)  # home
    return Operands(q=d_q.astype(q.dtype), k=d_k.astype(k.dtype), v=d_v.astype(v.dtype))


def _around_the_ring[S](plan: _Plan, operands: Operands, visit: Callable[[Any, _KeyPart, S], S], state: S) -> S:
    """state = visit(step, keys, state) for each device's keys: in step s, those of the device s places before."""

    def turn(step: Any, carry: tuple[_KeyPart, S]) -> tuple[_KeyPart, S]:
        keys, state = carry
        arriving = _passed_on(plan, keys)  # before the computation, so that XLA may run both at once
        return arriving, visit(step, keys, state)

    own = _KeyPart(_side_by_side(operands.k, operands.v), operands.kv_segments)
    last = plan.num_steps(operands) - 1
    keys, state = lax.fori_loop(0, last, turn, (own, state))
    return visit(last, keys, state)


def _passed_on[T](plan: _Plan, arrays: T, places: int = 1) -> T:
    """What the device so many places before sent, while this one sends its own as far."""
    n = plan.num_devices
    moves = [(i, (i + places) % n) for i in range(n)]
    return jax.tree.map(lambda x: lax.ppermute(x, plan.axis_name, moves), arrays)


class _Pair(NamedTuple):
    """A chunk of a device's queries and a chunk of a travelling part of the keys."""

    operands: Operands
    query_chunk: Any
    key_chunk: Any

    def rows(self, x: Array) -> Array:
        return _chunk(x, self.query_chunk, self.operands.q.shape[1])

    def put_rows(self, x: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), self.query_chunk * new.shape[1], axis=1)

    def add_keys(self, x: Array, new: Array) -> Array:
        there = _chunk(x, self.key_chunk, new.shape[1])
        return lax.dynamic_update_slice_in_dim(x, there + new, self.key_chunk * new.shape[1], axis=1)


def _over_pairs[S](
    plan: _Plan, operands: Operands, keys: _KeyPart, step: Any, visit: Callable[[_Pair, S], S], state: S
) -> S:
    """state = visit(pair, state) for each pair of chunks in which a query may see a key."""
    chunks, own = plan.num_chunks, lax.axis_index(plan.axis_name)
    tq, tk = operands.q.shape[1] // chunks, operands.k.shape[1] // chunks

    def visit_pair(index: Any, state: S) -> S:
        of_q, of_k = index // chunks, index % chunks
        q_start = _position(plan, own, of_q, tq)
        k_start = _position(plan, (own - step) % plan.num_devices, of_k, tk)
        q_segments, kv_segments = (
            None if x is None else _chunk(x, of_chunk, length)
            for x, of_chunk, length in ((operands.q_segments, of_q, tq), (keys.segments, of_k, tk))
        )

        def visible(state: S) -> S:
            offset = jnp.full(operands.q.shape[:1], q_start - k_start, jnp.int32)
            k, v = _apart(_chunk(keys.kv, of_k, tk), operands)
            part = Operands(
                q=_chunk(operands.q, of_q, tq),
                k=k,
                v=v,
                q_offset=offset if plan.has_positions else None,
                q_segments=q_segments,
                kv_segments=kv_segments,
            )
            return visit(_Pair(part, of_q, of_k), state)

        is_visible = _may_see(plan.spec, (q_start, tq), (k_start, tk), q_segments, kv_segments)
        return visible(state) if is_visible is True else lax.cond(is_visible, visible, lambda state: state, state)

    return visit_pair(0, state) if chunks == 1 else lax.fori_loop(0, chunks**2, visit_pair, state)


def _position(plan: _Plan, device: Array, chunk: Any, length: int) -> Array:
    """The position of the first token of a device's chunk in the whole sequence."""
    if plan.num_chunks == 1:
        return device * length
    return jnp.where(chunk == 0, device, 2 * plan.num_devices - 1 - device) * length


def _may_see(spec: AttentionSpec, queries: tuple, keys: tuple, q_segments: Array | None, kv_segments: Array | None):
    """Whether a query may see a key; queries, keys: (position of the first, number)."""
    (q_start, tq), (k_start, tk) = queries, keys
    may = True
    if spec.right is not None:
        may &= k_start <= q_start + tq - 1 + spec.right
    if spec.left is not None:
        may &= q_start - spec.left <= k_start + tk - 1
    if q_segments is not None and kv_segments is not None:
        shared = (q_segments.min(1) <= kv_segments.max(1)) & (kv_segments.min(1) <= q_segments.max(1))
        may &= shared.any()
    return may


def _merged(out: Array, lse: Array, new_out: Array, new_lse: Array) -> tuple[Array, Array]:
    """Attention to the keys of both, in float32; -inf: to none."""
    total = jnp.logaddexp(lse, new_lse)
    safe = jnp.where(total == -jnp.inf, 0.0, total)  # (-inf) - (-inf) would be NaN
    weight, new_weight = (jnp.exp(x - safe)[..., None] for x in (lse, new_lse))
    return out * weight + new_out * new_weight, total


def _side_by_side(k: Array, v: Array) -> Array:
    return jnp.concatenate([k, v], axis=3)


def _apart(kv: Array, operands: Operands) -> tuple[Array, Array]:
    head_dim = operands.k.shape[3]
    return kv[..., :head_dim], kv[..., head_dim:]


def _chunk(x: Array, chunk: Any, length: int) -> Array:
    return lax.dynamic_slice_in_dim(x, chunk * length, length, axis=1)


def _zeros(operands: Operands, shape: tuple[int, ...]) -> Array:
    """float32 zeros that vary over the mesh axes that the operands vary over."""
    return arguments.varying_alike((operands.q, jnp.zeros(shape, jnp.float32)))[1]
