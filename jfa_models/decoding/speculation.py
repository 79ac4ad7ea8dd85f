"""Options of speculative decoding. Nothing here imports JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jfa_models.decoding.params import integer, number

MAX_DRAFT = 64  # tokens of one draft

# which options a method has, apart from those of all
_OPTIONS = {
    "ngram": ("prompt_lookup_min", "prompt_lookup_max"),
    "draft_model": ("model", "confidence_threshold"),
    "self": ("num_layers", "confidence_threshold"),
    "lookahead": ("window_size", "ngram_size"),
    "staged": ("model", "num_layers", "confidence_threshold", "prompt_lookup_min", "prompt_lookup_max"),
}
METHODS = tuple(_OPTIONS)
TREES = ("lookahead", "staged")  # methods whose drafts are trees
_LENGTHS = {"lookahead": 31, "staged": 15}  # default num_speculative_tokens, where it is not _LENGTH
_LENGTH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How an engine speculates: a cheap proposer drafts tokens, and one step of the model verifies all of them.

    The tokens of a request, greedy or sampled, are those that it gets without speculation, up to ties: drafts only
    change how many steps they take. Models with states take every method but lookahead and staged.

    Attributes:
      method: "ngram" (prompt lookup): what followed the last tokens where they stood before, in prompt or answer.
        "draft_model": a smaller model with the same tokenizer. "self": the first layers of the model itself, with its
        own output layer. "lookahead": the model guesses the tokens of a window ahead, better in each step, and guesses
        that fit the text are drafts. "staged": as "draft_model" or "self", with the draft model's
        tokens drafted by prompt lookup, and with its second choices: the draft is a tree.
      num_speculative_tokens: the most drafted tokens of a row, up to MAX_DRAFT: of a tree, those of all branches, and
        with lookahead the window's. None: 31 with lookahead, 15 with staged, else 8.
      adaptive: each draft is cut where its last tokens are not expected to be worth their share of a step, by the
        times and the acceptance seen so far; so no draft at all where speculation does not pay. False: whole drafts.
      prompt_lookup_min, prompt_lookup_max: how many last tokens must have stood there before: as many as possible from
        prompt_lookup_max down to prompt_lookup_min.
      model: of draft_model, or of staged: what from_pretrained takes, or a LanguageModel.
      num_layers: of self, or of staged.
      window_size: of lookahead: places ahead that are guessed, W in arXiv:2402.02057.
      ngram_size: of lookahead: tokens of an n-gram, N: each place has a guess from N - 1 steps.
      confidence_threshold: a draft ends before the first token to which its model gives a smaller probability.

    Raises:
      ValueError: an option is unknown, out of range, missing, or not one of this method.
    """

    method: Literal["ngram", "draft_model", "self", "lookahead", "staged"]
    num_speculative_tokens: int | None = None
    adaptive: bool = True
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5
    model: Any = None
    num_layers: int | None = None
    confidence_threshold: float = 0.3
    window_size: int = 5
    ngram_size: int = 4

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"the method of speculation must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.num_speculative_tokens is None:
            object.__setattr__(self, "num_speculative_tokens", _LENGTHS.get(self.method, _LENGTH))
        integer(
            "num_speculative_tokens", self.num_speculative_tokens, 1, MAX_DRAFT, "leave out speculative_config for none"
        )
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"adaptive must be True or False, got {self.adaptive!r}; False verifies whole drafts")
        for name in {name for names in _OPTIONS.values() for name in names} - {*_OPTIONS[self.method]}:
            default = next(field.default for field in dataclasses.fields(self) if field.name == name)
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect on the method {self.method!r}, whose options are "
                    f"{', '.join(_OPTIONS[self.method])}"
                )
        integer(
            "prompt_lookup_min", self.prompt_lookup_min, 1, None, "shorter matches give longer drafts, often refused"
        )
        advice = f"it is at least prompt_lookup_min, {self.prompt_lookup_min}"
        integer("prompt_lookup_max", self.prompt_lookup_max, self.prompt_lookup_min, 32, advice)
        number("confidence_threshold", self.confidence_threshold, 0, 1, "use 0 to draft num_speculative_tokens always")
        if self.method == "draft_model" and self.model is None:
            raise ValueError('the method "draft_model" needs model: a folder, a repository or a LanguageModel')
        if self.method == "staged" and (self.model is None) == (self.num_layers is None):
            raise ValueError(
                'the method "staged" needs either model (a folder, a repository or a LanguageModel) or num_layers, the '
                f"number of first layers that draft; got model={self.model!r} and num_layers={self.num_layers!r}"
            )
        if self.method == "self" or self.num_layers is not None:
            integer("num_layers", self.num_layers, 1, None, "it is the number of first layers that draft")
        if self.method == "lookahead":
            integer("window_size", self.window_size, 1, MAX_DRAFT, "it is the number of places ahead that are guessed")
            integer("ngram_size", self.ngram_size, 2, MAX_DRAFT, "an n-gram is a token and what followed it")
            if (window := self.window_size * (self.ngram_size - 1)) >= self.length:
                raise ValueError(
                    f"a lookahead window of window_size={self.window_size} x (ngram_size={self.ngram_size} - 1) = "
                    f"{window} tokens leaves no drafts of num_speculative_tokens={self.length}: give more tokens (up "
                    f"to {MAX_DRAFT}), or a smaller window"
                )

    @property
    def length(self) -> int:
        """num_speculative_tokens."""
        assert self.num_speculative_tokens is not None
        return self.num_speculative_tokens

    @classmethod
    def of(cls, given: "SpeculativeConfig | Mapping[str, Any]") -> "SpeculativeConfig":
        """The options in a mapping with vLLM's names. Without a method, a model means "draft_model".

        Raises:
          ValueError: see the class; or there is no such option.
        """
        if isinstance(given, SpeculativeConfig):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f'speculative_config must be a mapping such as {{"method": "ngram"}}, got {given!r}')
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(map(str, given.keys() - {*names})):
            raise ValueError(
                f"speculative_config has no option {', '.join(unknown)}; its options are {', '.join(names)}"
            )
        if "method" not in given:
            if given.get("model") is None:
                raise ValueError(f"speculative_config needs a method: {', '.join(METHODS)}")
            given = {"method": "draft_model", **given}
        return cls(**given)
