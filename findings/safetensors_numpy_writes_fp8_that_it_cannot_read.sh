#!/usr/bin/env bash
# safetensors.numpy saves a float8 array, and cannot load the file again.
#
# Expected: what save_file writes, load_file reads, as it does for bfloat16 (also a type of ml_dtypes).
# Seen with safetensors 0.8.0, ml_dtypes 0.6.0 and NumPy 2.5.5 on 2026-11-28: save_file writes F8_E4M3, and load_file
# raises AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'.
# jfa: reads the bytes at the offsets of the header, and views them as ml_dtypes types.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "safetensors==0.8.0" --with "ml_dtypes==0.6.0" --with "numpy==2.5.5" python - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file


def round_trip(dtype):
    save_file({"x": np.arange(4).astype(dtype)}, "x.safetensors")
    try:
        return str(load_file("x.safetensors")["x"].dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


brain, eight = round_trip(ml_dtypes.bfloat16), round_trip(ml_dtypes.float8_e4m3fn)
print(f"safetensors {version('safetensors')}: bfloat16 comes back as {brain!r}, float8_e4m3fn as {eight!r}")
assert brain == "bfloat16" and "float8_e4m3fn" in eight and "Error" in eight, "changed: fp8 is read back now"
PYTHON
