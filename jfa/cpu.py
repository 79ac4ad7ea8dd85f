"""Which form of weights this CPU multiplies fastest, measured once and kept on disk."""

import functools
import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jfa.products import times_rows
from jfa.quant import QuantizedArray

FORMS = ("float32", "bfloat16", "int8")
_SAMPLES = 8  # the fastest counts
_ROWS = (1, 8)  # of inputs: a chat, a batch
_WEIGHTS, _SIZE = 4, 2048  # 64 MiB in float32, more than most caches


@functools.cache
def milliseconds(form: str) -> tuple[float, float]:
    """The time of products of 1 and of 8 float32 rows with weights in this form.

    Measured in 0.2 seconds, then read from the user's cache folder while CPU, jaxlib and XLA's flags stay the same.
    int8 has a scale per row, and the inputs are two int8 numbers per element.
    """
    file = _folder() / "jfa" / "products.json"
    flags = os.environ.get("XLA_FLAGS", "")
    key = f"{form}: {_name()}, {os.cpu_count()} threads, jaxlib {importlib.metadata.version('jaxlib')} {flags}".rstrip()
    known = _read(file)
    if key in known:
        one, many = known[key]
        return one, many
    found = _measured(form)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_text(json.dumps(_read(file) | {key: found}, indent=1))
        os.replace(part, file)
    except OSError:
        pass  # a file that cannot be written costs a measurement in each process
    return found


def _read(file: Path) -> dict[str, list[float]]:
    """The times in a file that are valid."""
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}

    def is_valid(times: object) -> bool:
        return isinstance(times, list) and len(times) == 2 and all(type(x) is float and x > 0 for x in times)

    return {key: times for key, times in known.items() if is_valid(times)} if isinstance(known, dict) else {}


def fastest(forms: tuple[str, ...]) -> str:
    """The fastest of some FORMS: the first, unless a later one is at least as fast for a row and a tenth faster for 8.

    The environment variable JFA_CPU_WEIGHTS names one instead, if it is among them.
    """
    if (given := os.environ.get("JFA_CPU_WEIGHTS")) is not None:
        if given not in FORMS:
            raise ValueError(f"JFA_CPU_WEIGHTS must be one of {', '.join(FORMS)}, got {given!r}")
        return given if given in forms else forms[0]
    best = forms[0]
    for form in forms[1:]:
        (one, many), (best_one, best_many) = milliseconds(form), milliseconds(best)
        if one <= 1.05 * best_one and many <= 0.9 * best_many:
            best = form
    return best


def _measured(form: str) -> tuple[float, float]:
    numbers = np.resize(np.random.default_rng(0).integers(-127, 128, _SIZE + 1, np.int8), (_SIZE, _SIZE))

    def weight() -> Array | QuantizedArray:
        if form != "int8":
            return jnp.array(numbers, form)
        return QuantizedArray(values=jnp.array(numbers), scales=jnp.ones(_SIZE), rounds_inputs=2)

    weights = [weight() for _ in range(_WEIGHTS)]

    @jax.jit
    def products(x, weights):
        return sum(times_rows(x, weight) for weight in weights)

    def run(rows: int) -> float:
        start = time.perf_counter()
        products(np.ones((rows, _SIZE), np.float32), weights).block_until_ready()
        return time.perf_counter() - start

    for rows in _ROWS:
        run(rows)
    one, many = (round(min(run(rows) for _ in range(_SAMPLES)) * 1e3, 4) for rows in _ROWS)
    return one, many


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in about.items()}
    # virtual machines often hide the name, but not the family and the model
    named = ("model name", "cpu family", "model")
    return " ".join(fields[name] for name in named if name in fields) or platform.machine()
