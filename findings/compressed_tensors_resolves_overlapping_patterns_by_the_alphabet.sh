#!/usr/bin/env bash
# compressed-tensors: of two patterns of a layer, the alphabet decides, not the order in the config.
#
# Expected: the first group of the config decides (apply_quantization_config uses an ordered dictionary "to preserve
# target ordering in config"), or the more specific pattern (match_targets: "from most specific to least specific").
# Seen with compressed-tensors 0.20.0 and torch 2.13.0 (CPU) on 2026-11-28: match_targets sorts the patterns as text.
# A layer of "re:.*proj" with 4 bits and "re:.*q_proj" with 8 gets 4 bits in both orders ("p" < "q"). The same pattern
# written "re:.*[q]_proj" gets it 8 bits ("[" < "p"). A name without "re:" does come first. The output:
#   re:.*q_proj: 4 where it is the first group, 4 where it is the second
#   re:.*[q]_proj: 8 where it is the first group, 8 where it is the second
#   q_proj: 8 where it is the first group, 8 where it is the second
# Public report: vllm-project/compressed-tensors#847, with #852 as a change that would put longer patterns first.
# jfa: refuses a layer that matches targets with different weights, and asks to name it in one group.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.11 --with "compressed-tensors==0.20.0" --with "torch==2.13.0" \
    python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
from importlib.metadata import version

import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme


def bits(*targets):
    """Bits that the layer q_proj gets from groups (name of a preset, target), in this order."""
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(128, 128)})
    groups = {f"group_{i}": preset_name_to_scheme(preset, [target]) for i, (preset, target) in enumerate(targets)}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups), show_progress=False)
    return model["q_proj"].quantization_scheme.weights.num_bits


every = ("W4A16", "re:.*proj")
print(f"compressed-tensors {version('compressed-tensors')}: bits with 4 for {every[1]} and 8 for another target")
found = {}
for target in ("re:.*q_proj", "re:.*[q]_proj", "q_proj"):
    found[target] = (bits(("W8A16", target), every), bits(every, ("W8A16", target)))
    print(f"{target}: {found[target][0]} where it is the first group, {found[target][1]} where it is the second")
assert found["q_proj"] == (8, 8), "changed: an exact name"
assert found["re:.*q_proj"] == (4, 4), "changed: patterns are no longer sorted as text"
assert found["re:.*[q]_proj"] == (8, 8), "changed: patterns are no longer sorted as text"
PYTHON
