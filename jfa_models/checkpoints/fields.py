"""Fields of a configuration file: lookup, checks and conversion for both formats."""

import math
from collections.abc import Mapping
from typing import Any

from jfa_models.checkpoints.families import FAMILIES, Family
from jfa_models.model.config import Activation
from jfa_models.model.rope import Scaling, YarnScaling, check_positive

ACTIVATIONS: Mapping[str, Activation] = {  # by name in config.json; the first name of each activation is written
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ROPE_THETA_UNSTATED = 10_000.0  # the default of both config.json and GGUF files


def family_of(name: object, where: str, known: Mapping[str, str]) -> Family:
    """The family of an architecture's name; raises ValueError if it is not supported."""
    if not isinstance(name, str) or name not in known:
        supported = ", ".join(f"{key} ({FAMILIES[ours].users})" for key, ours in known.items())
        raise ValueError(f"{where} {name!r} is not supported; supported architectures: {supported}")
    return FAMILIES[known[name]]


def require(source: Mapping[str, Any], where: str, *keys: str) -> None:
    missing = [key for key in keys if source.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; use the file that belongs to these weights")


def check_counts(source: Mapping[str, Any], where: str, *keys: str) -> None:
    """Raises ValueError if a key is present and its value is not an integer >= 1."""
    for key in keys:
        value = source.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{where}: {key} must be an integer >= 1, got {value!r}")


def list_of(value: object, kind: type | tuple[type, ...], where: str) -> tuple[Any, ...]:
    """The value as a tuple; raises ValueError unless it is a list of this type."""
    if not isinstance(value, list | tuple) or not all(isinstance(entry, kind) for entry in value):
        names = kind.__name__ if isinstance(kind, type) else " or ".join(each.__name__ for each in kind)
        raise ValueError(f"{where} must be a list of {names}, got {value!r}")
    return tuple(value)


def default_head_dim(hidden_size: int, num_q_heads: int) -> int:
    check_positive("config", hidden_size=hidden_size, num_q_heads=num_q_heads)
    if hidden_size % num_q_heads:
        raise ValueError(
            f"the hidden size must be a multiple of the number of heads, got {hidden_size} and {num_q_heads}, "
            "unless the file specifies head_dim"
        )
    return hidden_size // num_q_heads


def activation_of(source: Mapping[str, Any], architecture: str) -> Activation:
    name = source.get("hidden_activation") or source.get("hidden_act", "silu")
    if architecture in ("gemma2", "gemma3_text"):
        name = source["hidden_activation"]  # transformers ignores the hidden_act that their files have as well
    if architecture == "gemma" and name == "gelu":
        name = "gelu_pytorch_tanh"  # early files say gelu, but the models use the tanh approximation
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def context_of(longest: int, scaling: Scaling | None) -> int:
    """The context of a model. YaRN as its authors document it extends a context that the file states unextended."""
    if isinstance(scaling, YarnScaling) and longest <= scaling.original_context_length:
        return int(scaling.original_context_length * scaling.factor)
    return longest


def longrope_attention(longest: int, original: int) -> float:
    """The attention factor; 1 if the context is not extended. Source: arXiv:2402.13753, section 3."""
    check_positive("rope scaling", max_position_embeddings=longest, original_max_position_embeddings=original - 1)
    return math.sqrt(1.0 + math.log(longest / original) / math.log(original)) if longest > original else 1.0
