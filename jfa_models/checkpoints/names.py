"""Maps the tensors of a file to the names of our parameters."""

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

# In a multimodal model: the prefix of its decoder's tensor names, and the tensors of its vision tower.
PREFIX = re.compile(r"(language_model\.)?(model\.)?(language_model\.)?")
_OTHER_SENSES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")


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
        pieces = _split(tensor, [_num_rows(part, config) for part in parts]) if len(parts) > 1 else [tensor]
        if pieces is None or not parts:
            if not (_DERIVED.fullmatch(name) or _OTHER_SENSES.fullmatch(name)):
                unknown.append(tensor)
            continue
        for part, piece in zip(parts, pieces, strict=True):
            renamed = "scale" if part.endswith("norm") and kind == "weight" else kind
            target = f"{part}.{renamed}"
            if expert is not None:
                stacks.setdefault(target, {})[expert] = piece
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


def _num_rows(module: str, config: DecoderConfig) -> int:
    """Number of rows of a weight that a file stores together with others in one tensor."""
    q_size, kv_size = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    return {"q": q_size, "k": kv_size, "v": kv_size, "gate": inner, "up": inner}[module.rpartition(".")[2]]


def _split(tensor: Stored, num_rows: Sequence[int]) -> list[Stored] | None:
    """Splits a tensor into parts with these numbers of rows; None if they do not add up to its number of rows."""
    ends = list(itertools.accumulate(num_rows))
    if not tensor.shape or tensor.shape[0] != ends[-1]:
        return None
    return [tensor.rows(end - n, end) for n, end in zip(num_rows, ends, strict=True)]
