"""Writes defaults.json next to this file: what transformers takes for granted in a config.json, for each model_type.

Packages: transformers==5.23.0 (without torch).
Run:      python tests/golden/defaults.py
"""

import json
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

FAMILIES = "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3".split()
FAMILIES += "mamba2 granitemoehybrid qwen3_next".split()
OF_TRAINING = {"model_type", "initializer_range", "use_cache", "attention_dropout", "pretraining_tp"}
OF_TRAINING |= {"resid_pdrop", "embd_pdrop", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits"}
LEFT_OUT = {*PreTrainedConfig().to_dict(), *OF_TRAINING, "bos_token_id", "eos_token_id", "pad_token_id"}
LEFT_OUT -= {"tie_word_embeddings"}

if __name__ == "__main__":
    found = {}
    for kind in FAMILIES:
        values = CONFIG_MAPPING[kind]().to_dict()
        found[kind] = {key: value for key, value in values.items() if key not in LEFT_OUT}
    file = Path(__file__).with_suffix(".json")
    file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
