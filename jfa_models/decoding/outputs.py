"""The results of a request, under vLLM's names. Plain values: nothing here holds a device array."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logprob:
    """The natural-log probability of one token under the raw logits, before bias, penalties and temperature.

    `rank` is 1 for the likeliest token, and None if it was not computed. `decoded_token` is the token's own text, None
    if it was not decoded; an incomplete character decodes to U+FFFD.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    `text` ends before the stop string that ended it; `token_ids` holds all generated tokens, including the one that
    ended it. `cumulative_logprob` is the sum over `token_ids`; `logprobs` has one mapping from token id to Logprob per
    token: the likeliest ones and always the sampled one; both are None unless logprobs were requested. `finish_reason`
    is "stop" (an end or stop token, or a stop string; `stop_reason` is that token or string, None for the model's own
    end token), "length" (max_tokens or the model's context), "abort" (by the caller), "error" (see
    RequestOutput.error), or None until it ends.
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
    """Times of a request's events, in seconds on the engine's clock."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations. `prompt` is None if token ids were given.

    `prompt_logprobs` has one mapping per token of the prompt, like CompletionOutput.logprobs, and None for the first
    token, which nothing precedes. `error` is the exception that ended the request, such as one of its callback.
    `request_id` and `metrics` are set by the engine.
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
