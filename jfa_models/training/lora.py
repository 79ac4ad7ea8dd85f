"""A new adapter for a model, before its first step of training."""

import math
from collections.abc import Sequence

import numpy as np

from jfa_models.checkpoints.lora_config import ALL_LINEAR, LoraConfig, matches
from jfa_models.checkpoints.peft import Adapter, linear_modules, place_of
from jfa_models.decoding.language_model import LanguageModel

# Why dropout and DoRA are not trained together.
NO_DORA = "PEFT drops inputs of the base weights too, which costs another product with each; use one of the two"


def new_adapter(
    model: LanguageModel,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] | str = ALL_LINEAR,
    use_dora: bool = False,
    use_rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> Adapter:
    """An adapter that changes nothing yet: lora_A is random, lora_B zero.

    Args:
      alpha: the change is scaled by alpha / rank, with use_rslora by alpha / sqrt(rank); None: 2 * rank.
      targets: ends of Hugging Face module names ("q_proj"), a regular expression for whole names, or "all-linear": all
        linear layers but the output layer; routers and experts are never among them.
      use_dora: also train the norm of each row of the changed weights (arXiv:2402.09353).
      dropout: the part of the inputs' numbers that lora_A does not see in a step of training, others in each step; not
        together with use_dora.

    Raises:
      ValueError: the rank is not an integer of at least 1, alpha not a number above 0, dropout not one of at least 0
        and below 1, or the targets match no module, or one that cannot be trained; the message lists the names.
    """
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be a number above 0, got {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a number of at least 0 and below 1, got {dropout!r}")
    if dropout and use_dora:
        raise ValueError(f"dropout={dropout} cannot be used with use_dora: {NO_DORA}")
    named = {one: place_of(one, {}, model.config, model.shapes) for one in linear_modules(model.config, model.shapes)}
    # PEFT stores the changes of routers and experts in another way
    places = {
        name: place
        for name, place in named.items()
        if place is not None and name != "embed_tokens" and not place.modules[0].endswith("router")
    }
    ends = sorted({name.rpartition(".")[2] for name in places})
    if targets == ALL_LINEAR:
        targets = [end for end in ends if end != "lm_head"]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    chosen = {name: place for name, place in places.items() if config.targets(place.theirs)}
    names = [] if isinstance(targets, str) else targets
    unused = [name for name in names if not any(matches((name,), place.theirs) for place in places.values())]
    if not chosen or unused:
        what = ", ".join(map(repr, unused)) if unused else repr(targets)
        raise ValueError(f"targets: {what} matches no linear layer of this model; it has {', '.join(ends)}")
    others = [name for name, place in named.items() if name not in places and place and config.targets(place.theirs)]
    if others:
        raise ValueError(
            f"targets: {targets!r} also matches {others[0]}, but embeddings and routers get no new parts: use a "
            f"narrower expression, or some of {', '.join(ends)}"
        )
    generator = np.random.default_rng(seed)
    tensors = {}
    for module, place in chosen.items():
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
