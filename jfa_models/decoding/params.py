"""Parameters of a request: how a prompt is continued. Nothing here imports JAX or NumPy."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from jfa_models.text.structured import StructuredOutputsParams

MAX_SAMPLES = 10_000  # maximum continuations per prompt
MAX_LOGPROBS = 20  # the largest number of alternatives that vLLM and the OpenAI API return by default
GREEDY_BELOW = 1e-5  # smaller temperatures mean greedy, as in vLLM: logit differences divided by them overflow float32
MAX_INT32 = 2**31 - 1
SEED_ADVICE = "requests without a seed get one from it"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are sampled. Names, defaults and meanings are those of vLLM.

    The logits are processed in this order: `logit_bias`, masking of end and stop tokens before `min_tokens`,
    `repetition_penalty` (prompt and output), `frequency_penalty` and `presence_penalty` (output), `temperature`,
    `min_p`, `top_k`, `top_p`, sampling. Each filter applies to the tokens that the previous one kept. Tokens that tie
    at the limit of top_k or top_p are all kept.

    Attributes:
      n: number of continuations, which are sampled independently; the first one is the same as with n=1. Only Engine
        and LLM support more than 1.
      temperature: 0 (or less than 1e-5): greedy decoding, without min_p, top_k and top_p.
      top_k: 0 or -1 keeps all tokens.
      seed: 0 to 2**64 - 1; None or -1: the engine chooses one. The same seed gives the same text, regardless of the
        other requests in a batch.
      stop: one or several strings; the text ends before the first one that is generated. One that is a special token
        of the model also ends the text where the model generates that token, which has no text.
      stop_token_ids: tokens that end the text, in addition to the model's end tokens.
      ignore_eos: the model's end tokens neither end the text nor are masked before min_tokens.
      max_tokens: None: up to the context length.
      logprobs: number of most likely tokens to report for each token; 0: only the sampled token. They are computed
        from the raw logits.
      structured_outputs: what the text must look like: StructuredOutputsParams, or a dictionary of its fields. It ends
        where it is complete, also before min_tokens.
      prompt_logprobs: like logprobs, for the tokens of the prompt. Only Engine and LLM support it.
      logit_bias: token ids and the values to add to their logits; stored as a tuple of pairs.
      skip_special_tokens: omit special tokens from the text.
      include_stop_str_in_output: the text includes the stop string or the text of the stop token that ended it; a
        special token given by its id has a text only without skip_special_tokens.
      spaces_between_special_tokens: accepted for compatibility; no tokenizer here adds spaces.

    Raises:
      ValueError: a field is out of range; the message names it. `check_token_ids` checks ids against a vocabulary.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()  # None, vLLM's default, is accepted for this and the next
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "temperature": number("temperature", self.temperature, 0, None, "use 0 for greedy, 0.7 to 1 for sampling"),
            "top_p": number("top_p", self.top_p, 0, 1, "use 1 to keep all tokens", low_is_allowed=False),
            "min_p": number("min_p", self.min_p, 0, 1, "use 0 to keep all tokens"),
            "presence_penalty": number("presence_penalty", self.presence_penalty, -2, 2, "use 0 for none"),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty, -2, 2, "use 0 for none"),
            "repetition_penalty": number(
                "repetition_penalty", self.repetition_penalty, 0, 1000, "use 1 for none", low_is_allowed=False
            ),
            "top_k": integer("top_k", self.top_k, -1, None, "use 0 to keep all tokens"),
            "n": integer("n", self.n, 1, MAX_SAMPLES, "use 1 for one continuation"),
            "min_tokens": integer("min_tokens", self.min_tokens, 0, None, "use 0 for no minimum"),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": tuple(
                integer("stop_token_ids", token_id, 0, MAX_INT32, "use ids from the model's vocabulary")
                for token_id in _listed("stop_token_ids", self.stop_token_ids, "a list of token ids")
            ),
        }
        if self.max_tokens is not None:
            advice = "use None for as many as the context allows"
            checked["max_tokens"] = integer("max_tokens", self.max_tokens, 1, MAX_INT32, advice)
            if self.min_tokens > self.max_tokens:
                raise ValueError(
                    f"min_tokens must be at most max_tokens, got {self.min_tokens} and {self.max_tokens}; "
                    "lower min_tokens or raise max_tokens"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                checked[name] = integer(name, value, 0, MAX_LOGPROBS, "use None for no log-probabilities")
        if isinstance(self.seed, Integral) and self.seed == -1:
            checked["seed"] = None
        elif self.seed is not None:
            checked["seed"] = integer("seed", self.seed, 0, 2**64 - 1, "use None to let the engine choose a seed")
        if self.logit_bias is not None:
            checked["logit_bias"] = bias_pairs(self.logit_bias)
        if self.structured_outputs is not None:
            checked["structured_outputs"] = _structured(self.structured_outputs)
            if self.ignore_eos:
                raise ValueError("structured_outputs ends the text by an end token, so ignore_eos must be False")
        flags = {
            "ignore_eos": "use False to end at eos",
            "skip_special_tokens": "use True for text without them",
            "include_stop_str_in_output": "use False for text that ends before it",
            "spaces_between_special_tokens": "it has no effect: the tokenizers of this library add none",
        }
        for name, advice in flags.items():
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}; {advice}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken, without sampling."""
        return self.temperature < GREEDY_BELOW

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits change before sampling: by a bias, a penalty, or masking of end tokens."""
        penalties = (self.repetition_penalty - 1, self.frequency_penalty, self.presence_penalty)
        return bool(self.logit_bias or self.min_tokens or any(penalties))


# Parameters of vLLM 0.22 that this library does not have, and what to use.
_ELSEWHERE = {
    "best_of": "use n, and take the continuation with the largest cumulative_logprob",
    "use_beam_search": "use BeamSearchParams",
    "length_penalty": "use BeamSearchParams",
    "early_stopping": "use BeamSearchParams",
    "bad_words": "use logit_bias of -100 for token ids",
    "allowed_token_ids": "use logit_bias of -100 for the other token ids",
    "logits_processors": "use logit_bias",
    "guided_decoding": "use structured_outputs",
    "truncate_prompt_tokens": "pass the prompt as token ids, and cut them",
    "detokenize": "results have token_ids next to their text",
    "output_kind": "use stream for results as they grow, generate for finished ones",
    "flat_logprobs": "logprobs are one dictionary per token",
    "skip_reading_prefix_cache": "use LLM(..., enable_prefix_caching=False)",
    "extra_args": "there is nothing that would read them",
}


def _refuse(params: type, elsewhere: Mapping[str, str]) -> None:
    """Makes a class of parameters answer fields that it does not have with what to use."""
    init = params.__init__

    @functools.wraps(init)
    def refusing_init(self: Any, **fields: Any) -> None:
        for name in fields:
            if name in elsewhere:
                raise ValueError(f"{params.__name__} has no {name}: {elsewhere[name]}")
        init(self, **fields)

    params.__init__ = refusing_init  # type: ignore[misc]


_refuse(SamplingParams, _ELSEWHERE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Beam search for the most likely continuations of a prompt. Names and meanings are those of vLLM and transformers.

    Each step keeps the `beam_width` continuations of the current beams with the highest sum of log-probabilities, until
    `beam_width` continuations have ended or have `max_tokens` tokens. The score of a result is this sum divided by
    length ** `length_penalty`; the end token counts for the length. Results are ordered by score, best first.

    Attributes:
      beam_width: number of beams and of results. Each beam reports its 2 * beam_width most likely next tokens, enough
        to continue with beam_width beams even if some of them are end tokens; so beam_width is at most
        MAX_LOGPROBS / 2.
      length_penalty: values above 0 favor long continuations.
      early_stopping: True: stop as soon as beam_width continuations have ended. False: stop when no current beam, at
        its current length, would score better than the worst of them.
      ignore_eos: treat the model's end tokens like all other tokens.

    Source: the search of transformers' `generate(num_beams=...)`; arXiv:1609.08144, section 7, for the penalty.

    Raises:
      ValueError: a field is out of range; the message names it.
    """

    beam_width: int = 4
    max_tokens: int = 16
    length_penalty: float = 1.0
    early_stopping: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        largest = MAX_LOGPROBS // 2
        width = integer("beam_width", self.beam_width, 1, largest, f"there are {MAX_LOGPROBS} candidates per beam")
        length = integer("max_tokens", self.max_tokens, 1, MAX_INT32, "it limits the length of the continuations")
        penalty = number("length_penalty", self.length_penalty, -10, 10, "use 0 for none, 1 for the mean")
        for name in ("early_stopping", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        object.__setattr__(self, "beam_width", width)
        object.__setattr__(self, "max_tokens", length)
        object.__setattr__(self, "length_penalty", penalty)


_refuse(BeamSearchParams, {"structured_outputs": "beams are not masked; use SamplingParams, with n for several texts"})


def one_per_prompt(params: Any, num_prompts: int) -> list[Any]:
    """The parameters of each prompt, from one for all or a list with one for each.

    Raises:
      ValueError: the list has another length.
    """
    if isinstance(params, str | Mapping) or not hasattr(params, "__len__"):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise ValueError(f"sampling_params must be one, or one per prompt, got {len(params)} for {num_prompts} prompts")
    return list(params)


def check_kind(params: object, *kinds: type) -> None:
    """Raises ValueError unless params has one of these types."""
    if not isinstance(params, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        elsewhere = "; jfa_models.LLM does beam search" if isinstance(params, BeamSearchParams) else ""
        raise ValueError(f"sampling_params must be {names}(...), or None, got {params!r}{elsewhere}")


def check_token_ids(params: SamplingParams, *, vocab_size: int) -> None:
    """Checks that the token ids of SamplingParams exist in a vocabulary.

    Raises:
      ValueError: an id in `stop_token_ids` or `logit_bias` is outside the vocabulary.
    """
    biased = [token_id for token_id, _ in bias_pairs(params.logit_bias or ())]
    for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
        outside = [token_id for token_id in token_ids if token_id >= vocab_size]
        if outside:
            raise ValueError(
                f"{name} must contain ids from 0 to {vocab_size - 1}, the model's vocabulary, got {outside}; "
                "use ids from this model's tokenizer"
            )


def bias_pairs(bias: Mapping[int, float] | Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """(token id, value) pairs without duplicates, from a mapping or pairs; sorted by id."""
    kind = "a mapping from token ids to numbers"
    pairs = [*bias.items()] if isinstance(bias, Mapping) else _listed("logit_bias", bias, kind)
    if any(not hasattr(pair, "__len__") or isinstance(pair, str) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"logit_bias must be {kind}, got {bias!r}")
    values = {
        integer("logit_bias", token_id, 0, MAX_INT32, "its keys are token ids"): number(
            f"logit_bias of token {token_id}", value, -100, 100, "-100 practically bans a token"
        )
        for token_id, value in pairs
    }
    return tuple(sorted(values.items()))


def _structured(given: Any) -> StructuredOutputsParams:
    if isinstance(given, StructuredOutputsParams):
        return given
    names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
    if not isinstance(given, Mapping):
        raise ValueError(f"structured_outputs must be StructuredOutputsParams(...) or its fields, got {given!r}")
    if unknown := sorted(map(str, given.keys() - {*names})):
        raise ValueError(f"structured_outputs has no field {', '.join(unknown)}; its fields are {', '.join(names)}")
    return StructuredOutputsParams(**given)


def _listed(name: str, values: Any, kind: str) -> list[Any]:
    """values as a list; None: empty."""
    if values is None:
        return []
    values = values.tolist() if hasattr(values, "tolist") else values  # an array of any library
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be {kind}, got {values!r}")
    return list(values)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(_listed("stop", stop, "a string or a list of strings"))
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop must contain non-empty strings, got {text!r}; omit it, or use stop_token_ids")
    return texts


def number(name: str, value: object, low: int, high: int | None, advice: str, *, low_is_allowed: bool = True) -> float:
    """value as a float; ValueError with the advice unless it is a finite number in [low, high], or in (low, high]."""
    if isinstance(value, Real) and not isinstance(value, bool):
        number = float(value)
        is_above = number > low or (number == low and low_is_allowed)
        if is_above and math.isfinite(number) and (high is None or number <= high):
            return number
    if high is None:
        allowed = f"a finite number {'>=' if low_is_allowed else '>'} {low}"
    else:
        allowed = f"a number in {'[' if low_is_allowed else '('}{low}, {high}]"
    raise ValueError(f"{name} must be {allowed}, got {value!r}; {advice}")


def integer(name: str, value: object, low: int, high: int | None, advice: str) -> int:
    """value as an int; ValueError with the advice unless it is an integer in [low, high]."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        integer = int(value)
        if low <= integer and (high is None or integer <= high):
            return integer
    allowed = f">= {low}" if high is None else f"from {low} to {high}"
    raise ValueError(f"{name} must be an integer {allowed}, got {value!r}; {advice}")
