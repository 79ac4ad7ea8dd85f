"""The results of a request, with vLLM's names. They are plain Python values and contain no device arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """The natural log-probability of one token under the raw logits, before bias, penalties and temperature.

    `rank` is 1 for the most likely token, and None if it was not computed. `decoded_token` is the text of the token
    by itself, and None if it was not decoded; an incomplete character is decoded to U+FFFD.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
      index: its index among the continuations of the prompt.
      text: the generated text, without the stop string that ended it.
      token_ids: all generated tokens, including the one that ended it.
      cumulative_logprob: sum of the log-probabilities of token_ids; None unless logprobs were requested.
      logprobs: for each token, a mapping from token id to Logprob with the most likely tokens and always the generated
        one; None unless logprobs were requested.
      finish_reason: "stop" (end token, stop token or stop string), "length" (max_tokens or the context length),
        "abort" (by the caller), "error" (see RequestOutput.error), or None until it ends.
      stop_reason: the stop token or stop string that ended it; None for the model's own end token.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestMetrics:
    """Times of the events of a request, in seconds on the engine's clock."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations.

    Attributes:
      prompt: None if the prompt was passed as token ids.
      prompt_logprobs: for each token of the prompt, a mapping as in CompletionOutput.logprobs; None for the first
        token, which has no predecessor.
      request_id, metrics: set by the engine.
      error: the exception that ended the request, for example one raised by its callback.
    """

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[Mapping[int, Logprob] | None, ...] | None = None
    request_id: str | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        """Whether every continuation has ended."""
        return all(output.finish_reason is not None for output in self.outputs)
