"""For the whole suite."""

import os

# The same forms of weights on every machine that runs the tests.
os.environ["JFA_CPU_WEIGHTS"] = "float32"

# Tests spend far more time compiling than computing: disabling LLVM's optimizations saves a quarter of the suite's
# time. XLA's own passes still run. The flag must be set before JAX starts.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
