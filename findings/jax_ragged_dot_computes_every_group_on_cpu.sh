#!/usr/bin/env bash
# jax.lax.ragged_dot on a CPU costs as many FLOP as if every row went through every group.
#
# Expected: 64 rows, each multiplied by the weight of its own group, cost 64 row products, however many groups exist.
# Seen with jax 0.12.0.1 on 2026-11-28: XLA's own cost analysis counts 8.4 million FLOP with 1 group, 67.6 million with
# 8 and 541 million with 64, and temporaries grow likewise. A mixture of 64 experts costs as much as 64 dense layers.
# jfa: tokens are sorted by expert and cut into blocks that belong to one expert each (jfa_models/model/layers.py).
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "jax==0.12.0.1" python - <<'PYTHON'
import jax
import jax.numpy as jnp


def flops(groups):
    shapes = ((64, 256), jnp.float32), ((groups, 256, 256), jnp.float32), ((groups,), jnp.int32)
    lowered = jax.jit(jax.lax.ragged_dot).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return lowered.compile().cost_analysis()["flops"]


found = {groups: flops(groups) for groups in (1, 8, 64)}
print(f"jax {jax.__version__}: FLOP of 64 rows by number of groups: {found}")
assert 7 < found[8] / found[1] < 9 and 60 < found[64] / found[1] < 68, "changed: the cost no longer grows with groups"
PYTHON
