#!/usr/bin/env bash
# transformers: left padding changes the logits of Mamba-2 and Granite 4.0 H models whose input projection has a bias.
#
# Expected: with its attention_mask, a prompt has the same logits in a batch as alone. The model clears padding before
# its input projection and after its convolution for this.
# Seen with transformers 5.23.0 and torch 2.13.0 (CPU) on 2026-11-29: the projection's bias (use_bias of Mamba-2,
# mamba_proj_bias of Granite 4.0 H) turns the cleared padding into inputs of the convolution, which reach the first
# real tokens and, through the state, all later ones. No warning. The output, the largest difference of the logits:
#   mamba2, use_bias=False: 0.000, logits spread by 1.728
#   mamba2, use_bias=True: 2.021, logits spread by 1.603
#   granite, mamba_proj_bias=False: 0.000, logits spread by 1.555
#   granite, mamba_proj_bias=True: 2.861, logits spread by 1.753
# jfa: pads on the right, and its tests take the logits of such checkpoints from prompts without padding.
set -euo pipefail
cd "$(mktemp -d)"
uv run --quiet --isolated --no-project --python 3.12 --with "transformers==5.23.0" --with "torch==2.13.0" \
    python - 2>log <<'PYTHON' || { tail -n 20 log >&2; exit 1; }
import torch
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM, Mamba2Config, Mamba2ForCausalLM

SIZES = dict(vocab_size=32, hidden_size=32, num_hidden_layers=2, pad_token_id=0, initializer_range=0.3)


def mamba2(bias):
    torch.manual_seed(0)
    return Mamba2ForCausalLM(Mamba2Config(**SIZES, num_heads=8, head_dim=8, state_size=16, n_groups=1, use_bias=bias))


def granite(bias):
    torch.manual_seed(0)
    own = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1, mamba_proj_bias=bias)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, shared_intermediate_size=48)
    layers = dict(layer_types=["mamba", "attention"], num_local_experts=0, num_experts_per_tok=0)
    return GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**SIZES, **own, **heads, **layers))


def difference(model):
    """The largest difference that 5 tokens of padding make to a prompt's logits, and the spread of those."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.eval().named_parameters():
            if name.endswith(("proj.bias", "conv1d.bias")):
                x.normal_(std=0.5)  # a new model's are zeros
        prompt = torch.randint(3, 32, (1, 12))
        alone = model(prompt).logits[0]
        padded = torch.nn.functional.pad(prompt, (5, 0), value=0)
        batch = torch.cat([padded, torch.randint(3, 32, (1, 17))])
        mask = torch.ones_like(batch)
        mask[0, :5] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        more = {"position_ids": positions} if model.config.model_type == "granitemoehybrid" else {}
        found = model(batch, attention_mask=mask, **more).logits[0, 5:]
        return float((found - alone).abs().max()), float(alone.std())


for make, flag in ((mamba2, "use_bias"), (granite, "mamba_proj_bias")):
    for bias in (False, True):
        largest, spread = difference(make(bias))
        print(f"{make.__name__}, {flag}={bias}: {largest:.3f}, logits spread by {spread:.3f}")
        assert (largest > spread) if bias else (largest < 1e-4), "changed"
PYTHON
