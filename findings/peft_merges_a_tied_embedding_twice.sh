#!/usr/bin/env bash
# PEFT: with ensure_weight_tying, merging a LoRA of a tied embedding adds its change to the shared matrix twice.
#
# Expected: merge_and_unload gives a model that computes what the adapter computed, all the more with the option that
# exists for tied weights.
# Seen with peft 0.21.2, transformers 5.24.0 and torch 2.14.1 (CPU) on 2026-11-28: the embedding and the output layer
# share one matrix, both are merged, and each adds its change to it. No warning. The output:
#   merged change / change of the adapter: 2.000 with ensure_weight_tying, 1.000 without
# jfa: merges both uses of such an adapter to what they computed before, and unties the head if they differ.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "peft==0.21.2" --with "transformers==5.24.0" \
    --with "torch==2.14.1" python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def merged_over_added(ensure):
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=True)).eval()
    before = model.get_input_embeddings().weight.detach().clone()
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens"], ensure_weight_tying=ensure)
    )
    torch.manual_seed(1)
    with torch.no_grad():
        layer = adapted.base_model.model.model.embed_tokens
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        a.normal_(std=0.1)
        b.normal_(std=0.1)
        added = 2.0 * (b @ a).T
        after = adapted.merge_and_unload().get_input_embeddings().weight
        return float((after - before).norm() / added.norm())


tied, plain = merged_over_added(True), merged_over_added(False)
print(f"merged change / change of the adapter: {tied:.3f} with ensure_weight_tying, {plain:.3f} without")
assert abs(tied - 2) < 0.01 and abs(plain - 1) < 0.01, "changed"
PYTHON
