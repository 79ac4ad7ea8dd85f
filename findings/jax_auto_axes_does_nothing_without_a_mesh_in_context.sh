#!/usr/bin/env bash
# jax.sharding.auto_axes leaves axes explicit where no mesh is set, unless out_sharding names one.
#
# Expected: auto_axes(f, out_sharding=P("rows")) makes the explicit axes of its arguments' mesh automatic inside f, or
# says that it cannot.
# Seen with jax 0.12.0.1 on 2026-11-28: outside of jax.set_mesh it calls f as it is, without a word. f sees explicit axes,
# and works or not by its operations: a reshape that splits a sharded axis is refused inside of f. With a NamedSharding,
# whose mesh is that of the arguments, or under jax.set_mesh, the axes are automatic. jax.make_mesh makes axes explicit by
# default.
# jfa: on_any_mesh (jfa/meshes.py) passes NamedShardings with the mesh of the operands.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((1,), ("rows",))
x = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, PartitionSpec("rows")))
seen = []


def look(x):
    seen.append(jax.typeof(x).sharding.mesh.axis_types[0])
    return x


jax.sharding.auto_axes(look, out_sharding=PartitionSpec("rows"))(x)
jax.sharding.auto_axes(look, out_sharding=NamedSharding(mesh, PartitionSpec("rows")))(x)
with jax.set_mesh(mesh):
    jax.sharding.auto_axes(look, out_sharding=PartitionSpec("rows"))(x)
print(f"jax {jax.__version__}: axes inside: no mesh set {seen[0]}; NamedSharding {seen[1]}; set_mesh {seen[2]}")
assert seen[1] == seen[2] == AxisType.Auto
assert seen[0] == AxisType.Explicit, "changed: the axes are automatic without a mesh in context"
PYTHON
