#!/usr/bin/env bash
# PEFT: an adapter that is saved and loaded has other scales where two patterns of alpha_pattern match a module.
#
# Expected: what save_pretrained wrote computes, loaded into the same base, what it computed before.
# Seen with peft 0.21.2, transformers 5.24.0 and torch 2.14.1 (CPU) on 2026-11-28: the first pattern of the dictionary
# that matches counts, and save_pretrained writes the dictionary with sorted keys. Of {"q_proj": 16,
# "layers.0.self_attn.q_proj": 64} the second is first in the file, so layer 0 is scaled by 16 instead of 4. No warning.
# The output:
#   scales of the two layers: [4.0, 4.0] before, [16.0, 4.0] after loading; the logits differ by 0.2 or more of their std
# jfa: takes the patterns in the order of the file, as PEFT does when it loads, and its guide says so.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "peft==0.21.2" --with "transformers==5.24.0" \
    --with "torch==2.14.1" python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base():
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4)).eval()


def scales(model):
    return [layer.self_attn.q_proj.scaling["default"] for layer in model.base_model.model.model.layers]


patterns = {"q_proj": 16, "layers.0.self_attn.q_proj": 64}
trained = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj"], alpha_pattern=patterns)).eval()
torch.manual_seed(1)
with torch.no_grad():
    for name, x in trained.named_parameters():
        if "lora_" in name:
            x.normal_()
    ids = torch.arange(16)[None]
    before = trained(ids).logits
    trained.save_pretrained("adapter")
    loaded = PeftModel.from_pretrained(base(), "adapter").eval()
    after = loaded(ids).logits
moved = float((after - before).abs().max() / before.std())
print(f"scales of the two layers: {scales(trained)} before, {scales(loaded)} after loading; the logits differ by", end=" ")
print("0.2 or more of their std" if moved >= 0.2 else f"{moved:.1g} of their std")
assert scales(trained) == [4.0, 4.0] and scales(loaded) == [16.0, 4.0] and moved >= 0.2, "changed"
PYTHON
