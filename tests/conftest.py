"""For the whole suite."""

import os
from pathlib import Path

import pytest

# The same forms of weights on every machine that runs the tests.
os.environ["JFA_CPU_WEIGHTS"] = "float32"

# Tests spend far more time compiling than computing: disabling LLVM's optimizations saves a quarter of the suite's
# time. XLA's own passes still run. The flag must be set before JAX starts.
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"
# Eight devices, for tests of meshes. What does not ask for a mesh runs on the first.
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

_MOST_MAPS = 20_000  # of a process; Linux allows 65,530, and XLA on a CPU crashes at the next one
_MAPS = Path("/proc/self/maps")


def drop_programs() -> None:
    """Drops compiled programs before they fill the process's table of memory maps, of which each needs a few."""
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def few_programs_in_memory():
    """Only between files: a test may rely on what a fixture of its file has compiled."""
    drop_programs()


@pytest.fixture
def few_programs_before():
    """For tests that compile very many programs, and rely on none."""
    drop_programs()


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """What a command keeps for its next start is in tmp_path, and JAX forgets its cache there."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()


@pytest.fixture
def changing_kernels(monkeypatch):
    """setattr of kernels; what was traced before the change, and with it, is dropped."""
    import jax

    class Kernels:
        def setattr(self, *change):
            monkeypatch.setattr(*change)
            jax.clear_caches()

    yield Kernels()
    jax.clear_caches()
