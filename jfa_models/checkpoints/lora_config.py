"""What adapter_config.json of PEFT says: which modules an adapter changes, and how much. No tensors.

Source: the behavior of peft 0.21.2.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Initializations that change the base weights, or need a change of them, so that the file does not fit the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
ALL_LINEAR = "all-linear"  # as target_modules: all linear layers but the output layer
# Keys whose values, if set, mean something that is not implemented.
_UNSUPPORTED = (
    "megatron_config",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The fields of adapter_config.json that decide what an adapter computes, under PEFT's names.

    Attributes:
      r, lora_alpha: the rank, and the numerator of the scale lora_alpha / r.
      rank_pattern, alpha_pattern: other values for modules whose name ends with a regular expression; the first counts.
      use_rslora: the scale is lora_alpha / sqrt(r) (arXiv:2312.03732).
      use_dora: rows of the changed weight have a norm of their own (arXiv:2402.09353).
      lora_dropout: while training, the part of the numbers that lora_A does not see.
      target_modules: ends of module names, one regular expression for whole names, or "all-linear".
      target_parameters: ends of names of parameters: those of all experts of a layer, and weights of modules.
      trainable_token_indices: rows of the embedding, or of each module named, that are replaced.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ()
    exclude_modules: tuple[str, ...] | str = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    base_model_name_or_path: str | None = None

    def rank(self, module: str) -> int:
        """The rank of a module's change."""
        return _by_pattern(self.rank_pattern, self._seen(module), self.r)

    def scale(self, module: str) -> float:
        """By which (lora_B lora_A) is multiplied."""
        alpha, rank = _by_pattern(self.alpha_pattern, self._seen(module), self.lora_alpha), self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _seen(self, module: str) -> str:
        """The name that patterns see: that of the weight, if it is one of target_parameters.

        What is directly inside of experts is a parameter itself, of all of them, and no module with a weight.
        """
        if module.split(".")[-2:-1] == ["experts"]:
            return module
        weight = f"{module}.weight"
        return weight if matches(self.target_parameters, weight) and not self.targets(module) else module

    def targets(self, module: str) -> bool:
        """Whether a module of this name, such as model.layers.0.self_attn.q_proj, is to have low-rank parts."""
        if matches(self.exclude_modules, module):
            return False
        if self.target_modules == ALL_LINEAR:
            return module.rpartition(".")[2] not in ("embed_tokens", "lm_head")
        if not matches(self.target_modules, module):
            return False
        if not self.layers_to_transform or isinstance(self.target_modules, str) or module in self.target_modules:
            return True
        patterns = self.layers_pattern or (r"[^.]*",)
        found = [match for p in patterns if (match := re.match(rf".*\.{p}\.(\d+)\.", module))]
        return any(int(match[1]) in self.layers_to_transform for match in found)


def lora_config(content: Mapping[str, Any], where: str) -> LoraConfig:
    """The fields of an adapter_config.json.

    Raises:
      ValueError: it describes something else than LoRA, or uses a feature that is not supported; the message names it.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{where}: peft_type must be LORA, which covers rsLoRA and DoRA; {kind!r} is not supported")
    if wrong := [name for name in _UNSUPPORTED if content.get(name)]:
        raise ValueError(f"{where}: {wrong[0]} is {content[wrong[0]]!r}, which is not supported")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{where}: init_lora_weights is {start!r}, which changes the base weights too, so the file belongs to a "
            "base that is not stored; convert it with PEFT's save_pretrained and "
            "path_initial_model_for_weight_conversion"
        )
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(LoraConfig):
        value = content.get(field.name)
        if value is not None:
            fields[field.name] = _field(field.name, value, where)
    config = LoraConfig(**fields)
    if config.bias not in ("none", "all", "lora_only"):
        raise ValueError(f"{where}: bias must be none, all or lora_only, got {config.bias!r}")
    return config


def _field(name: str, value: Any, where: str) -> Any:
    def fail(expected: str) -> ValueError:
        return ValueError(f"{where}: {name} must be {expected}, got {value!r}")

    if name in ("target_modules", "exclude_modules") and isinstance(value, str):
        if not _is_pattern(value):
            raise fail("module names or a regular expression")
        return value
    if name == "trainable_token_indices":
        by_module = value if isinstance(value, Mapping) else {"embed_tokens": value}
        if not all(_are_token_ids(ids) for ids in by_module.values()):
            raise fail("token ids, or lists of them by module, each id once")
        return {module: tuple(ids) for module, ids in by_module.items()}
    if name in ("rank_pattern", "alpha_pattern"):
        is_valid, kind = (_is_rank, "integers >= 1") if name == "rank_pattern" else (_is_number, "numbers")
        if not isinstance(value, Mapping) or not all(_is_pattern(key) and is_valid(x) for key, x in value.items()):
            raise fail(f"{kind} by module pattern")
        return dict(value)
    if name in ("layers_to_transform", "layers_pattern"):
        value = value if isinstance(value, list) else [value]
        of_numbers = name == "layers_to_transform"
        if not all(type(x) is int if of_numbers else isinstance(x, str) and _is_pattern(x) for x in value):
            raise fail("layer numbers" if of_numbers else "names or regular expressions")
        return tuple(x for x in value if x != "")
    if name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise fail("a list of module names")
        return tuple(value)
    if name == "r" and not _is_rank(value):
        raise fail("an integer >= 1")
    if name == "lora_alpha" and not _is_number(value):
        raise fail("a number")
    if name == "lora_dropout" and not (_is_number(value) and 0 <= value < 1):
        raise fail("a number of at least 0 and below 1")
    if name == "base_model_name_or_path" and not isinstance(value, str):
        raise fail("a name")
    if name.startswith("use_") or name in ("lora_bias", "ensure_weight_tying"):
        if not isinstance(value, bool):
            raise fail("true or false")
    return value


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and len(set(value)) == len(value)


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except re.error:
        return False
    return True


def _by_pattern[T](patterns: Mapping[str, T], module: str, default: T) -> T:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def matches(names: Sequence[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
