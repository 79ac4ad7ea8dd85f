#!/usr/bin/env bash
# JAX's TPU interpreter raises an error for a kernel under vmap if dimension_semantics names its grid's axes.
#
# Expected: jax.vmap of a pallas_call gives in the interpreter what a loop over the rows gives. Batching adds an axis to
# the grid, and libtpu compiles kernels of jfa under vmap.
# Seen with jax 0.12.0.1 on 2026-11-29: without dimension_semantics it does. With ("parallel",) or ("arbitrary",) for a
# grid of one axis the call works by itself, and under vmap it raises "ValueError: safe_zip() argument 1 has length 1 but
# argument 0 has length 2": the grid has the new axis, and its semantics do not.
# jfa: its TPU kernels are proven in the interpreter without vmap.
set -euo pipefail
cd "$(mktemp -d)"
JAX_PLATFORMS=cpu uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def kernel(x, out):
    out[...] = 2 * x[...]


def doubled(x, semantics):
    block = pl.BlockSpec((8, 128), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(2,),
        in_specs=[block],
        out_specs=block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=pltpu.InterpretParams(),
    )(x)


def outcome(function, x):
    try:
        return str(bool((function(x) == 2 * x).all()))
    except ValueError as error:
        return f"ValueError: {error}"


x, seen = jnp.ones((3, 16, 128)), {}
for semantics in (None, ("parallel",), ("arbitrary",)):
    alone = outcome(lambda x: doubled(x, semantics), x[0])
    seen[semantics] = alone, outcome(jax.vmap(lambda x: doubled(x, semantics)), x)
    print(f"jax {jax.__version__}, {semantics}: right alone: {alone}; under vmap: {seen[semantics][1]}")
assert seen[None] == ("True", "True") and all(alone == "True" for alone, _ in seen.values())
assert "safe_zip" in seen["parallel",][1] and "safe_zip" in seen["arbitrary",][1], "changed: vmap works"
PYTHON
