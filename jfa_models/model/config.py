"""The configuration of a decoder."""

import dataclasses
import math
from typing import Any, Literal, get_args

from jfa_models.model.rope import LongRopeScaling, RopeConfig, check_positive
from jfa_models.model.sparse_config import SparseConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "rms_plus_one", "layer"]
Mixer = Literal["attention", "mamba2", "gated_delta"]

_MAY_BE_ZERO = dict(least=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts instead of an MLP: a router sends each token to a few of them. Source: arXiv:2401.04088.

    Attributes:
      num_experts, experts_per_token: experts per layer, and how many of them process a token.
      intermediate_size: of one expert.
      normalize: the weights of a token's experts are normalized to sum to 1.
      dense_layers: the layers that have an MLP instead.
      shared_size: of an MLP that processes every token besides; 0: there is none.
      shared_gate: its output is multiplied by sigmoid(w x).
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize: bool = True
    dense_layers: tuple[int, ...] = ()
    shared_size: int = dataclasses.field(default=0, metadata=_MAY_BE_ZERO)
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token must be at most num_experts, got {self.experts_per_token} and {self.num_experts}"
            )

    def num_params(self, hidden: int, matrices: int) -> int:
        """Of one layer; matrices: in an expert."""
        expert = matrices * hidden * self.intermediate_size
        shared = matrices * hidden * self.shared_size + self.shared_gate * hidden
        return self.num_experts * (expert + hidden) + shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """Layers with a state instead of attention, which each token decays and adds to. Source: arXiv:2405.21060.

    Attributes:
      num_heads, head_dim: of the values.
      state_size: size of the keys (B) and queries (C): a head's state is [state_size, head_dim].
      num_groups: of heads, each with one key and one query for all its heads, and normalized by itself.
      conv_width: tokens that a token's convolution sees, itself included.
      time_step_limit: the smallest and largest time step.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int = 1
    conv_width: int = 4
    conv_bias: bool = True
    proj_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_conv_width(self.conv_width)
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads must be a multiple of num_groups, got {self.num_heads} and {self.num_groups}")
        low, high = self.time_step_limit
        if not 0 <= low <= high:
            raise ValueError(f"time_step_limit must be two numbers, 0 <= low <= high, got {self.time_step_limit}")

    @property
    def inner(self) -> int:
        """Size of all values."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Of the convolution: values, keys, queries."""
        return self.inner + 2 * self.num_groups * self.state_size

    @property
    def inputs(self) -> int:
        """What a token brings to the convolution and the states: its channels, and a time step for each head."""
        return self.channels + self.num_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, size of a key, size of a value."""
        return self.num_heads, self.state_size, self.head_dim

    def num_params(self, hidden: int) -> int:
        """Of one layer."""
        projected = self.inner + self.channels + self.num_heads
        projections = hidden * (projected + self.inner) + self.proj_bias * (projected + hidden)
        return projections + self.channels * (self.conv_width + self.conv_bias) + 3 * self.num_heads + self.inner


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig:
    """Layers with a state instead of attention, a part of which each token replaces. Source: arXiv:2412.06464.

    Attributes:
      num_key_heads, num_value_heads: each key head serves as many consecutive value heads.
      key_dim, value_dim: of a head, whose state is [key_dim, value_dim].
      conv_width: tokens that a token's convolution sees, itself included.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4

    def __post_init__(self) -> None:
        _check_fields(self)
        _check_conv_width(self.conv_width)
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                "num_value_heads must be a multiple of num_key_heads, "
                f"got {self.num_value_heads} and {self.num_key_heads}"
            )

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys, values."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def inputs(self) -> int:
        """What a token brings to the convolution and the states: its channels, and two gates for each value head."""
        return self.channels + 2 * self.num_value_heads

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Heads, size of a key, size of a value."""
        return self.num_value_heads, self.key_dim, self.value_dim

    def num_params(self, hidden: int) -> int:
        """Of one layer."""
        values = self.num_value_heads * self.value_dim
        projections = hidden * (self.channels + values + 2 * self.num_value_heads + values)
        return projections + self.channels * self.conv_width + 2 * self.num_value_heads + self.value_dim


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamingConfig:
    """Attention to the first and the last tokens of a text of any length (StreamingLLM). Source: arXiv:2309.17453.

    Positions count the tokens that are seen, as if the text had no others: no distance is longer than window +
    num_sinks.

    Attributes:
      window: how many of the last tokens a query sees, including itself.
      num_sinks: how many of the first tokens it sees.
    """

    window: int
    num_sinks: int = dataclasses.field(default=4, metadata=_MAY_BE_ZERO)

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The hyperparameters of a decoder. Hashable: it may be a static argument of jit.

    Attributes:
      architecture: a key of families.FAMILIES, the model_type of config.json; selects the tensor names in files.
      intermediate_size: of an MLP; 0: layers have none.
      num_q_heads, num_kv_heads, head_dim: of attention; 0 in a decoder without attention.
      context_length: maximum tokens of prompt and answer together.
      rope: None: queries and keys are not rotated, and know no positions.
      norm: "rms"; "rms_plus_one", which stores scale - 1; or "layer", with a bias.
      gated_mlp: down(act(gate(x)) * up(x)) instead of down(act(up(x))).
      parallel_block: attention and MLP both read the block's only norm, and both are added to its input.
      post_norms: the outputs of attention and MLP are normalized before they are added.
      qk_norm: the queries and keys of each head are normalized before they are rotated.
      attention_gate: attention's output is multiplied by the sigmoid of a gate, which q projects besides each query.
      scale_embeddings: embeddings are multiplied by sqrt(hidden_size).
      embedding_multiplier, residual_multiplier: of the embeddings, and of what a layer adds to its input.
      logits_divisor: of the logits.
      query_scale: scale of the scores; None: head_dim ** -0.5.
      attention_soft_cap, logits_soft_cap: the c of c tanh(x / c), applied to the scores and to the logits.
      windows: for each layer, how many tokens a query sees, including itself; None: all. Empty: all in every layer.
      local_rope: rope of the layers with a window; None: the same as rope.
      streaming: what the layers without a window see instead of the whole context. None: the whole context.
      sparse_attention: for each layer, which scores it computes of a text whose tokens are all given: in training, in a
        pass without a cache, and of a prompt from its first token on. Later tokens see all. Entries may be written as
        "top-k:0.25"; None: all scores. Empty: all in every layer.
      experts: None: every layer has an MLP.
      mixers: for each layer, what mixes its tokens. Empty: attention in all.
      mamba2, gated_delta: of the layers with these mixers; a decoder has only one of them.
    """

    architecture: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int = dataclasses.field(metadata=_MAY_BE_ZERO)
    num_layers: int
    num_q_heads: int = dataclasses.field(metadata=_MAY_BE_ZERO)
    num_kv_heads: int = dataclasses.field(metadata=_MAY_BE_ZERO)
    head_dim: int = dataclasses.field(metadata=_MAY_BE_ZERO)
    context_length: int
    norm_eps: float
    rope: RopeConfig | None
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
    attention_gate: bool = False
    scale_embeddings: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logits_soft_cap: float | None = None
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    streaming: StreamingConfig | None = None
    sparse_attention: tuple[SparseConfig | None, ...] = ()
    experts: ExpertsConfig | None = None
    mixers: tuple[Mixer, ...] = ()
    mamba2: Mamba2Config | None = None
    gated_delta: GatedDeltaConfig | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        for name in ("norm_eps", "embedding_multiplier", "residual_multiplier", "logits_divisor"):
            check_positive("config", **{name: getattr(self, name)})
        for name in ("query_scale", "attention_soft_cap", "logits_soft_cap"):
            if getattr(self, name) is not None:
                check_positive("config", **{name: getattr(self, name)})
        self._check_mixers()
        if self.num_kv_heads and self.num_q_heads % self.num_kv_heads:
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
        self._check_sparse_attention()

    def _check_mixers(self) -> None:
        if self.mixers and len(self.mixers) != self.num_layers:
            raise ValueError(f"mixers must have one entry per layer, {self.num_layers}, got {len(self.mixers)}")
        if unknown := set(self.mixers) - set(get_args(Mixer)):
            raise ValueError(f"a mixer must be one of {', '.join(get_args(Mixer))}, got {', '.join(sorted(unknown))}")
        if self.mamba2 is not None and self.gated_delta is not None:
            raise ValueError("a decoder has layers of mamba2 or of gated_delta, got both")
        for name in ("mamba2", "gated_delta"):
            if name in self.mixers and getattr(self, name) is None:
                raise ValueError(f"mixers has {name}, so {name} must be its configuration, got None")
        for name in ("num_q_heads", "num_kv_heads", "head_dim"):
            if self.attention_layers and not getattr(self, name):
                raise ValueError(f"{name} must be an integer >= 1 in a decoder with attention, got 0")

    def _check_sparse_attention(self) -> None:
        given = self.sparse_attention
        if not isinstance(given, tuple | list) or (given and len(given) != self.num_layers):
            raise ValueError(f"sparse_attention must have one entry per layer, {self.num_layers}, got {given!r}")
        given = tuple(None if entry is None else SparseConfig.of(entry) for entry in given)
        object.__setattr__(self, "sparse_attention", given)
        for layer, entry in enumerate(given):
            why, instead = None, "make its entry None"
            if self.mixer(layer) != "attention":
                why = f"is a layer of {self.mixer(layer)}, which has no scores"
            elif self.window(layer) is not None:
                why = f"sees only the last {self.window(layer)} tokens"
                instead = instead if self.is_local(layer) else "leave attention_window out"
            if entry is not None and why is not None:
                raise ValueError(f"sparse_attention={entry}: layer {layer} {why}; {instead}")

    def mixer(self, layer: int) -> Mixer:
        """What mixes the tokens of this layer."""
        return self.mixers[layer] if self.mixers else "attention"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers with attention, which are those that a KV cache has, in this order."""
        return tuple(i for i in range(self.num_layers) if self.mixer(i) == "attention")

    @property
    def state_layers(self) -> tuple[int, ...]:
        """The layers with a state, which are those that a StateCache has, in this order."""
        return tuple(i for i in range(self.num_layers) if self.mixer(i) != "attention")

    @property
    def long_rope_from(self) -> int | None:
        """The length up to which other LongRoPE factors would be used, if those for long texts are."""
        scaling = None if self.rope is None else self.rope.scaling
        if isinstance(scaling, LongRopeScaling) and scaling.is_long(self.context_length):
            return scaling.original_context_length
        return None

    def is_local(self, layer: int) -> bool:
        """Whether this layer has a window of its own, even one as long as the context."""
        return bool(self.windows) and self.windows[layer] is not None

    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees, including itself; None: the whole context."""
        window = self.windows[layer] if self.windows else None
        if window is None and self.streaming is not None:
            return self.streaming.window
        return None if window is None or window >= self.context_length else window

    def is_streaming(self, layer: int) -> bool:
        """Whether a query of this layer sees the first tokens besides its window."""
        return self.streaming is not None and self.streaming.num_sinks > 0 and not self.is_local(layer)

    def sinks_of(self, window: int | None) -> int:
        """How many first tokens the layers with this window see, or some of them."""
        if self.streaming is None or window != self.streaming.window:
            return 0
        return self.streaming.num_sinks

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that compute only a part of the scores of a whole text."""
        return tuple(i for i, entry in enumerate(self.sparse_attention) if entry is not None and not entry.is_exact)

    @property
    def patterns(self) -> tuple[int | None, ...]:
        """The distinct windows, in the order of the layers. Each has separate pages in a paged cache."""
        return tuple(dict.fromkeys(map(self.window, self.attention_layers)))

    @property
    def states(self) -> "Mamba2Config | GatedDeltaConfig | None":
        """The configuration of the layers with a state; None: there are none."""
        return (self.mamba2 or self.gated_delta) if self.state_layers else None

    @property
    def has_mlp(self) -> bool:
        """Whether each layer has an MLP, or experts."""
        return self.intermediate_size > 0 or self.experts is not None

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
        per_layer = ("windows", "mixers", "sparse_attention")
        kept: dict[str, Any] = {name: getattr(self, name)[:num_layers] for name in per_layer}
        return dataclasses.replace(self, num_layers=num_layers, **kept)

    @property
    def num_params(self) -> int:
        """Number of parameters; a tied output head is counted once."""
        hidden, vocab = self.hidden_size, self.vocab_size
        q_size, kv_size = self.num_q_heads * self.head_dim, self.num_kv_heads * self.head_dim
        norm = 2 * hidden if self.norm == "layer" else hidden
        norms = (2 if self.has_mlp and not self.parallel_block else 1) + 2 * self.post_norms
        gate_size = q_size if self.attention_gate else 0
        attention = 2 * hidden * (q_size + kv_size) + self.qkv_bias * (q_size + 2 * kv_size) + self.out_bias * hidden
        attention += gate_size * (hidden + self.qkv_bias) + 2 * self.head_dim * self.qk_norm
        head = 0 if self.tie_word_embeddings else vocab * hidden
        total = vocab * hidden + norm + head + self.head_bias * vocab + self.num_layers * norms * norm
        total += attention * len(self.attention_layers)
        if self.states is not None:
            total += self.states.num_params(hidden) * len(self.state_layers)
        ins = 2 if self.gated_mlp else 1
        for layer in range(self.num_layers):
            if self.experts is not None and self.has_experts(layer):
                total += self.experts.num_params(hidden, ins + 1)
            elif self.has_mlp:
                inner = self.intermediate_size
                total += (ins + 1) * hidden * inner + self.mlp_bias * (ins * inner + hidden)
        return total

    @property
    def cache_elements_per_token(self) -> int:
        """Number of elements that one token adds to a KV cache."""
        return self.cache_elements(1)

    def cache_elements(self, num_tokens: int) -> int:
        """Number of elements of a KV cache of num_tokens tokens; layers with a window keep only that many."""
        windows = map(self.window, self.attention_layers)
        kept = sum(min(num_tokens, (window or num_tokens) + self.sinks_of(window)) for window in windows)
        return 2 * kept * self.num_kv_heads * self.head_dim


def _check_fields(config: Any) -> None:
    """Raises ValueError unless int fields are positive integers, or 0 where they may be, and bool fields are bools."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), field.metadata.get("least", 1)
        if field.type is int and (type(value) is not int or value < least):
            raise ValueError(f"{field.name} must be an integer >= {least}, got {value!r}")
        if field.type is bool and type(value) is not bool:
            raise ValueError(f"{field.name} must be true or false, got {value!r}")


def _check_conv_width(conv_width: int) -> None:
    if conv_width < 2:
        raise ValueError(f"conv_width must be at least 2, got {conv_width}")
