"""Attention of torch, in this process or in one of another Python.

As a script, with a Python that has torch and numpy but not JAX, it answers elsewhere.py: one line of JSON for each.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Attention:
    """One attention function with its gradients.

    Args:
      attend: (q, k, v, ...) -> output, of tensors.
      direction: "forward", "backward" or "both".
      heads_first: attend takes [b, h, t, d] instead of [b, t, h, d].
    """

    def __init__(self, attend: Callable, direction: str, *, heads_first: bool):
        import torch  # type: ignore[import-not-found]

        self._torch, self._attend, self._direction, self._heads_first = torch, attend, direction, heads_first
        self._device = device()

    def prepare(self, arrays: Sequence[np.ndarray], dtype: str) -> tuple:
        """Arguments of run, from float32 arrays, the last of which is the cotangent of the output."""
        wants = self._direction != "forward"
        inputs = tuple(self._tensor(x, dtype).requires_grad_(wants) for x in arrays[:-1])
        cotangent = self._tensor(arrays[-1], dtype)
        return (self._attend(*inputs), inputs, cotangent) if self._direction == "backward" else (inputs, cotangent)

    def run(self, *prepared) -> tuple:
        if self._direction == "backward":
            out, inputs, cotangent = prepared
            return self._done(*self._torch.autograd.grad(out, inputs, cotangent, retain_graph=True))
        inputs, cotangent = prepared
        out = self._attend(*inputs)
        gradients = () if self._direction == "forward" else self._torch.autograd.grad(out, inputs, cotangent)
        return self._done(out, *gradients)

    def read(self, outputs: tuple) -> tuple[np.ndarray, ...]:
        return tuple(self._ordered(x.detach()).float().cpu().numpy() for x in outputs)

    @staticmethod
    def num_bytes(prepared: tuple) -> int:
        inputs, cotangent = prepared[-2:]
        return sum(x.numel() * x.element_size() for x in (*inputs, cotangent))

    def peak_bytes(self, prepared: tuple) -> int:
        """GPU memory that a run uses in addition to its arguments."""
        cuda = self._torch.cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        self.run(*prepared)
        return cuda.max_memory_allocated() - before

    def _tensor(self, x: np.ndarray, dtype: str):
        rows = self._torch.from_numpy(np.array(x, np.float32)).to(self._device, getattr(self._torch, dtype))
        return self._ordered(rows).contiguous()

    def _ordered(self, x):
        return x.transpose(1, 2) if self._heads_first else x

    def _done(self, *outputs) -> tuple:
        if self._device == "cuda":
            self._torch.cuda.synchronize()
        return outputs


def device() -> str:
    import torch  # type: ignore[import-not-found]

    return "cuda" if torch.cuda.is_available() else "cpu"


def about() -> dict[str, Any]:
    import torch  # type: ignore[import-not-found]

    return {"library": f"torch {torch.__version__}", "threads": torch.get_num_threads()}


def sdpa(causal: bool) -> Callable:
    """torch's scaled_dot_product_attention."""
    import torch  # type: ignore[import-not-found]

    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda q, k, v: attend(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def _answers(asked: Any, state: dict[str, Any]) -> dict[str, Any]:
    match asked["do"]:
        case "start":
            state.clear()
            call = asked["call"]
            state["attention"] = Attention(sdpa(call["causal"]), call["direction"], heads_first=True)
            state["prepared"] = []
            return {"about": about()}
        case "prepare":
            with np.load(asked["file"]) as file:
                arrays = [file[name] for name in file.files]
            state["prepared"].append(state["attention"].prepare(arrays, asked["dtype"]))
            return {"num_bytes": Attention.num_bytes(state["prepared"][-1])}
        case "run":
            start = time.perf_counter()
            state["outputs"] = state["attention"].run(*state["prepared"][asked["index"]])
            return {"ms": (time.perf_counter() - start) * 1e3}
        case "read":
            np.savez(asked["file"], *state["attention"].read(state["outputs"]))
            return {}
    raise ValueError(f"unknown request {asked}")


if __name__ == "__main__":
    state: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            answer = _answers(json.loads(line), state)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
