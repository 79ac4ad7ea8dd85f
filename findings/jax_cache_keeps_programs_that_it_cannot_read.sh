#!/usr/bin/env bash
# jax: the persistent compilation cache stores programs that were compiled for a device that is not there, and cannot
# read them back.
#
# Expected: `lowered.compile()` for a device of a topology (jax.experimental.topologies) is found in the cache by the next
# process, as any other program is, or is not stored at all: JAX names backends whose programs cannot be stored.
# Seen with jax 0.12.0.1 and libtpu 0.0.52 on a CPU on 2026-11-30: the first process stores the program. The second
# finds it, cannot load it, warns, and compiles again; each later one does the same. A test suite that turns warnings
# into errors fails from its second run on. The output:
#   process 1: compiled, 1 file in the cache
#   process 2: compiled, 1 file in the cache, warned: Error reading persistent compilation cache entry for 'jit_f'
# jfa: compiles for devices that are not there with the cache turned off (bench/proof/aot.py).
set -euo pipefail
cd "$(mktemp -d)"
cat > program.py <<'PYTHON'
import os
import sys
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import topologies

jax.config.update("jax_compilation_cache_dir", os.path.abspath("cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
device = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))


@jax.jit
def f(x):
    return jnp.tanh(x @ x)


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    f.trace(x).lower().compile()
names = [name for name in os.listdir("cache") if name.startswith("jit_f")] if os.path.isdir("cache") else []
warned = "".join(f", warned: {str(one.message).partition(':')[0]}" for one in caught if "cache" in str(one.message))
print(f"process {sys.argv[1]}: compiled, {len(names)} file in the cache{warned}")
PYTHON
for number in 1 2; do
  JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 uv run --quiet --isolated --no-project --python 3.12 \
      --with "jax==0.12.0.1" --with "jaxlib==0.12.0.1" --with "libtpu==0.0.52" \
      python program.py "$number" 2>log || { tail -n 20 log >&2; exit 1; }
done | tee output
grep -q "^process 1: compiled, 1 file in the cache$" output || { echo "changed: the program is not stored" >&2; exit 1; }
grep -q "^process 2: .* warned: Error reading persistent compilation cache entry" output ||
  { echo "changed: the stored program is read" >&2; exit 1; }
