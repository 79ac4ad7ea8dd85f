"""What a request gives back, under vLLM's names. Plain values: nothing here holds a device array."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """The natural-log probability of one token under the raw logits, before bias, penalties and temperature.

    `rank` is 1 for the likeliest token, and None where it was not computed. `decoded_token` is the token's own text
    where somebody decoded it; half a character decodes to U+FFFD.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    `text` ends before the stop string that ended it; `token_ids` holds every token that was generated, the one that
    ended it included. `cumulative_logprob` is the sum over `token_ids`, `logprobs` has one mapping from token id to
    Logprob per token: the most likely ones and always the chosen one; both are None unless logprobs were asked for.
    `finish_reason` is "stop" (an end or stop token, or a stop string; `stop_reason` says which, None for the model's
    own end token), "length" (max_tokens or the model's context), "abort" (the caller's), "error" (RequestOutput.error
    says which), or None while it is still growing.
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
    """When things happened to a request, in seconds on the engine's clock."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations. `prompt` is None where token ids were given.

    `prompt_logprobs` has one mapping per token of the prompt, as CompletionOutput.logprobs has, and None for the first
    token, which nothing precedes. `error` is what ended the request, where its callback did. `request_id` and `metrics`
    are the engine's.
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
