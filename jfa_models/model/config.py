"""The configuration of a decoder."""

import dataclasses
from typing import Any, Literal, get_args

from jfa_models.model.rope import LongRopeScaling, RopeConfig, check_positive

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "rms_plus_one", "layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts instead of an MLP: a router sends each token to a few of them. Source: arXiv:2401.04088.

    Attributes:
      num_experts, experts_per_token: experts per layer, and how many of them process a token.
      intermediate_size: of one expert.
      normalize: the weights of a token's experts are normalized to sum to 1.
      dense_layers: the layers that have an MLP instead.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize: bool = True
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts, got {self.experts_per_token} and {self.num_experts}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The hyperparameters of a decoder. Hashable: it may be a static argument of jit.

    Attributes:
      architecture: a key of families.FAMILIES, the model_type of config.json; selects the tensor names in files.
      context_length: maximum tokens of prompt and answer together.
      norm: "rms"; "rms_plus_one", which stores scale - 1; or "layer", with a bias.
      gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
      parallel_block: attention and MLP both read the block's only norm, and both are added to its input.
      post_norms: the outputs of attention and MLP are normalized before they are added.
      qk_norm: the queries and keys of each head are normalized before they are rotated.
      scale_embeddings: embeddings are multiplied by sqrt(hidden_size).
      query_scale: scale of the scores; None: head_dim ** -0.5.
      attention_soft_cap, logits_soft_cap: the c of c tanh(x / c), applied to the scores and to the logits.
      windows: for each layer, how many tokens a query sees, including itself; None: all. Empty: all in every layer.
      local_rope: rope of the layers with a window; None: the same as rope.
      experts: None: every layer has an MLP.
    """

    architecture: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    norm_eps: float
    rope: RopeConfig
    norm: Norm = "rms"
    hidden_act: Activation = "silu"
    gated_mlp: bool = True
    parallel_block: bool = False
    post_norms: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    tie_word_embeddings: bool = False
    scale_embeddings: bool = False
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        check_positive("config", norm_eps=self.norm_eps)
        for name in ("query_scale", "attention_soft_cap", "logits_soft_cap"):
            if getattr(self, name) is not None:
                check_positive("config", **{name: getattr(self, name)})
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads must be a multiple of num_kv_heads, got {self.num_q_heads} and {self.num_kv_heads}"
            )
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                rope.check(self.head_dim)
        for name, allowed in (("hidden_act", Activation), ("norm", Norm)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {', '.join(get_args(allowed))}, got {getattr(self, name)!r}")
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"windows must have one entry per layer, {self.num_layers}, got {len(self.windows)}")
        if any(window is not None and (type(window) is not int or window < 1) for window in self.windows):
            raise ValueError(f"a window must be an integer >= 1, or None, got {self.windows}")

    @property
    def long_rope_from(self) -> int | None:
        """The length up to which other LongRoPE factors would be used, if those for long texts are."""
        scaling = self.rope.scaling
        if isinstance(scaling, LongRopeScaling) and scaling.is_long(self.context_length):
            return scaling.original_context_length
        return None

    def is_local(self, layer: int) -> bool:
        """Whether this layer has a window, even one as long as the context."""
        return bool(self.windows) and self.windows[layer] is not None

    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees, including itself; None: the whole context."""
        window = self.windows[layer] if self.windows else None
        return None if window is None or window >= self.context_length else window

    @property
    def patterns(self) -> tuple[int | None, ...]:
        """The distinct windows, in the order of the layers. Each has separate pages in a paged cache."""
        return tuple(dict.fromkeys(map(self.window, range(self.num_layers))))

    def has_experts(self, layer: int) -> bool:
        """Whether this layer is a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def with_layers(self, num_layers: int) -> "DecoderConfig":
        """The same decoder with only its first num_layers layers.

        Raises:
          ValueError: num_layers is out of range.
        """
        if not 1 <= num_layers <= self.num_layers:
            raise ValueError(f"num_layers must be 1 to {self.num_layers}, the model's own, got {num_layers}")
        return dataclasses.replace(self, num_layers=num_layers, windows=self.windows[:num_layers])

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied output head is counted once."""
        hidden, vocab = self.hidden_size, self.vocab_size
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = 2 * hidden if self.norm == "layer" else hidden
        norms = (1 if self.parallel_block else 2) + 2 * self.post_norms
        attention = 2 * hidden * (q_size + kv_size) + self.qkv_bias * (q_size + 2 * kv_size) + self.out_bias * hidden
        each = attention + norms * norm + 2 * self.head_dim * self.qk_norm
        head = 0 if self.tie_word_embeddings else vocab * hidden
        total = vocab * hidden + norm + head + self.head_bias * vocab + self.num_layers * each
        ins = 2 if self.gated_mlp else 1
        for layer in range(self.num_layers):
            if self.experts is not None and self.has_experts(layer):
                expert = (ins + 1) * hidden * self.experts.intermediate_size
                total += self.experts.num_experts * (expert + hidden)
            else:
                inner = self.intermediate_size
                total += (ins + 1) * hidden * inner + self.mlp_bias * (ins * inner + hidden)
        return total

    @property
    def cache_elements_per_token(self) -> int:
        """Number of elements that one token adds to a KV cache."""
        return self.cache_elements(1)

    def cache_elements(self, num_tokens: int) -> int:
        """Number of elements of a KV cache of num_tokens tokens; layers with a window keep only that many."""
        kept = sum(min(num_tokens, self.window(i) or num_tokens) for i in range(self.num_layers))
        return 2 * kept * self.num_kv_heads * self.head_dim


def _check_fields(config: Any) -> None:
    """Raises ValueError unless int fields are positive integers and bool fields are bools."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} must be an integer >= 1, got {value!r}")
        if field.type is bool and type(value) is not bool:
            raise ValueError(f"{field.name} must be true or false, got {value!r}")
