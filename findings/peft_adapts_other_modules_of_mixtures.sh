#!/usr/bin/env bash
# PEFT: in models whose experts transformers keeps in one tensor, target_modules names other modules than it says.
#
# Expected: a regular expression is matched with whole names ("If this is a string, a regex match will be performed"), so
# that of one layer's q_proj adapts that module alone, as it does in a model without experts; and the names of a shared
# expert's layers adapt the shared expert.
# Seen with peft 0.21.2, transformers 5.24.0 and torch 2.14.1 (CPU) on 2026-11-30: for Qwen3-MoE the expression becomes
# the end of a name, and q_proj of every layer is adapted; for Qwen3-Next the shared expert is not adapted, and all routed
# experts are, at eight times the rank (twice, for each of 4 experts). The only warnings are of rank and alpha patterns
# that nobody gave. The output:
#   Qwen3, '.*\.0\.self_attn\.q_proj': layers.0.self_attn.q_proj 2
#   Qwen3-MoE, '.*\.0\.self_attn\.q_proj': layers.0.self_attn.q_proj 2, layers.1.self_attn.q_proj 2
#   Qwen3-Next, ['shared_expert.gate_proj', 'shared_expert.up_proj']: layers.0.mlp.experts 16, layers.1.mlp.experts 16
# jfa: takes the modules that are named, and writes configurations that PEFT reads as the same ones: full names instead
# of an expression, and a shared expert's layers as target_parameters.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "peft==0.21.2" --with "transformers==5.24.0" \
    --with "torch==2.14.1" python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
import re

from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
sizes |= dict(num_attention_heads=4, num_key_value_heads=2)
experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
shared = dict(shared_expert_intermediate_size=16, layer_types=["full_attention"] * 2)
one_layer, of_shared = r".*\.0\.self_attn\.q_proj", ["shared_expert.gate_proj", "shared_expert.up_proj"]


def adapted(name, model, targets):
    """The modules with low-rank parts, and the number of rows of their A."""
    made = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    found = []
    for parameter, x in made.named_parameters():
        if "lora_A" in parameter:
            module = re.sub(r"^base_model\.model\.model\.|(\.base_layer)*\.lora_A.*", "", parameter)
            found.append(f"{module} {x.shape[0]}")
    print(f"{name}, {targets!r}: {', '.join(found)}".replace("\\\\", "\\"))
    return found


plain = adapted("Qwen3", Qwen3ForCausalLM(Qwen3Config(**sizes)), one_layer)
mixture = adapted("Qwen3-MoE", Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)), one_layer)
next_one = adapted("Qwen3-Next", Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **experts, **shared)), of_shared)
q_proj = [f"layers.{i}.self_attn.q_proj 2" for i in (0, 1)]
assert plain == q_proj[:1] and mixture == q_proj, "changed"
assert next_one == [f"layers.{i}.mlp.experts 16" for i in (0, 1)], "changed"
PYTHON
