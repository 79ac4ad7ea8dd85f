"""torch in a Python of its own, here one with a stand-in for torch that computes with NumPy."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jfa_bench.measure import attention, elsewhere, peers, roofline

STAND_IN = """
import types
import numpy as np

__version__ = "0.stand-in"
float32 = np.float32
cuda = types.SimpleNamespace(is_available=lambda: False)
get_num_threads = lambda: 3


class Tensor(np.ndarray):
    to = lambda self, device, dtype: self.astype(dtype)
    requires_grad_ = lambda self, wants: self
    transpose = lambda self, first, second: np.swapaxes(self, first, second)
    detach = float = cpu = contiguous = lambda self: self
    numpy = lambda self: np.asarray(self)
    numel = lambda self: self.size
    element_size = lambda self: self.itemsize


from_numpy = lambda x: x.view(Tensor)


def attend(q, k, v, is_causal, enable_gqa):
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    scores = np.where(np.tri(q.shape[2], k.shape[2], dtype=bool) | (not is_causal), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v).view(Tensor)


nn = types.SimpleNamespace(functional=types.SimpleNamespace(scaled_dot_product_attention=attend))
autograd = None
"""
CASE = attention.Case(batch=1, length=24, heads=4, kv_heads=2, head_dim=16, dtype="float32", causal=True)


@pytest.fixture
def python(monkeypatch, tmp_path):
    """A Python with the stand-in, whose process is a new one."""
    (tmp_path / "torch.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(elsewhere, "_worker", elsewhere._Worker)
    monkeypatch.setattr(elsewhere, "SETTLE", 0.0)
    found = {"matrix_tflops": 2.0, "copy_gb_per_s": 10.0}
    monkeypatch.setattr(roofline, "ceilings", lambda dtype, *, clock: found)
    return sys.executable


def measured(python, direction):
    return list(
        attention.measure(
            [CASE], directions=[direction], implementations=["torch"], samples=2, pythons={"torch": python}
        )
    )


def test_it_is_checked_and_timed(python):
    [one] = measured(python, "forward")
    assert one["status"] == "ok", one["reason"]
    assert (one["library"], one["threads"]) == ("torch 0.stand-in", 3)
    assert 0 < one["max_error"] < 1e-5 and len(one["samples_ms"]) == 2 and min(one["samples_ms"]) > 0


def test_an_error_there_is_a_reason_here(python):
    [one] = measured(python, "backward")
    assert one["status"] == "unsupported" and "'NoneType' object has no attribute 'grad'" in one["reason"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="this Python has torch")
def test_a_python_without_torch(monkeypatch):
    monkeypatch.setattr(elsewhere, "_worker", elsewhere._Worker)
    arrays = [jnp.zeros((1, 8, 2, 16))] * 4
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'torch'"):
        elsewhere.program(sys.executable, peers.Call(causal=True, direction="forward"), *arrays)


def test_a_process_that_ends(monkeypatch):
    monkeypatch.setattr(elsewhere, "_worker", elsewhere._Worker)
    with pytest.raises(RuntimeError, match="false ended with exit status 1"):
        elsewhere.program("/bin/false", peers.Call(causal=True, direction="forward"), jax.device_put(np.zeros(1)))
