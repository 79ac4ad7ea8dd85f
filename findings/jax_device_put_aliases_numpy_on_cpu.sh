#!/usr/bin/env bash
# jax.device_put(x, may_alias=False) still shares memory with x on a CPU.
#
# Expected: may_alias=False makes a copy, so that the caller may write to its NumPy array again.
# Seen with jax 0.12.0.1 on 2026-11-28: if the array happens to be 64-byte aligned, the device array shares its memory,
# whatever may_alias is; a later write to the NumPy array changes the JAX array. jnp.array(x, copy=True) copies. About
# half of all larger NumPy arrays have this alignment, so whether a program works depends on chance.
# jfa: arrays that the host writes again are passed through jnp.array, or are new in every step.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np

memory = np.zeros(1024 * 4 + 64, np.uint8)
start = -memory.ctypes.data % 64
x = memory[start : start + 1024 * 4].view(np.float32)

put = jax.device_put(x, may_alias=False).block_until_ready()
copied = jnp.array(x, copy=True)
x[0] = 99.0
print(f"jax {jax.__version__}: after x[0] = 99, device_put(may_alias=False) has {put[0]}, jnp.array {copied[0]}")
assert put[0] == 99.0, "changed: device_put(may_alias=False) copies now"
assert copied[0] == 0.0
PYTHON
