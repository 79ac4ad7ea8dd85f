#!/usr/bin/env bash
# jax.nn.dot_product_attention in float16 works on a CPU without jit, and fails under jax.jit.
#
# Expected: jit changes the speed of a function, not whether it works; float16 is a documented dtype of its arguments.
# Seen with jax 0.12.0.1 on 2026-11-28: under jit "The precision 'F16_F16_F32' is not supported by dot_general on CPU";
# without jit, and in bfloat16, it works. So a float16 model that is tested eagerly on a CPU fails when it is compiled.
# jfa: jfa.dot_product_attention takes float16 everywhere; its oracle is NumPy float64.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp


def attempt(attend, dtype):
    x = jnp.ones((1, 8, 2, 16), dtype)
    try:
        return str(attend(x, x, x).dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


eager, compiled = jax.nn.dot_product_attention, jax.jit(jax.nn.dot_product_attention)
print(f"jax {jax.__version__}: float16 gives {attempt(eager, jnp.float16)!r}, under jit {attempt(compiled, jnp.float16)!r}")
assert attempt(eager, jnp.float16) == "float16" and attempt(compiled, jnp.bfloat16) == "bfloat16"
assert "F16_F16_F32" in attempt(compiled, jnp.float16), "changed: float16 works under jit now"
PYTHON
