"""Writes tiny seeded LoRA adapters beside this file, by PEFT itself, with their truth.

For each NAME: the folder adapters/NAME (adapter_config.json and adapter_model.safetensors, as `save_pretrained` of PEFT
writes them; only the order of names in its lists is ours, PEFT's is another one in every run) and adapters/NAME.npz:
what PEFT computes with it on one of the tiny checkpoints of families.py, which the configuration names as
`base_model_name_or_path`. The files are committed, so the tests need none of this. An archive holds

    input_ids i32[2, 24], logits f32[2, 24, 96]
    merged_logits f32[2, 24, 96]: those of merge_and_unload, in a few cases (in the others they are as near to logits)
    and, in the cases that are trained, by the names of the tensors in the file:
    loss f32[]: mean cross entropy of the next tokens, without the first IGNORED_TARGETS of each row
    grad/NAME: its gradient
    stepped/NAME: the tensor after one step of torch.optim.AdamW (lr 1e-2, weight_decay 0.01, the rest as it is)

A case is refused when some kind of its tensors, or what the case is about in its configuration, could be left out
without moving the logits, when PEFT does not read the folder back as it was, and when merging moves the logits. The
folder `pissa` has no archive: its base is not the checkpoint that it names, but that checkpoint less the initial
adapter.

Packages: python 3.12, torch==2.14.1 (CPU), transformers==5.24.0, peft==0.21.2, safetensors, numpy.
Run:      python tests/golden/adapters.py [NAME ...]
          python tests/golden/adapters.py --loads FOLDER NAME
             whether PEFT reads the adapter in FOLDER whole, on the base of the case NAME, and computes NAME.npz

Another PEFT, transformers or torch may write other bytes.
"""

import contextlib
import dataclasses
import math
import re
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

HERE = Path(__file__).parent
OUT = HERE / "adapters"

IGNORED_TARGETS = 8

# In the largest logit difference over the standard deviation of the logits: the change that the adapter makes at least,
# the change that leaving out a part of it makes at least, and the change that a rewriting makes at most.
WORKS = 0.05
MATTERS = 0.02
SAME = 1e-4

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One adapter: its base, its configuration, and what a reader could get wrong."""

    base: str
    config: dict[str, Any]
    # Changes of the configuration that must ask for other tensors, or give other logits with the same, by name.
    wrong: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    trained: bool = False
    # Whether merged logits are those without merging, and whether they are kept nevertheless.
    merges: bool = True
    keeps_merged: bool = False
    dtype: torch.dtype = torch.float32


def all_cases() -> dict[str, Case]:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    dense = [*attention, "gate_proj", "up_proj", "down_proj"]
    lora = {"r": 4, "lora_alpha": 8, "target_modules": dense}
    small = {"r": 2, "lora_alpha": 6}
    dora = {"use_dora": True}
    no_dora = {"dora": {"use_dora": False}}
    patterns = {
        "rank_pattern": {"k_proj": 4, r"^model\.layers\.1\.mlp\.down_proj": 3},
        "alpha_pattern": {"k_proj": 20, r"layers\.\d\.self_attn\.v_proj": 1},
    }
    experts = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    tokens = tokens_of("llama3_tiny")
    return {
        "lora": Case(base="llama3_tiny", config=lora, wrong={"scale": {"lora_alpha": 4}}, trained=True),
        "half_file": Case(base="llama3_tiny", config=lora, dtype=torch.bfloat16),
        "rslora": Case(
            base="llama3_tiny",
            config=small | {"r": 3, "target_modules": ["q_proj", "v_proj", "up_proj"], "use_rslora": True},
            wrong={"root of the rank": {"use_rslora": False}},
            trained=True,
        ),
        # The biases of the base stay as they are, outside the magnitude.
        "dora": Case(
            base="qwen2",
            config=small | dora | {"target_modules": [*attention, "down_proj"]},
            wrong=no_dora,
            trained=True,
        ),
        "dora_embedding": Case(
            base="llama3_tiny",
            config=small | dora | {"target_modules": ["embed_tokens", "q_proj"]},
            wrong=no_dora,
            trained=True,
            keeps_merged=True,
        ),
        "rank_alpha_patterns": Case(
            base="llama3_tiny",
            config=small | patterns | {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
            wrong={"ranks": {"rank_pattern": {}}, "alphas": {"alpha_pattern": {}}},
        ),
        "layers": Case(
            base="llama3_tiny",
            config=small
            | {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            wrong={"layers": {"layers_to_transform": None, "layers_pattern": None}},
        ),
        "regex": Case(
            base="llama3_tiny",
            config=small
            | {
                "target_modules": r".*\.(self_attn\.(q|v)_proj|mlp\.up_proj)",
                "exclude_modules": r".*\.0\.self_attn\.q_proj",
            },
            wrong={"excluded": {"exclude_modules": None}},
        ),
        "all_linear": Case(base="llama3_tiny", config=small | {"target_modules": "all-linear"}),
        "lora_bias": Case(
            base="qwen2",
            config=small | {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True},
            wrong={"scale": {"lora_alpha": 3}},
            trained=True,
            keeps_merged=True,
        ),
        "bias_only": Case(
            base="qwen2",
            config=small | {"target_modules": ["q_proj", "v_proj", "down_proj"], "bias": "lora_only"},
        ),
        "bias_all": Case(base="qwen2", config=small | {"target_modules": ["q_proj"], "bias": "all"}),
        "embeddings": Case(
            base="llama3_tiny",
            config=small | {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
            trained=True,
            keeps_merged=True,
        ),
        # Only the embedding has the adapter, not the head that shares its weight: merged, both would.
        "tied_embeddings": Case(
            base="gemma",
            config=small | {"target_modules": ["embed_tokens", "q_proj"]},
            merges=False,
        ),
        "modules_to_save": Case(
            base="llama3_tiny",
            config=small | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
            trained=True,
        ),
        "trainable_tokens": Case(
            base="llama3_tiny",
            config=small | {"target_modules": ["q_proj"], "trainable_token_indices": tokens},
            wrong={"order": {"trainable_token_indices": tokens[::-1]}},
            trained=True,
        ),
        "trainable_tokens_tied": Case(
            base="qwen2",
            config=small | {"target_modules": ["q_proj"], "trainable_token_indices": tokens_of("qwen2")},
            keeps_merged=True,
        ),
        "phi3": Case(
            base="phi3",
            config=small | {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
            trained=True,
        ),
        "phi3_dora": Case(
            base="phi3",
            config=small | dora | {"target_modules": ["qkv_proj", "gate_up_proj"]},
            wrong=no_dora,
            keeps_merged=True,
        ),
        "moe_experts": Case(
            base="qwen3_moe",
            config=small | experts | {"target_modules": ["q_proj"]},
            wrong={"experts": {"target_parameters": None}},
            keeps_merged=True,
        ),
        "moe_all_linear": Case(
            base="qwen3_moe",
            config=small | {"target_modules": "all-linear"},
            wrong={"router": {"target_modules": attention} | experts},
            keeps_merged=True,
        ),
        "mixtral": Case(
            base="mixtral",
            config=small | {"target_modules": attention, "target_parameters": ["gate_up_proj", "down_proj"]},
            wrong={"experts": {"target_parameters": None}},
            keeps_merged=True,
        ),
        # Its experts and its router have other names in the checkpoint.
        "granite": Case(
            base="granitemoehybrid_moe",
            config=small
            | {
                "target_modules": ["q_proj", "out_proj", "input_linear", "output_linear"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
            },
            wrong={
                "experts": {"target_parameters": ["router.weight"]},
                "router": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            },
            trained=True,
        ),
        "pissa": Case(base="llama3_tiny", config=small | {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
    }


def tokens_of(base: str) -> list[int]:
    """Two tokens of the prompts, the larger one first, and one between that is in none."""
    prompt = prompt_of(base)
    low, high = int(prompt.min()), int(prompt.max())
    absent = next(token for token in range(low, high) if token not in prompt)
    return [high, absent, low]


def main(names: list[str]) -> None:
    cases = all_cases()
    for name in names or cases:
        write_case(name, cases[name])


def write_case(name: str, case: Case) -> None:
    torch.manual_seed(0)  # what PEFT starts from is compared with, not written
    model = adapted(case.base, case.config)
    started = {key: x.detach().clone() for key, x in trained_tensors(model).items()}
    fill(model, torch.Generator().manual_seed(zlib.crc32(name.encode())))
    save(model, OUT / name, case.dtype)
    if name == "pissa":
        return
    if case.dtype != torch.float32:
        model = read(case.base, OUT / name)
    arrays = {"input_ids": prompt_of(case.base), "logits": logits(model, case.base)}
    check_everything_matters(name, case, model, started, arrays["logits"])
    if case.trained:
        arrays |= step(adapted_as(case, model), case.base)
    merged = logits(adapted_as(case, model).merge_and_unload(), case.base)
    moved = difference(merged, arrays["logits"])
    assert (moved < SAME) if case.merges else (moved > MATTERS), moved
    if case.keeps_merged:
        arrays["merged_logits"] = merged
    np.savez_compressed(OUT / f"{name}.npz", **arrays)
    check_loads(OUT / name, name)


# Models


def base_model(name: str) -> PreTrainedModel:
    """Under a name without a folder, which PEFT keeps in the configuration."""
    with contextlib.chdir(HERE):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="eager")
    model.set_experts_implementation("eager")
    return model.eval()


def adapted(base: str, config: dict[str, Any]) -> PeftModel:
    return get_peft_model(base_model(base), LoraConfig(task_type="CAUSAL_LM", **config)).eval()


def adapted_as(case: Case, model: PeftModel, **changes: Any) -> PeftModel:
    """Another model of the case with the tensors of this one: KeyError where it wants others."""
    other = adapted(case.base, case.config | changes)
    found = trained_tensors(model)
    with torch.no_grad():
        for key, x in trained_tensors(other).items():
            if x.shape != found[key].shape:
                raise KeyError(key)
            x.copy_(found[key])
    return other


def stored_tensors(model: PeftModel) -> Tensors:
    """What PEFT saves, by its names in the file; parameters, not copies."""
    return get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True))


def trained_tensors(model: PeftModel) -> Tensors:
    """Without the weights of the base that PEFT saves beside an adapter of an embedding."""
    return {key: x for key, x in stored_tensors(model).items() if x.requires_grad}


def fill(model: PeftModel, generator: torch.Generator) -> None:
    with torch.no_grad():
        for key, x in sorted(trained_tensors(model).items()):
            noise = torch.randn(x.shape, generator=generator)
            if key.endswith("lora_A.weight"):
                x.copy_(noise / math.sqrt(x.shape[1]))
            elif key.endswith("lora_embedding_A"):
                x.copy_(noise)
            elif key.endswith(("lora_B.weight", "lora_embedding_B", "lora_B.bias")):
                x.copy_(0.2 * noise)
            elif key.endswith("lora_magnitude_vector"):
                x.mul_(1 + 0.2 * noise)
            else:  # of the base
                x.add_(0.2 * noise)


def save(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    config = model.peft_config["default"]
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))
    state = model.state_dict()
    with contextlib.chdir(HERE):  # where it looks for the base
        model.save_pretrained(str(folder), state_dict={key: x.to(dtype) for key, x in state.items()})
    (folder / "README.md").unlink()


def read(base: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base_model(base), str(folder), is_trainable=True).eval()


def prompt_of(base: str) -> np.ndarray:
    return np.load(HERE / f"{base}.npz")["input_ids"]


def logits(model: torch.nn.Module, base: str) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(prompt_of(base)).long(), use_cache=False).logits.numpy()


def step(model: PeftModel, base: str) -> dict[str, np.ndarray]:
    tensors = trained_tensors(model)
    input_ids = torch.from_numpy(prompt_of(base)).long()
    targets = input_ids[:, 1:].clone()
    targets[:, :IGNORED_TARGETS] = -100
    scores = model(input_ids, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())
    loss.backward()
    arrays = {"loss": loss.detach().numpy()}
    for key, x in tensors.items():
        assert x.grad is not None and x.grad.any(), key
        arrays[f"grad/{key}"] = x.grad.numpy().copy()
    torch.optim.AdamW(tensors.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01).step()
    return arrays | {f"stepped/{key}": x.detach().numpy() for key, x in tensors.items()}


# What is checked


def check_everything_matters(name: str, case: Case, model: PeftModel, started: Tensors, expected: np.ndarray) -> None:
    """The adapter, each kind of its tensors as PEFT starts it, and each mistake of the case moves the logits."""
    effect = difference(logits(base_model(case.base), case.base), expected)
    found: dict[str, float] = {}
    for mistake, changes in case.wrong.items():
        try:
            found[mistake] = difference(logits(adapted_as(case, model, **changes), case.base), expected)
        except KeyError:
            found[mistake] = math.inf
    for kind in sorted({kind_of(key) for key in started}):
        other = {key: x for key, x in started.items() if kind_of(key) == kind}
        found[kind.removeprefix("base_model.model.")] = difference(logits_with(other, case, model), expected)
        if ".experts." in kind and "lora_B" in kind:
            found[f"columns of {kind}"] = difference(logits_with(experts_first(other, model), case, model), expected)
    least = min(found, key=lambda part: found[part])
    print(f"{name}: the adapter moves the logits by {effect:.2g}, its least part by {found[least]:.2g} ({least})")
    assert effect > WORKS, name
    assert found[least] > MATTERS, (name, found)


def kind_of(key: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", key)


def logits_with(other: Tensors, case: Case, model: PeftModel) -> np.ndarray:
    changed = adapted_as(case, model)
    with torch.no_grad():
        for key, x in trained_tensors(changed).items():
            if key in other:
                x.copy_(other[key])
    return logits(changed, case.base)


def experts_first(keys: Tensors, model: PeftModel) -> Tensors:
    """The same factors B as if their columns were experts x rank, where they are rank x experts."""
    experts = getattr(model.config, "num_experts", None) or model.config.num_local_experts
    found = trained_tensors(model)
    return {key: found[key].detach().unflatten(1, (experts, -1)).transpose(1, 2).flatten(1) for key in keys}


def check_loads(folder: Path, name: str) -> None:
    """Ends with an error unless PEFT reads the folder whole and computes the truth of the case."""
    base = all_cases()[name].base
    model = read(base, folder)
    result = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    trained = {key for key, x in model.named_parameters() if x.requires_grad}
    missing = trained & set(result.missing_keys)
    assert not result.unexpected_keys and not missing, (result.unexpected_keys, sorted(missing))
    found = difference(logits(model, base), np.load(OUT / f"{name}.npz")["logits"])
    print(f"{folder.name} read by PEFT: {len(trained)} tensors, the logits differ by {found:.0e}")
    assert found < SAME, name


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in standard deviations of the expected logits."""
    return float(np.abs(found - expected).max() / expected.std())


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--loads"]:
        check_loads(Path(sys.argv[2]), sys.argv[3])
    else:
        main(sys.argv[1:])
