#!/usr/bin/env bash
# The residual of jax.nn.dot_product_attention has the query's dtype and no gradient.
#
# Expected: return_residual=True gives the log-sum-exp in float32, so that parts computed over pieces of the keys can
# be combined (as ring attention and split decoding do), and a gradient flows through it.
# Seen with jax 0.12.0.1 on 2026-11-28: with bfloat16 inputs the residual is bfloat16 (5.90625 instead of 5.9136), so
# that the weights of two combined parts are off by about one per cent, and its gradient is zero in every dtype.
# jfa: the residual is float32 and differentiable.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp

shapes = (1, 4, 2, 64), (1, 512, 2, 64), (1, 512, 2, 64)
q, k, v = (jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16) for i, s in enumerate(shapes))
wide = jnp.einsum("bqhd,bkhd->bqhk", q.astype(jnp.float32), k.astype(jnp.float32)) / 8
halves = (slice(0, 256), slice(256, 512))
got = [jax.nn.dot_product_attention(q, k[:, at], v[:, at], return_residual=True)[1] for at in halves]
weights = jax.nn.softmax(jnp.stack(got).astype(jnp.float32), 0)
exact = jax.nn.softmax(jnp.stack([jax.nn.logsumexp(wide[..., at], -1) for at in halves]), 0)
error = float(jnp.abs(weights / exact - 1).max())

q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
gradient = jax.grad(lambda q: jax.nn.dot_product_attention(q, k32, v32, return_residual=True)[1].sum())(q32)
print(f"jax {jax.__version__}: residual in {got[0].dtype}, weights of two parts off by {error:.1%}")
print(f"largest gradient of the float32 residual: {float(jnp.abs(gradient).max())}")
assert got[0].dtype == jnp.bfloat16 and error > 0.005, "changed: the residual is more exact now"
assert float(jnp.abs(gradient).max()) == 0.0, "changed: the residual has a gradient now"
PYTHON
