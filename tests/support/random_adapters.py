"""Random adapters in memory."""

import dataclasses

import numpy as np

from jfa_models.checkpoints.peft import Adapter
from jfa_models.decoding.language_model import LanguageModel
from jfa_models.training.lora import new_adapter


def random_adapter(model: LanguageModel, seed: int, *, strength: float = 1.0, **options) -> Adapter:
    """One that changes what a sharp decoder (tiny_model) writes; options are those of new_adapter."""
    generator = np.random.default_rng(seed)
    adapter = new_adapter(model, seed=seed, **options)
    tensors = {}
    for module, kinds in adapter.tensors.items():
        tensors[module] = dict(kinds)
        b = kinds["lora_B"]
        tensors[module]["lora_B"] = (strength * generator.standard_normal(b.shape)).astype(np.float32)
        if (magnitude := kinds.get("lora_magnitude_vector")) is not None:
            factors = 1 + 0.2 * generator.standard_normal(magnitude.shape)
            tensors[module]["lora_magnitude_vector"] = (magnitude * factors).astype(np.float32)
    return dataclasses.replace(adapter, tensors=tensors)
