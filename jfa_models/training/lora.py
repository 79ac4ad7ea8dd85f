"""A new adapter for a model, before its first step of training."""

import math
from collections.abc import Sequence

import numpy as np

from jfa_models.checkpoints.lora_config import LoraConfig
from jfa_models.checkpoints.peft import Adapter, linear_modules, place_of
from jfa_models.decoding.language_model import LanguageModel

ALL_LINEAR = "all-linear"


def new_adapter(
    model: LanguageModel,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | str = ALL_LINEAR,
    use_dora: bool = False,
    use_rslora: bool = False,
    seed: int = 0,
) -> Adapter:
    """An adapter that changes nothing yet: lora_A is random, lora_B zero.

    Args:
      alpha: the change is scaled by alpha / rank, with use_rslora by alpha / sqrt(rank); None: 2 * rank.
      targets: ends of Hugging Face module names ("q_proj"), a regular expression for whole names, or "all-linear": all
        linear layers but the output layer and those of experts.
      use_dora: also train the norm of each row of the changed weights (arXiv:2402.09353).

    Raises:
      ValueError: the rank is not an integer of at least 1, or the targets match no module; the message lists the names.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    modules = [module for module in linear_modules(model.config, model.shapes) if module != "embed_tokens"]
    ends = sorted({module.rpartition(".")[2] for module in modules})
    if targets == ALL_LINEAR:
        targets = [end for end in ends if end != "lm_head"]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    chosen = [one for one in modules if config.targets(one if one == "lm_head" else f"model.{one}")]
    unused = [] if isinstance(targets, str) else [name for name in targets if name.rpartition(".")[2] not in ends]
    if not chosen or unused:
        what = ", ".join(map(repr, unused)) if unused else repr(targets)
        raise ValueError(f"targets: {what} matches no linear layer of this model; it has {', '.join(ends)}")
    generator = np.random.default_rng(seed)
    tensors = {}
    for module in chosen:
        place = place_of(module, {}, model.config, model.shapes)
        assert place is not None
        out, columns = place.shape
        bound = 1 / math.sqrt(columns)
        tensors[module] = {
            "lora_A": generator.uniform(-bound, bound, (rank, columns)).astype(np.float32),
            "lora_B": np.zeros((out, rank), np.float32),
        }
        if use_dora:
            own = "embed" if place.is_tied_head else None
            weights = [model.float32(f"{own or name}.weight") for name in place.modules]
            tensors[module]["lora_magnitude_vector"] = np.linalg.norm(np.concatenate(weights), axis=1)
    return Adapter(config=config, tensors=tensors)
