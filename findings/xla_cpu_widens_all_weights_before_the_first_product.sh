#!/usr/bin/env bash
# jaxlib on a CPU: weights that are converted for a product are all converted at the begin of a program, and held.
#
# Expected: x @ w1.astype(float32) @ w2.astype(float32) ... needs memory for one converted weight at a time, since each
# product needs the one before it.
# Seen with jax 0.12.0.1 on a CPU on 2026-11-30: the temporaries of a chain of eight products have the size of all eight
# weights in float32. A model whose weights are stored in 8 or 4 bits takes the memory of the float model at each step,
# all of it fresh from the kernel, which clears each page: a decode step of 135M numbers took 150 ms, and 19 with
# one weight at a time. lax.optimization_barrier((x, w)) before each conversion helps, and so does
# XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false. The output, in weights:
#   default: 8.0, with barriers: 1.0, with the other scheduler: 1.0
# jfa: dequantizes behind such barriers (jfa/kernels/xla/products.py).
set -euo pipefail
cd "$(mktemp -d)"
cat > program.py <<'PYTHON'
import jax
import jax.numpy as jnp
from jax import lax

COUNT, SIZE = 8, 1024


def temporaries(barrier):
    """Those of a chain of products, in weights of float32."""

    @jax.jit
    def chain(x, weights):
        for w in weights:
            if barrier:
                x, w = lax.optimization_barrier((x, w))
            x = x @ w.astype(jnp.float32).T
        return x

    x, w = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((8, SIZE), jnp.float32), ((SIZE, SIZE), jnp.int8)))
    memory = chain.lower(x, [w] * COUNT).compile().memory_analysis()
    return round(memory.temp_size_in_bytes / (4 * SIZE * SIZE), 1)


print(temporaries(False), temporaries(True))
PYTHON
run() {
  JAX_PLATFORMS=cpu XLA_FLAGS="$1" uv run --quiet --isolated --no-project --python 3.12 \
      --with "jax==0.12.0.1" --with "jaxlib==0.12.0.1" python program.py
}
read -r plain barriers < <(run "")
read -r other _ < <(run "--xla_cpu_enable_concurrency_optimized_scheduler=false")
seen="default: $plain, with barriers: $barriers, with the other scheduler: $other"
echo "$seen"
[ "$seen" = "default: 8.0, with barriers: 1.0, with the other scheduler: 1.0" ] || { echo "changed" >&2; exit 1; }
