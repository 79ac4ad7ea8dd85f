"""A new adapter for a model, before its first step of training."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from jfa_models.checkpoints.lora_config import ALL_LINEAR, LoraConfig, matches
from jfa_models.checkpoints.peft import Adapter
from jfa_models.checkpoints.places import Place, experts_of, linear_modules
from jfa_models.decoding.language_model import LanguageModel

# Why dropout and DoRA are not trained together.
NO_DORA = "PEFT drops inputs of the base weights too, which costs another product with each; use one of the two"
# Names that the modules of single experts once had: PEFT 0.21.2 takes them for experts wherever they stand.
_TAKEN_FOR_EXPERTS = (".gate_proj", ".up_proj", ".down_proj")

Places = Mapping[str, Place]  # by module name


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

    The weights of experts have a rank each: lora_A f32[num_experts * rank, in], lora_B f32[out, num_experts * rank].

    Args:
      alpha: the change is scaled by alpha / rank, with use_rslora by alpha / sqrt(rank); None: 2 * rank.
      targets: ends of Hugging Face names, of modules ("q_proj") and of the two parameters that the experts of a layer
        have ("experts.gate_up_proj", "experts.down_proj"); a regular expression for whole names; or "all-linear": all
        linear layers but the output layer, without experts. Routers are never among them.
      use_dora: also train the norm of each row of the changed weights (arXiv:2402.09353); not of experts.
      dropout: the part of the inputs' numbers that lora_A does not see in a step of training, others in each step; not
        together with use_dora, and not of experts.

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
    places = _chosen(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        use_rslora=use_rslora,
    )
    of_experts = [place.theirs for place in places.values() if place.num_experts is not None]
    if of_experts and (use_dora or dropout):
        option = "use_dora" if use_dora else f"dropout={dropout}"
        raise ValueError(
            f"targets: {of_experts[0]} is of experts, which cannot be trained with {option}, as in PEFT: leave out "
            f"{'use_dora' if use_dora else 'dropout'}, or the experts"
        )
    generator = np.random.default_rng(seed)
    tensors = {}
    for module, place in places.items():
        out, columns = place.shape
        bound, rows = 1 / math.sqrt(columns), rank * (place.num_experts or 1)
        tensors[module] = {
            "lora_A": generator.uniform(-bound, bound, (rows, columns)).astype(np.float32),
            "lora_B": np.zeros((out, rows), np.float32),
        }
        if use_dora:
            own = "embed" if place.is_tied_head else None
            weights = [model.float32(f"{own or name}.weight") for name in place.modules]
            tensors[module]["lora_magnitude_vector"] = np.linalg.norm(np.concatenate(weights), axis=1)
    return Adapter(config=_with_targets(config, targets, places, model), tensors=tensors)


def _chosen(model: LanguageModel, targets: Sequence[str] | str) -> Places:
    """The places that the targets match, by the names of their modules in files; linear layers before experts."""
    named = dict(linear_modules(model.config, model.shapes))
    linear = {
        name: place
        for name, place in named.items()
        if name != "embed_tokens" and not place.modules[0].endswith("router")
    }
    experts = dict(experts_of(model.config, model.shapes))
    ends = sorted({name.rpartition(".")[2] for name in linear})
    if targets == ALL_LINEAR:
        experts, targets = {}, [end for end in ends if end != "lm_head"]
    ends += sorted({".".join(place.theirs.split(".")[-2:]) for pair in experts.values() for place in pair})

    def is_target(place: Place) -> bool:
        return matches(targets, place.theirs)

    chosen = {name: place for name, place in linear.items() if is_target(place)}
    for module, pair in experts.items():
        found = [place for place in pair if is_target(place)]
        names = (f"{module}.base_layer", module)[2 - len(found) :]  # of two, one is inside of the other
        chosen |= dict(zip(names, found, strict=True))
    names = [] if isinstance(targets, str) else targets
    unused = [name for name in names if not any(matches((name,), place.theirs) for place in chosen.values())]
    if not chosen or unused:
        what = ", ".join(map(repr, unused)) if unused else repr(targets)
        raise ValueError(
            f"targets: {what} matches no linear layer of this model{' and no experts' * bool(experts)}; it has "
            f"{', '.join(ends)}"
        )
    others = [name for name, place in named.items() if name not in linear and is_target(place)]
    if others:
        raise ValueError(
            f"targets: {targets!r} also matches {others[0]}, but embeddings and routers get no new parts: use a "
            f"narrower expression, or some of {', '.join(ends)}"
        )
    return chosen


def _with_targets(config: LoraConfig, targets: Sequence[str] | str, places: Places, model: LanguageModel) -> LoraConfig:
    """The configuration with these targets, in the fields in which PEFT looks for them.

    Of a model with experts, PEFT reads only lists as they are, and takes some names for those of experts: linear layers
    of these names are targeted by their weights. With DoRA or dropout they cannot be, and PEFT refuses the folder.
    """
    is_mixture = model.config.experts is not None
    if targets == ALL_LINEAR:
        targets = sorted({name.rpartition(".")[2] for name in places})
    elif isinstance(targets, str) and not is_mixture:
        return dataclasses.replace(config, target_modules=targets)
    elif isinstance(targets, str):
        targets = [place.theirs for place in places.values()]
    are_parameters = is_mixture and not (config.use_dora or config.lora_dropout)
    modules, parameters = {}, {}  # as ordered sets
    for target, place in itertools.product(targets, places.values()):
        if not matches((target,), place.theirs):
            continue
        if place.num_experts is not None or (are_parameters and place.theirs.endswith(_TAKEN_FOR_EXPERTS)):
            parameters[target + place.parameter.removeprefix(place.theirs)] = None
        else:
            modules[target] = None
    return dataclasses.replace(config, target_modules=tuple(modules), target_parameters=tuple(parameters))
