#!/usr/bin/env bash
# A masked load of a Pallas kernel takes other=0 for every dtype but fp8, and says so only when it is lowered for a GPU.
#
# Expected: `other` is cast to the dtype of the reference, as for float32, bfloat16, float16 and int8; or the interpreter
# refuses it too.
# Seen with jax 0.12.0.1 on 2026-11-30: in the interpreter all dtypes give the same numbers. Lowered by Pallas' Triton
# backend for a GPU (which need not be there), float8_e4m3fn and float8_e5m2 raise NotImplementedError, "cannot cast ...
# (i32) -> tensor<16xi32> ... to tensor<16xf8E4M3FN>"; other=0.0 lowers.
# jfa: the fill is 0.0 wherever the loaded array has floats, and the edges of fp8 weights are among the proofs.
set -euo pipefail
cd "$(mktemp -d)"
JAX_PLATFORMS=cpu uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python -W ignore - <<'PYTHON'
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import AbstractDevice, AbstractMesh

GPU = AbstractMesh((), (), abstract_device=AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="cuda"))


def call(other, interpret=False):
    def kernel(x_ref, y_ref):
        at = jnp.arange(16)
        y_ref[...] = triton.load(x_ref.at[at], mask=at < 13, other=other).astype(jnp.float32)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((16,), jnp.float32), interpret=interpret)


def lowers(dtype, other):
    try:
        with jax.sharding.use_abstract_mesh(GPU):
            jax.jit(call(other)).trace(jax.ShapeDtypeStruct((16,), dtype)).lower(lowering_platforms=("cuda",))
    except NotImplementedError as error:
        assert "cannot cast" in str(error)
        return False
    return True


found = {}
for dtype in ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"):
    interpreted = call(0, interpret=True)(jnp.ones(16, dtype))
    assert interpreted.tolist() == [1.0] * 13 + [0.0] * 3
    found[dtype] = lowers(dtype, 0), lowers(dtype, 0.0)
    print(f"jax {jax.__version__}, {dtype}: interpreted, other=0 lowers: {found[dtype][0]}, 0.0: {found[dtype][1]}")
assert all(of_floats for _, of_floats in found.values())
refused = [dtype for dtype, (of_integers, _) in found.items() if not of_integers]
assert refused == ["float8_e4m3fn", "float8_e5m2"], f"changed: an integer fill is refused for {refused}"
PYTHON
