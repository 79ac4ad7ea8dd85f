"""How a decoder is divided over the devices of a mesh: one table of which axis of which parameter, for every family.

Each device computes with its part of the heads, of the inner vectors and of the vocabulary, and what it adds to a
layer's output is summed over the devices (arXiv:1909.08053, section 3). Everything else is on every device. The steps
are traced for one device (steps.py), so kernels see arrays of their own, and nothing is communicated but what a module
asks for by name.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

import jfa
from jfa.sharding import unzigzag, zigzag
from jfa_models.model.config import DecoderConfig
from jfa_models.model.groups import own_group
from jfa_models.model.lora import Adapters, Change

Axes = tuple[str, ...]  # of a mesh; (): not divided
LEAST_CHUNK = 8  # tokens

AXES = ("data", "tensor", "expert", "context")  # of a mesh that users give
# The axis "tensor" as two: key heads are divided over the first, and copied along the second if they are too few.
TENSOR = ("heads", "group")


class Portion(NamedTuple):
    """The part of a step's tokens that this device computes: two chunks, so that all have as much to attend to.

    Every device gets the keys and values of all tokens, since each has a whole cache. Source: arXiv:2407.21783, section
    3.3.2.
    """

    axes: Axes  # of a mesh, over whose devices the tokens are divided
    parts: int  # of these devices
    num_tokens: int  # of all devices; they are padded to a multiple of the chunks

    def own(self, x: Shaped[Array, "b t *size"]) -> Shaped[Array, "b t/parts *size"]:
        """This device's part of an array with all tokens."""
        missing = -self.num_tokens % (2 * self.parts)
        padded = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
        return part_of(zigzag(padded, self.parts), PartitionSpec(None, self.axes))

    def whole(self, x: Shaped[Array, "b t/parts *size"]) -> Shaped[Array, "b t *size"]:
        """The parts of all devices as one array."""
        return unzigzag(gathered(x, self.axes, axis=1), self.parts)[:, : self.num_tokens]

    def at(
        self, x: Shaped[Array, "b t/parts *size"], row: Int[Array, " n"], token: Int[Array, " n"]
    ) -> Shaped[Array, "n *size"]:
        """Some tokens, by their index in all of their row, from the devices that have them."""
        size = x.shape[1] // 2
        chunk = token // size
        last = 2 * self.parts - 1
        owner = jnp.minimum(chunk, last - chunk)
        found = x[row, token % size + jnp.where(chunk == owner, 0, size)]
        is_own = owner == lax.axis_index(self.axes)
        return summed(jnp.where(is_own.reshape(-1, *(1,) * (found.ndim - 1)), found, 0), self.axes)

    def starts(self, size: int) -> Int[Array, " 2"]:
        """Where this device's chunks, of this size, begin among all tokens."""
        first = lax.axis_index(self.axes)
        return jnp.stack([first, 2 * self.parts - 1 - first]) * size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Over which axes the parts of a decoder are divided.

    Attributes:
      mesh: with the axes of TENSOR, "expert" and "context"; None: of one device.
      q_heads, kv_heads: of attention.
      inner: the inner vectors of MLPs.
      vocab: rows of the embedding and of the output layer, and so the logits.
      experts: whole experts.
      expert_inner, shared_inner: the inner vectors of each expert, and of the one that every token has.
      expert_layers: the layers with experts.
      tokens: the tokens of a step that has many (Portion).
      others: the meshes of other replicas of the decoder.
      group, num_groups: which group of processes this one is in, of how many that have replicas (groups.py).
      rows: of a batch, and of parameters and the optimizer's state at rest, in training (for_training).
    """

    mesh: Mesh | AbstractMesh | None = None
    q_heads: Axes = ()
    kv_heads: Axes = ()
    inner: Axes = ()
    vocab: Axes = ()
    experts: Axes = ()
    expert_inner: Axes = ()
    shared_inner: Axes = ()
    expert_layers: tuple[int, ...] = ()
    tokens: Axes = ()
    others: tuple[Mesh, ...] = ()
    group: int = 0
    num_groups: int = 1
    rows: Axes = ()

    def of_module(self, name: str) -> tuple[Axes, Axes, Axes]:
        """Over which axes a module's weight [experts, out, in] is divided; name: as in Adapters."""
        path = name.split(".")
        kind = ".".join(path[-2:])
        if name in ("embed", "lm_head"):
            return (), self.vocab, ()
        if kind == "attention.q":
            return (), self.q_heads, ()
        if kind in ("attention.k", "attention.v"):
            return (), self.kv_heads, ()
        if kind == "attention.o":
            return (), (), self.q_heads
        if path[-2:-1] == ["shared"]:
            experts, inner = (), self.shared_inner
        elif kind.startswith("mlp."):
            has_experts = int(path[1]) in self.expert_layers
            experts, inner = (self.experts, self.expert_inner) if has_experts else ((), self.inner)
        else:
            return (), (), ()
        if path[-1] in ("gate", "up"):
            return experts, inner, ()
        return (experts, (), inner) if path[-1] == "down" else ((), (), ())

    def of_parameter(self, name: str, held: Any) -> Any:
        """The PartitionSpecs of a parameter, an array or a QuantizedArray, in its structure."""
        module, _, field = name.rpartition(".")
        experts, out, columns = self.of_module(module)
        if field == "bias":
            return _spec(out)
        if field != "weight":
            return _spec()
        first = (experts,) * (len(held.shape) - 2)
        whole = _spec(*first, out, columns)
        if not isinstance(held, jfa.QuantizedArray):
            return whole
        return jax.tree.map(lambda x: whole if x.ndim == len(held.shape) else _spec(*first, out), held)

    def for_training(self) -> "Partition":
        """All replicas as one mesh with an axis "data", over which rows are divided."""
        if not isinstance(self.mesh, Mesh):
            return self
        devices = np.stack([mesh.devices for mesh in (self.mesh, *self.others)])
        kinds = (AxisType.Auto,) * devices.ndim
        mesh = Mesh(devices, ("data", *self.mesh.axis_names), axis_types=kinds)
        # experts' tokens are exchanged in a loop, which has no gradient
        tokens = tuple(axis for axis in self.tokens if axis not in self.experts)
        return dataclasses.replace(self, mesh=mesh, others=(), rows=("data",), tokens=tokens)

    def at_rest(self, spec: PartitionSpec, shape: tuple[int, ...]) -> tuple[PartitionSpec, int | None]:
        """An array's spec with one more axis divided over the rows' axes, and which; None: none can be."""
        axes = (*spec, *(None,) * (len(shape) - len(spec)))
        count = self.size(self.rows)
        for axis in sorted(range(len(shape)), key=lambda axis: -shape[axis]):
            if count > 1 and axes[axis] is None and shape[axis] % count == 0:
                return PartitionSpec(*axes[:axis], self.rows, *axes[axis + 1 :]), axis
        return spec, None

    def of_cache[T](self, cache: T) -> T:
        """The PartitionSpecs of a KVCache or PagedKVCache, in its structure."""
        assert isinstance(cache, jfa.KVCache | jfa.PagedKVCache)
        none = jax.tree.map(lambda _: _spec(), cache)
        k, v = jax.tree.map(lambda _: _spec((), (), self.kv_heads), (cache.k, cache.v))
        return dataclasses.replace(none, k=k, v=v)

    def of_adapters(self, adapters: Adapters) -> Adapters:
        """The PartitionSpecs of adapters, in their structure."""

        def of_change(name: str, change: Change) -> Change:
            experts, out, columns = self.of_module(name)
            first = (experts,) if change.a is not None and change.a.ndim == 4 else ()
            specs: dict[str, Any] = dict(
                a=_spec(*first, (), (), columns),
                b=_spec(*first, (), (), out),
                factor=_spec((), out),
                scale=_spec(),
                bias=_spec((), out),
                whole=_spec((), out, columns),
                whole_slot=_spec(),
            )
            return Change(**{name: spec for name, spec in specs.items() if getattr(change, name) is not None})

        return Adapters({name: of_change(name, x) for name, x in adapters.changes.items()}, adapters.num_slots)

    def put(self, held: Any, specs: Any) -> Any:
        """A pytree on the devices of the mesh; without a mesh, on the default device."""
        if self.mesh is None:
            return jax.device_put(held)
        shardings = jax.tree.map(functools.partial(NamedSharding, self.mesh), specs)
        if not self.mesh.is_multi_process:
            return jax.device_put(held, shardings)
        # device_put would compare what the processes have
        return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, x.__getitem__), held, shardings)

    def everywhere[T](self, held: T) -> T:
        """A pytree on every device of the mesh; arrays of a mesh stay as they are. Without a mesh: the same.

        Steps return such arrays. For those of one device they would be compiled once more.
        """
        if self.mesh is None:
            return held

        def put(x: Any) -> Any:
            return x if isinstance(getattr(x, "sharding", None), NamedSharding) else self.put(x, _spec())

        return jax.tree.map(put, held)

    def of_process(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...] | None:
        """The part of a parameter that the devices of this process have, an index for each axis; None: all."""
        if self.mesh is None or not self.mesh.is_multi_process:
            return None
        spec = self.of_parameter(name, jax.ShapeDtypeStruct(shape, np.float32))
        parts = NamedSharding(self.mesh, spec).addressable_devices_indices_map(shape).values()

        def own(axis: int, size: int) -> slice:
            bounds = [index[axis].indices(size)[:2] for index in parts if index is not None]
            start, stop = min(start for start, _ in bounds), max(stop for _, stop in bounds)
            return slice(None) if (start, stop) == (0, size) else slice(start, stop)

        found = tuple(own(axis, size) for axis, size in enumerate(shape))
        return None if all(index == slice(None) for index in found) else found

    def put_parameter(
        self, name: str, held: Any, own: tuple[slice, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> Any:
        """A parameter, an array or a QuantizedArray, on its devices.

        own, shape: held is this part of a parameter of this shape, which contains that of_process.

        Raises:
          ValueError: a quantized weight cannot be divided between its groups.
        """
        specs = self.of_parameter(name, held)
        self.check_groups(name, held, (shape or held.shape)[-1])
        if own is None:
            return self.put(held, specs)
        assert shape is not None and self.mesh is not None
        mesh, parts = self.mesh, list(zip(own, shape, held.shape, strict=True))

        def placed(x: Any, spec: PartitionSpec) -> Array:
            # numbers and scales of a QuantizedArray are cut where the weight is
            sizes = [n * whole // part for n, (_, whole, part) in zip(x.shape, parts, strict=False)]
            first = [(index.start or 0) * n // whole for n, (index, whole, _) in zip(sizes, parts, strict=False)]

            def of_device(index: Any) -> Any:
                bounds = [i.indices(n)[:2] for i, n in zip(index, sizes, strict=True)]
                return x[tuple(slice(a - at, b - at) for (a, b), at in zip(bounds, first, strict=True))]

            return jax.make_array_from_callback(tuple(sizes), NamedSharding(mesh, spec), of_device)

        return jax.tree.map(placed, held, specs)

    def check_groups(self, name: str, held: Any, width: int) -> None:
        """Raises ValueError if a parameter is quantized, and dividing its columns, of this number, cuts its groups."""
        if self.mesh is None or not isinstance(held, jfa.QuantizedArray):
            return
        count, group = self.size(self.of_module(name.rpartition(".")[0])[2]), held.group_size or 1
        if count > 1 and (width % group or width // group % count):
            fits = ", ".join(map(str, _divisors(width // group)))
            raise ValueError(
                f"{name} has {width} columns in groups of {group}, which cannot be divided by {count} devices "
                f"without cutting a group; counts that do: {fits}; or use quantization='int8', which has no groups"
            )

    def portion(self, num_tokens: int) -> Portion | None:
        """How the tokens of each row of a step are divided; None: every device has all, since they are too few."""
        count = self.size(self.tokens)
        is_divided = count > 1 and num_tokens >= 2 * count * LEAST_CHUNK
        return Portion(self.tokens, count, num_tokens) if is_divided else None

    @property
    def is_shared(self) -> bool:
        """Whether several processes have parts or replicas of the decoder."""
        return self.num_groups > 1 or (isinstance(self.mesh, Mesh) and self.mesh.is_multi_process)

    @property
    def is_first_of_group(self) -> bool:
        """Whether this process has the lowest number of its group."""
        return not isinstance(self.mesh, Mesh) or jax.process_index() == min(
            device.process_index for device in self.mesh.devices.flat
        )

    @property
    def of_kv(self) -> NamedSharding | None:
        """Of the keys and values of a cache, whose third axis are heads; None: they are on one device."""
        return None if self.mesh is None else NamedSharding(self.mesh, _spec((), (), self.kv_heads))

    def on_devices(self, function: Callable, arguments: Any, results: Any) -> Callable:
        """The function, run by every device of the mesh with its parts; both others are PartitionSpecs."""
        assert self.mesh is not None
        mesh, specs = self.mesh, dict(in_specs=arguments, out_specs=results, check_vma=False)
        # that of the context says for which device a program is compiled that is not there
        if jax.sharding.get_abstract_mesh().axis_names == mesh.axis_names:
            return jax.shard_map(function, **specs)

        def run(*args: Any) -> Any:
            abstract = mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh
            with jax.sharding.use_abstract_mesh(abstract):  # callers may have set theirs: jax.set_mesh
                return jax.shard_map(function, mesh=mesh, **specs)(*args)

        return run

    def num_bytes(self, cache: jfa.KVCache | jfa.PagedKVCache) -> int:
        """Bytes of a cache, or of its shapes, on one device."""
        states = 0 if cache.states is None else cache.states.num_bytes
        return states + (cache.num_bytes - states) // self.size(self.kv_heads)

    def size(self, axes: Axes) -> int:
        """The number of parts."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in axes)


WHOLE = Partition()


def mesh_of(mesh: Mesh | None, tensor_parallel: int | None) -> Mesh | None:
    """The mesh, or that of the first tensor_parallel devices with the axis "tensor"; None if both are.

    Raises:
      ValueError: both are given, or there are fewer devices.
    """
    if tensor_parallel is None:
        return mesh
    if mesh is not None:
        raise ValueError(f"mesh and tensor_parallel={tensor_parallel} both say how the model is divided: give one")
    devices = jax.devices()
    if type(tensor_parallel) is not int or not 1 <= tensor_parallel <= len(devices):
        raise ValueError(
            f"tensor_parallel must be 1 to {len(devices)}, the number of devices that JAX sees, got {tensor_parallel!r}"
        )
    return Mesh(np.asarray(devices[:tensor_parallel]), ("tensor",), axis_types=(AxisType.Auto,))


def partition_of(config: DecoderConfig, mesh: Mesh | AbstractMesh | None) -> Partition:
    """How a decoder is divided over a mesh with the axes "tensor", "expert" and "context", or some of them.

    What cannot be divided evenly is on every device. For each index of an axis "data" there is a replica. Of an
    AbstractMesh: on paper; nothing can be put on it.

    Raises:
      ValueError: it is not a mesh, it has another axis, or nothing of the decoder can be divided over one of its axes.

    Warns:
      UserWarning: a part of the decoder is on every device.
    """
    if mesh is None:
        return WHOLE
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f'mesh must be a jax.sharding.Mesh, such as jax.make_mesh((8,), ("tensor",)), got {mesh!r}')
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise ValueError(
            f"the mesh has an axis {unknown[0]!r}; the axes of a decoder are {', '.join(map(repr, AXES))}, as in "
            'jax.make_mesh((8,), ("tensor",)) or --mesh tensor=8'
        )
    sizes = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    if sizes["context"] > 1 and not config.attention_layers:
        raise ValueError(
            f"an axis 'context' of {sizes['context']} devices divides the tokens of attention, which no layer of a "
            f"{config.architecture} model has"
        )
    n, num_experts = sizes["tensor"], sizes["expert"]
    kept: list[str] = []  # on every device, in words

    def divided(what: str, size: int) -> Axes:
        if n == 1 or size == 0:
            return ()
        if size % n == 0:
            return over
        kept.append(f"{what} ({size}, divisible by {_words(_divisors(size))})")
        return ()

    q_heads, kv_heads = config.num_q_heads, config.num_kv_heads
    can_share = kv_heads > 0 and (kv_heads % n == 0 or n % kv_heads == 0)
    is_divided = n > 1 and kv_heads > 0 and q_heads % n == 0 and can_share
    if n > 1 and kv_heads and not is_divided:
        fits = [size for size in _divisors(q_heads) if kv_heads % size == 0 or size % kv_heads == 0]
        kept.append(f"attention ({q_heads} query and {kv_heads} key heads, divisible by {_words(fits)})")
    if n > 1 and config.state_layers:
        kept.append(f"the {len(config.state_layers)} layers with a state")
    experts, expert_axes = config.experts, ()
    if num_experts > 1:
        if experts is None:
            raise ValueError(f"the mesh has an axis 'expert' of {num_experts} devices, but the model has no experts")
        if experts.num_experts % num_experts:
            raise ValueError(
                f"{experts.num_experts} experts cannot be divided by the {num_experts} devices of the axis 'expert'; "
                f"sizes that do: {', '.join(map(str, _divisors(experts.num_experts)))}"
            )
        expert_axes = ("expert",)
    heads = kv_heads if is_divided and kv_heads < n else n
    # without axes of one device, as XLA names the results of a step: other names would compile it again
    over = tuple(axis for axis, size in zip(TENSOR, (heads, n // heads), strict=True) if size > 1)
    has_mlp = any(config.has_mlp and not config.has_experts(i) for i in range(config.num_layers))
    replicas = _replicas(mesh, sizes["data"], (heads, n // heads, num_experts, sizes["context"]))
    group, num_groups = 0, 1
    if isinstance(mesh, Mesh) and jax.process_count() > 1:
        places = [frozenset(device.process_index for device in one.devices.flat) for one in replicas]
        own, group, num_groups = own_group(places, jax.process_index())
        replicas = [replicas[i] for i in own]
    found = Partition(
        mesh=replicas[0],
        others=tuple(replicas[1:]),
        group=group,
        num_groups=num_groups,
        q_heads=over if is_divided else (),
        kv_heads=TENSOR[:1] if is_divided and heads > 1 else (),
        inner=divided("MLPs", config.intermediate_size) if has_mlp else (),
        vocab=divided("the vocabulary", config.vocab_size),
        experts=expert_axes,
        expert_inner=() if experts is None else divided("the vectors of experts", experts.intermediate_size),
        shared_inner=() if experts is None else divided("the shared expert", experts.shared_size),
        expert_layers=tuple(i for i in range(config.num_layers) if config.has_experts(i)),
        tokens=tuple(axis for axis in ("expert", "context") if sizes[axis] > 1),
    )
    whole = (found.q_heads, found.inner, found.vocab, found.expert_inner, found.shared_inner)
    if n > 1 and not any(whole):
        raise ValueError(f"nothing of the model can be divided by {n} devices: {'; '.join(kept)}")
    if kept:
        warnings.warn(f"over {n} devices, each has all of: {'; '.join(kept)}", stacklevel=4)
    return found


def _replicas(mesh: Mesh | AbstractMesh, count: int, sizes: tuple[int, ...]) -> list[Any]:
    """The meshes of so many replicas, each with the axes of a Partition."""
    names = (*TENSOR, "expert", "context")
    axes: dict[str, Any] = dict(axis_names=names, axis_types=(AxisType.Auto,) * len(names))
    if isinstance(mesh, AbstractMesh):
        return [AbstractMesh(sizes, **axes)] * count
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    return [Mesh(own, **axes) for own in np.transpose(mesh.devices, order).reshape(count, *sizes)]


def summed[T: Array](x: T, axes: Axes) -> T:
    """The sum of the parts that the devices along these axes have of x."""
    return lax.psum(x, axes) if axes else x


def first_of(axes: Axes, size: int) -> Int[Array, ""] | int:
    """The first of the indices that this device has, of an axis of which each has `size`."""
    return lax.axis_index(axes) * size if axes else 0


def gathered(x: Shaped[Array, "..."], axes: Axes, axis: int = -1) -> Shaped[Array, "..."]:
    """All of an array of which an axis is divided."""
    return lax.all_gather(x, axes, axis=axis % x.ndim, tiled=True) if axes else x


def part_of(x: Shaped[Array, "..."], spec: PartitionSpec) -> Shaped[Array, "..."]:
    """This device's part of a whole array."""
    for axis, axes in enumerate(spec):
        if axes:
            size = x.shape[axis] // lax.axis_size(axes)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, axis)
    return x


def _spec(*axes: Axes) -> PartitionSpec:
    return PartitionSpec(*(axis or None for axis in axes))


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, min(n, 64) + 1) if n % i == 0]


def _words(numbers: list[int]) -> str:
    shown = numbers if len(numbers) <= 8 else [*numbers[:7], "..."]
    return ", ".join(map(str, shown))
