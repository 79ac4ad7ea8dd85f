#!/usr/bin/env bash
# gguf.GGUFReader misreads the later parts of a model that gguf.GGUFWriter wrote in parts with an alignment of its own.
#
# Expected: what the package writes, it reads. Parts follow its own documentation: split_max_tensors, add_custom_alignment.
# Seen with gguf 0.19.0 and NumPy 2.5.5 on 2026-11-28: general.alignment is written into the first part only, but every
# part is aligned by it. The reader takes 32 for the others, begins before the data, and returns zeros and shifted numbers.
# jfa: for a part that does not say its alignment, the length of the file decides between that of the first part and 32.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "gguf==0.19.0" --with "numpy==2.5.5" python - <<'PYTHON'
from importlib.metadata import version

import gguf
import numpy as np


def read_back(alignment):
    writer = gguf.GGUFWriter("model.gguf", "llama", split_max_tensors=1)
    if alignment:
        writer.add_custom_alignment(alignment)
    for name in ("a", "b"):
        writer.add_tensor(name, np.arange(1, 9, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [
        gguf.GGUFReader(f"model-0000{part}-of-00002.gguf").tensors[0].data.tolist() for part in (1, 2)
    ]


want = list(range(1, 9))
for alignment in (None, 4096):
    first, second = read_back(alignment)
    print(f"gguf {version('gguf')}, alignment {alignment}: part 1 {first}, part 2 {second}")
    assert first == want
    assert (second == want) == (alignment is None), "changed: later parts are read with their alignment"
PYTHON
