"""What a decoder is, in numbers, and how its authors advise to sample from it."""

import dataclasses
from typing import Any, Literal, get_args

from jfa_models.model.rope import RopeConfig, check_positive

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "rms_plus_one", "layer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of an MLP: a router sends each token to a few of them. Source: arXiv:2401.04088.

    Attributes:
      num_experts, experts_per_token: in a layer, and how many of them a token goes to.
      intermediate_size: of one expert.
      normalize: the weights of a token's experts are made to sum to 1.
      dense_layers: the layers that keep an MLP.
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
    """The shape of a decoder. Hashable: it may be a static argument of jit.

    Attributes:
      architecture: whose names its tensors have in files, and which model_type a config.json of it says: a key of
        families.FAMILIES.
      context_length: tokens, prompt and answer together.
      norm: "rms"; "rms_plus_one", whose scale is stored less 1; or "layer", with a bias.
      gated_mlp: down(act(gate(x)) * up(x)), and not down(act(up(x))).
      parallel_block: attention and MLP both read the block's one norm, and both are added to its input.
      post_norms: what attention and MLP give is normalised before it is added.
      qk_norm: the queries and keys of each head are normalised before they are turned.
      scale_embeddings: embeddings are multiplied by sqrt(hidden_size).
      query_scale: of the scores; None: head_dim ** -0.5.
      attention_soft_cap, logits_soft_cap: c tanh(x / c) of the scores, and of the logits.
      windows: for each layer how many tokens a query sees, itself among them; None for all. Empty: all in every layer.
      local_rope: of the layers with a window; None: theirs is rope too.
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
            raise ValueError(f"windows must be one for each of {self.num_layers} layers, got {len(self.windows)}")
        if any(window is not None and (type(window) is not int or window < 1) for window in self.windows):
            raise ValueError(f"a window must be a whole number of at least 1, or None, got {self.windows}")

    def is_local(self, layer: int) -> bool:
        """Whether this layer has a window, be it as long as the context."""
        return bool(self.windows) and self.windows[layer] is not None

    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees, itself among them; None: all that there can be."""
        window = self.windows[layer] if self.windows else None
        return None if window is None or window >= self.context_length else window

    @property
    def patterns(self) -> tuple[int | None, ...]:
        """The windows that occur, each once, in the order of the layers: what has pages of its own in a paged cache."""
        return tuple(dict.fromkeys(map(self.window, range(self.num_layers))))

    def has_experts(self, layer: int) -> bool:
        """Whether this layer is a mixture."""
        return self.experts is not None and layer not in self.experts.dense_layers

    def with_layers(self, num_layers: int) -> "DecoderConfig":
        """The same decoder with its first num_layers layers alone.

        Raises:
          ValueError: there are not as many.
        """
        if not 1 <= num_layers <= self.num_layers:
            raise ValueError(f"num_layers must be 1 to {self.num_layers}, the model's, got {num_layers}")
        return dataclasses.replace(self, num_layers=num_layers, windows=self.windows[:num_layers])

    @property
    def num_params(self) -> int:
        """Numbers in all weights; a tied head counts once."""
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
        """Numbers that one token leaves in a KV cache."""
        return self.cache_elements(1)

    def cache_elements(self, num_tokens: int) -> int:
        """Numbers in a KV cache of so many tokens, of which layers with a window keep the window."""
        kept = sum(min(num_tokens, self.window(i) or num_tokens) for i in range(self.num_layers))
        return 2 * kept * self.num_kv_heads * self.head_dim


def _check_fields(config: Any) -> None:
    """Raises ValueError unless counts are counts and flags are flags."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
        if field.type is bool and type(value) is not bool:
            raise ValueError(f"{field.name} must be true or false, got {value!r}")
