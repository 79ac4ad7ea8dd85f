#!/usr/bin/env bash
# XLA on a CPU converts a whole fp8 array to float16 in order to gather a few rows of it.
#
# Expected: reading 4 of 4,096 rows of a float8_e4m3fn array moves bytes and touches 4 rows.
# Seen with jax 0.12.0.1 on 2026-11-28: the compiled program holds a float16 array of all 4,096 rows ("f16[4096,...]
# convert"), and a scatter into a donated array has temporaries of twice the array's size. The same programs on uint8
# have neither. So an fp8 KV cache is widened and copied in every step.
# jfa: on a CPU, fp8 pages are moved as bytes (bitcast to uint8) and widened tile by tile.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp

POOL, ROWS = (4096, 16, 64), (4, 16, 64)


def compiled(dtype):
    pool, places, rows = (jax.ShapeDtypeStruct(*x) for x in ((POOL, dtype), ((4,), jnp.int32), (ROWS, dtype)))
    gather = jax.jit(lambda pool, places: pool[places]).lower(pool, places).compile()
    scatter = jax.jit(lambda pool, places, rows: pool.at[places].set(rows), donate_argnums=0)
    return gather.as_text(), scatter.lower(pool, places, rows).compile().memory_analysis().temp_size_in_bytes


text, temporaries = compiled(jnp.float8_e4m3fn)
plain, plain_temporaries = compiled(jnp.uint8)
widened = "f16[4096,16,64]" in text
print(f"jax {jax.__version__}: fp8 gather widens the pool: {widened}; temporaries of a scatter {temporaries:,} bytes")
print(f"uint8 gather widens the pool: {'f16[4096' in plain}; temporaries of a scatter {plain_temporaries:,} bytes")
assert widened and temporaries >= 2 * 4096 * 16 * 64, "changed: fp8 arrays are moved as they are now"
assert "f16[4096" not in plain and plain_temporaries < 4096
PYTHON
