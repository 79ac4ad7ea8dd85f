"""Where the tensors of an adapter go: the modules and the experts' parameters of a decoder, by Hugging Face names.

A name is that of a checkpoint, which older versions of transformers had for their modules too, or that of transformers
5, in which the experts of a layer are two parameters. Names of modules here are without the prefix "model.".

Source: the behavior of peft 0.21.2 with transformers 5.24.0.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jfa_models.checkpoints.families import FAMILIES, Names, hugging_face_names
from jfa_models.checkpoints.names import our_modules
from jfa_models.model.config import DecoderConfig

# The weights of all experts in one parameter, of which a module can have two.
_EXPERTS = re.compile(r"layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts(?:\.base_layer)?")

# Parts of names that differ between checkpoints and the modules of transformers 5, by family.
_RENAMED = {
    "mixtral": (".block_sparse_moe.", ".mlp."),
    "granitemoehybrid": (".block_sparse_moe.router.layer", ".block_sparse_moe.router"),
}
# The module of transformers 5 around experts; it is mlp in other families.
_MIXTURE = {"granitemoehybrid": "block_sparse_moe"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the tensors of a module go: our modules, and how many rows of the stored weight each has.

    Attributes:
      columns: of the weight; 1 for a norm.
      expert: the number of the expert whose weight it is.
      num_experts: of a parameter for all experts of a layer.
      theirs: the full name, as patterns see it.
    """

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    theirs: str
    expert: int | None = None
    num_experts: int | None = None
    is_tied_head: bool = False
    has_bias: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return sum(self.rows), self.columns

    @property
    def parameter(self) -> str:
        """The full name of its weight; those of experts have no modules of their own in transformers 5."""
        is_bare = self.num_experts is not None and ".experts." in self.theirs
        return self.theirs if is_bare else f"{self.theirs}.weight"

    @property
    def is_norm(self) -> bool:
        return self.columns == 1 and self.modules[0].endswith("norm")

    def split(self, x: Any) -> list[Any]:
        """The rows of each of our modules."""
        ends = np.cumsum(self.rows)
        return [x[end - n : end] for end, n in zip(ends, self.rows, strict=True)]


def place_of(
    module: str, kinds: Mapping[str, Any], config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Place | None:
    """The place of a module; None: the decoder has no such module, or no expert's parameter of these shapes.

    kinds: its tensors (Adapter.tensors), which tell the two parameters of experts apart.
    """
    table = hugging_face_names(config)
    theirs = module if module == "lm_head" else f"{FAMILIES[config.architecture].prefix}{module}"
    if pair := places_of_experts(module, shapes):
        # the name does not tell which of the two parameters it is
        a, b = (tuple(kinds[kind].shape) if kind in kinds else () for kind in ("lora_A", "lora_B"))
        return next((one for one in pair if (a[1:], b[:1]) == ((one.columns,), (sum(one.rows),))), None)
    named = (our_modules(name, table) for name in spellings(module, config))
    modules, expert = next((found for found in named if found[0]), ((), None))
    if not modules:
        return None
    if module == "lm_head" and "lm_head.weight" not in shapes:  # tied to the embedding
        rows, columns = shapes["embed.weight"]
        return Place(modules=("lm_head",), rows=(rows,), columns=columns, is_tied_head=True, theirs=theirs)
    found: list[tuple[int, ...]] = [shapes.get(f"{one}.weight", shapes.get(f"{one}.scale", ())) for one in modules]
    if not all(found):
        return None
    num_experts = found[0][0] if all(len(shape) == 3 for shape in found) else None
    if expert is not None and (num_experts is None or expert >= num_experts):
        return None
    return Place(
        modules=modules,
        rows=tuple(next(iter(shape[-2:])) for shape in found),
        columns=found[0][-1] if len(found[0]) > 1 else 1,  # of a norm
        expert=expert,
        num_experts=num_experts if expert is None else None,
        theirs=theirs,
        has_bias=all(f"{one}.bias" in shapes for one in modules),
    )


def linear_modules(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
    """The names of the modules that can have low-rank parts, except experts, and their places."""
    for module, place in all_modules(config, shapes):
        if not place.is_norm and place.num_experts is None:
            yield module, place


def experts_of(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, tuple[Place, Place]]]:
    """For each layer with experts, the name of their module, and its two parameters.

    The parameters are gate_up_proj [num_experts, 2 * inner, hidden] and down_proj [num_experts, hidden, inner].
    """
    for layer in range(config.num_layers):
        module = f"layers.{layer}.{_MIXTURE.get(config.architecture, 'mlp')}.experts"
        if places := places_of_experts(module, shapes):
            gate_up, down = places
            yield module, (gate_up, down)


def all_modules(config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Place]]:
    """The names of the modules in a checkpoint, except single experts, and their places."""
    table: Names = hugging_face_names(config)
    for theirs in table:
        for layer in range(config.num_layers) if "#" in theirs else (0,):
            module = theirs.replace("#", str(layer))
            if "*" not in theirs and (place := place_of(module, {}, config, shapes)) is not None:
                yield module, place


def places_of_experts(module: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Place]:
    """The two parameters gate_up_proj and down_proj for all experts of a layer; none: the module has no experts."""
    if (match := _EXPERTS.fullmatch(module)) is None:
        return []
    mlp, places = f"layers.{match[1]}.mlp", []
    for modules, name in (((f"{mlp}.gate", f"{mlp}.up"), "gate_up_proj"), ((f"{mlp}.down",), "down_proj")):
        found = [shapes.get(f"{one}.weight", ()) for one in modules]
        if all(len(shape) == 3 for shape in found):
            num_experts, _, columns = found[0]
            theirs = f"model.{module.removesuffix('.base_layer')}.{name}"
            rows = tuple(shape[1] for shape in found)
            place = Place(modules=modules, rows=rows, columns=columns, num_experts=num_experts, theirs=theirs)
            places.append(place)
    return places


def spellings(module: str, config: DecoderConfig) -> tuple[str, ...]:
    """A module's name, and those that it may have in a checkpoint and in transformers 5."""
    older, newer = _RENAMED.get(config.architecture, ("", ""))
    return (module, module.replace(newer, older), module.replace(older, newer)) if older else (module,)
