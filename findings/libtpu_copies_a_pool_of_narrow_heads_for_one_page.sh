#!/usr/bin/env bash
# libtpu: a program whose Pallas kernel reads one page of a pool copies the whole pool, if its heads are narrower than
# 128; and one that views the pool with an axis of heads around a scatter copies it too.
#
# Expected: the pool stays in HBM, where the kernel copies a page of 16 KiB from (memory_space=pl.ANY), and a reshape
# that merges or splits the last two axes costs nothing, as on other platforms.
# Seen with jax 0.12.0.1 and libtpu 0.0.50.1 on 2026-11-30, compiled for a v5e on a CPU, bfloat16, 2,049 pages of 16
# tokens and 8 heads. Bytes that the program accesses by the compiler's cost analysis / bytes of the pool:
#   one page read, [pages, 16, 8, 128]: 0.0, [pages, 16, 8, 64]: 3.1, [pages, 16, 8 * 64]: 0.0
#   tokens written to a donated [pages, 16, 8 * 64]: as [n, 8 * 64]: 0.0, with the pool seen as [.., 8, 64]: 10.3
# XLA stores an array with a last axis of 64 transposed, a kernel gets it with 64 of 128 lanes empty, and two reshapes
# with a scatter between them are not cancelled.
# jfa: pages are [num_pages, page_size, heads * head_dim], and new tokens are reshaped, never the pool (jfa/cache/paged.py).
set -euo pipefail
cd "$(mktemp -d)"
cat > program.py <<'PYTHON'
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

device = topologies.get_topology_desc("v5e:1x1", platform="tpu").devices[0]
PAGES, SIZE, HEADS, TOKENS = 2049, 16, 8, 64


def accessed(function, pool, *others):
    """What function(pool, *others) reads and writes, in pools."""
    args = [jax.ShapeDtypeStruct(*x, sharding=SingleDeviceSharding(device)) for x in (pool, *others)]
    compiled = jax.jit(function, donate_argnums=0).trace(*args).lower(lowering_platforms=("tpu",)).compile()
    return round(compiled.cost_analysis()["bytes accessed"] / (2 * math.prod(pool[0])), 1)


def one_page(pool, page):
    def kernel(page_ref, pool_ref, out_ref, semaphore):
        copy = pltpu.make_async_copy(pool_ref.at[page_ref[0]], out_ref, semaphore)
        copy.start()
        copy.wait()

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(1,),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.SemaphoreType.DMA(())],
    )
    shape = jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype)
    return pl.pallas_call(kernel, grid_spec=spec, out_shape=shape)(page, pool)


def written(by_head, pool, page, slot, tokens):
    if not by_head:
        return pool.at[page, slot].set(tokens.reshape(TOKENS, -1))
    return pool.reshape(*pool.shape[:2], HEADS, -1).at[page, slot].set(tokens).reshape(pool.shape)


index, b16 = jnp.int32, jnp.bfloat16
for rest in ((HEADS, 128), (HEADS, 64), (HEADS * 64,)):
    print(accessed(one_page, ((PAGES, SIZE, *rest), b16), ((1,), index)), end=" ")
for by_head in (False, True):
    others = ((TOKENS,), index), ((TOKENS,), index), ((TOKENS, HEADS, 64), b16)
    print(accessed(functools.partial(written, by_head), ((PAGES, SIZE, HEADS * 64), b16), *others), end=" ")
PYTHON
seen=$(JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 uv run --quiet --isolated --no-project --python 3.12 \
  --with "jax==0.12.0.1" --with "jaxlib==0.12.0.1" --with "libtpu==0.0.50.1" python program.py 2>/dev/null)
echo "$seen"
[ "${seen% }" = "0.0 3.1 0.0 0.0 10.3" ] || { echo "changed" >&2; exit 1; }
