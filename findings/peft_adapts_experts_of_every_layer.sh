#!/usr/bin/env bash
# PEFT: layers_to_transform and exclude_modules do not apply to target_parameters.
#
# Expected: with layers_to_transform=[0], only layer 0 gets low-rank parts ("If a list of ints is passed, it will apply
# the adapter to the layer indices that are specified in this list").
# Seen with peft 0.21.2, transformers 5.24.0 and torch 2.14.1 (CPU) on 2026-11-28: modules follow it, but the experts of
# every layer are adapted and trained, also where exclude_modules names them. No warning. The output:
#   layers_to_transform=[0]: q_proj in layers [0], experts in layers [0, 1, 2]
#   exclude_modules=['experts']: experts in layers [0, 1, 2]
# jfa: takes experts where the file has tensors of them, and refuses files that lack some of target_parameters.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "peft==0.21.2" --with "transformers==5.24.0" \
    --with "torch==2.14.1" python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
import re

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


def layers(part, **options):
    """The layers in which modules of this name have low-rank parts that are trained."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4)
    sizes |= dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"], **options)
    model = get_peft_model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)), config)
    named = [name for name, x in model.named_parameters() if "lora_" in name and part in name and x.requires_grad]
    return sorted({int(re.search(r"layers\.(\d+)", name)[1]) for name in named})


chosen = dict(layers_to_transform=[0])
found = layers("q_proj", **chosen), layers("experts", **chosen)
print(f"layers_to_transform=[0]: q_proj in layers {found[0]}, experts in layers {found[1]}")
excluded = layers("experts", exclude_modules=["experts"])
print(f"exclude_modules=['experts']: experts in layers {excluded}")
assert found == ([0], [0, 1, 2]) and excluded == [0, 1, 2], "changed"
PYTHON
