"""What a decoder is: the numbers that a checkpoint states about its model, checked once, here.

Two spellings are read: config.json and generation_config.json of Hugging Face, and the metadata of a GGUF file.
"""

import dataclasses
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

SUPPORTED_ARCHITECTURES = {"llama": "Llama 2, Llama 3, SmolLM2"}  # name in a checkpoint: who uses it

Activation = Literal["silu"]

# What a config.json from before `rope_theta` leaves out: the first two generations of Llama share this base.
_ROPE_THETA_UNSTATED = 10_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Every rotation slowed by one factor. Source: arXiv:2306.15595."""

    factor: float

    def __post_init__(self) -> None:
        _check_positive("rope scaling", factor=self.factor)

    def divisors(self, inverse_frequencies: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """What each inverse frequency is divided by."""
        return np.full_like(inverse_frequencies, self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Slow rotations divided by `factor`, fast ones kept, a linear blend between the two. Source: arXiv:2407.21783.

    A rotation is slow if it turns less than `low_freq_factor` times within `original_context_length` positions,
    and fast if it turns more than `high_freq_factor` times.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int

    def __post_init__(self) -> None:
        _check_positive("rope scaling", **dataclasses.asdict(self))
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling: high_freq_factor must be larger than low_freq_factor, "
                f"got {self.high_freq_factor} and {self.low_freq_factor}"
            )

    def divisors(self, inverse_frequencies: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """What each inverse frequency is divided by: from 1 (fast) to `factor` (slow)."""
        turns = self.original_context_length * inverse_frequencies / (2 * math.pi)
        fast = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        fast = np.clip(fast, 0.0, 1.0)
        return 1.0 / (fast + (1.0 - fast) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedScaling:
    """One divisor per rotation, as a GGUF file stores the outcome of any scaling."""

    values: tuple[float, ...]  # head_dim / 2 of them

    def __post_init__(self) -> None:
        _check_positive("rope scaling", smallest_divisor=min(self.values, default=0.0))

    def divisors(self, inverse_frequencies: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """What each inverse frequency is divided by."""
        return np.asarray(self.values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: pair `i` of a head turns by `position * inverse_frequencies[i]` radians."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | ListedScaling | None = None

    def __post_init__(self) -> None:
        _check_positive("rope", theta=self.theta)

    def inverse_frequencies(self, head_dim: int) -> Float[np.ndarray, " half"]:
        """Radians per position of each pair, float32, scaling included."""
        exact = self.theta ** -(np.arange(0, head_dim, 2) / head_dim)
        return (exact if self.scaling is None else exact / self.scaling.divisors(exact)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder of the Llama family. Hashable: it may be a static argument of jit."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int  # tokens, prompt and answer together
    norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    hidden_act: Activation = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
            if field.type is bool and type(value) is not bool:
                raise ValueError(f"{field.name} must be true or false, got {value!r}")
        _check_positive("config", norm_eps=self.norm_eps)
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads must be a multiple of num_kv_heads, got {self.num_q_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because rope turns pairs of numbers, got {self.head_dim}")
        if isinstance(self.rope.scaling, ListedScaling) and len(self.rope.scaling.values) != self.head_dim // 2:
            raise ValueError(
                f"rope scaling must list head_dim / 2 = {self.head_dim // 2} divisors, "
                f"got {len(self.rope.scaling.values)}"
            )
        if self.hidden_act not in get_args(Activation):
            raise ValueError(f"hidden_act must be one of {', '.join(get_args(Activation))}, got {self.hidden_act!r}")

    @property
    def num_params(self) -> int:
        """Numbers in all weights; a tied head counts once."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * hidden * (q_size + kv_size) + self.attention_bias * (q_size + 2 * kv_size + hidden)
        mlp = 3 * hidden * inner + self.mlp_bias * (2 * inner + hidden)
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_layers * (attention + mlp + 2 * hidden) + hidden + heads * self.vocab_size * hidden

    @property
    def cache_elements_per_token(self) -> int:
        """Numbers that one token leaves in a KV cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Reads a config.json of Hugging Face, in its older or its newer spelling of rope.

        Raises:
          ValueError: an architecture, rope type or quantization that is not supported, or a key is missing or wrong.
        """
        check_architecture(config.get("model_type"), "config.json: model_type")
        if config.get("quantization_config"):
            raise ValueError(
                "config.json: quantization_config is not supported; "
                "use the unquantized checkpoint or a GGUF file of the model"
            )
        _require(
            config,
            "config.json",
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "rms_norm_eps",
        )
        num_q_heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_q_heads=num_q_heads,
            num_kv_heads=_stated(config, "num_key_value_heads", num_q_heads),
            head_dim=_stated(config, "head_dim", None) or _head_dim(config["hidden_size"], num_q_heads),
            context_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope=_rope_from_hf(config),
            tie_word_embeddings=_stated(config, "tie_word_embeddings", False),
            hidden_act=_stated(config, "hidden_act", "silu"),
            attention_bias=_stated(config, "attention_bias", False),
            mlp_bias=_stated(config, "mlp_bias", False),
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensor_names: Collection[str],
        rope_divisors: tuple[float, ...] | None = None,
    ) -> "DecoderConfig":
        """Reads the metadata of a GGUF file.

        Three facts are not in the metadata and follow from the tensors: tied embeddings (no `output.weight`), biases,
        and the rope scaling of Llama 3, which is the tensor `rope_freqs.weight`: pass it as `rope_divisors`.

        Raises:
          ValueError: an architecture or rope type that is not supported, or a key is missing or wrong.
        """
        check_architecture(metadata.get("general.architecture"), "GGUF metadata: general.architecture")
        names = ("embedding_length", "feed_forward_length", "block_count", "attention.head_count", "context_length")
        _require(metadata, "GGUF metadata", *(f"llama.{n}" for n in (*names, "attention.layer_norm_rms_epsilon")))
        hidden_size, intermediate_size, num_layers, num_q_heads, context_length = (
            metadata[f"llama.{n}"] for n in names
        )
        head_dim = _stated(metadata, "llama.attention.key_length", None) or _head_dim(hidden_size, num_q_heads)
        rotated = metadata.get("llama.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ValueError(
                f"GGUF metadata: llama.rope.dimension_count must be head_dim ({head_dim}), got {rotated}; "
                "rotating a part of a head is not supported"
            )
        return cls(
            vocab_size=metadata.get("llama.vocab_size") or len(metadata.get("tokenizer.ggml.tokens", ())),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=_stated(metadata, "llama.attention.head_count_kv", num_q_heads),
            head_dim=head_dim,
            context_length=context_length,
            norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
            rope=_rope_from_gguf(metadata, rope_divisors),
            tie_word_embeddings="output.weight" not in tensor_names,
            attention_bias="blk.0.attn_q.bias" in tensor_names,
            mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How the authors of a model advise to sample from it. None: they say nothing."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_hf(cls, generation: Mapping[str, Any], config: Mapping[str, Any]) -> "GenerationDefaults":
        """Reads generation_config.json (empty if there is none); the end of text may stand in config.json instead.

        Raises:
          ValueError: eos_token_id is neither a token id nor a list of them.
        """
        eos = generation.get("eos_token_id")
        eos = config.get("eos_token_id") if eos is None else eos
        eos_token_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(type(token_id) is int and token_id >= 0 for token_id in eos_token_ids):
            raise ValueError(f"generation_config.json: eos_token_id must be a token id or a list of them, got {eos!r}")
        return cls(
            eos_token_ids=eos_token_ids,
            temperature=0.0 if generation.get("do_sample") is False else generation.get("temperature"),
            top_k=generation.get("top_k") or None,  # 0 also means that the authors do not use it
            top_p=generation.get("top_p"),
            min_p=generation.get("min_p"),
            repetition_penalty=generation.get("repetition_penalty"),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "GenerationDefaults":
        """Reads the ends of text, of turn and of message; a GGUF file says nothing about sampling."""
        keys = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
        return cls(eos_token_ids=tuple(dict.fromkeys(metadata[key] for key in keys if key in metadata)))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: the file does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def check_architecture(name: object, where: str) -> None:
    """Raises ValueError unless a checkpoint's architecture is one that we build."""
    if not isinstance(name, str) or name not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(f"{name} ({users})" for name, users in SUPPORTED_ARCHITECTURES.items())
        raise ValueError(f"{where} {name!r} is not supported; supported architectures: {supported}")


def _require(source: Mapping[str, Any], where: str, *keys: str) -> None:
    missing = [key for key in keys if source.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; take the file that belongs to these weights")


def _stated(source: Mapping[str, Any], key: str, otherwise: Any) -> Any:
    value = source.get(key)  # null counts as unstated
    return otherwise if value is None else value


def _check_positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{where}: {name} must be a finite number > 0, got {value!r}")


def _head_dim(hidden_size: int, num_q_heads: int) -> int:
    _check_positive("config", hidden_size=hidden_size, num_q_heads=num_q_heads)
    if hidden_size % num_q_heads:
        raise ValueError(
            f"the hidden size must be a multiple of the number of heads, got {hidden_size} and {num_q_heads}; "
            "a model of another shape must state its head_dim"
        )
    return hidden_size // num_q_heads


def _rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: the parameters of rope must be an object, got {rope!r}")
    rotated = _stated(rope, "partial_rotary_factor", _stated(config, "partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor must be 1, got {rotated}; rotating a part of a head is not supported"
        )
    theta = _stated(rope, "rope_theta", _stated(config, "rope_theta", _ROPE_THETA_UNSTATED))
    match rope.get("rope_type") or rope.get("type") or "default":
        case "default":
            scaling = None
        case "linear":
            _require(rope, "config.json: rope scaling", "factor")
            scaling = LinearScaling(factor=rope["factor"])
        case "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            _require(rope, "config.json: rope scaling", *keys)
            factor, low, high, original = (rope[key] for key in keys)
            scaling = Llama3Scaling(
                factor=factor, low_freq_factor=low, high_freq_factor=high, original_context_length=original
            )
        case other:
            raise ValueError(f"config.json: rope type must be default, linear or llama3, got {other!r}")
    return RopeConfig(theta=theta, scaling=scaling)


def _rope_from_gguf(metadata: Mapping[str, Any], divisors: tuple[float, ...] | None) -> RopeConfig:
    kind = _stated(metadata, "llama.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"GGUF metadata: llama.rope.scaling.type must be none or linear, got {kind!r}")
    factor = _stated(metadata, "llama.rope.scaling.factor", _stated(metadata, "llama.rope.scale_linear", 1.0))
    linear = LinearScaling(factor=1.0 if kind == "none" else factor)
    if divisors is not None:
        scaling = ListedScaling(values=tuple(linear.factor * value for value in divisors))
    else:
        scaling = None if linear.factor == 1.0 else linear
    return RopeConfig(theta=_stated(metadata, "llama.rope.freq_base", _ROPE_THETA_UNSTATED), scaling=scaling)
