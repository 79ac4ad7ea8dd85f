"""For the whole suite."""

import os

# Tests compile far longer than they compute: without LLVM's optimizations a quarter of the suite's time goes. What XLA
# itself does to a program stays. It must be said before JAX starts.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
