"""Meshes with explicit axes, the default of jax.make_mesh: on them, ops and caches leave sharding to the compiler.

They consist of reshapes, gathers and scatters, which JAX refuses on explicit axes unless each says how its result is
sharded. Whoever calls them sees explicit axes all the same: operands and results have their shardings.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def spec_of(x: Any) -> PartitionSpec:
    """How the axes of an array are sharded; no axis is, where its mesh has no explicit axes."""
    return jax.typeof(x).sharding.spec


def on_any_mesh[R](function: Callable[..., R], *args: Any, specs: Callable[[], Any]) -> R:
    """function(*args), with the explicit axes of the arguments' mesh automatic in it.

    Args:
      args: pytrees; leaves that are not arrays are passed on as they are.
      specs: returns the PartitionSpecs of the result, in its structure.
    """
    leaves, tree = jax.tree.flatten(args)
    arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)}
    meshes = (jax.typeof(x).sharding.mesh for x in arrays.values())
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return function(*args)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == AxisType.Explicit)

    def run(arrays: dict[int, jax.Array]) -> R:
        return function(*jax.tree.unflatten(tree, [arrays.get(i, x) for i, x in enumerate(leaves)]))

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs())
    on_auto_axes: Any = jax.sharding.auto_axes(run, axes=axes, out_sharding=shardings)
    return on_auto_axes(arrays)


def like_itself[**P, R](method: Callable[P, R]) -> Callable[P, R]:
    """A method that returns a changed copy of its pytree, sharded as before."""
    untyped: Callable[..., Any] = method

    def call(args: tuple, options: dict[str, Any]) -> Any:
        return untyped(*args, **options)

    @functools.wraps(method)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        return on_any_mesh(call, args, options, specs=lambda: jax.tree.map(spec_of, args[0]))

    return wrapper
