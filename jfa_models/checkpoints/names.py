"""Maps the tensors of a file to the names of our parameters."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence

from jfa_models.checkpoints.families import Names
from jfa_models.checkpoints.quantized import QuantizedTensor
from jfa_models.checkpoints.tensors import StackedTensors, StoredTensor
from jfa_models.model.config import DecoderConfig

Stored = StoredTensor | QuantizedTensor

# Tensors of a GGUF file that are part of its configuration rather than its weights.
ROPE_DIVISORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")

# Tensors that follow from the configuration, but that older checkpoints contain.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|" + "|".join(map(re.escape, ROPE_DIVISORS)))

# The prefix of a decoder's tensor names, also in a multimodal model; and what is not read: the tensors of a vision
# tower, and of heads for more than one token.
PREFIX = re.compile(r"(language_model\.)?(model\.|backbone\.)?(language_model\.)?")
_NOT_READ = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*|mtp\..*")


def by_our_names(
    tensors: Mapping[str, Stored], table: Names, config: DecoderConfig
) -> tuple[dict[str, Stored | StackedTensors], tuple[Stored, ...]]:
    """The tensors by our parameter names, and the tensors that are not in the table."""
    known: dict[str, Stored | StackedTensors] = {}
    stacks: dict[str, dict[int, Stored]] = {}
    unknown = []
    for name, tensor in tensors.items():
        module, _, kind = name.removeprefix(PREFIX.match(name)[0]).rpartition(".")  # type: ignore[index]
        parts, expert = our_modules(module, table)
        found = [
            (f"{part}.{_our_kind(part, kind)}", number, piece)
            for number, one in _matrices(tensor, expert, parts)
            for part, piece in zip(parts, _split(one, parts, config) or (), strict=False)
        ]
        if not found and not (_DERIVED.fullmatch(name) or _NOT_READ.fullmatch(name)):
            unknown.append(tensor)
        for target, number, piece in found:
            if number is not None:
                stacks.setdefault(target, {})[number] = piece
            else:
                known[target] = piece
    for target, stack in stacks.items():
        known[target] = StackedTensors(parts=tuple(stack[i] for i in sorted(stack)))
    return known, tuple(unknown)


def our_modules(module: str, table: Names) -> tuple[tuple[str, ...], int | None]:
    """Our modules for one of a file, without the prefix "model."; and the number of the expert if it is one's."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", module)
    for mark in "#*":
        module = re.sub(r"(?<=\.)\d+(?=\.)", mark, module, count=1)
    ours = table.get(module)
    parts = (ours,) if isinstance(ours, str) else ours or ()
    expert = int(numbers[1]) if "*" in module and parts else None
    return tuple(part.replace("#", numbers[0]) if numbers else part for part in parts), expert


def _our_kind(module: str, kind: str) -> str:
    """The last part of our name."""
    if kind != "weight":
        return kind
    return next((ours for end, ours in (("norm", "scale"), (".conv", "kernel")) if module.endswith(end)), kind)


def _matrices(tensor: Stored, expert: int | None, parts: Sequence[str]) -> list[tuple[int | None, Stored]]:
    """The numbers and weights of the experts that a file stores together; of other tensors, the one that is given."""
    if not parts or not isinstance(tensor, StoredTensor) or len(tensor.shape) != 3:
        return [(expert, tensor)]
    count, *rest = tensor.shape
    if parts[0].endswith(".conv") and rest[0] == 1:  # of a convolution: [channels, 1, width]
        return [(None, dataclasses.replace(tensor, shape=(count, rest[1])))]
    return [(i, dataclasses.replace(tensor.rows(i, i + 1), shape=tuple(rest))) for i in range(count)]


def _num_rows(module: str, config: DecoderConfig) -> int:
    """Number of rows of a weight that a file stores together with others in one tensor."""
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner, experts = config.intermediate_size, config.experts
    if experts is not None:
        inner = experts.shared_size if ".shared." in module else experts.intermediate_size
    return {"q": q_size, "k": kv_size, "v": kv_size, "gate": inner, "up": inner}[module.rpartition(".")[2]]


def _split(tensor: Stored, parts: Sequence[str], config: DecoderConfig) -> list[Stored] | None:
    """Splits a tensor into those of our modules; None if their rows do not add up to its number of rows."""
    if len(parts) < 2:
        return [tensor]
    num_rows = [_num_rows(part, config) for part in parts]
    ends = list(itertools.accumulate(num_rows))
    if not tensor.shape or tensor.shape[0] != ends[-1]:
        return None
    return [tensor.rows(end - n, end) for n, end in zip(num_rows, ends, strict=True)]
